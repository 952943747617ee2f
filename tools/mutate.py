"""Which faults do the tests catch? Faults are drawn by a seed and put into the folders' code, one at a time.

    python tools/mutate.py --list                   # 60 faults, from all folders in turn; nothing is run
    python tools/mutate.py --seed 1 --jobs 4        # run the tests with 60 others, four at a time
    python tools/mutate.py --folder gan --count 20

An operator (OPERATORS in faults.py) is drawn, then a place where it applies in the files for models, data, training and
scores. Then the folder's quick tests run: tests/test_FOLDER*.py, the tests of its packages, and its share of the
contract. A fault is caught when a test fails, or when the tests hang. The code is HEAD's, in worktrees that are removed
in the end. The record in --out grows with each fault; the same command continues it.
"""

import contextlib
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from common.arguments import ScriptOptions, parse_options, path_arg  # noqa: E402
from common.files import make_folder, write_json  # noqa: E402
from common.options import option, short  # noqa: E402
from common.records import read_json  # noqa: E402
from common.terminal import UserError, cli  # noqa: E402

from faults import Fault, draw  # noqa: E402

MIN_LIMIT = 600  # seconds until tests count as hanging; or ten times what they take without a fault

PYTEST = [sys.executable, *"-m pytest -n 0 -p no:cacheprovider -x -q --tb=no -m".split(), "not slow"]


@contextlib.contextmanager
def worktrees(count: int):
    """Worktrees of HEAD, outside the checkout. Raises UserError."""
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as scratch:
        trees = [Path(scratch, f"tree{i}") for i in range(count)]
        try:
            for tree in trees:
                git("worktree", "add", "--detach", str(tree), "HEAD")
            yield trees
        finally:
            for tree in trees:
                if tree.exists():
                    git("worktree", "remove", "--force", str(tree))
                shutil.rmtree(files_of_tests(tree), ignore_errors=True)


def files_of_tests(tree: Path) -> Path:
    """The folder for the temporary files of the tests in a worktree. Not beside the worktree: messages would name the
    files by relative paths there, and tests look for whole ones."""
    return tree.parent.with_name(f"{tree.parent.name}-{tree.name}")


def environment() -> dict:
    """Without the variables that name a repository, which git sets for its hooks."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}


def git(*words: str, folder: Path | None = None) -> str:
    """What git prints. Raises UserError."""
    command = ["git", "-C", str(folder or ROOT), *words]
    try:
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"git cannot be run ({error.strerror})") from error
    if done.returncode:
        raise UserError(f"git {words[0]} fails: {done.stderr.strip()}")
    return done.stdout.strip()


def unchanged(tree: Path, folder: str) -> Fault:
    """No fault, but a change: the tests must pass with it."""
    text = (tree / folder / "train.py").read_bytes()
    return Fault(folder, f"{folder}/train.py", 1, "unchanged", "", "", text + b"# unchanged\n")


def pytest_words(tree: Path, folder: str) -> list[str]:
    """The command for the quick tests of a folder, the contract last."""
    packages = [file.parent.name for file in (tree / folder).glob("*/__init__.py")]
    names = [f"test_{name}" for name in (folder, *packages)]
    files = [file for name in names for file in sorted(tree.glob(f"tests/{name}*.py"))]
    contract = sorted(tree.glob("tests/test_contract*.py"))
    chosen = " or ".join([*names, f"[{folder}", f"-{folder}"])  # parts of names: a file's, or a parameter's
    return [
        *PYTEST,
        "-k",
        chosen,
        f"--basetemp={files_of_tests(tree)}",
        *(str(file.relative_to(tree)) for file in files + contract),
    ]


class Trial:
    """The tests of a folder with a fault in it, which run in a worktree."""

    def __init__(self, tree: Path, fault: Fault, limit: float):
        git("reset", "--hard", folder=tree)
        git("clean", "-fdx", folder=tree)
        (tree / fault.file).write_bytes(fault.mutant)
        self.tree = tree
        self.fault = fault
        self.limit = limit
        self.began = time.monotonic()
        self.log = Path(f"{tree}.log")
        variables = environment() | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # no bytecode of the last
        variables["DATA_DIR"] = os.path.abspath(os.environ.get("DATA_DIR") or ROOT / "data")
        command = pytest_words(tree, fault.folder)
        with open(self.log, "wb") as log:
            streams = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            self.process = subprocess.Popen(command, cwd=tree, env=variables, start_new_session=True, **streams)

    def seconds(self) -> float:
        return round(time.monotonic() - self.began, 1)

    def ended(self) -> bool:
        return self.process.poll() is not None or self.seconds() > self.limit

    def caught_by(self) -> str | None:
        """The first test that failed, "hang", or pytest's exit status; None if all passed."""
        code = self.process.poll()
        if code is None:
            return "hang"
        if code == 0:
            return None
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", self.log.read_text(errors="replace"), re.MULTILINE)
        return failed[1] if failed else f"exit status {code}"

    def stop(self):
        """End the tests, and the processes that they started."""
        with contextlib.suppress(OSError):  # they have ended
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        self.process.wait()


