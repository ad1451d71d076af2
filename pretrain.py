"""Stage 1, pre-training: a diffusion model D(x, t) ~ E[x_0 | x_t], the teacher of everything after it.

  reads   the images of --data
  writes  runs/D/pretrain.safetensors        (EMA weights; midtrain.py solves their ODE and starts from them)
          runs/D/pretrain_flow.safetensors   with --objective flow: v(z, t) for the mean-flow branch
          or, with --import, a public checkpoint of EDM, EDM2, SiT or Mean Flow as such a file
  run     python pretrain.py                                           # digits, two minutes on two CPU cores
          python pretrain.py --objective flow
          python pretrain.py --data cifar10 --import edm-cifar10-32x32-uncond-vp.pkl
          torchrun --nproc_per_node=8 pretrain.py --data cifar10       # EDM's recipe, 200M images
  cost    per image: one forward and one backward
  expect  digits: the loss, summed over 64 pixels, falls from about 72 to about 26 (flow: to about 22)
"""
import argparse, copy, io, json, math, os, pickle, re, reprlib, struct
from pathlib import Path

import torch
from safetensors import safe_open

import model

# warmup: in images; decay: lr falls to 0 ("linear"), stays ("constant"), or falls as 1/sqrt from a step on.
# EDM: ln t ~ N(P_mean, P_std^2); flow: logit t is. `network`: what differs from the row of model.DATASETS.
# origin: whose numbers they are: EDM (2206.00364, table 7), EDM2 (2312.02696), MeanFlow (2505.13447); all
# others are ours. EDM's and EDM2's augmentation is not built.
ADAM, OURS = dict(optimizer="Adam", beta2=0.999, network={}), dict(decay="linear", P_mean=-1.2, P_std=1.2)
EDM = ADAM | dict(batch=256, decay="constant", warmup=10**7, ema=0.99964, P_mean=-1.2, P_std=1.2,
                  origin={"EDM": "steps batch lr decay warmup ema P_mean P_std optimizer beta2"})
EDM2 = ADAM | dict(batch=2048, warmup=10**7, ema=0.9999, beta2=0.99,
                   origin={"EDM2": "steps batch lr decay P_mean P_std"})
MF = ADAM | dict(decay="constant", P_mean=0.0, P_std=1.0,
                 origin={"MeanFlow": "batch lr decay warmup ema"})
RECIPES = {
    "edm": {
        "digits":      ADAM | OURS | dict(steps=1600,   batch=64,  lr=2e-3, warmup=0,      ema=0.99),
        "cifar10":     EDM | dict(steps=390_625, batch=512, lr=1e-3, ema=0.99929),
        "ffhq64":      EDM | dict(steps=781_250, lr=2e-4),
        "afhqv2-64":   EDM | dict(steps=781_250, lr=2e-4),
        "imagenet64":  EDM2 | dict(steps=500_000, lr=1e-2,   decay=35_000, P_mean=-0.8, P_std=1.6),
        "imagenet512": EDM2 | dict(steps=437_500, lr=6.5e-3, decay=70_000, P_mean=-0.4, P_std=1.0),
        "own data":    ADAM | OURS | dict(steps=20_000, batch=128, lr=1e-3, warmup=12_800, ema=0.999),
    },
    # Nobody published a flow-matching teacher for CMT.
    "flow": {
        "digits":      MF | dict(steps=1600, batch=64, lr=2e-3, decay="linear", warmup=0, ema=0.99,
                                 origin={}),
        "cifar10":     MF | dict(steps=200_000, batch=1024, lr=6e-4, warmup=10**7, ema=0.99995),
        "imagenet256": MF | dict(steps=400_000, batch=256, lr=1e-4, warmup=0, ema=0.9999, network={
                                 "patch_size": 4, "hidden_size": 768, "depth": 12, "num_heads": 12},
                                 origin=MF["origin"] | {"paper": "network"}),
        "own data":    MF | dict(steps=20_000, batch=128, lr=1e-3, decay="linear", warmup=12_800, ema=0.999,
                                 origin={}),
    },
}


# === the method =============================================================================================

def edm_loss(D, x0, eps, t, y, sigma_data=0.5):
    """EDM's denoising loss (2206.00364, eq. 2 with the weight of table 1), one number per sample.
    x0, eps (B,C,H,W), t (B,), y (B,) -> (B,)"""
    x_t = x0 + t[:, None, None, None] * eps
    weight = (t ** 2 + sigma_data ** 2) / (t * sigma_data) ** 2
    # w(t) ||D(x_t, t) - x_0||^2 with w = 1 / c_out(t)^2: the raw network's error counts alike at every t
    return weight * (D(x_t, t, y) - x0).square().sum(dim=(1, 2, 3))


