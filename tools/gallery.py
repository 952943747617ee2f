"""Draw figures/gallery/*.png, the pictures that open the README: what a committed network makes of one input each.

    python tools/gallery.py                                  # the pictures that need no more than this repository
    python tools/gallery.py resnet s2vt --videos DIR         # DIR: MSVD's clips; two pictures show frames of them

A picture is a demo on one input that was chosen to be looked at; accuracies stand in each folder's README.
"""

import argparse
import io
import json
import sys
import tempfile
import textwrap
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, ImageDraw, ImageFilter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.files import make_folder, write  # noqa: E402
from common.modules import import_from  # noqa: E402
from common.terminal import UserError, cli  # noqa: E402

from redraw import png_of  # noqa: E402

FIGURES = ROOT / "figures" / "gallery"
INCHES = (4.2, 2.3)
DPI = 100
FILLED = {"left": 0.02, "right": 0.98, "bottom": 0.02, "top": 0.9, "wspace": 0.04}  # axes that fill a picture

# a 5 in strokes, in a square of 100 x 100: a bar, a neck and a bowl
STROKES = [[(68, 22), (40, 24)], [(40, 24), (36, 47)], [(36, 47), (52, 42), (66, 52), (66, 68), (52, 80), (33, 75)]]
PHOTOGRAPH = "f9Won2JpOEU_60_80.avi"  # a frame of this clip
CLIP = "u4kMN1jamdM_10_20.avi"
REVIEW = (
    "The plot is thin and the middle drags, but the two leads are wonderful together, and the last scene is the most "
    "moving I have seen in years. A lovely film, and a funny one."
)


def module(folder: str, name: str):
    return import_from(ROOT / folder, name)


def picture() -> Figure:
    return Figure(figsize=INCHES, dpi=DPI)


def show(axes, image, title: str):
    """An image without axes, its title above it."""
    axes.imshow(image, cmap="gray", interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def bars(axes, names: list[str], odds: list[float]):
    """The likeliest classes of an input, with their probabilities."""
    axes.barh(range(len(names)), odds, color="#2a6fb0")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xticks=(0, 1))
    axes.set_xticklabels(("0", "100%"), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


# ------------------------------------------------------------------------------------------------------- the pictures


def draw_digit(size: int = 280) -> Image.Image:
    """A digit in ink on grey paper, as a camera might see it."""
    rng = np.random.default_rng(0)
    paper = np.linspace(205, 165, size)[None, :] + rng.normal(0, 4, (size, size))
    ink = Image.new("L", (size, size), 0)
    pen = ImageDraw.Draw(ink)
    for stroke in STROKES:
        points = [(x * size / 100, y * size / 100) for x, y in smooth(stroke)]
        pen.line(points, 255, size // 18, "curve")
    covered = np.asarray(ink.filter(ImageFilter.GaussianBlur(1.5))) / 255
    return Image.fromarray((paper * (1 - covered) + 45 * covered).clip(0, 255).astype(np.uint8))


def smooth(points: list[tuple[float, float]], rounds: int = 3) -> list[tuple[float, float]]:
    """The points with corners cut, `rounds` times (Chaikin 1974)."""
    for _ in range(rounds):
        between = []
        for (ax, ay), (bx, by) in zip(points, points[1:]):
            between += [(0.75 * ax + 0.25 * bx, 0.75 * ay + 0.25 * by), (0.25 * ax + 0.75 * bx, 0.25 * ay + 0.75 * by)]
        points = [points[0], *between, points[-1]]
    return points


def simplenn(args) -> Figure:
    """A digit that was drawn, what the network saw, and its answer."""
    predict = module("simplenn", "predict")
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        file = Path(folder, "digit.png")
        drawn = draw_digit()
        drawn.save(file)
        weights = str(ROOT / "simplenn/weights/cnn.safetensors")
        ((_, seen, answer),) = predict.main([str(file), "--run", weights, "--out", folder])
    figure = picture()
    left, right = figure.subplots(1, 2, gridspec_kw=FILLED)
    show(left, drawn, "a drawing")
    show(right, seen, f"it reads: {answer}")
    return figure


def resnet(args) -> Figure:
    """A photograph as the network saw it, and the likeliest classes."""
    trained, images = module("resnet", "trained"), module("resnet", "predict")
    network = trained.load(trained.COMMITTED)
    photograph = middle_frames(args.videos, PHOTOGRAPH)[0]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "photo.png")
        photograph.save(file)
        seen = images.pixels(file, network)  # uint8 (3, 32, 32)
    odds = trained.probabilities(network, seen[None])[0]
    likeliest = odds.argsort(descending=True)[:3].tolist()
    figure = picture()
    left = figure.add_axes((0.01, 0.05, 0.35, 0.83))
    middle = figure.add_axes((0.37, 0.05, 0.29, 0.83))
    right = figure.add_axes((0.855, 0.3, 0.11, 0.4))
    photograph.thumbnail((112, 112))
    show(left, photograph, "a photograph")
    show(middle, seen.permute(1, 2, 0).numpy(), "32 x 32 pixels")
    bars(right, [network.classes[i] for i in likeliest], odds[likeliest].tolist())
    return figure


def lstm_imdb(args) -> Figure:
    """A review, each word in the colour of what it pushes the verdict to."""
    saved, predict = module("lstm_imdb", "saved"), module("lstm_imdb", "predict")
    network = saved.open_model(str(saved.COMMITTED))
    (answer,) = predict.explain(network, [REVIEW])
    figure = picture()
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.96), xlim=(0, 46), ylim=(6.6, -1.4))
    axes.axis("off")
    x, line = 0, 0.6
    for word, shade in zip(answer.words, predict.shades(answer.push)):
        if x + len(word) > 46:
            x, line = 0, line + 1.15
        colour = predict.background(shade)
        axes.fill_between((x - 0.2, x + len(word) + 0.2), line - 0.4, line + 0.4, color=colour, lw=0)
        axes.text(x, line, word, family="monospace", fontsize=8.6, va="center")
        x += len(word) + 1
    axes.text(0, -0.8, predict.title_of(network, answer), fontsize=10, weight="bold", va="center")
    return figure


