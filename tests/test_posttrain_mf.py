"""The mean-flow branch: SiT against the reference, and the losses against the Gaussian's closed form."""
import math

import pytest
import torch
import torch.nn.functional as F

import midtrain, model, posttrain_mf, pretrain, solve
from conftest import relerr, vector_weights, vectors

S = 0.5                                    # data ~ N(0, S^2) per pixel: everything is known


def spread(t):
    """Standard deviation of z_t."""
    return (((1 - t) * S) ** 2 + t ** 2).sqrt()[:, None, None, None]


def exact_v(z, t):
    return z * (t - (1 - t) * S ** 2)[:, None, None, None] / spread(t) ** 2


def exact_u(z, r, t, y=None):
    gap = (t - r)[:, None, None, None]
    average = z * (1 - spread(r) / spread(t)) / torch.where(gap == 0, 1, gap)
    return torch.where(gap == 0, exact_v(z, t), average)


def sample(n=64):
    g = torch.Generator().manual_seed(0)
    r, t = torch.rand(2, n, generator=g, dtype=torch.float64).sort(dim=0).values
    return spread(t) * torch.randn(n, 1, 8, 8, generator=g, dtype=torch.float64), r, t


def networks(dropout=0.0, interval=True):
    """One small random network of each class."""
    torch.manual_seed(0)
    for net in (model.DDPMpp(8, 1, 3, 8, (1, 2), 1, (4,), dropout, interval),
                model.SiT(8, 1, 3, patch_size=2, hidden_size=16, depth=2, num_heads=2, interval=interval)):
        for p in net.parameters(): p.data += 0.1 * torch.randn_like(p)
        yield model.MeanVelocity(net)


# --- networks -----------------------------------------------------------------------------------------------

def reference_sit(name):
    v, meta = vectors(name)
    config, weights = meta["config"]["kwargs"], vector_weights(name)
    net = model.SiT(config["input_size"], config["in_channels"], config["num_classes"], config["patch_size"],
                    config["hidden_size"], config["depth"], config["num_heads"], interval=True)
    assert relerr(net.pos_embed, weights["pos_embed"]) < 1e-6              # before it is overwritten
    net.load_state_dict(weights)
    return model.MeanVelocity(net).eval(), v


@pytest.mark.parametrize("name", ["sit_meanflow", "sit_meanflow_h64"])
def test_sit_reproduces_the_reference(name):
    u, v = reference_sit(name)
    z, r, t, y = (v[f"in/{k}"] for k in "zrty")
    null = torch.full_like(y, u.net.label_dim)
    ones, zeros = torch.ones_like(t), torch.zeros_like(t)
    def outputs(z, r, t, tangent):
        jumps = lambda N: solve.flow_map(lambda z, r, t: u(z, r, t, y), z, solve.uniform_times(N))[0][-1]
        one, none = u(z, zeros.to(z), ones.to(z), y), u(z, zeros.to(z), ones.to(z), null)
        return {"u": u(z, r, t, y), "u_null": u(z, r, t, null), "u_req": u(z, t, t, y),
                "dudt": posttrain_mf.derivative_jvp(u, z, r, t, y, tangent),
                "sample1": jumps(1), "sample2": jumps(2), "sample_cfg": z - (none + 2 * (one - none))}
    with torch.no_grad():
        assert torch.equal(u(z, r, t), u(z, r, t, null))
        for k, out in outputs(z, r, t, v["in/v"]).items(): assert relerr(out, v[f"out64/{k}"]) < 5e-6, k
        u.net.pos_embed = v["w64/pos_embed"]
        for k, out in outputs(*(a.double() for a in (z, r, t, v["in/v"]))).items():
            assert out.dtype == torch.float64 and relerr(out, v[f"out64/{k}"]) < 1e-9, k


