"""Full fine-tuning against LoRA and against the last layers, on a pretrained model of 135 million parameters.

    python distilgpt2/compare.py --study lr-full lr-lora lr-last   # short runs: each method gets its own learning rate
    python distilgpt2/compare.py --study methods --seeds 3         # one epoch of 2% of WikiText-2
    python distilgpt2/compare.py --study tenth --seeds 3           # of 10%: ten hours of one core, 4 with bfloat16
    python distilgpt2/compare.py --study ranks epochs --seeds 1    # LoRA's rank; three epochs, where overfitting begins
    python distilgpt2/compare.py --study methods --list            # only print the commands, for another engine

Run again, the command continues where it stopped. Under --out: a run folder for every setting and seed, results.txt,
and for every study its record STUDY.json and its figure STUDY.png; for `methods` and `tenth` also STUDY.txt, what the
model writes before and after. The short runs keep their records alone; any other run has 50 MB with LoRA, and 2.7 GB
with all weights.
"""

import itertools
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from common import run, study
from common.options import option

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import generate
import pretrained
import scoring
import train
from data import DATA_HELP, dataset_arg

LEARNING_RATES = {  # four values some three times apart, then four more between the neighbours of the best one
    "full": (3e-5, 1e-4, 1.5e-4, 2e-4, 3e-4, 4.5e-4, 6.5e-4, 1e-3),
    "lora": (3e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 4.5e-3, 6.5e-3, 1e-2),
    "last": (1e-4, 3e-4, 4.5e-4, 6.5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3),
}
RANKS = (1, 4, 16, 64)
SHORT = dict(max_steps=20, val_tokens=8192, test_tokens=0)
BASE = dict(recipe="smollm2")
SHORT_STUDIES = tuple(f"lr-{method}" for method in LEARNING_RATES)
STUDIES = {  # study: {setting: arguments of train.py}; the first three choose the learning rates of the others
    **{
        f"lr-{method}": {f"{lr:g}": dict(BASE, **SHORT, method=method, lr=lr) for lr in rates}
        for method, rates in LEARNING_RATES.items()
    },
    "methods": {method: dict(BASE, method=method) for method in LEARNING_RATES},
    "tenth": {method: dict(BASE, method=method, fraction=0.1) for method in LEARNING_RATES},
    "ranks": {
        f"{rank}": dict(BASE, method="lora", rank=rank, alpha=2.0 * rank, bs=2, epochs=2, max_steps=100, test_tokens=0)
        for rank in RANKS
    },
    "epochs": {method: dict(BASE, method=method, epochs=3) for method in ("full", "lora")},
}
COMPARISONS = ("methods", "tenth")  # studies whose table, figure and texts compare the methods
RESULTS = Path(__file__).resolve().parent / "results"


def best_lr(method, out, recipe):
    """The learning rate with the lowest validation loss in the short runs of a method: of the study in `out`, else of
    the committed record, which is of SmolLM2. Raises UserError if there is none."""
    places = (out, RESULTS) if recipe == "smollm2" else (out,)
    files = [folder / f"lr-{method}.json" for folder in places]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise run.UserError(
            f"the learning rate of {method} is not chosen yet: run --study {' '.join(SHORT_STUDIES)} first"
        )
    done = [row for row in run.read_json(file)["rows"] if row["state"] == "done"]
    if not done:
        raise run.UserError(f"{file}: no run has ended")
    return min(done, key=lambda row: row["final"]["val_loss"])["args"]["lr"]


def folder_name(setting, seed):
    """The same name for the same arguments, whichever study wants them."""
    words = [f"{v}" if k in ("recipe", "method") else f"{k}{v:g}" for k, v in setting.items()]
    return "-".join([*words, f"s{seed}"])


def settings(args, out):
    """The chosen STUDIES, with the recipe of --recipe and the learning rate of each method."""
    found = {name: {} for name in args.study}
    for name, table in found.items():
        for setting, values in STUDIES[name].items():
            table[setting] = dict(values, recipe=args.recipe)
            if "lr" not in values:
                table[setting]["lr"] = best_lr(values["method"], out, args.recipe)
    return found


def jobs_of(args, out):
    """Every run that the studies need."""

    def cost(values):
        return {"full": 3, "lora": 2, "last": 1}[values["method"]] * values.get("epochs", 1)

    def place(setting, seed):
        return out / folder_name(setting, seed)

    return study.plan(train, settings(args, out), args, place, lambda name, setting: args.data, cost)


