"""The built-in videos: coloured shapes that move, grow, turn and meet, with captions from a grammar.

    python s2vt/videos.py --out clips      # write six of them as mp4 files, for caption.py, and print their captions

A clip of 16 frames of 32 x 32 pixels shows one event or two. Every event is drawn forwards, and half of them are
then played backwards, with the opposite word in the captions. Each object is visible only during its own event. The
frames of a clip without their order therefore say nothing about left or right, grows or shrinks, first or then.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common import run
from common.options import option

import numpy as np

from extractors import write_video

FRAMES, SIZE = 16, 32
CAPTIONS = 5  # of each clip, at most
PARTS = {"train": 4000, "val": 200, "test": 400, "fresh": 400}  # fresh: a second test, by which nothing was chosen
COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (60, 90, 250),
    "yellow": (240, 220, 40),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "ring", "cross", "bar")
# kind of event: the word of an event that is played forwards, and the word of one that is played backwards
KINDS = {
    "horizontal": ("right", "left"),
    "vertical": ("down", "up"),
    "size": ("grows", "shrinks"),
    "angle": ("clockwise", "counterclockwise"),
    "distance": ("meet", "part"),
}
WORDS = {word: (kind, i == 0) for kind, words in KINDS.items() for i, word in enumerate(words)}  # (kind, forwards)
WORDS |= {
    "bigger": ("size", True),
    "smaller": ("size", False),
    "together": ("distance", True),
    "apart": ("distance", False),
}


class Event(NamedTuple):
    """An event of an object, or of two equal ones that meet or part: the kind of change and its direction."""

    kind: str
    forwards: bool
    colour: str
    shape: str


class Clip(NamedTuple):
    """frames: uint8 (FRAMES, SIZE, SIZE, 3); captions: several that are right; events: in the order of time."""

    frames: np.ndarray
    captions: list[str]
    events: list[Event]


# -------------------------------------------------------------------------------------------------------- the grammar


def phrases(event: Event, an: str) -> list[str]:
    """All sentences for one event; `an` is the article of its objects. The first one is the plainest."""
    one = f"{an} {event.colour} {event.shape}"
    two = f"two {event.colour} {event.shape}" + ("es" if event.shape == "cross" else "s")
    word, opposite = KINDS[event.kind]
    if not event.forwards:
        word, opposite = opposite, word
    if event.kind == "horizontal":
        return [f"{one} moves from {opposite} to {word}", f"{one} moves to the {word}", f"{one} slides to the {word}"]
    if event.kind == "vertical":
        return [f"{one} moves {word}", f"{one} goes {word}", f"{one} slides {word}"]
    if event.kind == "size":
        return [f"{one} {word}", f"{one} gets {'bigger' if event.forwards else 'smaller'}"]
    if event.kind == "angle":
        return [f"{one} turns {word}", f"{one} rotates {word}"]
    if event.forwards:
        return [f"{two} meet", f"{two} come together"]
    return [f"{two} part", f"{two} move apart"]


def captions(events: list[Event], rng: np.random.Generator) -> list[str]:
    """Up to CAPTIONS different sentences; the first one is built from the plainest phrases."""
    found = [" and then ".join(phrases(event, "a")[0] for event in events)]
    for _ in range(100):
        if len(found) == CAPTIONS:
            break
        an, joint = rng.choice(["a", "a", "the"]), rng.choice([" and then ", " and then ", " then "])
        sentences = []
        for event in events:
            choices = phrases(event, an)
            plainest = rng.random() < 0.5
            sentences.append(choices[0 if plainest else rng.integers(len(choices))])
        text = str(joint).join(sentences)
        if text not in found:
            found.append(text)
    return found


def order_words(caption: str) -> list[tuple[str, bool]]:
    """The (kind of event, forwards) that a caption names, in its order: the words that depend on
    frame order. "from left to right" is one of them, right."""
    words = re.sub(r"\bfrom \w+", "", caption).split()
    return [WORDS[word] for word in words if word in WORDS]


def judge_order(caption: str, events: list[Event]) -> tuple[int, int, int]:
    """(right, opposite, all): the facts about order that a caption states, against the events of its clip.

    The facts are the direction of every event, and which event came first if there are several. A fact that the
    caption does not state is neither right nor opposite.
    """
    truth, said = {event.kind: event.forwards for event in events}, order_words(caption)
    right = sum(truth.get(kind) is forwards for kind, forwards in dict(said).items())
    opposite = sum(truth.get(kind) is (not forwards) for kind, forwards in dict(said).items())
    if len(events) == 1:
        return right, opposite, 1
    kinds, sequence = [kind for kind, _ in said], list(truth)
    return right + (kinds == sequence), opposite + (kinds == sequence[::-1]), len(events) + 1


# ------------------------------------------------------------------------------------------------------- the drawing


def draw_object(x, y, radius, angle, shape: str) -> np.ndarray:
    """bool (T, SIZE, SIZE): where the object is in each of T frames. x, y, radius in pixels, angle in radians: (T,)."""
    grid = np.arange(SIZE, dtype=np.float32) + 0.5
    x, y, r, cos, sin = np.float32([x, y, radius, np.cos(angle), np.sin(angle)])[..., None, None]
    dx, dy = grid[None, None, :] - x, grid[None, :, None] - y
    distance = dx**2 + dy**2  # squared
    if shape == "circle":
        return distance < r**2
    if shape == "ring":
        return (distance < (1.3 * r) ** 2) & (distance > (0.8 * r) ** 2)
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    if shape == "bar":
        return (abs(u) < 1.7 * r) & (abs(v) < 0.35 * r)
    return np.minimum(abs(u), abs(v)) + (np.maximum(abs(u), abs(v)) > 1.5 * r) * SIZE < 0.4 * r  # cross


def draw_event(rng: np.random.Generator, event: Event, frames: np.ndarray):
    """Draw the event into its `frames`: int16 (T, SIZE, SIZE, 3)."""
    length = len(frames)
    u = np.linspace(-0.5, 0.5, length) * (1 if event.forwards else -1)
    centre = rng.uniform(12, 20, 2)
    travel = rng.uniform(13, 18)
    radius = rng.uniform(4.5, 6.5)
    angle = rng.choice([0, np.pi / 2]) + np.zeros(length)
    x, y, radius = (value + np.zeros(length) for value in (*centre, radius))
    if event.kind == "horizontal":
        x = x + travel * u
    elif event.kind == "vertical":
        y = y + travel * u
    elif event.kind == "size":
        radius = 6.5 + 8 * u
    elif event.kind == "angle":
        angle = rng.uniform(-0.2, 0.2) + 0.8 * np.pi * u  # from / to - to the other diagonal, or back
    places = [x] if event.kind != "distance" else [x - 0.75 * (9 - 8 * u), x + 0.75 * (9 - 8 * u)]
    for place in places:
        frames[draw_object(place, y, radius, angle, event.shape)] = COLOURS[event.colour]


def draw_clip(seed: tuple[int, ...]) -> Clip:
    """The clip that is a function of `seed`."""
    rng = np.random.default_rng(seed)
    count = rng.choice([1, 2], p=[0.25, 0.75])
    events = []
    for kind in rng.choice(list(KINDS), count, replace=False).tolist():
        colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        shape = "bar" if kind == "angle" else shape  # the turn of a circle cannot be seen
        events.append(Event(kind, bool(rng.random() < 0.5), colour, shape))
    frames = np.full((FRAMES, SIZE, SIZE, 3), rng.integers(40), dtype=np.int16)
    for event, part in zip(events, np.array_split(frames, count)):
        draw_event(rng, event, part)
    frames += rng.integers(-10, 11, frames.shape, dtype=np.int8)
    return Clip(frames.clip(0, 255).astype(np.uint8), captions(events, rng), events)


def draw(part: str, count: int, first: int = 0) -> list[Clip]:
    """The clips first, first + 1, ... of a part of the built-in data, `count` at most."""
    return [draw_clip((list(PARTS).index(part), i)) for i in range(first, min(first + count, PARTS[part]))]


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    out: str = option("clips", "folder for the videos", type=run.path_arg, metavar="DIR")
    count: int = option(6, "videos", above=0)


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    folder = run.make_folder(args.out)
    for i, clip in enumerate(draw("test", args.count)):
        file = Path(folder) / f"clip{i}.mp4"
        write_video(file, clip.frames.repeat(4, 1).repeat(4, 2))
        print(f"{run.display_path(file)}: {clip.captions[0]}")


if __name__ == "__main__":
    run.cli(main)
