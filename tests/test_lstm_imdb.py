"""lstm_imdb/: the readers and the split, padding, the LSTM cell against torch's, and training."""

import contextlib
import copy
import csv
import dataclasses
import io
import itertools
import json
import os
import random
import re
import shutil
from collections import Counter
from types import SimpleNamespace

from common.options import options_of

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from conftest import failure, lazy, load, one_line, run
from helpers import Silent, names

train = lazy("lstm_imdb")
data = lazy("lstm_imdb", "data")
model = lazy("lstm_imdb", "model")
corpus, outcome, initialization = (lazy("lstm_imdb", name) for name in ("corpus", "outcome", "initialization"))
TINY = ["--recipe", "tiny", "--data", "builtin", "--device", "cpu", "--limit", "200", "--precision", "fp32"]


def write_csv(path, rows, header=("review", "sentiment")):
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    return path


def own_reviews(n=40):
    return [(f"number {i} is {'fine' if i % 2 else 'poor'}", ("negative", "positive")[i % 2]) for i in range(n)]


@pytest.mark.parametrize("name", ["train", "pretrain"])
def test_a_training_that_learns_nothing_says_so(name, tmp_path, capsys):
    """Against a uniform prediction of the classes, or of the words."""
    words = [*TINY, "--lr", "1e-12", "--epochs", "1", "--out", str(tmp_path / "run")]
    record = load("lstm_imdb", name).main(words)
    assert "nothing was learned" in record["warning"] and record["warning"] in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- the words


def test_tokens():
    assert data.tokenize("It's GOOD.<br /><br />Don't miss it! Can’t wait... 10/10, snow-white_x") == (
        "it 's good do n't miss it ! ca n't wait 10 10 snow white x".split()
    )
    assert data.tokenize("") == [] and data.tokenize("<br /> ... ,,, ") == []
    assert data.tokenize("n'they o'clock's") == ["n", "they", "o", "clock", "'s"]


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),  # vowel signs and the virama are combining marks
        ("cafe\u0301 CRE\u0300ME", ["café", "crème"]),  # decomposed accents
        ("İstanbul", ["istanbul"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),  # joined by a character without width
        ("good 👍🏽❤️ 👨\u200d👩\u200d👧 🇩🇪🇫🇷", ["good", "👍🏽", "❤️", "👨\u200d👩\u200d👧", "🇩🇪", "🇫🇷"]),
        ("™ © 10½ ★", ["10½"]),  # signs that are no emoji by themselves separate words
        ("can't've n't hasn't't _n't n't_", ["ca", "n't", "'ve", "n't", "has", "n't", "t", "n't", "n", "t"]),
    ],
)
def test_words_of_other_scripts_and_emoji(text, tokens):
    assert data.tokenize(text) == tokens


OLD_TOKEN = re.compile(r"[^\W_]+?(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b|[^\W_]+|[!?]")  # of the records


@pytest.mark.slow
def test_the_words_of_imdb_are_those_of_the_records(data_dir):
    for text in corpus.read("imdb", data_dir("imdb")).texts[::5]:
        assert data.tokenize(text) == OLD_TOKEN.findall(text.lower().replace("<br />", " ").replace("’", "'"))


def test_a_review_of_100000_words_and_a_word_of_100000_letters():
    assert len(data.tokenize("good " * 100_000)) == 100_000 and len(data.tokenize("x" * 100_000)) == 1


def test_vocabulary_from_the_training_split_alone(tmp_path):
    texts = [data.tokenize(text) for text in ("a b b c c c", "c d")]
    vocabulary = data.Vocabulary.count(texts, max_words=2, min_count=1)
    assert vocabulary.words == ["<pad>", "<unk>", "c", "b"]
    assert vocabulary.encode(["b", "zebra", "c"]) == [3, 1, 2] and vocabulary.encode([]) == [1]
    assert data.Vocabulary.count(texts, 9, min_count=2).words[2:] == ["c", "b"]
    loaded = data.load(str(write_csv(tmp_path / "own.csv", own_reviews())), max_words=1000, min_count=1)
    known = {w for i in loaded.train.rows.tolist() for w in data.tokenize(loaded.corpus.texts[i])}
    assert set(loaded.vocabulary.words[2:]) == known
    assert (loaded.train.tokens != data.UNK).all() and (loaded.test.tokens == data.UNK).any()


def test_stop_words_are_left_out_and_not_is_one():
    pytest.importorskip("sklearn")
    ignored = data.stop_words()
    vocabulary = data.Vocabulary.count([["not", "good"], ["the", "film"]], 10, 1, ignored)
    assert "not" in ignored and vocabulary.words[2:] == ["film", "good"]
    assert vocabulary.encode(["not", "good"]) == [3] and vocabulary.encode(["the"]) == [1]


# ------------------------------------------------------------------------------------------------- examples and batches


@pytest.fixture(scope="module")
def builtin():
    return data.load("builtin", limit=700, max_len=16)


def test_an_example_is_padded_or_truncated(builtin):
    lengths = builtin.train.starts.diff()
    short, long = int(lengths.argmin()), int(lengths.argmax())
    assert lengths[short] < 16 < lengths[long]
    tokens, label = builtin.train[short]
    assert tokens.shape == (16,) and tokens.dtype == torch.int64 and label in (0, 1)
    assert (tokens == data.PAD).sum() == 16 - lengths[short] and (tokens[: lengths[short]] != data.PAD).all()
    whole = builtin.train.tokens[builtin.train.starts[long] : builtin.train.starts[long + 1]]
    assert torch.equal(builtin.train[long][0], whole[:16].long())
    builtin.train.keep = "end"
    assert torch.equal(builtin.train[long][0], whole[-16:].long())
    builtin.train.keep = "start"
    batch, labels = next(iter(torch.utils.data.DataLoader(builtin.train, 4)))
    assert batch.shape == (4, 16) and torch.equal(labels, builtin.train.labels[:4])


def test_batches_by_length_see_every_review_once_in_an_order_of_seed_and_epoch(builtin):
    reviews = builtin.train
    epochs = [reviews.order(32, (0, epoch)) for epoch in range(2)]
    for order in (*epochs, reviews.order(32)):
        assert torch.equal(torch.cat(order).sort().values, torch.arange(len(reviews)))
    assert all(torch.equal(a, b) for a, b in zip(epochs[0], reviews.order(32, (0, 0))))
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(reviews.order(32, (1, 0))))
    together = [{tuple(b.sort().values.tolist()) for b in order} for order in epochs]
    assert len(together[0] & together[1]) < len(together[0]) / 2, "batches differ from epoch to epoch"
    first = [float(reviews.lengths[b].float().mean()) for epoch in range(40) for b in reviews.order(32, (0, epoch))[:1]]
    assert abs(np.mean(first) - float(reviews.lengths.float().mean())) < 1, "short reviews do not come first"
    resumed = [index for *_, index in reviews.batches(32, (0, 0), start=5)]
    assert all(torch.equal(a, b) for a, b in zip(resumed, epochs[0][5:], strict=True))


def test_bucketing_leaves_little_padding(builtin):
    tokens, padded = 0, 0
    for batch, lengths, labels, index in builtin.train.batches(32, (0, 0)):
        assert batch.shape[1] == lengths.max() and torch.equal(labels, builtin.train.labels[index])
        tokens, padded = tokens + int(lengths.sum()), padded + batch.numel()
    random_order = sum(batch.numel() for batch, *_ in builtin.train.batches(32, (0, 0), bucket=1))
    assert padded < 1.1 * tokens and padded < random_order


# -------------------------------------------------------------------------------------------------------- the network


def network(**changes):
    torch.manual_seed(0)
    return model.SentimentLSTM(50, 3, **(dict(embed=6, hidden=5, dropout=0.0) | changes)).eval()


@pytest.mark.parametrize("pool", names("lstm_imdb", "model", "POOLS"))
@pytest.mark.parametrize("cell", names("lstm_imdb", "model", "CELLS"))
@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_never_changes_the_logits(pool, cell, bidirectional):
    net = network(pool=pool, cell=cell, bidirectional=bidirectional, layers=2)
    with torch.no_grad():
        net.embedding.weight[0] = 7.0  # padding that would be noticed
    lengths = torch.tensor([7, 1, 4])
    tokens = torch.randint(2, 50, (3, 7)) * (torch.arange(7) < lengths[:, None])
    logits = net(tokens, lengths)
    padded = net(torch.nn.functional.pad(tokens, (0, 9)), lengths)
    alone = torch.cat([net(row[None, :n], n[None]) for row, n in zip(tokens, lengths)])
    torch.testing.assert_close(padded, logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(alone, logits, rtol=0, atol=1e-6)
    assert (logits[0] - logits[1]).abs().max() > 1e-4


@pytest.mark.parametrize("cell", names("lstm_imdb", "model", "CELLS"))
def test_two_directions_and_layers_are_those_of_torch_with_packing(cell):
    """The golden test: nn.LSTM(bidirectional=True) on packed sequences, which never reads padding."""
    net = network(cell=cell, bidirectional=True, layers=2)
    reference = torch.nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)
    for layer, directions in enumerate(net.layers):
        for direction, lstm in enumerate(directions):
            for name, value in lstm.named_parameters():
                suffix = f"{layer}{'_reverse' if direction else ''}"
                getattr(reference, name.replace("_l0", f"_l{suffix}")).data.copy_(value.data)
    lengths = torch.tensor([3, 8, 5])
    x = torch.randn(3, 8, 6)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    expected, _ = pad_packed_sequence(reference(packed)[0], batch_first=True)
    ours = torch.cat(net.states(x, lengths), 2)
    for row, n in enumerate(lengths):
        torch.testing.assert_close(ours[row, :n], expected[row, :n], rtol=0, atol=1e-6)


