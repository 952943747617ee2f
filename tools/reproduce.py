"""Print the commands behind a committed record; with --run, run them again and judge the result.

    python tools/reproduce.py cifar/results/command.json                       # one run
    python tools/reproduce.py cifar/results/lenet.json                         # every run of a study
    python tools/reproduce.py cifar/results/lenet.json --setting defaults --seed 1 --run
    python tools/reproduce.py resnet/results/mnist.json --row 0 --run --head   # with today's code

--run trains in a worktree of the record's commit, or of HEAD with --head. Where versions, threads, device name and
native_bf16 are as in the record, all metrics must be equal. Else, if the setting has three seeds or more, each
metric must lie in the 99% prediction interval of the recorded seeds (Student's t). Else the difference is printed.
Seconds and rates are not judged. A study whose script trains all its networks runs as a whole.
"""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.records import read_json, recorded_args, recorded_metrics  # noqa: E402
from common.study import last_line  # noqa: E402
from common.terminal import UserError, cli, printable  # noqa: E402

KEYS = ("study", "setting", "bs", "epoch", "seed")  # keys that tell the rows of a record apart
KINDS = {  # of the fields of a row; each may be null, too
    "args": dict,
    "final": dict,
    "git": dict,
    "device": dict,
    "command": list,
    "wall_s": int | float,
    "script": str,
}
SPEED = re.compile("second|_per_s$|^times_")  # metrics that depend on the machine

# This runs in the tree whose code is asked. It finds the shortest command line of a script, FOLDER/train.py say, that
# gives the arguments on standard input, and prints {"argv": [...], "differ": {name: [recorded, parsed]}}.
PROBE = """
import contextlib, importlib, io, json, sys
sys.path.insert(0, sys.argv[1])
train = importlib.import_module(sys.argv[2])

wanted, flags, groups = json.load(sys.stdin), {}, []
if hasattr(train, "Options"):
    from common.options import as_dict, make_parser
    parser = make_parser(train.Options)
else:  # before every option was a field of a dataclass
    as_dict, parser = vars, train.parser()
for action in parser._actions:
    flags.setdefault(action.dest, action)
for name in sorted(wanted, key=lambda name: name not in ("model", "recipe", "data")):
    action, value = flags.get(name), wanted[name]
    if action is None:
        pairs = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        groups += [["--set", f"{k}={json.dumps(v)}"] for k, v in pairs.items()]
    elif action.nargs == 0 and isinstance(value, bool):
        groups += [[word] for word in action.option_strings if word.startswith("--no-") != bool(value)]
    elif action.nargs != 0 and value is not None:
        groups.append([action.option_strings[0], *map(str, value if isinstance(value, list) else [value])])

def differ(groups):
    # {name: [recorded, parsed]}, or None for words that this version does not take
    argv = [word for group in groups for word in group]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            args = train.parse(argv) if hasattr(train, "parse") else train.parser().parse_args(argv)
    except SystemExit:
        return None
    values = json.loads(json.dumps(as_dict(args)))
    return {k: [v, values.get(k)] for k, v in wanted.items() if values.get(k) != v and not same(k, v, values.get(k))}

def same(name, before, now):
    # off is off; what computes in float64 on the CPU has no flags for device and precision
    return all(v is None or v is False for v in (before, now)) or name in ("device", "precision") and name not in flags

kept = []
for group in [*groups, *groups]:  # twice: some fit only beside others
    if group not in kept and differ([*kept, group]) is not None:
        kept.append(group)
for group in list(kept):
    if differ([other for other in kept if other is not group]) == differ(kept):
        kept.remove(group)
print(json.dumps({"argv": [word for group in kept for word in group], "differ": differ(kept)}))
"""


def read_rows(path: Path) -> list[dict]:
    """The runs in a record: itself, or the rows of a study, validated. Raises UserError."""
    record = read_json(path)
    common = {key: value for key, value in record.items() if key != "rows"}
    rows = record.get("rows", [{}])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: is not a record: its rows are not a list of objects")
    rows = [common | row for row in rows]
    for i, row in enumerate(rows):
        if wrong := not_valid(row):
            raise UserError(f"{path}: is not a record of runs: row {i} has an invalid {wrong}")
    return rows


def not_valid(row: dict) -> str | None:
    """The first field of a row that no record of this repository has like this; None if there is none."""
    for name, kind in KINDS.items():
        if row.get(name) is not None and not isinstance(row[name], kind):
            return name
    if commit_of(row) is not None and not re.fullmatch("[0-9a-f]{7,64}", str(commit_of(row))):
        return "git.commit"
    if not re.fullmatch(r"\w+(\.py)?", row.get("script") or "train.py"):
        return "script"
    words = row.get("command") or []
    if not all(isinstance(word, str) for word in words):
        return "command"
    if words and (Path(words[0]).is_absolute() or ".." in Path(words[0]).parts):
        return "command"  # only scripts of the repository are run
    return None


