"""How fast are training and generation? nanoGPT's laptop loop, written plainly, and this folder's, side by side.

    python nanogpt/bench.py                        # tokens per second, and the share of the machine's peak: a minute
    python nanogpt/bench.py --whole                # also three whole runs, their seconds and losses; some minutes

reference: what nanoGPT's train.py does on a CPU with the options of its README (float32, AdamW that is not fused, fused
attention, no compilation). The ways take turns, so that a machine that slows down slows all of them; medians. The peak
is the speed of one product of two 2048 x 2048 matrices in the same precision. Writes bench.json into --out.
"""

import contextlib
import csv
import statistics
import time
from dataclasses import dataclass

from common import run, timing
from common.options import option, to_argv
from common.records import seconds_of

import torch
import torch.nn.functional as F

import data
import model
import train
from checkpoint import build, config_of, model_config
from data import DATA_HELP, dataset_arg
from optim import make_optimizers
from sampling import generate

NANOGPT = 1.898  # the loss on the whole validation text with which nanoGPT's own script ends
NEW_TOKENS = 63  # generated, after one token


class OneProcess:
    """The part of a run that train.py's functions need: precision, device and collectives."""

    rank = 0
    world = 1
    all_reduce = staticmethod(lambda tensor: tensor)

    def __init__(self, device, precision):
        self.device, self.precision = device, precision

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def fresh(recipe, text, device):
    """(args of the recipe, a new model)"""
    args = train.RECIPES[recipe]
    torch.manual_seed(0)
    return args, build(model_config(args, text.tokenizer.vocab_size)).to(device)


@contextlib.contextmanager
def fused_attention():
    """PyTorch's fused attention at all lengths, as nanoGPT has it."""
    limit, model.FUSED_ABOVE = model.FUSED_ABOVE, 0
    try:
        yield
    finally:
        model.FUSED_ABOVE = limit