def test_the_cell_written_out_is_nn_lstm():
    """Outputs to 1e-5 and gradients to a relative 1e-4, with the same names of parameters."""
    torch.manual_seed(0)
    ours, theirs = model.CustomLSTM(12, 16), torch.nn.LSTM(12, 16, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 40, 12)
    outputs, grads = [], []
    for lstm in (ours, theirs):
        y, (h, c) = lstm(x)
        (y.square().sum() + (h * c).sum()).backward()
        outputs.append((y, h, c))
        grads.append({name: p.grad for name, p in lstm.named_parameters()})
    for a, b in zip(*outputs):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    for name, grad in grads[0].items():
        assert (grad - grads[1][name]).norm() < 1e-4 * grads[1][name].norm(), name


def test_pooling_by_hand():
    states = [torch.tensor([[[1.0, -5.0], [3.0, -2.0], [9.0, 9.0]]]), torch.tensor([[[0.5], [0.25], [7.0]]])]
    lengths = torch.tensor([2])
    pooled = {pool: network(pool=pool, bidirectional=True).pooled(states, lengths).tolist() for pool in model.POOLS}
    assert pooled == {"last": [[3.0, -2.0, 0.5]], "mean": [[2.0, -3.5, 0.375]], "max": [[3.0, -2.0, 0.5]]}


def test_the_maximum_has_the_gradient_of_amax():
    torch.manual_seed(0)
    states = torch.randn(3, 7, 4, requires_grad=True)
    padding = (torch.arange(7) >= torch.tensor([7, 1, 4])[:, None])[:, :, None]
    wanted = states.masked_fill(padding, -torch.inf).amax(1)
    got = model.largest(states, padding)
    assert torch.equal(got, wanted)
    weights = torch.randn(3, 4)
    gradients = [torch.autograd.grad((pooled * weights).sum(), states)[0] for pooled in (got, wanted)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("p", [0.5, 0.2])
def test_dropout_keeps_a_share_and_the_mean(p):
    torch.manual_seed(0)
    dropout = model.Dropout(p)
    x = torch.full((3, 111, 101), 2.0, requires_grad=True)  # not a multiple of eight values
    y = dropout(x)
    kept = y != 0
    assert kept.float().mean() == pytest.approx(1 - p, abs=0.01)
    assert y.mean().item() == pytest.approx(2.0, rel=0.02)
    assert y[kept].unique().item() == pytest.approx(2 / (1 - p), rel=0.01)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0] * 2, y)
    columns = kept.flatten()[: 8 * 4000].view(-1, 8).float()  # the eight values of an integer
    assert columns.mean(0).sub(1 - p).abs().max() < 0.03
    assert torch.corrcoef(columns.T).fill_diagonal_(0).abs().max() < 0.06, "they are independent"
    assert not torch.equal(dropout(x), y)
    assert dropout.eval()(x) is x and model.Dropout(0.0)(x) is x


def test_word_dropout_acts_in_training_alone():
    net = network(word_dropout=0.5)
    tokens, lengths = torch.randint(2, 50, (4, 9)), torch.full((4,), 9)
    assert torch.equal(net(tokens, lengths), net(tokens, lengths))
    net.train()
    assert not torch.equal(net(tokens, lengths), net(tokens, lengths))
    tokens[:, 5:] = net.embedding.padding_idx
    dropped = net.drop_words(tokens)
    assert (dropped[:, :5] == net.unk).any() and torch.equal(dropped[:, 5:], tokens[:, 5:]), "padding stays"


def test_adversarial_training_by_hand():
    torch.manual_seed(0)
    net = model.SentimentLSTM(30, embed=4, hidden=5, bidirectional=True, pool="max", dropout=0.0)
    tokens = torch.randint(2, 30, (3, 7))
    lengths = torch.tensor([7, 4, 2])
    labels = torch.tensor([0, 1, 1])
    tokens[torch.arange(7) >= lengths[:, None]] = 0
    vectors = net.embedding(tokens)
    loss = F.cross_entropy(net.classify(vectors, lengths), labels)
    (slope,) = torch.autograd.grad(loss, vectors, retain_graph=True)
    move = torch.stack([0.1 * v.norm() / s.norm() * s for v, s in zip(vectors.detach(), slope, strict=True)])
    harder = F.cross_entropy(net.classify(vectors + move, lengths), labels)
    assert harder > loss + 0.001
    wanted = torch.autograd.grad((loss + harder) / 2, list(net.parameters()))
    r = SimpleNamespace(autocast=contextlib.nullcontext)
    got, logits = train.backward(net, tokens, lengths, labels, 0.1, r)
    torch.testing.assert_close(got, ((loss + harder) / 2).detach())
    torch.testing.assert_close([p.grad for p in net.parameters()], list(wanted))
    torch.testing.assert_close(logits, net(tokens, lengths).detach())
    net.zero_grad()
    assert train.backward(net, tokens, lengths, labels, 0.0, r)[0] == loss.detach()
    torch.testing.assert_close(
        [p.grad for p in net.parameters()],
        list(torch.autograd.grad(F.cross_entropy(net(tokens, lengths), labels), list(net.parameters()))),
    )


# ------------------------------------------------------------------------------------------------------- sentences


def test_a_share_of_the_reviews_is_one_sentence(tmp_path):
    texts = [f"First part of {i}. Now the second! <br /><br />Third, no dot {i}" for i in range(60)]
    rows = [(text, ("negative", "positive")[i % 2]) for i, text in enumerate(texts)]
    loaded = data.load(str(write_csv(tmp_path / "own.csv", rows)), min_count=1, sentences=0.5)
    reviews = loaded.train
    words = [loaded.vocabulary.words[i] for i in reviews.tokens.tolist()]
    sentences = {" ".join(words[a:b]) for a, b in itertools.pairwise(reviews.sentence_starts.tolist())}
    assert {"now the second !"} < sentences
    assert len(reviews.sentence_starts) == 3 * len(reviews) + 1
    assert {sentence.split()[0] for sentence in sentences} == {"first", "now", "third"}
    drawn = Counter()
    for epoch in range(20):
        read = {}
        for tokens, lengths, _, index in reviews.batches(8, (0, epoch)):
            for row, n, i in zip(tokens, lengths, index.tolist()):
                read[i] = " ".join(loaded.vocabulary.words[k] for k in row[:n].tolist())
                assert not row[n:].any()
        assert read.keys() == set(range(len(reviews)))
        drawn.update(text.split()[0] if text in sentences else "whole" for text in read.values())
    shares = {name: count / drawn.total() for name, count in drawn.items()}
    assert shares == pytest.approx({"whole": 1 / 2, "first": 1 / 6, "now": 1 / 6, "third": 1 / 6}, abs=0.05)
    whole = data.load(str(tmp_path / "own.csv"), min_count=1).train
    assert [n for _, n, _, _ in reviews.batches(99)][0].equal(whole.lengths.sort().values), "evaluation reads it all"


def test_sentences_have_the_words_of_the_review(tmp_path):
    text = "Mr. T. said: 'Wow!' <br /><br />... So?! It isn't 3.5 feet. n't"
    assert sum(map(data.tokenize, data.split_sentences(text)), []) == data.tokenize(text)
    odd = ["...", "? the", "the the. the", text]
    loaded = data.load(str(write_csv(tmp_path / "own.csv", own_reviews())), sentences=1.0)
    vocabulary = data.Vocabulary(["wow"], frozenset({"the"}))
    reviews = data.build(
        range(4), {i: data.tokenize(text) for i, text in enumerate(odd)}, [0] * 4, vocabulary, 9, "end"
    )
    starts = data.sentence_starts(reviews, odd, vocabulary)
    assert set(reviews.starts.tolist()) <= set(starts.tolist()) and starts.diff().min() == 1
    assert loaded.val.sentence_starts is None and loaded.test.sentence_starts is None


# ------------------------------------------------------------------------------------------------- steps and options


