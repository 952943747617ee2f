"""The command line: shared flags, recipes, and the arguments of a run that is resumed."""

import argparse
import json
import os
import sys
from pathlib import Path

from common.arguments import AUTO, ROOT, path_arg
from common.records import read_json, read_record
from common.terminal import UserError


def short(text):
    """`text` for a message: only its beginning if it is long."""
    return text if len(text) <= 80 else text[:77] + "..."


def number(kind, low, inclusive):
    """An argparse type: a finite float, or an int below 2**31, of at least `low` or above it."""
    word, high = ("whole number", 2**31 - 1) if kind is int else ("number", sys.float_info.max)

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{short(text)!r} is not a {word}") from None
        text = short(text)
        if not (value >= low if inclusive else value > low):
            raise argparse.ArgumentTypeError(f"{text} is not {'at least' if inclusive else 'above'} {low}")
        if value > high:
            raise argparse.ArgumentTypeError(f"{text} is above the maximum, {high}")
        return value

    return parse


positive_int, nonnegative_int = number(int, 0, inclusive=False), number(int, 0, inclusive=True)
positive_float, nonnegative_float = number(float, 0, inclusive=False), number(float, 0, inclusive=True)


def threads_arg(text):
    """An argparse type: a number of threads, or "auto"."""
    return text if text == "auto" else positive_int(text)


# The same flag means the same thing in every script; a script offers those that it reads.
FLAGS = {
    "data": dict(metavar="NAME|PATH"),
    "data_dir": dict(type=path_arg, metavar="DIR", help="folder of the datasets (default: $DATA_DIR, else data/)"),
    "out": dict(
        type=path_arg, metavar="DIR", help="run folder (default: the first free out/FOLDER/DATA-MODEL-sSEED-N)"
    ),
    "resume": dict(type=path_arg, metavar="DIR", help="continue the run in DIR; `auto`: the one in --out, if any"),
    "recipe": dict(help="a named set of hyper-parameters; flags override it"),
    "set": dict(action="append", metavar="NAME=VALUE", help="change one key of the recipe (repeatable)"),
    "epochs": dict(type=positive_int, metavar="N", help="passes over the training set"),
    "iters": dict(type=positive_int, metavar="N", help="training steps"),
    "bs": dict(type=positive_int, metavar="N", help="batch size: examples of one optimizer step"),
    "lr": dict(type=positive_float, metavar="X", help="learning rate (the peak of a schedule)"),
    "weight_decay": dict(type=nonnegative_float, metavar="X", help="weight decay (L2 penalty)"),
    "seed": dict(type=nonnegative_int, metavar="N", default=0, help="initial weights, data order, augmentation"),
    "device": dict(choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: cuda, else mps, else cpu"),
    "precision": dict(choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 if it is known to be faster"),
    "threads": dict(type=threads_arg, default="auto", metavar="N", help="CPU threads; auto: as many as it gains from"),
    "tensorboard": dict(action="store_true", help="write the metrics as event files too, for tensorboard --logdir out"),
    "limit": dict(type=positive_int, metavar="N", help="only the first N examples of each part, for a quick look"),
}


def add_flags(parser, *names, **changes):
    """Add the shared flags `names` to `parser`; a keyword names one too, with options that differ."""
    for name in (*names, *changes):
        options = FLAGS[name] | changes.get(name, {})
        if options.get("default") is not None:
            options["help"] = f"{options.get('help', '')} (default: %(default)s)".strip()
        parser.add_argument("--" + name.replace("_", "-"), **options)


def parse(script, parser, argv=None, recipe=None, check=None, extendable=lambda args: False):
    """Parse the command line of the script whose path is `script`.

    recipe(args) returns a dict of hyper-parameters; flags override it, and --set changes its keys. check(args) comes
    last. Both may raise UserError if arguments do not fit together. With --resume DIR, the arguments come from DIR's
    run.json and pass the same checks. A flag that differs is an error that names it, except a larger --epochs or
    --iters if extendable(args) is true.
    """
    complete = Completion(parser, recipe or (lambda args: {}), check or (lambda args: None))
    args, unset = parser.parse_args(argv), object()
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset) | {"set": None}))
    given = {name: value for name, value in vars(given).items() if value is not unset}
    if getattr(args, "resume", None) == "auto":
        if not args.out:
            parser.error("--resume auto: name the run folder with --out DIR")
        args.resume = args.out if (Path(args.out) / "run.json").exists() else None
        if args.resume:  # the same command again: each of its arguments must equal the run's
            given = vars(complete(argparse.Namespace(**vars(args))))
    if not getattr(args, "resume", None):
        return complete(args)
    folder = Path(args.resume)
    if given.get("out") and Path(given["out"]).resolve() != folder.resolve():
        parser.error(f"--out {given['out']}: a resumed run stays in its folder, {folder}")
    try:
        args = complete.resumed(folder, Path(script).resolve().parent.name, given)
    except UserError as error:
        parser.error(f"--resume {folder}: {error}")
    for name, new in given.items():
        old = getattr(args, name, None)
        if name in ("out", "resume", "data_dir", "set") or new == old or (name, new) in AUTO:
            continue
        if not (name in ("epochs", "iters") and new > old and extendable(args)):
            parser.error(f"--{name.replace('_', '-')} {new}: the run in {folder} has {old}")
        setattr(args, name, new)
    for name, new in complete.changes(given.get("set"), vars(args)):
        if new != look_up(vars(args), name):
            parser.error(f"--set {name}={json.dumps(new)}: the run in {folder} has {look_up(vars(args), name)}")
    return args


