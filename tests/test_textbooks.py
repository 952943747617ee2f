"""nanogpt/textbooks/, and what it needs of the training loop: rows with masked targets, --init."""

import ast
import json
import math
import os
import random
import shlex
import shutil
import socket
import sys
import types
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import processes
from conftest import ROOT, failure, lazy, load, one_line, run, run_cells
from helpers import mutations

train = lazy("nanogpt")
data = lazy("nanogpt", "data")
phi1 = lazy("nanogpt", "phi1")
checkpoint = lazy("nanogpt", "checkpoint")
prepared = lazy("nanogpt", "corpora.prepared")
tokenizer = lazy("nanogpt", "tokenizer")
ADD = {"prompt": 'def add(a, b):\n    """Add two numbers."""\n', "completion": "    return a + b\n"}
SQUARE = {"prompt": 'def square(x):\n    """Square x."""\n', "completion": "    y = x * x\n    return y\n"}
TINY = ["--recipe", "tiny", "--tokens", "bpe", "--device", "cpu", "--precision", "fp32", "--block-size", "64"]


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


# ----------------------------------------------------------------------------------------------------- rows in the loop


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
    return types.SimpleNamespace(
        device=torch.device("cpu"),
        precision="fp32",
        autocast=nullcontext,
        rank=0,
        world=world,
        all_reduce=lambda tensor: tensor,
    )


def test_each_target_has_the_same_weight_in_every_micro_batch(folders):
    """The mean over all targets of the batch; a mean of the micro-batches' means differs."""
    text = data.load(str(folders / "rows"), tokens="bpe")
    shape = checkpoint.model_config(train.TINY, text.tokenizer.vocab_size) | {"block_size": 64}
    x, y = data.batch(text.train, 64, 4, 1, 0)
    order = (y >= 0).sum(1).argsort()
    x, y = x[order], y[order]
    gradients = {}
    for size in (4, 2, 1):
        torch.manual_seed(0)
        net = checkpoint.build(shape)
        total = train.backward(net, x, y, size, plain())
        log = net(x).log_softmax(2)
        wanted = -sum(log[b, t, y[b, t]] for b, t in (y >= 0).nonzero().tolist()) / int((y >= 0).sum())
        assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
        gradients[size] = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert all(torch.allclose(g, gradients[4], rtol=1e-4, atol=1e-7) for g in gradients.values())
    halves = torch.stack(
        [F.cross_entropy(net(a).flatten(0, 1), b.flatten(), ignore_index=-1) for a, b in zip(x.split(1), y.split(1))]
    )
    assert abs(halves.mean() - total) > 1e-4, "the mistake that this test is about would show"


def test_the_validation_loss_is_over_all_targets(folders):
    text = data.load(str(folders / "rows"), tokens="bpe")
    net = checkpoint.build(checkpoint.model_config(train.TINY, text.tokenizer.vocab_size) | {"block_size": 64})
    x, y = prepared.trimmed(text.val)
    wanted = F.cross_entropy(net(x).flatten(0, 1), y.flatten(), ignore_index=-1).item()
    assert train.evaluate(net, text.val, 1, plain()) == pytest.approx(wanted, rel=1e-5)
    assert data.n_targets(text.val) == int((y >= 0).sum())


# --------------------------------------------------------------------------------------------------------------- --init


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
    flags = ["--init", str(pretrained), "--evals", "1"]
    record = fit(tmp_path / "run", folders / "rows", *flags)
    before = torch.load(pretrained / "best.pt", weights_only=True)["model"]
    weights, states = steps[0]
    assert all(torch.equal(weights[name], before[name]) for name in before) and states == 0
    assert record["args"]["init"].startswith("./") and len(record["init"]["digest"]) == 32
    assert str(ROOT) not in json.dumps(record) and record["dataset"]["targets"] > 0
    assert record["final"]["val_loss"] < record["first_loss"]
    other = fit(tmp_path / "other", folders / "rows", "--init", str(pretrained / "last.pt"), "--evals", "1")
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
    other = ["--tokens", "word", "--init", str(tmp_path / "a")]
    code, message = failure(fit, tmp_path / "d", tmp_path / "book.txt", *other)
    assert code == 1 and one_line(message) and "reads bpe tokens" in message


def test_a_text_with_characters_that_the_model_to_start_from_does_not_know(tmp_path):
    (tmp_path / "book.txt").write_text('He said: "no". ' * 300)
    known = tokenizer.Characters.of("He said: no.")
    code, message = failure(data.load, str(tmp_path / "book.txt"), None, None, "char", known)
    assert code == 1 and one_line(message) and "'\"'" in message and "--tokens bpe" in message


def test_a_stage_of_prepared_data(folders, tmp_path):
    stage, flags = load("nanogpt", "stage"), ["--recipe", "bigram", "--tokens", "bpe", "--iters", "10", "--bs", "4"]
    flags += ["--block-size", "16"]
    final = stage.main([*flags, "--data", str(folders / "text"), "--out", str(tmp_path / "a")])["final"]
    assert final["val_loss"] > 0 and "val_bits_per_character" not in final, "its characters are not counted"
    rows = [*flags, "--data", str(folders / "rows"), "--out", str(tmp_path / "b")]
    assert "continuous text" in failure(stage.main, rows)[1]


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
    script = tmp_path / "wrapper.py"
    script.write_text(FLOAT64.format(folder=str(ROOT / "nanogpt")))
    flags = [*TINY, "--data", folders / "rows", "--init", pretrained, "--iters", "10", "--bs", "4", "--out"]
    processes.assert_done(*processes.torchrun(script, *flags, tmp_path / "two"))
    processes.assert_done(processes.start(script, *flags, tmp_path / "one"))
    two, one = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("two", "one"))
    assert all((two[name] - one[name]).norm() < 1e-12 * one[name].norm() for name in one)


# ---------------------------------------------------------------------------------------------------- models of the hub


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
    assert record["args"]["kind"] == "hub" and record["args"]["block_size"] == 64
    assert record["final"]["val_loss"] < record["first_loss"] and str(ROOT) not in json.dumps(record)
    model, state = checkpoint.load_checkpoint(tmp_path / "run" / "best.pt")
    theirs = checkpoint.hub.load("./" + os.path.relpath(starcoder, ROOT))
    ids = torch.tensor([tokenizer.tokenizer_from(state).encode(ADD["prompt"])])
    assert not torch.allclose(model(ids), theirs(ids)), "it was trained"
    cache = theirs.eval().new_cache()
    parts = [theirs(ids[:, :5], cache), theirs(ids[:, 5:], cache)]
    assert torch.allclose(torch.cat(parts, 1), theirs(ids), atol=1e-5), "the cache changes nothing"


