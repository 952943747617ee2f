"""Train an LSTM to tell positive film reviews from negative ones.

    python lstm_imdb/train.py                              # the plain recipe, IMDB, five epochs
    python lstm_imdb/train.py --recipe best                # the best recipe found
    python lstm_imdb/train.py --data reviews.csv           # a CSV file of your own
    python lstm_imdb/train.py --data builtin --epochs 10   # a quick look without any download

Validation chooses the epoch; that checkpoint is tested once, at the end. The recipe sets every
hyper-parameter; flags override it.
"""

import argparse
import time

from common import run

import torch
import torch.nn.functional as F
from tqdm import tqdm

import corpus
import data
import model
import outcome
import pretrained

PLAIN = dict(
    epochs=5,
    bs=64,
    bucket=50,  # batches of a chunk that is sorted by length; 1: reviews in random order
    lr=0.003,
    decay="onecycle",
    weight_decay=0.0,
    embed=64,
    embed_std=0.1,
    hidden=128,
    layers=1,
    bidirectional=False,
    cell="torch",
    pool="last",
    dropout=0.5,
    word_dropout=0.0,
    adversarial=0.0,
    max_words=20_000,
    min_count=2,
    stop_words=False,
    max_len=400,
    keep="end",
    clip=1.0,
)
RECIPES = {
    "plain": PLAIN,
    "best": PLAIN
    | dict(epochs=6, embed=100, bidirectional=True, pool="max", word_dropout=0.2, max_words=30_000, adversarial=0.05),
    "tiny": PLAIN | dict(epochs=2, bs=20, embed=8, hidden=8, max_words=500, decay="none"),  # a second, for tests
}
AUTO_PRECISION = "bf16"  # bench.py: 1.35 times as fast as fp32 if the hardware multiplies bfloat16
AUTO_THREADS = 1  # tools/seconds.py: a second one gains nothing
SAVE_EVERY = 120  # seconds between checkpoints within an epoch


def lr_factor(decay: str, progress: float) -> float:
    """The factor of the learning rate at `progress` in [0, 1), the fraction of all steps that are done."""
    if decay == "onecycle":  # up for a tenth of the run, then down to a hundredth (Smith and Topin 2017)
        return min(progress / 0.1, (1 - progress) / 0.9) + 0.01
    return 1.0


def backward(net, tokens, lengths, labels, adversarial, r):
    """Forward and backward of a batch: tokens (B, T), lengths and labels (B,). Returns the loss and the logits (B, C).

    Adversarial training (Miyato et al. 2017, section 3): the batch is also trained with the word vectors moved in the
    direction in which the loss rises fastest, by `adversarial` times the norm of the review's vectors.
    """
    tokens = net.drop_words(tokens)
    vectors = net.embedding(tokens)  # (B, T) -> (B, T, E)
    with r.autocast():
        logits = net.classify(vectors, lengths)  # (B, T, E), (B,) -> (B, C)
    loss = F.cross_entropy(logits.float(), labels)
    if not adversarial:
        loss.backward()
        return loss.detach(), logits
    vectors.retain_grad()
    (loss / 2).backward()
    size, slope = (x.flatten(1).norm(dim=1)[:, None, None] for x in (vectors.detach(), vectors.grad))  # (B, 1, 1)
    move = adversarial * size / slope.clamp(min=1e-12) * vectors.grad
    with r.autocast():
        moved = net.classify(net.embedding(tokens) + move, lengths)
    adversarial_loss = F.cross_entropy(moved.float(), labels)
    (adversarial_loss / 2).backward()
    return (loss + adversarial_loss).detach() / 2, logits


