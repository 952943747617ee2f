"""cifar/: the data against the published bytes and torchvision, the networks against their specification, the training
against what it must do. What all folders owe is in test_contract.py."""

import argparse
import csv
import hashlib
import io
import json
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import ROOT, failure, load

train = load("cifar")
data, model, run = train.data, load("cifar", "model"), train.run


@pytest.fixture(scope="module")
def builtin():
    return data.load("builtin")


# ------------------------------------------------------------------------------------------------------------- networks


def test_lenet5_is_the_network_specified():
    net = model.LeNet5()
    logits, shapes = net(torch.zeros(7, 3, 32, 32))
    assert logits.shape == (7, 100)
    assert {k: tuple(v) for k, v in shapes.items()} == {
        1: (7, 6, 14, 14),
        2: (7, 16, 5, 5),
        3: (7, 400),
        4: (7, 256),
        5: (7, 128),
        6: (7, 100),
    }
    assert model.count_parameters(net) == 0.151324
    net.conv1.requires_grad_(False)
    assert model.count_parameters(net) == pytest.approx(0.151324 - 456e-6), "frozen parameters are not trainable"


def test_lenet5_equals_the_same_layers_in_a_row():
    torch.manual_seed(0)
    net, x = model.LeNet5().double(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    relu, pool = torch.nn.ReLU(), torch.nn.MaxPool2d(2)
    plain = torch.nn.Sequential(
        net.conv1, relu, pool, net.conv2, relu, pool, torch.nn.Flatten(), net.fc1, relu, net.fc2, relu, net.fc3
    )
    assert torch.allclose(net(x)[0], plain(x), rtol=1e-12)


@pytest.mark.parametrize("bn", [False, True])
@pytest.mark.parametrize("activation", ["relu", "swish"])
def test_simplenn_with_dummy_inputs(bn, activation):
    net = model.SimpleNN(bn=bn, activation=activation)
    logits, shapes = net(torch.randn(5, 3, 32, 32))
    assert logits.shape == (5, 10) and logits.isfinite().all()
    assert {k: tuple(v) for k, v in shapes.items()} == {
        1: (5, 8, 14, 14),
        2: (5, 16, 6, 6),
        3: (5, 576),
        4: (5, 120),
        5: (5, 84),
        6: (5, 10),
    }
    assert round(model.count_parameters(net) * 1e6) == 82030 + bn * 2 * (8 + 16)


def test_simplenn_options_change_what_is_computed():
    x, outputs = torch.randn(4, 3, 32, 32), []
    for options in ({}, {"bn": True}, {"activation": "swish"}):
        torch.manual_seed(0)
        outputs.append(model.SimpleNN(**options)(x)[0])
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])
    assert torch.allclose(model.ACTIVATIONS["swish"](x), x * torch.sigmoid(x), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize("name, classes", [("cifar10", 10), ("cifar100", 100)])
def test_the_real_datasets(name, classes, data_dir):
    train_set, val_set, test_set = data.load(name, data_dir(data.PUBLISHED[name]["folder"]))
    assert [len(part) for part in (train_set, val_set, test_set)] == [45_000, 5_000, 10_000]
    for part in (train_set, val_set, test_set):
        assert part.images.dtype == torch.uint8 and part.images.shape[1:] == (3, 32, 32)
        assert part.labels.bincount().tolist() == [len(part) // classes] * classes, "stratified"
    assert len(train_set.classes) == classes and "bear" in train_set.classes or "airplane" in train_set.classes


def test_pixels_and_labels_are_torchvisions(data_dir):
    torchvision = pytest.importorskip("torchvision")
    folder = data_dir("cifar-10-batches-py")
    theirs = torchvision.datasets.CIFAR10(folder, train=False)
    (images, labels), _ = data.in_order([(theirs.data.transpose(0, 3, 1, 2), np.array(theirs.targets))])[0][0], None
    ours = data.load("cifar10", folder)[2]
    assert np.array_equal(ours.images.numpy(), images) and ours.labels.tolist() == labels.tolist()
    assert ours.classes == theirs.classes


def test_channel_statistics_are_the_published_ones(data_dir):
    """(0.5071, 0.4867, 0.4408) is what everybody normalizes CIFAR-100 with: the mean over its 50,000 images."""
    parts, _ = data.read_batches("cifar100", data_dir("cifar-100-python") / "cifar-100-python")
    mean, std = data.statistics(parts[0][0])
    assert (mean.flatten() / 255).tolist() == pytest.approx([0.5071, 0.4865, 0.4409], abs=3e-4)
    assert (std.flatten() / 255).tolist() == pytest.approx([0.2673, 0.2564, 0.2762], abs=3e-4)


# ---------------------------------------------------------------------------------------------- order, split, batches


def test_row_order_does_not_matter():
    (images, labels), _ = data.builtin()[0]
    shuffled = np.random.default_rng(1).permutation(len(labels))
    (a,), digest_a = data.in_order([(images, labels)])
    (b,), digest_b = data.in_order([(images[shuffled], labels[shuffled])])
    assert digest_a == digest_b and np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])
    images = images.copy()
    images[17, 0, 0, 0] ^= 1
    digest_c = data.in_order([(images, labels)])[1]
    assert digest_c != digest_a, "one bit more is another dataset"
    labels = labels.copy()
    labels[17] ^= 1
    assert data.in_order([(images, labels)])[1] != digest_c, "and so is one label"


