"""Several processes: compiled networks under DDP, signals, processes that fail, rules of `model.setup`."""
import json, os, random, re, signal, subprocess, sys, threading, time

import pytest
import torch
import torch.distributed as dist

import model
from conftest import ROOT, free_port, one_process_a_gpu, refused

# Runs a stage's main on one rank, with a change named by its first argument.
WRAPPER = """
import functools, importlib, os, sys
sys.path.insert(0, sys.argv[1])
import torch, midtrain, model
change, sys.argv = sys.argv[2], sys.argv[3:]
rank = int(os.environ["RANK"])
torch.set_num_threads(1)
if change == "aot_eager":
    # As on a GPU: --compile, several DDP buckets, a pool of another size than the batch.
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    midtrain.pool_size = lambda batch, pairs: 4
    ddp = torch.nn.parallel.DistributedDataParallel
    torch.nn.parallel.DistributedDataParallel = functools.partial(ddp, bucket_cap_mb=1)
if change == "eager":
    midtrain.pool_size = lambda batch, pairs: 4
if change == "raise" and rank == 1:
    update_ema, calls = model.update_ema, []
    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3: raise RuntimeError("something unexpected")
        return update_ema(*args, **kwargs)
    model.update_ema = fails
model.run(importlib.import_module(sys.argv[0].removesuffix(".py")).main)
"""


def torchrun(folder, change, script, *args, **options):
    """Start `script` on two gloo ranks -> Popen"""
    wrapper = folder / "wrapper.py"
    wrapper.write_text(WRAPPER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               f"--master_port={free_port()}", wrapper, ROOT, change, f"{script}.py", *args]
    return subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


def finished(process, timeout=400):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err[:6000]
    return out


def same_state(a, b, tolerance=0.0):
    """Compare two files of tensors: equal bit for bit, or to a relative tolerance of each tensor."""
    a, b = model.read(a)[0], model.read(b)[0]
    assert a.keys() == b.keys()
    for k in a:
        if tolerance == 0: assert torch.equal(a[k], b[k]), k
        else: assert (a[k] - b[k]).abs().max() <= tolerance * max(1.0, b[k].abs().max()), k


# --- compiled, as on a GPU ----------------------------------------------------------------------------------

def reduced_imagenet64(folder, channels=16):
    """A teacher with the network of imagenet64 at full depth (3 blocks a level, attention at 16 and 8, 1000
    classes) and few channels, as `midtrain.py --data imagenet64` reads it."""
    recipe = model.DATASETS["imagenet64"]
    header = model.fresh_header(recipe, model_channels=channels, channels_per_head=channels)
    torch.manual_seed(0)
    net = model.build(header)
    blocks = [layer for layer in net.modules() if isinstance(layer, model.MPBlock) and layer.attention]
    assert len(blocks) == 3 + 3 + 1 + 4 + 4                # levels 16 and 8 of both halves, and the middle
    for name, p in net.named_parameters():
        if name.endswith("gain"): p.data.fill_(0.3)        # at 0 the network ignores its input
    path = folder / "runs/imagenet64/pretrain.safetensors"
    path.parent.mkdir(parents=True)
    model.save(path, net.state_dict(), header | {"stage": "pretrain", "data": "imagenet64", "step": 0,
                                                 "steps": 0})
    return header


@pytest.mark.slow
def test_imagenet64_compiled_on_two_ranks_takes_the_steps_of_eager_mode(tmp_path):
    import numpy as np
    reduced_imagenet64(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data/imagenet64.npz", arr_0=rng.integers(0, 256, (1000, 64, 64, 3), dtype=np.uint8),
             arr_1=np.arange(1000))
    small = "--data", "imagenet64", "--steps", 5, "--batch", 4, "--log-every", 1
    for change, compile in ("eager", "--no-compile"), ("aot_eager", "--compile"):
        finished(torchrun(tmp_path, change, "midtrain", *small, "--nfe", 4, compile,
                          "--out", f"{change}.safetensors", cwd=tmp_path))
        finished(torchrun(tmp_path, change, "posttrain_cm", *small, compile, "--init", "eager.safetensors",
                          "--out", f"{change}-post.safetensors", cwd=tmp_path))
    for stage in "", "-post":
        same_state(tmp_path / f"eager{stage}.safetensors", tmp_path / f"aot_eager{stage}.safetensors", 1e-5)


