"""Stage 1, pre-training: a diffusion model D(x, t) ~ E[x_0 | x_t], the teacher of everything after it.

  reads   the images of --data
  writes  runs/D/pretrain.safetensors   (EMA weights; midtrain.py solves their ODE and starts from them)
  run     python pretrain.py                                           # digits, two minutes on two CPU cores
          torchrun --nproc_per_node=8 pretrain.py --data cifar10       # EDM's recipe, 200M images
  cost    per image: one forward and one backward
  expect  digits: the loss, summed over 64 pixels, falls from about 72 to about 26
"""
import copy

import torch

import model

RECIPES = {
    # cifar10 is EDM's (2206.00364, table 7): constant lr, an EMA half-life of 500,000 images. The other rows
    # are ours. decay: lr falls to 0 at the end; warmup: in images; ln t ~ N(P_mean, P_std^2).
    "digits":   dict(steps=1600,    batch=64,  lr=2e-3, decay=True,  warmup=0,        ema=0.99,
                     P_mean=-1.2, P_std=1.2),
    "cifar10":  dict(steps=390_625, batch=512, lr=1e-3, decay=False, warmup=10**7,    ema=0.5 ** (512 / 5e5),
                     P_mean=-1.2, P_std=1.2),
    "own data": dict(steps=20_000,  batch=128, lr=1e-3, decay=True,  warmup=12_800,   ema=0.999,
                     P_mean=-1.2, P_std=1.2),
}


# === the method =============================================================================================

def edm_loss(D, x0, eps, t, y, sigma_data=0.5):
    """EDM's denoising loss (2206.00364, eq. 2 with the weight of table 1), one number per sample.
    x0, eps (B,C,H,W), t (B,), y (B,) -> (B,)"""
    x_t = x0 + t[:, None, None, None] * eps
    weight = (t ** 2 + sigma_data ** 2) / (t * sigma_data) ** 2
    # w(t) ||D(x_t, t) - x_0||^2 with w = 1 / c_out(t)^2: the raw network's error counts alike at every t
    return weight * (D(x_t, t, y) - x0).square().sum(dim=(1, 2, 3))


def log_normal(n, mean, std, device):
    """ln t ~ N(mean, std^2) -> t (n,)"""
    return (mean + std * torch.randn(n, device=device)).exp()


# === the run ================================================================================================

def main():
    p = model.parser(__doc__, RECIPES, reads=None, writes="pretrain")
    args = p.parse_args()
    rank, world, device, batch = model.setup(args.batch)

    images, labels, row = model.read_images(args.path, model.DATASETS.get(args.row))
    model.reseed(args.seed)
    header = model.fresh_header(row) | model.stamp(args, "pretrain", "images", world, data=args.path)
    net = model.build(header).to(device).train()
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    net.body_dtype = model.BODY[args.precision]
    ddp = model.parallel(net, world)
    opt = torch.optim.Adam(net.parameters(), args.lr, betas=(0.9, 0.999), eps=1e-8)

    step = start = model.resume_run(args.out, net, ema, opt, header)
    log = model.Log(args, "images", world, step)
    while True:
        done = step == args.steps
        if rank == 0 and step > start and (done or step % args.save_every == 0):
            model.save_run(args.out, step, net, ema, opt, header)
        if done: break

        model.reseed(args.seed, rank, step)
        at = model.batch_indices(len(images), args.seed, step * args.batch + rank * batch, batch)
        x0 = model.to_float(images[at]).to(device)                                 # (b, C, H, W)
        y = model.drop_labels(labels[at], header).to(device)                       # (b,)
        t = log_normal(batch, args.P_mean, args.P_std, device)

        loss = edm_loss(ddp, x0, torch.randn_like(x0), t, y).mean()
        loss.backward()
        lr = args.lr * min(1, (step + 1) * args.batch / max(args.warmup, 1))
        if args.decay: lr *= 1 - step / args.steps
        norm = model.update(net, ema, opt, lr, decay=min(args.ema, (1 + step) / (10 + step)))
        step += 1
        log(step, loss, norm, lr)


if __name__ == "__main__":
    model.run(main)
