"""Triton: attention backward. The weights are computed again from the scores and their sums. One
kernel has a block of keys over the queries that see it, for dK and dV, another a block of queries
over the keys it sees, for dQ: nothing is added atomically (Dao 2023, arXiv 2307.08691).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from pydl.kernels.attention_bias import write_dmask, write_drelative
from pydl.kernels.attention_call import SIZES_AND_BLOCKS, call_of, dense, rows_of
from pydl.kernels.attention_tile import (
    block,
    edge,
    keys_seen,
    launch_rows,
    product,
    queries_seeing,
    row_numbers_of,
    scaled,
    score_gradient,
    sequence,
    start_of,
    weights,
)
from pydl.kernels.common import rounded
from torch import Tensor


@triton.jit
def dkv_tile(
    dk, dv, y, v, j, first, first_j, b, h, q_start, dout_start, numbers_of, all_rows, dout, inputs,
    numbers, heads, longest_q, longest_k, queries, keys, width, value_width, shift, left, right,
    EDGE: tl.constexpr, FORM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Adds the queries from `first` on. Tiles have keys for rows."""
    i = first + tl.arange(0, BLOCK_Q)[None, :]
    x = block(q_start, inputs.q.row, first, queries, width, BLOCK_Q, WIDTH, not EDGE, FORM.EVEN)
    x = scaled(x, numbers, FORM)
    top, left_over, delta = row_numbers_of(numbers_of, all_rows, first, queries, BLOCK_Q, FORM)
    p, slope, factor = weights(
        product(y, tl.trans(x)), i, j, first_j, b, h, top[None, :], left_over[None, :], inputs,
        numbers, heads, longest_q, longest_k, queries, keys, shift, left, right, EDGE, FORM,
        BLOCK_K,
    )  # fmt: skip
    d = block(
        dout_start, dout.row, first, queries, value_width, BLOCK_Q, VALUES, not EDGE, FORM.EVEN
    )
    w = p * factor if FORM.DROPOUT > 0 else p
    dv += product(rounded(w, d.dtype), d)
    ds = score_gradient(p, product(v, tl.trans(d)), factor, delta[None, :], FORM)
    if FORM.SOFTCAP:
        ds *= slope
    dk += product(rounded(ds, x.dtype), x)
    return dk, dv


