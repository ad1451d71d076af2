"""Stage 3, consistency mid-training (CMT): regress each state of the teacher's trajectories onto their end.

  reads   runs/D/pretrain.safetensors      the teacher, and the student's first weights; no images
  writes  runs/D/midtrain_cm.safetensors   EMA weights of a one- or two-step sampler, for posttrain_cm.py
  run     python midtrain.py                                           # digits, 80 s on two CPU cores
          torchrun --nproc_per_node=8 midtrain.py --data cifar10       # the paper's recipe, 38.4M pairs
  cost    per pair: one forward of the teacher, one forward and one backward of the student
  expect  digits: the loss, a distance in 64 dimensions, falls from about 0.8 to about 0.33

The targets are fixed before the student sees them: it never learns from its own predictions. Times are the
solver's, each equally often, and every pair has weight 1.
"""
import copy, math

import torch

import model, solve

RECIPES = {
    # cifar10: the paper's, except dropout and mid_t (the released code's) and the distance, LPIPS-VGG in the
    # paper, pseudo-Huber here because it needs no files. The other rows are ours. batch counts (state, end)
    # pairs, nfe of them a trajectory; mid_t is the noise level of the second of two sampling steps.
    "digits":   dict(steps=900,     batch=64,  lr=3e-3, ema=0.99,  solver="dpm3", nfe=16,
                     dropout=0.0, mid_t=0.7757),
    "cifar10":  dict(steps=300_000, batch=128, lr=2e-4, ema=0.999, solver="dpm3", nfe=16,
                     dropout=0.2, mid_t=0.7757),
    "own data": dict(steps=10_000,  batch=128, lr=1e-3, ema=0.999, solver="dpm3", nfe=16,
                     dropout=0.0, mid_t=0.7757),
}


# === the method =============================================================================================

def cmt_loss(f, x, t, x_end, y, distance):
    """Consistency mid-training (2509.24526), one number per pair. Solver times: t_0 = 80 > ... > t_N = 0.002.
    x (B,C,H,W) states of solved trajectories, t (B,) the solver's own times, x_end (B,C,H,W) where they end,
    y (B,) the labels they were solved with, distance(a, b) -> (B,).  -> (B,)"""
    # L = E_{x_T} mean_{i<N} d( f(x_{t_i}, t_i, y), x_{t_N} )
    return distance(f(x, t, y), x_end)


def l2(a, b):
    """||a - b||^2, the distance of the paper's theory. (B, ...) -> (B,)"""
    return (a - b).square().flatten(1).sum(1)


def huber(a, b):
    """Pseudo-Huber sqrt(||a - b||^2 + c^2) - c, c = 0.00054 sqrt(CHW) (iCT, 2310.14189). (B, ...) -> (B,)"""
    e = (a - b).square().flatten(1).sum(1)
    c = 0.00054 * a[0].numel() ** 0.5
    return e / ((e + c ** 2).sqrt() + c)           # the same value, without the cancellation when e is small


def pairs(states, times, y, i):
    """Number the P * N pairs of P trajectories trajectory by trajectory and pick those in i (B,).
    states (N+1,P,C,H,W), times (N+1,), y (P,)  ->  x (B,C,H,W), t (B,), x_end (B,C,H,W), y (B,)"""
    N = len(times) - 1
    path, at = i // N, i % N                       # at < N: the end itself is never an input
    return states[at, path], times[at].to(states.dtype), states[-1, path], y[path]


# === the run ================================================================================================

def pool_size(batch, N, at_least=128):
    """Trajectories, of N pairs each, to solve at once on a rank: at least 128, and a whole number of batches.

    The paper solves batch / N of them for each step, 8 for a batch of 128. That starves a GPU, and puts the
    16 states of a trajectory, near copies of each other, into one batch. We solve many, then draw shuffled
    batches until every state has been used once. The last pool is cut to what is left of the run, so the cost
    per pair is the paper's. A pool's randomness is a function of (seed, rank, its number): a resumed run
    solves it again, nothing is stored."""
    unit = math.lcm(batch, N) // N
    return math.ceil(at_least / unit) * unit


