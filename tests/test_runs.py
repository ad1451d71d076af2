"""The command lines: the whole chain, one's own data, resuming, two ranks, and every refusal."""
import hashlib, importlib, json, os, sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing

import midtrain, model, pretrain, solve
from conftest import ROOT, free_port, one_process_a_gpu, refused, relerr, write_npz

SMALL = "--steps", 4, "--batch", 8, "--save-every", 2, "--log-every", 2, "--no-preview"
# what each stage's file is called, and its command line
STAGES = {"pretrain": ["pretrain"], "midtrain_cm": ["midtrain"], "posttrain_cm": ["posttrain_cm"],
          "pretrain_flow": ["pretrain", "--objective", "flow"], "midtrain_mf": ["midtrain", "--branch", "mf"],
          "posttrain_mf": ["posttrain_mf"]}


def digest(folder):
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
            for f in sorted(folder.rglob("*")) if f.is_file()}


def test_chain_writes_what_the_next_stage_needs(chain):
    assert STAGES.keys() == model.KIND.keys()
    for stage in STAGES:
        net, header = model.load(chain / f"runs/digits/{stage}.safetensors")
        assert header["stage"] == stage and header["data"] == "digits" and header["kind"] == model.KIND[stage]
        assert header["step"] == header["steps"] == 4
        assert header[header["unit"]] == 32 and header["settings"]["batch"] == 8
    assert (chain / "runs/digits/trajectories.png").exists()
    tensors, made = model.read(chain / "runs/digits/trajectories.safetensors")
    assert {k: (tuple(v.shape), v.dtype) for k, v in tensors.items()} == {
        "states": ((8, 9, 1, 8, 8), torch.float32), "times": ((9,), torch.float64),
        "labels": ((8,), torch.int64)}


