r'''Generate text with a trained model. It streams to the terminal and is saved as generated_nanogpt.txt.

python nanogpt/sample.py                                          # the newest run, else the committed model long
python nanogpt/sample.py --interactive                            # type a prompt, read its continuation, again
python nanogpt/sample.py long --prompt "ROMEO:" --temperature 0.7 --stop "JULIET:"
python nanogpt/sample.py --out_dir out/nanogpt/shakespeare-best-s0-1 --prompt-file scene.txt --length 2000
python nanogpt/sample.py phi1 --prompt $'def count_vowels(text):\n    """Return the number of vowels in text."""\n'
python nanogpt/sample.py gpt2 --prompt "What is the answer to life?" --top-p 0.95  # OpenAI's weights, downloaded
'''

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path

from common import run
from common.options import option

import torch
from torch import nn

import data
from checkpoint import config_of, load, load_gpt2
from sampling import generate, stream
from tokenizer import END_OF_TEXT, BytePairs, Characters, Words

AUTO_THREADS = 1  # one token after another: small products gain nothing from more

FOLDER = Path(__file__).resolve().parent
COMMITTED = {file.stem: file for file in sorted((FOLDER / "weights").glob("*.safetensors"))}
HUGGING_FACE = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
NAMES = ", ".join([*COMMITTED, *HUGGING_FACE])
DEFAULT = "long"  # of the committed models
MODEL_HELP = f"a run folder, a checkpoint, or one of {NAMES} (default: the newest finished run, else {DEFAULT})"


@dataclass(kw_only=True)
class ModelOptions(run.ScriptOptions):
    """The options that name a model, for `open_model`."""

    model: str | None = option(None, MODEL_HELP, type=run.path_arg, metavar="RUN|NAME", positional=True, nargs="?")
    out_dir: str | None = option(None, "the same", type=run.path_arg, metavar="RUN", names=["--out_dir"])
    data_dir: str | None = run.data_dir_option()
    out: str | None = option(
        None, "where the output goes (default: the run folder, else out/nanogpt)", type=run.path_arg, metavar="DIR"
    )

    def check(self):
        if self.model and self.out_dir:
            raise run.UserError(f"name one model: {self.model} or --out_dir {self.out_dir}")


def open_model(args) -> tuple[nn.Module, Characters | Words | BytePairs, Path]:
    """(model, tokenizer, folder for generated texts) of the model that `args`, ModelOptions, name; a line on standard
    error says which it is. Raises UserError."""
    newest = run.newest_run(FOLDER.name)
    name = args.model or args.out_dir or str(newest or DEFAULT)
    path = COMMITTED.get(name, Path(name))
    folder = args.out or (path if path.is_dir() else run.ROOT / "out" / FOLDER.name)
    if name in HUGGING_FACE:
        model, tokenizer = load_gpt2(name), data.gpt2_tokenizer(args.data_dir)
    elif not (path / "best.pt" if path.is_dir() else path).exists():
        names = f"name a run folder, a checkpoint, or one of {NAMES}"
        raise run.UserError(f"{path}: is missing; {names}; a text to continue goes after --prompt")
    else:
        model, tokenizer = load(path)
    introduce(name, model, newest)
    return model, tokenizer, run.make_folder(folder)


def introduce(name: str, model: nn.Module, newest: Path | None):
    """Say on standard error which model it is, and what else there is: committed models, the newest run."""
    kind = f"{config_of(model)['kind']} with {run.count_parameters(model):,} parameters"
    others = [other for other in COMMITTED if other != name]
    if newest is None:
        others.append("a run of your own (python nanogpt/train.py)")
    elif Path(name).resolve() != newest.resolve():
        others.append(run.display_path(newest))
    print(f"model: {run.display_path(name)}, a {kind}; there are also {', '.join(others)}", file=sys.stderr)


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


def read_lines() -> Iterator[str]:
    """Yield the lines of standard input, typed or from a pipe, without their ends. Raises UserError."""
    if sys.stdin is None:  # closed
        return
    question = "prompt: " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(question)
        except EOFError:
            if question:
                print()  # the question stands on this line
            return
        except UnicodeDecodeError:
            raise run.UserError("standard input is not UTF-8") from None


def typed_prompts(tokenizer) -> Iterator[list[int]]:
    """Yield the tokens of each line of standard input. A line that this model cannot read is named and left out."""
    for line in read_lines():
        try:
            yield read_prompt(tokenizer, line)
        except run.UserError as error:
            print(f"error: {run.printable(error)}", file=sys.stderr)


@dataclass(kw_only=True)
class Options(ModelOptions):
    prompt: str | None = option(None, "the beginning of the text (default: the end of a line)", metavar="TEXT")
    prompt_file: str | None = option(None, "a file with the beginning of the text", type=run.path_arg, metavar="FILE")
    interactive: bool = option(False, "continue each line of standard input, until its end; an empty one is no prompt")
    length: int = option(500, "tokens", above=0)
    samples: int = option(1, "texts for a prompt", above=0)
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
        if self.interactive and (self.prompt is not None or self.prompt_file is not None):
            raise run.UserError("--interactive: not allowed with --prompt or --prompt-file")


def write_text(args, model: nn.Module, tokenizer, prompt: list[int], number: int) -> tuple[str, int]:
    """Print a text that begins with the tokens `prompt`, as it is generated. Returns it, and the number of new tokens.

    number: of the text in this call, which seeds its random choices.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(run.seed_at(args.seed, number))
    limits = (args.temperature, args.top_k, args.top_p, args.repetition_penalty)
    ids = generate(model, torch.tensor([prompt], device=device), args.length, *limits, generator=generator)
    if isinstance(tokenizer.vocabulary, dict):
        end = tokenizer.vocabulary.get(END_OF_TEXT)
        ids = takewhile(lambda i: i != end, ids)  # where a document ends, the next one would begin
    tokens = []
    pieces = []
    for piece in chain([tokenizer.decode(prompt)], stream(tokenizer, prompt, kept(ids, tokens), args.stop)):
        pieces.append(piece)
        print(run.printable(piece, keep="\n\t"), end="", flush=True)
    print("\n" + "-" * 40)
    if not tokens:
        print("the model ends this text at once; give it a beginning: --prompt TEXT", file=sys.stderr)
    return "".join(pieces), len(tokens)


def kept(ids: Iterable[int], tokens: list[int]) -> Iterator[int]:
    """Yield the ids, and append each to `tokens`."""
    for i in ids:
        tokens.append(i)
        yield i


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    run.set_threads(args.threads, AUTO_THREADS)
    device = run.pick_device(args.device)
    model, tokenizer, folder = open_model(args)
    model.to(device)
    prompts = typed_prompts(tokenizer) if args.interactive else [read_prompt(tokenizer, args.prompt, args.prompt_file)]
    texts = []
    count = 0
    seconds = 0.0
    try:
        for prompt in prompts:
            for _ in range(args.samples):
                start = time.perf_counter()
                text, new = write_text(args, model, tokenizer, prompt, len(texts))
                seconds += time.perf_counter() - start
                count += new
                texts.append(text)
    finally:  # also what was written before Ctrl-C
        if texts:
            file = folder / "generated_nanogpt.txt"
            run.write(file, f"\n{'-' * 40}\n".join(texts) + "\n")
            print(f"{count} tokens, {count / seconds:,.0f} per second; {run.display_path(file)}", file=sys.stderr)


if __name__ == "__main__":
    run.cli(main)
