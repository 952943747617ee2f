"""Render the results tables in Markdown files from the committed records.

    python tools/ledger.py            # rewrite every table that differs from its records
    python tools/ledger.py --check    # only name the files that differ, and exit with 1

It reads every Markdown file at the top and in the folders of the experiments. A comment describes the table that
stands between it and the closing comment:

    <!-- ledger
    records: results/lenet.json
    rows: setting
    columns: Setting = setting; Test accuracy = final.test_accuracy .2%; Runs = runs
    -->
    <!-- /ledger -->

records: files or globs, relative to the Markdown file; each is a run.json, the {"rows": [...]} of a sweep or bench, or
committed weights, whose header has the facts.
rows: the keys that group the runs; every combination of their values is a row. "where: KEY = VALUE" or
"where: KEY != VALUE" selects runs.
columns: "Title = key format"; dots in a key reach into nested values, and `runs` is the number of runs.
"Title = key median format" has the median of the runs, "Title = key count" in how many of them the key is true.
against: optional, a value of the last key of rows, which names the row that others are compared with; or "the row
above". "Title = key difference format" is the mean difference between runs with the same seed, and its 95% interval
(Student's t over the seeds); "Title = key p format" is the p value of a two-sided Mann-Whitney test.
names: "OLD = NEW; OLD = NEW", optional: what the first column shows for values of old records.
Several runs are shown as mean ± standard deviation. A run that diverged, or whose loss is above 1000, is counted as
diverged and left out of the mean. A mark shows rows from uncommitted code, and rows on built-in data.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.records import recorded_args, recorded_metrics  # noqa: E402

TABLE = re.compile(r"<!-- ledger\n(.*?)-->\n(.*?)<!-- /ledger -->", re.DOTALL)
MARKS = {
    "†": "from a folder that differed from its commit when the run began",
    "‡": "on built-in data, which says nothing about the real dataset",
}


def read_records(folder, patterns):
    rows = []
    for pattern in patterns.split():
        files = sorted(folder.glob(pattern))
        if not files:
            raise SystemExit(f"ledger: {folder / pattern}: no such record")
        for file in files:
            weights = file.suffix == ".safetensors"
            record = read_header(file) if weights else json.loads(file.read_text(encoding="utf-8"))
            common = {k: v for k, v in record.items() if k != "rows"}
            rows += [with_todays_names(common | row) for row in record.get("rows", [{}])]
    return rows


def read_header(file):
    """The facts in the header of a safetensors file, which is JSON behind its length in 8 bytes."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return json.loads(header["__metadata__"]["facts"])


def with_todays_names(row):
    """The row of a record with its arguments and metrics under today's names."""
    row = recorded_metrics(row)
    for key, renamed in (("args", recorded_args), ("final", recorded_metrics)):
        if isinstance(row.get(key), dict):
            row[key] = renamed(row[key])
    return row


def look_up(record, key):
    for part in key.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


def has_exploded(key, value):
    """Is it NaN, or a loss that no network has which still learns?"""
    limit = 1e3 if "loss" in key or "bits" in key else 1e9
    return isinstance(value, float) and not value < limit


def seed_of(run):
    """The seed of a row of a study, or of the run.json of a single run."""
    return run["seed"] if "seed" in run else run["args"]["seed"]


def by_seed(runs, key):
    """{seed: value} of the runs that have a value and did not diverge."""
    values = {seed_of(run): look_up(run, key) for run in runs}
    return {seed: value for seed, value in values.items() if value is not None and not has_exploded(key, value)}


def difference(runs, others, key, form):
    """The mean difference between runs and others with the same seed, and its 95% interval; "" below two seeds."""
    from scipy.stats import t

    ours = by_seed(runs, key)
    theirs = by_seed(others, key)
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if len(differences) < 2:
        return ""
    mean = statistics.mean(differences)
    standard_error = statistics.stdev(differences) / len(differences) ** 0.5
    half = t.ppf(0.975, len(differences) - 1) * standard_error
    return f"{mean:+{form}} ({mean - half:+{form}} to {mean + half:+{form}})"


def p_value(runs, others, key, form):
    from scipy.stats import mannwhitneyu

    ours = list(by_seed(runs, key).values())
    theirs = list(by_seed(others, key).values())
    return format(mannwhitneyu(ours, theirs).pvalue, form)


