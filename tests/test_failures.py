"""A failed run never looks like a good one, a flag never does nothing, and library functions are right or refuse."""
import importlib, json, math, os, pickle, subprocess, sys, types
from pathlib import Path

import numpy as np
import pytest
import torch

import fid, midtrain, model, posttrain_cm, posttrain_mf, pretrain, sample, solve
from tools import feature_networks
from conftest import ROOT, latents_npz, refused, vectors, write_npz
from test_runs import SMALL, STAGES


@pytest.fixture
def here(chain, monkeypatch):
    monkeypatch.chdir(chain)
    return chain


# --- divergence ---------------------------------------------------------------------------------------------

def test_a_diverged_run_saves_nothing_and_says_so(run, here, tmp_path):
    out = tmp_path / "a.safetensors"
    done = run("pretrain", "--lr", 1e9, "--steps", 20, "--batch", 8, "--save-every", 5, "--out", out)
    assert done.code == 3 and "not finite" in done.err and "nothing was saved" in done.err
    assert not out.exists() and not Path(model.resume_file(out)).exists()


def test_a_diverged_run_keeps_its_last_good_save(run, here, tmp_path, monkeypatch):
    out, update_ema, calls = tmp_path / "a.safetensors", model.update_ema, []
    def breaks(ema, net, decay):
        update_ema(ema, net, decay)
        calls.append(1)
        if len(calls) == 4: next(ema.parameters()).data.fill_(math.inf)
    monkeypatch.setattr(model, "update_ema", breaks)
    done = run("midtrain", "--steps", 8, "--batch", 8, "--nfe", 4, "--save-every", 2, "--out", out)
    assert done.code == 3 and "keeps what was saved before" in done.err
    assert model.read(out)[1]["step"] == 2
    assert all(v.isfinite().all() for v in model.read(model.resume_file(out))[0].values())


@pytest.mark.parametrize("script", ["sample", "fid"])
def test_samples_that_are_not_finite_are_refused(run, here, tmp_path, script):
    weights, header = model.read("runs/digits/midtrain_cm.safetensors")
    weights = {k: v * math.nan if v.is_floating_point() else v for k, v in weights.items()}
    model.save(tmp_path / "nan.safetensors", weights, header)
    flags = ["--features", "pixels", "--n", 8] if script == "fid" else ["--n", 8, "--out", tmp_path / "a.npz"]
    done = run(script, f"{tmp_path}/nan.safetensors:1", *flags)
    assert done.code == 3 and "not finite" in done.err and "Traceback" not in done.err
    assert not (tmp_path / "a.npz").exists() and not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("command", [
    ("pretrain", "--ema", "nan"), ("pretrain", "--ema", 1.5), ("pretrain", "--ema=-1"), ("pretrain", "--lr", "inf"),
    ("midtrain", "--guidance", "nan"), ("posttrain_cm", "--double=-1"), ("posttrain_mf", "--omega", "inf"),
    ("posttrain_mf", "--guidance-interval", 0.8, 0.2, "--omega", 0.5), ("posttrain_mf", "--guidance-interval", 0, 2),
    ("pretrain", "--beta1", 1), ("pretrain", "--P-std", 0), ("pretrain", "--seed=-1"), ("pretrain", "--dropout", 1),
    ("sample", "runs/digits/midtrain_cm.safetensors:2", "--mid-t", "nan"), ("pretrain", "--optimizer", "SGD")],
    ids=lambda c: " ".join(map(str, c)))
def test_impossible_numbers_are_refused(run, here, command):
    done = run(*command)
    assert done.code == 2 and "Traceback" not in done.err, done.err
    flags = [word.split("=")[0] for word in map(str, command) if word.startswith("--")]
    assert any(flag in done.err.splitlines()[-1] for flag in flags), done.err


# --- a flag never does nothing ------------------------------------------------------------------------------

FILE = "--trajectories", "runs/digits/trajectories.safetensors"

@pytest.mark.parametrize("command", [
    ("midtrain", *FILE, "--nfe", 64), ("midtrain", *FILE, "--solver", "heun"), ("midtrain", "--guide", "x"),
    ("midtrain", "--lpips", "a", "b"), ("posttrain_cm", "--guidance", 2), ("posttrain_cm", "--teacher", "x"),
    ("posttrain_cm", "--solver", "euler"), ("posttrain_cm", "--loss", "ecd", "--guide", "x"),
    ("posttrain_mf", "--teacher", "x"), ("posttrain_mf", "--guidance-interval", 0, 0.5), ("pretrain", "--world", 8),
    ("sample", "runs/digits/pretrain.safetensors", "--mid-t", 0.5),
    ("sample", "runs/digits/midtrain_cm.safetensors", "--n", 8, "--seeds", "0-7"),
    ("sample", "runs/digits/midtrain_cm.safetensors", "--data", "digits"),
    ("fid", "data/digits.npz", "--ref", "digits", "--features", "pixels", "--n", 8),
    ("fid", "data/digits.npz", "--ref", "digits", "--features", "pixels", "--inception", "x")],
    ids=lambda c: " ".join(map(str, c)))
def test_a_flag_without_effect_is_refused(run, here, command):
    refused(run(*command), "no effect", "Leave it out")


def test_the_header_says_how_the_trajectories_were_made(run, here, tmp_path):
    out = tmp_path / "a.safetensors"
    assert run("midtrain", *FILE, *SMALL, "--out", out).code == 0
    settings = model.read(out)[1]["settings"]
    assert settings["nfe"] == 8 and settings["solver"] == "dpm3"