def small(**settings):
    """The options of a training of two steps."""
    changes = dict(data="builtin", limit=40, bs=20, epochs=1, dropout=0.0)
    return dataclasses.replace(train.RECIPES["tiny"], **changes | settings)


def first_network(args):
    """(initial network, its data) of a run with the options `args`."""
    loaded = train.load_data(args, args.sentences)
    torch.manual_seed(args.seed)
    return train.build_model(args, len(loaded.vocabulary), len(loaded.corpus.classes)), loaded


def step_of_adamw(parameters, loss, args):
    """The parameters after the first step of AdamW with clipped gradients (Loshchilov and Hutter 2019), and which of
    their gradients are large enough for a comparison: each number moves by the learning rate, along its sign."""
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    gradients = [g * min(1.0, args.clip / (norm.item() + 1e-6)) for g in gradients]
    lr = args.lr * {"none": 1.0, "onecycle": 0.01}[args.decay]
    moved = {
        name: (p - lr * args.weight_decay * p - lr * g / (g.abs() + 1e-8)).detach()
        for (name, p), g in zip(parameters.items(), gradients)
    }
    return moved, {name: (g.abs() > 1e-5) | (g == 0) for name, g in zip(parameters, gradients)}


def assert_same_step(parameters, moved, large, args):
    for name, p in parameters.items():
        assert large[name].any()
        difference = (p.detach() - moved[name]).abs()
        assert difference[large[name]].max() < 0.01 * args.lr * (0.01 if args.decay == "onecycle" else 1), name


