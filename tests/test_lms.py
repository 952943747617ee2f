"""lms/: the filters against padasip, lstsq and autograd; the theory against simulations; what users get wrong.

What all folders owe is in test_contract.py.
"""

import dataclasses
import io
import json
import math
import random
import shlex
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from conftest import failure, lazy, load, one_line, run
from helpers import drawn, mutations

train = lazy("lms")
data = lazy("lms", "data")
model = lazy("lms", "model")
ladder, sweep = lazy("lms", "ladder"), lazy("lms", "sweep")
cancel, series = lazy("lms", "cancel"), lazy("lms", "series")


def problem(taps=5, n=700, seed=0):
    """(X, d): the noisy output of a filter with `taps` correlated inputs."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, taps)) @ rng.normal(size=(taps, taps)) / taps
    return X, X @ rng.normal(size=taps) + 0.1 * rng.normal(size=n)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------------------------------- the filters, against outside


@pytest.mark.parametrize("taps", [1, 2, 16, 70])
def test_filters_agree_with_padasip_step_for_step(taps):
    filters = pytest.importorskip("padasip", reason="padasip is not installed: pip install padasip").filters
    X, d = problem(taps)
    w0 = np.random.default_rng(1).normal(size=taps)
    for theirs, ours in (
        (filters.FilterLMS(taps, mu=0.05, w=w0), model.lms(X, d, 0.05, w0)),
        (filters.FilterLMS(taps, mu=0.05, w=w0), model.lms_blocks(X, d, 0.05, w0)),
        (filters.FilterNLMS(taps, mu=0.7, eps=1e-2, w=w0), model.nlms(X, d, 0.7, w0, eps=1e-2)),
        (filters.FilterRLS(taps, mu=0.99, eps=0.1, w=w0), model.rls(X, d, 0.99, 0.1, w0)),
    ):
        _, errors, weights = theirs.run(d, X)
        assert np.abs(weights - ours[0][:-1]).max() < 1e-10, theirs.kind
        assert np.abs(errors - ours[1]).max() < 1e-10, theirs.kind
        assert np.abs(theirs.w - ours[0][-1]).max() < 1e-10, theirs.kind


def test_an_lms_step_is_a_gradient_step():
    """The update of w is -r times the gradient of e^2 / 2, as autograd computes it."""
    X, d = problem()
    weights, errors = model.lms(X, d, 0.05)
    for k in (0, 1, 333, 699):
        w = torch.tensor(weights[k], requires_grad=True)
        e = d[k] - torch.from_numpy(X[k]) @ w
        (e**2 / 2).backward()
        assert np.allclose(weights[k + 1], weights[k] - 0.05 * w.grad.numpy(), rtol=0, atol=1e-14)
        assert errors[k] == pytest.approx(e.item(), abs=1e-14)


def test_the_wiener_solution_is_that_of_least_squares():
    X, d = problem(16)
    wiener = model.wiener_solution(X, d)
    by_torch = torch.linalg.lstsq(torch.from_numpy(X), torch.from_numpy(d)[:, None]).solution[:, 0].numpy()
    assert np.allclose(wiener.weights, by_torch, rtol=0, atol=1e-10)
    assert np.abs(X.T @ (d - X @ wiener.weights)).max() < 1e-10  # the error is orthogonal to the inputs
    assert wiener.rank == 16 and wiener.mse == pytest.approx(np.mean((d - X @ by_torch) ** 2))


def test_the_wiener_solution_of_dependent_inputs_has_the_least_norm():
    X, d = problem(4)
    X = np.c_[X, X[:, 0] + X[:, 1]]
    wiener = model.wiener_solution(X, d)
    assert wiener.rank == 4 and np.allclose(wiener.weights, np.linalg.pinv(X) @ d, atol=1e-10)


@pytest.mark.parametrize("name", ["builtin", "fir"])
def test_rls_without_forgetting_ends_at_the_wiener_solution(name):
    X, d = data.BUILT_IN[name]().inputs, data.BUILT_IN[name]().targets
    assert np.abs(model.rls(X, d)[0][-1] - model.wiener_solution(X, d).weights).max() < 1e-8


def test_rls_with_forgetting_is_weighted_least_squares():
    X, d = problem(6)
    root = np.sqrt(0.98 ** np.arange(len(d))[::-1])
    weighted = np.linalg.lstsq(X * root[:, None], d * root, rcond=None)[0]
    assert np.abs(model.rls(X, d, forgetting=0.98)[0][-1] - weighted).max() < 1e-8


def test_rls_is_stable_over_many_samples():
    """An asymmetric rounding error in P would grow by a factor of 0.99^-20000 = 1e87."""
    problem = data.fir(n=25_000)
    weights, _ = model.rls(problem.inputs, problem.targets, forgetting=0.99)
    assert np.linalg.norm(weights[-1] - problem.true_weights) < 0.2


# -------------------------------------------------------------------------------------- the fast forms, and the theory


@pytest.mark.parametrize("block", [1, 7, 32, 64, 1000, None])
def test_lms_in_blocks_is_lms(block):
    for taps in (1, 2, 32, 100):
        X, d = problem(taps, 333)
        w0 = np.random.default_rng(1).normal(size=taps)
        for fast, slow in zip(model.lms_blocks(X, d, 0.1, w0, block), model.lms(X, d, 0.1, w0)):
            assert np.abs(fast - slow).max() < 1e-12


def test_lms_in_blocks_diverges_at_the_same_step():
    plane = data.plane()
    with np.errstate(over="ignore", invalid="ignore"):
        steps = [model.diverged_at(f(plane.inputs, plane.targets, 1.0)[1]) for f in (model.lms, model.lms_blocks)]
    assert steps[0] == steps[1] and 100 < steps[0] < 2000


def test_many_runs_at_once_equal_single_runs():
    (X0, d0), (X1, d1) = problem(3, 200, seed=0), problem(3, 200, seed=1)
    rates = np.array([0.01, 0.2])
    w, errors = model.lms_runs(np.stack([X0, X1])[:, None], np.stack([d0, d1])[:, None], rates, np.zeros((2, 2, 3)))
    for i, (X, d) in enumerate(((X0, d0), (X1, d1))):
        for j, r in enumerate(rates):
            weights, e = model.lms(X, d, r)
            assert np.abs(errors[i, j] - e).max() < 1e-13 and np.abs(w[i, j] - weights[-1]).max() < 1e-13


def test_a_diverging_run_does_not_affect_the_others(recwarn):
    X, d = problem(3, 300)
    X = X / np.abs(X).max()
    w, errors = model.lms_runs(X, d, np.array([0.1, 1e3]), np.zeros((2, 3)))
    assert model.diverged_at(errors[0]) is None and np.abs(w[0] - model.lms(X, d, 0.1)[0][-1]).max() < 1e-13
    at = model.diverged_at(errors[1])
    assert 0 < at < 300 and np.isfinite(np.sum(errors[1, :at] ** 2))
    assert not recwarn.list, "an overflow is expected, and gives no warning"


def test_the_bounds_for_one_gaussian_input():
    """For an input of variance s, E[x^4] = 3 s^2. The mean square therefore converges below 2 / (3 s)."""
    X = 2 * np.random.default_rng(0).normal(size=(400_000, 1))
    bounds = model.stability(X)
    assert bounds.mean == pytest.approx(2 / 4, rel=0.01) and bounds.trace == pytest.approx(bounds.mean)
    assert bounds.mean_square == pytest.approx(2 / 12, rel=0.02)
    _, exact = model.misadjustment(X, 0.05)
    assert exact == pytest.approx(0.05 * 4 / (2 - 3 * 0.05 * 4), rel=0.02)


def test_an_input_that_is_zero_changes_no_bound():
    X, _ = problem(4)
    bounds = model.stability(X)
    assert bounds.mean_square < bounds.trace < bounds.mean
    wider = np.c_[X, np.zeros(len(X))]
    assert np.allclose(model.stability(wider), bounds)
    assert np.allclose(model.misadjustment(wider, 0.1), model.misadjustment(X, 0.1))


def test_the_exact_bound_is_not_computed_for_many_weights():
    assert model.stability(np.ones((5, model.MAX_EXACT + 1))).mean_square is None


@pytest.mark.parametrize("r", [0.05, 0.1, 0.2])
def test_the_exact_misadjustment_is_that_of_independent_samples(r):
    plane, rng = data.plane(), np.random.default_rng(0)
    X, d = plane.inputs, plane.targets
    rows = rng.integers(len(d), size=(400, 1500))  # 400 runs of 1,500 samples
    _, errors = model.lms_runs(X[rows], d[rows], np.full(400, r), np.zeros((400, 3)))
    measured = np.mean(errors[:, 300:] ** 2) / model.wiener_solution(X, d).mse - 1
    textbook, exact = model.misadjustment(X, r)
    assert measured == pytest.approx(exact, rel=0.05)
    assert r < 0.2 or measured > 1.2 * textbook, "the textbook formula is for small steps"


def test_moments_give_the_map_of_the_covariance():
    """E[(I - r xx') S (I - r xx')] over a few rows that are far from Gaussian, for any symmetric S."""
    X, _ = problem(3, 20)
    X = X**2
    S = np.array([[2.0, 0.3, -0.5], [0.3, 1.0, 0.2], [-0.5, 0.2, 3.0]])
    r = 0.7
    steps = np.eye(3) - r * X[:, :, None] * X[:, None, :]  # (N, 3, 3)
    expected = np.mean(steps @ S @ steps, 0)
    _, axes = np.linalg.eigh(X.T @ X / len(X))
    _, a, K = model.moments(X)
    mapped = (np.eye(9) - r * np.diag(a) + r**2 * K) @ (axes.T @ S @ axes).reshape(-1)
    assert np.allclose(axes @ mapped.reshape(3, 3) @ axes.T, expected, rtol=1e-10)


def test_above_a_bound_no_misadjustment_is_predicted():
    X = data.plane().inputs
    bounds = model.stability(X)
    assert model.misadjustment(X, 0.99 * bounds.mean_square)[1] > 10
    assert model.misadjustment(X, 1.01 * bounds.mean_square)[1] is None
    assert model.misadjustment(X, 1.01 * bounds.trace) == (None, None)


# ----------------------------------------------------------------------------------------------------------- a training


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run folder, record) of the default run, for 10 epochs."""
    out = tmp_path_factory.mktemp("lms") / "run"
    with drawn():
        return out, train.main(["--epochs", "10", "--out", str(out)])


