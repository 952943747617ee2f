"""resnet/: the networks against torchvision and the paper, augmented batches against images one by one, the training of
two processes against that of one. What all folders owe is in test_contract.py, what common/ owes in test_common.py."""

import csv
import dataclasses
import functools
import gzip
import importlib
import io
import json
import os
import random
import shlex
import shutil
import struct
import subprocess
import sys
import types
import warnings
import zlib

from common.options import to_argv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import processes
from conftest import ROOT, failure, lazy, load, one_line, run
from helpers import assert_as_sure_as_its_header, draw_pictures, make_images, mutations, names, write_drop_in

train = lazy("resnet")
data = lazy("resnet", "data")
model = lazy("resnet", "model")
optim, folders = lazy("resnet", "optim"), lazy("resnet", "folders")
airbench = lazy("resnet", "airbench")
terminal = importlib.import_module("common.terminal")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def builtin():
    return data.load("builtin")


def fit(tmp_path, name, *argv):
    return train.main(["--data", "builtin", "--device", "cpu", "--out", str(tmp_path / name), *argv])


def weights(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)["model"]


def same_weights(a, b):
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def metrics(folder):
    """metrics.csv without its column of seconds."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)]


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
    assert run.count_parameters(net) == parameters
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
    assert len(list(block.parameters())) == 6, "two convolutions and two batch normalizations, nothing in the shortcut"


def test_shortcuts_are_three_networks():
    x = torch.randn(4, 3, 32, 32)
    outputs = []
    sizes = []
    for shortcut in model.SHORTCUTS:
        torch.manual_seed(0)
        net = model.build("resnet20", 10, shortcut)
        outputs.append(net(x))
        sizes.append(run.count_parameters(net))
    assert sizes == [269_722, 269_722 + 16 * 32 + 32 * 64 + 2 * 32 + 2 * 64, 269_722]
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])


LARGE = [pytest.param(name, marks=slow) for name in ("resnet101", "resnet152")]


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", *LARGE])
def test_logits_are_torchvisions(name):
    """The same state dict, the same logits: names, order of layers, stride in the 3 x 3, padding of the pooling."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    theirs = getattr(models, name)().double().eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training; with the initial values, a swap would not show
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.2, 0.6)
            module.bias.data.normal_(0, 0.1)
    ours = model.build(name, 1000).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 75, 75, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name, size", [("resnet20", 32), ("mnist", 28), ("resnet18", 64), ("resnet50", 64)])
def test_gradients_stay_channels_last(name, size):
    """Where one is not, the backward pass of ReLU and all that follows is many times slower."""
    layouts = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
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
    assert not [function for function, channels_last in layouts if not channels_last]


def test_mnist_network():
    net = model.build("mnist", 10)
    assert net(torch.randn(5, 1, 28, 28)).shape == (5, 10)
    assert run.count_parameters(net) == 144_570, "as in the records"


def test_whitened_patches_have_unit_covariance(builtin):
    net, images = model.build("resnet20", 10), builtin[0].normalize(builtin[0].images[:500])
    model.whiten(net.conv1, images)
    out = F.conv2d(images, net.conv1.weight).transpose(0, 1).flatten(1)  # without padding: (16, patches)
    assert torch.allclose(out[:8], -out[8:], atol=1e-4)
    covariance = out[:8] @ out[:8].T / out.shape[1]
    assert (covariance - torch.diag(covariance.diag())).abs().max() < 1e-2
    assert (covariance.diag()[-4:] - 1).abs().max() < 1e-2, "of the strongest components"


# ----------------------------------------------------------------------------------------------------- images in memory


@pytest.mark.slow
@pytest.mark.parametrize("name, counts", [("cifar10", (45_000, 5_000, 10_000)), ("mnist", (54_001, 5_999, 10_000))])
def test_real_datasets_are_those_of_the_records(name, counts, data_dir, tmp_path):
    """Digest and counts of every committed record; test images and labels in the order of torchvision's, sorted."""
    datasets = pytest.importorskip("torchvision.datasets")
    folder = data_dir({"cifar10": "cifar-10-batches-py", "mnist": "MNIST/raw"}[name])
    *parts, facts = data.load(name, folder)
    records = [json.loads(file.read_text()) for file in (ROOT / "resnet" / "results").glob("*.json")]
    rows = [row for record in records for row in record.get("rows", [record]) if row.get("final")]
    recorded = [row["dataset"] for row in rows if row["dataset"]["name"] == name and "train" in row["dataset"]]
    assert recorded and all(dataset == facts for dataset in recorded)
    assert tuple(map(len, parts)) == counts
    if name == "cifar10":
        theirs = datasets.CIFAR10(folder, train=False)
        images, labels = theirs.data.transpose(0, 3, 1, 2), np.array(theirs.targets)
        assert parts[2].classes == theirs.classes
    else:
        for what in ("images-idx3", "labels-idx1"):
            packed = folder / "MNIST" / "raw" / f"t10k-{what}-ubyte.gz"
            (tmp_path / what).write_bytes(gzip.decompress(packed.read_bytes()))
        read = datasets.mnist.read_sn3_pascalvincent_tensor
        images, labels = (read(str(tmp_path / what)).numpy() for what in ("images-idx3", "labels-idx1"))
        images = images[:, None]
    ((images, labels),) = data.image_data.in_order([(images, labels)])[0]
    assert np.array_equal(parts[2].images.numpy(), images) and parts[2].labels.tolist() == labels.tolist()


def crop_one_by_one(dataset, index, shift, flip, size):
    crops, margin = [], size // 8
    for i, (y, x), flipped in zip(index.tolist(), shift.tolist(), flip.tolist()):
        image = dataset.images[i].float()[None]
        if size != image.shape[-1]:
            image = F.interpolate(image, (size, size), mode="bilinear", antialias=True).round()
        canvas = torch.zeros(3, size + 2 * margin, size + 2 * margin, dtype=torch.uint8)
        canvas[:, margin : margin + size, margin : margin + size] = image[0].clamp(0, 255).to(torch.uint8)
        crop = canvas[:, y : y + size, x : x + size]
        crops.append(crop.flip(2) if flipped else crop)
    return torch.stack(crops)


@pytest.mark.parametrize("size", [32, 24])
def test_crops_of_a_batch_equal_crops_one_by_one(builtin, size):
    dataset = builtin[0]
    generator = torch.Generator().manual_seed(0)
    most = 2 * (size // 8)
    index = torch.randint(len(dataset), (100,), generator=generator)
    shift = torch.randint(most + 1, (100, 2), generator=generator)
    shift[:4] = torch.tensor([[0, 0], [0, most], [most, 0], [most, most]])
    index[0], index[3] = 0, len(dataset) - 1
    flip = torch.rand(100, generator=generator) < 0.5
    crops = data.crop_and_flip(dataset.padded(size), size, index, shift, flip)
    assert torch.equal(crops, crop_one_by_one(dataset, index, shift, flip, size))


@pytest.mark.parametrize("size", [32, 24])
def test_a_mirrored_border_is_torchs(builtin, size):
    whole = builtin[0]
    dataset = data.Images(whole.images[:9], whole.labels[:9], whole.classes, whole.mean, whole.std)
    plain = dataset.padded(size)[:, :, size // 8 : -(size // 8), size // 8 : -(size // 8)]
    dataset = dataset.to("cpu")
    dataset.margin, dataset.border = 2, "mirror"
    assert torch.equal(dataset.padded(size).float(), F.pad(plain.float(), (2, 2, 2, 2), "reflect"))


@pytest.mark.parametrize("augment", names("resnet", "data", "AUGMENT"))
def test_batches_are_a_function_of_seed_and_epoch(builtin, augment):
    dataset = builtin[0]
    batches = list(dataset.batches(64, shuffle=(1, 2), augment=augment))
    assert len(batches) == len(dataset) // 64 and all(len(y) == 64 for _, y in batches)
    rest = list(dataset.batches(64, shuffle=(1, 2), augment=augment, skip=60))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(batches[60:], rest, strict=True))
    for other in ((1, 3), (2, 2)):
        assert not torch.equal(batches[0][1], next(dataset.batches(64, shuffle=other, augment=augment))[1])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("family", ["cifar", "imagenet"])
def test_shards_together_are_the_batch(family, world):
    dataset = data.load("builtin", limit=100, family=family)[0]
    assert len(dataset) == 100
    whole = list(dataset.batches(36, shuffle=(1, 2), augment="crop+flip"))
    parts = [list(dataset.batches(36, shuffle=(1, 2), augment="crop+flip", shard=(k, world))) for k in range(world)]
    for (x, y), *shares in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([s[0] for s in shares]), x) and torch.equal(torch.cat([s[1] for s in shares]), y)
        assert {len(s[1]) for s in shares} == {36 // world}, "ranks take equal shares"
    few = [next(dataset.batches(128, shuffle=(1, 2), shard=(k, world)))[1] for k in range(world)]
    assert {len(y) for y in few} == {100 // world}, "also with fewer images than a batch has"
    counted = sum(len(y) for k in range(world) for _, y in dataset.batches(7, shard=(k, world)))
    assert counted == len(dataset), "in evaluation every image counts once"


def test_flips_alternate():
    """Every image is flipped in one of two consecutive epochs, and some but not all of the images in each."""
    pixels = torch.arange(640, dtype=torch.int32).view(10, 1, 8, 8).remainder(256).to(torch.uint8)
    dataset = data.Images(pixels, torch.arange(10), list("abcdefghij"), torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    straight = []
    for epoch in range(4):
        x, y = next(dataset.batches(10, shuffle=(5, epoch), augment="flip"))
        same = (x[y.argsort()] == pixels).flatten(1).all(1)
        assert torch.equal(x[y.argsort()][~same], pixels[~same].flip(3).float())
        straight.append(same)
    assert torch.equal(straight[0], ~straight[1]) and torch.equal(straight[0], straight[2])
    assert 0 < straight[0].sum() < 10


def test_affine_augmentation_distorts_each_image_by_its_own_draws(builtin):
    x, y = next(builtin[0].batches(50, shuffle=(3, 1)))
    distorted, labels = next(builtin[0].batches(50, shuffle=(3, 1), augment="affine"))
    generator = torch.Generator().manual_seed(run.seed_at(3, 1))
    torch.randperm(len(builtin[0]), generator=generator)
    draws = torch.rand(len(builtin[0]), 7, generator=generator)[:50]
    assert torch.equal(labels, y) and torch.equal(distorted, data.distort(x, draws)) and not torch.equal(distorted, x)


def test_images_without_augmentation_are_as_they_are(builtin):
    x, y = next(builtin[0].batches(500, shuffle=(0, 0)))
    order = torch.randperm(len(builtin[0]), generator=torch.Generator().manual_seed(0))[:500]
    assert torch.equal(y, builtin[0].labels[order])
    assert torch.allclose(x * builtin[0].std + builtin[0].mean, builtin[0].images[order].float(), atol=1e-3)
    x = torch.cat([x for x, _ in builtin[0].batches(1000)])
    assert x.mean((0, 2, 3)).abs().max() < 1e-4 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_distortion():
    x = torch.rand(2, 1, 28, 28)
    still = torch.full((2, 7), 0.5)
    assert torch.allclose(data.distort(x, still), x, atol=1e-5), "the middle of every range leaves an image as it is"
    right = still.clone()
    right[:, 4] = 0.5 + 1 / 14 / 0.14 / 2  # one pixel, in halves of 28
    assert torch.allclose(data.distort(x, right)[..., :-1], x[..., 1:], atol=1e-5)
    bar = torch.zeros(1, 1, 29, 29)
    bar[..., 14] = 1
    rotated = data.distort(bar, torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]]), angle=torch.pi / 2)
    assert torch.allclose(rotated, bar.transpose(2, 3), atol=1e-4)


