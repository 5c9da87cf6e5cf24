"""Triton: layer_norm and rms_norm over rows."""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from pydl.kernels.common import add_partials, rounded
from pydl.kernels.row_moments import moments
from torch import Tensor

# Longer rows are read block by block, three times.
_MOST = 16384


@triton.jit
def fwd_kernel(
    y, mean, rstd, x, weight, bias, n, eps,
    CENTRED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: rows."""
    r = tl.program_id(0).to(tl.int64)
    start = r * n
    i = tl.arange(0, BLOCK)
    first = tl.load(x + start + i, mask=i < n, other=0.0).to(tl.float32)
    shift, rest, scale = moments(
        first, x, x, x, start, i, n, eps, 0, 0.0, CENTRED, False, False, ONE, BLOCK
    )
    if CENTRED:
        tl.store(mean + r, shift + rest)
    tl.store(rstd + r, scale)
    for c in range(0, n, BLOCK):
        inside = c + i < n
        value = first
        if not ONE:
            value = tl.load(x + start + c + i, mask=inside, other=0.0).to(tl.float32)
        out = ((value - shift) - rest) * scale
        if WEIGHT:
            out = out * tl.load(weight + c + i, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            out = out + tl.load(bias + c + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + start + c + i, rounded(out, y.dtype.element_ty), mask=inside)


@triton.jit
def bwd_kernel(
    dx, partials, dy, x, mean, rstd, weight, rows, n, pieces,
    CENTRED: tl.constexpr, WEIGHT: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of one block. Grid: pieces of the rows, each with a row of sums for dweight and one for
    dbias."""
    piece = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < n
    w = tl.full((BLOCK,), 1.0, dtype=tl.float32)
    if WEIGHT:
        w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), dtype=tl.float32)
    dbias = tl.zeros((BLOCK,), dtype=tl.float32)
    for r in range(rows * piece // pieces, rows * (piece + 1) // pieces):
        start = r * n
        d = tl.load(dy + start + i, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + start + i, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + r)
        if CENTRED:
            # Twice: rounded, a large mean has lost what values that hardly vary consist of.
            value = tl.where(inside, value - tl.load(mean + r), 0.0)
            value = value - tl.sum(value, axis=0) / n
        xhat = tl.where(inside, value * scale, 0.0)
        g = d * w
        c2 = tl.sum(g * xhat, axis=0) / n
        if CENTRED:
            # Twice: where a row hardly varies, `scale` is large and what remains small.
            g = tl.where(inside, g - tl.sum(g, axis=0) / n, 0.0)
            g = g - tl.sum(g, axis=0) / n
        out = g - xhat * c2
        tl.store(dx + start + i, rounded(scale * out, dx.dtype.element_ty), mask=inside)
        dweight += d * xhat
        dbias += d
    if SUMS:
        to = partials + piece * 2 * n
        tl.store(to + i, dweight.to(tl.float64), mask=inside)
        tl.store(to + n + i, dbias.to(tl.float64), mask=inside)


@triton.jit
def bwd_long_kernel(
    dx, partials, dy, x, mean, rstd, weight, rows, n, pieces,
    CENTRED: tl.constexpr, WEIGHT: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of several blocks; the sums stay in memory, which only this program touches."""
    piece = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    begin = rows * piece // pieces
    to = partials + piece * 2 * n
    for r in range(begin, rows * (piece + 1) // pieces):
        start = r * n
        scale = tl.load(rstd + r)
        centre = 0.0
        if CENTRED:
            centre = tl.load(mean + r)
        x_sums = tl.zeros((BLOCK,), dtype=tl.float32)
        g_sums = tl.zeros((BLOCK,), dtype=tl.float32)
        gx_sums = tl.zeros((BLOCK,), dtype=tl.float32)
        for c in range(0, n, BLOCK):
            inside = c + i < n
            g = tl.load(dy + start + c + i, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(x + start + c + i, mask=inside, other=0.0).to(tl.float32)
            if WEIGHT:
                g = g * tl.load(weight + c + i, mask=inside, other=0.0).to(tl.float32)
            xhat = (value - centre) * tl.where(inside, scale, 0.0)
            x_sums += xhat
            g_sums += g
            gx_sums += g * xhat
        c1 = 0.0
        left = 0.0  # what rounding has left of the mean
        c2 = tl.sum(gx_sums, axis=0) / n
        if CENTRED:
            c1 = tl.sum(g_sums, axis=0) / n
            left = tl.sum(x_sums, axis=0) / n
            c2 -= left * c1
        for c in range(0, n, BLOCK):
            inside = c + i < n
            d = tl.load(dy + start + c + i, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(x + start + c + i, mask=inside, other=0.0).to(tl.float32)
            xhat = (value - centre) * scale - left
            g = d
            if WEIGHT:
                g = d * tl.load(weight + c + i, mask=inside, other=0.0).to(tl.float32)
            out = scale * (g - c1 - xhat * c2)
            tl.store(dx + start + c + i, rounded(out, dx.dtype.element_ty), mask=inside)
            if SUMS:
                before = tl.zeros((BLOCK,), dtype=tl.float64)
                if r > begin:
                    before = tl.load(to + c + i, mask=inside, other=0.0)
                tl.store(to + c + i, before + (d * xhat).to(tl.float64), mask=inside)
                if r > begin:
                    before = tl.load(to + n + c + i, mask=inside, other=0.0)
                tl.store(to + n + c + i, before + d.to(tl.float64), mask=inside)


def _warps(block: int) -> int:
    return max(1, min(16, block // 256))


def _forward(
    y: Tensor, mean: Tensor | None, rstd: Tensor, x: Tensor, weight: Tensor | None,
    bias: Tensor | None, eps: float,
) -> None:  # fmt: skip
    rows, n = x.shape
    if x.numel() == 0:
        return
    block = min(_MOST, triton.next_power_of_2(n))
    fwd_kernel[(rows,)](
        y, y if mean is None else mean, rstd, x, x if weight is None else weight,
        x if bias is None else bias, n, eps, CENTRED=mean is not None, WEIGHT=weight is not None,
        BIAS=bias is not None, ONE=n <= block, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip


def _backward(
    dx: Tensor, dweight: Tensor, dbias: Tensor | None, partials: Tensor, dy: Tensor, x: Tensor,
    mean: Tensor | None, rstd: Tensor, weight: Tensor | None,
) -> None:  # fmt: skip
    rows, n = x.shape
    if n == 0:
        return
    sums = partials.numel() > 0
    pieces = partials.shape[0] if sums else min(rows, 2048)
    block = min(_MOST, triton.next_power_of_2(n))
    if pieces:
        kernel = bwd_kernel if n <= block else bwd_long_kernel
        kernel[(pieces,)](
            dx, partials, dy, x, rstd if mean is None else mean, rstd,
            x if weight is None else weight, rows, n, pieces, CENTRED=mean is not None,
            WEIGHT=weight is not None, SUMS=sums, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    for which, total in enumerate((dweight, dbias)):
        if total is not None and total.numel():
            add_partials(total, partials[:, which])


def _layer_norm_fwd(
    y: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float,
) -> None:  # fmt: skip
    _forward(y, mean, rstd, x, weight, bias, eps)


def _rms_norm_fwd(y: Tensor, rstd: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> None:
    _forward(y, None, rstd, x, weight, None, eps)


def _rms_norm_bwd(
    dx: Tensor, dweight: Tensor, partials: Tensor, dy: Tensor, x: Tensor, rstd: Tensor,
    weight: Tensor | None,
) -> None:  # fmt: skip
    _backward(dx, dweight, None, partials, dy, x, None, rstd, weight)


EXPORTS: dict[str, Callable[..., None]] = {
    "layer_norm_fwd": _layer_norm_fwd,
    "layer_norm_bwd": _backward,
    "rms_norm_fwd": _rms_norm_fwd,
    "rms_norm_bwd": _rms_norm_bwd,
}
