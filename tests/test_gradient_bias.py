"""A lab note on why mid-training works: its theory, measured where everything is known.

Data are a mixture of three Gaussians in the plane, so that the denoiser D and the score are closed formulas
and the flow map Psi_{t->0} can be integrated to ten digits. Post-training wants the gradient of

    L* = E ||f(x_t, t) - Psi_{t->0}(x_t)||^2      and takes that of      L = E ||f(x_t, t) - sg f(x_s, s)||^2

with s = t - dt and x_s one step of the teacher's ODE from x_t. The difference of the two gradients is

    grad L* - grad L = 2 E[J^T rho],      rho = f(x_s, s) - Psi_{t->0}(x_t):

how wrong the target is. So E ||rho||^2 at the weights where post-training starts says how far it is led
astray, and B = ||grad L* - grad L||^2 <= 4 G^2 E ||rho||^2 with ||J|| <= G (2509.24526; the orders in h and
dt below are our derivation: a solver error h^p enters a squared norm as h^(2p)).

`pytest tests/test_gradient_bias.py -m slow -s` prints the tables, `make theory` draws them after longer training.
Seeds are fixed: nothing here fails by chance.
"""
import copy, functools, itertools, math, sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / name) for name in ("", "experiments")]
import choose, common, midtrain, model, posttrain_cm, pretrain, solve
from conftest import mixture_denoiser

MEANS = torch.tensor([[-0.8, 0.4], [0.6, 0.5], [0.1, -0.7]]).double()
STDS, WEIGHTS, T = torch.tensor([0.3, 0.25, 0.35]).double(), torch.tensor([0.3, 0.3, 0.4]).double(), 2.0


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- the laboratory: all of it with points x (B,2) and times t (B,) -----------------------------------------

def score(x, t):
    v = STDS ** 2 + t[:, None] ** 2                                                        # (B, 3)
    gap = MEANS - x[:, None]                                                               # (B, 3, 2)
    log_g = WEIGHTS.log() - v.log() - gap.square().sum(-1) / (2 * v)
    return (log_g.softmax(1)[..., None] * gap / v[..., None]).sum(1)


def D(x, t, y=None):
    return x + t[:, None] ** 2 * score(x, t)


def velocity(x, t):
    return -t[:, None] * score(x, t)                                           # (x - D) / t, defined at 0 too


def psi(x, t, s=0.0, steps=400):
    """The flow map Psi_{t->s}(x), by Runge and Kutta's fourth-order method."""
    h = ((s - t) / steps)[:, None]
    for k in range(steps):
        at = t + k * h[:, 0]
        a = velocity(x, at)
        b = velocity(x + h / 2 * a, at + h[:, 0] / 2)
        c = velocity(x + h / 2 * b, at + h[:, 0] / 2)
        d = velocity(x + h * c, at + h[:, 0])
        x = x + h / 6 * (a + 2 * b + 2 * c + d)
    return x


def step(x, t, s, order):
    """One step of Euler's method (order 1) or Heun's (2) from t to s; unlike posttrain_cm.ode_step's, which
    has only D, Heun's goes into s = 0 too."""
    h, v = (s - t)[:, None], velocity(x, t)
    return x + h * v if order == 1 else x + h / 2 * (v + velocity(x + h * v, s))


def draw(n, seed, least=0.0):
    """x_0 (n,2), eps (n,2), t (n,) uniform in [least, T]"""
    g = torch.Generator().manual_seed(seed)
    k = torch.multinomial(WEIGHTS, n, replacement=True, generator=g)
    x0 = MEANS[k] + STDS[k, None] * torch.randn(n, 2, generator=g)
    return x0, torch.randn(n, 2, generator=g), least + (T - least) * torch.rand(n, generator=g)


class MLP(nn.Module):
    """A small raw network for model.Denoiser: images of 2 channels and 1x1 pixels."""
    def __init__(self, width=96):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                    nn.Linear(width, 2))

    def forward(self, x, noise, y):
        return self.layers(torch.cat([x[:, :, 0, 0], noise[:, None]], dim=1))[:, :, None, None]


def network(seed=0):
    torch.manual_seed(seed)
    return model.Denoiser(MLP())


