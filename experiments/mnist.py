"""`make mnist`: what mid-training is worth on MNIST, at equal compute, with tuning for both sides.

This protocol was committed before the first run. It was changed eight times since.
  1. Before any tuning, with no results but the teacher's, to save time (all would have taken 36 hours): the
     unit of compute was halved twice, training set to bf16, and the teacher's training shortened to 3,000
     steps.
  2. After the consistency branch had its results at one unit. The optimizer was RAdam, whose first five steps
     are those of SGD, and with them Mean Flow mid-training diverged. Since then Mean Flow mid-training uses
     Adam with 10 steps of warm-up, and ECT after CMT or KD uses Adam at 1/10 of mid-training's rate (before:
     RAdam at 1/30). 16 trials of RAdam with other rates and gaps had helped little by FD; 7 trials on the
     tuning seed chose Adam and 1/10. The old numbers are kept as "by RAdam", the trials between as "after the
     fact".
  3. The baselines had only RAdam, so each was tuned with Adam as well, at one unit. An Adam baseline that is
     better there over the seeds (geometric mean of FD in one and two steps) also runs at the other budgets.
     For ECT that is so; for MeanFlow both optimizers are equal within the spread, and RAdam was kept. Plain
     ECT at one unit is repeated with the settings of its best trial with one unit. That trial was made for
     the budget of 4; the tuning for one unit, with trials of half a unit, chose other settings.
  4. To save time, at 4 units plain ECT runs by Adam only. With 2 units both optimizers are equal within the
     spread.
  5. After plain ECT had its results at 4 units, CMT + ECT was added there. To save time it took the settings
     for 2; these results are kept as "settings for two units". Later it was tuned for 4 by the same rules.
  6. After CMT + MeanFlow had chosen a share of 0.97 for mid-training, the end of its ladder, the share 1 was
     added: mid-training alone. (KD + ECT chose 0.05, the other end. In a trial with a quarter of a unit that
     is one step, so there is no smaller one.)
  7. Trials of half a unit on the tuning seed (`checks`) had shown that MeanFlow is better with r < t for 75 %
     of the samples and logit-normal(-2, 2) times, those of its CIFAR-10 recipe. So this baseline was added.
     It is by Adam, which was the better optimizer there, and tuned by these rules. Its first trials were far
     better than all of MeanFlow before. So CMT + MeanFlow is tuned with these times and Adam, too. Its p in
     post-training is the one chosen for the baseline with one unit. In the trials for two units another
     setting of the baseline was better, so one unit is repeated with that, as for plain ECT.
  8. After all results of ECT. Its settings for one unit come from trials of half a unit, each a single noisy
     one. Trials with one unit, made for two and four units, rank other settings first, for both sides. So
     the best four settings of these trials (16 of CMT + ECT, 17 of plain ECT by Adam) are trained with one
     unit on seeds 3 and 4, which nothing else uses (`finalists`). Reported are all of them, the means over
     the four settings, and for each seed the setting that is best on the other one (by the geometric mean
     of FD in one and two steps). The earlier results stay.

Data      10,000 images of MNIST (data/mnist.npz, 28x28). The first 5,000 train; the other 5,000 are the
          reference.
Network   a U-Net with 0.39M parameters, the same for all methods. Three training seeds, 0 to 2; one teacher
          of each kind per seed.
Compute   in network forwards after the teacher; a backward counts as two, the teacher's calls count
          (common.py). One unit is 125,000 forwards, 488 training steps of ECT with a batch of 64. Training
          is in bf16, but in fp32 in posttrain_cm.py, as on a GPU.
Methods   cm  CMT + ECT at 1, 2 and 4 units; plain ECT, with doubling, by RAdam at 1 and 2, by Adam at 1, 2
              and 4; KD (only pairs of noise and endpoint), then ECT, at 1
          mf  CMT + MeanFlow at 1 unit; MeanFlow from the flow-matching weights by RAdam at 1 and 2, and by
              Adam, with 10 steps of warm-up, at 1; with the times of the CIFAR-10 recipe, by Adam, CMT +
              MeanFlow at 1 and MeanFlow at 1 and 2
Tuning    Each method at each budget, on seed 100, which is not reported. Two settings: the learning rate,
          from the same ladder for all, and one more. That is the share of mid-training for the chains and KD,
          the interval between two doublings for plain ECT, the exponent p of the adaptive weight for plain
          MeanFlow. 4 x 3 settings are trained with a quarter of the budget, the best 4 of these with half of
          it. The best of these is the one with the smallest geometric mean of the distances in one and two
          steps (2,000 samples). If the best value is at the edge of those tried, the next one is tried too,
          with all values of the other setting, at most twice. A trial that diverges counts as 1e9.
          Post-training's rate is not tuned: it is 1/10 of mid-training's for the consistency branch, and 1/7
          for Mean Flow.
Judgement 5,000 samples in one and in two steps against the reference: FD of the 128 features before the last
          layer of a classifier that was trained on the training half, FD-pixels, precision and recall in
          these features (1904.06991, k = 3). The noise floor is the training half against the reference.
Report    every number, in docs/mnist.json; two steps as prominently as one; also where mid-training does not
          help.

Scale 10  `--scale 10`, for a GPU, writes docs/mnist_x10.json. It was fixed before its first run; then, with
          no results but the teachers' and one trial, the trials were halved and all but MeanFlow was
          compiled. (The first teachers had 2.21M parameters by mistake: on a GPU the default network has
          twice the blocks. They were discarded.) A unit has 10 times the forwards (1.25 million), and the
          network 4 times the parameters (width 32, 1.56M). The batch is 256, and the teacher trains for 3,000
          steps of it. The 5,000 training images are the same. ECT is in TF32. The tuning is the same, with
          1/16 and 1/8 of the budget. The methods are the two chains at 1 unit, and the baselines that were
          better at scale 1 (ECT by Adam, MeanFlow with the times of its CIFAR-10 recipe) at 1 and 2. (Until
          ECT had its results at scale 10, the Mean Flow methods had ImageNet's times here. None of them has
          run at scale 10. CMT + MeanFlow takes the p that was chosen at scale 1.)

Two processes of one thread share the trainings; on a GPU start 12 (`--workers 12`; `--branch cm` leaves out
Mean Flow). All continue where they were interrupted; finished numbers are in docs/mnist.json, so another
machine continues too. `python experiments/mnist.py report` prints the table and draws the curves from
that file alone; `picture` draws samples of the checkpoints of seed 1; `limits` stores a few numbers that
could explain the results in two steps; `checks` tries settings of the baselines that are not tuned;
`finalists` is change 8. Start limits, checks or finalists twice to use two cores.
"""
import argparse, fcntl, functools, itertools, json, math, os, re, shutil, statistics, subprocess, sys, time
from pathlib import Path

