"""resnet/: the networks against torchvision and the paper, the batches against pictures one by one, the training of two
processes against that of one. What all folders owe is in test_contract.py."""

import csv
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import ROOT, failure, load

train = load("resnet")
data, model, run, folders = train.data, train.model, train.run, train.data.folders


@pytest.fixture(scope="module")
def builtin():
    return data.load("builtin")


def fit(tmp_path, name, *argv):
    return train.main(["--data", "builtin", "--device", "cpu", "--out", str(tmp_path / name), *argv])


def weights(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)["model"]


def csv_rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
        ("resnet110", 1_727_962),
    ],
)
def test_cifar_networks_have_the_papers_size(name, parameters):
    """He et al. 2015, table 6: 0.27, 0.46, 0.66, 0.85, 1.7 million."""
    net = model.build(name, 10)
    assert model.num_parameters(net) == parameters
    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(layers) == model.CIFAR_DEPTHS[name], "as many layers with weights as the name says"


def test_option_a_by_hand():
    """Every second pixel of x, then channels of zeros, added to the two convolutions before the last ReLU."""
    torch.manual_seed(0)
    block, x = model.Block(2, 5, 2).double().eval(), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    expected = torch.zeros(3, 5, 3, 3, dtype=torch.float64)
    for n in range(3):
        for c in range(2):
            for i in range(3):
                for j in range(3):
                    expected[n, c, i, j] = x[n, c, 2 * i, 2 * j]
    branch = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    assert torch.allclose(block(x), F.relu(branch + expected), rtol=1e-14)
    assert len(list(block.parameters())) == 6, "and no parameter"


def test_shortcuts_are_three_networks():
    x, outputs, sizes = torch.randn(4, 3, 32, 32), [], []
    for shortcut in model.SHORTCUTS:
        torch.manual_seed(0)
        net = model.build("resnet20", 10, shortcut)
        outputs.append(net(x)), sizes.append(model.num_parameters(net))
    assert sizes == [269_722, 269_722 + 16 * 32 + 32 * 64 + 2 * 32 + 2 * 64, 269_722]
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])


