"""nanogpt/, text: tokenizers against the published ones, corpora against the published counts, generation, attention
maps, the stages and the walkthrough. Models and training are in test_nanogpt.py."""

import argparse
import collections
import dataclasses
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, failure, lazy, load, one_line, run, run_cells
from helpers import mutations

sample = lazy("nanogpt", "sample")
data = lazy("nanogpt", "data")
model = lazy("nanogpt", "model")
baselines = lazy("nanogpt", "networks.baselines")
openwebtext = lazy("nanogpt", "corpora.openwebtext")
attention, checkpoint, sampling, stage, stages, tokenizer = (
    lazy("nanogpt", name) for name in ("attention", "checkpoint", "sampling", "stage", "stages", "tokenizer")
)
MODERN = dict(rotary=True, norm="rms", mlp="relu2", qk_norm=True)

PROSE = """Call me Ishmael. Some years ago -- never mind how long precisely -- having little or no money in my purse,
and nothing particular to interest me on shore, I thought I'd sail about a little and see the watery part of the world.
It's a way I have of driving off the spleen; they're 12,000 miles, we'll say, and you've  two   spaces.\t\tTabs\n\n\n
"""
SIGNS = "naïve café — 你好，世界 👩‍👩‍👧 ½²Ⅷ ٣ \x1c\x85\u2028 \u00a0x don't DON'T 'tis 3.14159 <|endoftext|> \ufeff"


@pytest.fixture(scope="module")
def builtin():
    return data.load("builtin", tokens="char")


@pytest.fixture(scope="module")
def trained():
    """Byte pairs trained on the built-in text."""
    return tokenizer.BytePairs.train(data.builtin(), 400)


# ----------------------------------------------------------------------------------------------------------- tokenizers


def test_gpt2s_token_ids(data_dir):
    ours = data.gpt2_tokenizer(data_dir("gpt2_tokenizer"))
    assert ours.vocab_size == 50_257 and ours.encode("Hello world") == [15496, 995]
    assert ours.encode(" the quick brown fox") == [262, 2068, 7586, 21831]
    assert ours.decode([15496, 995]) == "Hello world" and ours.decode([50256]) == "<|endoftext|>"


@pytest.mark.slow
def test_gpt2s_tokenizer_equals_that_of_transformers(data_dir):
    """On prose, on code, and on every character of the first plane between letters, between spaces and doubled."""
    transformers = pytest.importorskip("transformers")
    ours = data.gpt2_tokenizer(data_dir("gpt2_tokenizer"))
    theirs = transformers.GPT2TokenizerFast(vocab=ours.vocabulary, merges=ours.merges)
    code = (ROOT / "nanogpt" / "data.py").read_text(encoding="utf-8")
    characters = "".join(f"a{chr(c)}b {chr(c)} {chr(c)}{chr(c)}\n" for c in (*range(0xD800), *range(0xE000, 0x11000)))
    for text in (PROSE, SIGNS, code, characters, data.builtin()[:200_000]):
        assert ours.encode(text) == theirs(text, split_special_tokens=True)["input_ids"]
        assert ours.decode(ours.encode(text)) == text


def test_byte_pairs_merge_the_most_frequent_pair():
    """Every merge, compared with a count of the pairs in the whole text."""
    text = PROSE * 3
    ours = tokenizer.BytePairs.train(text, 256 + 40)
    words = [ours.printable(word) for word in ours.WORD.findall(text)]
    assert len(ours.merges) == 40 and ours.vocab_size == 296
    for merge in ours.merges:
        counts = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        most = max(counts.values())
        assert counts[merge] == most and merge == min(pair for pair, n in counts.items() if n == most)
        merged = []
        for word in words:  # from left to right
            new = []
            while word:
                take = 2 if tuple(word[:2]) == merge else 1
                new.append("".join(word[:take]))
                word = word[take:]
            merged.append(new)
        words = merged
    assert ours.encode(text) == [ours.vocabulary[part] for word in words for part in word]


def test_trained_byte_pairs_equal_those_of_transformers(trained):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2TokenizerFast(vocab=trained.vocabulary, merges=trained.merges)
    for text in (PROSE, SIGNS.replace("<|endoftext|>", "")):
        assert trained.encode(text) == theirs(text)["input_ids"]


def test_byte_pairs_restore_every_text(trained):
    noise = np.random.default_rng(0).integers(0, 0xD800, 3000)
    for text in ("", " ", "\n", PROSE, SIGNS, "".join(map(chr, noise))):
        assert trained.decode(trained.encode(text)) == text
    assert trained.missing(SIGNS) == []
    assert trained.decode(trained.encode("é")[:1]) == "\ufffd", "an incomplete character"


def test_characters_and_words(builtin):
    chars = builtin.tokenizer
    assert chars.decode(chars.encode("print(x)\n")) == "print(x)\n"
    assert chars.missing("a\u2603b") == ["\u2603"]
    with pytest.raises(run.UserError, match="\u2603"):
        chars.encode("a\u2603b")
    words = tokenizer.Words.of("the cat. The cat's hat?\nthe cat, (a cat's) hat? once\n")
    assert words.vocabulary == ["<unk>", "\n", "?", "cat", "cat's", "hat", "the"], "words that occur twice"
    assert words.decode(words.encode("the cat, hat?\nthe dog")) == "the cat <unk> hat?\nthe <unk>"
    assert words.missing("the dog.") == [".", "dog"]
    wiki = tokenizer.Words.of(" a b <unk> \n b c \n", "spaces", min_count=1)
    assert [wiki.vocabulary[i] for i in wiki.encode("a c\nd")] == ["a", "c", "<eos>", "<unk>"]
    assert wiki.decode(wiki.encode(" a b \n")) == " a b\n"


