"""Every script on an emulated GPU. Its tensors say that they are on `gpu:0`, hold their numbers on the CPU,
and refuse to meet a CPU tensor, generator or index where CUDA would refuse. This finds a missing
`.to(device)` without a GPU, and counts how often a step waits for the GPU. It cannot see kernels, NCCL or
speed.

test_emulated_gpu.py runs this file in a process of its own, because it registers a device with torch's
private API. """
import os, traceback
from pathlib import Path

import pytest
import torch

try:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
    _setup_privateuseone_for_python_backend("gpu")         # at import: autograd counts devices once
except (ImportError, RuntimeError) as e:
    pytest.skip(f"torch {torch.__version__} cannot register an emulated device ({e})", allow_module_level=True)

import fid, model, solve
from tools import feature_networks
from conftest import ROOT, latents_npz, make_chain

aten, CPU, GPU0 = torch.ops.aten, torch.device("cpu"), torch.device("gpu", 0)
waits = []                                                 # the project's functions that waited for the GPU


class GPUTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), held.stride(), held.storage_offset(),
                                                   dtype=held.dtype, device=GPU0)

    def __init__(self, held): self.held = held

    is_cuda = property(lambda self: True)

    def numpy(self): raise TypeError("can't convert a GPU tensor to numpy")

    def tolist(self):
        record_wait()
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None): return dispatch(op, args, kwargs or {})


class EmulatedGPU(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None): return dispatch(op, args, kwargs or {})


def record_wait():
    project = [frame.name for frame in traceback.extract_stack()
               if Path(frame.filename).parent == ROOT]
    waits.append(project[-1] if project else "?")


def held(x): return x.held if isinstance(x, GPUTensor) else x


def refuse_mixed(op, args, tensors):
    """CUDA takes CPU tensors only as 0-dim numbers, as the other side of a copy, or as indices."""
    strays = [x for x in tensors if not isinstance(x, GPUTensor) and x.dim()]
    copies = op in (aten.copy_.default, aten._to_copy.default)
    indices = op is aten.index.Tensor and isinstance(args[0], GPUTensor)
    if strays and not copies and not indices: raise RuntimeError(f"{op}: tensors on gpu:0 and cpu")


def dispatch(op, args, kwargs):
    if op is aten._efficientzerotensor.default: op = aten.zeros.default
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    gpu, target = any(isinstance(x, GPUTensor) for x in tensors), kwargs.get("device")
    if gpu: refuse_mixed(op, args, tensors)
    on_gpu = gpu if target is None else torch.device(target).type == "gpu"
    if op is aten.copy_.default: on_gpu = isinstance(args[0], GPUTensor)
    if on_gpu and kwargs.get("generator") is not None: raise RuntimeError(f"{op}: a CPU generator for gpu:0")
    if gpu and (not on_gpu or op in (aten._local_scalar_dense.default, aten.nonzero.default)): record_wait()
    if target is not None: kwargs = kwargs | {"device": CPU}
    out = op(*tree_map(held, args), **tree_map(held, kwargs))
    if op._schema.name.endswith("_") and isinstance(out, torch.Tensor): return args[0]          # in place
    return tree_map(lambda x: GPUTensor(x) if isinstance(x, torch.Tensor) else x, out) if on_gpu else out


@pytest.fixture(scope="session")
def chain(run, tmp_path_factory):
    """As in conftest.py, or the folder CHAIN, where it was made before."""
    return Path(os.environ.get("CHAIN") or make_chain(run, tmp_path_factory.mktemp("chain")))


@pytest.fixture
def on_gpu(monkeypatch, chain):
    monkeypatch.chdir(chain)
    setup, fork_rng = model.setup, torch.random.fork_rng
    def setup_on_gpu(*args, **kwargs):
        rank, world, _, batch = setup(*args, **kwargs)
        return rank, world, GPU0, batch
    monkeypatch.setattr(model, "setup", setup_on_gpu)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices=(): fork_rng([]))
    waits.clear()


SMALL = "--steps", 2, "--batch", 8, "--log-every", 2
MID, MF, ECD = ("midtrain", *SMALL, "--nfe", 4), ("posttrain_mf", *SMALL), ("posttrain_cm", *SMALL, "--loss", "ecd")
DENOISER = "runs/digits/pretrain.safetensors"

@pytest.mark.parametrize("command", [
    ("pretrain", *SMALL), ("pretrain", *SMALL, "--objective", "flow", "--microbatch", 3),
    MID, (*MID, "--guidance", 2, "--precision", "bf16"),
    ("midtrain", *SMALL, "--trajectories", "runs/digits/trajectories.safetensors"),
    (*MID, "--branch", "mf"), (*MID, "--branch", "mf", "--teacher", DENOISER, "--init", "none"),
    (*MID, "--branch", "mf", "--teacher", "runs/digits/posttrain_mf.safetensors", "--init", "none"),
    ("posttrain_cm", *SMALL), ECD, (*ECD, "--guidance", 2, "--guide", DENOISER),
    MF, (*MF, "--precision", "bf16", "--omega", 0.5, "--velocity", "teacher"), (*MF, "--derivative", "difference")],
    ids=lambda c: " ".join(map(str, c)))
