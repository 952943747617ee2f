"""Pretrain the embedding and the LSTM as a language model on the training reviews alone (Dai and Le 2015).

    python lstm_imdb/pretrain.py --recipe best                # out/lstm_imdb/lm/best
    python lstm_imdb/train.py --recipe best --init ../out/lstm_imdb/lm/best/best.pt      # relative to data/

The forward LSTM predicts every next word, the backward LSTM every previous one. The network has the shape of the
recipe of train.py. It learns from the training reviews without their labels, and validation reviews choose the epoch;
test reviews are not read. The softmax over the vocabulary is adaptive (Grave et al. 2017). One pretrained model serves
all seeds.
"""

import math
import time
from dataclasses import dataclass, fields

from common import run
from common.options import option

import torch
from torch import Tensor, nn
from tqdm import tqdm

import model
import train
from train import RECIPE_NAMES, ReviewOptions


@dataclass(kw_only=True)
class Options(ReviewOptions):
    recipe: str = option("best", "the recipe of train.py that the network is for", choices=RECIPE_NAMES)
    out: str | None = option(None, "run folder (default: out/lstm_imdb/lm/RECIPE)", type=run.path_arg, metavar="DIR")

    def check(self):
        if self.layers > 1 and self.bidirectional:
            raise run.UserError("--layers: in both directions the second layer would see the words that it predicts")


def from_recipe(name: str, **changes) -> Options:
    """The options for the network of a recipe of train.py, with changes."""
    shared = {field.name: getattr(train.RECIPES[name], field.name) for field in fields(ReviewOptions)}
    return Options(**shared | {"weight_decay": 0.01, "recipe": name} | changes)


CHANGES = dict(epochs=4, bs=16, lr=0.003, decay="onecycle", dropout=0.2)
RECIPES = {
    "plain": from_recipe("plain", **CHANGES),
    "short": from_recipe("short", **CHANGES),
    "best": from_recipe("best", **CHANGES),
    "tiny": from_recipe("tiny"),
}
SAVE_SECONDS = 120  # between checkpoints within an epoch


class LanguageModel(nn.Module):
    """The embedding and the LSTMs of `net`, with an adaptive softmax over the vocabulary for each direction."""

    def __init__(self, net: model.SentimentLSTM):
        super().__init__()
        words, hidden = net.embedding.num_embeddings, net.layers[0][0].weight_hh_l0.shape[1]
        cutoffs = [cutoff for cutoff in (1000, 10_000) if cutoff < words - 1] or [max(1, words // 2)]
        self.net, self.directions = net, len(net.layers[0])
        self.softmax = nn.ModuleList(
            nn.AdaptiveLogSoftmaxWithLoss(hidden, words, cutoffs) for _ in range(self.directions)
        )

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, int]:
        """tokens (B, T), lengths (B,). Returns (summed cross-entropy of all directions, number of predicted words)."""
        states = self.net.states(self.net.embedding(tokens), lengths)
        inside = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]  # (B, T)
        predicted = inside[:, 1:]  # word t + 1 from the words up to t, and word t from those after it
        loss = self.loss(0, states[0][:, :-1][predicted], tokens[:, 1:][predicted])
        if self.directions == 2:
            loss = loss + self.loss(1, states[1][:, 1:][predicted], tokens[:, :-1][predicted])
        return loss, int(predicted.sum()) * self.directions

    def loss(self, direction, hidden, targets):
        if not len(targets):  # reviews of one word
            return hidden.sum()
        with torch.autocast(hidden.device.type, enabled=False):  # the adaptive softmax does not take mixed types
            return self.softmax[direction](self.net.dropout(hidden.float()), targets).loss * len(targets)


