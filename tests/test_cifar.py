"""cifar/: the networks against their specification, the batches against images one by one, the training against what it
must do. What all folders owe is in test_contract.py, the datasets are in test_common.py."""

import csv
import functools
import json
import math
import shutil
import subprocess
import sys

from common import photos, study
from common.options import options_of

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import processes
from conftest import ROOT, failure, lazy, load, one_line, run, start
from helpers import assert_as_sure_as_its_header, draw_pictures, make_images, names

train = lazy("cifar")
data = lazy("cifar", "data")
model = lazy("cifar", "model")
predict = lazy("cifar", "predict")
trained = lazy("cifar", "trained")


@pytest.fixture(scope="module")
def builtin():
    return data.load("builtin")[:3]


# ------------------------------------------------------------------------------------------------------------- networks


def test_lenet5_is_the_network_specified():
    net = model.LeNet5()
    logits, shapes = net(torch.zeros(7, 3, 32, 32))
    assert logits.shape == (7, 100)
    expected = {1: (7, 6, 14, 14), 2: (7, 16, 5, 5), 3: (7, 400), 4: (7, 256), 5: (7, 128), 6: (7, 100)}
    assert {k: tuple(v) for k, v in shapes.items()} == expected
    assert model.count_parameters_in_millions(net) == 0.151324
    net.conv1.requires_grad_(False)
    assert model.count_parameters_in_millions(net) == pytest.approx(0.151324 - 456e-6), "frozen ones do not count"
    assert run.count_parameters(net) == 151_324 - 456


def test_lenet5_equals_the_same_layers_in_a_row():
    torch.manual_seed(0)
    net, x = model.LeNet5().double(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    relu, pool = torch.nn.ReLU(), torch.nn.MaxPool2d(2)
    convolutions = [net.conv1, relu, pool, net.conv2, relu, pool, torch.nn.Flatten()]
    plain = torch.nn.Sequential(*convolutions, net.fc1, relu, net.fc2, relu, net.fc3)
    assert torch.allclose(net(x)[0], plain(x), rtol=1e-12)


@pytest.mark.parametrize("bn", [False, True])
@pytest.mark.parametrize("activation", ["relu", "swish"])
def test_simplenn_with_dummy_inputs(bn, activation):
    net = model.SimpleNN(bn=bn, activation=activation)
    logits, shapes = net(torch.randn(5, 3, 32, 32))
    assert logits.shape == (5, 10) and logits.isfinite().all()
    expected = {1: (5, 8, 14, 14), 2: (5, 16, 6, 6), 3: (5, 576), 4: (5, 120), 5: (5, 84), 6: (5, 10)}
    assert {k: tuple(v) for k, v in shapes.items()} == expected
    assert run.count_parameters(net) == 82030 + bn * 2 * (8 + 16)


def test_simplenn_options_change_what_is_computed():
    x, outputs = torch.randn(4, 3, 32, 32), []
    for options in ({}, {"bn": True}, {"activation": "swish"}):
        torch.manual_seed(0)
        outputs.append(model.SimpleNN(**options)(x)[0])
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])
    assert torch.allclose(model.ACTIVATIONS["swish"](x), x * torch.sigmoid(x), atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- batches


def crop_and_flip_one_by_one(dataset, index, shift, flip):
    crops = []
    for i, (y, x), flipped in zip(index.tolist(), shift.tolist(), flip.tolist()):
        canvas = torch.zeros(3, 40, 40, dtype=torch.uint8)
        canvas[:, 4:36, 4:36] = dataset.images[i]
        crop = canvas[:, y : y + 32, x : x + 32]
        crops.append(crop.flip(2) if flipped else crop)
    return torch.stack(crops)


def test_crops_of_a_batch_equal_crops_one_by_one(builtin):
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(builtin[0]), (300,), generator=generator)
    shift = torch.randint(9, (300, 2), generator=generator)
    shift[:4] = torch.tensor([[0, 0], [0, 8], [8, 0], [8, 8]])
    index[0], index[3] = 0, len(builtin[0]) - 1
    flip = torch.rand(300, generator=generator) < 0.5
    expected = crop_and_flip_one_by_one(builtin[0], index, shift, flip)
    assert torch.equal(data.crop_and_flip(builtin[0].padded, 32, index, shift, flip), expected)


