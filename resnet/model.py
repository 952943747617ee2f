"""Residual networks, written out from the papers: for CIFAR-10, for MNIST, for ImageNet.

A block adds its input to its output, y = relu(F(x) + x). A block that is not needed can learn F = 0, which is easy, and
the gradient reaches early layers through the sum as well as through the convolutions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CIFAR_DEPTHS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110)}
IMAGENET_DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
NAMES = (*CIFAR_DEPTHS, "mnist", *IMAGENET_DEPTHS)
SHORTCUTS = ("A", "B", "none")


def conv(c_in: int, c_out: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps height and width (divided by `stride`). No bias: batch normalization follows."""
    return nn.Conv2d(c_in, c_out, size, stride, padding=size // 2, bias=False)


def mean_over_pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C). The gradient of pooling is channels last in memory, like x. That of `x.mean((2, 3))`, or
    of `x[:, :, ::2, ::2]`, is not, and the backward pass of the next ReLU then takes many times as long."""
    return F.avg_pool2d(x, x.shape[2:]).flatten(1)


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2015, figure 2, and section 4.2 for CIFAR).

    shortcut: if the shape changes, "A" takes every second pixel and appends channels of zeros (no parameters), "B"
    is a 1 x 1 convolution. "none" leaves the shortcut out of every block: a plain network.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, shortcut: str = "A"):
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, c_out, 3, stride), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = conv(c_out, c_out, 3), nn.BatchNorm2d(c_out)
        self.stride = stride
        self.new_channels = c_out - c_in
        self.shortcut = shortcut
        if shortcut == "B" and (stride > 1 or self.new_channels):
            self.project = nn.Sequential(conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) -> (N, c_out, H / stride, W / stride)"""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.shortcut == "none":
            return F.relu(out, inplace=True)
        if hasattr(self, "project"):
            x = self.project(x)
        elif self.stride > 1 or self.new_channels:  # (N, c_in, H, W) -> (N, c_out, H / stride, W / stride)
            x = F.pad(F.avg_pool2d(x, 1, self.stride), (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(out.add_(x), inplace=True)  # in place: blocks are limited by memory, not by arithmetic


def blocks(n: int, c_in: int, c_out: int, shortcut: str) -> nn.Sequential:
    """n blocks that take c_in channels to c_out; if these differ, the first block halves the side of the image."""
    first = Block(c_in, c_out, 1 if c_in == c_out else 2, shortcut)
    others = [Block(c_out, c_out, 1, shortcut) for _ in range(n - 1)]
    return nn.Sequential(first, *others)


class CifarResNet(nn.Module):
    """ResNet-20, 32, 44, 56, 110 (He et al. 2015, section 4.2): depth = 6 n + 2, with n blocks each of 16, 32 and 64
    channels at 32, 16 and 8 pixels, the mean over pixels, and one linear layer."""

    def __init__(self, depth: int = 20, num_classes: int = 10, shortcut: str = "A"):
        super().__init__()
        n = (depth - 2) // 6
        self.conv1, self.bn1 = conv(3, 16, 3), nn.BatchNorm2d(16)
        self.layer1 = blocks(n, 16, 16, shortcut)
        self.layer2 = blocks(n, 16, 32, shortcut)
        self.layer3 = blocks(n, 32, 64, shortcut)
        self.fc = nn.Linear(64, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) -> logits (N, num_classes); other sizes work too."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # (N, 3, 32, 32) -> (N, 16, 32, 32)
        x = self.layer3(self.layer2(self.layer1(x)))  # -> (N, 32, 16, 16) -> (N, 64, 8, 8)
        return self.fc(mean_over_pixels(x))  # -> (N, 64) -> (N, num_classes)


class MnistResNet(nn.Module):
    """A small residual network for grey images of 28 x 28: three blocks, the first at 14 x 14 pixels."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.conv1, self.bn1 = conv(1, 16, 5, 2), nn.BatchNorm2d(16)
        self.layer1 = Block(16, 32, 1)
        self.layer2 = Block(32, 64, 2)
        self.layer3 = Block(64, 64, 1)
        self.fc = nn.Linear(64, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 28, 28) -> logits (N, num_classes)"""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # (N, 1, 28, 28) -> (N, 16, 14, 14)
        x = self.layer3(self.layer2(self.layer1(x)))  # -> (N, 32, 14, 14) -> (N, 64, 7, 7) -> (N, 64, 7, 7)
        return self.fc(x.amax((2, 3)))  # -> (N, 64) -> (N, num_classes)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions, for ResNet-18 and 34 (He et al. 2015, figure 5 left)."""

    expansion = 1

    def __init__(self, c_in: int, planes: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3), nn.BatchNorm2d(planes)
        self.downsample = projection(c_in, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) -> (N, planes, H / stride, W / stride)"""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out.add_(self.downsample(x) if self.downsample else x), inplace=True)


class Bottleneck(nn.Module):
    """1 x 1 down to `planes` channels, 3 x 3, 1 x 1 up to four times as many (He et al. 2015, figure 5 right).

    The stride is in the 3 x 3 convolution ("v1.5"). The paper has it in the first 1 x 1, which ignores three of four
    pixels.
    """

    expansion = 4

    def __init__(self, c_in: int, planes: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, planes, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = conv(planes, 4 * planes, 1), nn.BatchNorm2d(4 * planes)
        self.downsample = projection(c_in, 4 * planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) -> (N, 4 planes, H / stride, W / stride)"""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return F.relu(out.add_(self.downsample(x) if self.downsample else x), inplace=True)


def projection(c_in: int, c_out: int, stride: int) -> nn.Sequential | None:
    """The 1 x 1 convolution of option B if the shape changes, else None."""
    if stride == 1 and c_in == c_out:
        return None
    return nn.Sequential(conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))


class ResNet(nn.Module):
    """ResNet-18, 34, 50, 101, 152 for ImageNet (He et al. 2015, table 1). Parameters have torchvision's names."""

    def __init__(self, name: str = "resnet50", num_classes: int = 1000):
        super().__init__()
        block = BasicBlock if name in ("resnet18", "resnet34") else Bottleneck
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64)
        c_in = 64
        for i, blocks in enumerate(IMAGENET_DEPTHS[name]):
            planes, stage = 64 * 2**i, []
            for k in range(blocks):
                stage.append(block(c_in, planes, 2 if i and not k else 1))
                c_in = planes * block.expansion
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.fc = nn.Linear(c_in, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 224, 224) -> logits (N, num_classes); other sizes work too."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # (N, 3, 224, 224) -> (N, 64, 112, 112)
        x = F.max_pool2d(x, 3, 2, padding=1)  # -> (N, 64, 56, 56)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # -> (N, 512 or 2048, 7, 7)
        return self.fc(mean_over_pixels(x))  # -> (N, 512 or 2048) -> (N, num_classes)


