"""Train S2VT to describe videos in words.

    python s2vt/train.py --data builtin       # rendered videos of moving shapes, no download: three minutes
    python s2vt/train.py --data msvd          # 1,450 clips of MSVD with features of 80 frames x 4096
    python s2vt/train.py --data msvd-clips    # 468 of its clips, 279 of them for training: a minute
    python s2vt/train.py --data msvd40        # 40 of its test clips: 30 train, 10 validate; a demonstration

Validation by BLEU-4 + CIDEr chooses the epoch, which is tested once. On msvd-clips five folds have chosen the number of
epochs beforehand (STUDIES.md), and the last epoch is tested. --bs counts clips, each with all its captions or with
--captions-each of them. The data choose the recipe if no flag does; it sets every hyper-parameter, and flags override
it.
"""

import argparse
import math
import re
import time
from dataclasses import dataclass, replace

from common import run
from common.options import option, short

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import data
import model
import scores
from data import DATA_HELP, SPLITS, dataset_arg
from decode import caption_all
from model import CELLS

RECIPE_NAMES = ["msvd", "paper", "builtin", "demo", "msvd-clips", "tiny"]
RECIPE_OF_DATA = {"builtin": "builtin", "msvd40": "demo", "msvd-clips": "msvd-clips"}  # msvd for all others


def choose_arg(text):
    """An argparse type: "best", "last", or the number of an epoch."""
    if text in ("best", "last") or re.fullmatch("[1-9][0-9]{0,8}", text):
        return text
    raise argparse.ArgumentTypeError(f"{short(text)!r} is neither best, last, nor the number of an epoch")


