"""The perplexity of models on a text, per token and per word, with block size, stride and form named.

    python distilgpt2/evaluate.py --model gpt2                              # WikiText-2's test part, before fine-tuning
    python distilgpt2/evaluate.py --model smollm2 out/distilgpt2/RUN --limit 50000             # before and after
    python distilgpt2/evaluate.py --model gpt2 --data wikitext2-raw --form lines --block-size 1024 --stride 512

A stride below the block size predicts every token from a longer context. Numbers on different forms of a text (<unk> or
raw, detokenized or as it is) cannot be compared, so every row names its form. Writes evaluate.json into --out.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

from common import run
from common.options import option

import torch
from tqdm import tqdm

import corpus
import data
import pretrained
import scoring
import train
from data import DATA_HELP, dataset_arg

AUTO_THREADS = 1  # as train.py


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    data: str = option("wikitext2", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    limit: int | None = option(None, "only the first N tokens", above=0)
    model: tuple[str, ...] = option(
        ("auto",), pretrained.MODEL_HELP, type=pretrained.model_arg, nargs="+", metavar="RUN|NAME|PATH"
    )
    part: str = option("test", "which part of the dataset", choices=corpus.PARTS)
    form: str = option("detokenized", "the form of WikiText", choices=corpus.FORMS)
    block_size: int = option(256, "the longest context", above=0)
    stride: int | None = option(None, "tokens between two blocks; none: the block size, without overlap", above=0)
    device: str = run.device_option()
    threads: int | str = run.threads_option()
    precision: str = run.precision_option()
    out: str = option(
        str(run.ROOT / "out/distilgpt2/evaluate"), "folder of evaluate.json", type=run.path_arg, metavar="DIR"
    )

    def check(self):
        if self.stride and self.stride > self.block_size:
            raise run.UserError(
                f"--stride {self.stride}: is above --block-size {self.block_size}; tokens would be left out"
            )


def evaluate(name, args, place) -> dict:
    """One row of the record: the model `name` on the text that `args` describe. Raises UserError."""
    name = pretrained.resolve(name, args.data_dir)
    net, tokenizer, facts = pretrained.open_model(name, args.data_dir)
    if args.block_size > pretrained.context(net):
        raise run.UserError(f"--block-size {args.block_size}: {name} takes {pretrained.context(net):,} tokens at most")
    found = corpus.load(args.data, args.data_dir, args.form)
    if args.part not in found.parts:
        raise run.UserError(f"--part {args.part}: {args.data} has only {', '.join(found.parts)}")
    part = data.tokenize(found.parts[args.part], tokenizer, args.limit or math.inf)
    stride = args.stride or args.block_size
    if args.form == "lines" and part.ids[-1] == tokenizer.eos_token_id:
        part.ids = part.ids[:-1]  # one document: the text as it is, and nothing else
    if len(part.ids) < 2:
        raise run.UserError(f"{args.data}: the text has {len(part.ids)} tokens; two or more are needed")
    net.to(place.device)
    total = count = 0
    with tqdm(total=len(part.ids) - 1, desc=pretrained.short_name(name), leave=False, disable=None) as bar:
        for loss, targets in scoring.strided_loss(net, part.ids, args.block_size, stride, place):
            total, count = total + loss, count + targets
            bar.update(targets)
    if not math.isfinite(total):
        raise run.UserError(f"{name}: is damaged: its loss on {args.data} is not finite")
    facts["name"] = pretrained.record_name(name)
    return {
        "state": "done",
        "model": facts,
        "part": args.part,
        "form": found.form,
        "block_size": args.block_size,
        "stride": stride,
        "tokens": count,
        "words": round(part.words),
        "limit": args.limit,
        "dataset": {"name": found.name, "digest": found.digest(), "builtin": found.name == "builtin"},
        **scoring.scores("text", total / count, part),
    }


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    run.set_threads(args.threads, AUTO_THREADS)
    device, out = run.pick_device(args.device), run.make_folder(args.out)
    automatic = train.AUTO_PRECISION if run.native_bf16(device) else "fp32"
    precision = automatic if args.precision == "auto" else args.precision
    place = SimpleNamespace(
        device=device, autocast=lambda: torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    )
    machine, rows = run.environment(device, __file__), []
    for name in args.model:
        rows.append(row := evaluate(name, args, place))
        first = f"the first {row['tokens']:,} tokens" if args.limit else f"{row['tokens']:,} tokens"
        print(
            f"{name}: {row['text_perplexity']:.2f} per token, {row['text_word_perplexity']:.2f} per "
            f"word; {row['dataset']['name']} {row['part']} ({row['form']}), {first}, blocks of {row['block_size']}, "
            f"stride {row['stride']}, {precision}"
        )
        row["precision"] = precision
    run.write_json(out / "evaluate.json", {"study": "evaluate", **machine, "rows": rows})
    return rows


if __name__ == "__main__":
    run.cli(main)
