"""The networks that compare images: Inception-v3 for fid.py, and LPIPS's VGG-16 and E-LatentLPIPS for
`midtrain.py --distance`. Their weights are published files that we cannot redistribute."""
import os

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import model

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
WHERE = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION}"


# === Inception-v3, the form that FID is measured with =======================================================

def resize_tf1(x, size=299):
    """TensorFlow 1's bilinear resize: output pixel i reads from i n / size, without the half-pixel shift of
    today's filters, and without antialiasing. x (B,C,H,W) -> (B,C,size,size)"""
    for dim in (3, 2):
        n = x.shape[dim]
        at = torch.arange(size, device=x.device, dtype=torch.float32) * (
            torch.tensor(n, dtype=torch.float32) / size).to(x.device)
        low = at.long().clamp(max=n - 1)
        weight = (at - low).to(x.dtype).reshape(-1, *[1] * (3 - dim))
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
        x = a + (b - a) * weight
    return x


# Layers are named as in the weights file. A branch is a list of convolutions (name, channels, kernel); two in
# brackets work side by side. In a block that halves the size ("stride") the last of each branch has stride 2.

class Conv(nn.Module):
    def __init__(self, c_in, c_out, kernel, stride=1, pad=True):
        super().__init__()
        kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        pad = [k // 2 * pad for k in kernel]
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, pad, bias=False)
        self.bn = nn.BatchNorm2d(c_out, 1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    def __init__(self, c_in, branches, pool=None, max_pool=False, stride=1):
        super().__init__()
        self.branches, self.max_pool, self.stride = branches, max_pool, stride
        for branch in branches:
            c = c_in
            for step in branch:
                parallel = step if isinstance(step, list) else [step]
                last = stride == 2 and step is branch[-1]
                for name, c_out, kernel in parallel:
                    self.add_module(name, Conv(c, c_out, kernel, 2 if last else 1, pad=not last))
                c = parallel[0][1]
        self.branch_pool = Conv(c_in, pool, 1) if pool else None

    def forward(self, x):
        out = []
        for branch in self.branches:
            h = x
            for step in branch:
                parallel = step if isinstance(step, list) else [step]
                h = torch.cat([getattr(self, name)(h) for name, _, _ in parallel], 1)
            out.append(h)
        if self.stride == 2:  pooled = F.max_pool2d(x, 3, 2)
        elif self.max_pool:   pooled = F.max_pool2d(x, 3, 1, 1)
        else:                 pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([*out, self.branch_pool(pooled) if self.branch_pool else pooled], 1)


def mixed_a(c_in, pool):
    return Mixed(c_in, [[("branch1x1", 64, 1)], [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
                        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]],
                 pool)


def mixed_c(c):
    return Mixed(768, [[("branch1x1", 192, 1)],
                       [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))],
                       [("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, (7, 1)),
                        ("branch7x7dbl_3", c, (1, 7)), ("branch7x7dbl_4", c, (7, 1)),
                        ("branch7x7dbl_5", 192, (1, 7))]], 192)


def mixed_e(c_in, max_pool):
    split = lambda name: [(f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))]
    return Mixed(c_in, [[("branch1x1", 320, 1)], [("branch3x3_1", 384, 1), split("branch3x3_2")],
                        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), split("branch3x3dbl_3")]],
                 192, max_pool)


