"""Turn images into data/NAME.npz, the one format that training reads.

  reads   SOURCE: a folder, .zip or .zip/FOLDER of images, classes from sub-folders or dataset.json (EDM);
          the same with latents (.npy, EDM2); CIFAR-10's python archive; MNIST's idx files; an .npz or .npy;
          hf:NAME[:SPLIT[:CONFIG]], a dataset of the Hugging Face hub or a folder that `datasets` reads
  writes  data/NAME.npz   arr_0: uint8 (N,H,W,C), or latents (N,C,H,W), or means and deviations (N,2C,H,W)
                          arr_1: int64 (N,), labels 0..K-1, if there are classes; class_names (K,)
                          info: JSON (source, size, crop, counts, date; for latents the autoencoder)
          data/NAME.png   contact sheet; look at it before you train
  run     python tools/prepare_data.py ILSVRC2012/train --data imagenet64 --workers 16
          python tools/prepare_data.py cifar-10-python.tar.gz --data cifar10
          python tools/prepare_data.py photos/ --data photos --size 64
          python tools/prepare_data.py ILSVRC2012/train --data imagenet256 --vae stabilityai/sd-vae-ft-mse
          python tools/prepare_data.py --check data/photos.npz

A NAME of model.DATASETS fixes the size, crop, channels, number of classes, and for latents the pixel range of
the autoencoder. Any other NAME is a custom dataset. Images are read one by one, except from a compressed
.npz, idx files and CIFAR-10's archive. Colour profiles are ignored, and for a NAME of DATASETS also EXIF's
rotation, as in the preparation of the published datasets.
"""
import argparse, datetime, functools, gzip, io, itertools, json, math, os, pickle, posixpath, re
import shutil, struct, sys, tarfile, time, warnings, zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps, PngImagePlugin

import model, sample
from model import DATASETS, UserError

PICTURES = ".png .jpg .jpeg .jpe .jfif .webp .bmp .tif .tiff .gif .ppm .pgm .pbm .tga .avif .jp2".split()
TABLES = ".csv .tsv .json .jsonl .txt .xml .mat .xlsx .parquet".split()         # files that may list labels
HIDDEN = r"(?i)\.(?!\.?$)|__MACOSX$|thumbs\.db$|desktop\.ini$|@eaDir$|#recycle$|\$RECYCLE\.BIN$"
# Folders with such names are parts of a dataset. FFHQ stores a thousand images in each of 00000/, 01000/, ...
PART = (r"(?i)(.+[-_ ](?=train|val|test))?"       # seg_train; also freight_train, hence only a question
        r"((train|val|test|dev|eval|fold|split|unlabell?ed|images?|masks?|annotations?|labels?)"
        r"(ing|id|idation)?[-_ ]?(set|data|[ab]|\d+)?[-_ ]?)+|\d{5,}")
CIFAR = r"data_batch_\d|batches\.meta"
IDX = r"(?i).*(images|labels)[-.]idx\d[-.]ubyte(\.gz)?"
TRAINING_IMAGES = {"cifar10": 50_000, "ffhq64": 70_000, "afhqv2-64": 15_803, "imagenet64": 1_281_167,
                   "imagenet256": 1_281_167, "imagenet512": 1_281_167}
LANCZOS = "ffhq64", "afhqv2-64"            # resized so by EDM, for its teachers and the published FIDs
Image.MAX_IMAGE_PIXELS = None              # a very large scan is downscaled, no error
TURNS = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
         6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}         # by EXIF's number
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 30       # a PNG may hold long texts


@dataclass
class Source:
    """Samples in a fixed order."""
    path: str
    names: list                            # of the samples, for messages
    read: object                           # read(i) -> PIL image, or float array (C,H,W) if `latents`
    labels: object = None                  # an integer or string for each sample
    class_names: object = ()               # names of integer labels
    latents: bool = False
    skipped: dict = field(default_factory=dict)            # number of files that are not read, by suffix

    def __len__(self):
        return len(self.names)


# === folders and zip files ==================================================================================

def list_folder(folder, prefix="", above=()):
    """Yield the names of all files ("a/b.png") and folders ("a/") below a folder. Symbolic links are
    followed, except to a folder that contains the link."""
    real = os.path.realpath(folder)
    if real in above: return
    for entry in os.scandir(folder):
        linked = entry.is_symlink()                        # DirEntry knows the rest without reading it
        is_folder = os.path.isdir(entry.path) if linked else entry.is_dir()
        is_file = os.path.isfile(entry.path) or not os.path.exists(entry.path) if linked else entry.is_file()
        if not (is_folder or is_file): continue            # a pipe
        yield prefix + entry.name + "/" * is_folder
        if is_folder: yield from list_folder(entry.path, f"{prefix}{entry.name}/", (*above, real))


