"""simplenn/: own layers against PyTorch's, the data, the training, the studies against closed forms and libraries.

What all folders owe is in test_contract.py.
"""

import copy
import dataclasses
import json
import random
import shlex
import shutil
import sys

from common import calibration, image_files
from common.options import options_of

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import processes
from conftest import ROOT, failure, lazy, one_line, run
from helpers import Silent, drawn_too, make_images, names, record_networks, write_drop_in, write_idx

train = lazy("simplenn")
data = lazy("simplenn", "data")
model = lazy("simplenn", "model")
analyze, bench, predict, reliability, saved, sweep, train_optax = (
    lazy("simplenn", name) for name in ("analyze", "bench", "predict", "reliability", "saved", "sweep", "train_optax")
)
hessian, training = lazy("simplenn", "studies.hessian"), lazy("simplenn", "studies.training")


# --------------------------------------------------------------------------------------------------------- own layers

CONVOLUTIONS = [
    dict(in_channels=3, out_channels=4, kernel_size=3),
    dict(in_channels=3, out_channels=4, kernel_size=(3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    dict(in_channels=4, out_channels=6, kernel_size=3, stride=2, padding=1, groups=2),
    dict(in_channels=4, out_channels=4, kernel_size=5, padding=2, groups=4, bias=False),
    dict(in_channels=2, out_channels=3, kernel_size=(4, 3), padding="same", dilation=(1, 2)),
    dict(in_channels=2, out_channels=3, kernel_size=1, padding="valid"),
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("arguments", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_own_convolution_is_pytorchs(arguments, dtype, tolerance):
    """The same initialization, outputs, and gradients of input, weight and bias."""
    layers = []
    for kind in (torch.nn.Conv2d, model.CustomConv2d):
        torch.manual_seed(1)
        layers.append(kind(**arguments, dtype=dtype))
    theirs, ours = layers
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(theirs.state_dict()[k], v) for k, v in ours.state_dict().items())
    x = torch.randn(2, arguments["in_channels"], 11, 9, dtype=dtype)
    results = []
    for layer in layers:
        x_ = x.clone().requires_grad_()
        y = layer(x_)
        (y * torch.arange(y.numel(), dtype=dtype).view_as(y).cos()).sum().backward()
        results.append([y.detach(), x_.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= tolerance * a.abs().max()
    assert torch.allclose(ours(x[0]), theirs(x[0]), rtol=0, atol=1e-5), "one image without a batch"


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_own_convolution_with_any_arguments():
    rng = random.Random(0)

    def pair():
        return rng.choice([rng.randint(1, 3), (rng.randint(1, 3), rng.randint(1, 3))])

    for _ in range(200):
        padding, groups = rng.choice([0, "same", "valid", pair(), pair()]), rng.randint(1, 3)
        sizes = [groups * rng.randint(1, 3) for _ in range(2)]
        options = dict(stride=1 if padding == "same" else pair(), padding=padding, dilation=pair(), groups=groups)
        options |= dict(bias=rng.random() < 0.5, dtype=torch.float64)
        kernel = pair()
        layers = [kind(*sizes, kernel, **options) for kind in (torch.nn.Conv2d, model.CustomConv2d)]
        layers[1].load_state_dict(layers[0].state_dict())
        x = torch.randn(2, sizes[0], 9, 8, dtype=torch.float64)
        assert torch.allclose(layers[0](x), layers[1](x), rtol=0, atol=1e-10), (sizes, kernel, options)


def test_own_linear_layer_is_pytorchs():
    for bias in (True, False):
        layers = []
        for kind in (torch.nn.Linear, model.CustomLinear):
            torch.manual_seed(1)
            layers.append(kind(7, 5, bias=bias, dtype=torch.float64))
        theirs, ours = layers
        assert all(torch.equal(theirs.state_dict()[k], v) for k, v in ours.state_dict().items())
        x = torch.randn(2, 3, 7, dtype=torch.float64)
        assert torch.allclose(ours(x), theirs(x), rtol=0, atol=1e-12)


def test_a_wrong_convolution_is_refused():
    for wrong in (dict(groups=2), dict(padding="same", stride=2), dict(padding="reflect")):
        with pytest.raises(ValueError):
            model.CustomConv2d(3, 4, 3, **wrong)


@pytest.mark.parametrize("channels, size", [(3, 32), (1, 28)])
def test_both_forms_of_simplenn_are_one_network(channels, size):
    """Equal to 1e-10 in outputs and gradients, and a state dict goes back and forth."""
    theirs = model.SimpleNN(channels, size).double()
    ours = model.SimpleNN(channels, size, conv=model.CustomConv2d, linear=model.CustomLinear).double()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x, labels = torch.randn(4, channels, size, size, dtype=torch.float64), torch.arange(4)
    losses = [F.cross_entropy(net(x), labels) for net in (theirs, ours)]
    for loss in losses:
        loss.backward()
    assert (theirs(x) - ours(x)).abs().max() < 1e-10
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-10


# --------------------------------------------------------------------------------------------------------------- data


def test_the_functions():
    """At x = 0 the quotient sin(0) / 0 is 1, and the sign of sin(5 pi x) is 0 at its zeros, +-1 included."""
    x = np.array([-1, -0.9, -0.2, -0.1, 0, 0.1, 0.2, 0.3, 1])
    assert data.square(x).tolist() == [0, -1, 0, -1, 0, 1, 0, -1, 0]
    assert np.allclose(data.sinc(x[x != 0]), np.sin(5 * np.pi * x[x != 0]) / (5 * np.pi * x[x != 0]))
    assert data.sinc(np.zeros(1)) == 1
    train_set, val_set, test_set, facts = data.load("sinc")
    assert len(train_set) == len(val_set) == 300 and facts["test"] == 300
    assert train_set.x[0] == -1 and train_set.x[-1] == 1
    assert train_set.correct(train_set.y + torch.tensor([[0.04]]), train_set.y) == 300
    assert train_set.correct(train_set.y + torch.tensor([[0.06]]), train_set.y) == 0


def test_builtin_digits_are_scikit_learns():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    parts = data.load("builtin")[:3]
    assert sum(map(len, parts)) == 1797
    images = torch.cat([part.images for part in parts])[:, 0, 4:24, 4:24].double()
    sums = sorted((images.sum((1, 2)) / 6.25 / 255 * 16).tolist())
    assert np.allclose(sums, sorted(digits.images.sum((1, 2))), rtol=0.1), "the ink of each digit"
    assert torch.cat([part.labels for part in parts]).bincount().tolist() == np.bincount(digits.target).tolist()
    flat = data.load("builtin", flat=True)[0]
    assert torch.equal(next(flat.batches(9))[0], next(parts[0].batches(9))[0].flatten(1)) and flat[3][0].shape == (784,)


def test_batches_are_a_function_of_seed_and_epoch():
    train_set = data.load("builtin")[0]
    for augment in data.AUGMENT:
        whole = [torch.cat(part) for part in zip(*train_set.batches(64, (1, 2), augment))]
        again = [torch.cat(part) for part in zip(*train_set.batches(100, (1, 2), augment))]
        assert torch.allclose(whole[0], again[0], atol=1e-5) and torch.equal(whole[1], again[1])
        assert torch.equal(whole[1].bincount(), train_set.labels.bincount())
        assert not torch.equal(whole[1], torch.cat([y for _, y in train_set.batches(64, (1, 3), augment)]))


def test_affine_transformations_move_images_as_they_say():
    image = torch.zeros(1, 1, 28, 28)
    image[0, 0, 10, 12] = 1
    matrix = torch.tensor([[[1.0, 0, 2 / 14], [0, 1, 0]]])  # samples two pixels to the right: the image moves left
    assert data.transform(image, matrix)[0, 0, 10, 10] == pytest.approx(1, abs=1e-5)
    generator = torch.Generator().manual_seed(0)
    matrices = data.random_affine(5000, generator)
    assert abs(matrices[:, :, :2].det().mean() - 1) < 0.01 and matrices[:, :, 2].abs().max() <= 2 * data.SHIFT / 28
    assert torch.allclose(matrices.mean(0), torch.tensor([[0.99, 0, 0], [0, 0.99, 0]]), atol=0.02)


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--model", "cnn", "--data", "sinc"], "a function needs --model mlp"),
        (["--model", "mlp", "--recipe", "best"], "is for cnn"),
        (["--recipe", "best", "--help"], "is for cnn"),
        (["--model", "mlp", "--data", "sinc", "--augment", "affine"], "cannot be augmented"),
        (["--model", "mlp", "--data", "sinc", "--label-smoothing", "0.1"], "no labels to smooth"),
        (["--dropout", "1"], "--dropout: 1 is not below 1"),
        (["--model", "mlp", "--hidden", "0"], "--hidden: 0 is not above 0"),
        (["--model", "mlp", "--hidden", "100000000"], "--hidden: 100000000 is not at most 16384"),
        (["--model", "cnn", "--widths", "8", "8"], "--widths: expected 3"),
        (["--model", "mlp", "--hidden", "x"], "--hidden: 'x' is not a whole number"),
        (["--model", "mlp", "--activation", "step"], "--activation: 'step' is not one of relu"),
        (["--decay", "steps"], "--decay: 'steps' is not one of none, onecycle"),
        (["--label-smoothing", "1.5"], "--label-smoothing: 1.5 is not below 1"),
        (["--hidden", "3"], "--hidden: simplenn has no such option"),
        (["--model", "mlp", "--set", "lr=null"], "every option is a flag now: --lr"),
        (["--lr", "none"], "--lr: 'none' is not a number"),
    ],
)
def test_arguments_that_do_not_fit(argv, words, capsys):
    assert failure(train.parse, argv)[0] == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "argv",
    [
        ["--model", "mlp"],
        ["--model", "cnn", "--augment", "affine", "--optimizer", "sgd"],
        ["--model", "simplenn-custom"],
        ["--model", "mlp", "--data", "square"],
    ],
)
@drawn_too
def test_every_model_trains(argv, figures, tmp_path):
    words = ["--recipe", "tiny", "--data", "builtin", "--limit", "200", *argv, "--out", str(tmp_path / "run")]
    record = train.main(words)
    assert record["state"] == "done" and (tmp_path / "run" / "losses.png").exists()


def small(**settings):
    """The options of a training of two steps."""
    kind = "function" if settings.get("data") in data.FUNCTIONS else settings.get("model", "simplenn")
    changes = dict(data="builtin", limit=40, bs=20, epochs=1)
    return dataclasses.replace(train.RECIPES["tiny"][kind], **changes | {"model": kind} | settings)


def first_network(args):
    """(initial network, its training, validation and test sets) of a run with the options `args`."""
    *parts, _ = data.load(args.data, None, args.limit)
    torch.manual_seed(args.seed)
    return train.build_model(args, parts[0]), parts


STEPS = {
    "simplenn": dict(model="simplenn"),
    "own layers": dict(model="simplenn-custom", dropout=0.3),
    "mlp": dict(model="mlp", weight_decay=0.5),
    "mlp, sgd": dict(model="mlp", optimizer="sgd", weight_decay=0.5, activation="tanh", hidden=(9, 7)),
    "cnn": dict(model="cnn", weight_decay=0.5, label_smoothing=0.2, augment="affine"),
    "cnn, sgd": dict(model="cnn", optimizer="sgd", weight_decay=0.5),
    "a function": dict(model="mlp", data="sinc"),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_the_formula(name):
    """AdamW (Loshchilov and Hutter 2019) or SGD with Nesterov's momentum: the first step, from zero moments."""
    args = small(limit=20, **STEPS[name])
    net, parts = first_network(args)
    ((inputs, targets),) = parts[0].batches(args.bs, shuffle=(args.seed, 0), augment=args.augment)
    before, parameters = copy.deepcopy(net.state_dict()), dict(net.named_parameters())
    net.train()
    torch.manual_seed(7)  # the same units are dropped
    outputs = net(inputs)
    if args.data == "sinc":
        loss = (outputs - targets).square().mean()
    else:
        uniform = torch.full_like(outputs, 1 / 10)
        wanted = (1 - args.label_smoothing) * F.one_hot(targets, 10) + args.label_smoothing * uniform
        loss = -(wanted * outputs.log_softmax(1)).sum(1).mean()
    moved, large = {}, {}
    for (key, p), g in zip(parameters.items(), torch.autograd.grad(loss, list(parameters.values()))):
        decay = args.weight_decay if p.dim() > 1 else 0.0
        adam = p - args.lr * decay * p - args.lr * g / (g.abs() + 1e-8)
        sgd = p - args.lr * 1.9 * (g + decay * p)  # a velocity of g, and its look-ahead: (1 + 0.9) g
        moved[key] = (adam if args.optimizer == "adam" else sgd).detach()
        large[key] = (g.abs() > 1e-5) | (g == 0)
    net.load_state_dict(before)
    r = Silent()
    torch.manual_seed(7)
    train.train(args, r, net, *parts)
    assert r.rows[0]["train_loss"] == pytest.approx(loss.item(), abs=1e-6)
    for key, p in parameters.items():
        assert large[key].any() and (p.detach() - moved[key]).abs()[large[key]].max() < 0.01 * args.lr, key


# {option: (another value, the settings in which it must matter)}
OPTIONS_OF_TRAINING = {
    "model": ("simplenn", dict(model="simplenn-custom")),
    "data": ("square", dict(data="sinc", model="mlp")),
    "epochs": (2, {}),
    "bs": (10, {}),
    "lr": (0.1, {}),
    "optimizer": ("sgd", {}),
    "decay": ("onecycle", {}),
    "weight_decay": (0.5, {}),
    "dropout": (0.5, {}),
    "augment": ("affine", {}),
    "label_smoothing": (0.5, {}),
    "test_curve": (False, {}),
    "hidden": ((5,), dict(model="mlp")),
    "activation": ("gelu", dict(model="mlp")),
    "widths": ((4, 4, 4), dict(model="cnn")),
    "seed": (1, {}),
    "limit": (30, {}),
}
OPTIONS_OF_COMMON = {"data_dir", "device", "out", "precision", "recipe", "resume", "tensorboard", "threads"}


def test_every_option_is_in_a_table():
    assert OPTIONS_OF_TRAINING.keys() | OPTIONS_OF_COMMON == options_of(train.Options).keys()
    cnns = [train.parse(["--model", "cnn", "--recipe", name]) for name in train.RECIPES]
    assert len(set(map(str, cnns))) == len(train.RECIPES)


@pytest.mark.parametrize("name", OPTIONS_OF_TRAINING)
def test_each_option_changes_the_training(name):
    value, settings = OPTIONS_OF_TRAINING[name]
    outcomes = []
    for args in (small(**settings), small(**settings | {name: value})):
        net, parts = first_network(args)
        r = Silent()
        train.train(args, r, net, *parts)
        weights = {key: weight.tolist() for key, weight in net.state_dict().items()}
        rows = [{key: number for key, number in row.items() if "seconds" not in key} for row in r.rows]
        outcomes.append((str(net), weights, rows))
    assert outcomes[0] != outcomes[1]


@pytest.mark.parametrize(
    "name, model_name",
    [
        *[(name, "cnn") for name in ("plain", "best", "tiny")],
        *[("plain", name) for name in ("mlp", "simplenn", "simplenn-custom", "function")],
    ],
)
def test_each_recipe_makes_a_step(name, model_name):
    args = dataclasses.replace(train.RECIPES[name][model_name], limit=20, epochs=1)
    if model_name == "function":
        args = dataclasses.replace(args, data="sinc")
    else:
        args = dataclasses.replace(args, data="builtin", model=model_name)
    net, parts = first_network(args)
    before = copy.deepcopy(dict(net.named_parameters()))
    if args.decay == "onecycle":  # its first step has a rate of zero
        args = dataclasses.replace(args, epochs=2)
    train.train(args, Silent(), net, *parts)
    assert all((before[key] != p).any() for key, p in net.named_parameters())


def test_an_mlp_learns_the_sinc(tmp_path):
    words = "--model mlp --data sinc --epochs 40 --lr 0.01 --bs 20 --hidden 64 64 --activation tanh --out"
    record = train.main([*words.split(), str(tmp_path / "run")])
    assert record["final"]["test_loss"] < 5e-3 and record["final"]["test_accuracy"] > 0.5


def test_weight_decay_spares_biases_and_batch_normalization():
    args = train.parse(["--model", "cnn", "--weight-decay", "0.5"])
    network = model.CNN()
    decayed = {id(p) for p in train.build_optimizer(args, network).param_groups[0]["params"]}
    assert {name for name, p in network.named_parameters() if id(p) in decayed} == {
        "conv1.weight",
        "conv2.weight",
        "conv3.weight",
        "fc.weight",
    }
    assert args.weight_decay == 0.5


# ------------------------------------------------------------------------------------------------------------- anatomy


@pytest.mark.parametrize(
    "name, shape",
    [("simplenn", (3, 32, 32)), ("simplenn-custom", (1, 28, 28)), ("cnn", (1, 28, 28)), ("mlp", (1, 28, 28))],
)
def test_multiply_accumulates_are_half_of_what_torch_counts(name, shape):
    """torch.utils.flop_counter counts a multiplication and an addition for each, and no biases."""
    from torch.utils.flop_counter import FlopCounterMode

    network, x = analyze.models(shape)[name]().eval(), torch.randn(3, *shape)
    rows, output = analyze.layers(network, x)
    with FlopCounterMode(display=False) as counter:
        network(x)
    assert 2 * sum(row["multiply_accumulates"] for row in rows) == counter.get_total_flops()
    assert sum(row["parameters"] for row in rows) == run.count_parameters(network) and output.shape == (3, 10)


def test_layers_of_a_known_convolution():
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2), torch.nn.ReLU())
    (row, relu), _ = analyze.layers(network, torch.zeros(2, 4, 10, 10))
    assert (row["input"], row["weight"], row["output"]) == ("2x4x10x10", "6x2x3x3", "2x6x8x8")
    assert row["multiply_accumulates"] == 2 * 6 * 8 * 8 * 2 * 3 * 3 and row["bias_additions"] == 2 * 6 * 8 * 8
    assert relu["multiply_accumulates"] == relu["parameters"] == 0


def test_shared_and_unused_parameters_count_once():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = torch.nn.Linear(4, 4), torch.nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.layer(self.layer(x))

    rows = analyze.with_total(analyze.layers(Odd(), torch.zeros(1, 4))[0])
    assert [row["parameters"] for row in rows] == [20, 0, 3, 23] and rows[-1]["multiply_accumulates"] == 32


def test_with_all_weights_zero_only_the_last_bias_learns():
    values = analyze.gradients(analyze.zero_all(model.SimpleNN()), torch.randn(5, 1, 28, 28), torch.arange(5))
    assert [name for name, (_, gradient) in values.items() if gradient.any()] == ["fc2.bias"]


@pytest.mark.draws
def test_analyze_a_module_of_ones_own(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "import torch\nclass Net(torch.nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(torch.nn.Conv1d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(18, 4))\n"
        "    def forward(self, x):\n        assert not self.training\n        return super().forward(x)\n"
        "thing = 3\n"
    )
    out = tmp_path / "out"
    rows = analyze.main(["--model", f"{tmp_path / 'mine.py'}:Net", "--shape", "2", "8", "--out", str(out)])
    assert rows[-1]["parameters"] == 21 + 76 and rows[0]["multiply_accumulates"] == 3 * 6 * 6
    assert {f.name for f in out.iterdir()} == {"layers.csv", "layers.md", "histograms.png", "zeros.png"}
    assert (out / "layers.csv").read_text().splitlines()[1].startswith("0,Conv1d,1x2x8,3x2x3,1x3x6,21,108,18")
    for wrong, words in (
        ([f"{tmp_path / 'mine.py'}:thing"], "no nn.Module"),
        (["no.py:Net"], "is not a file"),
        ([f"{tmp_path / 'mine.py'}:Net", "--shape", "5", "8"], "does not take 1x5x8"),
    ):
        code, message = failure(analyze.main, ["--model", *wrong, "--out", str(out)])
        assert code == 1 and one_line(message) and words in message
    for wrong in (
        ["--model", "vgg"],
        ["--shape", "3", "4", "4"],
        ["--model", "cnn", "--shape", "1", "32", "32"],
        ["--shape", "3", "100000", "100000"],
    ):
        assert failure(analyze.main, wrong)[0] == 2
    capsys.readouterr()


FAILING_MODULES = {
    "assert x.sum() is None": "(AssertionError)",
    "raise ValueError": "(ValueError)",
    "exit()": "(it calls exit())",
    "return self.weight * torch.nan": "its output is not finite",
    "return self.weight.to(torch.complex64)": "does not take",
    "return x, x": "does not take",
}


@pytest.mark.parametrize("statement", FAILING_MODULES)
def test_a_module_of_ones_own_that_fails_is_one_line(statement, tmp_path):
    file = tmp_path / "failing.py"
    file.write_text(
        "import torch\nclass Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"        self.weight = torch.nn.Parameter(torch.ones(2))\n    def forward(self, x):\n        {statement}\n"
    )
    code, message = failure(analyze.main, ["--model", f"{file}:Net", "--out", str(tmp_path / "out")])
    assert code == 1 and one_line(message) and FAILING_MODULES[statement] in message


def test_modules_that_cannot_be_analyzed(tmp_path):
    (tmp_path / "exits.py").write_text("exit(0)\n")
    (tmp_path / "complex.py").write_text(
        "import torch\nclass Net(torch.nn.Linear):\n    def __init__(self):\n"
        "        super().__init__(4, 2, dtype=torch.complex64)\n"
        "    def forward(self, x):\n        return super().forward(x.to(torch.complex64)).abs()\n"
    )
    for file, words in (("exits.py", "cannot be imported (SystemExit"), ("complex.py", "has complex parameters")):
        argv = ["--model", f"{tmp_path / file}:Net", "--shape", "4", "--out", str(tmp_path / "out")]
        code, message = failure(analyze.main, argv)
        assert code == 1 and one_line(message) and words in message


def test_gradients_that_are_not_finite_are_left_out_of_the_histograms(tmp_path):
    (tmp_path / "root.py").write_text(
        "import torch\nclass Net(torch.nn.Linear):\n    def __init__(self):\n        super().__init__(4, 2)\n"
        "    def forward(self, x):\n        return super().forward(x).abs().sqrt()\n"  # infinite slope at 0
    )
    analyze.main(["--model", f"{tmp_path / 'root.py'}:Net", "--shape", "4", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "zeros.png").exists()


def test_analyze_prints_the_largest_difference_and_the_totals(tmp_path, capsys):
    analyze.main(["--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert "outputs differ by" in lines[0] and any(line.startswith("total") and "156,074" in line for line in lines)


# ------------------------------------------------------------------------------------------------------- reading digits


def photo(digit, size=(300, 400), box=(60, 40, 180), dark=True, shadow=0.0, seed=0):
    """A grey photo: `digit` (28, 28) scaled to box[2] pixels at box[:2], on paper with noise and a shadow."""
    rng = np.random.default_rng(seed)
    ink = np.zeros(size)
    y, x, n = box
    ink[y : y + n, x : x + n] = np.asarray(Image.fromarray(digit).resize((n, n), Image.Resampling.BICUBIC)) / 255
    paper = 225 - 110 * shadow * np.linspace(0, 1, size[1])
    grey = paper * (1 - 0.8 * ink) + rng.normal(0, 3, size)
    return Image.fromarray((grey if dark else 255 - grey).clip(0, 255).astype(np.uint8))


def test_digits_are_centred_as_mnists_are(data_dir):
    """MNIST's own digits, moved, come back: 20 x 20 box, centre of mass in the middle."""
    images = data.load("mnist", str(data_dir("MNIST")), 40)[2].images[:, 0].numpy()
    differences = []
    for i, image in enumerate(images):
        moved = np.roll(image, (i % 3 - 1, i % 2), (0, 1)) / 255
        differences.append(abs(predict.center_as_mnist(moved).astype(float) - image).mean())
    assert np.median(differences) < 12, "in grey levels"


@pytest.mark.parametrize("dark, shadow", [(True, 0.0), (False, 0.0), (True, 1.0)])
def test_photos_of_digits_are_read_as_the_digits(dark, shadow, tmp_path):
    """What the network sees of a photo is nearly what it sees of the digit itself, whatever paper, size and place."""
    test_set = data.load("builtin")[2]
    for i in range(8):
        digit = test_set.images[i, 0].numpy()
        photo(digit, dark=dark, shadow=shadow, seed=i).save(tmp_path / "photo.png")
        seen, two_digits = predict.prepare(tmp_path / "photo.png")
        direct = predict.center_as_mnist(digit / 255)
        assert not two_digits
        assert np.corrcoef(seen.ravel(), direct.ravel())[0, 1] > 0.85


@pytest.mark.draws
def test_predict_with_the_committed_network(tmp_path, capsys, monkeypatch):
    if not saved.COMMITTED.exists():
        pytest.skip("there are no committed weights")
    monkeypatch.setattr(saved, "newest_run", lambda: None)
    test_set, files = data.load("builtin")[2], []
    for i in range(12):
        files.append(tmp_path / f"{i}-is-{test_set.labels[i]}.png")
        photo(test_set.images[i, 0].numpy(), seed=i).save(files[-1])
    answers = predict.main([*map(str, files), "--out", str(tmp_path / "out")])
    assert sum(title[0] == name[-5] for name, _, title in answers) >= 8, "digits of another dataset"
    assert (tmp_path / "out" / "seen.png").exists() and "weights/cnn.safetensors" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small run on images."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train.main(["--model", "cnn", "--recipe", "tiny", "--data", "builtin", "--limit", "200", "--out", str(out)])
    return out


def test_a_run_is_opened_saved_and_opened_again(trained, tmp_path):
    network = saved.open_model(str(trained))
    saved.main([str(trained), "--out", str(tmp_path / "small.safetensors")])
    small, x = saved.open_model(str(tmp_path / "small.safetensors")), torch.randn(4, 1, 28, 28)
    assert (network.net(x) - small.net(x)).abs().max() < 0.05 and small.classes == [str(i) for i in range(10)]
    assert small.mean == network.mean and small.std == network.std


def test_probabilities_are_calibrated_on_validation_images(trained, tmp_path):
    """A run, and the file that is saved from it, have the temperature that fits its validation images best."""
    network = saved.open_model(str(trained))
    val_set = data.load("builtin", limit=200)[1]
    logits = saved.logits_of(network, val_set.images)
    expected = calibration.fit_temperature(logits, val_set.labels)
    assert network.temperature == pytest.approx(expected, rel=0.05)  # of logits in bfloat16
    saved.main([str(trained), "--out", str(tmp_path / "small.safetensors")])
    small = saved.open_model(str(tmp_path / "small.safetensors"))
    assert small.temperature == pytest.approx(expected, rel=1e-4)
    assert torch.equal(saved.probabilities(network, val_set.images), (logits / network.temperature).softmax(1))


@pytest.mark.slow
def test_the_temperature_of_the_committed_network(data_dir):
    network = saved.open_model(str(saved.COMMITTED))
    val_set = data.load("mnist", str(data_dir("MNIST")))[1]
    expected = calibration.fit_temperature(saved.logits_of(network, val_set.images), val_set.labels)
    assert network.temperature == pytest.approx(expected, rel=1e-3) and expected < 1, (
        "it was trained on smoothed labels"
    )


@pytest.mark.parametrize("probability, unsure", [(0.91, False), (0.89, True)])
def test_below_the_threshold_it_is_unsure(probability, unsure, trained, tmp_path, monkeypatch, capsys):
    photo(data.load("builtin")[2].images[0, 0].numpy(), size=(120, 160), box=(10, 30, 100)).save(tmp_path / "photo.png")
    odds = torch.full((1, 10), (1 - probability) / 9)
    odds[0, 3] = probability
    monkeypatch.setattr(saved, "probabilities", lambda model, images: odds)
    predict.main([str(tmp_path / "photo.png"), "--run", str(trained), "--out", str(tmp_path)])
    expected = f"photo.png: 3 {probability:.1%}" + (", unsure" if unsure else "") + "   ("
    assert expected in capsys.readouterr().out


def strokes(*boxes, size=(40, 60)):
    """Ink (H, W) with a filled box (top, bottom, left, right) for each stroke."""
    ink = np.zeros(size)
    for top, bottom, left, right in boxes:
        ink[top:bottom, left:right] = 1
    return ink


@pytest.mark.parametrize(
    "boxes, two",
    [
        ([(5, 35, 10, 14)], False),
        ([(5, 35, 10, 14), (5, 35, 34, 38)], True),  # 11
        ([(5, 35, 10, 14), (15, 36, 34, 38)], True),  # one of them smaller and lower
        ([(5, 35, 10, 14), (5, 35, 22, 26)], False),  # an open 4, whose parts are equally tall
        ([(5, 35, 10, 14), (5, 9, 18, 40)], False),  # the bar of a 5, away from its bow
        ([(5, 18, 10, 30), (20, 35, 10, 30)], False),  # an 8 in two halves
        ([(5, 35, 10, 14), (30, 34, 34, 38)], False),  # a speck
        ([(5, 35, 30, 34), (5, 19, 6, 25)], False),  # an open 4: its left part is short
        ([(5, 35, 10, 14), (16, 24, 14, 34), (5, 35, 34, 38)], False),  # joined
    ],
)
def test_two_large_shapes_side_by_side_are_two_digits(boxes, two):
    assert predict.shows_two_digits(strokes(*boxes)) == two


def test_a_photo_of_two_digits_is_asked_about(trained, tmp_path, capsys):
    images = data.load("builtin")[2].images[:, 0].numpy()
    pair = reliability.paste_pair(images[0], images[1], gap=4, shift=1)
    square = np.zeros((60, 60), np.uint8)
    square[4 : 4 + len(pair), 2 : 2 + pair.shape[1]] = pair
    photo(square, size=(120, 160), box=(10, 30, 100)).save(tmp_path / "pair.png")
    photo(images[0], size=(120, 160), box=(10, 30, 100)).save(tmp_path / "one.png")
    files = [str(tmp_path / name) for name in ("pair.png", "one.png")]
    (_, _, title), (_, _, other) = predict.main([*files, "--run", str(trained), "--out", str(tmp_path)])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "pair.png: two digits?" in line and "two digits?" in title and "two digits?" not in other


def test_reliability_counts_what_predict_says(trained, tmp_path, capsys):
    argv = ["--run", str(trained), "--limit", "60", "--pairs", "20", "--out", str(tmp_path)]
    rows = {row["setting"]: row for row in reliability.main(argv)}
    network, test_set = saved.open_model(str(trained)), data.load("builtin", limit=60)[2]
    confidence, predicted = saved.probabilities(network, test_set.images).max(1)
    wrong = predicted != test_set.labels
    assert rows["unsure, of digits read wrong"]["of"] == wrong.sum() > 0
    assert rows["unsure, of digits read wrong"]["count"] == (wrong & (confidence < predict.UNSURE)).sum()
    assert rows["two digits, of single digits"]["count"] <= 2 and rows["two digits, of pairs"]["share"] > 0.8
    record = json.loads((tmp_path / "reliability.json").read_text())
    assert record["calibration"]["test_accuracy"] == pytest.approx(1 - wrong.double().mean().item())


def test_the_weights_of_an_unfinished_run_are_not_saved(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["final"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"state": "interrupted"}))
    code, message = failure(saved.main, [str(tmp_path / "run"), "--out", str(tmp_path / "small.safetensors")])
    assert code == 1 and one_line(message) and f"--resume {tmp_path / 'run'}" in message
    assert not (tmp_path / "small.safetensors").exists()


def test_wrong_files_are_a_line_each(trained, tmp_path, capsys):
    photo(data.load("builtin")[2].images[0, 0].numpy()).save(tmp_path / "good.png")
    Image.new("L", (50, 50), 200).save(tmp_path / "blank.png")
    (tmp_path / "text.png").write_text("hello")
    files = [str(tmp_path / name) for name in ("good.png", "text.png", "none.png", "blank.png")]
    code, message = failure(predict.main, [*files, "--run", str(trained), "--out", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert code == 1 and one_line(message) and "blank.png: shows no digit" in message
    assert len(err.strip().splitlines()) == 2 and "text.png" in err and "none.png" in err and "good.png" in out
    (tmp_path / "w.safetensors").write_bytes(b"x" * 50)
    for wrong in ("w.safetensors", "nothing"):
        code, message = failure(predict.main, [files[0], "--run", str(tmp_path / wrong)])
        assert code == 1 and one_line(message) and wrong in message


@pytest.mark.parametrize("ink, paper", [(0, 255), (255, 0), (60, 200)])
def test_a_run_on_images_of_ones_own_sees_an_image_as_in_training(ink, paper, tmp_path):
    """Black on white, or the reverse, and not in the middle: no inversion and no centring, since training had none."""
    digits = data.load("builtin")[0]
    for i in range(60):
        pixels = np.full((56, 40), paper, dtype=np.uint8)
        pixels[4:32, 10:38] = np.where(digits.images[i, 0].numpy() > 127, ink, paper)
        folder = tmp_path / "own" / str(int(digits.labels[i]) % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    train.main(["--recipe", "tiny", "--data", str(tmp_path / "own"), "--out", str(tmp_path / "run")])
    network = saved.open_model(str(tmp_path / "run"))
    assert not network.as_mnist
    files = sorted((tmp_path / "own").glob("*/*.png"))
    folders = [str(folder) for folder in sorted((tmp_path / "own").iterdir())]
    answers = predict.main([*folders, "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert [name for name, _, _ in answers] == [file.name for file in files]
    seen = {image.tobytes() for _, image, _ in answers}
    trained_on = torch.cat([part.images for part in data.load(str(tmp_path / "own"))[:3]])
    assert seen == {image.numpy().tobytes() for image in trained_on[:, 0]}


@pytest.mark.parametrize("data_arg, as_mnist", [("mnist", True), ("builtin", True), ("./gone", False)])
def test_an_older_record_says_by_its_dataset_how_images_are_prepared(data_arg, as_mnist, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["normalization"]["as_mnist"]
    record["args"]["data"] = data_arg
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert saved.open_model(str(tmp_path / "run")).as_mnist == as_mnist


@pytest.mark.parametrize(
    "labels, names",
    [
        (range(1, 10), "1 2 3 4 5 6 7 8 9"),
        (range(1, 11), "1 2 3 4 5 6 7 8 9 10"),
        (range(10), "0 1 2 3 4 5 6 7 8 9"),
        (range(1, 27), " ".join("abcdefghijklmnopqrstuvwxyz")),
        (range(1, 48), " ".join(map(str, range(1, 48)))),
    ],
)
def test_labels_of_idx_files_that_begin_at_1_keep_their_names(labels, names, tmp_path):
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", np.zeros((len(labels), 28, 28)))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", np.array(labels))
    parts, classes = image_files.read(tmp_path, 1, 28)
    assert classes == names.split() and parts[0][1].tolist() == list(range(len(labels)))


@pytest.mark.parametrize("margin, strokes", [(1, True), (0, False)])
def test_idx_files_hold_strokes_as_mnist_has_them_if_their_edges_are_empty(margin, strokes, tmp_path):
    write_drop_in(tmp_path, "mnist", suffix="")
    images = torch.zeros(20, 1, 28, 28, dtype=torch.uint8)
    images[:, :, margin : 28 - margin, 10:20] = 200  # the columns of a pair of trousers reach the edge
    assert data.as_mnist(str(tmp_path), images) == strokes
    assert not data.as_mnist(str(tmp_path / "gone"), images)


def test_idx_files_with_too_few_images_are_refused(tmp_path):
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", np.arange(3)[:, None, None] * np.ones((3, 28, 28)))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", np.arange(3))
    code, message = failure(train.main, ["--recipe", "tiny", "--data", str(tmp_path), "--out", str(tmp_path / "run")])
    assert code == 1 and one_line(message) and "too few" in message and not (tmp_path / "run").exists()


def test_a_record_of_another_width_needs_no_memory(trained, monkeypatch):
    """The network that a damaged record describes may fit no memory."""
    on_meta = record_networks(train, monkeypatch)
    record = json.loads((trained / "run.json").read_text())
    record["args"]["widths"] = [5, 6, 7]
    code, message = failure(saved.build, record, run.read_checkpoint(trained / "best.pt")["model"], "there")
    assert code == 1 and one_line(message) and "there: holds no network" in message
    assert on_meta == [True]


def test_weights_that_are_not_numbers_do_not_speak(trained, tmp_path):
    photo(data.load("builtin")[2].images[0, 0].numpy()).save(tmp_path / "good.png")
    saved.main([str(trained), "--out", str(tmp_path / "small.safetensors")])
    tensors = load_file(tmp_path / "small.safetensors")
    header = {"facts": json.dumps(json.loads((trained / "run.json").read_text()))}
    save_file(tensors | {"fc.bias": tensors["fc.bias"] * float("nan")}, tmp_path / "nan.safetensors", header)
    save_file(tensors | {"fc.weight": tensors["fc.weight"] * 0 + 3e38}, tmp_path / "large.safetensors", header)
    for name in ("nan.safetensors", "large.safetensors"):
        argv = [str(tmp_path / "good.png"), "--run", str(tmp_path / name), "--out", str(tmp_path / "out")]
        code, message = failure(predict.main, argv)
        assert code == 1 and one_line(message) and "is damaged" in message and name in message


@pytest.mark.slow
def test_mutated_images_and_weights_end_in_a_line(trained, tmp_path):
    rng, file = random.Random(0), tmp_path / "photo.png"
    photo(data.load("builtin")[2].images[0, 0].numpy()).save(file)
    saved.main([str(trained), "--out", str(tmp_path / "w.safetensors")])
    for path, read in ((file, predict.prepare), (tmp_path / "w.safetensors", lambda p: saved.open_model(str(p)))):
        whole = path.read_bytes()
        for _ in range(150):
            content = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.3 else whole)
            for _ in range(rng.randrange(1, 6)):
                content[rng.randrange(len(content)) :][:1] = b""
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
            try:
                read(path)
            except run.UserError as error:
                assert "\n" not in str(error) and path.name in str(error)


# ---------------------------------------------------------------------------------------------------------- JAX, optax


@pytest.mark.slow
def test_optax_agrees_with_pytorch_in_float64():
    """A hundred steps from the same initialization on the same batches: to 1e-9."""
    pytest.importorskip("optax", reason="JAX and optax are not installed: pip install jax optax")
    train_set = data.load("builtin", flat=True)[0]
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 5e-3)):
        losses = [
            f(train_set, [784, 32, 10], 32, 1e-3, 0, dtype, 100)
            for f in (train_optax.torch_losses, train_optax.optax_losses)
        ]
        assert np.allclose(*losses, rtol=tolerance, atol=0) and losses[0][-1] < losses[0][0] / 2


def test_losses_of_pytorch_beside_optax_by_hand():
    """Two steps of Adam: the first moves each number by the learning rate, against the sign of its gradient."""
    train_set = data.load("builtin", limit=64, flat=True)[0]
    losses = train_optax.torch_losses(train_set, [784, 8, 10], 32, 1e-3, 0, torch.float64, 3)
    net = train_optax.network([784, 8, 10], 0, torch.float64)
    first = [torch.zeros_like(p) for p in net.parameters()]  # moments
    second = [torch.zeros_like(p) for p in net.parameters()]
    batches = train_optax.batches(train_set, 32, 0, torch.float64)
    for step, (x, y) in zip(range(1, 4), batches):
        loss = F.cross_entropy(net(x), y)
        assert losses[step - 1] == pytest.approx(loss.item(), rel=1e-9)
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        for p, g, m, v in zip(net.parameters(), gradients, first, second):
            m.lerp_(g, 0.1)
            v.lerp_(g * g, 0.001)
            p.data -= 1e-3 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)


@pytest.mark.slow
@pytest.mark.draws
def test_optax_trains_to_the_end(tmp_path, monkeypatch):
    pytest.importorskip("optax", reason="JAX and optax are not installed: pip install jax optax")
    monkeypatch.setattr(train_optax, "DRIFT_STEPS", 1001)
    words = ["--data", "builtin", "--limit", "300", "--epochs", "3", "--hidden", "32", "--out", str(tmp_path)]
    record = train_optax.main(words)
    assert record["final"]["test_accuracy"] > 0.6 and len(record["curve"]) == 3
    assert record["dataset"]["train"] <= 300 == record["args"]["limit"]
    assert {"optax.json", "drift.png", "losses.png"} <= {f.name for f in tmp_path.iterdir()}


def test_without_jax_a_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jax", None)
    code, message = failure(train_optax.main, ["--data", "builtin", "--out", str(tmp_path / "out")])
    assert code == 1 and one_line(message) and "pip install jax optax" in message


# ------------------------------------------------------------------------------------------- what the studies stand on


def small_problem(seed=0):
    torch.manual_seed(seed)
    net = model.MLP([3, 5, 4], "tanh").double()
    x, y = torch.randn(40, 3, dtype=torch.float64), torch.randint(4, (40,))
    return net, hessian.flat_loss(net, F.cross_entropy, x, y), hessian.vector_of(net), x, y


def test_hessian_against_autograd_and_finite_differences():
    net, f, w, x, y = small_problem()
    assert f(w).item() == pytest.approx(F.cross_entropy(net(x), y).item(), rel=1e-12)
    dense = hessian.dense(f, w)
    assert torch.allclose(dense, torch.autograd.functional.hessian(f, w), atol=1e-12)
    v, h = torch.randn_like(w), 1e-5
    difference = (torch.func.grad(f)(w + h * v) - torch.func.grad(f)(w - h * v)) / (2 * h)
    assert torch.allclose(hessian.product(f, w)(v), difference, atol=1e-7)
    assert torch.allclose(hessian.product(f, w)(v), dense @ v, atol=1e-12)


def test_largest_eigenvalue_by_power_iteration():
    _, f, w, _, _ = small_problem()
    values = torch.linalg.eigvalsh(hessian.dense(f, w))
    found = hessian.largest_eigenvalue(hessian.product(f, w), len(w), 2000, 1e-9, dtype=torch.float64)
    assert found == pytest.approx(values[values.abs().argmax()].item(), rel=1e-4)


def test_signs_of_eigenvalues():
    values = torch.tensor([[-2.0, -1e-9, 0.0, 1e-9, 1e-3, 1.0], [-1e-7, 1, 2, 3, 4, 5]])
    assert hessian.signs(values, 1e-6).tolist() == [[2, 3, 1], [5, 1, 0]]


def test_the_error_of_an_estimate_reaches_the_dense_matrix():
    """With too few steps for eigenvalues near the tolerance, the bound of the quadrature is what covers the truth."""
    g = torch.Generator().manual_seed(0)
    values = torch.randn(200, generator=g).sign().double() * 10 ** (-6 * torch.rand(200, generator=g).double())
    q, _ = torch.linalg.qr(torch.randn(200, 200, generator=g, dtype=torch.float64))
    matrix, truth = q @ torch.diag(values) @ q.T, hessian.signs(values, 1e-3) / 200
    for steps in (20, 60):
        shares, errors = hessian.estimate_signs(lambda u: matrix @ u, 200, 6, steps, 1e-3)
        assert ((shares - truth).abs() <= errors).all()


def test_lanczos_quadrature_against_a_dense_matrix():
    """With as many steps as dimensions the quadrature is exact for its vector, and the mean has its stated error."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64))
    values = torch.cat([torch.linspace(-1, -0.1, 9), torch.zeros(30), torch.linspace(0.1, 5, 21)]).double()
    matrix, v = q @ torch.diag(values) @ q.T, torch.ones(60, dtype=torch.float64)
    nodes, weights = hessian.lanczos(lambda u: matrix @ u, v, 60)
    assert weights.sum() == pytest.approx(1) and len(nodes) <= 31 + 1, "30 equal eigenvalues are one node"
    assert (weights * nodes**3).sum().item() == pytest.approx((v @ matrix @ matrix @ matrix @ v).item() / 60, rel=1e-9)
    shares, errors = hessian.estimate_signs(lambda u: matrix @ u, 60, 40, 60, 1e-6)
    assert ((shares - torch.tensor([21, 30, 9]) / 60).abs() < 4 * errors).all() and errors.max() < 0.02


def test_pca_against_scikit_learn():
    decomposition = pytest.importorskip("sklearn.decomposition")
    points = np.random.default_rng(0).normal(size=(30, 50)) @ np.diag(np.linspace(3, 0.1, 50))
    mean, components, fraction = sweep.optimization_path.pca(points)
    theirs = decomposition.PCA(2).fit(points)
    assert np.allclose(fraction, theirs.explained_variance_ratio_) and np.allclose(mean, theirs.mean_)
    assert np.allclose(abs((components * theirs.components_).sum(1)), 1), "up to sign"


def test_the_losses_on_a_plane_are_those_of_its_points():
    module = sweep.optimization_path
    plane = module.plane_of(torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)))
    (xs, ys), losses = module.contours_on_plane(lambda w: (w**2).sum() + w[0], plane, 4)
    for i, y in enumerate(ys):
        for k, x in enumerate(xs):
            w = plane.mean + x * plane.components[0] + y * plane.components[1]
            assert losses[i, k] == pytest.approx((w**2).sum() + w[0], rel=1e-5)


def test_a_stack_trains_like_its_networks_one_by_one():
    train_set, _, _, _ = data.load("sinc")
    x, y = train_set.tensors()
    torch.manual_seed(0)
    nets = [model.MLP([1, 8, 4, 1]) for _ in range(3)]
    stack, alone = training.Stack(nets), []
    for net in nets:
        optimizer = torch.optim.Adam(net.parameters(), 0.01, weight_decay=0.1)
        for _ in range(30):
            loss = F.mse_loss(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        alone.append(loss.item())
    *_, (_, losses, outputs) = training.fit_stack(stack, x, y, 30, 0.01, weight_decay=0.1)
    assert np.allclose(losses.tolist(), alone, rtol=1e-4) and outputs.shape == (3, 300, 1)
    for i, net in enumerate(nets):
        assert torch.allclose(stack.vectors()[i], hessian.vector_of(net), atol=1e-4)


@pytest.mark.parametrize("limit", [None, 7, 1000])
def test_fewer_points_of_a_function_cover_the_same_interval(limit):
    x = data.load("sinc", limit=limit)[0].x.flatten()
    assert len(x) == min(limit or 300, 300) and (x[0], x[-1]) == (-1, 1)
    assert torch.allclose(x.diff(), x[1] - x[0], atol=1e-6)


def test_studies_are_for_ten_classes(tmp_path):
    make_images(tmp_path / "images", {"": 40}, ["cats", "dogs", "hens"])
    words = ["--study", "gradient_norm", "--part", "mnist", "--quick", "--data", str(tmp_path / "images")]
    code, message = failure(sweep.main, [*words, "--out", str(tmp_path / "out")])
    assert code == 1 and one_line(message) and "3 classes" in message


def test_a_study_has_its_own_number_of_seeds_unless_it_is_given():
    context = sweep.tools.Context("a", ROOT, [])
    assert list(context.seeds_of()) == [0, 1, 2] and len(context.seeds_of(6, 2)) == 6
    assert len(dataclasses.replace(context, seeds=4).seeds_of(6, 2)) == 4
    assert len(dataclasses.replace(context, quick=True).seeds_of(6, 2)) == 2


def test_a_small_dataset_leaves_images_for_validation(monkeypatch):
    study, sizes = sweep.parameters_vs_generalization, []
    context = sweep.tools.Context("a", ROOT, [], images="builtin", seeds=1)
    monkeypatch.setattr(context, "map", lambda function, tasks: sizes.extend(map(len, tasks[0][:2])))
    study.run_widths(context, study.WIDTHS, 10_000, 20, 100, 0.001)
    images = len(data.load("builtin")[0])
    assert sizes == [images * 5 // 6, images - images * 5 // 6]


@pytest.mark.parametrize("name", ["builtin", "sinc"])
def test_a_training_that_learns_nothing_says_so(name, tmp_path, capsys):
    """Against a uniform prediction of digits, or the mean of a function."""
    words = ["--model", "mlp", "--data", name, "--recipe", "tiny", "--epochs", "1", "--limit", "64", "--lr", "1e-12"]
    record = train.main([*words, "--device", "cpu", "--out", str(tmp_path / "run")])
    assert "nothing was learned" in record["warning"] and record["warning"] in capsys.readouterr().out
    train_set = data.load(name)[0]
    mean = train_set.targets.float().mean().expand(len(train_set), 1)
    logits = torch.zeros(len(train_set), 10)
    constant = train_set.loss(logits if name == "builtin" else mean, train_set.targets)
    assert train_set.uniform_loss() == pytest.approx(constant.item(), rel=1e-4)


def test_the_networks_of_deep_vs_shallow_have_equal_parameters():
    study = sweep.deep_vs_shallow
    counts = [run.count_parameters(model.MLP(sizes)) for sizes in study.MLPS.values()]
    assert counts == [571, 572, 571]
    counts = [run.count_parameters(study.cnn(n)) for n in (1, 2, 4)]
    assert max(counts) / min(counts) < 1.01 and min(counts) > 25_000
    assert study.cnn(4)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_activation_and_weight_decay_of_deep_vs_shallow():
    """Two steps of a network with one hidden layer, against Adam on that network alone."""
    study = sweep.deep_vs_shallow
    train_sets = {name: data.load(name)[0] for name in study.FUNCTIONS}
    x, y = train_sets["sinc"].tensors()
    for activation, layer, decay in (("relu", torch.nn.ReLU, 0.0), ("leaky", torch.nn.LeakyReLU, 1.0)):
        _, targets, losses, outputs = study.train_stack([1, 8, 1], train_sets, 2, 1, activation, decay)
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(1, 8), layer(), torch.nn.Linear(8, 1))
        optimizer = torch.optim.Adam(net.parameters(), 0.0012, weight_decay=decay)
        for step in range(2):
            loss = F.mse_loss(net(x), y)
            assert losses[step, 0].item() == pytest.approx(loss.item(), rel=1e-5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert torch.allclose(outputs[0], net(x), atol=1e-6) and torch.equal(targets[0], y)
    assert study.VARIANTS["LeakyReLU, weight decay"] == dict(activation="leaky", weight_decay=1e-4)


def test_random_labels():
    labels = torch.arange(10).repeat(300)
    for fraction in (0.0, 0.25, 1.0):
        changed = (sweep.random_labels.randomize(labels, fraction, 10, 0) != labels).float().mean().item()
        assert changed == pytest.approx(0.9 * fraction, abs=0.02), "a tenth of random labels is true"


def test_filter_normalized_directions():
    weights = [torch.randn(6, 3, 5, 5), torch.randn(6), torch.randn(4, 7)]
    direction = sweep.flatness.filter_normalized(weights, torch.Generator().manual_seed(0))
    assert torch.allclose(direction[0].flatten(1).norm(dim=1), weights[0].flatten(1).norm(dim=1))
    assert torch.allclose(direction[2].norm(dim=1), weights[2].norm(dim=1)) and not direction[1].any()


def test_statistics_of_batch_normalization_are_recomputed():
    net, x = sweep.flatness.network(bn=True), torch.randn(3000, 1, 28, 28) + 2
    sweep.flatness.recompute_statistics(net, x)
    outputs = net[0](x)
    assert torch.allclose(net[1].running_mean, outputs.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(net[1].running_var, outputs.var((0, 2, 3)), rtol=1e-2) and not net.training


def test_a_line_between_minima_by_hand(monkeypatch):
    """Loss and accuracy at (1 - a) w1 + a w2, with the statistics of batch normalization of the training images there;
    the barrier above the worse end; the rises half the distance beyond."""
    flatness = sweep.flatness
    train_set, _, test_set, _ = data.load("builtin", limit=40)
    ends = []
    for seed in range(2):
        torch.manual_seed(seed)
        ends.append(flatness.network(True).eval())
    given = iter(ends)
    monkeypatch.setattr(flatness, "train_minimum", lambda *args: next(given))
    alphas = [-0.5, 0.0, 0.25, 1.0, 1.5]
    row = flatness.along_line(train_set, test_set, "batch size, with batch normalization", 0, 1, alphas)
    losses = {}
    for part, dataset in (("train", train_set), ("test", test_set)):
        for a in alphas:
            net = flatness.network(True)
            mixed = [(1 - a) * p + a * q for p, q in zip(*(end.parameters() for end in ends))]
            with torch.no_grad():
                x = train_set.tensors()[0]
                for p, value in zip(net.parameters(), mixed):
                    p.copy_(value)
                for i in (0, 3):  # the convolutions, each before its batch normalization
                    maps = net[:i].eval()(x) if i else x
                    maps = net[i](maps)
                    net[i + 1].running_mean.copy_(maps.mean((0, 2, 3)))
                    net[i + 1].running_var.copy_(maps.var((0, 2, 3)))
                logits = net.eval()(dataset.tensors()[0])
            losses[part, a] = F.cross_entropy(logits, dataset.labels).item()
    for part in ("train", "test"):
        assert row["curves"][f"{part}_loss"] == pytest.approx([losses[part, a] for a in alphas], rel=1e-4)
    highest = max(losses["train", a] for a in (0.0, 0.25, 1.0))
    assert row["final"]["barrier"] == pytest.approx(
        highest - max(losses["train", 0.0], losses["train", 1.0]), rel=1e-3, abs=1e-5
    )
    assert row["final"]["rise_first"] == pytest.approx(losses["train", -0.5] - losses["train", 0.0], rel=1e-3)
    assert row["final"]["rise_second"] == pytest.approx(losses["train", 1.5] - losses["train", 1.0], rel=1e-3)


def test_validation_chooses_the_early_epoch_of_parameters_vs_generalization(monkeypatch):
    study = sweep.parameters_vs_generalization
    train_set, val_set, test_set, _ = data.load("builtin", limit=20, flat=True)
    accuracies = {"train": [0.1, 0.2, 0.3, 0.4], "val": [0.1, 0.7, 0.3, 0.2], "test": [0.2, 0.3, 0.9, 0.4]}
    parts = {id(part.labels): name for name, part in (("val", val_set), ("test", test_set))}
    numbers = {name: iter(values) for name, values in accuracies.items()}

    def evaluate(net, x, y):
        accuracy = next(numbers[parts.get(id(y), "train")])
        return 1 - accuracy, accuracy

    monkeypatch.setattr(study.training, "evaluate", evaluate)
    row = study.train_one(train_set, val_set, test_set, 4, 0, epochs=4, bs=20, lr=0.001)
    names = ("epoch", "train_accuracy", "test_accuracy", "val_accuracy")
    assert [row["early"][name] for name in names] == [2, 0.2, 0.3, 0.7]
    assert [row["final"][name] for name in names] == [4, 0.4, 0.4, 0.2]
    assert row["curves"]["test_loss"] == pytest.approx([0.8, 0.7, 0.1, 0.6])
    assert row["parameters"] == 4 * 785 + 10 * 5


def test_sensitivity_against_the_whole_jacobian():
    net, x = model.MLP([6, 5, 4], "tanh"), torch.randn(7, 6)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda u: net(u[None])[0]))(x)  # (7, 4, 6)
    expected = jacobians.flatten(1).norm(dim=1).mean().item()
    assert sweep.sensitivity.input_jacobian_norm(net, x) == pytest.approx(expected, rel=1e-5)


def test_only_the_batches_that_count_have_their_initial_gradient_computed(monkeypatch):
    sizes, norm = [], sweep.sensitivity.batch_gradient_norm
    monkeypatch.setattr(
        sweep.sensitivity, "batch_gradient_norm", lambda net, x, y: sizes.append(len(x)) or norm(net, x, y)
    )
    sweep.sensitivity.gradient_one(data.load("builtin")[0].subset(100, flat=True), bs=10, seed=0, epochs=1, probe=2)
    assert sizes == [10, 10, 100]


def test_norms_of_the_batch_gradient_by_hand():
    """One step: the norm of all numbers, and the mean of the norms of the four tensors."""
    train_set = data.load("builtin")[0].subset(60, flat=True)
    row = sweep.sensitivity.gradient_one(train_set, bs=60, seed=3, epochs=1, probe=1)
    torch.manual_seed(3)
    net = model.MLP([784, 64, 10])
    x, y = train_set.tensors()
    F.cross_entropy(net(x), y).backward()
    squares = [p.grad.square().sum().item() for p in net.parameters()]
    whole = sum(squares) ** 0.5
    assert row["final"]["mean_norm"] == pytest.approx(whole, rel=1e-4)
    assert row["final"]["mean_norm_last_epoch"] == pytest.approx(whole, rel=1e-4)
    assert row["final"]["norm_at_initial_weights"] == pytest.approx(whole, rel=1e-4)
    assert row["final"]["mean_norm_of_tensors"] == pytest.approx(sum(v**0.5 for v in squares) / 4, rel=1e-4)


def test_the_networks_of_the_minimal_ratio_train_once(tmp_path, monkeypatch):
    """One optimizer for all epochs, and no epoch after the last measurement."""
    counts, fit = [], training.fit

    def counted(*args, **options):
        counts.append(0)
        for step in fit(*args, **options):
            counts[-1] += 1
            yield step

    monkeypatch.setattr(training, "fit", counted)
    sweep.main(["--study", "minimal_ratio", "--part", "mnist", "--quick", "--jobs", "1", "--out", str(tmp_path)])
    assert counts == [2, 2], "two networks; one epoch of 150 images in batches of 64"


def test_training_on_the_gradient_norm_reaches_critical_points():
    """A double well: from both sides of the saddle at 0 to the nearest point without gradient."""
    w = torch.tensor([[0.9], [0.1], [-1.2]], dtype=torch.float64)
    found, norms = sweep.minimal_ratio.train_on_gradient_norm(lambda u: (u[0] ** 2 - 1) ** 2, w, 100)
    assert norms.max() < 1e-9 and found[:, 0].round(decimals=6).abs().tolist() == [1, 0, 1]
    found, norms = sweep.minimal_ratio.train_on_gradient_norm(lambda u: (u[0] ** 2 - 1) ** 2, w, 1)
    assert torch.allclose(norms, (4 * found * (found**2 - 1)).abs()[:, 0]), "one norm for each of the three"


# ------------------------------------------------------------------------------------------------------------- studies


STUDIES = [file.stem for file in sorted((ROOT / "simplenn" / "studies").glob("*.py")) if "\nPARTS" in file.read_text()]


def test_every_study_is_offered():
    assert sorted(sweep.STUDIES) == STUDIES


@drawn_too
@pytest.mark.parametrize("study", STUDIES)
def test_every_study_in_seconds(study, figures, tmp_path):
    sweep.main(["--study", study, "--quick", "--jobs", "1", "--out", str(tmp_path)])
    for part in sweep.STUDIES[study].PARTS:
        record = json.loads((tmp_path / f"{study}-{part}.json").read_text())
        assert record["quick"] and record["rows"] and record["dataset"]["name"] in ("builtin", "sinc")
        assert all(row["command"][1:5] == ["--study", study, "--part", part] for row in record["rows"])
        assert (tmp_path / f"{study}-{part}.png").exists()


def test_the_commands_of_the_studies(capsys):
    sweep.main(["--list", "--study", "flatness", "sensitivity", "--seeds", "5"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0] == "python simplenn/sweep.py --study flatness --part line --seeds 5"
    assert failure(sweep.main, ["--study", "flatness", "--part", "widths"])[0] == 2
    assert failure(sweep.main, ["--data", "sinc"])[0] == 2
    assert failure(sweep.main, ["--quick", "--seeds", "5"])[0] == 2


def parse_sweep(argv):
    return run.parse_options(sweep.__file__, sweep.Options, argv)


def test_the_commands_have_all_arguments_and_a_record_no_path_of_this_machine(tmp_path, capsys):
    where = ["--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    argv = ["--study", "gradient_norm", "--part", "functions", "--quick", "--jobs", "1", "--data", "builtin"]
    sweep.main([*argv, *where, "--list"])
    words = shlex.split(capsys.readouterr().out)
    assert parse_sweep(words[2:]) == parse_sweep([*argv, *where])
    sweep.main([*argv, *where])
    command = json.loads((tmp_path / "out" / "gradient_norm-functions.json").read_text())["rows"][0]["command"]
    assert command[0] == "simplenn/sweep.py"
    assert parse_sweep(command[1:]) == parse_sweep(argv)


@pytest.mark.slow
def test_a_study_in_two_processes_has_the_same_rows(tmp_path):
    for jobs in ("1", "2"):  # in a process of its own: the workers import the folder's modules anew
        words = ["--study", "random_labels", "--quick", "--jobs", jobs, "--out", str(tmp_path / jobs)]
        processes.assert_done(processes.start(ROOT / "simplenn" / "sweep.py", *words))
    one, two = (json.loads((tmp_path / jobs / "random_labels-mnist.json").read_text())["rows"] for jobs in "12")
    assert [row | {"command": None} for row in one] == [row | {"command": None} for row in two]


@pytest.mark.slow
@pytest.mark.parametrize("part", names("simplenn", "bench", "PARTS"))
def test_bench(part, tmp_path):
    words = ["--data", "builtin", "--limit", "200", "--epochs", "1", "--rounds", "1", "--out", str(tmp_path)]
    rows = bench.main(["--part", part, *words])
    record = json.loads((tmp_path / f"bench-{part}.json").read_text())
    assert len(rows) == len(record["rows"]) > 1 and all(row["state"] == "done" for row in record["rows"])