@pytest.mark.parametrize("name", list(model.IMAGENET_DEPTHS))
def test_logits_are_torchvisions(name):
    """The same state dict, the same logits: names, order of layers, stride in the 3 x 3, padding of the pooling."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    theirs = getattr(models, name)().double().eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training: otherwise a swap of two would not be seen
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.2, 0.6), module.bias.data.normal_(0, 0.1)
    ours = model.build(name, 1000).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 75, 75, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name, size", [("resnet20", 32), ("mnist", 28), ("resnet18", 64), ("resnet50", 64)])
def test_gradients_stay_channels_last(name, size):
    """Where one is not, ReLU's and everything else's way back is up to twenty times slower."""
    layouts = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            if "backward" in str(function):
                layouts.extend(
                    (str(function), x.is_contiguous(memory_format=torch.channels_last))
                    for x in args[:2]
                    if isinstance(x, torch.Tensor) and x.dim() == 4 and x.shape[2] > 1
                )
            return function(*args, **(kwargs or {}))

    net = model.build(name, 10).to(memory_format=torch.channels_last)
    images = torch.randn(2, net.conv1.in_channels, size, size).to(memory_format=torch.channels_last)
    with Watch():
        net(images).sum().backward()
    assert len(layouts) > 20
    assert not [function for function, good in layouts if not good]


def test_mnist_network():
    assert model.build("mnist", 10)(torch.randn(5, 1, 28, 28)).shape == (5, 10)


def test_whitened_patches_have_unit_covariance(builtin):
    net, images = model.build("resnet20", 10), builtin[0].normalize(builtin[0].images[:500])
    model.whiten(net.conv1, images)
    out = F.conv2d(images, net.conv1.weight).transpose(0, 1).flatten(1)  # without padding: (16, patches)
    assert torch.allclose(out[:8], -out[8:], atol=1e-4)
    strong = out[:8] @ out[:8].T / out.shape[1]
    assert (strong - torch.diag(strong.diag())).abs().max() < 1e-2 and (strong.diag()[-4:] - 1).abs().max() < 1e-2


# --------------------------------------------------------------------------------------------------- pictures in memory


def test_the_real_cifar10(data_dir):
    torchvision = pytest.importorskip("torchvision")
    folder = data_dir("cifar-10-batches-py")
    parts = data.load("cifar10", folder)
    assert [len(part) for part in parts] == [45_000, 5_000, 10_000]
    theirs = torchvision.datasets.CIFAR10(folder, train=False)
    ((images, labels),) = data.in_order([(theirs.data.transpose(0, 3, 1, 2), np.array(theirs.targets))])[0]
    assert np.array_equal(parts[2].images.numpy(), images) and parts[2].labels.tolist() == labels.tolist()
    assert parts[2].classes == theirs.classes


def test_the_real_mnist(data_dir, tmp_path):
    torchvision = pytest.importorskip("torchvision")
    folder = data_dir("MNIST/raw")
    parts = data.load("mnist", folder)
    assert [len(part) for part in parts] == [54_001, 5_999, 10_000]
    copy = tmp_path / "MNIST" / "raw"
    copy.mkdir(parents=True)
    for name in data.MNIST["files"]:
        content = (folder / "MNIST" / "raw" / name).read_bytes()
        (copy / name).write_bytes(content), (copy / name.removesuffix(".gz")).write_bytes(gzip.decompress(content))
    theirs = torchvision.datasets.MNIST(tmp_path, train=False)
    ((images, labels),) = data.in_order([(theirs.data[:, None].numpy(), theirs.targets.numpy())])[0]
    assert np.array_equal(parts[2].images.numpy(), images) and parts[2].labels.tolist() == labels.tolist()
    name = "t10k-labels-idx1-ubyte.gz"
    (copy / name).write_bytes((copy / name).read_bytes()[:-9])
    code, message = failure(data.load, "mnist", tmp_path)
    assert code == 1 and name in message and "checksum" in message and "\n" not in message


def test_a_spoilt_cifar10_is_named(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"rubbish")
    for name in ("cifar10", "auto"):
        code, message = failure(data.load, name, tmp_path)
        assert code == 1 and "data_batch_1" in message and "\n" not in message


def test_auto_falls_back_loudly_and_a_name_never(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(data.CIFAR10, "mirrors", ["http://127.0.0.1:9/x"])
    monkeypatch.setitem(data.CIFAR10, "origin", "http://127.0.0.1:9/y")
    assert data.load("auto", tmp_path, limit=50)[0].name == "builtin"
    assert "BUILT-IN" in capsys.readouterr().err
    code, message = failure(data.load, "cifar10", tmp_path)
    assert code == 1 and "cifar10" in message and not list(tmp_path.iterdir())


def crop_one_by_one(dataset, index, shift, flip, size):
    crops, margin = [], size // 8
    for i, (y, x), mirrored in zip(index.tolist(), shift.tolist(), flip.tolist()):
        picture = dataset.images[i].float()[None]
        if size != picture.shape[-1]:
            picture = F.interpolate(picture, (size, size), mode="bilinear", antialias=True).round()
        canvas = torch.zeros(3, size + 2 * margin, size + 2 * margin, dtype=torch.uint8)
        canvas[:, margin : margin + size, margin : margin + size] = picture[0].clamp(0, 255).to(torch.uint8)
        crop = canvas[:, y : y + size, x : x + size]
        crops.append(crop.flip(2) if mirrored else crop)
    return torch.stack(crops)


@pytest.mark.parametrize("size", [32, 24])
def test_crops_of_a_batch_equal_crops_one_by_one(builtin, size):
    generator, most = torch.Generator().manual_seed(0), 2 * (size // 8)
    index = torch.randint(len(builtin[0]), (100,), generator=generator)
    shift = torch.randint(most + 1, (100, 2), generator=generator)
    shift[:4] = torch.tensor([[0, 0], [0, most], [most, 0], [most, most]])
    index[0], index[3] = 0, len(builtin[0]) - 1
    flip = torch.rand(100, generator=generator) < 0.5
    assert torch.equal(
        builtin[0].crop_and_flip(index, shift, flip, size), crop_one_by_one(builtin[0], index, shift, flip, size)
    )


@pytest.mark.parametrize("augment", data.AUGMENT)
def test_batches_are_a_function_of_seed_and_epoch(builtin, augment):
    dataset = builtin[0]
    batches = list(dataset.batches(64, shuffle=(1, 2), augment=augment))
    assert len(batches) == len(dataset) // 64 and all(len(y) == 64 for _, y in batches)
    rest = list(dataset.batches(64, shuffle=(1, 2), augment=augment, skip=60))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(batches[60:], rest, strict=True))
    for other in ((1, 3), (2, 2)):
        assert not torch.equal(batches[0][1], next(dataset.batches(64, shuffle=other, augment=augment))[1])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", ["cifar", "imagenet"])
def test_shards_together_are_the_batch(kind, world):
    dataset = data.load("builtin", limit=100, family=kind)[0]
    assert len(dataset) == 100
    whole = list(dataset.batches(36, shuffle=(1, 2), augment="crop+flip"))
    parts = [list(dataset.batches(36, shuffle=(1, 2), augment="crop+flip", shard=(k, world))) for k in range(world)]
    for (x, y), *shares in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([s[0] for s in shares]), x) and torch.equal(torch.cat([s[1] for s in shares]), y)
        assert {len(s[1]) for s in shares} == {36 // world}, "ranks make equal steps"
    few = [next(dataset.batches(128, shuffle=(1, 2), shard=(k, world)))[1] for k in range(world)]
    assert {len(y) for y in few} == {100 // world}, "nor where there are fewer pictures than a batch has"
    counted = sum(len(y) for k in range(world) for _, y in dataset.batches(7, shard=(k, world)))
    assert counted == len(dataset), "in evaluation every picture counts, and once"


def test_flips_alternate(builtin):
    """Every picture is mirrored in one of two consecutive epochs, and half of them in each."""
    dataset = data.Images(
        torch.arange(640, dtype=torch.int32).view(10, 1, 8, 8).remainder(256).to(torch.uint8),
        torch.arange(10),
        "abc",
        torch.zeros(1, 1, 1, 1),
        torch.ones(1, 1, 1, 1),
        "x",
        "y",
    )
    straight = []
    for epoch in range(4):
        x, y = next(dataset.batches(10, shuffle=(5, epoch), augment="flip"))
        same = (x[y.argsort()] == dataset.images).flatten(1).all(1)
        assert torch.equal(x[y.argsort()][~same], dataset.images[~same].flip(3).float())
        straight.append(same)
    assert torch.equal(straight[0], ~straight[1]) and torch.equal(straight[0], straight[2])
    assert 0 < straight[0].sum() < 10


def test_pictures_without_augmentation_are_as_they_are(builtin):
    x, y = next(builtin[0].batches(500, shuffle=(0, 0)))
    order = torch.randperm(len(builtin[0]), generator=torch.Generator().manual_seed(0))[:500]
    assert torch.equal(y, builtin[0].labels[order])
    assert torch.allclose(x * builtin[0].std + builtin[0].mean, builtin[0].images[order].float(), atol=1e-3)
    x = torch.cat([x for x, _ in builtin[0].batches(1000)])
    assert x.mean((0, 2, 3)).abs().max() < 1e-4 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_distortion():
    x = torch.rand(2, 1, 28, 28)
    still = torch.full((2, 7), 0.5)
    assert torch.allclose(data.distort(x, still), x, atol=1e-5), "the middle of every range leaves a picture as it is"
    right = still.clone()
    right[:, 4] = 0.5 + 1 / 14 / 0.14 / 2  # one pixel, in halves of 28
    assert torch.allclose(data.distort(x, right)[..., :-1], x[..., 1:], atol=1e-5)
    bar = torch.zeros(1, 1, 29, 29)
    bar[..., 14] = 1
    turned = data.distort(bar, torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]]), angle=torch.pi / 2)
    assert torch.allclose(turned, bar.transpose(2, 3), atol=1e-4)


# ------------------------------------------------------------------------------------------------- folders of pictures


@pytest.fixture
def tree(tmp_path):
    """train/ and val/ with two classes of pictures of many shapes, one file in each part being rubbish."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 12), ("val", 5)):
        for name in ("cats", "dogs"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(n):
                shape = (*rng.integers(20, 60, 2), 3)
                Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / part / name / f"{i}.png")
        (tmp_path / part / "dogs" / "bad.jpg").write_bytes(b"rubbish")
    return tmp_path