@pytest.mark.parametrize(
    "text, words",
    [
        ("हिन्दी में।", ["हिन्दी", "में", "।"]),  # vowels are marks; the virama joins
        ("e\u0301cole", ["école"]),  # decomposed
        ("İstanbul'da", ["İstanbul'da"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),  # a joiner that is not a sign
        ("👩\u200d👩\u200d👧 ❤\ufe0f🇩🇪 👍🏽!", ["👩\u200d👩\u200d👧", "❤\ufe0f", "🇩🇪", "👍🏽", "!"]),
        ("I'd co-operate; it's 3.5", ["I'd", "co-operate", ";", "it's", "3", ".", "5"]),
    ],
)
def test_words_of_other_scripts(text, words):
    assert tokenizer.Words.words(text, "prose") == words
    ours = tokenizer.Words(["<unk>", "\n", *dict.fromkeys(words)])
    assert tokenizer.Words.words(ours.decode(ours.encode(text)), "prose") == words
    assert "\n" not in ours.missing(text) and not ours.missing(text)


def test_words_of_english_are_runs_of_letters_and_signs(data_dir):
    text = (data_dir("shakespeare") / "shakespeare" / "input.txt").read_text(encoding="utf-8")
    assert tokenizer.Words.words(text, "prose") == re.findall(r"\n|\w+(?:['’-]\w+)*|[^\w\s]", text)


class Counting(dict):
    lookups = 0

    def __getitem__(self, key):
        self.lookups += 1
        return super().__getitem__(key)

    def __contains__(self, key):
        self.lookups += 1
        return super().__contains__(key)


def test_a_long_word_takes_time_in_proportion(trained):
    """The same tokens as merging all pairs of the lowest rank again and again, without looking at all pairs again."""

    def merge_one_by_one(word):
        tokens = trained.printable(word)
        while ranked := [pair for pair in zip(tokens, tokens[1:]) if pair in trained.rank]:
            tokens = tokenizer.merge(tokens, min(ranked, key=trained.rank.get))
        return [trained.vocabulary[token] for token in tokens]

    rng = random.Random(0)
    words = ["".join(rng.choice("ins etréaa_") for _ in range(rng.randrange(1, 40))) for _ in range(300)]
    assert [trained.encode_word(word) for word in words] == [merge_one_by_one(word) for word in words]
    long = tokenizer.BytePairs(trained.vocabulary, trained.merges)
    long.rank = Counting(long.rank)
    assert long.decode(long.encode_word("instance" * 500)) == "instance" * 500
    assert long.rank.lookups < 10 * 8 * 500


@pytest.mark.parametrize("kind", ["char", "word", "spaces", "bpe"])
def test_a_tokenizer_is_restored_from_its_state(kind, trained):
    one = {
        "char": lambda: tokenizer.Characters.of(PROSE),
        "word": lambda: tokenizer.Words.of(PROSE * 2),
        "spaces": lambda: tokenizer.Words.of(PROSE, "spaces", 1),
        "bpe": lambda: trained,
    }[kind]()
    file = io.BytesIO()
    torch.save({"tokenizer": one.state()}, file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)["tokenizer"]
    other = tokenizer.tokenizer_from(json.loads(json.dumps(state)))
    assert other.vocab_size == one.vocab_size and other.encode(PROSE) == one.encode(PROSE)
    assert other.decode(other.encode(PROSE)) == one.decode(one.encode(PROSE))
    assert one_line(failure(tokenizer.tokenizer_from, {"kind": "morse"})[1])


# --------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.slow
def test_tinyshakespeare_has_nanogpts_split(data_dir):
    text = data.load("shakespeare", data_dir("shakespeare"))
    assert (len(text.train), len(text.val), text.test, text.tokenizer.vocab_size) == (1_003_854, 111_540, None, 65)
    assert text.tokenizer.decode(text.train[:15].tolist()) == "First Citizen:\n"
    assert text.facts()["selected_on"] and not text.facts()["builtin"]
    pairs = data.load("shakespeare", data_dir("gpt2_tokenizer"), tokens="gpt2")
    assert (len(pairs.train), len(pairs.val)) == (301_966, 36_059)  # what nanoGPT's prepare.py prints
    own = data.load("shakespeare", data_dir("shakespeare"), tokens="bpe")
    assert own.tokenizer.vocab_size == data.BPE_VOCABULARY and 2.3 < own.characters_per_token["train"] < 2.6
    whole = (data_dir("shakespeare") / "shakespeare" / "input.txt").read_text()
    assert own.tokenizer.decode(own.train.tolist() + own.val.tolist()) == whole


@pytest.mark.slow
def test_wikitext2_has_the_published_counts(data_dir):
    text = data.load("wikitext2", data_dir("wikitext-2"), tokens="word")
    assert (len(text.train), len(text.val), len(text.test)) == (2_088_628, 217_646, 245_569)
    assert text.tokenizer.vocab_size == 33_278 and not text.facts()["selected_on"]
    assert text.tokenizer.decode(text.val[:10].tolist()).split() == "= Homarus gammarus = Homarus gammarus ,".split()


def test_a_changed_file_is_named(tmp_path):
    (tmp_path / "shakespeare").mkdir()
    (tmp_path / "shakespeare" / "input.txt").write_text("not Shakespeare")
    for name in ("shakespeare", "auto"):
        code, message = failure(data.load, name, tmp_path)
        assert code == 1 and one_line(message) and "input.txt" in message


def test_auto_falls_back_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(data.PUBLISHED, "shakespeare", {"s/input.txt": ("sha256:0", ["http://127.0.0.1:9/input.txt"])})
    assert data.load("auto", tmp_path).facts()["builtin"]
    assert "BUILT-IN" in capsys.readouterr().err
    assert failure(data.load, "shakespeare", tmp_path)[0] == 1


@pytest.mark.parametrize("name", ["gpt2_tokenizer", "wikitext2"])
def test_what_cannot_be_fetched_says_where_it_was_looked_for(name, tmp_path, monkeypatch):
    dead = {file: (checksum, ["http://127.0.0.1:9/file"]) for file, (checksum, _) in data.PUBLISHED[name].items()}
    monkeypatch.setitem(data.PUBLISHED, name, dead)
    folder = tmp_path / "data"
    words = ("builtin", folder, None, "gpt2") if name == "gpt2_tokenizer" else (name, folder)
    code, message = failure(data.load, *words)
    assert code == 1 and one_line(message) and str(folder) in message and all(file in message for file in dead)
    assert not folder.exists()


def test_the_builtin_text(builtin):
    again = data.load("builtin", limit=100)
    assert again.digest == builtin.digest and torch.equal(again.train, builtin.train[:100]) and len(again.test) == 100
    assert len(builtin.train) > 250_000 and len(builtin.val) > 30_000
    parts = [builtin.tokenizer.decode(part.tolist()).split("\n\n") for part in (builtin.train, builtin.val)]
    twice = [p for p in set(parts[0]) & set(parts[1]) if len(p) > 100]
    assert not twice, "the validation part contains text of the training part"


def test_the_last_tenth_of_the_training_text_is_held_out(builtin):
    """To choose a recipe without the validation text."""
    found = data.load("builtin", held_out=True)
    halves = [found.tokenizer.decode(part.tolist()) for part in (found.train, found.val)]
    assert "".join(halves) == builtin.tokenizer.decode(builtin.train.tolist())
    assert len(found.val) == pytest.approx(len(builtin.train) / 10, abs=1)
    assert found.test is None and found.digest != builtin.digest


def test_a_folder_of_articles(tmp_path):
    for i in range(30):
        (tmp_path / "a" / str(i)).mkdir(parents=True)
        (tmp_path / "a" / str(i) / f"article{i}.txt").write_text(f"Article {i}.\r\n" + f"It is about {i}. " * 20)
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / f"{99 - i}.md").write_bytes((f"Article {i}.\n" + f"It is about {i}. " * 20).encode())
    (tmp_path / "a" / "picture.png").write_bytes(b"\x89PNG\0\0")
    a, b = (data.load(data.dataset_arg(str(tmp_path / name))) for name in "ab")
    assert a.digest == b.digest and torch.equal(a.train, b.train), "file names and line endings do not matter"
    assert a.name == "a" and len(a.test) > 0 and not a.facts()["selected_on"]
    total = len(a.train) + len(a.val) + len(a.test)
    assert abs(len(a.train) / total - 0.8) < 0.01 and abs(len(a.val) / total - 0.1) < 0.01
    digits = [int(w) for w in "".join(c if c.isdigit() else " " for c in a.tokenizer.decode(a.train.tolist())).split()]
    assert digits != sorted(digits), "a random order"


def test_copies_of_an_article_are_read_once(tmp_path, capsys):
    """They would follow each other, and one might be trained on and another validated on."""
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"Article {i}. It has its own words. " * 3)
    plain = data.load(str(tmp_path))
    assert not capsys.readouterr().err
    for i in range(12):
        (tmp_path / f"copy of {i}.md").write_bytes(b"\r\n" + (tmp_path / f"{i}.txt").read_bytes())
    found = data.load(str(tmp_path))
    assert found.digest == plain.digest and torch.equal(found.val, plain.val)
    assert "12 files repeat the text of another" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, word",
    [
        (b"", "short"),
        (b"x", "short"),
        (b"x" * 25, "different"),
        (bytes(range(256)), "UTF-8"),
        ("añb".encode("latin-1") * 9, "UTF-8"),
    ],
)
def test_a_file_that_is_not_a_text(content, word, tmp_path):
    (tmp_path / "file.txt").write_bytes(content)
    for path in (tmp_path / "file.txt", tmp_path):
        code, message = failure(data.load, str(path))
        assert code == 1 and one_line(message) and word in message
    assert "file.txt" in failure(data.load, str(tmp_path / "file.txt"))[1]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_byte_order_marks_do_not_matter(end, mark, tmp_path):
    """U+2028 is a character of the text, not an end of a line."""
    lines = ["one\u2028two", "", "three"] * 9
    (tmp_path / "text.txt").write_bytes((mark + end.join(lines)).encode())
    assert data.read_file(tmp_path / "text.txt") == "\n".join(lines)


