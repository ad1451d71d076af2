"""`make demo`: every stage on the embedded digits by its real command line, then one table and one picture.
`make demo-mf` is the same for the mean-flow branch.

`make compare` and `make compare-mf` do it with several training seeds and with more baselines. The baselines,
post-training straight from the diffusion weights, get the total compute of mid- and post-training together;
of plain ECT's doubling intervals the best counts. All continue where they were interrupted. common.py says
how compute is counted.
"""
import argparse, statistics, time

import numpy as np

from common import command, compute, distances, model, scores, spread, steps_for
from sample import seed_range


def halves():
    """FD-pixels of one random half of the real digits against the other."""
    with np.load("data/digits.npz") as f: images = np.random.default_rng(0).permutation(f["arr_0"])
    paths = [f"runs/digits/half{i}.npz" for i in (0, 1)]
    for path, half in zip(paths, np.array_split(images, 2)): np.savez(path, arr_0=half)
    return distances(paths[:1], ref=paths[1])[0]


def train_cm(seed, file, intervals):
    """The consistency chain and its baselines -> rows (name, file, compute in million forwards)."""
    pre, mid, post = file("pretrain"), file("midtrain_cm"), file("posttrain_cm")
    command("pretrain", "--seed", seed, "--out", pre)
    if seed == 0: command("solve", "--n", 8)
    command("midtrain", "--seed", seed, "--teacher", pre, "--out", mid)
    command("posttrain_cm", "--seed", seed, "--init", mid, "--out", post)

    total = compute(mid) + compute(post)
    rows = [("teacher", pre, 0), ("after mid-training", mid, compute(mid)),
            ("after post-training", post, total)]
    for k in intervals:
        rows += [(f"plain ECT, doubling every {k} steps", file(f"ect_{k}"), total)]
        command("posttrain_cm", "--seed", seed, "--init", pre, "--q", 2, "--double", k, "--lr", 3e-4,
                "--steps", steps_for(total, post), "--out", rows[-1][1])
    return rows


def train_mf(seed, file, scratch):
    """The mean-flow chain and its baselines -> rows as train_cm's."""
    pre, mid, post = file("pretrain_flow"), file("midtrain_mf"), file("posttrain_mf")
    command("pretrain", "--objective", "flow", "--seed", seed, "--out", pre)
    command("midtrain", "--branch", "mf", "--seed", seed, "--teacher", pre, "--out", mid)
    command("posttrain_mf", "--seed", seed, "--init", mid, "--out", post)

    total = compute(mid) + compute(post)
    rows = [("teacher", pre, 0), ("after mid-training", mid, compute(mid)),
            ("after post-training", post, total)]
    rows += [("MeanFlow from the flow-matching weights", file("mf_flow"), total)]
    command("posttrain_mf", "--seed", seed, "--init", pre, "--steps", steps_for(total, post),
            "--lr", 6e-4, "--out", rows[-1][1])
    if scratch:
        total += compute(pre)
        rows += [("MeanFlow from scratch, pre-training's compute too", file("mf_scratch"), total)]
        command("posttrain_mf", "--seed", seed, "--init", "none", "--lr", 1e-3,
                "--steps", steps_for(total, post), "--out", rows[-1][1])
    return rows


def export(path, out):
    """Copy a checkpoint in fp16. Its header says which file it was and how that was trained."""
    tensors, header = model.read(path)
    header |= {"made by": "python experiments/demo.py --export", "sha256 in fp32": model.sha256(path)}
    model.save(out, {k: v.half() for k, v in tensors.items()}, header)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--branch", choices=["cm", "mf"], default="cm", help="consistency or mean flow")
    p.add_argument("--seeds", type=seed_range, default="0-0", metavar="A-B", help="training seeds")
    p.add_argument("--n", type=int, default=2500, help="samples to judge a model by")
    p.add_argument("--intervals", type=int, nargs="+", default=[70],
                   help="steps between two doublings of plain ECT")
    p.add_argument("--export", action="store_true",
                   help="also write data/digits_teacher.safetensors and data/digits_cmt.safetensors, in fp16")
    p.add_argument("--scratch", action="store_true", help="also MeanFlow from scratch")
    args = p.parse_args()
    started, mf = time.time(), args.branch == "mf"

    table = {}                                            # (row, calls, compute) -> one distance a seed
    for seed in args.seeds:
        file = lambda name: f"runs/digits/{f'seed{seed}/' if seed else ''}{name}.safetensors"
        rows = train_mf(seed, file, args.scratch) if mf else train_cm(seed, file, args.intervals)
        for name, path, cost in rows:
            calls = (16, 1) if name == "teacher" else (1, 2)
            for k, value in zip(calls, scores(path, args.n, calls=calls)):
                table.setdefault((name, k, cost), []).append(value)
        if seed == args.seeds[0]: shown = [path for _, path, _ in rows[:4 if mf else 3]]

    if args.export:
        export(shown[0], "data/digits_teacher.safetensors")
        export(shown[1], "data/digits_cmt.safetensors")

    floor, picture = halves(), "runs/digits/demo_mf.png" if mf else "runs/digits/demo.png"
    calls = [(0, 16), (0, 1), (1, 1), (2, 1), (2, 2)] + ([(3, 1)] if mf else [])
    command("sample", *(f"{shown[i]}:{k}" for i, k in calls), "--real", "--labels", "balanced", "--n", 20,
            "--out", picture)

    print(f"\nFD-pixels of {args.n:,} samples against the 1,797 real digits, {len(args.seeds)} training "
          "seed(s)\n\n| | NFE | compute after the teacher, M forwards | FD-pixels | median | each seed |"
          f"\n|---|---|---|---|---|---|"
          f"\n| real, one half against the other | | | {floor:.3f} | | |")
    for (name, calls, cost), values in table.items():
        line, each = spread(values), " ".join(f"{value:.3f}" for value in values)
        line += f" | {statistics.median(values):.3f} | {each}" if len(values) > 1 else " | |"
        print(f"| {name} | {calls} | {cost / 1e6:.2f} | {line} |")
    print(f"\nThe picture is {picture}. {time.time() - started:.0f} s.")


if __name__ == "__main__":
    main()