def test_the_evaluation_cut_is_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms")
    theirs, rng = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)]), np.random.default_rng(0)
    for shape in ((300, 401, 3), (517, 260, 3), (224, 224, 3), (30, 45, 3)):
        picture = Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8))
        assert np.array_equal(np.asarray(folders.center_crop(picture)), np.asarray(theirs(picture))), shape


def test_random_cuts_cover_what_they_should():
    """A picture that holds its own coordinates tells from where, and how mirrored, it was cut."""
    y, x = np.mgrid[0:200, 0:250].astype(np.uint8)
    picture, areas, mirrored = Image.fromarray(np.stack([y, x, x], 2)), [], 0
    for k in range(300):
        cut = np.asarray(folders.random_crop(picture, 64, "crop+flip", (1, k))).astype(float)
        down, across = cut[-1, 32, 0] - cut[0, 32, 0], cut[32, -1, 1] - cut[32, 0, 1]
        mirrored += across < 0
        areas.append(down * abs(across) / (200 * 250))
        assert 0.6 < abs(across) / down < 1.6
    assert min(areas) < 0.12 and 0.8 < max(areas) <= 1 and abs(np.mean(areas) - 0.5) < 0.08 and 110 < mirrored < 190


def test_workers_change_nothing(tree, monkeypatch):
    seen = []
    for workers in (0, 2):
        dataset = folders.load("own", tree)[0]
        monkeypatch.setattr(folders, "num_workers", lambda n, workers=workers: workers)
        for epoch in (0, 1):
            seen.append(list(dataset.batches(4, shuffle=(0, epoch), augment="crop+flip", size=32)))
    for a, b in ((seen[0], seen[2]), (seen[1], seen[3])):
        assert all(torch.equal(p[0], q[0]) and torch.equal(p[1], q[1]) for p, q in zip(a, b, strict=True))
    assert not torch.equal(seen[0][0][0], seen[1][0][0])