def flow_loss(u, x0, eps, t, y):
    """Flow matching (2210.02747), one number per sample. x0, eps (B,C,H,W), t (B,), y (B,) -> (B,)"""
    t_ = t[:, None, None, None]
    z = (1 - t_) * x0 + t_ * eps
    # ||u(z_t, t, t) - (eps - x_0)||^2
    return (u(z, t, t, y) - (eps - x0)).square().sum(dim=(1, 2, 3))


# === public checkpoints =====================================================================================
# EDM and EDM2 publish pickles of whole Python objects, source code included. Nothing in them is ever run:
# each name a pickle may call is listed here with an inert stand-in, any other is refused, and the objects
# become dictionaries, from which we take weights and constructor arguments.

class Stub:
    """Stands in for an object of the file: keeps its class's name and its state, and does nothing."""
    name, state = "", {}

    def __setstate__(self, state): self.state = state


class Dict(dict):
    def __setstate__(self, state): pass


class Unpickler(pickle._Unpickler):                        # Python's: C's allocates what an index asks for
    """An unpickler that knows the names in `table` {(module, name): stand-in} and no others."""
    def __init__(self, file, table, storages=None):
        super().__init__(file)
        self.table, self.storages = table, storages

    def find_class(self, module, name):
        if (module, name) not in self.table:
            raise model.UserError(f"it asks for {module}.{name}, which is not on the list of what such a file "
                                "needs, and was not run")
        return self.table[module, name]

    def persistent_load(self, pid):
        if not self.storages: raise model.UserError("it refers to storages outside of itself")
        return self.storages(pid)


STORAGES = {("torch", f"{name}Storage"): dtype for name, dtype in dict(
    Float=torch.float32, Half=torch.float16, Double=torch.float64, BFloat16=torch.bfloat16, Long=torch.int64,
    Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8, Bool=torch.bool).items()}


def read_storage(content):
    """The bytes of one storage, as torch wrote them before its zip format. -> tensor (numel,)"""
    def described(pid):
        kind, dtype, key, _, numel, view = pid
        if kind != "storage" or view is not None or type(key) is not str:
            raise model.UserError("it holds a storage of an unknown kind")
        return Dict(dtype=dtype, key=key, numel=numel)
    f = io.BytesIO(content)
    magic, protocol, system = (Unpickler(f, {}).load() for _ in range(3))
    if magic != 0x1950a86a20f9469cfc6c or protocol != 1001 or not system["little_endian"]:
        raise model.UserError("it holds a storage of an unknown format")
    storage, keys = Unpickler(f, STORAGES, described).load(), Unpickler(f, {}).load()
    count, raw = int.from_bytes(f.read(8), "little"), f.read()
    if keys != [storage["key"]] or count != storage["numel"] or len(raw) != count * storage["dtype"].itemsize:
        raise model.UserError("it holds a storage of another size than it says")
    return torch.frombuffer(bytearray(raw), dtype=storage["dtype"]) if count else torch.empty(0)


def read_tensor(storage, offset, size, stride, *_):
    """A strided view of a storage, checked to lie inside it."""
    if len(size) > 8: raise model.UserError(f"it holds a tensor of {len(size)} dimensions")
    numel = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if min((offset, *size, *stride)) < 0 or len(size) != len(stride) or numel and last >= len(storage) or (
            numel > len(storage)):
        raise model.UserError("it holds a tensor that reaches beyond its storage")
    return storage.as_strided(size, stride, offset)


def read_scalar(code, raw):
    letters = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i", "b1": "<?"}
    return struct.unpack(letters[code.state["code"]], raw)[0]


