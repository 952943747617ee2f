"""Gradient descent in six steps, with less and less written by hand: from two numbers in NumPy to torch.nn.

    python lms/ladder.py                     # all six steps, some seconds; their losses and what they recovered
    python lms/ladder.py --step 4            # one of them
    python lms/ladder.py --check             # every gradient by hand against autograd and finite differences

Each step is one function that can be read by itself; its docstring says what is new. All of them fit y = f(x) on
synthetic data, with mini-batches of --bs rows for --iters steps. Writes ladder.json and ladder.png (with --step N:
stepN.json and stepN.png) into --out.
"""

from dataclasses import dataclass

from common import run
from common.options import option

import matplotlib.figure
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sweep import rounded, write_study

WIDTH = 16  # units of a hidden layer in steps 5 and 6
CLASSES = 3
POINTS = np.linspace(-0.8, 0.8, 5)  # where the functions of steps 5 and 6 are compared with the true one


# --------------------------------------------------------------------------------------------------------------- data


def line(rng, n=1000):
    """x (n,), y (n,) = 3 x - 1 + noise of standard deviation 0.1, and the truth."""
    x = rng.uniform(-1, 1, n)
    return x, 3 * x - 1 + 0.1 * rng.normal(size=n), {"w": 3.0, "b": -1.0}


def hyperplane(rng, n=1000):
    """X (n, 4), y (n,) = X w + b + noise of standard deviation 0.1, and the truth."""
    X = rng.normal(size=(n, 4))
    w = np.array([2.0, -1.0, 0.5, 0.0])
    b = 1.5
    return X, X @ w + b + 0.1 * rng.normal(size=n), {"w": w, "b": b}


def classes(rng, n=4000):
    """X (n, 2) and labels (n,) sampled from softmax(X W + b), and the truth.

    The labels determine W and b only up to a constant over the classes. Here both have mean zero over the classes, and
    gradient descent from zero keeps it so.
    """
    W, b = np.array([[2.0, -1.0, -1.0], [0.0, 2.0, -2.0]]), np.array([0.5, 0.0, -0.5])
    X = rng.normal(size=(n, 2))
    gumbel = rng.gumbel(size=(n, CLASSES))  # the argmax of logits + Gumbel noise is a sample of their softmax
    return X, (X @ W + b + gumbel).argmax(1), {"W": W, "b": b}


def wave(rng, n=1000):
    """X (n, 1), Y (n, 1) = sin(4 x) + x + noise of standard deviation 0.05, and the truth at POINTS."""
    X = rng.uniform(-1, 1, (n, 1))
    return X, np.sin(4 * X) + X + 0.05 * rng.normal(size=(n, 1)), {"f": np.sin(4 * POINTS) + POINTS}


def minibatches(rng, n, bs, iters):
    """Yield `iters` index arrays of at most `bs` rows: epochs over n rows, each in a new random order."""
    while True:
        order = rng.permutation(n)
        for first in range(0, n, bs):
            if iters == 0:
                return
            iters -= 1
            yield order[first : first + bs]


# ----------------------------------------------------------------------------------------------------------- six steps
# Each step returns (the loss of every iteration, the recovered parameters, the true ones).


def gradients_line(w, b, x, y):
    """(loss, gradients) for loss = mean((w x + b - y)^2): d loss / d w = mean(2 (w x + b - y) x)."""
    error = w * x + b - y  # (B,)
    return np.mean(error**2), (np.mean(2 * error * x), np.mean(2 * error))


def step_1(args):
    """From scalar to scalar: mini-batch gradient descent in NumPy, with the two derivatives by hand."""
    rng = np.random.default_rng(args.seed)
    x, y, truth = line(rng)
    w = 0.0
    b = 0.0
    losses = []
    for rows in minibatches(rng, len(x), args.bs, args.iters):
        loss, (dw, db) = gradients_line(w, b, x[rows], y[rows])
        w -= args.lr * dw
        b -= args.lr * db
        losses.append(loss)
    return losses, {"w": w, "b": b}, truth


