"""Triton: linear attention, forward and backward, each a few launches of one kernel: see
linear_attention_mix.py.
"""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from pydl.kernels.attention_call import Rows, rows_of
from pydl.kernels.linear_attention_call import (
    SIZES,
    Call,
    alone,
    call_of,
    check_rows,
    dense,
    padded,
    wants,
)
from pydl.kernels.linear_attention_mix import launch_mix
from pydl.kernels.linear_attention_state import launch_totals, powers_of
from pydl.kernels.linear_attention_tile import block
from torch import Tensor


@triton.jit(do_not_specialize=SIZES)
def rho_kernel(rho, factor, dout, out, heads, rows, blocks, value_width,
               BLOCK: tl.constexpr, VALUES: tl.constexpr):  # fmt: skip
    """rho: (batch, heads, rows), -sum of factor dout out. Grid: batch x heads x blocks of rows."""
    program = tl.program_id(0)
    unit = (program // blocks).to(tl.int64)
    first = program % blocks * BLOCK
    r = first + tl.arange(0, BLOCK)
    inside = r < rows
    b = unit // heads
    h = unit % heads
    d = block(dout, b, h, first, 0, value_width, inside, BLOCK, VALUES)
    x = block(out, b, h, first, 0, value_width, inside, BLOCK, VALUES)
    by = tl.load(factor + unit * rows + r, mask=inside, other=0.0)
    tl.store(rho + unit * rows + r, -tl.sum(x * (d * by[:, None]), 1), mask=inside)


@triton.jit(do_not_specialize=("parts",))
def decay_kernel(ddecay, logs, decay, parts, BLOCK: tl.constexpr):
    """The gradient by decay from that by its logarithm, in (heads, parts). Grid: heads."""
    h = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, parts, BLOCK):
        k = first + tl.arange(0, BLOCK)
        total += tl.load(logs + h * parts + k, mask=k < parts, other=0.0)
    value = tl.sum(total, 0) / tl.load(decay + h).to(tl.float64)
    tl.store(ddecay + h, value.to(tl.float32))


def _fwd(
    out: Tensor, factor: Tensor, state_out: Tensor, total_out: Tensor, pieces: Tensor, q: Tensor,
    k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, total: Tensor | None,
    hidden: Tensor | None, feature: int, causal: bool, normalize: bool, scale: float, eps: float,
) -> None:  # fmt: skip
    call = call_of(q, k, v, decay, state, total, hidden, feature, causal, normalize, scale, eps,
                   factor, pieces, 1)  # fmt: skip
    sizes = call.sizes
    check_rows("out", out, q, sizes.value_width)
    dense("state_out", state_out, factor.dtype, (*q.shape[:2], sizes.width, sizes.value_width))
    dense("sum_out", total_out, factor.dtype, (*q.shape[:2], sizes.width))
    if decay is not None:
        call = call._replace(inputs=call.inputs._replace(powers=powers_of(decay)))
    begin, end = call.whole(state, total), call.whole(state_out, total_out)
    launch_totals(call, decay, False, call.keys, begin, end, call.cut(0))
    by_piece = causal and call.pieces > 1
    if not causal:
        begin, cut = end, alone(call.queries)
    else:
        begin, cut = call.cut(0) if by_piece else begin, call.of_piece(call.queries)
    launch_mix(call, 0, out, begin, None, call.queries, cut, by_piece=by_piece)


