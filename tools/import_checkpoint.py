"""Convert a public checkpoint into a checkpoint of this project. No code from the public file is run.

  reads   FILE: a network pickle of EDM, EDM2 or ECT (.pkl); weights of SiT, REPA or MeanFlow-PyTorch (.pt,
          .pth, .pth.tar, .ckpt, .bin); or a .safetensors with the network's arguments in its metadata
  writes  runs/NAME/pretrain.safetensors         for a denoiser (EDM, EDM2)
          runs/NAME/pretrain_flow.safetensors    for a velocity model (SiT, REPA)
          runs/NAME/posttrain_cm.safetensors     for a consistency model (ECT)
          runs/NAME/posttrain_mf.safetensors     for a Mean Flow model (MeanFlow-PyTorch)
  run     python tools/import_checkpoint.py edm-cifar10-32x32-uncond-vp.pkl --data cifar10
          python tools/import_checkpoint.py SiT-XL-2-256.pt --data imagenet256 --time data-at-1
"""
import argparse, functools, io, json, math, pickle, re, reprlib, shlex, sys, warnings
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model


# === pickles ================================================================================================
# A pickle calls functions by name. The tables below list every name that a file may call, with an inert
# stand-in. Any other name is refused.

class Record:
    """Stand-in for an object in a file. It keeps the name and the attributes of the object."""
    name, state = "", {}

    def __init__(self, name="", state={}, *_): self.name, self.state = name, state

    def __setstate__(self, state): self.state = state


def read_tensor(storage, offset, size, stride, *_):
    """A view of a storage. PyTorch's own function would enlarge a storage that is too small."""
    return torch.empty(0, dtype=storage.dtype).set_(storage).as_strided(size, stride, offset)


read_scalar = lambda dtype, raw: np.frombuffer(raw, f"<{dtype.name}")[0].item()
# The cache: otherwise a small pickle could ask for the same bytes again and again.
read_storage = functools.cache(lambda content: load_torch(io.BytesIO(content)))
IN_TORCH_FILES = {
    "argparse.Namespace": argparse.Namespace, "numpy.dtype": Record,
    "numpy.core.multiarray.scalar": read_scalar, "numpy._core.multiarray.scalar": read_scalar,
    **{f"{module}.{name}": Record for module in ("pathlib", "pathlib._local")
       for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")}}
IN_NETWORK_PICKLES = {
    "torch_utils.persistence._reconstruct_persistent_obj": lambda m: Record(m["class_name"], m["state"]),
    "torch.nn.modules.container.ModuleDict": Record, "collections.OrderedDict": dict,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor, "dnnlib.util.EasyDict": dict,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._utils._rebuild_tensor_v2": read_tensor, "torch.storage._load_from_bytes": read_storage,
    "torch.Size": tuple, "torch.device": Record, "numpy.dtype": Record, "numpy.ndarray": Record,
    "numpy.core.multiarray.scalar": read_scalar, "numpy.core.multiarray._reconstruct": lambda *_: Record(),
    "numpy.core.numeric._frombuffer": lambda *_: Record(), "builtins.set": set, "builtins.object": Record,
    "copyreg._reconstructor": lambda cls, *_: cls(), "_codecs.encode": lambda text, *_: text.encode("latin1")}


class Unpickler(pickle._Unpickler):
    """The unpickler written in Python. In the one written in C, a forged memo index can claim any memory."""
    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module, name):
        for old, new in ("numpy._core", "numpy.core"), ("copy_reg", "copyreg"), ("__builtin__", "builtins"):
            module = module.replace(old, new)
        if (full := f"{module}.{name}") in IN_NETWORK_PICKLES: return IN_NETWORK_PICKLES[full]
        raise model.UserError(f"it asks for {full}, which no network pickle needs and which was not run")

    def load_build(self):      # The original can set attributes of any object, for example of a function.
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record): self.stack[-1].state = state
    dispatch[pickle.BUILD[0]] = load_build


