"""tools/prepare_data.py: sources of every kind give the pixels and labels that were put in. Bad input is
refused in one line and leaves no file."""
import contextlib, gzip, io, json, os, pickle, stat, struct, sys, tarfile, tracemalloc, types, zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import model, prepare_data, sample

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
LABELS = np.arange(12) % 3


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """prepare("folder", "--size", 8) -> code, out, err, and the arrays of data/n.npz after success"""
    monkeypatch.chdir(tmp_path)
    def call(*args):
        args = [str(arg) for arg in args]
        if not {"--data", "--check"} & set(args): args += ["--data", "n"]
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *args])
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try: model.run(prepare_data.main)
            except SystemExit as e: code = e.code
        arrays = {}
        if code == 0 and "--check" not in args:
            name = args[args.index("--data") + 1]
            with np.load(f"data/{name}.npz", allow_pickle=False) as z: arrays = dict(z)
            arrays["info"] = json.loads(str(arrays["info"]))
        return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue(), **arrays)
    return call


def refused(done, *words):
    """One line with all these words, exit code 2, no output file"""
    assert done.code == 2 and len(done.err.strip().splitlines()) == 1, done.err
    assert all(word in done.err for word in words), done.err
    assert not list(Path("data").glob("*")) if Path("data").exists() else True


def save(path, image, **options):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)


def class_tree(root="photos", names=("cat", "dog", "emu")):
    for i, x in enumerate(PIXELS): save(f"{root}/{names[LABELS[i]]}/{i:02d}.png", x)
    return root


def png(x):
    file = io.BytesIO()
    Image.fromarray(x).save(file, "PNG")
    return file.getvalue()


# --- sources ------------------------------------------------------------------------------------------------

def test_class_folders_and_their_zip_are_the_same(prepare):
    class_tree("wrap/photos")
    for junk in ("._00.png", ".DS_Store", "Thumbs.db"): Path("wrap/photos/cat", junk).write_bytes(b"junk")
    os.makedirs("wrap/photos/empty class")
    os.makedirs("wrap/photos/.ipynb_checkpoints")
    save("wrap/photos/.ipynb_checkpoints/00.png", PIXELS[0])
    os.symlink("..", "wrap/photos/cat/cycle")
    os.symlink("../cat/00.png", "wrap/photos/dog/99.png")
    Path("wrap/photos/README.txt").write_text("not a table")
    with zipfile.ZipFile("photos.zip", "w") as z:
        for folder, _, files in os.walk("wrap"):
            for name in files: z.write(f"{folder}/{name}")
    folder, zipped = prepare("wrap", "--data", "a"), prepare("photos.zip", "--data", "b", "--workers", 3)
    assert folder.code == zipped.code == 0, folder.err + zipped.err
    for key in ("arr_0", "arr_1", "class_names"):
        assert np.array_equal(getattr(folder, key), getattr(zipped, key))
    assert folder.class_names.tolist() == ["cat", "dog", "emu"] and folder.arr_1.dtype == np.int64
    order = [*np.flatnonzero(LABELS == 0), *np.flatnonzero(LABELS == 1), 0, *np.flatnonzero(LABELS == 2)]
    assert np.array_equal(folder.arr_0, PIXELS[order])
    assert "empty class" in folder.out and "cat 4, dog 5, emu 4" in folder.out
    assert folder.info["skipped"] == zipped.info["skipped"] | {"hidden": folder.info["skipped"]["hidden"]}
    assert folder.info["skipped"][".txt"] == 1
    sheet = Image.open("data/a.png")
    assert sheet.height > 3 * 64 and np.asarray(sheet)[:, -2:].min() == 255               # nothing is clipped


def test_edm_zip_at_any_depth(prepare):
    for wrap, labels in ("", LABELS), ("a/b/", LABELS), ("", None):
        with zipfile.ZipFile("edm.zip", "w") as z:
            names = [f"00000/img{i:08d}.png" for i in range(12)]
            for name, x in zip(names, PIXELS): z.writestr(wrap + name, png(x))
            listed = None
            if labels is not None: listed = [[name, 7 * int(k)] for name, k in zip(names, labels)][::-1]
            z.writestr(f"{wrap}dataset.json", json.dumps({"labels": listed}))
        done = prepare("edm.zip", "--overwrite")
        assert done.code == 0 and np.array_equal(done.arr_0, PIXELS), done.err
        if listed is None: assert not hasattr(done, "arr_1") and "0 classes" in done.out
        else: assert np.array_equal(done.arr_1, LABELS) and done.class_names.tolist() == ["0", "7", "14"]


def test_part_of_a_zip_and_windows_separators(prepare):
    with zipfile.ZipFile("all.zip", "w") as z:
        for i, x in enumerate(PIXELS):
            for part in ("train", "val"):
                info = zipfile.ZipInfo()
                info.filename = f"set\\{part}\\{'ab'[i % 2]}\\{i:02d}.png"
                z.writestr(info, png(x))
    refused(prepare("all.zip"), "train, val", "--classes none", "all.zip/set/train")
    assert prepare("all.zip/set/train/").arr_0.shape == (12, 16, 16, 3)
    assert prepare("all.zip", "--classes", "folders", "--data", "f").class_names.tolist() == ["train", "val"]


