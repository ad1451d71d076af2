"""Solvers against stored reference trajectories, their order of convergence, the Gaussian's closed form."""
import inspect, math

import pytest
import torch

import model, solve
from conftest import mixture_denoiser, vectors


def mixture(v, dtype=torch.float64):
    return mixture_denoiser(*(v[f"in/mix_{k}"].to(dtype) for k in ("means", "stds", "weights")))


@pytest.mark.parametrize("N", [4, 8, 16, 32])
def test_dpm_solver_reproduces_the_reference(N):
    v, _ = vectors("dpm_solver")
    for dtype, out, tolerance in [(torch.float64, "out64", 1e-12), (torch.float32, "out", 2e-5)]:
        states, times = solve.dpm_solver_pp(mixture(v, dtype), v["in/x_T"].to(dtype),
                                            solve.log_uniform_times(N))
        assert states.dtype == dtype and times.dtype == torch.float64
        assert (times - v[f"out64/N{N}/timesteps"]).abs().max() < 1e-12
        assert (states - v[f"{out}/N{N}/traj"]).abs().max() < tolerance


@pytest.mark.parametrize("N", [5, 9, 18])
def test_heun_reproduces_the_reference(N):
    v, _ = vectors("edm_heun")
    denoise = mixture(v)
    times = torch.cat([solve.karras_times(N - 1), torch.zeros(1, dtype=torch.float64)])    # EDM appends 0
    states, _ = solve.heun(lambda x, t: (x - denoise(x, t)) / t[:, None], v["in/latents"] * times[0], times)
    assert (times - v[f"out64/N{N}/t_steps"]).abs().max() < 1e-12
    assert (states - v[f"out64/N{N}/traj"]).abs().max() < 1e-12


def order(solver, v):
    """Slope of the end-point error over N = 128, 256, 512, in float64."""
    errors = [(solver(N) - v["out64/ode_endpoint"]).abs().max().item() for N in (128, 512)]
    return math.log(errors[0] / errors[1]) / math.log(4)


def test_observed_orders():
    v, _ = vectors("dpm_solver")
    denoise, x = mixture(v), v["in/x_T"].double()
    end = lambda k, f=solve.dpm_solver_pp: lambda N: f(denoise, x, solve.log_uniform_times(N), order=k)[0][-1]
    assert abs(order(end(1), v) - 1) < 0.15
    assert abs(order(end(2), v) - 2) < 0.15
    assert abs(order(end(3), v) - 2) < 0.15, "the released third-order step is of order 2"

    released, corrected = "x = x + phi2 * D1 - phi3 * D2", "x = x + phi2 * D1 - 2 * phi3 * D2"
    source = inspect.getsource(solve.dpm_solver_pp)
    assert source.count(released) == 1
    space = dict(vars(solve))
    exec(source.replace(released, corrected), space)
    assert abs(order(end(3, space["dpm_solver_pp"]), v) - 3) < 0.2

    velocity = lambda x, t: (x - denoise(x, t)) / t[:, None]
    assert abs(order(lambda N: solve.euler(velocity, x, solve.karras_times(N))[0][-1], v) - 1) < 0.15
    assert abs(order(lambda N: solve.heun(velocity, x, solve.karras_times(N))[0][-1], v) - 2) < 0.15


@pytest.mark.parametrize("solver", ["dpm1", "dpm2", "dpm3", "euler", "heun"])
def test_gaussian_closed_form_and_count_of_calls(solver):
    """Data N(0, s^2): D = s^2 x / (s^2 + t^2); the flow map scales by sqrt((s^2 + t_end^2) / (s^2 + t^2))."""
    s, x, calls = 0.5, 80 * torch.randn(16, 3, 1, 1, dtype=torch.float64), []
    def denoise(x, t, y):
        calls.append(t)
        assert t.shape == (16,) and t.dtype == x.dtype
        return s ** 2 / (s ** 2 + t[:, None, None, None] ** 2) * x
    header = {"kind": "Denoiser", "t_max": 80.0, "t_min": 0.002}
    states, times = solve.solve_teacher(denoise, header, x, None, 256, solver)
    assert len(calls) == 256 and len(states) == len(times) == (129 if solver == "heun" else 257)
    assert torch.equal(states[0], x) and times[0] == 80 and abs(times[-1] - 0.002) < 1e-12
    exact = x * ((s ** 2 + times ** 2) / (s ** 2 + 80 ** 2)).sqrt().reshape(-1, 1, 1, 1, 1)
    error = ((states - exact).flatten(1).abs().amax(1) / exact.flatten(1).abs().amax(1)).max()
    assert error < {"dpm1": 0.03, "euler": 0.03}.get(solver, 1e-3)


@pytest.mark.parametrize("kind, ends, solvers", [("Denoiser", (80.0, 0.002), ["dpm3", "euler", "heun"]),
                                                 ("MeanVelocity", (1.0, 0.0), ["euler", "heun", "jump"])])
def test_count_calls_is_what_a_solve_takes(kind, ends, solvers):
    header, calls = {"kind": kind, "t_max": ends[0], "t_min": ends[1]}, []
    def teacher(x, *times_and_label):
        calls.append(1)
        return 0.5 * x
    for solver in solvers:
        for nfe in (1, 2, 7, 8):
            calls.clear()
            times = solve.solve_teacher(teacher, header, torch.ones(2, 1, 4, 4), None, nfe, solver)[1]
            assert len(calls) == solve.count_calls(times, solver) <= nfe


def test_guidance():
    """w = 1 is the plain teacher, bit for bit; w = 0 the guide; else the line through both."""
    x, t, y = torch.randn(4, 1, 8, 8), torch.rand(4) + 0.1, torch.arange(4)
    D = lambda x, t, y: x * (1 + y.float())[:, None, None, None]
    weak = solve.without_label(D, 10)
    assert torch.equal(weak(x, t, y), 11 * x)
    assert torch.equal(solve.guided(D, weak, 1.0)(x, t, y), D(x, t, y))
    assert torch.allclose(solve.guided(D, weak, 0.0)(x, t, y), 11 * x)
    assert torch.allclose(solve.guided(D, weak, 2.0)(x, t, y), 2 * D(x, t, y) - 11 * x, atol=1e-5)


def test_a_new_solver_needs_its_name_only(run, chain, tmp_path, monkeypatch):
    """Heun's method under another name trains the same student."""
    monkeypatch.chdir(chain)
    monkeypatch.setitem(solve.SOLVERS, "mine", ("velocity", solve.heun))
    monkeypatch.setitem(solve.CALLS_PER_STEP, "mine", 2)
    for solver in "heun", "mine":
        done = run("midtrain", "--steps", 2, "--batch", 8, "--nfe", 8, "--solver", solver,
                   "--out", tmp_path / f"{solver}.safetensors")
        assert done.code == 0, done.err
    a, b = (model.read(tmp_path / f"{solver}.safetensors")[0] for solver in ("heun", "mine"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    done = run("midtrain", "--solver", "rk45")
    assert done.code == 2 and "rk45" in done.err