def load_torch(file, advice=""):
    """torch.load, restricted to tensors and IN_TORCH_FILES. `advice` is printed if the file needs more."""
    try:
        allowed = torch.serialization.safe_globals([(f, name) for name, f in IN_TORCH_FILES.items()])
        with warnings.catch_warnings(action="ignore"), allowed:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        # The message of PyTorch is not shown, because it explains how to run the file.
        found = re.search(r"GLOBAL (\S+)", str(e))
        name = found[1] if found else "more than tensors"
        if "is blocked" in str(e): advice = ""
        if "torch_utils.persistence" in str(e): advice = "; import the network-snapshot .pkl of the same run"
        raise model.UserError(f"it asks for {name}, which was not run{advice}")


def state_dict(module, prefix=""):
    """The tensors of a module in a network pickle, with the names that its state_dict() would give them."""
    state, found = module.state, {}
    for kind in ("_parameters", "_buffers"):
        found |= {prefix + k: v for k, v in (state.get(kind) or {}).items()
                  if v is not None and k not in state.get("_non_persistent_buffers_set", ())}
    # pop: a module that occurs many times is read once. Otherwise a small file could describe 2^60 modules.
    for k, child in (state.pop("_modules", None) or {}).items():
        if child is not None: found |= state_dict(child, f"{prefix}{k}.")
    return found


# === file formats ===========================================================================================
# Each reader returns the class name or None, whether the file says that the network is a consistency model,
# the constructor or training arguments, and {name: tensor}.

WEIGHTS = "model_ema", "ema_state_dict", "ema_model", "ema", "net", "model", "state_dict"     # EMA first


def read_network_pickle(path):
    with open(path, "rb") as f: content = Unpickler(f).load()
    read_storage.cache_clear()
    net = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(net, Record) or "_init_kwargs" not in net.state:
        raise model.UserError("it has no network of EDM, EDM2 or ECT under the key `ema`; if it is a state "
                              "dict, save it with torch.save")
    print("using the EMA weights (ema)")
    consistency = getattr(content.get("loss_fn"), "name", "") in ("ECMLoss", "DPMSolverLoss")
    return net.name, consistency, net.state["_init_kwargs"], state_dict(net)


def read_torch(path):
    advice = ("; if you trust its author, save only the weights, where the author's code is installed: "
              "torch.save({'ema': torch.load(FILE, weights_only=False)['ema']}, 'ema.pt')")
    file = load_torch(path, advice)
    if not isinstance(file, dict): raise model.UserError(f"it holds a {type(file).__name__}, not weights")
    has_tensors = lambda v: isinstance(v, dict) and any(map(torch.is_tensor, v.values()))
    key = next((k for k in WEIGHTS if has_tensors(file.get(k))), "")
    tensors = file[key] if key else file
    if average := {k: v for k, v in tensors.items() if re.match(r"(ema|model_ema|ema_model)\.", str(k))}:
        tensors, key = average, f"{key} ema.*"
    tensors = {k: v for k, v in tensors.items() if torch.is_tensor(v)}
    if not tensors:
        raise model.UserError(f"it has no weights under any of the keys {', '.join(WEIGHTS)}; its keys are "
                              + reprlib.repr(list(file)))
    print(f"using the {'EMA ' if 'ema' in key else ''}weights ({key.strip() or 'top level'})")
    args = file.get("args")
    if isinstance(args, argparse.Namespace): args = vars(args)
    return None, False, args if isinstance(args, dict) else {}, tensors


def read_safetensors(path):
    with safe_open(path, "pt") as f:
        config = json.loads((f.metadata() or {}).get("config", "{}"))
        if "crc32" in config: raise model.UserError("it is already a checkpoint of this project")
        name = (config.pop("class", None) or "").rpartition(".")[2]
        return name or None, False, config.get("kwargs", config), {k: f.get_tensor(k) for k in f.keys()}


def read_file(path):
    """Recognise the format by the first bytes, because publishers choose file endings freely."""
    with open(path, "rb") as f: head = f.read(64)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2 ** 32: return read_safetensors(path)
    if head.lstrip().startswith((b"<", b"{")):
        raise model.UserError("it is a web page or JSON; download the checkpoint itself")
    if head.startswith(b"version https://git-lfs"):
        raise model.UserError("it is a Git LFS pointer; download the file itself with `git lfs pull`")
    legacy = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
    return read_torch(path) if head.startswith((b"PK", legacy)) else read_network_pickle(path)


