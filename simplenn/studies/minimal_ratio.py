"""What kind of point has no gradient? The fraction of positive eigenvalues of the Hessian, against the loss.

A network first trains on the loss for a while, then on the norm of its gradient, which leads to the nearest critical
point: a minimum or a saddle. The course from which the study comes counts positive eigenvalues of layerwise
Gauss-Newton blocks, which have no negative ones. Here it is the true Hessian.
"""

import itertools

from common import run

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, vmap

from model import MLP
from studies import hessian as hessians
from studies import tools, training

SIZES = [1, 8, 8, 1]
TOLERANCE = 1e-6  # an eigenvalue is zero up to this times the largest
LANCZOS_TOLERANCE = 1e-2  # a hundred steps of Lanczos resolve no smaller eigenvalues
SMALL = 1e-8  # a gradient norm at which a run counts as a critical point


def stack_of(count, sizes=SIZES, seed=0):
    """`count` networks with tanh in float64, as (template, vectors (count, P))."""
    torch.manual_seed(seed)
    nets = [MLP(sizes, "tanh").double() for _ in range(count)]
    return nets[0], torch.stack([hessians.vector_of(net) for net in nets])


def train_on_loss(f, w, stops, lr=0.01):
    """Adam on the loss; run k stops after stops[k] steps. w (K, P) is changed and returned."""
    w = w.clone().requires_grad_()
    result, optimizer = w.detach().clone(), torch.optim.Adam([w], lr)
    for step in range(max(stops) + 1):
        done = torch.tensor([stop == step for stop in stops])
        result[done] = w.detach()[done]
        optimizer.zero_grad()
        vmap(f)(w).sum().backward()
        optimizer.step()
    return result


def train_on_gradient_norm(f, w, iterations):
    """Minimize |g|^2 / 2, where g is the gradient of f, by Levenberg-Marquardt. w (K, P); returns (w, norms (K,)).

    The Jacobian of g is the Hessian H, so a step solves (H^2 + damping) d = -H g. Where the norm rises the step is
    taken back and the damping grows.
    """
    gradients = vmap(grad(f))
    curvature = vmap(hessian(f))
    eye = torch.eye(w.shape[1], dtype=w.dtype)
    damping = torch.full((len(w), 1, 1), 1e-4, dtype=w.dtype)
    g = gradients(w)
    h = curvature(w)
    for _ in range(iterations):
        step = torch.linalg.solve(h @ h + damping * eye, -(h @ g[..., None]))[..., 0]
        new = gradients(w + step)
        better = new.norm(dim=1) < g.norm(dim=1)
        w = torch.where(better[:, None], w + step, w)
        g = torch.where(better[:, None], new, g)
        damping = torch.where(better[:, None, None], damping / 5, damping * 3).clamp(1e-20, 1e3)
        moved = better.nonzero()[:, 0]
        if len(moved):
            h[moved] = curvature(w[moved])
        if g.norm(dim=1).max() < SMALL / 100:
            break
    return w, g.norm(dim=1)


def functions(ctx: tools.Context):
    """A hundred runs of a small tanh network on the sinc, in float64, which leave the loss at different times."""
    count, iterations = ctx.pick(100, 4), ctx.pick(400, 20)
    train_set, _ = ctx.points("sinc")
    x, y = (values[:: ctx.pick(3, 10)].double() for values in train_set.tensors())
    net, w = stack_of(count)
    f = hessians.flat_loss(net, F.mse_loss, x, y)
    stops = np.unique(np.geomspace(1, ctx.pick(20_000, 50), 10).astype(int)) - 1
    stops = [int(stops[k % len(stops)]) for k in range(count)]
    w = train_on_loss(f, w, stops)
    w, norms = train_on_gradient_norm(f, w, iterations)
    with torch.no_grad():
        losses = vmap(f)(w)
    eigenvalues = torch.linalg.eigvalsh(vmap(hessian(f))(w))
    counts = hessians.signs(eigenvalues, TOLERANCE)
    rows = [
        {
            "setting": "sinc",
            "seed": k,
            "steps_on_loss": stops[k],
            "parameters": w.shape[1],
            "final": {
                "train_loss": losses[k].item(),
                "gradient_norm": norms[k].item(),
                "critical": norms[k].item() < SMALL,
                "positive": int(counts[k, 0]),
                "zero": int(counts[k, 1]),
                "negative": int(counts[k, 2]),
                "minimal_ratio": counts[k, 0].item() / w.shape[1],
                "smallest": eigenvalues[k, 0].item(),
                "largest": eigenvalues[k, -1].item(),
            },
        }
        for k in range(count)
    ]
    ctx.save(rows, draw_functions, tolerance=TOLERANCE, small=SMALL, points=len(x))


