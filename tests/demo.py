"""`make demo`: every stage on the embedded digits by its real command line, then one table and one picture.

`make compare` is the same with several training seeds and several doubling intervals for the baseline, plain
ECT from the diffusion teacher, which gets the total compute of mid- and post-training together, and of whose
intervals the best counts. Both continue where they were interrupted. Compute is counted in network forwards
per sample, a backward as two.
"""
import argparse, json, statistics, subprocess, sys, time

import numpy as np

def command(script, *args):
    line = [sys.executable, f"{script}.py", *map(str, args)]
    print("$ python " + " ".join(line[1:]), flush=True)
    started = time.time()
    lines = []
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        for text in process.stdout:
            lines.append(text)
            if script != "fid": print("  " + text, end="", flush=True)
    if process.returncode: sys.exit(process.returncode)
    if script != "fid": print(f"  {time.time() - started:.0f} s", flush=True)
    return lines


def fd(file, n, ref="digits"):
    return json.loads(command("fid", file, "--ref", ref, "--n", n, "--features", "pixels")[-1])["fd"]


def halves():
    """FD-pixels of one random half of the real digits against the other."""
    with np.load("data/digits.npz") as f: images = np.random.default_rng(0).permutation(f["arr_0"])
    paths = [f"runs/digits/half{i}.npz" for i in (0, 1)]
    for path, half in zip(paths, np.array_split(images, 2)): np.savez(path, arr_0=half)
    return fd(paths[0], 2, ref=paths[1])


def train(seed, intervals):
    """One chain and its baselines -> their files, and the training compute of each in million forwards."""
    folder = "runs/digits" if seed == 0 else f"runs/digits/seed{seed}"
    file = lambda name: f"{folder}/{name}.safetensors"
    pre, mid, post = file("pretrain"), file("midtrain_cm"), file("posttrain_cm")
    command("pretrain", "--seed", seed, "--out", pre)
    if seed == 0: command("solve", "--n", 16)
    command("midtrain", "--seed", seed, "--teacher", pre, "--init", pre, "--out", mid)
    command("posttrain_cm", "--seed", seed, "--init", mid, "--out", post)

    header = {name: read_header(path) for name, path in [("mid", mid), ("post", post)]}
    cost = {"mid": 4 * header["mid"]["pairs"],            # teacher 1, student forward 1, backward 2
            "post": 4 * header["post"]["images"]}         # target 1, forward 1, backward 2
    steps = (cost["mid"] + cost["post"]) // 4 // header["post"]["settings"]["batch"]
    ect = {k: file(f"ect_{k}") for k in intervals}
    for k in intervals:
        command("posttrain_cm", "--seed", seed, "--init", pre, "--q", 2, "--double", k, "--steps", steps,
                "--out", ect[k])
    return ({"pre": pre, "mid": mid, "post": post, "ect": ect},
            cost["mid"] / 1e6, (cost["mid"] + cost["post"]) / 1e6)


def read_header(path):
    from safetensors import safe_open
    with safe_open(path, "pt") as f: return json.loads(f.metadata()["config"])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=1, help="training seeds")
    p.add_argument("--n", type=int, default=2500, help="samples to judge a model by")
    p.add_argument("--intervals", type=int, nargs="+", default=[125],
                   help="steps between two doublings of plain ECT")
    args = p.parse_args()
    started = time.time()

    table = {}                                            # (row, calls, compute) -> one distance a seed
    for seed in range(args.seeds):
        files, mid_cost, total = train(seed, args.intervals)
        rows = [("teacher", files["pre"], (16, 1), 0), ("after mid-training", files["mid"], (1, 2), mid_cost),
                ("after post-training", files["post"], (1, 2), total)]
        rows += [(f"plain ECT, doubling every {k}", path, (1, 2), total) for k, path in files["ect"].items()]
        for name, path, all_calls, cost in rows:
            for calls in all_calls:
                table.setdefault((name, calls, cost), []).append(fd(f"{path}:{calls}", args.n))

    floor = halves()
    command("sample", "runs/digits/pretrain.safetensors:16", "runs/digits/pretrain.safetensors:1",
            "runs/digits/midtrain_cm.safetensors:1", "runs/digits/posttrain_cm.safetensors:1",
            "runs/digits/posttrain_cm.safetensors:2", "--real", "--labels", "balanced", "--n", 20,
            "--out", "runs/digits/demo.npz")

    print(f"\nFD-pixels of {args.n:,} samples against the 1,797 real digits, {args.seeds} training seed(s)"
          f"\n\n| | network calls | training compute after the teacher, M forwards | FD-pixels |"
          f"\n|---|---|---|---|"
          f"\n| real, one half against the other | | | {floor:.3f} |")
    for (name, calls, cost), values in table.items():
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        print(f"| {name} | {calls} | {cost:.2f} | {statistics.mean(values):.3f}{spread} |")
    print(f"\nThe picture is runs/digits/demo.png. {time.time() - started:.0f} s.")


if __name__ == "__main__":
    main()