# Tensors that our networks do not have: augmentation labels, EDM2's uncertainty head, constants, and REPA's
# projections onto image features, which are used in training only.
LEFT_OUT = "map_augment", "logvar", "resample_filter", "num_batches_tracked", "projectors."


def our_names(tensors):
    """Remove the prefixes that wrappers add to names, and the tensors in LEFT_OUT."""
    found = {}
    for k, v in tensors.items():
        if any(name in k for name in LEFT_OUT): continue
        k = re.sub(r"^((module|_orig_mod|model|unet|net|ema|model_ema|ema_model)\.)+", "", k)
        if k in found: raise model.UserError(f"it holds {k} twice")
        if not v.is_floating_point(): raise model.UserError(f"its {k} is {v.dtype}")
        found[k] = v
    return found


# === denoisers and consistency models =======================================================================
# For each published class: our network; the arguments that may vary, with the authors' defaults (int: there
# is no default); the arguments that have to have one value (None: any, as it does not change the output).

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


def denoiser_header(kind, kwargs, consistency=False):
    """Constructor arguments of a published class -> header. Raises UserError for what we do not build."""
    name, defaults, fixed = PUBLISHED[kind]
    consistency = consistency or kind == "ECMPrecond"
    if missing := [k for k, v in defaults.items() if v is int and k not in kwargs]:
        raise model.UserError(f"it does not say {missing[0]}; save its weights as a .safetensors, with all "
                              "constructor arguments of the network as JSON in the metadata key `config`")
    if kind == "EDMPrecond": kwargs = {"model_type": "DhariwalUNet"} | kwargs          # the authors' default
    if consistency: kwargs = {k: v for k, v in kwargs.items() if k != "sigma_min"}     # the shift, see below
    network = dict(defaults)
    for k, v in kwargs.items():
        v = list(v) if isinstance(v, tuple) else v
        if k in defaults: network[k] = v
        elif k not in fixed or fixed[k] not in (v, None):
            raise model.UserError(f"its network has {k} = {reprlib.repr(v)}{FAMILY.get(str(v), '')}, "
                                  "which we do not build")
    header = {"stage": "pretrain", "kind": "Denoiser", "sigma_data": network.pop("sigma_data"),
              "noise_scale": 1.0, "t_min": max(0.002, network.pop("sigma_min", 0.0)),
              "t_max": min(80.0, network.pop("sigma_max", 80.0)),
              "label_dropout": network.pop("label_dropout", 0.0), "network": {"class": name, **network}}
    if consistency:
        # The authors' preconditioning replaces t by t - sigma_min, sigma_min = 0.003, in eval mode only.
        print("consistency model: the authors' code shifts t by 0.003 when it samples, this project does not")
        # The authors' time of the second sampling step, for small images and for ImageNet.
        header |= {"stage": "posttrain_cm", "mid_t": 0.821 if name == "DDPMpp" else 1.526}
    return header


# === velocity models ========================================================================================

def sit_header(tensors, args):
    """Weights of a SiT, whose shapes say almost everything, and training arguments -> header."""
    for k in ("pos_embed", "y_embedder.embedding_table.weight", "blocks.0.mlp.fc1.bias",
              "t_embedder.mlp.0.weight", "final_layer.linear.bias"):
        if k not in tensors: raise model.UserError(f"it has no {k}, but a SiT has one")
    built = dict(path_type=("linear", "Linear"), prediction=("velocity", "v"), qk_norm=(False,))
    for k, values in built.items():
        if k in args and args[k] not in values:
            raise model.UserError(f"its network has {k} = {args[k]!r}, which we do not build")
    dim, C, patch, _ = tensors["x_embedder.proj.weight"].shape
    heads = args.get("num_heads", {384: 6, 768: 12, 1024: 16, 1152: 16}.get(dim))
    if type(heads) is not int or heads < 1:
        raise model.UserError(f"its num_heads is {heads!r}; add it to the dictionary `args` in the file")
    network = {"class": "SiT", "img_resolution": math.isqrt(tensors["pos_embed"].shape[1]) * patch,
               "img_channels": C, "label_dim": len(tensors["y_embedder.embedding_table.weight"]) - 1,
               "patch_size": patch, "hidden_size": dim, "num_heads": heads,
               "depth": len({k.split(".")[1] for k in tensors if k.startswith("blocks.")}),
               "interval": any(k.startswith("r_embedder.") for k in tensors),
               "mlp_ratio": len(tensors["blocks.0.mlp.fc1.bias"]) / dim}
    if args.get("num_classes", network["label_dim"]) != network["label_dim"]:
        raise model.UserError("its label table has no null class, which our networks need")
    return {"stage": "posttrain_mf" if network["interval"] else "pretrain_flow", "kind": "MeanVelocity",
            "time_scale": 1.0, "t_min": 0.0, "t_max": 1.0, "network": network,
            "label_dropout": args.get("class_dropout_prob", args.get("cfg_prob", 0.1))}


