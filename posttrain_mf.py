"""Stage 4, post-training of the Mean Flow branch: train u on real images with the MeanFlow identity.

  z_t = (1 - t) x_0 + t eps,   0 <= r <= t <= 1                           x_0 an image, eps noise
  (t - r) u(z_t, r, t) = int_r^t v(z_tau, tau) dtau                       the definition of u
  u = v - (t - r) du/dt                                                   d/dt of both sides, r fixed

  du/dt = v ∂u/∂z + ∂u/∂t is the total derivative along the trajectory, whose velocity is v(z_t, t). The loss
  uses eps - x_0 in its place (without guidance and --velocity teacher). E[eps - x_0 | z_t] = v(z_t, t), and
  the target is affine in v, so the expected target is the same. For p = 0 so is the expected gradient.

  reads   runs/NAME/midtrain_mf.safetensors and the images of --data
  writes  runs/NAME/posttrain_mf.safetensors   EMA weights; sample.py samples from them in any number of steps
  run     python posttrain_mf.py                                        # digits, two minutes on two CPU cores
          torchrun --nproc_per_node=8 posttrain_mf.py --data imagenet256
  cost    per image: one forward and one backward. Samples with r < t also need the derivative: a JVP, or two
          forwards. Guidance adds two forwards, and --velocity teacher adds one
  expect  digits: a loss of about 23, summed over 64 pixels. Most of it is the variance of eps - x_0 given
          z_t, which no model can reduce. With --p 1 (imagenet256) every loss is divided by its own value,
          and stays near 1. Judge by samples

Two baselines: MeanFlow from the flow-matching weights, with the compute of mid- and post-training together;
and from scratch, with the compute of pre-, mid- and post-training.
     python posttrain_mf.py --init runs/digits/pretrain_flow.safetensors --steps 3986 --lr 6e-4 \
                            --out runs/digits/mf_flow.safetensors
     python posttrain_mf.py --init none --steps 5357 --lr 1e-3 --out runs/digits/mf_scratch.safetensors

On a GPU the backbone runs in bf16, which was precise enough for the JVP of small networks without guidance
(docs/precision.md). With --derivative difference it runs in fp32. If imagenet256 diverges, train
first without guidance (--omega 1 --kappa 0 --out X) and give X as --init, or use --precision fp32.
"""
import copy, math

import torch

import model, sample
from tools import dry_run

# r_neq_t        fraction of samples with r < t: 0.25, 0.5 or 0.75
# P_mean, P_std  r and t are two draws with logit ~ N(P_mean, P_std^2), sorted
# p, c           exponent and constant of the adaptive weight; p = 0 turns it off
# omega, kappa, guidance_interval   see `guided_velocity`; omega = 1, kappa = 0 is no guidance
# warmup         images over which the learning rate rises
# network        constructor arguments that differ from those of --init
# The comment at the end of a line is the source of its values: MeanFlow (2505.13447), or ours. The CMT paper
# does not state its settings for this stage.
MF = dict(optimizer="Adam", beta2=0.999, P_mean=-0.4, P_std=1.0, r_neq_t=0.25, p=1.0, c=1e-3,     # MeanFlow
          omega=1.0, kappa=0.0, guidance_interval=(0.0, 1.0),                                     # MeanFlow
          lr_decay="linear", warmup=0, network={})                                                # ours
RECIPES = {
    # p = 1 gave better one-step and worse two-step samples of digits than p = 0 (one seed).
    "digits":      MF | dict(steps=1200, batch=64, lr=2e-4, ema=0.99, p=0.0, optimizer="RAdam"),  # ours
    "cifar10":     MF | dict(steps=200_000,                                                       # ours
                             batch=1024, lr=6e-4, ema=0.99995, p=0.75, lr_decay="constant",       # MeanFlow
                             warmup=10_000 * 1024, P_mean=-2.0, P_std=2.0, r_neq_t=0.75,          # MeanFlow
                             network=dict(dropout=0.2)),                                          # MeanFlow
    "imagenet256": MF | dict(steps=400_000,                                                       # ours
                             batch=256, lr=1e-4, ema=0.9999, beta2=0.95, lr_decay="constant",     # MeanFlow
                             c=1e-2, omega=0.2, kappa=0.92, guidance_interval=(0.0, 0.75)),       # MeanFlow
    # CIFAR-10's times are better than ImageNet's on MNIST. Adam, because the first five steps of RAdam are
    # those of SGD, which broke a model of MNIST (p = 0.25).
    "custom":      MF | dict(steps=10_000, batch=128, lr=3e-4, ema=0.999, p=0.5, warmup=12_800,   # ours
                             P_mean=-2.0, P_std=2.0, r_neq_t=0.75),                               # MeanFlow
}


