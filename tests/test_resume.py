"""Runs that are killed anywhere continue bit for bit; files that were damaged anywhere are refused."""
import json, os, random, resource, shutil, signal, subprocess, sys, time

import numpy as np
import pytest
import torch

import model
from conftest import ROOT, one_process_a_gpu, refused, write_npz
from test_runs import STAGES

# A stage's main, in a process that ends itself: `where` is an event and how often it has to happen.
WRAPPED = """
import importlib, os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import model
sign, event, count = getattr(signal, sys.argv.pop(1)), sys.argv.pop(1), int(sys.argv.pop(1))
sys.argv.pop(0)
replace = os.replace
def dies(function, first):
    def call(*args, **kwargs):
        global count
        if function is replace and not str(args[1]).endswith(".safetensors"): return function(*args)
        count -= 1
        if count == 0 and first: os.kill(os.getpid(), sign)
        result = function(*args, **kwargs)
        if count == 0 and not first: os.kill(os.getpid(), sign)
        return result
    return call
if event == "step":    model.update_ema = dies(model.update_ema, first=False)
if event == "write":   model.os.replace = dies(os.replace, first=True)
if event == "renamed": model.os.replace = dies(os.replace, first=False)
if event == "fsync":   model.os.fsync = dies(os.fsync, first=True)
if os.environ.get("RANK", "0") == os.environ.get("VICTIM", "0") and os.environ.get(
        "TORCHELASTIC_RESTART_COUNT", "0") == "0": pass
else: count = 10 ** 9
model.run(importlib.import_module(sys.argv[0].removesuffix(".py")).main)
"""


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes that die: sums over other numbers of threads differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small_pools():
    """Not here: the processes that die have pools of the usual size."""


def killed(folder, sign, event, count, script, *args, python=(sys.executable,), **env):
    """Run a stage until `event` has happened `count` times -> the finished process"""
    wrapper = folder / "wrapped.py"
    wrapper.write_text(WRAPPED)
    command = [*python, wrapper, ROOT, sign, event, count, f"{script}.py", *args]
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


