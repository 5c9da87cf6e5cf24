"""bf16 attention on the CPU by products of pairs: the processor's own, and what stands for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from pydl import functional as F
from pydl import processor
from pydl._native import C
from pydl.table import TABLE
from tests import harness

BF16 = torch.bfloat16
# The processor's own instruction, and others in its place.
OWN, OTHERS = 1, 2
HAS = "avx512_bf16" in (processor.fact("flags") or "").split()
pytestmark = pytest.mark.skipif(C.cpu_level() != "avx512", reason="pairs need AVX-512")


@contextmanager
def mode(number: int) -> Iterator[None]:
    if number == OWN and not HAS:
        pytest.skip("this processor has no VDPBF16PS")
    before = C.set_dot_mode(number)
    try:
        yield
    finally:
        C.set_dot_mode(before)


@pytest.mark.parametrize("number", [OWN, OTHERS])
@pytest.mark.parametrize("name", ["scaled_dot_product_attention", "local_attention"])
def test_samples(name: str, number: int) -> None:
    """The table's, by the table's judge, whatever the threads."""
    op, complaints, differs = TABLE[name], [], 0
    threads = torch.get_num_threads()
    for i, case in enumerate(op.cases(BF16)):
        how = harness.DY[i % len(harness.DY)]
        with mode(number):
            found = []
            for count in (1, 3):
                torch.set_num_threads(count)
                found.append(harness.run(harness.on(op, "cpu"), case, BF16, how))
            torch.set_num_threads(threads)
        assert all(map(harness.same_bits, *found)), case.label
        with mode(0):
            plain = harness.run(harness.on(op, "cpu"), case, BF16, how)
        differs += not all(map(harness.same_bits, found[0], plain))
        got = harness.compare(found[0], op, case, BF16, how)
        complaints += [f"{case.label} (dy {how}): {one}" for one in got]
    assert not complaints, harness.summary(complaints)
    assert differs, "no sample ran by pairs"


def _both_ways(
    backend: str, given: list[torch.Tensor], dy: torch.Tensor, options: dict[str, Any]
) -> list[torch.Tensor]:
    leaves = [t.clone().requires_grad_() for t in given]
    out = F.scaled_dot_product_attention(*leaves, **options, backend=backend)
    return [out, *torch.autograd.grad(out, leaves, dy.to(out.dtype))]


@pytest.mark.parametrize("number", [OWN, OTHERS])
@pytest.mark.parametrize("scale", [None, 0.3, 2.0])
@pytest.mark.parametrize("queries", [5, 96, 97, 301])
def test_odd_sizes(queries: int, scale: float | None, number: int) -> None:
    """Widths and lengths that pairs and registers do not divide; windows that begin at odd keys."""
    draw = torch.Generator().manual_seed(queries)
    for width, value_width, window in ((17, 33, None), (64, 64, (3, 6)), (1, 1, (130, 0))):
        shapes = ((2, 4, queries, width), (2, 2, 259, width), (2, 2, 259, value_width))
        given = [torch.randn(s, generator=draw).to(BF16) for s in shapes]
        dy = torch.randn(2, 4, queries, value_width, generator=draw).to(BF16)

        options = {"scale": scale, "enable_gqa": True, "window": window}
        with mode(number):
            found = _both_ways("cpu", given, dy, options)
        with mode(0):
            plain = _both_ways("cpu", given, dy, options)
        wanted = _both_ways("reference", [t.detach().double() for t in given], dy, options)
        for one, other, want in zip(found, plain, wanted, strict=True):
            error, least = ((t.double() - want).abs().max().item() for t in (one, other))
            assert error <= 2 * least + 0.004 * want.abs().max().item()


def test_what_stands_for_it_is_the_same() -> None:
    """But for how the sums of two terms are rounded."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 200, 64, generator=draw).to(BF16) for _ in range(3))
    found = []
    for number in (OWN, OTHERS):
        with mode(number):
            found.append(F.scaled_dot_product_attention(q, k, v, backend="cpu").float())
    torch.testing.assert_close(*found, rtol=0.01, atol=1e-3)


def test_an_instruction_that_is_missing() -> None:
    if HAS:
        pytest.skip("this processor has VDPBF16PS")
    with pytest.raises(RuntimeError, match="no VDPBF16PS"):
        C.set_dot_mode(OWN)