STEPS = {
    "plain": {},
    "mean": dict(pool="mean"),
    "max": dict(pool="max"),
    "cell written out": dict(cell="custom"),
    "two directions": dict(bidirectional=True),
    "two layers": dict(layers=2),
    "adversarial": dict(adversarial=0.05),
    "dropout": dict(dropout=0.5, word_dropout=0.2, adversarial=0.05),
    "weight decay": dict(weight_decay=0.5),
    "small gradients": dict(clip=0.01),
    "one cycle": dict(decay="onecycle"),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_the_formula(name):
    args = small(limit=12, **STEPS[name])
    net, loaded = first_network(args)
    ((tokens, lengths, labels, _),) = loaded.train.batches(args.bs, (args.seed, 0))
    net.train()
    torch.manual_seed(7)  # the same words and units are dropped
    kept = net.drop_words(tokens)
    vectors = net.embedding(kept)
    loss = F.cross_entropy(net.classify(vectors, lengths), labels)
    if args.adversarial:
        (slope,) = torch.autograd.grad(loss, vectors, retain_graph=True)
        size, steepness = (x.flatten(1).norm(dim=1)[:, None, None] for x in (vectors.detach(), slope))
        move = size / steepness.clamp(min=1e-12) * slope  # a review may have lost all its units
        harder = net.classify(net.embedding(kept) + args.adversarial * move, lengths)
        loss = (loss + F.cross_entropy(harder, labels)) / 2
    parameters = dict(net.named_parameters())
    moved, large = step_of_adamw(parameters, loss, args)
    r = Silent()
    torch.manual_seed(7)
    train.train(args, r, net, loaded)
    assert r.rows[0]["train_loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert_same_step(parameters, moved, large, args)


@pytest.mark.parametrize("recipe", ["plain", "best", "short", "tiny"])
def test_every_recipe_can_be_pretrained(recipe):
    pretrain = load("lstm_imdb", "pretrain")
    ours, theirs = pretrain.parse(["--recipe", recipe]), train.RECIPES[recipe]
    assert (ours.recipe, ours.hidden, ours.embed) == (recipe, theirs.hidden, theirs.embed)


def test_a_step_of_pretraining_is_the_formula(monkeypatch):
    pretrain = load("lstm_imdb", "pretrain")
    args = pretrain.from_recipe("tiny", data="builtin", limit=6, bs=20, epochs=1, dropout=0.0, bidirectional=True)
    loaded = train.load_data(args)
    torch.manual_seed(0)
    net = model.SentimentLSTM(len(loaded.vocabulary), embed=4, hidden=5, bidirectional=True, dropout=0.0)
    lm = pretrain.LanguageModel(net)
    ((tokens, lengths, _, _),) = loaded.train.batches(args.bs, (args.seed, 0))
    total = 0.0
    for review, n in zip(tokens, lengths):
        forward, backward = net.states(net.embedding(review[None, :n]), n[None])
        log_next, log_previous = (head.log_prob(states[0]) for head, states in zip(lm.softmax, (forward, backward)))
        total = total - log_next[torch.arange(n - 1), review[1:n]].sum()
        total = total - log_previous[torch.arange(1, n), review[: n - 1]].sum()
    loss = total / (2 * (lengths - 1).sum())
    parameters = {
        name: p for name, p in lm.named_parameters() if not name.startswith("net.linear")
    }  # has no part in it
    gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
    moved, large = step_of_adamw(parameters, loss, args)
    norms = []  # before clipping: the first step of AdamW does not depend on the scale of the gradients
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: norms.append(clip(*given)))
    r = Silent()
    pretrain.pretrain(args, r, lm, loaded)
    assert norms[0].item() == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-4)
    assert r.rows[0]["train_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert_same_step(parameters, moved, large, args)


# {option: (another value, the settings in which it must matter)}
OPTIONS_OF_TRAINING = {
    "max_words": (9, {}),
    "min_count": (5, {}),
    "stop_words": (True, {}),
    "max_len": (5, {}),
    "keep": ("start", dict(max_len=5)),
    "embed": (9, {}),
    "embed_std": (1.0, {}),
    "hidden": (9, {}),
    "layers": (2, {}),
    "bidirectional": (True, {}),
    "cell": ("custom", {}),
    "dropout": (0.5, {}),
    "epochs": (2, {}),
    "bs": (10, {}),
    "bucket": (1, dict(bs=10)),
    "lr": (0.1, {}),
    "decay": ("onecycle", {}),
    "weight_decay": (0.5, {}),
    "clip": (0.01, {}),
    "pool": ("max", {}),
    "word_dropout": (0.5, {}),
    "adversarial": (0.5, {}),
    "sentences": (0.5, {}),
    "seed": (1, {}),
    "limit": (30, {}),
}
OPTIONS_OF_OTHER_TESTS = {"split", "vectors", "init", "recipe"}  # the official split; pretrained parts; recipes
OPTIONS_OF_COMMON = {"data", "data_dir", "device", "out", "precision", "resume", "tensorboard", "threads"}


def test_every_option_is_in_a_table():
    tables = OPTIONS_OF_TRAINING.keys() | OPTIONS_OF_OTHER_TESTS | OPTIONS_OF_COMMON
    assert tables == options_of(train.Options).keys()
    pretraining = options_of(load("lstm_imdb", "pretrain").Options).keys()
    assert pretraining == tables - {
        "pool",
        "word_dropout",
        "adversarial",
        "sentences",
        "vectors",
        "init",
    }
    assert len({str(train.parse(["--recipe", name])) for name in train.RECIPES}) == len(train.RECIPES)


@pytest.mark.parametrize("name", OPTIONS_OF_TRAINING)
def test_each_option_changes_the_training(name):
    if name == "stop_words":
        pytest.importorskip("sklearn")
    value, settings = OPTIONS_OF_TRAINING[name]
    outcomes = []
    for args in (small(**settings), small(**settings | {name: value})):
        net, loaded = first_network(args)
        r = Silent()
        train.train(args, r, net, loaded)
        weights = {name: weight.tolist() for name, weight in net.state_dict().items()}
        outcomes.append((str(net), weights, [row["val_loss"] for row in r.rows]))
    assert outcomes[0] != outcomes[1]


@pytest.mark.parametrize("name", ["plain", "best", "short", "tiny"])
def test_each_recipe_makes_a_step(name):
    args = dataclasses.replace(train.parse(["--recipe", name]), data="builtin", limit=20, epochs=1, max_len=20)
    net, loaded = first_network(args)
    before = copy.deepcopy(net.state_dict())
    train.train(args, Silent(), net, loaded)
    assert all((before[name] != weight).any() for name, weight in net.state_dict().items())


# ------------------------------------------------------------------------------------------------------------- sources


@pytest.mark.slow
def test_imdb_counts_split_and_labels(data_dir):
    """50,000 rows; 406 texts occur more than once, 418 surplus rows are dropped; 7:1:2 of what remains."""
    folder = data_dir("imdb")
    texts, parts, facts = corpus.load("imdb", str(folder))
    assert facts["rows"] == 50_000 and facts["dropped"] == {"duplicate texts": 418}
    assert [facts[part] for part in ("train", "val", "test")] == [34_708, 4_957, 9_917]
    assert facts["digest"] == corpus.DIGEST
    rows = [i for index in parts.values() for i in index]
    assert len(set(rows)) == len({texts.texts[i] for i in rows}) == 49_582
    for index in parts.values():
        assert abs(np.mean([texts.labels[i] for i in index]) - 24_884 / 49_582) < 1e-3
    assert sum(texts.texts.count(texts.texts[i]) > 1 for i in random.Random(0).sample(rows, 20)) <= 2


def test_a_changed_copy_of_imdb_is_refused(tmp_path):
    (tmp_path / "imdb").mkdir()
    write_csv(tmp_path / "imdb" / "IMDB Dataset.csv", own_reviews())
    code, message = failure(corpus.load, "imdb", str(tmp_path))
    assert code == 1 and one_line(message) and "this is not IMDB: 40 reviews" in message


def test_the_split_is_a_function_of_the_texts(tmp_path):
    rows = own_reviews(100)
    parts = []
    for seed in range(2):
        random.Random(seed).shuffle(rows)
        texts, index, facts = corpus.load(str(write_csv(tmp_path / f"{seed}.csv", rows)))
        parts.append({part: [texts.texts[i] for i in chosen] for part, chosen in index.items()})
        assert [facts[part] for part in ("train", "val", "test")] == [70, 10, 20]
        assert all(np.mean([texts.labels[i] for i in chosen]) == 0.5 for chosen in index.values())
    assert parts[0] == parts[1]


def make_aclimdb(folder, n=12):
    for part in ("train", "test"):
        for kind, stars in (("neg", 2), ("pos", 9)):
            (folder / part / kind).mkdir(parents=True)
            for i in range(n):
                text = "in both halves" + kind if i == 0 else f"{part} {kind} {i}"
                (folder / part / kind / f"{i}_{stars + i % 2}.txt").write_text(text, encoding="utf-8")
    return folder


def test_a_folder_like_aclimdb(tmp_path, capsys):
    folder = make_aclimdb(tmp_path / "aclImdb")
    texts, parts, facts = corpus.load(str(folder))
    assert facts["rows"] == 48 and facts["dropped"] == {"duplicate texts": 2} and facts["classes"][1] == "positive"
    assert set(texts.ratings) == {2, 3, 9, 10}
    assert all((texts.ratings[i] > 5) == texts.labels[i] for i in range(48))
    _, parts, facts = corpus.load(str(folder), split="official")
    assert "2 test reviews" in capsys.readouterr().out and not facts["dropped"]
    assert [facts[part] for part in ("train", "val", "test")] == [22, 2, 24]
    assert all(texts.official[i] == "test" for i in parts["test"])
    assert all(texts.official[i] == "train" for i in parts["train"] + parts["val"])


def test_the_official_split_needs_a_source_that_knows_it(tmp_path):
    path = write_csv(tmp_path / "own.csv", own_reviews())
    assert "aclImdb does" in failure(corpus.load, str(path), None, "official")[1]


def test_parquet_files_of_the_hub(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for part in ("train", "test"):
        table = {"text": [f"{part} {i}" for i in range(30)], "label": [i % 2 for i in range(30)]}
        parquet.write_table(pyarrow.table(table), tmp_path / f"{part}.parquet")
    texts = corpus.read_parquet(tmp_path / "train.parquet")
    assert len(texts.texts) == 60 and texts.labels[1] == 1 and texts.official[0] == "train"
    (tmp_path / "test.parquet").write_bytes(b"PAR1 nothing")
    assert one_line(failure(corpus.read_parquet, tmp_path / "train.parquet")[1])
    (tmp_path / "test.parquet").unlink()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "test.parquet")
        assert "test.parquet: is not a Parquet" in failure(corpus.read_parquet, tmp_path / "train.parquet")[1]


def test_a_csv_of_ones_own_with_three_classes(tmp_path):
    rows = [(str(i % 3 - 1), f"text, with\ncommas and a line break {i}") for i in range(45)]
    rows += [("", "no label"), ("1", "  "), ("-1", rows[0][1] + "!"), ("1", rows[0][1] + "!"), ("0", rows[1][1])]
    texts, parts, facts = corpus.load(str(write_csv(tmp_path / "three.csv", rows, ("Label", "TEXT"))))
    assert facts["classes"] == ["-1", "0", "1"] and facts["rows"] == 50
    assert facts["dropped"] == {
        "rows without a label": 1,
        "rows without text": 1,
        "rows of texts with two labels": 2,
        "duplicate texts": 1,
    }
    assert sum(map(len, parts.values())) == 45


BAD_FILES = {
    "columns": ("title,score\na,1\n", "has no text column"),
    "label column": ("review,score\na,1\n", "has no label column"),
    "nothing": ("", "has no text column"),
    "header alone": ("review,sentiment\n", "holds no labelled text"),
    "one class": ("review,sentiment\n" + "".join(f"text {i},good\n" for i in range(30)), "only the label 'good'"),
    "few rows": ("review,sentiment\na,1\nb,0\n", "only 1 different texts"),
    "bytes": (b"review,sentiment\na,1\nb\xff,0\n", "line 3 is not UTF-8"),
    "commas": ("review,sentiment\ngood, really,1\n", "line 2 has 3 fields"),
    "two label columns": ("label,text,Label\n0,a,1\n", "has 2 label columns (label, label); keep one"),
    "two text columns": ("text,review,label\na,b,1\n", "has 2 text columns (text, review); keep one"),
    "no words": ("text,label\n" + "".join(f"{'.' * i},{i % 2}\n" for i in range(2, 42)), "has 0 words"),
    "spellings": ("text,label\n" + "".join(f"t{i},{'1' if i % 2 else '1.0'}\n" for i in range(40)), "only the label"),
    "quote": ('review,sentiment\n"never closed,1\n', "is not a valid CSV file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_csv_file_is_one_line(name, tmp_path):
    content, expected = BAD_FILES[name]
    path = tmp_path / "bad.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, message = failure(train.main, [*TINY[:2], "--data", str(path), "--out", str(tmp_path / "run")])
    assert code == 1 and one_line(message) and expected in message and "bad" in message
    assert not (tmp_path / "run").exists()


def test_copies_with_other_spaces_and_marks_are_not_on_both_sides(tmp_path, capsys):
    """Reviews with the same words in three forms stay in one part; those of an official split stay where they are."""
    forms = ("number {} is {}", "Number {}: is {}...", "number  {} is, {}")
    rows = own_reviews(100)
    for text, label in rows[:40]:
        _, number, _, verdict = text.split()
        rows += [(form.format(number, verdict), label) for form in forms[1:]]
    loaded = data.load(str(write_csv(tmp_path / "own.csv", rows)))
    parts = [
        {" ".join(data.tokenize(loaded.corpus.texts[i])) for i in part.rows.tolist()}
        for part in (loaded.train, loaded.val, loaded.test)
    ]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2]) and all(parts)
    dropped = loaded.facts["dropped"]["reviews with the words of one in another part"]
    assert dropped == len(rows) - sum(map(len, (loaded.train, loaded.val, loaded.test))) > 0
    folder = make_aclimdb(tmp_path / "aclImdb")
    loaded = data.load(str(folder), split="official")
    assert loaded.facts["copies"] == 2 and [len(part) for part in (loaded.train, loaded.val, loaded.test)] == [
        22,
        2,
        24,
    ]
    assert "2 reviews have the words of one in another part" in capsys.readouterr().err


def test_odd_reviews_are_read(tmp_path):
    rows = own_reviews() + [("word " * 100_000, "positive"), ("....", "negative"), ("zebra", "positive")]
    loaded = data.load(str(write_csv(tmp_path / "odd.csv", rows)), max_len=50)
    assert sum(len(part) for part in (loaded.train, loaded.val, loaded.test)) == 43
    assert max(int(part.lengths.max()) for part in (loaded.train, loaded.val, loaded.test)) == 50
    assert min(int(part.lengths.min()) for part in (loaded.train, loaded.val, loaded.test)) >= 1


@pytest.mark.parametrize(
    "labels, classes",
    [
        (["0", "1.0", "0", "1"], ["0", "1"]),
        (["0", "1.0", "0.0", "1.0"], ["0", "1.0"]),
        (["-1", "10", "9", "10"], ["-1", "9", "10"]),
        (["Pos", "neg", "pos", "pos"], ["neg", "pos"]),
        (["1", "good", "1.0", "1"], ["1", "good"]),
        (["cafe\u0301", "no", "café", "café"], ["café", "no"]),
        (["nan", "inf", "NaN", "nan"], ["inf", "nan"]),
    ],
)
def test_spellings_of_a_label_are_one_class(labels, classes, tmp_path, capsys):
    path = write_csv(tmp_path / "own.csv", [(f"text {i}", label) for i, label in enumerate(labels * 20)])
    texts, _, facts = corpus.load(str(path))
    keys = [corpus.label_key(name) for name in classes]
    assert facts["classes"] == classes
    assert texts.labels == [keys.index(corpus.label_key(label)) for label in labels * 20]
    assert ("as one class" in capsys.readouterr().err) == (len(set(labels)) > len(classes))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_line_ends_and_a_byte_order_mark_change_no_csv_file(end, bom, tmp_path):
    lines = ["text,label", *(f"number {i}\u2028 is {'good' if i % 2 else 'bad'},{i % 2}" for i in range(30))]
    path = tmp_path / "own.csv"
    path.write_bytes((bom + "".join(line + end for line in lines)).encode())
    texts = corpus.read_csv(path)
    assert texts.texts == [line.rpartition(",")[0] for line in lines[1:]] and texts.classes == ["0", "1"]


@pytest.mark.slow
def test_fuzzed_csv_files(tmp_path):
    rng, path = random.Random(0), write_csv(tmp_path / "fuzz.csv", own_reviews())
    whole, ends = path.read_bytes(), {"read": 0, "refused": 0}
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(content))
            if rng.random() < 0.5:
                content[at] = rng.randrange(256) if rng.random() < 0.3 else rng.choice(b'",\n\r a')
            else:
                del content[at : at + rng.randrange(30)]
        path.write_bytes(content)
        try:
            _, parts, facts = corpus.load(str(path))
            assert facts["rows"] == sum(map(len, parts.values())) + sum(facts["dropped"].values())
            ends["read"] += 1
        except run.UserError as error:
            assert "\n" not in str(error).strip()
            ends["refused"] += 1
    assert min(ends.values()) > 10, ends


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.slow
def test_word_counts_fail_on_the_generated_reviews_and_the_lstm_does_not(tmp_path):
    pytest.importorskip("sklearn")
    unigrams, _ = load("lstm_imdb", "baseline").main(["--data", "builtin", "--out", str(tmp_path)])
    assert abs(unigrams["final"]["test_accuracy"] - 0.5) < 0.05
    record = train.main(["--data", "builtin", "--device", "cpu", "--epochs", "10", "--out", str(tmp_path / "run")])
    assert record["final"]["test_accuracy"] > 0.95


