"""`make bench`: what each part costs, as ratios within one run.

The two sides of a ratio alternate, so that a slow minute of the machine affects both, and the median counts.
Everything is warmed up, and data are random. What is said to be faster is compared with the naive baseline in
the same run ("differs by" is the relative error of the result). `python experiments/bench.py steps frechet`
runs some parts. `compile` waits for the compiler for minutes, so on a CPU it runs only if it is named.
"""
import contextlib, copy, json, math, os, random, statistics, subprocess, sys, tempfile, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import fid, midtrain, model, posttrain_cm, posttrain_mf, pretrain, solve
from tools import dry_run


def seconds(step, device):
    if device.type == "cuda": torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device.type == "cuda": torch.cuda.synchronize()
    return time.perf_counter() - started


def alternating(steps, device, turns, warm_up=2):
    """{name: function} -> {name: seconds of each turn}, in a new order every turn."""
    times = {name: [] for name in steps}
    for turn in range(turns + warm_up):
        for name in random.sample(list(steps), len(steps)):
            took = seconds(steps[name], device)
            if turn >= warm_up: times[name].append(took)
    return times


def ratio(times, name, base):
    return statistics.median(a / b for a, b in zip(times[name], times[base]))


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def peak_memory(step, device):
    """What a step holds at its fullest beyond what was there before it, in MiB."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    with torch.profiler.profile(profile_memory=True) as profile: step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2 ** 20


def update(net, ema, opt, lr, decay):
    """What stands in each stage's loop behind `backward`. -> gradient norm"""
    norm = model.gradient_norm(net)
    if math.isfinite(norm):
        for group in opt.param_groups: group["lr"] = lr
        opt.step()
        model.update_ema(ema, net, decay)
        model.normalise_weights(net)
    opt.zero_grad(set_to_none=True)
    return norm


def networks(name, device):
    dataset = model.DATASETS[name]
    f = model.build(model.fresh_header(dataset)).to(device).eval()
    u = model.build(model.fresh_header(dataset, "MeanVelocity", interval=True)).to(device).eval()
    return dataset, f, u


def untrained(path, stage):
    """A checkpoint of digits as `stage` would leave it."""
    header = model.fresh_header(model.DATASETS["digits"])
    model.save(path, model.build(header).state_dict(), header | {
        "stage": stage, "step": 0, "steps": 0, "mid_t": 0.8, "data": "digits"})


# --- what a training step of each method costs --------------------------------------------------------------

def losses(name, batch, device):
    """{base method: {method: a function that gives its loss}} on a data set's network."""
    dataset, f, u = networks(name, device)
    x, eps = torch.randn(2, batch, *dataset["shape"], device=device)
    t = 0.1 + 0.8 * torch.rand(batch, device=device)
    y = torch.zeros(batch, dtype=torch.int64, device=device)

    def meanflow(derivative, share=0.25):
        k = round(share * batch)
        r_below_t = [x[:k], 0.5 * t[:k], t[:k], y[:k], eps[:k]]
        r_equals_t = [x[k:], t[k:], t[k:], y[k:], eps[k:]]
        dudt = derivative(u, *r_below_t)
        loss = posttrain_mf.meanflow_loss(u, *r_below_t, dudt)
        return torch.cat([loss, posttrain_mf.meanflow_loss(u, *r_equals_t, 0)]) if k < batch else loss

    jvp, difference = posttrain_mf.derivative_jvp, posttrain_mf.derivative_difference
    return {"denoising": {
        "denoising": lambda: pretrain.edm_loss(f, x, eps, t, y),
        "CMT (given trajectories)": lambda: midtrain.cmt_loss(f, x, t, eps, y, midtrain.huber),
        "ECT": lambda: posttrain_cm.ect_loss(f, x, eps, t, 0.9 * t, y, 1 / t, 0.0),
    }, "flow matching": {
        "flow matching": lambda: pretrain.flow_loss(u, x, eps, t, y),
        "CMT, Mean Flow (given trajectories)": lambda: midtrain.cmt_meanflow_loss(u, x, t, eps, 0.5 * t, y),
        "MeanFlow, JVP": lambda: meanflow(jvp),
        "MeanFlow, central difference": lambda: meanflow(difference),
        "MeanFlow, JVP of the whole batch": lambda: meanflow(jvp, 1.0),
    }}