def points(f):
    """A network of images (B,2,1,1) as a function of points."""
    return lambda x, t: f(image(x), t, None)[:, :, 0, 0]


def train(f, steps, loss, lr=3e-3, batch=256):
    """A copy of f after `steps` steps on loss(f, number of the step, batch)"""
    f = copy.deepcopy(f)
    opt = torch.optim.Adam(f.parameters(), lr)
    for k in range(steps):
        opt.param_groups[0]["lr"] = lr * (1 - k / steps)
        opt.zero_grad()
        loss(f, k, batch).mean().backward()
        opt.step()
    return f


def image(x):
    return x[:, :, None, None]


def denoising(f, k, batch):
    x0, eps, t = draw(batch, 10_000 + k, least=0.01)
    return pretrain.edm_loss(f, image(x0), image(eps), t, None)


@functools.cache
def trajectories(N=32, n=4096):
    """Of the exact denoiser by Heun's method: states (N+1,n,2), times (N+1,)"""
    x0, eps, _ = draw(n, 1)
    return solve.heun(velocity, x0 + T * eps, solve.uniform_times(N, T, 0.0))


def mid_training(f, k, batch):
    states, times = trajectories()
    g = torch.Generator().manual_seed(20_000 + k)
    i, path = (torch.randint(n, (batch,), generator=g) for n in (len(times) - 1, states.shape[1]))
    return midtrain.cmt_loss(f, image(states[i, path]), times[i], image(states[-1, path]), None, midtrain.l2)


def distillation(gap):
    """Consistency distillation: the target is the network itself at an anchor u = t - gap, where a Heun step
    of the teacher from t arrives."""
    def loss(f, k, batch):
        x0, eps, t = draw(batch, 30_000 + k, least=0.01)
        u, x = (t - gap).clamp(min=0), x0 + t[:, None] * eps
        with torch.no_grad(): target = points(f)(step(x, t, u, 2), u)
        return (points(f)(x, t) - target).square().sum(1)
    return loss


# --- what is measured ---------------------------------------------------------------------------------------

@functools.cache
def pairs(dt, order=2, n=2048):
    """x_t, t uniform in [dt, T], x_s by one step (order 0: exactly), s = t - dt or, where dt is a function,
    dt(t), and Psi_{t->0}(x_t)"""
    x0, eps, t = draw(n, 2, least=0.01 if callable(dt) else dt)
    x, s = x0 + t[:, None] * eps, dt(t) if callable(dt) else t - dt
    return x, t, step(x, t, s, order) if order else psi(x, t, s), s, psi(x, t)


def rho(f, *which):
    x, t, x_s, s, exact = pairs(*which)
    with torch.no_grad(): return f(x_s, s) - exact


def size(r):
    return r.square().sum(1).mean().item()


def slopes(errors):
    """Observed orders, of errors at h, h / 2, h / 4, ..."""
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


def gradient(f, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(f.parameters()))])


SQUARE = lambda a, b, t: (a - b).square().sum(1)


def gradients(f, dt, loss=SQUARE):
    """grad L* and grad L of a network, for loss(f(x_t, t), target, t) a sample"""
    x, t, x_s, s, exact = pairs(dt)
    with torch.no_grad(): target = points(f)(x_s, s)
    return [gradient(f, loss(points(f)(x, t), at, t).mean()) for at in (exact, target)]


def bias(f, dt):
    wanted, taken = gradients(f, dt)
    return (wanted - taken).square().sum().item()


def jacobian_norm(f, dt, n=256):
    """E ||J||^2 over samples: the largest singular value of d f(x_t, t) / d weights, squared."""
    x, t = (a[:n] for a in pairs(dt)[:2])
    one = lambda w, x, t: torch.func.functional_call(f, w, (image(x[None]), t[None], None)).flatten()
    J = torch.func.vmap(torch.func.jacrev(one), (None, 0, 0))(dict(f.named_parameters()), x, t)
    J = torch.cat([j.detach().flatten(2) for j in J.values()], dim=2)                      # (n, 2, weights)
    return torch.linalg.eigvalsh(J @ J.mT)[:, -1].mean().item()