WEIGHTS = {  # what is done to the weights of a model of the hub: words of the message
    "none": (lambda weights: {}, "lacks weights that its config describes"),
    "one too few": (lambda weights: {k: v for k, v in weights.items() if "c_fc.weight" not in k}, "mlp.c_fc.weight"),
    "one too many": (lambda weights: weights | {"score": torch.ones(2)}, "has unknown weights: score"),
    "NaN": (lambda weights: {k: v * math.nan for k, v in weights.items()}, "not finite"),
}


def test_a_model_of_the_hub_that_is_cut_short_is_refused(starcoder, tmp_path):
    folder = shutil.copytree(starcoder, tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    calls = [checkpoint.hub.load, textbooks.writer.writer, checkpoint.load_gpt2]
    for call in calls:
        code, message = failure(call, str(folder))
        assert code == 1 and one_line(message) and str(folder) in message


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_model_of_the_hub_that_is_not_whole_is_refused(kind, starcoder, tmp_path):
    """As the start of a run, and as the writer of exercises: what is missing would be random."""
    from safetensors.torch import load_file, save_file

    change, words = WEIGHTS[kind]
    folder = shutil.copytree(starcoder, tmp_path / "model")
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    for call in (lambda: checkpoint.hub.load(str(folder)), lambda: textbooks.writer.writer(str(folder))):
        code, message = failure(call)
        assert code == 1 and one_line(message) and str(folder) in message and words in message


def test_text_is_text_for_a_tokenizer_of_the_hub(starcoder):
    """Also the words that stand for special tokens. A text that grows is the same in pieces."""
    theirs = checkpoint.hub.HubTokenizer("./" + os.path.relpath(starcoder, ROOT))
    text = "a <|endoftext|> b, 你好 é"
    ids = theirs.encode(text)
    assert theirs.decode(ids) == text and theirs.vocabulary["<|endoftext|>"] not in ids
    for n in (0, 3, len(ids) - 1, len(ids)):
        assert "".join(theirs.pieces(ids[:n])) == theirs.decode(ids[:n])


def test_a_model_of_the_hub_that_is_not_there(folders, tmp_path, capsys):
    code, message = failure(fit, tmp_path / "run", folders / "rows", "--init", "nobody/nothing")
    message = message if code == 1 else capsys.readouterr().err.splitlines()[-1]
    assert "nobody/nothing" in message and "could be loaded" in message


# -------------------------------------------------------------------------------------------------------- the exercises

MODULES = "benchmarks clean complete exercises inside paired plan prepare quality report sandbox texts writer".split()
textbooks = types.SimpleNamespace(**{name: lazy("nanogpt", f"textbooks.{name}") for name in MODULES})
exercises, sandbox, benchmarks, clean, paired = (
    getattr(textbooks, name) for name in ("exercises", "sandbox", "benchmarks", "clean", "paired")
)


@pytest.fixture(scope="module")
def ladder():
    """(exercises to train on, held-out ones), three or more of every level."""
    held_out = exercises.generate(35, 0, held_out=True)
    return exercises.generate(140, 0, exclude={e.prompt for e in held_out}), held_out


def test_held_out_exercises_use_compositions_that_training_never_sees(ladder):
    train_on, held_out = ladder
    both = [{(e.level, e.composition) for e in some} for some in ladder]
    assert both[0] and both[1] and not both[0] & both[1]
    assert {e.level for e in train_on} == {e.level for e in held_out} == set(exercises.LEVELS)
    assert not {e.prompt for e in train_on} & {e.prompt for e in held_out}
    again = exercises.generate(35, 0, held_out=True)
    assert again == held_out and exercises.generate(35, 1, held_out=True) != held_out
    for level in exercises.LEVELS:  # every component of a held-out composition is trained on
        names = ["_".join(p.name for p in parts) for parts in exercises.compositions(level)]
        assert 0.05 < sum(exercises.is_held_out(level, name) for name in names) / len(names) < 0.4


def test_a_solution_is_admitted_only_if_it_is_right(ladder):
    good = ladder[0][:3]
    wrong = good[0]._replace(completion="    return None\n")
    crashes = good[1]._replace(completion="    raise ValueError\n")
    exits = good[2]._replace(completion="    raise SystemExit(0)\n")
    admitted, reasons = exercises.admit([*good, wrong, crashes, exits])
    assert admitted == good and len(reasons) == 3


def test_true_is_not_one():
    for a, b in ((True, 1), (1, 1.0), ([1], (1,)), ({"a": True}, {"a": 1}), ("1", 1), ([], None)):
        assert not sandbox.same(a, b) and not sandbox.same(b, a) and sandbox.same(a, a) and sandbox.same(b, b)


def test_values_keep_their_types():
    values = [None, True, 3, -(10**40), 0.5, float("inf"), "é\n", [1, (2, {3})], {"a": {1: (b"x", 2j)}}, int]
    inside = textbooks.inside
    assert all(sandbox.same(inside.decode(json.loads(json.dumps(inside.encode(v)))), v) for v in values)
    for value in (object(), iter([]), len, [object()]):
        with pytest.raises(TypeError):
            inside.encode(value)


# ------------------------------------------------------------------------------------------------------ decontamination


def problems(data_dir):
    return [json.loads(line) for line in (data_dir / "code" / "mbpp.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "vocabulary, tokens, size", [(1024, 10**6, 614_400), (1024, 10**5, 300_000), (300, 10, 20_000)]
)
def test_byte_pairs_are_learned_from_enough_text(vocabulary, tokens, size):
    assert textbooks.prepare.sample_size(vocabulary, tokens) == size


def test_a_planted_copy_is_caught(data_dir):
    """A solution in the middle of a document; one in another layout; one with every tenth word replaced."""
    item = max(problems(data_dir("code")), key=lambda item: len(item["code"]))
    code = item["code"].replace("\r", "")
    index, _ = textbooks.prepare.benchmark_index(data_dir("code"), quick=False)
    before, after = "Lists are sequences of values.\n\n" * 60, "\n\nA tuple cannot be changed once it is made.\n" * 60
    for copy in (code, " ".join(code.split()).upper()):
        documents, counts = clean.decontaminate([before + "\n" + copy + "\n" + after, "nothing of the kind"], index)
        assert counts["n-gram"] >= 1 and len(documents) == 2 and documents[1] == "nothing of the kind"
        assert copy[:80] not in documents[0] and "Lists are" in documents[0] and "A tuple" in documents[0]
    tokens = clean.TOKEN.findall(code.lower())
    changed = " ".join("other" if i % 12 == 5 else token for i, token in enumerate(tokens))
    assert index.find(changed) == "near-duplicate"
    assert index.find(" ".join(tokens[::-1])) is None
    others = "\n\ndef double(x):\n    total = x + x\n    return total\n" * 4
    documents, counts = clean.decontaminate([f"{others}\n\n{changed}\n{others}"], index)
    assert counts["near-duplicate"] == 1 and changed not in documents[0] and "double" in documents[0]


def test_minhash_estimates_the_jaccard_similarity():
    words = [f"w{i}" for i in range(400)]
    a, b = " ".join(words[:300]), " ".join(words[100:])
    grams = [set(clean.grams(text, clean.SHINGLE).tolist()) for text in (a, b)]
    truth = len(grams[0] & grams[1]) / len(grams[0] | grams[1])
    signatures = [clean.signature(clean.grams(text, clean.SHINGLE)) for text in (a, b)]
    assert 0.4 < truth < 0.6 and abs((signatures[0] == signatures[1]).mean() - truth) < 0.25


def test_overlap_and_passages():
    text = "def f(x):\n    return x\n\n\ndef g(y):\n\n    return y\n\n\n# end\n" * 40
    assert "".join(clean.passages(text)) == text and len(clean.passages(text)) > 1
    assert max(map(len, clean.passages(text))) <= clean.PASSAGE + 100
    words = " ".join(f"w{i}" for i in range(20))
    assert clean.overlap([words], [words]) == 1 and clean.overlap([words], ["other words"]) == 0
    assert clean.overlap([words], [words[: words.index("w16")]]) == pytest.approx(9 / 13)


def test_generated_pages_share_nothing_with_the_exercises(ladder):
    pages = textbooks.texts.generated(30_000)
    assert pages == textbooks.texts.generated(30_000) and len(set(pages)) == len(pages)
    assert all("This prints:\n\n" in page for page in pages) and not any("Traceback" in page for page in pages)
    solved = [e.prompt + e.completion for some in ladder for e in some]
    assert clean.overlap(solved, pages) == 0
    topic = next(page for page in pages if page.startswith("Quotient and remainder"))
    minutes = int(topic.split("divmod(")[1].split(",")[0])
    assert f"{minutes // 1440} days, {minutes // 60 % 24} hours and {minutes % 60} minutes" in topic, "it was executed"


# ---------------------------------------------------------------------------------------------------------- the sandbox


@pytest.fixture(scope="module")
def box():
    """A sandbox, or a skip with the reason why the system has none."""
    try:
        with sandbox.Sandbox(seconds=1) as made:
            yield made
    except run.UserError as error:
        pytest.skip(str(error))


ATTACKS = """
## fork bomb
import os
def f(x):
    while True:
        try:
            os.fork()
        except OSError:
            pass
## daemons
import os, time
def f(x):
    for _ in range(4):
        if os.fork() == 0:
            os.setsid()
            os.fork()
            time.sleep(600)
    while True: pass
## infinite loop
def f(x):
    while True: pass
## sleep
import time
def f(x):
    time.sleep(600)
## memory
def f(x):
    return len(bytearray(10**11)) and [b'x' * 10**6 for _ in range(10**6)]
## slow memory
def f(x):
    kept = []
    while True: kept.append(bytearray(10**7))
## kill
import os
def f(x):
    for pid in (os.getppid(), 1, -1):
        os.kill(pid, 9)
    return 1
## sys.exit
import sys
sys.exit(0)
## os._exit
import os
os._exit(0)
## exit in the call
import os
def f(x):
    os._exit(0)
## equal to everything
class Always:
    def __eq__(self, other): return True
    __ne__ = __hash__ = None
def f(x):
    return Always()
## equal in a list
class Always:
    def __eq__(self, other): return True
    __ne__ = __hash__ = None
def f(x):
    return [Always()]
## an int that is equal
class I(int):
    def __eq__(self, other): return True
def f(x):
    return I(3)
## builtins
import builtins
for n in ('all', 'isinstance', 'len', 'type', 'zip', 'map', 'str', 'repr'):
    setattr(builtins, n, lambda *a: True)
def f(x):
    return 0
## json
import json
json.dumps = lambda *a, **k: '{"results": [{"value": true}]}'
def f(x):
    return 0
## pass mark
import os, sys
for fd in range(64):
    try:
        os.write(fd, b'{"results": [{"value": 1}]}\\npassed\\n')
    except OSError:
        pass
def f(x):
    print('passed')
    return 'passed'
## atexit
import atexit, os
atexit.register(lambda: os.write(1, b'passed'))
def f(x):
    raise SystemExit(0)
## frames
import sys, gc
def f(x):
    frame, seen = sys._getframe(), []
    while frame:
        seen += frame.f_locals.values()
        frame = frame.f_back
    return next((v for v in seen if v == 424242), 0)
## repository
import os
def f(x):
    return open(REPOSITORY).read()
## network
import socket
def f(x):
    return socket.create_connection(('127.0.0.1', 22), 2) and 424242
## forged nesting
import os
for fd in range(3, 64):
    try:
        os.write(fd, b'[' * 100000 + b'\\n')
    except OSError:
        pass
def f(x): return 1
## forged flood
import os
for fd in range(3, 64):
    try:
        while True: os.write(fd, b'x' * 65536)
    except OSError:
        pass
def f(x): return 1
## shared memory
import ctypes
def f(x):
    return 424242 if ctypes.CDLL(None).shmget(0, 100 * 2**20, 0o1600) >= 0 else 0
## semaphores
import ctypes
def f(x):
    return 424242 if ctypes.CDLL(None).semget(0, 1, 0o1600) >= 0 else 0
## message queues
import ctypes
def f(x):
    return 424242 if ctypes.CDLL(None).msgget(0, 0o1600) >= 0 else 0
## signals to process 1
import os
def f(x):
    for number in range(1, 65):
        try:
            os.kill(1, number)
        except OSError:
            pass
    return 0
## an endless integer
def f(x):
    return 10**5000
## an endless integer in an exception
def f(x):
    raise KeyError(10**5000)
## user namespace
import ctypes
def f(x):
    return 424242 if ctypes.CDLL(None, use_errno=True).unshare(0x10000000) == 0 else 0
"""  # "## NAME", and a program whose f(x) must neither return 424242 nor do any harm
ATTACKS = dict(
    part.split("\n", 1) for part in ATTACKS.replace("REPOSITORY", repr(str(ROOT / "README.md"))).split("\n## ")[1:]
)


FORKS = """
import os, time
def f():
    n = 0
    while True:
        try:
            pid = os.fork()
        except OSError:
            return n
        if pid == 0:
            time.sleep(60)
        n += 1
"""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in ("sleep", "fork bomb") else name for name in ATTACKS]
)
def test_no_attack_passes_or_harms(name, box, monkeypatch):
    """Expected is 424242. Afterwards the same sandbox still runs a right program, and nothing is left in it."""
    problem = exercises.Exercise("list", "c", "f", "", "", [((3,), 424242)])
    with monkeypatch.context() as patch:
        patch.setattr(box, "wall", 2)  # no attack passes because the machine is slow
        assert exercises.verdict(problem.calls, box.call(ATTACKS[name], [("f", (3,))]))
    assert exercises.verdict(problem.calls, box.call("def f(x):\n    return 424242\n", [("f", (3,))])) == ""
    (alone,) = box.call(FORKS, [("f", ())])
    assert alone == sandbox.LIMITS["NPROC"] - 2, "all but itself and process 1: nothing is left of the attack"


