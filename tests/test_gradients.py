"""First to third derivatives, gradient penalties, in-place calls, what is saved for backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pydl import functional
from pydl.backends import takes
from pydl.table import Case, Op
from tests import harness

# What backward may save, beyond which nothing: the input and the parameter, or only the output.
SAVES_OUTPUT = ("sigmoid", "tanh", "relu")


def _checked(
    check: Callable, op: Op, backend: str, case: Case, fast: bool, **options: object
) -> str:
    """What gradcheck has against a call; empty for nothing."""

    def call(*given: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return op.function(*harness.bind(case, given), backend=backend, **case.kwargs)

    try:
        check(call, harness.leaves(case), fast_mode=fast, **options)
    except Exception as error:
        return f"{case.label}: {type(error).__name__}: {str(error)[:300]}"
    return ""


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradcheck(op: Op, backend: str, check: Callable) -> None:
    """Derivatives equal differences in fp64, of forward and of backward."""
    if not takes(backend, torch.float64):
        pytest.skip(f"backend {backend} has no fp64")
    complaints, seen = [], 0
    options = {} if harness.kind(backend) == "cpu" else {"nondet_tol": 0.0}
    for case in op.cases(torch.float64, harness.device(backend)):
        slow = harness.moderate(case, 24)
        if slow or harness.moderate(case, 3000):
            seen += 1
            complaints += (
                [c] if (c := _checked(check, op, backend, case, not slow, **options)) else []
            )
    assert seen > 3
    assert not complaints, harness.summary(complaints)


def _penalty(function: Callable, case: Case) -> list[torch.Tensor]:
    """Gradients of a penalty on the norm of the input's gradient, as a WGAN's critic is trained."""
    given = harness.leaves(case)
    outs = harness.called(function, case, given)
    weight = torch.linspace(-1, 1, outs[0].shape[-1], dtype=given[0].dtype, device=given[0].device)
    weight.requires_grad_()
    score = harness.joined(tuple(out * weight for out in outs))
    (slope,) = torch.autograd.grad(score.sum(), given[:1], create_graph=True)
    penalty = ((slope.flatten(1).norm(2, dim=1) - 1) ** 2).mean()
    grads = torch.autograd.grad(penalty + score.mean(), [*given, weight], allow_unused=True)
    return [
        torch.zeros_like(t) if g is None else g
        for t, g in zip([*given, weight], grads, strict=True)
    ]


def test_gradient_penalty(op: Op, dtype: torch.dtype, backend: str) -> None:
    """A loss on the norm of a gradient trains as it does with torch."""
    complaints = []
    for case in harness.thinned(op.cases(dtype, harness.device(backend)), backend, dtype):
        if (
            case.args[0].dim() < 2
            or not harness.moderate(case, harness.affordable(backend, 3000))
            or not case.args[0].numel()
        ):
            continue
        got = _penalty(harness.on(op, backend), case)
        native = _penalty(harness.smooth(op), case)
        wanted = _penalty(op.reference, case.to(torch.float64))
        for i, (a, b, c) in enumerate(zip(got, wanted, native, strict=True)):
            terms = harness.terms(op, case, case.args[0], a)
            complaints += harness.judged(
                f"{case.label}: gradient {i}", a, b, c, terms, harness.by_rows(op)
            )
    assert not complaints, harness.summary(complaints)


def _three_times(function: Callable, case: Case) -> list[torch.Tensor]:
    """Gradients of a loss of gradients of a loss of gradients; all depends on everything."""
    given = harness.leaves(case)
    x, *parameters = given
    shared = [x, *(p * (1 + 0.1 * x.mean()) for p in parameters)]
    value = harness.joined(function(*harness.bind(case, shared), **case.kwargs)).square().sum()
    found = []
    for _ in range(3):
        grads = torch.autograd.grad(value, given, create_graph=True, allow_unused=True)
        grads = [torch.zeros_like(t) if g is None else g for t, g in zip(given, grads, strict=True)]
        found += [g.detach() for g in grads]
        value = sum(g.square().mean() for g in grads)
    return found


def test_third_derivative(op: Op, backend: str) -> None:
    """Backward, thrice, equals torch's, also where the incoming gradient depends on the input.

    The third derivatives of torch's normalisations take mean and scale for constants (their
    gradcheck fails): there the definition's is right.
    """
    if not takes(backend, torch.float64):
        pytest.skip(f"backend {backend} has no fp64")
    complaints = []
    for case in op.cases(torch.float64, harness.device(backend)):
        if not harness.moderate(case, 600) or not case.args[0].numel():
            continue
        right = op.reference if harness.by_rows(op) else harness.smooth(op)
        got, wanted = _three_times(harness.on(op, backend), case), _three_times(right, case)
        for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
            if a.numel() and not torch.allclose(
                a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()) + 1e-30
            ):
                order, which = 1 + i // len(case.tensors()), i % len(case.tensors())
                error = float((a - b).abs().max() / b.abs().max())
                complaints.append(
                    f"{case.label}: derivative {order} by {which}: off by {error:.1e}"
                )
    assert not complaints, harness.summary(complaints)


def _inplace(
    function: Callable, case: Case, **options: object
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(output, gradient, growth of the version) of an in-place call inside a graph."""
    (leaf,) = harness.leaves(case)
    x = torch.empty_like(leaf).copy_(leaf) if leaf.dim() else leaf * 1
    before = x._version
    out = function(*harness.bind(case, [x]), inplace=True, **case.kwargs, **options)
    assert out is x or out.data_ptr() == x.data_ptr()
    grown = x._version - before
    (grad,) = torch.autograd.grad(out * 3, leaf, harness.upstream(out.detach(), out.dtype))
    return out.detach(), grad, grown


