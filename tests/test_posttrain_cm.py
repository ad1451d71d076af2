"""ECT: the schedule and the loss against the reference, and the shared dropout mask."""
import torch

import model, posttrain_cm
from conftest import relerr, vectors


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


def test_loss_reproduces_the_reference():
    v, meta = vectors("ecm_loss")
    x0, eps = v["in/y"].double(), v["in/eps"].double()
    t = (2.0 * v["in/rnd_normal"].double().flatten() - 1.1).exp()
    assert relerr(t, v["out64/t"]) < 1e-14
    for case in meta["config"]["cases"]:
        q, stage, c = case["q"], case["stage"], case["c"]
        r = posttrain_cm.ect_r(t, q, stage)
        assert relerr(r, v[f"out64/q{q}_stage{stage}/r"]) < 1e-12
        a = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        f = lambda x, t, y: x * 0.25 / (t ** 2 + 0.25)[:, None, None, None] + a * x.tanh()
        loss = posttrain_cm.ect_loss(f, x0, eps, t, r, None, 1 / (t - r), c)
        loss.sum().backward()
        reference = v[f"out64/q{q}_stage{stage}_c{c}/loss"]
        # sqrt(e + c^2) - c, as the reference has it, is good to float64's spacing at c; ours does not cancel
        spacing = 2.0 ** -52 * c / (t - r)
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


def test_target_is_the_image_itself_where_r_is_zero():
    x0, eps, t = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.ones(4)
    broken_at_zero = lambda x, t, y: x * (t / t)[:, None, None, None]                     # NaN at t = 0
    loss = posttrain_cm.ect_loss(broken_at_zero, x0, eps, t, 0 * t, None, torch.ones(4), 0.0)
    assert torch.allclose(loss, eps.flatten(1).norm(dim=1))