def open_files(path, files, classes, images=None, labels=None):
    """Images, latents, idx files or CIFAR-10 batches. files: {name: function that opens the file}"""
    visible = sorted(name for name in files if not any(re.match(HIDDEN, part) for part in name.split("/")))
    cifar = {name: name.split("/")[-1] for name in visible if re.fullmatch(CIFAR, name.split("/")[-1])}
    idx = {re.sub(r"(?i)\.gz$", "", name): name for name in visible if re.fullmatch(IDX, name)}
    if cifar or idx:
        arrays = (read_cifar({cifar[name]: files[name]() for name in cifar}) if cifar else
                  {k: read_idx(files[name](), name) for k, name in idx.items()})
        return open_arrays(path, arrays, classes, images, labels)
    if images or labels: raise UserError("there are no keys to choose. Remove --images and --labels.")

    kinds = defaultdict(list)                              # suffix: names
    for name in visible:
        if not name.endswith("/"): kinds[posixpath.splitext(name)[1].lower()].append(name)
    latents, images = kinds.pop(".npy", []), sorted(sum((kinds.pop(k, []) for k in PICTURES), []))
    skipped = {suffix or "no suffix": len(names) for suffix, names in kinds.items()}
    if len(files) > len(visible): skipped["hidden"] = len(files) - len(visible)
    if bool(images) == bool(latents):
        raise UserError(f"found {len(images):,} images, {len(latents):,} latents (.npy), other: {skipped}. "
                        "Give either images or latents. Unpack archives, and convert other formats to PNG.")
    names = images or latents
    labels = None if classes == "none" else file_labels(path, names, visible, kinds, files, classes)
    if labels and None in labels:                          # --classes folders, and images beside the folders
        skipped["beside the class folders"] = labels.count(None)
        names, labels = zip(*((name, k) for name, k in zip(names, labels) if k is not None))
    def read(i):
        file = files[names[i]]()
        return np.load(file, allow_pickle=False) if latents else Image.open(file)
    return Source(path, names, read, labels, latents=bool(latents), skipped=skipped)


def file_labels(path, images, visible, kinds, files, classes):
    """Labels from EDM's dataset.json, or else from the top-level folders -> list, or None without classes."""
    tables = [name for suffix in TABLES for name in kinds.get(suffix, [])
              if not re.search("readme|licen[cs]e", name.lower())]
    listing = next((name for name in tables if posixpath.basename(name) == "dataset.json"), None)
    if listing and classes == "auto": return listed_labels(images, listing, files[listing])
    root = posixpath.commonpath([posixpath.dirname(name) for name in images]) or "."  # skips wrapping folders
    inner = [posixpath.relpath(name, root) for name in images]
    folders = sorted({name.split("/")[0] for name in inner if "/" in name})
    beside, parts = [name for name in inner if "/" not in name], [f for f in folders if re.fullmatch(PART, f)]
    problem = None
    if folders and beside and classes == "auto": problem = f"{beside[0]} lies beside the class folders"
    elif not folders and tables: problem = f"there are no class folders, and {tables[0]} is not read"
    elif not folders and classes == "folders": problem = "there are no class folders"
    elif classes == "auto" and len(parts) > 1: problem = "these folders look like parts, not like classes"
    if problem:
        example = posixpath.normpath(posixpath.join(path, root, *folders[:1]))
        raise UserError(f"{problem} (folders: {', '.join(folders[:4]) or 'none'}). Sort the images into one "
                        f"folder for each class, give one folder such as {example}, or pass --classes none "
                        "(no classes) or --classes folders (these folders are classes).")
    inside = {posixpath.relpath(name, root).split("/")[0] for name in visible if name.endswith("/")}
    empty = sorted(inside - {*folders, ".", ".."})
    if folders and empty: print(f"folders without images: {', '.join(empty)}")
    return [name.split("/")[0] if "/" in name else None for name in inner] if folders else None


def listed_labels(images, listing, opened):
    """EDM's dataset.json: {"labels": [["00000/img00000000.png", 6], ...]}, or null for no classes."""
    try:
        with opened() as f: table = json.load(f)["labels"]
        if table is None: return None
        table = {name.replace("\\", "/"): label for name, label in table}
        labels = [table.pop(posixpath.relpath(name, posixpath.dirname(listing) or ".")) for name in images]
        if table: raise ValueError(f"{min(table)} does not exist")
        if not {type(k) for k in labels} <= {int, str}: raise ValueError("a label is an integer or a string")
        return labels
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f'{listing} is not {{"labels": [[name, class], ...]}} for these images ({e!r}). '
                        "Correct it, or ignore it with --classes none or --classes folders.")


# === arrays =================================================================================================

class ArrayUnpickler(pickle.Unpickler):
    """Unpickle dictionaries, lists, bytes and numpy arrays. No other code is run."""
    def find_class(self, module, name):
        allowed = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}
        if module.startswith("numpy") and name in allowed: return allowed[name]
        if (module, name) == ("_codecs", "encode"): return lambda text, encoding: text.encode("latin1")
        raise ValueError(f"{module}.{name} is not run")


def read_cifar(files):
    """CIFAR-10's training batches, {name: open file} -> {key: array}"""
    batches = {name: ArrayUnpickler(file, encoding="bytes").load() for name, file in sorted(files.items())}
    names = [name.decode() for name in batches.pop("batches.meta")[b"label_names"]]
    x = np.concatenate([batch[b"data"] for batch in batches.values()]).reshape(-1, 3, 32, 32)
    y = np.concatenate([batch[b"labels"] for batch in batches.values()])
    return {"images": x, "labels": y, "class_names": names}


def read_idx(file, name):
    """MNIST's format: two zero bytes, type 8 (uint8), number of dimensions, dimensions, values."""
    data = (gzip.open(file) if name.lower().endswith(".gz") else file).read()
    zeros, kind, dims = struct.unpack(">HBB", data[:4])
    if (zeros, kind) != (0, 8): raise ValueError(f"{name} is not an idx file of bytes")
    shape = struct.unpack(f">{dims}I", data[4:4 + 4 * dims])
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)


def verified_keys(path):
    """Verify the checksums of an .npz -> its keys. A damaged file can raise any exception."""
    with zipfile.ZipFile(path) as z:
        if bad := z.testzip(): raise ValueError(f"the checksum of {bad} is wrong")
        return [name.removesuffix(".npy") for name in z.namelist()]