def delete_weights(folder: Path):
    """Delete the weights of a run that only chooses a learning rate: with all weights trained they are 2.7 GB."""
    for name in ("last.pt", "best.pt"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "model", ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- reports


def finals(rows, setting, key):
    return [row["final"][key] for row in rows if row["setting"] == setting and row["state"] == "done"]


def draw_points(axes, rows, quantity="val_perplexity"):
    """A point for every run against a setting that is a number."""
    names = [name for name in dict.fromkeys(row["setting"] for row in rows) if finals(rows, name, quantity)]
    x = [float(name) for name in names]
    means = [np.mean(finals(rows, name, quantity)) for name in names]
    axes.plot(x, means, marker="o")
    kind = "rank of LoRA" if rows[0]["study"] == "ranks" else f"learning rate, {rows[0]['args']['method']}"
    axes.set(xscale="log", xlabel=kind, ylabel="validation perplexity per token")
    axes.set_xticks(x, names)
    axes.minorticks_off()


def draw_epochs(axes, rows):
    """Training and validation loss against epochs."""
    for setting in dict.fromkeys(row["setting"] for row in rows):
        for part, style in (("train", "--"), ("val", "-")):
            curves = [row[f"{part}_loss"] for row in rows if row["setting"] == setting and row["state"] == "done"]
            if curves:
                mean, colour = np.mean(curves, 0), f"C{list(LEARNING_RATES).index(setting)}"
                axes.plot(range(1, len(mean) + 1), mean, style, marker=".", color=colour, label=f"{setting}, {part}")
    axes.set(xlabel="epoch", ylabel="loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)


def draw_methods(figure, rows):
    """Perplexity, seconds per step, peak memory and size on disk of each method, side by side."""
    done = [row for row in rows if row["state"] == "done"]
    names = list(dict.fromkeys(row["setting"] for row in done))
    panels = {
        "test perplexity per token": lambda row: row["final"]["test_perplexity"],
        "seconds per step": lambda row: row["final"]["seconds_per_step"],
        "peak memory, GiB": lambda row: row["peak_memory_mb"] / 1024,
        "size on disk, MB": lambda row: row["final"]["bytes"] / 1e6,
    }
    for axes, (title, value) in zip(figure.subplots(1, len(panels)), panels.items()):
        values = [[value(row) for row in done if row["setting"] == name] for name in names]
        means = [np.mean(v) for v in values]
        errors = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in values]
        bars = axes.bar(names, means, yerr=errors, color=[f"C{i}" for i in range(len(names))], capsize=3)
        axes.bar_label(bars, [f"{mean:.3g}" for mean in means], fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.margins(y=0.15)


def write_texts(name, args, out):
    """STUDY.txt: texts that the model writes, greedily, before fine-tuning and after each method (seed 0)."""
    table = settings(args, out)[name]
    models = {"before": pretrained.resolve(train.RECIPES[args.recipe]["full"].model, args.data_dir)}
    models |= {f"after {method}": str(out / folder_name(values, 0)) for method, values in table.items()}
    texts = {prompt: [] for prompt in generate.PROMPTS}
    for title, source in models.items():
        net, tokenizer, _ = pretrained.open_model(source, args.data_dir)
        net.eval()
        for prompt in generate.PROMPTS:
            ids = generate.encode(tokenizer, prompt, 60, pretrained.context(net))
            new = generate.continuation(net, tokenizer, ids, {"greedy": None}, 60, 0)
            texts[prompt].append(f"--- {title}\n{prompt}{tokenizer.decode(new, skip_special_tokens=True)}")
    lines = itertools.chain.from_iterable(texts.values())
    run.write(out / f"{name}.txt", "\n".join(lines) + "\n")


def draw(record):
    """The figure of a study, from its record alone."""
    name = record["study"]
    rows = record["rows"]
    figure = Figure(figsize=(9, 2.8) if name in COMPARISONS else (5, 3.5), layout="constrained")
    if name in COMPARISONS:
        draw_methods(figure, rows)
    else:
        axes = figure.subplots()
        if name == "epochs":
            draw_epochs(axes, rows)
        else:
            draw_points(axes, rows)
        axes.grid(alpha=0.3)
    return figure


def report(name, rows, out):
    """Write STUDY.json and STUDY.png, and print the table."""
    record = {"study": name, "rows": rows}
    run.write_json(out / f"{name}.json", record)
    run.write_figure(out / f"{name}.png", draw(record))
    print(f"\n{name}")
    for setting in dict.fromkeys(row["setting"] for row in rows):
        losses = finals(rows, setting, "val_loss")
        result = f"validation perplexity {scoring.perplexity(np.mean(losses)):.2f}" if losses else "diverged"
        print(f"  {setting:12} {result}  {len(losses)} runs")


@dataclass(kw_only=True)
class Options(study.StudyOptions):
    study: tuple[str, ...] = study.study_option(STUDIES)
    recipe: str = option("smollm2", "the recipe of train.py", choices=train.RECIPE_NAMES)
    data: str = option("wikitext2", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    out: str = option(str(run.ROOT / "out/distilgpt2/compare"), "folder of the study", type=run.path_arg, metavar="DIR")
    epochs: int | None = option(None, "epochs instead of each setting's own, for a quick look", above=0)
    limit: int | None = option(None, "only the first N tokens of each part", above=0)


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    for names in (  # the short studies first, since they choose the learning rates of the others
        [name for name in args.study if name in SHORT_STUDIES],
        [name for name in args.study if name not in SHORT_STUDIES],
    ):
        if names:
            run_studies(replace(args, study=tuple(names)))


def run_studies(args):
    """Run the studies of `args`, and write their records and figures."""
    out = Path(args.out)
    short = {
        out / folder_name(values, seed)
        for name, table in settings(args, out).items()
        if name in SHORT_STUDIES
        for values in table.values()
        for seed in range(args.seeds)
    }

    def tidy(folder):
        if folder in short:
            delete_weights(folder)

    if study.run_jobs(train, jobs_of(args, out), args, tidy):
        for name in args.study:
            report(name, rows_of(name, args, out), out)
            if name in COMPARISONS:
                write_texts(name, args, out)


def rows_of(name, args, out):
    """The rows of the record of a study, one per setting and seed."""
    rows = []
    for setting, values in settings(args, out)[name].items():
        for seed in range(args.seeds):
            folder = out / folder_name(values, seed)
            row = study.row(name, setting, seed, folder, train_loss="train_loss", val_loss="val_loss")
            row["peak_memory_mb"] = run.read_record(folder / "run.json").get("peak_memory_mb")
            rows.append(row)
    return rows


if __name__ == "__main__":
    run.cli(main)
