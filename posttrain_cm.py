"""Stage 4, post-training of the consistency branch: Easy Consistency Tuning (ECT), or distillation (ECD).

  reads   runs/NAME/midtrain_cm.safetensors and the images of --data; with --loss ecd also
          runs/NAME/pretrain.safetensors, the teacher
  writes  runs/NAME/posttrain_cm.safetensors   EMA weights; sample.py samples from them in one or two steps
  run     python posttrain_cm.py                                      # digits, half a minute on two CPU cores
          torchrun --nproc_per_node=8 posttrain_cm.py --data cifar10       # the paper's recipe, 12.8M images
  cost    per image: two forwards and one backward; --loss ecd: also two forwards of the teacher (euler: one),
          with guidance twice as many
  expect  digits: a loss of about 3. With ect a healthy run's loss does not fall: x_t does not determine x_r,
          so part of the target is noise. Judge by samples

--loss ect   f(x_t, t), x_t = x_0 + t eps, is trained to match f(x_r, r): the same image and noise, r < t.
--loss ecd   x_r is x_t after one step of the teacher's ODE. It depends on x_t alone; ECT's x_r depends on x_0
             as well. So ECD's target f(x_r, r) has less variance, but ECD inherits the teacher's error.
             --loss changes only x_r. Weight, c, times and learning rate stay those of the recipe.

After mid-training f(x_r, r) is near the endpoint of the trajectory. It is a good target even where r is close
to t, so the gap t - r can be small from the first step on. Without mid-training f(x_r, r) is a posterior
mean, which is near the endpoint only at small r. So ECT starts with a wide gap: with q = 2 (see below), r is
at first 0 for all t below 1.95, and the target there is the image itself. The gap then narrows every --double
steps. (On MNIST a fixed narrow gap was nearly as good, docs/mnist.md.) This baseline is run by
     python posttrain_cm.py --init runs/digits/pretrain.safetensors --q 2 --double 70 --steps 1500 \
                            --lr 3e-4 --out runs/digits/ect.safetensors

The backbones run in fp32, even on a GPU: for large q the difference f(x_t) - f(x_r) is lost in the
rounding error of bf16. Only imagenet512 runs in TF32, as in the authors' code.
"""
import copy, math, os

import torch

import model, sample, solve
from tools import dry_run

# q              sets the gap t - r = t n(t) / q^(k+1), at most t; 1 < n(t) < 5, see `ect_r`. At first k = 0
# double         every `double` steps k grows by 1, so the gap is divided by q. (ECT calls this doubling, as
#                its q is mostly 2.) 0: k stays 0, as suits a mid-trained model
# c              constant of pseudo-Huber; 0: the plain l2 norm
# weight         "gap" 1/(t-r), or "denoising" as in pre-training
# P_mean, P_std  mean and standard deviation of ln t
# lr_decay       learning rate: "linear" (to 0), "constant", or T (falls as sqrt(T / step) after step T)
# mid_t          time of the second of two sampling steps, stored in the result for sample.py
# network        constructor arguments that differ from those of --init
# solver         ODE solver of the teacher's single step in ECD
# The comment at the end of a line is the source of its values: the paper (2509.24526), its released code, ECT
# (2406.14548), or ours.
ECT = dict(optimizer="RAdam", beta2=0.999, batch=128, lr_decay="linear", warmup=0,                # paper
           double=0, weight="gap", loss="ect",                                                    # paper
           P_mean=-1.1, P_std=2.0, c=0.0,                                                         # ECT
           mid_t=0.821, network={}, solver="heun")                                                # code
ECT_PAPER = ECT | dict(steps=100_000, lr=1e-4, ema=0.9999,                                        # paper
                       network=dict(dropout=0.2))                                                 # code
ECD = ECT | dict(steps=125_000, lr=1e-6, lr_decay="constant", optimizer="Adam", beta2=0.99,       # paper
                 ema=0.9999, q=1024, loss="ecd", c=0.06, weight="denoising", P_mean=-0.8, P_std=1.6, # paper
                 mid_t=1.526)                                                                     # code
RECIPES = {
    "digits":      ECT | dict(steps=300, batch=64, lr=1e-4, ema=0.99, q=256),                     # ours
    "cifar10":     ECT_PAPER | dict(q=4096),                                                      # paper
    "ffhq64":      ECT_PAPER | dict(q=512),                                                       # paper
    "afhqv2-64":   ECT_PAPER | dict(q=1024),                                                      # paper
    # The paper reports ECD and ECT here, but not their settings. We take ECD with imagenet512's, without
    # its guidance and TF32, and add the dropout of ECT's own ImageNet 64x64 recipe. That recipe, for
    # diffusion weights, is --loss ect --q 4 --double 25000 --lr 1e-3 --lr-decay 2000.
    "imagenet64":  ECD | dict(network=dict(dropout=0.4, dropout_resolutions=(16, 8))),            # ours
    "imagenet512": ECD | dict(network=dict(dropout=0.0), precision="tf32",                        # code
                              guidance=2.05, teacher="runs/imagenet512/guided.safetensors",       # code
                              guide="runs/imagenet512/guide.safetensors"),
    # Adam, because the first five steps of RAdam are those of SGD: on MNIST RAdam was far worse at this rate.
    "custom":      ECT | dict(steps=10_000, lr=1e-4, ema=0.999, q=256, optimizer="Adam"),         # ours
}

