"""Networks against published ones, public checkpoints, and files that try to run something."""
import argparse, io, json, os, pickle, shlex, sys, types
from collections import OrderedDict
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import import_checkpoint, model, pretrain
from conftest import ROOT, refused, relerr, vector_weights, vectors

VECTORS = ROOT / "tests/vectors"


def public_file(folder, name):
    """A vector's weights as a .safetensors with the reference's names. -> path, tensors of the vector"""
    v, meta = vectors(name)
    path = folder / f"{name}.safetensors"
    save_file({k: w.contiguous() for k, w in vector_weights(name).items()}, path,
              metadata={"config": json.dumps(meta["config"])})
    return path, v


@pytest.mark.parametrize("name", ["edm_ddpmpp_uncond", "edm_ddpmpp_cond", "edm_ddpmpp_wide", "edm2"])
def test_imported_denoiser_reproduces_the_reference(tmp_path, name):
    path, v = public_file(tmp_path, name)
    D, header = import_checkpoint.import_checkpoint(path)
    D.eval()
    x, t = v["in/x"], v["in/sigma"]
    y = v["in/class_labels"].argmax(1) if "in/class_labels" in v else None
    with torch.no_grad():
        assert relerr(D(x, t, y), v["out64/D"]) < 5e-6
        assert relerr(D(x.double(), t.double(), y), v["out64/D"]) < 1e-9
        if y is not None: assert relerr(D(x.double(), t.double()), v["out64/D_nolabel"]) < 1e-9


@pytest.mark.parametrize("name", ["sit_meanflow", "sit_meanflow_h64"])
def test_imported_mean_flow_reproduces_the_reference(tmp_path, name):
    path, v = public_file(tmp_path, name)
    torch.save({"ema": {f"module.{k}": w for k, w in vector_weights(name).items()}, "epoch": 3,
                "args": argparse.Namespace(num_heads=4, lr=1e-4)}, tmp_path / "a.pt")
    for file in (path, tmp_path / "a.pt"):
        u, header = import_checkpoint.import_checkpoint(file)
        assert header["network"]["interval"] and header["label_dropout"] == 0.1
        with torch.no_grad(): out = u.eval()(v["in/z"], v["in/r"], v["in/t"], v["in/y"])
        assert relerr(out, v["out64/u"]) < 5e-6


def random_sit(factor=1, C=4, **network):
    """A SiT with `factor` times C output channels and weights that are not zero anywhere"""
    torch.manual_seed(0)
    network = dict(patch_size=2, hidden_size=32, depth=1, num_heads=4) | network
    sit = model.SiT(8, C, 10, **network)
    sit.final_layer["linear"] = model.Linear(network["hidden_size"], network["patch_size"] ** 2 * factor * C)
    for p in sit.parameters(): p.data += 0.05 * torch.randn_like(p)
    return sit


def velocity_agrees(u, expected):
    """u(z, t, t, y) against expected(z, t, y), for random arguments"""
    z, t, y = torch.randn(6, 4, 8, 8), torch.rand(6), torch.arange(6)
    with torch.no_grad():
        expected = expected(z, t, y)
        return expected.abs().max() > 0.1 and relerr(u(z, t, t, y), expected) < 1e-5


SIT = dict(model="SiT-XL/2", path_type="Linear", prediction="velocity", num_heads=4)
REPA = dict(model="SiT-XL/2", path_type="linear", prediction="v", enc_type="dinov2-vit-b", num_heads=4)


@pytest.mark.parametrize("factor, args, time, told", [
    (2, SIT, None, "data-at-1"), (1, REPA, None, "data-at-0"), (1, SIT, "data-at-0", "data-at-0"),
    (1, {"num_heads": 4}, "data-at-0", "data-at-0"), (1, {"num_heads": 4}, "data-at-1", "data-at-1"),
    (2, {"num_heads": 4}, "data-at-0", "data-at-0"), (2, {"num_heads": 4}, "data-at-1", "data-at-1")])