def test_bag_of_words_says_nothing_of_the_generated_reviews(builtin):
    """Every word is as frequent in positive as in negative reviews, but for chance."""
    whole = data.load("builtin")
    present = torch.zeros(len(whole.train), len(whole.vocabulary))
    for i in range(len(whole.train)):
        present[i, whole.train.tokens[whole.train.starts[i] : whole.train.starts[i + 1]].long()] = 1
    shares = [present[whole.train.labels == label].mean(0) for label in (0, 1)]
    assert (shares[0] - shares[1]).abs().max() < 0.06


def test_one_batch_is_overfitted(builtin):
    torch.manual_seed(0)
    net = model.SentimentLSTM(len(builtin.vocabulary), 2, embed=16, hidden=16, dropout=0.0)
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    tokens, lengths, labels, _ = next(builtin.train.batches(32, (0, 0)))
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(net(tokens, lengths), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_stopped_within_an_epoch_and_resumed_bit_for_bit(tmp_path, monkeypatch):
    """A signal in the middle of an epoch, with dropout and word dropout: the same weights in the end."""
    argv = [*TINY, "--word-dropout", "0.2", "--bidirectional", "--pool", "max"]
    train.main([*argv, "--out", str(tmp_path / "whole")])
    steps = 0

    def should_stop(self):
        nonlocal steps
        steps += 1
        return steps == 14  # once: a signal counts only if it is seen before the checkpoint is written

    monkeypatch.setattr(run.Run, "should_stop", should_stop)
    assert failure(train.main, [*argv, "--out", str(tmp_path / "broken")])[0] == 130
    state = run.read_checkpoint(tmp_path / "broken" / "last.pt")
    assert (state["epoch"], state["step"]) == (1, 4)
    monkeypatch.undo()
    train.main(["--resume", str(tmp_path / "broken")])
    whole, broken = (run.read_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("whole", "broken")]
    assert [row.rpartition(",")[0] for row in rows[0]] == [row.rpartition(",")[0] for row in rows[1]]


def test_a_checkpoint_within_the_epoch_is_written_in_time(tmp_path, monkeypatch):
    saved, save = [], run.Run.save

    def record_save(self, file="last.pt", **state):
        saved.append((file, state.get("step")))
        save(self, file, **state)

    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    monkeypatch.setattr(run.Run, "save", record_save)
    train.main([*TINY, "--epochs", "1", "--out", str(tmp_path / "run")])
    assert saved == [*(("last.pt", step) for step in range(1, 11)), ("best.pt", None), ("last.pt", 0)]


def test_a_vocabulary_without_words_is_refused(tmp_path):
    for words in (["--min-count", "1000000"], ["--max-words", "1"]):
        code, message = failure(train.main, [*TINY, *words, "--out", str(tmp_path / "run")])
        assert code == 1 and one_line(message) and "two or more are needed" in message and words[0] in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--keep", "middle"],
        ["--dropout", "1.0"],
        ["--clip", "0.0"],
        ["--adversarial", "-0.1"],
        ["--word-dropout", "-0.1"],
        ["--embed", "0"],
        ["--decay", "x"],
        ["--pool", "min"],
        ["--cell", "gru"],
        ["--max-len", "0"],
    ],
)
def test_values_that_make_no_sense(words, capsys):
    assert failure(train.parse, [*TINY, *words])[0] == 2
    assert words[0] in capsys.readouterr().err.splitlines()[-1]


# --------------------------------------------------------------------------------------------------------- the outcome


@pytest.fixture(scope="module")
def counted(builtin):
    """({part: tokenized reviews joined by spaces}, what baseline.fit returns for them)"""
    pytest.importorskip("sklearn")
    tokens = {
        part: [" ".join(data.tokenize(builtin.corpus.texts[i])) for i in getattr(builtin, part).rows[:150].tolist()]
        for part in ("train", "val", "test")
    }
    return tokens, fit_first(builtin, tokens)


def fit_first(loaded, tokens):
    """baseline.fit with unigrams on the first reviews of each part."""
    parts = {part: SimpleNamespace(labels=getattr(loaded, part).labels[: len(texts)]) for part, texts in tokens.items()}
    return load("lstm_imdb", "baseline").fit(SimpleNamespace(corpus=loaded.corpus, **parts), tokens, (1, 1))


def test_the_baseline_learns_no_word_from_the_test_reviews(builtin, counted):
    tokens, (final, c, features) = counted
    other, other_c, other_features = fit_first(builtin, tokens | {"test": ["zebra zebra acting"] * 150})
    words = Counter(word for text in tokens["train"] for word in set(text.split()))
    assert features == other_features == sum(count > 1 for count in words.values())
    assert (c, final["val_accuracy"]) == (other_c, other["val_accuracy"])
    assert other["test_correct"] != final["test_correct"]


def test_the_baseline_chooses_by_validation_alone(builtin, counted, monkeypatch):
    """With other test labels nothing but the test score changes; with other validation labels the choice does."""
    tokens, (final, c, _) = counted
    monkeypatch.setattr(builtin.test, "labels", 1 - builtin.test.labels)
    other, other_c, _ = fit_first(builtin, tokens)
    assert other_c == c and other["val_accuracy"] == final["val_accuracy"]
    assert other["test_accuracy"] == pytest.approx(1 - final["test_accuracy"])


@pytest.mark.parametrize(
    "texts, limit, words",
    [
        ([f"word{i} word{i}" for i in range(40)], None, "no word occurs in two"),
        ([f"good good film film {i}" for i in range(40)], "1", "all of one class"),
    ],
)
def test_a_baseline_that_cannot_be_fitted_is_one_line(texts, limit, words, tmp_path):
    pytest.importorskip("sklearn")
    path = write_csv(tmp_path / "own.csv", [(text, i % 2) for i, text in enumerate(texts)])
    argv = ["--data", str(path), "--out", str(tmp_path / "out"), *(["--limit", limit] if limit else [])]
    code, message = failure(load("lstm_imdb", "baseline").main, argv)
    assert code == 1 and one_line(message) and words in message


def test_f1_and_the_interval_by_hand():
    counts = outcome.confusion([1, 1, 1, 0, 0], [1, 1, 0, 1, 0], 2)
    assert counts.tolist() == [[1, 1], [1, 2]] and outcome.f1_score(counts) == pytest.approx(2 / 3)
    assert outcome.f1_score(np.diag([2, 3, 4])) == 1 and outcome.f1_score(np.array([[3, 0], [2, 0]])) == 0
    correct = np.array([1, 0, 1, 1, 0, 1, 1, 0, 1], dtype=bool)
    assert (outcome.unpack(outcome.pack(correct), 9) == correct).all()
    ours, theirs = np.array([1, 1, 1, 0]), np.array([1, 0, 1, 0])
    difference, half = outcome.paired_difference(ours, theirs)
    assert difference == 0.25 and half == pytest.approx(1.96 * 0.5 / 2)