@pytest.mark.parametrize("augment", names("cifar", "data", "AUGMENT"))
def test_batches_are_a_function_of_seed_and_epoch(builtin, augment):
    dataset = builtin[0]
    batches = list(dataset.batches(64, shuffle=(1, 2), augment=augment))
    assert sum(len(labels) for _, labels in batches) == len(dataset) and len(batches[-1][1]) == len(dataset) % 64
    assert torch.equal(torch.cat([y for _, y in batches]).bincount(), dataset.labels.bincount()), "each example once"
    whole = torch.cat([x for x, _ in batches])
    assert torch.equal(whole, torch.cat([x for x, _ in dataset.batches(100, shuffle=(1, 2), augment=augment)]))
    for other in ((1, 3), (2, 2)):
        assert not torch.equal(batches[0][1], next(dataset.batches(64, shuffle=other, augment=augment))[1])


def test_augmented_images_differ_from_the_plain_ones(builtin):
    plain, flipped, both = (next(builtin[0].batches(64, shuffle=(1, 2), augment=a))[0] for a in data.AUGMENT)
    kinds = {(bool((a == b).all()), bool((a == b.flip(2)).all())) for a, b in zip(flipped, plain)}
    assert kinds == {(True, False), (False, True)}, "some images are flipped, the others are as they are"
    assert not torch.equal(both, flipped)


def test_seeds_of_any_size_differ(builtin):
    """torch's generator on a CPU takes 32 bits of a seed and ignores the others."""
    train_set = builtin[0]
    orders = [next(train_set.batches(50, shuffle=(seed, 0)))[1].tolist() for seed in (0, 1, 255, 256, 257, 2**31 - 1)]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_without_shuffling_batches_are_the_stored_order(builtin):
    x, y = next(builtin[1].batches(500))
    assert torch.equal(y, builtin[1].labels)
    assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert torch.allclose(x * builtin[1].std + builtin[1].mean, builtin[1].images.float(), atol=1e-3)
    x = torch.cat([x for x, _ in builtin[0].batches(1000)])
    assert x.mean((0, 2, 3)).abs().max() < 1e-4 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3


@pytest.mark.slow
def test_works_under_a_dataloader(tmp_path):
    """In a process of its own, with workers started by spawn: they import the folder's modules anew."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT / "cifar")!r})
import data, torch

if __name__ == "__main__":
    dataset = data.load("builtin")[1]
    loader = torch.utils.data.DataLoader(dataset, batch_size=50, num_workers=2, multiprocessing_context="spawn")
    images, labels = (torch.cat(part) for part in zip(*loader))
    x, y = next(dataset.batches(500))
    print(torch.equal(images, x) and torch.equal(labels, y))
""")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@pytest.fixture
def folder(tmp_path):
    """A folder of images of the user's own, of another size, one subfolder per class."""
    return make_images(tmp_path / "images", {"": 20})


@pytest.mark.parametrize("recipe", names("cifar", "train", "RECIPES"))
@pytest.mark.parametrize("name", names("cifar", "train", "DATASET"))
@pytest.mark.parametrize("parts", [{"": 20}, {"train": 16, "val": 4, "test": 3}], ids=["plain", "parts"])
def test_every_recipe_trains_on_a_folder_of_ones_own(recipe, name, parts, tmp_path):
    folder = make_images(tmp_path / "images", parts)
    argv = ["--model", name, "--recipe", recipe, "--epochs", "1", "--data", str(folder)]
    record = train.main([*argv, "--out", str(tmp_path / "run")])
    assert record["state"] == "done" and record["dataset"]["train"] == 32


