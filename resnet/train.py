"""Train a residual network on CIFAR-10, MNIST, ImageNet or images of your own.

    python resnet/train.py                                   # ResNet-20 on CIFAR-10, the fast recipe
    python resnet/train.py --recipe paper                    # as He et al. 2015 did
    python resnet/train.py --data mnist                      # 99.6 % in three minutes
    python resnet/train.py --data builtin --epochs 3         # a look without any download
    python resnet/train.py --data FOLDER                     # ResNet-20 on your images, scaled to 32 x 32
    python resnet/train.py --data FOLDER --model resnet18    # the same images at 224 x 224
    torchrun --nproc-per-node=8 resnet/train.py --data imagenet --data-dir DIR --bs 2048 --lr 0.8

Validation chooses the epoch; that checkpoint is tested once, at the end. --bs is the batch of one optimizer step over
all processes, so a run on eight GPUs takes the same steps as on one. The recipe sets every
hyper-parameter; flags override it.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import ClassVar

from common import ddp, run
from common.averages import build_average
from common.calibration import fit_temperature
from common.options import option
from common.schedules import lr_factor

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import model
import optim
from data import AUGMENT, DATA_HELP, dataset_arg
from model import CIFAR_DEPTHS, NAMES, SHORTCUTS

VARIANTS = {  # of the fast recipe, one each: sweep.py --study parts measures its effect
    "sgd": {"optimizer": "sgd", "lr": 0.4},
    "hard-labels": {"label_smoothing": 0.0},
    "whitened": {"whiten": True},
    "averaged": {"ema": 0.995},
    "full-size": {"first_size": None, "size": None},
}
RECIPE_NAMES = ["paper", "fast", "mnist", "imagenet", "tiny", *(f"fast-{name}" for name in VARIANTS)]


@dataclass(kw_only=True)
class Options(run.TrainOptions):
    data: str = option("auto", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    recipe: str = option("fast", "hyper-parameters; flags override them; chosen by the data", choices=RECIPE_NAMES)
    model: str = option(
        "resnet20",
        "those for CIFAR-10 take images cropped and scaled to 32 x 32, mnist grey ones of 28 x 28, resnet18 and larger "
        "224 x 224; chosen by the data: resnet20, mnist for MNIST and other idx files, resnet50 for imagenet",
        choices=NAMES,
    )
    epochs: int = option(182, "passes over the training set", above=0)
    bs: int = option(128, "images of one optimizer step, over all processes", above=0)
    micro_batch: int | None = option(
        None, "images of one forward pass in each process; none: its whole share of the batch", above=0
    )
    optimizer: str = option("sgd", "muon: for all convolutions but the first", choices=["sgd", "muon"])
    lr: float = option(0.1, "learning rate; its peak, if it is scheduled", above=0)
    decay: str = option("step", "schedule of the learning rate", choices=["none", "step", "cosine", "onecycle"])
    warmup: float = option(0.0, "share of the run in which the learning rate rises from 0", at_least=0, below=1)
    nesterov: bool = option(False, "Nesterov's momentum")
    weight_decay: float = option(1e-4, "weight decay (L2 penalty) of SGD", at_least=0)
    muon_decay: float = option(0.02, "weight decay of Muon", at_least=0, below=1)
    augment: str = option("crop+flip", "augmentation of the training images", choices=AUGMENT)
    size: int | None = option(None, "side of the training images in pixels; none: as they are", at_least=8, below=2000)
    first_size: int | None = option(
        None,
        "the same in the first half of the run, rounded up to epochs; none: as in the second",
        at_least=8,
        below=2000,
    )
    label_smoothing: float = option(0.0, "share of the target spread evenly over all classes", at_least=0, below=1)
    ema: float = option(
        0.0, "decay of the average of weights, over at most a tenth of the steps; 0: no average", at_least=0, below=1
    )
    compile: str | None = option(
        None, "the type of device on which the network is compiled", choices=["cpu", "cuda", "mps"]
    )
    sync_bn: bool = option(False, "batch statistics over all processes (GPU)")
    shortcut: str = option("A", "option A or B of the paper, or none", choices=SHORTCUTS, only=CIFAR_DEPTHS)
    whiten: bool = option(
        False, "begin with principal components in the first convolution", only=(*CIFAR_DEPTHS, "mnist")
    )

    variant: ClassVar[str] = "model"

    def check(self):
        if data.family_of_model(self.model) == "imagenet" and self.augment == "affine":
            raise run.UserError(f"--augment affine: is not for {self.model}")
        ddp.micro_batch_size(self.bs, self.micro_batch)


PAPER = Options()  # He et al. 2015, section 4.2: 64,000 steps; the learning rate is divided by 10 at 32,000 and 48,000
ONECYCLE = replace(PAPER, lr=0.2, decay="onecycle", weight_decay=5e-4, nesterov=True, label_smoothing=0.1)
FAST = replace(ONECYCLE, epochs=40, optimizer="muon", first_size=24, size=32)
RECIPES = {
    "paper": PAPER,
    "fast": FAST,
    "mnist": replace(ONECYCLE, epochs=5, augment="affine", compile="cuda"),
    "imagenet": replace(
        PAPER, epochs=90, bs=256, decay="cosine", warmup=5 / 90, nesterov=True, label_smoothing=0.1, ema=0.9999
    ),
    "tiny": replace(PAPER, epochs=2, bs=50, lr=0.02, decay="none", limit=400),  # a second, for tests
}
for name, change in VARIANTS.items():
    RECIPES[f"fast-{name}"] = replace(FAST, **change)
DEFAULTS = {"cifar": ("resnet20", "fast"), "mnist": ("mnist", "mnist"), "imagenet": ("resnet50", "imagenet")}
AUTO_PRECISION = "bf16"  # bench.py: 1.4 times as fast as fp32 if the hardware multiplies bfloat16
AUTO_THREADS = 1  # tools/seconds.py: a second one gains less than a fifth
SAVE_SECONDS = 240  # between checkpoints within an epoch


@dataclass
class Progress:
    """What a checkpoint holds beside the network, its average, and the optimizers."""

    totals: torch.Tensor  # (steps of an epoch, 2): summed loss and correct predictions of each step, in this process
    epoch: int = 0  # that is under way
    step: int = 0  # in this epoch
    best: float = -1.0  # highest validation accuracy


def begin(r, parts: dict, steps: int) -> Progress:
    """The progress of the run that is resumed, or of a new one. parts: what is loaded, by name."""
    progress = Progress(torch.zeros(steps, 2, device=r.device))
    if state := r.load(**parts):
        progress.epoch = state["epoch"]
        progress.step = state["step"]
        progress.best = state["best"]
        if r.rank == 0:  # a checkpoint has the totals of all processes
            progress.totals = state["totals"].to(r.device)
    return progress


def save(r, parts: dict, progress: Progress):
    totals = r.all_reduce(progress.totals.clone())
    r.save(**parts, **vars(progress) | {"totals": totals})


def backward(ddp_model, images, labels, micro_batch, label_smoothing, r):
    """Compute the gradients of the mean loss over a batch, a micro-batch at a time. Returns (2,): the summed loss and
    the number of correct predictions."""
    total = torch.zeros(2, device=r.device)
    for x, y in ddp.micro_batches(ddp_model, micro_batch, images, labels):
        with r.autocast():
            logits = ddp_model(x)  # (B, C, H, W) -> (B, classes)
            loss = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
        (loss * (len(y) / len(labels))).backward()
        correct = (logits.argmax(1) == y).sum()
        total += torch.stack([loss.detach() * len(y), correct])
    return total


def train(args, r, net, train_set, val_set):
    """Train. Writes metrics.csv, last.pt and best.pt, the epoch of the highest validation accuracy."""
    optimizers = optim.build_optimizers(net, args)
    bs = data.examples_per_step(len(train_set), args.bs, r.world)
    steps = data.steps_per_epoch(len(train_set), args.bs)
    average = build_average(net, args.ema, args.epochs * steps) if args.ema else None
    eval_model = average.module if average else net  # the network that is validated, and saved as best.pt
    parts = {"model": net, "optimizers": optimizers}
    if average:
        parts["average"] = average
    progress = begin(r, parts, steps)
    r.note(muon_precision=optimizers[-1].param_groups[0].get("precision"))  # of its products; a resumed run keeps it
    ddp_model = distribute(args, r, net)
    micro_batch = ddp.micro_batch_size(args.bs, args.micro_batch)

    for epoch in range(progress.epoch, args.epochs):
        net.train()
        began, first_step = time.monotonic(), progress.step
        batches = train_set.batches(
            args.bs, (args.seed, epoch), args.augment, first_step, size_at(args, epoch), shard=(r.rank, r.world)
        )
        hidden = True if r.rank else None  # None: only on a terminal
        bar = tqdm(batches, f"epoch {epoch + 1}/{args.epochs}", steps, initial=first_step, leave=False, disable=hidden)
        for images, labels in bar:
            done = (epoch + progress.step / steps) / args.epochs  # the fraction of the training
            optim.set_lr(optimizers, lr_factor(args.decay, done, args.warmup, args.epochs * steps))
            for optimizer in optimizers:
                optimizer.zero_grad()
            progress.totals[progress.step] = backward(ddp_model, images, labels, micro_batch, args.label_smoothing, r)
            for optimizer in optimizers:
                optimizer.step()
            if average:
                average.update_parameters(net)

            progress.step += 1
            if progress.step % 50 == 0:  # reading the loss at each step would stall a GPU
                mean_loss, mean_accuracy = means(progress.totals[: progress.step], bs, epoch * steps, r)
                bar.set_postfix(loss=f"{mean_loss:.3f}", accuracy=f"{mean_accuracy:.1%}")
            stopping = r.should_stop()
            if stopping or r.save_due(SAVE_SECONDS):
                save(r, parts, progress)
            if stopping:
                r.stop()

        train_loss, train_accuracy = means(progress.totals, bs, epoch * steps, r)
        seconds = time.monotonic() - began
        r.broadcast_buffers(eval_model)
        val_loss, val_accuracy = evaluate(eval_model, val_set, r)
        r.check_finite(torch.tensor([val_loss]), (epoch + 1) * steps)
        row = {"epoch": epoch + 1, "train_loss": train_loss, "val_loss": val_loss}
        row |= {"train_accuracy": train_accuracy, "val_accuracy": val_accuracy}
        r.log(row | {"lr": optimizers[0].param_groups[0]["lr"], "epoch_seconds": round(seconds, 2)})
        r.print(
            f"epoch {epoch + 1:>3}/{args.epochs}   loss {train_loss:.3f} train {val_loss:.3f} val   accuracy "
            f"{train_accuracy:.1%} train {val_accuracy:.2%} val   {(steps - first_step) * bs / seconds:,.0f} images/s"
        )
        if val_accuracy > progress.best:
            progress.best = val_accuracy
            facts = {"classes": list(train_set.classes), "mean": train_set.mean, "std": train_set.std}
            r.save_best(model=eval_model, epoch=epoch + 1, **facts)
        progress.epoch, progress.step = epoch + 1, 0
        save(r, parts, progress)
    return eval_model


def distribute(args, r, net):
    """The network that computes gradients: averaged over all processes under torchrun, and compiled if asked for."""
    ddp_model, _ = r.wrap(net)
    if args.compile == r.device.type:
        return torch.compile(ddp_model, mode="reduce-overhead")
    return ddp_model


def build_model(args, train_set):
    """The network of `args`. Its weights are drawn from torch's generator, which the run has seeded."""
    net = model.build(args.model, len(train_set.classes), args.shortcut)
    if args.whiten:
        model.whiten(net.conv1, train_set.normalize(train_set.images[:5000]).cpu())
    return nn.SyncBatchNorm.convert_sync_batchnorm(net) if args.sync_bn else net


