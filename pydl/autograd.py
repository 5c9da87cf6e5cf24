"""From kernels to differentiable ops: one `torch.autograd.Function` per op, the same for all
backends.

An op states a `Rule`: how its kernels are called forward and backward, and its plain-PyTorch
definition. What autograd asks beyond one backward pass is derived from the definition, so that it
holds for every op alike: double and higher backward, forward-mode derivatives and vmap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from pydl._native import C
from pydl.backends import plain

Gradients = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Rule:
    """How an op runs.

    Attributes:
        name: The op.
        tensors: How many tensors, None allowed, come first among the arguments; scalars follow.
        forward: `(backend, *tensors, *scalars) -> Tensor`, by kernels; a tuple of `outputs` and of
            `extras` where there is more than one.
        backward: `(backend, dy, saved, scalars, needs) -> a gradient per tensor`, by kernels. Never
            writes `saved`; may return None where `needs` is false. With several outputs `dy` is a
            tuple, with None for an output that nothing flows back from.
        reference: `(*tensors, *scalars) -> Tensor`, or a tuple of `outputs`, in plain PyTorch.
        saves: `(tensors, outputs) -> what backward gets as saved`, the extras after it; None for
            the tensors.
        derivative: `(dy, saved, scalars) -> a gradient per tensor` in plain differentiable PyTorch;
            needed where `saves` is, else derived from `reference`.
        pointwise: All tensors have the output's shape and elements do not meet.
        extras: How many tensors come along with the outputs for backward, not differentiable.
        outputs: How many differentiable outputs there are; of several, each has the dtype of the
            tensor in its place among the arguments.
        wide_outputs: How many of the last of them are in what is computed in, fp32 at least.
        shards: `(*tensors, *scalars) -> (names of each tensor's dimensions, names of each
            output's)`, for DTensors. Dimensions of one name may be cut into shards, all alike, and
            the op runs on each; of name None they may not. Of several outputs the extras count too
            where they are returned. The first list may go on with scalars that are tensors, or
            "seed" for one of dropout. None where `pointwise`, else for no rule.
    """

    name: str
    tensors: int
    forward: Callable[..., Any]
    backward: Callable[..., Gradients]
    reference: Callable[..., Any]
    saves: Callable[[tuple, tuple], tuple] | None = None
    derivative: Callable[..., Gradients] | None = None
    pointwise: bool = False
    extras: int = 0
    outputs: int = 1
    wide_outputs: int = 0
    shards: Callable[..., tuple[Sequence[Any], Sequence[Any]]] | None = None


def wide(tensor: Any) -> Any:
    """fp32 for fp16 and bf16; others, and None, as they are."""
    if tensor is None:
        return None
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """What kernels compute a tensor's dtype in: fp32, fp64 for fp64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _floating(tensor: Any) -> bool:
    return tensor is not None and tensor.is_floating_point()


def in_reference(rule: Rule, *args: Any) -> Any:
    """The plain definition, computed in fp32 at least and rounded once."""
    tensors = args[: rule.tensors]
    if rule.pointwise and tensors[0].dim() == 0:
        # The tangent of a tensor without dimensions takes the dtype of a Python number it meets.
        lines = (t.reshape(1) for t in tensors)
        return in_reference(rule, *lines, *args[rule.tensors :]).reshape(())
    out = rule.reference(*(wide(t) for t in tensors), *args[rule.tensors :])
    if rule.outputs > 1:
        narrow = rule.outputs - rule.wide_outputs
        return tuple(
            one.to(t.dtype) if i < narrow else one
            for i, (one, t) in enumerate(zip(out, tensors, strict=False))
        )
    return out.to(tensors[0].dtype)


