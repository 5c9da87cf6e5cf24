"""The pool of large CPU outputs: it reuses memory, keeps to its cap and never shows."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pydl import functional, pool
from tests import harness

MIB = 1 << 20
LARGE = 3 * MIB // 4  # elements of fp32 that take 3 MiB


@pytest.fixture(autouse=True)
def _empty_pool() -> Iterator[None]:
    """Every test begins with nothing waiting, and leaves the cap as it was."""
    gc.collect()
    cap = pool.info()["cap"]
    pool.empty()
    yield
    pool.set_cap(cap)
    pool.empty()


def _call(x: torch.Tensor) -> torch.Tensor:
    return functional.relu(x, backend="cpu")


def test_memory_is_reused() -> None:
    """The block of a tensor that died serves the next one."""
    x = torch.randn(LARGE)
    before = pool.info()
    y = _call(x)
    place = y.data_ptr()
    during = pool.info()
    assert during["in_use"] - before["in_use"] >= 3 * MIB and during["cached"] == 0
    del y
    after = pool.info()
    assert after["in_use"] == before["in_use"] and after["cached"] >= 3 * MIB
    y = _call(x)
    assert y.data_ptr() == place
    assert (
        pool.info()["reused"] == before["reused"] + 1
        and pool.info()["requests"] == before["requests"] + 2
    )
    assert torch.equal(y, x.clamp(min=0))


def test_forward_and_backward_come_from_it() -> None:
    """Large outputs and gradients do, small ones do not."""
    before = pool.info()["requests"]
    x = torch.randn(LARGE, requires_grad=True)
    functional.gelu(x, backend="cpu").sum().backward()
    assert pool.info()["requests"] == before + 2
    small = torch.randn(100, requires_grad=True)
    functional.gelu(small, backend="cpu").sum().backward()
    assert pool.info()["requests"] == before + 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_layouts(dtype: torch.dtype) -> None:
    """What comes from it has the strides that torch gives."""
    x = torch.randn(8, 64, 48, 72).to(dtype)
    before = pool.info()["requests"]
    inputs = [
        x,
        x.to(memory_format=torch.channels_last),
        x.transpose(1, 3),
        x[:, ::2],
        x[:1].expand(9, 64, 48, 72),
    ]
    for given in inputs:
        got, wanted = _call(given), torch.relu(given)
        assert harness.strides(got) == harness.strides(wanted) and torch.equal(got, wanted)
    assert pool.info()["requests"] == before + len(inputs)


def test_tensors_survive() -> None:
    """Memory goes back only when the last tensor that sees it is gone; none is handed out twice."""
    x = torch.randn(LARGE)
    kept = [_call(x + i) for i in range(6)]
    view = kept.pop()[10:20]
    wanted = view.clone()
    assert len({y.data_ptr() for y in kept}) == 5
    for _ in range(20):
        _call(x - 100)
    pool.empty()
    for i, y in enumerate(kept):
        assert torch.equal(y, (x + i).clamp(min=0))
    assert torch.equal(view, wanted)


def test_cap() -> None:
    """No more than the cap waits; what is over goes back."""
    x = torch.randn(LARGE)
    pool.set_cap(9 * MIB)
    kept = [_call(x) for _ in range(8)]
    del kept
    assert 0 < pool.info()["cached"] <= 9 * MIB
    pool.set_cap(4 * MIB)
    assert pool.info()["cached"] <= 4 * MIB
    pool.empty()
    assert pool.info()["cached"] == 0 and pool.info()["cap"] == 4 * MIB


def test_off() -> None:
    """With a cap of 0 torch's own allocator serves, and what was out finds its way back."""
    x = torch.randn(LARGE)
    y = _call(x)
    pool.set_cap(0)
    before = pool.info()["requests"]
    assert torch.equal(_call(x), y) and pool.info()["requests"] == before
    del y
    assert pool.info()["cached"] == 0


def test_off_by_the_environment() -> None:
    """PYDL_POOL_BYTES sets the cap, 0 turns the pool off."""
    code = """
import torch
from pydl import functional, pool
functional.relu(torch.ones(1 << 21), backend="cpu")
print(pool.info()["cap"], pool.info()["requests"])
"""
    assert harness.python(code, PYDL_POOL_BYTES="0").stdout.split() == ["0", "0"]
    assert harness.python(code, PYDL_POOL_BYTES="12345678").stdout.split() == ["12345678", "1"]


@pytest.mark.parametrize("text", ["abc", "1e9", "-1", "12 ", "9" * 20])
def test_a_cap_of_the_environment_that_is_none(text: str) -> None:
    """It is refused at import, by name."""
    done = harness.python("import pydl", PYDL_POOL_BYTES=text)
    assert done.returncode != 0
    assert f"ValueError: pydl: PYDL_POOL_BYTES is {text}, wants a number of bytes" in done.stderr


def test_an_empty_switch_is_none() -> None:
    done = harness.python("from pydl import pool; print(pool.info()['cap'])", PYDL_POOL_BYTES="")
    assert done.stdout.split() == [str(1 << 30)]


def test_wrong_cap() -> None:
    with pytest.raises(ValueError, match="nbytes is -1"):
        pool.set_cap(-1)


def test_sizes_that_differ() -> None:
    """A block serves a request it fits, not one that would waste most of it."""
    large = torch.randn(16 * MIB)
    y = _call(large)
    del y
    before = pool.info()["reused"]
    small = _call(large[:LARGE])
    assert pool.info()["reused"] == before and torch.equal(small, large[:LARGE].clamp(min=0))
    again = _call(large[: 15 * MIB])
    assert pool.info()["reused"] == before + 1 and torch.equal(
        again, large[: 15 * MIB].clamp(min=0)
    )


def test_resizing() -> None:
    """A tensor of the pool grows, shrinks, is shared and moved like any other."""
    x = torch.randn(LARGE)
    y = _call(x)
    wanted = y.clone()
    y.resize_(2 * LARGE)
    assert torch.equal(y[:LARGE], wanted)
    y[LARGE:] = 1
    y.resize_(100)
    assert torch.equal(y, wanted[:100])
    y.untyped_storage().resize_(0)
    z = _call(x)
    z.set_(wanted.clone())
    z = _call(x).share_memory_()
    assert z.is_shared() and torch.equal(z, wanted)


def test_threads() -> None:
    """Requests and returns from several threads at once: right results, right numbers."""
    before = pool.info()

    def work(i: int) -> bool:
        x = torch.full((LARGE + 1000 * i,), float(i + 1))
        right = True
        for _ in range(25):
            y = _call(x)
            z = _call(-x)
            right = right and bool((y == i + 1).all()) and not bool(z.any())
        return right

    torch.set_num_threads(1)
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(8)))
    gc.collect()
    after = pool.info()
    assert after["in_use"] == before["in_use"]
    assert after["requests"] - before["requests"] == 8 * 25 * 2
    assert after["cached"] <= after["cap"]


def test_memory_may_die_in_another_thread() -> None:
    """A tensor made here and freed elsewhere gives its block back."""
    made = [_call(torch.randn(LARGE)) for _ in range(4)]
    with ThreadPoolExecutor(1) as threads:
        threads.submit(made.clear).result()
    assert pool.info()["cached"] >= 12 * MIB


def test_alignment() -> None:
    """Blocks begin where vectors and cache lines do."""
    assert all(_call(torch.randn(LARGE + i)).data_ptr() % 64 == 0 for i in range(5))
