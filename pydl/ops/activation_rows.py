"""The activations' rows of the op table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pydl.ops import definitions
from pydl.ops.activation import (
    elu,
    gelu,
    leaky_relu,
    mish,
    prelu,
    relu,
    selu,
    sigmoid,
    silu,
    swish,
    tanh,
)
from pydl.ops.samples import BENCH_SHAPES, inputs, one_pass
from pydl.table import Case, Make, Op, register


def _samples(*variants: tuple[Any, ...]) -> Callable[[Make], Iterable[Case]]:
    """Every input with the first variant of the further arguments, a few with the others."""

    def draw(make: Make) -> Iterator[Case]:
        for label, x in inputs(make):
            yield Case(label, (x, *variants[0]))
        for variant in variants[1:]:
            yield Case(f"129 {variant}", (make(129), *variant))
            yield Case(f"sliced 5x33 {variant}", (make(5, 33, layout="sliced"), *variant))

    return draw


def _learnt_samples(scalars: tuple[Any, ...] = ()) -> Callable[[Make], Iterable[Case]]:
    def draw(make: Make) -> Iterator[Case]:
        for value in scalars:
            yield Case(f"129 {value}", (make(129), value))
        for label, x in inputs(make):
            yield Case(f"{label}, one", (x, make(1, scale=0.5)))
            if x.dim() >= 2 and x.shape[1] > 0:
                yield Case(f"{label}, per channel", (x, make(x.shape[1], scale=0.5)))
        yield Case("strided, per channel", (make(7, 9), make(9, scale=0.5, layout="sliced")))
        yield Case("images, per channel", (make(3, 5, 67, 71), make(5, scale=0.5)))
        yield Case("columns, per channel", (make(700, 1037), make(1037, scale=0.5)))

    return draw


def _row(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    native: Callable[..., Tensor],
    samples: Callable[[Make], Iterable[Case]],
    extra: Callable[[Make, tuple[int, ...]], tuple[Any, ...]] = lambda make, shape: (),
    autocast: str = "keep",
) -> None:
    def bench(make: Make, shape: tuple[int, ...]) -> Case:
        return Case("x".join(map(str, shape)), (make(*shape), *extra(make, shape)))

    register(
        Op(
            name=function.__name__,
            family="activation",
            function=function,
            reference=reference,
            native=native,
            samples=samples,
            bench=bench,
            bench_shapes=BENCH_SHAPES,
            cost=one_pass,
            autocast=autocast,
        )
    )


def _gelu_reference(x: Tensor, approximate: str = "none") -> Tensor:
    return definitions.gelu_tanh(x) if approximate == "tanh" else definitions.gelu(x)


def _swish_reference(x: Tensor, beta: float | Tensor = 1.0) -> Tensor:
    return (
        definitions.swish_learnt(x, beta)
        if isinstance(beta, Tensor)
        else definitions.swish(x, beta)
    )


_row(sigmoid, definitions.sigmoid, torch.sigmoid, _samples(()))
_row(tanh, definitions.tanh, torch.tanh, _samples(()))
_row(relu, definitions.relu, F.relu, _samples(()))
_row(leaky_relu, definitions.leaky_relu, F.leaky_relu, _samples((), (0.2,), (-0.5,), (0.0,)))
_row(
    prelu, definitions.prelu, F.prelu, _learnt_samples(),
    lambda make, shape: (make(1, scale=0.25),), autocast="lower",
)  # fmt: skip
_row(elu, definitions.elu, F.elu, _samples((), (0.5,), (2.0,)))
_row(selu, definitions.selu, F.selu, _samples(()))
_row(gelu, _gelu_reference, lambda x, approximate="none": F.gelu(x, approximate=approximate),
     _samples((), ("tanh",)))  # fmt: skip
_row(silu, definitions.swish, F.silu, _samples(()))
_row(
    swish, _swish_reference, _swish_reference, _learnt_samples((1.0, 1.7, -0.6)),
    lambda make, shape: (1.5,), autocast="lower",
)  # fmt: skip
_row(mish, definitions.mish, F.mish, _samples(()))