# === the method =============================================================================================

def meanflow_loss(u, z, r, t, y, v, dudt, p=1.0, c=1e-3):
    """Mean Flow (2505.13447, eq. 10 and 22), one number per sample. z, v (B,C,H,W), r <= t (B,), y (B,), dudt
    (B,C,H,W) the derivative of u along the trajectory, or the number 0 if r = t in all samples -> (B,)"""
    # The adaptive weight keeps samples with a large error from dominating the gradient.
    # u_target = v - (t - r) du/dt,   ||u - sg u_target||^2 / sg(||u - u_target||^2 + c)^p,   sg: no gradient
    target = (v - (t - r).reshape(-1, *[1] * (z.dim() - 1)) * dudt).detach()
    e = (u(z, r, t, y) - target).square().flatten(1).sum(1)
    return e / (e.detach() + c) ** p


def derivative_jvp(u, z, r, t, y, v):
    """d/dt u(z_t, r, t) along dz/dt = v, exactly, by forward-mode differentiation (a JVP). z, v (B,C,H,W), r,
    t, y (B,) -> (B,C,H,W), without gradient. Restores the RNG state, so that the next forward pass draws the
    same dropout masks."""
    # The tangents of (z, r, t) are (v, 0, 1). Fused attention kernels have no forward-mode derivative, so the
    # math kernel is used.
    ad = torch.autograd.forward_ad
    devices = [z.device] if z.is_cuda else []
    math_attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), torch.random.fork_rng(devices), math_attention, ad.dual_level():
        dual = u(ad.make_dual(z, v), r, ad.make_dual(t, torch.ones_like(t)), y)
        return ad.unpack_dual(dual).tangent


def derivative_difference(u, z, r, t, y, v, delta=0.005):
    """As `derivative_jvp`, by a central difference: two forwards with equal dropout masks. It needs an fp32
    backbone."""
    # ( u(z + delta v, r, t + delta) - u(z - delta v, r, t - delta) ) / (2 delta)
    devices = [z.device] if z.is_cuda else []
    with torch.no_grad():
        with torch.random.fork_rng(devices): ahead = u(z + delta * v, r, t + delta, y)
        with torch.random.fork_rng(devices): behind = u(z - delta * v, r, t - delta, y)
        return (ahead - behind) / (2 * delta)


def guided_velocity(u, z, t, y, v, omega, kappa, null, low=0.0, high=1.0):
    """The velocity with guidance (2505.13447, eq. 20): v_g for samples with a label and t in [low, high], v
    for the others. z, v (B,C,H,W), t, y (B,) -> (B,C,H,W), without gradient"""
    # v_g = omega v + kappa u(z, t, t | y) + (1 - omega - kappa) u(z, t, t | null)
    # For p = 0 the loss pulls u(z, t, t | y) to the mean of v_g, which contains u itself. The fixed point is
    # u = w E[v | z_t, y] + (1 - w) u(z, t, t | null): guidance with the scale w = omega / (1 - kappa).
    if (omega, kappa) == (1.0, 0.0): return v
    with torch.no_grad():
        nulls = torch.full_like(y, null)
        guided = omega * v + kappa * u(z, t, t, y) + (1 - omega - kappa) * u(z, t, t, nulls)
    inside = (y != null) & (low <= t) & (t <= high)
    return torch.where(inside.reshape(-1, *[1] * (v.dim() - 1)), guided, v)


