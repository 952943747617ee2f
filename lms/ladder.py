"""Gradient descent six times, with less and less of it written by hand: from two numbers in NumPy to torch.nn.

    python lms/ladder.py                     # all six steps, some seconds; their curves and what they recovered
    python lms/ladder.py --step 4            # one of them
    python lms/ladder.py --check             # every hand-written gradient against autograd and finite differences

Each step is a function to be read by itself, and says what is new in it. All fit y = f(x) on data made up here, with
minibatches of --bs rows for --iters steps. Leaves ladder.json and ladder.png (or stepN.json, stepN.png) in --out.
"""

import argparse

import matplotlib.figure
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import run
from sweep import write_study

WIDTH = 16  # of the hidden layers of steps 5 and 6
CLASSES = 3


# ------------------------------------------------------------------------------------ data, the same for the steps


def line(rng, n=1000):
    """x (n,), y (n,) = 3 x - 1 + noise of deviation 0.1, and the truth."""
    x = rng.uniform(-1, 1, n)
    return x, 3 * x - 1 + 0.1 * rng.normal(size=n), {"w": 3.0, "b": -1.0}


def hyperplane(rng, n=1000):
    """X (n, 4), y (n,) = X w + b + noise of deviation 0.1, and the truth."""
    X, w, b = rng.normal(size=(n, 4)), np.array([2.0, -1.0, 0.5, 0.0]), 1.5
    return X, X @ w + b + 0.1 * rng.normal(size=n), {"w": w, "b": b}


def classes(rng, n=4000):
    """X (n, 2) and labels (n,) drawn from softmax(X W + b), and the truth. Only differences between classes show in
    the labels; W and b have mean zero over the classes, and so have those that gradient descent finds from zero."""
    W, b = np.array([[2.0, -1.0, -1.0], [0.0, 2.0, -2.0]]), np.array([0.5, 0.0, -0.5])
    X = rng.normal(size=(n, 2))
    gumbel = rng.gumbel(size=(n, CLASSES))  # the largest of logits + Gumbel noise is a draw from their softmax
    return X, (X @ W + b + gumbel).argmax(1), {"W": W, "b": b}


def wave(rng, n=1000):
    """X (n, 1), Y (n, 1) = sin(4 x) + x + noise of deviation 0.05, and the truth at five places."""
    X, at = rng.uniform(-1, 1, (n, 1)), np.linspace(-0.8, 0.8, 5)
    return X, np.sin(4 * X) + X + 0.05 * rng.normal(size=(n, 1)), {"f": np.sin(4 * at) + at}


def minibatches(rng, n, bs, iters):
    """`iters` index arrays of `bs` rows or fewer: shuffled passes over n rows."""
    while True:
        order = rng.permutation(n)
        for first in range(0, n, bs):
            if iters == 0:
                return
            iters -= 1
            yield order[first : first + bs]


# ---------------------------------------------------------------------------------------------------- the six steps
# Each returns (the loss of every step, what it recovered, the truth).


def gradients_line(w, b, x, y):
    """Backpropagation by hand. loss = mean((w x + b - y)^2), so d loss / d w = mean(2 (w x + b - y) x)."""
    error = w * x + b - y  # (B,)
    return np.mean(error**2), (np.mean(2 * error * x), np.mean(2 * error))


def step_1(args):
    """Scalar to scalar: minibatch gradient descent in NumPy, the two derivatives by hand."""
    rng = np.random.default_rng(args.seed)
    x, y, truth = line(rng)
    w, b, losses = 0.0, 0.0, []
    for rows in minibatches(rng, len(x), args.bs, args.iters):
        loss, (dw, db) = gradients_line(w, b, x[rows], y[rows])
        w -= args.lr * dw
        b -= args.lr * db
        losses.append(loss)
    return losses, {"w": w, "b": b}, truth


