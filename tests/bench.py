"""`make bench`: what one training step of each method costs, and what surviving does, as ratios of one run.

Denoising for the consistency branch and flow matching for the mean-flow branch cost one forward and one
backward; everything is given relative to these. The methods take turns, so that a slow minute of the machine
meets all of them, and the median over the turns counts. A step is loss and backward, without the optimiser,
which is the same for all; dropout is off.
"""
import contextlib, io, statistics, sys, tempfile, time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import midtrain, model, posttrain_cm, posttrain_mf, pretrain


def steps(name, batch, device):
    """{base method: {method: a function that gives its loss}} on a data set's network."""
    row = model.DATASETS[name]
    f = model.build(model.fresh_header(row)).to(device).eval()
    u = model.build(model.fresh_header(row, "MeanVelocity", interval=True)).to(device).eval()
    x, eps = torch.randn(2, batch, *row["shape"], device=device)
    t = 0.1 + 0.8 * torch.rand(batch, device=device)
    y = torch.zeros(batch, dtype=torch.int64, device=device)

    def meanflow(derivative, share=0.25):
        k = round(share * batch)
        jumping, others = [x[:k], 0.5 * t[:k], t[:k], y[:k], eps[:k]], [x[k:], t[k:], t[k:], y[k:], eps[k:]]
        loss = posttrain_mf.meanflow_loss(u, *jumping, derivative(u, *jumping))
        return torch.cat([loss, posttrain_mf.meanflow_loss(u, *others, 0)]) if k < batch else loss

    jvp, difference = posttrain_mf.derivative_jvp, posttrain_mf.derivative_difference
    flow = {
        "flow matching": lambda: pretrain.flow_loss(u, x, eps, t, y),
        "CMT, Mean Flow (given trajectories)": lambda: midtrain.cmt_meanflow_loss(u, x, eps, 0.5 * t, t, y),
        "MeanFlow, JVP": lambda: meanflow(jvp),
        "MeanFlow, central difference": lambda: meanflow(difference),
        "MeanFlow, JVP of the whole batch": lambda: meanflow(jvp, 1.0),
    }
    return {"denoising": {
        "denoising": lambda: pretrain.edm_loss(f, x, eps, t, y),
        "CMT (given trajectories)": lambda: midtrain.cmt_loss(f, x, t, eps, y, midtrain.huber),
        "ECT": lambda: posttrain_cm.ect_loss(f, x, eps, t, 0.9 * t, y, 1 / t, 0.0),
    }, "flow matching": flow}


def survival(batch, device):
    """-> a whole step of pre-training, optimiser and EMA included: plain, and with all that a stage adds so
    that it survives: seeding, microbatches, the check of the gradient, the log, the ear for signals."""
    header = model.fresh_header(model.DATASETS["digits"])
    net, ema = (model.build(header).to(device) for _ in range(2))
    opt = torch.optim.Adam(net.parameters(), 1e-4, foreach=True)
    x, eps, t = torch.randn(batch, 1, 8, 8), torch.randn(batch, 1, 8, 8), torch.rand(batch) + 0.1
    rows = [a.to(device) for a in (x, eps, t, torch.zeros(batch, dtype=torch.int64))]
    args = SimpleNamespace(out=f"{tempfile.mkdtemp()}/a", steps=10 ** 9, batch=batch, log_every=50)
    with contextlib.redirect_stdout(io.StringIO()): log = model.Log(args, "images", 1, 0)
    stop, step = model.Stop(1), iter(range(1, 10 ** 9))

    def plain():
        pretrain.edm_loss(net, *rows).mean().backward()
        opt.step()
        with torch.no_grad(): torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 0.01)
        opt.zero_grad(set_to_none=True)

    def surviving():
        number, loss = next(step), 0
        stop(number)
        model.reseed(0, 0, number)
        for some in model.microbatches(net, None, *rows):
            part = pretrain.edm_loss(net, *some).sum() / batch
            part.backward()
            loss += part.detach()
        norm = model.update(net, ema, opt, 1e-4, 0.99)
        with contextlib.redirect_stdout(io.StringIO()): log(number, loss, norm, 1e-4)
    return plain, surviving


def seconds(step, device):
    if device.type == "cuda": torch.cuda.synchronize()
    started = time.perf_counter()
    loss = step()
    if loss is not None: loss.mean().backward()
    if device.type == "cuda": torch.cuda.synchronize()
    return time.perf_counter() - started


def main():
    device = model.setup(None)[2]
    cuda = device.type == "cuda"
    print(f"{torch.cuda.get_device_name() if cuda else f'CPU, {torch.get_num_threads()} threads'}, "
          f"torch {torch.__version__}, fp32, TF32 off")
    for name, batch, turns in [("digits", 64, 20)] + [("cifar10", 128, 5), ("imagenet256", 32, 5)] * cuda:
        for base, methods in steps(name, batch, device).items():
            times = {method: [] for method in methods}
            for turn in range(turns + 2):
                for method, step in methods.items():
                    took = seconds(step, device)
                    if turn >= 2: times[method].append(took)            # the first two warm up
            print(f"{name}, batch {batch}, relative to {base} with "
                  f"{statistics.median(times[base]) * 1e3:.1f} ms a step")
            for method in methods:
                ratio = statistics.median(a / b for a, b in zip(times[method], times[base]))
                print(f"  {method:<40}{ratio:.2f}")
    plain, surviving = survival(64, device)
    ratios = [seconds(surviving, device) / seconds(plain, device) for _ in range(110)][10:]
    print(f"a step that survives (checks, seeds, log, signals), relative to a plain one: "
          f"{statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
