"""The arguments of a script: from the command line over a recipe, or from the record of the run that it resumes."""

import argparse
import ast
import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from common.options import applies, as_dict, flag, make_parser, option, options_of, own_names, short
from common.records import read_json, read_record, recorded_args
from common.terminal import UserError, printable

ROOT = Path(__file__).resolve().parent.parent  # the repository, or an exported folder
AUTO = ("data", "auto"), ("model", "auto")  # values that a run resolves
PLACES = ("out", "resume", "data_dir")  # where things lie on this machine: not in a record


def path_arg(text):
    """An argparse type: a path. An empty one, from a shell variable that is not set, is an error."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def dataset_arg(*names, files=False):
    """An argparse type for --data: one of `names`, or a folder (with `files` also a file) as an absolute path."""

    def parse(text):
        if text in names:
            return text
        if text.strip() and (os.path.isdir(text) or files and os.path.isfile(text)):
            return os.path.abspath(text)
        kinds = "a file or folder" if files else "a folder"
        raise argparse.ArgumentTypeError(f"{short(text)!r} is neither {', '.join(names)} nor {kinds}")

    return parse


def threads_arg(text):
    """An argparse type: a number of threads, or "auto"."""
    if text == "auto":
        return text
    if not text.isdecimal() or not 0 < int(text) < 10_000:
        raise argparse.ArgumentTypeError(f"{short(text)!r} is neither auto nor a positive whole number")
    return int(text)


def data_dir_option():
    return option(None, "folder of the datasets (default: $DATA_DIR, else data/)", type=path_arg, metavar="DIR")


def device_option():
    return option("auto", "auto: cuda, else mps, else cpu", choices=["auto", "cpu", "cuda", "mps"])


def threads_option():
    return option("auto", "CPU threads; auto: as many as the script gains from", type=threads_arg, metavar="N")


def precision_option():
    return option("auto", "auto: bf16 if it is known to be faster", choices=["auto", "fp32", "bf16"])


@dataclass(kw_only=True)
class ScriptOptions:
    """The options of a script. `check` raises UserError if values of several fields do not fit together."""

    variant: ClassVar[str | None] = None  # the field on which other options depend

    def check(self):
        pass


@dataclass(kw_only=True)
class RunOptions(ScriptOptions):
    """The options of every script that makes a run folder."""

    data: str = option("auto", "the dataset", metavar="NAME|PATH")
    out: str | None = option(
        None,
        "run folder (default: the first free out/FOLDER/DATA-MODEL-sSEED-N)",
        type=path_arg,
        metavar="DIR",
    )
    resume: str | None = option(
        None, "continue the run in DIR; `auto`: the one in --out, if any", type=path_arg, metavar="DIR"
    )
    seed: int = option(0, "initial weights, data order, augmentation", at_least=0)
    tensorboard: bool = option(False, "write the metrics as event files too, for tensorboard --logdir out")


@dataclass(kw_only=True)
class TrainOptions(RunOptions):
    """The options of most scripts that train a network."""

    data_dir: str | None = data_dir_option()
    device: str = device_option()
    threads: int | str = threads_option()
    precision: str = precision_option()
    limit: int | None = option(None, "only the first N examples of each part, for a quick look", above=0)


def parse_options(script, cls, argv=None, recipe=None, extendable=lambda options: False):
    """The options of the script whose path is `script`: an instance of the dataclass `cls`.

    recipe: a function of the flags on the command line, {name: value}, that returns the instance which they override;
    None: the defaults of the fields. With --resume DIR, the options are those in DIR's run.json. A flag that differs
    from the run's is an error that names it, except a larger --epochs or --iters if extendable(options) holds.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    recipe = recipe or (lambda given: cls())
    parser = make_parser(cls)
    if "-h" in argv or "--help" in argv:
        docstring = ast.get_docstring(ast.parse(Path(script).read_text(encoding="utf-8")))
        try:
            base = recipe(peek(cls, argv))
        except UserError as error:
            parser.error(printable(error))
        make_parser(cls, base, docstring).parse_args(argv)
    given = vars(parser.parse_args(argv))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    try:
        if given.get("resume") == "auto":
            if "out" not in given:
                raise UserError("--resume auto: name the run folder with --out DIR")
            given["resume"] = given["out"] if (Path(given["out"]) / "run.json").exists() else None
            if given["resume"]:  # the same command again: each of its options must equal the run's
                given = as_dict(complete(recipe(given), given))
        if not given.get("resume"):
            return complete(recipe(given), given)
        return resumed(cls, Path(script).resolve().parent.name, given, extendable)
    except UserError as error:
        parser.error(printable(error))