def read_pickle(path):
    """An EDM or EDM2 network pickle -> its object, made of Stub, Dict, tensors and plain Python values."""
    def stub(name="", state=None):
        made = Stub()
        made.name, made.state = name, state or {}
        return made
    class Code(Stub):                                      # a numpy dtype: only its letters matter
        def __setstate__(self, state): pass
    def code(letters, *_):
        made = Code()
        made.state = {"code": letters}
        return made
    left = os.path.getsize(path)
    def storage(content):                                  # a pickle can ask for the same bytes many times
        nonlocal left
        left -= len(content)
        if left < 0: raise model.UserError("its storages are larger than itself")
        return read_storage(content)
    # Lambdas made anew for each file: a pickle can set attributes of whatever it is given.
    table = {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"):
            lambda meta: stub(meta["class_name"], meta["state"]),
        ("torch.nn.modules.container", "ModuleDict"): Stub,
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
        ("torch._utils", "_rebuild_tensor_v2"): lambda *args: read_tensor(*args),
        ("torch.storage", "_load_from_bytes"): storage,
        ("torch", "Size"): tuple, ("torch", "device"): lambda *_: None,
        ("collections", "OrderedDict"): Dict, ("dnnlib.util", "EasyDict"): Dict,
        ("numpy", "dtype"): code, ("numpy", "ndarray"): Stub,
        ("_codecs", "encode"): lambda text, *_: text.encode("latin1"),
        ("copyreg", "_reconstructor"): lambda *_: stub(), ("copy_reg", "_reconstructor"): lambda *_: stub(),
        ("builtins", "object"): Stub,
        ("builtins", "set"): set, ("__builtin__", "set"): set, ("__builtin__", "object"): Stub,
    }
    for core in ("numpy.core", "numpy._core"):
        table |= {(f"{core}.multiarray", "scalar"): lambda *args: read_scalar(*args),
                  (f"{core}.multiarray", "_reconstruct"): lambda *_: stub(),
                  (f"{core}.numeric", "_frombuffer"): lambda *_: stub()}
    with open(path, "rb") as f: return Unpickler(f, table).load()


def tensors_of(module, prefix=""):
    """{name: tensor} of a module in a pickle, named as its state_dict() would."""
    state, found = module.state, {}
    for kind in ("_parameters", "_buffers"):
        found |= {prefix + k: v for k, v in (state.get(kind) or {}).items()
                  if v is not None and k not in state.get("_non_persistent_buffers_set", ())}
    for k, child in (state.pop("_modules", None) or {}).items():             # pop: each module once
        if child is not None: found |= tensors_of(child, f"{prefix}{k}.")
    return found


# Tensors that no network of ours has: augmentation labels, EDM2's uncertainty head, constants.
LEFT_OUT = "map_augment", "logvar", "resample_filter", "num_batches_tracked"


OPTIONAL = "channel_mult_noise", "channel_mult_emb", "clip_act"              # may be None


def fits(k, v, example):
    """Can v be the value of the argument k, of which `example` is one?"""
    if isinstance(example, list): return isinstance(v, list) and all(fits(k, n, 1) for n in v)
    if isinstance(v, float): return isinstance(example, float) and v >= 0
    return type(v) is int and v >= 0 or v is None and k in OPTIONAL


def take(kwargs, honoured, only, ignored):
    """Every constructor argument is honoured, or has one of the values we build, or changes no output, or is
    refused by name. -> the honoured ones, defaults filled in; `int` instead of one: there is none"""
    for k, v in kwargs.items():
        v = list(v) if isinstance(v, tuple) else v
        if k in honoured and fits(k, v, honoured[k]) or k in ignored or k in only and v in only[k]: continue
        raise model.UserError(f"its network has {k} = {reprlib.repr(v)}, which we do not build"
                            + (f", only {' or '.join(map(repr, only[k]))}" if k in only else ""))
    if missing := [k for k, v in honoured.items() if v is int and k not in kwargs]:
        raise model.UserError(f"it does not say {missing[0]}, an argument of its network; a .safetensors says "
                            "it in its metadata")
    return {k: kwargs.get(k, v) for k, v in honoured.items()}


def edm_header(kwargs):
    """EDM's constructor arguments, its defaults filled in -> our header."""
    if kwargs.get("model_type", "DhariwalUNet") == "DhariwalUNet" and kwargs:
        raise model.UserError("its network is ADM (DhariwalUNet), which we do not build, only DDPM++")
    if kwargs.get("encoder_type") == "residual":
        raise model.UserError("its network is NCSN++, which we do not build, only DDPM++")
    mine = take(kwargs, dict(img_resolution=int, img_channels=int, label_dim=0, model_channels=128,
                             channel_mult=[1, 2, 2, 2], channel_mult_emb=4, num_blocks=4,
                             attn_resolutions=[16], dropout=0.1, label_dropout=0.0, sigma_data=0.5,
                             sigma_min=0.0, sigma_max=math.inf),
                dict(model_type=["SongUNet"], embedding_type=["positional"], encoder_type=["standard"],
                     decoder_type=["standard"], channel_mult_noise=[1], resample_filter=[[1, 1]]),
                ["use_fp16", "augment_dim"])
    return denoiser_header("DDPMpp", mine)


