"""Stage 1, pre-training: a diffusion model D(x, t) ~ E[x_0 | x_t], or a flow-matching model, as the teacher.

  reads   the images of --data
  writes  runs/NAME/pretrain.safetensors       EMA weights: the teacher, and midtrain.py's initial weights
          runs/NAME/pretrain_flow.safetensors  with --objective flow: v(z, t) for the Mean Flow branch
  run     python pretrain.py                                           # digits, two minutes on two CPU cores
          python pretrain.py --objective flow
          torchrun --nproc_per_node=8 pretrain.py --data cifar10       # EDM's recipe, 200M images
  cost    per image: one forward and one backward
  expect  digits: the loss, summed over 64 pixels, falls from about 72 to about 26 (flow: to about 22)

To skip this stage, import a public checkpoint with tools/import_checkpoint.py.
"""
import copy, math

import torch

import model, sample
from tools import dry_run

# warmup         images over which the learning rate rises
# lr_decay       learning rate: "linear" (to 0), "constant", or T (falls as sqrt(T / step) after step T)
# P_mean, P_std  mean and standard deviation of ln t (edm) or logit t (flow)
# network        constructor arguments that differ from model.DATASETS
# The comment at the end of a line is the source of its values: EDM (2206.00364, table 7), EDM2 (2312.02696),
# MeanFlow (2505.13447), the CMT paper, or ours. EDM's augmentation, EDM2's loss with a learned uncertainty
# and its EMA with a power profile are not implemented.
ADAM = dict(optimizer="Adam", beta2=0.999, network={})                                            # EDM
OURS = ADAM | dict(P_mean=-1.2, P_std=1.2,                                                        # EDM
                   lr_decay="linear")                                                             # ours
EDM = ADAM | dict(batch=256, lr_decay="constant", warmup=10**7, ema=0.999645, P_mean=-1.2,        # EDM
                  P_std=1.2)                                                                      # EDM
EDM2 = ADAM | dict(batch=2048, warmup=10**7, beta2=0.99,                                          # EDM2
                   ema=0.9999)                                                                    # ours
FLOW = ADAM | dict(lr_decay="constant", P_mean=0.0, P_std=1.0)                                    # ours
RECIPES = {
    "edm": {
        "digits":      OURS | dict(steps=1600, batch=64, lr=2e-3, warmup=0, ema=0.99),            # ours
        "cifar10":     EDM | dict(steps=390_625, batch=512, lr=1e-3, ema=0.99929),                # EDM
        "ffhq64":      EDM | dict(steps=781_250, lr=2e-4),                                        # EDM
        "afhqv2-64":   EDM | dict(steps=781_250, lr=2e-4),                                        # EDM
        "imagenet64":  EDM2 | dict(steps=524_288, lr=1e-2, lr_decay=35_000, P_mean=-0.8, P_std=1.6),    # EDM2
        "imagenet512": EDM2 | dict(steps=458_752, lr=6.5e-3, lr_decay=70_000, P_mean=-0.4, P_std=1.0),  # EDM2
        "custom":      OURS | dict(steps=20_000, batch=128, lr=1e-3, warmup=12_800, ema=0.999),   # ours
    },
    # The CMT paper's teacher of a Mean Flow model is a small Mean Flow model, not a flow-matching model.
    "flow": {
        "digits":      FLOW | dict(steps=1600, batch=64, lr=2e-3, lr_decay="linear", warmup=0,    # ours
                                   ema=0.99),                                                     # ours
        "cifar10":     FLOW | dict(steps=200_000,                                                 # ours
                                   batch=1024, lr=6e-4, warmup=10_000 * 1024, ema=0.99995),       # MeanFlow
        "imagenet256": FLOW | dict(steps=400_000,                                                 # ours
                                   batch=256, lr=1e-4, beta2=0.95, warmup=0, ema=0.9999,          # MeanFlow
                                   network={"patch_size": 4, "hidden_size": 768, "depth": 12,     # paper
                                            "num_heads": 12}),
        "custom":      FLOW | dict(steps=20_000, batch=128, lr=1e-3, lr_decay="linear",           # ours
                                   warmup=12_800, ema=0.999),                                     # ours
    },
}


# === the method =============================================================================================

