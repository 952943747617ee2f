"""Draw the committed figures of numbers again, each from its committed record alone.

    python tools/redraw.py                          # those whose data are no longer those that were drawn
    python tools/redraw.py lms/figures/rates.png    # these figures, in any case
    python tools/redraw.py --list                   # every figure, with what draws it

Every folder has a line for each of its figures in figures/figures.json. A figure of numbers names a function and the
record that the function draws: {"draw": "sweep.draw", "record": "bn.json"}. This script adds two digests, `data` of
what was drawn and `file` of the image: a new figure is one line and one call. A figure of images, texts or weights
cannot be drawn from numbers: it names the record of the run and the command that drew it.
"""

import argparse
import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.files import write  # noqa: E402
from common.modules import import_from  # noqa: E402

DPI = 110
COLOURS = 128  # of a figure: a third of the size that all colours need
FIGURES = [  # the folders of them
    ROOT / "figures",
    ROOT / "figures" / "gallery",
    *sorted(ROOT.glob("*/figures")),
    *sorted(ROOT.glob("*/*/figures")),
]


def read_lists() -> dict[Path, dict]:
    """{figure: its line in figures.json}"""
    found = {}
    for folder in FIGURES:
        for name, line in json.loads((folder / "figures.json").read_text(encoding="utf-8")).items():
            found[folder / name] = line
    return found


def write_list(folder: Path, lines: dict[str, dict]):
    """figures.json of a folder of figures, a line for each."""
    text = ",\n".join(f" {json.dumps(name)}: {json.dumps(line)}" for name, line in sorted(lines.items()))
    write(folder / "figures.json", "{\n" + text + "\n}\n")


def draw(path: Path, line: dict):
    """The matplotlib figure that a line describes. The one in figures/ is of all folders, without a record."""
    experiment = path.relative_to(ROOT).parts[0]
    module, _, name = line["draw"].rpartition(".")
    function = getattr(import_from(ROOT / ("tools" if experiment == "figures" else experiment), module), name)
    if "record" not in line:
        return function()
    record = path.parent.parent / "results" / line["record"]
    return function(json.loads(record.read_text(encoding="utf-8")))


def png_of(figure, dpi: int = DPI) -> bytes:
    """The figure as a PNG with a palette, which is a third as large."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi)
    content = io.BytesIO()
    Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(content, "PNG", optimize=True)
    return content.getvalue()


# ----------------------------------------------------------------------------------------------- the data of a figure


def all_axes(figure):
    """The axes of a figure, and those that lie within others."""
    for axes in figure.axes:
        yield axes
        yield from axes.child_axes


def data_of(figure) -> list:
    """What a figure shows, without how: titles, labels, scales, and the numbers of every line, bar, area and image."""
    shown = []
    for axes in all_axes(figure):
        texts = [axes.get_title(loc) for loc in ("left", "center", "right")]
        texts += [axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale(), axes.get_yscale()]
        texts += [text.get_text() for text in axes.texts]
        shown.append(texts)
        for line in axes.lines:
            shown += [line.get_label(), numbers(line.get_xydata())]
        for patch in axes.patches:
            shown.append(numbers(patch.get_patch_transform().transform(patch.get_path().vertices)))
        for collection in axes.collections:
            shown.append(numbers(collection.get_offsets()))
            shown += [numbers(path.vertices) for path in collection.get_paths()]
        for image in axes.images:
            shown.append(numbers(image.get_array()))
    return shown


def numbers(values) -> list[str]:
    """Six significant digits, so that the last bits of a processor's arithmetic make no difference; what is nothing
    beside the largest is zero."""
    values = np.ma.filled(np.ma.asarray(values, dtype=float), np.nan).ravel()
    finite = np.abs(values[np.isfinite(values)])
    floor = 1e-9 * finite.max(initial=0)
    return ["0" if abs(value) <= floor else f"{value:.6g}" for value in values]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def digest_of_data(figure) -> str:
    return digest(json.dumps(data_of(figure)).encode())


# --------------------------------------------------------------------------------------------------------------- main


def redraw(path: Path, line: dict, in_any_case: bool) -> bool:
    """Draw one figure if its data or its file are not those of `line`, which is changed. Returns whether it was."""
    figure = draw(path, line)
    data = digest_of_data(figure)
    same = path.exists() and line.get("data") == data and line.get("file") == digest(path.read_bytes())
    if same and not in_any_case:
        return False
    content = png_of(figure)
    write(path, content)
    line |= {"data": data, "file": digest(content)}
    return True


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", type=Path, metavar="FIGURE", help="only these (default: all)")
    parser.add_argument("--list", action="store_true", help="print what draws each figure, and draw nothing")
    args = parser.parse_args(argv)
    lines = read_lists()
    chosen = {path.resolve() for path in args.figures}
    for path in chosen - lines.keys():
        parser.error(f"{path}: is in no figures.json")
    for path in chosen:
        if "draw" not in lines[path]:
            parser.error(f"{path}: is drawn by {lines[path]['command']}")
    for path, line in lines.items():
        name = path.relative_to(ROOT)
        if args.list:
            print(f"{str(name):64} {line.get('draw') or line['command']}")
        elif "draw" in line and (not chosen or path in chosen) and redraw(path, line, path in chosen):
            print(name)
    if not args.list:
        for folder in {path.parent for path in lines}:
            write_list(folder, {path.name: line for path, line in lines.items() if path.parent == folder})


if __name__ == "__main__":
    main()
