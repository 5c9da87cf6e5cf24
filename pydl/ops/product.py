"""Products of matrices within ops: on the CPU by a kernel, so that the same numbers give the same
bits, which a BLAS does not promise for other threads or other addresses."""

from __future__ import annotations

from math import prod

import torch.nn.functional as F
from torch import Tensor

from pydl import autograd
from pydl.autograd import Rule, wide
from pydl.backends import kernel


def product(backend: str, a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of (batch, M, K) and (batch, K, N), of one dtype, fp32 at least."""
    if backend == "torch" or a.device.type != "cpu":
        return a @ b
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    kernel("cpu", "product")(out, a, b)
    return out


def _matrix(x: Tensor) -> Tensor:
    """(1, rows, columns), in what is computed in."""
    return wide(x).reshape(1, prod(x.shape[:-1]), x.shape[-1])


def _forward(backend: str, x: Tensor, weight: Tensor) -> Tensor:
    out = product(backend, _matrix(x), wide(weight).t()[None])
    return out.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _backward(backend: str, dy: Tensor, saved: tuple, scalars: tuple, needs: tuple) -> tuple:
    x, weight = saved
    dy3 = _matrix(dy)
    dx = dweight = None
    if needs[0]:
        dx = product(backend, dy3, wide(weight)[None]).to(x.dtype).view(x.shape)
    if needs[1]:
        dweight = product(backend, dy3.transpose(1, 2), _matrix(x))[0].to(weight.dtype)
    return dx, dweight


_linear = autograd.make(Rule("linear", 2, _forward, _backward, F.linear))


def linear(backend: str, x: Tensor, weight: Tensor) -> Tensor:
    """`torch.nn.functional.linear` without a bias, of tensors of one dtype."""
    if backend in ("torch", "reference") or x.device.type != "cpu":
        return F.linear(x, weight)
    return _linear(backend, x, weight)