@torch.no_grad()
def solve_pool(teacher, header, count, args, device):
    """Draw `count` noises and labels, a share of them null as in pre-training; solve the ODE from each.
    -> states (N+1,count,C,H,W), times (N+1,), y (count,)"""
    x = header["t_max"] * torch.randn(count, *model.image_shape(header), device=device)
    y = model.random_labels(count, header, device)
    states, times = solve.solve_teacher(lambda x, t: teacher(x, t, y), x, args.nfe, args.solver,
                                        header["t_max"], header["t_min"])
    return states, times.to(device), y


def read_paths(path, teacher, device):
    """solve.py's file -> states (N+1,n,C,H,W), times (N+1,), y (n,). Made with the same teacher."""
    tensors, made = model.read(path)
    if made.get("sha256 of teacher") != model.sha256(teacher):
        raise model.Refused(f"{path} holds no trajectories of {teacher}; solve.py writes them.")
    states, times, y = (tensors[k].to(device) for k in ("states", "times", "labels"))
    return states.transpose(0, 1), times, y


def main():
    p = model.parser(__doc__, RECIPES, reads="pretrain", writes="midtrain_cm")
    p.add_argument("--teacher", default=p.get_default("init"), metavar="FILE", help="denoiser to imitate")
    p.add_argument("--nfe", type=model.positive, help="network calls a trajectory, one a pair (heun: two)")
    p.add_argument("--solver", choices=solve.SOLVERS, help="dpm1-3: DPM-Solver++ of that order")
    p.add_argument("--distance", choices=["huber", "l2"], default="huber", help="of the loss")
    p.add_argument("--trajectories", metavar="FILE", help="read solve.py's file, do not solve")
    args = p.parse_args()
    solve.check_nfe(args.nfe, args.solver)
    rank, world, device, batch = model.setup(args.batch)

    made_by = f"python pretrain.py --data {args.data}"
    teacher, teacher_header = model.parent(args.teacher, made_by, stage="pretrain", device=device)
    model.reseed(args.seed)
    net, header = model.first_weights(args.init, made_by, teacher_header, device, dropout=args.dropout)
    model.check_fit(args.init, header, args.teacher, model.image_shape(teacher_header),
                    teacher_header["network"]["label_dim"])
    header |= model.stamp(args, "midtrain_cm", "pairs", world, init=args.init, teacher=args.teacher,
                          trajectories=args.trajectories)
    header["mid_t"] = args.mid_t
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    teacher.requires_grad_(False)                                                  # in eval mode, as loaded
    net.train()
    teacher.body_dtype = net.body_dtype = model.BODY[args.precision]
    ddp = model.parallel(net, world)
    opt = torch.optim.RAdam(net.parameters(), args.lr, betas=(0.9, 0.999), eps=1e-8)
    distance = {"huber": huber, "l2": l2}[args.distance]

    step = start = model.resume_run(args.out, net, ema, opt, header)
    log = model.Log(args, "pairs", world, step)
    paths = read_paths(args.trajectories, args.teacher, device) if args.trajectories else None
    N = args.nfe // 2 if args.solver == "heun" else args.nfe                       # pairs a trajectory
    if paths: N = len(paths[1]) - 1
    size = pool_size(batch, N)
    steps_per_pool = size * N // batch
    while True:
        done = step == args.steps
        if rank == 0 and step > start and (done or step % args.save_every == 0):
            model.save_run(args.out, step, net, ema, opt, header)
        if done: break

        if args.trajectories:
            i = model.batch_indices(len(paths[2]) * N, args.seed, step * args.batch + rank * batch, batch)
        else:
            if step % steps_per_pool == 0 or paths is None:
                number = step // steps_per_pool
                model.reseed(args.seed, rank, "pool", number)
                still_needed = math.ceil((args.steps - number * steps_per_pool) * batch / N)
                paths = solve_pool(teacher, teacher_header, min(size, still_needed), args, device)
                order = torch.randperm(len(paths[2]) * N, device=device)
            i = order[step % steps_per_pool * batch:][:batch]
        x, t, x_end, y = pairs(*paths, i.to(device))
        model.reseed(args.seed, rank, step)

        loss = cmt_loss(ddp, x, t, x_end, y, distance).mean()
        loss.backward()
        lr = args.lr * (1 - step / args.steps)
        norm = model.update(net, ema, opt, lr, decay=min(args.ema, (1 + step) / (10 + step)))
        step += 1
        log(step, loss, norm, lr)


if __name__ == "__main__":
    model.run(main)