def test_an_undecodable_picture_is_named_and_counted(tree, capsys):
    train_set, val_set, test_set = folders.load("own", tree)
    assert test_set is None and [len(train_set), len(val_set)] == [25, 11]
    labels = torch.cat([y for _, y in train_set.batches(5, shuffle=(0, 0), augment="crop+flip", size=32)])
    assert len(labels) == 25 and (labels >= 0).all(), "the next readable one takes its place"
    assert train_set.undecodable == {os.path.join("train", "dogs", "bad.jpg")}
    labels = torch.cat([y for _, y in val_set.batches(5, size=32)])
    assert (labels == -1).sum() == 1 and sum(labels == 0) == 5 and len(val_set.undecodable) == 1
    assert "bad.jpg" in capsys.readouterr().out


def test_it_has_no_weight_in_evaluation(tree):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.tensor([[1.0, 0.0]]).expand(len(x), 2)

    _, val_set, _ = folders.load("own", tree)
    r = types.SimpleNamespace(world=1, rank=0, autocast=lambda: torch.autocast("cpu", enabled=False))
    loss, accuracy = train.evaluate(Constant(), val_set, r)
    expected = F.cross_entropy(torch.tensor([[1.0, 0.0]]).expand(10, 2), torch.tensor([0] * 5 + [1] * 5)).item()
    assert accuracy == 0.5 and loss == pytest.approx(expected, rel=1e-6)


def test_a_folder_of_ones_own_from_end_to_end(tree, tmp_path):
    train.main(["--data", str(tree), "--model", "resnet18", "--epochs", "1", "--bs", "8", "--out", str(tmp_path / "a")])
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["final"]["undecodable"] == [os.path.join(p, "dogs", "bad.jpg") for p in ("train", "val")]
    assert "test_accuracy" not in record["final"] and record["args"]["data"].startswith("./")
    (tree / "val" / "dogs").rename(tree / "val" / "wolves")
    code, message = failure(folders.load, "own", tree)
    assert code == 1 and "dogs" in message and "\n" not in message
    code, message = failure(data.load, "imagenet", tmp_path / "nowhere")
    assert code == 1 and "nowhere" in message and "\n" not in message


def test_the_real_sample_of_imagenet(data_dir, tmp_path):
    where = data_dir("imagenet_sample") / "imagenet_sample"
    record = train.main(
        [
            "--data",
            "imagenet",
            "--data-dir",
            str(where),
            "--model",
            "resnet18",
            "--limit",
            "24",
            "--bs",
            "12",
            "--epochs",
            "1",
            "--lr",
            "0.01",
            "--accumulate",
            "2",
            "--out",
            str(tmp_path / "a"),
        ]
    )
    assert record["final"]["undecodable"] == [] and record["dataset"]["train"] == 24
    assert 0 <= record["final"]["val_accuracy"] <= 1 and record["final"]["val_loss"] < 10


# ------------------------------------------------------------------------------------------------------------- training


def test_it_learns(tmp_path):
    record = fit(tmp_path, "a", "--recipe", "paper", "--limit", "1000", "--epochs", "2", "--bs", "25", "--lr", "0.05")
    assert record["final"]["test_accuracy"] > 0.6, "10 classes: chance is 0.1"
    rows = csv_rows(tmp_path / "a")
    best = max(rows, key=lambda row: float(row["val_accuracy"]))
    assert record["final"]["best_epoch"] == int(best["epoch"])
    assert record["final"]["val_accuracy"] == float(best["val_accuracy"])
    assert record["final"]["last_val_accuracy"] == float(rows[-1]["val_accuracy"])


def test_the_mnist_recipe_learns(tmp_path):
    record = fit(tmp_path, "a", "--model", "mnist", "--limit", "2000", "--epochs", "2", "--bs", "20", "--lr", "0.05")
    assert record["args"]["recipe"] == "mnist" and record["final"]["test_accuracy"] > 0.5


