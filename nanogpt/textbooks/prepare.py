"""The data of all arms: equal numbers of tokens of one tokenizer, decontaminated, with what overlaps on record.

Below the work folder: data/raw, raw4, textbook, generated, filtered (train.bin, val.bin), data/exercises (train.jsonl,
val.jsonl), each with tokenizer.json; heldout.jsonl, the problems of the evaluation; prepared.json, the record.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from common import run
from common.run import UserError

import numpy as np
import torch

import data
from prepared import read_json_lines
from textbooks import benchmarks, clean, exercises, inside, quality, texts, writer
from tokenizer import END_OF_TEXT, BytePairs

ARMS = ("raw", "textbook", "generated", "filtered", "raw4")
MORE = 4  # raw4 has MORE times the tokens
HELD_OUT_PER_LEVEL = 30
MIN_EXERCISES = 20  # of which some are copies, and two or more are for the validation loss
VAL_SHARE = 0.04  # of the documents of an arm, for its validation loss


def prepare(args, work: Path) -> dict:
    """Write the data of all arms below `work` and return the record. Raises UserError."""
    data_dir, budget = run.data_dir(args.data_dir), args.tokens
    index, benchmark = benchmark_index(data_dir, args.quick)
    chars = 5 * budget  # more characters than the tokens have
    sources = {"raw": texts.standard_library(Path(args.raw) if args.raw else None)}
    if "textbook" in args.arms:
        sources["textbook"] = pages(data_dir, args.quick)
    if "generated" in args.arms:
        sources["generated"] = texts.generated(chars, args.seed)
    if args.quick:
        sources["raw"] = sources["raw"][:40]
    n_held_out = HELD_OUT_PER_LEVEL * len(exercises.LEVELS) // (5 if args.quick else 1)
    held_out = exercises.generate(n_held_out, 0, held_out=True)
    drawn = exercises.generate(args.exercises, args.seed, exclude={e.prompt for e in held_out})
    rows, written = [{"prompt": e.prompt, "completion": e.completion} for e in drawn], None
    if args.writer:
        more, theirs, written = writer.write(args.writer, args.write, args.seed)
        rows, sources["generated"] = more + rows, theirs + sources.get("generated", [])
    clean_rows = [row for row in rows if index.find(row["prompt"] + row["completion"]) is None]
    removed = {"exercises": {"passages": len(rows), "removed": len(rows) - len(clean_rows)}}
    if len(clean_rows) < MIN_EXERCISES // 2:
        raise UserError(f"--exercises {args.exercises}: only {len(clean_rows)} are left without copies; ask for more")
    needed = {"raw": MORE * chars, "textbook": chars, "generated": chars}
    documents = {}
    for name, found in sources.items():
        print(f"{name}: looking for copies of the evaluation sets in {len(found):,} documents", flush=True)
        documents[name], removed[name] = clean.decontaminate(up_to(found, needed[name]), index)
    sample = max(20_000, min(600 * args.vocabulary, 3 * budget))  # characters of each
    solved = [row["prompt"] + row["completion"] for row in clean_rows]
    mixture = [cut(some, sample) for some in (*documents.values(), solved)]
    print(f"byte pairs: learning {args.vocabulary:,}", flush=True)
    tokenizer = train_tokenizer("\n".join(mixture), args.vocabulary)
    record = {
        "arms": {},
        "removed": removed,
        "benchmark": benchmark,
        "vocabulary": tokenizer.vocab_size,
        "written": written,
    }
    arms = documents | {"raw4": documents["raw"]}
    val = {name: max(1, int(VAL_SHARE * len(found))) for name, found in arms.items()}
    if "filtered" in args.arms:
        pool = list(dict.fromkeys(f for text in documents["raw"][val["raw"] :] for f in quality.functions(text)))
        print(f"quality filter: ranking {len(pool):,} functions", flush=True)
        ranked, record["filter"] = quality.rank(pool, args.embeddings)
    for name in args.arms:
        found = ranked if name == "filtered" else arms[name][val[name] :]
        wanted = budget * (MORE if name == "raw4" else 1)
        kept_out = arms["raw" if name == "filtered" else name][: val["raw" if name == "filtered" else name]]
        parts = {
            "train": tokens_of(found, tokenizer, wanted),
            "val": tokens_of(kept_out, tokenizer, max(200, budget // 40)),
        }
        if len(parts["train"]) < wanted:
            raise UserError(f"{name}: has {len(parts['train']):,} tokens, but --tokens needs {wanted:,}; ask for fewer")
        folder = write_folder(work / "data" / name, tokenizer)
        for part, ids in parts.items():
            run.write(folder / f"{part}.bin", ids.astype("<u2").tobytes())
        text = tokenizer.decode(parts["train"][:wanted].tolist())
        shared = clean.overlap(solved, [text])
        record["arms"][name] = {
            "tokens": wanted,
            "val_tokens": len(parts["val"]),
            "characters": len(text),
            "overlap_with_exercises": shared,
        }
        print(f"{name:>10}: {wanted:12,} tokens, {len(text):12,} characters; {shared:.2%} of the exercises' 8-grams")
    n_val = max(2, len(clean_rows) // 20)
    folder = write_folder(work / "data" / "exercises", tokenizer)
    for part, some in (("train", clean_rows[n_val:]), ("val", clean_rows[:n_val])):
        run.write(folder / f"{part}.jsonl", "".join(json.dumps(row) + "\n" for row in some))
    write_held_out(work / "heldout.jsonl", held_out)
    longest = max(len(tokenizer.encode(text)) + 1 for text in solved)
    record["exercises"] = {
        "train": len(clean_rows) - n_val,
        "val": n_val,
        "held_out": len(held_out),
        "longest": longest,
        "seed": args.seed,
    }
    record |= run.environment(torch.device("cpu"), str(Path(__file__).parent.parent / "phi1.py"))
    run.write_json(work / "prepared.json", record)
    return record


def benchmark_index(data_dir: Path, quick: bool) -> tuple[clean.Index, dict]:
    """(an index of HumanEval and MBPP, their description). A quick look goes without them if they are missing."""
    problems = {}
    try:
        for item in benchmarks.read("humaneval", data_dir):
            solution = item["prompt"] + item["canonical_solution"]
            problems[item["task_id"]] = [item["prompt"], item["canonical_solution"], solution]
        for item in benchmarks.read("mbpp", data_dir):
            problems[f"MBPP/{item['task_id']}"] = [item["text"], item["code"].replace("\r", "")]
    except UserError:
        if not quick:
            raise
    return clean.Index(problems), {"problems": len(problems), "gram": clean.GRAM, "threshold": clean.THRESHOLD}


def pages(data_dir: Path, quick: bool) -> list[str]:
    """The documentation; for a quick look without it, the language reference that Python's help() shows."""
    if quick and not (data_dir / "python_docs").exists():
        return texts.in_random_order(data.builtin().split("\n\n\n"))
    return texts.documentation(data_dir)


