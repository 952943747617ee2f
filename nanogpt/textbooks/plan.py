"""All runs of the study: which arm, size and seed; their commands; the comparisons of the report."""

import os
from pathlib import Path

from common import run, study

import numpy as np

import train
from textbooks.prepare import ARMS, MORE

SEEDS = {"raw": 5, "textbook": 5, "generated": 3, "filtered": 3, "raw4": 3, "scratch": 3}
RECIPES = {"small": "phi1", "large": "phi1-large", "gpu": "phi1-gpu"}
LARGE_ARMS = ("raw", "textbook", "scratch")  # with one seed
QUICK = {"model": {"block_size": 192, "n_layer": 1, "n_head": 2, "n_embd": 32}, "iters": 6, "bs": 4}
QUESTIONS = {  # pre-registered in PREREGISTRATION.md: (name, arm, against, difficulty)
    "main": ("textbook", "raw", "all"),
    "second": ("textbook", "raw4", "all"),
    "generated": ("generated", "raw", "all"),
    "filtered": ("filtered", "raw", "all"),
    "pretraining": ("raw", "scratch", "all"),
}


def settings(seeds: dict | None = None) -> list[tuple[str, str, int]]:
    """(arm, size, seed) of all models, seed by seed."""
    seeds = seeds or SEEDS
    small = [(arm, "small", s) for s in range(max(seeds.values())) for arm in [*ARMS, "scratch"] if s < seeds[arm]]
    return [*small, *((arm, "large", 0) for arm in LARGE_ARMS)]


def folder_of(work: Path, arm: str, size: str, seed: int, finetuned: bool) -> Path:
    return work / ("finetuned" if finetuned else "pretrained") / f"{arm}-{size}-s{seed}"


def job(work: Path, arm: str, size: str, seed: int, finetuned: bool, quick: bool = False, init: str | None = None,
        more: tuple = ()) -> study.Job:  # fmt: skip
    """The run of train.py for one arm, size and seed: pretraining, or fine-tuning of its result."""
    recipe = RECIPES[size]
    values = {"recipe": recipe, "data": run.display_path(work / "data" / arm), "seed": seed}
    shape = {k: v for k, v in train.RECIPES[recipe]["model"].items() if v != train.RECIPES["phi1"]["model"][k]}
    if finetuned:
        values |= {"recipe": "phi1-gpu-finetune" if size == "gpu" else "phi1-finetune"}
        values["data"] = run.display_path(work / "data" / "exercises")
        if init or arm != "scratch":
            start = init or os.path.relpath(folder_of(work, arm, size, seed, False), run.ROOT)
            values["init"] = start if init else "./" + Path(start).as_posix()
        elif shape and size != "gpu":
            values["model"] = shape
    base = train.RECIPES[values["recipe"]]
    values["iters"] = base["iters"] * (MORE if arm == "raw4" and not finetuned else 1)
    if quick:
        values |= {k: v for k, v in QUICK.items() if k != "model"} | {"evals": 1}
        values |= {} if "init" in values else {"model": QUICK["model"]}
    tokens = base["bs"] * (base["model"]["block_size"] if not finetuned else 100)
    cost = values["iters"] * tokens * (1 if size == "small" else 4)
    folder = folder_of(work, arm, size, seed, finetuned)
    return study.Job(folder, run.to_argv(train.parser(), values) + list(more), cost)


def jobs(work: Path, finetuned: bool, seeds: dict | None = None, quick: bool = False, more=()) -> list[study.Job]:
    """All runs of pretraining or of fine-tuning. more: further flags of train.py for all of them."""
    wanted = [s for s in settings(seeds) if finetuned or s[0] != "scratch"]
    return [job(work, *setting, finetuned, quick, more=more) for setting in wanted]


def evaluations(work: Path, benchmark: list[str], seeds: dict | None = None) -> list[Path]:
    """The run folders to evaluate. On the ladder: every fine-tuned model, and the pretrained ones of the first seed. On
    HumanEval and MBPP: the fine-tuned models of the first seed."""
    final = [folder_of(work, *setting, True) for setting in settings(seeds) if setting[2] == 0]
    if "ladder" not in benchmark:
        return final
    found = [folder_of(work, *setting, True) for setting in settings(seeds)]
    return found + [folder_of(work, arm, "small", 0, False) for arm in ARMS]


def pass_rates(scored: list[dict], level: str = "all") -> np.ndarray:
    """The pass rate of each problem, in the order of the problems, from lines with task_id, level and passed."""
    rates = {}
    for line in scored:
        if level in ("all", line["level"]):
            rates.setdefault(line["task_id"], []).append(line["passed"])
    return np.array([np.mean(rates[task]) for task in sorted(rates)])
