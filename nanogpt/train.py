"""Train a language model on characters, words or byte pairs.

    python nanogpt/train.py                                        # nanoGPT's laptop run: 0.8 M parameters, Shakespeare
    python nanogpt/train.py --recipe fast                          # as many parameters, a third of the time
    python nanogpt/train.py --recipe best                          # the lowest loss in three minutes on two cores
    python nanogpt/train.py --recipe long                          # what nanoGPT reaches in three minutes of an A100
    python nanogpt/train.py --recipe web --data openwebtext        # real web text, by byte pairs: ten minutes
    python nanogpt/train.py --recipe gpu --device cuda             # 10.7 M parameters, minutes on one GPU
    python nanogpt/train.py --recipe word-mlp                      # words: Bengio's MLP of 2003
    python nanogpt/train.py --overfit --iters 200                  # overfit one batch: a healthy model can
    python nanogpt/train.py --recipe fast --data book.txt --tokens bpe --init RUN    # go on from a run of byte pairs
    torchrun --nproc-per-node=8 nanogpt/train.py --recipe gpt2 --data openwebtext

The validation loss is the mean over the whole validation text. During the run a long text is evaluated in part, and
best.pt is the checkpoint with the lowest loss there. --bs is the number of sequences in one optimizer step, over all
processes. The recipe sets every hyper-parameter; flags override it.
"""

import math
import textwrap
import time
from dataclasses import dataclass, replace
from typing import ClassVar

from common import ddp, run
from common.averages import build_average
from common.options import option

import torch
from tqdm import tqdm

import data
from checkpoint import (
    INIT_HELP,
    KINDS,
    build,
    config_of,
    init_arg,
    init_recipe,
    load_init,
    model_config,
    parse_config,
    save_weights,
)
from data import DATA_HELP, TOKENS, dataset_arg
from model import LAYERS, MLPS, NORMS
from optim import lr_factor, make_optimizers
from sampling import generate
from training.diagnostics import check_start, draw_layers, gradient_norms, update_ratios
from training.validation import estimate, eval_tokens, evaluate, loss_of, perplexity, steps_between_evaluations

RECIPE_NAMES = ["tiny", "cpu", "fast", "muon", "best", "long", "web", "gpu", "gpt2", "phi1", "phi1-finetune"]
RECIPE_NAMES += ["phi1-large", "phi1-gpu", "phi1-gpu-finetune", "word-bigram", "word-mlp", "word-gpt"]
SIZE = 2**17  # above any width or length that a machine could hold