def reference(text, device):
    """(a step of nanoGPT's loop as a function of the iteration, its model)"""
    args, net = fresh("cpu", text, device)
    groups = [
        {"params": [p for p in net.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in net.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, args.lr, (0.9, 0.99), foreach=False)
    T, tokens = net.block_size, text.train.long()
    data.batch(text.train, T, 1, 0, 0)  # refuses a text that is too short

    @fused_attention()
    def step(i):
        net.train()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * train.lr_factor(args, i)
        starts = torch.randint(len(tokens) - T, (args.bs,)).tolist()
        x = torch.stack([tokens[s : s + T] for s in starts]).to(device)
        y = torch.stack([tokens[s + 1 : s + T + 1] for s in starts]).to(device)
        loss = F.cross_entropy(net(x).flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step, net


def ours(recipe, text, device, precision):
    """(a step of train.py's loop as a function of the iteration, its model)"""
    args, net = fresh(recipe, text, device)
    optimizers, r = make_optimizers(net, args, device), OneProcess(device, precision)

    def step(i):
        net.train()
        x, y = data.batch(text.train, net.block_size, args.bs, 0, i, device)
        loss = train.backward(net, x, y, args.bs, r)
        train.update(net, optimizers, args, i)
        loss.item()

    return step, net


def operations(net):
    """Floating-point operations of training, per token: six for each weight in a matrix product, and the two products
    of attention."""
    c = config_of(net)
    weights = run.count_parameters(net) - (0 if c["rotary"] else c["block_size"] * c["n_embd"])
    return 6 * weights + 12 * c["n_layer"] * c["n_embd"] * c["block_size"]


def training_rows(text, device, steps):
    """Rows of single training steps."""
    fast = "bf16" if run.native_bf16(device) else "fp32"
    ways = {("reference", "fp32"): reference(text, device)}
    for name, precision in dict.fromkeys([("cpu", "fp32"), ("cpu", fast), ("fast", fast)]):
        ways[name, precision] = ours(name, text, device, precision)
    times = timing.turns({way: step for way, (step, _) in ways.items()}, steps, warmup=3)
    dtypes, rows = {"fp32": torch.float32, "bf16": torch.bfloat16}, []
    peaks = {name: timing.matmul_peak(device, dtypes[name]) for name in dict.fromkeys(p for _, p in ways)}
    for (name, precision), (_, net) in ways.items():
        tokens = train.RECIPES["cpu" if name == "reference" else name].bs * net.block_size
        seconds = statistics.median(times[name, precision])
        row = {
            "what": "training",
            "way": name,
            "precision": precision,
            "tokens_per_s": tokens / seconds,
            "ms_per_step": 1000 * seconds,
            "tokens_per_step": tokens,
            "peak": peaks[precision],
            "of_peak": operations(net) * tokens / seconds / peaks[precision],
        }
        rows.append(row | {"times_reference": row["tokens_per_s"] / (rows or [row])[0]["tokens_per_s"]})
    return rows


def generation_rows(text, device):
    """Rows of generation with and without a cache."""
    _, net = fresh("cpu", text, device)
    start = torch.zeros(1, 1, dtype=torch.int64, device=device)

    def way(use_cache):
        return lambda i: timing.seconds_of(lambda: list(generate(net, start, NEW_TOKENS, use_cache=use_cache)))

    times = timing.turns({"without cache": way(False), "with cache": way(True)}, 5)
    return [
        {
            "what": "generation",
            "way": name,
            "precision": "fp32",
            "tokens_per_s": NEW_TOKENS / statistics.median(seconds),
        }
        for name, seconds in times.items()
    ]


def whole_runs(text, device, args, out):
    """Rows of three runs from the first step to the last: seconds, and losses on the whole validation text."""
    plain = OneProcess(device, "fp32")
    step, net = reference(text, device)
    iters, began = train.RECIPES["cpu"].iters, time.perf_counter()
    with fused_attention():
        for i in range(iters + 1):
            if i % 250 == 0 or i == iters:
                _, sampled = (train.estimate(net, part, 12, 0, plain) for part in (text.train, text.val))
            if i < iters:
                step(i)
        rows = [
            {
                "what": "whole run",
                "way": "reference",
                "precision": "fp32",
                "seconds": time.perf_counter() - began,
                "iters": iters,
                "val_loss": train.evaluate(net, text.val, 12, plain),
                "sampled_loss": sampled,
            }
        ]
    for name in ("cpu", "fast"):
        number = 1
        while (out / f"{name}-{number}").exists():
            number += 1
        folder = out / f"{name}-{number}"
        flags = {
            "recipe": name,
            "data": args.data,
            "data_dir": args.data_dir,
            "device": args.device,
            "threads": args.threads,
            "out": str(folder),
        }
        record = train.main(to_argv(train.Options, flags))
        with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
            reached = [seconds_of(row) for row in csv.DictReader(file) if float(row["val_loss"]) <= NANOGPT]
        final = record["final"]
        rows.append(
            {
                "what": "whole run",
                "way": name,
                "precision": record["precision"],
                "seconds": final["seconds"],
                "iters": record["args"]["iters"],
                "val_loss": final["val_loss"],
                "sampled_loss": final["sampled_loss"],
                "seconds_to_nanogpt": reached[0] if reached else None,
            }
        )
    return [row | {"of_reference": row["seconds"] / rows[0]["seconds"]} for row in rows]


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    data: str = option("auto", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    limit: int | None = option(None, "only the first N tokens of each part (not with --whole)", above=0)
    device: str = run.device_option()
    threads: int | str = run.threads_option()
    steps: int = option(100, "steps of each way", above=0)
    whole: bool = option(False, "also train reference, cpu and fast to the end")
    out: str = option(str(run.ROOT / "out/nanogpt/bench"), "folder for bench.json", type=run.path_arg, metavar="DIR")

    def check(self):
        if self.whole and self.limit:
            raise run.UserError("--limit: --whole trains on the whole text")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    run.set_threads(args.threads)
    device, out = run.pick_device(args.device), run.make_folder(args.out)
    text = data.load(args.data, args.data_dir, args.limit)
    machine = run.environment(device, __file__, argv)
    print(f"{text.name}; {machine['device']['name']}, {machine['device']['threads']} threads")
    rows = training_rows(text, device, args.steps)
    for row in rows:
        print(
            f"training    {row['way']:<13}  {row['precision']}  {row['tokens_per_s']:>9,.0f} tokens/s, "
            f"{row['of_peak']:.0%} of the peak, {row['times_reference']:.2f} times the reference"
        )
    rows += generation_rows(text, device)
    for row in rows[-2:]:
        print(f"generation  {row['way']:<13}  fp32  {row['tokens_per_s']:>9,.0f} tokens/s")
    if args.whole:
        rows += whole_runs(text, device, args, out)
        for row in rows[-3:]:
            print(
                f"whole run   {row['way']:<13}  {row['precision']}  {row['seconds']:>6.1f} s, "
                f"{row['of_reference']:.0%} of the reference, validation loss {row['val_loss']:.4f}"
            )
    run.write_json(out / "bench.json", {"bench": "nanogpt", **machine, "dataset": text.facts(), "rows": rows})
    return rows


if __name__ == "__main__":
    run.cli(main)