def command(tree: Path, script: str, args: dict) -> tuple[list[str], dict]:
    """The command line of FOLDER/NAME.py, `script`, in `tree` that gives `args`; {name: [recorded, parsed]} if they
    differ."""
    path = tree / script
    words = [sys.executable, "-c", PROBE, str(path.parent), path.stem]
    done = subprocess.run(words, input=json.dumps(args), capture_output=True, text=True, cwd=tree)
    if done.returncode:
        why = (done.stderr.strip() or "it ended").splitlines()[-1]
        raise UserError(f"{script} of that commit cannot be asked for its command ({why})")
    answer = json.loads(done.stdout.splitlines()[-1])
    if answer["differ"] is None:
        raise UserError(f"{script} of that commit takes none of the arguments on record")
    return answer["argv"], answer["differ"]


def title(row: dict) -> str:
    return printable(f"{row['setting']}, seed {row.get('seed', 0)}") if "setting" in row else "the run"


def by_script(rows: list[dict]) -> tuple[list[dict], list[list[dict]]]:
    """The rows that train.py made one by one; those that a script made together, and whose command is on record."""
    scripts = {}
    for row in rows:
        if row.get("command"):
            scripts.setdefault((commit_of(row), *row["command"]), []).append(row)
    return [row for row in rows if not row.get("command")], list(scripts.values())


def same_setting(a: dict, b: dict) -> bool:
    return all(a.get(name) == b.get(name) for name in KEYS if name != "seed")


def commit_of(row: dict) -> str | None:
    return (row.get("git") or {}).get("commit")


