"""Stage 3, consistency mid-training (CMT): map every state of a teacher trajectory to its endpoint.

  reads   runs/NAME/pretrain.safetensors       the teacher, and the initial weights of the student. No images
                                               are needed
          runs/NAME/pretrain_flow.safetensors  instead, with --branch mf
  writes  runs/NAME/midtrain_cm.safetensors    EMA weights of a one- or two-step sampler, for posttrain_cm.py
          runs/NAME/midtrain_mf.safetensors    with --branch mf: EMA weights of an any-step sampler
  run     python midtrain.py                                           # digits, two minutes on two CPU cores
          python midtrain.py --branch mf                               # four minutes
          torchrun --nproc_per_node=8 midtrain.py --data cifar10       # 38.4M pairs, as the paper
  cost    per pair: one forward of the teacher (with Heun two), one forward and one backward of the student
  expect  digits: the loss, about the norm of the error, falls from 0.8 to 0.33;
          with --branch mf, the squared norm, from 2.5 to 0.35

--branch cm   a consistency model f(x, t): train it on the pairs (state, endpoint) of teacher trajectories.
--branch mf   a Mean Flow model u(z, r, t): train it on the mean velocity between any two states.

The teacher of a Mean Flow model can be a flow-matching model, a Mean Flow model (--solver jump; 8 steps for
imagenet256), or a denoiser. A denoiser's trajectories are converted to flow time, in which a state is
(1 - t) x_0 + t eps. It predicts x_0, not a velocity, so its weights cannot initialise the student: with a
denoiser pass --teacher runs/digits/pretrain.safetensors --init none.

All pairs have the same weight. In pseudocode:

    teacher, student = the pre-trained model, frozen, and a copy of it
    for each step:
        if no pairs are left: solve the teacher's ODE from many noises at once, shuffle all pairs (x_t, x_end)
        x_t, t, x_end, y = the next batch of pairs
        loss = mean of distance(student(x_t, t, y), x_end)                 (mf: u against a mean velocity)
        if the gradient is finite:
            student = student - lr * gradient(loss)                        (RAdam or Adam)
            ema = decay * ema + (1 - decay) * student
            normalise the student's weights                                (EDM2's networks only)
    save ema
"""
import copy, math, shlex
from pathlib import Path

import torch

import model, sample, solve
from tools import dry_run, feature_networks

# batch     pairs of states in one step, over all GPUs
# nfe       function evaluations of the teacher for one trajectory, at most (see solve.solver_times)
# solver    ODE solver of the teacher; None: the teacher's default
# warmup    pairs over which the learning rate rises linearly
# lr_decay  learning rate: "linear" (to 0), "constant", or T (falls as sqrt(T / step) after step T)
# mid_t     time of the second of two sampling steps, stored in the result for sample.py
# network   constructor arguments of the student. They override those of the --init file, or if it is none,
#           those of model.DATASETS
# The comment at the end of a line is the source of its values: the paper (2509.24526), its released code, ECT
# (2406.14548), MeanFlow (2505.13447), or ours. The paper uses LPIPS as the distance, and ELatentLPIPS for
# latents. We cannot redistribute their weights, so the default is pseudo-Huber.
CM = dict(optimizer="RAdam", beta2=0.999, batch=128, lr_decay="linear", warmup=0, nfe=16,         # paper
          distance="huber",                                                                       # ours
          solver="dpm3", network={}, mid_t=0.7757)                                                # code
CM_PAPER = CM | dict(steps=300_000, lr=2e-4, ema=0.999,                                           # paper
                     network=dict(dropout=0.2))                                                   # code
# Adam, because the first five steps of RAdam are those of SGD. They are proportional to the gradient, which
# is large for a sum of squares: on MNIST they raised the loss from 42 to 1e7. On digits RAdam works.
MF = dict(optimizer="Adam", beta2=0.999,                                                          # MeanFlow
          lr_decay="linear", warmup=0, solver=None, nfe=16, network={},                           # ours
          distance="l2")                                                                          # paper
