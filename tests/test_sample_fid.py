"""Sampling is a function of the seed; the Frechet distance has closed forms."""
import json, os, shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fid, model, sample
from tools import feature_networks
from conftest import ROOT, latents_npz, refused, relerr, vector_weights, vectors, write_npz


@pytest.fixture
def here(chain, monkeypatch):
    monkeypatch.chdir(chain)
    return chain


@pytest.mark.parametrize("file", ["pretrain.safetensors:3", "midtrain_cm.safetensors:1",
                                  "posttrain_cm.safetensors:2"])
def test_image_k_depends_on_seed_k_alone(run, here, tmp_path, file):
    draw = lambda name, *args: (
        run("sample", f"runs/digits/{file}", "--out", tmp_path / f"{name}.npz", *args),
        np.load(tmp_path / f"{name}.npz"))[1]
    many, some = draw("many", "--n", 80), draw("some", "--seeds", "60-70")
    assert many["arr_0"].dtype == np.uint8 and many["arr_0"].shape == (80, 8, 8, 1)
    assert all(np.array_equal(many[k][60:71], some[k]) for k in ("arr_0", "arr_1"))
    assert len(np.unique(many["arr_0"], axis=0)) == 80 and set(many["arr_1"]) == set(range(10))


def test_the_picture_of_one_file_has_64_images(run, here, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "PART", 64)                # the first part has only 4 of the seeds
    assert run("sample", "runs/digits/midtrain_cm.safetensors:1", "--seeds", "60-160",
               "--out", tmp_path / "a.npz").code == 0
    assert Image.open(tmp_path / "a.png").height == 4 + 4 * 52 and len(np.load(tmp_path / "a.npz")["arr_0"]) == 101


def test_a_model_of_latents_is_not_sampled_without_its_autoencoder(here):
    net, header = model.load("runs/digits/midtrain_cm.safetensors")
    with pytest.raises(model.UserError, match="pass vae"):
        sample.generate(net, header | {"latents": model.LATENTS["SiT"]}, range(4), 1)


def test_zero_steps(run, here, tmp_path):
    for stage in "pretrain", "midtrain_cm":
        refused(run("sample", f"runs/digits/{stage}.safetensors:0", "--out", tmp_path / "a"), "at least one step")


def test_label_policies(run, here, tmp_path):
    for policy, expected in [("balanced", np.arange(12) % 10), ("7", np.full(12, 7))]:
        assert run("sample", "runs/digits/midtrain_cm.safetensors", "--n", 12, "--labels", policy,
                   "--out", tmp_path / "a.npz").code == 0
        assert np.array_equal(np.load(tmp_path / "a.npz")["arr_1"], expected)


def test_several_files_make_one_picture(run, here, tmp_path):
    files = [f"runs/digits/{name}" for name in ("pretrain.safetensors:2", "midtrain_cm.safetensors:1",
                                                "midtrain_cm.safetensors:2")]
    done = run("sample", *files, "--n", 5, "--real", "--labels", "balanced", "--out", tmp_path / "a.png")
    assert done.code == 0 and [p.name for p in tmp_path.iterdir()] == ["a.png"]
    width, height = Image.open(tmp_path / "a.png").size
    assert height == 4 + 4 * 52 and width > 5 * 52