def test_a_folder_without_text(tmp_path):
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    code, message = failure(data.load, str(tmp_path))
    assert code == 1 and one_line(message) and "no text files" in message
    with pytest.raises(argparse.ArgumentTypeError, match="nowhere"):
        data.dataset_arg("nowhere")


def test_a_vocabulary_too_large_for_uint16():
    words = [str(i) for i in range(2**16)]
    assert tokenizer.Words(words).vocab_size == 2**16
    code, message = failure(tokenizer.Words, [*words, "one more"])
    assert code == 1 and one_line(message) and "uint16" in message and "--tokens word" in message


# ------------------------------------------------------------------------------------------------------------- batches


def test_a_batch_is_a_function_of_seed_and_step():
    tokens = torch.arange(1000).to(torch.uint16)
    x, y = data.batch(tokens, 8, 500, seed=1, step=2)
    assert x.shape == y.shape == (500, 8) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(y, x + 1)
    assert x[:, 0].min() < 20 and x[:, 0].max() > 970 and y.max() <= 999
    assert torch.equal(x, data.batch(tokens, 8, 500, 1, 2)[0])
    assert not torch.equal(x, data.batch(tokens, 8, 500, 1, 3)[0])
    assert not torch.equal(x, data.batch(tokens, 8, 500, 2, 2)[0])
    starts = {int(data.batch(tokens[:10], 8, 1, 0, step)[0][0, 0]) for step in range(50)}
    assert starts == {0, 1}, "every position, including the last one"
    code, message = failure(data.batch, tokens[:8], 8, 2, 0, 0)
    assert code == 1 and one_line(message) and "too short" in message


@pytest.mark.parametrize("n", [2, 8, 9, 10, 65, 100])
def test_blocks_cover_a_text_once(n):
    tokens = torch.randperm(n).to(torch.uint16)
    pairs = [(x, y) for x, y in data.blocks(tokens, 8, 3)]
    assert torch.equal(torch.cat([y.flatten() for _, y in pairs]), tokens[1:].long())
    assert torch.equal(torch.cat([x.flatten() for x, _ in pairs]), tokens[:-1].long())
    assert all(x.shape == y.shape and x.shape[0] <= 3 and x.shape[1] <= 8 for x, y in pairs)


@pytest.mark.parametrize("n, limit", [(1000, 100), (1000, 7), (100, 98), (9, 1)])
def test_limited_blocks_are_spaced_evenly(n, limit):
    tokens = torch.arange(n).to(torch.uint16)
    y = torch.cat([y.flatten() for _, y in data.blocks(tokens, 8, 3, limit=limit)])
    assert torch.equal(y, torch.cat([y.flatten() for _, y in data.blocks(tokens, 8, 5, limit=limit)]))
    assert len(y) == (limit if limit < 8 else limit // 8 * 8) and len(set(y.tolist())) == len(y)
    assert all(torch.equal(y, x + 1) for x, y in data.blocks(tokens, 8, 3, limit=limit))
    if n == 1000 and limit == 100:
        gaps = y[::8].diff()
        assert y[0] == 1 and y[-1] > 900 and gaps.max() - gaps.min() <= 8


# --------------------------------------------------------------------------------------------------------- OpenWebText


class Documents:
    """Documents as `datasets` streams them, from memory. Raises an error after `n_alive` of them."""

    def __init__(self, n=230, n_alive=None):
        datasets = pytest.importorskip("datasets")
        rows = [{"text": f"Document {i}: " + "lorem ipsum é " * (i % 7)} for i in range(n)]
        self.inner, self.n_alive = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=min(3, n)), n_alive

    def __iter__(self):
        for i, row in enumerate(self.inner):
            if i == self.n_alive:
                raise ConnectionError("the connection is lost")
            yield row

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)


@pytest.fixture
def prepare(monkeypatch, data_dir, tmp_path):
    """prepare(name, documents, limit) in tmp_path / name, in chunks of ten documents, the first 25 for validation."""
    monkeypatch.setattr(openwebtext, "VAL_DOCUMENTS", 25)
    gpt2 = data.gpt2_tokenizer(data_dir("gpt2_tokenizer"))
    return lambda name, documents, limit=None: openwebtext.prepare(tmp_path / name, gpt2, limit, documents, 10)


def test_openwebtext_interrupted_and_resumed_is_the_same(prepare, tmp_path):
    have = prepare("whole", Documents())
    assert have["complete"] and have["documents"] == 230
    for n_alive in (3, 57, 83):  # each time in the middle of a chunk
        code, message = failure(prepare, "broken", Documents(n_alive=n_alive))
        assert code == 1 and one_line(message) and "the connection is lost" in message
    partial = json.loads((tmp_path / "broken" / "progress.json").read_text())
    assert partial["documents"] == 130 and not partial["complete"]
    with open(tmp_path / "broken" / "train.bin", "ab") as file:
        file.write(b"written by a killed process, not yet recorded")
    assert prepare("broken", Documents())["complete"]
    for part in ("train.bin", "val.bin"):
        assert (tmp_path / "broken" / part).read_bytes() == (tmp_path / "whole" / part).read_bytes()
    assert prepare("broken", None) == prepare("whole", None), "complete files are not streamed again"


@pytest.mark.parametrize("n, first_of_train", [(2, 1), (9, 1), (25, 2), (26, 25)])
def test_a_small_openwebtext_gives_its_first_tenth_to_validation(n, first_of_train, prepare, tmp_path, data_dir):
    have = prepare("small", Documents(n))
    gpt2 = data.gpt2_tokenizer(data_dir("gpt2_tokenizer"))
    parts = {}
    for part in ("train", "val"):
        tokens = np.fromfile(tmp_path / "small" / f"{part}.bin", dtype=np.uint16)
        assert len(tokens) == have[part], "nanoGPT's script reads the whole file"
        parts[part] = gpt2.decode(tokens.tolist()).split("<|endoftext|>")[:-1]
    assert have["complete"] and len(parts["val"]) == first_of_train and len(parts["train"]) == n - first_of_train
    assert parts["val"][0].startswith("Document 0:") and parts["train"][0].startswith(f"Document {first_of_train}:")
    assert prepare("small", None) == have


def test_one_document_of_openwebtext_cannot_be_split(prepare):
    code, message = failure(prepare, "one", Documents(1))
    assert code == 1 and one_line(message) and "two are needed" in message


