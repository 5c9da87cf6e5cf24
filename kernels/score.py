"""Triton: scores of additive and Gaussian attention and their gradients, by tiles of queries, keys
and numbers. See csrc/score.h for the formulas."""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from pydl.kernels.common import act_forward
from torch import Tensor

# (rows, others, numbers) of a program's tile: what registers hold.
_FORWARD, _BACKWARD = (16, 16, 16), (16, 8, 16)


@triton.jit
def meet(q, k, ADDITIVE: tl.constexpr):
    """What all else of a pair follows from."""
    if ADDITIVE:
        return act_forward(q + k, 0.0, 2)
    else:
        return q - k


@triton.jit
def fwd_kernel(
    scores, query, key, weight, queries, keys, width, query_tiles, key_tiles,
    ADDITIVE: tl.constexpr, ROWS: tl.constexpr, OTHERS: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of keys, within them of queries, within them the batch."""
    program = tl.program_id(0)
    s = program % key_tiles * OTHERS
    l = program // key_tiles % query_tiles * ROWS  # noqa: E741
    b = (program // key_tiles // query_tiles).to(tl.int64)
    row = tl.arange(0, ROWS)[:, None]
    other = tl.arange(0, OTHERS)[:, None]
    number = tl.arange(0, NUMBERS)[None, :]
    at_q = query + (b * queries + l) * width + row * width + number
    at_k = key + (b * keys + s) * width + other * width + number
    sums = tl.zeros((ROWS, OTHERS, NUMBERS), dtype=tl.float32)
    for start in range(0, width, NUMBERS):
        inside = start + number < width
        q = tl.load(at_q + start, mask=inside & (l + row < queries), other=0.0).to(tl.float32)
        k = tl.load(at_k + start, mask=inside & (s + other < keys), other=0.0).to(tl.float32)
        w = tl.load(weight + start + number, mask=inside, other=0.0).to(tl.float32)[:, None, :]
        t = meet(q[:, None, :], k[None, :, :], ADDITIVE)
        if ADDITIVE:
            sums += w * t
        else:
            sums += (w * t) * (w * t)
    total = tl.sum(sums, axis=2)
    if not ADDITIVE:
        total = total * -0.5
    column = tl.arange(0, OTHERS)[None, :]
    to = scores + (b * queries + l) * keys + s + row * keys + column
    tl.store(to, total, mask=(l + row < queries) & (s + column < keys))


@triton.jit
def bwd_kernel(
    dmine, dweight, dscores, mine, other, weight, rows, others, width, row_stride, other_stride,
    tiles, blocks, ADDITIVE: tl.constexpr, OF_QUERIES: tl.constexpr, ROWS: tl.constexpr,
    OTHERS: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """The gradient of queries, from all keys, and their part of the weight's; or that of keys, from
    all queries. Grid: blocks of numbers, within them tiles of rows, within them the batch."""
    program = tl.program_id(0)
    h = program % blocks * NUMBERS + tl.arange(0, NUMBERS)[None, :]
    tile = program // blocks % tiles
    b = (program // blocks // tiles).to(tl.int64)
    first = (tile * ROWS).to(tl.int64)
    inside = h < width
    row = tl.arange(0, ROWS)[:, None]
    there = tile * ROWS + row < rows
    at = (b * rows + first) * width + row * width + h
    x = tl.load(mine + at, mask=inside & there, other=0.0).to(tl.float32)[:, None, :]
    each = tl.arange(0, OTHERS)
    at_other = other + b * others * width + each[:, None] * width + h
    at_ds = dscores + b * rows * others + first * row_stride
    at_ds = at_ds + row * row_stride + each[None, :] * other_stride
    sums = tl.zeros((ROWS, OTHERS, NUMBERS), dtype=tl.float32)
    weights = tl.zeros((ROWS, OTHERS, NUMBERS), dtype=tl.float32)
    for start in range(0, others, OTHERS):
        some = start + each < others
        y = tl.load(at_other, mask=inside & some[:, None], other=0.0).to(tl.float32)[None, :, :]
        ds = tl.load(at_ds, mask=there & some[None, :], other=0.0)[:, :, None]
        t = meet(x, y, ADDITIVE) if OF_QUERIES else meet(y, x, ADDITIVE)
        if ADDITIVE:
            sums += ds * (1.0 - t * t)
            if OF_QUERIES:
                weights += ds * t
        else:
            sums += ds * t
            if OF_QUERIES:
                weights += ds * t * t
        at_other += OTHERS * width
        at_ds += OTHERS * other_stride
    w = tl.load(weight + h, mask=inside, other=0.0).to(tl.float32)
    factor = w
    if not ADDITIVE:
        factor = w * w
        if OF_QUERIES:
            factor = -factor
    tl.store(dmine + at, factor * tl.sum(sums, axis=1), mask=inside & there)
    if OF_QUERIES:
        total = tl.sum(tl.sum(weights, axis=1), axis=0)[None, :]
        if not ADDITIVE:
            total = -w * total
        batch = tl.num_programs(0) // blocks // tiles
        tl.store(dweight + (tile * batch + b) * width + h, total, mask=inside)


def _fwd(scores: Tensor, query: Tensor, key: Tensor, weight: Tensor, form: int) -> None:
    batch, queries, width = query.shape
    keys = key.shape[1]
    if scores.numel() == 0:
        return
    rows, others, numbers = _FORWARD
    tiles = triton.cdiv(queries, rows), triton.cdiv(keys, others)
    fwd_kernel[(batch * tiles[0] * tiles[1],)](
        scores, query, key, weight, queries, keys, width, *tiles, ADDITIVE=form == 0, ROWS=rows,
        OTHERS=others, NUMBERS=numbers, num_warps=4,
    )  # fmt: skip


def _bwd(
    dquery: Tensor, dkey: Tensor, dweight: Tensor, dscores: Tensor, query: Tensor, key: Tensor,
    weight: Tensor, form: int,
) -> None:  # fmt: skip
    """Every pair meets twice, so that no sum crosses programs but the weight's."""
    batch, queries, width = query.shape
    keys = key.shape[1]
    rows, others, numbers = _BACKWARD
    tiles = triton.cdiv(queries, rows)
    if dkey.shape[0] != 1 or dweight.shape[0] != max(1, tiles):
        raise RuntimeError(
            f"pydl: score: dkey has {dkey.shape[0]} parts and dweight {dweight.shape[0]}, wants 1 "
            f"and {max(1, tiles)}"
        )
    if tiles == 0:
        dweight.zero_()
    blocks = triton.cdiv(width, numbers)
    for of_queries, dmine, mine, other, strides in (
        (True, dquery, query, key, (keys, 1)),
        (False, dkey, key, query, (1, keys)),
    ):
        if dmine.numel() == 0:
            continue
        tiles = triton.cdiv(mine.shape[1], rows)
        bwd_kernel[(batch * tiles * blocks,)](
            dmine, dweight, dscores, mine, other, weight, mine.shape[1], other.shape[1], width,
            *strides, tiles, blocks, ADDITIVE=form == 0, OF_QUERIES=of_queries, ROWS=rows,
            OTHERS=others, NUMBERS=numbers, num_warps=4,
        )  # fmt: skip


EXPORTS: dict[str, Callable[..., None]] = {"score_fwd": _fwd, "score_bwd": _bwd}