def nanogpt(args) -> Figure:
    """Lines that the committed model writes."""
    checkpoint, sampling, sample = (module("nanogpt", name) for name in ("checkpoint", "sampling", "sample"))
    model, tokenizer = checkpoint.load(sample.COMMITTED[sample.DEFAULT])
    prompt = "ROMEO:\n"
    generator = torch.Generator().manual_seed(4)
    ids = torch.tensor([tokenizer.encode(prompt)])
    written = tokenizer.decode(list(sampling.generate(model, ids, 420, temperature=0.7, generator=generator)))
    lines = [short for line in (prompt + written).splitlines() for short in textwrap.wrap(line, 50) or [""]]
    figure = picture()
    axes = figure.add_axes((0.03, 0.02, 0.96, 0.96))
    axes.axis("off")
    axes.text(0, 1, "\n".join(lines[:11]), family="monospace", fontsize=8.6, va="top", linespacing=1.3)
    return figure


def gan(args) -> Figure:
    """Images that the committed generator draws: five lines of ten, of the ten digits."""
    trained, sample, grids = (module("gan", name) for name in ("trained", "sample", "grids"))
    device = torch.device("cpu")
    network = trained.open_committed(trained.DEFAULT, device)
    noise = grids.noise_of(50, network.args.noise, seed=0)
    labels = torch.arange(50) % network.facts["classes"]
    figure = picture()
    axes = figure.subplots(gridspec_kw=FILLED | {"top": 0.98})
    axes.imshow(grids.tile(sample.draw(network, noise, labels, "ema", device), 10))
    axes.axis("off")
    return figure


def s2vt(args) -> Figure:
    """Three frames of a test clip, and what the network says of it, from the record of all captions."""
    record = json.loads((ROOT / "s2vt/results/captions.json").read_text(encoding="utf-8"))
    (row,) = (
        row
        for row in record["rows"]
        if (row["captioner"], row.get("seed"), row.get("width")) == ("S2VT, GRU, attention", 0, 3)
    )
    caption = row["captions"][record["ids"].index(CLIP)]
    figure = picture()
    for axes, frame in zip(
        figure.subplots(1, 3, gridspec_kw=FILLED | {"bottom": 0.28, "top": 0.97}), middle_frames(args.videos, CLIP, 3)
    ):
        frame.thumbnail((112, 112))
        show(axes, frame, "")
    figure.add_artist(Line2D((0.02, 0.98), (0.25, 0.25), color="#bbbbbb", lw=0.8))
    figure.text(0.5, 0.12, f"“{caption}”", ha="center", va="center", fontsize=12, style="italic")
    return figure


def middle_frames(videos: Path | None, name: str, count: int = 1) -> list[Image.Image]:
    """`count` frames of a clip of MSVD, evenly spaced, without its first and last. Raises UserError."""
    if videos is None:
        raise UserError("this picture shows a frame of MSVD's clips: name their folder, --videos DIR")
    if not (videos / name).is_file():
        raise UserError(f"{videos / name}: is missing")
    frames = module("s2vt", "extractors").read_video(videos / name, count + 2, 224)[1:-1]
    return [Image.fromarray(frame) for frame in frames]


PICTURES = {draw.__name__: draw for draw in (simplenn, resnet, lstm_imdb, nanogpt, gan, s2vt)}
FROM_VIDEOS = {"resnet", "s2vt"}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="*", help=f"of {', '.join(PICTURES)} (default: all that can be drawn)")
    parser.add_argument("--videos", type=Path, metavar="DIR", help="folder of MSVD's clips, YouTubeClips")
    parser.add_argument("--out", type=Path, metavar="DIR", default=FIGURES, help="folder of the pictures")
    args = parser.parse_args(argv)
    unknown = set(args.folder) - PICTURES.keys()
    if unknown:
        parser.error(f"no picture of {', '.join(sorted(unknown))}; there are {', '.join(PICTURES)}")
    chosen = args.folder or [name for name in PICTURES if args.videos or name not in FROM_VIDEOS]
    out = make_folder(args.out)
    torch.set_num_threads(1)
    for name in chosen:
        write(out / f"{name}.png", png_of(PICTURES[name](args), DPI))
        print(out / f"{name}.png")


if __name__ == "__main__":
    cli(main)
