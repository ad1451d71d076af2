"""Networks, preconditioning, checkpoints, data order."""
import shutil

import pytest
import torch

import model
from conftest import relerr, vectors

KWARGS = ("img_resolution img_channels label_dim model_channels channel_mult num_blocks attn_resolutions "
          "dropout").split()


def reference_denoiser(name):
    tensors, meta = vectors(name)
    net = model.DDPMpp(**{k: meta["config"]["kwargs"][k] for k in KWARGS})
    net.load_state_dict({k.removeprefix("w/model."): v for k, v in tensors.items()
                         if k.startswith("w/model.") and "resample_filter" not in k
                         and "map_augment" not in k})
    y = tensors["in/class_labels"].argmax(1) if "in/class_labels" in tensors else None
    return model.Denoiser(net).eval(), tensors, y


@pytest.mark.parametrize("name", ["edm_ddpmpp_uncond", "edm_ddpmpp_cond"])
def test_network_reproduces_edm(name):
    D, v, y = reference_denoiser(name)
    x, t = v["in/x"], v["in/sigma"]
    c_in, c_noise = (t ** 2 + 0.25).rsqrt()[:, None, None, None], t.log() / 4
    with torch.no_grad():
        assert relerr(D(x, t, y), v["out64/D"]) < 5e-6
        assert relerr(D.net(c_in * x, c_noise, y), v["out64/F"]) < 5e-6
        exact = D(x.double(), t.double(), y)                  # fp32 weights, float64 arithmetic throughout
        assert exact.dtype == torch.float64 and relerr(exact, v["out64/D"]) < 1e-9
        if y is not None:
            null = torch.full_like(y, D.net.label_dim)
            assert relerr(D(x.double(), t.double()), v["out64/D_nolabel"]) < 1e-9
            assert torch.equal(D(x, t, null), D(x, t))


def tiny(dropout=0.0, label_dim=3):
    torch.manual_seed(0)
    D = model.Denoiser(model.DDPMpp(8, 1, label_dim, 8, (1, 2), 1, (4,), dropout))
    for p in D.parameters(): p.data += 0.05 * torch.randn_like(p)       # a fresh network outputs nearly 0
    return D


def test_identity_at_time_zero():
    x = 100 * torch.randn(4, 1, 8, 8)
    D = tiny()
    for t in (0.0, 1e-12):
        assert torch.allclose(D(x, torch.full((4,), t)), x), t
    assert torch.equal(D(x, torch.zeros(4)), x)


def test_bf16_body_keeps_fp32_around_it():
    D, x, t = tiny().eval(), torch.randn(4, 1, 8, 8), torch.full((4,), 1e-3)
    exact = D(x, t)
    D.backbone_dtype = torch.bfloat16
    assert D(x, t).dtype == torch.float32
    # c_out(1e-3) is 1e-3: a bf16 body moves the output by about 1e-3 * 2^-8, a bf16 sum by 2^-9 of x
    assert 0 < (D(x, t) - exact).abs().max() < 1e-4
    t = torch.full((4,), 80.0)
    r = t * (1 - 1 / 4096)
    assert (D.net.embed(t.log() / 4, None) - D.net.embed(r.log() / 4, None)).abs().max() > 0


def test_mean_velocity_scales_both_times():
    seen = []
    u = model.MeanVelocity(lambda z, t, y, gap: seen.extend((t, gap)) or z, 16.0)
    u(torch.zeros(2, 1, 4, 4), torch.tensor([0.25, 0.5]), torch.tensor([0.5, 1.0]))
    assert torch.equal(seen[0], torch.tensor([8.0, 16.0])) and torch.equal(seen[1], torch.tensor([4.0, 8.0]))


@pytest.mark.parametrize("size", [4, 8, 12, 16, 20, 28, 32, 64, 100, 256])
def test_custom_network_fits_every_side_divisible_by_four(size):
    row = model.custom_dataset((3, size, size), 2)
    D = model.build(model.fresh_header(row, model_channels=8, num_blocks=1))
    assert D(torch.randn(1, 3, size, size), torch.ones(1),
             torch.zeros(1, dtype=torch.int64)).shape == (1, 3, size, size)