# --------------------------------------------------------------------------------------------------- folders of images


@pytest.fixture
def tree(tmp_path):
    """train/ and val/ with two classes of images of many shapes; one file in each part is damaged."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 12), ("val", 5)):
        for name in ("cats", "dogs"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(n):
                shape = (*rng.integers(20, 60, 2), 3)
                Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / part / name / f"{i}.png")
        (tmp_path / part / "dogs" / "bad.jpg").write_bytes(b"rubbish")
    return tmp_path


def test_center_crops_are_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms")
    theirs, rng = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)]), np.random.default_rng(0)
    for shape in ((300, 401, 3), (517, 260, 3), (224, 224, 3), (30, 45, 3), (80, 320, 3)):
        image = Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8))
        assert np.array_equal(np.asarray(folders.center_crop(image)), np.asarray(theirs(image))), shape


def test_the_walk_through_a_folder_is_torchvisions(tmp_path):
    """Images in sub-folders of a class belong to it."""
    datasets = pytest.importorskip("torchvision.datasets")
    for i, place in enumerate(("a", "a", "a/x", "a/x/y", "a/x/y", "b", "b", "b/.hidden", "b/z")):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), i).save(tmp_path / place / f"{i}.{'tif' if i % 2 else 'png'}")
    (tmp_path / "b" / ".hidden" / "7.tif").unlink()
    theirs, found = datasets.ImageFolder(tmp_path), folders.image_files.find(tmp_path)
    assert found.classes == theirs.classes and len(found.train) == 8
    assert sorted((str(file), label) for file, label in found.train) == sorted(theirs.samples)


def test_random_crops_cover_what_they_should():
    """Pixels that hold their own coordinates show where a crop was taken, and whether it was flipped."""
    y, x = np.mgrid[0:200, 0:250].astype(np.uint8)
    image = Image.fromarray(np.stack([y, x, x], 2))
    areas = []
    flips = 0
    for k in range(300):
        crop = np.asarray(folders.random_crop(image, 64, "crop+flip", (1, k))).astype(float)
        down, across = crop[-1, 32, 0] - crop[0, 32, 0], crop[32, -1, 1] - crop[32, 0, 1]
        flips += across < 0
        areas.append(down * abs(across) / (200 * 250))
        assert 0.6 < abs(across) / down < 1.6
    assert min(areas) < 0.12 and 0.8 < max(areas) <= 1 and abs(np.mean(areas) - 0.5) < 0.08 and 110 < flips < 190


WORKERS = """
import sys
sys.path.insert(0, {folder!r})
import folders, torch
def batches(workers):
    folders.num_workers = lambda n: workers
    dataset = folders.load("imagenet", {tree!r})[0]
    epochs = [list(dataset.batches(4, shuffle=(0, epoch), augment="crop+flip", size=32)) for epoch in (0, 1)]
    return [torch.cat([images for images, _ in epoch]) for epoch in epochs], dataset.undecodable
if __name__ == "__main__":
    (a, bad_a), (b, bad_b) = batches(0), batches(2)
    print(all(torch.equal(x, y) for x, y in zip(a, b)), torch.equal(*a), bad_a == bad_b, len(bad_a), len(a[0]))
