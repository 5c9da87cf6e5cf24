"""Elementwise activations, with `torch.nn.functional`'s names, arguments, defaults and errors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from pydl import autograd
from pydl.backends import FLOATS, choose
from pydl.ops import definitions
from pydl.ops.pointwise import learnt, run, unary
from pydl.traced import hand_over, proxied

SIGMOID = unary("sigmoid", definitions.sigmoid, definitions.sigmoid_slope)
TANH = unary("tanh", definitions.tanh, definitions.tanh_slope)
RELU = unary("relu", definitions.relu, definitions.relu_slope)
LEAKY_RELU = unary("leaky_relu", definitions.leaky_relu)
# Of a call in place the output is all there is; with a slope of 0 or more it has the input's sign.
LEAKY_RELU_OUT = unary("leaky_relu", definitions.leaky_relu, definitions.leaky_relu_slope)
ELU = unary("elu", definitions.elu)
SELU = unary("selu", definitions.selu)
GELU = unary("gelu", definitions.gelu)
GELU_TANH = unary("gelu_tanh", definitions.gelu_tanh)
SILU = unary("silu", definitions.swish)
SWISH = unary("swish", definitions.swish)
MISH = unary("mish", definitions.mish)


def sigmoid(input: Tensor, *, backend: str | None = None) -> Tensor:
    """Logistic function, `1 / (1 + exp(-x))`.

    Args:
        input: Any shape, strides and floating dtype.
        backend: Who computes; see `pydl.backends`.

    Returns:
        A tensor like `input`. Saves its output for backward.
    """
    if type(input) is not Tensor and proxied(input):
        return hand_over(sigmoid, locals())
    chosen = choose("sigmoid", backend, input)
    return torch.sigmoid(input) if chosen == "torch" else run(SIGMOID, chosen, False, input)


def tanh(input: Tensor, *, backend: str | None = None) -> Tensor:
    """Hyperbolic tangent, `(exp(x) - exp(-x)) / (exp(x) + exp(-x))`.

    Args:
        input: Any shape, strides and floating dtype.
        backend: Who computes; see `pydl.backends`.

    Returns:
        A tensor like `input`. Saves its output for backward.
    """
    if type(input) is not Tensor and proxied(input):
        return hand_over(tanh, locals())
    chosen = choose("tanh", backend, input)
    return torch.tanh(input) if chosen == "torch" else run(TANH, chosen, False, input)


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
    if type(input) is not Tensor and proxied(input):
        return hand_over(relu, locals())
    chosen = choose("relu", backend, input)
    return F.relu(input, inplace) if chosen == "torch" else run(RELU, chosen, inplace, input)


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
        A tensor like `input`. Saves its input for backward, as torch's, so that the output may be
        changed.
    """
    if type(input) is not Tensor and proxied(input):
        return hand_over(leaky_relu, locals())
    chosen = choose("leaky_relu", backend, input)
    if chosen == "torch":
        return F.leaky_relu(input, negative_slope, inplace)
    rule = LEAKY_RELU_OUT if inplace and negative_slope >= 0 else LEAKY_RELU
    return run(rule, chosen, inplace, input, float(negative_slope))


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
    if has_torch_function_variadic(input, weight) and proxied(input, weight):
        return hand_over(prelu, locals())
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
    if type(input) is not Tensor and proxied(input):
        return hand_over(elu, locals())
    chosen = choose("elu", backend, input)
    if chosen == "torch":
        return F.elu(input, alpha, inplace)
    return run(ELU, chosen, inplace, input, float(alpha))


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
    if type(input) is not Tensor and proxied(input):
        return hand_over(selu, locals())
    chosen = choose("selu", backend, input)
    return F.selu(input, inplace) if chosen == "torch" else run(SELU, chosen, inplace, input)


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
    if type(input) is not Tensor and proxied(input):
        return hand_over(gelu, locals())
    op = "gelu_tanh" if approximate == "tanh" else "gelu"
    chosen = choose(op, backend, input)
    if chosen == "torch":
        return F.gelu(input, approximate=approximate)
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"pydl: gelu: approximate is {approximate!r}, wants 'none' or 'tanh'")
    return run(GELU_TANH if approximate == "tanh" else GELU, chosen, False, input)


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
    if type(input) is not Tensor and proxied(input):
        return hand_over(silu, locals())
    chosen = choose("silu", backend, input)
    return F.silu(input, inplace) if chosen == "torch" else run(SILU, chosen, inplace, input)


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
        TypeError: `beta` is no number and no tensor.

    Source: Ramachandran et al. 2017, arXiv 1710.05941. torch has no such function; its `silu` is
        beta = 1.
    """
    if has_torch_function_variadic(input, beta) and proxied(input, beta):
        return hand_over(swish, locals())
    if not isinstance(beta, Tensor):
        if not (isinstance(beta, float | int) or hasattr(beta, "__float__")):
            raise TypeError(f"pydl: swish: beta is {beta!r}, wants a number or a Tensor")
        chosen = choose("swish", backend, input)
        if chosen == "torch":
            return F.silu(input) if beta == 1 else definitions.swish(input, beta)
        return run(SWISH, chosen, False, input, float(beta))
    input, beta = _lowered(input, beta)
    if not input.is_floating_point():
        raise RuntimeError(f"pydl: swish: input has dtype {input.dtype}, wants a floating one")
    _check_parameter("swish", "beta", input, beta)
    chosen = choose("swish_learnt", backend, input, beta)
    if chosen == "torch":
        return definitions.swish_learnt(input, beta).to(input.dtype)
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
    if type(input) is not Tensor and proxied(input):
        return hand_over(mish, locals())
    chosen = choose("mish", backend, input)
    return F.mish(input, inplace) if chosen == "torch" else run(MISH, chosen, inplace, input)


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


_PRELU = learnt("prelu", definitions.prelu)
_SWISH_LEARNT = learnt("swish_learnt", definitions.swish_learnt)
_prelu_call = autograd.make(_PRELU)
_swish_learnt_call = autograd.make(_SWISH_LEARNT)