# The public files that imagenet512 needs beside those of model.DATASETS.
PUBLIC_TEACHERS = {
    "runs/imagenet512/guided.safetensors": model.EDM2_URL + "edm2-img512-xxl-0939524-0.075.pkl",
    "runs/imagenet512/guide.safetensors": model.EDM2_URL + "edm2-img512-m-0268435-0.155.pkl"}


# === the method =============================================================================================

def consistency_loss(f, x_t, x_r, t, r, y, weight, c):
    """The loss of ECT and ECD, one number per sample: f(x_t, t) learns to match f(x_r, r), or x_r itself at
    r = 0. x_t, x_r (B,C,H,W), r < t (B,), weight (B,), y (B,), c >= 0 a number -> (B,)"""
    # fork_rng restores the RNG state, so both forward passes draw the same dropout mask. With two masks the
    # small difference of the two outputs would be mostly dropout noise.
    devices = [x_t.device] if x_t.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        target = torch.where(r.reshape(-1, *[1] * (x_r.dim() - 1)) > 0, f(x_r, r, y), x_r)
    # L = w(t, r) (sqrt(e^2 + c^2) - c),   e = || f(x_t, t) - sg f(x_r, r) ||,   sg: stop-gradient
    e = torch.linalg.vector_norm((f(x_t, t, y) - target).flatten(1), dim=1)        # its gradient at 0 is 0
    if c > 0: e = e ** 2 / ((e ** 2 + c ** 2).sqrt() + c)  # equal to L / w, without cancellation at small e
    return weight.reshape(e.shape) * e


def ect_loss(f, x0, eps, t, r, y, weight, c):
    """Easy Consistency Tuning (2406.14548): x_t and x_r are an image with the same noise at two levels. The
    mean of x_r given x_t is one Euler step of the ODE from x_t, so no teacher is needed. x0, eps (B,C,H,W),
    the others as in `consistency_loss` -> (B,)"""
    x_t = x0 + t.reshape(-1, *[1] * (x0.dim() - 1)) * eps
    x_r = x0 + r.reshape(-1, *[1] * (x0.dim() - 1)) * eps
    return consistency_loss(f, x_t, x_r, t, r, y, weight, c)


def ecd_loss(f, x0, eps, t, r, y, weight, c, D, solver="heun"):
    """Consistency distillation (2303.01469): x_r is one step of the ODE of the teacher D from x_t. Points of
    a trajectory share their endpoint, so f(x_r, r) is a target. The others as in `ect_loss` -> (B,)"""
    x_t = x0 + t.reshape(-1, *[1] * (x0.dim() - 1)) * eps
    return consistency_loss(f, x_t, ode_step(D, x_t, t, r, y, solver), t, r, y, weight, c)


def ode_step(D, x, t, r, y, solver="heun"):
    """One solver step of the PF-ODE, from each sample's t to its r, by "euler" or "heun" (2206.00364,
    algorithm 1). A step into r = 0 is always Euler's. x (B,C,H,W), t, r (B,), y (B,) -> x_r (B,C,H,W),
    without gradient"""
    if solver not in ("euler", "heun"): raise ValueError(f"solver is {solver}, not euler or heun")
    t_, r_ = (s.reshape(-1, *[1] * (x.dim() - 1)) for s in (t, r))
    with torch.no_grad():
        # dx/dt = (x - D(x, t)) / t
        slope_t = (x - D(x, t, y)) / t_
        x_r = x + (r_ - t_) * slope_t
        if solver == "euler": return x_r
        slope_r = (x_r - D(x_r, r, y)) / r_                # not finite at r = 0, where x_r is returned
        return torch.where(r_ > 0, x + (r_ - t_) * (slope_t + slope_r) / 2, x_r)


def ect_weight(t, r, kind, sigma_data=0.5):
    """Weights of ECT (2406.14548): "gap" 1/(t-r), "denoising" 1/c_out(t)^2, as in pre-training. t, r (B,)"""
    if kind == "gap": return 1 / (t - r)
    if kind != "denoising": raise ValueError(f"kind is {kind}, not gap or denoising")
    return (t ** 2 + sigma_data ** 2) / (t * sigma_data) ** 2


def ect_r(t, q, k=0):
    """The less noisy time r = t (1 - n(t) / q^(k+1)) >= 0, n(t) = 1 + 8 sigmoid(-t), of ECT (2406.14548).
    q^(k+1) is capped at 2^16, so that t - r keeps 8 of fp32's 24 bits. t (B,) -> (B,)"""
    divisor = min(q ** min(k + 1, 16), 2 ** 16)
    return (t * (1 - (1 + 8 * torch.sigmoid(-t)) / divisor)).clamp(min=0)


