"""All runs of the study: which arm, size and seed; their commands; the comparisons of the report."""

import dataclasses
import os
from pathlib import Path

from common import run, study

import numpy as np

import train
from model import GPTConfig
from textbooks.prepare import ARMS, MORE

SEEDS = {
    "raw": 5,
    "textbook": 5,
    "generated": 3,
    "filtered": 5,
    "functions": 5,
    "all-functions": 5,
    "raw4": 3,
    "scratch": 3,
}
RECIPES = {"small": "phi1", "large": "phi1-large", "gpu": "phi1-gpu"}
LARGE_ARMS = ("raw", "textbook", "scratch")  # with one seed
QUICK = {"iters": 6, "bs": 4, "evals": 1}
SHAPE = [field.name for field in dataclasses.fields(GPTConfig) if field.name != "vocab_size"]
QUICK_SHAPE = {"block_size": 192, "n_layer": 1, "n_head": 2, "n_embd": 32}
QUESTIONS = {  # pre-registered in PREREGISTRATION.md: (name, arm, against, difficulty)
    "main": ("textbook", "raw", "all"),
    "second": ("textbook", "raw4", "all"),
    "generated": ("generated", "raw", "all"),
    "filtered": ("filtered", "raw", "all"),
    "ranking": ("filtered", "all-functions", "all"),
    "choice": ("all-functions", "functions", "all"),
    "form": ("functions", "raw", "all"),
    "pretraining": ("raw", "scratch", "all"),
}


def settings(seeds: dict | None = None) -> list[tuple[str, str, int]]:
    """(arm, size, seed) of all models, seed by seed."""
    seeds = seeds or SEEDS
    models = []
    for seed in range(max(seeds.values())):
        models += [(arm, "small", seed) for arm in (*ARMS, "scratch") if seed < seeds[arm]]
    return models + [(arm, "large", 0) for arm in LARGE_ARMS]


def folder_of(work: Path, arm: str, size: str, seed: int, finetuned: bool) -> Path:
    return work / ("finetuned" if finetuned else "pretrained") / f"{arm}-{size}-s{seed}"


def job(
    work: Path,
    arm: str,
    size: str,
    seed: int,
    finetuned: bool,
    quick: bool = False,
    init: str | None = None,
    more: tuple = (),
) -> study.Job:
    """The run of train.py for one arm, size and seed: pretraining, or fine-tuning of its result."""
    name = RECIPES[size]
    recipe = train.RECIPES[name]
    values = {"recipe": name, "data": run.typed_path(work / "data" / arm), "seed": seed}
    if finetuned:
        values["recipe"] = "phi1-gpu-finetune" if size == "gpu" else "phi1-finetune"
        values["data"] = run.typed_path(work / "data" / "exercises")
        if init:
            values["init"] = init
        elif arm != "scratch":
            start = os.path.relpath(folder_of(work, arm, size, seed, False), run.ROOT)
            values["init"] = "./" + Path(start).as_posix()
        elif size != "gpu":
            values |= {n: getattr(recipe, n) for n in SHAPE if getattr(recipe, n) != getattr(train.PHI1, n)}
    base = train.RECIPES[values["recipe"]]
    longer = MORE if arm == "raw4" and not finetuned else 1
    values["iters"] = base.iters * longer
    if quick:
        values |= QUICK
        if "init" not in values:
            values |= QUICK_SHAPE
    tokens = base.bs * (100 if finetuned else base.block_size)
    cost = values["iters"] * tokens * (1 if size == "small" else 4)
    folder = folder_of(work, arm, size, seed, finetuned)
    return study.Job(folder, study.argv_of(train, values) + list(more), cost)


def jobs(work: Path, finetuned: bool, seeds: dict | None = None, quick: bool = False, more=()) -> list[study.Job]:
    """All runs of pretraining or of fine-tuning. more: further flags of train.py for all of them."""
    chosen = [s for s in settings(seeds) if finetuned or s[0] != "scratch"]
    return [job(work, *setting, finetuned, quick, more=more) for setting in chosen]


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