def test_velocity_models_of_either_time(tmp_path, capsys, factor, args, time, told):
    """SiT: v(z, t) = -SiT(z, 1 - t), first C of 2C channels. REPA: v(z, t) = SiT(z, t)."""
    sit = random_sit(factor)
    tensors = sit.state_dict() | {"projectors.0.0.weight": torch.zeros(5, 32)}     # REPA's, of its training
    torch.save({"ema": tensors, "args": argparse.Namespace(**args)}, tmp_path / "a.pt")
    u, header = import_checkpoint.import_checkpoint(tmp_path / "a.pt", time)
    assert told in capsys.readouterr().out and header["stage"] == "pretrain_flow"
    assert header["network"]["img_channels"] == 4 and not header["network"]["interval"]
    if told == "data-at-1": assert velocity_agrees(u, lambda z, t, y: -sit(z, 1 - t, y)[:, :4])
    else:                   assert velocity_agrees(u, lambda z, t, y: sit(z, t, y)[:, :4])
    assert header["latents"]["pixel_range"] == [-1, 1] and header["latents"]["scale"] == [0.18215] * 4


@pytest.mark.parametrize("factor, args", [
    (2, {}), (1, {}), (2, {"prediction": "v"}), (1, {"prediction": "velocity"}), (1, {"model": "SiT-B/2"})])
def test_a_file_that_does_not_tell_its_time_needs_the_flag(tmp_path, factor, args):
    torch.save({"model": random_sit(factor).state_dict(), "args": args | {"num_heads": 4}}, tmp_path / "a.pt")
    with pytest.raises(model.UserError, match="--time data-at-1.*--time data-at-0.*DiT"):
        import_checkpoint.import_checkpoint(tmp_path / "a.pt")


def test_a_dit_is_refused(tmp_path):
    args = argparse.Namespace(model="DiT-XL/2", num_classes=10, num_heads=4)
    torch.save({"ema": random_sit(2).state_dict(), "args": args}, tmp_path / "a.pt")
    for time in (None, "data-at-0", "data-at-1"):
        with pytest.raises(model.UserError, match="DiT-XL/2, which predicts noise"):
            import_checkpoint.import_checkpoint(tmp_path / "a.pt", time)


def test_time_is_only_for_files_without_an_interval_embedding(tmp_path):
    for path in (public_file(tmp_path, "sit_meanflow")[0], VECTORS / "edm_uncond.pkl"):
        with pytest.raises(model.UserError, match="--time"):
            import_checkpoint.import_checkpoint(path, "data-at-0")


@pytest.mark.parametrize("ratio", [2, 3.0, 8 / 3])
def test_width_of_the_mlp_is_honoured(tmp_path, ratio):
    sit = random_sit(mlp_ratio=ratio)
    torch.save({"ema": sit.state_dict(), "args": REPA}, tmp_path / "a.pt")
    u, header = import_checkpoint.import_checkpoint(tmp_path / "a.pt")
    assert velocity_agrees(u, sit)
    model.save(tmp_path / "a.safetensors", u.state_dict(), header)
    assert velocity_agrees(model.load(tmp_path / "a.safetensors")[0], sit)


def test_arguments_in_a_pt_file_are_honoured_or_refused(tmp_path):
    tensors = {f"_orig_mod.module.{k}": w for k, w in vector_weights("sit_meanflow").items()}
    def imported(**args):
        torch.save({"ema": tensors, "args": argparse.Namespace(num_heads=4, **args)}, tmp_path / "a.pt")
        return import_checkpoint.import_checkpoint(tmp_path / "a.pt")[1]
    known = dict(path_type="Linear", prediction="velocity", num_classes=10, data_dir="/x", lr=1e-4)
    assert imported(cfg_prob=0.2, **known)["label_dropout"] == 0.2
    for args in (dict(path_type="GVP"), dict(prediction="noise"), dict(qk_norm=True), dict(num_classes=11)):
        word = "null class" if "num_classes" in args else f"{list(args)[0]} = {list(args.values())[0]!r}"
        with pytest.raises(model.UserError, match=word): imported(**known | args)
    tensors["final_layer.linear.bias"] = tensors["_orig_mod.module.final_layer.linear.bias"]
    with pytest.raises(model.UserError, match="final_layer.linear.bias twice"): imported()


