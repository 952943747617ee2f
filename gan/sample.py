"""Images from a trained generator: grids, files, paths between two noises, classes, and the nearest training images.

    python gan/sample.py                                   # of the newest finished run, else of the committed model
    python gan/sample.py RUN --kind images --count 1000    # 1,000 PNG files
    python gan/sample.py --out_dir RUN --kind neighbours   # is it memorizing its training images?

Kinds: grid; images; interpolation, from one noise to another in ten steps; classes, one per row (ACGAN); neighbours,
each sample beside the training images that are nearest to it. Default: all that apply, but no images, and no neighbours
of a committed generator, whose training images may not be here.
"""

from dataclasses import dataclass
from pathlib import Path

from common import run
from common.options import option

import torch
from torch import Tensor

import data
import fid
import grids
from data import dataset_arg
from trained import RunOptions, data_of, open_run

AUTO_THREADS = 1  # a few images gain nothing from more

KINDS = ("grid", "images", "interpolation", "classes", "neighbours")
KIND_HELP = f"any of {', '.join(KINDS)} (default: see above)"
OUT_HELP = "folder to write to (default: the run folder, else out/gan/NAME)"


def spherical(a: Tensor, b: Tensor, steps: int) -> Tensor:
    """Noise (steps, D) on the way from `a` to `b` (D,), along a great circle. A straight line would pass through
    noise that is shorter than any the generator has seen (White 2016)."""
    angle = torch.acos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
    t = torch.linspace(0, 1, steps)[:, None]
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle).clamp(min=1e-6)


@torch.no_grad()
def draw(trained, noise: Tensor, labels: Tensor, weights: str, device) -> Tensor:
    """uint8 (N, C, 32, 32)"""
    net = getattr(trained.gan, weights)
    parts = []
    for z, y in zip(noise.split(250), labels.split(250)):
        parts.append(data.to_uint8(net(z.to(device), y.to(device))).cpu())
    return torch.cat(parts)


def interpolation(trained, args, device, rows=8, steps=10):
    """A row a pair of noises, with one label."""
    ends = grids.noise_of(2 * rows, trained.args.noise, args.seed)
    noise = torch.cat([spherical(a, b, steps) for a, b in zip(ends[::2], ends[1::2])])
    labels = (torch.arange(rows) % trained.facts["classes"]).repeat_interleave(steps)
    return grids.tile(draw(trained, noise, labels, args.weights, device), steps)


def classes(trained, args, device, columns=10):
    """One row per class, and the same noise in each column."""
    count = trained.facts["classes"]
    noise = grids.noise_of(columns, trained.args.noise, args.seed).repeat(count, 1)
    labels = torch.arange(count).repeat_interleave(columns)
    return grids.tile(draw(trained, noise, labels, args.weights, device), columns)


def nearest(images: Tensor, real: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """(distances (N, k), indices (N, k)): the `k` nearest of `real` to each of `images`, both uint8 (N, C, H, W), by
    the root mean square of the differences of pixels."""
    x = images.flatten(1).float() - 127.5
    values, index = [], []  # of the nearest ones in each chunk of `real`
    for i, chunk in enumerate(real.split(5000)):
        distances = torch.cdist(x, chunk.flatten(1).float() - 127.5)  # (N, 5000), by a product of matrices: rounded
        smallest, where = distances.topk(min(k, len(chunk)), largest=False)
        values.append(smallest)
        index.append(where + 5000 * i)
    where = torch.cat(values, 1).topk(k, largest=False).indices
    index = torch.cat(index, 1).gather(1, where)  # (N, k)
    differences = images[:, None].float() - real[index].float()  # (N, k, C, H, W)
    distances, order = differences.flatten(2).square().mean(2).sqrt().sort()
    return distances, index.gather(1, order)


def neighbours(trained, args, device, rows=8, k=5):
    """Samples, each with its nearest training images; two of them in a row. And in a line, how near they are."""
    train_set, _, test_set = data_of(trained, args.data_dir, args.data)
    real = train_set.images
    samples, _ = fid.generate(trained.gan, 200, args.seed + 3, device, args.weights)
    samples = samples.cpu()
    k = min(k, len(real))
    distances, index = nearest(samples, real, k)
    usual = nearest(test_set.images[:200], real)[0].median().item()
    if usual > 0:
        ratio = distances[:, 0].median().item() / usual
        print(f"the nearest training image is {ratio:.2f} times as far from a sample as from a test image (medians)")
        print("a generator that has memorized its training images is near 0")
    else:
        print("most test images are copies of training images, and say nothing of how far others are")
    shown = [torch.cat([samples[i : i + 1], real[index[i]]]) for i in range(min(2 * rows, len(samples)))]
    return grids.tile(torch.cat(shown), 2 * (k + 1))


def default_kinds(trained) -> list[str]:
    kinds = ["grid", "interpolation"]
    if trained.gan.generator.classes:
        kinds.append("classes")
    if trained.gan.discriminator:
        kinds.append("neighbours")
    return kinds


def remove_older(folder: Path, count: int):
    """Remove the images of an earlier call from number `count` on, which would be measured with the new ones."""
    for file in folder.glob("[0-9]*.png"):
        if file.stem.isdecimal() and int(file.stem) >= count:
            file.unlink()


@dataclass(kw_only=True)
class Options(RunOptions):
    kind: tuple[str, ...] = option((), KIND_HELP, choices=list(KINDS), nargs="+", metavar="KIND")
    count: int = option(80, "how many images, for grid and images", above=0, at_most=1_000_000)
    data: str | None = option(None, "folder of the images now", type=dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    seed: int = option(0, "seed of the noise", at_least=0)
    device: str = run.device_option()
    threads: int | str = run.threads_option()
    out: str | None = option(None, OUT_HELP, type=run.path_arg, metavar="DIR")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    run.set_threads(args.threads, AUTO_THREADS)
    device = run.pick_device(args.device)
    trained = open_run(args, device)
    conditional = trained.gan.generator.classes > 0
    kinds = args.kind or default_kinds(trained)
    if "classes" in kinds and not conditional:
        raise run.UserError(f"--kind classes: {trained.args.model} is not class-conditional; train --model acgan")
    out = run.make_folder(args.out or trained.folder)
    for kind in kinds:
        file = out / f"{kind}.png"
        if kind in ("grid", "images"):
            images = fid.generate(trained.gan, args.count, args.seed, device, args.weights)[0].cpu()
            if kind == "images":
                file = run.make_folder(out / "images")
                remove_older(file, args.count)
                for i, image in enumerate(images):
                    grids.write_png(file / f"{i:05d}.png", grids.tile(image[None], gap=0))
            else:
                grids.write_png(file, grids.tile(images), scale=2)
        else:
            make = {"interpolation": interpolation, "classes": classes, "neighbours": neighbours}[kind]
            grids.write_png(file, make(trained, args, device), scale=2)
        print(f"{kind}: {run.display_path(Path(file))}")


if __name__ == "__main__":
    run.cli(main)
