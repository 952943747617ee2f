"""Fit a linear model by LMS, one sample at a time, and see how near it comes to the Wiener solution.

    python lms/train.py                                     # a plane: r = 0.005, 20 epochs, some seconds
    python lms/train.py --data fir                          # an unknown filter of 16 taps
    python lms/train.py --data houses.csv --target price    # a CSV of your own
    python lms/train.py --lr 1.0                            # beyond the bound: diverges, and says where

Leaves in the run folder: metrics.csv with the MSE of every epoch, learning.png (that MSE above the Wiener floor, and
the distance of the weights from Wiener's), planes.png (two features: all points and both fitted planes) or weights.png.
"""

import argparse
import sys

import matplotlib.figure
import numpy as np
from tqdm import tqdm

import data
import model
import run


def mse(inputs, targets, w):
    return float(np.mean((targets - inputs @ w) ** 2))


def above_floor(value, wiener, d):
    """By what share an MSE is above that of `wiener` for targets d; None where Wiener leaves no error at all."""
    return float(value / wiener.mse - 1) if wiener.mse > 1e-12 * np.mean(d**2) else None


def train(args, r, problem, wiener):
    """LMS over the shuffled rows, epoch by epoch. Raises run.Diverged.

    Returns the last weights (M,) and the distance of the weights from Wiener's before every sample (epochs * N,).
    """
    X, d = problem.inputs, problem.targets
    w, distances = np.zeros(X.shape[1]), []
    for epoch in tqdm(range(args.epochs), "LMS", leave=False, disable=None):
        order = np.random.default_rng((args.seed, epoch)).permutation(len(d))
        with np.errstate(over="ignore", invalid="ignore"):  # looked at in the next line
            weights, errors = model.lms(X[order], d[order], args.lr, w)
        if (at := model.diverged_at(errors)) is not None:
            raise run.Diverged(epoch * len(d) + at)
        w = weights[-1]
        distances.append(np.linalg.norm(weights[:-1] - wiener.weights, axis=1))
        # train and val are with the weights that the epoch leaves, apriori with those that each sample met
        r.log(
            {
                "epoch": epoch + 1,
                "train_mse": mse(X, d, w),
                "val_mse": mse(problem.val_inputs, problem.val_targets, w),
                "apriori_mse": float(np.mean(errors**2)),
                "distance": float(np.linalg.norm(w - wiener.weights)),
            }
        )
        if r.stopping:
            r.stop()
    return w, np.concatenate(distances)


# ------------------------------------------------------------------------------------------------------------ figures


