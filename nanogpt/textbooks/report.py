"""The report: a row for every model, the comparisons of the questions, the baseline, and the figure."""

from pathlib import Path

from common import run, study

import numpy as np
import torch
from matplotlib.figure import Figure

from corpora.prepared import read_exercises, read_json_lines
from textbooks import benchmarks, exercises, paired, plan, sandbox
from textbooks.prepare import read_held_out

LABELS = {
    "scratch": "no pretraining",
    "raw": "raw Python",
    "raw4": "raw Python, 4 times the tokens",
    "textbook": "documentation",
    "generated": "generated textbook",
    "filtered": "filtered Python",
    "functions": "functions of the same text",
    "all-functions": "functions of the whole library",
}


def report(work: Path, script: str) -> dict:
    """Collect the runs below `work`; write report.json and report.png there. Raises UserError."""
    held_out = read_held_out(work / "heldout.jsonl")
    rows = [row for finetuned in (True, False) for row in rows_of(work, finetuned)]
    if not rows:
        raise run.UserError(f"{run.display_path(work)}: no model has been evaluated yet; see phi1.py evaluate --all")
    solved = nearest(work, held_out)
    comparisons = {name: compare(work, *question) for name, question in plan.QUESTIONS.items()}
    made = run.environment(torch.device("cpu"), script)
    record = made | {
        "study": "textbooks",
        "rows": [*rows, solved],
        "prepared": run.read_json(work / "prepared.json"),
        "comparisons": comparisons,
    }
    run.write_json(work / "report.json", record)
    if small_finetuned(record):
        run.write_figure(work / "report.png", draw(record))
    for name, part in (("others", other_rows(work)), ("comparisons", comparison_rows(comparisons))):
        if part:
            run.write_json(work / f"{name}.json", made | {"study": name, "rows": part})
    for row in record["rows"]:
        scores = row["scores"]
        levels = [level for level in ("all", *exercises.LEVELS) if level in scores]
        values = "  ".join(f"{level} {scores[level]['pass@1']:5.1%}" for level in levels)
        print(f"{row['setting']:44} seed {row['seed']}  {values}")
    for name, found in comparisons.items():
        print(f"{name}: {sentence(name, found)}")
    print(f"report.json and report.png in {run.display_path(work)}")
    return record


def small_finetuned(record: dict) -> list[dict]:
    return [row for row in record["rows"] if row.get("finetuned") and row["size"] == "small"]


def other_rows(work: Path) -> list[dict]:
    """A row for every evaluated model that is not in the plan: the pilot (PREREGISTRATION.md) and runs with --name."""
    planned = {plan.folder_of(work, *setting, True) for setting in plan.settings()}
    folders = {file.parent for file in (work / "finetuned").glob("*/ladder.scores.json")} - planned
    rows = []
    for folder in folders:
        row = study.row("others", folder.name, 0, folder)
        scores = read_scores(folder / "ladder.scores.json")["scores"]
        rows.append(row | {"seed": row["args"]["seed"], "scores": scores})
    return sorted(rows, key=lambda row: (row["args"]["iters"], row["setting"]))


def read_scores(file: Path) -> dict:
    """The scores that phi1.py evaluate wrote. Raises UserError."""
    scored = run.read_json(file)
    if not {"benchmark", "scores", "too_long"} <= scored.keys() or not isinstance(scored["scores"], dict):
        raise run.UserError(f"{run.display_path(file)}: is damaged; run phi1.py evaluate again")
    return scored


def rows_of(work: Path, finetuned: bool) -> list[dict]:
    """A row for every model of the plan that has been evaluated, as records of a study have them."""
    rows = []
    for arm, size, seed in plan.settings():
        folder = plan.folder_of(work, arm, size, seed, finetuned)
        if not (folder / "ladder.scores.json").exists():
            continue
        name = LABELS[arm]
        if finetuned:
            name += ", fine-tuned"
        if size == "large":
            name += ", larger model"
        kind = "textbooks" if finetuned else "pretrained only"
        row = study.row(kind, name, seed, folder, train_loss="train_loss", val_loss="val_loss")
        row |= {"arm": arm, "size": size, "finetuned": finetuned}
        for file in sorted(folder.glob("*.scores.json")):
            scored = read_scores(file)
            key = "scores" if scored["benchmark"] == "ladder" else scored["benchmark"]
            row |= {key: scored["scores"], f"{scored['benchmark']}_too_long": scored["too_long"]}
        if not finetuned and row.get("final") and row.get("tokens_per_step"):  # a batch of exercises has fewer tokens
            row["tokens_per_second"] = row["args"]["iters"] * row["tokens_per_step"] / row["final"]["seconds"]
        rows.append(row)
    return rows


