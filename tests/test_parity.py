"""Every op on every backend is right: by its definition in fp64, and in all else torch promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pydl._native import C
from pydl.table import Case, Op, judge
from tests import harness, watch


def _watched(
    op: Op,
    backend: str,
    case: Case,
    dtype: torch.dtype,
    how: str,
    poison: int = 0,
    threads: int = 1,
) -> tuple[list[torch.Tensor], list[str]]:
    """A call and its gradients with every kernel guarded: (results, complaints)."""
    torch.set_num_threads(threads)
    harness.reorder(100 * poison + threads)
    guard = watch.Guard(poison)
    with watch.intercepted(guard):
        got = harness.run(harness.on(op, backend), case, dtype, how)
    calls = [] if guard.calls > 1 else [f"{guard.calls} kernels ran, not those of {backend}"]
    return got, guard.complaints + calls


def _repeatable(
    op: Op, backend: str, case: Case, dtype: torch.dtype, how: str
) -> tuple[list[torch.Tensor], list[str]]:
    """(results, complaints where a second run, over other memory and threads, gives other bits)."""
    first, complaints = _watched(op, backend, case, dtype, how, poison=0, threads=1)
    second, more = _watched(op, backend, case, dtype, how, poison=1, threads=3)
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        if harness.same_bits(a, b):
            continue
        again = _watched(op, backend, case, dtype, how, poison=0, threads=1)[0][i]
        other = _watched(op, backend, case, dtype, how, poison=1, threads=1)[0][i]
        if not harness.same_bits(a, again):
            reason = "another run"
        elif not harness.same_bits(a, other):
            reason = "what memory held before: it is not all written"
        else:
            reason = "the number of threads"
        complaints.append(f"result {i} depends on {reason}")
    return first, complaints + more


def test_parity(op: Op, dtype: torch.dtype, backend: str, cases: Callable[..., list]) -> None:
    """Values and gradients pass the judge; just the outputs are written; the bits repeat."""
    complaints = []
    for i, case in enumerate(cases(op, backend, dtype)):
        how = harness.DY[i % len(harness.DY)]
        before = [(t, harness.bits(t).clone(), t._version) for t in case.tensors()]
        got, found = _repeatable(op, backend, case, dtype, how)
        for tensor, was, version in before:
            if tensor._version != version or not torch.equal(harness.bits(tensor), was):
                found.append("an input changed")
        found += harness.compare(got, op, case, dtype, how)
        complaints += [f"{case.label} (dy {how}): {c}" for c in found]
    assert not complaints, harness.summary(complaints)


def test_strides(op: Op, backend: str, cases: Callable[..., list]) -> None:
    """Outputs and gradients lie in memory as torch's do; watching kernels changes no bit."""
    complaints = []
    for case in cases(op, backend, torch.float32):
        got = harness.run(harness.on(op, backend), case, torch.float32)
        native = harness.run(op.native, case, torch.float32)
        watched = _watched(op, backend, case, torch.float32, "like", threads=2)[0]
        if not all(map(harness.same_bits, got, watched)):
            complaints.append(f"{case.label}: other bits than when watched")
        # torch's attention lays gradients out as whichever of its implementations ran.
        counted = 1 if op.family in harness.ATTENTION else len(got)
        for i, (a, b) in enumerate(zip(got[:counted], native, strict=False)):
            if harness.strides(a) != harness.strides(b):
                complaints.append(
                    f"{case.label}: result {i} has {a.stride()}, torch's {b.stride()}"
                )
    assert not complaints, harness.summary(complaints)


def test_saved_tensors(
    op: Op, dtype: torch.dtype, backend: str, cases: Callable[..., list]
) -> None:
    """Backward writes nothing that forward saved, nor the output, nor the gradient it is given."""
    complaints = []
    for case in cases(op, backend, dtype, share=0.2):
        saved: list[tuple[torch.Tensor, torch.Tensor, int]] = []

        def watch(tensor: torch.Tensor, into: list = saved) -> torch.Tensor:
            into.append((tensor, harness.bits(tensor).clone(), tensor._version))
            return tensor

        given = harness.leaves(case)
        with torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor):
            outs = harness.called(op.function, case, given, backend=backend)
        dys = harness.upstreams(outs, dtype)
        for tensor in (*outs, *dys):
            watch(tensor)
        for _ in range(2):
            torch.autograd.grad(outs, given, dys, retain_graph=True)
        for tensor, was, version in saved:
            if tensor._version != version or not torch.equal(harness.bits(tensor), was):
                complaints.append(f"{case.label}: a saved tensor of {tuple(tensor.shape)} changed")
    assert not complaints, harness.summary(complaints)