def test_a_small_openwebtext_that_is_killed_before_its_end_is_on_record(prepare, tmp_path, monkeypatch):
    write_json = run.write_json

    def killed(path, content):
        if content.get("complete"):
            raise KeyboardInterrupt
        write_json(path, content)

    monkeypatch.setattr(openwebtext.run, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare("broken", Documents(20))
    monkeypatch.undo()
    monkeypatch.setattr(openwebtext, "VAL_DOCUMENTS", 25)
    assert prepare("broken", Documents(20)) == prepare("whole", Documents(20))
    for part in ("train.bin", "val.bin"):
        assert (tmp_path / "broken" / part).read_bytes() == (tmp_path / "whole" / part).read_bytes()


def test_openwebtext_is_streamed_from_parquet(prepare, tmp_path, monkeypatch):
    """With local files in place of the hub. Any error of the library is one line."""
    datasets = pytest.importorskip("datasets")
    for part, rows in enumerate((["one", "two"], ["three"])):
        datasets.Dataset.from_dict({"text": rows}).to_parquet(str(tmp_path / f"train-{part}.parquet"))
    monkeypatch.setitem(openwebtext.SOURCE, "data_files", str(tmp_path / "train-*.parquet"))
    assert [row["text"] for row in openwebtext.open_stream(tmp_path / "none")] == ["one", "two", "three"]
    assert prepare("here", None)["documents"] == 3
    monkeypatch.setattr(openwebtext, "open_stream", lambda own: {}["missing"])
    code, message = failure(prepare, "there", None)
    assert code == 1 and one_line(message) and "KeyError" in message
    assert not (tmp_path / "there").exists(), "nothing was streamed, so nothing is left"


def write_own(folder, lines):
    folder.mkdir(parents=True)
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")


def test_documents_of_ones_own_are_read_instead_of_the_hub(prepare, tmp_path, data_dir):
    lines = [json.dumps({"text": f"Document {i}: {'word ' * i}", "source": "elsewhere"}) for i in range(30)]
    write_own(tmp_path / "own", [*lines, ""])
    progress = prepare("own", None)
    assert progress["documents"] == 30 and progress["complete"]
    tokens = np.fromfile(tmp_path / "own" / "train.bin", np.uint16).tolist()
    documents = data.gpt2_tokenizer(data_dir("gpt2_tokenizer")).decode(tokens).split("<|endoftext|>")
    assert documents == [f"Document {i}: {'word ' * i}" for i in range(25, 30)] + [""]


def test_documents_of_ones_own_are_continued_after_an_interruption(prepare, tmp_path, monkeypatch):
    for name in ("whole", "broken"):
        write_own(tmp_path / name, [json.dumps({"text": f"Document {i}"}) for i in range(95)])
    assert prepare("whole", None)["documents"] == 95
    assert not prepare("broken", None, limit=60)["complete"], "after some chunks of ten documents"
    assert prepare("broken", None)["complete"]
    for part in ("train.bin", "val.bin"):
        assert (tmp_path / "broken" / part).read_bytes() == (tmp_path / "whole" / part).read_bytes()


WRONG_DOCUMENTS = {  # what a line may hold, and a word of the message
    "no JSON": "is not JSON",
    '{"text": "\\u00"}': "is not JSON",
    '{"title": "x"}': "is not of the form",
    '{"text": 5}': "is not of the form",
    '{"text": null}': "is not of the form",
    '{"text": ["a"]}': "is not of the form",
    "[1, 2]": "is not of the form",
    '"text"': "is not of the form",
    '{"text": "a\\ud800b"}': "is not Unicode",
}


@pytest.mark.parametrize("line", WRONG_DOCUMENTS)
def test_a_line_that_holds_no_document_is_named(line, prepare, tmp_path):
    write_own(tmp_path / "wrong", ['{"text": "a document"}', line])
    code, message = failure(prepare, "wrong", None)
    assert code == 1 and one_line(message) and "line 2" in message and WRONG_DOCUMENTS[line] in message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_documents_in_a_fifo_are_not_waited_for(prepare, tmp_path):
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo" / "documents.jsonl")
    code, message = failure(prepare, "fifo", None)
    assert code == 1 and one_line(message) and "not a regular file" in message


def test_documents_without_text_are_too_few_tokens(tmp_path, data_dir):
    write_own(tmp_path / "openwebtext", ['{"text": ""}'] * 3)
    gpt2 = data.gpt2_tokenizer(data_dir("gpt2_tokenizer"))
    code, message = failure(openwebtext.memory_maps, tmp_path / "openwebtext", gpt2)
    assert code == 1 and one_line(message) and "needs two" in message


def test_openwebtext_is_memory_mapped(prepare, tmp_path, data_dir, monkeypatch):
    prepare("openwebtext", Documents(40))
    ours = data.gpt2_tokenizer(data_dir("gpt2_tokenizer"))
    files = [data_dir("gpt2_tokenizer") / "gpt2_tokenizer" / name for name in ("vocab.json", "merges.txt")]
    monkeypatch.setattr(data, "prepare", lambda name, folder: files)
    text = data.load("openwebtext", tmp_path, tokens="gpt2")
    assert text.train.dtype == torch.uint16 and text.test is None
    for part, first in ((text.val, 0), (text.train, 25)):
        documents = ours.decode(part.tolist()).split("<|endoftext|>")
        assert documents[0].startswith(f"Document {first}: ") and documents[-1] == ""
        numbers = [int(document.split(":")[0].removeprefix("Document ")) for document in documents[:-1]]
        assert numbers == list(range(first, first + len(numbers)))
    written = "".join(documents[:-1]).encode()  # of the training part, without <|endoftext|>
    assert openwebtext.count_bytes(text.train, ours) == len(written)
    assert text.bytes_per_token["val"] * len(text.val) == openwebtext.count_bytes(text.val, ours)
    held_out = data.load("openwebtext", tmp_path, tokens="gpt2", held_out=True)
    assert torch.equal(torch.cat([held_out.train, held_out.val]), text.train) and held_out.digest != text.digest
    assert len(held_out.val) == pytest.approx(len(text.train) / 10, abs=1)
    assert "needs 2" in failure(data.load, "openwebtext", tmp_path, 10, "gpt2", None, True)[1]
    assert len(data.load("openwebtext", tmp_path, limit=50, tokens="gpt2").train) == 50
    assert "gpt2" in failure(data.load, "openwebtext", tmp_path, None, "char")[1]
    (tmp_path / "openwebtext" / "train.bin").write_bytes(b"\0\0")
    assert "shorter" in failure(data.load, "openwebtext", tmp_path, None, "gpt2")[1]


def test_openwebtext_fetches_no_more_than_the_limit(prepare):
    some = prepare("some", Documents(), limit=100)
    assert 100 <= some["train"] < 700 and not some["complete"]
    more = prepare("some", Documents(), limit=1000)
    assert more["train"] >= 1000 and more["documents"] > some["documents"] and not more["complete"]


def test_nanogpts_token_files_are_used(tmp_path, data_dir, monkeypatch):
    files = data.prepare("gpt2_tokenizer", data_dir("gpt2_tokenizer"))
    monkeypatch.setattr(data, "prepare", lambda name, folder: files)
    (tmp_path / "openwebtext").mkdir()
    for part, n in (("train", 500), ("val", 100)):
        (tmp_path / "openwebtext" / f"{part}.bin").write_bytes(struct.pack(f"<{n}H", *range(49_000, 49_000 + n)))
    text = data.load("openwebtext", tmp_path, tokens="gpt2")
    assert text.train.tolist() == list(range(49_000, 49_500)) and len(text.val) == 100
    assert not (tmp_path / "openwebtext" / "progress.json").exists()


# ---------------------------------------------------------------------------------------------------------- generation


def small(**changes):
    torch.manual_seed(0)
    shape = dict(vocab_size=50, block_size=16, n_layer=2, n_head=3, n_embd=48) | changes
    return model.GPT(model.GPTConfig(**shape)).eval()


@pytest.mark.parametrize("options", [{}, MODERN], ids=["gpt2", "modern"])
def test_the_cache_changes_nothing(options):
    """Token for token in float32, up to block_size and beyond, where both continue from the last half block."""
    net, prompt = small(tied=False, **options), torch.randint(50, (1, 5))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3)  # at the usual initial weights the predictions are almost uniform
    for settings in (dict(temperature=0), dict(top_k=20), dict(top_p=0.9, repetition_penalty=1.3)):
        made = []
        for cache in (True, False):
            random = torch.Generator().manual_seed(1)
            made.append(list(sampling.generate(net, prompt, 60, use_cache=cache, generator=random, **settings)))
        assert made[0] == made[1] and len(made[0]) == 60 and len(set(made[0])) > 3


def test_beyond_block_size_the_last_half_block_is_encoded_again():
    net, lengths = small(), []
    forward = net.hidden
    net.hidden = lambda idx, cache=None, maps=None: (lengths.append(idx.shape[1]), forward(idx, cache))[1]
    list(sampling.generate(net, torch.zeros(1, 14, dtype=torch.int64), 15))
    assert lengths == [14, 1, 1, 8, 1, 1, 1, 1, 1, 1, 1, 1, 8, 1, 1]


def test_a_prompt_longer_than_block_size():
    long = torch.randint(50, (1, 40))
    assert list(sampling.generate(small(), long, 3, 0)) == list(sampling.generate(small(), long[:, -16:], 3, 0))