def run_all(faults: list[Fault], trees: list[Path], limits: dict, report):
    """Run the tests with each fault, one in each worktree at a time, and call report(fault, caught by, seconds)."""
    waiting = list(faults)
    free = list(trees)
    running = []
    try:
        while waiting or running:
            while waiting and free:
                fault = waiting.pop(0)
                running.append(Trial(free.pop(), fault, limits.get(fault.folder, math.inf)))
            for trial in [trial for trial in running if trial.ended()]:
                caught_by, seconds = trial.caught_by(), trial.seconds()
                trial.stop()
                running.remove(trial)
                free.append(trial.tree)
                report(trial.fault, caught_by, seconds)
            time.sleep(0.05)
    finally:
        for trial in running:
            trial.stop()


def facts(fault: Fault) -> dict:
    """A fault for the record: without the whole file."""
    return {name: value for name, value in asdict(fault).items() if name != "mutant"}


def find(rows: list[dict], fault: Fault) -> dict | None:
    """What is on record for a fault."""
    return next((row for row in rows if facts(fault).items() <= row.items()), None)


def line(row: dict) -> str:
    text = f"{row['file']}:{row['line']} {row['operator']}: {row['before']}  ->  {row['after']}"
    if "caught_by" not in row:
        return text
    return f"{text}  caught by {row['caught_by']}" if row["caught_by"] else f"{text}  SURVIVED"


def summary(rows: list[dict]) -> list[str]:
    """A line for each folder and one for all: how many faults were caught."""
    caught = {}
    for row in rows:
        for name in (row["folder"], "all"):
            caught.setdefault(name, []).append(row["caught_by"] is not None)
    shares = {
        name: f"{sum(values)} of {len(values)} ({sum(values) / len(values):.0%})" for name, values in caught.items()
    }
    return [f"{name:12} {shares[name]}" for name in sorted(shares, key=lambda name: (name == "all", name))]


def folders_with_code() -> list[str]:
    return sorted(file.parent.name for file in ROOT.glob("*/train.py"))


@dataclass(kw_only=True)
class Options(ScriptOptions):
    folder: tuple[str, ...] = option(
        (), "folders whose code gets the faults (default: all)", nargs="+", metavar="FOLDER"
    )
    count: int = option(60, "faults in all", above=0)
    seed: int = option(0, "seed of the draw", at_least=0)
    jobs: int = option(1, "faults at a time", above=0)
    list: bool = option(False, "print the faults, and run nothing")
    out: str = option(str(ROOT / "out/mutants"), "folder of the record", type=path_arg, metavar="DIR")

    def check(self):
        for name in self.folder:
            if name not in folders_with_code():
                raise UserError(f"--folder {short(name)}: is not one of {', '.join(folders_with_code())}")


def main(argv=None):
    args = parse_options(__file__, Options, argv)
    folders = args.folder or folders_with_code()
    commit = git("rev-parse", "HEAD")
    with worktrees(1 if args.list else args.jobs) as trees:
        each = math.ceil(args.count / len(folders))
        drawn = {folder: draw(trees[0], folder, each, args.seed) for folder in folders}
        turns = itertools.zip_longest(*drawn.values())
        faults = [fault for turn in turns for fault in turn if fault is not None][: args.count]
        if args.list:
            print("\n".join(line(facts(fault)) for fault in faults))
            return

        path = make_folder(args.out) / f"{commit[:12]}-seed{args.seed}.json"
        record = read_json(path) if path.exists() else {"commit": commit, "seed": args.seed, "seconds": {}, "rows": []}
        rows, seconds_of = record["rows"], record["seconds"]

        def must_pass(fault, caught_by, seconds):
            if caught_by:
                raise UserError(f"{fault.folder}/: its quick tests fail without a fault: {caught_by}")
            seconds_of[fault.folder] = seconds
            write_json(path, record)

        def report(fault, caught_by, seconds):
            rows.append(facts(fault) | {"caught_by": caught_by, "seconds": seconds})
            write_json(path, record)
            print(line(rows[-1]), flush=True)

        waiting = [fault for fault in faults if find(rows, fault) is None]
        for fault in faults:
            if fault not in waiting:
                print(line(find(rows, fault)))
        new = sorted({fault.folder for fault in waiting} - seconds_of.keys())
        run_all([unchanged(trees[0], folder) for folder in new], trees, {}, must_pass)
        limits = {folder: max(MIN_LIMIT, 10 * seconds) for folder, seconds in seconds_of.items()}
        run_all(waiting, trees, limits, report)
    print("\n".join(["", *summary([find(rows, fault) for fault in faults]), str(path)]))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the worktrees are removed
    cli(main)
