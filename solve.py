"""Stage 2, solving: the teacher's probability-flow ODE (PF-ODE), from noise to an image.

  reads   runs/NAME/pretrain.safetensors, or --teacher FILE, any denoiser or flow-time model
  writes  runs/NAME/trajectories.safetensors  states (n,N+1,C,H,W) fp32 (a solver returns (N+1,n,C,H,W)),
                                              times (N+1,) float64, labels (n,)
          runs/NAME/trajectories.png          one trajectory per row, from noise (left) to endpoint (right)
  run     python solve.py
          python solve.py --teacher runs/digits/pretrain_flow.safetensors --out runs/digits/flow.safetensors
  expect  a table: the error of each solver at the endpoint for at most 4..64 NFE, and the observed order

midtrain.py imports the solvers and solves while it trains, because the trajectories of a run of the paper's
length (38.4M states of CIFAR-10) would take half a terabyte. The file written here is for looking at
trajectories, and for `midtrain.py --trajectories`.
"""
import argparse, functools, math
from pathlib import Path

import torch
from einops import rearrange

import model

# === the method =============================================================================================
# A solver takes a function f(x, t) with t (B,) (flow_map: u(z, r, t)), a start x (B, ...) at times[0], and
# N+1 times. It returns
#     states (N+1, B, ...), states[0] = x,      times (N+1,) float64.
# x and the states are fp32 or float64. A loss takes times.to(x). Coefficients are computed in float64 and
# rounded once, when they multiply x. Outside torch.no_grad() a solver keeps the graph of all its steps.
#   EDM time    x_t = x_0 + t eps               dx/dt = (x - D(x, t)) / t
#   flow time   z_t = (1 - t) x_0 + t eps       dz/dt = v(z, t)

def log_uniform_times(n, t_max=80.0, t_min=0.002):
    """t_i = t_max (t_min / t_max)^(i/n), i = 0..n: uniform in log-SNR, CMT's grid. n >= 1, t_min > 0, else
    ValueError. -> (n+1,) float64"""
    if n < 1 or t_min <= 0: raise ValueError(f"n = {n} has to be >= 1, and t_min = {t_min} > 0")
    return t_max * (t_min / t_max) ** (torch.arange(n + 1, dtype=torch.float64) / n)


def karras_times(n, t_max=80.0, t_min=0.002, rho=7):
    """EDM's grid (2206.00364, eq. 5) without the final 0: uniform in t^(1/rho). -> (n+1,) float64"""
    if n < 1: raise ValueError(f"n = {n} has to be >= 1")
    fraction = torch.arange(n + 1, dtype=torch.float64) / n
    return (t_max ** (1 / rho) + fraction * (t_min ** (1 / rho) - t_max ** (1 / rho))) ** rho


def uniform_times(n, t_max=1.0, t_min=0.0):
    """Flow time's grid. -> (n+1,) float64"""
    if n < 1: raise ValueError(f"n = {n} has to be >= 1")
    return t_max + (t_min - t_max) * torch.arange(n + 1, dtype=torch.float64) / n


