"""How fast is training, and writing? nanoGPT's laptop loop, written plainly, and this folder's, side by side.

    python nanogpt/bench.py                        # tokens per second, and the share of the machine's peak: a minute
    python nanogpt/bench.py --whole                # trains all three to the end too: seconds and loss; some minutes

reference: what nanoGPT's train.py does on a CPU with the options of its README (float32, unfused AdamW, fused
attention, no compilation). The ways take turns, so that a machine that slows down slows all of them; medians. The peak
is that of a plain product of two 2048 x 2048 matrices in the same precision. Writes bench.json into --out.
"""

import argparse
import statistics
import time
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import data
import model
import run
import train
from checkpoint import build, config_of, count_parameters
from generate import generate
from optim import make_optimizers

NANOGPT = 1.898  # the loss on the whole validation text at which nanoGPT's own script ends


def reference(text, device):
    """A step of nanoGPT's loop as a function of the iteration, and its model."""
    recipe = SimpleNamespace(**train.RECIPES["cpu"])
    torch.manual_seed(0)
    net = build(recipe.model | {"vocab_size": text.tokenizer.vocab_size}).to(device)
    groups = [
        {"params": [p for p in net.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in net.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, recipe.lr, (0.9, 0.99), foreach=False)
    T, tokens = net.block_size, text.train.long()

    def step(i):
        net.train()
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * train.lr_factor(recipe, i)
        places = torch.randint(len(tokens) - T, (recipe.bs,)).tolist()
        x = torch.stack([tokens[p : p + T] for p in places]).to(device)
        y = torch.stack([tokens[p + 1 : p + T + 1] for p in places]).to(device)
        loss = F.cross_entropy(net(x).flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step, net


def ours(name, text, device, precision):
    """The same of the recipe `name`: a step of train.py's loop."""
    args = SimpleNamespace(**train.RECIPES[name])
    r = SimpleNamespace(
        precision=precision, autocast=lambda: torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    )
    torch.manual_seed(0)
    net = build(args.model | {"vocab_size": text.tokenizer.vocab_size}).to(device)
    optimizers = make_optimizers(net, args, device)

    def step(i):
        net.train()
        x, y = data.batch(text.train, net.block_size, args.bs, 0, i, device)
        loss = train.loss_of(net, x, y, r)
        loss.backward()
        if args.clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * train.lr_factor(args, i)
            optimizer.step()
        net.zero_grad()
        return loss.item()

    return step, net


def seconds_of(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def peak(device, precision, n=2048):
    """Floating-point operations per second of the best of ten products of two n x n matrices."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return 2 * n**3 / min(seconds_of(lambda: (a @ a)[0, 0].item()) for _ in range(10))


def operations(net):
    """Of training, a token: six for every weight that is multiplied, and the two products of attention."""
    c = config_of(net)
    weights = count_parameters(net) - (0 if c["rotary"] else c["block_size"] * c["n_embd"])
    return 6 * weights + 12 * c["n_layer"] * c["n_embd"] * c["block_size"]


def speeds(text, device, steps):
    """Rows of training, then of generation."""
    fast = "bf16" if run.native_bf16(device) else "fp32"
    ways = {("reference", "fp32"): reference(text, device)}
    for name, precision in dict.fromkeys([("cpu", "fp32"), ("cpu", fast), ("fast", fast)]):
        ways[name, precision] = ours(name, text, device, precision)
    times, fused_above = {way: [] for way in ways}, model.FUSED_ABOVE
    for i in range(3 + steps):  # the first three warm up
        for way, (step, _) in ways.items():
            model.FUSED_ABOVE = 0 if way[0] == "reference" else fused_above
            times[way].append(seconds_of(lambda step=step, i=i: step(i)))
    model.FUSED_ABOVE = fused_above
    peaks, rows = {p: peak(device, p) for p in {p for _, p in ways}}, []
    for (name, precision), (_, net) in ways.items():
        tokens = train.RECIPES["cpu" if name == "reference" else name]["bs"] * net.block_size
        seconds = statistics.median(times[name, precision][3:])
        rows.append(
            {
                "what": "training",
                "way": name,
                "precision": precision,
                "tokens_per_s": tokens / seconds,
                "ms_per_step": 1000 * seconds,
                "tokens_per_step": tokens,
                "peak": peaks[precision],
                "of_peak": operations(net) * tokens / seconds / peaks[precision],
            }
        )
        rows[-1]["times_reference"] = rows[-1]["tokens_per_s"] / rows[0]["tokens_per_s"]
    net, start = ways["reference", "fp32"][1], torch.zeros(1, 1, dtype=torch.int64, device=device)
    for cached in (False, True):
        taken = [seconds_of(lambda c=cached: list(generate(net, start, 63, use_cache=c))) for _ in range(5)]
        rows.append(
            {
                "what": "generation",
                "way": "with cache" if cached else "without cache",
                "precision": "fp32",
                "tokens_per_s": 63 / statistics.median(taken),
            }
        )
    return rows


def whole(text, device, args, out):
    """Rows of three runs from the first step to the last: how long, and to what loss on all of the validation text."""
    plain = SimpleNamespace(precision="fp32", autocast=nullcontext, world=1, device=device)
    fused_above, model.FUSED_ABOVE = model.FUSED_ABOVE, 0
    step, net = reference(text, device)
    iters, began = train.RECIPES["cpu"]["iters"], time.perf_counter()
    for i in range(iters + 1):
        if i % 250 == 0 or i == iters:
            sampled = [train.estimate(net, part, 12, 0, plain) for part in (text.train, text.val)][1]
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
    model.FUSED_ABOVE = fused_above
    for name in ("cpu", "fast"):
        given = [] if args.data_dir is None else ["--data-dir", args.data_dir]
        folder = next(f for n in count(1) if not (f := out / f"{name}-{n}").exists())
        record = train.main(
            ["--recipe", name, "--data", args.data, "--device", str(device), "--out", str(folder), *given]
        )
        final = record["final"]
        lines = [line.split(",") for line in (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()]
        column = {title: i for i, title in enumerate(lines[0])}
        there = (float(row[column["seconds"]]) for row in lines[1:] if float(row[column["val_loss"]]) <= NANOGPT)
        rows.append(
            {
                "what": "whole run",
                "way": name,
                "precision": record["precision"],
                "seconds": final["seconds"],
                "iters": record["args"]["iters"],
                "val_loss": final["val_loss"],
                "sampled_loss": final["sampled_loss"],
                "seconds_to_nanogpt": next(there, None),
            }
        )
    for row in rows:
        row["of_reference"] = row["seconds"] / rows[0]["seconds"]
    return rows


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run.add_flags(
        p,
        "data_dir",
        "device",
        data=dict(type=data.dataset_arg, default="auto", help=data.DATA_HELP),
        limit=dict(help="only the first N tokens of each part (not for --whole)"),
    )
    run.add_flags(p, out=dict(default=str(run.ROOT / "out" / "nanogpt" / "bench"), help="folder for bench.json"))
    p.add_argument("--steps", type=run.positive_int, default=100, help="of each way (default: %(default)s)")
    p.add_argument("--whole", action="store_true", help="train reference, cpu and fast to the end as well")
    return p


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    if args.whole and args.limit:
        p.error("--limit: --whole is about the whole text")
    device, out = run.pick_device(args.device), run.make_folder(args.out)
    text = data.load(args.data, args.data_dir, args.limit)
    facts = run.describe_device(device)
    print(f"{text.name}; {facts['name']}, {facts['threads']} threads")
    rows = speeds(text, device, args.steps)
    for row in rows:
        print(f"{row['what']:<10}  {row['way']:<13}  {row['precision']}  {row['tokens_per_s']:>9,.0f} tokens/s", end="")
        print(
            f", {row['of_peak']:.0%} of the peak, {row['times_reference']:.2f} times the reference"
            if row["what"] == "training"
            else ""
        )
    if args.whole:
        rows += whole(text, device, args, out)
        for row in rows[-3:]:
            print(
                f"{row['what']:<10}  {row['way']:<13}  {row['precision']}  {row['seconds']:>6.1f} s, "
                f"{row['of_reference']:.0%} of the reference, validation loss {row['val_loss']:.4f}"
            )
    git = run.git_state(Path(__file__).parent)
    run.write_json(
        out / "bench.json",
        {
            "bench": "nanogpt",
            "git": git,
            "device": facts,
            "versions": run.versions(),
            "dataset": text.facts(),
            "rows": rows,
        },
    )
    return rows


if __name__ == "__main__":
    run.cli(main)