def build(name: str, num_classes: int, shortcut: str = "A") -> nn.Module:
    """The network `name`: resnet20 and the other CIFAR depths, mnist, resnet18 and the other ImageNet depths."""
    if name in CIFAR_DEPTHS:
        return CifarResNet(CIFAR_DEPTHS[name], num_classes, shortcut)
    return MnistResNet(num_classes) if name == "mnist" else ResNet(name, num_classes)


def initialize(model: nn.Module) -> None:
    """Draw the weights of convolutions from a normal distribution of variance 2 / fan in (CIFAR, MNIST) or 2 / fan out
    (ImageNet). With ReLU this keeps the variance constant through the layers in the forward, or in the backward, pass
    (He et al. 2015, "Delving deep into rectifiers")."""
    mode = "fan_out" if isinstance(model, ResNet) else "fan_in"
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")


@torch.no_grad()
def whiten(convolution: nn.Conv2d, images: Tensor) -> None:
    """Set the filters of a first convolution to the principal components of patches of `images` (N, C, H, W), scaled to
    unit variance, and to their negatives (after Page 2018, "How to train your ResNet", part 8)."""
    size, half = convolution.kernel_size[0], convolution.out_channels // 2
    patches = F.unfold(images, size).transpose(1, 2).flatten(0, 1)  # (N, C, H, W) -> (patches, C * size * size)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))  # ascending
    filters = (vectors[:, -half:] / values[-half:].clamp_min(1e-2).sqrt()).T  # (half, C * size * size)
    convolution.weight.copy_(torch.cat([filters, -filters]).view_as(convolution.weight))
