"""`make precision`: how much of each stage's loss and gradient survives a backbone in bf16 or TF32.

Prints the cosine similarity and the ratio of norms between a backbone of reduced precision and an fp32 one,
for the residual (what the loss measures: output minus target) and for the gradient of the loss. Then the
error of the endpoints, the targets of mid-training, if the teacher has reduced precision (`precision.py
endpoints` prints this table alone). The networks are that of digits and a 32x32 RGB DDPM++ with 64 channels,
both pre-trained here for 300 steps. The default of --precision follows from these tables. TF32 is emulated:
the inputs of every matrix product and convolution, in the forward and in the backward pass, are rounded to 10
bits of mantissa, and sums stay in fp32, as on tensor cores.
"""
import contextlib, copy, sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import midtrain, model, posttrain_cm, posttrain_mf, pretrain, solve

STEPS = 300


def shapes(n, size=32):
    """Made-up RGB images: a disc on a colour ramp. -> fp32 (n,3,size,size) in [-1, 1]"""
    g = torch.Generator().manual_seed(0)
    line = torch.linspace(-1, 1, size)
    centre, radius = torch.rand(n, 2, 1, 1, generator=g) - 0.5, 0.2 + 0.4 * torch.rand(n, 1, 1, generator=g)
    disc = ((line[None, :, None] - centre[:, 0]) ** 2 + (line[None, None] - centre[:, 1]) ** 2 < radius ** 2)
    colour, tilt = 2 * torch.rand(2, n, 3, 1, 1, generator=g) - 1
    return torch.where(disc[:, None], colour, 0.5 * tilt * line).clamp(-1, 1)


def trained(header, images, labels, batch, loss, device):
    """The network of `header` after STEPS steps of pre-training."""
    torch.manual_seed(0)
    net = model.build(header).to(device).train()
    opt = torch.optim.Adam(net.parameters(), 1e-3)
    for step in range(STEPS):
        at = model.batch_indices(len(images), 0, step * batch, batch)
        x0, y = images[at].to(device), labels[at].to(device)
        t = torch.randn(batch, device=device)
        t = (1.2 * t - 1.2).exp() if header["kind"] == "Denoiser" else t.sigmoid()
        loss(net, x0, torch.randn_like(x0), t, y).mean().backward()
        opt.step()
        opt.zero_grad()
    return net


def losses(D, u, x0, y, device):
    """-> {name: (network, function of it that gives residual and loss)}, all on the same random numbers."""
    torch.manual_seed(1)
    batch = len(x0)
    eps, t = torch.randn_like(x0), (2.0 * torch.randn(batch, device=device) - 1.1).exp()
    r_, t_ = posttrain_mf.sample_r_t(batch, 1.0, -0.4, 1.0, device)
    states, times = solve.dpm_solver_pp(lambda x, t: D(x, t, y), 80 * eps, solve.log_uniform_times(16))
    z, v = x0 + t_[:, None, None, None] * (eps - x0), eps - x0

    def mid(net):
        i = torch.arange(batch, device=device) % 16
        a = states[i, torch.arange(batch, device=device)], times.to(device).float()[i]
        return net(*a, y) - states[-1], midtrain.cmt_loss(net, *a, states[-1], y, midtrain.huber)

    def ect(net, q):
        r = posttrain_cm.ect_r(t, q, 0)
        both = [net(x0 + s[:, None, None, None] * eps, s, y) for s in (t, r)]
        return both[0] - both[1].detach(), posttrain_cm.ect_loss(net, x0, eps, t, r, y, 1 / (t - r), 0.0)

    def mf(net, derivative):
        dudt = derivative(net, z, r_, t_, y, v)
        return (net(z, r_, t_, y) - v + (t_ - r_)[:, None, None, None] * dudt,
                posttrain_mf.meanflow_loss(net, z, r_, t_, y, v, dudt, 0.0))

    return ({"mid-training, CM": (D, mid)} | {f"ECT, q = {q}": (D, lambda net, q=q: ect(net, q))
                                              for q in (4, 16, 256, 512, 1024, 4096)}
            | {"MeanFlow, JVP": (u, lambda net: mf(net, posttrain_mf.derivative_jvp)),
               "MeanFlow, difference": (u, lambda net: mf(net, posttrain_mf.derivative_difference))})


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
def endpoint_errors(D, x0, y):
    """-> root mean square differences of endpoints, pixels in [-1, 1]: a backbone in bf16 against fp32, one
    in TF32 against fp32, both with 16 NFE, and in fp32 16 NFE against 128"""
    torch.manual_seed(2)
    noise = 80 * torch.randn_like(x0)
    def endpoint(reduce, nfe=16):
        net = copy.deepcopy(D)
        with reduce(net):
            return solve.dpm_solver_pp(lambda x, t: net(x, t, y), noise, solve.log_uniform_times(nfe))[0][-1]
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
    device, only_endpoints = model.setup(one_process=True)[2], "endpoints" in sys.argv
    data = model.Data(Path(__file__).parent.parent / "data/digits.npz")
    digits = model.to_float(data.batch(range(len(data)))[0]), data.labels
    rgb = model.custom_dataset((3, 32, 32), 0)
    rgb["network"] = rgb["network"] | {"model_channels": 64, "num_blocks": 2}
    print(f"{STEPS} steps of pre-training, {device.type}, torch {torch.__version__}\n")
    if not only_endpoints:
        print("| network, batch | loss | backbone | residual: cosine | norm | gradient: cosine | norm |")
        print("|---|---|---|---|---|---|---|")
    endpoints = []
    made_up = shapes(512), torch.zeros(512, dtype=torch.int64)
    for name, row, (images, labels), batch in [("digits", model.DATASETS["digits"], digits, 64),
                                               ("32x32 RGB", rgb, made_up, 8)]:
        D = trained(model.fresh_header(row), images, labels, batch, pretrain.edm_loss, device)
        x0, y = images[:batch].to(device), labels[:batch].to(device)
        errors = endpoint_errors(D.eval(), x0, y)
        endpoints.append(f"| {name} | " + " | ".join(f"{e:.4f}" for e in errors) + " |")
        if only_endpoints: continue
        flow = model.fresh_header(row, "MeanVelocity", interval=True)
        u = trained(flow, images, labels, batch, pretrain.flow_loss, device)
        with torch.no_grad(): table = losses(D, u.eval(), x0, y, device)
        for loss, (net, f) in table.items():
            for body, reduce in [("bf16", bf16)] + [("tf32", tf32)] * (net is D):
                numbers = " | ".join(f"{x:.4f}" for x in compare(net, f, reduce))
                print(f"| {name}, {batch} | {loss} | {body} | {numbers} |", flush=True)
    print("\n| error of the endpoint | teacher in bf16 | in TF32 | 16 instead of 128 NFE |")
    print("|---|---|---|---|")
    print("\n".join(endpoints))


if __name__ == "__main__":
    main()