def up_to(documents: list[str], characters: int) -> list[str]:
    """The first documents, up to `characters` characters or one document more."""
    total, some = 0, []
    for document in documents:
        if total >= characters:
            break
        some.append(document)
        total += len(document)
    return some


def cut(documents: Iterable[str], characters: int) -> str:
    return "\n".join(up_to(list(documents), characters))[:characters]


def train_tokenizer(text: str, size: int) -> BytePairs:
    """Byte pairs of a text, with the end token as the last of `size` tokens."""
    state = BytePairs.train(text, size - 1).state()
    return BytePairs.of([*state["vocabulary"], END_OF_TEXT], [tuple(pair.split(" ")) for pair in state["merges"]])


def tokens_of(documents: Iterable[str], tokenizer: BytePairs, budget: int) -> np.ndarray:
    """The tokens of documents, each followed by the end token, `budget` of them at most."""
    ids, end = [], tokenizer.vocabulary[END_OF_TEXT]
    for document in documents:
        ids += tokenizer.encode(document)
        ids.append(end)
        if len(ids) >= budget:
            break
    return np.array(ids[:budget], np.uint16)


def write_folder(folder: Path, tokenizer: BytePairs) -> Path:
    run.make_folder(folder)
    run.write_json(folder / "tokenizer.json", tokenizer.state())
    return folder


def write_held_out(file: Path, items: list[exercises.Exercise]):
    """Write exercises with their calls and expected values, which keep their types."""
    lines = [json.dumps(item._asdict() | {"calls": inside.encode(item.calls)}) + "\n" for item in items]
    run.write(file, "".join(lines))


def read_held_out(file: Path) -> list[exercises.Exercise]:
    """The exercises that `write_held_out` wrote. Raises UserError."""
    if not file.exists():
        raise UserError(f"{run.display_path(file)}: is missing; run python nanogpt/phi1.py prepare first")
    items = read_json_lines(file, parse_held_out, "a held-out exercise, as phi1.py prepare writes it")
    if not items:
        raise UserError(f"{run.display_path(file)}: holds no exercise")
    return items


def parse_held_out(value: dict) -> exercises.Exercise:
    """An exercise with its calls. Raises ValueError, KeyError or TypeError."""
    exercise = exercises.Exercise(**value | {"calls": inside.decode(value["calls"])})
    for text in (exercise.level, exercise.composition, exercise.name, exercise.prompt, exercise.completion):
        text.encode()
    for given, _ in exercise.calls:
        if not isinstance(given, tuple):
            raise TypeError
    if not exercise.calls or exercise.level not in exercises.LEVELS:
        raise ValueError
    return exercise
