"""Networks, parameterisations, datasets, checkpoints, and the training code that all stages share.

Notation. t = 0 is data. B batch, C channels, H W pixels, N solver steps, K classes.

             consistency branch: EDM's time (arXiv 2206.00364)    mean-flow branch: flow time (2505.13447)
  noising    x_t = x_0 + t eps,  t in [0.002, 80]                 z_t = (1 - t) x_0 + t eps,  t in [0, 1]
  PF-ODE     dx/dt = (x - D(x, t)) / t                            dz/dt = v(z, t)
  teacher    D(x, t) ~ E[x_0 | x_t]                               v(z, t) = u(z, t, t) ~ E[eps - x_0 | z_t]
  student    f(x, t) ~ Psi_{t->0}(x), the endpoint of the ODE     u(z, r, t) ~ (z_t - z_r) / (t - r)
  jump       Psi_{t->0}(x) = f(x, t)                              Psi_{t->r}(z) = z - (t - r) u(z, r, t)
  module     `Denoiser`, for teacher and student                  `MeanVelocity`, for teacher and student

eps ~ N(0, I). Labels y (B,) int64 in 0..K-1; y = K is the null label; None means null for the whole batch.

Sections: 1 networks, 2 parameterisation, 3 datasets, 4 checkpoints, 5 images, 6 running a stage.
model.py imports nothing of this project.
"""
import argparse, contextlib, functools, gc, hashlib, json, math, os
import re, shlex, shutil, signal, struct, sys, time, traceback, uuid, warnings, zipfile, zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

try: import fcntl
except ImportError: fcntl = None                           # Windows
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class UserError(Exception):
    """Bad input. The message says what is wrong and what to do. `run` prints it and exits with `code`."""
    code = 2


class Diverged(UserError):
    """Gradients, weights or outputs are not finite."""
    code = 3


# === 1. networks ============================================================================================
# Every network is called as net(x, t, y, gap) -> (B,C,H,W).
#   x    (B,C,H,W), in the backbone's dtype
#   t    (B,) fp32 or float64, scaled: noise_scale ln(t)/4 from `Denoiser`, time_scale t from `MeanVelocity`
#   y    (B,) or None
#   gap  (B,) like t, time_scale (t - r), from `MeanVelocity` only. Networks without `interval` ignore it
# Each layer casts its weights to the dtype of its input: bf16, fp32, or float64 in exact tests. Autocast is
# not used.

class Linear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Conv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), self.stride, self.padding)


class Norm(nn.GroupNorm):
    """GroupNorm with at least 4 channels in each of at most 32 groups."""
    def __init__(self, channels):
        super().__init__(min(32, channels // 4), channels, eps=1e-6)

    def forward(self, x):
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def initialised(layer, gain=1.0):
    """Xavier-uniform weights times `gain` (1e-5 starts a residual branch near zero), zero bias."""
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of a time, then two layers, named as in SiT. t (B,) -> (B, dim) in t's dtype.
    starts_at_zero: for the embedding of t - r, which turns v(z, t) into u(z, r, t); at first u = v."""
    def __init__(self, dim, starts_at_zero=False):
        super().__init__()
        self.mlp = nn.Sequential(Linear(256, dim), nn.SiLU(), Linear(dim, dim))
        for layer in self.mlp[::2]:
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        if starts_at_zero: nn.init.zeros_(self.mlp[2].weight)

    def forward(self, t):
        angles = t[:, None] * 1e-4 ** (torch.arange(128, device=t.device, dtype=t.dtype) / 128)  # (B, 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


def resize(x, resample):
    """Halve ("down"), double ("up") or keep (None) the resolution. x (B,C,H,W)"""
    if resample == "down": return F.avg_pool2d(x, 2)
    if resample == "up":
        # Nearest neighbour. F.interpolate has wrong gradients if torch 2.13 compiles it for a CPU; on CUDA
        # its compiled gradients vary (atomic additions).
        return repeat(x, "b c h w -> b c (h 2) (w 2)")
    return x


def self_attention(qkv, heads, norm=lambda x: x):
    """Attention between all pixels. qkv (B,3C,H,W), its channels ordered head, channel, q k v; norm is
    applied to q, k and v -> (B,C,H,W)"""
    H, W = qkv.shape[2:]
    qkv = rearrange(qkv, "b (n c three) h w -> three b n (h w) c", n=heads, three=3)
    q, k, v = norm(qkv.contiguous())                       # fused kernels need contiguous channels
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b n (h w) c -> b (n c) h w", h=H, w=W)


class Block(nn.Module):
    """Residual block of DDPM++: norm, conv, add the time embedding, norm, dropout, conv; then self-attention.
    Sums of a skip connection and its branch are scaled by sqrt(1/2). `resample` is "down", "up" or None."""
    def __init__(self, c_in, c_out, emb_dim, dropout=0.0, attention=False, resample=None):
        super().__init__()
        self.resample, self.dropout = resample, dropout
        self.norm0 = Norm(c_in)
        self.conv0 = initialised(Conv(c_in, c_out, 3, padding=1))
        self.affine = initialised(Linear(emb_dim, c_out))
        self.norm1 = Norm(c_out)
        self.conv1 = initialised(Conv(c_out, c_out, 3, padding=1), 1e-5)
        self.skip = initialised(Conv(c_in, c_out, 1)) if c_in != c_out or resample else None
        if attention:
            self.norm2 = Norm(c_out)
            self.qkv = initialised(Conv(c_out, 3 * c_out, 1), 0.2 ** 0.5)
            self.proj = initialised(Conv(c_out, c_out, 1), 1e-5)
        self.attention = attention

    def forward(self, x, emb):                                           # x (B, c_in, H, W), emb (B, emb_dim)
        h = self.conv0(resize(F.silu(self.norm0(x)), self.resample))     # (B, c_out, H', W')
        h = h + self.affine(emb)[:, :, None, None].to(h.dtype)
        h = self.conv1(F.dropout(F.silu(self.norm1(h)), self.dropout, self.training))
        x = ((self.skip(resize(x, self.resample)) if self.skip else x) + h) * 0.5 ** 0.5
        if self.attention:
            x = (x + self.proj(self_attention(self.qkv(self.norm2(x)), heads=1))) * 0.5 ** 0.5
        return x


def unet(conv_in, c, resolution, widths, num_blocks, attn_resolutions, enc_block, dec_block, attend_all):
    """The layers of a U-Net with EDM's names. Each level has `num_blocks` encoder blocks and
    num_blocks + 1 decoder blocks of its width. `c`: output channels of `conv_in`. At `attn_resolutions` all
    decoder blocks of a level have attention if `attend_all`, otherwise only the last.
    -> encoder, decoder (ModuleDict)"""
    sizes = [resolution >> level for level in range(len(widths))]
    enc, dec, skips = nn.ModuleDict(), nn.ModuleDict(), []
    for level, (s, width) in enumerate(zip(sizes, widths)):
        if level == 0: enc[f"{s}x{s}_conv"] = conv_in
        else:          enc[f"{s}x{s}_down"] = enc_block(c, c, resample="down")
        skips.append(c)
        for i in range(num_blocks):
            enc[f"{s}x{s}_block{i}"] = enc_block(c, width, attention=s in attn_resolutions)
            c = width
            skips.append(c)
    for level, (s, width) in reversed(list(enumerate(zip(sizes, widths)))):
        if level == len(sizes) - 1:
            dec[f"{s}x{s}_in0"] = dec_block(c, c, attention=True)
            dec[f"{s}x{s}_in1"] = dec_block(c, c)
        else:
            dec[f"{s}x{s}_up"] = dec_block(c, c, resample="up")
        for i in range(num_blocks + 1):
            attend = s in attn_resolutions and (attend_all or i == num_blocks)
            dec[f"{s}x{s}_block{i}"] = dec_block(c + skips.pop(), width, attention=attend)
            c = width
    return enc, dec


def run_unet(enc, dec, x, emb, cat):
    """x (B,C,H,W), emb (B,emb_dim). `cat` joins the input of a decoder block with its skip connection."""
    skips = []
    for name, layer in enc.items():
        x = layer(x) if name.endswith("conv") else layer(x, emb)
        skips.append(x)
    for name, layer in dec.items():
        x = layer(cat(x, skips.pop()) if "block" in name else x, emb)
    return x


def one_hot(y, t, classes):
    """y (B,) or None -> sqrt(classes) times one-hot (B,classes), in the dtype of t (B,); zeros for the null
    label"""
    y = torch.full_like(t, classes, dtype=torch.int64) if y is None else y
    return F.one_hot(y, classes + 1)[:, :-1].to(t.dtype) * classes ** 0.5


class DDPMpp(nn.Module):
    """The DDPM++ U-Net of Song et al. (2011.13456) in EDM's configuration (2206.00364, table 7). Parameter
    names and constructor arguments are EDM's, so its published weights fit by name; EDM's augmentation input
    is not built. `interval` adds an embedding of t - r (ours)."""
    def __init__(self, img_resolution, img_channels, label_dim=0, model_channels=128, channel_mult=(2, 2, 2),
                 num_blocks=4, attn_resolutions=(16,), dropout=0.0, interval=False, channel_mult_emb=4):
        super().__init__()
        emb_dim = channel_mult_emb * model_channels
        self.label_dim, self.model_channels = label_dim, model_channels
        if label_dim:
            self.map_label = initialised(Linear(label_dim, model_channels))
        self.map_layer0 = initialised(Linear(model_channels, emb_dim))
        self.map_layer1 = initialised(Linear(emb_dim, emb_dim))
        self.r_embedder = TimeEmbedding(emb_dim, starts_at_zero=True) if interval else None
        block = functools.partial(Block, emb_dim=emb_dim, dropout=dropout)
        conv_in = initialised(Conv(img_channels, model_channels, 3, padding=1))
        widths = [model_channels * m for m in channel_mult]
        self.enc, self.dec = unet(conv_in, model_channels, img_resolution, widths, num_blocks,
                                  attn_resolutions, block, block, attend_all=False)
        self.dec[f"{img_resolution}x{img_resolution}_aux_norm"] = Norm(widths[0])
        self.dec[f"{img_resolution}x{img_resolution}_aux_conv"] = initialised(
            Conv(widths[0], img_channels, 3, padding=1), 1e-5)

    def embed(self, t, y, gap=None):                                         # -> (B, emb_dim), never in bf16
        i = torch.arange(self.model_channels // 2, device=t.device, dtype=t.dtype)
        angles = t[:, None] * 1e-4 ** (i / (len(i) - 1))                     # (B, model_channels / 2)
        emb = torch.cat([angles.sin(), angles.cos()], dim=1)
        if self.label_dim: emb = emb + self.map_label(one_hot(y, t, self.label_dim))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        return F.silu(emb + self.r_embedder(gap) if self.r_embedder else emb)

    def forward(self, x, t, y=None, gap=None):
        *dec, (_, norm), (_, conv) = self.dec.items()
        x = run_unet(self.enc, dict(dec), x, self.embed(t, y, gap), lambda *xs: torch.cat(xs, dim=1))
        return conv(F.silu(norm(x)))


# EDM2's parts (2312.02696). It keeps the magnitude (root-mean-square) of activations and weights at 1.

def normalise(x, dims):
    """x / rms(x over dims), computed in at least fp32. 1e-4 avoids a division by zero."""
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(x32, dim=dims, keepdim=True)
    return (x32 / (1e-4 + norm * (norm.numel() / x.numel()) ** 0.5)).to(x.dtype)


def mp_silu(x):                                                              # eq. 81
    return F.silu(x) / 0.596


def mp_sum(a, b, w):                                                         # eq. 88
    return a.lerp(b, w) / ((1 - w) ** 2 + w ** 2) ** 0.5


def mp_cat(a, b, w):                                                         # eq. 103
    scale = ((a.shape[1] + b.shape[1]) / ((1 - w) ** 2 + w ** 2)) ** 0.5
    return torch.cat([scale * (1 - w) / a.shape[1] ** 0.5 * a, scale * w / b.shape[1] ** 0.5 * b], dim=1)


class MPFourier(nn.Module):
    """Random Fourier features of a time (eq. 75). (B,) -> (B, channels)"""
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, t):
        return (t[:, None] * self.freqs.to(t) + self.phases.to(t)).cos() * 2 ** 0.5


class MPConv(nn.Module):
    """Convolution, or with kernel 0 a linear layer. The weights of each output channel are normalised in
    every forward pass (eq. 47). `normalise_weights` also stores them normalised after every optimizer step
    (eq. 66)."""
    def __init__(self, c_in, c_out, kernel=0):
        super().__init__()
        shape = (c_out, c_in, kernel, kernel) if kernel else (c_out, c_in)
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x, gain=1.0):
        w = self.weight.to(torch.promote_types(x.dtype, torch.float32))
        w = (normalise(w, tuple(range(1, w.dim()))) * gain / w[0].numel() ** 0.5).to(x.dtype)
        return F.linear(x, w) if w.dim() == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


@torch.no_grad()
def normalise_weights(net):
    """Forced weight normalisation (EDM2, 2312.02696, eq. 66): give the weights of each output channel of
    every MPConv magnitude 1, before the first step and after every optimizer step. This keeps the effective
    learning rate constant. It is not idempotent (a second call moves weights by about 1e-5), so a resumed run
    does not begin with it. Other networks stay unchanged."""
    for layer in net.modules():
        if isinstance(layer, MPConv):
            layer.weight.copy_(normalise(layer.weight, tuple(range(1, layer.weight.dim()))))


class MPBlock(nn.Module):
    """EDM2's block: a residual branch, modulated by the embedding, then self-attention. An encoder block
    normalises its input at every pixel. `resample` is "down", "up" or None."""
    def __init__(self, c_in, c_out, emb_dim, encoder, attention=False, resample=None, channels_per_head=64,
                 dropout=0.0, res_balance=0.3, attn_balance=0.3, clip_act=256.0):
        super().__init__()
        self.encoder, self.resample, self.dropout, self.clip = encoder, resample, dropout, clip_act
        self.res_balance, self.attn_balance = res_balance, attn_balance
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(c_out if encoder else c_in, c_out, 3)
        self.emb_linear = MPConv(emb_dim, c_out)
        self.conv_res1 = MPConv(c_out, c_out, 3)
        self.conv_skip = MPConv(c_in, c_out, 1) if c_in != c_out else None
        self.heads = c_out // channels_per_head
        self.attention = attention and self.heads > 0
        if self.attention:
            self.attn_qkv = MPConv(c_out, 3 * c_out, 1)
            self.attn_proj = MPConv(c_out, c_out, 1)

    def forward(self, x, emb):                                           # x (B, c_in, H, W), emb (B, emb_dim)
        x = resize(x, self.resample)
        if self.encoder: x = normalise(self.conv_skip(x) if self.conv_skip else x, 1)
        h = self.conv_res0(mp_silu(x))
        h = mp_silu(h * (self.emb_linear(emb, self.emb_gain) + 1)[:, :, None, None].to(h.dtype))
        h = self.conv_res1(F.dropout(h, self.dropout, self.training))
        if not self.encoder and self.conv_skip: x = self.conv_skip(x)
        x = mp_sum(x, h, self.res_balance)
        if self.attention:
            a = self_attention(self.attn_qkv(x), self.heads, lambda qkv: normalise(qkv, -1))
            x = mp_sum(x, self.attn_proj(a), self.attn_balance)
        return x.clamp(-self.clip, self.clip) if self.clip else x


class EDM2UNet(nn.Module):
    """The magnitude-preserving U-Net of EDM2 (2312.02696, config G). Parameter names and constructor
    arguments are EDM2's, so its published weights fit by name; its uncertainty head (logvar) is not built.
    `interval` adds an embedding of t - r (ours); only `dropout_resolutions` have dropout (ECT's)."""
    def __init__(self, img_resolution, img_channels, label_dim=0, model_channels=192,
                 channel_mult=(1, 2, 3, 4), channel_mult_noise=None, channel_mult_emb=None, num_blocks=3,
                 attn_resolutions=(16, 8), label_balance=0.5, concat_balance=0.5, interval=False,
                 dropout_resolutions=None, **block):
        super().__init__()
        self.label_dim, self.label_balance, self.concat_balance = label_dim, label_balance, concat_balance
        widths = [model_channels * m for m in channel_mult]
        emb_dim = model_channels * channel_mult_emb if channel_mult_emb else max(widths)
        noise_dim = model_channels * channel_mult_noise if channel_mult_noise else widths[0]
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise_dim)
        self.emb_noise = MPConv(noise_dim, emb_dim)
        self.emb_label = MPConv(label_dim, emb_dim) if label_dim else None
        self.r_embedder = TimeEmbedding(emb_dim, starts_at_zero=True) if interval else None
        block = functools.partial(MPBlock, emb_dim=emb_dim, **block)
        conv_in = MPConv(img_channels + 1, widths[0], 3)                         # + 1: a channel of ones
        self.enc, self.dec = unet(conv_in, widths[0], img_resolution, widths, num_blocks, attn_resolutions,
                                  functools.partial(block, encoder=True),
                                  functools.partial(block, encoder=False), attend_all=True)
        self.out_conv = MPConv(widths[0], img_channels, 3)
        for name, layer in [*self.enc.items(), *self.dec.items()]:
            if dropout_resolutions and int(name.split("x")[0]) not in dropout_resolutions: layer.dropout = 0.0

    def forward(self, x, t, y=None, gap=None):
        emb = self.emb_noise(self.emb_fourier(t))                            # (B, emb_dim), never in bf16
        if self.label_dim:
            emb = mp_sum(emb, self.emb_label(one_hot(y, t, self.label_dim)), self.label_balance)
        if self.r_embedder: emb = emb + self.r_embedder(gap)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        x = run_unet(self.enc, self.dec, x, mp_silu(emb), lambda a, b: mp_cat(a, b, self.concat_balance))
        return self.out_conv(x, self.out_gain)


def adaptive_norm(x, shift, scale):
    """LayerNorm without parameters, then an affine map per sample. x (B,T,D), shift, scale (B,D)"""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def positions(side, dim):
    """Fixed sine-cosine embedding of a grid, half of the features for each axis. dim: a multiple of 4
    -> (side^2, dim)"""
    omega = 1e-4 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    line = torch.arange(side, dtype=torch.float64)[:, None] * omega                     # (side, dim / 4)
    line = torch.cat([line.sin(), line.cos()], dim=1)                                   # (side, dim / 2)
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, 0)], dim=1).float()


