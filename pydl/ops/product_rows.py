"""The table's row of the linear layer."""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt, prod

import torch.nn.functional as F
from torch import Tensor

from pydl.ops.product import SHORT, linear
from pydl.ops.samples import bytes_of
from pydl.table import LAYOUTS, Case, Cost, Make, Op, register


def _definition(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = input @ weight.t()
    return y if bias is None else y + bias


def _samples(make: Make) -> Iterator[Case]:
    def call(label: str, *shape: int, out: int, layout: str = "contiguous") -> Case:
        width = shape[-1]
        # Outputs of spread one.
        weight = make(out, width, scale=width**-0.5, layout=layout)
        return Case(label, (make(*shape, scale=1.0, layout=layout), weight, make(out, scale=1.0)))

    yield call("33x65, 17", 33, 65, out=17)
    yield call("one", 1, 1, out=1)
    yield call("a vector", 19, out=33)
    yield call("2x3x5x7, 4", 2, 3, 5, 7, out=4)
    for layout in LAYOUTS[1:]:
        yield call(f"{layout} 37x41, 50", 37, 41, out=50, layout=layout)
    yield call("channels_last", 2, 6, 5, 9, out=3, layout="channels_last")
    yield call("long sums", 5, 1031, out=3)
    yield call("many", 211, 96, out=130)
    x, weight = call("", 40, 24, out=36).args[:2]
    yield Case("no bias", (x, weight))
    yield Case("a weight of one row", (x, weight[0]))
    yield Case("a weight transposed, a bias strided", (x, make(24, 36).t(), make(72)[::2]))
    yield Case("no rows", (make(0, 8), make(3, 8), make(3)))
    yield Case("no terms", (make(3, 0), make(2, 0), make(2)))
    yield Case("no outputs", (make(3, 5), make(0, 5), make(0)))


def _bench(make: Make, shape: tuple[int, ...]) -> Case:
    width = shape[-1]
    args = make(*shape), make(width, width, scale=width**-0.5), make(width)
    return Case("x".join(map(str, shape)), args)


def _cost(case: Case) -> Cost:
    x, weight = case.args[:2]
    rows = x.numel() // max(1, x.shape[-1])
    out = rows * weight.shape[0] * x.element_size()
    moved, work = bytes_of(x, weight), 2 * rows * prod(weight.shape)
    return Cost(moved + out, 2 * moved + out, work, 2 * work)


def _shapes(elements: int) -> list[tuple[int, ...]]:
    """Squares, and rows of widths that models have."""
    widths = (isqrt(elements), 256, 768, 2048)
    return [(elements // n, n) for n in widths if elements // n >= SHORT]


def _few_rows(elements: int) -> list[tuple[int, ...]]:
    """One row, four and sixteen, of widths that models have."""
    return [(n, max(1, min(4096, elements // n))) for n in (1, 4, 16)]


register(
    Op(
        name="linear",
        family="product",
        function=linear,
        reference=_definition,
        native=F.linear,
        samples=_samples,
        bench=_bench,
        bench_shapes=((2048, 768), (512, 384), (64, 1024)),
        cost=_cost,
        autocast="lower",
        sized=_shapes,
        apart={"linear_short": _few_rows},
    )
)
