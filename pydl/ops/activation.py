"""Elementwise activations, with `torch.nn.functional`'s names, arguments, defaults and errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pydl import autograd
from pydl.autograd import Rule
from pydl.backends import FLOATS, choose, empty_like, kernel
from pydl.ops.channels import Channels, sums
from pydl.table import LAYOUTS, Case, Cost, Make, Op, register

# The definitions. They are differentiable, run in any dtype, and are judged in fp64.


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def _tanh(x: Tensor) -> Tensor:
    return torch.tanh(x)


def _relu(x: Tensor) -> Tensor:
    return torch.where(x <= 0, torch.zeros_like(x), x)


def _leaky_relu(x: Tensor, negative_slope: float = 0.01) -> Tensor:
    return torch.where(x > 0, x, x * negative_slope)


def _elu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return torch.where(x <= 0, alpha * torch.expm1(x.clamp(max=0)), x)


_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946


def _selu(x: Tensor) -> Tensor:
    return _SELU_SCALE * _elu(x, _SELU_ALPHA)


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * torch.erfc(-x * math.sqrt(0.5))


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def _swish(x: Tensor, beta: float | Tensor = 1.0) -> Tensor:
    return x * torch.sigmoid(beta * x)


def _mish(x: Tensor) -> Tensor:
    return x * torch.tanh(F.softplus(x, threshold=40))


def _per_channel(x: Tensor, parameter: Tensor) -> Tensor:
    """A parameter of one value, or of one per channel (dimension 1), ready to broadcast over x."""
    if parameter.numel() == 1 or x.dim() < 2:
        return parameter.reshape(())
    return parameter.reshape([-1 if d == 1 else 1 for d in range(x.dim())])


def _prelu(x: Tensor, weight: Tensor) -> Tensor:
    return torch.where(x > 0, x, _per_channel(x, weight) * x)


def _swish_learnt(x: Tensor, beta: Tensor) -> Tensor:
    return _swish(x, _per_channel(x, beta))


# The derivatives in terms of the output, for what saves that.


def _sigmoid_slope(dy: Tensor, saved: tuple, scalars: tuple) -> tuple[Tensor]:
    return (dy * (1 - saved[0]) * saved[0],)


def _tanh_slope(dy: Tensor, saved: tuple, scalars: tuple) -> tuple[Tensor]:
    return (dy * (1 - saved[0] * saved[0]),)


def _relu_slope(dy: Tensor, saved: tuple, scalars: tuple) -> tuple[Tensor]:
    return (torch.where(saved[0] <= 0, torch.zeros_like(dy), dy),)


def _leaky_relu_slope(dy: Tensor, saved: tuple, scalars: tuple) -> tuple[Tensor]:
    return (torch.where(saved[0] > 0, dy, dy * scalars[0]),)


@dataclass(frozen=True)
class Unary:
    """An activation without learnt parameters: its kernels, its definition and how it is called."""

    rule: Rule
    call: Callable[..., Tensor]
    inplace: Callable[..., Tensor]


def _unary(
    name: str, reference: Callable[..., Tensor], derivative: Callable | None = None
) -> Unary:
    fwd, bwd, saves_output = f"{name}_fwd", f"{name}_bwd", derivative is not None

    def forward(backend: str, x: Tensor, *scalars: float) -> Tensor:
        y = empty_like(x)
        kernel(backend, fwd)(y, x, *scalars)
        return y

    def backward(backend: str, dy: Tensor, saved: tuple, scalars: tuple, needs: tuple) -> tuple:
        dx = empty_like(saved[0])
        kernel(backend, bwd)(dx, dy, saved[0], *scalars)
        return (dx,)

    rule = Rule(name, 1, forward, backward, reference, saves_output, derivative, pointwise=True)
    call = autograd.make(rule)

    class Inplace(torch.autograd.Function):
        """Writes the result over x, from which the gradient follows as well."""

        @staticmethod
        def forward(ctx: Any, backend: str, x: Tensor, *scalars: float) -> Tensor:
            kernel(backend, fwd)(x, x, *scalars)
            ctx.mark_dirty(x)
            ctx.backend, ctx.scalars = backend, scalars
            ctx.save_for_backward(x)
            return x

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple:
            # In plain PyTorch where the gradient is to be differentiated again.
            if torch.is_grad_enabled():
                got = autograd.derivative(rule, dy, ctx.saved_tensors, ctx.scalars)
            else:
                got = backward(ctx.backend, dy, ctx.saved_tensors, ctx.scalars, (True,))
            return (None, *got, *(None for _ in ctx.scalars))

    def inplace(backend: str, x: Tensor, *scalars: float) -> Tensor:
        special = torch.compiler.is_compiling() or autograd.special()
        grad = torch.is_grad_enabled() and x.requires_grad
        if grad and not special:
            base = x._base if x._is_view() else x
            if base is not None and base.is_leaf and base.requires_grad:
                # Before anything is written.
                raise RuntimeError(
                    f"pydl: {name}: inplace=True on a leaf that requires grad (or a view of one), "
                    "wants a tensor that an operation made"
                )
        if special or not _dense(x):
            return x.copy_(call(backend, x.clone() if grad else x, *scalars))
        if not grad:
            kernel(backend, fwd)(x, x, *scalars)
            torch.autograd.graph.increment_version(x)
            return x
        if saves_output:
            return Inplace.apply(backend, x, *scalars)
        return x.copy_(call(backend, x.clone(), *scalars))

    return Unary(rule, call, inplace)


def _dense(x: Tensor) -> bool:
    """Whether every element has memory of its own, which a kernel may overwrite."""
    return x.is_contiguous() or (
        x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )


SIGMOID = _unary("sigmoid", _sigmoid, _sigmoid_slope)
TANH = _unary("tanh", _tanh, _tanh_slope)
RELU = _unary("relu", _relu, _relu_slope)
LEAKY_RELU = _unary("leaky_relu", _leaky_relu)
# With a slope of 0 or more the output has the sign of the input, and is alive as the next layer's
# input.
LEAKY_RELU_OUT = _unary("leaky_relu", _leaky_relu, _leaky_relu_slope)
ELU = _unary("elu", _elu)
SELU = _unary("selu", _selu)
GELU = _unary("gelu", _gelu)
GELU_TANH = _unary("gelu_tanh", _gelu_tanh)
SILU = _unary("silu", _swish)
SWISH = _unary("swish", _swish)
MISH = _unary("mish", _mish)


def _run(unary: Unary, backend: str, inplace: bool, x: Tensor, *scalars: float) -> Tensor:
    if backend == "reference":
        out = autograd.in_reference(unary.rule, x, *scalars)
        return x.copy_(out) if inplace else out
    return (unary.inplace if inplace else unary.call)(backend, x, *scalars)


def sigmoid(input: Tensor, *, backend: str | None = None) -> Tensor:
    """Logistic function, `1 / (1 + exp(-x))`.

    Args:
        input: Any shape, strides and floating dtype.
        backend: Who computes; see `pydl.backends`.

    Returns:
        A tensor like `input`. Saves its output for backward.
    """
    chosen = choose("sigmoid", backend, input)
    return torch.sigmoid(input) if chosen == "torch" else _run(SIGMOID, chosen, False, input)


def tanh(input: Tensor, *, backend: str | None = None) -> Tensor:
    """Hyperbolic tangent, `(exp(x) - exp(-x)) / (exp(x) + exp(-x))`.

    Args:
        input: Any shape, strides and floating dtype.
        backend: Who computes; see `pydl.backends`.

    Returns:
        A tensor like `input`. Saves its output for backward.
    """
    chosen = choose("tanh", backend, input)
    return torch.tanh(input) if chosen == "torch" else _run(TANH, chosen, False, input)


def relu(input: Tensor, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """Rectified linear unit, `max(0, x)`.

    Args:
        input: Any shape, strides and floating dtype.
        inplace: Write the result over `input`.
        backend: Who computes; see `pydl.backends`.

    Returns:
        A tensor like `input`. Saves its output for backward, which the next layer keeps alive
        anyway.
    """
    chosen = choose("relu", backend, input)
    return F.relu(input, inplace) if chosen == "torch" else _run(RELU, chosen, inplace, input)


def leaky_relu(
    input: Tensor,
    negative_slope: float = 0.01,
    inplace: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Leaky rectified linear unit, `x if x > 0 else negative_slope * x`.

    Args:
        input: Any shape, strides and floating dtype.
        negative_slope: The slope where x <= 0.
        inplace: Write the result over `input`; unlike torch's, right for negative slopes too.
        backend: Who computes; see `pydl.backends`.

    Returns:
        A tensor like `input`. Saves its output for backward (its input where the slope is
        negative).
    """
    chosen = choose("leaky_relu", backend, input)
    if chosen == "torch":
        return F.leaky_relu(input, negative_slope, inplace)
    unary = LEAKY_RELU_OUT if negative_slope >= 0 else LEAKY_RELU
    return _run(unary, chosen, inplace, input, float(negative_slope))


