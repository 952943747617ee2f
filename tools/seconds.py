"""Time the first command of every README, with all instructions of this CPU and with AVX2 alone.

    python tools/seconds.py                      # the first commands of all folders: half an hour
    python tools/seconds.py cifar nanogpt        # those of these folders
    python tools/seconds.py --recipes            # every recipe, estimated from a part of its training: half an hour
    OMP_NUM_THREADS=1 python tools/seconds.py    # on one core

Most laptops have AVX2 alone. A processor with more can be limited to it by environment variables (AVX2 below), and then
computes what a laptop computes. The two take turns. A first command runs as a whole and writes below out/, as it does
for anybody. Of a recipe, a part is trained, and its seconds in metrics.csv are multiplied: they leave out the
start and, but for nanogpt/, evaluation. The table is printed, and seconds.json or recipes.json in --out records it.
"""

import argparse
import csv
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import run  # noqa: E402

import torch  # noqa: E402

AVX2 = dict(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2")
KINDS = {"all": {}, "avx2": AVX2}
CLIPPED = "--set test_tokens=0 --set val_tokens=2048 --set max_steps=8"  # 8 of 51 steps
GAN = "--set classifier_images=500 --set eval_samples=100 --set samples=100 --epochs 1"
RECIPES = {  # command: (flags that train a part of it, how many such parts the training has)
    "simplenn/train.py": ("--epochs 1", 3),
    "simplenn/train.py --model mlp": ("--epochs 1", 10),
    "simplenn/train.py --model cnn": ("--epochs 1", 3),
    "simplenn/train.py --model cnn --recipe best": ("--epochs 1", 4),
    **{
        f"cifar/train.py --model {model} --recipe {recipe}": ("--epochs 1", epochs)
        for model, best in (("lenet5", 90), ("simplenn", 30))
        for recipe, epochs in (("quick", 10), ("plain", 10), ("best", best))
    },
    "resnet/train.py --data mnist": ("--epochs 1", 5),
    "resnet/train.py": ("--epochs 1 --limit 9000", 40 * 5),
    "resnet/train.py --recipe paper": ("--epochs 1 --limit 4500", 182 * 10),
    "lstm_imdb/train.py": ("--epochs 1 --limit 6400", 5 * 34_708 / 6400),
    "lstm_imdb/train.py --recipe best": ("--epochs 1 --limit 3200", 6 * 34_708 / 3200),
    "nanogpt/train.py": ("--iters 200 --set evals=1", 10),
    "nanogpt/train.py --recipe fast": ("--iters 100 --set evals=1", 4),
    "nanogpt/train.py --recipe best": ("--iters 200 --set evals=1", 9),
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


def first_command(readme: Path) -> list[str]:
    """The words of the first `python ...` line in a README's code, without its comment."""
    line = re.search(r"^python .*", readme.read_text(encoding="utf-8"), re.MULTILINE)
    return shlex.split(line[0], comments=True)


def execute(words: list[str], limits: dict) -> str:
    """The last line on standard output of a command. Raises UserError where it fails."""
    env = os.environ | limits
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise run.UserError(f"{shlex.join(words)}: exit status {done.returncode}: {why}")
    return (done.stdout.strip().splitlines() or [""])[-1]


def time_first_command(folder: str) -> dict:
    """A row of seconds.json: the first command of a folder as a whole, as somebody types it."""
    words, seconds, last_line = first_command(ROOT / folder / "README.md"), {}, {}
    for kind, limits in KINDS.items():
        began = time.perf_counter()
        last_line[kind] = execute(words, limits)
        seconds[kind] = time.perf_counter() - began
    return {"folder": folder, "setting": shlex.join(words), "seconds": seconds, "last_line": last_line}


def estimate_recipe(command: str) -> dict:
    """A row of recipes.json: the seconds of training of a recipe, from those of a part."""
    (change, parts), seconds = RECIPES[command], {}
    for kind, limits in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            execute(["python", *command.split(), *change.split(), "--out", str(Path(folder, "run"))], limits)
            with open(Path(folder, "run", "metrics.csv"), newline="", encoding="utf-8") as file:
                seconds[kind] = parts * float(list(csv.DictReader(file))[-1]["seconds"])
    return {"folder": command.split("/")[0], "setting": f"python {command}", "part": change, "parts": parts,
            "seconds": seconds}  # fmt: skip


def main(argv=None):
    folders = sorted(script.parent.name for script in ROOT.glob("*/train.py"))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folders", nargs="*", metavar="FOLDER", help="experiments (default: all)")
    p.add_argument("--recipes", action="store_true", help="estimate every recipe instead of running first commands")
    p.add_argument("--out", default=str(ROOT / "out"), help="folder for the record (default: out)")
    args = p.parse_args(argv)
    if unknown := [name for name in args.folders if name not in folders]:
        raise run.UserError(f"{unknown[0]}: no such experiment; there are {', '.join(folders)}")
    out, rows = run.make_folder(args.out), []
    machine = run.environment(torch.device("cpu"), __file__, argv)
    print(f"{machine['device']['name']}, {machine['device']['threads']} threads\n{'all':>6} {'AVX2':>6}  seconds of")
    chosen = args.folders or folders
    if args.recipes:
        jobs = [(estimate_recipe, command) for command in RECIPES if command.split("/")[0] in chosen]
    else:
        jobs = [(time_first_command, folder) for folder in chosen]
    for work, what in jobs:
        row = work(what)
        rows.append(row | {"ratio": row["seconds"]["avx2"] / row["seconds"]["all"]})
        print("{all:>6.0f} {avx2:>6.0f}  {name}".format(name=row["setting"], **row["seconds"]), flush=True)
        name = "recipes.json" if args.recipes else "seconds.json"
        run.write_json(out / name, {"bench": "seconds", **machine, "limits": AVX2, "rows": rows})


if __name__ == "__main__":
    run.cli(main)
