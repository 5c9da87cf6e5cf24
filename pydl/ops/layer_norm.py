"""Normalisation over the last dimensions: layer_norm and rms_norm."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from pydl import autograd
from pydl.autograd import Rule
from pydl.backends import FLOATS, empty, empty_like, kernel
from pydl.ops.channels import channels_last
from pydl.ops.integers import is_integer
from pydl.ops.norm_checks import check_weight, choose
from pydl.traced import hand_over, proxied


def layer_norm_definition(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float
) -> Tensor:
    over = tuple(range(-dims, 0))
    d = x - x.mean(over, keepdim=True)
    d = d - d.mean(over, keepdim=True)  # what rounding has left of a large mean
    y = d * torch.rsqrt((d * d).mean(over, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def rms_norm_definition(x: Tensor, weight: Tensor | None, dims: int, eps: float) -> Tensor:
    over = tuple(range(-dims, 0))
    y = x * torch.rsqrt((x * x).mean(over, keepdim=True) + eps)
    return y if weight is None else y * weight


def as_rows(x: Tensor, dims: int) -> Tensor:
    """(rows, columns), dense; x itself where it is that."""
    if dims == 1 and x.dim() == 2 and x.is_contiguous():
        return x
    n = prod(x.shape[x.dim() - dims :])
    return x.contiguous().view(prod(x.shape[: x.dim() - dims]), n)


def flat(weight: Tensor | None) -> Tensor | None:
    if weight is None or (weight.dim() == 1 and weight.is_contiguous()):
        return weight
    return weight.reshape(-1).contiguous()


def numbers(x2: Tensor) -> Tensor:
    """Where the kernels put a number a row."""
    return empty(x2, autograd.wide_dtype(x2), x2.shape[0])


def sums(x2: Tensor, weights: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """Where the gradients of weights go, and the fp64 scratch of (pieces, 2, columns); without
    elements where they are not wanted.

    The number of pieces depends on sizes only, so that the same bits come out each time.
    """
    rows, n = x2.shape
    found = []
    for weight, need in zip(weights, needs, strict=True):
        wanted = weight is not None and need
        dtype = weight.dtype if weight is not None else torch.float32
        found.append(empty(x2, dtype, n if wanted else 0))
    # Of long rows, which several blocks share, fewer: their sums are long too.
    most = (2112 if n <= 512 else min(528, 528 * 4096 // n)) if x2.is_cuda else 32
    pieces = max(1, min(most, rows // 4)) if any(f.numel() for f in found) else 0
    found.append(empty(x2, torch.float64, pieces, 2, n))
    return found


def shaped(grad: Tensor, weight: Tensor | None) -> Tensor | None:
    if weight is None or not grad.numel():
        return None
    return grad if weight.dim() == 1 else grad.view(weight.shape)


def _forward(
    backend: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x2 = as_rows(x, dims)
    y, mean, rstd = empty_like(x2), numbers(x2), numbers(x2)
    kernel(backend, "layer_norm_fwd")(y, mean, rstd, x2, flat(weight), flat(bias), eps)
    # Detached, the output is no view, which torch would not let be changed in place.
    return y if x2 is x else y.view(x.shape).detach(), mean, rstd


def _backward(backend: str, dy: Tensor, saved: tuple, scalars: tuple, needs: tuple) -> tuple:
    x, weight, bias, mean, rstd = saved
    x2 = as_rows(x, scalars[0])
    dx = empty_like(x2)
    dweight, dbias, partials = sums(x2, (weight, bias), needs[1:])
    kernel(backend, "layer_norm_bwd")(
        dx, dweight, dbias, partials, as_rows(dy, scalars[0]), x2, mean, rstd, flat(weight)
    )
    dx = dx if x2 is x else dx.view(x.shape)
    return dx, shaped(dweight, weight), shaped(dbias, bias)


def _laid_out(y: Tensor, x: Tensor) -> Tensor:
    """torch's rms_norm keeps channels last, of a tensor with gaps too."""
    if not channels_last(x):
        return y
    form = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return y.contiguous(memory_format=form)


def _rms_forward(
    backend: str, x: Tensor, weight: Tensor | None, dims: int, eps: float
) -> tuple[Tensor, Tensor]:
    x2 = as_rows(x, dims)
    y, rstd = empty_like(x2), numbers(x2)
    kernel(backend, "rms_norm_fwd")(y, rstd, x2, flat(weight), eps)
    return y if x2 is x else _laid_out(y.view(x.shape).detach(), x), rstd


def _rms_backward(backend: str, dy: Tensor, saved: tuple, scalars: tuple, needs: tuple) -> tuple:
    x, weight, rstd = saved
    x2 = as_rows(x, scalars[0])
    dx = empty_like(x2)
    dweight, partials = sums(x2, (weight,), needs[1:])
    kernel(backend, "rms_norm_bwd")(
        dx, dweight, partials, as_rows(dy, scalars[0]), x2, rstd, flat(weight)
    )
    return _laid_out(dx.view(x.shape), x), shaped(dweight, weight)