def test_schedules():
    def shape(name, warmup=0.0):
        return [train.optim.lr_factor(name, p, warmup) for p in (0, 0.1, 0.2, 0.49, 0.5, 0.6, 0.75, 0.9999)]

    assert shape("none") == [1.0] * 8
    assert shape("step") == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert shape("cosine")[0] == 1 and shape("cosine")[4] == pytest.approx(0.5) and shape("cosine")[-1] < 1e-6
    assert shape("onecycle")[:3] == pytest.approx([0, 0.5, 1]) and shape("onecycle")[5] == pytest.approx(0.5)
    assert shape("onecycle")[-1] < 1e-3
    assert shape("cosine", 0.2)[:3] == pytest.approx([0, 0.5, 1]) and shape("cosine", 0.2)[5] == pytest.approx(0.5)
    assert [train.size_at([[0.0, 24], [0.5, None]], p) for p in (0, 0.49, 0.5, 1)] == [24, 24, None, None]


def frozen(build):
    """build_model, but in float64, with batch-normalization statistics that are what they are."""

    def build_frozen(args, train_set):
        net = build(args, train_set).double()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 2)
                module.train = types.MethodType(lambda self, mode=True: nn.Module.train(self, False), module)
        net.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
        return net

    return build_frozen


FROZEN = """
import sys
sys.path[:0] = [{tests!r}, {folder!r}]
import test_resnet, train
train.build_model = test_resnet.frozen(train.build_model)
train.main(sys.argv[1:])
"""
STEPS = [
    "--data",
    "builtin",
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--recipe",
    "paper",
    "--limit",
    "48",
    "--bs",
    "16",
    "--epochs",
    "1",
    "--lr",
    "0.01",
]


def same_to(bound, a, b):
    """Are all weights, and the momentum that the gradients have added up to, the same to a relative `bound`?"""
    states = [torch.load(folder / "last.pt", weights_only=True) for folder in (a, b)]
    momenta = [{k: v["momentum_buffer"] for k, v in s["optimizers"][0]["state"].items()} for s in states]
    for ours, theirs in ([s["model"] for s in states], momenta):
        assert ours.keys() == theirs.keys()
        for key in ours:
            scale = theirs[key].abs().max().item()
            assert (ours[key] - theirs[key]).abs().max().item() <= bound * scale, key


def torchrun(*words, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture
def one_process(tmp_path, monkeypatch):
    """The run folder of three steps of one process, in float64 with frozen statistics."""
    monkeypatch.setattr(train, "build_model", frozen(train.build_model))
    train.main([*STEPS, "--out", str(tmp_path / "one")])
    return tmp_path / "one"


def test_two_processes_make_the_steps_of_one(one_process, tmp_path):
    """Gradients and weights of 2 processes with half of the batch each, in two pieces at that, to a relative 1e-12."""
    script = tmp_path / "frozen.py"
    script.write_text(FROZEN.format(tests=str(ROOT / "tests"), folder=str(ROOT / "resnet")))
    process = torchrun(str(script), *STEPS, "--accumulate", "2", "--out", str(tmp_path / "two"))
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    same_to(1e-12, tmp_path / "two", one_process)
    one, two = (csv_rows(folder)[0] for folder in (one_process, tmp_path / "two"))
    for key in one.keys() - {"seconds"}:
        assert float(two[key]) == pytest.approx(float(one[key]), rel=1e-6), key
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2


def test_accumulation_makes_the_steps_of_one_batch(one_process, tmp_path):
    train.main([*STEPS, "--accumulate", "4", "--out", str(tmp_path / "pieces")])
    same_to(1e-12, tmp_path / "pieces", one_process)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted where the kernel shows them")
def test_no_thread_of_a_run_outlives_it(tmp_path):
    """Threads of the process group that are there when the interpreter ends have been seen to abort it."""
    script = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "resnet")!r})
import run, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
print(run.join())
def names():
    return [open(f"/proc/self/task/{{task}}/comm").read() for task in os.listdir("/proc/self/task")]
