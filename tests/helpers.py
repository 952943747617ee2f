"""What test files repeat: modules that are imported on first use, files of one's own, and runs that are compared."""

import ast
import contextlib
import csv
import functools
import gzip
import importlib
import json
import os
import sys
import tempfile
import zlib
from pathlib import Path

import pytest

import blank_figures
import processes
from fork_server import keep_results

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = sorted(file.parent.name for file in ROOT.glob("*/train.py"))


# -------------------------------------------------------------------------------------------------- modules of folders


class Lazy:
    """A module that is imported when a test first uses it, not when tests are collected. Setting an attribute sets that
    of the module."""

    __slots__ = ("_import",)

    def __init__(self, import_it):
        object.__setattr__(self, "_import", import_it)

    def __getattr__(self, name):
        if name in ("__test__", "__wrapped__", "__bases__", "_mock_name"):  # what pytest asks when it collects tests
            raise AttributeError(name)
        return getattr(self._import(), name)

    def __setattr__(self, name, value):
        setattr(self._import(), name, value)

    def __delattr__(self, name):
        delattr(self._import(), name)


def lazy(folder, module="train"):
    """load(folder, module), on first use: for the top of a test file."""
    return Lazy(functools.partial(load, folder, module))


def names(folder, module, constant):
    """The items of a constant tuple or list of a module, or the keys of a dict, read from the source: what a test is
    parametrized with is needed before anything is imported."""
    for node in ast.parse((ROOT / folder / f"{module}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == [constant]:
            items = node.value.keys if isinstance(node.value, ast.Dict) else node.value.elts
            return [ast.literal_eval(item) for item in items]
    raise LookupError(f"{folder}/{module}.py: has no {constant}")


OWN = {file.stem for folder in FOLDERS for file in (ROOT / folder).glob("*.py")} - {"common"}  # modules of folders
imported = {folder: {} for folder in FOLDERS}  # {folder: {name: module}}


@functools.cache
def load(folder, module="train"):
    """The module `module` of `folder`, imported with that folder first on sys.path and without other folders' modules.

    `load("cifar", "data")` is the module that cifar/train.py itself imported. The modules of common/ are shared.
    """
    prepare()
    before = {name: sys.modules.pop(name) for name in OWN & sys.modules.keys()}
    sys.modules.update(imported[folder])
    sys.path.insert(0, str(ROOT / folder))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(ROOT / folder))
        imported[folder] |= {name: sys.modules.pop(name) for name in OWN & sys.modules.keys()}
        sys.modules.update(before)


@functools.cache
def prepare():
    """What holds for all folders in this process: the built-in images are drawn once, figures are blank, and the runs
    of a study are forked."""
    from common import shapes, study

    import filelock

    with filelock.FileLock(Path(os.environ["MPLCONFIGDIR"]) / "lock"):  # fonts are listed once, not by each process
        import matplotlib.font_manager  # noqa: F401

    study.start = functools.wraps(study.start)(start_job)
    keep_results(shapes, "draw_builtin", processes.place())
    blank_figures.install(lambda: Drawing.real)


def start_job(script, job, threads):
    """In place of study.start: one thread, whatever `threads`."""
    from common import study

    errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
    return processes.start(script, *study.command(script, job)[1:], stderr=errors), errors


class Drawing:
    """Whether figures are drawn, or blank."""

    real = False


@contextlib.contextmanager
def drawn():
    """Figures made inside are drawn, as in tests marked `draws`: for fixtures that several tests share."""
    before, Drawing.real = Drawing.real, True
    yield
    Drawing.real = before


# a test of a script that draws: with blank figures, and in the slow tests with real ones, which take most of its time
drawn_too = pytest.mark.parametrize(
    "figures", ["blank", pytest.param("real", marks=[pytest.mark.draws, pytest.mark.slow])]
)


def record_networks(module, monkeypatch) -> list[bool]:
    """A list that grows with each network that `module.build_model` makes: is it on the meta device?"""
    build_model = module.build_model
    on_meta = []

    def build(*args):
        net = build_model(*args)
        on_meta.append(all(p.is_meta for p in net.parameters()))
        return net

    monkeypatch.setattr(module, "build_model", build)
    return on_meta


class Silent:
    """What a training loop takes of a run, without a folder; keeps the rows of metrics.csv."""

    def __init__(self):
        import torch

        self.device = torch.device("cpu")
        self.rows = []

    def autocast(self):
        return contextlib.nullcontext()

    def load(self, **parts):
        return None

    def should_stop(self):
        return False

    def save_due(self, seconds):
        return False

    def log(self, row):
        self.rows.append(row)

    def check_finite(self, losses, first_step):
        assert losses.isfinite().all()

    def nothing(self, *args, **state):
        pass

    save = save_best = print = nothing


# ------------------------------------------------------------------------------------------------------- runs compared


def metrics(out, without=("seconds",)):
    """The rows of metrics.csv, as texts, without the columns whose names contain a word of `without`."""
    with open(out / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if not any(word in name for word in without)} for row in rows]


