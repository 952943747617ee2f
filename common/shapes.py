"""Built-in images: ten shapes on a noisy ground, drawn in about a second, without any download."""

import numpy as np

SHAPES = ["disk", "ring", "square", "frame", "cross", "plus", "bars", "columns", "triangle", "checks"]
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (40, 80, 220),
    "yellow": (230, 220, 50),
    "cyan": (50, 210, 220),
    "magenta": (210, 50, 200),
    "orange": (240, 140, 30),
    "white": (245, 245, 245),
    "black": (10, 10, 10),
    "brown": (120, 75, 40),
}


def draw_builtin(channels: int = 3, size: int = 32, by_colour: bool = False) -> tuple[list, list[str]]:
    """Shapes on a noisy ground, drawn in about a second: 5,000 + 1,000 images of shape (channels, size, size).

    The classes are ten shapes in random colours; with `by_colour` (three channels), ten shapes in ten colours.
    """
    parts = []
    rng = np.random.default_rng(0)
    classes = SHAPES
    if by_colour:
        classes = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]
    for n in (5000, 1000):
        labels = np.arange(n) % len(classes)
        mask = draw_shapes(rng, labels // 10 if by_colour else labels, size)[:, None]  # (n, 1, size, size)
        if by_colour:
            colour = np.array(list(COLOURS.values()))[labels % 10][:, :, None, None]  # (n, 3, 1, 1)
            ground = rng.uniform(60, 190, (n, 3, 1, 1))
        else:
            colour, ground = rng.uniform(130, 250, (n, channels, 1, 1)), rng.uniform(0, 120, (n, channels, 1, 1))
        images = np.where(mask, colour, ground) + rng.normal(0, 25, (n, channels, size, size))
        parts.append((images.clip(0, 255).astype(np.uint8), labels))
    return parts, classes


def draw_shapes(rng: np.random.Generator, shapes: np.ndarray, size: int) -> np.ndarray:
    """A mask for every shape (indices into SHAPES), of random place and radius: bool (N, size, size)."""
    n = len(shapes)
    centre, radius = rng.uniform(0.4, 0.6, (n, 2, 1, 1)) * size, rng.uniform(0.25, 0.38, (n, 1, 1)) * size
    y = (np.arange(size).reshape(1, -1, 1) - centre[:, 0]) / radius  # (n, size, 1)
    x = (np.arange(size).reshape(1, 1, -1) - centre[:, 1]) / radius  # (n, 1, size)
    far, square = np.maximum(abs(y), abs(x)), y**2 + x**2  # (n, size, size)
    inside = far < 1
    masks = [
        square < 1,
        (square < 1) & (square > 0.4),
        inside,
        inside & (far > 0.6),
        inside & (abs(abs(y) - abs(x)) < 0.35),
        inside & (np.minimum(abs(y), abs(x)) < 0.3),
        inside & (np.sin(8 * y) > 0),
        inside & (np.sin(8 * x) > 0),
        inside & (2 * abs(x) < y + 1),
        inside & (np.sin(5 * y) * np.sin(5 * x) > 0),
    ]
    return np.select([(shapes == i)[:, None, None] for i in range(10)], masks)