def test_without_gradient(op: Op, backend: str, cases: Callable[..., list]) -> None:
    """Under no_grad and inference_mode the values are the same bits, and carry no graph."""
    complaints = []
    for case in cases(op, backend, torch.float32, share=0.2):
        wanted = harness.called(op.function, case, harness.leaves(case), backend=backend)
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                got = harness.called(op.function, case, harness.leaves(case), backend=backend)
            if any(one.requires_grad for one in got) or not all(
                map(harness.same_bits, got, wanted)
            ):
                complaints.append(f"{case.label} under {type(mode).__name__}")
    assert not complaints, harness.summary(complaints)


def _shifted(case: Case, shift: int) -> Case:
    """The call with its tensors moved in memory by some elements."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        held = tensor.new_empty(tensor.numel() + shift)
        return held[shift:].view(tensor.shape).copy_(tensor)

    return Case(case.label, harness.bind(case, [move(t) for t in case.tensors()]), case.kwargs)


def test_streaming_stores(op: Op, dtype: torch.dtype) -> None:
    """Stores past the cache give the same bits, wherever tensors lie, in any number of threads."""
    complaints = []
    chosen = [case for case in op.cases(dtype) if 2000 < harness.elements(case) < 130_000]
    assert any(harness.elements(case) > 8000 for case in chosen)
    for case in chosen:
        for shift in (0, 1, 33):
            moved = _shifted(case, shift)
            results = []
            for stream_bytes, threads in ((1 << 60, 1), (0, 2)):
                before = C.set_stream_bytes(stream_bytes)
                try:
                    torch.set_num_threads(threads)
                    guard = watch.Guard(shift=(5 * shift) % 64)
                    with watch.intercepted(guard):
                        results.append(harness.run(harness.on(op, "cpu"), moved, dtype))
                finally:
                    C.set_stream_bytes(before)
                complaints += [f"{case.label}, shift {shift}: {c}" for c in guard.complaints]
            for i, (a, b) in enumerate(zip(*results, strict=True)):
                if not harness.same_bits(a, b):
                    complaints.append(f"{case.label}, shift {shift}: result {i} differs")
    assert not complaints, harness.summary(complaints)


@pytest.mark.parametrize("fault", ["error", "nan", "infinity", "shape", "dtype"])
def test_the_judge_convicts(fault: str) -> None:
    """Wrong values, shapes and dtypes do not pass."""
    x = torch.linspace(-4, 4, 999)
    wanted, native = torch.tanh(x.double()), torch.tanh(x)
    assert judge(native, wanted, native)[0]
    out = native.clone()
    if fault == "error":
        out[7] += 1e-6
    elif fault == "nan":
        out[7] = float("nan")
    elif fault == "infinity":
        wanted[7] = float("inf")
    elif fault == "shape":
        out = out[1:]
    else:
        out = out.double()
    assert not judge(out, wanted, native)[0]


@pytest.mark.parametrize("fault", ["unwritten", "outside", "input"])
def test_the_guard_convicts(fault: str) -> None:
    """A kernel that leaves an element, writes past the end or changes an input does not pass."""

    class Faulty:
        _schema = torch.ops.pydl_cpu.relu_fwd.default._schema

        def __call__(self, y: torch.Tensor, x: torch.Tensor) -> None:
            if fault == "unwritten":
                y[:-1] = x[:-1]
                return
            y.copy_(x)
            if fault == "outside":
                y.as_strided((1,), (1,), y.storage_offset() + y.numel()).fill_(1)
            else:
                x[3] += 1

    x, results, complaints = torch.randn(50), [], []
    for poison in (0, 1):
        guard, y = watch.Guard(poison), torch.empty(50)
        guard(Faulty())(y, x)
        results.append(y)
        complaints += guard.complaints
    assert harness.same_bits(*results) == (fault == "outside") and bool(complaints) == (
        fault != "unwritten"
    )