# --- signals ------------------------------------------------------------------------------------------------

@pytest.fixture
def handlers():
    before = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)}
    yield
    for sign, handler in before.items(): signal.signal(sign, handler)


def test_a_signal_during_the_exchange_counts_at_the_next_step(handlers, monkeypatch):
    """The signal arrives after the flag was read, and the other rank's flag overwrites the exchanged
    value."""
    stop, arrived = model.Stop(world=2), []
    def all_reduce(flag, op):
        if not arrived: os.kill(os.getpid(), signal.SIGTERM)
        arrived.append(flag.item())
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    assert [stop(1), stop(2), stop(3)] == [False, True, True] and arrived == [0, signal.SIGTERM, signal.SIGTERM]


def test_a_signal_to_all_processes_leaves_the_compiler_alive():
    """torch's compiler processes belong to the run's process group. If a signal ended them, the run would wait for
    them forever."""
    code = ("import model, os, signal\nfor sign in signal.SIGTERM, signal.SIGHUP:\n"
            "    signal.signal(sign, lambda *_: print('asked to stop'))\n"
            "model.compiled(len, True); from torch._inductor.async_compile import AsyncCompile\n"
            "submit = AsyncCompile.process_pool().submit; before = submit(os.getpid).result(60)\n"
            "os.killpg(0, signal.SIGTERM), os.killpg(0, signal.SIGHUP)\n"
            "print(before, submit(os.getpid).result(60), os.getpid())")
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, start_new_session=True,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("asked to stop") == 2, done.stderr
    assert len(set(done.stdout.split()[-3:])) >= 2                         # another process did the work


