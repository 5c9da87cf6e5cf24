"""What the Triton kernels share: formulas, Philox and the skeletons' host side. See csrc/math.h for
the formulas.

Programs compute their start in 64 bits and everything inside a block in 32.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter cuts fp32 off where it makes bf16 of it; a GPU rounds.
_ROUND_BY_HAND = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 in a storage type, to nearest even."""
    if _ROUND_BY_HAND and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, nearest, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def expm1(x):
    """e^x - 1, accurate near 0."""
    q = 0.00138824975 * x + 0.00836664679
    q = q * x + 0.0416672039
    q = q * x + 0.166665427
    q = q * x + 0.499999981
    return tl.where(tl.abs(x) < 0.34657359, x + x * x * q, tl.exp(x) - 1.0)


@triton.jit
def logistic(x):
    """(1 / (1 + e^-x), its derivative), without overflow or cancellation."""
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    return tl.where(x < 0, e * r, r), e * r * r


@triton.jit
def normal(x):
    """The normal distribution function and density."""
    a = at_most(tl.abs(x), 16.0)
    e = tl.exp(-0.5 * a * a)
    t = 1.0 / (1.0 + 0.33 * a)
    p = -0.02044235584410105 * t + 0.12134815845230064
    p = p * t - 0.2637095318887148
    p = p * t + 0.22078330846407315
    p = p * t - 0.053968796278803126
    p = p * t + 0.12077656046093099
    p = p * t + 0.11131944466739722
    p = p * t + 0.132269239751787
    p = p * t + 0.1316240023672993
    tail = e * t * p
    return tl.where(x < 0, tail, 1.0 - tail), 0.3989422804014327 * e


@triton.jit
def at_most(x, bound):
    """The smaller; NaN stays."""
    return tl.where(x > bound, bound, x)


@triton.jit
def act_forward(x, p, ACT: tl.constexpr):
    """The activation of number ACT (pydl/ops/bias_act.py) with parameter p, in fp32."""
    if ACT == 1:
        return logistic(x)[0]
    elif ACT == 2:
        e = expm1(at_most(2.0 * tl.abs(x), 40.0))
        t = tl.where(e < 2.0, e / (e + 2.0), 1.0 - 2.0 / (e + 2.0))
        return tl.where(x < 0, -t, t)
    elif ACT == 3:
        return tl.where(x < 0, 0.0, x)
    elif ACT == 4:
        return tl.where(x > 0, x, p * x)
    elif ACT == 5:
        return tl.where(x > 0, x, p * expm1(at_most(x, 0.0)))
    elif ACT == 6:
        return tl.where(x > 0, 1.0507009873554805 * x, 1.7580993408473766 * expm1(at_most(x, 0.0)))
    elif ACT == 7:
        return x * normal(x)[0]
    elif ACT == 8:
        return x * logistic(1.5957691216057308 * (x + 0.044715 * x * x * x))[0]
    elif ACT == 9:
        return x * logistic(x)[0]
    elif ACT == 10:
        return x * logistic(p * x)[0]
    elif ACT == 11:
        e = tl.exp(at_most(x, 40.0))
        n = e * (e + 2.0)
        return x * (n / (n + 2.0))
    else:
        return x


@triton.jit
def act_backward(dy, s, p, ACT: tl.constexpr):
    """dy f'(x); s is x, or f(x) for sigmoid, tanh and relu (the sign of either decides for leaky
    relu)."""
    if ACT == 1:
        return dy * (1.0 - s) * s
    elif ACT == 2:
        return dy * (1.0 - s * s)
    elif ACT == 3:
        return tl.where(s <= 0, 0.0, dy)
    elif ACT == 4:
        return tl.where(s > 0, dy, p * dy)
    elif ACT == 5:
        return tl.where(s > 0, dy, dy * p * tl.exp(at_most(s, 0.0)))
    elif ACT == 6:
        return dy * tl.where(
            s > 0, 1.0507009873554805, 1.7580993408473766 * tl.exp(at_most(s, 0.0))
        )
    elif ACT == 7:
        cdf, pdf = normal(s)
        return dy * (cdf + s * pdf)
    elif ACT == 8:
        c = tl.where(s < -12.0, -12.0, at_most(s, 12.0))
        value, slope = logistic(1.5957691216057308 * c * (1.0 + 0.044715 * c * c))
        return dy * (value + c * slope * 1.5957691216057308 * (1.0 + 0.134145 * c * c))
    elif ACT == 9:
        value, slope = logistic(s)
        return dy * (value + s * slope)
    elif ACT == 10:
        value, slope = logistic(p * s)
        return dy * (value + p * s * slope)
    elif ACT == 11:
        c = tl.where(s < -110.0, -110.0, at_most(s, 40.0))
        e = tl.exp(c)
        n = e * (e + 2.0)
        r = 1.0 / (n + 2.0)
        return dy * r * (n + c * 4.0 * e * (e + 1.0) * r)
    else:
        return dy


@triton.jit
def act_backward_from_input(dy, x, p, ACT: tl.constexpr):
    """dy f'(x) where only x is at hand."""
    if ACT >= 1 and ACT <= 3:
        return act_backward(dy, act_forward(x, p, ACT), p, ACT)
    else:
        return act_backward(dy, x, p, ACT)


@triton.jit
def dropout_factor(seed, index, threshold, scale):
    """0 where element `index` is dropped, else the scale; `seed` points to (seed, offset). See
    csrc/philox.h."""
    key = tl.load(seed)
    offset = tl.load(seed + 1)
    block = index // 4
    low = block.to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    third = zero + offset.to(tl.uint32)
    fourth = zero + (offset >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(key, low, high, third, fourth)
    lane = index % 4
    word = tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d)))
    return tl.where(word.to(tl.int64) < threshold, 0.0, scale)


def threshold(p: float) -> int:
    """Words below this are dropped."""
    return min(int(p * 2**32), 2**32 - 1)


@triton.jit
def add_partials_kernel(total, partials, channels, pieces, stride, BLOCK: tl.constexpr):
    """Adds each channel's pieces, `stride` apart, in order."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    total_sum = tl.zeros((BLOCK,), dtype=tl.float64)
    at = partials + c
    for _ in range(pieces):
        total_sum += tl.load(at, mask=inside, other=0.0)
        at += stride
    tl.store(total + c, rounded(total_sum.to(tl.float32), total.dtype.element_ty), mask=inside)


def add_partials(total: Tensor, partials: Tensor) -> None:
    """total: (channels); partials: (pieces, channels), fp64, dense or a slice of rows."""
    pieces, channels = partials.shape
    add_partials_kernel[(triton.cdiv(channels, 32),)](
        total, partials, channels, pieces, partials.stride(0), BLOCK=32, num_warps=1
    )


def like(out: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors in the order in memory that `out` has, which is dense."""
    return [t if t.stride() == out.stride() else torch.empty_like(out).copy_(t) for t in tensors]


def block_of(n: int) -> tuple[int, int]:
    """(elements a program computes, warps): small tensors get small blocks to spread over the
    multiprocessors."""
    return (1024, 4) if n >= 1 << 18 else (256, 2)
