"""Triton: the gradients of what is added to attention's scores, the mask and the relative bias,
each the scores' summed over what it was repeated over. A program adds in a fixed order what falls
on its tile; where tiles are few, pieces of the sum are added at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from pydl.kernels.attention_call import SIZES, Call
from pydl.kernels.attention_tile import (
    block,
    keys_seen,
    product,
    row_numbers_of,
    scaled,
    score_gradient,
    sequence,
    start_of,
    weights,
)
from torch import Tensor

_COUNTS = ("batches", "of_batches", "of_heads", "blocks_q", "blocks_k", "diagonals", "pieces")
# Programs that keep a GPU busy.
_ENOUGH = 512


@triton.jit
def bias_tile(
    q_start, dout_start, k_start, v_start, numbers_of, all_rows, first_i, first_j, b, h, dout,
    inputs, numbers, heads, longest_q, longest_k, queries, keys, width, value_width, shift, left,
    right,
    FORM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile's scores; first_j may be negative."""
    i = first_i + tl.arange(0, BLOCK_Q)[:, None]
    j = first_j + tl.arange(0, BLOCK_K)[None, :]
    r = j.trans() + 0
    x = block(q_start, inputs.q.row, first_i, queries, width, BLOCK_Q, WIDTH, False, FORM.EVEN)
    d = block(
        dout_start, dout.row, first_i, queries, value_width, BLOCK_Q, VALUES, False, FORM.EVEN
    )
    there = (r >= 0) & (r < keys)
    c = tl.arange(0, WIDTH)[None, :]
    y = tl.load(k_start + r.to(tl.int64) * inputs.k.row + c, mask=there & (c < width), other=0.0)
    c = tl.arange(0, VALUES)[None, :]
    v = tl.load(
        v_start + r.to(tl.int64) * inputs.v.row + c, mask=there & (c < value_width), other=0.0
    )
    top, left_over, delta = row_numbers_of(numbers_of, all_rows, first_i, queries, BLOCK_Q, FORM)
    p, _, factor = weights(
        product(scaled(x, numbers, FORM), tl.trans(y)), i, tl.maximum(j, 0), first_j, b, h,
        top[:, None], left_over[:, None], inputs, numbers, heads, longest_q, longest_k, queries,
        keys, shift, left, right, True, FORM, 0,
    )  # fmt: skip
    ds = score_gradient(p, product(d, tl.trans(v)), factor, delta[:, None], FORM)
    return tl.where(j >= 0, ds, 0.0)


