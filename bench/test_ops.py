"""`pytest bench --benchmark-only`: the rows of `python -m bench` as pytest-benchmark's tables.

pytest-benchmark measures one contender after the other, so that a change in the machine's load
falls on one of them; `python -m bench` interleaves them, and its ratios are the ones to quote.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from bench import rows
from bench.options import Settings, label
from pydl import use_backend
from pydl.table import TABLE


@lru_cache(maxsize=1)
def _field(settings: Settings, op: str, shape: tuple[int, ...], dtype: str) -> rows.Field:
    """A row's contenders, each judged before any is timed."""
    row = TABLE[op]
    return rows.gather(
        row, shape, rows.draw(row, shape, getattr(torch, dtype), settings.device), settings
    )


def test_op(
    settings: Settings,
    op: str,
    shape: tuple[int, ...],
    dtype: str,
    direction: str,
    contender: str,
    benchmark: Any,
) -> None:
    try:
        field = _field(settings, op, shape, dtype)
    except rows.UnfitShape as error:
        pytest.skip(str(error))
    if contender not in field.builders:
        assert contender not in field.parity, field.parity[contender]["message"]
        pytest.skip(field.absent[contender])
    benchmark.group = f"{op} {label(shape)} {dtype} {direction}"
    benchmark.name = contender
    call = rows.call(field.builders[contender], field.case, field.dys, direction)

    def run() -> None:
        call()
        if settings.device == "cuda":
            torch.cuda.synchronize()

    with torch.set_grad_enabled(direction != "forward"), use_backend(None):
        benchmark.pedantic(run, warmup_rounds=2, rounds=20)
