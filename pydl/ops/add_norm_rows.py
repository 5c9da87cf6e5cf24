"""The rows of add_layer_norm and add_rms_norm in the op table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pydl.backends import FLOATS
from pydl.ops import layer_norm_rows
from pydl.ops.add_norm import add_layer_norm, add_rms_norm, native
from pydl.ops.layer_norm import layer_norm_definition, rms_norm_definition
from pydl.ops.philox import dropout_factors
from pydl.ops.samples import bytes_of, row_shapes
from pydl.table import Case, Cost, Make, Op, register


def _samples(biased: bool) -> Any:
    """As the plain norm's, and more; rms_norm's default eps is the dtype's."""
    eps = 1e-5 if biased else 1e-6

    def weights(make: Make, *shape: int) -> list[Tensor]:
        return [make(*shape, scale=0.5) + 1, *([make(*shape)] if biased else [])]

    def draw(make: Make) -> Iterator[Case]:
        residuals = layer_norm_rows.inputs(Make(make.dtype, make.device, "residual"))
        for (label, x, shape), (_, residual, _) in zip(
            layer_norm_rows.inputs(make), residuals, strict=True
        ):
            yield Case(label, (x, residual, shape, *weights(make, *shape), eps))
        absent = [None] * (1 + biased)
        x, residual = make(9, 72), make(9, 72)
        yield Case("no weight", (x, residual, (72,), *absent, eps))
        yield Case("1x1", (make(1, 1), make(1, 1), (1,), *weights(make, 1), 0.5))
        other = make(37, 136, layout="transposed")
        yield Case("two layouts", (make(37, 136), other, (136,), *weights(make, 136), eps))
        if biased:
            yield Case("bias alone", (make(9, 72), make(9, 72), (72,), None, make(72)))
        elif make.dtype != torch.float64:
            yield Case("default eps", (make(9, 72), make(9, 72), (72,), make(72)))
        seed = torch.tensor([12345678901, 77], device=make.device)
        for rows, n, p in ((61, 133, 0.3), (7, 256, 0.5), (9, 30, 0.1), (2, 1037, 0.9)):
            tensors = make(rows, n), make(rows, n)
            args = (*tensors, (n,), *weights(make, n), eps, p)
            yield Case(f"dropout {rows}x{n}", args, {"seed": seed})
        args = (make(4, 9), make(4, 9), (9,), *weights(make, 9), eps)
        yield Case("all dropped", (*args, 1.0), {"seed": seed})
        yield Case("eval", (*args, 0.5, False))
        if make.dtype in FLOATS[1:3]:
            single = Make(torch.float32, make.device, "weights")
            half, full = weights(make, 72), weights(single, 72)
            yield Case("fp32 weights", (x, residual, (72,), *full, eps))
            wide = single(9, 72)
            yield Case("fp32 residual", (x, wide, (72,), *half, eps))
            yield Case("fp32 residual, weights", (x, wide, (72,), *full, eps))
            yield Case("fp32 residual, dropout", (x, wide, (72,), *half, eps, 0.4), {"seed": seed})
            odd = (make(5, 131), single(5, 131), (131,), *weights(make, 131), eps)
            yield Case("fp32 residual 5x131", odd)
            large = (make(3, 5000), single(3, 5000), (5000,), *weights(make, 5000), eps)
            yield Case("fp32 residual 3x5000", large)

    return draw


def _summed(x: Tensor, residual: Tensor, p: float, training: bool, seed: Tensor | None) -> Tensor:
    if p > 0 and training:
        assert seed is not None
        x = x * dropout_factors(x.shape, seed, p).to(x.dtype)
    h = residual + x
    return h.to(residual.dtype)


def _layer_norm_definition(
    x: Tensor, residual: Tensor, shape: Sequence[int], weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5, dropout_p: float = 0.0, training: bool = True, *,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    h = _summed(x, residual, dropout_p, training, seed)
    return layer_norm_definition(h, weight, bias, len(shape), eps), h


def _rms_norm_definition(
    x: Tensor, residual: Tensor, shape: Sequence[int], weight: Tensor | None = None,
    eps: float | None = None, dropout_p: float = 0.0, training: bool = True, *,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    h = _summed(x, residual, dropout_p, training, seed)
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    return rms_norm_definition(h, weight, len(shape), eps), h


def _layer_norm(
    x: Tensor, residual: Tensor, shape: Sequence[int], weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5, dropout_p: float = 0.0, training: bool = True, *,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    p = dropout_p if training else 0.0
    return native(F.layer_norm, x, residual, shape, (weight, bias), eps, p, seed)


def _rms_norm(
    x: Tensor, residual: Tensor, shape: Sequence[int], weight: Tensor | None = None,
    eps: float | None = None, dropout_p: float = 0.0, training: bool = True, *,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    p = dropout_p if training else 0.0
    return native(F.rms_norm, x, residual, shape, (weight,), eps, p, seed)


def _bench(biased: bool) -> Any:
    def draw(make: Make, shape: tuple[int, ...]) -> Case:
        # A row has an element at least.
        n = max(1, shape[-1])
        shape = (*shape[:-1], n)
        weights = (make(n), make(n)) if biased else (make(n), 1e-6)
        return Case("x".join(map(str, shape)), (make(*shape), make(*shape), (n,), *weights))

    return draw


def _cost(case: Case) -> Cost:
    """Forward reads x and the residual and writes two like them; backward reads what flows back
    and the sum, and writes a gradient."""
    x, residual = (bytes_of(t) for t in case.args[:2])
    return Cost(2 * (x + residual), x + 3 * residual)


def _register(function: Callable, reference: Callable, by_torch: Callable, biased: bool) -> None:
    register(
        Op(
            name=function.__name__,
            family="add_norm",
            function=function,
            reference=reference,
            native=by_torch,
            samples=_samples(biased),
            bench=_bench(biased),
            bench_shapes=((4096, 4096), (4096, 1024), (512, 16384), (64, 1024)),
            cost=_cost,
            sized=row_shapes,
        )
    )


_register(add_layer_norm, _layer_norm_definition, _layer_norm, True)
_register(add_rms_norm, _rms_norm_definition, _rms_norm, False)
