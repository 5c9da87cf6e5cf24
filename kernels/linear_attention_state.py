"""Triton: the states that pieces of a sequence begin with, for linear attention: what each piece
adds, and a scan over pieces. See csrc/linear_attention.h for the letters.
"""

from __future__ import annotations

import triton
import triton.language as tl
from pydl.kernels.linear_attention_call import SIZES, Call, States, totals_shape, wants
from pydl.kernels.linear_attention_tile import (
    POWERS,
    grown,
    load_state,
    load_sum,
    number_of,
    side,
    store_state,
    store_sum,
    weighted_sum,
)
from torch import Tensor


@triton.jit
def power(base, exponent, BITS: tl.constexpr):
    """base^exponent in fp64, of exponents below 2^BITS."""
    result = tl.cast(exponent, tl.float64) * 0.0 + 1.0
    square = result * base.to(tl.float64)
    for _ in tl.static_range(BITS):
        result = tl.where(exponent % 2 == 1, result * square, result)
        square *= square
        exponent = exponent // 2
    return result


@triton.jit
def powers_kernel(powers, decay, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """powers: (heads, COUNT), of decay, from that of 0 on. Grid: heads."""
    h = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, BLOCK)
    value = power(tl.load(decay + h), p, 7)
    tl.store(powers + h * COUNT + p, value.to(tl.float32), mask=p < COUNT)


