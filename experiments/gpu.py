"""`make gpu`: everything worth knowing on the day a GPU is at hand, in under an hour.

  1 compile   torch.compile of the three networks, without and with CUDA graphs: gradients against eager mode,
              time of the first call, dropout masks of ECT
  2 ddp       DDP over NCCL with one process, compiled: gradients against eager mode without DDP
  3 recipes   training steps of every recipe at the paper's size, as on one of eight GPUs, not compiled:
              time, samples/s, and peak memory against the estimate of --dry-run
  4 tests     the tests of all stages, on CUDA
  5 digits    `make demo`
  6 bench     model FLOP/s of mid-training, one network after another
  7 launches  a training step in eager mode, compiled and with CUDA graphs, which no script uses
              yet: its time, and how long the GPU works in it
  8 whole     midtrain.py on cifar10-like noise, compiled: a SIGTERM to all its processes while it compiles
              must save and end it, and the same command must continue

Prints each result as it comes, at the end a table, and stores all in --out after every result. A part that
fails or outlasts its limit is a row of the table and sets exit code 1. Parts can be named: `python
experiments/gpu.py recipes`. Without a GPU it says so; `--cpu ddp recipes whole` tries
these parts with digits.
"""
import argparse, copy, importlib, json, os, signal, statistics, subprocess, sys, threading, time, traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bench, midtrain, model, posttrain_cm, posttrain_mf, pretrain, solve
from tools import dry_run

GiB = 2 ** 30
STAGES = [("pretrain",), ("pretrain", "--objective", "flow"), ("midtrain",), ("midtrain", "--branch", "mf"),
          ("posttrain_cm",), ("posttrain_mf",)]


def script(minutes, *command, stop_after=None, **env):
    """Run a command of the project, yield its lines of output as they come. Raises where it fails, or takes
    too long and is killed with all of its processes. stop_after: seconds until all get a SIGTERM"""
    options = dict(cwd=ROOT, env=os.environ | env, text=True, stdout=subprocess.PIPE, start_new_session=True)
    with subprocess.Popen([sys.executable, "-u", *map(str, command)], stderr=subprocess.STDOUT,
                          **options) as process:
        signals = (60 * minutes, signal.SIGKILL), (stop_after, signal.SIGTERM)
        timers = [threading.Timer(after, os.killpg, (process.pid, sign)) for after, sign in signals if after]
        for timer in timers: timer.start()
        last = []
        for line in process.stdout:
            last = [*last[-8:], line.strip()]
            yield line.rstrip()
        for timer in timers: timer.cancel()
    if process.returncode == -signal.SIGKILL: raise RuntimeError(f"killed after {minutes} minutes")
    if process.returncode: raise RuntimeError(" | ".join(last))


def tests(device):
    names = ("runs", "midtrain", "posttrain_cm", "posttrain_mf", "solve", "model", "training_step",
             "sample_fid", "resume")
    files = [f"tests/test_{name}.py" for name in names]
    for line in script(10, "-m", "pytest", "-v", "--tb=line", "-rN", *files, CUDA_VISIBLE_DEVICES="0"):
        if " passed" in line or " FAILED" in line: yield {"what": "tests on CUDA", "result": line}


def compiled(function, graphs):
    """model.compiled, or with CUDA graphs: then a step has to begin with `new_step()`"""
    without = model.compiled(function, True)               # sets torch's options, too
    return torch.compile(function, dynamic=False, mode="reduce-overhead") if graphs else without


new_step = torch.compiler.cudagraph_mark_step_begin


def gradient_error(net, functions, inputs):
    """Relative difference of the gradients of mean(f(*inputs)^2) of two functions with net's weights, and the
    seconds of the last's first call. The third call counts: CUDA graphs are recorded in the second."""
    gradients = []
    for f in functions:
        for call in range(3):
            torch.manual_seed(1)
            started = time.perf_counter()
            new_step()
            f(*inputs).square().mean().backward()
            gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
            net.zero_grad()
            if gradient.is_cuda: torch.cuda.synchronize()
            if call == 0: seconds = time.perf_counter() - started
        gradients.append(gradient)
    return ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item(), seconds


