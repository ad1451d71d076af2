"""Evaluation: the Frechet distance between two sets of images.

  reads   FILE ...: NAME of prepared data; images as .npz (arr_0 uint8 NHWC), .zip or folder; or FILE[:STEPS],
          a checkpoint
          --ref: NAME of prepared data, images, or statistics (an .npz with mu and sigma, or EDM2's .pkl)
  prints  for each FILE one line, and then the same as JSON
  writes  with --save-stats X.npz the statistics of FILE, mu and sigma in EDM's layout, for a later --ref
  run     torchrun --nproc_per_node=8 fid.py runs/cifar10/posttrain_cm.safetensors:2    # 50,000 samples
          python fid.py runs/digits/midtrain_cm.safetensors:1 --n 10000 --features pixels
          python fid.py runs/digits/samples.npz --ref digits --features pixels         # images that exist
  expect  digits, FD-pixels of 10,000 samples: teacher 0.09, after mid-training 0.16, teacher in one step 3.7

`--features inception` is the published FID (1706.08500): Inception-v3 with TensorFlow's weights of 2015,
images resized to 299x299 by TensorFlow 1's bilinear filter (torch-fidelity's convention), fp32 features,
float64 statistics. The weights are one file to download. The result is named after the number of samples, for
example FID-10k, because FID is biased upwards for few samples. (torchrun takes --n for one of its own flags:
use --seeds.)

`--features pixels` compares raw images in [-1, 1] of at most 3,072 values. The result is called FD-pixels; it
is not FID. It is for images that are too small for Inception.
"""
import argparse, hashlib, json, os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import model, sample
from tools import feature_networks


# === the method =============================================================================================

def frechet_distance(mu_a, cov_a, mu_b, cov_b):
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two Gaussians, A = cov_a, B = cov_b (1706.08500, eq. 6).
    mu (d,), cov (d,d) symmetric -> 0-dim float64. Other shapes raise ValueError. With A = R R^T,
    tr (A B)^(1/2) = tr (R^T B R)^(1/2): one symmetric eigenproblem, or two if A is singular."""
    mu_a, cov_a, mu_b, cov_b = (torch.as_tensor(m).double() for m in (mu_a, cov_a, mu_b, cov_b))
    mu_a, mu_b = mu_a.flatten(), mu_b.flatten()
    if not cov_a.shape == cov_b.shape == (len(mu_a), len(mu_a)) == (len(mu_b), len(mu_b)):
        shapes = [tuple(m.shape) for m in (mu_a, cov_a, mu_b, cov_b)]
        raise ValueError(f"shapes are {shapes}, not (d), (d,d), (d), (d,d)")
    root, singular = torch.linalg.cholesky_ex(cov_a)
    if singular:
        values, vectors = torch.linalg.eigh(cov_a)
        root = vectors * values.clamp(min=0).sqrt()
    cross = torch.linalg.eigvalsh(root.T @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (mu_a - mu_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return distance.clamp(min=0)                           # rounding error of equal Gaussians


def sums(batches):
    """Batches of features (n, d) -> number of rows, sum (d,) and sum of x x^T (d,d), in float64; 0, 0, 0 if
    there are none"""
    n, total, sum_outer = 0, 0, 0
    for x in batches:
        x = x.double()
        n, total, sum_outer = n + len(x), total + x.sum(0), sum_outer + x.T @ x
    return n, total, sum_outer


def moments(n, total, sum_outer):
    """The output of `sums`, n >= 2 -> mean (d,), unbiased covariance (d,d)"""
    mu = total / n
    cov = (sum_outer - n * torch.outer(mu, mu)) / (n - 1)
    cov.diagonal().clamp_(min=0)                           # rounding can make a variance negative
    return mu, cov


# === the run ================================================================================================

def pixels(images):
    """uint8 (n,H,W,C) -> (n, HWC) in [-1, 1]"""
    x = model.to_float(torch.as_tensor(images)).flatten(1)
    if x.shape[1] > 3072:
        raise model.UserError(f"--features pixels is for small images (at most 3,072 values), not for "
                              f"{x.shape[1]:,}.")
    return x


def read_images(path, rank, world):
    """Yield this rank's share of the images of an .npz, folder or .zip as uint8 (n,H,W,C). Mirrored
    copies, which prepare_data.py --flip adds after each image, are left out."""
    if path.endswith(".npz"):
        data = model.Data(path)
        if data.latents:
            raise model.UserError(f"{path} holds latents; a Frechet distance compares images or their "
                                  "statistics.")
        originals = torch.arange(0, len(data), 2 if model.read_info(path)[1].get("flip") else 1)
        for indices in originals.split(64)[rank::world]: yield data.array[indices.numpy()]
    else:
        from tools import prepare_data
        yield from prepare_data.image_batches(prepare_data.open_source(path, classes="none"), 64, rank, world)


def prepared_path(text):
    """NAME of prepared data -> data/NAME.npz, even beside a folder NAME; other text unchanged"""
    return f"data/{text}.npz" if "/" not in text and os.path.exists(f"data/{text}.npz") else text


def is_images(path):
    """An .npz, .zip or folder: images, or in an .npz statistics of images"""
    return path.endswith((".npz", ".zip")) or os.path.isdir(path)


def moments_of_all_ranks(n, total, sum_outer):
    """Add up the output of `sums` of all ranks. -> number, mean, covariance. Raises UserError for fewer than
    two images."""
    if dist.is_initialized():
        sums_of_ranks = [None] * dist.get_world_size()
        own_sums = n, torch.as_tensor(total).cpu(), torch.as_tensor(sum_outer).cpu()
        dist.all_gather_object(sums_of_ranks, own_sums)    # a rank without images has zeros
        n, total, sum_outer = map(sum, zip(*sums_of_ranks))
    if n < 2: raise model.UserError(f"a distance needs at least two images on each side, not {n}.")
    return n, *moments(n, total, sum_outer)


def read_statistics(path):
    """mu and sigma of an .npz in EDM's or ADM's layout, or of EDM2's .pkl -> mean (d,), covariance (d,d),
    both float64; None if the .npz has neither. Raises UserError."""
    try:
        if path.endswith(".pkl"):
            from tools import prepare_data
            with open(path, "rb") as f: found = prepare_data.ArrayUnpickler(f).load()
            found = found.get("fid", found)
        else:
            with np.load(path, allow_pickle=False) as f: found = {k: f[k] for k in ("mu", "sigma") if k in f}
        if not found and path.endswith(".npz"): return None          # it holds images
        mu, sigma = (torch.from_numpy(np.asarray(found[k], np.float64)) for k in ("mu", "sigma"))
    except Exception as e:
        raise model.UserError(f"{path} is damaged, or no mu and sigma are in it ({type(e).__name__}: {e}).")
    mu = mu.flatten()
    if sigma.shape != (len(mu), len(mu)):
        raise model.UserError(f"{path}: mu is {tuple(mu.shape)} and sigma {tuple(sigma.shape)}; sigma has to "
                              "be the covariance matrix of mu.")
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise model.UserError(f"{path} has values that are not finite; compute the statistics again.")
    return mu, sigma


def save_statistics(path, n, mu, cov):
    """Write number, mean (d,) and covariance (d,d) as an .npz in EDM's layout."""
    with model.atomic_write(path) as part, open(part, "wb") as f:
        np.savez(f, n=n, mu=mu.cpu().numpy(), sigma=cov.cpu().numpy())


