"""Every command in the README and in the scripts' docstrings names a script and flags that exist."""
import argparse, importlib, re, shlex, sys

import pytest
import torch

from conftest import ROOT


def commands():
    for file in sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]):
        for line in file.read_text().replace("\\\n", " ").splitlines():
            found = re.match(r"\s*(?:run\s+|\$ )?(?:python|torchrun (?:-\S+ )+)\s?(?:tools/)?(\w+)\.py(.*)", line)
            if found:
                yield pytest.param(found[1], found[2].split("  ")[0],
                                   id=f"{file.name}: {found[1]}{found[2].split('  ')[0]}")


@pytest.fixture
def parse_only(monkeypatch):
    """Runs the main of a module up to the end of parse_args."""
    class Parsed(Exception): pass
    parse = argparse.ArgumentParser.parse_args
    def parse_and_stop(self, *a):
        parse(self, *a)
        raise Parsed
    def run(name, args):
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *shlex.split(args, comments=True)])
        with pytest.raises(Parsed): importlib.import_module(name).main()
    return run


@pytest.mark.parametrize("script, args", list(commands()))
def test_command_parses(script, args, parse_only):
    parse_only(script, args)


def experiment_commands():
    files = [ROOT / "README.md", ROOT / "Makefile", ROOT / "data/README.md", *ROOT.glob("docs/*.md"),
             *ROOT.glob("experiments/*.py")]
    found = {match for file in files
             for match in re.findall(r"(?:python|\$\(PY\)) experiments/(\w+)\.py([^`\n\"]*)", file.read_text())}
    return sorted((name, args.replace("$(FLAGS)", "")) for name, args in found)


@pytest.mark.parametrize("name, args", experiment_commands())
def test_command_of_an_experiment_parses(name, args, monkeypatch, parse_only):
    source = (ROOT / f"experiments/{name}.py").read_text()
    if "ArgumentParser" not in source:                     # its arguments are names of parts
        assert all(re.search(rf"\W{word}\W", source) for word in args.split())
        return
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    parse_only(name, args)


def test_the_chain_of_the_readme_is_there():
    text = " ".join(c.id for c in commands() if c.id.startswith("README"))
    assert all(f"{s}" in text for s in ("pretrain", "solve", "midtrain", "posttrain_cm", "posttrain_mf",
                                        "sample", "fid"))


def snippets():
    text = "".join((ROOT / name).read_text() for name in ("README.md", "docs/reuse.md"))
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_functions_shown_are_those_of_the_source():
    source, shown = "".join(f.read_text() for f in ROOT.glob("*.py")), []
    for snippet in snippets():
        for function in re.split(r"\n(?=# |def )", snippet):
            if function.startswith("def "):
                shown.append(function.split("(")[0])
                assert function.strip() in source
    assert shown == ["def cmt_loss"]


def test_own_teacher_as_shown():
    shrink = lambda x, t, y=None: x / (1 + t)[:, None, None, None]
    space = dict(denoise=shrink, velocity=shrink, f=shrink, u=lambda z, r, t, y: z - r[:, None, None, None],
                 labels=torch.zeros(128, dtype=torch.int64))
    for loss in ("cmt_loss(f", "cmt_meanflow_loss(u"):
        exec(next(s for s in snippets() if f"loss = midtrain.{loss}" in s), space)
        assert space["loss"].isfinite() and len(space["x" if "cmt_loss" in loss else "x_t"]) == 128


def test_conversions_of_teachers_as_shown():
    """Each formula gets a teacher that knows x_0 and eps, and checks that its input is the one it was made for."""
    x0, noise = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    t, sigma = torch.tensor([0.1, 2.5, 30.0], dtype=torch.float64)[:, None, None, None], 0.5
    a, tau, s = (1 + t ** 2) ** -0.5, torch.atan(t / sigma), t / (1 + t)
    b = t * a
    def exact(answer, expected_input, expected_time):
        def teacher(z, time):
            assert torch.allclose(z, expected_input) and torch.equal(time, expected_time.flatten())
            return answer
        return teacher
    vp, trig = a * x0 + b * noise, tau.cos() * x0 / sigma + tau.sin() * noise
    teachers = [exact(noise - x0, (1 - s) * x0 + s * noise, s), exact(noise, vp, t), exact(a * noise - b * x0, vp, t),
                exact(tau.cos() * noise - tau.sin() * x0 / sigma, trig, tau)]
    rows = re.findall(r"^\| (\w+)\b.*`(.*)` \|$", (ROOT / "docs/reuse.md").read_text(), re.MULTILINE)
    for (name, formula), teacher in zip(rows, teachers, strict=True):
        space = {name: teacher, "x": x0 + t * noise, "t": t, "s2": sigma ** 2, "torch": torch}
        assert torch.allclose(eval(formula, space), x0), formula


def test_a_checkpoint_makes_images_as_shown(chain, monkeypatch):
    monkeypatch.chdir(chain)
    space = {}
    exec(next(s for s in snippets() if "model.load" in s), space)
    assert space["images"].shape == (16, 8, 8, 1) and space["x"].shape == (16, 1, 8, 8)


@pytest.mark.parametrize("script, recipes, flags", [
    ("pretrain", "edm", []), ("pretrain", "flow", ["--objective", "flow"]), ("midtrain", "cm", []),
    ("midtrain", "mf", ["--branch", "mf"]), ("posttrain_cm", None, []), ("posttrain_mf", None, [])])
def test_help_prints_the_defaults_of_that_data_set(run, script, recipes, flags):
    table = importlib.import_module(script).RECIPES
    recipes = table[recipes] if recipes else table
    for data in ("digits", "cifar10"):
        done = run(script, *flags, "--data", data, "--help")
        assert done.code == 0 and f"(default: {recipes[data]['steps']})" in done.out
        assert all("%(default)s" not in line for line in done.out.splitlines())


def test_compute_is_read_off_the_curves():
    import curves
    fast, slow = [(1, 8.0), (2, 2.0), (4, 1.0)], [(4, 8.0), (16, 2.0)]
    assert curves.reach(slow, 4.0) == (pytest.approx(8), False)
    assert curves.reach([(1, 2.0), (2, 3.0), (4, 1.0)], 2.5) == (1, True)              # not the later crossing
    assert "mid-training 8.00 times the compute, for a distance of 2.000" in curves.speed_up(fast, slow)
    assert "at least 16.00 times" in curves.speed_up([(1, 1.0)], slow)
    assert "at most 1.00 times" in curves.speed_up(fast, [(4, 0.9)])
    assert "training 2.00 times the compute, for a distance of 1.000" in curves.speed_up([(1, 1.0)], [(2, 1.0)])
