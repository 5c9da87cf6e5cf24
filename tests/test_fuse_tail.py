"""An `nn.Sequential` that ends with a batch normalisation whose activation is in another module."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuse_blocks import CHANNELS, HOOKS, X, close, fuse, same


def conv(size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, size, padding=size // 2, bias=False)


def norm() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(CHANNELS)


class Plain(nn.Module):
    """A layer and its normalisation in one module, the activation in another's method."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.relu = nn.Sequential(conv(), norm()), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x))


class Video(nn.Module):
    """As torchvision's blocks for videos: the residual comes late, and in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(conv(), norm(), nn.ReLU(inplace=True))
        self.conv2 = nn.Sequential(conv(), norm())
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = nn.Sequential(conv(1), norm())

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.conv1(x)
        out = self.conv2(out)
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        out = self.relu(out)
        return out


class Layer(nn.Sequential):
    """A layer, its normalisation, and an activation or none."""

    def __init__(self, size: int, act: type[nn.Module] | None = nn.ReLU) -> None:
        super().__init__(conv(size), norm(), *([act()] if act is not None else []))


class Transform(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(OrderedDict(a=Layer(1), b=Layer(3), c=Layer(1, None)))


class RegNet(nn.Module):
    """As torchvision's blocks of RegNet: classes of their own, in each other."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.f, self.activation = Layer(1, None), Transform(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x) + self.f(x)
        return self.activation(x)


class DenseEnd(nn.Module):
    """As the end of torchvision's DenseNet: features named one by one, and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(OrderedDict(conv0=conv(), relu0=nn.ReLU(), conv1=conv()))
        self.features.add_module("norm5", norm())

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        out = F.relu(features, inplace=True)
        return F.adaptive_avg_pool2d(out, (1, 1)).flatten(1)


def nested() -> nn.Module:
    return nn.Sequential(nn.Sequential(conv(), norm()), nn.GELU(), nn.Sequential(Layer(3, None)))


CASES: list[tuple[Any, dict[str, str]]] = [
    (Plain, {"body.1": "BatchNorm2d + ReLU"}),
    (Video, {"conv1.1": "BatchNorm2d + ReLU", "conv2.1": "BatchNorm2d + add + ReLU"}),
    (RegNet, {"f.a.1": "BatchNorm2d + ReLU", "f.b.1": "BatchNorm2d + ReLU",
              "f.c.1": "BatchNorm2d + add + ReLU"}),
    (DenseEnd, {"features.norm5": "BatchNorm2d + relu"}),
    (nested, {"0.1": "BatchNorm2d + GELU"}),
]  # fmt: skip
cases = pytest.mark.parametrize("make, wanted", CASES, ids=lambda one: getattr(one, "__name__", ""))


def pair(make: Any) -> tuple[nn.Module, nn.Module, Any]:
    torch.manual_seed(0)
    plain = make().double()
    fused = copy.deepcopy(plain)
    return plain, fused, fuse(fused, backend="cpu")


@cases
def test_it_is_one_pass(make: Any, wanted: dict[str, str], passes: list[str]) -> None:
    plain, fused, report = pair(make)
    assert {one.path: one.what for one in report.fused} == wanted
    same(plain, fused, X)
    ways = sorted(("add " if "add" in one else "") + one.split()[-1].lower()
                  for one in wanted.values())  # fmt: skip
    assert sorted(passes) == sorted(2 * ways)
    made = pickle.loads(pickle.dumps(fused)) if make is not nested else copy.deepcopy(fused)
    close(made(X), fused(X))
    report.undo()
    assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]
    close(fused.eval()(X), plain.eval()(X))


@cases
def test_traces_see_every_module(make: Any, wanted: dict[str, str]) -> None:
    plain, fused, _ = pair(make)
    graph = torch.fx.symbolic_trace(fused)
    same(plain, graph, X)


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_the_container_are_called(hook: str) -> None:
    """Before and after `replace`; of the normalisation and of what runs before it too."""
    plain, fused, _ = pair(Plain)
    HOOKS[hook](plain.body)
    HOOKS[hook](fused.body)
    same(plain, fused, X)
    late = Plain().double()
    HOOKS[hook](late.body)
    assert not fuse(late, backend="cpu").fused
    seen: list[int] = []
    fused.body.register_forward_hook(lambda *_: seen.append(1))
    fused(X)
    assert seen == [1]


class Aliased(Plain):
    """What the normalisation is given is the input itself, which the shortcut changes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.spoils = nn.Sequential(nn.Identity(), norm()), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        return self.relu(self.body(x) + self.spoils(x))


class Twice(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x)) + self.relu(self.body(-x))


class Entered(Plain):
    """A normalisation that runs again before the activation, past the container."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(OrderedDict(conv=conv(), norm=norm()))

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        other = self.body.norm(x)
        return self.relu(out) + other


class Own(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class OwnForward(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.body = Own(conv(), norm())


class Shared(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.body

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x)) + self.again(x)


@pytest.mark.parametrize("make, why", [
    (Aliased, "may give it to others"), (Twice, "more than once"), (Entered, "may call it too"),
    (OwnForward, "can be followed"), (Shared, "several places"),
])  # fmt: skip
def test_what_is_not_fused(make: Any, why: str, passes: list[str]) -> None:
    plain, fused, report = pair(make)
    assert not report.fused and [why in one.why for one in report.unfused] == [True], report
    if make is Aliased:  # torch tells in the backward pass that the input has changed
        with torch.no_grad():
            close(fused(X), plain(X))
    else:
        same(plain, fused, X)
    assert not passes


def test_what_has_changed_since_runs_as_it_is(passes: list[str]) -> None:
    """Another container, a longer one, one with a forward on the instance: step by step."""
    plain, fused, _ = pair(Plain)
    for change in (
        lambda m: m.body.append(nn.Sigmoid()),
        lambda m: setattr(m, "body", nn.Sequential(nn.Identity(), m.body[1])),
        lambda m: setattr(m.body, "forward", lambda x: x * 3),
    ):
        change(plain), change(fused)
        same(plain, fused, X)
    assert not passes