@functools.cache
def trained(longer):
    """{name: network}: what post-training may start from, mid-trained from the last diffusion model"""
    found = {"random": network()}
    for n in (100, 400, 1600):
        n *= longer
        last = found[f"diffusion, {n:,} steps"] = train(network(), n, denoising)
    for n in (200, 800, 2400): found[f"CMT, {n * longer:,} steps"] = train(last, n * longer, mid_training)
    for gap in (1 / 16, 1 / 2):
        name = f"CD, {800 * longer:,} steps, anchor at t - {gap:g}"
        found[name] = train(last, 800 * longer, distillation(gap))
    return found


# --- the laboratory itself ----------------------------------------------------------------------------------

def test_the_formulas_are_right():
    x0, eps, t = draw(64, 0, least=0.1)
    x = x0 + t[:, None] * eps
    assert (D(x, t) - mixture_denoiser(MEANS, STDS, WEIGHTS)(x, t)).abs().max() < 1e-12
    assert (psi(x, t) - psi(x, t, steps=800)).abs().max() < 3e-10
    assert (psi(psi(x, t, t / 2), t / 2) - psi(x, t)).abs().max() < 3e-10


def test_gaussian_numbers():
    """N(0, sd^2): Psi_{t->0}(x) = c x and E[x_0 | x] = c^2 x with c = sd / sqrt(sd^2 + t^2)."""
    g = torch.Generator().manual_seed(0)
    n, sd = 400_000, 0.5
    for t in (0.1, 0.5, 2.0):
        c, x0 = sd / math.hypot(sd, t), sd * torch.randn(n, generator=g)
        x = x0 + t * torch.randn(n, generator=g)
        for found, exact in [((c * c * x - c * x) ** 2, sd ** 2 * (1 - c) ** 2),  # posterior mean against Psi
                             ((x0 - c * x) ** 2, 2 * sd ** 2 * (1 - c))]:         # x_0 against Psi
            assert abs(found.mean() - exact) < 5 * found.std() / n ** 0.5             # five standard errors


# --- the theory ---------------------------------------------------------------------------------------------

def solver_errors(order, steps):
    """E||rho||^2 where f is the end that a solver of N steps reaches"""
    def f(x, t, N):
        for k in range(N): x = step(x, t * (1 - k / N), t * (1 - (k + 1) / N), order)
        return x
    return [size(rho(lambda x, t: f(x, t, N), 0.25, 0, 512)) for N in steps]


def anchor_errors(order, gaps):
    """E||rho||^2 where f is exact and its argument one step away"""
    return [size(rho(psi, gap, order, 512)) for gap in gaps]


@pytest.mark.parametrize("order", [1, 2])
def test_after_mid_training_the_target_is_as_wrong_as_the_solver(order):
    """f fitted exactly to a solver of N steps: E||rho||^2 falls as h^(2p). t - s stays, and is a step."""
    steps = [32, 64, 128, 256]
    errors = solver_errors(order, steps)
    found = slopes(errors)
    print(f"\norder {order}: E||rho||^2 at N = {steps}: " + ", ".join(f"{e:.2e}" for e in errors)
          + f"; slopes {', '.join(f'{s:.2f}' for s in found)}, theory {2 * order}")
    assert all(abs(s - 2 * order) < 0.3 for s in found[1:])


@pytest.mark.parametrize("order", [1, 2])
def test_an_anchor_adds_the_error_of_the_step_to_it(order):
    """f exact, but the target is taken at an anchor u that one step from t reaches: E||rho||^2 = delta_u^2,
    of order 2 (p + 1) in t - u; in the same way the step of post-training itself enters, with u = s."""
    gaps = [1 / 8, 1 / 16, 1 / 32, 1 / 64]
    errors = anchor_errors(order, gaps)
    found = slopes(errors)
    print(f"\norder {order}: E||rho||^2 at t - u = 1/8 .. 1/64: " + ", ".join(f"{e:.2e}" for e in errors)
          + f"; slopes {', '.join(f'{s:.2f}' for s in found)}, theory {2 * order + 2}")
    assert all(abs(s - 2 * order - 2) < 0.3 for s in found[1:])