def test_out_names_what_is_written(run, here, tmp_path, monkeypatch):
    one, two = "runs/digits/midtrain_cm.safetensors:1", "runs/digits/midtrain_cm.safetensors:2"
    refused(run("sample", one, "--out", tmp_path / "a.png"), "X.npz or FOLDER/")
    refused(run("sample", one, two, "--out", tmp_path / "a.npz"), "only a picture")
    refused(run("sample", one, two, "--n", 21, "--out", tmp_path / "a.png"), "at most 20")
    refused(run("sample", one, two, "--seeds", "0-20", "--out", tmp_path / "a.png"), "at most 20")
    refused(run("sample", one, "--real", "--data", "nothing", "--out", tmp_path / "a"), "data/nothing.npz")
    assert not list(tmp_path.iterdir())
    write_npz(tmp_path / "rgb.npz")
    refused(run("sample", one, "--real", "--data", tmp_path / "rgb.npz", "--out", tmp_path / "a"), "(3, 8, 8)")
    for script, flag in (("sample", "--out"), ("fid", "--save-stats")):
        refused(run(script, one, flag, tmp_path / "rgb.npz/a.npz"), "written")
    with monkeypatch.context() as m:
        m.setattr(model, "data_identity", lambda path: "prepared again")
        done = run("sample", one, "--real", "--n", 2, "--out", tmp_path / "a")
    assert done.code == 0 and "warning: data/digits.npz holds other data than the model was trained on" in done.out
    tensors, header = model.read(one.removesuffix(":1"))
    model.save(tmp_path / "imported.safetensors", tensors, {k: v for k, v in header.items() if k != "data_identity"})
    assert run("sample", tmp_path / "imported.safetensors:1", "--real", "--n", 2, "--out", tmp_path / "a").code == 0