DistributedDataParallel(torch.nn.Linear(2, 2))(torch.ones(3, 2)).sum().backward()
during = sum("gloo" in name for name in names())
dist.destroy_process_group()
print(during > 0, sum("gloo" in name for name in names()))
"""
    alone = os.environ | dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
    done = subprocess.run([sys.executable, "-c", script], env=alone, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["(0, 1)", "True 0"], done.stderr


def test_stopped_and_resumed_under_torchrun(tmp_path):
    """SIGTERM within an epoch, then on: the weights of a run that nobody stopped, bit for bit."""
    arguments = [
        str(ROOT / "resnet" / "train.py"),
        "--data",
        "builtin",
        "--device",
        "cpu",
        "--model",
        "mnist",
        "--limit",
        "200",
        "--bs",
        "8",
        "--epochs",
        "4",
        "--lr",
        "0.01",
        "--out",
    ]
    whole, out = torchrun(*arguments, str(tmp_path / "whole")), tmp_path / "broken"
    _, errors = whole.communicate()
    assert whole.returncode == 0, errors
    process = torchrun(*arguments, str(out))
    while process.poll() is None and not (out / "best.pt").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    state = torch.load(out / "last.pt", weights_only=True)
    assert json.loads((out / "run.json").read_text())["state"] == "interrupted" and state["epoch"] < 4
    again = torchrun(str(ROOT / "resnet" / "train.py"), "--resume", str(out))
    _, errors = again.communicate()
    assert again.returncode == 0, errors
    a, b = weights(out), weights(tmp_path / "whole")
    assert all(torch.equal(a[k], b[k]) for k in b)
    rows = [csv_rows(folder) for folder in (out, tmp_path / "whole")]
    for row in (*rows[0], *rows[1]):
        del row["seconds"]
    assert rows[0] == rows[1]


def test_the_loss_is_the_mean_over_examples(tmp_path):
    """With a learning rate of nothing, and statistics of the whole set in one batch, training's loss is the formula."""
    fit(
        tmp_path,
        "a",
        "--recipe",
        "paper",
        "--limit",
        "45",
        "--bs",
        "45",
        "--lr",
        "1e-30",
        "--epochs",
        "1",
        "--augment",
        "none",
        "--precision",
        "fp32",
        "--weight-decay",
        "0",
    )
    torch.manual_seed(0)
    net, part = model.build("resnet20", 10), data.load("builtin", limit=45)[0]
    expected = F.cross_entropy(net(part.normalize(part.images)), part.labels).item()
    assert float(csv_rows(tmp_path / "a")[0]["train_loss"]) == pytest.approx(expected, rel=1e-4)


def test_the_average_of_weights_is_the_recursion(tmp_path, monkeypatch):
    """best.pt of three steps is a <- 0.9 a + 0.1 w, beginning with the weights after the first step."""
    seen, step = [], torch.optim.SGD.step

    def spy(self, *args, **kwargs):
        step(self, *args, **kwargs)
        seen.append(self.param_groups[0]["params"][0].detach().clone())

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    monkeypatch.setitem(train.RECIPES, "paper", train.RECIPES["paper"] | {"ema": 0.9})
    average_of = train.optim.build_average
    monkeypatch.setattr(
        train.optim, "build_average", lambda net, ema, steps: average_of(net, ema, 1000)
    )  # as in a long run
    fit(tmp_path, "a", "--recipe", "paper", "--limit", "96", "--bs", "32", "--epochs", "1")
    average = seen[0]
    for w in seen[1:]:
        average = 0.9 * average + 0.1 * w
    assert len(seen) == 3
    assert torch.allclose(weights(tmp_path / "a", "best.pt")["conv1.weight"], average, atol=1e-6)
    assert torch.equal(weights(tmp_path / "a")["conv1.weight"], seen[-1])


def test_the_average_of_a_short_run_has_left_its_beginning():
    """ImageNet's 0.9999 in a run of 90 steps would be the initial weights to 99 %."""
    net = nn.Linear(1, 1, bias=False)
    average = train.optim.build_average(net, 0.9999, 90)
    for step in range(90):
        net.weight.data.fill_(float(step > 0))
        average.update_parameters(net)
    assert 0.99 < average.module.weight.item() < 1


def test_every_variant_of_the_fast_recipe_is_another_training(tmp_path, monkeypatch):
    ends, average_of = {}, train.optim.build_average
    monkeypatch.setattr(
        train.optim, "build_average", lambda net, ema, steps: average_of(net, ema, 1000)
    )  # as in a long run
    for name in (name for name in train.RECIPES if name.startswith("fast")):
        record = fit(tmp_path, name, "--recipe", name, "--limit", "64", "--bs", "32", "--epochs", "2")
        ends[name] = weights(tmp_path / name, "best.pt")["conv1.weight"]
        assert record["state"] == "done" and ends[name].isfinite().all()
    assert len({tuple(w.flatten().tolist()) for w in ends.values()}) == 1 + len(train.VARIANTS)


