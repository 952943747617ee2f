"""Train a small network on MNIST, or an MLP on a function of one variable.

    python simplenn/train.py                                # SimpleNN on MNIST: Adam, 3 epochs
    python simplenn/train.py --model cnn --recipe best      # the best recipe
    python simplenn/train.py --model mlp --optimizer sgd --lr 0.1 --dropout 0.5
    python simplenn/train.py --model mlp --data sinc        # sin(5 pi x) / (5 pi x), mean squared error
    python simplenn/train.py --data builtin                 # 1,797 digits that come with scikit-learn, no download

Validation chooses the epoch; that checkpoint is tested once, at the end. losses.png shows the test loss too, for the
eye: nothing is chosen by it.
"""

import argparse
import math
import time

from common import run

import torch
from tqdm import tqdm

import data
from figures import draw_losses, draw_outputs
from model import ACTIVATIONS, CNN, MLP, CustomConv2d, CustomLinear, SimpleNN, count_parameters

PLAIN = dict(epochs=3, bs=64, lr=0.001, optimizer="adam", decay="none", weight_decay=0.0, dropout=0.0, augment="none",
             label_smoothing=0.0, test_curve=True)  # fmt: skip
FUNCTION = PLAIN | dict(epochs=2000, bs=300, lr=0.0012, hidden=[10, 18, 15, 4], activation="relu")
RECIPES = {
    "plain": {
        "mlp": PLAIN | dict(epochs=10, hidden=[256], activation="relu"),
        "cnn": PLAIN | dict(lr=0.003, widths=[16, 32, 64]),
        "simplenn": PLAIN,
        "simplenn-custom": PLAIN,
        "function": FUNCTION,
    },
    "best": {
        "cnn": PLAIN | dict(epochs=4, bs=128, lr=0.01, decay="onecycle", weight_decay=0.01, augment="affine",
                            label_smoothing=0.1, test_curve=False, widths=[16, 32, 64]),
    },
    "tiny": {
        "mlp": PLAIN | dict(epochs=2, hidden=[16], activation="relu"),
        "cnn": PLAIN | dict(epochs=2, widths=[4, 4, 8]),
        "simplenn": PLAIN | dict(epochs=2),
        "simplenn-custom": PLAIN | dict(epochs=2),
        "function": FUNCTION | dict(epochs=2, bs=64, hidden=[8]),
    },
}  # fmt: skip
MODELS = ("mlp", "cnn", "simplenn", "simplenn-custom")
AUTO_PRECISION = {"cnn": "bf16"}  # bench.py: it gains; fp32 for the others
AUTO_THREADS = 1  # steps of such small networks are too short for more


def build_model(args, train_set):
    """The network that the arguments name, for the images or the points of `train_set`."""
    classes = len(train_set.classes)
    if args.model == "mlp":
        inputs = 1 if args.data in data.FUNCTIONS else 28 * 28
        return MLP([inputs, *args.hidden, classes], args.activation, args.dropout)
    if args.model == "cnn":
        return CNN(classes, args.widths, args.dropout)
    own = dict(conv=CustomConv2d, linear=CustomLinear) if args.model == "simplenn-custom" else {}
    return SimpleNN(num_classes=classes, dropout=args.dropout, **own)


def build_optimizer(args, model):
    """Adam or SGD; weight decay on weights only, since biases and batch normalization gain nothing from it."""
    weights, others = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [dict(params=weights, weight_decay=args.weight_decay), dict(params=others, weight_decay=0.0)]
    if args.optimizer == "adam":  # decoupled weight decay (Loshchilov and Hutter 2019)
        return torch.optim.AdamW(groups, args.lr, fused=True)
    return torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True, fused=True)


def lr_factor(decay: str, progress: float) -> float:
    """The factor of the learning rate at `progress` in [0, 1), the fraction of all steps that are done."""
    if decay == "onecycle":  # up from zero for a fifth of the run, then down to zero (Smith and Topin 2017)
        return min(progress / 0.2, (1 - progress) / 0.8)
    return 1.0