def test_choosing():
    logits = torch.tensor([3.0, 1.0, 2.0, 0.0]).log_softmax(0)

    def draw(**settings):
        return {sampling.choose(logits, generator=torch.Generator().manual_seed(i), **settings) for i in range(200)}

    assert draw() == draw(top_k=9) == {0, 1, 2, 3} and draw(temperature=0) == {0} and draw(top_k=2) == {0, 2}
    assert draw(top_p=0.6) == {0}, "the most likely token has 0.64"
    assert draw(top_p=0.65) == {0, 2}, "the token that crosses the threshold is included"
    drawn = [sampling.choose(logits, 2.0, generator=torch.Generator().manual_seed(i)) for i in range(3000)]
    assert drawn.count(0) / 3000 == pytest.approx((logits / 2).softmax(0)[0].item(), abs=0.03)


@pytest.mark.parametrize("temperature", [1e-4, 1e-38, 1e-300])
def test_a_low_temperature_is_the_most_likely_token(temperature):
    logits = torch.tensor([2.0, 30.0, -9.0, 29.0])
    chosen = {sampling.choose(logits, temperature, generator=torch.Generator().manual_seed(i)) for i in range(9)}
    assert chosen == {1}
    assert sampling.tempered(logits[None], temperature).softmax(1)[0, 1] == 1


def test_repetition_penalty_of_positive_and_negative_logits():
    net = baselines.Bigram(baselines.BigramConfig(3, 4)).eval()
    with torch.no_grad():
        net.table.weight.copy_(torch.tensor([[2.0, 1.5, -9.0], [2.0, 1.5, -9.0], [-1.0, -1.5, -9.0]]))
    start = torch.tensor([[0]])
    assert list(sampling.generate(net, start, 2, 0, repetition_penalty=1.5)) == [1, 0]
    assert list(sampling.generate(net, torch.tensor([[0, 2]]), 1, 0, repetition_penalty=2.0)) == [1], "-1 becomes -2"


# -------------------------------------------------------------------------------------------- samples, attention maps


@pytest.fixture(scope="module")
def weights(tmp_path_factory, builtin):
    torch.manual_seed(0)
    net = model.GPT(model.GPTConfig(builtin.tokenizer.vocab_size, 32, n_layer=2, n_head=2, n_embd=16))
    folder = tmp_path_factory.mktemp("weights")
    checkpoint.save_weights(folder / "tiny.safetensors", net, builtin.tokenizer.state())
    return folder / "tiny.safetensors"


def generated(weights, tmp_path, *more):
    sample.main([str(weights), "--out", str(tmp_path), "--device", "cpu", "--length", "60", *more])
    return (tmp_path / "generated_nanogpt.txt").read_text()


def test_sample_streams_its_text(weights, tmp_path, capsys):
    text = generated(weights, tmp_path, "--prompt", "if x:")
    out = capsys.readouterr().out
    assert text.startswith("if x:") and out.startswith(text.rstrip("\n")) and len(text) == 60 + 5 + 1
    assert generated(weights, tmp_path, "--prompt", "if x:") == text
    assert generated(weights, tmp_path, "--prompt", "if x:", "--seed", "1") != text
    two = generated(weights, tmp_path, "--prompt", "if x:", "--samples", "2")
    assert two.startswith(text.rstrip("\n")) and two.count("if x:") == 2
    (tmp_path / "prompt.txt").write_text("if x:")
    assert generated(weights, tmp_path, "--prompt-file", str(tmp_path / "prompt.txt")) == text
    greedy = [generated(weights, tmp_path, "--temperature", "0", "--seed", seed) for seed in "12"]
    assert greedy[0] == greedy[1]


def test_a_character_not_in_the_vocabulary_is_named(weights, tmp_path, capsys):
    code, message = failure(sample.main, [str(weights), "--out", str(tmp_path), "--prompt", "snow \u2603 man"])
    assert code == 1 and one_line(message) and "\u2603" in message
    words = tokenizer.Words.of("the cat sat. the cat sat.")
    assert failure(sample.main, ["phi1", "--prompt", "caf\udcff"]) == (1, "error: the prompt is not UTF-8")
    assert sample.read_prompt(words, "the dog sat") == words.encode("the dog sat")
    assert "'dog'" in capsys.readouterr().err


def test_sample_without_a_model(tmp_path, refused):
    for name in ("nothing-there", str(tmp_path)):
        code, message = failure(sample.main, [name])
        assert code == 1 and one_line(message) and name in message
    (tmp_path / "best.pt").write_bytes(b"damaged")
    assert "best.pt" in failure(sample.main, ["--out_dir", str(tmp_path)])[1]
    assert failure(sample.main, ["x", "--prompt", "a", "--prompt-file", "b"])[0] == 2
    assert failure(sample.main, ["x", "--interactive", "--prompt", "a"])[0] == 2
    assert "one model" in refused(sample.main, "x", "--out_dir", "y")


@pytest.fixture
def offline(monkeypatch):
    """Without a network: hub calls that fail at once, and a record of what was asked of transformers."""
    transformers, asked = pytest.importorskip("transformers"), []

    def load_nothing(source, **options):
        asked.append(options)
        raise OSError("not in the cache")

    def no_network(*_, **__):
        raise checkpoint.requests.ConnectionError("no network")

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "from_pretrained", load_nothing)
    monkeypatch.setattr(checkpoint.requests, "head", no_network)
    return asked


def test_gpt2_without_a_network_says_what_to_do(offline, tmp_path):
    for main in (sample.main, attention.main):
        code, message = failure(main, ["gpt2", "--out", str(tmp_path / "new")])
        assert code == 1 and one_line(message) and not (tmp_path / "new").exists()
        assert all(word in message for word in ("gpt2", "network", "name a run", "cpu"))
    assert [options["local_files_only"] for options in offline] == [True, True], (
        "transformers would try for half a minute"
    )


