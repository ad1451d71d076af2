"""Stage 1, pre-training: a diffusion model D(x, t) ~ E[x_0 | x_t], the teacher of everything after it.

  reads   the images of --data
  writes  runs/D/pretrain.safetensors        (EMA weights; midtrain.py solves their ODE and starts from them)
          runs/D/pretrain_flow.safetensors   with --objective flow: v(z, t) for the mean-flow branch
  run     python pretrain.py                                           # digits, two minutes on two CPU cores
          python pretrain.py --objective flow
          torchrun --nproc_per_node=8 pretrain.py --data cifar10       # EDM's recipe, 200M images
  cost    per image: one forward and one backward
  expect  digits: the loss, summed over 64 pixels, falls from about 72 to about 26
"""
import copy

import torch

import model

# decay: lr falls to 0 at the end; warmup: in images. EDM: ln t ~ N(P_mean, P_std^2); flow: logit t is.
RECIPES = {
    # cifar10 is EDM's (2206.00364, table 7): constant lr, an EMA half-life of 500,000 images. The other rows
    # are ours.
    "edm": {
        "digits":      dict(steps=1600,    batch=64,   lr=2e-3, decay=True,  warmup=0,      ema=0.99,
                            P_mean=-1.2, P_std=1.2),
        "cifar10":     dict(steps=390_625, batch=512,  lr=1e-3, decay=False, warmup=10**7,  ema=0.99929,
                            P_mean=-1.2, P_std=1.2),
        "own data":    dict(steps=20_000,  batch=128,  lr=1e-3, decay=True,  warmup=12_800, ema=0.999,
                            P_mean=-1.2, P_std=1.2),
    },
    # Nobody published a flow-matching teacher for CMT: all of it is ours, except that cifar10 and imagenet256
    # have the batch, lr, warm-up and EMA of Mean Flow's runs (2505.13447).
    "flow": {
        "digits":      dict(steps=1600,    batch=64,   lr=2e-3, decay=True,  warmup=0,      ema=0.99,
                            P_mean=0.0, P_std=1.0),
        "cifar10":     dict(steps=200_000, batch=1024, lr=6e-4, decay=False, warmup=10**7,  ema=0.99995,
                            P_mean=0.0, P_std=1.0),
        "imagenet256": dict(steps=400_000, batch=256,  lr=1e-4, decay=False, warmup=0,      ema=0.9999,
                            P_mean=0.0, P_std=1.0),
        "own data":    dict(steps=20_000,  batch=128,  lr=1e-3, decay=True,  warmup=12_800, ema=0.999,
                            P_mean=0.0, P_std=1.0),
    },
}


# === the method =============================================================================================

def edm_loss(D, x0, eps, t, y, sigma_data=0.5):
    """EDM's denoising loss (2206.00364, eq. 2 with the weight of table 1), one number per sample.
    x0, eps (B,C,H,W), t (B,), y (B,) -> (B,)"""
    x_t = x0 + t[:, None, None, None] * eps
    weight = (t ** 2 + sigma_data ** 2) / (t * sigma_data) ** 2
    # w(t) ||D(x_t, t) - x_0||^2 with w = 1 / c_out(t)^2: the raw network's error counts alike at every t
    return weight * (D(x_t, t, y) - x0).square().sum(dim=(1, 2, 3))


def flow_loss(u, x0, eps, t, y):
    """Flow matching (2210.02747), one number per sample. x0, eps (B,C,H,W), t (B,), y (B,) -> (B,)"""
    t_ = t[:, None, None, None]
    z = (1 - t_) * x0 + t_ * eps
    # ||u(z_t, t, t) - (eps - x_0)||^2
    return (u(z, t, t, y) - (eps - x0)).square().sum(dim=(1, 2, 3))


# === the run ================================================================================================

def main():
    objective = model.given("--objective", "edm", RECIPES)
    kind, stage = {"edm": ("Denoiser", "pretrain"), "flow": ("MeanVelocity", "pretrain_flow")}[objective]
    p = model.parser(__doc__, RECIPES[objective], reads=None, writes=stage)
    p.add_argument("--objective", choices=RECIPES, default="edm", help="edm: denoising; flow: flow matching")
    args = p.parse_args()
    rank, world, device, batch = model.setup(args.batch)

    images, labels, row = model.read_images(args.path, model.DATASETS.get(args.row))
    model.reseed(args.seed)
    header = model.fresh_header(row, kind, **row.get("teacher", {}))
    net = model.build(header).to(device).train()
    header |= model.stamp(args, stage, "images", world, data=args.path)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    net.body_dtype = model.BODY[args.precision]
    ddp = model.parallel(net, world)
    opt = torch.optim.Adam(net.parameters(), args.lr, betas=(0.9, 0.999), eps=1e-8)

    step = start = model.resume_run(args.out, net, ema, opt, header)
    log = model.Log(args, "images", world, step)
    while True:
        done = step == args.steps
        if rank == 0 and step > start and (done or step % args.save_every == 0):
            model.save_run(args.out, step, net, ema, opt, header)
        if done: break

        model.reseed(args.seed, rank, step)
        at = model.batch_indices(len(images), args.seed, step * args.batch + rank * batch, batch)
        x0 = model.to_float(images[at]).to(device)                                 # (b, C, H, W)
        y = model.drop_labels(labels[at], header).to(device)                       # (b,)
        noise_level = args.P_mean + args.P_std * torch.randn(batch, device=device)
        eps = torch.randn_like(x0)

        if objective == "edm": loss = edm_loss(ddp, x0, eps, noise_level.exp(), y).mean()
        else:                  loss = flow_loss(ddp, x0, eps, noise_level.sigmoid(), y).mean()
        loss.backward()
        lr = args.lr * min(1, (step + 1) * args.batch / max(args.warmup, 1))
        if args.decay: lr *= 1 - step / args.steps
        norm = model.update(net, ema, opt, lr, decay=min(args.ema, (1 + step) / (10 + step)))
        step += 1
        log(step, loss, norm, lr)


if __name__ == "__main__":
    model.run(main)
