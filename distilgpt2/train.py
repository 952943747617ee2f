"""Fine-tune a pretrained language model: all weights, LoRA, or the last layers.

    python distilgpt2/train.py --data data.csv                  # DistilGPT2 on a CSV file with a column text
    python distilgpt2/train.py --data data.csv --method lora    # the same with LoRA
    python distilgpt2/train.py --recipe smollm2 --method lora   # SmolLM2-135M, 2% of WikiText-2: minutes on one core
    python distilgpt2/train.py --data data.csv --mode gen       # generate text with the newest run
    python distilgpt2/train.py --recipe tiny --data builtin     # a quick look without any download
    torchrun --nproc-per-node=2 distilgpt2/train.py --data data.csv

Documents are packed into blocks without padding. Validation chooses the epoch; that checkpoint is tested once, at the
end, where the data has a test part. The recipe sets every hyper-parameter; flags override it.
"""

import argparse
import math
import time
from contextlib import nullcontext

from common import ddp, run

import torch
from tqdm import tqdm

import data
import generate
import model
import pretrained
import scoring

BASE = dict(
    model="auto",
    method="full",
    epochs=3,
    max_steps=None,  # the run ends after this number of steps, if not before
    bs=8,  # blocks of one optimizer step
    block_size=512,
    micro_batch=2,  # blocks of one forward pass in each process
    weight_decay=0.01,
    clip=1.0,  # the largest norm of the gradients
    decay="linear",  # or "cosine", "none"
    warmup=0.1,  # the fraction of all steps in which the learning rate rises
    across=True,  # attention across the documents of a block
    checkpointing=False,  # compute activations again in the backward pass: less memory, a third more time
    fraction=1.0,  # of the training documents
    val_tokens=None,  # only the first N tokens of the validation part
    test_tokens=None,  # and of the test part; 0: no test
)
LR = {"full": 5e-5, "lora": 1e-3, "last": 3e-4}  # peak learning rates
METHODS = {"full": {}, "lora": dict(rank=8, alpha=16.0, targets="all"), "last": dict(last_blocks=2)}
SMOLLM2 = dict(model="smollm2", epochs=1, bs=4, block_size=256, fraction=0.02, val_tokens=16_384, test_tokens=50_000)
TINY = dict(model="tiny", epochs=2, bs=6, block_size=16, micro_batch=3, decay="none", warmup=0.0)
RECIPES = {
    "plain": BASE | dict(lr=LR),
    # what compare.py studies, with the learning rates that its short runs chose
    "smollm2": BASE | SMOLLM2 | dict(lr={"full": 3e-4, "lora": 3e-3, "last": 1e-3}),
    "tiny": BASE | TINY | dict(lr=dict.fromkeys(LR, 3e-3)),  # a second, for tests
}
AUTO_PRECISION = "bf16"  # bench.py: faster than fp32 if a CPU multiplies it natively
AUTO_THREADS = None  # all cores: its matrices are large
SAVE_EVERY = 240  # seconds between checkpoints within an epoch


def lr_factor(args, step: int, steps: int) -> float:
    """The factor of the learning rate in step `step` of `steps`: up from zero, then down to zero."""
    warmup = args.warmup * steps
    if step < warmup:
        return (step + 1) / math.ceil(warmup + 1)
    progress = (step - warmup) / max(1.0, steps - warmup)
    return {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "none": 1.0}[args.decay]


def backward(net, blocks, count, no_sync, args, r, eos):
    """Compute the gradients of the mean loss over the `count` blocks of all processes, a micro-batch at a time;
    `blocks` are the blocks of this process. Returns its part of the mean."""
    total, parts = torch.zeros((), device=r.device), blocks.split(args.micro_batch or len(blocks))
    for i, part in enumerate(parts, 1):
        with nullcontext() if i == len(parts) else no_sync():  # all-reduce gradients only in the last micro-batch
            logits = scoring.logits_of(net, part[:, :-1], r, args.across, eos)
            loss = model.cross_entropy(logits, part[:, 1:]) * (len(part) / count)
            (loss * r.world).backward()  # DDP averages over processes
        total += loss.detach()
    return total


