"""Studies: many runs of a train.py, each a plain command in a process of its own, several at a time.

A sweep.py names its runs (`Job`) and calls `run_jobs`. Run again, the same command continues where it stopped. With
--list it prints the commands, one per line, for any other engine to run; the sweep then only collects the results.
"""

import csv
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common import run
from common.cores import usable_cores
from common.files import display_path, lock_folder, make_folder, typed_path, write
from common.options import option, to_argv
from common.records import SECONDS, read_record, seconds_of
from common.terminal import UserError

from tqdm import tqdm

ROW = (
    "state args final diverged_at_step wall_s parameters tokens_per_step dataset device precision git versions".split()
)


class Job(NamedTuple):
    """One run of a study: its folder, its arguments, and about how long it takes compared with the others."""

    folder: Path
    argv: list[str]
    cost: float = 1.0


def study_option(studies, default=None):
    """The field `study` of a StudyOptions: the names in `studies`; all of them by default."""
    return option(default or tuple(studies), "which studies", choices=list(studies), nargs="+", metavar="STUDY")


@dataclass(kw_only=True)
class StudyOptions(run.ScriptOptions):
    """The options of every sweep.py."""

    study: tuple[str, ...]
    seeds: int = option(3, "seeds 0 to N - 1", above=0)
    jobs: int = option(usable_cores(), "runs at a time, which share the cores", above=0)
    list: bool = option(False, "print the commands and run nothing")


def argv_of(train, values: dict) -> list[str]:
    """The command line of the module `train` that sets `values`."""
    return to_argv(train.Options, values)


def plan(train, studies, args, folder, dataset, cost) -> list[Job]:
    """Every run that the studies in `args` need, once. Seed by seed: a sweep stopped early has all settings.

    studies: {study: {setting: arguments of train.py}}. folder(setting, seed), dataset(study, setting), cost(arguments)
    give a run's folder, its dataset, and about how long it takes. --limit and --epochs replace a setting's own.
    """
    changes = {name: getattr(args, name) for name in ("limit", "epochs") if getattr(args, name) is not None}
    where = ["--data-dir", args.data_dir] if getattr(args, "data_dir", None) else []
    jobs = {}
    for seed in range(args.seeds):
        for name in args.study:
            for setting in studies[name].values():
                values = setting | dict(data=dataset(name, setting), seed=seed) | changes
                place = folder(setting, seed)
                jobs[place] = Job(place, argv_of(train, values) + where, cost(values))
    return list(jobs.values())


def command(script: Path, job: Job) -> list[str]:
    """The command that starts or continues a job."""
    return [typed_path(script), *job.argv, "--out", typed_path(job.folder), "--resume", "auto"]


def run_jobs(train, jobs: list[Job], args, tidy=lambda folder: None) -> bool:
    """Run all jobs of the module `train` that have not ended, `args.jobs` at a time, one core or more for each.
    tidy(folder) is called for each run when it ends.

    Returns False if `args.list` asked for the commands only. Raises UserError if a run fails, if a folder holds a
    run with other arguments, and if the sweep is told to stop; the runs then save and end.
    """
    script = Path(train.__file__)
    if args.list:
        for job in jobs:
            print("python " + shlex.join(command(script, job)))
        return False
    if not jobs:
        return True
    out = make_folder(jobs[0].folder.parent)
    todo = [job for job in jobs if not run.is_finished(job.folder, train.parse(job.argv))]
    if not todo:
        list_results(out)
        return True
    lock, before = lock_folder(out), signal.signal(signal.SIGTERM, signal.default_int_handler)
    total = sum(job.cost for job in jobs)
    done = total - sum(job.cost for job in todo)
    bar_format = "sweep {percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left"
    bar = tqdm(total=total, initial=done, disable=None, bar_format=bar_format)
    running, waiting = [], list(todo)
    try:
        while running or waiting:
            while waiting and len(running) < args.jobs:
                job = waiting.pop(0)
                running.append((job, *start(script, job, max(1, usable_cores() // args.jobs))))
            time.sleep(0.05)
            ended = [entry for entry in running if entry[1].poll() is not None]
            running = [entry for entry in running if entry not in ended]
            for job, _, errors in ended:
                state = state_of(job.folder)
                list_results(out, [other.folder for other, *_ in running])
                if state not in ("done", "diverged"):
                    errors.seek(0)
                    raise UserError(f"{display_path(job.folder)}: the run {state} ({last_line(errors.read())})")
                tidy(job.folder)
                bar.update(job.cost)
    except KeyboardInterrupt:
        raise UserError("the sweep was stopped; the same command continues where it was") from None
    finally:
        for _, process, _ in running:
            process.send_signal(signal.SIGINT if os.name != "nt" else signal.SIGTERM)
        for _, process, _ in running:
            process.wait()
        list_results(out)
        bar.close()
        signal.signal(signal.SIGTERM, before)
        lock.release()
    return True


def start(script, job, threads):
    """Start a job in a session of its own: Ctrl-C then reaches it once, from the sweep. Returns (process, stderr)."""
    errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    words = [sys.executable, str(script), *command(script, job)[1:]]
    return subprocess.Popen(
        words,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        start_new_session=True,
    ), errors


def state_of(folder):
    """How the run in `folder` ended, as its record says: done, diverged, interrupted or failed."""
    try:
        state = read_record(folder / "run.json")["state"]
    except UserError:
        return "failed"
    return "failed" if state == "running" else state


def last_line(errors: str) -> str:
    """The last line that a command wrote on standard error: the reason for its failure."""
    lines = [line for line in errors.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else "it said nothing"


def list_results(out: Path, running=()):
    """Write results.txt: a line for every run below `out`, with its state and validation metrics. running: folders."""
    lines = []
    for file in sorted(out.glob("*/run.json")):
        state, final = "running" if file.parent in running else state_of(file.parent), {}
        if state == "done":
            final = read_record(file).get("final", {})
        values = [f"{k} {v:.4f}" for k, v in final.items() if k.startswith("val_") and isinstance(v, float)]
        lines.append(f"{file.parent.name:50} {state:12} {'  '.join(values)}".rstrip())
    write(out / "results.txt", "\n".join(lines) + "\n")


def mean_and_deviation(values: list[float]) -> str:
    """The mean of scores over seeds and their standard deviation, in percent, for a table on the screen."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2%} +- {deviation:.2%}"


def row(study: str, setting: str, seed: int, folder: Path, **curves: str) -> dict:
    """The row of one run in the record of a study. curves: names for columns of its metrics.csv, as lists. Columns that
    the run of an older version lacks are left out."""
    record = read_record(folder / "run.json")
    kept = {"study": study, "setting": setting, "seed": seed, "folder": folder.name} | {k: record.get(k) for k in ROW}
    if (folder / "metrics.csv").is_file():  # there is none if the run diverged before its first evaluation
        with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        for name, column in curves.items():
            if column not in SECONDS and not all(column in line for line in lines):
                continue
            values = [seconds_of(line) if column in SECONDS else float(line[column]) for line in lines]
            kept[name] = [round(value, 4) for value in values]
    return kept
