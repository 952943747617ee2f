"""Layers with the values and weights of PyTorch's, whose gradients are faster to compute.

`Downsample` and `Upsample` are the 4 x 4 convolution of stride 2 and the transposed one. In bfloat16 on a CPU, PyTorch
computes the gradient of their weights at a fraction of the speed of a matrix product where the images are small, and
the second derivatives by detours. Here the output y, the input x and the kernel w are tied by three sums of the same
products,

    Convolve                y[o, i, j] = sum over c, u, v of w[o, c, u, v] x[c, 2 i + u - 1, 2 j + v - 1]
    ConvolveTransposed      the gradient of x, from w and the gradient of y
    WeightGradient          the gradient of w, from x and the gradient of y

and the gradients of each are the other two, so WGAN-GP can differentiate twice. (StyleGAN2-ADA's conv2d_gradfix is
built the same way.)

`LeakyReLU` has no second derivative. PyTorch's has zeros, which the gradient penalty of WGAN-GP takes backwards through
the whole discriminator.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

with_weight_gradients = True  # `only_input_gradients` sets it


@contextlib.contextmanager
def only_input_gradients():
    """Within it, the weights of `Downsample` and `Upsample` have no gradients. `torch.autograd.grad` with respect to
    images does not tell a `Function` that nobody asks for its weights' gradients."""
    global with_weight_gradients
    with_weight_gradients = False
    try:
        yield
    finally:
        with_weight_gradients = True


class Convolve(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (N, C, 2 H, 2 W), weight (O, C, 4, 4), bias (O,) -> (N, O, H, W)"""
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, stride=2, padding=1)

    @staticmethod
    def backward(ctx, y: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        x_grad = None
        weight_grad = None
        bias_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = ConvolveTransposed.apply(y, weight, None)
        if ctx.needs_input_grad[1] and with_weight_gradients:
            weight_grad = WeightGradient.apply(x, y)
        if ctx.needs_input_grad[2] and with_weight_gradients:
            bias_grad = y.sum((0, 2, 3))
        return x_grad, weight_grad, bias_grad


class ConvolveTransposed(Function):
    @staticmethod
    def forward(ctx, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """y (N, O, H, W), weight (O, C, 4, 4), bias (C,) -> (N, C, 2 H, 2 W)"""
        ctx.save_for_backward(y, weight)
        return F.conv_transpose2d(y, weight, bias, stride=2, padding=1)

    @staticmethod
    def backward(ctx, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        y, weight = ctx.saved_tensors
        y_grad = None
        weight_grad = None
        bias_grad = None
        if ctx.needs_input_grad[0]:
            y_grad = Convolve.apply(x, weight, None)
        if ctx.needs_input_grad[1] and with_weight_gradients:
            weight_grad = WeightGradient.apply(x, y)
        if ctx.needs_input_grad[2] and with_weight_gradients:
            bias_grad = x.sum((0, 2, 3))
        return y_grad, weight_grad, bias_grad


class WeightGradient(Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        """x (N, C, 2 H, 2 W), y (N, O, H, W) -> (O, C, 4, 4)"""
        ctx.save_for_backward(x, y)
        channels = x.shape[1]
        if y.shape[-1] > 4:  # here PyTorch is as fast
            shape = (y.shape[1], channels, 4, 4)
            return torch.nn.grad.conv2d_weight(x, shape, y, stride=2, padding=1)
        windows = F.pad(x, (1, 1, 1, 1)).unfold(2, 4, 2).unfold(3, 4, 2)  # (N, C, H, W, 4, 4), a view
        windows = windows.permute(0, 2, 3, 4, 5, 1).reshape(-1, 16 * channels)  # (N H W, 16 C), a copy
        y = y.permute(0, 2, 3, 1).flatten(0, 2)  # (N H W, O)
        return (y.T @ windows).unflatten(1, (4, 4, channels)).permute(0, 3, 1, 2)  # (O, 16 C) -> (O, C, 4, 4)

    @staticmethod
    def backward(ctx, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, y = ctx.saved_tensors
        x_grad, y_grad = None, None
        if ctx.needs_input_grad[0]:
            x_grad = ConvolveTransposed.apply(y, weight, None)
        if ctx.needs_input_grad[1]:
            y_grad = Convolve.apply(x, weight, None)
        return x_grad, y_grad


class Downsample(nn.Conv2d):
    """(N, C, 2 H, 2 W) -> (N, O, H, W): the convolution of 4 x 4, stride 2, padding 1."""

    def __init__(self, c_in: int, c_out: int, bias: bool = True):
        super().__init__(c_in, c_out, 4, 2, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not in_bfloat16(x):
            return super().forward(x)
        return Convolve.apply(*to_bfloat16(x, self.weight, self.bias))


class Upsample(nn.ConvTranspose2d):
    """(N, C, H, W) -> (N, O, 2 H, 2 W): the transposed convolution of 4 x 4, stride 2, padding 1."""

    def __init__(self, c_in: int, c_out: int, bias: bool = True):
        super().__init__(c_in, c_out, 4, 2, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not in_bfloat16(x):
            return super().forward(x)
        return ConvolveTransposed.apply(*to_bfloat16(x, self.weight, self.bias))


def in_bfloat16(x: Tensor) -> bool:
    """Is this a CPU that computes in bfloat16? In float32, and on GPUs, PyTorch's weight gradients are no slower."""
    return x.device.type == "cpu" and torch.is_autocast_enabled("cpu")


def to_bfloat16(*tensors: Tensor | None) -> list[Tensor | None]:
    """As autocast does for PyTorch's own layers."""
    return [None if tensor is None else tensor.to(torch.bfloat16) for tensor in tensors]


class LeakyReLUFunction(Function):
    @staticmethod
    def forward(ctx, x: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope = slope
        return F.leaky_relu(x, slope)

    @staticmethod
    def backward(ctx, y: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if x.is_contiguous(memory_format=torch.channels_last):
            y = y.contiguous(memory_format=torch.channels_last)  # two layouts in one operation are ten times slower
        return torch.ops.aten.leaky_relu_backward(y, x.detach(), ctx.slope, False), None


class LeakyReLU(nn.LeakyReLU):
    """max(x, slope x)"""

    def forward(self, x: Tensor) -> Tensor:
        return LeakyReLUFunction.apply(x, self.negative_slope)
