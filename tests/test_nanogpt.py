"""nanogpt/, models and training: the GPT against that of transformers, the optimizer against torch's, the loop against
its specification. Texts, tokenizers, generation and the stages are in test_nanogpt_text.py, the contract that all
folders share in test_contract.py."""

import csv
import dataclasses
import functools
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import processes
from conftest import ROOT, failure, lazy, load, one_line, run
from helpers import names

train = lazy("nanogpt")
data = lazy("nanogpt", "data")
model = lazy("nanogpt", "model")
baselines = lazy("nanogpt", "networks.baselines")
checkpoint = lazy("nanogpt", "checkpoint")
diagnostics = lazy("nanogpt", "training.diagnostics")
optim = lazy("nanogpt", "optim")
MODERN = dict(rotary=True, norm="rms", mlp="relu2", qk_norm=True)


def small(**changes):
    torch.manual_seed(0)
    shape = dict(vocab_size=50, block_size=16, n_layer=2, n_head=3, n_embd=48) | changes
    return model.GPT(model.GPTConfig(**shape)).eval()


def scaled(net, factor=5.0):
    """With the usual small initial weights, attention is almost uniform and GELU almost linear; then mistakes in them
    hardly change the logits."""
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p.mul_(factor)
            else:
                p.add_(0.3 * torch.randn_like(p))
    return net


# -------------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def gpt2():
    """A random small GPT-2 of `transformers` in float64, with weights five times as large as usual."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = dict(vocab_size=61, n_positions=24, n_embd=48, n_layer=3, n_head=4, attn_implementation="eager")
    return scaled(transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).double().eval())


def difference(theirs):
    idx = torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return (checkpoint.load_gpt2(theirs)(idx) - theirs(idx).logits).abs().max().item()


def test_logits_equal_those_of_transformers(gpt2):
    assert difference(gpt2) < 1e-9


@pytest.mark.parametrize("mistake", ["exact GELU", "eps", "scale", "no shift", "untransposed"])
def test_the_comparison_finds_classic_mistakes(mistake, gpt2, monkeypatch):
    net = checkpoint.load_gpt2(gpt2)
    assert not net.training
    GPT = type(net)
    Norm = type(net.norm)
    Attention = type(net.blocks[0].attention)
    hidden, forward = GPT.hidden, Attention.forward
    if mistake == "exact GELU":
        monkeypatch.setattr(F, "gelu", lambda h, approximate, gelu=F.gelu: gelu(h))
    elif mistake == "eps":
        wrong = lambda self, x: F.layer_norm(x, x.shape[2:], self.weight, self.bias, 1e-6)  # noqa: E731
        monkeypatch.setattr(Norm, "forward", wrong)
    elif mistake == "scale":
        unscaled = lambda mask, q, k, alpha, baddbmm=torch.baddbmm: baddbmm(mask, q, k)  # noqa: E731
        monkeypatch.setattr(torch, "baddbmm", unscaled)
    elif mistake == "no shift":
        monkeypatch.setattr(GPT, "hidden", lambda self, idx, cache: hidden(self, idx.roll(1, 1), cache))
    else:
        monkeypatch.setattr(Attention, "forward", lambda self, x, *rest: forward(self, x, *rest) @ self.out.weight)
    assert difference(gpt2) > 1e-7


def test_a_gpt2_of_another_form_is_refused(gpt2):
    for name, value in (("activation_function", "gelu"), ("layer_norm_epsilon", 1e-6), ("n_inner", 7)):
        before = getattr(gpt2.config, name)
        setattr(gpt2.config, name, value)
        code, message = failure(checkpoint.load_gpt2, gpt2)
        setattr(gpt2.config, name, before)
        assert code == 1 and name in message
    code, message = failure(checkpoint.load_gpt2, "/nowhere/at/all")
    assert code == 1 and "/nowhere/at/all" in message and "\n" not in message


@pytest.mark.parametrize("options", [{}, MODERN, dict(mlp="swiglu", tied=False, bias=True)])
def test_written_out_attention_equals_fused_attention(options, monkeypatch):
    net, idx = scaled(small(**options)).double(), torch.randint(50, (2, 16))
    written_out = net(idx)
    monkeypatch.setattr(model, "FUSED_ABOVE", 0)
    assert torch.allclose(net(idx), written_out, atol=1e-10)
    maps = net.attention_maps(idx)
    assert maps.shape == (2, 2, 3, 16, 16) and torch.allclose(maps.sum(4), torch.ones(2, 2, 3, 16, dtype=torch.float64))
    assert maps.triu(1).abs().max() == 0


def word_mlp(direct):
    return baselines.WordMLP(baselines.WordMLPConfig(50, 16, context=3, n_embd=8, hidden=12, direct=direct))


MODELS = {
    "gpt": lambda: small(),
    "modern": lambda: small(**MODERN),
    "bigram": lambda: baselines.Bigram(baselines.BigramConfig(50, 16)),
    "factored bigram": lambda: baselines.Bigram(baselines.BigramConfig(50, 16, n_embd=8)),
    "wordmlp": lambda: word_mlp(direct=False),
    "wordmlp direct": lambda: word_mlp(direct=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model(name, tmp_path):
    net = MODELS[name]()
    idx = torch.randint(50, (4, 16))
    assert net(idx).shape == (4, 16, 50) and net(idx[:, :5]).shape == (4, 5, 50)
    first_loss = diagnostics.check_start(net, idx, idx.roll(-1, 1))
    assert first_loss == pytest.approx(math.log(50), abs=0.2)
    again = checkpoint.build(json.loads(json.dumps(checkpoint.config_of(net))))
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.eval()(idx), net(idx))
    code, message = failure(net, torch.zeros(1, 17, dtype=torch.int64))
    assert code == 1 and "17" in message and "16" in message
    checkpoint.save_weights(tmp_path / "w.safetensors", net, {"kind": "char", "vocabulary": ["a"]})
    read, tokenizer = checkpoint.load_checkpoint(tmp_path / "w.safetensors")
    assert tokenizer["vocabulary"] == ["a"] and checkpoint.config_of(read) == checkpoint.config_of(net)
    assert all(torch.equal(p, net.state_dict()[name].bfloat16().float()) for name, p in read.state_dict().items())
    assert (tmp_path / "w.safetensors").stat().st_size < 2 * run.count_parameters(net) + 4000


def test_a_model_that_is_not_causal_is_found(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "triu", lambda self, diagonal=0: torch.zeros_like(self))
    code, message = failure(diagnostics.check_causal, scaled(small()), torch.randint(50, (2, 16)))
    assert code == 1 and "not causal" in message


def test_wordmlp_depends_on_its_context_only():
    net = baselines.WordMLP(baselines.WordMLPConfig(50, 16, context=3, n_embd=8, hidden=12))
    idx = torch.randint(50, (1, 16))
    for back in range(16):
        changed = idx.clone()
        changed[0, 15 - back] = (changed[0, 15 - back] + 1) % 50
        assert torch.equal(net(idx)[0, 15], net(changed)[0, 15]) == (back >= 3)


def test_rotary_scores_depend_on_the_distance_only():
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    cos, sin = (part.double() for part in model.rotary_angles(0, 64, 8, "cpu"))
    rows = [model.rotate(x.expand(64, 8), cos, sin) for x in (q, k)]
    scores = rows[0] @ rows[1].T
    assert torch.allclose(scores[10, 7], scores[53, 50], atol=1e-5) and not torch.isclose(scores[10, 7], scores[10, 6])
    assert torch.allclose(rows[0].norm(dim=1), q.norm().expand(64))
    later = model.rotary_angles(5, 3, 8, "cpu")
    assert all(torch.equal(a, b[5:]) for a, b in zip(later, model.rotary_angles(0, 8, 8, "cpu")))


def test_squared_relu_is_its_formula():
    h = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.equal(model.SquaredReLU.apply(h), F.relu(h).square())
    assert torch.autograd.gradcheck(model.SquaredReLU.apply, h)


def test_a_wrong_configuration_is_refused():
    for config in ({}, {"kind": "gpt3"}, {"kind": "gpt", "vocab_size": 5, "color": 1}, [1], {"kind": ["gpt"]}):
        assert failure(checkpoint.build, config)[0] == 1
    assert "kind gpt3: must be one of gpt, bigram" in failure(checkpoint.build, {"kind": "gpt3"})[1]
    assert "n_head: must be of type int" in failure(checkpoint.build, {"kind": "gpt", "n_head": 0.5})[1]
    wrong = {"n_head": 5, "n_layer": 0, "mlp": "tanh", "norm": "batch", "dropout": 1.0}
    for name, value in wrong.items():
        code, message = failure(lambda name=name, value=value: small(**{name: value}))
        assert code == 1 and str(value) in message
    assert "even" in failure(lambda: small(rotary=True, n_embd=9))[1]


# ----------------------------------------------------------------------------------------------------------- optimizers


def test_batched_muon_equals_torchs():
    """The same gradients for six steps: torch's takes one matrix at a time, ours all of one shape."""
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
    assert worst < 2e-3  # bfloat16 rounds a batched product differently


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_orthogonalize_returns_almost_orthogonal_matrices(dtype):
    g = torch.randn(3, 32, 64)
    for x in (g, g.mT):
        result = optim.orthogonalize(x, dtype=dtype)
        values = torch.linalg.svdvals(result.float())
        assert result.dtype == dtype and 0.5 < values.min() and values.max() < 1.4
    u, _, v = torch.linalg.svd(g[0], full_matrices=False)
    result = optim.orthogonalize(g, dtype=dtype)[0].float()
    assert F.cosine_similarity((u @ v).flatten(), result.flatten(), 0) > 0.95