@triton.jit(do_not_specialize=SIZES_AND_BLOCKS)
def dkv_kernel(
    dk, dv, row_numbers, all_rows, dout, inputs, numbers, heads, group, queries, keys, width,
    value_width, left, right, bottom, rows, blocks,
    FORM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """Grid: batches x heads of keys x blocks of keys."""
    program = tl.program_id(0)
    first_j = program % blocks * BLOCK_K
    g = program // blocks % (heads // group)
    b = program // blocks // (heads // group)
    longest_q = queries
    longest_k = keys
    batch, first_q, first_k, queries, keys, shift = sequence(inputs, b, queries, keys, bottom, FORM)
    if first_j >= keys:
        return
    k_start = start_of(inputs.k, batch, g, first_k)
    v_start = start_of(inputs.v, batch, g, first_k)
    y = block(k_start, inputs.k.row, first_j, keys, width, BLOCK_K, WIDTH, False, FORM.EVEN)
    v = block(v_start, inputs.v.row, first_j, keys, value_width, BLOCK_K, VALUES, False, FORM.EVEN)
    j = first_j + tl.arange(0, BLOCK_K)[:, None]
    dk_sums = tl.zeros((BLOCK_K, WIDTH), dtype=tl.float32)
    dv_sums = tl.zeros((BLOCK_K, VALUES), dtype=tl.float32)
    last_j = tl.minimum(first_j + BLOCK_K, keys)
    full_begin, full_end, begin, before, edges = queries_seeing(
        first_j, last_j, queries, shift, left, right, BLOCK_Q, FORM
    )
    for h in range(g * group, (g + 1) * group):
        q_start = start_of(inputs.q, batch, h, first_q)
        dout_start = start_of(dout, batch, h, first_q)
        numbers_of = row_numbers + (batch * heads + h) * rows + first_q
        for first in range(full_begin, full_end, BLOCK_Q):
            dk_sums, dv_sums = dkv_tile(
                dk_sums, dv_sums, y, v, j, first, first_j, b, h, q_start, dout_start, numbers_of,
                all_rows, dout, inputs, numbers, heads, longest_q, longest_k, queries, keys, width,
                value_width, shift, left, right, False, FORM, BLOCK_Q, BLOCK_K, WIDTH, VALUES,
            )  # fmt: skip
        for t in range(edges):
            dk_sums, dv_sums = dkv_tile(
                dk_sums, dv_sums, y, v, j, edge(t, begin, before, full_end, BLOCK_Q), first_j, b,
                h, q_start, dout_start, numbers_of, all_rows, dout, inputs, numbers, heads,
                longest_q, longest_k, queries, keys, width, value_width, shift, left, right,
                True, FORM, BLOCK_Q, BLOCK_K, WIDTH, VALUES,
            )  # fmt: skip
    c = tl.arange(0, WIDTH)[None, :]
    to = start_of(dk, batch, g, first_k) + j.to(tl.int64) * dk.row + c
    if not FORM.NATURAL:
        dk_sums *= numbers.scale
    value = rounded(dk_sums, dk.data.dtype.element_ty)
    tl.store(to, value, mask=(j < keys) & (c < width))
    c = tl.arange(0, VALUES)[None, :]
    to = start_of(dv, batch, g, first_k) + j.to(tl.int64) * dv.row + c
    value = rounded(dv_sums, dv.data.dtype.element_ty)
    tl.store(to, value, mask=(j < keys) & (c < value_width))


@triton.jit
def dq_tile(
    sums, x, d, top, left_over, delta, i, first, b, h, k_start, v_start, inputs, numbers, heads,
    longest_q, longest_k, queries, keys, width, value_width, shift, left, right,
    EDGE: tl.constexpr, FORM: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """Adds the keys from `first` on."""
    j = first + tl.arange(0, BLOCK_K)[None, :]
    y = block(k_start, inputs.k.row, first, keys, width, BLOCK_K, WIDTH, not EDGE, FORM.EVEN)
    v = block(v_start, inputs.v.row, first, keys, value_width, BLOCK_K, VALUES, not EDGE, FORM.EVEN)
    p, slope, factor = weights(
        product(x, tl.trans(y)), i, j, first, b, h, top[:, None], left_over[:, None], inputs,
        numbers, heads, longest_q, longest_k, queries, keys, shift, left, right, EDGE, FORM,
        BLOCK_K,
    )  # fmt: skip
    ds = score_gradient(p, product(d, tl.trans(v)), factor, delta[:, None], FORM)
    if FORM.SOFTCAP:
        ds *= slope
    return sums + product(rounded(ds, y.dtype), y)


@triton.jit(do_not_specialize=SIZES_AND_BLOCKS)
def dq_kernel(
    dq, row_numbers, all_rows, dout, inputs, numbers, heads, group, queries, keys, width,
    value_width, left, right, bottom, rows, blocks,
    FORM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """Grid: batches x heads x blocks of queries, the last, which see the most, first."""
    program = tl.program_id(0)
    first_i = (blocks - 1 - program % blocks) * BLOCK_Q
    h = program // blocks % heads
    b = program // blocks // heads
    longest_q = queries
    longest_k = keys
    batch, first_q, first_k, queries, keys, shift = sequence(inputs, b, queries, keys, bottom, FORM)
    if first_i >= queries:
        return
    q_start = start_of(inputs.q, batch, h, first_q)
    dout_start = start_of(dout, batch, h, first_q)
    k_start = start_of(inputs.k, batch, h // group, first_k)
    v_start = start_of(inputs.v, batch, h // group, first_k)
    x = block(q_start, inputs.q.row, first_i, queries, width, BLOCK_Q, WIDTH, False, FORM.EVEN)
    d = block(dout_start, dout.row, first_i, queries, value_width, BLOCK_Q, VALUES, False,
              FORM.EVEN)  # fmt: skip
    x = scaled(x, numbers, FORM)
    i = first_i + tl.arange(0, BLOCK_Q)[:, None]
    numbers_of = row_numbers + (batch * heads + h) * rows + first_q
    top, left_over, delta = row_numbers_of(numbers_of, all_rows, first_i, queries, BLOCK_Q, FORM)
    sums = tl.zeros((BLOCK_Q, WIDTH), dtype=tl.float32)
    last_i = tl.minimum(first_i + BLOCK_Q, queries)
    full_begin, full_end, begin, before, edges = keys_seen(
        first_i, last_i, keys, shift, left, right, BLOCK_K, FORM
    )
    for first in range(full_begin, full_end, BLOCK_K):
        sums = dq_tile(
            sums, x, d, top, left_over, delta, i, first, b, h, k_start, v_start, inputs, numbers,
            heads, longest_q, longest_k, queries, keys, width, value_width, shift, left, right,
            False, FORM, BLOCK_K, WIDTH, VALUES,
        )  # fmt: skip
    for t in range(edges):
        sums = dq_tile(
            sums, x, d, top, left_over, delta, i, edge(t, begin, before, full_end, BLOCK_K), b, h,
            k_start, v_start, inputs, numbers, heads, longest_q, longest_k, queries, keys, width,
            value_width, shift, left, right, True, FORM, BLOCK_K, WIDTH, VALUES,
        )  # fmt: skip
    c = tl.arange(0, WIDTH)[None, :]
    to = start_of(dq, batch, h, first_q) + i.to(tl.int64) * dq.row + c
    value = rounded(sums * numbers.scale, dq.data.dtype.element_ty)
    tl.store(to, value, mask=(i < queries) & (c < width))


def dkv_shape(width: int, size: int, major: int) -> dict[str, int]:
    """The tile for a padded width, bytes an element and compute capability: what the registers
    hold without spilling."""
    if size == 4:
        q, k = (32, 32) if width <= 64 else (16, 16) if width > 128 else (16, 64)
        k, stages = k if major < 10 else min(k, 32), 1
    elif width <= 64:
        q, k, stages = 32, 128, 2
    elif width <= 128:
        q, k, stages = (32, 64, 2) if major < 9 else (16, 128, 2)
    else:
        q, k, stages = 16, 64, 1
    # Tensor memory is read through registers, which a second stage would take.
    stages = stages if major < 10 else 1
    return {"BLOCK_Q": q, "BLOCK_K": k, "num_warps": 8, "num_stages": stages}


def dq_shape(width: int, size: int) -> dict[str, int]:
    if size == 4:
        q, k, stages = 32 if width <= 64 else 16, 32 if width <= 128 else 16, 1
    elif width <= 128:
        q, k, stages = 128, 64 if width <= 64 else 32, 2
    else:
        q, k, stages = 64, 32, 1
    return {"BLOCK_Q": q, "BLOCK_K": k, "num_warps": 8, "num_stages": stages}


def bwd(
    dq: Tensor, dk: Tensor, dv: Tensor, dmask: Tensor, drelative: Tensor, _: Tensor, dout: Tensor,
    dlse: Tensor | None, out: Tensor, lse: Tensor, rest: Tensor, q: Tensor, k: Tensor, v: Tensor,
    mask: Tensor | None, relative: Tensor | None, offsets_q: Tensor | None,
    offsets_k: Tensor | None, seed: Tensor | None, longest_q: int, longest_k: int, scale: float,
    softcap: float, left: int, right: int, bottom: bool, p: float,
) -> None:  # fmt: skip
    call = call_of(q, k, v, mask, relative, offsets_q, offsets_k, seed, longest_q, longest_k,
                   scale, softcap, left, right, bottom, p)  # fmt: skip
    dense(lse, rest)
    row_numbers = launch_rows(dout, dlse, out, lse, rest)
    all_rows = lse.numel()
    up = rows_of(dout)
    sizes = call.sizes
    given = (row_numbers, all_rows, up, call.inputs, call.numbers, *sizes)
    width, size = max(call.padded), q.element_size()
    major = torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 9
    padded = {"WIDTH": call.padded[0], "VALUES": call.padded[1]}
    tile = dkv_shape(width, size, major)
    blocks = triton.cdiv(sizes.keys, tile["BLOCK_K"])
    if programs := call.batch * call.kv_heads * blocks:
        dkv_kernel[(programs,)](
            rows_of(dk), rows_of(dv), *given, blocks, FORM=call.form, **padded, **tile
        )
    tile = dq_shape(width, size)
    blocks = triton.cdiv(sizes.queries, tile["BLOCK_Q"])
    if programs := call.batch * sizes.heads * blocks:
        dq_kernel[(programs,)](rows_of(dq), *given, blocks, FORM=call.form, **padded, **tile)
    if dmask.numel() > 0:
        write_dmask(dmask, call, given)
    if drelative.numel() > 0:
        write_drelative(drelative, call, given)