def train(args, r, model, train_set, val_set, test_set):
    """Train, and leave in the run folder last.pt, best.pt (the best validation epoch) and metrics.csv."""
    optimizer = build_optimizer(args, model)
    n, steps, first_epoch, best = len(train_set), math.ceil(len(train_set) / args.bs), 0, -math.inf
    if state := r.load(model=model, optimizer=optimizer):
        first_epoch, best = state["epoch"], state["best"]

    bar = tqdm(total=args.epochs * steps, initial=first_epoch * steps, leave=False, disable=None, unit="step")
    for epoch in range(first_epoch, args.epochs):
        model.train()
        began = time.monotonic()
        losses = torch.zeros(steps, device=r.device)  # kept on the device: `.item()` at each step would stall a GPU
        correct = torch.zeros((), dtype=torch.int64, device=r.device)
        batches = train_set.batches(args.bs, shuffle=(args.seed, epoch), augment=args.augment)
        for step, (inputs, targets) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * lr_factor(args.decay, (epoch + step / steps) / args.epochs)
            with r.autocast():
                outputs = model(inputs)
                loss = train_set.loss(outputs, targets, args.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            losses[step] = loss.detach() * len(targets)
            correct += train_set.correct(outputs, targets)
            bar.update()
            if (step + 1) % 100 == 0 or step + 1 == steps:
                r.check_finite(losses[: step + 1], epoch * steps)
                bar.set_postfix(epoch=epoch + 1, loss=f"{losses.sum().item() / min((step + 1) * args.bs, n):.4f}")

        seconds = time.monotonic() - began
        row = {"epoch": epoch + 1, "train_loss": losses.sum().item() / n}
        row["val_loss"], val_accuracy, _ = evaluate(model, val_set, r)
        r.check_finite(torch.tensor([row["val_loss"]]), (epoch + 1) * steps)
        row |= {"train_accuracy": correct.item() / n, "val_accuracy": val_accuracy}
        if args.test_curve:
            row["test_loss"], row["test_accuracy"], _ = evaluate(model, test_set, r)
        r.log(row | {"lr": optimizer.param_groups[0]["lr"], "seconds": round(seconds, 2)})
        if args.epochs <= 100 or (epoch + 1) % 100 == 0:
            r.print(f"epoch {epoch + 1:>4}/{args.epochs}   loss {row['train_loss']:.4g} train {row['val_loss']:.4g} val"
                    f"   accuracy {row['train_accuracy']:.2%} train {val_accuracy:.2%} val"
                    f"   {n / seconds:,.0f} examples/s")  # fmt: skip
        score = val_accuracy if args.data not in data.FUNCTIONS else -row["val_loss"]
        if score > best:
            best = score
            r.save_best(model=model, epoch=epoch + 1)
        r.save(model=model, optimizer=optimizer, epoch=epoch + 1, best=best)
    bar.close()


@torch.no_grad()
def evaluate(model, dataset, r):
    """(mean loss, accuracy, outputs (N, classes)) of the model on a dataset."""
    model.eval()
    with r.autocast():
        outputs = torch.cat([model(inputs) for inputs, _ in dataset.batches(1000)]).float()
    return (dataset.loss(outputs, dataset.targets).item(),
            dataset.correct(outputs, dataset.targets).item() / len(dataset), outputs)  # fmt: skip


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=MODELS, default="simplenn", help="(default: %(default)s)")
    run.add_flags(p, "set", "tensorboard", "data_dir", "out", "resume",
                  recipe=dict(choices=list(RECIPES), default="plain"),
                  data=dict(type=data.dataset_arg, default="auto", help=data.DATA_HELP))  # fmt: skip
    run.add_flags(p, "epochs", "bs", "lr", "seed", "device", "threads", "precision", "limit")
    p.add_argument("--optimizer", choices=["adam", "sgd"], help="adam: AdamW; sgd: with Nesterov momentum 0.9")
    run.add_flags(p, weight_decay=dict(help="weight decay; on weights, not on biases"))
    p.add_argument("--dropout", type=run.nonnegative_float, metavar="P", help="probability of dropping a hidden unit")
    p.add_argument("--augment", choices=data.AUGMENT, help="affine: random rotation, scale and shift of digits")
    p.epilog = "recipes:\n" + "\n".join(
        f"  {name} {model}: " + ", ".join(f"{k} {v}" for k, v in values.items())
        for name, models in RECIPES.items()
        for model, values in models.items()
    )
    return p


