"""How many real tokens per second does training read, packed against padded? Padding counts for nothing.

    python distilgpt2/bench.py --model smollm2                     # 20,000 tokens of WikiText-2 in every way
    python distilgpt2/bench.py --model tiny --data builtin --tokens 2000 --rounds 3      # seconds

(a) packed: this folder's blocks, an end-of-text token between paragraphs, no padding;
(b) padded: the usual way, a tokenizer with padding and transformers' DataCollator, paragraphs in random order;
(c) padded, sorted by length: the same with paragraphs of like length together;
(d) packed, in float32.
(a) to (c) are in bfloat16 if the hardware multiplies it natively, else in float32, and (d) is left out.
The model, its update, the paragraphs (the lines of WikiText) and their real tokens are the same. A batch is --bs
blocks, or --bs paragraphs cut at --block-size tokens. The ways take turns. Writes bench.json into --out.
"""

import random
import statistics
import time
from dataclasses import dataclass

from common import run, timing
from common.options import option

import torch
import torch.nn.functional as F

import corpus
import data
import pretrained
from data import DATA_HELP, dataset_arg

IGNORED = -100  # the label of padding


def paragraphs(documents, tokenizer, tokens: int, block_size: int) -> list[list[int]]:
    """The tokens of lines of documents, each with the end-of-text token, cut at the block size; about `tokens` of
    them."""
    found, total = [], 0
    for line in (line for document in documents for line in corpus.lines_of(document.text)):
        ids = [*pretrained.encode(tokenizer, [line])[0], tokenizer.eos_token_id]
        found.append(ids[:block_size])
        total += len(found[-1])
        if total >= tokens:
            break
    return found


def packed_batches(lines, bs, block_size, seed):
    """Yield (inputs, labels, real targets); the labels are shifted already."""
    lines = lines.copy()
    random.Random(seed).shuffle(lines)
    blocks = data.Blocks(torch.tensor([token for line in lines for token in line]), block_size)
    for index in blocks.order(seed, 0).split(bs):
        batch = blocks[index]
        yield batch[:, :-1], batch[:, 1:], batch[:, 1:].numel(), {}


def padded_batches(lines, bs, collator, seed, by_length):
    """The same in the usual way, for the labels of transformers' collator, which are not shifted yet."""
    order = list(range(len(lines)))
    random.Random(seed).shuffle(order)
    if by_length:
        order.sort(key=lambda i: len(lines[i]))
    batches = [order[i : i + bs] for i in range(0, len(order), bs)]
    random.Random(seed).shuffle(batches)
    for batch in batches:
        out = collator([{"input_ids": lines[i]} for i in batch])
        # the collator marks every pad token as ignored, which where pad is the end-of-text token includes that one;
        # lengths say what is real
        real = torch.tensor([len(lines[i]) for i in batch])
        labels = out["input_ids"].masked_fill(torch.arange(out["input_ids"].shape[1]) >= real[:, None], IGNORED)
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        yield out["input_ids"], labels, int((labels != IGNORED).sum()), {"attention_mask": out["attention_mask"]}


