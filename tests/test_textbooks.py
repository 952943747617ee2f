"""nanogpt/textbooks/, and what it needs of the training loop: rows with masked targets, --init."""

import json
import os
import shutil
import subprocess
import sys
import types
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, failure, load, one_line

train = load("nanogpt")
data, prepared, run = train.data, train.data.prepared, train.run
checkpoint, tokenizer = (load("nanogpt", name) for name in ("checkpoint", "tokenizer"))
ADD = {"prompt": 'def add(a, b):\n    """Add two numbers."""\n', "completion": "    return a + b\n"}
SQUARE = {"prompt": 'def square(x):\n    """Square x."""\n', "completion": "    y = x * x\n    return y\n"}
TINY = ["--recipe", "tiny", "--tokens", "bpe", "--device", "cpu", "--precision", "fp32", "--set", "model.block_size=64"]


def pairs():
    """Byte pairs of the two exercises, with the end token."""
    text = "".join(e["prompt"] + e["completion"] for e in (ADD, SQUARE)) * 3
    state = tokenizer.BytePairs.train(text, 290).state()
    state["vocabulary"].append(tokenizer.END_OF_TEXT)
    return tokenizer.tokenizer_from(state)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two prepared folders, `text` with tokens and `rows` with exercises, with the same tokenizer."""
    place, ours = tmp_path_factory.mktemp("prepared"), pairs()
    end = prepared.end_token(ours)
    for name in ("text", "rows"):
        (place / name).mkdir()
        (place / name / "tokenizer.json").write_text(json.dumps(ours.state()))
    ids = [*ours.encode(ADD["prompt"]), end, *ours.encode(SQUARE["prompt"]), end] * 20
    for part, n in (("train", 800), ("val", 200)):
        (place / "text" / f"{part}.bin").write_bytes(b"".join(i.to_bytes(2, "little") for i in ids[:n]))
        lines = [json.dumps(e) for e in (ADD, SQUARE) * (5 if part == "train" else 2)]
        (place / "rows" / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return place


def fit(out, folder, *flags, iters=6):
    return train.main([*TINY, "--data", str(folder), "--iters", str(iters), "--bs", "4", *flags, "--out", str(out)])


# ------------------------------------------------------------------------------------------------- rows in the loop


def test_a_row_masks_the_prompt_and_learns_the_end():
    ours = pairs()
    x, y = prepared.row(ADD, ours)
    prompt, completion = (ours.encode(ADD[key]) for key in ("prompt", "completion"))
    assert x == prompt + completion and len(y) == len(x)
    learned = [t for t in y if t >= 0]
    assert learned == [*completion, prepared.end_token(ours)], "the completion and the end, and nothing of the prompt"
    assert y[: len(prompt) - 1] == [-1] * (len(prompt) - 1) and y[len(prompt) - 1] == completion[0]
    assert ours.decode(learned) == ADD["completion"] + "<|endoftext|>"


def test_rows_are_padded_and_never_cut(folders):
    text = data.load(str(folders / "rows"), tokens="bpe")
    assert text.train.shape[:2] == (10, 2) and (text.train[:, 1] >= 0).any(1).all()
    widths = [len(prepared.row(e, text.tokenizer)[0]) for e in (ADD, SQUARE)]
    assert text.train.shape[2] == max(widths) and min(widths) < max(widths)
    short = text.train[0 if widths[0] < widths[1] else 1]
    assert (short[1, min(widths) :] == -1).all() and (short[1, min(widths) - 1] >= 0).all()
    code, message = failure(data.batch, text.train, max(widths) - 1, 4, 0, 0)
    assert code == 1 and "never cut" in message and str(max(widths)) in message
    code, message = failure(lambda: list(data.blocks(text.val, max(widths) - 1, 4)))
    assert code == 1 and "never cut" in message


def test_an_epoch_of_rows_has_each_row_once():
    part = torch.arange(10, dtype=torch.int32)[:, None, None].repeat(1, 2, 3)
    seen = [int(i) for step in range(5) for i in data.batch(part, 8, 4, 7, step)[0][:, 0]]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert torch.equal(data.batch(part, 8, 4, 7, 3)[0], data.batch(part, 8, 4, 7, 3)[0])


def plain(world=1):
    return types.SimpleNamespace(device=torch.device("cpu"), precision="fp32", autocast=nullcontext, rank=0,
                                 world=world, all_reduce=lambda tensor: tensor)  # fmt: skip


def test_each_target_has_the_same_weight_in_every_micro_batch(folders):
    """The mean over all targets of the batch; a mean of the micro-batches' means differs."""
    text = data.load(str(folders / "rows"), tokens="bpe")
    shape = train.RECIPES["tiny"]["model"] | {"vocab_size": text.tokenizer.vocab_size, "block_size": 64}
    x, y = data.batch(text.train, 64, 4, 1, 0)
    order = (y >= 0).sum(1).argsort()
    x, y = x[order], y[order]
    gradients = {}
    for size in (4, 2, 1):
        torch.manual_seed(0)
        net = checkpoint.build(shape)
        total = train.backward(net, x, y, size, nullcontext, plain())
        log = net(x).log_softmax(2)
        wanted = -sum(log[b, t, y[b, t]] for b, t in (y >= 0).nonzero().tolist()) / int((y >= 0).sum())
        assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
        gradients[size] = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert all(torch.allclose(g, gradients[4], rtol=1e-4, atol=1e-7) for g in gradients.values())
    halves = torch.stack([F.cross_entropy(net(a).flatten(0, 1), b.flatten(), ignore_index=-1)
                          for a, b in zip(x.split(1), y.split(1))])  # fmt: skip
    assert abs(halves.mean() - total) > 1e-4, "the mistake that this test is about would show"


