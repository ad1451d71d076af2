"""The scripts in experiments/."""
import importlib, json, re, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import model
from conftest import ROOT, refused


@pytest.mark.parametrize("name", sorted(f"{path.parent.name}.{path.stem}" for folder in ("experiments", "tools")
                                        for path in (ROOT / folder).glob("*.py")))
def test_every_script_imports(name, monkeypatch):
    """A name that one script takes from another can go away unseen: most of these run for hours."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    if name == "tools.plot_log": pytest.importorskip("matplotlib")
    importlib.import_module(name.removeprefix("experiments."))


@pytest.fixture
def stages_parse(monkeypatch, tmp_path):
    """Lets an experiment run without training: `command` parses the flags as the stage does, checks that what
    it reads is there, and writes an untrained network with a header. -> the commands that ran"""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    import common, model
    ran = []
    def command(script, *words):
        ran.append([script, *map(str, words)])
        if script in ("sample", "fid", "solve"): return []
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
        args = importlib.import_module(script).flags()
        stage = {"pretrain": "{0.stage}", "midtrain": "midtrain_{0.branch}"}.get(script, script).format(args)
        for path in [args.npz, *args.command_for]: assert path == "none" or Path(path).exists(), (path, ran[-1])
        dataset = model.open_data(args)[1]
        header = model.fresh_header(dataset, model.KIND[stage], **args.network)
        header |= model.run_metadata(args, stage, "pairs" if script == "midtrain" else "images", 1)
        if script == "midtrain": header["settings"]["solver"] = args.solver or "heun"
        header |= {"step": args.steps, header["unit"]: args.steps * args.batch}
        model.save(args.out, model.build(header).state_dict(), header)
        return []
    def patch(name, **others):
        module = importlib.import_module(name)
        for attribute, value in {"command": command, **others}.items():
            monkeypatch.setattr(module, attribute, value)
        return module
    monkeypatch.setattr(common, "command", command)
    return patch, ran


fake_scores = lambda path, n, ref="digits", calls=(1, 2): [0.1 * (1 + k) for k in range(len(calls))]


def test_ablation_and_choose_give_flags_that_the_stages_take(stages_parse):
    patch, ran = stages_parse
    patch("ablation", scores=fake_scores).main()
    assert "| ECD | 0.31 | 0.100 | 0.200 | 0.42 | 0.100 | 0.200 |" in Path("docs/ablation.md").read_text()
    choose = patch("choose", denoising_errors=lambda D, x0, y, times: torch.rand(len(times), len(x0)),
                   solver_errors=lambda D, x, Ns, orders: {(N, p): 1 / N for N in Ns for p in orders})
    choose.main()
    assert sum("--nfe" in line for line in ran) > 3 and ran[-1][0] == "posttrain_cm"


def test_demo_share_and_curves_give_flags_that_the_stages_take(stages_parse, monkeypatch):
    patch, ran = stages_parse
    demo = patch("demo", scores=fake_scores, distances=lambda files, n=None, ref="digits": [0.1])
    for flags in (["--intervals", "50", "70"], ["--branch", "mf", "--scratch"]):
        monkeypatch.setattr(sys, "argv", ["demo.py", "--seeds", "0-1", *flags])
        demo.main()
    share = patch("share", scores=fake_scores)
    share.main()
    curves = patch("curves", scores=fake_scores)
    for branch in curves.CASES: curves.points(branch, 0)
    assert {line[0] for line in ran} == {"pretrain", "solve", "midtrain", "posttrain_cm", "posttrain_mf", "sample"}


@pytest.mark.parametrize("scale", [1, 10])
def test_mnist_gives_flags_that_the_stages_take(stages_parse, monkeypatch, scale):
    import common
    patch, ran = stages_parse
    mnist = patch("mnist")
    for name in vars(mnist):
        if name.isupper(): monkeypatch.setattr(mnist, name, getattr(mnist, name))
    if scale == 10: mnist.use_scale_10()
    mnist.FOLDER.mkdir(parents=True)
    mnist.write_training_half()
    for method, (branch, budgets, setting, ladder, *_) in mnist.METHODS.items():
        before = len(ran)
        assert mnist.train(method, budgets[0], 1e-3, ladder[1], 0).exists()
        files = [line[-1] for line in ran[before:] if line[0] != "pretrain"]
        used, a_step = sum(map(common.compute, files)), 24 * mnist.BATCH          # at most 19 forwards a sample
        assert abs(used - budgets[0] * mnist.UNIT) < a_step, (method, used)
    chosen = {mnist.CHOSEN_KEY.format(method, units): [1e-3, 0.75]
              for method, (_, budgets, *_) in mnist.METHODS.items() for units in budgets}
    monkeypatch.setattr(mnist, "stored", lambda: chosen)
    monkeypatch.setattr(mnist, "share", lambda jobs: found.update({key: job() for key, job in jobs.items()}))
    monkeypatch.setattr(mnist, "scores", lambda path, n, *options: (path.exists(), *options))
    found = {}
    mnist.limits()
    assert len(found) == (18 if scale == 1 else 12) and all(exists for exists, *_ in found.values())
    assert found["limits: CMT + ECT, second step at 0.4"][1:] == ((2,), [0.4])
    mnist.picture()
    assert ran[-1][0] == "sample" and sum("mid-training" in word for word in ran[-1]) == 2
    monkeypatch.setattr(mnist, "scores", lambda path, n: {"1": {"FD": 4.0}, "2": {"FD": 9.0}})
    found = {}
    mnist.baseline_checks()
    assert len(found) == 14 and set(found.values()) == {6.0}
    used = [common.compute(line[-1]) for line in ran if "check_" in str(line[-1])]
    assert len(used) == 14 and all(abs(compute - 0.5 * mnist.UNIT) < 5 * mnist.BATCH for compute in used)


def test_a_stage_that_was_stopped_stops_the_experiment(run, chain, tmp_path, monkeypatch):
    """Else its unfinished model would be judged. A stage that gets SIGTERM exits with 143 (test_resume.py)."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import common
    monkeypatch.chdir(tmp_path)
    Path("pretrain.py").write_text("import sys; sys.exit(int(sys.argv[1]))")               # in place of the stage
    common.command("pretrain", 0)
    with pytest.raises(SystemExit, match="143"): common.command("pretrain", 143)
    tensors, header = model.read(chain / "runs/digits/pretrain.safetensors")
    out = tmp_path / "a.safetensors"
    model.save(out, tensors, header | {"step": header["steps"] - 1})
    done = run("sample", out, "--n", 2, "--out", tmp_path / "images.npz")
    assert done.code == 0 and "warning" in done.out and "from step" in done.out, done.err


