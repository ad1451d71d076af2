"""Data sets on disk in every layout, what can be wrong with them, and --dry-run of the large ones."""
import importlib, io, json, os, pickle, subprocess, sys, zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import model
from conftest import ROOT, refused, relerr, write_npz

N, RNG = 24, np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (N, 16, 16, 3), dtype=np.uint8)
LABELS = [(7 * i) % 3 for i in range(N)]
MOMENTS = np.concatenate([RNG.normal(0, 5, (N, 4, 8, 8)), RNG.uniform(0.1, 1, (N, 4, 8, 8))], 1).astype("f")


def encoded(array, kind="PNG"):
    file = io.BytesIO()
    if kind == "npy": np.save(file, array)
    else: Image.fromarray(array).save(file, kind)
    return file.getvalue()


def write_zip(path, files, labels=None):
    """{name: bytes}, and EDM's dataset.json, whose order is not that of the files."""
    with zipfile.ZipFile(path, "w") as z:
        for name, content in files.items(): z.writestr(name, content)
        listed = labels and [[name, k] for name, k in reversed(list(zip(files, labels)))]
        z.writestr("dataset.json", json.dumps({"labels": listed}))
    return path


def edm_zip(folder):
    files = {f"00000/img{i:08d}.png": encoded(x) for i, x in enumerate(PIXELS)}
    return write_zip(folder / "edm.zip", files, LABELS)


def edm2_zip(folder):
    files = {f"00000/img-mean-std-{i:08d}.npy": encoded(x, "npy") for i, x in enumerate(MOMENTS)}
    return write_zip(folder / "edm2.zip", files, LABELS)


def picture_folder(folder):
    """Odd sizes, PNG and JPEG, grey among the colours; one colour an image, so that cropping keeps it."""
    for i, k in enumerate(LABELS):
        path = folder / f"photos/class{k}/{i}.{'png' if i % 2 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = 17 + 13 * i, 40 + 7 * i
        (Image.new("L", size, 9 * i) if i % 5 == 4 else Image.new("RGB", size, (9 * i, 0, 250 - 9 * i))).save(
            path, quality=95)
    return folder / "photos"


def latents_npz(folder):
    np.savez(folder / "latents.npz", arr_0=MOMENTS[:, :4], arr_1=np.array(LABELS))
    return folder / "latents.npz"


# --- what was put in comes out ------------------------------------------------------------------------------

def test_zip_gives_pixels_and_labels_in_the_order_of_the_names(tmp_path):
    images, row = model.read_images(edm_zip(tmp_path))
    x, y = images.batch(range(N))
    assert torch.equal(x, torch.from_numpy(PIXELS).permute(0, 3, 1, 2)) and y.tolist() == LABELS
    assert row["shape"] == (3, 16, 16) and row["classes"] == 3
    assert str(images) == f"{tmp_path}/edm.zip: 24 of 3x16x16, 3 classes of 8"


def test_folder_is_cropped_and_its_classes_are_the_folders(tmp_path):
    images, row = model.read_images(picture_folder(tmp_path))
    assert row["shape"] == (3, 16, 16) and row["classes"] == 3                  # the shortest side is 17
    for i, name in enumerate(images.names):
        number = int(Path(name).stem)
        colour = [9 * number] * 3 if number % 5 == 4 else [9 * number, 0, 250 - 9 * number]
        assert (images[i].float() - torch.tensor(colour)[:, None, None]).abs().max() < 4, name      # JPEG
        assert images.labels[i] == LABELS[number]