@pytest.mark.slow
def test_gpt2_without_a_network_in_a_process_of_its_own(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    command = [sys.executable, str(ROOT / "nanogpt" / "sample.py"), "gpt2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1 and one_line(done.stderr) and "127.0.0.1:9 cannot be reached" in done.stderr


@pytest.mark.parametrize("flag, value", [("--top-p", "2"), ("--top-p", "0"), ("--top-k", "0"), ("--temperature", "-1")])
def test_limits_that_make_no_sense_are_refused(flag, value, capsys):
    assert failure(sample.main, ["cpu", flag, value])[0] == 2
    assert f"{flag}: {value} is" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX: shell redirections")
@pytest.mark.parametrize("how", ["| head -c 20", "> /dev/full", ">&-"])
def test_samples_whose_output_cannot_be_written(how, tmp_path):
    """The file is complete all the same, and the command ends quietly."""
    words = f"{sys.executable} {ROOT / 'nanogpt' / 'sample.py'} cpu --length 400 --out {tmp_path} {how}"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {words}"], capture_output=True, text=True, cwd=tmp_path)
    model_line, last_line = done.stderr.splitlines()
    assert done.returncode == 0 and model_line.startswith("model: cpu") and last_line.startswith("400 tokens")
    assert len((tmp_path / "generated_nanogpt.txt").read_text(encoding="utf-8")) > 400


def test_a_text_that_ends_at_once_says_how_to_begin(tmp_path, capsys):
    """phi1 answers an empty line with the end of the text."""
    sample.main(["phi1", "--temperature", "0", "--device", "cpu", "--out", str(tmp_path)])
    assert "--prompt TEXT" in capsys.readouterr().err
    sample.main(["phi1", "--temperature", "0", "--device", "cpu", "--out", str(tmp_path), "--prompt", "def "])
    assert "--prompt TEXT" not in capsys.readouterr().err


def test_sample_takes_the_newest_run_or_the_committed_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "out" / "nanogpt"
    sample.main(["--length", "5", "--device", "cpu"])
    first_line = capsys.readouterr().err.splitlines()[0]
    assert first_line.startswith("model: long, a gpt with 1,783,680 parameters")
    assert all(other in first_line for other in ("cpu", "phi1", "train.py"))
    assert (output / "generated_nanogpt.txt").exists()
    train = load("nanogpt")
    train.main(["--recipe", "tiny", "--data", "builtin", "--limit", "300", "--iters", "2", "--device", "cpu"])
    stage = load("nanogpt", "stage")  # a run of stage.py keeps no network
    stage.main(["--recipe", "bigram, counted", "--data", "builtin", "--limit", "2000"])
    capsys.readouterr()
    sample.main(["--length", "5", "--device", "cpu"])
    folder = output / "builtin-tiny-s0-1"
    own = str(folder.relative_to(tmp_path))
    assert capsys.readouterr().err.startswith(f"model: {own}, a gpt")
    text = (folder / "generated_nanogpt.txt").read_text()
    sample.main(["--out_dir", str(folder), "--length", "5", "--device", "cpu", "--out", "."])
    assert (tmp_path / "generated_nanogpt.txt").read_text() == text
    sample.main(["cpu", "--length", "5", "--device", "cpu"])
    assert f"there are also long, phi1, {own}" in capsys.readouterr().err


@pytest.mark.parametrize("name", [file.stem for file in sorted((ROOT / "nanogpt" / "weights").glob("*.safetensors"))])
def test_committed_models_generate(name, tmp_path):
    assert sample.COMMITTED[name].stat().st_size < 4_000_000
    prompt = ["--prompt", "def add(a, b):"] if name == "phi1" else []  # it completes functions, and nothing else
    sample.main([name, "--length", "20", "--out", str(tmp_path), "--device", "cpu", *prompt])
    assert len((tmp_path / "generated_nanogpt.txt").read_text(encoding="utf-8")) > 20


def typed(monkeypatch, weights, tmp_path, lines, *more):
    """The texts that sample.py --interactive saves after `lines` on standard input."""
    monkeypatch.setattr(sys, "stdin", lines)
    flags = ["--interactive", "--out", str(tmp_path), "--device", "cpu", "--length", "20", *more]
    sample.main([str(weights), *flags])
    return (tmp_path / "generated_nanogpt.txt").read_text().split("\n" + "-" * 40 + "\n")


def test_interactive_continues_each_line(weights, tmp_path, monkeypatch, capsys):
    texts = typed(monkeypatch, weights, tmp_path, io.StringIO("if x:\n\nsnow \u2603 man\nif x:"))
    out, err = capsys.readouterr()
    assert len(texts) == 3, "a line that the model cannot read has no text"
    assert texts[0].startswith("if x:") and texts[1].startswith("\n") and texts[2].startswith("if x:")
    assert texts[0] != texts[2].rstrip("\n"), "each text has random choices of its own"
    assert out.startswith("\n".join([texts[0], "-" * 40, texts[1], "-" * 40, texts[2].removesuffix("\n")]))
    assert "error: not among this model's" in err and "60 tokens" in err
    assert typed(monkeypatch, weights, tmp_path, io.StringIO("if x:"), "--samples", "2")[1].startswith("if x:")


def test_interactive_without_input(weights, tmp_path, monkeypatch):
    for empty in (io.StringIO(""), None):  # None: standard input is closed
        monkeypatch.setattr(sys, "stdin", empty)
        sample.main([str(weights), "--interactive", "--out", str(tmp_path)])
    assert not (tmp_path / "generated_nanogpt.txt").exists()


def test_interactive_keeps_what_was_written_before_ctrl_c(weights, tmp_path, monkeypatch):
    class Keyboard(io.StringIO):
        def readline(self, *_):
            line = super().readline()
            if not line:
                raise KeyboardInterrupt
            return line

    with pytest.raises(KeyboardInterrupt):
        typed(monkeypatch, weights, tmp_path, Keyboard("if x:\n"))
    assert (tmp_path / "generated_nanogpt.txt").read_text().startswith("if x:")


def test_interactive_refuses_what_is_not_utf8(weights, tmp_path, monkeypatch):
    lines = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    code, message = failure(typed, monkeypatch, weights, tmp_path, lines)
    assert (code, message) == (1, "error: standard input is not UTF-8")


def test_what_would_move_the_cursor_is_escaped_on_the_screen(tmp_path, capsys):
    text = "a\x1b[2Jb\n"
    net = baselines.Bigram(baselines.BigramConfig(len(set(text)), 4))
    checkpoint.save_weights(tmp_path / "w.safetensors", net, tokenizer.Characters.of(text).state())
    sample.main([str(tmp_path / "w.safetensors"), "--prompt", text, "--length", "1", "--out", str(tmp_path)])
    assert capsys.readouterr().out.startswith("a\\x1b[2Jb\n")
    assert (tmp_path / "generated_nanogpt.txt").read_text().startswith(text)


@pytest.mark.parametrize("stop", ["END", "EEND", "aab"])
def test_a_stop_string_ends_the_text_before_it(stop):
    chars = tokenizer.Characters.of("abEND\n ")
    generated = "ab ENEND aEEND aaab"
    pieces = list(sampling.stream(chars, chars.encode("b"), chars.encode(generated), stop))
    assert "".join(pieces) == generated[: generated.index(stop)]
    unstopped = list(sampling.stream(chars, chars.encode("b"), chars.encode(generated + "EN"), "ENDE"))
    assert "".join(unstopped) == generated + "EN", "a part of the stop string at the end is text"


def test_no_incomplete_characters_are_streamed(trained):
    text = "naïve 你好 👩 end"
    for n in range(1, len(trained.encode(text))):
        ids = trained.encode(text)
        pieces = list(sampling.stream(trained, ids[:1], ids[1 : 1 + n]))
        assert "\ufffd" not in "".join(pieces[:-1])
    assert "".join(sampling.stream(trained, ids[:1], ids[1:])) == text[1:]


def test_a_text_that_grows_is_decoded_once(trained):
    """One look at the vocabulary per token, of the prompt too, however long the text."""
    ours = tokenizer.BytePairs(trained.vocabulary, trained.merges)
    ours.token = Counting(ours.token)
    ids = ours.encode("naïve 你好, and so on. " * 40)
    assert "".join(sampling.stream(ours, ids[:9], ids[9:])) == ours.decode(ids)[len(ours.decode(ids[:9])) :]
    ours.token.lookups = 0
    pieces = list(sampling.stream(ours, ids[:9], ids[9:], stop="nowhere"))
    assert ours.token.lookups == len(ids) and len(pieces) > 100


def test_a_text_that_grows_is_decoded_once_by_tokenizers_of_the_hub():
    """Their `decode` is called for a token with the one before it, and with those of an incomplete character."""
    decoded = []

    class Bytes:
        def decode(self, ids, **options):
            decoded.append(len(ids))
            return bytes(ids).decode(errors="replace")

    theirs = object.__new__(checkpoint.hub.HubTokenizer)
    theirs.theirs = Bytes()
    text = "na\u00efve \u4f60\u597d, and so on. " * 40
    ids = list(text.encode())
    assert "".join(sampling.stream(theirs, ids[:1], ids[1:])) == text[1:]
    assert sum(decoded) < 10 * len(ids)


def test_a_long_text_is_generated_in_steps_of_equal_work(weights):
    """Two tokens of the network for each that is generated: itself, and its share of the half block that is encoded
    again where the block is full."""
    net, _ = checkpoint.load(weights)
    computed = []
    net.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0].shape[1]))
    half = net.block_size // 2
    for n in (10 * half, 20 * half):
        computed.clear()
        list(sampling.generate(net, torch.tensor([[1]]), n, temperature=0))
        assert len(computed) == n and sum(computed) <= 2 * n