class SiTBlock(nn.Module):
    """Transformer block whose norms and residual branches are modulated by the embedding c (adaLN-Zero)."""
    def __init__(self, dim, heads, mlp_ratio):
        super().__init__()
        self.heads, hidden = heads, round(dim * mlp_ratio)
        self.attn = nn.ModuleDict({"qkv": initialised(Linear(dim, 3 * dim)),
                                   "proj": initialised(Linear(dim, dim))})
        self.mlp = nn.Sequential(OrderedDict(fc1=initialised(Linear(dim, hidden)), act=nn.GELU("tanh"),
                                             fc2=initialised(Linear(hidden, dim))))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), initialised(Linear(dim, 6 * dim), 0.0))

    def attend(self, x):                                                     # (B, T, D)
        q, k, v = rearrange(self.attn["qkv"](x), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.attn["proj"](rearrange(x, "b h t d -> b t (h d)"))

    def forward(self, x, c):                                                 # x (B, T, D), c (B, D) fp32
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).to(x.dtype).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attend(adaptive_norm(x, shift1, scale1))
        return x + gate2[:, None] * self.mlp(adaptive_norm(x, shift2, scale2))


class SiT(nn.Module):
    """The diffusion transformer SiT (2401.08740) with Mean Flow's time r (2505.13447): the embeddings of
    t, t - r and y are summed. Parameter names are the public implementations'. `interval` builds the
    embedding of t - r."""
    def __init__(self, img_resolution, img_channels, label_dim, patch_size=2, hidden_size=1152, depth=28,
                 num_heads=16, interval=False, mlp_ratio=4.0):
        super().__init__()
        self.label_dim, self.patch = label_dim, patch_size
        side, dim = img_resolution // patch_size, hidden_size
        self.x_embedder = nn.ModuleDict({
            "proj": initialised(Conv(img_channels, dim, patch_size, stride=patch_size))})
        nn.init.xavier_uniform_(self.x_embedder["proj"].weight.flatten(1))   # as nn.Linear on patches
        self.t_embedder = TimeEmbedding(dim)
        self.r_embedder = TimeEmbedding(dim, starts_at_zero=True) if interval else None
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(label_dim + 1, dim)})
        nn.init.normal_(self.y_embedder["embedding_table"].weight, std=0.02)
        self.register_buffer("pos_embed", positions(side, dim)[None])        # (1, T, D)
        self.blocks = nn.ModuleList([SiTBlock(dim, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = nn.ModuleDict({
            "linear": initialised(Linear(dim, patch_size ** 2 * img_channels), 0.0),
            "adaLN_modulation": nn.Sequential(nn.SiLU(), initialised(Linear(dim, 2 * dim), 0.0))})

    def forward(self, x, t, y=None, gap=None):
        y = torch.full_like(t, self.label_dim, dtype=torch.int64) if y is None else y
        # c (B, D): the null label has the last row of the table
        c = self.t_embedder(t) + self.y_embedder["embedding_table"](y).to(t.dtype)
        if self.r_embedder: c = c + self.r_embedder(gap)
        h = self.x_embedder["proj"](x)                                       # (B, D, H/p, W/p)
        side = h.shape[2]
        h = rearrange(h, "b d h w -> b (h w) d") + self.pos_embed.to(h.dtype)
        for block in self.blocks: h = block(h, c)
        shift, scale = self.final_layer["adaLN_modulation"](c).to(h.dtype).chunk(2, dim=1)
        h = self.final_layer["linear"](adaptive_norm(h, shift, scale))       # (B, T, p p C)
        return rearrange(h, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=self.patch, q=self.patch)


# === 2. parameterisation ====================================================================================

class Denoiser(nn.Module):
    """EDM preconditioning (2206.00364, eq. 7 and table 1) around a raw network: diffusion teacher *and*
    consistency model.

        D(x, t) = c_skip x + c_out F(c_in x, c_noise, y),   c_skip(0) = 1, c_out(0) = 0: D(x, 0) = x exactly.

    c_noise = noise_scale ln(t)/4; EDM's is noise_scale = 1.

    x (B,C,H,W), t (B,), y (B,) int64 or None -> (B,C,H,W). fp32 in, fp32 out; only the backbone F runs in
    `backbone_dtype`. bf16 would merge the values ln(t)/4 of times that differ by up to 3 %, and at small t
    the sum would lose c_out F. A float64 input stays float64 throughout.
    """
    def __init__(self, net, sigma_data=0.5, noise_scale=1.0):
        super().__init__()
        self.net, self.backbone_dtype = net, torch.float32
        self.sigma_data, self.noise_scale = sigma_data, noise_scale

    def forward(self, x, t, y=None):
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, t = x.to(dtype), t.to(dtype)
        s = t[:, None, None, None]                                           # (B, 1, 1, 1)
        total = s ** 2 + self.sigma_data ** 2
        c_skip, c_out, c_in = self.sigma_data ** 2 / total, s * self.sigma_data * total.rsqrt(), total.rsqrt()
        c_noise = self.noise_scale * t.clamp(min=1e-6).log() / 4             # (B,)  finite at t = 0
        backbone = dtype if dtype == torch.float64 else self.backbone_dtype
        return c_skip * x + c_out * self.net((c_in * x).to(backbone), c_noise, y).to(dtype)


class MeanVelocity(nn.Module):
    """The velocity of the flow-time ODE, averaged from r to t: flow-matching teacher (r = t) *and* Mean Flow.

        u(z, r, t) ~ (1 / (t - r)) int_r^t v(z_tau, tau) dtau,    u(z, t, t) = v(z, t)

    No preconditioning: u is the raw network. Without an embedding of t - r it ignores r and gives v(z, t).
    Times are multiplied by time_scale where they are embedded.

    z (B,C,H,W), r <= t (B,), y (B,) int64 or None -> (B,C,H,W). Precision as in `Denoiser`.
    """
    def __init__(self, net, time_scale=1.0):
        super().__init__()
        self.net, self.backbone_dtype, self.time_scale = net, torch.float32, time_scale

    def forward(self, z, r, t, y=None):
        dtype = torch.promote_types(z.dtype, torch.float32)
        z, r, t = z.to(dtype), r.to(dtype), t.to(dtype)
        backbone = dtype if dtype == torch.float64 else self.backbone_dtype
        return self.net(z.to(backbone), self.time_scale * t, y, self.time_scale * (t - r)).to(dtype)


# === 3. datasets ============================================================================================
# network        is built without an --init file, with the dropout of pre-training. It is the paper's, except
#                for digits (ours) and imagenet64 (EDM2-S; the paper gives no size)
# public         a checkpoint for tools/import_checkpoint.py
# label_dropout  probability of the null label
# noise_scale    multiplies ln(t)/4. EDM's is 1; 4 is ours, for small networks (digits: a little better)
# time_scale     multiplies flow time. SiT's is 1; 16 is ours, for U-Nets (digits: better than 4)
# latents        networks see (z - mean) * scale, per channel; z is the autoencoder's output. pixel_range: of
#                the pixels that the autoencoder encodes. EDM2 uses [0, 1], SiT and MeanFlow [-1, 1]

VAE = "stabilityai/sd-vae-ft-mse"
LATENTS = {
    "EDM2UNet": dict(vae=VAE, pixel_range=[0, 1], mean=[5.81, 3.25, 0.12, -2.15],
                     scale=[0.5 / deviation for deviation in (4.17, 4.62, 3.71, 3.28)]),
    "SiT":      dict(vae=VAE, pixel_range=[-1, 1], mean=[0.0] * 4, scale=[0.18215] * 4),
}
EDM_URL = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
EDM2_URL = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/"
DDPMPP = {"class": "DDPMpp", "model_channels": 128, "num_blocks": 4, "attn_resolutions": (16,)}
EDM2 = {"class": "EDM2UNet", "channel_mult": (1, 2, 3, 4), "num_blocks": 3, "attn_resolutions": (16, 8)}

DATASETS = {
    #                   shape (C, H, W)    classes       label_dropout      scales of embedded times
    "digits":      dict(shape=(1, 8, 8),   classes=10,   label_dropout=0.1, noise_scale=4.0, time_scale=16.0,
        network={"class": "DDPMpp", "model_channels": 32, "channel_mult": (1, 2), "num_blocks": 1,
                 "attn_resolutions": (4,), "dropout": 0.0}),
    "cifar10":     dict(shape=(3, 32, 32), classes=0,    label_dropout=0.0, noise_scale=1.0, time_scale=16.0,
        network=DDPMPP | {"channel_mult": (2, 2, 2), "dropout": 0.13},
        public=EDM_URL + "edm-cifar10-32x32-uncond-vp.pkl"),
    "ffhq64":      dict(shape=(3, 64, 64), classes=0,    label_dropout=0.0, noise_scale=1.0, time_scale=16.0,
        network=DDPMPP | {"channel_mult": (1, 2, 2, 2), "dropout": 0.05},
        public=EDM_URL + "edm-ffhq-64x64-uncond-vp.pkl"),
    "afhqv2-64":   dict(shape=(3, 64, 64), classes=0,    label_dropout=0.0, noise_scale=1.0, time_scale=16.0,
        network=DDPMPP | {"channel_mult": (1, 2, 2, 2), "dropout": 0.25},
        public=EDM_URL + "edm-afhqv2-64x64-uncond-vp.pkl"),
    "imagenet64":  dict(shape=(3, 64, 64), classes=1000, label_dropout=0.0, noise_scale=1.0, time_scale=16.0,
        network=EDM2 | {"model_channels": 192, "dropout": 0.0},
        public=EDM2_URL + "edm2-img64-s-1073741-0.075.pkl"),
    "imagenet256": dict(shape=(4, 32, 32), classes=1000, label_dropout=0.1, noise_scale=1.0, time_scale=1.0,
        network={"class": "SiT", "patch_size": 2, "hidden_size": 1152, "depth": 28, "num_heads": 16},
        latents=LATENTS["SiT"]),
    "imagenet512": dict(shape=(4, 64, 64), classes=1000, label_dropout=0.0, noise_scale=1.0, time_scale=16.0,
        network=EDM2 | {"model_channels": 448, "dropout": 0.1},
        public=EDM2_URL + "edm2-img512-xxl-0939524-0.070.pkl", latents=LATENTS["EDM2UNet"]),
}


def custom_dataset(shape, classes, latents=None):
    """The config of a dataset that DATASETS does not list (ours). The U-Net halves the resolution while it is
    even and above 8, but at least once. It has 128 channels and 2 blocks a level; for images of up to 16x16
    pixels, or without a GPU, 32 channels and 1 block. latents: as in DATASETS, of the prepared file."""
    size, multiples = shape[-1], [1 if shape[-1] <= 16 else 2]
    while size % 2 == 0 and size > 8 or len(multiples) < 2:
        size, multiples = size // 2, multiples + [2]
    small = shape[-1] <= 16 or not torch.cuda.is_available()
    network = {"class": "DDPMpp", "model_channels": 32 if small else 128, "channel_mult": tuple(multiples),
               "num_blocks": 1 if small else 2, "attn_resolutions": (size,), "dropout": 0.0}
    return dict(shape=shape, classes=classes, label_dropout=0.1 if classes else 0.0, time_scale=16.0,
                noise_scale=4.0 if shape[-1] <= 16 else 1.0, network=network, latents=latents)


def find_data(data, flag="--data"):
    """data: NAME (or NAME.npz, data/NAME) for data/NAME.npz, or the path of an .npz, whose stem is
    then the name.
    -> key of the recipe (a name in DATASETS, else "custom"), name, path of the .npz"""
    path = Path(data)
    if not ("/" in data or os.sep in data or path.suffix in (".npz", ".npy", ".zip", ".tar", ".gz", ".tgz")):
        path = Path("data", f"{data}.npz")                                                      # NAME
    elif os.path.isfile(f"{data}.npz"): path = Path(f"{data}.npz")                              # data/NAME
    elif path.suffix == ".npz" and not path.exists() and Path("data", data).is_file():
        path = Path("data", data)                                                               # NAME.npz
    if path.suffix != ".npz":
        raise UserError(f"{flag} {data} is not prepared; `{prepare_command(path.stem, data)}` prepares it.")
    return path.stem if path.stem in DATASETS else "custom", path.stem, str(path)


def prepare_command(name, source="SOURCE"):
    name = re.sub(r"[^\w.-]+", "-", name.removesuffix(".tar"))         # prepare_data.py takes no spaces
    vae = " --vae PATH" if "latents" in DATASETS.get(name, {}) else ""
    return f"python tools/prepare_data.py {shlex.quote(str(source))} --data {shlex.quote(name)}{vae}"


def import_command(url, name, out=None):
    """The command that downloads a public checkpoint and imports it."""
    file = url.rpartition("/")[2]
    command = f"curl -LO {url} && python tools/import_checkpoint.py {file} --data {shlex.quote(name)}"
    return command + (f" --out {shlex.quote(out)}" if out else "")


def stage_command(path, stages, recipe, name):
    """The command that makes a checkpoint of one of `stages`: of the stage that the file is named after, else
    of the first. A public diffusion model of the dataset is imported instead of pre-trained."""
    stage = Path(path).stem if Path(path).stem in stages else stages[0]
    url, data = DATASETS.get(recipe, {}).get("public"), shlex.quote(name)
    if stage == "pretrain" and url: return import_command(url, name)
    return {"pretrain_flow": f"python pretrain.py --data {data} --objective flow",
            "midtrain_cm": f"python midtrain.py --data {data}",
            "midtrain_mf": f"python midtrain.py --data {data} --branch mf"}.get(
                stage, f"python {stage}.py --data {data}")


def npz_array(path, name, limit=2 ** 31):
    """An array of an .npz: memory-mapped if it is stored uncompressed, as by numpy.savez and prepare_data.py,
    else loaded, up to `limit` bytes. A damaged file can raise any exception."""
    with zipfile.ZipFile(path) as z, z.open(f"{name}.npy") as f:
        member = z.getinfo(f"{name}.npy")
        read_header = getattr(np.lib.format, f"read_array_header_{np.lib.format.read_magic(f)[0]}_0")
        (shape, fortran, dtype), start = read_header(f), f.tell()
    if member.compress_type != zipfile.ZIP_STORED or dtype.hasobject or 0 in shape:
        if member.file_size > limit:
            raise UserError(f"{path} is compressed and too large to load ({member.file_size / 2 ** 30:.1f} "
                            f"GiB); `{prepare_command(Path(path).stem + '-uncompressed', path)}` stores it "
                            "uncompressed.")
        with np.load(path, allow_pickle=False) as f: return f[name]
    if start + math.prod(shape) * dtype.itemsize != member.file_size:
        raise ValueError(f"{name} is {shape}, but has {member.file_size:,} bytes")
    with open(path, "rb") as f:                            # the array follows the member's local header
        f.seek(member.header_offset + 26)
        start += member.header_offset + 30 + sum(struct.unpack("<HH", f.read(4)))
    return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")


def read_info(path):
    """The zip directory of a prepared .npz, and its info. A damaged file can raise any exception.
    -> {member: ZipInfo}, dict"""
    with zipfile.ZipFile(path) as z: members = {m.filename: m for m in z.infolist()}
    return members, json.loads(str(npz_array(path, "info"))) if "info.npy" in members else {}


def check_readable(path):
    """Raise UserError unless a file can be opened. One without permission is not damaged."""
    try: open(path, "rb").close()
    except OSError as e: raise UserError(f"{path} cannot be read ({e.strerror}).")


def data_identity(path):
    """A fingerprint of data: size and CRC-32 of arr_0 and arr_1, and for latents the
    autoencoder and its pixel range. No array is read. Raises UserError."""
    check_readable(path)
    try:
        members, info = read_info(path)
        latents = info.get("latents") or {}
    except Exception as e:
        raise UserError(f"{path} is damaged, or no .npz ({type(e).__name__}: {e}).")
    arrays = {k: members[f"{k}.npy"] for k in ("arr_0", "arr_1") if f"{k}.npy" in members}
    return ", ".join([f"{k} {m.file_size} {m.CRC:08x}" for k, m in arrays.items()]
                     + [f"{k} {latents[k]}" for k in ("vae", "pixel_range") if k in latents])


class Data:
    """A prepared data/NAME.npz, memory-mapped (see tools/prepare_data.py): arr_0 uint8 (N,H,W,C), C = 1 or 3,
    or latents (N,C,H,W) of float16 or float32, or (N,2C,H,W) with means and standard deviations; optionally
    arr_1 (N,) labels 0..K-1, class_names (K,) and info, JSON. An .npz in ADM's layout is fine, too.

    shape (C,H,W); labels (N,) int64 or None; classes K; latents: a dict as in DATASETS, or None; identity: as
    from `data_identity`. Raises UserError."""
    def __init__(self, path):
        self.path, self.labels, self.classes, command = str(path), None, 0, prepare_command(Path(path).stem)
        if not os.path.isfile(path):
            if Path(path) in (Path("data/digits.npz"), Path("data/mnist.npz")):
                raise UserError(f"{path}, which comes with the code, is not here; start the scripts in their "
                                "folder.")
            place = "" if Path(path).parent == Path("data") else f" as data/{Path(path).stem}.npz"
            raise UserError(f"{path} does not exist; `{command}` makes it from images in any form{place}.")
        check_readable(path)
        try:
            members, info = read_info(path)
            self.array = x = npz_array(path, "arr_0")
            y = npz_array(path, "arr_1") if "arr_1.npy" in members else None
            self.latents = info.get("latents")
            C = len(self.latents["mean"]) if self.latents else x.shape[-1]
        except (UserError, MemoryError): raise
        except Exception as e:                             # a damaged file can raise any exception
            raise UserError(f"{path} is damaged, or not made by tools/prepare_data.py ({type(e).__name__}: "
                            f"{e}); `{command}` makes such a file.")
        if x.ndim != 4:    fits = False
        elif self.latents: fits = x.dtype in (np.float16, np.float32) and x.shape[1] in (C, 2 * C)
        else:              fits = x.dtype == np.uint8 and C in (1, 3)
        if not fits or len(x) == 0:
            raise UserError(f"{path}: arr_0 is {x.dtype} {x.shape}; it has to be uint8 (N,H,W,C) with 1 or 3 "
                            "channels, or latents, float16 or float32 (N,C,H,W), with their scale in `info`; "
                            f"`{command}` makes such a file.")
        self.shape = (C, *x.shape[2:]) if self.latents else (C, *x.shape[1:3])
        if y is not None:
            if y.shape != x.shape[:1] or y.dtype.kind not in "iu" or not 0 <= y.min() <= y.max() < 10 ** 6:
                raise UserError(f"{path}: arr_1 is {y.dtype} {y.shape}; labels have to be {len(x)} integers "
                                "from 0 on. tools/prepare_data.py makes them so.")
            self.labels, self.classes = torch.from_numpy(y.astype(np.int64)), int(y.max()) + 1
        self.identity = data_identity(path)

    def __len__(self):
        return len(self.array)

    def batch(self, indices):
        """Indices (B,) -> uint8 (B,C,H,W) or unscaled fp32 latents, labels (B,), 0 where there are none."""
        indices = np.asarray(indices)
        x = torch.from_numpy(self.array[indices])
        x = x.float() if self.latents else x.permute(0, 3, 1, 2).contiguous()
        return x, torch.zeros(len(x), dtype=torch.int64) if self.labels is None else self.labels[indices]

    def __str__(self):
        return f"{self.path}: {len(self):,} {describe(self.shape, self.latents)}, {self.classes} classes"


def describe(shape, latents):
    """A few words on a dataset: shape (C,H,W), latents as in DATASETS or None"""
    pixels = f" from pixels in {latents.get('pixel_range')}" if latents else ""
    return f"{'latents' if latents else 'images'} of {'x'.join(map(str, shape))}{pixels}"


def open_data(args):
    """The data of --data, and the dataset's config. Raises UserError where the two do not fit."""
    data, dataset = Data(args.npz), DATASETS.get(args.recipe_name)
    if not dataset:
        if data.shape[1] != data.shape[2] or data.shape[1] % 4:
            raise UserError(f"{data.path} has images of {data.shape[2]}x{data.shape[1]} pixels; they have to "
                            "be square with a side divisible by 4; prepare them with --size N.")
        dataset = custom_dataset(data.shape, data.classes, data.latents)
    classes, wanted = dataset["classes"], describe(dataset["shape"], dataset.get("latents"))
    if describe(data.shape, data.latents) != wanted or classes and not 0 < data.classes <= classes:
        raise UserError(f"{data} do not fit the recipe {args.recipe_name}, which is for {wanted}, {classes} "
                        f"classes; prepare such data with `{prepare_command(args.name)}`, or give the file "
                        "another name to train on it as a custom dataset.")
    if not classes: data.labels, data.classes = None, 0    # an unconditional recipe ignores labels
    elif (missing := classes - len(data.labels.unique())) > 0:
        say(f"warning: {data.path} has no images of {missing} of {classes} classes, so samples of these will "
            "be bad. Number the classes from 0 without gaps, and give the file another name.")
    return data, dataset


def dataset_at_hand(args):
    """The dataset's config, of a custom dataset as `open_data` finds it; None if its file is missing."""
    if args.recipe_name in DATASETS: return DATASETS[args.recipe_name]
    return open_data(args)[1] if os.path.exists(args.npz) else None


# === 4. checkpoints =========================================================================================
# NAME.safetensors: weights + one metadata key `config`, the header (JSON), which alone rebuilds the network.

@contextlib.contextmanager
def atomic_write(path):
    """`with atomic_write(path) as part:` writes to `part`, then renames it to `path`, so that `path` is
    complete or unchanged. Raises UserError."""
    path = Path(os.path.realpath(path))                    # a link stays a link
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") if fcntl else contextlib.nullcontext() as file:
            lock_file(file, f"another process writes {path}; wait for it, or choose another path.")
            try:
                yield part
                with open(part, "rb+") as f: os.fsync(f.fileno())
                umask = os.umask(0)                        # safetensors gives 0600, whatever the umask
                os.umask(umask)
                os.chmod(part, 0o666 & ~umask)
                os.replace(part, path)
            except BaseException:                          # also Ctrl-C
                with contextlib.suppress(OSError): part.unlink()
                raise
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} could not be written ({e}); what was there before is untouched. Check the "
                        "free space and the folder's permissions, or choose another path.")


def lock_file(file, message):
    """Lock an open file until it is closed. Raises UserError(message) if another process has locked it."""
    try:
        if fcntl: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError: raise UserError(message)
    except OSError: pass                                   # not every file system has locks


def checksum(tensors, header):
    """CRC-32 of names, shapes, values and header. `read` compares it."""
    crc = zlib.crc32(json.dumps(header).encode())
    for k in sorted(tensors):
        crc = zlib.crc32(f"{k} {tuple(tensors[k].shape)}".encode(), crc)
        crc = zlib.crc32(tensors[k].flatten().view(torch.uint8).numpy(), crc)
    return str(crc)


def save(path, tensors, header):
    """Write {name: tensor} and a JSON-able header to `path`. Raises UserError as `atomic_write` does."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    config = json.dumps(header | {"crc32": checksum(tensors, header)})
    # one metadata key, because safetensors writes several in a random order
    with atomic_write(path) as part: save_file(tensors, part, {"config": config})


def read(path, tensors=True, advice="make it again or copy it again"):
    """-> {name: tensor} on the CPU, header. tensors=False: only the header is read. Raises UserError if the
    file is missing, damaged, or not a checkpoint of this project. advice: what to do with a damaged file"""
    if not os.path.isfile(path):
        raise UserError(f"{path} is a folder." if os.path.isdir(path) else f"{path} does not exist.")
    if str(path).endswith((".pkl", ".pt", ".pth", ".ckpt")):
        raise UserError(f"{path} has to be imported first: python tools/import_checkpoint.py {path}")
    check_readable(path)
    try:
        with safe_open(path, "pt") as f:
            header = json.loads(f.metadata()["config"])
            found = {k: f.get_tensor(k) for k in f.keys() if tensors}
        crc = header.pop("crc32")
        if tensors and crc != checksum(found, header):
            raise ValueError("its checksum is not that of its content")
        return found, header
    except MemoryError: raise
    except Exception as e:                                 # a damaged file can raise any exception
        raise UserError(f"{path} is damaged or not a checkpoint of this project ({type(e).__name__}: {e}); "
                        f"{advice}.")


def build(header):
    """The model that a header describes, with random weights"""
    network = dict(header["network"])
    net = {"DDPMpp": DDPMpp, "EDM2UNet": EDM2UNet, "SiT": SiT}[network.pop("class")](**network)
    if header["kind"] == "MeanVelocity": return MeanVelocity(net, header["time_scale"])
    return Denoiser(net, header["sigma_data"], header["noise_scale"])


def load(path, device="cpu", **network):
    """-> (model in eval mode with an fp32 backbone, header). `network`: constructor arguments that replace
    those of the returned header, such as dropout=0.2; interval=True, for a `MeanVelocity`, adds the embedding
    of t - r where the file has none. Warns if its run is unfinished. Raises UserError as `read` does, and
    where the weights do not fit the network."""
    tensors, header = read(path)
    if any(k.startswith("ema.") for k in tensors):
        raise UserError(f"{path} is the state of a run; its model is NAME.safetensors, beside it.")
    if "network" not in header:
        raise UserError(f"{path} was written by stage {header.get('stage')}; it is not a model.")
    try:
        adds_interval = network.get("interval") and not header["network"].get("interval")
        header["network"].update(network)
        if adds_interval:
            fresh = build(header).state_dict()
            tensors |= {k: v for k, v in fresh.items() if k.startswith("net.r_embedder.")}
        with torch.device("meta"): model = build(header)
        model.load_state_dict({k: v.float() for k, v in tensors.items()}, assign=True)
    except Exception as e:
        raise UserError(f"{path}: its weights do not fit its network ({str(e).partition(chr(10))[0]}); it is "
                        "damaged, was written by another program, or its network lacks what a flag sets.")
    if header.get("step", 0) < header.get("steps", 0):
        say(f"warning: {path} is from step {header['step']:,} of {header['steps']:,}, not from the last one.")
    return model.to(device).eval(), header


def fresh_header(dataset, kind="Denoiser", **network):
    """The header of a new network for a dataset config. `network` replaces constructor arguments."""
    C, H, _ = dataset["shape"]
    shape = {"img_resolution": H, "img_channels": C, "label_dim": dataset["classes"]}
    network = shape | dataset["network"] | network
    header = {"kind": kind, "network": network, "label_dropout": dataset["label_dropout"]}
    if dataset.get("latents"): header["latents"] = dataset["latents"]
    if kind == "MeanVelocity":
        return header | {"time_scale": dataset["time_scale"], "t_min": 0.0, "t_max": 1.0}
    return header | {"sigma_data": 0.5, "noise_scale": dataset["noise_scale"], "t_min": 0.002, "t_max": 80.0}


# What each stage's file holds.
KIND = {"pretrain": "Denoiser", "midtrain_cm": "Denoiser", "posttrain_cm": "Denoiser",
        "pretrain_flow": "MeanVelocity", "midtrain_mf": "MeanVelocity", "posttrain_mf": "MeanVelocity"}


def stages_of(kind):
    """-> the stages whose files hold a model of this kind"""
    return [stage for stage, k in KIND.items() if k == kind]


def image_shape(header):
    """-> (C, H, W)"""
    network = header["network"]
    return network["img_channels"], network["img_resolution"], network["img_resolution"]


def sha256(path):
    with open(path, "rb") as f: return hashlib.file_digest(f, "sha256").hexdigest()


# === 5. images ==============================================================================================

def to_float(images):
    """uint8 0..255 -> fp32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """[-1, 1] -> uint8 0..255, rounded to nearest: the inverse of to_float."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_network(x, header):
    """Convert a batch of `Data` to the input of a network. Pixels: to [-1, 1]. Latents: (z - mean) * scale by
    the header's `latents`; with 2C channels, means and standard deviations, z is drawn first.
    (B,C or 2C,H,W) -> (B,C,H,W)"""
    if x.dtype == torch.uint8: return to_float(x)
    mean, scale = header["latents"]["mean"], header["latents"]["scale"]
    if x.shape[1] == 2 * len(mean):
        z, deviation = x.chunk(2, dim=1)
        x = z + deviation * torch.randn_like(z)
    return torch.stack([(z - m) * s for z, m, s in zip(x.unbind(1), mean, scale)], dim=1)


def to_latents(x, header):
    """The inverse of `to_network` for latents, as the autoencoder decodes them. (B,C,H,W) -> (B,C,H,W)"""
    mean, scale = header["latents"]["mean"], header["latents"]["scale"]
    return torch.stack([z / s + m for z, m, s in zip(x.unbind(1), mean, scale)], dim=1)


def save_grid(path, rows, names, side=None):
    """Save a picture. Each of `rows`, uint8 (n,H,H,C) with C 1 or 3, becomes one line of images with its name
    at the left. side: of an image in the picture; by default small images are enlarged."""
    from PIL import Image, ImageDraw, ImageFont
    n, H, gap = max(map(len, rows)), max(row.shape[1] for row in rows), 4
    side = side or max(1, 48 // H) * H
    tile, font = side + gap, ImageFont.load_default(14)
    margin = gap + max(int(font.getlength(name)) for name in names) + gap
    sheet = Image.new("RGB", (margin + n * tile, gap + len(rows) * tile), "white")
    for i, (row, name) in enumerate(zip(rows, names)):
        ImageDraw.Draw(sheet).text((gap, gap + i * tile + tile // 2 - 10), name, "black", font)
        for j, image in enumerate(row):
            image = Image.fromarray(np.repeat(image, 3 // image.shape[2], axis=2))
            image = image.resize((side, side), Image.NEAREST if side > image.width else Image.BOX)
            sheet.paste(image, (margin + j * tile, gap + i * tile))
    with atomic_write(path) as part: sheet.save(part, "PNG")


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2 ** 63))


def batch_indices(n, seed, start, count):
    """Indices start..start+count-1 of the endless stream "permutation of epoch 0, of epoch 1, ..."
    -> (count,) int64. A function of its arguments alone, so a resumed run sees the same images."""
    epochs = range(start // n, (start + count - 1) // n + 1)
    return torch.cat([epoch_order(n, seed, k)[max(start - k * n, 0):start - k * n + count] for k in epochs])


def read_batches(data, args, step, rank, batch, device):
    """Yield x uint8 (batch,C,H,W), or latents, and labels (batch,) on the device: this rank's share of the
    batches from `step` on. A thread reads one batch ahead, into pinned memory for a GPU."""
    def fetch(step):
        tensors = data.batch(batch_indices(len(data), args.seed, step * args.batch + rank * batch, batch))
        return [x.pin_memory() for x in tensors] if device.type == "cuda" else tensors
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(fetch, step)
        while True:
            tensors, step = ahead.result(), step + 1
            ahead = thread.submit(fetch, step)
            yield [x.to(device, non_blocking=True) for x in tensors]


def drop_labels(y, header):
    """Replace each label by the null label with the header's probability label_dropout. y (B,) -> (B,)"""
    return torch.where(torch.rand(len(y), device=y.device) < header["label_dropout"],
                       header["network"]["label_dim"], y)


# === 6. running a stage =====================================================================================

# Backbone dtypes. "tf32" is fp32 whose matrix products and convolutions round their inputs to TF32 on a GPU.
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Prints docstrings unchanged, and the default of every flag that has one."""
    def _get_help_string(self, action):
        if action.default is None or action.default is False: return action.help
        return super()._get_help_string(action)


class SetNetwork(argparse.Action):
    """A flag that sets a constructor argument of the network. It overrides `network` of RECIPES."""
    def __call__(self, parser, namespace, value, option=None):
        namespace.network = namespace.network | {self.dest: value}


def number(kind, fits, what):
    """A type for argparse: an int or float for which `fits` is true, described by `what` in the error."""
    def convert(text):
        try: value = kind(text)
        except ValueError: value = math.nan
        if not fits(value): raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value
    return convert


positive_int = number(int, lambda n: n >= 1, "a positive integer")
not_negative_int = number(int, lambda n: 0 <= n < 2 ** 63, "an integer >= 0")
positive_float = number(float, lambda a: 0 < a < math.inf, "a number > 0")
finite = number(float, math.isfinite, "a finite number")
fraction = number(float, lambda a: 0 <= a < 1, "a number in [0, 1)")


def lr_decay(text):
    if text in ("constant", "linear"): return text
    return number(int, lambda n: n >= 1, "constant, linear or a positive integer")(text)


def existing_parent(path):
    """The folder of `path`, or its nearest existing parent"""
    return next(p for p in Path(path).absolute().parents if os.path.exists(p))


def can_write(path):
    """True if a file can be written at `path`, after its missing folders are made."""
    there = existing_parent(path)
    return there.is_dir() and os.access(there, os.W_OK)


def output_path(text):
    """--out: a checkpoint in a folder that can be written. Raises UserError."""
    if not text.endswith(".safetensors") or text.endswith(".resume.safetensors") or not can_write(text):
        raise UserError(f"--out {text} has to end in .safetensors, not in .resume.safetensors, and be in a "
                        "folder that can be written.")
    return text


# The hyperparameters of recipes. A stage has those that are in its recipe, and adds its own.
HYPERPARAMETERS = {
    "steps":     dict(type=positive_int, help="optimizer steps in total"),
    "batch":     dict(type=positive_int, help="samples in one optimizer step, over all processes"),
    "lr":        dict(type=number(float, lambda a: 0 <= a < 1e12, "a number in [0, 1e12)"),
                      help="peak learning rate"),
    "ema":       dict(type=fraction, help="decay of the averaged weights; min(EMA, (1+k)/(10+k)) at step k"),
    "optimizer": dict(choices=["Adam", "RAdam"], help="eps 1e-8, no weight decay"),
    "beta1":     dict(type=fraction, help="of Adam and RAdam"),
    "beta2":     dict(type=fraction, help="of Adam and RAdam"),
    "lr_decay":  dict(type=lr_decay, help="constant, linear, or T: from step T on as sqrt(T / step)"),
    "warmup":    dict(type=not_negative_int, help="samples over which the learning rate rises linearly"),
    "P_mean":    dict(type=finite, help="mean of ln t, or of logit t in flow time"),
    "P_std":     dict(type=positive_float, help="standard deviation of ln t, or of logit t in flow time"),
    "mid_t":     dict(type=number(float, lambda t: 0.002 <= t < 80, "between 0.002 and 80"),
                      help="time of the second sampling step, stored in the result"),
}


def peek_flag(flag, default, choices=None):
    """The value of `flag` on the command line, read before the others because their defaults depend on it."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument(flag, dest="value", default=default, choices=choices)
    return first.parse_known_args()[0].value


def typed(flag):
    """True if the command line contains `flag`."""
    return any(word == flag or word.startswith(f"{flag}=") for word in sys.argv[1:])


def reject_if_typed(*flags, because):
    """Raise UserError where one of these flags was typed though it would have no effect."""
    for flag in flags:
        if typed(flag): raise UserError(f"{flag} would have no effect: {because}. Leave it out.")


def parser(doc, recipes, predecessor, writes, precision=None, compile=True):
    """The flags that all training stages share. --data picks the entry of `recipes` that holds the defaults.
    `predecessor` (None for the first stage) and `writes` name files in runs/NAME/."""
    recipe_name, name, path = find_data(peek_flag("--data", "digits"))
    if recipe_name not in recipes:
        other = {"pretrain": "; --objective flow has others", "midtrain_cm": "; --branch mf has others"}
        raise UserError(f"--data {name}: there is no recipe for {writes}, only for {', '.join(recipes)}"
                        f"{other.get(writes, '')}.")
    recipe = {"beta1": 0.9, "vae": None} | recipes[recipe_name]
    gpu = torch.cuda.is_available() or ("--dry-run" in sys.argv and recipe_name not in ("digits", "custom"))
    p = argparse.ArgumentParser(description=doc, formatter_class=Help, allow_abbrev=False)
    add = p.add_argument
    add("--data", default="digits", metavar="NAME|PATH.npz",
        help=f"{', '.join(DATASETS)} or another prepared data/NAME.npz")
    if predecessor:
        add("--init", default=f"runs/{name}/{predecessor}.safetensors", metavar="FILE|none",
            help="weights to start from")
    elif recipe_name == "custom":
        add("--width", type=int, dest="model_channels", action=SetNetwork, metavar="CHANNELS",
            choices=[16, 32, 64, 96, 128, 160, 192, 256],
            help="of the U-Net (default: 128; 32 for images of up to 16x16 pixels, or without a GPU)")
        add("--blocks", type=int, dest="num_blocks", action=SetNetwork, choices=[1, 2, 3, 4],
            help="of the U-Net at each resolution (default: 2; 1 where 32 channels are the default)")
    add("--out", default=f"runs/{name}/{writes}.safetensors", metavar="FILE", type=output_path,
        help="result; NAME.resume.safetensors beside it holds the state of the run")
    for hyperparameter, options in HYPERPARAMETERS.items():
        if hyperparameter in recipe:
            add("--" + hyperparameter.replace("_", "-"), dest=hyperparameter, **options)
    if DATASETS.get(recipe_name, {}).get("network", {}).get("class") != "SiT":
        add("--dropout", type=fraction, action=SetNetwork, metavar="P",
            help="of the network (default: RECIPES, else --init, else model.DATASETS)")
    add("--microbatch", type=positive_int, metavar="N",
        help="samples per forward and backward pass of a GPU, and trajectories that it solves at a time, to "
             "save memory (default: all)")
    add("--seed", type=not_negative_int, default=0, help="random seed")
    add("--save-every", type=positive_int, metavar="STEPS",
        help="steps between saves (default: a save every 10 minutes)")
    add("--keep", action="store_true", help="keep NAME-STEP.safetensors of every save")
    add("--log-every", type=positive_int, default=50, metavar="STEPS", help="steps between log lines")
    add("--precision", choices=DTYPES, default=precision or ("bf16" if gpu else "fp32"),
        help="of the network's backbone; everything else is fp32, or TF32 with tf32")
    # Not for digits, where a run is too short, nor on Windows, where torch comes without its compiler.
    compile = compile and torch.cuda.is_available() and recipe_name != "digits" and sys.platform != "win32"
    add("--compile", action=argparse.BooleanOptionalAction, default=compile,
        help="torch.compile the networks")
    add("--preview", action=argparse.BooleanOptionalAction, default=True, help="draw samples at each save")
    if recipe_name == "custom" or "latents" in DATASETS.get(recipe_name, {}):
        add("--vae", metavar="PATH", help="autoencoder (diffusers) that decodes the latents of the preview")
    add("--dry-run", action="store_true", help="print recipe, memory, compute and what is missing, and stop")
    add("--world", type=positive_int, metavar="GPUS",
        help="for --dry-run (default: torchrun's, else 8; for digits and custom data 1)")
    if "--dry-run" not in sys.argv: reject_if_typed("--world", because="it belongs to --dry-run")
    p.set_defaults(**recipe, recipe_name=recipe_name, name=name, npz=path, recipe=recipes[recipe_name])
    return p


def under_torchrun():
    return "TORCHELASTIC_RUN_ID" in os.environ


def setup(batch=0, precision="fp32", one_process=False, timeout=timedelta(minutes=30)):
    """Read torchrun's variables, choose the device, and start a process group if there are several processes.
    Plain `python` is one process. batch: the global batch, if there is one. one_process: raise UserError if
    there are several. -> rank, world, device, this rank's share of the batch"""
    rank, local, world = (int(os.environ.get(k) or d)
                          for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    if rank >= world:
        raise UserError(f"RANK is {rank}, but WORLD_SIZE {world}; start the processes with torchrun, or "
                        "unset both for one process.")
    if one_process and world > 1:
        raise UserError("this script runs in one process; start it with plain python.")
    if batch % world:
        raise UserError(f"--batch {batch} for {world} processes has to be a multiple of {world}.")
    # Both switches, because torch's defaults differ: TF32 is on for convolutions and off for matrix products.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    device, cuda = torch.device("cpu"), torch.cuda.is_available()
    if cuda:                                # a process sees all GPUs of its machine, or only its own (SLURM)
        gpus, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        if under_torchrun() and processes > gpus:
            raise UserError(f"torchrun started {processes} processes here, and this one sees {gpus} "
                            f"GPU{'s' * (gpus > 1)}; give --nproc_per_node={gpus}, or let every process see "
                            "all GPUs (CUDA_VISIBLE_DEVICES).")
        device = torch.device("cuda", local % gpus)
        torch.cuda.set_device(device)
    if world > 1:
        if not under_torchrun():
            say(f"RANK and WORLD_SIZE are set: waiting for {world} processes; unset both for one process.")
        try: store = next(dist.rendezvous("env://"))[0]
        except ValueError as e:
            raise UserError(f"RANK and WORLD_SIZE are set, but not all that a process group needs ({e}); "
                            "start the processes with torchrun, or unset both for one process.")
        store = store_of_this_start(store, rank, world)
        # gloo as well: exchanges of CPU tensors do not wait for the GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank,
                                world_size=world, timeout=timeout,
                                device_id=device if cuda else None)
    return rank, world, device, batch // world


def store_of_this_start(store, rank, world):
    """torchrun's store with a prefix of this start's own. The store outlives a restart and still holds the
    addresses of dead processes, and TORCHELASTIC_RESTART_COUNT can differ between nodes. So rank 0 draws a
    new prefix, and every other rank asks for it under a random id."""
    random_id = uuid.uuid4().hex
    if rank:
        store.set(f"asks {rank}", random_id)
        prefix = store.get(f"answer to {random_id}").decode()                      # waits for the answer
        store.set(f"{prefix} has {rank}", "")
        return dist.PrefixStore(prefix, store)
    prefix, missing, deadline = random_id, set(range(1, world)), time.monotonic() + 1800
    while missing and time.monotonic() < deadline:         # answers to dead processes do no harm
        for r in missing:
            if store.check([f"asks {r}"]):
                store.set(f"answer to {store.get(f'asks {r}').decode()}", prefix)
        time.sleep(0.05)
        missing = {r for r in missing if not store.check([f"{prefix} has {r}"])}
    return dist.PrefixStore(prefix, store)


def is_rank_0():
    return (os.environ.get("RANK") or "0") == "0"


def say(text):
    """Print on rank 0. If stdout is closed, as when Ctrl-C ends tee in `python midtrain.py | tee log`, raise
    SIGTERM: a training run saves and ends."""
    try:
        if is_rank_0(): print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        signal.raise_signal(signal.SIGTERM)


def parallel(net, world):
    """DDP around `net` if there are several processes: it averages gradients over the global batch."""
    if world == 1: return net
    ddp = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    ddp.broadcast_buffers = False                          # our buffers are constants: no exchange in forward
    return ddp


def compiled(function, wanted):
    """torch.compile around a network, or a function of networks, if `wanted`. Shapes are static:
    the different batch sizes of teacher and student would make torch compile dynamic shapes."""
    if not wanted: return function
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")        # --precision tf32 uses them
    from torch._inductor import async_compile, config
    if hasattr(signal, "pthread_sigmask"):                                  # not on Windows
        # Ctrl-C, SLURM's SIGTERM and a closed terminal's SIGHUP reach every process of a job. Without its
        # compiler processes the run would hang, so they inherit these signals blocked.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
        async_compile.AsyncCompile.warm_pool()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    config.fallback_random = True      # dropout masks as in eager mode: the two passes of ECT share them
    # Before torch 2.12 a mask depended on the layout of its input, which on a GPU differs between a pass with
    # and one without gradient (pytorch/pytorch#177077). Without this optimization it does not.
    if torch.__version__ < (2, 12): config.layout_optimization = False
    return torch.compile(function, dynamic=False)


def optimizer(args, net):
    """The optimizer of --optimizer. On a GPU Adam runs as one fused kernel; RAdam has none."""
    fused = args.optimizer != "RAdam" and next(net.parameters()).is_cuda
    return getattr(torch.optim, args.optimizer)(
        net.parameters(), args.lr, betas=(args.beta1, args.beta2), eps=1e-8, weight_decay=0.0,
        **{"fused" if fused else "foreach": True})


def reseed(*numbers):
    """Seed torch from these numbers. In a training step they are (seed, rank, step), so a resumed run repeats
    its randomness."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big"))


def microbatches(ddp, size, *tensors):
    """Yield slices of `size` samples (None: all) of a rank's tensors, for one backward each. DDP averages the
    gradients over the ranks in the last backward."""
    total = len(tensors[0])
    size = size or total
    for start in range(0, total, size):
        sync = start + size >= total or not hasattr(ddp, "no_sync")
        with contextlib.nullcontext() if sync else ddp.no_sync():
            yield [x[start:start + size] for x in tensors]


def learning_rate(args, step):
    """--lr, after a linear warm-up over args.warmup samples. args.lr_decay: "constant"; "linear", to 0 at the
    end; or a number T: the rate falls as sqrt(T / step) from step T on (EDM2, 2312.02696, eq. 67)."""
    lr = args.lr * min(1, (step + 1) * args.batch / max(args.warmup, 1))
    if args.lr_decay == "linear": return lr * (1 - step / args.steps)
    return lr if args.lr_decay == "constant" else lr / max(step / args.lr_decay, 1) ** 0.5


def gradient_norm(net):
    """-> the norm of the gradient, a float: the one place where a step waits for the GPU. A step whose norm
    is not finite is skipped. All ranks hold the same averaged gradient, so all skip the same steps."""
    return nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None]).item()


@torch.no_grad()
def update_ema(ema, net, decay):
    """ema = decay * ema + (1 - decay) * net, of the parameters in fp32. (Our buffers are constants.)"""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


# --- the files that a stage starts from ---------------------------------------------------------------------

def load_predecessor(args, flag, stages, device, dataset=None, **network):
    """The checkpoint of --init or --teacher -> (model, header). It has to be of one of `stages`, and for the
    shape and classes of `dataset`. If it was trained on other data than --data, a default path is refused,
    and a typed path gives a warning. args.command_for holds the command that makes a missing file.
    `network`: as in `load`."""
    path = getattr(args, flag)
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist; `{args.command_for[path]}` makes such a file"
                        + ("; --init none starts from random weights." if flag == "init" else "."))
    model, header = load(path, device, **network)
    check_predecessor(args, flag, header, stages, dataset)
    its_data = header.get("data_identity")
    if its_data and os.path.exists(args.npz) and its_data != data_identity(args.npz):
        text = f"{path} was trained on other data than {args.npz} ({its_data})"
        # A default path is probably the file of another dataset with this name; a typed one is fine-tuning.
        is_teacher = path == getattr(args, "teacher", None)            # midtrain.py's --init by default
        if not (typed(f"--{flag}") or is_teacher and typed("--teacher")):
            raise UserError(f"{text}. Give --{flag} {path} if that is meant, or prepare the data under "
                            "another name.")
        say(f"warning: {text}.")
    return model, header


def check_predecessor(args, flag, header, stages, dataset=None):
    """Raise UserError unless the file of --init or --teacher is of one of `stages`, and fits the dataset."""
    path = getattr(args, flag)
    if header["stage"] not in stages:
        raise UserError(f"--{flag} {path} was written by stage {header['stage']}, this has to be a "
                        f"{' or '.join(stages)} file; `{args.command_for[path]}` makes one.")
    if dataset:
        check_fit(path, header, f"--data {args.data}", dataset["shape"], dataset["classes"],
                  dataset.get("latents"))


def initial_model(args, kind, dataset, device, **network):
    """--init FILE|none -> (model, header): the file's, or a new network of `kind` for the dataset config.
    `network`: constructor arguments that replace either's."""
    if args.init != "none":
        return load_predecessor(args, "init", stages_of(kind), device, dataset, **network)
    header = fresh_header(dataset, kind, **network)
    return build(header).to(device), header


def check_fit(path, header, source, shape, classes, latents):
    """Raise UserError unless the model in `path` is for the shape, latents and classes of `source`."""
    its, other = describe(image_shape(header), header.get("latents")), describe(shape, latents)
    if (its, header["network"]["label_dim"]) != (other, classes):
        raise UserError(f"{path} is for {its} and {header['network']['label_dim']} classes, {source} for "
                        f"{other} and {classes}; they have to agree.")


def check_scale(path, header, other_path, other_header):
    """Raise UserError unless the models in two files scale latents alike."""
    a, b = ({k: v for k, v in (h.get("latents") or {}).items() if k != "vae"}
            for h in (header, other_header))
    if a != b:
        raise UserError(f"{path} and {other_path} scale latents differently ({a}, {b}); give two files that "
                        "agree.")


# Settings that are not compared with those of a continued run: they do not change the result, or what they
# name is compared instead (files by sha256, data by identity, the network by its arguments).
NOT_COMPARED = {"stage", "command_for", "name", "out", "save_every", "keep", "log_every", "data",
                "npz", "init", "teacher", "trajectories", "guide", "lpips", "dry_run", "recipe", "preview",
                "vae", "network", "teacher_network", "teacher_command"}
# Settings that a continued run may change, although the result is then not bit-identical.
MAY_CHANGE = {"microbatch", "world", "precision", "compile", "device", "torch"}


def run_metadata(args, stage, unit, world, data_identity=None, **files):
    """What a stage adds to the header: its name, and the settings that a continued run has to share. Among
    these are the files that it reads, by sha256, and the data, by identity (midtrain.py passes its
    teacher's). unit: what the batch counts, "images" or "pairs". Raises UserError if --out is one of the
    files."""
    for flag, file in files.items():
        if file and os.path.realpath(file) == os.path.realpath(args.out):
            raise UserError(f"--out {args.out} is the file that is read for --{flag}; choose another --out.")
    settings = {k: v for k, v in vars(args).items() if k not in NOT_COMPARED}
    settings |= {"world": world, "device": "cuda" if torch.cuda.is_available() else "cpu",
                 "torch": torch.__version__}
    settings |= {f"sha256 of {k}": sha256(v) if v and v != "none" else None for k, v in files.items()}
    settings["data_identity"] = data_identity
    return {"stage": stage, "data": args.name, "data_path": args.npz, "data_identity": data_identity,
            "steps": args.steps, "unit": unit, "settings": json.loads(json.dumps(settings)), "argv": sys.argv,
            "python": sys.version.split()[0],
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


# --- save, resume, stop, log --------------------------------------------------------------------------------

def beside(out, ending):
    """--out with another ending than .safetensors"""
    return str(out).removesuffix(".safetensors") + ending


def resume_file(out):
    return beside(out, ".resume.safetensors")


class SaveTimer:
    """due(step): every --save-every steps; by default every 10 minutes, as saves of large models are slow."""
    def __init__(self, args):
        self.every, self.last = args.save_every, time.monotonic()

    def due(self, step):
        if self.every: return step % self.every == 0
        if self.last is None: self.last = time.monotonic()           # the last save has ended just now
        if time.monotonic() - self.last <= 600: return False
        self.last = None
        return True


def saved_so_far(out):
    """What a run that diverges leaves, and what to do"""
    if not os.path.exists(out): return "nothing was saved. Try a smaller --lr"
    return f"{out} keeps what was saved before. Try a smaller --lr, with another --out"


@torch.no_grad()
def check_finite(ema, header, out):
    """Raise Diverged unless the weights, and their output on one fixed batch, are finite. A save checks this
    before it replaces a file."""
    x = torch.randn(4, *image_shape(header), generator=torch.Generator().manual_seed(0))
    x, t = (a.to(next(ema.parameters()).device) for a in (x, torch.linspace(0.1, 1, 4)))
    results = [ema(x, t) if header["kind"] == "Denoiser" else ema(x, t / 2, t), *ema.parameters()]
    if not all(a.isfinite().all() for a in results):
        raise Diverged(f"the averaged weights or their output are not finite; {saved_so_far(out)}.")


def save_run(args, step, net, ema, opt, header):
    """Write first NAME.resume.safetensors (weights, EMA, optimizer state, step), which a resumed run reads,
    then NAME.safetensors (EMA weights and header). --keep: before both, NAME-STEP.safetensors."""
    check_finite(ema, header, args.out)
    state = {f"net.{k}": v for k, v in net.state_dict().items()}
    state |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for name, p in net.named_parameters():
        state |= {f"opt.{slot}.{name}": v for slot, v in opt.state[p].items()}
    header = header | {"step": step, header["unit"]: step * header["settings"]["batch"]}
    if args.keep: save(beside(args.out, f"-{step:06d}.safetensors"), ema.state_dict(), header)
    save(resume_file(args.out), state, header)
    save(args.out, ema.state_dict(), header)
    say(f"{args.out} is finished ({step:,} steps)." if step == args.steps else
        f"saved {args.out} at step {step:,}.")


def check_replaceable(out, stage, data):
    """Raise UserError if `out` is an imported model, or of another stage or dataset."""
    if not os.path.exists(out): return
    try: old = read(out, tensors=False)[1]
    except UserError: old = {}
    imported = "imported from" in old and old["step"] == 0     # models trained from it keep "imported from"
    if (old.get("stage"), old.get("data")) != (stage, data) or imported:
        what = "imported" if imported else f"not from {stage} on {data}"
        raise UserError(f"{out} exists, and is {what}; choose another --out, or move it away.")


def start_run(out, net, header):
    """Announce a new run. Raise UserError if `out` is taken or the disk full."""
    check_replaceable(out, header["stage"], header["data"])
    parameters = sum(p.numel() for p in net.parameters())
    folder = existing_parent(out)
    # bytes per parameter: 16 of the resume file (weights, two moments, EMA), 16 while a save replaces it, 4
    needed, free = 36 * parameters, shutil.disk_usage(folder).free
    if 0 < free < needed:                                  # some network disks say 0
        raise UserError(f"saves of {out} need {needed / 1e6:,.0f} MB, and {folder} has "
                        f"{free / 1e6:,.0f} MB free; make room, or choose another --out.")
    settings = header["settings"]
    say(f"starting {out}: {header['network']['class']}, {parameters:,} parameters, on {settings['world']} x "
        f"{header['device']}, {settings['precision']}, torch {settings['torch']}")
    if settings["warmup"] > settings["steps"] * settings["batch"]:
        say(f"warning: the learning rate warms up over {settings['warmup']:,} {header['unit']}, and the run "
            "ends before. Give more --steps, or a smaller --warmup.")


def lock_log(out, new=False):
    """Lock the log NAME.jsonl, on rank 0, so that no second run writes to `out`; `run` unlocks it. Raises
    UserError if another run has locked it. new: also empty the log."""
    lock_log.file = None                                   # closes that of an earlier run of this process
    if not is_rank_0(): return
    with contextlib.suppress(OSError):
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        lock_log.file = open(beside(out, ".jsonl"), "a")
        lock_file(lock_log.file, f"another run writes to {out}; wait for it, end it, or choose another "
                                 "--out.")
        if new: lock_log.file.truncate(0)


def check_settings(path, old, header):
    """Raise UserError unless a run with `header` continues the run whose state is in `path`."""
    was = old["settings"] | old["network"]
    now = header["settings"] | json.loads(json.dumps(header["network"]))           # JSON has no tuples
    may_differ = {"steps"} if was.get("lr_decay") == now.get("lr_decay") != "linear" else set()
    # Shared keys only: a file from before a flag was added lacks the flag.
    different = {k for k in was.keys() & now.keys() - may_differ if was[k] != now[k]}
    if changed := [f"the {k[10:]} file is another" if k.startswith("sha256 of ") else
                   f"{k} was {was[k]}, is {now[k]}" for k in sorted(different - MAY_CHANGE)]:
        raise UserError(f"{path} belongs to a run with other settings ({'; '.join(changed)}); give the old "
                        "settings to continue it, another --out to keep both, or delete it to start over.")
    if now["steps"] < old["step"]:
        raise UserError(f"{path} is at step {old['step']:,} already; give more --steps, or another --out.")
    if different:
        say(f"continuing with another {', '.join(sorted(different))}: the result is not bit for bit that "
            "of an uninterrupted run.")


def check_ranks(path, header):
    """Raise UserError unless all processes have the same settings (files by sha256), and see one state."""
    if not dist.is_initialized(): return
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, (os.path.exists(path), header["settings"]))
    seen, settings = zip(*found)
    if len(set(seen)) > 1:
        raise UserError(f"some processes see {path}, others do not; --out has to be on a disk all share.")
    keys = dict.fromkeys(k for of_rank in settings for k in of_rank)
    if different := [k for k in keys if any(of_rank.get(k) != settings[0].get(k) for of_rank in settings)]:
        raise UserError(f"the processes differ in {', '.join(different)}; start all nodes with the same "
                        "command, files and software.")


def resume_run(out, net, ema, opt, header):
    """Continue an interrupted run: load its state into net, ema and opt -> the step it reached, 0 if new."""
    path = resume_file(out)
    check_ranks(path, header)
    if not os.path.exists(path):
        start_run(out, net, header)
        lock_log(out, new=True)
        return 0
    lock_log(out)                          # before reading: another run may be writing its last save
    state, old = read(path, advice=f"delete it to start over. {out} keeps the model saved last")
    if old.get("stage") != header["stage"]:
        raise UserError(f"{path} belongs to {old.get('stage', 'something else')}, not to {header['stage']}; "
                        "choose another --out.")
    check_settings(path, old, header)
    current = old
    if is_rank_0():
        try: current = read(out)[1]
        except UserError: current = {}     # killed between the two files of the first save, or damaged since
        def run_of(h): return h.get("stage"), h.get("network"), {
            k: v for k, v in h.get("settings", {}).items() if k not in MAY_CHANGE | {"steps"}}
        if current and (run_of(current) != run_of(old) or current["step"] > old["step"]):
            raise UserError(f"{out} is not of the run whose state is in {path}; move one of the two away, or "
                            "choose another --out.")
    def part(prefix): return {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)}
    net.load_state_dict(part("net."))
    ema.load_state_dict(part("ema."))
    slots = {k.split(".")[1] for k in state if k.startswith("opt.")}
    moments = [{slot: state[key] for slot in slots if (key := f"opt.{slot}.{name}") in state}
               for name, _ in net.named_parameters()]                  # a frozen parameter has none
    opt.load_state_dict(opt.state_dict() | {"state": dict(enumerate(moments))})
    if current != old: save(out, ema.state_dict(), old)
    say(f"{out} is finished ({old['step']:,} steps)." if old["step"] == header["settings"]["steps"] else
        f"continuing {out} at step {old['step']:,}.")
    return old["step"]