@dataclass(kw_only=True)
class Options(run.TrainOptions):
    data: str = option("auto", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    recipe: str = option("msvd", "a named set of hyper-parameters; flags override it", choices=RECIPE_NAMES)
    epochs: int = option(20, "passes over the training set", above=0)
    bs: int = option(32, "batch size: clips of one optimizer step", above=0)
    lr: float = option(1e-3, "learning rate; its peak, if it is scheduled", above=0)
    decay: str = option("cosine", "schedule of the learning rate", choices=["none", "cosine"])
    hidden: int = option(512, "units of each recurrent layer", above=0, at_most=10_000)
    embed: int = option(512, "length of the vectors of frames and of words", above=0, at_most=10_000)
    cell: str = option("gru", "recurrent cells", choices=list(CELLS))
    attention: bool = option(False, "attention over the frames")
    dropout: float = option(0.5, "dropout before the layers and before the output", at_least=0, below=1)
    pooled: bool = option(False, "every frame is the mean of the frames: the baseline without order")
    scheduled_sampling: float = option(
        0.0, "probability of reading the network's own word; it rises to this during the run", at_least=0, at_most=1
    )
    weight_decay: float = option(1e-4, "decoupled weight decay of AdamW", at_least=0)
    clip_norm: float = option(5.0, "largest norm of the gradient", above=0)
    min_count: int = option(3, "how often a word of the vocabulary occurs, at least; others are <unk>", above=0)
    max_words: int = option(30, "words of a caption, with <eos>; longer ones are cut", at_least=2, at_most=1000)
    captions_each: int | None = option(None, "captions of a clip in one epoch, drawn in each; none: all", above=0)
    caption_clips: int | None = option(None, "validation clips described after each epoch; none: all", above=0)
    choose: str = option(
        "best", "the epoch that is kept: best in validation, last, or its number", type=choose_arg, metavar="EPOCH"
    )
    split: str = option("train", "split of msvd-clips: MSVD's own, without validation, or by folds", choices=SPLITS)
    train_clips: int | None = option(None, "number of training clips of msvd-clips; none: all", above=0)

    def check(self):
        if self.choose not in ("best", "last") and int(self.choose) > self.epochs:
            raise run.UserError(f"--choose {self.choose}: the last of --epochs is {self.epochs}")
        of_msvd_clips = {"--split": self.split != "train", "--train-clips": self.train_clips is not None}
        for name, is_set in of_msvd_clips.items():
            if is_set and self.data != "msvd-clips":
                raise run.UserError(f"{name}: is for --data msvd-clips alone")


MSVD = Options()
RECIPES = {
    "msvd": MSVD,
    "paper": replace(MSVD, hidden=1000, embed=500, cell="lstm"),  # the sizes of section 4.3
    "builtin": replace(
        MSVD, epochs=24, bs=64, lr=5e-3, hidden=160, embed=96, dropout=0.0, min_count=1, captions_each=1
    ),
    "demo": replace(MSVD, epochs=40, bs=5, hidden=256, embed=256, dropout=0.3, min_count=1, captions_each=5),
    "msvd-clips": replace(
        MSVD,
        epochs=10,
        bs=16,
        lr=2e-3,
        hidden=256,
        embed=256,
        dropout=0.3,
        captions_each=5,
        max_words=14,
        choose="last",
    ),
    "tiny": replace(  # a second, for tests
        MSVD, epochs=2, bs=100, decay="none", hidden=24, embed=16, min_count=1, captions_each=1, caption_clips=9
    ),
}
AUTO_PRECISION = "fp32"  # bench.py: bf16 is faster at the size of MSVD; no training has compared its scores yet
AUTO_THREADS = 1  # tools/seconds.py: a second one gains less than a third
SAVE_SECONDS = 240  # between checkpoints within an epoch


@dataclass
class Progress:
    """What a checkpoint holds beside the network and the optimizer."""

    totals: Tensor  # (steps of an epoch, 2): summed loss and number of words of each step
    epoch: int = 0  # that is under way
    step: int = 0  # in this epoch
    best: float = -1.0  # highest BLEU-4 + CIDEr in validation

    def add(self, losses: Tensor):
        """Keep the losses of the words of a step."""
        self.totals[self.step, 0] = losses.detach().sum()
        self.totals[self.step, 1] = len(losses)
        self.step += 1

    def mean_loss(self, r) -> float:
        """The mean over all words of the epoch so far. Raises Diverged."""
        totals = self.totals[: self.step]
        r.check_finite(totals[:, 0], self.epoch * len(self.totals))
        loss, words = totals.cpu().double().sum(0).tolist()
        return loss / max(words, 1)


def begin(r, net, optimizer, steps: int) -> Progress:
    """The progress of the run that is resumed, or of a new one. steps: of an epoch. Raises UserError."""
    state = r.load(model=net, optimizer=optimizer)
    if state is None:
        return Progress(torch.zeros(steps, 2, device=r.device))
    progress = Progress(**{name: state[name] for name in ("totals", "epoch", "step", "best")})
    if not torch.is_tensor(progress.totals) or progress.totals.shape != (steps, 2) or progress.step > steps:
        raise run.UserError(f"{state.path}: is the checkpoint of another dataset (its totals do not fit)")
    progress.totals = progress.totals.to(r.device)
    return progress


def train(args, r, net, train_set, val_set, state_of_model):
    """Train. Writes metrics.csv, last.pt and best.pt, the epoch of the highest BLEU-4 + CIDEr in validation, with
    `state_of_model`: what a checkpoint needs beside the weights, to be opened without the data."""
    optimizer = torch.optim.AdamW(net.parameters(), args.lr, weight_decay=args.weight_decay)
    steps = math.ceil(len(train_set) / args.bs)
    progress = begin(r, net, optimizer, steps)

    for epoch in range(progress.epoch, args.epochs):
        net.train()
        began = time.monotonic()
        batches = train_set.batches(args.bs, (args.seed, epoch), progress.step, r.device, args.captions_each)
        bar = tqdm(batches, f"epoch {epoch + 1}/{args.epochs}", steps, initial=progress.step, leave=False, disable=None)
        for features, words, targets, clip in bar:
            share = (epoch + progress.step / steps) / args.epochs  # of the run that is done
            for group in optimizer.param_groups:
                group["lr"] = args.lr * lr_factor(args.decay, share)
            with r.autocast():
                losses = net.loss(features, words, targets, clip, args.scheduled_sampling * share)
            optimizer.zero_grad()
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip_norm)
            optimizer.step()

            progress.add(losses)
            if progress.step % 10 == 0:
                bar.set_postfix(loss=f"{progress.mean_loss(r):.3f}")
            stopping = r.should_stop()
            if stopping or r.save_due(SAVE_SECONDS):
                r.save(model=net, optimizer=optimizer, **vars(progress))
            if stopping:
                r.stop()

        train_loss = progress.mean_loss(r)
        seconds = time.monotonic() - began
        val_loss, captions = validate(net, val_set, args, r)
        r.check_finite(torch.tensor([val_loss]), (epoch + 1) * steps)
        references = val_set.first(args.caption_clips).captions
        bleu4 = scores.bleu(captions, references)[3]
        cider = scores.cider(captions, references)
        row = {"epoch": epoch + 1, "train_loss": train_loss, "val_loss": val_loss, "val_bleu4": bleu4}
        row |= {"val_cider": cider, "lr": optimizer.param_groups[0]["lr"], "epoch_seconds": round(seconds, 2)}
        r.log(row)
        print_epoch(args, r, row, captions)
        if is_kept(args.choose, epoch + 1, better=bleu4 + cider > progress.best):
            progress.best = bleu4 + cider
            r.save_best(model=net, epoch=epoch + 1, **state_of_model)
        progress.totals.zero_()
        progress.epoch, progress.step = epoch + 1, 0
        r.save(model=net, optimizer=optimizer, **vars(progress))


