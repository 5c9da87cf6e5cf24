"""What linear attention's Triton kernels share: features, products, chunks of rows and states.

Letters as in csrc/linear_attention.h.
"""

from __future__ import annotations

import triton
import triton.language as tl
from pydl.kernels.attention_tile import start_of
from pydl.kernels.common import _ROUND_BY_HAND

# Powers of decay a head has, from that of 0 on.
POWERS = tl.constexpr(65)


@triton.jit
def nearest(x, T: tl.constexpr):
    """fp32 as products of T take it: to 11 bits, where tensor cores would cut off."""
    if T.is_fp32():
        return x
    elif _ROUND_BY_HAND:
        bits = x.to(tl.int32, bitcast=True)
        away = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(x == x, away, x)
    else:
        bits = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1
        )
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def operand(x, EXACT: tl.constexpr, T: tl.constexpr):
    """What `product` takes; a tensor's own numbers are EXACT."""
    if EXACT:
        return x
    else:
        return nearest(x, T)


@triton.jit
def product(a, b, T: tl.constexpr):
    """a @ b of operands, added in fp32. As tf32, 16-bit tensors have the range that states of any
    length need."""
    if T.is_fp32():
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="tf32")


@triton.jit
def feature_of(x, FEATURE: tl.constexpr):
    if FEATURE == 1:
        return tl.where(x > 0, x + 1.0, tl.exp(tl.where(x > 0, 0.0, x)))
    elif FEATURE == 2:
        return tl.where(x <= 0, 0.0, x)
    else:
        return x


@triton.jit
def times_slope(y, x, FEATURE: tl.constexpr):
    """y times the feature's derivative at x."""
    if FEATURE == 1:
        return tl.where(x > 0, y, y * tl.exp(tl.where(x > 0, 0.0, x)))
    elif FEATURE == 2:
        return tl.where(x <= 0, 0.0, y)
    else:
        return y


@triton.jit
def there(inputs, b, first, stop, KEYS: tl.constexpr, FORM: tl.constexpr, CHUNK: tl.constexpr):
    """Which of CHUNK rows from `first` on there are, and are not ignored."""
    r = first + tl.arange(0, CHUNK)
    inside = r < stop
    if KEYS and FORM.HIDDEN:
        at = inputs.hidden + b * inputs.hidden_batch + r.to(tl.int64) * inputs.hidden_key
        inside = inside & (tl.load(at, mask=inside, other=1) == 0)
    return inside


@triton.jit
def block(rows, b, h, first, column, columns, inside, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """(CHUNK, WIDTH) in fp32 of a head, from a row and a column on; 0 outside."""
    r = first + tl.arange(0, CHUNK)[:, None]
    c = column + tl.arange(0, WIDTH)[None, :]
    at = start_of(rows, b, h, 0) + r.to(tl.int64) * rows.row + c
    return tl.load(at, mask=inside[:, None] & (c < columns), other=0.0).to(tl.float32)


@triton.jit
def number_of(numbers, unit, all_rows, first, stop, CHUNK: tl.constexpr):
    """A number a row of queries; 0 past the end."""
    r = first + tl.arange(0, CHUNK)
    return tl.load(numbers + unit * all_rows + r, mask=r < stop, other=0.0)


@triton.jit
def side(inputs, b, h, group, unit, all_rows, first, stop, column, columns, WHICH: tl.constexpr,
         FORM: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """(CHUNK, WIDTH) of f, g, v or du (0 to 3), in fp32."""
    KEYS: tl.constexpr = WHICH == 1 or WHICH == 2
    inside = there(inputs, b, first, stop, KEYS, FORM, CHUNK)
    if WHICH == 0:
        x = block(inputs.q, b, h, first, column, columns, inside, CHUNK, WIDTH)
    elif WHICH == 1:
        x = block(inputs.k, b, h // group, first, column, columns, inside, CHUNK, WIDTH)
    elif WHICH == 2:
        x = block(inputs.v, b, h // group, first, column, columns, inside, CHUNK, WIDTH)
    else:
        x = block(inputs.dout, b, h, first, column, columns, inside, CHUNK, WIDTH)
        x *= number_of(inputs.factor, unit, all_rows, first, stop, CHUNK)[:, None]
    if WHICH <= 1 and FORM.FEATURE > 0:
        c = column + tl.arange(0, WIDTH)[None, :]
        x = feature_of(x, FORM.FEATURE)
        x = tl.where(inside[:, None] & (c < columns), x, 0.0)
    return x


@triton.jit
def state_at(states, slot, row, column, width, value_width, BY_VALUES: tl.constexpr,
             ROWS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """(where a tile of a state is, which of its elements there are); rows are features, or
    values."""
    r = row + tl.arange(0, ROWS)[:, None]
    c = column + tl.arange(0, TILE)[None, :]
    start = states.state + slot * states.state_step
    if BY_VALUES:
        return start + c * value_width + r, (r < value_width) & (c < width)
    else:
        return start + r * value_width + c, (r < width) & (c < value_width)


@triton.jit
def load_state(states, slot, row, column, width, value_width, BY_VALUES: tl.constexpr,
               ROWS: tl.constexpr, TILE: tl.constexpr, THERE: tl.constexpr):  # fmt: skip
    """(ROWS, TILE); zeros where none is THERE."""
    if THERE:
        at, inside = state_at(
            states, slot, row, column, width, value_width, BY_VALUES, ROWS, TILE
        )  # fmt: skip
        return tl.load(at, mask=inside, other=0.0)
    else:
        return tl.zeros((ROWS, TILE), dtype=tl.float32)


@triton.jit
def store_state(states, state, slot, row, column, width, value_width, BY_VALUES: tl.constexpr,
                ROWS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    at, inside = state_at(states, slot, row, column, width, value_width, BY_VALUES, ROWS, TILE)
    tl.store(at, state, mask=inside)


@triton.jit
def load_sum(states, slot, first, width, N: tl.constexpr, THERE: tl.constexpr):
    """N of a sum of features, from one on; zeros where none is THERE."""
    if THERE:
        r = first + tl.arange(0, N)
        at = states.sum + slot * states.sum_step + r
        return tl.load(at, mask=r < width, other=0.0)
    else:
        return tl.zeros((N,), dtype=tl.float32)


@triton.jit
def store_sum(states, sum, slot, first, width, N: tl.constexpr):
    r = first + tl.arange(0, N)
    tl.store(states.sum + slot * states.sum_step + r, sum, mask=r < width)


@triton.jit
def extended(slices, one):
    return slices + (one,)  # noqa: RUF005


@triton.jit
def grown(state, b, x, decays, keep, FORM: tl.constexpr, EXACT_B: tl.constexpr,
          EXACT_X: tl.constexpr, FINE: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """The state after a chunk; `decays` are those of b's rows. Rows past the end weigh nothing:
    they are zeros. FINE: to fp32, by what operands leave out."""
    EXACT: tl.constexpr = EXACT_B and not FORM.DECAY
    if FORM.DECAY:
        b = b * decays[:, None]
    high_b = operand(b, EXACT, T)
    high_x = operand(x, EXACT_X, T)
    added = product(tl.trans(high_b), high_x, T)
    if FINE and not EXACT and not T.is_fp32():
        added += product(tl.trans(nearest(b - high_b, T)), high_x, T)
    if FINE and not EXACT_X and not T.is_fp32():
        added += product(tl.trans(high_b), nearest(x - high_x, T), T)
    return state * keep + added


@triton.jit
def weighted_sum(sum, x, by, keep):
    """The same of a column or row more: a sum of x's rows."""
    return sum * keep + tl.sum(x * by[:, None], 0)
