"""Sampling: images from any checkpoint, in one or a few steps, or by solving a teacher's ODE.

  reads   FILE[:STEPS] ...       STEPS: function evaluations (NFE), by default 16 for a pre-trained model,
                                 else 1. For a flow-matching teacher Heun takes STEPS - 1 if STEPS is even
  writes  runs/NAME/samples.npz  of one FILE: arr_0 uint8 (n,H,W,C), arr_1 int64 labels (n,)
          FOLDER/000000.png ...  instead, with --out FOLDER/: one file per image, named by its seed
          runs/NAME/samples.png  one FILE: its first 64 images (with --real 20). Several FILEs: up to 20
                                 images of each, a row per FILE:STEPS, a column per seed
  run     python sample.py data/digits_cmt.safetensors:1 --n 64        # a trained model, ten seconds
          python sample.py runs/digits/posttrain_cm.safetensors:2 --n 10000
          torchrun --nproc_per_node=8 sample.py runs/cifar10/posttrain_cm.safetensors:2 --seeds 0-49999
          python sample.py runs/digits/pretrain.safetensors runs/digits/midtrain_cm.safetensors --n 16 --real
  cost    STEPS forward passes per image, with --guidance twice as many; always whole blocks of 64 images

For a given model, image k, its label and its noise are a function of seed k alone. The last bits of a
convolution depend on the batch size, so seeds are sampled in whole blocks of 64 (block = seed // 64), and
those not asked for are dropped. Any number of processes gives the same images. Images are written in parts of
1,024; the same command continues an interrupted run. (torchrun takes --n for one of its own flags: use
--seeds.)

The best time of the second step depends on the data. On MNIST --mid-t 1.6 gives better samples than the
default of posttrain_cm.py, 0.821 (docs/mnist.md, on one seed).
"""
import argparse, contextlib, hashlib, itertools, json, os, sys, time, zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange

import model, solve

# === the method =============================================================================================

def consistency_sampler(f, eps, times, y):
    """Multistep consistency sampling (2303.01469, algorithm 1, with epsilon = 0): jump to t = 0, add noise of
    the next time, jump again. eps (S,B,C,H,W), one noise per step; times: S descending numbers; y (B,)
    -> (B,C,H,W)"""
    x = torch.zeros_like(eps[0])
    for t, noise in zip(times, eps, strict=True):
        x = f(x + t * noise, x.new_full((len(x),), t), y)
    return x


def geometric_times(steps, t_max, last_t):
    """t_max, then geometrically down to last_t; two steps give [t_max, last_t]. -> list of `steps` numbers"""
    return [t_max * (last_t / t_max) ** (i / max(1, steps - 1)) for i in range(steps)]


def draw_block(block, steps, shape, classes):
    """Labels and noise of the 64 seeds of a block, each from a generator of its own.
    -> labels (64,) int64, noise (steps,64,C,H,W), both on the CPU: every device gets the same numbers"""
    labels, noise = [], []
    for seed in range(64 * block, 64 * block + 64):
        g = torch.Generator().manual_seed(seed)
        labels.append(torch.randint(max(1, classes), (), generator=g))
        noise.append(torch.randn(steps, *shape, generator=g))
    return torch.stack(labels), torch.stack(noise, dim=1)


# === the run ================================================================================================

def step_times(header, steps, mid_t=None):
    """The times of a few-step model: t_max, then the list mid_t. Without mid_t they fall geometrically from
    t_max to header["mid_t"] for a consistency model, uniformly for Mean Flow. -> list of `steps` numbers.
    Raises UserError if mid_t does not fit."""
    if mid_t:
        times = [header["t_max"], *mid_t]
        if len(times) != steps or sorted(set(times), reverse=True) != times or times[-1] <= header["t_min"]:
            raise model.UserError(f"--mid-t {','.join(map(str, mid_t))}: {steps} steps need {steps - 1} "
                                  f"falling times between {header['t_max']:g} and {header['t_min']:g}.")
        return times
    if header["kind"] == "Denoiser": return geometric_times(steps, header["t_max"], header["mid_t"])
    return solve.uniform_times(steps, header["t_max"], header["t_min"])[:-1].tolist()