def table(longer=1, dt=1 / 16):
    """-> {name: (epsilon, E||rho||^2, B, 4 E||J||^2 E||rho||^2)}"""
    found, (x, t, _, _, exact) = {}, pairs(dt)
    for name, f in trained(longer).items():
        with torch.no_grad(): epsilon = size(points(f)(x, t) - exact)
        r = size(rho(points(f), dt))
        found[name] = epsilon, r, bias(f, dt), 4 * jacobian_norm(f, dt) * r
    return found


@pytest.mark.slow
def test_where_post_training_starts():
    found = table()
    print("\n| initial weights | E‖f - Psi‖² | E‖rho‖² | B | 4 E‖J‖² E‖rho‖² |\n|---|---|---|---|---|")
    for name, row in found.items(): print(f"| {name} | " + " | ".join(f"{v:.2e}" for v in row) + " |")
    wrong = lambda what: [row[1] for name, row in found.items() if name.startswith(what)]
    scale = size(pairs(1 / 16)[4])                                     # E||Psi||^2, the data's own size
    floor = size(rho(D, 1 / 16))                                       # the posterior mean instead of Psi
    print(f"E‖Psi‖² {scale:.3f}; the exact denoiser's E‖rho‖² {floor:.3f}")
    assert wrong("random")[0] > 0.1 * scale
    # no diffusion training removes the mismatch of posterior mean and flow map
    assert abs(wrong("diffusion")[-1] / floor - 1) < 0.25 and min(wrong("diffusion")) > 0.75 * floor
    # mid-training does, the longer the better
    assert wrong("CMT") == sorted(wrong("CMT"), reverse=True)
    assert wrong("CMT")[0] < 0.5 * floor and wrong("CMT")[-1] < 0.05 * floor
    for epsilon, r, B, bound in found.values(): assert 0 < B <= bound


# --- questions the paper leaves open ------------------------------------------------------------------------

NEAR = lambda t: posttrain_cm.ect_r(t, 16, 0)              # ECT's times
pseudo_huber = lambda c: lambda a, b, t: (SQUARE(a, b, t) + c ** 2).sqrt()
LOSSES = {"squared l2, weight 1":        SQUARE,
          "squared l2, weight 1/(t-r)":  lambda a, b, t: SQUARE(a, b, t) / (t - NEAR(t)),
          "squared l2, weight 1/c_out²": lambda a, b, t: posttrain_cm.ect_weight(t, NEAR(t), "denoising")
                                                         * SQUARE(a, b, t),
          "pseudo-huber, c = 0.6":       pseudo_huber(0.6),
          "pseudo-huber, c = 0.06":      pseudo_huber(0.06),
          "pseudo-huber, c = 0.00076":   lambda a, b, t: midtrain.huber(a, b)}          # 0.00054 sqrt(2)


@pytest.mark.slow
def test_other_weights_and_distances():
    """||grad L* - grad L|| where post-training starts, at ECT's times, for what the theory leaves out."""
    start, end = (next(f for name, f in reversed(trained(1).items()) if name.startswith(what))
                  for what in ("diffusion", "CMT"))
    found = {}
    print("\n| loss | ‖∇L*‖, diffusion weights | ‖∇L* - ∇L‖ | ‖∇L*‖, after CMT | ‖∇L* - ∇L‖ | less by |"
          "\n|---|---|---|---|---|---|")
    for name, loss in LOSSES.items():
        (a, a_), (b, b_) = (gradients(f, NEAR, loss) for f in (start, end))
        found[name] = ((a - a_).norm() / (b - b_).norm()).item()
        cells = [f"{v.norm():.2e}" for v in (a, a - a_, b, b - b_)]
        print(f"| {name} | {' | '.join(cells)} | {found[name]:.3g} |")
    squared = [v for name, v in found.items() if name.startswith("squared")]
    assert squared == sorted(squared, reverse=True) and squared[-1] > 3
    # a distance that is nearly a norm has a gradient of full length however small the error
    assert found["pseudo-huber, c = 0.6"] > 3 and found["pseudo-huber, c = 0.00076"] < 1


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_solver_tells_its_error(order):
    """choose.py's estimate from a coarse grid and a fine one, against the exact end of the path."""
    x0, eps, _ = draw(512, 3)
    x, ends = x0 + T * eps, (T, 0.002)
    end = solve.dpm_solver_pp(D, x, solve.log_uniform_times(16, *ends), order)[0][-1]
    true = size(end - psi(x, *(torch.full((len(x),), t) for t in ends)))
    told = choose.solver_errors(D, x, [16], [order], ends)[16, order]
    print(f"\norder {order}: {true:.2e}, told {told:.2e}")
    assert abs(told / true - 1) < 0.05


