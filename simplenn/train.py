"""Train a small network on MNIST, or an MLP on a function of one variable.

    python simplenn/train.py                                # SimpleNN on MNIST: Adam, 3 epochs
    python simplenn/train.py --model cnn --recipe best      # the best recipe
    python simplenn/train.py --model mlp --optimizer sgd --lr 0.1 --dropout 0.5
    python simplenn/train.py --model mlp --data sinc        # sin(5 pi x) / (5 pi x), mean squared error
    python simplenn/train.py --data builtin                 # 1,797 digits that come with scikit-learn, no download

Validation chooses the epoch; that checkpoint is tested once, at the end. losses.png shows the test loss too, for the
eye: nothing is chosen by it.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import ClassVar

from common import run
from common.calibration import fit_temperature
from common.options import option
from common.schedules import lr_factor

import torch
from tqdm import tqdm

import data
from data import AUGMENT, DATA_HELP, FUNCTIONS, dataset_arg
from drawing import draw_losses, draw_outputs
from model import ACTIVATIONS, CNN, MLP, CustomConv2d, CustomLinear, SimpleNN

RECIPE_NAMES = ["plain", "best", "tiny"]
MODELS = ["mlp", "cnn", "simplenn", "simplenn-custom"]
WIDEST = 16_384  # two layers of this width have a gigabyte of weights


@dataclass(kw_only=True)
class Options(run.TrainOptions):
    model: str = option("simplenn", "the network", choices=MODELS)
    data: str = option("auto", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    recipe: str = option("plain", "a named set of hyper-parameters; flags override it", choices=RECIPE_NAMES)
    epochs: int = option(3, "passes over the training set", above=0)
    bs: int = option(64, "batch size", above=0)
    lr: float = option(0.001, "learning rate; its peak, if it is scheduled", above=0)
    optimizer: str = option("adam", "adam: AdamW; sgd: with Nesterov momentum 0.9", choices=["adam", "sgd"])
    decay: str = option("none", "schedule of the learning rate", choices=["none", "onecycle"])
    weight_decay: float = option(0.0, "weight decay; on weights, not on biases", at_least=0)
    dropout: float = option(0.0, "probability of dropping a hidden unit", at_least=0, below=1)
    augment: str = option("none", "affine: random rotation, scale and shift of digits", choices=AUGMENT)
    label_smoothing: float = option(0.0, "share of the target spread evenly over all classes", at_least=0, below=1)
    test_curve: bool = option(True, "measure the test loss after each epoch too, for losses.png")
    hidden: tuple[int, ...] = option(
        (256,), "hidden units of each layer", above=0, at_most=WIDEST, only="mlp", nargs="+"
    )
    activation: str = option("relu", "after each hidden layer", choices=list(ACTIVATIONS), only="mlp")
    widths: tuple[int, int, int] = option(
        (16, 32, 64), "channels of the three convolutions", above=0, at_most=WIDEST // 4, only="cnn"
    )

    variant: ClassVar[str] = "model"

    def check(self):
        if self.data not in FUNCTIONS:
            return
        if self.model != "mlp":
            raise run.UserError(f"--model {self.model}: a function needs --model mlp")
        if self.augment != "none":
            raise run.UserError("--augment: the points of a function cannot be augmented")
        if self.label_smoothing:
            raise run.UserError("--label-smoothing: the points of a function have no labels to smooth")


PLAIN = Options()
FUNCTION = replace(PLAIN, model="mlp", epochs=2000, bs=300, lr=0.0012, hidden=(10, 18, 15, 4))
RECIPES = {
    "plain": {
        "mlp": replace(PLAIN, epochs=10),
        "cnn": replace(PLAIN, lr=0.003),
        "simplenn": PLAIN,
        "simplenn-custom": PLAIN,
        "function": FUNCTION,
    },
    "best": {
        "cnn": replace(
            PLAIN,
            epochs=4,
            bs=128,
            lr=0.01,
            decay="onecycle",
            weight_decay=0.01,
            augment="affine",
            label_smoothing=0.1,
            test_curve=False,
        ),
    },
    "tiny": {  # a second, for tests
        "mlp": replace(PLAIN, epochs=2, hidden=(16,)),
        "cnn": replace(PLAIN, epochs=2, widths=(4, 4, 8)),
        "simplenn": replace(PLAIN, epochs=2),
        "simplenn-custom": replace(PLAIN, epochs=2),
        "function": replace(FUNCTION, epochs=2, bs=64, hidden=(8,)),
    },
}
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
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [dict(params=weights, weight_decay=args.weight_decay), dict(params=others, weight_decay=0.0)]
    if args.optimizer == "adam":  # decoupled weight decay (Loshchilov and Hutter 2019)
        return torch.optim.AdamW(groups, args.lr, fused=True)
    return torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True, fused=True)


def train(args, r, model, train_set, val_set, test_set):
    """Train, and leave in the run folder last.pt, best.pt (the best validation epoch) and metrics.csv."""
    optimizer = build_optimizer(args, model)
    n = len(train_set)
    steps = math.ceil(n / args.bs)
    first_epoch = 0
    best = -math.inf
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
            progress = (epoch + step / steps) / args.epochs
            for group in optimizer.param_groups:
                group["lr"] = args.lr * lr_factor(args.decay, progress, steps=args.epochs * steps)
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
        r.log(row | {"lr": optimizer.param_groups[0]["lr"], "epoch_seconds": round(seconds, 2)})
        if args.epochs <= 100 or (epoch + 1) % 100 == 0:
            r.print(
                f"epoch {epoch + 1:>4}/{args.epochs}   loss {row['train_loss']:.4g} train {row['val_loss']:.4g} val"
                f"   accuracy {row['train_accuracy']:.2%} train {val_accuracy:.2%} val"
                f"   {n / seconds:,.0f} examples/s"
            )
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
    return (
        dataset.loss(outputs, dataset.targets).item(),
        dataset.correct(outputs, dataset.targets).item() / len(dataset),
        outputs,
    )


def recipe(given: dict) -> Options:
    """The recipe of the model and the data that the flags `given` name. Raises UserError if there is none."""
    name, model = given.get("recipe", "plain"), given.get("model", "simplenn")
    kind = "function" if given.get("data") in FUNCTIONS and model == "mlp" else model
    if kind not in RECIPES[name]:
        raise run.UserError(f"--recipe {name}: is for {', '.join(RECIPES[name])}, not for {kind}")
    return replace(RECIPES[name][kind], recipe=name, model=model)


def parse(argv=None) -> Options:
    return run.parse_options(__file__, Options, argv, recipe, extendable=lambda args: args.decay == "none")


def main(argv=None):
    args = parse(argv)
    train_set, val_set, test_set, facts = data.load(args.data, args.data_dir, args.limit)
    args.data = facts["name"] if args.data == "auto" else args.data
    with run.Run(
        args, __file__, f"{facts['name']}-{args.model}", AUTO_PRECISION.get(args.model, "fp32"), AUTO_THREADS
    ) as r:
        train_set, val_set, test_set = (part.to(r.device) for part in (train_set, val_set, test_set))
        run.check_memory(lambda: build_model(args, train_set), r.device, "--hidden, --widths")
        model = build_model(args, train_set).to(r.device, memory_format=torch.channels_last)  # faster, see bench.py
        normalization = train_set.normalization
        if normalization:  # what predict.py has to know of the training images
            normalization |= {"as_mnist": data.as_mnist(args.data, train_set.images)}
        parameters = run.count_parameters(model)
        r.note(
            f"{args.model}, {parameters:,} parameters, on {facts['name']}: {len(train_set):,} training examples, "
            f"{len(val_set):,} for validation",
            dataset=facts,
            parameters=parameters,
            classes=train_set.classes,
            normalization=normalization,
        )
        train(args, r, model, train_set, val_set, test_set)

        best = r.load_best(model=model)
        val_loss, val_accuracy, val_outputs = evaluate(model, val_set, r)
        temperature = fit_temperature(val_outputs, val_set.labels) if normalization else None  # of images, not points
        test_loss, test_accuracy, outputs = evaluate(model, test_set, r)
        r.figure("losses.png", draw_losses(r.rows))
        r.figure("predictions.png", draw_outputs(test_set, outputs))
        r.finish(
            f"test accuracy {test_accuracy:.2%}, loss {test_loss:.3g}, with the weights of epoch {best['epoch']} "
            f"(validation accuracy {val_accuracy:.2%})",
            uniform_loss=train_set.uniform_loss(),
            best_epoch=best["epoch"],
            val_loss=val_loss,
            val_accuracy=val_accuracy,
            temperature=temperature,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
        )
    return r.record


if __name__ == "__main__":
    run.cli(main)