def small_network(name, kind, device, **shorter):
    """A shallow network, none of whose weights is zero -> network, header, inputs for it"""
    header = model.fresh_header(model.DATASETS[name], kind, **shorter)
    model.setup()                                          # TF32 off
    torch.manual_seed(0)
    net = model.build(header).to(device).train()
    for p in net.parameters(): p.data += 0.02 * torch.randn_like(p)
    x, t = torch.randn(8, *model.image_shape(header), device=device), torch.full((8,), 0.5, device=device)
    return net, header, (x, t) if kind == "Denoiser" else (x, 0.2 * t, t)


def compiling(device):
    for name, kind, shorter in [("cifar10", "Denoiser", {"num_blocks": 1, "dropout": 0.2}),
                                ("imagenet64", "Denoiser", {"num_blocks": 1, "dropout": 0.4}),
                                ("imagenet256", "MeanVelocity", {"depth": 4})]:
        net, header, inputs = small_network(name, kind, device, **shorter)
        for graphs in False, True:
            torch._dynamo.reset()
            fast = compiled(net, graphs)
            error, seconds = gradient_error(net, (net, fast), inputs)
            what = f"{header['network']['class']}{' with CUDA graphs' if graphs else ''}"
            yield {"what": f"compiled {what}, fp32",
                   "result": f"{'' if error < 1e-3 else 'FAILED: '}gradients differ from eager mode by "
                             f"{error:.1e}; first step {seconds:.0f} s"}
            if kind == "Denoiser":   # both passes of ECT need one dropout mask; only one has a gradient
                (x, t), weight = inputs, torch.ones(8, device=device)
                for _ in range(3):
                    new_step()
                    loss = posttrain_cm.ect_loss(fast, x, torch.randn_like(x), t, t, None, weight, 0.0)
                    gap = loss.max().item()
                    loss.sum().backward()
                net.zero_grad()
                yield {"what": f"{what}: its dropout masks in ECT, as its loss for r = t",
                       "result": f"{'' if gap < 1e-3 else 'FAILED: '}{gap:.1e}, with equal masks 0"}


def ddp(device):
    """One rank runs all that several would: DDP, its no_sync, two forwards before a backward, and exchanges
    of CPU tensors and objects beside NCCL."""
    cuda = device.type == "cuda"
    index = torch.device("cuda", 0) if cuda else None
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.HashStore(), rank=0,
                            world_size=1, device_id=index)
    try:
        for graphs in (False, True) if cuda else (False,):
            torch._dynamo.reset()
            net, _, inputs = small_network("digits", "Denoiser", device)
            ddp = model.parallel(net, 2)
            wrapped = compiled(ddp, graphs) if cuda else ddp
            def plain(x, t): return torch.cat([net(x, t), net(x, 0.5 * t)])
            def two_forwards(x, t): return torch.cat([wrapped(x, t), wrapped(x, 0.5 * t)])
            error = gradient_error(net, (plain, two_forwards), inputs)[0]
            norms = []
            for f, size in (net, None), (wrapped, 4), (wrapped, 4), (wrapped, 4):
                new_step()
                for x, t in model.microbatches(f, size, *inputs):
                    with torch.no_grad(): target = f(x, 0.5 * t)
                    (f(x, t) - target).square().sum().backward()
                norms.append(model.gradient_norm(net))
                net.zero_grad()
            good = error < 1e-3 and abs(norms[-1] / norms[0] - 1) < 1e-3
            yield {"what": f"DDP{', compiled' * cuda}{', with CUDA graphs' * graphs}",
                   "result": f"{'' if good else 'FAILED: '}gradients differ by {error:.1e}; the norm of "
                             f"their sum over microbatches by {norms[-1] / norms[0] - 1:.1e}"}
        objects, number = [None], torch.ones(1)
        dist.all_gather_object(objects, "an object")
        dist.all_reduce(number)
        dist.barrier()
        good = objects == ["an object"] and number == 1
        yield {"what": "exchange of CPU tensors beside NCCL", "result": "works" if good else "FAILED"}
    finally: dist.destroy_process_group()