def test_a_training_step(run, tmp_path, on_gpu, command):
    with EmulatedGPU(): done = run(*command, "--out", tmp_path / "a.safetensors")
    assert done.code == 0, done.err
    # One wait a step, for the norm of the gradient, and one for the numbers of each line of the log.
    of_saves = "check_finite", "<dictcomp>", "to_images"       # the last one draws the preview
    assert sorted(w for w in waits if w not in of_saves) == 2 * ["gradient_norm"] + 2 * ["write"], waits


@pytest.mark.parametrize("channels", [4, 8])
def test_a_training_step_on_latents(run, tmp_path, on_gpu, channels):
    import numpy as np
    data = latents_npz(tmp_path / "latents.npz", np.ones((16, channels, 8, 8), "f"), model.LATENTS["SiT"])
    with EmulatedGPU(): done = run("pretrain", *SMALL, "--data", data, "--out", tmp_path / "a.safetensors")
    assert done.code == 0, done.err


@pytest.mark.parametrize("command", [
    ("sample", "runs/digits/posttrain_cm.safetensors:2", "--n", 8, "--real"),
    ("sample", f"{DENOISER}:4", "runs/digits/posttrain_mf.safetensors:2", "--n", 8),
    ("fid", "runs/digits/posttrain_cm.safetensors:1", "--n", 64, "--features", "pixels"),
    ("solve", "--n", 8, "--nfe", 4), ("solve", "--n", 8, "--teacher", "runs/digits/posttrain_mf.safetensors")],
    ids=lambda c: " ".join(map(str, c)))
def test_samples(run, tmp_path, on_gpu, command):
    of_two = "runs/digits/posttrain_mf.safetensors:2" in command
    name = {"fid": None, "sample": "a.png" if of_two else "a.npz", "solve": "a.safetensors"}[command[0]]
    out = ("--out", tmp_path / name) if name else ()
    with EmulatedGPU(): done = run(*command, *out)
    assert done.code == 0, done.err


@pytest.mark.parametrize("stage", ["pretrain", "midtrain"])
def test_a_resumed_run(run, tmp_path, on_gpu, monkeypatch, stage):
    """Adam's fused step keeps its counter on the GPU, RAdam's on the CPU."""
    save_run = model.save_run
    def save_and_die(*args):
        save_run(*args)
        raise model.UserError("the power went out")
    monkeypatch.setattr(model, "save_run", save_and_die)
    command = stage, "--steps", 4, "--batch", 8, "--save-every", 2, "--out", tmp_path / "a.safetensors"
    with EmulatedGPU():
        assert run(*command).code == 2
        monkeypatch.setattr(model, "save_run", save_run)
        done = run(*command)
        assert done.code == 0, done.err


@pytest.mark.parametrize("cls", ["DDPMpp", "EDM2UNet", "SiT"])
def test_networks(on_gpu, cls):
    from test_runs import TINY
    dataset = model.DATASETS["digits"] | {"network": {"class": cls, **TINY[cls]}}
    header = model.fresh_header(dataset, "MeanVelocity", interval=True)
    with EmulatedGPU():
        net = model.build(header).to(GPU0).train()
        net.backbone_dtype = torch.bfloat16
        x, t = torch.randn(4, 1, 8, 8, device=GPU0), torch.rand(4, device=GPU0)
        for y in (None, torch.zeros(4, dtype=torch.int64, device=GPU0)):
            net(x, t, t, y).square().sum().backward()
        assert all(p.grad.device == GPU0 for p in net.parameters())
        model.normalise_weights(net)
        assert net(x, t, t).device == GPU0


@pytest.mark.parametrize("solver", ["dpm1", "dpm2", "dpm3", "euler", "heun"])
def test_solvers(on_gpu, solver):
    header = model.fresh_header(model.DATASETS["digits"])
    with EmulatedGPU(), torch.no_grad():
        net = model.build(header).to(GPU0)
        x, y = 80 * torch.randn(4, 1, 8, 8, device=GPU0), torch.zeros(4, dtype=torch.int64, device=GPU0)
        states, times = solve.solve_teacher(net, header, x, y, 4, solver)
        assert states.device == GPU0 and times.device == CPU


def test_inception(on_gpu):
    with EmulatedGPU():
        net = feature_networks.Inception().to(GPU0).eval().requires_grad_(False)
        n, *sums = fid.sums([net(torch.zeros(2, 8, 8, 1, dtype=torch.uint8).to(GPU0))])
        assert all(m.device == GPU0 for m in fid.moments_of_all_ranks(n, *sums)[1:])
