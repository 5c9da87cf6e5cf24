"""The autograd nodes of ops, which csrc/differentiable.cpp makes: what torch's own nodes do."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.autograd.graph import saved_tensors_hooks

import pydl.functional as PF
from pydl.autograd import Rule, make
from pydl.table import Case, Op
from tests import harness


def _given(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), requires_grad=True)


def _doubling(**options: Any) -> Rule:
    """y = 2 x + b, and what its backward was given is what `seen` holds."""

    def forward(backend: str, x: Tensor, b: Tensor | None, *scalars: Any) -> Tensor:
        return 2 * x if b is None else 2 * x + b

    def backward(backend: str, dy: Tensor, saved: tuple, scalars: tuple, needs: tuple) -> tuple:
        options.setdefault("seen", []).append((backend, scalars, needs))
        if "error" in options:
            raise options["error"]
        return (2 * dy, dy if needs[1] else None)

    return Rule(
        "doubling", 2, forward, backward, lambda x, b, *_: 2 * x if b is None else 2 * x + b
    )


def test_names() -> None:
    """A node is called after its op, in graphs and in profiles, forward and backward."""
    x, weight = _given(4, 8), _given(8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = PF.layer_norm(x, [8], weight, backend="cpu")
        y.sum().backward()
    assert y.grad_fn is not None and y.grad_fn.name() == "LayerNormBackward"
    assert "grad_fn=<LayerNormBackward>" in repr(y)
    names = [event.name for event in profile.events() or []]
    assert "LayerNorm" in names and "LayerNormBackward" in names


def test_backward_twice() -> None:
    """A second backward needs retain_graph, and says so as torch does."""
    x = _given(8)
    y = PF.mish(x, backend="cpu").sum()
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


@pytest.mark.parametrize(
    "function", [PF.mish, PF.sigmoid]
)  # the one saves its input, the other its output
def test_saved_and_changed(function: Any) -> None:
    x = _given(8)
    inner = x * 1
    y = function(inner, backend="cpu")
    (inner if function is PF.mish else y).detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_saved_tensors_hooks() -> None:
    """They see what is saved, once each, and backward takes what they give back."""
    x, packed = _given(8), []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.detach().clone())
        return len(packed) - 1

    with saved_tensors_hooks(pack, lambda i: torch.zeros_like(packed[i])):
        y = PF.mish(x, backend="cpu")
    assert len(packed) == 1 and torch.equal(packed[0], x.detach())
    (got,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(got, torch.full_like(got, 0.6))  # the slope at 0


def test_errors_come_through() -> None:
    """An exception of forward, backward or a hook arrives as it was raised."""

    class Odd(Exception):
        pass

    x, error = _given(3), Odd("the same object")
    y = make(_doubling(error=error))("cpu", x, None)
    with pytest.raises(Odd) as caught:
        y.sum().backward()
    assert caught.value is error

    def refuse(tensor: Tensor) -> None:
        raise error

    with saved_tensors_hooks(refuse, refuse), pytest.raises(Odd):
        make(_doubling())("cpu", x, None)
    with pytest.raises(RuntimeError, match="pydl_cpu::mish_fwd: y is of dtype ComplexFloat"):
        from pydl.ops.activation import MISH

        MISH.call("cpu", torch.zeros(3, dtype=torch.complex64, requires_grad=True))


def test_what_backward_is_told() -> None:
    """Scalars of every kind come back as they were; needs is what this backward asks for."""
    seen: list[Any] = []
    scalars = (1, 2**70, 0.5, True, None, "tanh", (1, 2), torch.ones(2), [3])
    x, b = _given(3), _given(3)
    y = make(_doubling(seen=seen))("some backend", x, b, *scalars)
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    torch.autograd.grad(y.sum(), (x, b))
    (backend, given, first), (_, _, second) = seen
    assert backend == "some backend" and first == (True, False) and second == (True, True)
    assert [type(one) for one in given] == [type(one) for one in scalars]
    for one, wanted in zip(given, scalars, strict=True):
        assert torch.equal(one, wanted) if isinstance(wanted, Tensor) else one == wanted
    assert given[8] is scalars[8]


def test_hooks_and_retained_gradients() -> None:
    x = _given(4, 8)
    y = PF.layer_norm(x, [8], backend="cpu")
    y.retain_grad()
    calls: list[str] = []
    assert y.grad_fn is not None
    y.grad_fn.register_hook(lambda grads, dys: calls.append("after"))
    y.grad_fn.register_prehook(lambda dys: calls.append("before"))
    y.register_hook(lambda dy: 3 * dy)
    PF.silu(y, backend="cpu").sum().backward()
    assert calls == ["before", "after"] and y.grad is not None
    want = torch.nn.functional.layer_norm(x.detach().requires_grad_(), [8])
    torch.testing.assert_close(y.detach(), want.detach())


def test_long_chain() -> None:
    """Freeing a graph of many nodes does not run out of stack."""
    y = _given(1)
    for _ in range(20_000):
        y = PF.relu(y, backend="cpu")
    del y


def test_anomaly_mode() -> None:
    """It finds where forward was."""
    x = _given(3)
    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.warns(UserWarning, match="Doubling") as told,
    ):
        y = make(_doubling(error=ValueError("no")))("cpu", x, None)
        with pytest.raises(ValueError, match="no"):
            y.sum().backward()
    assert any("test_anomaly_mode" in str(one.message) for one in told)


@pytest.mark.parametrize("traced", [False, True])
def test_compiled_autograd(traced: bool) -> None:
    """A node takes part in torch's compiled backward pass, called as it is."""
    x, weight = _given(4, 8), _given(8)

    def gradients() -> list[Tensor]:
        y = PF.layer_norm(x, [8], weight, backend="cpu")
        PF.leaky_relu(PF.mish(y, backend="cpu"), 0.3, backend="cpu").sum().backward()
        found = [x.grad, weight.grad]
        x.grad = weight.grad = None
        return found  # type: ignore[return-value]

    want = gradients()
    compiled = compiled_autograd._enable(torch.compile(backend="eager", dynamic=False))
    with compiled if traced else nullcontext():
        for _ in range(2):
            assert all(map(torch.equal, gradients(), want))