def test_inplace(inplace_op: Op, backend: str) -> None:
    """`inplace=True` gives the same, in its input's memory, and bumps its version."""
    complaints = []
    for case in inplace_op.cases(torch.float32, harness.device(backend)):
        if harness.elements(case) > harness.affordable(backend, 100_000):
            continue
        out, grad, grown = _inplace(inplace_op.function, case, backend=backend)

        def plain(x: torch.Tensor, case: Case = case) -> torch.Tensor:
            return inplace_op.function(x, *case.args[1:], backend=backend, **case.kwargs)

        (leaf,) = harness.leaves(case)
        wanted = plain(leaf)
        dy = harness.upstream(wanted.detach(), wanted.dtype)
        (wanted_grad,) = torch.autograd.grad(wanted * 3, leaf, dy)
        if not harness.same_bits(out, wanted):
            complaints.append(f"{case.label}: other values")
        if not torch.equal(grad.nan_to_num(7.0), wanted_grad.nan_to_num(7.0)):
            complaints.append(f"{case.label}: other gradients")
        if grown < 1:
            complaints.append(f"{case.label}: the version did not grow")
    assert not complaints, harness.summary(complaints)


def test_inplace_without_gradient(inplace_op: Op, backend: str) -> None:
    """In place without a graph: same bits, a version more; under inference_mode too."""
    x = torch.randn(3, 50, device=harness.device(backend))
    wanted = inplace_op.function(x, backend=backend)
    for make in (torch.Tensor.clone, lambda t: t.t().clone().t(), lambda t: t.repeat(1, 2)[:, :50]):
        for mode in (torch.enable_grad(), torch.no_grad()):
            with mode:
                y = make(x)
                before = y._version
                assert inplace_op.function(y, inplace=True, backend=backend) is y
            assert torch.equal(y, wanted) and y._version > before
    with torch.inference_mode():
        y = x.clone()
        assert inplace_op.function(y, inplace=True, backend=backend) is y
    assert torch.equal(y, wanted)