def draw_learning(path, rows, distances, wiener_mse, predicted):
    """Left, MSE above the Wiener floor against epochs; right, the weights' distance from Wiener's against samples."""
    figure = matplotlib.figure.Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for column, label in (("apriori_mse", "while it learns (a priori)"), ("train_mse", "weights after the epoch")):
        left.plot([row["epoch"] for row in rows], [row[column] - wiener_mse for row in rows], ".-", label=label)
    if predicted:
        left.axhline(predicted * wiener_mse, color="k", ls=":", label="predicted")
    left.set(xlabel="epoch", ylabel=f"MSE - Wiener's {wiener_mse:.4g}", yscale="log")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend()
    seen = np.unique(np.geomspace(1, len(distances), 2000).astype(int))  # as many points as the eye can tell apart
    right.plot(seen, distances[seen - 1], color="tab:red", lw=0.8)
    right.set(xlabel="samples seen", ylabel="||w - Wiener's w||", xscale="log", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    run.write_figure(path, figure)


def draw_planes(path, problem, fits):
    """All points of a problem with two features and a bias, and the planes of two `fits`, {label: weights (3,)}."""
    figure = matplotlib.figure.Figure(figsize=(6, 4.6), layout="constrained")
    axes = figure.add_subplot(projection="3d")
    features = np.r_[problem.inputs, problem.val_inputs]
    targets = np.r_[problem.targets, problem.val_targets]
    axes.scatter(features[:, 0], features[:, 1], targets, s=6, c="tab:green", alpha=0.5, lw=0, label="all points")
    x1, x2 = np.meshgrid(*(np.linspace(*np.quantile(features[:, i], (0.005, 0.995)), 9) for i in (0, 1)))
    for (label, w), style in zip(
        fits.items(), (dict(color="tab:red", lw=2.4, alpha=0.6), dict(color="k", lw=1, ls="--"))
    ):
        axes.plot_wireframe(x1, x2, w[0] * x1 + w[1] * x2 + w[2], label=label, **style)
    axes.set(xlabel=problem.columns[0], ylabel=problem.columns[1], zlabel="target")
    axes.view_init(elev=20, azim=38)
    axes.set_box_aspect(None, zoom=1.1)
    axes.legend(loc="upper left", markerscale=3)
    run.write_figure(path, figure)


def draw_weights(path, problem, fits):
    figure = matplotlib.figure.Figure(figsize=(max(6, min(24, 0.45 * len(problem.columns))), 3.8), layout="constrained")
    axes, at = figure.subplots(), np.arange(len(problem.columns))
    if problem.true_weights is not None:
        fits = {"true": problem.true_weights} | fits
    for i, (label, w) in enumerate(fits.items()):
        axes.bar(at + 0.27 * (i - (len(fits) - 1) / 2), w, 0.25, label=label)
    axes.axhline(0, color="k", lw=0.8)
    axes.set_xticks(at, problem.columns, rotation=60 if len(at) > 6 else 0)
    axes.set(ylabel="weight")
    axes.legend()
    run.write_figure(path, figure)


# --------------------------------------------------------------------------------------------------------------- main


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data.add_data_flags(p)
    run.add_flags(
        p,
        "out",
        epochs=dict(default=20),
        seed=dict(help="order of the rows"),
        lr=dict(default=0.005, help="step size r: w moves by r e x"),
    )
    return p


def main(argv=None):
    # what run.Run asks for and NumPy on one core has no flags for
    args = data.parse(parser(), argv, argparse.Namespace(resume=None, device="cpu", precision="fp32"))
    problem = data.load(args)
    X, d = problem.inputs, problem.targets
    wiener = model.wiener_solution(X, d)
    if wiener.rank < X.shape[1]:
        print(
            f"{problem.name}: the inputs are linearly dependent (rank {wiener.rank} of {X.shape[1]} columns); of all "
            "weights that fit equally well, Wiener's here are those of least norm",
            file=sys.stderr,
        )
    bounds, (textbook, exact) = model.stability(X), model.misadjustment(X, args.lr)
    with run.Run(args, __file__, f"{problem.name}-lms") as r:
        r.note(
            dataset={
                "name": problem.name,
                "digest": problem.digest,
                "builtin": args.data in data.BUILT_IN,
                "train": len(d),
                "val": len(problem.val_targets),
                "rank": wiener.rank,
            },
            parameters=X.shape[1],
            bounds=bounds._asdict(),
        )
        r.say(
            f"LMS, {X.shape[1]} weights, on {problem.name}: {len(d):,} rows a pass, r = {args.lr:g}; stable in the "
            f"mean below {bounds.mean:.3g}, by the trace below {bounds.trace:.3g}, in the mean square below "
            f"{shown(bounds.mean_square, '.3g', 'an unknown value')}\n{r.hardware}"
        )
        w, distances = train(args, r, problem, wiener)

        late = r.rows[len(r.rows) // 2 :]
        apriori = float(np.mean([row["apriori_mse"] for row in late]))
        measured = above_floor(apriori, wiener, d)
        draw_learning(r.folder / "learning.png", r.rows, distances, wiener.mse, exact or textbook)
        fits = {"Wiener": wiener.weights, f"LMS, {args.epochs} epochs": w}
        flat = X.shape[1] == 3
        (draw_planes if flat else draw_weights)(r.folder / ("planes.png" if flat else "weights.png"), problem, fits)
        r.finish(
            train_mse=r.rows[-1]["train_mse"],
            val_mse=r.rows[-1]["val_mse"],
            wiener_mse=wiener.mse,
            wiener_val_mse=mse(problem.val_inputs, problem.val_targets, wiener.weights),
            apriori_mse_late=apriori,
            misadjustment=measured,
            misadjustment_textbook=textbook,
            misadjustment_exact=exact,
            distance=r.rows[-1]["distance"],
            weights=w.tolist(),
            wiener_weights=wiener.weights.tolist(),
        )
        for name, a, b in zip(problem.columns, w, wiener.weights):
            r.say(f"{name:>12}   LMS {a:11.5g}   Wiener {b:11.5g}")
        r.say(
            f"MSE {r.rows[-1]['train_mse']:.5g}, Wiener {wiener.mse:.5g}; misadjustment over the later half "
            f"{shown(measured, '.3g')} (predicted: textbook {shown(textbook, '.3g')}, exact {shown(exact, '.3g')}); "
            f"{r.record['wall_s']:.0f} s; {run.shown(r.folder)}"
        )
    return r.record


def shown(value, form, absent="none"):
    return absent if value is None else format(value, form)


if __name__ == "__main__":
    run.cli(main)
