"""Which ops, backends and dtypes the tests loop over, and what a run tells of what it left out."""

from __future__ import annotations

import inspect
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

# Triton and pydl read these at import. The interpreter stands in for a GPU; backends are the
# tests' choice.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
for variable in ("PYDL_BACKEND", "PYDL_CALIBRATION", "PYDL_POOL_BYTES"):
    os.environ.pop(variable, None)

from pydl.backends import takes  # noqa: E402
from pydl.table import TABLE, Op  # noqa: E402
from tests import harness  # noqa: E402


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that names `op`, `inplace_op`, `dtype` or `backend` runs for every one there is."""
    names = metafunc.fixturenames
    if "op" in names and "dtype" in names:
        pairs = [(op, dtype) for op in TABLE.values() for dtype in op.dtypes]
        ids = [f"{op.name}-{str(dtype).removeprefix('torch.')}" for op, dtype in pairs]
        metafunc.parametrize("op, dtype", pairs, ids=ids)
    elif "op" in names:
        metafunc.parametrize("op", TABLE.values(), ids=list(TABLE))
    if "inplace_op" in names:
        ops = [
            op for op in TABLE.values() if "inplace" in inspect.signature(op.function).parameters
        ]
        metafunc.parametrize("inplace_op", ops, ids=[op.name for op in ops])
    if "backend" in names:
        metafunc.parametrize("backend", harness.BACKENDS, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the dtypes that a backend has no kernels for."""
    left_out = []
    for item in items:
        given = (
            item.callspec.params
            if isinstance(item, pytest.Function) and hasattr(item, "callspec")
            else {}
        )
        if "backend" in given and "dtype" in given and not takes(given["backend"], given["dtype"]):
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend that can run here; else the test is skipped and says why."""
    if reason := harness.missing(request.param):
        pytest.skip(f"backend {request.param}: {reason}")
    for name in ("op", "inplace_op"):
        op = getattr(request.node, "callspec", None) and request.node.callspec.params.get(name)
        if op is not None and (reason := harness.lacks(op, request.param)):
            pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture
def cases(record_property: Callable[[str, object], None]) -> Callable[..., list]:
    """`harness.cases`, with what it leaves out told at the end of the run."""

    def draw(op: Op, backend: str, dtype: torch.dtype, share: float = 1.0) -> list:
        kept, dropped, most = harness.cases(op, backend, dtype, share)
        if dropped:
            record_property(
                "thinned", f"{harness.kind(backend)}: calls of more than {most} elements"
            )
            record_property("thinned_count", dropped)
        return kept

    return draw


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """No test changes the number of threads for the next, or leaves it a broken GPU: where tests
    are shared out, another process goes on."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says plainly what the run did not test, and why."""
    skipped: Counter[str] = Counter()
    thinned: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "outcome", "") == "skipped" and isinstance(report.longrepr, tuple):
                skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1
            given = dict(getattr(report, "user_properties", ()))
            if "thinned" in given and report.when == "call":
                thinned[given["thinned"]] += given["thinned_count"]
    lines = []
    if not torch.cuda.is_available():
        lines.append("no GPU: cuda runs emulated on the CPU, triton in its interpreter")
    if shutil.which("nvcc") is None:
        lines.append("no nvcc on the path: no CUDA kernel is compiled for a GPU")
    lines += [f"{count} skipped: {reason}" for reason, count in sorted(skipped.items())]
    lines += [f"{count} samples left out: {what}" for what, count in sorted(thinned.items())]
    if lines:
        terminalreporter.section("not tested here")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been computed in one pass, call by call."""
    from pydl import fuse_run

    seen: list[str] = []
    real = fuse_run.functional.batch_norm_act

    def count(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(("add " if kwargs["residual"] is not None else "") + kwargs["act"])
        return real(*args, **kwargs)

    monkeypatch.setattr(fuse_run.functional, "batch_norm_act", count)
    return seen
