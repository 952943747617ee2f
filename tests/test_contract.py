"""What every folder owes, whatever its experiment. Folders are found by their train.py: a new one is covered at once.

Most tests call main(argv) in-process with the recipe `tiny` on built-in data. What is a property of common/ is in
test_hostile.py, on two folders.
"""

import ast
import contextlib
import csv
import functools
import importlib
import inspect
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

from common.options import as_dict, options_of

import numpy as np
import pytest
import torch

import adaptors
from conftest import FOLDERS, ROOT, failure, flags_of, load, offers, one_line, quick, run, start, train
from helpers import metrics, same_weights, weights
from processes import signal_at

each_folder = pytest.mark.parametrize("folder", FOLDERS)
VARIANTS = {  # more trainings, where one does not read all flags
    "cifar": [["--model", "simplenn"]],
    "distilgpt2": [["--method", "lora"], ["--method", "last"]],
    "gan": [["--model", "wgan"], ["--model", "wgan-gp"], ["--model", "acgan"]],
    "nanogpt": [["--kind", "wordmlp"], ["--muon", "2", "--iters", "2"]],
    "resnet": [["--optimizer", "muon"], ["--model", "resnet20"]],
    "simplenn": [["--model", "mlp"], ["--model", "cnn"]],
}


# ---------------------------------------------------------------------------------------------------------- the files


def test_there_are_folders():
    assert FOLDERS


@each_folder
def test_common_py_is_the_same_few_lines(folder):
    text = (ROOT / folder / "common.py").read_text(encoding="utf-8")
    assert text == (ROOT / FOLDERS[0] / "common.py").read_text(encoding="utf-8") and len(text.splitlines()) <= 6


@each_folder
def test_a_folder_copied_without_common_says_what_to_do(folder, tmp_path):
    shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("figures", "results", "weights"))
    words = [sys.executable, str(tmp_path / folder / "train.py"), "--help"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and one_line(done.stderr) and "tools/export.py" in done.stderr and not done.stdout


@each_folder
def test_no_script_shadows_the_standard_library(folder):
    assert not {file.stem for file in (ROOT / folder).rglob("*.py")} & sys.stdlib_module_names


@each_folder
def test_imports_stay_inside_the_folder(folder):
    others = {f.stem for other in FOLDERS if other != folder for f in (ROOT / other).glob("*.py")} | set(FOLDERS)
    own = {file.stem for file in (ROOT / folder).rglob("*.py")}
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            reached = {name.split(".")[0] for name in names} & (others - own)
            assert not reached, f"{file.name} imports {reached}"


def test_common_knows_no_experiment():
    for file in (ROOT / "common").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                assert not names & {"data", "model", "train", *FOLDERS}, f"{file.name} imports {names}"


@each_folder
def test_public_functions_and_classes_are_documented(folder):
    for module in ("data", "model"):
        for name, thing in vars(load(folder, module)).items():
            public = inspect.isclass(thing) or inspect.isfunction(thing) and name not in ("parser", "parse", "main")
            if public and thing.__module__ == module and not name.startswith("_"):
                assert thing.__doc__, f"{folder}/{module}.py: {name} has no docstring"


# ---------------------------------------------------------------------------------------------------------- memory

SIZES = {  # script: flags of a run, and the options that its message names
    "gan/train.py": (["--spectral-norm"], "--width, --noise"),
    "lstm_imdb/train.py": ([], "--hidden, --layers, --embed"),
    "lstm_imdb/pretrain.py": ([], "--hidden, --layers, --embed"),
    "nanogpt/train.py": ([], "the sizes of the network"),
    "nanogpt/stage.py": (["--recipe", "one head", "--data", "builtin"], "the sizes of the network"),
    "s2vt/train.py": ([], "--hidden, --embed"),
    "simplenn/train.py": (["--model", "mlp"], "--hidden, --widths"),
}


@pytest.mark.parametrize("folder, script", [script.split("/") for script in SIZES])
def test_a_network_that_does_not_fit_the_memory_is_refused(folder, script, tmp_path, monkeypatch):
    """Sizes can each be within their bounds, and a network of all of them need more memory than there is."""
    flags, options = SIZES[f"{folder}/{script}"]
    if script != "stage.py":  # which has no recipe tiny
        flags = [*quick(folder), *flags]
    flags = [*flags, "--out", str(tmp_path / "run")]
    monkeypatch.setattr("common.weights.memory_bytes", lambda device: 1000)
    code, message = failure(load(folder, script.removesuffix(".py")).main, flags)
    assert code == 1 and one_line(message) and f"{options}: training " in message


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    """again(folder): (run folder, names of the options that exist for its model, names of those that were asked for) of
    the run `finished` once more; the names also of the runs in VARIANTS."""

    @functools.cache
    def get(folder):
        exist, read = set(), set()

        def recorded(args):
            exist.update(as_dict(args))

            class Recorder(type(args)):
                def __getattribute__(self, name):
                    if not name.startswith("_"):
                        read.add(name)
                    return super().__getattribute__(name)

            args.__class__ = Recorder
            return args

        module = load(folder)
        parse = load(folder).parse
        out = tmp_path_factory.mktemp(folder) / "again"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "parse", lambda argv=None: recorded(parse(argv)))
            train(folder, *quick(folder), "--out", out)
            for i, more in enumerate(VARIANTS.get(folder, [])):
                train(folder, *quick(folder, limit=100), *more, "--out", out.with_name(str(i)))
        return out, exist, read

    return get


