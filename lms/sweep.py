"""Two studies: what the step size does to LMS, and which adaptive filter tracks a system that changes.

    python lms/sweep.py                                                # both studies, ten seconds
    python lms/sweep.py --study rates --data houses.csv --target price --lr 0.001 0.01
    python lms/sweep.py --study filters                                # LMS, NLMS and RLS on a system that changes
    python lms/sweep.py --list                                         # print one command per study, run nothing

The runs of the study `rates` are computed at once, with one array operation per sample for all of them. Every study
writes its record STUDY.json and its figure STUDY.png into --out.
"""

import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path

from common import run
from common.options import option, to_argv

import matplotlib.figure
import numpy as np
import torch
from tqdm import tqdm

import data
import model
from data import check_target, data_option, target_option
from train import format_optional, measured_misadjustment, mse

RATES = ("data", "target", "epochs", "lr")  # the options that only the study rates reads


def write_study(script: str, out: Path, study: str, rows: list[dict], draw=None, **facts):
    """Write the record STUDY.json of `script`, with `facts` and the rows, and the figure STUDY.png that `draw` makes of
    the record alone."""
    machine = run.environment(torch.device("cpu"), script)
    record = {"study": study, **facts, "rows": [row | machine for row in rows]}
    run.write_json(out / f"{study}.json", record)
    if draw:
        run.write_figure(out / f"{study}.png", draw(record))
    print(f"-> {run.display_path(out / study)}.json{', .png' if draw else ''}\n")


def rounded(values) -> list[float]:
    """Four significant digits, enough for a curve."""
    return [float(f"{value:.4g}") for value in values]


# -------------------------------------------------------------------------------------------------------------- rates


