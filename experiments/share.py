"""`make share`: how much of the compute should go to mid-training? The paper's ablation, small, on digits.

The total is fixed, that of the recipe's mid- and post-training. Of it mid-training gets 0, 2.5, 50 or 75 %,
as in the paper's ablation on CIFAR-10, and post-training the rest. Three seeds, each with its own teacher.
Post-training has the recipe's fixed gap (q = 256, learning rate 1e-4), or the baseline's, halved every 70
steps (q = 2, learning rate 3e-4). With 0 % it has the second, as a small gap needs f(x_r, r) that is
nearly right; with 2.5 % both; with more the first. Neither is tuned here. Teachers and baselines are those of
`make compare`, if they are there. An interrupted run continues.
"""
from common import command, compute, scores, spread, steps_for

SEEDS, N = range(3), 10_000
PAPER = {0: "3.54 / 2.12", 0.025: "3.42 / 2.11", 0.5: "3.30 / 2.04", 0.75: "2.74 / 1.97"}    # CIFAR-10, FID
POSTS = {"fixed": [], "halved": ["--q", 2, "--double", 70, "--lr", 3e-4]}
TRIED = {0: ["halved"], 0.025: ["fixed", "halved"], 0.5: ["fixed"], 0.75: ["fixed"]}


def file(name, seed):
    return f"runs/digits/{f'seed{seed}/' if seed else ''}{name}.safetensors"


def run(share, post, seed):
    """-> the file of the model after post-training"""
    pre, mid, like = file("pretrain", seed), file("midtrain_cm", 0), file("posttrain_cm", 0)
    total, init = compute(mid) + compute(like), pre
    if not share:
        out = file("ect_70", seed)                         # `make compare` has trained it
    else:
        init, out = file(f"share_{share:g}", seed), file(f"share_{share:g}_{post}", seed)
        command("midtrain", "--seed", seed, "--teacher", pre, "--steps", steps_for(share * total, mid),
                "--no-preview", "--out", init)
    command("posttrain_cm", "--seed", seed, "--init", init, *POSTS[post], "--no-preview",
            "--steps", steps_for((1 - share) * total, like), "--out", out)
    return out


def main():
    for seed in SEEDS: command("pretrain", "--seed", seed, "--out", file("pretrain", seed))
    command("midtrain", "--teacher", file("pretrain", 0), "--out", file("midtrain_cm", 0))
    command("posttrain_cm", "--init", file("midtrain_cm", 0), "--out", file("posttrain_cm", 0))
    lines = []
    for share in TRIED:
        for post in TRIED[share]:
            found = zip(*(scores(run(share, post, seed), N) for seed in SEEDS))
            paper = PAPER[share] if post == TRIED[share][0] else ""              # after CMT its gap is fixed
            lines.append(f"| {share:.1%} | {post} | {' | '.join(map(spread, found))} | {paper} |")
    print(f"\nFD-pixels of {N:,} samples of digits, {len(SEEDS)} seeds\n\n"
          "| share of mid-training | gap | 1 step | 2 steps | the paper's FID on CIFAR-10, 1 / 2 steps |\n"
          "|---|---|---|---|---|\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
