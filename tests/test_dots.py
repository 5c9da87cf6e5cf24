"""bf16 attention on the CPU by products of pairs and of tile registers: the processor's own, and
what stands for them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pydl import functional as F
from pydl import processor
from pydl._native import C
from pydl.table import TABLE
from tests import harness

BF16 = torch.bfloat16
# The processor's own instruction, and others in its place; the same for tile registers.
OWN, OTHERS, TILES, OTHER_TILES = "own", "others", "tiles", "other tiles"
MODES = {OWN: (1, 0), OTHERS: (2, 0), TILES: (1, 1), OTHER_TILES: (2, 2)}
FLAGS = (processor.fact("flags") or "").split()
HAS = "avx512_bf16" in FLAGS
pytestmark = pytest.mark.skipif(C.cpu_level() != "avx512", reason="pairs need AVX-512")


@contextmanager
def mode(name: str | None) -> Iterator[None]:
    """Products of bf16 by this; None: by fp32's."""
    if name in (OWN, TILES) and not HAS:
        pytest.skip("this processor has no VDPBF16PS")
    if name == TILES and "amx_bf16" not in FLAGS:
        pytest.skip("this processor has no AMX-BF16")
    dots, tiles = MODES[name] if name else (0, 0)
    before = C.set_dot_mode(dots), C.set_tile_mode(tiles)
    try:
        yield
    finally:
        C.set_dot_mode(before[0])
        C.set_tile_mode(before[1])


@pytest.mark.parametrize("number", MODES)
@pytest.mark.parametrize("name", ["scaled_dot_product_attention", "local_attention"])
def test_samples(name: str, number: str) -> None:
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
        with mode(None):
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


@pytest.mark.parametrize("number", MODES)
@pytest.mark.parametrize("scale", [None, 0.3, 2.0])
@pytest.mark.parametrize("queries", [5, 96, 97, 301])
def test_odd_sizes(queries: int, scale: float | None, number: str) -> None:
    """Widths and lengths that pairs and registers do not divide; windows that begin at odd keys."""
    draw = torch.Generator().manual_seed(queries)
    for width, value_width, window in ((17, 33, None), (64, 64, (3, 6)), (1, 1, (130, 0))):
        shapes = ((2, 4, queries, width), (2, 2, 259, width), (2, 2, 259, value_width))
        given = [torch.randn(s, generator=draw).to(BF16) for s in shapes]
        dy = torch.randn(2, 4, queries, value_width, generator=draw).to(BF16)

        options = {"scale": scale, "enable_gqa": True, "window": window}
        with mode(number):
            found = _both_ways("cpu", given, dy, options)
        with mode(None):
            plain = _both_ways("cpu", given, dy, options)
        wanted = _both_ways("reference", [t.detach().double() for t in given], dy, options)
        for one, other, want in zip(found, plain, wanted, strict=True):
            error, least = ((t.double() - want).abs().max().item() for t in (one, other))
            assert error <= 2 * least + 0.004 * want.abs().max().item()


@pytest.mark.parametrize("pair", [(OWN, OTHERS), (OWN, OTHER_TILES), (TILES, OTHER_TILES)])
def test_what_stands_for_it_is_the_same(pair: tuple[str, str]) -> None:
    """But for how the sums of two terms are rounded."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 200, 64, generator=draw).to(BF16) for _ in range(3))
    found = []
    for number in pair:
        with mode(number):
            found.append(F.scaled_dot_product_attention(q, k, v, backend="cpu").float())
    torch.testing.assert_close(*found, rtol=0.01, atol=1e-3)


# Memory that is asked for by this name holds NaN.
_POISON = """
#include <stdlib.h>
#include <string.h>
void* aligned_alloc(size_t alignment, size_t n) {
  void* p = NULL;
  return posix_memalign(&p, alignment, n) ? NULL : memset(p, 0xff, n);
}
"""
_WINDOWS = """
import itertools
import torch
from pydl import functional as F
from pydl._native import C

draw = torch.Generator().manual_seed(0)
for tiles, (left, right), keys, queries in itertools.product(
    (0, 2), ((0, 0), (2, 3), (-1, 0)), (1, 17, 130), (5, 32, 64, 96, 128)
):
    C.set_tile_mode(tiles)
    shapes = ((1, 2, queries, 8), (1, 1, keys, 8), (1, 1, keys, 3))
    given = [torch.randn(s, generator=draw).bfloat16().requires_grad_() for s in shapes]
    for side in ("top_left", "bottom_right"):
        out = F.scaled_dot_product_attention(
            *given, enable_gqa=True, window=(left, right), causal_alignment=side, backend="cpu"
        )
        for one in (out, *torch.autograd.grad(out.sum(), given)):
            assert one.isfinite().all(), (tiles, left, right, keys, queries, side)
"""


def test_what_memory_held_before(tmp_path: Path) -> None:
    """Rows that no product of pairs is full of are padded by zeros, not by what was there."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or processor.fact("flags") is None:
        pytest.skip("no C compiler for Linux")
    source, library = tmp_path / "poison.c", tmp_path / "poison.so"
    source.write_text(_POISON)
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    done = harness.python(_WINDOWS, LD_PRELOAD=str(library))
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump shows the code")
def test_tile_instructions() -> None:
    """A sum is of its row of left registers and its column of right ones; each is loaded."""
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", C.__file__],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    dots = set(re.findall(r"tdpbf16ps %tmm(\d),%tmm(\d),%tmm(\d)", text))
    wide = {(str(6 + j), str(4 + i), str(2 * i + j)) for i in range(2) for j in range(2)}
    tall = {("6", str(4 + i), str(i)) for i in range(2)}
    assert dots == wide | tall
    assert set(re.findall(r"tileloadd .*%tmm(\d)", text)) == set("01234567")
    assert set(re.findall(r"tilestored %tmm(\d)", text)) == set("0123")


def test_an_instruction_that_is_missing() -> None:
    if HAS:
        pytest.skip("this processor has VDPBF16PS")
    with pytest.raises(RuntimeError, match="no VDPBF16PS"):
        C.set_dot_mode(1)


def test_registers_that_are_missing() -> None:
    if "amx_bf16" in FLAGS:
        pytest.skip("this processor has AMX-BF16")
    with pytest.raises(RuntimeError, match="no AMX-BF16"):
        C.set_tile_mode(1)