import numpy as np
import torch

import common
from common import command, model
from curves import compute_ratio, speed_up
import fid, sample

DATA, FOLDER, RESULTS = Path("data/mnist.npz"), Path("runs/mnist"), Path("docs/mnist.json")
UNIT, BATCH, SEEDS, TUNING_SEED, WIDTH, TEACHER_STEPS = 125_000, 64, (0, 1, 2), 100, 16, 3000
TRIAL_PARTS = 1 / 4, 1 / 2                                 # of the budget, for the two rounds of trials
ECT_PRECISION, COMPILE = "fp32", "--no-compile"
RATES = [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
SHARES = [0.05, 0.25, 0.5, 0.75, 0.9, 0.97, 1.0]           # of compute, for mid-training
INTERVALS = [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2]  # between two doublings, as a share of the run
EXPONENTS = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5]
# keys of docs/mnist.json; a trial's is TRIALS_KEY and its settings
TEACHER_KEY, CHOSEN_KEY = "teacher {}, seed {}", "chosen: {}, {} units"
RESULT_KEY, TRIALS_KEY = "result: {}, {} units, seed {}", "tuning: {}, {:g} units, "
FINAL_KEY = "finalist: {}, lr {:g}, {} {:g}, seed {}"
FINAL_SEEDS = 3, 4
FINALISTS = {"CMT + ECT": [(3e-3, 0.25), (1e-3, 0.25), (3e-3, 0.75), (1e-3, 0.75)],        # of change 8
             "plain ECT by Adam": [(1e-4, 1 / 32), (1e-4, 1 / 64), (1e-4, 1 / 16), (1e-4, 1 / 8)]}
BY_RADAM = "{}, post-training by RAdam"                    # the older results
UNTIED = "{}, post-training by RAdam, tuned after the fact"
BEST_TRIAL = "{}, settings of the best trial"
FOR_TWO_UNITS = "{}, settings for two units"               # with four units
# one unit is repeated with the settings of a trial that was made for a larger budget and was better
BEST_SETTINGS = {"plain ECT": (1e-3, 1 / 8), "MeanFlow, CIFAR-10 times": (1e-3, 0.5)}
ON_GPU = "{}, on an H100"                                  # repeated there, teachers included
VARIANTS = "{}", BY_RADAM, UNTIED, BEST_TRIAL, FOR_TWO_UNITS, ON_GPU
MEASURES = {"FD": 1, "FD-pixels": 2, "precision": 3, "recall": 3}             # and the decimals of a table
# with mid-training, and without
PAIRS = [("CMT + ECT", "plain ECT by Adam"), (FOR_TWO_UNITS.format("CMT + ECT"), "plain ECT by Adam"),
         ("CMT + MeanFlow, CIFAR-10 times", "MeanFlow, CIFAR-10 times"),
         ("CMT + MeanFlow, CIFAR-10 times", BEST_TRIAL.format("MeanFlow, CIFAR-10 times")),
         ("CMT + MeanFlow", "MeanFlow")]
