"""Let a model write: the text streams to the terminal, and into generated_nanogpt.txt.

python nanogpt/sample.py                                                    # the weights that lie in the folder
python nanogpt/sample.py --prompt "ROMEO:" --temperature 0.7 --stop "JULIET:"
python nanogpt/sample.py out/nanogpt/shakespeare-cpu-s0-1 --prompt-file scene.txt --length 2000
python nanogpt/sample.py gpt2 --prompt "What is the answer to life?" --top-p 0.95      # OpenAI's weights, fetched
"""

import argparse
import sys
import time
from pathlib import Path

import torch

import data
import model
import run

WEIGHTS = Path(__file__).resolve().parent / "weights" / "cpu.safetensors"
HUGGING_FACE = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")


def open_model(source, data_dir=None):
    """(model, tokenizer) of a run folder (its best checkpoint), a checkpoint, a safetensors file, or a name of
    HUGGING_FACE. Raises UserError."""
    if source in HUGGING_FACE:
        return model.GPT.from_hugging_face(source).eval(), data.gpt2_tokenizer(data_dir)
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in ("best.pt", "last.pt") if (path / name).exists()]
        if not found:
            raise run.UserError(f"{path}: holds no checkpoint (best.pt or last.pt)")
        path = found[0]
    elif not path.exists():
        raise run.UserError(f"{path}: no such checkpoint, run folder or one of {', '.join(HUGGING_FACE)}")
    net, state = model.load_checkpoint(path)
    return net, data.tokenizer_from(state)


def read_prompt(tokenizer, prompt=None, file=None):
    """The numbers of the prompt, or of the end of a line where there is none. What the vocabulary lacks is named: a
    character is an error, a word becomes <unk>."""
    if file is not None:
        prompt = data.read_file(Path(file))
    if not prompt:
        prompt = "\n" if not tokenizer.missing("\n") else tokenizer.decode([0])
    if missing := tokenizer.missing(prompt):
        named = ", ".join(map(repr, missing[:5])) + ", ..." * (len(missing) > 5)
        if isinstance(tokenizer, data.Characters):
            raise run.UserError(
                f"the prompt has {named}, which this model's vocabulary of {tokenizer.vocab_size} characters lacks"
            )
        print(f"not in the vocabulary, and read as <unk>: {named}", file=sys.stderr)
    if not (ids := tokenizer.encode(prompt)):
        raise run.UserError("the prompt has no token that this model knows; give it a word")
    return ids


def stream(tokenizer, prompt, ids, stop=None):
    """Yield the text of the numbers `ids` after those of `prompt` in pieces, as soon as they are certain.

    A character whose bytes have not all come is held back, and so is what may be the beginning of `stop`, which ends
    the text and is not part of it.
    """
    said, new, text = 0, [], ""
    before = len(tokenizer.decode(prompt))
    for i in ids:
        new.append(i)
        text = tokenizer.decode([*prompt, *new])[before:]
        if stop and (end := text.find(stop)) >= 0:
            yield text[said:end]
            return
        certain = len(text.rstrip("\ufffd"))
        if stop:
            certain -= max((n for n in range(1, len(stop)) if text[:certain].endswith(stop[:n])), default=0)
        if certain > said:
            yield text[said:certain]
            said = certain
    yield text[said:]


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "source",
        nargs="?",
        default=str(WEIGHTS),
        metavar="RUN|CHECKPOINT|NAME",
        help=f"a run folder, a checkpoint, or {', '.join(HUGGING_FACE)} (default: weights/cpu.safetensors)",
    )
    prompts = p.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", metavar="TEXT", help="what the text begins with (default: the end of a line)")
    prompts.add_argument("--prompt-file", metavar="FILE", help="the same from a file")
    p.add_argument("--length", type=run.positive_int, default=500, metavar="N", help="tokens (default: %(default)s)")
    p.add_argument("--samples", type=run.positive_int, default=1, metavar="N", help="texts (default: %(default)s)")
    p.add_argument(
        "--temperature",
        type=run.nonnegative_float,
        default=0.8,
        metavar="X",
        help="0: always the likeliest token; 1: as the model has it (default: %(default)s)",
    )
    p.add_argument("--top-k", type=run.positive_int, metavar="N", help="draw from the N likeliest tokens only")
    p.add_argument(
        "--top-p",
        type=run.positive_float,
        metavar="X",
        help="draw from the fewest tokens whose probabilities come to X",
    )
    p.add_argument(
        "--repetition-penalty",
        type=run.positive_float,
        default=1.0,
        metavar="X",
        help="above 1: what has occurred becomes less likely (default: %(default)s)",
    )
    p.add_argument("--stop", metavar="TEXT", help="end before the first occurrence of TEXT")
    where = "where generated_nanogpt.txt goes (default: the run folder, else the current one)"
    run.add_flags(p, "data_dir", "device", out=dict(help=where), seed=dict(help="what is drawn"))
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    device = run.pick_device(args.device)
    net, tokenizer = open_model(args.source, args.data_dir)
    prompt = read_prompt(tokenizer, args.prompt, args.prompt_file)
    folder = run.make_folder(args.out or (args.source if Path(args.source).is_dir() else "."))
    net.to(device)
    texts, count, began = [], 0, time.monotonic()
    for sample in range(args.samples):
        generator = torch.Generator(device).manual_seed(run.seed_at(args.seed, sample))
        ids = []

        def drawn(ids=ids, generator=generator):
            for i in model.generate(
                net,
                torch.tensor([prompt], device=device),
                args.length,
                args.temperature,
                args.top_k,
                args.top_p,
                args.repetition_penalty,
                generator=generator,
            ):
                ids.append(i)
                yield i

        texts.append(tokenizer.decode(prompt))
        print(texts[-1], end="", flush=True)
        for piece in stream(tokenizer, prompt, drawn(), args.stop):
            texts[-1] += piece
            print(piece, end="", flush=True)
        print("\n" + "-" * 40)
        count += len(ids)
    file = folder / "generated_nanogpt.txt"
    run.write(file, f"\n{'-' * 40}\n".join(texts) + "\n")
    seconds = time.monotonic() - began
    print(f"{count} tokens, {count / seconds:,.0f} a second; {run.shown(file)}", file=sys.stderr)


if __name__ == "__main__":
    run.cli(main)
