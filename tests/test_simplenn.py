"""simplenn/: own layers against PyTorch's, the data, the training, the studies against closed forms and libraries.

What all folders owe is in test_contract.py.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import failure, load, run

train = load("simplenn")
data, model = train.data, load("simplenn", "model")


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


@pytest.mark.parametrize("argv, words", [
    (["--model", "cnn", "--data", "sinc"], "a function needs --model mlp"),
    (["--model", "mlp", "--recipe", "best"], "is for cnn"),
    (["--model", "mlp", "--data", "sinc", "--augment", "affine"], "cannot be augmented"),
    (["--dropout", "1"], "must be below 1"),
    (["--model", "mlp", "--set", "hidden=[0]"], "layer sizes"),
    (["--model", "cnn", "--set", "widths=[8, 8]"], "layer sizes"),
    (["--model", "mlp", "--set", 'hidden=["x"]'], "layer sizes"),
    (["--model", "mlp", "--set", "activation=step"], "must be one of relu"),
    (["--set", "decay=steps"], "none or onecycle"),
    (["--set", "label_smoothing=1.5"], "below 1"),
    (["--set", "hidden=[3]"], "must be NAME=VALUE"),
])  # fmt: skip
def test_arguments_that_do_not_fit(argv, words, capsys):
    assert failure(train.parse, argv)[0] == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("argv", [["--model", "mlp"], ["--model", "cnn", "--augment", "affine", "--optimizer", "sgd"],
                                  ["--model", "simplenn-custom"], ["--model", "mlp", "--data", "square"]])  # fmt: skip
def test_every_model_trains(argv, tmp_path):
    words = ["--recipe", "tiny", "--data", "builtin", "--limit", "200", *argv, "--out", str(tmp_path / "run")]
    record = train.main(words)
    assert record["state"] == "done" and (tmp_path / "run" / "losses.png").exists()


def test_an_mlp_learns_the_sinc(tmp_path):
    words = "--model mlp --data sinc --epochs 200 --lr 0.02 --bs 100 --set hidden=[64,64] --set activation=tanh --out"
    record = train.main([*words.split(), str(tmp_path / "run")])
    assert record["final"]["test_loss"] < 5e-3 and record["final"]["test_accuracy"] > 0.5


def test_weight_decay_spares_biases_and_batch_normalization():
    args = train.parse(["--model", "cnn", "--weight-decay", "0.5"])
    network = model.CNN()
    decayed = {id(p) for p in train.build_optimizer(args, network).param_groups[0]["params"]}
    assert {name for name, p in network.named_parameters() if id(p) in decayed} == {
        "conv1.weight", "conv2.weight", "conv3.weight", "fc.weight"}  # fmt: skip
    assert run.nonnegative_float("0.5") == args.weight_decay
