"""nanogpt/, the engine: the models against transformers' GPT-2 and their own specification, the optimizer against
torch's, the training against what it must do. The text half is in test_nanogpt_text.py, what all folders owe in
test_contract.py."""

import json
import math
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, failure, load

train = load("nanogpt")
data, run, optim, model = train.data, train.run, load("nanogpt", "optim"), load("nanogpt", "model")
MODERN = dict(rotary=True, norm="rms", mlp="relu2", qk_norm=True)


def small(**changes):
    torch.manual_seed(0)
    return model.GPT(**dict(vocab_size=50, block_size=16, n_layer=2, n_head=3, n_embd=48) | changes).eval()


def enlarged(net, times=5.0):
    """At the usual tiny initialization attention is all but even and GELU all but linear: any mistake would pass."""
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(times) if p.dim() > 1 else p.add_(0.3 * torch.randn_like(p))
    return net


# -------------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def gpt2():
    """A random small GPT-2 of `transformers` in float64, weights five times as large as usual."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=24, n_embd=48, n_layer=3, n_head=4, attn_implementation="eager"
    )
    return enlarged(transformers.GPT2LMHeadModel(config).double().eval())


def difference(theirs):
    idx = torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return (model.GPT.from_hugging_face(theirs).eval()(idx) - theirs(idx).logits).abs().max().item()


def test_logits_equal_those_of_transformers(gpt2):
    assert difference(gpt2) < 1e-9


@pytest.mark.parametrize("mistake", ["exact GELU", "eps", "scale", "no shift", "untransposed"])
def test_the_comparison_sees_the_classic_mistakes(mistake, gpt2, monkeypatch):
    attend = model.attend
    if mistake == "exact GELU":
        monkeypatch.setattr(model.F, "gelu", lambda h, approximate, gelu=F.gelu: gelu(h))
    elif mistake == "eps":
        monkeypatch.setattr(
            model.Norm, "forward", lambda self, x: F.layer_norm(x, x.shape[2:], self.weight, self.bias, 1e-6)
        )
    elif mistake == "scale":
        monkeypatch.setattr(model, "attend", lambda q, k, v, dropout: attend(q * math.sqrt(q.shape[3]), k, v, dropout))
    elif mistake == "no shift":
        monkeypatch.setattr(
            model.GPT,
            "hidden",
            lambda self, idx, cache=None, maps=None, hidden=model.GPT.hidden: hidden(self, idx.roll(1, 1)),
        )
    else:
        monkeypatch.setattr(
            model.Attention,
            "forward",
            lambda self, x, *args, forward=model.Attention.forward: forward(self, x, *args) @ self.out.weight,
        )
    assert difference(gpt2) > 1e-7


def test_another_gpt2_than_the_usual_is_refused(gpt2):
    for name, value in (("activation_function", "gelu"), ("layer_norm_epsilon", 1e-6), ("n_inner", 7)):
        before = getattr(gpt2.config, name)
        setattr(gpt2.config, name, value)
        code, message = failure(model.GPT.from_hugging_face, gpt2)
        setattr(gpt2.config, name, before)
        assert code == 1 and name in message
    code, message = failure(model.GPT.from_hugging_face, "/nowhere/at/all")
    assert code == 1 and "/nowhere/at/all" in message and "\n" not in message


@pytest.mark.parametrize("options", [{}, MODERN, dict(mlp="swiglu", tied=False, bias=True)])
def test_attention_written_out_equals_the_fused(options, monkeypatch):
    net, idx = enlarged(small(**options)).double(), torch.randint(50, (2, 16))
    written = net(idx)
    monkeypatch.setattr(model, "WRITTEN_OUT", 0)
    assert torch.allclose(net(idx), written, atol=1e-10)
    maps = net.attention_maps(idx)
    assert maps.shape == (2, 2, 3, 16, 16) and torch.allclose(maps.sum(4), torch.ones(2, 2, 3, 16, dtype=torch.float64))
    assert maps.triu(1).abs().max() == 0


def models():
    yield "gpt", small()
    yield "modern", small(**MODERN)
    yield "bigram", model.Bigram(50, 16)
    yield "factored bigram", model.Bigram(50, 16, n_embd=8)
    yield "wordmlp", model.WordMLP(50, 16, context=3, n_embd=8, hidden=12)
    yield "wordmlp direct", model.WordMLP(50, 16, context=3, n_embd=8, hidden=12, direct=True)


@pytest.mark.parametrize("net", [pytest.param(net, id=name) for name, net in models()])
def test_every_model(net, tmp_path):
    idx = torch.randint(50, (4, 16))
    assert net(idx).shape == (4, 16, 50) and net(idx[:, :5]).shape == (4, 5, 50)
    model.check_causal(net.eval(), idx)
    loss = F.cross_entropy(net(idx).flatten(0, 1), idx.roll(-1, 1).flatten()).item()
    assert loss == pytest.approx(math.log(50), abs=0.2)
    again = model.build(json.loads(json.dumps(net.config)))
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.eval()(idx), net(idx))
    code, message = failure(net, torch.zeros(1, 17, dtype=torch.int64))
    assert code == 1 and "17" in message and "16" in message
    model.save_weights(tmp_path / "w.safetensors", net, {"kind": "char", "vocabulary": ["a"]})
    read, tokenizer = model.load_checkpoint(tmp_path / "w.safetensors")
    assert tokenizer["vocabulary"] == ["a"] and torch.allclose(read(idx), net(idx), atol=0.02)
    assert (tmp_path / "w.safetensors").stat().st_size < 2 * model.count_parameters(net) + 4000


def test_a_look_into_the_future_is_found(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "triu", lambda self, diagonal=0: torch.zeros_like(self))
    code, message = failure(model.check_causal, small(), torch.randint(50, (2, 16)))
    assert code == 1 and "future" in message


def test_wordmlp_sees_as_many_words_as_it_says():
    net, idx = model.WordMLP(50, 16, context=3, n_embd=8, hidden=12), torch.randint(50, (1, 16))
    for back in range(16):
        other = idx.clone()
        other[0, 15 - back] = (other[0, 15 - back] + 1) % 50
        assert torch.equal(net(idx)[0, 15], net(other)[0, 15]) == (back >= 3)


def test_rotary_positions_know_the_distance_alone():
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    cos, sin = (part.double() for part in model.rotary_angles(0, 64, 8, "cpu"))
    rows = [model.rotate(x.expand(64, 8), cos, sin) for x in (q, k)]
    scores = rows[0] @ rows[1].T
    assert torch.allclose(scores[10, 7], scores[53, 50], atol=1e-5) and not torch.isclose(scores[10, 7], scores[10, 6])
    assert torch.allclose(rows[0].norm(dim=1), q.norm().expand(64))
    late = model.rotary_angles(5, 3, 8, "cpu")
    assert torch.equal(late[0], model.rotary_angles(0, 8, 8, "cpu")[0][5:])


def test_squared_relu_is_its_formula():
    h = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.equal(model.SquaredReLU.apply(h), F.relu(h).square())
    assert torch.autograd.gradcheck(model.SquaredReLU.apply, h)


def test_what_describes_no_model_is_refused():
    for config in ({}, {"kind": "gpt3"}, {"kind": "gpt", "vocab_size": 5, "colour": 1}):
        assert failure(model.build, config)[0] == 1
    assert "heads" in failure(lambda: small(n_head=5))[1]


# ---------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("options", [{}, MODERN], ids=["gpt2", "modern"])
def test_the_cache_changes_nothing(options):
    """Token for token in float32, to block_size and past it, where both encode the last half block anew."""
    net, prompt = enlarged(small(tied=False, **options), 3.0), torch.randint(50, (1, 5))
    for settings in (dict(temperature=0), dict(top_k=20), dict(top_p=0.9, repetition_penalty=1.3)):
        made = []
        for cache in (True, False):
            random = torch.Generator().manual_seed(1)
            made.append(list(model.generate(net, prompt, 60, use_cache=cache, generator=random, **settings)))
        assert made[0] == made[1] and len(made[0]) == 60 and len(set(made[0])) > 3


def test_past_the_block_the_last_half_is_encoded_anew():
    net, lengths = small(), []
    forward = net.hidden
    net.hidden = lambda idx, cache=None, maps=None: (lengths.append(idx.shape[1]), forward(idx, cache))[1]
    list(model.generate(net, torch.zeros(1, 14, dtype=torch.int64), 15))
    assert lengths == [14, 1, 1, 8, 1, 1, 1, 1, 1, 1, 1, 1, 8, 1, 1]


def test_a_prompt_longer_than_the_block():
    long = torch.randint(50, (1, 40))
    assert list(model.generate(small(), long, 3, 0)) == list(model.generate(small(), long[:, -16:], 3, 0))


def test_choosing():
    logits = torch.tensor([3.0, 1.0, 2.0, 0.0]).log_softmax(0)

    def draw(**settings):
        return {model.choose(logits, generator=torch.Generator().manual_seed(i), **settings) for i in range(200)}

    assert draw() == draw(top_k=9) == {0, 1, 2, 3} and draw(temperature=0) == {0} and draw(top_k=2) == {0, 2}
    assert draw(top_p=0.6) == {0}, "the likeliest alone has 0.64"
    assert draw(top_p=0.65) == {0, 2}, "the one that crosses the line belongs"
    drawn = [model.choose(logits, 2.0, generator=torch.Generator().manual_seed(i)) for i in range(3000)]
    assert drawn.count(0) / 3000 == pytest.approx((logits / 2).softmax(0)[0].item(), abs=0.03)


def test_repetition_is_punished_whatever_the_sign():
    net = model.Bigram(3, 4).eval()
    with torch.no_grad():
        net.table.weight.copy_(torch.tensor([[2.0, 1.5, -9.0], [2.0, 1.5, -9.0], [-1.0, -1.5, -9.0]]))
    start = torch.tensor([[0]])
    assert list(model.generate(net, start, 2, 0, repetition_penalty=1.5)) == [1, 0]
    assert list(model.generate(net, torch.tensor([[0, 2]]), 1, 0, repetition_penalty=2.0)) == [1], "-1 becomes -2"


# ----------------------------------------------------------------------------------------------------------- optimizers


def test_batched_muon_is_torchs(monkeypatch):
    """In float32 and on the same gradients, over some steps: the one matrix at a time and all of a shape at once."""
    torch.manual_seed(0)
    shapes = [(24, 24), (72, 24), (96, 24), (24, 96), (24, 24), (96, 24)]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in made] for made in [[torch.randn(s) for s in shapes]] * 2)
    a = optim.Muon(ours, lr=0.02, momentum=0.9, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="original")
    for _ in range(6):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    worst = max(((p - q).norm() / q.norm()).item() for p, q in zip(ours, theirs))
    assert worst < 2e-3, "bfloat16 rounds a product at a time otherwise than a batch"


def test_orthogonalized_is_nearly_orthogonal():
    g = torch.randn(3, 32, 64)
    for x in (g, g.mT):
        values = torch.linalg.svdvals(optim.orthogonalize(x).float())
        assert 0.5 < values.min() and values.max() < 1.4
    u, _, v = torch.linalg.svd(g[0], full_matrices=False)
    assert F.cosine_similarity((u @ v).flatten(), optim.orthogonalize(g)[0].float().flatten(), 0) > 0.95


def test_who_is_decayed_and_who_goes_to_muon():
    net, cpu = small(bias=True), torch.device("cpu")
    args = types.SimpleNamespace(muon=4.0, lr=1e-3, beta2=0.99, weight_decay=0.1, ns_steps=5)
    adamw, muon = optim.make_optimizers(net, args, cpu)
    matrices, vectors = adamw.param_groups
    assert {id(p) for p in matrices["params"]} == {id(net.tokens.weight), id(net.positions.weight)}
    assert all(p.dim() == 1 for p in vectors["params"]) and vectors["weight_decay"] == 0
    assert len(muon.param_groups[0]["params"]) == 8 and muon.param_groups[0]["peak"] == pytest.approx(4e-3)
    args.muon = 0.0
    assert len(optim.make_optimizers(net, args, cpu)) == 1


def test_schedules():
    args = types.SimpleNamespace(warmup=10, iters=110, decay="cosine", cooldown=1.0, final_lr=0.1)
    at = [train.lr_factor(args, step) for step in (0, 9, 10, 60, 110)]
    assert at == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1])
    args = types.SimpleNamespace(warmup=10, iters=100, decay="linear", cooldown=0.5, final_lr=0.0)
    assert [train.lr_factor(args, step) for step in (0, 20, 50, 75, 99)] == pytest.approx([0.1, 1, 1, 0.5, 0.02])


# ------------------------------------------------------------------------------------------------------------- training


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A recipe that takes a second."""
    net = train.GPT | dict(block_size=16, n_layer=2, n_head=2, n_embd=32)
    quick = dict(iters=60, warmup=5, evals=3, lr=1e-2, model=net)
    monkeypatch.setitem(train.RECIPES, "cpu", train.RECIPES["cpu"] | quick)