def test_mid_training_starts_from_the_teacher(run, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(chain)
    assert run("midtrain", *SMALL, "--lr", 1e-12, "--out", tmp_path / "a.safetensors").code == 0
    teacher = model.read("runs/digits/pretrain.safetensors")[0]
    student = model.read(tmp_path / "a.safetensors")[0]
    assert all(torch.allclose(teacher[k], student[k], atol=1e-6) for k in teacher)
    assert run("midtrain", *SMALL, "--lr", 1e-12, "--init", "none",
               "--out", tmp_path / "b.safetensors").code == 0
    scratch = model.read(tmp_path / "b.safetensors")[0]
    assert not torch.allclose(teacher["net.map_layer0.weight"], scratch["net.map_layer0.weight"], atol=1e-3)


@pytest.mark.parametrize("channels, classes", [(3, 4), (1, 0)])
def test_custom_data_end_to_end(run, tmp_path, monkeypatch, channels, classes):
    """Any ADM-layout npz, from elsewhere, every path by default."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    data = write_npz(tmp_path / "elsewhere/photos.npz", size=12, channels=channels, classes=classes)
    for script, *flags in STAGES.values():
        done = run(script, *flags, "--data", data, *SMALL, *(["--nfe", 4] if script == "midtrain" else []))
        assert done.code == 0, done.err
    files = [f"runs/photos/{stage}.safetensors:2" for stage in STAGES]
    done = run("sample", *files, "--n", 4, "--real", "--data", data)
    assert done.code == 0, done.err
    assert (tmp_path / "runs/photos/samples.png").exists()
    done = run("fid", "runs/photos/midtrain_cm.safetensors:1", "--ref", data, "--n", 8,
               "--features", "pixels")
    assert done.code == 0 and json.loads(done.out.splitlines()[-1])["n_ref"] == 24


@pytest.mark.parametrize("stage", STAGES)
def test_interrupted_run_continues_bit_for_bit(run, chain, tmp_path, monkeypatch, stage):
    monkeypatch.chdir(chain)
    monkeypatch.setattr(midtrain, "pool_size", lambda batch, N: 4)      # 2 steps a pool: cut inside a pool
    script, *flags = STAGES[stage]
    args = [*flags, "--steps", 6, "--batch", 8, "--save-every", 3, "--no-preview"]
    args += ["--dropout", 0.3]                                          # draws from every step's RNG
    if script == "midtrain": args += ["--nfe", 8 if stage == "midtrain_mf" else 4]           # 4 pairs each
    whole, cut, save_run = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors", model.save_run
    assert run(script, *args, "--out", whole).code == 0

    def save_and_die(*a):
        save_run(*a)
        raise model.UserError("the power went out")
    monkeypatch.setattr(model, "save_run", save_and_die)
    assert run(script, *args, "--out", cut, "--keep").code == 2
    monkeypatch.setattr(model, "save_run", save_run)
    assert model.read(cut)[1]["step"] == 3
    assert "continuing" in run(script, *args, "--out", cut, "--keep").out
    for step in (3, 6): assert model.read(model.beside(cut, f"-{step:06d}.safetensors"))[1]["step"] == step
    for name in ("whole", "cut"): assert model.read(tmp_path / f"{name}.safetensors")[1]["step"] == 6
    for suffix in (".safetensors", ".resume.safetensors"):
        a, b = (model.read(tmp_path / (name + suffix))[0] for name in ("whole", "cut"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    before = digest(tmp_path)
    assert "is finished" in run(script, *args, "--out", cut).out and digest(tmp_path) == before
    other = run(script, *args, "--out", cut, "--lr", 0.5)
    assert other.code == 2 and "lr was" in other.err and digest(tmp_path) == before


def test_killed_between_the_two_files(run, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(chain)
    out = tmp_path / "a.safetensors"
    assert run("midtrain", *SMALL, "--out", out).code == 0
    finished = model.read(out)
    model.save(out, {k: 0 * v for k, v in finished[0].items()}, finished[1] | {"step": 2})   # the older save
    assert run("midtrain", *SMALL, "--out", out).code == 0
    assert model.read(out)[1]["step"] == 4
    assert all(torch.equal(v, finished[0][k]) for k, v in model.read(out)[0].items())


def test_equal_content_makes_equal_files(chain, tmp_path):
    """A lost file that its run writes again is the one the next stage knows by its sha256."""
    out, sums = tmp_path / "a.safetensors", set()
    for _ in range(4):
        model.save(out, *model.read(chain / "runs/digits/midtrain_cm.safetensors"))
        sums.add(model.sha256(out))
    assert len(sums) == 1


def test_student_starts_from_the_teacher_that_is_named(run, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher, out = chain / "runs/digits/pretrain.safetensors", tmp_path / "a.safetensors"
    assert run("midtrain", *SMALL, "--teacher", teacher, "--out", out).code == 0
    settings = model.read(out)[1]["settings"]
    assert settings["sha256 of init"] == settings["sha256 of teacher"] == model.sha256(teacher)


def test_another_teacher_is_noticed(run, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(chain)
    tensors, header = model.read("runs/digits/pretrain.safetensors")
    teacher, out = tmp_path / "teacher.safetensors", tmp_path / "a.safetensors"
    for scale, code in [(1.0, 0), (1.1, 2)]:
        model.save(teacher, {k: scale * v for k, v in tensors.items()}, header)
        done = run("midtrain", *SMALL, "--teacher", teacher, "--init", teacher, "--out", out)
        assert done.code == code
    assert "the teacher file is another" in done.err


# --- refusals: one sentence, exit code 2, nothing on disk touched -------------------------------------------

@pytest.mark.parametrize("script, words", [
    ("pretrain", ["data/digits.npz"]),
    ("solve", ["runs/digits/pretrain.safetensors", "python pretrain.py --data digits"]),
    ("midtrain", ["runs/digits/pretrain.safetensors", "python pretrain.py --data digits"]),
    ("posttrain_cm", ["data/digits.npz"])])
def test_missing_predecessor(run, tmp_path, monkeypatch, script, words):
    monkeypatch.chdir(tmp_path)
    refused(run(script), *words)
    assert not list(tmp_path.iterdir())


def test_missing_teacher_names_the_public_file(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for script in "solve", "midtrain":
        refused(run(script, "--data", "cifar10"),
                "tools/import_checkpoint.py edm-cifar10-32x32-uncond-vp.pkl --data cifar10")
    refused(run("midtrain", "--data", "imagenet256", "--branch", "mf"), "posttrain_mf.py", "teacher_mf")


def test_missing_mid_training_names_its_command(run, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    refused(run("posttrain_cm"), "runs/digits/midtrain_cm.safetensors", "python midtrain.py --data digits")


def test_bad_files(run, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(chain)
    good = Path("runs/digits/pretrain.safetensors").read_bytes()
    tensors, header = model.read("runs/digits/pretrain.safetensors")
    bad = tmp_path / "bad.safetensors"
    before = digest(chain)
    for content in (good[:len(good) // 2], good[:4], b"", b"PK\x03\x04 not this", good[:8] + b"x" + good[9:]):
        bad.write_bytes(content)
        refused(run("midtrain", *SMALL, "--teacher", bad, "--init", bad,
                    "--out", tmp_path / "out.safetensors"), "damaged")
        refused(run("sample", bad), "damaged")
    model.save(bad, {k: v for k, v in list(tensors.items())[1:]}, header)
    refused(run("sample", bad), "do not fit")
    model.save(bad, tensors, {"stage": "pretrain"})
    refused(run("sample", bad), "is not a model")
    refused(run("midtrain", "--teacher", "runs/digits/midtrain_cm.safetensors"),
            "stage midtrain_cm", "pretrain")
    refused(run("sample", "runs/digits/midtrain_cm.resume.safetensors"), "the state of a run")
    for out in (tmp_path / "plain", bad / "a.safetensors"):
        refused(run("midtrain", "--out", out), "--out", "in a folder that can be written")
    refused(run("midtrain", "--trajectories", "runs/digits/pretrain.safetensors",
                "--out", tmp_path / "out.safetensors"), "trajectories")
    assert digest(chain) == before and not (tmp_path / "out.safetensors").exists()


def test_unfinished_teacher_warns(run, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(chain)
    tensors, header = model.read("runs/digits/pretrain.safetensors")
    model.save(tmp_path / "half.safetensors", tensors, header | {"step": 2})
    done = run("midtrain", *SMALL, "--teacher", tmp_path / "half.safetensors",
               "--out", tmp_path / "out.safetensors")
    assert done.code == 0 and "is from step 2 of 4" in done.out



def test_images_that_do_not_fit_the_weights(run, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(chain)
    rgb = write_npz(tmp_path / "rgb.npz")
    refused(run("posttrain_cm", "--data", rgb, "--init", "runs/digits/midtrain_cm.safetensors", *SMALL),
            "1x8x8", "3x8x8")


def test_indivisible_batch(run, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(chain)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for script, *flags in STAGES.values():
        refused(run(script, *flags, "--batch", 8, "--out", tmp_path / "a.safetensors"),
                "--batch 8", "3 processes", "multiple of 3")
    monkeypatch.setenv("WORLD_SIZE", "1")
    refused(run("posttrain_mf", "--batch", 6), "--batch 6", "multiple of 4")
    refused(run("posttrain_mf", "--derivative", "difference", "--precision", "bf16"), "bf16", "fp32")


def test_solver_and_teacher_have_to_match(run, chain, monkeypatch):
    monkeypatch.chdir(chain)
    flow, mf = "runs/digits/pretrain_flow.safetensors", "runs/digits/midtrain_mf.safetensors"
    refused(run("solve", "--solver", "jump"), "does not fit", "dpm3")
    refused(run("solve", "--teacher", flow, "--solver", "jump"), "t - r", "heun")
    mid = "midtrain", "--branch", "mf"
    refused(run(*mid, "--teacher", mf, "--solver", "dpm2"), "does not fit", "jump")
    refused(run(*mid, "--distance", "huber"), "--branch cm")
    refused(run(*mid, "--teacher", "runs/digits/midtrain_cm.safetensors"), "midtrain_cm")
    refused(run(*mid, "--init", "runs/digits/pretrain.safetensors"), "stage pretrain,", "pretrain_flow or")
    refused(run("midtrain", "--teacher", flow), "pretrain_flow", "has to be a pretrain file")
    refused(run("posttrain_cm", "--init", mf), "stage midtrain_mf", "posttrain_cm file")
    refused(run("posttrain_mf", "--velocity", "teacher", "--teacher", mf), "has to be a pretrain_flow file")


def test_any_trajectory_teaches_a_mean_flow_model(run, chain, tmp_path, monkeypatch):
    """A denoiser and a few-step Mean Flow model as teachers, a student from scratch; a file."""
    monkeypatch.chdir(chain)
    edm, mf = "runs/digits/pretrain.safetensors", "runs/digits/posttrain_mf.safetensors"
    def mid(name, *flags):
        out = tmp_path / f"{name}.safetensors"
        done = run("midtrain", "--branch", "mf", "--init", "none", *SMALL, "--out", out, *flags)
        assert done.code == 0, done.err
        return out, model.read(out)[1]
    out, header = mid("edm", "--teacher", edm)
    assert header["t_max"] == 80 / 81 and header["t_min"] == 0.002 / 1.002 and header["network"]["interval"]
    assert run("sample", f"{out}:3", "--n", 4, "--out", tmp_path / "a.npz").code == 0
    assert mid("jumps", "--teacher", mf, "--nfe", 8)[1]["settings"]["solver"] == "jump"
    again = mid("again", "--teacher", out, "--solver", "jump", "--nfe", 4)[1]      # ends where its teacher does
    assert again["t_max"] == 80 / 81 and again["t_min"] == 0.002 / 1.002
    mid("file", "--teacher", edm, "--trajectories", "runs/digits/trajectories.safetensors")


def test_stored_trajectories_have_null_labels(run, chain, tmp_path, monkeypatch):
    """As many as in pre-training, 10 % of the digits: else guidance would use a label that mid-training never
    saw. By chance there are none of 200 once in 10^9 runs, and one of 10,000 labels is off by 1.5 % once in 10^6."""
    monkeypatch.chdir(chain)
    monkeypatch.setattr(solve, "error_table", lambda *_: None)         # takes half a minute
    assert run("solve", "--n", 200, "--nfe", 2, "--out", tmp_path / "t.safetensors").code == 0
    labels = model.read(tmp_path / "t.safetensors")[0]["labels"]
    assert (labels == 10).any() and len(labels.unique()) == 11
    y = torch.arange(10).repeat(1000)
    dropped = model.drop_labels(y, model.read("runs/digits/pretrain.safetensors")[1])
    assert abs((dropped == 10).double().mean() - 0.1) < 0.015 and torch.equal(dropped[dropped != 10], y[dropped != 10])


def test_post_training_variants(run, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(chain)
    flow = "runs/digits/pretrain_flow.safetensors"
    for i, flags in enumerate([("--velocity", "teacher"), ("--derivative", "difference"),
                               ("--omega", 0.5, "--kappa", 0.3), ("--init", flow), ("--init", "none")]):
        done = run("posttrain_mf", *SMALL, *flags, "--out", tmp_path / f"{i}.safetensors")
        assert done.code == 0, done.err
        assert model.read(tmp_path / f"{i}.safetensors")[1]["network"]["interval"]


def test_consistency_distillation_and_guidance(run, chain, tmp_path, monkeypatch):
    """ECD, guided trajectories and the guided teacher itself, by its null label or by another model."""
    monkeypatch.chdir(chain)
    teacher = "runs/digits/pretrain.safetensors"
    out = lambda name: ("--out", tmp_path / f"{name}.safetensors")
    assert run("pretrain", *SMALL, "--seed", 1, *out("guide")).code == 0
    guide = "--guide", tmp_path / "guide.safetensors"
    for i, flags in enumerate([(), ("--solver", "euler"), ("--guidance", 2), ("--guidance", 2, *guide)]):
        done = run("posttrain_cm", "--loss", "ecd", *SMALL, *flags, *out(f"ecd{i}"))
        assert done.code == 0, done.err
        assert len(model.read(tmp_path / f"ecd{i}.safetensors")[1]["settings"]["sha256 of teacher"]) == 64
    images = []
    for i, flags in enumerate([(), ("--guidance", 1), ("--guidance", 2), ("--guidance", 2, *guide)]):
        assert run("midtrain", *SMALL, *flags, *out(f"mid{i}")).code == 0
        done = run("sample", f"{teacher}:4", *flags, "--n", 8, "--out", tmp_path / f"{i}.npz")
        assert done.code == 0, done.err
        images.append(np.load(tmp_path / f"{i}.npz")["arr_0"])
    weights = [model.read(tmp_path / f"mid{i}.safetensors")[0]["net.map_layer0.weight"] for i in range(4)]
    for a in (images, [w.numpy() for w in weights]):
        assert np.array_equal(a[0], a[1])
        assert not np.array_equal(a[0], a[2]) and not np.array_equal(a[2], a[3])
    refused(run("sample", "runs/digits/midtrain_cm.safetensors", "--guidance", 2),
            "--guidance has no effect", "no ODE")
    refused(run("midtrain", "--guidance", 2, "--guide", "nowhere.safetensors"), "nowhere", "pre-train")
    flow = "runs/digits/pretrain_flow.safetensors"
    refused(run("midtrain", "--guidance", 2, "--guide", flow), "MeanVelocity", "stage pretrain")
    rgb = write_npz(tmp_path / "rgb.npz", classes=0)
    assert run("pretrain", "--data", rgb, *SMALL, *out("rgb")).code == 0
    refused(run("midtrain", "--data", rgb, "--teacher", tmp_path / "rgb.safetensors", "--guidance", 2),
            "--guide")


def test_pairing_of_the_papers_ablation(run, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(chain)
    solved, times, solve_pool, gather_pairs = [], [], midtrain.solve_pool, midtrain.gather_pairs
    def counted(teacher, header, count, *args):
        solved.append(count)
        return solve_pool(teacher, header, count, *args)
    def watched(*args):
        pairs = gather_pairs(*args)
        times.append(pairs[1])
        return pairs
    monkeypatch.setattr(midtrain, "solve_pool", counted)
    monkeypatch.setattr(midtrain, "gather_pairs", watched)
    monkeypatch.setattr(midtrain, "pool_size", lambda batch, pairs: 8)
    for branch, start in ("cm", 80), ("mf", 1):
        for pairing, trajectories in [("cmt", 8), ("kd", 32), ("slow", 32)]:       # 4 steps of 8 pairs, pools of 8
            solved.clear(), times.clear()
            nfe = 8 if branch == "cm" else 16                                      # Heun: two calls a step
            done = run("midtrain", "--branch", branch, "--pairing", pairing, "--nfe", nfe, *SMALL,
                       "--out", tmp_path / f"{branch}-{pairing}.safetensors")
            assert done.code == 0 and sum(solved) == trajectories, (done.err, solved)
            assert (torch.cat(times) == start).all() == (pairing == "kd")          # kd: only from the noise
    refused(run("midtrain", "--pairing", "slow", "--trajectories", "x"), "--pairing slow")


def test_bad_sampling_arguments(run, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(chain)
    file, out = "runs/digits/midtrain_cm.safetensors", ("--out", tmp_path / "a.npz")
    for mid in ("0.5,0.8", "0.5,0.5", "90,1", "1"):
        refused(run("sample", f"{file}:3", "--mid-t", mid, *out), "--mid-t")
    for labels in ("foo", "10", "-1"): refused(run("sample", file, f"--labels={labels}", *out), "--labels")
    refused(run("sample", f"{file}:0", *out), "at least one step")
    np.savez(tmp_path / "three.npz", arr_0=np.zeros((3, 8, 8, 1), np.uint8), arr_1=np.arange(3))
    refused(run("sample", file, "--real", "--data", tmp_path / "three.npz", *out), "no images of some")
    refused(run("fid", tmp_path / "three.npz", "--features", "pixels"), "--ref is missing")


def test_teacher_and_student_have_to_agree(run, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(chain)
    out = "--out", tmp_path / "a.safetensors"
    rgb = write_npz(tmp_path / "rgb.npz")
    assert run("pretrain", "--data", rgb, *SMALL, "--out", tmp_path / "rgb.safetensors").code == 0
    for flags, words in [(("--init", tmp_path / "rgb.safetensors"), ["3x8x8", "1x8x8", "agree"]),
                         (("--trajectories", "nowhere.safetensors"), ["nowhere.safetensors", "not exist"])]:
        refused(run("midtrain", *flags, *SMALL, *out), *words)


def test_unwritable_directory_keeps_what_was_there(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(model.UserError, match="could not be written"):
        model.save(tmp_path / "file" / "a.safetensors", {"x": torch.zeros(1)}, {})
    assert (tmp_path / "file").read_text() == "kept"


# --- several processes --------------------------------------------------------------------------------------

def small_net():
    torch.manual_seed(0)
    net = model.Denoiser(model.DDPMpp(8, 1, 3, 8, (1, 2), 1, (4,)))
    for p in net.parameters(): p.data += 0.05 * torch.randn_like(p)
    return net


def losses(net, part):
    """The three training losses on `part` of one fixed batch of 8."""
    import posttrain_cm
    g = torch.Generator().manual_seed(1)
    x, eps = torch.randn(2, 8, 1, 8, 8, generator=g)[:, part].double()       # ECT's is a small difference
    t, y = (torch.rand(8, generator=g) + 0.5)[part].double(), (torch.arange(8) % 4)[part]
    yield pretrain.edm_loss(net, x, eps, t, y)
    yield midtrain.cmt_loss(net, x + t[:, None, None, None] * eps, t, x, y, midtrain.huber)
    yield posttrain_cm.ect_loss(net, x, eps, t, 0.9 * t, y, 1 / t, 0.0)


def meanflow_step(ddp, net, part):
    """posttrain_mf.py's loss on `part` of a fixed batch of 8, of which rows 0, 1, 4 and 5 have r < t."""
    import posttrain_mf
    g = torch.Generator().manual_seed(1)
    z, v = torch.randn(2, 8, 1, 8, 8, generator=g).double()[:, part]
    r, t = torch.rand(2, 8, generator=g).double().sort(dim=0).values
    jumps = torch.tensor([1, 1, 0, 0, 1, 1, 0, 0], dtype=torch.bool)
    r, t, y, jumps = torch.where(jumps, r, t)[part], t[part], (torch.arange(8) % 4)[part], jumps[part]
    dudt = posttrain_mf.derivative_jvp(net, *(a[jumps] for a in (z, r, t, y, v)))
    return torch.cat([posttrain_mf.meanflow_loss(ddp, *(a[jumps] for a in (z, r, t, y, v)), dudt),
                      posttrain_mf.meanflow_loss(ddp, *(a[~jumps] for a in (z, r, t, y, v)), 0)]).mean()


def meanflow_gradients(world, part, steps=5):
    """Five steps of plain descent in float64 -> the gradients of each."""
    torch.manual_seed(0)
    net = model.MeanVelocity(model.DDPMpp(8, 1, 3, 8, (1, 2), 1, (4,), interval=True)).double()
    for p in net.parameters(): p.data += 0.05 * torch.randn_like(p)
    ddp, gradients = model.parallel(net, world), []
    for _ in range(steps):
        meanflow_step(ddp, net, part).backward()
        gradients.append({n: p.grad.clone() for n, p in net.named_parameters()})
        with torch.no_grad():
            for p in net.parameters(): p -= 0.1 * p.grad
        net.zero_grad()
    return gradients


def rank_main(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    world, batch = model.setup(8)[1], 4
    ddp = model.parallel(small_net().double(), world)
    for k in range(3):
        ddp.zero_grad()
        for i, loss in enumerate(losses(ddp, slice(rank * batch, (rank + 1) * batch))):
            if i == k: loss.mean().backward()
        torch.save({n: p.grad for n, p in ddp.module.named_parameters()}, f"{folder}/{k}-{rank}.pt")
    torch.save(meanflow_gradients(world, slice(rank * batch, (rank + 1) * batch)), f"{folder}/mf-{rank}.pt")
    torch.distributed.destroy_process_group()


@one_process_a_gpu
def test_two_ranks_average_to_one_process_on_the_global_batch(tmp_path):
    torch.multiprocessing.spawn(rank_main, (free_port(), str(tmp_path)), nprocs=2)
    for k in range(3):
        net = small_net().double()
        for i, loss in enumerate(losses(net, slice(0, 8))):
            if i == k: loss.mean().backward()
        one, two = (torch.load(tmp_path / f"{k}-{rank}.pt") for rank in (0, 1))
        for name, p in net.named_parameters():
            assert torch.equal(one[name], two[name])
            assert p.grad.abs().max() == 0 or relerr(one[name], p.grad) < 1e-9, (k, name)
    one, two = (torch.load(tmp_path / f"mf-{rank}.pt") for rank in (0, 1))
    for k, alone in enumerate(meanflow_gradients(1, slice(0, 8))):
        for name, grad in alone.items():
            assert torch.equal(one[k][name], two[k][name])
            assert grad.abs().max() > 0 and relerr(one[k][name], grad) < 1e-9, (k, name)


TINY = {"DDPMpp":   dict(model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,)),
        "EDM2UNet": dict(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,),
                         channels_per_head=16),
        "SiT":      dict(patch_size=2, hidden_size=16, depth=2, num_heads=2)}


