"""Does a larger batch make a network less sensitive to its input? Sensitivity, sharpness and gradient norm."""

import torch
import torch.nn.functional as F

from model import MLP
from studies import hessian, tools, training

BATCHES = (16, 64, 256, 1024, 4096)
BASE = 64  # the batch at which the learning rate is LR
LR = 0.05  # SGD with momentum 0.9
REGIMES = {
    f"{budget}, learning rate {rate}": (budget, rate)
    for budget in ("equal epochs", "equal steps")
    for rate in ("fixed", "scaled")
}
GRADIENT_BATCHES = (10, 30, 60, 110, 210, 410, 810, 1510)


def input_jacobian_norm(net, x, probabilities=False) -> float:
    """The mean over the rows of x (N, inputs) of the Frobenius norm of the Jacobian of the output to the input
    (Novak et al. 2018). The output: logits, or `probabilities`."""
    net.eval()
    x = x.clone().requires_grad_()
    outputs = net(x).softmax(1) if probabilities else net(x)  # (N, classes)
    squares = 0
    for k in range(outputs.shape[1]):  # the rows of x are independent: one backward pass for all of them
        (gradient,) = torch.autograd.grad(outputs[:, k].sum(), x, retain_graph=True)
        squares = squares + gradient.square().sum(1)
    return squares.sqrt().mean().item()


def sharpness(net, x, y) -> float:
    """The largest eigenvalue of the Hessian of the mean loss on (x, y)."""
    f, w = hessian.flat_loss(net, F.cross_entropy, x, y), hessian.vector_of(net)
    return hessian.largest_eigenvalue(hessian.product(f, w), len(w))


