"""Triton: linear attention's passes are one kernel. Each finds

    y_i = sum_j (a_i b_j + extra) decay^|i - j| x_j

over the j before (or after) i, chunk by chunk with the state sum_j b_j x_j^T between them:

    role                  a      b      x      extra                 over
    0  output             f      g      v      y of x = 1: the sums  j <= i
    1  gradient of f      du     v      g      rho_i                 j <= i
    2  gradient of g      v      du     f      rho_j                 j >= i
    3  gradient of v      g      f      du     none                  j >= i

(letters as in csrc/linear_attention.h). A program has a tile of x's columns, and walks the sequence
or a piece of it (Hua et al. 2022, arXiv 2202.10447; Sun et al. 2023, arXiv 2307.08621). Where decay
has a gradient, role 1 carries the state's derivative by its logarithm along.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from pydl.kernels.attention_call import rows_of
from pydl.kernels.attention_tile import start_of
from pydl.kernels.common import rounded
from pydl.kernels.linear_attention_call import SIZES, Call, States, wants
from pydl.kernels.linear_attention_tile import (
    POWERS,
    block,
    extended,
    feature_of,
    grown,
    load_state,
    load_sum,
    nearest,
    number_of,
    operand,
    product,
    side,
    there,
    times_slope,
    weighted_sum,
)
from torch import Tensor


@triton.jit(do_not_specialize=SIZES)
def mix_kernel(
    y, raw, logs, inputs, begin, end, batch, heads, group, member, rows, of_piece, pieces, tiles,
    width, value_width, scale, eps,
    FORM: tl.constexpr, CHUNK: tl.constexpr, DEPTH: tl.constexpr, SLICE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Grid: batches x heads (of keys, of which `member` says which of theirs, where y is a key's) x
    pieces x tiles of x's columns."""
    T: tl.constexpr = inputs.q.data.dtype.element_ty
    OF_KEYS: tl.constexpr = FORM.ROLE >= 2
    BY_VALUES: tl.constexpr = FORM.ROLE == 1 or FORM.ROLE == 2
    A: tl.constexpr = (0, 3, 2, 1)[FORM.ROLE]
    B: tl.constexpr = (1, 2, 3, 0)[FORM.ROLE]
    X: tl.constexpr = (2, 1, 0, 3)[FORM.ROLE]
    PLAIN: tl.constexpr = FORM.FEATURE != 1
    EXACT_A: tl.constexpr = (PLAIN, False, True, PLAIN)[FORM.ROLE]
    EXACT_B: tl.constexpr = (PLAIN, True, False, PLAIN)[FORM.ROLE]
    EXACT_X: tl.constexpr = (True, PLAIN, PLAIN, False)[FORM.ROLE]
    # What a and b have one column more of, and with it the state one row: `row` has its sums of x,
    # `columns_of` those of b where the output's divisor wants them.
    RHO: tl.constexpr = BY_VALUES and FORM.NORMALIZE and (FORM.CAUSAL or FORM.ROLE == 1)
    ROW: tl.constexpr = FORM.ROLE == 2 or (FORM.ROLE == 1 and (RHO or FORM.LOGS))
    program = tl.program_id(0)
    column = program % tiles * TILE
    piece = program // tiles % pieces
    numbered = program // tiles // pieces
    if OF_KEYS:
        kv_heads = heads // group
        b = (numbered // kv_heads).to(tl.int64)
        h = (numbered % kv_heads * group + member).to(tl.int64)
    else:
        b = (numbered // heads).to(tl.int64)
        h = (numbered % heads).to(tl.int64)
    unit = b * heads + h
    slot = unit
    if FORM.PIECES:
        slot += tl.cast(piece, tl.int64) * batch * heads
    depth = value_width if BY_VALUES else width
    columns = width if BY_VALUES else value_width

    # Slices of the state, and derivatives by the logarithm of decay.
    states = ()
    columns_of = ()
    states_log = ()
    for d in tl.static_range(DEPTH // SLICE):
        state = load_state(begin, slot, d * SLICE, column, width, value_width, BY_VALUES, SLICE,
                           TILE, FORM.BEGIN)  # fmt: skip
        states = extended(states, state)
        if FORM.ROLE == 0:
            sum_of = load_sum(begin, slot, d * SLICE, width, SLICE, FORM.BEGIN)
            columns_of = extended(columns_of, sum_of)
        if FORM.LOGS:
            states_log = extended(states_log, tl.zeros((SLICE, TILE), dtype=tl.float32))
    row = load_sum(begin, slot, column, width, TILE, FORM.BEGIN and ROW)
    row_log = tl.zeros((TILE,), dtype=tl.float32)
    log = tl.zeros((CHUNK,), dtype=tl.float64)

    i = tl.arange(0, CHUNK)
    apart = i[None, :] - i[:, None] if OF_KEYS else i[:, None] - i[None, :]
    powers = inputs.powers + h * POWERS
    begins = piece * of_piece
    stop = tl.minimum(begins + of_piece, rows)
    chunks = (stop - begins + CHUNK - 1) // CHUNK
    for t in range(chunks):
        step = chunks - 1 - t if OF_KEYS else t
        first = begins + step * CHUNK
        n = tl.minimum(stop - first, CHUNK)
        # By decay: rows of the state's part, keys' of the state after, and the state.
        seen = tl.full((CHUNK,), 1.0, tl.float32)
        kept = seen
        keep = 1.0
        age = n - 1 - i
        if FORM.DECAY and FORM.CAUSAL:
            ahead = tl.load(powers + i + 1, mask=i < n, other=0.0)
            behind = tl.load(powers + age, mask=i < n, other=0.0)
            seen = behind if OF_KEYS else ahead
            kept = ahead if OF_KEYS else behind
            keep = tl.load(powers + n)
        # What a and b have in the column more.
        ones = tl.full((CHUNK,), 1.0, tl.float32)
        rho = number_of(inputs.rho, unit, rows, first, stop, CHUNK) if RHO else ones
        a_more = rho if FORM.ROLE == 1 else ones
        b_more = rho if FORM.ROLE == 2 else ones

        if FORM.CAUSAL:
            x = side(
                inputs, b, h, group, unit, rows, first, stop, column, columns, X, FORM, CHUNK, TILE
            )  # fmt: skip
        sums = tl.zeros((CHUNK, TILE), dtype=tl.float32)
        aged = sums
        scores = tl.zeros((CHUNK, CHUNK), dtype=tl.float32)
        total = tl.zeros((CHUNK,), dtype=tl.float32)
        states_after = ()
        columns_after = ()
        logs_after = ()
        for d in tl.static_range(DEPTH // SLICE):
            at = d * SLICE
            one = side(
                inputs, b, h, group, unit, rows, first, stop, at, depth, A, FORM, CHUNK, SLICE
            )  # fmt: skip
            left = operand(one, EXACT_A, T)
            sums += product(left, nearest(states[d], T), T)
            if FORM.ROLE == 0:
                total += tl.sum(one * columns_of[d][None, :], 1)
            if FORM.LOGS:
                aged += product(left, nearest(states_log[d], T), T)
            if FORM.CAUSAL:
                other = side(
                    inputs, b, h, group, unit, rows, first, stop, at, depth, B, FORM, CHUNK, SLICE
                )  # fmt: skip
                right = operand(other, EXACT_B, T)
                scores += product(left, tl.trans(right), T)
                if FORM.ROLE == 0 and not EXACT_A and not T.is_fp32():
                    # Their sums go into the factors, which states' gradients are made of: to fp32.
                    scores += product(nearest(one - left, T), tl.trans(right), T)
                    scores += product(left, tl.trans(nearest(other - right, T)), T)
                after = grown(states[d], other, x, kept, keep, FORM, EXACT_B, EXACT_X, False, T)
                states_after = extended(states_after, after)
                if FORM.ROLE == 0:
                    sum_after = weighted_sum(columns_of[d], other, kept, keep)
                    columns_after = extended(columns_after, sum_after)
                if FORM.LOGS:
                    before = states_log[d] + states[d] * n
                    after = grown(
                        before, other, x, kept * age, keep, FORM, EXACT_B, EXACT_X, False, T
                    )
                    logs_after = extended(logs_after, after)
        if RHO or FORM.ROLE == 2:
            sums += a_more[:, None] * row[None, :]
        if FORM.DECAY and FORM.CAUSAL:
            sums *= seen[:, None]
            total *= seen
        if FORM.LOGS:
            if RHO:
                aged += a_more[:, None] * row_log[None, :]
            aged = aged * seen[:, None] + sums * (i + 1).to(tl.float32)[:, None]
        if FORM.CAUSAL:
            if RHO:
                scores += a_more[:, None] * b_more[None, :]
            if FORM.DECAY:
                scores *= tl.load(powers + apart, mask=apart >= 0, other=0.0)
            scores = tl.where(apart >= 0, scores, 0.0)
            total += tl.sum(scores, 1)
            taken = operand(x, EXACT_X, T)
            sums += product(nearest(scores, T), taken, T)
            if FORM.LOGS:
                aged += product(nearest(scores * apart.to(tl.float32), T), taken, T)
                by = b_more * kept * age.to(tl.float32)
                row_log = weighted_sum(row_log + row * n, x, by, keep)
            if RHO or FORM.ROLE == 1:
                row = weighted_sum(row, x, b_more * kept, keep)
            elif FORM.ROLE == 2:
                row = row * keep
            states = states_after
            columns_of = columns_after
            states_log = logs_after

        r = first + i
        if FORM.ROLE == 0:
            by = ones * scale
            if FORM.NORMALIZE:
                below = total * scale + eps
                by = tl.where(below == 0, 0.0, scale / tl.where(below == 0, 1.0, below))
                by = tl.minimum(tl.maximum(by, -3.4028234e38), 3.4028234e38)
            if column == 0:
                tl.store(inputs.factor + unit * rows + r, by, mask=r < stop)
            if FORM.NORMALIZE:
                # The inverse of a subnormal number overflows where the quotient need not.
                lift = tl.where(tl.abs(below) < 1e-30, 18446744073709551616.0, 1.0)
                by = tl.where(below == 0, 0.0, scale / tl.where(below == 0, 1.0, below * lift))
                sums = tl.where((below == 0)[:, None], 0.0, sums * lift[:, None] * by[:, None])
            else:
                sums *= scale
        c = column + tl.arange(0, TILE)[None, :]
        head = h // group if OF_KEYS else h
        inside = (r < stop)[:, None] & (c < columns)
        if OF_KEYS and FORM.HIDDEN:
            shown = there(inputs, b, first, stop, True, FORM, CHUNK)
            sums = tl.where(shown[:, None], sums, 0.0)
        if BY_VALUES and (FORM.FEATURE > 0 or FORM.LOGS):
            given = there(inputs, b, first, stop, OF_KEYS, FORM, CHUNK)
            source = inputs.k if OF_KEYS else inputs.q
            like = block(source, b, head, first, column, columns, given, CHUNK, TILE)
            if FORM.LOGS:
                part = tl.where(inside, feature_of(like, FORM.FEATURE) * aged, 0.0)
                log += tl.sum(part.to(tl.float64), 1)
        last = True
        if FORM.GROUPED:
            last = member == group - 1
            held = raw + ((b * (heads // group) + head) * rows + r.to(tl.int64))[:, None] * columns
            held += c
            if member > 0:
                sums += tl.load(held, mask=inside, other=0.0)
            if not last:
                tl.store(held, sums, mask=inside)
        if last:
            if BY_VALUES and FORM.FEATURE > 0:
                sums = times_slope(sums, like, FORM.FEATURE)
            to = start_of(y, b, head, 0) + r.to(tl.int64)[:, None] * y.row + c
            tl.store(to, rounded(sums, T), mask=inside)

    if FORM.LOGS:
        value = tl.sum(log, 0)
        if FORM.END:
            for d in tl.static_range(DEPTH // SLICE):
                flow = load_state(
                    end, slot, d * SLICE, column, width, value_width, BY_VALUES, SLICE, TILE, True
                )  # fmt: skip
                value += tl.sum(tl.sum((flow * states_log[d]).to(tl.float64), 1), 0)
            flow_row = load_sum(end, slot, column, width, TILE, True)
            value += tl.sum((flow_row * row_log).to(tl.float64), 0)
        tl.store(logs + ((h * batch + b) * pieces + piece) * tiles + program % tiles, value)


def launch_mix(
    call: Call, role: int, y: Tensor, begin: States | None, end: States | None, rows: int,
    cut: tuple[int, int], *, by_piece: bool = False, member: int = 0, raw: Tensor | None = None,
    logs: Tensor | None = None,
) -> int:  # fmt: skip
    """How many programs a head has. `cut`: (rows of a piece, how many). `begin` and `end`, the
    gradient of the state after the last row, are of pieces where `by_piece`. `raw`: where the sums
    of a key's heads so far are, (batch, kv heads, rows, columns) in fp32. `logs`: for a number a
    head and program, in fp64."""
    sizes = call.sizes
    depth, columns = sizes.width, sizes.value_width
    if role in (1, 2):
        depth, columns = columns, depth
    tile = call.shape(depth, columns, logs is not None)
    # The output's first tile also has what is one a row.
    tiles = max(triton.cdiv(columns, tile["TILE"]), int(role == 0))
    heads = sizes.heads // sizes.group if role >= 2 else sizes.heads
    programs = sizes.batch * heads * cut[1] * tiles
    wants(programs < 1 << 31, f"fewer blocks than {programs}")
    if programs == 0:
        return 0
    parts = sizes.batch * cut[1] * tiles
    if logs is not None:
        wants(logs.dtype == torch.float64 and logs.numel() >= heads * parts, f"{parts} logs a head")
    filler = call.inputs.factor
    nothing = States(filler, filler, 0, 0)
    form = call.form._replace(
        ROLE=role, BEGIN=begin is not None, PIECES=by_piece,
        END=end is not None, LOGS=logs is not None, GROUPED=raw is not None,
    )  # fmt: skip
    mix_kernel[(programs,)](
        rows_of(y), filler if raw is None else raw, filler if logs is None else logs, call.inputs,
        nothing if begin is None else begin, nothing if end is None else end, sizes.batch,
        sizes.heads, sizes.group, member, rows, *cut, tiles, sizes.width, sizes.value_width,
        call.scale, call.eps, FORM=form, **tile,
    )  # fmt: skip
    return parts
