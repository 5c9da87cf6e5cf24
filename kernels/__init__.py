"""Triton kernels, installed as pydl.kernels. Importing needs Triton; `register` offers them to
torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from pydl.kernels import activation, bias_act, gated_act

from pydl._native import C

_library: torch.library.Library | None = None


def _on_device(function: Callable[..., None]) -> Callable[..., None]:
    """Triton launches on the current device; the tensors' device is the one that is meant."""

    def run(*args: Any) -> None:
        with torch.cuda.device(args[0].device):
            function(*args)

    return run


def register() -> None:
    """Makes every function of these files an operator `torch.ops.pydl_triton.<name>`, with the
    schema of its CPU twin.

    Under TRITON_INTERPRET=1 they take CPU tensors and run in Triton's interpreter.
    """
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("pydl_triton", "DEF")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for module in (activation, bias_act, gated_act):
        for name, function in module.EXPORTS.items():
            schema = next(
                s for backend, known, s, _ in C.entries() if (backend, known) == ("cpu", name)
            )
            _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
            _library.impl(
                name,
                function if interpreted else _on_device(function),
                "CPU" if interpreted else "CUDA",
            )
            _library.impl(name, lambda *args: None, "Meta")
