"""`make precision`: how much of each stage's loss and gradient survives a backbone in bf16 or TF32.

Prints the cosine similarity and the ratio of norms between a backbone of reduced precision and an fp32 one,
for the residual (what the loss measures: output minus target) and for the gradient of the loss. Then the
error of the endpoints, the targets of mid-training, if the teacher has reduced precision. The networks are
that of digits, and for 32x32 RGB images a DDPM++ with 64 channels, an EDM2 U-Net with 64 channels
(consistency branch) and a SiT of full depth with 128 channels (Mean Flow branch), pre-trained for 300 steps.
`precision.py SiT EDM2` takes these two only. The default of --precision follows from these tables. TF32 is
emulated: the inputs of every matrix product and convolution, in the forward and in the backward pass, are
rounded to 10 bits of mantissa, and sums stay in fp32, as on tensor cores.
"""
import contextlib, copy, sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import midtrain, model, posttrain_cm, posttrain_mf, pretrain, solve

STEPS = 300
RGB = model.custom_dataset((3, 32, 32), 0)
DDPMPP = RGB["network"] | {"model_channels": 64, "num_blocks": 2}
EDM2 = {"class": "EDM2UNet", "model_channels": 64, "num_blocks": 2}
SIT = {"class": "SiT", "patch_size": 2, "hidden_size": 128, "depth": 28, "num_heads": 4}
NETWORKS = {                              # name: (dataset with network, batch, learning rate, its branches)
    "digits":    (model.DATASETS["digits"], 64, 1e-3, "cm mf"),
    "DDPM++":    (RGB | {"network": DDPMPP}, 8, 1e-3, "cm mf"),
    "EDM2":      (RGB | {"network": EDM2}, 8, 1e-2, "cm"),
    "SiT":       (RGB | {"network": SIT, "time_scale": 1.0}, 8, 3e-4, "mf"),
}


def shapes(n, size=32):
    """Made-up RGB images: a disc on a colour ramp. -> fp32 (n,3,size,size) in [-1, 1]"""
    g = torch.Generator().manual_seed(0)
    line = torch.linspace(-1, 1, size)
    centre, radius = torch.rand(n, 2, 1, 1, generator=g) - 0.5, 0.2 + 0.4 * torch.rand(n, 1, 1, generator=g)
    disc = ((line[None, :, None] - centre[:, 0]) ** 2 + (line[None, None] - centre[:, 1]) ** 2 < radius ** 2)
    colour, tilt = 2 * torch.rand(2, n, 3, 1, 1, generator=g) - 1
    return torch.where(disc[:, None], colour, 0.5 * tilt * line).clamp(-1, 1)


def trained(header, images, labels, batch, lr, loss, device):
    """The network of `header` after STEPS steps of pre-training."""
    torch.manual_seed(0)
    net = model.build(header).to(device).train()
    opt = torch.optim.Adam(net.parameters(), lr)
    for step in range(STEPS):
        at = model.batch_indices(len(images), 0, step * batch, batch)
        x0, y = images[at].to(device), labels[at].to(device)
        t = torch.randn(batch, device=device)
        t = (1.2 * t - 1.2).exp() if header["kind"] == "Denoiser" else t.sigmoid()
        loss(net, x0, torch.randn_like(x0), t, y).mean().backward()
        opt.step()
        model.normalise_weights(net)
        opt.zero_grad()
    return net


def losses(D, u, x0, y, device):
    """-> {name: (network, function of it that gives residual and loss)}, all on the same random numbers. D or
    u may be None."""
    torch.manual_seed(1)
    batch = len(x0)
    eps, t = torch.randn_like(x0), (2.0 * torch.randn(batch, device=device) - 1.1).exp()
    r_, t_ = posttrain_mf.sample_r_t(batch, 1.0, -0.4, 1.0, device)
    z, v = x0 + t_[:, None, None, None] * (eps - x0), eps - x0
    if D: states, times = solve.dpm_solver_pp(lambda x, t: D(x, t, y), 80 * eps, solve.log_uniform_times(16))
    if u: flow_states, flow_times = solve.heun(lambda z, t: u(z, t, t, y), eps, solve.uniform_times(8))
    k = torch.arange(batch, device=device)

    def mid(net):
        a = states[k % 16, k], times.to(device).float()[k % 16]
        return net(*a, y) - states[-1], midtrain.cmt_loss(net, *a, states[-1], y, midtrain.huber)

    def mid_mf(net):
        i = k % 8
        j = i + 1 + k % (8 - i)                            # a later state of the trajectory
        t, r = (flow_times.to(device).float()[index] for index in (i, j))
        z_t, z_r = flow_states[i, k], flow_states[j, k]
        mean_velocity = (z_t - z_r) / (t - r)[:, None, None, None]
        return net(z_t, r, t, y) - mean_velocity, midtrain.cmt_meanflow_loss(net, z_t, t, z_r, r, y)

    def ect(net, q):
        r = posttrain_cm.ect_r(t, q, 0)
        both = [net(x0 + s[:, None, None, None] * eps, s, y) for s in (t, r)]
        return both[0] - both[1].detach(), posttrain_cm.ect_loss(net, x0, eps, t, r, y, 1 / (t - r), 0.0)

    def mf(net, derivative):
        dudt = derivative(net, z, r_, t_, y, v)
        return (net(z, r_, t_, y) - v + (t_ - r_)[:, None, None, None] * dudt,
                posttrain_mf.meanflow_loss(net, z, r_, t_, y, v, dudt, 0.0))

    of_D = {"mid-training, CM": mid} | {f"ECT, q = {q}": lambda net, q=q: ect(net, q)
                                        for q in (4, 16, 256, 512, 1024, 4096)}
    of_u = {"mid-training, MF": mid_mf,
            "MeanFlow, JVP": lambda net: mf(net, posttrain_mf.derivative_jvp),
            "MeanFlow, difference": lambda net: mf(net, posttrain_mf.derivative_difference)}
    return {name: (net, f) for net, table in ((D, of_D), (u, of_u)) if net for name, f in table.items()}