def dpm_solver_pp(denoise, x, times, order=3):
    """DPM-Solver++ multistep (2211.01095) in data prediction; alpha = 1, lambda = -ln t. One call of
    denoise(x, t) per step. With order=3 the steps use the newest 1, 2, 3, ..., 3, 2, 1 outputs. The released
    formula for 3 outputs is of order 2 only (see below). times > 0, descending; else ValueError.
    -> states (N+1, B, ...), times (N+1,) float64"""
    t = times.double().cpu()
    if order not in (1, 2, 3): raise ValueError(f"order is {order}, not 1, 2 or 3")
    if not (t[-1] > 0 and (t[:-1] > t[1:]).all()): raise ValueError("times have to fall and stay above 0")
    h = (t[:-1] / t[1:]).log()                              # h_i = ln(t_i / t_{i+1}), the step in lambda
    phi1_all, h, t = torch.expm1(-h).tolist(), h.tolist(), t.tolist()
    N, states, outputs = len(h), [x], []                    # outputs of denoise, newest first
    for i in range(N):
        outputs = [denoise(x, x.new_full((len(x),), t[i])), *outputs[:2]]
        k = min(order, i + 1, N - i)
        phi1 = phi1_all[i]
        x = t[i + 1] / t[i] * x - phi1 * outputs[0]         # order 1: (s/t) x + (1 - s/t) D_i,  s = t_{i+1}
        if k == 2:                                          # order 2: ... with D_i + (D_i - D_{i-1}) / (2 r0)
            x = x - phi1 * (outputs[0] - outputs[1]) / (2 * h[i - 1] / h[i])
        if k == 3:
            r0, r1 = h[i - 1] / h[i], h[i - 2] / h[i]
            a, b = (outputs[0] - outputs[1]) / r0, (outputs[1] - outputs[2]) / r1
            D1, D2 = a + r0 / (r0 + r1) * (a - b), (a - b) / (r0 + r1)
            phi2 = phi1 / h[i] + 1
            phi3 = phi2 / h[i] - 0.5
            # As in the released code of CMT. Order 3 would need 2 * phi3 * D2.
            x = x + phi2 * D1 - phi3 * D2
        states.append(x)
    return torch.stack(states), times.double()


def euler(velocity, x, times):
    """x_s = x_t + (s - t) dx/dt. N calls of velocity(x, t). -> states (N+1, B, ...), times (N+1,) float64"""
    t, states = times.double().tolist(), [x]
    for i in range(len(t) - 1):
        x = x + (t[i + 1] - t[i]) * velocity(x, x.new_full((len(x),), t[i]))
        states.append(x)
    return torch.stack(states), times.double()


def heun(velocity, x, times):
    """An Euler step, then the trapezoidal rule (2206.00364, algorithm 1). Two calls per step. A step into
    t = 0 stays an Euler step, because EDM's velocity does not exist there.
    -> states (N+1, B, ...), times (N+1,) float64"""
    t, states = times.double().tolist(), [x]
    for i in range(len(t) - 1):
        v = velocity(x, x.new_full((len(x),), t[i]))
        x_s = x + (t[i + 1] - t[i]) * v
        if t[i + 1] != 0:
            v_s = velocity(x_s, x.new_full((len(x),), t[i + 1]))
            x_s = x + (t[i + 1] - t[i]) * (v + v_s) / 2
        x = x_s
        states.append(x)
    return torch.stack(states), times.double()


def flow_map(u, z, times):
    """Steps of a Mean Flow model (2505.13447, eq. 12): z_r = z_t - (t - r) u(z_t, r, t). N calls of
    u(z, r, t), r and t (B,). -> states (N+1, B, ...), times (N+1,) float64"""
    t, states = times.double().tolist(), [z]
    for i in range(len(t) - 1):
        t_, r_ = (z.new_full((len(z),), s) for s in t[i:i + 2])
        z = z - (t[i] - t[i + 1]) * u(z, r_, t_)
        states.append(z)
    return torch.stack(states), times.double()


def guided(teacher, guide, w):
    """guide + w (teacher - guide). This is classifier-free guidance (2207.12598) if the guide is the same
    model with the null label, and autoguidance (2406.02507) if it is a smaller or less trained model. w = 1:
    no guidance. teacher, guide: functions of (x, t, y) or (z, r, t, y) -> a function with these arguments"""
    def guided_model(*inputs):
        guide_output = guide(*inputs)
        return guide_output + w * (teacher(*inputs) - guide_output)
    return teacher if w == 1 else guided_model


def edm_to_flow(x, t):
    """Convert states from EDM time to flow time: z = x / (1 + t) at time t / (1 + t). It maps trajectories to
    trajectories. States x (n, ...), their times t (n,) -> z, its times"""
    return x / (1 + t).reshape(-1, *[1] * (x.dim() - 1)).to(x), t / (1 + t)