def nearest(work: Path, held_out: list[exercises.Exercise]) -> dict:
    """The row of the baseline that answers with the solution of the nearest training docstring. The programs are our
    own generator's, so they run in a worker process."""
    train = read_exercises(work / "data/exercises/train.jsonl")
    problems = benchmarks.held_out(held_out)
    answers = benchmarks.nearest(train, problems)
    jobs = [
        (item.prompt + answer["completion"], [(item.name, given) for given, _ in item.calls])
        for item, answer in zip(held_out, answers, strict=True)
    ]
    found = sandbox.work(jobs)
    scored = [
        answer | {"passed": not exercises.verdict(item.calls, values)}
        for item, answer, values in zip(held_out, answers, found, strict=True)
    ]
    table = benchmarks.scores(problems, scored, (1,))
    git = run.environment(torch.device("cpu"), __file__)["git"]
    return {
        "study": "textbooks",
        "setting": "nearest docstring (baseline)",
        "seed": 0,
        "arm": "nearest",
        "size": "",
        "finetuned": False,
        "scores": table,
        "git": git,
    }


def parse_scored(value: dict) -> dict:
    """A completion with its score. Raises ValueError, KeyError or TypeError."""
    if not isinstance(value["passed"], bool) or not isinstance(value["task_id"] + value["level"], str):
        raise TypeError
    return value


def rates(work: Path, arm: str, level: str) -> dict[int, np.ndarray]:
    """{seed: pass rate of every held-out problem} of the fine-tuned small models of an arm."""
    found = {}
    for seed in range(plan.SEEDS[arm]):
        file = plan.folder_of(work, arm, "small", seed, True) / "ladder.scored.jsonl"
        if file.exists():
            lines = read_json_lines(file, parse_scored, "a scored completion, as phi1.py evaluate writes it")
            found[seed] = plan.pass_rates(lines, level)
    return found


def compare(work: Path, arm: str, against: str, level: str) -> dict | None:
    """The paired comparison of two arms over the seeds that both have, in all and by level; None for fewer than two."""
    found = {}
    for difficulty in (level, *exercises.LEVELS):
        a, b = rates(work, arm, difficulty), rates(work, against, difficulty)
        seeds = sorted(a.keys() & b.keys())
        if len(seeds) < 2:
            return None
        counts = {len(rates_of_seed[seed]) for rates_of_seed in (a, b) for seed in seeds}  # of problems
        if len(counts) > 1:
            raise run.UserError(f"{arm} and {against} were evaluated on different problems; evaluate them again")
        if len(a[seeds[0]]):  # a quick look has no problem of some levels
            ours = np.stack([a[seed] for seed in seeds])
            theirs = np.stack([b[seed] for seed in seeds])
            found[difficulty] = paired.interval(ours, theirs) | {"seeds": len(seeds)}
    return {"arm": arm, "against": against} | found


def comparison_rows(comparisons: dict) -> list[dict]:
    """A row for every question that has been answered, for the results table."""
    rows = []
    for question, found in comparisons.items():
        if found:
            low, high = found["all"]["interval"]
            arms = f"{LABELS[found['arm']]} minus {LABELS[found['against']]}"
            verdict = "no effect shown"
            if not low <= 0 <= high:
                verdict = "better" if low > 0 else "worse"
            row = {"question": question, "arms": arms, "low": low, "high": high, "verdict": verdict}
            rows.append(row | found["all"])
    return rows


def sentence(name: str, found: dict | None) -> str:
    if found is None:
        return "fewer than two seeds of both arms have been evaluated"
    total = found["all"]
    low, high = total["interval"]
    arms = f"{LABELS[found['arm']]} minus {LABELS[found['against']]}"
    points = f"{100 * total['difference']:+.1f} points, 95% interval [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{arms}: {points}, {total['seeds']} seeds; detectable: {100 * total['detectable']:.1f}"


def draw(record: dict) -> Figure:
    """pass@1 of the small fine-tuned models: a group for each level, a bar for each arm, a dot for each seed."""
    rows = small_finetuned(record)
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    arms = [arm for arm in LABELS if any(row["arm"] == arm for row in rows)]
    levels = ["all", *exercises.LEVELS]
    width = 0.8 / len(arms)
    for i, arm in enumerate(arms):
        scores = [row["scores"] for row in rows if row["arm"] == arm]
        values = np.full((len(scores), len(levels)), np.nan)
        for seed, by_level in enumerate(scores):
            for k, level in enumerate(levels):
                if level in by_level:
                    values[seed, k] = 100 * by_level[level]["pass@1"]
        at = np.arange(len(levels)) + (i - (len(arms) - 1) / 2) * width
        axes.bar(at, values.mean(0), width, color=f"C{i}", alpha=0.6, label=LABELS[arm])
        for row in values:
            axes.plot(at, row, "k.", markersize=3)
    axes.set_xticks(range(len(levels)), levels)
    axes.set(ylabel="pass@1 on held-out compositions (%)", ylim=(0, 102))
    axes.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    return figure