def compare(net, f, reduce):
    """-> cosine and ratio of norms of the residual, then of the gradient, reduced against fp32"""
    found = []
    for reduced in (False, True):
        net = copy.deepcopy(net).eval()
        with reduce(net) if reduced else contextlib.nullcontext():
            residual, loss = f(net)
            loss.mean().backward()
        found.append([residual.detach().flatten(), torch.cat([p.grad.flatten() for p in net.parameters()
                                                              if p.grad is not None])])
    return [value.item() for full, less in zip(*found) for value in
            (torch.cosine_similarity(full.double(), less.double(), 0), less.norm() / full.norm())]


@torch.no_grad()
def endpoint_errors(teacher, x0, y):
    """-> root mean square differences of endpoints, pixels in [-1, 1]: a backbone in bf16 against fp32, one
    in TF32 against fp32, both with 16 NFE (Heun: 15), and in fp32 16 NFE against 128 (Heun: 127)"""
    torch.manual_seed(2)
    noise = torch.randn_like(x0)
    def endpoint(reduce, nfe=16):
        net = copy.deepcopy(teacher)
        with reduce(net):
            if isinstance(net, model.MeanVelocity):
                return solve.heun(lambda z, t: net(z, t, t, y), noise, solve.uniform_times(nfe // 2))[0][-1]
            return solve.dpm_solver_pp(lambda x, t: net(x, t, y), 80 * noise,
                                       solve.log_uniform_times(nfe))[0][-1]
    exact = endpoint(lambda net: contextlib.nullcontext())
    return [(found - exact).square().mean().sqrt().item() for found in
            (endpoint(bf16), endpoint(tf32), endpoint(lambda net: contextlib.nullcontext(), 128))]


def bf16(net):
    net.backbone_dtype = torch.bfloat16
    return contextlib.nullcontext()


def to_tf32(x):
    """Round fp32 to the nearest number with 10 bits of mantissa, ties away from zero."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1fff).view(torch.float32)


class RoundForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return to_tf32(x)
    @staticmethod
    def backward(ctx, gradient): return gradient


class RoundBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, gradient): return to_tf32(gradient)


class TF32(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        count = {F.linear: 2, F.conv2d: 2, F.scaled_dot_product_attention: 3}.get(function, 0)
        args = [RoundForward.apply(x) if k < count else x for k, x in enumerate(args)]
        out = function(*args, **kwargs or {})
        return RoundBackward.apply(out) if count else out


def tf32(net):
    return TF32()


def main():
    device, chosen = model.setup(one_process=True)[2], sys.argv[1:] or NETWORKS
    if unknown := set(chosen) - NETWORKS.keys():
        sys.exit(f"{', '.join(unknown)}: choose from {', '.join(NETWORKS)}.")
    data = model.Data(Path(__file__).parent.parent / "data/digits.npz")
    digits, made_up = (model.to_float(data.batch(range(len(data)))[0]), data.labels), shapes(512)
    print(f"{STEPS} steps of pre-training, {device.type}, torch {torch.__version__}\n")
    print("| network, batch | loss | backbone | residual: cosine | norm | gradient: cosine | norm |")
    print("|---|---|---|---|---|---|---|")
    endpoints = []
    for name in chosen:
        row, batch, lr, branches = NETWORKS[name]
        images, labels = digits if name == "digits" else (made_up, torch.zeros(512, dtype=torch.int64))
        x0, y, nets = images[:batch].to(device), labels[:batch].to(device), {}
        for branch in branches.split():
            kind, loss, extra = {"cm": ("Denoiser", pretrain.edm_loss, {}),
                                 "mf": ("MeanVelocity", pretrain.flow_loss, {"interval": True})}[branch]
            header = model.fresh_header(row, kind, **extra)
            nets[branch] = trained(header, images, labels, batch, lr, loss, device).eval()
            errors = endpoint_errors(nets[branch], x0, y)
            endpoints.append(f"| {name}, {branch} | " + " | ".join(f"{e:.4f}" for e in errors) + " |")
        with torch.no_grad(): table = losses(nets.get("cm"), nets.get("mf"), x0, y, device)
        for loss, (net, f) in table.items():
            for body, reduce in [("bf16", bf16)] + [("tf32", tf32)] * (net is nets.get("cm")):
                numbers = " | ".join(f"{x:.4f}" for x in compare(net, f, reduce))
                print(f"| {name}, {batch} | {loss} | {body} | {numbers} |", flush=True)
    print("\n| error of the endpoint | teacher in bf16 | in TF32 | 16 instead of 128 NFE |")
    print("|---|---|---|---|")
    print("\n".join(endpoints))


if __name__ == "__main__":
    main()