@pytest.mark.parametrize("kind", ["char", "word", "spaces", "bpe"])
def test_pieces_make_up_the_text(kind, trained):
    one = {
        "char": lambda: tokenizer.Characters.of(PROSE),
        "word": lambda: tokenizer.Words.of(PROSE * 2),
        "spaces": lambda: tokenizer.Words.of(PROSE, "spaces", 1),
        "bpe": lambda: trained,
    }[kind]()
    ids = one.encode(PROSE)
    for first in (1, 7, len(ids)):
        text = one.decode(ids[:first]) + "".join(sampling.stream(one, ids[:first], ids[first:]))
        assert text == one.decode(ids)


@pytest.mark.draws
def test_attention_maps_are_drawn(weights, tmp_path):
    attention.main([str(weights), "--out", str(tmp_path), "--prompt", "def f(x):\n    x"])
    png = (tmp_path / "attention.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 5000
    assert "at most 32" in failure(attention.main, [str(weights), "--prompt", "a" * 33, "--out", str(tmp_path)])[1]
    for heads, (code, words) in {
        "3.1": (1, "2 layers of 2 heads"),
        "0.1": (2, ""),
        "2": (2, ""),
        "a.b": (2, ""),
    }.items():
        found, message = failure(attention.main, [str(weights), "--out", str(tmp_path), "--heads", "1.1", heads])
        assert found == code and words in message


@pytest.mark.draws
def test_a_panel_of_an_attention_map_is_that_of_its_head():
    maps = torch.rand(2, 3, 4, 4).softmax(3)
    panels = attention.draw(maps, [(2, 3), (1, 1)], list("abcd")).axes
    assert [axes.get_title() for axes in panels] == ["layer 2, head 3", "layer 1, head 1"]
    for axes, shown in zip(panels, (maps[1, 2], maps[0, 0])):
        drawn = torch.from_numpy(axes.images[0].get_array().filled(0))
        assert torch.allclose(drawn, shown.tril().sqrt()) and [t.get_text() for t in axes.get_xticklabels()] == list(
            "abcd"
        )


# ------------------------------------------------------------------------------------------------------------- fuzzing


def works_or_is_refused(call):
    """The result of `call`, or None after an error of one line."""
    try:
        return call()
    except run.UserError as error:
        assert "\n" not in str(error).strip() and len(str(error)) < 500, error
        return None


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["char", "word", "bpe"])
def test_fuzzed_texts(tokens, tmp_path):
    """Each file alone, and in a folder with a good one: what is read can be trained on."""
    whole = (PROSE * 4 + SIGNS).encode()
    rng = random.Random(tokens)
    read = 0
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "good.md").write_text(PROSE, encoding="utf-8")
    file = tmp_path / "folder" / "x.txt"
    for content in mutations(whole, rng, 150):
        file.write_bytes(content)
        for path in (file, tmp_path / "folder"):
            text = works_or_is_refused(lambda path=path: data.load(str(path), tokens=tokens))
            if text:
                read += 1
                assert all(int(part.int().max()) < text.tokenizer.vocab_size for part in (text.train, text.val))
                data.batch(text.train, 1, 4, 0, 0)
        assert file.read_bytes() == content
    assert 20 < read < 300, "some are texts and some are not"


@pytest.mark.skipif(os.name == "nt", reason="POSIX: FIFOs, symbolic links, names of bytes")
def test_a_fifo_as_a_prompt_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "prompt.txt")
    code, message = failure(sample.main, ["cpu", "--prompt-file", str(tmp_path / "prompt.txt")])
    assert code == 1 and one_line(message) and "prompt.txt: cannot be read (not a regular file)" in message


@pytest.mark.skipif(os.name == "nt", reason="POSIX: FIFOs, symbolic links, names of bytes")
def test_a_folder_with_odd_members(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(PROSE + str(i))
    before = data.load(str(tmp_path))
    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "self").symlink_to(tmp_path)
    (tmp_path / "gone.md").symlink_to("nowhere")
    assert data.load(str(tmp_path)).digest == before.digest
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "w") as file:
        file.write("a text whose name is not UTF-8")
    assert data.load(str(tmp_path)).digest != before.digest


@pytest.mark.slow
def test_fuzzed_weights(weights, tmp_path):
    file, whole = tmp_path / "w.safetensors", weights.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    read = 0
    contents = [*mutations(whole, rng, 150), *(x + whole[header:] for x in mutations(whole[:header], rng, 300))]
    for content in contents:
        file.write_bytes(content)
        words = [str(file), "--out", str(tmp_path), "--length", "3", "--device", "cpu"]
        read += works_or_is_refused(lambda words=words: (sample.main(words), 1)[1]) or 0
        assert file.read_bytes() == content
    assert 10 < read < 440, "some are weights and some are not"


