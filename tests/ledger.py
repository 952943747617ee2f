"""Render the results tables of the READMEs from the committed records.

    python tests/ledger.py            # rewrite every table that differs from its records
    python tests/ledger.py --check    # only say which do, and exit with 1

A README says what it wants in a comment, and the table stands between that comment and the next:

    <!-- ledger
    records: results/lenet.json
    rows: setting
    columns: Setting = setting; Test accuracy = final.test_accuracy .2%; Runs = runs
    -->
    <!-- /ledger -->

records: files or globs beside the README, each a run.json or {"rows": [...]} of a sweep or bench. rows: the keys whose
values, in order of appearance, make the rows; "where: KEY = VALUE" keeps some. columns: Title = key format, a key with
dots for what is nested, or `runs`. Numbers of several runs become mean ± standard deviation. A row with a record from a
folder that differed from its commit is marked, so is one on built-in data; diverged runs are counted.
"""

import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"<!-- ledger\n(.*?)-->\n(.*?)<!-- /ledger -->", re.DOTALL)
MARKS = {
    "†": "from a folder that differed from its commit when the run began",
    "‡": "on built-in data: it says nothing of the real dataset",
}


def read_records(folder, patterns):
    rows = []
    for pattern in patterns.split():
        files = sorted(folder.glob(pattern))
        if not files:
            raise SystemExit(f"ledger: {folder / pattern}: no such record")
        for file in files:
            record = json.loads(file.read_text(encoding="utf-8"))
            common = {k: v for k, v in record.items() if k != "rows"}
            rows += [common | row for row in record.get("rows", [{}])]
    return rows


def look_up(record, key):
    for part in key.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


def cell(runs, key, form):
    if key == "runs":
        return str(len(runs))
    values = [look_up(run, key) for run in runs]
    there = [v for v in values if v is not None]
    if not there:
        return "diverged" if all(run.get("state") == "diverged" for run in runs) else ""
    if isinstance(there[0], str | bool) or not form:
        return ", ".join(dict.fromkeys(str(v) for v in there))
    if form.endswith("f") and statistics.mean(there) > 1e9:  # a loss that has exploded
        form = ".0e"
    text = format(statistics.mean(there), form)
    if len(set(there)) > 1:
        text += f" ± {format(statistics.stdev(there), form)}"
    lost = sum(run.get("state") == "diverged" for run in runs)
    return text + (f" ({lost} of {len(runs)} diverged)" if lost else "")


def mark(runs):
    dirty = any(not isinstance(run.get("git"), dict) or run["git"]["dirty"] for run in runs)
    builtin = any(look_up(run, "dataset.builtin") for run in runs)
    return " †" * dirty + " ‡" * builtin


def table(folder, spec):
    """The Markdown table that the text `spec` of a comment asks for."""
    wants = dict(line.split(":", 1) for line in spec.strip().splitlines())
    rows = read_records(folder, wants["records"])
    if "where" in wants:
        key, value = (part.strip() for part in wants["where"].split("="))
        rows = [row for row in rows if str(look_up(row, key)) == value]
    groups = {}
    for row in rows:
        groups.setdefault(tuple(str(look_up(row, key)) for key in wants["rows"].split()), []).append(row)
    columns = [re.fullmatch(r"(.+?) = (\S+) ?(\S*)", part.strip()).groups() for part in wants["columns"].split(";")]
    lines = ["| " + " | ".join(title for title, _, _ in columns) + " |"]
    lines.append("|" + "|".join("---:" if form or key == "runs" else "---" for _, key, form in columns) + "|")
    for runs in groups.values():
        first, *rest = (cell(runs, key, form) for _, key, form in columns)
        lines.append("| " + " | ".join([first + mark(runs), *rest]) + " |")
    lines += [f"\n{sign} {why}." for sign, why in MARKS.items() if any(sign in line for line in lines)]
    return "\n".join(lines) + "\n"


def render(readme):
    """The text of the file `readme` with every table as its records have it."""
    text = readme.read_text(encoding="utf-8")
    return TABLE.sub(lambda m: f"<!-- ledger\n{m[1]}-->\n{table(readme.parent, m[1])}<!-- /ledger -->", text)


def main(argv):
    stale = 0
    for readme in [ROOT / "README.md", *sorted(ROOT.glob("*/README.md"))]:
        new = render(readme)
        if new != readme.read_text(encoding="utf-8"):
            stale += 1
            print(f"{readme.relative_to(ROOT)}: {'differs from its records' if '--check' in argv else 'rendered'}")
            if "--check" not in argv:
                readme.write_text(new, encoding="utf-8")
    return int(stale > 0 and "--check" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