def fit(tmp_path, name, *argv):
    return train.main(
        [
            "--data",
            "builtin",
            "--device",
            "cpu",
            "--precision",
            "fp32",
            "--limit",
            "3000",
            "--out",
            str(tmp_path / name),
            *argv,
        ]
    )


def test_it_learns_and_leaves_what_it_should(tmp_path):
    record = fit(tmp_path, "a")
    final = record["final"]
    assert final["val_loss"] < 3.6 < record["first_loss"], "even odds on the letters: ln 90 or so"
    assert {"best.pt", "last.pt", "layers.png", "curves.png"} <= {f.name for f in (tmp_path / "a").iterdir()}
    assert final["val_perplexity"] == pytest.approx(math.exp(final["val_loss"])) and "test_loss" in final
    net, tokenizer = model.load_checkpoint(tmp_path / "a" / "best.pt")
    text = data.load("builtin", limit=3000)
    with torch.no_grad():
        parts = [
            (F.cross_entropy(net(x).flatten(0, 1), y.flatten(), reduction="sum").item(), y.numel())
            for x, y in data.blocks(text.val, 16, 7)
        ]
    assert sum(n for _, n in parts) == len(text.val) - 1
    assert sum(loss for loss, _ in parts) / (len(text.val) - 1) == pytest.approx(final["val_loss"], rel=1e-5)
    assert data.tokenizer_from(tokenizer).decode([5]) == text.tokenizer.decode([5])
    log = (tmp_path / "a" / "train.log").read_text()
    assert "no logit depends on a later token" in log and log.count("\n    ") >= 3, "a sample at every evaluation"


