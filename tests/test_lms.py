"""lms/ against outside truth: padasip step for step, lstsq, autograd, finite differences; its theory against runs."""

import json

import numpy as np
import pytest
import torch

from conftest import failure, load

model, data, ladder = load("lms", "model"), load("lms", "data"), load("lms", "ladder")
sweep, train = load("lms", "sweep"), load("lms")


def problem(taps=5, n=700, seed=0):
    """A filter of `taps` coloured inputs, with noise: (X, d)."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, taps)) @ rng.normal(size=(taps, taps)) / taps
    return X, X @ rng.normal(size=taps) + 0.1 * rng.normal(size=n)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------------------------------------ the filters, outside


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
    """w moves by r times the negative gradient of e^2 / 2, which autograd finds."""
    X, d = problem()
    weights, errors = model.lms(X, d, 0.05)
    for k in (0, 1, 333, 699):
        w = torch.tensor(weights[k], requires_grad=True)
        e = d[k] - torch.from_numpy(X[k]) @ w
        (e**2 / 2).backward()
        assert np.allclose(weights[k + 1], weights[k] - 0.05 * w.grad.numpy(), rtol=0, atol=1e-14)
        assert errors[k] == pytest.approx(e.item(), abs=1e-14)


def test_wiener_is_least_squares():
    X, d = problem(16)
    wiener = model.wiener_solution(X, d)
    by_torch = torch.linalg.lstsq(torch.from_numpy(X), torch.from_numpy(d)[:, None]).solution[:, 0].numpy()
    assert np.allclose(wiener.weights, by_torch, rtol=0, atol=1e-10)
    assert np.abs(X.T @ (d - X @ wiener.weights)).max() < 1e-10  # the orthogonality principle
    assert wiener.rank == 16 and wiener.mse == pytest.approx(np.mean((d - X @ by_torch) ** 2))


def test_wiener_of_a_singular_design_has_the_least_norm():
    X, d = problem(4)
    X = np.c_[X, X[:, 0] + X[:, 1]]
    wiener = model.wiener_solution(X, d)
    assert wiener.rank == 4 and np.allclose(wiener.weights, np.linalg.pinv(X) @ d, atol=1e-10)


@pytest.mark.parametrize("name", ["builtin", "fir"])
def test_rls_that_forgets_nothing_is_wiener(name):
    X, d = data.BUILT_IN[name]().inputs, data.BUILT_IN[name]().targets
    assert np.abs(model.rls(X, d)[0][-1] - model.wiener_solution(X, d).weights).max() < 1e-8


def test_rls_that_forgets_is_weighted_least_squares():
    X, d = problem(6)
    root = np.sqrt(0.98 ** np.arange(len(d))[::-1])
    weighted = np.linalg.lstsq(X * root[:, None], d * root, rcond=None)[0]
    assert np.abs(model.rls(X, d, forgetting=0.98)[0][-1] - weighted).max() < 1e-8


def test_rls_stays_finite_where_rounding_would_blow_it_up():
    """0.99^-20000 is 1e87: what is not symmetric in P to the last bit grows by as much."""
    problem = data.fir(n=25_000)
    weights, _ = model.rls(problem.inputs, problem.targets, forgetting=0.99)
    assert np.linalg.norm(weights[-1] - problem.true_weights) < 0.2


# ------------------------------------------------------------------------------------------- the fast forms, the theory


@pytest.mark.parametrize("block", [1, 7, 32, 64, 1000, None])
def test_blocks_are_exact(block):
    for taps in (1, 2, 32, 100):
        X, d = problem(taps, 333)
        w0 = np.random.default_rng(1).normal(size=taps)
        for fast, slow in zip(model.lms_blocks(X, d, 0.1, w0, block), model.lms(X, d, 0.1, w0)):
            assert np.abs(fast - slow).max() < 1e-12


def test_blocks_diverge_at_the_same_step():
    plane = data.plane()
    with np.errstate(over="ignore", invalid="ignore"):
        steps = [model.diverged_at(f(plane.inputs, plane.targets, 1.0)[1]) for f in (model.lms, model.lms_blocks)]
    assert steps[0] == steps[1] and 100 < steps[0] < 2000


def test_runs_side_by_side_are_the_runs_one_by_one():
    (X0, d0), (X1, d1) = problem(3, 200, seed=0), problem(3, 200, seed=1)
    rates = np.array([0.01, 0.2])
    w, errors = model.lms_runs(np.stack([X0, X1])[:, None], np.stack([d0, d1])[:, None], rates, np.zeros((2, 2, 3)))
    for i, (X, d) in enumerate(((X0, d0), (X1, d1))):
        for j, r in enumerate(rates):
            weights, e = model.lms(X, d, r)
            assert np.abs(errors[i, j] - e).max() < 1e-13 and np.abs(w[i, j] - weights[-1]).max() < 1e-13


def test_a_diverging_run_leaves_the_others_alone(recwarn):
    X, d = problem(3, 300)
    X = X / np.abs(X).max()
    w, errors = model.lms_runs(X, d, np.array([0.1, 1e3]), np.zeros((2, 3)))
    assert model.diverged_at(errors[0]) is None and np.abs(w[0] - model.lms(X, d, 0.1)[0][-1]).max() < 1e-13
    at = model.diverged_at(errors[1])
    assert 0 < at < 300 and np.isfinite(np.sum(errors[1, :at] ** 2))
    assert not recwarn.list, "overflow is a result here, not a warning"


def test_bounds_of_gaussian_inputs_are_the_known_ones():
    """For one Gaussian weight of power s, E[x^4] = 3 s^2: the mean square converges below 2 / (3 s)."""
    X = 2 * np.random.default_rng(0).normal(size=(400_000, 1))
    bounds = model.stability(X)
    assert bounds.mean == pytest.approx(2 / 4, rel=0.01) and bounds.trace == pytest.approx(bounds.mean)
    assert bounds.mean_square == pytest.approx(2 / 12, rel=0.02)
    _, exact = model.misadjustment(X, 0.05)
    assert exact == pytest.approx(0.05 * 4 / (2 - 3 * 0.05 * 4), rel=0.02)


def test_bounds_come_in_order_and_survive_a_singular_design():
    X, _ = problem(4)
    bounds = model.stability(X)
    assert bounds.mean_square < bounds.trace < bounds.mean
    turned = np.c_[X, np.zeros(len(X))]
    assert np.allclose(model.stability(turned), bounds) and np.allclose(
        model.misadjustment(turned, 0.1), model.misadjustment(X, 0.1)
    )
    assert model.stability(np.ones((5, model.MAX_EXACT + 1))).mean_square is None


@pytest.mark.parametrize("r", [0.05, 0.1, 0.2])
def test_exact_misadjustment_is_that_of_independent_draws(r):
    plane, rng = data.plane(), np.random.default_rng(0)
    X, d = plane.inputs, plane.targets
    rows = rng.integers(len(d), size=(400, 1500))  # 400 runs of independent draws
    _, errors = model.lms_runs(X[rows], d[rows], np.full(400, r), np.zeros((400, 3)))
    measured = np.mean(errors[:, 300:] ** 2) / model.wiener_solution(X, d).mse - 1
    textbook, exact = model.misadjustment(X, r)
    assert measured == pytest.approx(exact, rel=0.05)
    assert r < 0.2 or measured > 1.2 * textbook  # the textbook's formula is for small steps


def test_beyond_the_exact_bound_there_is_no_misadjustment():
    X = data.plane().inputs
    bounds = model.stability(X)
    assert model.misadjustment(X, 0.99 * bounds.mean_square)[1] > 10
    assert model.misadjustment(X, 1.01 * bounds.mean_square)[1] is None
    assert model.misadjustment(X, 1.01 * bounds.trace) == (None, None)


# -------------------------------------------------------------------------------------------------------------- scripts


def test_lms_lands_within_the_predicted_misadjustment(tmp_path):
    final = train.main(["--out", str(tmp_path / "run")])["final"]
    floor, predicted = final["wiener_mse"], final["misadjustment_exact"]
    assert floor < final["train_mse"] and floor < final["apriori_mse_late"]
    assert final["misadjustment"] == pytest.approx(predicted, rel=0.35)  # epochs are shuffles, not independent draws
    assert np.allclose(final["weights"], data.PLANE, atol=0.1)
    assert {"learning.png", "planes.png"} <= {f.name for f in (tmp_path / "run").iterdir()}


def test_over_many_runs_the_weights_stay_within_the_predicted_misadjustment():
    plane = data.plane()
    X, d, floor = plane.inputs, plane.targets, model.wiener_solution(plane.inputs, plane.targets).mse
    rows = np.stack([np.random.default_rng(seed).permutation(len(d)) for seed in range(100)])
    w = np.zeros((100, 3))
    for r in (0.05, 0.005):  # a fast start, then the step in question
        w, _ = model.lms_runs(X[rows], d[rows], np.full(100, r), w)
    excess = np.mean([train.mse(X, d, one) for one in w]) / floor - 1
    assert 0.3 * model.misadjustment(X, 0.005)[1] < excess < model.misadjustment(X, 0.005)[1]


def test_a_diverged_run_says_where(tmp_path):
    code, message = failure(train.main, ["--lr", "1", "--out", str(tmp_path / "run")])
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert code == 1 and record["state"] == "diverged" and f"step {record['diverged_at_step']}" in message


def test_a_row_of_the_sweep_is_a_run_of_train(tmp_path):
    """Also where a run diverges after its first epoch."""
    rates = ["0.02", "0.75"]
    sweep.main(["--study", "rates", "--seeds", "2", "--epochs", "6", "--lr", *rates, "--out", str(tmp_path / "sweep")])
    rows = json.loads((tmp_path / "sweep" / "rates.json").read_text())["rows"]
    final = train.main(["--lr", rates[0], "--seed", "1", "--epochs", "6", "--out", str(tmp_path / "run")])["final"]
    (row,) = [row for row in rows if row["lr"] == 0.02 and row["seed"] == 1]
    assert row["final"]["misadjustment"] == pytest.approx(final["misadjustment"], rel=1e-9)
    assert row["final"]["train_mse"] == pytest.approx(final["train_mse"], rel=1e-9)
    (row,) = [row for row in rows if row["lr"] == 0.75 and row["seed"] == 1]
    assert row["diverged_at_step"] > 2000
    failure(train.main, ["--lr", rates[1], "--seed", "1", "--epochs", "6", "--out", str(tmp_path / "lost")])
    assert json.loads((tmp_path / "lost" / "run.json").read_text())["diverged_at_step"] == row["diverged_at_step"]


def test_the_sweep_is_silent_and_says_what_diverged(tmp_path, capsys, recwarn):
    sweep.main(["--seeds", "2", "--epochs", "4", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "rates.json").read_text())["rows"]
    states = {row["lr"]: row["state"] for row in rows}
    assert states[1.0] == "diverged" and all(states[lr] == "done" for lr in (0.005, 0.01, 0.05, 0.1))
    for row in rows:
        if row["lr"] == 0.1:
            assert row["final"]["misadjustment"] == pytest.approx(row["final"]["misadjustment_exact"], rel=0.25)
    by_filter = {}
    for row in json.loads((tmp_path / "filters.json").read_text())["rows"]:
        by_filter.setdefault(row["setting"], []).append(row["misalignment_db"]["after"])
    ends = {name: np.mean(values) for name, values in by_filter.items()}
    assert ends.pop("RLS, forgetting 1") > -10 and max(ends.values()) < -20
    assert "diverged, at step" in capsys.readouterr().out
    assert not [w for w in recwarn.list if issubclass(w.category, RuntimeWarning)]


# ----------------------------------------------------------------------------------------------------------- the ladder


def options(*argv):
    return ladder.parser().parse_args(list(argv))


@pytest.mark.parametrize("layers", [1, 3])
def test_gradients_by_hand(layers):
    steps = []
    for step, params, by_hand, loss in ladder.gradient_cases(np.random.default_rng(5), layers):
        leaves = [p.clone().requires_grad_() for p in params]
        value = loss(leaves)
        found, gradients = by_hand(params)
        assert float(found) == pytest.approx(value.item(), rel=1e-12)
        for mine, autograd in zip(gradients, torch.autograd.grad(value, leaves)):
            assert np.shape(mine) == autograd.shape
            assert ladder.relative_error([mine], [autograd]) < 1e-6
        assert ladder.relative_error(gradients, ladder.finite_differences(by_hand, params)) < 1e-6
        steps.append(step)
    assert steps == [1, 3, 4, 5]


def test_the_check_flag_finds_a_wrong_gradient(monkeypatch, capsys):
    ladder.main(["--check", "--iters", "20"])
    assert capsys.readouterr().out.count("relative error") == 10
    right = ladder.gradients_classes

    def wrong(*args):
        loss, (dW, db) = right(*args)
        return loss, (2 * dW, db)

    monkeypatch.setattr(ladder, "gradients_classes", wrong)
    code, message = failure(ladder.main, ["--check", "--iters", "20"])
    assert code == 1 and "step 4 against autograd" in message and "step 3" not in message


@pytest.mark.parametrize("a, b", [(1, 2), (5, 6)])
def test_steps_that_should_coincide_do(a, b):
    args = options("--iters", "150", "--seed", "3", "--layers", "3")
    (losses_a, found_a, _), (losses_b, found_b, _) = ladder.STEPS[a](args), ladder.STEPS[b](args)
    assert len(losses_a) == 150 and np.allclose(losses_a, losses_b, rtol=1e-10, atol=0)
    for name in found_a:
        assert np.allclose(found_a[name], found_b[name], rtol=1e-10)


def test_log_likelihood_of_enormous_logits_is_finite(recwarn):
    X, labels = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 0])
    W = np.array([[5000.0, 0.0, -5000.0], [0.0, 1000.0, 0.0]])
    loss, (dW, _) = ladder.gradients_classes(W, np.zeros(3), X, labels)
    assert loss == pytest.approx(500.0) and np.isfinite(dW).all() and not recwarn.list


@pytest.mark.parametrize("step, tolerance", [(1, 0.03), (3, 0.03), (4, 0.2), (5, 0.12)])
def test_the_ladder_recovers_the_truth(step, tolerance, tmp_path):
    ladder.main(["--step", str(step), "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / f"step{step}.json").read_text())["rows"]
    assert row["final"]["largest_error"] < tolerance and (tmp_path / f"step{step}.png").exists()


# ------------------------------------------------------------------------------------------------------------ bad input

GOOD = "a,b,y\n" + "".join(f"{i % 7},{i * i % 11},{i % 5}\n" for i in range(60))


@pytest.mark.parametrize(
    "text, said",
    [
        (GOOD + "1,,3\n", "line 62, column 'b': the cell is empty"),
        (GOOD + "1,two,3\n", "line 62, column 'b': 'two' is no number"),
        (GOOD + "nan,2,3\n", "line 62, column 'a': 'nan' is no number"),
        (GOOD + "1,2,inf\n", "line 62, column 'y': 'inf' is no number"),
        (GOOD + "1,2\n", "line 62: 2 cells for 3 columns"),
        ("a,b,y\n1,2,3\n4,5,7\n", "2 rows"),
        ("a,b,y\n", "0 rows"),
        ("", "names none"),
        ("a;b;y\n1;2;3\n", "no column 'y'"),
        ("y\n" + "1\n" * 30, "two columns or more"),
        ("a,a,y\n" + "1,2,3\n" * 30, "a name of its own"),
        (GOOD + "1e200,2,1e200\n", "overflow"),
    ],
)
def test_a_bad_csv_is_one_clear_line(text, said, tmp_path):
    path = write(tmp_path / "t.csv", text)
    code, message = failure(train.main, ["--data", path, "--target", "y", "--out", str(tmp_path / "run")])
    assert code == 1 and message.startswith("error: ") and "t.csv" in message and said in message
    assert "\n" not in message and not (tmp_path / "run").exists()


def test_a_csv_that_is_no_text(tmp_path):
    for content in (bytes(range(256)), b"\x89PNG\r\n\x1a\n" + b"\0" * 99):
        (tmp_path / "t.csv").write_bytes(content)
        code, message = failure(train.main, ["--data", str(tmp_path / "t.csv"), "--target", "y"])
        assert code == 1 and "t.csv" in message and "\n" not in message


def test_a_singular_design_is_said_and_fitted_by_least_norm(tmp_path, capsys, recwarn):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 200))
    table = np.c_[a, b, a + b, np.full(200, 3.0), 2 * a - b + 0.1 * rng.normal(size=200)]
    text = "a,b,sum,constant,y\n" + "".join(",".join(map(repr, row.tolist())) + "\n" for row in table)
    record = train.main(["--data", write(tmp_path / "t.csv", text), "--target", "y", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err.strip().splitlines()
    assert any("linearly dependent (rank 3 of 5 columns)" in line for line in said)
    X = data.from_csv(tmp_path / "t.csv", "y").inputs
    assert np.linalg.matrix_rank(X) == 3
    assert np.allclose(record["final"]["weights"], record["final"]["wiener_weights"], atol=0.03)
    assert (tmp_path / "run" / "weights.png").exists() and not recwarn.list


def test_a_csv_without_noise_has_no_misadjustment(tmp_path, recwarn):
    rows = np.random.default_rng(0).normal(size=(100, 2))
    text = "a,b,y\n" + "".join(f"{a!r},{b!r},{a + b!r}\n" for a, b in rows.tolist())
    record = train.main(["--data", write(tmp_path / "t.csv", text), "--target", "y", "--out", str(tmp_path / "run")])
    assert record["final"]["misadjustment"] is None and not recwarn.list


def test_a_csv_is_found_from_any_directory_and_read_as_spreadsheets_write_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode() + b"\r\n")
    problem = data.from_csv("t.csv", "y")
    assert problem.columns == ["a", "b", "bias"] and len(problem.targets) == 48 and len(problem.val_targets) == 12
    assert np.allclose(problem.inputs.mean(0), [0, 0, 1]) and np.allclose(problem.inputs[:, :2].std(0), 1)


@pytest.mark.parametrize("argv", [["--data", "builtin", "--target", "y"], ["--data", "TABLE"]])
def test_target_belongs_to_a_csv(argv, tmp_path, capsys):
    path = write(tmp_path / "t.csv", GOOD)
    code, _ = failure(train.main, [path if word == "TABLE" else word for word in argv])
    assert code == 2 and "--target" in capsys.readouterr().err.splitlines()[-1]


def test_the_fir_input_is_what_it_says():
    problem = data.fir()
    X = np.r_[problem.inputs, problem.val_inputs]
    assert np.array_equal(X[1:, 1:], X[:-1, :-1])  # the delay line
    u = X[:, 0]
    assert u.var() == pytest.approx(1, rel=0.2) and np.mean(u[1:] * u[:-1]) == pytest.approx(0.8 * u.var(), rel=0.05)
    noise = problem.targets - problem.inputs @ problem.true_weights
    assert noise.std() == pytest.approx(0.1, rel=0.05)