def ways_of(args, lines, net, tokenizer, device):
    """{name: function of the round that returns (real tokens per second, computed tokens per real one)}"""
    from transformers import DataCollatorForLanguageModeling

    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-6, fused=device.type in ("cpu", "cuda"))

    def way(batches, bf16):
        def rate(seed):
            real = computed = 0
            began = time.perf_counter()
            for inputs, labels, count, options in batches(seed):
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    out = net(
                        input_ids=inputs.to(device),
                        use_cache=False,
                        **{name: value.to(device) for name, value in options.items()},
                    )
                logits = out.logits.float().flatten(0, 1)
                loss = F.cross_entropy(logits, labels.to(device).flatten(), ignore_index=IGNORED)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                real, computed = real + count, computed + inputs.numel()
            loss.item()  # a GPU has finished when its last result is here
            return real / (time.perf_counter() - began), computed / real

        return rate

    bf16 = args.precision == "bf16" or args.precision == "auto" and run.native_bf16(device)
    main = {
        "packed": lambda seed: packed_batches(lines, args.bs, args.block_size, seed),
        "padded": lambda seed: padded_batches(lines, args.bs, collator, seed, False),
        "padded, sorted by length": lambda seed: padded_batches(lines, args.bs, collator, seed, True),
    }
    ways = {name: way(batches, bf16) for name, batches in main.items()}
    if bf16:
        ways["packed, float32"] = way(main["packed"], False)
    return ways, "bf16" if bf16 else "fp32"


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    data: str = option("wikitext2", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    model: str = option("auto", pretrained.MODEL_HELP, type=pretrained.model_arg, metavar="NAME|PATH")
    bs: int = option(8, "blocks, or paragraphs, of a batch", above=0)
    block_size: int = option(256, "tokens of a block", at_least=2)
    tokens: int = option(20_000, "real tokens of a round", above=0)
    rounds: int = option(3, "rounds of each way", above=0)
    device: str = run.device_option()
    threads: int | str = run.threads_option()
    precision: str = run.precision_option()
    out: str = option(str(run.ROOT / "out/distilgpt2/bench"), "folder of bench.json", type=run.path_arg, metavar="DIR")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    run.set_threads(args.threads)
    device, out = run.pick_device(args.device), run.make_folder(args.out)
    name = pretrained.resolve(args.model, args.data_dir)
    net, tokenizer, facts = pretrained.open_model(name, args.data_dir)
    if args.block_size > pretrained.context(net):
        raise run.UserError(f"--block-size {args.block_size}: {name} takes {pretrained.context(net):,} tokens at most")
    net.to(device).train()
    tokenizer.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    found = corpus.load(args.data, args.data_dir)
    lines = paragraphs(found.parts["train"], tokenizer, args.tokens, args.block_size)
    lengths = [len(line) for line in lines]
    if sum(lengths) <= args.block_size:
        raise run.UserError(
            f"{found.name}: {sum(lengths)} tokens fill no block of {args.block_size}; use more --tokens"
        )
    ways, precision = ways_of(args, lines, net, tokenizer, device)
    machine = run.environment(device, __file__)
    mean = statistics.mean(lengths)
    print(
        f"{name}: {len(lines):,} lines of {found.name}, {sum(lengths):,} tokens, {mean:.0f} per line "
        f"on average; {machine['device']['name']}, {machine['device']['threads']} threads, {precision}"
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    peak = timing.matmul_peak(device, dtype)
    values, rows = timing.turns(ways, args.rounds), []
    facts["name"] = pretrained.record_name(name)
    for way, pairs in values.items():
        rates, computed = [rate for rate, _ in pairs], statistics.median(waste for _, waste in pairs)
        rate = statistics.median(rates)
        used = 6 * facts["parameters"] * rate * computed / peak if way != "packed, float32" else None
        rows.append(
            {
                "state": "done",
                "way": way,
                "tokens_per_s": rate,
                "computed_per_token": computed,
                "times_padded": timing.median_ratio(rates, [r for r, _ in values["padded"]]),
                "fraction_of_peak": used,
                "rates": rates,
                "dataset": {"builtin": found.name == "builtin"},
                "git": machine["git"],
            }
        )
        print(
            f"{way:<26} {rate:>8,.0f} real tokens/s, {rows[-1]['times_padded']:.2f} times padded, {computed:.2f} "
            "tokens computed for a real one" + (f", {used:.0%} of the peak" if used else "")
        )
    run.write_json(
        out / "bench.json",
        {
            "bench": "distilgpt2",
            **machine,
            "model": facts,
            "precision": precision,
            "peak_flops": peak,
            "block_size": args.block_size,
            "bs": args.bs,
            "rows": rows,
        },
    )
    return rows


if __name__ == "__main__":
    run.cli(main)