def test_every_hyperparameter_is_a_flag(run, here, tmp_path):
    out = tmp_path / "a.safetensors"
    changes = dict(optimizer="RAdam", beta1=0.8, beta2=0.95, lr_decay="constant", warmup=100, P_mean=-0.5, P_std=0.9,
                   lr=1e-4, ema=0.9)
    flags = [word for k, v in changes.items() for word in (f"--{k.replace('_', '-')}", v)]
    assert run("pretrain", *flags, "--dropout", 0.3, *SMALL, "--out", out).code == 0
    header = model.read(out)[1]
    assert {k: header["settings"][k] for k in changes} == changes and header["network"]["dropout"] == 0.3
    for stage, (script, *rest) in STAGES.items():
        table = importlib.import_module(script).RECIPES
        table = table.get({"--objective": "flow", "--branch": "mf"}.get((*rest, "")[0]),
                          table.get("edm") or table.get("cm") or table)
        for data, recipe in table.items():
            done = run(script, *rest, "--data", data if data != "custom" else "mine", "--help")
            for k in recipe.keys() - {"network", "teacher_network", "teacher_command"}:
                flag = {"loss": "--loss"}.get(k, f"--{k.replace('_', '-')}")
                assert f"{flag} " in done.out, (stage, data, flag)


# --- solvers and NFE ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["Denoiser", "MeanVelocity"])
@pytest.mark.parametrize("nfe", [1, 2, 7, 13, 14, 15, 16, 35])
def test_heun_makes_the_calls_it_is_given(kind, nfe):
    """An even number with a flow model, whose last step goes into t = 0, is one call less."""
    header = model.fresh_header(model.DATASETS["digits"], kind)
    calls = []
    def teacher(x, *times_and_y):
        calls.append(times_and_y)
        return torch.zeros_like(x)
    solve.solve_teacher(teacher, header, torch.randn(2, 1, 8, 8), None, nfe, "heun")
    assert len(calls) == (nfe - 1 if kind == "MeanVelocity" and nfe % 2 == 0 else nfe)


def test_heun_with_35_calls_is_edms_sampler_of_18_steps():
    v, _ = vectors("edm_heun")
    header = model.fresh_header(model.DATASETS["cifar10"])
    times = solve.solver_times(header, 35, "heun")
    assert len(times) == 19 and times[-1] == 0 and times[0] == 80
    assert times[-2] == pytest.approx(0.002) and (times - v["out64/N18/t_steps"]).abs().max() < 1e-12


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_sample_takes_a_solver_and_names_it(run, here, tmp_path, solver):
    out = tmp_path / "model-v1.1"
    done = run("sample", "runs/digits/pretrain.safetensors:5", "--n", 4, "--solver", solver, "--out", out)
    assert done.code == 0 and f"pretrain.safetensors:5: solver {solver}" in done.out and "teacher, 5 NFE" in done.out, done.err
    assert Path(f"{out}.npz").exists() and Path(f"{out}.png").exists()
    default = run("sample", "runs/digits/pretrain_flow.safetensors:5", "--n", 4, "--out", tmp_path / "b")
    assert "solver heun" in default.out


# --- library functions --------------------------------------------------------------------------------------

def test_losses_of_samples_of_any_shape_are_those_of_images():
    """(B,D) and (B,T,D) give what the same numbers give as (B,D,1,1)."""
    g = torch.Generator().manual_seed(0)
    t, r = torch.tensor([0.5, 2.0, 9.0]), torch.tensor([0.4, 0.0, 3.0])
    for shape in (3, 5), (3, 2, 4), (3, 1, 3, 3):
        a, b = torch.randn(2, *shape, generator=g)
        f = lambda x, t, y=None: torch.tanh(x) * t.reshape(-1, *[1] * (x.dim() - 1))
        u = lambda z, r, t, y=None: f(z, t - 0.5 * r)
        y = torch.tensor([0, 1, 3])
        def losses(a, b):
            yield pretrain.edm_loss(f, a, b, t, y)
            yield pretrain.flow_loss(u, a, b, t, y)
            yield midtrain.cmt_loss(f, a, t, b, y, midtrain.huber)
            yield midtrain.cmt_meanflow_loss(u, a, t, b, r, y)
            yield posttrain_cm.ect_loss(f, a, b, t, r, y, 1 / t, 0.06)
            yield posttrain_cm.ecd_loss(f, a, b, t, r, y, 1 / t, 0.0, f)
            v = posttrain_mf.guided_velocity(u, a, t, y, b, 0.5, 0.2, 3)
            yield posttrain_mf.meanflow_loss(u, a, r, t, y, v, b)
        for flat, image in zip(losses(a, b), losses(*(x.reshape(3, -1, 1, 1) for x in (a, b)))):
            assert flat.shape == (3,) and torch.allclose(flat, image, rtol=1e-5)


def test_solver_arguments_that_make_no_sense_are_refused():
    x, times = torch.randn(2, 3), solve.log_uniform_times(4)
    for order in 0, 4, 5:
        with pytest.raises(ValueError, match="order"): solve.dpm_solver_pp(lambda x, t: x, x, times, order=order)
    for bad in (torch.tensor([1.0, 1.0, 0.5]), torch.tensor([0.5, 1.0]), torch.tensor([1.0, 0.5, 0.0])):
        with pytest.raises(ValueError, match="times"): solve.dpm_solver_pp(lambda x, t: x, x, bad)


