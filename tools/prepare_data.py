"""Turn images in any form into data/NAME.npz, the one format that training reads.

  reads   SOURCE: a folder, .zip or .zip/FOLDER of images, with classes from sub-folders or EDM's dataset.json;
          the same with latents as EDM2 stores them (.npy); CIFAR-10's python archive; MNIST's idx files; .npz
          or .npy; hf:NAME[:SPLIT], a dataset of the Hugging Face hub or a folder that `datasets` reads
  writes  data/NAME.npz   arr_0: uint8 (N,H,W,C), or latents (N,C,H,W), or means and deviations (N,2C,H,W)
                          arr_1: int64 (N,), labels 0..K-1, if there are classes; class_names (K,); info (JSON)
          data/NAME.png   contact sheet; look at it before you train
  run     python tools/prepare_data.py ILSVRC2012/train --data imagenet64 --workers 16
          python tools/prepare_data.py cifar-10-python.tar.gz --data cifar10
          python tools/prepare_data.py photos/ --data photos --size 64
          python tools/prepare_data.py ILSVRC2012/train --data imagenet256 --vae stabilityai/sd-vae-ft-mse
          python tools/prepare_data.py --check data/photos.npz

A NAME of model.DATASETS fixes the size, crop, channels, number of classes, and for latents the pixel range of
the autoencoder. Any other NAME is a custom dataset. Memory does not grow with the number of images.
"""
import argparse, datetime, gzip, io, itertools, json, math, os, pickle, posixpath, re, shutil, signal, struct
import sys, tarfile, time, warnings, zipfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

import model
from model import DATASETS, UserError, atomic_write

PICTURES = ".png .jpg .jpeg .jpe .jfif .webp .bmp .tif .tiff .gif .ppm .pgm .pbm .tga .avif .jp2".split()
TABLES = ".csv .tsv .json .jsonl .txt .xml .mat .xlsx .parquet".split()            # files that may list labels
HIDDEN = r"(?i)\.|__MACOSX$|thumbs\.db$|desktop\.ini$"
PART = r"(?i)(train|val|test|dev|images?|masks?|labels?|annotations?)(ing|id|idation)?[-_]?(set|data|[ab]|\d+)?"
NUMBERED = r"\d{5,}"                       # FFHQ and EDM store a thousand images in each of 00000/, 01000/, ...
CIFAR = r"data_batch_\d|batches\.meta|train|meta"                                  # CIFAR-100: train, meta
IDX = r"(?i).*(images|labels)[-.]idx\d[-.]ubyte(\.gz)?"
Image.MAX_IMAGE_PIXELS = None              # a very large scan is downscaled, not refused


@dataclass
class Source:
    """Samples in a fixed order."""
    path: str
    names: list                            # of the samples, for messages
    read: object                           # read(i) -> PIL image, or float array (C,H,W) if `latents`
    labels: object = None                  # an integer or string for each sample
    class_names: list = ()                 # names of integer labels
    latents: bool = False
    skipped: Counter = field(default_factory=Counter)      # files that are not read, by suffix

    def __len__(self):
        return len(self.names)


# === folders and zip files ==================================================================================

def list_folder(folder, prefix="", above=()):
    """Yield the names of all files ("a/b.png") and folders ("a/") below a folder. Symbolic links are followed,
    except to a folder that contains the link."""
    real = os.path.realpath(folder)
    if real in above: return
    for entry in os.scandir(folder):
        is_folder = os.path.isdir(entry.path)
        yield prefix + entry.name + "/" * is_folder
        if is_folder: yield from list_folder(entry.path, f"{prefix}{entry.name}/", (*above, real))


def open_files(path, names, opened, classes):
    """Images or latents among the files `names` of a folder or zip. opened(name) -> open file"""
    visible = sorted(name for name in names if not any(re.match(HIDDEN, part) for part in name.split("/")))
    suffixes = {name: posixpath.splitext(name)[1].lower() for name in visible if not name.endswith("/")}
    images = [name for name in suffixes if suffixes[name] in PICTURES]
    latents = [name for name in suffixes if suffixes[name] == ".npy"]
    skipped = Counter(suffix or "without suffix" for suffix in suffixes.values())
    for suffix in (*PICTURES, ".npy"): skipped.pop(suffix, None)
    if len(names) > len(visible): skipped["hidden"] = len(names) - len(visible)
    if bool(images) == bool(latents):
        raise UserError(f"{path} holds {len(images):,} images, {len(latents):,} latents (.npy) and other files: "
                        f"{dict(skipped)}. Give images or latents; unpack archives, convert other formats to PNG.")
    tables = [name for name in suffixes if suffixes[name] in TABLES
              and not re.match(r"(?i)readme|licen", posixpath.basename(name))]
    labels = file_labels(path, images or latents, visible, tables, opened, classes)
    def read(i):
        return np.load(opened(latents[i]), allow_pickle=False) if latents else Image.open(opened(images[i]))
    return Source(path, images or latents, read, labels, latents=bool(latents), skipped=skipped)


