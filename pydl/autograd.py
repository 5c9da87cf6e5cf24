"""From kernels to differentiable ops: one `torch.autograd.Function` per op, the same for all
backends.

An op states a `Rule`: how its kernels are called forward and backward, and its plain-PyTorch
definition. What autograd asks beyond one backward pass is derived from the definition, so that it
holds for every op alike: double and higher backward, forward-mode derivatives and vmap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

Gradients = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Rule:
    """How an op runs.

    Attributes:
        name: The op.
        tensors: How many tensors, None allowed, come first among the arguments; scalars follow.
        forward: `(backend, *tensors, *scalars) -> Tensor`, by kernels; with `extras` a tuple of the
            output and of so many more tensors, which backward gets after the saved ones.
        backward: `(backend, dy, saved, scalars, needs) -> a gradient per tensor`, by kernels. Never
            writes `saved`; may return None where `needs` is false.
        reference: `(*tensors, *scalars) -> Tensor` in plain PyTorch.
        saves_output: Backward needs the output only; else it gets the tensors.
        derivative: `(dy, saved, scalars) -> a gradient per tensor` in plain differentiable PyTorch;
            needed where the output is saved, else derived from `reference`.
        pointwise: All tensors have the output's shape and elements do not meet.
        extras: How many tensors come along with the output for backward, not differentiable.
    """

    name: str
    tensors: int
    forward: Callable[..., Any]
    backward: Callable[..., Gradients]
    reference: Callable[..., Tensor]
    saves_output: bool = False
    derivative: Callable[..., Gradients] | None = None
    pointwise: bool = False
    extras: int = 0


def wide(tensor: Any) -> Any:
    """fp32 for fp16 and bf16; others, and None, as they are."""
    if tensor is None:
        return None
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _floating(tensor: Any) -> bool:
    return tensor is not None and tensor.is_floating_point()


def in_reference(rule: Rule, *args: Any) -> Tensor:
    """The plain definition, computed in fp32 at least and rounded once."""
    tensors = args[: rule.tensors]
    if rule.pointwise and tensors[0].dim() == 0:
        # The tangent of a tensor without dimensions takes the dtype of a Python number it meets.
        lines = (t.reshape(1) for t in tensors)
        return in_reference(rule, *lines, *args[rule.tensors :]).reshape(())
    out = rule.reference(*(wide(t) for t in tensors), *args[rule.tensors :])
    return out.to(tensors[0].dtype)


def derivative(rule: Rule, dy: Tensor, saved: Sequence[Any], scalars: tuple) -> Gradients:
    """The gradients as a differentiable function of dy and of what was saved."""
    if rule.derivative is not None:
        return rule.derivative(wide(dy), tuple(wide(t) for t in saved), scalars)
    leaves = [
        t if not _floating(t) or t.requires_grad else t.detach().requires_grad_()
        for t in saved[: rule.tensors]
    ]
    floats = [t for t in leaves if _floating(t)]
    out = rule.reference(*(wide(t) for t in leaves), *scalars)
    got = iter(torch.autograd.grad(out, floats, wide(dy), create_graph=True, allow_unused=True))
    return tuple(next(got) if _floating(t) else None for t in leaves)


def special() -> bool:
    """Whether a functorch transform or forward-mode differentiation is going on.

    Then the definition computes: every transform sees through it, and not through a kernel.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def make(rule: Rule) -> Callable[..., Tensor]:
    """Returns `call(backend, *tensors, *scalars)`, differentiable."""
    n = rule.tensors

    class Backward(Function):
        """The backward pass as an op of its own, so that it can be differentiated again."""

        @staticmethod
        def forward(backend, needs, count, *args):
            return rule.backward(backend, args[0], args[1 : 1 + count], args[1 + count :], needs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            count = inputs[2]
            ctx.save_for_backward(*inputs[3 : 4 + count])
            ctx.scalars = inputs[4 + count :]
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
                first = derivative(rule, leaves[0], leaves[1:], ctx.scalars)
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

    class Forward(Function):
        @staticmethod
        def forward(backend, *args):
            return rule.forward(backend, *args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.backend = inputs[0]
            ctx.scalars = inputs[1 + n :]
            if rule.extras:
                extras = output[1:]
                ctx.mark_non_differentiable(*extras)
                ctx.save_for_backward(*inputs[1 : 1 + n], *extras)
            else:
                ctx.save_for_backward(*((output,) if rule.saves_output else inputs[1 : 1 + n]))

        @staticmethod
        def backward(ctx, dy, *of_extras):
            saved, needs = ctx.saved_tensors, ctx.needs_input_grad[1 : 1 + n]
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                grads = Backward.apply(ctx.backend, needs, len(saved), dy, *saved, *ctx.scalars)
            else:
                grads = rule.backward(ctx.backend, dy, saved, ctx.scalars, needs)
            return (None, *grads, *(None for _ in ctx.scalars))

    Forward.__name__ = Forward.__qualname__ = "".join(part.title() for part in rule.name.split("_"))
    Backward.__name__ = Backward.__qualname__ = Forward.__name__ + "Gradient"
    # Function.apply binds default arguments by inspection, which takes longer than a small kernel;
    # outside of functorch its base does all that is needed.
    plain_apply = super(Function, Forward).apply

    def call(backend: str, *args: Any) -> Tensor:
        traced = torch.compiler.is_compiling()
        if not traced and special():
            return in_reference(rule, *args)
        if torch.is_grad_enabled():
            for tensor in args[:n]:
                if tensor is not None and tensor.requires_grad:
                    out = (Forward.apply if traced else plain_apply)(backend, *args)
                    return out[0] if rule.extras else out
        out = rule.forward(backend, *args)
        return out[0] if rule.extras else out

    return call
