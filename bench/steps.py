"""Who is at work on the device, so that what breaks or hangs it is known by name."""

from __future__ import annotations

from collections.abc import Callable

import torch


def brief(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


class Broken(RuntimeError):
    """The device takes no more work from this process."""


class Steps:
    """Is told who comes next, and waits for the device after it."""

    def __init__(self, device: str, tell: Callable[[str], None] = lambda who: None) -> None:
        self._device, self.begin = device, tell

    def settle(self) -> None:
        """
        Raises:
            Broken: the device does.
        """
        if self._device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise Broken(brief(error)) from error