def size_at(args, epoch):
    """The side of the training images in pixels in an epoch; None: as they are."""
    if args.first_size is not None and 2 * epoch < args.epochs:
        return args.first_size
    return args.size


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


@torch.no_grad()
def temperature_of(net, dataset, r):
    """The temperature that calibrates the probabilities of the network: see common/calibration.py."""
    net.eval()
    batches = []
    for images, labels in dataset.batches(dataset.eval_batch_size, shard=(r.rank, r.world)):
        with r.autocast():
            logits = net(images).float()
        batches.append((logits.cpu(), labels.cpu()))
    batches = [batch for share in r.gather(batches) for batch in share]  # of all processes
    logits, labels = (torch.cat(parts) for parts in zip(*batches))
    decoded = labels >= 0
    return fit_temperature(logits[decoded], labels[decoded])


def recipe(given: dict) -> Options:
    """The recipe for the flags `given`. The data chooses model and recipe if no flag names them. Raises UserError."""
    dataset = given.get("data", "auto")
    family = data.family_of_data(dataset)
    if family is None and "model" in given:  # the images are scaled to the network's input
        family = data.family_of_model(given["model"])
    elif family is None:
        quick = "mnist" if dataset == "builtin" else "cifar"
        family = {"mnist": "mnist", "imagenet": "imagenet", "tiny": quick}.get(given.get("recipe"), "cifar")
    default_model, default_recipe = DEFAULTS[family]
    name, network = given.get("recipe", default_recipe), given.get("model", default_model)
    if data.family_of_model(network) != family:
        raise run.UserError(f"--model {network}: does not take the images of --data {dataset}")
    if name.split("-")[0] not in ("paper", "tiny", default_recipe):
        raise run.UserError(f"--recipe {name}: is not for {network}")
    found = replace(RECIPES[name], recipe=name, model=network)
    refuse_unread(given, found)
    return found


