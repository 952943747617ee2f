"""Train a residual network on CIFAR-10, MNIST or ImageNet.

    python resnet/train.py                                   # ResNet-20 on CIFAR-10, the fast recipe
    python resnet/train.py --recipe paper                    # as He et al. 2015 did
    python resnet/train.py --data mnist                      # 99.5 % in seconds
    python resnet/train.py --data builtin --epochs 3         # a look without any download
    torchrun --nproc-per-node=8 resnet/train.py --data imagenet --data-dir DIR --bs 2048 --lr 0.8

Validation chooses the epoch; that checkpoint is tested once, at the end. --bs is the batch of one optimizer step over
all processes, so a run on eight GPUs takes the same steps as on one. A recipe sets whatever the flags leave open.
"""

import argparse
import contextlib
import os
import time

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import collectives
import data
import model
import optim
import run

PAPER = dict(  # He et al. 2015, section 4.2: 64,000 steps; the learning rate is divided by 10 at 32,000 and 48,000
    epochs=182,
    bs=128,
    lr=0.1,
    decay="step",
    warmup=0.0,  # share of the run
    weight_decay=1e-4,
    augment="crop+flip",
    accumulate=1,
    optimizer="sgd",
    nesterov=False,
    label_smoothing=0.0,
    ema=0.0,  # of the average of weights; 0: none
    whiten=False,  # the first convolution
    sizes=[[0.0, None]],  # [share of the run from which on, side of the training images in pixels], None: as they are
    compile=False,
)
FAST = dict(epochs=40, lr=0.2, decay="onecycle", weight_decay=5e-4, nesterov=True, label_smoothing=0.1)
RECIPES = {
    "paper": PAPER,
    "fast": PAPER | FAST | dict(optimizer="muon", muon_decay=0.02, sizes=[[0.0, 24], [0.5, 32]]),
    "mnist": PAPER | FAST | dict(epochs=5, augment="affine", compile="cuda"),
    "imagenet": PAPER
    | dict(epochs=90, bs=256, decay="cosine", warmup=5 / 90, nesterov=True, label_smoothing=0.1, ema=0.9999),
}
VARIANTS = {  # of the fast recipe, each with one change: sweep.py --study parts measures what it is worth
    "sgd": dict(optimizer="sgd", lr=0.4),
    "hard-labels": dict(label_smoothing=0.0),
    "whitened": dict(whiten=True),
    "averaged": dict(ema=0.995),
    "full-size": dict(sizes=[[0.0, None]]),
}
RECIPES |= {f"fast-{name}": RECIPES["fast"] | change for name, change in VARIANTS.items()}
DEFAULTS = {"cifar": ("resnet20", "fast"), "mnist": ("mnist", "mnist"), "imagenet": ("resnet50", "imagenet")}
AUTO_PRECISION = "bf16"  # bench.py: 1.4 times as fast as fp32 where the hardware multiplies bfloat16
SAVE_EVERY = 1000  # steps between checkpoints within an epoch


def train(args, r, train_set, val_set):
    """Train. Writes metrics.csv, last.pt and best.pt, the epoch of the highest validation accuracy."""
    net = build_model(args, train_set).to(r.device, memory_format=torch.channels_last)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net) if args.sync_bn else net
    optimizers = optim.build_optimizers(net, args)
    n, steps = data.examples_per_step(len(train_set), args.bs, r.world), data.steps_per_epoch(len(train_set), args.bs)
    average = optim.build_average(net, args.ema, args.epochs * steps) if args.ema else None
    eval_model = average.module if average else net  # what is validated, and saved as best.pt
    parameters = model.num_parameters(net)
    r.note(parameters=parameters)
    r.say(
        f"{args.model}, {parameters:,} parameters, on {train_set.name}: {len(train_set):,} training and "
        f"{len(val_set):,} validation images\n{r.hardware}" + f", {r.world} processes" * (r.world > 1)
    )

    first_epoch, step, best, totals = 0, 0, -1.0, torch.zeros(steps, 2)
    if state := r.load():
        run.restore(net, state["model"], r.folder / "last.pt")
        if average:
            run.restore(average, state["average"], r.folder / "last.pt")
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        first_epoch, step, best = (state[k] for k in ("epoch", "step", "best"))
        totals = totals if r.rank else state["totals"]  # which are summed over ranks
    totals = totals.to(r.device)  # summed loss and correct predictions of each step, in this process
    ddp_model, no_sync = collectives.wrap(net, r)
    if args.compile is True or args.compile == r.device.type:
        ddp_model = torch.compile(ddp_model, mode="reduce-overhead")

    def checkpoint(epoch, step):
        r.save(
            {
                "model": net.state_dict(),
                "average": average.state_dict() if average else {},
                "optimizers": [o.state_dict() for o in optimizers],
                "epoch": epoch,
                "step": step,
                "totals": collectives.all_reduce(totals.clone(), r),
                "best": best,
            }
        )

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
            micro_batches = list(zip(images.chunk(args.accumulate), labels.chunk(args.accumulate)))
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
            stopping = r.stopping
            if stopping or step % SAVE_EVERY == 0:
                checkpoint(epoch, step)
            if stopping:
                r.stop()

        train_loss, train_accuracy = means(totals, n, epoch * steps, r)
        seconds = time.monotonic() - began
        collectives.broadcast_buffers(eval_model, r)
        val_loss, val_accuracy = evaluate(eval_model, val_set, r)
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
            f"{train_accuracy:.1%} train {val_accuracy:.2%} val   {(steps - first_step) * n / seconds:,.0f} images/s"
        )
        if val_accuracy > best:
            best = val_accuracy
            facts = {"classes": list(train_set.classes), "mean": train_set.mean, "std": train_set.std}
            r.save({"model": eval_model.state_dict(), "epoch": epoch + 1} | facts, "best.pt")
        step = 0
        totals.zero_()
        checkpoint(epoch + 1, step)
    return eval_model