def test_precision_of_muon_follows_the_hardware_and_is_kept(monkeypatch):
    """A run begun in float32 continues in float32 on a machine that multiplies bfloat16."""
    args = types.SimpleNamespace(muon=4.0, lr=1e-3, beta2=0.99, weight_decay=0.1, ns_steps=5)
    muons = {}
    for native in (True, False):
        monkeypatch.setattr(optim.run, "native_bf16", lambda device, native=native: native)
        muons[native] = optim.make_optimizers(small(bias=True), args, torch.device("cpu"))[1]
    assert [muons[native].param_groups[0]["precision"] for native in (True, False)] == ["bf16", "fp32"]
    seen, used = [], optim.orthogonalize
    monkeypatch.setattr(optim, "orthogonalize", lambda g, steps, dtype: (seen.append(dtype), used(g, steps, dtype))[1])
    muons[True].load_state_dict(muons[False].state_dict())
    for p in muons[True].param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    muons[True].step()
    assert seen and set(seen) == {torch.float32}


def test_parameter_groups():
    net, cpu = small(bias=True), torch.device("cpu")
    args = types.SimpleNamespace(muon=4.0, lr=1e-3, beta2=0.99, weight_decay=0.1, ns_steps=5)
    adamw, muon = optim.make_optimizers(net, args, cpu)
    matrices, vectors = adamw.param_groups
    assert {id(p) for p in matrices["params"]} == {id(net.tokens.weight), id(net.positions.weight)}
    assert matrices["weight_decay"] == 0.1 and vectors["weight_decay"] == 0
    assert vectors["params"] and all(p.dim() == 1 for p in vectors["params"])
    assert len(muon.param_groups[0]["params"]) == 8 and muon.param_groups[0]["peak"] == pytest.approx(4e-3)
    args.muon = 0.0
    assert len(optim.make_optimizers(net, args, cpu)) == 1


def test_schedules():
    args = types.SimpleNamespace(warmup=10, iters=110, decay="cosine", cooldown=1.0, final_lr=0.1)
    at = [train.lr_factor(args, step) for step in (0, 9, 10, 60, 110)]
    assert at == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1])
    args = types.SimpleNamespace(warmup=10, iters=100, decay="linear", cooldown=0.5, final_lr=0.0)
    assert [train.lr_factor(args, step) for step in (0, 20, 50, 75, 99)] == pytest.approx([0.1, 1, 1, 0.5, 0.02])


# ------------------------------------------------------------------------------------------------------------ training


