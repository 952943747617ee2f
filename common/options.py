"""The options of a script: one dataclass with a field per option, from which the command line and the checks are made.

    @dataclass(kw_only=True)
    class Options(TrainOptions):
        model: str = option("lenet5", "the network", choices=["lenet5", "simplenn"])
        lr: float = option(0.001, "learning rate", above=0)
        bn: bool = option(False, "batch normalization", only="simplenn")
        variant: ClassVar[str] = "model"  # `only` names values of this field

Every field is a flag: --lr 0.1, --bn, --no-bn. A recipe is an instance: `replace(PLAIN, lr=0.1)`; flags override it.
"""

import argparse
import dataclasses
import functools
import inspect
import sys
import types
import typing

LARGEST_INT = 2**31 - 1


def option(
    default,
    help: str,
    *,
    above=None,
    at_least=None,
    at_most=None,
    below=None,
    choices=None,
    only=(),
    type=None,
    metavar=None,
    names=(),
    off=None,
    positional=False,
    **argparse_options,
):
    """A field of a dataclass of options.

    above, at_least, at_most, below: bounds of a number, or of each number of a tuple. choices: the values allowed.
    only: the values of the field `variant` for which the option exists; (): all. type: a function that checks and
    converts a text, as argparse has it; None: by the annotation. names: more names of the flag, such as "--l2".
    off: the value that --no-NAME stands for. positional: an argument without a flag. argparse_options: passed on to
    add_argument.
    """
    settings = {
        "help": help,
        "above": above,
        "at_least": at_least,
        "at_most": at_most,
        "below": below,
        "choices": choices,
        "only": (only,) if isinstance(only, str) else tuple(only),
        "type": type,
        "metavar": metavar,
        "names": list(names),
        "off": off,
        "positional": positional,
        "argparse": argparse_options,
    }
    return dataclasses.field(default=default, metadata=settings)


def flag(name: str) -> str:
    """The flag of the option `name`: --weight-decay for weight_decay."""
    return "--" + name.replace("_", "-")


def short(text) -> str:
    """`text` for a message: its beginning, if it is long."""
    text = str(text)
    return text if len(text) <= 80 else text[:77] + "..."


# ------------------------------------------------------------------------------------------------ one option, checked


class Option:
    """A field with its type: checks a text of the command line, or a value of a record."""

    def __init__(self, field: dataclasses.Field, hint):
        self.name = field.name
        self.default = field.default
        self.settings = field.metadata
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        self.optional = type(None) in members
        kind = next(member for member in members if member is not type(None))
        items = typing.get_args(kind)
        self.count = None  # how many values it takes: None for a plain value, "*" for any number
        if items:
            self.count = "*" if items[-1] is Ellipsis else len(items)
            kind = items[0]
        self.kind = kind

    def convert(self, text: str):
        """The value of `text`; of one item, if the option is a tuple. Raises ArgumentTypeError or ValueError."""
        if self.settings["type"]:
            return self.settings["type"](text)
        if self.optional and text == "none":
            return None
        value = self.number(text) if self.kind in (int, float) else text
        choices = self.settings["choices"]
        if choices is not None and value not in choices:
            raise argparse.ArgumentTypeError(f"{short(text)!r} is not one of {', '.join(map(str, choices))}")
        return value

    def number(self, text: str) -> int | float:
        word, largest = ("whole number", LARGEST_INT) if self.kind is int else ("number", sys.float_info.max)
        try:
            value = self.kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{short(text)!r} is not a {word}") from None
        above, at_least, at_most, below = (self.settings[name] for name in ("above", "at_least", "at_most", "below"))
        if above is not None and not value > above:
            raise argparse.ArgumentTypeError(f"{short(text)} is not above {above}")
        if at_least is not None and not value >= at_least:
            raise argparse.ArgumentTypeError(f"{short(text)} is not at least {at_least}")
        if at_most is not None and not value <= at_most:
            raise argparse.ArgumentTypeError(f"{short(text)} is not at most {at_most}")
        if below is not None and not value < below:
            raise argparse.ArgumentTypeError(f"{short(text)} is not below {below}")
        if value != value:
            raise argparse.ArgumentTypeError(f"{short(text)!r} is not a number")
        if abs(value) > largest:
            raise argparse.ArgumentTypeError(f"{short(text)} is above the maximum, {largest}")
        return value

    def check(self, value):
        """The value in a record, checked as the flag's value is. Raises ValueError or ArgumentTypeError."""
        if value is None and self.optional:
            return None
        if self.count is not None:
            if not isinstance(value, list | tuple) or self.count not in ("*", len(value)):
                raise ValueError("must be a list")
            return tuple(self.check_item(item) for item in value)
        return self.check_item(value)

    def check_item(self, value):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if self.settings["type"] and (number or isinstance(value, str)):
            converted = self.settings["type"](str(value))
            if converted != value:
                raise ValueError("is another value")
            return converted
        if self.kind is bool and isinstance(value, bool):
            return value
        if self.kind is str and isinstance(value, str) or self.kind is float and number or self.kind is type(value):
            return self.convert(str(value))
        raise ValueError(f"is not of the type {self.kind.__name__}")

    def add_to(self, parser, shown=None):
        """Add the flag to a parser. shown: the default for the help text; None: not shown."""
        settings = self.settings
        names = [self.name] if settings["positional"] else [flag(self.name), *settings["names"]]
        help = settings["help"]
        if shown is not None and shown != ():
            help = f"{help} (default: {format_value(shown)})".strip()
        help = help.replace("%", "%%")
        rest = {} if settings["positional"] else {"dest": self.name}
        if self.kind is bool:
            rest |= {"action": argparse.BooleanOptionalAction, "default": argparse.SUPPRESS}
            parser.add_argument(*names, help=help, **rest)
            return
        choices = settings["choices"]
        metavar = settings["metavar"]
        if metavar is None:
            metavar = "{" + ",".join(map(str, choices)) + "}" if choices else {int: "N", float: "X"}.get(self.kind)
        if self.count is not None:
            rest["nargs"] = self.count
        rest |= settings["argparse"]
        parser.add_argument(*names, type=self.convert, metavar=metavar, default=argparse.SUPPRESS, help=help, **rest)
        if settings["off"] is not None:
            off = {"action": "store_const", "const": settings["off"], "default": argparse.SUPPRESS}
            help = f"the same as {flag(self.name)} {settings['off']}"
            parser.add_argument("--no-" + flag(self.name)[2:], dest=self.name, help=help, **off)


