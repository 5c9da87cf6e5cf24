"""Triton: the kernels that normalise the channels of (samples, outer, channels, inner): moments and
how pieces' are joined, the normalisation, the sums of the gradient, and dx.

A program has tiles of ROWS x COLUMNS. Rows are of the outer dimension; columns are channels where
these are innermost (LAST), else the inner dimension, of one channel. `run` times PACK elements lie
side by side, so that the compiler knows how many it may load at once. ROWS is 1 where COLUMNS does
not hold them all.
"""

from __future__ import annotations

import triton
import triton.language as tl
from pydl.kernels.common import act_backward_from_input, act_forward, rounded


@triton.jit
def span(
    outer, channels, run, outer_pieces, inner_pieces,
    REVERSED: tl.constexpr, LAST: tl.constexpr, PACK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program's part: (sample, piece, channels, where they start, step from row to row, elements
    side by side, rows from and to, blocks of columns from and to).

    Grid: (samples x channels or blocks of them, pieces). REVERSED takes the last first, which are
    still in the cache after a pass the other way.
    """
    program = tl.program_id(0)
    piece = tl.program_id(1).to(tl.int64)
    if REVERSED:
        program = tl.num_programs(0) - 1 - program
        piece = tl.num_programs(1) - 1 - piece
    size = tl.cast(run, tl.int64) * PACK
    of_outer = piece // inner_pieces
    begin = outer * of_outer // outer_pieces
    end = outer * (of_outer + 1) // outer_pieces
    if LAST:
        blocks = (channels + COLUMNS - 1) // COLUMNS
        sample = (program // blocks).to(tl.int64)
        block = program % blocks
        c = block * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        start = sample * outer * size
        step = size
        left = block.to(tl.int64)
        right = left + 1
    else:
        sample = (program // channels).to(tl.int64)
        channel = program % channels
        c = channel + tl.zeros((1, 1), dtype=tl.int32)
        start = (sample * outer * channels + channel) * size
        step = channels * size
        of_inner = piece % inner_pieces
        blocks = (size + COLUMNS - 1) // COLUMNS
        left = blocks * of_inner // inner_pieces
        right = blocks * (of_inner + 1) // inner_pieces
    return sample, piece, c, start, step, size, begin, end, left, right


@triton.jit
def upto(left, most: tl.constexpr):
    """How many of `left` are among the next `most`: 32 bits, and as divisible as both."""
    return tl.minimum(left, most).to(tl.int32)


@triton.jit
def scales(
    mean, rest, var, weight, bias, sample, c, channels, groups, eps,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """(number of the group, mean, rest, 1 / sqrt(var + eps), weight, bias) of each channel."""
    inside = c < channels
    group = sample * groups + c // (channels // groups)
    middle = tl.load(mean + group, mask=inside, other=0.0)
    left = tl.load(rest + group, mask=inside, other=0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.load(var + group, mask=inside, other=0.0) + eps))
    w = tl.full(c.shape, 1.0, dtype=tl.float32)
    if WEIGHT:
        w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.full(c.shape, 0.0, dtype=tl.float32)
    if BIAS:
        b = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    return group, middle, left, rstd, w, b


@triton.jit
def over_tile(values, LAST: tl.constexpr):
    """The sum of each column, or of all where they are one channel's."""
    total = tl.sum(values, axis=0, keep_dims=True)
    if not LAST:
        total = tl.sum(total, axis=1, keep_dims=True)
    return total