def test_a_program_may_print_as_much_as_it_likes(box):
    program = "import sys\ndef f():\n    for stream in (sys.stdout, sys.stderr):\n"
    program += "        print('x' * 300_000, file=stream, flush=True)\n    return 1"
    assert [box.call(program, [("f", ())]) for _ in range(2)] == [[1], [1]]


def test_what_a_program_finds_in_the_sandbox(box):
    program = """
import os, resource, socket
def f():
    def listed(path):
        try:
            return sorted(os.listdir(path))
        except OSError:
            return None
    def writable(path):
        try:
            open(path + "/x", "w").close()
            return True
        except OSError:
            return False
    return [os.getuid(), os.getgid(), os.getgroups(), listed("/home"), listed("/proc"), listed("/tmp"), listed("/etc"),
            [p for p in ("/", "/home", "/usr", "/dev", "/tmp") if writable(p)], socket.if_nameindex(),
            [resource.getrlimit(getattr(resource, "RLIMIT_" + n)) for n in ("AS", "FSIZE", "NPROC", "CORE", "CPU")],
            sorted(os.environ)]
"""
    uid, gid, groups, home, proc, tmp, etc, writable, links, limits, environment = box.call(program, [("f", ())])[0]
    assert uid == gid == sandbox.NOBODY and set(groups) <= {sandbox.NOBODY} and home == [] and not writable
    assert proc is tmp is etc is None and [name for _, name in links] == ["lo"]
    assert limits == [*((v, v) for v in (sandbox.MEMORY, 2**20, 8, 0)), (1, 2)]
    assert not {"PYTHONPATH", "DATA_DIR", "OPENAI_API_KEY"} & set(environment)