@pytest.mark.parametrize("torchrun_id, ends", [(None, True), ("none", False)])
def test_a_second_interrupt_ends_a_single_process_but_not_one_of_torchrun(handlers, monkeypatch, torchrun_id,
                                                                          ends):
    """Ctrl-C reaches the processes of torchrun twice: from the terminal and from torchrun."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun_id: monkeypatch.setenv("TORCHELASTIC_RUN_ID", torchrun_id)
    stop = model.Stop(1)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop(1)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
    except KeyboardInterrupt: assert ends
    else: assert not ends and stop(2)


@pytest.mark.slow
def test_no_sigterm_is_lost(chain, tmp_path):
    """SIGTERM to torchrun at random moments of a run on two ranks. SIGTERMS=50 pytest -m slow -k sigterm"""
    count, rng = int(os.environ.get("SIGTERMS", 5)), random.Random(0)
    args = "midtrain", "--steps", 80 * count, "--batch", 8, "--nfe", 4, "--log-every", 1, "--save-every", 10 ** 6
    finished(torchrun(tmp_path, "none", *args, "--out", tmp_path / "whole.safetensors", cwd=chain))
    out, steps, delivered = tmp_path / "cut.safetensors", [0], 0
    while delivered < count:
        process = torchrun(tmp_path, "none", *args, "--out", out, cwd=chain)
        while not (line := process.stdout.readline()).startswith("step "): assert line, process.stderr.read()
        time.sleep(rng.random() * 0.5)
        process.send_signal(signal.SIGTERM)
        rest, err = process.communicate(timeout=60)
        if "is finished" in rest: break
        assert "asked to stop" in rest, err
        delivered += 1
        steps.append(model.read(model.resume_file(out))[1]["step"])
        assert steps[-1] > steps[-2]
    finished(torchrun(tmp_path, "none", *args, "--out", out, cwd=chain))
    same_state(tmp_path / "whole.safetensors", out)
    print(f"{delivered} signals, saved at steps {steps[1:]}")
    assert delivered == count


# --- failures -----------------------------------------------------------------------------------------------

def test_an_exception_on_one_rank_ends_the_job(chain, tmp_path):
    process = torchrun(tmp_path, "raise", "midtrain", "--steps", 10 ** 6, "--batch", 8, "--nfe", 4,
                       "--log-every", 1, "--out", tmp_path / "a.safetensors", cwd=chain)
    while not (line := process.stdout.readline()).startswith("step"): assert line, process.stderr.read()
    started = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - started < 35 and process.returncode != 0 and "something unexpected" in err


def test_processes_of_one_start_share_what_no_earlier_start_wrote():
    """Three processes start four times. Before the third time two more start and die at once."""
    store = dist.HashStore()
    for died in (), (), (2, 1), ():
        for rank in died: store.set(f"asks {rank}", "number of a dead process")
        parts = []
        def start(rank): parts.append(model.store_of_this_start(store, rank, 3))
        threads = [threading.Thread(target=start, args=(rank,), daemon=True) for rank in range(3)]
        for thread in threads: thread.start()
        for thread in threads: thread.join(20)
        assert len(parts) == 3 and not parts[0].check(["address"])
        parts[0].set("address", "")
        assert all(part.check(["address"]) for part in parts)


def test_an_incomplete_environment_is_explained(run, chain, monkeypatch):
    monkeypatch.chdir(chain)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT"): monkeypatch.delenv(name, raising=False)
    for command in ("sample", "runs/digits/midtrain_cm.safetensors"), ("midtrain",):
        refused(run(*command), "MASTER_ADDR", "torchrun")


@pytest.mark.parametrize("gpus", [8, 1])
def test_every_rank_has_its_own_gpu(monkeypatch, gpus):
    """Eight visible GPUs, or one of its own for each rank, as SLURM's --gpus-per-task gives."""
    store, chosen = dist.HashStore(), []
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(store, 0, 2)]))
    monkeypatch.setattr(model, "store_of_this_start", lambda store, rank, world: store)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: chosen.append(kwargs["device_id"]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in 0, 1:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        model.setup(8)
    assert chosen == [torch.device("cuda", rank % gpus) for rank in range(2)]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")            # torchrun's: all processes see the same GPUs
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(model.UserError, match=f"--nproc_per_node={gpus}"): model.setup(8)


# --- sampling without a common disk -------------------------------------------------------------------------

def start_two_ranks(folders, commands):
    """Run a command in a folder for each of two ranks -> exit codes, (stdout, stderr) of both"""
    port, processes = free_port(), []
    for rank, (folder, (script, *args)) in enumerate(zip(folders, commands)):
        env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
                            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(subprocess.Popen(
            [sys.executable, str(ROOT / f"{script}.py"), *map(str, args)], cwd=folder, env=env,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=120) for process in processes]
    return [process.returncode for process in processes], outputs


def two_ranks_on_two_disks(folder, *command):
    """Run a script on two ranks whose working directories share nothing -> stdout of rank 0"""
    codes, outputs = start_two_ranks((folder / "0", folder / "1"), (command, command))
    assert codes == [0, 0], outputs
    return outputs[0][0]


@one_process_a_gpu
def test_two_nodes_with_different_commands_do_not_start(chain, tmp_path):
    """DDP averages their gradients, and each applies its own learning rate."""
    command = "midtrain", "--steps", 4, "--batch", 8, "--nfe", 4, "--out", tmp_path / "a.safetensors"
    codes, outputs = start_two_ranks((chain, chain), (command, (*command, "--lr", 1e-4)))
    assert codes == [2, 2] and all("the processes differ in lr;" in err for _, err in outputs), outputs
    assert not (tmp_path / "a.safetensors").exists()


def test_ranks_without_a_common_disk_sample_and_evaluate_together(run, chain, tmp_path, monkeypatch):
    import numpy as np
    for rank in "0", "1":
        (tmp_path / rank / "runs").mkdir(parents=True)
        (tmp_path / rank / "data").symlink_to(ROOT / "data")
        (tmp_path / rank / "runs/digits").symlink_to(chain / "runs/digits")
    file = "runs/digits/midtrain_cm.safetensors:1"
    monkeypatch.chdir(chain)
    assert run("sample", file, "--n", 2500, "--out", tmp_path / "one.npz").code == 0
    two_ranks_on_two_disks(tmp_path, "sample", file, "--seeds", "0-2499", "--out", "two.npz")        # three parts
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "0/two.npz")
    assert all((one[k] == two[k]).all() for k in ("arr_0", "arr_1")) and one.files == two.files
    assert not list((tmp_path / "0").glob("*.parts")) and not list((tmp_path / "1").glob("*.parts"))
    alone = json.loads(run("fid", file, "--n", 200, "--features", "pixels").out.splitlines()[-1])
    for _ in range(2):                                     # the second time with kept reference statistics
        out = two_ranks_on_two_disks(tmp_path, "fid", file, "--seeds", "0-199", "--features", "pixels")
        found = json.loads(out.splitlines()[-1])
        assert found["n"] == 200 and found["fd"] == pytest.approx(alone["fd"], rel=1e-8)     # summed in another order


