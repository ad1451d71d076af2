"""The scripts in experiments/."""
import json, subprocess, sys

import pytest
import torch

from conftest import ROOT


def test_gpu_without_a_gpu_says_so():
    done = subprocess.run([sys.executable, str(ROOT / "experiments/gpu.py")], capture_output=True, text=True)
    assert done.returncode == 2 and "no GPU" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [("pretrain",), ("midtrain",), ("posttrain_cm", "--loss", "ecd"),
                                     ("posttrain_mf",)])
def test_gpu_takes_a_step_of_a_recipe(monkeypatch, command):
    monkeypatch.setattr(sys, "argv", [])
    import gpu
    row = gpu.recipe_step(command, "digits", torch.device("cpu"))
    assert row["seconds"] > 0 and row["estimate_GiB"] > 0 and "digits" in row["what"]


def test_gpu_reports_a_part_that_fails(monkeypatch, tmp_path):
    import gpu
    def broken(device):
        yield {"what": "one", "result": "fine"}
        raise RuntimeError("broken")
    monkeypatch.setitem(gpu.PARTS, "tests", broken)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--cpu", "tests"])
    with pytest.raises(SystemExit): gpu.main()
    rows = json.loads((tmp_path / "runs/gpu.json").read_text())
    assert [row["result"] for row in rows][1:3] == ["fine", "FAILED: RuntimeError: broken"]
