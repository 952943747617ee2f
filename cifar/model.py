"""Two small convolutional networks for 32 x 32 colour images: LeNet-5 and SimpleNN.

Both return (logits, shapes): the output of every stage is as instructive as the output of the last.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"relu": F.relu, "swish": F.silu}  # swish(x) = x sigmoid(x): Ramachandran et al. 2017


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al. 1998, section II.B) with three input channels, ReLU and max-pooling, for CIFAR-100."""

    def __init__(self, num_classes: int = 100):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, kernel_size=5)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.fc1 = nn.Linear(16 * 5 * 5, 256)
        self.fc2 = nn.Linear(256, 128)
        self.fc3 = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[int, torch.Size]]:
        """x: (N, 3, 32, 32). Returns the logits (N, num_classes) and the shape after each of the six stages."""
        shapes = {}
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (N, 3, 32, 32) -> (N, 6, 28, 28) -> (N, 6, 14, 14)
        shapes[1] = x.shape
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (N, 6, 14, 14) -> (N, 16, 10, 10) -> (N, 16, 5, 5)
        shapes[2] = x.shape
        x = x.flatten(1)  # (N, 16, 5, 5) -> (N, 400)
        shapes[3] = x.shape
        x = F.relu(self.fc1(x))  # (N, 400) -> (N, 256)
        shapes[4] = x.shape
        x = F.relu(self.fc2(x))  # (N, 256) -> (N, 128)
        shapes[5] = x.shape
        logits = self.fc3(x)  # (N, 128) -> (N, num_classes)
        shapes[6] = logits.shape
        return logits, shapes


class SimpleNN(nn.Module):
    """Two convolutions, three linear layers, for CIFAR-10; batch normalization (Ioffe and Szegedy 2015) after each
    convolution and Swish for ReLU as options."""

    def __init__(self, num_classes: int = 10, bn: bool = False, activation: str = "relu"):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, kernel_size=5)
        self.conv2 = nn.Conv2d(8, 16, kernel_size=3)
        self.bn1 = nn.BatchNorm2d(8) if bn else nn.Identity()
        self.bn2 = nn.BatchNorm2d(16) if bn else nn.Identity()
        self.fc1 = nn.Linear(16 * 6 * 6, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> tuple[Tensor, dict[int, torch.Size]]:
        """x: (N, 3, 32, 32). Returns the logits (N, num_classes) and the shape after each of the six stages."""
        shapes, act = {}, self.activation
        x = F.max_pool2d(act(self.bn1(self.conv1(x))), 2)  # (N, 3, 32, 32) -> (N, 8, 28, 28) -> (N, 8, 14, 14)
        shapes[1] = x.shape
        x = F.max_pool2d(act(self.bn2(self.conv2(x))), 2)  # (N, 8, 14, 14) -> (N, 16, 12, 12) -> (N, 16, 6, 6)
        shapes[2] = x.shape
        x = x.flatten(1)  # (N, 16, 6, 6) -> (N, 576)
        shapes[3] = x.shape
        x = act(self.fc1(x))  # (N, 576) -> (N, 120)
        shapes[4] = x.shape
        x = act(self.fc2(x))  # (N, 120) -> (N, 84)
        shapes[5] = x.shape
        logits = self.fc3(x)  # (N, 84) -> (N, num_classes)
        shapes[6] = logits.shape
        return logits, shapes


def count_parameters_in_millions(model: nn.Module) -> float:
    """The number of trainable parameters in millions; `run.count_parameters` gives the number itself."""
    return sum(p.numel() for _, p in model.named_parameters() if p.requires_grad) / 1e6
