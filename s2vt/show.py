"""Draw clips with their captions: a GIF that moves, and a PNG with the frames in a row.

    python s2vt/show.py                              # six built-in clips, by the newest run on them
    python s2vt/show.py my.mp4 --run out/s2vt/msvd-gru-s0-1
    python s2vt/show.py --backwards                  # the same clips played backwards: the captions must turn around

Writes captions.gif and captions.png into --out, by default below out/. A network with attention also shows which
frames each word looked at.
"""

import io
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common import run
from common.arguments import ScriptOptions, device_option, parse_options, path_arg, threads_option
from common.options import option

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import caption as caption_script
import checkpoint
import extractors
import videos
from decode import MAX_WIDTH, Caption, caption_all
from videos import PARTS

AUTO_THREADS = 1

SIDE = 144  # pixels: of a clip in the GIF
TEXT = 66  # of the text below it
GAP = 8  # between two clips
FRAME_MS, LAST_FRAME_MS = 110, 1100  # how long a frame of the GIF is shown
WORD_HEIGHT = 0.19  # of a row of the attention, in rows of frames


class Shown(NamedTuple):
    """frames: uint8 (T, size, size, 3); right: whether a built-in clip's order is right, None for other videos."""

    frames: np.ndarray
    caption: Caption
    words: list[str]
    right: bool | None


def describe(trained, frames, features, width, events=None) -> Shown:
    """The clip with its caption."""
    (caption,) = caption_all(trained.net, features, width, trained.config["max_words"])
    words = [trained.vocabulary.words[i] for i in caption.words]
    right = None
    if events is not None:
        stated, _, total = videos.judge_order(" ".join(words), events)
        right = stated == total
    return Shown(frames, caption, words, right)


def builtin_clips(trained, first, count, width, backwards):
    """`count` built-in test clips from number `first` on. Raises UserError."""
    if trained.config["extractor"] != "small" or trained.config["dataset"] != "builtin":
        committed = run.display_path(checkpoint.COMMITTED)
        raise run.UserError(
            f"{trained.name}: was not trained on the built-in videos; name a video file, or --run {committed}"
        )
    for clip in videos.draw("test", count, first):
        frames, events = clip.frames, clip.events
        if backwards:
            frames = frames[::-1].copy()
            events = [event._replace(forwards=not event.forwards) for event in events[::-1]]
        yield describe(trained, frames, extractors.extract("small", frames)[None], width, events)


def is_wanted(args, dataset: dict) -> bool:
    """Can a network that was trained on `dataset` describe what `args` asks for?"""
    if args.videos:
        return bool(args.extractor or dataset.get("extractor"))
    return dataset.get("name") == "builtin" and dataset.get("extractor") == "small"


def clips_of_files(args, trained, device):
    """The clips of the video files `args.videos`. Raises UserError."""
    extractor = caption_script.extractor_for(trained, args.extractor)
    files, _ = extractors.find_videos(args.videos)
    for file in files:
        frames, features = caption_script.features_of(file, trained, extractor, device)
        if args.backwards:
            frames = frames[::-1]
            features = features.flip(1)
        yield describe(trained, frames, features, args.beam)