def draw_functions(record):
    figure, axes = tools.panels(1, 2)
    for critical, finals in tools.groups([row["final"] for row in record["rows"]], "critical").items():
        label = f"gradient norm {'below' if critical else 'above'} {record['small']:g}: {len(finals)} runs"
        style = dict(marker="o" if critical else "x", ls="", alpha=0.6, label=label)
        losses = [final["train_loss"] for final in finals]
        axes[0, 0].plot(losses, [final["minimal_ratio"] for final in finals], **style)
        axes[0, 1].plot(losses, [final["negative"] for final in finals], **style)
    axes[0, 0].set(xscale="log", xlabel="loss", ylabel="fraction of positive eigenvalues")
    axes[0, 1].set(xscale="log", xlabel="loss", ylabel="negative eigenvalues")
    tools.finish_axes(axes)
    return figure


def mnist(ctx: tools.Context):
    """A network too large for a dense Hessian: fractions by stochastic Lanczos quadrature while it trains on MNIST; and
    the same estimate beside the dense Hessian of a small one."""
    train_set, _ = ctx.digits(1000)
    images, labels = train_set.tensors()
    pooled = torch.nn.functional.avg_pool2d(images.view(-1, 1, 28, 28), 4).flatten(1)  # (N, 49)
    cases = {"dense": (pooled, [49, 8, 10]), "large": (images, [784, 32, 10])}
    probes = ctx.pick(4, 2)
    steps = ctx.pick(100, 10)
    epochs = ctx.pick((0, 5, 25), (0, 1))
    rows = []
    for seed in ctx.seeds_of():
        for case, (x, sizes) in cases.items():
            torch.manual_seed(seed)
            net = MLP(sizes, "tanh")
            trained = training.fit(net, x, labels, max(epochs), 64, seed=seed)  # one optimizer for all epochs
            for epoch, _ in itertools.chain([(0, None)], training.epochs_of(trained, max(1, len(x) // 64))):
                if epoch in epochs:
                    row = {"setting": case, "seed": seed, "epoch": epoch, "parameters": run.count_parameters(net)}
                    final = estimate(net, sizes, x, labels, probes, steps, seed, with_dense=case == "dense")
                    rows.append(row | {"final": final})
    ctx.save(rows, draw_mnist, tolerance=LANCZOS_TOLERANCE, probes=probes, lanczos_steps=steps)


def draw_mnist(record):
    """Estimates of each network with their errors; seeds side by side. A cross: the dense Hessian."""
    figure, axes = tools.panels(1, 2)
    for panel, (case, runs) in zip(axes[0], tools.groups(record["rows"], "setting").items()):
        by_epoch = tools.groups(runs, "epoch")
        for place, rows_of_epoch in enumerate(by_epoch.values()):
            for i, row in enumerate(rows_of_epoch):
                final = row["final"]
                x = place + 0.15 * (i - (len(rows_of_epoch) - 1) / 2)
                first = place == i == 0
                label = "estimate and its error, a seed each" if first else None
                panel.errorbar(
                    x, final["positive_share"], final["positive_error"], fmt="o", color="C0", capsize=3, label=label
                )
                if case == "dense":
                    panel.plot(x, final["positive_dense"], "kx", label="dense Hessian" if first else None, zorder=3)
        panel.set_xticks(range(len(by_epoch)), list(by_epoch))
        panel.set(xlabel="epoch", title=f"{runs[0]['parameters']:,} parameters", ylim=(0, None))
        panel.set_ylabel("fraction of positive eigenvalues")
    tools.finish_axes(axes)
    return figure


def estimate(net, sizes, x, labels, probes, steps, seed, with_dense):
    """The estimated fractions of eigenvalues of each sign for `net`, computed in float64; with_dense: the fraction from
    the dense Hessian too."""
    double = MLP(sizes, "tanh").double()
    double.load_state_dict(net.state_dict())
    f = hessians.flat_loss(double, F.cross_entropy, x.double(), labels)
    w = hessians.vector_of(double)
    times = hessians.product(f, w)
    shares, errors = hessians.estimate_signs(times, len(w), probes, steps, LANCZOS_TOLERANCE, seed)
    signs = ("positive", "zero", "negative")
    final = {f"{sign}_share": share.item() for sign, share in zip(signs, shares)}
    final |= {f"{sign}_error": error.item() for sign, error in zip(signs, errors)}
    final |= {"train_loss": f(w).item(), "gradient_norm": grad(f)(w).norm().item()}
    if with_dense:
        eigenvalues = torch.linalg.eigvalsh(hessians.dense(f, w))
        final["positive_dense"] = hessians.signs(eigenvalues, LANCZOS_TOLERANCE)[0].item() / len(w)
    return final


PARTS = {"functions": functions, "mnist": mnist}