def test_a_run_on_a_folder_of_ones_own_is_resumed(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    train.main(["--data", str(folder), "--recipe", "plain", "--out", str(out), "--epochs", "1"])
    assert json.loads((out / "run.json").read_text())["args"]["data"].startswith("./"), "relative: no machine's path"
    monkeypatch.chdir(tmp_path)
    train.main(["--resume", str(out), "--epochs", "2"])
    assert len(csv_rows(out)) == 2
    folder.rename(tmp_path / "moved")
    assert failure(train.main, ["--resume", str(out)])[0] == 2
    assert "data is gone from" in capsys.readouterr().err.splitlines()[-1]
    train.main(["--resume", str(out), "--data", str(tmp_path / "moved"), "--epochs", "3"])
    assert len(csv_rows(out)) == 3


@pytest.mark.slow
def test_resume_finds_its_datasets_again(data_dir, tmp_path, monkeypatch, capsys):
    """Without --data-dir, which the run was started with; if they are gone, one line names the flag."""
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "cifar-10-batches-py").symlink_to(data_dir("cifar-10-batches-py") / "cifar-10-batches-py")
    monkeypatch.delenv("DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    out, quick = tmp_path / "run", ["--model", "simplenn", "--recipe", "tiny", "--limit", "64", "--epochs", "1"]
    train.main([*quick, "--data", "cifar10", "--data-dir", "sets", "--out", str(out)])
    monkeypatch.chdir(ROOT)
    train.main(["--resume", str(out), "--epochs", "2"])
    assert len(csv_rows(out)) == 2 and str(tmp_path) not in (out / "run.json").read_text()
    (tmp_path / "sets").rename(tmp_path / "moved")
    assert failure(train.main, ["--resume", str(out)])[0] == 2
    assert "--data-dir" in capsys.readouterr().err.splitlines()[-1]
    train.main(["--resume", str(out), "--epochs", "3", "--data-dir", str(tmp_path / "moved")])
    assert len(csv_rows(out)) == 3


# ------------------------------------------------------------------------------------------------------------- training


def fit(tmp_path, name, *argv):
    plain = ["--data", "builtin", "--device", "cpu", "--recipe", "plain"]
    return train.main([*plain, "--out", str(tmp_path / name), *argv])


def weights(folder):
    return torch.load(folder / "last.pt", weights_only=True)["model"]


def csv_rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.draws
def test_it_learns_and_leaves_what_it_should(tmp_path):
    record = fit(tmp_path, "a", "--epochs", "3", "--lr", "0.01", "--bs", "16")
    assert record["final"]["test_accuracy"] > 0.5, "100 classes: chance is 0.01"
    assert {"best.pt", "last.pt", "predictions.png"} <= {f.name for f in (tmp_path / "a").iterdir()}
    assert Image.open(tmp_path / "a" / "predictions.png").size[0] > 800
    best = max(csv_rows(tmp_path / "a"), key=lambda row: float(row["val_accuracy"]))
    assert record["final"]["best_epoch"] == int(best["epoch"])
    assert record["final"]["val_accuracy"] == float(best["val_accuracy"])


@pytest.mark.slow
def test_simplenn_with_its_options_learns(tmp_path):
    record = fit(tmp_path, "a", "--model", "simplenn", "--recipe", "best", "--epochs", "3", "--bs", "32")
    assert record["final"]["test_accuracy"] > 0.5 and record["args"]["bn"] and record["args"]["activation"] == "swish"


def test_the_loss_is_the_mean_over_examples_not_batches(tmp_path):
    """345 images in batches of 32 and one of 25; at a learning rate of nearly zero, training's loss and accuracy are
    those of the initial weights."""
    fit(tmp_path, "a", "--limit", "345", "--bs", "32", "--lr", "1e-30", "--epochs", "1")
    torch.manual_seed(0)
    net, part = model.LeNet5(), data.load("builtin", limit=345)
    with torch.no_grad():
        logits = net(part[0].normalize(part[0].images))[0]
    (row,) = csv_rows(tmp_path / "a")
    assert float(row["train_loss"]) == pytest.approx(F.cross_entropy(logits, part[0].labels).item(), rel=1e-5)
    right = (logits.argmax(1) == part[0].labels).sum().item()
    assert right and float(row["train_accuracy"]) == pytest.approx(right / 345)


@pytest.mark.parametrize("penalty, sparse", [("l1", True), ("weight-decay", False)])
def test_penalties_shrink_weights_and_l1_makes_them_sparse(penalty, sparse, tmp_path):
    def fc1(name, *argv):
        fit(tmp_path, name, "--limit", "300", "--bs", "16", "--lr", "0.01", "--epochs", "5", *argv)
        return weights(tmp_path / name)["fc1.weight"].abs()

    free, penalized = fc1("free"), fc1("penalized", f"--{penalty}", "0.003" if sparse else "0.1")
    assert penalized.mean() < 0.7 * free.mean()
    assert ((penalized < 0.003).float().mean() > 0.3 + (free < 0.003).float().mean()) == sparse


def test_l1_is_the_sum_of_absolute_values(tmp_path):
    for name, l1 in (("a", "0"), ("b", "0.5")):
        fit(tmp_path, name, "--limit", "45", "--lr", "1e-30", "--epochs", "1", "--l1", l1)
    torch.manual_seed(0)
    total = sum(p.abs().sum().item() for p in model.LeNet5().parameters())
    without, with_l1 = (float(csv_rows(tmp_path / name)[0]["train_loss"]) for name in "ab")
    assert with_l1 - without == pytest.approx(0.5 * total, rel=1e-4)


@pytest.mark.parametrize("l1", ["0", "0.01"])
def test_a_training_that_learns_nothing_says_so(l1, tmp_path, capsys):
    """Whatever the penalty adds to the loss."""
    words = ["--data", "builtin", "--recipe", "tiny", "--epochs", "1", "--limit", "64", "--l1", l1, "--device", "cpu"]
    record = train.main([*words, "--lr", "1e-9", "--out", str(tmp_path / "a")])
    assert "nothing was learned" in record["warning"] and record["warning"] in capsys.readouterr().out
    penalty = float(l1) * sum(tensor.abs().sum().item() for tensor in weights(tmp_path / "a").values())
    assert f"a uniform prediction has {math.log(100) + penalty:.4g}:" in record["warning"]


def test_schedules():
    at = [0, 0.1, 0.2, 0.49, 0.5, 0.6, 0.75, 0.9999]
    factors = {name: [train.lr_factor(name, p) for p in at] for name in ("none", "step", "cosine", "onecycle")}
    assert factors["none"] == [1.0] * len(at)
    assert factors["step"] == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert factors["cosine"][0] == 1 and factors["cosine"][4] == pytest.approx(0.5) and factors["cosine"][-1] < 1e-6
    assert factors["onecycle"][:3] == [0, 0.5, 1] and factors["onecycle"][5] == pytest.approx(0.5)


STEPS = {  # name: arguments of three steps, each of which must be the formula
    "lenet5": [],
    "lenet5, penalties": ["--l1", "0.003", "--weight-decay", "0.1"],
    "lenet5, nesterov": ["--nesterov", "--momentum", "0.6", "--weight-decay", "0.1", "--label-smoothing", "0.2"],
    "lenet5, scheduled": ["--decay", "cosine", "--augment", "crop+flip"],
    "simplenn": ["--model", "simplenn"],
    "simplenn, all": ["--model", "simplenn", "--bn", "--activation", "swish", "--momentum", "0", "--l1", "0.003"],
}


@pytest.mark.parametrize("name", STEPS)
def test_three_steps_are_the_formula(name, tmp_path):
    """SGD: v <- m v + g + decay w, and w <- w - lr v, or with Nesterov's momentum w <- w - lr (g + decay w + m v)."""
    words = ["--limit", "30", "--bs", "10", "--epochs", "1", "--lr", "0.05", "--precision", "fp32", *STEPS[name]]
    args = train.parse(["--data", "builtin", "--recipe", "plain", *words])
    train_set = data.load("builtin", limit=30)[0]
    torch.manual_seed(args.seed)
    net = train.build_model(args, 100).to(memory_format=torch.channels_last).train()
    parameters = list(net.parameters())
    velocities, losses = [torch.zeros_like(w) for w in parameters], []
    for step, (images, labels) in enumerate(train_set.batches(10, shuffle=(0, 0), augment=args.augment)):
        target = (1 - args.label_smoothing) * F.one_hot(labels, 100) + args.label_smoothing / 100
        loss = -(target * net(images)[0].log_softmax(1)).sum(1).mean()
        loss = loss + args.l1 * sum(w.abs().sum() for w in parameters)
        losses.append(loss.item())
        lr = 0.05 * (0.5 * (1 + math.cos(math.pi * step / 3)) if args.decay == "cosine" else 1)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for w, v, gradient in zip(parameters, velocities, gradients):
                gradient = gradient + args.weight_decay * w
                v.mul_(args.momentum).add_(gradient)
                w.sub_(lr * (gradient + args.momentum * v if args.nesterov else v))
    fit(tmp_path, "a", *words)
    assert float(csv_rows(tmp_path / "a")[0]["train_loss"]) == pytest.approx(sum(losses) / 3, rel=1e-5)
    ours = weights(tmp_path / "a")
    for key, w in net.state_dict().items():
        assert torch.allclose(ours[key], w, rtol=1e-4, atol=1e-6), key


OPTIONS_OF_COMMON = {"data_dir", "device", "out", "resume", "tensorboard", "threads"}  # test_common, test_contract
OPTIONS = {  # option: (another value, what else is given): the weights after a few steps are others
    "data": ("builtin", []),
    "seed": ("1", []),
    "precision": ("bf16", []),
    "limit": ("30", []),
    "recipe": ("best", []),
    "model": ("simplenn", []),
    "epochs": ("2", []),
    "bs": ("6", []),
    "lr": ("0.02", []),
    "decay": ("onecycle", []),
    "momentum": ("0.5", []),
    "nesterov": (None, []),
    "augment": ("flip", []),
    "l1": ("0.01", []),
    "weight_decay": ("0.1", []),
    "label_smoothing": ("0.3", []),
    "bn": (None, ["--model", "simplenn"]),
    "activation": ("swish", ["--model", "simplenn"]),
}


def test_every_option_is_in_the_table():
    assert OPTIONS.keys() | OPTIONS_OF_COMMON == options_of(train.Options).keys()


@pytest.fixture(scope="module")
def weights_after(tmp_path_factory):
    """weights_after(*words): the weights after three steps, or with other words; each run is made once."""

    @functools.cache
    def get(*words):
        out = tmp_path_factory.mktemp("steps") / "run"
        small = "--data builtin --recipe plain --limit 24 --bs 8 --epochs 1 --device cpu --precision fp32".split()
        train.main([*small, *words, "--out", str(out)])
        return weights(out)

    return get


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_matters_within_a_few_steps(name, folder, weights_after):
    value, given = OPTIONS[name]
    if name == "data":
        given = ["--data", str(folder)]
    option = [f"--{name.replace('_', '-')}", *([value] if value else [])]
    plain, other = weights_after(*given), weights_after(*given, *option)
    assert plain.keys() != other.keys() or any(
        plain[key].shape != other[key].shape or not torch.equal(plain[key], other[key]) for key in plain
    )


def test_divergence_is_a_result(tmp_path):
    code, message = failure(fit, tmp_path, "a", "--lr", "1000", "--limit", "300", "--epochs", "3")
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert code == 1 and "diverged" in message and "\n" not in message
    assert record["state"] == "diverged" and f"step {record['diverged_at_step']}" in message


def test_more_epochs_where_the_schedule_allows_it(tmp_path, capsys):
    short = ["--limit", "200", "--epochs", "2"]
    fit(tmp_path, "a", *short)
    fit(tmp_path, "whole", "--limit", "200", "--epochs", "4")
    train.main(["--resume", str(tmp_path / "a"), "--epochs", "4"])
    a, whole = weights(tmp_path / "a"), weights(tmp_path / "whole")
    assert all(torch.equal(a[k], whole[k]) for k in a)
    fit(tmp_path, "decayed", *short, "--decay", "cosine")
    assert failure(train.main, ["--resume", str(tmp_path / "decayed"), "--epochs", "4"])[0] == 2
    assert "--epochs 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["--bn"], ["--activation", "swish"], ["--no-bn"], ["--l1", "-1"], ["--decay", "soon"]]
)
def test_a_flag_that_the_model_does_not_have(argv, capsys):
    assert failure(train.main, argv)[0] == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error:" in last and argv[0].replace("no-", "") in last