RECIPES = {
    "cm": {
        "digits":      CM | dict(steps=1200, batch=64, lr=3e-3, ema=0.99),                        # ours
        "cifar10":     CM_PAPER,
        "ffhq64":      CM_PAPER,
        "afhqv2-64":   CM_PAPER,
        "imagenet64":  CM | dict(steps=100_000,                                                   # ours
                                 lr=1e-3, ema=0.9999, optimizer="Adam", beta2=0.99,               # ECT
                                 lr_decay=2000,                                                   # ECT
                                 network=dict(dropout=0.4, dropout_resolutions=(16, 8)),          # ECT
                                 mid_t=1.526),                                                    # code
        "imagenet512": CM_PAPER | dict(steps=100_000, optimizer="Adam", network=dict(dropout=0.0),  # paper
                                       mid_t=1.526),                                              # code
        "custom":      CM | dict(steps=10_000, lr=1e-3, ema=0.999),                               # ours
    },
    "mf": {
        "digits":      MF | dict(steps=2000, batch=64, lr=1.5e-3, ema=0.99, optimizer="RAdam"),   # ours
        "cifar10":     MF | dict(steps=100_000,                                                   # ours
                                 batch=1024, lr=6e-4, ema=0.99995, warmup=10_000 * 1024,          # MeanFlow
                                 network=dict(dropout=0.2)),                                      # MeanFlow
        "imagenet256": MF | dict(steps=400_000,                                                   # ours
                                 batch=256, lr=1e-4, beta2=0.95, ema=0.9999,                      # MeanFlow
                                 # The paper's teacher: a Mean Flow SiT-B/4 in 8 steps. MeanFlow trains it
                                 # from scratch with the guidance below; we start from flow matching.
                                 solver="jump", nfe=8, init="none",                               # paper
                                 teacher="runs/imagenet256/teacher_mf.safetensors",
                                 teacher_network=dict(patch_size=4, hidden_size=768, depth=12,    # paper
                                                      num_heads=12, interval=True),
                                 teacher_command="python pretrain.py --data imagenet256 --objective flow && "
                                     "python posttrain_mf.py --data imagenet256 --omega 1 --kappa 0.5 "
                                     "--guidance-interval 0 1 "
                                     "--init runs/imagenet256/pretrain_flow.safetensors "
                                     "--out runs/imagenet256/teacher_mf.safetensors"),
        "custom":      MF | dict(steps=10_000, batch=128, lr=3e-4, ema=0.999, warmup=12_800),     # ours
    },
}
# Stages whose model can be the teacher. The first is the default teacher and initial student, unless the
# recipe names others.
TEACHER_STAGES = {"cm": ["pretrain"], "mf": [*model.stages_of("MeanVelocity"), "pretrain"]}


# === the method =============================================================================================

def cmt_loss(f, x, t, x_end, y, distance):
    """Consistency mid-training (2509.24526), one number per pair. A trajectory has the times
    t_0 = 80 > ... > t_N = 0.002. x (B,C,H,W): states of trajectories; t (B,): their times; x_end (B,C,H,W):
    the endpoints; y (B,): the labels. distance(a, b) and the result: (B,)"""
    # L = E_{x_{t_0}} mean_{i<N} d( f(x_{t_i}, t_i, y), x_{t_N} )
    return distance(f(x, t, y), x_end)


def cmt_meanflow_loss(u, x_t, t, x_r, r, y):
    """Mid-training of a Mean Flow model (2509.24526), one number per pair. A pair is two states of one
    trajectory, in flow time. x_t, x_r (B,C,H,W); their times t > r (B,); the labels y (B,) -> (B,)"""
    # L = E_{x_{t_0}} mean_{i<j} || u(x_t, r, t, y) - (x_t - x_r) / (t - r) ||^2,   t = t_i, r = t_j
    target = (x_t - x_r) / (t - r).reshape(-1, *[1] * (x_t.dim() - 1))
    return (u(x_t, r, t, y) - target).square().flatten(1).sum(1)


