"""What a training step of the scripts does with their flags. A run that ignores one still ends with exit code 0."""
import json, math, os, signal
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import model, posttrain_cm, pretrain
from tools import dry_run
from conftest import write_npz
from test_runs import STAGES

INITS = {"midtrain_cm": "pretrain", "posttrain_cm": "midtrain_cm", "midtrain_mf": "pretrain_flow",
         "posttrain_mf": "midtrain_mf"}


@pytest.fixture
def train(run, chain, tmp_path, monkeypatch):
    """train(stage, flags, name) runs a stage for one step of 8, or as the flags say -> path of its result"""
    monkeypatch.chdir(chain)
    def call(stage, *flags, name="a"):
        out = tmp_path / f"{name}.safetensors"
        nfe = ["--nfe", 4] if stage.startswith("midtrain") else []
        done = run(*STAGES[stage], *nfe, "--steps", 1, "--batch", 8, *flags, "--no-preview", "--out", out)
        assert done.code == 0, done.err
        return out
    return call


def read_state(out):
    return {k[4:]: v for k, v in model.read(model.resume_file(out))[0].items() if k.startswith("net.")}


@pytest.mark.parametrize("ema, decay", [(0.99, 0.1), (0.05, 0.05)])     # min(ema, (1 + k) / (10 + k)) at k = 0
@pytest.mark.parametrize("stage", INITS)
def test_learning_rate_and_ema_of_a_step(train, stage, ema, decay):
    out = train(stage, "--optimizer", "Adam", "--lr", 1e-3, "--warmup", 80, "--ema", ema)
    before = model.read(f"runs/digits/{INITS[stage]}.safetensors")[0]
    after, saved = read_state(out), model.read(out)[0]
    for k, a in before.items():
        assert torch.allclose(saved[k], decay * a + (1 - decay) * after[k], atol=1e-6), k
    # Adam's first step moves a weight by the learning rate: 1e-3 * 8 / 80
    assert 0.9e-4 < max((after[k] - a).abs().max() for k, a in before.items()) < 1.01e-4


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_train_on_different_samples(train, monkeypatch, stage):
    seen = []
    monkeypatch.setattr(model, "microbatches", lambda net, size, *tensors: seen.append(tensors) or [tensors])
    for rank in 0, 1:
        monkeypatch.setattr(model, "setup", lambda *a, rank=rank: (rank, 1, torch.device("cpu"), 8))
        train(stage, "--batch", 16, name=rank)
    for a, b in zip(*seen):
        if a.dim() == 4: assert not {x.numpy().tobytes() for x in a} & {x.numpy().tobytes() for x in b}


def test_edm_loss_of_simple_denoisers():
    x0, eps, t = torch.full((2, 1, 2, 2), 3.0), torch.full((2, 1, 2, 2), 2.0), torch.tensor([0.5, 2.0])
    weight = torch.tensor([8.0, 4.25])                     # (t^2 + s^2) / (t s)^2, s = 0.5
    assert torch.allclose(pretrain.edm_loss(lambda x, t, y: 0 * x, x0, eps, t, None), 36 * weight)
    assert torch.allclose(pretrain.edm_loss(lambda x, t, y: x, x0, eps, t, None), 16 * t ** 2 * weight)


@pytest.mark.parametrize("words, precision", [
    ("midtrain --data cifar10", "bf16"), ("posttrain_mf --data cifar10", "bf16"),
    ("posttrain_cm --data cifar10", "fp32"),
    ("posttrain_cm --data imagenet512", "tf32"), ("posttrain_mf --data cifar10 --derivative difference", "fp32")])
def test_precision_on_a_gpu(run, tmp_path, monkeypatch, words, precision):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run, "cost", lambda *a: (1, 1, 1))         # seconds, for a large network
    done = run(*words.split(), "--dry-run")
    assert ["precision", precision] in [line.split() for line in done.out.splitlines()], done.out


def test_tf32_only_where_it_is_asked_for():
    for precision in "tf32", "bf16", "fp32":
        model.setup(8, precision)
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")


@pytest.mark.parametrize("stage, flags", [
    *((stage, ()) for stage in STAGES), ("posttrain_mf", ("--velocity", "teacher")), ("posttrain_cm", ("--loss", "ecd"))])