def stage_loss(stage, args, net, header, teacher, batch, device):
    """A function that computes the loss of one training step of `stage` on made-up data, as its loop does."""
    shape, K = model.image_shape(header), max(1, header["network"]["label_dim"])
    x0, eps = torch.randn(2, batch, *shape, device=device)
    y = torch.randint(K, (batch,), device=device)
    if stage == "pretrain":
        t = torch.rand(batch, device=device)
        loss = pretrain.edm_loss if args.objective == "edm" else pretrain.flow_loss
        return loss, (x0, eps, t, y)
    if stage == "midtrain":
        args.solver = args.solver or solve.default_solver(header)
        N = len(solve.solver_times(header, args.nfe, args.solver)) - 1
        pairs = next(midtrain.batches_from_teacher(teacher, header, N, args, 0, 0, batch, device))
        def loss(f, x_t, t, x_r, r, y):
            if args.branch == "cm": return midtrain.cmt_loss(f, x_t, t, x_r, y, midtrain.huber)
            return midtrain.cmt_meanflow_loss(f, x_t, t, x_r, r, y)
        return loss, pairs
    if stage == "posttrain_cm":
        t = (args.P_mean + args.P_std * torch.randn(batch, device=device)).exp()
        r = posttrain_cm.ect_r(t, args.q, 0)
        weight = posttrain_cm.ect_weight(t, r, args.weight)
        def loss(f, *batch):
            if args.loss == "ect": return posttrain_cm.ect_loss(f, *batch, args.c)
            return posttrain_cm.ecd_loss(f, *batch, args.c, teacher, args.solver)
        return loss, (x0, eps, t, r, y, weight)
    r, t = posttrain_mf.sample_r_t(batch, args.r_neq_t, args.P_mean, args.P_std, device)
    def loss(f, z, r, t, y, v):
        v = posttrain_mf.guided_velocity(net, z, t, y, v, args.omega, args.kappa, K, *args.guidance_interval)
        k = round(len(z) * args.r_neq_t)
        below, equal = ([a[part] for a in (z, r, t, y, v)] for part in (slice(k), slice(k, None)))
        dudt = posttrain_mf.derivative_jvp(net, *below)
        return torch.cat([posttrain_mf.meanflow_loss(f, *below, dudt, args.p, args.c),
                          posttrain_mf.meanflow_loss(f, *equal, 0, args.p, args.c)])
    return loss, (x0, r, t, y, eps - x0)


