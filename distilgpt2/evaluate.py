"""The perplexity of models on a text, per token and per word, with block size, stride and form named.

    python distilgpt2/evaluate.py --model gpt2                              # WikiText-2's test part, before fine-tuning
    python distilgpt2/evaluate.py --model smollm2 out/distilgpt2/RUN --limit 50000             # before and after
    python distilgpt2/evaluate.py --model gpt2 --data wikitext2-raw --form lines --block-size 1024 --stride 512

A stride below the block size predicts every token from a longer context. Numbers on different forms of a text (<unk> or
raw, detokenized or as it is) cannot be compared, so every row names its form. Writes evaluate.json into --out.
"""

import argparse
from types import SimpleNamespace

from common import run

import torch
from tqdm import tqdm

import corpus
import data
import pretrained
import scoring
import train

AUTO_THREADS = None  # all cores: tools/seconds.py


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=pretrained.model_arg, nargs="+", metavar="RUN|NAME|PATH", default=["auto"],
                   help=pretrained.MODEL_HELP)  # fmt: skip
    p.add_argument("--part", choices=corpus.PARTS, default="test", help="(default: %(default)s)")
    p.add_argument("--form", choices=corpus.FORMS, default="detokenized", help="of WikiText (default: %(default)s)")
    p.add_argument("--block-size", type=run.positive_int, default=256, metavar="N", help="(default: %(default)s)")
    p.add_argument("--stride", type=run.positive_int, metavar="N", help="(default: the block size, no overlap)")
    run.add_flags(p, "data_dir", "device", "threads", "precision",
                  data=dict(type=data.dataset_arg, default="wikitext2", help=data.DATA_HELP),
                  limit=dict(help="only the first N tokens"),
                  out=dict(default=str(run.ROOT / "out/distilgpt2/evaluate"), help="folder of the record"))  # fmt: skip
    return p


def evaluate(name, args, place) -> dict:
    """One row of the record: the model `name` on the text that `args` describe. Raises UserError."""
    name = pretrained.resolve(name, args.data_dir)
    net, tokenizer, facts = pretrained.open_model(name, args.data_dir)
    if args.block_size > pretrained.context(net):
        raise run.UserError(f"--block-size {args.block_size}: {name} takes {pretrained.context(net):,} tokens at most")
    found = corpus.load(args.data, args.data_dir, args.form)
    if args.part not in found.parts:
        raise run.UserError(f"--part {args.part}: {args.data} has only {', '.join(found.parts)}")
    part, stride = data.tokenize(found.parts[args.part], tokenizer, args.limit), args.stride or args.block_size
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
    facts["name"] = pretrained.record_name(name)
    return {"state": "done", "model": facts, "part": args.part, "form": found.form, "block_size": args.block_size,
            "stride": stride, "tokens": count, "words": round(part.words), "limit": args.limit,
            "dataset": {"name": found.name, "digest": found.digest(), "builtin": found.name == "builtin"},
            **scoring.scores("text", total / count, part)}  # fmt: skip


def main(argv=None):
    args = parser().parse_args(argv)
    if args.stride and args.stride > args.block_size:
        raise run.UserError(
            f"--stride {args.stride}: is above --block-size {args.block_size}; tokens would be left out"
        )
    run.set_threads(args.threads, AUTO_THREADS)
    device, out = run.pick_device(args.device), run.make_folder(args.out)
    automatic = train.AUTO_PRECISION if run.native_bf16(device) else "fp32"
    precision = automatic if args.precision == "auto" else args.precision
    place = SimpleNamespace(device=device, autocast=lambda: torch.autocast(
        device.type, torch.bfloat16, enabled=precision == "bf16"))  # fmt: skip
    machine, rows = run.environment(device, __file__), []
    for name in args.model:
        rows.append(row := evaluate(name, args, place))
        first = f"the first {row['tokens']:,} tokens" if args.limit else f"{row['tokens']:,} tokens"
        print(f"{name}: {row['text_perplexity']:.2f} per token, {row['text_word_perplexity']:.2f} per "
              f"word; {row['dataset']['name']} {row['part']} ({row['form']}), {first}, blocks of {row['block_size']}, "
              f"stride {row['stride']}, {precision}")  # fmt: skip
        row["precision"] = precision
    run.write_json(out / "evaluate.json", {"study": "evaluate", **machine, "rows": rows})
    return rows


if __name__ == "__main__":
    run.cli(main)