def test_the_parts_do_not_overlap(builtin):
    rows = [{row.tobytes() for row in part.images.numpy()} for part in builtin]
    assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]
    assert [len(part) for part in builtin] == [4500, 500, 1000]
    assert builtin[1].labels.bincount().tolist() == [5] * 100


def test_limit_takes_the_first_of_each_part(builtin):
    for whole, part in zip(builtin, data.load("builtin", limit=100)):
        assert torch.equal(part.images, whole.images[:100]) and part.labels.unique().numel() > 40


def crop_and_flip_one_by_one(dataset, index, shift, flip):
    crops = []
    for i, (y, x), mirrored in zip(index.tolist(), shift.tolist(), flip.tolist()):
        canvas = torch.zeros(3, 40, 40, dtype=torch.uint8)
        canvas[:, 4:36, 4:36] = dataset.images[i]
        crop = canvas[:, y : y + 32, x : x + 32]
        crops.append(crop.flip(2) if mirrored else crop)
    return torch.stack(crops)


def test_crops_of_a_batch_equal_crops_one_by_one(builtin):
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(builtin[0]), (300,), generator=generator)
    shift = torch.randint(9, (300, 2), generator=generator)
    shift[:4] = torch.tensor([[0, 0], [0, 8], [8, 0], [8, 8]])
    index[0], index[3] = 0, len(builtin[0]) - 1
    flip = torch.rand(300, generator=generator) < 0.5
    assert torch.equal(
        builtin[0].crop_and_flip(index, shift, flip), crop_and_flip_one_by_one(builtin[0], index, shift, flip)
    )


@pytest.mark.parametrize("augment", [False, True])
def test_batches_are_a_function_of_seed_and_epoch(builtin, augment):
    dataset = builtin[0]
    batches = list(dataset.batches(64, shuffle=(1, 2), augment=augment))
    assert sum(len(labels) for _, labels in batches) == len(dataset) and len(batches[-1][1]) == len(dataset) % 64
    assert torch.equal(torch.cat([y for _, y in batches]).bincount(), dataset.labels.bincount()), "each example once"
    rest = list(dataset.batches(64, shuffle=(1, 2), augment=augment, skip=5))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(batches[5:], rest, strict=True))
    whole = torch.cat([x for x, _ in batches])
    assert torch.equal(whole, torch.cat([x for x, _ in dataset.batches(100, shuffle=(1, 2), augment=augment)]))
    for other in ((1, 3), (2, 2)):
        assert not torch.equal(batches[0][1], next(dataset.batches(64, shuffle=other, augment=augment))[1])


