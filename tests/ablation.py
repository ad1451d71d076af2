"""`make ablation`: what each choice of the consistency branch is worth, on digits, one at a time.

Every row is the recipe with one thing changed: mid-training, then post-training, then FD-pixels of 10,000
samples in one and two steps after either. All start from one diffusion model, and train once for each seed.
Compute is counted as in demo.py. Continues where it was interrupted; the table goes to docs/ablation.md.
"""
import json, statistics, sys, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
from demo import command, distances

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


def scores(path):
    """FD-pixels in one and in two steps, remembered beside the file."""
    memory = path.with_suffix(".json")
    if not memory.exists(): memory.write_text(json.dumps(distances([f"{path}:1", f"{path}:2"], N)))
    return json.loads(memory.read_text())


def train(script, out, *flags):
    command(script, *flags, "--out", out)
    return model.read(out)[1]


def name_of(*flags):
    return "_".join(str(f).strip("-") for f in flags) or "recipe"


def chain(mid_flags, post_flags, seed):
    """-> (compute, distances) after mid- and after post-training"""
    mid = FOLDER / f"mid_{name_of(*mid_flags)}_{seed}.safetensors"
    post = FOLDER / f"post_{name_of(*mid_flags, *post_flags)}_{seed}.safetensors"
    header = train("midtrain", mid, "--teacher", TEACHER, "--init", TEACHER, "--seed", seed, *mid_flags)
    settings = header["settings"]
    calls = settings["nfe"] * (1 if settings["guidance"] == 1 else 2)
    cost = (3 + calls / (settings["nfe"] if settings["pairing"] == "cmt" else 1)) * header["pairs"]
    header = train("posttrain_cm", post, "--init", mid, "--teacher", TEACHER, "--seed", seed, *post_flags)
    ecd = 2 if header["settings"]["loss"] == "ecd" else 0
    return (cost, scores(mid)), (cost + (4 + ecd) * header["images"], scores(post))


def plain_ect(steps, seed):
    """Without mid-training: ECT on its doubling schedule, from the diffusion weights."""
    out = FOLDER / f"ect_{seed}.safetensors"
    header = train("posttrain_cm", out, "--init", TEACHER, "--q", 2, "--double", 125, "--lr", 3e-4,
                   "--steps", steps, "--seed", seed)
    return 4 * header["images"], scores(out)


def scratch(images, seed):
    """Without diffusion: MeanFlow from scratch on `images` images, its JVP for a quarter of them."""
    out = FOLDER / f"meanflow_{seed}.safetensors"
    header = train("posttrain_mf", out, "--init", "none", "--lr", 1e-3, "--steps", round(images / 64),
                   "--seed", seed)
    return (3 + 2 / 4) * header["images"], scores(out)


def cell(values):
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def line(name, stages):
    """stages: for mid- and post-training (None: there is none) a list of (compute, distances), one a seed"""
    cells = []
    for runs in stages:
        cells += ["", "", ""] if runs is None else [f"{runs[0][0] / 1e6:.2f}"] + [
            cell([scores[k] for _, scores in runs]) for k in (0, 1)]
    return f"| {name} | {' | '.join(cells)} |"


def main():
    started = time.time()
    pretraining = 3 * train("pretrain", TEACHER)["images"]
    lines = []
    for name, mid, post, seeds in ROWS:
        runs = [chain(mid, post, seed) for seed in range(seeds)]
        lines.append(line(name, zip(*runs)))
        if not lines[1:]:
            steps = round(runs[0][1][0] / 4 / 64)
            lines.append(line("no mid-training", (None, [plain_ect(steps, seed) for seed in range(seeds)])))
            total = pretraining + runs[0][1][0]
    cost, found = scratch(total / 3.5, 0)
    lines.append(line("MeanFlow from scratch", (None, [(cost - pretraining, found)])))
    table = "\n".join([
        "| | mid-training: compute | 1 step | 2 steps | post-training: compute | 1 step | 2 steps |",
        "|---|---|---|---|---|---|---|", *lines])
    Path("docs/ablation.md").write_text(
        f"FD-pixels of {N:,} samples of digits; compute in million network forwards after the teacher, in "
        f"all. `make ablation`.\n\n{table}\n")
    print(f"\n{table}\n\n{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
