"""Write data.csv, with the columns text and split, from WikiText or from text files of your own.

    python distilgpt2/make_data_csv.py                          # WikiText-2, an article a row
    python distilgpt2/make_data_csv.py --fraction 0.1           # a tenth of its training articles, enough for practice
    python distilgpt2/make_data_csv.py --data wikitext103
    python distilgpt2/make_data_csv.py --data notes/ letters.txt

A file that exists is not overwritten. Without WikiText on disk or on the hub it writes the built-in text, and says so.
"""

import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path

from common import run
from common.options import option

import corpus
from data import DATA_HELP, dataset_arg


def without_titles(text: str) -> str:
    """`text` without the lines that are titles of WikiText's articles and sections."""
    return "\n".join(line for line in corpus.lines_of(text) if not (line.startswith("= ") and line.endswith(" =")))


def check_free(path: Path, content: str):
    """Raise UserError if `path` has something else than `content`, which would be lost."""
    if path.is_file() and path.read_bytes() == content.encode(errors="backslashreplace"):
        return
    if path.exists() or path.is_symlink():
        raise run.UserError(f"{path}: exists already; delete it, or name another file with --out")


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    data: tuple[str, ...] = option(
        ("auto",), f"{DATA_HELP}; or several text files and folders", type=dataset_arg, nargs="+", metavar="NAME|PATH"
    )
    data_dir: str | None = run.data_dir_option()
    fraction: float = option(1.0, "share of the training documents", above=0, at_most=1)
    titles: bool = option(True, "WikiText's titles, = Title =")
    out: str = option("data.csv", "the file to write", type=run.path_arg, metavar="FILE")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
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
    written = dict.fromkeys(found.parts, 0)
    for part, documents in found.parts.items():
        for document in documents:
            text = document.text if args.titles else without_titles(document.text)
            if corpus.is_text(text):
                writer.writerow([text, part])
                written[part] += 1
            else:
                empty += 1
    path = Path(args.out)
    run.make_folder(path.absolute().parent)
    check_free(path, table.getvalue())
    run.write(path, table.getvalue())
    counts = ", ".join(f"{count:,} {part}" for part, count in written.items())
    left_out = dict(found.dropped)
    if empty:
        left_out["without text"] = empty
    notes = "".join(f"; {count:,} {reason} left out" for reason, count in left_out.items())
    print(f"{run.display_path(path)}: {counts} documents of {found.name} ({found.form}){notes}")
    if found.name == "builtin":
        print("*** this is the built-in text, which says nothing of WikiText", file=sys.stderr)


if __name__ == "__main__":
    run.cli(main)