def test_the_validation_loss_is_over_all_targets(folders):
    text = data.load(str(folders / "rows"), tokens="bpe")
    net = checkpoint.build(train.RECIPES["tiny"]["model"] | {"vocab_size": text.tokenizer.vocab_size, "block_size": 64})
    x, y = prepared.trimmed(text.val)
    wanted = F.cross_entropy(net(x).flatten(0, 1), y.flatten(), ignore_index=-1).item()
    assert train.evaluate(net, text.val, 1, plain()) == pytest.approx(wanted, rel=1e-5)
    assert data.n_targets(text.val) == int((y >= 0).sum())


# ------------------------------------------------------------------------------------------------------------ --init


@pytest.fixture(scope="module")
def pretrained(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrained") / "run"
    fit(out, folders / "text")
    return out


def test_init_starts_from_the_weights_with_a_new_optimizer(folders, pretrained, tmp_path, monkeypatch):
    """The shape and the tokenizer come from the checkpoint; the record has its digest, and no path of this machine."""
    steps = []
    update = train.update

    def recorded(model, optimizers, args, step):
        steps.append(({k: v.clone() for k, v in model.state_dict().items()}, len(optimizers[0].state)))
        update(model, optimizers, args, step)

    monkeypatch.setattr(train, "update", recorded)
    flags = ["--init", str(pretrained), "--set", "evals=1"]
    record = fit(tmp_path / "run", folders / "rows", *flags)
    before = torch.load(pretrained / "best.pt", weights_only=True)["model"]
    weights, states = steps[0]
    assert all(torch.equal(weights[name], before[name]) for name in before) and states == 0
    assert record["args"]["init"].startswith("./") and len(record["init"]["digest"]) == 32
    assert str(ROOT) not in json.dumps(record) and record["dataset"]["targets"] > 0
    assert record["final"]["val_loss"] < record["first_loss"]
    other = fit(tmp_path / "other", folders / "rows", "--init", str(pretrained / "last.pt"), "--set", "evals=1")
    assert other["init"]["digest"] != record["init"]["digest"]


def test_a_finetuned_run_is_resumed_when_its_init_is_gone(folders, pretrained, tmp_path, monkeypatch):
    start = shutil.copytree(pretrained, tmp_path / "start")
    flags = ["--init", str(start), "--resume", "auto"]
    fit(tmp_path / "whole", folders / "rows", *flags)
    steps = iter(range(1, 99))
    monkeypatch.setattr(train.ddp.Run, "should_stop", lambda self: next(steps) == 3)
    assert failure(fit, tmp_path / "parts", folders / "rows", *flags)[0] == 130
    shutil.rmtree(start)
    monkeypatch.undo()
    train.main(["--resume", str(tmp_path / "parts")])
    whole, parts = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("wrong, word", [("nowhere/best.pt", "no such"), ("", "empty"), ("./nowhere", "missing")])
def test_an_init_that_is_not_there(wrong, word, folders, tmp_path, capsys):
    code, message = failure(fit, tmp_path / "run", folders / "rows", "--init", wrong)
    assert word in (message if code == 1 else capsys.readouterr().err.splitlines()[-1])


def test_a_model_without_an_end_token_is_refused(folders, tmp_path):
    (tmp_path / "book.txt").write_text("word after word, " * 300)
    train.main([*TINY, "--iters", "2", "--bs", "2", "--data", str(tmp_path / "book.txt"), "--out", str(tmp_path / "a")])
    code, message = failure(fit, tmp_path / "b", folders / "rows", "--init", str(tmp_path / "a"))
    assert code == 1 and one_line(message) and "end token" in message
    code, message = failure(fit, tmp_path / "c", folders / "text", "--init", str(tmp_path / "a"))
    assert code == 1 and one_line(message) and "another tokenizer" in message


@pytest.mark.parametrize(
    "content, word",
    [("", "no exercise"), ("{}", "line 1"), ('{"prompt": "a", "completion": 3}', "line 1"), ("[" * 100_000, "line 1")],
)
def test_a_file_that_holds_no_exercises(content, word, folders, tmp_path):
    shutil.copytree(folders / "rows", tmp_path / "rows")
    (tmp_path / "rows" / "val.jsonl").write_text(content)
    code, message = failure(data.load, str(tmp_path / "rows"), None, None, "bpe")
    assert code == 1 and one_line(message) and word in message


FLOAT64 = """
import sys
sys.path.insert(0, {folder!r})
import torch
import train
torch.set_default_dtype(torch.float64)
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes_equal_one_on_rows(folders, pretrained, tmp_path):
    """torchrun in float64: processes whose rows have different numbers of targets average over targets."""
    (tmp_path / "wrapper.py").write_text(FLOAT64.format(folder=str(ROOT / "nanogpt")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, words in {"two": torchrun, "one": [sys.executable]}.items():
        flags = [*TINY, "--data", folders / "rows", "--init", pretrained, "--iters", "10", "--bs", "4"]
        command = [*words, tmp_path / "wrapper.py", *flags, "--out", tmp_path / name]
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
    two, one = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("two", "one"))
    assert all((two[name] - one[name]).norm() < 1e-12 * one[name].norm() for name in one)


# --------------------------------------------------------------------------------------------------- models of the hub


@pytest.fixture(scope="module")
def starcoder(tmp_path_factory):
    """A tiny random model of StarCoder's architecture (GPTBigCode), saved as the hub has it."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    place, ours = tmp_path_factory.mktemp("hub") / "starcoder", pairs()
    merges = [tuple(pair) for pair in ours.merges]
    theirs = Tokenizer(models.BPE(vocab=ours.vocabulary, merges=merges))
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=theirs, eos_token="<|endoftext|>")
    fast.save_pretrained(place)
    torch.manual_seed(0)
    shape = dict(vocab_size=ours.vocab_size + 5, n_positions=96, n_embd=16, n_layer=1, n_head=2, multi_query=True)
    transformers.GPTBigCodeForCausalLM(transformers.GPTBigCodeConfig(**shape)).save_pretrained(place)
    return place