def step_2(args):
    """The same in PyTorch: backward() computes the derivatives. The results equal step 1's."""
    rng = np.random.default_rng(args.seed)
    x, y, truth = line(rng)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    w, b = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    losses = []
    for rows in minibatches(rng, len(x), args.bs, args.iters):
        loss = torch.mean((w * x[rows] + b - y[rows]) ** 2)
        loss.backward()
        with torch.no_grad():  # autograd must not record the update
            for p in (w, b):
                p -= args.lr * p.grad
                p.grad = None  # otherwise the next backward() adds to it
        losses.append(loss.item())
    return losses, {"w": w.item(), "b": b.item()}, truth


def gradients_hyperplane(w, b, X, y):
    """(loss, gradients): the sum over rows of error times input is the matrix product X' error."""
    error = X @ w + b - y  # (B, 4) @ (4,) -> (B,)
    return np.mean(error**2), (2 * X.T @ error / len(y), 2 * np.mean(error))


def step_3(args):
    """From vector to scalar: the weight is a vector, and its derivative is a matrix product.

    With mini-batches of one row, without a bias, and with r = 2 lr, this is LMS.
    """
    rng = np.random.default_rng(args.seed)
    X, y, truth = hyperplane(rng)
    w = np.zeros(X.shape[1])
    b = 0.0
    losses = []
    for rows in minibatches(rng, len(X), args.bs, args.iters):
        loss, (dw, db) = gradients_hyperplane(w, b, X[rows], y[rows])
        w -= args.lr * dw
        b -= args.lr * db
        losses.append(loss)
    return losses, {"w": w, "b": b}, truth


def gradients_classes(W, b, X, labels):
    """(loss, gradients) of softmax with negative log-likelihood of logits z: loss = mean(log sum_j exp z_j - z_label).

    exp overflows above z = 709. Subtracting the largest logit from all of them avoids that and changes no result.
    d loss / d z = (softmax(z) - onehot(label)) / B: prediction minus target, as in regression.
    """
    logits = X @ W + b  # (B, 2) @ (2, 3) -> (B, 3)
    logits = logits - logits.max(1, keepdims=True)
    log_sum = np.log(np.exp(logits).sum(1))  # (B,)
    rows = np.arange(len(labels))
    loss = np.mean(log_sum - logits[rows, labels])
    dlogits = np.exp(logits - log_sum[:, None])  # softmax, (B, 3)
    dlogits[rows, labels] -= 1
    dlogits /= len(labels)
    return loss, (X.T @ dlogits, dlogits.sum(0))


def step_4(args):
    """Classification: from a vector to the probabilities of three classes."""
    rng = np.random.default_rng(args.seed)
    X, labels, truth = classes(rng)
    W = np.zeros((X.shape[1], CLASSES))
    b = np.zeros(CLASSES)
    losses = []
    for rows in minibatches(rng, len(X), args.bs, args.iters):
        loss, (dW, db) = gradients_classes(W, b, X[rows], labels[rows])
        W -= args.lr * dW
        b -= args.lr * db
        losses.append(loss)
    return losses, {"W": W, "b": b}, truth


def initial_parameters(seed, layers):
    """Weights (out, in) and biases (out,) of `layers` tanh layers and a linear one, as [weight, bias, weight, ...]."""
    rng, sizes = np.random.default_rng(seed), [1] + [WIDTH] * layers + [1]
    return [
        torch.from_numpy(rng.normal(size=shape) * scale)
        for i, o in zip(sizes, sizes[1:])
        for shape, scale in (((o, i), np.sqrt(1 / i)), ((o,), 0.5))
    ]


def forward(params, X):
    """The activations of every layer, [X, tanh(...), ..., output], each (B, width)."""
    activations = [X]
    for i in range(0, len(params), 2):
        z = activations[-1] @ params[i].T + params[i + 1]  # (B, in) @ (in, out) -> (B, out)
        activations.append(torch.tanh(z) if i + 2 < len(params) else z)
    return activations


