"""Kernels called past torch.ops: only where nothing but the kernel has to see the call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import pydl.functional as PF
from pydl import backends
from pydl.backends import kernel


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _numbers(n: int = 5) -> Tensor:
    return torch.linspace(-2, 2, n)


def test_is_the_operator() -> None:
    """To look at it is that operator, and the way past it is what is called."""
    direct, operator = kernel("cpu", "mish_fwd"), torch.ops.pydl_cpu.mish_fwd.default
    assert direct is not operator and backends._OPS["cpu", "mish_fwd"] is operator
    assert str(direct) == str(operator) and direct._schema == operator._schema
    x = _numbers()
    y, wanted = torch.empty_like(x), torch.empty_like(x)
    assert direct(y, x) is None and operator(wanted, x) is None
    assert torch.equal(y, wanted) and torch.allclose(y, torch.nn.functional.mish(x))


def test_modes_see_the_operator() -> None:
    x = _numbers().requires_grad_()
    with _Seen() as seen:
        PF.mish(x, backend="cpu").sum().backward()
    assert "pydl_cpu.mish_fwd.default" in seen.names and "pydl_cpu.mish_bwd.default" in seen.names
    given = x.detach()
    with FakeTensorMode() as mode:
        fake = PF.mish(mode.from_tensor(given), backend="cpu")
    assert fake.shape == x.shape and type(fake) is not Tensor
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda t: PF.silu(t, backend="cpu"))(x)
    assert "pydl_cpu.silu_fwd" in graph.code


def test_profiles_name_it() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        PF.mish(_numbers(), backend="cpu")
    assert "pydl_cpu::mish_fwd" in [event.name for event in profile.events() or []]


def test_views_that_stand_for_other_values() -> None:
    """A tensor that is to be negated, or tells where it lies by itself, is not read as it lies."""
    x = torch.complex(_numbers(), _numbers()).conj().imag
    assert x.is_neg()
    got = PF.mish(x, backend="cpu")
    assert torch.allclose(got, torch.nn.functional.mish(-_numbers()))


def test_wrong_calls_are_the_operators() -> None:
    """Arguments of another number or type raise what the operator raises."""
    direct, operator = kernel("cpu", "leaky_relu_fwd"), torch.ops.pydl_cpu.leaky_relu_fwd.default
    x = _numbers()
    for args in ((x.clone(), x), (x.clone(), x, "a"), (x.clone(), [1.0], 0.1), ()):
        with pytest.raises((RuntimeError, TypeError)) as wanted:
            operator(*args)
        with pytest.raises(wanted.type) as found:
            direct(*args)
        assert str(found.value) == str(wanted.value)
    direct(x.clone(), x, 1)  # an int for a float, as torch takes it
    y = torch.empty_like(x)
    direct(y, x, negative_slope=0.5)
    assert torch.equal(y, torch.nn.functional.leaky_relu(x, 0.5))


def test_inference_and_autocast() -> None:
    x = _numbers()
    with torch.inference_mode():
        y = PF.mish(x, backend="cpu")
    assert y.is_inference()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(PF.mish(x, backend="cpu"), y)