def cell(runs, others, key, summary, form):
    """The text of a cell. summary: "median", "count", "difference" or "p", or None for mean ± standard deviation.
    others: the runs that these are compared with, None if they are the same or there are none."""
    if key == "runs":
        return str(len(runs))
    if summary in COMPARISONS:
        return COMPARISONS[summary](runs, others, key, form) if others else ""
    values = [look_up(run, key) for run in runs]
    if summary == "count":
        return str(values.count(True))
    exploded = [key.startswith("final.") and has_exploded(key, value) for value in values]
    diverged = sum(run.get("state") == "diverged" or bad for run, bad in zip(runs, exploded))
    values = [value for value, bad in zip(values, exploded) if value is not None and not bad]
    if not values:
        return "diverged" if diverged == len(runs) else ""
    if isinstance(values[0], str | bool) or not form:
        return ", ".join(dict.fromkeys(str(value) for value in values))
    if summary == "median":
        return format(statistics.median(values), form)
    text = format(statistics.mean(values), form)
    if len(set(values)) > 1:
        text += f" ± {format(statistics.stdev(values), form)}"
    return text + (f" ({diverged} of {len(runs)} diverged)" if diverged else "")


COMPARISONS = {"difference": difference, "p": p_value}


def other_row(groups, values, against):
    """The runs of the row whose last value is `against`; None for this row itself, and if there is no such row."""
    base = (*values[:-1], against)
    return groups.get(base) if base != values else None


def mark(runs):
    dirty = any(not isinstance(run.get("git"), dict) or run["git"]["dirty"] for run in runs)
    builtin = any(look_up(run, "dataset.builtin") for run in runs)
    marks = ""
    if dirty:
        marks += " †"
    if builtin:
        marks += " ‡"
    return marks


def table(folder, spec):
    """The Markdown table that the text `spec` of a comment describes."""
    fields = dict(line.split(":", 1) for line in spec.strip().splitlines())
    rows = read_records(folder, fields["records"])
    if "where" in fields:
        key, sign, value = re.fullmatch(r"\s*(\S+) (!?=) (.+?)\s*", fields["where"]).groups()
        rows = [row for row in rows if (str(look_up(row, key)) == value) == (sign == "=")]
    names = dict(pair.strip().split(" = ") for pair in fields["names"].split(";")) if "names" in fields else {}
    groups = {}
    for row in rows:
        groups.setdefault(tuple(str(look_up(row, key)) for key in fields["rows"].split()), []).append(row)
    against = fields["against"].strip() if "against" in fields else None
    if against not in (None, "the row above", *(values[-1] for values in groups)):
        raise SystemExit(f"ledger: against: {against}: no such row in {fields['records'].strip()}")
    column = re.compile(r"(.+?) = (\S+)(?: (median|count|difference|p))? ?(\S*)")
    columns = [column.fullmatch(part.strip()).groups() for part in fields["columns"].split(";")]
    numbers = [bool(form or summary) or key == "runs" for _, key, summary, form in columns]
    lines = ["| " + " | ".join(title for title, *_ in columns) + " |"]
    lines.append("|" + "|".join("---:" if number else "---" for number in numbers) + "|")
    above = None
    for values, runs in groups.items():
        others = above if against == "the row above" else other_row(groups, values, against)
        above = runs
        first, *rest = (cell(runs, others, *how) for _, *how in columns)
        lines.append("| " + " | ".join([names.get(first, first) + mark(runs), *rest]) + " |")
    lines += [f"\n{sign} {why}." for sign, why in MARKS.items() if any(sign in line for line in lines)]
    return "\n".join(lines) + "\n"


def render(file):
    """The text of a Markdown file, with every table as its records have it."""
    text = file.read_text(encoding="utf-8")
    return TABLE.sub(lambda m: f"<!-- ledger\n{m[1]}-->\n{table(file.parent, m[1])}<!-- /ledger -->", text)


def markdown_files(root=ROOT):
    """Every Markdown file at the top and in the experiments' folders, packages inside a folder included."""
    folders = (script.parent for script in root.glob("*/train.py"))
    return sorted([*root.glob("*.md"), *(file for folder in folders for file in folder.rglob("*.md"))])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only name the files that differ, and exit with 1")
    check = parser.parse_args(argv).check
    stale = 0
    for file in markdown_files():
        new = render(file)
        if new != file.read_text(encoding="utf-8"):
            stale += 1
            print(f"{file.relative_to(ROOT)}: {'differs from its records' if check else 'rendered'}")
            if not check:
                file.write_text(new, encoding="utf-8", newline="\n")
    return int(stale > 0 and check)


if __name__ == "__main__":
    sys.exit(main())