def test_a_part_that_disappeared_is_explained(run, chain, tmp_path, monkeypatch):
    import sample
    monkeypatch.chdir(chain)
    draw_parts = sample.draw_parts
    def and_lose_one(*args):
        parts = draw_parts(*args)
        parts[0].unlink()
        return parts
    monkeypatch.setattr(sample, "draw_parts", and_lose_one)
    done = run("sample", "runs/digits/midtrain_cm.safetensors:1", "--n", 8, "--out", tmp_path / "a.npz")
    refused(done, "running elsewhere")


# --- docs/train.slurm ---------------------------------------------------------------------------------------

def test_the_slurm_script_saves_and_is_queued_again(chain, tmp_path):
    """SLURM's commands are stubs. The script gets SIGUSR1, as three minutes before the time limit: the stage saves,
    the job is queued again, and the second run of the script finishes the stage. srun kills what it has started
    when it gets SIGTERM."""
    (tmp_path / "runs").symlink_to(chain / "runs")
    (tmp_path / "bin").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    stubs = {"srun": '"$@" & echo $! > step; trap "kill -KILL $!" TERM; wait $!',
             "scancel": 'if [ "$1 $2" = "--signal=TERM $SLURM_JOB_ID" ]; then kill -TERM $(cat step); fi',
             "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
             "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> requeued; fi'}
    for name, line in stubs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "SLURM_NNODES": "1",
                        "SLURM_JOB_ID": str(free_port() - 20000), "SLURM_JOB_NODELIST": "here"}
    command = ["bash", ROOT / "docs/train.slurm", ROOT / "midtrain.py", "--steps", "300", "--batch", "8",
               "--nfe", "4", "--no-preview", "--log-every", "5", "--out", "a.safetensors"]
    job = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    for line in job.stdout:
        if line.startswith("step      20/"): break
    job.send_signal(signal.SIGUSR1)
    assert "ends after step" in job.stdout.read() and job.wait(60) != 0
    assert (tmp_path / "requeued").read_text() == f"requeue {env['SLURM_JOB_ID']}\n"
    assert 20 <= model.read(tmp_path / "a.safetensors")[1]["step"] < 300
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "continuing" in done.stdout, done.stderr
    assert model.read(tmp_path / "a.safetensors")[1]["step"] == 300
    assert (tmp_path / "requeued").read_text().count("\n") == 1
