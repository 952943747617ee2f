"""94% on CIFAR-10 in minutes of two CPU cores: a network without shortcuts, made for speed (Jordan 2024).

    python resnet/airbench.py                    # train on all 50,000 images, test once
    python resnet/airbench.py --held-out         # train on 45,000 and validate on the rest; no test image is read
    python resnet/airbench.py --epochs 4         # less accurate, sooner
    python resnet/airbench.py --data builtin     # a look without any download

The ideas are from "94% on CIFAR-10 in 3.29 seconds on a single GPU" (arXiv:2404.00498) and its successor with Muon:
a first layer that whitens, filters that begin as the identity, updates that are orthogonal matrices, and every image
flipped in every second epoch. What a CPU adds: the first half of the training sees images of 24 x 24 pixels, and a
batch is small, because no GPU has to be filled.

Two accuracies are reported: of one view of each image, and of six.
"""

import math
import time
from dataclasses import dataclass
from typing import ClassVar

from common import ddp, run
from common.options import option

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
import model
import optim
import train

DATA_HELP = "cifar10, builtin, auto (cifar10), or a folder of images, with one subfolder per class"
AUTO_PRECISION = "bf16"  # if the hardware multiplies it
AUTO_THREADS = None  # all cores: the convolutions are large
SAVE_SECONDS = 240  # between checkpoints within an epoch
MUON_MOMENTUM = 0.6
SGD_MOMENTUM = 0.85
BIAS_LR = 0.053  # of SGD, for an example: the batch size multiplies it
HEAD_LR = 0.67
SGD_DECAY = 2e-6  # of biases and of the last layer in a step, for an example
AUGMENT = "crop+flip"
MARGIN = 2  # pixels by which a crop is moved at most


@dataclass(kw_only=True)
class Options(run.TrainOptions):
    data: str = option("auto", DATA_HELP, type=run.dataset_arg("auto", "builtin", "cifar10"), metavar="NAME|PATH")
    held_out: bool = option(False, "train without the validation images, test on them, and read no test image")
    epochs: int = option(10, "passes over the training set", above=0)
    bs: int = option(500, "images of one optimizer step", above=0)
    micro_batch: int = option(250, "images of one forward pass in each process, at most", above=0)
    lr: float = option(0.12, "the first step of Muon, relative to the norm of a layer's weights", above=0, at_most=1)
    width: int = option(64, "channels of the first group; the others have four times as many", at_least=12, at_most=512)
    first_size: int | None = option(
        24,
        "side of the images in the first half of the run, rounded up to epochs; none: always as they are",
        at_least=16,
        below=2000,
    )
    size: int | None = option(None, "the same in the second half; none: as they are", at_least=16, below=2000)
    label_smoothing: float = option(0.2, "share of the target spread evenly over all classes", at_least=0, below=1)

    model: ClassVar[str] = "airbench"  # as train.py's options name theirs

    def check(self):
        ddp.micro_batch_size(self.bs)


# ---------------------------------------------------------------------------------------------------------- the network


class BatchNorm(nn.BatchNorm2d):
    """With a bias and no weight."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.weight.requires_grad_(False)


class Convolution(nn.Conv2d):
    """3 x 3. The first c_in of its filters begin as the identity, so that the first steps already see the image."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, 3, padding=1, bias=False)
        nn.init.dirac_(self.weight.data[:c_in])