def build_model(args, train_set):
    """The network of `args`. Its weights are drawn from torch's generator, which run.Run has seeded."""
    net = model.build(args.model, len(train_set.classes), args.shortcut)
    if args.whiten:
        model.whiten(net.conv1, train_set.normalize(train_set.images[:5000]).cpu())
    return net


def size_at(sizes, progress):
    """The side of the training images in pixels at a share of the run; see `sizes` in the recipe."""
    return [pixels for since, pixels in sizes if progress >= since][-1]


def means(totals, n, first_step, r):
    """(loss, accuracy) of the steps from `first_step` on, of n images each; totals: (steps, 2) of each process. Raises
    Diverged."""
    totals = collectives.all_reduce(totals.clone(), r)
    r.check_finite(totals[:, 0], first_step)
    return (totals.sum(0) / (len(totals) * n)).tolist()


@torch.no_grad()
def evaluate(net, dataset, r):
    """(mean cross-entropy, accuracy) over a dataset. Each process evaluates its share of the images. An image that
    could not be decoded, with the label -1, does not count."""
    net.eval()
    totals = torch.zeros(3, dtype=torch.float64)
    for images, labels in dataset.batches(dataset.eval_batch_size, shard=(r.rank, r.world)):
        with r.autocast():
            logits = net(images).float()
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-1)
        correct = ((logits.argmax(1) == labels) & (labels >= 0)).sum()
        totals += torch.stack([loss, correct, (labels >= 0).sum()]).cpu()
    loss, correct, count = collectives.all_reduce(totals, r).tolist()
    return loss / max(count, 1), correct / max(count, 1)


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*model.CIFAR_DEPTHS, "mnist", *model.IMAGENET_DEPTHS]
    p.add_argument("--model", choices=names, help="(default: resnet20, mnist or resnet50, by the data)")
    p.add_argument("--recipe", choices=list(RECIPES), help="(default: fast, mnist or imagenet, by the data)")
    run.add_flags(p, "data_dir", "out", "resume", data=dict(type=data.dataset_arg, default="auto", help=data.DATA_HELP))
    run.add_flags(p, "epochs", "bs", "lr", "seed", "device", "precision", "limit")
    p.add_argument("--decay", choices=["none", "step", "cosine", "onecycle"], help="schedule of the learning rate")
    p.add_argument("--weight-decay", type=run.nonnegative_float, metavar="X", help="strength of the L2 penalty")
    p.add_argument("--augment", choices=data.AUGMENT, help="augmentation of the training images")
    p.add_argument("--shortcut", choices=model.SHORTCUTS, help="option A or B of the paper, or none (CIFAR networks)")
    p.add_argument("--accumulate", type=run.positive_int, metavar="N", help="micro-batches of a step in each process")
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
    family = data.family_of_data(args.data) or (data.family_of_model(args.model) if args.model else "cifar")
    default_model, default_recipe = DEFAULTS[family]
    args.model, args.recipe = args.model or default_model, args.recipe or default_recipe
    if data.family_of_model(args.model) != family:
        p.error(f"--model {args.model}: does not take the images of --data {args.data}")
    if args.shortcut and family != "cifar":
        p.error(f"--shortcut {args.shortcut}: {args.model} has no such option")
    if args.recipe != "paper" and args.recipe.split("-")[0] != default_recipe:
        p.error(f"--recipe {args.recipe}: is not for {args.model}")
    if args.augment == "affine" and family == "imagenet":
        p.error("--augment affine: is for images in memory; use crop, flip or crop+flip")
    if args.sync_bn and not torch.cuda.is_available():
        p.error("--sync-bn: needs a GPU")
    args.shortcut = args.shortcut or "A"
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    parts = int(os.environ.get("WORLD_SIZE", 1)) * args.accumulate
    if args.bs % parts:
        p.error(f"--bs {args.bs}: does not divide by {parts}, the processes times --accumulate")
    return args


def main(argv=None):
    args = parse(argv)
    family = data.family_of_model(args.model)
    parts = data.load(args.data, args.data_dir, args.limit, family)
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
        if family == "imagenet":
            final["undecodable"] = sorted(
                set().union(*collectives.gather(train_set.undecodable | val_set.undecodable, r))
            )
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
