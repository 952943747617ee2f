"""Train a residual network on CIFAR-10, MNIST, ImageNet or images of your own.

    python resnet/train.py                                   # ResNet-20 on CIFAR-10, the fast recipe
    python resnet/train.py --recipe paper                    # as He et al. 2015 did
    python resnet/train.py --data mnist                      # 99.6 % in 39 seconds on two cores
    python resnet/train.py --data builtin --epochs 3         # a look without any download
    python resnet/train.py --data FOLDER                     # ResNet-20 on your images, scaled to 32 x 32
    python resnet/train.py --data FOLDER --model resnet18    # the same images at 224 x 224
    torchrun --nproc-per-node=8 resnet/train.py --data imagenet --data-dir DIR --bs 2048 --lr 0.8

Validation chooses the epoch; that checkpoint is tested once, at the end. --bs is the batch of one optimizer step over
all processes, so a run on eight GPUs takes the same steps as on one. The recipe sets every
hyper-parameter; flags override it.
"""

import argparse
import contextlib
import time

from common import ddp, run

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import model
import optim

PAPER = dict(  # He et al. 2015, section 4.2: 64,000 steps; the learning rate is divided by 10 at 32,000 and 48,000
    epochs=182,
    bs=128,
    lr=0.1,
    decay="step",
    warmup=0.0,  # share of the run
    weight_decay=1e-4,
    augment="crop+flip",
    micro_batch=None,  # images of one forward pass in each process; None: its whole share of the batch
    optimizer="sgd",
    muon_decay=0.02,  # weight decay of Muon
    nesterov=False,
    label_smoothing=0.0,
    ema=0.0,  # decay of the average of weights; 0: no average
    whiten=False,  # the first convolution
    sizes=[[0.0, None]],  # [share of the run from which on, side of the training images in pixels], None: as they are
    compile=None,  # the type of device on which the network is compiled
)
FAST = dict(epochs=40, lr=0.2, decay="onecycle", weight_decay=5e-4, nesterov=True, label_smoothing=0.1)
RECIPES = {
    "paper": PAPER,
    "fast": PAPER | FAST | dict(optimizer="muon", sizes=[[0.0, 24], [0.5, 32]]),
    "mnist": PAPER | FAST | dict(epochs=5, augment="affine", compile="cuda"),
    "imagenet": PAPER
    | dict(epochs=90, bs=256, decay="cosine", warmup=5 / 90, nesterov=True, label_smoothing=0.1, ema=0.9999),
    "tiny": PAPER | dict(epochs=2, bs=50, lr=0.02, decay="none", limit=400),  # a second, for tests
}
VARIANTS = {  # of the fast recipe, each with one change: sweep.py --study parts measures its effect
    "sgd": dict(optimizer="sgd", lr=0.4),
    "hard-labels": dict(label_smoothing=0.0),
    "whitened": dict(whiten=True),
    "averaged": dict(ema=0.995),
    "full-size": dict(sizes=[[0.0, None]]),
}
RECIPES |= {f"fast-{name}": RECIPES["fast"] | change for name, change in VARIANTS.items()}
DEFAULTS = {"cifar": ("resnet20", "fast"), "mnist": ("mnist", "mnist"), "imagenet": ("resnet50", "imagenet")}
AUTO_PRECISION = "bf16"  # bench.py: 1.4 times as fast as fp32 if the hardware multiplies bfloat16
AUTO_THREADS = 1  # tools/seconds.py: a second one gains less than a fifth
SAVE_EVERY = 1000  # steps between checkpoints within an epoch