def file_labels(path, images, visible, tables, opened, classes):
    """Labels from EDM's dataset.json, or else from the first sub-folders -> list, or None without classes."""
    if classes == "none": return None
    listing = next((name for name in tables if posixpath.basename(name) == "dataset.json"), None)
    if listing and classes == "auto": return listed_labels(path, images, listing, opened)
    root = posixpath.commonpath([posixpath.dirname(name) for name in images]) or "."   # skips wrapping folders
    inner = [posixpath.relpath(name, root) for name in images]
    folders = sorted({name.split("/")[0] for name in inner if "/" in name})
    beside, parts = [name for name in inner if "/" not in name], [f for f in folders if re.fullmatch(PART, f)]
    problem = None
    if folders and beside:
        problem = f"{beside[0]} lies beside class folders"
    elif not folders and (tables or classes == "folders"):
        problem = f"there are no class folders{f', and {tables[0]} is not read' if tables else ''}"
    elif classes == "auto" and (len(parts) > 1 or folders and all(re.fullmatch(NUMBERED, f) for f in folders)):
        problem = "the folders look like parts of a dataset, not like classes"
    if problem:
        found = f" ({', '.join(folders[:4])})" if folders else ""
        example = f" such as {posixpath.normpath(posixpath.join(path, root, folders[0]))}" if folders else ""
        raise UserError(f"{path}: {problem}{found}. Sort the images into one folder for each class, give one part"
                        f"{example}, or pass --classes none (no classes) or folders (folders are classes).")
    empty = {posixpath.relpath(name, root).split("/")[0] for name in visible if name.endswith("/")}
    empty -= {*folders, ".", ".."}
    if folders and empty: print(f"folders without images: {', '.join(sorted(empty))}")
    return [name.split("/")[0] for name in inner] if folders else None


def listed_labels(path, images, listing, opened):
    """EDM's dataset.json: {"labels": [["00000/img00000000.png", 6], ...]}, or null for no classes."""
    try:
        with opened(listing) as f: table = json.load(f)["labels"]
        if table is None: return None
        table = {name.replace("\\", "/"): label for name, label in table}
        labels = [table.pop(posixpath.relpath(name, posixpath.dirname(listing) or ".")) for name in images]
        if table: raise ValueError(f"{min(table)} does not exist")
        if not {type(k) for k in labels} <= {int, str}: raise ValueError("a label is an integer or a string")
        return labels
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f'{path}: {listing} is not {{"labels": [[name, class], ...]}} for these images ({e!r}). '
                        "Correct it, or ignore it with --classes none or --classes folders.")


# === arrays =================================================================================================

class ArrayUnpickler(pickle.Unpickler):
    """Unpickle dictionaries, lists, bytes and numpy arrays. No other code is run."""
    def find_class(self, module, name):
        allowed = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}
        if module.startswith("numpy") and name in allowed: return allowed[name]
        if (module, name) == ("_codecs", "encode"): return lambda text, encoding: text.encode("latin1")
        raise ValueError(f"{module}.{name} is not run")


def open_cifar(path, files):
    """The training batches of CIFAR-10 or CIFAR-100. files: {name: content}"""
    batches = {k: ArrayUnpickler(io.BytesIO(v), encoding="bytes").load() for k, v in sorted(files.items())}
    meta = batches.pop("batches.meta", None) or batches.pop("meta")
    names = meta.get(b"label_names") or meta[b"fine_label_names"]
    x = np.concatenate([batch[b"data"] for batch in batches.values()]).reshape(-1, 3, 32, 32)
    y = np.concatenate([batch.get(b"labels") or batch[b"fine_labels"] for batch in batches.values()])
    return open_arrays(path, {"images": x, "labels": y}, class_names=[name.decode() for name in names])


def read_idx(path):
    """MNIST's format: two zero bytes, type 8 (uint8), number of dimensions, dimensions, values."""
    with (gzip.open if path.lower().endswith(".gz") else open)(path, "rb") as f: data = f.read()
    zeros, kind, dims = struct.unpack(">HBB", data[:4])
    if (zeros, kind) != (0, 8): raise ValueError(f"{path} is not an idx file of bytes")
    shape = struct.unpack(f">{dims}I", data[4:4 + 4 * dims])
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)