def test_time_is_cpu_time(box):
    """A program that computes is ended by its CPU time; the clock ends only what waits."""
    assert box.wall > 5 * box.seconds
    (found,) = box.call("def f():\n    while True: pass\n", [("f", ())])
    assert str(found) == "timeout"
    assert box.call("import time\ndef f():\n    time.sleep(0.01)\n    return 1\n", [("f", ())]) == [1]


VALUES = ["10**5000", "[-(10**5000)]", "{10**5000: 1}", "1e308", "float('nan')", "'\\ud800'", "b'x'"]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", ["humaneval", "mbpp", "ladder"])
def test_no_value_that_a_program_returns_ends_the_evaluation(name, value, ladder, box, data_dir):
    if name == "ladder":
        some = benchmarks.held_out(ladder[1])[:3]
    else:
        some = getattr(benchmarks, name)(data_dir("code"))[:3]
    for problem in some:
        names = [line for line in problem.prompt.splitlines() if line.startswith("def ")]
        program = f"{names[-1]}\n    return {value}\n" if names else f"def f(*a):\n    return {value}\n"
        assert problem.check(box, program)


def test_an_exception_that_cannot_be_written_is_a_failure():
    def check():
        raise KeyError(10**5000)

    assert benchmarks.attempt(check) == "KeyError: <KeyError that cannot be written>"


def test_a_program_reaches_no_server_of_this_machine(box):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\ndef f():\n    socket.create_connection(('127.0.0.1', {port}), 1)\n    return 1\n"
        socket.create_connection(("127.0.0.1", port), 1).close()
        (found,) = box.call(program, [("f", ())])
    assert isinstance(found, sandbox.Failure) and "OSError" in str(found)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere there is no sandbox at all")
def test_where_no_sandbox_can_be_made_nothing_runs(monkeypatch, tmp_path):
    refuses = "echo 'unshare: unshare failed: Operation not permitted' >&2; exit 1"
    monkeypatch.setattr(sandbox, "command", lambda: ["sh", "-c", refuses])
    code, message = failure(sandbox.Sandbox().__enter__)
    assert code == 1 and one_line(message) and "Operation not permitted" in message and "--execute" in message
    monkeypatch.setattr(sandbox, "command", lambda: [str(tmp_path / "unshare")])
    code, message = failure(sandbox.Sandbox().__enter__)
    assert code == 1 and one_line(message) and "unshare of util-linux" in message
    monkeypatch.setattr(sys, "platform", "darwin")
    code, message = failure(sandbox.Sandbox().__enter__)
    assert code == 1 and one_line(message) and "Linux alone" in message


# ---------------------------------------------------------------------------------------------- HumanEval, MBPP, pass@k


def outcome(problems, completion_of, box):
    lines = [{"task_id": p.task_id, "completion": completion_of(p)} for p in problems]
    return [line["task_id"] for line in benchmarks.execute(problems, lines, seconds=60) if line["passed"]]


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_humanevals_solutions_pass_and_empty_bodies_do_not(every, box, data_dir):
    some = benchmarks.humaneval(data_dir("code"))[::every]
    assert len(some) == (164 if every == 1 else 9)
    assert outcome(some, lambda p: p.canonical, box) == [p.task_id for p in some]
    assert outcome(some, lambda p: "    pass\n", box) == []


@pytest.mark.parametrize("name", ["humaneval", "mbpp", "documentation"])
def test_data_that_is_missing_is_named_with_its_source(name, tmp_path):
    reading = (
        (textbooks.texts.documentation, tmp_path) if name == "documentation" else (benchmarks.read, name, tmp_path)
    )
    code, message = failure(*reading)
    source = {"humaneval": "openai/human-eval", "mbpp": "google-research", "documentation": "python3-doc"}[name]
    assert code == 1 and one_line(message) and source in message and "shared/" not in message


# its asserts make objects of classes that the solution defines, which are not plain values
MBPP_EXCEPTIONS = {"MBPP/367", "MBPP/601", "MBPP/927"}


@pytest.mark.slow
def test_mbpps_solutions_pass_and_empty_bodies_do_not(box, data_dir):
    some = benchmarks.mbpp(data_dir("code"), range(1, 975))
    passed = set(outcome(some, lambda p: p.canonical, box))
    assert {p.task_id for p in some} - passed <= MBPP_EXCEPTIONS and len(some) == 974
    assert outcome(some, lambda p: "def f():\n    pass\n", box) == []


def test_exercises_are_solved_by_their_solutions_only(ladder, box):
    some = benchmarks.held_out(ladder[1])
    assert outcome(some, lambda p: p.canonical, box) == [p.task_id for p in some]
    assert outcome(some, lambda p: "    pass\n", box) == []


def test_asserts_run_outside_the_sandbox(box, data_dir):
    """A program for HumanEval that replaces what its asserts use, or answers with an object that is equal to all."""
    (problem,) = [p for p in benchmarks.humaneval(data_dir("code")) if p.task_id == "HumanEval/53"]
    for body in (
        "    import os\n    os._exit(0)\n",
        "    class A:\n        __eq__ = lambda *a: True\n    return A()\n",
        "    import builtins\n    builtins.AssertionError = Exception\n    return 5\n",
    ):
        assert problem.check(box, problem.prompt + body)


