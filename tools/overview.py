"""Draw figures/overview.png, the figure of the top README: one panel for each experiment, from its committed records.

python tools/overview.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
BLUE, ORANGE, GREY = "#2a6fb0", "#e0722f", "#8a8a8a"


def read(record):
    return json.loads((ROOT / record).read_text(encoding="utf-8"))


def label(ax, text, point, color, offset, ha="left"):
    ax.annotate(text, point, xytext=offset, textcoords="offset points", color=color, ha=ha, va="center")


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
    label(ax, "unstable\nin theory", (bound, 0.02), ORANGE, (10, 0))
    label(ax, "diverged", (diverged[0], 3e4), ORANGE, (0, -14), "center")
    return "What is a gradient step? LMS against theory"


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
        ax.plot(range(1, len(accuracy) + 1), accuracy, style, color=color, marker="o", ms=4, label=row["setting"])
    ax.set(xlabel="epoch", ylabel="validation accuracy (%)", xticks=range(1, len(accuracy) + 1), ylim=(0, 100))
    ax.legend(frameon=False, loc="upper left", ncols=2, columnspacing=1, fontsize="small")
    return "What do shortcuts buy? CIFAR-10, four epochs"


def nanogpt(ax):
    for row, color in zip(read("nanogpt/results/clock.json")["rows"], (GREY, ORANGE, BLUE)):
        _, seconds, losses = zip(*row["curve"])
        ax.plot(seconds, losses, color=color, marker="o", ms=4)
        offset, ha = ((0, -13), "center") if row["setting"] == "fast" else ((8, 0), "left")
        label(ax, f"{row['setting']}: {losses[-1]:.2f}", (seconds[-1], losses[-1]), color, offset, ha)
    ax.set(xlim=(-10, 195), xlabel="seconds on two CPU cores", ylabel="validation loss (nats per character)")
    return "What does a language model take? On Shakespeare"


def lstm_imdb(ax):
    accuracies = {}  # of each model, a value a seed
    for row in read("lstm_imdb/results/baseline.json")["rows"]:
        accuracies[row["args"]["recipe"]] = [100 * row["final"]["test_accuracy"]]
    for recipe in ("plain", "best"):
        records = sorted((ROOT / "lstm_imdb/results").glob(f"{recipe}-s*.json"))
        if records:
            accuracies[f"LSTM, {recipe}"] = [100 * read(record)["final"]["test_accuracy"] for record in records]
    for i, (name, values) in enumerate(accuracies.items()):
        ax.barh(i, sum(values) / len(values), color=BLUE if name.startswith("LSTM") else GREY, alpha=0.7, height=0.6)
        ax.plot(values, [i] * len(values), "k.", ms=5)
    ax.set_yticks(range(len(accuracies)), accuracies)
    ax.invert_yaxis()
    ax.set(xlim=(84, 94), xlabel="test accuracy (%), a dot for each seed")
    return "Can an LSTM tell praise from blame? IMDB"


def s2vt(ax):
    def mean(runs, key):
        records = sorted((ROOT / "s2vt/results").glob(f"{runs}-s*.json"))
        return sum(json.loads(record.read_text(encoding="utf-8"))["final"][key] for record in records) / len(records)

    shares = {"frames in order": mean("s2vt", "chance"), "shuffled": mean("s2vt", "shuffled_chance"),
              "reversed": mean("s2vt", "reversed_chance"), "only their mean": mean("pooled", "chance")}  # fmt: skip
    ax.barh(range(len(shares)), [100 * share for share in shares.values()], color=[BLUE, GREY, ORANGE, GREY], alpha=0.7)
    ax.axvline(50, color="k", lw=1, ls=":")
    label(ax, "guessing", (50, 2), GREY, (4, 0))
    ax.set_yticks(range(len(shares)), shares)
    ax.invert_yaxis()
    ax.set(xlim=(0, 100), xlabel="stated directions that are right (%)")
    return "Does a caption know the order? Rendered videos"


def main():
    figure = Figure(figsize=(14.5, 7), layout="constrained")
    figure.get_layout_engine().set(hspace=0.06)
    for ax, panel in zip(figure.subplots(2, 3).flat, (lms, cifar, resnet, nanogpt, lstm_imdb, s2vt)):
        ax.set_title(panel(ax), loc="left", size="medium", color="#444444")
        ax.text(0, 1.11, f"{panel.__name__}/", transform=ax.transAxes, size="x-large", weight="bold")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.2)
    figure.savefig(ROOT / "figures" / "overview.png", dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    main()