def rows_of_shards(x: Tensor, dims: int) -> tuple[list, list]:
    """Names, as `Rule.shards` has them, of the dimensions of x and of those of a weight."""
    whole = [None] * dims
    return [*range(x.dim() - dims), *whole], whole


def _shards(x: Tensor, *args: Any) -> tuple[list, list]:
    *weights, dims, _ = args
    rows, whole = rows_of_shards(x, dims)
    return [rows, *(whole for _ in weights)], [rows]


_LAYER_NORM = Rule(
    "layer_norm", 3, _forward, _backward, layer_norm_definition, extras=2, shards=_shards
)
_RMS_NORM = Rule(
    "rms_norm", 2, _rms_forward, _rms_backward, rms_norm_definition, extras=1, shards=_shards
)
_layer_norm_call = autograd.make(_LAYER_NORM)
_rms_norm_call = autograd.make(_RMS_NORM)


def check_weights(op: str, input: Tensor, shape: Sequence[int], **weights: Tensor | None) -> None:
    """Raises torch's errors, and ours for dtypes that no kernel takes."""
    if not isinstance(shape, list | tuple) or not all(map(is_integer, shape)):
        raise TypeError(
            f"pydl: {op}: normalized_shape is {shape!r}, wants a list or a tuple of ints, such as "
            f"{list(input.shape[-1:])}"
        )
    shape = tuple(shape)
    if len(shape) == 0 or input.shape[input.dim() - len(shape) :] != shape:
        raise RuntimeError(
            f"pydl: {op}: normalized_shape is {list(shape)}, wants the last dimensions of the "
            f"input, whose shape is {tuple(input.shape)}"
        )
    for name, weight in weights.items():
        if weight is not None:
            check_weight(op, input, name, weight, shape)


def _autocast(input: Tensor) -> Tensor:
    """On CUDA torch's autocast normalises in fp32."""
    if input.is_cuda and torch.is_autocast_enabled("cuda") and input.dtype in FLOATS[1:3]:
        return input.float()
    return input


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Layer normalisation, `(x - mean) / sqrt(var + eps) * weight + bias` over the last dimensions.

    Args:
        input: Any strides and floating dtype; its last dimensions are `normalized_shape`.
        normalized_shape: The dimensions to normalise over.
        weight: Of `normalized_shape`, in the input's dtype, or fp32 with an input of 16 bits.
        bias: Likewise.
        eps: Added to the (biased) variance.
        backend: Who computes; see `pydl.backends`.

    Returns:
        A dense tensor of the input's shape and dtype. Saves the input, and a mean and a reciprocal
        standard deviation a row.

    Raises:
        RuntimeError: shapes or dtypes do not fit.
        TypeError: `normalized_shape` is no list or tuple of ints.

    Source: Ba et al. 2016, arXiv 1607.06450.
    """
    if has_torch_function_variadic(input, weight, bias) and proxied(input, weight, bias):
        return hand_over(layer_norm, locals())
    input = _autocast(input)
    chosen = choose("layer_norm", backend, input, weight, bias)
    if chosen == "torch":
        return F.layer_norm(input, normalized_shape, weight, bias, eps)  # type: ignore[arg-type]
    check_weights("layer_norm", input, normalized_shape, weight=weight, bias=bias)
    args = (input, weight, bias, len(normalized_shape), float(eps))
    if chosen == "reference":
        return autograd.in_reference(_LAYER_NORM, *args)
    return _layer_norm_call(chosen, *args)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Root-mean-square normalisation, `x / sqrt(mean(x^2) + eps) * weight` over last dimensions.

    Args:
        input: Any strides and floating dtype; its last dimensions are `normalized_shape`.
        normalized_shape: The dimensions to normalise over.
        weight: Of `normalized_shape`, in the input's dtype, or fp32 with an input of 16 bits.
        eps: Added to the mean square; None for `torch.finfo(dtype).eps` of what is computed in:
            fp32 for 16 bits, as in torch.
        backend: Who computes; see `pydl.backends`.

    Returns:
        A dense tensor of the input's shape and dtype. Saves the input, and a reciprocal root mean
        square a row.

    Raises:
        RuntimeError: shapes or dtypes do not fit.
        TypeError: `normalized_shape` is no list or tuple of ints.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    if has_torch_function_variadic(input, weight) and proxied(input, weight):
        return hand_over(rms_norm, locals())
    input = _autocast(input)
    chosen = choose("rms_norm", backend, input, weight)
    if chosen == "torch":
        return F.rms_norm(input, normalized_shape, weight, eps)  # type: ignore[arg-type]
    check_weights("rms_norm", input, normalized_shape, weight=weight)
    args = (input, weight, len(normalized_shape), eps_of(input, eps))
    if chosen == "reference":
        return autograd.in_reference(_RMS_NORM, *args)
    return _rms_norm_call(chosen, *args)


def eps_of(input: Tensor, eps: float | None) -> float:
    if eps is not None:
        return float(eps)
    return torch.finfo(autograd.wide_dtype(input)).eps
