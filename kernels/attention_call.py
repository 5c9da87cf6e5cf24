"""How a call of attention is passed to its Triton kernels; its shapes, strides and dtypes are
checked on the way. See csrc/attention.h for what they mean.
"""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
import triton
from pydl.kernels.common import threshold
from torch import Tensor

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


# What kernels are not specialised for.
SIZES = ("heads", "group", "queries", "keys", "left", "right", "bottom", "rows", "all_rows")
SIZES_AND_BLOCKS = (*SIZES, "blocks")