def test_zero_embedding_makes_u_of_v(tmp_path):
    """Loading a flow-matching model with an embedding of t - r leaves it as it was, until it is trained."""
    for u, cls in zip(networks(interval=False), ("DDPMpp", "SiT")):
        network = {"class": cls, "img_resolution": 8, "img_channels": 1, "label_dim": 3}
        network |= (dict(model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))
                    if cls == "DDPMpp" else dict(patch_size=2, hidden_size=16, depth=2, num_heads=2))
        model.save(tmp_path / "v.safetensors", u.state_dict(),
                   {"kind": "MeanVelocity", "network": network, "time_scale": 1.0})
        extended, header = model.load(tmp_path / "v.safetensors", interval=True)
        z, r, t = (a.float() for a in sample(4))
        assert header["network"]["interval"] and torch.equal(extended(z, r, t), u.eval()(z, t, t))
        extended(z, r, t).sum().backward()
        assert extended.net.r_embedder.mlp[2].weight.grad.abs().max() > 0
        model.save(tmp_path / "u.safetensors", extended.state_dict(), header)
        again, _ = model.load(tmp_path / "u.safetensors", interval=True)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), extended.parameters()))


def test_bf16_body_keeps_fp32_times():
    for u in networks():
        z, r, t = (a.float() for a in sample(8))
        exact = u(z, r, t)
        u.backbone_dtype = torch.bfloat16
        assert u(z, r, t).dtype == torch.float32 and 1e-5 < relerr(u(z, r, t), exact) < 0.1


# --- the two times ------------------------------------------------------------------------------------------

def test_edm_time_and_flow_time_are_one_process():
    t = torch.tensor([80.0, 3.0, 0.5, 0.002], dtype=torch.float64)
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64) * (S ** 2 + t ** 2).sqrt()[:, None, None, None]
    z, t_flow = solve.edm_to_flow(x, t)
    D = S ** 2 / (S ** 2 + t ** 2)[:, None, None, None] * x
    assert relerr((z - D) / t_flow[:, None, None, None], exact_v(z, t_flow)) < 1e-10
    # and along a whole solution of the EDM ODE, converted
    scale = ((S ** 2 + t ** 2) / (S ** 2 + 80 ** 2)).sqrt()[:, None, None, None]
    z, t_flow = solve.edm_to_flow(x[:1] * scale, t)
    jump = z[:1] - (t_flow[0] - t_flow)[:, None, None, None] * exact_u(
        z[:1].expand(4, 1, 8, 8), t_flow, t_flow[:1].expand(4))
    assert relerr(jump, z) < 1e-12


def test_posttrain_mf_pairs_to_the_end_are_consistency_pairs():
    """A u and the f it stands for: the two losses differ by the squared length of the jump."""
    times = solve.log_uniform_times(8)
    x = torch.randn(9, 5, 1, 8, 8, dtype=torch.float64) * times.reshape(-1, 1, 1, 1, 1)
    z, t_flow = solve.edm_to_flow(x, times)
    number = torch.arange(40)
    x_t, t, x_end, _, _ = midtrain.gather_pairs(x, times, torch.zeros(5), number, *midtrain.pair_table(8, "cm"))
    z_t, s, z_end, r, _ = midtrain.gather_pairs(z, t_flow, torch.zeros(5), number, *midtrain.pair_table(8, "cm"))
    for u in networks():
        def f(x, t, y):
            z, s = solve.edm_to_flow(x, t)
            return (z - (s - r)[:, None, None, None] * u(z, r, s)) * (1 + times[-1])
        cm = midtrain.cmt_loss(f, x_t, t, x_end, None, midtrain.l2)
        mf = midtrain.cmt_meanflow_loss(lambda z, r, t, y: u(z, r, t), z_t, s, z_end, r, None)
        assert relerr(cm, mf * ((s - r) * (1 + times[-1])) ** 2) < 1e-10


# --- losses -------------------------------------------------------------------------------------------------