class Stop:
    """stop(step): has any rank been asked to end, by SIGTERM (preemption), SIGINT (Ctrl-C) or SIGHUP (a
    closed terminal)? All ranks get the same answer. It is asked after every step, because torchrun kills 30 s
    after its SIGTERM. A second Ctrl-C ends a single process at once. Under torchrun one Ctrl-C arrives twice,
    from the terminal and from torchrun, so there the second is ignored. `run` exits with 128 + the signal;
    under torchrun with 0, because torchrun would restart what exits with another code."""
    ended_by = 0                                           # the signal
    def __init__(self, world):
        self.world, self.signalled = world, 0
        for sign in (signal.SIGTERM, signal.SIGINT): signal.signal(sign, self.receive)
        hang_up = getattr(signal, "SIGHUP", None)          # not on Windows; nohup ignores it
        if hang_up and signal.getsignal(hang_up) != signal.SIG_IGN: signal.signal(hang_up, self.receive)

    def receive(self, sign, frame):
        self.signalled = sign
        if not under_torchrun(): signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self, step):
        # Only the handler writes `signalled`: a signal during the exchange counts at the next step.
        sign = torch.tensor([self.signalled], dtype=torch.int32)                   # on the CPU, over gloo
        if self.world > 1: dist.all_reduce(sign, dist.ReduceOp.MAX)
        if not under_torchrun(): Stop.ended_by = sign.item()
        if sign: say(f"asked to stop: saves and ends after step {step:,}; the same command continues.")
        return bool(sign)