def test_one_batch_is_learned_by_heart(tmp_path):
    record = fit(tmp_path, "a", "--overfit", "--iters", "300", "--bs", "4")
    rows = [line.split(",") for line in (tmp_path / "a" / "metrics.csv").read_text().splitlines()]
    assert float(rows[-1][1]) < 0.3 < 3 < record["first_loss"] and record["final"]["best_iter"] <= 200


def test_layers_are_told_apart(tmp_path):
    fit(tmp_path, "a", "--lr", "1e-5")
    header, *rows = [line.split(",") for line in (tmp_path / "a" / "metrics.csv").read_text().splitlines()]
    assert header[:3] == ["iter", "train_loss", "val_loss"]
    values = dict(zip(header, map(float, rows[0])))
    for layer in ("tokens", "positions", "block0", "block1", "norm"):
        assert values[f"grad_{layer}"] > 0 and 0 < values[f"update_{layer}"] < 0.01


@pytest.mark.parametrize("recipe", ["fast", "word-bigram", "word-mlp", "word-gpt"])
def test_the_other_recipes_learn(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(train.RECIPES, recipe, train.RECIPES[recipe] | dict(evals=2))
    record = fit(tmp_path, "a", "--recipe", recipe, "--iters", "20", "--bs", "8", "--lr", "1e-2")
    rows = (tmp_path / "a" / "metrics.csv").read_text().splitlines()
    assert record["state"] == "done" and float(rows[-1].split(",")[1]) < record["first_loss"] - 0.02


def test_word_recipes_are_of_equal_size():
    """At the vocabulary of Shakespeare."""
    sizes = [
        model.count_parameters(model.build(train.RECIPES[name]["model"] | {"vocab_size": 7_060}))
        for name in ("word-bigram", "word-mlp", "word-gpt")
    ]
    assert max(sizes) < 1.05 * min(sizes), sizes


def test_the_recipes_are_the_sizes_they_say():
    built = {name: model.build(train.RECIPES[name]["model"] | {"vocab_size": 65}) for name in ("fast", "gpu")}
    assert model.count_parameters(built["fast"]) < 0.81e6
    assert model.count_parameters(built["gpu"]) == pytest.approx(10.7e6, rel=0.01)
    with torch.device("meta"):
        gpt2 = model.build(train.RECIPES["gpt2"]["model"] | {"vocab_size": 50257})
    assert model.count_parameters(gpt2) == pytest.approx(124e6, rel=0.01)


def test_wrong_initial_weights_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "build", lambda config: enlarged(model.build(config), 20.0))
    code, message = failure(fit, tmp_path, "a")
    assert code == 1 and "first loss" in message and "ln" in message and "\n" not in message