def test_a_training_ends_with_the_predicted_misadjustment(trained):
    out, record = trained
    final = record["final"]
    assert final["wiener_mse"] < final["train_mse"] and final["wiener_mse"] < final["apriori_mse_late"]
    # the tolerance is wide because theory assumes independent samples, while an epoch has every row once
    assert final["misadjustment"] == pytest.approx(final["misadjustment_exact"], rel=0.35)
    assert np.allclose(final["weights"], data.PLANE, atol=0.1)
    assert {"learning.png", "planes.png"} <= {file.name for file in out.iterdir()}


def test_final_weights_stay_within_the_predicted_misadjustment():
    """On average over 100 runs."""
    plane = data.plane()
    X = plane.inputs
    d = plane.targets
    wiener_mse = model.wiener_solution(plane.inputs, plane.targets).mse
    rows = np.stack([np.random.default_rng(seed).permutation(len(d)) for seed in range(100)])
    w = np.zeros((100, 3))
    for r in (0.05, 0.005):  # a fast start, then the step size to be tested
        w, _ = model.lms_runs(X[rows], d[rows], np.full(100, r), w)
    excess = np.mean([train.mse(X, d, one) for one in w]) / wiener_mse - 1
    assert 0.3 * model.misadjustment(X, 0.005)[1] < excess < model.misadjustment(X, 0.005)[1]


@pytest.mark.draws
def test_a_run_of_more_epochs_continues_a_finished_one(trained, tmp_path):
    """Everything is as in one run: weights, metrics, final metrics, and the curves of learning.png."""
    out, whole = trained
    train.main(["--epochs", "4", "--out", str(tmp_path)])
    record = train.main(["--resume", str(tmp_path), "--epochs", "10"])
    assert record["final"] == whole["final"] and record["args"] == whole["args"] and record["resumed"] == 1
    assert (tmp_path / "metrics.csv").read_bytes() == (out / "metrics.csv").read_bytes()
    ours, theirs = (torch.load(folder / "last.pt", weights_only=True) for folder in (tmp_path, out))
    assert torch.equal(ours["model"]["w"], theirs["model"]["w"]) and len(ours["distances"]) > 900
    for name in ("apriori_mse", "train_mse", "distances"):
        assert ours[name] == theirs[name], name
    assert (tmp_path / "learning.png").read_bytes() == (out / "learning.png").read_bytes()


