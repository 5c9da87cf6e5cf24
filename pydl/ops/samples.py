"""What rows share: inputs that a pointwise op must survive, sizes to measure, bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from pydl.table import LAYOUTS, Case, Cost, Make

BENCH_SHAPES = ((4096, 4096), (4096, 1024), (64, 1024), (1024,))

_SHAPES = ((), (1,), (0,), (3, 0, 2), (7,), (64,), (1031,), (33, 65), (2, 3, 5, 7))
_EXTREMES = (0.0, -0.0, 1e-7, -1e-7, 9.0, -9.0, 21.0, -21.0, 89.0, -89.0, 104.0, -104.0, 6e4, -6e4)
_SPECIAL = (*_EXTREMES, 1e30, -1e30, math.inf, -math.inf, math.nan)


def inputs(make: Make) -> Iterator[tuple[str, Tensor]]:
    """Labelled inputs: every shape, every layout, hard values."""
    for shape in _SHAPES:
        yield "x".join(map(str, shape)) or "scalar", make(*shape)
    for layout in LAYOUTS[1:]:
        yield f"{layout} 2x6x5x9", make(2, 6, 5, 9, layout=layout)
        yield f"{layout} 37x131", make(37, 131, layout=layout)
    yield "hard values", make.of(_SPECIAL)
    yield "many", make(3, 20011)


def row_shapes(elements: int) -> list[tuple[int, ...]]:
    """Rows of three widths, of about so many elements together."""
    return [(max(1, elements // n), min(elements, n)) for n in (256, 1024, 4096)]


def _images(elements: int, channels: int, side: int) -> tuple[int, ...]:
    """Two at least, of fewer channels where so many are too many elements."""
    channels = max(1, min(channels, elements // (2 * side * side)))
    return max(2, elements // (channels * side * side)), channels, side, side


def channel_shapes(elements: int) -> list[tuple[int, ...]]:
    """Images of few and of more channels."""
    return [_images(elements, 64, 28), _images(elements, 128, 14)]


def short_channel_shapes(elements: int) -> list[tuple[int, ...]]:
    """Images of few positions, and features without positions."""
    return [_images(elements, 256, 7), (max(2, elements // 256), 256)]


def head_shapes(elements: int) -> list[tuple[int, ...]]:
    """(batch, heads, length, head size): sequences up to 1024, then more of them."""
    found: list[tuple[int, ...]] = []
    for heads, width in ((8, 64), (4, 128)):
        length = max(1, min(1024, elements // (heads * width)))
        found.append((max(1, elements // (heads * width * length)), heads, length, width))
    return found


def bytes_of(*tensors: Tensor) -> int:
    """Bytes that reading or writing these once moves."""
    return sum(t.numel() * t.element_size() for t in tensors)


def one_pass(case: Case) -> Cost:
    """Forward reads the first tensor and writes one like it; backward reads two and writes one."""
    return Cost(2 * bytes_of(case.args[0]), 3 * bytes_of(case.args[0]))
