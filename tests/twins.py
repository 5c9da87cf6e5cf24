"""What the tests of attention modules share: pairs of twins, their inputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pydl.nn as P

BACKENDS: list[str | None] = [None, "reference", "cpu"]
EXACT = {"rtol": 1e-9, "atol": 1e-9}
N, L, S, E, H = 3, 5, 7, 12, 4
backends = pytest.mark.parametrize("asked", BACKENDS)


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, **EXACT)


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """(ours, torch's), of equal and not trivial parameters."""
    ours, theirs = (
        getattr(package, name)(*args, dtype=torch.float64, **kwargs) for package in (P, nn)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.5)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def random(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=grad)


def flowed(module: nn.Module, leaves: list[Tensor], outs: Any) -> list[Tensor | None]:
    """Outputs and the gradients of inputs and parameters."""
    outs = [out for out in (outs if isinstance(outs, tuple) else (outs,)) if out is not None]
    torch.manual_seed(5)
    loss = sum((out * torch.randn(out.shape, dtype=out.dtype)).sum() for out in outs)
    wanted = [*leaves, *module.parameters()]
    return [*outs, *torch.autograd.grad(loss, wanted, allow_unused=True)]


def padding(numbers: bool) -> Tensor:
    """One key hidden, or two, or numbers to add."""
    hidden = torch.zeros(N, S, dtype=torch.bool)
    hidden[1, 4:] = hidden[2, 0] = True
    return random(N, S, grad=False).masked_fill(hidden, -torch.inf) if numbers else hidden


def hiding(*shape: int) -> Tensor:
    torch.manual_seed(7)
    hidden = torch.rand(shape) > 0.6
    hidden[..., 3] = False
    return hidden
