"""Generate text with a trained model. It streams to the terminal and is saved as generated_nanogpt.txt.

python nanogpt/sample.py                                          # the newest run, else the committed model cpu
python nanogpt/sample.py cpu --prompt "ROMEO:" --temperature 0.7 --stop "JULIET:"
python nanogpt/sample.py --out_dir out/nanogpt/shakespeare-cpu-s0-1 --prompt-file scene.txt --length 2000
python nanogpt/sample.py phi1 --prompt "def add(a, b):"            # textbooks/README.md has better prompts
python nanogpt/sample.py gpt2 --prompt "What is the answer to life?" --top-p 0.95  # OpenAI's weights, downloaded
"""

import sys
import time
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from common import run
from common.options import option

import torch
from torch import nn

import data
from checkpoint import load, load_gpt2
from sampling import generate, stream
from tokenizer import END_OF_TEXT, BytePairs, Characters, Words

AUTO_THREADS = 1  # one token after another: small products gain nothing from more

FOLDER = Path(__file__).resolve().parent
COMMITTED = {file.stem: file for file in sorted((FOLDER / "weights").glob("*.safetensors"))}
HUGGING_FACE = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
NAMES = ", ".join([*COMMITTED, *HUGGING_FACE])


MODEL_HELP = f"a run folder, a checkpoint, or one of {NAMES} (default: the newest finished run, else cpu)"


@dataclass(kw_only=True)
class ModelOptions(run.ScriptOptions):
    """The options that name a model, for `open_model`."""

    model: str | None = option(None, MODEL_HELP, type=run.path_arg, metavar="RUN|NAME", positional=True, nargs="?")
    out_dir: str | None = option(None, "the same", type=run.path_arg, metavar="RUN", names=["--out_dir"])
    data_dir: str | None = run.data_dir_option()
    out: str | None = option(
        None, "where the output goes (default: the run folder, else the current one)", type=run.path_arg, metavar="DIR"
    )

    def check(self):
        if self.model and self.out_dir:
            raise run.UserError(f"name one model: {self.model} or --out_dir {self.out_dir}")


def open_model(args) -> tuple[nn.Module, Characters | Words | BytePairs, Path]:
    """(model, tokenizer, folder for generated texts) of the model that `args`, ModelOptions, name.
    Raises UserError."""
    name = args.model or args.out_dir
    if name is None:
        name = str(run.newest_run(FOLDER.name) or "cpu")
        print(f"no model named: using {run.display_path(name)}", file=sys.stderr)
    path = COMMITTED.get(name, Path(name))
    folder = args.out or (path if path.is_dir() else ".")
    if name in HUGGING_FACE:
        return load_gpt2(name), data.gpt2_tokenizer(args.data_dir), run.make_folder(folder)
    if not (path / "best.pt" if path.is_dir() else path).exists():
        raise run.UserError(f"{path}: is missing; name a run folder, a checkpoint, or one of {NAMES}")
    trained = load(path)
    return trained.net, trained.tokenizer, run.make_folder(folder)


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
        named = ", ".join(map(repr, missing[:5]))
        if len(missing) > 5:
            named += ", ..."
        if isinstance(tokenizer, Characters):
            raise run.UserError(f"not among this model's {tokenizer.vocab_size} characters: {named} in the prompt")
        print(f"not in the vocabulary, so read as <unk>: {named}", file=sys.stderr)
    if not (ids := tokenizer.encode(prompt)):
        raise run.UserError("the prompt has no token of this model's vocabulary; give it a word")
    return ids


@dataclass(kw_only=True)
class Options(ModelOptions):
    prompt: str | None = option(None, "the beginning of the text (default: the end of a line)", metavar="TEXT")
    prompt_file: str | None = option(None, "a file with the beginning of the text", type=run.path_arg, metavar="FILE")
    length: int = option(500, "tokens", above=0)
    samples: int = option(1, "texts", above=0)
    temperature: float = option(0.8, "0: always the most likely token; 1: the model's own distribution", at_least=0)
    top_k: int | None = option(None, "sample from the N most likely tokens only", above=0)
    top_p: float | None = option(
        None, "sample from the most likely tokens whose probabilities add up to X", above=0, at_most=1
    )
    repetition_penalty: float = option(1.0, "above 1: tokens that have occurred become less likely", above=0)
    stop: str | None = option(None, "end before the first occurrence of TEXT", metavar="TEXT")
    seed: int = option(0, "seed of the random choices", at_least=0)
    device: str = run.device_option()
    threads: int | str = run.threads_option()

    def check(self):
        super().check()
        if self.prompt is not None and self.prompt_file is not None:
            raise run.UserError("--prompt-file: not allowed with --prompt")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    run.set_threads(args.threads, AUTO_THREADS)
    device = run.pick_device(args.device)
    model, tokenizer, folder = open_model(args)
    prompt = read_prompt(tokenizer, args.prompt, args.prompt_file)
    model.to(device)
    idx, limits = torch.tensor([prompt], device=device), (args.temperature, args.top_k, args.top_p)
    texts = []
    count = 0
    start = time.monotonic()
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
        pieces = [tokenizer.decode(prompt)]
        print(pieces[0], end="", flush=True)
        for piece in stream(tokenizer, prompt, counted(ids), args.stop):
            pieces.append(piece)
            print(piece, end="", flush=True)
        texts.append("".join(pieces))
        print("\n" + "-" * 40)
    file = folder / "generated_nanogpt.txt"
    run.write(file, f"\n{'-' * 40}\n".join(texts) + "\n")
    seconds = time.monotonic() - start
    print(f"{count} tokens, {count / seconds:,.0f} per second; {run.display_path(file)}", file=sys.stderr)


if __name__ == "__main__":
    run.cli(main)