"""


@pytest.mark.slow
def test_workers_change_nothing(tree, tmp_path):
    """In a process of its own: workers started by spawn must find the modules."""
    script = tmp_path / "workers.py"
    script.write_text(WORKERS.format(folder=str(ROOT / "resnet"), tree=str(tree)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "True False True 1 24", done.stderr


@pytest.mark.parametrize("count", ["1", "2"])
def test_on_one_core_no_loader_has_more_workers_than_that(count, monkeypatch):
    """PyTorch would warn of it, when a loader is made."""
    dataset = data.load("builtin", limit=10, family="imagenet")[0]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", count)
    monkeypatch.setattr(folders.LazyImageFolder, "__len__", lambda self: 5000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = dataset._loader([], "none", 32, training=True)
    assert loader.num_workers == 1


def test_an_undecodable_image_is_named_and_counted(tree, capsys):
    train_set, val_set, test_set, facts = folders.load("imagenet", tree)
    assert test_set is None and [len(train_set), len(val_set)] == [25, 11] == [facts["train"], facts["val"]]
    labels = torch.cat([y for _, y in train_set.batches(5, shuffle=(0, 0), augment="crop+flip", size=32)])
    assert len(labels) == 25 and (labels >= 0).all(), "the next one that can be decoded takes its place"
    assert train_set.undecodable == {os.path.join("train", "dogs", "bad.jpg")}
    labels = torch.cat([y for _, y in val_set.batches(5, size=32)])
    assert (labels == -1).sum() == 1 and (labels == 0).sum() == 5 and len(val_set.undecodable) == 1
    assert capsys.readouterr().out.count("bad.jpg") == 2


ALONE = types.SimpleNamespace(  # what `evaluate` needs of a run
    world=1, rank=0, autocast=lambda: torch.autocast("cpu", enabled=False), all_reduce=lambda tensor: tensor
)


class Constant(nn.Module):
    def forward(self, x):
        return torch.tensor([[1.0, 0.0]]).expand(len(x), 2)


def test_an_undecodable_image_does_not_count_in_evaluation(tree):
    val_set = folders.load("imagenet", tree)[1]
    loss, accuracy = train.evaluate(Constant(), val_set, ALONE)
    expected = F.cross_entropy(torch.tensor([[1.0, 0.0]]).expand(10, 2), torch.tensor([0] * 5 + [1] * 5)).item()
    assert accuracy == 0.5 and loss == pytest.approx(expected, rel=1e-6)


def test_imagenet_has_no_test_part(tree, tmp_path):
    """Its validation images are the ones that papers report on; a test/ without labels is not read."""
    (tree / "test").mkdir()
    Image.new("RGB", (20, 20)).save(tree / "test" / "1.png")
    train_set, val_set, test_set, facts = data.load("imagenet", tree)
    assert test_set is None and [len(train_set), len(val_set)] == [25, 11] and facts["name"] == "imagenet"
    shutil.rmtree(tree / "val")
    for folder in (tree, tmp_path / "nowhere"):
        code, message = failure(data.load, "imagenet", folder)
        assert code == 1 and one_line(message) and str(folder) in message and "image-net.org" in message


# -------------------------------------------------------------------------------------------------- images of one's own


@pytest.mark.parametrize(
    "parts, counts",
    [
        ({"": 20}, [32, 4, 4]),
        ({"train": 20, "test": 5}, [36, 4, 10]),
        ({"train": 20, "val": 5}, [36, 10, 4]),
        ({"train": 20, "val": 5, "test": 3}, [40, 10, 6]),
    ],
)
def test_every_layout_of_a_folder_has_a_test_set(parts, counts, tmp_path):
    """The split is a function of the names, and each class has its share of every part."""
    make_images(tmp_path / "a", parts)
    *sets, facts = data.load(str(tmp_path / "a"), family="imagenet")
    assert [len(part) for part in sets] == counts == [facts[name] for name in ("train", "val", "test")]
    assert len(set().union(*(part.names for part in sets))) == sum(counts), "no image is in two parts"
    assert all(part.labels.bincount(minlength=2).tolist() == [len(part) // 2] * 2 for part in sets)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    again = data.load(str(tmp_path / "b"), family="imagenet")
    assert [part.names for part in again[:3]] == [part.names for part in sets]
    assert again[3]["digest"] == facts["digest"] and (again[3]["name"], facts["name"]) == ("b", "a")
    changed = next(file for file in sorted((tmp_path / "b").rglob("*")) if file.is_file())
    changed.write_bytes(changed.read_bytes() + b" ")
    assert data.load(str(tmp_path / "b"), family="imagenet")[3]["digest"] != facts["digest"], "names and sizes count"
    assert [len(part) for part in data.load(str(tmp_path / "a"), limit=3, family="imagenet")[:3]] == [3, 3, 3]


@pytest.mark.parametrize(
    "words, chosen",
    [
        ("", ("resnet20", "fast")),
        ("--recipe paper", ("resnet20", "paper")),
        ("--recipe mnist", ("mnist", "mnist")),
        ("--recipe imagenet", ("resnet50", "imagenet")),
        ("--recipe tiny", ("resnet20", "tiny")),
        ("--model mnist", ("mnist", "mnist")),
        ("--model resnet56", ("resnet56", "fast")),
        ("--model resnet18", ("resnet18", "imagenet")),
    ],
)
def test_the_network_for_a_folder_of_images(words, chosen, tmp_path):
    args = train.parse(["--data", str(tmp_path), *words.split()])
    assert (args.model, args.recipe) == chosen


def test_the_network_for_idx_files(tmp_path, capsys):
    words = ["--data", str(write_drop_in(tmp_path / "letters", "letters"))]
    assert (train.parse(words).model, train.parse(words).recipe) == ("mnist", "mnist")
    assert failure(train.parse, [*words, "--model", "resnet20"])[0] == 2
    assert "--model resnet20" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        train.parse([*words, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "mnist for MNIST and other idx files" in shown and "(default: mnist)" in shown, "of these data"


FORMS = {"plain": {"": 8}, "train+test": {"train": 6, "test": 3}, "train+val+test": {"train": 5, "val": 3, "test": 3}}
OWN = [
    ("fast", "resnet20", "plain"),
    ("paper", "resnet20", "train+test"),
    ("tiny", "resnet20", "train+val+test"),
    ("mnist", "mnist", "train+val+test"),
    ("mnist", "mnist", "idx"),
    ("tiny", "mnist", "letters"),
]
HEAVY = [(f"fast-{name}", "resnet20", "plain") for name in names("resnet", "train", "VARIANTS")]
HEAVY += [("imagenet", "resnet18", form) for form in FORMS] + [
    ("paper", "mnist", "balanced"),
    ("mnist", "mnist", "plain"),
]
HEAVY += [("paper", "resnet18", "train+test"), ("tiny", "resnet18", "plain"), ("fast", "resnet20", "train+val+test")]


@pytest.mark.parametrize("recipe, name, form", [*OWN, *(pytest.param(*case, marks=slow) for case in HEAVY)])
def test_every_recipe_trains_on_images_of_ones_own(recipe, name, form, tmp_path):
    if form in FORMS:
        own = make_images(tmp_path / "own", FORMS[form], size=(20, 30))
    else:
        own = write_drop_in(tmp_path / "own", "mnist" if form == "idx" else form, count=94)
    words = ["--data", str(own), "--model", name, "--recipe", recipe, "--epochs", "1", "--bs", "8", "--device", "cpu"]
    record = train.main([*words, "--out", str(tmp_path / "run")])
    assert record["state"] == "done" and 0 <= record["final"]["test_accuracy"] <= 1
    assert record["dataset"]["name"] == "own" and record["args"]["data"].startswith("./")


def test_every_recipe_is_among_those():
    assert {recipe for recipe, _, _ in OWN + HEAVY} == set(train.RECIPES) == set(train.RECIPE_NAMES)


def test_the_test_set_of_ones_own_folder_is_predicted(tmp_path, monkeypatch):
    """From any directory; a run whose data is gone says so."""
    own = make_images(tmp_path / "own", {"": 10})
    out = tmp_path / "run"
    predict = load("resnet", "predict")
    words = ["--data", str(own), "--recipe", "tiny", "--epochs", "1", "--bs", "8", "--precision", "fp32"]
    record = train.main([*words, "--device", "cpu", "--out", str(out)])
    monkeypatch.chdir(tmp_path)
    assert predict.main(["--run", "run", "--device", "cpu"]) == pytest.approx(record["final"]["test_accuracy"])
    assert len((out / "predictions.csv").read_text().splitlines()) == 1 + 2, "a tenth of ten in each of two classes"
    own.rename(tmp_path / "moved")
    code, message = failure(predict.main, ["--run", "run"])
    assert code == 1 and one_line(message) and str(own) in message and "folder of its images" in message
    for name, value in (("model", "resnet9"), ("model", None), ("shortcut", 3), ("limit", "x"), ("data", ...)):
        args = record["args"] | {name: value}
        args = {key: value for key, value in args.items() if value is not ...}
        (out / "run.json").write_text(json.dumps(record | {"args": args}))
        code, message = failure(predict.main, ["--run", "run"])
        assert code == 1 and one_line(message) and "run.json" in message


@pytest.fixture
def hostile(tmp_path):
    """A folder of images as one finds them: odd names, odd files, odd shapes, two that cannot be decoded."""
    root, rng = tmp_path / "images", np.random.default_rng(0)
    make_images(root, {"": 5}, classes=["$\\frac{$", "cats"])
    for i, (shape, mode) in enumerate([((2, 20_000), "RGB"), ((20_000, 2), "L"), ((1, 1), "RGB"), ((30, 20), "CMYK")]):
        pixels = Image.fromarray(rng.integers(0, 255, (*shape, 3), dtype=np.uint8))
        pixels.convert(mode).save(root / "cats" / f"odd{i}.jpg")
    bomb = bytearray((root / "cats" / "0.png").read_bytes())
    bomb[16:24] = struct.pack(">2I", 30_000, 30_000)  # width and height
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    (root / "cats" / "bomb.png").write_bytes(bomb)
    (root / "cats" / "bad.png").write_bytes(b"rubbish")
    (root / "cats" / "Thumbs.db").write_bytes(b"x")
    (root / "cats" / "folder.png").mkdir()
    if sys.platform == "linux":
        os.mkfifo(root / "cats" / "fifo.png")
        (root / "cats" / "broken.png").symlink_to("nowhere")
        (root / "cats" / "loop.png").symlink_to("loop.png")
        (root / "cats" / "below").symlink_to(root)
        shutil.copytree(root / "$\\frac{$", root / os.fsdecode(b"caf\xff" + b"x" * 200))
        shutil.copy(root / "cats" / "0.png", root / "cats" / os.fsdecode(b"\xff.png"))
    return root


@pytest.mark.slow
@pytest.mark.draws
def test_a_hostile_folder_trains_and_is_predicted(hostile, tmp_path, capfd):
    words = ["--data", str(hostile), "--model", "resnet18", "--epochs", "1", "--bs", "8", "--precision", "fp32"]
    record = train.main([*words, "--size", "32", "--lr", "1e-6", "--out", str(tmp_path / "run")])
    bad = [os.path.join("cats", name) for name in ("bad.png", "bomb.png")]
    assert record["final"]["undecodable"] == bad and "test_accuracy" in record["final"]
    said = capfd.readouterr().err
    assert said.count("files that are not images") == 1 and "Thumbs.db" in said and "Warning" not in said
    predict = load("resnet", "predict")
    accuracy = predict.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "test")])
    assert accuracy == pytest.approx(record["final"]["test_accuracy"])
    code, message = failure(
        predict.main, [str(hostile), "--run", str(tmp_path / "run"), "--out", str(tmp_path / "all")]
    )
    said = capfd.readouterr()
    assert code == 1 and "bomb.png" in message and "bad.png" in said.err and "Warning" not in said.err
    assert "% of" in said.out.splitlines()[-1], "what can be read is predicted nevertheless"
    for name in ("predictions.csv", "confusion.png", "mistakes.png"):
        assert (tmp_path / "test" / name).exists() and (tmp_path / "all" / name).exists()
    rows = (tmp_path / "all" / "predictions.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + record["dataset"]["train"] + record["dataset"]["val"] + record["dataset"]["test"] - len(bad)


@pytest.mark.parametrize("shape", [(2, 20_000), (20_000, 2), (1, 3_000)])
def test_a_very_long_image_takes_no_more_memory_than_others(shape, monkeypatch):
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *a: sizes.append(size) or resize(self, size, *a))
    image = Image.fromarray(np.zeros((*shape, 3), dtype=np.uint8))
    assert folders.center_crop(image).size == (224, 224)
    assert folders.random_crop(image, 224, "crop+flip", (0, 1)).size == (224, 224)
    assert len(sizes) == 2 and all(width * height <= 4 * 256 * 256 for width, height in sizes)


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_part_none_of_whose_images_decode_is_an_error(part, tmp_path):
    make_images(tmp_path, {"train": 4, "val": 3, "test": 3})
    for file in (tmp_path / part).glob("*/*"):
        file.write_bytes(b"rubbish")
    code, message = failure(
        train.main, ["--data", str(tmp_path), "--model", "resnet18", "--out", str(tmp_path / "run")]
    )
    assert code == 1 and one_line(message) and str(tmp_path / part) in message and not (tmp_path / "run").exists()
    code, message = failure(train.main, ["--data", str(tmp_path), "--out", str(tmp_path / "run")])
    assert code == 1 and one_line(message) and str(tmp_path / part) in message and "remove" in message


def test_images_that_vanish_during_a_run(tree, monkeypatch):
    train_set, val_set, _, _ = folders.load("imagenet", tree)
    for file in [*tree.glob("*/*/*.png")]:
        file.unlink()
    with pytest.raises(run.UserError, match="11 images can be decoded"):
        train.evaluate(Constant(), val_set, ALONE)
    if sys.platform == "linux":  # elsewhere workers start anew, and do not find the modules of a test
        monkeypatch.setattr(folders, "num_workers", lambda n: 1)
    with pytest.raises(run.UserError) as caught:
        list(train_set.batches(5, shuffle=(0, 0), size=32))
    line = terminal.error_line(caught.value)
    assert "\n" not in line and str(tree / "train") in line and "still there" in line and "Traceback" not in line


@slow
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp"])
def test_fuzzed_images_are_decoded_or_counted(kind):
    """A damaged image is decoded, or it is black in evaluation and another one takes its place in training."""
    file, good = io.BytesIO(), np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(good).save(file, kind, **({"exif": exif} if kind != "bmp" else {}))
    whole, labels = file.getvalue(), torch.tensor([0, 1])
    for damaged in mutations(whole, random.Random(kind), 200):
        for training, seed in ((False, None), (True, (0, 1))):
            decoder = folders.Decoder([damaged, whole], ["damaged", "whole"], labels, "crop+flip", 64, training)
            image, label, undecodable, _ = decoder[0, seed]
            assert image.shape == (64, 64, 3) and image.dtype == torch.uint8
            assert (label, undecodable) in [(0, []), (1 if training else -1, ["damaged"])]


@slow
def test_the_real_sample_of_imagenet(data_dir, tmp_path):
    where = data_dir("imagenet_sample") / "imagenet_sample"
    words = ["--data", "imagenet", "--data-dir", str(where), "--model", "resnet18", "--limit", "24", "--bs", "12"]
    words += ["--epochs", "1", "--lr", "0.01", "--micro-batch", "6", "--precision", "fp32"]
    record = train.main([*words, "--out", str(tmp_path / "a")])
    assert record["final"]["undecodable"] == [] and record["dataset"]["train"] == 24
    assert 0 <= record["final"]["val_accuracy"] <= 1 and record["final"]["val_loss"] < 10


# ------------------------------------------------------------------------------------------------------------- training


@slow
@pytest.mark.parametrize("recipe, lr", [("paper", "0.05"), ("fast", "0.2")])  # in 80 steps, fast reaches 0.057
def test_resnet20_learns(recipe, lr, tmp_path):
    words = ["--recipe", recipe, "--lr", lr, "--limit", "1000", "--epochs", "2", "--bs", "25", "--precision", "fp32"]
    assert fit(tmp_path, "a", *words)["final"]["test_accuracy"] > 0.6, "10 classes: chance is 0.1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of the MNIST network after two epochs on the built-in data."""
    folder = tmp_path_factory.mktemp("trained")
    words = ["--model", "mnist", "--limit", "600", "--epochs", "2", "--bs", "20", "--lr", "0.05"]
    fit(folder, "run", *words, "--precision", "fp32")
    return folder / "run"