def steps(name, batch, device, turns):
    """A step is loss and backward, without the optimiser, which is the same for all; dropout is off."""
    for base, methods in losses(name, batch, device).items():
        whole = {k: lambda loss=loss: loss().mean().backward() for k, loss in methods.items()}
        times = alternating(whole, device, turns)
        print(f"{name}, batch {batch}, relative to {base} with {statistics.median(times[base]) * 1e3:.1f} ms "
              "a step; peak memory of the step")
        for k, step in whole.items():
            print(f"  {k:<40}{ratio(times, k, base):.2f}   {peak_memory(step, device):,.0f} MiB", flush=True)


def compiling(name, batch, device, turns):
    """A denoising step with --compile over one without, and what the first one waits for."""
    dataset, f, _ = networks(name, device)
    x, eps, t = *torch.randn(2, batch, *dataset["shape"], device=device), torch.ones(batch, device=device)
    y = torch.zeros(batch, dtype=torch.int64, device=device)
    loss = lambda net: pretrain.edm_loss(net, x, eps, t, y).mean()
    fast = model.compiled(f, True)
    first = seconds(lambda: loss(fast).backward(), device)
    steps = {k: lambda net=net: loss(net).backward() for k, net in (("eager", f), ("fast", fast))}
    times = alternating(steps, device, turns)
    print(f"{name}, batch {batch}, a denoising step with --compile over one without: "
          f"{ratio(times, 'fast', 'eager'):.2f}, the first takes {first:.0f} s; the loss differs by "
          f"{relative_error(loss(fast), loss(f)):.1e}", flush=True)


# --- mid-training against the naive baseline, the solver against bare calls ---------------------------------