def drop_labels_where_equal(y, r_equals_t, label_dropout, null):
    """Replace labels by the null label, only where r = t, because guidance evaluates the unlabelled model
    only at equal times. On average a fraction `label_dropout` of the whole batch loses its label.
    y (B,), r_equals_t (B,) bool -> (B,)"""
    probability = label_dropout * len(y) / r_equals_t.sum().clamp(min=1)
    return torch.where(r_equals_t & (torch.rand(len(y), device=y.device) < probability), null, y)


def sample_r_t(n, r_neq_t, mean, std, device):
    """Draw two times with logit ~ N(mean, std^2), and sort them. Of every four samples the first 4 * r_neq_t
    keep r < t; the rest get r = t, so every microbatch has the same fraction of each. -> r, t (n,)"""
    times = (mean + std * torch.randn(2, n, device=device)).sigmoid()                      # (2, n)
    r, t = times.amin(0), times.amax(0)
    return torch.where(torch.arange(n, device=device) % 4 < 4 * r_neq_t, r, t), t


# === the run ================================================================================================

def flags():
    """The command line -> args. args.command_for: {input file: how to make it}"""
    precision = "fp32" if model.peek_flag("--derivative", "jvp") == "difference" else None
    p = model.parser(__doc__, RECIPES, predecessor="midtrain_mf", writes="posttrain_mf", precision=precision,
                     compile=False)
    p.add_argument("--velocity", choices=["data", "teacher"], default="data",
                   help="v of the target: eps - x_0, or the flow-matching teacher's")
    p.add_argument("--teacher", default=f"runs/{p.get_default('name')}/pretrain_flow.safetensors",
                   metavar="FILE", help="flow-matching model, for --velocity teacher")
    p.add_argument("--derivative", choices=["jvp", "difference"], default="jvp",
                   help="du/dt along the trajectory: exact, or by central differences")
    p.add_argument("--r-neq-t", type=float, choices=[0.25, 0.5, 0.75], help="fraction of samples with r < t")
    p.add_argument("--p", type=model.number(float, lambda a: 0 <= a < 2, "a number in [0, 2)"),
                   help="exponent of the adaptive weight")
    p.add_argument("--c", type=model.number(float, lambda a: 0 <= a < 1e6, "a number in [0, 1e6)"),
                   help="constant of the adaptive weight")
    p.add_argument("--omega", type=model.finite, help="guidance: weight of v")
    p.add_argument("--kappa", type=model.fraction,
                   help="guidance: weight of u(z,t,t|y); the rest is u(z,t,t|null)")
    p.add_argument("--guidance-interval", nargs=2, metavar=("LOW", "HIGH"),
                   type=model.number(float, lambda t: 0 <= t <= 1, "a number in [0, 1]"),
                   help="guidance only where LOW <= t <= HIGH")
    args = p.parse_args()
    if args.p == 0: model.reject_if_typed("--c", because="p is 0, which means no adaptive weight")
    for flag, size in ("--batch", args.batch), ("--microbatch", args.microbatch or 4):
        if size % 4:
            raise model.UserError(f"{flag} {size} is not a multiple of 4; of every four samples some have "
                                  "r < t, the others r = t.")
    if args.velocity == "data": model.reject_if_typed("--teacher", because="--velocity is data")
    if (args.omega, args.kappa) == (1, 0):
        model.reject_if_typed("--guidance-interval", because="--omega 1 and --kappa 0 mean no guidance")
    low, high = args.guidance_interval
    if low >= high: raise model.UserError(f"--guidance-interval {low} is not below {high}.")
    if args.derivative == "difference" and args.precision == "bf16":
        raise model.UserError("--derivative difference is lost in the rounding error of bf16; "
                              "choose --precision fp32 or --derivative jvp.")
    inputs = [(args.init, ["midtrain_mf", "pretrain_flow", "posttrain_mf"])]
    if args.velocity == "teacher": inputs.append((args.teacher, ["pretrain_flow"]))
    args.command_for = {file: model.stage_command(file, stages, args.recipe_name, args.data)
                        for file, stages in inputs} | {args.npz: model.prepare_command(args.name)}
    return args


