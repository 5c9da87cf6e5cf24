"""Triton: attention forward, and the functions offered. A program has a block of queries over all
the keys they see, with the softmax' maximum and sum carried along (Milakov and Gimelshein 2018; Dao
et al. 2022, arXiv 2205.14135). Tiles that no query sees are not visited; those that all see have no
code for what is hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from pydl.kernels.attention_backward import bwd
from pydl.kernels.attention_call import SIZES_AND_BLOCKS, call_of, dense, rows_of
from pydl.kernels.attention_tile import (
    _LN2,
    block,
    edge,
    factors,
    keys_seen,
    product,
    scaled,
    scores,
    sequence,
    start_of,
)
from pydl.kernels.common import rounded
from torch import Tensor


@triton.jit
def fwd_tile(
    sums, most, total, x, i, first, b, h, k_start, v_start, inputs, numbers, heads, longest_q,
    longest_k, queries, keys, width, value_width, shift, left, right,
    EDGE: tl.constexpr, FORM: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """Adds the keys from `first` on."""
    j = first + tl.arange(0, BLOCK_K)[None, :]
    y = block(k_start, inputs.k.row, first, keys, width, BLOCK_K, WIDTH, not EDGE, FORM.EVEN)
    s = product(x, tl.trans(y))
    s, _ = scores(
        s, i, j, b, h, inputs, numbers, queries, keys, shift, left, right, EDGE, FORM
    )  # fmt: skip
    above = tl.maximum(most, tl.max(s, 1))
    if FORM.PLAIN:
        top = tl.where(above == float("-inf"), 0.0, above * numbers.factor)
        p = tl.exp2(tl.fma(s, numbers.factor, -top[:, None]))
        share = tl.exp2(tl.fma(most, numbers.factor, -top))
    elif FORM.NATURAL:
        top = tl.where(above == float("-inf"), 0.0, above)
        p = tl.exp(s - top[:, None])
        share = tl.exp(most - top)
    else:
        top = tl.where(above == float("-inf"), 0.0, above)
        p = tl.exp2(s - top[:, None])
        share = tl.exp2(most - top)
    total = total * share + tl.sum(p, 1)
    if FORM.DROPOUT > 0:
        p *= factors(first, i, j, b, h, inputs, numbers, heads, longest_q, longest_k, BLOCK_K, FORM)
    v = block(v_start, inputs.v.row, first, keys, value_width, BLOCK_K, VALUES, not EDGE, FORM.EVEN)
    sums = sums * share[:, None] + product(rounded(p, v.dtype), v)
    return sums, above, total


@triton.jit(do_not_specialize=SIZES_AND_BLOCKS)
def fwd_kernel(
    out, lse, rest, inputs, numbers, heads, group, queries, keys, width, value_width, left, right,
    bottom, rows, blocks,
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
    k_start = start_of(inputs.k, batch, h // group, first_k)
    v_start = start_of(inputs.v, batch, h // group, first_k)
    x = block(q_start, inputs.q.row, first_i, queries, width, BLOCK_Q, WIDTH, False, FORM.EVEN)
    x = scaled(x, numbers, FORM)
    i = first_i + tl.arange(0, BLOCK_Q)[:, None]
    sums = tl.zeros((BLOCK_Q, VALUES), dtype=tl.float32)
    most = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    last_i = tl.minimum(first_i + BLOCK_Q, queries)
    full_begin, full_end, begin, before, edges = keys_seen(
        first_i, last_i, keys, shift, left, right, BLOCK_K, FORM
    )
    for first in range(full_begin, full_end, BLOCK_K):
        sums, most, total = fwd_tile(
            sums, most, total, x, i, first, b, h, k_start, v_start, inputs, numbers, heads,
            longest_q, longest_k, queries, keys, width, value_width, shift, left, right,
            False, FORM, BLOCK_K, WIDTH, VALUES,
        )  # fmt: skip
    for t in range(edges):
        sums, most, total = fwd_tile(
            sums, most, total, x, i, edge(t, begin, before, full_end, BLOCK_K), b, h, k_start,
            v_start, inputs, numbers, heads, longest_q, longest_k, queries, keys, width,
            value_width, shift, left, right, True, FORM, BLOCK_K, WIDTH, VALUES,
        )  # fmt: skip
    r = first_i + tl.arange(0, BLOCK_Q)
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    inverse = 1.0 / total
    c = tl.arange(0, VALUES)[None, :]
    to = start_of(out, batch, h, first_q) + i.to(tl.int64) * out.row + c
    tl.store(
        to, rounded(sums * inverse[:, None], out.data.dtype.element_ty),
        mask=(i < queries) & (c < value_width),
    )  # fmt: skip
    # The logarithm's end, which fp32 alone would lose: weights are e^(score - lse - rest).
    whole = tl.where(nothing, 0.0, most).to(tl.float64)
    if not FORM.NATURAL:
        whole = whole * _LN2
    if FORM.PLAIN:
        whole = whole * numbers.factor
    whole += tl.log(total).to(tl.float64)
    number = tl.where(nothing, float("-inf"), whole.to(tl.float32))
    at = (batch * heads + h) * rows + first_q + r
    tl.store(lse + at, number, mask=r < queries)
    left_over = tl.where(nothing, 0.0, (whole - number.to(tl.float64)).to(tl.float32))
    tl.store(rest + at, left_over, mask=r < queries)


def shape(width: int, size: int, queries: int) -> dict[str, int]:
    """The tile for a padded width, bytes an element and number of queries: as large as the
    registers of sm_80, sm_90 and sm_100 allow."""
    if size == 4:
        q, k, warps, stages = 64 if width <= 64 else 32 if width <= 128 else 16, 32, 8, 1
    elif width <= 128:
        q, k, warps, stages = 128, 64, 8, 3
    else:
        q, k, warps, stages = 64, 32, 8, 2
    if queries <= 64 < q:
        q, warps = 64, 4
    if queries <= 16:
        q, warps = 16, 4
    return {"BLOCK_Q": q, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


def _fwd(
    out: Tensor, lse: Tensor, rest: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    relative: Tensor | None, offsets_q: Tensor | None, offsets_k: Tensor | None,
    seed: Tensor | None, longest_q: int, longest_k: int, scale: float, softcap: float, left: int,
    right: int, bottom: bool, p: float,
) -> None:  # fmt: skip
    call = call_of(q, k, v, mask, relative, offsets_q, offsets_k, seed, longest_q, longest_k,
                   scale, softcap, left, right, bottom, p)  # fmt: skip
    dense(lse, rest)
    tile = shape(max(call.padded), q.element_size(), call.sizes.queries)
    blocks = triton.cdiv(call.sizes.queries, tile["BLOCK_Q"])
    programs = blocks * call.batch * call.sizes.heads
    if programs == 0:
        return
    fwd_kernel[(programs,)](
        rows_of(out), lse, rest, call.inputs, call.numbers, *call.sizes, blocks, FORM=call.form,
        WIDTH=call.padded[0], VALUES=call.padded[1], **tile,
    )  # fmt: skip


EXPORTS: dict[str, Callable[..., None]] = {"attention_fwd": _fwd, "attention_bwd": bwd}