def test_weights_that_are_not_numbers_predict_nothing(trained, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "run")
    state = torch.load(folder / "last.pt", weights_only=True)
    state["model"]["w"][0] = math.nan
    torch.save(state, folder / "last.pt")
    code, message = failure(load("lms", "trained").load, folder)
    assert code == 1 and one_line(message) and "last.pt: is damaged" in message


def test_learning_png_has_the_distances_before_every_plotted_sample(trained):
    """The first one is the length of the Wiener solution, since LMS begins at zero."""
    out, record = trained
    distances = torch.load(out / "last.pt", weights_only=True)["distances"]
    plane, wiener = data.plane(), np.array(record["final"]["wiener_weights"])
    order = np.random.default_rng((0, 0)).permutation(2000)
    weights, _ = model.lms(plane.inputs[order], plane.targets[order], 0.005)
    assert distances[0] == pytest.approx(np.linalg.norm(wiener))
    for i in (10, 100, 500):
        sample = train.PLOTTED[i]  # counted from 1
        assert distances[i] == pytest.approx(np.linalg.norm(weights[sample - 1] - wiener), rel=1e-12)
    assert train.PLOTTED[len(distances) - 1] <= 20_000 < train.PLOTTED[len(distances)]


def test_a_training_that_learns_nothing_says_so(trained, tmp_path, capsys):
    record = train.main(["--epochs", "1", "--lr", "2e-6", "--out", str(tmp_path)])
    assert "nothing was learned" in record["warning"] and record["warning"] in capsys.readouterr().out
    assert "warning" not in trained[1]
    resumed = train.main(["--resume", str(tmp_path), "--epochs", "50"])
    assert "warning" not in resumed and "warning" not in capsys.readouterr().out


def test_a_longer_run_that_is_interrupted_has_no_results_of_the_shorter_one(tmp_path, monkeypatch):
    assert train.main(["--epochs", "1", "--out", str(tmp_path)])["final"]

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train.main(["--resume", str(tmp_path), "--epochs", "2"])
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["state"] == "interrupted" and "final" not in record


def test_a_diverged_run_says_where(tmp_path):
    code, message = failure(train.main, ["--lr", "1", "--out", str(tmp_path / "run")])
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert code == 1 and record["state"] == "diverged" and f"step {record['diverged_at_step']};" in message


OPTIONS = {  # option: (what else is given, another value): the final weights are others
    "data": ([], "fir"),
    "recipe": ([], "tiny"),
    "epochs": ([], "2"),
    "lr": ([], "0.01"),
    "seed": ([], "1"),
    "target": (["--data", "CSV", "--target", "y"], "b"),
}
COMMON = {"out", "resume", "tensorboard"}  # test_contract.py and test_common.py


def test_every_option_is_in_the_table():
    fields = {field.name for field in dataclasses.fields(train.Options)}
    assert OPTIONS.keys() | COMMON == fields and not OPTIONS.keys() & COMMON


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_matters(name, tmp_path):
    given, value = OPTIONS[name]
    path = write(tmp_path / "t.csv", GOOD)
    given = [path if word == "CSV" else word for word in given]
    if name != "recipe":
        given = [*given, "--epochs", "1"]
    ends = []
    for i, words in enumerate((given, [*given, f"--{name}", value])):
        ends.append(train.main([*words, "--out", str(tmp_path / f"run{i}")])["final"]["weights"])
    assert ends[0] != ends[1]


def test_an_epoch_of_training_is_the_formula(tmp_path):
    """w <- w + r e x over the shuffled rows; the a-priori MSE is that of the errors before each update."""
    record = train.main(["--epochs", "1", "--lr", "0.02", "--seed", "5", "--out", str(tmp_path)])
    plane = data.plane()
    w = np.zeros(3)
    errors = []
    for k in np.random.default_rng((5, 0)).permutation(len(plane.targets)):
        x = plane.inputs[k]
        errors.append(plane.targets[k] - w @ x)
        w = w + 0.02 * errors[-1] * x
    assert np.allclose(record["final"]["weights"], w, rtol=1e-12)
    assert record["final"]["apriori_mse_late"] == pytest.approx(np.mean(np.square(errors)), rel=1e-12)
    residuals = plane.val_targets - plane.val_inputs @ w
    assert record["final"]["val_mse"] == pytest.approx(np.mean(residuals**2), rel=1e-12)


# ---------------------------------------------------------------------------------------------------------- the sweep


def test_a_row_of_the_sweep_is_a_run_of_train(tmp_path):
    """Also when a run diverges after its first epoch."""
    lrs, quick = ["0.02", "0.8"], ["--epochs", "2"]
    sweep.main(["--study", "rates", "--seeds", "2", *quick, "--lr", *lrs, "--out", str(tmp_path / "sweep")])
    rows = json.loads((tmp_path / "sweep" / "rates.json").read_text())["rows"]
    final = train.main(["--lr", lrs[0], "--seed", "1", *quick, "--out", str(tmp_path / "run")])["final"]
    (row,) = [row for row in rows if row["lr"] == 0.02 and row["seed"] == 1]
    assert row["final"]["misadjustment"] == pytest.approx(final["misadjustment"], rel=1e-9)
    assert row["final"]["train_mse"] == pytest.approx(final["train_mse"], rel=1e-9)
    (row,) = [row for row in rows if row["lr"] == 0.8 and row["seed"] == 1]
    assert row["diverged_at_step"] > 2000
    failure(train.main, ["--lr", lrs[1], "--seed", "1", *quick, "--out", str(tmp_path / "diverged")])
    record = json.loads((tmp_path / "diverged" / "run.json").read_text())
    assert record["diverged_at_step"] == row["diverged_at_step"]


