"""`python experiments/second_step.py NAME=FILE,FILE...`: does a second sampling step help on digits, when?

For models of `make compare`, one file a seed: the Frechet distance of samples to the 1,797 real digits in one
step, and in two for several times of the second step. Judged twice: by pixels, and by the 128 features of a
small classifier of the real digits. "recognised" is the share of samples that the classifier puts in the
class that was asked for. "change" is the mean over seeds of the difference to one step with the same seed,
and its standard deviation.
"""
import argparse

import torch

import common
from common import model, spread
import fid, sample

TIMES = [0.2, 0.35, 0.5, 0.7757, 1.3, 2.0, 4.0]            # of the second step


def draw(path, n, mid_t):
    """-> n images uint8 (n,8,8,1), their labels (n,)"""
    net, header = model.load(path)
    steps = 16 if header["stage"] == "pretrain" else 2 if mid_t else 1
    drawn = sample.generate(net, header, range(n), steps, mid_t=[mid_t] if mid_t else None)
    images, labels = zip(*drawn)
    return tuple(torch.cat([torch.as_tensor(x) for x in parts]) for parts in (images, labels))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="+", metavar="NAME=FILE,FILE...",
                   help="a name, and a checkpoint of each seed")
    p.add_argument("--n", type=int, default=5000, help="samples")
    p.add_argument("--times", type=float, nargs="*", default=TIMES, help="of the second step")
    args = p.parse_args()
    data = model.Data("data/digits.npz")
    real, labels = torch.from_numpy(data.array[:].copy()), data.labels
    net = common.classifier("data/digits_classifier.safetensors", real, labels)
    def judge(images, reference=real):
        return (common.distance(fid.pixels(reference), fid.pixels(images)),
                common.distance(common.features(net, reference), common.features(net, images)))
    half = torch.randperm(len(real), generator=torch.Generator().manual_seed(0)).tensor_split(2)
    floor = judge(*(real[i] for i in half))
    print("one half of the real digits against the other: {:.3f} by pixels, {:.3f} by features".format(*floor)
          + "\n\n| | second step at t | FD-pixels | change | FD of features | change | recognised, % |\n"
          + "|---" * 7 + "|")
    for name, files in (text.split("=") for text in args.files):
        files, one_step = files.split(","), None
        is_teacher = model.read(files[0], tensors=False)[1]["stage"] == "pretrain"
        for mid_t in [None] if is_teacher else [None, *args.times]:
            found = []
            for path in files:
                images, y = draw(path, args.n, mid_t)
                found.append((*judge(images), 100 * common.accuracy(net, images, y)))
            pixels, features, recognised = zip(*found)
            one_step = one_step or (pixels, features)
            changes = [spread(a - b for a, b in zip(*pair)) if mid_t else ""
                       for pair in zip((pixels, features), one_step)]
            print(f"| {name} | {mid_t or ''} | {spread(pixels)} | {changes[0]} | {spread(features)} | "
                  f"{changes[1]} | {spread(recognised, 1)} |", flush=True)


if __name__ == "__main__":
    main()