def peak_memory():
    """Peak bytes, of the GPU, else of this process (NaN on Windows)."""
    if torch.cuda.is_available(): return torch.cuda.max_memory_allocated()
    if sys.platform == "win32": return math.nan
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Log:
    """Rank 0 prints a line every --log-every steps, at the first steps and at the last, and writes it as JSON
    to NAME.jsonl beside the checkpoint: the loss and its parts, as means over all ranks since the last line;
    the step's gradient norm and learning rate; speed, time left, peak memory. A resumed run repeats the steps
    after the last save, so of several lines for a step the last one is valid. Warns if the loss has grown a
    hundredfold. Raises Diverged after 10 skipped steps in a row, and at the end if all were skipped."""
    def __init__(self, args, unit, world, step):
        self.args, self.unit, self.world = args, unit, world
        self.losses, self.skipped, self.in_a_row, self.clock = [], 0, 0, time.time()
        self.start = self.last = step
        self.first_loss, self.warned = math.inf, False
        if args.compile and step < args.steps: say("compiling the network; the first step can take minutes")

    def __call__(self, step, loss, norm, lr, parts={}):
        if math.isfinite(norm):
            self.losses.append(torch.stack([loss, *parts.values()]))
            self.in_a_row = 0
        else:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row == 10 or step == self.args.steps == self.in_a_row:
            fp32 = "" if self.args.precision == "fp32" else " --precision fp32 may help, too."
            raise Diverged(f"the gradient was not finite for {self.in_a_row} steps in a row, up to step "
                           f"{step}; {saved_so_far(self.args.out)}.{fp32}")
        if step % self.args.log_every == 0 or step in (self.start + 1, 2, 5, 10, self.args.steps):
            self.write(step, ["loss", *parts], norm, lr)

    def write(self, step, names, norm, lr):
        mean = torch.stack(self.losses).mean(0) if self.losses else torch.full((len(names),), math.nan)
        mean = mean.cpu() / self.world
        if self.world > 1: dist.all_reduce(mean)
        seconds = (time.time() - self.clock) / (step - self.last)
        self.losses, self.last, self.clock = [], step, time.time()
        if not is_rank_0(): return
        unit, batch, steps = self.unit, self.args.batch, self.args.steps
        line = {"step": step, unit: step * batch, **dict(zip(names, mean.tolist())), "grad": norm, "lr": lr,
                f"{unit}/s": batch / seconds, "left": (steps - step) * seconds,
                "GiB": peak_memory() / 2 ** 30, "skipped": self.skipped}
        speed = f"{batch / seconds:,.0f} {unit}/s  left {line['left']:,.0f} s"
        if self.args.compile and step == self.start + 1: speed = f"compiled in {seconds:.0f} s"
        say(f"step {step:>7,}/{steps:,}  {unit} {step * batch:,}  "
            + "".join(f"{k} {line[k]:.5f}  " for k in names) + f"grad {norm:.3f}  lr {lr:.2e}  {speed}  "
            f"{line['GiB']:.1f} GiB" + (f"  skipped {self.skipped}" if self.skipped else ""))
        if not math.isfinite(self.first_loss): self.first_loss = line["loss"]
        if line["loss"] > 100 * self.first_loss and (step == steps or not self.warned):
            self.warned = True
            say(f"warning: the loss was {self.first_loss:.3g} and is {line['loss']:.3g} now; the run has "
                "probably diverged. Try a smaller --lr or a --warmup, with another --out.")
        line = {k: v if math.isfinite(v) else None for k, v in line.items()}           # JSON has no NaN
        with contextlib.suppress(OSError), open(beside(self.args.out, ".jsonl"), "a") as f:
            f.write(json.dumps(line) + "\n")               # if the disk is full, the next save says so