def peek(cls, argv) -> dict:
    """The flags in `argv` on which the defaults depend, for --help alone. A wrong value counts as none."""
    parser = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    for name in ("recipe", "data", cls.variant or "model"):
        if name in options_of(cls):
            parser.add_argument(flag(name), nargs="?")
    seen = vars(parser.parse_known_args(argv)[0])
    choices = {name: options_of(cls)[name].settings["choices"] for name in seen}
    return {name: value for name, value in seen.items() if choices[name] is None or value in choices[name]}


def complete(base, given: dict):
    """The instance `base` with the values `given`, checked. Raises UserError."""
    options = dataclasses.replace(base, **given)
    for name in given:
        if not applies(options, name):
            raise UserError(f"{flag(name)}: {getattr(options, options.variant)} has no such option")
    options.check()
    return options


def resumed(cls, experiment: str, given: dict, extendable):
    """The options of the run in the folder given["resume"]. Raises UserError."""
    folder = Path(given["resume"])
    if given.get("out") and Path(given["out"]).resolve() != folder.resolve():
        raise UserError(f"--out {given['out']}: a resumed run stays in its folder, {folder}")
    try:
        record = read_record(folder / "run.json")
        if record["experiment"] != experiment:
            raise UserError(f"{folder / 'run.json'}: holds a run of {record['experiment']}/")
        places = where_data_lie(folder, record, given)
        options = recorded_options(cls, record, folder / "run.json", places["data"])
    except UserError as error:
        raise UserError(f"--resume {folder}: {error}") from error
    options.resume = str(folder)
    if "data_dir" in options_of(cls):
        options.data_dir = places["data_dir"]
    for name, new in given.items():
        old = getattr(options, name)
        if name in PLACES or new == old or (name, new) in AUTO:
            continue
        longer = name in ("epochs", "iters") and new > old
        if not (longer and extendable(options)):
            raise UserError(f"{flag(name)} {new}: the run in {folder} has {old}")
        setattr(options, name, new)
    return options


def where_data_lie(folder: Path, record: dict, given: dict) -> dict:
    """{"data": the path of the user's own data or None, "data_dir": ...} of the run in `folder`: as given now, or as
    they were. Raises UserError if they are gone."""
    local = folder / "local.json"
    before = read_json(local) if local.exists() else {}
    places = {"data": None, "data_dir": given.get("data_dir") or before.get("data_dir")}
    recorded = str(record["args"].get("data", ""))
    if recorded.startswith("./"):
        now = str(given.get("data", ""))
        places["data"] = now if os.path.isabs(now) else before.get("data") or str(ROOT / recorded)
    for name, path in places.items():
        if path is not None and not os.path.exists(str(path)):
            raise UserError(f"its data is gone from {path}; name the new place with {flag(name)}")
    return {name: path and str(path) for name, path in places.items()}