def npz_arrays(path):
    """Verify the checksums of an .npz -> {key: array}. Uncompressed arrays are mapped from the disk."""
    keys = verified_keys(path)
    return {key: model.npz_array(path, key, limit=math.inf) for key in keys}


def choose(flag, wanted, candidates, described):
    """The key `wanted`, else the only candidate, else the only one named train; None if there are none"""
    train = [key for key in candidates if "train" in key.lower()]
    if not wanted and len(train) == 1 < len(candidates):
        print(f"using {train[0]} of {', '.join(candidates)}; {flag} chooses another")
    candidates = [wanted] if wanted else train or candidates
    if len(candidates) < 2 and set(candidates) <= set(described): return candidates[0] if candidates else None
    without = ", or pass --classes none" if "--labels" in flag else ""
    raise UserError(f"found {described}. Choose with {flag}{without}.")


def open_arrays(path, arrays, classes="auto", images=None, labels=None):
    """Images and labels among named arrays. Images: uint8 (N,H,W), (N,H,W,C) or (N,C,H,W), or floats in
    [0, 1] or [-1, 1]. Latents: floats (N,C,H,W) with C other than 1 and 3."""
    if classes == "folders": raise UserError("--classes folders has no effect on arrays. Remove it.")
    class_names = [str(name) for name in arrays.pop("class_names", ())]
    if '"flip": true' in str(arrays.get("info", "")):
        raise UserError("it has mirrored copies (--flip). Prepare the images that it was made from.")
    shapes = {key: x.shape for key, x in arrays.items()}
    candidates = [k for k in shapes if len(shapes[k]) in (3, 4)]
    key = choose("--images KEY", images, candidates, shapes)
    x = arrays[key] if key else np.empty(0)
    if x.ndim == 3 and x.shape[2] in (3, 4):
        raise UserError(f"{key} is {x.dtype} {x.shape}, one image. Store images as uint8 (N,H,W,C).")
    last = x.ndim == 3 or x.ndim == 4 and x.shape[3] in ((1, 3, 4) if x.dtype == np.uint8 else (1, 3))
    first = x.ndim == 4 and x.shape[1] in (1, 3)
    latents = x.ndim == 4 and x.dtype.kind == "f" and not last and not first
    if last + first + latents != 1 or not x.size or x.dtype != np.uint8 and x.dtype.kind != "f":
        found = f"{key} is {x.dtype} {x.shape}" if key else f"no array of {shapes} holds images"
        raise UserError(f"{found}. Store images as uint8 (N,H,W,C) with C = 1 or 3.")
    scale, offset = (1, 0) if latents or x.dtype == np.uint8 else float_range(x)
    def read(i):
        if latents: return np.asarray(x[i])
        image = x[i] if x.dtype == np.uint8 else np.round(x[i] * scale + offset).astype(np.uint8)
        if first: image = image.transpose(1, 2, 0)
        return Image.fromarray(np.ascontiguousarray(image[:, :, 0] if image.shape[2:] == (1,) else image))
    vectors = [] if classes == "none" else [
        k for k in shapes if k != key and len(shapes[k]) in (1, 2)
        and k not in ("mu", "sigma", "mu_s", "sigma_s")]   # statistics in ADM's reference batches
    fits = [k for k in vectors if shapes[k][0] == len(x)]
    if vectors and not fits:
        raise UserError(f"{vectors[0]} {shapes[vectors[0]]} has no label for each of {len(x):,} images. "
                        "Correct it, or pass --classes none.")
    choices = fits if images else candidates
    if bool(images) != bool(labels) and len(choices) > 1:   # one is typed: "train" must not guess the other
        flag = "--labels KEY, or pass --classes none" if images else "--images KEY"
        raise UserError(f"found {shapes}. Choose what belongs to {images or labels} with {flag}.")
    label_key = choose("--labels KEY", labels, fits, shapes)
    y = arrays[label_key] if label_key else None
    if y is not None and y.shape[1:] == (1,): y = y[:, 0]
    if y is not None and (y.shape != x.shape[:1] or too_many_classes(len(np.unique(y)), len(x))):
        raise UserError(f"{label_key}, {y.dtype} {y.shape}, does not hold one class for each of {len(x):,} "
                        "images. Choose with --labels KEY, or pass --classes none.")
    return Source(path, [f"image {i}" for i in range(len(x))], read, y, class_names, latents)


def too_many_classes(classes, images):
    """True for labels that number the images rather than the classes"""
    return classes > max(20, images // 2)


def float_range(x):
    """-> scale and offset that map float pixels to 0..255"""
    chunks = [x[i:i + 256] for i in range(0, len(x), 256)]
    low, high = np.min([chunk.min() for chunk in chunks]), np.max([chunk.max() for chunk in chunks])
    if 0 <= low < 0.1 and 0.9 < high <= 1.001: return 255, 0           # 1.001: rounding errors
    if -1.001 <= low < -0.9 and 0.9 < high <= 1.001: return 127.5, 127.5
    raise UserError(f"floats in [{low:.4g}, {high:.4g}] are not pixels in [0, 1] or [-1, 1]. Store uint8.")


def open_hub(path, classes, images, labels):
    """hf:NAME[:SPLIT[:CONFIG]] or hf:FOLDER[:SPLIT]"""
    try: import datasets
    except ImportError: raise UserError("the package datasets is missing. Run `pip install datasets`.")
    name, split, config, *more = [*path.removeprefix("hf:").split(":"), "", ""]
    saved = any(os.path.isfile(f"{name}/{file}.json") for file in ("dataset_dict", "state"))
    if any(more) or saved and config: raise UserError("give hf:NAME[:SPLIT[:CONFIG]] or hf:FOLDER[:SPLIT].")
    data = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, config or None)
    if isinstance(data, dict): data = data[choose("hf:NAME:SPLIT", split, list(data), list(data))]
    kinds = {key: type(feature).__name__ for key, feature in data.features.items()}
    images = choose("--images KEY", images, [k for k in kinds if kinds[k] == "Image"], kinds)
    if not images: raise UserError(f"no column of {kinds} holds images. Choose with --images KEY.")
    candidates = [k for k in kinds if kinds[k] == "ClassLabel" and classes != "none"]
    labels = choose("--labels KEY", labels, candidates, kinds)
    if not labels and classes != "none":
        print(f"no ClassLabel among the columns {kinds}, so no classes; --labels KEY chooses a column")
    return Source(path, [f"image {i}" for i in range(len(data))], lambda i: data[i][images],
                  list(data[labels]) if labels else None, getattr(data.features.get(labels), "names", ()))


