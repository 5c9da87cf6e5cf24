"""Triton: the elementwise activations, and the two with a learnt parameter (prelu, swish)."""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from pydl.kernels.common import (
    act_backward,
    act_forward,
    add_partials,
    block_of,
    like,
    logistic,
    rounded,
)
from torch import Tensor


@triton.jit
def unary_fwd_kernel(y, x, n, p, ACT: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    inside = i < n - start
    value = tl.load(x + start + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + start + i, rounded(act_forward(value, p, ACT), y.dtype.element_ty), mask=inside)


@triton.jit
def unary_bwd_kernel(dx, dy, saved, n, p, ACT: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    inside = i < n - start
    s = tl.load(saved + start + i, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + start + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + start + i, rounded(act_backward(d, s, p, ACT), dx.dtype.element_ty), mask=inside)


@triton.jit
def learnt_forward(x, p, SWISH: tl.constexpr):
    if SWISH:
        return x * logistic(p * x)[0]
    else:
        return tl.where(x > 0, x, p * x)


@triton.jit
def learnt_backward(dy, x, p, SWISH: tl.constexpr):
    """(dx, the element's part of the parameter's gradient)"""
    if SWISH:
        value, slope = logistic(p * x)
        return dy * (value + p * x * slope), dy * (x * (x * slope))
    else:
        return tl.where(x > 0, dy, p * dy), tl.where(x > 0, 0.0, dy * x)


@triton.jit
def learnt_fwd_kernel(
    y, x, parameter, n, channels, inner, SWISH: tl.constexpr, BLOCK: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    inside = i < n - start
    channel = (start + i) // inner % channels
    value = tl.load(x + start + i, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(parameter + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        y + start + i, rounded(learnt_forward(value, p, SWISH), y.dtype.element_ty), mask=inside
    )


@triton.jit
def learnt_columns_kernel(
    dx, partials, dy, x, parameter, rows, channels, pieces, SWISH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Channels innermost. Grid: (blocks of channels, pieces)."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    piece = tl.program_id(1).to(tl.int64)
    begin = rows * piece // pieces
    end = rows * (piece + 1) // pieces
    p = tl.load(parameter + c, mask=c < channels, other=0.0).to(tl.float32)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(begin, end, ROWS):
        r = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (r < end)[:, None] & (c < channels)[None, :]
        at = r[:, None] * channels + c[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        out, part = learnt_backward(d, value, p[None, :], SWISH)
        tl.store(dx + at, rounded(out, dx.dtype.element_ty), mask=inside)
        total += tl.sum(tl.where(inside, part, 0.0), axis=0)
    tl.store(partials + piece * channels + c, total.to(tl.float64), mask=c < channels)


@triton.jit
def learnt_rows_kernel(
    dx, partials, dy, x, parameter, outer, channels, inner, outer_pieces, inner_pieces,
    SWISH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Channels outside. Grid: (channels, pieces)."""
    channel = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1).to(tl.int64)
    of_outer = piece // inner_pieces
    of_inner = piece % inner_pieces
    begin = inner * of_inner // inner_pieces
    end = inner * (of_inner + 1) // inner_pieces
    p = tl.load(parameter + channel).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(outer * of_outer // outer_pieces, outer * (of_outer + 1) // outer_pieces):
        start = (row * channels + channel) * inner
        for first in range(begin, end, BLOCK):
            i = first + tl.arange(0, BLOCK).to(tl.int64)
            inside = i < end
            value = tl.load(x + start + i, mask=inside, other=0.0).to(tl.float32)
            d = tl.load(dy + start + i, mask=inside, other=0.0).to(tl.float32)
            out, part = learnt_backward(d, value, p, SWISH)
            tl.store(dx + start + i, rounded(out, dx.dtype.element_ty), mask=inside)
            total += tl.where(inside, part, 0.0)
    tl.store(partials + piece * channels + channel, tl.sum(total.to(tl.float64), axis=0))


def pieces_of(partials: Tensor, outer: int, inner: int) -> tuple[int, int]:
    """How (outer, inner) is cut, as csrc/pieces.h does it."""
    along_outer = max(1, min(outer, partials.shape[0]))
    return along_outer, max(1, min(inner // 4096, partials.shape[0] // along_outer))


def _unary(act: int) -> tuple[Callable[..., None], Callable[..., None]]:
    def forward(y: Tensor, x: Tensor, p: float = 0.0) -> None:
        if y.numel() == 0:
            return
        (x,) = like(y, x)
        block, warps = block_of(y.numel())
        grid = (triton.cdiv(y.numel(), block),)
        unary_fwd_kernel[grid](y, x, y.numel(), float(p), ACT=act, BLOCK=block, num_warps=warps)

    def backward(dx: Tensor, dy: Tensor, saved: Tensor, p: float = 0.0) -> None:
        if dx.numel() == 0:
            return
        dy, saved = like(dx, dy, saved)
        block, warps = block_of(dx.numel())
        grid = (triton.cdiv(dx.numel(), block),)
        unary_bwd_kernel[grid](
            dx, dy, saved, dx.numel(), float(p), ACT=act, BLOCK=block, num_warps=warps
        )

    return forward, backward


def channel_of(y: Tensor, parameter: Tensor) -> tuple[int, int, Tensor]:
    """(channels, inner, the values in one run) of a parameter that is expanded to the shape of y:
    element i of y's memory has channel i // inner % channels."""
    for d in range(y.dim()):
        if parameter.stride(d) != 0 and y.shape[d] > 1:
            values = parameter
            if parameter.stride(d) != 1:
                values = parameter.as_strided((y.shape[d],), (parameter.stride(d),)).contiguous()
            return y.shape[d], y.stride(d), values
    return 1, 1, parameter


def _learnt(swish: bool) -> tuple[Callable[..., None], Callable[..., None]]:
    def forward(y: Tensor, x: Tensor, parameter: Tensor) -> None:
        if y.numel() == 0:
            return
        (x,) = like(y, x)
        channels, inner, parameter = channel_of(y, parameter)
        block, warps = block_of(y.numel())
        learnt_fwd_kernel[(triton.cdiv(y.numel(), block),)](
            y, x, parameter, y.numel(), channels, inner, SWISH=swish, BLOCK=block, num_warps=warps
        )

    def backward(
        dx: Tensor, total: Tensor, partials: Tensor, dy: Tensor, x: Tensor, parameter: Tensor
    ) -> None:
        outer, channels, inner = x.shape
        if channels == 0:
            return
        if inner == 1:
            pieces = max(1, min(outer, partials.shape[0]))
            learnt_columns_kernel[(triton.cdiv(channels, 64), pieces)](
                dx, partials, dy, x, parameter, outer, channels, pieces,
                SWISH=swish, ROWS=16, COLUMNS=64, num_warps=4,
            )  # fmt: skip
            count = pieces
        else:
            cut = pieces_of(partials, outer, inner)
            count = cut[0] * cut[1]
            learnt_rows_kernel[(channels, count)](
                dx, partials, dy, x, parameter, outer, channels, inner, *cut,
                SWISH=swish, BLOCK=1024, num_warps=4,
            )  # fmt: skip
        add_partials(total, partials[:count])

    return forward, backward


_NUMBERS = {
    "sigmoid": 1, "tanh": 2, "relu": 3, "leaky_relu": 4, "elu": 5, "selu": 6,
    "gelu": 7, "gelu_tanh": 8,    "silu": 9, "swish": 10, "mish": 11,
}  # fmt: skip
EXPORTS: dict[str, Callable[..., None]] = {}
for _name, _act in _NUMBERS.items():
    EXPORTS[f"{_name}_fwd"], EXPORTS[f"{_name}_bwd"] = _unary(_act)
EXPORTS["prelu_fwd"], EXPORTS["prelu_bwd"] = _learnt(False)
EXPORTS["swish_learnt_fwd"], EXPORTS["swish_learnt_bwd"] = _learnt(True)
