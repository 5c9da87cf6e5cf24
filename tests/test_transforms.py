"""torch.func and forward-mode differentiation: as torch's, op by op."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.autograd import forward_ad

from pydl.backends import takes
from pydl.table import Case, Op
from tests import harness

Transform = Callable[..., torch.Tensor]


def _calls(op: Op, backend: str, dtype: torch.dtype = torch.float32, most: int = 400) -> list[Case]:
    """The row's small samples: any number of dimensions, all further arguments, each layout."""
    return [
        case for case in op.cases(dtype, harness.device(backend))
        if harness.moderate(case, most) and case.args[0].numel()
    ]  # fmt: skip


def _function(function: Callable, case: Case, **options: object) -> Callable[..., torch.Tensor]:
    """The call as a function of its tensors, with several outputs joined."""
    return lambda *given: harness.joined(
        function(*harness.bind(case, given), **case.kwargs, **options)
    )


def _compared(
    op: Op, backend: str, transform: Callable, most: int = 400, right: Callable | None = None
) -> list[str]:
    """Complaints where `transform(function, case)` of the op is not that of native PyTorch, or of
    what is right.

    In fp64 where the backend has it, so that rounding cannot hide a wrong derivative.
    """
    right = right or harness.smooth(op)
    wide = takes(backend, torch.float64)
    dtype, close = (torch.float64, 1e-11) if wide else (torch.float32, 2e-5)
    complaints = []
    for case in _calls(op, backend, dtype, most):
        try:
            got = transform(_function(op.function, case, backend=backend), case)
        except Exception as error:
            complaints.append(f"{case.label}: {type(error).__name__}: {str(error)[:200]}")
            continue
        for i, (a, b) in enumerate(zip(got, transform(_function(right, case), case), strict=True)):
            if a.shape != b.shape or a.dtype != b.dtype:
                complaints.append(f"{case.label}: result {i} is {a.dtype} {tuple(a.shape)}")
            elif a.numel() and (error := (a - b).abs().max() / b.abs().max().clamp(min=1)) > close:
                complaints.append(f"{case.label}: result {i} is off by {float(error):.1e}")
    return complaints


def _batches(case: Case, size: int = 3) -> list[torch.Tensor]:
    return [torch.stack([t * (1 + 0.25 * i) for i in range(size)]) for t in case.tensors()]


def _vmap(function: Callable, case: Case) -> list[torch.Tensor]:
    every = _batches(case)
    found = [torch.func.vmap(function)(*every)]
    # A batch of the first alone, along its last dimension; and of the others alone.
    moved = every[0].movedim(0, -1)
    rest = case.tensors()[1:]
    found.append(torch.func.vmap(function, (-1, *(None for _ in rest)))(moved, *rest))
    if rest:
        dims = (None, *(0 for _ in rest))
        found.append(torch.func.vmap(function, dims)(case.args[0], *every[1:]))
    return found


def test_vmap(op: Op, backend: str) -> None:
    """A batch of calls is the calls of a batch, whichever arguments have it."""
    assert not (found := _compared(op, backend, _vmap)), harness.summary(found)


def test_vmap_equals_a_loop(op: Op) -> None:
    """vmap, which the definition computes, gives what a loop over kernels gives."""
    for case in _calls(op, "cpu"):
        function = _function(op.function, case, backend="cpu")
        every = _batches(case)
        loop = torch.stack([function(*one) for one in zip(*every, strict=True)])
        torch.testing.assert_close(torch.func.vmap(function)(*every), loop, msg=case.label)


def _grads(function: Callable, case: Case) -> list[torch.Tensor]:
    every = tuple(range(len(case.tensors())))
    loss = lambda *given: function(*given).square().sum()  # noqa: E731
    return [*torch.func.grad(loss, argnums=every)(*case.tensors())]