def edm_loss(D, x0, eps, t, y, sigma_data=0.5):
    """EDM's denoising loss (2206.00364, eq. 2 with the weight of table 1), one number per sample.
    x0, eps (B,C,H,W), t (B,), y (B,) -> (B,)"""
    x_t = x0 + t.reshape(-1, *[1] * (x0.dim() - 1)) * eps
    weight = (t ** 2 + sigma_data ** 2) / (t * sigma_data) ** 2
    # w(t) ||D(x_t, t) - x_0||^2 with w = 1 / c_out(t)^2: the error of the raw network has weight 1 at every t
    return weight * (D(x_t, t, y) - x0).square().flatten(1).sum(1)


def flow_loss(u, x0, eps, t, y):
    """Flow matching (2210.02747), one number per sample. u(z, t, t, y) is the velocity v(z, t); u takes two
    times because its weights initialise a Mean Flow model. x0, eps (B,C,H,W), t (B,), y (B,) -> (B,)"""
    t_ = t.reshape(-1, *[1] * (x0.dim() - 1))
    z = (1 - t_) * x0 + t_ * eps
    # ||u(z_t, t, t) - (eps - x_0)||^2
    return (u(z, t, t, y) - (eps - x0)).square().flatten(1).sum(1)


# === the run ================================================================================================

def flags():
    """The command line -> args"""
    objective = model.peek_flag("--objective", "edm", RECIPES)
    stage = {"edm": "pretrain", "flow": "pretrain_flow"}[objective]
    p = model.parser(__doc__, RECIPES[objective], predecessor=None, writes=stage)
    p.add_argument("--objective", choices=RECIPES, default="edm", help="edm: denoising; flow: flow matching")
    args = p.parse_args()
    args.stage = stage
    args.command_for = {args.npz: model.prepare_command(args.name)}      # the command that makes each input
    return args


def main():
    args = flags()
    if args.dry_run: return dry_run.pretrain(args)
    rank, world, device, local_batch = model.setup(args.batch, args.precision)

    data, dataset = model.open_data(args)
    model.reseed(args.seed)
    header = model.fresh_header(dataset, model.KIND[args.stage], **args.network)
    net = model.build(header).to(device).train()
    header |= model.run_metadata(args, args.stage, "images", world, data.identity)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    net.backbone_dtype = model.DTYPES[args.precision]
    # wrapped_net: net, inside DDP (which averages the gradients of all processes) and torch.compile if used
    wrapped_net = model.compiled(model.parallel(net, world), args.compile)
    optimizer = model.optimizer(args, net)

    step = start = model.resume_run(args.out, net, ema, optimizer, header)
    if step == 0: model.normalise_weights(net)             # changes EDM2 networks only (2312.02696, eq. 66)
    log, stop, save_timer = model.Log(args, "images", world, step), model.Stop(world), model.SaveTimer(args)
    model.say(data)
    batches = model.read_batches(data, args, step, rank, local_batch, device)
    while True:
        done = step == args.steps or stop(step)
        if rank == 0 and step > start and (done or save_timer.due(step)):
            model.save_run(args, step, net, ema, optimizer, header)
            if args.preview: sample.write_preview(ema, header, args)
        if done: break

        model.reseed(args.seed, rank, step)                # a resumed run draws the same numbers
        x0, y = next(batches)
        x0 = model.to_network(x0, header)                                          # (local_batch, C, H, W)
        y = model.drop_labels(y, header)                                           # (local_batch,)
        t = args.P_mean + args.P_std * torch.randn(local_batch, device=device)
        t = t.exp() if args.objective == "edm" else t.sigmoid()                    # (local_batch,)
        eps = torch.randn_like(x0)

        mean_loss = 0
        for x0, eps, t, y in model.microbatches(wrapped_net, args.microbatch, x0, eps, t, y):
            if args.objective == "edm":
                losses = edm_loss(wrapped_net, x0, eps, t, y, header["sigma_data"])        # (microbatch,)
            else:
                losses = flow_loss(wrapped_net, x0, eps, t, y)
            loss = losses.sum() / local_batch              # a microbatch's share of the mean
            loss.backward()
            mean_loss += loss.detach()

        lr = model.learning_rate(args, step)
        norm = model.gradient_norm(net)
        if math.isfinite(norm):              # else skip the step; `log` ends the run after ten in a row
            for group in optimizer.param_groups: group["lr"] = lr
            optimizer.step()
            model.update_ema(ema, net, decay=min(args.ema, (1 + step) / (10 + step)))          # warms up
            model.normalise_weights(net)     # after the EMA, as EDM2 does
        optimizer.zero_grad(set_to_none=True)
        step += 1
        log(step, mean_loss, norm, lr)


if __name__ == "__main__":
    model.run(main)