def test_equal_rng_state_gives_equal_dropout_masks_with_and_without_grad():
    D, x, t = tiny(dropout=0.5).train(), torch.randn(4, 1, 8, 8), torch.ones(4)
    torch.manual_seed(7); with_grad = D(x, t)
    torch.manual_seed(7)
    with torch.no_grad(): without = D(x, t)
    assert torch.equal(with_grad, without) and not torch.equal(D(x, t), with_grad)


def test_checkpoint_round_trip(tmp_path):
    D = tiny()
    header = {"kind": "Denoiser",
              "network": {"class": "DDPMpp", "img_resolution": 8, "img_channels": 1, "label_dim": 3,
                          "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1,
                          "attn_resolutions": [4]},
              "sigma_data": 0.5, "noise_scale": 2.0}
    x, t = torch.randn(2, 1, 8, 8), torch.ones(2)
    D.noise_scale = 2.0
    expected = D.eval()(x, t)
    model.save(tmp_path / "a.safetensors", D.to(memory_format=torch.channels_last).state_dict(), header)
    E, read = model.load(tmp_path / "a.safetensors", dropout=0.25)
    assert read["network"]["dropout"] == 0.25 and not E.training
    assert torch.equal(E(x, t), expected)
    assert [f.name for f in tmp_path.iterdir()] == ["a.safetensors"]


def test_uint8_round_trip():
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(model.to_uint8(model.to_float(x)), x)
    assert model.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_data_order_is_a_stream_of_whole_epochs_cut_anywhere():
    whole = model.batch_indices(10, 3, 0, 40)
    assert all(sorted(whole[i:i + 10].tolist()) == list(range(10)) for i in (0, 10, 20, 30))
    assert torch.equal(whole[7:29], model.batch_indices(10, 3, 7, 22))
    assert not torch.equal(whole[:10], whole[10:20])
    assert not torch.equal(whole[:10], model.batch_indices(10, 4, 0, 10))


# --- what a GPU needs ---------------------------------------------------------------------------------------

def small_network(cls, channels=8):
    from test_runs import TINY
    torch.manual_seed(0)
    dataset = model.DATASETS["digits"] | {"network": {"class": cls, **TINY[cls]}}
    header = model.fresh_header(dataset)
    net = model.build(header)
    for p in net.parameters(): p.data += 0.05 * torch.randn_like(p)        # a fresh network outputs nearly 0
    return net, header


@pytest.mark.parametrize("cls", ["DDPMpp", "EDM2UNet", "SiT"])
def test_a_fused_kernel_can_compute_the_attention(cls, monkeypatch):
    """Fused attention needs queries, keys and values whose last stride is 1; otherwise torch takes the math
    path."""
    net, _ = small_network(cls)
    chosen, attention = [], torch.nn.functional.scaled_dot_product_attention
    def watched(q, k, v):
        chosen.append(torch._fused_sdp_choice(q, k, v))
        return attention(q, k, v)
    monkeypatch.setattr(model.F, "scaled_dot_product_attention", watched)
    net(torch.randn(2, 1, 8, 8), torch.ones(2))
    assert chosen and all(choice == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value for choice in chosen)


def test_resize():
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(model.resize(x, "up"), torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest"))
    assert torch.equal(model.resize(model.resize(x, "up"), "down"), x) and model.resize(x, None) is x


def test_patches_of_sit_are_initialised_as_by_a_linear_layer():
    """Xavier's bound sqrt(6 / (inputs + outputs)) of a linear layer of a patch, as in SiT and MeanFlow"""
    weight = model.SiT(8, 4, 0, patch_size=4, hidden_size=64, depth=1, num_heads=4).x_embedder["proj"].weight
    bound = (6 / (4 * 4 * 4 + 64)) ** 0.5
    assert 0.98 * bound < weight.abs().max() <= bound      # of 4,096 weights; fails by chance with 1e-36


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_gradients_are_those_of_eager_mode():
    """Up-sampling by F.interpolate compiled to a gradient of 0 for the attention before it (torch 2.13,
    CPU)."""
    net, _ = small_network("EDM2UNet")
    x, t, gradients = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 3.0]), []
    for f in net, model.compiled(net, True):
        f(x, t, torch.arange(2)).square().sum().backward()
        gradients.append({k: p.grad.clone() for k, p in net.named_parameters()})
        net.zero_grad()
    for k, expected in gradients[0].items():
        assert (gradients[1][k] - expected).norm() <= 1e-4 * expected.norm() + 1e-6, k