def recipe(args):
    """The recipe of the model and the data. Raises UserError if there is none."""
    if args.data in data.FUNCTIONS and args.model != "mlp":
        raise run.UserError(f"--model {args.model}: a function needs --model mlp")
    models, model = RECIPES[args.recipe], "function" if args.data in data.FUNCTIONS else args.model
    if model not in models:
        raise run.UserError(f"--recipe {args.recipe}: is for {', '.join(models)}, not for {model}")
    return models[model]


def check(args):
    """Arguments that do not fit. Raises UserError."""
    if args.dropout >= 1:
        raise run.UserError(f"--dropout {args.dropout}: must be below 1")
    if args.data in data.FUNCTIONS and args.augment != "none":
        raise run.UserError("--augment: the points of a function cannot be augmented")
    if args.data in data.FUNCTIONS and args.label_smoothing:
        raise run.UserError("--set label_smoothing: the points of a function have no labels to smooth")
    for name, count in (("hidden", None), ("widths", 3)):
        sizes = getattr(args, name, [1] * 3)
        if len(sizes) != (count or len(sizes)) or any(type(n) is not int or not 0 < n < 2**20 for n in sizes):
            raise run.UserError(f"--set {name}: must be a list of {count or 'some'} layer sizes, not {str(sizes):.60}")
    if getattr(args, "activation", "relu") not in ACTIVATIONS:
        raise run.UserError(f"--set activation: must be one of {', '.join(ACTIVATIONS)}")
    if args.decay not in ("none", "onecycle"):
        raise run.UserError("--set decay: must be none or onecycle")
    if not 0 <= args.label_smoothing < 1:
        raise run.UserError(f"--set label_smoothing: must be at least 0 and below 1, not {args.label_smoothing}")


def parse(argv=None):
    return run.parse(__file__, parser(), argv, recipe, check, extendable=lambda args: args.decay == "none")


def main(argv=None):
    args = parse(argv)
    train_set, val_set, test_set, facts = data.load(args.data, args.data_dir, args.limit)
    args.data = facts["name"] if args.data == "auto" else args.data
    with run.Run(
        args, __file__, f"{facts['name']}-{args.model}", AUTO_PRECISION.get(args.model, "fp32"), AUTO_THREADS
    ) as r:
        train_set, val_set, test_set = (part.to(r.device) for part in (train_set, val_set, test_set))
        model = build_model(args, train_set).to(r.device, memory_format=torch.channels_last)  # faster, see bench.py
        r.note(f"{args.model}, {count_parameters(model):,} parameters, on {facts['name']}: {len(train_set):,} training "
               f"examples, {len(val_set):,} for validation",
               dataset=facts, parameters=count_parameters(model), classes=train_set.classes,
               normalization=train_set.normalization)  # fmt: skip
        train(args, r, model, train_set, val_set, test_set)

        best = r.load_best(model=model)
        val_loss, val_accuracy, _ = evaluate(model, val_set, r)
        test_loss, test_accuracy, outputs = evaluate(model, test_set, r)
        r.figure("losses.png", draw_losses(r.rows))
        r.figure("predictions.png", draw_outputs(test_set, outputs))
        final = dict(
            best_epoch=best["epoch"],
            val_loss=val_loss,
            val_accuracy=val_accuracy,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
        )
        r.finish(f"test accuracy {test_accuracy:.2%}, loss {test_loss:.3g}, with the weights of epoch {best['epoch']} "
                 f"(validation accuracy {val_accuracy:.2%})", **final)  # fmt: skip
    return r.record


if __name__ == "__main__":
    run.cli(main)