def mid_training(name, batch, device, turns, compile=False, precision="fp32"):
    """Training on the pairs of one pool by midtrain.py, and on as many pairs by the released recipe: fp32,
    eager, the trajectories of each batch solved on their own (8 for 128 pairs), parameters averaged one by
    one."""
    dataset, teacher, _ = networks(name, device)
    header = model.fresh_header(dataset)
    args = SimpleNamespace(nfe=16, solver="dpm3", branch="cm", microbatch=None)
    size = midtrain.pool_size(batch, 16)
    count = size * 16 // batch                                                     # batches of a pool
    table = [k.to(device) for k in midtrain.pair_table(16, "cm")]

    def training(precision, compile):
        t, net = copy.deepcopy(teacher), copy.deepcopy(teacher).train()
        t.backbone_dtype = net.backbone_dtype = model.DTYPES[precision]
        ema = copy.deepcopy(net)
        opt = torch.optim.RAdam(net.parameters(), 1e-4, foreach=True)
        return model.compiled(t, compile), net, model.compiled(net, compile), ema, opt

    t, net, student, ema, opt = training(precision, compile)
    def ours():
        paths = midtrain.solve_pool(t, header, size, args, device)
        order = midtrain.draw_pair_indices(size, 16, 16, device)
        for at in order.split(batch):
            x, time, end, _, y = midtrain.gather_pairs(*paths, at, *table)
            (midtrain.cmt_loss(student, x, time, end, y, midtrain.huber).sum() / batch).backward()
            update(net, ema, opt, 1e-4, 0.999)

    t2, net2, student2, ema2, opt2 = training("fp32", False)
    def naive():
        for _ in range(count):
            paths = midtrain.solve_pool(t2, header, batch // 16, args, device)
            x, time, end, _, y = midtrain.gather_pairs(*paths, torch.arange(batch, device=device), *table)
            midtrain.cmt_loss(student2, x, time, end, y, midtrain.huber).mean().backward()
            opt2.step()
            opt2.zero_grad()
            with torch.no_grad():
                for a, b in zip(ema2.parameters(), net2.parameters()): a.lerp_(b, 0.001)

    x = 80 * torch.randn(16, *dataset["shape"], device=device)
    y = torch.zeros(16, dtype=torch.int64, device=device)
    with torch.no_grad():
        whole = solve.solve_teacher(t, header, x, y, 16, "dpm3")[0]
        parts = torch.cat([solve.solve_teacher(teacher, header, *a, 16, "dpm3")[0]
                           for a in zip(x.split(8), y.split(8))], dim=1)
    times = alternating({"ours": ours, "naive": naive}, device, turns, warm_up=1)
    rate = [count * batch / statistics.median(times[k]) for k in ("ours", "naive")]
    print(f"{name}, mid-training at batch {batch}{', ' + precision if precision != 'fp32' else ''}"
          f"{', compiled' if compile else ''}: {rate[0]:,.0f} pairs/s, {rate[1]:,.0f} the naive baseline, "
          f"{1 / ratio(times, 'ours', 'naive'):.2f} times as many; states differ by "
          f"{relative_error(whole, parts):.1e}", flush=True)


def solving(name, batch, device, turns):
    """An N-step solve over N bare forward passes of the network."""
    dataset, f, _ = networks(name, device)
    x, t = 80 * torch.randn(batch, *dataset["shape"], device=device), torch.ones(batch, device=device)
    y = torch.zeros(batch, dtype=torch.int64, device=device)
    solvers = {"16 bare calls": lambda: [f(x, t, y) for _ in range(16)]} | {
        s: lambda s=s: solve.solve_teacher(f, model.fresh_header(dataset), x, y, 16, s)
        for s in solve.solvers_of(model.fresh_header(dataset))}
    with torch.no_grad(): times = alternating(solvers, device, turns)
    found = [f"{s} {ratio(times, s, '16 bare calls'):.3f}"
             for s in solve.solvers_of(model.fresh_header(dataset))]
    print(f"{name}, batch {batch}, a solve of 16 calls over 16 bare calls: {', '.join(found)}", flush=True)


# --- what the training code around a step costs -------------------------------------------------------------

def overhead(device):
    """A step of pre-training with all that the stages add to it (seeding, microbatches, the check of the
    gradient, log, signal handler), over a bare step of forward, backward, optimiser and EMA."""
    header = model.fresh_header(model.DATASETS["digits"])
    net, ema = (model.build(header).to(device) for _ in range(2))
    opt = torch.optim.Adam(net.parameters(), 1e-4, foreach=True)
    x, eps, t = torch.randn(64, 1, 8, 8), torch.randn(64, 1, 8, 8), torch.rand(64) + 0.1
    batch = [a.to(device) for a in (x, eps, t, torch.zeros(64, dtype=torch.int64))]
    args = SimpleNamespace(out=f"{tempfile.mkdtemp()}/a", steps=10**9, batch=64, log_every=50, compile=False)
    with contextlib.redirect_stdout(None): log = model.Log(args, "images", 1, 0)
    stop, step = model.Stop(1), iter(range(1, 10 ** 9))

    def bare():
        pretrain.edm_loss(net, *batch).mean().backward()
        opt.step()
        with torch.no_grad(): torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 0.01)
        opt.zero_grad(set_to_none=True)

    def full():
        number, loss = next(step), 0
        stop(number)
        model.reseed(0, 0, number)
        for some in model.microbatches(net, None, *batch):
            part = pretrain.edm_loss(net, *some).sum() / 64
            part.backward()
            loss += part.detach()
        norm = update(net, ema, opt, 1e-4, 0.99)
        with contextlib.redirect_stdout(None): log(number, loss, norm, 1e-4)

    times = alternating({"bare": bare, "again": bare, "full": full}, device, 150, warm_up=10)
    print("a training step with seeding, log, signals and the check of the gradient over a bare step: "
          f"{ratio(times, 'full', 'bare'):.3f} (control, a bare step over a bare step: "
          f"{ratio(times, 'again', 'bare'):.3f})", flush=True)