def test_generate_takes_a_class_as_a_number_and_only_whole_ranges(here):
    net, header = model.load("runs/digits/midtrain_cm.safetensors")
    images, labels = next(sample.generate(net, header, range(4), 1, labels=3))
    assert labels.tolist() == [3] * 4 and images.shape == (4, 8, 8, 1)
    with pytest.raises(model.UserError, match="range"): next(sample.generate(net, header, range(0, 10, 2), 1))


def test_frechet_distance_takes_numpy_and_is_never_negative():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 8))
    mu, cov = x.mean(0), np.cov(x.T)
    assert fid.frechet_distance(mu, cov, mu + 2, cov).item() == pytest.approx(32)
    assert fid.frechet_distance(mu, cov, mu, cov) >= 0 and "-" not in f"{fid.frechet_distance(mu, cov, mu, cov):.4f}"


# --- reference statistics -----------------------------------------------------------------------------------

MU, SIGMA = np.full(64, 0.1), np.eye(64) + 0.01

@pytest.mark.parametrize("arrays", [
    dict(mu=MU, sigma=SIGMA), dict(mu=MU[None], sigma=SIGMA),
    dict(mu=MU.astype(np.float32), sigma=SIGMA.astype(np.float32)), "pkl"])
def test_statistics_whose_meaning_is_clear(run, here, tmp_path, arrays):
    path = tmp_path / "stats.npz"
    if arrays == "pkl":                                    # as EDM2 publishes them
        path = tmp_path / "img512.pkl"
        path.write_bytes(pickle.dumps({"fid": dict(mu=MU, sigma=SIGMA), "fd_dinov2": dict(mu=MU, sigma=SIGMA)}))
    else: np.savez(path, **arrays)
    mu, sigma = fid.read_statistics(str(path))
    assert torch.allclose(mu, torch.from_numpy(MU), rtol=1e-6) and mu.dtype == torch.float64
    assert torch.allclose(sigma, torch.from_numpy(SIGMA), rtol=1e-6)
    done = run("fid", "data/digits.npz", "--ref", path, "--features", "pixels")
    assert done.code == 0 and json.loads(done.out.splitlines()[-1])["fd"] > 0, done.err


class Evil:
    def __reduce__(self): return os.system, ("touch evil",)


@pytest.mark.parametrize("arrays, words", [
    (dict(mu=MU * math.nan, sigma=SIGMA), "not finite"), (dict(mu=MU, sigma=SIGMA * math.inf), "not finite"),
    (dict(mu=MU, sigma=SIGMA[:8]), "covariance"), (dict(mu=SIGMA, sigma=MU), "covariance"),
    (dict(mu=MU), "sigma"), ("evil", "damaged"), ("empty", "no mu")])
def test_statistics_that_are_none(run, here, tmp_path, arrays, words):
    path = tmp_path / "stats.npz"
    if isinstance(arrays, str):
        path = tmp_path / "stats.pkl"
        path.write_bytes(pickle.dumps({"fid": Evil()} if arrays == "evil" else {}))
    else: np.savez(path, **arrays)
    refused(run("fid", "data/digits.npz", "--ref", path, "--features", "pixels"), words)
    assert not Path("evil").exists()


def test_statistics_are_kept_by_content_and_saved_on_demand(run, here, tmp_path):
    def distance(ref):
        done = run("fid", "data/digits.npz", "--ref", ref, "--features", "pixels")
        assert done.code == 0, done.err
        return json.loads(done.out.splitlines()[-1])["fd"]
    ref = tmp_path / "ref.npz"
    with np.load("data/digits.npz") as f: images = f["arr_0"]
    np.savez(ref, arr_0=images)
    assert distance(ref) == pytest.approx(0, abs=1e-6)
    np.savez(ref, arr_0=255 - images)                      # other images under the same name
    assert distance(ref) > 10
    stats = tmp_path / "stats.npz"
    done = run("fid", ref, "--features", "pixels", "--save-stats", stats)
    assert done.code == 0 and distance(stats) == pytest.approx(distance(ref))


# --- continuing on other hardware ---------------------------------------------------------------------------

@pytest.mark.parametrize("stage", ["pretrain", "midtrain_cm"])
@pytest.mark.parametrize("change", [("--microbatch", 4), ("--precision", "bf16")])
def test_a_run_continues_with_another_microbatch_or_precision(run, here, tmp_path, monkeypatch, stage, change):
    script, *flags = STAGES[stage]
    command = script, *flags, "--steps", 4, "--batch", 8, "--save-every", 2, "--out", tmp_path / "a.safetensors"
    save_run = model.save_run
    def save_and_die(*args):
        save_run(*args)
        raise model.UserError("out of memory")
    monkeypatch.setattr(model, "save_run", save_and_die)
    assert run(*command).code == 2
    monkeypatch.setattr(model, "save_run", save_run)
    done = run(*command, *change)
    assert done.code == 0 and f"another {change[0][2:]}" in done.out and "not bit for bit" in done.out, done.err
    assert model.read(tmp_path / "a.safetensors")[1]["step"] == 4


# --- what comes next ----------------------------------------------------------------------------------------