def npz_array(path, key):
    """An array of an .npz: mapped from the disk if it is uncompressed, else loaded."""
    with zipfile.ZipFile(path) as z, z.open(f"{key}.npy") as f:
        member, version = z.getinfo(f"{key}.npy"), np.lib.format.read_magic(f)
        shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{version[0]}_0")(f)
        header = f.tell()
    if member.compress_type != zipfile.ZIP_STORED or fortran or dtype.hasobject or 0 in shape:
        with np.load(path, allow_pickle=False) as arrays: return arrays[key]
    with open(path, "rb") as f:
        f.seek(member.header_offset + 26)
        start = member.header_offset + 30 + sum(struct.unpack("<HH", f.read(4))) + header
    return np.memmap(path, dtype, "r", start, shape)


def choose(path, flag, wanted, candidates, described):
    """The key `wanted`, or else the only candidate, or the only one for training. None without candidates."""
    train = [key for key in candidates if "train" in key.lower()]
    if not wanted and len(train) == 1 < len(candidates): print(f"{flag} {train[0]} of {', '.join(candidates)}")
    candidates = [wanted] if wanted else train or candidates
    if len(candidates) < 2 and set(candidates) <= set(described): return candidates[0] if candidates else None
    raise UserError(f"{path} has {described}. Choose with {flag} KEY"
                    f"{', or pass --classes none' if flag == '--labels' else ''}.")


