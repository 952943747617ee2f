"""Generate text with a trained model. It streams to the terminal and is saved as generated_nanogpt.txt.

python nanogpt/sample.py                                          # the newest run, else the committed model cpu
python nanogpt/sample.py cpu --prompt "ROMEO:" --temperature 0.7 --stop "JULIET:"
python nanogpt/sample.py --out_dir out/nanogpt/shakespeare-cpu-s0-1 --prompt-file scene.txt --length 2000
python nanogpt/sample.py phi1 --prompt "def add(a, b):"            # textbooks/README.md has better prompts
python nanogpt/sample.py gpt2 --prompt "What is the answer to life?" --top-p 0.95  # OpenAI's weights, downloaded
"""

import argparse
import sys
import time
from itertools import takewhile
from pathlib import Path

from common import run

import torch
from torch import nn

import data
from checkpoint import load_checkpoint, load_gpt2
from generate import generate, stream
from tokenizer import END_OF_TEXT, BytePairs, Characters, Words, tokenizer_from

AUTO_THREADS = 1  # one token after another: small products gain nothing from more

FOLDER = Path(__file__).resolve().parent
COMMITTED = {file.stem: file for file in sorted((FOLDER / "weights").glob("*.safetensors"))}
HUGGING_FACE = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
NAMES = ", ".join([*COMMITTED, *HUGGING_FACE])


def add_flags(parser):
    """Add the arguments that name the model, for `open_model`."""
    text = f"a run folder, a checkpoint, or one of {NAMES} (default: the newest finished run, else cpu)"
    parser.add_argument("model", nargs="?", type=run.path_arg, metavar="RUN|NAME", help=text)
    parser.add_argument("--out_dir", type=run.path_arg, metavar="RUN", help="the same")


def open_model(args) -> tuple[nn.Module, Characters | Words | BytePairs, Path]:
    """(model, tokenizer, folder for generated texts) of the model that `args` name: the flags of `add_flags`,
    --data-dir and --out. Raises UserError."""
    if args.model and args.out_dir:
        raise run.UserError(f"name one model: {args.model} or --out_dir {args.out_dir}")
    name = args.model or args.out_dir
    if name is None:
        name = str(run.newest_run(FOLDER.name) or "cpu")
        print(f"no model named: using {run.display_path(name)}", file=sys.stderr)
    path = COMMITTED.get(name, Path(name))
    folder = args.out or (path if path.is_dir() else ".")
    if name in HUGGING_FACE:
        return load_gpt2(name), data.gpt2_tokenizer(args.data_dir), run.make_folder(folder)
    if path.is_dir():
        path = path / "best.pt"
    if not path.exists():
        raise run.UserError(f"{path}: is missing; name a run folder, a checkpoint, or one of {NAMES}")
    model, state = load_checkpoint(path)
    tokenizer = tokenizer_from(state)
    if tokenizer.vocab_size != model.vocab_size:
        raise run.UserError(f"{path}: is damaged: a tokenizer of {tokenizer.vocab_size} tokens, for {model.vocab_size}")
    return model, tokenizer, run.make_folder(folder)


def read_prompt(tokenizer, prompt: str | None = None, file: str | None = None) -> list[int]:
    """The tokens of the prompt, or of its file; without one, the end of a line. A character that is not in the
    vocabulary is a UserError, and so is text that is not UTF-8; a word becomes <unk> with a warning."""
    if file is not None:
        prompt = data.read_file(Path(file))
    try:
        (prompt or "").encode()
    except UnicodeEncodeError:
        raise run.UserError("the prompt is not UTF-8") from None
    if not prompt:
        prompt = "\n" if not tokenizer.missing("\n") else tokenizer.decode([0])
    if missing := tokenizer.missing(prompt):
        named = ", ".join(map(repr, missing[:5])) + ", ..." * (len(missing) > 5)
        if isinstance(tokenizer, Characters):
            raise run.UserError(f"not among this model's {tokenizer.vocab_size} characters: {named} in the prompt")
        print(f"not in the vocabulary, so read as <unk>: {named}", file=sys.stderr)
    if not (ids := tokenizer.encode(prompt)):
        raise run.UserError("the prompt has no token of this model's vocabulary; give it a word")
    return ids


def probability(text: str) -> float:
    """An argparse type: a number above 0 and at most 1."""
    value = run.positive_float(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is above the maximum, 1")
    return value


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(p)
    prompts = p.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", metavar="TEXT", help="the beginning of the text (default: the end of a line)")
    prompts.add_argument("--prompt-file", metavar="FILE", help="the same from a file")
    p.add_argument("--length", type=run.positive_int, default=500, metavar="N", help="tokens (default: %(default)s)")
    p.add_argument("--samples", type=run.positive_int, default=1, metavar="N", help="texts (default: %(default)s)")
    temperature = "0: always the most likely token; 1: the model's own distribution (default: %(default)s)"
    p.add_argument("--temperature", type=run.nonnegative_float, default=0.8, metavar="X", help=temperature)
    p.add_argument("--top-k", type=run.positive_int, metavar="N", help="sample from the N most likely tokens only")
    top_p = "sample from the most likely tokens whose probabilities add up to X"
    p.add_argument("--top-p", type=probability, metavar="X", help=top_p)
    penalty = "above 1: tokens that have occurred become less likely (default: %(default)s)"
    p.add_argument("--repetition-penalty", type=run.positive_float, default=1.0, metavar="X", help=penalty)
    p.add_argument("--stop", metavar="TEXT", help="end before the first occurrence of TEXT")
    where = "where generated_nanogpt.txt goes (default: the run folder, else the current one)"
    run.add_flags(p, "data_dir", "device", "threads", out=dict(help=where), seed=dict(help="of the random choices"))
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    run.set_threads(args.threads, AUTO_THREADS)
    device = run.pick_device(args.device)
    model, tokenizer, folder = open_model(args)
    prompt = read_prompt(tokenizer, args.prompt, args.prompt_file)
    model.to(device)
    idx, limits = torch.tensor([prompt], device=device), (args.temperature, args.top_k, args.top_p)
    texts, count, start = [], 0, time.monotonic()
    end = tokenizer.vocabulary.get(END_OF_TEXT) if isinstance(tokenizer.vocabulary, dict) else None

    def counted(ids):
        nonlocal count
        for i in ids:
            count += 1
            yield i

    for sample in range(args.samples):
        generator = torch.Generator(device).manual_seed(run.seed_at(args.seed, sample))
        ids = generate(model, idx, args.length, *limits, args.repetition_penalty, generator=generator)
        ids = takewhile(lambda i: i != end, ids)  # where a document ends, the next one would begin
        texts.append(tokenizer.decode(prompt))
        print(texts[-1], end="", flush=True)
        for piece in stream(tokenizer, prompt, counted(ids), args.stop):
            texts[-1] += piece
            print(piece, end="", flush=True)
        print("\n" + "-" * 40)
    file = folder / "generated_nanogpt.txt"
    run.write(file, f"\n{'-' * 40}\n".join(texts) + "\n")
    seconds = time.monotonic() - start
    print(f"{count} tokens, {count / seconds:,.0f} per second; {run.display_path(file)}", file=sys.stderr)


if __name__ == "__main__":
    run.cli(main)
