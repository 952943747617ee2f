"""Train an LSTM to tell positive film reviews from negative ones.

    python lstm_imdb/train.py                              # the plain recipe, IMDB, five epochs
    python lstm_imdb/train.py --recipe best                # the best recipe found
    python lstm_imdb/train.py --data reviews.csv           # a CSV file of your own
    python lstm_imdb/train.py --data builtin --epochs 10   # a quick look without any download

Validation chooses the epoch; that checkpoint is tested once, at the end. The recipe sets every
hyper-parameter; flags override it.
"""

import math
import time
from dataclasses import dataclass, replace

from common import run, schedules
from common.calibration import fit_temperature
from common.options import option

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import initialization
import model
import outcome
from corpus import SPLITS
from data import DATA_HELP, dataset_arg
from model import CELLS, POOLS

RECIPE_NAMES = ["plain", "best", "short", "tiny"]
DECAYS = ["none", "onecycle"]
KEEP = ["start", "end"]
FILE_HELP = "a file, relative to the folder of the datasets"


@dataclass(kw_only=True)
class ReviewOptions(run.TrainOptions):
    """The options that training shares with pretrain.py: texts, vocabulary, layers, optimizer."""

    data: str = option("auto", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    split: str = option("7:1:2", "how the reviews are split", choices=SPLITS)
    max_words: int = option(20_000, "words of the vocabulary, at most", above=0, at_most=10_000_000)
    min_count: int = option(2, "how often a word of the vocabulary occurs, at least", above=0)
    stop_words: bool = option(False, "leave out scikit-learn's stop words")
    max_len: int = option(400, "words of a review that are read", above=0)
    keep: str = option("end", "the part of a longer review that is read", choices=KEEP)
    embed: int = option(64, "length of a word vector", above=0, at_most=10_000)
    embed_std: float = option(0.1, "standard deviation of the initial word vectors", above=0)
    hidden: int = option(128, "hidden units of each LSTM", above=0, at_most=10_000)
    layers: int = option(1, "LSTM layers", above=0, at_most=100)
    bidirectional: bool = option(False, "read in both directions")
    cell: str = option("torch", "nn.LSTM, or the one written out in model.py", choices=CELLS)
    dropout: float = option(0.5, "dropout of word vectors, between layers, and before the output", at_least=0, below=1)
    epochs: int = option(5, "passes over the training set", above=0)
    bs: int = option(64, "batch size", above=0)
    bucket: int = option(50, "batches sorted by length together; 1: random order", above=0, at_most=10_000)
    lr: float = option(0.003, "learning rate; its peak, if it is scheduled", above=0)
    decay: str = option("onecycle", "schedule of the learning rate", choices=DECAYS)
    weight_decay: float = option(0.0, "decoupled weight decay of AdamW", at_least=0)
    clip: float = option(1.0, "largest norm of the gradient", above=0)


@dataclass(kw_only=True)
class Options(ReviewOptions):
    recipe: str = option("plain", "a named set of hyper-parameters; flags override it", choices=RECIPE_NAMES)
    pool: str = option("last", "the state at the last word, or pooling over all states", choices=POOLS)
    word_dropout: float = option(0.0, "share of words that training replaces by <unk>", at_least=0, below=1)
    adversarial: float = option(0.0, "length of adversarial moves, in norms of the word vectors", at_least=0, at_most=1)
    sentences: float = option(0.0, "share of the reviews of which an epoch reads one sentence", at_least=0, at_most=1)
    vectors: str | None = option(
        None, f"word vectors in GloVe's text format: {FILE_HELP}", type=run.path_arg, metavar="FILE"
    )
    init: str | None = option(None, f"best.pt of a run of pretrain.py: {FILE_HELP}", type=run.path_arg, metavar="FILE")


PLAIN = Options()
BEST = replace(
    PLAIN,
    epochs=6,
    max_words=30_000,
    embed=100,
    bidirectional=True,
    pool="max",
    word_dropout=0.2,
    adversarial=0.05,
)
RECIPES = {
    "plain": PLAIN,
    "best": BEST,
    "short": replace(PLAIN, epochs=6, sentences=0.5),  # for short texts, too
    "tiny": replace(PLAIN, epochs=2, bs=20, embed=8, hidden=8, max_words=500, decay="none"),  # a second, for tests
}
AUTO_PRECISION = "bf16"  # bench.py: 1.35 times as fast as fp32 if the hardware multiplies bfloat16
AUTO_THREADS = 1  # tools/seconds.py: a second one gains nothing
SAVE_SECONDS = 120  # between checkpoints within an epoch


def lr_factor(decay: str, progress: float, steps: int) -> float:
    """The factor of the learning rate at `progress` in [0, 1), the fraction of all `steps` that are done."""
    if decay == "onecycle":  # up for a tenth of the run, then down to a hundredth
        return schedules.lr_factor(decay, progress, steps=steps, rise=0.1) + 0.01
    return 1.0


def backward(net, tokens, lengths, labels, adversarial, r):
    """Forward and backward of a batch: tokens (B, T), lengths and labels (B,). Returns the loss and the logits (B, C).

    Adversarial training (Miyato et al. 2017, section 3): the batch is also trained with the word vectors moved in the
    direction in which the loss rises fastest, by `adversarial` times the norm of the review's vectors.
    """
    embedded = net.embedding(net.drop_words(tokens))  # (B, T) -> (B, T, E)
    vectors = embedded.detach().requires_grad_()  # the gradients of both passes meet here
    with r.autocast():
        logits = net.classify(vectors, lengths)  # (B, T, E), (B,) -> (B, C)
    loss = F.cross_entropy(logits.float(), labels)
    if adversarial:
        (loss / 2).backward()
        size = vectors.detach().flatten(1).norm(dim=1)[:, None, None]  # (B, 1, 1)
        slope = vectors.grad.flatten(1).norm(dim=1)[:, None, None]
        move = adversarial * size / slope.clamp(min=1e-12) * vectors.grad
        with r.autocast():
            moved = net.classify(vectors + move, lengths)
        adversarial_loss = F.cross_entropy(moved.float(), labels)
        (adversarial_loss / 2).backward()
        loss = (loss + adversarial_loss) / 2
    else:
        loss.backward()
    embedded.backward(vectors.grad)
    return loss.detach(), logits


@dataclass
class Progress:
    """What a checkpoint holds beside the network and the optimizer."""

    totals: torch.Tensor  # (steps of an epoch, 2): summed loss and correct predictions of each step
    epoch: int = 0  # that is under way
    step: int = 0  # in this epoch
    best: float = -1.0  # highest validation accuracy


def begin(r, net, optimizer, new: Progress) -> Progress:
    """The progress of the run that is resumed, or else `new`."""
    state = r.load(model=net, optimizer=optimizer)
    if state is None:
        return new
    progress = Progress(**{name: state[name] for name in vars(new)})
    progress.totals = progress.totals.to(new.totals.device)
    return progress


def train(args, r, net, loaded):
    """Train, and leave in the run folder metrics.csv, last.pt and best.pt (the highest validation accuracy)."""
    optimizer = torch.optim.AdamW(
        net.parameters(), args.lr, weight_decay=args.weight_decay, fused=r.device.type in ("cpu", "cuda")
    )
    steps = len(loaded.train.order(args.bs))
    progress = begin(r, net, optimizer, Progress(torch.zeros(steps, 2, device=r.device)))

    for epoch in range(progress.epoch, args.epochs):
        net.train()
        began = time.monotonic()
        first_step = progress.step
        seen = 0  # reviews, since the run began or was resumed
        batches = loaded.train.batches(args.bs, (args.seed, epoch), first_step, r.device, args.bucket)
        bar = tqdm(batches, f"epoch {epoch + 1}/{args.epochs}", steps, initial=first_step, leave=False, disable=None)
        for tokens, lengths, labels, _ in bar:
            done = (epoch + progress.step / steps) / args.epochs  # the fraction of the training
            for group in optimizer.param_groups:
                group["lr"] = args.lr * lr_factor(args.decay, done, args.epochs * steps)
            optimizer.zero_grad()
            loss, logits = backward(net, tokens, lengths, labels, args.adversarial, r)
            torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
            optimizer.step()

            progress.totals[progress.step] = torch.stack([loss * len(labels), (logits.argmax(1) == labels).sum()])
            progress.step += 1
            seen += len(labels)
            if progress.step % 20 == 0 or progress.step == steps:
                r.check_finite(progress.totals[: progress.step, 0], epoch * steps)
                loss, accuracy = (progress.totals[first_step : progress.step].sum(0) / seen).tolist()
                bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.1%}")
            stopping = r.should_stop()
            if stopping or r.save_due(SAVE_SECONDS):
                r.save(model=net, optimizer=optimizer, **vars(progress))
            if stopping:
                r.stop()

        seconds = time.monotonic() - began
        train_loss, train_accuracy = (progress.totals.sum(0) / len(loaded.train)).tolist()
        val_loss, val_accuracy, _ = evaluate(net, loaded.val, r)
        r.check_finite(torch.tensor([val_loss]), (epoch + 1) * steps)
        r.log(
            {
                "epoch": epoch + 1,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "train_accuracy": train_accuracy,
                "val_accuracy": val_accuracy,
                "lr": optimizer.param_groups[0]["lr"],
                "epoch_seconds": round(seconds, 2),
            }
        )
        r.print(
            f"epoch {epoch + 1:>2}/{args.epochs}   loss {train_loss:.3f} train {val_loss:.3f} val   accuracy "
            f"{train_accuracy:.1%} train {val_accuracy:.2%} val   {seen / seconds:,.0f} reviews/s"
        )
        if val_accuracy > progress.best:
            progress.best = val_accuracy
            r.save_best(model=net, epoch=epoch + 1, classes=list(loaded.corpus.classes), words=loaded.vocabulary.words)
        progress.totals.zero_()
        progress.epoch, progress.step = epoch + 1, 0
        r.save(model=net, optimizer=optimizer, **vars(progress))