def test_a_dry_run_prints_the_commands_for_what_is_missing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("midtrain", "--data", "imagenet64", "--dry-run")
    assert ("curl -LO https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/edm2-img64-s-1073741-0.075.pkl "
            "&& python tools/import_checkpoint.py edm2-img64-s-1073741-0.075.pkl --data imagenet64") in done.out
    done = run("posttrain_cm", "--data", "imagenet512", "--dry-run")
    for words in ("edm2-img512-xxl-0939524-0.075.pkl --data imagenet512 --out runs/imagenet512/guided.safetensors",
                  "edm2-img512-m-0268435-0.155.pkl --data imagenet512 --out runs/imagenet512/guide.safetensors",
                  "python tools/prepare_data.py SOURCE --data imagenet512",
                  "python midtrain.py --data imagenet512"):
        assert words in done.out, done.out
    refused(run("midtrain", "--data", "cifar10"), "curl -LO https://", "--data cifar10")


def test_recipes():
    assert pretrain.RECIPES["edm"]["imagenet64"]["steps"] * 2048 == 1024 * 2 ** 20
    assert pretrain.RECIPES["edm"]["imagenet512"]["steps"] * 2048 == 896 * 2 ** 20
    small, large = (posttrain_cm.RECIPES[k] for k in ("imagenet64", "imagenet512"))
    assert small["loss"] == "ecd" and small["double"] == 0
    assert all(small[k] == large[k] for k in ("q", "lr", "lr_decay", "c", "weight", "P_mean", "P_std", "steps", "ema"))
    assert posttrain_mf.RECIPES["imagenet256"]["c"] == 1e-2 and posttrain_mf.RECIPES["cifar10"]["c"] == 1e-3


def test_dropped_labels_are_of_samples_with_r_equal_t():
    """A share of 10 % of all samples, all of them with r = t. The count has a standard deviation of 0.3 %."""
    torch.manual_seed(0)
    y, equal = torch.zeros(10_000, dtype=torch.int64), torch.arange(10_000) % 4 > 0
    dropped = posttrain_mf.drop_labels_where_equal(y, equal, 0.1, 7) == 7
    assert not (dropped & ~equal).any() and abs(dropped.float().mean() - 0.1) < 0.015


# --- platforms ----------------------------------------------------------------------------------------------

def test_import_and_save_without_posix(tmp_path):
    """As on Windows: no modules `resource` and `fcntl`."""
    code = f"""
import sys
sys.modules["resource"] = None
sys.path.insert(0, {str(ROOT)!r})
import model, torch
sys.platform, model.fcntl = "win32", None
model.save({str(tmp_path / 'a.safetensors')!r}, {{"w": torch.ones(2)}}, {{}})
print(model.peak_memory(), model.read({str(tmp_path / 'a.safetensors')!r})[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "nan" in done.stdout, done.stderr


def test_files_have_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try: model.save(tmp_path / "a.safetensors", {"w": torch.ones(2)}, {})
    finally: os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_long_seed(run, here, tmp_path):
    assert run("pretrain", *SMALL, "--seed", "20251125123456", "--out", tmp_path / "café.safetensors").code == 0


# --- the paper's distance of latents ------------------------------------------------------------------------

def test_elatentlpips(monkeypatch):
    """The package gets the autoencoder's own latents, and gives one number per sample."""
    header = model.fresh_header(model.DATASETS["imagenet512"])
    monkeypatch.setitem(sys.modules, "elatentlpips", None)
    with pytest.raises(model.UserError, match="pip install elatentlpips"):
        feature_networks.load_elatentlpips(header, "cpu")
    seen = []
    class ELatentLPIPS(torch.nn.Module):
        def __init__(self, encoder, augment, verbose):
            super().__init__()
            assert encoder == "sd15"
            self.conv = torch.nn.Conv2d(4, 2, 3)
        def forward(self, a, b, normalize):
            assert normalize
            seen.append(a)
            return (self.conv(a) - self.conv(b)).square().mean((1, 2, 3), keepdim=True)
    monkeypatch.setitem(sys.modules, "elatentlpips", types.SimpleNamespace(ELatentLPIPS=ELatentLPIPS))
    distance = feature_networks.load_elatentlpips(header, "cpu")
    z = torch.randn(3, 4, 64, 64)
    mean, scale = (torch.tensor(header["latents"][k])[:, None, None] for k in ("mean", "scale"))
    a = ((z - mean) * scale).requires_grad_()
    d = distance(a, torch.zeros(3, 4, 64, 64))
    d.sum().backward()
    assert d.shape == (3,) and torch.allclose(seen[0], z, atol=1e-5) and a.grad.abs().sum() > 0
    with pytest.raises(model.UserError, match="for latents"):
        feature_networks.load_elatentlpips(model.fresh_header(model.DATASETS["cifar10"]), "cpu")


# --- the wrong kind of file ---------------------------------------------------------------------------------

def test_statistics_are_not_written_over_data(run, here, tmp_path):
    data = tmp_path / "a.npz"
    write_npz(data, channels=1)
    before = data.read_bytes()
    refused(run("fid", data, "--save-stats", data, "--features", "pixels"), "holds no statistics")
    assert data.read_bytes() == before


def test_the_wrong_kind_of_file_is_named(run, here, tmp_path):
    pixels = "--features", "pixels"
    np.savez(tmp_path / "stats.npz", mu=MU, sigma=SIGMA)
    refused(run("fid", tmp_path / "stats.npz", "--ref", "digits", *pixels), "statistics", "--ref")
    refused(run("fid", "data/digits.npz", "--ref", "runs/digits/trajectories.png", *pixels), "one image")
    refused(run("sample", "runs/digits/trajectories.png"), "no .safetensors checkpoint")
    done = run("fid", "digits", "--ref", "digits", *pixels)
    assert done.code == 0 and "FD-pixels 0.0000" in done.out, done.err


# --- what a second round found ------------------------------------------------------------------------------

