"""From DTensors to their local tensors and back, differentiably."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

KEPT = 1024  # of what is remembered for a shape


class Part(NamedTuple):
    """The whole tensor's shape, where its shards lie, and those of its gradient."""

    shape: torch.Size
    placements: tuple[Any, ...]
    of_gradient: tuple[Any, ...]

    def gradient(self) -> Part:
        return Part(self.shape, self.of_gradient, self.placements)


def _entered(x: DTensor, part: Part) -> Tensor:
    """The local tensor of a DTensor in the placements that are computed in."""
    if x.placements != part.placements:
        x = x.redistribute(x.device_mesh, part.placements)
    local = x.to_local()
    if isinstance(local, AsyncCollectiveTensor):
        local = local.wait()
    return local


def _left(local: Tensor, mesh: Any, part: Part) -> DTensor:
    """A DTensor of local tensors, as `DTensor.from_local` makes it, in a tenth of the time."""
    strides = _strides(local.stride(), part.shape)
    key = (id(mesh), part.placements, part.shape, strides, local.dtype)
    spec = _specs.get(key)
    if spec is None:
        if len(_specs) >= KEPT:
            _specs.clear()
        meta = TensorMeta(part.shape, strides, local.dtype)
        spec = _specs[key] = DTensorSpec(mesh, part.placements, tensor_meta=meta)
    return DTensor(local, spec, requires_grad=False)  # type: ignore[call-arg, arg-type]


# The meshes in them live, so that no other has their id.
_specs: dict[Any, DTensorSpec] = {}


@lru_cache(KEPT)
def _strides(local: tuple[int, ...], shape: torch.Size) -> tuple[int, ...]:
    """Of a dense tensor of that shape, its dimensions in the order of the local one's."""
    strides, step = [0] * len(shape), 1
    for d in sorted(range(len(shape)), key=lambda d: (local[d], -d)):
        strides[d] = step
        step *= max(1, shape[d])
    return tuple(strides)


class _Enter(Function):
    """DTensors to local tensors, whose gradients leave in placements of their own.

    Like torch's own operators, and unlike `DTensor.redistribute`, it leaves a gradient where it was
    computed; and it can be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, mesh: Any, parts: Sequence[Part], *xs: DTensor | None) -> Any:
        ctx.mesh, ctx.parts = mesh, parts
        ctx.set_materialize_grads(False)
        found = [
            None if x is None else _entered(x, part) for x, part in zip(xs, parts, strict=True)
        ]
        # A view, since autograd marks it, and must not mark what the DTensor holds.
        found = [None if t is None else t.view_as(t) for t in found]
        _mark(ctx, found)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        parts = [part.gradient() for part in ctx.parts]
        return None, None, *leave(ctx.mesh, parts, grads)


class _Leave(Function):
    """The way back, and the gradient of `_Enter`, which is its own."""

    @staticmethod
    def forward(ctx: Any, mesh: Any, parts: Sequence[Part], *locals_: Tensor | None) -> Any:
        ctx.mesh, ctx.parts = mesh, parts
        ctx.set_materialize_grads(False)
        found = [
            None if t is None else _left(t.detach(), mesh, part)
            for t, part in zip(locals_, parts, strict=True)
        ]
        _mark(ctx, found)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: DTensor | None) -> Any:
        parts = [part.gradient() for part in ctx.parts]
        return None, None, *enter(ctx.mesh, parts, grads)


def _mark(ctx: Any, outputs: Sequence[Tensor | None]) -> None:
    """What needs no gradient going in needs none coming out."""
    needs = ctx.needs_input_grad[2:]
    ctx.mark_non_differentiable(
        *(t for t, need in zip(outputs, needs, strict=True) if t is not None and not need)
    )


# Past what functorch asks of a Function, which takes longer than the rest.
_enter_apply: Any = super(Function, _Enter).apply
_leave_apply: Any = super(Function, _Leave).apply


def _differentiable(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def enter(mesh: Any, parts: Sequence[Part], xs: Sequence[Any]) -> Sequence[Any]:
    """The local tensors of DTensors (or None), in the placements of `parts`."""
    pairs = zip(xs, parts, strict=True)
    if torch.compiler.is_compiling():
        return [None if x is None else _entered_traced(x, part) for x, part in pairs]
    if _differentiable(xs):
        return _enter_apply(mesh, parts, *xs)
    return [None if x is None else _entered(x, part) for x, part in pairs]


def leave(mesh: Any, parts: Sequence[Any], locals_: Sequence[Any]) -> Sequence[Any]:
    """The DTensors that local tensors (or None) are of."""
    pairs = zip(locals_, parts, strict=True)
    if torch.compiler.is_compiling():
        return [None if t is None else _left_traced(t, mesh, part) for t, part in pairs]
    if _differentiable(locals_):
        return _leave_apply(mesh, parts, *locals_)
    return [None if t is None else _left(t, mesh, part) for t, part in pairs]


def _entered_traced(x: DTensor, part: Part) -> Tensor:
    """What torch.compile knows; a gradient goes back to where the tensor was."""
    x = x.redistribute(x.device_mesh, part.placements)
    return x.to_local(grad_placements=part.of_gradient)


def _left_traced(local: Tensor, mesh: Any, part: Part) -> DTensor:
    strides = [prod(part.shape[d + 1 :]) for d in range(len(part.shape))]
    return DTensor.from_local(
        local.contiguous(), mesh, part.placements, run_check=False, shape=part.shape,
        stride=tuple(strides),
    )  # fmt: skip
