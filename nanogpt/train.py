"""Train a language model on characters, words or byte pairs.

    python nanogpt/train.py                                        # nanoGPT's laptop run: 0.8 M parameters, Shakespeare
    python nanogpt/train.py --recipe fast                          # as many parameters, a third of the time
    python nanogpt/train.py --recipe best                          # what three minutes of two cores can buy
    python nanogpt/train.py --recipe gpu --device cuda             # 10.7 M parameters, minutes on one GPU
    python nanogpt/train.py --recipe word-mlp                      # words: Bengio's MLP of 2003
    python nanogpt/train.py --overfit --iters 200                  # can it learn one batch by heart? then it can learn
    torchrun --nproc-per-node=8 nanogpt/train.py --recipe gpt2 --data openwebtext

The validation loss is of the whole validation text; the best checkpoint is the one where it was lowest. A recipe sets
whatever flags leave open. --bs is the sequences in one forward pass of one process.
"""

import argparse
import math
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import run
from model import build, check_causal, count_parameters, generate, save_weights
from optim import make_optimizers

GPT = dict(
    kind="gpt",
    block_size=64,
    n_layer=4,
    n_head=4,
    n_embd=128,
    dropout=0.0,
    bias=False,
    tied=True,
    rotary=False,
    norm="layer",
    mlp="gelu",
    qk_norm=False,
)
# lr: peak of AdamW; muon: how many times that is Muon's for the matrices of the blocks, 0 for AdamW everywhere. After
# `warmup` steps the rate stays for all but the last share `cooldown` of the run, and goes to `final_lr` of the peak.
# accumulate: the passes whose gradients make one step, shared among processes. evals: how often in a run.
ADAMW = dict(
    lr=1e-3,
    muon=0.0,
    ns_steps=5,
    beta2=0.99,
    weight_decay=0.1,
    clip=1.0,
    warmup=100,
    decay="cosine",
    cooldown=1.0,
    final_lr=0.1,
    accumulate=1,
    evals=10,
    compile=False,
)
WORDS = ADAMW | dict(tokens="word", bs=16, lr=3e-3, warmup=50, final_lr=0.0)  # one size, one time
MODERN = GPT | dict(rotary=True, mlp="relu2", qk_norm=True)
FAST = ADAMW | dict(
    tokens="char",
    bs=16,
    lr=3e-3,
    muon=5.0,
    beta2=0.95,
    weight_decay=0.0,
    clip=0.0,
    warmup=10,
    decay="linear",
    cooldown=0.5,
    final_lr=0.0,
)
RECIPES = {
    "cpu": ADAMW | dict(tokens="char", iters=2000, bs=12, model=GPT),
    "fast": FAST | dict(iters=400, evals=4, model=MODERN | dict(n_layer=3, n_head=3, n_embd=144)),
    "best": FAST | dict(iters=1800, evals=9, model=MODERN | dict(block_size=128, n_embd=192)),
    "gpu": ADAMW
    | dict(
        tokens="char",
        iters=5000,
        bs=64,
        evals=20,
        compile=True,
        model=GPT | dict(block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2),
    ),
    "gpt2": ADAMW
    | dict(
        tokens="gpt2",
        iters=600_000,
        bs=12,
        accumulate=40,
        lr=6e-4,
        beta2=0.95,
        warmup=2000,
        evals=600,
        compile=True,
        model=GPT | dict(block_size=1024, n_layer=12, n_head=12, n_embd=768),
    ),
    "word-bigram": WORDS | dict(iters=1500, model=dict(kind="bigram", block_size=64, n_embd=64)),
    "word-mlp": WORDS | dict(iters=1500, model=dict(kind="wordmlp", block_size=64, context=4, n_embd=64, hidden=64)),
    "word-gpt": WORDS | dict(iters=950, lr=2e-3, model=GPT | dict(n_layer=2, n_embd=96)),
}
AUTO_PRECISION = "bf16"  # bench.py: 1.6 times as fast where a CPU multiplies it natively
ESTIMATE_BATCHES = 20  # of nanoGPT's estimate, in its laptop run
SAMPLE_TOKENS = 120