def run(main):
    """Call a script's main. A UserError becomes one sentence on stderr and exit code 2 (3: diverged). A
    training run that was asked to end early exits with 128 + the signal, as shells do, so that
    `pretrain.py && midtrain.py` ends, too. With several processes any exception ends this one at once,
    without waiting for the others: torchrun then ends them."""
    name, Stop.ended_by = Path(sys.argv[0]).name, 0
    try:
        try: main()
        finally: lock_log.file = None                      # frees --out for another run
        if dist.is_initialized():
            dist.barrier()                                 # rank 0 may still be writing the last save
            # DDP's reference cycles hold the group's threads; gloo aborts if they outlive the interpreter.
            gc.collect()
            dist.destroy_process_group()
        if Stop.ended_by: sys.exit(128 + Stop.ended_by)
        return
    except UserError as e:
        rank = "" if is_rank_0() else f"[rank {os.environ['RANK']}] "
        print(f"{rank}{name}: {e}", file=sys.stderr)
        code = e.code
    except KeyboardInterrupt:
        print(f"{name}: stopped at once; what was saved before is untouched.", file=sys.stderr)
        code = 130
    except BrokenPipeError:                                # `| head` closed stdout
        sys.stdout = open(os.devnull, "w")
        code = 1
    except Exception as e:
        text = str(e).partition("\n")[0]
        if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
            print(f"{name}: out of memory ({text}). In training try --microbatch N, or --dry-run, which "
                  "estimates the memory; in sampling --precision bf16; in solve.py a smaller --n.",
                  file=sys.stderr)
        else: traceback.print_exc()
        code = 1
    if dist.is_initialized():
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)                                     # an orderly exit would wait for the other ranks
    sys.exit(code)