def train(args, r, net, loaded):
    """Train, and leave in the run folder metrics.csv, last.pt and best.pt (the highest validation accuracy)."""
    optimizer = torch.optim.AdamW(net.parameters(), args.lr, weight_decay=args.weight_decay,
                                  fused=r.device.type in ("cpu", "cuda"))  # fmt: skip
    n, steps = len(loaded.train), len(loaded.train.order(args.bs))
    first_epoch, step, best, totals = 0, 0, -1.0, torch.zeros(steps, 2)
    if state := r.load(model=net, optimizer=optimizer):
        first_epoch, step, best, totals = (state[k] for k in ("epoch", "step", "best", "totals"))
    totals = totals.to(r.device)  # summed loss and correct predictions of each step

    def checkpoint(epoch, step):
        r.save(model=net, optimizer=optimizer, epoch=epoch, step=step, best=best, totals=totals)

    for epoch in range(first_epoch, args.epochs):
        net.train()
        began = saved = time.monotonic()
        batches = loaded.train.batches(args.bs, (args.seed, epoch), start=step, device=r.device, bucket=args.bucket)
        bar = tqdm(batches, f"epoch {epoch + 1}/{args.epochs}", steps, initial=step, leave=False, disable=None)
        first_step, seen = step, 0
        for tokens, lengths, labels, _ in bar:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * lr_factor(args.decay, (epoch + step / steps) / args.epochs)
            optimizer.zero_grad()
            loss, logits = backward(net, tokens, lengths, labels, args.adversarial, r)
            torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
            optimizer.step()

            totals[step] = torch.stack([loss * len(labels), (logits.argmax(1) == labels).sum()])
            step, seen = step + 1, seen + len(labels)
            if step % 20 == 0 or step == steps:
                r.check_finite(totals[:step, 0], epoch * steps)
                loss, accuracy = (totals[first_step:step].sum(0) / seen).tolist()
                bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.1%}")
            stopping = r.should_stop()
            if stopping or time.monotonic() - saved > SAVE_EVERY:
                checkpoint(epoch, step)
                saved = time.monotonic()
            if stopping:
                r.stop()

        seconds, (train_loss, train_accuracy) = time.monotonic() - began, (totals.sum(0) / n).tolist()
        val_loss, val_accuracy, _ = evaluate(net, loaded.val, r)
        r.check_finite(torch.tensor([train_loss, val_loss]), (epoch + 1) * steps - 1)
        r.log({"epoch": epoch + 1, "train_loss": train_loss, "val_loss": val_loss, "train_accuracy": train_accuracy,
               "val_accuracy": val_accuracy, "lr": optimizer.param_groups[0]["lr"],
               "seconds": round(seconds, 2)})  # fmt: skip
        r.print(f"epoch {epoch + 1:>2}/{args.epochs}   loss {train_loss:.3f} train {val_loss:.3f} val   accuracy "
                f"{train_accuracy:.1%} train {val_accuracy:.2%} val   {seen / seconds:,.0f} reviews/s")  # fmt: skip
        if val_accuracy > best:
            best = val_accuracy
            r.save_best(model=net, epoch=epoch + 1, classes=list(loaded.corpus.classes), words=loaded.vocabulary.words)
        step = 0
        totals.zero_()
        checkpoint(epoch + 1, step)


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
    return model.SentimentLSTM(vocabulary, classes, args.embed, args.hidden, args.layers, args.bidirectional,
                               args.pool, args.cell, args.dropout, args.word_dropout, args.embed_std)  # fmt: skip