def train_one(train_set, test_set, regime, bs, seed, epochs, steps):
    """One batch size in one regime: a row of the record."""
    torch.manual_seed(seed)
    x, y = train_set.tensors()
    test_x, test_y = test_set.tensors()
    net = MLP([784, 64, 10])
    bs = min(bs, len(x))
    budget, rate = REGIMES[regime]
    lr = LR * (bs / BASE) if rate == "scaled" else LR
    per_epoch = len(x) // bs
    total = epochs * per_epoch if budget == "equal epochs" else steps
    for step, loss in training.fit(net, x, y, -(-total // per_epoch), bs, lr, seed, "sgd"):
        if step == total or not loss.isfinite():
            break
    values = training.evaluate_parts(net, (x, y), (test_x, test_y))
    row = {"setting": regime, "bs": bs, "seed": seed, "lr": lr, "steps": step}
    if not all(value < 100 for value in values.values()):  # NaN too
        return row | {"state": "diverged", "final": {}}
    values |= {
        "sensitivity": input_jacobian_norm(net, test_x[:1000]),
        "sensitivity_probabilities": input_jacobian_norm(net, test_x[:1000], True),
        "sharpness": sharpness(net, x[:2000], y[:2000]),
    }
    return row | {"final": values}


def batch(ctx: tools.Context):
    """Five batch sizes, SGD with momentum: equal epochs (20) or equal steps (1,500), the learning rate fixed (0.05) or
    scaled with the batch."""
    train_set, test_set = ctx.digits(10_000)
    batches = ctx.pick(BATCHES, (16, 64))
    tasks = [
        (train_set, test_set, regime, bs, seed, ctx.pick(20, 2), ctx.pick(1500, 10))
        for seed in ctx.seeds_of()
        for bs in batches
        for regime in REGIMES
    ]
    ctx.save(ctx.map(train_one, tasks), draw_batch)


def draw_batch(record):
    """Six quantities against the batch size: a line for the mean of each regime, a dot for each seed."""
    figure, axes = tools.panels(2, 3, height=2.9)
    quantities = {
        "train_loss": "training loss",
        "test_loss": "test loss",
        "test_accuracy": "test accuracy",
        "sensitivity": "sensitivity of the logits",
        "sensitivity_probabilities": "sensitivity of the probabilities",
        "sharpness": "largest Hessian eigenvalue",
    }
    for i, (regime, rows_of_regime) in enumerate(tools.groups(record["rows"], "setting").items()):
        by_size = tools.groups([row for row in rows_of_regime if row["final"]], "bs")
        for panel, (name, label) in zip(axes.flat, quantities.items()):
            values = [[row["final"][name] for row in runs] for runs in by_size.values()]
            means = [sum(v) / len(v) for v in values]
            places = [bs * 1.08 ** (2 * i - 3) for bs in by_size]  # the four regimes side by side
            panel.plot(places, means, "-" if i % 2 == 0 else "--", color=f"C{i}", lw=1, label=regime)
            for x, v in zip(places, values):
                panel.plot([x] * len(v), v, ".", color=f"C{i}", ms=5)
            panel.set(xscale="log", xlabel="batch size", title=label, yscale="linear" if "accuracy" in name else "log")
            panel.set_xticks(list(by_size), list(by_size))
            panel.minorticks_off()
    for panel in axes.flat:
        panel.grid(alpha=0.3)
    tools.label_plainly(axes[0, 1].yaxis)
    tools.label_plainly(axes[1, 1].yaxis)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    return figure


def gradient_one(train_set, bs, seed, epochs, probe):
    """Adam at 0.001: mean norms of the batch gradient, of the full gradient, and of the first `probe` batches at the
    initial weights. The course averaged the norms of the gradients of the single weight matrices and biases."""
    torch.manual_seed(seed)
    x, y = train_set.tensors()
    net = MLP([784, 64, 10])
    tensor_norms = []  # of each step, (number of tensors,)
    bs = min(bs, len(x))
    starts = range(0, len(x) - bs + 1, bs)[:probe]
    initial = [batch_gradient_norm(net, x[i : i + bs], y[i : i + bs]) for i in starts]
    for _ in training.fit(net, x, y, epochs, bs, seed=seed):
        tensor_norms.append(torch.stack([p.grad.norm() for p in net.parameters()]))
    tensor_norms = torch.stack(tensor_norms)
    norms = tensor_norms.norm(dim=1)  # (steps,), of the whole gradient
    last = norms[-(len(x) // bs) :]
    final = {
        "mean_norm": norms.mean().item(),
        "mean_norm_last_epoch": last.mean().item(),
        "mean_norm_of_tensors": tensor_norms.mean().item(),
        "full_norm_at_end": batch_gradient_norm(net, x, y),
        "norm_at_initial_weights": sum(initial) / len(initial),
        "train_loss": training.evaluate(net, x, y)[0],
        "steps": len(norms),
    }
    return {"setting": f"batch size {bs}", "bs": bs, "seed": seed, "final": final}


def batch_gradient_norm(net, x, y) -> float:
    """The norm of the gradient of the mean loss on (x, y)."""
    gradients = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
    return torch.cat([g.flatten() for g in gradients]).norm().item()


def gradient(ctx: tools.Context):
    """The quantity that the course measured: the mean norm of the gradient of a batch, five epochs of Adam."""
    train_set, _ = ctx.digits(10_000)
    tasks = [
        (train_set, bs, seed, ctx.pick(5, 1), 50)
        for seed in ctx.seeds_of()
        for bs in ctx.pick(GRADIENT_BATCHES, (10, 60))
    ]
    ctx.save(ctx.map(gradient_one, tasks), draw_gradient)


def draw_gradient(record):
    figure, axes = tools.panels(1, 2)
    names = {
        "mean_norm": "batch gradient, mean over five epochs",
        "mean_norm_last_epoch": "batch gradient, last epoch",
        "mean_norm_of_tensors": "batch gradient, mean over the tensors",
        "full_norm_at_end": "full gradient, at the end",
        "norm_at_initial_weights": "batch gradient, at the initial weights",
    }
    by_size = tools.groups(record["rows"], "bs")
    for panel, chosen in ((axes[0, 0], names), (axes[0, 1], {"train_loss": "after five epochs"})):
        for name, label in chosen.items():
            curves = [[row["final"][name] for row in runs] for runs in by_size.values()]
            tools.draw_band(panel, list(by_size), list(zip(*curves)), label)
        panel.set(xscale="log", yscale="log", xlabel="batch size")
    axes[0, 0].set_ylabel("norm of the gradient")
    axes[0, 1].set_ylabel("training loss")
    tools.finish_axes(axes)
    return figure


PARTS = {"batch": batch, "gradient": gradient}