def open_arrays(path, arrays, classes="auto", images=None, labels=None, class_names=()):
    """Images and labels among named arrays. Images: uint8 (N,H,W), (N,H,W,C) or (N,C,H,W), or floats in [0, 1] or
    [-1, 1]. Latents: floats (N,C,H,W) with C other than 1 and 3."""
    shapes = {key: x.shape for key, x in arrays.items()}
    key = choose(path, "--images", images, [k for k in shapes if len(shapes[k]) in (3, 4)], shapes)
    x = arrays.get(key, np.empty(0))
    fits = [k for k in shapes if k != key and len(shapes[k]) in (1, 2) and shapes[k][0] == len(x)]
    label_key = choose(path, "--labels", labels, fits if classes != "none" else [], shapes)
    last = x.ndim == 3 or x.ndim == 4 and x.shape[3] in ((1, 3, 4) if x.dtype == np.uint8 else (1, 3))
    first = x.ndim == 4 and x.shape[1] in (1, 3)
    latents = x.ndim == 4 and x.dtype.kind == "f" and not last and not first
    if last + first + latents != 1 or not x.size or x.dtype != np.uint8 and x.dtype.kind != "f":
        raise UserError(f"{path}: the array {key} {x.dtype} {x.shape} does not hold images. Store them as uint8 "
                        f"(N,H,W,C) with C = 1 or 3. The arrays are {shapes}.")
    y = arrays[label_key] if label_key else None
    if y is not None:
        if y.ndim == 2 and y.shape[1] == 1: y = y[:, 0]
        if y.shape != x.shape[:1] or len(np.unique(y)) > max(20, len(x) // 2):
            raise UserError(f"{path}: the array {label_key} {y.dtype} {y.shape} does not hold one class for each of "
                            f"{len(x):,} images. Choose with --labels KEY, or pass --classes none.")
    scale, offset = (1, 0) if latents or x.dtype == np.uint8 else float_range(path, x)
    def read(i):
        if latents: return np.asarray(x[i])
        image = x[i] if x.dtype == np.uint8 else np.round(x[i] * scale + offset).astype(np.uint8)
        if first: image = image.transpose(1, 2, 0)
        return Image.fromarray(np.ascontiguousarray(image[:, :, 0] if image.shape[2:] == (1,) else image))
    return Source(path, [f"image {i}" for i in range(len(x))], read, y, class_names, latents)


def float_range(path, x):
    """-> scale and offset that map float pixels to 0..255"""
    chunks = [x[i:i + 256] for i in range(0, len(x), 256)]
    low, high = np.min([chunk.min() for chunk in chunks]), np.max([chunk.max() for chunk in chunks])
    if 0 <= low < 0.1 and 0.9 < high <= 1:     return 255, 0
    if -1 <= low < -0.9 and 0.9 < high <= 1:   return 127.5, 127.5
    raise UserError(f"{path}: float values in [{low:.4g}, {high:.4g}] are not pixels in [0, 1] or [-1, 1]. "
                    "Convert the array to uint8.")


def open_hub(path, classes, images, labels):
    """hf:NAME[:SPLIT] or hf:FOLDER[:SPLIT]"""
    try: import datasets
    except ImportError: raise UserError("hf: needs the package datasets. Run `pip install datasets`.")
    name, _, split = path.removeprefix("hf:").partition(":")
    saved = any(os.path.isfile(f"{name}/{file}.json") for file in ("dataset_dict", "state"))
    data = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    if isinstance(data, dict): data = data[split or choose(path, ":SPLIT instead of", None, list(data), list(data))]
    kinds = {key: type(feature).__name__ for key, feature in data.features.items()}
    images = choose(path, "--images", images, [k for k in kinds if kinds[k] == "Image"], kinds)
    if not images: raise UserError(f"{path} has the columns {kinds} and no images. Choose with --images KEY.")
    classes = [k for k in kinds if kinds[k] == "ClassLabel" and classes != "none"]
    labels = choose(path, "--labels", labels, classes, kinds)
    return Source(path, [f"image {i}" for i in range(len(data))], lambda i: data[i][images],
                  list(data[labels]) if labels else None, getattr(data.features.get(labels), "names", ()))


def open_source(path, classes="auto", images=None, labels=None):
    """Open images or latents in any form, without decoding them.

    path            as SOURCE in the docstring of this file
    classes         "auto": the labels of the source; "folders": the first sub-folders; "none": no labels
    images, labels  keys of arrays of an .npz, or columns of a Hugging Face dataset
    -> Source with len(), names, labels and read(i). Raises UserError."""
    try:
        if path.startswith("hf:"): return open_hub(path, classes, images, labels)
        archive, lower = re.match(r"(?i)(.+?\.zip)(?:/+(.*))?$", path), path.lower()
        if archive and os.path.isfile(archive[1]):
            z, inside = zipfile.ZipFile(archive[1]), (archive[2] or "").rstrip("/")
            start = inside and inside + "/"
            members = {name.replace("\\", "/"): name for name in z.namelist()}
            names = [name.removeprefix(start) for name in members if name.startswith(start)]
            return open_files(path, names, lambda name: io.BytesIO(z.read(members[start + name])), classes)
        if not os.path.exists(path): raise UserError(f"{path} does not exist. Give a folder or a file of images.")
        if lower.endswith(".npz"):
            with zipfile.ZipFile(path) as z: keys = [name[:-4] for name in z.namelist()]
            arrays = {key: npz_array(path, key) for key in keys}
            names = [str(name) for name in arrays.get("class_names", ())]
            return open_arrays(path, arrays, classes, images, labels, names)
        if lower.endswith(".npy"):
            return open_arrays(path, {"images": np.load(path, mmap_mode="r", allow_pickle=False)})
        if "cifar" in lower and not os.path.isdir(path):
            with tarfile.open(path) as tar:
                files = {posixpath.basename(m.name): m for m in tar if m.isfile()}
                return open_cifar(path, {k: tar.extractfile(m).read() for k, m in files.items() if re.fullmatch(CIFAR, k)})
        folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
        names = list(list_folder(folder))
        cifar = {os.path.basename(name): Path(path, name) for name in names if re.fullmatch(CIFAR, os.path.basename(name))}
        if cifar.keys() & {"batches.meta", "meta"}:
            return open_cifar(path, {k: file.read_bytes() for k, file in cifar.items()})
        idx = {re.sub(r"(?i)\.gz$", "", name): read_idx(os.path.join(folder, name)) for name in names if re.fullmatch(IDX, name)}
        if idx: return open_arrays(path, idx, classes)
        return open_files(path, names, lambda name: open(os.path.join(path, name), "rb"), classes)
    except UserError: raise
    except Exception as e:                 # damaged files raise anything
        raise UserError(f"{path} is damaged, or not a folder, .zip, .npz, .npy, CIFAR archive or idx file of images "
                        f"({e!r}). Unpack other archives first.")


# === images =================================================================================================

def in_order(source, convert, workers=1, skip_bad=False):
    """Yield (i, convert(sample i)) in order, from a pool of threads: Pillow decodes without Python's global lock.
    A sample that fails raises UserError, or is printed and left out."""
    def attempt(i):
        try: return convert(source.read(i))
        except Exception as e:             # image libraries raise anything
            return UserError(f"{source.path}: {source.names[i]} cannot be used ({e!r}).")
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(source), 256):
            indices = range(start, min(start + 256, len(source)))
            for i, result in zip(indices, pool.map(attempt, indices)):
                if not isinstance(result, UserError): yield i, result
                elif skip_bad: print(f"left out: {result}")
                else: raise UserError(f"{result} Remove it, or pass --skip-bad.")


def without_bad(source, workers):
    """Decode all samples once -> the Source of those that can be decoded"""
    check = np.asarray if source.latents else lambda image: to_pixels(image, None, 3)[:0]
    good = [i for i, _ in in_order(source, check, workers, skip_bad=True)]
    if not good: raise UserError(f"{source.path} holds no image that can be decoded. Give another SOURCE.")
    labels = None if source.labels is None else [source.labels[i] for i in good]
    return replace(source, names=[source.names[i] for i in good], read=lambda i: source.read(good[i]), labels=labels)


def survey(source, workers=1):
    """Read the headers of all images -> {(width, height): name of the first such image}, whether all are grey"""
    def header(image):
        turned = image.getexif().get(0x0112, 1) >= 5
        grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I;16")
        return image.size[::-1] if turned else image.size, grey
    sizes, all_grey = {}, True
    for i, (size, grey) in in_order(source, header, workers):
        sizes.setdefault(size, source.names[i])
        all_grey = all_grey and grey
    return sizes, all_grey


