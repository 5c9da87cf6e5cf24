"""How a call of linear attention is passed to its Triton kernels; its shapes, strides and dtypes
are checked on the way. See csrc/linear_attention.h for what they mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from pydl.kernels.attention_call import Rows, rows_of
from torch import Tensor

# Sums over rows of neighbouring blocks stay in 32 bits.
_MOST_ROWS = 1 << 30
# Rows that a piece of a sequence is a multiple of, and those of a block that carries no state.
_PIECE, _ALONE = 64, 256


class Inputs(NamedTuple):
    """Pointers; what is absent is the query's. In fp32: `factor` and `rho`, (batch, heads,
    queries), and `powers` of decay, see powers_kernel. `hidden` is (batch, keys), in bytes."""

    q: Rows
    k: Rows
    v: Rows
    dout: Rows
    factor: Tensor
    rho: Tensor
    powers: Tensor
    hidden: Tensor
    hidden_batch: int
    hidden_key: int


class States(NamedTuple):
    """Where states of (width, value width) lie, and sums of features of (width); from one to the
    next are so many elements of each."""

    state: Tensor
    sum: Tensor
    state_step: int
    sum_step: int


class Form(NamedTuple):
    """What a kernel is compiled for. ROLE: what it finds, see mix_kernel. BEGIN: whether a state
    comes before the first row. PIECES: states are of pieces of the sequence. END: whether the state
    after the last row has a gradient. LOGS: decay has one. GROUPED: a key's is of several heads."""

    ROLE: int
    CAUSAL: bool
    NORMALIZE: bool
    FEATURE: int
    DECAY: bool
    HIDDEN: bool
    BEGIN: bool = False
    PIECES: bool = False
    END: bool = False
    LOGS: bool = False
    GROUPED: bool = False


class Sizes(NamedTuple):
    """What kernels are not specialised for, but for the widths."""

    batch: int
    heads: int
    group: int
    width: int
    value_width: int


class Call(NamedTuple):
    """A call's arguments as the kernels take them; `pieces` at most, with room for them."""

    inputs: Inputs
    sizes: Sizes
    form: Form
    scale: float
    eps: float
    queries: int
    keys: int
    pieces: int
    room: Tensor

    @property
    def units(self) -> int:
        return self.sizes.batch * self.sizes.heads

    def shape(self, depth: int, columns: int, logs: bool) -> dict[str, int]:
        """The tile of mix_kernel."""
        q = self.inputs.q.data
        if not q.is_cuda:  # what takes time in the interpreter is the number of operations
            return {"CHUNK": 64, "DEPTH": padded(depth), "SLICE": min(64, padded(depth)),
                    "TILE": min(64, padded(columns))}  # fmt: skip
        major = torch.cuda.get_device_capability(q.device)[0]
        return shape(padded(depth), columns, q.element_size(), major, logs)

    def whole(self, state: Tensor | None, sum: Tensor | None) -> States | None:
        """States given or wanted; None where there is neither. One alone has zeros beside it."""
        if not (present(state) or present(sum)):
            return None
        width, value_width = self.sizes.width, self.sizes.value_width
        like = self.inputs.factor
        if state is None or sum is None:
            state = like.new_zeros(self.units * width * value_width) if state is None else state
            sum = like.new_zeros(self.units * width) if sum is None else sum
        return States(state, sum, width * value_width, width)

    def cut(self, which: int) -> States:
        """States of pieces in the room for them, for each set of them."""
        size = self.sizes.width * self.sizes.value_width
        each = size + self.sizes.width
        start = which * self.pieces * self.units * each
        return States(self.room[start:], self.room[start + size :], each, each)

    def of_piece(self, rows: int) -> tuple[int, int]:
        """(rows of a piece, how many there are) of a sequence; the last may be shorter."""
        all_of = triton.cdiv(rows, _PIECE)
        each = max(1, triton.cdiv(all_of, self.pieces)) * _PIECE
        return each, max(1, triton.cdiv(rows, each))


def alone(rows: int) -> tuple[int, int]:
    """The same where blocks hand no state on."""
    return _ALONE, max(1, triton.cdiv(rows, _ALONE))


def present(x: Tensor | None) -> bool:
    return x is not None and x.numel() > 0


def wants(fits: bool, what: str) -> None:
    if not fits:
        raise RuntimeError(f"pydl: linear_attention: wants {what}")


