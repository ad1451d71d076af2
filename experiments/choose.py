"""`make choose`: N and the order of the solver, from the teacher's own error, on digits.

Solving more accurately than the teacher's own error is wasted work. Two teachers, each trained without 180
images that the other has seen, give the teacher's error of one call. 64 trajectories give the errors of the
solvers at the endpoint. The (N, order) with the fewest calls whose error is below the teacher's then trains a
chain with three seeds, on as many pairs as the recipe. The recipe is trained as well, unless `make ablation`
has done so. An interrupted run continues.
"""
import time
from pathlib import Path

import numpy as np
import torch

from common import command, model, spread
from ablation import TEACHER, chain
import solve

FOLDER, NS, ORDERS = Path("runs/choose"), (4, 6, 8, 12, 16, 24, 32), (1, 2, 3)


def denoising_errors(D, x0, y, times, repeats=20):
    """||D(x_t) - x_0||^2 of each image at each of `times`, mean over `repeats` draws of the same noises.
    x0 (n,C,H,W), y (n,), times (T,) -> (T,n)"""
    g = torch.Generator().manual_seed(0)
    errors = torch.zeros(len(times), len(x0))
    for k, t in enumerate(times.to(x0.dtype)):
        for _ in range(repeats):
            x = x0 + t * torch.randn(x0.shape, generator=g, dtype=x0.dtype)
            errors[k] += (D(x, t.expand(len(x0)), y) - x0).square().flatten(1).sum(1) / repeats
    return errors


def teacher_error(seen, unseen):
    """E||D - D*||^2, where D* is the result of the same training on endless data: half of the difference
    between the denoising error on unseen images and that on seen ones. For fitting the noise of a finite
    dataset lowers the error on seen images as much as it raises that on others (Mallows; exact for a mean,
    for least squares to first order in parameters per image). seen, unseen: (T,n), of the same images
    -> (T,), and the standard error over images of its mean"""
    gap = (unseen - seen) / 2
    return gap.mean(1), (gap.mean(0).std() / gap.shape[1] ** 0.5).item()


def solver_errors(denoise, x, Ns, orders, ends=(80.0, 0.002)):
    """{(N, order): E||end of N steps - end of 256 steps of order 2||^2}. x (n, ...) at ends[0]"""
    end = lambda N, order: solve.dpm_solver_pp(denoise, x, solve.log_uniform_times(N, *ends), order)[0][-1]
    fine = end(256, 2)
    return {(N, p): (end(N, p) - fine).square().flatten(1).sum(1).mean().item()
            for N in Ns for p in orders}


def cheapest(errors, allowed):
    """errors: {(N, order): error} -> of those within `allowed` the one of fewest calls, then least error;
    with none within, the best there is."""
    good = [key for key, error in errors.items() if error < allowed]
    return min(good, key=lambda key: (key[0], errors[key])) if good else min(errors, key=errors.get)


@torch.no_grad()
def estimate():
    """-> the teacher's error at the recipe's times (T,), its standard error, {(N, order): solver's error}"""
    with np.load("data/digits.npz") as f: images, labels = f["arr_0"], f["arr_1"]
    order, teachers, kept_out = np.random.default_rng(0).permutation(len(images)), [], []
    for k in (0, 1):
        out, data = FOLDER / f"teacher{k}.safetensors", FOLDER / f"without{k}/digits.npz"   # digits' recipe
        kept_out.append(order[180 * k:][:180])
        rest = np.setdiff1d(order, kept_out[k])
        if not data.exists():
            with model.atomic_write(data) as part, open(part, "wb") as f:
                np.savez(f, arr_0=images[rest], arr_1=labels[rest])
        command("pretrain", "--data", data, "--out", out)
        teachers.append(model.load(out))

    times, seen, unseen = solve.log_uniform_times(16)[:-1], [], []
    for k, at in enumerate(kept_out):
        x0 = model.to_float(torch.from_numpy(images[at]).movedim(-1, 1))
        errors = [denoising_errors(D, x0, torch.from_numpy(labels[at]).long(), times) for D, _ in teachers]
        unseen.append(errors[k])
        seen.append(errors[1 - k])
    torch.manual_seed(0)
    (D, header), n = teachers[0], 64
    x, y = header["t_max"] * torch.randn(n, *model.image_shape(header)), torch.randint(10, (n,))
    errors = solver_errors(lambda x, t: D(x, t, y), x, NS, ORDERS)
    return *teacher_error(torch.cat(seen, 1), torch.cat(unseen, 1)), errors


def main():
    started = time.time()
    own, standard_error, errors = estimate()
    allowed = own.mean().item()
    N, order = cheapest(errors, allowed)
    print(f"\nteacher's error, mean over the trajectory's times: {allowed:.3f} ± {standard_error:.3f}\n"
          f"\n| solver's error, N = | {' | '.join(map(str, NS))} |\n|---|{'---|' * len(NS)}")
    for p in ORDERS: print(f"| order {p} | {' | '.join(f'{errors[n, p]:.4f}' for n in NS)} |")
    print(f"\nchosen: N = {N}, order {order}", flush=True)

    command("pretrain", "--out", TEACHER)
    rows = []
    for name, flags in (("recipe", []), ("chosen", ["--nfe", N, "--solver", f"dpm{order}"])):
        stages = zip(*(chain(flags, [], seed) for seed in range(3)))
        cells = [spread(found[k] for _, found in runs) for runs in stages for k in (0, 1)]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    print("\n| FD-pixels | mid-training: 1 step | 2 steps | post-training: 1 step | 2 steps |\n"
          "|---|---|---|---|---|\n" + "\n".join(rows) + f"\n\n{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
