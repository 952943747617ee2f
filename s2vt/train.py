"""Train S2VT to describe videos in words.

    python s2vt/train.py --data builtin       # rendered videos of moving shapes, no download: two minutes
    python s2vt/train.py --data msvd          # 1,450 clips of MSVD with features of 80 frames x 4096
    python s2vt/train.py --data msvd-clips    # 468 of its clips, 301 of them for training: two minutes
    python s2vt/train.py --data msvd40        # 40 of its test clips: 30 train, 10 validate; a demonstration

Validation by BLEU-4 + CIDEr chooses the epoch, which is tested once. On msvd-clips five folds have chosen the number of
epochs beforehand (STUDIES.md), and the last epoch is tested. --bs counts clips, each with all its captions.
"""

import argparse
import math
import time

from common import run

import torch
from tqdm import tqdm

import checkpoint
import data
import model
import scores
from decode import caption_all

MSVD = dict(
    epochs=20,
    bs=32,  # clips of one optimizer step
    lr=1e-3,
    decay="cosine",
    hidden=512,
    embed=512,
    cell="gru",
    attention=False,
    dropout=0.5,
    pooled=False,  # every frame is the mean of the frames: the baseline without order
    scheduled_sampling=0.0,  # probability at the end of the run; it rises from zero in proportion to the steps
    weight_decay=1e-4,
    clip_norm=5.0,  # the largest norm of the gradient
    min_count=3,  # rarer words of the training captions are <unk>
    max_words=30,  # with <eos>; longer captions are cut
    captions_each=None,  # captions of a clip in one epoch, drawn anew in each; None: all of them
    caption_clips=None,  # how many validation clips are described after each epoch; None: all
    choose="best",  # the epoch whose weights are kept: "best" in validation, "last", or its number, as "8"
    split="train",  # of msvd-clips: MSVD's own, "train+val", or "fold1" to "fold5"
    train_clips=None,  # of msvd-clips: so many of the training clips; None: all
)
RECIPES = {
    "msvd": MSVD,
    "paper": MSVD | dict(hidden=1000, embed=500, cell="lstm"),  # the sizes of section 4.3
    "builtin": MSVD | dict(epochs=24, bs=64, lr=5e-3, hidden=160, embed=96, dropout=0.0, min_count=1, captions_each=1),
    "demo": MSVD | dict(epochs=40, bs=5, hidden=256, embed=256, dropout=0.3, min_count=1, captions_each=5),
    "msvd-clips": MSVD
    | dict(epochs=10, bs=16, lr=2e-3, hidden=256, embed=256, captions_each=5, max_words=14, dropout=0.3, choose="last"),
    "tiny": MSVD
    | dict(epochs=2, bs=100, hidden=24, embed=16, min_count=1, captions_each=1, caption_clips=9, decay="none"),
}
AUTO_PRECISION = "fp32"  # bench.py: bf16 is faster at the size of MSVD; no training has compared its scores yet
AUTO_THREADS = 1  # tools/seconds.py: a second one gains less than a third
SAVE_SECONDS = 240  # between checkpoints within an epoch


