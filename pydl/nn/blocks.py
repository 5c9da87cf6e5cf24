"""Residual, dense and highway blocks, put together from the modules of this package."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pydl.nn.activation import HasBackend
from pydl.nn.batch_norm import BatchNorm2d, BatchNormAct
from pydl.nn.gated import BiasAct
from pydl.nn.linear import Linear


class _Block(nn.Module):
    """A module of parts that compute; `backend`, when set, is that of all of them."""

    @property
    def backend(self) -> str | None:
        """Who computes in the first part; set it to say who computes in every one."""
        return next(p.backend for p in self.modules() if isinstance(p, HasBackend))

    @backend.setter
    def backend(self, name: str | None) -> None:
        for part in self.modules():
            if isinstance(part, HasBackend):
                part.backend = name


class _Parts(NamedTuple):
    """Makes what blocks consist of."""

    act: str
    act_param: float | None
    device: torch.device | str | None
    dtype: torch.dtype | None

    def conv(self, inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
        """A convolution next to a normalisation, which makes its bias useless."""
        return nn.Conv2d(
            inputs, outputs, size, stride, size // 2, bias=False, device=self.device,
            dtype=self.dtype,
        )  # fmt: skip

    def norm(self, channels: int) -> BatchNormAct:
        return BatchNormAct(
            channels, self.act, act_param=self.act_param, device=self.device, dtype=self.dtype
        )

    def shortcut(self, inputs: int, outputs: int, stride: int) -> nn.Module:
        """What the residual passes through: nothing where the shape stays."""
        if inputs == outputs and stride == 1:
            return nn.Identity()
        norm = BatchNorm2d(outputs, device=self.device, dtype=self.dtype)
        return nn.Sequential(self.conv(inputs, outputs, 1, stride), norm)


class StandardResBlock(_Block):
    """Residual block, `act(bn(conv3x3(act(bn(conv3x3(x))))) + shortcut(x))`.

    The shortcut is the identity, or a 1x1 convolution and batch normalisation where the shape
    changes.

    Args:
        in_channels: Channels that enter.
        out_channels: Channels that leave.
        stride: Of the first convolution and the shortcut.
        act: The activation: any that `pydl.functional.bias_act` has.
        act_param: The negative slope of leaky_relu, alpha of elu or beta of swish; None for their
            defaults.
        device: Where the parameters live.
        dtype: Their dtype.

    Shape: (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: `act` or `act_param` is not as above.

    Source: He et al. 2015, arXiv 1512.03385.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, act: str = "relu",
        act_param: float | None = None, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        parts, last = _Parts(act, act_param, device, dtype), out_channels
        self.conv1, self.bn1 = parts.conv(in_channels, last, 3, stride), parts.norm(last)
        self.conv2, self.bn2 = parts.conv(last, last, 3), parts.norm(last)
        self.shortcut = parts.shortcut(in_channels, last, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.bn1(self.conv1(x)))
        return self.bn2(y, self.shortcut(x).to(y.dtype))


class BottleneckBlock(_Block):
    """Residual block of three convolutions, the middle one of a quarter of the channels:
    `act(bn(conv1x1(act(bn(conv3x3(act(bn(conv1x1(x)))))))) + shortcut(x))`.

    The shortcut is the identity, or a 1x1 convolution and batch normalisation where the shape
    changes. The 3x3 convolution has the stride; in the paper the first 1x1 has it.

    Args:
        in_channels: Channels that enter.
        out_channels: Channels that leave, a multiple of `expansion`.
        stride: Of the 3x3 convolution and the shortcut.
        act: See `StandardResBlock`.
        expansion: How many times the channels of the 3x3 convolution leave.
        act_param: See `StandardResBlock`.
        device: Where the parameters live.
        dtype: Their dtype.

    Shape: (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: an argument is not as above.

    Source: He et al. 2015, arXiv 1512.03385.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, act: str = "relu",
        expansion: int = 4, act_param: float | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if expansion < 1:
            raise ValueError(f"pydl: BottleneckBlock: expansion is {expansion}, wants 1 or more")
        if out_channels % expansion:
            raise ValueError(
                f"pydl: BottleneckBlock: out_channels is {out_channels}, wants a multiple of "
                f"expansion, {expansion}"
            )
        parts = _Parts(act, act_param, device, dtype)
        inner, last = out_channels // expansion, out_channels
        self.conv1, self.bn1 = parts.conv(in_channels, inner, 1), parts.norm(inner)
        self.conv2, self.bn2 = parts.conv(inner, inner, 3, stride), parts.norm(inner)
        self.conv3, self.bn3 = parts.conv(inner, last, 1), parts.norm(last)
        self.shortcut = parts.shortcut(in_channels, last, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        return self.bn3(y, self.shortcut(x).to(y.dtype))


class PreActResBlock(_Block):
    """Residual block that normalises first: `conv3x3(act(bn(conv3x3(a)))) + shortcut`, with
    `a = act(bn(x))`.

    The shortcut is x, or a 1x1 convolution of a where the shape changes: normalised before, like
    all convolutions of the block.

    Args:
        in_channels: Channels that enter.
        out_channels: Channels that leave.
        stride: Of the first convolution and the shortcut.
        act: See `StandardResBlock`.
        act_param: See `StandardResBlock`.
        device: Where the parameters live.
        dtype: Their dtype.

    Shape: (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: `act` or `act_param` is not as above.

    Source: He et al. 2016, arXiv 1603.05027.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, act: str = "relu",
        act_param: float | None = None, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        parts, last = _Parts(act, act_param, device, dtype), out_channels
        self.bn1, self.conv1 = parts.norm(in_channels), parts.conv(in_channels, last, 3, stride)
        self.bn2, self.conv2 = parts.norm(last), parts.conv(last, last, 3)
        self.shortcut: nn.Conv2d | None = None
        if in_channels != last or stride != 1:
            self.shortcut = parts.conv(in_channels, last, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        a = self.bn1(x)
        residual = x if self.shortcut is None else self.shortcut(a)
        return self.conv2(self.bn2(self.conv1(a))) + residual


def _dense_layer(parts: _Parts, inputs: int, outputs: int, inner: int | None) -> nn.Sequential:
    """`conv3x3(act(bn(x)))`, after `conv1x1(act(bn(x)))` to `inner` channels where that is
    given."""
    first: list[nn.Module] = []
    if inner is not None:
        first = [parts.norm(inputs), parts.conv(inputs, inner, 1)]
        inputs = inner
    return nn.Sequential(*first, parts.norm(inputs), parts.conv(inputs, outputs, 3))


class DenseBlock(_Block):
    """Layers `conv3x3(act(bn(x)))` of which each sees the input and all outputs before it,
    concatenated; so does who comes after the block.

    Args:
        in_channels: Channels that enter.
        growth_rate: Channels that each layer adds.
        num_layers: How many layers.
        bn_size: Where it is given, `conv1x1(act(bn(x)))` to `bn_size * growth_rate` channels
            precedes each 3x3 convolution.
        act: See `StandardResBlock`.
        act_param: See `StandardResBlock`.
        device: Where the parameters live.
        dtype: Their dtype.

    Attributes:
        out_channels: Channels that leave: `in_channels + num_layers * growth_rate`.

    Shape: (N, in_channels, H, W) to (N, out_channels, H, W).

    Raises:
        ValueError: `act` or `act_param` is not as above, or `num_layers` is below 1.

    Source: Huang et al. 2016, arXiv 1608.06993.
    """

    def __init__(
        self, in_channels: int, growth_rate: int, num_layers: int, bn_size: int | None = None,
        act: str = "relu", act_param: float | None = None, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"pydl: DenseBlock: num_layers is {num_layers}, wants 1 or more")
        inner = None if bn_size is None else bn_size * growth_rate
        parts = _Parts(act, act_param, device, dtype)
        self.layers = nn.ModuleList(
            _dense_layer(parts, in_channels + i * growth_rate, growth_rate, inner)
            for i in range(num_layers)
        )
        self.out_channels = in_channels + num_layers * growth_rate

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat((x, layer(x)), 1)
        return x


class HighwayLayer(_Block):
    """Highway layer, `h * t + x * (1 - t)` with `h = act(A x + a)` and the gate
    `t = sigmoid(B x + b)`.

    Where the sizes differ, x in the sum is a learnt linear map of it. The gate's bias begins
    negative, so that the layer begins near to passing x through.

    Args:
        in_features: The size of the last dimension.
        out_features: That of the result; None for `in_features`.
        act: The activation: any that `pydl.functional.bias_act` has.
        gate_bias: What the gate's bias begins with, below 0.
        act_param: See `StandardResBlock`.
        device: Where the parameters live.
        dtype: Their dtype.

    Shape: (*, in_features) to (*, out_features).

    Raises:
        ValueError: `act`, `act_param` or `gate_bias` is not as above.

    Source: Srivastava et al. 2015, arXiv 1505.00387.
    """

    def __init__(
        self, in_features: int, out_features: int | None = None, act: str = "relu",
        gate_bias: float = -1.0, act_param: float | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not gate_bias < 0:
            raise ValueError(f"pydl: HighwayLayer: gate_bias is {gate_bias}, wants less than 0")
        size = in_features if out_features is None else out_features

        def linear() -> Linear:
            return Linear(in_features, size, bias=False, device=device, dtype=dtype)

        self.transform = linear()
        self.transform_act = BiasAct(size, act, act_param=act_param, device=device, dtype=dtype)
        self.gate = linear()
        self.gate_act = BiasAct(size, "sigmoid", device=device, dtype=dtype)
        nn.init.constant_(self.gate_act.bias, gate_bias)
        self.projection = linear() if size != in_features else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.transform_act(self.transform(x))
        t = self.gate_act(self.gate(x))
        return h * t + self.projection(x) * (1 - t)