@pytest.mark.parametrize("error, score", [(SystemExit(3), 1e9), (model.Diverged("not finite"), 1e9),
                                          (SystemExit(2), None), (model.UserError("damaged"), None)])
def test_a_trial_of_mnist_that_diverges_is_a_bad_one(stages_parse, monkeypatch, error, score):
    mnist = stages_parse[0]("mnist")
    def train(*settings): raise error
    monkeypatch.setattr(mnist, "train", train)
    monkeypatch.setattr(mnist, "teacher", lambda branch, seed: None)
    if score: assert mnist.trial("CMT + ECT", 1, 1e-3, 0.75) == score
    else:
        with pytest.raises(type(error)): mnist.trial("CMT + ECT", 1, 1e-3, 0.75)


def test_bench_and_precision_run(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import bench, model, precision
    device = torch.device("cpu")
    bench.steps("digits", 8, device, 1)
    bench.solving("digits", 8, device, 1)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("denoising ", "ECT ", "MeanFlow, JVP ", "dpm3", "heun"))
    torch.manual_seed(0)
    header = model.fresh_header(model.DATASETS["digits"])
    flow = model.fresh_header(model.DATASETS["digits"], "MeanVelocity", interval=True)
    D, u = (model.build(h).eval() for h in (header, flow))
    for p in [*D.parameters(), *u.parameters()]: p.data += 0.02 * torch.randn_like(p)      # no zero outputs
    with torch.no_grad(): table = precision.losses(D, u, torch.randn(8, 1, 8, 8), torch.arange(8), device)
    for net, f in table.values():
        unchanged = precision.compare(net, f, lambda net: precision.contextlib.nullcontext())
        assert unchanged == pytest.approx([1, 1, 1, 1], abs=1e-6)
    net, f = table["mid-training, CM"]
    assert 0.99 < precision.compare(net, f, precision.bf16)[0] < 1


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


