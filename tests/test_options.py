"""common/options.py and common/arguments.py: the command line, recipes and records of a dataclass of options."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

from common import arguments, options
from common.options import option

import pytest

from conftest import failure, run


@dataclass(kw_only=True)
class Options(arguments.TrainOptions):
    recipe: str = option("plain", "a named set of hyper-parameters", choices=["plain", "best"])
    model: str = option("small", "the network", choices=["small", "large"])
    epochs: int = option(3, "passes over the training set", above=0)
    lr: float = option(0.1, "learning rate", above=0)
    momentum: float = option(0.9, "momentum", at_least=0, below=1)
    betas: tuple[float, float] = option((0.5, 0.9), "decays of Adam's averages", at_least=0, below=1)
    sizes: tuple[int, ...] = option((1, 2), "sizes", above=0, nargs="+")
    clip: float | None = option(None, "largest norm of the gradient", above=0)
    switch: bool = option(False, "a switch")
    decay: str = option("none", "schedule", choices=["none", "cosine"], nargs="?", const="cosine", off="none")
    weight_decay: float = option(0.0, "weight decay", at_least=0, names=["--l2"])
    depth: int = option(2, "layers", at_least=1, at_most=50, only="large")

    variant: ClassVar[str] = "model"

    def check(self):
        if self.momentum and self.epochs == 13:
            raise run.UserError("--epochs 13: needs --momentum 0")


PLAIN = Options()
RECIPES = {"plain": PLAIN, "best": replace(PLAIN, lr=0.5, epochs=30)}


def recipe(given):
    name = given.get("recipe", "plain")
    return replace(RECIPES[name], recipe=name)


def parse(*argv, cls=Options, extendable=lambda args: False):
    return run.parse_options("cifar/train.py", cls, [str(word) for word in argv], recipe, extendable)


def test_flags_override_the_recipe_which_overrides_the_defaults():
    args = parse("--recipe", "best", "--momentum", "0.8")
    assert (args.lr, args.epochs, args.momentum, args.weight_decay) == (0.5, 30, 0.8, 0.0)
    assert RECIPES["best"].momentum == 0.9, "a recipe stays as it is"


@pytest.mark.parametrize(
    "words, name, value",
    [
        (["--switch"], "switch", True),
        (["--no-switch"], "switch", False),
        (["--l2", "0.5"], "weight_decay", 0.5),
        (["--betas", "0", "0.99"], "betas", (0.0, 0.99)),
        (["--sizes", "4", "5", "6"], "sizes", (4, 5, 6)),
        (["--clip", "2"], "clip", 2.0),
        (["--clip", "none"], "clip", None),
        (["--decay"], "decay", "cosine"),
        (["--no-decay"], "decay", "none"),
        (["--model", "large", "--depth", "7"], "depth", 7),
        (["--threads", "3"], "threads", 3),
    ],
)
def test_every_field_is_a_flag(words, name, value):
    assert getattr(parse(*words), name) == value


@pytest.mark.parametrize(
    "words, message",
    [
        (["--epochs", "0"], "--epochs: 0 is not above 0"),
        (["--epochs", "2.5"], "--epochs: '2.5' is not a whole number"),
        (["--epochs", "99999999999"], "--epochs: 99999999999 is above the maximum, 2147483647"),
        (["--lr", "nan"], "--lr: nan is not above 0"),
        (["--lr", "1e999"], "--lr: 1e999 is above the maximum"),
        (["--lr", "none"], "--lr: 'none' is not a number"),
        (["--momentum", "1"], "--momentum: 1 is not below 1"),
        (["--momentum", "-0.1"], "--momentum: -0.1 is not at least 0"),
        (["--betas", "0.5", "1"], "--betas: 1 is not below 1"),
        (["--betas", "0.5"], "--betas: expected 2 arguments"),
        (["--clip", "nan"], "--clip: nan is not above 0"),
        (["--model", "huge"], "--model: 'huge' is not one of small, large"),
        (["--depth", "3"], "--depth: small has no such option"),
        (["--model", "large", "--depth", "51"], "--depth: 51 is not at most 50"),
        (["--epochs", "13"], "--epochs 13: needs --momentum 0"),
        (["--threads", "0"], "--threads: '0' is neither auto nor a positive whole number"),
        (["--out", ""], "--out: the path is empty"),
        (["--set", "lr=0.1"], "--set: every option is a flag now: --lr 0.1"),
        (["--set", "model.switch=true"], "--set: every option is a flag now: --switch"),
        (["--set", "colour=red"], "--set: there is no option 'colour'"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
        (["--resume", "auto"], "--resume auto: name the run folder with --out DIR"),
    ],
)
def test_what_is_wrong_is_one_line(words, message, capsys):
    assert failure(parse, *words)[0] == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[0].startswith("usage:") and message in lines[-1]


@pytest.mark.parametrize("words", [["--help"], ["--recipe", "best", "--model", "large", "-h"], ["-h", "--model", "?"]])
def test_help_shows_the_defaults_of_the_chosen_recipe(words, capsys, tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text('"""Train.\n\n    python train.py\n"""\n')
    assert failure(run.parse_options, str(tmp_path / "train.py"), Options, words, recipe)[0] == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "python train.py" in text and "--set" not in text
    assert f"learning rate (default: {0.5 if 'best' in words else 0.1})" in text
    assert "only for --model large: --depth N layers" in text
    assert text.index("--seed") < text.index("--epochs"), "the common flags come first"


def test_a_record_keeps_the_options_of_the_model_and_no_places(tmp_path):
    args = parse("--out", tmp_path, "--clip", "2")
    record = run.record_args(args)
    assert record["betas"] == [0.5, 0.9] and record["clip"] == 2.0
    assert not record.keys() & {"depth", "out", "resume", "data_dir"}
    assert run.record_args(parse("--model", "large"))["depth"] == 2


def test_arguments_and_command_lines_are_the_same_thing():
    args = parse("--switch", "--lr", "0.25", "--sizes", "3", "4", "--model", "large", "--no-tensorboard", "--clip", "1")
    again = parse(*options.to_argv(Options, run.record_args(args) | {"clip": None}))
    assert run.record_args(again) == run.record_args(args) | {"clip": None}


# ----------------------------------------------------------------------------------------------------- records of runs


@pytest.fixture
def folder(tmp_path):
    """folder(**changes of the arguments, or of the record): the folder of a run; a value "gone" removes the name."""

    def make(args=None, **record):
        values = run.record_args(parse("--momentum", "0.5"))
        names = sorted(values)
        values = {name: value for name, value in (values | (args or {})).items() if value != "gone"}
        content = {"format": run.FORMAT, "experiment": "cifar", "args": values, "options": names, "state": "running"}
        content |= {"device": {"threads": 1}, "wall_s": 1.0, "resumed": 0, "precision": "fp32", "git": None} | record
        (tmp_path / "run.json").write_text(json.dumps(content))
        return tmp_path

    return make


def test_resume_takes_the_options_of_the_record(folder):
    args = parse("--resume", folder({"lr": 0.25, "betas": [0.1, 0.2]}))
    assert (args.lr, args.momentum, args.betas, args.resume) == (0.25, 0.5, (0.1, 0.2), str(folder()))
    assert parse("--out", folder(), "--resume", "auto", "--momentum", "0.5").resume == str(folder())


@pytest.mark.parametrize(
    "words, message",
    [
        (["--lr", "0.2"], "--lr 0.2: the run in"),
        (["--epochs", "2"], "--epochs 2: the run in"),
        (["--epochs", "9"], "--epochs 9: the run in"),
        (["--out", "elsewhere"], "--out elsewhere: a resumed run stays in its folder"),
    ],
)
def test_a_flag_that_differs_from_the_run_is_named(words, message, folder, capsys):
    assert failure(parse, "--resume", folder(), *words)[0] == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_larger_number_of_epochs_where_the_schedule_allows_it(folder):
    assert parse("--resume", folder(), "--epochs", 9, extendable=lambda args: args.decay == "none").epochs == 9


@pytest.mark.parametrize(
    "args, message",
    [
        ({"lr": -1}, "has an invalid --lr: -1"),
        ({"lr": None}, "has an invalid --lr: None"),
        ({"lr": "fast"}, "has an invalid --lr: fast"),
        ({"lr": True}, "has an invalid --lr: True"),
        ({"epochs": 2.5}, "has an invalid --epochs: 2.5"),
        ({"switch": 1}, "has an invalid --switch: 1"),
        ({"betas": [0.5]}, "has an invalid --betas: [0.5]"),
        ({"betas": 0.5}, "has an invalid --betas: 0.5"),
        ({"clip": 0}, "has an invalid --clip: 0"),
        ({"model": "huge"}, "has an invalid --model: huge"),
        ({"depth": 3}, "has an invalid --depth: small has no such option"),
        ({"threads": "many"}, "has an invalid --threads: many"),
        ({"colour": "red"}, "has an unknown option --colour"),
        ({"help": True}, "has an unknown option --help"),
        ({"out": "/"}, "has an unknown option --out"),
        ({"lr": "gone"}, "is damaged: it has no --lr"),
        ({"epochs": 13}, "--epochs 13: needs --momentum 0"),
    ],
)
def test_the_options_of_a_record_are_checked_as_those_of_the_command_line(args, message, folder, capsys):
    assert failure(parse, "--resume", folder(args))[0] == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "run.json: " + message in last and len(last) < 600


def test_an_option_that_is_newer_than_the_record_has_its_default(folder, capsys):
    @dataclass(kw_only=True)
    class Newer(Options):
        gamma: float = option(0.7, "a new option", at_least=0)
        width: int = option(64, "another, of the large model", above=0, only="large")

    def newer_recipe(given):
        return Newer(gamma=0.1)

    path = folder()
    args = run.parse_options("cifar/train.py", Newer, ["--resume", str(path)], newer_recipe)
    assert args.gamma == 0.7, "the field's own default, whatever today's recipe says"
    assert capsys.readouterr().err == f"{path / 'run.json'}: has no --gamma, which is newer; it is 0.7\n"
    assert (
        failure(run.parse_options, "cifar/train.py", Options, ["--resume", str(folder({"gamma": 0.7}))], recipe)[0] == 2
    )


def test_old_arguments_get_todays_names():
    assert run.recorded_args({"model": {"kind": "gpt", "n_layer": 3}, "bs": 2}) == {
        "kind": "gpt",
        "n_layer": 3,
        "bs": 2,
    }