def l2(a, b):
    """||a - b||^2, the distance of the paper's theory. (B, ...) -> (B,)"""
    return (a - b).square().flatten(1).sum(1)


def huber(a, b):
    """Pseudo-Huber sqrt(||a - b||^2 + c^2) - c, c = 0.00054 sqrt(CHW) (iCT, 2310.14189). (B, ...) -> (B,)"""
    e = (a - b).square().flatten(1).sum(1)
    c = 0.00054 * a[0].numel() ** 0.5
    return e / ((e + c ** 2).sqrt() + c)           # the same value, without the cancellation when e is small


def pair_table(N, branch, pairing="cmt"):
    """The M pairs of times t_i > t_j of a trajectory with N steps. branch "cm": every state with the
    endpoint, M = N; "mf": every two states, M = N (N+1) / 2. pairing "kd" (knowledge distillation): only the
    start with the endpoint, M = 1; "cmt" and "slow": all of them. -> i, j (M,)"""
    if branch not in ("cm", "mf") or pairing not in ("cmt", "kd", "slow"):
        raise ValueError(f"branch is {branch}, not cm or mf, or pairing is {pairing}, not cmt, kd or slow")
    if pairing == "kd": return torch.tensor([0]), torch.tensor([N])
    if branch == "cm":  return torch.arange(N), torch.full((N,), N)
    return torch.triu_indices(N + 1, N + 1, offset=1).unbind()


def gather_pairs(states, times, y, indices, i, j):
    """Gather pairs by flat index k: trajectory = k // M, pair = k % M. indices (B,), states (N+1,P,C,H,W) of
    P trajectories, times (N+1,), y (P,), i, j (M,) from `pair_table`
    -> x_t (B,C,H,W), t (B,), x_r (B,C,H,W), r (B,), y (B,)"""
    trajectory, pair = indices // len(i), indices % len(i)
    noisier, cleaner = i[pair], j[pair]                    # positions of the two states in their trajectory
    t, r = times[noisier].to(states), times[cleaner].to(states)
    return states[noisier, trajectory], t, states[cleaner, trajectory], r, y[trajectory]


def draw_pair_indices(P, pairs_per_trajectory, M, device):
    """Choose pairs_per_trajectory of the M pairs of each of P trajectories without replacement, and shuffle
    all. -> flat indices (P * pairs_per_trajectory,) for `gather_pairs`"""
    chosen = torch.rand(P, M, device=device).argsort(dim=1)[:, :pairs_per_trajectory]
    chosen = (chosen + M * torch.arange(P, device=device)[:, None]).flatten()
    return chosen[torch.randperm(len(chosen), device=device)]


# === the run ================================================================================================

DISTANCES = {"huber": huber, "l2": l2}         # add your own: a function of two (B,C,H,W) that returns (B,)


def load_distance(args, header, device):
    """--distance -> a function of two (B,C,H,W) that returns (B,)"""
    if args.distance == "lpips": return feature_networks.load_lpips(args.lpips, header).to(device)
    if args.distance == "elatentlpips": return feature_networks.load_elatentlpips(header, device)
    return DISTANCES[args.distance]