def test_a_model_of_the_hub_is_finetuned(starcoder, folders, tmp_path):
    record = fit(tmp_path / "run", folders / "rows", "--init", str(starcoder), "--lr", "0.01", iters=20)
    assert record["args"]["model"]["kind"] == "hub" and record["args"]["model"]["block_size"] == 64
    assert record["final"]["val_loss"] < record["first_loss"] and str(ROOT) not in json.dumps(record)
    model, state = checkpoint.load_checkpoint(tmp_path / "run" / "best.pt")
    theirs = checkpoint.hub.load("./" + os.path.relpath(starcoder, ROOT))
    ids = torch.tensor([tokenizer.tokenizer_from(state).encode(ADD["prompt"])])
    assert not torch.allclose(model(ids), theirs(ids)), "it was trained"
    cache = theirs.eval().new_cache()
    parts = [theirs(ids[:, :5], cache), theirs(ids[:, 5:], cache)]
    assert torch.allclose(torch.cat(parts, 1), theirs(ids), atol=1e-5), "the cache changes nothing"


def test_a_model_of_the_hub_that_is_not_there(folders, tmp_path, capsys):
    code, message = failure(fit, tmp_path / "run", folders / "rows", "--init", "nobody/nothing")
    message = message if code == 1 else capsys.readouterr().err.splitlines()[-1]
    assert "nobody/nothing" in message and "could be loaded" in message
