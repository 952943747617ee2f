"""Fit a linear model by LMS, one sample at a time, and compare it with the Wiener solution.

    python lms/train.py                                     # a plane: r = 0.005, 20 epochs, some seconds
    python lms/train.py --data fir                          # an unknown filter of 16 taps
    python lms/train.py --data houses.csv --target price    # a CSV of your own
    python lms/train.py --lr 1.0                            # too large a step size: it explodes, as curves.png shows

The run folder gets metrics.csv with the MSE of every epoch, learning.png with the excess MSE and the distance of the
weights from the Wiener solution, and planes.png (two features: all points and both planes) or weights.png.
"""

import sys
from dataclasses import dataclass, replace

from common import run
from common.options import option

import numpy as np
import torch
from tqdm import tqdm

import data
import model
from data import check_target, data_option, target_option


@dataclass(kw_only=True)
class Options(run.RunOptions):
    data: str = data_option()
    target: str | None = target_option()
    recipe: str = option("plain", "a named set of hyper-parameters; flags override it", choices=["plain", "tiny"])
    epochs: int = option(20, "passes over the training rows", above=0)
    lr: float = option(0.005, "step size r: w <- w + r e x", above=0)
    seed: int = option(0, "order of the rows", at_least=0)

    def check(self):
        check_target(self)


PLAIN = Options()
RECIPES = {"plain": PLAIN, "tiny": replace(PLAIN, epochs=2)}
AUTO_THREADS = 1  # products of small matrices gain nothing from more
PLOTTED = np.unique((10 ** np.arange(0, 10, 1 / 400)).astype(int))  # sample counts, 400 per decade, for learning.png


def mse(inputs, targets, w):
    return float(np.mean((targets - inputs @ w) ** 2))


def measured_misadjustment(value, wiener, d):
    """By what fraction an MSE is above the Wiener MSE; None if the Wiener solution fits the targets d exactly."""
    return float(value / wiener.mse - 1) if wiener.mse > 1e-12 * np.mean(d**2) else None


def format_optional(value, form, absent="none"):
    return absent if value is None else format(value, form)


def train(args, r, problem, wiener):
    """LMS over the shuffled rows, epoch by epoch. Raises run.Diverged.

    Returns the final weights (M,) and the curves of learning.png: the a-priori MSE and the training MSE of every epoch,
    and the distance of the weights from the Wiener solution before each of the samples PLOTTED.
    """
    X = problem.inputs
    d = problem.targets
    n = len(problem.targets)
    first_epoch = 0
    parameters = torch.nn.ParameterDict({"w": torch.zeros(X.shape[1], dtype=torch.float64)})
    w = parameters["w"].detach().numpy()  # (M,), in the same memory
    curves = {"apriori_mse": [], "train_mse": [], "distances": []}
    if state := r.load(model=parameters):
        first_epoch, curves = state["epoch"], {name: state[name] for name in curves}
    bar = tqdm(range(first_epoch, args.epochs), "LMS", args.epochs, initial=first_epoch, leave=False, disable=None)
    for epoch in bar:
        order = np.random.default_rng((args.seed, epoch)).permutation(n)
        with np.errstate(over="ignore", invalid="ignore"):  # the next lines check for divergence
            weights, errors = model.lms(X[order], d[order], args.lr, w)
        if (sample := model.diverged_at(errors)) is not None:
            errors[sample:] = np.nan
        r.check_finite(torch.from_numpy(errors**2), epoch * n)
        w[:] = weights[-1]

        samples = PLOTTED[(PLOTTED > epoch * n) & (PLOTTED <= (epoch + 1) * n)] - epoch * n - 1
        curves["distances"] += np.linalg.norm(weights[samples] - wiener.weights, axis=1).tolist()
        curves["apriori_mse"].append(float(np.mean(errors**2)))  # each error before the update on that sample
        curves["train_mse"].append(mse(X, d, w))  # with the weights after the epoch
        r.log(
            {
                "epoch": epoch + 1,
                "train_mse": curves["train_mse"][-1],
                "val_mse": mse(problem.val_inputs, problem.val_targets, w),
                "apriori_mse": curves["apriori_mse"][-1],
                "distance": float(np.linalg.norm(w - wiener.weights)),
            }
        )
        r.save(model=parameters, epoch=epoch + 1, **curves)
    return w, curves


# ------------------------------------------------------------------------------------------------------------ figures