class Group(nn.Module):
    """Two convolutions with a pooling behind the first: (N, c_in, H, W) -> (N, c_out, H / 2, W / 2)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv1 = Convolution(c_in, c_out)
        self.bn1 = BatchNorm(c_out)
        self.conv2 = Convolution(c_out, c_out)
        self.bn2 = BatchNorm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.gelu(self.bn1(x))
        return F.gelu(self.bn2(self.conv2(x)))


class Network(nn.Module):
    """A whitening layer, three groups, the maximum over all pixels, and a linear layer. Without shortcuts, seven
    trained layers are deep enough."""

    def __init__(self, num_classes: int = 10, width: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 2)  # the 12 principal components of patches of 2 x 2, and their negatives
        self.conv1.weight.requires_grad_(False)
        nn.init.zeros_(self.conv1.bias)
        self.groups = nn.Sequential(Group(24, width), Group(width, 4 * width), Group(4 * width, 4 * width))
        self.fc = nn.Linear(4 * width, num_classes, bias=False)
        nn.init.normal_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) -> logits (N, num_classes); other sizes work too."""
        x = F.gelu(self.conv1(x))  # (N, 3, 32, 32) -> (N, 24, 31, 31)
        x = self.groups(x)  # -> (N, w, 15, 15) -> (N, 4 w, 7, 7) -> (N, 4 w, 3, 3)
        x = F.adaptive_max_pool2d(x, 1).flatten(1)  # -> (N, 4 w)
        return self.fc(x) / x.shape[1]