@pytest.mark.draws
def test_the_study_rates_agrees_with_theory(tmp_path, capsys, recwarn):
    sweep.main(["--study", "rates", "--seeds", "2", "--epochs", "4", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "rates.json").read_text())["rows"]
    states = {row["lr"]: row["state"] for row in rows}
    assert states[1.0] == "diverged" and all(states[lr] == "done" for lr in (0.005, 0.01, 0.05, 0.1))
    same = [row["final"] for row in rows if row["lr"] == 0.1]
    assert len(same) == 2
    for final in same:
        assert final["misadjustment"] == pytest.approx(final["misadjustment_exact"], rel=0.25)
    assert "2 of 2 diverged, at step" in capsys.readouterr().out
    assert (tmp_path / "rates.png").exists() and not (tmp_path / "filters.json").exists()
    assert not [w for w in recwarn.list if issubclass(w.category, RuntimeWarning)]


def test_after_the_change_only_rls_without_forgetting_is_lost(tmp_path, recwarn):
    sweep.main(["--study", "filters", "--seeds", "1", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "filters.json").read_text())["rows"]
    before, after = ({row["setting"]: row["misalignment_db"][k] for row in rows} for k in ("before", "after"))
    assert len(rows) == 4 and min(before, key=before.get) == "RLS, forgetting 1"
    assert after.pop("RLS, forgetting 1") > -10 and max(after.values()) < -20
    assert not [w for w in recwarn.list if issubclass(w.category, RuntimeWarning)]