def test_flags_that_people_know():
    assert train.parse(["--augment"]).augment == train.parse(["--augment", "crop+flip"]).augment == "crop+flip"
    assert train.parse(["--no-augment", "--recipe", "best"]).augment == "none"
    assert train.parse(["--l2", "0.01"]).weight_decay == 0.01


@pytest.mark.parametrize(
    "argv",
    [
        ["--momentum", "1"],
        ["--momentum", "-0.1"],
        ["--nesterov", "--momentum", "0"],
        ["--label-smoothing", "2.0"],
        ["--label-smoothing", "-0.5"],
        ["--lr", "none"],
        ["--set", "momentum=0.5"],
    ],
)
def test_a_value_that_makes_no_sense_is_named(argv, capsys):
    assert failure(train.parse, argv)[0] == 2
    assert argv[0] in capsys.readouterr().err.splitlines()[-1]


def test_the_first_command():
    args = train.parse(["--lr", "0.01", "--bs", "16"])
    assert (args.model, args.lr, args.bs) == ("lenet5", 0.01, 16)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
def test_ctrl_c_ends_a_run_at_once_and_at_most_one_epoch_is_repeated(tmp_path):
    arguments = ["--recipe", "plain", "--bs", "16", "--epochs", "3", "--augment", "--limit", "160"]
    fit(tmp_path, "whole", *arguments)
    out = tmp_path / "broken"
    event = processes.signal_at("torch:Tensor.backward", 15, "SIGINT")  # an epoch has 10 steps
    process = start("cifar", "--data", "builtin", "--device", "cpu", *arguments, "--out", out, events=[event])
    _, errors = process.communicate()
    assert process.returncode == 130 and "--resume" in errors and "Traceback" not in errors, errors
    assert torch.load(out / "last.pt", weights_only=True)["epoch"] == 1
    train.main(["--resume", str(out)])
    a, b = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(a[k], b[k]) for k in a)
    rows = [
        [{k: v for k, v in row.items() if "seconds" not in k} for row in csv_rows(f)] for f in (tmp_path / "whole", out)
    ]
    assert rows[0] == rows[1]