@each_folder
def test_every_flag_is_read(folder, again):
    """Each flag of train.py is an attribute that the training, or common/run.py, really asks for."""
    parsed = {"out", "resume", "data_dir", "recipe"}  # asked for while the command line is parsed
    _, exist, read = again(folder)
    assert sorted(exist - read - parsed) == []
    assert flags_of(folder).keys() - exist <= {"name"}, "an option that no run of VARIANTS has; nanogpt's is of the hub"


@each_folder
def test_help_from_another_directory(folder, tmp_path):
    process = start(folder, "--help", cwd=tmp_path)
    printed, _ = process.communicate()
    assert process.returncode == 0 and "python " + folder + "/train.py" in printed
    assert not list(tmp_path.iterdir())


@each_folder
def test_every_script_has_help(folder):
    for file in (ROOT / folder).glob("*.py"):
        module = load(folder, file.stem) if file.stem not in ("common", "__init__") else None
        if hasattr(module, "main"):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                assert failure(module.main, ["--help"])[0] == 0
            assert f"python {folder}/{file.name}" in out.getvalue(), f"{file.name} --help shows no command to paste"


BAD_VALUES = {
    "epochs": ["0", "-1", "ten", "99999999999"],
    "iters": ["0", "x", "99999999999"],
    "bs": ["0", "-8", "2.5", "99999999999"],
    "lr": ["0", "-0.1", "nan", "fast", "1e999"],
    "seed": ["-1", "99999999999"],
    "limit": ["0"],
    "device": ["tpu"],
    "precision": ["fp8"],
    "data": ["no-such-dataset", ""],
    "resume": [""],
    "out": [""],
    "recipe": ["none"],
    "set": ["colour=red"],
    "colour": ["red"],
}


@each_folder
def test_a_wrong_argument_is_one_line(folder, refused):
    """Refused by the parser, which names the flag, and the bound that the value exceeds."""
    for flag, values in BAD_VALUES.items():
        for value in values if flag == "colour" or offers(folder, flag) else []:
            line = refused(load(folder).parse, f"--{flag}", value)
            assert flag in line, line
            assert value != "99999999999" or "above the maximum, 2147483647" in line


# ---------------------------------------------------------------------------------------------------------- the record


@each_folder
def test_builtin_data_trains_offline(folder, finished):
    """`finished` trains without network."""
    record = json.loads((finished(folder) / "run.json").read_text())
    assert record["state"] == "done" and record["dataset"]["builtin"] and record["final"]


