"""Train one stage on the way from a bigram to a Transformer, or one with a classic mistake; stages.py trains them all.

    python nanogpt/stage.py --recipe "with residuals"                       # 600 steps on WikiText-2: 20 seconds
    python nanogpt/stage.py --recipe "no mask" --data builtin --iters 100

The networks are written as plainly as possible, and so is the training loop, `fit`. train.py has the rest.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import ClassVar

from common import run
from common.options import option

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
from data import DATA_HELP, TOKENS, dataset_arg
from model import LAYERS
from networks.baselines import Bigram, BigramConfig
from sampling import generate

CURVE_TOKENS, FINAL_TOKENS = 10_000, 100_000  # tokens of a part for a point of the curve, and for the final loss
MISTAKES_OF_ATTENTION = (
    "no mask",
    "mask after the softmax",
    "softmax over the wrong dimension",
    "scores not divided by sqrt(d)",
)
MISTAKES = (*MISTAKES_OF_ATTENTION, "no positions", "head tied to embeddings with std 1", "targets not shifted")
SIZE = 2**17  # above any width or length that a machine could hold
RECIPE_NAMES = [
    "bigram, counted",
    "bigram",
    "averaging",
    "one head",
    "four heads",
    "and an MLP",
    "four layers of it",
    "with residuals",
    "and layer normalization",
    "residuals, three times the rate",
    "normalization, three times the rate",
    "none",
    *MISTAKES,
]


@dataclass(kw_only=True)
class Options(run.RunOptions):
    data: str = option("wikitext2", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    limit: int | None = option(None, "only the first N tokens of each part, for a quick look", above=0)
    recipe: str = option("and layer normalization", "the stage", choices=RECIPE_NAMES, metavar="NAME")
    tokens: str = option("char", "what a token is", choices=TOKENS)
    iters: int = option(600, "training steps", above=0)
    bs: int = option(12, "batch size: sequences of one step", above=0)
    lr: float = option(1e-2, "peak learning rate; the best of those tried on the validation text", above=0)
    kind: str = option("network", "the network", choices=["network", "bigram"])
    block_size: int = option(64, "the longest sequence, in tokens", above=0, at_most=SIZE)
    count: bool = option(False, "count pairs of tokens, without training", only="bigram")
    width: int = option(64, "width of the embeddings", above=0, at_most=SIZE, only="network")
    n_layer: int = option(1, "blocks", above=0, at_most=LAYERS, only="network")
    n_head: int = option(0, "heads of attention; 0: averaging", at_least=0, at_most=SIZE, only="network")
    mlp: bool = option(False, "an MLP after the attention", only="network")
    residual: bool = option(False, "residual connections", only="network")
    norm: bool = option(False, "layer normalization", only="network")
    mistake: str | None = option(None, "a classic mistake", choices=MISTAKES, metavar="NAME", only="network")

    variant: ClassVar[str] = "kind"

    def check(self):
        if self.kind == "network" and self.n_head and self.width % self.n_head:
            raise run.UserError(f"--n-head {self.n_head}: does not divide the width {self.width}")
        if self.mistake in MISTAKES_OF_ATTENTION and not self.n_head:
            raise run.UserError(f"--mistake {self.mistake!r}: needs attention, --n-head above 0")


PLAIN = Options()
BIGRAM = Options(kind="bigram")
DEEP = replace(PLAIN, n_layer=4, n_head=4, mlp=True)
RESIDUAL = replace(DEEP, residual=True)
FULL = replace(RESIDUAL, norm=True)
WITHOUT_MISTAKE = replace(FULL, iters=500)
RECIPES = {  # named as in the committed records
    "bigram, counted": replace(BIGRAM, count=True),
    "bigram": replace(BIGRAM, lr=0.3),  # a batch has few examples for each row of its table
    "averaging": PLAIN,
    "one head": replace(PLAIN, n_head=1),
    "four heads": replace(PLAIN, n_head=4),
    "and an MLP": replace(PLAIN, n_head=4, mlp=True),
    "four layers of it": DEEP,
    "with residuals": RESIDUAL,
    "and layer normalization": FULL,
    "residuals, three times the rate": replace(RESIDUAL, lr=3e-2),
    "normalization, three times the rate": replace(FULL, lr=3e-2),
    "none": WITHOUT_MISTAKE,
}
RECIPES |= {mistake: replace(WITHOUT_MISTAKE, mistake=mistake) for mistake in MISTAKES}


# ------------------------------------------------------------------------------------------------------------ networks
# B sequences of T tokens, C the width, V the size of the vocabulary


class Average(nn.Module):
    """Each position gets the mean of itself and all earlier positions."""

    def forward(self, x):
        weights = torch.ones(x.shape[1], x.shape[1]).tril()  # (T, T)
        return weights / weights.sum(1, keepdim=True) @ x  # (T, T) @ (B, T, C) -> (B, T, C)


class Attention(nn.Module):
    """Each position gets a weighted mean of itself and all earlier positions (Vaswani et al. 2017)."""

    def __init__(self, width, n_head=1, mistake=None):
        super().__init__()
        self.n_head, self.mistake = n_head, mistake
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x):
        B, T, C = x.shape
        # (B, T, C) -> (B, n_head, T, C / n_head)
        q, k, v = (f(x).view(B, T, self.n_head, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = q @ k.transpose(2, 3)  # (B, n_head, T, T): how well the query of t matches the key of s
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
    """`mix` combines positions; then, with an MLP, each position is processed by itself."""

    def __init__(self, width, mix, mlp=False, residual=False, norm=False):
        super().__init__()
        self.mix, self.residual = mix, residual
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)) if mlp else None
        self.norm1, self.norm2 = (nn.LayerNorm(width) if norm else nn.Identity() for _ in range(2))

    def forward(self, x):
        for norm, layer in ((self.norm1, self.mix), (self.norm2, self.mlp)):
            if layer is not None:
                y = layer(norm(x))
                x = x + y if self.residual else y
        return x


class Network(nn.Module):
    """Token and position embeddings, blocks, and a linear layer to the logits. n_head 0: averaging, no attention."""

    def __init__(self, vocab_size, block_size=64, width=64, n_layer=1, n_head=0, mistake=None, **block):
        super().__init__()
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.mistake = mistake
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(block_size, width)
        mix = (lambda: Attention(width, n_head, mistake)) if n_head else Average
        self.blocks = nn.Sequential(*(Block(width, mix(), **block) for _ in range(n_layer)))
        self.norm = nn.LayerNorm(width) if block.get("norm") else nn.Identity()
        self.head = nn.Linear(width, vocab_size)
        if mistake == "head tied to embeddings with std 1":
            self.head.weight = self.tokens.weight

    def forward(self, idx):
        x = self.tokens(idx)  # (B, T) -> (B, T, C)
        if self.mistake != "no positions":
            x = x + self.positions.weight[: idx.shape[1]]
        return self.head(self.norm(self.blocks(x)))  # (B, T, C) -> (B, T, V)


def build(recipe: str | Options, vocab_size: int) -> nn.Module:
    """A new network of a recipe, given by its name, or of other options."""
    options = RECIPES[recipe] if isinstance(recipe, str) else recipe
    if options.kind == "bigram":
        return Bigram(BigramConfig(vocab_size, options.block_size))
    return Network(
        vocab_size,
        options.block_size,
        options.width,
        options.n_layer,
        options.n_head,
        options.mistake,
        mlp=options.mlp,
        residual=options.residual,
        norm=options.norm,
    )


# ---------------------------------------------------------------------------------------------- training and measuring


def count_pairs(tokens, vocab_size):
    """Log-probabilities (V, V) of the best bigram, without any gradient: how often each token follows each other."""
    tokens = tokens.long()
    counts = torch.bincount(tokens[:-1] * vocab_size + tokens[1:], minlength=vocab_size**2)
    return (counts.view(vocab_size, vocab_size) + 0.1).log().log_softmax(1)  # 0.1: unseen pairs are not impossible


def loss_of(net, x, y):
    """Mean cross-entropy of x and y (B, T), in nats per token."""
    if getattr(net, "mistake", None) == "targets not shifted":
        y = x
    return F.cross_entropy(net(x).flatten(0, 1), y.flatten())  # (B, T, V) -> (B * T, V)


def fit(net, text, iters, seed, lr=1e-2, bs=12, at_step=lambda step: None):
    """The plainest training loop: AdamW with warm-up and a linear decay to zero. Calls at_step(step) before each step
    and at the end. Raises Diverged."""
    optimizer = torch.optim.AdamW(net.parameters(), lr, betas=(0.9, 0.99), fused=True)
    for step in range(iters):
        at_step(step)
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 50) * (1 - step / iters)
        x, y = data.batch(text.train, net.block_size, bs, seed, step)
        loss = loss_of(net, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not loss.isfinite():
            raise run.Diverged(step)
    at_step(iters)


@torch.no_grad()
def evaluate(net, tokens):
    """Mean loss over all of `tokens`, in nats per token."""
    total = sum(loss_of(net, x, y).item() * y.numel() for x, y in data.blocks(tokens, net.block_size, 96))
    return total / (len(tokens) - 1)


@torch.no_grad()
def last_position_loss(net, tokens, n=1000):
    """Mean loss at the last position of n random blocks, where there is no later token to look at."""
    losses = []
    for step in range(n // 100):
        x, y = data.batch(tokens, net.block_size, 100, 0, step)
        losses.append(F.cross_entropy(net(x)[:, -1], y[:, -1]))
    return torch.stack(losses).mean().item()


@torch.no_grad()
def leak(net):
    """The largest change of an earlier logit when the last token changes: zero in a causal model, up to rounding, and
    where no token is earlier."""
    if net.block_size == 1:
        return 0.0
    x = torch.arange(net.block_size)[None] % net.vocab_size
    changed = x.clone()
    changed[0, -1] = (x[0, -1] + 1) % net.vocab_size
    return (net(x) - net(changed))[:, :-1].abs().max().item()


def sample(net, tokenizer, n=120):
    """A text of n tokens after the end of a line, always with the same random numbers."""
    prompt = tokenizer.encode("\n") if not tokenizer.missing("\n") else [0]
    generator = torch.Generator().manual_seed(0)
    return tokenizer.decode(list(generate(net, torch.tensor([prompt]), n, 0.8, generator=generator))).strip()


# ---------------------------------------------------------------------------------------------------------------- main


def file_name(recipe: str) -> str:
    """The name of a recipe as a file name."""
    return "-".join(re.findall(r"\w+", recipe))


def recipe(given: dict) -> Options:
    """The recipe that the flags `given` name."""
    name = given.get("recipe", "and layer normalization")
    return replace(RECIPES[name], recipe=name)


def parse(argv=None) -> Options:
    return run.parse_options(__file__, Options, argv, recipe)


def main(argv=None):
    args = parse(argv)
    text = data.load(args.data, args.data_dir, args.limit, args.tokens)
    if text.train.dim() > 1:
        raise run.UserError(f"{data.display_name(args.data)}: holds exercises; the stages read continuous text")
    args.data = text.name if args.data == "auto" else args.data
    data.check_batch_size(args.bs, text)
    if len(text.val) <= args.block_size:
        raise run.UserError(
            f"{data.display_name(args.data)}: is too short: {len(text.val)} tokens for validation, and --block-size "
            f"{args.block_size} needs more"
        )
    with run.Run(args, __file__, f"{text.name}-{file_name(args.recipe)}", auto_threads=1) as r:
        V = text.tokenizer.vocab_size
        run.check_memory(lambda: build(args, V), r.device, "the sizes of the network")
        net = build(args, V)
        parameters = run.count_parameters(net)
        initial_loss = evaluate(net, text.val[: net.block_size * args.bs + 1])
        r.note(
            f"{args.recipe}: {parameters:,} parameters, on {len(text.train):,} tokens of {text.name}; first loss "
            f"{initial_loss:.3f}, ln {V} = {math.log(V):.3f}",
            dataset=text.facts(),
            parameters=parameters,
            initial_loss=initial_loss,
        )
        r.load()  # there is no checkpoint: a run that was interrupted starts again
        bar, every = tqdm(total=args.iters, leave=False, disable=None), max(1, args.iters // 10)

        def at_step(step):
            bar.update(step - bar.n)
            if step % every == 0:
                r.log({"iter": step, "val_loss": evaluate(net, text.val[:CURVE_TOKENS])})

        if args.count:
            net.table.weight.data = count_pairs(text.train, V)
            at_step(0)
            at_step(every * 10)
        else:
            fit(net, text, args.iters, args.seed, args.lr, args.bs, at_step)
        bar.close()
        final = {"last_position_loss": last_position_loss(net, text.val), "leak": leak(net)}
        final["train_loss"] = evaluate(net, text.train[:FINAL_TOKENS])
        for part, tokens in {"val": text.val, "test": text.test}.items():
            if tokens is not None:
                loss = final[f"{part}_loss"] = evaluate(net, tokens[:FINAL_TOKENS])
                if text.characters_per_token:
                    final[f"{part}_bits_per_character"] = loss / math.log(2) / text.characters_per_token[part]
        r.note(sample=sample(net, text.tokenizer))
        r.finish(f"validation loss {final['val_loss']:.4f}", uniform_loss=math.log(V), **final)
    return r.record


if __name__ == "__main__":
    run.cli(main)
