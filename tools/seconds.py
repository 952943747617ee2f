"""Time the first command of every README, with all instructions of this CPU and with AVX2 alone.

    python tools/seconds.py                      # all folders: half an hour
    python tools/seconds.py cifar nanogpt        # these folders
    OMP_NUM_THREADS=1 python tools/seconds.py    # on one core

Most laptops have AVX2 alone. A processor with more can be limited to it by environment variables (AVX2 below), and then
computes what a laptop computes. The two take turns. Each command runs in this folder and writes below out/, as it does
for anybody; the table is printed, and seconds.json in --out has it with the machine and the last line of every command.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import run  # noqa: E402

import torch  # noqa: E402

AVX2 = dict(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2")
KINDS = {"all": {}, "avx2": AVX2}


def first_command(readme: Path) -> list[str]:
    """The words of the first `python ...` line in a README's code, without its comment."""
    line = re.search(r"^python .*", readme.read_text(encoding="utf-8"), re.MULTILINE)
    return shlex.split(line[0], comments=True)


def measure(words: list[str], limits: dict) -> tuple[float, str]:
    """(seconds, last line on standard output) of a command. Raises UserError where it fails."""
    began = time.perf_counter()
    env = os.environ | limits
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, env=env, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise run.UserError(f"{shlex.join(words)}: exit status {done.returncode}: {why}")
    return seconds, (done.stdout.strip().splitlines() or [""])[-1]


def main(argv=None):
    folders = sorted(script.parent.name for script in ROOT.glob("*/train.py"))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folders", nargs="*", metavar="FOLDER", help="experiments (default: all)")
    p.add_argument("--out", default=str(ROOT / "out"), help="folder for seconds.json (default: out)")
    args = p.parse_args(argv)
    if unknown := [name for name in args.folders if name not in folders]:
        raise run.UserError(f"{unknown[0]}: no such experiment; there are {', '.join(folders)}")
    out, rows = run.make_folder(args.out), []
    machine = run.environment(torch.device("cpu"), __file__, argv)
    print(f"{machine['device']['name']}, {machine['device']['threads']} threads\n{'all':>6} {'AVX2':>6}  seconds of")
    for folder in args.folders or folders:
        words = first_command(ROOT / folder / "README.md")
        results = {kind: measure(words, limits) for kind, limits in KINDS.items()}
        seconds = {kind: value for kind, (value, _) in results.items()}
        rows.append({"folder": folder, "setting": shlex.join(words), "seconds": seconds,
                     "ratio": seconds["avx2"] / seconds["all"],
                     "last_line": {kind: line for kind, (_, line) in results.items()}})  # fmt: skip
        print(f"{seconds['all']:>6.0f} {seconds['avx2']:>6.0f}  {rows[-1]['setting']}", flush=True)
        run.write_json(out / "seconds.json", {"bench": "seconds", **machine, "limits": AVX2, "rows": rows})


if __name__ == "__main__":
    run.cli(main)
