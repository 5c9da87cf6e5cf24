"""The pool that large CPU outputs come from.

Mapping and clearing fresh memory takes longer than most elementwise kernels; blocks of 1 MiB and
more that pydl allocated are kept for reuse when their tensor dies, up to a cap: 1 GiB, or the
environment's `PYDL_POOL_BYTES`; 0 turns the pool off.
"""

from __future__ import annotations

from pydl._native import C


def info() -> dict[str, int]:
    """Bytes: `cap`, `cached` (waiting for reuse), `in_use`; counts: `requests`, `reused`."""
    return dict(C.pool_info())


def empty() -> None:
    """Gives all waiting memory back to the system."""
    C.pool_empty()


def set_cap(nbytes: int) -> None:
    """Sets how many bytes may wait for reuse; 0 turns the pool off.

    Raises:
        ValueError: nbytes is negative.
    """
    if nbytes < 0:
        raise ValueError(f"pydl: pool.set_cap: nbytes is {nbytes}, wants 0 or more")
    C.pool_set_cap(nbytes)