# --- reading data -------------------------------------------------------------------------------------------

def reading(device):
    """Images/s of 64x64 read by one process from a file that is not in the page cache, and the share of a
    step that waits for the next batch."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.npz")
        images = np.random.default_rng(0).integers(0, 256, (20_000, 64, 64, 3), dtype=np.uint8)
        np.savez(path, arr_0=images)
        rates = []
        for _ in range(5):
            with open(path, "rb+") as f:
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            data, order = model.Data(path), torch.randperm(20_000)[:12_800].split(128)
            rates.append(12_800 / seconds(lambda: [data.batch(at) for at in order], device))
        print(f"reading 64x64 images in random order, not cached: {statistics.median(rates):,.0f} images/s "
              f"({min(rates):,.0f} to {max(rates):,.0f})", flush=True)
        for name, batch, steps, path in [("digits", 64, 200, ROOT / "data/digits.npz"),
                                         ("imagenet64", 2, 4, path)]:
            net = model.build(model.fresh_header(model.DATASETS[name])).to(device).train()
            args = SimpleNamespace(seed=0, batch=batch)
            batches, waited, whole = model.read_batches(model.Data(path), args, 0, 0, batch, device), [], []
            for _ in range(steps):
                started = time.perf_counter()
                x0, y = next(batches)
                waited.append(time.perf_counter() - started)
                x0, t = model.to_float(x0), torch.ones(batch, device=device)
                pretrain.edm_loss(net, x0, torch.randn_like(x0), t, y).mean().backward()
                net.zero_grad()
                if device.type == "cuda": torch.cuda.synchronize()
                whole.append(time.perf_counter() - started)
            print(f"{name}, batch {batch}: {sum(waited[1:]) / sum(whole[1:]):.2%} of a step waits for data",
                  flush=True)


# --- the Frechet distance -----------------------------------------------------------------------------------

def frechet():
    """Statistics of 2048 features against scipy.linalg.sqrtm, and what fid.py holds at its fullest."""
    try: import scipy.linalg
    except ImportError: return print("frechet: left out, `pip install scipy` to compare with it")
    mix = torch.randn(2048, 2048) * torch.logspace(0, -2, 2048) / 45
    a, b = (fid.moments(*fid.sums((torch.randn(64, 2048) @ mix.T for _ in range(64)))) for _ in range(2))
    found = {}
    def ours(): found["ours"] = fid.frechet_distance(*a, *b).item()
    def scipys():
        root = scipy.linalg.sqrtm((a[1] @ b[1]).numpy()).real
        found["scipy"] = ((a[0] - b[0]).square().sum() + (a[1] + b[1]).trace()).item() - 2 * root.trace()
    times = alternating({"ours": ours, "scipy": scipys}, torch.device("cpu"), 3, warm_up=1)
    print(f"Frechet distance of 2048 features: {statistics.median(times['ours']):.1f} s, scipy.linalg.sqrtm "
          f"{ratio(times, 'scipy', 'ours'):.1f} times that; differs by "
          f"{abs(found['ours'] / found['scipy'] - 1):.1e}")
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        untrained(f"{folder}/a.safetensors", "midtrain_cm")
        for n in (1_000, 16_000):
            process = subprocess.Popen([sys.executable, ROOT / "fid.py", f"{folder}/a.safetensors:1", "--n",
                                        str(n), "--ref", "digits", "--features", "pixels"],
                                       cwd=ROOT, stdout=subprocess.DEVNULL)
            peaks.append(os.wait4(process.pid, 0)[2].ru_maxrss / 2 ** 10)
    print(f"fid.py from a checkpoint, digits: {peaks[0]:,.0f} MiB for 1,000 images, {peaks[1]:,.0f} for "
          "16,000", flush=True)


# --- more than one process ----------------------------------------------------------------------------------

def scaling():
    """midtrain.py on digits, one process of one thread and two, at 64 pairs each."""
    rates = []
    with tempfile.TemporaryDirectory() as folder:
        untrained(f"{folder}/a.safetensors", "pretrain")
        for n in (1, 2):
            subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}",
                            ROOT / "midtrain.py", "--teacher", f"{folder}/a.safetensors", "--init",
                            f"{folder}/a.safetensors", "--out", f"{folder}/{n}.safetensors", "--steps", "128",
                            "--batch", str(64 * n), "--log-every", "32"], check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
            lines = Path(f"{folder}/{n}.jsonl").read_text().splitlines()
            rates.append(statistics.median(json.loads(line)["pairs/s"] for line in lines[1:]))
    print(f"midtrain.py with two processes of a thread over one: {rates[1] / rates[0]:.2f} times the pairs/s",
          flush=True)


# --- a GPU's own table --------------------------------------------------------------------------------------

def flops(device):
    """Model FLOP/s of mid-training, of the networks it is for, against a matrix product in bf16."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    product = 2 * 8192 ** 3 / statistics.median(seconds(lambda: a @ a, device) for _ in range(20))
    print(f"a matrix product in bf16: {product / 1e12:,.0f} TFLOP/s")
    sit_b4 = dict(patch_size=4, hidden_size=768, depth=12, num_heads=12)
    for name, batch, network in [("cifar10", 128, {}), ("cifar10", 512, {}), ("imagenet64", 128, {}),
                                 ("imagenet256", 256, sit_b4), ("imagenet256", 64, {})]:
        dataset = model.DATASETS[name]
        kind = "MeanVelocity" if name == "imagenet256" else "Denoiser"
        header = model.fresh_header(dataset, kind, **network)
        teacher, net = (model.build(header).to(device).requires_grad_(grad) for grad in (False, True))
        teacher.backbone_dtype = net.backbone_dtype = torch.bfloat16
        fast, slow = model.compiled(teacher.eval(), True), model.compiled(net.train(), True)
        x, t = torch.randn(batch, *dataset["shape"], device=device), torch.full((batch,), 0.5, device=device)
        y = torch.zeros(batch, dtype=torch.int64, device=device)
        times = (t,) if kind == "Denoiser" else (t, t)
        def step():
            with torch.no_grad(): end = fast(x, *times, y)
            (slow(x, *times, y) - end - x).square().mean().backward()
        for _ in range(3): step()
        took = statistics.median(seconds(step, device) for _ in range(10))
        work = 4 * dry_run.cost(header, "bf16", 1)[1] * batch
        size, peak = sum(p.numel() for p in net.parameters()), torch.cuda.max_memory_allocated()
        print(f"{name}, {size / 1e6:,.0f}M, batch {batch}: {batch / took:,.0f} pairs/s, "
              f"{work / took / 1e12:,.0f} TFLOP/s, {work / took / product:.0%} of the product, "
              f"{peak / 2 ** 30:.1f} GiB", flush=True)
        torch.cuda.reset_peak_memory_stats()


def main():
    device = model.setup(one_process=True)[2]
    cuda, wanted = device.type == "cuda", sys.argv[1:]
    print(f"{torch.cuda.get_device_name() if cuda else f'CPU, {torch.get_num_threads()} threads'}, "
          f"torch {torch.__version__}, fp32, TF32 off")
    parts = [("steps", lambda: steps("digits", 64, device, 20)),
             ("midtraining", lambda: mid_training("digits", 128, device, 5)),
             ("solving", lambda: solving("digits", 128, device, 7)),
             ("overhead", lambda: overhead(device)),
             ("reading", lambda: reading(device)),
             ("frechet", frechet),
             ("scaling", scaling),
             ("compile", lambda: compiling("digits", 64, device, 20))]
    if cuda:
        parts += [("steps", lambda: steps("cifar10", 128, device, 5)),
                  ("steps", lambda: steps("imagenet256", 32, device, 5)),
                  ("midtraining", lambda: mid_training("cifar10", 128, device, 5, True, "bf16")),
                  ("flops", lambda: flops(device))]
    for name, part in parts:
        if name in wanted or not wanted and (cuda or name != "compile"): part()


if __name__ == "__main__":
    main()