def flags():
    """The command line -> args. args.command_for: {input file: how to make it}"""
    branch = model.peek_flag("--branch", "cm", RECIPES)
    p = model.parser(__doc__, RECIPES[branch], TEACHER_STAGES[branch][0], writes=f"midtrain_{branch}")
    p.add_argument("--branch", choices=RECIPES, default="cm", help="cm: consistency model; mf: Mean Flow")
    p.add_argument("--teacher", default=p.get_default("teacher") or p.get_default("init"), metavar="FILE",
                   help="model whose trajectories are the targets; also the default of --init, unless "
                        "the recipe says none")
    if p.get_default("init") != "none":                    # the student starts from the teacher's weights
        p.set_defaults(init=model.peek_flag("--teacher", p.get_default("init")))
    p.add_argument("--nfe", type=model.positive_int, help="teacher evaluations per trajectory, at most")
    p.add_argument("--solver", choices=solve.SOLVERS,
                   help="dpm1, dpm2, dpm3: DPM-Solver++ (dpm3 as the authors released it, of order 2); jump: "
                        "steps of a Mean Flow teacher")
    p.add_argument("--distance", choices=[*DISTANCES, "lpips", "elatentlpips"],
                   help="of the loss; with --branch mf only l2")
    p.add_argument("--lpips", nargs=2, metavar=("VGG.pth", "LIN.pth"), help="weights for --distance lpips")
    p.add_argument("--pairing", choices=["cmt", "kd", "slow"], default="cmt",
                   help="the paper's ablation. kd: only noise and endpoint; slow: a trajectory for each pair")
    p.add_argument("--trajectories", metavar="FILE", help="read solve.py's file instead of solving")
    solve.guidance_flags(p)
    args = p.parse_args()
    if branch == "mf" and args.distance != "l2":
        raise model.UserError(f"--distance {args.distance} is for --branch cm; the mean-flow loss is l2.")
    if args.distance == "lpips" and not args.lpips: raise model.UserError(feature_networks.LPIPS_FILES)
    if args.distance != "lpips": model.reject_if_typed("--lpips", because="the distance is not lpips")
    if args.trajectories:
        model.reject_if_typed("--nfe", "--solver", because=f"{args.trajectories} has its own solver and NFE")
    if args.pairing == "slow" and args.trajectories:
        raise model.UserError("--pairing slow solves a new trajectory for each pair; "
                              "leave out --trajectories.")
    teacher_stages = TEACHER_STAGES[branch]
    inputs = (args.init, model.stages_of(model.KIND[teacher_stages[0]])), (args.teacher, teacher_stages)
    args.command_for = {file: model.stage_command(file, stages, args.recipe_name, args.data)
                        for file, stages in inputs}
    if command := p.get_default("teacher_command"): args.command_for[args.teacher] = command
    if args.trajectories:
        solving = (f"python solve.py --data {shlex.quote(args.data)} --teacher {shlex.quote(args.teacher)} "
                   f"--out {shlex.quote(args.trajectories)} --guidance {args.guidance:g}")
        if solve.guide_file(args): solving += f" --guide {shlex.quote(args.guide)}"
        args.command_for[args.trajectories] = solving
    if guide := solve.guide_file(args):
        args.command_for[guide] = solve.GUIDE_ADVICE
    if branch == "mf":            # u also takes r: `interval` adds an embedding of t - r, zero at first
        args.network = args.network | {"interval": True}
    return args


def pool_size(local_batch, pairs_per_trajectory):
    """Number of trajectories in a pool: 128, rounded up so that their pairs fill whole batches."""
    multiple = math.lcm(local_batch, pairs_per_trajectory) // pairs_per_trajectory
    return math.ceil(128 / multiple) * multiple


def to_student_time(states, times, teacher_header, branch):
    """Trajectories in the student's time: those of a denoiser are converted to flow time for --branch mf."""
    if branch == "mf" and teacher_header["kind"] == "Denoiser": return solve.edm_to_flow(states, times)
    return states, times


@torch.no_grad()
def solve_pool(teacher, teacher_header, P, args, device):
    """Draw noise and labels, and solve the teacher's ODE from each, --microbatch trajectories at a time.
    -> states (N+1,P,C,H,W), times (N+1,), y (P,), in the student's time"""
    x, y = solve.noise_and_labels(teacher_header, P, device)
    n = args.microbatch or P
    solved = [solve.solve_teacher(teacher, teacher_header, *part, args.nfe, args.solver)
              for part in zip(x.split(n), y.split(n))]
    states, times = torch.cat([states for states, _ in solved], dim=1), solved[0][1].to(device)
    return *to_student_time(states, times, teacher_header, args.branch), y