@pytest.mark.draws
def test_misalignment_by_hand(tmp_path, monkeypatch):
    """A filter that keeps 0.9 of the first response has -20 dB before the change."""

    def keep(X, d):
        return np.tile(0.9 * data.RESPONSE, (len(d) + 1, 1)), None

    monkeypatch.setattr(sweep, "FILTERS", {"kept": keep})
    sweep.main(["--study", "filters", "--seeds", "1", "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "filters.json").read_text())["rows"]
    new = -data.RESPONSE[::-1]
    after = np.sum((0.9 * data.RESPONSE - new) ** 2) / np.sum(new**2)
    assert row["misalignment_db"] == pytest.approx({"before": -20, "after": 10 * np.log10(after)})


def test_a_study_whose_runs_all_diverge_still_draws_the_theory(tmp_path):
    sweep.main(["--study", "rates", "--lr", "1e9", "--seeds", "1", "--epochs", "1", "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "rates.json").read_text())["rows"]
    assert row["state"] == "diverged" and (tmp_path / "rates.png").exists()


@pytest.mark.parametrize(
    "flag, values", [("--data", ["fir"]), ("--target", ["y"]), ("--epochs", ["20"]), ("--lr", ["0.1"])]
)
def test_a_flag_that_no_chosen_study_reads_is_an_error(flag, values, tmp_path, capsys):
    argv = ["--study", "filters", flag, *values, "--out", str(tmp_path / "sweep")]
    assert failure(sweep.main, argv)[0] == 2 and not (tmp_path / "sweep").exists()
    assert f"error: {flag}: only the study rates reads it" in capsys.readouterr().err.splitlines()[-1]


def test_list_prints_one_command_per_study(tmp_path, capsys):
    argv = ["--lr", "0.1", "0.2", "--seeds", "3", "--out", str(tmp_path / "sweep")]
    sweep.main([*argv, "--list"])
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 and not (tmp_path / "sweep").exists()
    whole = vars(run.parse_options(sweep.__file__, sweep.Options, argv, sweep.recipe))
    for words, study in zip(lines, ("rates", "filters")):
        assert words[0] == "python" and Path(words[1]).resolve() == Path(sweep.__file__).resolve()
        args = vars(run.parse_options(sweep.__file__, sweep.Options, words[2:], sweep.recipe))
        assert args.pop("study") == (study,) and Path(args.pop("out")).resolve() == tmp_path / "sweep"
        assert all(value == whole[name] for name, value in args.items() if study == "rates" or name == "seeds")


# ----------------------------------------------------------------------------------------------------------- the ladder


@pytest.mark.parametrize("layers", [1, 3])
def test_gradients_by_hand_are_those_of_autograd_and_finite_differences(layers):
    steps = []
    for step, params, by_hand, loss in ladder.gradient_cases(np.random.default_rng(5), layers):
        leaves = [p.clone().requires_grad_() for p in params]
        value = loss(leaves)
        loss_by_hand, gradients = by_hand(params)
        assert float(loss_by_hand) == pytest.approx(value.item(), rel=1e-12)
        for ours, autograd in zip(gradients, torch.autograd.grad(value, leaves), strict=True):
            assert np.shape(ours) == autograd.shape
            assert ladder.relative_error([ours], [autograd]) < 1e-6
        assert ladder.relative_error(gradients, ladder.finite_differences(by_hand, params)) < 1e-6
        steps.append(step)
    assert steps == [1, 3, 4, 5]


def test_check_finds_a_wrong_gradient(monkeypatch, capsys):
    ladder.main(["--check", "--iters", "20", "--layers", "1"])
    assert capsys.readouterr().out.count("relative error") == 10
    correct = ladder.gradients_classes

    def wrong(*args):
        loss, (dW, db) = correct(*args)
        return loss, (2 * dW, db)

    monkeypatch.setattr(ladder, "gradients_classes", wrong)
    code, message = failure(ladder.main, ["--check", "--iters", "20", "--layers", "1"])
    assert code == 1 and "step 4 against autograd" in message and "step 4 against finite differences" in message
    assert not any(f"step {i}" in message for i in (1, 2, 3, 5, 6))


@pytest.mark.parametrize("a, b", [(1, 2), (5, 6)])
def test_steps_that_compute_the_same_agree(a, b):
    args = ladder.Options(iters=150, seed=3, layers=3)
    (losses_a, found_a, _), (losses_b, found_b, _) = ladder.STEPS[a](args), ladder.STEPS[b](args)
    assert len(losses_a) == 150 and np.allclose(losses_a, losses_b, rtol=1e-10, atol=0)
    for name in found_a:
        assert np.allclose(found_a[name], found_b[name], rtol=1e-10)


@pytest.mark.draws
def test_the_ladder_reports_the_mean_of_the_last_hundred_losses(tmp_path):
    losses, _, _ = ladder.run_step(1, ladder.Options(step=1, iters=150))
    ladder.main(["--step", "1", "--iters", "150", "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "step1.json").read_text())["rows"]
    assert row["final"]["loss"] == pytest.approx(sum(losses[50:]) / 100, rel=1e-12)


def test_the_log_likelihood_of_large_logits_is_finite(recwarn):
    X, labels = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 0])
    W = np.array([[5000.0, 0.0, -5000.0], [0.0, 1000.0, 0.0]])
    loss, (dW, _) = ladder.gradients_classes(W, np.zeros(3), X, labels)
    assert loss == pytest.approx(500.0) and np.isfinite(dW).all() and not recwarn.list


@pytest.mark.parametrize("step, tolerance", [(1, 0.03), (3, 0.03), (4, 0.2), (5, 0.12)])
@pytest.mark.draws
def test_the_ladder_recovers_the_truth(step, tolerance, tmp_path):
    ladder.main(["--step", str(step), "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / f"step{step}.json").read_text())["rows"]
    assert row["final"]["largest_error"] < tolerance and (tmp_path / f"step{step}.png").exists()
    errors = [np.subtract(row["final"]["found"][name], true) for name, true in row["final"]["true"].items()]
    assert row["final"]["largest_error"] == max(np.abs(error).max() for error in errors)


def test_a_step_that_diverges_says_where(tmp_path, recwarn):
    for argv in (["--step", "1", "--out", str(tmp_path)], ["--check"]):
        code, message = failure(ladder.main, [*argv, "--lr", "10"])
        assert code == 1 and "not finite at step" in message and not list(tmp_path.iterdir())
    assert not recwarn.list


@pytest.mark.parametrize(
    "argv, flag", [(["--step", "3", "--layers", "2"], "--layers"), (["--check", "--out", "DIR"], "--out")]
)
def test_a_flag_that_the_chosen_step_does_not_read_is_an_error(argv, flag, capsys):
    assert failure(ladder.main, argv)[0] == 2
    assert f"error: {flag}: " in capsys.readouterr().err.splitlines()[-1]


# ----------------------------------------------------------------------------------------------------------- the bench


def test_the_bench_compares_every_filter_with_that_of_padasip(tmp_path, monkeypatch):
    pytest.importorskip("padasip", reason="padasip is not installed: pip install padasip")
    bench = load("lms", "bench")
    for name, result in bench.contestants(*bench.problem(4, 300)).items():
        weights, errors = result()
        if name.startswith("padasip"):
            reference = weights, errors
        assert np.allclose(errors, reference[1], atol=1e-10) and np.allclose(weights[:300], reference[0], atol=1e-10)
    monkeypatch.setattr(bench, "SAMPLES", {4: 300})
    seconds = {"padasip LMS": [4.0, 4.0, 9.0], "lms": [2.0, 2.0, 3.0], "padasip RLS": [1.0] * 3, "rls": [3.0, 2.0, 2.0]}
    monkeypatch.setattr(bench, "measure", lambda functions, rounds: seconds)
    rows = {row["filter"]: row["final"] for row in bench.main(["--out", str(tmp_path)])}
    assert rows["lms"] == {"samples_per_s": 150, "times_padasip": 2.0}
    assert rows["rls"] == {"samples_per_s": 150, "times_padasip": 0.5}
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert len(rows) == 4 and rows[0]["command"][0] == "lms/bench.py"


def test_the_bench_takes_turns():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = load("lms", "bench").measure(ways, 3)
    assert calls == list("abababab") and [len(values) for values in seconds.values()] == [3, 3]


# -------------------------------------------------------------------------------------------------------- your own CSV

GOOD = "a,b,y\n" + "".join(f"{i % 7},{i * i % 11},{i % 5}\n" for i in range(60))


@pytest.mark.parametrize(
    "text, expected",
    [
        (GOOD + "1,,3\n", "line 62, column 'b': the cell is empty"),
        (GOOD + "1,two,3\n", "line 62, column 'b': 'two' is not a number"),
        (GOOD + "nan,2,3\n", "line 62, column 'a': 'nan' is not a number"),
        (GOOD + "1,2,inf\n", "line 62, column 'y': 'inf' is not a number"),
        (GOOD + "1,2\n", "line 62: has 2 cells for 3 columns"),
        ("a,b,y\n1,2,3\n4,5,7\n", "too few rows (2, of which 1 for training) for 3 weights"),
        ("a,b,y\n", "too few rows (0"),
        ("", "its first line has nothing"),
        ("a;b;y\n1;2;3\n", "no column 'y'"),
        ("y\n" + "1\n" * 30, "at least two columns"),
        ("a,a,y\n" + "1,2,3\n" * 30, "different names"),
        ("a,y\n" + "1,0\n" * 30, "nothing to predict"),
        (GOOD + "1e200,2,1e200\n", "above 1e100"),
    ],
)
def test_a_bad_csv_is_one_line(text, expected, tmp_path):
    path = write(tmp_path / "t.csv", text)
    code, message = failure(train.main, ["--data", path, "--target", "y", "--out", str(tmp_path / "run")])
    assert code == 1 and one_line(message) and "t.csv" in message and expected in message
    assert not (tmp_path / "run").exists()


def test_as_many_rows_as_weights_are_enough(tmp_path):
    path = write(tmp_path / "t.csv", "a,b,y\n1,2,3\n4,5,7\n2,0,1\n5,3,2\n")
    problem = load("lms", "data").load(path, "y")
    assert problem.inputs.shape == (3, 3)


@pytest.mark.parametrize("content", [bytes(range(256)), b"\x89PNG\r\n\x1a\n" + b"\0" * 99])
def test_a_file_that_is_not_text(content, tmp_path):
    (tmp_path / "t.csv").write_bytes(content)
    code, message = failure(train.main, ["--data", str(tmp_path / "t.csv"), "--target", "y"])
    assert code == 1 and one_line(message) and "t.csv: is not a CSV text file" in message


@pytest.mark.slow
def test_a_damaged_csv_trains_or_ends_in_one_line(tmp_path, capsys):
    """Truncations, flipped bits and other bytes in a good file. Every tenth is trained on, the others are only read."""
    file = tmp_path / "t.csv"
    rng = random.Random(0)
    whole = GOOD.encode()
    results = []
    for i in range(400):
        content, at = bytearray(whole), rng.randrange(len(whole))
        change = rng.randrange(4)
        if change == 0:
            del content[at:]
        elif change == 1:
            content[at] ^= 1 << rng.randrange(8)
        elif change == 2:
            content[at : at + rng.randrange(9)] = rng.choice([b"\0", b"e99", b"-", b"\xff", b"\n", b'"', b",", b"$"])
        else:
            content[at : at + rng.randrange(40)] = rng.randbytes(rng.randrange(40))
        file.write_bytes(content)
        argv = ["--recipe", "tiny", "--data", str(file), "--target", "y", "--out", str(tmp_path / f"run{i}")]
        try:
            results.append(train.main(argv)["state"] if i % 10 == 0 else data.from_csv(file, "y").name)
        except run.UserError as error:
            assert one_line(f"error: {error}") and ("t.csv" in str(error) or isinstance(error, run.Diverged))
        assert file.read_bytes() == content
        capsys.readouterr()
    assert "done" in results and 20 < len(results) < 380, "some are refused and some are not"


def test_a_model_of_a_csv_predicts_for_its_rows_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    size, rooms = rng.uniform(50, 150, 200), rng.integers(1, 6, 200)
    price = 1000 * size + 5000 * rooms
    rows = "".join(f"{a!r},{b},{c!r}\n" for a, b, c in zip(size.tolist(), rooms.tolist(), price.tolist()))
    path = write(tmp_path / "houses.csv", "size,rooms,price\n" + rows)
    words = ["--data", path, "--target", "price", "--lr", "0.05", "--epochs", "20", "--out", str(tmp_path / "run")]
    train.main(words)
    house = load("lms", "trained").load(tmp_path / "run")
    assert house.columns == ["size", "rooms", "bias"]
    assert house.predict(np.array([[100, 3, 1]])) == pytest.approx(115_000, rel=1e-3)


def test_a_constant_column_of_a_csv_stays_as_it_is(tmp_path):
    """Of 0.1 in every row, the standard deviation is a rounding error."""
    rows = "".join(f"{i},0.1,{2 * i}\n" for i in range(130))
    problem = data.from_csv(write(tmp_path / "t.csv", "a,rate,y\n" + rows), "y")
    assert problem.std[1] == 1 and np.abs(problem.inputs[:, 1]).max() < 1e-9


@pytest.mark.parametrize(
    "scale", [None, {"mean": [0, 0]}, {"mean": [0, 0, 0], "std": [1, 0, 1]}, {"mean": "x", "std": []}]
)
def test_a_run_on_a_csv_without_its_scale_predicts_nothing(scale, tmp_path):
    folder = tmp_path / "run"
    train.main(["--recipe", "tiny", "--data", write(tmp_path / "t.csv", GOOD), "--target", "y", "--out", str(folder)])
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"scale": scale}))
    code, message = failure(load("lms", "trained").load, folder)
    assert code == 1 and one_line(message) and "scale" in message


@pytest.mark.draws
def test_dependent_inputs_are_reported_and_fitted_with_the_least_norm(tmp_path, capsys, recwarn):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 200))
    table = np.c_[a, b, a + b, np.full(200, 3.0), 2 * a - b + 0.1 * rng.normal(size=200)]
    text = "a,b,sum,constant,y\n" + "".join(",".join(map(repr, row.tolist())) + "\n" for row in table)
    record = train.main(["--data", write(tmp_path / "t.csv", text), "--target", "y", "--out", str(tmp_path / "run")])
    assert "linearly dependent (rank 3 of 5 columns)" in capsys.readouterr().err
    X = data.from_csv(tmp_path / "t.csv", "y").inputs
    assert np.linalg.matrix_rank(X) == 3
    assert np.allclose(record["final"]["weights"], record["final"]["wiener_weights"], atol=0.03)
    assert (tmp_path / "run" / "weights.png").exists() and not recwarn.list


def test_a_csv_without_noise_has_no_misadjustment(tmp_path, recwarn):
    rows = np.random.default_rng(0).normal(size=(100, 2))
    text = "a,b,y\n" + "".join(f"{a!r},{b!r},{a + b!r}\n" for a, b in rows.tolist())
    path = write(tmp_path / "t.csv", text)
    record = train.main(["--recipe", "tiny", "--data", path, "--target", "y", "--out", str(tmp_path / "run")])
    assert record["final"]["misadjustment"] is None and not recwarn.list


@pytest.mark.draws
@pytest.mark.parametrize("draw, names", [("draw_planes", [r"$\frac{$", "$x_1"]), ("draw_weights", ["a^{b", "$$"])])
def test_column_names_are_not_read_as_mathematics(draw, names, tmp_path):
    rows = np.random.default_rng(0).integers(9, size=(40, 3)).tolist()
    text = ",".join([*names, "y"]) + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)
    problem = data.from_csv(write(tmp_path / "t.csv", text), "y")
    assert problem.columns[:2] == names
    fits = {"LMS": np.ones(3), "Wiener": np.zeros(3)}
    run.write_figure(tmp_path / "figure.png", getattr(train, draw)(problem, fits))