@each_folder
def test_the_record_says_what_is_needed_to_trust_it(folder, finished):
    text = (finished(folder) / "run.json").read_text()
    record = json.loads(text)
    for key in ("args", "git", "versions", "device", "precision", "dataset", "wall_s", "peak_memory_mb", "final"):
        assert key in record, key
    assert str(finished(folder)) not in text and str(ROOT) not in text, "a record holds no paths of a machine"
    assert {"run.json", "metrics.csv", "curves.png", "train.log"} <= {f.name for f in finished(folder).iterdir()}
    assert (finished(folder) / "curves.png").stat().st_size > 5000
    assert not list(finished(folder).glob("*.tmp"))


@each_folder
def test_same_seed_same_metrics(folder, finished, again, tmp_path):
    assert metrics(again(folder)[0]) == metrics(finished(folder))
    train(folder, *quick(folder, seed=4), "--out", tmp_path / "other")
    assert metrics(tmp_path / "other") != metrics(finished(folder))


@each_folder
def test_every_number_of_a_recipe_is_a_flag_and_checked(folder, refused):
    module = load(folder)
    for name, value in run.record_args(module.parse(quick(folder))).items():
        if type(value) in (int, float):
            flag = "--" + name.replace("_", "-")
            assert getattr(module.parse([*quick(folder), flag, str(value)]), name) == value
            for wrong in ("word", "nan", "none", "null"):
                if wrong != "none" or not options_of(module.Options)[name].optional:
                    assert flag in refused(module.parse, *quick(folder), flag, wrong)


def explode(folder, out):
    """A run of `folder` that diverges: (its record, the message at its end)."""
    steps = {"iters": 40, "evals": 2} if offers(folder, "iters") else {"epochs": 20}
    code, message = failure(train, folder, *quick(folder, lr="1e30", **steps), "--out", out)
    assert code == 1 and one_line(message)
    return json.loads((out / "run.json").read_text()), message


