"""What the experiments share: running the project's scripts, scoring their files, counting their compute."""
import json, statistics, subprocess, sys, time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fid, model
from tools import dry_run


def command(script, *args):
    """Run a script of the project, print what it prints -> its lines. Exits if the script fails or is
    stopped."""
    line = [sys.executable, f"{script}.py", *map(str, args)]
    print("$ python " + " ".join(line[1:]), flush=True)
    started, lines = time.time(), []
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        for text in process.stdout:
            lines.append(text)
            if script != "fid": print("  " + text, end="", flush=True)
    if process.returncode: sys.exit(process.returncode)
    print(f"  {time.time() - started:.0f} s", flush=True)
    return lines


def pyplot():
    """matplotlib.pyplot for figures without a screen"""
    try: import matplotlib
    except ImportError: sys.exit("matplotlib is missing; `pip install matplotlib`.")
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def distances(files, n=None, ref="digits"):
    """FD-pixels of each FILE:STEPS from n samples, or of each set of images."""
    samples = ["--n", n] if n else []
    lines = command("fid", *files, "--ref", ref, *samples, "--features", "pixels")
    return [json.loads(line)["fd"] for line in lines if line.startswith("{")]


def scores(path, n, ref="digits", calls=(1, 2)):
    """FD-pixels of n samples of a checkpoint for each number of calls, stored beside it as NAME.json."""
    memory, sha256 = Path(path).with_suffix(".json"), model.sha256(path)[:16]
    known = json.loads(memory.read_text()) if memory.exists() else {}
    keys = [f"{sha256}: {k} NFE, {n} samples, {ref}" for k in calls]
    if missing := [k for k, key in zip(calls, keys) if key not in known]:
        found = distances([f"{path}:{k}" for k in missing], n, ref)
        known |= {keys[calls.index(k)]: value for k, value in zip(missing, found)}
        memory.write_text(json.dumps(known, indent=0))
    return [known[key] for key in keys]


def forwards_per_sample(header):
    """Network forwards that training on one image or pair takes, including the teacher's. A backward counts
    as two forwards, and a JVP as two, by convention: measured on a CPU (`make bench`), it takes more."""
    s, stage = header["settings"], header["stage"]
    if stage.startswith("midtrain"):                                 # student forward 1, backward 2
        return 3 + dry_run.nfe_per_pair(header, s["nfe"], s["solver"], s["pairing"], s.get("guidance", 1))
    if stage == "posttrain_cm":                                      # target 1, forward 1, backward 2
        guided = 2 if s.get("guidance", 1) != 1 else 1
        return 4 + (s["loss"] == "ecd") * guided * (2 if s["solver"] == "heun" else 1)
    if stage == "posttrain_mf":                                      # JVP 2 for the samples with r < t
        guided = (s["omega"], s["kappa"]) != (1, 0)
        r_neq_t = s.get("r_neq_t", s.get("jumps", 1) / 4)            # older files have jumps
        return 3 + 2 * r_neq_t + 2 * guided + (s["velocity"] == "teacher")
    return 3


def compute(path):
    """Network forwards of the run that made a file."""
    header = model.read(path, tensors=False)[1]
    return forwards_per_sample(header) * header[header["unit"]]


def steps_for(total, like):
    """Steps of a run like the one that made the file `like`, for `total` network forwards."""
    header = model.read(like, tensors=False)[1]
    return round(total / forwards_per_sample(header) / header["settings"]["batch"])


def spread(values, digits=3):
    """One number a seed -> "mean ± standard deviation", of one seed only the number"""
    values = list(values)
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


# --- distances in the features of a small classifier --------------------------------------------------------

class Classifier(nn.Module):
    """uint8 (n,side,side,1) -> features (n,128) and logits (n,10)"""
    def __init__(self, side):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.hidden, self.last = nn.Linear(64 * (side // 4) ** 2, 128), nn.Linear(128, 10)

    def forward(self, images):
        x = model.to_float(torch.as_tensor(images)).permute(0, 3, 1, 2)
        for conv in self.conv1, self.conv2: x = F.max_pool2d(F.relu(conv(x)), 2)
        features = F.relu(self.hidden(x.flatten(1)))
        return features, self.last(F.dropout(features, 0.5, self.training))


def classifier(path, images, labels):
    """The classifier in `path`, or a new one, trained on images uint8 (n,side,side,1) in 20 epochs."""
    net = Classifier(images.shape[1])
    if Path(path).exists(): net.load_state_dict(model.read(path)[0])
    else:
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for indices in (i for _ in range(20) for i in torch.randperm(len(images)).split(100)):
            F.cross_entropy(net(images[indices])[1], labels[indices]).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save(path, net.state_dict(), {"stage": "classifier"})
    return net.eval().requires_grad_(False)


def accuracy(net, images, labels):
    return (torch.cat([net(x)[1] for x in images.split(500)]).argmax(1) == labels).double().mean().item()


def features(net, images):
    return torch.cat([net(x)[0] for x in images.split(500)])


def distance(real, fake):
    """The Frechet distance of two sets of features (n,d)"""
    return fid.frechet_distance(*(m for x in (real, fake) for m in fid.moments(*fid.sums([x])))).item()