def test_rows_of_files_with_one_name_are_told_apart(run, here, tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(model, "save_grid", lambda path, rows, found: names.extend(found))
    for folder in "ab":
        (tmp_path / folder).mkdir()
        shutil.copy("runs/digits/midtrain_cm.safetensors", tmp_path / folder / "x.safetensors")
    assert run("sample", *(tmp_path / f"{k}/x.safetensors" for k in "ab"), "--n", 1).code == 0
    assert names == [f"after mid-training, 1 NFE, {tmp_path}/{k}/x.safetensors" for k in "ab"]


def test_two_steps_renoise_to_the_second_time():
    seen = []
    def f(x, t, y):
        seen.append((x, t))
        return torch.full_like(x, 3.0)
    eps = torch.randn(2, 4, 1, 8, 8)
    out = sample.consistency_sampler(f, eps, sample.geometric_times(2, 80.0, 0.821), None)
    assert torch.equal(out, torch.full_like(out, 3.0))
    assert torch.equal(seen[0][0], 80 * eps[0]) and (seen[0][1] == 80).all()
    assert torch.allclose(seen[1][0], 3 + 0.821 * eps[1])
    assert torch.allclose(seen[1][1], torch.full((4,), 0.821))
    assert sample.geometric_times(1, 80.0, 0.821) == [80.0]
    assert sample.geometric_times(3, 80.0, 0.8)[1] == pytest.approx(8.0)


def test_step_times():
    cm = {"kind": "Denoiser", "t_max": 80.0, "t_min": 0.002, "mid_t": 0.8}
    mf = {"kind": "MeanVelocity", "t_max": 1.0, "t_min": 0.0}
    assert sample.step_times(cm, 2) == [80.0, 0.8] and sample.step_times(cm, 2, [1.5]) == [80.0, 1.5]
    assert sample.step_times(mf, 1) == [1.0]
    assert sample.step_times(mf, 4) == [1.0, 0.75, 0.5, 0.25]
    assert sample.step_times(mf, 3, [0.6, 0.2]) == [1.0, 0.6, 0.2]


def test_frechet_distance_closed_forms():
    d = 6
    g = torch.Generator().manual_seed(0)
    a = torch.randn(d, d, generator=g, dtype=torch.float64)
    A, mu, zero = a @ a.T, torch.randn(d, generator=g, dtype=torch.float64), torch.zeros(d)
    close = lambda value, expected: abs(value.item() - expected) < 1e-10
    assert close(fid.frechet_distance(zero, A, zero, A), 0)
    assert close(fid.frechet_distance(zero, A, mu, A), mu.square().sum().item())
    # (2 - 1)^2 tr A
    assert close(fid.frechet_distance(zero, A, mu, 4 * A), mu.square().sum().item() + A.trace().item())
    p, q = torch.rand(d, generator=g), torch.rand(d, generator=g)
    assert abs(fid.frechet_distance(zero, p.diag(), zero, q.diag()).item()
               - (p.sqrt() - q.sqrt()).square().sum().item()) < 1e-6
    flat = torch.diag(torch.tensor([1.0, 2, 3, 0, 0, 0]))                                  # singular
    assert close(fid.frechet_distance(zero, flat, zero, 4 * flat), 6)


def test_streamed_statistics_equal_numpy():
    x = torch.rand(57, 5, dtype=torch.float64)
    mu, cov = fid.moments(*fid.sums(x.split(10)))
    assert np.allclose(mu, x.mean(0)) and np.allclose(cov, np.cov(x.numpy().T))


def test_a_constant_feature_has_no_negative_variance():
    n, total = 3, torch.full((1,), 0.3, dtype=torch.float64)
    mu, cov = fid.moments(n, total, total * total / n - 1e-16)          # the sum of squares, rounded down
    assert cov == 0 and fid.frechet_distance(mu, cov, mu, cov) == 0


def test_distances_reproduce_the_reference():
    v, _ = vectors("fid_stats")
    stats = {k: fid.moments(*fid.sums(v[f"in/{k}"].double().split(100))) for k in ("f1", "f2", "fr", "fr2")}
    for k in ("f1", "f2", "fr"):
        mu, cov = stats[k]
        assert relerr(mu, v[f"out64/mu_{k}"]) < 1e-12 and relerr(cov, v[f"out64/sigma_{k}"]) < 1e-12
    for a, b, tolerance in [("f1", "f2", 1e-9), ("f1", "fr", 1e-6), ("fr", "f1", 1e-6), ("fr", "fr2", 1e-6)]:
        expected = v[f"out64/fid_eig_{a}_{b}"].item()
        distance = fid.frechet_distance(*stats[a], *stats[b]).item()
        assert abs(distance - expected) < tolerance * expected, (a, b)
    assert abs(fid.frechet_distance(*stats["f1"], *stats["f1"]).item()) < 1e-10


def formula_image(H, W, off):
    y, x = np.mgrid[:H, :W]
    return np.stack([(7 * x ** 2 + 13 * y ** 2 + 5 * x * y + 1600 * c + off) // 16 % 256 for c in range(3)],
                    axis=-1).astype(np.uint8)[None]


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """A weights file as published, fc and counters included, with the weights of the vectors' rule."""
    path = tmp_path_factory.mktemp("inception") / feature_networks.INCEPTION
    weights = vector_weights("inception")
    weights |= {k.replace("running_var", "num_batches_tracked"): torch.tensor(0) for k in list(weights)
                if k.endswith("running_var")}
    torch.save(weights, path)
    return path


def test_inception_reproduces_the_reference(inception):
    (v, meta), net = vectors("inception"), feature_networks.load_inception(inception)
    images = {k: formula_image(**f) for k, f in json.loads(meta["formula_images"]).items()}
    assert all(int(x.sum()) == v[f"in/{k}_sum"] for k, x in images.items())
    images |= {k: v[f"in/{k}"].permute(0, 2, 3, 1).to(torch.uint8).numpy() for k in ("s32x32", "s64x64")}
    for k, x in images.items():
        resized = feature_networks.resize_tf1(torch.from_numpy(x).permute(0, 3, 1, 2).float())
        assert relerr(resized[:, :, ::23, ::23], v[f"out64/{k}/tf_resize"]) < 5e-5, k
        features = net(x)
        assert relerr(features, v[f"out/{k}/tf_pool2048"]) < 5e-6, k
        assert relerr(features[:, ::8], v[f"out64/{k}/tf_pool2048"]) < 5e-6, k


def test_fid_of_every_kind_of_reference(run, here, tmp_path, inception):
    """Data set, folder, zip, npz of images and of statistics give one number; the line names everything."""
    with np.load("data/digits.npz") as f: images = f["arr_0"][:4]
    np.savez(tmp_path / "a.npz", arr_0=images)
    (tmp_path / "a").mkdir()
    for i, x in enumerate(images): Image.fromarray(x[:, :, 0]).save(tmp_path / f"a/{i:03d}.png")
    shutil.make_archive(tmp_path / "a", "zip", tmp_path / "a")
    mu, cov = fid.moments(*fid.sums([feature_networks.load_inception(inception)(images)]))
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=cov)
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=cov, arr_0=images)
    found = []
    for ref in ("a.npz", "a.zip", "a", "stats.npz", "adm.npz"):
        done = run("fid", "runs/digits/midtrain_cm.safetensors:1", "--n", 4, "--inception", inception,
                   "--ref", tmp_path / ref)
        assert done.code == 0, done.err
        found.append(json.loads(done.out.splitlines()[-1]))
    assert found[0]["name"] == "FID-0.004k" and found[0]["n_ref"] == 4 and found[3]["n_ref"] is None
    assert all(abs(f["fid"] / found[0]["fid"] - 1) < 1e-6 for f in found) and found[0]["fid"] > 1
    assert all(word in done.out for word in ("labels random", "nfe 1", "seeds 0-3", "TF1 bilinear"))
    # as FILE, ADM's reference batch is its images
    done = run("fid", tmp_path / "adm.npz", "--inception", inception, "--ref", tmp_path / "a.npz")
    assert done.code == 0 and json.loads(done.out.splitlines()[-1])["fid"] < 1e-6, done.err
    refused(run("fid", tmp_path / "stats.npz", "--inception", inception, "--ref", tmp_path / "a.npz"),
            "holds statistics")


