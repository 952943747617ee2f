"""The figure of the top README: one panel for each experiment, from its committed records.

python tools/redraw.py figures/overview.png
"""

import json
import sys
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.records import recorded_metrics  # noqa: E402

BLUE = "#2a6fb0"
ORANGE = "#e0722f"
GREY = "#8a8a8a"


def read(record):
    return json.loads((ROOT / record).read_text(encoding="utf-8"))


def label(ax, text, point, color, offset, ha="left"):
    shown = ax.annotate(text, point, xytext=offset, textcoords="offset points", color=color, ha=ha, va="center")
    shown.set_in_layout(False)  # it may reach into the margin


def dots(ax, values, color, bars=True):
    """A bar for the mean of each name, where the axis begins at zero, and a dot for each value."""
    for i, (name, points) in enumerate(values.items()):
        mean = sum(points) / len(points)
        if bars:
            ax.barh(i, mean, color=color(name), alpha=0.7, height=0.6)
        else:
            ax.plot([mean, mean], [i - 0.3, i + 0.3], color=color(name), lw=3, alpha=0.7)
        ax.plot(points, [i] * len(points), "k.", ms=5)
    ax.set_yticks(range(len(values)), values)
    ax.invert_yaxis()


def lms(ax):
    record = read("lms/results/rates.json")
    bound = record["bounds"]["mean_square"]  # theory: from this learning rate on, the mean squared error is unbounded
    done = [row for row in record["rows"] if row["state"] == "done"]
    diverged = [row["lr"] for row in record["rows"] if row["state"] == "diverged"]
    theory = {row["lr"]: row["final"]["misadjustment_exact"] for row in done if row["lr"] < bound}
    ax.axvspan(bound, 2, color=ORANGE, alpha=0.12, lw=0)
    ax.plot(theory.keys(), theory.values(), color=GREY)
    ax.plot([row["lr"] for row in done], [row["final"]["misadjustment"] for row in done], "o", color=BLUE, ms=5)
    ax.plot(diverged, [3e4] * len(diverged), "x", color=ORANGE, ms=9, mew=2)
    ax.set(xscale="log", yscale="log", xlim=(0.004, 2), xlabel="learning rate", ylabel="excess MSE / minimum MSE")
    label(ax, "theory", (0.02, theory[0.01]), GREY, (0, -3))
    label(ax, "measured,\na dot for each seed", (0.0045, 3), BLUE, (0, 0))
    label(ax, "unstable\nin theory", (bound, 0.02), ORANGE, (4, 0))
    label(ax, "diverged", (diverged[0], 3e4), ORANGE, (0, -14), "center")
    return "What is a gradient step? LMS against theory"


def simplenn(ax):
    rows = read("simplenn/results/deep_vs_shallow-functions.json")["rows"]
    rows = [row for row in rows if row["state"] == "done" and row["variant"] == "LeakyReLU"]
    for function, color, shift in (("sinc", BLUE, -0.12), ("square", ORANGE, 0.12)):
        chosen = [row for row in rows if row["function"] == function]
        depths = sorted({row["hidden_layers"] for row in chosen})
        losses = {
            depth: [row["final"]["train_loss"] for row in chosen if row["hidden_layers"] == depth] for depth in depths
        }
        places = {depth: i + shift for i, depth in enumerate(depths)}
        for depth, values in losses.items():
            ax.plot([places[depth]] * len(values), values, "o", color=color, ms=4, alpha=0.5, mew=0)
        ax.plot(places.values(), [median(values) for values in losses.values()], color=color)
        label(
            ax,
            "square\nwave" if function == "square" else function,
            (places[depths[-1]], median(losses[depths[-1]])),
            color,
            (10, 0),
        )
    ax.set(yscale="log", xlim=(-0.4, 2.75), xlabel="hidden layers, at equal parameters", ylabel="training loss (MSE)")
    ax.set_xticks(range(len(depths)), depths)
    return "Is deeper better? Ten seeds, and their median"


def cifar(ax):
    studies = (("best-simplenn", "SimpleNN on CIFAR-10", ORANGE), ("best-lenet5", "LeNet-5 on CIFAR-100", BLUE))
    for study, text, color in studies:
        for row in read(f"cifar/results/{study}.json")["rows"]:
            accuracy = [100 * value for value in row["val_accuracy"]]
            ax.plot(range(1, len(accuracy) + 1), accuracy, color=color, lw=1, alpha=0.7)
        text += f"\n{row['parameters']:,} parameters"
        label(ax, text, (35, accuracy[-1]), color, (0, 18 if color == BLUE else 0))
    ax.set(xlabel="epoch", ylabel="validation accuracy (%)", ylim=(0, 100))
    return "How far do two very small networks go?"


def resnet(ax):
    for row in read("resnet/results/shortcut.json")["rows"]:
        if row["study"] != "shortcut":
            continue
        layers, shortcuts = row["setting"].split(", ")
        accuracy = [100 * value for value in row["val_accuracy"]]
        style, color = "-" if shortcuts == "with shortcuts" else "--", BLUE if layers == "20 layers" else ORANGE
        network = row["setting"].removesuffix(", with shortcuts")
        ax.plot(range(1, len(accuracy) + 1), accuracy, style, color=color, marker="o", ms=4, label=network)
    ax.set(xlabel="epoch", ylabel="validation accuracy (%)", xticks=range(1, len(accuracy) + 1), ylim=(0, 100))
    ax.legend(frameon=False, loc="upper left", ncols=2, columnspacing=0.8, handlelength=1.5, fontsize=8)
    return "What do shortcuts buy? CIFAR-10, four epochs"