class Completion:
    """How arguments are completed: from the recipe with the changes of --set, or from the record of a run."""

    def __init__(self, parser, recipe, check):
        self.parser, self.recipe, self.check = parser, recipe, check

    def __call__(self, args):
        try:
            values = json.loads(json.dumps(self.recipe(args)))  # a copy, as a record will have it
            for name, value in self.changes(getattr(args, "set", None), values):
                outer, _, key = name.rpartition(".")
                look_up(values, outer)[key] = value
            for name, value in values.items():
                if getattr(args, name, None) is None:
                    setattr(args, name, value)
            self.check(args)
        except UserError as error:
            self.parser.error(str(error))
        return args

    def changes(self, texts, values):
        """Yield (NAME, value) for every NAME=VALUE in `texts`. NAME, with dots for nested keys, must be a key of
        `values`, and the value must be of the same type."""
        for text in texts or []:
            name, equals, word = text.partition("=")
            outer, _, key = name.rpartition(".")
            group = look_up(values, outer)
            if not equals or not isinstance(group, dict) or key not in group:
                known = ", ".join(sorted(group if isinstance(group, dict) else values))
                self.parser.error(f"--set {short(text)}: must be NAME=VALUE with NAME one of {known}")
            try:
                yield name, self.convert(name, word, group[key])
            except (argparse.ArgumentTypeError, ValueError) as error:
                self.parser.error(f"--set {short(text)}: {error}")

    def convert(self, name, word, old):
        """The value that `word` stands for: checked like a value of the flag `name`, or else of the type of `old`."""
        try:
            value = json.loads(word)
        except (ValueError, RecursionError):
            value = word  # a string without quotes
        flag = next((action for action in self.parser._actions if action.dest == name and action.nargs != 0), None)
        if flag and value is not None:
            value = flag.type(word) if flag.type else value
            if flag.choices and value not in flag.choices:
                raise ValueError(f"must be one of {', '.join(flag.choices)}")
            return value
        value = float(value) if isinstance(old, float) and type(value) is int else value
        finite = not isinstance(value, float) or abs(value) <= sys.float_info.max
        if not finite or None not in (old, value) and type(value) is not type(old):
            raise ValueError(f"must be of the same type as {json.dumps(old)}")
        return value

    def resumed(self, folder, experiment, given):
        """The arguments of the run in `folder`, validated. Raises UserError."""
        file, local = folder / "run.json", folder / "local.json"
        record = read_record(file)
        if record["experiment"] != experiment:
            raise UserError(f"{file}: holds a run of {record['experiment']}/")
        saved, place = record["args"], read_json(local) if local.exists() else {}
        where = {"data": None, "data_dir": given.get("data_dir") or place.get("data_dir")}
        if str(saved.get("data", "")).startswith("./"):
            new = str(given.get("data", ""))
            where["data"] = new if os.path.isabs(new) else place.get("data") or str(ROOT / saved["data"])
        for name, path in where.items():
            if path is not None and not os.path.exists(str(path)):
                raise UserError(f"its data is gone from {path}; name the new place with --{name.replace('_', '-')}")

        def refuse(message):
            raise UserError(f"{file}: {message}")

        self.parser.error = refuse
        try:
            words = to_argv(self.parser, saved | ({"data": where["data"]} if where["data"] else {}))
            args = self(self.parser.parse_args(words))
            now = record_args(args) | ({"data": saved["data"]} if "data" in saved else {})  # it may have moved
            for name in sorted(now.keys() | saved.keys()):
                if name not in saved or name not in now or now[name] != saved[name]:
                    refuse(f"has an invalid --{name.replace('_', '-')}: {str(saved.get(name)):.60}")
        finally:
            del self.parser.error
        args.resume, args.data_dir = str(folder), where["data_dir"] and str(where["data_dir"])
        return args


def look_up(values, name):
    """values["a"]["b"] for the name "a.b"; None if there is no such key."""
    for part in filter(None, name.split(".")):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def to_argv(parser, values: dict) -> list[str]:
    """The command line that sets `values`: flags if `parser` has them, --set for keys of the recipe."""
    actions, words = {}, []
    for action in parser._actions:  # the first flag of a name: --augment, and not --no-augment
        actions.setdefault(action.dest, action)
    for name, value in values.items():
        action = actions.get(name) if name != "help" else None
        flag = action.option_strings[0] if action else None
        if action is None:
            nested = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
            words += [word for k, v in nested.items() for word in ("--set", f"{k}={json.dumps(v)}")]
        elif action.nargs == 0:  # a switch, --name or --no-name
            negative = f"--no-{flag[2:]}"
            words += [flag] if value else [negative] * (value is False and negative in action.option_strings)
        elif value is not None:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return words


def record_args(args) -> dict:
    """The arguments for a record: all but the paths of this machine."""
    values = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "data_dir", "set")}
    if os.path.isabs(str(values.get("data", ""))):
        values["data"] = "./" + Path(os.path.relpath(values["data"], ROOT)).as_posix()
    return json.loads(json.dumps(values))


def data_dir(given=None) -> Path:
    """The folder of datasets: --data-dir, else $DATA_DIR, else data/ beside the experiment's folder."""
    return Path(given or os.environ.get("DATA_DIR") or ROOT / "data")