BUDGETS = 1, 2, 4                                           # units, all that a method may have
# method: (branch, budgets, name of the second setting, its ladder, first index in RATES and in its ladder)
METHODS = {
    "CMT + ECT":         ("cm", (1, 2, 4), "share",    SHARES,    2, 2),
    "plain ECT":         ("cm", (1, 2),    "interval", INTERVALS, 1, 1),
    "plain ECT by Adam": ("cm", (1, 2, 4), "interval", INTERVALS, 1, 1),           # by the rule of change 3
    "KD + ECT":          ("cm", (1,),      "share",    SHARES,    2, 1),
    "CMT + MeanFlow":    ("mf", (1,),      "share",    SHARES,    2, 2),
    "MeanFlow":          ("mf", (1, 2),    "p",        EXPONENTS, 1, 1),
    "MeanFlow by Adam":  ("mf", (1,),      "p",        EXPONENTS, 1, 1),
    "CMT + MeanFlow, CIFAR-10 times": ("mf", (1,), "share", SHARES, 2, 2),         # change 7
    "MeanFlow, CIFAR-10 times": ("mf", (1, 2), "p",    EXPONENTS, 1, 1),           # change 7
}
AT_SCALE_10 = {"CMT + ECT": (1,), "plain ECT by Adam": (1, 2), "CMT + MeanFlow, CIFAR-10 times": (1,),
               "MeanFlow, CIFAR-10 times": (1, 2)}
# network forwards per sample of a stage (common.py)
FORWARDS = {"mid_cm": 4, "mid_kd": 3 + 16, "post_cm": 4, "mid_mf": 3 + 15 / 8, "post_mf": 3.5,
            "post_mf_0.75": 4.5}
CIFAR_P = 0.25                                             # chosen for MeanFlow with these times, one unit
CIFAR_TIMES = ["--r-neq-t", 0.75, "--P-mean", -2, "--P-std", 2]
IMAGENET_TIMES = ["--r-neq-t", 0.25, "--P-mean", -0.4, "--P-std", 1]
BASELINE_INTERVAL = 1 / 16                                 # chosen for plain ECT by Adam with one unit


def use_scale_10():
    """Replace the constants of this file by those of --scale 10."""
    global FOLDER, RESULTS, UNIT, BATCH, WIDTH, TRIAL_PARTS, ECT_PRECISION, COMPILE, METHODS, BEST_SETTINGS
    FOLDER, RESULTS = Path("runs/mnist_x10"), Path("docs/mnist_x10.json")
    UNIT, BATCH, WIDTH, TRIAL_PARTS = 10 * UNIT, 256, 32, (1 / 16, 1 / 8)
    ECT_PRECISION, COMPILE, BEST_SETTINGS = "tf32", "--compile", {}
    METHODS = {name: (METHODS[name][0], budgets, *METHODS[name][2:]) for name, budgets in AT_SCALE_10.items()}


# === training ===============================================================================================

def flags(seed, precision="bf16"):
    return ["--data", FOLDER / "train.npz", "--seed", seed, "--batch", BATCH, "--precision", precision,
            "--no-preview"]


def teacher(branch, seed):
    """Train the teacher of a seed, or wait for the other process to do it -> its file"""
    out = FOLDER / f"seed{seed}" / f"teacher_{branch}.safetensors"
    if out.exists() and model.read(out, tensors=False)[1]["step"] == TEACHER_STEPS: return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objective = ["--objective", "flow"] if branch == "mf" else []
        command("pretrain", *flags(seed), COMPILE, *objective, "--width", WIDTH, "--blocks", 1,
                "--steps", TEACHER_STEPS, "--out", out)
    return out


def tied_rate(branch, rate):
    return rate / (10 if branch == "cm" else 7)


def before_post_training(path):
    """The mid-trained model of a chain whose result is `path`"""
    return path.with_name(f"{path.stem}_mid.safetensors")


def steps(stage, units):
    """-> the number of steps of a stage that take this compute"""
    return max(1, round(units * UNIT / FORWARDS[stage] / BATCH))


def train(method, units, rate, value, seed):
    """Train a method with a budget -> the file of its model"""
    branch, _, setting, *_ = METHODS[method]
    start, cifar_times = teacher(branch, seed), method.endswith("CIFAR-10 times")
    by_adam = cifar_times or method.endswith("by Adam") or branch == "cm" and setting == "share"
    post_stage = "post_mf_0.75" if cifar_times else f"post_{branch}"
    out = FOLDER / f"seed{seed}" / f"{method.replace(' ', '')}_{units:g}_{rate:g}_{value:g}.safetensors"
    if setting == "share":
        stage = "mid_kd" if method == "KD + ECT" else f"mid_{branch}"
        middle, post_steps = before_post_training(out), steps(post_stage, (1 - value) * units)
        command("midtrain", *flags(seed), COMPILE, "--branch", branch, "--teacher", start, "--lr", rate,
                "--steps", steps(stage, value * units), *(["--pairing", "kd"] if stage == "mid_kd" else []),
                *(["--warmup", 10 * BATCH] if branch == "mf" else []), "--out", middle)
        if value == 1: return middle
        post = ["--init", middle, "--lr", tied_rate(branch, rate)]
        if branch == "mf": post += ["--p", CIFAR_P if cifar_times else 1]
    else:
        post_steps = steps(post_stage, units)
        post = ["--init", start, "--lr", rate]
        if branch == "cm": post += ["--q", 2, "--double", max(1, round(value * post_steps))]
        else:              post += ["--p", value]
    post += ["--optimizer", "Adam" if by_adam else "RAdam"]
    if branch == "mf":
        post += [*(CIFAR_TIMES if cifar_times else IMAGENET_TIMES), "--warmup", 10 * BATCH if by_adam else 0]
    else: post += [COMPILE]                                # posttrain_mf.py does not compile by default
    command(f"posttrain_{branch}", *flags(seed, ECT_PRECISION if branch == "cm" else "bf16"), *post,
            "--steps", post_steps, "--out", out)
    return out