def test_flow_loss_is_smallest_for_the_marginal_velocity():
    g = torch.Generator().manual_seed(0)
    x0 = S * torch.randn(20_000, 1, 2, 2, generator=g, dtype=torch.float64)
    eps = torch.randn(20_000, 1, 2, 2, generator=g, dtype=torch.float64)
    t = torch.rand(20_000, generator=g, dtype=torch.float64)
    a = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = pretrain.flow_loss(lambda z, r, t, y: a * exact_v(z, t), x0, eps, t, None)
    assert loss.shape == (20_000,)
    # d/da at a = 1 is zero in expectation; 5 standard errors: fails by chance once in 1.7 million
    per_sample = torch.autograd.grad(loss.mean(), a)[0]
    z = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * eps
    terms = (2 * exact_v(z, t) * (exact_v(z, t) - (eps - x0))).sum((1, 2, 3))
    assert abs(per_sample) < 5 * terms.std() / math.sqrt(20_000)


def test_posttrain_mf_loss_is_zero_for_the_exact_average_velocity():
    z, r, t = sample()
    v = exact_v(z, t)
    dudt = posttrain_mf.derivative_jvp(exact_u, z, r, t, None, v)
    loss = posttrain_mf.meanflow_loss(exact_u, z, r, t, None, v, dudt, p=0.0)
    assert loss.shape == (64,) and loss.max() < 1e-18
    wrong = lambda z, r, t, y: exact_v(z, t)
    assert posttrain_mf.meanflow_loss(wrong, z, t, t, None, v, 0, p=0.0).max() < 1e-18
    dudt = posttrain_mf.derivative_jvp(wrong, z, r, t, None, v)
    assert posttrain_mf.meanflow_loss(wrong, z, r, t, None, v, dudt, p=0.0).mean() > 0.1


def test_posttrain_mf_loss_weight_and_gradient():
    z, r, t = sample()
    v, dudt = exact_v(z, t), torch.randn_like(z)
    for p in (0.75, 1.0):
        a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        u = lambda z, r, t, y: a * z
        loss = posttrain_mf.meanflow_loss(u, z, r, t, None, v, dudt, p, 1e-3)
        e = 0.7 * z - (v - (t - r)[:, None, None, None] * dudt)
        square = e.square().sum((1, 2, 3))
        assert torch.allclose(loss, square / (square + 1e-3) ** p)
        # the weight and the target carry no gradient
        expected = ((2 * e * z).sum((1, 2, 3)) / (square + 1e-3) ** p).sum()
        assert torch.allclose(torch.autograd.grad(loss.sum(), a)[0], expected)


def test_jvp_is_the_limit_of_the_central_difference():
    z, r, t = sample(8)
    r, t = 0.1 + 0.5 * r, 0.2 + 0.6 * t
    v = torch.randn_like(z)
    for u in networks():
        exact = posttrain_mf.derivative_jvp(u, z, r, t, None, v)
        assert exact.dtype == torch.float64 and not exact.requires_grad and exact.abs().max() > 0.01
        errors = [(posttrain_mf.derivative_difference(u, z, r, t, None, v, step) - exact).abs().max().item()
                  for step in (0.02, 0.01, 0.005)]
        for a, b in zip(errors, errors[1:]): assert abs(math.log2(a / b) - 2) < 0.1


def test_the_jvp_is_that_of_torch_for_every_network():
    z, r, t = sample(3)
    v, y = torch.randn_like(z), torch.arange(3)
    edm2 = model.EDM2UNet(8, 1, 3, 64, (1,), num_blocks=1, attn_resolutions=(8,), interval=True)
    for p in edm2.parameters(): p.data += p.dim() == 0                     # its gains, which begin at 0
    for u in (*networks(), model.MeanVelocity(edm2)):
        u = u.double().eval()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            plain = torch.func.jvp(lambda *a: u(*a, y), (z, r, t), (v, 0 * r, torch.ones_like(t)))[1]
        ours = posttrain_mf.derivative_jvp(u, z, r, t, y, v)
        assert plain.abs().max() > 0.01 and relerr(ours, plain) < 1e-10
        u = u.float()
        u.backbone_dtype = torch.bfloat16                               # as it runs on a GPU
        inputs = [a.float() for a in (z, r, t)]
        assert relerr(posttrain_mf.derivative_jvp(u, *inputs, y, v.float()), plain) < 0.1