def test_a_teacher_tells_its_error():
    """choose.py's estimate where all is linear: the data N(0, sd^2 I), a teacher that knows sd and takes the
    mean of its m images for that of all. D(x) = mu + c^2 (x - mu), E||D - D*||^2 = (1 - c^2)^2 d sd^2 / m."""
    g, sd, d, m = torch.Generator().manual_seed(4), 0.5, 8, 30
    data = sd * torch.randn(4000, m + 10, d, generator=g)                   # 4,000 times two such teachers
    times = torch.tensor([0.1, 0.5, 2.0])
    share = (times ** 2 / (sd ** 2 + times ** 2))[:, None]                                 # 1 - c^2
    a, b = data[:, 10:].mean(1, keepdim=True), data[:, :m].mean(1, keepdim=True)           # a lacks the first
    error = lambda mean, x0: share ** 2 * (mean - x0).square().sum(2).flatten()  # over the noise, + constant
    unseen = torch.cat([error(a, data[:, :10]), error(b, data[:, m:])], 1)
    seen = torch.cat([error(b, data[:, :10]), error(a, data[:, m:])], 1)
    told, spread = choose.teacher_error(seen, unseen)
    true = share[:, 0] ** 2 * d * sd ** 2 / m
    print(f"\n{true.tolist()}, told {told.tolist()}; {true.mean():.5f}, {told.mean():.5f} ± {spread:.5f}")
    assert abs(told / true - 1).max() < 0.05 and spread < 0.02 * true.mean()
    # the denoising error itself: that of the exact denoiser is d sd^2 t^2 / (sd^2 + t^2)
    exact = lambda x, t, y: x * (sd ** 2 / (sd ** 2 + t ** 2))[:, None]
    found = choose.denoising_errors(exact, data[:400].flatten(0, 1), None, times, repeats=1).mean(1)
    assert (found / (d * sd ** 2 * share[:, 0]) - 1).abs().max() < 0.02


def test_the_cheapest_that_is_good_enough():
    errors = {(4, 1): 3.0, (8, 1): 1.0, (8, 2): 0.5, (16, 2): 0.1}
    assert choose.cheapest(errors, 2.0) == (8, 2) and choose.cheapest(errors, 0.3) == (16, 2)
    assert choose.cheapest(errors, 0.01) == (16, 2)


def main():
    plt = common.pyplot()
    torch.set_default_dtype(torch.float64)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    steps, gaps = [16, 32, 64, 128, 256], [1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64]
    for p, colour in ((1, "tab:blue"), (2, "tab:orange")):
        left.loglog(steps, solver_errors(p, steps), "o-", color=colour, label=f"order {p}")
        middle.loglog(gaps, anchor_errors(p, gaps), "o-", color=colour, label=f"order {p}")
    left.set(xlabel="solver steps N", ylabel="E‖ρ‖²", title="fitted exactly to a solver")
    left.set_xticks(steps, steps, minor=False)
    middle.set(xlabel="t - u", title="target at an anchor u")
    middle.set_xticks(gaps, [f"1/{1 / gap:g}" for gap in gaps], minor=False)
    for axes in (left, middle): axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    left.legend()
    middle.legend()
    found = table(longer=4)
    right.barh(list(found), [row[1] for row in found.values()], color="tab:gray", label="E‖ρ‖²")
    right.plot([row[2] for row in found.values()], list(found), "k|", markersize=12, label="B")
    right.axvline(size(rho(D, 1 / 16)), color="tab:red", linestyle=":", label="E‖D - Ψ‖²")
    right.set(xscale="log", xlim=(3e-5, 1), title="where post-training starts")
    right.invert_yaxis()
    right.legend(fontsize=8, loc="lower right", bbox_to_anchor=(0.82, 0.31))
    figure.savefig("docs/gradient_bias.png", dpi=110)


if __name__ == "__main__":
    main()
