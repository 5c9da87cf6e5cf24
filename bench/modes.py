"""Modes of the C library's allocator, and running the rows in a process that has one.

Native PyTorch maps every large output anew on the CPU, and touching fresh pages takes longer than
most pointwise kernels. `as-it-comes` is what a user gets without doing anything; `heap-reuse` tells
glibc to keep the memory that is freed, which shows what the kernels themselves are worth. Ratios
hold for one mode only.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

from bench import ROOT, apart, measure
from bench.options import Settings
from bench.rows import Row, measured
from pydl import use_backend

# No block is mapped for itself, the heap never shrinks; one arena for all threads.
HEAP_REUSE = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_ARENA_MAX": "1",
}
WORDS = {"as-it-comes": "as it comes", "heap-reuse": "heap reuse"}

Item = tuple[str, Any]


# The memory that `reuse` leaves touched, in bytes: several outputs of the largest shapes.
RESERVE = 2 << 30


def reuse() -> None:
    """Touches memory for all that follows, and makes sure that this process keeps it.

    An aligned block needs a little more than one that was freed, so that glibc would grow the heap
    again and again if the free memory were not large from the start.

    Raises:
        RuntimeError: the C library did not take the environment's word.
    """
    torch.ones(RESERVE, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(4 << 20)
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 5
    if faults > 400:
        raise RuntimeError(
            f"bench: a 16 MiB tensor takes {faults:.0f} page faults with {', '.join(HEAP_REUSE)} "
            "set: this C library is not glibc, or another allocator is loaded; remedy: "
            "--modes as-it-comes"
        )


def here(settings: Settings, mode: str) -> Iterator[Item]:
    """Measures in this process: yields ("row", row) for each, then ("ceilings", what
    `measure.ceilings` finds)."""
    with use_backend(None):
        for row in measured(settings, mode):
            yield "row", row
    yield ceilings(settings)


def ceilings(settings: Settings) -> Item:
    """What the machine does at best."""
    budget = measure.budget(settings.device, settings.quick)
    return "ceilings", measure.ceilings(settings.device, settings.dtypes, budget)


def elsewhere(settings: Settings, mode: str) -> Iterator[Item]:
    """Measures in a process of its own, as `here` does, with the environment of the mode.

    Raises:
        RuntimeError: that process failed; what it said went to stderr.
    """
    command = [sys.executable, "-m", "bench.worker"]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | HEAP_REUSE, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps({"settings": settings.to_json(), "mode": mode}))
        process.stdin.close()
        try:
            for line in process.stdout:
                kind, content = json.loads(line)
                yield kind, content
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise RuntimeError(f"bench: {' '.join(command)} ended with status {process.returncode}")


def run(settings: Settings, mode: str) -> Iterator[Item]:
    """The rows of a mode, and the machine's ceilings in it."""
    if settings.device == "cuda":
        return apart.run(settings)
    return (elsewhere if mode == "heap-reuse" else here)(settings, mode)


def skipped(row: Row) -> bool:
    return "skipped" in row