def refuse_unread(given: dict, base: Options):
    """Raise UserError if a flag in `given` changes a value of the recipe `base` that would not be read. Records of
    earlier versions may have such values."""
    decay, optimizer = given.get("decay", base.decay), given.get("optimizer", base.optimizer)
    warmup, muon_decay = given.get("warmup", 0.0), given.get("muon_decay", base.muon_decay)
    if decay == "onecycle" and warmup:
        raise run.UserError(f"--warmup {warmup:g}: is not for --decay onecycle, which rises by itself")
    if optimizer != "muon" and muon_decay != base.muon_decay:
        raise run.UserError(f"--muon-decay {muon_decay:g}: is for --optimizer muon")


def parse(argv=None) -> Options:
    def extendable(args):  # no schedule depends on the number of epochs
        return args.decay == "none" and not args.warmup and not args.ema and args.first_size is None

    return run.parse_options(__file__, Options, argv, recipe, extendable)


def main(argv=None):
    args = parse(argv)
    if args.sync_bn and not torch.cuda.is_available():
        raise run.UserError("--sync-bn: needs a GPU")
    *parts, facts = data.load(args.data, args.data_dir, args.limit, data.family_of_model(args.model))
    args.data = facts["name"] if args.data == "auto" else args.data
    name = f"{facts['name']}-{args.model}"
    with ddp.Run(
        args, __file__, name, auto_precision=AUTO_PRECISION, auto_threads=AUTO_THREADS, stop_within_epoch=True
    ) as r:
        train_set, val_set, test_set = (part and part.to(r.device) for part in parts)
        net = build_model(args, train_set).to(r.device, memory_format=torch.channels_last)
        parameters = run.count_parameters(net)
        if len(train_set) < r.world:
            raise run.UserError(f"{len(train_set)} training images are too few for {r.world} processes")
        side = f"{train_set.size} x {train_set.size} pixels"
        r.note(
            f"{args.model}, {parameters:,} parameters, on {facts['name']} at {side}: {len(train_set):,} training "
            f"images, {len(val_set):,} validation images",
            dataset=facts,
            parameters=parameters,
        )
        net = train(args, r, net, train_set, val_set)

        evaluated = {"val": val_set}
        if test_set:
            evaluated["test"] = test_set
        final = {f"last_{name}_accuracy": evaluate(net, part, r)[1] for name, part in evaluated.items()}
        best = r.load_best(model=net)
        final["best_epoch"] = best["epoch"]
        for name, part in evaluated.items():
            loss, accuracy = evaluate(net, part, r)
            final |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        final["temperature"] = temperature_of(net, val_set, r)
        if isinstance(train_set, data.folders.LazyImageFolder):
            names = set().union(*(part.undecodable for part in (train_set, *evaluated.values())))
            final["undecodable"] = sorted(set().union(*r.gather(names)))
        text = (
            f"{name} accuracy {accuracy:.2%} with the weights of epoch {best['epoch']} (validation "
            f"{final['val_accuracy']:.2%}), {final[f'last_{name}_accuracy']:.2%} with the last weights"
        )
        r.finish(text, uniform_loss=math.log(len(train_set.classes)), **final)
    return r.record


if __name__ == "__main__":
    run.cli(main)
