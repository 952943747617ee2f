"""The data of all arms: equal numbers of tokens of one tokenizer, decontaminated, with what overlaps on record.

Below the work folder: a folder data/ARM for each of ARMS (train.bin, val.bin), data/exercises (train.jsonl, val.jsonl),
each with tokenizer.json; heldout.jsonl, the problems of the evaluation; prepared.json, the record.
"""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

from common import run
from common.run import UserError

import numpy as np
import torch

import data
from corpora.prepared import read_json_lines
from textbooks import benchmarks, clean, exercises, inside, quality, texts, writer
from tokenizer import END_OF_TEXT, BytePairs

ARMS = ("raw", "textbook", "generated", "filtered", "functions", "all-functions", "raw4")
OF_FUNCTIONS = ("filtered", "functions", "all-functions")  # these have functions of raw Python, each of them once
MORE = 4  # raw4 has MORE times the tokens
HELD_OUT_PER_LEVEL = 30
MIN_EXERCISES = 20  # of which some are copies, and two or more are for the validation loss
VAL_SHARE = 0.04  # of the documents of an arm, for its validation loss
CHARACTERS = 5  # more characters than a token has


def prepare(args, work: Path) -> dict:
    """Write the data of all arms below `work` and return the record. Raises UserError."""
    index, benchmark = benchmark_index(run.data_dir(args.data_dir), args.quick)
    sources = read_sources(args)
    held_out, rows = draw_exercises(args)
    written = None
    if args.writer:
        more_rows, more_pages, written = writer.write(args.writer, args.write, args.seed)
        rows = more_rows + rows
        sources["generated"] = more_pages + sources.get("generated", [])
    clean_rows = [row for row in rows if index.find(row["prompt"] + row["completion"]) is None]
    removed = {"exercises": {"passages": len(rows), "removed": len(rows) - len(clean_rows)}}
    if len(clean_rows) < MIN_EXERCISES // 2:
        raise UserError(f"--exercises {args.exercises}: only {len(clean_rows)} are left without copies; ask for more")
    documents = {}
    for name, texts_of_source in sources.items():
        print(f"{name}: looking for copies of the evaluation sets in {len(texts_of_source):,} documents", flush=True)
        longest = CHARACTERS * args.tokens * (MORE if name == "raw" else 1)
        documents[name], removed[name] = clean.decontaminate(up_to(texts_of_source, longest), index)
    solved = [row["prompt"] + row["completion"] for row in clean_rows]
    print(f"byte pairs: learning {args.vocabulary:,}", flush=True)
    sample = sample_size(args.vocabulary, args.tokens)
    mixture = [cut(texts_of_source, sample) for texts_of_source in (*documents.values(), solved)]
    tokenizer = train_tokenizer("\n".join(mixture), args.vocabulary)
    record = {
        "arms": {},
        "removed": removed,
        "benchmark": benchmark,
        "vocabulary": tokenizer.vocab_size,
        "written": written,
    }
    arms = {}  # {arm: (documents for validation, documents to train on)}
    for name, texts_of_source in (documents | {"raw4": documents["raw"]}).items():
        n_val = max(1, int(VAL_SHARE * len(texts_of_source)))
        arms[name] = texts_of_source[:n_val], texts_of_source[n_val:]
    if set(OF_FUNCTIONS) & set(args.arms):
        val_documents, train_documents = arms["raw"]
        functions = distinct_functions(train_documents)
        if not functions:
            raise UserError("the modules to train on have no function with a docstring; name more of them with --raw")
        modules_of_raw = up_to(train_documents, args.tokens, size=lambda module: count_tokens(module, tokenizer))
        arms["all-functions"] = val_documents, texts.in_random_order(functions)
        arms["functions"] = val_documents, texts.in_random_order(distinct_functions(modules_of_raw))
    if "filtered" in args.arms:
        print(f"quality filter: ranking {len(functions):,} functions", flush=True)
        ranked, record["filter"] = quality.rank(functions, args.embeddings)
        arms["filtered"] = val_documents, ranked
    for name in args.arms:
        record["arms"][name] = write_arm(work, name, *arms[name], args.tokens, tokenizer, solved)
    record["exercises"] = write_exercises(work, clean_rows, tokenizer) | {"held_out": len(held_out), "seed": args.seed}
    write_held_out(work / "heldout.jsonl", held_out)
    record |= run.environment(torch.device("cpu"), str(Path(__file__).parent.parent / "phi1.py"))
    run.write_json(work / "prepared.json", record)
    return record


