"""Grids of images, and the animation of training."""

import io
from pathlib import Path

from common import run

import numpy as np
import torch
from PIL import Image
from torch import Tensor

COLUMNS = 10
GRID = 80  # images of the grid that is drawn at each evaluation


def wanted_labels(count: int, classes: int) -> Tensor:
    """Labels (count,) of a grid: a column per class, if there are ten."""
    return torch.arange(count) % max(1, classes)


def noise_of(count: int, size: int, seed: int) -> Tensor:
    """Noise (count, size) that is a function of `seed`; it leaves torch's random state as it is."""
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def tile(images: Tensor, columns: int = COLUMNS, gap: int = 2) -> np.ndarray:
    """uint8 (N, C, H, W) to one image (height, width, 3), row by row on a white ground."""
    images = images.cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    n, side, _, _ = images.shape
    rows, cell = -(-n // columns), side + gap
    canvas = np.full((rows * cell + gap, min(n, columns) * cell + gap, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * cell + gap, i % columns * cell + gap
        canvas[y : y + side, x : x + side] = image
    return canvas


def write_png(path: Path, pixels: np.ndarray, scale: int = 1):
    """Write an image, each pixel as `scale` x `scale`."""
    content, image = io.BytesIO(), Image.fromarray(pixels)
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    image.save(content, "PNG", compress_level=1)
    run.write(path, content.getvalue())


def write_gif(path: Path, files: list[Path]):
    """An animation of the images in `files`, which stops at the last; of none there is no file. A file that is damaged
    is a UserError."""
    if not files:
        return
    frames = []
    for file in files:
        try:
            frames.append(Image.open(file).convert("RGB").quantize(64, Image.Quantize.FASTOCTREE))
        except (OSError, SyntaxError, ValueError) as error:
            raise run.UserError(f"{file}: is damaged; remove it to leave it out of the animation") from error
    content, durations = io.BytesIO(), [500] * (len(frames) - 1) + [2500]
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    run.write(path, content.getvalue())
