"""Loads the compiled part, after checking that it was built for the torch that is running."""

from __future__ import annotations

from typing import Any

import torch

from pydl import switches

_SWITCHES = ("PYDL_CPU_LEVEL", "PYDL_POOL_BYTES")


def load() -> Any:
    """Returns `pydl._C`.

    Raises:
        ImportError: it is missing, or was built against another torch; says what to do.
        ValueError: a switch of the environment that it reads is wrong.
    """
    try:
        from pydl._built import BUILT
    except ImportError as error:
        raise ImportError(
            "pydl: the compiled extension pydl._C is missing: this folder holds the sources only. "
            "Remedy: pip install --no-build-isolation . (or -e .), or leave the source folder if "
            "pydl is installed elsewhere"
        ) from error
    check(str(BUILT["torch"]), torch.__version__)
    while True:
        try:
            from pydl import _C  # type: ignore[attr-defined]
        except ImportError as error:
            wrong = next((name for name in _SWITCHES if f"pydl: {name} is" in str(error)), None)
            if wrong is None:
                raise ImportError(
                    f"pydl: the compiled extension does not load: {error}. Remedy: build it again: "
                    "pip install --no-build-isolation --force-reinstall --no-deps ."
                ) from error
            switches.refuse(wrong, str(error))
        else:
            return _C


def check(built: str, running: str) -> None:
    """Raises ImportError unless the extension was built against the running torch."""
    if built != running:
        raise ImportError(
            f"pydl: the extension was built against torch {built}, but torch {running} is running: "
            "their C++ interfaces differ. Remedy: build it again: "
            "pip install --no-build-isolation --force-reinstall --no-deps ."
        )


C = load()
