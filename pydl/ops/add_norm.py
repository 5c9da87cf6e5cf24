"""Residual and normalisation in one pass: add_layer_norm and add_rms_norm, the inside of a
transformer's block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from pydl import autograd
from pydl.autograd import Rule
from pydl.backends import FLOATS, choose, empty_like, kernel
from pydl.ops.layer_norm import (
    as_rows,
    check_weights,
    eps_of,
    flat,
    layer_norm_definition,
    numbers,
    rms_norm_definition,
    rows_of_shards,
    shaped,
    sums,
)
from pydl.ops.philox import check_rate, check_seed, draw_seed, dropout_factors
from pydl.traced import hand_over, proxied


def _dropped(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    return x if seed is None else x * dropout_factors(x.shape, seed, p).to(x.dtype)


def _reference(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """(norm(h), h) of h = residual + dropout(x), rounded to the residual's dtype.

    Scalars: the seed, or None where nothing is dropped, its rate, how many dimensions are
    normalised over, eps, and the dtypes of x and of the residual.
    """

    def reference(x: Tensor, residual: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        *weights, seed, p, dims, eps, _, stored = args
        h = residual + _dropped(x, seed, p)
        h = h.to(stored).to(h.dtype)
        return norm(h, *weights, dims, eps), h

    return reference


def _derivative(norm: Callable[..., Tensor], weights: int) -> Callable[..., tuple]:
    """Gradients from h and the weights, as a differentiable function."""

    def derivative(dys: tuple, saved: tuple, scalars: tuple) -> tuple:
        dy, dnew = dys
        seed, p, dims, eps, *_ = scalars
        leaves = [
            t if t is None or t.requires_grad else t.detach().requires_grad_()
            for t in saved[: 1 + weights]
        ]
        grads: list[Tensor | None] = [None] * (1 + weights)
        if dy is not None:
            given = [i for i, t in enumerate(leaves) if t is not None]
            wanted = [leaves[i] for i in given]
            out = norm(*leaves, dims, eps)
            for i, g in zip(
                given, torch.autograd.grad(out, wanted, dy, create_graph=True), strict=True
            ):
                grads[i] = g
        total = dnew if grads[0] is None else grads[0] if dnew is None else grads[0] + dnew
        return (_dropped(total, seed, p), total, *grads[1:])

    return derivative


def _forward(op: str, weights: int) -> Callable[..., tuple[Tensor, ...]]:
    def forward(backend: str, x: Tensor, residual: Tensor, *args: Any) -> tuple[Tensor, ...]:
        seed, p, dims, eps, *_ = args[weights:]
        x2, residual2 = as_rows(x, dims), as_rows(residual, dims)
        y, new = empty_like(x2), empty_like(residual2)
        # layer_norm's mean and scale, or rms_norm's scale.
        found = [numbers(x2) for _ in range(weights)]
        flats = [flat(weight) for weight in args[:weights]]
        kernel(backend, f"{op}_fwd")(y, new, *found, x2, residual2, *flats, seed, p, eps)
        return y.view(x.shape).detach(), new.view(residual.shape).detach(), *found

    return forward


def _dropout_kernel(backend: str, x: Tensor, seed: Tensor, p: float) -> Tensor:
    x = x.contiguous()
    out = empty_like(x)
    kernel(backend, "bias_act_fwd")(out, x, x.new_zeros(1).expand_as(x), seed, 0, 0.0, p)
    return out


def _backward(op: str, weights: int) -> Callable[..., tuple]:
    def backward(backend: str, dys: tuple, saved: tuple, scalars: tuple, needs: tuple) -> tuple:
        dy, dnew = dys
        h = saved[0]
        given, found = saved[1 : 1 + weights], saved[1 + weights :]
        seed, p, dims, _, dtype, _ = scalars
        if dy is None:
            dinput = None
            if needs[0]:
                dinput = dnew if seed is None else _dropout_kernel(backend, dnew, seed, p)
                dinput = dinput.to(dtype)
            return (dinput, dnew if needs[1] else None, *(None for _ in given))
        if h.dtype == dtype and not needs[0]:
            seed, p = None, 0.0
        # Without dropout, and in one dtype, both gradients are one tensor.
        split = needs[1] and (seed is not None or h.dtype != dtype)
        h2, dy2 = as_rows(h, dims), as_rows(dy, dims)
        dinput = empty_like(dy2)
        dresidual = empty_like(h2) if split else h2.new_empty(0)
        *totals, partials = sums(h2, given, needs[2:])
        dnew2 = None if dnew is None else as_rows(dnew, dims)
        kernel(backend, f"{op}_bwd")(
            dinput, dresidual, *totals, partials, dy2, dnew2, h2, *found, flat(given[0]), seed, p
        )
        dinput = dinput.view(h.shape)
        # One that is not asked for is none: the other's tensor in its place would pass for it when
        # it is differentiated again.
        return (
            dinput if needs[0] else None,
            dresidual.view(h.shape) if split else dinput if needs[1] else None,
            *(shaped(total, weight) for total, weight in zip(totals, given, strict=True)),
        )

    return backward


def _shards(x: Tensor, _: Tensor, *args: Any) -> tuple[list, list]:
    *weights, _, _, dims, _, _, _ = args
    rows, whole = rows_of_shards(x, dims)
    return [rows, rows, *(whole for _ in weights), "seed"], [rows, rows]


def _rule(op: str, norm: Callable[..., Tensor], weights: int) -> Rule:
    return Rule(
        op,
        2 + weights,
        _forward(op, weights),
        _backward(op, weights),
        _reference(norm),
        saves=lambda tensors, outputs: (outputs[1], *tensors[2:]),
        derivative=_derivative(norm, weights),
        extras=weights,
        outputs=2,
        shards=_shards,
    )


_LAYER_NORM = _rule("add_layer_norm", layer_norm_definition, 2)
_RMS_NORM = _rule("add_rms_norm", rms_norm_definition, 1)
_calls = {rule.name: autograd.make(rule) for rule in (_LAYER_NORM, _RMS_NORM)}


def _widened(input: Tensor, residual: Tensor) -> bool:
    """Whether the residual is kept in fp32 beside an input of 16 bits."""
    return residual.dtype == torch.float32 and input.dtype in FLOATS[1:3]


def _check(op: str, input: Tensor, residual: Tensor, dropout_p: float) -> None:
    check_rate(op, dropout_p)
    fits = residual.shape == input.shape and residual.device == input.device
    if not fits or (residual.dtype != input.dtype and not _widened(input, residual)):
        raise RuntimeError(
            f"pydl: {op}: residual is {residual.dtype} {tuple(residual.shape)} on "
            f"{residual.device}, wants the input's {input.dtype} {tuple(input.shape)} on "
            f"{input.device}, or float32 with an input of 16 bits"
        )


def native(
    norm: Callable[..., Tensor], input: Tensor, residual: Tensor, shape: Sequence[int],
    weights: Sequence[Tensor | None], eps: float | None, p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same by torch, whose own dropout serves where there is no seed."""
    x = _dropped(input, seed, p) if p == 0 or seed is not None else F.dropout(input, p)
    h = (residual + x).contiguous()
    if h.dtype != input.dtype:
        weights = [None if weight is None else weight.to(h.dtype) for weight in weights]
    return norm(h, list(shape), *weights, eps).to(input.dtype), h