@dataclass(kw_only=True)
class Options(run.TrainOptions):
    data: str = option("auto", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    limit: int | None = option(None, "only the first N tokens of each part, for a quick look", above=0)
    recipe: str = option("cpu", "a named set of hyper-parameters; flags override it", choices=RECIPE_NAMES)
    tokens: str = option("char", "what a token is", choices=TOKENS)
    init: str | None = option(None, INIT_HELP, type=init_arg, metavar="RUN|FILE|NAME")
    held_out: bool = option(False, "validate on the last tenth of the training text, and read no other part")
    overfit: bool = option(False, "the same batch at every step: the loss must go to near 0")
    iters: int = option(2000, "training steps", above=0)
    bs: int = option(12, "batch size: sequences of one optimizer step, over all processes", above=0)
    micro_batch: int | None = option(
        None, "sequences of one forward pass in each process; none: its whole share of the batch", above=0
    )
    lr: float = option(1e-3, "peak learning rate of AdamW", above=0)
    muon: float = option(
        0.0, "learning rate of Muon, for the matrices of the blocks, in multiples of --lr; 0: AdamW for all", at_least=0
    )
    ns_steps: int = option(5, "iterations of Newton-Schulz in Muon", above=0, at_most=100)
    beta2: float = option(0.99, "AdamW's average of squared gradients", at_least=0, below=1)
    weight_decay: float = option(0.1, "weight decay of matrices", at_least=0)
    clip: float = option(1.0, "largest norm of the gradients; 0: no clipping", at_least=0)
    warmup: int = option(100, "steps in which the learning rate rises; then it is constant", at_least=0)
    decay: str = option("cosine", "how the learning rate falls at the end", choices=["cosine", "linear"])
    cooldown: float = option(1.0, "the last fraction of the run, in which it falls", at_least=0, at_most=1)
    final_lr: float = option(0.1, "the learning rate at the end, as a fraction of --lr", at_least=0)
    ema: float = option(
        0.0,
        "decay of the average of weights that is evaluated and kept, over at most a tenth of the steps; 0: no average",
        at_least=0,
        below=1,
    )
    evals: int = option(10, "evaluations in a run", above=0)
    compile: bool = option(False, "torch.compile the model")
    kind: str = option("gpt", "the network", choices=list(KINDS))
    block_size: int = option(64, "the longest sequence, in tokens", above=0, at_most=SIZE)
    first_block_size: int | None = option(
        None,
        "tokens of a sequence in the first half of the run, in as many more sequences; none: as in the second",
        above=0,
        at_most=SIZE,
    )
    n_layer: int = option(4, "blocks", above=0, at_most=LAYERS, only="gpt")
    n_head: int = option(4, "heads of attention", above=0, at_most=SIZE, only="gpt")
    n_embd: int = option(
        128,
        "width of the embeddings; 0: a bigram's full table",
        at_least=0,
        at_most=SIZE,
        only=("gpt", "bigram", "wordmlp"),
    )
    dropout: float = option(0.0, "dropout", at_least=0, below=1, only="gpt")
    bias: bool = option(False, "biases in linear layers and layer norms, as GPT-2 has them", only="gpt")
    tied: bool = option(True, "the head shares its weights with the token embedding", only="gpt")
    rotary: bool = option(False, "rotary instead of learned positions", only="gpt")
    norm: str = option("layer", "normalization", choices=NORMS, only="gpt")
    mlp: str = option("gelu", "activation of the MLP", choices=MLPS, only="gpt")
    qk_norm: bool = option(False, "layer normalization of queries and keys", only="gpt")
    context: int = option(4, "words that predict the next one", above=0, at_most=SIZE, only="wordmlp")
    hidden: int = option(64, "width of the hidden layer", above=0, at_most=SIZE, only="wordmlp")
    direct: bool = option(False, "connections from the embeddings to the logits", only="wordmlp")
    name: str = option("", "the model of the Hugging Face hub, which --init sets", only="hub")

    variant: ClassVar[str] = "kind"

    def check(self):
        ddp.micro_batch_size(self.bs, self.micro_batch)
        if self.first_block_size and self.block_size % self.first_block_size:
            raise run.UserError(f"--first-block-size {self.first_block_size}: does not divide {self.block_size}")
        if self.kind == "hub" and not self.name:
            raise run.UserError("--kind hub: name the model with --init")
        parse_config(model_config(self, vocab_size=1))


CPU = Options()  # nanoGPT's laptop run
TINY = replace(CPU, iters=60, evals=3, lr=1e-2, warmup=5, block_size=16, n_layer=1, n_head=2, n_embd=32)  # for tests
GPU = replace(
    CPU, iters=5000, bs=64, evals=20, compile=True, block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2
)
GPT2_SHAPE = replace(CPU, compile=True, beta2=0.95, lr=6e-4, block_size=1024, n_layer=12, n_head=12, n_embd=768)
GPT2 = replace(GPT2_SHAPE, tokens="gpt2", iters=600_000, bs=480, micro_batch=12, warmup=2000, evals=600)
MUON = Options(
    iters=500,
    evals=5,
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
MODERN = replace(MUON, rotary=True, mlp="relu2", qk_norm=True)
FAST = replace(MODERN, iters=400, evals=4, n_layer=3, n_head=3, n_embd=144)
BEST = replace(MODERN, iters=1800, evals=9, block_size=128, n_embd=192)
LONG = replace(BEST, iters=2800, evals=7, bs=8, block_size=256, first_block_size=128, weight_decay=0.1, ema=0.997)
WEB = replace(MODERN, tokens="gpt2", iters=1500, evals=3, bs=8, block_size=128)
PHI1 = replace(MODERN, tokens="bpe", iters=800, evals=4, block_size=256)
PHI1_GPU = replace(GPT2_SHAPE, tokens="bpe", iters=10_000, bs=240, micro_batch=24, warmup=500, evals=50)
WORDS = replace(CPU, tokens="word", iters=1500, bs=16, lr=3e-3, warmup=50, final_lr=0.0)
RECIPES = {
    "tiny": TINY,
    "cpu": CPU,
    "fast": FAST,
    "muon": MUON,  # the base of sweep.py --study options
    "best": BEST,
    "long": LONG,
    "web": WEB,
    "gpu": GPU,
    "gpt2": GPT2,
    "phi1": PHI1,  # phi1.py and textbooks/README.md explain these
    "phi1-finetune": replace(PHI1, iters=150, bs=32, lr=1e-3, evals=3),
    "phi1-large": replace(PHI1, n_layer=6, n_head=6, n_embd=240),
    "phi1-gpu": PHI1_GPU,
    "phi1-gpu-finetune": replace(PHI1_GPU, iters=1000, bs=256, micro_batch=64, lr=1e-4, warmup=50, evals=10),
    "word-bigram": replace(WORDS, kind="bigram", n_embd=64),
    "word-mlp": replace(WORDS, kind="wordmlp", context=4, n_embd=64, hidden=64),
    "word-gpt": replace(WORDS, iters=950, lr=2e-3, n_layer=2, n_embd=96),
}
SAVE_SECONDS = 240  # between checkpoints if no evaluation is due
AUTO_PRECISION = "bf16"  # bench.py: 1.4 times as fast if a CPU multiplies it natively
AUTO_THREADS = None  # all cores; tools/seconds.py: two are 1.4 times as fast as one
SAMPLE_TOKENS = 120


def backward(model, x, y, micro_batch, r, targets=None):
    """Compute the gradients of the loss on x and y, `micro_batch` sequences at a time. Returns the loss.

    targets: the number in the whole batch, per process. Micro-batches of rows have different numbers of targets, and
    each target has the same weight in the mean.
    """
    targets = (y >= 0).sum() if targets is None else targets
    total = torch.zeros((), device=r.device)
    for x_part, y_part in ddp.micro_batches(model, micro_batch, x, y):
        loss = loss_of(model, x_part, y_part, r) * ((y_part >= 0).sum() / targets)
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


def describe(args, r, text, model, n_eval):
    """Say and record what is trained on what."""
    parameters = run.count_parameters(model)
    tokens = args.bs * (text.train.shape[2] if text.train.dim() == 3 else model.block_size)  # padding included
    message = (
        f"{args.recipe}: {args.kind}, {parameters:,} parameters; {text.name}, {text.level} tokens: "
        f"{len(text.train):,} for training, {len(text.val):,} for validation, vocabulary {model.vocab_size:,}; "
        f"{tokens:,} tokens per step"
    )
    if n_eval < data.n_targets(text.val):
        message += f"; evaluated on {n_eval:,} evenly spaced tokens until the end"
    r.note(message, dataset=text.facts() | {"eval": n_eval}, parameters=parameters, tokens_per_step=tokens)


@dataclass
class Progress:
    """What a checkpoint holds beside the model and the optimizers."""

    losses: list[torch.Tensor]  # of each step since the last evaluation, in this process
    step: int = 0  # number of steps that are done
    best: float = math.inf  # lowest validation loss
    seconds: float = 0.0  # of training, with evaluations


def begin(args, r, text, parts, micro_batch, init) -> Progress:
    """The progress of the run that is resumed, or of a new one, which gets the weights `init`, if any, and whose first
    loss is checked. parts: the model, the optimizers and the average, as checkpoints name them."""
    model = parts["model"]
    if state := r.load(**parts):
        losses = state["losses"].to(r.device)
        if r.rank:  # a checkpoint has sums over processes
            losses = torch.zeros_like(losses)
        return Progress(list(losses), state["step"], state["best"], state["seconds"])
    if init:
        init.load_into(model)
        r.note(init={"name": args.init, "digest": init.digest})
    x, y = data.batch(text.train, model.block_size, micro_batch, args.seed, 0, r.device)
    with r.autocast():
        first_loss = check_start(model, x, y, trained=bool(init))
    r.note(first_loss=first_loss)
    r.print(f"first loss {first_loss:.3f}, ln {model.vocab_size} = {math.log(model.vocab_size):.3f}; causal")
    torch.manual_seed(args.seed + r.rank)  # different dropout in every process
    return Progress([])


def mean_losses(progress: Progress, r) -> torch.Tensor:
    """The losses since the last evaluation, (steps,), as means over the processes. Raises Diverged."""
    losses = r.all_reduce(torch.stack(progress.losses)) / r.world
    r.check_finite(losses, progress.step - len(losses))
    return losses


def save(r, parts, progress: Progress, **constants):
    losses = torch.zeros(0)
    if progress.losses:
        losses = r.all_reduce(torch.stack(progress.losses))
    r.save(**parts, **vars(progress) | {"losses": losses}, **constants)


def train(args, r, text, init=None):
    """Train, from the weights `init` or from random ones. Writes metrics.csv, layers.png, last.pt and best.pt (lowest
    validation loss). Returns (model, seconds)."""
    config = model_config(args, text.tokenizer.vocab_size)
    if args.kind != "hub":  # whose models are there already, and may have other dtypes
        run.check_memory(lambda: build(config), r.device, "the sizes of the network")
    model = build(config).to(r.device)
    optimizers = make_optimizers(model, args, r.device)
    average = build_average(model, args.ema, args.iters) if args.ema else None
    eval_model = average.module if average else model  # what is evaluated, and saved as best.pt
    parts = {"model": model, "optimizer": optimizers}
    if average:
        parts["average"] = average
    eval_every = steps_between_evaluations(args)
    n_eval = eval_tokens(args, text, model.block_size)
    micro_batch = ddp.micro_batch_size(args.bs, args.micro_batch)
    describe(args, r, text, model, n_eval)
    progress = begin(args, r, text, parts, micro_batch, init)
    r.note(muon_precision=optimizers[-1].param_groups[0].get("precision"))  # of its products; a resumed run keeps it
    ddp_model, _ = r.wrap(model)
    ddp_model = torch.compile(ddp_model) if args.compile else ddp_model
    constants = {"config": config_of(model), "tokenizer": text.tokenizer.state()}
    began = time.monotonic() - progress.seconds  # before an interruption
    bar = tqdm(total=args.iters, initial=progress.step, leave=False, disable=True if r.rank else None)

    while progress.step < args.iters:
        model.train()
        place = 0 if args.overfit else progress.step
        pieces = pieces_of_block(args, progress.step)
        x, y = data.batch(text.train, model.block_size // pieces, args.bs * pieces, args.seed, place)  # (N, T) each
        targets = (y >= 0).sum() / r.world
        x, y = (run.to_device(tokens.chunk(r.world)[r.rank], r.device) for tokens in (x, y))
        progress.losses.append(backward(ddp_model, x, y, micro_batch * pieces, r, targets))
        evaluating = (progress.step + 1) % eval_every == 0 or progress.step + 1 == args.iters
        if evaluating:  # norms before clipping, which would hide large gradients
            gradients = gradient_norms(model)
            before = [p.detach().clone() for p in model.parameters()]
        update(model, optimizers, args, progress.step)
        if average:
            average.update_parameters(model)
        progress.step += 1
        bar.update()

        if progress.step % 50 == 0 or evaluating:  # reading the loss at every step would stall a GPU
            losses = mean_losses(progress, r)
            bar.set_postfix(loss=f"{losses[-1].item():.3f}")
        if evaluating:
            val_loss = evaluate(eval_model, text.val, micro_batch, r, n_eval)
            r.check_finite(torch.tensor([val_loss]), progress.step)
            row = {"iter": progress.step, "train_loss": losses.mean().item(), "val_loss": val_loss}
            row |= {"lr": optimizers[0].param_groups[0]["lr"], "elapsed_seconds": round(time.monotonic() - began, 2)}
            r.log(row | gradients | update_ratios(model, before))
            print_evaluation(args, r, row, sample(eval_model, text, args.seed, progress.step, r))
            progress.losses = []
            if val_loss < progress.best:
                progress.best = val_loss
                losses_of_best = {"train_loss": row["train_loss"], "val_loss": val_loss}
                r.save_best(model=eval_model, step=progress.step, **losses_of_best, **constants)

        stopping = r.should_stop()
        due = r.save_due(SAVE_SECONDS)
        if evaluating or stopping or due:
            progress.seconds = round(time.monotonic() - began, 2)
            save(r, parts, progress, **constants)
        if stopping:
            r.stop()
    bar.close()
    r.figure("layers.png", draw_layers(r.rows))
    return model, progress.seconds


def pieces_of_block(args, step: int) -> int:
    """How many sequences take the place of one of args.block_size tokens in step number `step`."""
    if args.first_block_size and 2 * step < args.iters:
        return args.block_size // args.first_block_size
    return 1


def print_evaluation(args, r, row: dict, generated: str):
    """Print the losses of an evaluation, and a text that the model has generated."""
    r.print(
        f"iter {row['iter']:>6,}/{args.iters:,}   loss {row['train_loss']:.4f} train {row['val_loss']:.4f} val   "
        f"{row['elapsed_seconds']:.0f} s\n{textwrap.indent(generated, '    ')}"
    )
    r.text("sample", generated, row["iter"])


def sample(model, text, seed, step, r) -> str:
    """A text that the model generates, starting from the first token of the training text, or from an exercise."""
    generator = torch.Generator(r.device).manual_seed(run.seed_at(seed, step))
    ids = generate(model, text.beginning().to(r.device), SAMPLE_TOKENS, generator=generator)
    return text.tokenizer.decode(list(ids))


# ---------------------------------------------------------------------------------------------------------------- main


def recipe(given: dict) -> Options:
    """The recipe that the flags `given` name; with --init, the tokens and the shape are those of its model."""
    name = given.get("recipe", "cpu")
    return replace(RECIPES[name], recipe=name, **init_recipe(given.get("init")))


def parse(argv=None) -> Options:
    return run.parse_options(__file__, Options, argv, recipe)


def main(argv=None):
    args = parse(argv)
    init = load_init(args.init, args.resume) if args.init else None
    text = data.load(args.data, args.data_dir, args.limit, args.tokens, init and init.tokenizer, args.held_out)
    args.data = text.name if args.data == "auto" else args.data
    name, micro_batch = f"{text.name}-{args.recipe}", ddp.micro_batch_size(args.bs, args.micro_batch)
    data.check_batch_size(args.bs, text)
    if args.first_block_size and text.train.dim() > 1:
        raise run.UserError(f"--first-block-size: {data.display_name(args.data)} holds exercises, which are read whole")
    with ddp.Run(
        args, __file__, name, auto_precision=AUTO_PRECISION, auto_threads=AUTO_THREADS, stop_within_epoch=True
    ) as r:
        model, seconds = train(args, r, text, init)
        best = r.load_best(model=model)
        val_loss = best["val_loss"]
        if r.record["dataset"]["eval"] < data.n_targets(text.val):
            val_loss = evaluate(model, text.val, micro_batch, r)
        final = {
            "best_iter": best["step"],
            "val_loss": val_loss,
            "val_perplexity": perplexity(val_loss),
            "sampled_loss": estimate(model, text.val, micro_batch, args.seed, r),
            "seconds": seconds,
            "train_loss": best["train_loss"],
        }
        results = [f"validation loss {val_loss:.4f} at iter {best['step']:,}"]
        if final["sampled_loss"] is not None:
            results.append(f"{final['sampled_loss']:.4f} as nanoGPT estimates it")
        if text.characters_per_token:  # bits per character
            final["val_bits"] = val_loss / math.log(2) / text.characters_per_token["val"]
        if text.bytes_per_token:
            final["val_bits_per_byte"] = val_loss / math.log(2) / text.bytes_per_token["val"]
        if args.held_out:
            results.append("on the last tenth of the training text")
        elif text.test is None:
            results.append("no test part in this corpus, so slightly optimistic")
        else:
            final["test_loss"] = evaluate(model, text.test, micro_batch, r)
            final["test_perplexity"] = perplexity(final["test_loss"])
            results.append(f"test loss {final['test_loss']:.4f}, perplexity {final['test_perplexity']:.1f}")
        if r.rank == 0:
            save_weights(r.folder / "best.safetensors", model, text.tokenizer.state())
        r.finish("; ".join(results), uniform_loss=math.log(model.vocab_size), **final)
    return r.record


if __name__ == "__main__":
    run.cli(main)