def test_muon_on_views_is_muon_on_matrices():
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
    matrix = nn.Parameter(layer.weight.detach().permute(0, 2, 3, 1).flatten(1).clone())
    ours, theirs = train.optim.ConvMuon([layer.weight], lr=0.1), torch.optim.Muon([matrix], lr=0.1)
    for gradient in torch.randn(3, *layer.weight.shape):
        ours.zero_grad(), theirs.zero_grad()
        (layer.weight * gradient).sum().backward()
        (matrix * gradient.permute(0, 2, 3, 1).flatten(1)).sum().backward()
        ours.step(), theirs.step()
    assert torch.equal(layer.weight.detach().permute(0, 2, 3, 1).flatten(1), matrix)


def test_divergence_is_a_result(tmp_path):
    code, message = failure(fit, tmp_path, "a", "--recipe", "paper", "--lr", "1e30", "--limit", "300", "--epochs", "3")
    assert code == 1 and "diverged" in message
    assert json.loads((tmp_path / "a" / "run.json").read_text())["state"] == "diverged"


@pytest.mark.parametrize(
    "argv",
    [
        ["--model", "mnist", "--shortcut", "B"],
        ["--data", "mnist", "--model", "resnet20"],
        ["--model", "resnet50", "--data", "cifar10"],
        ["--bs", "100", "--accumulate", "3"],
        ["--recipe", "fast", "--data", "mnist"],
        ["--model", "resnet18", "--data", "builtin", "--augment", "affine"],
        ["--sync-bn"],
    ],
)
def test_a_flag_that_cannot_be_honoured(argv, capsys):
    if argv == ["--sync-bn"] and torch.cuda.is_available():
        pytest.skip("here it can")
    assert failure(train.main, argv)[0] == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "error:" in said and any(word in said for word in argv if word.startswith("--"))


# ----------------------------------------------------------------------------------------------------------- the verbs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    fit(
        folder,
        "run",
        "--recipe",
        "paper",
        "--limit",
        "500",
        "--epochs",
        "2",
        "--bs",
        "25",
        "--lr",
        "0.02",
        "--precision",
        "fp32",
    )
    return folder / "run"


def test_predictions_of_the_test_set(trained, tmp_path):
    accuracy = load("resnet", "predict").main(["--run", str(trained), "--out", str(tmp_path)])
    record = json.loads((trained / "run.json").read_text())
    assert accuracy == pytest.approx(record["final"]["test_accuracy"], abs=0.003)
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [str(i) for i in range(500)]
    assert all(row["name"] == data.SHAPES[int(row["label"])] and 0.1 <= float(row["probability"]) <= 1 for row in rows)
    test_set = data.load("builtin", limit=500)[2]
    right = [int(row["label"]) == y for row, y in zip(rows, test_set.labels.tolist())]
    assert np.mean(right) == pytest.approx(accuracy)
    for name in ("confusion.png", "mistakes.png"):
        assert Image.open(tmp_path / name).size[0] > 500