def test_a_text_shorter_than_the_block(tmp_path):
    code, message = failure(fit, tmp_path, "a", "--limit", "16")
    assert code == 1 and "too short" in message and "\n" not in message


def test_a_validation_text_shorter_than_the_block(tmp_path):
    (tmp_path / "poem.txt").write_text("the sea, the sea, the open sea, the blue, the fresh, the ever free. " * 2)
    record = fit(tmp_path, "a", "--data", str(tmp_path / "poem.txt"), "--iters", "4")
    assert record["state"] == "done" and record["final"]["sampled_loss"] is None and record["final"]["val_loss"] > 0


def test_divergence_is_a_result(tmp_path):
    code, message = failure(fit, tmp_path, "a", "--lr", "1e30")
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert code == 1 and "diverged" in message and record["state"] == "diverged"


def test_accumulated_passes_are_one_batch(tmp_path, monkeypatch):
    weights = []
    for name, bs, accumulate in (("whole", 6, 1), ("parts", 2, 3)):
        monkeypatch.setitem(train.RECIPES["cpu"], "accumulate", accumulate)
        torch.set_default_dtype(torch.float64)
        try:
            fit(tmp_path, name, "--bs", str(bs), "--iters", "8")
        finally:
            torch.set_default_dtype(torch.float32)
        weights.append(torch.load(tmp_path / name / "last.pt", weights_only=True)["model"])
    assert all(torch.allclose(weights[0][k], weights[1][k], rtol=1e-9, atol=1e-12) for k in weights[0])


