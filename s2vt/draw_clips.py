"""Draw test clips of msvd-clips with what was said of them: the clips are a seeded draw, not a choice.

    python s2vt/draw_clips.py --captions s2vt/results/captions.json --videos YouTubeClips --out s2vt/figures/clips.png

captions.json is what compare.py wrote. Each clip has two frames, a third and two thirds into it.
"""

import io
import textwrap
from dataclasses import dataclass
from pathlib import Path

from common import run
from common.options import option

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from extractors import read_video

FRAME = (112, 84)  # pixels, the widest that a figure of other people's videos needs
CELL = (560, 100)
COLOURS = 96
SAID_BY = {
    "S2VT, GRU, attention": "S2VT with attention",
    "mean of the frames": "mean of the frames",
    "nearest neighbours": "similar clips",
}


def said(record: dict, seed: int, width: int) -> dict[str, list[str]]:
    """{captioner: its captions of all test clips} of the captioners in SAID_BY. Raises UserError."""
    found = {}
    for row in record["rows"]:
        of_network = row.get("seed", seed) == seed and row.get("width", width) == width
        if row["captioner"] in SAID_BY and of_network:
            found[row["captioner"]] = row["captions"]
    for name in SAID_BY.keys() - found.keys():
        raise run.UserError(f"the record holds no captions by {name!r} with seed {seed} and width {width}")
    return {name: found[name] for name in SAID_BY}


def draw_clip(pen, canvas, corner, frames, lines):
    """Two frames with lines (name, caption) to the right of them. corner: of the cell, in pixels."""
    x, y = corner
    for frame in frames:
        canvas.paste(Image.fromarray(frame).resize(FRAME, Image.Resampling.LANCZOS), (x, y))
        x += FRAME[0] + 4
    bold, plain = ImageFont.load_default(11), ImageFont.load_default(12)
    for name, caption in lines:
        pen.text((x + 6, y), name, "#777777", bold)
        text = textwrap.shorten(caption, 48, placeholder=" ...")
        pen.text((x + 6, y + 11), text, "black", plain)
        y += 28


def draw(files: list[Path], lines: list[list[tuple[str, str]]]) -> Image.Image:
    """All clips in two columns."""
    rows = -(-len(files) // 2)
    canvas = Image.new("RGB", (2 * CELL[0], rows * CELL[1]), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (file, of_clip) in enumerate(zip(files, lines)):
        frames = read_video(file, 4, 224)[1:3]
        draw_clip(pen, canvas, (i % 2 * CELL[0] + 8, i // 2 * CELL[1] + 8), frames, of_clip)
    return canvas.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    captions: str = option("", "captions.json of compare.py", type=run.path_arg, metavar="FILE", required=True)
    videos: str = option("", "folder of MSVD's clips", type=run.path_arg, metavar="DIR", required=True)
    out: str = option("", "the PNG file", type=run.path_arg, metavar="FILE", required=True)
    count: int = option(10, "clips", above=0)
    seed: int = option(0, "seed of the draw and of the networks", at_least=0)
    beam: int = option(3, "width of the captions", above=0)


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    record = run.read_json(Path(args.captions))
    if not isinstance(record.get("rows"), list) or "ids" not in record:
        raise run.UserError(f"{args.captions}: is no captions.json of compare.py")
    captions = said(record, args.seed, args.beam)
    count = min(args.count, len(record["ids"]))
    drawn = sorted(np.random.default_rng(args.seed).choice(len(record["ids"]), count, replace=False).tolist())
    files = [Path(args.videos) / record["ids"][i] for i in drawn]
    lines = [[(SAID_BY[name], captions[name][i]) for name in SAID_BY] for i in drawn]
    content = io.BytesIO()
    draw(files, lines).save(content, "PNG", optimize=True)
    run.write(Path(args.out), content.getvalue())
    for i, of_clip in zip(drawn, lines):
        print(f"{record['ids'][i]:28} " + "   ".join(caption for _, caption in of_clip))


if __name__ == "__main__":
    run.cli(main)