def tensors_equal(a, b):
    a, b = (model.read(path)[0] for path in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def stage_command(stage, steps):
    script, *flags = STAGES[stage]
    flags += ["--steps", steps, "--batch", 8, "--save-every", 2, "--log-every", 1]
    return script, flags + (["--nfe", 8] if script == "midtrain" else [])


def test_killed_at_three_points_a_run_ends_as_it_would_have(run, chain, tmp_path, monkeypatch):
    """In the middle of a step, before the resume file has its name, and between the two files of a save."""
    monkeypatch.chdir(chain)
    script, flags = stage_command("midtrain_cm", 8)
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    assert run(script, *flags, "--out", whole).code == 0
    for event, count, saved in [("step", 3, 2), ("write", 1, 2), ("renamed", 3, 6)]:
        done = killed(tmp_path, "SIGKILL", event, count, script, *flags, "--out", cut)
        assert done.returncode == -signal.SIGKILL
        assert model.read(model.resume_file(cut))[1]["step"] == saved
        model.load(cut)
    assert run(script, *flags, "--out", cut).code == 0
    assert tensors_equal(whole, cut) and tensors_equal(model.resume_file(whole), model.resume_file(cut))
    lines = [json.loads(line) for line in cut.with_suffix(".jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 8 and {line["step"] for line in lines} == set(range(1, 9))


def test_asked_to_stop_a_run_saves_and_says_so(run, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(chain)
    script, flags = stage_command("posttrain_mf", 8)
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    assert run(script, *flags, "--out", whole).code == 0
    for sign, step in (("SIGTERM", 3), ("SIGINT", 6)):
        done = killed(tmp_path, sign, "step", 3, script, *flags, "--out", cut)
        code = 128 + getattr(signal, sign)                 # not 0: `midtrain.py && posttrain_cm.py` ends, too
        assert done.returncode == code and f"ends after step {step}" in done.stdout, done.stderr
        assert model.read(cut)[1]["step"] == step
    assert run(script, *flags, "--out", cut).code == 0 and tensors_equal(whole, cut)
    line = json.loads(cut.with_suffix(".jsonl").read_text().splitlines()[-1])
    assert {"step", "images", "grad", "lr", "images/s", "left", "GiB", "skipped"} <= line.keys()
    share = 0.25 * line["loss r<t"] + 0.75 * line["loss r=t"]
    assert line["loss"] == pytest.approx(share, rel=1e-5) and line["images"] == 64


@pytest.mark.parametrize("interrupt", [False, True])
def test_a_run_whose_output_nobody_reads_saves_and_ends(tmp_path, interrupt):
    """`| tee log`: Ctrl-C ends tee as well, and what the run then prints meets a broken pipe."""
    out = tmp_path / "a.safetensors"
    command = [sys.executable, ROOT / "pretrain.py", "--out", out, "--steps", 100_000, "--log-every", 1]
    with subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        for line in process.stdout:
            if line.startswith("step       5/"): break
        process.stdout.close()
        if interrupt: process.send_signal(signal.SIGINT)
        codes = (130, 143) if interrupt else (143,)        # Ctrl-C, or the SIGTERM that the broken pipe raises
        assert process.wait(timeout=120) in codes, process.stderr.read()
        assert process.stderr.read() == ""
    assert 5 <= model.read(out)[1]["step"] < 100


def test_a_second_interrupt_stops_at_once(monkeypatch):
    before = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = model.Stop(1)
        assert not stop(1)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop(2)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        def main(): raise KeyboardInterrupt
        with pytest.raises(SystemExit) as e: model.run(main)
        assert e.value.code == 130
    finally:
        for sign, handler in before.items(): signal.signal(sign, handler)


def test_a_full_disk_leaves_the_last_save(run, chain, tmp_path, monkeypatch):
    """A limit on the size of files, as far as a file of this size gets."""
    monkeypatch.chdir(chain)
    script, flags = stage_command("pretrain", 8)
    out = tmp_path / "a.safetensors"
    assert killed(tmp_path, "SIGTERM", "step", 3, script, *flags, "--out", out).returncode == 143
    before = {f: f.read_bytes() for f in tmp_path.glob("a.*safetensors")}
    limit = "import resource, sys, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6, 10 ** 6));" \
            "sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]);" \
            "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", limit, str(ROOT / f"{script}.py"), *map(str, flags),
                           "--out", str(out)], capture_output=True, text=True, timeout=120)
    refused(SimpleDone(done), "could not be written", "untouched")
    assert {f: f.read_bytes() for f in tmp_path.glob("a.*safetensors*")} == before


class SimpleDone:
    def __init__(self, done): self.code, self.out, self.err = done.returncode, done.stdout, done.stderr


def test_a_model_of_another_run_is_not_replaced(run, chain, tmp_path):
    """Beside the state of an old run at --out may lie a model that was copied there since."""
    flags = "--batch", 8, "--no-preview", "--out", tmp_path / "a.safetensors"
    first = run("pretrain", *flags, "--steps", 3)
    assert first.code == 0, first.err
    _, imported = model.read(ROOT / "data/digits_teacher.safetensors")
    model.save(tmp_path / "imported", {}, imported | {"imported from": "edm.pkl", "step": 0, "settings": {}})
    for other in chain / "runs/digits/posttrain_cm.safetensors", ROOT / "data/digits_teacher.safetensors", \
            tmp_path / "imported":
        shutil.copy(other, tmp_path / "a.safetensors")
        refused(run("pretrain", *flags, "--steps", 3), "a.safetensors", "move one of the two away")
        assert (tmp_path / "a.safetensors").read_bytes() == other.read_bytes()
    (tmp_path / "a.safetensors").unlink()                  # as when it was killed before the second save
    assert run("pretrain", *flags, "--steps", 3).code == 0 and (tmp_path / "a.safetensors").exists()


def test_a_second_run_with_the_same_out_is_refused(run, tmp_path):
    import fcntl
    flags = "--batch", 8, "--steps", 2, "--no-preview", "--out", tmp_path / "a.safetensors"
    with open(tmp_path / "a.jsonl", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused(run("pretrain", *flags), "another run writes to", "a.safetensors")
    assert run("pretrain", *flags).code == 0
    with open(tmp_path / "a.jsonl", "a") as other:         # a finished run, too, is not overwritten meanwhile
        fcntl.flock(other, fcntl.LOCK_EX)
        refused(run("pretrain", *flags), "another run writes to")


def test_a_new_run_starts_a_new_log(run, tmp_path):
    flags = "--batch", 8, "--no-preview", "--out", tmp_path / "a.safetensors"
    assert run("pretrain", *flags, "--steps", 5).code == 0
    (tmp_path / "a.resume.safetensors").unlink()
    assert run("pretrain", *flags, "--steps", 2).code == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def test_another_torch_is_said(run, tmp_path):
    flags = "--batch", 8, "--steps", 1, "--no-preview", "--out", tmp_path / "a.safetensors"
    assert run("pretrain", *flags).code == 0
    for path in tmp_path / "a.safetensors", tmp_path / "a.resume.safetensors":
        tensors, header = model.read(path)
        header["settings"]["torch"] = "1.0"
        model.save(path, tensors, header)
    done = run("pretrain", *flags)
    assert done.code == 0 and "continuing with another torch" in done.out, (done.out, done.err)


def test_a_new_run_empties_the_log_where_files_cannot_be_locked(run, tmp_path, monkeypatch):
    def no_locks(*args): raise OSError(38, "Function not implemented")
    monkeypatch.setattr(model.fcntl, "flock", no_locks)
    (tmp_path / "a.jsonl").write_text('{"step": 900}\n')
    flags = "--batch", 8, "--steps", 1, "--no-preview", "--out", tmp_path / "a.safetensors"
    assert run("pretrain", *flags).code == 0
    assert [json.loads(line)["step"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [1]


def test_a_disk_without_room_is_refused_at_the_start(run, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 10_000_000})
    monkeypatch.setattr(model.shutil, "disk_usage", lambda folder: usage)
    flags = "--batch", 8, "--steps", 1, "--no-preview", "--out", tmp_path / "new/a.safetensors"
    refused(run("pretrain", *flags), "a.safetensors need 27 MB", "10 MB free")           # 749,089 parameters
    usage.free = 30_000_000
    assert run("pretrain", *flags).code == 0
    files = sum(os.path.getsize(tmp_path / "new" / f) for f in ("a.safetensors", "a.resume.safetensors"))
    assert 0.9 < files / (20 * 749_089) < 1.1              # the estimate


def test_a_damaged_state_is_refused_with_a_way_out(run, tmp_path):
    flags = "--batch", 8, "--steps", 2, "--no-preview", "--out", tmp_path / "a.safetensors"
    assert run("pretrain", *flags).code == 0
    state = tmp_path / "a.resume.safetensors"
    state.write_bytes(state.read_bytes()[:10_000])
    refused(run("pretrain", *flags), "a.resume.safetensors is damaged", "delete it")


def test_more_steps_only_where_the_rate_does_not_depend_on_them(run, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(chain)
    import pretrain
    out = "--out", tmp_path / "a.safetensors"
    small = "pretrain", "--batch", 8, *out, "--steps"
    assert run(*small, 2).code == 0
    refused(run(*small, 4), "steps was 2, is 4")
    for lr_decay in "constant", 1:                         # 1: falls as sqrt(1 / step)
        monkeypatch.setitem(pretrain.RECIPES["edm"]["digits"], "lr_decay", lr_decay)
        (tmp_path / "a.resume.safetensors").unlink()
        assert run(*small, 2).code == 0
        done = run(*small, 4)
        assert done.code == 0 and "continuing" in done.out and model.read(out[1])[1]["step"] == 4


@one_process_a_gpu
def test_a_rank_that_dies_takes_the_job_down_and_a_restart_continues(run, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(chain)
    script, flags = stage_command("posttrain_cm", 8)
    def torchrun(name, restarts, sign, event, count):
        started = time.time()
        python = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                  f"--max-restarts={restarts}")
        done = killed(tmp_path, sign, event, count, script, *flags, "--out", tmp_path / f"{name}.safetensors",
                      python=python, VICTIM="1")
        return done, time.time() - started
    whole, _ = torchrun("whole", 0, "SIGKILL", "step", 10 ** 6)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("\nstep ") == 8             # one line a period, not one a rank
    dead, seconds = torchrun("cut", 0, "SIGKILL", "step", 4)
    assert dead.returncode != 0 and seconds < 60
    assert model.read(model.resume_file(tmp_path / "cut.safetensors"))[1]["step"] == 2
    back, _ = torchrun("cut", 1, "SIGKILL", "step", 3)
    assert back.returncode == 0 and "continuing" in back.stdout, back.stderr
    assert tensors_equal(tmp_path / "whole.safetensors", tmp_path / "cut.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "midtrain_cm", "posttrain_cm", "posttrain_mf"])
def test_twenty_random_kills(run, chain, tmp_path, monkeypatch, stage):
    monkeypatch.chdir(chain)
    rng, survived = random.Random(stage), 0
    script, flags = stage_command(stage, 100)
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    assert run(script, *flags, "--out", whole).code == 0
    while survived < 20:
        sign = rng.choice(["SIGKILL", "SIGTERM"])
        event = rng.choice(["step", "step", "write", "renamed", "fsync"])
        done = killed(tmp_path, sign, event, rng.randint(3, 6), script, *flags, "--out", cut)
        assert done.returncode == (143 if sign == "SIGTERM" else -signal.SIGKILL), done.stderr
        assert model.read(model.resume_file(cut))[1]["step"] < 100
        model.load(cut)
        survived += 1
    assert run(script, *flags, "--out", cut).code == 0
    assert tensors_equal(whole, cut) and tensors_equal(model.resume_file(whole), model.resume_file(cut))
    print(f"{stage}: survived {survived} kills")


@pytest.mark.slow
def test_500_damaged_files(chain, tmp_path):
    """Checkpoints and compressed .npz with bits flipped, cut off, headers edited: as before, or a sentence. A
    memory-mapped .npz is not checked as it is read, but by `tools/prepare_data.py --check`."""
    rng, loaded, refusals = random.Random(0), 0, 0
    compressed = tmp_path / "compressed.npz"
    np.savez_compressed(compressed, **np.load(write_npz(tmp_path / "a.npz")))
    readers = {chain / "runs/digits/midtrain_cm.safetensors": read_checkpoint, compressed: read_data}
    originals = {path: (path.read_bytes(), reader(path)) for path, reader in readers.items()}
    base = peak_memory()
    for i in range(500):
        path, (content, expected) = rng.choice(list(originals.items()))
        bad = bytearray(content)
        how = rng.choice(["flip", "cut", "header", "tail"])
        if how == "cut": del bad[rng.randrange(len(bad)):]
        else:
            low, high = {"flip": (0, len(bad)), "header": (0, 600), "tail": (len(bad) - 600, len(bad))}[how]
            for _ in range(rng.randint(1, 3)): bad[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
        damaged = tmp_path / f"damaged{path.suffix}"
        damaged.write_bytes(bad)
        started = time.time()
        try: found = readers[path](damaged)
        except model.UserError as e:
            assert "\n" not in str(e)
            refusals += 1
        else:
            loaded += 1
            same = len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected))
            if not same: shutil.copy(damaged, tmp_path / f"kept{path.suffix}")
            assert same, (i, how, path)
        assert time.time() - started < 10
    print(f"500 damaged files: {loaded} loaded, {refusals} refused in a sentence")
    assert refusals > 200 and peak_memory() - base < 2 * max(len(c) for c, _ in originals.values()) + 2 ** 28


def read_checkpoint(path):
    net, _ = model.load(path)
    return list(net.state_dict().values())


def read_data(path):
    data = model.Data(path)
    return data.batch(range(len(data)))


def peak_memory():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_a_parameter_without_optimizer_state_is_continued(run, tmp_path):
    """A frozen parameter has none."""
    command = "pretrain", "--batch", 8, "--lr-decay", "constant", "--no-preview", "--out", tmp_path / "a.safetensors"
    assert run(*command, "--steps", 2).code == 0
    state, header = model.read(tmp_path / "a.resume.safetensors")
    frozen = next(k for k in state if k.startswith("net."))
    model.save(tmp_path / "a.resume.safetensors",
               {k: v for k, v in state.items() if not (k.startswith("opt.") and k.endswith(frozen[4:]))}, header)
    done = run(*command, "--steps", 3)
    assert done.code == 0 and "continuing" in done.out, done.err