def print_epoch(args, r, row: dict, captions: list[str]):
    """Print the row of an epoch, with one of the first three captions in turn."""
    epoch = row["epoch"]
    example = captions[(epoch - 1) % min(3, len(captions))]
    losses = f"loss {row['train_loss']:.3f} train {row['val_loss']:.3f} val"
    measures = f"BLEU-4 {row['val_bleu4']:.3f}   CIDEr {row['val_cider']:.3f}"
    r.print(f"epoch {epoch:>3}/{args.epochs}   {losses}   {measures}   {example}")
    r.text("captions", "\n".join(captions[:3]), epoch)


def lr_factor(decay: str, share: float) -> float:
    """The factor of the learning rate when a share of the run is done; "cosine" rises for its first twentieth, then
    falls."""
    if decay == "cosine":
        return min(1.0, (share + 1e-3) / 0.05) * 0.5 * (1 + math.cos(math.pi * share))
    return 1.0


def is_kept(choose: str, epoch: int, better: bool) -> bool:
    """Does best.pt get the weights of this epoch? With "last" every epoch replaces them."""
    if choose == "best":
        return better
    return choose in ("last", str(epoch))


@torch.no_grad()
def validate(net, val_set, args, r):
    """(mean cross-entropy of a word, captions of the first clips by greedy search)."""
    net.eval()
    loss = 0.0
    words = 0
    for index in torch.arange(len(val_set)).split(args.bs):
        with r.autocast():
            losses = net.loss(*val_set.batch(index, r.device))
        loss += losses.cpu().double().sum().item()
        words += len(losses)
    return loss / words, describe(net, val_set.first(args.caption_clips).features, r, args.max_words)


def describe(net, features, r, max_words) -> list[str]:
    """The captions of clips (N, T, F) by greedy search, as text."""
    with r.autocast():
        captions = caption_all(net, features, 1, max_words)
    return [r.vocabulary.decode(caption.words) for caption in captions]