def cifar_folder(folder="cifar-10-batches-py"):
    os.makedirs(folder)
    x = PIXELS.repeat(2, 1).repeat(2, 2).transpose(0, 3, 1, 2).reshape(12, -1)
    batches = {f"data_batch_{i}": {b"data": x[i::2], b"labels": LABELS[i::2].tolist()} for i in (0, 1)}
    batches["test_batch"] = batches["data_batch_0"]
    batches["batches.meta"] = {b"label_names": [b"cat", b"dog", b"emu"]}
    for name, batch in batches.items(): Path(folder, name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


def test_cifar_archive_runs_no_code(prepare):
    folder = cifar_folder()
    with tarfile.open("cifar-10-python.tar.gz", "w:gz") as tar: tar.add(folder)
    for source in (folder, "cifar-10-python.tar.gz", "."):
        done = prepare(source, "--overwrite")
        assert done.code == 0 and done.arr_0.shape == (12, 32, 32, 3), done.err
        assert np.array_equal(done.arr_0[:, ::2, ::2], np.concatenate([PIXELS[::2], PIXELS[1::2]]))
        assert np.array_equal(done.arr_1, np.concatenate([LABELS[::2], LABELS[1::2]]))
    assert not hasattr(prepare(folder, "--data", "cifar10"), "arr_1")              # a dataset without classes
    class Evil:
        def __reduce__(self): return os.mkdir, ("evil",)
    Path(folder, "data_batch_1").write_bytes(pickle.dumps(Evil()))
    done = prepare(folder, "--overwrite")
    assert done.code == 2 and "mkdir" in done.err and not Path("evil").exists()


def test_mnist_files(prepare):
    def write(path, x):
        with (gzip.open if path.endswith("gz") else open)(path, "wb") as f:
            f.write(struct.pack(f">HBB{x.ndim}I", 0, 8, x.ndim, *x.shape) + x.astype(np.uint8).tobytes())
    os.makedirs("raw")
    write("raw/train-images-idx3-ubyte.gz", PIXELS[..., 0])
    write("raw/train-labels-idx1-ubyte.gz", LABELS)
    write("raw/t10k-images.idx3-ubyte", PIXELS[:5, ..., 1])
    write("raw/t10k-labels.idx1-ubyte", LABELS[:5])
    done = prepare("raw")
    assert "train-images" in done.out and (done.arr_1 == LABELS).all()
    assert np.array_equal(done.arr_0, PIXELS[..., :1])
    done = prepare("raw/t10k-images.idx3-ubyte", "--overwrite")
    assert np.array_equal(done.arr_0, PIXELS[:5, ..., 1:2]) and (done.arr_1 == LABELS[:5]).all()


UNIT = (PIXELS / 255).astype("f")

@pytest.mark.parametrize("arrays, flags", [
    ({"arr_0": PIXELS, "arr_1": LABELS}, []),
    ({"x": PIXELS.transpose(0, 3, 1, 2), "y": LABELS[:, None]}, []),
    ({"x_train": PIXELS, "x_test": PIXELS[:3], "y_train": LABELS, "y_test": LABELS[:3]}, []),
    ({"x": PIXELS, "fine": LABELS, "coarse": LABELS // 2}, ["--labels", "fine"]),
    ({"a": PIXELS, "b": PIXELS[::-1], "y": LABELS.astype(np.uint8) * 5 + 1}, ["--images", "a"]),
    ({"x": UNIT, "y": LABELS}, []), ({"x": UNIT.transpose(0, 3, 1, 2) * 2 - 1, "y": LABELS}, [])])
def test_arrays(prepare, arrays, flags):
    for write in (np.savez, np.savez_compressed):
        write("a.npz", **arrays)
        done = prepare("a.npz", *flags, "--overwrite")
        assert done.code == 0, done.err
        assert np.array_equal(done.arr_0, PIXELS) and (done.arr_1 == LABELS).all()


def test_hub(prepare, monkeypatch):
    class Feature: names = ["cat", "dog", "emu"]
    Picture, ClassLabel = (type(name, (Feature,), {}) for name in ("Image", "ClassLabel"))
    class Rows:
        features = {"picture": Picture(), "animal": ClassLabel()}
        def __len__(self): return 12
        def __getitem__(self, k):
            return LABELS.tolist() if k == "animal" else {"picture": Image.fromarray(PIXELS[k])}
    hub = types.ModuleType("datasets")
    configs = []
    hub.load_dataset = lambda name, config: configs.append(config) or {"train": Rows(), "test": None}
    monkeypatch.setitem(sys.modules, "datasets", hub)
    for source in ("hf:owner/name", "hf:owner/name:train", "hf:owner/name:train:plain"):
        done = prepare(source, "--overwrite")
        assert done.code == 0, done.err
        assert np.array_equal(done.arr_0, PIXELS) and (done.arr_1 == LABELS).all()
        assert done.class_names.tolist() == ["cat", "dog", "emu"]
    assert configs == [None, None, "plain"]
    assert "give hf:NAME" in prepare("hf:owner/name:train:plain:x", "--overwrite").err
    Rows.features["animal"] = type("Value", (), {})()      # an int64 column
    done = prepare("hf:owner/name", "--overwrite")
    assert "no ClassLabel among" in done.out and not hasattr(done, "arr_1"), done.err
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in prepare("hf:owner/name", "--overwrite").err


# --- pixels -------------------------------------------------------------------------------------------------

def test_centre_crop_is_adms():
    """The middle of the longer side, halved by boxes while it is at least twice as large."""
    x = RNG.integers(0, 256, (16, 48, 3), dtype=np.uint8)
    assert np.array_equal(prepare_data.centre_crop(Image.fromarray(x), 16), x[:, 16:32])
    boxes = x[:, 16:32].reshape(8, 2, 8, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(prepare_data.centre_crop(Image.fromarray(x), 8)) - boxes).max() <= 1


def test_ffhq_and_afhq_are_resized_as_by_edm(prepare):
    """EDM's dataset_tool.py without --transform: one resize with a Lanczos filter. Other sets: ADM's crop."""
    x = RNG.integers(0, 256, (3, 200, 200, 3), dtype=np.uint8)
    for k, image in enumerate(x): save(f"faces/{k}.png", image)
    done = prepare("faces", "--data", "ffhq64")
    assert done.code == 0 and done.info["filter"] == "Lanczos", done.err
    assert np.array_equal(done.arr_0, [Image.fromarray(image).resize((64, 64), Image.LANCZOS) for image in x])
    assert not np.array_equal(done.arr_0, prepare("faces", "--size", 64).arr_0)
    assert np.array_equal(done.arr_0, prepare("faces", "--data", "afhqv2-64").arr_0)


def test_published_datasets_are_not_turned(prepare):
    """Neither ADM nor EDM read EXIF's rotation."""
    x, exif = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8), Image.Exif()
    exif[0x0112] = 6
    save("turned/0.png", x, exif=exif)
    assert np.array_equal(prepare("turned", "--data", "cifar10").arr_0[0], x)
    assert np.array_equal(prepare("turned", "--data", "mine").arr_0[0], np.rot90(x, -1))


def test_a_photo_with_damaged_exif_data_is_read(prepare):
    for k in range(2): save(f"photos/{k}.jpg", np.full((16, 16, 3), 200, np.uint8), exif=b"Exif\0\0 damaged block")
    done = prepare("photos")
    assert done.arr_0.shape == (2, 16, 16, 3) and (abs(done.arr_0.astype(int) - 200) < 3).all(), done.err


def test_images_that_are_not_resized_have_the_filter_of_their_source(prepare):
    for k in range(1000): save(f"small/n{k:08d}/0.png", np.full((64, 64, 3), 200, np.uint8))
    done = prepare("small", "--data", "imagenet64")
    assert done.info["filter"] == "as in SOURCE" and "not fit them" in done.out, done.err


def test_a_known_dataset_with_another_number_of_images_gives_a_warning(prepare):
    """Test images, or FFHQ's thumbnails, beside the training images would be trained on, and be the reference."""
    for part in "train", "test": save(f"cifar/{part}/0.png", RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    done = prepare("cifar", "--data", "cifar10")
    assert "warning: the training set of cifar10 is 50,000 images, and SOURCE has 2" in done.out


def test_classes_of_imagenet_that_are_not_in_its_order_give_a_warning(prepare):
    for k in range(1000): save(f"photos/kind{k}/0.png", np.full((8, 8, 3), k % 256, np.uint8))
    assert "n01440764 is 0" in prepare("photos", "--data", "imagenet64").out


def modes():
    rgb, grey = Image.fromarray(PIXELS[0]), Image.fromarray(PIXELS[0, ..., 0])
    alpha = Image.fromarray(np.where(np.arange(256).reshape(16, 16) % 2, 255, 0).astype(np.uint8))
    visible = np.asarray(alpha)[..., None] == 255
    transparent = rgb.copy()
    transparent.putalpha(alpha)
    faint = grey.copy()
    faint.putalpha(alpha)
    palette = rgb.quantize(256)
    turned = rgb.getexif()
    turned[0x0112] = 6
    yield "rgba", transparent, {}, np.where(visible, PIXELS[0], 255)
    yield "la", faint, {}, np.where(visible, PIXELS[0, ..., :1], 255)
    yield "palette", palette, {}, np.asarray(palette.convert("RGB"))
    yield "hidden palette", palette, {"transparency": bytes(256)}, np.full((16, 16, 3), 255)
    yield "grey16", Image.fromarray(PIXELS[0, ..., 0].astype(np.uint16) * 257), {}, PIXELS[0, ..., :1]
    yield "1", alpha.convert("1"), {}, np.asarray(alpha)[..., None]
    yield "grey", grey, {}, PIXELS[0, ..., :1]
    yield "turned", rgb, {"exif": turned}, np.rot90(PIXELS[0], -1)


@pytest.mark.parametrize("name, image, options, expected", list(modes()), ids=[case[0] for case in modes()])
def test_modes(prepare, name, image, options, expected):
    save("a/x.PNG", image, **options)
    done = prepare("a")
    assert done.code == 0 and np.array_equal(done.arr_0[0], expected), done.err


def test_formats_background_grey_and_flip(prepare):
    for kind in ("tif", "GIF", "jfif", "webp", "bmp", "jpeg"):
        options = {"append_images": [Image.new("RGB", (16, 16))], "save_all": True} if kind == "GIF" else {}
        if kind == "jfif": options["format"] = "JPEG"
        save(f"a/x.{kind}", Image.new("RGB", (16, 16), "red"), **options)
    save("a/cmyk.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=95)
    save("a/clear.png", Image.new("RGBA", (16, 16)))
    done = prepare("a", "--background", "red", "--flip")
    assert len(done.arr_0) == 16 and np.abs(done.arr_0 - np.array([255, 0, 0.0])).max() < 4, done.err
    assert prepare("a", "--grey", "--data", "g").arr_0.shape == (8, 16, 16, 1)
    np.save("x.npy", PIXELS)
    done = prepare("x.npy", "--flip", "--data", "f")
    assert np.array_equal(done.arr_0[::2], PIXELS) and np.array_equal(done.arr_0[1::2], PIXELS[:, :, ::-1])
    scan = Image.new("RGB", (9000, 8000), "red")
    assert prepare_data.to_pixels(scan, 8, 3).tolist() == [[[255, 0, 0]] * 8] * 8


def test_sizes(prepare):
    save("a/x.png", np.zeros((24, 32, 3), np.uint8))
    save("a/y.png", PIXELS[0])
    refused(prepare("a"), "16 to 32", "16 to 24", "--size 16")
    refused(prepare("a", "--size", 10), "--size is 10", "divisible by 4")
    done = prepare("a", "--size", 32)
    assert done.arr_0.shape == (2, 32, 32, 3) and "enlarged" in done.out
    assert done.info["size"] == 32 and done.info["crop"] == "center"


def test_labels_have_no_gaps():
    def index(labels, names=()): 
        y, found = prepare_data.index_labels(prepare_data.Source("x", [], None, labels, names))
        return y.tolist(), found
    assert index([30, 2, 30, 7]) == ([2, 0, 2, 1], ["2", "7", "30"])
    assert index(["10", "9", "0"]) == ([2, 1, 0], ["0", "9", "10"])
    assert index(["b", "a", "B"]) == ([2, 1, 0], ["B", "a", "b"])
    assert index([2, 0], ["cat", "dog", "emu"]) == ([1, 0], ["cat", "emu"])
    for bad in ([0.5, 1.0], [None, 1], [[0, 1], [1, 0]]):
        with pytest.raises(model.UserError, match="not integers from 0 on"): index(bad)
    with pytest.raises(model.UserError, match="-1"): index([-1, 0], ["cat", "dog"])


# --- latents ------------------------------------------------------------------------------------------------

MOMENTS = np.concatenate([RNG.normal(3, 5, (12, 4, 8, 8)), RNG.uniform(0.1, 1, (12, 4, 8, 8))], 1).astype("f")

def edm2_zip():
    with zipfile.ZipFile("edm2.zip", "w") as z:
        for i, x in enumerate(MOMENTS):
            file = io.BytesIO()
            np.save(file, x)
            z.writestr(f"00000/img-mean-std-{i:08d}.npy", file.getvalue())
        names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(12)]
        z.writestr("dataset.json", json.dumps({"labels": [[name, int(k)] for name, k in zip(names, LABELS)]}))
    return "edm2.zip"


def test_latents_of_edm2(prepare, monkeypatch):
    refused(prepare(edm2_zip()), "--pixel-range")
    refused(prepare("edm2.zip", "--pixel-range", 0, 1, "--flip"), "--flip has no effect")
    done = prepare("edm2.zip", "--pixel-range", 0, 1)
    assert done.arr_0.dtype == np.float16 and np.array_equal(done.arr_0, MOMENTS.astype(np.float16)), done.err
    assert (done.arr_1 == LABELS).all() and not Path("data/n.png").exists()
    z = MOMENTS[:, :4] + MOMENTS[:, 4:] * RNG.normal(size=(400, 1, 1, 1, 1))
    assert np.allclose(done.info["latents"]["mean"], MOMENTS[:, :4].mean((0, 2, 3)), atol=1e-4)
    assert np.allclose(done.info["latents"]["scale"], 0.5 / z.std((0, 1, 3, 4)), rtol=0.01)
    done = prepare("edm2.zip", "--pixel-range", 0, 1, "--fp32", "--data", "full")
    assert np.array_equal(done.arr_0, MOMENTS)
    latents = {"vae": "v", "pixel_range": [-1, 1], "mean": [0.0] * 4, "scale": [0.2] * 4}
    monkeypatch.setitem(model.DATASETS, "tiny", {"shape": (4, 8, 8), "classes": 3, "latents": latents})
    assert prepare("edm2.zip", "--data", "tiny").info["latents"] == latents
    np.savez("plain.npz", x=MOMENTS[:, :4], y=LABELS)
    assert prepare("plain.npz", "--pixel-range", 0, 1, "--data", "plain").arr_0.shape == (12, 4, 8, 8)
    np.savez("huge.npz", x=MOMENTS[:, :4] * 1e6)
    assert "not finite" in prepare("huge.npz", "--pixel-range", 0, 1, "--data", "huge").err


class StubVAE:
    """A latent is the mean colour of 8x8 pixels and a constant fourth channel. The deviations are 0.5."""
    @classmethod
    def from_pretrained(cls, path): return cls()
    def eval(self): return self
    device = torch.device("cpu")
    def to(self, device): return self
    def encode(self, x):
        z = torch.nn.functional.avg_pool2d(x, 8)
        mean = torch.cat([z, torch.ones_like(z[:, :1])], 1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.full_like(mean, 0.5)))
    def decode(self, z):
        return SimpleNamespace(sample=z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3))


@pytest.mark.parametrize("low, high", [(0, 1), (-1, 1)])
def test_autoencoder(prepare, monkeypatch, low, high):
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(AutoencoderKL=StubVAE))
    x = np.broadcast_to(PIXELS[:, :1, :1], (12, 32, 32, 3)).copy()                 # one colour for each image
    x[:, :, :16] = 0
    np.save("x.npy", x)
    done = prepare("x.npy", "--vae", "stub", "--pixel-range", low, high, "--flip")
    assert done.arr_0.shape == (24, 8, 4, 4) and done.arr_0.dtype == np.float16, done.err
    colours = PIXELS[:, 0, 0] / 255 * (high - low) + low
    assert np.abs(done.arr_0[::2, :3, 0, 3] - colours).max() < 1e-3
    assert np.abs(done.arr_0[::2, :3, 0, 0] - low).max() < 1e-3
    assert np.abs(done.arr_0[1::2, :3, 0, 0] - colours).max() < 1e-3                # mirrored before encoding
    assert (done.arr_0[:, 4:] == 0.5).all() and done.info["latents"]["pixel_range"] == [low, high]
    sheet = np.asarray(Image.open("data/n.png")).astype(int)
    assert np.abs(sheet[4 + 64, 8 + 128 - 2] - PIXELS[0, 0, 0]).max() <= 2          # right side of image 0
    refused_again = prepare("x.npy", "--vae", "stub", "--data", "m")
    assert refused_again.code == 2 and "--pixel-range" in refused_again.err
    latents = {"vae": "v", "pixel_range": [low, high], "mean": [0.0] * 4, "scale": [0.2] * 4}
    monkeypatch.setitem(model.DATASETS, "tiny", {"shape": (4, 4, 4), "classes": 0, "latents": latents})
    of_recipe = prepare("x.npy", "--vae", "stub", "--data", "tiny")
    assert np.array_equal(of_recipe.arr_0, done.arr_0[::2])
    assert "warning: the teachers of tiny use latents of v" in of_recipe.out
    assert "--vae" in prepare("x.npy", "--data", "tiny", "--overwrite").err


