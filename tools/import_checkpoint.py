"""Convert a public checkpoint into a checkpoint of this project. No code of the public file is run.

  reads   FILE: a network pickle of EDM, EDM2 or ECT (.pkl); weights of SiT, REPA or MeanFlow-PyTorch (.pt,
          .pth, .pth.tar, .ckpt, .bin); a .safetensors with the network's arguments in its metadata
  writes  runs/D/pretrain.safetensors         from a denoiser (EDM, EDM2)
          runs/D/pretrain_flow.safetensors    from a velocity model (SiT, REPA)
          runs/D/posttrain_cm.safetensors     from a consistency model (ECT)
          runs/D/posttrain_mf.safetensors     from a Mean Flow model (MeanFlow-PyTorch)
  run     python tools/import_checkpoint.py edm-cifar10-32x32-uncond-vp.pkl --data cifar10
          python tools/import_checkpoint.py SiT-XL-2-256.pt --data imagenet256 --time data-at-1
"""
import argparse, functools, io, json, math, os, pickle, re, reprlib, shlex, sys
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import midtrain, model


# === pickles ================================================================================================
# A pickle calls functions by name. Each name that a file may call is listed here with an inert stand-in, and
# every other name is refused.

class Record:
    """Stand-in for an object of the file: its name and its attributes."""
    name, state = "", {}

    def __init__(self, name="", state={}, *_): self.name, self.state = name, state

    def __setstate__(self, state): self.state = state


def numpy_scalar(dtype, raw): return np.frombuffer(raw, f"<{dtype.name}")[0].item()


def read_tensor(storage, offset, size, stride, *_):
    """A view of a storage. torch's own function would enlarge a storage that is too small."""
    return torch.empty(0, dtype=storage.dtype).set_(storage).as_strided(size, stride, offset)


@functools.cache                                           # a pickle can ask for the same bytes many times
def read_storage(content): return torch_load(io.BytesIO(content))


IN_TORCH_FILES = {
    "argparse.Namespace": argparse.Namespace, "numpy.dtype": Record,
    "numpy.core.multiarray.scalar": numpy_scalar, "numpy._core.multiarray.scalar": numpy_scalar,
    **{f"{module}.{name}": Record for module in ("pathlib", "pathlib._local")
       for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")}}
IN_NETWORK_PICKLES = {
    "torch_utils.persistence._reconstruct_persistent_obj": lambda m: Record(m["class_name"], m["state"]),
    "torch.nn.modules.container.ModuleDict": Record, "collections.OrderedDict": dict,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor, "dnnlib.util.EasyDict": dict,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._utils._rebuild_tensor_v2": read_tensor, "torch.storage._load_from_bytes": read_storage,
    "torch.Size": tuple, "torch.device": Record, "numpy.dtype": Record, "numpy.ndarray": Record,
    "numpy.core.multiarray.scalar": numpy_scalar, "numpy.core.multiarray._reconstruct": lambda *_: Record(),
    "numpy.core.numeric._frombuffer": lambda *_: Record(), "builtins.set": set, "builtins.object": Record,
    "copyreg._reconstructor": lambda cls, *_: cls(), "_codecs.encode": lambda text, *_: text.encode("latin1")}


class Unpickler(pickle._Unpickler):    # in Python: the one in C allocates as much memory as a memo index says
    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module, name):
        for old, new in ("numpy._core", "numpy.core"), ("copy_reg", "copyreg"), ("__builtin__", "builtins"):
            module = module.replace(old, new)
        if (full := f"{module}.{name}") in IN_NETWORK_PICKLES: return IN_NETWORK_PICKLES[full]
        raise model.UserError(f"it asks for {full}, which no network pickle needs and which was not run")

    def load_build(self):                                  # the original sets attributes of any object
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record): self.stack[-1].state = state
    dispatch[pickle.BUILD[0]] = load_build


