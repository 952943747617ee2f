"""Records, run.json: validated, and old ones read under today's names. Standard library only."""

import json
import re
from pathlib import Path

from common.terminal import UserError

FORMAT = 2  # of run folders; older ones cannot be resumed


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises UserError."""
    try:
        if path.exists() and not path.is_file():  # a FIFO would wait for ever
            raise OSError(0, "not a regular file")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not JSON'})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object")
    return content


def read_record(path: Path) -> dict:
    """The run.json at `path`, validated. Raises UserError."""
    record = read_json(path)
    git = record.get("git")
    commit = git.get("commit") if isinstance(git, dict) else None
    if record.get("format") != FORMAT:
        raise UserError(f"{path}: was written by another version; continue it with commit {commit or 'unknown'}")
    kinds = {"experiment": str, "args": dict, "state": str, "device": dict, "wall_s": int | float, "resumed": int}
    wrong = [name for name, kind in kinds.items() if not isinstance(record.get(name), kind)]
    threads = None if "device" in wrong else record["device"].get("threads")
    if type(threads) is not int or not 0 < threads < 10_000:
        wrong.append("device.threads")
    if git is not None and not re.fullmatch("[0-9a-f]{40,64}", str(commit)):
        wrong.append("git")
    if "wall_s" not in wrong and not 0 <= record["wall_s"] < 1e12:
        wrong.append("wall_s")
    if record.get("precision") not in ("fp32", "bf16", "fp64"):
        wrong.append("precision")
    if not isinstance(record.get("dataset", {}), dict):
        wrong.append("dataset")
    if not isinstance(record.get("final") or {}, dict):
        wrong.append("final")
    if not isinstance(record.get("script", ""), str):
        wrong.append("script")
    if wrong:
        raise UserError(f"{path}: is damaged (not valid: {', '.join(wrong)})")
    return record


def runs_by_age(place: Path) -> list[tuple[Path, dict]]:
    """(folder, record) of every run in the folder `place`, the newest last. Records that are damaged, or of another
    version, are left out."""
    found = []
    for file in place.glob("*/run.json"):
        try:
            found.append((file.stat().st_mtime, file.parent, read_record(file)))
        except (OSError, UserError):
            pass
    found.sort(key=lambda entry: entry[:2])
    return [(folder, record) for _, folder, record in found]


SECONDS = (  # a metrics.csv has one of these columns
    "epoch_seconds",  # of the training in this epoch
    "training_seconds",  # of the training so far, without evaluations
    "elapsed_seconds",  # of the training so far, with evaluations
)


def seconds_of(row: dict) -> float:
    """The seconds in a row of metrics.csv. Older code called each of the columns SECONDS `seconds`."""
    return float(next(row[name] for name in (*SECONDS, "seconds") if name in row))


OLD_METRICS = {"chance": "order_precision"}  # with any prefix: shuffled_chance is shuffled_order_precision


def recorded_metrics(metrics: dict) -> dict:
    """The metrics in a committed record, or its whole row, under today's names."""
    renamed = {}
    for name, value in metrics.items():
        prefix, joint, metric = name.rpartition("_")
        renamed[prefix + joint + OLD_METRICS.get(metric, metric)] = value
    return renamed


def recorded_args(args: dict) -> dict:
    """The arguments in a committed record under today's names and meanings."""
    args = dict(args)
    if isinstance(args.get("model"), dict):  # the shape of a language model
        args |= args.pop("model")
    if "l2" in args:
        args["weight_decay"] = args.pop("l2")
    if isinstance(args.get("augment"), bool):
        args["augment"] = "crop+flip" if args["augment"] else "none"
    if args.get("shortcut", "") is None:  # of a network that has no such option
        del args["shortcut"]
    sizes = args.get("sizes")
    if isinstance(sizes, list) and sizes and all(isinstance(entry, list) and len(entry) == 2 for entry in sizes):
        del args["sizes"]  # [[share of the run from which on, pixels], ...]: one, or one for each half
        args |= {"size": sizes[-1][1], "first_size": sizes[0][1] if len(sizes) > 1 else None}
    if type(args.get("accumulate")) is int and type(args.get("bs")) is int:
        steps = args.pop("accumulate")
        if "iters" in args:  # language models counted a micro-batch
            args["bs"] *= steps
        args["micro_batch"] = args["bs"] // steps if steps > 1 else None
    return args