def test_the_mnist_recipe_learns(trained):
    record = json.loads((trained / "run.json").read_text())
    assert record["args"]["recipe"] == "mnist" and record["final"]["test_accuracy"] > 0.5, "chance is 0.1"


def test_the_epoch_of_the_highest_validation_accuracy_is_tested(trained):
    final, rows = json.loads((trained / "run.json").read_text())["final"], metrics(trained)
    best = max(rows, key=lambda row: float(row["val_accuracy"]))
    assert final["best_epoch"] == int(best["epoch"]) == torch.load(trained / "best.pt", weights_only=True)["epoch"]
    assert final["val_accuracy"] == float(best["val_accuracy"])
    assert final["last_val_accuracy"] == float(rows[-1]["val_accuracy"])


def test_schedules():
    def shape(name, warmup=0.0):
        return [train.lr_factor(name, p, warmup) for p in (0, 0.1, 0.2, 0.49, 0.5, 0.6, 0.75, 0.9999)]

    assert shape("none") == [1.0] * 8
    assert shape("step") == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert shape("cosine")[0] == 1 and shape("cosine")[4] == pytest.approx(0.5) and shape("cosine")[-1] < 1e-6
    assert shape("onecycle")[:3] == pytest.approx([0, 0.5, 1]) and shape("onecycle")[5] == pytest.approx(0.5)
    assert shape("onecycle")[-1] < 1e-3
    assert shape("cosine", 0.2)[:3] == pytest.approx([0, 0.5, 1]) and shape("cosine", 0.2)[5] == pytest.approx(0.5)


def test_a_learning_rate_rises_over_many_steps():
    """Also in a short run, whose fifth is a few steps; in a long one the schedule is as without the bound."""
    progress = np.arange(60) / 60
    short = [train.lr_factor("onecycle", p, steps=60) for p in progress]
    assert short == pytest.approx(np.minimum(progress * 60 / 200, (1 - progress) / 0.8)) and max(short) < 0.25
    assert [train.lr_factor("cosine", p, 0.05, 60) for p in progress] == pytest.approx(progress * 60 / 200)
    for decay, warmup in (("onecycle", 0.0), ("cosine", 0.2), ("step", 0.2), ("none", 0.2)):
        long = [train.lr_factor(decay, p, warmup, 1000) for p in progress]
        assert long == [train.lr_factor(decay, p, warmup) for p in progress], decay
    for decay in ("none", "step", "cosine"):
        assert train.lr_factor(decay, 0, steps=60) == 1, "without a warm-up there is none"


@pytest.mark.parametrize(
    "epochs, first, size, expected",
    [
        (4, 24, None, [24, 24, None, None]),
        (4, 24, 32, [24, 24, 32, 32]),
        (3, 24, 32, [24, 24, 32]),
        (1, 24, None, [24]),
        (2, None, 28, [28, 28]),
        (2, None, None, [None, None]),
    ],
)
def test_the_size_of_training_images(epochs, first, size, expected):
    args = train.Options(epochs=epochs, first_size=first, size=size)
    assert [train.size_at(args, epoch) for epoch in range(epochs)] == expected


def test_a_training_that_learns_nothing_says_so(tmp_path, trained, capsys):
    words = ["--model", "mnist", "--recipe", "paper", "--limit", "60", "--bs", "30", "--epochs", "1", "--lr", "1e-9"]
    record = fit(tmp_path, "a", *words)
    assert "a uniform prediction has 2.303" in record["warning"] and record["warning"] in capsys.readouterr().out
    assert "warning" not in json.loads((trained / "run.json").read_text())


def frozen(build):
    """build_model, but in float64 and with fixed statistics in batch normalization."""

    def build_frozen(args, train_set):
        net = build(args, train_set).double()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
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
STEPS = shlex.split("--data builtin --device cpu --precision fp32 --model mnist --recipe paper --limit 48 --bs 16")
STEPS += ["--epochs", "1", "--lr", "0.01"]


def assert_same_state(bound, a, b):
    """All weights, and the momentum, which adds up the gradients, are the same to a relative `bound`."""
    states = [torch.load(folder / "last.pt", weights_only=True) for folder in (a, b)]
    momenta = [{k: v["momentum_buffer"] for k, v in s["optimizers"][0]["state"].items()} for s in states]
    for ours, theirs in ([s["model"] for s in states], momenta):
        assert ours.keys() == theirs.keys()
        for key in ours:
            scale = theirs[key].abs().max().item()
            assert (ours[key] - theirs[key]).abs().max().item() <= bound * scale, key


@pytest.fixture
def one_process(tmp_path, monkeypatch):
    """The run folder of three steps of one process, in float64 with fixed statistics."""
    monkeypatch.setattr(train, "build_model", frozen(train.build_model))
    train.main([*STEPS, "--out", str(tmp_path / "one")])
    return tmp_path / "one"


def test_micro_batches_make_the_steps_of_one_batch(one_process, tmp_path):
    train.main([*STEPS, "--micro-batch", "4", "--out", str(tmp_path / "four")])
    assert_same_state(1e-12, tmp_path / "four", one_process)
    for name in ("train_loss", "train_accuracy", "val_loss"):
        values = [float(metrics(folder)[0][name]) for folder in (tmp_path / "four", one_process)]
        assert values[0] == pytest.approx(values[1], rel=1e-6), name


@slow
def test_two_processes_make_the_steps_of_one(one_process, tmp_path):
    """Gradients and weights of 2 processes with half of the batch each, in two micro-batches, to a relative 1e-12."""
    script = tmp_path / "frozen.py"
    script.write_text(FROZEN.format(tests=str(ROOT / "tests"), folder=str(ROOT / "resnet")))
    processes.assert_done(*processes.torchrun(script, *STEPS, "--micro-batch", "4", "--out", tmp_path / "two"))
    assert_same_state(1e-12, tmp_path / "two", one_process)
    one, two = (metrics(folder)[0] for folder in (one_process, tmp_path / "two"))
    for key in one:
        assert float(two[key]) == pytest.approx(float(one[key]), rel=1e-6), key
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2


def test_a_batch_that_does_not_divide_is_refused(monkeypatch, capsys):
    for count, size in ((3, "none"), (2, "5")):
        monkeypatch.setenv("WORLD_SIZE", str(count))
        assert failure(train.parse, ["--bs", "16", "--micro-batch", size])[0] == 2
        assert "--bs 16" in capsys.readouterr().err.splitlines()[-1]


@slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted where the kernel shows them")
def test_no_thread_of_a_run_outlives_it():
    """Threads of the process group that are there when the interpreter ends have been seen to abort it."""
    script = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "resnet")!r})
from common import ddp
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
print(ddp.init_distributed())
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


@pytest.mark.parametrize("due", [False, True])
def test_process_0_says_when_a_checkpoint_is_due(due, monkeypatch):
    """The clocks of the processes differ, but all of them save in the same step, or none."""
    r = object.__new__(train.ddp.Run)
    r.world = 2

    def broadcast(tensor, source):
        assert source == 0
        tensor.fill_(due)

    monkeypatch.setattr(train.ddp.dist, "broadcast", broadcast)
    for saved in (-1e9, 1e9):
        r._saved = saved
        assert r.save_due(240) is due
    r.world = 1
    assert not r.save_due(240)


SHORT = ["--model", "mnist", "--limit", "200", "--bs", "8", "--lr", "0.01", "--precision", "fp32"]


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_resumed_within_an_epoch_it_is_as_if_nothing_happened(end, tmp_path, monkeypatch):
    """Stopped by a signal, or killed after a checkpoint within the epoch: the same weights, bit for bit."""
    words = [*SHORT, "--limit", "80", "--epochs", "2", "--ema", "0.9"]
    fit(tmp_path, "whole", *words)
    calls = []

    def should_stop(self):
        calls.append(self)
        if len(calls) < 15:  # in the second epoch, which has 10 steps
            return False
        if end == "killed":
            raise MemoryError
        return True

    with monkeypatch.context() as m:
        m.setattr(train.ddp.Run, "should_stop", should_stop)
        m.setattr(train.ddp.Run, "save_due", lambda self, seconds: len(calls) == 13)  # its third step
        with pytest.raises(SystemExit if end == "stopped" else MemoryError):
            fit(tmp_path, "broken", *words)
    state = torch.load(tmp_path / "broken" / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 5 if end == "stopped" else 3)
    record = train.main(["--resume", str(tmp_path / "broken")])
    assert record["resumed"] == 1 and same_weights(tmp_path / "broken", tmp_path / "whole")
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")


@slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that a process could handle")
def test_stopped_and_resumed_under_torchrun(tmp_path):
    """SIGTERM within an epoch, then resumed: the weights of a run that nobody stopped, bit for bit."""
    script, out = ROOT / "resnet" / "train.py", tmp_path / "broken"
    arguments = [script, "--data", "builtin", "--device", "cpu", *SHORT, "--limit", "80", "--epochs", "2", "--out"]
    processes.assert_done(*processes.torchrun(*arguments, tmp_path / "whole"))
    event = processes.signal_at("torch:Tensor.backward", 15, "SIGTERM")  # an epoch has 10 steps
    processes.torchrun(*arguments, out, events=[event])
    state = torch.load(out / "last.pt", weights_only=True)
    assert json.loads((out / "run.json").read_text())["state"] == "interrupted"
    assert state["epoch"] == 1 and state["step"] > 0, "within an epoch"
    processes.assert_done(*processes.torchrun(script, "--resume", out))
    assert same_weights(out, tmp_path / "whole") and metrics(out) == metrics(tmp_path / "whole")


def test_the_loss_is_the_mean_over_examples(tmp_path):
    """With a learning rate of almost 0, and the whole set as one batch, the training loss is the formula."""
    words = "--recipe paper --limit 45 --bs 45 --lr 1e-30 --epochs 1 --augment none --precision fp32 --weight-decay 0"
    fit(tmp_path, "a", *words.split())
    torch.manual_seed(0)
    net, part = model.build("resnet20", 10), data.load("builtin", limit=45)[0]
    expected = F.cross_entropy(net(part.normalize(part.images)), part.labels).item()
    assert float(metrics(tmp_path / "a")[0]["train_loss"]) == pytest.approx(expected, rel=1e-4)


def long_average(monkeypatch):
    """The average of weights as in a long run, where a tenth of the run is more than its horizon."""
    build = train.build_average
    monkeypatch.setattr(train, "build_average", lambda net, ema, steps: build(net, ema, 1000))


def test_the_average_of_weights_is_the_recursion(tmp_path, monkeypatch):
    """best.pt of three steps is a <- 0.9 a + 0.1 w, beginning with the weights after the first step."""
    seen, step = [], torch.optim.SGD.step

    def spy(self, *args, **kwargs):
        step(self, *args, **kwargs)
        seen.append(self.param_groups[0]["params"][0].detach().clone())

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    long_average(monkeypatch)
    words = "--model mnist --recipe paper --limit 96 --bs 32 --epochs 1 --ema 0.9 --precision fp32"
    fit(tmp_path, "a", *words.split())
    average = seen[0]
    for w in seen[1:]:
        average = 0.9 * average + 0.1 * w
    assert len(seen) == 3
    assert torch.allclose(weights(tmp_path / "a", "best.pt")["conv1.weight"], average, atol=1e-6)
    assert torch.equal(weights(tmp_path / "a")["conv1.weight"], seen[-1])


def test_the_average_of_a_short_run_does_not_contain_its_initial_weights():
    """With ImageNet's 0.9999, 99 % of the average of 90 steps would be the initial weights."""
    net = nn.Linear(1, 1, bias=False)
    average = train.build_average(net, 0.9999, 90)
    for step in range(90):
        net.weight.data.fill_(float(step > 0))
        average.update_parameters(net)
    assert 0.99 < average.module.weight.item() < 1


@pytest.mark.slow
def test_every_variant_of_the_fast_recipe_is_another_training(tmp_path, monkeypatch):
    long_average(monkeypatch)
    ends = {}
    for name in (name for name in train.RECIPES if name.startswith("fast")):
        words = ["--recipe", name, "--limit", "32", "--bs", "16", "--epochs", "1", "--precision", "fp32"]
        record = fit(tmp_path, name, *words)
        ends[name] = weights(tmp_path / name, "best.pt")["conv1.weight"]
        assert record["state"] == "done" and ends[name].isfinite().all()
    assert len({tuple(w.flatten().tolist()) for w in ends.values()}) == 1 + len(train.VARIANTS)


@pytest.mark.parametrize("shape", [(8, 16, 3, 3), (64, 4, 1, 1)])  # a wide and a tall matrix
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_muon_for_convolutions_is_torchs_on_matrices(layout, shape):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape).to(memory_format=layout))
    matrix = nn.Parameter(weight.detach().permute(0, 2, 3, 1).flatten(1).clone())
    ours, theirs = optim.ConvMuon([weight], 0.1, 0.9, 0.1), torch.optim.Muon([matrix], 0.1, 0.1, momentum=0.9)
    for gradient in torch.randn(3, *shape):
        weight.grad, matrix.grad = gradient, gradient.permute(0, 2, 3, 1).flatten(1)
        ours.step()
        theirs.step()
    assert torch.equal(weight.detach().permute(0, 2, 3, 1).flatten(1), matrix)


def test_orthogonalize_in_float32():
    """The singular vectors are those of the SVD. A well-conditioned matrix: singular values between 0.6 and 1.3."""
    torch.manual_seed(0)
    for shape in ((32, 48), (48, 32)):
        u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        result = optim.orthogonalize(u @ torch.diag(torch.linspace(0.3, 1, 32)) @ vh, torch.float32)
        inner = u.mT @ result @ vh.mT  # diagonal, if the singular vectors are the same
        values = inner.diagonal()
        assert result.dtype == torch.float32 and 0.6 < values.min() and values.max() < 1.3
        assert (inner - torch.diag(values)).abs().max() < 1e-4


def test_precision_of_muon_follows_the_hardware_and_is_kept(monkeypatch):
    """A run begun in float32 continues in float32 on a machine that multiplies bfloat16."""
    args = types.SimpleNamespace(optimizer="muon", lr=0.2, weight_decay=5e-4, nesterov=True, muon_decay=0.02)
    states = {}
    for native in (True, False):
        monkeypatch.setattr(optim.run, "native_bf16", lambda device, native=native: native)
        states[native] = optim.build_optimizers(model.build("resnet20", 10, "A"), args)[1]
    assert [states[native].param_groups[0]["precision"] for native in (True, False)] == ["bf16", "fp32"]
    states[True].load_state_dict(states[False].state_dict())
    assert states[True].param_groups[0]["precision"] == "fp32"


# --------------------------------------------------------------------------------------------- a step, and every option


def first_batch(args):
    """(the network before the first step, its images and labels) of a run on built-in data."""
    family = data.family_of_model(args.model)
    train_set = data.load("builtin", limit=args.limit, family=family)[0]
    torch.manual_seed(args.seed)
    net = train.build_model(args, train_set).to(memory_format=torch.channels_last)
    size = train.size_at(args, 0)
    images, labels = next(train_set.batches(args.bs, (args.seed, 0), args.augment, size=size))
    return net.train(), images, labels


def muon_direction(gradient):
    """The first update of Muon (Jordan et al. 2024) in float32: Nesterov momentum 0.9, five steps of Newton-Schulz."""
    momentum = 0.1 * gradient
    update = gradient + 0.9 * (momentum - gradient)
    matrix = update.permute(0, 2, 3, 1).flatten(1)  # (c_out, k * k * c_in)
    x = matrix / matrix.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    c_out, c_in, k, _ = gradient.shape
    scale = max(1, c_out / (k * k * c_in)) ** 0.5
    return scale * x.view(c_out, k, k, c_in).permute(0, 3, 1, 2)


@pytest.mark.parametrize("model_name", ["mnist", "resnet20"])
@pytest.mark.parametrize(
    "words",
    [
        "--weight-decay 0",
        "--weight-decay 0.01",
        "--nesterov --weight-decay 0.01 --label-smoothing 0.2",
        "--optimizer muon --nesterov --weight-decay 0.01 --muon-decay 0.3",
        "--augment none --size 24",
        "--first-size 24",
    ],
)
def test_one_step_is_the_formula(model_name, words, tmp_path, monkeypatch):
    """The loss is the mean of -sum(q log p); the step is that of SGD, or of Muon for all convolutions but the first."""
    monkeypatch.setattr(optim.run, "native_bf16", lambda device: False)  # Muon's products in float32
    words = ["--model", model_name, "--recipe", "paper", "--decay", "none", "--lr", "0.1", *words.split()]
    words += ["--limit", "12", "--bs", "12", "--epochs", "1", "--precision", "fp32"]
    args = train.parse(["--data", "builtin", *words])
    net, images, labels = first_batch(args)
    log_p = net(images).log_softmax(1)
    q = F.one_hot(labels, 10) * (1 - args.label_smoothing) + args.label_smoothing / 10
    loss = -(q * log_p).sum(1).mean()
    parameters = dict(net.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))
    fit(tmp_path, "a", *words)
    ours = weights(tmp_path / "a")
    assert float(metrics(tmp_path / "a")[0]["train_loss"]) == pytest.approx(loss.item(), rel=1e-5)
    for name, w in parameters.items():
        if args.optimizer == "muon" and w.dim() == 4 and name != "conv1.weight":
            new = w * (1 - 0.01 * args.muon_decay) - 0.01 * muon_direction(gradients[name])
        else:
            gradient = gradients[name] + args.weight_decay * w
            if args.nesterov:
                gradient = gradient + 0.9 * gradient  # the momentum is the gradient in the first step
            new = w - 0.1 * gradient
        change = (new - w).abs().max().item()
        assert torch.allclose(ours[name], new.detach(), rtol=1e-4, atol=1e-3 * change + 1e-7), name


SMALL = "--model mnist --recipe paper --decay none --lr 0.02 --limit 24 --bs 8 --epochs 2 --precision fp32".split()
COMMON = {"data_dir", "out", "resume", "device", "threads", "tensorboard"}  # test_contract.py and test_common.py
ELSEWHERE = {"compile", "sync_bn"}  # below
OPTIONS = {  # option: (what else is given, another value): the weights of last.pt are others
    "data": ([], "builtin"),
    "seed": ([], "1"),
    "precision": ([], "bf16"),
    "limit": ([], "32"),
    "recipe": ([], "mnist"),
    "model": (["--limit", "8", "--epochs", "1"], "resnet20"),
    "epochs": ([], "3"),
    "bs": ([], "6"),
    "micro_batch": ([], "4"),
    "optimizer": ([], "muon"),
    "lr": ([], "0.03"),
    "decay": ([], "cosine"),
    "warmup": ([], "0.5"),
    "nesterov": ([], True),
    "weight_decay": ([], "0.1"),
    "muon_decay": (["--optimizer", "muon"], "0.5"),
    "augment": ([], "none"),
    "size": ([], "24"),
    "first_size": ([], "24"),
    "label_smoothing": ([], "0.3"),
    "ema": ([], "0.5"),
    "shortcut": (["--model", "resnet20", "--limit", "4", "--bs", "4", "--epochs", "1"], "B"),
    "whiten": ([], True),
}


