"""Products of matrices: the linear layer, and those within other ops.

On the CPU a kernel computes them, so that the same numbers give the same bits, which a BLAS does
not promise for other threads or other addresses. On a GPU they are torch's, which are cuBLAS's.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from pydl import autograd, calibration
from pydl.autograd import Rule, wide
from pydl.backends import MissingKernel, choose, empty, kernel, plain, requested
from pydl.ops.bias_act import lowered
from pydl.traced import hand_over, proxied

SHORT = 32  # rows below which a product reads its weight more than it computes


def _multiplied(
    a: Tensor, b: Tensor, shape: Sequence[int], like: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`a @ b`, plus `bias` of (N,), of (M, K) and (K, N), with a batch before or not, of one dtype,
    fp32 at least; in a shape and in a tensor's dtype. It is no view: it may be changed in place."""
    out = empty(a, a.dtype, *shape)
    rows = out if len(shape) == a.dim() else out.view(a.shape[0], b.shape[1])
    kernel("cpu", "product")(rows, a, b, bias)
    return out if out.dtype == like.dtype else out.to(like.dtype)


def product(backend: str, a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of (M, K) and (K, N), with a batch before or not, of one dtype, fp32 at least."""
    if backend == "torch" or a.device.type != "cpu":
        return a @ b
    return _multiplied(a, b, (*a.shape[:-1], b.shape[-1]), a)


def _matrix(x: Tensor) -> Tensor:
    """(rows, columns), in what is computed in."""
    x = wide(x)
    return x if x.dim() == 2 else x.reshape(prod(x.shape[:-1]), x.shape[-1])


def _forward(backend: str, x: Tensor, weight: Tensor, bias: Tensor | None, *layout: bool) -> Tensor:
    added = None if bias is None else wide(bias).contiguous()
    shape = (*x.shape[:-1], weight.shape[0])
    return _multiplied(_matrix(x), wide(weight).t(), shape, x, added)


def _gradient(columns: bool, a: Tensor, b: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    """`a @ b`; as a matrix whose columns lie one after the other where `columns`."""
    if columns:
        return _multiplied(b.t(), a.t(), (b.shape[1], a.shape[0]), like).t()
    return _multiplied(a, b, shape, like)


def _backward(backend: str, dy: Tensor, saved: tuple, scalars: tuple, needs: tuple) -> tuple:
    x, weight = saved
    columns_of_x, columns_of_weight = scalars
    dx = dweight = dbias = None
    rows = dy.reshape(prod(dy.shape[:-1]), dy.shape[-1])
    if needs[0]:
        shape = (*dy.shape[:-1], weight.shape[1])
        dx = _gradient(columns_of_x, wide(rows), wide(weight), shape, dy)
    if needs[1]:
        shape = (dy.shape[-1], x.shape[-1])
        dweight = _gradient(columns_of_weight, wide(rows).t(), _matrix(x), shape, dy)
    if needs[2]:
        dbias = rows.sum(0)
    return dx, dweight, dbias


def _saves(given: tuple, made: tuple) -> tuple:
    """What torch's saves: what the gradients asked for need."""
    x, weight, _ = given
    return x if weight.requires_grad else None, weight if x.requires_grad else None


def _derivative(dy: Tensor, saved: tuple, scalars: tuple) -> tuple:
    x, weight = saved
    dx = None if weight is None else dy @ weight
    rows = dy.reshape(prod(dy.shape[:-1]), dy.shape[-1])
    dweight = None if x is None else rows.t() @ x.reshape(rows.shape[0], x.shape[-1])
    return dx, dweight, rows.sum(0)


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, *layout: bool) -> Tensor:
    return F.linear(x, weight, bias)


_RULE = Rule("linear", 3, _forward, _backward, _reference, saves=_saves, derivative=_derivative)
_linear = autograd.make(_RULE)