def distinct_functions(modules: list[str]) -> list[str]:
    """The functions of modules, each text once."""
    found = itertools.chain.from_iterable(map(quality.functions, modules))
    return list(dict.fromkeys(found))


def read_sources(args) -> dict[str, list[str]]:
    """{source: its documents} of the arms that are asked for."""
    sources = {"raw": texts.standard_library(Path(args.raw) if args.raw else None)}
    if "textbook" in args.arms:
        sources["textbook"] = pages(run.data_dir(args.data_dir), args.quick)
    if "generated" in args.arms:
        sources["generated"] = texts.generated(CHARACTERS * args.tokens, args.seed)
    if args.quick:
        sources["raw"] = sources["raw"][:40]
    return sources


def draw_exercises(args) -> tuple[list[exercises.Exercise], list[dict]]:
    """(exercises held out for the evaluation, rows of exercises to train on)"""
    count = HELD_OUT_PER_LEVEL * len(exercises.LEVELS)
    if args.quick:
        count //= 5
    held_out = exercises.generate(count, 0, held_out=True)
    drawn = exercises.generate(args.exercises, args.seed, exclude={exercise.prompt for exercise in held_out})
    return held_out, [{"prompt": exercise.prompt, "completion": exercise.completion} for exercise in drawn]


def write_arm(work: Path, name: str, val_documents, train_documents, budget: int, tokenizer, solved: list[str]) -> dict:
    """Write train.bin and val.bin of an arm. Returns its entry in the record. solved: the exercises with their
    solutions. Raises UserError if the documents have too few tokens."""
    wanted = budget * MORE if name == "raw4" else budget
    train_ids = tokens_of(train_documents, tokenizer, wanted)
    val_ids = tokens_of(val_documents, tokenizer, max(200, budget // 40))
    distinct = len(train_ids)
    if name == "functions" and distinct:  # whole modules have more tokens than their functions, which are repeated
        train_ids = np.resize(train_ids, wanted)
    if len(train_ids) < wanted:
        raise UserError(f"{name}: has {len(train_ids):,} tokens, but --tokens needs {wanted:,}; ask for fewer")
    folder = write_folder(work / "data" / name, tokenizer)
    run.write(folder / "train.bin", train_ids.astype("<u2").tobytes())
    run.write(folder / "val.bin", val_ids.astype("<u2").tobytes())
    text = tokenizer.decode(train_ids.tolist())
    shared = clean.overlap(solved, [text])
    print(f"{name:>13}: {wanted:12,} tokens, {len(text):12,} characters; {shared:.2%} of the exercises' 8-grams")
    return {
        "tokens": wanted,
        "distinct_tokens": distinct,
        "val_tokens": len(val_ids),
        "characters": len(text),
        "overlap_with_exercises": shared,
    }


def write_exercises(work: Path, rows: list[dict], tokenizer: BytePairs) -> dict:
    """Write train.jsonl and val.jsonl. Returns counts for the record."""
    n_val = max(2, len(rows) // 20)
    folder = write_folder(work / "data" / "exercises", tokenizer)
    for part, part_rows in (("train", rows[n_val:]), ("val", rows[:n_val])):
        run.write(folder / f"{part}.jsonl", "".join(json.dumps(row) + "\n" for row in part_rows))
    longest = max(len(tokenizer.encode(row["prompt"] + row["completion"])) + 1 for row in rows)
    return {"train": len(rows) - n_val, "val": n_val, "longest": longest}


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


def up_to(documents: list[str], most: int, size=len) -> list[str]:
    """The first documents, up to a total size of `most` or one document more. size(document): by default its number of
    characters."""
    total = 0
    first = []
    for document in documents:
        if total >= most:
            break
        first.append(document)
        total += size(document)
    return first


def cut(documents: Iterable[str], characters: int) -> str:
    return "\n".join(up_to(list(documents), characters))[:characters]


def sample_size(vocabulary: int, tokens: int) -> int:
    """How many characters of each source the byte pairs are learned from: more for a large vocabulary, at most about as
    many as are trained on, and never very few."""
    return max(20_000, min(600 * vocabulary, 3 * tokens))


def train_tokenizer(text: str, size: int) -> BytePairs:
    """Byte pairs of a text, with the end token as the last of `size` tokens."""
    state = BytePairs.train(text, size - 1).state()
    return BytePairs.of([*state["vocabulary"], END_OF_TEXT], [tuple(pair.split(" ")) for pair in state["merges"]])


def count_tokens(document: str, tokenizer: BytePairs) -> int:
    """How many tokens a document has in an arm, with the end token."""
    return len(tokenizer.encode(document)) + 1


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