@torch.no_grad()
def evaluate(net, reviews, r):
    """(mean cross-entropy, accuracy, logits (N, classes) on the CPU in the order of `reviews`)."""
    net.eval()
    logits = torch.zeros(len(reviews), net.linear.out_features)
    for tokens, lengths, _, index in reviews.batches(256, device=r.device):
        with r.autocast():
            logits[index] = net(tokens, lengths).float().cpu()
    correct = (logits.argmax(1) == reviews.labels).sum().item()
    return F.cross_entropy(logits, reviews.labels).item(), correct / len(reviews), logits


def build_model(args, vocabulary: int, classes: int) -> model.SentimentLSTM:
    """The network of a recipe: of `args`, or of the arguments in a record."""
    return model.SentimentLSTM(
        vocabulary,
        classes,
        args.embed,
        args.hidden,
        args.layers,
        args.bidirectional,
        args.pool,
        args.cell,
        args.dropout,
        args.word_dropout,
        args.embed_std,
    )


def load_data(args, sentences: float = 0.0) -> data.Data:
    """The data of `args`, or of the arguments in a record. sentences: see data.load."""
    return data.load(
        args.data,
        args.data_dir,
        args.limit,
        args.split,
        args.max_words,
        args.min_count,
        args.stop_words,
        args.max_len,
        args.keep,
        sentences,
    )