def nanogpt(ax):
    for row, color in zip(read("nanogpt/results/clock.json")["rows"], (GREY, ORANGE, BLUE)):
        _, seconds, losses = zip(*row["curve"])
        ax.plot(seconds, losses, color=color, marker="o", ms=4)
        text = f"{row['setting']}: {losses[-1]:.2f}"
        offset = (8, 0)
        ha = "left"
        if row["setting"] == "fast":  # below the end of the curve, in two lines, to be clear of the others
            text = text.replace(" ", "\n")
            offset = (-3, -18)
            ha = "center"
        label(ax, text, (seconds[-1], losses[-1]), color, offset, ha)
    runs = [row["final"] for row in read("nanogpt/results/long.json")["rows"] if row["setting"] == "long"]
    loss, seconds = (sum(run[name] for run in runs) / len(runs) for name in ("val_loss", "seconds"))
    ax.axhline(loss, color=BLUE, lw=1, ls=":")
    label(ax, f"long: {loss:.2f}, {seconds / 60:.0f} minutes of one core", (-5, loss), BLUE, (0, -9))
    ax.set(xlim=(-10, 225), ylim=(1.32, None), xlabel="seconds on two CPU cores")
    ax.set(ylabel="validation loss on Shakespeare")
    return "What does a language model take?"


def distilgpt2(ax):
    perplexities = {"before": [read("distilgpt2/results/evaluate.json")["rows"][0]["text_perplexity"]]}
    for row in read("distilgpt2/results/tenth.json")["rows"]:
        name = {"lora": "LoRA", "last": "last\nlayers"}.get(row["setting"], row["setting"])
        perplexities.setdefault(name, []).append(row["final"]["test_perplexity"])
    dots(ax, perplexities, lambda name: GREY if name == "before" else BLUE)
    ax.set(xlabel="test perplexity per token, a dot for each seed")
    return "What does LoRA give up? SmolLM2 on WikiText-2"


def gan(ax):
    fids = {}  # of each setting, one value per seed
    for row in read("gan/results/losses.json")["rows"]:
        fids.setdefault(row["setting"], []).append(row["final"]["last_fid"])
    for row in read("gan/results/epochs.json")["rows"]:
        fids.setdefault(f"{row['setting']}, 50", []).append(row["final"]["last_fid"])
    dots(ax, fids, lambda name: ORANGE if name.endswith("50") else BLUE)
    ax.set(xlabel="FID (EfficientNet-Lite0), a dot for each seed")
    return "Which loss of a GAN? CIFAR-10, 10 and 50 epochs"


def lstm_imdb(ax):
    accuracies = {}  # of each model, one value per seed
    for row in read("lstm_imdb/results/baseline.json")["rows"]:
        accuracies[row["args"]["recipe"].replace(" ", "\n")] = [100 * row["final"]["test_accuracy"]]
    for recipe in ("plain", "best"):
        records = sorted((ROOT / "lstm_imdb/results").glob(f"{recipe}-s*.json"))
        if records:
            accuracies[f"LSTM,\n{recipe}"] = [100 * read(record)["final"]["test_accuracy"] for record in records]
    dots(ax, accuracies, lambda name: BLUE if name.startswith("LSTM") else GREY, bars=False)
    ax.set(xlim=(90, 92.5), xlabel="test accuracy (%), a dot for each seed")
    return "Can an LSTM tell praise from blame? IMDB"


def s2vt(ax):
    def precision(runs, frames=""):
        """The mean over the seeds of `runs`."""
        files = sorted((ROOT / "s2vt/results").glob(f"{runs}-s*.json"))
        finals = [recorded_metrics(read(file)["final"]) for file in files]
        return sum(final[f"{frames}order_precision"] for final in finals) / len(finals)

    shares = {
        "frames\nin order": precision("s2vt"),
        "shuffled": precision("s2vt", "shuffled_"),
        "reversed": precision("s2vt", "reversed_"),
        "only\ntheir mean": precision("pooled"),
    }
    ax.barh(range(len(shares)), [100 * share for share in shares.values()], color=[BLUE, GREY, ORANGE, GREY], alpha=0.7)
    ax.axvline(50, color="k", lw=1, ls=":")
    label(ax, "guessing", (50, 2), GREY, (4, 0))
    ax.set_yticks(range(len(shares)), shares)
    ax.invert_yaxis()
    ax.set(xlim=(0, 100), xlabel="stated directions that are right (%)")
    return "Does a caption know the order of events?"


def draw():
    figure = Figure(figsize=(11.5, 9.5), layout="constrained")
    figure.get_layout_engine().set(hspace=0.06)
    panels = (lms, simplenn, cifar, resnet, lstm_imdb, nanogpt, distilgpt2, gan, s2vt)
    for ax, panel in zip(figure.subplots(3, 3).flat, panels):
        ax.set_title(panel(ax), loc="left", size="small", color="#444444")
        ax.text(0, 1.11, f"{panel.__name__}/", transform=ax.transAxes, size="x-large", weight="bold")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.2)
    return figure


if __name__ == "__main__":
    sys.exit("this module only draws: python tools/redraw.py figures/overview.png writes the figure")
