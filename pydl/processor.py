"""What Linux tells of this machine's processor."""

from __future__ import annotations

import platform
from pathlib import Path


def fact(field: str) -> str | None:
    """A field of the first processor in /proc/cpuinfo, such as "vendor_id", or None."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field):
            return line.partition(":")[2].strip()
    return None


def name() -> str:
    """Its model's name."""
    return fact("model name") or platform.processor() or platform.machine()
