"""Which numbers torch takes for an int argument."""

from __future__ import annotations

from typing import Any


def is_integer(value: Any) -> bool:
    """Whether it is an int, or stands for one as numpy's do; a bool and a float do not."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or hasattr(value, "__index__")