def test_all_backbones_run_in_the_precision_that_is_asked_for(train, monkeypatch, stage, flags):
    seen, forward = set(), model.DDPMpp.forward
    monkeypatch.setattr(model, "check_finite", lambda *a: None)        # the EMA is fp32
    monkeypatch.setattr(model.DDPMpp, "forward",
                        lambda self, x, t, *a: seen.add((x.dtype, t.dtype)) or forward(self, x, t, *a))
    train(stage, "--precision", "bf16", *flags)
    assert seen == {(torch.bfloat16, torch.float32)}


def test_gap_weight_and_times_of_ect(train, monkeypatch):
    seen, loss = [], posttrain_cm.ect_loss
    monkeypatch.setattr(posttrain_cm, "ect_loss", lambda *a: seen.append(a) or loss(*a))
    train("posttrain_cm", "--steps", 5, "--q", 4, "--double", 2, "--weight", "denoising", "--c", 0.3,
          "--P-mean", -0.5, "--P-std", 1e-9)
    t = math.exp(-0.5)
    n = 1 + 8 / (1 + math.exp(t))
    for (_, _, _, times, r, _, weight, c), k in zip(seen, (0, 0, 1, 1, 2), strict=True):
        assert times[0].item() == pytest.approx(t, rel=1e-5)
        assert r[0].item() == pytest.approx(t * (1 - n / 4 ** (k + 1)), rel=1e-4)
        assert weight[0].item() == pytest.approx((t ** 2 + 0.25) / (t * 0.5) ** 2, rel=1e-4) and c == 0.3


@pytest.mark.parametrize("stage, t", [("pretrain", math.exp(-0.5)), ("pretrain_flow", 1 / (1 + math.exp(0.5))),
                                      ("posttrain_mf", 1 / (1 + math.exp(0.5)))])
def test_times_of_training(train, monkeypatch, stage, t):
    seen, microbatches = [], model.microbatches
    monkeypatch.setattr(model, "microbatches", lambda *a: seen.append(a[4]) or microbatches(*a))
    train(stage, "--P-mean", -0.5, "--P-std", 1e-9)
    assert torch.allclose(seen[0].cpu(), torch.full((8,), t), rtol=1e-5)


@pytest.mark.parametrize("stage, variants", [
    ("pretrain", [["--dropout", 0.5]]), ("pretrain_flow", [["--dropout", 0.5]]),
    ("midtrain_cm", [["--dropout", 0.5], ["--distance", "l2"], ["--solver", "heun"], ["--pairing", "kd"],
                     ["--guidance", 2]]),
    ("midtrain_mf", [["--dropout", 0.5], ["--solver", "euler"]]),
    ("posttrain_cm", [["--dropout", 0.5], ["--loss", "ecd"], ["--loss", "ecd", "--solver", "euler"],
                      ["--loss", "ecd", "--guidance", 2]]),
    ("posttrain_mf", [["--dropout", 0.5], ["--velocity", "teacher"], ["--omega", 0.5], ["--omega", 0.5, "--kappa", 0.3],
                      ["--p", 1], ["--r-neq-t", 0.75], ["--derivative", "difference"]])])
def test_every_variant_trains_other_weights(train, stage, variants):
    files = [train(stage, "--optimizer", "Adam", *flags, name=i) for i, flags in enumerate([[], *variants])]
    weights = [read_state(file)["net.map_layer0.weight"] for file in files]
    for i, a in enumerate(weights):
        for j, b in enumerate(weights[:i]): assert not torch.equal(a, b), (([], *variants)[i], ([], *variants)[j])


@pytest.mark.slow
@pytest.mark.parametrize("stage, flags", [
    ("pretrain", []), ("midtrain_cm", ["--guidance", 2]), ("midtrain_mf", []),
    ("posttrain_cm", ["--loss", "ecd", "--guidance", 2]), ("posttrain_mf", ["--velocity", "teacher", "--omega", 0.5])])
def test_compiled_networks_train_the_same_weights(train, monkeypatch, stage, flags):
    """A compiled module lacks some of a module's methods, its truth value for example. torch's "eager" backend makes
    such modules without the minutes of a compiler."""
    monkeypatch.setattr(model, "compiled", lambda f, wanted: torch.compile(f, backend="eager") if wanted else f)
    torch._dynamo.reset()
    eager, fast = (read_state(train(stage, *flags, "--batch", 4, compile, name=compile))
                   for compile in ("--no-compile", "--compile"))
    for k, weight in eager.items(): assert torch.allclose(fast[k], weight, atol=1e-6), k


