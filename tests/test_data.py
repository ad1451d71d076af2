"""Prepared data as the stages read them, microbatches, learning rates, latents, and --dry-run at paper scale."""
import importlib, json, os, subprocess, sys, zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import model, solve
from tools import dry_run
from conftest import ROOT, latents_npz, refused, relerr, write_npz

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
LABELS = np.arange(24) % 3


# --- what is in the file comes out --------------------------------------------------------------------------

def test_images_and_labels(tmp_path):
    """Uncompressed files are memory-mapped, compressed ones are loaded."""
    for save, name in (np.savez, "mapped"), (np.savez_compressed, "loaded"):
        save(tmp_path / f"{name}.npz", arr_0=PIXELS, arr_1=LABELS.astype(np.uint8))
        data = model.Data(tmp_path / f"{name}.npz")
        assert isinstance(data.array, np.memmap) == (name == "mapped")
        x, y = data.batch([3, 0, 23, 3])
        assert x.dtype == torch.uint8 and x.is_contiguous() and y.tolist() == [0, 0, 2, 0]
        assert torch.equal(x.permute(0, 2, 3, 1), torch.from_numpy(PIXELS[[3, 0, 23, 3]]))
        assert data.shape == (3, 16, 16) and data.classes == 3 and len(data) == 24 and not data.latents
        assert str(data) == f"{tmp_path}/{name}.npz: 24 images of 3x16x16, 3 classes"


def test_an_array_in_fortran_order(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.asfortranarray(PIXELS))
    data = model.Data(tmp_path / "a.npz")
    assert isinstance(data.array, np.memmap) and np.array_equal(data.array, PIXELS)
    assert torch.equal(data.batch([5])[0][0].permute(1, 2, 0), torch.from_numpy(PIXELS[5]))


def test_an_array_behind_4_GiB(tmp_path):
    """A sparse file: a zip may stand behind anything, here behind a hole of 5 GiB."""
    np.savez(tmp_path / "a.npz", arr_0=PIXELS, arr_1=LABELS)
    with open(tmp_path / "big.npz", "wb") as f:
        f.truncate(5 * 2 ** 30)
        f.seek(5 * 2 ** 30)
        f.write((tmp_path / "a.npz").read_bytes())
    data = model.Data(tmp_path / "big.npz")
    assert data.array.offset > 2 ** 32 and np.array_equal(data.array, PIXELS)
    assert data.identity == model.Data(tmp_path / "a.npz").identity


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_latents_are_sampled_and_scaled(tmp_path, moments, dtype):
    latents = dict(model.LATENTS["EDM2UNet"])
    z, deviation = RNG.normal(0, 5, (24, 4, 8, 8)), RNG.uniform(0.1, 1, (24, 4, 8, 8))
    stored = (np.concatenate([z, deviation], 1) if moments else z).astype(dtype)
    path = latents_npz(tmp_path / "a.npz", stored, latents, LABELS)
    data = model.Data(path)
    x, y = data.batch(range(24))
    assert x.dtype == torch.float32 and data.shape == (4, 8, 8) and y.tolist() == LABELS.tolist()
    header = model.fresh_header(model.custom_dataset(data.shape, data.classes, data.latents))
    assert header["latents"] == latents
    torch.manual_seed(0)
    found = model.to_network(x, header)
    torch.manual_seed(0)
    raw = torch.from_numpy(stored[:, :4]).float()
    if moments: raw = raw + torch.from_numpy(stored[:, 4:]).float() * torch.randn(24, 4, 8, 8)
    mean, std = torch.tensor([5.81, 3.25, 0.12, -2.15]), torch.tensor([4.17, 4.62, 3.71, 3.28])
    assert relerr(found, (raw - mean[:, None, None]) * 0.5 / std[:, None, None]) < 1e-6


def test_the_identity_is_that_of_the_content(tmp_path):
    """The same arrays, written on another day, are the same data; others under the same name are not."""
    def identity(**changes):
        np.savez(tmp_path / "a.npz", **{"arr_0": PIXELS, "arr_1": LABELS} | changes)
        return model.Data(tmp_path / "a.npz").identity
    same = identity()
    assert identity(info=np.array('{"date": "today"}')) == same and identity(class_names=np.array(["x"])) == same
    assert len({same, identity(arr_0=PIXELS + 1), identity(arr_1=LABELS + 1)}) == 3
    seen = {model.Data(latents_npz(tmp_path / "b.npz", np.zeros((2, 4, 8, 8), "f"), model.LATENTS[name])).identity
            for name in model.LATENTS}
    assert len(seen) == 2                                  # two pixel ranges