def _launch_rho(call: Call, rho: Tensor, dout: Rows, out: Rows) -> None:
    sizes = call.sizes
    values = padded(sizes.value_width)
    size = max(1, min(64, 4096 // values))
    blocks = triton.cdiv(call.queries, size)
    if programs := call.units * blocks:
        rho_kernel[(programs,)](
            rho, call.inputs.factor, dout, out, sizes.heads, call.queries, blocks,
            sizes.value_width, BLOCK=size, VALUES=values, num_warps=4,
        )  # fmt: skip


def _bwd(
    dq: Tensor, dk: Tensor, dv: Tensor, ddecay: Tensor, dstate: Tensor, dtotal: Tensor,
    pieces: Tensor, numbers: Tensor, logs: Tensor, dout: Tensor, dstate_out: Tensor | None,
    dtotal_out: Tensor | None, out: Tensor, factor: Tensor, state_out: Tensor, total_out: Tensor,
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None,
    total: Tensor | None, hidden: Tensor | None, feature: int, causal: bool, normalize: bool,
    scale: float, eps: float,
) -> None:  # fmt: skip
    call = call_of(q, k, v, decay, state, total, hidden, feature, causal, normalize, scale, eps,
                   factor, pieces, 2)  # fmt: skip
    sizes = call.sizes
    width, value_width, group = sizes.width, sizes.value_width, sizes.group
    for name, x, like, columns in (
        ("dquery", dq, q, width), ("dkey", dk, k, width), ("dvalue", dv, k, value_width),
        ("dout", dout, q, value_width), ("out", out, q, value_width),
    ):  # fmt: skip
        check_rows(name, x, like, columns)
    of_all = (*q.shape[:2], width)
    for name, given in (("state_out", state_out), ("dstate", dstate), ("dstate_out", dstate_out)):
        dense(name, given, factor.dtype, (*of_all, value_width))
    for name, given in (("sum_out", total_out), ("dsum", dtotal), ("dsum_out", dtotal_out)):
        dense(name, given, factor.dtype, of_all)
    rows, held = factor.numel(), k[..., :1].numel() if group > 1 else 0
    most = rows + held * (width + value_width)
    wants(numbers.dtype == factor.dtype and numbers.numel() >= most, f"{most} numbers")
    wants(causal or dtotal.numel() > 0 or call.units * width == 0, "dstate where not causal")
    raw_k = numbers[rows:] if group > 1 else None
    raw_v = numbers[rows + held * width :] if group > 1 else None
    inputs = call.inputs._replace(dout=rows_of(dout), rho=numbers)
    if decay is not None:
        inputs = inputs._replace(powers=powers_of(decay))
    call = call._replace(inputs=inputs)
    if normalize:
        _launch_rho(call, numbers, inputs.dout, rows_of(out))

    begin, after = call.whole(state, total), call.whole(state_out, total_out)
    gained = call.whole(dstate_out, dtotal_out)
    lost = call.whole(dstate, dtotal) if dtotal.numel() > 0 else None
    cut = call.pieces > 1
    if cut or lost is not None:
        launch_totals(call, decay, True, call.queries, gained, lost, call.cut(1))
    by_piece = causal and cut
    if not causal:
        before, back = after, lost
        of_queries, of_keys = alone(call.queries), alone(call.keys)
    else:
        before, back = begin, gained
        of_queries = of_keys = call.of_piece(call.keys)
    if by_piece:
        launch_totals(call, decay, False, call.keys, begin, None, call.cut(0))
        before, back = call.cut(0), call.cut(1)

    by_decay = ddecay.numel() > 0
    parts = launch_mix(
        call, 1, dq, before, (call.cut(1) if cut else gained) if by_decay else None, call.queries,
        of_queries, by_piece=by_piece, logs=logs if by_decay else None,
    )  # fmt: skip
    if by_decay and decay is not None:
        decay_kernel[(sizes.heads,)](ddecay, logs, decay, parts, BLOCK=256, num_warps=4)
    for member in range(group):
        launch_mix(call, 2, dk, back, None, call.keys, of_keys, by_piece=by_piece, member=member,
                   raw=raw_k)  # fmt: skip
        launch_mix(call, 3, dv, back, None, call.keys, of_keys, by_piece=by_piece, member=member,
                   raw=raw_v)  # fmt: skip


EXPORTS: dict[str, Callable[..., None]] = {
    "linear_attention_fwd": _fwd,
    "linear_attention_bwd": _bwd,
}
