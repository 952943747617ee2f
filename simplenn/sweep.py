"""Eight studies of why deep networks train and generalize; each is a module of studies/.

    python simplenn/sweep.py --study deep_vs_shallow               # both parts: two functions, and MNIST
    python simplenn/sweep.py --study flatness --part line --jobs 2 # one part, two processes
    python simplenn/sweep.py --quick                               # everything in seconds, on built-in data
    python simplenn/sweep.py --list                                # print one command per part, run nothing

Every part writes its record STUDY-PART.json and its figure STUDY-PART.png into --out.
"""

import argparse
import shlex
from pathlib import Path

from common import run
from common.cores import usable_cores

import torch

import data
from studies import (
    deep_vs_shallow,
    flatness,
    gradient_norm,
    minimal_ratio,
    optimization_path,
    parameters_vs_generalization,
    random_labels,
    sensitivity,
    tools,
)

STUDIES = {
    module.__name__.rpartition(".")[2]: module
    for module in (deep_vs_shallow, optimization_path, gradient_norm, minimal_ratio, random_labels,
                   parameters_vs_generalization, flatness, sensitivity)
}  # fmt: skip


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--study", nargs="+", choices=list(STUDIES), default=list(STUDIES), metavar="STUDY",
                   help=f"any of {', '.join(STUDIES)} (default: all of them)")  # fmt: skip
    parts = sorted({part for module in STUDIES.values() for part in module.PARTS})
    p.add_argument("--part", choices=parts, help="only this part of each study")
    p.add_argument("--quick", action="store_true", help="seconds instead of minutes, on the built-in digits")
    p.add_argument("--seeds", type=run.positive_int, metavar="N",
                   help="seeds 0 to N - 1 on MNIST (default: 3; with --quick always 1)")  # fmt: skip
    p.add_argument("--jobs", type=run.positive_int, default=usable_cores(), metavar="N",
                   help="processes, for what is not trained as one batch (default: one per core)")  # fmt: skip
    p.add_argument("--list", action="store_true", help="print one command per part and run nothing")
    run.add_flags(p, "data_dir", data=dict(type=data.dataset_arg, default="auto", help="the images: mnist, ..."),
                  out=dict(default=str(run.ROOT / "out/simplenn/sweep"), help="folder of the studies"))  # fmt: skip
    return p


def part_argv(p, values, study, part):
    """The command line of one part of a study: the `values` that differ from the defaults of the parser `p`."""
    chosen = {"study": [study], "part": part}
    changed = {k: v for k, v in values.items() if k not in (*chosen, "list") and v != p.get_default(k)}
    return run.to_argv(p, chosen | changed)


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    if args.data in data.FUNCTIONS:
        p.error(f"--data {args.data}: names the images; which studies use functions is fixed")
    if args.quick and args.seeds:
        p.error(f"--seeds {args.seeds}: --quick has one seed")
    parts = [(study, part) for study in args.study for part in STUDIES[study].PARTS if args.part in (None, part)]
    if not parts:
        p.error(f"--part {args.part}: is not a part of {', '.join(args.study)}")
    for study, part in parts:
        if args.list:
            print(shlex.join(["python", run.display_path(__file__), *part_argv(p, vars(args), study, part)]))
            continue
        command = ["simplenn/sweep.py", *part_argv(p, run.record_args(args), study, part)]
        images = "builtin" if args.quick and args.data == "auto" else args.data
        torch.manual_seed(0)
        context = tools.Context(f"{study}-{part}", run.make_folder(Path(args.out)), command, args.quick,
                                1 if args.quick else args.seeds or 3, images, args.data_dir, args.jobs)  # fmt: skip
        STUDIES[study].PARTS[part](context)


if __name__ == "__main__":
    run.cli(main)