def draw_learning(curves, wiener_mse, predicted):
    """Left: the excess MSE against epochs. Right: the distance of the weights from the Wiener solution."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in (("apriori_mse", "a priori, during the epoch"), ("train_mse", "weights after the epoch")):
        left.plot(np.arange(1, len(curves[name]) + 1), np.array(curves[name]) - wiener_mse, ".-", label=label)
    if predicted:
        left.axhline(predicted * wiener_mse, color="k", ls=":", label="predicted")
    left.set(xlabel="epoch", ylabel=f"MSE - Wiener MSE ({wiener_mse:.4g})", yscale="log")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend()
    right.plot(PLOTTED[: len(curves["distances"])], curves["distances"], color="tab:red", lw=0.8)
    right.set(xlabel="samples", ylabel="||w - Wiener w||", xscale="log", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def draw_planes(problem, fits):
    """All points of a problem with two features and a bias, and the planes of two `fits`, {label: weights (3,)}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.6), layout="constrained")
    axes = figure.add_subplot(projection="3d")
    features = np.r_[problem.inputs, problem.val_inputs]
    targets = np.r_[problem.targets, problem.val_targets]
    axes.scatter(features[:, 0], features[:, 1], targets, s=6, c="tab:green", alpha=0.5, lw=0, label="all points")
    x1, x2 = np.meshgrid(*(np.linspace(*np.quantile(features[:, i], (0.005, 0.995)), 9) for i in (0, 1)))
    for (label, w), style in zip(fits.items(), (dict(color="tab:red", lw=2.4, alpha=0.6), dict(color="k", ls="--"))):
        axes.plot_wireframe(x1, x2, w[0] * x1 + w[1] * x2 + w[2], label=label, **dict(lw=1) | style)
    xlabel, ylabel = (run.plain_text(name) for name in problem.columns[:2])
    axes.set(xlabel=xlabel, ylabel=ylabel, zlabel="target")
    axes.view_init(elev=20, azim=38)
    axes.set_box_aspect(None, zoom=1.1)
    axes.legend(loc="upper left", markerscale=3)
    return figure


def draw_weights(problem, fits):
    """The weights of `fits`, {label: weights (M,)}, and the true ones if known, as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6, min(24, 0.45 * len(problem.columns))), 3.8), layout="constrained")
    axes, x = figure.subplots(), np.arange(len(problem.columns))
    if problem.true_weights is not None:
        fits = {"true": problem.true_weights} | fits
    for i, (label, w) in enumerate(fits.items()):
        axes.bar(x + 0.27 * (i - (len(fits) - 1) / 2), w, 0.25, label=label)
    axes.axhline(0, color="k", lw=0.8)
    axes.set_xticks(x, [run.plain_text(name) for name in problem.columns], rotation=60 if len(x) > 6 else 0)
    axes.set(ylabel="weight")
    axes.legend()
    return figure


# --------------------------------------------------------------------------------------------------------------- main


def recipe(given: dict) -> Options:
    name = given.get("recipe", "plain")
    return replace(RECIPES[name], recipe=name)


def parse(argv=None) -> Options:
    return run.parse_options(__file__, Options, argv, recipe, extendable=lambda args: True)


def main(argv=None):
    args = parse(argv)
    problem = data.load(args.data, args.target)
    X, d = problem.inputs, problem.targets
    wiener = model.wiener_solution(X, d)
    bounds = model.stability(X)
    textbook, exact = model.misadjustment(X, args.lr)
    if wiener.rank < X.shape[1]:
        print(
            f"{problem.name}: the inputs are linearly dependent (rank {wiener.rank} of {X.shape[1]} columns); the "
            "Wiener solution is the one of least norm",
            file=sys.stderr,
        )
    with run.Run(
        args, __file__, f"{problem.name}-lms", auto_precision="fp64", auto_threads=AUTO_THREADS
    ) as r:  # NumPy, on the CPU
        dataset = {
            "name": problem.name,
            "digest": problem.digest,
            "builtin": args.data in data.BUILT_IN,
            "train": len(d),
            "val": len(problem.val_targets),
            "rank": wiener.rank,
        }
        r.note(
            f"LMS, {X.shape[1]} weights, on {problem.name}: {len(d):,} rows per epoch, r = {args.lr:g}; "
            f"bounds of r: {bounds.mean:.3g} for the mean, {bounds.trace:.3g} by the trace, "
            f"{format_optional(bounds.mean_square, '.3g', 'unknown')} for the mean square",
            dataset=dataset,
            parameters=X.shape[1],
            columns=problem.columns,
            scale=None if problem.std is None else {"mean": problem.mean.tolist(), "std": problem.std.tolist()},
            bounds=bounds._asdict(),
        )
        w, curves = train(args, r, problem, wiener)

        late = float(np.mean(curves["apriori_mse"][args.epochs // 2 :]))
        measured = measured_misadjustment(late, wiener, d)
        r.figure("learning.png", draw_learning(curves, wiener.mse, exact or textbook))
        name, draw = ("planes.png", draw_planes) if X.shape[1] == 3 else ("weights.png", draw_weights)
        r.figure(name, draw(problem, {"Wiener": wiener.weights, f"LMS, {args.epochs} epochs": w}))
        for column, ours, best in zip(problem.columns, w, wiener.weights):
            r.print(f"{column:>12}   LMS {ours:11.5g}   Wiener {best:11.5g}")
        train_mse, val_mse = mse(X, d, w), mse(problem.val_inputs, problem.val_targets, w)
        r.finish(
            f"MSE {train_mse:.5g}, Wiener {wiener.mse:.5g}; misadjustment over the second half "
            f"{format_optional(measured, '.3g')} (predicted: textbook {format_optional(textbook, '.3g')}, "
            f"exact {format_optional(exact, '.3g')})",
            uniform_loss=float(np.mean(d**2)),  # of weights of zero, with which LMS begins
            train_mse=train_mse,
            val_mse=val_mse,
            wiener_mse=wiener.mse,
            wiener_val_mse=mse(problem.val_inputs, problem.val_targets, wiener.weights),
            apriori_mse_late=late,
            misadjustment=measured,
            misadjustment_textbook=textbook,
            misadjustment_exact=exact,
            distance=float(np.linalg.norm(w - wiener.weights)),
            weights=w.tolist(),
            wiener_weights=wiener.weights.tolist(),
        )
    return r.record


if __name__ == "__main__":
    run.cli(main)
