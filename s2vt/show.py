"""Draw clips with their captions: a GIF that moves, and a PNG with the frames in a row.

    python s2vt/show.py                              # six built-in test clips, by the newest run or the committed one
    python s2vt/show.py my.mp4 --run out/s2vt/msvd-gru-s0-1
    python s2vt/show.py --backwards                  # the same clips played backwards: the captions must turn around

Writes captions.gif and captions.png into --out. A network with attention also shows which frames each word looked at.
"""

import argparse
import io
import textwrap
from pathlib import Path
from typing import NamedTuple

from common import run

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import caption as caption_script
import checkpoint
import extractors
import videos
from decode import Caption, caption_all

AUTO_THREADS = 1

SIDE, TEXT, GAP = 144, 66, 8  # pixels: of a clip in the GIF, of the text below it, between two clips


class Shown(NamedTuple):
    """frames: uint8 (T, size, size, 3); right: whether a built-in clip's order is right, None for other videos."""

    frames: np.ndarray
    caption: Caption
    words: list[str]
    right: bool | None


def describe(trained, frames, features, width, events=None) -> Shown:
    """The clip with its caption."""
    found = caption_all(trained.model, features, width, trained.config["max_words"])
    words, right = [trained.vocabulary.words[i] for i in found[0].words], None
    if events is not None:
        stated, _, total = videos.judge_order(" ".join(words), events)
        right = stated == total
    return Shown(frames, found[0], words, right)


def builtin_clips(trained, first, count, width, backwards):
    """`count` built-in test clips from number `first` on. Raises UserError."""
    if trained.config["extractor"] != "small" or trained.config["dataset"] != "builtin":
        raise run.UserError(f"{trained.name}: was not trained on the built-in videos; name a video file, or "
                            f"--run {run.display_path(checkpoint.COMMITTED)}")  # fmt: skip
    for clip in videos.draw("test", count, first):
        frames, events = clip.frames, clip.events
        if backwards:
            frames = frames[::-1].copy()
            events = [event._replace(forwards=not event.forwards) for event in events[::-1]]
        yield describe(trained, frames, extractors.extract("small", frames)[None], width, events)


def draw_gif(shown: list[Shown], path: Path):
    """All clips side by side, three in a row, with their captions below; a wrong one is red."""
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    cell, font, images = (SIDE + GAP, SIDE + TEXT + GAP), ImageFont.load_default(12), []
    length = max(len(one.frames) for one in shown)
    for t in range(length):
        canvas = Image.new("RGB", (columns * cell[0] + GAP, rows * cell[1] + GAP), "white")
        pen = ImageDraw.Draw(canvas)
        for i, one in enumerate(shown):
            x, y = GAP + i % columns * cell[0], GAP + i // columns * cell[1]
            frame = Image.fromarray(one.frames[min(t * len(one.frames) // length, len(one.frames) - 1)])
            frame = frame.filter(ImageFilter.MedianFilter(3))  # noise would make the file five times as large
            canvas.paste(frame.resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, y))
            text = "\n".join(textwrap.wrap(" ".join(one.words), 24)[:4])
            pen.multiline_text((x, y + SIDE + 3), text, "firebrick" if one.right is False else "black", font, spacing=2)
        # A median cut spends its colours on the dark background, and red objects turn brown.
        images.append(canvas.quantize(16, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE))
    durations = [110] * (length - 1) + [1100]
    content = io.BytesIO()
    images[0].save(content, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=True)
    run.write(path, content.getvalue())


def draw_png(shown: list[Shown], columns: int = 8) -> Figure:
    """Evenly spaced frames of each clip in a row under its caption; with attention, below them a row for each word."""
    heights = [h for one in shown for h in (1, *([0.19 * len(one.words)] if one.caption.weights is not None else []))]
    figure = Figure(figsize=(columns * 0.8, 0.72 * sum(heights) + 0.3 * len(shown)), layout="constrained")
    panels = iter(np.atleast_1d(figure.subplots(len(heights), 1, height_ratios=heights)))
    for one in shown:
        axes, T = next(panels), len(one.frames)
        places = np.linspace(0, T - 1, columns).round().astype(int)
        axes.imshow(np.concatenate([np.pad(one.frames[i], ((1, 1), (1, 1), (0, 0)), constant_values=255)
                                    for i in places], 1), interpolation="nearest", aspect="auto")  # fmt: skip
        axes.set_title(data_text(one.words), fontsize=8.5, color="firebrick" if one.right is False else "black")
        axes.axis("off")
        if one.caption.weights is not None:
            axes = next(panels)
            axes.imshow(one.caption.weights.cpu().numpy(), aspect="auto", cmap="Blues", interpolation="nearest")
            axes.set_yticks(range(len(one.words)), [run.plain_text(w) for w in one.words], fontsize=6.5)
            axes.set_xticks([])
    return figure


def data_text(words: list[str]) -> str:
    return run.plain_text("\n".join(textwrap.wrap(" ".join(words), 100)))


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "videos", nargs="*", type=run.path_arg, metavar="VIDEO", help="videos (default: built-in test clips)"
    )
    p.add_argument("--run", type=run.path_arg, metavar="RUN", help=checkpoint.HELP)
    p.add_argument("--first", type=run.nonnegative_int, metavar="N", help="the first built-in clip (default: 0)")
    p.add_argument("--count", type=run.positive_int, metavar="N", help="built-in clips (default: 6)")
    p.add_argument("--backwards", action="store_true", help="play the clips backwards")
    p.add_argument("--beam", type=run.positive_int, default=1, metavar="N",
                   help="beam width; attention is drawn for greedy search alone (default: %(default)s)")  # fmt: skip
    p.add_argument("--extractor", choices=extractors.NAMES, help="only if the network does not know its own")
    run.add_flags(
        p, "device", "threads", out=dict(help="folder for the two files (default: the run folder, else this one)")
    )
    return p


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    if args.videos and (args.first, args.count) != (None, None):
        p.error("--first and --count choose among the built-in clips: leave them out, or name no video")
    first, count = args.first or 0, args.count or 6
    if first >= videos.PARTS["test"]:
        p.error(f"--first {first}: there are {videos.PARTS['test']} clips")
    run.set_threads(args.threads, AUTO_THREADS)
    device = run.pick_device(args.device)
    trained = checkpoint.open_model(args.run, device)
    print(f"captions by {trained.name}, trained on {trained.config['dataset']}")
    if args.videos:
        extractor = caption_script.extractor_for(trained, args.extractor)
        files, _ = caption_script.find_videos(args.videos)
        shown = []
        for file in files:
            frames, features = caption_script.features_of(file, trained, extractor, device)
            if args.backwards:
                frames, features = frames[::-1], features.flip(1)
            shown.append(describe(trained, frames, features, args.beam))
    else:
        shown = list(builtin_clips(trained, first, count, args.beam, args.backwards))
    for one in shown:
        print(" ".join(one.words) + ("   (the order is WRONG)" if one.right is False else ""))
    folder = run.make_folder(args.out or (args.run if args.run and Path(args.run).is_dir() else "."))
    draw_gif(shown, folder / "captions.gif")
    run.write_figure(folder / "captions.png", draw_png(shown))
    print(f"captions.gif and captions.png in {run.display_path(folder)}")


if __name__ == "__main__":
    run.cli(main)