def dense(name: str, x: Tensor | None, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """Raises for numbers that the kernels would misread."""
    if x is not None and x.numel() > 0:
        fits = x.dtype == dtype and tuple(x.shape) == tuple(shape) and x.is_contiguous()
        wants(fits, f"dense {name} of {dtype}, {tuple(shape)}")


def check_rows(name: str, x: Tensor, like: Tensor, columns: int) -> None:
    """Raises for rows that do not fit those of `like`."""
    fits = x.dtype == like.dtype and tuple(x.shape) == (*like.shape[:3], columns)
    fits = fits and (x.numel() == 0 or columns == 1 or x.stride(3) == 1)
    wants(fits, f"{name} of its partner's rows and {columns} columns side by side")


def call_of(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None,
    total: Tensor | None, hidden: Tensor | None, feature: int, causal: bool, normalize: bool,
    scale: float, eps: float, factor: Tensor, pieces: Tensor, sets: int,
) -> Call:  # fmt: skip
    """`pieces` holds `sets` states of each. Raises where a kernel would misread memory."""
    wants(q.dim() == k.dim() == v.dim() == 4, "query, key and value of 4 dimensions")
    batch, heads, queries, width = q.shape
    kv_heads, keys, value_width = k.shape[1], k.shape[2], v.shape[3]
    wants(
        k.shape == (batch, kv_heads, keys, width) and v.shape[:3] == k.shape[:3]
        and (heads % kv_heads == 0 if kv_heads else heads == 0)
        and (not causal or queries == keys),
        f"key and value that fit a query of {tuple(q.shape)}",
    )  # fmt: skip
    wants(max(width, value_width) <= 256, f"widths up to 256, got {width} and {value_width}")
    wants(max(queries, keys) < _MOST_ROWS, "fewer than 2^30 queries and keys")
    wants(0 <= feature <= 2, "softmax of features taken before")
    wants(decay is None or causal, "the causal form where there is decay")
    wants(q.dtype != torch.float64, "fp32, fp16 or bf16")
    for name, x, like, columns in (
        ("query", q, q, width), ("key", k, k, width), ("value", v, k, value_width),
    ):  # fmt: skip
        wants(x.dtype == q.dtype, "query, key and value of one dtype")
        check_rows(name, x, like, columns)
    wide = torch.float32
    dense("decay", decay, wide, (heads,))
    dense("state", state, wide, (batch, heads, width, value_width))
    dense("sum", total, wide, (batch, heads, width))
    dense("factor", factor, wide, (batch, heads, queries, 1))
    if hidden is not None:
        wants(
            hidden.dtype == torch.bool and tuple(hidden.shape) == (batch, keys),
            f"a key_padding_mask of truth values, {(batch, keys)}",
        )
    each = sets * batch * heads * width * (value_width + 1)
    count = 1 if each == 0 or pieces.numel() == 0 else pieces.numel() // each
    if pieces.numel() > 0:
        dense("pieces", pieces, wide, (count * each,))
    rows = [rows_of(x) for x in (q, k, v)]
    inputs = Inputs(
        *rows, rows[0], factor, factor, factor,
        q if hidden is None else hidden.view(torch.uint8),
        0 if hidden is None or batch == 1 else hidden.stride(0),
        0 if hidden is None or keys == 1 else hidden.stride(1),
    )  # fmt: skip
    form = Form(0, causal, normalize, feature, decay is not None, hidden is not None)
    return Call(
        inputs, Sizes(batch, heads, heads // max(1, kv_heads), width, value_width), form,
        float(scale), float(eps), queries, keys, count, pieces,
    )  # fmt: skip


def shape(depth: int, columns: int, size: int, major: int, logs: bool) -> dict[str, int]:
    """The tile for a padded depth, columns, bytes an element and the device's major capability,
    with and without decay's gradient: as large as the registers allow."""
    if size == 4:
        chunk, part, tile, warps = 16, 16, 32, 8
    elif depth <= 32:
        chunk, part, tile, warps = 32, 32, 32, 4
    elif major >= 10:
        chunk, part, tile, warps = 64, 64, 32 if depth <= 128 else 16, 4
    elif depth <= 64:
        chunk, part, tile, warps = (16, 64, 32, 4) if major == 9 else (32, 32, 64, 4)
    else:
        chunk, part, tile, warps = (16, 64, 32, 4) if depth <= 128 else (16, 64, 16, 8)
    if logs:
        chunk, part, tile = 16, min(part, 32), min(tile, 32)
    return {"CHUNK": chunk, "DEPTH": depth, "SLICE": min(part, depth),
            "TILE": min(tile, padded(columns)), "num_warps": warps, "num_stages": 1}  # fmt: skip


def totals_shape(width: int, columns: int, size: int) -> dict[str, int]:
    """The same of a state's tile alone."""
    return {"CHUNK": 32, "ROWS": min(32 if size == 4 else 64, padded(width)),
            "TILE": min(32, padded(columns)), "num_warps": 4, "num_stages": 1}  # fmt: skip


def padded(columns: int) -> int:
    return max(16, triton.next_power_of_2(max(1, columns)))


# What kernels are not specialised for.
SIZES = (
    "batch", "heads", "group", "member", "rows", "of_piece", "pieces", "tiles", "across", "units",
    "blocks",
)  # fmt: skip
