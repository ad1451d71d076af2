"""The mid-training loss against closed forms and the reference, and the pool of trajectories."""
from types import SimpleNamespace

import pytest
import torch

import midtrain, model, solve
from midtrain import pool_size
from tools import feature_networks
from conftest import mixture_denoiser, refused, relerr, vector_weights, vectors, write_npz

S = 0.5                                                        # data ~ N(0, S^2): everything is known


def exact_map(x, t, y=None, t_end=0.002):
    """Psi_{t -> 0.002}, the map that ends where the trajectories end."""
    scale = ((S ** 2 + t_end ** 2) / (S ** 2 + t ** 2)).sqrt()
    return x * scale.reshape(-1, *[1] * (x.dim() - 1))


def exact_pairs(n, dtype=torch.float64):
    """Points of exact trajectories at all of the 16 input times, with their ends."""
    times = solve.log_uniform_times(16)
    i = torch.arange(n) % 16
    x_T = 80 * torch.randn(n, 1, 8, 8, dtype=torch.float64)
    x = x_T * ((S ** 2 + times[i] ** 2) / (S ** 2 + 80 ** 2)).sqrt()[:, None, None, None]
    x_end = x_T * ((S ** 2 + 0.002 ** 2) / (S ** 2 + 80 ** 2)) ** 0.5
    return x.to(dtype), times[i].to(dtype), x_end.to(dtype)


@pytest.mark.parametrize("distance", [midtrain.l2, midtrain.huber])
def test_loss_is_zero_for_the_exact_flow_map_and_only_there(distance):
    x, t, x_end = exact_pairs(64)
    loss = midtrain.cmt_loss(exact_map, x, t, x_end, None, distance)
    assert loss.shape == (64,) and loss.max() < 1e-9
    posterior_mean = lambda x, t, y: S ** 2 / (S ** 2 + t ** 2)[:, None, None, None] * x
    assert midtrain.cmt_loss(posterior_mean, x, t, x_end, None, distance).mean() > 0.1


@pytest.mark.parametrize("distance", [midtrain.l2, midtrain.huber])
def test_a_gradient_step_moves_a_network_towards_the_flow_map(distance):
    """1,024 fixed pairs and a small step: plain descent of a smooth function, nothing left to chance."""
    torch.manual_seed(0)
    f = model.Denoiser(model.DDPMpp(8, 1, 0, 8, (1, 2), 1, (4,)))
    x, t, x_end = exact_pairs(1024, torch.float32)
    far = lambda: (f(x, t) - exact_map(x, t)).square().mean().item()
    before = far()
    midtrain.cmt_loss(f, x, t, x_end, None, distance).mean().backward()
    size = sum(p.grad.square().sum() for p in f.parameters()).sqrt()
    with torch.no_grad():
        for p in f.parameters(): p -= 1e-2 * p.grad / size
    assert far() < before - 1e-5


def test_loss_reproduces_the_reference():
    v, meta = vectors("cmt_loss")
    denoise = mixture_denoiser(*(v[f"in/mix_{k}"] for k in ("means", "stds", "weights")))
    N = meta["config"]["kwargs"]["NFE"]
    mini = len(v["in/images"]) // N
    x_T = (v["in/images"][:mini].double() + 80 * v["in/eps"].double()).flatten(1)
    states, times = solve.dpm_solver_pp(denoise, x_T, solve.log_uniform_times(N))
    step_major = torch.arange(N * mini) % mini * N + torch.arange(N * mini) // mini
    x, t, x_end, _, _ = midtrain.gather_pairs(states, times, torch.zeros(mini), step_major,
                                              *midtrain.pair_table(N, "cm"))
    assert relerr(x, v["out64/student_x"]) < 1e-12 and relerr(t, v["out64/student_t"]) < 1e-12
    for name, distance in [("MSE", midtrain.l2),
                           ("MAE", lambda a, b: torch.linalg.vector_norm(a - b, dim=1))]:
        a = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        student = lambda x, t, y: x * (0.25 / (t[:, None] ** 2 + 0.25)) + a * x.tanh()
        loss = midtrain.cmt_loss(student, x, t, x_end, None, distance)
        loss.sum().backward()
        assert relerr(loss.detach(), v[f"out64/{name}/loss"]) < 1e-12
        assert relerr(a.grad, v[f"out64/{name}/grad_a"]) < 1e-12