def _family(op: Op) -> list[Case]:
    """A small call of an op, and one with dropout where it has that: a seed is a tensor."""
    cases = [c for c in op.cases(torch.float32) if 0 < harness.elements(c) < 5000]
    dropping = [c for c in cases if "dropout" in c.label and c.kwargs.get("seed") is not None]
    return [harness.plain(op), *dropping[:1]]


def _gradients(op: Op, case: Case) -> list[Tensor]:
    leaves = harness.leaves(case)
    outs = op.function(*harness.bind(case, leaves), backend="cpu", **case.kwargs)
    sum(out.sum() for out in harness.several(outs)).backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def test_compiled_autograd_of_ops(op: Op) -> None:
    """The nodes of every op take part, whatever their scalars are: numbers, dtypes, seeds."""
    for case in _family(op):
        want = _gradients(op, case)
        with compiled_autograd._enable(torch.compile(backend="eager", dynamic=False)):
            got = _gradients(op, case)
        assert want and all(map(torch.equal, got, want)), case.label
    torch._dynamo.reset()


def test_compiled_autograd_of_compiled_ops(op: Op) -> None:
    """So do compiled steps, of which torch traces the backward pass."""
    with torch._dynamo.config.patch(compiled_autograd=True):
        for case in _family(op):
            want = _gradients(op, case)
            step = torch.compile(lambda c=case: _gradients(op, c), backend="aot_eager")
            got = step()
            assert want and all(map(torch.equal, got, want)), case.label
            torch._dynamo.reset()


@pytest.mark.parametrize("create", [False, True])
def test_zero_tensors(op: Op, create: bool) -> None:
    """Of an upstream gradient without memory, as torch has them, the gradients are zeros."""
    case = harness.plain(op)
    leaves = harness.leaves(case)
    outs = harness.called(op.function, case, leaves, backend="cpu")
    zeros = [torch._efficientzerotensor(out.shape, dtype=out.dtype) for out in outs]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = torch.autograd.grad(outs, wanted, zeros, create_graph=create, allow_unused=True)
    for grad in found:
        assert grad is None or (not grad._is_zerotensor() and torch.equal(grad, 0 * grad))