def main():
    args = flags()
    if args.dry_run: return dry_run.posttrain_mf(args)
    rank, world, device, local_batch = model.setup(args.batch, args.precision)
    if local_batch % 4:
        raise model.UserError(f"--batch {args.batch} is not a multiple of {4 * world}; in each of the "
                              f"{world} processes, of every four samples some have r < t, the others r = t.")

    data, dataset = model.open_data(args)
    model.reseed(args.seed)
    # interval: the network also takes r. A flow-matching model gains an embedding of t - r, at first zero.
    net, header = model.initial_model(args, "MeanVelocity", dataset, device, interval=True, **args.network)
    teacher, files = None, dict(init=args.init)
    if args.velocity == "teacher":
        teacher, teacher_header = model.load_predecessor(args, "teacher", ["pretrain_flow"], device, dataset)
        model.check_scale(args.init, header, args.teacher, teacher_header)
        teacher.backbone_dtype = model.DTYPES[args.precision]
        teacher, files["teacher"] = model.compiled(teacher, args.compile), args.teacher
    header |= model.run_metadata(args, "posttrain_mf", "images", world, data.identity, **files)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    net.train()
    net.backbone_dtype = model.DTYPES[args.precision]
    # wrapped_net: net, inside DDP (which averages the gradients of all processes) and torch.compile if used
    wrapped_net = model.compiled(model.parallel(net, world), args.compile)
    optimizer = model.optimizer(args, net)
    derivative = {"jvp": derivative_jvp, "difference": derivative_difference}[args.derivative]
    null = header["network"]["label_dim"]                  # index after the last class; 0 if there are none
    if not null: model.reject_if_typed("--omega", "--kappa", because="the model has no classes to guide by")

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
        r, t = sample_r_t(local_batch, args.r_neq_t, args.P_mean, args.P_std, device)
        y = drop_labels_where_equal(y, r == t, header["label_dropout"], null)     # (local_batch,)
        v = torch.randn_like(x0) - x0                                              # eps - x_0
        z = x0 + t[:, None, None, None] * v

        mean_loss, parts, batch = 0, {"loss r<t": 0, "loss r=t": 0}, (z, r, t, y, v)
        for z, r, t, y, v in model.microbatches(wrapped_net, args.microbatch, *batch):
            if teacher is not None:      # a compiled network has no truth value
                with torch.no_grad(): v = teacher(z, t, t, y)
            v = guided_velocity(net, z, t, y, v, args.omega, args.kappa, null, *args.guidance_interval)

            # Only samples with r < t need du/dt. Their loss has to draw the same dropout masks as du/dt, so
            # it follows at once, on the same batch. The JVP is of `net`: DDP has no forward-mode derivative.
            groups_of_4, n_below = [a.unflatten(0, (-1, 4)) for a in (z, r, t, y, v)], round(4 * args.r_neq_t)
            samples_below = [a[:, :n_below].flatten(0, 1) for a in groups_of_4]
            samples_equal = [a[:, n_below:].flatten(0, 1) for a in groups_of_4]
            dudt = derivative(net, *samples_below)
            loss_below = meanflow_loss(wrapped_net, *samples_below, dudt, args.p, args.c)
            loss_equal = meanflow_loss(wrapped_net, *samples_equal, 0, args.p, args.c)
            loss = torch.cat([loss_below, loss_equal]).sum() / local_batch     # a microbatch's share
            loss.backward()
            mean_loss += loss.detach()
            parts["loss r<t"] += loss_below.detach().sum() / (local_batch * args.r_neq_t)
            parts["loss r=t"] += loss_equal.detach().sum() / (local_batch * (1 - args.r_neq_t))

        lr = model.learning_rate(args, step)
        norm = model.gradient_norm(net)
        if math.isfinite(norm):              # else skip the step; `log` ends the run after ten in a row
            for group in optimizer.param_groups: group["lr"] = lr
            optimizer.step()
            model.update_ema(ema, net, decay=min(args.ema, (1 + step) / (10 + step)))          # warms up
            model.normalise_weights(net)     # after the EMA, as EDM2 does
        optimizer.zero_grad(set_to_none=True)
        step += 1
        log(step, mean_loss, norm, lr, parts)


if __name__ == "__main__":
    model.run(main)
