"""From counting pairs to a Transformer, one idea at a time, and what the classic mistakes look like.

    python nanogpt/stages.py                                    # both studies on WikiText-2, three seeds: ten minutes
    python nanogpt/stages.py --study mistakes --seeds 1
    python nanogpt/stages.py --data builtin --iters 100 --seeds 1           # a look without any download

Every stage is trained for as long, by the plainest loop there is, and tested once, at the end. The command given again
continues where it stopped. Under --out: STUDY.json with a row a stage and seed, STUDY.png, and STUDY-samples.txt.
"""

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import data
import run
from baselines import Bigram, BigramConfig
from generate import generate

BLOCK, BATCH, WIDTH, LR = 64, 12, 64, 1e-2  # tokens in a block, blocks in a batch, C, learning rate
# Of the rates that were tried on validation text, the best; a row of the bigram's table is rarely met and needs more
RATE = {"bigram": 0.3, "residuals, three times the rate": 3 * LR, "normalization, three times the rate": 3 * LR}
LOOKED_AT, MEASURED = 10_000, 100_000  # so many tokens of a part for a point of the curve, and at the end


# ------------------------------------------------------------------------------------------------------------ models
# B texts of T tokens, C numbers a token, V tokens in the vocabulary


class Average(nn.Module):
    """Each position gets the mean of itself and all before it."""

    def forward(self, x):
        weights = torch.ones(x.shape[1], x.shape[1]).tril()  # (T, T)
        return weights / weights.sum(1, keepdim=True) @ x  # (T, T) @ (B, T, C) -> (B, T, C)


class Attention(nn.Module):
    """Each position gets a mean of itself and all before it, with weights that it chooses (Vaswani et al. 2017)."""

    def __init__(self, n_head=1, mistake=None):
        super().__init__()
        self.n_head, self.mistake = n_head, mistake
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x):
        B, T, C = x.shape
        # (B, T, C) -> (B, n_head, T, C / n_head)
        q, k, v = (f(x).view(B, T, self.n_head, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = q @ k.transpose(2, 3)  # (B, n_head, T, T): how well what t asks for is answered by what s offers
        if self.mistake != "scores not divided by sqrt(d)":
            scores = scores / math.sqrt(C / self.n_head)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        if self.mistake == "no mask":
            weights = scores.softmax(3)
        elif self.mistake == "mask after the softmax":
            weights = scores.softmax(3).masked_fill(future, 0)
        elif self.mistake == "softmax over the wrong dimension":
            weights = scores.masked_fill(future, -math.inf).softmax(2)
        else:
            weights = scores.masked_fill(future, -math.inf).softmax(3)
        return self.out((weights @ v).transpose(1, 2).reshape(B, T, C))  # (B, n_head, T, d) -> (B, T, C)


class Block(nn.Module):
    """Tokens exchange what they know; then, with an MLP, each thinks about it by itself."""

    def __init__(self, mix, mlp=False, residual=False, norm=False):
        super().__init__()
        self.mix, self.residual = mix, residual
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH)) if mlp else None
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH) if norm else nn.Identity() for _ in range(2))

    def forward(self, x):
        for norm, layer in ((self.norm1, self.mix), (self.norm2, self.mlp)):
            if layer is not None:
                y = layer(norm(x))
                x = x + y if self.residual else y
        return x


class Network(nn.Module):
    """Token and position embeddings, blocks, and a linear layer to the logits."""

    def __init__(self, vocab_size, n_layer=1, n_head=0, mistake=None, **block):
        super().__init__()
        self.vocab_size, self.block_size, self.mistake = vocab_size, BLOCK, mistake
        self.tokens, self.positions = nn.Embedding(vocab_size, WIDTH), nn.Embedding(BLOCK, WIDTH)
        self.blocks = nn.Sequential(
            *(Block(Attention(n_head, mistake) if n_head else Average(), **block) for _ in range(n_layer))
        )
        self.norm = nn.LayerNorm(WIDTH) if block.get("norm") else nn.Identity()
        self.head = nn.Linear(WIDTH, vocab_size)
        if mistake == "head tied to embeddings of deviation 1":
            self.head.weight = self.tokens.weight

    def forward(self, idx):
        x = self.tokens(idx)  # (B, T) -> (B, T, C)
        if self.mistake != "no positions":
            x = x + self.positions.weight[: idx.shape[1]]
        return self.head(self.norm(self.blocks(x)))  # (B, T, C) -> (B, T, V)


