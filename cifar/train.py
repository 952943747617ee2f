"""Train LeNet-5 on CIFAR-100 or SimpleNN on CIFAR-10.

    python cifar/train.py --lr 0.01 --bs 16                # LeNet-5, CIFAR-100, 10 epochs
    python cifar/train.py --recipe best                    # the best that was found for LeNet-5
    python cifar/train.py --model simplenn --recipe best   # and for SimpleNN, on CIFAR-10
    python cifar/train.py --data builtin --epochs 3        # a look without any download

Validation chooses the epoch; that checkpoint is tested once, at the end. A recipe sets whatever flags leave open.
"""

import argparse
import math
import time

import matplotlib.figure
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import run
from model import ACTIVATIONS, LeNet5, SimpleNN, count_parameters

PLAIN = dict(
    epochs=10, bs=32, lr=0.001, decay="none", augment=False, l1=0.0, l2=0.0, nesterov=False, label_smoothing=0.0
)
RECIPES = {
    "plain": {"lenet5": PLAIN, "simplenn": PLAIN | dict(bn=False, activation="relu")},
    "best": {
        "lenet5": PLAIN
        | dict(epochs=90, bs=128, lr=0.02, decay="onecycle", augment=True, l2=5e-4, nesterov=True, label_smoothing=0.1),
        "simplenn": PLAIN
        | dict(
            epochs=30,
            bs=128,
            lr=0.05,
            decay="onecycle",
            augment=True,
            l2=5e-4,
            nesterov=True,
            bn=True,
            activation="swish",
        ),
    },
}
DATASET = {"lenet5": "cifar100", "simplenn": "cifar10"}  # what --data auto means
AUTO_PRECISION = "fp32"  # bench.py: these networks are too small to gain from bfloat16


def decay_factor(decay: str, progress: float) -> float:
    """What the learning rate is multiplied by when the share `progress` in [0, 1) of all steps is done."""
    if decay == "step":
        return 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
    if decay == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if decay == "onecycle":  # up from zero for a fifth of the run, then down to zero (Smith and Topin 2017)
        return min(progress / 0.2, (1 - progress) / 0.8)
    return 1.0


def build_model(args, num_classes):
    if args.model == "lenet5":
        return LeNet5(num_classes)
    return SimpleNN(num_classes, args.bn, args.activation)


def train(args, r, train_set, val_set):
    """Train, and leave in r.folder last.pt, best.pt (the epoch of the highest validation accuracy) and metrics.csv."""
    model = build_model(args, len(train_set.classes)).to(r.device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        args.lr,
        momentum=0.9,
        weight_decay=args.l2,
        nesterov=args.nesterov,
        fused=r.device.type in ("cpu", "cuda"),
    )
    r.note(parameters=round(count_parameters(model) * 1e6))
    r.say(
        f"{args.model}, {count_parameters(model):.6f} M parameters, on {train_set.name}: {len(train_set):,} images "
        f"to train on, {len(val_set):,} to validate\n{r.hardware}"
    )

    steps = math.ceil(len(train_set) / args.bs)
    first_epoch, step, losses, correct, best = 0, 0, torch.zeros(steps), 0, -1.0
    if state := r.load():
        run.restore(model, state["model"], r.folder / "last.pt")
        optimizer.load_state_dict(state["optimizer"])
        first_epoch, step, losses, correct, best = (state[k] for k in ("epoch", "step", "losses", "correct", "best"))
    losses = losses.to(r.device)  # of every step: looked at now and then, so that a GPU is not kept waiting

    def checkpoint(epoch, step):
        r.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch": epoch,
                "step": step,
                "losses": losses,
                "correct": int(correct),
                "best": best,
            }
        )

    for epoch in range(first_epoch, args.epochs):
        model.train()
        began, images_seen = time.monotonic(), 0
        batches = train_set.batches(args.bs, shuffle=(args.seed, epoch), augment=args.augment, skip=step)
        bar = tqdm(batches, f"epoch {epoch + 1}/{args.epochs}", steps, initial=step, leave=False, disable=None)
        for images, labels in bar:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * decay_factor(args.decay, (epoch + step / steps) / args.epochs)
            with r.autocast():
                logits, _ = model(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=args.label_smoothing)
                if args.l1:  # L1 by hand: the sum of the weights' absolute values, a constant pull towards zero
                    loss = loss + args.l1 * sum(p.abs().sum() for p in model.parameters())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            losses[step] = loss.detach() * len(labels)
            correct += (logits.argmax(1) == labels).sum()
            images_seen += len(labels)
            step += 1
            if step % 50 == 0 or step == steps:
                r.check_finite(losses[:step], epoch * steps)
                seen = min(step * args.bs, len(train_set))
                bar.set_postfix(loss=f"{losses[:step].sum().item() / seen:.3f}", accuracy=f"{int(correct) / seen:.1%}")
            if r.stopping:
                checkpoint(epoch, step)
                r.stop()

        seconds = time.monotonic() - began
        train_loss, train_accuracy = losses.sum().item() / len(train_set), int(correct) / len(train_set)
        val_loss, val_accuracy, _ = evaluate(model, val_set, r)
        r.check_finite(torch.tensor([val_loss]), (epoch + 1) * steps)
        r.log(
            {
                "epoch": epoch + 1,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "train_accuracy": train_accuracy,
                "val_accuracy": val_accuracy,
                "lr": optimizer.param_groups[0]["lr"],
                "seconds": round(seconds, 2),
            }
        )
        r.say(
            f"epoch {epoch + 1:>3}/{args.epochs}   loss {train_loss:.3f} train {val_loss:.3f} val   accuracy "
            f"{train_accuracy:.1%} train {val_accuracy:.1%} val   {images_seen / seconds:,.0f} images/s"
        )
        if val_accuracy > best:
            best = val_accuracy
            r.save({"model": model.state_dict(), "epoch": epoch + 1}, "best.pt")
        step, correct = 0, 0
        checkpoint(epoch + 1, step)
    return model


