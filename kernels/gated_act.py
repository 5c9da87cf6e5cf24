"""Triton: y = act(gate) up, the gated linear units (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from pydl.kernels.common import act_backward_from_input, act_forward, block_of, like, rounded
from torch import Tensor


@triton.jit
def fwd_kernel(y, gate, up, n, p, ACT: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    inside = i < n - start
    g = tl.load(gate + start + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + start + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + start + i, rounded(act_forward(g, p, ACT) * u, y.dtype.element_ty), mask=inside)


@triton.jit
def bwd_kernel(dgate, dup, dy, gate, up, n, p, ACT: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    inside = i < n - start
    d = tl.load(dy + start + i, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + start + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + start + i, mask=inside, other=0.0).to(tl.float32)
    dg = act_backward_from_input(d * u, g, p, ACT)
    tl.store(dgate + start + i, rounded(dg, dgate.dtype.element_ty), mask=inside)
    tl.store(
        dup + start + i, rounded(d * act_forward(g, p, ACT), dup.dtype.element_ty), mask=inside
    )


def _fwd(y: Tensor, gate: Tensor, up: Tensor, act: int, p: float) -> None:
    if y.numel() == 0:
        return
    gate, up = like(y, gate, up)
    block, warps = block_of(y.numel())
    fwd_kernel[(triton.cdiv(y.numel(), block),)](
        y, gate, up, y.numel(), float(p), ACT=act, BLOCK=block, num_warps=warps
    )


def _bwd(
    dgate: Tensor, dup: Tensor, dy: Tensor, gate: Tensor, up: Tensor, act: int, p: float
) -> None:
    if dgate.numel() == 0:
        return
    dy, gate, up = like(dgate, dy, gate, up)
    block, warps = block_of(dgate.numel())
    bwd_kernel[(triton.cdiv(dgate.numel(), block),)](
        dgate, dup, dy, gate, up, dgate.numel(), float(p), ACT=act, BLOCK=block, num_warps=warps
    )


EXPORTS: dict[str, Callable[..., None]] = {"gated_act_fwd": _fwd, "gated_act_bwd": _bwd}