WRAPPER = """
import sys
sys.path.insert(0, {folder!r})
import torch
import train
torch.set_default_dtype(torch.float64)
train.RECIPES["cpu"] = {recipe!r}
train.main(sys.argv[1:])
"""


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    """torchrun with gloo, float64: the same losses and weights to a relative 1e-12."""
    script = tmp_path / "wrapper.py"
    script.write_text(WRAPPER.format(folder=str(ROOT / "nanogpt"), recipe=train.RECIPES["cpu"]))
    common = ["--data", "builtin", "--device", "cpu", "--precision", "fp32", "--limit", "3000", "--iters", "30"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for words, bs in ((two, 4), ([sys.executable], 8)):
        done = subprocess.run(
            [*words, str(script), *common, "--bs", str(bs), "--out", str(tmp_path / str(bs))],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    two, one = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("4", "8"))
    for key, value in one["model"].items():
        assert (two["model"][key] - value).norm() < 1e-12 * value.norm(), key
    losses = [
        [
            float(v)
            for line in (tmp_path / name / "metrics.csv").read_text().splitlines()[1:]
            for v in line.split(",")[1:3]
        ]
        for name in ("4", "8")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12) and len(losses[0]) == 6
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("4", "8")]
    assert [record["processes"] for record in records] == [2, 1]
    assert records[0]["tokens_per_step"] == records[1]["tokens_per_step"] == 128