def fit(folder, *argv):
    flags = ["--recipe", "tiny", "--data", "builtin", "--limit", "3000", "--device", "cpu", "--precision", "fp32"]
    flags += ["--evals", "3"]
    return train.main([*flags, "--out", str(folder), *argv])


def metrics(folder):
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_a_run_learns_and_leaves_its_files(tmp_path):
    record = fit(tmp_path / "a")
    final = record["final"]
    assert final["val_loss"] < 3.6 < record["first_loss"]  # ln 90 or so
    assert {"best.pt", "last.pt", "layers.png", "curves.png"} <= {f.name for f in (tmp_path / "a").iterdir()}
    assert final["val_perplexity"] == pytest.approx(math.exp(final["val_loss"])) and "test_loss" in final
    net, tokenizer = checkpoint.load_checkpoint(tmp_path / "a" / "best.pt")
    text = data.load("builtin", limit=3000)
    total = 0.0
    with torch.no_grad():
        for x, y in data.blocks(text.val, 16, 7):
            total += F.cross_entropy(net(x).flatten(0, 1), y.flatten(), reduction="sum").item()
    assert total / (len(text.val) - 1) == pytest.approx(final["val_loss"], rel=1e-5)
    assert tokenizer["vocabulary"] == text.tokenizer.vocabulary
    log = (tmp_path / "a" / "train.log").read_text(encoding="utf-8")
    samples = re.split(r"^iter .*\n", log, flags=re.MULTILINE)[1:]
    assert len(samples) == 3 and all(text.startswith("    ") for text in samples)


@pytest.mark.parametrize("kind", ["gpt", "wordmlp"])
def test_a_training_that_learns_nothing_says_so(kind, tmp_path, capsys):
    record = fit(tmp_path, "--kind", kind, "--lr", "1e-12", "--iters", "4")
    assert "nothing was learned" in record["warning"] and record["warning"] in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- one step, and the options


@pytest.fixture
def quick_samples(monkeypatch):
    monkeypatch.setattr(train, "SAMPLE_TOKENS", 2)


STEPS = {
    "GPT-2": "",
    "modern": "--rotary --norm rms --mlp relu2 --qk-norm",
    "SwiGLU, untied, biases": "--mlp swiglu --no-tied --bias",
    "bigram": "--kind bigram",
    "bigram, a full table": "--kind bigram --n-embd 0",
    "MLP": "--kind wordmlp",
    "MLP, direct": "--kind wordmlp --direct --context 2",
    "clipped": "--clip 0.01",
    "not clipped, no decay": "--clip 0 --weight-decay 0",
    "micro-batches": "--micro-batch 2",
    "Muon": "--muon 3 --ns-steps 4",
}


def newton_schulz(g, steps):
    x = (g if g.shape[0] <= g.shape[1] else g.T) / g.norm()
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if g.shape[0] <= g.shape[1] else x.T


@pytest.mark.parametrize("name", STEPS)
def test_one_step_is_the_formula(name, tmp_path, monkeypatch, quick_samples):
    """The loss and the new weights, from torch.autograd.grad and the equations of AdamW and Muon."""
    monkeypatch.setattr(optim.run, "native_bf16", lambda device: False)
    flags = ["--iters", "1", "--bs", "4", "--beta2", "0.9", "--seed", "5", *STEPS[name].split()]
    fit(tmp_path / "a", *flags)
    args = train.parse(["--recipe", "tiny", *flags])
    text = data.load("builtin", limit=3000)
    torch.manual_seed(5)
    net = checkpoint.build(checkpoint.model_config(args, text.tokenizer.vocab_size))
    x, y = data.batch(text.train, 16, 4, seed=5, step=0)
    loss = -net(x).log_softmax(2).gather(2, y[:, :, None]).mean()
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    scale = min(1.0, args.clip / norm) if args.clip else 1.0
    lr = args.lr / args.warmup  # the first step of the warm-up
    new = torch.load(tmp_path / "a" / "last.pt", weights_only=True)["model"]
    for (key, p), g in zip(net.named_parameters(), gradients):
        g = g * scale
        if args.muon and p.dim() == 2 and key.startswith("blocks."):
            tall = max(1, p.shape[0] / p.shape[1]) ** 0.5
            decayed = p * (1 - args.muon * lr * args.weight_decay)
            wanted = decayed - args.muon * lr * tall * newton_schulz(g, args.ns_steps)
        else:  # after one step both averages, corrected, are the gradient's own
            decayed = p * (1 - lr * args.weight_decay) if p.dim() == 2 else p
            wanted = decayed - lr * g / (g.square().sqrt() + 1e-8)
        assert torch.allclose(new[key], wanted, rtol=1e-4, atol=1e-6), key
    assert metrics(tmp_path / "a")[0]["train_loss"] == pytest.approx(loss.item(), rel=1e-5)


def count_forward_passes(patch, run_it):
    calls, loss_of = [], train.loss_of
    patch.setattr(train, "loss_of", lambda *args: (calls.append(args[1].shape), loss_of(*args))[1])
    run_it()
    return calls


def compiled(patch, run_it):
    calls = []
    patch.setattr(torch, "compile", lambda model: (calls.append(1), model)[1])
    run_it()
    return calls


