"""Generators, discriminators and the four losses, for images of 32 x 32 pixels.

A discriminator returns a score for each image, which is a logit for DCGAN and ACGAN. WGAN calls it the critic: no
sigmoid follows its score. ACGAN's has a second output, logits of the classes.
"""

import copy
import math
from collections.abc import Callable

from common.convolutions import Downsample, LeakyReLU, Upsample, only_input_gradients

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

SIZE = 32  # side of an image in pixels
MODELS = ("dcgan", "wgan", "wgan-gp", "acgan")
NETWORKS = ("plain", "paper")

# --------------------------------------------------------------------------------------------------------- the losses


def score_both(
    discriminator: nn.Module, real: Tensor, fake: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Scores and class logits of real and of generated images, (N,) and (N, classes) each: in one batch, unless batch
    normalization would then mix the two."""
    if any(isinstance(module, nn.BatchNorm2d) for module in discriminator.modules()):
        return *discriminator(real), *discriminator(fake)
    scores, logits = discriminator(torch.cat([real, fake.to(real.dtype)]))  # (2 N, C, 32, 32) -> (2 N,)
    real_logits, fake_logits = logits.chunk(2) if logits is not None else (None, None)
    return scores[: len(real)], real_logits, scores[len(real) :], fake_logits


def d_loss(
    args,
    discriminator: nn.Module,
    real: Tensor,
    labels: Tensor,
    fake: Tensor,
    fake_labels: Tensor,
    score: Callable = score_both,
) -> tuple[Tensor, Tensor]:
    """What the discriminator minimizes on images (N, C, 32, 32) with labels (N,), which ACGAN alone reads; and the mean
    score of real images minus the mean score of generated ones, for WGAN the critic's estimate of the Wasserstein
    distance.

    args: model, and for WGAN-GP penalty, for ACGAN class_weight. score: a function like `score_both`.
    """
    real_score, real_logits, fake_score, fake_logits = score(discriminator, real, fake)
    if args.model == "dcgan":  # Goodfellow et al. 2014: -log sigmoid(D(x)) - log(1 - sigmoid(D(G(z))))
        loss = F.softplus(-real_score).mean() + F.softplus(fake_score).mean()
    if args.model == "wgan":  # Arjovsky et al. 2017, equation 2; `clip_weights` after each step
        loss = fake_score.mean() - real_score.mean()
    if args.model == "wgan-gp":  # Gulrajani et al. 2017, equation 3
        loss = fake_score.mean() - real_score.mean()
        loss = loss + args.penalty * gradient_penalty(discriminator, real, fake)
    if args.model == "acgan":  # Odena et al. 2017, section 3: L_S + L_C
        loss = F.softplus(-real_score).mean() + F.softplus(fake_score).mean()
        class_loss = F.cross_entropy(real_logits, labels) + F.cross_entropy(fake_logits, fake_labels)
        loss = loss + args.class_weight * class_loss
    return loss, real_score.mean() - fake_score.mean()


def g_loss(args, discriminator: nn.Module, fake: Tensor, fake_labels: Tensor) -> Tensor:
    """What the generator minimizes: the discriminator's judgement of its images `fake` (N, C, 32, 32)."""
    score, logits = discriminator(fake)
    if args.model == "dcgan":  # -log sigmoid(D(G(z))), which does not saturate if the discriminator is sure
        loss = F.softplus(-score).mean()
    if args.model in ("wgan", "wgan-gp"):
        loss = -score.mean()
    if args.model == "acgan":
        loss = F.softplus(-score).mean() + args.class_weight * F.cross_entropy(logits, fake_labels)
    return loss


def gradient_penalty(discriminator: nn.Module, real: Tensor, fake: Tensor, t: Tensor | None = None) -> Tensor:
    """WGAN-GP: E[(|grad D(x_hat)| - 1)^2] for x_hat = t x + (1 - t) G(z) (Gulrajani et al. 2017, equation 3, without
    lambda). The norm is over all pixels and channels of an image; real, fake: (N, C, H, W).

    t: (N, 1, 1, 1), the interpolation weight, one per image; uniformly random if None.
    """
    t = torch.rand(len(real), 1, 1, 1, device=real.device) if t is None else t
    x_hat = (t * real + (1 - t) * fake).detach().requires_grad_(True)
    scores, _ = discriminator(x_hat)
    with only_input_gradients():
        (gradient,) = torch.autograd.grad(scores.sum(), x_hat, create_graph=True)  # (N, C, H, W)
    return ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()  # (N, C * H * W) -> (N,) -> ()


@torch.no_grad()
def clip_weights(discriminator: nn.Module, limit: float):
    """WGAN: move every weight of the critic into [-limit, limit] (algorithm 1)."""
    for weight in discriminator.parameters():
        weight.clamp_(-limit, limit)


# -------------------------------------------------------------------------------------------------------- the networks


class Generator(nn.Module):
    """Noise (N, noise), and for ACGAN labels (N,), to images (N, channels, 32, 32) in [-1, 1]."""

    def __init__(self, noise: int, classes: int, first: int, layers: nn.Module):
        """first: channels of the 4 x 4 feature map with which `layers` begin; classes: 0 without labels."""
        super().__init__()
        self.noise = noise
        self.classes = classes
        self.first = first
        self.project = nn.Linear(noise + classes, first * 4 * 4)
        self.layers = layers

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.classes:
            noise = torch.cat([noise, F.one_hot(labels, self.classes).to(noise.dtype)], 1)  # (N, noise + classes)
        x = self.project(noise).view(-1, self.first, 4, 4)  # (N, first * 16) -> (N, first, 4, 4)
        return self.layers(x.contiguous(memory_format=torch.channels_last))


class Discriminator(nn.Module):
    """Images (N, channels, 32, 32) to (scores (N,), class logits (N, classes) or None)."""

    def __init__(self, layers: nn.Module, features: int, classes: int):
        """layers: images to features (N, features); classes: 0 without an auxiliary classifier."""
        super().__init__()
        self.layers = layers
        self.score = nn.Linear(features, 1)
        self.classify = nn.Linear(features, classes) if classes else None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.layers(images)  # (N, channels, 32, 32) -> (N, features)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round the scores to three digits
            x = x.float() if x.dtype == torch.bfloat16 else x
            return self.score(x).squeeze(1), self.classify(x) if self.classify else None


def dcgan_generator(channels: int, width: int, noise: int, classes: int) -> Generator:
    """Radford et al. 2015, with one layer less: transposed convolutions, batch normalization, ReLU, tanh at the end."""
    layers = [nn.BatchNorm2d(4 * width), nn.ReLU()]
    for c_in, c_out in ((4 * width, 2 * width), (2 * width, width)):
        # (N, 4 w, 4, 4) -> (N, 2 w, 8, 8) -> (N, w, 16, 16)
        layers += [Upsample(c_in, c_out, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
    layers += [Upsample(width, channels), nn.Tanh()]  # (N, w, 16, 16) -> (N, channels, 32, 32)
    return Generator(noise, classes, 4 * width, nn.Sequential(*layers))


def dcgan_discriminator(channels: int, width: int, classes: int, bn: bool) -> Discriminator:
    """Radford et al. 2015, with one layer less: strided convolutions and LeakyReLU. bn: batch normalization in all
    layers but the first."""
    layers, sizes = [], [channels, width, 2 * width, 4 * width]
    for i, (c_in, c_out) in enumerate(zip(sizes, sizes[1:])):
        # (N, channels, 32, 32) -> (N, w, 16, 16) -> (N, 2 w, 8, 8) -> (N, 4 w, 4, 4)
        normalize = bn and i > 0
        layers += [Downsample(c_in, c_out, bias=not normalize)]
        layers += [nn.BatchNorm2d(c_out)] if normalize else []
        layers += [LeakyReLU(0.2)]
    return Discriminator(nn.Sequential(*layers, nn.Flatten()), 4 * width * 4 * 4, classes)


class ResidualBlock(nn.Module):
    """Pre-activation block of Gulrajani et al. 2017, appendix: x + conv(relu(norm(conv(relu(norm(x)))))).

    resize: "up" doubles the side (nearest neighbour), "down" halves it (mean), None keeps it. bn: batch normalization,
    for the generator. first: the input is an image, so no ReLU comes before it. The shortcut is the identity if the
    number of channels stays; the authors' code has a convolution there if the block resizes.
    """

    def __init__(self, c_in: int, c_out: int, resize: str | None = None, bn: bool = False, first: bool = False):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(c_in) if bn else nn.Identity()
        self.norm2 = nn.BatchNorm2d(c_out) if bn else nn.Identity()
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.resize, self.first = resize, first

    def forward(self, x: Tensor) -> Tensor:
        up = self.resize == "up"
        h = x if self.first else F.relu(self.norm1(x))
        h = self.conv1(F.interpolate(h, scale_factor=2) if up else h)
        h = self.conv2(F.relu(self.norm2(h)))
        x = self.shortcut(F.interpolate(x, scale_factor=2) if up else x)
        return F.avg_pool2d(x + h, 2) if self.resize == "down" else x + h


class MeanPool(nn.Module):
    """(N, C, H, W) -> (N, C): the mean over all pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def resnet_generator(channels: int, width: int, noise: int, classes: int) -> Generator:
    """Gulrajani et al. 2017, for CIFAR-10: three residual blocks of 2 w channels (128 at width 64)."""
    c = 2 * width
    blocks = [ResidualBlock(c, c, "up", bn=True) for _ in range(3)]  # (N, c, 4, 4) -> (N, c, 32, 32)
    layers = [*blocks, nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, channels, 3, padding=1), nn.Tanh()]
    return Generator(noise, classes, c, nn.Sequential(*layers))


def resnet_discriminator(channels: int, width: int, classes: int) -> Discriminator:
    """Gulrajani et al. 2017, for CIFAR-10: four residual blocks of 2 w channels, without normalization."""
    c = 2 * width
    blocks = [ResidualBlock(channels, c, "down", first=True), ResidualBlock(c, c, "down")]  # (N, c, 8, 8)
    blocks += [ResidualBlock(c, c), ResidualBlock(c, c)]
    return Discriminator(nn.Sequential(*blocks, nn.ReLU(), MeanPool()), c, classes)


def acgan_generator(channels: int, width: int, noise: int, classes: int) -> Generator:
    """Odena et al. 2017, for CIFAR-10 (table 2): 384, 192 and 96 channels at width 64, kernels of 5 x 5."""
    c = [6 * width, 3 * width, max(1, 3 * width // 2)]
    layers = [nn.ReLU()]
    for c_in, c_out in zip(c, c[1:]):  # (N, 6 w, 4, 4) -> (N, 3 w, 8, 8) -> (N, 1.5 w, 16, 16)
        layers += [nn.ConvTranspose2d(c_in, c_out, 5, 2, 2, output_padding=1, bias=False)]
        layers += [nn.BatchNorm2d(c_out), nn.ReLU()]
    layers += [nn.ConvTranspose2d(c[2], channels, 5, 2, 2, output_padding=1), nn.Tanh()]  # (N, channels, 32, 32)
    return Generator(noise, classes, c[0], nn.Sequential(*layers))


def acgan_discriminator(channels: int, width: int, classes: int) -> Discriminator:
    """Odena et al. 2017, for CIFAR-10 (table 2): six convolutions, 16 to 512 channels at width 64, half of the units
    dropped out after each."""
    sizes = [max(1, width * 2**i // 4) for i in range(6)]
    layers, c_in = [], channels
    for i, c_out in enumerate(sizes):  # (N, channels, 32, 32) -> (N, 16, 16, 16) -> ... -> (N, 512, 4, 4)
        layers += [nn.Conv2d(c_in, c_out, 3, 1 + (i % 2 == 0), 1, bias=i == 0)]
        layers += [nn.BatchNorm2d(c_out)] if i else []
        layers += [nn.LeakyReLU(0.2), nn.Dropout(0.5)]
        c_in = c_out
    return Discriminator(nn.Sequential(*layers, nn.Flatten()), sizes[-1] * 4 * 4, classes)


# ------------------------------------------------------------------------------------------------ all of them together


class GAN(nn.Module):
    """generator, discriminator, and ema, the exponential moving average of the generator.

    Its state dict is one flat dict whose names begin with these three words.
    """

    def __init__(self, generator: Generator, discriminator: Discriminator):
        super().__init__()
        self.generator, self.discriminator = generator, discriminator
        self.ema = copy.deepcopy(generator).requires_grad_(False)

    @torch.no_grad()
    def update_ema(self, decay: float, step: int):
        """Move the average towards the generator after its step number `step`. Early on the average is shorter, or it
        would still contain the initial weights."""
        weight = 1 - min(decay, (1 + step) / (10 + step))
        averages, new = (  # weights, and the means and variances of batch normalization
            [tensor for tensor in net.state_dict().values() if tensor.is_floating_point()]
            for net in (self.ema, self.generator)
        )
        torch._foreach_lerp_(averages, new, weight)


def build(
    name: str, network: str, channels: int, classes: int, width: int, noise: int = 100, spectral: bool = False
) -> GAN:
    """The networks of the model `name`, one of MODELS, with weights from torch's generator.

    network: "plain", the same for all four, without normalization in the discriminator; or "paper", the network of the
    model's own paper. classes: of the data; only ACGAN uses them. spectral: spectral normalization (Miyato et al. 2018)
    in the discriminator.
    """
    classes = classes if name == "acgan" else 0
    if network == "paper" and name == "wgan-gp":
        parts = resnet_generator(channels, width, noise, 0), resnet_discriminator(channels, width, 0)
    elif network == "paper" and name == "acgan":
        parts = acgan_generator(channels, width, noise, classes), acgan_discriminator(channels, width, classes)
    else:
        bn = network == "paper"
        parts = dcgan_generator(channels, width, noise, classes), dcgan_discriminator(channels, width, classes, bn)
    for part in parts:
        initialize(part)
    if spectral:
        for module in parts[1].modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                spectral_norm(module)
    return GAN(*parts)


@torch.no_grad()
def initialize(net: nn.Module):
    """Weights as in DCGAN's paper if the network has batch normalization: a standard deviation of 0.02. Without it
    the signal would shrink from layer to layer, so convolutions have the standard deviation of He et al. 2015, and
    linear layers 1 / sqrt(fan in)."""
    normalized = any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            fan_in = module.weight[0].numel()
            if normalized:
                std = 0.02
            elif isinstance(module, nn.Conv2d):
                std = math.sqrt(2 / fan_in)
            else:
                std = fan_in**-0.5
            nn.init.normal_(module.weight, 0.0, std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