# === judgement ==============================================================================================

@functools.cache
def classifier():
    # It is committed: one that another machine trained would measure other distances.
    return common.classifier("data/mnist_classifier.safetensors", *halves()[0])


@functools.cache
def halves():
    """The training half and the reference half: images uint8 (5000,28,28,1), labels (5000,)"""
    data = model.Data(DATA)
    images = torch.from_numpy(np.array(data.array))
    return (images[:5000], data.labels[:5000]), (images[5000:], data.labels[5000:])


def judge(net, images):
    """uint8 (n,28,28,1) against the reference half -> {measure: value}"""
    reference = halves()[1][0][:len(images)]
    features = [common.features(net, x) for x in (reference, images)]
    precision, recall = precision_recall(*features)
    pixels = [fid.pixels(x) for x in (reference, images)]
    return {"FD": common.distance(*features), "FD-pixels": common.distance(*pixels),
            "precision": precision, "recall": recall}


def precision_recall(real, fake, k=3):
    """Improved precision and recall (1904.06991) of features (n,d). A point lies on a manifold if it is
    nearer to one of its points than that point's k-th neighbour is."""
    radius = lambda x: torch.cdist(x, x).kthvalue(k + 1, dim=1)[0]       # the first is the point itself
    distance = torch.cdist(fake, real)
    return ((distance <= radius(real)).any(1).float().mean().item(),
            (distance.T <= radius(fake)).any(1).float().mean().item())


def scores(path, n, calls=(1, 2), mid_t=None):
    """-> {NFE: measures of n samples of a checkpoint}; mid_t: of sample.generate"""
    net, header = model.load(path, "cuda" if torch.cuda.is_available() else "cpu")
    def draw(k):
        batches = sample.generate(net, header, range(n), k, mid_t=mid_t)
        return torch.cat([torch.from_numpy(images) for images, _ in batches])
    return {str(k): judge(classifier(), draw(k)) for k in calls}


# === the run ================================================================================================