WORD_MLP = "--kind wordmlp"
OPTIONS = {  # option: (other flags, flags of both runs); they must end with other weights or metrics
    "data": ("--data FILE", ""),
    "limit": ("--limit 500", ""),
    "recipe": ("--recipe word-gpt", ""),
    "tokens": ("--tokens word", ""),
    "init": ("--init WEIGHTS", "--data FILE"),
    "seed": ("--seed 4", ""),
    "precision": ("--precision bf16", ""),
    "held_out": ("--held-out", ""),
    "overfit": ("--overfit", ""),
    "iters": ("--iters 5", ""),
    "bs": ("--bs 4", ""),
    "lr": ("--lr 0.002", ""),
    "muon": ("--muon 2", ""),
    "ns_steps": ("--ns-steps 2", "--muon 2"),
    "beta2": ("--beta2 0.5", ""),
    "weight_decay": ("--weight-decay 0.9", ""),
    "clip": ("--clip 0.01", ""),
    "warmup": ("--warmup 2", ""),
    "decay": ("--decay linear", ""),
    "cooldown": ("--cooldown 0.5", ""),
    "final_lr": ("--final-lr 0.5", ""),
    "ema": ("--ema 0.5", "--iters 40"),
    "evals": ("--evals 2", ""),
    "kind": ("--kind bigram", ""),
    "block_size": ("--block-size 8", ""),
    "first_block_size": ("--first-block-size 8", ""),
    "n_layer": ("--n-layer 2", ""),
    "n_head": ("--n-head 4", ""),
    "n_embd": ("--n-embd 16", ""),
    "dropout": ("--dropout 0.5", ""),
    "bias": ("--bias", ""),
    "tied": ("--no-tied", ""),
    "rotary": ("--rotary", ""),
    "norm": ("--norm rms", ""),
    "mlp": ("--mlp relu2", ""),
    "qk_norm": ("--qk-norm", ""),
    "context": ("--context 2", WORD_MLP),
    "hidden": ("--hidden 8", WORD_MLP),
    "direct": ("--direct", WORD_MLP),
}
SEEN = {"micro_batch": ("--micro-batch 1", count_forward_passes), "compile": ("--compile", compiled)}
ELSEWHERE = {  # options of all folders, which the contract tests; a model of the hub is in test_textbooks.py
    *("out", "resume", "tensorboard", "data_dir", "device", "threads"),
    "name",
}


def short_run(folder, *flags):
    base = "--recipe tiny --data builtin --limit 400 --iters 4 --bs 2 --warmup 0 --evals 1 --device cpu"
    train.main([*base.split(), "--precision", "fp32", *flags, "--out", str(folder)])
    weights = torch.load(folder / "last.pt", weights_only=True)["model"]
    rows = [{name: value for name, value in row.items() if "seconds" not in name} for row in metrics(folder)]
    return rows, {name: p.tolist() for name, p in weights.items()}


def test_the_average_of_weights_is_its_formula(tmp_path, monkeypatch, quick_samples):
    """a <- d a + (1 - d) w after each step, from the first weights on; d is at most 1 - 10 / 40 in 40 steps."""
    average = {}
    update = train.update

    def recorded(model, *rest):
        update(model, *rest)
        for name, p in model.named_parameters():
            now = p.detach().double()
            average[name] = 0.75 * average[name] + 0.25 * now if name in average else now

    monkeypatch.setattr(train, "update", recorded)
    rows, weights = short_run(tmp_path / "run", "--iters", "40", "--ema", "0.9")
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["model"]
    for name, expected in average.items():
        assert torch.allclose(best[name].double(), expected, atol=1e-6), name
    assert any(torch.tensor(weights[name]).sub(p).abs().max() > 1e-3 for name, p in best.items()), (
        "not the last weights"
    )
    assert len(rows) == 1


def test_sequences_grow_in_the_middle_of_the_run(tmp_path, monkeypatch, quick_samples):
    """In the first half there are twice as many, of half the length; a step always sees as many tokens."""
    shapes = []
    backward = train.backward

    def recorded(model, x, y, micro_batch, *rest):
        shapes.append((tuple(x.shape), micro_batch))
        return backward(model, x, y, micro_batch, *rest)

    monkeypatch.setattr(train, "backward", recorded)
    short_run(tmp_path / "run", "--iters", "5", "--first-block-size", "8", "--bs", "4", "--micro-batch", "2")
    assert shapes == [((8, 8), 4)] * 3 + [((4, 16), 2)] * 2


def test_sequences_that_do_not_fit_a_block_are_refused(refused):
    assert "7: does not divide 16" in refused(train.parse, *"--recipe tiny --first-block-size 7".split())


@pytest.fixture(scope="module")
def base_runs(tmp_path_factory):
    """base_runs(*flags): the result of a short run, made once."""
    return functools.cache(lambda *flags: short_run(tmp_path_factory.mktemp("base") / "run", *flags))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("another text, of which not much is needed. " * 40)
    return {"FILE": str(file), "WEIGHTS": str(ROOT / "nanogpt" / "weights" / "cpu.safetensors")}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_matters(name, base_runs, places, tmp_path, quick_samples):
    flags, both = ([places.get(word, word) for word in text.split()] for text in OPTIONS[name])
    assert short_run(tmp_path / "run", *both, *flags) != base_runs(*both)


@pytest.mark.parametrize("name", SEEN)
def test_each_option_is_seen(name, tmp_path, monkeypatch, quick_samples):
    flag, watch = SEEN[name]
    without = watch(monkeypatch, lambda: short_run(tmp_path / "a"))
    assert watch(monkeypatch, lambda: short_run(tmp_path / "b", *flag.split())) != without


def test_no_option_is_forgotten():
    fields = {field.name for field in dataclasses.fields(train.Options)}
    assert fields == {*OPTIONS, *SEEN, *ELSEWHERE}
    shapes = {
        kind: {field.name for field in dataclasses.fields(shape)} for kind, (_, shape) in checkpoint.KINDS.items()
    }
    for field in dataclasses.fields(train.Options):  # `only` names the kinds whose configuration has the field
        kinds = {kind for kind in shapes if field.name in shapes[kind]}
        only = set(field.metadata["only"])
        assert only == (kinds if field.name != "block_size" else set()), field.name


def test_one_batch_can_be_overfitted(tmp_path):
    record = fit(tmp_path / "a", "--overfit", "--iters", "300", "--bs", "4")
    rows = metrics(tmp_path / "a")
    assert rows[-1]["train_loss"] < 0.3 < 3 < record["first_loss"]
    assert rows[-1]["val_loss"] > rows[0]["val_loss"], "one batch does not generalize"


def test_a_bigram_has_a_rank_above_zero():
    with pytest.raises(run.UserError, match="n_embd -1: must be at least 1"):
        baselines.BigramConfig(50, 16, n_embd=-1)


