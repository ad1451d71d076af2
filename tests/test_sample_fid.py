"""Sampling is a function of the seed; the Frechet distance has closed forms."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import fid, model, sample
from conftest import write_npz


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


def test_label_policies(run, here, tmp_path):
    for policy, expected in [("balanced", np.arange(12) % 10), ("7", np.full(12, 7))]:
        assert run("sample", "runs/digits/midtrain_cm.safetensors", "--n", 12, "--labels", policy,
                   "--out", tmp_path / "a.npz").code == 0
        assert np.array_equal(np.load(tmp_path / "a.npz")["arr_1"], expected)


def test_several_files_make_one_picture(run, here, tmp_path):
    files = [f"runs/digits/{name}" for name in ("pretrain.safetensors:2", "midtrain_cm.safetensors:1",
                                                "midtrain_cm.safetensors:2")]
    done = run("sample", *files, "--n", 5, "--real", "--labels", "balanced", "--out", tmp_path / "a.npz")
    assert done.code == 0 and not (tmp_path / "a.npz").exists()
    width, height = Image.open(tmp_path / "a.png").size
    assert height == 4 + 4 * 52 and width > 5 * 52


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
    assert sample.step_times(mf, 1) == [1.0] and sample.step_times(mf, 1, [0.3]) == [1.0]
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
    n, mu, cov = fid.statistics(x.split(10))
    assert n == 57 and np.allclose(mu, x.mean(0)) and np.allclose(cov, np.cov(x.numpy().T))


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
    assert sampled["calls"] == 2 and sampled["n"] == 70
    assert sampled["fd"] == pytest.approx(stored["fd"], rel=1e-9) and stored["fd"] > 1


def test_pixels_refuse_large_images(run, tmp_path):
    big = write_npz(tmp_path / "big.npz", n=3, size=36)
    done = run("fid", big, "--ref", big, "--features", "pixels")
    assert done.code == 2 and "3,072" in done.err and len(done.err.splitlines()) == 1