def open_source(path, classes="auto", images=None, labels=None):
    """Open images or latents in any form, without decoding them.

    path            as SOURCE in the docstring of this file
    classes         "auto": the labels of the source; "folders": the top-level folders; "none": no labels
    images, labels  keys of arrays of an .npz, or columns of a Hugging Face dataset
    -> Source with len(), names, labels and read(i). Raises UserError."""
    archive, lower = re.match(r"(?i)(.+?\.zip)(?:/+(.*))?$", path), path.lower()
    try:
        if path.startswith("hf:"): return open_hub(path, classes, images, labels)
        if lower.endswith(".npz"):
            return open_arrays(path, npz_arrays(path), classes, images, labels)
        if archive and os.path.isfile(archive[1]):
            z, start = zipfile.ZipFile(archive[1]), archive[2].rstrip("/") + "/" if archive[2] else ""
            members = {name.replace("\\", "/"): name for name in z.namelist()}
            files = {name.removeprefix(start): lambda member=member: io.BytesIO(z.read(member))
                     for name, member in members.items() if name.startswith(start) and name != start}
            if start and not files:
                found = sorted({name.split("/")[0] for name in members})[:4]
                raise UserError(f"there is no folder {start} in the zip, which has {', '.join(found)}.")
        elif not os.path.exists(path): raise UserError("does not exist here. Download it, or correct SOURCE.")
        elif os.path.isdir(path):
            files = {name: lambda name=name: open(Path(path, name), "rb") for name in list_folder(path)}
        elif lower.endswith(".npy"):
            arrays = {"images": np.load(path, mmap_mode="r", allow_pickle=False)}
            return open_arrays(path, arrays, classes, images, labels)
        elif re.fullmatch(IDX, path):
            beside = re.sub(r"(?i)images([-.])idx3", r"labels\1idx1", path)
            files = {os.path.basename(name): lambda name=name: open(name, "rb")
                     for name in {path, beside} if os.path.isfile(name)}
        elif Path(path).suffix.lower() in PICTURES: raise UserError("is one image. Give its folder.")
        elif tarfile.is_tarfile(path):
            tar = tarfile.open(path)
            files = {m.name: lambda m=m: tar.extractfile(m) for m in itertools.islice(tar, 100)
                     if re.fullmatch(CIFAR, posixpath.basename(m.name))}
            if not files:
                raise UserError("is not the python archive of CIFAR-10. Unpack it, or for CIFAR-100 give "
                                "hf:uoft-cs/cifar100.")
        else: raise UserError("is not a folder, .zip, .npz, .npy, CIFAR-10 archive or idx file. Unpack it.")
        return open_files(path, files, classes, images, labels)
    except UserError as e: raise UserError(f"{path}: {e}")
    except PermissionError as e: raise UserError(f"{path} cannot be read ({e}). Change its permissions.")
    except Exception as e:                 # damaged files raise anything
        advice = ", with labels that are integers or text" if "Object arrays" in str(e) else ""
        raise UserError(f"{path} cannot be read ({e!r}). Download or create it again{advice}.")


# === images =================================================================================================

class DoesNotFit(ValueError):
    """A sample can be decoded, so --skip-bad keeps it, but not be stored with the others."""


def in_order(source, convert, workers=1, skip_bad=False):
    """Yield (i, convert(sample i)) in order, from a pool of threads: Pillow decodes without Python's lock. A
    sample that fails raises UserError, or is printed and left out. Shows its progress."""
    def attempt(i):
        try: return convert(source.read(i))
        except MemoryError: raise
        except Exception as e:             # image libraries raise anything
            if isinstance(e, NotImplementedError) or "encrypted" in str(e):  # Deflate64, a password
                raise UserError(f"{source.path}: {source.names[i]} cannot be read ({e}). Unpack the zip.")
            error = UserError(f"{source.path}: {source.names[i]} cannot be used ({e!r}).")
            error.can_be_skipped = not isinstance(e, DoesNotFit)
            return error
    with ThreadPoolExecutor(workers) as pool:
        results = (result for start in range(0, len(source), 256)      # read at most 256 ahead
                   for result in pool.map(attempt, range(start, min(start + 256, len(source)))))
        for i, result in enumerate(sample.progress(results, len(source), size=lambda _: 1)):
            if not isinstance(result, UserError): yield i, result
            elif skip_bad: print(f"left out: {result}")
            elif not result.can_be_skipped: raise UserError(f"{result} Remove it.")
            else: raise UserError(f"{result} Remove it (prepare_data.py --skip-bad leaves out such files).")


