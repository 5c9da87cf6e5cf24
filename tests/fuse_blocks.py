"""Blocks of convolutions, batch normalisations and activations, and how two of them compare."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pydl

CHANNELS = 4
fuse = functools.partial(pydl.replace, fuse=True)


class Base(nn.Module):
    """What the blocks below are made of."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        for i in (1, 2, 3):
            setattr(self, f"conv{i}", nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(CHANNELS))
        self.relu = nn.ReLU(inplace=True) if act is None else act
        self.shortcut = nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS)
        )
        self.downsample: nn.Module | None = None
        self.drop = nn.Identity()
        self.spoils = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(CHANNELS, CHANNELS, 1))


class Basic(Base):
    """One activation module, called twice; the residual added in place."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class Bottleneck(Base):
    """Its work in another method, an identity in between, another name for the result."""

    def _forward(self, x: Tensor, scale: float) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.conv2(out)
        out = self.bn2(out)
        out = self.drop(out)
        out = self.relu(out)
        y = self.bn3(self.conv3(out))
        return self.relu(self.shortcut(x) + y) * scale

    def forward(self, x: Tensor, *, scale: float = 2.0) -> Tensor:
        return self._forward(x, scale)


class Functional(Base):
    """Functions and methods in place of modules; a residual that is computed late; a private name
    in a context."""

    def __init__(self) -> None:
        super().__init__()
        self.__norm = self.bn3
        del self.bn3

    def forward(self, x: Tensor, *, shift: float = 0.25) -> Tensor:
        out = F.leaky_relu(self.bn1(self.conv1(x)), 0.2, inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        out = F.gelu(out, approximate="tanh")
        if self.training:
            out = out + shift
        with torch.enable_grad():
            return (self.__norm(self.conv3(out)) + x).relu()


class PreAct(Base):
    """Both branches take the activated; the residual is added after the last convolution."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class Dense(nn.Module):
    """A layer that takes a tensor or all tensors before it, and drops some of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(CHANNELS)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(CHANNELS, 6, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, CHANNELS, 3, padding=1, bias=False)
        self.drop_rate = 0.0

    def squeeze(self, inputs: list[Tensor]) -> Tensor:
        return self.conv1(self.relu1(self.norm1(torch.cat(inputs, 1))))

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        seen = [input] if isinstance(input, Tensor) else input
        new = self.conv2(self.relu2(self.norm2(self.squeeze(seen))))
        if self.drop_rate > 0:
            new = F.dropout(new, self.drop_rate, self.training)
        return new


class Mobile(nn.Module):
    """An inverted residual; of its activations only SiLU is in the pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(CHANNELS, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.Hardswish(),
            nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU(inplace=True),
            nn.Conv2d(8, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS),
        )  # fmt: skip
        self.residual = True

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, CHANNELS, 3, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True)
        )
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(CHANNELS, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    basic = Basic()
    basic.downsample = copy.deepcopy(basic.shortcut)
    return Net(basic, Bottleneck(), Functional()).double()


X = torch.randn(4, CHANNELS, 6, 6, dtype=torch.double, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(4, 3, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(2))


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def same(plain: nn.Module, fused: nn.Module, x: Tensor, **kwargs: Any) -> None:
    """Output, gradients and buffers, in training and then in evaluation."""
    for training in (True, False):
        inputs = []
        for model in (plain, fused):
            model.train(training).zero_grad()
            inputs.append(x.clone().requires_grad_())
        expected, actual = plain(inputs[0], **kwargs), fused(inputs[1], **kwargs)
        close(actual, expected)
        weights = torch.linspace(-1, 1, expected.numel(), dtype=x.dtype).view_as(expected)
        for y in (expected, actual):
            (y * weights).sum().backward()
        close(inputs[1].grad, inputs[0].grad)
        for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
            close(a.grad, b.grad)
        for a, b in zip(fused.buffers(), plain.buffers(), strict=True):
            close(a, b)


class UsedTwice(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(x)
        return self.relu(out) + out


class UsedLater(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(x)
        y = F.relu(out)
        return y * out


class Alpha(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.add(self.bn1(x), x, alpha=2))


class IntoTheResidual(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out += self.bn1(x)
        return self.relu(out)


class Branch(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(x)
        if x.dim() == 4:
            out = self.relu(out)
        return out


class Renamed(Base):
    """What is added has a name of its own, which is not always bound."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(x)
        if self.training:
            total = out + x
        if self.training:
            out = self.relu(total)
        return out


class Tested(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(x)
        if out is not x:
            out = self.relu(out)
        return out


class Late(Base):
    """What has been added changes before the activation is called."""

    def forward(self, x: Tensor) -> Tensor:
        r = x * 1
        out = self.bn1(self.conv1(x))
        out += r
        late = self.spoils(r)
        out = self.relu(out)
        return out + late


class Spoiled(Base):
    """Without gradients this is fine: what is normalised changes only afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        out = self.bn1(x)
        out = out + self.spoils(x)
        return self.relu(out)


class SpoiledThroughAView(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        out = self.bn1(self.drop(x))
        x += 1
        return self.relu(out + x)


class Seen(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(x)
        look = lambda: out.sum()  # noqa: E731
        out = self.relu(out)
        return out + look()


class Twice(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.relu(self.bn1(x))))


class Caught(Base):
    def forward(self, x: Tensor) -> Tensor:
        try:
            out = self.bn1(x)
            out = self.relu(out)
        except RuntimeError:
            return x
        return out


class Suppressed(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = x
        with contextlib.suppress(RuntimeError):
            out = self.bn1(x)
            out += x[:, :3]
            out = self.relu(out)
        return out


class Other(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.hardswish(self.bn1(x))


class Concatenated(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(torch.cat([self.bn1(x), x], 1))


class Statistics(Base):
    """What is read is from before the batch if the normalisation waits for the activation."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(x)
        seen = self.bn1.running_mean[0] * 1
        return self.relu(out) + seen


class Given(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        one = self
        bias = one.conv1.weight[0, 0, 0, 0] * 2
        return self.relu(out) + bias


class Switched(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        flag = self.requires_grad_()
        out = self.relu(out)
        return out if flag else x


def kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that keeps what it is given where no one finds it."""
    calls = [function]

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return calls[0](*args)

    return call


class Decorated(Base):
    @kept
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(x))


class Listed(Base):
    def forward(self, x: Tensor) -> Tensor:
        for name in ("bn1", "relu"):
            x = getattr(self, name)(x)
        return x


class Method(Base):
    def activate(self, x: Tensor) -> Tensor:
        return x.relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.bn1(x))


# What is not fused, and a part of the reason.
REFUSED: list[tuple[type[Base], str]] = [
    (UsedTwice, "more than once"),
    (UsedLater, "more than once"),
    (Alpha, "torch.add follows it"),
    (IntoTheResidual, "in place"),
    (Branch, "no module's call"),
    (Renamed, "no activation"),
    (Tested, "into a branch"),
    (Late, "may change what is added"),
    (Spoiled, "what it is given"),
    (SpoiledThroughAView, "no module's call"),
    (Seen, "nested function"),
    (Twice, "more than once"),
    (Caught, "can be followed"),
    (Suppressed, "can be followed"),
    (Other, "F.hardswish follows it, which is no activation"),
    (Concatenated, "no activation"),
    (Statistics, "running statistics"),
    (Given, "the whole module"),
    (Switched, "no module"),
    (Decorated, "is decorated"),
    (Listed, "can be followed"),
    (Method, "activate follows it, which is no module"),
]

ACTIVATIONS: list[tuple[nn.Module, str]] = [
    (nn.ReLU(), "relu"), (nn.LeakyReLU(0.3), "leaky_relu"), (nn.ELU(0.7), "elu"),
    (nn.SELU(), "selu"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.SiLU(), "silu"),
    (nn.Mish(), "mish"), (nn.Sigmoid(), "sigmoid"), (nn.Tanh(), "tanh"),
]  # fmt: skip

HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(lambda m, x, y: None),
    "pre": lambda m: m.register_forward_pre_hook(lambda m, x: None),
    "backward": lambda m: m.register_full_backward_hook(lambda m, x, y: None),
    "backward pre": lambda m: m.register_full_backward_pre_hook(lambda m, y: None),
}