def train(args, r, net, train_set, val_set, state_of_model):
    """Train. Writes metrics.csv, last.pt and best.pt, the epoch of the highest BLEU-4 + CIDEr in validation, with
    `state_of_model`: what a checkpoint needs beside the weights, to be opened without the data."""
    optimizer = torch.optim.AdamW(net.parameters(), args.lr, weight_decay=args.weight_decay)
    steps = math.ceil(len(train_set) / args.bs)
    first_epoch, step, best, totals = 0, 0, -1.0, torch.zeros(steps, 2)  # summed loss and words of each step
    if state := r.load(model=net, optimizer=optimizer):
        first_epoch, step, best, totals = (state[k] for k in ("epoch", "step", "best", "totals"))
        if not torch.is_tensor(totals) or totals.shape != (steps, 2) or step > steps:
            raise run.UserError(f"{state.path}: is the checkpoint of another dataset (its totals do not fit)")
    totals = totals.to(r.device)

    def save(epoch, step):
        r.save(model=net, optimizer=optimizer, epoch=epoch, step=step, best=best, totals=totals)

    for epoch in range(first_epoch, args.epochs):
        net.train()
        began, saved = time.monotonic(), time.monotonic()
        batches = train_set.batches(args.bs, (args.seed, epoch), step, r.device, args.captions_each)
        bar = tqdm(batches, f"epoch {epoch + 1}/{args.epochs}", steps, initial=step, leave=False, disable=None)
        for features, words, targets, clip in bar:
            progress = (epoch + step / steps) / args.epochs
            for group in optimizer.param_groups:
                group["lr"] = args.lr * lr_factor(args.decay, progress)
            with r.autocast():
                losses = net.loss(features, words, targets, clip, args.scheduled_sampling * progress)
            optimizer.zero_grad()
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip_norm)
            optimizer.step()
            totals[step, 0], totals[step, 1] = losses.detach().sum(), len(losses)

            step += 1
            if step % 10 == 0:
                bar.set_postfix(loss=f"{mean_loss(totals[:step], epoch * steps, r):.3f}")
            stopping = r.should_stop()
            if stopping or time.monotonic() - saved > SAVE_SECONDS:
                save(epoch, step)
                saved = time.monotonic()
            if stopping:
                r.stop()

        train_loss = mean_loss(totals, epoch * steps, r)
        seconds = time.monotonic() - began
        val_loss, captions = validate(net, val_set, args, r)
        r.check_finite(torch.tensor([val_loss]), (epoch + 1) * steps)
        described = val_set.first(args.caption_clips)
        bleu4, cider = scores.bleu(captions, described.captions)[3], scores.cider(captions, described.captions)
        r.log({"epoch": epoch + 1, "train_loss": train_loss, "val_loss": val_loss, "val_bleu4": bleu4,
               "val_cider": cider, "lr": optimizer.param_groups[0]["lr"], "seconds": round(seconds, 2)})  # fmt: skip
        r.print(f"epoch {epoch + 1:>3}/{args.epochs}   loss {train_loss:.3f} train {val_loss:.3f} val   BLEU-4 "
                f"{bleu4:.3f}   CIDEr {cider:.3f}   {captions[epoch % min(3, len(captions))]}")  # fmt: skip
        r.text("captions", "\n".join(captions[:3]), epoch + 1)
        better = bleu4 + cider > best
        if {"best": better, "last": True}.get(args.choose, args.choose == str(epoch + 1)):
            best = bleu4 + cider
            r.save_best(model=net, epoch=epoch + 1, **state_of_model)
        step = 0
        totals.zero_()
        save(epoch + 1, step)


def lr_factor(decay: str, progress: float) -> float:
    """The factor of the learning rate at a share of the run; "cosine" rises for its first twentieth, then falls."""
    return min(1.0, (progress + 1e-3) / 0.05) * 0.5 * (1 + math.cos(math.pi * progress)) if decay == "cosine" else 1.0


def mean_loss(totals, first_step, r):
    """The mean over the words of the steps from `first_step` on. Raises Diverged."""
    r.check_finite(totals[:, 0], first_step)
    loss, words = totals.double().cpu().sum(0).tolist()
    return loss / max(words, 1)


@torch.no_grad()
def validate(net, val_set, args, r):
    """(mean cross-entropy of a word, captions of the first clips by greedy search)."""
    net.eval()
    loss = words = 0
    for index in torch.arange(len(val_set)).split(args.bs):
        with r.autocast():
            losses = net.loss(*val_set.batch(index, r.device))
        loss, words = loss + losses.double().sum().item(), words + len(losses)
    return loss / words, describe(net, val_set.first(args.caption_clips).features, r, args.max_words)


def describe(net, features, r, max_words, width=1):
    """The captions of clips (N, T, F) as text."""
    with r.autocast():
        return [r.vocabulary.decode(c.words) for c in caption_all(net, features, width, max_words)]


def test(net, clips, args, r):
    """The scores of the test clips, or of the validation clips if there is no test set. For built-in clips also what
    the captions say about order, and the same with the frames shuffled and reversed in time."""
    captions = describe(net, clips.features, r, args.max_words)
    final = {f"test_bleu{n}": value for n, value in enumerate(scores.bleu(captions, clips.captions), 1)}
    final |= {"test_cider": scores.cider(captions, clips.captions)}
    final |= {"course_bleu1": scores.course_bleu1(captions, clips.raw)}
    if clips.events is None:
        return final, captions
    T = clips.features.shape[1]
    shuffle = torch.rand(len(clips), T, generator=torch.Generator().manual_seed(0)).argsort(1)
    shuffled = clips.features.gather(1, shuffle[..., None].expand_as(clips.features))
    for name, features in (("", None), ("shuffled_", shuffled), ("reversed_", clips.features.flip(1))):
        texts = captions if features is None else describe(net, features, r, args.max_words)
        final |= {f"{name}{key}": value for key, value in scores.order_scores(texts, clips.events).items()}
    return final, captions


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run.add_flags(
        p, recipe=dict(choices=list(RECIPES), help="(default: that of the data: builtin, msvd-clips, demo, else msvd)")
    )
    run.add_flags(p, "set", "tensorboard", "data_dir", "out", "resume",
                  data=dict(type=data.dataset_arg, default="auto", help=data.DATA_HELP))  # fmt: skip
    run.add_flags(p, "epochs", "lr", "weight_decay", "seed", "device", "threads", "precision", "limit",
                  bs=dict(help="batch size: clips of one optimizer step"))  # fmt: skip
    p.add_argument("--cell", choices=list(model.CELLS), help="recurrent cells")
    p.add_argument("--attention", action=argparse.BooleanOptionalAction, help="attention over the frames")
    p.add_argument("--decay", choices=["none", "cosine"], help="schedule of the learning rate")
    p.epilog = "recipes, as they differ from msvd:\n" + "\n".join(
        f"  {name}: " + ", ".join(f"{k} {v}" for k, v in values.items() if name == "msvd" or MSVD[k] != v)
        for name, values in RECIPES.items()
    )
    return p