def without_bad(source, workers):
    """Decode all samples once -> the Source of those that can be decoded"""
    def decode(x):
        if not source.latents: to_pixels(x, None, 3)
        elif not np.isfinite(x).all(): raise ValueError("not finite")
    good = [i for i, _ in in_order(source, decode, workers, skip_bad=True)]
    if not good: raise UserError(f"{source.path}: nothing can be decoded. Give another SOURCE.")
    labels = None if source.labels is None else [source.labels[i] for i in good]
    skipped = source.skipped | {"not decodable": len(source) - len(good)}
    return replace(source, names=[source.names[i] for i in good], read=lambda i: source.read(good[i]),
                   labels=labels, skipped=skipped)


def survey(source, workers=1):
    """The sizes of all images -> {(width, height): name of one such image}, whether all are grey"""
    def header(image):
        turned = orientation(image) >= 5 and image.format != "TIFF"                # Pillow turns a TIFF
        grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I;16")
        return image.size[::-1] if turned else image.size, grey
    sizes, all_grey = {}, True
    for i, (size, grey) in in_order(source, header, workers):
        sizes.setdefault(size, source.names[i])
        all_grey = all_grey and grey
    return sizes, all_grey


def image_batches(source, batch=64, rank=0, world=1):
    """Yield the images of a Source as uint8 arrays (n,H,W,C), as they are: without a crop and in their order.

    C is 1 if all images are grey, else 3. Process `rank` of `world` yields batches rank, rank + world, ...;
    all processes together yield every image once. n is `batch`, and may be smaller in the last batch.
    Raises UserError for images of two sizes, a damaged image, or latents."""
    if source.latents: raise UserError(f"{source.path} holds latents, not images. Decode them first.")
    workers = min(8, os.cpu_count())
    sizes, grey = survey(source, workers)
    if len(sizes) > 1:
        (a, first), (b, second) = list(sizes.items())[:2]
        raise UserError(f"{source.path}: {first} has {a[0]}x{a[1]} pixels, and {second} has {b[0]}x{b[1]}. "
                        "Use images of one size.")
    for start in range(rank * batch, len(source), world * batch):
        part = Source(source.path, source.names[start:start + batch], lambda i: source.read(start + i))
        images = in_order(part, lambda image: to_pixels(image, None, 1 if grey else 3), workers)
        yield np.stack([x for _, x in images])


