"""The environment's switches that are wrong. They end the import, but for `python -m pydl info`,
which does without them and names them."""

from __future__ import annotations

import os
import sys

refused: dict[str, str] = {}
"""What is wrong with a switch, by its name."""


def _informs() -> bool:
    """Whether `python -m pydl info` is what runs."""
    words = sys.orig_argv
    return any(words[i : i + 3] == ["-m", "pydl", "info"] for i in range(len(words)))


def refuse(name: str, why: str) -> None:
    """Takes a switch out of the environment and keeps why.

    Raises:
        ValueError: with the reason, unless `python -m pydl info` runs.
    """
    if not _informs():
        raise ValueError(why)
    refused[name] = f"{os.environ.pop(name, '')!r} is left out: {why.removeprefix('pydl: ')}"
