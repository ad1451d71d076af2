"""`make curves`: quality against compute, with mid-training and without, over three training seeds.

Each point is a finished run of its own length: the whole chain at a quarter, half and all of its recipe, and
post-training from the diffusion weights at half and all of that compute, and for the first case at twice.
common.py says how compute is counted, after the teacher. `python experiments/curves.py digits cm` draws one
figure, docs/curves_DATA_BRANCH.png, in an hour or two. An interrupted run continues.
"""
import math, statistics, sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import midtrain, model, posttrain_cm, posttrain_mf, pretrain
from common import command, compute, scores, steps_for
from precision import shapes

SEEDS, N = 3, 5_000
SHAPES = "runs/curves/shapes.npz"                          # 16x16 RGB, made up
DIGITS = {branch: [recipes["digits"]["steps"] for recipes in stages] for branch, stages in {
    "cm": (pretrain.RECIPES["edm"], midtrain.RECIPES["cm"], posttrain_cm.RECIPES),
    "mf": (pretrain.RECIPES["flow"], midtrain.RECIPES["mf"], posttrain_mf.RECIPES)}.items()}
# steps of pre-, mid- and post-training; flags of all stages, of mid-, of post-training and of the baseline;
# the baseline's compute, in that of the whole chain.
CASES = {("digits", "cm"): (DIGITS["cm"], [], [], [], ["--q", 2, "--lr", 3e-4], (0.5, 1, 2)),
         ("digits", "mf"): (DIGITS["mf"], [], [], [], ["--lr", 6e-4], (0.5, 1)),
         ("shapes", "cm"): ((5000, 600, 300), ["--data", SHAPES, "--batch", 32], ["--lr", 3e-3],
                            ["--lr", 3e-5],
                            ["--q", 2, "--lr", 3e-4], (0.5, 1))}


def points(data, branch, seed):
    """-> {"with mid-training" | "without": [(compute, distance in one step, in two), ...]}"""
    (pre_steps, mid_steps, post_steps), flags, of_mid, of_post, of_base, base_compute = CASES[data, branch]
    file = lambda name: f"runs/curves/{data}_{branch}_{seed}/{name}.safetensors"
    ref, post = SHAPES if data == "shapes" else data, f"posttrain_{branch}"
    flow, target = (["--objective", "flow"], ["--target", "mf"]) if branch == "mf" else ([], [])
    # shapes: one teacher for all seeds, it takes longest
    pre, its_seed = ("runs/curves/shapes.safetensors", 0) if data == "shapes" else (file("pre"), seed)
    command("pretrain", *flow, *flags, "--seed", its_seed, "--steps", pre_steps, "--out", pre)
    flags = [*flags, "--seed", seed]
    found = {"with mid-training": [], "without": []}
    for part in (4, 2, 1):
        mid, out = file(f"mid_{part}"), file(f"post_{part}")
        command("midtrain", *target, *flags, *of_mid, "--teacher", pre, "--steps", mid_steps // part,
                "--out", mid)
        command(post, *flags, *of_post, "--init", mid, "--out", out, "--steps", post_steps // part)
        total, like = compute(mid) + compute(out), out
        found["with mid-training"].append((total, *scores(out, N, ref)))
    for times in base_compute:
        out, steps = file(f"base_{times}"), steps_for(times * total, like)
        double = ["--double", round(steps / 12)] if branch == "cm" else []              # as in common.py
        command(post, *flags, *of_base, *double, "--init", pre, "--steps", steps, "--out", out)
        found["without"].append((times * total, *scores(out, N, ref)))
    return found


def reach(line, level):
    """Compute at which a line of (compute, distance) first comes down to `level`, straight between its points
    in logarithms -> compute, and whether that is only a bound, the line beginning below"""
    for (c0, d0), (c1, d1) in zip(line, line[1:]):
        if d0 > level >= d1: return c0 * (c1 / c0) ** (math.log(d0 / level) / math.log(d0 / d1)), False
    return line[0][0], True


def speed_up(with_mid, without):
    """Lines of (compute, distance) -> in words, how much compute mid-training saves where both lines are at
    the best distance that both reach"""
    level = max(min(d for _, d in line) for line in (with_mid, without))
    (a, early), (b, late) = reach(with_mid, level), reach(without, level)
    bound = {(False, False): "", (True, False): "at least ", (False, True): "at most "}.get((early, late))
    if bound is None: return f"both below {level:.3f} with the least compute measured"
    return f"without mid-training {bound}{b / a:.2f} times the compute, for a distance of {level:.3f}"


def main():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator
    cases = [tuple(sys.argv[1:3])] if sys.argv[1:] else list(CASES)
    if not Path(SHAPES).exists():
        Path(SHAPES).parent.mkdir(parents=True, exist_ok=True)
        np.savez(SHAPES, arr_0=model.to_uint8(shapes(4096, 16)).movedim(1, -1).numpy())
    for data, branch in cases:
        seeds = [points(data, branch, seed) for seed in range(SEEDS)]
        curves = {name: [tuple(statistics.geometric_mean(v) for v in zip(*runs))
                         for runs in zip(*(found[name] for found in seeds))] for name in seeds[0]}
        figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
        for k, axes in enumerate(panels, 1):
            for name, colour in (("with mid-training", "tab:blue"), ("without", "tab:orange")):
                for found in seeds:
                    axes.loglog([p[0] / 1e6 for p in found[name]], [p[k] for p in found[name]], ".",
                                color=colour, alpha=0.5)
                axes.loglog([p[0] / 1e6 for p in curves[name]], [p[k] for p in curves[name]],
                            color=colour, label=name)
            title = f"{k} step{'s' * (k > 1)}"
            axes.set(xlabel="million network forwards", title=title)
            at = sorted({p[0] / 1e6 for curve in curves.values() for p in curve})
            axes.set_xticks(at, [f"{x:.2f}" for x in at])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            for axis in (axes.xaxis, axes.yaxis): axis.set_minor_locator(NullLocator())
            lines = [[(p[0], p[k]) for p in curve] for curve in curves.values()]
            print(f"{data}, {branch}, {title}: {speed_up(*lines)}")
        panels[0].set(ylabel="FD-pixels")
        panels[0].legend()
        figure.suptitle(f"{data}, {'Mean Flow' if branch == 'mf' else 'consistency model'}")
        figure.savefig(f"docs/curves_{data}_{branch}.png", dpi=110)


if __name__ == "__main__":
    main()
