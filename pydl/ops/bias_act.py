"""Bias, activation and dropout in one pass, as they follow a linear layer or a convolution."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from pydl import autograd
from pydl.autograd import Rule
from pydl.backends import FLOATS, choose, empty_like, kernel
from pydl.ops import definitions
from pydl.ops.channels import Channels, sums
from pydl.ops.philox import check_rate, check_seed, draw_seed, dropout_factors
from pydl.ops.samples import one_pass
from pydl.table import LAYOUTS, Case, Make, Op, register
from pydl.traced import hand_over, proxied

# name -> (number in csrc/math.h, default parameter, definition, native)
ACTIVATIONS: dict[str, tuple[int, float, Any, Any]] = {
    "identity": (0, 0.0, lambda x, p: x, lambda x, p: x),
    "sigmoid": (1, 0.0, lambda x, p: definitions.sigmoid(x), lambda x, p: torch.sigmoid(x)),
    "tanh": (2, 0.0, lambda x, p: torch.tanh(x), lambda x, p: torch.tanh(x)),
    "relu": (3, 0.0, lambda x, p: definitions.relu(x), lambda x, p: F.relu(x)),
    "leaky_relu": (4, 0.01, definitions.leaky_relu, F.leaky_relu),
    "elu": (5, 1.0, definitions.elu, F.elu),
    "selu": (6, 0.0, lambda x, p: definitions.selu(x), lambda x, p: F.selu(x)),
    "gelu": (7, 0.0, lambda x, p: definitions.gelu(x), lambda x, p: F.gelu(x)),
    "gelu_tanh": (
        8,
        0.0,
        lambda x, p: definitions.gelu_tanh(x),
        lambda x, p: F.gelu(x, approximate="tanh"),
    ),
    "silu": (9, 0.0, lambda x, p: definitions.swish(x), lambda x, p: F.silu(x)),
    "swish": (10, 1.0, definitions.swish, definitions.swish),
    "mish": (11, 0.0, lambda x, p: definitions.mish(x), lambda x, p: F.mish(x)),
}
_BY_NUMBER = {
    number: (definition, native) for number, _, definition, native in ACTIVATIONS.values()
}


def named(op: str, act: str, parameter: float | None) -> tuple[int, float]:
    """The kernels' number of an activation, and its parameter or that's default.

    Raises:
        ValueError: there is no such activation, or it has no parameter.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"pydl: {op}: act is {act!r}, wants one of {', '.join(ACTIVATIONS)}")
    number, default = ACTIVATIONS[act][:2]
    if parameter is not None and act not in ("leaky_relu", "elu", "swish"):
        raise ValueError(f"pydl: {op}: act_param is {parameter}, but {act} has no parameter")
    return number, float(default if parameter is None else parameter)


def definition(number: int, parameter: float) -> Any:
    """The plain activation behind a number."""
    return lambda x: _BY_NUMBER[number][0](x, parameter)


def native(number: int, parameter: float) -> Any:
    """torch's activation behind a number."""
    return lambda x: _BY_NUMBER[number][1](x, parameter)


