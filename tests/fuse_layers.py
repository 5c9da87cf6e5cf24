"""Layers of transformers in which steps can, and cannot, be one pass."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, INNER = 8, 12
gate_act = F.silu


class Parts(nn.Module):
    """What the layers below are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER, bias=False)
        self.down, self.mix = nn.Linear(INNER, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.act = nn.GELU()
        self.drop = nn.Identity()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH, eps=1e-5)
        self.norm3 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.cross: nn.Module | None = None
        self.spoils = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(INNER, INNER))


class PreNorm(Parts):
    """A sum that is normalised, kept as the next residual, and a branch that is not taken."""

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        attended = self.mix(self.norm1(x))
        x = attended + x
        if memory is not None:
            x = x * memory
        residual = x
        x = self.norm2(x)
        x = self.down(self.drop(self.act(self.up(x))))
        return residual + x


class Short(Parts):
    """All in two statements."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x))
        x = x + self.down(self.act(self.gate(self.norm2(x))) * self.up(x))
        return x


class Crossed(Parts):
    """A sum that one of two modules normalises, and a module that normalises one of two sums; a
    switch of the model's in place of the first normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = False

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = x + self.mix(x)
        if not self.first and memory is not None:
            residual = x
            x = self.norm1(x)
            x = self.mix(x * memory)
            x = residual + x
        residual = x
        y = self.norm3(x) if self.first else self.norm2(x)
        return residual + self.mix(y)


class PostNorm(Parts):
    """The normalised sum is all that goes on."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.mix(x) + x)
        inner = F.gelu(self.up(x), approximate="tanh")
        return self.norm2(x + self.down(inner))


class Gates(Parts):
    """Functions as gates: on the left, on the right, on both sides; of a tensor cut in two."""

    def forward(self, x: Tensor) -> Tensor:
        left = gate_act(self.gate(x)) * self.up(x)
        right = self.gate(x) * torch.sigmoid(left)
        both = torch.tanh(right) * F.leaky_relu(left, 0.2)
        first, second = both.chunk(2, -1)
        return self.mix(torch.cat((second * self.act(first), first), -1)[..., :WIDTH])


class TwoNames(Parts):
    """Each factor has a name before the product."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.act(self.gate(x))
        up = self.up(x)
        product = gate * up
        return self.down(product)


class Wrapping(nn.Module):
    """Every class below it gets another `forward` around its own, which knows itself."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        forward = cls.forward

        @functools.wraps(forward)
        def outer(self: Any, *args: Any) -> Tensor:
            assert type(self).forward is outer
            return forward(self, *args) * 2

        cls.forward = outer  # type: ignore[assignment]


class Wrapped(Parts, Wrapping):
    """Decorated as well."""

    @torch.enable_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.norm1(self.mix(x) + x)


# The pass that each takes, as `report.fused` tells.
LAYERS: list[tuple[type[Parts], list[str]]] = [
    (PreNorm, ["Linear + GELU", "add + RMSNorm"]),
    (Short, ["GELU + multiply", "add + RMSNorm"]),
    (Crossed, ["add + LayerNorm", "add + LayerNorm", "add + RMSNorm"]),
    (PostNorm, ["Linear + gelu_tanh", "add + LayerNorm", "add + RMSNorm"]),
    (Gates, [*["GELU + multiply"], *[f"{act} + multiply" for act in (
        "leaky_relu", "sigmoid", "silu", "tanh")]]),
    (TwoNames, ["GELU + multiply"]),
    (Wrapped, ["add + LayerNorm"]),
]  # fmt: skip


class UsedTwice(Parts):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.act(self.up(x))
        return self.down(gate * self.gate(x) + gate)


class Spoiled(Parts):
    """What is gated changes before the product, through a name that holds it."""

    def forward(self, x: Tensor) -> Tensor:
        inner = self.gate(x)
        gate = self.act(inner)
        return self.down(gate * self.spoils(inner))


class SpoiledByItsProducer(Parts):
    """What is gated is the very tensor that the other factor's module changes."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate(x)
        return self.down(self.act(self.drop(x)) * self.spoils(x))


class InPlace(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(x)
        y += x
        return self.norm1(y)


class RunsBetween(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(x) + x
        y.mul_(2)
        return self.norm1(y)


class RunsBefore(Parts):
    """The statement changes the sum before it normalises it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(x) + x
        return y.mul_(2) + self.norm1(y)


class Tested(Parts):
    """What decides the branch is not known before."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(x) + x
        if y.sum() > 0:
            y = y * 2
        return self.norm1(y)


class Rebound(Parts):
    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        y = self.mix(x) + x
        more = x
        if more is not None:
            y = y * 2
        return self.norm1(y)


class Uncertain(Parts):
    """What decides the branch is rebound before it, or has no value where the sum is computed."""

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        y = self.mix(x) + x
        more = x
        if more is not None:
            y = self.norm1(y)
        z = self.mix(x) + x
        return self.norm2(z) if x[0, 0, 0] > 1 else z


class OtherSums(Parts):
    """Not all that is normalised is a sum that is known."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(x) * x
        if self.cross is None:
            y = y + x
        x = self.norm1(y) + x
        x = x + y if self.cross is not None else x * y
        return self.norm2(x)


class NotAlways(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(x) + x
        return x + (y if self.cross is None else self.norm1(y))


class Twice(Parts):
    """One sum, normalised by two modules: the second is left to itself."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(x) + x
        return self.norm3(y) * self.norm2(y) + self.norm1(y)


# What must not be fused: the module, and a part of the reason where there is one to tell.
REFUSED: list[tuple[type[Parts], str, str | None]] = [
    (UsedTwice, "act", None),
    (Spoiled, "act", "what it is given"),
    (SpoiledByItsProducer, "act", "what it is given"),
    (InPlace, "norm1", None),
    (RunsBetween, "norm1", "between the sum"),
    (RunsBefore, "norm1", "between the sum"),
    (Tested, "norm1", "a branch"),
    (Rebound, "norm1", "a branch"),
    (Uncertain, "norm1", "a branch"),
    (Uncertain, "norm2", "a branch"),
    (OtherSums, "norm1", None),
    (OtherSums, "norm2", "a branch"),
    (NotAlways, "norm1", "not always"),
    (Twice, "norm1", "between the sum"),
]