def test_the_identity_reads_no_array(tmp_path, monkeypatch):
    """midtrain.py compares it with the teacher's, and needs no data: compressed images would take minutes."""
    np.savez_compressed(tmp_path / "a.npz", arr_0=PIXELS, arr_1=LABELS, info=np.array("{}"))
    expected, read = model.Data(tmp_path / "a.npz").identity, []
    npz_array = model.npz_array
    monkeypatch.setattr(model, "npz_array", lambda path, name: (read.append(name), npz_array(path, name))[1])
    assert model.data_identity(tmp_path / "a.npz") == expected and read == ["info"]


def test_batches_are_read_ahead_in_order(tmp_path):
    data = model.Data(write_npz(tmp_path / "a.npz", n=20))
    args = SimpleNamespace(seed=3, batch=8)
    reader = model.read_batches(data, args, 2, 1, 4, torch.device("cpu"))
    for step in range(2, 12):                              # over several epochs of 20
        x, y = next(reader)
        indices = model.batch_indices(20, 3, step * 8 + 4, 4)
        assert torch.equal(x, data.batch(indices)[0]) and torch.equal(y, data.batch(indices)[1])


def test_two_steps_of_pre_and_post_training_on_latents(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    latents_npz(Path("mine.npz"), RNG.standard_normal((24, 6, 8, 8), dtype=np.float32),
                dict(vae="x", pixel_range=[-1, 1], mean=[0.0] * 3, scale=[1.0] * 3), LABELS)
    small = "--data", "mine.npz", "--steps", 2, "--batch", 8, "--log-every", 1
    for branch in (["pretrain"], ["posttrain_cm", "--init", "runs/mine/pretrain.safetensors"],
                   ["pretrain", "--objective", "flow"],
                   ["posttrain_mf", "--init", "runs/mine/pretrain_flow.safetensors"]):
        done = run(*branch, *small)
        assert done.code == 0 and "3 classes" in done.out, done.err
    header = model.read("runs/mine/posttrain_cm.safetensors")[1]
    assert header["network"]["label_dim"] == 3 and header["latents"]["pixel_range"] == [-1, 1]


# --- what is wrong with it ----------------------------------------------------------------------------------

def test_what_is_not_prepared_is_answered_with_the_command(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my photos").mkdir()
    Path("a.zip").touch()
    refused(run("pretrain", "--data", "my photos/"), "python tools/prepare_data.py 'my photos/' --data my-photos")
    refused(run("pretrain", "--data", "a.zip"), "python tools/prepare_data.py a.zip --data a")
    refused(run("pretrain", "--data", "digist"), "data/digist.npz", "prepare_data.py SOURCE --data digist")
    refused(run("pretrain", "--data", "photos"), "data/photos.npz", "prepare_data.py SOURCE --data photos")
    refused(run("posttrain_cm", "--data", "cifar10"), "data/cifar10.npz", "prepare_data.py")
    refused(run("pretrain", "--data", "imagenet256"), "imagenet256", "no recipe", "cifar10")


@pytest.mark.parametrize("arrays, words", [
    (dict(arr_0=PIXELS[0]), ["uint8 (16, 16, 3)"]), (dict(arr_0=PIXELS[:0]), ["(0, 16, 16, 3)"]),
    (dict(arr_0=PIXELS.astype(float)), ["float64"]), (dict(arr_0=PIXELS[..., [0, 1]]), ["(24, 16, 16, 2)"]),
    (dict(arr_0=PIXELS[:, :8]), ["16x8", "--size"]), (dict(arr_0=PIXELS[:, :14, :14]), ["14x14", "--size"]),
    (dict(arr_0=PIXELS, arr_1=LABELS[:5]), ["arr_1", "24"]), (dict(arr_0=PIXELS, arr_1=LABELS - 1), ["arr_1"]),
    (dict(arr_0=PIXELS, arr_1=LABELS / 2), ["arr_1", "float64"]), (dict(images=PIXELS), ["arr_0"]),
    (dict(arr_0=np.zeros((4, 4, 8, 8), "f")), ["latents", "scale"]),
    (dict(arr_0=np.array([{}] * 4)), ["damaged"])])
def test_bad_arrays(run, tmp_path, monkeypatch, arrays, words):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", **arrays)
    refused(run("pretrain", "--data", "a.npz", "--steps", 1, "--batch", 8), "a.npz", *words)


def test_data_that_do_not_fit_the_recipe(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = "--steps", 1, "--batch", 8
    write_npz("cifar10.npz", size=16)
    refused(run("pretrain", "--data", "cifar10.npz", *small), "3x16x16", "3x32x32")
    write_npz("digits.npz", channels=1, classes=11)
    refused(run("pretrain", "--data", "digits.npz", *small), "11 classes", "10")
    write_npz("digits.npz", channels=1, classes=0)
    refused(run("pretrain", "--data", "digits.npz", *small), "0 classes", "10")
    write_npz("imagenet512.npz", size=64)
    refused(run("pretrain", "--data", "imagenet512.npz", *small), "latents of 4x64x64")
    latents_npz(Path("imagenet512.npz"), np.zeros((4, 8, 64, 64), "f"), model.LATENTS["SiT"], np.arange(4))
    refused(run("pretrain", "--data", "imagenet512.npz", *small), "[-1, 1]", "[0, 1]", "--vae")


def test_damaged_files(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cut.npz").write_bytes(Path(write_npz("a.npz")).read_bytes()[:3000])
    Path("text.npz").write_text("<html>")
    Path("empty.npz").touch()
    whole = Path("a.npz").read_bytes()
    Path("header.npz").write_bytes(whole.replace(b"(24, 8, 8, 3)", b"(24, 8, 8, 3 "))
    for name in ("cut", "text", "empty", "header"):
        refused(run("pretrain", "--data", f"{name}.npz", "--steps", 1), f"{name}.npz", "damaged")


def test_large_compressed_files_are_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((1000, 32, 32, 3), np.uint8))
    with zipfile.ZipFile(tmp_path / "a.npz") as z: size = z.getinfo("arr_0.npy").file_size
    infolist = zipfile.ZipFile.getinfo
    def huge(self, name):
        member = infolist(self, name)
        member.file_size += 2 ** 32 - size
        return member
    monkeypatch.setattr(zipfile.ZipFile, "getinfo", huge)
    with pytest.raises(model.UserError, match="compressed.*prepare_data.py .*a.npz --data a-uncompressed"):
        model.Data(tmp_path / "a.npz")


def test_other_data_under_the_same_name(run, tmp_path, monkeypatch):
    """Refused where the teacher or --init is a default path, a warning where it was typed."""
    monkeypatch.chdir(tmp_path)
    for folder in "one", "two": Path(folder).mkdir()
    write_npz("one/train.npz", n=24)
    write_npz("two/train.npz", n=32)
    small = "--steps", 2, "--batch", 8
    assert run("pretrain", "--data", "one/train.npz", *small).code == 0
    refused(run("midtrain", "--data", "two/train.npz", "--nfe", 4, *small), "other data", "--teacher")
    typed = "--teacher", "runs/train/pretrain.safetensors"
    done = run("midtrain", "--data", "two/train.npz", "--nfe", 4, *typed, *small)
    assert done.code == 0 and "warning" in done.out and "other data" in done.out, done.err
    # a typed --init says nothing about a teacher whose path is the default
    refused(run("midtrain", "--data", "two/train.npz", "--init", "none", "--nfe", 4, *small), "other data", "--teacher")
    # the student inherits the data of its teacher
    assert run("posttrain_cm", "--data", "one/train.npz", *small).code == 0
    refused(run("posttrain_cm", "--data", "two/train.npz", *small, "--out", "a.safetensors"), "other data", "--init")
    # neither midtrain.py nor sample.py needs the data
    Path("one/train.npz").unlink()
    assert run("midtrain", "--data", "one/train.npz", "--nfe", 4, *small, "--out", "b.safetensors").code == 0
    assert run("sample", "runs/train/posttrain_cm.safetensors:1", "--n", 4).code == 0
    assert run("pretrain", "--data", "one/train.npz", "--dry-run").code == 0


def test_a_run_is_not_continued_with_another_network(run, tmp_path, monkeypatch):
    """Without a GPU the default network of custom data is smaller, so a run may have been begun with another."""
    monkeypatch.chdir(tmp_path)
    write_npz("a.npz", size=20)
    command = "pretrain", "--data", "a.npz", "--steps", 4, "--batch", 8, "--lr-decay", "constant"
    assert run(*command).code == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    dataset = model.custom_dataset((3, 20, 20), 4)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert dataset["network"]["model_channels"] == 128
    monkeypatch.setattr(model, "custom_dataset", lambda *args: dataset)
    refused(run(*command[:4], 6, *command[5:]), "model_channels was 32, is 128")


def test_custom_data_on_a_small_machine(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_npz("a.npz", size=32)
    done = run("pretrain", "--data", "a.npz", "--steps", 12, "--batch", 4, "--log-every", 100, "--no-preview")
    assert "parameters" in done.out and [int(line.split("/")[0].split()[1]) for line in done.out.splitlines()
                                         if line.startswith("step ")] == [1, 2, 5, 10, 12]
    assert "warms up over 12,800 images" in done.out
    assert model.read("runs/a/pretrain.safetensors")[1]["network"]["model_channels"] == 32
    run("pretrain", "--data", "a.npz", "--steps", 1, "--batch", 4, "--width", 16, "--blocks", 3,
        "--no-preview", "--out", "b.safetensors")
    network = model.read("b.safetensors")[1]["network"]
    assert (network["model_channels"], network["num_blocks"]) == (16, 3)


def test_a_resumed_run_ends_as_an_uninterrupted_one_if_its_last_step_is_skipped(tmp_path):
    args = SimpleNamespace(out=str(tmp_path / "a"), steps=8, batch=8, log_every=50, compile=False, precision="bf16")
    nan = torch.tensor(torch.nan)
    model.Log(args, "images", 1, 7)(8, nan, torch.nan, 1e-4)
    log = model.Log(args, "images", 1, 0)
    for step in range(1, 8): log(step, nan, torch.nan, 1e-4)
    with pytest.raises(model.Diverged, match="8 steps in a row.*fp32 may help"): log(8, nan, torch.nan, 1e-4)


@pytest.mark.parametrize("compiles", [False, True])
def test_the_time_of_compiling_is_not_taken_for_that_of_a_step(tmp_path, capsys, compiles):
    """On an H100 the first line said 183,241 s left, of a run of three minutes."""
    args = SimpleNamespace(out=str(tmp_path / "a"), steps=3000, batch=8, log_every=50, compile=compiles)
    log = model.Log(args, "images", 1, 0)
    for step in 1, 2: log(step, torch.tensor(1.0), 1.0, 1e-4)
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert ("compiled in 0 s" in first, "left" in first) == (compiles, not compiles) and "left" in second


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
    noise_and_labels = solve.noise_and_labels             # the teacher takes microbatches as well
    def double_noise(*args):
        x, y = noise_and_labels(*args)
        return x.double(), y
    monkeypatch.setattr(solve, "noise_and_labels", double_noise)
    for i, flags in enumerate(([], ["--microbatch", 4])):
        done = run(*STAGES[stage], "--steps", 1, "--batch", 16, *flags,
                   "--out", tmp_path / f"{i}.safetensors")
        assert done.code == 0, done.err
    whole, parts = seen
    size = sum(g.square().sum() for g in whole.values()) ** 0.5
    for k in whole: assert (whole[k] - parts[k]).norm() < 1e-6 * size, k


def test_learning_rates():
    def rate(step, **flags):
        args = dict(lr=2.0, batch=10, steps=100, warmup=0, lr_decay="constant") | flags
        return model.learning_rate(SimpleNamespace(**args), step)
    assert rate(0) == rate(99) == 2.0
    assert rate(0, warmup=100) == 0.2 and rate(9, warmup=100) == rate(50, warmup=100) == 2.0
    assert rate(0, lr_decay="linear") == 2.0 and rate(75, lr_decay="linear") == 0.5
    assert rate(25, lr_decay=25) == 2.0 and rate(100, lr_decay=25) == 1.0


# --- latents become images ----------------------------------------------------------------------------------

def test_latents_are_decoded(run, tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=16,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    vae.save_pretrained("vae")
    data = latents_npz(tmp_path / "latents.npz", RNG.standard_normal((24, 4, 8, 8), dtype=np.float32),
                       model.LATENTS["SiT"], LABELS)
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
        "midtrain --branch mf": ["cifar10", "imagenet256"],
        "posttrain_cm": ["cifar10", "ffhq64", "afhqv2-64", "imagenet64", "imagenet512"],
        "posttrain_mf": ["cifar10", "imagenet256"]}


def test_every_recipe_of_every_stage_in_a_dry_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cost, known = dry_run.cost, {}                         # stages share networks, and a large one takes seconds
    def cost_once(header, *a):
        key = json.dumps([header["kind"], header["network"], *a])
        return known[key] if key in known else known.setdefault(key, cost(header, *a))
    monkeypatch.setattr(dry_run, "cost", cost_once)
    millions = {"cifar10": 55.7, "ffhq64": 61.8, "afhqv2-64": 61.8, "imagenet64": 280.2,
                "imagenet512": 1523.2, "imagenet256": 676.6}
    for stage, rows in ROWS.items():
        script, *flags = stage.split()
        table = importlib.import_module(script).RECIPES
        if script == "pretrain": table = table["flow" if flags else "edm"]
        if script == "midtrain": table = table["mf" if flags else "cm"]
        assert set(rows) | {"digits", "custom"} == set(table)
        for row in rows:
            recipe = table[row]
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
    assert lr == [["lr", "0.5", "(command", "line)"]]
    assert "1 NFE for each of the pairs" in done.out
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
    data = write_npz(tmp_path / "cifar10.npz", size=32, classes=0)
    small, out = ("--steps", 2), ("--out", "o.safetensors")
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


def test_data_is_found_by_name_or_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    write_npz("data/a.npz")
    write_npz("a.npz")
    for text in "a", "data/a", "data/a.npz": assert model.find_data(text) == ("custom", "a", "data/a.npz")
    assert model.find_data("a.npz")[2] == "a.npz"
    Path("a.npz").unlink()
    assert model.find_data("a.npz")[2] == "data/a.npz"
