"""ECT and ECD: schedule and loss against the reference, the shared dropout mask, the teacher's step."""
import shutil

import pytest
import torch

import model, posttrain_cm, solve
from conftest import mixture_denoiser, relerr, vectors


def test_schedule_reproduces_the_reference():
    v, meta = vectors("ect_schedule")
    for q, stage in meta["config"]["table"]:
        r = posttrain_cm.ect_r(v["in/t"], q, stage)
        assert relerr(r, v[f"out64/r_q{q}_stage{stage}"]) < 1e-14 and (r >= 0).all() and (r < v["in/t"]).all()


def test_doubling_stops_where_fp32_ends():
    t = (2.0 * torch.randn(10_000, generator=torch.Generator().manual_seed(0)) - 1.1).exp()
    for stage in (15, 16, 25, 5000):
        r = posttrain_cm.ect_r(t, 2, stage)
        assert (r < t).all() and torch.equal(r, posttrain_cm.ect_r(t, 2, 15))


@pytest.mark.parametrize("name, kind", [("ecm_loss", "gap"), ("ecm_loss_snrpk", "denoising")])
def test_loss_reproduces_the_reference(name, kind):
    v, meta = vectors(name)
    x0, eps = v["in/y"].double(), v["in/eps"].double()
    t = (2.0 * v["in/rnd_normal"].double().flatten() - 1.1).exp()
    assert relerr(t, v["out64/t"]) < 1e-14
    for case in meta["config"]["cases"]:
        q, stage, c = case["q"], case["stage"], case["c"]
        r = posttrain_cm.ect_r(t, q, stage)
        assert relerr(r, v[f"out64/q{q}_stage{stage}/r"]) < 1e-12
        a = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        f = lambda x, t, y: x * 0.25 / (t ** 2 + 0.25)[:, None, None, None] + a * x.tanh()
        weight = posttrain_cm.ect_weight(t, r, kind)
        loss = posttrain_cm.ect_loss(f, x0, eps, t, r, None, weight, c)
        loss.sum().backward()
        reference = v[f"out64/q{q}_stage{stage}_c{c}/loss"]
        # sqrt(e + c^2) - c, as the reference has it, is good to float64's spacing at c; ours does not cancel
        spacing = 2.0 ** -52 * c * weight
        assert ((loss.detach() - reference).abs() <= 1e-12 * reference.max() + spacing).all(), case
        assert relerr(a.grad, v[f"out64/q{q}_stage{stage}_c{c}/grad_a"]) < 1e-12


def test_target_shares_the_dropout_mask_and_carries_no_gradient():
    torch.manual_seed(0)
    f = model.Denoiser(model.DDPMpp(8, 1, 0, 8, (1, 2), 1, (4,), dropout=0.5)).train()
    for p in f.parameters(): p.data += 0.05 * torch.randn_like(p)
    x0, eps, t = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.ones(4)
    # r = t: both points are the same, so with one mask they agree to the last bit
    loss = posttrain_cm.ect_loss(f, x0, eps, t, t, None, torch.ones(4), 0.0)
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(4))
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in f.parameters())         # and not NaN
    assert posttrain_cm.ect_loss(f, x0, eps, t, 0.9 * t, None, torch.ones(4), 0.0).min() > 0


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_networks_draw_the_same_masks():
    torch.manual_seed(0)
    f = model.Denoiser(model.DDPMpp(8, 1, 0, 8, (1, 2), 1, (4,), dropout=0.5)).train()
    for p in f.parameters(): p.data += 0.05 * torch.randn_like(p)
    x0, eps, t = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.ones(4)
    found = []
    for g in (model.compiled(f, False), model.compiled(f, True)):
        torch.manual_seed(1)
        loss = posttrain_cm.ect_loss(g, x0, eps, t, 0.9 * t, None, torch.ones(4), 0.0)
        loss.sum().backward()
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in f.parameters()])))
        f.zero_grad()
    for eager, fast in zip(*found): assert relerr(fast, eager) < 1e-4
    assert posttrain_cm.ect_loss(g, x0, eps, t, t, None, torch.ones(4), 0.0).max() < 1e-4


