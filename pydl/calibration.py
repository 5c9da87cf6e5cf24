"""From which size on a kernel beats native PyTorch, as measured: `python -m bench --calibrate`
rewrites it.

The table ships as `calibration.json`; the environment's `PYDL_CALIBRATION` names another file. Its
form: {part: {op: {dtype: [backend, elements, elements with gradient]}}}; a size of -1 means never.
A part is a type of device, or `kind` of one, which comes before: what native PyTorch takes depends
on who made the processor, because the libraries that it calls do.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import warnings
from pathlib import Path

import torch

from pydl import processor, switches
from pydl._native import C

NEVER = 1 << 62
Limits = tuple[str, int, int]


@functools.cache
def kind(device: str) -> str:
    """The part of the table that a measurement on this machine's device of a type goes to."""
    if device != "cpu":
        return device
    vendor = processor.fact("vendor_id") or platform.machine()
    return f"cpu {vendor} {C.cpu_level()}"


def file() -> Path:
    """Where the table is, or is to be."""
    return Path(os.environ.get("PYDL_CALIBRATION") or Path(__file__).with_name("calibration.json"))


def read() -> dict[tuple[str, str, torch.dtype], Limits]:
    """The table by (device type, op, dtype); empty, with a warning, where there is no file.

    Raises:
        ValueError: the file is not such a table.
    """
    path = file()
    table: dict[tuple[str, str, torch.dtype], Limits] = {}
    if not path.exists():
        warnings.warn(
            f"pydl: PYDL_CALIBRATION is {path}, which is not there: native PyTorch computes what "
            "names no backend; python -m bench --calibrate writes the file",
            stacklevel=2,
        )
        return table
    try:
        parts = json.loads(path.read_text())["sizes"]
        for part in sorted(parts, key=len):  # a kind's after its type's
            device, ops = part.split(" ")[0], parts[part]
            if part not in (device, kind(device)):
                continue
            for op, dtypes in ops.items():
                for dtype, (backend, forward, backward) in dtypes.items():
                    sizes = [NEVER if n < 0 else int(n) for n in (forward, backward)]
                    table[device, op, getattr(torch, dtype)] = (backend, sizes[0], sizes[1])
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"pydl: {path} is not a calibration table ({error!r}); remedy: remove it, and "
            "python -m bench --calibrate"
        ) from error
    return table


try:
    _table = read()
except ValueError as error:
    switches.refuse("PYDL_CALIBRATION", str(error))
    _table = read()


def _smallest() -> int:
    return min((n for _, *sizes in _table.values() for n in sizes), default=NEVER)


smallest = _smallest()  # below this many elements nothing beats native PyTorch


def limits(device: str, op: str, dtype: torch.dtype) -> Limits | None:
    """(backend, smallest size, smallest size with gradient), or None where nothing was measured."""
    return _table.get((device, op, dtype))


def reload() -> None:
    """Reads the file again."""
    global _table, smallest
    _table = read()
    smallest = _smallest()