def lr_factor(args, step: int) -> float:
    """What the learning rates are multiplied by at `step`: warm-up, then constant, then down."""
    up = min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
    start = max(args.warmup, (1 - args.cooldown) * args.iters)
    progress = min(max((step - start) / max(1.0, args.iters - start), 0.0), 1.0)
    down = 0.5 * (1 + math.cos(math.pi * progress)) if args.decay == "cosine" else 1 - progress
    return up * (args.final_lr + (1 - args.final_lr) * down)


def loss_of(model, x, y, r):
    """The mean cross-entropy, in nats a token, of predicting y from x; int64 (B, T) each."""
    with r.autocast():
        logits = model(x)
    return F.cross_entropy(logits.float().flatten(0, 1) if r.precision == "bf16" else logits.flatten(0, 1), y.flatten())


def train(args, r, text):
    """Train, and leave in r.folder last.pt, best.pt (of the lowest validation loss), metrics.csv and layers.png."""
    model = build(args.model | {"vocab_size": text.tokenizer.vocab_size}).to(r.device)
    optimizers = make_optimizers(model, args, r.device)
    passes, block_size = max(1, args.accumulate // r.world), model.block_size
    per_step = args.bs * passes * r.world  # sequences, of all processes together
    r.note(parameters=count_parameters(model), tokens_per_step=per_step * block_size)
    r.say(
        f"{args.recipe}: {model.config['kind']}, {count_parameters(model):,} parameters, on {text.name}: "
        f"{len(text.train):,} tokens ({text.level}) to train on, {len(text.val):,} to validate, {model.vocab_size:,} "
        f"different; {per_step * block_size:,} a step\n{r.hardware}"
    )

    step, losses, best, seconds = 0, torch.zeros(0), math.inf, 0.0
    if state := r.load():
        run.restore(model, state["model"], r.folder / "last.pt")
        for optimizer, saved in zip(optimizers, state["optimizer"]):
            optimizer.load_state_dict(saved)
        step, losses, best, seconds = (state[k] for k in ("step", "losses", "best", "seconds"))
    else:
        check_start(model, text, args, r)
        torch.manual_seed(args.seed + r.rank)  # a dropout of its own for every process
    losses = list(losses.to(r.device))  # of the steps since the last evaluation
    wrapped = DistributedDataParallel(model) if r.world > 1 else model
    wrapped = torch.compile(wrapped) if args.compile else wrapped
    every = max(1, args.iters // args.evals)

    def checkpoint(name="last.pt", **facts):
        r.save(
            {
                "model": model.state_dict(),
                "config": model.config,
                "tokenizer": text.tokenizer.state(),
                "step": step,
                **facts,
            },
            name,
        )

    def save_last():
        kept = torch.stack(losses) if losses else torch.zeros(0)
        checkpoint(
            optimizer=[o.state_dict() for o in optimizers],
            losses=kept,
            best=best,
            val_loss=best,
            seconds=seconds + time.monotonic() - began,
        )

    began = time.monotonic()
    bar = tqdm(total=args.iters, initial=step, leave=False, disable=None if r.rank == 0 else True)
    while step < args.iters:
        model.train()
        x, y = data.batch(text.train, block_size, per_step, args.seed, 0 if args.overfit else step)
        mine = slice(r.rank * args.bs * passes, (r.rank + 1) * args.bs * passes)
        chunks = [part[mine].to(r.device, non_blocking=True).split(args.bs) for part in (x, y)]
        losses.append(torch.zeros((), device=r.device))
        for i, (inputs, targets) in enumerate(zip(*chunks)):
            alone = r.world > 1 and i < passes - 1  # the processes' gradients meet once a step, in its last pass
            with wrapped.no_sync() if alone else nullcontext():
                loss = loss_of(wrapped, inputs, targets, r) / passes
                loss.backward()
            losses[-1] += loss.detach()
        evaluating = (step + 1) % every == 0 or step + 1 == args.iters
        if evaluating:  # before clipping, behind which none would look large
            gradients, before = layer_norms(model, lambda p: p.grad), [p.detach().clone() for p in model.parameters()]
        if args.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * lr_factor(args, step)
            optimizer.step()
        model.zero_grad()
        step += 1
        bar.update()
        if step % 50 == 0 or evaluating:
            r.check_finite(mean_over_processes(torch.stack(losses), r), step - len(losses))
            bar.set_postfix(loss=f"{losses[-1].item():.3f}")

        if evaluating:
            train_loss = mean_over_processes(torch.stack(losses), r).mean().item()
            val_loss = evaluate(model, text.val, args.bs, r)
            row = {
                "iter": step,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "lr": optimizers[0].param_groups[0]["lr"],
                "seconds": round(seconds + time.monotonic() - began, 2),
            }
            r.check_finite(torch.tensor([val_loss]), step)
            r.log(row | gradients | update_ratios(model, before))
            r.say(
                f"iter {step:>6,}/{args.iters:,}   loss {train_loss:.4f} train {val_loss:.4f} val   "
                f"{row['seconds']:.0f} s\n{sample(model, text, args.seed, step, r)}"
            )
            losses = []
            if val_loss < best:
                best = val_loss
                checkpoint("best.pt", val_loss=best)
            save_last()
        if r.stopping:
            save_last()
            r.stop()
    bar.close()
    if r.rank == 0:
        draw_layers(r.rows, r.folder / "layers.png")
    return model


def mean_over_processes(values, r):
    """The mean of a tensor over all processes."""
    if r.world > 1:
        dist.all_reduce(values)
    return values / r.world


@torch.no_grad()
def evaluate(model, tokens, batch_size, r) -> float:
    """The mean cross-entropy over all of `tokens`, each predicted once, from its own block of block_size tokens."""
    model.eval()
    total, count = 0.0, 0
    for x, y in data.blocks(tokens, model.block_size, max(batch_size, 4096 // model.block_size), r.device):
        total += loss_of(model, x, y, r).item() * y.numel()
        count += y.numel()
    loss = torch.tensor(total / count, dtype=torch.float64)
    return mean_over_processes(loss, r).item()  # the same in every process, to the bit


@torch.no_grad()
def estimate(model, tokens, args, r) -> float | None:
    """The validation loss as nanoGPT takes it, for comparison: the mean of 20 batches from random places. None where
    the text is no longer than a block."""
    if len(tokens) <= model.block_size:
        return None
    model.eval()
    x, y = data.batch(tokens, model.block_size, ESTIMATE_BATCHES * args.bs, args.seed, 0, r.device)
    pairs = zip(x.split(args.bs), y.split(args.bs))
    return sum(loss_of(model, *pair, r).item() for pair in pairs) / ESTIMATE_BATCHES


def sample(model, text, seed, step, r):
    """What the model writes by now, after the first token of the training text."""
    generator = torch.Generator(r.device).manual_seed(run.seed_at(seed, step))
    ids = generate(model, text.train[None, :1].long().to(r.device), SAMPLE_TOKENS, generator=generator)
    return "    " + text.tokenizer.decode(list(ids)).replace("\n", "\n    ")


# ---------------------------------------------------------------------------------------------- debugging that teaches


def check_start(model, text, args, r):
    """Two things that must hold before the first step: even odds on every token, and no look into the future."""
    model.eval()
    x, y = data.batch(text.train, model.block_size, args.bs, args.seed, 0, r.device)
    with torch.no_grad():
        loss, even = loss_of(model, x, y, r).item(), math.log(model.vocab_size)
    if not abs(loss - even) < 0.3:
        raise run.UserError(
            f"the first loss is {loss:.3f}, and even odds on {model.vocab_size:,} tokens would make "
            f"ln {model.vocab_size} = {even:.3f}: the initial weights are wrong, or the targets are"
        )
    check_causal(model, x[:1])
    r.note(first_loss=loss)
    r.say(f"first loss {loss:.3f}, ln {model.vocab_size} = {even:.3f}; no logit depends on a later token")


def layer_of(name):
    """blocks.3.mlp.up.weight -> block3, tokens.weight -> tokens"""
    first, second, *_ = name.split(".")
    return f"block{second}" if first == "blocks" else first


def layer_norms(model, take):
    """{"grad_LAYER": norm of what `take` takes of its parameters}"""
    layers = {}
    for name, p in model.named_parameters():
        layers.setdefault(layer_of(name), []).append(take(p).float())
    return {f"grad_{layer}": torch.stack(torch._foreach_norm(parts)).norm().item() for layer, parts in layers.items()}


def update_ratios(model, before):
    """{"update_LAYER": how far the last step moved its weights, as a share of their norm}; 1e-3 is a healthy size."""
    moved, norms = {}, {}
    for (name, p), old in zip(model.named_parameters(), before):
        moved.setdefault(layer_of(name), []).append((p.detach() - old).norm())
        norms.setdefault(layer_of(name), []).append(old.norm())
    return {
        f"update_{layer}": (torch.stack(moved[layer]).norm() / torch.stack(norms[layer]).norm()).item()
        for layer in moved
    }


def draw_layers(rows, path):
    """Gradient norms and update-to-weight ratios by layer, against steps."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, kind, title in zip(
        figure.subplots(1, 2), ("grad_", "update_"), ("gradient norm", "update / weight, of one step")
    ):
        for column in rows[0]:
            if column.startswith(kind):
                axes.plot([row["iter"] for row in rows], [row[column] for row in rows], label=column[len(kind) :])
        axes.set(xlabel="iter", title=title, yscale="log")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    run.write_figure(path, figure)


# ----------------------------------------------------------------------------------------------------------------- main


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--recipe", choices=list(RECIPES), default="cpu", help="(default: %(default)s)")
    run.add_flags(p, "data_dir", "out", "resume", data=dict(type=data.known, default="auto", help=data.DATA_HELP))
    p.add_argument("--tokens", choices=data.TOKENS, help="what a token is")
    run.add_flags(
        p,
        "iters",
        "bs",
        "lr",
        "seed",
        "device",
        "precision",
        limit=dict(help="only the first N tokens of each part, for a quick look"),
    )
    p.add_argument("--overfit", action="store_true", help="every step on the same batch: the loss must go to near zero")
    p.epilog = "recipes:\n" + "\n".join(
        f"  {name}: " + ", ".join(f"{k} {v}" for k, v in (recipe | recipe["model"]).items() if k != "model")
        for name, recipe in RECIPES.items()
    )
    return p


def parse(argv=None):
    args = run.parse(parser(), argv)
    if not args.resume:
        for name, value in RECIPES[args.recipe].items():
            if getattr(args, name, None) is None:
                setattr(args, name, value)
    return args


def main(argv=None):
    args = parse(argv)
    text = data.load(args.data, args.data_dir, args.limit, args.tokens)
    args.data = text.name if args.data == "auto" else args.data
    with run.Run(args, __file__, f"{text.name}-{args.recipe}", AUTO_PRECISION) as r:
        r.note(dataset=text.facts())
        model = train(args, r, text)
        best = run.read_checkpoint(r.folder / "best.pt", r.device)
        run.restore(model, best["model"], r.folder / "best.pt")
        final = {
            "best_iter": best["step"],
            "val_loss": best["val_loss"],
            "val_perplexity": math.exp(best["val_loss"]),
            "sampled_loss": estimate(model, text.val, args, r),
            "seconds": r.rows[-1]["seconds"],
            "train_loss": next(row["train_loss"] for row in r.rows if row["iter"] == best["step"]),
        }
        told = [] if final["sampled_loss"] is None else [f"{final['sampled_loss']:.4f} as nanoGPT estimates it"]
        if text.characters_per_token:
            final["val_bits"] = best["val_loss"] / math.log(2) / text.characters_per_token["val"]  # a character
        if text.test is None:
            told.append("no third part: selected on")
        else:
            final["test_loss"] = evaluate(model, text.test, args.bs, r)
            final["test_perplexity"] = math.exp(final["test_loss"])
            told.append(f"test loss {final['test_loss']:.4f}, perplexity {final['test_perplexity']:.1f}")
        if r.rank == 0:
            save_weights(r.folder / "best.safetensors", model, text.tokenizer.state())
        r.finish(**final)
        r.say(
            f"validation loss {best['val_loss']:.4f} at iter {best['step']:,} ({'; '.join(told)}); "
            f"{final['seconds']:.0f} s; {run.shown(r.folder)}"
        )
    return r.record


if __name__ == "__main__":
    run.cli(main)