def train(args, r, net, train_set, val_set):
    """Train. Writes metrics.csv, last.pt and best.pt, the epoch of the highest validation accuracy."""
    optimizers = optim.build_optimizers(net, args)
    n, steps = data.examples_per_step(len(train_set), args.bs, r.world), data.steps_per_epoch(len(train_set), args.bs)
    average = optim.build_average(net, args.ema, args.epochs * steps) if args.ema else None
    eval_model = average.module if average else net  # the network that is validated, and saved as best.pt
    parts = {"model": net, "optimizers": optimizers} | ({"average": average} if average else {})
    first_epoch, step, best, totals = 0, 0, -1.0, torch.zeros(steps, 2)
    if state := r.load(**parts):
        first_epoch, step, best = (state[k] for k in ("epoch", "step", "best"))
        totals = totals if r.rank else state["totals"]  # which are summed over ranks
    r.note(muon_precision=optimizers[-1].param_groups[0].get("precision"))  # of its products; a resumed run keeps it
    totals = totals.to(r.device)  # summed loss and correct predictions of each step, in this process
    micro_batch = ddp.micro_batch_size(args.bs, args.micro_batch)
    ddp_model, no_sync = r.wrap(net)
    if args.compile == r.device.type:
        ddp_model = torch.compile(ddp_model, mode="reduce-overhead")

    def checkpoint(epoch, step):
        r.save(**parts, epoch=epoch, step=step, best=best, totals=r.all_reduce(totals.clone()))

    for epoch in range(first_epoch, args.epochs):
        net.train()
        began, first_step = time.monotonic(), step
        size = size_at(args.sizes, epoch / args.epochs)
        batches = train_set.batches(args.bs, (args.seed, epoch), args.augment, step, size, shard=(r.rank, r.world))
        title = f"epoch {epoch + 1}/{args.epochs}"
        bar = tqdm(batches, title, steps, initial=step, leave=False, disable=True if r.rank else None)
        for images, labels in bar:
            progress = (epoch + step / steps) / args.epochs
            optim.set_lr(optimizers, optim.lr_factor(args.decay, progress, args.warmup))
            for optimizer in optimizers:
                optimizer.zero_grad()
            micro_batches = list(zip(images.split(micro_batch), labels.split(micro_batch)))
            for k, (x, y) in enumerate(micro_batches, 1):
                # all-reduce gradients only in the last micro-batch
                with contextlib.nullcontext() if k == len(micro_batches) else no_sync():
                    with r.autocast():
                        logits = ddp_model(x)  # (B, C, H, W) -> (B, classes)
                        loss = F.cross_entropy(logits, y, label_smoothing=args.label_smoothing)
                    (loss * (len(y) / len(labels))).backward()
                totals[step] += torch.stack([loss.detach() * len(y), (logits.argmax(1) == y).sum()])
            for optimizer in optimizers:
                optimizer.step()
            if average:
                average.update_parameters(net)

            step += 1
            if step % 50 == 0:  # reading the loss at each step would stall a GPU
                loss, accuracy = means(totals[:step], n, epoch * steps, r)
                bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.1%}")
            stopping = r.should_stop()
            if stopping or step % SAVE_EVERY == 0:
                checkpoint(epoch, step)
            if stopping:
                r.stop()

        train_loss, train_accuracy = means(totals, n, epoch * steps, r)
        seconds = time.monotonic() - began
        r.broadcast_buffers(eval_model)
        val_loss, val_accuracy = evaluate(eval_model, val_set, r)
        r.check_finite(torch.tensor([val_loss]), (epoch + 1) * steps)
        r.log({"epoch": epoch + 1, "train_loss": train_loss, "val_loss": val_loss, "train_accuracy": train_accuracy,
               "val_accuracy": val_accuracy, "lr": optimizers[0].param_groups[0]["lr"],
               "seconds": round(seconds, 2)})  # fmt: skip
        r.print(f"epoch {epoch + 1:>3}/{args.epochs}   loss {train_loss:.3f} train {val_loss:.3f} val   accuracy "
                f"{train_accuracy:.1%} train {val_accuracy:.2%} val   "
                f"{(steps - first_step) * n / seconds:,.0f} images/s")  # fmt: skip
        if val_accuracy > best:
            best = val_accuracy
            r.save_best(model=eval_model, epoch=epoch + 1, classes=list(train_set.classes), mean=train_set.mean,
                        std=train_set.std)  # fmt: skip
        step = 0
        totals.zero_()
        checkpoint(epoch + 1, step)
    return eval_model