def format_value(value) -> str:
    """A value as one would type it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@functools.cache
def options_of(cls) -> dict[str, Option]:
    """{name: Option} of a dataclass of options."""
    hints = typing.get_type_hints(cls)
    return {field.name: Option(field, hints[field.name]) for field in dataclasses.fields(cls)}


def own_names(cls) -> set[str]:
    """The options that a script's folder defines: those whose class is not in common/."""
    classes = [kind for kind in cls.__mro__ if not kind.__module__.startswith("common.")]
    return {name for kind in classes for name in inspect.get_annotations(kind)}


def applies(options, name: str) -> bool:
    """Does the option `name` exist for the model, or other variant, that `options` has chosen?"""
    only = options_of(type(options))[name].settings["only"]
    return not only or getattr(options, options.variant) in only


def as_dict(options) -> dict:
    """{name: value} of the options that exist for the variant."""
    values = vars(options)
    return {name: values[name] for name in options_of(type(options)) if applies(options, name)}


# ---------------------------------------------------------------------------------------------------- the command line


def make_parser(cls, base=None, description: str | None = None) -> argparse.ArgumentParser:
    """The parser with a flag for each option of the dataclass `cls`; what is not on the command line is not set.

    base: an instance, whose values --help shows as defaults. The common flags come first.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # else --data means --data-dir in a script without --data
    )
    add_options(parser, cls, base)
    parser.add_argument("--set", type=set_arg(cls), default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def add_options(parser, cls, base=None):
    """Add a flag for each option of the dataclass `cls` to `parser`: a command of a script that has several."""
    own = own_names(cls)
    common = parser.add_argument_group("common to most scripts")
    special = parser.add_argument_group("of this script")
    groups = {}  # for the options that only one model has
    for name, item in options_of(cls).items():
        group = special if name in own else common
        if item.settings["only"]:
            title = f"only for {flag(cls.variant)} {' or '.join(item.settings['only'])}"
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            group = groups[title]
        item.add_to(group, shown=getattr(base, name, None))


def set_arg(cls):
    """An argparse type that refuses --set NAME=VALUE, as it was before every option had a flag, and names the flag."""

    def refuse(text):
        name, _, value = text.partition("=")
        name = name.rpartition(".")[2]
        if name not in options_of(cls):
            raise argparse.ArgumentTypeError(f"there is no option {short(name)!r}")
        words = to_argv(cls, {name: {"true": True, "false": False}.get(value, value)})
        raise argparse.ArgumentTypeError(f"every option is a flag now: {short(' '.join(words))}")

    return refuse


def to_argv(cls, values: dict) -> list[str]:
    """The command line that sets `values`. A path that is None is left out."""
    words = []
    for name, value in values.items():
        if value is None and options_of(cls)[name].settings["type"] is None:
            value = "none"
        if isinstance(value, bool):
            words.append(flag(name) if value else "--no-" + flag(name)[2:])
        elif isinstance(value, list | tuple):
            words += [flag(name), *map(str, value)]
        elif value is not None:
            words += [flag(name), str(value)]
    return words