def load_data(args) -> data.Data:
    """The data of `args`, or of the arguments in a record."""
    return data.load(args.data, args.data_dir, args.limit, args.split, args.max_words, args.min_count, args.stop_words,
                     args.max_len, args.keep)  # fmt: skip


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run.add_flags(p, recipe=dict(choices=list(RECIPES), default="plain"))
    run.add_flags(p, "set", "tensorboard", "data_dir", "out", "resume",
                  data=dict(type=data.dataset_arg, default="auto", help=data.DATA_HELP))  # fmt: skip
    p.add_argument("--split", choices=corpus.SPLITS, default="7:1:2", help="(default: %(default)s)")
    run.add_flags(p, "epochs", "bs", "lr", "weight_decay", "seed", "device", "threads", "precision", "limit")
    p.add_argument("--layers", type=run.positive_int, metavar="N", help="LSTM layers")
    p.add_argument("--bidirectional", action=argparse.BooleanOptionalAction, help="read in both directions")
    p.add_argument("--cell", choices=model.CELLS, help="nn.LSTM, or the one written out in model.py")
    p.add_argument("--pool", choices=model.POOLS, help="the state at the last word, or pooling over all states")
    p.add_argument("--max-len", type=run.positive_int, metavar="N", help="words of a review that are read")
    p.add_argument("--stop-words", action=argparse.BooleanOptionalAction, help="leave out scikit-learn's stop words")
    files = "a file, relative to the folder of the datasets"
    p.add_argument("--vectors", type=run.path_arg, metavar="FILE", help=f"word vectors in GloVe's text format: {files}")
    p.add_argument("--init", type=run.path_arg, metavar="FILE", help=f"best.pt of a run of pretrain.py: {files}")
    p.epilog = "recipes:\n" + "\n".join(
        f"  {name}: " + ", ".join(f"{k} {v}" for k, v in values.items() if name == "plain" or PLAIN.get(k) != v)
        for name, values in RECIPES.items()
    )
    return p


def check(args):
    """Raise UserError for values of --set that are out of range."""
    for name, choices in {"decay": ("none", "onecycle"), "keep": ("start", "end")}.items():
        if getattr(args, name) not in choices:
            raise run.UserError(f"--set {name}={getattr(args, name)}: must be one of {', '.join(choices)}")
    for name in ("dropout", "word_dropout"):
        if not 0 <= getattr(args, name) < 1:
            raise run.UserError(f"--set {name}={getattr(args, name)}: must be at least 0 and below 1")
    if not 0 <= args.adversarial <= 1:
        raise run.UserError(f"--set adversarial={args.adversarial}: must be from 0 to 1")
    limits = dict(bucket=10_000, embed=10_000, hidden=10_000, max_words=10_000_000, min_count=10_000_000)
    for name, high in limits.items():
        if not 0 < getattr(args, name) <= high:
            raise run.UserError(f"--set {name}={getattr(args, name)}: must be from 1 to {high}")
    for name in ("clip", "embed_std"):
        if not getattr(args, name) > 0:
            raise run.UserError(f"--set {name}={getattr(args, name)}: must be above 0")


def parse(argv=None):
    return run.parse(__file__, parser(), argv, lambda args: RECIPES[args.recipe], check,
                     extendable=lambda args: args.decay == "none")  # fmt: skip


def main(argv=None):
    args = parse(argv)
    loaded = load_data(args)
    facts, classes = loaded.facts, loaded.corpus.classes
    args.data = facts["name"] if args.data == "auto" else args.data
    name = f"{facts['name']}-{args.recipe}"
    with run.Run(args, __file__, name, AUTO_PRECISION, AUTO_THREADS, stop_within_epoch=True) as r:
        net = build_model(args, len(loaded.vocabulary), len(classes))
        start = pretrained.initialize(net, loaded.vocabulary, args, r)
        net, parameters = net.to(r.device), model.num_parameters(net)
        dropped = "".join(f", {n:,} {reason} dropped" for reason, n in facts["dropped"].items())
        r.note(f"LSTM, {parameters:,} parameters, on {facts['name']}: {facts['rows']:,} rows{dropped}; "
               f"{facts['train']:,} training, {facts['val']:,} validation, {facts['test']:,} test reviews",
               dataset=facts, parameters=parameters, **start)  # fmt: skip
        train(args, r, net, loaded)

        best = r.load_best(model=net)
        final = {"best_epoch": best["epoch"]}
        final["val_loss"], final["val_accuracy"], _ = evaluate(net, loaded.val, r)
        final["test_loss"], final["test_accuracy"], logits = evaluate(net, loaded.test, r)
        final |= outcome.report(r, loaded, logits)
        r.finish(f"test accuracy {final['test_accuracy']:.2%} with the weights of epoch {best['epoch']} (validation "
                 f"{final['val_accuracy']:.2%}), F1 {final['test_f1']:.3f}", **final)  # fmt: skip
    return r.record


if __name__ == "__main__":
    run.cli(main)