def test_inplace_is_refused(inplace_op: Op, backend: str) -> None:
    """Overwriting a leaf that requires grad, or shared memory, is an error and changes nothing."""
    leaf = torch.randn(50, device=harness.device(backend), requires_grad=True)
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="leaf"):
        inplace_op.function(leaf, inplace=True, backend=backend)
    assert torch.equal(leaf, before)
    with pytest.raises(RuntimeError, match="leaf"):
        inplace_op.function(leaf.view(5, 10), inplace=True, backend=backend)
    assert torch.equal(leaf, before)
    shared = before[:1].expand(50)
    with pytest.raises(RuntimeError, match="single memory location"):
        inplace_op.function(shared, inplace=True, backend=backend)


def test_inplace_on_an_inference_tensor(inplace_op: Op, backend: str) -> None:
    """Outside of inference mode it is an error, as it is with torch, and changes nothing."""
    with torch.inference_mode():
        x = torch.randn(50, device=harness.device(backend))
    before = x.clone()
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode, pytest.raises(RuntimeError, match=r"inference tensor outside"):
            inplace_op.function(x, inplace=True, backend=backend)
    assert torch.equal(x, before)
    with torch.inference_mode():
        inplace_op.function(x, inplace=True, backend=backend)
    assert torch.equal(x, inplace_op.function(before, backend=backend))