# === the run ================================================================================================

def flags():
    """The command line -> args. args.command_for: {input file: how to make it}"""
    p = model.parser(__doc__, RECIPES, predecessor="midtrain_cm", writes="posttrain_cm", precision="fp32")
    p.add_argument("--q", type=model.number(int, lambda n: 2 <= n <= 65536, "an integer in [2, 65536]"),
                   help="gap: r = t (1 - n(t) / q^(k+1)), k = 0 at the start")
    p.add_argument("--double", type=model.not_negative_int, metavar="STEPS",
                   help="steps after which k grows by 1, which narrows the gap; 0: it stays fixed")
    p.add_argument("--c", type=model.number(float, lambda a: 0 <= a < 1e6, "a number in [0, 1e6)"),
                   help="constant of pseudo-Huber; 0: the plain l2 norm")
    p.add_argument("--weight", choices=["gap", "denoising"],
                   help="gap: 1/(t-r); denoising: 1/c_out^2, as in pre-training")
    p.add_argument("--loss", choices=["ect", "ecd"], help="ect: x_r from data; ecd: from the teacher's ODE")
    p.add_argument("--solver", choices=["euler", "heun"], help="ODE solver of the one step in ecd")
    teacher_path = f"runs/{p.get_default('name')}/pretrain.safetensors"
    p.add_argument("--teacher", default=p.get_default("teacher") or teacher_path, metavar="FILE",
                   help="diffusion model, for --loss ecd")
    solve.guidance_flags(p)
    args = p.parse_args()
    if args.loss == "ect":
        model.reject_if_typed("--teacher", "--solver", "--guidance", "--guide",
                              because="--loss ect has no teacher")
    teacher_command = model.stage_command(args.teacher, ["pretrain"], args.recipe_name, args.data)
    args.command_for = {args.npz: model.prepare_command(args.name),
                        args.init: model.stage_command(args.init, ["midtrain_cm", "pretrain", "posttrain_cm"],
                                                       args.recipe_name, args.data)}
    if not model.typed("--init") and not os.path.exists(args.init):      # midtrain.py will need the teacher
        args.command_for = {teacher_path: teacher_command} | args.command_for
    if args.loss == "ecd":
        for file, command in (args.teacher, teacher_command), (solve.guide_file(args), solve.GUIDE_ADVICE):
            if file in PUBLIC_TEACHERS: command = model.import_command(PUBLIC_TEACHERS[file], args.data, file)
            if file: args.command_for[file] = command
    return args


def main():
    args = flags()
    if args.dry_run: return dry_run.posttrain_cm(args)
    rank, world, device, local_batch = model.setup(args.batch, args.precision)

    data, dataset = model.open_data(args)
    model.reseed(args.seed)
    net, header = model.initial_model(args, "Denoiser", dataset, device, **args.network)
    is_consistency_model = header.get("stage") in solve.CONSISTENCY_STAGES
    starts_wide = args.q <= 4 and args.double              # as in ECT, whose q is 2 or 4
    if args.loss == "ect" and not is_consistency_model and not starts_wide:
        model.say(f"warning: --init {args.init} is not mid-trained. ECT's own recipe then starts with a wide "
                  "gap: --q 2 --double STEPS.")
    if args.precision == "bf16":
        model.say("warning: for a narrow gap f(x_t) - f(x_r) is lost in the rounding error of bf16 "
                  "(docs/precision.md). Leave out --precision.")
    files = dict(init=args.init)
    if args.loss == "ecd":
        teacher, teacher_header = model.load_predecessor(args, "teacher", ["pretrain"], device, dataset)
        model.check_scale(args.init, header, args.teacher, teacher_header)
        teacher.backbone_dtype = model.DTYPES[args.precision]
        teacher = solve.guide_teacher(teacher, teacher_header, args, args.teacher)
        teacher = model.compiled(teacher, args.compile)
        files |= dict(teacher=args.teacher, guide=solve.guide_file(args))
    header |= model.run_metadata(args, "posttrain_cm", "images", world, data.identity, **files)
    header["mid_t"] = args.mid_t
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    net.train()
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
        t = (args.P_mean + args.P_std * torch.randn(local_batch, device=device)).exp()   # (local_batch,)
        r = ect_r(t, args.q, k=step // args.double if args.double else 0)
        weight = ect_weight(t, r, args.weight, header["sigma_data"])
        eps = torch.randn_like(x0)

        mean_loss, batch = 0, (x0, eps, t, r, y, weight)
        for x0, eps, t, r, y, weight in model.microbatches(wrapped_net, args.microbatch, *batch):
            if args.loss == "ect":
                losses = ect_loss(wrapped_net, x0, eps, t, r, y, weight, args.c)
            else:
                losses = ecd_loss(wrapped_net, x0, eps, t, r, y, weight, args.c, teacher, args.solver)
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