def centre_crop(image, size):
    """ADM's crop: halve with a box filter while twice the size remains, resize the shorter side with a
    bicubic filter, crop the middle. PIL image -> PIL image of size x size"""
    while min(image.size) >= 2 * size: image = image.resize([side // 2 for side in image.size], Image.BOX)
    scale = size / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.BICUBIC)
    left, top = [(side - size) // 2 for side in image.size]
    return image.crop((left, top, left + size, top + size))


def lanczos_crop(image, size):
    """Crop the middle, resize it with a Lanczos filter. PIL image -> PIL image of size x size"""
    return ImageOps.fit(image, (size, size), Image.LANCZOS)


def orientation(image):
    """EXIF's number for how to turn an image; 1, as it is, if its EXIF data are damaged"""
    try: return image.getexif().get(0x0112, 1)
    except (SyntaxError, ValueError, struct.error): return 1


def to_pixels(image, size, channels, background="white", crop=centre_crop, turn=True):
    """PIL image of any mode -> uint8 (H,W,channels). size: None to keep the image, or the side of the square
    that crop(image, size) makes. turn: as its EXIF data say"""
    if size and image.width * image.height > 2 ** 26: image.draft(None, (2 * size, 2 * size))    # large JPEG
    image.load()                                           # also turns a TIFF
    if turn and (how := orientation(image)) in TURNS: image = image.transpose(TURNS[how])
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"): raise ValueError(f"pixels of mode {image.mode} have no fixed range")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, background)
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    image = image.convert("L" if channels == 1 else "RGB")
    if size: image = crop(image, size)
    return np.asarray(image).reshape(image.height, image.width, channels)


def index_labels(source):
    """Integers >= 0, or strings -> int64 (N,) in 0..K-1 without gaps, names of the K classes. Numbers are
    sorted numerically, also in strings ("9" before "10"). Other strings are sorted alphabetically."""
    values, names = np.asarray(source.labels), source.class_names
    is_text = values.dtype.kind == "U"
    fits = values.ndim == 1 and values.dtype.kind in ("iu" if len(names) else "iuU")
    if not fits or not is_text and values.min() < 0:
        example = values.min() if values.dtype.kind in "if" else values.flat[0]
        raise UserError(f"{source.path}: labels are {values.dtype} such as {example}, not integers from 0 on "
                        "or strings. Choose others with --labels KEY, or pass --classes none.")
    unique, y = np.unique(values, return_inverse=True)
    if len(names) and unique[-1] >= len(names):
        raise UserError(f"{source.path}: label {unique[-1]} has no name, there are {len(names)} class_names. "
                        "Correct class_names, or pass --classes none.")
    if is_text and all(re.fullmatch(r"\d+", value) for value in unique):
        order = np.argsort([int(value) for value in unique], kind="stable")
        unique, y = unique[order], np.argsort(order)[y]
    return y.astype(np.int64), [str(names[k] if len(names) else k) for k in unique]


@torch.no_grad()
def encode_images(vae, pixel_range, images):
    """uint8 (n,H,W,3) -> fp32 (n,2C,h,w), means and deviations of the latents, not scaled. vae: diffusers'
    AutoencoderKL for pixels in pixel_range"""
    low, high = pixel_range
    x = torch.from_numpy(images).to(vae.device).permute(0, 3, 1, 2).float() / 255
    z = vae.encode(x * (high - low) + low).latent_dist
    return torch.cat([z.mean, z.std], 1).float().cpu().numpy()


# === output =================================================================================================

def stored_chunks(samples, flip, encode, C, dtype, totals):
    """Yield arrays (n, ...) in the form that is stored, and add up statistics of the pixels or latents."""
    while batch := list(itertools.islice(samples, 16)):
        x = np.stack([x for _, sample in batch for x in ([sample, sample[:, ::-1]] if flip else [sample])])
        if encode: x = encode(x)
        with np.errstate(over="ignore"): stored = x.astype(dtype)
        if not np.isfinite(stored).all():
            advice = "Pass --fp32." if np.isfinite(x).all() else "Remove them, or pass --skip-bad."
            raise UserError(f"latents {batch[0][0]}-{batch[-1][0]} are not finite in {dtype}. {advice}")
        totals["largest"] = max(totals["largest"], x.max())
        if C:
            totals["count"] += x[:, 0].size
            totals["sum"] = totals["sum"] + x[:, :C].sum((0, 2, 3), dtype=np.float64)
            squares = (x.astype(np.float64) ** 2).sum((0, 2, 3))       # of the means and of the deviations
            totals["squares"] = totals["squares"] + squares.reshape(-1, C).sum(0)
        yield stored


def check(path):
    """Verify a prepared .npz, and print what it holds. -> model.Data, names of its classes"""
    path = model.find_data(str(path), "--check")[2]
    data = model.Data(path)
    try:
        keys, info = verified_keys(path), model.read_info(path)[1]
        names = model.npz_array(path, "class_names") if "class_names" in keys else range(data.classes)
    except Exception as e:                 # damaged files raise anything
        raise UserError(f"{path} is damaged ({e!r}). Prepare it again.")
    counts = [f"{k} {n:,}" for k, n in zip(names, np.bincount(data.labels.numpy()))] if data.classes else []
    print(f"{data}, {os.path.getsize(path):,} bytes, checksums correct")
    if counts: print(", ".join(counts[:20] + ["..."] * (len(counts) > 20)))
    print(f"info: {info}")
    return data, [str(name) for name in names]


def contact_sheet(path, data, class_names, decode=None):
    """Draw a line of images for each of at most 20 classes. Without classes: images in equal distances."""
    height, width = (6, 4) if decode else (20, 10)
    spread = lambda n, count: np.unique(np.linspace(0, n - 1, count).astype(int))
    if data.labels is None:
        chosen = spread(len(data), height * width)
        lines = [("", chosen[i:i + width]) for i in range(0, len(chosen), width)]
    else:
        lines = []
        for k in spread(len(class_names), height):
            name, members = class_names[k], np.flatnonzero(data.labels == k)
            if not name or not name.isascii(): name = f"class {k}"     # the font has ASCII only
            lines.append((name[:40], members[spread(len(members), width)]))
    images = [np.stack([data.array[i] for i in indices]) for _, indices in lines]
    if decode: images = [decode(latents) for latents in images]
    side = 128 if decode else min(128, data.shape[1] * max(1, 64 // data.shape[1]))
    model.save_grid(path, images, [name for name, _ in lines], side)
    print(f"{path}: contact sheet")


# === command line ===========================================================================================

def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=model.Help)
    p.add_argument("source", metavar="SOURCE", nargs="?", help="images in any form")
    p.add_argument("--data", metavar="NAME", default="", help=f"one of {', '.join(DATASETS)}, or a new name")
    p.add_argument("--size", type=int, help="side of the images of a custom dataset, which are cropped and "
                   "resized as ADM does (default: that of the images, which have to be equal squares)")
    p.add_argument("--classes", choices=["auto", "folders", "none"], default="auto", help="where labels are")
    p.add_argument("--images", metavar="KEY", help="array of an .npz, or column of a Hugging Face dataset")
    p.add_argument("--labels", metavar="KEY", help="the same for labels")
    p.add_argument("--grey", action="store_true", help="convert colour images to one channel")
    p.add_argument("--background", default="white", metavar="COLOR", help="colour behind transparent pixels")
    p.add_argument("--flip", action="store_true", help="add a mirrored copy of every image")
    p.add_argument("--vae", metavar="PATH", help="autoencoder (diffusers), to encode images or draw latents")
    p.add_argument("--pixel-range", type=int, nargs=2, metavar=("LOW", "HIGH"),
                   help="pixels of the autoencoder of a custom dataset: 0 1 as EDM2, or -1 1 as SiT")
    p.add_argument("--fp32", action="store_true", help="store latents in fp32, not in fp16")
    p.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be decoded (slower)")
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count()), help="threads that decode images")
    p.add_argument("--overwrite", action="store_true", help="replace an existing file")
    p.add_argument("--check", metavar="FILE", help="verify a prepared .npz and print what it contains")
    args = p.parse_args()
    if args.check and args.source: raise UserError("--check FILE takes no SOURCE. Remove one of the two.")
    if args.check: return args
    if not args.source or not re.fullmatch(r"(?!.*\.(npz|npy|zip|tar|gz|tgz)$)\w[\w.-]*", args.data):
        raise UserError(f"SOURCE is '{args.source or ''}' and NAME is '{args.data}'. Give both, and a NAME "
                        "without folder and suffix: prepare_data.py photos/ --data photos.")
    try: ImageColor.getrgb(args.background)
    except ValueError: raise UserError(f"--background {args.background} is not a colour. Use #rrggbb.")
    if args.classes == "none" and args.labels:
        raise UserError("--labels has no effect with --classes none. Remove one of the two.")
    if args.workers < 1: raise UserError(f"--workers is {args.workers}. Use 1 or more.")
    return args


def check_flags(args, config, source, K):
    """Refuse flags that have no effect, and a source that does not fit the dataset."""
    latents = source.latents or args.vae
    for flags, reason in [("size grey pixel_range", config and f"with --data {args.data}"),
                          ("fp32 pixel_range", not latents and "on pixels"),
                          ("grey", latents and "on latents"),
                          ("size flip", source.latents and "on latents")]:
        for flag in flags.split():
            if reason and getattr(args, flag):
                raise UserError(f"--{flag.replace('_', '-')} has no effect {reason}. Remove it.")
    if config and bool(latents) != ("latents" in config):
        expected = "latents" if "latents" in config else "pixels"
        advice = ("Give images" if source.latents else "Leave out --vae" if args.vae else
                  "Encode images with --vae PATH")
        raise UserError(f"{args.data} holds {expected}, and this would store the other kind. {advice}, or "
                        "choose another NAME.")
    if not config and too_many_classes(K, len(source)):
        raise UserError(f"{args.source} has {K:,} classes for {len(source):,} images. Pass --classes none, "
                        "or choose labels of fewer classes.")
    if config and config["classes"] not in (0, K):
        raise UserError(f"{args.source} has {K:,} classes, and {args.data} has {config['classes']:,}. Give a "
                        "folder for each class, or choose another NAME for a custom dataset.")
    if latents and not config and args.pixel_range not in ([0, 1], [-1, 1]):
        raise UserError("Latents need the pixel range of their autoencoder. Pass --pixel-range 0 1 (as EDM2) "
                        "or --pixel-range -1 1 (as SiT).")


def image_shape(args, config, source):
    """-> side and number of channels of the images that are stored or encoded"""
    if config:
        channels, side, _ = config["shape"]
        return (8 * side, 3) if "latents" in config else (side, channels)
    sizes, grey = survey(source, args.workers)
    widths, heights = zip(*sizes)
    shortest, multiple = min(widths + heights), 32 if args.vae else 4
    size = shortest if args.size is None else args.size
    if size < 1 or size % multiple or args.size is None and set(sizes) != {(size, size)}:
        usable = max(multiple, min(64, 2 ** int(math.log2(shortest))))
        flag = "" if args.size is None else f", and --size is {args.size}"
        raise UserError(f"{source.path}: the images are {min(widths)} to {max(widths)} pixels wide and "
                        f"{min(heights)} to {max(heights)} high{flag}. Squares with a side divisible by "
                        f"{multiple} are needed. Crop and resize with --size, such as --size {usable}.")
    return size, 1 if args.grey or grey and not args.vae else 3


def latent_shape(source):
    """-> shape of the latents (C,H,W) or (2C,H,W), number of channels C"""
    _, z = next(in_order(replace(source, names=source.names[:1]), np.asarray))
    if z.dtype == np.uint8:
        raise UserError(f"{source.path}: {source.names[0]} is {z.dtype} {z.shape}, an image or several. "
                        "Store images as PNG, or all in one .npz.")
    if z.ndim != 3 or z.dtype.kind != "f" or z.shape[1] != z.shape[2] or z.shape[1] % 4:
        raise UserError(f"{source.path}: {source.names[0]} is {z.dtype} {z.shape}. Give latents (C,H,W), "
                        "H = W divisible by 4, or images as uint8 (N,H,W,C).")
    low = 0 if len(z) == 4 else -1
    if len(z) in (1, 3, 4) and low <= z.min() < z.max() <= 1:
        raise UserError(f"{source.path}: {source.names[0]} has values in [{low}, 1], like pixels, not "
                        "latents. Store images as PNG, or all in one .npz, uint8 (N,H,W,C).")
    half = len(z) // 2
    moments = len(z) == 2 * half and (z[half:] > 0).all()              # standard deviations are positive
    return z.shape, half if moments else len(z)


def warn_of_differences(args, config, source, class_names):
    """Print where a dataset of DATASETS would differ from the one of published results and teachers."""
    expected = TRAINING_IMAGES.get(args.data)
    if expected and len(source) != expected:
        print(f"warning: the training set of {args.data} is {expected:,} images, and SOURCE has "
              f"{len(source):,}. Results will not compare with published ones.", flush=True)
    of_imagenet = config["classes"] == 1000 and not args.source.startswith("hf:")
    if of_imagenet and not all(re.fullmatch(r"n\d{8}|\d+", name) for name in class_names):
        print(f"warning: the classes of {args.data} are numbered by WordNet id (n01440764 is 0). Name the "
              "folders by these ids, or no public teacher fits the labels.", flush=True)
    if args.vae and Path(args.vae).name != Path(config["latents"]["vae"]).name:
        print(f"warning: the teachers of {args.data} use latents of {config['latents']['vae']}. If --vae "
              f"{args.vae} is another autoencoder, its latents do not fit them.", flush=True)


def latent_statistics(source, totals):
    """totals: the sums of `stored_chunks` -> {"mean": [C numbers], "scale": [C numbers]}
    (z - mean) * scale has a standard deviation of 0.5 in every channel."""
    mean = totals["sum"] / totals["count"]
    variance = totals["squares"] / totals["count"] - mean ** 2
    if variance.min() <= 0: raise UserError(f"{source.path}: a channel of the latents is constant.")
    return {"mean": mean.tolist(), "scale": (0.5 / np.sqrt(variance)).tolist()}


def main():
    if hasattr(sys.stdout, "reconfigure"): sys.stdout.reconfigure(errors="backslashreplace")   # odd names
    args = arguments()
    if args.check: return check(args.check)
    config, out = DATASETS.get(args.data), Path("data", f"{args.data}.npz")
    sheet = Path("data", f"{args.data}.png")
    for file in (out, sheet):
        if file.exists() and not args.overwrite:
            raise UserError(f"{file} exists. Pass --overwrite to replace it, or choose another NAME.")
    warnings.filterwarnings("ignore", module="PIL")
    if config and not config["classes"] and args.classes == "auto": args.classes = "none"
    source = open_source(args.source, args.classes, args.images, args.labels)
    if args.skip_bad: source = without_bad(source, args.workers)
    kind = "latents" if source.latents else "images"
    print(f"{args.source}: {len(source):,} {kind}; other files: {source.skipped}", flush=True)
    shape, C = latent_shape(source) if source.latents else (None, None)
    y, class_names = (None, []) if source.labels is None else index_labels(source)
    check_flags(args, config, source, len(class_names))
    if config: warn_of_differences(args, config, source, class_names)
    if config and not config["classes"] and y is not None:
        print(f"{args.data} has no classes; the labels are left out")
        y = None

    # what is stored: pixels (C is None), or latents of C channels
    info = {"source": args.source, "date": str(datetime.date.today()), "samples": len(source),
            "skipped": source.skipped}
    if not source.latents:
        size, channels = image_shape(args, config, source)
        crop = lanczos_crop if args.data in LANCZOS else centre_crop
        info |= {"size": size, "crop": "center", "flip": args.flip}
        shape = size, size, channels
    resized, enlarged = [], []             # an entry for each such image
    def convert(sample):
        if source.latents and sample.shape != shape: raise DoesNotFit(f"shape {sample.shape}, not {shape}")
        if source.latents and (sample[C:] < 0).any(): raise DoesNotFit("a standard deviation is negative")
        if source.latents: return sample
        if sample.size != (size, size): resized.append(1)
        if min(sample.size) < size: enlarged.append(1)
        return to_pixels(sample, size, channels, args.background, crop, turn=not config)
    pixel_range = config["latents"]["pixel_range"] if config and "latents" in config else args.pixel_range
    vae = None
    if args.vae: vae = sample.load_vae(args.vae, model.setup(one_process=True)[2])       # sets TF32 off, too
    encode = None
    if vae and not source.latents:
        encode = functools.partial(encode_images, vae, pixel_range)
        info["encoder"] = args.vae
        shape = encode(np.zeros((1, *shape), np.uint8)).shape[1:]
        C = shape[0] // 2
    if config and C and (C, *shape[1:]) != tuple(config["shape"]):
        raise UserError(f"{args.source}: the latents are {(C, *shape[1:])}, and {args.data} needs "
                        f"{config['shape']}. Choose another NAME. (Latents with variance are means and "
                        "standard deviations, not log-variances.)")
    dtype = np.dtype(np.uint8 if not C else np.float32 if args.fp32 else np.float16)
    full_shape = len(source) * (1 + args.flip), *shape
    try: out.parent.mkdir(exist_ok=True)
    except OSError as e: raise UserError(f"the folder data cannot be made ({e}). Make it, or link it.")
    out = Path(os.path.realpath(out))      # a link to another disk stays a link
    needed, free = math.prod(full_shape) * dtype.itemsize, shutil.disk_usage(out.parent).free
    if 0 < free < needed:                  # some network disks say 0
        raise UserError(f"{out} needs {needed:,} bytes; {free:,} are free. Free some space.")

    totals = defaultdict(float)
    def finish():
        if enlarged: print(f"{len(enlarged):,} images are smaller than {size} pixels and were enlarged")
        if not source.latents:
            info["filter"] = "as in SOURCE" if not resized else "Lanczos" if crop is lanczos_crop else "ADM"
            if args.data == "imagenet64" and not resized:
                print("warning: these images had 64x64 pixels already. If they were made with EDM's Lanczos "
                      "filter instead of ADM's, public teachers of imagenet64 and FID's usual reference do "
                      "not fit them.")
        if not C and totals["largest"] < 32:
            raise UserError(f"{args.source}: all pixels are nearly black, at most {totals['largest']}. Scale "
                            "them to 0..255.")
        if C:
            measured = latent_statistics(source, totals) | {"pixel_range": pixel_range}
            info["latents"] = {"vae": args.vae} | (config["latents"] if config else measured)
        arrays = {} if y is None else {"arr_1": np.repeat(y, 1 + args.flip), "class_names": class_names}
        return arrays | {"info": json.dumps(info)}
    samples, begin = in_order(source, convert, args.workers), time.time()
    chunks = stored_chunks(samples, args.flip, encode, C, dtype, totals)
    sample.write_npz(out, full_shape, dtype, chunks, finish)
    print(f"{len(source):,} {kind} in {time.time() - begin:,.1f} s")
    data, class_names = check(out)
    if C and not args.vae:
        sheet.unlink(missing_ok=True)      # of the data that were replaced
        return print("There is no contact sheet: pass --vae PATH to decode latents.")
    @torch.no_grad()
    def decode(z):
        scaled = model.to_network(torch.from_numpy(z[:, :C]).float().to(vae.device), info)
        return sample.to_images(scaled, info, vae)
    contact_sheet(sheet, data, class_names, decode if C else None)


if __name__ == "__main__":
    model.run(main)