def worktree(commit: str, folder: Path) -> Path:
    """A worktree of `commit` in `folder`. Raises UserError if the clone does not have it."""
    git = ["git", "-C", str(ROOT)]
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        raise UserError(f"{ROOT}: needs git and a clone of the repository")
    if subprocess.run([*git, "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True).returncode:
        raise UserError(f"commit {commit[:12]} is not in this clone; fetch the whole history, or use --head")
    words = [*git, "worktree", "add", "--detach", "--force", str(folder), commit]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{folder}: git makes no worktree: {last_line(done.stderr)}")
    return folder


def train(row: dict, tree: Path, words: list[str], out: Path, data_dir: str | None):
    """Run the Python script and arguments `words` in `tree`, into the folder `out`, with the threads of the record."""
    data = data_dir or os.environ.get("DATA_DIR") or str(ROOT / "data")
    threads = (row.get("device") or {}).get("threads", 1)  # the studies train one run per core
    words = [sys.executable, str(tree / words[0]), *words[1:], "--out", str(out)]
    environment = os.environ | {"DATA_DIR": str(Path(data).resolve()), "OMP_NUM_THREADS": str(threads)}
    if subprocess.run(words, env=environment, stdout=subprocess.DEVNULL, cwd=tree).returncode:
        raise UserError(f"the command failed: {shlex.join(words)}")


def why_not_run(group: list[dict], args) -> str | None:
    """Why there is nothing to run again and judge for the rows of a script, if so; else None."""
    if "repository" in group[0]:
        return f"a script of {group[0]['repository']}"
    if group[0]["command"][-1] == "report":
        return "the command collects runs that others trained; with --list it prints the commands of all of them"
    if not any(scores(row) for row in group):
        return "the record has no final metrics but seconds and rates"
    return None if args.head or commit_of(group[0]) else "the record has no commit"


def judge_script(group: list[dict], every: list[dict], tree: Path, out: Path, data_dir: str | None) -> bool:
    """Run the script that made the rows `group`, and compare its rows with these. Returns whether all agree."""
    agree = True
    train(group[0], tree, group[0]["command"], out, data_dir)
    found = [row for file in sorted(out.rglob("*.json")) for row in read_rows(file)]
    for row in group:
        match = [new for new in found if all(new.get(name) == row.get(name) for name in KEYS)]
        if not match:
            print(f"  {title(row)}: the script made no such row")
            agree = False
            continue
        print(f"  {title(row)}")
        agree &= judge(row, match[0], [other for other in every if same_setting(other, row)])
    return agree


def scores(row: dict) -> dict:
    """The final metrics that are numbers, without seconds and rates."""
    final = recorded_metrics(row.get("final") or {})
    return {k: v for k, v in final.items() if isinstance(v, int | float) and not SPEED.search(k)}


def same_machine(row: dict, new: dict) -> bool:
    """Do both records name the same versions, threads, device and native bfloat16?"""

    def facts(record):
        device = record.get("device") or {}
        return [record.get("versions"), *(device.get(name) for name in ("name", "threads", "native_bf16"))]

    return None not in facts(row) and facts(row) == facts(new)


def judge(row: dict, new: dict, seeds: list[dict]) -> bool:
    """Compare the metrics of the recorded run, the new one and the recorded seeds of the setting; print each. Returns
    whether all agree."""
    exact = same_machine(row, new)
    agree = True
    after = scores(new)
    for name, before in scores(row).items():
        if name not in after:
            print(f"  {printable(name)}: is missing in the new run")
            agree = False
            continue
        values = [scores(seed)[name] for seed in seeds if name in scores(seed)]
        if exact:
            equal = after[name] == before or math.isnan(after[name]) and math.isnan(before)
            verdict = "equal" if equal else "DIFFERENT on the same machine and versions"
        elif len(values) >= 3:
            low, high = prediction_interval(values)
            rounded = low == high and math.isclose(after[name], before, rel_tol=1e-9)  # does not depend on the seed
            inside = low <= after[name] <= high or rounded
            verdict = f"{'inside' if inside else 'OUTSIDE'} [{low:.4g}, {high:.4g}]"
        else:
            verdict = f"difference {after[name] - before:+.3g}"
        agree &= not verdict.startswith(("DIFFERENT", "OUTSIDE"))
        print(f"  {printable(name):24} recorded {before:<12.6g} now {after[name]:<12.6g} {verdict}")
    return agree


def prediction_interval(values: list[float], level: float = 0.99) -> tuple[float, float]:
    """The interval in which one more value of the same normal distribution lies with probability `level`."""
    from scipy.stats import t

    n = len(values)
    half = t.ppf((1 + level) / 2, n - 1) * statistics.stdev(values) * math.sqrt(1 + 1 / n)
    return statistics.mean(values) - half, statistics.mean(values) + half


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("record", type=Path, help="FOLDER/results/NAME.json")
    p.add_argument("--row", type=int, metavar="N", help="the run number N of a study, from 0")
    p.add_argument("--setting", metavar="NAME", help="the runs of this setting of a study")
    p.add_argument("--seed", type=int, metavar="N", help="the runs with this seed")
    p.add_argument("--run", action="store_true", help="run the commands and judge the results")
    p.add_argument("--head", action="store_true", help="use today's code, not the code of the record's commit")
    p.add_argument("--data-dir", metavar="DIR", help="folder of the datasets (default: $DATA_DIR, else data/)")
    return p


def chosen(rows, args):
    if args.row is not None and not 0 <= args.row < len(rows):
        raise UserError(f"{args.record}: has rows 0 to {len(rows) - 1}, not {args.row}")
    rows = rows if args.row is None else [rows[args.row]]
    rows = [row for row in rows if args.setting in (None, row.get("setting"))]
    rows = [row for row in rows if args.seed in (None, row.get("seed", (row.get("args") or {}).get("seed")))]
    if not rows:
        raise UserError(f"{args.record}: has no such run")
    return rows


def folder_of(record: Path) -> str:
    """The experiment to which the file `record` belongs: FOLDER/results/NAME.json, or deeper in FOLDER."""
    parents = record.resolve().parents
    for path in parents:
        if (path / "train.py").exists():
            return path.name
    return parents[min(1, len(parents) - 1)].name


def main(argv=None):
    args = parser().parse_args(argv)
    every = read_rows(args.record)
    folder = folder_of(args.record)
    single, scripts = by_script(chosen(every, args))
    agree = True
    if args.run:
        seconds = sum(row.get("wall_s") or 0 for row in [*single, *(group[0] for group in scripts)])
        print(f"commands: {len(single) + len(scripts)}; minutes on record: {seconds / 60:.0f}")
    with tempfile.TemporaryDirectory() as scratch:
        trees = {"HEAD": ROOT} if args.head and not args.run else {}

        def tree_of(row):
            commit = "HEAD" if args.head else commit_of(row)
            if commit not in trees:
                trees[commit] = worktree(commit, Path(scratch) / f"tree{len(trees)}")
            return trees[commit]

        try:
            for i, group in enumerate(scripts):
                name = title(group[0]) if len(group) == 1 else f"{len(group)} rows"
                print(f"{name}: python {printable(shlex.join(group[0]['command']))}")
                if args.run and (why := why_not_run(group, args)):
                    print(f"  not run: {why}")
                elif args.run:
                    agree &= judge_script(group, every, tree_of(group[0]), Path(scratch) / f"script{i}", args.data_dir)
            for i, row in enumerate(single):
                if "args" not in row or not (args.head or commit_of(row)):
                    print(f"{title(row)}: has no command on record")
                    continue
                arguments = recorded_args(row["args"]) if args.head else row["args"]
                script = f"{folder}/{row.get('script') or 'train.py'}"
                words, differ = command(tree_of(row), script, arguments)
                print(f"{title(row)}: python {script} {printable(shlex.join(words))}")
                for name, (then, now) in differ.items():
                    print(f"  cannot be set: {printable(name)} was {then!r} and is {now!r}")
                if args.run:
                    out = Path(scratch) / f"run{i}"
                    train(row, tree_of(row), [script, *words], out, args.data_dir)
                    agree &= judge(row, read_json(out / "run.json"), [r for r in every if same_setting(r, row)])
        finally:
            for tree in trees.values():
                if tree != ROOT:
                    subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=False)
    if not agree:
        raise UserError("some results differ from the record")


if __name__ == "__main__":
    cli(main)