def recorded_options(cls, record: dict, path: Path, data: str | None = None):
    """The options in the record of a run, checked as on the command line: an instance of `cls`.

    An option that is newer than the record has its default, which is said on standard error. path: the record's, for
    messages. data: the path that takes the place of the recorded one, which is relative to the repository; None: the
    recorded one, unchecked. Raises UserError.
    """
    known = options_of(cls)
    recorded = recorded_args(record["args"])
    values = {}
    for name, value in recorded.items():
        if name not in known or name in PLACES:
            raise UserError(f"{path}: has an unknown option {flag(short(name))}")
        if name == "data" and data is not None:
            value = data
        elif name == "data" and str(value).startswith("./"):  # which the caller need not have any more
            values[name] = str(value)
            continue
        if value is None and known[name].settings["only"]:
            continue  # older records have None if the option does not exist for the variant
        try:
            values[name] = known[name].check(value)
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise UserError(f"{path}: has an invalid {flag(name)}: {short(recorded[name])} ({short(error)})") from error
    options = cls(**values)
    for name in known:
        if name in values and not applies(options, name):
            raise UserError(f"{path}: has an invalid {flag(name)}: {getattr(options, cls.variant)} has no such option")
        if name not in values and name not in PLACES and applies(options, name):
            if name in record.get("options", []):
                raise UserError(f"{path}: is damaged: it has no {flag(name)}")
            if name in own_names(cls):  # the others, such as --threads, change no result
                print(f"{path}: has no {flag(name)}, which is newer; it is {getattr(options, name)}", file=sys.stderr)
    try:
        options.check()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return options


def defaults_of(options) -> dict:
    """{name: default} of all options, for those that are newer than a record."""
    return {name: item.default for name, item in options_of(type(options)).items()}


def record_args(options) -> dict:
    """What a record keeps of the options: all that exist for the model, but not where things lie on this machine."""
    values = {name: value for name, value in as_dict(options).items() if name not in PLACES}
    if os.path.isabs(str(values.get("data", ""))):
        values["data"] = path_for_record(values["data"])
    return json.loads(json.dumps(values))


def path_for_record(path: str | Path) -> str:
    """`path` relative to the repository, as ./PATH; of a path on another drive, the name alone."""
    try:
        return "./" + Path(os.path.relpath(path, ROOT)).as_posix()
    except ValueError:
        return f"./{Path(path).name}"


def data_place(folder: Path, data: str) -> str:
    """The path of a run's data on this machine. The record of the run in `folder` has a path of the user's own relative
    to the repository, and local.json has where it was. Any other name stays as it is."""
    if not data.startswith("./"):
        return data
    local = folder / "local.json"
    before = read_json(local).get("data") if local.exists() else None
    return str(before or ROOT / data)


def data_dir(given=None) -> Path:
    """The folder of datasets: --data-dir, else $DATA_DIR, else data/ beside the experiment's folder."""
    return Path(given or os.environ.get("DATA_DIR") or ROOT / "data")


def check_dataset(where: Path, recorded: dict | None, found: dict):
    """Raise UserError if the dataset `found` is not the one `recorded` in the run `where`: training images may be test
    images now. Both are the dataset's entry in run.json."""
    before, now = (recorded or {}).get("digest"), found.get("digest")
    if before and now and before != now:
        raise UserError(f"{where}: was trained on other data than are in their place now")


def is_finished(folder: Path, args) -> bool:
    """Has the run in `folder` ended, done or diverged? A run with other arguments than `args` is a UserError."""
    file = Path(folder) / "run.json"
    if not file.exists():
        return False
    record = read_record(file)
    arguments = record_args(args)
    recorded = defaults_of(args) | record["args"]
    for name in sorted(arguments.keys() | record["args"].keys()):
        if recorded.get(name) != arguments.get(name) and (name, arguments.get(name)) not in AUTO:
            raise UserError(f"{folder}: holds a run with another --{name.replace('_', '-')}; name another --out")
    return record["state"] in ("done", "diverged")


def run_title(record: dict) -> str:
    """What is trained on what, for the title of a figure: model, dataset, recipe and seed in the record of a run."""
    args = record["args"]
    kinds = [args[name] for name in ("model", "kind", "method") if isinstance(args.get(name), str)]
    model = " ".join(dict.fromkeys(kinds)) or record["experiment"]
    dataset = (record.get("dataset") or {}).get("name")
    title = f"{model} on {dataset}" if dataset else model
    return ", ".join([title, *(f"{name} {args[name]}" for name in ("recipe", "seed") if name in args)])