def test_cmt_meanflow_loss_is_zero_on_exact_trajectories():
    times = solve.uniform_times(8)
    z1 = torch.randn(1, 16, 1, 8, 8, dtype=torch.float64)
    states = z1 * spread(times)[:, None]
    i, j = midtrain.pair_table(8, "mf")
    assert len(i) == 36 and (times[i] > times[j]).all()
    x_t, t, x_r, r, _ = midtrain.gather_pairs(states, times, torch.zeros(16), torch.arange(16 * 36), i, j)
    assert midtrain.cmt_meanflow_loss(exact_u, x_t, t, x_r, r, None).max() < 1e-20
    wrong = lambda z, r, t, y: exact_v(z, t)
    assert midtrain.cmt_meanflow_loss(wrong, x_t, t, x_r, r, None).mean() > 0.1


def test_solvers_in_flow_time():
    z = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    exact = S * z
    header = {"kind": "MeanVelocity", "t_max": 1.0, "t_min": 0.0, "network": {"interval": True}}
    u = lambda z, r, t, y: exact_u(z, r, t)
    end = lambda nfe, solver: solve.solve_teacher(u, header, z, None, nfe, solver)[0][-1]
    for nfe in (1, 2, 5): assert relerr(end(nfe, "jump"), exact) < 1e-12
    # Heun's last step, into t = 0, is Euler's: of order 2 locally, like a whole Heun solution globally
    for solver, order in (("euler", 1), ("heun", 2)):
        errors = [(end(nfe, solver) - exact).abs().max().item() for nfe in (256, 1024)]
        assert abs(math.log(errors[0] / errors[1]) / math.log(4) - order) < 0.15, solver


def test_exactly_a_quarter_has_r_below_t():
    torch.manual_seed(0)
    r, t = posttrain_mf.sample_r_t(4096, 0.25, -0.4, 1.0, "cpu")
    first = torch.arange(4096) % 4 < 1
    assert (r < t)[first].sum() >= 1023 and torch.equal(r[~first], t[~first])           # one tie may happen
    assert 0 < r.min() and t.max() < 1
    # t is the larger of two draws: P(t <= sigmoid(-0.4)) = 1/4; 5 standard errors
    assert abs((t <= torch.tensor(-0.4).sigmoid()).float().mean() - 0.25) < 5 * (0.25 * 0.75 / 4096) ** 0.5


def test_guidance():
    z, _, t = sample(6)
    t = torch.tensor([0.1, 0.5, 0.9, 0.1, 0.5, 0.9], dtype=torch.float64)
    y, v = torch.tensor([0, 1, 2, 3, 3, 0]), torch.randn_like(z)
    u = lambda z, r, t, y: z * (1 + y)[:, None, None, None]
    plain = posttrain_mf.guided_velocity(u, z, t, y, v, 1.0, 0.0, null=3)
    assert torch.equal(plain, v)
    guided = posttrain_mf.guided_velocity(u, z, t, y, v, 0.2, 0.92, null=3, low=0.0, high=0.75)
    expected = 0.2 * v + 0.92 * u(z, t, t, y) + (1 - 0.2 - 0.92) * u(z, t, t, torch.full_like(y, 3))
    for k, inside in enumerate([True, True, False, False, False, False]):       # t > 0.75; null labels
        assert torch.allclose(guided[k], expected[k] if inside else v[k])


def test_derivative_and_loss_share_dropout_masks():
    z, r, t = sample(8)
    u = next(networks(dropout=0.5)).train()
    v = torch.randn_like(z)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    exact = posttrain_mf.derivative_jvp(u, z, r, t, None, v)
    assert torch.equal(torch.get_rng_state(), before)
    # with the masks held fixed u is smooth, so the two derivatives agree; with others it is another function
    near = posttrain_mf.derivative_difference(u, z, r, t, None, v, 1e-4)
    assert torch.equal(torch.get_rng_state(), before) and relerr(near, exact) < 1e-4
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        primal = torch.func.jvp(lambda z: u(z, r, t), (z,), (v,))[0]
        torch.manual_seed(7)
        assert torch.equal(u(z, r, t), primal)
    assert relerr(posttrain_mf.derivative_jvp(u, z, r, t, None, v), exact) > 0.01
