"""What attention's Triton kernels share: which keys a block of queries sees, what is added to a
tile of scores, and the weights again in backward. See csrc/attention.h for what is computed.

Scores are in base 2: a product of query and key times `factor`, which is scale / ln 2. In fp32,
where that would round once more, they are in base e, and the queries are multiplied with the scale.
Tiles may have queries or keys for rows: `i` and `j` hold their numbers, of sizes (n, 1) and (1, n)
or the reverse.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from pydl.kernels.attention_call import rows_of
from pydl.kernels.common import _ROUND_BY_HAND, act_forward, dropout_factor
from torch import Tensor

_LN2 = tl.constexpr(math.log(2))
_LOG2E = tl.constexpr(1 / math.log(2))


@triton.jit
def product(a, b):
    """a @ b, added in fp32. Triton's interpreter takes bf16 for integers."""
    if _ROUND_BY_HAND:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def sequence(inputs, b, queries, keys, bottom, FORM: tl.constexpr):
    """Of batch b: (where it is, its first query and key, how many there are, the first query's own
    key)."""
    batch = tl.cast(b, tl.int64)
    first_q = batch * 0
    first_k = batch * 0
    if FORM.PACKED:
        first_q = tl.load(inputs.starts_q + b)
        first_k = tl.load(inputs.starts_k + b)
        queries = (tl.load(inputs.starts_q + b + 1) - first_q).to(tl.int32)
        keys = (tl.load(inputs.starts_k + b + 1) - first_k).to(tl.int32)
        batch = batch * 0
    return batch, first_q, first_k, queries, keys, (keys - queries) * bottom


@triton.jit
def start_of(rows, batch, head, first):
    """Where row `first` of a head begins."""
    return rows.data + batch * rows.batch + tl.cast(head, tl.int64) * rows.head + first * rows.row


