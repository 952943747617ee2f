"""The MLP of train.py in JAX with optax, on MNIST, from the same initial weights and on the same batches.

    python simplenn/train_optax.py                 # 3,000 steps beside PyTorch's, then 10 epochs

Writes optax.json (the record), drift.png (both losses, in float64 and in float32) and losses.png into --out. Validation
chooses the epoch; losses.png shows the test loss for the eye.
"""

import itertools
import time
from dataclasses import dataclass

from common import run
from common.options import option, to_argv

import matplotlib.figure
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import FUNCTIONS
from drawing import draw_losses
from model import MLP
from studies.tools import log_steps

DRIFT_STEPS = 3000


def network(sizes, seed, dtype):
    torch.manual_seed(seed)
    return MLP(sizes).to(dtype)


def batches(dataset, bs, seed, dtype):
    """Batches (x, labels) for ever, in the order of train.py."""
    for epoch in itertools.count():
        for x, y in dataset.batches(bs, shuffle=(seed, epoch)):
            yield x.to(dtype), y


def torch_losses(dataset, sizes, bs, lr, seed, dtype, steps):
    """The losses of the first `steps` steps of PyTorch's Adam."""
    net, losses = network(sizes, seed, dtype), []
    optimizer = torch.optim.Adam(net.parameters(), lr)
    for x, y in itertools.islice(batches(dataset, bs, seed, dtype), steps):
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def jax_functions(lr):
    """(init, step, evaluate) of the MLP in JAX: parameters are a list of (weight (outputs, inputs), bias)."""
    try:
        import jax
        import optax
    except ImportError as error:
        raise run.UserError(f"train_optax.py needs JAX and optax ({error}): pip install jax optax") from None
    jax.config.update("jax_enable_x64", True)  # float32 arrays stay float32
    jnp, adam = jax.numpy, optax.adam(lr)

    def init(net):
        layers = [m for m in net if isinstance(m, torch.nn.Linear)]
        parameters = [tuple(jnp.asarray(t.detach().numpy()) for t in (m.weight, m.bias)) for m in layers]
        return parameters, adam.init(parameters)

    def forward(parameters, x):
        for i, (weight, bias) in enumerate(parameters):
            x = (jax.nn.relu(x) if i else x) @ weight.T + bias
        return x

    def loss_of(parameters, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(forward(parameters, x), y).mean()

    @jax.jit
    def step(parameters, state, x, y):
        loss, gradients = jax.value_and_grad(loss_of)(parameters, x, y)
        updates, state = adam.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, loss

    @jax.jit
    def evaluate(parameters, x, y):
        logits = forward(parameters, x)
        return loss_of(parameters, x, y), (logits.argmax(1) == y).mean()

    return init, step, evaluate


def optax_losses(dataset, sizes, bs, lr, seed, dtype, steps):
    """The losses of the first `steps` steps of optax.adam."""
    init, step, _ = jax_functions(lr)
    parameters, state = init(network(sizes, seed, dtype))
    losses = []
    for x, y in itertools.islice(batches(dataset, bs, seed, dtype), steps):
        parameters, state, loss = step(parameters, state, x.flatten(1).numpy(), y.numpy())
        losses.append(float(loss))
    return losses


def drift(train_set, sizes, args):
    """How far the losses of both drift apart: {precision: {"torch" and "optax": losses, "largest_difference": relative,
    of any step up to this one}}, at the steps `steps`; and the same after some numbers of steps."""
    kept = log_steps(DRIFT_STEPS)
    found = {"steps": kept.tolist()}
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        ours = torch_losses(train_set, sizes, args.bs, args.lr, args.seed, dtype, DRIFT_STEPS)
        theirs = optax_losses(train_set, sizes, args.bs, args.lr, args.seed, dtype, DRIFT_STEPS)
        largest = list(itertools.accumulate((abs(a - b) / a for a, b in zip(ours, theirs)), max))
        curves = {"torch": ours, "optax": theirs, "largest_difference": largest}
        found[name] = {key: [values[step - 1] for step in kept] for key, values in curves.items()}
        found[name]["after"] = {str(step): largest[step - 1] for step in (100, 1000, DRIFT_STEPS)}
        after = ", ".join(f"{value:.2g} after {step}" for step, value in found[name]["after"].items())
        print(f"{name}: the largest relative difference of the losses is {after} steps")
    return found


def draw_drift(record):
    found = record["drift"]
    figure = matplotlib.figure.Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(found["steps"], found["float32"]["torch"], lw=2, label="PyTorch, float32")
    left.plot(found["steps"], found["float32"]["optax"], "--", label="optax, float32")
    left.set(ylabel="loss of the batch")
    for name in ("float32", "float64"):
        right.plot(found["steps"], found[name]["largest_difference"], label=name)
    right.set(ylabel="largest relative difference so far")
    for axes in (left, right):
        axes.set(xlabel="step", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def train(parts, sizes, args):
    """Train in float32 to the end. Returns (one row per epoch, the final metrics of the best validation epoch)."""
    init, step, evaluate = jax_functions(args.lr)
    parameters, state = init(network(sizes, args.seed, torch.float32))
    tensors = [[t.numpy() for t in part.tensors()] for part in parts]
    rows, best = [], None
    for epoch in tqdm(range(args.epochs), "optax", leave=False, disable=None):
        began, total = time.monotonic(), 0.0
        for x, y in parts[0].batches(args.bs, shuffle=(args.seed, epoch)):
            parameters, state, loss = step(parameters, state, x.numpy(), y.numpy())
            total += float(loss) * len(y)
        row = {"epoch": epoch + 1, "train_loss": total / len(parts[0])}
        for name, (x, y) in zip(("val", "test"), tensors[1:]):
            row[f"{name}_loss"], row[f"{name}_accuracy"] = map(float, evaluate(parameters, x, y))
        rows.append(row | {"seconds": round(time.monotonic() - began, 2)})
        if best is None or row["val_accuracy"] > best["val_accuracy"]:
            best = row
    final = {k: best[k] for k in ("val_loss", "val_accuracy", "test_loss", "test_accuracy")}
    return rows, final | {"best_epoch": best["epoch"]}


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    data: str = option("auto", "the images: mnist, ...", type=data.dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    limit: int | None = option(None, "only the first N examples of each part", above=0)
    seed: int = option(0, "initial weights and data order", at_least=0)
    epochs: int = option(10, "passes over the training set", above=0)
    bs: int = option(64, "batch size", above=0)
    lr: float = option(1e-3, "learning rate of Adam", above=0)
    hidden: tuple[int, ...] = option((256,), "hidden units of each layer", above=0, at_most=16_384, nargs="+")
    out: str = option(str(run.ROOT / "out/simplenn/optax"), "folder of the results", type=run.path_arg, metavar="DIR")

    def check(self):
        if self.data in FUNCTIONS:
            raise run.UserError(f"--data {self.data}: train_optax.py trains on images")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    jax_functions(args.lr)  # names a missing package at once
    import jax
    import optax

    out, began = run.make_folder(args.out), time.monotonic()
    *parts, facts = data.load(args.data, args.data_dir, args.limit, flat=True)
    args.data = facts["name"] if args.data == "auto" else args.data
    sizes = [784, *args.hidden, len(parts[0].classes)]
    found = drift(parts[0], sizes, args)
    rows, final = train(parts, sizes, args)
    machine = run.environment(torch.device("cpu"), __file__)
    machine["versions"] |= {"jax": jax.__version__, "optax": optax.__version__}
    wall = round(time.monotonic() - began, 1)
    given = {name: value for name, value in run.record_args(args).items() if value is not None}
    command = ["simplenn/train_optax.py", *to_argv(Options, given)]
    record = {
        "script": "train_optax",
        "command": command,
        "state": "done",
        "setting": "MLP in JAX with optax.adam",
        **machine,
        "args": run.record_args(args),
        "dataset": facts,
        "wall_s": wall,
        "drift": found,
        "curve": rows,
        "parameters": run.count_parameters(MLP(sizes)),
        "final": final,
    }
    run.write_json(out / "optax.json", record)
    run.write_figure(out / "drift.png", draw_drift(record))
    run.write_figure(out / "losses.png", draw_losses(rows))
    print(
        f"test accuracy {final['test_accuracy']:.2%} with the weights of epoch {final['best_epoch']} (validation "
        f"{final['val_accuracy']:.2%}); {wall:.0f} s; {run.display_path(out)}"
    )
    return record


if __name__ == "__main__":
    run.cli(main)
