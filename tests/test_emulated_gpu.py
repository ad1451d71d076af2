"""Runs emulated_gpu.py in a process of its own, and checks that it finds what it is for."""
import os, shutil, subprocess, sys

import pytest

from conftest import ROOT


def emulated(root, chain, *args):
    env = os.environ | {"CHAIN": str(chain), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args,
                           "tests/emulated_gpu.py"], cwd=root, env=env, capture_output=True, text=True,
                          timeout=600)


@pytest.mark.slow
def test_every_script_on_an_emulated_gpu(chain):
    done = emulated(ROOT, chain)
    assert done.returncode in (0, 5), done.stdout[-3000:]
    if "skipped" in done.stdout: pytest.skip(done.stdout.strip().splitlines()[-2])
    print(done.stdout.splitlines()[-1])


# A line of the project, what it becomes, a test of emulated_gpu.py that runs it.
REFUSED_BY_CUDA = [
    ("solve.py", "randn(n, *model.image_shape(header), device=device)",
     "randn(n, *model.image_shape(header))", "midtrain"),
    ("midtrain.py", "solved[0][1].to(device)", "solved[0][1]", "midtrain"),
    ("midtrain.py", "M * torch.arange(P, device=device)", "M * torch.arange(P)", "midtrain"),
    ("midtrain.py", "i, j = (k.to(device) for k in pair_table(N,", "i, j = (k for k in pair_table(N,", "midtrain"),
    ("solve.py", "[\"label_dim\"]), (n,), device=device)", "[\"label_dim\"]), (n,))", "midtrain"),
    ("model.py", "torch.rand(len(y), device=y.device)", "torch.rand(len(y))", "pretrain"),
    ("model.py", "torch.arange(128, device=t.device, dtype=t.dtype)", "torch.arange(128, dtype=t.dtype)",
     "test_networks"),
    ("model.py", "torch.arange(self.model_channels // 2, device=t.device, dtype=t.dtype)",
     "torch.arange(self.model_channels // 2, dtype=t.dtype)", "pretrain"),
    ("model.py", "    opt.load_state_dict(opt.state_dict() | {\"state\": dict(enumerate(moments))})",
     "    opt.state.update(zip(net.parameters(), moments))", "resumed"),
    ("model.py", "x, t = (a.to(next(ema.parameters()).device) for a in", "x, t = (a for a in", "pretrain"),
    ("pretrain.py", "ema = copy.deepcopy(net)", "ema = copy.deepcopy(net).cpu()", "pretrain"),
    ("pretrain.py", "args.P_std * torch.randn(local_batch, device=device)",
     "args.P_std * torch.randn(local_batch)", "pretrain"),
    ("posttrain_cm.py", "args.P_std * torch.randn(local_batch, device=device)",
     "args.P_std * torch.randn(local_batch)", "posttrain_cm"),
    ("posttrain_mf.py", "torch.arange(n, device=device) % 4", "torch.arange(n) % 4", "posttrain_mf"),
    ("solve.py", "x.new_full((len(x),), t[i])), *outputs[:2]]",
     "torch.full((len(x),), t[i], dtype=x.dtype)), *outputs[:2]]", "midtrain"),
    ("solve.py", "v = velocity(x, x.new_full((len(x),), t[i]))",
     "v = velocity(x, torch.full((len(x),), t[i], dtype=x.dtype))", "test_solvers"),
    ("sample.py", "header, eps.to(device), y.to(device), steps,", "header, eps, y.to(device), steps,", "test_samples"),
    ("sample.py", "\"b c h w -> b h w c\").cpu().numpy()", "\"b c h w -> b h w c\").numpy()", "test_samples"),
    ("tools/feature_networks.py", "torch.arange(size, device=x.device, dtype=torch.float32)",
     "torch.arange(size, dtype=torch.float32)", "inception"),
]
ALLOWED_BY_CUDA = [                                        # CPU indices; a 0-dim CPU tensor as a number
    ("midtrain.py", "indices.to(device, non_blocking=True), i, j)", "indices, i, j)", "trajectories"),
    ("midtrain.py", "chosen[torch.randperm(len(chosen), device=device)]", "chosen[torch.randperm(len(chosen))]",
     "midtrain"),
    ("posttrain_cm.py", "return 1 / (t - r)", "return torch.tensor(1.0) / (t - r)", "posttrain_cm"),
]


def test_the_lines_to_plant_errors_in_are_there():
    for name, line, *_ in REFUSED_BY_CUDA + ALLOWED_BY_CUDA:
        assert (ROOT / name).read_text().count(line) == 1, (name, line)


@pytest.mark.slow
def test_it_finds_planted_errors_and_no_others(chain, tmp_path):
    """Each planted error by itself, in a copy of the project."""
    ignore = shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__", ".pytest_cache", "docs")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=ignore)
    missed, false_alarms = [], []
    for plants, wrong in (REFUSED_BY_CUDA, missed), (ALLOWED_BY_CUDA, false_alarms):
        for name, line, planted, test in plants:
            file = tmp_path / "copy" / name
            original = file.read_text()
            file.write_text(original.replace(line, planted))
            passed = emulated(tmp_path / "copy", chain, "-x", "-k", test).returncode == 0
            file.write_text(original)
            if passed == (plants is REFUSED_BY_CUDA): wrong.append((name, planted))
    print(f"found {len(REFUSED_BY_CUDA) - len(missed)} of {len(REFUSED_BY_CUDA)} planted errors, "
          f"{len(false_alarms)} false alarms")
    assert not missed and not false_alarms, (missed, false_alarms)