def prelu(input: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """Leaky rectified linear unit with a learnt slope, `x if x > 0 else weight * x`.

    Args:
        input: Any shape, strides and floating dtype; channels are dimension 1.
        weight: One value, or one per channel; of the input's dtype.
        backend: Who computes; see `pydl.backends`.

    Returns:
        A tensor like `input`.

    Raises:
        RuntimeError: `weight` fits neither.

    Source: He et al. 2015, arXiv 1502.01852.
    """
    input, weight = _lowered(input, weight)
    chosen = choose("prelu", backend, input, weight)
    if chosen == "torch":
        return F.prelu(input, weight)
    _check_parameter("prelu", "weight", input, weight)
    if chosen == "reference":
        return autograd.in_reference(_PRELU, input, weight)
    return _prelu_call(chosen, input, weight)


def elu(
    input: Tensor, alpha: float = 1.0, inplace: bool = False, *, backend: str | None = None
) -> Tensor:
    """Exponential linear unit, `x if x > 0 else alpha * (exp(x) - 1)`.

    Args:
        input: Any shape, strides and floating dtype.
        alpha: The negative of the limit at minus infinity.
        inplace: Write the result over `input`.
        backend: Who computes; see `pydl.backends`.

    Returns:
        A tensor like `input`.

    Source: Clevert et al. 2016, arXiv 1511.07289.
    """
    chosen = choose("elu", backend, input)
    if chosen == "torch":
        return F.elu(input, alpha, inplace)
    return _run(ELU, chosen, inplace, input, float(alpha))


def selu(input: Tensor, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """Scaled exponential linear unit, `1.0507 * elu(x, 1.6733)` (the constants in full).

    Args:
        input: Any shape, strides and floating dtype.
        inplace: Write the result over `input`.
        backend: Who computes; see `pydl.backends`.

    Returns:
        A tensor like `input`.

    Source: Klambauer et al. 2017, arXiv 1706.02515.
    """
    chosen = choose("selu", backend, input)
    return F.selu(input, inplace) if chosen == "torch" else _run(SELU, chosen, inplace, input)


def gelu(input: Tensor, approximate: str = "none", *, backend: str | None = None) -> Tensor:
    """Gaussian error linear unit, `x * Phi(x)`, Phi the normal distribution function.

    Args:
        input: Any shape, strides and floating dtype.
        approximate: "none", or "tanh" for `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`.
        backend: Who computes; see `pydl.backends`.

    Returns:
        A tensor like `input`.

    Raises:
        RuntimeError: `approximate` is neither.

    Source: Hendrycks and Gimpel 2016, arXiv 1606.08415.
    """
    op = "gelu_tanh" if approximate == "tanh" else "gelu"
    chosen = choose(op, backend, input)
    if chosen == "torch":
        return F.gelu(input, approximate=approximate)
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"pydl: gelu: approximate is {approximate!r}, wants 'none' or 'tanh'")
    return _run(GELU_TANH if approximate == "tanh" else GELU, chosen, False, input)


def silu(input: Tensor, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """Sigmoid linear unit, `x * sigmoid(x)`.

    Args:
        input: Any shape, strides and floating dtype.
        inplace: Write the result over `input`.
        backend: Who computes; see `pydl.backends`.

    Returns:
        A tensor like `input`.

    Source: Elfwing et al. 2017, arXiv 1702.03118.
    """
    chosen = choose("silu", backend, input)
    return F.silu(input, inplace) if chosen == "torch" else _run(SILU, chosen, inplace, input)


def swish(input: Tensor, beta: float | Tensor = 1.0, *, backend: str | None = None) -> Tensor:
    """Swish, `x * sigmoid(beta * x)`.

    Args:
        input: Any shape, strides and floating dtype; channels are dimension 1.
        beta: A number, or a tensor of one value or of one per channel, which gets a gradient.
        backend: Who computes; see `pydl.backends`.

    Returns:
        A tensor like `input`.

    Raises:
        RuntimeError: `beta` is a tensor that fits neither.

    Source: Ramachandran et al. 2017, arXiv 1710.05941. torch has no such function; its `silu` is
        beta = 1.
    """
    if not isinstance(beta, Tensor):
        chosen = choose("swish", backend, input)
        if chosen == "torch":
            return F.silu(input) if beta == 1 else _swish(input, beta)
        return _run(SWISH, chosen, False, input, float(beta))
    input, beta = _lowered(input, beta)
    _check_parameter("swish", "beta", input, beta)
    chosen = choose("swish_learnt", backend, input, beta)
    if chosen == "torch":
        return _swish_learnt(input, beta).to(input.dtype)
    if chosen == "reference":
        return autograd.in_reference(_SWISH_LEARNT, input, beta)
    return _swish_learnt_call(chosen, input, beta)


def mish(input: Tensor, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """Mish, `x * tanh(log(1 + exp(x)))`.

    Args:
        input: Any shape, strides and floating dtype.
        inplace: Write the result over `input`.
        backend: Who computes; see `pydl.backends`.

    Returns:
        A tensor like `input`.

    Source: Misra 2019, arXiv 1908.08681.
    """
    chosen = choose("mish", backend, input)
    return F.mish(input, inplace) if chosen == "torch" else _run(MISH, chosen, inplace, input)


# Activations with a learnt parameter.


def _lowered(input: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast both in its dtype, as torch does for prelu."""
    kind = input.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or input.dtype not in FLOATS[:3]:
        return input, parameter
    dtype = torch.get_autocast_dtype(kind)
    return input.to(dtype), parameter.to(dtype)


def _check_parameter(op: str, name: str, x: Tensor, parameter: Tensor) -> None:
    if parameter.dtype != x.dtype:
        raise RuntimeError(
            f"pydl: {op}: {name} has dtype {parameter.dtype}, wants the input's, {x.dtype}"
        )
    if parameter.numel() == 1:
        return
    channels = x.shape[1] if x.dim() >= 2 else 1
    if parameter.dim() != 1 or parameter.numel() != channels:
        raise RuntimeError(
            f"pydl: {op}: {name} has shape {tuple(parameter.shape)}, wants 1 value or {channels} "
            f"(the channels, dimension 1 of an input of shape {tuple(x.shape)})"
        )


def _learnt(name: str, reference: Callable[..., Tensor]) -> Rule:
    fwd, bwd = f"{name}_fwd", f"{name}_bwd"

    def forward(backend: str, x: Tensor, parameter: Tensor) -> Tensor:
        y = empty_like(x)
        kernel(backend, fwd)(y, x, _per_channel(x, parameter).expand_as(x))
        return y

    def backward(backend: str, dy: Tensor, saved: tuple, scalars: tuple, needs: tuple) -> tuple:
        x, parameter = saved
        channels = Channels(x, 1 if parameter.numel() > 1 else None)
        x3 = channels.fold(x)
        dx = empty_like(x3)
        total, partials = sums(x3, parameter)
        flat = parameter.reshape(-1).contiguous()
        kernel(backend, bwd)(dx, total, partials, channels.fold(dy), x3, flat)
        return channels.unfold(dx), total.view(parameter.shape)

    return Rule(name, 2, forward, backward, reference)


_PRELU = _learnt("prelu", _prelu)
_SWISH_LEARNT = _learnt("swish_learnt", _swish_learnt)
_prelu_call = autograd.make(_PRELU)
_swish_learnt_call = autograd.make(_SWISH_LEARNT)

# The rows.

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
        yield Case("images, per channel", (make(3, 5, 67, 71), make(5, scale=0.5)))
        yield Case("columns, per channel", (make(700, 1037), make(1037, scale=0.5)))

    return draw


def bytes_of(*tensors: Tensor) -> int:
    """Bytes that reading or writing these once moves."""
    return sum(t.numel() * t.element_size() for t in tensors)


def _cost(case: Case) -> Cost:
    return Cost(2 * bytes_of(case.args[0]), 3 * bytes_of(case.args[0]))


BENCH_SHAPES = ((4096, 4096), (4096, 1024), (64, 1024), (1024,))


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
            cost=_cost,
            autocast=autocast,
        )
    )


def _gelu_reference(x: Tensor, approximate: str = "none") -> Tensor:
    return _gelu_tanh(x) if approximate == "tanh" else _gelu(x)


def _swish_reference(x: Tensor, beta: float | Tensor = 1.0) -> Tensor:
    return _swish_learnt(x, beta) if isinstance(beta, Tensor) else _swish(x, beta)


_row(sigmoid, _sigmoid, torch.sigmoid, _samples(()))
_row(tanh, _tanh, torch.tanh, _samples(()))
_row(relu, _relu, F.relu, _samples(()))
_row(leaky_relu, _leaky_relu, F.leaky_relu, _samples((), (0.2,), (-0.5,), (0.0,)))
_row(
    prelu, _prelu, F.prelu, _learnt_samples(),
    lambda make, shape: (make(1, scale=0.25),), autocast="lower",
)  # fmt: skip
_row(elu, _elu, F.elu, _samples((), (0.5,), (2.0,)))
_row(selu, _selu, F.selu, _samples(()))
_row(gelu, _gelu_reference, lambda x, approximate="none": F.gelu(x, approximate=approximate),
     _samples((), ("tanh",)))  # fmt: skip
_row(silu, _swish, F.silu, _samples(()))
_row(
    swish, _swish_reference, _swish_reference, _learnt_samples((1.0, 1.7, -0.6)),
    lambda make, shape: (1.5,), autocast="lower",
)  # fmt: skip
_row(mish, _mish, F.mish, _samples(()))