def test(net, clips, args, r):
    """(scores of the test clips, or of the validation clips if there is no test set; the captions). For built-in clips
    also what the captions say about order, and the same with the frames shuffled and reversed in time."""
    captions = describe(net, clips.features, r, args.max_words)
    final = {f"test_bleu{n}": value for n, value in enumerate(scores.bleu(captions, clips.captions), 1)}
    final["test_cider"] = scores.cider(captions, clips.captions)
    final["course_bleu1"] = scores.course_bleu1(captions, clips.raw)
    if clips.events is None:
        return final, captions
    final |= scores.order_scores(captions, clips.events)
    order = torch.rand(clips.features.shape[:2], generator=torch.Generator().manual_seed(0)).argsort(1)  # (N, T)
    shuffled = clips.features.gather(1, order[..., None].expand_as(clips.features))
    for name, features in (("shuffled", shuffled), ("reversed", clips.features.flip(1))):
        said = scores.order_scores(describe(net, features, r, args.max_words), clips.events)
        final |= {f"{name}_{key}": value for key, value in said.items()}
    return final, captions


def recipe(given: dict) -> Options:
    """The recipe that the flags `given` name. The data choose it if no flag does."""
    name = given.get("recipe") or recipe_of_data(given)
    return replace(RECIPES[name], recipe=name)


def recipe_of_data(given: dict) -> str:
    """The name of the recipe for the data that the flags `given` name."""
    name = given.get("data", "auto")
    if name == "auto" and not data.is_there(run.data_dir(given.get("data_dir")) / "msvd"):
        name = "builtin"
    return RECIPE_OF_DATA.get(name, "msvd")


def parse(argv=None) -> Options:
    def extendable(args):  # no schedule depends on the number of epochs
        return args.decay == "none" and not args.scheduled_sampling

    return run.parse_options(__file__, Options, argv, recipe, extendable)


def main(argv=None):
    args = parse(argv)
    train_set, val_set, test_set, vocabulary, facts = data.load(
        args.data, args.data_dir, args.limit, args.min_count, args.max_words, args.split, args.train_clips
    )
    args.data = facts["name"] if args.data == "auto" else args.data
    name = f"{facts['name']}-{args.cell}"
    if args.attention:
        name += "-attention"
    with run.Run(args, __file__, name, AUTO_PRECISION, AUTO_THREADS, stop_within_epoch=True) as r:
        config = checkpoint.config_of(args, facts)
        run.check_memory(lambda: checkpoint.build(config, len(vocabulary)), r.device, "--hidden, --embed")
        net = checkpoint.build(config, len(vocabulary))
        model.standardize(net, train_set.features)
        net = net.to(r.device)
        r.vocabulary = vocabulary
        parameters = run.count_parameters(net)
        what = f"S2VT ({name}), {parameters:,} parameters, {len(vocabulary):,} words"
        clips = f"{len(train_set):,} training clips with {facts['captions']:,} captions"
        r.note(
            f"{what}, on {facts['name']}: {clips}, {len(val_set):,} validation clips",
            dataset=facts,
            parameters=parameters,
        )
        train(args, r, net, train_set, val_set, {"words": vocabulary.words, "config": config})

        learned = train_set.first(100)  # with the last weights: does it overfit?
        train_bleu4 = scores.bleu(describe(net, learned.features, r, args.max_words), learned.captions)[3]
        best = r.load_best(model=net)
        scored_on, scored = ("validation", val_set) if test_set is None else ("test", test_set)
        final, captions = test(net, scored, args, r)
        final |= {"best_epoch": best["epoch"], "scored_on": scored_on, "last_train_bleu4": train_bleu4}
        final["last_train_loss"] = r.rows[-1]["train_loss"] if r.rows else None
        checkpoint.save_weights(r.folder / "best.safetensors", net, vocabulary.words, config)
        run.write(r.folder / "captions.txt", "\n".join(captions) + "\n")
        result = f"BLEU-4 {final['test_bleu4']:.3f}, CIDEr {final['test_cider']:.3f} on {scored_on} clips"
        if "order" in final:
            result += f", order right in {final['order']:.1%}"
        uniform_loss = math.log(len(vocabulary))
        r.finish(f"{result} with the weights of epoch {best['epoch']}", uniform_loss=uniform_loss, **final)
    return r.record


if __name__ == "__main__":
    run.cli(main)