def velocity_weights(tensors, args, time):
    """Weights of a SiT without r_embedder -> weights of v(z, t), with data at t = 0. `time`: see --time."""
    name, predicts = str(args.get("model", args.get("name"))), args.get("prediction")
    if name.lower().startswith("dit"):
        raise model.UserError(f"it is a {name}, which predicts noise, and only a velocity can be imported")
    C, patch = tensors["x_embedder.proj.weight"].shape[1:3]
    has_variance = len(tensors["final_layer.linear.bias"]) == 2 * C * patch ** 2
    in_file = None
    if has_variance and (predicts == "velocity" or not predicts and name[:3] == "SiT"): in_file = "data-at-1"
    if not has_variance and predicts == "v": in_file = "data-at-0"
    if not (time or in_file):
        raise model.UserError("it does not say what it predicts, nor at which time the data is. Pass --time "
                              "data-at-1 for a SiT, or --time data-at-0 for a model of REPA. A DiT looks the "
                              "same, but predicts noise and cannot be imported")
    print(f"time of the velocity model: {time or in_file}, according to {'--time' if time else 'the file'}")
    if has_variance:           # Rows are ordered (p q c). The second C channels are the variance.
        tensors = tensors | {k: tensors[k].unflatten(0, (patch ** 2, -1))[:, :C].flatten(0, 1)
                             for k in ("final_layer.linear.weight", "final_layer.linear.bias")}
    return reverse_time(tensors) if (time or in_file) == "data-at-1" else tensors


def reverse_time(tensors):
    """Weights of SiT(z, t) -> weights of v(z, t) = -SiT(z, 1 - t). The sinusoids of 1 - t are linear in those
    of t, so that only two layers change."""
    cos, sin = tensors["t_embedder.mlp.0.weight"].double().chunk(2, dim=1)
    f = 1e-4 ** (torch.arange(cos.shape[1], dtype=torch.float64) / cos.shape[1])
    # cos(f (1 - t)) = cos f cos ft + sin f sin ft,   sin(f (1 - t)) = sin f cos ft - cos f sin ft
    turned = torch.cat([cos * f.cos() + sin * f.sin(), cos * f.sin() - sin * f.cos()], dim=1)
    return tensors | {"t_embedder.mlp.0.weight": turned.float()} | {
        k: -tensors[k] for k in ("final_layer.linear.weight", "final_layer.linear.bias")}


# === the run ================================================================================================

