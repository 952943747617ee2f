"""How fast is an epoch of training? The usual way, this folder's way, and the training step alone, side by side.

    python cifar/bench.py                      # LeNet-5 at batch sizes 16 and 128, some minutes
    python cifar/bench.py --limit 5000         # a quick look

(a) usual: PIL images, torchvision's crop, flip, to-tensor and normalize, one by one, DataLoader with 0 or 2 workers;
(b) ours: Cifar.batches, whole batches of tensors;
(c) step alone: forward pass, backward pass and update on batches prepared beforehand, the ceiling;
(d) the same in bfloat16, if the hardware multiplies it: what --precision auto could gain;
(e) the same with the usual memory layout, contiguous, which (a) has too. The other ways have channels_last.
Everything else is the same. They take turns, so that a machine that slows down slows all of them. Reported are medians
of the images per second of whole epochs. Writes bench.json into --out.
"""

import statistics
import time
from dataclasses import dataclass

from common import run, timing
from common.options import option
from common.usual import crop_and_flip_transform, usual_loader

import torch
import torch.nn.functional as F

import data
from model import LeNet5

BF16, CONTIGUOUS = "step alone, bfloat16", "step alone, contiguous"


def epoch_rate(batches, model, optimizer, device, bf16=False):
    """Images per second of one epoch over `batches`."""
    images_seen, began = 0, time.perf_counter()
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(images)[0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        images_seen += len(labels)
    loss.item()  # a GPU has finished when its last result is here
    return images_seen / (time.perf_counter() - began)


def new_network(classes, device, layout):
    """(LeNet-5 with the same initial weights, its optimizer)"""
    torch.manual_seed(0)
    model = LeNet5(classes).to(device, memory_format=layout)
    return model, torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, fused=device.type in ("cpu", "cuda"))


def measure(dataset, batch_size, rounds, device):
    """{way: [images per second of each of `rounds` epochs]}, in turns."""
    dataset = dataset.to(device)
    prepared = list(dataset.batches(batch_size, shuffle=(0, 0), augment="crop+flip"))
    contiguous = [(images.contiguous(), labels) for images, labels in prepared]
    usual, ours = (
        new_network(len(dataset.classes), device, layout) for layout in (torch.contiguous_format, torch.channels_last)
    )
    ways = {}  # way: (batches of an epoch, network, whether in bfloat16)
    for workers in timing.loader_workers():
        transform = crop_and_flip_transform(dataset.mean, dataset.std, data.PADDING)
        loader = usual_loader(dataset, transform, batch_size, workers)
        ways[f"usual, {workers} workers"] = (lambda epoch, loader=loader: loader, usual, False)
    ways["ours"] = (lambda epoch: dataset.batches(batch_size, shuffle=(0, epoch), augment="crop+flip"), ours, False)
    ways["step alone"] = (lambda epoch: prepared, ours, False)
    ways[CONTIGUOUS] = (lambda epoch: contiguous, usual, False)
    if run.native_bf16(device):
        ways[BF16] = (lambda epoch: prepared, ours, True)

    def rate(batches, network, bf16):
        return lambda epoch: epoch_rate(batches(epoch), *network, device, bf16)

    for batches, network in ((prepared, ours), (contiguous, usual)):
        epoch_rate(batches[:50], *network, device)
    return timing.turns({name: rate(*way) for name, way in ways.items()}, rounds, warmup=0)


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    data: str = option("auto", data.DATA_HELP, type=data.dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    limit: int | None = option(None, "only the first N examples of each part", above=0)
    device: str = run.device_option()
    threads: int | str = run.threads_option()
    rounds: int = option(5, "epochs of each way", above=0)
    out: str = option(str(run.ROOT / "out/cifar/bench"), "folder for bench.json", type=run.path_arg, metavar="DIR")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    run.set_threads(args.threads)
    device, out = run.pick_device(args.device), run.make_folder(args.out)
    train_set, _, _, dataset = data.load(args.data, args.data_dir, args.limit)
    machine = run.environment(device, __file__, argv)
    hardware = f"{machine['device']['name']}, {machine['device']['threads']} threads"
    print(f"LeNet-5 on {len(train_set):,} images of {dataset['name']}; {hardware}")
    rows = []
    for batch_size in (16, 128):
        rates = measure(train_set, batch_size, args.rounds, device)
        ceiling, usual = rates["step alone"], [max(pair) for pair in zip(*list(rates.values())[:2])]
        for name, values in rates.items():
            row = {
                "batch_size": batch_size,
                "way": name,
                "images_per_s": statistics.median(values),
                "of_ceiling": timing.median_ratio(values, ceiling),
                "times_usual": timing.median_ratio(values, usual),
                "rates": values,
            }
            rows.append(row)
            ratios = f"{row['of_ceiling']:.0%} of the step alone, {row['times_usual']:.2f} times the usual way"
            print(f"batch size {batch_size:>3}  {name:<21} {row['images_per_s']:>8,.0f} images/s, {ratios}")
    run.write_json(out / "bench.json", {"bench": "cifar", **machine, "dataset": dataset, "rows": rows})
    return rows


if __name__ == "__main__":
    run.cli(main)