# ---------------------------------------------------------------------------------------------------- the other scripts


@pytest.mark.slow
@pytest.mark.draws
def test_a_sweep_continues_and_shares_runs(tmp_path, capsys):
    sweep = load("cifar", "sweep")
    argv = ["--data", "builtin", "--limit", "100", "--epochs", "1", "--seeds", "1", "--out", str(tmp_path)]
    sweep.main([*argv, "--study", "l1-vs-l2"])
    first = {f: f.read_bytes() for f in tmp_path.glob("*/run.json")}
    assert len(first) == 3
    sweep.main([*argv, "--study", "activation", "l1-vs-l2"])
    assert all(f.read_bytes() == content for f, content in first.items()), "what is done is not done again"
    assert len(list(tmp_path.glob("*/run.json"))) == 4, "two settings more, one of them shared"
    assert "activation" in capsys.readouterr().out
    for name, rows in (("activation", 2), ("l1-vs-l2", 3)):
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert len(record["rows"]) == rows and all("val_accuracy" in row["final"] for row in record["rows"])
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert len((tmp_path / "results.txt").read_text().splitlines()) == 4
    unlimited = [word for word in argv if word not in ("--limit", "100")]
    for words in ([*argv, "--limit", "50"], unlimited):
        code, message = failure(sweep.main, [*words, "--study", "activation"])
        assert code == 1 and "--limit" in message, "a quick look is not taken for the study"


