"""`make demo`: every stage on the embedded digits by its real command line, then one table and one picture.
`make demo-mf` is the same for the mean-flow branch.

`make compare` and `make compare-mf` do it with several training seeds and with more baselines. The baselines,
post-training straight from the diffusion weights, get the total compute of mid- and post-training together;
of plain ECT's doubling intervals the best counts. All continue where they were interrupted. Compute is
counted in network forwards per sample, a backward as two, a JVP as two (`make bench` measures it).
"""
import argparse, json, statistics, subprocess, sys, time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model


def command(script, *args):
    line = [sys.executable, f"{script}.py", *map(str, args)]
    print("$ python " + " ".join(line[1:]), flush=True)
    started, lines = time.time(), []
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        for text in process.stdout:
            lines.append(text)
            if script != "fid": print("  " + text, end="", flush=True)
    if process.returncode: sys.exit(process.returncode)
    print(f"  {time.time() - started:.0f} s", flush=True)
    return lines


def distances(files, n, ref="digits"):
    """FD-pixels of each FILE:STEPS."""
    lines = command("fid", *files, "--ref", ref, "--n", n, "--features", "pixels")
    return [json.loads(line)["fd"] for line in lines if line.startswith("{")]


def scores(path, n, ref="digits"):
    """FD-pixels in one step and in two, remembered beside the file."""
    memory = Path(path).with_suffix(".json")
    if not memory.exists(): memory.write_text(json.dumps(distances([f"{path}:1", f"{path}:2"], n, ref)))
    return json.loads(memory.read_text())


def each(header):
    """Network forwards that training on one image or pair takes, the teacher's included."""
    s, stage = header["settings"], header["stage"]
    guided = 2 if s.get("guidance", 1) != 1 else 1
    if stage.startswith("midtrain"):                                 # student forward 1, backward 2
        heun = s["solver"] == "heun"
        calls = s["nfe"] - (heun and header["t_min"] == 0)           # Heun's last step, into 0, is Euler's
        pairs = s["nfe"] // (2 if heun else 1) if s["pairing"] == "cmt" else 1
        return 3 + guided * calls / pairs
    if stage == "posttrain_cm":                                      # target 1, forward 1, backward 2
        return 4 + (s["loss"] == "ecd") * guided * (2 if s["solver"] == "heun" else 1)
    if stage == "posttrain_mf": return 3 + 2 * s["jumps"] / 4        # JVP 2 for the rows with r < t
    return 3


def compute(path):
    """Network forwards of the run that made a file."""
    header = model.read(path, tensors=False)[1]
    return each(header) * header[header["unit"]]


def steps_for(total, like):
    """Steps of a run like the one that made the file `like`, for `total` network forwards."""
    header = model.read(like, tensors=False)[1]
    return round(total / each(header) / header["settings"]["batch"])


def halves():
    """FD-pixels of one random half of the real digits against the other."""
    with np.load("data/digits.npz") as f: images = np.random.default_rng(0).permutation(f["arr_0"])
    paths = [f"runs/digits/half{i}.npz" for i in (0, 1)]
    for path, half in zip(paths, np.array_split(images, 2)): np.savez(path, arr_0=half)
    return distances(paths[:1], 2, ref=paths[1])[0]


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
    command("midtrain", "--target", "mf", "--seed", seed, "--teacher", pre, "--out", mid)
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


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--branch", choices=["cm", "mf"], default="cm", help="consistency or mean flow")
    p.add_argument("--seeds", type=int, default=1, help="training seeds")
    p.add_argument("--n", type=int, default=2500, help="samples to judge a model by")
    p.add_argument("--intervals", type=int, nargs="+", default=[125],
                   help="steps between two doublings of plain ECT")
    p.add_argument("--scratch", action="store_true", help="also MeanFlow from scratch")
    args = p.parse_args()
    started, mf = time.time(), args.branch == "mf"

    table = {}                                            # (row, calls, compute) -> one distance a seed
    for seed in range(args.seeds):
        file = lambda name: f"runs/digits/{f'seed{seed}/' if seed else ''}{name}.safetensors"
        rows = train_mf(seed, file, args.scratch) if mf else train_cm(seed, file, args.intervals)
        cells = [(name, calls, cost, f"{path}:{calls}") for name, path, cost in rows
                 for calls in ((16, 1) if name == "teacher" else (1, 2))]
        for (name, calls, cost, _), value in zip(cells, distances([c[-1] for c in cells], args.n)):
            table.setdefault((name, calls, cost), []).append(value)
        if seed == 0: shown = [path for _, path, _ in rows[:4 if mf else 3]]

    floor, picture = halves(), "runs/digits/demo_mf.npz" if mf else "runs/digits/demo.npz"
    calls = [(0, 16), (0, 1), (1, 1), (2, 1), (2, 2)] + ([(3, 1)] if mf else [])
    command("sample", *(f"{shown[i]}:{k}" for i, k in calls), "--real", "--labels", "balanced", "--n", 20,
            "--out", picture)

    print(f"\nFD-pixels of {args.n:,} samples against the 1,797 real digits, {args.seeds} training seed(s)"
          f"\n\n| | network calls | training compute after the teacher, M forwards | FD-pixels |"
          f"\n|---|---|---|---|"
          f"\n| real, one half against the other | | | {floor:.3f} |")
    for (name, calls, cost), values in table.items():
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        print(f"| {name} | {calls} | {cost / 1e6:.2f} | {statistics.mean(values):.3f}{spread} |")
    print(f"\nThe picture is {Path(picture).with_suffix('.png')}. {time.time() - started:.0f} s.")


if __name__ == "__main__":
    main()
