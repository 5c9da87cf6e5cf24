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

from pydl import autograd, calibration
from pydl.autograd import Rule, wide
from pydl.backends import MissingKernel, choose, empty, kernel, requested
from pydl.ops.bias_act import lowered

SHORT = 32  # rows below which a product reads its weight more than it computes


def product(backend: str, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a @ b`, plus `bias` of (N,), of (M, K) and (K, N), with a batch before or not, of one dtype,
    fp32 at least."""
    if backend == "torch" or a.device.type != "cpu":
        return a @ b if bias is None else a @ b + bias
    out = empty(a, a.dtype, *a.shape[:-1], b.shape[-1])
    kernel("cpu", "product")(out, a, b, None if bias is None else bias.contiguous())
    return out


def _matrix(x: Tensor) -> Tensor:
    """(rows, columns), in what is computed in."""
    x = wide(x)
    return x if x.dim() == 2 else x.reshape(prod(x.shape[:-1]), x.shape[-1])


def _forward(backend: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = product(backend, _matrix(x), wide(weight).t(), wide(bias))
    out = out if out.dtype == x.dtype else out.to(x.dtype)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], weight.shape[0])


def _either(backend: str, columns: bool, a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of matrices; its columns lie in memory one after the other where `columns`."""
    return product(backend, b.t(), a.t()).t() if columns else product(backend, a, b)


def _by_columns(x: Tensor) -> bool:
    return x.dim() == 2 and x.stride() == (1, x.shape[0])


def _dinput(backend: str, dy: Tensor, weight: Tensor, columns: bool) -> Tensor:
    dx = _either(backend, columns, _matrix(dy), wide(weight)).to(dy.dtype)
    return dx if dy.dim() == 2 else dx.view(*dy.shape[:-1], weight.shape[1])


def _backward(backend: str, dy: Tensor, saved: tuple, scalars: tuple, needs: tuple) -> tuple:
    x, weight, bias = saved
    dx = dweight = dbias = None
    # Gradients lie in memory as torch's do: as the input and the weight, roughly.
    if needs[0]:
        dx = _dinput(backend, dy, weight, _by_columns(x))
    rows = dy.reshape(prod(dy.shape[:-1]), dy.shape[-1])
    if needs[1]:
        columns = weight.stride() != (weight.shape[1], 1)
        dweight = _either(backend, columns, wide(rows).t(), _matrix(x)).to(weight.dtype)
    if bias is not None and needs[2]:
        dbias = rows.sum(0)
    return dx, dweight, dbias


def _frozen_backward(backend: str, dy: Tensor, saved: tuple, scalars: tuple, needs: tuple) -> tuple:
    return _dinput(backend, dy, saved[0], scalars[1]), None


def _frozen_derivative(dy: Tensor, saved: tuple, scalars: tuple) -> tuple:
    return dy @ saved[0], None


def _frozen_forward(
    backend: str, x: Tensor, weight: Tensor, bias: Tensor | None, columns: bool
) -> Tensor:
    return _forward(backend, x, weight, bias)


def _frozen_reference(x: Tensor, weight: Tensor, bias: Tensor | None, columns: bool) -> Tensor:
    return F.linear(x, weight, wide(bias))


_RULE = Rule("linear", 3, _forward, _backward, F.linear)
_linear = autograd.make(_RULE)
# Where parameters do not learn, nothing of the input is kept.
_frozen = autograd.make(
    Rule(
        "linear_frozen", 2, _frozen_forward, _frozen_backward, _frozen_reference,
        saves=lambda tensors, outputs: tensors[1:], derivative=_frozen_derivative,
    )
)  # fmt: skip


def projected(backend: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` of tensors of one dtype within another op, by the backend that was chosen for it."""
    if backend in ("torch", "reference") or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return _linear(backend, x, weight, bias)
    return _frozen(backend, x, weight, bias, _by_columns(x))


def measured_as(op: str, x: Tensor) -> str:
    """What the call was measured as."""
    rows = x.numel() // max(1, x.shape[-1]) if x.dim() else 1
    return op if rows >= SHORT else f"{op}_short"


def _native(x: Tensor) -> bool:
    """Whether native PyTorch is known to compute under autocast, before anything is cast."""
    kind = x.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return False
    limits = calibration.limits(kind, measured_as("linear", x), torch.get_autocast_dtype(kind))
    return limits is None or x.numel() < min(limits[1:])


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
        (..., N) in the input's dtype, summed in fp32 at least and rounded once. Saves the input,
        where a parameter learns, and the weight.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, or the backend cannot serve the call;
            one that is named serves no DTensors.

    The order of summing, in parts of 256, is that of Goto and van de Geijn 2008, doi
    10.1145/1356052.1356053.
    """
    named = requested(backend)
    if named is None and (autograd.sharded(input) or autograd.sharded(weight) or _native(input)):
        return F.linear(input, weight, bias)
    tensors: Sequence[Tensor] = (input, weight) if bias is None else (input, weight, bias)
    lower: Any = tensors if named == "torch" else lowered(*tensors)
    chosen = choose("linear", backend, *lower, key=measured_as)
    if chosen == "torch":
        return F.linear(input, weight, bias)
    x, w, b = (*lower, None)[:3]
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
    of DTensors, whose sums over shards torch knows."""
    if requested(backend) in ("cuda", "triton") or any(map(autograd.sharded, (input, weight))):
        return F.linear(input, weight, bias)
    return linear(input, weight, bias, backend=backend)