def train(args, r, net, tokenizer, parts):
    """Train, and leave in the run folder metrics.csv, last.pt and best.pt (the lowest validation loss). Returns the
    seconds of a step."""
    trainable, blocks, eos = (
        model.Trainable(net),
        data.Blocks(parts["train"].ids, args.block_size),
        tokenizer.eos_token_id,
    )
    optimizer = torch.optim.AdamW(trainable.groups(), args.lr, weight_decay=args.weight_decay,
                                  fused=r.device.type in ("cpu", "cuda"))  # fmt: skip
    steps = math.ceil(len(blocks) / args.bs)  # in an epoch
    total = min(args.epochs * steps, args.max_steps or args.epochs * steps)
    done, best, seconds, losses = 0, math.inf, 0.0, torch.zeros(steps)  # the sum of the losses of each step's blocks
    if state := r.load(model=trainable, optimizer=optimizer):
        done, best, seconds, losses = (state[k] for k in ("step", "best", "seconds", "losses"))
    else:
        torch.manual_seed(args.seed + r.rank)  # different dropout in every process
    losses = (torch.zeros_like(losses) if r.rank else losses).to(r.device)  # of this process alone
    ddp_model, no_sync = r.wrap(net)

    def checkpoint():
        summed = r.all_reduce(losses.clone()).cpu()
        r.save(model=trainable, optimizer=optimizer, step=done, best=best, seconds=seconds, losses=summed)

    while done < total:
        epoch, first = divmod(done, steps)
        last, saved = min(steps, total - epoch * steps), time.monotonic()
        order, epochs = blocks.order(args.seed, epoch), math.ceil(total / steps)
        bar = tqdm(total=last, desc=f"epoch {epoch + 1}/{epochs}", initial=first, leave=False,
                   disable=True if r.rank else None)  # fmt: skip
        net.train()
        for step in range(first, last):
            began = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = args.lr * lr_factor(args, done, total)
            chosen = order[step * args.bs : (step + 1) * args.bs]
            mine, count = chosen[r.rank :: r.world], len(chosen)
            if not len(mine):  # no block is left for this process, but it has to take part in the all-reduce
                mine, count = order[:1], math.inf
            loss = backward(ddp_model, blocks[mine].to(r.device), count, no_sync, args, r, eos)
            losses[step] = loss * len(chosen)
            torch.nn.utils.clip_grad_norm_(trainable.weights.values(), args.clip)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            bar.update()
            if done % 10 == 0 or step + 1 == last:
                r.check_finite(r.all_reduce(losses[: step + 1].clone()), epoch * steps)
                bar.set_postfix(loss=f"{loss.item() * r.world:.3f}")
            seconds += time.monotonic() - began
            due = r.all_reduce(torch.tensor(int(time.monotonic() - saved > SAVE_EVERY)))
            stop = r.should_stop()
            if (stop or due) and step + 1 < last:  # after the last step, the row of the epoch comes first
                checkpoint()
                saved = time.monotonic()
                if stop:
                    r.stop()
        bar.close()

        train_loss = r.all_reduce(losses.sum()).item() / min(len(blocks), last * args.bs)
        val_loss = scoring.block_loss(net, parts["validation"], args, r, eos)
        r.check_finite(torch.tensor([val_loss]), done)
        r.log({"epoch": epoch + 1, "train_loss": train_loss, "val_loss": val_loss,
               "lr": optimizer.param_groups[0]["lr"], "seconds": round(seconds, 2)})  # fmt: skip
        r.print(f"epoch {epoch + 1:>2}/{epochs}   loss {train_loss:.4f} train {val_loss:.4f} val   perplexity "
                f"{scoring.perplexity(train_loss):,.2f} train {scoring.perplexity(val_loss):,.2f} val   "
                f"{done * args.bs * args.block_size / seconds:,.0f} tokens/s")  # fmt: skip
        if args.tensorboard:
            r.text("sample", generate.sample(net, tokenizer, parts["validation"].ids[:8]), epoch + 1)
        if val_loss < best:
            best = val_loss
            r.save_best(model=trainable, epoch=epoch + 1, val_loss=val_loss)
        losses.zero_()
        checkpoint()
    return seconds / max(1, done)


# ---------------------------------------------------------------------------------------------------------------- main


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run.add_flags(p, recipe=dict(choices=list(RECIPES), default="plain"))
    run.add_flags(p, "set", "tensorboard", "data_dir", "out", "resume",
                  data=dict(type=data.dataset_arg, default="auto", help=data.DATA_HELP))  # fmt: skip
    p.add_argument("--mode", choices=["train", "gen"], default="train", help="gen: as generate.py (default: train)")
    p.add_argument("--model", type=pretrained.recorded_arg, metavar="NAME|PATH", help=pretrained.MODEL_HELP)
    p.add_argument("--method", choices=model.METHODS, help="which weights are trained")
    p.add_argument("--rank", type=run.positive_int, metavar="N", help="of LoRA's matrices")
    run.add_flags(p, "epochs", "lr", "weight_decay", "seed", "device", "threads", "precision",
                  bs=dict(help="blocks of one optimizer step"),
                  limit=dict(help="only the first N tokens of each part, for a quick look"))  # fmt: skip
    plain, lines = RECIPES["plain"], ["recipes:"]
    for name, values in (RECIPES | METHODS).items():
        lines.append(f"  {name}: " + ", ".join(f"{k} {v}" for k, v in values.items() if k == "lr" or plain.get(k) != v
                                               or name == "plain"))  # fmt: skip
    p.epilog = "\n".join(lines)
    return p