STEPS = [("midtrain", "pretrain"), ("posttrain_cm", "pretrain"), ("posttrain_mf", "pretrain_flow")]


def one_step_of_everything(rank, ports, folder):
    """midtrain and both post-trainings, for each architecture, by their command lines."""
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for cls in TINY:
        for script, init in STEPS:
            os.environ["MASTER_PORT"] = str(ports.pop())
            sys.argv = [f"{script}.py", *SMALL, "--init", f"{cls}-{init}.safetensors",
                        "--out", f"{cls}-{script}.safetensors"]
            if script == "midtrain": sys.argv += ["--nfe", "4", "--teacher", f"{cls}-{init}.safetensors"]
            sys.argv = [str(word) for word in sys.argv]
            importlib.import_module(script).main()
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


@one_process_a_gpu
def test_each_architecture_takes_a_step_of_each_stage_on_two_ranks(tmp_path):
    (tmp_path / "data").symlink_to(ROOT / "data")
    for cls, network in TINY.items():
        for kind, stage in [("Denoiser", "pretrain"), ("MeanVelocity", "pretrain_flow")]:
            torch.manual_seed(0)
            row = model.DATASETS["digits"] | {"network": {"class": cls, **network}}
            header = model.fresh_header(row, kind) | {"stage": stage, "step": 0, "steps": 0}
            net = model.build(header)
            for p in net.parameters(): p.data += 0.05 * torch.randn_like(p)
            model.save(tmp_path / f"{cls}-{stage}.safetensors", net.state_dict(), header)
    ports = [free_port() for _ in range(9)]
    torch.multiprocessing.spawn(one_step_of_everything, (ports, str(tmp_path)), nprocs=2)
    for cls in TINY:
        for script, init in STEPS:
            before = model.read(tmp_path / f"{cls}-{init}.safetensors")[0]
            net, header = model.load(tmp_path / f"{cls}-{script}.safetensors")
            assert header["step"] == 4 and all(v.isfinite().all() for v in net.state_dict().values())
            still = [k for k, p in net.named_parameters() if k in before and torch.equal(p, before[k])]
            assert not still, (cls, script, still)