def test_a_csv_is_found_again_from_another_directory(tmp_path, monkeypatch, capsys):
    write(tmp_path / "t.csv", GOOD)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    record = train.main(["--recipe", "tiny", "--data", "t.csv", "--target", "y", "--out", "run"])
    monkeypatch.chdir(tmp_path / "elsewhere")
    args = train.parse(["--resume", "../run"])
    assert data.load(args.data, args.target).digest == record["dataset"]["digest"]
    (tmp_path / "t.csv").rename(tmp_path / "moved.csv")
    assert failure(train.parse, ["--resume", "../run"])[0] == 2
    assert "its data is gone" in capsys.readouterr().err.splitlines()[-1]


def test_a_csv_as_spreadsheets_write_it(tmp_path):
    """With a byte order mark, CRLF, and an empty line at the end."""
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode() + b"\r\n")
    problem = data.from_csv(tmp_path / "t.csv", "y")
    assert problem.columns == ["a", "b", "bias"] and len(problem.targets) == 48 and len(problem.val_targets) == 12
    assert np.allclose(problem.inputs.mean(0), [0, 0, 1]) and np.allclose(problem.inputs[:, :2].std(0), 1)


@pytest.mark.parametrize("script", [train, sweep, data])
@pytest.mark.parametrize("argv", [["--data", "builtin", "--target", "y"], ["--data", "TABLE"]])
def test_target_goes_with_a_csv(script, argv, tmp_path, capsys):
    path = write(tmp_path / "t.csv", GOOD)
    code, _ = failure(script.main, [path if word == "TABLE" else word for word in argv])
    assert code == 2 and "--target" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("path", ["", "DIR", "DIR/missing.csv", "x" * 400])