def recipe(args):
    """The recipe with the values of its method. Raises UserError for a flag that the method does not have."""
    values = RECIPES[args.recipe]
    method = args.method or values["method"]
    if args.rank is not None and method != "lora":
        raise run.UserError(f"--rank: is one of --method lora, not of {method}")
    return values | METHODS[method] | {"lr": values["lr"][method]}


def check(args):
    """Raise UserError for values of --set that are out of range."""
    bounds = {"block_size": 2, "micro_batch": 1, "last_blocks": 1, "max_steps": 1, "val_tokens": 2, "test_tokens": 0}
    for name, low in bounds.items():
        value = getattr(args, name, None)
        if (value is not None or name == "block_size") and not (type(value) is int and low <= value < 2**31):
            raise run.UserError(f"--set {name}={value}: must be a whole number of at least {low}")
    for name, low, high in (("warmup", 0, 1), ("clip", 1e-9, 1e9), ("alpha", 1e-9, 1e9), ("fraction", 1e-9, 1)):
        if getattr(args, name, None) is not None and not low <= getattr(args, name) <= high:
            raise run.UserError(f"--set {name}={getattr(args, name)}: must be from {low:g} to {high:g}")
    if args.decay not in ("linear", "cosine", "none"):
        raise run.UserError(f"--set decay={args.decay}: must be linear, cosine or none")
    ddp.micro_batch_size(args.bs)  # does bs divide by the number of processes?


def parse(argv=None):
    return run.parse(__file__, parser(), argv, recipe, check,
                     extendable=lambda args: args.decay == "none" and not args.warmup)  # fmt: skip


def main(argv=None):
    args = parse(argv)
    if args.mode == "gen":
        return generate.main(generate.argv_of(args))
    net, tokenizer, base = pretrained.open_for_training(args)
    limits = {"validation": args.val_tokens, "test": args.test_tokens}
    parts, facts = data.load(args.data, args.data_dir, tokenizer, args.limit, args.fraction, limits)
    args.data, args.model = facts["name"] if args.data == "auto" else args.data, base["name"]
    precision = "fp32" if base["builtin"] else AUTO_PRECISION  # the small matrices of tiny gain nothing
    name = f"{facts['name']}-{pretrained.short_name(base['name'])}-{args.method}"
    with ddp.Run(
        args, __file__, name, auto_precision=precision, auto_threads=AUTO_THREADS, stop_within_epoch=True
    ) as r:
        net = model.prepare(net, args.method, *(getattr(args, name, None) for name in model.OPTIONS)).to(r.device)
        if args.checkpointing:
            model.checkpoint_activations(net)
        trained, blocks = model.Trainable(net).count(), data.Blocks(parts["train"].ids, args.block_size)
        r.note(f"{args.model}, {args.method}: {trained:,} of {base['parameters']:,} parameters trained, on "
               f"{data.describe(facts)}; {len(blocks):,} blocks of {args.block_size}, {blocks.left_over} tokens left "
               "over", dataset=facts, base=base, parameters=trained,
               tokens_per_step=args.bs * args.block_size)  # fmt: skip
        data.check_blocks(args.data, parts["train"], args.block_size)
        seconds_per_step = train(args, r, net, tokenizer, parts)

        best = r.load_best(model=model.Trainable(net))
        final = {"best_epoch": best["epoch"], "seconds_per_step": seconds_per_step}
        final |= scoring.scores("val", best["val_loss"], parts["validation"])
        if "test" in parts:
            loss = scoring.block_loss(net, parts["test"], args, r, tokenizer.eos_token_id)
            final |= scoring.scores("test", loss, parts["test"])
        if r.rank == 0:
            final["bytes"] = pretrained.save(net, tokenizer, r.folder / "model")
        part, name = ("test", "test") if "test" in parts else ("val", "validation")
        per_token, per_word = final[f"{part}_perplexity"], final[f"{part}_word_perplexity"]
        r.finish(f"{name} perplexity {per_token:,.2f} per token, {per_word:,.2f} per word, with the weights of epoch "
                 f"{best['epoch']}, which are in model/", **final)  # fmt: skip
    return r.record


if __name__ == "__main__":
    run.cli(main)
