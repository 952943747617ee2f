"""The tables of a run: metrics.csv, and the losses of the steps that led to an explosion."""

import csv
import io
from pathlib import Path

from common.files import append, write
from common.terminal import UserError


def append_row(file: Path, row: dict, names: bool):
    """Append `row` to a CSV file, below a line of its names if `names`. Raises UserError."""
    append(file, csv_text([row], names))


def write_rows(file: Path, rows: list[dict]):
    """Write `rows` below a line of their names. Raises UserError."""
    write(file, csv_text(rows, names=True))


def csv_text(rows: list[dict], names: bool) -> str:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(rows[0]))
    if names:
        writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def read_rows(file: Path, count: int, cut: bool) -> list[dict]:
    """The first `count` rows of a metrics.csv, as numbers. cut: drop the rows after them from the file. Raises
    UserError."""
    try:
        if not file.is_file():
            raise ValueError("not a regular file")
        with open(file, newline="", encoding="utf-8") as lines:
            table = list(csv.reader(lines))
        header, *values = table[: count + 1] if count and table else [[]]
        rows = [{k: float(v) for k, v in zip(header, row, strict=True)} for row in values]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file}: is damaged; remove it to lose the curves, or start a new run") from error
    if cut:
        write(file, "".join(",".join(row) + "\r\n" for row in [header, *values] if row))
    return rows
