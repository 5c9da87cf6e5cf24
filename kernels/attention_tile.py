"""What attention's Triton kernels share.

How a call is passed to them, which keys a block of queries sees, and what is added to a tile of
scores. See csrc/attention.h for what is computed.

Scores are in base 2: a product of query and key times `factor`, which is scale / ln 2. In fp32,
where that would round once more, they are in base e, and the queries are multiplied with the scale.
Tiles may have queries or keys for rows: `i` and `j` hold their numbers, of sizes (n, 1) and (1, n)
or the reverse.
"""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from pydl.kernels.common import _ROUND_BY_HAND, act_forward, dropout_factor, threshold
from torch import Tensor

_LN2 = tl.constexpr(math.log(2))
_LOG2E = tl.constexpr(1 / math.log(2))
# More keys than any query has on a side; window bounds of sums of three stay in 32 bits.
_FAR = (1 << 30) - 1


class Rows(NamedTuple):
    """(batch, heads, rows, columns), columns side by side."""

    data: Tensor
    batch: int
    head: int
    row: int


class Bias(NamedTuple):
    """What is added to the scores; a stride of 0 repeats."""

    data: Tensor
    batch: int
    head: int
    row: int
    column: int


class Inputs(NamedTuple):
    """Pointers; what is absent is the query's."""

    q: Rows
    k: Rows
    v: Rows
    mask: Bias
    relative: Bias
    starts_q: Tensor
    starts_k: Tensor
    seed: Tensor


class Numbers(NamedTuple):
    """`cap` is softcap in the scores' base, `unit` that of what is added, and `inverse` makes a
    product of query and key the hyperbolic tangent's argument."""

    factor: float
    scale: float
    cap: float
    inverse: float
    unit: float
    limit: int
    kept: float


class Form(NamedTuple):
    """What a kernel is compiled for. MASK: 1 of truth values, 2 added. DROPOUT: 4 where four keys
    share a draw's block, else 1. NATURAL: in base e. PLAIN: scores are factor times a product,
    where they are seen. EVEN: widths are what they are padded to."""

    PACKED: bool
    WINDOW: bool
    MASK: int
    SOFTCAP: bool
    RELATIVE: bool
    DROPOUT: int
    NATURAL: bool
    PLAIN: bool
    EVEN: bool


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
    """row_numbers: (3, batch, heads, rows): the logarithm of the weights' denominator in the
    scores' base in two numbers, infinite where there is none, and the sum of out dout, less dlse.
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


def rows_of(x: Tensor) -> Rows:
    """Strides of dimensions of size 1 are any: they become 0."""
    strides = [0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)]
    return Rows(x, *strides[:3])


def bias_of(x: Tensor | None, q: Tensor) -> Bias:
    if x is None:
        return Bias(q, 0, 0, 0, 0)
    strides = [0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)]
    return Bias(x.view(torch.uint8) if x.dtype == torch.bool else x, *strides)


class Sizes(NamedTuple):
    """What kernels are not specialised for."""

    heads: int
    group: int
    queries: int
    keys: int
    width: int
    value_width: int
    left: int
    right: int
    bottom: int
    rows: int


SIZES = ("heads", "group", "queries", "keys", "left", "right", "bottom", "rows", "all_rows")
SIZES_AND_BLOCKS = (*SIZES, "blocks")


class Call(NamedTuple):
    """A call's arguments as the kernels take them."""

    inputs: Inputs
    numbers: Numbers
    sizes: Sizes
    form: Form
    batch: int
    kv_heads: int
    padded: tuple[int, int]

    @property
    def bytes(self) -> int:
        return self.inputs.q.data.element_size()


def _wants(fits: bool, what: str) -> None:
    if not fits:
        raise RuntimeError(f"pydl: attention: wants {what}")