@pytest.mark.parametrize(
    "words, reason",
    [
        ("--warmup 0.3", "is not for --decay onecycle"),
        ("--recipe paper --muon-decay 0.5", "is for --optimizer muon"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(words, reason, refused):
    assert reason in refused(train.parse, *words.split())


def test_every_option_is_in_the_table():
    fields = {field.name for field in dataclasses.fields(train.Options)}
    assert OPTIONS.keys() | COMMON | ELSEWHERE == fields and not OPTIONS.keys() & (COMMON | ELSEWHERE)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """small_run(words): the run folder of SMALL with other words, made once."""
    folder = tmp_path_factory.mktemp("small")

    @functools.cache
    def get(*words):
        out = folder / f"run{len(list(folder.iterdir()))}"
        given = [] if "--data" in words else ["--data", "builtin"]
        train.main([*SMALL, *given, "--device", "cpu", *words, "--out", str(out)])
        return out

    return get


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_matters_within_a_few_steps(name, small_run, tmp_path, monkeypatch):
    before, value = OPTIONS[name]
    words = [*before, f"--{name.replace('_', '-')}"]
    if value is not True:
        words.append(value)
    if name == "data":  # the other dataset is read from idx files
        before = ["--data", str(write_drop_in(tmp_path / "idx", "mnist"))]
    if name == "ema":
        long_average(monkeypatch)
    file = "best.pt" if name == "ema" else "last.pt"
    plain, other = (weights(small_run(*given), file) for given in (before, words))
    same = plain.keys() == other.keys() and all(torch.equal(plain[key], other[key]) for key in plain)
    assert not same, f"--{name} changes nothing"


def test_a_network_is_compiled_on_the_device_that_is_named(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net, **options: compiled.append(net) or net)
    for device in ("cpu", "cuda", "none"):
        fit(tmp_path, device, *SMALL, "--epochs", "1", "--compile", device)
    assert len(compiled) == 1


def test_statistics_are_synchronized_where_that_is_asked_for(monkeypatch):
    args, train_set = train.Options(model="mnist"), types.SimpleNamespace(classes=list("ab"))
    for sync_bn in (True, False):
        net = train.build_model(dataclasses.replace(args, sync_bn=sync_bn), train_set)
        assert any(isinstance(module, nn.SyncBatchNorm) for module in net.modules()) == sync_bn


# ------------------------------------------------------------------------------------------------------------- airbench

AIRBENCH = "--data builtin --device cpu --limit 60 --epochs 2 --bs 20 --width 12 --precision fp32".split()


def airbench_run(folder, *words):
    return airbench.main([*AIRBENCH, *words, "--out", str(folder)])


def test_airbench_learns(tmp_path):
    record = airbench_run(tmp_path / "a", "--limit", "1000", "--epochs", "3", "--bs", "50")
    assert record["final"]["test_accuracy"] > 0.5 and record["final"]["test_accuracy_of_six_views"] > 0.5
    assert "val_accuracy" not in metrics(tmp_path / "a")[0], "the last epoch is tested, whichever was best"


@pytest.mark.parametrize("held_out", [False, True])
def test_airbench_reads_the_images_that_it_may(held_out, tmp_path, monkeypatch):
    """All but the test images, or with --held-out all but the validation images, which are then judged; never both."""
    parts = data.load("builtin", limit=60)[:3]
    seen = {"training": set(), "judged": set()}
    normalize = data.Images.normalize

    def spy(self, images):
        if torch.is_grad_enabled():  # crops; without augmentation they are the images
            seen["training"] |= {hash(image.tobytes()) for image in images.numpy()}
        else:
            seen["judged"] |= {hash(image.tobytes()) for image in images.numpy()}
        return normalize(self, images)

    monkeypatch.setattr(airbench, "AUGMENT", "none")
    monkeypatch.setattr(airbench, "build_model", lambda args, train_set: airbench.Network(10, args.width))
    monkeypatch.setattr(data.Images, "normalize", spy)
    airbench_run(tmp_path / "a", "--first-size", "32", "--bs", "10", *["--held-out"] * held_out)
    of_part = [{hash(image.tobytes()) for image in part.images.numpy()} for part in parts]
    training = of_part[0] if held_out else of_part[0] | of_part[1]
    assert seen["training"] == training and seen["judged"] == of_part[1 if held_out else 2]


def test_filters_begin_as_the_identity():
    x = torch.randn(2, 5, 6, 6)
    assert torch.equal(airbench.Convolution(5, 8)(x)[:, :5], x)


def test_six_views_are_weighted():
    """By the mean of one pixel, which tells which view it was: (8, 8) itself, twice as often as its diagonal ones."""
    images = torch.arange(2 * 3 * 16 * 16.0).view(2, 3, 16, 16)

    class Pixel(nn.Module):
        def forward(self, x):
            return x[:, :, 5, 5]

    mirrored = [(images[:, :, r, c], images[:, :, r, m]) for r, c, m in ((5, 5, 10), (4, 4, 9), (6, 6, 11))]
    (a, b), (c, d), (e, f) = mirrored
    expected = 0.25 * (a + b) + 0.125 * (c + d) + 0.125 * (e + f)
    assert torch.allclose(airbench.SixViews(Pixel())(images), expected)


def test_one_step_of_airbench_is_the_formula(tmp_path, monkeypatch):
    """Muon turns each convolution by the learning rate; SGD moves biases and the last layer by the sum of gradients."""
    monkeypatch.setattr(optim.run, "native_bf16", lambda device: False)
    words = ["--limit", "24", "--bs", "24", "--epochs", "1", "--held-out"]
    args = airbench.parse([*AIRBENCH, *words])
    train_set = data.load("builtin", limit=24)[0]
    train_set.margin, train_set.border = 2, "mirror"
    torch.manual_seed(0)
    net = airbench.build_model(args, train_set)
    airbench.normalize_filters(net)
    ((images, labels),) = train_set.batches(24, (0, 0), "crop+flip", size=24)
    log_p = net(images).log_softmax(1)
    q = F.one_hot(labels, 10) * 0.8 + 0.02
    loss = -(q * log_p).sum(1).mean()
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))
    airbench_run(tmp_path / "a", *words)
    ours = weights(tmp_path / "a")
    assert float(metrics(tmp_path / "a")[0]["train_loss"]) == pytest.approx(loss.item(), rel=1e-5)
    for name, w in parameters.items():
        if w.dim() == 4:
            assert w.norm().item() == pytest.approx(len(w) ** 0.5)
            new = w - 0.12 * muon_direction(gradients[name])
        else:
            lr = 0.67 if name == "fc.weight" else 0.053
            gradient = 24 * gradients[name] + 24 * 2e-6 / lr * w
            new = w - lr * (gradient + 0.85 * gradient)
        change = (new - w).abs().max().item()
        assert torch.allclose(ours[name], new.detach(), rtol=1e-4, atol=1e-3 * change + 1e-7), name


def test_airbench_is_resumed_within_an_epoch(tmp_path, monkeypatch):
    airbench_run(tmp_path / "whole")
    calls = []
    with monkeypatch.context() as m:
        m.setattr(train.ddp.Run, "should_stop", lambda self: calls.append(self) or len(calls) == 8)
        with pytest.raises(SystemExit):
            airbench_run(tmp_path / "broken")
    state = torch.load(tmp_path / "broken" / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 2), "an epoch has 6 steps"
    airbench.main(["--resume", str(tmp_path / "broken")])
    assert same_weights(tmp_path / "broken", tmp_path / "whole")
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")


@slow
def test_two_processes_of_airbench_share_each_batch(tmp_path):
    """Each normalizes its own half of a batch, so that they are not quite the run of one process."""
    script = ROOT / "resnet" / "airbench.py"
    processes.assert_done(*processes.torchrun(script, *AIRBENCH, "--out", tmp_path / "two"))
    airbench_run(tmp_path / "one")
    (one, two) = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two"))
    assert two["processes"] == 2 and two["final"].keys() == one["final"].keys()
    losses = [float(metrics(tmp_path / name)[-1]["train_loss"]) for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=0.2) and losses[0] != losses[1]


@pytest.mark.parametrize(
    "words",
    [
        ["--label-smoothing", "0.3"],
        ["--lr", "0.2"],
        ["--first-size", "28"],
        ["--size", "28"],
        ["--width", "16"],
        ["--bs", "10"],
        ["--micro-batch", "10"],
        ["--held-out"],
    ],
)
def test_every_option_of_airbench_matters(words, tmp_path):
    words = ["--epochs", "2", *words]
    airbench_run(tmp_path / "plain")
    airbench_run(tmp_path / "other", *words)
    ours, theirs = weights(tmp_path / "plain"), weights(tmp_path / "other")
    assert any(ours[name].shape != theirs[name].shape or not torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.draws
def test_the_demo_takes_a_run_of_airbench(tmp_path, monkeypatch, capsys):
    """The newest run is taken, whichever script made it; only its probabilities are not calibrated."""
    classifiers = importlib.import_module("common.classifiers")
    monkeypatch.setattr(classifiers.run, "ROOT", tmp_path)
    folder = tmp_path / "out" / "resnet" / "cifar10-airbench-s0-1"
    airbench_run(folder)
    assert classifiers.find(None, "resnet", tmp_path / "committed.safetensors") == folder
    predict = load("resnet", "predict")
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
    predict.main(["--run", str(folder), str(images), "--out", str(tmp_path / "predicted")])
    assert "airbench trained on" in (told := capsys.readouterr().err) and "not calibrated" in told
    with open(tmp_path / "predicted" / "predictions.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 3
    trained = load("resnet", "trained")
    code, message = failure(trained.main, [str(folder), "--out", str(tmp_path / "small.safetensors")])
    assert code == 1 and one_line(message) and "calibrate" in message


def test_a_run_of_an_unknown_script_is_refused(tmp_path):
    classifiers = importlib.import_module("common.classifiers")
    airbench_run(tmp_path / "a")
    code, message = failure(classifiers.load, tmp_path / "a", "resnet", {"train.py": (train.Options, None)})
    assert code == 1 and one_line(message) and "airbench.py; name one of train.py" in message


def test_divergence_is_a_result(tmp_path):
    words = ["--model", "mnist", "--recipe", "paper", "--lr", "1e30", "--limit", "300", "--bs", "30", "--epochs", "3"]
    code, message = failure(fit, tmp_path, "a", *words)
    assert code == 1 and one_line(message) and "diverged" in message
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["state"] == "diverged" and 0 < record["diverged_at_step"] <= 30


@pytest.mark.parametrize(
    "wrong, argv",
    [
        ("--shortcut", ["--data", "mnist", "--shortcut", "B"]),
        ("--model resnet20", ["--data", "mnist", "--model", "resnet20"]),
        ("--model resnet50", ["--model", "resnet50", "--data", "cifar10"]),
        ("--bs 100", ["--bs", "100", "--micro-batch", "33"]),
        ("--micro-batch: 'x'", ["--micro-batch", "x"]),
        ("--optimizer: 'adam'", ["--optimizer", "adam"]),
        ("--first-size: 7", ["--first-size", "7"]),
        ("--size: 2000", ["--size", "2000"]),
        ("--ema: 1.5", ["--ema", "1.5"]),
        ("--whiten", ["--whiten", "--data", "builtin", "--model", "resnet18"]),
        ("--epochs: 'none'", ["--epochs", "none"]),
        ("--lr: 'none'", ["--lr", "none"]),
        ("--ema 0.9", ["--set", "ema=0.9"]),
        ("--recipe fast", ["--recipe", "fast", "--data", "mnist"]),
        ("--augment affine", ["--model", "resnet18", "--data", "builtin", "--augment", "affine"]),
    ],
)
def test_an_argument_that_cannot_be_honoured(wrong, argv, capsys):
    assert failure(train.main, argv)[0] == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error:" in last and wrong in last


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_statistics_over_processes_need_a_gpu(tmp_path):
    code, message = failure(fit, tmp_path, "a", "--sync-bn")
    assert code == 1 and one_line(message) and "--sync-bn" in message and not (tmp_path / "a").exists()


# --------------------------------------------------------------------------------------------------- the other scripts


@pytest.mark.draws
def test_predictions_of_the_test_set(trained, tmp_path):
    accuracy = load("resnet", "predict").main(["--run", str(trained), "--out", str(tmp_path)])
    record = json.loads((trained / "run.json").read_text())
    assert accuracy == pytest.approx(record["final"]["test_accuracy"], abs=0.003)
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    test_set = data.load("builtin", limit=600, family="mnist")[2]
    assert [row["id"] for row in rows] == [str(i) for i in range(len(test_set))]
    assert all(row["name"] == test_set.classes[int(row["label"])] for row in rows)
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows), "the largest of ten is at least 0.1"
    correct = [int(row["label"]) == y for row, y in zip(rows, test_set.labels.tolist())]
    assert np.mean(correct) == pytest.approx(accuracy)
    for name in ("confusion.png", "mistakes.png"):
        assert Image.open(tmp_path / name).size[0] > 500


@pytest.mark.parametrize("labelled", [True, False])
def test_predictions_of_a_folder(labelled, trained, tmp_path, capsys):
    images, test_set = tmp_path / "images", data.load("builtin", family="mnist")[2]
    for i in range(12):
        folder = images / test_set.classes[test_set.labels[i]] if labelled else images
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(test_set.images[i, 0].numpy()).save(folder / f"{i:02}.png")
    (images / "bad.png").write_bytes(b"rubbish")
    code, message = failure(
        load("resnet", "predict").main, [str(images), "--run", str(trained), "--out", str(tmp_path)]
    )
    assert code == 1 and one_line(message) and "bad.png" in message, "said when the others are predicted"
    *lines, seen, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and "seen.png" in seen and (tmp_path / "seen.png").exists()
    assert ("of 12 labelled" in last) == (tmp_path / "confusion.png").exists() == labelled
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = {int(row["id"].split("/")[-1][:2]): row for row in csv.DictReader(file)}
    opened = load("resnet", "trained").load(trained)
    logits = opened.net((test_set.images[:12] - opened.mean) / opened.std)
    odds = (logits / opened.temperature).softmax(1).detach()
    assert [int(rows[i]["label"]) for i in range(12)] == odds.argmax(1).tolist()
    assert [float(rows[i]["probability"]) for i in range(12)] == pytest.approx(odds.amax(1).tolist(), abs=1e-4)
    likeliest = test_set.classes[odds[0].argmax()]
    assert any("00.png: " in line and f"{likeliest} {odds[0].max():.0%}" in line for line in lines)


def test_images_of_any_size_fit_the_network(tmp_path):
    predict, rng = load("resnet", "predict"), np.random.default_rng(0)
    for size in ((300, 401, 3), (20, 15, 3)):
        image = Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8))
        image.save(tmp_path / "image.png")
        shapes = [predict.read_image(tmp_path / "image.png", family).shape for family in ("mnist", "cifar", "imagenet")]
        assert shapes == [(1, 28, 28), (3, 32, 32), (3, 224, 224)]