def recipe_step(command, data, device, gpus=8):
    """Three training steps of a recipe with random weights and data, with a GPU's share of the batch. -> a
    row"""
    stage, *rest = command
    sys.argv = [f"{stage}.py", "--data", data, *rest]
    args = importlib.import_module(stage).flags()
    writes = Path(args.out).stem
    kind, batch = model.KIND[writes], args.batch // gpus
    network = args.network | ({"interval": True} if kind == "MeanVelocity" and stage != "pretrain" else {})
    header = model.fresh_header(model.DATASETS[data], kind, **network)
    model.setup(precision=args.precision)
    torch.manual_seed(0)
    with torch.device(device): net = model.build(header).train()
    net.backbone_dtype = model.DTYPES[args.precision]
    ema, optimizer = copy.deepcopy(net).eval().requires_grad_(False), model.optimizer(args, net)
    teacher, teacher_header, teacher_parameters = None, header, 0
    if stage == "midtrain" or getattr(args, "loss", "ect") == "ecd":
        network = args.recipe.get("teacher_network", {})
        teacher_header = model.fresh_header(model.DATASETS[data], kind, **network)
        with torch.device(device): teacher = model.build(teacher_header).eval()
        teacher_parameters = sum(p.numel() for p in teacher.parameters())
        teacher.backbone_dtype = model.DTYPES[args.precision] if stage == "midtrain" else torch.float32
    def estimate():
        P, _, activations = dry_run.cost(header, args.precision, args.microbatch or batch)
        return sum(dry_run.memory_parts(P, activations, teacher_parameters).values()) / GiB
    memory = torch.cuda.get_device_properties(device).total_memory / GiB if device.type == "cuda" else 1000
    while estimate() > 0.75 * memory and (args.microbatch or batch) > 4:
        args.microbatch = (args.microbatch or batch) // 2
    if device.type == "cuda": torch.cuda.reset_peak_memory_stats()
    loss, inputs = stage_loss(stage, args, net, teacher_header, teacher, batch, device)
    for step in range(3):
        if device.type == "cuda": torch.cuda.synchronize()
        started = time.perf_counter()
        for part in model.microbatches(net, args.microbatch, *inputs):
            (loss(net, *part).sum() / batch).backward()
        if not model.gradient_norm(net) < float("inf"): raise RuntimeError("the gradient is not finite")
        optimizer.step()
        model.update_ema(ema, net, 0.999)
        model.normalise_weights(net)
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda": torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / GiB if device.type == "cuda" else float("nan")
    what = f"{writes}, {data}, {args.precision}, batch {batch}"
    if args.microbatch: what += f", --microbatch {args.microbatch}"
    return {"what": what, "seconds": seconds, "peak_GiB": peak, "estimate_GiB": estimate(),
            "result": f"{seconds:.3f} s a step, {batch / seconds:,.0f}/s; peak {peak:.2f} GiB, "
                      f"estimate {estimate():.2f} GiB"}


def recipes(device):
    for command in STAGES:
        table = importlib.import_module(command[0]).RECIPES
        table = table.get({"--objective": "flow", "--branch": "mf"}.get((*command, "")[1]),
                          table.get("edm") or table.get("cm") or table)
        for data in table:
            if (data == "digits") != (device.type == "cpu"): continue
            if data in ("custom", "ffhq64", "afhqv2-64"): continue               # like others in the table
            try: yield recipe_step(command, data, device)
            except Exception as e: yield failed(f"{' '.join(command)} --data {data}", e)
            if device.type == "cuda": torch.cuda.empty_cache()


def flops(device):
    for line in script(10, "experiments/bench.py", "flops"): yield {"what": "bench", "result": line}


def digits(device):
    started, table = time.time(), False
    for line in script(8, "experiments/demo.py"):
        table = table or line.startswith("FD-pixels of")
        if table and line: yield {"what": "digits demo", "result": line.replace("|", " ")}
    yield {"what": "digits demo", "result": f"{time.time() - started:.0f} s in all"}


def launches(device):
    """Where the GPU waits for the CPU to launch kernels, its work is less than the step."""
    for what, dataset, batch, network in [
            ("cifar10", model.DATASETS["cifar10"], 16, {}),
            ("MNIST, width 32", model.custom_dataset((1, 28, 28), 10), 256,
             {"model_channels": 32, "num_blocks": 1})]:
        header = model.fresh_header(dataset, **network)
        model.setup(precision="bf16")
        net = model.build(header).to(device).train()
        net.backbone_dtype = torch.bfloat16
        ema = copy.deepcopy(net).requires_grad_(False)
        optimizer = model.optimizer(SimpleNamespace(optimizer="Adam", lr=1e-6, beta1=0.9, beta2=0.999), net)
        x0, eps = torch.randn(2, batch, *dataset["shape"], device=device)
        t, y = torch.ones(batch, device=device), torch.zeros(batch, dtype=torch.int64, device=device)
        for mode in "eager", "compiled", "with CUDA graphs":
            torch._dynamo.reset()
            f = net if mode == "eager" else compiled(net, mode == "with CUDA graphs")
            def step():
                new_step()
                pretrain.edm_loss(f, x0, eps, t, y).mean().backward()
                bench.update(net, ema, optimizer, 1e-6, 0.999)
            for _ in range(4): step()
            took = statistics.median(bench.seconds(step, device) for _ in range(20))
            with torch.profiler.profile() as profile: bench.seconds(step, device)
            kernels = [e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA
                       and not e.key.startswith("Optimizer.")]
            busy = sum(e.self_device_time_total for e in kernels) / 1e3
            moved = sum(e.self_device_time_total for e in kernels if "nchw" in e.key.lower()) / 1e3
            yield {"what": f"a training step, {what}, batch {batch}, {mode}",
                   "result": f"{1e3 * took:.1f} ms; the GPU works {busy:.1f} ms in "
                             f"{sum(e.count for e in kernels):,} kernels, {moved:.1f} of them on layouts"}