def test_every_study_is_made_of_arguments_that_train_takes():
    sweep = load("cifar", "sweep")
    for settings in sweep.STUDIES.values():
        folders = [sweep.folder_name(setting, 0) for setting in settings.values()]
        assert len(set(folders)) == len(folders), "two settings share one folder"
        for setting in settings.values():
            args = train.parse(study.argv_of(train, setting))
            assert all(getattr(args, name) == value for name, value in setting.items())


def test_the_studies_are_those_of_the_committed_records():
    """Every setting's arguments are those in its record, under today's names."""
    sweep = load("cifar", "sweep")
    for name, settings in sweep.STUDIES.items():
        file = ROOT / "cifar" / "results" / f"{name}.json"
        for row in json.loads(file.read_text())["rows"] if file.exists() else []:
            setting = settings[row["setting"]]
            args = run.record_args(train.parse(study.argv_of(train, setting)))
            then = run.recorded_args(row["args"])
            differ = {k for k in then if args.get(k) != then[k] and k not in ("data", "seed", "device", "precision")}
            assert not differ, f"{name}, {row['setting']}: {differ}"


@pytest.mark.slow
def test_the_bench_measures_all_ways(tmp_path):
    rows = load("cifar", "bench").main(["--data", "builtin", "--limit", "200", "--rounds", "1", "--out", str(tmp_path)])
    kinds = 6 if run.native_bf16(torch.device("cpu")) else 5
    assert len(rows) == 2 * kinds and all(row["images_per_s"] > 0 for row in rows)
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["dataset"]["builtin"] and record["dataset"]["train"] == 200 and record["rows"] == rows
    assert record["command"][:4] == ["cifar/bench.py", "--data", "builtin", "--limit"]
    below = str(tmp_path / "bench.json" / "out")
    for script, argv in (("bench", []), ("sweep", ["--study", "lr"])):
        code, message = failure(load("cifar", script).main, ["--data", "builtin", "--out", below, *argv])
        assert code == 1 and "bench.json" in message, "said before any work is done"


