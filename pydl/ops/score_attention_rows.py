"""The table's rows of additive and Gaussian attention."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from pydl.ops.samples import bytes_of
from pydl.ops.score_attention import additive_attention, gaussian_attention
from pydl.table import LAYOUTS, Case, Cost, Make, Op, register


def _weights(make: Make, width: int, keys_width: int, hidden: int) -> tuple[Tensor, ...]:
    """Of projections that keep the spread of what they are given, and of a sum."""
    spread = 1 / max(1, width) ** 0.5, 1 / max(1, keys_width) ** 0.5
    first = make(hidden, width, scale=spread[0]), make(hidden, keys_width, scale=spread[1])
    return (*first, make(hidden, scale=0.25))


def _additive(
    make: Make, batch: tuple[int, ...], queries: int, keys: int, width: int, hidden: int,
    layout: str = "contiguous",
) -> tuple[Tensor, ...]:  # fmt: skip
    of = [make(*batch, n, width, layout=layout) for n in (queries, keys, keys)]
    return (*of, *_weights(make, width, width, hidden))


def _gaussian(
    make: Make, batch: tuple[int, ...], queries: int, keys: int, width: int,
    layout: str = "contiguous",
) -> tuple[Tensor, ...]:  # fmt: skip
    of = [make(*batch, n, width, scale=1, layout=layout) for n in (queries, keys, keys)]
    return (*of, make(width, scale=1 / max(1, width) ** 0.5))


def _additive_samples(make: Make) -> Iterator[Case]:
    yield Case("2x5x7x4x8", _additive(make, (2,), 5, 7, 4, 8))
    yield Case("one", _additive(make, (1,), 1, 1, 1, 1))
    yield Case("2x3 in front", _additive(make, (2, 3), 3, 5, 4, 6))
    yield Case("few", _additive(make, (), 2, 3, 1, 2))
    for layout in LAYOUTS[1:]:
        yield Case(f"{layout} 2x3x9x17", _additive(make, (2,), 9, 9, 17, 19, layout))
    for label, queries, keys in (("no queries", 0, 3), ("no keys", 3, 0), ("nothing", 0, 0)):
        yield Case(label, _additive(make, (2,), queries, keys, 4, 5))
    q, k, _, w_q, _, w_v = _additive(make, (2,), 6, 8, 4, 7)
    yield Case("widths", (q, k[..., :3], make(2, 8, 5), w_q, make(7, 3), w_v))
    yield Case("tiles", _additive(make, (2,), 67, 129, 9, 35))
    yield Case("many keys", _additive(make, (1,), 5, 533, 8, 17))
    yield Case("many queries", _additive(make, (1,), 333, 9, 8, 40))
    yield Case("small", tuple(t * 0.01 for t in _additive(make, (2,), 11, 18, 9, 12)))
    # Of few bits, so that the projections are exact: where tanh is steep next to numbers of several
    # hundred, what another order of a sum rounds away would decide.
    large = [(t * 48).round() / 4 for t in _additive(make, (2,), 6, 18, 4, 8)[:5]]
    yield Case("large", (*large[:2], large[2] / 12, *large[3:], make(8)))
    seen = torch.arange(2 * 6 * 8, device=make.device).view(2, 6, 8) % 3 > 0
    seen[0, 2] = False
    yield Case("mask", _additive(make, (2,), 6, 8, 4, 5), {"mask": seen})
    yield Case("padding", _additive(make, (2,), 6, 8, 4, 5), {"mask": seen[:, 2:3]})


def _gaussian_samples(make: Make) -> Iterator[Case]:
    yield Case("2x5x7x4", _gaussian(make, (2,), 5, 7, 4))
    yield Case("one", _gaussian(make, (1,), 1, 1, 1))
    yield Case("2x3 in front", _gaussian(make, (2, 3), 3, 5, 4))
    yield Case("few", _gaussian(make, (), 2, 3, 1))
    for layout in LAYOUTS[1:]:
        yield Case(f"{layout} 2x3x9x17", _gaussian(make, (2,), 9, 9, 17, layout))
    for label, queries, keys in (("no queries", 0, 3), ("no keys", 3, 0), ("nothing", 0, 0)):
        yield Case(label, _gaussian(make, (2,), queries, keys, 4))
    q, k, _, w = _gaussian(make, (2,), 6, 8, 4)
    yield Case("widths", (q, k, make(2, 8, 5), w))
    yield Case("one width", (q, k, make(2, 8, 3), make(1)))
    yield Case("numbers", (make(13, scale=1), make(9, scale=1), make(9), make(1, scale=1)))
    yield Case("tiles", _gaussian(make, (2,), 67, 129, 35))
    yield Case("many keys", _gaussian(make, (1,), 5, 533, 17))
    yield Case("many queries", _gaussian(make, (1,), 333, 9, 40))


def _additive_bench(make: Make, shape: tuple[int, ...]) -> Case:
    *batch, length, width = (1, *shape) if len(shape) == 1 else shape
    label = "x".join(map(str, shape))
    return Case(label, _additive(make, tuple(batch), length, length, width, width))


def _gaussian_bench(make: Make, shape: tuple[int, ...]) -> Case:
    *batch, length, width = (1, *shape) if len(shape) == 1 else shape
    label = "x".join(map(str, shape))
    return Case(label, _gaussian(make, tuple(batch), length, length, width))


def _cost(case: Case) -> Cost:
    """Four operations a pair and number: what meets, its function, a product and a sum."""
    q, k, v = case.args[:3]
    hidden = case.args[-1].numel()
    moved = bytes_of(q) + bytes_of(k) + 2 * bytes_of(v)
    pairs = prod(q.shape[:-1]) * k.shape[-2]
    work = pairs * (4 * hidden + 2 * v.shape[-1])
    return Cost(moved, 2 * moved, work, 5 * work // 2)


def _sized(elements: int) -> list[tuple[int, ...]]:
    """(batch, length, width): short sequences, because pairs of them cost the time."""
    return [(max(1, elements // (n * n)), max(1, min(n, elements // n)), n) for n in (64, 128)]


def _row(function: Any, samples: Any, bench: Any) -> None:
    def called(backend: str) -> Any:
        def call(*args: Any, **named: Any) -> Tensor:
            return function(*args, **named, backend=backend)

        return call

    register(
        Op(
            name=function.__name__,
            family="score",
            function=function,
            reference=called("reference"),
            native=called("torch"),
            samples=samples,
            bench=bench,
            bench_shapes=((4, 256, 128), (1, 1024, 64), (16, 64, 64)),
            cost=_cost,
            autocast="lower",
            sized=_sized,
        )
    )


_row(additive_attention, _additive_samples, _additive_bench)
_row(gaussian_attention, _gaussian_samples, _gaussian_bench)
