"""What the tests share: the stored reference outputs, a Gaussian mixture with a closed-form denoiser, and a
way to run a script's real command line inside this process (starting Python and torch anew costs seconds
each time)."""
import importlib, json, math, os, signal, sys, zlib
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")      # these tests are about a CPU; "0" tries a GPU

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

torch.backends.cudnn.deterministic = True              # runs are compared bit for bit
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = str(ROOT), str(ROOT / "tools"), str(ROOT / "experiments")


def vectors(name):
    """-> tensors, metadata of tests/vectors/NAME.safetensors (outputs of the reference implementations)"""
    path = ROOT / "tests/vectors" / f"{name}.safetensors"
    with safe_open(path, "pt") as f: meta = f.metadata()
    return load_file(path), meta | {"config": json.loads(meta["config"])}


def vector_weights(name):
    """-> {reference name: tensor}. Where a file does not store them, by the rule in its note."""
    v, meta = vectors(name)
    found = {k.removeprefix("w/"): w for k, w in v.items() if k.startswith("w/")}
    if "check/sum" not in v: return found
    shapes = {k: s for k, s in json.loads(meta["state_dict"]).items() if "num_batches_tracked" not in k}
    for i, (k, shape) in enumerate(shapes.items()):
        if k not in found:
            seed = zlib.crc32((meta["salt"] + k.replace("lins.", "lin")).encode())     # one tensor, two names
            z = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            kind = meta["config"]["class"]
            if kind == "SiT":                                found[k] = 0.1 * z
            elif kind == "lpips.LPIPS":                      found[k] = lpips_rule(k, z)
            elif "Inception" in kind:                        found[k] = inception_rule(k, z)
            elif z.dim() == 4:                               found[k] = z * z[0].numel() ** -0.5
            elif "norm" in k and k.endswith("weight"):       found[k] = 1 + 0.1 * z
            else:                                            found[k] = 0.1 * z
        assert found[k].flatten()[0] == v["check/first"][i]
        assert abs(found[k].double().sum() - v["check/sum"][i]) < 1e-6
    return found


def lpips_rule(k, z):
    if k == "scaling_layer.shift": return torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)
    if k == "scaling_layer.scale": return torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1)
    if k.startswith("lin"):        return 0.1 * z.abs()
    return z * (2 / z[0].numel()) ** 0.5 if k.endswith("weight") else 0.1 * z


def inception_rule(k, z):
    if k.startswith("fc."):          return 0.02 * z
    if k.endswith("conv.weight"):    return z * (2 / z[0].numel()) ** 0.5
    if k.endswith("bn.weight"):      return 1 + 0.1 * z
    if k.endswith("running_var"):    return 1 + 0.1 * z.abs()
    return 0.1 * z


def relerr(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def mixture_denoiser(means, stds, weights):
    """E[x_0 | x_t] for data ~ sum_k w_k N(mu_k, s_k^2 I), as a function of x (B, d), t (B,)."""
    def denoise(x, t):
        v = stds ** 2 + t[:, None] ** 2                                                     # (B, k)
        gap = x[:, None] - means                                                            # (B, k, d)
        log_g = weights.log() - v.log() * x.shape[1] / 2 - gap.square().sum(-1) / (2 * v)
        return (log_g.softmax(1)[..., None] * (means + (stds ** 2 / v)[..., None] * gap)).sum(1)
    return denoise


@pytest.fixture(autouse=True)
def eager_on_a_gpu(monkeypatch, request):
    """On a GPU --compile is the default, and compiling takes minutes; experiments/gpu.py tests it."""
    import model
    if torch.cuda.is_available() and not request.node.get_closest_marker("compiles"):
        monkeypatch.setattr(model, "compiled", lambda function, wanted: function)


one_process_a_gpu = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="NCCL takes one process per GPU")


@pytest.fixture(scope="session")
def run():
    """run("midtrain", "--steps", 4) -> SimpleNamespace(code, out, err): the script's main() under its real
    arguments."""
    def call(script, *args):
        import contextlib, io
        import model
        module, out, err, argv = importlib.import_module(script), io.StringIO(), io.StringIO(), sys.argv
        handlers = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        sys.argv, code = [f"{script}.py", *map(str, args)], 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): model.run(module.main)
        except SystemExit as e:
            code = e.code or 0
        finally:
            sys.argv = argv
            for sign, handler in handlers.items(): signal.signal(sign, handler)
        return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())
    return call


def refused(done, *words):
    """One sentence with all these words, exit code 2, no traceback."""
    assert done.code == 2 and len(done.err.strip().splitlines()) == 1, done.err
    assert "Traceback" not in done.err, done.err
    assert all(w in done.err for w in words), done.err


def free_port():
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def write_npz(path, n=24, size=8, channels=3, classes=4, **arrays):
    g = np.random.default_rng(0)
    images = g.integers(0, 256, (n, size, size, channels), dtype=np.uint8)
    labels = {"arr_1": np.arange(n) % classes} if classes else {}
    np.savez(path, **({"arr_0": images} | labels | arrays))
    return str(path)


def latents_npz(path, latents, scale, labels=None):
    """Prepared latents (N,C,H,W), or (N,2C,H,W), with their scale as in model.LATENTS. -> path"""
    arrays = {"arr_0": latents, "info": np.array(json.dumps({"latents": scale}))}
    if labels is not None: arrays["arr_1"] = np.asarray(labels)
    np.savez(path, **arrays)
    return str(path)


def small_pool(local_batch, pairs_per_trajectory):
    """As midtrain.pool_size, for two batches"""
    return 2 * math.lcm(local_batch, pairs_per_trajectory) // pairs_per_trajectory


@pytest.fixture(autouse=True)
def small_pools(monkeypatch):
    """128 trajectories take a second."""
    monkeypatch.setattr("midtrain.pool_size", small_pool)


def make_chain(run, folder):
    """Run the whole chain for a few steps on the embedded digits in `folder`, all paths default. -> folder"""
    before = os.getcwd()
    os.chdir(folder)
    (folder / "data").symlink_to(ROOT / "data")
    try:
        for script, *args in [("pretrain",), ("solve", "--n", 8, "--nfe", 8), ("midtrain", "--nfe", 4),
                              ("posttrain_cm",), ("pretrain", "--objective", "flow"),
                              ("midtrain", "--branch", "mf", "--nfe", 4), ("posttrain_mf",)]:
            small = "--steps", 4, "--batch", 8, "--save-every", 2, "--log-every", 2
            if script == "solve": small = ()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("solve.error_table", lambda *_: None)    # 900 forward passes
                patch.setattr("midtrain.pool_size", small_pool)
                done = run(script, *small, *args)
            assert done.code == 0, done.err
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="session")
def chain(run, tmp_path_factory):
    return make_chain(run, tmp_path_factory.mktemp("chain"))