def test_pass_at_k_is_the_unbiased_estimator():
    """Against the mean over all subsets of k completions."""
    from itertools import combinations

    for n in (1, 3, 6):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([i < c for i in range(n)], k))
                assert benchmarks.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert benchmarks.pass_at_k(20, 5, 10) != pytest.approx(1 - (1 - 5 / 20) ** 10), "the biased one differs"
    with pytest.raises(ValueError):
        benchmarks.pass_at_k(5, 1, 10)


def test_completions_of_any_engine_are_scored(ladder, box, tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    work.mkdir()
    textbooks.prepare.write_held_out(work / "heldout.jsonl", ladder[1])
    assert textbooks.prepare.read_held_out(work / "heldout.jsonl") == ladder[1]
    some = benchmarks.held_out(ladder[1])
    lines = [{"task_id": p.task_id, "completion": p.canonical if i % 2 else "    pass\n"} for i, p in enumerate(some)]
    file = tmp_path / "theirs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["evaluate", "--completions", str(file), "--out", str(work)]
    assert phi1.main(words) is None and "--execute" in capsys.readouterr().err, "nothing runs unless it is asked for"
    record = phi1.main([*words, "--execute"])
    assert record["scores"]["all"] == {"problems": 35, "pass@1": pytest.approx(17 / 35)}
    line = {"task_id": "ladder/0", "completion": "", "too_long": True}
    file.write_text(json.dumps(line) + "\n")
    record = phi1.main([*words, "--execute"])
    assert record["too_long"] == 1, "as a shard wrote it"
    assert "34 of 35 problems have no completion" in capsys.readouterr().err and record["temperature"] is None
    for content, word in (
        ("{}\n", "line 1"),
        ('{"task_id": "ladder/0", "completion": null}\n', "line 1"),
        ('{"task_id": "x", "completion": ""}\n', "no problem"),
        ("", "no completion"),
    ):
        file.write_text(content)
        code, message = failure(phi1.main, words)
        assert code == 1 and one_line(message) and word in message


def test_a_long_prompt_counts_as_failed_and_shards_make_the_whole(pretrained):
    model, ours = checkpoint.load_checkpoint(pretrained / "best.pt")[0], pairs()
    prompts = [ADD["prompt"], "long " * 40, SQUARE["prompt"]]
    some = [benchmarks.Problem(f"t/{i}", "x", prompt, None, "") for i, prompt in enumerate(prompts)]
    lines = list(textbooks.complete.completions(model, ours, some, 3, 0.8, 0, 12))
    assert [line.get("too_long") for line in lines] == [None] * 3 + [True] * 3 + [None] * 3
    assert lines[3]["completion"] == "" and {"task_id", "completion"} <= lines[0].keys()
    shards = [list(textbooks.complete.completions(model, ours, some[i::2], 3, 0.8, 0, 12)) for i in range(2)]
    assert sorted(map(str, shards[0] + shards[1])) == sorted(map(str, lines))
    greedy = [list(textbooks.complete.completions(model, ours, some[:1], 1, 0.0, seed, 12)) for seed in (0, 1)]
    assert greedy[0] == greedy[1]


def test_samples_have_the_probabilities_of_the_model():
    class Fixed(torch.nn.Linear):
        new_cache = staticmethod(list)

        def forward(self, idx, cache):
            return torch.tensor([0.7, 0.2, 0.1]).log().expand(*idx.shape, 3)

    ids = textbooks.complete.sample(Fixed(1, 1), [0], 6000, 1, 1.0, torch.Generator().manual_seed(0), lambda ids: False)
    shares = torch.bincount(torch.tensor(ids).flatten(), minlength=3) / 6000
    assert torch.allclose(shares, torch.tensor([0.7, 0.2, 0.1]), atol=0.02)


def test_completions_end_where_the_function_does():
    stops = benchmarks.FUNCTION_STOPS
    assert benchmarks.truncate("    return a\n\n\ndef other():\n    pass\n", stops) == "    return a\n"
    assert benchmarks.truncate("    x = 1\n\n    return x\nprint(3)", stops) == "    x = 1\n\n    return x\n"


def test_the_nearest_docstring_answers_with_its_solution():
    train_on = [ADD, SQUARE]
    asked = benchmarks.Problem("t/0", "x", 'def f(n):\n    """The square of n: Square it."""\n', None, "")
    (answer,) = benchmarks.nearest(train_on, [asked])
    assert answer["completion"] == "    y = n * n\n    return y\n", "with the argument under the name that is asked for"


# ------------------------------------------------------------------------------------------------------- the statistics


def test_the_interval_covers_the_truth():
    """Simulated seeds and problems with a true difference of 0.05: the interval has it about 95 times in 100."""
    import numpy as np

    rng, hits = np.random.default_rng(0), 0
    for i in range(100):
        problem, seed = rng.normal(0, 0.2, 60), rng.normal(0, 0.03, (5, 1))
        a = 0.05 + problem + seed + rng.normal(0, 0.1, (5, 60))
        low, high = paired.interval(a, np.zeros((5, 60)), resamples=500, seed=i)["interval"]
        hits += low < 0.05 < high
    assert 88 <= hits <= 100
    with pytest.raises(ValueError):
        paired.interval(a[:1], a[:1] * 0)


def test_the_detectable_difference_is_found_with_the_stated_power():
    import numpy as np
    from scipy import stats

    effect, rng = paired.detectable(2.0, 5), np.random.default_rng(0)
    p = stats.ttest_1samp(rng.normal(effect, 2.0, (20_000, 5)), 0, axis=1).pvalue
    assert abs((p < 0.05).mean() - 0.8) < 0.02 and 3.2 < effect < 3.6
    assert 10 < paired.detectable(1.0, 2) < 12, "two seeds, for which SciPy's other tail is NaN in places"
    assert paired.detectable(0.0, 5) == 0 and paired.detectable(2.0, 3) > effect


# ----------------------------------------------------------------------------------------------- filter, language model


def test_the_quality_filter_beats_the_majority_class():
    known = textbooks.quality.read_labels()
    assert len(known) == 200 and all(item["label"] == textbooks.quality.label(item["function"]) for item in known)
    ranked, facts = textbooks.quality.rank([item["function"] for item in known])
    assert facts["accuracy"] > facts["majority"] + 0.2, "cross-validated"
    best = {item["function"] for item in known if item["label"]}
    assert sum(function in best for function in ranked[:50]) > 45


ANSWER = '''Here it is:
```python
def double(x):
    """Return twice x."""
    return 2 * x

assert double(2) == 4
assert double(-1) == -2
```'''


def test_what_a_language_model_writes_passes_the_same_admission(box, monkeypatch):
    harm = ANSWER.replace("return 2 * x", "import os\n    os._exit(0)")
    answers = [ANSWER, ANSWER.replace("2 * x", "3 * x"), "I cannot.", ANSWER.split("assert")[0], harm]
    turns = iter([text for answer in answers for text in (answer, "A page.")])
    monkeypatch.setattr(textbooks.writer, "writer", lambda name, seed: lambda prompt: next(turns))
    rows, pages, counts = textbooks.writer.write("model", 5, 0, progress=lambda text: None)
    assert rows == [{"prompt": 'def double(x):\n    """Return twice x."""\n', "completion": "    return 2 * x\n"}]
    assert counts == {"asked": 5, "no exercise": 2, "refused": 2, "admitted": 1} and pages == ["A page.\n"] * 5


def test_a_writer_that_does_not_answer_is_one_line():
    code, message = failure(textbooks.writer.ask_endpoint, "http://127.0.0.1:1/v1", "hello")
    assert code == 1 and one_line(message) and "OpenAI-compatible" in message


# -------------------------------------------------------------------------------------------------------------- phi1.py


def test_the_committed_model_solves_compositions_that_it_was_not_trained_on(tmp_path):
    sample = load("nanogpt", "sample")
    asked = {
        "product_squared(a, b)": ("Return the product of a and b, squared.", "return result * result"),
        "even_plus(items)": ("Return a list of the numbers in items that are even, each plus 8.", "x + 8"),
    }
    for signature, (docstring, answer) in asked.items():
        prompt = f'def {signature}:\n    """{docstring}"""\n'
        sample.main(["phi1", "--prompt", prompt, "--temperature", "0", "--out", str(tmp_path), "--device", "cpu"])
        assert answer in (tmp_path / "generated_nanogpt.txt").read_text()


@pytest.mark.slow
@pytest.mark.draws
def test_the_pipeline_from_data_to_report(tmp_path, box, monkeypatch, capsys):
    """All five commands with --quick, without the real data: two seeds of two arms, and the report compares them."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "none"))
    where = ["--quick", "--out", str(tmp_path / "work")]
    for unread in (["--size", "large"], ["--seed", "1"], ["--arm", "raw"]):
        assert failure(phi1.main, ["pretrain", "--all", "--list", *unread, *where])[0] == 2
    assert failure(phi1.main, ["report", "--seeds", "1", *where[-2:]])[0] == 2
    code, message = failure(phi1.main, ["pretrain", *where])
    assert code == 1 and one_line(message) and "phi1.py prepare" in message
    phi1.main(["prepare", *where])
    record = json.loads((tmp_path / "work" / "prepared.json").read_text())
    tokens = {name: 24000 if name == "raw4" else 6000 for name in textbooks.plan.SEEDS if name != "scratch"}
    assert {name: arm["tokens"] for name, arm in record["arms"].items()} == tokens
    states = {(tmp_path / "work" / "data" / arm / "tokenizer.json").read_text() for arm in record["arms"]}
    assert len(states) == 1 and record["filter"]["accuracy"] > record["filter"]["majority"]
    raw, raw4 = ((tmp_path / "work" / "data" / arm / "train.bin").read_bytes() for arm in ("raw", "raw4"))
    assert raw4[: len(raw)] == raw and len(raw4) == 4 * len(raw)
    for arm, seed in (("textbook", 0), ("textbook", 1), ("raw", 0), ("raw", 1)):
        setting = ["--arm", arm, "--seed", str(seed), "--device", "cpu", "--precision", "fp32"]
        phi1.main(["pretrain", *setting, *where])
        tuned = phi1.main(["finetune", *setting, *where])
        assert tuned["init"]["name"].endswith(f"pretrained/{arm}-small-s{seed}")
        folder = tmp_path / "work" / "finetuned" / f"{arm}-small-s{seed}"
        phi1.main(["evaluate", str(folder), "--n", "2", "--execute", *where])
    phi1.main(["finetune", "--arm", "scratch", "--device", "cpu", *where])
    report = phi1.main(["report", *where])
    assert len(report["rows"]) == 5 and report["comparisons"]["main"]["all"]["seeds"] == 2
    assert report["comparisons"]["second"] is None and (tmp_path / "work" / "report.png").stat().st_size < 150_000
    assert "nearest docstring" in capsys.readouterr().out and str(ROOT) not in json.dumps(report["rows"])
    assert phi1.main(["finetune", "--arm", "scratch", "--device", "cpu", *where]) is None, "it is finished already"


def test_functions_of_a_short_text_are_repeated_and_of_each_text_there_is_one(tmp_path):
    prepare = textbooks.prepare
    module = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n"
    functions = prepare.distinct_functions([module, module + "\nx = 1\n"])
    assert functions == ["def double(x):\n    return 2 * x\n", "def half(x):\n    return x / 2\n"]
    tokenizer = prepare.train_tokenizer(module, 300)
    once = prepare.tokens_of(functions, tokenizer, 1000)
    record = prepare.write_arm(tmp_path, "functions", [module], functions, 1000, tokenizer, [module])
    assert (record["tokens"], record["distinct_tokens"]) == (1000, len(once))
    written = np.fromfile(tmp_path / "data" / "functions" / "train.bin", "<u2")
    assert written.tolist() == (once.tolist() * 1000)[:1000]
    for name, texts in (("functions", []), ("all-functions", functions)):
        code, message = failure(prepare.write_arm, tmp_path, name, [module], texts, 1000, tokenizer, [module])
        assert code == 1 and one_line(message) and f"{name}: has" in message
    most = 2 * len(tokenizer.encode(module))
    assert prepare.up_to([module] * 9, most, lambda text: prepare.count_tokens(text, tokenizer)) == [module] * 2


def test_a_model_of_the_hub_goes_through_the_commands(starcoder, folders, ladder, tmp_path, capsys):
    """Fine-tuned and evaluated under a name of its own; evaluated as it is, too."""
    work = tmp_path / "work"
    shutil.copytree(folders / "rows", work / "data" / "exercises")
    textbooks.prepare.write_held_out(work / "heldout.jsonl", ladder[1])
    where = ["--quick", "--device", "cpu", "--out", str(work)]
    record = phi1.main(["finetune", "--init", str(starcoder), "--name", "star", "--precision", "fp32", *where])
    assert record["args"]["kind"] == "hub" and record["args"]["recipe"] == "phi1-finetune"
    for model, place in (
        (work / "finetuned" / "star", work / "finetuned" / "star"),
        (starcoder, work / "hub" / "starcoder"),
    ):
        phi1.main(["evaluate", str(model), "--n", "2", *where])
        lines = (place / "completions-ladder.jsonl").read_text().splitlines()
        assert len(lines) == 2 * len(benchmarks.held_out(ladder[1])[::4]) and "task_id" in lines[0]
    assert "not executed" in capsys.readouterr().err


def test_sizes_of_the_models():
    with torch.device("meta"):
        sizes = [
            run.count_parameters(checkpoint.build(checkpoint.model_config(train.RECIPES[name], v)))
            for name, v in (("phi1", 1024), ("phi1-large", 1024), ("phi1-gpu", 32_000))
        ]
    assert sizes == [pytest.approx(size, rel=0.01) for size in (0.92e6, 4.4e6, 110e6)]


def test_the_plan_in_plain_commands(capsys, tmp_path):
    phi1.main(["report", "--list", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("python ") and tmp_path.name in line for line in lines)
    pretraining = [line for line in lines if "/pretrained/" in line and "train.py" in line and "--init" not in line]
    tuning = [line for line in lines if "--out" in line and "/finetuned/" in line and "train.py" in line]
    seeds = textbooks.plan.SEEDS
    assert len(pretraining) == sum(seeds.values()) - seeds["scratch"] + 2 and len(tuning) == sum(seeds.values()) + 3
    assert len({line.split("--out ")[1] for line in pretraining + tuning}) == len(pretraining + tuning)
    assert seeds["raw"] == seeds["textbook"] == 5 and min(seeds.values()) == 3
    first = {arm: next(line for line in pretraining if f"/{arm}-small-s0" in line) for arm in seeds if arm != "scratch"}
    iters = {arm: int(line.split("--iters ")[1].split()[0]) for arm, line in first.items()}
    assert iters.pop("raw4") == 4 * iters["raw"] and len(set(iters.values())) == 1


WRONG = {
    "": "COMMAND",
    "evaluate --shard 3/2": "--shard",
    "evaluate --n 0": "--n",
    "evaluate --lr 0.1": "unrecognized arguments: --lr",
    "evaluate --benchmark ladders": "--benchmark",
    "prepare --vocabulary 3": "--vocabulary",
    "prepare --exercises 1": "--exercises",
    "prepare --writer=": "--writer",
    "prepare --writer x": "--execute",
    "pretrain --arm x": "--arm",
    "pretrain --lr none": "--lr",
    "pretrain --lr 0": "--lr",
    "pretrain --colour 3": "--colour",
    "pretrain --data builtin": "--data: is set by the plan",
    "pretrain --recipe fast": "--recipe: is set by the plan",
    "pretrain --set evals=3": "--evals 3",
    "pretrain --all --arm raw": "--arm: is read only without --all",
    "finetune --name ../../evil": "--name",
    "finetune --name /tmp/evil": "--name",
    "finetune --name ..": "--name",
    "finetune --all --name x": "--name: is read only without --all",
    "pretrain --arm raw --seeds 5": "--seeds: is read only with --all",
    "finetune --jobs 2": "--jobs: is read only with --all",
    "evaluate RUN --seeds 2": "--seeds: is read only with --all",
    "evaluate RUN --all": "RUN: is read only without --all",
    "evaluate --completions FILE --n 3": "--n: is not read with --completions",
    "report --seeds 0": "--seeds",
    "report --seeds 1": "--seeds: is read only with --list",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_arguments_of_phi1(words, refused):
    assert WRONG[words] in refused(phi1.main, *words.split())


def test_other_flags_are_those_of_train(capsys, tmp_path):
    words = "--list --arm raw --lr 0.5 --n-layer 3 --no-rotary --threads 1 --quick --out"
    phi1.main(["pretrain", *words.split(), str(tmp_path)])
    (line,) = capsys.readouterr().out.splitlines()
    args = train.parse([word for word in shlex.split(line)[2:] if not word.endswith("data/raw") and word != "--data"])
    assert (args.lr, args.n_layer, args.rotary, args.threads, args.recipe) == (0.5, 3, False, 1, "phi1")
    assert (args.n_embd, args.qk_norm, args.iters) == (32, True, 6), "of --quick and of the recipe"


def test_evaluation_files_are_verified(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mbpp.jsonl").write_text('{"task_id": 11, "test_list": ["import os"], "code": ""}\n')
    code, message = failure(benchmarks.mbpp, tmp_path)
    assert code == 1 and one_line(message) and "not the published file" in message
    code, message = failure(benchmarks.humaneval, tmp_path)
    assert code == 1 and one_line(message) and "HumanEval.jsonl.gz" in message


def test_generated_pages_do_not_depend_on_the_hashes_of_a_process():
    """A set of strings has another order in each process."""
    for seed in range(20):
        _, _, code, _ = textbooks.texts.sets(random.Random(seed))
        literals = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Set)]
        words = [[ast.literal_eval(item) for item in literal.elts] for literal in literals]
        assert len(words) == 2 and words == [sorted(part) for part in words]


def test_lines_of_json_end_at_the_newline(tmp_path):
    """JSON may hold U+2028 and a form feed; a file may begin with a byte order mark and end its lines with CRLF."""
    odd = {"prompt": "a\u2028b\x0c", "completion": "\x85c"}
    lines = [json.dumps(odd, ensure_ascii=False), "", json.dumps(ADD), "  ", "{}"]
    file = tmp_path / "x.jsonl"
    file.write_bytes(("\ufeff" + "\r\n".join(lines[:4])).encode())
    assert prepared.read_exercises(file) == [odd, ADD]
    file.write_text("\n".join(lines), encoding="utf-8")
    code, message = failure(prepared.read_exercises, file)
    assert code == 1 and one_line(message) and "x.jsonl, line 5: is not an exercise" in message
    completions = [{"task_id": "t", "completion": odd["completion"]}] * 2
    file.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in completions), encoding="utf-8")
    assert benchmarks.read_completions(file, [benchmarks.Problem("t", "", "", None, "")]) == completions


def test_the_compositions_of_the_levels_stay_as_they_are():
    """The exercises of the records are drawn from them."""
    counts = {level: len(textbooks.exercises.compositions(level)) for level in textbooks.exercises.LEVELS}
    assert counts == dict(operation=42, loop=140, condition=294, string=216, list=49, dictionary=35, composition=234)


@pytest.mark.parametrize("text", ["", "a", "Hello, World 42", "xyx"])
def test_a_part_of_an_exercise_computes_what_its_source_does(text):
    for part in textbooks.exercises.TEXTS:
        for k in (1, 2, 3):
            source = part.source.format(x="text", k=k)
            assert eval(source, {"text": text}) == part.function(text, k), part.name


def test_functions_are_cut_where_python_counts_their_lines():
    source = '# a form feed:\x0c and \x1c and \u2028\ndef f(x):\n    return "\x0c"\n\n\ndef g(y):\n    return y\n'
    assert textbooks.quality.functions(source) == ['def f(x):\n    return "\x0c"\n', "def g(y):\n    return y\n"]
    decorated = "@first\n@second\ndef f(x):\n    return x\n"
    assert textbooks.quality.functions(f"a = 1\n{decorated}") == [decorated], "with its decorators"
    answer = ANSWER.replace("Here it is:", "").replace("Return twice x.", "Return\x0c twice x.")
    assert textbooks.writer.parse(answer).completion == "    return 2 * x\n"


HELD_OUT = {
    "not an object": "[1]",
    "a key too few": '{"level": "loop"}',
    "a key too many": '{**, "colour": 1}',
    "another level": '{**, "level": "ladder"}',
    "a number for a text": '{**, "prompt": 5}',
    "no calls": '{**, "calls": {"list": []}}',
    "arguments that are not a tuple": '{**, "calls": {"list": [{"tuple": [{"int": "0x1"}, {"int": "0x1"}]}]}}',
    "calls that are not pairs": '{**, "calls": {"list": [{"tuple": [{"int": "0x1"}]}]}}',
    "half a line": '{"level": "lo',
    "nothing": "",
}


@pytest.mark.parametrize("name", HELD_OUT)
def test_damaged_held_out_exercises_are_refused(name, ladder, tmp_path):
    file = tmp_path / "heldout.jsonl"
    textbooks.prepare.write_held_out(file, ladder[1][:1])
    good = file.read_text().strip()
    file.write_text(HELD_OUT[name].replace("{**", good[:-1]))
    code, message = failure(textbooks.prepare.read_held_out, file)
    word = "holds no exercise" if name == "nothing" else "line 1: is not a held-out exercise"
    assert code == 1 and one_line(message) and word in message


@pytest.mark.parametrize("line", ["[]", "{}", '{"passed": 1, "task_id": "t", "level": "loop"}', '{"passed": true', "5"])
def test_damaged_scores_are_refused(line, tmp_path, monkeypatch):
    folder = textbooks.plan.folder_of(tmp_path, "raw", "small", 0, True)
    folder.mkdir(parents=True)
    (folder / "ladder.scored.jsonl").write_text(line + "\n")
    code, message = failure(textbooks.report.rates, tmp_path, "raw", "all")
    assert code == 1 and one_line(message) and "ladder.scored.jsonl, line 1" in message
    (folder / "ladder.scores.json").write_text("{}")
    code, message = failure(textbooks.report.read_scores, folder / "ladder.scores.json")
    assert code == 1 and one_line(message) and "ladder.scores.json: is damaged" in message


@pytest.mark.skipif(os.name == "nt", reason="POSIX: FIFOs")
def test_what_would_wait_for_ever_is_refused(ladder, tmp_path):
    textbooks.prepare.write_held_out(tmp_path / "heldout.jsonl", ladder[1])
    os.mkfifo(tmp_path / "fifo.py")
    code, message = failure(phi1.main, ["evaluate", "--completions", str(tmp_path / "fifo.py"), "--out", str(tmp_path)])
    assert code == 1 and one_line(message) and "fifo.py: cannot be read (not a regular file)" in message
    code, message = failure(textbooks.texts.standard_library, tmp_path)
    assert code == 1 and one_line(message) and "no Python source" in message
    (tmp_path / "module.py").write_text("x = 1\n" * 50)
    assert textbooks.texts.standard_library(tmp_path) == ["x = 1\n" * 50]
    (tmp_path / "code").mkdir()
    os.mkfifo(tmp_path / "code" / "mbpp.jsonl")
    (tmp_path / "tokenizer.json").write_text(json.dumps(pairs().state()))
    os.mkfifo(tmp_path / "train.bin")
    for read, name in ((benchmarks.mbpp, "mbpp.jsonl"), (prepared.load, "train.bin")):
        code, message = failure(read, tmp_path)
        assert code == 1 and one_line(message) and f"{name}: cannot be read (not a regular file)" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["train.jsonl", "train.bin", "tokenizer.json", "heldout.jsonl", "theirs.jsonl", "answer"]
)
def test_fuzzed_files(name, folders, ladder, tmp_path):
    """A mutated file is read, or refused in one line. What a program answers is a value or a Failure."""
    readers = {"heldout.jsonl": textbooks.prepare.read_held_out}
    readers["theirs.jsonl"] = lambda file: benchmarks.read_completions(file, benchmarks.held_out(ladder[1]))
    file = tmp_path / name
    if name == "heldout.jsonl":
        textbooks.prepare.write_held_out(file, ladder[1][:4])
    elif name == "theirs.jsonl":
        file.write_text(
            "".join(json.dumps({"task_id": f"ladder/{i}", "completion": "    x\n"}) + "\n" for i in range(9))
        )
    elif name == "answer":
        file.write_text(json.dumps({"value": textbooks.inside.encode([1, (2.5, {"a": {3}}), b"x", 1j, None])}))
    else:
        shutil.copytree(folders / ("text" if name == "train.bin" else "rows"), tmp_path / "folder")
        file = tmp_path / "folder" / name
    for content in mutations(file.read_bytes(), random.Random(name), 300):
        if name == "answer":
            try:
                result = json.loads(content)
            except (ValueError, RecursionError):
                continue
            assert len(sandbox.values({"results": [result]}, 1)) == 1
            continue
        file.write_bytes(content)
        try:
            if name in readers:
                readers[name](file)
            else:
                prepared.load(file.parent)
        except run.UserError as error:
            assert one_line(f"error: {error}")


@pytest.mark.slow
def test_the_preregistered_table_is_what_the_function_says():
    text = (ROOT / "nanogpt" / "textbooks" / "PREREGISTRATION.md").read_text(encoding="utf-8")
    for seeds in (5, 3):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {seeds} (")]
        wanted = [paired.detectable(sd, seeds) for sd in (1, 2, 3, 4)]
        assert [float(value) for value in line.split("|")[2:6]] == [pytest.approx(value, abs=0.06) for value in wanted]


@pytest.mark.slow
def test_the_walkthrough_runs(monkeypatch, box):
    """Its code cells in order, in a new namespace. The first one is that of every notebook."""
    notebook = json.loads((ROOT / "nanogpt" / "textbooks" / "walkthrough.ipynb").read_text(encoding="utf-8"))
    colab = json.loads((ROOT / "colab.ipynb").read_text(encoding="utf-8"))
    cells, others = (
        ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"] for book in (notebook, colab)
    )
    assert cells[0] == others[0] and not any(cell.get("outputs") for cell in notebook["cells"])
    monkeypatch.chdir(ROOT / "nanogpt" / "textbooks")
    monkeypatch.setenv("DATA_DIR", "none")
    space = run_cells(cells)
    verdicts = space["verdicts"]
    assert verdicts.pop("right") == "passes" and len(verdicts) == 3 and "passes" not in verdicts.values()
    assert space["record"]["state"] == "done" and not space["RUN_ON_GPU"]
    assert sum(line["passed"] for line in space["scored"]) >= 13, "of 14 that the committed model wrote"
