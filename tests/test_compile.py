"""torch.compile traces every op whole; what it makes equals eager, for any size and backend."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pydl
from pydl import backends, functional
from pydl.table import Case, Op
from tests import harness, watch


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Every test compiles anew."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Seen:
    """A compiler that runs graphs as they are and remembers what they call."""

    def __init__(self) -> None:
        self.graphs = 0
        self.targets: set[str] = set()

    def __call__(self, module: torch.fx.GraphModule, inputs: list) -> Callable:
        self.graphs += 1
        for part in module.modules():
            if isinstance(part, torch.fx.GraphModule):
                self.targets |= {str(node.target) for node in part.graph.nodes}
        return module.forward

    def calls(self, backend: str) -> bool:
        return any(f"pydl_{backend}." in target for target in self.targets)


def _variants(op: Op, backend: str) -> list[Case]:
    """A sample for every number of tensors, and channels-last too, with or without dropout."""
    chosen: dict[object, Case] = {}
    for case in op.cases(torch.float32, harness.device(backend)):
        x = case.args[0]
        last = x.dim() == 4 and not x.is_contiguous()
        if harness.moderate(case, 6000) and x.dim() in (2, 4) and x.numel() and (
            x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        ):  # fmt: skip
            chosen.setdefault((len(case.tensors()), last, "seed" in case.kwargs), case)
    return list(chosen.values())


def _caller(op: Op, case: Case, backend: str | None) -> Callable[..., Any]:
    """The call as a function of its tensors, closed over nothing else that has a size."""
    pattern: list[tuple[int, object]] = []
    for arg in case.args:
        is_tensor = isinstance(arg, torch.Tensor)
        count = sum(i >= 0 for i, _ in pattern)
        pattern.append((count, None) if is_tensor else (-1, arg))
    return lambda *given: op.function(
        *[given[i] if i >= 0 else arg for i, arg in pattern], backend=backend, **case.kwargs
    )


def _complaints(op: Op, by: str | None, case: Case, **options: object) -> list[str]:
    """Where a compiled call differs from an eager one, forward or backward."""
    plain = _caller(op, case, by)

    def call(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(out * 2 for out in harness.several(plain(*given)))

    results = []
    for function in (call, torch.compile(call, fullgraph=True, **options)):
        given = harness.leaves(case)
        outs = function(*given)
        grads = torch.autograd.grad(outs, given, harness.upstreams(outs, torch.float32))
        results.append([*(out.detach() for out in outs), *grads])
        with torch.no_grad():
            results[-1] += function(*given)
    complaints = []
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        if a.dtype != b.dtype or harness.strides(a) != harness.strides(b):
            complaints.append(f"{case.label}: result {i} is laid out otherwise: {b.stride()}")
        elif not torch.allclose(a, b, rtol=1e-5, atol=1e-5):
            complaints.append(
                f"{case.label}: result {i} differs by {float((a - b).abs().max()):.1e}"
            )
    return complaints


def test_compiled_equals_eager(op: Op, backend: str) -> None:
    """Forward and backward through AOTAutograd, without a graph break."""
    complaints = []
    for case in _variants(op, backend):
        torch._dynamo.reset()
        complaints += _complaints(op, backend, case, backend="aot_eager")
    assert not complaints, harness.summary(complaints)


@pytest.mark.parametrize("name", ["gelu", "prelu", "bias_act", "gated_act"])
def test_inductor(name: str) -> None:
    """The default compiler, which reorders and reuses memory, keeps what kernels write."""
    op = pydl.table.TABLE[name]
    case = _variants(op, "cpu")[-1]
    assert not (found := _complaints(op, "cpu", case)), harness.summary(found)


def test_automatic_choice(op: Op, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a backend named, the measured table decides while tracing as it does in eager."""
    case = max(_variants(op, "cpu"), key=lambda case: case.args[0].dim())
    names = [op.name, *op.apart, f"{op.name}_learnt", f"{op.name}_tanh"]
    path = tmp_path / "calibration.json"
    monkeypatch.setenv("PYDL_CALIBRATION", str(path))
    try:
        for smallest, chosen in ((64, True), (-1, False)):
            sizes = {name: {"float32": ["cpu", smallest, smallest]} for name in names}
            path.write_text(json.dumps({"sizes": {"cpu": sizes}}))
            pydl.calibration.reload()
            torch._dynamo.reset()
            seen, recorder = Seen(), watch.Recorder()
            assert not (found := _complaints(op, None, case, backend=seen)), harness.summary(found)
            with watch.intercepted(recorder):
                harness.run(harness.on(op, None), case, torch.float32)
            assert seen.calls("cpu") == bool(recorder.calls) == chosen
    finally:
        monkeypatch.undo()
        pydl.calibration.reload()


def test_dynamic_shapes(op: Op) -> None:
    """One graph serves every size."""
    assert _graphs_for_sizes(op, "dynamic") == 1


@pytest.mark.parametrize("name", ["gelu", "bias_act"])
@pytest.mark.parametrize(("how", "graphs"), [("marked", 1), ("automatic", 2)])
def test_dynamic_dimensions(name: str, how: str, graphs: int) -> None:
    """So it is where a dimension is marked, and where torch finds out by itself."""
    assert _graphs_for_sizes(pydl.table.TABLE[name], how) == graphs