def gradients_layers(params, X, Y):
    """(loss, gradients) by backpropagation through any number of layers.

    From the last layer to the first, the derivative with respect to a layer's output gives those with respect to its
    weights, its bias, and its input.
    """
    activations = forward(params, X)
    error = activations[-1] - Y  # (B, 1)
    dz, gradients = 2 * error / error.numel(), []
    for i in reversed(range(0, len(params), 2)):
        a = activations[i // 2]  # the input of this layer, (B, in)
        gradients = [dz.T @ a, dz.sum(0), *gradients]  # (out, B) @ (B, in) -> (out, in); (out,)
        if i > 0:
            dz = dz @ params[i] * (1 - a**2)  # (B, out) @ (out, in); tanh' = 1 - tanh^2
    return (error**2).mean(), gradients


def step_5(args):
    """A network with --layers hidden layers: plain tensors, and backpropagation by hand."""
    rng = np.random.default_rng(args.seed)
    X, Y, truth = wave(rng)
    X, Y = torch.from_numpy(X), torch.from_numpy(Y)
    params, losses = initial_parameters(args.seed + 1, args.layers), []
    for rows in minibatches(rng, len(X), args.bs, args.iters):
        loss, gradients = gradients_layers(params, X[rows], Y[rows])
        for p, g in zip(params, gradients):
            p -= args.lr * g
        losses.append(loss.item())
    return losses, {"f": forward(params, torch.from_numpy(POINTS)[:, None])[-1][:, 0].numpy()}, truth


def step_6(args):
    """The same network with torch.nn, torch.nn.functional and torch.optim. The results equal step 5's."""
    rng = np.random.default_rng(args.seed)
    X, Y, truth = wave(rng)
    X, Y = torch.from_numpy(X), torch.from_numpy(Y)
    sizes = [1] + [WIDTH] * args.layers + [1]
    layers = [module for i, o in zip(sizes, sizes[1:]) for module in (nn.Linear(i, o), nn.Tanh())][:-1]
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for p, initial in zip(model.parameters(), initial_parameters(args.seed + 1, args.layers)):
            p.copy_(initial)
    optimizer = torch.optim.SGD(model.parameters(), args.lr)
    losses = []
    for rows in minibatches(rng, len(X), args.bs, args.iters):
        loss = F.mse_loss(model(X[rows]), Y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {"f": model(torch.from_numpy(POINTS)[:, None]).detach()[:, 0].numpy()}, truth


STEPS = {1: step_1, 2: step_2, 3: step_3, 4: step_4, 5: step_5, 6: step_6}


def run_step(step, args):
    """The result of a step. Raises run.Diverged."""
    with np.errstate(over="ignore", invalid="ignore"):  # the next line checks for divergence
        losses, found, truth = STEPS[step](args)
    if len(bad := np.flatnonzero(~np.isfinite(losses))):
        raise run.Diverged(int(bad[0]))
    return losses, found, truth


# ------------------------------------------------------------------------------------------------------------ checks


def gradient_cases(rng, layers):
    """Yield (step, parameters, by_hand, loss) for the four steps with gradients by hand.

    parameters: float64 tensors with random values. by_hand(parameters) returns (loss, gradients). loss(parameters) is
    written independently in torch, for autograd.
    """

    def random(*shapes):
        return [torch.from_numpy(np.asarray(rng.normal(size=shape))) for shape in shapes]

    def case(step, shapes, gradients, loss, x, y):
        tensors = torch.from_numpy(x), torch.from_numpy(y)

        def by_hand(p):
            return gradients(*(tensor.numpy() for tensor in p), x, y)

        return step, random(*shapes), by_hand, lambda p: loss(*p, *tensors)

    x, y, _ = line(rng, 50)
    yield case(1, [(), ()], gradients_line, lambda w, b, x, y: F.mse_loss(w * x + b, y), x, y)
    X, y, _ = hyperplane(rng, 50)
    yield case(3, [4, ()], gradients_hyperplane, lambda w, b, X, y: F.mse_loss(X @ w + b, y), X, y)
    X, labels, _ = classes(rng, 50)
    shapes = [(2, CLASSES), CLASSES]
    yield case(4, shapes, gradients_classes, lambda W, b, X, y: F.cross_entropy(X @ W + b, y), X, labels)
    X, Y = (torch.from_numpy(array) for array in wave(rng, 50)[:2])

    def network(p):
        h = X
        for i, (W, b) in enumerate(zip(p[::2], p[1::2])):
            h = F.linear(h if i == 0 else h.tanh(), W, b)
        return F.mse_loss(h, Y)

    shapes = [p.shape for p in initial_parameters(0, layers)]
    yield 5, random(*shapes), lambda p: gradients_layers(p, X, Y), network


def finite_differences(by_hand, params, h=1e-5):
    """The gradients (loss(p + h) - loss(p - h)) / 2h for every entry of `params`."""

    def loss():
        return float(by_hand(params)[0])

    gradients = [torch.empty_like(p) for p in params]
    for p, g in zip(params, gradients):
        flat, out = p.view(-1), g.view(-1)
        for i in range(len(flat)):
            old = flat[i].item()
            flat[i] = old + h
            upper = loss()
            flat[i] = old - h
            out[i] = (upper - loss()) / (2 * h)
            flat[i] = old
    return gradients


def relative_error(values, reference):
    """||values - reference|| / ||reference|| over all arrays of two lists."""
    values, reference = (np.concatenate([np.ravel(array) for array in arrays]) for arrays in (values, reference))
    return float(np.linalg.norm(values - reference) / np.linalg.norm(reference))


def check(args):
    """Print the relative error of every gradient by hand against autograd and finite differences, and that between
    steps with equal results. Raises UserError if one is above 1e-6."""
    errors = {}
    for step, params, by_hand, loss in gradient_cases(np.random.default_rng(args.seed), args.layers):
        hand = by_hand(params)[1]
        leaves = [p.clone().requires_grad_() for p in params]
        errors[f"step {step} against autograd"] = relative_error(hand, torch.autograd.grad(loss(leaves), leaves))
        numeric = finite_differences(by_hand, params)
        errors[f"step {step} against finite differences"] = relative_error(hand, numeric)
    for a, b in ((1, 2), (5, 6)):
        errors[f"losses of step {a} against step {b}"] = relative_error(run_step(a, args)[0], run_step(b, args)[0])
    for name, error in errors.items():
        print(f"{name:38} relative error {error:.1e}")
    if wrong := [name for name, error in errors.items() if not error < 1e-6]:
        raise run.UserError("a relative error above 1e-6: " + "; ".join(wrong))


# --------------------------------------------------------------------------------------------------------------- main


def block_means(losses: list[float]) -> list[float]:
    """The losses as about a hundred means of successive iterations, to four significant digits: a curve to draw."""
    size = max(1, len(losses) // 100)
    blocks = np.reshape(losses[: len(losses) // size * size], (-1, size))
    return rounded(blocks.mean(1))


def tasks_of(rows: list[dict]) -> list[list[dict]]:
    """The steps that fit the same data, together: 1 and 2, 5 and 6."""
    tasks = []
    for row in rows:
        if tasks and tasks[-1][0]["final"]["true"] == row["final"]["true"]:
            tasks[-1].append(row)
        else:
            tasks.append([row])
    return tasks


def draw(record):
    """A column for each task: the losses of its steps, and below them what they recovered beside the truth."""
    tasks = tasks_of(record["rows"])
    figure = matplotlib.figure.Figure(figsize=(max(4, 2.25 * len(tasks)), 5), layout="constrained")
    for rows, (upper, lower) in zip(tasks, figure.subplots(2, len(tasks), squeeze=False).T):
        for row, style, marker in zip(rows, ("-", "--"), ("x", "+")):
            curve = row["curve"]
            iterations = (np.arange(len(curve)) + 0.5) * row["args"]["iters"] / len(curve)
            upper.plot(iterations, curve, style, lw=1.5, label=row["setting"])
            true = np.concatenate([np.ravel(values) for values in row["final"]["true"].values()])
            found = np.concatenate([np.ravel(values) for values in row["final"]["found"].values()])
            lower.plot(found, marker, ms=9, mew=1.5, label=row["setting"])
        lower.bar(np.arange(len(true)), true, 0.8, color="0.8", label="truth")
        names = []
        for name, values in rows[0]["final"]["true"].items():
            numbered = [f"{name}{i}" for i in range(np.size(values))]
            names += numbered if len(numbered) > 1 else [name]
        lower.set_xticks(np.arange(len(true)), names, rotation=90 if len(names) > 5 else 0)
        scale = "log" if max(curve) > 10 * min(curve) else "linear"
        upper.set(title=" and ".join(row["setting"] for row in rows), xlabel="iteration", ylabel="loss", yscale=scale)
        upper.grid(alpha=0.3)
        for axes in (upper, lower):
            axes.legend(fontsize=8)
        lower.set(xlabel="parameter" if names[0] != "f0" else "point")
    return figure


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    step: int | None = option(None, "only this step; none: all six", choices=list(STEPS), metavar="{1,...,6}")
    check_gradients: bool = option(False, "check the gradients; writes no files", names=["--check"])
    layers: int = option(2, "hidden layers in steps 5 and 6", above=0, at_most=1000)
    iters: int = option(2000, "mini-batches of each step", above=0)
    bs: int = option(32, "rows of a mini-batch", above=0)
    lr: float = option(0.1, "learning rate", above=0)
    seed: int = option(0, "data, order and initial weights", at_least=0)
    out: str = option(str(run.ROOT / "out/lms/ladder"), "folder of record and figure", type=run.path_arg, metavar="DIR")


def recipe(given: dict) -> Options:
    """The defaults. Raises UserError for a flag that the others leave unused."""
    if "layers" in given and given.get("step") in (1, 2, 3, 4):
        raise run.UserError(f"--layers: step {given['step']} has no hidden layers")
    if given.get("check_gradients"):
        for name, reason in (("out", "writes no files"), ("step", "is of all steps")):
            if name in given:
                raise run.UserError(f"--{name}: --check {reason}")
    return Options()


def main(argv=None):
    args = run.parse_options(__file__, Options, argv, recipe)
    run.set_threads(auto_threads=1)
    if args.check_gradients:
        return check(args)
    out = run.make_folder(args.out)
    rows = []
    for step in [args.step] if args.step else STEPS:
        losses, found, truth = run_step(step, args)
        loss = float(np.mean(losses[-100:]))
        print(f"step {step}: {STEPS[step].__doc__.splitlines()[0]}\n  loss {losses[0]:.4f} -> {loss:.4f}")
        for name in truth:
            print(f"  {name}: recovered {np.round(found[name], 3)}, true {np.round(truth[name], 3)}".replace("\n", ""))
        error = max(float(np.abs(found[name] - truth[name]).max()) for name in truth)
        as_lists = ({name: np.asarray(value).tolist() for name, value in values.items()} for values in (found, truth))
        final = {"loss": loss} | dict(zip(("found", "true"), as_lists)) | {"largest_error": error}
        rows.append(
            {
                "study": "ladder",
                "setting": f"step {step}",
                "seed": args.seed,
                "state": "done",
                "args": {name: getattr(args, name) for name in ("iters", "bs", "lr", "layers")},
                "curve": block_means(losses),
                "final": final,
            }
        )
    write_study(__file__, out, f"step{args.step}" if args.step else "ladder", rows, draw)


if __name__ == "__main__":
    run.cli(main)