def edm2_header(kwargs):
    """EDM2's constructor arguments, its defaults filled in -> our header."""
    mine = take(kwargs, dict(img_resolution=int, img_channels=int, label_dim=0, model_channels=192,
                             channel_mult=[1, 2, 3, 4], channel_mult_noise=None, channel_mult_emb=None,
                             num_blocks=3, attn_resolutions=[16, 8], label_balance=0.5, concat_balance=0.5,
                             channels_per_head=64, dropout=0.0, res_balance=0.3, attn_balance=0.3,
                             clip_act=256.0, sigma_data=0.5),
                dict(resample_filter=[[1, 1]]), ["use_fp16", "logvar_channels"])
    return denoiser_header("EDM2UNet", mine)


def denoiser_header(name, kwargs):
    t_min, t_max = max(0.002, kwargs.pop("sigma_min", 0.0)), min(80.0, kwargs.pop("sigma_max", 80.0))
    return {"kind": "Denoiser", "sigma_data": kwargs.pop("sigma_data"), "noise_scale": 1.0, "t_min": t_min,
            "t_max": t_max, "label_dropout": kwargs.pop("label_dropout", 0.0),
            "network": {"class": name, **kwargs}}


def sit_header(tensors, kwargs):
    """Weights of a SiT, whose shapes say almost all, and constructor arguments -> our header."""
    dim, C, patch, _ = tensors["x_embedder.proj.weight"].shape
    heads = {384: 6, 768: 12, 1024: 16, 1152: 16}.get(dim)
    mine = take(kwargs, dict(num_heads=heads or int, class_dropout_prob=kwargs.get("cfg_prob", 0.1)),
                dict(path_type=["linear", "Linear"], prediction=["velocity", "v"], qk_norm=[False],
                     mlp_ratio=[4.0]),
                ["name", "input_size", "patch_size", "in_channels", "num_classes", "hidden_size", "depth",
                 "decoder_hidden_size", "learn_sigma", "use_cfg", "fused_attn", "cfg_prob"])
    network = {"class": "SiT", "img_resolution": math.isqrt(tensors["pos_embed"].shape[1]) * patch,
               "img_channels": C, "label_dim": len(tensors["y_embedder.embedding_table.weight"]) - 1,
               "patch_size": patch, "hidden_size": dim, "num_heads": mine["num_heads"],
               "depth": len({k.split(".")[1] for k in tensors if k.startswith("blocks.")}),
               "interval": any(k.startswith("r_embedder.") for k in tensors)}
    if kwargs.get("num_classes", network["label_dim"]) != network["label_dim"]:
        raise model.UserError("it has no null class, which we need")
    return {"kind": "MeanVelocity", "time_scale": 1.0, "t_min": 0.0, "t_max": 1.0,
            "label_dropout": mine["class_dropout_prob"], "network": network}


def check(header):
    """Arguments that are possible one by one also have to make sense together."""
    n = header["network"]
    for wrong, what in [
        (header["t_min"] >= header["t_max"], "no time between sigma_min and sigma_max"),
        (header.get("sigma_data", 1) <= 0, "sigma_data = 0"),
        (max(header["label_dropout"], n.get("dropout", 0)) >= 1, "a dropout of 1"),
        (n.get("hidden_size", 0) % n.get("num_heads", 1), f"{n.get('num_heads')} heads for its width")]:
        if wrong: raise model.UserError(f"its arguments describe {what}")


def reverse_time(tensors):
    """Public SiT runs time the other way and also predicts a variance: v(z, t) = -SiT(z, 1 - t), first C
    channels. The sinusoids of 1 - t are linear in those of t, so two layers take it all. -> weights of v"""
    cos, sin = tensors["t_embedder.mlp.0.weight"].double().chunk(2, dim=1)
    f = 1e-4 ** (torch.arange(cos.shape[1], dtype=torch.float64) / cos.shape[1])
    # cos(f (1 - t)) = cos f cos ft + sin f sin ft,   sin(f (1 - t)) = sin f cos ft - cos f sin ft
    turned = torch.cat([cos * f.cos() + sin * f.sin(), cos * f.sin() - sin * f.cos()], dim=1)
    C, patch = tensors["x_embedder.proj.weight"].shape[1:3]
    final = {k: -tensors[k].unflatten(0, (patch ** 2, -1))[:, :C].flatten(0, 1)            # rows (p q c)
             for k in ("final_layer.linear.weight", "final_layer.linear.bias")}
    return tensors | final | {"t_embedder.mlp.0.weight": turned.float()}