@triton.jit(do_not_specialize=(*SIZES, *_COUNTS))
def dmask_kernel(
    to, row_numbers, all_rows, dout, inputs, numbers, heads, group, queries, keys, width,
    value_width, left, right, bottom, rows, batches, of_batches, of_heads, blocks_q, blocks_k,
    pieces,
    FORM: tl.constexpr, OF_QUERIES: tl.constexpr, OF_KEYS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """to: (pieces, of_batches, of_heads, queries or 1, keys or 1). Grid: pieces x of_batches x
    of_heads x blocks_q x blocks_k, where a mask without queries or keys has one block of them."""
    program = tl.program_id(0)
    block_k = program % blocks_k
    block_q = program // blocks_k % blocks_q
    of_h = program // blocks_k // blocks_q % of_heads
    rest = program // blocks_k // blocks_q // of_heads
    of_b = rest % of_batches
    piece = (rest // of_batches).to(tl.int64)
    longest_q = queries
    longest_k = keys
    every_h = tl.where(of_heads == 1, heads, 1)
    every = every_h * tl.where(of_batches == 1, batches, 1)
    sums = tl.zeros((BLOCK_Q, BLOCK_K), dtype=tl.float32)
    begin = (every * piece // pieces).to(tl.int32)
    end = (every * (piece + 1) // pieces).to(tl.int32)
    for n in range(begin, end):
        b = of_b + n // every_h
        h = of_h + n % every_h
        batch, first_q, first_k, queries, keys, shift = sequence(
            inputs, b, longest_q, longest_k, bottom, FORM
        )
        q_start = start_of(inputs.q, batch, h, first_q)
        dout_start = start_of(dout, batch, h, first_q)
        k_start = start_of(inputs.k, batch, h // group, first_k)
        v_start = start_of(inputs.v, batch, h // group, first_k)
        numbers_of = row_numbers + (batch * heads + h) * rows + first_q
        first_block = block_q
        last_block = tl.minimum(block_q + 1, (queries + BLOCK_Q - 1) // BLOCK_Q)
        if not OF_QUERIES:
            last_block = (queries + BLOCK_Q - 1) // BLOCK_Q
        for t in range(first_block, last_block):
            first_i = t * BLOCK_Q
            last_i = tl.minimum(first_i + BLOCK_Q, queries)
            _, full_end, first_seen, before, edges = keys_seen(
                first_i, last_i, keys, shift, left, right, BLOCK_K, FORM
            )
            last_seen = full_end + (edges - before) * BLOCK_K
            if OF_KEYS:
                first_seen = tl.maximum(first_seen, block_k * BLOCK_K)
                last_seen = tl.minimum(last_seen, (block_k + 1) * BLOCK_K)
            for first_j in range(first_seen, last_seen, BLOCK_K):
                sums += bias_tile(
                    q_start, dout_start, k_start, v_start, numbers_of, all_rows, first_i, first_j,
                    b, h, dout, inputs, numbers, heads, longest_q, longest_k, queries, keys, width,
                    value_width, shift, left, right, FORM, BLOCK_Q, BLOCK_K, WIDTH, VALUES,
                )  # fmt: skip
    i = block_q * BLOCK_Q + tl.arange(0, BLOCK_Q)[:, None]
    j = block_k * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    rows_of_mask = longest_q
    columns = longest_k
    if not OF_QUERIES:
        sums = tl.sum(sums, 0)[None, :]
        i = tl.zeros((1, 1), dtype=tl.int32)
        rows_of_mask = 1
    if not OF_KEYS:
        sums = tl.sum(sums, 1)[:, None]
        j = tl.zeros((1, 1), dtype=tl.int32)
        columns = 1
    head = ((piece * of_batches + of_b) * of_heads + of_h) * rows_of_mask
    tl.store(to + (head + i) * columns + j, sums, mask=(i < rows_of_mask) & (j < columns))


@triton.jit(do_not_specialize=(*SIZES, *_COUNTS))
def diagonal_kernel(
    to, row_numbers, all_rows, dout, inputs, numbers, heads, group, queries, keys, width,
    value_width, left, right, bottom, rows, batches, blocks_q, diagonals, pieces,
    FORM: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """The scores' gradient summed over the tiles on a diagonal, in which an element always has the
    same offset between key and query. to: (pieces, heads, diagonals, N, N). Grid: of the same."""
    program = tl.program_id(0)
    diagonal = program % diagonals
    h = program // diagonals % heads
    piece = (program // diagonals // heads).to(tl.int64)
    longest_q = queries
    longest_k = keys
    tiles = batches.to(tl.int64) * blocks_q
    sums = tl.zeros((N, N), dtype=tl.float32)
    for n in range(tiles * piece // pieces, tiles * (piece + 1) // pieces):
        b = tl.cast(n // blocks_q, tl.int32)
        first_i = tl.cast(n % blocks_q, tl.int32) * N
        batch, first_q, first_k, queries, keys, shift = sequence(
            inputs, b, longest_q, longest_k, bottom, FORM
        )
        first_j = first_i + shift - left + diagonal * N
        if (first_i < queries) & (first_j < keys) & (first_j + N > 0):
            sums += bias_tile(
                start_of(inputs.q, batch, h, first_q), start_of(dout, batch, h, first_q),
                start_of(inputs.k, batch, h // group, first_k),
                start_of(inputs.v, batch, h // group, first_k),
                row_numbers + (batch * heads + h) * rows + first_q, all_rows, first_i, first_j,
                b, h, dout, inputs, numbers, heads, longest_q, longest_k, queries, keys, width,
                value_width, shift, left, right, FORM, N, N, WIDTH, VALUES,
            )  # fmt: skip
    r = tl.arange(0, N)[:, None]
    c = tl.arange(0, N)[None, :]
    tl.store(to + program.to(tl.int64) * N * N + r * N + c, sums)


@triton.jit(do_not_specialize=("heads", "window", "diagonals", "pieces"))
def drelative_kernel(
    drelative, sums, heads, window, diagonals, pieces, N: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds along the tiles' diagonals. Grid: heads x blocks of the window."""
    blocks = (window + BLOCK - 1) // BLOCK
    h = tl.program_id(0) // blocks
    w = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for piece in range(pieces):
        tiles = sums + (tl.cast(piece, tl.int64) * heads + h) * diagonals * N * N
        for r in range(N):
            at = (w + r) // N * N * N + r * N + (w + r) % N
            total += tl.load(tiles + at, mask=w < window, other=0.0)
    tl.store(drelative + tl.cast(h, tl.int64) * window + w, total.to(tl.float32), mask=w < window)


def shape(width: int, size: int) -> tuple[int, dict[str, int]]:
    """(a square tile's side, options) for a padded width and bytes an element."""
    side = 32 if size == 2 or width <= 64 else 16
    return side, {"num_warps": 4 if width <= 64 else 8, "num_stages": 1}


def write_dmask(dmask: Tensor, call: Call, given: tuple[Any, ...]) -> None:
    side, options = shape(max(call.padded), call.bytes)
    of_batches, of_heads, of_queries, of_keys = dmask.shape
    blocks_q = triton.cdiv(of_queries, side)
    blocks_k = triton.cdiv(of_keys, side)
    sizes = call.sizes
    tiles = of_batches * of_heads * blocks_q * blocks_k
    every = (call.batch if of_batches == 1 else 1) * (sizes.heads if of_heads == 1 else 1)
    pieces = max(1, min(every, _ENOUGH // tiles))
    to = dmask if pieces == 1 else dmask.new_empty((pieces, *dmask.shape))
    dmask_kernel[(pieces * tiles,)](
        to, *given, call.batch, of_batches, of_heads, blocks_q, blocks_k, pieces, FORM=call.form,
        OF_QUERIES=of_queries > 1, OF_KEYS=of_keys > 1, BLOCK_Q=side, BLOCK_K=side,
        WIDTH=call.padded[0], VALUES=call.padded[1], **options,
    )  # fmt: skip
    if pieces > 1:
        torch.sum(to, 0, out=dmask)


def write_drelative(drelative: Tensor, call: Call, given: tuple[Any, ...]) -> None:
    side, options = shape(max(call.padded), call.bytes)
    heads, window = drelative.shape[1], drelative.shape[3]
    diagonals = triton.cdiv(window + side - 1, side)
    blocks_q = triton.cdiv(call.sizes.queries, side)
    tiles = call.batch * blocks_q
    pieces = max(1, min(tiles, _ENOUGH // (heads * diagonals)))
    sums = drelative.new_empty(pieces, heads, diagonals, side, side)
    diagonal_kernel[(pieces * heads * diagonals,)](
        sums, *given, call.batch, blocks_q, diagonals, pieces, FORM=call.form, N=side,
        WIDTH=call.padded[0], VALUES=call.padded[1], **options,
    )  # fmt: skip
    drelative_kernel[(heads * triton.cdiv(window, 128),)](
        drelative, sums, heads, window, diagonals, pieces, N=side, BLOCK=128, num_warps=4
    )