def test_gradient_norms_and_update_ratios_of_layers():
    net, layers = small(), {"tokens", "positions", "block0", "block1", "norm"}
    net(torch.randint(50, (2, 16))).square().sum().backward()
    gradients = diagnostics.gradient_norms(net)
    assert gradients.keys() == {f"grad_{layer}" for layer in layers}
    block = torch.cat([p.grad.flatten() for p in net.blocks[1].parameters()])
    assert gradients["grad_block1"] == pytest.approx(block.norm().item())
    before = [p.detach().clone() for p in net.parameters()]
    with torch.no_grad():
        for p in net.blocks[1].parameters():
            p.mul_(1.01)
    ratios = diagnostics.update_ratios(net, before)
    assert ratios["update_block1"] == pytest.approx(0.01, rel=1e-3) and ratios["update_block0"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fast", "word-mlp", "word-bigram", "word-gpt"])
def test_the_other_recipes_learn(recipe, tmp_path):
    quick = ["--iters", "20", "--evals", "2", "--bs", "8", "--lr", "1e-2", "--limit", "1000"]
    record = fit(tmp_path / "a", "--recipe", recipe, *quick, "--overfit")
    assert record["state"] == "done" and metrics(tmp_path / "a")[-1]["train_loss"] < record["first_loss"] - 0.05


def parameters(recipe, vocab_size):
    with torch.device("meta"):
        return run.count_parameters(checkpoint.build(checkpoint.model_config(train.RECIPES[recipe], vocab_size)))


def test_sizes_of_the_recipes():
    words = [parameters(name, 7_060) for name in ("word-bigram", "word-mlp", "word-gpt")]  # Shakespeare's words
    assert max(words) < 1.05 * min(words), words
    assert parameters("fast", 65) < 0.81e6 and parameters("cpu", 65) == 804_096
    assert parameters("gpu", 65) == pytest.approx(10.7e6, rel=0.01)
    assert parameters("gpt2", 50_257) == pytest.approx(124e6, rel=0.01)


@pytest.mark.parametrize("change", [{"n_layer": 10**7}, {"n_embd": 10**7}, {"block_size": 10**9}, {"n_layer": 5}])
def test_weights_whose_header_describes_a_network_that_fits_no_memory(change, tmp_path):
    config = {"kind": "gpt", "vocab_size": 1, "block_size": 4, "n_layer": 1, "n_head": 2, "n_embd": 8}
    state = checkpoint.build(config).state_dict()
    header = {"config": json.dumps(config | change), "tokenizer": json.dumps({"kind": "char", "vocabulary": ["a"]})}
    run.write_safetensors(tmp_path / "w.safetensors", state, header)
    code, message = failure(checkpoint.load, tmp_path / "w.safetensors")
    assert code == 1 and one_line(message) and ("is the checkpoint of another model" in message or "n_layer" in message)


def test_wrong_initial_weights_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "build", lambda config, build=train.build: scaled(build(config), 20.0))
    code, message = failure(fit, tmp_path / "a")
    assert code == 1 and "first loss" in message and "ln" in message and "\n" not in message


@pytest.mark.parametrize("vocab_size", [3, 50, 3000])
def test_the_first_loss_tells_right_weights_from_wrong_ones(vocab_size):
    """Whatever the text: here one token is repeated, which a tied head predicts well before any training."""
    x = torch.zeros(2, 16, dtype=torch.int64)
    for right in (small(vocab_size=vocab_size, n_embd=384), small(vocab_size=vocab_size, tied=False, **MODERN)):
        loss = diagnostics.check_start(right, x, x)
        assert loss == pytest.approx(F.cross_entropy(right(x).flatten(0, 1), x.flatten()).item())
    code, message = failure(diagnostics.check_start, scaled(small(vocab_size=vocab_size), 20.0), x, x)
    assert code == 1 and "initial weights" in message and f"ln {vocab_size - 1}" in message


def test_targets_that_are_not_shifted_by_one_are_found():
    window = torch.randint(50, (2, 18))
    diagnostics.check_start(small(), window[:, :16], window[:, 1:17])
    for wrong in (window[:, :16], window[:, 2:]):
        code, message = failure(diagnostics.check_start, small(), window[:, :16], wrong)
        assert code == 1 and "targets are wrong" in message


GPT2_TOKENS = pytest.param("ab " * 3000, "gpt2", marks=pytest.mark.slow)


@pytest.mark.parametrize("content, tokens", [("ab" * 2000, "char"), ("ab " * 3000, "bpe"), GPT2_TOKENS])
def test_a_text_of_few_different_tokens_is_trained_on(content, tokens, tmp_path, data_dir):
    where = ["--data-dir", str(data_dir("gpt2_tokenizer"))] if tokens == "gpt2" else []
    (tmp_path / "text.txt").write_text(content)
    quick = ["--tokens", tokens, "--iters", "2", "--bs", "2", "--evals", "1", "--n-embd", "128"]
    record = fit(tmp_path / "a", "--data", str(tmp_path / "text.txt"), *quick, *where)
    assert record["state"] == "done" and abs(record["first_loss"] - math.log(record["dataset"]["vocabulary"])) > 0.3


def test_a_text_shorter_than_a_block(tmp_path):
    code, message = failure(fit, tmp_path / "a", "--limit", "16")
    assert code == 1 and "too short" in message and "--block-size N" in message and "\n" not in message
    assert fit(tmp_path / "b", "--limit", "16", "--block-size", "8", "--iters", "2")["state"] == "done"


def test_a_batch_that_cannot_be_meant_is_refused_at_once(tmp_path):
    for main in (train.main, load("nanogpt", "stage").main):
        flags = ["--data", "builtin", "--limit", "3000", "--bs", "100000000", "--out", str(tmp_path / "a")]
        code, message = failure(main, flags)
        assert code == 1 and "--bs 100000000" in message and "3000" in message and not (tmp_path / "a").exists()


# ---------------------------------------------------------------------------------------------------------- evaluation


def shakespeare(level="char", n=111_540):
    return types.SimpleNamespace(level=level, val=range(n))


def eval_tokens(recipe, text, **changes):
    args = dataclasses.replace(train.RECIPES[recipe], **changes)
    return train.eval_tokens(args, text, args.block_size)


def test_shakespeare_by_characters_is_evaluated_whole():
    assert all(eval_tokens(recipe, shakespeare()) == 111_539 for recipe in ("cpu", "fast", "best", "muon", "gpu"))
    assert eval_tokens("cpu", shakespeare(), iters=100) < 2400, "not in a short run"