def _run(
    rule: Rule, norm: Callable[..., Tensor], backend: str | None, input: Tensor, residual: Tensor,
    shape: Sequence[int], weights: dict[str, Tensor | None], eps: float | None, p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = rule.name
    _check(op, input, residual, p)
    check_weights(op, input, shape, **weights)
    check_seed(op, seed, input.device)
    chosen = choose(op, backend, input, *(() if _widened(input, residual) else (residual,)))
    if p == 0:
        seed = None
    if chosen == "torch":
        return native(norm, input, residual, shape, [*weights.values()], eps, p, seed)
    if p > 0 and seed is None:
        seed = draw_seed(input.device)
    args = (
        input, residual, *weights.values(), seed, p, len(shape), eps_of(input, eps), input.dtype,
        residual.dtype,
    )  # fmt: skip
    if chosen == "reference":
        return autograd.in_reference(rule, *args)
    return _calls[op](chosen, *args)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    training: bool = True,
    *,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual and layer norm in one pass, `(layer_norm(h), h)`, `h = residual + dropout(x)`.

    The sum is rounded to the residual's dtype, and what is normalised is the rounded one.

    Args:
        input: Any strides and floating dtype; its last dimensions are `normalized_shape`.
        residual: Of the input's shape; of its dtype, or fp32 with an input of 16 bits.
        normalized_shape: The dimensions to normalise over.
        weight: Of `normalized_shape`, in the input's dtype, or fp32 with an input of 16 bits.
        bias: Likewise.
        eps: Added to the (biased) variance.
        dropout_p: The share of the input that is dropped.
        training: Whether any is.
        seed: (seed, offset), two int64 values that choose what is dropped; None to draw them from
            torch's generator of the device.
        backend: Who computes; see `pydl.backends`.

    Returns:
        `layer_norm(h)` in the input's dtype, and h, the next residual, in the residual's; both
        contiguous. Saves h, which is alive anyway, and a mean and a reciprocal standard deviation a
        row; neither the input nor the dropout mask.

    Raises:
        ValueError: `dropout_p` is not in [0, 1].
        RuntimeError: shapes, dtypes or devices do not fit.
        TypeError: `normalized_shape` is no list or tuple of ints.

    Source: Ba et al. 2016, arXiv 1607.06450.
    """
    if has_torch_function_variadic(input, residual, weight, bias, seed) and proxied(
        input, residual, weight, bias, seed
    ):
        return hand_over(add_layer_norm, locals())
    p = float(dropout_p) if training or not 0 <= dropout_p <= 1 else 0.0
    weights = {"weight": weight, "bias": bias}
    return _run(
        _LAYER_NORM, F.layer_norm, backend, input, residual, normalized_shape, weights, float(eps),
        p, seed,
    )  # fmt: skip


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    *,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual and RMS norm in one pass, `(rms_norm(h), h)`, `h = residual + dropout(x)`.

    The sum is rounded to the residual's dtype, and what is normalised is the rounded one.

    Args:
        input: Any strides and floating dtype; its last dimensions are `normalized_shape`.
        residual: Of the input's shape; of its dtype, or fp32 with an input of 16 bits.
        normalized_shape: The dimensions to normalise over.
        weight: Of `normalized_shape`, in the input's dtype, or fp32 with an input of 16 bits.
        eps: Added to the mean square; None for `torch.finfo(dtype).eps` of what is computed in:
            fp32 for 16 bits.
        dropout_p: See `add_layer_norm`.
        training: See `add_layer_norm`.
        seed: See `add_layer_norm`.
        backend: Who computes; see `pydl.backends`.

    Returns:
        `rms_norm(h)` in the input's dtype, and h, the next residual, in the residual's; both
        contiguous. Saves h, which is alive anyway, and a reciprocal root mean square a row; neither
        the input nor the dropout mask.

    Raises:
        ValueError: `dropout_p` is not in [0, 1].
        RuntimeError: shapes, dtypes or devices do not fit.
        TypeError: `normalized_shape` is no list or tuple of ints.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    if has_torch_function_variadic(input, residual, weight, seed) and proxied(
        input, residual, weight, seed
    ):
        return hand_over(add_rms_norm, locals())
    p = float(dropout_p) if training or not 0 <= dropout_p <= 1 else 0.0
    return _run(
        _RMS_NORM, F.rms_norm, backend, input, residual, normalized_shape, {"weight": weight}, eps,
        p, seed,
    )  # fmt: skip