def build_model(args, train_set):
    """The network of `args`. Its weights are drawn from torch's generator, which the run has seeded."""
    net = model.build(args.model, len(train_set.classes), args.shortcut)
    if args.whiten:
        model.whiten(net.conv1, train_set.normalize(train_set.images[:5000]).cpu())
    return nn.SyncBatchNorm.convert_sync_batchnorm(net) if args.sync_bn else net


def size_at(sizes, progress):
    """The side of the training images in pixels at a share of the run; see `sizes` in the recipe."""
    return [pixels for since, pixels in sizes if progress >= since][-1]


def means(totals, n, first_step, r):
    """(loss, accuracy) of the steps from `first_step` on, of n images each; totals: (steps, 2) of each process. Raises
    Diverged."""
    totals = r.all_reduce(totals.clone())
    r.check_finite(totals[:, 0], first_step)
    return (totals.sum(0) / (len(totals) * n)).tolist()


@torch.no_grad()
def evaluate(net, dataset, r):
    """(mean cross-entropy, accuracy) over a dataset. Each process evaluates its share of the images. An image that
    could not be decoded, with the label -1, does not count. Raises UserError if none could."""
    net.eval()
    totals = torch.zeros(3, dtype=torch.float64)
    for images, labels in dataset.batches(dataset.eval_batch_size, shard=(r.rank, r.world)):
        with r.autocast():
            logits = net(images).float()
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-1)
        correct = ((logits.argmax(1) == labels) & (labels >= 0)).sum()
        totals += torch.stack([loss, correct, (labels >= 0).sum()]).cpu()
    loss, correct, count = r.all_reduce(totals).tolist()
    if not count:
        raise run.UserError(f"none of {len(dataset):,} images can be decoded any more; are the files still there?")
    return loss / count, correct / count


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=model.NAMES, help="those for CIFAR-10 take images cropped and scaled to 32 x 32, "
                   "mnist grey ones of 28 x 28, resnet18 and larger 224 x 224 (default: resnet20; mnist for MNIST and "
                   "other idx files; resnet50 for imagenet)")  # fmt: skip
    run.add_flags(p, recipe=dict(choices=list(RECIPES), help="(default: fast, mnist or imagenet, by the data)"))
    run.add_flags(p, "set", "tensorboard", "data_dir", "out", "resume",
                  data=dict(type=data.dataset_arg, default="auto", help=data.DATA_HELP))  # fmt: skip
    run.add_flags(p, "epochs", "bs", "lr", "weight_decay", "seed", "device", "threads", "precision", "limit")
    p.add_argument("--decay", choices=["none", "step", "cosine", "onecycle"], help="schedule of the learning rate")
    p.add_argument("--augment", choices=data.AUGMENT, help="augmentation of the training images")
    p.add_argument("--shortcut", choices=model.SHORTCUTS, help="option A or B of the paper, or none (CIFAR networks)")
    p.add_argument("--sync-bn", action="store_true", help="batch statistics over all processes (GPU)")
    p.epilog = "recipes, as they differ from the paper's:\n" + "\n".join(
        f"  {name}: " + ", ".join(f"{k} {v}" for k, v in values.items() if name == "paper" or PAPER.get(k) != v)
        for name, values in RECIPES.items()
    )
    return p


def recipe(args):
    """The recipe. The data chooses model and recipe if no flag names them. Raises UserError."""
    family = data.family_of_data(args.data)
    if family is None:  # the images are scaled to the network's input
        quick = "mnist" if args.data == "builtin" else "cifar"
        by_recipe = {"mnist": "mnist", "imagenet": "imagenet", "tiny": quick}.get(args.recipe, "cifar")
        family = data.family_of_model(args.model) if args.model else by_recipe
    default_model, default_recipe = DEFAULTS[family]
    args.model, args.recipe = args.model or default_model, args.recipe or default_recipe
    if data.family_of_model(args.model) != family:
        raise run.UserError(f"--model {args.model}: does not take the images of --data {args.data}")
    if args.recipe.split("-")[0] not in ("paper", "tiny", default_recipe):
        raise run.UserError(f"--recipe {args.recipe}: is not for {args.model}")
    if args.shortcut and family != "cifar":
        raise run.UserError(f"--shortcut {args.shortcut}: {args.model} has no such option")
    return RECIPES[args.recipe] | ({"shortcut": "A"} if family == "cifar" else {})