def torch_load(file, advice=""):
    """torch.load of tensors and of the names above. Raises UserError where the file holds anything else."""
    try:
        with torch.serialization.safe_globals([(f, name) for name, f in IN_TORCH_FILES.items()]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:                    # torch's text says how to run the file all the same
        name = re.search(r"GLOBAL (\S+)", str(e))
        raise model.UserError(f"it asks for {name[1] if name else 'more than tensors'}, which was not run"
                              + ("" if "is blocked" in str(e) else advice))


def state_dict(module, prefix=""):
    """A module of a network pickle -> {name: tensor}, with the names of its state_dict()."""
    state, found = module.state, {}
    for kind in ("_parameters", "_buffers"):
        found |= {prefix + k: v for k, v in (state.get(kind) or {}).items()
                  if v is not None and k not in state.get("_non_persistent_buffers_set", ())}
    for k, child in (state.pop("_modules", None) or {}).items():             # pop: each module is read once
        if child is not None: found |= state_dict(child, f"{prefix}{k}.")
    return found


# === file formats ===========================================================================================
# A reader returns the name of the class or None, whether the file says that the network is a consistency model,
# the constructor arguments, and {name: tensor}.

WEIGHTS = "model_ema", "ema_state_dict", "ema_model", "ema", "net", "model", "state_dict"        # EMA first


def read_network_pickle(path):
    with open(path, "rb") as f: content = Unpickler(f).load()
    read_storage.cache_clear()
    net = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(net, Record) or "_init_kwargs" not in net.state:
        raise model.UserError("it is not a network pickle, because it has no network under `ema`")
    print("taking the EMA weights, `ema`")
    consistency = getattr(content.get("loss_fn"), "name", "") in ("ECMLoss", "DPMSolverLoss")
    return net.name, consistency, net.state["_init_kwargs"], state_dict(net)


def read_torch(path):
    file = torch_load(path, "; if you trust its author, save its weights alone where their code is installed: "
                            "torch.save({'ema': torch.load(FILE, weights_only=False)['ema']}, 'ema.pt')")
    if not isinstance(file, dict): raise model.UserError(f"it holds a {type(file).__name__}, not weights")
    tensors, taken = file, ""
    for _ in range(2):                                     # some files nest them
        key = next((k for k in WEIGHTS if tensors.get(k) and isinstance(tensors[k], dict)), None)
        if key: tensors, taken = tensors[key], f"{taken} {key}"
    averaged = {k: v for k, v in tensors.items() if re.match(r"(ema|model_ema|ema_model)\.", str(k))}
    tensors = {k: v for k, v in (averaged or tensors).items() if torch.is_tensor(v)}
    if not tensors:
        raise model.UserError(f"it has no weights, only {reprlib.repr(list(file))}; they are looked for under "
                              + ", ".join(WEIGHTS))
    print(f"taking the {'EMA ' if averaged or 'ema' in taken else ''}weights, {taken or 'at the top level'}")
    args = file.get("args", {})
    return None, False, vars(args) if isinstance(args, argparse.Namespace) else args, tensors


def read_safetensors(path):
    with safe_open(path, "pt") as f:
        config = json.loads((f.metadata() or {}).get("config", "{}"))
        if "crc32" in config:
            raise model.UserError("it is a checkpoint of this project; pass it to --teacher or --init")
        name = (config.pop("class", None) or "").rpartition(".")[2]
        return name or None, False, config.get("kwargs", config), {k: f.get_tensor(k) for k in f.keys()}


def read_file(path):
    """The format is told by the first bytes, because endings vary."""
    with open(path, "rb") as f: head = f.read(64)
    if head.lstrip().startswith(b"<"): raise model.UserError("it is a web page; download the file itself")
    if head.startswith(b"version https://git-lfs"):
        raise model.UserError("it is a Git LFS pointer; get the file itself with `git lfs pull`")
    if head[8:9] == b"{": return read_safetensors(path)
    legacy = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
    return read_torch(path) if head.startswith((b"PK", legacy)) else read_network_pickle(path)


# Tensors without a place in our networks: augmentation labels, EDM2's uncertainty head, constants, and REPA's
# projections onto image features, which only its training needs.
LEFT_OUT = "map_augment", "logvar", "resample_filter", "num_batches_tracked", "projectors."


def our_names(tensors):
    """Tensors without the prefixes of wrappers, and without those of LEFT_OUT."""
    found = {}
    for k, v in tensors.items():
        if any(name in k for name in LEFT_OUT): continue
        k = re.sub(r"^((module|_orig_mod|model|unet|net|ema|model_ema|ema_model)\.)+", "", k)
        if k in found: raise model.UserError(f"it holds {k} twice")
        if not v.is_floating_point(): raise model.UserError(f"its {k} is {v.dtype}")
        found[k] = v
    return found


# === denoisers and consistency models =======================================================================
# For each published class: our network; the arguments that we honour, with the authors' defaults (`int`: there
# is none); the arguments of which we build only one value (None: any, the output does not depend on it).

PUBLISHED = {
    "EDMPrecond": ("DDPMpp", dict(
        img_resolution=int, img_channels=int, label_dim=0, model_channels=128, channel_mult=[1, 2, 2, 2],
        channel_mult_emb=4, num_blocks=4, attn_resolutions=[16], dropout=0.1, label_dropout=0.0,
        sigma_data=0.5, sigma_min=0.0, sigma_max=math.inf), dict(
        model_type="SongUNet", encoder_type="standard", decoder_type="standard", embedding_type="positional",
        channel_mult_noise=1, resample_filter=[1, 1], use_fp16=None, augment_dim=None)),
    "Precond": ("EDM2UNet", dict(
        img_resolution=int, img_channels=int, label_dim=0, model_channels=192, channel_mult=[1, 2, 3, 4],
        channel_mult_noise=None, channel_mult_emb=None, num_blocks=3, attn_resolutions=[16, 8], dropout=0.0,
        label_balance=0.5, concat_balance=0.5, channels_per_head=64, res_balance=0.3, attn_balance=0.3,
        clip_act=256.0, sigma_data=0.5), dict(resample_filter=[1, 1], use_fp16=None, logvar_channels=None))}
PUBLISHED["ECMPrecond"] = PUBLISHED["EDMPrecond"]
FAMILY = {"DhariwalUNet": " (ADM)", "residual": " (NCSN++)", "fourier": " (NCSN++)"}


def is_valid(k, v, default):
    """Is v of the type of the argument's default, and not negative?"""
    if isinstance(default, list): return isinstance(v, list) and all(is_valid(k, n, 1) for n in v)
    if isinstance(v, float): return isinstance(default, float) and v >= 0
    return type(v) is int and v >= 0 or v is None and k in ("channel_mult_noise", "channel_mult_emb", "clip_act")


def denoiser_header(kind, kwargs, consistency=False):
    """The constructor arguments of a published class -> header. An unknown argument is refused by name."""
    name, defaults, fixed = PUBLISHED[kind]
    consistency = consistency or kind == "ECMPrecond"
    if missing := [k for k, v in defaults.items() if v is int and k not in kwargs]:
        raise model.UserError(f"it does not say {missing[0]}; a .safetensors can say all constructor arguments "
                              "of its network in its metadata, as JSON under the key `config`")
    if kind == "EDMPrecond": kwargs = {"model_type": "DhariwalUNet"} | kwargs              # EDM's default
    if consistency: kwargs = {k: v for k, v in kwargs.items() if k != "sigma_min"}         # the shift below
    network = dict(defaults)
    for k, v in kwargs.items():
        v = list(v) if isinstance(v, tuple) else v
        if k in defaults and is_valid(k, v, defaults[k]): network[k] = v
        elif k not in fixed or fixed[k] not in (v, None):
            raise model.UserError(f"its network has {k} = {reprlib.repr(v)}{FAMILY.get(str(v), '')}, which we do "
                                  "not build" + (f", only {fixed[k]!r}" if k in fixed else ""))
    header = {"stage": "pretrain", "kind": "Denoiser", "sigma_data": network.pop("sigma_data"),
              "noise_scale": 1.0, "t_min": max(0.002, network.pop("sigma_min", 0.0)),
              "t_max": min(80.0, network.pop("sigma_max", 80.0)),
              "label_dropout": network.pop("label_dropout", 0.0), "network": {"class": name, **network}}
    if consistency:
        # The authors' code shifts t by sigma_min = 0.003 in the preconditioning, in eval mode only.
        print("a consistency model: its authors' code shifts t by 0.003 when it samples, this project does not")
        header |= {"stage": "posttrain_cm", "mid_t": 0.821 if name == "DDPMpp" else 1.526}
    return header


# === velocity models ========================================================================================

def sit_header(tensors, args):
    """The weights of a SiT, whose shapes say almost all, and its training arguments -> header."""
    dim, C, patch, _ = tensors["x_embedder.proj.weight"].shape
    built = dict(path_type=("linear", "Linear"), prediction=("velocity", "v"), qk_norm=(False,))
    for k, values in built.items():
        if k in args and args[k] not in values:
            raise model.UserError(f"its network has {k} = {args[k]!r}, which we do not build")
    heads = args.get("num_heads", {384: 6, 768: 12, 1024: 16, 1152: 16}.get(dim))
    if type(heads) is not int or heads < 1: raise model.UserError(f"it does not say num_heads, but {heads!r}")
    network = {"class": "SiT", "img_resolution": math.isqrt(tensors["pos_embed"].shape[1]) * patch,
               "img_channels": C, "label_dim": len(tensors["y_embedder.embedding_table.weight"]) - 1,
               "patch_size": patch, "hidden_size": dim, "num_heads": heads,
               "depth": len({k.split(".")[1] for k in tensors if k.startswith("blocks.")}),
               "interval": any(k.startswith("r_embedder.") for k in tensors),
               "mlp_ratio": len(tensors["blocks.0.mlp.fc1.bias"]) / dim}
    if args.get("num_classes", network["label_dim"]) != network["label_dim"]:
        raise model.UserError("it has no null class, which we need")
    return {"stage": "posttrain_mf" if network["interval"] else "pretrain_flow", "kind": "MeanVelocity",
            "time_scale": 1.0, "t_min": 0.0, "t_max": 1.0, "network": network,
            "label_dropout": args.get("class_dropout_prob", args.get("cfg_prob", 0.1))}


def velocity(tensors, args, time):
    """Weights of a SiT without r_embedder -> weights of v(z, t), data at t = 0. `time`: --time or None."""
    name, prediction = str(args.get("model", args.get("name"))), args.get("prediction")
    if name.startswith("DiT"):
        raise model.UserError(f"it is a {name}, which predicts noise; only a velocity can be imported")
    C, patch = tensors["x_embedder.proj.weight"].shape[1:3]
    variance = len(tensors["final_layer.linear.bias"]) == 2 * C * patch ** 2
    said = None                                            # what the file itself says
    if variance and (prediction == "velocity" or not prediction and name.startswith("SiT")): said = "data-at-1"
    if not variance and prediction == "v": said = "data-at-0"
    if not (time or said):
        raise model.UserError("it does not say whether it predicts a velocity, and where its time starts. If it "
                              "is a SiT, pass --time data-at-1; if it is REPA's, pass --time data-at-0; a DiT "
                              "predicts noise and cannot be imported")
    print(f"velocity with {time or said} (says {'--time' if time else 'the file'})"
          + (", first half of the output channels" if variance else ""))
    if variance:                                           # rows (p q c); the second C channels are a variance
        tensors = tensors | {k: tensors[k].unflatten(0, (patch ** 2, -1))[:, :C].flatten(0, 1)
                             for k in ("final_layer.linear.weight", "final_layer.linear.bias")}
    return reverse_time(tensors) if (time or said) == "data-at-1" else tensors


def reverse_time(tensors):
    """Weights of SiT(z, t), data at t = 1 -> weights of v(z, t) = -SiT(z, 1 - t), data at t = 0. The sinusoids
    of 1 - t are linear in those of t."""
    cos, sin = tensors["t_embedder.mlp.0.weight"].double().chunk(2, dim=1)
    f = 1e-4 ** (torch.arange(cos.shape[1], dtype=torch.float64) / cos.shape[1])
    # cos(f (1 - t)) = cos f cos ft + sin f sin ft,   sin(f (1 - t)) = sin f cos ft - cos f sin ft
    turned = torch.cat([cos * f.cos() + sin * f.sin(), cos * f.sin() - sin * f.cos()], dim=1)
    return tensors | {"t_embedder.mlp.0.weight": turned.float()} | {
        k: -tensors[k] for k in ("final_layer.linear.weight", "final_layer.linear.bias")}


# === the run ================================================================================================

def convert(path, time):
    """A public file -> (model, header)"""
    kind, consistency, kwargs, tensors = read_file(path)
    tensors = our_names(tensors)
    if sum(v.nbytes for v in tensors.values()) > os.path.getsize(path):
        raise model.UserError("its tensors are larger than itself")
    examples = {"x_embedder.proj.weight": "SiT", "out_gain": "Precond", "map_layer0.weight": "EDMPrecond"}
    kind = kind or next((k for name, k in examples.items() if name in tensors), None)
    if kind != "SiT" and kind not in PUBLISHED:
        raise model.UserError(f"it holds {kind or reprlib.repr(sorted(tensors))}, not a network of EDM, EDM2, "
                              "ECT, SiT, REPA or MeanFlow-PyTorch")
    tensors = {k: v.float() for k, v in tensors.items()}
    header = sit_header(tensors, kwargs) if kind == "SiT" else denoiser_header(kind, kwargs, consistency)
    if header["stage"] == "pretrain_flow": tensors = velocity(tensors, kwargs, time)
    elif time: raise model.UserError("--time is for a SiT without r_embedder, leave it out")
    network = header["network"]
    for wrong, what in [
        (header["t_min"] >= header["t_max"], "no time between sigma_min and sigma_max"),
        (header.get("sigma_data", 1) <= 0, "sigma_data = 0"),
        (max(header["label_dropout"], network.get("dropout", 0)) >= 1, "a dropout of 1"),
        (network.get("hidden_size", 0) % network.get("num_heads", 1), "heads that do not divide its width")]:
        if wrong: raise model.UserError(f"its arguments describe {what}")
    if network["img_channels"] == 4:
        header["latents"] = model.LATENTS.get(network["class"], model.LATENTS["EDM2UNet"])
    net = model.build_for(header, tensors)                 # on the meta device: large sizes take no memory
    here, there = ({k: tuple(v.shape) for k, v in d.items()} for d in (net.net.state_dict(), tensors))
    if wrong := [k for k in here | there if here.get(k) != there.get(k)]:
        raise model.UserError(f"its {wrong[0]} is {there.get(wrong[0], 'missing')}, by its arguments it is "
                              f"{here.get(wrong[0], 'absent')}")
    net.net.load_state_dict(tensors, assign=True)
    return net, header


def import_checkpoint(path, time=None):
    """A public file -> (model, header). time: as --time. Raises UserError, saying what is not understood."""
    one_line = lambda e: "".join(c if c.isprintable() else " " for c in str(e)[:350])      # may quote the file
    try:
        return convert(str(path), time)
    except FileNotFoundError:
        raise model.UserError(f"{path} does not exist; download it from its publisher.")
    except model.UserError as e:
        raise model.UserError(f"{path} cannot be imported: {one_line(e)}.")
    except Exception as e:                                 # a damaged pickle can raise anything
        raise model.UserError(f"{path} is damaged, incomplete or not a checkpoint we know ({type(e).__name__}: "
                              f"{one_line(e) or 'no reason'}); download it again.")


def next_command(header, out, data):
    """What to do with an imported file. Without --data, it is given the first dataset that the file fits."""
    if header["stage"].startswith("posttrain"):
        steps, vae = 2 if header["kind"] == "Denoiser" else 1, " --vae FOLDER" if "latents" in header else ""
        return f"python sample.py {shlex.quote(out)}:{steps}{vae}"
    target, flags = "cm", ""
    if header["kind"] == "MeanVelocity":
        target, flags = "mf", f" --target mf --init {shlex.quote(out)} --solver heun --nfe 16"
    fits = [k for k, config in model.DATASETS.items() if k in midtrain.RECIPES[target] and
            (config["shape"], config["classes"]) == (model.image_shape(header), header["network"]["label_dim"])]
    if not data or data in model.DATASETS and data not in fits:
        data = fits[0] if fits else f"data/{header['data']}.npz"
    return f"python midtrain.py --data {shlex.quote(data)} --teacher {shlex.quote(out)}{flags}"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=model.Help, allow_abbrev=False)
    p.add_argument("file", metavar="FILE", help="public checkpoint")
    p.add_argument("--data", metavar="NAME|PATH", help="what it was trained on, and name of the folder in runs/ "
                   "(default: the name of FILE)")
    p.add_argument("--time", choices=["data-at-0", "data-at-1"],
                   help="time of the data in a SiT that does not say it; asserts that it predicts a velocity")
    p.add_argument("--out", metavar="FILE", type=model.checkpoint, help="result (default: runs/D/STAGE.safetensors)")
    args = p.parse_args()
    model.setup(None)
    config, name, path = model.find_data(args.data) if args.data else (None, Path(args.file).stem, "")
    net, header = import_checkpoint(args.file, args.time)
    shape, network = model.image_shape(header), header["network"]
    if config := model.DATASETS.get(config):
        model.check_fit(args.file, header, f"--data {args.data}", config["shape"], config["classes"])
    out = args.out or f"runs/{name}/{header['stage']}.safetensors"
    if Path(out).exists(): raise model.UserError(f"{out} exists; delete it or give another --out.")
    header |= {"data": name, "step": 0, "steps": 0, "data_path": path,
               "imported from": args.file, "sha256 of import": model.sha256(args.file)}
    model.save(out, net.state_dict(), header)
    print(f"{out}: {network['class']}, {sum(p.numel() for p in net.parameters()):,} parameters, "
          f"images {shape}, {network['label_dim']} classes, from {args.file}")
    print(f"next: {next_command(header, out, args.data)}")


if __name__ == "__main__":
    model.run(main)