def test_gpu_keeps_what_a_command_printed_before_it_was_killed(monkeypatch):
    import gpu
    lines = []
    with pytest.raises(RuntimeError, match="killed after"):
        for line in gpu.script(0.05, "-c", "print('first'); import time; time.sleep(60)"): lines.append(line)
    assert lines == ["first"]
    with pytest.raises(RuntimeError, match="ends here"):
        for line in gpu.script(1, "-c", "raise SystemExit('ends here')"): pass


def test_gpu_tries_ddp(monkeypatch):
    import gpu
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    assert "differ by" in next(gpu.ddp(torch.device("cpu")))["result"]


def test_the_tables_of_mnist_follow_from_committed_numbers(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    import mnist
    monkeypatch.setattr(mnist, "draw", lambda found: None)           # needs matplotlib
    mnist.report()
    lines, found = capsys.readouterr().out.splitlines(), mnist.stored()
    assert lines[0].startswith(f"classifier accuracy {found['classifier accuracy']:.2%}; noise floor FD ")
    page = (ROOT / "docs/mnist.md").read_text()
    for method, (_, budgets, *_) in mnist.METHODS.items():
        for units, runs in mnist.results(found, method):
            cells = []
            for measure, k, digits in ("FD", "1", 1), ("FD", "2", 1), ("FD-pixels", "1", 2), ("FD-pixels", "2", 2):
                values = [run[k][measure] for run in runs]
                spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
                cells.append(f"{np.mean(values):.{digits}f}{spread}")
            seeds = f" ({len(runs)} of 3 seeds)" if len(runs) < 3 else ""
            (line,) = (line for line in lines if line.startswith(f"| {method}{seeds} | {units} | lr "))
            assert all(f" | {cell} | " in line for cell in cells), (cells, line)
            label = {"plain ECT": "plain ECT by RAdam", "MeanFlow": "plain MeanFlow by RAdam",
                     "MeanFlow by Adam": "plain MeanFlow by Adam"}.get(method, method)
            row = re.escape(f" | {units} | " + " | ".join(cells) + " | ")
            assert re.search(rf"\n\| {re.escape(label)}( \([^|]*\))?{row}", page), (method, units)
    for head in ("\n\n| with / without mid-training |", "\n\n| method | trials |",
                 "\n\n| four settings, two seeds, one unit |"):
        tables = [(head + text.partition(head)[2]).strip().partition("\n\n")[0] for text in (page, "\n".join(lines))]
        shown, printed = ([row for row in table.splitlines() if row.startswith("|")] for table in tables)
        assert shown[2:] == printed[2:] and len(shown) > 5
    (readme,) = re.findall(r"\n\| with / without mid-training \| units .*?\n\n", (ROOT / "README.md").read_text(), re.S)
    pairs = [line.split(" | ") for line in lines if re.match(r"\| CMT .* / .* \| \d \| ", line)]
    shown = [row.split(" | ") for row in readme.splitlines() if "NFE" not in row and "---" not in row and row]
    names = ["ECT", None, "MeanFlow", "MeanFlow, other settings of the baseline", None]
    name = {f"| {' / '.join(pair)}": name for pair, name in zip(mnist.PAIRS, names, strict=True)}
    expected = [[f"| {name[pair]}", units, one, f"{two} |"] for pair, units, one, _, two, _ in pairs if name[pair]]
    a, b = ([cell.split(" (")[0] for cell in line.split(" | ")[2:]] for line in lines if " | mean of the four | " in line)
    expected.insert(3, ["| ECT, four settings of each side, two other seeds", "1", f"{a[0]} / {b[0]}", f"{a[2]} / {b[2]} |"])
    monkeypatch.setattr(mnist, "RESULTS", Path("docs/mnist_x10.json"))
    mnist.report()
    ((pair, _, one, one_pixels, two, two_pixels),) = (
        line.split(" | ") for line in capsys.readouterr().out.splitlines() if re.match(r"\| CMT .* / .* \| 1 \| ", line))
    assert " | ".join((pair, "1", one, one_pixels, two, two_pixels)) in page.partition("## Ten times the compute")[2]
    expected.insert(4, ["| ECT, a network four times as large, on an H100", "10", one, f"{two} |"])
    assert shown == expected


# --- tools/plot_log.py, docs/cmt.ipynb ----------------------------------------------------------------------

def test_logs_are_drawn(run, chain, tmp_path):
    pytest.importorskip("matplotlib")
    from tools import plot_log
    logs = sorted(str(p) for p in (chain / "runs/digits").glob("*.jsonl"))
    assert len(logs) == 6
    done = run("tools.plot_log", *logs, "--out", tmp_path / "a.png")
    assert done.code == 0 and (tmp_path / "a.png").stat().st_size > 10_000, done.err
    (tmp_path / "b.jsonl").write_text("hello}\n")
    refused(run("tools.plot_log", tmp_path / "b.jsonl"), "b.jsonl", "no log")
    # a resumed run wrote steps 5 and 10 again, and was killed while it wrote the last line
    (tmp_path / "c.jsonl").write_text('{"step": 5, "images": 9, "loss": 1.0}\n{"step": 10, "images": 18, "loss": 2.0}\n'
                                      '{"step": 5, "images": 9, "loss": 3.0}\n{"step": 10, "im')
    assert plot_log.read_log(tmp_path / "c.jsonl")["loss"] == [3.0, 2.0]
    (tmp_path / "d.jsonl").write_text(Path(logs[0]).read_text())                   # no checkpoint yet
    assert run("tools.plot_log", tmp_path / "d.jsonl", "--out", tmp_path / "d.png").code == 0


class NoDrawing:
    """Stands for matplotlib's objects where matplotlib is not installed."""
    transAxes = None

    def __getattr__(self, name):
        if name.startswith("__"): raise AttributeError(name)
        return lambda *args, **kwargs: NoDrawing()

    def subplots(self, rows, columns, **kwargs):
        return NoDrawing(), np.full((rows, columns), NoDrawing(), dtype=object)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(monkeypatch):
    """With two seconds of training instead of two minutes. Committed with its outputs."""
    try: importlib.import_module("matplotlib.pyplot").switch_backend("agg")
    except ImportError:
        monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace(pyplot=NoDrawing()))
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", NoDrawing())
    path = ROOT / "docs/cmt.ipynb"
    cells = json.loads(path.read_text())["cells"]
    assert len(cells) <= 25 and path.stat().st_size < 10 ** 6
    monkeypatch.chdir(path.parent)
    namespace = {}
    for cell in cells:
        if cell["cell_type"] != "code": continue
        assert cell["execution_count"] and not any(out["output_type"] == "error" for out in cell["outputs"])
        source = "".join(cell["source"]).replace("MINUTES, SAMPLES = 2, 2500", "MINUTES, SAMPLES = 1 / 30, 256")
        exec(source, namespace)
    assert namespace["SAMPLES"] == 256 and len(namespace["losses"]) >= 32