def image_batches(source, batch=64, rank=0, world=1):
    """Yield the images of a Source as uint8 arrays (n,H,W,C), as they are: without a crop and in their order.

    C is 1 if all images are grey, else 3. Process `rank` of `world` yields batches rank, rank + world, ..., so that
    all processes together yield every image once. n is `batch`, and may be smaller in the last batch.
    Raises UserError for images of two sizes, a damaged image, or latents."""
    if source.latents: raise UserError(f"{source.path} holds latents, not images. Decode them first.")
    sizes, grey = survey(source)
    if len(sizes) > 1:
        (a, first), (b, second) = list(sizes.items())[:2]
        raise UserError(f"{source.path}: {first} has {a[0]}x{a[1]} pixels, and {second} has {b[0]}x{b[1]}. "
                        "Use images of one size.")
    for start in range(rank * batch, len(source), world * batch):
        part = Source(source.path, source.names[start:start + batch], lambda i: source.read(start + i))
        yield np.stack([x for _, x in in_order(part, lambda image: to_pixels(image, None, 1 if grey else 3))])


def to_pixels(image, size, channels, background="white"):
    """PIL image of any mode -> uint8 (H,W,channels). size: side of ADM's crop, or None to keep the image."""
    if size and image.width * image.height > 2 ** 26: image.draft(None, (2 * size, 2 * size))       # JPEG scans
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"): image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"): raise ValueError(f"pixels of mode {image.mode} have no fixed range")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, background)
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    image = image.convert("L" if channels == 1 else "RGB")
    if size: image = centre_crop(image, size)
    return np.asarray(image).reshape(image.height, image.width, channels)