@triton.jit
def block(start, row, first, count, columns, N: tl.constexpr, WIDTH: tl.constexpr,
          ALL: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """(N, WIDTH) from row `first` on; 0 past `count` rows, unless ALL are there, and past
    `columns`, unless they are EVEN."""
    r = tl.arange(0, N)[:, None]
    c = tl.arange(0, WIDTH)[None, :]
    at = start + (first + r).to(tl.int64) * row + c
    if ALL and EVEN:
        return tl.load(at)
    elif ALL:
        return tl.load(at, mask=c < columns, other=0.0)
    elif EVEN:
        return tl.load(at, mask=first + r < count, other=0.0)
    else:
        return tl.load(at, mask=(first + r < count) & (c < columns), other=0.0)


@triton.jit
def keys_seen(first, last, keys, shift, left, right, N: tl.constexpr, FORM: tl.constexpr):
    """Of the queries [first, last): the tiles of N keys that any sees, as (begin of the full ones,
    their end, how many edges there are before, begin of those after, how many of both)."""
    begin = first * 0
    end = keys
    full_begin = begin
    full_end = keys // N * N
    if FORM.WINDOW:
        begin = tl.maximum(first + shift - left, 0) // N * N
        end = tl.minimum(last + shift + right, keys)
        full_begin = (tl.maximum(last - 1 + shift - left, 0) + N - 1) // N * N
        full_end = tl.maximum(tl.minimum(first + shift + right + 1, keys), 0) // N * N
    return split(begin, end, full_begin, full_end, N)


@triton.jit
def queries_seeing(first, last, queries, shift, left, right, N: tl.constexpr, FORM: tl.constexpr):
    """The same of keys [first, last), for tiles of N queries."""
    begin = first * 0
    end = queries
    full_begin = begin
    full_end = queries // N * N
    if FORM.WINDOW:
        begin = tl.maximum(first - shift - right, 0) // N * N
        end = tl.minimum(last - shift + left, queries)
        full_begin = (tl.maximum(last - 1 - shift - right, 0) + N - 1) // N * N
        full_end = tl.maximum(tl.minimum(first - shift + left + 1, queries), 0) // N * N
    return split(begin, end, full_begin, full_end, N)


@triton.jit
def split(begin, end, full_begin, full_end, N: tl.constexpr):
    none = full_end <= full_begin
    full_begin = tl.where(none, begin, full_begin)
    full_end = tl.where(none, begin, full_end)
    before = (full_begin - begin) // N
    after = (tl.maximum(end - full_end, 0) + N - 1) // N
    return full_begin, full_end, begin, before, before + after


@triton.jit
def edge(t, begin, before, full_end, N: tl.constexpr):
    """Where edge tile t begins."""
    return tl.where(t < before, begin + t * N, full_end + (t - before) * N)


@triton.jit
def scores(s, i, j, b, h, inputs, numbers, queries, keys, shift, left, right,
           EDGE: tl.constexpr, FORM: tl.constexpr):  # fmt: skip
    """(what is added to and hidden of the products s, the softcap's slope).

    Where FORM.PLAIN the scores are still to be multiplied by `factor`.
    """
    slope = s
    if not FORM.PLAIN:
        if FORM.SOFTCAP:
            t = act_forward(s * numbers.inverse, 0.0, 2)
            slope = 1.0 - t * t
            s = t * numbers.cap
        elif not FORM.NATURAL:
            s = s * numbers.factor
    if FORM.RELATIVE:
        bias = inputs.relative
        offset = j - (i + shift) + left
        inside = (offset >= 0) & (offset <= left + right) & (i < queries) & (j < keys)
        at = bias.data + tl.cast(h, tl.int64) * bias.head + offset.to(tl.int64) * bias.column
        s += tl.load(at, mask=inside, other=0.0).to(tl.float32) * numbers.unit
    if FORM.MASK > 0:
        bias = inputs.mask
        at = bias.data + tl.cast(b, tl.int64) * bias.batch + tl.cast(h, tl.int64) * bias.head
        at = at + i.to(tl.int64) * bias.row + j.to(tl.int64) * bias.column
        inside = (i < queries) & (j < keys)
        value = tl.load(at, mask=inside, other=0)
        if FORM.MASK == 1:
            s = tl.where(value != 0, s, float("-inf"))
        else:
            s += value.to(tl.float32) * numbers.unit
    if EDGE:
        seen = j < keys
        if FORM.WINDOW:
            own = i + shift
            seen = seen & (j >= own - left) & (j <= own + right)
        s = tl.where(seen, s, float("-inf"))
    return s, slope


@triton.jit
def factors(first, i, j, b, h, inputs, numbers, heads, longest_q, longest_k,
            N: tl.constexpr, FORM: tl.constexpr):  # fmt: skip
    """Dropout's, for N keys j from `first` on, which is a multiple of 4. Where four keys share a
    block of draws, it is drawn once."""
    head = (tl.cast(b, tl.int64) * heads + h) * longest_q
    if FORM.DROPOUT == 4 and i.shape[0] == 1:
        turned = factors(
            first, tl.trans(i), tl.trans(j), b, h, inputs, numbers, heads, longest_q, longest_k, N,
            FORM,
        )  # fmt: skip
        return tl.trans(turned)
    elif FORM.DROPOUT == 4:
        every = first + 4 * tl.arange(0, N // 4)[None, :]
        index = ((head + i) * longest_k + every) // 4
        key = tl.load(inputs.seed)
        offset = tl.load(inputs.seed + 1)
        zero = tl.zeros_like(index.to(tl.uint32))
        third = zero + offset.to(tl.uint32)
        fourth = zero + (offset >> 32).to(tl.uint32)
        words = tl.philox(
            key, index.to(tl.uint32), (index >> 32).to(tl.uint32), third, fourth
        )  # fmt: skip
        odd = tl.join(kept(words[1], numbers), kept(words[3], numbers))
        even = tl.join(kept(words[0], numbers), kept(words[2], numbers))
        return tl.reshape(tl.join(even, odd), (i.shape[0], N))
    else:
        return dropout_factor(inputs.seed, (head + i) * longest_k + j, numbers.limit, numbers.kept)


@triton.jit
def kept(word, numbers):
    return tl.where(word.to(tl.int64) < numbers.limit, 0.0, numbers.kept)


@triton.jit
def row_numbers_of(start, all_rows, first, queries, N: tl.constexpr, FORM: tl.constexpr):
    """(the logarithm of the denominator in two numbers, delta) of N rows, see rows_kernel. Past the
    end, as in rows that see nothing, the first is infinite: weights are 0."""
    i = first + tl.arange(0, N)
    apart = tl.cast(all_rows, tl.int64)
    top = tl.load(start + i, mask=i < queries, other=float("inf"))
    left_over = top
    if FORM.NATURAL:
        left_over = tl.load(start + apart + i, mask=i < queries, other=0.0)
    delta = tl.load(start + 2 * apart + i, mask=i < queries, other=0.0)
    return top, left_over, delta


@triton.jit
def scaled(x, numbers, FORM: tl.constexpr):
    """Queries as the products want them."""
    if FORM.NATURAL:
        return x * numbers.scale
    else:
        return x


@triton.jit
def weights(s, i, j, first, b, h, top, left_over, inputs, numbers, heads, longest_q,
            longest_k, queries, keys, shift, left, right,
            EDGE: tl.constexpr, FORM: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """(softmax' weights again, the softcap's slope, dropout's factors) of products s, whose N keys
    begin at `first`; an N of 0 stands for any keys."""
    s, slope = scores(s, i, j, b, h, inputs, numbers, queries, keys, shift, left, right, EDGE, FORM)
    if FORM.PLAIN:
        p = tl.exp2(tl.fma(s, numbers.factor, -top))
    elif FORM.NATURAL:
        p = tl.exp((s - top) - left_over)
    else:
        p = tl.exp2(s - top)
    factor = p
    if FORM.DROPOUT == 4 and N > 0:
        factor = factors(first, i, j, b, h, inputs, numbers, heads, longest_q, longest_k, N, FORM)
    elif FORM.DROPOUT > 0:
        at = (tl.cast(b, tl.int64) * heads + h) * longest_q + i
        factor = dropout_factor(inputs.seed, at * longest_k + j, numbers.limit, numbers.kept)
    return p, slope, factor


@triton.jit
def score_gradient(p, dp, factor, delta, FORM: tl.constexpr):
    """Of the scores that a mask is added to. dp: dout times value."""
    if FORM.DROPOUT > 0:
        dp *= factor
    return p * (dp - delta)


@triton.jit(do_not_specialize=("heads", "rows", "all_rows", "blocks"))
def rows_kernel(
    row_numbers, dout, dlse, out, lse, rest, heads, rows, all_rows, value_width, blocks,
    DLSE: tl.constexpr, NATURAL: tl.constexpr, BLOCK: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """row_numbers: (3, batch, heads, rows): the logarithm of the weights' denominator in two
    numbers in the scores' base, infinite where there is none, and the sum of out dout, less dlse.
    Grid: batch x heads x blocks of rows."""
    program = tl.program_id(0)
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)
    h = program // blocks % heads
    batch = (program // blocks // heads).to(tl.int64)
    first = batch * 0
    inside = i < rows
    apart = tl.cast(all_rows, tl.int64)
    at = (batch * heads + h) * rows + i
    number = tl.load(lse + at, mask=inside, other=0.0).to(tl.float64)
    nothing = number == float("-inf")
    left_over = tl.load(rest + at, mask=inside, other=0.0).to(tl.float64)
    whole = tl.where(nothing, 0.0, number) + left_over
    if not NATURAL:
        whole = whole * _LOG2E
    top = whole.to(tl.float32)
    tl.store(row_numbers + at, tl.where(nothing, float("inf"), top), mask=inside)
    left_over = (whole - top.to(tl.float64)).to(tl.float32)
    tl.store(row_numbers + apart + at, left_over, mask=inside)
    x = block(start_of(out, batch, h, first), out.row, program % blocks * BLOCK, rows, value_width,
              BLOCK, VALUES, False, False).to(tl.float32)  # fmt: skip
    d = block(start_of(dout, batch, h, first), dout.row, program % blocks * BLOCK, rows,
              value_width, BLOCK, VALUES, False, False).to(tl.float32)  # fmt: skip
    delta = tl.sum(x * d, 1)
    if DLSE:
        delta -= tl.load(start_of(dlse, batch, h, first) + i.to(tl.int64) * dlse.row, mask=inside)
    tl.store(row_numbers + 2 * apart + at, tl.where(nothing, 0.0, delta), mask=inside)


def launch_rows(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, rest: Tensor
) -> Tensor:
    batch, heads, rows, value_width = out.shape
    row_numbers = torch.empty(3 * lse.numel(), dtype=torch.float32, device=lse.device)
    values = triton.next_power_of_2(max(1, value_width))
    size = max(1, min(64, 4096 // values))
    blocks = triton.cdiv(rows, size)
    if batch * heads * blocks > 0:
        rows_kernel[(batch * heads * blocks,)](
            row_numbers, rows_of(dout), rows_of(lse if dlse is None else dlse), rows_of(out), lse,
            rest, heads, rows, lse.numel(), value_width, blocks, DLSE=dlse is not None,
            NATURAL=out.dtype == torch.float32, BLOCK=size, VALUES=values, num_warps=4,
        )  # fmt: skip
    return row_numbers