def test_forced_normalisation_after_a_step(run, tmp_path, monkeypatch):
    """EDM2's weights keep the magnitude 1, although Adam moves them by 0.1."""
    monkeypatch.chdir(tmp_path)
    data = write_npz("photos.npz", size=8)
    network = {"class": "EDM2UNet", "model_channels": 16, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": ()}
    monkeypatch.setattr(model, "custom_dataset", lambda shape, classes, latents=None: dict(
        shape=shape, classes=classes, label_dropout=0.0, noise_scale=1.0, time_scale=1.0, network=network))
    out, flags = tmp_path / "a.safetensors", ("--steps", 2, "--batch", 4, "--lr", 0.1, "--warmup", 0, "--no-preview")
    done = run("pretrain", "--data", data, *flags, "--out", out)
    assert done.code == 0, done.err
    after, layers = read_state(out), 0
    for name, layer in model.load(out)[0].named_modules():
        if isinstance(layer, model.MPConv):
            assert (after[f"{name}.weight"].flatten(1).square().mean(1).sqrt() - 1).abs().max() < 1e-3, name
            layers += 1
    assert layers > 5


def test_dropout_only_at_the_resolutions_that_are_named():
    net = model.EDM2UNet(32, 3, model_channels=16, channel_mult=(1, 1, 1), num_blocks=1, attn_resolutions=(),
                         dropout=0.4, dropout_resolutions=(16, 8))
    blocks = [(name, layer.dropout) for name, layer in [*net.enc.items(), *net.dec.items()]
              if isinstance(layer, model.MPBlock)]
    assert {name.split("x")[0]: dropout for name, dropout in blocks} == {"32": 0.0, "16": 0.4, "8": 0.4}


def test_a_save_every_ten_minutes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(model.time, "monotonic", lambda: now[0])
    timer = model.SaveTimer(SimpleNamespace(save_every=None))
    assert not timer.due(1)
    now[0] = 601
    assert timer.due(2)
    now[0] = 1500                                          # the save took as long as this
    assert not timer.due(3)
    now[0] = 2102
    assert timer.due(4)


@pytest.mark.parametrize("sign, torchrun", [("SIGTERM", False), ("SIGINT", False), ("SIGHUP", False),
                                            ("SIGTERM", True)])
def test_a_signal_ends_a_run_after_the_step(run, chain, tmp_path, monkeypatch, sign, torchrun):
    monkeypatch.chdir(chain)
    if torchrun: monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    number, steps, update_ema, out = getattr(signal, sign), [], model.update_ema, tmp_path / "a.safetensors"
    def update_and_signal(*a, **k):
        update_ema(*a, **k)
        steps.append(1)
        if len(steps) == 3: os.kill(os.getpid(), number)
    monkeypatch.setattr(model, "update_ema", update_and_signal)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    try: done = run("posttrain_cm", "--steps", 8, "--batch", 8, "--no-preview", "--out", out)
    finally: signal.signal(signal.SIGHUP, before)
    assert done.code == (0 if torchrun else 128 + number) and model.read(out)[1]["step"] == 3, done.err


def test_out_has_to_be_on_a_common_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    def gather(found, mine): found[:] = [mine, (not mine[0], mine[1])]
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(model.UserError, match="disk all share"): model.check_ranks(tmp_path / "a", {"settings": {}})
    vgg, nothing = {"sha256 of vgg": "5"}, {}              # one of the two started without --distance lpips
    for settings_of_ranks in [vgg, nothing], [nothing, vgg]:
        def gather_both(found, mine): found[:] = [(False, settings) for settings in settings_of_ranks]
        monkeypatch.setattr(dist, "all_gather_object", gather_both)
        with pytest.raises(model.UserError, match="differ in sha256 of vgg"):
            model.check_ranks(tmp_path / "a", {"settings": vgg})


def test_the_log_has_means_over_ranks_and_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda x: x.mul_(2))       # both ranks have the same losses
    args = SimpleNamespace(out=str(tmp_path / "a.safetensors"), steps=9, batch=8, log_every=9, compile=False)
    log = model.Log(args, "images", 2, 2)
    for step, loss in (3, 1.0), (4, 2.0), (5, 4.0): log(step, torch.tensor(loss), 1.0, 1e-4)      # lines at 3 and 5
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [1.0, 3.0]