def centre_crop(image, size):
    """ADM's crop: halve with a box filter while twice the size remains, resize the shorter side with a bicubic
    filter, crop the middle. PIL image -> PIL image of size x size"""
    while min(image.size) >= 2 * size: image = image.resize([side // 2 for side in image.size], Image.BOX)
    scale = size / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.BICUBIC)
    left, top = [(side - size) // 2 for side in image.size]
    return image.crop((left, top, left + size, top + size))


def index_labels(source):
    """Labels of any values -> int64 (N,) in 0..K-1 without gaps, names of the K classes. Numbers are sorted
    numerically, also in strings ("9" before "10"). Other strings are sorted alphabetically."""
    values, names = np.asarray(source.labels), source.class_names
    if values.dtype.kind == "S": values = np.char.decode(values, "utf-8")
    if values.dtype.kind == "f" and (values == np.round(values)).all(): values = values.astype(np.int64)
    unique, y = np.unique(values, return_inverse=True) if values.dtype.kind in "buiU" else ([-1], None)
    if y is None or len(names) and not 0 <= unique[0] <= unique[-1] < len(names):
        raise UserError(f"{source.path}: the labels, such as {unique[0]} ({values.dtype}), are not classes. Choose "
                        "with --labels KEY, or pass --classes none.")
    if values.dtype.kind == "U" and all(re.fullmatch(r"\d+", value) for value in unique):
        order = np.argsort([int(value) for value in unique], kind="stable")
        unique, y = unique[order], np.argsort(order)[y]
    return y.astype(np.int64), [str(names[k] if len(names) else k) for k in unique]


class Autoencoder:
    """diffusers' AutoencoderKL for pixels in [low, high]."""
    def __init__(self, path, pixel_range):
        (self.low, self.high), self.device = pixel_range, "cuda" if torch.cuda.is_available() else "cpu"
        try:
            from diffusers import AutoencoderKL
            self.vae = AutoencoderKL.from_pretrained(path).eval().to(self.device)
        except Exception as e:             # diffusers raises anything
            raise UserError(f"--vae {path} cannot be loaded ({e!r}). Run `pip install diffusers`, and give a "
                            "folder or a name such as stabilityai/sd-vae-ft-mse.")

    @torch.no_grad()
    def encode(self, images):
        """uint8 (n,H,W,3) -> fp32 (n,2C,h,w), means and deviations of the latents, not scaled"""
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 255
        z = self.vae.encode(x * (self.high - self.low) + self.low).latent_dist
        return torch.cat([z.mean, z.std], 1).float().cpu().numpy()

    @torch.no_grad()
    def decode(self, z):
        """(n,C,h,w) -> uint8 (n,H,W,3), truncated as in EDM2"""
        x = self.vae.decode(torch.from_numpy(z).float().to(self.device)).sample
        x = (x - self.low) / (self.high - self.low)
        return (x.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


# === output =================================================================================================

def progress(items, total):
    """Yield the items, and print the rate and the time left every five seconds and at the end."""
    start = shown = time.time()
    for n, item in enumerate(items, 1):
        yield item
        if time.time() - shown > 5 or n == total:
            shown, rate = time.time(), n / (time.time() - start + 1e-9)
            print(f"{n:,} of {total:,}, {rate:,.0f} per second, {(total - n) / rate:,.0f} s left", flush=True)


def stored_chunks(samples, flip, encode, C, dtype, totals):
    """Yield arrays (n, ...) in the form that is stored, and add up statistics of the pixels or latents."""
    while batch := list(itertools.islice(samples, 16)):
        x = np.stack([x for _, sample in batch for x in ([sample, sample[:, ::-1]] if flip else [sample])])
        if encode: x = encode(x)
        with np.errstate(over="ignore"): stored = x.astype(dtype)
        if not np.isfinite(stored).all():
            raise UserError(f"{batch[0][0]} to {batch[-1][0]}: a latent is not finite in {dtype}. Pass --fp32, or "
                            "repair the source.")
        totals["largest"] = max(totals["largest"], x.max())
        if C:
            totals["rounding"] = max(totals["rounding"], np.abs(stored - x).max())
            totals["count"] += x[:, 0].size
            totals["sum"] = totals["sum"] + x[:, :C].sum((0, 2, 3), dtype=np.float64)
            squares = (x.astype(np.float64) ** 2).sum((0, 2, 3))       # of means and, if stored, of deviations
            totals["squares"] = totals["squares"] + squares.reshape(-1, C).sum(0)
        yield stored


def write_npz(path, shape, dtype, chunks, finish):
    """Stream the chunks to arr_0, then add the arrays {name: array} that finish() returns."""
    part = path.with_name(path.name + ".part")
    try:
        with atomic_write(path) as part, zipfile.ZipFile(part, "w") as z:
            with z.open("arr_0.npy", "w", force_zip64=True) as f:
                header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(f, header)
                for chunk in chunks: f.write(chunk.tobytes())
            for name, array in finish().items():
                with z.open(f"{name}.npy", "w") as f: np.lib.format.write_array(f, np.array(array), allow_pickle=False)
    except BaseException:                  # also Ctrl-C
        part.unlink(missing_ok=True)
        raise


def contact_sheet(path, x, y, class_names, decode=None):
    """A line of images for each of at most 20 classes. Without classes: images in equal distances."""
    lines, columns, gap = (6, 4, 4) if decode else (20, 10, 4)
    if y is None:
        chosen = np.unique(np.linspace(0, len(x) - 1, lines * columns).astype(int))
        rows = [("", chosen[i:i + columns]) for i in range(0, len(chosen), columns)]
    else:
        classes = np.unique(np.linspace(0, len(class_names) - 1, lines).astype(int))
        rows = [(f"{k} {class_names[k]}"[:40], np.flatnonzero(y == k)[:columns]) for k in classes]
    rows = [(label.encode("latin1", "replace").decode("latin1"), indices) for label, indices in rows]
    font = ImageFont.load_default(14)
    margin = 2 * gap + max(math.ceil(font.getlength(label)) for label, _ in rows)
    side = 128 if decode else min(128, x.shape[1] * max(1, 64 // x.shape[1]))
    sheet = Image.new("RGB", (margin + columns * (side + gap), gap + len(rows) * (side + gap)), "white")
    for r, (label, indices) in enumerate(rows):
        ImageDraw.Draw(sheet).text((gap, r * (side + gap) + side // 2 - 6), label, "black", font)
        images = np.stack([x[i] for i in indices])
        for c, image in enumerate(decode(images) if decode else images):
            tile = Image.fromarray(np.repeat(image, 3 // image.shape[2], 2))
            tile = tile.resize((side, side), Image.NEAREST if side > tile.width else Image.BOX)
            sheet.paste(tile, (margin + c * (side + gap), gap + r * (side + gap)))
    with atomic_write(path) as part: sheet.save(part, "PNG")


def describe(path):
    """Check shapes and labels of a prepared .npz, and print what it contains -> arr_0, arr_1, class_names"""
    with zipfile.ZipFile(path) as z: arrays = {name[:-4]: npz_array(path, name[:-4]) for name in z.namelist()}
    x, y = arrays["arr_0"], arrays.get("arr_1")
    pixels = x.dtype == np.uint8 and x.shape[3:] in ((1,), (3,))
    if x.ndim != 4 or not x.size or not pixels and x.dtype not in (np.float16, np.float32):
        raise ValueError(f"arr_0 is {x.dtype} {x.shape}")
    print(f"{path}: {x.dtype} {x.shape}, {os.path.getsize(path) / 1e6:,.1f} MB")
    if y is None: return x, None, None
    names = [str(name) for name in arrays.get("class_names", range(y.max() + 1))]
    if y.shape != x.shape[:1] or y.dtype != np.int64 or not np.array_equal(np.unique(y), range(len(names))):
        raise ValueError(f"arr_1 is {y.dtype} {y.shape}, labels {y.min()} to {y.max()}, for {len(names)} class names")
    counts = [f"{name} {n:,}" for name, n in zip(names, np.bincount(y))]
    print(f"{len(names):,} classes: " + ", ".join(counts[:20] + ["..."] * (len(counts) > 20)))
    return x, y, names


def check(path):
    """Verify the checksums, shapes and labels of a prepared .npz, and print what it contains."""
    try:
        with zipfile.ZipFile(path) as z: damaged, names = z.testzip(), z.namelist()
        if damaged: raise ValueError(f"the checksum of {damaged} is wrong")
        describe(path)
        print(f"info: {json.loads(str(npz_array(path, 'info'))) if 'info.npy' in names else 'none'}; checksums are correct")
    except Exception as e:                 # damaged files raise anything
        raise UserError(f"{path} is not a prepared dataset ({e!r}). Prepare it again.")


# === command line ===========================================================================================

def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=model.Help)
    p.add_argument("source", metavar="SOURCE", nargs="?", help="images in any form")
    p.add_argument("--data", metavar="NAME", help=f"one of {', '.join(DATASETS)}, or a new name")
    p.add_argument("--size", type=int, help="side of the images of a custom dataset")
    p.add_argument("--crop", choices=["center", "none"], help="ADM's centre crop (default), or none: no resizing")
    p.add_argument("--classes", choices=["auto", "folders", "none"], default="auto", help="where labels come from")
    p.add_argument("--images", metavar="KEY", help="array of an .npz, or column of a Hugging Face dataset")
    p.add_argument("--labels", metavar="KEY", help="the same for labels")
    p.add_argument("--grey", action="store_true", help="convert colour images to one channel")
    p.add_argument("--background", default="white", metavar="COLOR", help="colour behind transparent pixels")
    p.add_argument("--flip", action="store_true", help="add a mirrored copy of every image")
    p.add_argument("--vae", metavar="PATH", help="autoencoder (diffusers) that encodes images, and draws latents")
    p.add_argument("--pixel-range", type=int, nargs=2, metavar=("LOW", "HIGH"),
                   help="pixels that the autoencoder of a custom dataset expects: 0 1 as EDM2, or -1 1 as SiT")
    p.add_argument("--fp32", action="store_true", help="store latents in fp32, not in fp16")
    p.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be decoded (decodes twice)")
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count()), help="threads that decode images")
    p.add_argument("--overwrite", action="store_true", help="replace an existing file")
    p.add_argument("--check", metavar="FILE", help="verify a prepared .npz and print what it contains")
    args = p.parse_args()
    if args.check: return args
    if not args.source or not re.fullmatch(r"(?!.*\.npz$)\w[\w.-]*", args.data or ""):
        raise UserError(f"SOURCE is {args.source} and --data is {args.data}. Give a SOURCE and a NAME, without a "
                        "folder or suffix: prepare_data.py SOURCE --data NAME.")
    try: ImageColor.getrgb(args.background)
    except ValueError: raise UserError(f"--background {args.background} is not a colour. Use a name, or #rrggbb.")
    if args.workers < 1: raise UserError(f"--workers is {args.workers}. Use 1 or more.")
    return args


def check_flags(args, row, source):
    """Refuse flags that have no effect, and a source that does not fit the dataset."""
    latents, fixed = source.latents or args.vae, row and row.get("latents")
    K = len(set(source.labels)) if source.labels is not None else 0
    for problem, message in [
        (row and (args.size or args.crop or args.grey or args.pixel_range),
         f"--data {args.data} fixes size, crop, channels and pixel range. Remove --size, --crop, --grey, --pixel-range."),
        (row and latents and not fixed, f"{args.data} is a dataset of pixels, not of latents. Choose another NAME."),
        (fixed and not latents, f"{args.data} is a dataset of latents. Encode the images with --vae PATH."),
        (row and row["classes"] not in (0, K), f"{args.source} has {K:,} classes, unlike the dataset {args.data}. Choose "
         "another NAME, which makes a custom dataset."),
        (latents and not row and args.pixel_range not in ([0, 1], [-1, 1]), "Latents need the pixel range of their "
         "autoencoder. Pass --pixel-range 0 1 (as EDM2) or --pixel-range -1 1 (as SiT)."),
        (not latents and (args.fp32 or args.pixel_range), "--fp32 and --pixel-range are for latents. Remove them."),
        (source.latents and (args.flip or args.size or args.crop) or latents and args.grey,
         "--flip, --size and --crop are for images, and --grey is for pixels. Remove them.")]:
        if problem: raise UserError(message)


def image_shape(args, row, source):
    """-> size and number of channels of the images that are stored or encoded"""
    if row: return (8 * row["shape"][1], 3) if "latents" in row else (row["shape"][1], row["shape"][0])
    sizes, grey = survey(source, args.workers)
    widths, heights = zip(*sizes)
    shortest, multiple = min(widths + heights), 32 if args.vae else 4
    size = args.size or shortest
    if size < 1 or size % multiple or set(sizes) != {(size, size)} and (args.crop == "none" or not args.size):
        usable = max(multiple, min(64, 2 ** int(math.log2(shortest))))
        raise UserError(f"{source.path} holds images {min(widths)} to {max(widths)} pixels wide and {min(heights)} to "
                        f"{max(heights)} high. Squares with a side divisible by {multiple} are needed: crop the images with "
                        f"--size N, such as --size {usable}.")
    if shortest < size: print(f"images smaller than {size} pixels are enlarged")
    return size, 1 if args.grey or grey and not args.vae else 3


def main():
    args = arguments()
    if args.check: return check(args.check)
    row, out = DATASETS.get(args.data), Path("data", f"{args.data}.npz")
    if out.exists() and not args.overwrite: raise UserError(f"{out} exists. Choose another NAME, or pass --overwrite.")
    warnings.filterwarnings("ignore", module="PIL")
    signal.signal(signal.SIGTERM, signal.default_int_handler)          # removes the temporary file, as Ctrl-C does
    source = open_source(args.source, args.classes, args.images, args.labels)
    if args.skip_bad: source = without_bad(source, args.workers)
    print(f"{args.source}: {len(source):,} {'latents' if source.latents else 'images'}; other files: "
          f"{dict(source.skipped)}", flush=True)
    check_flags(args, row, source)
    if row and not row["classes"] and source.labels is not None:
        source.labels = print(f"{args.data} has no classes; the labels are left out")
    y, class_names = (None, None) if source.labels is None else index_labels(source)

    latents = row.get("latents") if row else source.latents or args.vae and {}
    pixel_range = latents["pixel_range"] if row and latents else args.pixel_range
    autoencoder = Autoencoder(args.vae, pixel_range) if args.vae else None
    encode, C = autoencoder.encode if args.vae and not source.latents else None, None
    if source.latents:
        z = source.read(0)
        shape, half = z.shape, len(z) // 2
        C = half if len(z) == 2 * half and (z[half:] > 0).all() else len(z)            # deviations are positive
        def convert(z):
            if z.shape != shape or z.dtype.kind != "f": raise ValueError(f"{z.dtype} {z.shape} is unlike the first latent")
            return z
    else:
        size, channels = image_shape(args, row, source)
        shape, convert = (size, size, channels), lambda image: to_pixels(image, size, channels, args.background)
        if encode: shape = encode(np.zeros((1, *shape), np.uint8)).shape[1:]
        if encode: C = shape[0] // 2
    if row and C and (C, *shape[1:]) != tuple(row["shape"]):
        raise UserError(f"{args.data} needs latents {row['shape']}, and these have the shape {(C, *shape[1:])}. Choose another NAME.")

    dtype = np.dtype(np.uint8 if not C else np.float32 if args.fp32 else np.float16)
    shape = len(source) * (1 + args.flip), *shape
    out.parent.mkdir(exist_ok=True)
    needed, free = math.prod(shape) * dtype.itemsize / 1e9, shutil.disk_usage(out.parent).free / 1e9
    if needed > free: raise UserError(f"{out} needs {needed:,.1f} GB, and {free:,.1f} GB of the disk are free. Free some space.")
    totals = defaultdict(float)
    samples = progress(in_order(source, convert, args.workers), len(source))
    def finish():
        info = {"source": args.source, "date": str(datetime.date.today()), "samples": len(source), "skipped": source.skipped}
        if not source.latents: info |= {"size": size, "crop": args.crop or "center", "flip": args.flip}
        if C:
            mean = totals["sum"] / totals["count"]
            scale = 0.5 / np.sqrt(totals["squares"] / totals["count"] - mean ** 2)
            measured = {"mean": mean.tolist(), "scale": scale.tolist(), "pixel_range": pixel_range}
            info["latents"] = {"vae": args.vae} | (row["latents"] if row else measured)
            print(f"largest rounding error {totals['rounding']:.2g}; latents: {info['latents']}")
        arrays = {} if y is None else {"arr_1": np.repeat(y, 1 + args.flip), "class_names": class_names}
        return arrays | {"info": json.dumps(info)}
    write_npz(out, shape, dtype, stored_chunks(samples, args.flip, encode, C, dtype, totals), finish)
    prepared = describe(out)
    if C and not args.vae: return print("no contact sheet: pass --vae PATH to decode and draw latents")
    contact_sheet(out.with_suffix(".png"), *prepared, C and (lambda z: autoencoder.decode(z[:, :C])))
    print(f"{out.with_suffix('.png')}: contact sheet")


if __name__ == "__main__":
    model.run(main)