def test_interrupted_sampling_continues(run, here, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "PART", 64)
    command = "sample", "runs/digits/midtrain_cm.safetensors:1", "--n", 200
    atomic_write, written = model.atomic_write, []
    def dies(path):
        if len(written) == 2: raise model.UserError("the power went out")
        written.append(path)
        return atomic_write(path)
    monkeypatch.setattr(model, "atomic_write", dies)
    assert run(*command, "--out", tmp_path / "a.npz").code == 2 and len(list(tmp_path.glob("a.parts/*"))) == 2
    monkeypatch.setattr(model, "atomic_write", atomic_write)
    assert run(*command, "--labels", "3", "--out", tmp_path / "a.npz").code == 0          # takes none of them
    assert len(list(tmp_path.glob("a.parts/*"))) == 2
    drawn, generate = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda net, header, seeds, *a, **k: drawn.append(seeds) or generate(
        net, header, seeds, *a, **k))
    done = run(*command, "--out", tmp_path / "a.npz")
    assert done.code == 0 and [(s.start, s.stop) for s in drawn] == [(128, 192), (192, 200)]
    assert run(*command, "--out", tmp_path / "b.npz").code == 0
    assert all(np.array_equal(np.load(tmp_path / "a.npz")[k], np.load(tmp_path / "b.npz")[k])
               for k in ("arr_0", "arr_1"))