def recipe(given: dict) -> Options:
    """The recipe that the flags `given` name."""
    name = given.get("recipe", "plain")
    return replace(RECIPES[name], recipe=name)


def parse(argv=None) -> Options:
    return run.parse_options(__file__, Options, argv, recipe, extendable=lambda args: args.decay == "none")


def main(argv=None):
    args = parse(argv)
    loaded = load_data(args, args.sentences)
    facts, classes = loaded.facts, loaded.corpus.classes
    args.data = facts["name"] if args.data == "auto" else args.data
    name = f"{facts['name']}-{args.recipe}"
    with run.Run(args, __file__, name, AUTO_PRECISION, AUTO_THREADS, stop_within_epoch=True) as r:
        sizes = len(loaded.vocabulary), len(classes)
        run.check_memory(lambda: build_model(args, *sizes), r.device, "--hidden, --layers, --embed")
        net = build_model(args, *sizes)
        start = initialization.initialize(net, loaded.vocabulary, args, r)
        net = net.to(r.device)
        parameters = run.count_parameters(net)
        dropped = "".join(f", {n:,} {reason} dropped" for reason, n in facts["dropped"].items())
        r.note(
            f"LSTM, {parameters:,} parameters, on {facts['name']}: {facts['rows']:,} rows{dropped}; "
            f"{facts['train']:,} training, {facts['val']:,} validation, {facts['test']:,} test reviews",
            dataset=facts,
            parameters=parameters,
            **start,
        )
        train(args, r, net, loaded)

        best = r.load_best(model=net)
        final = {"best_epoch": best["epoch"]}
        final["val_loss"], final["val_accuracy"], val_logits = evaluate(net, loaded.val, r)
        final["test_loss"], final["test_accuracy"], logits = evaluate(net, loaded.test, r)
        final |= outcome.report(r, loaded, logits, fit_temperature(val_logits, loaded.val.labels))
        r.finish(
            f"test accuracy {final['test_accuracy']:.2%} with the weights of epoch {best['epoch']} (validation "
            f"{final['val_accuracy']:.2%}), F1 {final['test_f1']:.3f}",
            uniform_loss=math.log(len(classes)),
            **final,
        )
    return r.record


if __name__ == "__main__":
    run.cli(main)
