"""How long does a training step take? The usual loop and this folder's way, side by side, at the same loss.

    python s2vt/bench.py                        # features and captions of MSVD's size, some minutes
    python s2vt/bench.py --rounds 1 --clips 4   # a quick look

(a) usual: a batch of (clip, caption) pairs, so that the frames of a clip are encoded again for each of its captions,
    and a Python loop with one call of the cell for every frame and every word, all words through the output layer;
(b) ours: each clip once with all its captions, a whole sequence in one call, no output for padding.
Both have the same weights and the same examples, and their losses agree. They take turns, so that a machine that slows
down slows both. The epoch of MSVD (1,450 clips) is estimated from the median step. Writes bench.json into --out.
"""

import statistics
from dataclasses import dataclass

from common import run, timing
from common.options import option

import torch
import torch.nn.functional as F

import data
from model import PAD, S2VT

# of MSVD, as the course has it
CLIPS = 1450
CAPTIONS = 17
FRAMES = 80
FEATURES = 4096
VOCABULARY = 3000
WIDTH = 512  # of the layers and of the vectors of words
CELLS = {"gru": torch.nn.GRUCell, "lstm": torch.nn.LSTMCell}


def make_clips(count: int) -> data.Clips:
    """Random clips of MSVD's size: its numbers of frames, features, captions per clip and words per caption."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 14, (count, CAPTIONS), generator=generator).tolist()
    tokens = [[[*torch.randint(4, VOCABULARY, (n,), generator=generator).tolist(), 2] for n in row] for row in lengths]
    features = torch.randn(count, FRAMES, FEATURES, generator=generator).relu().half()
    return data.Clips([str(i) for i in range(count)], features, [], [], tokens)


def usual_loss(net: S2VT, cells, features, words, targets) -> torch.Tensor:
    """The mean loss of pairs, cell by cell. features: (N, T, F), a row for each caption; words, targets: (N, L)."""
    N, T, _ = features.shape
    states, zero = [None, None], features.new_zeros(N, net.embed)
    x, y = net.frame_embed((features - net.mean) / net.std), net.word_embed(words)
    total = count = 0
    for t in range(T + words.shape[1]):
        states[0] = cells[0](x[:, t] if t < T else zero, states[0])
        lower = states[0][0] if isinstance(states[0], tuple) else states[0]
        states[1] = cells[1](torch.cat([lower, zero if t < T else y[:, t - T]], 1), states[1])
        if t >= T:
            upper = states[1][0] if isinstance(states[1], tuple) else states[1]
            losses = F.cross_entropy(net.head(upper), targets[:, t - T], reduction="none")
            mask = targets[:, t - T] != PAD
            total, count = total + (losses * mask).sum(), count + mask.sum()
    return total / count


def same_cells(net: S2VT, cell: str):
    """Cells that share the parameters of the two layers."""
    made = []
    for layer in (net.layer1, net.layer2):
        one = CELLS[cell](layer.input_size, layer.hidden_size).to(net.mean.device)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(one, name, getattr(layer, f"{name}_l0"))
        made.append(one)
    return made


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    rounds: int = option(3, "steps of each way", above=0)
    clips: int = option(32, "clips per step", above=0, at_most=CLIPS)
    cell: str = option("gru", "recurrent cells", choices=list(CELLS))
    device: str = run.device_option()
    threads: int | str = run.threads_option()
    out: str = option(str(run.ROOT / "out/s2vt/bench"), "folder for bench.json", type=run.path_arg, metavar="DIR")


def measure(args, device) -> tuple[dict, dict]:
    """({way: seconds of each step}, {way: its loss})."""
    clips = make_clips(args.clips)
    torch.manual_seed(0)
    net = S2VT(FEATURES, VOCABULARY, hidden=WIDTH, embed=WIDTH, cell=args.cell, dropout=0.0).to(device)
    cells = same_cells(net, args.cell)
    batch = clips.batch(torch.arange(args.clips), device)
    losses = {}

    def step(name, loss):
        net.zero_grad()
        value = loss()
        value.backward()
        losses[name] = value.item()  # a GPU has finished when its result is here

    def usual(_):
        pairs = batch.features.float()[batch.clip]  # (B, T, F) -> (N, T, F): every caption has its own copy
        step("usual", lambda: usual_loss(net, cells, pairs, batch.words, batch.targets))

    def ours(_):
        step("ours", lambda: net.loss(*batch).mean())

    def ours_bf16(_):
        with torch.autocast(device.type, torch.bfloat16):
            step("ours, bfloat16", lambda: net.loss(*batch).mean())

    ways = {"usual": usual, "ours": ours}
    if run.native_bf16(device):
        ways["ours, bfloat16"] = ours_bf16
    return timing.turns(ways, args.rounds), losses


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    run.set_threads(args.threads)
    device = run.pick_device(args.device)
    out = run.make_folder(args.out)
    machine = run.environment(device, __file__)
    hardware = f"{machine['device']['name']}, {machine['device']['threads']} threads"
    print(f"{args.clips} clips of {FRAMES} x {FEATURES:,} with {CAPTIONS} captions each, {args.cell}; {hardware}")
    seconds, losses = measure(args, device)
    rows = []
    for name, values in seconds.items():
        median = statistics.median(values)
        row = {
            "way": name,
            "cell": args.cell,
            "clips": args.clips,
            "seconds": median,
            "loss": losses[name],
            "epoch_minutes": median * CLIPS / args.clips / 60,
            "values": values,
            "times_usual": 1 / timing.median_ratio(values, seconds["usual"]),
        }
        rows.append(row)
        print(
            f"{name:16} {median:7.2f} s per step   loss {row['loss']:.5f}   {row['times_usual']:.1f} times the usual "
            f"way   an epoch of MSVD: {row['epoch_minutes']:.1f} minutes"
        )
    run.write_json(out / "bench.json", {"bench": "s2vt", **machine, "rows": rows})


if __name__ == "__main__":
    run.cli(main)