def whole(device):
    folder, name = Path("runs/gpu"), "digits" if device.type == "cpu" else "cifar10"
    folder.mkdir(parents=True, exist_ok=True)
    C, side, _ = model.DATASETS[name]["shape"]
    images = np.random.default_rng(0).integers(0, 256, (512, side, side, C), dtype=np.uint8)
    np.savez(folder / f"{name}.npz", arr_0=images, arr_1=np.arange(512) % 10)
    flags, teacher = ("--data", folder / f"{name}.npz", "--no-preview"), folder / "teacher.safetensors"
    list(script(3, "pretrain.py", *flags, "--batch", 32, "--steps", 5, "--no-compile", "--out", teacher))
    middle = ("midtrain.py", *flags, "--teacher", teacher, "--init", teacher, "--log-every", 100,
              "--steps", 500, "--out", folder / f"midtrain-{time.time():.0f}.safetensors")
    for what, stop_after, proof in ("stopped", 25, "asked to stop"), ("continued", None, "continuing"):
        started = time.time()
        lines = list(script(8, *middle, stop_after=stop_after))
        good = any(proof in line for line in lines)
        yield {"what": f"midtrain.py, {name}, {what}",
               "result": f"{'' if good else 'FAILED: '}{time.time() - started:.0f} s; "
                         + "; ".join(lines[-2:])}


PARTS = {"compile": compiling, "ddp": ddp, "recipes": recipes, "tests": tests, "digits": digits,
         "bench": flops, "launches": launches, "whole": whole}


def failed(what, e):
    traceback.print_exc()
    reason = (str(e).splitlines() or [""])[0][:300]
    return {"what": what, "result": f"FAILED: {type(e).__name__}: {reason}"}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    p.add_argument("--cpu", action="store_true", help="try ddp, whole and the digits recipes on a CPU")
    p.add_argument("--out", default="runs/gpu.json", help="all results, as JSON")
    args = p.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        raise model.UserError(f"{min(unknown)} is not a part; choose of {', '.join(PARTS)}.")
    if not torch.cuda.is_available() and not args.cpu:
        raise model.UserError("torch sees no GPU here; `python experiments/gpu.py --cpu recipes` tries it.")
    device = torch.device("cpu" if args.cpu else "cuda")
    name = "CPU" if args.cpu else torch.cuda.get_device_name()
    rows = []
    def add(row):
        rows.append(row)
        print(f"{row['what']}: {row['result']}", flush=True)
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(rows, indent=1))
    add({"what": "device", "result": f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"})
    for part in args.parts or PARTS:
        started = time.time()
        try:
            for row in PARTS[part](device): add(row)
        except Exception as e: add(failed(part, e))
        add({"what": part, "result": f"took {time.time() - started:.0f} s"})
    print("\n| what | result |\n|---|---|")
    for row in rows: print(f"| {row['what']} | {row['result']} |")
    if any("FAILED" in row["result"] for row in rows): sys.exit(1)


if __name__ == "__main__":
    model.run(main)