def check(args):
    """Raise UserError for arguments that do not fit together, and for values of --set that are out of range."""
    if data.family_of_model(args.model) == "imagenet" and (args.augment == "affine" or args.whiten):
        raise run.UserError(f"--augment affine and --set whiten=true: are not for {args.model}")
    if args.sync_bn and not torch.cuda.is_available():
        raise run.UserError("--sync-bn: needs a GPU")
    for name, choices in {"optimizer": ("sgd", "muon"), "compile": (None, "cpu", "cuda", "mps")}.items():
        if getattr(args, name) not in choices:
            raise run.UserError(f"--set {name}={getattr(args, name)}: must be one of {choices}")
    for name in ("warmup", "label_smoothing", "ema", "muon_decay"):
        if not 0 <= getattr(args, name) < 1:
            raise run.UserError(f"--set {name}={getattr(args, name)}: must be at least 0 and below 1")
    if not is_schedule(args.sizes):
        form = "[[0.0, PIXELS], [share of the run, PIXELS], ...] with 8 to 1999 pixels"
        raise run.UserError(f"--set sizes={args.sizes}: must be {form}")
    if not (args.micro_batch is None or type(args.micro_batch) is int and args.micro_batch > 0):
        raise run.UserError(f"--set micro_batch={args.micro_batch}: must be a whole number above 0")
    ddp.micro_batch_size(args.bs, args.micro_batch)


def is_schedule(sizes):
    """Is `sizes` a list of [share of the run from which on, pixels or None] that begins at 0?"""
    try:
        return sizes[0][0] == 0 and all(0 <= since < 1 and (pixels or 32) in range(8, 2000) for since, pixels in sizes)
    except (IndexError, TypeError, ValueError):
        return False


def parse(argv=None):
    def extendable(args):  # no schedule depends on the number of epochs
        return args.decay == "none" and not args.warmup and not args.ema and len(args.sizes) == 1

    return run.parse(__file__, parser(), argv, recipe, check, extendable)


def main(argv=None):
    args = parse(argv)
    *parts, facts = data.load(args.data, args.data_dir, args.limit, data.family_of_model(args.model))
    args.data = facts["name"] if args.data == "auto" else args.data
    name = f"{facts['name']}-{args.model}"
    with ddp.Run(
        args, __file__, name, auto_precision=AUTO_PRECISION, auto_threads=AUTO_THREADS, stop_within_epoch=True
    ) as r:
        train_set, val_set, test_set = (part and part.to(r.device) for part in parts)
        net = build_model(args, train_set).to(r.device, memory_format=torch.channels_last)
        parameters = model.num_parameters(net)
        if len(train_set) < r.world:
            raise run.UserError(f"{len(train_set)} training images are too few for {r.world} processes")
        side = f"{train_set.size} x {train_set.size} pixels"
        r.note(f"{args.model}, {parameters:,} parameters, on {facts['name']} at {side}: {len(train_set):,} training "
               f"images, {len(val_set):,} validation images", dataset=facts, parameters=parameters)  # fmt: skip
        net = train(args, r, net, train_set, val_set)

        evaluated = {"val": val_set} | ({"test": test_set} if test_set else {})
        final = {f"last_{name}_accuracy": evaluate(net, part, r)[1] for name, part in evaluated.items()}
        best = r.load_best(model=net)
        final["best_epoch"] = best["epoch"]
        for name, part in evaluated.items():
            loss, accuracy = evaluate(net, part, r)
            final |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        if isinstance(train_set, data.folders.LazyImageFolder):
            names = set().union(*(part.undecodable for part in (train_set, *evaluated.values())))
            final["undecodable"] = sorted(set().union(*r.gather(names)))
        r.finish(f"{name} accuracy {accuracy:.2%} with the weights of epoch {best['epoch']} (validation "
                 f"{final['val_accuracy']:.2%}), {final[f'last_{name}_accuracy']:.2%} with the last weights",
                 **final)  # fmt: skip
    return r.record


if __name__ == "__main__":
    run.cli(main)