def projected(backend: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` of tensors of one dtype within another op, by the backend that was chosen for it."""
    if backend in ("torch", "reference") or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    # Gradients lie in memory as torch's do: as the input and the weight.
    columns_of_x = x.dim() == 2 and x.stride() == (1, x.shape[0])
    return _linear(backend, x, weight, bias, columns_of_x, weight.stride() != (weight.shape[1], 1))


def _rows(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1]) if x.dim() else 1


def measured_as(op: str, x: Tensor) -> str:
    """What the call was measured as."""
    return op if _rows(x) >= SHORT else f"{op}_short"


def _native(input: Any, weight: Any, bias: Any) -> bool:
    """Whether native PyTorch computes because nothing else may or is known to, told before any
    tensor is cast or looked at more closely."""
    for x in (input, weight, bias):
        if not plain(x) and x is not None:
            return True  # torch says what is wrong, and subclasses what they do with linear
    if input.is_nested or input.layout != torch.strided:
        return True
    kind, dtype = input.device.type, input.dtype
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    if torch.compiler.is_compiling():
        # A graph of any size is not to be compiled anew for each side of a limit, and one that is
        # exported not to need this package.
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        others = [x for x in (weight, bias) if x is not None]
        if torch.compiler.is_exporting() or any(x.dtype != input.dtype for x in others):
            return True
        if not statically_known_true(_rows(input) >= SHORT):
            return True
        limits = calibration.limits(kind, "linear", dtype)
        return limits is None or not statically_known_true(input.numel() >= max(limits[1:]))
    if torch._C._get_tracing_state() is not None:
        return True
    limits = calibration.limits(kind, measured_as("linear", input), dtype)
    return limits is None or input.numel() < min(limits[1:])


def _check(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    fits = weight.dim() == 2 and input.dim() > 0 and input.shape[-1] == weight.shape[-1]
    if not fits or (bias is not None and tuple(bias.shape) != tuple(weight.shape[:1])):
        raise RuntimeError(
            f"pydl: linear: got input {tuple(input.shape)}, weight {tuple(weight.shape)}, bias "
            f"{None if bias is None else tuple(bias.shape)}; wants (..., K), (N, K) and (N,) or "
            "None, or (..., K), (K,) and None"
        )


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Linear layer, `input @ weight.T + bias`.

    Args:
        input: (..., K), of any strides.
        weight: (N, K); or (K,), without a bias, for an output without the last dimension.
        bias: (N,).
        backend: Who computes; see `pydl.backends`. There are no kernels for a GPU, where torch's
            product is cuBLAS's.

    Returns:
        (..., N) in the input's dtype, summed in fp32 at least and rounded once. Saves the input
        where the weight learns, and the weight where the input has a gradient.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, or the backend cannot serve the call;
            one that is named serves no DTensors.

    The order of summing, in parts of 256, is that of Goto and van de Geijn 2008, doi
    10.1145/1356052.1356053.
    """
    if has_torch_function_variadic(input, weight, bias) and proxied(input, weight, bias):
        return hand_over(linear, locals())
    asked = requested(backend)
    if asked == "torch" or (asked is None and _native(input, weight, bias)):
        return F.linear(input, weight, bias)
    lower = lowered(*((input, weight) if bias is None else (input, weight, bias)))
    chosen = "cpu"  # what compiles has been decided by now, without a guard on sizes
    if asked is not None or not torch.compiler.is_compiling():
        chosen = choose("linear", backend, *lower, key=measured_as)
    if chosen == "torch":
        return F.linear(input, weight, bias)
    x, w, b = lower[0], lower[1], lower[2] if bias is not None else None
    if w.dim() == 1 and b is None:
        return linear(x, w[None], backend=backend).squeeze(-1)
    _check(x, w, b)
    if chosen == "reference":
        return autograd.in_reference(_RULE, x, w, b)
    if chosen != "cpu":
        raise MissingKernel(
            f"pydl: linear: backend {chosen!r} has no kernel for it; wants 'torch' there"
        )
    return projected(chosen, x, w, b)


def linear_layer(input: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> Tensor:
    """`linear` within a module, by torch where the backend has kernels for other modules only, and
    where tensors are of types that know what linear does: DTensors, quantised ones."""
    if not (plain(input) and plain(weight)):
        if proxied(input, weight, bias):
            return hand_over(linear_layer, locals())
        return F.linear(input, weight, bias)
    if requested(backend) in ("cuda", "triton"):
        return F.linear(input, weight, bias)
    return linear(input, weight, bias, backend=backend)