def test_bad_input_of_fid(run, here, tmp_path, inception):
    pixels = "--ref", "digits", "--features", "pixels"
    weights = "--ref", "digits", "--inception", inception
    def bad(words, file, *flags): refused(run("fid", tmp_path / file, *flags), *words)
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((3, 8, 8, 1)))
    bad(["float.npz", "uint8"], "float.npz", *pixels)
    np.savez(tmp_path / "large.npz", arr_0=np.full((3, 8, 8, 1), 300))
    bad(["large.npz", "uint8"], "large.npz", *pixels)
    np.savez(tmp_path / "one.npz", arr_0=np.zeros((1, 8, 8, 1), np.uint8))
    bad(["at least two", "1"], "one.npz", *pixels)
    np.savez(tmp_path / "rgb.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    bad(["64 features", "192"], "rgb.npz", *pixels)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "rgb.npz").read_bytes()[:200])
    bad(["cut.npz", "damaged"], "cut.npz", *pixels)
    (tmp_path / "empty").mkdir()
    bad(["empty", "0 images"], "empty", *pixels)
    np.savez(tmp_path / "stats.npz", mu=np.zeros(5), sigma=np.eye(5))
    bad(["5 features", "192"], "rgb.npz", "--ref", tmp_path / "stats.npz", "--features", "pixels")
    bad([feature_networks.INCEPTION, "github.com"], "rgb.npz", "--ref", "digits")
    bad([feature_networks.INCEPTION, "github.com"], "rgb.npz", "--ref", "digits", "--inception", tmp_path / "rgb.npz")
    refused(run("fid", "runs/digits/midtrain_cm.safetensors", "--ref", "nowhere.npz", *pixels[2:]), "nowhere")


def test_fid_says_how_the_samples_were_drawn(run, here):
    of = lambda *args: json.loads(
        run("fid", *args, "--n", 4, "--features", "pixels").out.splitlines()[-1])
    plain = of("runs/digits/pretrain_flow.safetensors:4")
    assert (plain["solver"], plain["nfe"]) == ("heun", 3)            # the last step needs one call
    assert not {"guidance", "guide", "mid_t"} & plain.keys() and plain["precision"] == "fp32"
    assert of("runs/digits/pretrain.safetensors:4", "--guidance", 2, "--precision", "bf16").items() >= {
        "solver": "dpm3", "nfe": 8, "guidance": 2, "precision": "bf16"}.items()
    few = of("runs/digits/midtrain_cm.safetensors:2", "--mid-t", 0.5)
    assert few["mid_t"] == [0.5] and "solver" not in few


def test_statistics_that_cannot_be_cached_are_no_failure(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/reference").touch()                         # a file where the folder would be
    write_npz("a.npz")
    done = run("fid", "a.npz", "--ref", "a.npz", "--features", "pixels")
    assert done.code == 0 and "not cached" in done.out and json.loads(done.out.splitlines()[-1])["fd"] < 1e-6, done


def test_fid_prints_the_distance_as_json(run, here, tmp_path):
    args = "--features", "pixels"
    line = lambda done: json.loads(done.out.splitlines()[-1])
    itself = line(run("fid", "data/digits.npz", "--ref", "digits", *args))
    assert itself["name"] == "FD-pixels" and abs(itself["fd"]) < 1e-6
    assert itself["n"] == itself["n_ref"] == 1797
    sampled = line(run("fid", "runs/digits/midtrain_cm.safetensors:2", "--n", 70, *args))
    assert run("sample", "runs/digits/midtrain_cm.safetensors:2", "--n", 70,
               "--out", tmp_path / "a.npz").code == 0
    stored = line(run("fid", tmp_path / "a.npz", "--ref", "digits", *args))
    assert sampled["nfe"] == 2 and sampled["n"] == 70
    assert sampled["fd"] == pytest.approx(stored["fd"], rel=1e-9) and stored["fd"] > 1
    weights, header = model.read("runs/digits/midtrain_cm.safetensors")
    assert sampled["step"] == header["step"]
    model.save(tmp_path / "old.safetensors", weights, header | {"data_identity": "of other images"})
    for flags, warns in ([], True), (["--ref", "digits"], False):
        done = run("fid", tmp_path / "old.safetensors", "--n", 8, *args, *flags)
        assert ("trained on other data" in done.out) == warns and done.code == 0, done.err


def test_pixels_refuse_large_images(run, tmp_path):
    big = write_npz(tmp_path / "big.npz", n=3, size=36)
    done = run("fid", big, "--ref", big, "--features", "pixels")
    assert done.code == 2 and "3,072" in done.err and len(done.err.splitlines()) == 1


def test_models_of_other_sizes_share_a_picture(tmp_path):
    grey, colour = np.zeros((3, 8, 8, 1), np.uint8), np.full((3, 16, 16, 3), (200, 10, 60), np.uint8)
    model.save_grid(tmp_path / "a.png", [grey, colour], ["a", "b"])
    picture = np.array(Image.open(tmp_path / "a.png"))
    assert (picture == (200, 10, 60)).all(2).sum() == 3 * 48 * 48


# --- pictures and folders -----------------------------------------------------------------------------------

def test_images_as_files_named_by_seed(run, here, tmp_path):
    file, out = "runs/digits/midtrain_cm.safetensors:1", tmp_path / "images"
    assert run("sample", file, "--n", 70, "--out", tmp_path / "a.npz").code == 0
    for _ in range(2):                                     # the second replaces the same seeds
        done = run("sample", file, "--seeds", "3-69", "--out", f"{out}/")
        assert done.code == 0 and sorted(os.listdir(out)) == [f"{k:06d}.png" for k in range(3, 70)], done.err
    images = np.load(tmp_path / "a.npz")["arr_0"]
    for k in 3, 64, 69: assert np.array_equal(np.asarray(Image.open(out / f"{k:06d}.png")), images[k, ..., 0])
    assert Image.open(f"{out}.png").width > 16 * 48        # its grid
    refused(run("sample", file, "--n", 10, "--out", out), "000010.png", "--out")
    refused(run("sample", file, file, "--n", 10, "--out", f"{out}/"), "one FILE")
    np.savez(tmp_path / "part.npz", arr_0=images[3:])
    a, b = (json.loads(run("fid", source, "--ref", "digits", "--features", "pixels").out.splitlines()[-1])["fd"]
            for source in (out, tmp_path / "part.npz"))
    assert a == pytest.approx(b, rel=1e-9)


def test_an_interrupted_replacement_does_not_mix_two_models(run, here, tmp_path, monkeypatch):
    out, n = tmp_path / "images", ("--n", 70, "--out", f"{tmp_path}/images/")
    assert run("sample", "runs/digits/midtrain_cm.safetensors:1", *n).code == 0
    save, saved = Image.Image.save, []
    def stops(self, *args):
        saved.append(save(self, *args))
        if len(saved) == 5: raise KeyboardInterrupt
    monkeypatch.setattr(Image.Image, "save", stops)
    assert run("sample", "runs/digits/posttrain_cm.safetensors:1", *n).code == 130
    assert sorted(os.listdir(out)) == [f"{k:06d}.png" for k in range(5)]


def test_mirrored_copies_are_no_reference(run, here, tmp_path):
    with np.load("data/digits.npz") as f: images = f["arr_0"][:100]
    both = np.stack([images, images[:, :, ::-1]], 1).reshape(200, 8, 8, 1)         # as prepare_data.py --flip
    np.savez(tmp_path / "flip.npz", arr_0=both, info=np.array(json.dumps({"flip": True})))
    np.savez(tmp_path / "plain.npz", arr_0=images)
    done = run("fid", tmp_path / "flip.npz", "--ref", tmp_path / "plain.npz", "--features", "pixels")
    found = json.loads(done.out.splitlines()[-1])
    assert (found["n"], found["n_ref"]) == (100, 100) and found["fd"] < 1e-9


def test_every_save_of_a_stage_shows_samples(run, here, tmp_path):
    rows = {"pretrain": 1, "pretrain_flow": 1, "midtrain_cm": 2, "midtrain_mf": 2, "posttrain_cm": 2,
            "posttrain_mf": 2}
    for stage, n in rows.items():
        assert Image.open(f"runs/digits/{stage}.png").height == 4 + 52 * n
    # row "1 NFE" is what sample.py draws with the same labels
    from PIL import ImageChops
    run("sample", "runs/digits/midtrain_cm.safetensors:1", "--n", 16, "--labels", "balanced",
        "--out", tmp_path / "a.npz")
    box = lambda image: image.crop((image.width - 16 * 52, 0, image.width, 52)).convert("L")
    difference = ImageChops.difference(box(Image.open("runs/digits/midtrain_cm.png")),
                                       box(Image.open(tmp_path / "a.png")))
    assert np.asarray(difference).max() <= 1               # batches of 16 and of 64 differ in the last bits


def test_a_preview_changes_nothing_else(run, here, tmp_path):
    flags = "--steps", 4, "--batch", 8, "--save-every", 2, "--nfe", 4
    assert run("midtrain", *flags, "--no-preview", "--out", tmp_path / "a.safetensors").code == 0
    done = run("midtrain", *flags, "--out", tmp_path / "b.safetensors")
    assert done.code == 0 and done.out.count("samples in") == 2
    assert not (tmp_path / "a.png").exists() and (tmp_path / "b.png").exists()
    a, b = (model.read(tmp_path / f"{name}.safetensors")[0] for name in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_model_of_latents_has_no_preview_without_its_autoencoder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    latents_npz("l.npz", np.zeros((16, 4, 8, 8), "f"), model.LATENTS["SiT"])
    done = run("pretrain", "--data", "l.npz", "--steps", 1, "--batch", 8)
    assert done.code == 0 and "no preview" in done.out and "--vae" in done.out, done.err
    assert run("pretrain", "--steps", 1, "--vae", "x").code == 2                   # digits are no latents


def test_the_preview_counts_calls(run, here, tmp_path, monkeypatch):
    """Heun in flow time takes 15 calls for 16."""
    names = []
    monkeypatch.setattr(model, "save_grid", lambda path, rows, n: names.extend(n))
    for flags in (), ("--objective", "flow"):
        assert run("pretrain", *flags, "--steps", 1, "--batch", 8, "--out", tmp_path / f"{len(flags)}.safetensors"
                   ).code == 0
    assert names == ["16 NFE", "15 NFE"]


def test_a_preview_that_fails_does_not_end_the_run(run, here, tmp_path, monkeypatch):
    def broken(*args): raise model.UserError("the disk is full")
    monkeypatch.setattr(model, "save_grid", broken)
    done = run("pretrain", "--steps", 2, "--batch", 8, "--out", tmp_path / "a.safetensors")
    assert done.code == 0 and "no preview: the disk is full" in done.out


def test_the_committed_digits(run, tmp_path, monkeypatch):
    """The first command of the README. One step of the committed model against one and 16 NFE of its teacher."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    teacher, cmt = (f"data/digits_{name}.safetensors" for name in ("teacher", "cmt"))
    for file in teacher, cmt:
        assert os.path.getsize(file) <= 2_000_000
        tensors, header = model.read(file)
        assert all(v.dtype == torch.float16 for v in tensors.values()) and len(header["sha256 in fp32"]) == 64
    done = run("sample", f"{cmt}:1", "--n", 64)
    assert done.code == 0 and np.load("runs/digits/samples.npz")["arr_0"].shape == (64, 8, 8, 1), done.err
    assert Image.open("runs/digits/samples.png").height == 4 + 52 * 4
    lines = run("fid", f"{cmt}:1", f"{teacher}:16", f"{teacher}:1", "--n", 1000, "--features", "pixels").out
    one, sixteen, blurred = (json.loads(line)["fd"] for line in lines.splitlines() if line.startswith("{"))
    assert sixteen < one < blurred / 10


def test_a_damaged_cache_of_statistics_is_made_again(run, here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_npz("a.npz")
    values = []
    for _ in range(3):
        done = run("fid", "a.npz", "--ref", "a.npz", "--features", "pixels")
        assert done.code == 0, done.err
        values.append(json.loads(done.out.splitlines()[-1])["fd"])
        cache, = (tmp_path / "runs/reference").iterdir()
        cache.write_bytes(cache.read_bytes()[:100])
    assert max(values) < 1e-9


def test_statistics_do_not_replace_other_files_and_say_so_before_sampling(run, here, tmp_path, monkeypatch):
    write_npz(tmp_path / "data.npz")
    monkeypatch.setattr(sample, "generate", None)          # would fail with another error
    refused(run("fid", "runs/digits/midtrain_cm.safetensors:1", "--features", "pixels",
                "--save-stats", tmp_path / "data.npz"), "holds no statistics")


def test_flags_of_a_comparison_apply_to_the_files_they_fit(run, here, tmp_path, monkeypatch):
    seen, generate = [], sample.generate
    def spy(net, header, seeds, steps, labels, mid_t, *args, **kwargs):
        seen.append((header["stage"], steps, mid_t, isinstance(net, torch.nn.Module)))         # not: guided
        return generate(net, header, seeds, steps, labels, mid_t, *args, **kwargs)
    monkeypatch.setattr(sample, "generate", spy)
    teacher, student = "runs/digits/pretrain.safetensors", "runs/digits/midtrain_cm.safetensors"
    flags = "--mid-t", 1.6, "--guidance", 2, "--n", 2, "--out", tmp_path / "a.png"
    done = run("sample", f"{teacher}:4", student, f"{student}:1", f"{student}:2", *flags)
    assert done.code == 0 and seen == [("pretrain", 4, None, False), ("midtrain_cm", 1, None, True),
                                       ("midtrain_cm", 1, None, True), ("midtrain_cm", 2, [1.6], True)], done.err
    assert "--mid-t has no effect on" in done.out and "--guidance has no effect on" in done.out
    for flag in ("--guidance", 2), ("--solver", "heun"), ("--mid-t", 0.5):
        refused(run("sample", student, *flag), f"{flag[0]} has no effect")
    refused(run("sample", "runs/digits/midtrain_mf.safetensors:2", "--solver", "heun", "--mid-t", 0.5), "heun solver")
    done = run("fid", f"{teacher}:4", student, "--guidance", 2, "--n", 64, "--features", "pixels")
    guidance = [json.loads(line).get("guidance") for line in done.out.splitlines() if line.startswith("{")]
    assert guidance == [2, None], done.err


def test_a_name_means_prepared_data_even_beside_a_folder(run, here, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    shutil.copy("data/digits.npz", tmp_path / "data/digits.npz")
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()
    done = run("fid", "digits", "--ref", "digits", "--features", "pixels")
    assert done.code == 0 and json.loads(done.out.splitlines()[-1])["n_ref"] == 1797, done.err
    refused(run("fid", "digits", "--ref", "digits/", "--features", "pixels"), "0 images")


def test_two_files_of_one_stage_are_told_apart(run, here, tmp_path):
    """The baseline without mid-training is a post-trained model, too."""
    baseline = tmp_path / "baseline.safetensors"
    baseline.write_bytes(Path("runs/digits/midtrain_cm.safetensors").read_bytes())
    files = "runs/digits/pretrain.safetensors:1", "runs/digits/midtrain_cm.safetensors:1", f"{baseline}:2"
    done = run("sample", *files, "--n", 2, "--out", tmp_path / "a.png")
    assert done.code == 0 and done.out.splitlines()[-1].startswith(
        "teacher, 1 NFE, after mid-training, 1 NFE, midtrain_cm, after mid-training, 2 NFE, baseline: ")


def test_an_autoencoder_that_diverges_is_noticed():
    header = {"latents": {"mean": [0.0] * 4, "scale": [1.0] * 4, "pixel_range": [-1, 1]}}
    class Vae:
        def decode(self, z):
            self.sample = torch.full((1, 3, 16, 16), torch.nan)
            return self
    with pytest.raises(model.Diverged): sample.to_images(torch.zeros(1, 4, 2, 2), header, Vae())