def test_huber_is_the_pseudo_huber_norm_without_cancellation():
    a = torch.randn(5, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    b, c = torch.randn(5, 3, 8, 8, dtype=torch.float64), 0.00054 * (3 * 8 * 8) ** 0.5
    assert torch.allclose(midtrain.huber(a, b), ((a - b).square().sum((1, 2, 3)) + c ** 2).sqrt() - c)
    midtrain.huber(a, a.detach()).sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a))
    near = torch.full((1, 3, 8, 8), 1e-7)
    assert relerr(midtrain.huber(near, torch.zeros_like(near)).double(),
                  near.double().square().sum() / (2 * c)) < 1e-3
    assert 0.0598 < 0.00054 * (3 * 64 * 64) ** 0.5 < 0.06              # ECT's 0.06 at 64x64x3


@pytest.mark.parametrize("batch, nfe", [(128, 16), (8, 16), (24, 16), (6, 4), (100, 7)])
def test_pool_is_a_whole_number_of_batches(batch, nfe):
    size = pool_size(batch, nfe)
    assert size * nfe % batch == 0 and 128 <= size < 128 + batch


def test_microbatch_limits_what_the_teacher_solves_at_a_time():
    header = model.fresh_header(model.DATASETS["digits"])
    torch.manual_seed(0)
    net, sizes, pools = model.build(header).eval(), [], []
    def teacher(x, t, y):
        sizes.append(len(x))
        return net(x, t, y)
    for microbatch in None, 3:
        torch.manual_seed(1)
        args = SimpleNamespace(nfe=4, solver="dpm3", branch="cm", microbatch=microbatch)
        pools.append(midtrain.solve_pool(teacher, header, 8, args, torch.device("cpu")))
    assert sizes == [8] * 4 + [3] * 8 + [2] * 4
    for whole, sliced in zip(*pools): assert torch.allclose(whole, sliced, atol=1e-5)


