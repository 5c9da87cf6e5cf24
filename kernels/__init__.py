"""Triton kernels, installed as pydl.kernels. Importing needs Triton; `register` offers them to
torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from pydl.kernels import (
    activation,
    add_norm,
    attention,
    batch_norm,
    bias_act,
    gated_act,
    layer_norm,
    linear_attention,
    score,
)
from torch import Tensor

from pydl._native import C

_library: torch.library.Library | None = None


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of memory, in any order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _offered(name: str, function: Callable[..., None], outputs: int, gpu: bool) -> Callable:
    """The function behind an operator: dense outputs, on the tensors' device, which is not always
    the current one that Triton launches on."""

    def run(*args: Any) -> None:
        for out in args[:outputs]:
            if not (out.is_contiguous() or _dense(out)):
                raise RuntimeError(
                    f"pydl: {name}: an output has strides {out.stride()} for shape "
                    f"{tuple(out.shape)}, wants dense memory"
                )
        if gpu:
            with torch.cuda.device(args[0].device):
                function(*args)
        else:
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
    for module in (
        activation, add_norm, attention, batch_norm, bias_act, gated_act, layer_norm,
        linear_attention, score,
    ):  # fmt: skip
        for name, function in module.EXPORTS.items():
            schema = next(
                s for backend, known, s, _ in C.entries() if (backend, known) == ("cpu", name)
            )
            _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
            offered = _offered(name, function, schema.count("!"), not interpreted)
            _library.impl(name, offered, "CPU" if interpreted else "CUDA")
            _library.impl(name, lambda *args: None, "Meta")