def test_inplace_in_a_graph(inplace_op: Op, backend: str) -> None:
    """What a view's in-place call changes, and what it spoils, autograd knows."""
    w = torch.randn(6, 8, device=harness.device(backend), requires_grad=True)

    def through(view: Callable, function: Callable, **options: object) -> torch.Tensor:
        base = w * 1.5
        function(view(base), inplace=True, **options)
        return torch.autograd.grad((base * base).sum(), w)[0]

    for view in (lambda t: t, lambda t: t.view(-1)[:24], lambda t: t[:, 1::2], torch.t):
        got = through(view, inplace_op.function, backend=backend)
        torch.testing.assert_close(got, through(view, inplace_op.native))
    y = torch.exp(w)
    inplace_op.function(y, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inplace_double_backward(inplace_op: Op, backend: str) -> None:
    """A gradient penalty through an in-place call equals torch's."""
    w = torch.randn(6, 8, device=harness.device(backend), dtype=torch.float32, requires_grad=True)

    def penalty(function: Callable, **options: object) -> torch.Tensor:
        out = function(w * 1.5, inplace=True, **options)
        (slope,) = torch.autograd.grad((out**2).sum(), w, create_graph=True)
        return torch.autograd.grad((slope**2).sum(), w)[0]

    torch.testing.assert_close(
        penalty(inplace_op.function, backend=backend), penalty(inplace_op.native)
    )


def test_needs_input_grad(op: Op, backend: str) -> None:
    """Each tensor alone can require grad: it gets the same gradient, and the others none."""
    complaints = []
    drawn = op.cases(torch.float32, harness.device(backend))
    for case in harness.thinned(drawn, backend, torch.float32):
        if not harness.moderate(case, harness.affordable(backend, 6000)) or len(case.tensors()) < 2:
            continue
        everything = harness.run(harness.on(op, backend), case, torch.float32)
        for i, wanted in enumerate(everything[harness.outputs_of(everything, case) :]):
            given = [t.detach().requires_grad_(k == i) for k, t in enumerate(case.tensors())]
            outs = harness.called(op.function, case, given, backend=backend)
            torch.autograd.backward(outs, harness.upstreams(outs, torch.float32))
            if any(t.grad is not None for k, t in enumerate(given) if k != i):
                complaints.append(f"{case.label}: a gradient that was not asked for")
            if not harness.same_bits(given[i].grad, wanted):
                complaints.append(f"{case.label}: gradient {i} alone differs")
    assert not complaints, harness.summary(complaints)


def test_saved_bytes(op: Op, backend: str, cases: Callable[..., list]) -> None:
    """Backward saves the arguments, not copies of them, or the output alone; nothing else."""
    complaints = []
    for case in cases(op, backend, torch.float32):
        of = case.kwargs.get("feature_map")
        if "dilation" in case.kwargs or callable(of) or (of == "softmax" and backend != "cpu"):
            continue  # works on copies, as its documentation says, or on a function's results
        saved: list[torch.Tensor] = []
        given = harness.leaves(case)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=saved: s.append(t) or t, lambda t: t
        ):
            outs = harness.called(op.function, case, given, backend=backend)
        held = {t.untyped_storage().data_ptr(): t for t in [*given, *case.kwargs.values()]
                if isinstance(t, torch.Tensor)}  # fmt: skip
        wanted = sum(
            t.numel() for t in [*given, *case.kwargs.values()]
            if isinstance(t, torch.Tensor) and t.is_floating_point()
        )  # fmt: skip
        if op.name in SAVES_OUTPUT and not any(isinstance(a, float) and a < 0 for a in case.args):
            held = {outs[0].untyped_storage().data_ptr(): outs[0]}
            wanted = outs[0].numel()
        if op.family == "add_norm":  # the second output in place of both inputs
            held |= {outs[1].untyped_storage().data_ptr(): outs[1]}
            wanted -= outs[1].numel()
        foreign = [t for t in saved if t.numel() and t.untyped_storage().data_ptr() not in held]
        if "norm" in op.family:  # two or three numbers a row, channel or group, too
            numbers = {t.numel() for t in foreign}
            most = 3 if op.family == "batch_norm" else 2
            if len(numbers) == 1 and len(foreign) <= most:
                wanted += sum(t.numel() for t in foreign)
                foreign = []
        if op.family == "attention":  # the output, and two numbers a row, too
            elements, rows = outs[0].numel(), outs[0].numel() // max(1, outs[0].shape[-1])
            foreign = [
                t for t in foreign if t.is_floating_point() and t.numel() not in (elements, rows)
            ]
            wanted += elements + 2 * rows
        if op.family == "linear_attention":  # the output, the state, and a number a row, too
            out = outs[0]
            rows = out.numel() // max(1, out.shape[-1])
            heads, width = out.shape[0] * out.shape[1], given[0].shape[-1]
            sizes = [out.numel(), rows, heads * width * out.shape[-1], heads * width]
            sizes += [out.shape[1]] if "decay" in case.kwargs else []
            foreign = [t for t in foreign if t.numel() not in sizes]
            wanted += sum(sizes)
        if op.name == "additive_attention":  # queries and keys as F.linear has them, projected, too
            hidden = given[5].numel()
            sizes = [t.numel() // max(1, t.shape[-1]) * hidden for t in given[:2]]
            sizes += [t.numel() for t in given[:2] if not t.is_contiguous()]
            foreign = [t for t in foreign if t.numel() not in sizes]
            wanted += sum(sizes)
        floats = sum(
            min(t.numel(), t.untyped_storage().nbytes() // t.element_size())
            for t in saved if t.is_floating_point()
        )  # fmt: skip
        if foreign or floats > wanted:
            shapes = [tuple(t.shape) for t in saved]
            complaints.append(f"{case.label}: saves {shapes}, {len(foreign)} of its own")
    assert not complaints, harness.summary(complaints)


def test_expanded_upstream(op: Op, backend: str, cases: Callable[..., list]) -> None:
    """The gradient of a sum, which comes with strides of 0, gives the bits of one written out."""
    complaints = []
    for case in cases(op, backend, torch.float32):
        given = harness.leaves(case)
        outs = harness.called(op.function, case, given, backend=backend)
        upstream = [torch.ones_like(out) for out in outs]
        ones = torch.autograd.grad(outs, given, upstream, retain_graph=True)
        sums = torch.autograd.grad([out.sum() for out in outs], given)
        if not all(map(harness.same_bits, ones, sums)):
            complaints.append(case.label)
    assert not complaints, harness.summary(complaints)


def test_swish_has_no_gradient_for_a_number() -> None:
    """A number as beta is a constant, a tensor is learnt."""
    x = torch.randn(9, requires_grad=True)
    beta = torch.tensor(1.5, requires_grad=True)
    functional.swish(x, beta, backend="cpu").sum().backward()
    assert beta.grad is not None and beta.grad.shape == ()
    assert torch.equal(
        functional.swish(x, 1.5, backend="cpu"), functional.swish(x, beta, backend="cpu")
    )
