"""What the step size does to LMS, and which filter for what.

    python lms/sweep.py                                                # both studies, half a minute
    python lms/sweep.py --study rates --data houses.csv --target price --lr 0.001 0.01
    python lms/sweep.py --study filters                                # LMS, NLMS and RLS on a system that changes

Leaves in --out, for every study, its record STUDY.json and its figure STUDY.png.
"""

import argparse
import statistics
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
from tqdm import tqdm

import data
import model
import run
import train

RATES = [0.005, 0.01, 0.05, 0.1, 0.5, 1.0]


def write_study(out, study, rows, figure=None, **facts):
    """Write the record STUDY.json, {"study", "rows"} and `facts`, and the figure STUDY.png into the folder `out`."""
    where = {
        "git": run.git_state(Path(__file__).parent),
        "versions": run.versions(),
        "device": run.describe_device(torch.device("cpu")),
    }
    run.write_json(out / f"{study}.json", {"study": study, **facts, "rows": [row | where for row in rows]})
    if figure:
        run.write_figure(out / f"{study}.png", figure)
    print(f"-> {run.shown(out / study)}.json{', .png' if figure else ''}\n")


# -------------------------------------------------------------------------------------------------------------- rates


def rates(args, out):
    """LMS at every step size and seed at once; then the bounds, and misadjustment predicted and measured."""
    problem = data.load(args)
    X, d, lrs = problem.inputs, problem.targets, np.array(args.lr)
    wiener, bounds = model.wiener_solution(X, d), model.stability(X)
    w, errors = np.zeros((args.seeds, len(lrs), X.shape[1])), []
    for epoch in tqdm(range(args.epochs), "rates", leave=False, disable=None):
        orders = [np.random.default_rng((seed, epoch)).permutation(len(d)) for seed in range(args.seeds)]
        # X (seeds, 1, N, M), d (seeds, 1, N), r (rates,), w (seeds, rates, M)
        w, of_epoch = model.lms_runs(X[orders][:, None], d[orders][:, None], lrs, w)
        errors.append(of_epoch)
    errors = np.concatenate(errors, -1)  # (seeds, rates, epochs * N), no numbers soon after a run diverged

    rows = []
    for i, lr in enumerate(args.lr):
        textbook, exact = model.misadjustment(X, lr)
        predicted = {"textbook": train.shown(textbook, ".3g"), "exact": train.shown(exact, ".3g")}
        for seed in range(args.seeds):
            row = {
                "study": "rates",
                "setting": f"r = {lr:g}",
                "seed": seed,
                "dataset": problem.name,
                "lr": lr,
                "epochs": args.epochs,
                "predicted": predicted,
            }
            at, final = model.diverged_at(errors[seed, i]), {}
            if at is not None:
                row |= {"state": "diverged", "diverged_at_step": at}
            else:
                row |= {"state": "done"}
                late = float(np.mean(errors[seed, i, errors.shape[-1] // 2 :] ** 2))  # a priori, the later half
                final = {
                    "apriori_mse_late": late,
                    "misadjustment": train.above_floor(late, wiener, d),
                    "train_mse": train.mse(X, d, w[seed, i]),
                }
            row["final"] = final | {"misadjustment_textbook": textbook, "misadjustment_exact": exact}
            rows.append(row)
    print_rates(problem, bounds, wiener, rows)
    figure = draw_rates(errors, rows, X, max(wiener.mse, 1e-12 * np.mean(d**2)), bounds)
    write_study(out, "rates", rows, figure, bounds=bounds._asdict(), wiener_mse=wiener.mse)


def by_rate(rows):
    """Yield (r, its rows, measured misadjustments (those that did not diverge,), steps of divergence)."""
    for lr in dict.fromkeys(row["lr"] for row in rows):
        mine = [row for row in rows if row["lr"] == lr]
        measured = [row["final"].get("misadjustment") for row in mine]
        yield (
            lr,
            mine,
            [value for value in measured if value is not None],
            [row["diverged_at_step"] for row in mine if row["state"] == "diverged"],
        )


def print_rates(problem, bounds, wiener, rows):
    print(
        f"LMS on {problem.name}: Wiener MSE {wiener.mse:.5g}\nbounds of r: {bounds.mean:.4g} = 2 / lambda_max for "
        f"the mean, {bounds.trace:.4g} = 2 / trace, for the mean square "
        f"{train.shown(bounds.mean_square, '.4g', 'unknown')}\n"
        "       r   misadjustment: textbook    exact    measured"
    )
    for lr, mine, measured, lost in by_rate(rows):
        said = f"{np.mean(measured):.3g}" if measured else ""
        if len(measured) > 1:
            said += f" +- {statistics.stdev(measured):.1g}"  # NumPy's squares could overflow
        if lost:
            said += f" {len(lost)} of {len(mine)} diverged, at step {int(np.median(lost))} (median)"
        predicted = mine[0]["predicted"]
        print(f"{lr:8g} {predicted['textbook']:>25} {predicted['exact']:>8}    {said}")


def draw_rates(errors, rows, X, wiener_mse, bounds):
    """Left, the MSE against samples for every step size; right, misadjustment against step size."""
    figure = matplotlib.figure.Figure(figsize=(11.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps, top = errors.shape[-1], 1e8 * wiener_mse
    edges = np.unique(np.geomspace(1, steps + 1, 60).astype(int)) - 1  # samples are averaged over wider and wider bins
    for i, (lr, _, measured, lost) in enumerate(by_rate(rows)):
        whole = np.searchsorted(edges, min(lost, default=steps), side="right") - 1  # bins before a seed diverged
        squared = np.fmin(abs(errors[:, i]), 1e50) ** 2  # beyond the picture anyway, and not to overflow
        curve = (np.add.reduceat(squared.mean(0), edges[:-1]) / np.diff(edges))[:whole]
        label = f"r = {lr:g}" + (", diverged" if lost else "")
        (line,) = left.plot(edges[1 : whole + 1], curve, lw=1.2, label=label)
        left.plot(lost, [top / 3] * len(lost), "x", color=line.get_color())
        if measured and min(measured) > 0:
            mean = np.mean(measured)
            right.errorbar(
                lr, mean, [[mean - min(measured)], [max(measured) - mean]], fmt="o", capsize=3, color=line.get_color()
            )
    left.axhline(wiener_mse, color="k", ls="--", lw=1, label="Wiener")
    left.set(
        xlabel="samples seen",
        ylabel="MSE, a priori (x: beyond 1e300)",
        xscale="log",
        yscale="log",
        ylim=(wiener_mse / 2, top),
    )
    fine = np.geomspace(min(row["lr"] for row in rows) / 2, max(row["lr"] for row in rows) * 2, 200)
    predicted = [model.misadjustment(X, r) for r in fine]
    for k, (label, style) in enumerate((("textbook", "k:"), ("exact", "k-"))):
        points = [(r, both[k]) for r, both in zip(fine, predicted) if both[k] is not None]
        right.plot(*np.reshape(points, (-1, 2)).T, style, lw=1, label=label)
    for value, label, color in (
        (bounds.mean_square, "mean square", "tab:red"),
        (bounds.trace, "2 / trace", "tab:gray"),
        (bounds.mean, "2 / lambda_max", "tab:olive"),
    ):
        if value is not None:
            right.axvline(value, color=color, ls="--", lw=1, label=f"{label} = {value:.3g}")
    right.set(xlabel="step size r", ylabel="misadjustment", xscale="log", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


# ------------------------------------------------------------------------------------------------------------ filters

FILTERS = {
    "LMS, r = 0.01": lambda X, d: model.lms_blocks(X, d, 0.01),
    "NLMS, r = 0.5": lambda X, d: model.nlms(X, d, 0.5),
    "RLS, forgetting 1": lambda X, d: model.rls(X, d),
    "RLS, forgetting 0.99": lambda X, d: model.rls(X, d, forgetting=0.99),
}


def filters(args, out):
    """One pass in the order of time over an unknown filter that becomes another one halfway."""
    names, rows = list(FILTERS), []
    changed = -data.RESPONSE[::-1]
    gap = []  # of every seed and filter, the power of the weights' error relative to the system's, (N,)
    for seed in tqdm(range(args.seeds), "filters", leave=False, disable=None):
        before, after = data.fir(seed), data.fir(args.seeds + seed, response=changed)
        X, d = np.r_[before.inputs, after.inputs], np.r_[before.targets, after.targets]
        truth = np.repeat([data.RESPONSE, changed], len(before.targets), axis=0)  # (N, taps)
        for name in names:
            weights, _ = FILTERS[name](X, d)
            gap.append(np.sum((weights[:-1] - truth) ** 2, 1) / np.sum(truth**2, 1))
            half, tail = len(d) // 2, len(d) // 10
            late = {"before": slice(half - tail, half), "after": slice(len(d) - tail, len(d))}
            final = {when: 10 * float(np.log10(gap[-1][part].mean())) for when, part in late.items()}
            rows.append({"study": "filters", "setting": name, "seed": seed, "state": "done", "misalignment_db": final})
    gap = np.array(gap).reshape(args.seeds, len(names), -1)
    print("filters: misalignment ||w - h||^2 / ||h||^2 in the last tenth before, and after, the system changes")
    for name in names:
        ends = [np.mean([row["misalignment_db"][when] for row in rows if row["setting"] == name]) for when in late]
        print(f"  {name:22} {ends[0]:6.1f} dB {ends[1]:6.1f} dB")
    figure = matplotlib.figure.Figure(figsize=(8.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        axes.plot(10 * np.log10(gap[:, i].mean(0)), lw=1, label=name)
    axes.axvline(gap.shape[-1] // 2, color="k", ls=":", lw=1, label="the system changes")
    axes.set(xlabel="samples", ylabel="misalignment (dB)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    write_study(out, "filters", rows, figure)


# --------------------------------------------------------------------------------------------------------------- main

STUDIES = {"rates": rates, "filters": filters}


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--study", nargs="+", choices=list(STUDIES), default=list(STUDIES), help="(default: both)")
    p.add_argument("--seeds", type=run.positive_int, default=5, metavar="N", help="seeds 0 to N - 1 (default: 5)")
    run.add_flags(p, out=dict(default=str(run.ROOT / "out" / "lms" / "sweep"), help="where to"))
    rates_only = p.add_argument_group("the study rates")
    data.add_data_flags(rates_only)
    run.add_flags(rates_only, epochs=dict(default=20), lr=dict(nargs="+", default=RATES, help="step sizes r"))
    return p


def main(argv=None):
    args = data.parse(parser(), argv)
    out = run.make_folder(args.out)
    for study in args.study:
        STUDIES[study](args, out)


if __name__ == "__main__":
    run.cli(main)
