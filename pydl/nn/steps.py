"""Steps of modules that run in one pass where that gives the same: a linear layer's bias with the
activation, a sum with its normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from pydl import functional
from pydl.backends import FLOATS, automatic, below, choose, requested
from pydl.nn.derived import Derived, covers
from pydl.nn.derived import add as add_derived
from pydl.nn.linear import Linear
from pydl.nn.norm import LayerNorm, RMSNorm
from pydl.ops.channel_norm import measured_as

LINEARS = (nn.Linear, Linear)
_SUMMED = {LayerNorm: "layer_norm", RMSNorm: "rms_norm"}


def hooked(module: nn.Module) -> bool:
    """Whether something sees what goes into or comes out of this module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def plain(module: Any) -> bool:
    """Whether calling a module does what its type does, and nothing sees it."""
    return (
        not hooked(module)
        and not torch_module._has_any_global_hook()
        and "forward" not in module.__dict__
        and module._compiled_call_impl is None
    )


def _autocast(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast lowers products of a tensor to; None where it is off."""
    kind = x.device.type
    on = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def alike(first: Any, second: Any) -> bool:
    """Whether both are dense tensors of one shape, dtype and device."""
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return first.device == second.device and first.layout == second.layout == torch.strided


def _elements(layer: nn.Linear, x: Tensor) -> int:
    """Of a linear layer's output."""
    return x.numel() // max(1, layer.in_features) * layer.out_features


def worthwhile(layer: nn.Linear, x: Any, backend: str | None) -> bool:
    """Whether `biased` may be true, told at little cost."""
    if not isinstance(x, Tensor) or layer.in_features == 0:
        return False
    if backend is None and below("bias_act", x, _elements(layer, x)):
        return False
    return layer.bias is not None


def biased(layer: nn.Linear, x: Tensor, backend: str | None) -> bool:
    """Whether a linear layer's bias is to be added in one pass with its activation."""
    if layer.bias is None:
        return False
    dtype = _autocast(x) or x.dtype
    if dtype == x.dtype != layer.weight.dtype:
        return False
    if x.dim() == 0 or x.shape[-1] != layer.in_features or x.layout != torch.strided:
        return False
    name = requested(backend)
    if name is None:
        size = _elements(layer, x)
        name = automatic("bias_act", x, layer.weight, elements=size, dtype=dtype)
    else:
        choose("bias_act", backend, x)
    return name != "torch"


def batch_norm_worthwhile(bn: Any, input: Tensor) -> bool:
    """Whether kernels take a batch normalisation with what follows it."""
    return choose("batch_norm_act", bn.backend, input, key=measured_as) != "torch"


def adds(norm: Any, first: Any, second: Any) -> bool:
    """Whether a sum and its normalisation can be computed in one pass, with the same result."""
    cls, form = type(norm), getattr(norm, "_pydl_form", None)
    if cls not in _SUMMED and not (isinstance(norm, Derived) and form is not None and form.eps):
        return False
    if not isinstance(first, Tensor):
        return False
    op = f"add_{_SUMMED[cls] if form is None else form.function}"
    if (norm.backend is None and below(op, first, first.numel())) or not plain(norm):
        return False
    if not alike(first, second) or first.dtype not in FLOATS:
        return False
    if not first.is_contiguous() or not second.is_contiguous():
        return False
    if first.dtype != torch.float32 and _autocast(first) is not None:
        return False
    if form is not None:
        return covers(form, norm, first) and choose(op, norm.backend, first, second) != "torch"
    shape, weights = norm.normalized_shape, (norm.weight, getattr(norm, "bias", None))
    if tuple(first.shape[-len(shape) :]) != tuple(shape):
        return False
    if any(w is not None and (w.dtype, w.device) != (first.dtype, first.device) for w in weights):
        return False
    return choose(op, norm.backend, first, second) != "torch"


def added(norm: Any, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The normalised sum, and the sum."""
    if isinstance(norm, Derived):
        return add_derived(norm._pydl_form, norm, second, first, norm.backend)
    if type(norm) is RMSNorm:
        return functional.add_rms_norm(
            second, first, norm.normalized_shape, norm.weight, norm.eps, backend=norm.backend
        )
    return functional.add_layer_norm(
        second, first, norm.normalized_shape, norm.weight, norm.bias, norm.eps,
        backend=norm.backend,
    )  # fmt: skip


def normed(norm: Any, first: Any, second: Any) -> Any:
    """`norm(first + second)`, in one pass where it can be."""
    if adds(norm, first, second):
        return added(norm, first, second)[0]
    return norm(first + second)