def test_centre_crop_is_adms():
    """The middle of the longer side, halved by boxes while it is at least twice as large."""
    x = RNG.integers(0, 256, (16, 48, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(model.centre_crop(Image.fromarray(x), 16)), x[:, 16:32])
    boxes = x[:, 16:32].reshape(8, 2, 8, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(model.centre_crop(Image.fromarray(x), 8)) - boxes).max() <= 1     # two roundings


@pytest.mark.parametrize("make", [edm2_zip, latents_npz])
def test_latents_are_sampled_and_scaled(tmp_path, make):
    images, row = model.read_images(make(tmp_path))
    x, y = images.batch(range(N))
    assert y.tolist() == LABELS and row["shape"] == (4, 8, 8) and x.dtype == torch.float32
    header = model.fresh_header(row)
    torch.manual_seed(0)
    z = model.to_network(x, header)
    mean, deviation = torch.tensor([5.81, 3.25, 0.12, -2.15]), torch.tensor([4.17, 4.62, 3.71, 3.28])
    torch.manual_seed(0)
    raw = torch.from_numpy(MOMENTS[:, :4])
    if make is edm2_zip: raw = raw + torch.from_numpy(MOMENTS[:, 4:]) * torch.randn(N, 4, 8, 8)
    assert relerr(z, (raw - mean[:, None, None]) * 0.5 / deviation[:, None, None]) < 1e-6


def test_npz_is_mapped_not_loaded_and_both_layouts_of_latents_are_read(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=PIXELS)
    np.savez_compressed(tmp_path / "b.npz", arr_0=PIXELS)
    a, b = (model.read_images(tmp_path / f"{name}.npz")[0] for name in "ab")
    assert isinstance(a.file(), np.memmap) and not isinstance(b.file(), np.memmap)
    assert all(torch.equal(a[i], b[i]) for i in range(N))
    np.savez(tmp_path / "c.npz", arr_0=MOMENTS[:, :4].transpose(0, 2, 3, 1))
    c = model.read_images(tmp_path / "c.npz")[0]
    assert torch.equal(c[5], torch.from_numpy(MOMENTS[5, :4]))


@pytest.mark.parametrize("make", [edm_zip, picture_folder, edm2_zip, latents_npz])
def test_two_steps_of_pre_and_post_training(run, tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    data, small = make(tmp_path), ("--steps", 2, "--batch", 8, "--log-every", 1)
    name = Path(data).stem
    for branch in (["pretrain"], ["posttrain_cm", "--init", f"runs/{name}/pretrain.safetensors"],
                   ["pretrain", "--objective", "flow"],
                   ["posttrain_mf", "--init", f"runs/{name}/pretrain_flow.safetensors"]):
        done = run(*branch, "--data", data, *small)
        assert done.code == 0 and f"{name}" in done.out and "3 classes" in done.out, done.err
    header = model.read(f"runs/{name}/posttrain_cm.safetensors")[1]
    assert header["network"]["label_dim"] == 3 and ("latents" in header) == (make in (edm2_zip, latents_npz))


def batches(path, workers, context):
    images = model.read_images(path)[0]
    images[0]                                             # opened before the workers start
    torch.multiprocessing.set_start_method(context, force=True)
    args = SimpleNamespace(seed=0, batch=8, steps=5, workers=workers)
    return [x for pair in model.read_ahead(images, args, 0, 8, 2) for x in pair]


@pytest.mark.parametrize("make", [edm_zip, picture_folder, latents_npz])
def test_workers_forked_or_spawned_read_the_same(tmp_path, make):
    path, before = make(tmp_path), torch.multiprocessing.get_start_method()
    try:
        alone, *others = [batches(path, *how) for how in [(0, "fork"), (2, "fork"), (2, "spawn")]]
    finally:
        torch.multiprocessing.set_start_method(before, force=True)
    assert len(alone) == 6
    for other in others: assert all(torch.equal(a, b) for a, b in zip(alone, other, strict=True))


def test_a_pickled_data_set_takes_no_data_along(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((1000, 32, 32, 3), np.uint8))
    images = model.read_images(tmp_path / "a.npz")[0]
    assert len(pickle.dumps(images)) < 20_000


# --- what is wrong with it ----------------------------------------------------------------------------------

GOOD = {f"{i}.png": encoded(x) for i, x in enumerate(PIXELS)}
DEEP = io.BytesIO()
Image.fromarray(np.zeros((16, 16), np.uint16)).save(DEEP, "PNG")

@pytest.mark.parametrize("changes, labels, words", [
    ({"7.png": GOOD["7.png"][:200]}, None, ["7.png", "damaged"]),
    ({"7.png": b"nothing"}, None, ["7.png", "damaged"]),
    ({"7.png": encoded(PIXELS[7][:12])}, None, ["7.png", "16x12", "16x16"]),
    ({"7.png": encoded(PIXELS[7][:, :, 0])}, None, []),                           # grey becomes colour
    ({"7.png": encoded(np.zeros((16, 16, 4), np.uint8))}, None, ["7.png", "alpha"]),
    ({"7.png": DEEP.getvalue()}, None, ["7.png", "8 bits"]),
    ({}, {"absent.png": 1}, ["absent.png", "not there"]),
    ({}, {"7.png": -1}, ["7.png", "-1"]),
    ({}, {"7.png": 1.5}, ["7.png", "1.5"]),
    ({}, {"7.png": None}, ["7.png", "None"]),
    ({}, {"7.png": 10}, ["7.png", "10", "0..9"])])
def test_bad_zips(run, tmp_path, monkeypatch, changes, labels, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(model.DATASETS, "tiny", model.own_data((3, 16, 16), 10) | {"shape": (3, 16, 16)})
    monkeypatch.setitem(importlib.import_module("pretrain").RECIPES["edm"], "tiny",
                        importlib.import_module("pretrain").RECIPES["edm"]["own data"])
    files = GOOD | changes
    table = dict.fromkeys(files, 1) | (labels or {})
    with zipfile.ZipFile("a.zip", "w") as z:
        for name, content in files.items(): z.writestr(name, content)
        z.writestr("dataset.json", json.dumps({"labels": list(table.items())}))
    done = run("pretrain", "--data", "tiny=a.zip", "--steps", 1, "--batch", 8)
    if words: refused(done, "a.zip", *words)
    else: assert done.code == 0, done.err


def test_bad_folders_and_files(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    refused(run("pretrain", "--data", "empty/"), "empty", "holds no images")
    folder = picture_folder(tmp_path)
    (folder / "stray.png").write_bytes(GOOD["0.png"])
    refused(run("pretrain", "--data", folder), "stray.png", "beside")
    Path("cut.zip").write_bytes(edm_zip(tmp_path).read_bytes()[:5000])
    refused(run("pretrain", "--data", "cut.zip"), "cut.zip", "damaged")
    with zipfile.ZipFile("b.zip", "w") as z: z.writestr("dataset.json", "{}")
    refused(run("pretrain", "--data", "b.zip"), "b.zip", "dataset.json")
    refused(run("pretrain", "--data", f"cifar10={edm_zip(tmp_path)}"), "16x16", "32x32")
    refused(run("pretrain", "--data", f"imagenet512={edm_zip(tmp_path)}"), "latents")
    refused(run("pretrain", "--data", "imagenet256"), "imagenet256", "no recipe", "cifar10")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_turns_out_bad_stops_the_run_in_one_sentence(tmp_path, monkeypatch, workers):
    """One of those that are not looked at before the run starts."""
    monkeypatch.setattr(model, "PROBE", 2)
    images = model.read_images(write_zip(tmp_path / "a.zip", GOOD | {"7.png": GOOD["7.png"][:200]}))[0]
    args = SimpleNamespace(seed=0, batch=8, steps=3, workers=workers)
    with pytest.raises(model.UserError, match="^[^\n]*7.png is damaged[^\n]*$"):
        list(model.read_ahead(images, args, 0, 8, 0))


# --- steps --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", ["pretrain", "pretrain_flow", "midtrain_cm", "midtrain_mf", "posttrain_cm",
                                   "posttrain_mf"])
def test_microbatches_add_up_to_the_batch(run, chain, tmp_path, monkeypatch, stage):
    from test_runs import STAGES
    monkeypatch.chdir(chain)
    seen, gradient_norm = [], model.gradient_norm
    def look(net):
        seen.append({k: p.grad.double() for k, p in net.named_parameters() if p.grad is not None})
        return gradient_norm(net)
    monkeypatch.setattr(model, "gradient_norm", look)
    pixels = model.to_network                             # in float64: ECT's residual drowns in fp32
    monkeypatch.setattr(model, "to_network", lambda x, header: pixels(x, header).double())
    for i, flags in enumerate(([], ["--microbatch", 4])):
        done = run(*STAGES[stage], "--steps", 1, "--batch", 16, *flags,
                   "--out", tmp_path / f"{i}.safetensors")
        assert done.code == 0, done.err
    whole, parts = seen
    size = sum(g.square().sum() for g in whole.values()) ** 0.5
    for k in whole: assert (whole[k] - parts[k]).norm() < 1e-6 * size, k


def test_learning_rates():
    def rate(step, **flags):
        args = dict(lr=2.0, batch=10, steps=100, warmup=0, decay="constant") | flags
        return model.learning_rate(SimpleNamespace(**args), step)
    assert rate(0) == rate(99) == 2.0
    assert rate(0, warmup=100) == 0.2 and rate(9, warmup=100) == rate(50, warmup=100) == 2.0
    assert rate(0, decay="linear") == 2.0 and rate(75, decay="linear") == 0.5
    assert rate(25, decay=25) == 2.0 and rate(100, decay=25) == 1.0


# --- latents become images ----------------------------------------------------------------------------------

def test_latents_are_decoded(run, tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=16,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    vae.save_pretrained("vae")
    data = latents_npz(tmp_path)
    assert run("pretrain", "--data", data, "--steps", 2, "--batch", 8).code == 0
    refused(run("sample", "runs/latents/pretrain.safetensors", "--n", 2), "--vae", "sd-vae-ft-mse")
    refused(run("sample", "runs/latents/pretrain.safetensors", "--n", 2, "--vae", "nowhere"), "nowhere")
    done = run("sample", "runs/latents/pretrain.safetensors:4", "--n", 3, "--vae", "vae", "--real")
    assert done.code == 0, done.err
    images = np.load("runs/latents/samples.npz")["arr_0"]
    assert images.shape == (3, 16, 16, 3) and Path("runs/latents/samples.png").exists()
    # by hand, from the same seeds
    import sample
    net, header = model.load("runs/latents/pretrain.safetensors")
    kept = []
    monkeypatch.setattr(sample, "to_images", lambda x, *_: kept.append(x) or x.numpy())
    list(sample.generate(net, header, range(3), 4))
    z = kept[0] / torch.tensor(header["latents"]["scale"])[:, None, None]
    z = z + torch.tensor(header["latents"]["mean"])[:, None, None]
    with torch.no_grad(): expected = model.to_uint8(vae.eval().decode(z).sample).permute(0, 2, 3, 1).numpy()
    assert np.abs(expected.astype(int) - images.astype(int)).max() <= 1


# --- paper scale --------------------------------------------------------------------------------------------

ROWS = {"pretrain": ["cifar10", "ffhq64", "afhqv2-64", "imagenet64", "imagenet512"],
        "pretrain --objective flow": ["cifar10", "imagenet256"],
        "midtrain": ["cifar10", "ffhq64", "afhqv2-64", "imagenet64", "imagenet512"],
        "midtrain --target mf": ["cifar10", "imagenet256"],
        "posttrain_cm": ["cifar10", "ffhq64", "afhqv2-64", "imagenet64", "imagenet512"],
        "posttrain_mf": ["cifar10", "imagenet256"]}


def test_every_recipe_of_every_stage_in_a_dry_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    millions = {"cifar10": 55.7, "ffhq64": 61.8, "afhqv2-64": 61.8, "imagenet64": 280.2,
                "imagenet512": 1523.2, "imagenet256": 676.6}
    for stage, rows in ROWS.items():
        script, *flags = stage.split()
        table = importlib.import_module(script).RECIPES
        if script == "pretrain": table = table["flow" if flags else "edm"]
        if script == "midtrain": table = table["mf" if flags else "cm"]
        assert set(rows) | {"digits", "own data"} == set(table)
        for row in rows:
            recipe = table[row]
            for names in recipe.get("origin", {}).values():
                assert set(names.split()) <= recipe.keys(), (stage, row)
            done = run(script, *flags, "--data", row, "--dry-run")
            assert done.code == 0, done.err
            lines = [line.split() for line in done.out.splitlines()]
            assert any(line[:2] == ["steps", f"{recipe['steps']:,}"] for line in lines)
            assert "missing" in done.out and "GiB a GPU" in done.out and "8 GPUs" in done.out
            count = next(line[2] for line in lines if line[0] == "network" and line[1].endswith(","))
            expected = 130.3 if (script, row) == ("pretrain", "imagenet256") else millions[row]
            assert abs(int(count.strip(";").replace(",", "")) / 1e6 - expected) < 1, done.out
    assert not list(tmp_path.iterdir())


def test_a_dry_run_reads_the_files_at_hand_and_the_command_line(run, chain, monkeypatch):
    monkeypatch.chdir(chain)
    done = run("midtrain", "--dry-run", "--lr", 0.5, "--world", 4)
    assert done.code == 0 and "missing" not in done.out and "16 pairs a GPU" in done.out
    lr = [line.split() for line in done.out.splitlines() if " lr " in line]
    assert lr == [["lr", "0.5", "command", "line"]]
    assert "of 4 trajectories" in done.out
    refused(run("midtrain", "--dry-run", "--world", 7), "--batch 64", "7 processes")
    done = run("pretrain", "--data", "nowhere.npz", "--dry-run")
    assert done.code == 0 and "missing   nowhere.npz" in done.out


def peak(*command):
    """Peak memory of a process, in GiB, whose C library returns what is freed instead of fragmenting it."""
    code = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=-3);"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    done = subprocess.run([sys.executable, "-c", code, sys.executable, *map(str, command)],
                          capture_output=True, text=True,
                          env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 2 ** 20


def estimate(run, script, *flags):
    done = run(script, *flags, "--precision", "fp32", "--dry-run", "--world", 1)
    return next(float(line.split()[1]) for line in done.out.splitlines() if line.startswith("memory"))


@pytest.mark.slow
def test_the_estimate_of_memory_is_near_what_a_process_takes(run, chain, tmp_path, monkeypatch):
    """On a CPU, in fp32. The correction is what a process takes on top of its estimate when that is next to
    nothing: Python, torch and its libraries, as much as 0.4 GiB."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    data = f"cifar10={write_npz(tmp_path / 'c.npz', size=32, classes=0)}"
    small, out = ("--steps", 2, "--workers", 0), ("--out", "o.safetensors")
    digits = "--init", chain / "runs/digits/pretrain.safetensors"
    itself = peak(ROOT / "pretrain.py", *small, "--batch", 4, "--out", "tiny.safetensors") - estimate(
        run, "pretrain", "--batch", 4)
    assert 0.2 < itself < 0.6
    for script, flags in [("pretrain", ["--batch", 2048]), ("posttrain_cm", ["--batch", 2048, *digits]),
                          ("midtrain", ["--batch", 2048, "--teacher", digits[1], *digits]),
                          ("pretrain", ["--data", data, "--batch", 16])]:
        Path(out[1]).unlink(missing_ok=True)
        Path("o.resume.safetensors").unlink(missing_ok=True)
        measured, expected = peak(ROOT / f"{script}.py", *small, *flags, *out), estimate(run, script, *flags)
        print(f"{script} {flags[:2]}: {measured:.2f} GiB, expected {expected + itself:.2f}")
        assert abs(expected + itself - measured) < 0.25 * measured
