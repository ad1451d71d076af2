"""Evaluation: the Frechet distance between two sets of images.

  reads   FILE ...: images as an .npz (arr_0 uint8 NHWC), or a checkpoint FILE[:STEPS] to sample from;
          --ref: a data set's name, or any .npz, .zip or folder of images
  prints  for each FILE a line, and then the same as JSON
  run     python fid.py runs/digits/midtrain_cm.safetensors:1 --n 10000 --features pixels
  expect  digits, 10,000 samples: teacher 0.09, after mid-training 0.16, one step of the teacher 3.6

`--features pixels` compares the flattened images themselves, scaled to [-1, 1]. That number is called
FD-pixels and is no FID: it serves small images, up to 3,072 values each, for which no Inception network means
anything.
"""
import argparse, json, math

import torch
from einops import rearrange

import model, sample

# === the method =============================================================================================

def frechet_distance(mu_a, cov_a, mu_b, cov_b):
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two Gaussians (1706.08500, eq. 6).
    mu (d,), cov (d,d) -> 0-dim float64. tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2): two symmetric
    eigenproblems, also exact for singular covariances."""
    mu_a, cov_a, mu_b, cov_b = (m.double() for m in (mu_a, cov_a, mu_b, cov_b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                          # A^(1/2)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (mu_a - mu_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross


def statistics(batches):
    """Mean and unbiased covariance of feature batches (n, d), summed in float64. -> n, mu (d,), cov (d,d)"""
    n, total, outer = 0, 0, 0
    for x in batches:
        x = x.double()
        n, total, outer = n + len(x), total + x.sum(0), outer + x.T @ x
    mu = total / n
    return n, mu, (outer - n * torch.outer(mu, mu)) / (n - 1)


# === the run ================================================================================================

def pixels(images):
    """uint8 (n,H,W,C) -> (n, HWC) in [-1, 1]"""
    return rearrange(model.to_float(torch.as_tensor(images)), "n h w c -> n (h w c)")


def read(path, row=None):
    """Yield the images of `path` as uint8 (n,H,W,C). row: of DATASETS, which they have to agree with."""
    images, _ = model.read_images(path, row)
    if math.prod(images.shape) > 3072 or images[0].dtype != torch.uint8:
        raise model.Refused(f"{path} holds {math.prod(images.shape):,} values an image; --features pixels is "
                            "for small images (at most 3,072).")
    for at in torch.arange(len(images)).split(1000):
        yield rearrange(images.batch(at.tolist())[0], "n c h w -> n h w c")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=model.Help, allow_abbrev=False)
    p.add_argument("files", nargs="+", metavar="FILE[:STEPS]", help=".npz of images or checkpoints")
    p.add_argument("--ref", metavar="NAME|PATH",
                   help="what to compare with (default: the data the checkpoint was trained on)")
    p.add_argument("--features", choices=["pixels"], required=True, help="what to compare")
    p.add_argument("--n", type=model.positive, default=50_000, help="images to draw from a checkpoint")
    sample.sampling_flags(p)
    args = p.parse_args()
    device = model.setup(None)[2]
    for file in args.files: evaluate(file, args, device)


def evaluate(file, args, device):
    """Prints a line on FILE[:STEPS], and one of JSON."""
    if file.endswith(".npz"):
        batches, what = read(file), {"file": file}
        if not args.ref:
            raise model.Refused("--ref is missing; name the data set or the .npz to compare with.")
    else:
        net, header, steps = sample.open_model(file, args.steps, device)
        seeds = args.seeds or range(args.n)
        vae = sample.open_vae(header, args.vae, device)
        batches = (x for x, _ in sample.generate(net, header, seeds, steps, args.labels, args.mid_t, vae))
        what = {"file": file, "calls": steps, "seeds": f"{seeds.start}-{seeds.stop - 1}",
                "labels": args.labels}
    name, _, ref = model.find_data(args.ref) if args.ref else (header["data"], None, header["data_path"])
    n_ref, mu_ref, cov_ref = statistics(pixels(x) for x in read(ref, model.DATASETS.get(name)))
    n, mu, cov = statistics(pixels(x) for x in batches)
    if min(n, n_ref) < 2 or mu.shape != mu_ref.shape:
        raise model.Refused(f"{n} images of {len(mu)} values against {n_ref} of {len(mu_ref)}: "
                            "give at least two of each, of one shape.")
    fd = frechet_distance(mu, cov, mu_ref, cov_ref).item()
    print(f"FD-pixels {fd:.4f}  {n:,} images against the {n_ref:,} of {ref}  "
          + "  ".join(f"{k} {v}" for k, v in what.items()))
    print(json.dumps({"fd": fd, "name": "FD-pixels", "n": n, "ref": ref, "n_ref": n_ref} | what), flush=True)


if __name__ == "__main__":
    model.run(main)