def _graphs_for_sizes(op: Op, how: str) -> int:
    """How many graphs calls of four sizes took; each is compared with eager."""
    seen = Seen()
    call = _caller(op, op.bench(pydl.table.Make(torch.float32), (16, 40)), "cpu")
    compiled = torch.compile(
        call, fullgraph=True, backend=seen, dynamic=True if how == "dynamic" else None
    )
    for i, rows in enumerate((16, 24, 32, 7)):
        case = op.bench(pydl.table.Make(torch.float32), (rows, 40))
        given = harness.leaves(case)
        if how == "marked" and i == 0:
            for t in given:
                if t.shape[0] == rows:
                    torch._dynamo.mark_dynamic(t, 0)
        outs = harness.several(compiled(*given))
        grads = torch.autograd.grad(outs, given, harness.upstreams(outs, torch.float32))
        for a, b in zip(
            [*(out.detach() for out in outs), *grads],
            harness.run(harness.on(op, "cpu"), case, torch.float32),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    return seen.graphs


def test_use_backend_switches() -> None:
    """`use_backend` around a compiled function decides who computes, each time anew."""
    seen = Seen()
    compiled = torch.compile(lambda x: functional.gelu(x), fullgraph=True, backend=seen)
    x = torch.randn(128)
    with pydl.use_backend("torch"):
        compiled(x)
    assert seen.graphs == 1 and not seen.calls("cpu")
    with pydl.use_backend("cpu"):
        y = compiled(x)
    assert seen.graphs == 2 and seen.calls("cpu")
    assert torch.equal(y, functional.gelu(x, backend="cpu"))
    with pydl.use_backend("torch"):
        compiled(x)
    assert seen.graphs == 2


def test_use_backend_inside() -> None:
    """`use_backend` inside a compiled function does the same, or says that it cannot be traced."""
    seen = Seen()

    def call(x: torch.Tensor) -> torch.Tensor:
        with pydl.use_backend("cpu"):
            return functional.gelu(x)

    compiled = torch.compile(call, backend=seen)
    x = torch.randn(128)
    recorder = watch.Recorder()
    assert torch.equal(compiled(x), functional.gelu(x, backend="cpu"))
    with watch.intercepted(recorder):
        eager = call(x)
    assert recorder.calls and torch.equal(eager, compiled(x))


def test_use_backend_is_traced() -> None:
    """Inside a compiled function it needs no graph of its own, and holds no longer than it says."""
    seen = Seen()

    def call(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with pydl.use_backend("cpu"):
            first = functional.mish(x)
            with pydl.use_backend("torch"):
                second = functional.gelu(x)
            third = functional.silu(x)
        return first, second, third, functional.tanh(x)

    compiled = torch.compile(call, fullgraph=True, backend=seen)
    x = torch.randn(128)
    for _ in range(2):
        for got, wanted in zip(compiled(x), call(x), strict=True):
            assert torch.equal(got, wanted)
        assert backends.requested(None) is None and backends._traced is None
    assert seen.graphs == 1
    ours = {target for target in seen.targets if "pydl_" in target}
    assert len(ours) == 2 and all("mish" in one or "silu" in one for one in ours), ours
    with pydl.use_backend("torch"):
        assert torch.equal(compiled(x)[0], functional.mish(x, backend="cpu"))
        assert backends.requested(None) == backends._traced == "torch"


def test_use_backend_that_is_none_is_traced() -> None:
    """A wrong name is an error there too."""

    def call(x: torch.Tensor) -> torch.Tensor:
        with pydl.use_backend("gpu"):
            return functional.mish(x)

    with pytest.raises(Exception, match="'gpu', wants one of"):
        torch.compile(call, backend="eager")(torch.randn(8))


def test_inplace_compiled(inplace_op: Op) -> None:
    """`inplace=True` under torch.compile changes what it should, with a graph and without."""

    def call(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x * 1.5
        out = inplace_op.function(y, inplace=True, backend="cpu")
        return out, y

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaf = torch.randn(4, 33, requires_grad=True)
    out, y = compiled(leaf)
    wanted = inplace_op.function(leaf * 1.5, backend="cpu")
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(y, wanted)
    (got,) = torch.autograd.grad(out.square().sum(), leaf)
    torch.testing.assert_close(got, torch.autograd.grad(wanted.square().sum(), leaf)[0])
    with torch.no_grad():
        torch.testing.assert_close(compiled(leaf)[1], wanted)


def test_overwriting_an_argument(inplace_op: Op) -> None:
    """An argument that a compiled function overwrites is overwritten."""
    compiled = torch.compile(
        lambda x: inplace_op.function(x, inplace=True, backend="cpu"),
        fullgraph=True,
        backend="aot_eager",
    )
    x = torch.randn(4, 33)
    wanted = inplace_op.function(x, backend="cpu")
    compiled(x)
    torch.testing.assert_close(x, wanted)


def test_export(op: Op) -> None:
    """torch.export takes every op, and what it makes runs."""
    case = _variants(op, "cpu")[0]
    call = _caller(op, case, "cpu")

    class Model(torch.nn.Module):
        def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return harness.several(call(*given))

    tensors = tuple(case.tensors())
    exported = torch.export.export(Model(), tensors)
    assert all(map(torch.equal, exported.module()(*tensors), Model()(*tensors)))
    assert any("pydl_cpu" in str(node.target) for node in exported.graph.nodes)


def test_module_compiled() -> None:
    """Activations between layers compile whole and train as in eager."""

    def net(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        hidden = functional.bias_act(x @ w, b, "gelu", backend="cpu")
        return functional.mish(functional.relu(hidden @ w, backend="cpu"), backend="cpu").sum()

    torch.manual_seed(0)
    given = [torch.randn(8, 32), torch.randn(32, 32) / 6, torch.randn(32)]
    results = []
    for function in (net, torch.compile(net, fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in given]
        results.append(torch.autograd.grad(function(*leaves), leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
