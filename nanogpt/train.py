"""Train a language model on characters, words or byte pairs.

    python nanogpt/train.py                                        # nanoGPT's laptop run: 0.8 M parameters, Shakespeare
    python nanogpt/train.py --recipe fast                          # as many parameters, a third of the time
    python nanogpt/train.py --recipe best                          # the lowest loss in three minutes on two cores
    python nanogpt/train.py --recipe gpu --device cuda             # 10.7 M parameters, minutes on one GPU
    python nanogpt/train.py --recipe word-mlp                      # words: Bengio's MLP of 2003
    python nanogpt/train.py --overfit --iters 200                  # overfit one batch: a healthy model can
    torchrun --nproc-per-node=8 nanogpt/train.py --recipe gpt2 --data openwebtext

The validation loss is the mean over the whole validation text; best.pt is the checkpoint with the lowest one. Flags
override the values of the recipe.
"""

import argparse
import math
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import run
from checkpoint import build, config_of, count_parameters, save_weights
from diagnostics import check_start, draw_layers, gradient_norms, update_ratios
from generate import generate
from optim import make_optimizers

GPT = dict(kind="gpt", block_size=64, n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=False, tied=True)
GPT |= dict(rotary=False, norm="layer", mlp="gelu", qk_norm=False)
MODERN = GPT | dict(rotary=True, mlp="relu2", qk_norm=True)
# lr: the peak learning rate of AdamW; muon: that of Muon for the matrices of the blocks, in multiples of lr (0: AdamW
# for all). After `warmup` steps the learning rate is constant, and decays to final_lr * lr in the last `cooldown` of
# the run. accumulate: micro-batches of one step, shared among the processes. evals: evaluations in a run.
ADAMW = dict(lr=1e-3, muon=0.0, ns_steps=5, beta2=0.99, weight_decay=0.1, clip=1.0, warmup=100, decay="cosine")
ADAMW |= dict(cooldown=1.0, final_lr=0.1, accumulate=1, evals=10, compile=False)
WORDS = ADAMW | dict(tokens="word", bs=16, lr=3e-3, warmup=50, final_lr=0.0)
FAST = ADAMW | dict(tokens="char", bs=16, lr=3e-3, muon=5.0, beta2=0.95, weight_decay=0.0, clip=0.0, warmup=10)
FAST |= dict(decay="linear", cooldown=0.5, final_lr=0.0)
GPU = GPT | dict(block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2)
GPT2 = GPT | dict(block_size=1024, n_layer=12, n_head=12, n_embd=768)
GPT2_STEPS = dict(iters=600_000, bs=12, accumulate=40, lr=6e-4, beta2=0.95, warmup=2000, evals=600)
TINY = GPT | dict(block_size=16, n_layer=2, n_head=2, n_embd=32)
RECIPES = {
    "tiny": ADAMW | dict(tokens="char", iters=60, bs=12, lr=1e-2, warmup=5, evals=3, model=TINY),  # a second, for tests
    "cpu": ADAMW | dict(tokens="char", iters=2000, bs=12, model=GPT),
    "fast": FAST | dict(iters=400, evals=4, model=MODERN | dict(n_layer=3, n_head=3, n_embd=144)),
    "best": FAST | dict(iters=1800, evals=9, model=MODERN | dict(block_size=128, n_embd=192)),
    "gpu": ADAMW | dict(tokens="char", iters=5000, bs=64, evals=20, compile=True, model=GPU),
    "gpt2": ADAMW | GPT2_STEPS | dict(tokens="gpt2", compile=True, model=GPT2),
    "word-bigram": WORDS | dict(iters=1500, model=dict(kind="bigram", block_size=64, n_embd=64)),
    "word-mlp": WORDS | dict(iters=1500, model=dict(kind="wordmlp", block_size=64, context=4, n_embd=64, hidden=64)),
    "word-gpt": WORDS | dict(iters=950, lr=2e-3, model=GPT | dict(n_layer=2, n_embd=96)),
}
AUTO_PRECISION = "bf16"  # bench.py: 1.6 times as fast where a CPU multiplies it natively
ESTIMATE_BATCHES = 20  # as in nanoGPT's laptop run
SAMPLE_TOKENS = 120


def lr_factor(args, step: int) -> float:
    """The factor of the peak learning rates at `step`: warm-up, then constant, then decay."""
    warmup = min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
    start = max(args.warmup, (1 - args.cooldown) * args.iters)
    progress = min(max((step - start) / max(1.0, args.iters - start), 0.0), 1.0)
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if args.decay == "cosine" else 1 - progress
    return warmup * (args.final_lr + (1 - args.final_lr) * decay)