class Inception(nn.Module):
    """uint8 (n,H,W,C), C 1 (repeated) or 3 -> features (n,2048), the last mean over pixels."""
    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2, pad=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_a(192, 32), mixed_a(256, 64), mixed_a(288, 64)
        self.Mixed_6a = Mixed(288, [[("branch3x3", 384, 3)], [
            ("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]], stride=2)
        self.Mixed_6b, self.Mixed_6c = mixed_c(128), mixed_c(160)
        self.Mixed_6d, self.Mixed_6e = mixed_c(160), mixed_c(192)
        self.Mixed_7a = Mixed(768, [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)], [
            ("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3)]], stride=2)
        self.Mixed_7b, self.Mixed_7c = mixed_e(1280, False), mixed_e(2048, True)

    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)          # fp32, also with --precision tf32
    def forward(self, images):
        x = rearrange(torch.as_tensor(images), "n h w c -> n c h w").to(self.Conv2d_1a_3x3.conv.weight)
        x = (resize_tf1(x.expand(-1, 3, -1, -1)) - 128) / 128
        for name, layer in self.named_children():
            if name in ("Conv2d_3b_1x1", "Mixed_5b"): x = F.max_pool2d(x, 3, 2)
            x = layer(x)
        return x.mean((2, 3))


def load_inception(path):
    """The published weights (see WHERE) -> Inception in eval mode. Raises UserError."""
    if not os.path.exists(path):
        raise model.UserError(f"{path} does not exist; fetch {WHERE} and give it as --inception.")
    net = Inception()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict({k: v for k, v in weights.items() if not k.startswith("fc.")})
    except Exception as e:                                 # damaged, or another network
        reason = str(e).partition("\n")[0]
        raise model.UserError(f"{path} is not {INCEPTION} ({type(e).__name__}: {reason}); fetch {WHERE}.")
    return net.eval().requires_grad_(False)


# === the paper's distances ==================================================================================

class LPIPS(nn.Module):
    """LPIPS of VGG-16 (1801.03924): features of both images, of unit length in each pixel, their squared
    difference, channels weighted, mean over pixels, sum over five depths. In fp32, at the images' resolution.
    vgg, lin: state dicts of torchvision's vgg16 and of the lpips package's linear layers.

    forward(a, b): (B,C,H,W) in [-1, 1], C 1 (repeated) or 3, H and W >= 16 -> (B,)"""
    DEPTHS = (0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)      # convolutions between poolings

    def __init__(self, vgg, lin):
        super().__init__()
        for n in sum(self.DEPTHS, ()):
            self.register_buffer(f"weight{n}", vgg[f"features.{n}.weight"].float())
            self.register_buffer(f"bias{n}", vgg[f"features.{n}.bias"].float())
        for k in range(len(self.DEPTHS)):
            self.register_buffer(f"lin{k}", lin[f"lin{k}.model.1.weight"].float())      # (1, channels, 1, 1)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])

    def features(self, x):
        x = (x.expand(-1, 3, -1, -1) - self.shift) / self.scale
        for k, depth in enumerate(self.DEPTHS):
            if k: x = F.max_pool2d(x, 2)
            for n in depth:
                x = F.conv2d(x, getattr(self, f"weight{n}"), getattr(self, f"bias{n}"), padding=1).relu()
            yield x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)

    def forward(self, a, b):
        return sum((getattr(self, f"lin{k}") * (f - g).square()).sum(1).mean((1, 2))
                   for k, (f, g) in enumerate(zip(self.features(a), self.features(b))))


LPIPS_FILES = ("--distance lpips needs --lpips VGG.pth LIN.pth: torchvision's vgg16-397923af.pth from "
               "download.pytorch.org/models, and lpips/weights/v0.1/vgg.pth from "
               "github.com/richzhang/PerceptualSimilarity.")


def load_lpips(files, header):
    """--lpips VGG.pth LIN.pth -> LPIPS, for images as the header says. Raises UserError."""
    C, H, _ = model.image_shape(header)
    if C not in (1, 3) or H < 16:
        raise model.UserError("--distance lpips is for images of 1 or 3 channels and at least 16x16 pixels, "
                              f"not for {C}x{H}x{H}.")
    if C == 1: print("LPIPS: the one channel is repeated to three")
    try:
        return LPIPS(*(torch.load(file, map_location="cpu", weights_only=True) for file in files))
    except Exception as e:                                 # missing, damaged, or of another network
        reason = str(e).partition("\n")[0]
        raise model.UserError(f"--lpips {' '.join(files)}: {type(e).__name__} ({reason}); {LPIPS_FILES}")


def load_elatentlpips(header, device):
    """--distance elatentlpips -> E-LatentLPIPS (2405.05967) for latents scaled as the header says. The
    package downloads its weights, for the latents of Stable Diffusion 1.5 (pixels in [-1, 1]), into ckpt/;
    mind their licence. The paper has the same kind of distance, with a network that its authors trained on
    EDM2's latents. Not tried with these weights yet. Raises UserError."""
    if "latents" not in header:
        raise model.UserError("--distance elatentlpips is for latents; images have --distance lpips.")
    try: from elatentlpips import ELatentLPIPS
    except ImportError as e:
        raise model.UserError(f"--distance elatentlpips needs `pip install elatentlpips` ({e}).")
    if header["latents"]["pixel_range"] != [-1, 1]:
        print("warning: E-LatentLPIPS was trained for latents of pixels in [-1, 1], not in "
              f"{header['latents']['pixel_range']}.")
    try: net = ELatentLPIPS(encoder="sd15", augment="bg", verbose=False).to(device).requires_grad_(False)
    except Exception as e:                                 # without a network, or with a damaged file
        raise model.UserError(f"--distance elatentlpips: its weights cannot be loaded ({e}); run once where "
                              "they can be downloaded, and keep the folder ckpt/.")
    def distance(a, b):
        a, b = model.to_latents(a, header), model.to_latents(b, header)
        return net(a, b, normalize=True).flatten()                                         # (B,1,1,1) -> (B,)
    return distance
