"""How long does training take, with all instructions of this CPU and with AVX2 alone? The recipes for a CPU, estimated.

    python tools/seconds.py                      # all folders: an hour on one core
    python tools/seconds.py cifar nanogpt        # these folders
    OMP_NUM_THREADS=1 python tools/seconds.py    # on one core

Most laptops have AVX2 alone. A processor with more can be limited to it by environment variables (AVX2 below), and then
computes what a laptop computes. Of each recipe a part is trained, once with each, and its seconds in metrics.csv are
multiplied: without start, test and, but for nanogpt/, evaluation. Prints a table and writes seconds.json into --out.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import run, study  # noqa: E402

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


def measure(command: str, limits: dict) -> float:
    """Seconds of the whole training, estimated from a part of it. Raises UserError where the command fails."""
    part, parts = RECIPES[command]
    with tempfile.TemporaryDirectory() as folder:
        words = [*command.split(), *part.split(), "--out", str(Path(folder, "run"))]
        env = os.environ | limits
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            why = study.last_line(done.stderr)
            raise run.UserError(f"python {command} {part}: exit status {done.returncode}: {why}")
        with open(Path(folder, "run", "metrics.csv"), newline="", encoding="utf-8") as file:
            return parts * float(list(csv.DictReader(file))[-1]["seconds"])


def main(argv=None):
    folders = list(dict.fromkeys(command.split("/")[0] for command in RECIPES))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folders", nargs="*", metavar="FOLDER", help="experiments (default: all)")
    p.add_argument("--out", default=str(ROOT / "out"), help="folder for seconds.json (default: out)")
    args = p.parse_args(argv)
    if unknown := [name for name in args.folders if name not in folders]:
        raise run.UserError(f"{unknown[0]}: not among {', '.join(folders)}")
    out, rows = run.make_folder(args.out), []
    machine = run.environment(torch.device("cpu"), __file__, argv)
    print(f"{machine['device']['name']}, {machine['device']['threads']} threads\n{'all':>6} {'AVX2':>6}  seconds of")
    for command, (part, parts) in RECIPES.items():
        folder = command.split("/")[0]
        if folder in (args.folders or folders):
            seconds = {kind: measure(command, limits) for kind, limits in KINDS.items()}
            rows.append({"folder": folder, "setting": f"python {command}", "part": part, "parts": parts,
                         "seconds": seconds, "ratio": seconds["avx2"] / seconds["all"]})  # fmt: skip
            print(f"{seconds['all']:>6.0f} {seconds['avx2']:>6.0f}  python {command}", flush=True)
            run.write_json(out / "seconds.json", {"bench": "seconds", **machine, "limits": AVX2, "rows": rows})


if __name__ == "__main__":
    run.cli(main)
