"""Train a residual network on CIFAR-10, MNIST or ImageNet.

    python resnet/train.py                                   # ResNet-20 on CIFAR-10, the fast recipe
    python resnet/train.py --recipe paper                    # as He et al. 2015 did
    python resnet/train.py --data mnist                      # 99.5 % in seconds
    python resnet/train.py --data builtin --epochs 3         # a look without any download
    torchrun --nproc-per-node=8 resnet/train.py --data imagenet --data-dir DIR --bs 2048 --lr 0.8

Validation chooses the epoch; that checkpoint is tested once, at the end. --bs is what one step takes over all processes
together, so that a run on eight GPUs is the run on one, only sooner. A recipe sets whatever flags leave open.
"""

import argparse
import contextlib
import math
import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import data
import model
import run

PAPER = dict(  # He et al. 2015, section 4.2: 64,000 iterations, a tenth of the rate after 32,000 and after 48,000
    epochs=182,
    bs=128,
    lr=0.1,
    decay="step",
    warmup=0.0,
    weight_decay=1e-4,
    augment="crop+flip",
    accumulate=1,
    optimizer="sgd",
    nesterov=False,
    label_smoothing=0.0,
    ema=0.0,
    whiten=False,
    sizes=[[0.0, None]],
    compile=False,
)
RECIPES = {
    "paper": PAPER,
    "fast": PAPER
    | dict(
        epochs=40,
        lr=0.2,
        decay="onecycle",
        weight_decay=5e-4,
        nesterov=True,
        optimizer="muon",
        muon_decay=0.02,
        label_smoothing=0.1,
        sizes=[[0.0, 24], [0.5, 32]],
    ),
    "mnist": PAPER
    | dict(
        epochs=5,
        lr=0.2,
        decay="onecycle",
        weight_decay=5e-4,
        nesterov=True,
        augment="affine",
        label_smoothing=0.1,
        compile="cuda",
    ),
    "imagenet": PAPER
    | dict(epochs=90, bs=256, decay="cosine", warmup=5 / 90, nesterov=True, label_smoothing=0.1, ema=0.9999),
}
VARIANTS = {  # of the fast recipe, each with one thing changed: sweep.py --study parts measures what it is worth
    "sgd": dict(optimizer="sgd", lr=0.4),
    "hard-labels": dict(label_smoothing=0.0),
    "whitened": dict(whiten=True),
    "averaged": dict(ema=0.995),
    "full-size": dict(sizes=[[0.0, None]]),
}
RECIPES |= {f"fast-{name}": RECIPES["fast"] | change for name, change in VARIANTS.items()}
DEFAULTS = {"cifar": ("resnet20", "fast"), "mnist": ("mnist", "mnist"), "imagenet": ("resnet50", "imagenet")}
AUTO_PRECISION = "bf16"  # bench.py: 1.4 times the rate of fp32 where the hardware multiplies it
SAVE_EVERY = 1000  # steps between checkpoints within an epoch, beside the one at its end


def decay_factor(decay: str, progress: float, warmup: float = 0.0) -> float:
    """What the learning rate is multiplied by when the share `progress` in [0, 1) of all steps is done; it rises from
    zero over the first `warmup` of them. "onecycle" has a rise of its own."""
    if decay == "onecycle":  # up from zero for a fifth of the run, then down to zero (Smith and Topin 2017)
        return min(progress / 0.2, (1 - progress) / 0.8)
    if progress < warmup:
        return progress / warmup
    if decay == "step":
        return 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
    if decay == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    return 1.0


def size_at(sizes: list, progress: float) -> int | None:
    """The side of the training pictures, from [[share of the run from which on, pixels], ...]; None: as they are."""
    return [pixels for since, pixels in sizes if progress >= since][-1]


class ConvMuon(torch.optim.Muon):
    """Muon (Jordan et al. 2024), which takes matrices, for convolutions: each as a view (c_out, k * k * c_in)."""

    def __init__(self, weights, **options):
        self.weights = weights  # channels last in memory, so that the view is one and updates reach the weights
        super().__init__([nn.Parameter(w.detach().permute(0, 2, 3, 1).flatten(1)) for w in weights], **options)

    def zero_grad(self):
        for weight in self.weights:
            weight.grad = None

    def step(self):
        for weight, view in zip(self.weights, self.param_groups[0]["params"]):
            view.grad = weight.grad.permute(0, 2, 3, 1).flatten(1)
        super().step()


