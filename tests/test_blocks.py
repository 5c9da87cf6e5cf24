"""Residual, dense and highway blocks, against compositions of torch.nn's modules."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pydl.nn as P
from pydl.nn.activation import HasBackend

BACKENDS: list[str | None] = [None, "reference", "cpu"]
Act = Callable[[], nn.Module]


class Sum(nn.Module):
    """after(branch(before(x)) + shortcut): of x, or of before(x) where `inside`."""

    def __init__(
        self, before: nn.Module, branch: nn.Module, shortcut: nn.Module, after: nn.Module,
        inside: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.before, self.branch, self.shortcut, self.after = before, branch, shortcut, after
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        a = self.before(x)
        return self.after(self.branch(a) + self.shortcut(a if self.inside else x))


class Grown(nn.Module):
    """Layers that see all before them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for layer in self.layers:
            seen.append(layer(torch.cat(seen, 1)))
        return torch.cat(seen, 1)


class Gated(nn.Module):
    """A highway layer."""

    def __init__(self, inputs: int, outputs: int, act: nn.Module) -> None:
        super().__init__()
        self.h, self.t = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)
        self.p = nn.Linear(inputs, outputs, bias=False) if inputs != outputs else nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        t = torch.sigmoid(self.t(x))
        return t * self.act(self.h(x)) + (1 - t) * self.p(x)


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, (size - 1) // 2, bias=False)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


def standard(i: int, o: int, stride: int, act: Act) -> nn.Module:
    branch = nn.Sequential(
        conv(i, o, 3, stride), nn.BatchNorm2d(o), act(), conv(o, o, 3), nn.BatchNorm2d(o)
    )
    return Sum(nn.Identity(), branch, shortcut(i, o, stride), act())


def bottleneck(i: int, o: int, stride: int, act: Act) -> nn.Module:
    m = o // 4
    branch = nn.Sequential(
        conv(i, m, 1), nn.BatchNorm2d(m), act(), conv(m, m, 3, stride), nn.BatchNorm2d(m), act(),
        conv(m, o, 1), nn.BatchNorm2d(o),
    )  # fmt: skip
    return Sum(nn.Identity(), branch, shortcut(i, o, stride), act())


def pre_act(i: int, o: int, stride: int, act: Act) -> nn.Module:
    branch = nn.Sequential(conv(i, o, 3, stride), nn.BatchNorm2d(o), act(), conv(o, o, 3))
    before, changes = nn.Sequential(nn.BatchNorm2d(i), act()), i != o or stride != 1
    projection = conv(i, o, 1, stride) if changes else nn.Identity()
    return Sum(before, branch, projection, nn.Identity(), inside=changes)


def dense(i: int, growth: int, layers: int, size: int | None, act: Act) -> nn.Module:
    made = []
    for n in range(i, i + layers * growth, growth):
        first = [nn.BatchNorm2d(n), act(), conv(n, size * growth, 1)] if size else []
        m = size * growth if size else n
        made.append(nn.Sequential(*first, nn.BatchNorm2d(m), act(), conv(m, growth, 3)))
    return Grown(*made)


IMAGE = (3, 8, 7, 6)
# Name, arguments, what torch composes instead, the input's shape, the output's.
BLOCKS: list[tuple[str, tuple, Callable[..., nn.Module], tuple[int, ...], tuple[int, ...]]] = [
    ("StandardResBlock", (8, 8, 1), standard, IMAGE, IMAGE),
    ("StandardResBlock", (8, 12, 1), standard, IMAGE, (3, 12, 7, 6)),
    ("StandardResBlock", (8, 8, 2), standard, IMAGE, (3, 8, 4, 3)),
    ("BottleneckBlock", (8, 8, 1), bottleneck, IMAGE, IMAGE),
    ("BottleneckBlock", (8, 16, 2), bottleneck, IMAGE, (3, 16, 4, 3)),
    ("PreActResBlock", (8, 8, 1), pre_act, IMAGE, IMAGE),
    ("PreActResBlock", (8, 8, 2), pre_act, IMAGE, (3, 8, 4, 3)),
    ("PreActResBlock", (8, 12, 1), pre_act, IMAGE, (3, 12, 7, 6)),
    ("DenseBlock", (8, 5, 3, None), dense, IMAGE, (3, 23, 7, 6)),
    ("DenseBlock", (8, 5, 2, 4), dense, IMAGE, (3, 18, 7, 6)),
    ("HighwayLayer", (8, 8), lambda i, o, act: Gated(i, o, act()), (3, 4, 8), (3, 4, 8)),
    ("HighwayLayer", (8, 5), lambda i, o, act: Gated(i, o, act()), (6, 8), (6, 5)),
]
blocks = pytest.mark.parametrize(
    "name, args, compose, entering, leaving", BLOCKS, ids=[f"{b[0]}{b[1]}" for b in BLOCKS]
)
ACTS: dict[str, Act] = {"relu": nn.ReLU, "elu": lambda: nn.ELU(0.5)}


