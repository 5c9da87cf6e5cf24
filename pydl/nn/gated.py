"""Modules for what comes after a matrix product: gated linear units, and bias with activation and
dropout."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function_variadic

from pydl import functional as F
from pydl.backends import choose
from pydl.nn.activation import HasBackend
from pydl.ops.bias_act import named
from pydl.ops.philox import check_rate
from pydl.traced import as_node, proxied


def _halves(name: str, input: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The two halves of a dimension, as views."""
    if input.dim() == 0:
        raise RuntimeError(f"pydl: {name}: input has no dimension, wants 1 or more")
    size = input.size(dim)
    if size % 2:
        raise RuntimeError(
            f"pydl: {name}: input has size {size} in dimension {dim}, wants an even size"
        )
    first, second = input.chunk(2, dim)
    return first, second


class GatedAct(HasBackend, nn.Module):
    """A gated linear unit, `act(gate) * up`, in one pass.

    Called with one tensor, it takes the first half of dimension `dim` for the gate and the second
    for up: the order of Llama's packed `gate_up` projection, and not that of `torch.nn.GLU`, whose
    gate is the second half. Called with two, `module(gate, up)`, it takes those.

    Args:
        act: The activation: any that `pydl.functional.bias_act` has.
        dim: The dimension that is halved.
        act_param: The negative slope of leaky_relu, alpha of elu or beta of swish; None for their
            defaults.

    Shape: `(*, 2n, *)` to `(*, n, *)`, or two tensors of one shape to the same.

    Raises:
        ValueError: `act` or `act_param` is not as above.
        RuntimeError: at the call, the size to halve is odd, or gate and up differ in shape or
            dtype.

    Source: Shazeer 2020, arXiv 2002.05202.
    """

    def __init__(self, act: str = "silu", dim: int = -1, *, act_param: float | None = None) -> None:
        super().__init__()
        named(type(self).__name__, act, act_param)
        self.act = act
        self.dim = dim
        self.act_param = act_param

    def forward(self, input: Tensor, up: Tensor | None = None) -> Tensor:
        if has_torch_function_variadic(input, up) and proxied(input, up):
            return as_node(self, locals())
        gate = input
        if up is None:
            gate, up = _halves(type(self).__name__, input, self.dim)
        return F.gated_act(gate, up, self.act, act_param=self.act_param, backend=self.backend)

    def extra_repr(self) -> str:
        param = "" if self.act_param is None else f", act_param={self.act_param}"
        return f"act={self.act!r}, dim={self.dim}{param}"


class _Named(GatedAct):
    """A gated linear unit whose activation is in its name."""

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class SwiGLU(_Named):
    """`silu(gate) * up`, gate the first half of dimension `dim` or the first of two arguments.

    See `GatedAct` for shapes and errors.

    Source: Shazeer 2020, arXiv 2002.05202.
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__("silu", dim)


class GEGLU(_Named):
    """`gelu(gate) * up`, gate the first half of dimension `dim` or the first of two arguments.

    See `GatedAct` for shapes and errors.

    Args:
        dim: The dimension that is halved.
        approximate: "none" or "tanh", as in `torch.nn.GELU`.

    Source: Shazeer 2020, arXiv 2002.05202.
    """

    def __init__(self, dim: int = -1, approximate: str = "none") -> None:
        if approximate not in ("none", "tanh"):
            raise ValueError(f"pydl: GEGLU: approximate is {approximate!r}, wants 'none' or 'tanh'")
        super().__init__("gelu" if approximate == "none" else "gelu_tanh", dim)
        self.approximate = approximate

    def extra_repr(self) -> str:
        return f"dim={self.dim}, approximate={self.approximate!r}"


class ReGLU(_Named):
    """`relu(gate) * up`, gate the first half of dimension `dim` or the first of two arguments.

    See `GatedAct` for shapes and errors.

    Source: Shazeer 2020, arXiv 2002.05202.
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__("relu", dim)


class MishGLU(_Named):
    """`mish(gate) * up`, gate the first half of dimension `dim` or the first of two arguments.

    See `GatedAct` for shapes and errors.
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__("mish", dim)


class GLU(HasBackend, nn.GLU):
    """Gated linear unit, `a * sigmoid(b)`, a the first half of dimension `dim`, b the second.

    Twin of `torch.nn.GLU`, so the gate is the second half; in `SwiGLU` and its kin it is the first.

    Args:
        dim: The dimension that is halved.

    Shape: `(*, 2n, *)` to `(*, n, *)`.

    Source: Dauphin et al. 2017, arXiv 1612.08083.
    """

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and proxied(input):
            return as_node(self, locals())
        # torch fuses this one, backward too, so it is the automatic choice until an op `glu` is
        # measured.
        if choose("glu", self.backend, input) == "torch":
            return super().forward(input)
        up, gate = _halves("GLU", input, self.dim)
        return F.gated_act(gate, up, "sigmoid", backend=self.backend)


class BiasAct(HasBackend, nn.Module):
    """Bias, activation and dropout in one pass, `dropout(act(x + bias))`; owns the bias.

    Follows a layer made with `bias=False`. Dropout acts in training only.

    Args:
        num_features: The length of the bias.
        act: The activation: any that `pydl.functional.bias_act` has.
        dropout_p: The probability of an element to be dropped.
        act_param: The negative slope of leaky_relu, alpha of elu or beta of swish; None for their
            defaults.
        dim: The bias' dimension: -1 after a linear layer, 1 after a convolution.
        device: Where the bias lives.
        dtype: The bias' dtype.

    Shape: any with `num_features` in dimension `dim`, to the same.

    Raises:
        ValueError: an argument is not as above.
        RuntimeError: at the call, the input does not fit the bias.
    """

    def __init__(
        self,
        num_features: int,
        act: str = "gelu",
        dropout_p: float = 0.0,
        *,
        act_param: float | None = None,
        dim: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        named("BiasAct", act, act_param)
        check_rate("BiasAct", dropout_p)
        if num_features < 0:
            raise ValueError(f"pydl: BiasAct: num_features is {num_features}, wants 0 or more")
        self.num_features = num_features
        self.act = act
        self.dropout_p = dropout_p
        self.act_param = act_param
        self.dim = dim
        self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the bias to zero."""
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and proxied(input):
            return as_node(self, locals())
        return F.bias_act(
            input,
            self.bias,
            self.act,
            self.dropout_p,
            self.training,
            act_param=self.act_param,
            dim=self.dim,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        param = "" if self.act_param is None else f", act_param={self.act_param}"
        text = f"{self.num_features}, act={self.act!r}, dropout_p={self.dropout_p}{param}"
        return f"{text}, dim={self.dim}"
