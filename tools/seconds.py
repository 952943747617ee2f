"""How long does training take on this machine? Each command of a list is timed under two conditions, in turns.

    python tools/seconds.py                      # all instructions of this CPU, and AVX2 alone: an hour on one core
    python tools/seconds.py cifar nanogpt        # these folders
    python tools/seconds.py --compare threads    # one thread, and all cores: what AUTO_THREADS of each script rests on
    python tools/seconds.py --compare load       # an idle machine, and one with a busy process on every core

instructions: most laptops have AVX2 alone. A processor with more can be limited to it by environment variables (AVX2
below), and then computes what a laptop computes. threads, load: leave the machine idle.
Of each recipe a part is trained, and its seconds in metrics.csv are multiplied: without start, test and, but for
nanogpt/, evaluation. For `load`, the commands are the first ones of the READMEs, timed as whole processes.
Prints a table and writes COMPARE.json (seconds.json for instructions) into --out.
"""

import argparse
import ast
import contextlib
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import run, study  # noqa: E402
from common.cores import usable_cores  # noqa: E402
from common.records import seconds_of  # noqa: E402

import torch  # noqa: E402

AVX2 = dict(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2")
CLIPPED = "--test-tokens 0 --val-tokens 2048 --max-steps 8"  # 8 of 51 steps
GAN = "--classifier-images 500 --eval-samples 100 --samples 100 --epochs 1"
RECIPES = {  # command: (flags that train a part of it, how many such parts the training has)
    "simplenn/train.py": ("--epochs 1", 3),
    "simplenn/train.py --model mlp": ("--epochs 1", 10),
    "simplenn/train.py --model cnn": ("--epochs 1", 3),
    "simplenn/train.py --model cnn --recipe best": ("--epochs 1", 4),
    "cifar/train.py --lr 0.01 --bs 16": ("--epochs 1", 10),  # the first command of the README
    **{
        f"cifar/train.py --model {model} --recipe {recipe}": ("--epochs 1", epochs)
        for model, best in (("lenet5", 90), ("simplenn", 30))
        for recipe, epochs in (("quick", 10), ("plain", 10), ("best", best))
    },
    "resnet/train.py --data mnist": ("--epochs 1", 5),
    # 28 pixels a side: as many pixels as the mean of the two sizes of a run
    "resnet/train.py": ("--epochs 1 --first-size 28 --limit 9000", 40 * 5),
    "resnet/airbench.py": ("--epochs 1 --first-size 28 --held-out --limit 4500", 10 * 50_000 / 4500),
    "resnet/train.py --recipe paper": ("--epochs 1 --limit 4500", 182 * 10),
    "lstm_imdb/train.py": ("--epochs 1 --limit 6400", 5 * 34_708 / 6400),
    "lstm_imdb/train.py --recipe short": ("--epochs 1 --limit 6400", 6 * 34_708 / 6400),
    "lstm_imdb/train.py --recipe best": ("--epochs 1 --limit 3200", 6 * 34_708 / 3200),
    "nanogpt/train.py": ("--iters 200 --evals 1", 10),
    "nanogpt/train.py --recipe fast": ("--iters 100 --evals 1", 4),
    "nanogpt/train.py --recipe best": ("--iters 200 --evals 1", 9),
    "nanogpt/train.py --recipe long": ("--iters 200 --evals 1", 14),
    **{
        f"distilgpt2/train.py --recipe smollm2 --method {method}": (CLIPPED, 51 / 8)
        for method in ("full", "lora", "last")
    },
    "gan/train.py --data mnist": (f"{GAN} --limit 12000", 3 * 4),
    "gan/train.py --data builtin --model acgan": (GAN, 40),
    **{
        f"gan/train.py --model {model} --width 16 --epochs 10": (f"{GAN} --limit 10000", 10 * 4)
        for model in ("dcgan", "wgan", "wgan-gp", "acgan")
    },
    "s2vt/train.py --data builtin": ("--epochs 1", 24),
    "s2vt/train.py --data msvd40": ("--epochs 1", 40),
}


FIRST = {  # the first training command of each README, or a demo: flags that run a part of it, some twenty seconds
    "lms/train.py": "",
    "simplenn/train.py --model cnn --recipe best": "--epochs 1",
    "cifar/train.py --lr 0.01 --bs 16": "--epochs 1",
    "resnet/train.py --data mnist": "--epochs 1 --limit 20000",
    "lstm_imdb/train.py": "--epochs 1 --limit 4000",
    "nanogpt/train.py --recipe fast": "--iters 200",
    "distilgpt2/generate.py --model smollm2 --strategy greedy beam top-p min-p": "--length 10",
    "gan/train.py --data mnist": "--epochs 1 --limit 4000",
    "s2vt/show.py": "",
}


def run_command(command: str, part: str, folder: Path, limits: dict):
    """Run a script of this repository with its output in `folder`. Raises UserError if it fails."""
    words = [sys.executable, *command.split(), *part.split(), "--out", str(folder)]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | limits, capture_output=True, text=True)
    if done.returncode:
        why = study.last_line(done.stderr)
        raise run.UserError(f"python {command} {part}: exit status {done.returncode}: {why}")