# --- runs that go wrong -------------------------------------------------------------------------------------

def test_bad_steps_are_skipped_and_ten_in_a_row_stop_the_run(run, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(chain)
    loss, calls = midtrain.cmt_loss, []
    def sometimes_nan(*args):
        calls.append(len(calls))
        return loss(*args) * (float("nan") if len(calls) in bad else 1)
    monkeypatch.setattr(midtrain, "cmt_loss", sometimes_nan)
    args = "--steps", 20, "--batch", 8, "--nfe", 4, "--save-every", 2, "--log-every", 1
    bad = {3, 4}
    done = run("midtrain", *args, "--out", tmp_path / "a.safetensors")
    assert done.code == 0 and "skipped 2" in done.out
    assert all(v.isfinite().all() for v in model.read(tmp_path / "a.resume.safetensors")[0].values())
    calls.clear()
    bad = range(5, 99)
    stopped = run("midtrain", *args, "--out", tmp_path / "b.safetensors")
    assert stopped.code == 3 and "10 steps in a row" in stopped.err and len(stopped.err.splitlines()) == 1
    assert all(v.isfinite().all() for v in model.read(tmp_path / "b.resume.safetensors")[0].values())


@pytest.mark.parametrize("growth, warnings", [(1, 0), (3, 2)])
def test_a_loss_that_grows_a_hundredfold_is_pointed_out_then_and_at_the_end(run, chain, tmp_path, monkeypatch,
                                                                            growth, warnings):
    monkeypatch.chdir(chain)
    loss, calls = midtrain.cmt_loss, []
    def growing(*args):
        calls.append(len(calls))
        return loss(*args) * growth ** len(calls)
    monkeypatch.setattr(midtrain, "cmt_loss", growing)
    done = run("midtrain", "--steps", 10, "--batch", 8, "--nfe", 4, "--lr", 1e-9, "--log-every", 1,
               "--out", tmp_path / "a.safetensors")
    assert done.code == 0 and done.out.count("probably diverged") == warnings, done.out
