"""The rows of layer_norm and rms_norm in the op table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pydl.backends import FLOATS
from pydl.ops.layer_norm import (
    layer_norm,
    layer_norm_definition,
    rms_norm,
    rms_norm_definition,
)
from pydl.ops.samples import one_pass, row_shapes
from pydl.table import LAYOUTS, Case, Make, Op, register


def inputs(make: Make) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    """(label, input, normalized_shape)"""
    for rows, n in ((5, 64), (3, 7), (4, 131), (7, 256), (3, 1030), (2, 5000), (70, 24)):
        yield f"{rows}x{n}", make(rows, n), (n,)
    yield "4x3x5x6 over 2", make(4, 3, 5, 6), (5, 6)
    yield "over all", make(3, 5), (3, 5)
    for layout in LAYOUTS[1:]:
        yield f"{layout} 2x6x5x9", make(2, 6, 5, 9, layout=layout), (9,)
        yield f"{layout} 37x136", make(37, 136, layout=layout), (136,)
    yield "no rows", make(0, 8), (8,)
    yield "large mean", make(6, 300) + 1e3, (300,)
    yield "constant", make(4, 1).expand(4, 40), (40,)
    yield "small", make(5, 48) * 0.05, (48,)
    yield "long", make(2, 20_000), (20_000,)


def _samples(biased: bool) -> Any:
    # rms_norm's default eps is the dtype's.
    tail = () if biased else (1e-6,)

    def draw(make: Make) -> Iterator[Case]:
        for label, x, shape in inputs(make):
            weights = [make(*shape, scale=0.5) + 1] + ([make(*shape)] if biased else [])
            yield Case(label, (x, shape, *weights, *tail))
        yield Case("no weight", (make(9, 72), (72,)) + (() if biased else (None, 1e-6)))
        yield Case("1x1", (make(1, 1), (1,), make(1), *([make(1)] if biased else []), 0.5))
        yield Case("eps", (make(9, 72), (72,), make(72), *([None] if biased else []), 0.1))
        if biased:
            yield Case("bias alone", (make(9, 72), (72,), None, make(72)))
        if make.dtype in FLOATS[1:3]:
            single = Make(torch.float32, make.device, "weights")
            weights = [single(72)] + ([single(72)] if biased else [])
            yield Case("fp32 weights", (make(9, 72), (72,), *weights, *tail))
        if not biased and make.dtype != torch.float64:
            yield Case("default eps", (make(9, 72), (72,), make(72)))
        last = make(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d)
        yield Case("channels_last_3d", (last, (6,), make(6), *tail))
        part = make(2, 16, 4, 9, layout="channels_last")[:, :8]
        yield Case("channels_last, half", (part, (4, 9), make(4, 9), *tail))

    return draw


def _layer_norm_definition(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    return layer_norm_definition(x, weight, bias, len(shape), eps)


def _rms_norm_definition(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return rms_norm_definition(
        x, weight, len(shape), torch.finfo(torch.float32).eps if eps is None else eps
    )


def _bench(biased: bool) -> Any:
    def draw(make: Make, shape: tuple[int, ...]) -> Case:
        # A row has an element at least.
        n = max(1, shape[-1])
        weights = (make(n), make(n)) if biased else (make(n), 1e-6)
        return Case("x".join(map(str, shape)), (make(*shape[:-1], n), (n,), *weights))

    return draw


_SHAPES = ((4096, 4096), (4096, 1024), (512, 16384), (64, 1024))
register(
    Op(
        name="layer_norm",
        family="layer_norm",
        function=layer_norm,
        reference=_layer_norm_definition,
        native=F.layer_norm,
        samples=_samples(True),
        bench=_bench(True),
        bench_shapes=_SHAPES,
        cost=one_pass,
        sized=row_shapes,
    )
)
register(
    Op(
        name="rms_norm",
        family="layer_norm",
        function=rms_norm,
        reference=_rms_norm_definition,
        native=F.rms_norm,
        samples=_samples(False),
        bench=_bench(False),
        bench_shapes=_SHAPES,
        cost=one_pass,
        sized=row_shapes,
    )
)