@pytest.mark.compiles
@pytest.mark.parametrize("version, allowed", [("2.11.0+cu130", False), ("2.12.0", True), ("2.13.0+cpu", True)])
def test_old_versions_of_torch_compile_without_a_choice_of_layout(monkeypatch, version, allowed):
    """It gave the two passes of ECT different dropout masks on a GPU."""
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    from torch._inductor import config
    with config.patch(layout_optimization=True):
        model.compiled(lambda x: x, True)
        assert config.layout_optimization == allowed


def test_target_is_the_image_itself_where_r_is_zero():
    x0, eps, t = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.ones(4)
    broken_at_zero = lambda x, t, y: x * (t / t)[:, None, None, None]                     # NaN at t = 0
    loss = posttrain_cm.ect_loss(broken_at_zero, x0, eps, t, 0 * t, None, torch.ones(4), 0.0)
    assert torch.allclose(loss, eps.flatten(1).norm(dim=1))


def mixture():
    """A two-dimensional mixture as (B,2,1,1) images -> its exact denoiser D(x, t, y)"""
    means = torch.tensor([[-0.6, 0.3], [0.5, 0.4], [0.1, -0.7]], dtype=torch.float64)
    stds, weights = torch.tensor([[0.1, 0.2, 0.15], [0.3, 0.3, 0.4]], dtype=torch.float64)
    denoise = mixture_denoiser(means, stds, weights)
    return lambda x, t, y=None: denoise(x.flatten(1), t).reshape(x.shape)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_teachers_step_approaches_the_exact_flow_map_at_the_solvers_order(solver, order):
    """The local error of a step of size h is of order h^(p+1), from any time, against a fine solution."""
    D, g = mixture(), torch.Generator().manual_seed(0)
    t = torch.linspace(0.3, 2.0, 12, dtype=torch.float64)
    x = t[:, None, None, None] * torch.randn(12, 2, 1, 1, generator=g, dtype=torch.float64)
    def error(h):
        r, worst = t * (1 - h), 0.0
        step = posttrain_cm.ode_step(D, x, t, r, None, solver)
        for i in range(12):                                # solve.heun takes one time for a whole batch
            velocity = lambda x, t: (x - D(x, t)) / t[:, None, None, None]
            times = torch.linspace(t[i], r[i], 201, dtype=torch.float64)
            fine = solve.heun(velocity, x[i:i + 1], times)[0][-1]
            worst = max(worst, (step[i] - fine[0]).norm().item())
        return worst
    slope = torch.log2(torch.tensor(error(0.05) / error(0.025))).item()
    assert abs(slope - (order + 1)) < 0.2, slope


def test_ecd_is_zero_for_the_exact_flow_map_up_to_the_step():
    """With the exact consistency function only the error of the teacher's step is left."""
    torch.manual_seed(0)
    s, c = 0.5, lambda t: (0.25 / (0.25 + t ** 2)).sqrt()[:, None, None, None]           # Gaussian data
    f, D = (lambda x, t, y: c(t) * x), (lambda x, t, y: c(t) ** 2 * x)
    t = torch.linspace(0.1, 20, 9, dtype=torch.float64)
    x = torch.randn(9, 1, 2, 2, dtype=torch.float64) * (s ** 2 + t[:, None, None, None] ** 2).sqrt()
    losses = []
    for q in (64, 128):
        r = posttrain_cm.ect_r(t, q, 0)
        eps = x / t[:, None, None, None]                                                 # with x_0 = 0
        losses.append(posttrain_cm.ecd_loss(f, 0 * x, eps, t, r, None, torch.ones_like(t), 0.0, D))
    assert losses[1].max() < 1e-4 and (losses[0] / losses[1] > 6).all()                  # third order: 8


def test_ecd_takes_the_state_itself_and_eulers_step_where_r_is_zero():
    D = lambda x, t, y: x / (1 + t)[:, None, None, None]
    x, t = torch.randn(4, 1, 8, 8), torch.ones(4)
    x_r = posttrain_cm.ode_step(D, x, t, 0 * t, None)
    assert torch.allclose(x_r, x / 2, atol=1e-6)                                          # D itself
    broken_at_zero = lambda x, t, y: x * (t / t)[:, None, None, None]
    loss = posttrain_cm.ecd_loss(broken_at_zero, 0 * x, x, t, 0 * t, None, torch.ones(4), 0.0, D)   # t = 1
    assert torch.allclose(loss, (x / 2).flatten(1).norm(dim=1))