def draw_gif(clips: list[Shown], path: Path):
    """All clips side by side, three in a row, with their captions below; a wrong one is red."""
    length = max(len(clip.frames) for clip in clips)
    # A median cut spends its colours on the dark background, and red objects turn brown.
    images = [
        draw_moment(clips, t, length).quantize(16, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        for t in range(length)
    ]
    durations = [FRAME_MS] * (length - 1) + [LAST_FRAME_MS]
    content = io.BytesIO()
    images[0].save(content, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=True)
    run.write(path, content.getvalue())


def draw_moment(clips: list[Shown], t: int, length: int) -> Image.Image:
    """Image t of the `length` images of the GIF."""
    columns = min(3, len(clips))
    rows = -(-len(clips) // columns)
    width, height = SIDE + GAP, SIDE + TEXT + GAP
    font = ImageFont.load_default(12)
    canvas = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for i, clip in enumerate(clips):
        x = GAP + i % columns * width
        y = GAP + i // columns * height
        frame = Image.fromarray(clip.frames[t * len(clip.frames) // length])
        frame = frame.filter(ImageFilter.MedianFilter(3))  # noise would make the file five times as large
        canvas.paste(frame.resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, y))
        text = "\n".join(textwrap.wrap(" ".join(clip.words), 24)[:4])
        pen.multiline_text((x, y + SIDE + 3), text, colour_of(clip), font, spacing=2)
    return canvas


def colour_of(clip: Shown) -> str:
    return "firebrick" if clip.right is False else "black"


def draw_png(clips: list[Shown], columns: int = 8) -> Figure:
    """Evenly spaced frames of each clip in a row under its caption; with attention, below them a row for each word."""
    heights = []
    for clip in clips:
        heights.append(1)
        if clip.caption.weights is not None:
            heights.append(WORD_HEIGHT * len(clip.words))
    size = (columns * 0.8, 0.72 * sum(heights) + 0.3 * len(clips))
    figure = Figure(figsize=size, layout="constrained")
    panels = iter(np.atleast_1d(figure.subplots(len(heights), 1, height_ratios=heights)))
    for clip in clips:
        draw_frames(next(panels), clip, columns)
        if clip.caption.weights is not None:
            draw_attention(next(panels), clip)
    return figure


def draw_frames(axes, clip: Shown, columns: int):
    """Evenly spaced frames with white borders, and the caption above them."""
    places = np.linspace(0, len(clip.frames) - 1, columns).round().astype(int)
    border = ((1, 1), (1, 1), (0, 0))
    frames = [np.pad(clip.frames[i], border, constant_values=255) for i in places]
    axes.imshow(np.concatenate(frames, 1), interpolation="nearest", aspect="auto")
    title = "\n".join(textwrap.wrap(" ".join(clip.words), 100))
    axes.set_title(run.plain_text(title), fontsize=8.5, color=colour_of(clip))
    axes.axis("off")


def draw_attention(axes, clip: Shown):
    """A row for each word, a column for each frame, dark where the word looked."""
    axes.imshow(clip.caption.weights.cpu().numpy(), aspect="auto", cmap="Blues", interpolation="nearest")
    axes.set_yticks(range(len(clip.words)), [run.plain_text(word) for word in clip.words], fontsize=6.5)
    axes.set_xticks([])


@dataclass(kw_only=True)
class Options(ScriptOptions):
    videos: tuple[str, ...] = option(
        (), "videos (default: built-in test clips)", type=path_arg, positional=True, metavar="VIDEO"
    )
    run: str | None = option(None, checkpoint.HELP, type=path_arg, metavar="RUN")
    first: int | None = option(None, "the first built-in clip (default: 0)", at_least=0, at_most=PARTS["test"] - 1)
    count: int | None = option(None, "built-in clips (default: 6)", above=0)
    backwards: bool = option(False, "play the clips backwards")
    beam: int = option(1, "beam width; attention is drawn for greedy search alone", above=0, at_most=MAX_WIDTH)
    extractor: str | None = option(None, "only if the network does not know its own", choices=extractors.NAMES)
    device: str = device_option()
    threads: int | str = threads_option()
    out: str | None = option(
        None, "folder for the two files (default: the run folder, else out/s2vt)", type=path_arg, metavar="DIR"
    )

    def check(self):
        if self.videos and (self.first is not None or self.count is not None):
            raise run.UserError("--first and --count choose among the built-in clips: leave them out, or name no video")


def main(argv=None):
    args = parse_options(__file__, Options, argv)
    run.set_threads(args.threads, AUTO_THREADS)
    device = run.pick_device(args.device)
    trained = checkpoint.load(args.run, device, lambda dataset: is_wanted(args, dataset))
    print(f"captions by {trained.name}, trained on {trained.config['dataset']}")
    if args.videos:
        clips = list(clips_of_files(args, trained, device))
    else:
        clips = list(builtin_clips(trained, args.first or 0, args.count or 6, args.beam, args.backwards))
    for clip in clips:
        print(" ".join(clip.words) + ("   (the order is WRONG)" if clip.right is False else ""))
    is_run = args.run is not None and Path(args.run).is_dir()
    folder = run.make_folder(args.out or (args.run if is_run else run.ROOT / "out" / "s2vt"))
    draw_gif(clips, folder / "captions.gif")
    run.write_figure(folder / "captions.png", draw_png(clips))
    print(f"captions.gif and captions.png in {run.display_path(folder)}")


if __name__ == "__main__":
    run.cli(main)