def training_seconds(command: str, part: str, parts: float, limits: dict) -> float:
    """Seconds of the whole training, estimated from a part of it. Raises UserError if the command fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        run_command(command, part, out, limits)
        with open(out / "metrics.csv", newline="", encoding="utf-8") as file:
            last_row = list(csv.DictReader(file))[-1]
    return parts * seconds_of(last_row)


def process_seconds(command: str, part: str) -> float:
    """Seconds of the whole process, from its start to its end. Raises UserError if the command fails."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        run_command(command, part, Path(folder, "run"), {})
        return time.perf_counter() - began


@contextlib.contextmanager
def busy_processes(count: int):
    """`count` processes that compute without end while the block runs."""
    busy = [subprocess.Popen([sys.executable, "-c", "while 1: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def compare_instructions(command: str) -> dict:
    part, parts = RECIPES[command]
    seconds = {"all": training_seconds(command, part, parts, {}), "avx2": training_seconds(command, part, parts, AVX2)}
    return {"part": part, "parts": parts, "limits": AVX2, "seconds": seconds, "ratio": seconds["avx2"] / seconds["all"]}


def compare_threads(command: str) -> dict:
    """One thread and all cores take turns; each has the smaller of two measurements."""
    part, parts = RECIPES[command]
    numbers = {"one": 1, "all": usable_cores()}
    turns = {name: [] for name in numbers}
    for _ in range(2):
        for name, threads in numbers.items():
            turns[name].append(training_seconds(command, f"{part} --threads {threads}", parts, {}))
    seconds = {name: min(values) for name, values in turns.items()}
    return {
        "part": part,
        "parts": parts,
        "threads": numbers,
        "seconds": seconds,
        "turns": turns,
        "ratio": seconds["one"] / seconds["all"],
    }


def threads_of(command: str) -> int:
    """The threads that a script takes by itself: the number that stands in its AUTO_THREADS, None for all cores."""
    script = ROOT / command.split()[0]
    for node in ast.parse(script.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "AUTO_THREADS":
            return ast.literal_eval(node.value) or usable_cores()
    raise run.UserError(f"{script}: has no AUTO_THREADS")


def compare_load(command: str) -> dict:
    part = FIRST[command]
    seconds = {"idle": process_seconds(command, part)}
    with busy_processes(usable_cores()):
        seconds["busy"] = process_seconds(command, part)
    return {
        "part": part,
        "cores": usable_cores(),
        "threads": threads_of(command),
        "seconds": seconds,
        "ratio": seconds["busy"] / seconds["idle"],
    }


COMPARE = {  # name: (commands, function of a command, name of the record)
    "instructions": (RECIPES, compare_instructions, "seconds.json"),
    "threads": (RECIPES, compare_threads, "threads.json"),
    "load": (FIRST, compare_load, "load.json"),
}


def main(argv=None):
    folders = list(dict.fromkeys(command.split("/")[0] for command in RECIPES | FIRST))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folders", nargs="*", metavar="FOLDER", help="experiments (default: all)")
    p.add_argument("--compare", choices=list(COMPARE), default="instructions", help="(default: %(default)s)")
    p.add_argument("--out", default=str(ROOT / "out"), help="folder of the record (default: out)")
    args = p.parse_args(argv)
    if unknown := [name for name in args.folders if name not in folders]:
        raise run.UserError(f"{unknown[0]}: not among {', '.join(folders)}")
    commands, compare, file_name = COMPARE[args.compare]
    out = run.make_folder(args.out)
    rows = []
    machine = run.environment(torch.device("cpu"), __file__, argv)
    print(f"{machine['device']['name']}, {usable_cores()} cores; seconds and their ratio")
    for command in commands:
        folder = command.split("/")[0]
        if folder in (args.folders or folders):
            row = {"folder": folder, "setting": f"python {command}"} | compare(command)
            rows.append(row)
            times = "".join(f"{name} {seconds:>7.1f}  " for name, seconds in row["seconds"].items())
            print(f"{times}{row['ratio']:>6.2f}  python {command}", flush=True)
            run.write_json(out / file_name, {"bench": args.compare, **machine, "rows": rows})


if __name__ == "__main__":
    run.cli(main)