def read_public(path):
    """-> class name or None, constructor arguments, {name: tensor} of a public file, names as published."""
    if path.endswith(".pkl"):
        net = read_pickle(path)["ema"]
        return net.name, dict(net.state["_init_kwargs"]), tensors_of(net)
    if path.endswith((".pt", ".pth")):
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                file = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as e:                # torch's own text says how to run it all the same
            name = re.search(r"GLOBAL (\S+)", str(e))
            raise model.UserError(f"it asks for {name[1] if name else 'more than tensors'}, which was not run")
        args = vars(file["args"]) if isinstance(file.get("args"), argparse.Namespace) else {}
        kwargs = {k: args[k] for k in ("num_heads", "qk_norm", "num_classes", "path_type", "prediction",
                                       "cfg_prob") if k in args}
        names = [k for k in ("ema", "model", "state_dict") if isinstance(file.get(k), dict)]
        return None, kwargs, file[names[0]] if names else file
    with safe_open(path, "pt") as f:
        if "config" not in (f.metadata() or {}):
            raise model.UserError("its metadata has no `config`, its network's constructor arguments as JSON")
        config, tensors = json.loads(f.metadata()["config"]), {k: f.get_tensor(k) for k in f.keys()}
    return config.pop("class", None), config.get("kwargs", config), tensors


def our_names(tensors):
    """Tensors under our names: without wrappers, and without those that no network of ours has."""
    found = {}
    for k, v in tensors.items():
        if any(name in k for name in LEFT_OUT): continue
        k = re.sub(r"^((module|_orig_mod|model|unet)\.)+", "", k)
        if k in found: raise model.UserError(f"it holds {k} twice")
        if not v.is_floating_point(): raise model.UserError(f"its {k} is {v.dtype}")
        found[k] = v
    return found


def one_line(message):
    """A message that may quote the file, fit for a terminal."""
    return "".join(c if c.isprintable() else " " for c in str(message)[:300])


def import_checkpoint(path):
    """A public file -> (model, header). Raises UserError, naming what is not known."""
    try:
        kind, kwargs, tensors = read_public(str(path))
        tensors = our_names(tensors)
        if sum(v.nbytes for v in tensors.values()) > os.path.getsize(path):
            raise model.UserError("its tensors are larger than itself")
        kind = (kind or "").rpartition(".")[2] or ("SiT" if "x_embedder.proj.weight" in tensors else
                                                   "Precond" if "out_gain" in tensors else "EDMPrecond")
        tensors = {k: v.float() for k, v in tensors.items()}
        if kind == "SiT":
            header = sit_header(tensors, kwargs)
            if not header["network"]["interval"]: tensors = reverse_time(tensors)
        elif kind in ("EDMPrecond", "Precond"):
            header = {"EDMPrecond": edm_header, "Precond": edm2_header}[kind](kwargs)
        else:
            raise model.UserError(f"it holds a {kind}, which we do not know")
        check(header)
        if header["network"]["img_channels"] == 4:
            header["latents"] = model.LATENTS.get(header["network"]["class"], model.LATENTS["EDM2UNet"])
        net = model.build_for(header, tensors)
        ours, theirs = ({k: tuple(v.shape) for k, v in d.items()} for d in (net.net.state_dict(), tensors))
        if wrong := [k for k in ours | theirs if ours.get(k) != theirs.get(k)]:
            raise model.UserError(f"its {wrong[0]} is {theirs.get(wrong[0])}, its arguments make it "
                                f"{ours.get(wrong[0])}")
        net.net.load_state_dict(tensors, assign=True)
        return net, header
    except FileNotFoundError:
        raise model.UserError(f"{path} does not exist; download it from its publisher.")
    except model.UserError as e:
        raise model.UserError(f"{path} cannot be imported: {one_line(e)}.")
    except Exception as e:                                 # a damaged pickle can raise anything
        raise model.UserError(f"{path} is damaged or not a checkpoint we know ({type(e).__name__}: "
                            f"{one_line(e) or 'no reason'}).")


# === the run ================================================================================================