def open_vae(header, path, device):
    """The autoencoder that decodes a model's latents; None for models of images. Raises UserError."""
    if "latents" not in header:
        model.reject_if_typed("--vae", because="the model makes images, not latents")
        return None
    if not path:
        vae = header["latents"]["vae"] or "the autoencoder that they were made with,"
        raise model.UserError(f"the model makes latents; give --vae, a folder of {vae} in diffusers' format.")
    return load_vae(path, device)


def load_vae(path, device):
    """diffusers' AutoencoderKL in a folder, or of a name on the hub. Raises UserError."""
    try: from diffusers import AutoencoderKL
    except ImportError: raise model.UserError("--vae needs diffusers; `pip install diffusers`.")
    try: return AutoencoderKL.from_pretrained(path).to(device).eval()
    except Exception as e:                                 # diffusers raises anything
        reason = (str(e).strip() or repr(e)).splitlines()[0]
        raise model.UserError(f"--vae {path} is not an autoencoder of diffusers ({reason}); give a folder, "
                              "or a name such as stabilityai/sd-vae-ft-mse.")


def to_images(x, header, vae):
    """Samples of a model (B,C,H,W) -> uint8 (B,H,W,C). Latents x = (z - mean) * scale are decoded to pixels
    in the autoencoder's range. EDM2's pixels in [0, 1] become clamp(0, 1) * 255, truncated. Raises Diverged
    if x is not finite."""
    pixel_range = header["latents"]["pixel_range"] if vae else [-1, 1]
    if vae: x = torch.cat([vae.decode(z[None]).sample for z in model.to_latents(x, header)])  # saves memory
    if not x.isfinite().all():
        raise model.Diverged("the model's samples are not finite: its training diverged, the file is of "
                             "another network, or --guidance is too large.")
    x = (x.clamp(0, 1) * 255).to(torch.uint8) if pixel_range == [0, 1] else model.to_uint8(x)
    return rearrange(x, "b c h w -> b h w c").cpu().numpy()


def draw_samples(net, header, eps, y, steps, times, solver):
    """Noise eps (S,B,C,H,W) -> samples (B,C,H,W): without a solver by consistency sampling at `times`, else
    by the solver, with "jump" at `times`."""
    if not solver: return consistency_sampler(net, eps, times, y)
    grid = torch.tensor([*times, header["t_min"]], dtype=torch.float64) if times else None
    return solve.solve_teacher(net, header, header["t_max"] * eps[0], y, steps, solver, grid)[0][-1]


