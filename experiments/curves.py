"""`make curves`: quality against compute, with mid-training and without, over three training seeds.

Each point is a finished run of its own length: the whole chain at a quarter, half and all of its recipe, and
post-training from the diffusion weights at half and all of that compute, and for ECT also at twice.
common.py counts the compute, without the teacher's. `python experiments/curves.py cm` draws one
figure, docs/curves_digits_BRANCH.png, in an hour or two. An interrupted run continues.
"""
import math, statistics, sys

from common import command, compute, pyplot, scores, steps_for
import midtrain, posttrain_cm, posttrain_mf, pretrain

SEEDS, N = 3, 5_000
DIGITS = {branch: [recipes["digits"]["steps"] for recipes in stages] for branch, stages in {
    "cm": (pretrain.RECIPES["edm"], midtrain.RECIPES["cm"], posttrain_cm.RECIPES),
    "mf": (pretrain.RECIPES["flow"], midtrain.RECIPES["mf"], posttrain_mf.RECIPES)}.items()}
# branch: steps of pre-, mid- and post-training; flags of the baseline; its compute, in that of the chain
CASES = {"cm": (DIGITS["cm"], ["--q", 2, "--lr", 3e-4], (0.5, 1, 2)),
         "mf": (DIGITS["mf"], ["--lr", 6e-4], (0.5, 1))}
INTERVAL = 70 / 1500               # between two halvings of plain ECT's gap, the best of `make compare`


def points(branch, seed):
    """-> {"with mid-training" | "without": [(compute, distance in one step, in two), ...]}"""
    (pre_steps, mid_steps, post_steps), of_base, base_compute = CASES[branch]
    file = lambda name: f"runs/curves/digits_{branch}_{seed}/{name}.safetensors"
    flow, mid_flags = (["--objective", "flow"], ["--branch", "mf"]) if branch == "mf" else ([], [])
    pre, post, flags = file("pre"), f"posttrain_{branch}", ["--seed", seed]
    command("pretrain", *flow, *flags, "--steps", pre_steps, "--out", pre)
    found = {"with mid-training": [], "without": []}
    for part in (4, 2, 1):
        mid, out = file(f"mid_{part}"), file(f"post_{part}")
        command("midtrain", *mid_flags, *flags, "--teacher", pre, "--steps", mid_steps // part, "--out", mid)
        command(post, *flags, "--init", mid, "--out", out, "--steps", post_steps // part)
        total, like = compute(mid) + compute(out), out
        found["with mid-training"].append((total, *scores(out, N)))
    for times in base_compute:
        out, steps = file(f"base_{times}"), steps_for(times * total, like)
        double = ["--double", round(INTERVAL * steps)] if branch == "cm" else []
        command(post, *flags, *of_base, *double, "--init", pre, "--steps", steps, "--out", out)
        found["without"].append((times * total, *scores(out, N)))
    return found


def reach(line, level):
    """Compute at which a line of (compute, distance) first falls to `level`, by log-log interpolation
    -> compute, and whether it is only an upper bound, because the line starts below"""
    if line[0][1] <= level: return line[0][0], line[0][1] < level
    for (c0, d0), (c1, d1) in zip(line, line[1:]):
        if d1 <= level: return c0 * (c1 / c0) ** (math.log(d0 / level) / math.log(d0 / d1)), False


def compute_ratio(with_mid, without):
    """Lines of (compute, distance) -> the compute without mid-training over that with it, where both lines
    are at the best distance that both reach: "", "at least " or "at most ", the ratio, that distance"""
    level = max(min(d for _, d in line) for line in (with_mid, without))
    (a, early), (b, late) = reach(with_mid, level), reach(without, level)
    bound = "at least " if early else "at most " if late else ""   # not both: one line ends at `level`
    return bound, b / a, level


def speed_up(with_mid, without):
    """`compute_ratio` in words"""
    bound, ratio, level = compute_ratio(with_mid, without)
    return f"without mid-training {bound}{ratio:.2f} times the compute, for a distance of {level:.3f}"


def main():
    plt = pyplot()
    from matplotlib.ticker import LogLocator, NullLocator
    for branch in sys.argv[1:] or CASES:
        seeds = [points(branch, seed) for seed in range(SEEDS)]
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
            print(f"{branch}, {title}: {speed_up(*lines)}")
        panels[0].set(ylabel="FD-pixels")
        panels[0].legend()
        figure.suptitle(f"digits, {'Mean Flow' if branch == 'mf' else 'consistency model'}")
        figure.savefig(f"docs/curves_digits_{branch}.png", dpi=110)


if __name__ == "__main__":
    main()