@pytest.mark.parametrize("labelled", [True, False])
def test_predictions_of_a_folder(labelled, trained, tmp_path, capsys):
    pictures, test_set = tmp_path / "pictures", data.load("builtin")[2]
    for i in range(12):
        folder = pictures / test_set.classes[test_set.labels[i]] if labelled else pictures
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(test_set.images[i].permute(1, 2, 0).numpy()).save(folder / f"{i:02}.png")
    (pictures / "bad.png").write_bytes(b"rubbish")
    accuracy = load("resnet", "predict").main(["--run", str(trained), "--data", str(pictures), "--out", str(tmp_path)])
    assert (accuracy is not None) == labelled and (tmp_path / "confusion.png").exists() == labelled
    assert "bad.png" in capsys.readouterr().out
    with open(tmp_path / "predictions.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 12
    code, message = failure(load("resnet", "predict").main, ["--run", str(pictures)])
    assert code == 1 and "holds no run" in message and "\n" not in message
    load("cifar").main(["--data", "builtin", "--limit", "50", "--epochs", "1", "--out", str(tmp_path / "other")])
    code, message = failure(load("resnet", "predict").main, ["--run", str(tmp_path / "other")])
    assert code == 1 and "another experiment" in message


def test_a_sweep_continues(tmp_path):
    words = [
        sys.executable,
        str(ROOT / "resnet" / "sweep.py"),
        "--data",
        "builtin",
        "--limit",
        "32",
        "--epochs",
        "1",
        "--seeds",
        "1",
        "--jobs",
        "1",
        "--out",
        str(tmp_path),
        "--study",
    ]
    subprocess.run([*words, "options"], check=True, capture_output=True)
    first = {f: f.read_bytes() for f in tmp_path.glob("*/run.json")}
    assert len(first) == 2
    sweep = load("resnet", "sweep")
    sweep.main([*words[2:], "options", "gradients"])
    assert all(f.read_bytes() == content for f, content in first.items()), "what is done is not done again"
    for study, rows, key in (("options", 2, "val_accuracy"), ("gradients", 4, "spread")):
        record = json.loads((tmp_path / f"{study}.json").read_text())
        assert len(record["rows"]) == rows and all(key in row["final"] for row in record["rows"])
        assert (tmp_path / f"{study}.png").stat().st_size > 10_000
    unlimited = [word for word in words[2:] if word not in ("--limit", "32")]
    for argv in ([*words[2:], "options", "--limit", "50"], [*unlimited, "options"]):
        code, message = failure(sweep.main, argv)
        assert code == 1 and "--limit" in message, "a quick look is not taken for the real thing"
    assert failure(sweep.main, ["--data", "mnist", "--study", "fast"])[0] == 2


def test_every_study_is_made_of_arguments_that_train_takes():
    sweep = load("resnet", "sweep")
    for study in sweep.STUDIES.values():
        names = [sweep.folder_name(setting, 0) for setting in study.values()]
        assert len(set(names)) == len(names), "two settings share one folder"
        for setting in study.values():
            args = train.parse(sweep.arguments(setting))
            assert all(getattr(args, name.replace("-", "_")) == value for name, value in setting.items())


def test_what_the_shortcut_is_for(builtin):
    """Without shortcuts the gradient of 56 layers is spread over orders of magnitude more than with them."""
    sweep, (images, labels) = load("resnet", "sweep"), next(builtin[0].batches(32, shuffle=(0, 0)))
    spread = {}
    for shortcut in ("A", "none"):
        norms = sweep.gradient_norms("resnet56", shortcut, images, labels)
        assert len(norms) == 55 and min(norms) > 0
        spread[shortcut] = max(norms) / min(norms)
    assert spread["none"] > 30 * spread["A"], spread


def test_the_bench_measures_all_ways(tmp_path):
    words = ["--data", "builtin", "--limit", "64", "--bs", "32", "--rounds", "1", "--out", str(tmp_path)]
    rows = load("resnet", "bench").main(words)
    assert len(rows) == 7 and all(row["images_per_s"] > 0 and 0 < row["of_peak"] for row in rows)
    record = json.loads((tmp_path / "bench.json").read_text())
    # 41 million multiplications forward (He et al. 2015; 40.8 with every layer), thrice that with the backward pass,
    # less the gradient of the pictures that nobody needs
    assert record["flops_per_image"] == pytest.approx(3 * 2 * 40.8e6, rel=0.02)
    assert failure(load("resnet", "bench").main, ["--data", "builtin", "--limit", "20"])[0] == 2, "less than a batch"
    parts = {row["operation"]: row["share"] for row in json.loads((tmp_path / "step.json").read_text())["rows"]}
    assert sum(parts.values()) == pytest.approx(1) and parts["convolutions"] > 0.2 and min(parts.values()) > 0
    for verb in ("bench", "sweep"):
        code, message = failure(load("resnet", verb).main, ["--data", "builtin", "--out", str(tmp_path / "bench.json")])
        assert code == 1 and "bench.json" in message, "said before any work is done"


def test_the_walkthrough_runs(tmp_path, monkeypatch):
    """Its code cells in order, on built-in data with few iterations, in the folder where Jupyter would start them."""
    notebook = json.loads((ROOT / "resnet" / "walkthrough.ipynb").read_text(encoding="utf-8"))
    monkeypatch.chdir(ROOT / "resnet")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr(sys, "path", [str(ROOT / "resnet"), *sys.path])
    own = ("data", "folders", "model", "run", "fetch", "train", "predict", "sweep")
    for name in own:
        monkeypatch.setitem(sys.modules, name, load("resnet", name))
    small = f"DATA, EPOCHS, LIMIT, OUT = 'builtin', 1, 300, {str(tmp_path / 'run')!r}"
    namespace, began = {"__name__": "walkthrough"}, time.process_time()
    with monkeypatch.context() as m, open(os.devnull, "w") as null:
        m.setattr(sys, "stdout", null)
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                parameters = "parameters" in cell["metadata"].get("tags", [])
                exec(compile(small if parameters else "".join(cell["source"]), "walkthrough", "exec"), namespace)
    assert time.process_time() - began < 30
    assert (tmp_path / "run" / "predictions.csv").exists() and namespace["record"]["state"] == "done"
    assert all(not cell.get("outputs") for cell in notebook["cells"]), "committed without outputs"
    assert "colab" in io.StringIO("".join(notebook["cells"][0]["source"])).read().lower()