def test_predict_takes_the_newest_finished_run(trained, tmp_path, monkeypatch, capsys):
    predict = load("resnet", "predict")
    monkeypatch.setattr(predict.run, "ROOT", tmp_path)
    monkeypatch.setattr(predict, "COMMITTED", tmp_path / "none.safetensors")
    code, message = failure(predict.main, [])
    assert code == 1 and one_line(message) and "none.safetensors: is missing" in message
    shutil.copytree(trained, tmp_path / "out" / "resnet" / "newest")
    assert predict.main([]) > 0.5
    said = capsys.readouterr().err
    assert "newest: mnist trained on builtin" in said and "--run RUN" in said
    assert (tmp_path / "out" / "resnet" / "newest" / "predictions.csv").exists()


def test_data_is_not_taken_for_data_dir(capsys):
    assert failure(load("resnet", "predict").main, ["--data", "pictures"])[0] == 2
    assert "--data" in capsys.readouterr().err.splitlines()[-1]


def test_predict_refuses_what_is_no_run_of_resnet(trained, tmp_path):
    predict = load("resnet", "predict")
    copy = shutil.copytree(trained, tmp_path / "copy")
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(record | {"experiment": "cifar"}))
    for folder, word in ((tmp_path, "run.json"), (copy, "cifar")):
        code, message = failure(predict.main, ["--run", str(folder)])
        assert code == 1 and one_line(message) and word in message


