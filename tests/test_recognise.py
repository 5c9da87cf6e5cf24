"""Modules of transformers that pydl.replace knows by what they compute, not by their names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pydl
from pydl import recognise
from pydl.recognise import Recogniser, candidate
from tests import harness

WIDTH = 12


class Fake(nn.Module):
    """Stands for a class of the package."""

    __module__ = "transformers.activations"

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Clipped(Fake):
    __module__ = "transformers.activations"

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x).clamp(max=1e4)


class OtherGradient(Fake):
    __module__ = "transformers.activations"

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x.detach())


class Wide(Fake):
    """Of another dtype than its input."""

    __module__ = "transformers.activations"

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x.float())


class Trains(Fake):
    """Something else in training."""

    __module__ = "transformers.activations"

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x + torch.rand_like(x) if self.training else x)


class Norm(nn.Module):
    """An RMS norm with a twist."""

    __module__ = "transformers.fake"

    def __init__(self, twist: str = "") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))
        self.small, self.twist = 1e-6, twist

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        eps = 2e-6 if self.twist == "eps" else self.small
        y = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
        if self.twist == "coarse":
            y = y.half().float() if x.dtype == torch.bfloat16 else y.bfloat16().float()
        weight = self.weight.abs() if self.twist == "abs" else self.weight
        return weight * y.to(x.dtype)


@pytest.mark.parametrize("cls", [Clipped, OtherGradient, Wide, Trains])
def test_other_activations_are_not_taken_for_one(cls: type[nn.Module]) -> None:
    assert not isinstance(Recogniser()(Fake()), str)
    report = pydl.replace(nn.Sequential(cls()))
    assert not report.replaced and "computes" in report.skipped[0].why


@pytest.mark.parametrize("twist", ["eps", "coarse", "abs"])
def test_other_norms_are_not_taken_for_one(twist: str) -> None:
    find = Recogniser()
    assert not isinstance(find(Norm()), str)
    assert "computes what no function" in str(find(Norm(twist)))


def test_kernels_are_judged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    right = pydl.functional.silu

    def wrong(x: Tensor, *, backend: str | None = None) -> Tensor:
        return right(x, backend=backend) * (1 + 1e-3 * (backend == "cpu"))

    monkeypatch.setattr(pydl.functional, "silu", wrong)
    assert "computes what no function" in str(Recogniser()(Fake()))


def test_says_where_it_differs() -> None:
    class Bf16(Fake):
        __module__ = "transformers.activations"

        def forward(self, x: Tensor) -> Tensor:
            return x if x.dtype == torch.bfloat16 else nn.functional.silu(x)

    report = pydl.replace(nn.Sequential(Bf16()))
    assert "computes pydl.functional.silu(input), but not in bfloat16" in str(report)


def test_subclasses_are_left_alone_and_named() -> None:
    class Mine(Norm):
        __module__ = "mine"

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    class Same(Norm):
        __module__ = "mine"

    report = pydl.replace(nn.Sequential(Mine(), Same(), Norm()))
    assert [one.path for one in report.replaced] == ["2"]
    own, same = (one.why for one in report.skipped)
    assert own == "is a subclass of transformers.fake.Norm with a forward of its own"
    assert same == "is a subclass of transformers.fake.Norm"


def test_others_are_not_even_run() -> None:
    class Outside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("ran")

    class Parent(Fake):
        __module__ = "transformers.fake"

        def __init__(self) -> None:
            super().__init__()
            self.child = nn.Linear(2, 2)

    assert not candidate(Outside()) and not candidate(Parent())
    assert not pydl.replace(nn.Sequential(Outside(), Parent())).skipped
    done = harness.python(
        "import sys, torch, pydl; pydl.replace(torch.nn.Sequential(torch.nn.ReLU()));"
        "print('transformers' in sys.modules)"
    )
    assert done.stdout.strip() == "False"


def test_leaves_no_trace() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(Norm(), Fake(), Trains())
    before, weight = torch.get_rng_state(), model[0].weight.detach().clone()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert len(pydl.replace(model)) == 2
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model[0].weight, weight) and model[0].weight.grad is None
    meta = nn.Sequential(Norm().to("meta"))
    pydl.replace(meta, backend="cpu")
    assert meta(torch.empty(2, WIDTH, device="meta", dtype=torch.bfloat16)).is_meta


def test_modules_alike_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    acts = pytest.importorskip("transformers.activations", reason="transformers is missing")
    tried, real = [], recognise._recognise

    def counted(module: nn.Module) -> object:
        tried.append(module)
        return real(module)

    monkeypatch.setattr(recognise, "_recognise", counted)
    several = [acts.GELUActivation() for _ in range(5)]
    report = pydl.replace(nn.Sequential(*several, acts.NewGELUActivation()))
    assert len(report) == 6 and len(tried) == 2
