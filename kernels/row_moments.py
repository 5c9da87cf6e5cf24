"""Triton: the moments of a row, or of a row of sums, block by block."""

from __future__ import annotations

import triton
import triton.language as tl
from pydl.kernels.common import dropout_factor, rounded


@triton.jit
def summed(x, residual, seed, at, inside, limit, factor, ADD: tl.constexpr, DROPOUT: tl.constexpr):
    """x in fp32, 0 outside; where ADD, residual + dropout(x) as it is stored."""
    h = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        h = h * dropout_factor(seed, at, limit, factor)
    if ADD:
        h += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        h = rounded(h, residual.dtype.element_ty).to(tl.float32)
    return h


@triton.jit
def two_passes(
    first, x, residual, seed, start, i, n, limit, factor,
    CENTRED: tl.constexpr, ADD: tl.constexpr, DROPOUT: tl.constexpr, ONE: tl.constexpr,
    BLOCK: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """(mean, what is left of it, variance) in TYPE."""
    shift = tl.zeros((), dtype=TYPE)
    if CENTRED:
        sums = first.to(TYPE)
        if not ONE:
            for c in range(BLOCK, n, BLOCK):
                at = start + c + i
                h = summed(x, residual, seed, at, c + i < n, limit, factor, ADD, DROPOUT)
                sums += h.to(TYPE)
        shift = tl.sum(sums, axis=0) / n
    d = tl.where(i < n, first.to(TYPE) - shift, 0.0)
    sums = d
    squares = d * d
    if not ONE:
        for c in range(BLOCK, n, BLOCK):
            h = summed(x, residual, seed, start + c + i, c + i < n, limit, factor, ADD, DROPOUT)
            d = tl.where(c + i < n, h.to(TYPE) - shift, 0.0)
            sums += d
            squares += d * d
    rest = tl.zeros((), dtype=TYPE)
    if CENTRED:
        rest = tl.sum(sums, axis=0) / n
    variance = tl.sum(squares, axis=0) / n - rest * rest
    return shift, rest, tl.where(variance < 0.0, 0.0, variance)


@triton.jit
def moments(
    first, x, residual, seed, start, i, n, eps, limit, factor,
    CENTRED: tl.constexpr, ADD: tl.constexpr, DROPOUT: tl.constexpr, ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(shift, rest, 1 / sqrt(variance + eps)) of the row at `start`, whose first block is at hand.

    The mean is shift + rest: where it is large, fp32 alone would lose its end. Values whose sums or
    squares overflow fp32 are added in fp64.
    """
    shift, rest, variance = two_passes(
        first, x, residual, seed, start, i, n, limit, factor, CENTRED, ADD, DROPOUT, ONE, BLOCK,
        tl.float32,
    )  # fmt: skip
    scale = 1.0 / tl.sqrt(variance + eps)
    if not variance < float("inf"):
        mean, left, variance64 = two_passes(
            first, x, residual, seed, start, i, n, limit, factor, CENTRED, ADD, DROPOUT, ONE,
            BLOCK, tl.float64,
        )  # fmt: skip
        shift = (mean + left).to(tl.float32)
        rest = ((mean - shift.to(tl.float64)) + left).to(tl.float32)
        scale = (1.0 / tl.sqrt(variance64 + eps)).to(tl.float32)
    return shift, rest, scale