class SixViews(nn.Module):
    """The mean logits of an image, of the image moved by a pixel up and left, and down and right, and of all three
    mirrored. The image itself counts twice as much as each of the moved ones (Jordan 2024, section 3.5)."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, num_classes)"""
        size = images.shape[-1]
        framed = F.pad(images, (1, 1, 1, 1), "reflect")
        up_left = framed[:, :, :size, :size]
        down_right = framed[:, :, 2:, 2:]
        logits = 0.5 * self.both_ways(images)
        return logits + 0.25 * self.both_ways(up_left) + 0.25 * self.both_ways(down_right)

    def both_ways(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        return (self.net(images) + self.net(images.flip(3))) / 2


# --------------------------------------------------------------------------------------------------------- the training


def build_optimizers(net: Network, args) -> list[torch.optim.Optimizer]:
    """SGD for the biases and the last layer, Muon for the convolutions."""
    filters = [module.weight for module in net.modules() if isinstance(module, Convolution)]
    biases = [module.bias for module in net.modules() if isinstance(module, BatchNorm)]
    groups = [
        {"params": [net.conv1.bias, *biases], "lr": args.bs * BIAS_LR, "weight_decay": SGD_DECAY / BIAS_LR},
        {"params": [net.fc.weight], "lr": args.bs * HEAD_LR, "weight_decay": SGD_DECAY / HEAD_LR},
    ]
    precision = optim.precision_on(net.fc.weight.device)
    optimizers = [
        torch.optim.SGD(groups, momentum=SGD_MOMENTUM, nesterov=True),
        optim.ConvMuon(filters, args.lr, MUON_MOMENTUM, precision=precision),
    ]
    optim.set_peaks(optimizers)
    return optimizers


@torch.no_grad()
def normalize_filters(net: Network):
    """Scale the weights of each convolution to the norm of an orthogonal matrix, sqrt(c_out). Batch normalization
    follows, so their length means nothing; but a step of length `lr` now turns them equally far in every layer."""
    for module in net.modules():
        if isinstance(module, Convolution):
            module.weight.mul_(module.out_channels**0.5 / module.weight.norm())


def fit(args, r, net: Network, train_set: data.Images, val_set: data.Images | None):
    """Train. Writes metrics.csv, last.pt, and in the end best.pt, the last weights."""
    optimizers = build_optimizers(net, args)
    parts = {"model": net, "optimizers": optimizers}
    steps = data.steps_per_epoch(len(train_set), args.bs)
    bs = data.examples_per_step(len(train_set), args.bs, r.world)
    progress = train.begin(r, parts, steps)
    ddp_model, _ = r.wrap(net)

    for epoch in range(progress.epoch, args.epochs):
        net.train()
        began, first_step = time.monotonic(), progress.step
        size = train.size_at(args, epoch)
        batches = train_set.batches(args.bs, (args.seed, epoch), AUGMENT, first_step, size, shard=(r.rank, r.world))
        hidden = True if r.rank else None  # None: only on a terminal
        bar = tqdm(batches, f"epoch {epoch + 1}/{args.epochs}", steps, initial=first_step, leave=False, disable=hidden)
        for images, labels in bar:
            done = (epoch + progress.step / steps) / args.epochs  # the fraction of the training
            optim.set_lr(optimizers, 1 - done)
            normalize_filters(net)
            for optimizer in optimizers:
                optimizer.zero_grad()
            totals = train.backward(ddp_model, images, labels, args.micro_batch, args.label_smoothing, r)
            for optimizer in optimizers:
                optimizer.step()

            progress.totals[progress.step] = totals
            progress.step += 1
            if progress.step % 10 == 0:
                mean_loss, mean_accuracy = train.means(progress.totals[: progress.step], bs, epoch * steps, r)
                bar.set_postfix(loss=f"{mean_loss:.3f}", accuracy=f"{mean_accuracy:.1%}")
            stopping = r.should_stop()
            if stopping or r.save_due(SAVE_SECONDS):
                train.save(r, parts, progress)
            if stopping:
                r.stop()

        train_loss, train_accuracy = train.means(progress.totals, bs, epoch * steps, r)
        seconds = time.monotonic() - began
        r.broadcast_buffers(net)
        row = {"epoch": epoch + 1, "train_loss": train_loss, "train_accuracy": train_accuracy}
        text = f"epoch {epoch + 1:>2}/{args.epochs}   loss {train_loss:.3f}   accuracy {train_accuracy:.1%} train"
        if val_set:
            row["val_loss"], row["val_accuracy"] = train.evaluate(net, val_set, r)
            text += f" {row['val_accuracy']:.2%} val"
        r.log(row | {"epoch_seconds": round(seconds, 2)})
        r.print(f"{text}   {(steps - first_step) * bs / seconds:,.0f} images/s")
        progress.epoch, progress.step = epoch + 1, 0
        train.save(r, parts, progress)
    r.save_best(model=net, classes=list(train_set.classes), mean=train_set.mean, std=train_set.std)


def join(first: data.Images, second: data.Images) -> data.Images:
    images = torch.cat([first.images, second.images])
    labels = torch.cat([first.labels, second.labels])
    return data.Images(images, labels, first.classes, first.mean, first.std)


def build_model(args, train_set: data.Images) -> Network:
    net = Network(len(train_set.classes), args.width)
    model.whiten(net.conv1, train_set.normalize(train_set.images[:5000]).cpu())
    return net


def parse(argv=None) -> Options:
    return run.parse_options(__file__, Options, argv)


def main(argv=None):
    args = parse(argv)
    train_set, val_set, test_set, facts = data.load(args.data, args.data_dir, args.limit)
    args.data = facts["name"] if args.data == "auto" else args.data
    if args.held_out:
        judged, part = val_set, "val"
    else:
        train_set = join(train_set, val_set)
        judged, part = test_set, "test"
    name = f"{facts['name']}-airbench"
    with ddp.Run(
        args, __file__, name, auto_precision=AUTO_PRECISION, auto_threads=AUTO_THREADS, stop_within_epoch=True
    ) as r:
        train_set, judged = train_set.to(r.device), judged.to(r.device)
        train_set.margin, train_set.border = MARGIN, "mirror"
        net = build_model(args, train_set).to(r.device, memory_format=torch.channels_last)
        parameters = run.count_parameters(net)
        r.note(
            f"{parameters:,} parameters, on {facts['name']}: {len(train_set):,} training images",
            dataset=facts,
            parameters=parameters,
        )
        fit(args, r, net, train_set, judged if args.held_out else None)
        loss, accuracy = train.evaluate(net, judged, r)
        _, accuracy_of_six = train.evaluate(SixViews(net), judged, r)
        final = {f"{part}_loss": loss, f"{part}_accuracy": accuracy, f"{part}_accuracy_of_six_views": accuracy_of_six}
        text = f"{part} accuracy {accuracy:.2%}, {accuracy_of_six:.2%} with six views of each image"
        r.finish(text, uniform_loss=math.log(len(train_set.classes)), **final)
    return r.record


if __name__ == "__main__":
    run.cli(main)