def test_seeds_of_any_size_differ(builtin):
    """torch's generator on a CPU takes 32 bits of a seed and drops the others without a word."""
    train_set = builtin[0]
    orders = [next(train_set.batches(50, shuffle=(seed, 0)))[1].tolist() for seed in (0, 1, 255, 256, 257, 2**31 - 1)]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_without_shuffling_batches_are_the_stored_order(builtin):
    x, y = next(builtin[1].batches(500))
    assert torch.equal(y, builtin[1].labels)
    assert torch.allclose(x * builtin[1].std + builtin[1].mean, builtin[1].images.float(), atol=1e-3)
    x = torch.cat([x for x, _ in builtin[0].batches(1000)])
    assert x.mean((0, 2, 3)).abs().max() < 1e-4 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_works_under_a_dataloader(builtin):
    loader = torch.utils.data.DataLoader(builtin[1], batch_size=50, num_workers=2)
    images, labels = (torch.cat(part) for part in zip(*loader))
    x, y = next(builtin[1].batches(500))
    assert torch.equal(images, x) and torch.equal(labels, y)


# ---------------------------------------------------------------------------------------------- files of any condition


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A small dataset in the published layout, with what is published of CIFAR-10 adapted to it: (folder, spec)."""
    rng = np.random.default_rng(0)
    spec = data.PUBLISHED["cifar10"] | dict(
        mirrors=[], origin="http://127.0.0.1:9/x", digest="?", parquet=("http://127.0.0.1:9/{}", "label")
    )
    folder = tmp_path / "data" / spec["folder"]
    folder.mkdir(parents=True)
    parts = []
    for names in (spec["train"], spec["test"]):
        images, labels = [], []
        for name in names:
            batch = {"data": rng.integers(0, 256, (100, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(100)]}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
            images.append(batch["data"].reshape(-1, 3, 32, 32)), labels.append(batch["labels"])
        parts.append((np.concatenate(images), np.concatenate(labels)))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}, protocol=2))
    spec["digest"] = data.in_order(parts)[1]
    monkeypatch.setitem(data.PUBLISHED, "cifar10", spec)
    return folder, spec


def test_a_local_copy_is_used_as_it_is(published):
    assert [len(part) for part in data.load("cifar10", published[0].parent)] == [450, 50, 100]
    assert [len(part) for part in data.load("auto", published[0].parent, auto="cifar10")] == [450, 50, 100]


@pytest.mark.parametrize("spoil", ["truncated", "one pixel", "missing", "code", "no batch", "labels"])
@pytest.mark.parametrize("name", ["cifar10", "auto"])
def test_a_corrupt_local_file_is_named_and_never_replaced(spoil, name, published):
    folder, _ = published
    file = folder / "data_batch_3"
    whole = file.read_bytes()
    batch = pickle.loads(whole)
    batch["data"][7, 7] ^= 1
    content = {
        "truncated": whole[: len(whole) // 2],
        "one pixel": pickle.dumps(batch, protocol=2),
        "missing": None,
        "code": pickle.dumps(argparse.Namespace()),
        "no batch": pickle.dumps([1, 2]),
        "labels": pickle.dumps(batch | {"labels": batch["labels"][:50]}, protocol=2),
    }[spoil]
    file.unlink() if content is None else file.write_bytes(content)
    code, message = failure(lambda: data.load(name, folder.parent, auto="cifar10"))
    assert code == 1 and message.startswith("error: ") and "\n" not in message
    assert str(folder) in message if spoil == "one pixel" else "data_batch_3" in message


def test_the_unpickler_calls_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    (tmp_path / "file").write_bytes(pickle.dumps(Evil()))
    code, message = failure(data.read_pickle, tmp_path / "file")
    assert code == 1 and "no array" in message and not (tmp_path / "evil").exists()


def test_a_local_archive_is_verified_and_unpacked(published, monkeypatch):
    folder, spec = published
    archive = folder.parent / spec["archive"]
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    shutil.rmtree(folder)
    code, message = failure(lambda: data.load("cifar10", folder.parent))
    assert code == 1 and spec["archive"] in message and "checksum" in message
    monkeypatch.setitem(spec, "md5", "md5:" + hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(data.load("cifar10", folder.parent)[0]) == 450 and folder.is_dir()


def test_auto_falls_back_loudly_and_a_name_never(published, capsys):
    folder, _ = published
    shutil.rmtree(folder)
    assert data.load("auto", folder.parent, limit=50, auto="cifar10")[0].name == "builtin"
    assert "BUILT-IN" in capsys.readouterr().err
    code, message = failure(lambda: data.load("cifar10", folder.parent))
    assert code == 1 and "cifar10 could not be fetched" in message and not list(folder.parent.iterdir())


@pytest.mark.parametrize("honest", [True, False])
def test_the_hubs_parquet_is_the_same_dataset(honest, published, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder, spec = published
    before = data.load("cifar10", folder.parent)
    parts, classes = data.read_batches("cifar10", folder)
    shutil.rmtree(folder)

    def download(urls, path, *args):
        images, labels = parts["test" in urls[0]]
        cells = []
        for image in images[::-1]:  # another row order
            file = io.BytesIO()
            Image.fromarray(image.transpose(1, 2, 0)).save(file, "png")
            cells.append({"bytes": file.getvalue(), "path": None})
        names = {"info": {"features": {"label": {"names": classes}}}}
        table = pyarrow.table({"img": cells, "label": labels[::-1] if honest else labels})
        parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), path)
        return path

    monkeypatch.setattr(data.fetch, "download", download)
    if honest:
        packed = data.fetch_parquet("cifar10", folder.parent / "cifar10.npz")
        assert packed.exists()
        after = data.load("cifar10", folder.parent)
        assert all(torch.equal(a.images, b.images) and a.classes == b.classes for a, b in zip(before, after))
    else:
        with pytest.raises(data.fetch.Unreachable, match="other pictures"):
            data.fetch_parquet("cifar10", folder.parent / "cifar10.npz")
        assert not list(folder.parent.iterdir())


def test_a_folder_of_ones_own(tmp_path):
    rng, pictures, out = np.random.default_rng(0), tmp_path / "pictures", tmp_path / "run"
    for name in ("cats", "dogs"):
        (pictures / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(pictures / name / f"{i}.png")
    parts = data.load(str(pictures))
    assert [len(part) for part in parts] == [32, 4, 4] and parts[0].classes == ["cats", "dogs"]
    train.main(["--data", str(pictures), "--out", str(out), "--epochs", "1"])
    assert json.loads((out / "run.json").read_text())["args"]["data"].startswith("./"), "relative: no machine's path"
    train.main(["--resume", str(out), "--data", str(pictures), "--epochs", "2"])
    assert len(csv_rows(out)) == 2
    (pictures / "dogs" / "bad.jpg").write_bytes(b"rubbish")
    code, message = failure(lambda: data.load(str(pictures)))
    assert code == 1 and "bad.jpg" in message
    for folder in ("empty", "empty/a", "empty/b"):
        (tmp_path / folder).mkdir()
        code, message = failure(lambda: data.load(str(tmp_path / "empty")))
        assert code == 1 and "two folders" in message


# ---------------------------------------------------------------------------------------------------------- training


def fit(tmp_path, name, *argv):
    return train.main(["--data", "builtin", "--device", "cpu", "--out", str(tmp_path / name), *argv])


def test_it_learns_and_leaves_what_it_should(tmp_path):
    record = fit(tmp_path, "a", "--epochs", "4", "--lr", "0.01", "--bs", "16")
    assert record["final"]["test_accuracy"] > 0.5, "100 classes: chance is 0.01"
    assert {"best.pt", "last.pt", "predictions.png"} <= {f.name for f in (tmp_path / "a").iterdir()}
    assert Image.open(tmp_path / "a" / "predictions.png").size[0] > 800
    rows = [json.loads(json.dumps(row)) for row in csv_rows(tmp_path / "a")]
    best = max(rows, key=lambda row: float(row["val_accuracy"]))
    assert record["final"]["best_epoch"] == int(best["epoch"])
    assert record["final"]["val_accuracy"] == float(best["val_accuracy"])


def csv_rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_simplenn_with_its_options_learns(tmp_path):
    record = fit(tmp_path, "a", "--model", "simplenn", "--recipe", "best", "--epochs", "4", "--bs", "32")
    assert record["final"]["test_accuracy"] > 0.5 and record["args"]["bn"] and record["args"]["activation"] == "swish"


def test_the_loss_is_the_mean_over_examples_not_batches(tmp_path):
    """45 images in batches of 32 and 13: with a learning rate of nothing, train and validation agree on the formula."""
    fit(tmp_path, "a", "--limit", "45", "--bs", "32", "--lr", "1e-30", "--epochs", "1")
    torch.manual_seed(0)
    net, part = model.LeNet5(), data.load("builtin", limit=45)
    with torch.no_grad():
        expected = F.cross_entropy(net(part[0].normalize(part[0].images))[0], part[0].labels).item()
    assert float(csv_rows(tmp_path / "a")[0]["train_loss"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("penalty, sparse", [("l1", True), ("l2", False)])
def test_penalties_shrink_weights_and_l1_makes_them_sparse(penalty, sparse, tmp_path):
    def weights(name, *argv):
        fit(tmp_path, name, "--limit", "300", "--bs", "16", "--lr", "0.01", "--epochs", "5", *argv)
        state = torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
        return state["fc1.weight"].abs()

    free, held = weights("free"), weights("held", f"--{penalty}", "0.003" if sparse else "0.1")
    assert held.mean() < 0.7 * free.mean()
    assert ((held < 0.003).float().mean() > 0.3 + (free < 0.003).float().mean()) == sparse


def test_l1_is_the_sum_of_absolute_values(tmp_path):
    for name, l1 in (("a", "0"), ("b", "0.5")):
        fit(tmp_path, name, "--limit", "45", "--lr", "1e-30", "--epochs", "1", "--l1", l1)
    torch.manual_seed(0)
    total = sum(p.abs().sum().item() for p in model.LeNet5().parameters())
    without, with_l1 = (float(csv_rows(tmp_path / name)[0]["train_loss"]) for name in "ab")
    assert with_l1 - without == pytest.approx(0.5 * total, rel=1e-4)


def test_schedules():
    at = [0, 0.1, 0.2, 0.49, 0.5, 0.6, 0.75, 0.9999]
    shapes = {name: [train.decay_factor(name, p) for p in at] for name in ("none", "step", "cosine", "onecycle")}
    assert shapes["none"] == [1.0] * len(at)
    assert shapes["step"] == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert shapes["cosine"][0] == 1 and shapes["cosine"][4] == pytest.approx(0.5) and shapes["cosine"][-1] < 1e-6
    assert shapes["onecycle"][:3] == [0, 0.5, 1] and shapes["onecycle"][5] == pytest.approx(0.5)


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
    a, whole = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("a", "whole"))
    assert all(torch.equal(a[k], whole[k]) for k in a)
    fit(tmp_path, "decayed", *short, "--decay", "cosine")
    assert failure(train.main, ["--resume", str(tmp_path / "decayed"), "--epochs", "4"])[0] == 2
    assert "--epochs 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["--bn"], ["--activation", "swish"], ["--no-bn"], ["--l1", "-1"], ["--decay", "soon"]]
)
def test_a_flag_the_model_cannot_honour(argv, capsys):
    assert failure(train.main, argv)[0] == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "error:" in said and argv[0].replace("no-", "") in said


def test_stopped_within_an_epoch_and_resumed(tmp_path):
    """SIGTERM in the middle of an epoch: what follows is as if nothing had happened, its metrics too."""
    arguments = ["--bs", "2", "--epochs", "3", "--augment", "--limit", "1000"]
    fit(tmp_path, "whole", *arguments)
    words = [sys.executable, str(ROOT / "cifar" / "train.py"), "--data", "builtin", "--device", "cpu", *arguments]
    out = tmp_path / "broken"
    process = subprocess.Popen([*words, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (out / "best.pt").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    state = torch.load(out / "last.pt", weights_only=True)
    assert process.returncode == 130 and "--resume" in errors, errors
    assert state["epoch"] > 0 and 0 < state["step"] < 1000 / 2
    train.main(["--resume", str(out)])
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("whole", "broken"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    drop = {"seconds"}
    rows = [[{k: v for k, v in r.items() if k not in drop} for r in csv_rows(f)] for f in (tmp_path / "whole", out)]
    assert rows[0] == rows[1]


# ----------------------------------------------------------------------------------------------------------- the verbs


def test_a_sweep_continues_and_shares_runs(tmp_path):
    words = [
        sys.executable,
        str(ROOT / "cifar" / "sweep.py"),
        "--data",
        "builtin",
        "--limit",
        "100",
        "--epochs",
        "1",
        "--seeds",
        "1",
        "--out",
        str(tmp_path),
    ]
    subprocess.run([*words, "--study", "l1-vs-l2"], check=True, capture_output=True)
    first = {f: f.read_bytes() for f in tmp_path.glob("*/run.json")}
    assert len(first) == 3
    again = subprocess.run([*words, "--study", "activation", "l1-vs-l2"], check=True, capture_output=True, text=True)
    assert all(f.read_bytes() == content for f, content in first.items()), "what is done is not done again"
    assert len(list(tmp_path.glob("*/run.json"))) == 4, "two settings more, one of them shared"
    assert "activation" in again.stdout
    for study, rows in (("activation", 2), ("l1-vs-l2", 3)):
        record = json.loads((tmp_path / f"{study}.json").read_text())
        assert len(record["rows"]) == rows and all("val_accuracy" in row["final"] for row in record["rows"])
        assert (tmp_path / f"{study}.png").stat().st_size > 10_000
    assert len((tmp_path / "results.txt").read_text().splitlines()) == 4
    unlimited = [word for word in words[2:] if word not in ("--limit", "100")]
    for argv in ([*words[2:], "--study", "activation", "--limit", "50"], [*unlimited, "--study", "activation"]):
        code, message = failure(load("cifar", "sweep").main, argv)
        assert code == 1 and "--limit" in message, "a quick look is not taken for the real thing"


def test_a_sweep_told_to_stop_stops_and_continues(tmp_path):
    words = [
        sys.executable,
        str(ROOT / "cifar" / "sweep.py"),
        "--data",
        "builtin",
        "--limit",
        "300",
        "--epochs",
        "40",
        "--seeds",
        "1",
        "--jobs",
        "1",
        "--out",
        str(tmp_path),
        "--study",
        "activation",
    ]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("*/last.pt")):
        time.sleep(0.02)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "continues where it was" in errors and "Traceback" not in errors
    (record,) = [json.loads(file.read_text()) for file in tmp_path.glob("*/run.json")]  # the second never began
    assert record["state"] == "interrupted"


def test_every_study_is_made_of_arguments_that_train_takes():
    sweep = load("cifar", "sweep")
    for study in sweep.STUDIES.values():
        folders = [sweep.folder_name(setting, 0) for setting in study.values()]
        assert len(set(folders)) == len(folders), "two settings share one folder"
        for setting in study.values():
            args = train.parse(sweep.arguments(setting))
            assert all(getattr(args, name) == value for name, value in setting.items())


def test_the_bench_measures_all_ways(tmp_path):
    rows = load("cifar", "bench").main(["--data", "builtin", "--limit", "200", "--rounds", "1", "--out", str(tmp_path)])
    kinds = 5 if run.native_bf16(torch.device("cpu")) else 4
    assert len(rows) == 2 * kinds and all(row["images_per_s"] > 0 for row in rows)
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["dataset"]["builtin"] and record["dataset"]["train"] == 200 and record["rows"] == rows
    below = str(tmp_path / "bench.json" / "out")
    for verb, argv in (("bench", []), ("sweep", ["--study", "lr"])):
        code, message = failure(load("cifar", verb).main, ["--data", "builtin", "--out", below, *argv])
        assert code == 1 and below in message, "said before any work is done"