def call_of(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, relative: Tensor | None,
    offsets_q: Tensor | None, offsets_k: Tensor | None, seed: Tensor | None, longest_q: int,
    longest_k: int, scale: float, softcap: float, left: int, right: int, bottom: bool, p: float,
) -> Call:  # fmt: skip
    """Raises where a kernel would misread memory."""
    batch, heads, rows, width = q.shape
    kv_heads, keys, value_width = k.shape[1], k.shape[2], v.shape[3]
    _wants(
        k.shape == (batch, kv_heads, keys, width) and v.shape[:3] == k.shape[:3]
        and (heads % kv_heads == 0 if kv_heads else heads == 0),
        f"key and value that fit a query of {tuple(q.shape)}",
    )  # fmt: skip
    _wants(max(width, value_width) <= 256, f"widths up to 256, got {width} and {value_width}")
    for x in (q, k, v):
        _wants(x.dtype == q.dtype, "query, key and value of one dtype")
        _wants(
            x.numel() == 0 or x.shape[3] == 1 or x.stride(3) == 1,
            "neighbouring elements in the last dimension",
        )
    queries = rows
    packed = offsets_q is not None and offsets_k is not None
    if offsets_q is not None and offsets_k is not None:
        _wants(batch == 1 and offsets_q.shape == offsets_k.shape, "offsets alike, a batch of 1")
        _wants(
            offsets_q.dtype == offsets_k.dtype == torch.int64 and offsets_q.dim() == 1,
            "offsets of int64",
        )
        offsets_q, offsets_k = offsets_q.contiguous(), offsets_k.contiguous()
        batch, queries, keys = offsets_q.numel() - 1, longest_q, longest_k
    _wants(max(queries, keys) < _FAR, "fewer than 2^30 queries and keys")
    if mask is not None:
        wanted = (batch, heads, queries, keys)
        _wants(
            mask.dim() == 4 and all(n in (1, w) for n, w in zip(mask.shape, wanted, strict=True)),
            f"a mask of {wanted}, or of size 1 for all",
        )
    if relative is not None:
        _wants(
            min(left, right) >= 0 and tuple(relative.shape) == (1, heads, 1, left + 1 + right),
            "relative of (1, heads, 1, left + 1 + right) and a window",
        )
    if p > 0:
        _wants(
            seed is not None and seed.numel() == 2 and seed.dtype == torch.int64,
            "a seed of two int64 values",
        )
    capped = softcap > 0
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    padded = [max(16, triton.next_power_of_2(n)) for n in (width, value_width)]
    inputs = Inputs(
        *map(rows_of, (q, k, v)), bias_of(mask, q), bias_of(relative, q),
        q if offsets_q is None else offsets_q, q if offsets_k is None else offsets_k,
        q if seed is None else seed.contiguous(),
    )  # fmt: skip
    natural = q.dtype == torch.float32
    unit = 1.0 if natural else 1 / math.log(2)
    numbers = Numbers(
        ctypes.c_float(scale * unit).value, float(scale), float(softcap * unit),
        (1.0 if natural else scale) / softcap if capped else 0.0, unit, threshold(p),
        1 / (1 - p) if p < 1 else 0.0,
    )  # fmt: skip
    sizes = Sizes(
        heads, heads // max(1, kv_heads), queries, keys, width, value_width,
        _FAR if left < 0 else min(left, _FAR), _FAR if right < 0 else min(right, _FAR),
        int(bottom), rows,
    )  # fmt: skip
    form = Form(
        packed, left >= 0 or right >= 0, kind, capped, relative is not None,
        0 if p == 0 else 4 if keys % 4 == 0 else 1,
        natural, not natural and scale > 0 and kind < 2 and not capped and relative is None,
        padded == [width, value_width],
    )  # fmt: skip
    return Call(inputs, numbers, sizes, form, batch, kv_heads, (padded[0], padded[1]))


def dense(*tensors: Tensor) -> None:
    """Raises for rows' numbers that the kernels would misread."""
    for x in tensors:
        _wants(x.is_contiguous(), f"dense rows' numbers, got strides {x.stride()}")