@pytest.mark.parametrize("command", [
    ("pretrain", "--P-mean", 1000), ("midtrain", "--guidance", 1e38, "--nfe", 4), ("posttrain_cm", "--P-mean", -1000),
    ("posttrain_mf", "--omega", 1e38)], ids=lambda c: " ".join(map(str, c)))
def test_a_run_without_a_finite_step_is_not_finished(run, here, tmp_path, command):
    done = run(*command, "--steps", 5, "--batch", 8, "--out", tmp_path / "a.safetensors")
    assert done.code == 3 and "not finite for 5 steps in a row" in done.err and "finished" not in done.out
    assert not (tmp_path / "a.safetensors").exists()


def test_trajectories_that_are_not_finite_are_not_written(run, here, tmp_path):
    done = run("solve", "--n", 2, "--guidance", 1e38, "--out", tmp_path / "t.safetensors")
    assert done.code == 3 and "not finite" in done.err and not list(tmp_path.iterdir())


def test_a_resume_file_of_another_stage_is_refused(run, here, tmp_path):
    out = tmp_path / "a.safetensors"
    assert run("midtrain", "--nfe", 4, *SMALL, "--out", out).code == 0
    refused(run("posttrain_cm", *SMALL, "--out", out), "belongs to midtrain_cm")
    refused(run("posttrain_cm", *SMALL, "--out", tmp_path / "a.resume.safetensors"), "--out")
    (tmp_path / "b.resume.safetensors").write_bytes(Path("runs/digits/trajectories.safetensors").read_bytes())
    refused(run("pretrain", *SMALL, "--out", tmp_path / "b.safetensors"), "belongs to solve")


def test_what_is_read_is_not_overwritten(run, here, tmp_path):
    teacher = tmp_path / "teacher.safetensors"
    teacher.write_bytes(before := Path("runs/digits/pretrain.safetensors").read_bytes())
    refused(run("midtrain", *SMALL, "--teacher", teacher, "--out", teacher), "is read for")
    refused(run("solve", "--n", 2, "--teacher", teacher, "--out", teacher), "exists, and is not from solve on digits")
    assert teacher.read_bytes() == before
    refused(run("solve", "--n", 2, "--out", tmp_path / "tr.png"), ".safetensors")


@pytest.mark.parametrize("command", [
    ("sample", "runs/digits/posttrain_cm.safetensors:1", "--mid-t", 0.5),
    ("sample", "runs/digits/posttrain_cm.safetensors:1", "--vae", "x"),
    ("sample", "runs/digits/pretrain.safetensors", "--guide", "x"), ("solve", "--guide", "x"),
    ("fid", "data/digits.npz", "--ref", "digits", "--features", "pixels", "--precision", "bf16"),
    ("posttrain_mf", "--c", 0.5)], ids=lambda c: " ".join(map(str, c)))
def test_more_flags_without_effect(run, here, command):
    refused(run(*command), "no effect")


def test_guidance_without_classes_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_npz("a.npz", classes=0)
    assert run("pretrain", "--objective", "flow", "--data", "a.npz", *SMALL).code == 0
    init = "--init", "runs/a/pretrain_flow.safetensors"
    refused(run("posttrain_mf", "--data", "a.npz", *init, *SMALL, "--omega", 3), "--omega", "no classes")


@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 5])
def test_heun_on_a_flow_model_that_does_not_reach_zero(nfe):
    header = model.fresh_header(model.DATASETS["digits"], "MeanVelocity") | {"t_min": 0.002}
    calls = []
    solve.solve_teacher(lambda z, r, t, y: calls.append(t) or z, header, torch.randn(2, 1, 8, 8), None, nfe, "heun")
    assert len(calls) == nfe


def test_more_library_edges(here):
    net, header = model.load("runs/digits/pretrain.safetensors")
    for steps, flags in (0, {}), (2.5, {}), (4, {"mid_t": [0.8]}), (4, {"solver": "jump"}):
        with pytest.raises(model.UserError): sample.generate(net, header, range(2), steps, **flags)   # at once
    x, t, one = torch.randn(4, 1, 8, 8), torch.ones(4), torch.ones(4, 1)
    f = lambda x, t, y: 0.5 * x
    assert posttrain_cm.consistency_loss(f, x, 0.9 * x, t, 0.9 * t, None, one, 0.1).shape == (4,)
    with pytest.raises(ValueError): posttrain_cm.ode_step(f, x, t, 0.9 * t, None, "dpm3")
    with pytest.raises(ValueError): posttrain_cm.ect_weight(t, 0.9 * t, "gapp")
    with pytest.raises(ValueError): midtrain.pair_table(4, "flow")
    with pytest.raises(ValueError): solve.log_uniform_times(0)
    with pytest.raises(ValueError): solve.log_uniform_times(4, t_min=0)
    seen = solve.without_label(lambda x, t, y: y, 7)(torch.zeros(3, 1), torch.ones(3), None)
    assert seen.tolist() == [7, 7, 7]
    mu, cov = torch.randn(8), torch.eye(8)
    assert fid.frechet_distance(mu[:, None], cov, mu, cov) == 0
    for wrong in (mu[:1], cov), (torch.randn(100, 8), cov), (mu, cov[0]):
        with pytest.raises(ValueError): fid.frechet_distance(*wrong, mu, cov)


