"""Triton: y = dropout(act(x + bias)), bias along the channels of (outer, channels, inner)."""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from pydl.kernels.activation import channel_of, pieces_of
from pydl.kernels.common import (
    act_backward_from_input,
    act_forward,
    add_partials,
    block_of,
    dropout_factor,
    like,
    rounded,
    threshold,
)
from torch import Tensor


@triton.jit
def fwd_kernel(
    y, x, bias, seed, n, channels, inner, p, limit, scale,
    ACT: tl.constexpr, DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    inside = i < n - start
    channel = (start + i) // inner % channels
    value = tl.load(x + start + i, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    out = act_forward(value + b, p, ACT)
    if DROPOUT:
        out = out * dropout_factor(seed, start + i, limit, scale)
    tl.store(y + start + i, rounded(out, y.dtype.element_ty), mask=inside)


@triton.jit
def bwd_kernel(
    dx, partials, dy, x, bias, seed, outer, channels, inner, outer_pieces, inner_pieces,
    p, limit, scale,
    ACT: tl.constexpr, DROPOUT: tl.constexpr, COLUMNS_FIRST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tiles of ROWS x COLUMNS: rows of all channels where these are innermost (inner is 1), else a
    part of the inner dimension for ROWS of the outer one, of one channel. Grid: (blocks of channels
    or channels, pieces)."""
    piece = tl.program_id(1).to(tl.int64)
    of_outer = piece // inner_pieces
    begin = outer * of_outer // outer_pieces
    end = outer * (of_outer + 1) // outer_pieces
    if COLUMNS_FIRST:
        left = tl.program_id(0).to(tl.int64) * COLUMNS
        right = left * 0 + channels
        step = right
        base = left * 0
        stop = tl.minimum(left + COLUMNS, right)
    else:
        of_inner = piece % inner_pieces
        left = inner * of_inner // inner_pieces
        right = inner * (of_inner + 1) // inner_pieces
        step = piece * 0 + channels * inner
        base = tl.program_id(0).to(tl.int64) * inner
        stop = right
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for column in range(left, stop, COLUMNS):
        c = column + tl.arange(0, COLUMNS).to(tl.int64)
        if COLUMNS_FIRST:
            b = tl.load(bias + c, mask=c < right, other=0.0).to(tl.float32)[None, :]
        else:
            b = tl.load(bias + tl.program_id(0)).to(tl.float32)
        for first in range(begin, end, ROWS):
            r = first + tl.arange(0, ROWS).to(tl.int64)
            inside = (r < end)[:, None] & (c < right)[None, :]
            at = base + r[:, None] * step + c[None, :]
            value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
            if DROPOUT:
                d = d * dropout_factor(seed, at, limit, scale)
            out = act_backward_from_input(d, value + b, p, ACT)
            tl.store(dx + at, rounded(out, dx.dtype.element_ty), mask=inside)
            total += tl.sum(tl.where(inside, out, 0.0), axis=0)
    if COLUMNS_FIRST:
        c = left + tl.arange(0, COLUMNS)
        tl.store(partials + piece * channels + c, total.to(tl.float64), mask=c < right)
    else:
        tl.store(
            partials + piece * channels + tl.program_id(0), tl.sum(total.to(tl.float64), axis=0)
        )


def _fwd(
    y: Tensor, x: Tensor, bias: Tensor, seed: Tensor | None, act: int, p: float, dropout_p: float
) -> None:
    if y.numel() == 0:
        return
    (x,) = like(y, x)
    channels, inner, bias = channel_of(y, bias)
    block, warps = block_of(y.numel())
    fwd_kernel[(triton.cdiv(y.numel(), block),)](
        y, x, bias, seed if seed is not None else y, y.numel(), channels, inner, float(p),
        threshold(dropout_p), 1 / (1 - dropout_p) if dropout_p < 1 else 0.0,
        ACT=act, DROPOUT=dropout_p > 0, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def _bwd(
    dx: Tensor, total: Tensor, partials: Tensor, dy: Tensor, x: Tensor, bias: Tensor,
    seed: Tensor | None, act: int, p: float, dropout_p: float,
) -> None:  # fmt: skip
    outer, channels, inner = x.shape
    if channels == 0:
        return
    first = inner == 1
    cut = (max(1, min(outer, partials.shape[0])), 1) if first else pieces_of(partials, outer, inner)
    count = cut[0] * cut[1]
    rows, columns = (16, 64) if first else (1, 512)
    bwd_kernel[(triton.cdiv(channels, columns) if first else channels, count)](
        dx, partials, dy, x, bias, seed if seed is not None else x, outer, channels, inner, *cut,
        float(p),
        threshold(dropout_p), 1 / (1 - dropout_p) if dropout_p < 1 else 0.0,
        ACT=act, DROPOUT=dropout_p > 0, COLUMNS_FIRST=first, ROWS=rows, COLUMNS=columns,
        num_warps=4,
    )  # fmt: skip
    add_partials(total, partials[:count])


EXPORTS: dict[str, Callable[..., None]] = {"bias_act_fwd": _fwd, "bias_act_bwd": _bwd}