def build_optimizers(net, args):
    """SGD for all; or Muon, at a tenth of the rate, for convolutions after the first, and SGD for the rest."""
    weights = []
    if args.optimizer == "muon":
        weights = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d) and m is not net.conv1]
    rest = [p for p in net.parameters() if not any(p is w for w in weights)]
    fused = rest[0].device.type in ("cpu", "cuda")
    optimizers = [
        torch.optim.SGD(
            rest, args.lr, momentum=0.9, weight_decay=args.weight_decay, nesterov=args.nesterov, fused=fused
        )
    ]
    if weights:
        optimizers.append(ConvMuon(weights, lr=args.lr / 10, momentum=0.9, weight_decay=args.muon_decay))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return optimizers


def average_of(net, ema, steps):
    """The exponential average of weights and statistics over 1 / (1 - ema) steps, a tenth of all `steps` at most: what
    a short run began with would otherwise be in it to the end."""
    ema = max(0.0, min(ema, 1 - 10 / steps))
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True)


def build_model(args, train_set):
    """The network of `args`, its weights drawn with torch's generator as run.Run has seeded it."""
    net = model.build(args.model, len(train_set.classes), args.shortcut)
    if args.whiten:
        model.whiten(net.conv1, train_set.normalize(train_set.images[:5000]).cpu())
    return net


def add_up(tensor, r):
    """Sum `tensor` over all processes, in place."""
    if r.world > 1:
        dist.all_reduce(tensor)
    return tensor


def names_over_ranks(names, r):
    """The union of all processes' sets of names, sorted."""
    gathered = [names] * r.world
    if r.world > 1:
        dist.all_gather_object(gathered, names)
    return sorted(set().union(*gathered))


def share_statistics(net, r):
    """Batch statistics are each process's own: from here on all have those of the first."""
    if r.world > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)