def pretrain(args, r, lm, loaded):
    """Train. Writes metrics.csv, last.pt and best.pt: `lm.net` at the lowest validation loss."""
    optimizer = torch.optim.AdamW(
        lm.parameters(), args.lr, weight_decay=args.weight_decay, fused=r.device.type in ("cpu", "cuda")
    )
    steps = len(loaded.train.order(args.bs))
    totals = torch.zeros(steps, 2, dtype=torch.float64)  # summed loss and number of words of each step
    progress = train.begin(r, lm, optimizer, train.Progress(totals, best=math.inf))  # lowest validation loss

    for epoch in range(progress.epoch, args.epochs):
        lm.train()
        began = time.monotonic()
        first_step = progress.step
        batches = loaded.train.batches(args.bs, (args.seed, epoch), first_step, r.device, args.bucket)
        bar = tqdm(batches, f"epoch {epoch + 1}/{args.epochs}", steps, initial=first_step, leave=False, disable=None)
        for tokens, lengths, _, _ in bar:
            done = (epoch + progress.step / steps) / args.epochs  # the fraction of the training
            for group in optimizer.param_groups:
                group["lr"] = args.lr * train.lr_factor(args.decay, done, args.epochs * steps)
            with r.autocast():
                loss, words = lm(tokens, lengths)
            optimizer.zero_grad()
            (loss / max(words, 1)).backward()
            nn.utils.clip_grad_norm_(lm.parameters(), args.clip)
            optimizer.step()
            progress.totals[progress.step] = torch.tensor([loss.item(), words])
            progress.step += 1
            if progress.step % 20 == 0 or progress.step == steps:
                r.check_finite(progress.totals[: progress.step, 0], epoch * steps)
                bar.set_postfix(loss=f"{mean_loss(progress):.3f}")
            stopping = r.should_stop()
            if stopping or r.save_due(SAVE_SECONDS):
                r.save(model=lm, optimizer=optimizer, **vars(progress))
            if stopping:
                r.stop()

        seconds = time.monotonic() - began
        train_loss = mean_loss(progress)
        val_loss = evaluate(lm, loaded.val, r)
        r.check_finite(torch.tensor([val_loss]), (epoch + 1) * steps)
        r.log({"epoch": epoch + 1, "train_loss": train_loss, "val_loss": val_loss, "epoch_seconds": round(seconds, 2)})
        r.print(
            f"epoch {epoch + 1:>2}/{args.epochs}   loss {train_loss:.3f} train {val_loss:.3f} val   perplexity "
            f"{math.exp(min(val_loss, 50)):.1f} val   {seconds:.0f} s"
        )
        if val_loss < progress.best:
            progress.best = val_loss
            r.save_best(model=lm.net, epoch=epoch + 1, words=loaded.vocabulary.words)
        progress.totals.zero_()
        progress.epoch, progress.step = epoch + 1, 0
        r.save(model=lm, optimizer=optimizer, **vars(progress))
    return progress.best


def mean_loss(progress: train.Progress) -> float:
    """The mean loss per word over the epoch so far; the steps to come are zero."""
    return (progress.totals[:, 0].sum() / progress.totals[:, 1].sum()).item()


@torch.no_grad()
def evaluate(lm, reviews, r) -> float:
    """The mean cross-entropy of a word, in nats, over both directions."""
    lm.eval()
    total, count = 0.0, 0
    for tokens, lengths, _, _ in reviews.batches(64, device=r.device):
        with r.autocast():
            loss, words = lm(tokens, lengths)
        total, count = total + loss.item(), count + words
    return total / max(count, 1)


def build_model(args, loaded) -> LanguageModel:
    """The language model of the options, for the vocabulary of the data."""
    net = model.SentimentLSTM(
        len(loaded.vocabulary),
        len(loaded.corpus.classes),
        embed=args.embed,
        hidden=args.hidden,
        layers=args.layers,
        bidirectional=args.bidirectional,
        cell=args.cell,
        dropout=args.dropout,
        embed_std=args.embed_std,
    )
    return LanguageModel(net)


def parse(argv=None) -> Options:
    return run.parse_options(
        __file__,
        Options,
        argv,
        recipe=lambda given: RECIPES[given.get("recipe", "best")],
        extendable=lambda args: args.decay == "none",
    )


def main(argv=None):
    args = parse(argv)
    loaded = train.load_data(args)
    args.data = loaded.facts["name"] if args.data == "auto" else args.data
    if not args.out and not args.resume:  # a level deeper than the runs of train.py, which predict.py looks for
        args.out = str(run.ROOT / "out" / "lstm_imdb" / "lm" / args.recipe)
    with run.Run(args, __file__, "lm", train.AUTO_PRECISION, train.AUTO_THREADS, stop_within_epoch=True) as r:
        run.check_memory(lambda: build_model(args, loaded), r.device, "--hidden, --layers, --embed")
        lm = build_model(args, loaded).to(r.device)
        parameters = run.count_parameters(lm)
        r.note(
            f"language model, {parameters:,} parameters, on the {loaded.facts['train']:,} training reviews of "
            f"{loaded.facts['name']}",
            dataset=loaded.facts,
            parameters=parameters,
        )
        best = pretrain(args, r, lm, loaded)
        r.finish(
            f"validation perplexity {math.exp(min(best, 50)):.1f}",
            uniform_loss=math.log(len(loaded.vocabulary)),
            val_loss=best,
        )
    return r.record


if __name__ == "__main__":
    run.cli(main)