@triton.jit(do_not_specialize=SIZES)
def totals_kernel(
    inputs, begin, end, batch, heads, group, rows, of_piece, pieces, across, tiles, width,
    value_width, FORM: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The state that rows, or those of a piece, lead to: of role 0, sums of g v^T and of g; of role
    3, from the last row back, of f du^T and of rho f. Grid: batches x heads x pieces x tiles, of
    which `across` lie side by side."""
    T: tl.constexpr = inputs.q.data.dtype.element_ty
    BACK: tl.constexpr = FORM.ROLE == 3
    B: tl.constexpr = 0 if BACK else 1
    X: tl.constexpr = 3 if BACK else 2
    PLAIN: tl.constexpr = FORM.FEATURE != 1
    program = tl.program_id(0)
    column = program % tiles % across * TILE
    row = program % tiles // across * ROWS
    piece = program // tiles % pieces
    unit = (program // tiles // pieces).to(tl.int64)
    b = unit // heads
    h = unit % heads
    slot = unit
    if FORM.PIECES:
        slot += tl.cast(piece, tl.int64) * batch * heads
    state = load_state(
        begin, unit, row, column, width, value_width, False, ROWS, TILE, FORM.BEGIN
    )  # fmt: skip
    sum = load_sum(begin, unit, row, width, ROWS, FORM.BEGIN)
    i = tl.arange(0, CHUNK)
    powers = inputs.powers + h * POWERS
    begins = piece * of_piece
    stop = tl.minimum(begins + of_piece, rows)
    chunks = (stop - begins + CHUNK - 1) // CHUNK
    for t in range(chunks):
        step = chunks - 1 - t if BACK else t
        first = begins + step * CHUNK
        n = tl.minimum(stop - first, CHUNK)
        x = side(
            inputs, b, h, group, unit, rows, first, stop, column, value_width, X, FORM, CHUNK, TILE
        )  # fmt: skip
        other = side(
            inputs, b, h, group, unit, rows, first, stop, row, width, B, FORM, CHUNK, ROWS
        )  # fmt: skip
        kept = tl.full((CHUNK,), 1.0, tl.float32)
        keep = 1.0
        if FORM.DECAY:
            kept = tl.load(powers + (i + 1 if BACK else n - 1 - i), mask=i < n, other=0.0)
            keep = tl.load(powers + n)
        state = grown(state, other, x, kept, keep, FORM, PLAIN, not BACK, True, T)
        if BACK and FORM.NORMALIZE:
            rho = number_of(inputs.rho, unit, rows, first, stop, CHUNK)
            sum = weighted_sum(sum, other, rho * kept, keep)
        elif BACK:
            sum = sum * keep
        else:
            sum = weighted_sum(sum, other, kept, keep)
    store_state(end, state, slot, row, column, width, value_width, False, ROWS, TILE)
    if column == 0:
        store_sum(end, sum, slot, row, width, ROWS)


@triton.jit
def one_of(t, pieces, BACK: tl.constexpr):
    """The piece that comes as number t."""
    return pieces - 1 - t if BACK else t


@triton.jit
def scan_step(running, added, at, t, last_of, last_keep, keep, inside):
    """Leaves what the piece begins with in its place; gives what the next one does."""
    tl.store(at, running, mask=inside)
    return running * tl.where(t == last_of, last_keep, keep) + added


@triton.jit(do_not_specialize=SIZES)
def scan_kernel(
    cut, begin, end, decay, units, heads, rows, of_piece, pieces, blocks, state_size, width,
    BACK: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr, DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What pieces add becomes what they begin with; `end` comes after all. Grid: units x blocks of
    a state and its sum of features, which follow each other in `cut`."""
    program = tl.program_id(0)
    unit = (program // blocks).to(tl.int64)
    k = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = k < state_size + width
    of_state = k < state_size
    of_sum = inside & (k >= state_size)
    keep = 1.0
    last_keep = 1.0
    if DECAY:
        base = tl.load(decay + unit % heads)
        keep = power(base, of_piece, 30).to(tl.float32)
        last_keep = power(base, rows - (pieces - 1) * of_piece, 30).to(tl.float32)
    running = tl.zeros((BLOCK,), dtype=tl.float32)
    if BEGIN:
        running += tl.load(begin.state + unit * begin.state_step + k, mask=of_state, other=0.0)
        at = begin.sum + unit * begin.sum_step + k - state_size
        running += tl.load(at, mask=of_sum, other=0.0)
    start = cut.state + unit * cut.state_step + k
    apart = tl.cast(units, tl.int64) * cut.state_step
    last_of = 0 if BACK else pieces - 1
    # Two at a time: no load waits for the store before.
    for t in range(0, pieces, 2):
        both = k < tl.where(t + 1 < pieces, state_size + width, 0)
        first = start + one_of(t, pieces, BACK) * apart
        second = start + one_of(t + 1, pieces, BACK) * apart
        added = tl.load(first, mask=inside, other=0.0)
        added_next = tl.load(second, mask=both, other=0.0)
        running = scan_step(running, added, first, t, last_of, last_keep, keep, inside)
        after = scan_step(running, added_next, second, t + 1, last_of, last_keep, keep, both)
        running = tl.where(t + 1 < pieces, after, running)
    if END:
        tl.store(end.state + unit * end.state_step + k, running, mask=of_state)
        tl.store(end.sum + unit * end.sum_step + k - state_size, running, mask=of_sum)


def powers_of(decay: Tensor) -> Tensor:
    """Of each head's decay, as many as a chunk has rows, and one."""
    powers = decay.new_empty(decay.numel() * POWERS.value)
    if decay.numel() > 0:
        powers_kernel[(decay.numel(),)](powers, decay, COUNT=POWERS.value, BLOCK=128, num_warps=1)
    return powers


def launch_totals(
    call: Call, decay: Tensor | None, back: bool, rows: int, begin: States | None,
    end: States | None, room: States,
) -> None:  # fmt: skip
    """The state that rows lead to from `begin`, or back from the last one, in fp32 whatever they
    are; in pieces, those that each begins with, left in `room`."""
    sizes = call.sizes
    of_piece, pieces = call.of_piece(rows)
    alone = call.pieces == 1
    target = end if alone else room
    tile = totals_shape(sizes.width, sizes.value_width, call.inputs.q.data.element_size())
    across = max(1, triton.cdiv(sizes.value_width, tile["TILE"]))
    tiles = across * triton.cdiv(sizes.width, tile["ROWS"])
    programs = call.units * pieces * tiles
    wants(programs < 1 << 31, f"fewer blocks than {programs}")
    if programs == 0 or target is None:
        return
    nothing = States(call.inputs.factor, call.inputs.factor, 0, 0)
    form = call.form._replace(
        ROLE=3 if back else 0, BEGIN=alone and begin is not None, PIECES=not alone
    )
    totals_kernel[(programs,)](
        call.inputs, nothing if begin is None else begin, target, *sizes[:3], rows, of_piece,
        pieces, across, tiles, *sizes[3:], FORM=form, **tile,
    )  # fmt: skip
    if alone:
        return
    size = sizes.width * sizes.value_width
    blocks = triton.cdiv(size + sizes.width, 128)
    scan_kernel[(call.units * blocks,)](
        room, nothing if begin is None else begin, nothing if end is None else end,
        nothing.state if decay is None else decay, call.units, sizes.heads, rows, of_piece, pieces,
        blocks, size, sizes.width, BACK=back, BEGIN=begin is not None, END=end is not None,
        DECAY=decay is not None, BLOCK=128, num_warps=4,
    )  # fmt: skip
