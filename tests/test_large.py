"""More than 2^31 elements, and offsets beyond 2^31: nothing wraps around."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pydl import functional, pool
from pydl.table import Case, Make, Op
from tests import harness, watch

FAR = (1 << 31) + 12_345  # elements


def _free() -> int:
    """Bytes of memory that can still be had."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) << 10


def test_many_elements() -> None:
    """Forward and backward over 2^31 + 12,345 bf16 elements: the beginning, the middle, the end."""
    needed = 12 << 30
    if _free() < needed:
        pytest.skip(f"{needed >> 30} GiB of free memory are needed, there are {_free() >> 30}")
    row = torch.linspace(-3, 3, 4099).to(torch.bfloat16)
    rows = FAR // row.numel() + 1
    x = row.expand(rows, -1).detach().requires_grad_()
    assert x.numel() > FAR
    y = functional.leaky_relu(x, 0.5, backend="cpu")
    wanted = torch.nn.functional.leaky_relu(row, 0.5)
    places = (
        0,
        1,
        rows // 2,
        (1 << 31) // row.numel(),
        (1 << 31) // row.numel() + 1,
        rows - 2,
        rows - 1,
    )
    for i in places:
        assert torch.equal(y.detach()[i], wanted), i
    (grad,) = torch.autograd.grad(y, x, torch.ones((), dtype=x.dtype).expand(x.shape))
    slope = torch.where(row > 0, 1.0, 0.5).to(torch.bfloat16)
    for i in places:
        assert torch.equal(grad[i], slope), i
    del y, grad
    pool.empty()


def _far(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's values in rows more than 2^31 elements apart: memory that is hardly touched."""
    step = (1 << 31) + 7
    if tensor.shape[0] == 1:  # (samples, outer, …): apart along the second dimension
        return _far(tensor[0]).unsqueeze(0)
    held = torch.empty(
        step * (tensor.shape[0] - 1) + tensor[0].numel(), dtype=tensor.dtype, device=tensor.device
    )
    strides = [step, *tensor[0].contiguous().stride()]
    return held.as_strided(tensor.shape, strides).copy_(tensor)


def test_far_apart(op: Op, backend: str) -> None:
    """Inputs whose rows lie more than 2^31 elements apart."""
    device = harness.device(backend)
    needed = 6 << 30
    if device == "cpu" and _free() < needed:
        pytest.skip(f"{needed >> 30} GiB of address space are needed")
    case = op.bench(Make(torch.bfloat16, device), (2, 37))
    moved = [_far(t) if t.shape == (2, 37) else t for t in case.tensors()]
    got = harness.run(
        harness.on(op, backend), Case("", harness.bind(case, moved), case.kwargs), torch.bfloat16
    )
    wanted = harness.run(harness.on(op, backend), case, torch.bfloat16)
    assert all(map(torch.equal, got, wanted))


def test_far_apart_outputs(op: Op, backend: str) -> None:
    """Elementwise kernels and attention write rows that lie more than 2^31 elements apart; others
    say no."""
    device = harness.device(backend)
    if device == "cpu" and _free() < 6 << 30:
        pytest.skip("6 GiB of address space are needed")
    recorder = watch.Recorder()
    case = op.bench(Make(torch.bfloat16, device), (2, 37))
    with watch.intercepted(recorder):
        harness.run(harness.on(op, backend), case, torch.bfloat16)
    checked = 0
    for kernel, args in recorder.calls:
        written = [i for i, w in enumerate(watch.outputs(kernel)) if w]
        # As folded too: channels' sums, whose rows are as many as elements, want dense memory.
        shapes = [(2, 37), (1, 2, 37), (1, 2, 37, 1), (2, 1, 37, 1), (1, 1, 2, 37)]
        large = [i for i in written if tuple(args[i].shape) in shapes]
        if not large:
            continue  # sums over channels want dense memory
        far = [_far(torch.zeros_like(a)) if i in large else a for i, a in enumerate(args)]
        checked += 1
        dense = harness.by_rows(op) and op.family not in ("attention", "linear_attention")
        if backend == "triton" or dense:
            with pytest.raises(RuntimeError, match=r"wants dense memory"):
                kernel(*far)
            continue
        kernel(*far)
        assert all(torch.equal(far[i], args[i]) for i in written), kernel
    assert checked