def step_2(args):
    """The same in PyTorch: backward() finds the derivatives. The same numbers come out as in step 1."""
    rng = np.random.default_rng(args.seed)
    x, y, truth = line(rng)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    w, b = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    losses = []
    for rows in minibatches(rng, len(x), args.bs, args.iters):
        loss = torch.mean((w * x[rows] + b - y[rows]) ** 2)
        loss.backward()
        with torch.no_grad():  # the update itself is not to be differentiated
            for p in (w, b):
                p -= args.lr * p.grad
                p.grad = None  # backward() adds to what is there
        losses.append(loss.item())
    return losses, {"w": w.item(), "b": b.item()}, truth


def gradients_hyperplane(w, b, X, y):
    """A sum over rows of error times input is a matrix product: X' error."""
    error = X @ w + b - y  # (B, 4) @ (4,) -> (B,)
    return np.mean(error**2), (2 * X.T @ error / len(y), 2 * np.mean(error))


def step_3(args):
    """Vector input: the weight becomes a vector, its derivative a matrix product.

    With minibatches of one row, no bias, and r = 2 lr, this is LMS.
    """
    rng = np.random.default_rng(args.seed)
    X, y, truth = hyperplane(rng)
    w, b, losses = np.zeros(X.shape[1]), 0.0, []
    for rows in minibatches(rng, len(X), args.bs, args.iters):
        loss, (dw, db) = gradients_hyperplane(w, b, X[rows], y[rows])
        w -= args.lr * dw
        b -= args.lr * db
        losses.append(loss)
    return losses, {"w": w, "b": b}, truth