@pytest.mark.parametrize(
    "folder", [pytest.param(name, marks=[] if name in ("lms", "cifar") else pytest.mark.slow) for name in FOLDERS]
)
def test_an_explosion_can_be_seen(folder, tmp_path):
    """A diverged run keeps its metrics and has curves, with the loss of each step that led to the explosion."""
    record, message = explode(folder, tmp_path)
    assert record["state"] == "diverged" and str(tmp_path / "curves.png") in message
    assert (tmp_path / "curves.png").exists()
    with open(tmp_path / "explosion.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    assert steps == list(range(steps[0], record["diverged_at_step"] + 1))
    assert all(math.isfinite(float(row["loss"])) for row in rows[:-1])


# ------------------------------------------------------------------------------------------------- killed and resumed


@each_folder
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_killed_and_resumed_is_as_if_nothing_happened(folder, name, finished, tmp_path):
    """Killed in a seeded step between two rows of the metrics, or after the first checkpoint if no step has a backward
    pass. Then the weights are the same, bit for bit, and so are the metrics."""
    first, *_, last = json.loads((finished(folder).parent / "steps.json").read_text())
    step = random.Random(folder + name).randint(first + 1, last) if first < last else 0
    event = signal_at("torch:Tensor.backward", step, name) if step else signal_at("common.run:Run.save", 1, name)
    out = tmp_path / "broken"
    process = start(folder, *quick(folder), "--out", out, events=[event])
    _, errors = process.communicate()
    assert process.returncode == {"SIGKILL": -9, "SIGTERM": 143}[name], errors
    rows = len(metrics(out))
    assert 0 < rows < len(metrics(finished(folder))) or not step
    if name == "SIGTERM":
        assert "--resume" in errors and "Traceback" not in errors
        assert json.loads((out / "run.json").read_text())["state"] == "interrupted"
    train(folder, "--resume", out)
    assert metrics(out) == metrics(finished(folder)) and same_weights(out, finished(folder))
    assert json.loads((out / "run.json").read_text())["resumed"] == 1


@each_folder
def test_tensorboard_is_offered(folder):
    """What the event files hold is tested in test_hostile.py."""
    assert offers(folder, "tensorboard")


@each_folder
def test_resume_with_another_dataset(folder, copied):
    file = copied(folder) / "run.json"
    record = json.loads(file.read_text())
    record["dataset"]["digest"] = "0" * 32
    file.write_text(json.dumps(record))
    code, message = failure(train, folder, "--resume", file.parent)
    assert code == 1 and one_line(message) and "another dataset" in message


@each_folder
def test_the_checkpoint_of_another_model(folder, copied):
    """A folder gives r.load all that it wants back."""
    out = copied(folder)
    state = torch.load(out / "last.pt", weights_only=True)
    for name in ("model", "optimizer", "optimizers"):
        if name in state:
            torch.save({key: value for key, value in state.items() if key != name}, out / "last.pt")
            code, message = failure(train, folder, "--resume", out)
            assert code == 1 and one_line(message) and "last.pt" in message and repr(name) in message
    state["model"] = {"other." + k: v for k, v in state["model"].items()}
    torch.save(state, out / "last.pt")
    before = (out / "last.pt").read_bytes()
    code, message = failure(train, folder, "--resume", out)
    assert code == 1 and one_line(message) and "last.pt" in message and "another model" in message
    assert (out / "last.pt").read_bytes() == before


@each_folder
def test_torchrun_is_offered_or_refused(folder, tmp_path, monkeypatch):
    if "ddp" in vars(load(folder)):
        pytest.skip(f"{folder}/train.py offers torchrun; its own tests run two processes")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, message = failure(train, folder, *quick(folder), "--out", tmp_path / "run")
    assert code == 1 and one_line(message) and "torchrun" in message and not (tmp_path / "run").exists()


@pytest.mark.parametrize("folder", ["cifar", "lstm_imdb", "resnet", "simplenn"])
def test_a_short_run_does_not_rise_to_the_peak_rate_at_once(folder, tmp_path):
    """In a fifth of its few steps it would lose what it learns."""
    words = quick(folder, decay="onecycle", epochs=2)
    train(folder, *words, "--out", tmp_path)
    rates = [float(row["lr"]) for row in metrics(tmp_path)]
    assert 0 < max(rates) < 0.4 * load(folder).parse(words).lr


# ---------------------------------------------------------------------------------- the parts of the data, evaluation

CHOSEN = re.compile("best_(epoch|iter)|val_|last_val_|last_train_|train_|sampled_loss|scored_on")  # not by the test set


def chosen(out):
    """What a run reports that is not of the test set: {name: value}."""
    final = json.loads((out / "run.json").read_text())["final"]
    return {name: value for name, value in final.items() if CHOSEN.match(name)}


def results_of_test_set(out):
    """What a run reports of the test set for best.pt: {name: value}."""
    final = json.loads((out / "run.json").read_text())["final"]
    own = re.compile("last_|seconds|bytes|problems")  # of last.pt, or of no part
    return {name: value for name, value in final.items() if not CHOSEN.match(name) and not own.match(name)}


def use_part(patch, folder, name, change):
    """Let data.load of the folder return `change(loaded, name)` as its part `name`."""
    data = load(folder, "data")
    whole = data.load

    def load_changed(*args, **options):
        loaded = whole(*args, **options)
        return adaptors.with_part(loaded, name, change(loaded, name))

    patch.setattr(data, "load", load_changed)


@pytest.fixture(scope="module")
def learned(finished, tmp_path_factory):
    """learned(folder): the run folder of a quick run that learns enough for its epochs to differ on a test set."""

    @functools.cache
    def get(folder):
        if folder not in adaptors.LEARNS:
            return finished(folder)
        out = tmp_path_factory.mktemp(folder) / "learned"
        train(folder, *quick(folder, **adaptors.LEARNS[folder]), "--out", out)
        return out

    return get


@each_folder
@pytest.mark.parametrize("change", ["like_training", "unlike_training"])
def test_another_test_set_changes_the_test_metrics_and_nothing_else(folder, change, learned, tmp_path, monkeypatch):
    """Not the weights, the best epoch, the metrics: with one that every epoch is better on, and with its opposite."""
    if folder in adaptors.NO_TEST_PART:
        pytest.skip(f"{folder}/ has no test part: {adaptors.NO_TEST_PART[folder]}")
    usual = learned(folder)
    out = tmp_path / "run"
    use_part(monkeypatch, folder, "test", getattr(adaptors, change))
    train(folder, *quick(folder, **adaptors.LEARNS.get(folder, {})), "--out", out)
    assert same_weights(out, usual) and same_weights(out, usual, "best.pt")
    assert chosen(out) == chosen(usual) and results_of_test_set(out) != results_of_test_set(usual)
    assert metrics(out, ("seconds", "test_")) == metrics(usual, ("seconds", "test_"))


@pytest.fixture(scope="module")
def misled(tmp_path_factory):
    """misled(folder): (run folder, arguments of every evaluation) of a run whose validation examples have wrong
    answers, of a network with dropout or batch normalization."""

    @functools.cache
    def get(folder):
        out, calls = tmp_path_factory.mktemp(folder) / "misled", []
        module, name = adaptors.EVALUATE.get(folder, ("train", "evaluate"))
        with pytest.MonkeyPatch.context() as patch:
            use_part(patch, folder, "val", adaptors.unlike_training)
            if folder not in adaptors.NO_NETWORK:
                evaluate = getattr(load(folder, module), name)

                def recorded(*args, **options):
                    calls.append((args, options))
                    return evaluate(*args, **options)

                patch.setattr(load(folder, module), name, recorded)
            train(folder, *quick(folder, precision="fp32"), *adaptors.OPTIONS.get(folder, []), "--out", out)
        return out, calls

    return get


@each_folder
def test_another_validation_set_changes_no_weights(folder, misled, tmp_path):
    usual = tmp_path / "usual"
    train(folder, *quick(folder, precision="fp32"), *adaptors.OPTIONS.get(folder, []), "--out", usual)
    assert same_weights(misled(folder)[0], usual)
    rows = [metrics(out, ("seconds", "val_")) for out in (misled(folder)[0], usual)]
    assert rows[0] == rows[1] and metrics(misled(folder)[0]) != metrics(usual)


@pytest.mark.parametrize("folder", [name for name in FOLDERS if name != "lms"])
def test_each_step_is_taken_in_training_mode(folder, tmp_path, monkeypatch):
    """Also those after an evaluation, which is not in training mode."""
    modes = []
    call = torch.nn.Module.__call__
    running = []

    def recorded(module, *args, **options):
        if not running and torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            modes.append(module.training)
        running.append(module)
        try:
            return call(module, *args, **options)
        finally:
            running.pop()

    monkeypatch.setattr(torch.nn.Module, "__call__", recorded)
    train(folder, *quick(folder, epochs=2, precision="fp32"), "--out", tmp_path / "run")
    assert modes and all(modes)


# those whose evaluations of equal weights are equal: others have batch normalization, or no epochs
@pytest.mark.parametrize("folder", ["cifar", "distilgpt2", "lstm_imdb", "s2vt", "simplenn"])
def test_of_equal_epochs_the_first_is_the_best(folder, tmp_path):
    record = train(folder, *quick(folder, epochs=3, lr=1e-30, precision="fp32"), "--out", tmp_path / "run")
    assert record["final"]["best_epoch"] == 1


@each_folder
def test_what_is_reported_is_what_the_best_checkpoint_gives(folder, finished, tmp_path):
    """A finished run that is resumed only evaluates. Its best.pt gets other weights, of an epoch that is not the last.
    What is reported is the same as where last.pt has these weights too, so that no others can be tested."""
    if folder in adaptors.NO_TEST_PART:
        pytest.skip(f"{folder}/ has no test part: {adaptors.NO_TEST_PART[folder]}")
    reported = []
    for changed in (["best.pt"], ["best.pt", "last.pt"]):
        out = Path(shutil.copytree(finished(folder), tmp_path / str(len(changed))))
        for name in changed:
            state, generator = torch.load(out / name, weights_only=True), torch.Generator().manual_seed(0)
            for tensor in filter(torch.is_floating_point, state["model"].values()):
                tensor.mul_(0.5 + 4 * torch.rand(tensor.shape, generator=generator))
            place = {key: 1 for key in ("epoch", "step") if key in state and name == "best.pt"}
            torch.save(state | place, out / name)
        train(folder, "--resume", out)
        reported.append(results_of_test_set(out))
    assert reported[0] == reported[1] != results_of_test_set(finished(folder))


def recorded_call(folder, misled):
    """(function, arguments, options) of the last evaluation in a run, or a skip where there is no network."""
    if folder in adaptors.NO_NETWORK:
        pytest.skip(f"{folder}/: {adaptors.NO_NETWORK[folder]}")
    module, name = adaptors.EVALUATE.get(folder, ("train", "evaluate"))
    return getattr(load(folder, module), name), *misled(folder)[1][-1]


def same(a, b):
    """Are two results equal, bit for bit: tensors, tuples of them, or other values?"""
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@each_folder
def test_evaluation_depends_on_nothing_but_the_weights(folder, misled):
    """Neither on torch's random state, nor on the mode that the network was in."""
    evaluate, args, options = recorded_call(folder, misled)
    results = []
    for seed, mode in ((0, True), (1, True), (1, False)):
        torch.manual_seed(seed)
        args[0].train(mode)
        results.append(evaluate(*args, **options))
    assert same(results[0], results[1]) and same(results[0], results[2])


@each_folder
def test_evaluation_keeps_no_graph(folder, misled):
    """Which would fill the memory."""
    evaluate, args, options = recorded_call(folder, misled)
    enabled = set()
    hooks = [m.register_forward_pre_hook(lambda *_: enabled.add(torch.is_grad_enabled())) for m in args[0].modules()]
    evaluate(*args, **options)
    for hook in hooks:
        hook.remove()
    assert enabled == {False}


@each_folder
def test_evaluation_takes_examples_in_any_order_and_number(folder, misled):
    evaluate, args, options = recorded_call(folder, misled)
    args[0].train()
    if folder == "gan":  # an image depends on its own noise alone
        gan, count = args
        whole, half = (evaluate(gan, n, **options)[0].int() for n in (count, count // 2))
        assert (whole[: count // 2] - half).abs().max() <= 1
        return
    numbers = []
    for size, backwards in ((1000, False), (7, True)):
        with pytest.MonkeyPatch.context() as patch:
            result = evaluate(*adaptors.in_batches_of(folder, size, backwards, patch, args), **options)
        values = result if isinstance(result, tuple) else (result,)
        numbers.append([value for value in values if isinstance(value, float)])
    assert numbers[0] and numbers[1] == pytest.approx(numbers[0], rel=1e-5)


# ------------------------------------------------------------------------------------------- in a program of your own


@pytest.fixture
def program(monkeypatch):
    """program(folder, run): the variables of the program in the README of a folder, with the run folder `run`."""

    def execute(folder, out):
        text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
        (code,) = re.findall(r"^```python\n(.*?)^```\n", text, re.DOTALL | re.MULTILINE)
        space = {}
        exec(re.sub(r'load\("[^"]*"\)', f"load({str(out)!r})", code), space)
        return space

    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    for name in ("data", "model", "train", "saved"):  # modules of the user's own
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    before = dict(sys.modules)
    yield execute
    assert {name: sys.modules.get(name) for name in before} == before
    for name in sys.modules.keys() - before.keys():
        if name.partition(".")[0] in FOLDERS:
            del sys.modules[name]


def test_models_are_imported_from_the_root(program):
    """`from cifar.model import LeNet5`, of all folders in one process."""
    for folder in FOLDERS:
        module = importlib.import_module(f"{folder}.model")
        assert Path(module.__file__) == ROOT / folder / "model.py"


@each_folder
def test_a_trained_model_is_used_from_python(folder, finished, program):
    """The program of the README, after that of another folder in the same process."""
    program("lms", finished("lms"))
    space = program(folder, finished(folder))
    trained = space["trained"]
    assert not any(name in vars(sys.modules[folder]) for name in ("data", "model", "train"))
    if folder == "lms":
        assert trained.columns == ["x1", "x2", "bias"]
        assert np.array_equal(trained.weights, weights(finished("lms"))["w"].numpy())
        return
    net = trained.gan if folder == "gan" else trained.net
    assert not net.training
    if folder == "distilgpt2":  # best.pt has the trained part alone
        assert trained.tokenizer.decode(space["tokens"][0]).startswith("The river")
        return
    best, state = weights(finished(folder), "best.pt"), net.state_dict()
    assert state.keys() == best.keys() and all(torch.equal(state[name], best[name]) for name in best)


# ------------------------------------------------------------------------------------------------------- plain code


def golf(node):
    """What a reader would have to unpack at a node of the syntax tree, if so."""
    match node:
        case ast.Assign(targets=[ast.Tuple(elts=[_, _, _, *_])], value=ast.Tuple()):
            return "three assignments in one"
        case ast.BinOp(op=ast.Mult(), left=left, right=right):
            texts = ast.JoinedStr | ast.List | ast.Tuple
            multiplied = [s for s in (left, right) if isinstance(s, texts) or isinstance(getattr(s, "value", 0), str)]
            conditions = [s for s in (left, right) if isinstance(s, ast.Compare) or is_call(s, "bool")]
            return "a text or list multiplied by a condition" if multiplied and conditions else None
        case (
            ast.BinOp(op=ast.BitOr(), right=ast.IfExp(orelse=ast.Dict(keys=[])))
            | ast.AugAssign(op=ast.BitOr(), value=ast.IfExp(orelse=ast.Dict(keys=[])))
        ):
            return "a dict | {...} if there is something to add"
        case ast.IfExp(body=ast.IfExp()) | ast.IfExp(orelse=ast.IfExp()):
            return "a conditional expression in another"
        case ast.Expr(value=ast.IfExp() | ast.Tuple()) if not isinstance(node.value, ast.Tuple) or node.value.elts:
            return "two statements in one expression"
        case ast.BoolOp(op=ast.Or(), values=[ast.BoolOp(op=ast.And()), ast.Constant() | ast.BinOp()]):
            return "and/or for if/else"
    return None


def is_call(node, name):
    return isinstance(node, ast.Call) and getattr(node.func, "id", None) == name


def plain_files():
    folders = [*(ROOT / name for name in FOLDERS), ROOT / "common", ROOT / "tools", ROOT / "tests"]
    names = [file.relative_to(ROOT).as_posix() for folder in folders for file in folder.rglob("*.py")]
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in sorted(names)}


def test_code_is_plain():
    found = []
    for name, text in plain_files().items():
        for node in ast.walk(ast.parse(text)):
            if what := golf(node):
                found.append(f"{name}:{node.lineno}: {what}")
    assert found == []


def test_code_is_formatted_by_ruff():
    """Except at ten places at most, each with its reason."""
    assert sum(text.count("fmt: skip\n") for text in plain_files().values()) <= 10


@pytest.mark.parametrize(
    "code, plain",
    [
        ("a, b, c = 1, 2, 3", False),
        ("a, b = 1, 2", True),
        ("a, b, c = f()", True),
        ("'x' * (a > b)", False),
        ("[x] * bool(a)", False),
        ("'x' * 3", True),
        ("a | ({'b': 1} if c else {})", False),
        ("a |= {'b': 1} if c else {}", False),
        ("a | {'b': 1}", True),
        ("a and b or 0", False),
        ("x = 1 if a else 2 if b else 3", False),
        ("f(), g()", False),
        ("f() if a else g()", False),
        ("a and b or f(c)", True),
    ],
)
def test_golf_is_found(code, plain):
    assert plain == (not any(golf(node) for node in ast.walk(ast.parse(code))))


# ---------------------------------------------------------------------------------------------------------- the pages


def prose_of(text):
    """The lines of a page without its tables, the comments that describe them, and printed output."""
    text = re.sub(r"^```text\n.*?^```\n", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!-- ledger\n.*?<!-- /ledger -->", "", text, flags=re.DOTALL)
    return [line for line in text.splitlines() if not line.startswith("|")]


def widths_of_tables(text):
    """The number of columns of each table of a page."""
    return [line.count("|") - 1 for line in text.splitlines() if re.fullmatch(r"\|[-:| ]+\|", line)]


@each_folder
def test_a_readme_has_a_table_and_its_figures(folder):
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    assert "<!-- ledger" in text, "no results table is rendered from records"
    assert len(prose_of(text)) <= 120
    assert max(widths_of_tables(text)) <= 6, "a table of more columns is wider than a screen"
    figures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert figures
    for page in (ROOT / folder).glob("*.md"):
        for figure in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (ROOT / folder / figure).stat().st_size < 150_000, figure