def recipe(args):
    """The recipe, which the data chooses if no flag names it. `auto` is resolved here."""
    if args.data == "auto":
        there = data.is_there(run.data_dir(args.data_dir) / "msvd")
        args.recipe = args.recipe or ("msvd" if there else "builtin")
    of_data = {"builtin": "builtin", "msvd40": "demo", "msvd-clips": "msvd-clips"}
    args.recipe = args.recipe or of_data.get(args.data, "msvd")
    return RECIPES[args.recipe]


def check(args):
    """Raise UserError for values of --set that are out of range."""
    for name in ("hidden", "embed", "min_count", "max_words"):
        if not 1 <= getattr(args, name) <= 100_000 or name == "max_words" and args.max_words < 2:
            raise run.UserError(f"--set {name}={getattr(args, name)}: is out of range")
    for name, high in (("dropout", 0.99), ("scheduled_sampling", 1)):
        if not 0 <= getattr(args, name) <= high:
            raise run.UserError(f"--set {name}={getattr(args, name)}: must be between 0 and {high}")
    if not args.clip_norm > 0:
        raise run.UserError(f"--set clip_norm={args.clip_norm}: must be above 0")
    epochs = [str(epoch + 1) for epoch in range(args.epochs)]
    for name, values in (("choose", ("best", "last", *epochs)), ("split", data.SPLITS)):
        if getattr(args, name) not in values:
            raise run.UserError(f"--set {name}={getattr(args, name)}: must be one of {', '.join(values)}")
    for name in ("caption_clips", "captions_each", "train_clips"):
        value = getattr(args, name)
        if value is not None and (type(value) is not int or value < 1):
            raise run.UserError(f"--set {name}={value}: must be a whole number above 0, or null")


def parse(argv=None):
    def extendable(args):  # no schedule depends on the number of epochs
        return args.decay == "none" and not args.scheduled_sampling

    return run.parse(__file__, parser(), argv, recipe, check, extendable)


def main(argv=None):
    args = parse(argv)
    train_set, val_set, test_set, vocabulary, facts = data.load(
        args.data, args.data_dir, args.limit, args.min_count, args.max_words, args.split, args.train_clips
    )
    args.data = facts["name"] if args.data == "auto" else args.data
    name = f"{facts['name']}-{args.cell}" + "-attention" * args.attention
    with run.Run(args, __file__, name, AUTO_PRECISION, AUTO_THREADS, stop_within_epoch=True) as r:
        config = checkpoint.config_of(args, facts)
        net = checkpoint.build(config, len(vocabulary))
        model.standardize(net, train_set.features)
        net, r.vocabulary = net.to(r.device), vocabulary
        parameters = model.count_parameters(net)
        r.note(f"S2VT ({name}), {parameters:,} parameters, {len(vocabulary):,} words, on {facts['name']}: "
               f"{len(train_set):,} training clips with {facts['captions']:,} captions, {len(val_set):,} validation "
               f"clips", dataset=facts, parameters=parameters)  # fmt: skip
        train(args, r, net, train_set, val_set, {"words": vocabulary.words, "config": config})

        learned = train_set.first(100)  # with the last weights: does it overfit?
        train_bleu4 = scores.bleu(describe(net, learned.features, r, args.max_words), learned.captions)[3]
        best = r.load_best(model=net)
        final, captions = test(net, test_set if test_set is not None else val_set, args, r)
        final |= {"best_epoch": best["epoch"], "scored_on": "test" if test_set is not None else "validation"}
        final |= {"last_train_loss": (r.rows or [{}])[-1].get("train_loss"), "last_train_bleu4": train_bleu4}
        checkpoint.save_weights(r.folder / "best.safetensors", net, vocabulary.words, config)
        run.write(r.folder / "captions.txt", "\n".join(captions) + "\n")
        r.finish(f"BLEU-4 {final['test_bleu4']:.3f}, CIDEr {final['test_cider']:.3f} on {final['scored_on']} clips"
                 + (f", order right in {final['order']:.1%}" if "order" in final else "")
                 + f" with the weights of epoch {best['epoch']}", **final)  # fmt: skip
    return r.record


if __name__ == "__main__":
    run.cli(main)