def copied(ours: nn.Module, theirs: nn.Module) -> None:
    """Draws our parameters and gives them to torch's: each convolution, normalisation and linear
    map to its like, in order."""
    for parameter in ours.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)

    def kinds(module: nn.Module) -> list[nn.Module]:
        return [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]

    def norms(module: nn.Module) -> list[nn.Module]:
        return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    biases = iter(m.bias for m in ours.modules() if isinstance(m, P.BiasAct))
    for a, b in zip(kinds(ours), kinds(theirs), strict=True):
        state = dict(a.state_dict())
        if b.bias is not None:
            state["bias"] = next(biases).detach()
        b.load_state_dict(state)
    for a, b in zip(norms(ours), norms(theirs), strict=True):
        b.load_state_dict(a.state_dict())


def sums(module: nn.Module) -> list[float]:
    """What its gradients and buffers add up to, by size: the order of modules may differ."""
    gradients = [p.grad.square().sum().item() for p in module.parameters() if p.grad is not None]
    assert len(gradients) == len(list(module.parameters()))
    return sorted([*gradients, *(b.double().square().sum().item() for b in module.buffers())])


@pytest.mark.parametrize("asked, act", [*((b, "relu") for b in BACKENDS), (None, "elu")])
@blocks
def test_equals_torchs_composition(
    name: str, args: tuple, compose: Any, entering: tuple, leaving: tuple, asked: str | None,
    act: str,
) -> None:  # fmt: skip
    """Output, all gradients and all buffers, after training and in evaluation."""
    torch.manual_seed(0)
    param = 0.5 if act == "elu" else None
    ours = getattr(P, name)(*args, act=act, act_param=param).double()
    theirs = compose(*args, ACTS[act]).double()
    copied(ours, theirs)
    ours.backend = asked
    for training in (True, True, False):
        for module in (ours, theirs):
            module.train(training)
        x, dy = (torch.randn(shape, dtype=torch.float64) for shape in (entering, leaving))
        found = []
        for module in (ours, theirs):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.backward(dy)
            found.append([y, leaf.grad])
        assert found[0][0].shape == leaving
        torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
        assert sums(ours) == pytest.approx(sums(theirs), rel=1e-8, abs=1e-12)


@blocks
def test_parts(name: str, args: tuple, compose: Any, entering: tuple, leaving: tuple) -> None:
    """Every parameter learns; `backend` reaches every part; copies are equal."""
    torch.manual_seed(0)
    block = getattr(P, name)(*args, act="gelu")
    assert sum(p.numel() for p in block.parameters()) == sum(
        p.numel() for p in compose(*args, nn.GELU).parameters()
    )
    x = torch.randn(entering)
    block(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in block.parameters())
    assert block.backend is None
    block.backend = "reference"
    parts = [m for m in block.modules() if isinstance(m, HasBackend)]
    assert parts and {p.backend for p in parts} == {"reference"} == {block.backend}
    for made in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert repr(made) == repr(block) and made.backend == "reference"
        torch.testing.assert_close(made.eval()(x), copy.deepcopy(block).eval()(x))
    block.backend = "nobody"
    with pytest.raises(ValueError, match="nobody"):
        block(x)


@pytest.mark.parametrize("asked", BACKENDS)
@blocks
def test_autocast(
    name: str, args: tuple, compose: Any, entering: tuple, leaving: tuple, asked: str | None
) -> None:
    """A residual in fp32 joins a branch in bf16."""
    torch.manual_seed(0)
    block, x = getattr(P, name)(*args), torch.randn(entering)
    block.backend = asked
    wanted = copy.deepcopy(block)(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(block(x).float(), wanted, rtol=0.05, atol=0.05)


def test_a_highway_begins_open() -> None:
    """The gate's bias is negative: most of the input passes."""
    layer = P.HighwayLayer(64, gate_bias=-6.0)
    x = torch.randn(8, 64)
    torch.testing.assert_close(layer(x), x, rtol=0, atol=0.1)
    assert not isinstance(layer.projection, nn.Linear)
    assert torch.all(P.HighwayLayer(4).gate_act.bias < 0)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: P.BottleneckBlock(8, 10), "multiple of expansion"),
        (lambda: P.DenseBlock(8, 4, 0), "num_layers is 0"),
        (lambda: P.HighwayLayer(8, gate_bias=0.0), "gate_bias is 0.0"),
        (lambda: P.StandardResBlock(8, 8, act="nothing"), "'nothing'"),
        (lambda: P.PreActResBlock(8, 8, act_param=2.0), "act_param is 2.0"),
    ],
)
def test_errors(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
