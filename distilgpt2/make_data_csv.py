"""Write data.csv, with the columns text and split, from WikiText or from text files of your own.

    python distilgpt2/make_data_csv.py                          # WikiText-2, an article a row
    python distilgpt2/make_data_csv.py --fraction 0.1           # a tenth of its training articles, enough for practice
    python distilgpt2/make_data_csv.py --data wikitext103
    python distilgpt2/make_data_csv.py --data notes/ letters.txt

Without WikiText on disk or on the hub it writes the built-in text, and says so.
"""

import argparse
import csv
import io
import sys
from pathlib import Path

from common import run

import corpus
import data


def fraction(text: str) -> float:
    """An argparse type: a number above 0 and at most 1."""
    value = run.positive_float(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is above the maximum, 1")
    return value


def without_titles(text: str) -> str:
    """`text` without the lines that are titles of WikiText's articles and sections."""
    return "\n".join(line for line in text.splitlines() if not (line.startswith("= ") and line.endswith(" =")))


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(corpus.DATASETS)
    p.add_argument("--data", type=data.dataset_arg, nargs="+", default=["auto"], metavar="NAME|PATH",
                   help=f"one of {names}, a CSV file, or text files and folders of them (default: auto)")  # fmt: skip
    p.add_argument("--fraction", type=fraction, default=1.0, metavar="X", help="of the training documents (default: 1)")
    p.add_argument("--no-titles", action="store_true", help="leave out WikiText's titles, = Title =")
    run.add_flags(p, "data_dir", out=dict(default="data.csv", metavar="FILE", help="the file to write"))
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    alone = [name for name in args.data if name in corpus.DATASETS or name.lower().endswith(".csv")]
    if alone and len(args.data) > 1:
        raise run.UserError(f"--data {' '.join(args.data)}: name one dataset, one CSV file, or text files and folders")
    if alone:
        found = corpus.load(args.data[0], args.data_dir)
    else:
        found = corpus.read_texts([Path(path) for path in args.data])
    found.parts["train"] = corpus.take_fraction(found.parts["train"], args.fraction)
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["text", "split"])
    empty = 0
    for part, documents in found.parts.items():
        for document in documents:
            text = without_titles(document.text) if args.no_titles else document.text
            writer.writerow([text, part]) if corpus.is_text(text) else None
            empty += not corpus.is_text(text)
    path = Path(args.out)
    run.make_folder(path.absolute().parent)
    run.write(path, table.getvalue())
    counts = ", ".join(f"{len(documents):,} {part}" for part, documents in found.parts.items())
    left_out = found.dropped | ({"without text": empty} if empty else {})
    notes = "".join(f"; {count:,} {reason} left out" for reason, count in left_out.items())
    print(f"{run.display_path(path)}: {counts} documents of {found.name} ({found.form}){notes}")
    if found.name == "builtin":
        print("*** this is the built-in text, which says nothing of WikiText", file=sys.stderr)


if __name__ == "__main__":
    run.cli(main)