def train(args, r, train_set, val_set):
    """Train, and leave in r.folder last.pt, best.pt (the epoch of the highest validation accuracy) and metrics.csv."""
    net = build_model(args, train_set).to(r.device, memory_format=torch.channels_last)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net) if args.sync_bn else net
    optimizers = build_optimizers(net, args)
    n, steps = data.full_batch(len(train_set), args.bs, r.world), data.steps_per_epoch(len(train_set), args.bs)
    average = average_of(net, args.ema, args.epochs * steps) if args.ema else None
    judged = average.module if args.ema else net  # what is validated, and kept as best.pt
    r.note(parameters=model.count_parameters(net))
    r.say(
        f"{args.model}, {model.count_parameters(net):,} parameters, on {train_set.name}: {len(train_set):,} images "
        f"to train on, {len(val_set):,} to validate\n{r.hardware}" + f", {r.world} processes" * (r.world > 1)
    )

    first_epoch, step, reduced, tally, best = 0, 0, 0, torch.zeros(steps, 2), -1.0
    if state := r.load():
        run.restore(net, state["model"], r.folder / "last.pt")
        if average:
            run.restore(average, state["average"], r.folder / "last.pt")
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        first_epoch, step, tally, best = (state[k] for k in ("epoch", "step", "tally", "best"))
        reduced = step
    tally = tally.to(r.device)  # loss and right answers, summed, of every step: looked at now and then
    wrapped, waiting = net, contextlib.nullcontext
    if r.world > 1:
        wrapped = DistributedDataParallel(net, device_ids=[r.device.index] if r.device.type == "cuda" else None)
        waiting = wrapped.no_sync
    if args.compile is True or args.compile == r.device.type:
        wrapped = torch.compile(wrapped, mode="reduce-overhead")  # as CUDA graphs, on a GPU

    def checkpoint(epoch, step):
        r.save(
            {
                "model": net.state_dict(),
                "average": average.state_dict() if average else {},
                "epoch": epoch,
                "step": step,
                "tally": tally,
                "best": best,
                "optimizers": [o.state_dict() for o in optimizers],
            }
        )

    for epoch in range(first_epoch, args.epochs):
        net.train()
        began, skipped = time.monotonic(), step
        batches = train_set.batches(
            args.bs,
            shuffle=(args.seed, epoch),
            augment=args.augment,
            skip=step,
            size=size_at(args.sizes, epoch / args.epochs),
            shard=(r.rank, r.world),
        )
        bar = tqdm(
            batches,
            f"epoch {epoch + 1}/{args.epochs}",
            steps,
            initial=step,
            leave=False,
            disable=True if r.rank else None,
        )
        for images, labels in bar:
            factor = decay_factor(args.decay, (epoch + step / steps) / args.epochs, args.warmup)
            for optimizer in optimizers:
                optimizer.zero_grad()
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * factor
            pieces = list(zip(images.chunk(args.accumulate), labels.chunk(args.accumulate)))
            for k, (x, y) in enumerate(pieces, 1):
                with waiting() if k < len(pieces) else contextlib.nullcontext():  # gradients meet after the last one
                    with r.autocast():
                        logits = wrapped(x)  # (B, C, H, W) -> (B, classes)
                        loss = F.cross_entropy(logits, y, label_smoothing=args.label_smoothing)
                    (loss * (len(y) / len(labels))).backward()
                tally[step] += torch.stack([loss.detach() * len(y), (logits.argmax(1) == y).sum()])
            for optimizer in optimizers:
                optimizer.step()
            if average:
                average.update_parameters(net)

            step += 1
            stopping = r.stopping
            if step % 50 == 0 or step == steps or stopping:
                add_up(tally[reduced:step], r)
                reduced = step
                r.check_finite(tally[:step, 0], epoch * steps)
                loss, accuracy = (tally[:step].sum(0) / (step * n)).tolist()
                bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.1%}")
            if stopping or step % SAVE_EVERY == 0 and step < steps:
                checkpoint(epoch, step)
                if stopping:
                    r.stop()

        seconds = time.monotonic() - began
        train_loss, train_accuracy = (tally.sum(0) / (steps * n)).tolist()
        share_statistics(judged, r)
        val_loss, val_accuracy = evaluate(judged, val_set, r)
        r.check_finite(torch.tensor([val_loss]), (epoch + 1) * steps)
        r.log(
            {
                "epoch": epoch + 1,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "train_accuracy": train_accuracy,
                "val_accuracy": val_accuracy,
                "lr": optimizers[0].param_groups[0]["lr"],
                "seconds": round(seconds, 2),
            }
        )
        r.say(
            f"epoch {epoch + 1:>3}/{args.epochs}   loss {train_loss:.3f} train {val_loss:.3f} val   accuracy "
            f"{train_accuracy:.1%} train {val_accuracy:.2%} val   {(steps - skipped) * n / seconds:,.0f} images/s"
        )
        if val_accuracy > best:
            best = val_accuracy
            r.save(
                {
                    "model": judged.state_dict(),
                    "epoch": epoch + 1,
                    "classes": list(train_set.classes),
                    "mean": train_set.mean,
                    "std": train_set.std,
                },
                "best.pt",
            )
        step, reduced = 0, 0
        tally.zero_()
        checkpoint(epoch + 1, step)
    return judged


@torch.no_grad()
def evaluate(net, dataset, r):
    """(mean cross-entropy, accuracy) over a dataset. Every process takes its share of the pictures, and none twice; a
    picture that could not be decoded, with the label -1, has no weight."""
    net.eval()
    total = torch.zeros(3, dtype=torch.float64)
    for images, labels in dataset.batches(dataset.at_once, shard=(r.rank, r.world)):
        with r.autocast():
            logits = net(images).float()
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-1)
        right = ((logits.argmax(1) == labels) & (labels >= 0)).sum()
        total += torch.stack([loss, right, (labels >= 0).sum()]).cpu()
    loss, right, count = add_up(total, r).tolist()
    return loss / max(count, 1), right / max(count, 1)


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*model.CIFAR_DEPTHS, "mnist", *model.IMAGENET_DEPTHS]
    p.add_argument("--model", choices=names, help="(default: resnet20, mnist or resnet50, by the data)")
    p.add_argument("--recipe", choices=list(RECIPES), help="(default: fast, mnist or imagenet, by the data)")
    run.add_flags(p, "data_dir", "out", "resume", data=dict(type=data.known, default="auto", help=data.DATA_HELP))
    run.add_flags(p, "epochs", "bs", "lr", "seed", "device", "precision", "limit")
    p.add_argument("--decay", choices=["none", "step", "cosine", "onecycle"], help="schedule of the learning rate")
    p.add_argument("--weight-decay", type=run.nonnegative_float, metavar="X", help="strength of the L2 penalty")
    p.add_argument("--augment", choices=data.AUGMENT, help="what happens to pictures before training sees them")
    p.add_argument("--shortcut", choices=model.SHORTCUTS, help="option A or B of the paper, or none (CIFAR's networks)")
    p.add_argument("--accumulate", type=run.positive_int, metavar="N", help="take a batch in N pieces, one update")
    p.add_argument("--sync-bn", action="store_true", help="batch statistics over all processes (GPU)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the network")
    p.epilog = "recipes, as they differ from that of the paper:\n" + "\n".join(
        f"  {name}: " + ", ".join(f"{k} {v}" for k, v in values.items() if name == "paper" or PAPER.get(k) != v)
        for name, values in RECIPES.items()
    )
    return p