def without_label(teacher, null):
    """teacher: a function of (x, t, y) or (z, r, t, y), null: its null label -> a function of the same
    arguments that ignores y"""
    def unlabelled(*inputs):
        x = inputs[0]
        return teacher(*inputs[:-1], x.new_full((len(x),), null, dtype=torch.int64))
    return unlabelled


# === the run ================================================================================================

# NAME of --solver: (which function of the model it calls, the solver). "denoise" is D(x, t), "velocity"
# dx/dt, "u" the mean velocity u(z, r, t). A new solver needs a line here, and if it makes several calls per
# step, one in CALLS_PER_STEP too.
SOLVERS = {
    "dpm1":  ("denoise",  functools.partial(dpm_solver_pp, order=1)),
    "dpm2":  ("denoise",  functools.partial(dpm_solver_pp, order=2)),
    "dpm3":  ("denoise",  functools.partial(dpm_solver_pp, order=3)),
    "euler": ("velocity", euler),
    "heun":  ("velocity", heun),
    "jump":  ("u",        flow_map),
}
CALLS_PER_STEP = {"heun": 2}

# A consistency model uses the Denoiser class but does not predict E[x_0 | x_t], so it has no ODE to solve.
CONSISTENCY_STAGES = "midtrain_cm", "posttrain_cm"
ODE_STAGES = [stage for stage in model.KIND if stage not in CONSISTENCY_STAGES]


def default_solver(header):
    """dpm3 for denoisers, jump for Mean Flow models, heun for flow matching, None for consistency models."""
    if header.get("stage") in CONSISTENCY_STAGES: return None          # a new network has no stage yet
    if header["kind"] == "Denoiser": return "dpm3"
    return "jump" if header["network"].get("interval") else "heun"


def grid_of(header, solver):
    """The function that makes the times of a solver: log-uniform for DPM-Solver++, else EDM's for a denoiser,
    uniform in flow time."""
    if SOLVERS[solver][0] == "denoise": return log_uniform_times
    return karras_times if header["kind"] == "Denoiser" else uniform_times


