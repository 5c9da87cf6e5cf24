"""From an elementwise formula to a differentiable op: in place where asked, with a learnt parameter
where there is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydl import autograd
from pydl.autograd import Rule
from pydl.backends import empty_like, kernel
from pydl.ops.channels import Channels, sums
from pydl.ops.definitions import per_channel


@dataclass(frozen=True)
class Unary:
    """An activation without learnt parameters: its kernels, its definition and how it is called."""

    rule: Rule
    call: Callable[..., Tensor]
    inplace: Callable[..., Tensor]


def unary(name: str, reference: Callable[..., Tensor], derivative: Callable | None = None) -> Unary:
    fwd, bwd = f"{name}_fwd", f"{name}_bwd"
    # With a derivative of its own an activation saves its output, else x.
    saves = None if derivative is None else lambda tensors, outputs: outputs

    def forward(backend: str, x: Tensor, *scalars: float) -> Tensor:
        y = empty_like(x)
        kernel(backend, fwd)(y, x, *scalars)
        return y

    def backward(backend: str, dy: Tensor, saved: tuple, scalars: tuple, needs: tuple) -> tuple:
        dx = empty_like(saved[0])
        kernel(backend, bwd)(dx, dy, saved[0], *scalars)
        return (dx,)

    rule = Rule(name, 1, forward, backward, reference, saves, derivative, pointwise=True)
    call = autograd.make(rule)

    class Inplace(torch.autograd.Function):
        """Writes the result over x, from which the gradient follows as well."""

        @staticmethod
        def forward(ctx: Any, backend: str, x: Tensor, *scalars: float) -> Tensor:
            kernel(backend, fwd)(x, x, *scalars)
            ctx.mark_dirty(x)
            ctx.backend, ctx.scalars = backend, scalars
            ctx.save_for_backward(x)
            return x

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple:
            # In plain PyTorch where the gradient is to be differentiated again.
            if torch.is_grad_enabled():
                got = autograd.derivative(rule, dy, ctx.saved_tensors, ctx.scalars)
            else:
                got = backward(ctx.backend, dy, ctx.saved_tensors, ctx.scalars, (True,))
            return (None, *got, *(None for _ in ctx.scalars))

    def inplace(backend: str, x: Tensor, *scalars: float) -> Tensor:
        special = torch.compiler.is_compiling() or autograd.special() or autograd.sharded(x)
        grad = torch.is_grad_enabled() and x.requires_grad
        if grad and not special:
            base = x._base if x._is_view() else x
            if base is not None and base.is_leaf and base.requires_grad:
                # Before anything is written.
                raise RuntimeError(
                    f"pydl: {name}: inplace=True on a leaf that requires grad (or a view of one), "
                    "wants a tensor that an operation made"
                )
        if special or not _dense(x):
            return x.copy_(call(backend, x.clone() if grad else x, *scalars))
        if not grad:
            if x.is_inference() and not torch.is_inference_mode_enabled():
                raise RuntimeError(
                    f"pydl: {name}: inplace=True on an inference tensor outside of inference mode, "
                    "wants a clone of it or torch.inference_mode()"
                )
            kernel(backend, fwd)(x, x, *scalars)
            torch.autograd.graph.increment_version(x)
            return x
        if saves:
            return Inplace.apply(backend, x, *scalars)
        return x.copy_(call(backend, x.clone(), *scalars))

    return Unary(rule, call, inplace)


def _dense(x: Tensor) -> bool:
    """Whether every element has memory of its own, which a kernel may overwrite."""
    return x.is_contiguous() or (
        x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )


def run(op: Unary, backend: str, inplace: bool, x: Tensor, *scalars: float) -> Tensor:
    if backend == "reference":
        out = autograd.in_reference(op.rule, x, *scalars)
        return x.copy_(out) if inplace else out
    return (op.inplace if inplace else op.call)(backend, x, *scalars)


def learnt(name: str, reference: Callable[..., Tensor]) -> Rule:
    fwd, bwd = f"{name}_fwd", f"{name}_bwd"

    def forward(backend: str, x: Tensor, parameter: Tensor) -> Tensor:
        y = empty_like(x)
        kernel(backend, fwd)(y, x, per_channel(x, parameter).expand_as(x))
        return y

    def backward(backend: str, dy: Tensor, saved: tuple, scalars: tuple, needs: tuple) -> tuple:
        x, parameter = saved
        channels = Channels(x, None if parameter.numel() == 1 else 1)
        x3 = channels.fold(x)
        dx = empty_like(x3)
        total, partials = sums(x3, parameter)
        flat = parameter.reshape(-1).contiguous()
        kernel(backend, bwd)(dx, total, partials, channels.fold(dy), x3, flat)
        return channels.unfold(dx), total.view(parameter.shape)

    def shards(x: Tensor, parameter: Tensor) -> tuple[list, list]:
        dims = range(x.dim())
        return [dims, (1 if parameter.numel() > 1 else None,) * parameter.dim()], [dims]

    return Rule(name, 2, forward, backward, reference, shards=shards)