def parse(argv=None):
    p = parser()
    args = run.parse(
        p,
        argv,
        extendable=lambda saved: (
            saved["decay"] == "none" and not saved["warmup"] and not saved["ema"] and len(saved["sizes"]) == 1
        ),
    )
    if args.resume:
        return args
    fits = data.family(args.data) or (data.family_of_model(args.model) if args.model else "cifar")
    default_model, default_recipe = DEFAULTS[fits]
    args.model, args.recipe = args.model or default_model, args.recipe or default_recipe
    if data.family_of_model(args.model) != fits:
        p.error(f"--model {args.model}: is not made for the pictures of --data {args.data}")
    if args.shortcut and fits != "cifar":
        p.error(f"--shortcut {args.shortcut}: {args.model} has no such option")
    if args.recipe != "paper" and args.recipe.split("-")[0] != default_recipe:
        p.error(f"--recipe {args.recipe}: is not made for {args.model}")
    if args.augment == "affine" and fits == "imagenet":
        p.error("--augment affine: is for pictures in memory; those of ImageNet have crop and flip")
    if args.sync_bn and not torch.cuda.is_available():
        p.error("--sync-bn: torch has it for GPUs only")
    args.shortcut = args.shortcut or "A"
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    pieces = int(os.environ.get("WORLD_SIZE", 1)) * args.accumulate
    if args.bs % pieces:
        p.error(f"--bs {args.bs}: does not divide by {pieces}, the processes times --accumulate")
    return args


def main(argv=None):
    args = parse(argv)
    fits = data.family_of_model(args.model)
    parts = data.load(args.data, args.data_dir, args.limit, fits)
    args.data = parts[0].name if args.data == "auto" else args.data
    with run.Run(args, __file__, f"{parts[0].name}-{args.model}", AUTO_PRECISION) as r:
        counts = {name: len(part) for name, part in zip(("train", "val", "test"), parts) if part}
        r.note(dataset=parts[0].facts() | counts)
        train_set, val_set, test_set = (part.to(r.device) if part else None for part in parts)
        net = train(args, r, train_set, val_set)

        final = {}
        if test_set:
            final["last_test_accuracy"] = evaluate(net, test_set, r)[1]
        final["last_val_accuracy"] = evaluate(net, val_set, r)[1]
        best = run.read_checkpoint(r.folder / "best.pt", r.device)
        run.restore(net, best["model"], r.folder / "best.pt")
        final |= dict(zip(("best_epoch", "val_loss", "val_accuracy"), (best["epoch"], *evaluate(net, val_set, r))))
        if test_set:
            final |= dict(zip(("test_loss", "test_accuracy"), evaluate(net, test_set, r)))
        if fits == "imagenet":
            final["undecodable"] = names_over_ranks(train_set.bad | val_set.bad, r)
        r.finish(**final)
        which = "test" if test_set else "val"
        r.say(
            f"{which} accuracy {final[f'{which}_accuracy']:.2%} with the weights of epoch {best['epoch']}, which "
            f"validation chose ({final['val_accuracy']:.2%}); {final[f'last_{which}_accuracy']:.2%} with the last; "
            f"{r.record.get('wall_s', 0):.0f} s; {run.shown(r.folder)}"
        )
    return r.record


if __name__ == "__main__":
    run.cli(main)
