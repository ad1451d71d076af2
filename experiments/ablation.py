"""`make ablation`: what each choice of the consistency branch is worth, on digits, one at a time.

Each row is the recipe with one change: mid-training, then post-training, then FD-pixels of 10,000 samples in
one and two steps after each. All rows start from the same diffusion model. common.py says how compute is
counted. An interrupted run continues. The table goes to docs/ablation.md.
"""
import time
from pathlib import Path

from common import command, compute, scores, spread, steps_for

FOLDER, N = Path("runs/ablation"), 10_000
TEACHER = FOLDER / "pretrain.safetensors"
#       name                          flags of midtrain                      flags of posttrain_cm     seeds
ROWS = [("the recipe",                [],                                    [],                          3),
        ("pairing kd",                ["--pairing", "kd"],                   [],                          1),
        ("pairing slow",              ["--pairing", "slow"],                 [],                          1),
        ("distance l2",               ["--distance", "l2"],                  [],                          1),
        ("N = 4",                     ["--nfe", 4],                          [],                          1),
        ("N = 8",                     ["--nfe", 8],                          [],                          1),
        ("N = 32",                    ["--nfe", 32],                         [],                          1),
        ("solver of order 1",         ["--solver", "dpm1"],                  [],                          1),
        ("solver of order 2",         ["--solver", "dpm2"],                  [],                          1),
        ("teacher guided, w = 1.5",   ["--guidance", 1.5],                   [],                          1),
        ("q = 16",                    [],                                    ["--q", 16],                 1),
        ("q = 4096",                  [],                                    ["--q", 4096],               1),
        ("ECD",                       [],                                    ["--loss", "ecd"],           1)]


def name_of(*flags):
    return "_".join(str(f).strip("-") for f in flags) or "recipe"


def chain(mid_flags, post_flags, seed):
    """-> (compute, distances) after mid- and after post-training"""
    mid = FOLDER / f"mid_{name_of(*mid_flags)}_{seed}.safetensors"
    post = FOLDER / f"post_{name_of(*mid_flags, *post_flags)}_{seed}.safetensors"
    command("midtrain", "--teacher", TEACHER, "--seed", seed, *mid_flags, "--out", mid)
    teacher = ["--teacher", TEACHER] if "ecd" in post_flags else []
    command("posttrain_cm", "--init", mid, *teacher, "--seed", seed, *post_flags, "--out", post)
    return (compute(mid), scores(mid, N)), (compute(mid) + compute(post), scores(post, N))


def plain_ect(total, seed):
    """Without mid-training: ECT on its doubling schedule, from the diffusion weights, at equal compute."""
    out = FOLDER / f"ect_{seed}.safetensors"
    steps = steps_for(total, FOLDER / "post_recipe_0.safetensors")
    command("posttrain_cm", "--init", TEACHER, "--q", 2, "--double", 125, "--lr", 3e-4, "--steps", steps,
            "--seed", seed, "--out", out)
    return compute(out), scores(out, N)


def scratch(total, seed):
    """Without diffusion: MeanFlow from scratch, its JVP for a quarter of each batch of 64."""
    out = FOLDER / f"meanflow_{seed}.safetensors"
    command("posttrain_mf", "--init", "none", "--lr", 1e-3, "--steps", round(total / 3.5 / 64),
            "--seed", seed, "--out", out)
    return compute(out), scores(out, N)


def line(name, stages):
    """stages: for mid- and post-training (None: there is none) a list of (compute, distances), one a seed"""
    cells = []
    for runs in stages:
        cells += ["", "", ""] if runs is None else [f"{runs[0][0] / 1e6:.2f}"] + [
            spread([scores[k] for _, scores in runs]) for k in (0, 1)]
    return f"| {name} | {' | '.join(cells)} |"


def main():
    started = time.time()
    command("pretrain", "--out", TEACHER)
    lines = []
    for name, mid, post, seeds in ROWS:
        runs = [chain(mid, post, seed) for seed in range(seeds)]
        lines.append(line(name, zip(*runs)))
        if not lines[1:]:
            total = runs[0][1][0]
            lines.append(line("no mid-training", (None, [plain_ect(total, seed) for seed in range(seeds)])))
    cost, found = scratch(total + compute(TEACHER), 0)
    lines.append(line("MeanFlow from scratch, the teacher's compute too",
                      (None, [(cost - compute(TEACHER), found)])))
    table = "\n".join([
        "| | mid-training: compute | 1 step | 2 steps | post-training: compute | 1 step | 2 steps |",
        "|---|---|---|---|---|---|---|", *lines])
    Path("docs/ablation.md").write_text(
        f"FD-pixels of {N:,} samples of digits; compute in million network forwards, summed over stages, "
        f"without the teacher's. `make ablation`.\n\n{table}\n")
    print(f"\n{table}\n\n{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