def adopt_trajectory_file(args):
    """Check that solve.py's file comes from the same teacher and guidance. Its solver and NFE replace those
    in args, so that the student's header records them."""
    command = args.command_for[args.trajectories]
    if not Path(args.trajectories).exists():
        raise model.UserError(f"{args.trajectories} does not exist; `{command}` makes it.")
    header = model.read(args.trajectories, tensors=False)[1]
    guide = solve.guide_file(args) and model.sha256(args.guide)
    expected = model.sha256(args.teacher), args.guidance, guide
    if tuple(header.get(k) for k in ("sha256 of teacher", "guidance", "sha256 of guide")) != expected:
        raise model.UserError(f"{args.trajectories} holds no trajectories of {args.teacher} with this "
                              f"guidance; `{command}` makes them.")
    args.nfe, args.solver = header["nfe"], header["solver"]


def batches_from_file(teacher_header, args, step, rank, local_batch, device):
    """Yield this rank's batches of pairs from `step` on, from the file of --trajectories, epoch by epoch."""
    tensors = model.read(args.trajectories)[0]
    states, times, y = (tensors[k].to(device) for k in ("states", "times", "labels"))
    states, times = to_student_time(states.transpose(0, 1), times, teacher_header, args.branch)
    i, j = (k.to(device) for k in pair_table(len(times) - 1, args.branch, args.pairing))
    model.say(f"{len(y):,} trajectories of {len(i)} pairs; the whole run uses each pair "
              f"{args.steps * args.batch / (len(y) * len(i)):.3g} times")
    while True:
        start = step * args.batch + rank * local_batch
        indices = model.batch_indices(len(y) * len(i), args.seed, start, local_batch)
        if device.type == "cuda": indices = indices.pin_memory()       # unpinned, .to would wait for the GPU
        yield gather_pairs(states, times, y, indices.to(device, non_blocking=True), i, j)
        step += 1


def batches_from_teacher(teacher, teacher_header, N, args, step, rank, local_batch, device):
    """Yield this rank's batches of pairs from `step` on: solve a pool of trajectories, shuffle its pairs,
    yield them batch by batch, solve the next pool.

    The paper solves 8 trajectories in every step: their 8 * 16 pairs are its batch of 128. That starves a
    GPU and fills a batch with strongly correlated states. Here the pool of a rank has at least 128
    trajectories of N steps, and N pairs of each (mf: at random from all N (N+1) / 2), so a pair costs one
    step of the solver, as in the paper. (--pairing kd and slow take one pair of each.) A pool is a function
    of (seed, world, rank, its index), and a resumed run solves its pool again. All pools have one size, so a
    compiled teacher is compiled once (twice if --microbatch does not divide it)."""
    i, j = (k.to(device) for k in pair_table(N, args.branch, args.pairing))
    pairs_per_trajectory = N if args.pairing == "cmt" else 1
    P = pool_size(local_batch, pairs_per_trajectory)                               # trajectories
    steps_per_pool, world = P * pairs_per_trajectory // local_batch, args.batch // local_batch
    model.say(f"pairs per trajectory {pairs_per_trajectory}; the whole run solves "
              f"{math.ceil(args.steps / steps_per_pool) * P * world:,} trajectories")
    # A number for each (world, rank): 0; 1, 2; 3, 4, 5; ... A run continued in another world draws new pools.
    process = world * (world - 1) // 2 + rank
    while True:
        pool_index, batches_used = divmod(step, steps_per_pool)
        model.reseed(args.seed, process, "pool", pool_index)
        states, times, y = solve_pool(teacher, teacher_header, P, args, device)
        pool = draw_pair_indices(P, pairs_per_trajectory, len(i), device)
        for indices in pool.split(local_batch)[batches_used:]:
            yield gather_pairs(states, times, y, indices, i, j)
        step = (pool_index + 1) * steps_per_pool