@pytest.mark.parametrize("recipe", names("nanogpt", "train", "RECIPES"))
def test_evaluations_cost_a_tenth_of_a_run_at_most(recipe):
    """A forward pass costs a third of a training step."""
    for level in ("char", "word", "gpt2"):
        for n in (2, 500, 36_059, 111_540, 2**20, 10**9):
            for iters in (100, 109, 199, 1000, 9999):
                for bs in (4, 16, 480):
                    changes = dict(iters=iters, bs=bs, evals=min(10, train.RECIPES[recipe].evals))
                    each = eval_tokens(recipe, shakespeare(level, n), **changes)
                    every = math.ceil(iters / changes["evals"])
                    evals = len({step for step in range(1, iters + 1) if step % every == 0 or step == iters})
                    cost = evals * each / 3 / (iters * bs * train.RECIPES[recipe].block_size)
                    assert 1 <= each < n and (cost <= 0.1 or level == "char" and each == n - 1 < 2**17 and cost <= 0.4)


@pytest.mark.parametrize("length", [3000, pytest.param(450, marks=pytest.mark.slow)])
def test_a_long_text_is_evaluated_in_part_until_the_end(length, tmp_path, monkeypatch):
    """Counted: the tokens of every evaluation, of 3000 tokens in part and of 450 as a whole."""
    counts, blocks = [], data.blocks

    def counted(*args):
        counts.append(0)
        for x, y in blocks(*args):
            counts[-1] += y.numel()
            yield x, y

    monkeypatch.setattr(data, "blocks", counted)
    record = fit(tmp_path / "a", "--iters", "100", "--limit", str(length), "--evals", "10")
    text, tokens = data.load("builtin", limit=length), record["dataset"]["eval"]
    during, end = counts[:10], counts[10:]
    assert set(during) == {tokens // 16 * 16 if length == 3000 else tokens}
    assert end == ([2999, 2999] if length == 3000 else [449]), "validation where it was in part, and test"
    assert sum(during) / 3 <= 0.1 * 100 * record["tokens_per_step"] or length == 450
    rows, net = metrics(tmp_path / "a"), checkpoint.load_checkpoint(tmp_path / "a" / "best.pt")[0]
    best = torch.load(tmp_path / "a" / "best.pt", weights_only=True)["val_loss"]
    assert best == min(row["val_loss"] for row in rows)
    whole = train.evaluate(net, text.val, 12, load("nanogpt", "bench").OneProcess(torch.device("cpu"), "fp32"))
    assert record["final"]["val_loss"] == pytest.approx(whole, rel=1e-6)
    assert (record["final"]["val_loss"] == best) == (length == 450)


def test_generated_text_goes_to_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    fit(tmp_path / "a", "--tensorboard", "--iters", "6")
    events = accumulator.EventAccumulator(str(tmp_path / "a")).Reload()
    (tag,) = events.Tags()["tensors"]
    texts = [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(tag)]
    log = (tmp_path / "a" / "train.log").read_text(encoding="utf-8")
    assert [step for step, _ in texts] == [2, 4, 6] and "sample" in tag
    assert all(text.startswith("    ") and text.rstrip() in log for _, text in texts)


def test_a_validation_text_shorter_than_a_block(tmp_path):
    (tmp_path / "poem.txt").write_text("the sea, the sea, the open sea, the blue, the fresh, the ever free. " * 2)
    record = fit(tmp_path / "a", "--data", str(tmp_path / "poem.txt"), "--iters", "4")
    assert record["state"] == "done" and record["final"]["sampled_loss"] is None and record["final"]["val_loss"] > 0


def test_a_diverged_run_is_recorded(tmp_path):
    code, message = failure(fit, tmp_path / "a", "--lr", "1e30")
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert code == 1 and "diverged" in message and record["state"] == "diverged"


def test_micro_batches_make_one_batch(tmp_path):
    weights = []
    for name in ("whole", "parts"):
        torch.set_default_dtype(torch.float64)
        try:
            fit(tmp_path / name, "--bs", "6", "--iters", "8", *(["--micro-batch", "2"] if name == "parts" else []))
        finally:
            torch.set_default_dtype(torch.float32)
        weights.append(torch.load(tmp_path / name / "last.pt", weights_only=True)["model"])
    assert all(torch.allclose(weights[0][k], weights[1][k], rtol=1e-9, atol=1e-12) for k in weights[0])


def test_a_batch_size_that_does_not_divide_is_refused(monkeypatch, capsys):
    assert failure(train.parse, ["--recipe", "tiny", "--micro-batch", "5"])[0] == 2
    assert "--bs 12" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert failure(train.parse, ["--recipe", "tiny", "--bs", "7"])[0] == 2
    assert "2 processes" in capsys.readouterr().err.splitlines()[-1]
    assert train.parse(["--recipe", "gpt2"]).bs == 480


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--evals 0", "--evals"),
        ("--decay step", "--decay"),
        ("--beta2 1", "--beta2"),
        ("--cooldown 2", "--cooldown"),
        ("--muon -1", "--muon"),
        ("--micro-batch 0", "--micro-batch"),
        ("--micro-batch many", "--micro-batch"),
        ("--n-head 3", "n_head 3"),
        ("--mlp tanh", "--mlp"),
        ("--kind gpt3", "--kind"),
        ("--kind hub", "--init"),
        ("--kind wordmlp --n-embd 0", "n_embd 0"),
        ("--n-embd 100000000", "--n-embd"),
        ("--rotary --n-head 32", "even"),
        ("--lr none", "--lr"),
        ("--context 3", "--context: gpt has no such option"),
        ("--kind bigram --n-layer 2", "--n-layer: bigram has no such option"),
        ("--set model.n_layer=3", "--n-layer 3"),
        ("--set evals=3", "--evals 3"),
        ("--set model.rotary=false", "--no-rotary"),
        ("--set model.colour=3", "no option 'colour'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(argv, words, refused):
    assert words in refused(train.parse, "--recipe", "tiny", *argv.split())


def test_the_shape_of_the_model_is_set_by_flags(tmp_path):
    record = fit(tmp_path / "a", "--iters", "2", "--n-layer", "2", "--mlp", "relu2")
    assert record["args"]["n_layer"] == 2 and "hidden" not in record["args"], "options of the kind alone"
    net, _ = checkpoint.load_checkpoint(tmp_path / "a" / "best.safetensors")
    assert len(net.blocks) == 2 and net.config.mlp == "relu2"


def test_a_run_that_is_stopped_between_evaluations_ends_the_same(tmp_path, monkeypatch):
    """Stopped after 27 and after 50 of 60 steps, with dropout: the same weights and metrics, bit for bit. Where it is
    time, a checkpoint is saved between evaluations too."""
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    save, saved = train.ddp.Run.save, set()

    def recorded_save(r, *name, **state):
        saved.add(state["step"])
        save(r, *name, **state)

    monkeypatch.setattr(train.ddp.Run, "save", recorded_save)
    dropout = ["--dropout", "0.1", "--ema", "0.8"]
    fit(tmp_path / "whole", *dropout)
    assert saved == set(range(1, 61))
    steps = iter(range(1, 99))
    monkeypatch.setattr(train.ddp.Run, "should_stop", lambda self: next(steps) in (27, 50))
    command = [*dropout, "--resume", "auto"]
    for code in (130, 130, None):
        if code:
            assert failure(fit, tmp_path / "parts", *command)[0] == code
        else:
            fit(tmp_path / "parts", *command)
    rows = [[row | {"elapsed_seconds": 0} for row in metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert rows[0] == rows[1] and len(rows[0]) == 3
    whole, parts = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


FLOAT64 = """
import sys
sys.path.insert(0, {folder!r})
import torch
import train
torch.set_default_dtype(torch.float64)
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """torchrun with gloo in float64: the same losses and weights to a relative 1e-12."""
    script = tmp_path / "wrapper.py"
    script.write_text(FLOAT64.format(folder=str(ROOT / "nanogpt")))
    flags = ["--recipe", "tiny", "--data", "builtin", "--limit", "3000", "--iters", "30", "--evals", "3"]
    flags += ["--device", "cpu", "--precision", "fp32"]
    flags += ["--bs", "8", "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = subprocess.run([*torchrun, script, *flags, tmp_path / "two"], capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    processes.assert_done(processes.start(script, *flags, tmp_path / "one"))
    two, one = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("two", "one"))
    for name, weights in one.items():
        assert (two[name] - weights).norm() < 1e-12 * weights.norm(), name
    two, one = (metrics(tmp_path / name) for name in ("two", "one"))
    assert len(two) == len(one) == 3
    for ours, theirs in zip(two, one):
        for name in ("train_loss", "val_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-12)
    two, one = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("two", "one"))
    assert (two["processes"], one["processes"]) == (2, 1)
    assert two["tokens_per_step"] == one["tokens_per_step"] == 128


@pytest.mark.slow
def test_the_bench_measures_everything(tmp_path, monkeypatch):
    bench = load("nanogpt", "bench")
    for name in ("cpu", "fast"):
        monkeypatch.setitem(bench.train.RECIPES, name, dataclasses.replace(train.TINY, iters=20, evals=2))
    text = data.load("builtin", limit=3000)
    monkeypatch.setattr(bench.data, "load", lambda *args: text)
    rows = bench.main(["--data", "builtin", "--device", "cpu", "--steps", "2", "--whole", "--out", str(tmp_path)])
    speeds, whole = ([row for row in rows if (row["what"] == "whole run") == w] for w in (False, True))
    assert [row["way"] for row in whole] == ["reference", "cpu", "fast"]
    assert {"reference", "cpu", "fast", "with cache", "without cache"} == {row["way"] for row in speeds}
    assert all(row["tokens_per_s"] > 0 for row in speeds) and all(row["val_loss"] < 4.5 for row in whole)
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == rows
    assert failure(bench.main, ["--whole", "--limit", "5"])[0] == 2


def test_the_commands_of_the_studies(capsys, tmp_path):
    sweep = load("nanogpt", "sweep")
    sweep.main(["--list", "--seeds", "1", "--data", "builtin", "--out", str(tmp_path)])
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(commands) == sum(len(sweep.STUDIES[name]) for name in sweep.SHORT) and not list(tmp_path.iterdir())
    args = [train.parse(words[2:]) for words in commands]
    assert all(words[0] == "python" and words[1].endswith("train.py") for words in commands)
    options = [one for one in args if one.recipe == "muon"]
    assert [one.muon for one in options] == [0.0] + [5.0] * 7
    shape = [field.name for field in dataclasses.fields(model.GPTConfig) if field.name != "vocab_size"]
    changed = [{name for name in shape if getattr(one, name) != getattr(train.MUON, name)} for one in options]
    assert changed == [set(), set(), {"rotary"}, {"norm"}, {"mlp"}, {"mlp"}, {"qk_norm"}, {"rotary", "qk_norm", "mlp"}]
    studies = ["--study", "held-out", "long"]
    sweep.main(["--list", "--seeds", "1", *studies, "--data", "builtin", "--out", str(tmp_path)])
    runs = [train.parse(shlex.split(line)[2:]) for line in capsys.readouterr().out.splitlines()]
    held_out = [one for one in runs if one.held_out]
    assert [one.recipe for one in held_out] == ["best"] + ["long"] * 6
    assert len({json.dumps(dataclasses.asdict(one) | {"out": ""}) for one in held_out}) == 7
    assert [one.evals for one in runs if not one.held_out] == [1, 1], "the validation text is read once, at the end"


@pytest.mark.slow
@pytest.mark.draws
def test_a_sweep_continues_where_it_stopped(tmp_path, capsys):
    sweep = load("nanogpt", "sweep")
    argv = ["--study", "words", "--seeds", "1", "--data", "builtin", "--limit", "600", "--iters", "10"]
    argv += ["--out", str(tmp_path)]
    sweep.main(argv)
    first = {file: file.read_bytes() for file in tmp_path.glob("*/run.json")}
    record = json.loads((tmp_path / "words.json").read_text())
    assert [len(row["curve"]) for row in record["rows"]] == [10, 10, 10] and (tmp_path / "words.png").exists()
    assert "word-gpt" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "words-0-s0")
    sweep.main(argv)
    again = {file: file.read_bytes() for file in tmp_path.glob("*/run.json")}
    assert len(first) == len(again) == 3
    assert [file.parent.name for file in first if first[file] != again[file]] == ["words-0-s0"]
    code, message = failure(sweep.main, [*argv, "--iters", "20"])
    assert code == 1 and "--iters" in message, "a quick look is not taken for the study"


# ------------------------------------------------------------------------------------------ beside nanoGPT's own script

THEIR_MODEL = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    vocab_size: int = 50304
    block_size: int = 64

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.table = torch.nn.Embedding(config.vocab_size, 1)
        self.table.weight.data.zero_()

    def forward(self, idx, targets=None):
        logits = (0 * self.table(idx)).expand(*idx.shape, self.config.vocab_size)
        return (logits, targets.view(-1).sum()) if targets is not None else (logits[:, -1:], None)
"""
THEIR_SCRIPT = """
import os, shutil, sys

class torch:
    manual_seed = print  # PyTorch itself would take seconds to import

options = dict(word.removeprefix("--").split("=") for word in sys.argv[2:])
seed_offset = 0
torch.manual_seed(1337 + seed_offset)
assert os.path.getsize("data/openwebtext/train.bin") > os.path.getsize("data/openwebtext/val.bin") > 0
for i in range(int(options["max_iters"]) + 1):
    print(f"iter {i}: loss 9.0000, time {900 if i == 0 else 10}.00ms, mfu -100.00%")
os.makedirs("out-shakespeare-char", exist_ok=True)
shutil.copyfile(f"CHECKPOINTS/{options['block_size']}.pt", "out-shakespeare-char/ckpt.pt")
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch, data_dir):
    """(beside.py with a recipe of four steps, a folder like nanoGPT's, a data folder with two small token files)"""
    beside = load("nanogpt", "beside")
    theirs = tmp_path / "nanoGPT"
    (theirs / "config").mkdir(parents=True)
    (theirs / "train.py").write_text(THEIR_SCRIPT.replace("CHECKPOINTS", theirs.as_posix()))
    (theirs / "model.py").write_text(THEIR_MODEL)
    shape = dict(block_size=64, vocab_size=50304)
    torch.save({"model": {"table.weight": torch.zeros(50304, 1)}, "model_args": shape}, theirs / "64.pt")
    for name in ("configurator.py", "config/train_shakespeare_char.py"):
        (theirs / name).write_text("")
    tokenizer = beside.data.prepare("gpt2_tokenizer", data_dir("gpt2_tokenizer"))
    monkeypatch.setattr(beside.data, "prepare", lambda name, folder: tokenizer)
    (tmp_path / "data/openwebtext").mkdir(parents=True)
    for part, n in (("train", 400), ("val", 150)):
        tokens = torch.randint(50_257, (n,)).to(torch.uint16)
        (tmp_path / f"data/openwebtext/{part}.bin").write_bytes(tokens.numpy().tobytes())
    recipe = dataclasses.replace(beside.train.TINY, tokens="gpt2", iters=4, evals=1)
    monkeypatch.setitem(beside.train.RECIPES, "web", recipe)
    return beside, theirs, tmp_path / "data"


@pytest.mark.draws
def test_nanogpts_script_trains_for_as_many_seconds_on_the_same_tokens(stand_in, tmp_path, monkeypatch, quick_samples):
    beside, theirs, folder = stand_in
    assert beside.machine.git_state(tmp_path / "nothing", own=["."]) is None
    for words in ("init -q", "add .", "-c user.name=a -c user.email=b commit -q -m first"):
        subprocess.run(["git", *words.split()], cwd=theirs, check=True)
    commit = beside.machine.git_state(theirs, own=["."])["commit"]
    argv = [str(theirs), "--data-dir", str(folder), "--out", str(tmp_path / "out")]
    rows = beside.main(argv)
    ours, nanogpts = rows
    assert [row["setting"] for row in rows] == ["recipe web", "nanoGPT's train.py"]
    iters = max(beside.TRIAL, round(ours["final"]["seconds"] / 0.01))
    assert nanogpts["args"] == {"iters": iters} and f"--max_iters={iters}" in nanogpts["command"]
    assert nanogpts["final"]["seconds"] == pytest.approx(0.9 + 0.01 * iters) and nanogpts["tokens_per_step"] == 12 * 64
    assert nanogpts["final"]["val_loss"] == pytest.approx(math.log(50304), abs=1e-4), "each token is as likely as any"
    assert nanogpts["git"] == {"commit": commit, "dirty": False}
    ratios = [row["final"]["val_loss"] / row["final"]["val_bits_per_byte"] for row in rows]
    assert ratios[0] == pytest.approx(ratios[1])
    assert "manual_seed(1337 + seed_offset)" in (tmp_path / "out/nanogpt-s0/train.py").read_text()
    monkeypatch.setattr(beside, "their_row", lambda *args: pytest.fail("it was trained again"))
    assert beside.main(argv) == rows
    assert json.loads((tmp_path / "out/web.json").read_text())["rows"] == rows


def test_another_seed_of_nanogpts_script(stand_in, tmp_path):
    beside, theirs, folder = stand_in
    beside.copy_script(theirs, tmp_path / "copy", 2, folder / "openwebtext")
    assert "manual_seed(1339 + seed_offset)" in (tmp_path / "copy/train.py").read_text()
    (theirs / "train.py").write_text("print('something else')")
    code, message = failure(beside.copy_script, theirs, tmp_path / "copy", 2, folder / "openwebtext")
    assert code == 1 and one_line(message) and "manual_seed" in message
    (theirs / "model.py").unlink()
    assert "model.py" in failure(beside.copy_script, theirs, tmp_path / "copy", 2, folder / "openwebtext")[1]


def test_nanogpts_script_that_fails_says_why(stand_in, tmp_path):
    beside, _, _ = stand_in
    (tmp_path / "train.py").write_text("import no_such_module")
    code, message = failure(beside.run_script, tmp_path, 5)
    assert code == 1 and one_line(message) and "no_such_module" in message