@torch.no_grad()
def evaluate(model, dataset, r):
    """(mean cross-entropy, accuracy, logits (N, classes)) of the model on a dataset."""
    model.eval()
    with r.autocast():
        logits = torch.cat([model(images)[0] for images, _ in dataset.batches(1000)]).float()
    correct = (logits.argmax(1) == dataset.labels).sum().item()
    return F.cross_entropy(logits, dataset.labels).item(), correct / len(dataset), logits


def draw_predictions(path, dataset, logits, rows=3, columns=8):
    """The first test pictures with the class predicted, and the true one where that was wrong."""
    figure = matplotlib.figure.Figure(figsize=(1.15 * columns, 1.4 * rows), layout="constrained")
    predicted = logits.argmax(1).tolist()
    for i, axes in zip(range(len(dataset)), np.ravel(figure.subplots(rows, columns))):
        axes.imshow(dataset.images[i].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        truth, guess = (dataset.classes[k].replace("_", " ") for k in (dataset.labels[i], predicted[i]))
        axes.set_title(
            guess if guess == truth else f"{guess}\n(is {truth})",
            fontsize=7.5,
            color="tab:green" if guess == truth else "tab:red",
        )
    for axes in figure.axes:
        axes.axis("off")
    run.write_figure(path, figure)


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=list(DATASET), default="lenet5", help="(default: %(default)s)")
    p.add_argument("--recipe", choices=list(RECIPES), default="plain", help="(default: %(default)s)")
    help = data.DATA_HELP + "; auto is cifar100 for lenet5, cifar10 for simplenn"
    run.add_flags(p, "data_dir", "out", "resume", data=dict(type=data.known, default="auto", help=help))
    run.add_flags(p, "epochs", "bs", "lr", "seed", "device", "precision", "limit")
    p.add_argument("--decay", choices=["none", "step", "cosine", "onecycle"], help="schedule of the learning rate")
    p.add_argument("--augment", action=argparse.BooleanOptionalAction, help="random crops and mirror images")
    p.add_argument("--l1", type=run.nonnegative_float, metavar="X", help="strength of the L1 penalty")
    p.add_argument("--l2", type=run.nonnegative_float, metavar="X", help="strength of the L2 penalty (weight decay)")
    p.add_argument("--bn", action=argparse.BooleanOptionalAction, help="batch normalization (simplenn)")
    p.add_argument("--activation", choices=list(ACTIVATIONS), help="(simplenn)")
    p.epilog = "recipes:\n" + "\n".join(
        f"  {name} {model}: " + ", ".join(f"{k} {v}" for k, v in values.items())
        for name, models in RECIPES.items()
        for model, values in models.items()
    )
    return p


def parse(argv=None):
    p = parser()
    args = run.parse(p, argv, extendable=lambda saved: saved["decay"] == "none")
    if not args.resume:
        recipe = RECIPES[args.recipe][args.model]
        for name in ("bn", "activation"):
            if name not in recipe and getattr(args, name) is not None:
                p.error(f"--{name}: {args.model} has no such option")
        for name, value in recipe.items():
            if getattr(args, name, None) is None:
                setattr(args, name, value)
    return args


def main(argv=None):
    args = parse(argv)
    train_set, val_set, test_set = data.load(args.data, args.data_dir, args.limit, auto=DATASET[args.model])
    args.data = train_set.name if args.data == "auto" else args.data
    with run.Run(args, __file__, f"{train_set.name}-{args.model}", AUTO_PRECISION) as r:
        r.note(dataset=train_set.facts() | {"train": len(train_set), "val": len(val_set), "test": len(test_set)})
        train_set, val_set, test_set = (part.to(r.device) for part in (train_set, val_set, test_set))
        model = train(args, r, train_set, val_set)

        best = run.read_checkpoint(r.folder / "best.pt", r.device)
        run.restore(model, best["model"], r.folder / "best.pt")
        val_loss, val_accuracy, _ = evaluate(model, val_set, r)
        test_loss, test_accuracy, logits = evaluate(model, test_set, r)
        draw_predictions(r.folder / "predictions.png", test_set, logits)
        r.finish(
            best_epoch=best["epoch"],
            val_loss=val_loss,
            val_accuracy=val_accuracy,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
        )
        r.say(
            f"test accuracy {test_accuracy:.2%} with the weights of epoch {best['epoch']} (validation "
            f"{val_accuracy:.2%}); {r.record['wall_s']:.0f} s; {run.shown(r.folder)}"
        )
    return r.record


if __name__ == "__main__":
    run.cli(main)