def convert(path, time):
    kind, consistency, args, tensors = read_file(path)
    tensors = our_names(tensors)
    examples = {"x_embedder.proj.weight": "SiT", "out_gain": "Precond", "map_layer0.weight": "EDMPrecond"}
    kind = kind or next((k for name, k in examples.items() if name in tensors), None)
    if kind != "SiT" and kind not in PUBLISHED:
        raise model.UserError(f"it holds {kind or reprlib.repr(sorted(tensors))}, but only networks of EDM, "
                              "EDM2, ECT, SiT, REPA and MeanFlow-PyTorch can be imported")
    tensors = {k: v.float() for k, v in tensors.items()}
    if broken := [k for k, v in tensors.items() if not v.isfinite().all()]:
        raise model.UserError(f"its {broken[0]} has values that are not finite")
    header = sit_header(tensors, args) if kind == "SiT" else denoiser_header(kind, args, consistency)
    if header["stage"] == "pretrain_flow": tensors = velocity_weights(tensors, args, time)
    elif time: raise model.UserError("--time is only for a SiT without r_embedder; leave it out")
    network = header["network"]
    if network["img_channels"] not in (1, 3, 4):
        raise model.UserError(f"its latents have {network['img_channels']} channels, and only latents of "
                              "Stable Diffusion's autoencoder, with 4, are known")
    if network["img_channels"] == 4:
        header["latents"] = model.LATENTS.get(network["class"], model.LATENTS["EDM2UNet"])
    with torch.device("meta"): net = model.build(header)
    ours, theirs = ({k: tuple(v.shape) for k, v in d.items()} for d in (net.net.state_dict(), tensors))
    if wrong := [k for k in ours | theirs if ours.get(k) != theirs.get(k)]:
        k = wrong[0]
        raise model.UserError(f"its tensor {k} is {theirs.get(k, 'missing')}, but according to its arguments "
                              f"it is {ours.get(k, 'absent')}")
    net.net.load_state_dict(tensors, assign=True)
    return net, header


def import_checkpoint(path, time=None):
    """A public file -> (model, header). `time`: see --time. Raises UserError, which says what is unknown."""
    try:
        return convert(str(path), time)
    except Exception as e:     # A damaged pickle can raise anything.
        text = str(e)
        if isinstance(e, FileNotFoundError): text = "it does not exist; download it from its publisher"
        elif isinstance(e, OSError): pass
        elif not isinstance(e, model.UserError):
            reason = f"{type(e).__name__}: " + re.split(r"\.\s", text)[0]
            text = f"it is incomplete or of an unknown format ({reason}); download it again"
        raise model.UserError(f"{path} cannot be imported: {text[:400]}.")


def next_command(header, out):
    """The command that uses an imported file."""
    file, vae = shlex.quote(out), " --vae FOLDER" if "latents" in header else ""
    midtrain = f"python midtrain.py --data {shlex.quote(header['data'])} --teacher {file}"
    return {"pretrain": midtrain, "posttrain_cm": f"python sample.py {file}:2{vae}",
            "pretrain_flow": f"{midtrain} --branch mf --init {file} --solver heun --nfe 16",
            "posttrain_mf": f"python sample.py {file}:1{vae}"}[header["stage"]]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=model.Help, allow_abbrev=False)
    p.add_argument("file", metavar="FILE", help="public checkpoint")
    p.add_argument("--data", metavar="NAME",
                   help="dataset of FILE; it names the folder in runs/ (default: the name of FILE)")
    p.add_argument("--time", choices=["data-at-0", "data-at-1"],
                   help="time t of the data, for a SiT velocity model whose file does not say it")
    p.add_argument("--out", metavar="FILE", type=model.output_path, help="result (default: in runs/)")
    args = p.parse_args()
    model.setup(one_process=True)
    row, name, path = model.find_data(args.data) if args.data else (None, Path(args.file).stem, "")
    net, header = import_checkpoint(args.file, args.time)
    shape, network = model.image_shape(header), header["network"]
    if config := model.DATASETS.get(row):
        model.check_fit(args.file, header, f"--data {args.data}", config["shape"], config["classes"],
                        config.get("latents"))
    out = args.out or f"runs/{name}/{header['stage']}.safetensors"
    if Path(out).exists(): raise model.UserError(f"{out} exists; delete it or give another --out.")
    header |= {"data": name, "step": 0, "steps": 0, "data_path": path,
               "imported from": args.file, "sha256 of import": model.sha256(args.file)}
    model.save(out, net.state_dict(), header)
    print(f"{out}: {network['class']}, {sum(p.numel() for p in net.parameters()):,} parameters, "
          f"images {shape}, {network['label_dim']} classes, from {args.file}")
    if its := header.get("latents"):
        print(f"assumed, since the file does not say it: latents of {its['vae']}, pixels in "
              f"{its['pixel_range']}, scale {', '.join(f'{k:.5g}' for k in its['scale'])}")
    print(f"next: {next_command(header, out)}")


if __name__ == "__main__":
    model.run(main)
