"""pydl.replace(fuse=True) where a method changes in place what the pass would keep for backward."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuse_blocks import Base, X, fuse, same


class Changed(Base):
    def forward(self, x: Tensor) -> Tensor:
        r = x * 1
        y = F.relu(self.bn1(self.conv1(x)) + r)
        r.mul_(2)
        return y + r


class Added(Base):
    """By an operator, through another name and a view."""

    def forward(self, x: Tensor) -> Tensor:
        r = x * 1
        view = r.view(-1) if self.training else r.flatten()
        out = self.bn1(self.conv1(x))
        out += r
        out = self.relu(out)
        view += 1
        return out * r


class Assigned(Base):
    def forward(self, x: Tensor) -> Tensor:
        first, second = x * 1, x * 2
        y = F.relu(first + self.bn1(self.conv1(x)))
        if self.training:
            first[0] = 0.0
        return y + first + second


class ByAModule(Base):
    def forward(self, x: Tensor) -> Tensor:
        r = self.drop(x * 1)
        y = self.relu(self.bn1(self.conv1(x)) + r)
        return y + self.spoils(r)


class ByAFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        r = x * 1
        return torch.tanh(self.bn1(self.conv1(x)) + r) + F.dropout(r, 0.0, inplace=True)


class ByOut(Base):
    def forward(self, x: Tensor) -> Tensor:
        r = x * 1
        y = F.relu(self.bn1(self.conv1(x)) + r)
        with torch.no_grad():
            torch.add(y, 1, out=r.detach())
        return y + r


class InALoop(Base):
    """What comes before the pass in one round comes after it of the round before."""

    def forward(self, x: Tensor) -> Tensor:
        r, y = x * 1, x
        for i in range(2):
            if i:
                r.add_(1)
            y = F.relu(self.bn1(self.conv1(y)) + r)
        return y


class AtASequentialsEnd(Base):
    def forward(self, x: Tensor) -> Tensor:
        r = x * 1
        y = F.relu(self.shortcut(x) + r)
        r.mul_(2)
        return y + r


class Gated(Base):
    """A relu keeps its output, a pass with the product the input."""

    def forward(self, x: Tensor) -> Tensor:
        u = self.conv2(x)
        g = self.conv1(x)
        y = F.relu(g) * u
        g.zero_()
        return y + g


class Untouched(Base):
    """Changes before the pass, of names bound anew since, of copies, of the result."""

    def forward(self, x: Tensor) -> Tensor:
        r = x * 1
        r.mul_(2)
        y = self.relu(self.bn1(self.conv1(x)) + r)
        s = self.conv2(r) + 0
        s.requires_grad_().sum()
        s += 1
        r = r + s
        r.add_(1)
        for _ in range(2):
            z = r * 1
            z.mul_(0.5)
            y = F.relu(self.bn2(self.conv2(y)) + z)
        n = 0
        n += 1
        return y + n


CHANGING = [Changed, Added, Assigned, ByAModule, ByAFunction, ByOut, InALoop]


@pytest.mark.parametrize(
    "cls, where", [*((cls, "bn1") for cls in CHANGING), (AtASequentialsEnd, "shortcut.1")]
)
def test_residuals_that_change(cls: type[Base], where: str) -> None:
    plain = cls().double()
    fused = copy.deepcopy(plain)
    report = fuse(fused, backend="cpu")
    assert not report.fused
    why = {one.path: one.why for one in report.unfused}
    assert "what is added to it is changed in place afterwards" in why[where]
    same(plain, fused, X)


def test_inputs_of_a_gate_that_change() -> None:
    plain = Gated().double()
    fused = copy.deepcopy(plain)
    assert not fuse(fused, backend="cpu").fused
    same(plain, fused, X)


def test_a_module_in_the_gates_place() -> None:
    class Module(Base):
        def forward(self, x: Tensor) -> Tensor:
            g, u = self.conv1(x), self.conv2(x)
            y = self.relu(g) * u
            g.detach().zero_()
            return y

    plain = Module(nn.ReLU()).double()
    fused = copy.deepcopy(plain)
    report = fuse(fused, backend="cpu")
    assert not report.fused
    assert ["its input is changed in place" in one.why for one in report.unfused
            if one.path == "relu"] == [True]  # fmt: skip
    same(plain, fused, X)


def test_what_does_not_change_is_fused() -> None:
    plain = Untouched().double()
    fused = copy.deepcopy(plain)
    assert [one.path for one in fuse(fused, backend="cpu").fused] == ["bn1", "bn2"]
    same(plain, fused, X)