DEEP = dict(n_layer=4, n_head=4, mlp=True)
WHOLE = DEEP | dict(residual=True, norm=True)
STUDIES = {  # study: {setting: the model, given the size of the vocabulary}
    "stages": {
        "bigram, counted": lambda V: Bigram(BigramConfig(V, BLOCK)),
        "bigram": lambda V: Bigram(BigramConfig(V, BLOCK)),
        "averaging": lambda V: Network(V),
        "one head": lambda V: Network(V, n_head=1),
        "four heads": lambda V: Network(V, n_head=4),
        "and an MLP": lambda V: Network(V, n_head=4, mlp=True),
        "four layers of it": lambda V: Network(V, **DEEP),
        "with residuals": lambda V: Network(V, **DEEP, residual=True),
        "and layer normalization": lambda V: Network(V, **WHOLE),
        "residuals, three times the rate": lambda V: Network(V, **DEEP, residual=True),
        "normalization, three times the rate": lambda V: Network(V, **WHOLE),
    },
    "mistakes": {"none": lambda V: Network(V, **WHOLE)}
    | {
        mistake: lambda V, mistake=mistake: Network(V, mistake=mistake, **WHOLE)
        for mistake in (
            "no mask",
            "mask after the softmax",
            "softmax over the wrong dimension",
            "scores not divided by sqrt(d)",
            "no positions",
            "head tied to embeddings of deviation 1",
        )
    }
    | {"targets not moved on": lambda V: Network(V, mistake="targets not moved on", **WHOLE)},
}
ITERS = {"stages": 600, "mistakes": 500}


# ---------------------------------------------------------------------------------------------- training and measuring


def count_pairs(tokens, vocab_size):
    """Logits of the best bigram there is, (V, V), without any gradient: how often which token follows which."""
    tokens = tokens.long()
    counts = torch.bincount(tokens[:-1] * vocab_size + tokens[1:], minlength=vocab_size**2)
    return (counts.view(vocab_size, vocab_size) + 0.1).log().log_softmax(1)  # 0.1: what never came is not impossible


def loss_of(net, x, y):
    """Mean cross-entropy in nats a token, of x and y (B, T)."""
    if getattr(net, "mistake", None) == "targets not moved on":
        y = x
    return F.cross_entropy(net(x).flatten(0, 1), y.flatten())  # (B, T, V) -> (B * T, V)