@triton.jit
def moments_kernel(
    partials, x, outer, channels, run, groups, outer_pieces, inner_pieces,
    LAST: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partials: (samples, pieces, 2, channels), means relative to the group's first element, and
    sums of squared deviations (Welford 1962, for each element of the tile)."""
    sample, piece, c, start, step, size, begin, end, left, right = span(
        outer, channels, run, outer_pieces, inner_pieces, False, LAST, PACK, COLUMNS
    )
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    offsets = rows * step + columns
    per_group = channels // groups
    first = c // per_group * per_group
    to_first = start + first if LAST else sample * outer * step + first * size
    base = tl.load(x + to_first, mask=c < channels, other=0.0).to(tl.float32)
    mean = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    # An element of the tile that ran out of values is done: all have one count while they change.
    count = 0
    for block in range(left, right):
        for row in range(begin, end, ROWS):
            more = upto(size - block * COLUMNS, COLUMNS)
            inside = (rows < upto(end - row, ROWS)) & (columns < more)
            at = start + row * step + block * COLUMNS + offsets
            value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            count += 1
            d = tl.where(inside, value - base, mean)
            before = d - mean
            mean += before * (1.0 / count)
            squares += before * (d - mean)
    height = end - begin
    counts = ((height - rows + ROWS - 1) // ROWS).to(tl.float32)
    every = height
    if not LAST:
        width = tl.minimum(right * COLUMNS, size) - left * COLUMNS
        counts = counts * ((width - columns + COLUMNS - 1) // COLUMNS).to(tl.float32)
        every = height * width
    # Products in fp32, whose errors are as many and as small as the elements' own; sums in fp64.
    middle = over_tile((counts * mean).to(tl.float64), LAST) / every.to(tl.float64)
    d = mean - middle.to(tl.float32)
    spread = over_tile((squares + counts * d * d).to(tl.float64), LAST)
    to = partials + (sample * tl.num_programs(1) + piece) * 2 * channels + c
    tl.store(to, middle, mask=c < channels)
    tl.store(to + channels, spread, mask=c < channels)


@triton.jit
def parts_of_groups(
    partials, sample, g, e, outer, channels, inner, groups, outer_pieces, inner_pieces,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Entry e of group g, a piece of one of its channels: (pointer, how many values, whether it
    exists)."""
    per_group = channels // groups
    piece = e // per_group
    of_outer = (piece // inner_pieces).to(tl.int64)
    height = outer * (of_outer + 1) // outer_pieces - outer * of_outer // outer_pieces
    of_inner = (piece % inner_pieces).to(tl.int64)
    blocks = (inner + COLUMNS - 1) // COLUMNS
    right = blocks * (of_inner + 1) // inner_pieces * COLUMNS
    width = tl.where(right > inner, inner, right) - blocks * of_inner // inner_pieces * COLUMNS
    pieces = outer_pieces * inner_pieces
    at = (sample * pieces + piece) * 2 * channels + g * per_group + e % per_group
    inside = (e < pieces * per_group) & (g < groups)
    return partials + at, (height * width).to(tl.float64), inside


@triton.jit
def join_moments_kernel(
    mean, rest, var, partials, x, outer, channels, inner, groups, outer_pieces, inner_pieces,
    COLUMNS: tl.constexpr, ENTRIES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Mean, what is left of it and biased variance from pieces of COLUMNS. Grid: samples x blocks
    of groups."""
    blocks = (groups + GROUPS - 1) // GROUPS
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    g = tl.program_id(0) % blocks * GROUPS + tl.arange(0, GROUPS)[None, :]
    per_group = channels // groups
    entries = outer_pieces * inner_pieces * per_group
    each = tl.arange(0, ENTRIES)[:, None]
    every = tl.cast(outer, tl.float64) * inner * per_group
    total = tl.zeros((ENTRIES, GROUPS), dtype=tl.float64)
    for e in range(0, entries, ENTRIES):
        at, count, inside = parts_of_groups(
            partials, sample, g, e + each, outer, channels, inner, groups, outer_pieces,
            inner_pieces, COLUMNS,
        )  # fmt: skip
        total += count * tl.load(at, mask=inside, other=0.0)
    middle = tl.sum(total, axis=0, keep_dims=True) / every
    total = tl.zeros((ENTRIES, GROUPS), dtype=tl.float64)
    for e in range(0, entries, ENTRIES):
        at, count, inside = parts_of_groups(
            partials, sample, g, e + each, outer, channels, inner, groups, outer_pieces,
            inner_pieces, COLUMNS,
        )  # fmt: skip
        d = tl.load(at, mask=inside, other=0.0) - middle
        spread = tl.load(at + channels, mask=inside, other=0.0)
        total += tl.where(inside, spread + count * d * d, 0.0)
    squares = tl.sum(total, axis=0, keep_dims=True)
    first = (sample * outer * channels + g * per_group) * inner
    base = tl.load(x + first, mask=g < groups, other=0.0).to(tl.float64)
    whole = (base + middle).to(tl.float32)
    to = sample * groups + g
    tl.store(mean + to, whole, mask=g < groups)
    tl.store(rest + to, ((base - whole.to(tl.float64)) + middle).to(tl.float32), mask=g < groups)
    tl.store(var + to, (squares / every).to(tl.float32), mask=g < groups)


@triton.jit
def apply_kernel(
    y, x, residual, mean, rest, var, weight, bias,
    outer, channels, run, groups, outer_pieces, inner_pieces, eps, p,
    ACT: tl.constexpr, RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    LAST: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sample, _, c, start, step, size, begin, end, left, right = span(
        outer, channels, run, outer_pieces, inner_pieces, True, LAST, PACK, COLUMNS
    )
    _, middle, rest_of, rstd, w, b = scales(
        mean, rest, var, weight, bias, sample, c, channels, groups, eps, WEIGHT, BIAS
    )
    scale = rstd * w
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    offsets = rows * step + columns
    for block in range(left, right):
        for row in range(begin, end, ROWS):
            more = upto(size - block * COLUMNS, COLUMNS)
            inside = (rows < upto(end - row, ROWS)) & (columns < more)
            at = start + row * step + block * COLUMNS + offsets
            value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            z = ((value - middle) - rest_of) * scale + b
            if RESIDUAL:
                z += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
            out = act_forward(z, p, ACT)
            tl.store(y + at, rounded(out, y.dtype.element_ty), mask=inside)


@triton.jit
def gradient(
    dy, x, residual, at, inside, middle, rest_of, rstd, w, b, p,
    ACT: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """(dz, where the activation is still to be gone through; the normalised input)"""
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    dz = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    d = (value - middle) - rest_of
    if ACT != 0:
        z = d * (rstd * w) + b
        if RESIDUAL:
            z += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        dz = act_backward_from_input(dz, z, p, ACT)
    return dz, d * rstd


@triton.jit
def sums_kernel(
    partials, dz, dy, x, residual, mean, rest, var, weight, bias,
    outer, channels, run, groups, outer_pieces, inner_pieces, eps, p,
    ACT: tl.constexpr, RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    STORED: tl.constexpr,
    LAST: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partials: (samples, pieces, 2, channels), the sums of dz and of dz xhat. Stores dz where
    wanted."""
    sample, piece, c, start, step, size, begin, end, left, right = span(
        outer, channels, run, outer_pieces, inner_pieces, False, LAST, PACK, COLUMNS
    )
    _, middle, rest_of, rstd, w, b = scales(
        mean, rest, var, weight, bias, sample, c, channels, groups, eps, WEIGHT, BIAS
    )
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    offsets = rows * step + columns
    first = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    second = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for block in range(left, right):
        for row in range(begin, end, ROWS):
            more = upto(size - block * COLUMNS, COLUMNS)
            inside = (rows < upto(end - row, ROWS)) & (columns < more)
            at = start + row * step + block * COLUMNS + offsets
            part, xhat = gradient(
                dy, x, residual, at, inside, middle, rest_of, rstd, w, b, p, ACT, RESIDUAL
            )
            if STORED:
                tl.store(dz + at, rounded(part, dz.dtype.element_ty), mask=inside)
            first += tl.where(inside, part, 0.0)
            second += tl.where(inside, part * xhat, 0.0)
    to = partials + (sample * tl.num_programs(1) + piece) * 2 * channels + c
    tl.store(to, over_tile(first.to(tl.float64), LAST), mask=c < channels)
    tl.store(to + channels, over_tile(second.to(tl.float64), LAST), mask=c < channels)


@triton.jit
def totals_kernel(
    totals, dbias, dweight, partials, channels, pieces, parts,
    TOTALS: tl.constexpr, DBIAS: tl.constexpr, DWEIGHT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds up the pieces of each part, (parts, pieces, 2, channels). totals: (2, parts, channels).
    Grid: parts x blocks of channels."""
    blocks = (channels + COLUMNS - 1) // COLUMNS
    part = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    rows = tl.arange(0, ROWS)[:, None]
    first = tl.zeros((ROWS, COLUMNS), dtype=tl.float64)
    second = tl.zeros((ROWS, COLUMNS), dtype=tl.float64)
    for piece in range(0, pieces, ROWS):
        inside = (piece + rows < pieces) & (c < channels)
        at = partials + (part * pieces + piece + rows) * 2 * channels + c
        first += tl.load(at, mask=inside, other=0.0)
        second += tl.load(at + channels, mask=inside, other=0.0)
    one = tl.sum(first, axis=0, keep_dims=True)
    two = tl.sum(second, axis=0, keep_dims=True)
    if TOTALS:
        to = totals + part * channels + c
        tl.store(to, one, mask=c < channels)
        tl.store(to + tl.cast(parts, tl.int64) * channels, two, mask=c < channels)
    if DBIAS:
        out = rounded(one.to(tl.float32), dbias.dtype.element_ty)
        tl.store(dbias + c, out, mask=c < channels)
    if DWEIGHT:
        out = rounded(two.to(tl.float32), dweight.dtype.element_ty)
        tl.store(dweight + c, out, mask=c < channels)


@triton.jit
def group_sums_kernel(
    sums, totals, weight, channels, groups, WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    """The totals of a group's channels, weighted: (2, samples, groups). Grid: samples x groups."""
    programs = tl.num_programs(0).to(tl.int64)
    of = tl.program_id(0).to(tl.int64)
    per_group = channels // groups
    start = of % groups * per_group
    first = tl.zeros((BLOCK,), dtype=tl.float64)
    second = tl.zeros((BLOCK,), dtype=tl.float64)
    for begin in range(0, per_group, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        inside = i < per_group
        at = totals + of // groups * channels + start + i
        one = tl.load(at, mask=inside, other=0.0)
        two = tl.load(at + programs * per_group, mask=inside, other=0.0)
        if WEIGHT:
            w = tl.load(weight + start + i, mask=inside, other=0.0).to(tl.float64)
            one *= w
            two *= w
        first += one
        second += two
    tl.store(sums + of, tl.sum(first, axis=0))
    tl.store(sums + programs + of, tl.sum(second, axis=0))


@triton.jit(do_not_specialize=["apart", "count"])
def dx_kernel(
    dx, dy, x, residual, mean, rest, var, weight, bias, sums,
    outer, channels, run, groups, outer_pieces, inner_pieces, apart, count, eps, p,
    ACT: tl.constexpr, RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    CENTRED: tl.constexpr, ALONE: tl.constexpr,
    LAST: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx = rstd (weight dz - c1 - xhat c2), c1 and c2 the group's weighted sums over `count` values
    where CENTRED, else 0. The sums lie `apart`, and lack the weight where a channel is ALONE."""
    sample, _, c, start, step, size, begin, end, left, right = span(
        outer, channels, run, outer_pieces, inner_pieces, True, LAST, PACK, COLUMNS
    )
    group, middle, rest_of, rstd, w, b = scales(
        mean, rest, var, weight, bias, sample, c, channels, groups, eps, WEIGHT, BIAS
    )
    k1 = tl.zeros_like(rstd)
    rest_k1 = tl.zeros_like(rstd)
    k2 = tl.zeros_like(rstd)
    if CENTRED:
        part = tl.full(rstd.shape, 1.0, dtype=tl.float64) / count.to(tl.float64)
        if ALONE:
            part *= w.to(tl.float64)
        of = sums + group
        # In two numbers: where all dz are alike nothing must be left of them.
        mean_dz = part * tl.load(of, mask=c < channels, other=0.0)
        k1 = mean_dz.to(tl.float32)
        rest_k1 = (mean_dz - k1.to(tl.float64)).to(tl.float32)
        k2 = (part * tl.load(of + apart, mask=c < channels, other=0.0)).to(tl.float32)
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    offsets = rows * step + columns
    for block in range(left, right):
        for row in range(begin, end, ROWS):
            more = upto(size - block * COLUMNS, COLUMNS)
            inside = (rows < upto(end - row, ROWS)) & (columns < more)
            at = start + row * step + block * COLUMNS + offsets
            dz, xhat = gradient(
                dy, x, residual, at, inside, middle, rest_of, rstd, w, b, p, ACT, RESIDUAL
            )
            out = w * dz
            if CENTRED:
                out = (tl.fma(w, dz, -k1) - rest_k1) - xhat * k2
            out *= rstd
            tl.store(dx + at, rounded(out, dx.dtype.element_ty), mask=inside)