def reference(args, header, features, rank, world):
    """The statistics of --ref, or of the data that the checkpoint was trained on -> path, number of images
    (None for a file of statistics), mean, covariance. Those of the images of an .npz are cached in
    runs/reference/, in a file named by a hash of the images' identity and the feature network; from there
    only rank 0 reads them, and the other ranks get None."""
    path = args.ref or header["data_path"]
    if not path: raise model.UserError("the checkpoint does not say what it was trained on; give --ref.")
    if Path(path).suffix.lower() in (".png", ".jpg", ".jpeg"):
        raise model.UserError(f"--ref {path} is one image; give its folder.")
    path = prepared_path(path)
    if not is_images(path) and not path.endswith(".pkl"): path = model.find_data(path, "--ref")[2]
    if not os.path.exists(path):
        raise model.UserError(f"{path} does not exist; --ref names the images to compare with.")
    cache = None
    if path.endswith((".npz", ".pkl")) and (found := read_statistics(path)): return path, None, *found
    if path.endswith(".npz"):
        identity = model.data_identity(path)
        trained_on = None if args.ref else header.get("data_identity")
        if trained_on and trained_on != identity:
            model.say(f"warning: the checkpoint was trained on other data than {path} ({trained_on}).")
        network = model.sha256(args.inception) if args.features == "inception" else "pixels"
        key = hashlib.sha256(f"{identity} {network}".encode()).hexdigest()[:16]
        cache = Path(f"runs/reference/{key}.npz")
    is_cached = [cache and sample.is_whole_npz(cache)]
    if dist.is_initialized(): dist.broadcast_object_list(is_cached, device="cpu")          # rank 0 decides
    if not is_cached[0]:
        n, mu, cov = moments_of_all_ranks(*sums(features(x) for x in read_images(path, rank, world)))
        if cache and rank == 0:
            try: save_statistics(cache, n, mu, cov)        # also over a damaged file
            except model.UserError as e: model.say(f"{path}: its statistics are not cached ({e})")
        return path, n, mu, cov
    if rank: return None
    with np.load(cache) as f: n, mu, cov = (torch.from_numpy(f[k]) for k in ("n", "mu", "sigma"))
    return path, int(n), mu, cov


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=model.Help, allow_abbrev=False)
    p.add_argument("files", nargs="+", metavar="FILE[:STEPS]",
                   help="images, the NAME of prepared data, or checkpoints")
    p.add_argument("--ref", metavar="NAME|PATH",
                   help="what to compare with: data/NAME.npz, an .npz, .pkl or .zip, or a folder, such as "
                        "NAME/ (default: the data the checkpoint was trained on)")
    p.add_argument("--features", choices=["inception", "pixels"], default="inception",
                   help="FID, or FD-pixels")
    p.add_argument("--inception", default=f"data/{feature_networks.INCEPTION}", metavar="FILE",
                   help="weights of Inception-v3")
    p.add_argument("--save-stats", metavar="X.npz", help="write mu and sigma of FILE, in EDM's layout")
    p.add_argument("--n", type=model.positive_int, default=50_000, help="images to draw from a checkpoint")
    sample.sampling_flags(p)
    args = p.parse_args()
    if path := args.save_stats:
        if len(args.files) > 1 or not path.endswith(".npz") or not model.can_write(path):
            raise model.UserError("--save-stats needs one FILE, and the name of an .npz in a folder that can "
                                  "be written.")
        if args.ref and os.path.realpath(path) == os.path.realpath(args.ref):
            raise model.UserError(f"--save-stats {path} is the file that is read for --ref.")
        if os.path.exists(path) and set(sample.zip_members(path)) != {"n.npy", "mu.npy", "sigma.npy"}:
            raise model.UserError(f"{path} exists and holds no statistics of this script; choose another "
                                  "--save-stats.")
    if args.features == "pixels": model.reject_if_typed("--inception", because="--features is pixels")
    args.files = [prepared_path(file) for file in args.files]
    if any(map(is_images, args.files)) and not (args.ref or args.save_stats):
        raise model.UserError("--ref is missing; name the data, images or statistics to compare with.")
    if all(is_images(file) for file in args.files):
        model.reject_if_typed("--n", "--seeds", "--labels", "--mid-t", "--vae", "--guidance",
                              "--guide", "--solver", "--precision",
                              because="FILE is a set of images, not a checkpoint")
    if args.seeds: model.reject_if_typed("--n", because="--seeds says which images to draw")
    rank, world, device, _ = model.setup(precision=args.precision, timeout=sample.PATIENCE)
    features = pixels
    if args.features == "inception":
        features = feature_networks.load_inception(args.inception).to(device)
    for file in args.files: evaluate(file, args, features, rank, world, device)