# ------------------------------------------------------------------------------------------------------------- predict


@pytest.fixture
def photographs(tmp_path):
    """A folder of two images, of other sizes than the network takes."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    Image.new("RGB", (80, 50), "red").save(folder / "red.png")
    Image.new("RGB", (30, 70), "blue").save(folder / "more" / "blue.jpg")
    return folder


def test_photographs_are_classified_and_shown(finished, photographs, tmp_path, capsys):
    run_folder = finished("cifar")
    capsys.readouterr()
    odds = predict.main([str(photographs), "--run", str(run_folder), "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    network = trained.load(run_folder)
    assert odds.shape == (2, len(network.classes)) and odds.sum(1) == pytest.approx([1, 1])
    for line, name, row in zip(lines, ("blue.jpg", "red.png"), odds):
        likeliest = network.classes[row.argmax()].replace("_", " ")
        assert name in line and f"{likeliest} {row.max():.0%}" in line and ("unsure" in line) == (row.max() < 0.5)
    assert (tmp_path / "out" / "seen.png").exists()
    pixels = torch.tensor([0.0, 0.0, 254.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32)  # JPEG's blue
    logits = network.net((pixels - network.mean) / network.std)[0]
    assert torch.allclose((logits / network.temperature).softmax(1)[0], odds[0], atol=1e-5)


@pytest.mark.draws
@pytest.mark.slow
def test_what_the_network_saw_is_drawn(finished, photographs, tmp_path):
    predict.main([str(photographs), "--run", str(finished("cifar")), "--out", str(tmp_path / "out")])
    width, height = Image.open(tmp_path / "out" / "seen.png").size
    assert width > 2 * height


def test_names_of_classes_are_printed_without_control_characters():
    assert photos.describe(["a\x1b[2J", "b"], torch.tensor([0.75, 0.25]), 0.5) == "a\\x1b[2J 75%, b 25%"


def test_the_readme_shows_what_the_committed_network_says(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict.run, "ROOT", tmp_path)  # where there is no run
    predict.main([str(draw_pictures(tmp_path / "pictures")), "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    readme = (ROOT / "cifar" / "README.md").read_text(encoding="utf-8")
    *lines, _ = said.out.splitlines()
    assert [f"pictures/{line.rpartition('pictures')[2][1:]}" in readme for line in lines] == [True, True], said.out
    assert said.err.rpartition("cifar/")[2] in readme


def test_the_newest_run_does_not_hide_the_committed_network(finished, photographs, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished("cifar"), tmp_path / "out" / "cifar" / "newest")
    monkeypatch.setattr(predict.run, "ROOT", tmp_path)
    predict.main([str(photographs), "--out", str(tmp_path / "seen")])
    said = capsys.readouterr().err
    assert "newest: lenet5 trained on builtin" in said and "--run cifar/weights/simplenn.safetensors" in said


@pytest.mark.slow
def test_the_committed_network_is_as_sure_as_its_header_says(data_dir):
    network = trained.load(trained.COMMITTED)
    test_set = data.load("cifar10", data_dir("cifar-10-batches-py"))[2]
    assert_as_sure_as_its_header(trained.COMMITTED, trained.probabilities(network, test_set.images), test_set.labels)


def test_other_files_than_images_are_one_line_each(finished, photographs, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no image")
    words = [str(tmp_path / "notes.txt"), str(tmp_path / "none.png"), str(photographs / "red.png")]
    code, message = failure(predict.main, [*words, "--run", str(finished("cifar")), "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert code == 1 and "none.png" in message and "notes.txt" in said.err and "red.png" in said.out
    (tmp_path / "empty").mkdir()
    code, message = failure(predict.main, [str(tmp_path / "empty"), "--run", str(finished("cifar"))])
    assert code == 1 and one_line(message) and "holds no image" in message


def test_weights_are_not_measured_on_other_data(tmp_path):
    """With more images in the folder, training images could be test images."""
    make_images(tmp_path / "images", {"": 30})
    words = ["--recipe", "tiny", "--data", str(tmp_path / "images"), "--epochs", "1", "--out", str(tmp_path / "run")]
    train.main(words)
    make_images(tmp_path / "images", {"": 40})
    code, message = failure(trained.main, [str(tmp_path / "run"), "--out", str(tmp_path / "a.safetensors")])
    assert code == 1 and one_line(message) and "other data" in message


def test_committed_weights_are_those_of_the_run(finished, tmp_path, capsys):
    """In bfloat16, with the temperature that validation chose."""
    trained.main([str(finished("cifar")), "--out", str(tmp_path / "a.safetensors")])
    ours, theirs = trained.load(tmp_path / "a.safetensors"), trained.load(finished("cifar"))
    record = json.loads((finished("cifar") / "run.json").read_text())
    assert ours.classes == theirs.classes and ours.temperature == theirs.temperature == record["final"]["temperature"]
    assert ours.accuracy == pytest.approx(record["final"]["test_accuracy"], abs=0.02)
    images = torch.randint(256, (20, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    a, b = (trained.probabilities(network, images) for network in (ours, theirs))
    assert not torch.equal(a, b) and torch.allclose(a, b, atol=0.02)


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.pop("classes"),
        lambda facts: facts.update(temperature=0),
        lambda facts: facts.update(std=[1.0]),
        lambda facts: facts.update(classes=["a", "b"]),
        lambda facts: facts.update(experiment="gan"),
        lambda facts: facts["args"].update(model="vgg"),
        lambda facts: facts.update(args=None),
        lambda facts: facts.update(dataset="x"),
        lambda facts: facts.update(test_accuracy="x"),
        lambda facts: facts.update(temperature="x"),
        lambda facts: facts.update(mean=[math.nan] * 3),
        lambda facts: facts.clear(),
    ],
)
def test_weights_with_a_damaged_header_are_one_line(change, finished, tmp_path):
    file = tmp_path / "a.safetensors"
    trained.main([str(finished("cifar")), "--out", str(file)])
    state, header = run.read_safetensors(file)
    facts = json.loads(header["facts"])
    change(facts)
    run.write_safetensors(file, state, {"facts": json.dumps(facts)})
    code, message = failure(trained.load, file)
    assert code == 1 and one_line(message) and "a.safetensors" in message


def test_weights_that_are_not_numbers_are_said(finished, tmp_path):
    file = tmp_path / "a.safetensors"
    trained.main([str(finished("cifar")), "--out", str(file)])
    state, header = run.read_safetensors(file)
    run.write_safetensors(file, {name: value * torch.nan for name, value in state.items()}, header)
    code, message = failure(trained.load, file)
    assert code == 1 and one_line(message) and "a.safetensors" in message