def test_a_damaged_part_and_another_guide_are_sampled_again(run, here, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "PART", 64)
    draw_parts, guide = sample.draw_parts, tmp_path / "guide.safetensors"
    def dies(*args):
        parts = draw_parts(*args)
        if broken: raise model.UserError("the power went out")
        return parts
    monkeypatch.setattr(sample, "draw_parts", dies)
    command = "sample", "runs/digits/pretrain.safetensors:2", "--guidance", 3, "--guide", guide, "--n", 70
    images = []
    for source in "pretrain", "midtrain_cm":
        weights, header = model.read(f"runs/digits/{source}.safetensors")
        weights = {k: v + 0.02 * (source == "midtrain_cm") for k, v in weights.items()}
        model.save(guide, weights, header | {"stage": "pretrain"})          # a consistency model cannot guide
        broken = True
        assert run(*command, "--out", tmp_path / "a.npz").code == 2
        next((tmp_path / "a.parts").glob("*-0-64.npz")).write_bytes(b"PK cut")
        broken = False
        done = run(*command, "--out", tmp_path / "a.npz")
        assert done.code == 0, done.err
        images.append(np.load(tmp_path / "a.npz")["arr_0"])
    assert not np.array_equal(images[0][:64], images[1][:64])


@pytest.mark.parametrize("command, words", [
    (("midtrain", *FILE[:1], "nope.safetensors"), "nope.safetensors: python solve.py"),
    (("midtrain", *FILE[:1], "a b.safetensors"), "solve.py --data digits --teacher runs/digits/pretrain.safetensors "
     "--out 'a b.safetensors'"),
    (("midtrain", "--branch", "mf", "--teacher", "x/pretrain.safetensors", "--init", "none"),
     "x/pretrain.safetensors: python pretrain.py --data digits\n"),
    (("midtrain", "--branch", "mf", "--teacher", "x.safetensors"), "python pretrain.py --data digits --objective flow"),
    (("midtrain", "--guidance", 2, "--guide", "nope.safetensors"), "nope.safetensors"),
    (("posttrain_cm", "--data", "cifar10"), "edm-cifar10-32x32-uncond-vp.pkl")])
def test_a_dry_run_lists_every_missing_file(run, here, command, words):
    done = run(*command, "--dry-run")
    assert done.code == 0 and words in done.out, (done.out, done.err)


@pytest.mark.parametrize("command", [
    ("posttrain_mf", "--batch", 6), ("pretrain", "--data", "a.npz", "--width", 48), ("midtrain", "--distance", "lpips"),
    ("midtrain", "--solver", "jump"), ("midtrain", "--init", "runs/digits/trajectories.safetensors"),
    ("midtrain", "--teacher", "runs/digits/midtrain_cm.safetensors"),
    ("posttrain_cm", "--data", "cifar10", "--init", "runs/digits/midtrain_cm.safetensors"),
    ("posttrain_mf", "--init", "runs/digits/pretrain.safetensors")], ids=lambda c: " ".join(map(str, c)))
def test_a_dry_run_refuses_what_the_run_refuses(run, here, command):
    for flags in (), ("--dry-run",):
        done = run(*command, *flags)
        assert done.code == 2 and "Traceback" not in done.err, (flags, done.err)


def test_a_dry_run_needs_four_samples_for_each_mean_flow_process(run, here):
    refused(run("posttrain_mf", "--batch", 8, "--dry-run", "--world", 4), "for 4 processes", "multiple of 16")


def test_a_dry_run_says_whose_activations_it_leaves_out(run, here):
    pool = "activations of the teacher, which solves a pool"
    assert pool in run("midtrain", "--dry-run").out
    ecd = run("posttrain_cm", "--loss", "ecd", "--dry-run").out
    assert "activations of the teacher" in ecd and pool not in ecd
    assert "activations of the teacher" not in run("posttrain_cm", "--dry-run").out


def test_a_dry_run_counts_no_more_samples_than_there_are(run, here):
    memory = [line for flags in ((), ("--microbatch", 4096))
              for line in run("pretrain", "--data", "cifar10", "--dry-run", *flags).out.splitlines() if "GiB" in line]
    assert len(memory) == 2 and memory[0] == memory[1]


def test_other_files_are_not_replaced(run, here, tmp_path):
    """Only an earlier result of the same script is: not data, statistics, imported or other checkpoints."""
    model_file, digits = "runs/digits/midtrain_cm.safetensors", Path("data/digits.npz").read_bytes()
    refused(run("sample", model_file, "--n", 2, "--out", "data/digits.npz"), "holds other data than samples")
    assert Path("data/digits.npz").read_bytes() == digits
    np.savez(tmp_path / "stats.npz", mu=MU, sigma=SIGMA)
    (tmp_path / "text.npz").write_text("not a zip")
    (tmp_path / "folder.npz").mkdir()
    for name in "stats", "text", "folder":
        refused(run("sample", model_file, "--n", 2, "--out", tmp_path / name), "holds other data than samples")
    for _ in range(2): assert run("sample", model_file, "--n", 2, "--out", tmp_path / "new.npz").code == 0
    tensors, header = model.read("runs/digits/pretrain.safetensors")
    for stage, extra in ("pretrain", {"imported from": "x.pkl", "step": 0}), ("posttrain_cm", {}), ("solve", {}):
        out = tmp_path / f"{stage}.safetensors"
        model.save(out, tensors, header | {"stage": stage} | extra)
        what = "exists, and is imported" if extra else "exists, and is not from pretrain on digits"
        refused(run("pretrain", *SMALL, "--out", out), what)
    model.save(tmp_path / "other.safetensors", tensors, header | {"data": "cats"})
    refused(run("pretrain", *SMALL, "--out", tmp_path / "other.safetensors"), "not from pretrain on digits")
    # but a model trained from an imported one is: without its resume file the run starts over
    model.save(tmp_path / "own.safetensors", tensors, header | {"imported from": "x.pkl"})
    assert run("pretrain", *SMALL, "--out", tmp_path / "own.safetensors").code == 0
    refused(run("solve", "--n", 1, "--out", tmp_path / "pretrain.safetensors"), "exists, and is")
    refused(run("fid", "data/digits.npz", "--features", "pixels", "--ref", tmp_path / "stats.npz",
                "--save-stats", tmp_path / "stats.npz"), "is read for --ref")