def test_weights_that_are_not_numbers_are_said(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    best = torch.load(copy / "best.pt", weights_only=True)
    best["model"]["fc.bias"][3] = float("nan")
    torch.save(best, copy / "best.pt")
    code, message = failure(load("resnet", "predict").main, ["--run", str(copy)])
    assert code == 1 and one_line(message) and "best.pt: is damaged" in message
    assert not (copy / "predictions.csv").exists()


def test_the_temperature_is_that_of_the_validation_images(trained):
    opened = load("resnet", "trained").load(trained)
    val_set = data.load("builtin", limit=600, family="mnist")[1]
    with torch.no_grad():
        logits = opened.net((val_set.images - opened.mean) / opened.std)
    losses = [F.cross_entropy(logits / (opened.temperature * factor), val_set.labels) for factor in (0.9, 1, 1.1)]
    assert losses[1] < losses[0] and losses[1] < losses[2]


def test_weights_in_a_small_file(trained, tmp_path, capsys):
    """In bfloat16, with the temperature of the run; without one in its record, that of the validation images."""
    module, copy = load("resnet", "trained"), shutil.copytree(trained, tmp_path / "run")
    record = json.loads((copy / "run.json").read_text())
    for name, final in (("a", record["final"]), ("b", {**record["final"], "temperature": None})):
        (copy / "run.json").write_text(json.dumps(record | {"final": final}))
        module.main([str(copy), "--out", str(tmp_path / f"{name}.safetensors")])
    theirs, ours, other = (module.load(tmp_path / name) for name in ("run", "a.safetensors", "b.safetensors"))
    assert ours.temperature == record["final"]["temperature"] == pytest.approx(other.temperature, rel=0.05)
    assert theirs.temperature is None and ours.classes == theirs.classes and ours.dataset == "builtin"
    assert ours.accuracy == pytest.approx(record["final"]["test_accuracy"], abs=0.02)
    images = data.load("builtin", limit=600, family="mnist")[2].images[:20]
    a, b = (module.probabilities(network, images) for network in (ours, other))
    assert torch.allclose(a, b, atol=0.02) and (a.argmax(1) == b.argmax(1)).all()
    facts = json.loads(run.read_safetensors(tmp_path / "a.safetensors")[1]["facts"])
    assert facts["unsure_below"] == 0.5 and 0 <= facts["unsure"]["right"] < facts["unsure"]["all"]
    assert "unsure: " in capsys.readouterr().out


def test_the_readme_shows_what_the_committed_network_says(tmp_path, monkeypatch, capsys):
    predict = load("resnet", "predict")
    monkeypatch.setattr(predict.run, "ROOT", tmp_path)  # where there is no run
    predict.main([str(draw_pictures(tmp_path / "pictures")), "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    readme = (ROOT / "resnet" / "README.md").read_text(encoding="utf-8")
    gradient, square, *_ = said.out.splitlines()
    for line in (gradient, square):
        assert f"pictures/{line.rpartition('pictures')[2][1:]}" in readme
    assert said.err.rpartition("resnet/")[2] in readme
    code, message = failure(predict.main, [])
    assert code == 1 and one_line(message) and "name image files" in message, "a demo never downloads its test set"


@pytest.mark.slow
def test_the_committed_network_is_as_sure_as_its_header_says(data_dir):
    trained = load("resnet", "trained")
    network = trained.load(trained.COMMITTED)
    test_set = data.load("cifar10", data_dir("cifar-10-batches-py"))[2]
    assert_as_sure_as_its_header(trained.COMMITTED, trained.probabilities(network, test_set.images), test_set.labels)


def test_a_sweep_lists_commands_that_train_takes(tmp_path, capsys):
    sweep = load("resnet", "sweep")
    sweep.main(["--list", "--out", str(tmp_path / "sweep"), "--seeds", "2"])
    lines = capsys.readouterr().out.splitlines()
    folders = set()
    for line in lines:
        python, script, *argv = shlex.split(line)
        assert python == "python" and script.endswith("train.py") and argv[-2:] == ["--resume", "auto"]
        folders.add(train.parse(argv).out)
    assert len(folders) == len(lines) and not (tmp_path / "sweep").exists()


def test_the_studies_of_ones_own_images(tmp_path, capsys):
    sweep, own = load("resnet", "sweep"), str(make_images(tmp_path / "own", {"": 3}))
    words = ["--list", "--data", own, "--out", str(tmp_path / "sweep"), "--study", "shortcut", "--seeds", "1"]
    sweep.main(words)
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 4 and all(train.parse(words[2:]).data == own for words in lines)
    idx = str(write_drop_in(tmp_path / "idx", "mnist"))
    for script, argv in (("sweep", ["--list", "--data", idx, "--study", "lr"]), ("bench", ["--data", own])):
        assert failure(load("resnet", script).main, argv)[0] == 2
        assert "--data" in capsys.readouterr().err.splitlines()[-1]


def test_every_study_is_made_of_arguments_that_train_takes():
    sweep = load("resnet", "sweep")
    for study in sweep.STUDIES.values():
        names = [sweep.folder_name(setting, 0) for setting in study.values()]
        assert len(set(names)) == len(names), "two settings share one folder"
        for setting in study.values():
            args = train.parse([*to_argv(train.Options, setting), "--data", "builtin"])
            assert all(getattr(args, name) == value for name, value in setting.items())


RESULTS = {file.stem: json.loads(file.read_text()) for file in (ROOT / "resnet" / "results").glob("*.json")}
RESULTS = {name: record["rows"] for name, record in sorted(RESULTS.items()) if record.get("study") == name}


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.draws
def test_every_committed_study_is_drawn(name, tmp_path, capsys):
    rows = [row for row in RESULTS[name] if row["study"] == name]
    load("resnet", "sweep").report(name, rows, [row for row in RESULTS[name] if row["study"] != name], tmp_path)
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert json.loads((tmp_path / f"{name}.json").read_text()) == {"study": name, "rows": RESULTS[name]}
    table = capsys.readouterr().out
    assert all(row["setting"] in table for row in rows)


@pytest.mark.draws
@pytest.mark.slow
def test_the_study_of_gradients(tmp_path):
    sweep = load("resnet", "sweep")
    words = ["--data", "builtin", "--limit", "32", "--out", str(tmp_path), "--study", "gradients"]
    sweep.main(words)
    rows = json.loads((tmp_path / "gradients.json").read_text())["rows"]
    committed = [row for row in RESULTS["shortcut"] if row["study"] == "gradients"]
    assert [row["setting"] for row in rows] == [row["setting"] for row in committed]
    assert committed[0].keys() <= rows[0].keys() and committed[0]["final"].keys() == rows[0]["final"].keys()
    assert (tmp_path / "gradients.png").stat().st_size > 10_000
    assert failure(sweep.main, ["--data", "mnist", "--study", "fast"])[0] == 2


@slow
def test_a_sweep_continues(tmp_path):
    sweep = load("resnet", "sweep")
    words = ["--data", "builtin", "--limit", "32", "--epochs", "1", "--seeds", "1", "--out", str(tmp_path)]
    sweep.main([*words, "--study", "mnist"])
    (first,) = tmp_path.glob("*/run.json")
    before = first.read_bytes()
    sweep.main([*words, "--study", "mnist", "options"])
    assert first.read_bytes() == before, "what is done is not done again"
    for study, runs in (("mnist", 1), ("options", 2)):
        rows = json.loads((tmp_path / f"{study}.json").read_text())["rows"]
        assert len(rows) == runs and all(RESULTS[study][0].keys() <= row.keys() for row in rows)
        assert RESULTS[study][0]["final"].keys() <= rows[0]["final"].keys()
        assert len(rows[0]["val_accuracy"]) == len(rows[0]["seconds"]) == 1
    code, message = failure(sweep.main, [*words, "--study", "mnist", "--limit", "50"])
    assert code == 1 and one_line(message) and "--limit" in message, "a run with other arguments is not taken for this"


def test_gradient_norms_by_hand(builtin):
    images, labels = next(builtin[0].batches(4, shuffle=(0, 0)))
    torch.manual_seed(0)
    net = model.build("resnet20", 10, "B").train()
    kernels = [w for w in net.parameters() if w.shape[2:] == (3, 3)]
    loss = -net(images).log_softmax(1)[torch.arange(4), labels].mean()
    gradients = torch.autograd.grad(loss, kernels)
    expected = [(g.square().sum() / w.square().sum()).sqrt().item() for g, w in zip(gradients, kernels)]
    assert load("resnet", "sweep").gradient_norms("resnet20", "B", images, labels) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("column", ["epoch_seconds", "seconds"])  # the second in runs of older code
def test_a_row_of_a_study_by_hand(column, trained, tmp_path):
    """Seconds are summed over epochs; the first epoch of a validation accuracy of 90% or more is named."""
    copy = shutil.copytree(trained, tmp_path / "copy")
    header = f"epoch,train_accuracy,val_accuracy,{column}"
    table = "1,0.5,0.6,10.04,2,0.7,0.9,10.04,3,0.8,0.95,5.04".split(",")
    lines = [header, *(",".join(table[i : i + 4]) for i in (0, 4, 8))]
    (copy / "metrics.csv").write_text("\n".join(lines))
    row = load("resnet", "sweep").row_of("lr", "0.1", 0, copy)
    assert (row["train_accuracy"], row["val_accuracy"]) == (0.8, [0.6, 0.9, 0.95])
    assert row["seconds"] == [10.0, 20.1, 25.1] and row["seconds_to_90"] == 20.1
    (copy / "metrics.csv").write_text("\n".join(lines[:2]))
    assert load("resnet", "sweep").row_of("lr", "0.1", 0, copy)["seconds_to_90"] is None


def test_what_the_shortcut_is_for(builtin):
    """Without shortcuts the gradients of 56 layers differ by orders of magnitude more than with them."""
    sweep, (images, labels) = load("resnet", "sweep"), next(builtin[0].batches(32, shuffle=(0, 0)))
    spread = {}
    for shortcut in ("A", "none"):
        norms = sweep.gradient_norms("resnet56", shortcut, images, labels)
        assert len(norms) == 55 and min(norms) > 0
        spread[shortcut] = max(norms) / min(norms)
    assert spread["none"] > 30 * spread["A"], spread


def test_the_operations_of_a_step(builtin):
    """He et al. 2015: 41 million multiplications in a forward pass (40.8 with every layer); three times as many with
    the backward pass, less the gradient of the images."""
    flops = load("resnet", "bench").count_flops(next(builtin[0].batches(8)))
    assert flops == pytest.approx(3 * 2 * 40.8e6, rel=0.02)


@slow
def test_the_bench_measures_all_ways(tmp_path):
    words = shlex.split("--data builtin --device cpu --limit 32 --bs 16 --rounds 1")
    processes.assert_done(processes.start(ROOT / "resnet" / "bench.py", *words, "--out", tmp_path))
    record = json.loads((tmp_path / "bench.json").read_text())
    native = run.native_bf16(torch.device("cpu"))
    assert {row["precision"] for row in record["rows"]} == {"float32", *["bfloat16"] * native}, "nothing is emulated"
    assert len(record["rows"]) == (8 if native else 6)
    assert all(row["images_per_s"] > 0 and row["of_peak"] > 0 for row in record["rows"])
    shares = {row["operation"]: row["share"] for row in json.loads((tmp_path / "step.json").read_text())["rows"]}
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0 and len(shares) == 5


@pytest.mark.parametrize("script", ["bench", "sweep"])
def test_a_folder_that_cannot_be_written_is_said_before_any_work(script, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, message = failure(load("resnet", script).main, ["--data", "builtin", "--out", str(tmp_path / "file")])
    assert code == 1 and one_line(message) and "file" in message


def test_the_bench_refuses_less_than_a_batch(tmp_path):
    words = ["--data", "builtin", "--limit", "20", "--out", str(tmp_path)]
    code, message = failure(load("resnet", "bench").main, words)
    assert code == 1 and one_line(message) and "--bs 128" in message and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_walkthrough_runs(tmp_path, monkeypatch):
    """Its code cells in order, on built-in data with few images, in the folder where Jupyter would start them."""
    notebook = json.loads((ROOT / "resnet" / "walkthrough.ipynb").read_text(encoding="utf-8"))
    monkeypatch.chdir(ROOT / "resnet")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("data", "folders", "model", "optim", "train", "predict", "sweep"):
        monkeypatch.setitem(sys.modules, name, load("resnet", name))
    small = f"import time\nDATA, EPOCHS, LIMIT, OUT = 'builtin', 1, 64, {str(tmp_path / 'run')!r}"
    namespace, calls = {"__name__": "walkthrough"}, []

    def no_command(words, **options):  # neither git nor pip
        calls.append(words)
        return subprocess.CompletedProcess(words, 0, stdout="")

    with monkeypatch.context() as m, open(os.devnull, "w") as null:
        m.setattr(sys, "stdout", null)
        m.setattr(subprocess, "run", no_command)
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        for i, cell in enumerate(cells):
            parameters = "parameters" in cell["metadata"].get("tags", [])
            exec(compile(small if parameters else "".join(cell["source"]), "walkthrough", "exec"), namespace)
            if i == 0:
                m.undo()
                m.setattr(sys, "stdout", null)
    assert namespace["ROOT"] == ROOT and namespace["record"]["state"] == "done"
    assert (tmp_path / "run" / "predictions.csv").exists()
    assert all(not cell["outputs"] for cell in cells), "committed without outputs"