def test_data_is_a_built_in_name_or_a_file(path, tmp_path, capsys):
    argv = ["--data", path.replace("DIR", str(tmp_path)), "--target", "y"]
    assert failure(train.main, argv)[0] == 2
    assert "is neither builtin, fir nor a file" in capsys.readouterr().err.splitlines()[-1]


def test_the_input_of_fir_is_a_coloured_signal_in_a_delay_line():
    problem = data.fir()
    X = np.r_[problem.inputs, problem.val_inputs]
    assert np.array_equal(X[1:, 1:], X[:-1, :-1])
    u = X[:, 0]
    assert u.var() == pytest.approx(1, rel=0.2) and np.mean(u[1:] * u[:-1]) == pytest.approx(0.8 * u.var(), rel=0.05)
    noise = problem.targets - problem.inputs @ problem.true_weights
    assert noise.std() == pytest.approx(0.1, rel=0.05)


# ------------------------------------------------------------------------------------------------- noise cancelling


def write_wav(path, samples, rate=8000):
    """A WAV file of samples (N,) or (N, channels), of their own dtype."""
    wavfile.write(path, rate, samples)
    return path


def tone(n, frequency=440, rate=8000):
    return np.sin(2 * np.pi * frequency * np.arange(n) / rate)


def run_cancel(tmp_path, *argv):
    """(the clean series, what was removed from it) of a call of cancel.py."""
    return cancel.main([*map(str, argv), "--out", str(tmp_path / "out")])


def gain(noisy, clean, truth):
    """By how many decibels the noise fell, over the second half."""
    half = slice(len(truth) // 2, None)
    return 10 * np.log10(np.mean((noisy - truth)[half] ** 2) / np.mean((clean - truth)[half] ** 2))


@pytest.mark.parametrize("argv", [[], ["FILE", "--column", "1", "--reference", "2"]])
def test_a_delay_is_for_a_prediction_from_the_past_alone(argv, tmp_path, capsys):
    file = write_wav(tmp_path / "a.wav", np.stack([tone(64), tone(64)], 1))
    argv = [str(file) if word == "FILE" else word for word in argv]
    assert failure(run_cancel, tmp_path, *argv, "--delay", "3")[0] == 2
    assert "--delay 3: is for a file without a reference" in capsys.readouterr().err


def test_the_past_of_a_series():
    assert cancel.past(np.arange(1.0, 5.0), taps=2, delay=1).tolist() == [[0, 0], [1, 0], [2, 1], [3, 2]]
    assert cancel.past(np.arange(1.0, 4.0), taps=2, delay=0).tolist() == [[1, 0], [2, 1], [3, 2]]


@pytest.mark.parametrize("notes, least", [("E4 G4", 8), pytest.param(None, 24, marks=pytest.mark.slow)])
def test_the_melody_is_heard_again(notes, least, tmp_path, monkeypatch, capsys):
    """The noise falls by more than it was above the melody, as the printed line says."""
    if notes:
        monkeypatch.setattr(series, "NOTES", notes)
    built_in = series.melody()
    clean, removed = run_cancel(tmp_path)
    gained = gain(built_in.values, clean, built_in.clean)
    assert gained > least and f"{gained:.1f} dB gained" in capsys.readouterr().out
    assert np.abs(clean + removed - built_in.values).max() < 1e-12
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"cancel.png", "cancel.json", "cleaned.wav", "removed.wav", "noisy.wav"}
    (row,) = json.loads((tmp_path / "out" / "cancel.json").read_text())["rows"]
    assert row["final"]["gained_db"] == pytest.approx(gained)
    again, _ = run_cancel(tmp_path / "again", tmp_path / "out" / "noisy.wav", "--reference", "2")
    assert gain(built_in.values, again, built_in.clean) == pytest.approx(gained, abs=0.5)  # rounded to 16 bits


def test_a_reference_that_predicts_nothing_is_named():
    values = np.array([0.0, 1.0, 0.0, 1.0])
    recorded = series.Series("a table", values, reference=values[::-1])
    assert "does not predict" in cancel.describe(recorded, 1.1 * values, -0.1 * values)
    assert "3.0 dB removed" in cancel.describe(recorded, values / 2**0.5, values)


def test_a_tone_is_predicted_from_its_own_past(tmp_path, capsys):
    truth = 0.3 * tone(8000)
    noisy = truth + 0.1 * np.random.default_rng(0).normal(size=len(truth))
    write_wav(tmp_path / "tone.wav", noisy.astype(np.float32))
    clean, removed = run_cancel(tmp_path, tmp_path / "tone.wav")
    assert gain(noisy, clean, truth) > 9 and np.abs(clean + removed - noisy).max() < 1e-6
    assert "only if the noise is white" in capsys.readouterr().out
    rate, written = wavfile.read(tmp_path / "out" / "cleaned.wav")
    assert rate == 8000 and np.abs(written / 32767 - np.clip(clean, -1, 1)).max() < 1e-4


def test_a_column_is_cleaned_whatever_the_others_hold(tmp_path):
    rng = np.random.default_rng(0)
    truth = 50 + 10 * tone(400, 1, 12)
    noise = rng.normal(size=(2, 400))
    demand = truth + 5 * noise[0]
    rows = [f"day {i},{value!r},{hum!r},x" for i, (value, hum) in enumerate(zip(demand.tolist(), noise[0].tolist()))]
    file = write(tmp_path / "t.csv", "\n".join(["date,demand,hum,note", *rows]) + "\n")
    alone, _ = run_cancel(tmp_path, file, "--column", "demand")
    with_reference, _ = run_cancel(tmp_path, file, "--column", "demand", "--reference", "hum")
    assert gain(demand, alone, truth) > 5 and gain(demand, with_reference, truth) > 8
    header, *lines = (tmp_path / "out" / "cleaned.csv").read_text().splitlines()
    assert header == "cleaned,removed" and [float(line.split(",")[0]) for line in lines] == with_reference.tolist()