def test_two_writers_of_a_file(tmp_path):
    with pytest.raises(model.UserError, match="another process writes"):
        with model.atomic_write(tmp_path / "a") as part:
            part.write_text("first")
            with model.atomic_write(tmp_path / "a"): pass
    assert not list(tmp_path.iterdir())
    with model.atomic_write(tmp_path / "a") as part: part.write_text("second")
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "second"


def test_a_file_without_permission_is_not_called_damaged(monkeypatch, here):
    def no_permission(path, *a, **k): raise PermissionError(13, "Permission denied", str(path))
    for opens in "builtins.open", "io.open": monkeypatch.setattr(opens, no_permission)
    for read in (lambda: model.read("runs/digits/pretrain.safetensors", advice="delete it"),
                 lambda: model.Data("data/digits.npz"), lambda: model.data_identity("data/digits.npz")):
        with pytest.raises(model.UserError, match="cannot be read .Permission denied.") as refusal: read()
        assert "delete" not in str(refusal.value)


@pytest.mark.parametrize("command, words", [
    (("midtrain", "--teacher", "runs/digits/midtrain_cm.safetensors"), "`python pretrain.py --data digits` makes one"),
    (("midtrain", "--branch", "mf", "--teacher", "runs/digits/pretrain_flow.safetensors", "--init",
      "runs/digits/pretrain.safetensors"), "`python pretrain.py --data digits --objective flow` makes one"),
    (("posttrain_cm", "--loss", "ecd", "--teacher", "runs/digits/midtrain_cm.safetensors"), "`python pretrain.py"),
    (("posttrain_mf", "--init", "runs/digits/pretrain.safetensors"), "`python midtrain.py --data digits --branch mf`"),
    (("midtrain", "--guidance", 2, "--guide", "nope.safetensors"), "to make it: pre-train a smaller model"),
    (("sample", "runs/digits/trajectories.safetensors:1"), "was written by stage solve; it is not a model"),
    (("sample", "runs/digits/midtrain_cm.safetensors:1", "--seeds", f"0-{2 ** 32}"), "2^32"),
    (("pretrain", "--data", "/x/y.npz"), "--data y` makes it from images in any form as data/y.npz"),
    (("posttrain_cm", "--mid-t", 1000), "between"), (("midtrain", "--mid-t", 0.0001), "between"),
    (("midtrain", "--guidance", 2, "--guide", "runs/digits/midtrain_cm.safetensors"), "cannot guide"),
    (("sample", "runs/digits/posttrain_mf.safetensors:1", "--guidance", 2,         # u(z, r, t) needs a guide with r
      "--guide", "runs/digits/pretrain_flow.safetensors"), "cannot guide"),
    (("fid", "digits", "--ref", "digits", "--features", "pixels", "--n", 5), "no effect"),
    (("pretrain", "--data", "cifar-10-python.tar.gz"), "cifar-10-python.tar.gz --data cifar-10-python`"),
    (("posttrain_cm", "--q", 1), "65536"), (("solve", "--data", "my data"), "--data 'my data'"),
    (("solve", "--teacher", "x/pretrain_flow.safetensors"), "--data digits --objective flow`")],
    ids=lambda c: " ".join(map(str, c)) if isinstance(c, tuple) else c)
def test_more_refusals(run, here, tmp_path, command, words):
    out = () if command[0] in ("fid", "solve") else ("--out", tmp_path / "a.safetensors")
    done = run(*command, *out)
    assert done.code == 2 and words in done.err and "Traceback" not in done.err, done.err


def test_the_documented_dry_run_of_a_denoiser_as_mean_flow_teacher(run, here):
    teacher = "--teacher", "runs/digits/pretrain.safetensors"
    done = run("midtrain", "--branch", "mf", *teacher, "--init", "none", "--dry-run")
    assert done.code == 0 and "GiB" in done.out, done.err


# --- what a careless user does ------------------------------------------------------------------------------

def test_a_leftover_rank_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")                        # without WORLD_SIZE the run would write nothing
    refused(run("pretrain", "--steps", 1, "--out", tmp_path / "a.safetensors"), "RANK", "unset")
    monkeypatch.setenv("RANK", "")
    assert run("pretrain", "--steps", 1, "--batch", 8, "--no-preview", "--out", tmp_path / "a.safetensors").code == 0


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_said_in_one_sentence(capsys, error):
    def main(): raise error
    with pytest.raises(SystemExit) as done: model.run(main)
    err = capsys.readouterr().err
    assert done.value.code == 1 and "--microbatch" in err and "Traceback" not in err


