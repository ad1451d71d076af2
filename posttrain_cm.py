"""Stage 4a, post-training as a consistency model: Easy Consistency Tuning (ECT) on real images.

  reads   runs/D/midtrain_cm.safetensors and the images of --data
  writes  runs/D/posttrain_cm.safetensors   EMA weights; sample.py draws from them in one or two steps
  run     python posttrain_cm.py                                      # digits, half a minute on two CPU cores
          torchrun --nproc_per_node=8 posttrain_cm.py --data cifar10       # the paper's recipe, 12.8M images
  cost    per image: two forwards and one backward
  expect  digits: a loss of about 3; it need not fall, its target moves with the network

The baseline this project is about, ECT straight from the diffusion model with its doubling schedule:
     python posttrain_cm.py --init runs/digits/pretrain.safetensors --q 2 --double 125 --steps 1500 \
                            --lr 3e-4 --out runs/digits/ect.safetensors

The body runs in fp32 here, on every device: in bf16 the difference f(x_t) - f(x_r) drowns if q is large.
"""
import copy

import torch

import model

RECIPES = {
    # cifar10: the paper's steps, batch, lr, EMA and q; ECT's ln t ~ N(P_mean, P_std^2) (2406.14548); dropout
    # and mid_t are the released code's. The other rows are ours. double = 0 keeps the gap fixed, right after
    # mid-training; c = 0 is the plain l2 norm; `network`: what differs from the network of --init; mid_t: the
    # noise level of the second of two sampling steps.
    "digits":   dict(steps=300,     batch=64,  lr=1e-4, ema=0.99,   q=256,  double=0, c=0.0,
                     P_mean=-1.1, P_std=2.0, network=dict(), mid_t=0.821),
    "cifar10":  dict(steps=100_000, batch=128, lr=1e-4, ema=0.9999, q=4096, double=0, c=0.0,
                     P_mean=-1.1, P_std=2.0, network=dict(dropout=0.2), mid_t=0.821),
    "own data": dict(steps=10_000,  batch=128, lr=3e-4, ema=0.999,  q=256,  double=0, c=0.0,
                     P_mean=-1.1, P_std=2.0, network=dict(), mid_t=0.821),
}


# === the method =============================================================================================

def ect_loss(f, x0, eps, t, r, y, weight, c):
    """Easy Consistency Tuning (2406.14548), one number per sample: two points of one noising line, one end.
    x0, eps (B,C,H,W), t, r, weight (B,), y (B,), c >= 0 a number -> (B,)"""
    t_, r_ = t[:, None, None, None], r[:, None, None, None]
    # The target sees the same noise and, because the RNG state is put back behind it, the same dropout mask.
    devices = [x0.device] if x0.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        target = torch.where(r_ > 0, f(x0 + r_ * eps, r, y), x0)
    # e = f(x_t, t) - sg f(x_r, r),   w(t, r) (sqrt(||e||^2 + c^2) - c)
    e = torch.linalg.vector_norm(f(x0 + t_ * eps, t, y) - target, dim=(1, 2, 3))   # at 0: gradient 0
    return weight * (e if c == 0 else e ** 2 / ((e ** 2 + c ** 2).sqrt() + c))


def ect_r(t, q, stage, k=8.0):
    """The nearer point r = t (1 - n(t) / q^(stage+1)) >= 0 with n(t) = 1 + k sigmoid(-t). t (B,) -> (B,)"""
    ratio = min(q ** (stage + 1), 2 ** 16)             # beyond, t - r is rounding noise in fp32, then 0
    return (t * (1 - (1 + k * torch.sigmoid(-t)) / ratio)).clamp(min=0)


# === the run ================================================================================================

def main():
    p = model.parser(__doc__, RECIPES, reads="midtrain_cm", writes="posttrain_cm", precision="fp32")
    p.add_argument("--q", type=model.positive, help="gap: r = t (1 - n(t) / q^(stage+1))")
    p.add_argument("--double", type=int, metavar="STEPS", help="steps a stage; 0: the gap stays fixed")
    args = p.parse_args()
    rank, world, device, batch = model.setup(args.batch)

    images, labels, row = model.read_images(args.path, model.DATASETS.get(args.row))
    model.reseed(args.seed)
    made_by = f"python midtrain.py --data {args.data}"
    net, header = model.first_weights(args.init, made_by, row, "Denoiser", device, **args.network)
    model.check_fit(args.init, header, args.path, row["shape"], row["classes"])
    header |= model.stamp(args, "posttrain_cm", "images", world, init=args.init, data=args.path)
    header["mid_t"] = args.mid_t
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    net.train().body_dtype = model.BODY[args.precision]
    ddp = model.parallel(net, world)
    opt = torch.optim.RAdam(net.parameters(), args.lr, betas=(0.9, 0.999), eps=1e-8, foreach=True)

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
        t = (args.P_mean + args.P_std * torch.randn(batch, device=device)).exp()   # ln t ~ N(P_mean, P_std^2)
        r = ect_r(t, args.q, step // args.double if args.double else 0)

        loss = ect_loss(ddp, x0, torch.randn_like(x0), t, r, y, 1 / (t - r), args.c).mean()
        loss.backward()
        lr = args.lr * (1 - step / args.steps)
        norm = model.update(net, ema, opt, lr, decay=min(args.ema, (1 + step) / (10 + step)))
        step += 1
        log(step, loss, norm, lr)


if __name__ == "__main__":
    model.run(main)