def weights(out, name="last.pt"):
    """{name: tensor} of the network in a checkpoint of the run folder `out`."""
    import torch

    return torch.load(out / name, weights_only=True)["model"]


def same_weights(a, b, name="last.pt"):
    """Are the weights in the run folders `a` and `b` equal, bit for bit?"""
    import torch

    ours, theirs = weights(a, name), weights(b, name)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# --------------------------------------------------------------------------------------------------- files of one's own


def write_csv(path, header, rows):
    """A CSV file with the columns `header`. Returns its path."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_images(folder, count, size=(40, 50), seed=0):
    """`count` images of random pixels, 0.png, 1.png ..., of `size` (height, width), in `folder`. Returns the folder."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def draw_pictures(folder):
    """Two drawings that the READMEs of the demos on photographs show. Returns the folder."""
    import numpy as np
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True)
    square = Image.new("RGB", (300, 300), "white")
    ImageDraw.Draw(square).rectangle([75, 75, 225, 225], fill=(220, 20, 20))
    square.save(folder / "red_square.png")
    ramp = np.linspace(0, 1, 400)
    red = np.broadcast_to(255 * ramp, (300, 400))
    green = np.broadcast_to(200 * ramp[:300, None], (300, 400))
    blue = np.full((300, 400), 120)
    Image.fromarray(np.stack([red, green, blue], 2).astype(np.uint8)).save(folder / "gradient.png")
    return folder


def make_images(root, parts, classes=("cats", "dogs"), size=(40, 50)):
    """`parts[part]` images for each class, in root/part/class; the part "" is `root` itself. Returns `root`."""
    for part, count in parts.items():
        for name in classes:
            write_images(root / part / name, count, size, seed=zlib.crc32(os.fsencode(f"{part}/{name}")))
    return root


def write_idx(path, array):
    """An idx file, as MNIST has them, of bytes."""
    import numpy as np

    header = np.array([0x0800 + array.ndim, *array.shape], dtype=">u4").tobytes()
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_drop_in(folder, kind, suffix=".gz", count=60):
    """Four idx files as MNIST's drop-ins have them; the images hold their own row numbers. Returns the folder."""
    import numpy as np

    folder.mkdir(exist_ok=True)
    names = {
        "mnist": ("train-", "t10k-"),
        "letters": ("emnist-letters-train-", "emnist-letters-test-"),
        "balanced": ("emnist-balanced-train-", "emnist-balanced-test-"),
    }[kind]
    classes, first = {"mnist": (10, 0), "letters": (26, 1), "balanced": (47, 0)}[kind]
    pixels = np.tile(np.arange(28, dtype=np.uint8)[:, None], (count, 1, 28))
    pixels[:, 0, 0] = np.arange(count)
    for prefix in names:
        write_idx(folder / f"{prefix}images-idx3-ubyte{suffix}", pixels)
        write_idx(folder / f"{prefix}labels-idx1-ubyte{suffix}", np.arange(count) % classes + first)
    return folder


def mutations(content, rng, count):
    """Truncations, bit flips, and runs of other bytes in the bytes of a good file."""
    for _ in range(count):
        data = bytearray(content)
        kind = rng.randrange(3)
        if kind == 0:
            data = data[: rng.randrange(len(data))]
        else:
            for _ in range(rng.randrange(1, 9)):
                at = rng.randrange(len(data))
                if kind == 1:
                    data[at] ^= 1 << rng.randrange(8)
                else:
                    data[at : at + rng.randrange(40)] = rng.randbytes(rng.randrange(40))
        yield bytes(data)


def assert_as_sure_as_its_header(file, odds, labels):
    """The committed network in `file` has the accuracy and the doubts on its test set that its header names. odds: its
    calibrated probabilities (N, classes); labels: (N,)."""
    from common.calibration import calibration_error, unsure_shares
    from common.weights import read_safetensors

    facts = json.loads(read_safetensors(file)[1]["facts"])
    assert (odds.argmax(1) == labels).float().mean() == pytest.approx(facts["test_accuracy"], abs=2e-4)
    assert calibration_error(odds, labels) == pytest.approx(facts["test_calibration_error"], abs=1e-3)
    assert unsure_shares(odds, labels, 0.5) == pytest.approx(facts["unsure"], abs=1e-3)