def test_classes_without_images_are_said(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("digits.npz", arr_0=np.zeros((9, 8, 8, 1), np.uint8), arr_1=np.array([0, 5, 9] * 3))
    done = run("pretrain", "--data", "digits.npz", "--steps", 1, "--batch", 8, "--no-preview")
    assert done.code == 0 and "no images of 7 of 10 classes" in done.out
    assert "no images" not in run("pretrain", "--steps", 1, "--batch", 8, "--no-preview", "--data",
                                  ROOT / "data/digits.npz", "--out", "b.safetensors").out


def test_ect_without_mid_training_needs_a_wide_gap(run, tmp_path):
    flags = "--steps", 1, "--batch", 8, "--no-preview"
    teacher, out = ROOT / "data/digits_teacher.safetensors", tmp_path / "a.safetensors"
    for init, more, warned in (teacher, (), True), ("none", (), True), \
            (teacher, ("--q", 2, "--double", 9), False), (teacher, ("--q", 2), True), \
            (teacher, ("--q", 256, "--double", 9), True), (ROOT / "data/digits_cmt.safetensors", (), False), \
            (teacher, ("--loss", "ecd", "--teacher", teacher), False):
        done = run("posttrain_cm", *flags, "--init", init, *more, "--out", out)
        assert done.code == 0 and ("is not mid-trained" in done.out) == warned, done.out + done.err
        assert "rounding error" not in done.out
        for file in tmp_path.iterdir(): file.unlink()
    done = run("posttrain_cm", *flags, "--init", init, *more, "--out", out, "--precision", "bf16")
    assert done.code == 0 and "rounding error" in done.out, done.err


def test_mid_training_names_what_cannot_work(run, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(chain)
    flags = "--steps", 1, "--batch", 8, "--no-preview", "--out", tmp_path / "a.safetensors"
    refused(run("midtrain", *flags, "--branch", "mf", "--teacher", "runs/digits/pretrain.safetensors"),
            "is a denoiser", "--init none")
    refused(run("midtrain", *flags, "--trajectories", tmp_path / "none"), "does not exist", "python solve.py")
    refused(run("midtrain", *flags, "--data", "imagenet256"), "--branch mf")
    rgb = write_npz(tmp_path / "rgb.npz", classes=10)
    refused(run("midtrain", *flags, "--data", rgb, "--teacher", "runs/digits/pretrain.safetensors"),
            "pretrain.safetensors is for images of 1x8x8", "rgb.npz for images of 3x8x8")
    (tmp_path / "edm.pkl").write_text("a pickle")
    refused(run("midtrain", *flags, "--teacher", tmp_path / "edm.pkl"), "tools/import_checkpoint.py")
    refused(run("midtrain", *flags, "--teacher", tmp_path), "is a folder")
    done = run("midtrain", *flags, "--nfe", 1)
    assert done.code == 0 and "in a single step" in done.out, done.err


def test_latents_and_images_of_one_shape_are_told_apart(run, tmp_path):
    g = np.random.default_rng(0)
    scale = {"mean": [0.0] * 3, "scale": [1.0] * 3, "pixel_range": [-1, 1]}
    lat = latents_npz(tmp_path / "lat.npz", g.standard_normal((8, 3, 8, 8)).astype(np.float32), scale, np.arange(8) % 4)
    rgb = write_npz(tmp_path / "rgb.npz", classes=4)
    flags = "--steps", 1, "--batch", 8, "--no-preview"
    for data, other in (lat, rgb), (rgb, lat):
        teacher = str(tmp_path / "teacher.safetensors")
        made = run("pretrain", *flags, "--data", data, "--out", teacher)
        assert made.code == 0, made.err
        refused(run("posttrain_cm", *flags, "--data", other, "--init", teacher, "--out", tmp_path / "a.safetensors"),
                "latents of 3x8x8", "images of 3x8x8", "agree")
        for file in tmp_path.glob("teacher*"): file.unlink()


def test_latents_of_another_scale_or_pixel_range(run, tmp_path):
    """Sampling would decode them by the wrong map. An imported teacher keeps the scale it was trained with."""
    g, files = np.random.default_rng(0), {}
    for name, scale, pixel_range in [("a", 1.0, [0, 1]), ("b", 0.5, [0, 1]), ("c", 1.0, [-1, 1])]:
        latents = {"mean": [0.0] * 3, "scale": [scale] * 3, "pixel_range": pixel_range}
        z = g.standard_normal((8, 3, 8, 8)).astype(np.float32)
        files[name] = latents_npz(tmp_path / f"{name}.npz", z, latents)
    flags, out = ("--steps", 1, "--batch", 8, "--no-preview"), tmp_path / "out.safetensors"
    teacher, other = tmp_path / "teacher.safetensors", tmp_path / "other.safetensors"
    assert run("pretrain", *flags, "--data", files["a"], "--out", teacher).code == 0
    assert run("pretrain", *flags, "--data", files["b"], "--out", other).code == 0
    mid = "midtrain", *flags, "--nfe", 2, "--out", out, "--data"
    refused(run(*mid, files["c"], "--teacher", teacher), "pixels in [0, 1]", "pixels in [-1, 1]", "agree")
    refused(run("posttrain_cm", *flags, "--out", out, "--data", files["c"], "--init", teacher), "pixels in [-1, 1]")
    refused(run(*mid, files["a"], "--teacher", teacher, "--init", other), "scale latents differently")
    refused(run("posttrain_cm", *flags, "--out", out, "--data", files["a"], "--init", other, "--loss", "ecd", "--teacher",
                teacher), "scale latents differently")
    done = run(*mid, files["b"], "--branch", "mf", "--teacher", teacher, "--init", "none")
    assert done.code == 0, done.err
    assert model.read(out)[1]["latents"]["scale"] == [1.0] * 3         # the teacher's, not the data's
