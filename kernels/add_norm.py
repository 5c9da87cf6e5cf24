"""Triton: add_layer_norm and add_rms_norm over rows."""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from pydl.kernels.common import add_partials, dropout_factor, rounded, threshold
from pydl.kernels.row_moments import moments, summed
from torch import Tensor

# Longer rows are read block by block, three times.
_MOST = 16384


@triton.jit
def fwd_kernel(
    y, new, mean, rstd, x, residual, weight, bias, seed, n, eps, limit, factor,
    CENTRED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: rows."""
    r = tl.program_id(0).to(tl.int64)
    start = r * n
    i = tl.arange(0, BLOCK)
    first = summed(x, residual, seed, start + i, i < n, limit, factor, True, DROPOUT)
    shift, rest, scale = moments(
        first,
        x,
        residual,
        seed,
        start,
        i,
        n,
        eps,
        limit,
        factor,
        CENTRED,
        True,
        DROPOUT,
        ONE,
        BLOCK,
    )
    if CENTRED:
        tl.store(mean + r, shift + rest)
    tl.store(rstd + r, scale)
    for c in range(0, n, BLOCK):
        inside = c + i < n
        h = first
        if not ONE:
            h = summed(x, residual, seed, start + c + i, inside, limit, factor, True, DROPOUT)
        tl.store(new + start + c + i, rounded(h, new.dtype.element_ty), mask=inside)
        out = ((h - shift) - rest) * scale
        if WEIGHT:
            out = out * tl.load(weight + c + i, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            out = out + tl.load(bias + c + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + start + c + i, rounded(out, y.dtype.element_ty), mask=inside)


@triton.jit
def store_gradients(
    dinput, dresidual, dnew, seed, out, at, inside, limit, factor,
    MORE: tl.constexpr, TWO: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Adds what flows back to the sum, and writes what flows on to both of its terms."""
    if MORE:
        out += tl.load(dnew + at, mask=inside, other=0.0).to(tl.float32)
    if TWO:
        tl.store(dresidual + at, rounded(out, dresidual.dtype.element_ty), mask=inside)
    if DROPOUT:
        out = out * dropout_factor(seed, at, limit, factor)
    tl.store(dinput + at, rounded(out, dinput.dtype.element_ty), mask=inside)


@triton.jit
def bwd_kernel(
    dinput, dresidual, partials, dy, dnew, h, mean, rstd, weight, seed, rows, n, pieces, limit,
    factor, CENTRED: tl.constexpr, WEIGHT: tl.constexpr, SUMS: tl.constexpr, MORE: tl.constexpr,
    TWO: tl.constexpr, DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
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
        value = tl.load(h + start + i, mask=inside, other=0.0).to(tl.float32)
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
        out = scale * (g - xhat * c2)
        store_gradients(
            dinput, dresidual, dnew, seed, out, start + i, inside, limit, factor, MORE, TWO, DROPOUT
        )
        dweight += d * xhat
        dbias += d
    if SUMS:
        to = partials + piece * 2 * n
        tl.store(to + i, dweight.to(tl.float64), mask=inside)
        tl.store(to + n + i, dbias.to(tl.float64), mask=inside)


@triton.jit
def bwd_long_kernel(
    dinput, dresidual, partials, dy, dnew, h, mean, rstd, weight, seed, rows, n, pieces, limit,
    factor, CENTRED: tl.constexpr, WEIGHT: tl.constexpr, SUMS: tl.constexpr, MORE: tl.constexpr,
    TWO: tl.constexpr, DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
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
            value = tl.load(h + start + c + i, mask=inside, other=0.0).to(tl.float32)
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
            at = start + c + i
            d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
            xhat = (value - centre) * scale - left
            g = d
            if WEIGHT:
                g = d * tl.load(weight + c + i, mask=inside, other=0.0).to(tl.float32)
            store_gradients(
                dinput, dresidual, dnew, seed, scale * (g - c1 - xhat * c2), at, inside, limit,
                factor, MORE, TWO, DROPOUT,
            )  # fmt: skip
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


def _factor(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0


def _forward(
    y: Tensor, new: Tensor, mean: Tensor | None, rstd: Tensor, x: Tensor, residual: Tensor,
    weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, p: float, eps: float,
) -> None:  # fmt: skip
    rows, n = x.shape
    if x.numel() == 0:
        return
    block = min(_MOST, triton.next_power_of_2(n))
    fwd_kernel[(rows,)](
        y, new, rstd if mean is None else mean, rstd, x, residual, x if weight is None else weight,
        x if bias is None else bias, rstd if seed is None else seed, n, eps, threshold(p),
        _factor(p), CENTRED=mean is not None, WEIGHT=weight is not None, BIAS=bias is not None,
        DROPOUT=seed is not None and threshold(p) > 0, ONE=n <= block, BLOCK=block,
        num_warps=_warps(block),
    )  # fmt: skip


def _backward(
    dinput: Tensor, dresidual: Tensor, dweight: Tensor, dbias: Tensor | None, partials: Tensor,
    dy: Tensor, dnew: Tensor | None, h: Tensor, mean: Tensor | None, rstd: Tensor,
    weight: Tensor | None, seed: Tensor | None, p: float,
) -> None:  # fmt: skip
    rows, n = h.shape
    if n == 0:
        return
    sums, two = partials.numel() > 0, dresidual.numel() > 0
    pieces = partials.shape[0] if sums else min(rows, 2048)
    block = min(_MOST, triton.next_power_of_2(n))
    if pieces:
        kernel = bwd_kernel if n <= block else bwd_long_kernel
        kernel[(pieces,)](
            dinput, dresidual if two else dinput, partials, dy, h if dnew is None else dnew, h,
            rstd if mean is None else mean, rstd, h if weight is None else weight,
            rstd if seed is None else seed, rows, n, pieces, threshold(p), _factor(p),
            CENTRED=mean is not None, WEIGHT=weight is not None, SUMS=sums, MORE=dnew is not None,
            TWO=two, DROPOUT=seed is not None and threshold(p) > 0, BLOCK=block,
            num_warps=_warps(block),
        )  # fmt: skip
    for which, total in enumerate((dweight, dbias)):
        if total is not None and total.numel():
            add_partials(total, partials[:, which])


def _add_layer_norm_fwd(
    y: Tensor, new: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, residual: Tensor,
    weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, p: float, eps: float,
) -> None:  # fmt: skip
    _forward(y, new, mean, rstd, x, residual, weight, bias, seed, p, eps)


def _add_rms_norm_fwd(
    y: Tensor, new: Tensor, rstd: Tensor, x: Tensor, residual: Tensor, weight: Tensor | None,
    seed: Tensor | None, p: float, eps: float,
) -> None:  # fmt: skip
    _forward(y, new, None, rstd, x, residual, weight, None, seed, p, eps)


def _add_rms_norm_bwd(
    dinput: Tensor, dresidual: Tensor, dweight: Tensor, partials: Tensor, dy: Tensor,
    dnew: Tensor | None, h: Tensor, rstd: Tensor, weight: Tensor | None, seed: Tensor | None,
    p: float,
) -> None:  # fmt: skip
    _backward(dinput, dresidual, dweight, None, partials, dy, dnew, h, None, rstd, weight, seed, p)


EXPORTS: dict[str, Callable[..., None]] = {
    "add_layer_norm_fwd": _add_layer_norm_fwd,
    "add_layer_norm_bwd": _backward,
    "add_rms_norm_fwd": _add_rms_norm_fwd,
    "add_rms_norm_bwd": _add_rms_norm_bwd,
}