def main():
    args = flags()
    branch, teacher_stages = args.branch, TEACHER_STAGES[args.branch]
    if args.dry_run: return dry_run.midtrain(args, teacher_stages)
    rank, world, device, local_batch = model.setup(args.batch, args.precision)

    dataset = model.dataset_at_hand(args)
    teacher, teacher_header = model.load_predecessor(args, "teacher", teacher_stages, device, dataset)
    if branch == "mf" and teacher_header["kind"] == "Denoiser" and args.init == args.teacher:
        raise model.UserError(f"{args.teacher} is a denoiser, so its weights cannot initialise a Mean Flow "
                              "model; give --init none, or a flow-matching model.")
    teacher.backbone_dtype = model.DTYPES[args.precision]
    teacher = model.compiled(solve.guide_teacher(teacher, teacher_header, args, args.teacher), args.compile)
    if args.trajectories: adopt_trajectory_file(args)
    args.solver = args.solver or solve.default_solver(teacher_header)
    solve.check_solver(args.solver, args.teacher, teacher_header)
    shape, classes = model.image_shape(teacher_header), teacher_header["network"]["label_dim"]
    model.reseed(args.seed)
    dataset = dataset or model.custom_dataset(shape, classes)
    dataset = dataset | {"latents": teacher_header.get("latents")}         # scaled as the teacher's
    net, header = model.initial_model(args, model.KIND[teacher_stages[0]], dataset, device, **args.network)
    model.check_scale(args.init, header, args.teacher, teacher_header)
    distance = load_distance(args, header, device)
    time_range = {k: teacher_header[k] for k in ("t_min", "t_max")}        # of the teacher
    if branch == "mf" and teacher_header["kind"] == "Denoiser":
        time_range = {k: t / (1 + t) for k, t in time_range.items()}       # flow time
    header |= time_range
    files = dict(init=args.init, teacher=args.teacher, trajectories=args.trajectories,
                 guide=solve.guide_file(args), **dict(zip(("vgg", "lin"), args.lpips or ())))
    header |= model.run_metadata(args, f"midtrain_{branch}", "pairs", world,
                                 teacher_header.get("data_identity"), **files)
    if branch == "cm": header["mid_t"] = args.mid_t
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    net.train()
    net.backbone_dtype = model.DTYPES[args.precision]
    # wrapped_net: net, inside DDP (which averages the gradients of all processes) and torch.compile if used
    wrapped_net = model.compiled(model.parallel(net, world), args.compile)
    optimizer = model.optimizer(args, net)

    step = start = model.resume_run(args.out, net, ema, optimizer, header)
    if step == 0: model.normalise_weights(net)             # changes EDM2 networks only (2312.02696, eq. 66)
    log, stop, save_timer = model.Log(args, "pairs", world, step), model.Stop(world), model.SaveTimer(args)
    N = len(solve.solver_times(teacher_header, args.nfe, args.solver)) - 1         # steps of a trajectory
    if N == 1: model.say("warning: the ODE of the teacher is solved in a single step. Use more NFE.")
    batches = (batches_from_file(teacher_header, args, step, rank, local_batch, device) if args.trajectories
               else batches_from_teacher(teacher, teacher_header, N, args, step, rank, local_batch, device))
    while True:
        done = step == args.steps or stop(step)
        if rank == 0 and step > start and (done or save_timer.due(step)):
            model.save_run(args, step, net, ema, optimizer, header)
            if args.preview: sample.write_preview(ema, header, args)
        if done: break

        pairs = next(batches)                                                      # x_t, t, x_r, r, y
        model.reseed(args.seed, rank, step)                # a resumed run draws the same dropout masks
        mean_loss = 0
        for x_t, t, x_r, r, y in model.microbatches(wrapped_net, args.microbatch, *pairs):
            if branch == "cm":               # here x_r is always the endpoint of the trajectory
                losses = cmt_loss(wrapped_net, x_t, t, x_r, y, distance)                   # (microbatch,)
            else:
                losses = cmt_meanflow_loss(wrapped_net, x_t, t, x_r, r, y)
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