def test_grad(op: Op, backend: str) -> None:
    """torch.func.grad by every tensor."""
    assert not (found := _compared(op, backend, _grads)), harness.summary(found)


def _per_sample(function: Callable, case: Case) -> list[torch.Tensor]:
    every = tuple(range(len(case.tensors())))
    loss = lambda *given: function(*given).square().sum()  # noqa: E731
    return [*torch.func.vmap(torch.func.grad(loss, argnums=every))(*_batches(case))]


def test_per_sample_gradients(op: Op, backend: str) -> None:
    """vmap of grad, as differential privacy uses it."""
    assert not (found := _compared(op, backend, _per_sample)), harness.summary(found)


def _jacobian(which: Callable) -> Callable:
    def transform(function: Callable, case: Case) -> list[torch.Tensor]:
        every = tuple(range(len(case.tensors())))
        return [*which(function, argnums=every)(*case.tensors())]

    return transform


@pytest.mark.parametrize("which", [torch.func.jacrev, torch.func.jacfwd])
def test_jacobians(op: Op, backend: str, which: Callable) -> None:
    """Jacobians by rows and by columns."""
    found = _compared(op, backend, _jacobian(which), most=40)
    assert not found, harness.summary(found)


def _hessian(function: Callable, case: Case) -> list[torch.Tensor]:
    every = tuple(range(len(case.tensors())))
    loss = lambda *given: function(*given).square().sum()  # noqa: E731
    rows = torch.func.hessian(loss, argnums=every)(*case.tensors())
    return [block for row in rows for block in row]


def test_hessian(op: Op, backend: str) -> None:
    """Forward over reverse.

    torch's layer_norm takes mean and scale for constants in what its weight's gradient depends on:
    its Hessian is not symmetric, and the definition's is right.
    """
    right = op.reference if op.name in ("layer_norm", "add_layer_norm") else None
    found = _compared(op, backend, _hessian, most=40, right=right)
    assert not found, harness.summary(found)


def _pushed(function: Callable, case: Case) -> list[torch.Tensor]:
    tangents = tuple(torch.cos(t) for t in case.tensors())
    return [*torch.func.jvp(function, tuple(case.tensors()), tangents)]


def test_jvp(op: Op, backend: str) -> None:
    """A value and its directional derivative."""
    assert not (found := _compared(op, backend, _pushed)), harness.summary(found)


def _dual(function: Callable, case: Case) -> list[torch.Tensor]:
    """Tangents of all tensors, then of each alone."""
    found = []
    tensors = case.tensors()
    for chosen in (range(len(tensors)), *([i] for i in range(len(tensors)))):
        with forward_ad.dual_level():
            given = [
                forward_ad.make_dual(t, torch.cos(t)) if i in chosen else t
                for i, t in enumerate(tensors)
            ]
            value, tangent = forward_ad.unpack_dual(function(*given))
            found += [value, tangent]
    return found


def test_dual_numbers(op: Op, backend: str) -> None:
    """Forward-mode differentiation without functorch."""
    assert not (found := _compared(op, backend, _dual)), harness.summary(found)


def test_dual_numbers_with_a_graph(op: Op, backend: str) -> None:
    """Backward still works where tangents are carried as well."""
    for case in _calls(op, backend, most=100):
        wanted = harness.run(harness.on(op, backend), case, torch.float32)
        with forward_ad.dual_level():
            given = harness.leaves(case)
            duals = [forward_ad.make_dual(t, torch.cos(t)) for t in given]
            outs = harness.called(op.function, case, duals, backend=backend)
            unpacked = [forward_ad.unpack_dual(out) for out in outs]
            assert all(tangent is not None for _, tangent in unpacked)
            primals = [primal for primal, _ in unpacked]
            grads = torch.autograd.grad(primals, given, harness.upstreams(primals, torch.float32))
        for a, b in zip([*(p.detach() for p in primals), *grads], wanted, strict=True):
            torch.testing.assert_close(a, b)
