"""Eight studies of why deep networks train and generalize; each is a module of studies/.

    python simplenn/sweep.py --study deep_vs_shallow               # both parts: two functions, and MNIST
    python simplenn/sweep.py --study flatness --part line --jobs 2 # one part, two processes
    python simplenn/sweep.py --quick                               # everything in seconds, on built-in data
    python simplenn/sweep.py --list                                # print one command per part, run nothing

Every part writes its record STUDY-PART.json and its figure STUDY-PART.png into --out.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from common import run
from common.arguments import ROOT, data_dir_option, path_arg
from common.options import as_dict, option, options_of, to_argv
from common.study import StudyOptions, study_option
from common.terminal import UserError

import torch

from data import FUNCTIONS, dataset_arg
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
    for module in (
        deep_vs_shallow,
        optimization_path,
        gradient_norm,
        minimal_ratio,
        random_labels,
        parameters_vs_generalization,
        flatness,
        sensitivity,
    )
}
PARTS = sorted({part for module in STUDIES.values() for part in module.PARTS})


@dataclass(kw_only=True)
class Options(StudyOptions):
    study: tuple[str, ...] = study_option(STUDIES)
    part: str | None = option(None, "only this part of each study", choices=PARTS)
    quick: bool = option(False, "seconds instead of minutes, on the built-in digits")
    seeds: int | None = option(None, "seeds 0 to N - 1 on MNIST (default: 3; of optimization_path 6)", above=0)
    data: str = option("auto", "the images: mnist, ...", type=dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = data_dir_option()
    out: str = option(str(ROOT / "out/simplenn/sweep"), "folder of the studies", type=path_arg, metavar="DIR")

    def check(self):
        if self.data in FUNCTIONS:
            raise UserError(f"--data {self.data}: names the images; which studies use functions is fixed")
        if self.quick and self.seeds:
            raise UserError(f"--seeds {self.seeds}: --quick has seeds of its own")
        if self.part and not any(self.part in STUDIES[name].PARTS for name in self.study):
            raise UserError(f"--part {self.part}: is not a part of {', '.join(self.study)}")


def part_argv(values: dict, study: str, part: str) -> list[str]:
    """The command line of one part of a study: the `values` that differ from the defaults."""
    changed = {"study": [study], "part": part}
    for name, value in values.items():
        if name not in ("study", "part", "list") and value != options_of(Options)[name].default:
            changed[name] = value
    return to_argv(Options, changed)


def chosen_parts(args) -> list[tuple[str, str]]:
    """(study, part) of all that `args` names."""
    parts = []
    for study in args.study:
        names = [args.part] if args.part else STUDIES[study].PARTS
        parts += [(study, name) for name in names if name in STUDIES[study].PARTS]
    return parts


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    for study, part in chosen_parts(args):
        if args.list:
            print(shlex.join(["python", run.typed_path(__file__), *part_argv(as_dict(args), study, part)]))
            continue
        command = ["simplenn/sweep.py", *part_argv(run.record_args(args), study, part)]
        images = "builtin" if args.quick and args.data == "auto" else args.data
        torch.manual_seed(0)
        context = tools.Context(
            f"{study}-{part}",
            run.make_folder(Path(args.out)),
            command,
            args.quick,
            args.seeds,
            images,
            args.data_dir,
            args.jobs,
        )
        STUDIES[study].PARTS[part](context)


if __name__ == "__main__":
    run.cli(main)