def derivative(rule: Rule, dy: Any, saved: Sequence[Any], scalars: tuple) -> Gradients:
    """The gradients as a differentiable function of dy and of what was saved."""
    if rule.derivative is not None:
        given = wide(dy) if rule.outputs == 1 else tuple(wide(d) for d in dy)
        return rule.derivative(given, tuple(wide(t) for t in saved), scalars)
    leaves = [
        t if not _floating(t) or t.requires_grad else t.detach().requires_grad_()
        for t in saved[: rule.tensors]
    ]
    floats = [t for t in leaves if _floating(t)]
    out = rule.reference(*(wide(t) for t in leaves), *scalars)
    pairs = zip(out, dy, strict=True) if rule.outputs > 1 else ((out, dy),)
    flowing = [(o, wide(d)) for o, d in pairs if d is not None]
    got = iter(
        torch.autograd.grad(
            [o for o, _ in flowing], floats, [d for _, d in flowing], create_graph=True,
            allow_unused=True,
        )
    )  # fmt: skip
    return tuple(next(got) if _floating(t) else None for t in leaves)


def special() -> bool:
    """Whether a functorch transform, forward-mode differentiation or torch.jit.trace is going on.

    Then the definition computes: all of them see through it, and not through a kernel.
    """
    if torch.compiler.is_compiling():
        return torch._C._are_functorch_transforms_active()
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def _many(dy: Tensor | None) -> bool:
    """Whether it is many upstream gradients at once: `is_grads_batched`, or torch.func.vmap."""
    if dy is None:
        return False
    if torch._C._functorch.is_legacy_batchedtensor(dy):  # type: ignore[attr-defined]
        return True
    return torch._C._are_functorch_transforms_active()


def sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; imports nothing to find out."""
    return not plain(tensor) and hasattr(tensor, "device_mesh")


def on_shards(rule: Rule, call: Callable[..., Any], *args: Any) -> Any:
    """`call(*args)` where the first of the tensors is a DTensor."""
    from pydl import shards

    return shards.run(rule, call, args)


def make(rule: Rule, whole: bool = False) -> Callable[..., Any]:
    """Returns `call(backend, *tensors, *scalars)`, differentiable.

    With `whole` it returns the extras too, or None for each where the definition computed.
    """
    n, outputs = rule.tensors, rule.outputs

    def kernels(backend: str, dys: Sequence[Any], saved: Any, scalars: Any, needs: Any) -> Any:
        given = dys[0] if outputs == 1 else tuple(dys)
        return rule.backward(backend, given, saved, scalars, needs)

    def shown(out: Any) -> Any:
        if whole or not rule.extras:
            return out
        return out[0] if outputs == 1 else out[:outputs]

    class Backward(Function):
        """The backward pass as an op of its own, so that it can be differentiated again."""

        @staticmethod
        def forward(backend, needs, count, *args):
            end = outputs + count
            return kernels(backend, args[:outputs], args[outputs:end], args[end:], needs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            end = 3 + outputs + inputs[2]
            ctx.save_for_backward(*inputs[3:end])
            ctx.scalars = inputs[end:]
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, *second):
            create = torch.is_grad_enabled()
            given = ctx.saved_tensors
            wanted = ctx.needs_input_grad[3 : 3 + len(given)]
            # Aliases: dy may come from x, and what flows back to x through dy is not ours to count.
            with torch.enable_grad():
                leaves: list[Any] = [
                    None if t is None
                    else t.view_as(t) if create and need else t.detach().requires_grad_(need)
                    for t, need in zip(given, wanted, strict=True)
                ]  # fmt: skip
                dy = leaves[0] if outputs == 1 else tuple(leaves[:outputs])
                first = derivative(rule, dy, leaves[outputs:], ctx.scalars)
                pairs = [
                    (d, g)
                    for d, g in zip(first, second, strict=True)
                    if d is not None and g is not None and d.requires_grad
                ]
                inputs = [t for t, need in zip(leaves, wanted, strict=True) if need]
                got: Iterator[Tensor | None] = iter([None] * len(inputs))
                if pairs and inputs:
                    got = iter(
                        torch.autograd.grad(
                            [d for d, _ in pairs],
                            inputs,
                            [g.to(d.dtype) for d, g in pairs],
                            create_graph=create,
                            allow_unused=True,
                        )
                    )
            grads = [next(got) if need else None for need in wanted]
            return (None, None, None, *grads, *(None for _ in ctx.scalars))

    def backward(backend: str, dys: tuple, saved: tuple, scalars: tuple, needs: tuple) -> Gradients:
        """The gradients by kernels; differentiable where they are to be differentiated again, and
        by the definition where many are taken at once."""
        if not torch.compiler.is_compiling() and any(map(_many, dys)):
            given = dys[0] if outputs == 1 else dys
            with torch.enable_grad():
                found = derivative(rule, given, saved, scalars)
            # What is saved in place of the tensors is of the outputs' dtype, as they are.
            likes = saved[:n] if rule.derivative is None else [dys[0]] * n
            return tuple(
                None if g is None or like is None else g.to(like.dtype)
                for g, like in zip(found, likes, strict=True)
            )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return Backward.apply(backend, needs, len(saved), *dys, *saved, *scalars)
        return kernels(backend, dys, saved, scalars, needs)

    class Forward(Function):
        """What is traced; outside of that csrc/differentiable.cpp does the same in a third of the
        time, which for small calls is most of it."""

        @staticmethod
        def forward(backend, *args):
            return rule.forward(backend, *args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.backend = inputs[0]
            # A tensor goes with what is saved: kept aside, torch's compiled backward loses it.
            drawn = [s for s in inputs[1 + n :] if isinstance(s, Tensor)]
            ctx.scalars = tuple(Tensor if isinstance(s, Tensor) else s for s in inputs[1 + n :])
            several = output if isinstance(output, tuple) else (output,)
            given, made, extras = inputs[1 : 1 + n], several[:outputs], several[outputs:]
            if extras:
                ctx.mark_non_differentiable(*extras)
            kept = rule.saves(given, made) if rule.saves else given
            ctx.save_for_backward(*kept, *extras, *drawn)
            if outputs > 1:
                ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, *dys):
            saved, needs = list(ctx.saved_tensors), ctx.needs_input_grad[1 : 1 + n]
            last_first = [saved.pop() if s is Tensor else s for s in reversed(ctx.scalars)]
            dys, scalars = dys[:outputs], tuple(reversed(last_first))
            if all(dy is None for dy in dys):
                return (None,) * (1 + n + len(ctx.scalars))
            grads = backward(ctx.backend, dys, tuple(saved), scalars, needs)
            return (None, *grads, *(None for _ in scalars))

    Forward.__name__ = Forward.__qualname__ = "".join(part.title() for part in rule.name.split("_"))
    Backward.__name__ = Backward.__qualname__ = Forward.__name__ + "Gradient"
    node: Any = Backward._backward_cls  # type: ignore[attr-defined]
    node.__name__ = node.__qualname__ = f"{Backward.__name__}Backward"  # in graphs and profiles
    count = 0 if whole else outputs if outputs > 1 else 1
    recorded = C.differentiable(
        Forward.__name__, n, outputs, count, rule.forward, rule.saves, backward
    )

    def call(backend: str, *args: Any) -> Any:
        traced = torch.compiler.is_compiling()
        if special():
            out = in_reference(rule, *args)
            if not whole:
                return out
            return (*(out if outputs > 1 else (out,)), *(None for _ in range(rule.extras)))
        if sharded(args[0]) and backend != "torch":
            return on_shards(rule, partial(call, backend), *args)
        if torch.is_grad_enabled():
            for tensor in args[:n]:
                if tensor is not None and tensor.requires_grad:
                    return (
                        shown(Forward.apply(backend, *args)) if traced else recorded(backend, *args)
                    )
        return shown(rule.forward(backend, *args))

    return call
