"""Fine-tune a pretrained language model: all weights, LoRA, or the last layers.

    python distilgpt2/train.py --data data.csv                  # DistilGPT2 on a CSV file with a column text
    python distilgpt2/train.py --data data.csv --method lora    # the same with LoRA
    python distilgpt2/train.py --recipe smollm2 --method lora   # SmolLM2-135M, 2% of WikiText-2: minutes on one core
    python distilgpt2/train.py --data data.csv --mode gen       # generate text with the newest run
    python distilgpt2/train.py --recipe tiny --data builtin     # a quick look without any download
    torchrun --nproc-per-node=2 distilgpt2/train.py --data data.csv

Documents are packed into blocks without padding. Validation chooses the epoch; that checkpoint is tested once, at the
end, if the data has a test part. The recipe sets every hyper-parameter; flags override it.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import ClassVar

from common import ddp, run
from common.options import option
from common.schedules import cosine

import torch
from tqdm import tqdm

import data
import generate
import model
import pretrained
import scoring
from data import DATA_HELP, dataset_arg
from model import METHODS
from pretrained import MODEL_HELP, recorded_arg

RECIPE_NAMES = ["plain", "smollm2", "tiny"]


@dataclass(kw_only=True)
class Options(run.TrainOptions):
    data: str = option("auto", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    limit: int | None = option(None, "only the first N tokens of each part, for a quick look", above=0)
    mode: str = option("train", "gen: as generate.py", choices=["train", "gen"])
    recipe: str = option("plain", "a named set of hyper-parameters; flags override it", choices=RECIPE_NAMES)
    model: str = option("auto", MODEL_HELP, type=recorded_arg, metavar="NAME|PATH")
    method: str = option("full", "which weights are trained", choices=METHODS)
    epochs: int = option(3, "passes over the training set", above=0)
    max_steps: int | None = option(None, "end after this number of steps, if not before", above=0)
    bs: int = option(8, "blocks of one optimizer step", above=0)
    block_size: int = option(512, "tokens of a block", at_least=2)
    micro_batch: int | None = option(2, "blocks of one forward pass in each process; none: all", above=0)
    lr: float = option(5e-5, "peak learning rate", above=0)
    weight_decay: float = option(0.01, "weight decay of the matrices", at_least=0)
    clip: float = option(1.0, "the largest norm of the gradients", above=0, at_most=1e9)
    decay: str = option("linear", "schedule of the learning rate", choices=["linear", "cosine", "none"])
    warmup: float = option(0.1, "share of all steps in which the learning rate rises", at_least=0, at_most=1)
    across: bool = option(True, "attention across the documents of a block")
    checkpointing: bool = option(False, "compute activations twice: less memory, a third more time")
    fraction: float = option(1.0, "share of the training documents", above=0, at_most=1)
    val_tokens: int | None = option(None, "only the first N tokens of the validation part", at_least=2)
    test_tokens: int | None = option(None, "only the first N tokens of the test part; 0: no test", at_least=0)
    rank: int = option(8, "rank of LoRA's matrices", above=0, at_most=16_384, only="lora")
    alpha: float = option(16.0, "scale of LoRA's update, times the rank", above=0, at_most=1e9, only="lora")
    targets: str = option("all", "layers with LoRA: all, attention, or names with commas", only="lora")
    last_blocks: int = option(2, "how many of the last blocks are trained", above=0, only="last")

    variant: ClassVar[str] = "method"

    def check(self):
        ddp.micro_batch_size(self.bs)  # does bs divide by the number of processes?


PLAIN = Options()
SMOLLM2 = replace(
    PLAIN, model="smollm2", epochs=1, bs=4, block_size=256, fraction=0.02, val_tokens=16_384, test_tokens=50_000
)
TINY = replace(
    PLAIN, model="tiny", epochs=2, bs=6, block_size=16, micro_batch=3, lr=3e-3, decay="none", warmup=0.0
)  # a second, for tests
RECIPES = {
    "plain": {"full": PLAIN, "lora": replace(PLAIN, lr=1e-3), "last": replace(PLAIN, lr=3e-4)},
    "smollm2": {  # what compare.py studies, with the learning rates that its short runs chose
        "full": replace(SMOLLM2, lr=2e-4),
        "lora": replace(SMOLLM2, lr=3e-3),
        "last": replace(SMOLLM2, lr=1.5e-3),
    },
    "tiny": {"full": TINY, "lora": TINY, "last": TINY},
}
AUTO_PRECISION = "bf16"  # bench.py: faster than fp32 if a CPU multiplies it natively
AUTO_THREADS = 1  # two threads make a step 1.2 times as fast on two idle cores
SAVE_SECONDS = 240  # between checkpoints within an epoch


def lr_factor(args, step: int, steps: int) -> float:
    """The factor of the learning rate in step `step` of `steps`: up from zero, then down to zero."""
    warmup = args.warmup * steps
    if step < warmup:
        return (step + 1) / math.ceil(warmup + 1)
    progress = (step - warmup) / max(1.0, steps - warmup)
    if args.decay == "linear":
        return 1 - progress
    if args.decay == "cosine":
        return cosine(progress)
    return 1.0


def backward(net, blocks, count, args, r, eos, weight=1.0):
    """Compute the gradients of the mean loss over the `count` blocks of a step, a micro-batch at a time.

    blocks: int64 (B, block_size + 1), of this process. weight: 0 if they only stand in for blocks that this
    process does not have. Returns this process's part of the mean.
    """
    total = torch.zeros((), device=r.device)
    for inputs, targets in ddp.micro_batches(net, args.micro_batch, blocks[:, :-1], blocks[:, 1:]):
        logits = scoring.logits_of(net, inputs, r, args.across, eos)
        loss = model.cross_entropy(logits, targets) * (weight * len(inputs) / count)
        (loss * r.world).backward()  # DDP averages over processes
        total += loss.detach()
    return total


@dataclass
class Progress:
    """What a checkpoint holds beside the weights and the optimizer."""

    losses: torch.Tensor  # (steps of an epoch,): each step's sum over the blocks of this process
    step: int = 0  # number of steps that are done
    best: float = math.inf  # lowest validation loss
    seconds: float = 0.0  # of training, without validation


def begin(r, trainable, optimizer, steps: int) -> Progress:
    """The progress of the run that is resumed, or of a new one."""
    progress = Progress(torch.zeros(steps, device=r.device))
    if state := r.load(model=trainable, optimizer=optimizer):
        progress.step = state["step"]
        progress.best = state["best"]
        progress.seconds = state["seconds"]
        if r.rank == 0:  # a checkpoint has the losses of all processes
            progress.losses = state["losses"].to(r.device)
    return progress


def save(r, trainable, optimizer, progress: Progress):
    losses = r.all_reduce(progress.losses.clone()).cpu()
    r.save(model=trainable, optimizer=optimizer, **vars(progress) | {"losses": losses})


def share_of(chosen, r) -> tuple[torch.Tensor, float]:
    """(the numbers of the blocks that this process takes of the blocks `chosen` for a step, their weight)."""
    own = chosen[r.rank :: r.world]
    if len(own):
        return own, 1.0
    return chosen[:1], 0.0  # too few for all processes, but each has to take part in the all-reduce


def train(args, r, net, tokenizer, parts):
    """Train, and leave in the run folder metrics.csv, last.pt and best.pt (the lowest validation loss). Returns the
    seconds of a step."""
    trainable = model.Trainable(net)
    blocks = data.Blocks(parts["train"].ids, args.block_size)
    eos = tokenizer.eos_token_id
    fused = r.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(trainable.groups(), args.lr, weight_decay=args.weight_decay, fused=fused)
    steps = math.ceil(len(blocks) / args.bs)  # in an epoch
    total = min(args.epochs * steps, args.max_steps or math.inf)
    epochs = math.ceil(total / steps)

    torch.manual_seed(args.seed + r.rank)  # different dropout in every process
    progress = begin(r, trainable, optimizer, steps)
    ddp_model, _ = r.wrap(net)

    for epoch in range(progress.step // steps, epochs if progress.step < total else 0):
        net.train()
        first, last = progress.step - epoch * steps, min(steps, total - epoch * steps)
        order = blocks.order(args.seed, epoch).split(args.bs)[first:last]
        hidden = True if r.rank else None  # None: only on a terminal
        bar = tqdm(order, f"epoch {epoch + 1}/{epochs}", last, initial=first, leave=False, disable=hidden)
        for step, chosen in enumerate(bar, first):
            began = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = args.lr * lr_factor(args, progress.step, total)
            own, weight = share_of(chosen, r)
            loss = backward(ddp_model, run.to_device(blocks[own], r.device), len(chosen), args, r, eos, weight)
            torch.nn.utils.clip_grad_norm_(trainable.weights.values(), args.clip)
            optimizer.step()
            optimizer.zero_grad()

            progress.losses[step] = loss * len(chosen)
            progress.step += 1
            if progress.step % 10 == 0 or step + 1 == last:
                r.check_finite(r.all_reduce(progress.losses[: step + 1].clone()), epoch * steps)
                bar.set_postfix(loss=f"{loss.item() * r.world:.3f}")
            progress.seconds += time.monotonic() - began
            due = r.save_due(SAVE_SECONDS)
            stopping = r.should_stop()
            if (stopping or due) and step + 1 < last:  # after the last step, the row of the epoch comes first
                save(r, trainable, optimizer, progress)
                if stopping:
                    r.stop()

        train_loss = r.all_reduce(progress.losses.sum()).item() / min(len(blocks), last * args.bs)
        val_loss = scoring.block_loss(net, parts["validation"], args, r, eos)
        r.check_finite(torch.tensor([val_loss]), progress.step)
        row = {"epoch": epoch + 1, "train_loss": train_loss, "val_loss": val_loss}
        row |= {"lr": optimizer.param_groups[0]["lr"], "training_seconds": round(progress.seconds, 2)}
        r.log(row)
        seen = epoch * len(blocks) + min(last * args.bs, len(blocks))
        print_epoch(r, row, epochs, seen * args.block_size / progress.seconds)
        if args.tensorboard:
            r.text("sample", generate.sample(net, tokenizer, parts["validation"].ids[:8]), epoch + 1)
        if val_loss < progress.best:
            progress.best = val_loss
            r.save_best(model=trainable, epoch=epoch + 1, val_loss=val_loss)
        progress.losses.zero_()
        save(r, trainable, optimizer, progress)
    return progress.seconds / max(1, progress.step)


def print_epoch(r, row: dict, epochs: int, tokens_per_second: float):
    """Print the losses and perplexities in the row of an epoch, and the speed so far."""
    r.print(
        f"epoch {row['epoch']:>2}/{epochs}   loss {row['train_loss']:.4f} train {row['val_loss']:.4f} val   perplexity "
        f"{scoring.perplexity(row['train_loss']):,.2f} train {scoring.perplexity(row['val_loss']):,.2f} val   "
        f"{tokens_per_second:,.0f} tokens/s"
    )


# ---------------------------------------------------------------------------------------------------------------- main


def recipe(given: dict) -> Options:
    """The recipe of the method that the flags `given` name."""
    name, method = given.get("recipe", "plain"), given.get("method", "full")
    return replace(RECIPES[name][method], recipe=name, method=method)


def parse(argv=None) -> Options:
    def extendable(args):
        return args.decay == "none" and not args.warmup

    return run.parse_options(__file__, Options, argv, recipe, extendable)


def main(argv=None):
    args = parse(argv)
    if args.mode == "gen":
        return generate.main(generate.argv_of(args, RECIPES[args.recipe][args.method].model))
    net, tokenizer, base = pretrained.open_for_training(args)
    if not args.across:
        scoring.check_apart(net, tokenizer.eos_token_id)
    limits = {"validation": args.val_tokens, "test": args.test_tokens}
    parts, facts = data.load(args.data, args.data_dir, tokenizer, args.limit, args.fraction, limits)
    args.data = facts["name"] if args.data == "auto" else args.data
    args.model = base["name"]
    precision = "fp32" if base["builtin"] else AUTO_PRECISION  # the small matrices of tiny gain nothing
    name = f"{facts['name']}-{pretrained.short_name(base['name'])}-{args.method}"
    with ddp.Run(
        args, __file__, name, auto_precision=precision, auto_threads=AUTO_THREADS, stop_within_epoch=True
    ) as r:
        net = model.prepare(net, args.method, args.rank, args.alpha, args.targets, args.last_blocks).to(r.device)
        if args.checkpointing:
            model.checkpoint_activations(net)
        trained = model.Trainable(net).count()
        blocks = data.Blocks(parts["train"].ids, args.block_size)
        r.note(
            f"{args.model}, {args.method}: {trained:,} of {base['parameters']:,} parameters trained, on "
            f"{data.describe(facts)}; {len(blocks):,} blocks of {args.block_size}, {blocks.left_over} tokens left over",
            dataset=facts,
            base=base,
            parameters=trained,
            tokens_per_step=args.bs * args.block_size,
        )
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
        part, part_name = ("test", "test") if "test" in parts else ("val", "validation")
        per_token, per_word = final[f"{part}_perplexity"], final[f"{part}_word_perplexity"]
        r.finish(
            f"{part_name} perplexity {per_token:,.2f} per token, {per_word:,.2f} per word, with the weights of epoch "
            f"{best['epoch']}, which are in model/",
            uniform_loss=math.log(len(net.get_input_embeddings().weight)),
            **final,
        )
    return r.record


if __name__ == "__main__":
    run.cli(main)