def rates(args, out):
    """LMS at every step size and seed; the bounds of the step size; the misadjustment, predicted and measured."""
    problem = data.load(args.data, args.target)
    X = problem.inputs
    d = problem.targets
    args.lr = tuple(dict.fromkeys(args.lr))  # a step size that is given twice is one
    lrs = np.array(args.lr)
    wiener, bounds = model.wiener_solution(X, d), model.stability(X)
    w, errors = np.zeros((args.seeds, len(lrs), X.shape[1])), []
    for epoch in tqdm(range(args.epochs), "rates", leave=False, disable=None):
        orders = [np.random.default_rng((seed, epoch)).permutation(len(d)) for seed in range(args.seeds)]
        # X (seeds, 1, N, M), d (seeds, 1, N), r (step sizes,), w (seeds, step sizes, M)
        w, epoch_errors = model.lms_runs(X[orders][:, None], d[orders][:, None], lrs, w)
        errors.append(epoch_errors)
    errors = np.concatenate(errors, -1)  # (seeds, step sizes, epochs * N); NaN soon after a run has diverged

    rows = []
    for i, lr in enumerate(args.lr):
        textbook, exact = model.misadjustment(X, lr)
        predicted = {"textbook": format_optional(textbook, ".3g"), "exact": format_optional(exact, ".3g")}
        for seed in range(args.seeds):
            row = {
                "study": "rates",
                "setting": f"r = {lr:g}",
                "seed": seed,
                "dataset": problem.name,
                "lr": lr,
                "epochs": args.epochs,
                "predicted": predicted,
                "state": "done",
            }
            final = {"misadjustment_textbook": textbook, "misadjustment_exact": exact}
            if (sample := model.diverged_at(errors[seed, i])) is not None:
                row |= {"state": "diverged", "diverged_at_step": sample}
            else:
                late = float(np.mean(errors[seed, i, errors.shape[-1] // 2 :] ** 2))  # a priori, the second half
                final |= {
                    "apriori_mse_late": late,
                    "misadjustment": measured_misadjustment(late, wiener, d),
                    "train_mse": mse(X, d, w[seed, i]),
                }
            rows.append(row | {"final": final})
    print_rates(problem, bounds, wiener, rows)
    curves = learning_curves(errors, rows)
    theory = predictions(X, [bounds.trace, *args.lr])
    facts = {"bounds": bounds._asdict(), "wiener_mse": wiener.mse, "floor": max(wiener.mse, 1e-12 * np.mean(d**2))}
    write_study(__file__, out, "rates", rows, draw_rates, **facts, curves=curves, theory=theory)


def learning_curves(errors: np.ndarray, rows: list[dict]) -> list[dict]:
    """Of each step size, the mean squared error in 60 bins of samples, as wide on a logarithmic axis, over seeds; up to
    the bin in which a run diverged. errors (seeds, step sizes, samples)."""
    steps = errors.shape[-1]
    edges = np.unique(np.geomspace(1, steps + 1, 60).astype(int)) - 1
    curves = []
    for i, (lr, _, _, diverged) in enumerate(by_rate(rows)):
        complete = np.searchsorted(edges, min(diverged, default=steps), side="right") - 1
        squared = np.fmin(abs(errors[:, i]), 1e50) ** 2  # above the axis limit, but without overflow
        means = np.add.reduceat(squared.mean(0), edges[:-1]) / np.diff(edges)
        curves.append({"lr": lr, "samples": edges[1 : complete + 1].tolist(), "mse": rounded(means[:complete])})
    return curves


def predictions(X: np.ndarray, lrs: list[float]) -> dict[str, list]:
    """The misadjustments that theory predicts, from below the smallest of `lrs` to above the largest; a prediction that
    does not exist is None."""
    step_sizes = np.geomspace(min(lrs) / 2, max(lrs) * 2, 200)
    textbook, exact = zip(*(model.misadjustment(X, r) for r in step_sizes))
    return {"r": rounded(step_sizes), "textbook": list(textbook), "exact": list(exact)}


def by_rate(rows):
    """Yield (r, its rows, the misadjustments of its runs that did not diverge, the samples where the others did)."""
    for lr in dict.fromkeys(row["lr"] for row in rows):
        runs = [row for row in rows if row["lr"] == lr]
        measured = [row["final"].get("misadjustment") for row in runs]
        diverged = [row["diverged_at_step"] for row in runs if row["state"] == "diverged"]
        yield lr, runs, [value for value in measured if value is not None], diverged


def print_rates(problem, bounds, wiener, rows):
    print(
        f"LMS on {problem.name}: Wiener MSE {wiener.mse:.5g}\nbounds of r: {bounds.mean:.4g} = 2 / lambda_max for "
        f"the mean, {bounds.trace:.4g} = 2 / trace, for the mean square "
        f"{format_optional(bounds.mean_square, '.4g', 'unknown')}\n"
        "       r   misadjustment: textbook    exact    measured"
    )
    for lr, runs, measured, diverged in by_rate(rows):
        text = f"{np.mean(measured):.3g}" if measured else ""
        if len(measured) > 1:
            text += f" +- {statistics.stdev(measured):.1g}"  # in NumPy the squares could overflow
        if diverged:
            text += f" {len(diverged)} of {len(runs)} diverged, at step {int(np.median(diverged))} (median)"
        predicted = runs[0]["predicted"]
        print(f"{lr:8g} {predicted['textbook']:>25} {predicted['exact']:>8}    {text}")


def draw_rates(record):
    """Left: the MSE against samples for every step size. Right: the misadjustment against the step size."""
    figure = matplotlib.figure.Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    top = 1e8 * record["floor"]
    for curve, (lr, _, measured, diverged) in zip(record["curves"], by_rate(record["rows"])):
        label = f"r = {lr:g}" + (", diverged" if diverged else "")
        (line,) = left.plot(curve["samples"], curve["mse"], lw=1.2, label=label)
        left.plot(diverged, [top / 3] * len(diverged), "x", color=line.get_color())
        if measured and min(measured) > 0:
            mean, color = np.mean(measured), line.get_color()
            bars = [[mean - min(measured)], [max(measured) - mean]]
            right.errorbar(lr, mean, bars, fmt="o", capsize=3, color=color)
    left.axhline(record["floor"], color="k", ls="--", lw=1, label="Wiener")
    left.set(xlabel="samples", ylabel="MSE, a priori (x: diverged)", xscale="log", yscale="log")
    left.set(ylim=(record["floor"] / 2, top))
    for name, style in (("textbook", "k:"), ("exact", "k-")):
        points = [(r, value) for r, value in zip(record["theory"]["r"], record["theory"][name]) if value is not None]
        right.plot(*np.reshape(points, (-1, 2)).T, style, lw=1, label=f"predicted, {name}")
    colors = {"mean_square": "tab:red", "trace": "tab:gray", "mean": "tab:olive"}
    for (name, color), label in zip(colors.items(), ("mean square", "2 / trace", "2 / lambda_max")):
        if (bound := record["bounds"][name]) is not None:
            right.axvline(bound, color=color, ls="--", lw=1, label=f"{label} = {bound:.3g}")
    right.set(xlabel="step size r", ylabel="misadjustment", xscale="log", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


# ------------------------------------------------------------------------------------------------------------ filters

BLOCK = 10  # samples of a point in the figure

FILTERS = {
    "LMS, r = 0.01": lambda X, d: model.lms_blocks(X, d, 0.01),
    "NLMS, r = 0.5": lambda X, d: model.nlms(X, d, 0.5),
    "RLS, forgetting 1": lambda X, d: model.rls(X, d),
    "RLS, forgetting 0.99": lambda X, d: model.rls(X, d, forgetting=0.99),
}


def filters(args, out):
    """Every filter identifies an unknown filter, in one pass in the order of time; halfway, the system changes."""
    rows = []
    misalignment = {name: [] for name in FILTERS}  # ||w - h||^2 / ||h||^2 for every seed, (N,)
    new_response = -data.RESPONSE[::-1]
    for seed in tqdm(range(args.seeds), "filters", leave=False, disable=None):
        before, after = data.fir(seed), data.fir(args.seeds + seed, response=new_response)
        X, d = np.r_[before.inputs, after.inputs], np.r_[before.targets, after.targets]
        h = np.repeat([data.RESPONSE, new_response], len(before.targets), axis=0)  # (N, taps)
        half, tail = len(d) // 2, len(d) // 10
        for name, run_filter in FILTERS.items():
            weights, _ = run_filter(X, d)
            values = np.sum((weights[:-1] - h) ** 2, 1) / np.sum(h**2, 1)
            misalignment[name].append(values)
            decibels = {
                when: 10 * float(np.log10(values[end - tail : end].mean()))
                for when, end in (("before", half), ("after", len(d)))
            }
            rows.append(
                {"study": "filters", "setting": name, "seed": seed, "state": "done", "misalignment_db": decibels}
            )
    print("filters: misalignment ||w - h||^2 / ||h||^2 in the last tenth before and after the system changes")
    curves = {}
    for name, values in misalignment.items():
        decibels = [row["misalignment_db"] for row in rows if row["setting"] == name]
        before = np.mean([value["before"] for value in decibels])
        after = np.mean([value["after"] for value in decibels])
        print(f"  {name:22} {before:6.1f} dB {after:6.1f} dB")
        blocks = np.mean(values, 0).reshape(-1, BLOCK)
        curves[name] = rounded(10 * np.log10(blocks.mean(1)))
    write_study(__file__, out, "filters", rows, draw_filters, change=half, block=BLOCK, curves=curves)


def draw_filters(record):
    """The misalignment of each filter against samples, means of blocks of samples over seeds."""
    figure = matplotlib.figure.Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for name, decibels in record["curves"].items():
        samples = (np.arange(len(decibels)) + 0.5) * record["block"]
        axes.plot(samples, decibels, lw=1.2, label=name)
    axes.axvline(record["change"], color="k", ls=":", lw=1, label="the system changes")
    axes.set(xlabel="samples", ylabel="misalignment (dB)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


# --------------------------------------------------------------------------------------------------------------- main

STUDIES = {"rates": rates, "filters": filters}


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    study: tuple[str, ...] = option(tuple(STUDIES), "which studies", choices=list(STUDIES), nargs="+", metavar="STUDY")
    seeds: int = option(5, "seeds 0 to N - 1", above=0, at_most=1000)
    list: bool = option(False, "print one command per study and run nothing")
    out: str = option(str(run.ROOT / "out/lms/sweep"), "folder of the studies", type=run.path_arg, metavar="DIR")
    data: str = data_option()
    target: str | None = target_option()
    epochs: int = option(20, "passes over the training rows", above=0)
    lr: tuple[float, ...] = option((0.005, 0.01, 0.05, 0.1, 0.5, 1.0), "step sizes r", above=0, nargs="+")

    def check(self):
        if "rates" in self.study:
            check_target(self)


def recipe(given: dict) -> Options:
    """The defaults. Raises UserError for a flag that no chosen study reads."""
    if "rates" not in given.get("study", STUDIES):
        for name in RATES:
            if name in given:
                raise run.UserError(f"--{name}: only the study rates reads it")
    return Options()


def main(argv=None):
    args = run.parse_options(__file__, Options, argv, recipe)
    for study in dict.fromkeys(args.study):
        if args.list:
            values = {"study": [study], "seeds": args.seeds, "out": run.typed_path(args.out)}
            if study == "rates":
                values |= {name: getattr(args, name) for name in RATES}
            print(shlex.join(["python", run.typed_path(__file__), *to_argv(Options, values)]))
        else:
            STUDIES[study](args, run.make_folder(args.out))


if __name__ == "__main__":
    run.cli(main)