# --- what is refused ----------------------------------------------------------------------------------------

def mixed_tree():
    save("a/cat/1.png", PIXELS[0])
    save("a/dog/1.png", PIXELS[1])
    save("a/preview.png", PIXELS[2])

def flat(*extra):
    def make():
        for i in range(4): save(f"a/{i}.png", PIXELS[i])
        for name, content in extra: Path("a", name).write_bytes(content)
    return make

def parts(*names):
    return lambda: [save(f"a/{name}/{i}.png", PIXELS[i]) for name in names for i in range(3)]

def tar_of_images():
    save("a/1.png", PIXELS[0])
    with tarfile.open("cifar-images.tar", "w") as tar: tar.add("a")

def npz(**arrays):
    return lambda: np.savez("a.npz", **arrays)

REFUSED = [
    (lambda: None, "a", ["does not exist"]),
    (lambda: os.mkdir("a"), "a", ["0 images"]),
    (lambda: save("a.png", PIXELS[0]), "a.png", ["one image", "folder"]),
    (lambda: Path("a.zip").write_bytes(b"PK junk"), "a.zip", ["cannot be read"]),
    (flat(("9.png", b"<html>")), "a", ["9.png", "--skip-bad"]),
    (flat(("9.png", png(PIXELS[0])[:300])), "a", ["9.png", "truncated"]),
    (flat(("x.npy", b"")), "a", ["4 images, 1 latents"]),
    (flat(("labels.csv", b""), ("LICENSE.txt", b"")), "a", ["labels.csv", "--classes none"]),
    (tar_of_images, "cifar-images.tar", ["CIFAR-10", "Unpack"]),
    (flat(("dataset.json", b"{}")), "a", ["dataset.json", "labels", "--classes none"]),
    (flat(("dataset.json", b'{"labels": [["0.png", 1]]}')), "a", ["1.png"]),
    (flat(("dataset.json", json.dumps({"labels": [[f"{i}.png", 1] for i in range(5)]}).encode())), "a",
     ["4.png does not exist"]),
    (parts("train", "val"), "a", ["train, val", "a/train", "--classes none"]),
    (parts("images", "masks"), "a", ["images, masks"]),
    (parts("00000", "01000"), "a", ["00000, 01000", "--classes none"]),
    (mixed_tree, "a", ["preview.png", "cat, dog"]),
    (npz(x=PIXELS, z=PIXELS), "a.npz", ["--images KEY"]),
    (npz(x=PIXELS, y=LABELS, z=LABELS), "a.npz", ["--labels KEY"]),
    (npz(x=PIXELS, ids=np.arange(12).repeat(3)[:12] * 0.5), "a.npz", ["float64", "--labels KEY"]),
    (npz(x=PIXELS.astype(int)), "a.npz", ["int64"]),
    (npz(x=UNIT - 0.5), "a.npz", ["[-0.5, 0.5]"]),
    (npz(x=PIXELS // 16), "a.npz", ["15", "black"]),
    (lambda: [save(f"a/{i}/0.png", PIXELS[0]) for i in range(21)], "a", ["21 classes for 21 images", "--classes none"]),
    (lambda: (os.mkdir("a"), np.save("a/0.npy", 2 * UNIT[0].T - 1)), "a", ["[-1, 1]", "like pixels"]),
    (lambda: (os.mkdir("a"), np.save("a/0.npy", np.zeros((4, 10, 10), "f"))), "a", ["divisible by 4"]),
    (npz(x=np.array([{}])), "a.npz", ["allow_pickle"]),
    (npz(x=PIXELS[:, :3]), "a.npz", ["(12, 3, 16, 3)"])]

@pytest.mark.parametrize("make, source, words", REFUSED)
def test_refused(prepare, make, source, words):
    make()
    refused(prepare(source), *words)


def test_classes_none_accepts_every_layout(prepare):
    for make in (flat(("labels.csv", b""), ("dataset.json", b"{}")), parts("train", "val"), mixed_tree):
        make()
        assert not hasattr(prepare("a", "--classes", "none", "--overwrite"), "arr_1")


@pytest.mark.parametrize("flags, words", [
    (["--data", "x/n.npz"], ["NAME"]), (["--fp32"], ["--fp32 has no effect"]),
    (["--images", "x"], ["--images"]), (["--workers", "0"], ["--workers"]),
    (["--background", "plaid"], ["plaid"]), (["--size", "-4"], ["-4"]),
    (["--data", "cifar10", "--size", "32"], ["--size has no effect"]),
    (["--data", "imagenet64"], ["0 classes"]), (["--data", "imagenet256"], ["--vae"]),
    (["--vae", "none", "--pixel-range", "1", "0"], ["--pixel-range"])])
def test_flags(prepare, flags, words):
    flat()()
    refused(prepare("a", *flags), *words)


# --- files --------------------------------------------------------------------------------------------------

def test_the_output_appears_whole_or_not_at_all(prepare, monkeypatch):
    flat(("9.png", b""))()
    refused(prepare("a", "--size", 8), "9.png")
    os.remove("a/9.png")
    umask = os.umask(0o027)
    try: assert prepare("a").code == 0
    finally: os.umask(umask)
    assert stat.S_IMODE(os.stat("data/n.npz").st_mode) == 0o640
    before = Path("data/n.npz").read_bytes()
    assert "--overwrite" in prepare("a").err
    def interrupted(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr(prepare_data, "to_pixels", interrupted)
    assert prepare("a", "--overwrite").code == 130 and Path("data/n.npz").read_bytes() == before
    assert sorted(os.listdir("data")) == ["n.npz", "n.png"]
    monkeypatch.setattr(prepare_data.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    assert "Free some space" in prepare("a", "--overwrite").err


def test_skip_bad_leaves_no_gap_in_the_labels(prepare):
    class_tree("a")
    for path in Path("a/dog").glob("*"): path.write_bytes(b"<html>")
    done = prepare("a", "--skip-bad")
    assert np.array_equal(done.arr_0, PIXELS[[0, 3, 6, 9, 2, 5, 8, 11]])
    assert done.class_names.tolist() == ["cat", "emu"]
    assert np.array_equal(done.arr_1, [0] * 4 + [1] * 4) and done.out.count("left out") == 4


def test_check(prepare):
    class_tree("a")
    prepare("a")
    done = prepare("--check", "data/n.npz")
    assert done.code == 0 and "cat 4" in done.out and "12 images of 3x16x16, 3 classes" in done.out
    assert prepare("--check", ROOT / "data/digits.npz").code == 0
    content = bytearray(Path("data/n.npz").read_bytes())
    content[2000] ^= 1
    Path("bad.npz").write_bytes(content)
    assert "checksum of arr_0" in prepare("--check", "bad.npz").err
    np.savez_compressed("good.npz", arr_0=PIXELS, arr_1=LABELS, class_names=["cat", "dog", "eel"])
    content = Path("good.npz").read_bytes()
    start = content.index(b"class_names.npy") + len(b"class_names.npy")
    for offset in range(start + 20, start + 60, 4):        # in the compressed data
        Path("bad.npz").write_bytes(content[:offset] + bytes([content[offset] ^ 255]) + content[offset + 1:])
        done = prepare("--check", "bad.npz")
        assert done.code == 2 and done.err.startswith("prepare_data.py: bad.npz is damaged"), done.err
        assert len(done.err.splitlines()) == 1


def test_memory_does_not_grow(prepare):
    np.savez("a.npz", x=np.full((3000, 64, 64, 3), 99, np.uint8))                        # 37 MB
    tracemalloc.start()
    try:
        done = prepare_data.open_source("a.npz")
        chunks = prepare_data.stored_chunks(prepare_data.in_order(done, np.asarray), False, None, None,
                                            np.dtype("u1"), prepare_data.defaultdict(float))
        Path("data").mkdir()
        sample.write_npz(Path("data/n.npz"), (3000, 64, 64, 3), np.dtype("u1"), chunks, dict)
        assert tracemalloc.get_traced_memory()[1] < 12e6
    finally: tracemalloc.stop()
    assert isinstance(prepare_data.npz_arrays("data/n.npz")["arr_0"], np.memmap)


def test_image_batches(prepare):
    class_tree("a")
    source = prepare_data.open_source("a", classes="none")
    whole = np.concatenate(list(prepare_data.image_batches(source, batch=5)))
    assert len(source) == 12 and whole.shape == (12, 16, 16, 3)
    parts = [list(prepare_data.image_batches(source, 5, rank, 2)) for rank in (0, 1)]
    assert [len(x) for x in parts[0]] == [5, 2] and [len(x) for x in parts[1]] == [5]
    assert np.array_equal(np.concatenate([parts[0][0], parts[1][0], parts[0][1]]), whole)
    save("a/cat/large.png", np.zeros((24, 32, 3), np.uint8))
    with pytest.raises(model.UserError, match="16x16.*large.png has 32x24"):
        list(prepare_data.image_batches(prepare_data.open_source("a")))
    np.savez("latents.npz", x=MOMENTS)
    with pytest.raises(model.UserError, match="holds latents"):
        list(prepare_data.image_batches(prepare_data.open_source("latents.npz")))


# --- what careless users had --------------------------------------------------------------------------------

def test_what_exists_is_not_replaced_without_being_asked(prepare):
    class_tree()
    save("data/n.png", PIXELS[0])                          # the user's own picture
    before = Path("data/n.png").read_bytes()
    done = prepare("photos")
    assert done.code == 2 and "data/n.png exists" in done.err and Path("data/n.png").read_bytes() == before
    assert prepare("photos", "--overwrite").code == 0
    np.savez("latents.npz", x=np.ones((4, 8, 8, 8), np.float32) + RNG.random((4, 8, 8, 8), np.float32))
    assert prepare("latents.npz", "--overwrite", "--pixel-range", 0, 1).code == 0
    assert not Path("data/n.png").exists()                 # it showed the data that were replaced


def test_a_link_to_another_disk_stays_a_link(prepare):
    class_tree()
    Path("disk").mkdir(), Path("data").mkdir()
    Path("disk/n.npz").touch()
    Path("data/n.npz").symlink_to(Path("disk/n.npz").resolve())
    assert prepare("photos", "--overwrite").code == 0
    assert Path("data/n.npz").is_symlink() and Path("disk/n.npz").stat().st_size > 1000


def test_a_picture_beside_class_folders_can_be_left_out(prepare):
    class_tree()
    save("photos/cover.png", PIXELS[0])
    refused(prepare("photos"), "cover.png", "--classes folders")
    done = prepare("photos", "--classes", "folders")
    assert done.code == 0 and done.arr_1.tolist() == sorted(LABELS.tolist()), done.err
    assert "'beside the class folders': 1" in done.out


def test_a_large_text_chunk_is_no_damage(prepare):
    from PIL import PngImagePlugin
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    for i, x in enumerate(PIXELS): save(f"a/{i}.png", x, pnginfo=info)
    assert prepare("a").code == 0


def test_idx_files_of_several_splits_are_chosen_by_key(prepare):
    Path("emnist").mkdir()
    for split, n in ("letters", 5), ("digits", 4):
        x = PIXELS[:n, :, :, 0]
        Path(f"emnist/{split}-train-images-idx3-ubyte").write_bytes(struct.pack(">HBB3I", 0, 8, 3, *x.shape)
                                                                    + x.tobytes())
        Path(f"emnist/{split}-train-labels-idx1-ubyte").write_bytes(
            struct.pack(">HBBI", 0, 8, 1, n) + bytes(i % 2 for i in range(n)))
    done = prepare("emnist", "--images", "letters-train-images-idx3-ubyte",
                   "--labels", "letters-train-labels-idx1-ubyte")
    assert done.code == 0 and done.arr_0.shape == (5, 16, 16, 1) and done.arr_1.tolist() == [0, 1, 0, 1, 0]


def test_check_takes_a_name(prepare):
    class_tree()
    assert prepare("photos").code == 0
    assert "checksums correct" in prepare("--check", "n").out
    done = prepare("--check", "m")
    assert done.code == 2 and "data/m.npz does not exist" in done.err
    assert prepare("photos", "--check", "n").code == 2


@pytest.mark.parametrize("make, args, words", [
    (lambda: class_tree(), ["--data", "photos.tar"], ["NAME"]),
    (lambda: np.savez("photos", x=PIXELS[0]), ["one image"], None),
    (lambda: (Path("photos").mkdir(), np.save("photos/0.npy", PIXELS[0])), [], ["uint8", "PNG"])])
def test_advice_that_helps(prepare, make, args, words):
    make()
    if words is None: return refused(prepare("photos.npz", "--size", 16), *args)
    refused(prepare("photos", *args), *words)


def test_a_folder_that_a_zip_does_not_have(prepare):
    class_tree()
    with zipfile.ZipFile("a.zip", "w") as z:
        for file in Path("photos").rglob("*.png"): z.write(file)
    refused(prepare("a.zip/cat"), "no folder cat/", "photos")


def test_what_a_second_round_of_inputs_broke(prepare):
    class_tree()
    os.mkfifo("photos/cat/pipe.png")                       # would block for ever
    assert prepare("photos").code == 0
    np.savez("a.npz", x=PIXELS, y=np.array(["", "a"] * 6))
    assert prepare("a.npz", "--overwrite").class_names.tolist() == ["", "a"]
    np.savez("a.npz", x=PIXELS, info=LABELS)               # another program's array of this name
    assert (prepare("a.npz", "--overwrite").arr_1 == LABELS).all()
    Path("latents").mkdir()
    Path("latents/0.npy").write_bytes(b"")
    for i in (1, 2): np.save(f"latents/{i}.npy", RNG.normal(size=(4, 8, 8)).astype("f"))
    done = prepare("latents", "--pixel-range", 0, 1, "--data", "l")
    assert done.code == 2 and "0.npy cannot be used" in done.err and "--skip-bad" in done.err
    done = prepare("latents", "--pixel-range", 0, 1, "--data", "l", "--skip-bad")
    assert done.code == 0 and len(done.arr_0) == 2, done.err
    np.save("latents/3.npy", np.ones((4, 8, 4), "f"))
    done = prepare("latents", "--pixel-range", 0, 1, "--data", "l", "--skip-bad", "--overwrite")
    assert done.code == 2 and "(4, 8, 4)" in done.err and "--skip-bad" not in done.err


def test_a_negative_deviation_is_refused(prepare):
    x = np.concatenate([RNG.normal(size=(3, 4, 8, 8)), np.ones((3, 4, 8, 8))], axis=1).astype("f")
    x[1, 6, 0, 0] = -1                                     # as in a file of log-variances
    np.savez("a.npz", x=x)
    refused(prepare("a.npz", "--pixel-range", 0, 1), "image 1", "standard deviation is negative")


@pytest.mark.parametrize("arrays, flags, words", [
    (dict(x=PIXELS, y=np.arange(12) % 4, class_names=["a", "b"]), [], ["label 3 has no name"]),
    (dict(x=RNG.random((12, 16, 16, 4))), ["--pixel-range", 0, 1], ["uint8 (N,H,W,C)"]),
    (dict(x=np.full((4, 4, 8, 8), np.nan, "f")), ["--pixel-range", 0, 1], ["not finite", "--skip-bad"]),
    (dict(x=np.full((4, 4, 8, 8), np.nan, "f")), ["--pixel-range", 0, 1, "--skip-bad"], ["nothing can be decoded"]),
    (dict(x=np.zeros((4, 4, 8, 8), "f")), ["--pixel-range", 0, 1], ["constant"]),
    (dict(x=PIXELS, y=LABELS - 1), [], ["integers from 0 on"]), (dict(x=PIXELS, y=LABELS * 0.5), [], ["float64"]),
    (dict(x=PIXELS, y=LABELS), ["--classes", "none", "--labels", "y"], ["--labels has no effect"]),
    # the labels of x_train do not belong to x_test
    (dict(x_train=PIXELS, y_train=LABELS, x_test=PIXELS, y_test=LABELS), ["--images", "x_test"],
     ["belongs to x_test", "--labels KEY"]),
    (dict(x_train=PIXELS, y_train=LABELS, x_test=PIXELS, y_test=LABELS), ["--labels", "y_test"],
     ["belongs to y_test", "--images KEY"]),
    (dict(x=PIXELS, y=(LABELS == 1) * -1), [], ["such as -1"]), (dict(x=PIXELS, y=LABELS.astype("S1")), [], ["or strings"]),
    (dict(arr_0=PIXELS, info=json.dumps({"flip": True})), [], ["mirrored copies"])])
def test_arrays_of_the_second_round(prepare, arrays, flags, words):
    np.savez("a.npz", **arrays)
    refused(prepare("a.npz", *flags), *words)


def test_zips_of_the_second_round(prepare):
    with zipfile.ZipFile("locked.zip", "w") as z: z.writestr("0.png", png(PIXELS[0]))
    whole = Path("locked.zip").read_bytes()
    # a password; compression type 9, Deflate64, which Python cannot read
    for change, at, words in [(1, (6, 8), ["encrypted"]), (9, (8, 10), ["compression"])]:
        data = bytearray(whole)
        for sign, offset in zip((b"PK\x03\x04", b"PK\x01\x02"), at): data[data.index(sign) + offset] |= change
        Path("locked.zip").write_bytes(data)
        refused(prepare("locked.zip"), *words, "Unpack the zip")


@pytest.mark.parametrize("arrays, flags, words", [
    (dict(x=PIXELS, y=LABELS[:11]), [], ["y (11,)", "12 images", "--classes none"]),
    (dict(x=PIXELS, y=LABELS[None]), [], ["y (1, 12)", "12 images"]),
    (dict(x=RNG.random((12, 4, 16, 16), np.float32)), ["--pixel-range", 0, 1], ["like pixels"])])
def test_labels_and_pixels_are_not_lost(prepare, arrays, flags, words):
    np.savez("a.npz", **arrays)
    refused(prepare("a.npz", *flags), *words)


def test_flags_for_arrays_do_something_or_are_refused(prepare):
    np.save("x.npy", PIXELS)
    refused(prepare("x.npy", "--labels", "y.npy"), "--labels KEY")
    refused(prepare("x.npy", "--classes", "folders"), "no effect")
    assert prepare("x.npy").code == 0


def test_statistics_beside_images_are_no_labels(prepare):
    np.savez("adm.npz", arr_0=PIXELS, mu=np.zeros(5), sigma=np.eye(5), mu_s=np.zeros(7), sigma_s=np.eye(7))
    assert prepare("adm.npz").arr_0.shape == PIXELS.shape


def test_files_that_other_systems_add(prepare):
    class_tree()
    save("photos/cat/@eaDir/00.png/SYNOPHOTO_THUMB_SM.png", PIXELS[0])
    save("photos/$RECYCLE.BIN/x.png", PIXELS[0])
    done = prepare("photos")
    assert len(done.arr_0) == 12 and done.class_names.tolist() == ["cat", "dog", "emu"]
    os.makedirs("mac")
    for name, x in ("images-idx3", PIXELS[..., 0]), ("labels-idx1", LABELS.astype(np.uint8)):
        data = struct.pack(f">HBB{x.ndim}I", 0, 8, x.ndim, *x.shape) + x.tobytes()
        Path(f"mac/train-{name}-ubyte.gz").write_bytes(gzip.compress(data))
        Path(f"mac/._train-{name}-ubyte.gz").write_bytes(b"apple")
    done = prepare("mac", "--images", "train-images-idx3-ubyte", "--labels", "train-labels-idx1-ubyte", "--data", "m")
    assert np.array_equal(done.arr_0[..., 0], PIXELS[..., 0]) and np.array_equal(done.arr_1, LABELS)
    os.rename("mac", ".mac")                               # the user named this file, so it is not hidden
    done = prepare(".mac/train-images-idx3-ubyte.gz", "--data", "one")
    assert np.array_equal(done.arr_0[..., 0], PIXELS[..., 0]) and np.array_equal(done.arr_1, LABELS), done.err


@pytest.mark.parametrize("a, b", [("train_images", "test_images"), ("fold1", "fold2"), ("train", "unlabeled"),
                                  ("images", "annotations"), ("images-train", "images_val"), ("seg_train", "seg_test"),
                                  ("asl_alphabet_train", "asl_alphabet_test")])
def test_folders_that_are_parts(prepare, a, b):
    class_tree(names=(a, b, a))
    refused(prepare("photos"), "look like parts")


def test_an_archive_is_known_by_its_content(prepare):
    with tarfile.open("renamed.tar.gz", "w:gz") as tar: tar.add(cifar_folder(), "./cifar")
    refused(prepare("renamed.tar.gz", "--labels", "x"), "--labels KEY")
    done = prepare("renamed.tar.gz")
    assert done.code == 0 and done.arr_0.shape == (12, 32, 32, 3), done.err


def test_frames_and_turned_tiffs(prepare):
    frames = [Image.fromarray(x[:, :12]) for x in PIXELS[:3]]
    save("a/a.gif", frames[0], save_all=True, append_images=frames[1:])
    done = prepare("a", "--size", 12)
    first = np.asarray(frames[0].convert("P", palette=Image.ADAPTIVE).convert("RGB"), float)
    assert len(done.arr_0) == 1 and np.abs(done.arr_0[0] - first[2:14]).mean() < 30                # not the others
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in "tif", "png": save(f"b/x.{suffix}", frames[0], exif=exif)
    (batch,) = prepare_data.image_batches(prepare_data.open_source("b"))
    assert batch.shape == (2, 12, 16, 3) and np.array_equal(batch[0], batch[1])