def loss_of(model, x, y, r):
    """The mean cross-entropy, in nats per token, of predicting y from x; int64 (B, T) each."""
    with r.autocast():
        logits = model(x)  # (B, T) -> (B, T, V)
    return F.cross_entropy(logits.float().flatten(0, 1) if r.precision == "bf16" else logits.flatten(0, 1), y.flatten())


def backward(model, x, y, micro_batch, r):
    """Add the gradients of the loss on x and y, taken `micro_batch` sequences at a time. Returns the loss."""
    total, parts = torch.zeros((), device=r.device), list(zip(x.split(micro_batch), y.split(micro_batch)))
    for i, part in enumerate(parts):
        last = i + 1 == len(parts)  # all-reduce gradients only in the last micro-batch
        with nullcontext() if last or r.world == 1 else model.no_sync():
            loss = loss_of(model, *part, r) / len(parts)
            loss.backward()
        total += loss.detach()
    return total


def update(model, optimizers, args, step):
    """Clip the gradients, set the learning rates of `step`, and update the weights."""
    if args.clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_factor(args, step)
        optimizer.step()
    model.zero_grad()


def train(args, r, text):
    """Train a model; r.folder then holds last.pt, best.pt (of the lowest validation loss), metrics.csv, layers.png."""
    model = build(args.model | {"vocab_size": text.tokenizer.vocab_size}).to(r.device)
    optimizers = make_optimizers(model, args, r.device)
    per_process = args.bs * max(1, args.accumulate // r.world)  # sequences of one step
    batch_size = per_process * r.world
    r.note(parameters=count_parameters(model), tokens_per_step=batch_size * model.block_size)
    r.say(
        f"{args.recipe}: {args.model['kind']}, {count_parameters(model):,} parameters; {text.name}, {text.level} "
        f"tokens: {len(text.train):,} for training, {len(text.val):,} for validation, vocabulary {model.vocab_size:,}; "
        f"{batch_size * model.block_size:,} tokens per step\n{r.hardware}"
    )
    step, losses, best, seconds = 0, torch.zeros(0), math.inf, 0.0
    if state := r.load():
        run.restore(model, state["model"], r.folder / "last.pt")
        for optimizer, saved in zip(optimizers, state["optimizer"]):
            optimizer.load_state_dict(saved)
        step, losses, best, seconds = (state[k] for k in ("step", "losses", "best", "seconds"))
    else:
        x, y = data.batch(text.train, model.block_size, args.bs, args.seed, 0, r.device)
        with r.autocast():
            r.note(first_loss=check_start(model, x, y))
        r.say(
            f"first loss {r.record['first_loss']:.3f}, ln {model.vocab_size} = {math.log(model.vocab_size):.3f}; causal"
        )
        torch.manual_seed(args.seed + r.rank)  # different dropout in every process
    losses = list(losses.to(r.device))  # of the steps since the last evaluation
    ddp_model = DistributedDataParallel(model) if r.world > 1 else model
    ddp_model = torch.compile(ddp_model) if args.compile else ddp_model
    eval_every, start = max(1, args.iters // args.evals), time.monotonic() - seconds

    def save(name, **state):
        weights = {"model": model.state_dict(), "config": config_of(model), "tokenizer": text.tokenizer.state()}
        r.save(weights | {"step": step, **state}, name)

    def save_last():
        recent = torch.stack(losses) if losses else torch.zeros(0)
        progress = {"losses": recent, "best": best, "seconds": time.monotonic() - start}
        save("last.pt", optimizer=[o.state_dict() for o in optimizers], **progress)

    bar = tqdm(total=args.iters, initial=step, leave=False, disable=None if r.rank == 0 else True)
    while step < args.iters:
        model.train()
        x, y = data.batch(text.train, model.block_size, batch_size, args.seed, 0 if args.overfit else step)
        x, y = (
            t.split(per_process)[r.rank].to(r.device, non_blocking=True) for t in (x, y)
        )  # the share of this process
        losses.append(backward(ddp_model, x, y, args.bs, r))
        evaluating = (step + 1) % eval_every == 0 or step + 1 == args.iters
        if evaluating:  # the gradient norms before clipping, which would hide large ones
            gradients, before = gradient_norms(model), [p.detach().clone() for p in model.parameters()]
        update(model, optimizers, args, step)
        step += 1
        bar.update()
        if step % 50 == 0 or evaluating:  # reading the loss at every step would stall a GPU
            r.check_finite(mean_over_processes(torch.stack(losses), r), step - len(losses))
            bar.set_postfix(loss=f"{losses[-1].item():.3f}")
        if evaluating:
            train_loss = mean_over_processes(torch.stack(losses), r).mean().item()
            val_loss = evaluate(model, text.val, args.bs, r)
            r.check_finite(torch.tensor([val_loss]), step)
            elapsed = round(time.monotonic() - start, 2)
            row = {
                "iter": step,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "lr": optimizers[0].param_groups[0]["lr"],
            }
            r.log(row | {"seconds": elapsed} | gradients | update_ratios(model, before))
            r.say(
                f"iter {step:>6,}/{args.iters:,}   loss {train_loss:.4f} train {val_loss:.4f} val   {elapsed:.0f} s\n"
                f"{sample(model, text, args.seed, step, r)}"
            )
            losses = []
            if val_loss < best:
                best = val_loss
                save("best.pt", val_loss=best)
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
    """The mean cross-entropy, in nats per token, over all of `tokens`, in blocks that do not overlap."""
    model.eval()
    total, count = 0.0, 0
    for x, y in data.blocks(tokens, model.block_size, max(batch_size, 4096 // model.block_size), r.device):
        total += loss_of(model, x, y, r).item() * y.numel()
        count += y.numel()
    loss = torch.tensor(total / count, dtype=torch.float64)
    return mean_over_processes(loss, r).item()  # the same value in every process, bit for bit


@torch.no_grad()
def estimate(model, tokens, batch_size, seed, r) -> float | None:
    """The loss as nanoGPT estimates it: the mean of 20 random batches. None if the text is no longer than a block."""
    if len(tokens) <= model.block_size:
        return None
    model.eval()
    x, y = data.batch(tokens, model.block_size, ESTIMATE_BATCHES * batch_size, seed, 0, r.device)
    losses = [loss_of(model, *part, r).item() for part in zip(x.split(batch_size), y.split(batch_size))]
    return sum(losses) / ESTIMATE_BATCHES


def sample(model, text, seed, step, r) -> str:
    """A text that the model generates, starting from the first token of the training text."""
    generator = torch.Generator(r.device).manual_seed(run.seed_at(seed, step))
    ids = generate(model, text.train[None, :1].long().to(r.device), SAMPLE_TOKENS, generator=generator)
    return "    " + text.tokenizer.decode(list(ids)).replace("\n", "\n    ")


# ---------------------------------------------------------------------------------------------------------------- main


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--recipe", choices=list(RECIPES), default="cpu", help="(default: %(default)s)")
    run.add_flags(p, "data_dir", "out", "resume", data=dict(type=data.dataset_arg, default="auto", help=data.DATA_HELP))
    p.add_argument("--tokens", choices=data.TOKENS, help="what a token is")
    limit = dict(help="only the first N tokens of each part, for a quick look")
    run.add_flags(p, "iters", "bs", "lr", "seed", "device", "precision", limit=limit)
    p.add_argument(
        "--overfit", action="store_true", help="use the same batch at every step: the loss must go to near 0"
    )
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
        final = {"best_iter": best["step"], "val_loss": best["val_loss"], "val_perplexity": math.exp(best["val_loss"])}
        final |= {"sampled_loss": estimate(model, text.val, args.bs, args.seed, r), "seconds": r.rows[-1]["seconds"]}
        final["train_loss"] = next(row["train_loss"] for row in r.rows if row["iter"] == best["step"])
        results = [f"validation loss {best['val_loss']:.4f} at iter {best['step']:,}"]
        if final["sampled_loss"] is not None:
            results.append(f"{final['sampled_loss']:.4f} as nanoGPT estimates it")
        if text.characters_per_token:  # bits per character
            final["val_bits"] = best["val_loss"] / math.log(2) / text.characters_per_token["val"]
        if text.test is None:
            results.append("selected on: the corpus has no test part")
        else:
            final["test_loss"] = evaluate(model, text.test, args.bs, r)
            final["test_perplexity"] = math.exp(final["test_loss"])
            results.append(f"test loss {final['test_loss']:.4f}, perplexity {final['test_perplexity']:.1f}")
        if r.rank == 0:
            save_weights(r.folder / "best.safetensors", model, text.tokenizer.state())
        r.finish(**final)
        r.say(f"{'; '.join(results)}; {final['seconds']:.0f} s; {run.shown(r.folder)}")
    return r.record


if __name__ == "__main__":
    run.cli(main)
