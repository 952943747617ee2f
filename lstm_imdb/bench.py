"""How many reviews per second does training read? The usual way and ours, side by side.

    python lstm_imdb/bench.py                      # IMDB, 400 words, some minutes
    python lstm_imdb/bench.py --max-len 200 --steps 5

(a) usual: one review at a time from a Dataset, all padded to --max-len, a DataLoader without workers, nn.Dropout;
(b) buckets: Reviews.batches, reviews of similar length, padded to the longest of the batch;
(c) buckets, and model.py's dropout in place of nn.Dropout;
(d) train.py: the same in bfloat16, if the hardware multiplies it;
(e) the same as (b) with packed sequences in place of padding;
(f) the same as (b) with the LSTM cell written out in model.py.
Then both directions: (g) reversing by length, as model.py does, and (h) nn.LSTM with packed sequences.
The network, its loss and its update are the same, and padding never changes its output. The ways take turns, each
on --steps batches a round, so that a machine that slows down slows all of them; a way's batches are a random sample
of its epoch. Reported are medians. Writes bench.json into --out.
"""

import itertools
import statistics
import time
from dataclasses import dataclass, replace

from common import run, timing
from common.options import option

import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

import data
import train

BS = 64


class PackedLSTM(torch.nn.Module):
    """nn.LSTM on packed sequences, in place of the layer of model.SentimentLSTM."""

    def __init__(self, embed, hidden, bidirectional):
        super().__init__()
        self.lstm = torch.nn.LSTM(embed, hidden, batch_first=True, bidirectional=bidirectional)

    def states(self, x, lengths):
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)  # (B, T, directions x H)
        return list(y.chunk(1 + self.lstm.bidirectional, 2))


class Precision:
    """The part of a run that train.backward needs."""

    def __init__(self, device, bf16: bool):
        self.device = device
        self.bf16 = bf16

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def usual_batches(reviews, epoch):
    """Batches in the usual way; each review is padded to max_len by the Dataset."""
    generator = torch.Generator().manual_seed(epoch)
    for tokens, labels in DataLoader(reviews, BS, shuffle=True, generator=generator):
        yield tokens, (tokens != data.PAD).sum(1), labels


def ways_of(loaded, args, device):
    """{name: function of the round that returns reviews per second}"""
    reviews, steps = loaded.train, args.steps

    def ours(epoch):
        return (batch[:3] for batch in reviews.batches(BS, (0, epoch)))

    def way(batches, bf16=False, packed=False, usual_dropout=True, **changes):
        torch.manual_seed(0)
        values = replace(train.PLAIN, **changes)
        net = train.build_model(values, len(loaded.vocabulary), len(loaded.corpus.classes))
        if packed:
            net.packed = PackedLSTM(values.embed, values.hidden, values.bidirectional)
            net.states = lambda x, lengths: net.packed.states(net.dropout(x), lengths)
            del net.layers
        if usual_dropout:
            net.dropout = torch.nn.Dropout(values.dropout)
        optimizer = torch.optim.AdamW(net.to(device).parameters(), values.lr, fused=device.type in ("cpu", "cuda"))
        precision = Precision(device, bf16)

        def rate(epoch):
            seen, began = 0, time.perf_counter()
            for tokens, lengths, labels in itertools.islice(batches(epoch), steps):
                tokens = tokens.to(device)
                lengths = lengths.to(device)
                labels = labels.to(device)
                optimizer.zero_grad()
                loss, _ = train.backward(net, tokens, lengths, labels, values.adversarial, precision)
                torch.nn.utils.clip_grad_norm_(net.parameters(), values.clip)
                optimizer.step()
                seen += len(labels)
            loss.item()  # a GPU has finished when its last result is here
            return seen / (time.perf_counter() - began)

        return rate

    both = dict(bidirectional=True)
    ways = {"usual": way(lambda epoch: usual_batches(reviews, epoch)), "buckets": way(ours)}
    ways["buckets, dropout of model.py"] = way(ours, usual_dropout=False)
    if run.native_bf16(device):
        ways["train.py: with bfloat16, too"] = way(ours, bf16=True, usual_dropout=False)
    ways["buckets, packed"] = way(ours, packed=True)
    ways["buckets, custom cell"] = way(ours, cell="custom")
    ways["both directions, reversed"] = way(ours, **both)
    ways["both directions, packed"] = way(ours, packed=True, **both)
    return ways


def padding(reviews) -> dict:
    """Words of padded batches for each word that is read: with everything at max_len, in random batches, in buckets."""
    words = int(reviews.lengths.sum())
    wide = {"random batches": reviews.order(BS, (0, 0), bucket=1), "buckets": reviews.order(BS, (0, 0))}
    factors = {
        name: sum(len(b) * int(reviews.lengths[b].max()) for b in batches) / words for name, batches in wide.items()
    }
    return {"fixed length": len(reviews) * reviews.max_len / words} | factors


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    data: str = option("auto", data.DATA_HELP, type=data.dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    limit: int | None = option(None, "only the first N examples of each part", above=0)
    device: str = run.device_option()
    threads: int | str = run.threads_option()
    max_len: int = option(400, "words of a review", above=0)
    steps: int = option(20, "batches of each way in a round", above=0)
    rounds: int = option(5, "turns of each way", above=0)
    out: str = option(str(run.ROOT / "out/lstm_imdb/bench"), "folder for bench.json", type=run.path_arg, metavar="DIR")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    run.set_threads(args.threads)
    device, out = run.pick_device(args.device), run.make_folder(args.out)
    loaded = data.load(args.data, args.data_dir, args.limit, max_len=args.max_len)
    machine, factors = run.environment(device, __file__, argv), padding(loaded.train)
    hardware = f"{machine['device']['name']}, {machine['device']['threads']} threads"
    print(f"{len(loaded.train):,} reviews of {loaded.facts['name']}, at most {args.max_len} words; {hardware}")
    print("padded words per word: " + ", ".join(f"{name} {factor:.2f}" for name, factor in factors.items()))
    rates = timing.turns(ways_of(loaded, args, device), args.rounds)
    rows = []
    for name, values in rates.items():
        row = {
            "way": name,
            "max_len": args.max_len,
            "reviews_per_s": statistics.median(values),
            "times_usual": timing.median_ratio(values, rates["usual"]),
            "rates": values,
        }
        rows.append(row | {"state": "done", "dataset": loaded.facts, "git": machine["git"]})
        print(f"{name:<28} {row['reviews_per_s']:>6,.0f} reviews/s, {row['times_usual']:.2f} times the usual way")
    run.write_json(out / "bench.json", {"bench": "lstm_imdb", **machine, "padding": factors, "rows": rows})
    return rows


if __name__ == "__main__":
    run.cli(main)