def generate(net, header, seeds, steps, labels="random", mid_t=None, vae=None, device=None,
             rank=0, world=1, solver=None):
    """Generate images of the range `seeds` in blocks of 64 seeds, in order: blocks rank, rank + world, ...
    net, header as from model.load; net may be a plain function if `device` is given; steps:
    the NFE; labels "random" | "balanced" | a class; mid_t: list of the times of steps 2, 3, ...; vae as from
    open_vae; solver of a teacher's ODE, by default solve.default_solver's. -> iterator over numpy arrays
    (images uint8 (n,H,W,C), labels int64 (n,)). Raises UserError at once, and Diverged for samples that are
    not finite."""
    device, K = device or next(net.parameters()).device, header["network"]["label_dim"]
    consistency, labels = header["stage"] in solve.CONSISTENCY_STAGES, str(labels)
    if consistency and solver:
        raise model.UserError("a consistency model has no ODE to solve; leave out solver.")
    solver = solver or solve.default_solver(header)
    if not isinstance(steps, int) or steps < 1:
        raise model.UserError(f"{steps} steps: at least one step is needed.")
    if solver: solve.check_solver(solver, header["stage"], header)
    if mid_t and (steps == 1 or not consistency and solver != "jump"):
        raise model.UserError("--mid-t has no effect here; it needs two or more steps of a consistency or "
                              "Mean Flow model. Leave it out.")
    if "latents" in header and vae is None:
        raise model.UserError("the model makes latents; pass vae, from open_vae, which decodes them.")
    if seeds.step != 1: raise model.UserError(f"seeds have to be a range of step 1, not {seeds}.")
    times = step_times(header, steps, mid_t) if consistency or solver == "jump" else None
    if labels != "random" and not K:
        raise model.UserError(f"--labels {labels} has no effect: the model has no classes. Leave it out.")
    if labels not in ("random", "balanced") and not (labels.isdecimal() and int(labels) < K):
        raise model.UserError(f"--labels {labels} is neither random, balanced nor one of the {K} classes.")

    @torch.no_grad()
    def sample_block(block):
        y, eps = draw_block(block, steps if consistency else 1, model.image_shape(header), K)
        if labels == "balanced": y = torch.arange(64 * block, 64 * block + 64) % K
        elif labels != "random": y = torch.full((64,), int(labels))
        x = draw_samples(net, header, eps.to(device), y.to(device), steps, times, solver)
        keep = slice(max(seeds.start - 64 * block, 0), min(seeds.stop - 64 * block, 64))
        return to_images(x[keep], header, vae), y.numpy()[keep]
    return map(sample_block, range(seeds.start // 64, (seeds.stop - 1) // 64 + 1)[rank::world])


PATIENCE = timedelta(days=7)                               # a process waits for the slowest one's whole share
# What a picture calls a model, by the first word of its stage.
STAGE_LABELS = {"pretrain": "teacher", "midtrain": "after mid-training", "posttrain": "after post-training"}


def write_preview(ema, header, args):
    """Write NAME.png beside the checkpoint of a training stage: samples of seeds 0 to 15, with 16 NFE for a
    pre-trained model, with 1 and 2 for others. It never ends a run: what goes wrong is printed."""
    picture = model.beside(args.out, ".png")
    labels = "balanced" if header["network"]["label_dim"] else "random"
    try:
        vae = open_vae(header, args.vae, next(ema.parameters()).device)
        solver = solve.default_solver(header)
        calls = [16] if header["stage"].startswith("pretrain") else [1, 2]
        rows = [next(generate(ema, header, range(16), k, labels, vae=vae))[0] for k in calls]
        model.save_grid(picture, rows, [f"{count_nfe(header, k, solver)} NFE" for k in calls])
        model.say(f"samples in {picture}")
    except Exception as e: model.say(f"no preview: {str(e) or type(e).__name__}")


def progress(batches, total, world=1, size=len):
    """Pass batches on. Rank 0 prints rate and time left every ten seconds, extrapolated from its own batches.
    size(batch): how many images a batch has."""
    started = last = time.time()
    done = 0
    for batch in batches:
        yield batch
        done += size(batch) * world
        if model.is_rank_0() and time.time() - last > 10:
            last = time.time()
            rate = done / (last - started)
            print(f"{min(done, total):,} of {total:,} images  {rate:,.0f} images/s  "
                  f"left {max(0, total - done) / rate:,.0f} s", file=sys.stderr, flush=True)


def is_whole_npz(path):
    """Does this .npz exist, and can all of it be read?"""
    try:
        with np.load(path) as f: return all(f[k] is not None for k in f.files)
    except Exception: return False                         # damaged files raise anything


def zip_members(path):
    """The names of the members of a .zip or .npz; [] if it is neither."""
    if not zipfile.is_zipfile(path): return []
    with zipfile.ZipFile(path) as z: return z.namelist()


def check_overwrites(path, seeds):
    """Raise UserError if `path` holds anything but samples. Samples are an .npz outside data/ that has only
    arr_0 and arr_1, or a folder that has only images of these seeds."""
    if path.suffix != ".npz" and path.is_dir():
        foreign = set(os.listdir(path)) - {f"{seed:06d}.png" for seed in seeds}
        if foreign: raise model.UserError(f"{path}/ has other files ({min(foreign)}); choose another --out.")
        return
    if not path.exists(): return
    if set(zip_members(path)) != {"arr_0.npy", "arr_1.npy"} or path.absolute().parent.name == "data":
        raise model.UserError(f"{path} holds other data than samples; choose another --out.")


PART = 1024                                                # images per part, a multiple of 64


def draw_parts(draw, seeds, folder, key, rank, world):
    """Sample the seeds part by part; part k belongs to rank k % world. Parts that an interrupted run with the
    same key left in the folder are not sampled again. -> paths of all parts, in order"""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    bounds = [seeds.start, *range(seeds.start // PART * PART + PART, seeds.stop, PART), seeds.stop]
    parts = [(range(a, b), folder / f"{name}-{a}-{b}.npz") for a, b in itertools.pairwise(bounds)]
    todo = [(part, path) for part, path in parts[rank::world] if not is_whole_npz(path)]
    blocks = ((block, path) for part, path in todo for block in draw(part))
    blocks = progress(blocks, world * sum(len(part) for part, _ in todo), world, lambda b: len(b[0][1]))
    for path, group in itertools.groupby(blocks, lambda b: b[1]):
        images, labels = (np.concatenate(a) for a in zip(*(block for block, _ in group)))
        with model.atomic_write(path) as file, open(file, "wb") as f: np.savez(f, arr_0=images, arr_1=labels)
    return [path for _, path in parts]


def gather_parts(parts, rank, world):
    """Yield every part, in order, on rank 0: part k comes from rank k % world through the process group, so
    the ranks need no common disk. The other ranks send their parts and yield nothing."""
    for k, path in enumerate(parts):
        content = [None, None]
        if rank == k % world:
            try:
                with np.load(path) as f: content = [f["arr_0"], f["arr_1"]]
            except OSError as e:
                raise model.UserError(f"{path} is gone ({type(e).__name__}). Is the same command running "
                                      "elsewhere? Run it again, once.")
            if rank: dist.send_object_list(content, dst=0, device="cpu")
        elif rank == 0:
            dist.recv_object_list(content, src=k % world, device="cpu")
        if rank == 0: yield content


def write_npz(path, shape, dtype, chunks, more_arrays):
    """Stream arrays to arr_0 of an .npz, then add the arrays {name: array} that more_arrays() returns."""
    with model.atomic_write(path) as part, zipfile.ZipFile(part, "w") as z:
        with z.open("arr_0.npy", "w", force_zip64=True) as f:
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(f, header)
            for chunk in chunks: f.write(chunk.tobytes())
        for name, array in more_arrays().items():
            with z.open(f"{name}.npy", "w") as f:
                np.lib.format.write_array(f, np.array(array), allow_pickle=False)


def write_folder(folder, parts, seeds):
    """Write every image of `parts`, arrays of images, as `folder`/SEED.png. Raises UserError."""
    from PIL import Image
    files = [folder / f"{seed:06d}.png" for seed in seeds]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files: file.unlink(missing_ok=True)    # it may be of another model
        for file, image in zip(files, itertools.chain.from_iterable(parts)):
            Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file)
    except OSError as e:
        raise model.UserError(f"{folder}/ could not be written ({e}). Free some space; the same command "
                              "continues.")


def collect(parts, seeds, out, rank, world):
    """Write all parts to `out`, an .npz or a folder, a few in memory at a time, then remove them.
    -> the first 64 images, all labels; (None, None) on other ranks than 0"""
    labels, first = [], []
    def received():
        for images, y in gather_parts(parts, rank, world):
            labels.append(y)
            if len(labels) <= 2: first.append(images[:64].copy())      # the first part may have fewer
            yield images
    images = received()
    if rank:
        for _ in images: pass
    elif out.suffix == ".npz":
        head = next(images)
        write_npz(out, (len(seeds), *head.shape[1:]), np.uint8, itertools.chain([head], images),
                  lambda: {"arr_1": np.concatenate(labels)})
    else: write_folder(out, images, seeds)
    if world > 1: dist.barrier()                           # nobody removes a part before all have arrived
    for path in parts: path.unlink(missing_ok=True)
    with contextlib.suppress(OSError): parts[0].parent.rmdir()                  # parts of another run stay
    return (None, None) if rank else (np.concatenate(first)[:64], np.concatenate(labels))


def path_of(text):
    """FILE or FILE:STEPS -> FILE"""
    path, colon, count = text.rpartition(":")
    return path if colon and count.isdecimal() else text


def open_model(text, args, device):
    """FILE or FILE:STEPS -> the model, guided if the flags say so; header; steps, by default 16 for a
    pre-trained model, else 1; solver, None for a consistency model; args for this FILE. Where a flag of the
    solver, of guidance or of times has no effect, that is an error with one FILE, a note with several."""
    path = path_of(text)
    if Path(path).suffix.lower() in (".png", ".jpg", ".jpeg"):
        raise model.UserError(f"{path} is no .safetensors checkpoint of this project. fid.py takes images as "
                              "a folder or .npz.")
    net, header = model.load(path, device)
    net.backbone_dtype = model.DTYPES[args.precision]
    steps = int(text[len(path) + 1:] or (16 if header["stage"].startswith("pretrain") else 1))
    if steps < 1: raise model.UserError(f"{text}: at least one step is needed.")
    consistency = header["stage"] in solve.CONSISTENCY_STAGES
    solver = None if consistency else args.solver or solve.default_solver(header)
    unused = ["guidance", "guide", "solver"] if consistency else []                # only a teacher has an ODE
    if steps == 1 or solver not in (None, "jump"): unused.append("mid_t")
    without_effect = [flag for flag in unused if getattr(args, flag) not in (None, 1)]
    if without_effect:
        names = " and ".join("--" + flag.replace("_", "-") for flag in without_effect)
        described = f"{header['stage']}, {f'{solver} solver' if solver else 'no ODE'}, {steps} NFE"
        what = f"{names} {'have' if len(without_effect) > 1 else 'has'} no effect on {text} ({described})"
        if len(args.files) == 1: raise model.UserError(f"{what}. Leave it out.")
        model.say(what)
        defaults = {flag: 1.0 if flag == "guidance" else None for flag in without_effect}
        args = argparse.Namespace(**vars(args) | defaults)
    if solver:
        solve.check_solver(solver, path, header)
        net = solve.guide_teacher(net, header, args, path)
    return net, header, steps, solver, args


def count_nfe(header, steps, solver, guidance=1):
    """Forward passes for an image; with guidance every call of the model is also one of the guide."""
    calls = solve.count_calls(solve.solver_times(header, steps, solver), solver) if solver else steps
    return calls if guidance == 1 else 2 * calls


def seed_range(text):
    """A-B -> range(A, B + 1)"""
    first, _, last = text.partition("-")
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 2 ** 32):
        raise argparse.ArgumentTypeError(f"{text} is not A-B with A <= B < 2^32")  # 32 bits: torch's on a CPU
    return range(int(first), int(last) + 1)


def open_real(name, header):
    """The data of --data NAME, by default those that a model was trained on. -> model.Data"""
    path = model.find_data(name)[2] if name else header["data_path"]
    if not path: raise model.UserError("--real: the first FILE does not name its data; give --data.")
    data, shape = model.Data(path), model.image_shape(header)
    if not name and header.get("data_identity") not in (None, data.identity):
        model.say(f"warning: {path} holds other data than the model was trained on.")
    if header["network"]["label_dim"] and data.labels is None:
        raise model.UserError(f"{path} has no labels; leave out --real.")
    if tuple(data.shape) != tuple(shape):
        raise model.UserError(f"--real: {path} has samples of {data.shape}, the first FILE of {shape}; give "
                              "--data.")
    return data


@torch.no_grad()
def real_images(data, labels, header, vae):
    """For each label the next real image of its class, without classes of all. -> uint8 (n,H,W,C)"""
    y, K = data.labels, header["network"]["label_dim"]
    indices = {k: (y == k).nonzero().flatten().tolist() for k in range(K)} if K else {0: range(len(data))}
    queues = {k: itertools.cycle(found) for k, found in indices.items() if len(found)}
    if not set(labels.tolist()) <= queues.keys():
        raise model.UserError("--real: the data have no images of some classes, so there is no picture; "
                              "leave it out, or choose --labels.")
    x = data.batch([next(queues[k]) for k in labels.tolist()])[0]
    return to_images(model.to_network(x, header).to(vae.device if vae else "cpu"), header, vae)


def sampling_flags(p):
    """Flags that sample.py and fid.py share."""
    p.add_argument("--seeds", type=seed_range, metavar="A-B", help="seeds to draw, instead of 0 to N-1")
    p.add_argument("--labels", default="random", metavar="random|balanced|K",
                   help="random: drawn from the seed; balanced: seed modulo classes; K: class K")
    p.add_argument("--solver", choices=solve.SOLVERS,
                   help="ODE solver, not for consistency models (default: dpm3 for denoisers, heun for flow "
                        "matching, jump for Mean Flow); heun with an odd NFE is EDM's sampler")
    p.add_argument("--mid-t", type=lambda text: [model.positive_float(t) for t in text.split(",")],
                   metavar="T,T,...",
                   help="times of steps 2, 3, ... (default: from the file; for Mean Flow uniform)")
    p.add_argument("--precision", choices=model.DTYPES, default="fp32", help="of the network's backbone")
    p.add_argument("--vae", metavar="PATH", help="autoencoder (diffusers) for models of latents")
    solve.guidance_flags(p)


def flags():
    """The command line -> args, with args.seeds a range"""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=model.Help, allow_abbrev=False)
    p.add_argument("files", nargs="+", metavar="FILE[:STEPS]", help="checkpoints")
    p.add_argument("--n", type=model.positive_int,
                   help="number of images (default: 64; of several FILEs 20 each, which is the most)")
    sampling_flags(p)
    p.add_argument("--real", action="store_true", help="a first row of real images of the same classes")
    p.add_argument("--data", metavar="NAME|PATH.npz",
                   help="source of the images of --real (default: what the first FILE was trained on)")
    p.add_argument("--out", metavar="X.npz|FOLDER/|X.png",
                   help="images of one FILE, with a picture X.png; of several FILEs only the picture "
                        "(default: runs/NAME/samples.npz or .png)")
    args = p.parse_args()
    if args.seeds: model.reject_if_typed("--n", because="--seeds says which images to draw")
    if not args.real: model.reject_if_typed("--data", because="only --real reads it")
    one_file, is_picture = len(args.files) == 1, (args.out or "").lower().endswith((".png", ".jpg", ".jpeg"))
    if args.out and (is_picture if one_file else not args.out.endswith(".png")):
        raise model.UserError(f"--out {args.out}: the images of one FILE go to X.npz or FOLDER/; of several "
                              "FILEs only a picture is drawn, X.png.")
    args.seeds = args.seeds or range(args.n or (64 if one_file else 20))
    if not one_file and len(args.seeds) > 20:
        raise model.UserError(f"{len(args.seeds):,} images of each FILE: a picture of several has at most 20."
                              " Choose a smaller --n, or sample one FILE at a time.")
    return args


def open_for_drawing(file, args, device):
    """FILE[:STEPS] -> header, autoencoder or None, name in a picture, function that draws a range of seeds"""
    net, header, steps, solver, args = open_model(file, args, device)
    vae = open_vae(header, args.vae, device)
    def draw(seeds):
        return generate(net, header, seeds, steps, args.labels, args.mid_t, vae, device, solver=solver)
    if solver: model.say(f"{file}: solver {solver}")
    nfe = count_nfe(header, steps, solver, args.guidance)
    return header, vae, f"{STAGE_LABELS[header['stage'].split('_')[0]]}, {nfe} NFE", draw


def output_stem(args, header, is_folder=False):
    """--out without its ending. Raises UserError if it cannot be written."""
    out = args.out or f"runs/{header['data']}/samples"
    out = os.path.normpath(out if is_folder else out.removesuffix(".npz").removesuffix(".png"))
    # parts and picture of a FOLDER/ lie beside it
    if not model.can_write(out) or is_folder and not model.can_write(Path(out, "0.png")):
        raise model.UserError(f"--out {out} is in a folder that cannot be written.")
    return out


def write_samples(file, args, rank, world, device):
    """Write all images of one FILE, as an .npz or a folder, and a picture of the first 64."""
    header, vae, name, draw = open_for_drawing(file, args, device)
    is_folder = bool(args.out) and (args.out.endswith(os.sep) or os.path.isdir(args.out))
    out = output_stem(args, header, is_folder)
    result = Path(out if is_folder else f"{out}.npz")
    real = open_real(args.data, header) if args.real and rank == 0 else None
    check_overwrites(result, args.seeds)
    key = {k: v for k, v in vars(args).items() if k not in ("n", "seeds", "real", "data", "out")}
    key["sha256"] = [model.sha256(f) for f in (path_of(file), solve.guide_file(args)) if f]
    parts = draw_parts(draw, args.seeds, Path(f"{out}.parts"), key, rank, world)
    images, labels = collect(parts, args.seeds, result, rank, world)
    if rank: return
    if real:
        rows, names = [real_images(real, labels[:20], header, vae), images[:20]], ["real", name]
    else:                                                  # 16 images per line, only the first has a name
        rows = [images[i:i + 16] for i in range(0, len(images), 16)]
        names = [name] + [""] * (len(rows) - 1)
    model.save_grid(f"{out}.png", rows, names)
    print(f"{', '.join(filter(None, names))}: {len(args.seeds):,} images in {result}, picture {out}.png")


def write_comparison(args, device):
    """Draw a picture of several FILEs: up to 20 images of each, with the same seeds."""
    rows, names, stage_of = [], [], {}
    for file in args.files:
        header, vae, name, draw = open_for_drawing(file, args, device)
        stage_of[path_of(file)] = header["stage"]          # each file once
        is_first = not rows
        if is_first:
            out, data = output_stem(args, header), open_real(args.data, header) if args.real else None
        images, labels = (np.concatenate(a) for a in zip(*draw(args.seeds)))
        if is_first and data: rows, names = [real_images(data, labels, header, vae)], ["real"]
        rows.append(images)
        names.append(name)
    stems = [Path(path).stem for path in stage_of]
    for i, path in enumerate(map(path_of, args.files), len(names) - len(args.files)):
        if list(stage_of.values()).count(stage_of[path]) > 1:          # several files of a stage: add names
            stem = Path(path).stem
            names[i] += f", {stem if stems.count(stem) == 1 else path}"
    model.save_grid(f"{out}.png", rows, names)
    print(f"{', '.join(names)}: picture {out}.png")


def main():
    args = flags()
    rank, world, device, _ = model.setup(precision=args.precision, timeout=PATIENCE)
    if len(args.files) == 1: write_samples(args.files[0], args, rank, world, device)
    elif rank == 0:          write_comparison(args, device)


if __name__ == "__main__":
    model.run(main)