def gradients_classes(W, b, X, labels):
    """Softmax and negative log-likelihood from logits z: loss = mean(log sum_j exp z_j - z_label).

    exp overflows from z = 710 on; with the largest logit taken off all of them, which changes nothing, it cannot.
    d loss / d z = (softmax(z) - onehot(label)) / B: what is predicted less what is true, as in regression.
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
    """Classification: a vector in, the probabilities of three classes out."""
    rng = np.random.default_rng(args.seed)
    X, labels, truth = classes(rng)
    W, b, losses = np.zeros((X.shape[1], CLASSES)), np.zeros(CLASSES), []
    for rows in minibatches(rng, len(X), args.bs, args.iters):
        loss, (dW, db) = gradients_classes(W, b, X[rows], labels[rows])
        W -= args.lr * dW
        b -= args.lr * db
        losses.append(loss)
    return losses, {"W": W, "b": b}, truth


def layers_of(args):
    """Weights (out, in) and biases (out,) of args.layers tanh layers and a linear one: the start of steps 5 and 6."""
    rng, sizes = np.random.default_rng(args.seed + 1), [1] + [WIDTH] * args.layers + [1]
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
    """Backpropagation through any number of layers: from the loss to the input, each layer turns the derivative with
    respect to its output into those with respect to its weights, its bias, and its input."""
    activations = forward(params, X)
    error = activations[-1] - Y  # (B, 1)
    dz, gradients = 2 * error / error.numel(), []
    for i in reversed(range(0, len(params), 2)):
        a = activations[i // 2]  # what this layer was given, (B, in)
        gradients = [dz.T @ a, dz.sum(0), *gradients]  # (out, B) @ (B, in) -> (out, in); (out,)
        if i > 0:
            dz = dz @ params[i] * (1 - a**2)  # (B, out) @ (out, in); tanh' = 1 - tanh^2
    return (error**2).mean(), gradients


def step_5(args):
    """Hidden layers, as many as --layers: raw tensors, backpropagation by hand (--check sets autograd's beside it)."""
    rng = np.random.default_rng(args.seed)
    X, Y, truth = wave(rng)
    X, Y = torch.from_numpy(X), torch.from_numpy(Y)
    params, losses = layers_of(args), []
    for rows in minibatches(rng, len(X), args.bs, args.iters):
        loss, gradients = gradients_layers(params, X[rows], Y[rows])
        for p, g in zip(params, gradients):
            p -= args.lr * g
        losses.append(loss.item())
    at = torch.linspace(-0.8, 0.8, 5, dtype=torch.float64)[:, None]
    return losses, {"f": forward(params, at)[-1][:, 0].numpy()}, truth


def step_6(args):
    """The same network with torch.nn, torch.nn.functional and torch.optim. The same numbers come out as in step 5."""
    rng = np.random.default_rng(args.seed)
    X, Y, truth = wave(rng)
    X, Y = torch.from_numpy(X), torch.from_numpy(Y)
    sizes = [1] + [WIDTH] * args.layers + [1]
    layers = [module for i, o in zip(sizes, sizes[1:]) for module in (nn.Linear(i, o), nn.Tanh())][:-1]
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for p, start in zip(model.parameters(), layers_of(args)):
            p.copy_(start)
    optimizer = torch.optim.SGD(model.parameters(), args.lr)
    losses = []
    for rows in minibatches(rng, len(X), args.bs, args.iters):
        loss = F.mse_loss(model(X[rows]), Y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    at = torch.linspace(-0.8, 0.8, 5, dtype=torch.float64)[:, None]
    return losses, {"f": model(at).detach()[:, 0].numpy()}, truth


STEPS = {1: step_1, 2: step_2, 3: step_3, 4: step_4, 5: step_5, 6: step_6}


# ------------------------------------------------------------------------------------------------------------ checks


def gradient_cases(rng, layers):
    """Yield (step, parameters, by hand, loss in torch) for the four steps with gradients written by hand.

    parameters: float64 tensors at random values. by hand(parameters) -> (loss, gradients); loss in torch(parameters)
    -> a scalar written independently of it, for autograd to differentiate.
    """

    def start(*shapes):
        return [torch.from_numpy(np.asarray(rng.normal(size=shape))) for shape in shapes]

    def arrays(params):
        return [p.numpy() for p in params]

    x, y, _ = line(rng, 50)
    tx, ty = torch.from_numpy(x), torch.from_numpy(y)
    yield (1, start((), ()), lambda p: gradients_line(*arrays(p), x, y), lambda p: F.mse_loss(p[0] * tx + p[1], ty))
    X3, y3, _ = hyperplane(rng, 50)
    tX3, ty3 = torch.from_numpy(X3), torch.from_numpy(y3)
    yield (
        3,
        start(4, ()),
        lambda p: gradients_hyperplane(*arrays(p), X3, y3),
        lambda p: F.mse_loss(tX3 @ p[0] + p[1], ty3),
    )
    X4, labels, _ = classes(rng, 50)
    tX4, tlabels = torch.from_numpy(X4), torch.from_numpy(labels)
    yield (
        4,
        start((2, CLASSES), CLASSES),
        lambda p: gradients_classes(*arrays(p), X4, labels),
        lambda p: F.cross_entropy(tX4 @ p[0] + p[1], tlabels),
    )
    X5, Y5, _ = wave(rng, 50)
    tX5, tY5 = torch.from_numpy(X5), torch.from_numpy(Y5)
    sizes = [1] + [WIDTH] * layers + [1]

    def network(p):
        h = tX5
        for i, (W, b) in enumerate(zip(p[::2], p[1::2])):
            h = F.linear(h if i == 0 else h.tanh(), W, b)
        return F.mse_loss(h, tY5)

    shapes = [shape for i, o in zip(sizes, sizes[1:]) for shape in ((o, i), (o,))]
    yield 5, start(*shapes), lambda p: gradients_layers(p, tX5, tY5), network


def finite_differences(by_hand, params, h=1e-5):
    """d loss / d p for every entry of `params`, from (loss(p + h) - loss(p - h)) / 2h."""

    def loss():
        return float(by_hand(params)[0])

    gradients = [torch.empty_like(p) for p in params]
    for p, g in zip(params, gradients):
        flat, out = p.view(-1), g.view(-1)
        for i in range(len(flat)):
            old = flat[i].item()
            flat[i] = old + h
            above = loss()
            flat[i] = old - h
            out[i] = (above - loss()) / (2 * h)
            flat[i] = old
    return gradients


def relative_error(found, wanted):
    """||found - wanted|| / ||wanted|| over all parameters together."""
    found, wanted = (np.concatenate([np.ravel(g) for g in gs]) for gs in (found, wanted))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def check(args):
    """Print, for every gradient by hand, how far it is from autograd and from finite differences; and that steps which
    compute the same agree. Raises UserError if one does not."""
    errors = {}
    for step, params, by_hand, loss in gradient_cases(np.random.default_rng(args.seed), args.layers):
        hand = by_hand(params)[1]
        leaves = [p.clone().requires_grad_() for p in params]
        errors[f"step {step} against autograd"] = relative_error(hand, torch.autograd.grad(loss(leaves), leaves))
        numeric = finite_differences(by_hand, params)
        errors[f"step {step} against finite differences"] = relative_error(hand, numeric)
    for a, b in ((1, 2), (5, 6)):
        errors[f"losses of step {a} against step {b}"] = relative_error(*([STEPS[s](args)[0]] for s in (a, b)))
    for name, error in errors.items():
        print(f"{name:38} relative error {error:.1e}")
    wrong = [name for name, error in errors.items() if not error < 1e-6]
    if wrong:
        raise run.UserError("beyond 1e-6: " + "; ".join(wrong))


# --------------------------------------------------------------------------------------------------------------- main


def draw(results):
    """A column a step: above the loss of every step, below what was recovered beside the truth."""
    figure = matplotlib.figure.Figure(figsize=(max(4, 2.6 * len(results)), 5), layout="constrained")
    panels = figure.subplots(2, len(results), squeeze=False)
    for (step, (losses, found, truth)), upper, lower in zip(results.items(), panels[0], panels[1]):
        upper.plot(losses, lw=0.7)
        upper.set(title=f"step {step}", xlabel="steps", ylabel="loss" if upper is panels[0, 0] else None, yscale="log")
        flat = [np.concatenate([np.ravel(values[name]) for name in truth]) for values in (truth, found)]
        at = np.arange(len(flat[0]))
        lower.bar(at, flat[0], 0.8, color="0.8", label="true")
        lower.plot(at, flat[1], "x", color="tab:red", label="recovered")
        names = [
            name + (f"{i}" if np.size(truth[name]) > 1 else "") for name in truth for i in range(np.size(truth[name]))
        ]
        lower.set_xticks(at, names, fontsize=7)
        upper.grid(alpha=0.3)
    panels[1, 0].legend(fontsize=8)
    return figure


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group()
    what.add_argument("--step", type=int, choices=list(STEPS), help="only this step (default: all six)")
    what.add_argument("--check", action="store_true", help="check the gradients instead of training")
    p.add_argument(
        "--layers",
        type=run.positive_int,
        default=2,
        metavar="N",
        help="hidden layers, of steps 5 and 6 alone (default: %(default)s)",
    )
    run.add_flags(
        p,
        iters=dict(default=2000),
        bs=dict(default=32),
        lr=dict(default=0.1),
        seed=dict(help="data, their order and initial weights"),
        out=dict(default=str(run.ROOT / "out" / "lms" / "ladder"), help="where to"),
    )
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    if args.check:
        return check(args)
    out, results, rows = run.make_folder(args.out), {}, []
    for step in [args.step] if args.step else STEPS:
        with np.errstate(over="ignore", invalid="ignore"):  # looked at in the next line
            losses, found, truth = STEPS[step](args)
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            raise run.Diverged(int(bad[0]))
        results[step] = losses, found, truth
        print(f"step {step}: {STEPS[step].__doc__.splitlines()[0]}")
        print(f"  loss {losses[0]:.4f} -> {np.mean(losses[-100:]):.4f}")
        for name in truth:
            print(f"  {name}: recovered {np.round(found[name], 3)}, true {np.round(truth[name], 3)}".replace("\n", ""))
        rows.append(
            {
                "study": "ladder",
                "setting": f"step {step}",
                "seed": args.seed,
                "state": "done",
                "args": {k: getattr(args, k) for k in ("iters", "bs", "lr", "layers")},
                "final": {
                    "loss": float(np.mean(losses[-100:])),
                    "found": {k: np.asarray(v).tolist() for k, v in found.items()},
                    "true": {k: np.asarray(v).tolist() for k, v in truth.items()},
                    "largest_error": max(float(np.abs(found[k] - truth[k]).max()) for k in truth),
                },
            }
        )
    write_study(out, f"step{args.step}" if args.step else "ladder", rows, draw(results))


if __name__ == "__main__":
    run.cli(main)
