"""`python experiments/second_step.py`: does a second sampling step help on digits, and at which time?

For the models of `make compare`, in runs/digits: the Frechet distance of 5,000 samples to the 1,797 real digits, in one
step, and in two for several times of the second. Judged twice: by pixels, and by the 128 features of a small classifier
of the real digits. The last column is the change of what the classifier sees: the share of samples whose class it
recognises as the one that was asked for.
"""
import argparse, statistics
from pathlib import Path

import torch

import common
from common import model
import fid, sample

TIMES = [None, 0.2, 0.35, 0.5, 0.7757, 1.3, 2.0, 4.0]      # of the second step; None: one step


def draw(path, n, mid_t):
    """-> n images uint8 (n,8,8,1), their labels (n,)"""
    net, header = model.load(path)
    steps = 16 if header["stage"] == "pretrain" else 2 if mid_t else 1
    drawn = sample.generate(net, header, range(n), steps, mid_t=[mid_t] if mid_t else None)
    images, labels = zip(*drawn)
    return tuple(torch.cat([torch.as_tensor(x) for x in parts]) for parts in (images, labels))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="+", metavar="NAME=FILE,FILE...", help="a name, and a checkpoint of each seed")
    p.add_argument("--n", type=int, default=5000, help="samples")
    args = p.parse_args()
    data = model.Data("data/digits.npz")
    real, labels = torch.from_numpy(data.array[:].copy()), data.labels
    net = common.classifier("runs/digits/classifier.safetensors", real, labels)
    half = torch.randperm(len(real), generator=torch.Generator().manual_seed(0)).tensor_split(2)
    floor = [f(*(real[i] for i in half)) for f in (lambda a, b: common.distance(fid.pixels(a), fid.pixels(b)),
                                                   lambda a, b: common.distance(*(common.features(net, x) for x in (a, b))))]
    print(f"one half of the real digits against the other: {floor[0]:.3f} by pixels, {floor[1]:.2f} by features")
    print("\n| | second step at t | FD-pixels | FD of features | recognised |\n|---|---|---|---|---|")
    for name, files in (text.split("=") for text in args.files):
        for mid_t in TIMES[:1 if name == "teacher" else None]:
            rows = []
            for path in files.split(","):
                images, y = draw(path, args.n, mid_t)
                rows.append((common.distance(fid.pixels(real), fid.pixels(images)),
                             common.distance(common.features(net, real), common.features(net, images)),
                             100 * common.accuracy(net, images, y)))
            cells = [f"{statistics.mean(c):.{d}f}" + (f" ± {statistics.stdev(c):.{d}f}" if len(c) > 1 else "")
                     for c, d in zip(zip(*rows), (3, 2, 1))]
            print(f"| {name} | {mid_t or ('16 NFE' if name == 'teacher' else 'one step')} | {' | '.join(cells)} % |", flush=True)


if __name__ == "__main__":
    main()