@torch.no_grad()
def evaluate(file, args, features, rank, world, device):
    """Print a line about FILE[:STEPS], and one of JSON."""
    header = None
    if is_images(file):
        members = sample.zip_members(file)                 # ADM's reference batches hold both
        if "mu.npy" in members and "arr_0.npy" not in members:
            raise model.UserError(f"{file} holds statistics, not images; give it as --ref.")
        batches, details = read_images(file, rank, world), {"file": file}
    else:
        net, header, steps, solver, args = sample.open_model(file, args, device)
        if "latents" in header and not args.ref and not args.save_stats:
            raise model.UserError(f"{file} was trained on latents, and a Frechet distance is between images; "
                                  "give --ref, images or their statistics.")
        vae, seeds = sample.open_vae(header, args.vae, device), args.seeds or range(args.n)
        drawn = sample.generate(net, header, seeds, steps, args.labels, args.mid_t, vae, device, rank, world,
                                solver)
        batches = (images for images, _ in drawn)
        nfe = sample.count_nfe(header, steps, solver, args.guidance)
        details = {"file": file, "step": header["step"], "nfe": nfe,
                   "seeds": f"{seeds.start}-{seeds.stop - 1}", "labels": args.labels, "solver": solver,
                   "guidance": None if args.guidance == 1 else args.guidance, "guide": args.guide,
                   "mid_t": args.mid_t, "precision": args.precision}
        details = {k: v for k, v in details.items() if v is not None}
        if args.labels.isdecimal() and rank == 0:
            print(f"note: samples of class {args.labels} only; --ref should have images of that class only")
        batches = sample.progress(batches, len(seeds), world)
    ref_statistics = None
    if args.ref or not args.save_stats:
        ref_statistics = reference(args, header, features, rank, world)
    n, mu, cov = moments_of_all_ranks(*sums(features(x) for x in batches))
    if rank: return
    if ref_statistics:
        ref, n_ref, mu_ref, cov_ref = ref_statistics
        if mu.shape != mu_ref.shape:
            raise model.UserError(f"{ref} has {len(mu_ref):,} features, {file} has {len(mu):,}; the "
                                  "reference has to be of the same features and, for pixels, of the same "
                                  "size.")
        distance = frechet_distance(mu.cpu(), cov.cpu(), mu_ref.cpu(), cov_ref.cpu()).item()
        key, name = ("fid", f"FID-{n / 1000:g}k") if args.features == "inception" else ("fd", "FD-pixels")
        if key == "fid": details |= {"features": "Inception-v3 of 2015", "resize": "TF1 bilinear, 299x299"}
        print(f"{name} {distance:.4f}  {n:,} images against {f'the {n_ref:,} of ' if n_ref else ''}{ref}  "
              + "  ".join(f"{k} {v}" for k, v in details.items()))
        print(json.dumps({key: distance, "name": name, "n": n, "ref": ref, "n_ref": n_ref} | details),
              flush=True)
    if args.save_stats:
        save_statistics(args.save_stats, n, mu, cov)
        print(f"statistics of {n:,} images of {file} in {args.save_stats}")


if __name__ == "__main__":
    model.run(main)