@pytest.mark.parametrize("key, ending", [
    ("model_ema", ".pt"), ("ema_state_dict", ".pth"), ("ema", ".pth.tar"), ("net", ".ckpt"),
    ("model", ".bin"), ("state_dict", ".model"), (None, ".pt")])
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_are_found_and_ema_is_preferred(tmp_path, capsys, key, ending, zipped):
    """Beside settings as real training scripts leave them: numpy scalars, paths, optimizer states."""
    sit, path = random_sit(), tmp_path / f"a{ending}"
    tensors = {f"module.{k}": v.bfloat16() for k, v in sit.state_dict().items()}
    sit.load_state_dict({k: v.bfloat16().float() for k, v in sit.state_dict().items()})
    settings = argparse.Namespace(**REPA, out=Path("runs"), there=PureWindowsPath("C:/"), lr=np.float64(1e-4))
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}}
    content = {"args": settings, "optimizer": optimizer, "epoch": np.int64(3)}
    if key and "ema" in key: content |= {"model": {k: torch.zeros_like(v) for k, v in tensors.items()}}
    torch.save(content | ({key: tensors} if key else tensors), path, _use_new_zipfile_serialization=zipped)
    u, _ = import_checkpoint.import_checkpoint(path)
    assert velocity_agrees(u, sit)
    assert ("EMA" in capsys.readouterr().out) == bool(key and "ema" in key)


def test_ema_weights_beside_others_in_one_state_dict(tmp_path, capsys):
    sit = random_sit()
    tensors = {f"ema_model.{k}": v for k, v in sit.state_dict().items()}
    tensors |= {f"net.{k}": torch.zeros_like(v) for k, v in sit.state_dict().items()}
    torch.save({"state_dict": tensors, "args": REPA}, tmp_path / "a.ckpt")
    assert velocity_agrees(import_checkpoint.import_checkpoint(tmp_path / "a.ckpt")[0], sit)
    assert "EMA" in capsys.readouterr().out


def test_advice_for_files_that_hold_more_than_weights(tmp_path, persistence):
    cases = [(types.SimpleNamespace(), ["types.SimpleNamespace", "torch.save"]),
             (os.system, ["posix.system"]),
             (persistent("EDMPrecond"), ["torch_utils", "network-snapshot"])]
    for content, words in cases:
        torch.save({"ema": {}, "config": content}, tmp_path / "a.pt")
        with pytest.raises(model.UserError) as e: import_checkpoint.import_checkpoint(tmp_path / "a.pt")
        assert all(w in str(e.value) for w in words) and "was not run" in str(e.value)
        assert ("torch.save" in str(e.value)) == ("torch.save" in words)