def test_a_run_lists_predictions_and_the_most_confident_mistakes(tmp_path):
    record = train.main([*TINY, "--out", str(tmp_path / "run")])
    with open(tmp_path / "run" / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    right = [row["label"] == row["predicted"] for row in rows]
    assert len(rows) == 200 and np.mean(right) == record["final"]["test_accuracy"]
    assert (outcome.unpack(record["final"]["test_correct"], 200) == right).all()
    assert np.trace(record["final"]["confusion"]) == sum(right)
    text = (tmp_path / "run" / "mistakes.txt").read_text(encoding="utf-8")
    assert f"{200 - sum(right)} of 200 test reviews are wrong" in text and text.count("\nrow ") == 20


# ---------------------------------------------------------------------------------------------------- pretrained parts


def test_word_vectors(tmp_path, capsys):
    lines = [
        "400000 3",
        "good 1 2 3",
        "bad 4 5 6",
        "good 7 8 9",
        "at name@domain.com 1 2 3",
        "the x y z",
        "film nan 1 2",
        "",
        "zebra 1 1 1",
        "\xa0 1 2 3",
    ]
    path = tmp_path / "vectors.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows, counts = initialization.read_vectors(path, {"good", "bad", "the", "film"}, 3)
    assert {word: row.tolist() for word, row in rows.items()} == {"good": [1, 2, 3], "bad": [4, 5, 6]}
    assert counts == {"lines": 10, "skipped": 5}
    for bad in (tmp_path / "none.txt", tmp_path, path):
        assert one_line(failure(initialization.read_vectors, bad, {"cat"}, 3)[1])
    record = train.main([*TINY, "--embed", "3", "--vectors", str(path), "--out", str(tmp_path / "run")])
    assert record["vectors"]["covered"] == 2 and "vectors for 2 of" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- predictions and other scripts


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that has learned the generated reviews."""
    folder = tmp_path_factory.mktemp("lstm") / "run"
    argv = ["--data", "builtin", "--device", "cpu", "--hidden", "32", "--embed", "32", "--dropout", "0.0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train.schedules, "SHORTEST_RISE", 1
        )  # as in a long run: the peak comes after a tenth of the steps
        train.main([*argv, "--lr", "0.02", "--epochs", "3", "--pool", "max", "--out", str(folder)])
    return folder


@pytest.mark.draws
def test_predictions_and_what_pushed_them(finished, tmp_path, capsys):
    predict = load("lstm_imdb", "predict")
    texts = [
        "Overall, the film was superb!",
        "Overall, the film was terrible!",
        "All in all, this movie is not boring!",
    ]
    answers = predict.main([*texts, "--run", str(finished), "--colour", "always", "--figure", str(tmp_path / "w.png")])
    assert [title.split()[0] for title, *_ in answers] == ["positive", "negative", "positive"]
    assert "\033[" in capsys.readouterr().out and (tmp_path / "w.png").stat().st_size > 1000


def test_good_words_push_up_and_bad_ones_down():
    """In the committed model; the slopes of a small network that is sure of everything have no such meaning."""
    predict, saved = load("lstm_imdb", "predict"), load("lstm_imdb", "saved")
    texts = ["Overall, the film was superb!", "Overall, the film was terrible!"]
    superb, terrible = predict.explain(saved.open_model(str(saved.COMMITTED)), texts)
    assert superb.push[superb.words.index("superb")] > 0 > terrible.push[terrible.words.index("terrible")]


def test_the_push_of_a_word_is_gradient_times_input(finished):
    """To first order, a word vector that is a thousandth longer raises the score by a thousandth of the push."""
    predict, saved = load("lstm_imdb", "predict"), load("lstm_imdb", "saved")
    found = saved.open_model(str(finished))
    ((words, push, _, _),) = predict.explain(found, ["Overall, the film was not really good."])
    tokens, n = torch.tensor([found.vocabulary.encode(words)]), torch.tensor([len(words)])
    embedded = found.net.embedding(tokens).double()
    net = found.net.double()

    def score(x):
        logits = net.classify(x, n)[0]
        return (logits[1] - logits[0]).item()

    for i in range(len(words)):
        longer = embedded.clone()
        longer[0, i] *= 1.001
        assert 1000 * (score(longer) - score(embedded)) == pytest.approx(push[i], abs=2e-2 * max(map(abs, push)))
    net.float()


def test_unknown_words_are_grey_and_doubts_are_said(finished):
    predict, saved = load("lstm_imdb", "predict"), load("lstm_imdb", "saved")
    found = saved.open_model(str(finished))
    assert found.temperature == found.final["temperature"] != 1
    (answer,) = predict.explain(found, ["Superb xylophonist superb"])
    assert [value is None for value in answer.push] == [False, True, False]
    assert predict.coloured(answer.words, answer.push, True).split()[1] == "\033[90mxylophonist\033[0m"
    assert predict.coloured(answer.words, [0.1, None, -1.0], False) == "superb [?xylophonist] [-superb]"
    assert predict.shades([None]) == [None]
    tokens = found.encode("Superb xylophonist superb")
    logits = found.net(tokens, torch.tensor([3]))
    calibrated = (logits / found.temperature).softmax(1)[0].tolist()
    assert answer.probabilities == pytest.approx(calibrated, abs=1e-5)
    titles = [predict.title_of(found, answer._replace(probabilities=[p, 1 - p])) for p in (0.301, 0.299, 0.95)]
    assert titles == ["unsure: positive 69.9%", "positive 70.1%", "negative 95.0%"]
    name = found._replace(classes=["negative", "posi\033tive"])
    assert "\033" not in predict.title_of(name, answer._replace(probabilities=[0.1, 0.9]))


def test_how_far_probabilities_can_be_trusted():
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.31, 0.69], [0.1, 0.9]])
    labels = torch.tensor([0, 1, 1, 0, 1])  # right, wrong, right and unsure, wrong and unsure, right
    facts = outcome.sureness(probabilities, labels)
    assert facts["unsure"] == pytest.approx(2 / 5) and facts["false_alarms"] == pytest.approx(1 / 3)
    assert facts["unsure_right"] == pytest.approx(1 / 3) and facts["unsure_wrong"] == pytest.approx(1 / 2)
    doubtful = outcome.sureness(torch.tensor([[0.6, 0.4]]), torch.tensor([0]))
    assert doubtful["false_alarms"] is None and doubtful["unsure_wrong"] is None and doubtful["unsure_right"] == 1


def test_the_minimal_pairs():
    pairs = load("lstm_imdb", "pairs").read_pairs()
    counts = Counter((pair.kind, pair.split) for pair in pairs)
    kinds = {"plain": 20, "negation": 25, "contrast": 20, "intensity": 20, "sarcasm": 15}
    assert counts == {(kind, split): count for kind, count in kinds.items() for split in ("choose", "table")}
    texts = [text for pair in pairs for text in (pair.negative, pair.positive)]
    assert len(set(texts)) == 400
    shown = [pair.positive for pair in pairs if pair.split == "table"]
    for text in ("This film is good.", "Would watch again.", "The director knows exactly what he is doing"):
        assert text in shown


def test_pairs_are_counted(finished, tmp_path, monkeypatch, capsys):
    pairs, predict = load("lstm_imdb", "pairs"), load("lstm_imdb", "predict")
    three = [
        pairs.Pair("plain", "table", "bad", "good"),
        pairs.Pair("plain", "table", "poor", "fine"),
        pairs.Pair("sarcasm", "choose", "great, not", "great"),
    ]
    positive = {"bad": 0.1, "good": 0.9, "poor": 0.55, "fine": 0.95, "great, not": 0.8, "great": 0.6}

    def explain(found, texts):
        return [predict.Answer([], [], [1 - positive[text], positive[text]], 0) for text in texts]

    monkeypatch.setattr(pairs, "read_pairs", lambda: three)
    monkeypatch.setattr(predict, "explain", explain)
    rows = pairs.main([str(finished), "--out", str(tmp_path)])
    counts = {(row["split"], row["kind"]): row[finished.name] for row in rows}
    assert (
        counts["table", "plain"] == counts["table", "all"] == dict(pairs_right=1, texts_right=3, sure=3, sure_right=3)
    )
    assert counts["choose", "sarcasm"] == dict(pairs_right=0, texts_right=1, sure=1, sure_right=0)
    assert run.read_json(tmp_path / "pairs.json")["rows"][0]["state"] == "done"
    assert "plain" in capsys.readouterr().out
    found = load("lstm_imdb", "saved").open_model(str(finished))
    assert one_line(failure(pairs.answer, found._replace(classes=["bad", "good"]), three)[1])


def test_predictions_of_odd_texts(finished, tmp_path, capsys, monkeypatch):
    predict = load("lstm_imdb", "predict")
    argv = ["--run", str(finished), "--device", "cpu"]
    for texts in ([""], ["...", "good"]):
        assert "no words" in failure(predict.main, [*argv, *texts])[1]
    assert predict.main([*argv, "xylophonist"]) and "1 of 1 words unknown" in capsys.readouterr().out
    predict.main([*argv, "good " * 100_000])
    assert "the end of the review: 400 of 100,000 words" in capsys.readouterr().out
    (tmp_path / "bad.txt").write_bytes(b"good\xff")
    assert "line 1 is not UTF-8" in failure(predict.main, [*argv, "--file", str(tmp_path / "bad.txt")])[1]
    (tmp_path / "good.txt").write_text("A good film.")
    assert [words for _, words, _ in predict.main([*argv, str(tmp_path / "good.txt")])] == [["a", "good", "film"]]
    lines = "\ufeffGood film.\r\n\r\nBad\u2028film.\x85\rFine film.\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert [words for _, words, _ in predict.main(argv)] == [["good", "film"], ["bad", "film"], ["fine", "film"]]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "no review" in failure(predict.main, argv)[1]


def test_reviews_in_batches_are_explained_as_one_by_one(finished, monkeypatch):
    predict, saved = load("lstm_imdb", "predict"), load("lstm_imdb", "saved")
    model_of_run = saved.open_model(str(finished))
    long = "Overall, the film was not really good, but the end is moving. " * 20
    texts = ["A dull film.", "...", "Superb!", long] * 3
    alone = [predict.explain(model_of_run, [text])[0] for text in texts]
    monkeypatch.setattr(predict, "BATCH_WORDS", 600)
    sizes = [len(batch) for batch in predict.batches_of([data.tokenize(text) for text in texts])]
    assert sum(sizes) == 9 and max(sizes) > 3 and len(sizes) > 1
    for one, other in zip(alone, predict.explain(model_of_run, texts), strict=True):
        if one is None:
            assert other is None
            continue
        assert (one.words, one.total) == (other.words, other.total)
        assert other.push == pytest.approx(one.push, abs=1e-5)
        assert other.probabilities == pytest.approx(one.probabilities, abs=1e-5)


def test_a_review_without_words_does_not_end_the_call(finished, capsys):
    predict = load("lstm_imdb", "predict")
    code, message = failure(predict.main, ["--run", str(finished), "Superb!", "...", "", "Dull."])
    assert code == 1 and one_line(message) and "review 2 and 1 more: has no words" in message
    lines = [line.split()[0].strip("[+-]") for line in capsys.readouterr().out.splitlines()]
    assert lines == ["positive", "superb", "no", "no", "negative", "dull"]


@pytest.fixture(scope="module")
def small_file(finished, tmp_path_factory):
    """(path, tensors, header) of a small file of weights."""
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    load("lstm_imdb", "saved").main([str(finished), str(path)])
    with safe_open(path, "pt") as file:
        return path, {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


ODD_OPTIONS = [
    ("layers", 10_000_000),
    ("layers", 99),
    ("hidden", 1_000_000_000),
    ("hidden", 9_999),
    ("max_len", -5),
    ("max_len", None),
    ("lr", None),
    ("pool", "zz"),
    ("keep", 3),
    ("data", None),
    ("unheard_of", 1),
]


@pytest.mark.parametrize("name, value", ODD_OPTIONS)
def test_a_small_file_of_weights_with_odd_options_is_refused(name, value, small_file, tmp_path):
    saved = load("lstm_imdb", "saved")
    _, tensors, header = small_file
    options = json.loads(header["args"]) | {name: value}
    if (name, value) == ("data", None):
        del options["data"]
    save_file(tensors, tmp_path / "odd.safetensors", header | {"args": json.dumps(options)})
    code, message = failure(saved.open_model, str(tmp_path / "odd.safetensors"))
    assert code == 1 and one_line(message) and "odd.safetensors" in message


@pytest.mark.parametrize(
    "key, text",
    [
        ("args", "[" * 100_000),
        ("args", "[]"),
        ("classes", "5"),
        ("classes", "[1, 2]"),
        ("words", ""),
        ("final", "5"),
        ("final", '{"temperature": 0}'),
        ("final", '{"temperature": "x"}'),
        ("final", '{"temperature": NaN}'),
    ],
)
def test_a_small_file_of_weights_with_an_odd_header_is_refused(key, text, small_file, tmp_path):
    saved = load("lstm_imdb", "saved")
    _, tensors, header = small_file
    save_file(tensors, tmp_path / "odd.safetensors", header | {key: text})
    assert one_line(failure(saved.open_model, str(tmp_path / "odd.safetensors"))[1])


def test_weights_that_are_not_numbers_do_not_speak(finished, small_file, tmp_path):
    predict = load("lstm_imdb", "predict")
    _, tensors, header = small_file
    broken = tmp_path / "nan.safetensors"
    save_file(tensors | {"linear.bias": tensors["linear.bias"] * float("nan")}, broken, header)
    large = tmp_path / "large.safetensors"  # finite weights whose logits are not
    save_file(tensors | {"linear.weight": tensors["linear.weight"] * 0 + 3e38}, large, header)
    shutil.copytree(finished, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    state["model"]["linear.bias"].fill_(float("nan"))
    torch.save(state, tmp_path / "run" / "best.pt")
    for model_file in (broken, large, tmp_path / "run"):
        code, message = failure(predict.main, ["Superb!", "--run", str(model_file)])
        assert code == 1 and one_line(message) and "is damaged" in message and str(model_file) in message


def test_weights_in_a_small_file_predict_the_same(finished, tmp_path, capsys):
    saved = load("lstm_imdb", "saved")
    file = tmp_path / "small.safetensors"
    saved.main([str(finished), str(file)])
    whole, small = saved.open_model(str(finished)), saved.open_model(str(file))
    assert whole.vocabulary.words == small.vocabulary.words and small.classes == ["negative", "positive"]
    tokens = torch.randint(2, len(small.vocabulary), (4, 9))
    logits = [found.net(tokens, torch.full((4,), 9)) for found in (whole, small)]
    torch.testing.assert_close(*logits, rtol=0.05, atol=0.05)
    content = file.read_bytes()
    for damaged in (b"", content[:100], content[: len(content) // 2]):
        file.write_bytes(damaged)
        assert one_line(failure(saved.open_model, str(file))[1])
    assert one_line(failure(saved.open_model, str(tmp_path / "none.safetensors"))[1])


def test_without_a_run_the_newest_or_else_the_committed_model(tmp_path, monkeypatch, capsys):
    saved, predict = load("lstm_imdb", "saved"), load("lstm_imdb", "predict")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    if saved.COMMITTED.exists():
        assert saved.COMMITTED.stat().st_size < 4_000_000
        (title, *_), (other, *_) = predict.main(["A wonderful film.", "A terrible waste of time.", "--device", "cpu"])
        assert title.startswith("positive") and other.startswith("negative")
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and "short.safetensors: recipe short, trained on imdb, right on 9" in line
    train.main(TINY)
    newest = saved.open_model()
    assert newest.path.name == "builtin-tiny-s0-1" and "another run of train.py, or " in saved.describe(newest)


def test_models_are_compared_on_the_same_reviews(tmp_path):
    compare = load("lstm_imdb", "compare")
    rng = np.random.default_rng(0)
    bar = rng.random(1000) < 0.8
    better = bar | (rng.random(1000) < 0.3)
    facts = {"digest": "x", "split": "7:1:2", "test": 1000}

    def record(name, correct, dataset=facts):
        final = {"test_correct": outcome.pack(correct)}
        run.write_json(tmp_path / f"{name}.json", {"args": {"recipe": name}, "final": final, "dataset": dataset})
        return str(tmp_path / f"{name}.json")

    files = [record("TF-IDF unigrams", bar), record("best", better), record("same", bar ^ (rng.random(1000) < 0.001))]
    rows = compare.main([*files, "--out", str(tmp_path / "out")])
    assert {row["model"]: row["verdict"] for row in rows} == {"best": "passes", "same": "undecided"}
    assert rows[0]["difference"] == pytest.approx(better.mean() - bar.mean())
    rows = [run.read_json(tmp_path / f"{name}.json") | {"setting": name} for name in ("best", "same")]
    run.write_json(tmp_path / "study.json", {"rows": [row | {"args": {"recipe": "plain"}} for row in rows]})
    rows = compare.main([files[0], str(tmp_path / "study.json"), "--out", str(tmp_path / "out")])
    assert [(row["model"], row["seeds"]) for row in rows] == [("best", 1), ("same", 1)]
    code, message = failure(compare.main, [*files, files[1], "--out", str(tmp_path / "out")])
    assert code == 1 and one_line(message) and "another record of best" in message
    committed = {(row["model"], row["seeds"]) for row in compare.main(["--out", str(tmp_path / "out")])}
    assert committed == {("plain", 3), ("best", 3), ("short", 3)}, "studies are compared where they are named"


GOOD = {"args": {"recipe": "best"}, "final": {"test_correct": "ff00"}, "dataset": {"digest": "x", "test": 16}}
BAD_RECORDS = {
    "rows of another kind": {"rows": 5},
    "a row of another kind": {"rows": [5]},
    "no rows": {"rows": []},
    "all diverged": {"rows": [GOOD | {"state": "diverged", "final": None}]},
    "no final": GOOD | {"final": None},
    "final of another kind": GOOD | {"final": [1]},
    "no dataset": {"args": GOOD["args"], "final": GOOD["final"]},
    "no arguments": GOOD | {"args": 3},
    "no recipe": GOOD | {"args": {}},
    "a setting of another kind": GOOD | {"setting": [3]},
    "no test_correct": GOOD | {"final": {}},
    "a list": GOOD | {"final": {"test_correct": [1, 0]}},
    "no hexadecimal digits": GOOD | {"final": {"test_correct": "zz00"}},
    "too few bits": GOOD | {"final": {"test_correct": "ff"}},
    "no reviews": GOOD | {"dataset": {"digest": "x", "test": 0}},
    "a count of another kind": GOOD | {"dataset": {"digest": "x", "test": "16"}},
    "another dataset": GOOD | {"dataset": {"digest": "y", "test": 16}},
    "another split": GOOD | {"dataset": {"digest": "x", "test": 16, "split": "official"}},
    "another number of reviews": GOOD | {"dataset": {"digest": "x", "test": 15}},
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_record_that_cannot_be_compared_is_one_line(name, tmp_path):
    compare = load("lstm_imdb", "compare")
    run.write_json(tmp_path / "bar.json", GOOD | {"args": {"recipe": "TF-IDF unigrams"}})
    run.write_json(tmp_path / "bad.json", BAD_RECORDS[name])
    files = [str(tmp_path / "bar.json"), str(tmp_path / "bad.json")]
    code, message = failure(compare.main, [*files, "--out", str(tmp_path / "out")])
    assert code == 1 and one_line(message) and "bad.json" in message and not (tmp_path / "out").exists()


def test_a_language_model_is_pretrained_resumed_and_used(tmp_path, capsys, monkeypatch):
    pretrain = load("lstm_imdb", "pretrain")
    argv = [*TINY, "--bidirectional"]
    record = pretrain.main([*argv, "--out", str(tmp_path / "lm")])
    rows = (tmp_path / "lm" / "metrics.csv").read_text().splitlines()
    assert float(rows[-1].split(",")[2]) < float(rows[1].split(",")[2]) and record["final"]["val_loss"] < 6
    decayed = pretrain.main([*argv, "--weight-decay", "9", "--out", str(tmp_path / "decayed")])
    assert decayed["final"]["val_loss"] != record["final"]["val_loss"]
    steps = itertools.count(1)
    monkeypatch.setattr(run.Run, "should_stop", lambda self: next(steps) == 14)
    assert failure(pretrain.main, [*argv, "--out", str(tmp_path / "broken")])[0] == 130
    state = run.read_checkpoint(tmp_path / "broken" / "last.pt")
    assert (state["epoch"], state["step"]) == (1, 4)
    monkeypatch.undo()
    pretrain.main(["--resume", str(tmp_path / "broken")])
    whole, broken = (run.read_checkpoint(tmp_path / name / "best.pt")["model"] for name in ("lm", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)

    init = ["--init", str(tmp_path / "lm" / "best.pt")]
    record = train.main([*TINY, "--bidirectional", *init, "--out", str(tmp_path / "run")])
    assert record["init"] == {"lstms": 2, "epoch": 2} and "2 LSTMs start" in capsys.readouterr().out
    assert "another network" in failure(train.main, [*TINY, *init, "--hidden", "9", "--out", str(tmp_path / "a")])[1]
    small = [*TINY, *init, "--max-words", "50", "--out", str(tmp_path / "b")]
    assert "another vocabulary" in failure(train.main, small)[1]


def test_a_language_model_never_sees_what_it_predicts(monkeypatch):
    """A changed word changes no state from which it is predicted, in either direction."""
    pretrain, net = load("lstm_imdb", "pretrain"), network(bidirectional=True)
    predictions = {}
    monkeypatch.setattr(
        pretrain.LanguageModel, "loss", lambda self, direction, *pair: predictions.setdefault(direction, pair)[0].sum()
    )
    tokens, lengths = torch.randint(2, 50, (1, 8)), torch.tensor([8])
    changed = tokens.clone()
    changed[0, 4] = 2 + (tokens[0, 4] - 1) % 48
    seen = []
    for sequence in (tokens, changed):
        predictions.clear()
        pretrain.LanguageModel(net)(sequence, lengths)
        seen.append({direction: pair[0] for direction, pair in predictions.items()})
        assert torch.equal(predictions[0][1], sequence[0, 1:]) and torch.equal(predictions[1][1], sequence[0, :-1])
    same = {direction: (seen[0][direction] == seen[1][direction]).all(1).tolist() for direction in (0, 1)}
    assert same == {0: [True] * 4 + [False] * 3, 1: [False] * 4 + [True] * 3}  # rows of targets 1 to 7, and 0 to 6
    assert failure(pretrain.parse, ["--recipe", "best", "--layers", "2"])[0] == 2
    assert failure(pretrain.parse, ["--pool", "max"]) == (2, "")


@pytest.mark.draws
@pytest.mark.slow
def test_the_benchmark_and_the_analysis(finished, tmp_path, capsys):
    argv = ["--data", "builtin", "--limit", "200", "--steps", "2", "--rounds", "1", "--device", "cpu"]
    rows = load("lstm_imdb", "bench").main([*argv, "--max-len", "60", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["padding"]["fixed length"] > record["padding"]["random batches"] > record["padding"]["buckets"] >= 1
    assert len(rows) >= 6 and rows[0]["times_usual"] == 1

    analyze = load("lstm_imdb", "analyze")
    analysis = analyze.main(["--run", str(finished), "--device", "cpu", "--out", str(tmp_path)])
    assert analysis["accuracy"] > 0.95 and sum(row["reviews"] for row in analysis["length"]) == 1200
    assert {"analysis.json", "analysis.png", "mistakes.txt"} <= {file.name for file in tmp_path.iterdir()}
    message = failure(analyze.main, ["--run", str(finished), "--data", str(make_aclimdb(tmp_path / "aclImdb"))])[1]
    assert "is not the dataset of this model's training" in message


def test_the_error_by_stars(tmp_path, monkeypatch):
    """Trained and analyzed on a made folder in the shape of aclImdb, from another working directory."""
    folder = make_aclimdb(tmp_path / "aclImdb", 40)
    train.main([*TINY[:2], "--data", str(folder), "--device", "cpu", "--out", str(tmp_path / "run")])
    monkeypatch.chdir(tmp_path)
    analysis = load("lstm_imdb", "analyze").main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert {row["from"] for row in analysis["stars"]} <= {2, 3, 9, 10} and len(analysis["stars"]) > 2


def test_packed_sequences_in_the_benchmark_are_the_same_network():
    bench, net = load("lstm_imdb", "bench"), network(bidirectional=True)
    packed = bench.PackedLSTM(6, 5, True)
    for direction, lstm in enumerate(net.layers[0]):
        for name, value in lstm.named_parameters():
            getattr(packed.lstm, name + "_reverse" * direction).data.copy_(value.data)
    x, lengths = torch.randn(3, 7, 6), torch.tensor([7, 2, 5])
    ours, theirs = net.states(x, lengths), packed.states(x, lengths)
    for direction in range(2):
        for row, n in enumerate(lengths):
            torch.testing.assert_close(ours[direction][row, :n], theirs[direction][row, :n], rtol=0, atol=1e-6)


@pytest.mark.draws
def test_a_study_is_run_and_recorded(tmp_path, monkeypatch, capsys):
    sweep = load("lstm_imdb", "sweep")
    for name, settings in sweep.STUDIES.items():
        names = [sweep.folder_name(values, 0) for values in settings.values()]
        assert len(set(names)) == len(names), name
    sweep.main(["--list", "--seeds", "1", "--out", str(tmp_path / "out")])
    assert "--recipe best --no-bidirectional" in capsys.readouterr().out and not (tmp_path / "out").exists()
    monkeypatch.setitem(sweep.STUDIES, "plain", {"tiny": dict(recipe="tiny")})
    sweep.main(["--study", "plain", "--seeds", "1", "--data", "builtin", "--limit", "100", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "plain.json").read_text())
    assert len(record["rows"]) == 1 and len(record["rows"][0]["val_accuracy"]) == 2
    assert (tmp_path / "plain.png").exists()
