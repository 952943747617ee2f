"""How fast is training? The usual way and this folder's, step by step, in turns.

    python resnet/bench.py                         # ResNet-20 on CIFAR-10, batch size 128, a few minutes
    python resnet/bench.py --limit 2000 --rounds 1 # a quick look

usual: torchvision's crop, flip, to-tensor and normalize, picture by picture, a DataLoader with 0 or 2 workers, float32;
then batches of tensors instead of the loader, channels last in memory, bfloat16 (which is ours), and last the step
alone on batches prepared beforehand. Every round measures each of them once, so that a machine that slows down slows
all; medians over rounds. "of the peak" is the share of the speed of a plain matrix product in the same precision.
Writes bench.json into --out, and step.json: how the time of a step of ours divides among its operations.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import data
import model
import run


class Usual(torch.utils.data.Dataset):
    """A PIL picture and a label at a time, through torchvision's transforms."""

    def __init__(self, dataset):
        try:
            from torchvision import transforms
        except ImportError:
            raise run.UserError("bench.py compares with torchvision: pip install -r requirements.txt") from None
        self.pictures = [Image.fromarray(i) for i in dataset.images.permute(0, 2, 3, 1).numpy()]
        self.labels = dataset.labels.tolist()
        mean, std = (dataset.mean.flatten() / 255).tolist(), (dataset.std.flatten() / 255).tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(self.pictures[i]), self.labels[i]


class Way:
    """One way to train: where batches come from, memory format, precision."""

    def __init__(self, name, batches, device, channels_last=False, precision=torch.float32):
        self.name, self.batches, self.device, self.precision = name, batches, device, precision
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        torch.manual_seed(0)
        self.net = model.build("resnet20", 10).to(device, memory_format=self.format)
        fused = channels_last and device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, fused=fused)

    def rate(self, epoch, most=None):
        """Images per second of an epoch, or of its first `most` steps."""
        seen, began = 0, time.perf_counter()
        for step, (images, labels) in enumerate(self.batches(epoch)):
            if step == most:
                break
            images = images.to(self.device, memory_format=self.format)
            labels = labels.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
                loss = F.cross_entropy(self.net(images), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            seen += len(labels)
        loss.item()  # a GPU has finished when its last result is here
        return seen / (time.perf_counter() - began)


def peak(precision, device, size=2048, repeats=5):
    """Floating-point operations per second of a product of two square matrices, the best of `repeats`."""
    a, b = (torch.randn(size, size, device=device).to(precision) for _ in range(2))
    best = 0.0
    for _ in range(repeats + 1):
        began = time.perf_counter()
        (a @ b)[0, 0].item()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def operations(batch):
    """Floating-point operations of a training step on ResNet-20, an image: convolutions and the linear layer, forward
    and backward, as torch counts them."""
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


def shares(way, steps=5):
    """Of the time of `steps` steps of one way to train, the share of every kind of operation, by torch's profiler."""
    gpu = way.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu) as profiler:
        way.rate(0, most=steps)
    found = dict.fromkeys([*OPERATIONS, "all else"], 0.0)
    for event in profiler.key_averages():
        name = event.key.lower()
        kind = next((kind for kind, words in OPERATIONS.items() if any(word in name for word in words)), "all else")
        found[kind] += event.self_device_time_total if gpu else event.self_cpu_time_total
    return {kind: time / sum(found.values()) for kind, time in found.items()}


def ways(dataset, batch_size, device):
    """All that are to be compared; the first two are the usual way."""
    resident = dataset.to(device)

    def loader(workers):
        made = DataLoader(
            Usual(dataset),
            batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        return lambda epoch: made

    def tensors(epoch):
        return resident.batches(batch_size, shuffle=(0, epoch), augment="crop+flip")

    prepared = list(tensors(0))
    return [
        Way("usual, 0 workers", loader(0), device),
        Way("usual, 2 workers", loader(2), device),
        Way("batches of tensors", tensors, device),
        Way("channels last", tensors, device, True),
        Way("bfloat16 without channels last", tensors, device, False, torch.bfloat16),
        Way("ours", tensors, device, True, torch.bfloat16),
        Way("ours, step alone", lambda epoch: prepared, device, True, torch.bfloat16),
    ]


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run.add_flags(
        p,
        "data_dir",
        "device",
        data=dict(type=data.dataset_arg, default="auto", help="cifar10, builtin or auto"),
        bs=dict(default=128),
        limit=dict(default=5000, help="images of an epoch"),
        out=dict(default=str(run.ROOT / "out" / "resnet" / "bench"), help="folder for bench.json"),
    )
    p.add_argument("--rounds", type=run.positive_int, default=5, help="epochs of each way (default: %(default)s)")
    return p


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    if (data.family_of_data(args.data) or "cifar") != "cifar":
        p.error(f"--data {args.data}: the comparison is on CIFAR-10's pictures")
    device, out = run.pick_device(args.device), run.make_folder(args.out)
    dataset = data.load(args.data, args.data_dir, args.limit)[0]
    if len(dataset) < args.bs:
        p.error(f"--bs {args.bs}: is more than the {len(dataset)} pictures of an epoch")
    facts = run.describe_device(device)
    print(f"ResNet-20 on {len(dataset):,} images of {dataset.name}; {facts['name']}, {facts['threads']} threads")
    all_ways, rates = ways(dataset, args.bs, device), {}
    flops = operations(next(all_ways[2].batches(0)))
    for way in all_ways:
        way.rate(0, most=3)  # a loader's workers start, the allocator grows
    peaks = {torch.float32: [], torch.bfloat16: []}
    for epoch in range(args.rounds):
        for way in all_ways:
            rates.setdefault(way.name, []).append(way.rate(epoch))
        for precision, found in peaks.items():
            found.append(peak(precision, device))
    usual, rows = [max(pair) for pair in zip(*(rates[way.name] for way in all_ways[:2]))], []
    for way in all_ways:
        values = rates[way.name]
        rows.append(
            {
                "way": way.name,
                "precision": str(way.precision).removeprefix("torch."),
                "images_per_s": statistics.median(values),
                "rates": values,
                "times_usual": statistics.median(np.divide(values, usual)),
                "of_peak": statistics.median(np.divide(values, peaks[way.precision])) * flops,
            }
        )
        row = rows[-1]
        print(
            f"{way.name:<32} {row['images_per_s']:>8,.0f} images/s, {row['times_usual']:.2f} times the usual way, "
            f"{row['of_peak']:.0%} of the peak in {row['precision']}"
        )
    common = {
        "bench": "resnet",
        "git": run.git_state(Path(__file__).parent),
        "device": facts,
        "versions": run.versions(),
        "dataset": dataset.facts() | {"train": len(dataset)},
        "batch_size": args.bs,
    }
    run.write_json(
        out / "bench.json",
        common
        | {
            "flops_per_image": flops,
            "peak_flops": {str(k).removeprefix("torch."): statistics.median(v) for k, v in peaks.items()},
            "rows": rows,
        },
    )
    parts = [{"operation": kind, "share": share} for kind, share in shares(all_ways[-1]).items()]
    run.write_json(out / "step.json", common | {"rows": parts})
    print("a step of ours: " + ", ".join(f"{part['operation']} {part['share']:.0%}" for part in parts))
    return rows


if __name__ == "__main__":
    run.cli(main)