def test_files_that_are_no_checkpoints(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save("ours.safetensors", {"a": torch.zeros(1)}, {})
    save_file({"down_blocks.0.conv.weight": torch.zeros(1)}, "unet.safetensors", metadata={"format": "pt"})
    Path("page.pkl").write_text("\n<!DOCTYPE html><html>Sign in</html>")
    Path("lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    Path("index.json").write_text('{"weight_map": {}}')
    torch.save({"optimizer": {"lr": 1}, "step": 5}, "optimizer.pt")
    torch.save({"x_embedder.proj.weight": torch.full((4, 4, 2, 2), torch.nan)}, "nan.pt")
    for name, words in [("ours.safetensors", "of this project"), ("unet.safetensors", "down_blocks"),
                        ("page.pkl", "web page"), ("index.json", "JSON"), ("nan.pt", "not finite"),
                        ("lfs.pt", "git lfs pull"), ("optimizer.pt", "no weights")]:
        refused(run("import_checkpoint", name), name, words)


def test_edm2_in_training_puts_weights_on_the_sphere(tmp_path):
    path, v = public_file(tmp_path, "edm2")
    after, _ = vectors("edm2_train")
    D, _ = import_checkpoint.import_checkpoint(path)
    D.train()
    x, t, y = v["in/x"], v["in/sigma"], v["in/class_labels"].argmax(1)
    before = {k: w.clone() for k, w in D.net.state_dict().items()}
    model.normalise_weights(D)
    ours = {k: w.clone() for k, w in D.net.state_dict().items()}
    assert relerr(D(x, t, y), after["out64/D_train"]) < 5e-6
    with torch.no_grad(): D(x, t, y)
    assert all(torch.equal(w, ours[k]) for k, w in D.net.state_dict().items())         # no forward moves a weight
    changed = {k.removeprefix("w_after/unet."): w for k, w in after.items() if k.startswith("w_after/unet.")}
    assert all(relerr(ours[k], w) < 1e-6 for k, w in changed.items())
    assert all(torch.equal(w, before[k]) for k, w in ours.items() if k not in changed)
    model.normalise_weights(D)
    assert relerr(D(x, t, y), after["out64/D_train_second_call"]) < 5e-6


def test_edm2_from_float16_weights(tmp_path):
    v, meta = vectors("edm2")
    half, _ = vectors("edm2_fp16params")
    save_file({k: w.half() for k, w in vector_weights("edm2").items()},
              tmp_path / "a.safetensors", metadata={"config": json.dumps(meta["config"])})
    D, _ = import_checkpoint.import_checkpoint(tmp_path / "a.safetensors")
    with torch.no_grad():
        out = D.eval()(v["in/x"], v["in/sigma"], v["in/class_labels"].argmax(1))
    assert relerr(out, half["out/D_upcast"]) < 5e-6


def test_edm2_keeps_unit_variance_at_initialisation():
    torch.manual_seed(0)
    net = model.EDM2UNet(16, 3, 10, model_channels=64, channel_mult=(1, 2), num_blocks=2,
                         attn_resolutions=(8,))
    seen = []
    for layer in [*net.enc.values(), *net.dec.values()]:
        layer.register_forward_hook(lambda layer, inputs, out: seen.append(out.std().item()))
    with torch.no_grad():
        net.eval()(torch.randn(16, 3, 16, 16), torch.linspace(-1.5, 1, 16), torch.arange(16) % 10)
    assert len(seen) == 15 and all(0.8 < std < 1.2 for std in seen), seen


@pytest.mark.parametrize("family", ["edm", "edm2", "sit"])
def test_every_published_name_has_its_place(family):
    """The full-size networks, on the meta device: every published tensor has one of ours, none is left."""
    for name, file in json.loads((VECTORS / f"checkpoint_names_{family}.json").read_text()).items():
        config = {k: v for k, v in file["config"].items() if k != "class"}
        theirs = {k.removeprefix("model.").removeprefix("unet."): tuple(shape)
                  for k, shape in file["state_dict"].items()
                  if not any(x in k for x in import_checkpoint.LEFT_OUT)}
        if family == "sit":
            empty = {k: torch.empty(shape, device="meta") for k, shape in theirs.items()}
            header = import_checkpoint.sit_header(empty, config)
        elif config.get("model_type") == "DhariwalUNet" or config.get("encoder_type") == "residual":
            with pytest.raises(model.UserError, match="ADM|NCSN"):
                import_checkpoint.denoiser_header("EDMPrecond", config)
            continue
        else:
            header = import_checkpoint.denoiser_header(file["config"]["class"], config)
        with torch.device("meta"): net = model.build(header).net
        assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == theirs, name


@pytest.mark.parametrize("millions, row, network", [
    (55.73, "cifar10", {}), (61.80, "ffhq64", {}), (61.80, "afhqv2-64", {}), (280.2, "imagenet64", {}),
    (1523.2, "imagenet512", {}), (676.7, "imagenet256", {"interval": True}),
    (131.2, "imagenet256", pretrain.RECIPES["flow"]["imagenet256"]["network"] | {"interval": True}),
    (131.3, "imagenet256", dict(hidden_size=768, depth=12, num_heads=12, interval=True)),
    (459.3, "imagenet256", dict(hidden_size=1024, depth=24, interval=True))])
def test_parameter_counts_of_the_paper(millions, row, network):
    with torch.device("meta"): net = model.build(model.fresh_header(model.DATASETS[row], **network)).net
    count = sum(v.numel() for v in net.state_dict().values())
    assert abs(count / 1e6 - millions) < 0.1


# --- pickles ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["edm_uncond", "edm2"])
def test_pickle_gives_the_expected_tensors(name):
    found = import_checkpoint.read_network_pickle(VECTORS / f"{name}.pkl")[-1]
    expected = load_file(VECTORS / f"{name}.expected.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


def test_import_command_and_what_follows(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = run("import_checkpoint", VECTORS / "edm_uncond.pkl")
    assert first.code == 0, first.err
    out = tmp_path / "runs/edm_uncond/pretrain.safetensors"
    D, header = model.load(out)
    expected = load_file(VECTORS / "edm_uncond.expected.safetensors")
    assert torch.equal(D.net.map_layer0.weight, expected["model.map_layer0.weight"])
    assert header["imported from"].endswith("edm_uncond.pkl") and header["stage"] == "pretrain"
    small = "--steps", 1, "--batch", 8, "--nfe", 4
    done = run("midtrain", "--data", "edm_uncond", *small, "--out", tmp_path / "m.safetensors")
    assert done.code == 0 and "warning" not in done.out, done.err
    assert run("sample", f"{out}:4", "--n", 2, "--out", tmp_path / "a.npz").code == 0
    again = run("import_checkpoint", VECTORS / "edm_uncond.pkl")
    assert again.code == 2 and "exists" in again.err
    assert "next: python midtrain.py --data edm_uncond" in first.out
    next_stage = shlex.split(first.out.split("next: python midtrain.py")[1])
    done = run("midtrain", *next_stage, *small, "--out", tmp_path / "m2.safetensors")
    assert done.code == 0 and "warning" not in done.out, done.err
    wrong = run("import_checkpoint", "--data", "digits", VECTORS / "edm_uncond.pkl")
    assert wrong.code == 2 and "3x8x8" in wrong.err
    missing = run("import_checkpoint", "nowhere.pkl")
    assert missing.code == 2 and "download" in missing.err


def test_next_command_after_a_velocity_model(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": random_sit(2).state_dict(), "args": SIT}, "SiT.pt")
    done = run("import_checkpoint", "SiT.pt", "--data", "mine")
    assert done.code == 0 and Path("runs/mine/pretrain_flow.safetensors").exists(), done.err
    assert "assumed" in done.out and "pixels in [-1, 1], scale 0.18215" in done.out
    small = "--steps", 1, "--batch", 8, "--nfe", 4
    done = run("midtrain", *shlex.split(done.out.split("next: python midtrain.py")[1]), *small)
    assert done.code == 0, done.err


@pytest.mark.parametrize("row, changes, words", [
    ("cifar10", {}, "midtrain.py --data a --teacher 'a b.safetensors'"),
    ("imagenet256", dict(kind="MeanVelocity", stage="pretrain_flow"), "--data a --teacher 'a b.safetensors' "
     "--branch mf --init 'a b.safetensors' --solver heun --nfe 16"),
    ("imagenet512", dict(stage="posttrain_cm"), "sample.py 'a b.safetensors':2 --vae"),
    ("imagenet256", dict(kind="MeanVelocity", stage="posttrain_mf"), "sample.py 'a b.safetensors':1 --vae")])
def test_next_command(row, changes, words):
    header = model.fresh_header(model.DATASETS[row]) | dict(stage="pretrain", data="a") | changes
    assert words in import_checkpoint.next_command(header, "a b.safetensors")


class Runs:
    """Pickles to a call of `function(*args)`."""
    def __init__(self, function, *args): self.function, self.args = function, args
    def __reduce__(self): return self.function, self.args


def _reconstruct_persistent_obj(meta): pass
_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


def as_older_writers_did(module, mapping):
    """A parsed module as an object that pickles anew, its parameters and children in `mapping`."""
    state = {k: OrderedDict(v) if isinstance(v, dict) else v for k, v in module.state.items()}
    for kind in ("_parameters", "_buffers"):
        state[kind] = mapping((k, tensor_of_torch_1(v)) for k, v in (state.get(kind) or {}).items())
    state["_modules"] = mapping((k, as_older_writers_did(v, mapping)) for k, v in state["_modules"].items())
    if not module.name:
        made = torch.nn.ModuleDict()
        made.__dict__.clear()
        made.__dict__.update(state)
        return made
    kwargs = dict(state["_init_kwargs"])
    if "dropout" in kwargs: kwargs["dropout"] = np.float64(kwargs["dropout"])
    if module.name == "EDMPrecond": kwargs |= {"sigma_min": 0, "sigma_max": float("inf")}
    return persistent(module.name, **state | {"_init_kwargs": kwargs})


def storage_of_torch_1(tensor):
    file, storage = io.BytesIO(), tensor.contiguous().untyped_storage()
    storage = torch.storage.TypedStorage(wrap_storage=storage, dtype=tensor.dtype, _internal=True)
    torch.save(storage, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def tensor_of_torch_1(tensor):
    if tensor is None: return None
    storage = Runs(torch.storage._load_from_bytes, storage_of_torch_1(tensor))
    tensor = Runs(torch._utils._rebuild_tensor_v2, storage,
                  0, tuple(tensor.shape), tensor.contiguous().stride(), False, OrderedDict())
    return Runs(torch._utils._rebuild_parameter, tensor, True, OrderedDict())


@pytest.fixture
def persistence(monkeypatch):
    """Lets pickle write the name of EDM's function."""
    for name in ("torch_utils", "torch_utils.persistence"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj


def persistent(class_name, **state):
    """An object as EDM's snapshots pickle it"""
    return Runs(_reconstruct_persistent_obj, {
        "type": "class", "version": 6, "module_src": "raise SystemError", "class_name": class_name,
        "state": state})


def persistent_module(tensors, class_name="Module", **kwargs):
    """A network as EDM's snapshots pickle it. tensors: {dotted name: tensor}"""
    children, own = {}, {k: tensor_of_torch_1(v) for k, v in tensors.items() if "." not in k}
    for k, v in tensors.items():
        if "." in k: children.setdefault(k.split(".", 1)[0], {})[k.split(".", 1)[1]] = v
    children = {k: persistent_module(v) for k, v in children.items()}
    return persistent(class_name, _parameters=own, _buffers={}, _modules=children, _init_kwargs=kwargs)


@pytest.mark.parametrize("class_name, loss", [
    ("ECMPrecond", "ECMLoss"), ("ECMPrecond", "DPMSolverLoss"), ("EDMPrecond", "ECMLoss"),
    ("EDMPrecond", "EDMLoss")])
def test_consistency_models_of_ect(run, tmp_path, monkeypatch, persistence, class_name, loss):
    v, meta = vectors("ecm_precond")
    net = persistent_module(vector_weights("edm_ddpmpp_uncond"), class_name, **meta["config"]["kwargs"])
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": net, "loss_fn": persistent(loss)}))
    monkeypatch.chdir(tmp_path)
    done = run("import_checkpoint", "a.pkl", "--out", "out.safetensors")
    assert done.code == 0, done.err
    D, header = model.load("out.safetensors")
    with torch.no_grad(): assert relerr(D.train()(v["in/x"], v["in/sigma"]), v["out64/D_train"]) < 5e-6
    if loss == "EDMLoss":
        assert header["stage"] == "pretrain" and header["t_min"] == 0.003 and "mid_t" not in header
    else:
        assert header["stage"] == "posttrain_cm" and header["kind"] == "Denoiser" and header["t_min"] == 0.002
        assert header["mid_t"] == 0.821 and "shifts t by 0.003" in done.out
        assert "next: python sample.py out.safetensors:2" in done.out
        assert run("sample", "out.safetensors:2", "--n", 2, "--out", "a.npz").code == 0


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_older_writers(tmp_path, persistence, protocol):
    """Every pickle protocol, OrderedDicts for parameters, numpy scalars among the arguments, numpy arrays."""
    with open(VECTORS / "edm_uncond.pkl", "rb") as f: ema = import_checkpoint.Unpickler(f).load()["ema"]
    content = {"augment_pipe": {1, 2}, "more": (b"bytes", np.float32(2), np.zeros(4, np.float32)),
               "ema": as_older_writers_did(ema, OrderedDict if protocol % 2 else dict)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    net, header = import_checkpoint.import_checkpoint(tmp_path / "a.pkl")
    assert header["t_max"] == 80.0 and type(header["network"]["dropout"]) is float
    tensors = net.net.state_dict()
    expected = load_file(VECTORS / "edm_uncond.expected.safetensors")
    assert all(torch.equal(tensors[k.removeprefix("model.")], v) for k, v in expected.items()
               if "resample_filter" not in k)


def in_a_storage(evil):
    """Bytes of a legacy storage with something else in the place of its description."""
    parts = [0x1950a86a20f9469cfc6c, 1001, {"little_endian": True}, evil, []]
    return b"".join(pickle.dumps(part, protocol=2) for part in parts)


def hostile(tmp_path):
    target = str(tmp_path / "owned")
    yield "posix.system", Runs(os.system, f"touch {target}")
    yield "builtins.eval", Runs(eval, f"open({target!r}, 'w')")
    yield "builtins.getattr", Runs(getattr, "", "format")
    yield "torch.serialization.load", Runs(torch.load, target)
    nested = in_a_storage(Runs(os.system, f"touch {target}"))
    yield "posix.system", Runs(torch.storage._load_from_bytes, nested)
    yield "numpy", Runs(np.load, target)


def test_hostile_pickles_are_refused_and_run_nothing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, (name, evil) in enumerate(hostile(tmp_path)):
        for content in ({"ema": evil}, {"harmless": 1, "ema": {"deep": [evil]}}):
            Path(f"{i}.pkl").write_bytes(pickle.dumps(content))
            done = run("import_checkpoint", f"{i}.pkl")
            assert done.code == 2 and len(done.err.strip().splitlines()) == 1, done.err
            assert name in done.err and "was not run" in done.err, done.err
    assert not Path("owned").exists() and not Path("runs").exists()
    good = (VECTORS / "edm_uncond.pkl").read_bytes()
    for content in (b"", good[:len(good) // 2], b"garbage", pickle.dumps({"ema": 3}), pickle.dumps([1])):
        Path("x.pkl").write_bytes(content)
        done = run("import_checkpoint", "x.pkl")
        assert done.code == 2 and len(done.err.strip().splitlines()) == 1 and "x.pkl" in done.err
    # BUILD on a stand-in, which sets its attributes
    defaults = import_checkpoint.read_tensor.__defaults__
    Path("x.pkl").write_bytes(b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\n"
                              b"N}\x8c\x0c__defaults__K\x01\x85s\x86b.")
    assert run("import_checkpoint", "x.pkl").code == 2
    assert import_checkpoint.read_tensor.__defaults__ == defaults
    torch.save(Runs(os.system, f"touch {tmp_path / 'owned'}"), "x.pt")
    done = run("import_checkpoint", "x.pt")
    assert done.code == 2 and "posix.system, which was not run" in done.err and not Path("owned").exists()
    for content in ([1], {"model": {"a": 3}}, {}):
        torch.save(content, "x.pt")
        done = run("import_checkpoint", "x.pt")
        assert done.code == 2 and len(done.err.strip().splitlines()) == 1


def test_tensors_cannot_reach_beyond_their_storage():
    storage = torch.arange(6.0)
    inside = import_checkpoint.read_tensor(storage, 1, (2, 2), (2, 1), False, {})
    assert torch.equal(inside, torch.tensor([[1.0, 2], [3, 4]]))
    for offset, size, stride in [(3, (2, 2), (2, 1)), (-1, (2,), (1,)), (0, (7,), (1,)), (0, (2,), (-1,)),
                                 (0, (2, 2), (1,))]:
        with pytest.raises(RuntimeError): import_checkpoint.read_tensor(storage, offset, size, stride)


def test_what_we_do_not_build_is_refused_by_name(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    meta = vectors("edm_ddpmpp_uncond")[1]
    weights = vector_weights("edm_ddpmpp_uncond")
    def refused(words, weights=weights, cls="EDMPrecond", **changes):
        kwargs = meta["config"]["kwargs"] | changes
        save_file(weights, "a.safetensors", metadata={"config": json.dumps({"class": cls, "kwargs": kwargs})})
        done = run("import_checkpoint", "a.safetensors")
        assert done.code == 2 and len(done.err.strip().splitlines()) == 1, done.err
        assert all(w in done.err for w in words), done.err
    refused(["ADM"], model_type="DhariwalUNet")
    refused(["NCSN++"], encoder_type="residual", embedding_type="fourier")
    refused(["decoder_type", "'skip'"], decoder_type="skip")
    refused(["resample_filter", "[1, 3, 3, 1]"], resample_filter=[1, 3, 3, 1])
    refused(["some_new_argument"], some_new_argument=1)
    refused(["VPPrecond"], cls="VPPrecond")
    refused(["according to its arguments"], model_channels=16)
    refused(["unknown format"], channel_mult="much")
    refused(["map_layer0.bias", "missing"],
            {k: w for k, w in weights.items() if k != "model.map_layer0.bias"})
    refused(["surplus", "absent"], weights | {"model.surplus": torch.zeros(2)})
    refused(["int64"], weights | {"model.map_layer0.bias": torch.zeros(2, dtype=torch.int64)})
    save_file(weights, "a.safetensors")
    assert "`config`" in run("import_checkpoint", "a.safetensors").err
    torch.save(weights, "a.pt")
    assert "does not say" in run("import_checkpoint", "a.pt").err
    assert not Path("runs").exists()