def test_the_bench_measures_and_trains_all_ways(tmp_path, monkeypatch):
    bench = load("nanogpt", "bench")
    for name in ("cpu", "fast"):
        quick = train.RECIPES["cpu"] | dict(iters=20, evals=2)
        monkeypatch.setitem(bench.train.RECIPES, name, quick)
    text = data.load("builtin", limit=3000)
    monkeypatch.setattr(bench.data, "load", lambda *args: text)
    rows = bench.main(["--data", "builtin", "--device", "cpu", "--steps", "2", "--whole", "--out", str(tmp_path)])
    speeds, whole = ([row for row in rows if (row["what"] == "whole run") == w] for w in (False, True))
    assert [row["way"] for row in whole] == ["reference", "cpu", "fast"]
    assert {"reference", "cpu", "fast", "with cache", "without cache"} == {row["way"] for row in speeds}
    assert all(row["tokens_per_s"] > 0 for row in speeds) and all(row["val_loss"] < 4.5 for row in whole)
    assert (tmp_path / "bench.json").exists()
    assert failure(bench.main, ["--whole", "--limit", "5"])[0] == 2


def test_a_sweep_continues_where_it_was(tmp_path, capsys, monkeypatch):
    sweep = load("nanogpt", "sweep")
    argv = [
        "--study",
        "words",
        "--data",
        "builtin",
        "--limit",
        "600",
        "--iters",
        "10",
        "--seeds",
        "1",
        "--out",
        str(tmp_path),
    ]
    sweep.main(argv)
    first = {file: file.read_bytes() for file in tmp_path.glob("*/run.json")}
    sweep.main(argv)
    assert len(first) == 3 and all(file.read_bytes() == content for file, content in first.items())
    record = json.loads((tmp_path / "words.json").read_text())
    assert [len(row["curve"]) for row in record["rows"]] == [10, 10, 10] and (tmp_path / "words.png").exists()
    assert "word-gpt" in capsys.readouterr().out
    for file in tmp_path.glob("words-0-s0/run.json"):  # as a run that was stopped before its first checkpoint
        file.write_text(json.dumps(json.loads(file.read_text()) | {"state": "interrupted"}))
        (file.parent / "last.pt").unlink()
    monkeypatch.setattr(data, "choose", lambda name, *_: "builtin")  # what auto stands for
    sweep.main([{"builtin": "auto"}.get(word, word) for word in argv])
    assert {json.loads(file.read_text())["state"] for file in first} == {"done"}
    code, message = failure(sweep.main, [*argv, "--iters", "20"])
    assert code == 1 and "--iters" in message, "a quick look is not taken for the real thing"


def test_every_study_is_made_of_recipes():
    sweep = load("nanogpt", "sweep")
    for study in sweep.STUDIES.values():
        for recipe in study.values():
            assert recipe.keys() == train.RECIPES["gpu"].keys()
            model.build(recipe["model"] | {"vocab_size": 65})
