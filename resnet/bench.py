"""How fast is training? The usual way and this folder's, one difference at a time, in turns.

    python resnet/bench.py                         # ResNet-20 on CIFAR-10, batch size 128, a few minutes
    python resnet/bench.py --limit 2000 --rounds 1 # a quick look

usual: torchvision's crop, flip, to-tensor and normalize, image by image, a DataLoader with 0 or 2 workers, float32.
Then batches of tensors instead of the loader; channels last in memory; bfloat16, if the hardware multiplies it.
"ours" has all of these; "step alone" is its training step on batches prepared beforehand, with SGD or with Muon. The
ways take turns, so a machine that slows down slows all of them. Reported are medians over rounds. "of the peak" is the
share of the speed of a matrix product in the same precision. Writes bench.json into --out, and step.json: the share of
each operation in a step of ours.
"""

import statistics
import time
from dataclasses import dataclass

from common import run, timing
from common.options import option
from common.usual import crop_and_flip_transform, usual_loader

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import data
import model
import optim
import train


class Way:
    """A way to train: source of the batches, memory format, precision, and the recipe that names the optimizer."""

    def __init__(self, batches, device, channels_last=False, precision=torch.float32, recipe=None):
        self.batches = batches
        self.device = device
        self.precision = precision
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        torch.manual_seed(0)
        self.net = model.build("resnet20", 10).to(device, memory_format=self.format)
        fused = channels_last and device.type in ("cpu", "cuda")
        sgd = torch.optim.SGD(self.net.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, fused=fused)
        self.optimizers = optim.build_optimizers(self.net, recipe) if recipe else [sgd]

    def images_per_second(self, epoch, max_steps=None):
        """Images per second of an epoch, or of its first `max_steps` steps."""
        images_seen, began = 0, time.perf_counter()
        for step, (images, labels) in enumerate(self.batches(epoch)):
            if step == max_steps:
                break
            images = images.to(self.device, memory_format=self.format)
            labels = labels.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
                loss = F.cross_entropy(self.net(images), labels)
            self.net.zero_grad()
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
            images_seen += len(labels)
        loss.item()  # a GPU has finished when its last result is here
        return images_seen / (time.perf_counter() - began)


def build_ways(dataset, batch_size, device):
    """{name: Way}. The first two are the usual way."""
    resident = dataset.to(device)
    transform = crop_and_flip_transform(dataset.mean, dataset.std, padding=4)

    def loader(workers):
        batches = usual_loader(dataset, transform, batch_size, workers, drop_last=True)
        return lambda epoch: batches

    def tensors(epoch):
        return resident.batches(batch_size, shuffle=(0, epoch), augment="crop+flip")

    prepared, native = list(tensors(0)), run.native_bf16(device)
    best = torch.bfloat16 if native else torch.float32  # as --precision auto of train.py
    ways = {f"usual, {workers} workers": Way(loader(workers), device) for workers in timing.loader_workers()}
    ways["batches of tensors"] = Way(tensors, device)
    if native:
        ways["channels last"] = Way(tensors, device, True)
        ways["bfloat16 without channels last"] = Way(tensors, device, False, best)
    ways["ours"] = Way(tensors, device, True, best)
    ways["ours, step alone"] = Way(lambda epoch: prepared, device, True, best)
    ways["ours, step alone, Muon"] = Way(lambda epoch: prepared, device, True, best, train.RECIPES["fast"])
    return ways


def count_flops(batch):
    """Floating-point operations of a training step on ResNet-20, per image: convolutions and the linear layer, forward
    and backward pass, as torch counts them."""
    net, (images, labels) = model.build("resnet20", 10), batch
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(net(images.cpu()), labels.cpu()).backward()
    return counter.get_total_flops() / len(labels)


OPERATIONS = {
    "convolutions": ("conv",),
    "batch normalization": ("batch_norm", "batchnorm"),
    "ReLU": ("relu", "threshold", "clamp_min"),
    "sums": ("aten::add", "addbackward"),
}


def kind_of(operation: str) -> str:
    """The first of OPERATIONS that has a word of this operation's name."""
    for kind, words in OPERATIONS.items():
        if any(word in operation for word in words):
            return kind
    return "all else"


def shares(way, steps=5):
    """The share of each kind of operation in the time of `steps` steps, measured by torch's profiler."""
    gpu = way.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu) as profiler:
        way.images_per_second(0, steps)
    times = dict.fromkeys([*OPERATIONS, "all else"], 0.0)
    for event in profiler.key_averages():
        times[kind_of(event.key.lower())] += event.self_device_time_total if gpu else event.self_cpu_time_total
    return {kind: time / sum(times.values()) for kind, time in times.items()}


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    data: str = option("auto", "the dataset", choices=["auto", "cifar10", "builtin"])
    data_dir: str | None = run.data_dir_option()
    limit: int | None = option(5000, "images of an epoch", above=0)
    bs: int = option(128, "batch size", above=0)
    rounds: int = option(5, "epochs of each way", above=0)
    device: str = run.device_option()
    threads: int | str = run.threads_option()
    out: str = option(
        str(run.ROOT / "out/resnet/bench"), "folder for bench.json and step.json", type=run.path_arg, metavar="DIR"
    )


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    run.set_threads(args.threads)
    device, out = run.pick_device(args.device), run.make_folder(args.out)
    dataset, _, _, facts = data.load(args.data, args.data_dir, args.limit)
    if len(dataset) < args.bs:
        raise run.UserError(f"--bs {args.bs}: is more than the {len(dataset)} images of an epoch")
    machine = run.environment(device, __file__, argv)
    hardware = f"{machine['device']['name']}, {machine['device']['threads']} threads"
    print(f"ResNet-20 on {len(dataset):,} images of {facts['name']}; {hardware}")
    ways = build_ways(dataset, args.bs, device)
    flops = count_flops(next(ways["batches of tensors"].batches(0)))
    for way in ways.values():
        way.images_per_second(0, max_steps=3)  # a loader's workers start, the allocator grows

    def peak(precision):
        return lambda epoch: timing.matmul_peak(device, precision)

    peaks = {way.precision: peak(way.precision) for way in ways.values()}
    measured = timing.turns({name: way.images_per_second for name, way in ways.items()} | peaks, args.rounds, warmup=0)
    usual, rows = [max(pair) for pair in zip(*list(measured.values())[:2])], []
    for name, way in ways.items():
        values, precision = measured[name], str(way.precision).removeprefix("torch.")
        rows.append(
            {
                "way": name,
                "precision": precision,
                "images_per_s": statistics.median(values),
                "rates": values,
                "times_usual": timing.median_ratio(values, usual),
                "of_peak": timing.median_ratio(values, measured[way.precision]) * flops,
            }
        )
        row = rows[-1]
        print(
            f"{name:<32} {row['images_per_s']:>8,.0f} images/s, {row['times_usual']:.2f} times the usual way, "
            f"{row['of_peak']:.0%} of the peak in {precision}"
        )
    parts = [{"operation": kind, "share": share} for kind, share in shares(ways["ours, step alone"]).items()]
    print("a step of ours: " + ", ".join(f"{part['operation']} {part['share']:.0%}" for part in parts))
    common = {"bench": "resnet", **machine, "dataset": facts, "batch_size": args.bs}
    peak_flops = {str(precision).removeprefix("torch."): statistics.median(measured[precision]) for precision in peaks}
    run.write_json(out / "bench.json", common | {"flops_per_image": flops, "peak_flops": peak_flops, "rows": rows})
    run.write_json(out / "step.json", common | {"rows": parts})
    return rows


if __name__ == "__main__":
    run.cli(main)