def solver_times(header, nfe, solver):
    """The grid of `solver` for at most `nfe` function evaluations. -> (N+1,) float64

    Heun takes two evaluations per step, but one in a step to t = 0. If t_min > 0, the grid of an even nfe
    ends at t_min, and an odd nfe adds a step to 0 (as in EDM, 2206.00364, algorithm 1). If t_min = 0, as for
    flow-matching teachers, an even nfe takes only nfe - 1 evaluations."""
    ends, grid = (header["t_max"], header["t_min"]), grid_of(header, solver)
    if solver == "heun" and header["t_min"] > 0 and nfe % 2:
        above_0 = grid(max(nfe // 2, 1), *ends)[:nfe // 2 + 1]             # with 1 NFE only t_max
        return torch.cat([above_0, torch.zeros(1).double()])
    return grid(math.ceil(nfe / CALLS_PER_STEP.get(solver, 1)), *ends)


def count_calls(times, solver):
    """Function evaluations of `solver` on a grid: Heun's step into t = 0 takes one instead of two."""
    return (len(times) - 1) * CALLS_PER_STEP.get(solver, 1) - (solver == "heun" and times[-1].item() == 0)


def noise_and_labels(header, n, device):
    """The starts of n trajectories: noise (n,C,H,W) at t_max, and labels (n,), dropped as in pre-training."""
    x = header["t_max"] * torch.randn(n, *model.image_shape(header), device=device)
    y = torch.randint(max(1, header["network"]["label_dim"]), (n,), device=device)
    return x, model.drop_labels(y, header)


def solve_teacher(teacher, header, x, y, nfe, solver, times=None):
    """Solve the PF-ODE of a model at `times`, by default the grid of `solver` for at most `nfe` function
    evaluations. teacher, header as from model.load, x (B,C,H,W) at t_max, y (B,). The solver has to be one of
    `solvers_of(header)`. -> states (N+1,B,C,H,W), times (N+1,) float64, on the CPU"""
    needs, solver_function = SOLVERS[solver]
    if header["kind"] == "Denoiser":
        functions = {"denoise":  lambda x, t: teacher(x, t, y),
                     "velocity": lambda x, t: (x - teacher(x, t, y)) / t[:, None, None, None]}
    else:
        functions = {"velocity": lambda z, t: teacher(z, t, t, y), "u": lambda z, r, t: teacher(z, r, t, y)}
    if times is None: times = solver_times(header, nfe, solver)
    return solver_function(functions[needs], x, times)


def solvers_of(header):
    """Names of the solvers for a model. "u" needs a network that also takes r."""
    has = {"velocity"}
    if header["kind"] == "Denoiser": has.add("denoise")
    if header["network"].get("interval"): has.add("u")
    return [name for name, (needs, _) in SOLVERS.items() if needs in has]


def check_solver(solver, source, header):
    """Raise UserError unless the solver is one for the model, which the message calls `source`."""
    if solver not in solvers_of(header):
        why = " without an embedding of t - r" * (solver == "jump" and header["kind"] == "MeanVelocity")
        raise model.UserError(f"--solver {solver} does not fit {source}, a {header['kind']}{why}; "
                              f"choose one of {', '.join(solvers_of(header))}.")


GUIDE_ADVICE = "pre-train a smaller model, or this one for fewer steps"    # where no command makes the guide


def guidance_flags(p):
    """Add --guidance and --guide, the flags of every script that calls a teacher."""
    p.add_argument("--guidance", type=model.finite, default=p.get_default("guidance") or 1.0, metavar="W",
                   help="guidance of the teacher: guide + W (teacher - guide); 1: none")
    p.add_argument("--guide", default=p.get_default("guide"), metavar="FILE",
                   help="a smaller or less trained model (default: the teacher with the null label)")


def guide_file(args):
    """--guide if guidance is used, else None."""
    return args.guide if args.guidance != 1 else None


def guide_teacher(teacher, header, args, path):
    """The teacher read from `path`, guided as the flags say -> a function of the teacher's arguments. Raises
    UserError if no guide is possible."""
    classes = header["network"]["label_dim"]            # the number of classes is also the null label
    if args.guidance == 1:
        model.reject_if_typed("--guide", because="--guidance is 1")
        return teacher
    if args.guide:
        if not Path(args.guide).exists():
            advice = getattr(args, "command_for", {}).get(args.guide, GUIDE_ADVICE)
            raise model.UserError(f"{args.guide} does not exist; to make it: {advice}.")
        guide, guide_header = model.load(args.guide, next(teacher.parameters()).device)
        model.check_fit(args.guide, guide_header, path, model.image_shape(header), classes,
                        header.get("latents"))
        model.check_scale(args.guide, guide_header, path, header)
        # the guide of a u(z, r, t) has to take r as well
        lacks_r = header["network"].get("interval") and not guide_header["network"].get("interval")
        if guide_header["stage"] not in ODE_STAGES or guide_header["kind"] != header["kind"] or lacks_r:
            raise model.UserError(f"{args.guide}, a {guide_header['kind']} of stage {guide_header['stage']}, "
                                  f"cannot guide {path}; give a smaller or less trained model of stage "
                                  f"{header['stage']}.")
        guide.backbone_dtype = teacher.backbone_dtype
        return guided(teacher, guide, args.guidance)
    if not classes or not header["label_dropout"]:
        raise model.UserError(f"{path} was not trained with label dropout, so it cannot guide itself; "
                              "give --guide, a smaller or less trained model.")
    return guided(teacher, without_label(teacher, classes), args.guidance)


def error_table(teacher, header, x, y):
    """Print each solver's root-mean-square error at the endpoint, against a solution with at most 256 NFE,
    and the order observed from 32 to 64 NFE. For jump the error is mostly that of the model u, which has no
    order."""
    budgets = [4, 8, 16, 32, 64]
    endpoint = lambda nfe, solver: solve_teacher(teacher, header, x, y, nfe, solver)[0][-1]
    reference = endpoint(256, "dpm2" if header["kind"] == "Denoiser" else "heun")
    print(f"RMS error of the endpoint for each budget of NFE, {len(x)} trajectories, pixels in [-1, 1]")
    print("  solver  grid       " + "".join(f"{n:>11} NFE" for n in budgets) + "   order")
    for solver in solvers_of(header):
        errors = [(endpoint(n, solver) - reference).square().mean().sqrt().item() for n in budgets]
        grid = grid_of(header, solver).__name__.removesuffix("_times")
        order = math.log2(errors[-2] / errors[-1]) if errors[-1] and solver != "jump" else math.nan
        print(f"  {solver:<8}{grid:<11}" + "".join(f"{e:>15.6f}" for e in errors) + f"{order:>8.2f}")


def main():
    recipe, name, path = model.find_data(model.peek_flag("--data", "digits"))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=model.Help, allow_abbrev=False)
    p.add_argument("--data", default="digits", metavar="NAME|PATH",
                   help="the dataset, which names the folder runs/NAME/ of the default paths")
    p.add_argument("--teacher", default=f"runs/{name}/pretrain.safetensors", metavar="FILE",
                   help="a denoiser or a flow-time model")
    p.add_argument("--out", default=f"runs/{name}/trajectories.safetensors", metavar="FILE",
                   type=model.output_path, help="result; the picture is written beside it")
    p.add_argument("--solver", choices=SOLVERS,
                   help="dpm1-3: DPM-Solver++ with the last 1 to 3 outputs of the teacher; jump: steps of a "
                        "Mean Flow model (default: dpm3 for denoisers, heun for flow matching, jump for Mean "
                        "Flow)")
    p.add_argument("--nfe", type=model.positive_int, default=16,
                   help="maximum function evaluations per trajectory; guidance doubles the forward passes")
    p.add_argument("--n", type=model.positive_int, default=64, help="number of trajectories")
    p.add_argument("--seed", type=int, default=0, help="seed of noise and labels")
    guidance_flags(p)
    args = p.parse_args()

    model.check_replaceable(args.out, "solve", name)
    device = model.setup(one_process=True)[2]
    teacher_command = model.stage_command(args.teacher, ODE_STAGES, recipe, args.data)
    args.npz, args.command_for = path, {args.teacher: teacher_command}
    teacher, header = model.load_predecessor(args, "teacher", ODE_STAGES, device)
    solver = args.solver or default_solver(header)
    check_solver(solver, args.teacher, header)
    teacher = guide_teacher(teacher, header, args, args.teacher)
    model.reseed(args.seed)
    x, y = noise_and_labels(header, args.n, device)
    with torch.no_grad():
        states, times = solve_teacher(teacher, header, x, y, args.nfe, solver)
        if not states.isfinite().all():
            raise model.Diverged("the trajectories are not finite; nothing is written. Try another teacher, "
                                 "or a smaller --guidance.")
        print("times  " + "  ".join(f"{t:.4g}" for t in times.tolist()))
        model.save(args.out, {"states": states.transpose(0, 1), "times": times, "labels": y},
                   {"stage": "solve", "data": name, "solver": solver, "nfe": args.nfe,
                    "guidance": args.guidance,
                    "sha256 of guide": guide_file(args) and model.sha256(args.guide),
                    "sha256 of teacher": model.sha256(args.teacher)})
        if header["kind"] == "Denoiser":
            states, _ = edm_to_flow(states, times)         # keeps the noisy states in the range of a picture
        picture, classes = Path(args.out).with_suffix(".png"), header["network"]["label_dim"]
        names = [f"label {k}" if k < classes else "null label" for k in y[:16].tolist()]
        if not classes: names = [""] * len(names)
        images = rearrange(model.to_uint8(states)[:, :16, :3], "n b c h w -> b n h w c").cpu().numpy()
        model.save_grid(picture, images, names)
        print(f"{args.n:,} trajectories in {args.out}, the first {len(names)} also in {picture}")
        k = min(64, args.n)
        error_table(teacher, header, x[:k], y[:k])


if __name__ == "__main__":
    model.run(main)
