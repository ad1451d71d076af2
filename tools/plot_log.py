"""Draw the logs of training runs: loss, gradient norm, learning rate and throughput.

  reads   NAME.jsonl ...     and NAME.safetensors beside each, if there: the compute of a training sample
  writes  --out curves.png   left against the step, right against compute
  run     python tools/plot_log.py runs/digits/*.jsonl
"""
import argparse, json, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
from experiments import common


def read_log(path):
    """NAME.jsonl -> {quantity: list of numbers, NaN where a line has none}, in the order of the steps. A
    resumed run writes some steps again: the last line of a step counts. Raises UserError."""
    lines = {}
    try:
        for text in Path(path).read_text().splitlines():
            if text.endswith("}"):                         # the last line may be cut off
                line = json.loads(text)
                lines[line["step"]] = line
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as e:
        raise model.UserError(f"{path} is no log of a training stage ({type(e).__name__}: {e}).")
    if not lines: raise model.UserError(f"{path} has no lines yet.")
    lines = [lines[step] for step in sorted(lines)]
    unit = "pairs" if "pairs" in lines[0] else "images"
    names = {"step": "step", "samples": unit, "loss": "loss", "gradient norm": "grad", "learning rate": "lr",
             "samples per second": f"{unit}/s"}
    return {k: [float("nan") if line.get(v) is None else line[v] for line in lines] for k, v in names.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=model.Help, allow_abbrev=False)
    p.add_argument("logs", nargs="+", metavar="NAME.jsonl")
    p.add_argument("--out", default="curves.png", metavar="FILE", help="the picture")
    args = p.parse_args()
    try: import matplotlib
    except ImportError: raise model.UserError("curves need matplotlib; `pip install matplotlib`.")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    quantities = ["loss", "gradient norm", "learning rate", "samples per second"]
    figure, axes = plt.subplots(4, 2, figsize=(10, 11), sharex="col", sharey="row", layout="constrained")
    for k, path in enumerate(args.logs):
        log, checkpoint = read_log(path), path.removesuffix(".jsonl") + ".safetensors"
        x_axes = [log["step"]]
        if Path(checkpoint).exists():                      # else the run has not saved yet
            forwards = common.forwards_per_sample(model.read(checkpoint, tensors=False)[1])
            x_axes.append([forwards * n / 1e6 for n in log["samples"]])
        for row, quantity in zip(axes, quantities):
            for ax, x in zip(row, x_axes):
                ax.plot(x, log[quantity], label=Path(path).stem, color=f"C{k}", lw=1.4)
            row[0].set(ylabel=quantity, yscale="log" if quantity in ("loss", "gradient norm") else "linear")
    for ax in axes.flat: ax.grid(alpha=0.3)
    axes[-1][0].set_xlabel("step")
    axes[-1][1].set_xlabel("million network forwards (a backward counts as two)")
    columns = min(6, len(args.logs))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=columns)
    with model.atomic_write(args.out) as part: figure.savefig(part, dpi=90, format="png")
    print(f"{len(args.logs)} logs in {args.out}")


if __name__ == "__main__":
    model.run(main)