def lowered(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast all in its dtype, as torch does for a linear layer."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t.dtype in FLOATS[:3] else t for t in tensors)


def _broadcast(x: Tensor, bias: Tensor, dim: int) -> Tensor:
    shape = [1] * x.dim()
    shape[dim] = bias.numel()
    return bias.view(shape)


def _reference(
    x: Tensor, bias: Tensor, seed: Tensor | None, act: int, parameter: float, p: float, dim: int
) -> Tensor:
    y = definition(act, parameter)(x + _broadcast(x, bias, dim))
    if p > 0:
        assert seed is not None
        y = y * dropout_factors(x.shape, seed, p).to(y.dtype)
    return y


def _forward(
    backend: str, x: Tensor, bias: Tensor, seed: Tensor | None, act: int, parameter: float,
    p: float, dim: int,
) -> Tensor:  # fmt: skip
    # The mask goes by the logical order.
    given, x = x, x.contiguous() if p > 0 else x
    y = empty_like(x)
    kernel(backend, "bias_act_fwd")(
        y, x, _broadcast(x, bias, dim).expand_as(x), seed, act, parameter, p
    )
    return y if x is given else empty_like(given).copy_(y)


def _backward(backend: str, dy: Tensor, saved: tuple, scalars: tuple, needs: tuple) -> tuple:
    x, bias = saved
    seed, act, parameter, p, dim = scalars
    channels = Channels(x, dim, contiguous=p > 0)
    x3 = channels.fold(x)
    dx = empty_like(x3)
    total, partials = sums(x3, bias)
    kernel(backend, "bias_act_bwd")(
        dx, total, partials, channels.fold(dy), x3, bias.contiguous(), seed, act, parameter, p
    )
    return channels.unfold(dx), total


def _shards(x: Tensor, *args: Any) -> tuple[list, list]:
    dims = range(x.dim())
    return [dims, (args[-1],), "seed"], [dims]


_RULE = Rule("bias_act", 2, _forward, _backward, _reference, shards=_shards)
_call = autograd.make(_RULE)


def bias_act(
    input: Tensor,
    bias: Tensor | None,
    act: str = "gelu",
    dropout_p: float = 0.0,
    training: bool = True,
    *,
    act_param: float | None = None,
    dim: int = -1,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Bias, activation and dropout in one pass, `dropout(act(x + bias))`.

    Args:
        input: Any shape and strides.
        bias: One value for each index of dimension `dim`, of the input's dtype; None for zeros.
        act: identity, sigmoid, tanh, relu, leaky_relu, elu, selu, gelu, gelu_tanh, silu, swish or
            mish.
        dropout_p: The probability that an element becomes 0; the others grow by `1 / (1 -
            dropout_p)`.
        training: Without it nothing is dropped.
        act_param: The negative slope of leaky_relu, alpha of elu or beta of swish; None for their
            defaults.
        dim: The bias' dimension: -1 after a linear layer, 1 after a convolution.
        seed: Two int64 values on the input's device that decide what is dropped, alike on every
            backend; drawn from torch's generator where None.
        backend: Who computes; see `pydl.backends`.

    Returns:
        A tensor like `input`. Saves the input, not the sum nor the dropout mask.

    Raises:
        ValueError: `act` or `act_param` is not as above, or `dropout_p` is not in [0, 1].
        RuntimeError: `bias` does not fit.
        IndexError: there is no dimension `dim`.
    """
    if has_torch_function_variadic(input, bias, seed) and proxied(input, bias, seed):
        return hand_over(bias_act, locals())
    number, parameter = named("bias_act", act, act_param)
    check_rate("bias_act", dropout_p)
    check_seed("bias_act", seed, input.device)
    p = float(dropout_p) if training else 0.0
    dims = input.dim()
    if dims and not -dims <= dim < dims:
        raise IndexError(
            f"pydl: bias_act: dim is {dim}, wants {-dims} to {dims - 1} for an input of shape "
            f"{tuple(input.shape)}"
        )
    size = input.shape[dim] if dims else 1
    if bias is None:
        bias = input.new_zeros(size)
    if bias.dim() != 1 or bias.numel() != size or not input.dim():
        raise RuntimeError(
            f"pydl: bias_act: bias has shape {tuple(bias.shape)}, wants ({size},) "
            f"for dimension {dim} of an input of shape {tuple(input.shape)}, which must "
            "have a dimension"
        )
    input, bias = lowered(input, bias)
    if bias.dtype != input.dtype:
        raise RuntimeError(
            f"pydl: bias_act: bias has dtype {bias.dtype}, wants the input's, {input.dtype}"
        )
    chosen = choose("bias_act", backend, input, bias)
    if p > 0 and seed is None:
        seed = draw_seed(input.device)
    dim = dim % input.dim()
    if chosen == "torch":
        y = native(number, parameter)(input + _broadcast(input, bias, dim))
        if p == 0 or seed is None:
            return y
        return y * dropout_factors(input.shape, seed, p).to(y.dtype)
    args = (input, bias, seed if p > 0 else None, number, parameter, p, dim)
    return autograd.in_reference(_RULE, *args) if chosen == "reference" else _call(chosen, *args)


def _definition(
    x: Tensor, bias: Tensor, act: str = "gelu", dropout_p: float = 0.0, training: bool = True, *,
    act_param: float | None = None, dim: int = -1, seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    number, parameter = named("bias_act", act, act_param)
    return _reference(x, bias, seed, number, parameter, dropout_p if training else 0.0, dim)


def _native(
    x: Tensor, bias: Tensor, act: str = "gelu", dropout_p: float = 0.0, training: bool = True, *,
    act_param: float | None = None, dim: int = -1, seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    number, parameter = named("bias_act", act, act_param)
    y = native(number, parameter)(x + _broadcast(x, bias, dim))
    if dropout_p == 0 or not training:
        return y
    return (
        F.dropout(y, dropout_p)
        if seed is None
        else y * dropout_factors(x.shape, seed, dropout_p).to(y.dtype)
    )


def _samples(make: Make) -> Iterator[Case]:
    seed = torch.tensor([12345678901, 77], device=make.device)
    for name in ACTIVATIONS:
        yield Case(f"{name} 33x65", (make(33, 65), make(65), name))
    yield Case("swish 2.5", (make(9, 70), make(70), "swish"), {"act_param": 2.5})
    for layout in LAYOUTS[1:]:
        yield Case(f"{layout}, channels", (make(2, 6, 5, 9, layout=layout), make(6)), {"dim": 1})
        yield Case(f"{layout}, rows", (make(37, 131, layout=layout), make(131), "silu"))
    yield Case("empty", (make(0, 8), make(8)))
    yield Case("strided bias", (make(5, 33), make(33, layout="sliced")))
    yield Case("no channels", (make(5, 0), make(0)))
    yield Case("one", (make(1), make(1), "mish"))
    yield Case("rows", (make(700, 1037), make(1037), "relu"))
    yield Case("dropout", (make(61, 133), make(133), "gelu", 0.3), {"seed": seed})
    yield Case(
        "dropout, channels", (make(3, 5, 7, 11), make(5), "relu", 0.5), {"seed": seed, "dim": 1}
    )
    yield Case("all dropped", (make(4, 9), make(9), "tanh", 1.0), {"seed": seed})
    yield Case("eval", (make(4, 9), make(9), "tanh", 0.5, False))


register(
    Op(
        name="bias_act",
        family="bias_act",
        function=bias_act,
        reference=_definition,
        native=_native,
        samples=_samples,
        bench=lambda make, shape: Case(
            "x".join(map(str, shape)), (make(*shape), make(shape[-1]), "gelu")
        ),
        bench_shapes=((4096, 4096), (4096, 1024), (64, 1024)),
        cost=one_pass,
        autocast="lower",
    )
)
