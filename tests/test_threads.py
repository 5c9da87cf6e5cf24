"""Several Python threads at once, as torch.nn.DataParallel has them: same results, own choices."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import pydl
from pydl import backends, functional
from pydl._native import C
from pydl.table import Op
from tests import harness, watch


def test_same_results(op: Op, backend: str, cases: Callable[..., list]) -> None:
    """Threads that call an op at once get the bits that one thread alone gets."""
    if harness.kind(backend) == "triton, interpreted":
        pytest.skip(
            "Triton's interpreter keeps its state in module variables: one thread at a time"
        )
    chosen = [case for case in cases(op, backend, torch.float32, share=0.2) if case.args[0].numel()]
    wanted = [harness.run(harness.on(op, backend), case, torch.float32) for case in chosen]

    def work(begin: int) -> list[str]:
        wrong = []
        for i in range(len(chosen)):
            k = (begin + i) % len(chosen)
            got = harness.run(harness.on(op, backend), chosen[k], torch.float32)
            if not all(map(harness.same_bits, got, wanted[k])):
                wrong.append(chosen[k].label)
        return wrong

    with ThreadPoolExecutor(4) as threads:
        complaints = [c for found in threads.map(work, [0, 3, 7, 11]) for c in found]
    assert not complaints, harness.summary(complaints)


def test_shared_parameters(backend: str) -> None:
    """Replicas share parameters: gradients that threads accumulate into one leaf add up."""
    if harness.kind(backend) == "triton, interpreted":
        pytest.skip(
            "Triton's interpreter keeps its state in module variables: one thread at a time"
        )
    device = harness.device(backend)
    weight = torch.full((16,), 0.25, device=device, requires_grad=True)
    x = torch.randn(8, 16, 33, device=device)

    def work(_: int) -> None:
        functional.prelu(x, weight, backend=backend).sum().backward()

    work(0)
    one = weight.grad.clone()  # type: ignore[union-attr]
    weight.grad = None
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(8)))
    torch.testing.assert_close(weight.grad, 8 * one)


_LIBRARIES = """
from pathlib import Path
import pydl
maps = Path("/proc/self/maps").read_text().splitlines()
print(*{line.split()[-1] for line in maps if "libgomp" in line})
"""


def test_kernels_share_torchs_threads() -> None:
    """As many threads as torch is set to, of torch's own pool."""
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert C.parallel_threads(64) == threads
        assert C.parallel_threads(1) == 1
    # In a process of its own: other packages may bring another library.
    done = harness.python(_LIBRARIES)
    assert done.returncode == 0 and len(done.stdout.split()) == 1, done.stdout + done.stderr


def test_inplace_threads() -> None:
    """In-place calls on tensors of their own do not disturb each other."""

    def work(i: int) -> bool:
        x = torch.linspace(-i - 1, i + 1, 50_001)
        wanted = torch.relu(x)
        return all(
            torch.equal(functional.relu(x.clone(), inplace=True, backend="cpu"), wanted)
            for _ in range(10)
        )

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(8)))


def test_use_backend_is_per_thread() -> None:
    """A choice holds in the thread that made it, while it is made; others choose by themselves."""
    entered, checked = threading.Event(), threading.Event()

    def chooser() -> list[str | None]:
        seen = [backends.requested(None)]
        with pydl.use_backend("cpu"):
            seen.append(backends.requested(None))
            entered.set()
            checked.wait(30)
            with pydl.use_backend("reference"):
                seen.append(backends.requested(None))
            with pydl.use_backend(None):
                seen.append(backends.requested(None))
            seen.append(backends.requested(None))
        return [*seen, backends.requested(None)]

    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(chooser)
        assert entered.wait(30)
        before = backends.requested(None)
        with pydl.use_backend("torch"):
            inside = backends.requested(None)
        checked.set()
        assert (before, inside, backends.requested(None)) == (None, "torch", None)
        assert found.result() == [None, "cpu", "reference", None, "cpu", None]


def test_use_backend_ends_with_an_error() -> None:
    """The choice before is back when the block is left, however it is left."""
    with pytest.raises(KeyError), pydl.use_backend("cpu"):
        raise KeyError
    assert backends.requested(None) is None


def test_explicit_beats_context() -> None:
    """The argument is stronger than the context, and the context than the automatic choice."""
    x = torch.randn(9)
    recorder = watch.Recorder()
    with watch.intercepted(recorder):
        with pydl.use_backend("cpu"):
            functional.gelu(x)
            assert len(recorder.calls) == 1
            functional.gelu(x, backend="torch")
            assert len(recorder.calls) == 1
        with pydl.use_backend("torch"):
            functional.gelu(x, backend="cpu")
            functional.gelu(x)
    assert len(recorder.calls) == 2


def test_interleaved_choices_leave_nothing() -> None:
    """Threads that enter and leave in any order leave compiled code's choice as it was."""
    order = [threading.Event() for _ in range(3)]

    def first() -> None:
        with pydl.use_backend("cpu"):
            order[0].set()
            order[1].wait(30)
        order[2].set()

    def second() -> None:
        order[0].wait(30)
        with pydl.use_backend("torch"):
            order[1].set()
            order[2].wait(30)

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(first), threads.submit(second)]:
            done.result()
    targets: set[str] = set()

    def compiler(module: torch.fx.GraphModule, inputs: list) -> Callable:
        for part in module.modules():
            if isinstance(part, torch.fx.GraphModule):
                targets.update(str(node.target) for node in part.graph.nodes)
        return module.forward

    torch._dynamo.reset()
    torch.compile(functional.gelu, backend=compiler)(torch.randn(8))
    assert targets and not any("pydl_cpu" in target for target in targets)