def write_import(args, default_out):
    """--import: the public checkpoint as a file of this project."""
    model.setup(None)
    net, header = import_checkpoint(args.public)
    shape, network = model.image_shape(header), header["network"]
    stage = ("pretrain" if header["kind"] == "Denoiser" else
             "posttrain_mf" if network["interval"] else "pretrain_flow")
    name = args.name if model.peek_flag("--data", None) else Path(args.public).stem
    if row := model.peek_flag("--data", None) and model.DATASETS.get(args.row):
        model.check_fit(args.public, header, f"--data {args.data}", row["shape"], row["classes"])
    out = f"runs/{name}/{stage}.safetensors" if args.out == default_out else args.out
    if Path(out).exists(): raise model.UserError(f"{out} exists; delete it or give another --out.")
    header |= {"stage": stage, "data": name, "step": 0, "steps": 0,
               "data_path": args.path if model.peek_flag("--data", None) else "",
               "imported from": args.public, "sha256 of import": model.sha256(args.public)}
    model.save(out, net.state_dict(), header)
    print(f"{out}: {network['class']}, {sum(p.numel() for p in net.parameters()):,} parameters, "
          f"images {shape}, {network['label_dim']} classes, from {args.public}")


def flags():
    """The command line -> args"""
    objective = model.peek_flag("--objective", "edm", RECIPES)
    stage = {"edm": "pretrain", "flow": "pretrain_flow"}[objective]
    p = model.parser(__doc__, RECIPES[objective], reads=None, writes=stage)
    p.add_argument("--objective", choices=RECIPES, default="edm", help="edm: denoising; flow: flow matching")
    p.add_argument("--import", dest="public", metavar="FILE.pkl|.pt|.safetensors",
                   help="do not train, convert a public checkpoint; without --data named after it")
    args = p.parse_args()
    args.kind, args.stage, args.default_out = model.KIND[stage], stage, p.get_default("out")
    return args


def main():
    args = flags()
    if args.public: return write_import(args, args.default_out)
    if args.dry_run:
        header = model.expected_header(None, args, args.kind, **args.network)
        return model.dry_run(args, "images", header, forwards=0, reads={args.path: model.DATA_HINT})
    rank, world, device, batch = model.setup(args.batch, args.precision)

    images, dataset = model.read_images(args.path, model.DATASETS.get(args.row))
    model.reseed(args.seed)
    header = model.fresh_header(dataset, args.kind, **args.network)
    net = model.build(header).to(device).train()
    header |= model.run_metadata(args, args.stage, "images", world, data=args.path)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    net.backbone_dtype = model.DTYPES[args.precision]
    ddp = model.compiled(model.parallel(net, world), args.compile)
    optimizer = model.optimizer(args, net)

    step = start = model.resume_run(args.out, net, ema, optimizer, header)
    if step == 0: model.normalise_weights(net)
    log, stop, save = model.Log(args, "images", world, step), model.Stop(world), model.SaveTimer(args)
    if rank == 0: print(images)
    data = model.read_ahead(images, args, rank, batch, step)
    while True:
        done = step == args.steps or stop(step)
        if rank == 0 and step > start and (done or save.due(step)):
            model.save_run(args, step, net, ema, optimizer, header)
        if done: break

        model.reseed(args.seed, rank, step)
        x0, y = (a.to(device, non_blocking=True) for a in next(data))
        x0 = model.to_network(x0, header)                                          # (b, C, H, W)
        y = model.drop_labels(y, header)                                           # (b,)
        t = args.P_mean + args.P_std * torch.randn(batch, device=device)
        t = t.exp() if args.objective == "edm" else t.sigmoid()                    # (b,)
        eps = torch.randn_like(x0)

        mean_loss = 0
        for x0, eps, t, y in model.microbatches(ddp, args.microbatch, x0, eps, t, y):
            if args.objective == "edm": loss = edm_loss(ddp, x0, eps, t, y).sum() / batch
            else:                       loss = flow_loss(ddp, x0, eps, t, y).sum() / batch
            loss.backward()
            mean_loss += loss.detach()

        lr = model.learning_rate(args, step)
        norm = model.gradient_norm(net)
        if math.isfinite(norm):
            for group in optimizer.param_groups: group["lr"] = lr
            optimizer.step()
            model.update_ema(ema, net, decay=min(args.ema, (1 + step) / (10 + step)))
            model.normalise_weights(net)
        optimizer.zero_grad(set_to_none=True)
        step += 1
        log(step, mean_loss, norm, lr)


if __name__ == "__main__":
    model.run(main)