def stored():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def record(key, value):
    with open(FOLDER / "results.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with model.atomic_write(RESULTS) as part:
            part.write_text(json.dumps(stored() | {key: value}, indent=1, sort_keys=True))


def share(jobs, wait=True):
    """Compute and store what docs/mnist.json lacks of {key: function}, except what another process computes
    at the moment, which is awaited. -> the values, in order"""
    while missing := [key for key in jobs if key not in stored()]:
        for key in missing:
            with open(FOLDER / f"{key.replace('/', '_')}.lock", "w") as lock:
                try: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError: continue
                if key not in stored(): record(key, jobs[key]())
        if not wait: return
        time.sleep(2)
    return [stored()[key] for key in jobs]


def score(train_model):
    """-> the geometric mean of the distances in one and two steps of the file that train_model() returns; 1e9
    for a run that diverged"""
    try: found = scores(train_model(), 2000)
    except model.Diverged: return 1e9                      # samples that are not finite
    except SystemExit as e:
        if e.code != 3: raise                              # 3: ten successive gradients were not finite
        return 1e9
    return math.sqrt(found["1"]["FD"] * found["2"]["FD"])


def trial(method, *settings):
    teacher(METHODS[method][0], TUNING_SEED)               # if the teacher diverges, that is an error
    return score(lambda: train(method, *settings, TUNING_SEED))


def trials(method, units, settings):
    """-> the score of each (rate, value), on the tuning seed"""
    name = TRIALS_KEY.format(method, units) + f"lr {{:g}}, {METHODS[method][2]} {{:g}}"
    return share({name.format(*s): functools.partial(trial, method, units, *s) for s in settings})


def tune(method, units):
    """Successive halving on the tuning seed -> rate, value of the second setting"""
    _, _, _, ladder, first_rate, first_value = METHODS[method]
    rates, values = [first_rate, first_rate + 4], [first_value, first_value + 3]   # parts of the ladders
    finals = {}
    for extension in range(3):
        tried = list(itertools.product(RATES[slice(*rates)], ladder[slice(*values)]))
        best4 = [s for _, s in sorted(zip(trials(method, units * TRIAL_PARTS[0], tried), tried))[:4]]
        finals |= zip(best4, trials(method, units * TRIAL_PARTS[1], best4))
        rate, value = min(finals, key=finals.get)
        wider = []
        for part, whole, best in (rates, RATES, rate), (values, ladder, value):
            if best == whole[part[0]] and part[0] > 0:                wider.append((part, 0, -1))
            if best == whole[part[1] - 1] and part[1] < len(whole):   wider.append((part, 1, +1))
        if not wider or extension == 2: return rate, value
        for part, end, change in wider: part[end] += change


def write_training_half():
    with open(FOLDER / "train.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (FOLDER / "train.npz").exists(): return
        x, y = halves()[0]
        with model.atomic_write(FOLDER / "train.npz") as part, open(part, "wb") as f:
            np.savez(f, arr_0=x, arr_1=y)


def run_seeds(name, method, units, setting):
    """Store the setting of a method and the scores of all seeds, under `name`."""
    record(CHOSEN_KEY.format(name, units), setting)
    def run(seed): return scores(train(method, units, *setting, seed), 5000)
    share({RESULT_KEY.format(name, units, seed): functools.partial(run, seed) for seed in SEEDS}, wait=False)


def work(first=0):
    """All trainings that no other process does, smaller budgets first; starts at task `first`."""
    share({"classifier accuracy": lambda: common.accuracy(classifier(), *halves()[1]),
           "noise floor": lambda: judge(classifier(), halves()[0][0])})
    tasks = [(units, branch, method)
             for method, (branch, budgets, *_) in METHODS.items() for units in budgets]
    tasks.sort(key=lambda task: task[:2])                                       # then in the order of METHODS
    def teacher_scores(branch, seed): return scores(teacher(branch, seed), 5000, (16, 1))
    for units, branch, method in tasks[first:] + tasks[:first]:
        share({TEACHER_KEY.format(branch, seed): functools.partial(teacher_scores, branch, seed)
               for seed in (TUNING_SEED, *SEEDS)}, wait=False)
        run_seeds(method, method, units, tune(method, units))
    for method, settings in BEST_SETTINGS.items():
        if method in METHODS: run_seeds(BEST_TRIAL.format(method), method, 1, settings)


def results(found, method, seeds=SEEDS):
    """-> [(units, [scores of a seed, ...]), ...], for the budgets that have results"""
    runs = [(units, [found.get(RESULT_KEY.format(method, units, seed)) for seed in seeds])
            for units in BUDGETS]
    return [(units, [*filter(None, of_seeds)]) for units, of_seeds in runs if any(of_seeds)]


def limits():
    """Store numbers that could explain the results in two steps. Of the tuning seed, with one unit: other
    times of the second step, CMT before ECT, and the teacher with more NFE. Of all seeds with four units: the
    second step at the best of these times."""
    jobs, start = {}, teacher("cm", TUNING_SEED)
    for method in "CMT + ECT", "plain ECT by Adam":
        path = train(method, 1, *stored()[CHOSEN_KEY.format(method, 1)], TUNING_SEED)
        for t in 0.2, 0.4, 0.821, 1.6, 3.2:
            jobs[f"limits: {method}, second step at {t}"] = functools.partial(scores, path, 5000, (2,), [t])
        if (middle := before_post_training(path)).exists():
            jobs["limits: CMT before ECT"] = functools.partial(scores, middle, 5000)
        for seed in SEEDS if (chosen := stored().get(CHOSEN_KEY.format(method, 4))) else ():
            path = train(method, 4, *chosen, seed)
            jobs[f"limits: {method}, 4 units, seed {seed}, second step at 1.6"] = functools.partial(
                scores, path, 5000, (2,), [1.6])
    jobs["limits: teacher cm"] = functools.partial(scores, start, 5000, (16, 32))
    share(jobs)


def finalists():
    """Change 8: store the results of FINALISTS on two seeds of their own."""
    def run(method, setting, seed): return scores(train(method, 1, *setting, seed), 5000)
    places = itertools.product(range(4), FINALISTS, FINAL_SEEDS)
    jobs = [(method, FINALISTS[method][place], seed) for place, method, seed in places]
    share({final_key(*job): functools.partial(run, *job) for job in jobs})


def final_key(method, setting, seed):
    rate, value = setting
    return FINAL_KEY.format(method, rate, METHODS[method][2], value, seed)


def baseline_checks():
    """Store trials with half a unit, on the tuning seed, of settings of the baselines that the tuning leaves
    out, next to controls from the same teachers: ECT from the diffusion weights with a fixed gap; MeanFlow
    with r < t for three quarters of the samples, and with the times of its CIFAR-10 recipe as well."""
    jobs, fixed = {}, [(f"q {q}", ["--q", q]) for q in (16, 64, 256)]
    halved = [("gap halved", ["--q", 2, "--double", round(BASELINE_INTERVAL * steps("post_cm", 0.5))])]
    for (name, extra), rate in itertools.product(halved + fixed, (1e-4, 3e-4)):
        jobs[f"plain ECT by Adam, {name}, lr {rate:g}"] = (
            "cm", "post_cm", [*extra, "--lr", rate, "--optimizer", "Adam", COMPILE])
    times = {"r < t 0.25": ("post_mf", IMAGENET_TIMES),
             "r < t 0.75": ("post_mf_0.75", ["--r-neq-t", 0.75, "--P-mean", -0.4, "--P-std", 1]),
             "r < t 0.75, P -2 2": ("post_mf_0.75", CIFAR_TIMES)}
    for (name, (stage, extra)), (optimizer, rate, p) in itertools.product(
            times.items(), (("RAdam", 0.01, 0.75), ("Adam", 0.001, 0.5))):
        warmup = 10 * BATCH if optimizer == "Adam" else 0
        jobs[f"MeanFlow by {optimizer}, {name}"] = ("mf", stage, [
            *extra, "--lr", rate, "--optimizer", optimizer, "--p", p, "--warmup", warmup])
    def train_baseline(name, branch, stage, extra, start):
        out = FOLDER / f"seed{TUNING_SEED}" / f"check_{re.sub('[^A-Za-z0-9.]+', '_', name)}.safetensors"
        precision = ECT_PRECISION if branch == "cm" else "bf16"
        command(f"posttrain_{branch}", *flags(TUNING_SEED, precision), *extra,
                "--init", start, "--steps", steps(stage, 0.5), "--out", out)
        return out
    def run(name, branch, *options):
        start = teacher(branch, TUNING_SEED)
        return score(lambda: train_baseline(name, branch, *options, start))
    share({f"check: {name}": functools.partial(run, name, *job) for name, job in jobs.items()})


def teachers(found, branch):
    """-> the scores of the teachers that are finished"""
    return [found[key] for seed in SEEDS if (key := TEACHER_KEY.format(branch, seed)) in found]


def methods_of(branch):
    return [method for method, (of, *_) in METHODS.items() if of == branch]


def report():
    """Print the tables of RESULTS and draw their curves, as far as it goes."""
    found = stored()
    print(f"classifier accuracy {found['classifier accuracy']:.2%}; noise floor "
          + ", ".join(f"{k} {v:.3f}" for k, v in found["noise floor"].items()))
    print("\n| method | units | settings | " + " | ".join(
        f"{measure}, {k} NFE" for k in (1, 2) for measure in MEASURES) + " |")
    print("|---" * 11 + "|")
    for branch in "cm", "mf":
        for name, k in itertools.product((branch, ON_GPU.format(branch)), ("16", "1")):
            if not (runs := teachers(found, name)): continue
            cells = [common.spread((run[k][m] for run in runs), decimals) for m, decimals in MEASURES.items()]
            print(f"| teacher {name}, {k} NFE | 0 | | " + " | ".join(cells) + " | | | | |")
        for method in methods_of(branch):
            for name in (variant.format(method) for variant in VARIANTS):
                for units, runs in results(found, name):
                    setting = "lr {:g}, " + METHODS[method][2] + " {:g}"
                    if name == UNTIED.format(method): setting = "q {:g}, post-training lr {:g}"
                    setting = setting.format(*found[CHOSEN_KEY.format(name, units)])
                    cells = [common.spread((run[k][m] for run in runs), decimals)
                             for k in "12" for m, decimals in MEASURES.items()]
                    seeds = f" ({len(runs)} of {len(SEEDS)} seeds)" if len(runs) < len(SEEDS) else ""
                    print(f"| {name}{seeds} | {units} | {setting} | " + " | ".join(cells) + " |")
    print_pairs(found)
    print_chosen(found)
    print_finalists(found)
    print("\n| method | units | trials | best trial | its settings |\n|---|---|---|---|---|")
    for method in (variant.format(method) for method in METHODS for variant in VARIANTS):
        for units in sorted({budget * part for budget in BUDGETS for part in TRIAL_PARTS}):
            name = TRIALS_KEY.format(method, units)
            tried = {key.removeprefix(name): found[key] for key in found if key.startswith(name)}
            if not tried: continue
            best = min(tried, key=tried.get)
            print(f"| {method} | {units:g} | {len(tried)} | {tried[best]:.1f} | {best} |")
    print()
    for key in found:
        if key.startswith(("after the fact", "limits", "check")): print(key, found[key])
    print_ratios(found)
    draw(found)


def line(found, method, k, measure="FD", seeds=SEEDS):
    """-> [(units, geometric mean of the seeds with k NFE), ...]"""
    return [(units, statistics.geometric_mean(run[k][measure] for run in runs))
            for units, runs in results(found, method, seeds)]


def print_ratios(found):
    """The compute that the baselines need for the quality of the chains at each of their budgets: for the
    geometric means of the seeds, and for each seed"""
    chains = {chain: ("plain ECT", "plain ECT by Adam")
              for chain in ("CMT + ECT", FOR_TWO_UNITS.format("CMT + ECT"))}
    cifar_times = "MeanFlow, CIFAR-10 times"
    chains |= {chain: ("MeanFlow", "MeanFlow by Adam", cifar_times, BEST_TRIAL.format(cifar_times))
               for chain in ("CMT + MeanFlow", "CMT + MeanFlow, CIFAR-10 times")}
    for method, settings in BEST_SETTINGS.items():         # a larger budget may have chosen these settings
        for units, seed in itertools.product(BUDGETS, SEEDS):
            key = RESULT_KEY.format(method, units, seed)
            if key in found and found[CHOSEN_KEY.format(method, units)] == list(settings):
                found = {RESULT_KEY.format(BEST_TRIAL.format(method), units, seed): found[key]} | found
    for chain, baselines in chains.items():
        for baseline, k, measure in itertools.product(baselines, "12", ("FD", "FD-pixels")):
            for units, _ in line(found, chain, k, measure):
                def both(seeds):                           # the chain with this budget, the baseline with all
                    of_chain = [p for p in line(found, chain, k, measure, seeds) if p[0] == units]
                    return of_chain, line(found, baseline, k, measure, seeds)
                seeds = [seed for seed in SEEDS if all(both([seed]))]
                if not seeds or len(both(seeds)[1]) == 1: continue
                ratios = ", ".join("{}{:.2f}".format(*compute_ratio(*both([seed]))) for seed in seeds)
                print(f"{chain} with {units} units, {baseline}, {k} NFE, {measure}: "
                      f"{speed_up(*both(seeds))}; seeds {ratios}")


def compare(pairs, k, measure):
    """Pairs of results with and without mid-training -> a cell, for which pairs the former is ahead"""
    a, b = zip(*((x[k][measure], y[k][measure]) for x, y in pairs))
    means = " / ".join(f"{statistics.mean(values):.{MEASURES[measure]}f}" for values in (a, b))
    ahead = [x < y for x, y in zip(a, b)]
    return f"{means} ({sum(ahead)} of {len(ahead)})", ahead


def print_pairs(found):
    """With and without mid-training at equal compute: means, and with how many seeds the former is ahead"""
    columns = list(itertools.product("12", ("FD", "FD-pixels")))
    print("\n| with / without mid-training | units | " + " | ".join(f"{m}, {k} NFE" for k, m in columns)
          + " |\n" + "|---" * 6 + "|")
    for chain, baseline in PAIRS:
        wins = {k: [] for k in "12"}
        for units in BUDGETS:
            keys = [[RESULT_KEY.format(method, units, seed) for method in (chain, baseline)]
                    for seed in SEEDS]
            if not (pairs := [(found[a], found[b]) for a, b in keys if a in found and b in found]): continue
            cells = []
            for k, measure in columns:
                cell, ahead = compare(pairs, k, measure)
                cells.append(cell)
                wins[k] += ahead
            print(f"| {chain} / {baseline} | {units} | {' | '.join(cells)} |")
        for k, ahead in wins.items():
            if ahead:
                print(f"{chain} against {baseline}, {k} NFE: ahead in {sum(ahead)} of {len(ahead)}")


def print_chosen(found):
    """How many trials each method had, and the settings that they chose for each budget"""
    print("\n| method | trials | one unit | two units | four units |\n" + "|---" * 5 + "|")
    for method, (_, _, setting, *_) in METHODS.items():
        trials = sum(bool(re.match(rf"tuning: {re.escape(method)}, [\d.]+ units", key)) for key in found)
        chosen = [found.get(CHOSEN_KEY.format(method, units)) for units in BUDGETS]
        cells = [f"lr {c[0]:g}, {setting} {c[1]:g}" if c else "" for c in chosen]
        print(f"| {method} | {trials} | {' | '.join(cells)} |")


def print_finalists(found):
    """The results of change 8: of each setting, of the mean over the settings of a method, and of the setting
    that is best on the other seed. A cell has the mean of the two seeds, and the two."""
    runs = {(method, seed): {setting: found.get(final_key(method, setting, seed)) for setting in settings}
            for method, settings in FINALISTS.items() for seed in FINAL_SEEDS}
    if not all(all(of_seed.values()) for of_seed in runs.values()): return         # not finished
    columns = list(itertools.product("12", ("FD", "FD-pixels")))
    def print_line(method, name, choose):                  # choose(seed) -> results to average
        cells = []
        for k, m in columns:
            pair = [statistics.mean(run[k][m] for run in choose(seed)) for seed in FINAL_SEEDS]
            cells.append("{:.{d}f} ({:.{d}f}, {:.{d}f})".format(statistics.mean(pair), *pair, d=MEASURES[m]))
        print(f"| {method} | {name} | {' | '.join(cells)} |")
    print("\n| four settings, two seeds, one unit | settings | "
          + " | ".join(f"{m}, {k} NFE" for k, m in columns) + " |\n" + "|---" * 6 + "|")
    for method, settings in FINALISTS.items():
        for setting in settings:
            print_line(method, "lr {:g}, {name} {:g}".format(*setting, name=METHODS[method][2]),
                       lambda seed: [runs[method, seed][setting]])
        print_line(method, "mean of the four", lambda seed: [*runs[method, seed].values()])
        def best_elsewhere(seed):
            elsewhere = runs[method, FINAL_SEEDS[1 - FINAL_SEEDS.index(seed)]]
            best = min(settings, key=lambda s: elsewhere[s]["1"]["FD"] * elsewhere[s]["2"]["FD"])
            return [runs[method, seed][best]]
        print_line(method, "best on the other seed", best_elsewhere)
    def all_seeds(method):                                 # with the settings that the tuning chose
        chosen = tuple(found[CHOSEN_KEY.format(method, 1)])
        return ([found[RESULT_KEY.format(method, 1, seed)] for seed in SEEDS]
                + [runs[method, seed][chosen] for seed in FINAL_SEEDS])
    pairs = list(zip(*map(all_seeds, FINALISTS)))
    print(f"\n{' / '.join(FINALISTS)}, one unit, settings of the tuning, {len(pairs)} seeds: "
          + ", ".join(f"{m} {k} NFE {compare(pairs, k, m)[0]}" for k, m in columns))


def draw(found):
    """docs/mnist_curves.png or mnist_x10_curves.png: FD against compute, one and two steps, both branches"""
    plt = common.pyplot()
    figure, panels = plt.subplots(2, 2, figsize=(9, 6.5), sharex=True, sharey="row", layout="constrained")
    for (branch, k), axes in zip(itertools.product(("cm", "mf"), "12"), panels.flat):
        name, legend, place = {"cm": ("consistency model", "1", "lower left"),
                               "mf": ("Mean Flow", "2", "upper right")}[branch]
        for number, method in enumerate(methods_of(branch)):
            if not (points := line(found, method, k)): continue
            beside = 1.03 ** number                        # so that equal budgets do not hide each other
            budgets, levels = zip(*points)
            label = f"{method} by RAdam" if f"{method} by Adam" in METHODS else method
            colour = axes.loglog([beside * b for b in budgets], levels, "o-", label=label)[0].get_color()
            for units, runs in results(found, method):
                axes.plot([beside * units] * len(runs), [run[k]["FD"] for run in runs], ".", color=colour)
        if runs := teachers(found, branch):
            level = statistics.geometric_mean(run["16"]["FD"] for run in runs)
            axes.axhline(level, color="grey", ls="--", label="teacher, 16 NFE")
        axes.axhline(found["noise floor"]["FD"], color="grey", ls=":", label="the training images")
        axes.set(title=f"{name}, {k} NFE", xticks=[1, 2, 4], xticklabels=["1", "2", "4"],
                 yticks=[5, 10, 20, 40, 80, 160], yticklabels=["5", "10", "20", "40", "80", "160"])
        axes.minorticks_off()
        if k == "1": axes.set_ylabel("FD of classifier features")
        if k == legend: axes.legend(fontsize=8, loc=place)
        if branch == "mf": axes.set_xlabel("units of compute after the teacher")
    figure.savefig(RESULTS.with_name(f"{RESULTS.stem}_curves.png"), dpi=110)


def picture(seed=1):
    """docs/mnist.png or docs/mnist_x10.png: of each branch the teacher, the chain and its best baseline, with
    one unit of compute and one training seed; a column is one noise"""
    found, folder, shown = stored(), FOLDER / "picture", []
    folder.mkdir(exist_ok=True)
    def show(name, path, *calls):
        shutil.copy(path, folder / f"{name}.safetensors")
        shown.extend(f"{folder / name}.safetensors:{k}" for k in calls)
    for branch in "cm", "mf":
        pair = next(pair for pair in PAIRS if METHODS.get(pair[0], [None])[0] == branch)
        if not all(CHOSEN_KEY.format(method, 1) in found for method in pair): continue
        files = {method: train(method, 1, *found[CHOSEN_KEY.format(method, 1)], seed) for method in pair}
        show(f"teacher {branch}", teacher(branch, seed), 16, 1)
        show(f"mid-training {branch}", before_post_training(files[pair[0]]), 1)
        for method, path in files.items(): show(method, path, 1, 2)
    command("sample", *shown, "--real", "--labels", "balanced", "--n", 20,
            "--out", RESULTS.with_suffix(".png"))


def main():
    global METHODS
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="?", choices=["all", "work", "report", "picture", "limits", "checks",
                                               "finalists"],
                   default="all", help="work: in one process; report: tables and curves; picture: samples; "
                                       "limits: other times of the second step, the teacher with 32 NFE; "
                                       "checks: settings of the baselines that are not tuned; "
                                       "finalists: the best four settings of ECT, two more seeds")
    tasks = sum(len(budgets) for _, budgets, *_ in METHODS.values())
    p.add_argument("--first", type=int, default=0, choices=range(tasks), metavar=f"0-{tasks - 1}",
                   help=f"for work: the task to begin with, of {tasks}")
    p.add_argument("--scale", type=int, default=1, choices=[1, 10], help="10: for a GPU")
    p.add_argument("--workers", type=int, default=2, help="processes")
    p.add_argument("--branch", choices=["cm", "mf"], help="train this one only (default: both)")
    args = p.parse_args()
    if args.scale == 10: use_scale_10()
    if args.what == "report": return report()
    if args.what == "all": common.pyplot()                 # missing? say so before training
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_training_half()
    torch.set_num_threads(1)
    model.setup(one_process=True)                          # TF32 off
    if args.what == "work":
        METHODS = {name: (of, *rest) for name, (of, *rest) in METHODS.items() if args.branch in (None, of)}
        return work(args.first)
    if args.what == "picture": return picture()
    if args.what == "limits": return limits()
    if args.what == "checks": return baseline_checks()
    if args.what == "finalists": return finalists()
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    worker = [sys.executable, __file__, "work", "--scale", str(args.scale)]
    if args.branch: worker += ["--branch", args.branch]
    # of more than two, half begin with the second task: a round of trials has too few for all
    workers = [subprocess.Popen(worker + ["--first", str(k // 2 % 2)], env=one_thread)
               for k in range(args.workers)]
    failed = [w.wait() for w in workers]
    if any(failed): sys.exit("a worker failed; the same command continues.")
    report()


if __name__ == "__main__":
    main()