def changed(value, rng):
    """`value` with one part of it replaced by something else, dropped, or doubled."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.2:
        others = [None, 5, -1, 0.5, True, "", "x", "\0", "a b", "char", "bpe", [], ["x"], {}, {"x": 1}, [[1]], [None]]
        return rng.choice(others)
    key, kind = rng.choice(list(value) if isinstance(value, dict) else range(len(value))), rng.randrange(4)
    copy = value.copy()
    if kind == 0:
        del copy[key]
    elif kind == 1 and isinstance(value, list):
        copy.insert(key, value[key])
    else:
        copy[key] = changed(value[key], rng)
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_fuzzed_tokenizer_states(kind, builtin, trained, tmp_path):
    """In a checkpoint with its model, which then generates text or is refused."""
    one = {"char": builtin.tokenizer, "word": tokenizer.Words.of(PROSE * 2), "bpe": trained}[kind]
    torch.manual_seed(0)
    net = model.GPT(model.GPTConfig(one.vocab_size, 8, n_layer=1, n_head=1, n_embd=8))
    state = {"model": net.state_dict(), "config": checkpoint.config_of(net), "tokenizer": one.state()}
    rng = random.Random(kind)
    file = tmp_path / "best.pt"
    read = 0
    for i in range(400):
        part = "config" if i % 4 == 0 else "tokenizer"
        torch.save(state | {part: changed(state[part], rng)}, file)
        words = [str(file), "--out", str(tmp_path), "--length", "20", "--temperature", "9", "--device", "cpu"]
        read += works_or_is_refused(lambda words=words: (sample.main(words), 1)[1]) or 0
    assert 5 < read < 395, "some are tokenizers and some are not"


@pytest.mark.slow
def test_fuzzed_openwebtext(prepare, tmp_path, data_dir, monkeypatch):
    """Damaged progress, and token files that are cut or hold other tokens."""
    prepare("good", Documents(40))
    files = data.prepare("gpt2_tokenizer", data_dir("gpt2_tokenizer"))
    monkeypatch.setattr(data, "prepare", lambda name, folder: files)
    monkeypatch.setattr(openwebtext, "open_stream", lambda own: Documents(40))
    rng, read = random.Random(0), 0
    progress = json.loads((tmp_path / "good" / "progress.json").read_text())
    texts = [json.dumps(changed(progress, rng)).encode() for _ in range(30)]
    texts += mutations(json.dumps(progress).encode(), rng, 30)
    cases = [("progress.json", text) for text in texts]
    cases += [("val.bin", x) for x in mutations((tmp_path / "good" / "val.bin").read_bytes(), rng, 30)]
    for name, content in cases:
        shutil.rmtree(tmp_path / "openwebtext", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "openwebtext")
        (tmp_path / "openwebtext" / name).write_bytes(content)
        text = works_or_is_refused(lambda: data.load("openwebtext", tmp_path, tokens="gpt2"))
        if text:
            read += 1
            assert all(int(part.int().max()) < text.tokenizer.vocab_size for part in (text.train, text.val))
    assert 10 < read < len(cases), "some are token files and some are not"


# ----------------------------------------------------------------------------------------- stages and the walkthrough


@pytest.fixture(scope="module")
def nets(builtin):
    torch.manual_seed(0)
    return {name: stage.build(name, builtin.tokenizer.vocab_size) for name in stage.RECIPES}


def test_stages_are_causal_and_some_mistakes_are_not(nets):
    leaky = {"no mask", "mask after the softmax", "softmax over the wrong dimension"}
    for name, net in nets.items():
        assert (stage.leak(net) > 1e-4) == (name in leaky), name


def test_one_token_of_context_cannot_leak():
    options = dataclasses.replace(stage.RECIPES["bigram"], block_size=1)
    assert stage.leak(stage.build(options, vocab_size=5)) == 0


def test_stages_start_at_the_loss_of_a_uniform_prediction(nets, builtin):
    uniform = math.log(builtin.tokenizer.vocab_size)
    for name, net in nets.items():
        loss = stage.evaluate(net, builtin.val[:1000])
        assert (abs(loss - uniform) < 0.6) == (name != "head tied to embeddings with std 1"), (name, loss)


def test_attention_of_the_stages_equals_fused_attention():
    torch.manual_seed(0)
    layer, x = stage.Attention(64, n_head=4), torch.randn(2, 9, 64)
    q, k, v = (f(x).unflatten(2, (4, -1)).transpose(1, 2) for f in (layer.query, layer.key, layer.value))
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    assert torch.allclose(layer(x), layer.out(fused), atol=1e-6)
    mean = stage.Average()(x)
    assert torch.allclose(mean[:, 4], x[:, :5].mean(1), atol=1e-6)


def test_a_stage_takes_adamws_steps_with_each_batchs_gradient(builtin):
    nets = [stage.build("one head", builtin.tokenizer.vocab_size) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    stage.fit(nets[0], builtin, iters=3, seed=5, lr=0.01, bs=4)
    optimizer = torch.optim.AdamW(nets[1].parameters(), betas=(0.9, 0.99))
    for step, lr in enumerate([0.01 * 1 / 50 * 3 / 3, 0.01 * 2 / 50 * 2 / 3, 0.01 * 3 / 50 * 1 / 3]):
        x, y = data.batch(builtin.train, nets[1].block_size, 4, 5, step)
        loss = F.cross_entropy(nets[1](x).flatten(0, 1), y.flatten())
        for p, gradient in zip(nets[1].parameters(), torch.autograd.grad(loss, nets[1].parameters())):
            p.grad = gradient
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    for p, by_hand in zip(nets[0].parameters(), nets[1].parameters()):
        assert torch.allclose(p, by_hand, rtol=1e-5, atol=1e-7)


def test_a_stage_is_trained_and_measured(tmp_path):
    flags = ["--data", "builtin", "--iters", "20", "--limit", "2000"]
    record = stage.main(["--recipe", "one head", *flags, "--out", str(tmp_path / "a")])
    final = record["final"]
    assert final["val_loss"] < record["initial_loss"] - 0.3 and final["leak"] < 1e-5 and len(record["sample"]) > 50
    assert final["val_bits_per_character"] == pytest.approx(final["val_loss"] / math.log(2))
    counted = stage.main(["--recipe", "bigram, counted", *flags, "--out", str(tmp_path / "b")])["final"]
    text = data.load("builtin", limit=2000)
    table = stage.count_pairs(text.train, text.tokenizer.vocab_size)
    expected = F.cross_entropy(table[text.val[:-1].long()], text.val[1:].long()).item()
    assert counted["val_loss"] == pytest.approx(expected)
    code, message = failure(stage.main, ["--recipe", "one head", *flags, "--lr", "1e30", "--out", str(tmp_path / "c")])
    assert code == 1 and "diverged" in message
    idle = stage.main(["--recipe", "one head", *flags, "--lr", "1e-12", "--out", str(tmp_path / "d")])
    assert "nothing was learned" in idle["warning"] and "warning" not in record


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--mistake no-mercy", "--mistake"),
        ("--n-head 3", "--n-head 3: does not divide"),
        ("--width 0", "--width"),
        ("--width 100000000", "--width"),
        ("--device cuda", "--device"),
        ("--count", "--count: network has no such option"),
        ("--set model.n_head=3", "--n-head 3"),
    ],
)
def test_a_stage_that_makes_no_sense_is_refused(argv, words, refused):
    assert words in refused(stage.parse, "--recipe", "one head", *argv.split())


def test_the_commands_of_the_stages(capsys, tmp_path):
    stages.main(["--list", "--seeds", "2", "--iters", "7", "--data", "builtin", "--out", str(tmp_path)])
    args = [stage.parse(shlex.split(line)[2:]) for line in capsys.readouterr().out.splitlines()]
    assert [one.recipe for one in args] == 2 * [*stages.STUDIES["stages"], *stages.STUDIES["mistakes"]]
    assert {(one.iters, one.data) for one in args} == {(7, "builtin")} and len({one.out for one in args}) == len(args)


@pytest.mark.slow
@pytest.mark.draws
def test_the_stages_run(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "STUDIES", {"stages": ["bigram, counted", "with residuals"], "mistakes": ["no mask"]})
    again = ["--data", "builtin", "--iters", "10", "--limit", "700", "--seeds", "1", "--out", str(tmp_path)]
    stages.main(again)
    for name in stages.STUDIES:
        rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        assert [row["setting"] for row in rows] == stages.STUDIES[name]
        assert all(row["dataset"]["builtin"] and row["final"]["test_loss"] > 0 for row in rows)
        assert rows[-1]["curve"][-1] == [10, pytest.approx(rows[-1]["final"]["val_loss"], abs=1e-4)]
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert rows[-1]["sample"] in (tmp_path / f"{name}-samples.txt").read_text(encoding="utf-8")
    before = (tmp_path / "stages.json").read_text()
    stages.main(again)
    assert (tmp_path / "stages.json").read_text() == before, "a stage was trained again"
    code, message = failure(stages.main, [*again, "--iters", "2"])
    assert code == 1 and one_line(message) and "another --out" in message


@pytest.mark.draws
def test_figures_of_studies_are_drawn_from_their_records():
    for name in stages.STUDIES:
        record = json.loads((ROOT / "nanogpt" / "results" / f"{name}.json").read_text())
        right = stages.draw(record).axes[1]
        names = [label.get_text() for label in right.get_yticklabels()]
        assert names == stages.STUDIES[name], "by today's names"
        losses = [row["final"]["val_loss"] for row in record["rows"] if row["setting"] == names[0]]
        assert right.patches[0].get_width() == pytest.approx(sum(losses) / len(losses))
    sweep = load("nanogpt", "sweep")
    for name in ("clock", "words", "options"):
        rows = json.loads((ROOT / "nanogpt" / "results" / f"{name}.json").read_text())["rows"]
        lines = sweep.draw({"study": name, "rows": rows}).axes[0].lines
        if name == "options":
            assert [len(line.get_xdata()) for line in lines] == [3] * len(sweep.STUDIES["options"])
        else:
            by_setting = sorted(rows, key=lambda row: list(sweep.STUDIES[name]).index(row["setting"]))
            assert [list(line.get_ydata()) for line in lines] == [
                [loss for _, _, loss in row["curve"]] for row in by_setting
            ]


@pytest.mark.slow
@pytest.mark.draws
def test_the_walkthrough_runs(monkeypatch):
    """Its code cells in order, in a new namespace."""
    notebook = json.loads((ROOT / "nanogpt" / "walkthrough.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 8 and not any(cell.get("outputs") for cell in notebook["cells"])
    monkeypatch.chdir(ROOT / "nanogpt")
    space = run_cells(cells)
    losses = list(space["losses"].values())
    assert len(losses) == 5 and losses == sorted(losses, reverse=True), "each step is better than the one before"
    assert min(space["without"].values()) > space["counted"], "what is shown not to help"
    assert (space["images"] / "attention.png").stat().st_size > 5000
    assert space["shakespeare_text"].startswith("ROMEO:\n") and len(space["shakespeare_text"]) == 407