@pytest.mark.parametrize("name, option", [("lms", "--lr"), ("nlms", "--lr"), ("rls", "--forgetting")])
def test_each_filter_is_the_one_of_model_py(name, option, tmp_path, monkeypatch):
    """In chunks, with the weights carried over; RLS in one piece."""
    monkeypatch.setattr(cancel, "CHUNK", 70)
    values = tone(300) + np.random.default_rng(1).normal(size=300)
    d = (values - values.mean()) / values.std()
    settings = {"lms": (0.01,), "nlms": (0.01,), "rls": (0.9, 1.0)}
    _, errors = getattr(model, name)(cancel.past(d, 4, 3), d, *settings[name])
    write_wav(tmp_path / "a.wav", values / 10)
    flags = ["--filter", name, option, settings[name][0], "--taps", 4, "--delay", 3]
    _, removed = run_cancel(tmp_path, tmp_path / "a.wav", *flags)
    assert np.abs(removed - values.std() / 10 * errors).max() < 1e-9


def test_wav_files_of_all_kinds_are_on_one_scale(tmp_path):
    samples = 0.5 * tone(64)
    kinds = {"u1": 128 + 128 * samples, "<i2": 2**15 * samples, "<i4": 2**31 * samples, "<f4": samples, "<f8": samples}
    for kind, values in kinds.items():
        read = series.read_series(write_wav(tmp_path / "a.wav", values.astype(kind)), None, None)
        assert np.abs(read.values - samples).max() < 1 / 64 and read.rate == 8000, kind
    with wave.open(str(tmp_path / "24.wav"), "wb") as file:  # 24 bits, two channels
        file.setparams((2, 3, 44_100, 0, "NONE", ""))
        both = (2**23 * np.stack([samples, -samples / 2], 1)).astype("<i4")
        file.writeframes(b"".join(int(value).to_bytes(3, "little", signed=True) for value in both.flat))
    left = series.read_series(tmp_path / "24.wav", "1", "2")
    assert np.abs(left.values - samples).max() < 1e-6 and np.abs(left.reference + samples / 2).max() < 1e-6
    averaged = series.read_series(tmp_path / "24.wav", None, None)
    assert np.abs(averaged.values - samples / 4).max() < 1e-6 and "2 channels averaged" in averaged.name
    assert np.abs(series.read_series(tmp_path / "24.wav", None, "1").values + samples / 2).max() < 1e-6


def sound(samples):
    content = io.BytesIO()
    wavfile.write(content, 8000, samples)
    return content.getvalue()


REFUSED = {  # what a file holds, and flags: words of the line that refuses it
    "empty": (b"", [], "is empty"),
    "one sample": (b"y\n1\n", [], "need at least 65 samples, and there are 1"),
    "no sample": (b"y\n", [], "there are 0"),
    "one sample of sound": (sound(np.ones(1, np.int16)), [], "there are 1"),
    "no sound": (sound(np.ones(0, np.int16)), [], "holds no samples"),
    "silence": (sound(np.zeros(500, np.int16)), [], "is constant in its second half"),
    "no column named": (b"a,b\n1,2\n", [], "needs --column NAME; its first line has a, b"),
    "another column": (b"a,b\n1,2\n", ["--column", "c"], "has no column 'c'; its first line has a, b"),
    "no series for the reference": (b"a,b\n1,2\n", ["--reference", "b"], "--column"),
    "a gap": (b"a,b\n1,2\nnan,3\n", ["--column", "a"], "line 3, column 'a': 'nan' is not a number"),
    "text": (b"a,b\n1,2\nfoo,3\n", ["--column", "a"], "line 3, column 'a': 'foo' is not a number"),
    "NaN in a sound": (sound(np.full(500, np.nan, np.float32)), [], "sample 0 is not a finite number"),
    "no third channel": (sound(np.ones((500, 2), np.int16)), ["--reference", "3"], "has 2 channels"),
    "a channel by name": (sound(np.ones((500, 2), np.int16)), ["--column", "left"], "has 2 channels"),
    "no channel but the noise": (sound(np.ones(500, np.int16)), ["--reference", "1"], "has no other channel"),
    "MP3": (b"ID3\x03\xff\xfb", [], "is not a CSV text file"),
    "cut short": (sound(np.ones(500, np.int16))[:30], [], "is not a readable WAV file"),
    "large": (b"y\n" + b"1e200\n-1e200\n" * 40, [], "above 1e100"),
    "too large a step": (
        sound((1000 * tone(9000)).astype(np.int16)),
        ["--filter", "lms", "--lr", "1"],
        "the filter diverged at sample",
    ),
    "the step of NLMS": (b"y\n1\n", ["--filter", "nlms", "--lr", "2"], "NLMS is stable below 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_series_that_cannot_be_cleaned_is_one_line(name, tmp_path, capsys):
    content, flags, words = REFUSED[name]
    file = tmp_path / ("a.wav" if content[:4] == b"RIFF" else "a.csv")
    file.write_bytes(content)
    code, message = failure(run_cancel, tmp_path, file, *flags)
    message = message or capsys.readouterr().err.splitlines()[-1]
    assert code in (1, 2) and words in message and "Traceback" not in message
    assert not (tmp_path / "out" / "cancel.png").exists()


def test_the_input_is_never_overwritten(tmp_path):
    file = write_wav(tmp_path / "cleaned.wav", (1000 * tone(500)).astype(np.int16))
    before = file.read_bytes()
    code, message = failure(cancel.main, [str(file), "--out", str(tmp_path)])
    assert code == 1 and "is the input" in message and file.read_bytes() == before


@pytest.mark.slow
def test_a_damaged_wav_is_read_or_refused_in_one_line(tmp_path):
    whole = sound((1000 * tone(200)).astype(np.int16)) + sound(np.ones((40, 2), np.float32))
    file = tmp_path / "a.wav"
    refused = 0
    for content in mutations(whole, random.Random(0), 400):
        file.write_bytes(content)
        try:
            series.read_series(file, None, None)
        except run.UserError as error:
            refused += 1
            assert one_line(f"error: {error}") and "a.wav" in str(error)
    assert 20 < refused < 380
