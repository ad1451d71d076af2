"""What `--dry-run` of a training stage prints: the recipe, missing files with the commands that make them,
and estimates of memory and compute. The estimates run the network on the meta device, which takes no memory.
"""
import os, sys
from pathlib import Path

import torch

import model, solve


def pretrain(args):
    dataset = model.dataset_at_hand(args)
    report(args, "images", expected_header(args, None, [args.stage], dataset, **args.network))


def midtrain(args, teacher_stages):
    dataset, stages = model.dataset_at_hand(args), model.stages_of(model.KIND[teacher_stages[0]])
    header = expected_header(args, "init", stages, dataset, **args.network)
    teacher_network = args.recipe.get("teacher_network", {})
    teacher = expected_header(args, "teacher", teacher_stages, dataset, **teacher_network)
    nfe = 0
    if teacher:
        solver = args.solver or solve.default_solver(teacher)
        solve.check_solver(solver, args.teacher, teacher)
        nfe = nfe_per_pair(teacher, args.nfe, solver, args.pairing, args.guidance)
    report(args, "pairs", header, 0, teacher, nfe)


def nfe_per_pair(header, nfe, solver, pairing, guidance):
    """Forwards of the teacher for one pair of mid-training. header: of the teacher, or of its student.
    The others are flags of midtrain.py."""
    times = solve.solver_times(header, nfe, solver)
    pairs_per_trajectory = len(times) - 1 if pairing == "cmt" else 1
    return solve.count_calls(times, solver) / pairs_per_trajectory * (1 if guidance == 1 else 2)


def posttrain_cm(args):
    dataset, teacher, nfe = model.dataset_at_hand(args), None, 0
    header = expected_header(args, "init", model.stages_of("Denoiser"), dataset, **args.network)
    if args.loss == "ecd":
        teacher = expected_header(args, "teacher", ["pretrain"], dataset)
        nfe = (1 if args.solver == "euler" else 2) * (1 if args.guidance == 1 else 2)
    report(args, "images", header, 1, teacher, nfe)


def posttrain_mf(args):
    dataset, teacher, stages = model.dataset_at_hand(args), None, model.stages_of("MeanVelocity")
    header = expected_header(args, "init", stages, dataset, **args.network, interval=True)
    if args.velocity == "teacher": teacher = expected_header(args, "teacher", ["pretrain_flow"], dataset)
    guided = (args.omega, args.kappa) != (1, 0)
    report(args, "images", header, 2 * args.r_neq_t + 2 * guided, teacher, 1, multiple=4)


def expected_header(args, flag, stages, dataset, **network):
    """The header that a run would read from the file of --`flag`, or that of a new network of the first of
    `stages`; None where nothing at hand says what that would be. dataset: as from `model.dataset_at_hand`.
    Raises UserError where the run would refuse the file."""
    path = getattr(args, flag) if flag else None
    if path and os.path.isfile(path):
        header = model.read(path, tensors=False)[1]
        model.check_predecessor(args, flag, header, stages, dataset)
        return header | {"network": header["network"] | network}
    return model.fresh_header(dataset, model.KIND[stages[0]], **network) if dataset else None


def cost(header, precision, samples):
    """Estimate of a network in training, on the meta device. -> parameters, FLOPs of the forward pass of one
    sample, bytes of activations kept for the backward pass of `samples`"""
    from torch.utils.flop_counter import FlopCounterMode
    kept = []
    with torch.device("meta"):
        net = model.build(header).train()
        net.backbone_dtype = model.DTYPES[precision]
        weights = {p.untyped_storage()._cdata for p in net.parameters()}
        for n in (1, 2):
            t, seen = torch.ones(n), {}
            def keep(x):
                storage = x.untyped_storage()
                if storage._cdata not in weights: seen[storage._cdata] = storage.nbytes()
                return x
            times = (t,) if header["kind"] == "Denoiser" else (t, t)
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
            with hooks, FlopCounterMode(display=False) as counter:
                net(torch.ones(n, *model.image_shape(header)), *times, torch.zeros(n, dtype=torch.int64))
            kept.append(sum(seen.values()))
    count = sum(p.numel() for p in net.parameters())
    return count, counter.get_total_flops() / n, kept[0] + (samples - 1) * (kept[1] - kept[0])


def memory_parts(parameters, activations, teacher_parameters=0):
    """What a training step with Adam or RAdam keeps on a GPU -> {part: bytes}"""
    return {"weights": 4 * parameters, "gradients": 4 * parameters, "moments": 8 * parameters,
            "EMA": 4 * parameters, "teacher": 4 * teacher_parameters, "activations": activations}


def report(args, unit, header, forwards=0, teacher=None, teacher_nfe=0, multiple=1):
    """Print what a run would be, do and need. header: as `expected_header`, of the student; forwards: passes
    per sample without gradient; teacher: its header, with teacher_nfe forwards per sample; multiple: of which
    the batch of a process has to be."""
    gpus = 1 if args.recipe_name in ("digits", "custom") else 8
    world = args.world or int(os.environ.get("WORLD_SIZE") or gpus)
    if args.batch % (multiple * world):
        raise model.UserError(f"--batch {args.batch} for {world} processes has to be a multiple of "
                              f"{multiple * world}.")
    print(f"{Path(sys.argv[0]).name} on {args.data}, {world} GPU{'s' * (world > 1)}; a dry run")
    hidden = {"teacher_network", "teacher_command", "init", "teacher", "guide", "precision"}
    for k in [*(k for k in args.recipe if k not in hidden), "precision"]:
        flags = ("--dropout", "--width", "--blocks") if k == "network" else ("--" + k.replace("_", "-"),)
        value = getattr(args, k)
        print(f"  {k:<12}{f'{value:,}' if isinstance(value, int) else value}"
              + "  (command line)" * any(model.typed(flag) for flag in flags))
    for path, command in args.command_for.items():
        if path != "none" and not os.path.exists(path): print(f"missing   {path}: {command}")
    if not header: return print("The network follows from the images, which are missing.")

    samples = args.batch // world
    P, flops, kept = cost(header, args.precision, min(args.microbatch or samples, samples))
    Q, teacher_flops = cost(teacher, args.precision, 1)[:2] if teacher else (0, 0)
    each = (3 + forwards) * flops + teacher_nfe * teacher_flops
    print(f"network   {header['network']['class']}, {P:,} parameters"
          + (f"; teacher {teacher['network']['class']}, {Q:,}, {teacher_nfe:g} NFE for each of the {unit}"
             if teacher else ""))
    parts = memory_parts(P, kept, Q)
    print(f"batch     {samples:,} {unit} a GPU and step\n"
          f"memory    {sum(parts.values()) / 2 ** 30:.3g} GiB a GPU: "
          + ", ".join(f"{k} {v / 2 ** 30:.3g}" for k, v in parts.items() if v))
    solves_pools = unit == "pairs" and not args.trajectories
    if teacher: print("          and the activations of the teacher"
                      + ", which solves a pool of trajectories, --microbatch at a time" * solves_pools)
    print(f"compute   {each / 1e9:,.3g} GFLOP for each of the {unit}, "
          f"{each * args.steps * args.batch / 1e15:,.3g} PFLOP in all")