def fit(net, text, iters, seed, lr=LR, look=lambda step: None):
    """The plainest loop: AdamW, a few steps of warm-up, and down to zero in a straight line; train.py has the rest."""
    optimizer = torch.optim.AdamW(net.parameters(), lr, betas=(0.9, 0.99), fused=True)
    for step in range(iters):
        look(step)
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 50) * (1 - step / iters)
        x, y = data.batch(text.train, BLOCK, BATCH, seed, step)
        loss = loss_of(net, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not loss.isfinite():
            raise run.Diverged(step)
    look(iters)


@torch.no_grad()
def evaluate(net, tokens):
    """Mean loss over all of `tokens`, in nats a token."""
    total = sum(loss_of(net, x, y).item() * y.numel() for x, y in data.blocks(tokens, BLOCK, 8 * BATCH))
    return total / (len(tokens) - 1)


@torch.no_grad()
def last_position(net, tokens, n=1000):
    """Mean loss at the last position of n blocks alone, after which there is nothing to peek at: what a model is worth
    when it has to write."""
    losses = [
        F.cross_entropy(net(x)[:, -1], y[:, -1])
        for x, y in (data.batch(tokens, BLOCK, 100, 0, step) for step in range(n // 100))
    ]
    return torch.stack(losses).mean().item()


@torch.no_grad()
def leak(net):
    """The most that any earlier logit changes when the last token does: zero in a causal model, up to rounding."""
    x = torch.arange(BLOCK)[None] % net.vocab_size
    z = x.clone()
    z[0, -1] = (x[0, -1] + 1) % net.vocab_size
    return (net(x) - net(z))[:, :-1].abs().max().item()


def write_some(net, tokenizer, n=120):
    """A text of n tokens that begins with the end of a line, always drawn with the same luck."""
    prompt = tokenizer.encode("\n") if not tokenizer.missing("\n") else [0]
    drawn = generate(net, torch.tensor([prompt]), n, temperature=0.8, generator=torch.Generator().manual_seed(0))
    return tokenizer.decode(list(drawn)).strip()


def one_run(study, setting, seed, text, iters):
    """Train and measure one stage: the row of the record."""
    torch.manual_seed(seed)
    net, began, curve = STUDIES[study][setting](text.tokenizer.vocab_size), time.monotonic(), []
    every = max(1, iters // 10)
    row = {"state": "done", "initial_loss": evaluate(net, text.val[: BLOCK * BATCH])}

    def look(step):
        if step % every == 0:
            curve.append((step, round(evaluate(net, text.val[:LOOKED_AT]), 4)))

    try:
        if setting == "bigram, counted":
            net.table.weight.data = count_pairs(text.train, text.tokenizer.vocab_size)
            look(0), look(every * 10)
        else:
            fit(net, text, iters, seed, RATE.get(setting, LR), look)
    except run.Diverged as error:
        return row | {"state": "diverged", "diverged_at_step": error.step, "curve": curve}
    row |= {
        "wall_s": round(time.monotonic() - began, 1),
        "curve": curve,
        "parameters": sum(p.numel() for p in net.parameters()),
        "sample": write_some(net, text.tokenizer),
    }
    parts = {"val": text.val[:MEASURED]}
    if text.test is not None and study == "stages":
        parts["test"] = text.test[:MEASURED]
    final = {f"{part}_loss": evaluate(net, tokens) for part, tokens in parts.items()}
    for part in parts:
        final[f"{part}_bits_per_character"] = final[f"{part}_loss"] / math.log(2) / text.characters_per_token[part]
    if study == "mistakes":
        final |= {"last_position_loss": last_position(net, text.val), "leak": leak(net)}
    return row | {"final": final}


# ------------------------------------------------------------------------------------------------------------ reports


def code_digest():
    """Of all the scripts in this folder."""
    content = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def earlier(file, common, iters, limit):
    """The rows of the record that an earlier call has left, with the same code. One of another text or length is an
    error: a quick look does not replace the study."""
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    for row in rows:
        if (row["dataset"], row["args"]["iters"], row["args"]["limit"]) != (common["dataset"], iters, limit):
            raise run.UserError(f"{file}: is of other --data, --tokens, --iters or --limit; name another --out")
    return [row for row in rows if all(row.get(key) == common[key] for key in ("code", "versions"))]


def draw(study, rows, vocab_size, path):
    """Left the validation loss as it falls; right where it ends, which is the legend too."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = matplotlib.colormaps["tab20"]
    names = [name for name in STUDIES[study] if any(r["setting"] == name and r["state"] == "done" for r in rows)]
    for i, name in enumerate(names):
        mine = [r for r in rows if r["setting"] == name and r["state"] == "done"]
        curves = np.array([[loss for _, loss in r["curve"]] for r in mine])
        left.plot([step for step, _ in mine[0]["curve"]], curves.mean(0), color=colours(i))
        end = np.mean([r["final"]["val_loss"] for r in mine])
        bar = min(end, math.log(vocab_size))  # what explodes is cut off
        right.barh(name, bar, color=colours(i))
        shown = f"{end:.3f}" if end < 1e4 else f"{end:.0e}"
        right.annotate(shown, (bar, i), (3, 0), textcoords="offset points", va="center", fontsize=8)
    left.axhline(math.log(vocab_size), color="grey", ls=":", lw=1)
    left.annotate(
        "ln V: knows nothing",
        (0.98, math.log(vocab_size)),
        (0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        color="grey",
        fontsize=8,
    )
    ends = [r["final"]["val_loss"] for r in rows if r["state"] == "done"]
    left.set(xlabel="iteration", ylabel="validation loss (nats a token)")
    left.set_ylim(min(ends) - 0.2, math.log(vocab_size) + 0.6)
    right.set(xlabel="validation loss at the end", xlim=(0, 1.15 * min(max(ends), math.log(vocab_size))))
    right.invert_yaxis()
    left.grid(alpha=0.3)
    run.write_figure(path, figure)


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--study", nargs="+", choices=list(STUDIES), default=list(STUDIES), help="(default: both)")
    p.add_argument("--seeds", type=run.positive_int, default=3, metavar="N", help="seeds 0 to N - 1 (default: 3)")
    p.add_argument("--tokens", choices=data.TOKENS, default="char", help="(default: %(default)s)")
    run.add_flags(
        p,
        "data_dir",
        "limit",
        data=dict(type=data.dataset_arg, default="wikitext2", help=data.DATA_HELP),
        iters=dict(help="training steps (default: 600 a stage, 500 a mistake)"),
        out=dict(default=str(run.ROOT / "out" / "nanogpt" / "stages"), help="where to"),
    )
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    out = run.make_folder(args.out)
    text = data.load(args.data, args.data_dir, args.limit, args.tokens)
    common = {
        "dataset": text.facts(),
        "git": run.git_state(Path(__file__).parent),
        "code": code_digest(),
        "versions": run.versions(),
        "device": run.describe_device(torch.device("cpu")),
    }
    for study in args.study:
        iters, rows = args.iters or ITERS[study], []
        done = earlier(out / f"{study}.json", common, iters, args.limit)
        jobs = [(seed, setting) for seed in range(args.seeds) for setting in STUDIES[study]]
        print(
            f"{study} on {text.name}: {len(text.train):,} tokens to train on, {iters} steps of {BATCH} x {BLOCK} "
            f"each; ln {text.tokenizer.vocab_size} = {math.log(text.tokenizer.vocab_size):.3f}"
        )
        for seed, setting in tqdm(jobs, study, leave=False, disable=None):
            kept = dict(
                data=text.name,
                tokens=args.tokens,
                iters=iters,
                limit=args.limit,
                lr=RATE.get(setting, LR),
                bs=BATCH,
                block=BLOCK,
                width=WIDTH,
                seed=seed,
            )
            row = {"study": study, "setting": setting, "seed": seed, "args": kept}
            if not (same := [r for r in done if row.items() <= r.items()]):
                same = [row | one_run(study, setting, seed, text, iters) | common]
            rows += same
            end = f"{rows[-1]['final']['val_loss']:.4f} val" if "final" in rows[-1] else "diverged"
            tqdm.write(f"  {setting:40} seed {seed}   loss {rows[-1]['initial_loss']:.3f} -> {end}")
            left = [r for r in done if all(r["setting"] != k["setting"] or r["seed"] != k["seed"] for k in rows)]
            run.write_json(out / f"{study}.json", {"study": study, "rows": rows + left})
        draw(study, rows, text.tokenizer.vocab_size, out / f"{study}.png")
        run.write(
            out / f"{study}-samples.txt",
            "\n\n".join(
                f"--- {row['setting']}\n{row['sample']}" for row in rows if row["seed"] == 0 and "sample" in row
            )
            + "\n",
        )
        print(f"  {run.shown(out)}: {study}.json, {study}.png, {study}-samples.txt")


if __name__ == "__main__":
    run.cli(main)