def test_more_processes_draw_other_pools(monkeypatch):
    """A run that continues with more processes is at an earlier pool of each, in its count of pools."""
    header, noise = model.fresh_header(model.DATASETS["digits"]), []
    def solved(teacher, header, count, args, device):
        noise.append(torch.randn(4))
        return torch.zeros(3, count, 1, 8, 8), torch.tensor([2.0, 1.0, 0.1]), torch.zeros(count, dtype=torch.int64)
    monkeypatch.setattr(midtrain, "solve_pool", solved)
    monkeypatch.setattr(midtrain, "pool_size", lambda batch, N: 64)
    args, cpu = SimpleNamespace(seed=0, batch=128, steps=64, branch="cm", pairing="cmt"), torch.device("cpu")
    for world, first in (1, 0), (2, 8):                    # pools of 1 step, then of 2
        for rank in range(world):
            batches = midtrain.batches_from_teacher(None, header, 2, args, first, rank, 128 // world, cpu)
            for _ in range(8): next(batches)
    assert len(noise) == 8 + 2 * 4 and len({x.numpy().tobytes() for x in noise}) == len(noise)


@pytest.mark.parametrize("source", ["solved", "file"])
def test_every_state_is_used_once(run, chain, tmp_path, monkeypatch, source):
    """The real command line over one and a half pools (or one epoch of a file), every pair recorded."""
    monkeypatch.chdir(chain)
    monkeypatch.setattr(midtrain, "pool_size", lambda batch, N: 8)
    solved, used, solve_pool, pairs = [], [], midtrain.solve_pool, midtrain.gather_pairs
    def watched_pool(*args):
        solved.append(solve_pool(*args))
        return solved[-1]
    def watched_pairs(*args):
        used.append(pairs(*args))
        return used[-1]
    monkeypatch.setattr(midtrain, "solve_pool", watched_pool)
    monkeypatch.setattr(midtrain, "gather_pairs", watched_pairs)
    extra = ["--trajectories", "runs/digits/trajectories.safetensors"] if source == "file" else ["--nfe", 8]
    steps = 8 if source == "file" else 12
    done = run("midtrain", "--steps", steps, "--batch", 8, "--out", tmp_path / "a.safetensors", *extra)
    assert done.code == 0 and ("8 trajectories of 8 pairs; the whole run uses each pair 1 times" in done.out) == (
        source == "file"), done.err
    if source == "file":
        file = model.read("runs/digits/trajectories.safetensors")[0]
        solved = [(file["states"].transpose(0, 1), file["times"], file["labels"])]
    assert [len(y) for _, _, y in solved] == ([8] if source == "file" else [8, 8])     # full size: one shape
    solved = [[a.cpu() for a in pool] for pool in solved]
    states = {s.numpy().tobytes(): (states[-1, j], times[i].float(), y[j])
              for states, times, y in solved for i in range(8) for j, s in enumerate(states[i])}
    x, t, x_end, _, y = (torch.cat(a).cpu() for a in zip(*used))
    assert len(x) == steps * 8 and len(states) == 64 * len(solved)
    for k in range(len(x)):
        end, time, label = states.pop(x[k].numpy().tobytes())         # a state used twice is no longer there
        assert torch.equal(end, x_end[k]) and time == t[k] and label == y[k]


def test_network_in_the_loop_never_sees_the_end_as_input():
    states, times = torch.randn(5, 3, 2), torch.tensor([80.0, 9.0, 1.0, 0.1, 0.002], dtype=torch.float64)
    x, t, x_end, r, y = midtrain.gather_pairs(states, times, torch.arange(3), torch.arange(12),
                                              *midtrain.pair_table(4, "cm"))
    assert t.min() > 0.05 and t.shape == (12,) and torch.equal(x_end, states[-1].repeat_interleave(4, 0))
    assert (r == 0.002).all()


def test_mean_flow_draws_N_pairs_of_each_trajectory_without_replacement():
    torch.manual_seed(0)
    N, paths, M = 8, 4000, 36
    i, j = midtrain.pair_table(N, "mf")
    number = midtrain.draw_pair_indices(paths, N, M, "cpu")
    assert len(number.unique()) == len(number) == paths * N                         # no pair of a path twice
    assert torch.equal((number // M).bincount(), torch.full((paths,), N))
    assert not torch.equal(number, number.sort().values)
    # every pair equally often: 36 counts of about 889 +- 26; beyond 5 of these: 1 run in 50,000
    counts = (number % M).bincount(minlength=M).double()
    assert ((counts - paths * N / M).abs() < 5 * (paths * N / M * (1 - N / M)) ** 0.5).all()
    assert sorted(zip(i.tolist(), j.tolist())) == [(a, b) for a in range(8) for b in range(a + 1, 9)]


def test_kd_takes_the_start_with_the_end():
    for target in ("cm", "mf"):
        i, j = midtrain.pair_table(5, target, "kd")
        assert (i.tolist(), j.tolist()) == ([0], [5])


# --- LPIPS --------------------------------------------------------------------------------------------------

def lpips_weights():
    """-> state dicts named as torchvision's vgg16 and the lpips package's linear weights are"""
    found = vector_weights("lpips_vgg")
    vgg = {f"features.{k.split('.', 2)[2]}": w for k, w in found.items() if k.startswith("net.")}
    return vgg, {k: w for k, w in found.items() if k.startswith("lin") and not k.startswith("lins")}


@pytest.mark.parametrize("size", ["32x32", "64x64"])
def test_lpips_reproduces_the_reference(size):
    v, _ = vectors("lpips_vgg")
    lpips = feature_networks.LPIPS(*lpips_weights())
    x, y = v[f"in/{size}/x"].float().requires_grad_(), v[f"in/{size}/y"].float()
    distance = lpips(x, y)
    assert relerr(distance.detach(), v[f"out64/{size}/distance"]) < 1e-5
    distance.sum().backward()
    assert relerr(x.grad[:, :, ::7, ::7], v[f"out64/{size}/grad_x"]) < 1e-3
    assert torch.equal(lpips(y, y), torch.zeros(2))


def test_lpips_repeats_one_channel_and_has_no_nan_gradient():
    lpips, a = feature_networks.LPIPS(*lpips_weights()), torch.rand(2, 1, 16, 16, requires_grad=True)
    b = torch.rand(2, 1, 16, 16)
    assert torch.equal(lpips(a, b), lpips(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)))
    lpips(a, a.detach()).sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a))


def test_lpips_by_command_line(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = "--steps", 1, "--batch", 4
    data = write_npz(tmp_path / "a.npz", size=16, channels=1)
    assert run("pretrain", "--data", data, *small).code == 0
    mid = "midtrain", "--data", data, *small, "--nfe", 4, "--distance", "lpips"
    refused(run(*mid), "--lpips", "download.pytorch.org", "PerceptualSimilarity")
    refused(run(*mid, "--lpips", "nowhere.pth", "lin.pth"), "nowhere.pth", "download.pytorch.org")
    for name, weights in zip(("vgg.pth", "lin.pth"), lpips_weights()): torch.save(weights, name)
    refused(run(*mid, "--lpips", "lin.pth", "vgg.pth"), "features.0.weight")
    done = run(*mid, "--lpips", "vgg.pth", "lin.pth")
    assert done.code == 0 and "repeated to three" in done.out, done.err
    assert len(model.read("runs/a/midtrain_cm.safetensors")[1]["settings"]["sha256 of vgg"]) == 64
    tiny = write_npz(tmp_path / "b.npz", size=8, channels=3)
    assert run("pretrain", "--data", tiny, *small).code == 0
    refused(run("midtrain", "--data", tiny, *small, "--distance", "lpips", "--lpips", "vgg.pth", "lin.pth"),
            "16x16", "3x8x8")
