"""The plain definitions of the activations: differentiable, in any dtype, in fp64 the judge."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def tanh(x: Tensor) -> Tensor:
    return torch.tanh(x)


def relu(x: Tensor) -> Tensor:
    return torch.where(x <= 0, torch.zeros_like(x), x)


def leaky_relu(x: Tensor, negative_slope: float = 0.01) -> Tensor:
    return torch.where(x > 0, x, x * negative_slope)


def elu(x: Tensor, alpha: float = 1.0) -> Tensor:
    # NaN is on the side of the exponential, with its slope.
    negative = torch.where(x > 0, torch.zeros_like(x), x)
    return torch.where(x > 0, x, alpha * torch.expm1(negative))


_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946


def selu(x: Tensor) -> Tensor:
    return _SELU_SCALE * elu(x, _SELU_ALPHA)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * torch.erfc(-x * math.sqrt(0.5))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def swish(x: Tensor, beta: float | Tensor = 1.0) -> Tensor:
    return x * torch.sigmoid(beta * x)


def mish(x: Tensor) -> Tensor:
    return x * torch.tanh(F.softplus(x, threshold=40))


def per_channel(x: Tensor, parameter: Tensor) -> Tensor:
    """A parameter of one value, or of one per channel (dimension 1), ready to broadcast over x."""
    if parameter.numel() == 1 or x.dim() < 2:
        return parameter.reshape(())
    return parameter.reshape([-1 if d == 1 else 1 for d in range(x.dim())])


def prelu(x: Tensor, weight: Tensor) -> Tensor:
    return torch.where(x > 0, x, per_channel(x, weight) * x)


def swish_learnt(x: Tensor, beta: Tensor) -> Tensor:
    return swish(x, per_channel(x, beta))


# The derivatives in terms of the output, for what saves that.


def sigmoid_slope(dy: Tensor, saved: tuple, scalars: tuple) -> tuple[Tensor]:
    return (dy * (1 - saved[0]) * saved[0],)


def tanh_slope(dy: Tensor, saved: tuple, scalars: tuple) -> tuple[Tensor]:
    return (dy * (1 - saved[0] * saved[0]),)


def relu_slope(dy: Tensor, saved: tuple, scalars: tuple) -> tuple[Tensor]:
    return (torch.where(saved[0] <= 0, torch.zeros_like(dy), dy),)


def leaky_relu_slope(dy: Tensor, saved: tuple, scalars: tuple) -> tuple[Tensor]:
    return (torch.where(saved[0] > 0, dy, dy * scalars[0]),)
