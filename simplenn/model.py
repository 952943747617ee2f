"""A small CNN in two forms, built from PyTorch's layers and from our own, an MLP, and the CNN that trains fastest.

All networks take images (N, C, H, W) and return logits (N, classes); the MLP also takes vectors (N, inputs).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "leaky": nn.LeakyReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """A number as (number, number), as the arguments of a convolution allow."""
    return (value, value) if isinstance(value, int) else tuple(value)


def uniform_init(weight: Tensor, bias: Tensor | None) -> None:
    """PyTorch's default for convolutions and linear layers: uniform in +-1 / sqrt(fan-in), the weight first.

    For the weight, kaiming_uniform_ with a = sqrt(5) has that bound: sqrt(6 / (1 + 5)) / sqrt(fan-in).
    """
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    if bias is not None:
        bound = 1 / math.sqrt(weight[0].numel())
        nn.init.uniform_(bias, -bound, bound)


class CustomLinear(nn.Module):
    """y = x W^T + b with the arguments, parameters, initialization and state dict of nn.Linear."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(self.weight.new_empty(out_features)) if bias else None)
        uniform_init(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features)."""
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class CustomConv2d(nn.Module):
    """A convolution as a matrix product, with the arguments, parameters, initialization and state dict of nn.Conv2d.

    Every window of the image becomes a column (im2col; Chellapilla et al. 2006), and one product with the filters as
    rows is the convolution. padding: a number, a pair, "same" or "valid"; always with zeros.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"{in_channels} and {out_channels} channels do not divide into {groups} groups")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.groups = groups
        self.padding = padding
        self.kernel_size = pair(kernel_size)
        self.stride = pair(stride)
        self.dilation = pair(dilation)
        if padding == "same" and self.stride != (1, 1):
            raise ValueError('padding "same" needs stride 1')
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise ValueError('padding must be a number, a pair, "same" or "valid"')
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(self.weight.new_empty(out_channels)) if bias else None)
        uniform_init(self.weight, self.bias)

    def pad(self, x: Tensor) -> Tensor:
        """The images with zeros around them."""
        if self.padding == "same":  # an odd total puts the extra zero right and below, as PyTorch does
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size)]
            (top, left), (bottom, right) = [t // 2 for t in total], [t - t // 2 for t in total]
        else:
            top, left = bottom, right = (0, 0) if self.padding == "valid" else pair(self.padding)
        return F.pad(x, (left, right, top, bottom)) if top or left or bottom or right else x

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C_in, H, W) -> (N, C_out, H', W'); or one image, (C_in, H, W) -> (C_out, H', W')."""
        if x.dim() == 3:
            return self(x[None])[0]
        x = self.pad(x)
        height, width = (
            (size - d * (k - 1) - 1) // s + 1
            for size, d, k, s in zip(x.shape[2:], self.dilation, self.kernel_size, self.stride)
        )
        windows = F.unfold(x, self.kernel_size, self.dilation, 0, self.stride)  # (N, C_in * k * k, H' * W')
        windows = windows.unflatten(1, (self.groups, -1))  # (N, groups, C_in / groups * k * k, H' * W')
        filters = self.weight.flatten(1).unflatten(
            0, (self.groups, -1)
        )  # (groups, C_out / groups, C_in / groups * k * k)
        y = (filters @ windows).flatten(1, 2)  # (N, groups, C_out / groups, H' * W') -> (N, C_out, H' * W')
        if self.bias is not None:
            y = y + self.bias[:, None]
        return y.unflatten(2, (height, width))

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
        )


class SimpleNN(nn.Module):
    """Three convolutions, each with ReLU and max-pooling, and two linear layers: for 3 x 32 x 32 or 1 x 28 x 28.

    conv, linear: the classes of its layers, nn.Conv2d and nn.Linear or CustomConv2d and CustomLinear.
    """

    def __init__(
        self,
        channels: int = 1,
        size: int = 28,
        num_classes: int = 10,
        dropout: float = 0.0,
        conv: Callable = nn.Conv2d,
        linear: Callable = nn.Linear,
    ):
        super().__init__()
        self.conv1 = conv(channels, 16, kernel_size=3, padding=1)
        self.conv2 = conv(16, 32, kernel_size=3, padding=1)
        self.conv3 = conv(32, 64, kernel_size=3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = linear(64 * (size // 8) ** 2, 128)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, channels, size, size). Returns the logits (N, num_classes). The shapes are for MNIST."""
        x = self.pool(F.relu(self.conv1(x)))  # (N, 1, 28, 28) -> (N, 16, 28, 28) -> (N, 16, 14, 14)
        x = self.pool(F.relu(self.conv2(x)))  # (N, 16, 14, 14) -> (N, 32, 14, 14) -> (N, 32, 7, 7)
        x = self.pool(F.relu(self.conv3(x)))  # (N, 32, 7, 7) -> (N, 64, 7, 7) -> (N, 64, 3, 3)
        x = F.relu(self.fc1(x.flatten(1)))  # (N, 64, 3, 3) -> (N, 576) -> (N, 128)
        return self.fc2(self.dropout(x))  # (N, 128) -> (N, num_classes)


class MLP(nn.Sequential):
    """Fully connected layers of the given sizes, [inputs, hidden, ..., outputs], with an activation between them.

    dropout: the probability with which a hidden unit is dropped (Srivastava et al. 2014).
    """

    def __init__(self, sizes: list[int], activation: str = "relu", dropout: float = 0.0):
        layers = [nn.Flatten()]
        for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
            if i:
                layers.append(ACTIVATIONS[activation]())
            if i and dropout:
                layers.append(nn.Dropout(dropout))
            layers.append(nn.Linear(inputs, outputs))
        super().__init__(*layers)


class CNN(nn.Module):
    """The network for the best recipe on MNIST: three convolutions, each max-pooled and batch-normalized (Ioffe and
    Szegedy 2015), and one linear layer. widths: the channels of the convolutions.

    Pooling comes before batch normalization and ReLU, which then have a quarter of the work. With ReLU alone the order
    would make no difference.
    """

    def __init__(self, num_classes: int = 10, widths: tuple = (16, 32, 64), dropout: float = 0.0, channels: int = 1):
        super().__init__()
        a, b, c = widths
        self.conv1, self.bn1 = nn.Conv2d(channels, a, 5, padding=2, bias=False), nn.BatchNorm2d(a)
        self.conv2, self.bn2 = nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b)
        self.conv3, self.bn3 = nn.Conv2d(b, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(c * 3 * 3, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, channels, 28, 28). Returns the logits (N, num_classes)."""
        x = F.relu(self.bn1(F.max_pool2d(self.conv1(x), 2)))  # (N, 1, 28, 28) -> (N, a, 14, 14)
        x = F.relu(self.bn2(F.max_pool2d(self.conv2(x), 2)))  # (N, a, 14, 14) -> (N, b, 7, 7)
        x = F.relu(self.bn3(F.max_pool2d(self.conv3(x), 2)))  # (N, b, 7, 7) -> (N, c, 3, 3)
        return self.fc(self.dropout(x.flatten(1)))  # (N, c * 9) -> (N, num_classes)
