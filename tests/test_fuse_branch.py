"""pydl.replace(fuse=True) in methods with branches, whose attributes may change afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuse_blocks import CHANNELS, HOOKS, Base, X, close, fuse, same

Settings = list[tuple[dict[str, Any], list[str]]]
"""What the attributes are set to, and what then is computed in one pass."""


class Switched(Base):
    """What the blocks below are made of, which may all be left out."""

    def __init__(self) -> None:
        super().__init__(nn.SiLU())
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.se: nn.Module | None = None
        self.wide = True


class Optional(Switched):
    """The normalisation and the activation each in a branch."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.bn1 is not None:
            x = self.bn1(x)
        if self.relu is not None:
            x = self.relu(x)
        return x


class Residual(Switched):
    """Steps that are mostly left out between a normalisation and what it is added to."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.bn1(self.conv1(x))
        x = F.leaky_relu(x, 0.1)
        x = self.conv2(x)
        x = self.bn2(x)
        if self.se is not None:
            x = self.se(x)
        x = self.spoils(x) if self.wide is None else x
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x = x + shortcut
        x = self.relu(self.drop(x)) if self.relu is not None else x
        return x


class Leaving(Switched):
    """Branches that leave the method; a sum in one."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        if self.wide:
            y = y + x
        elif self.se is not None:
            return self.se(x)
        if self.downsample is None:
            return torch.tanh(y)
        return self.relu(y) if self.relu is not None else x


class Other(Switched):
    """Another normalisation where the first is left out."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(x) if self.training and self.wide else self.drop(x)
        return torch.sigmoid(y) if self.se is None else y * 2


BLOCKS: list[tuple[type[Switched], Settings]] = [
    (Optional, [
        ({}, ["silu"]), ({"relu": None}, []), ({"bn1": None}, []), ({"relu": nn.Hardswish()}, []),
        ({"relu": None, "bn1": None}, []),
    ]),
    (Residual, [
        ({}, ["leaky_relu", "add silu"]), ({"se": nn.Tanh()}, ["leaky_relu"]),
        ({"wide": None}, ["leaky_relu"]), ({"relu": None}, ["leaky_relu"]),
        ({"downsample": nn.Conv2d(CHANNELS, CHANNELS, 1).double()}, ["leaky_relu", "add silu"]),
    ]),
    (Leaving, [
        ({}, ["add tanh"]), ({"wide": False}, []),
        ({"wide": False, "se": nn.Tanh()}, []), ({"downsample": nn.Identity()}, []),
        ({"downsample": nn.Identity(), "relu": None}, []),
    ]),
    (Other, [({}, ["sigmoid"]), ({"wide": False}, []), ({"se": nn.Tanh()}, [])]),
]  # fmt: skip
blocks = pytest.mark.parametrize("cls, settings", BLOCKS, ids=[cls.__name__ for cls, _ in BLOCKS])


def pair(cls: type[Switched]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = cls().double()
    fused = copy.deepcopy(plain)
    report = fuse(fused, backend="cpu")
    wanted = ["bn1", "bn2"] if cls is Residual else ["bn1"]
    assert [one.path for one in report.fused] == wanted
    return plain, fused


@blocks
def test_attributes_decide_when_it_runs(
    cls: type[Switched], settings: Settings, passes: list[str]
) -> None:
    for changes, ran in settings:
        plain, fused = pair(cls)
        for name, value in changes.items():
            setattr(plain, name, value)
            setattr(fused, name, copy.deepcopy(value))
        same(plain, fused, X)
        assert passes == ran * (1 if cls is Other else 2), changes
        passes.clear()
        again = copy.deepcopy(fused)
        close(again(X), fused(X))
        passes.clear()


@blocks
def test_compiles_in_one_graph(cls: type[Switched], settings: Settings) -> None:
    plain, fused = pair(cls)
    torch._dynamo.reset()
    close(torch.compile(fused, backend="eager", fullgraph=True)(X), plain(X))


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_see_what_they_should(hook: str, passes: list[str]) -> None:
    _, fused = pair(Residual)
    for name in ("bn2", "relu", "drop"):
        handle = HOOKS[hook](fused.get_submodule(name))
        fused(X.clone().requires_grad_()).sum().backward()
        assert passes == ["leaky_relu"]
        passes.clear()
        handle.remove()
    report = fuse(Residual())
    report.undo()
    assert type(report.model) is Residual


class Steps(nn.Module):
    """Linear layers and gates across branches."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)
        self.act: nn.Module | None = nn.GELU()
        self.last: nn.Module | None = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate(x))
        if self.act is not None:
            h = h * self.up(x)
        h = self.down(h)
        return self.last(h) if self.last is not None else h


def test_linear_layers_and_gates() -> None:
    plain = Steps().double()
    fused = copy.deepcopy(plain)
    report = fuse(fused, backend="cpu")
    assert {one.what for one in report.fused} == {"silu + multiply", "Linear + Tanh"}
    x = torch.randn(3, 8, dtype=torch.double)
    for changes in ({}, {"act": None}, {"last": None}):
        for name, value in changes.items():
            setattr(plain, name, value)
            setattr(fused, name, value)
        same(plain, fused, x)
