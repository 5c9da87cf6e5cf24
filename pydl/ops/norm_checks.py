"""What the kernels of normalisations take beside an input, and torch's errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pydl import backends
from pydl.backends import FLOATS, requested


def fits(input: Tensor, weight: Tensor | None) -> bool:
    """Whether a weight's dtype is the input's, or float32 with an input of 16 bits."""
    if weight is None or weight.dtype == input.dtype:
        return True
    return weight.dtype == torch.float32 and input.dtype in FLOATS[1:3]


def choose(
    op: str,
    backend: str | None,
    input: Tensor,
    *weights: Tensor | None,
    others: tuple[Tensor, ...] = (),
    key: Callable[[str, Tensor], str] | None = None,
) -> str:
    """Who computes: as `backends.choose` has it for the input and `others`, but PyTorch where
    nobody was named and a weight is of a dtype that only PyTorch takes."""
    chosen = backends.choose(op, backend, input, *others, key=key)
    if chosen == "torch" or all(fits(input, w) for w in weights) or requested(backend) is not None:
        return chosen
    return "torch"


def check_weight(
    op: str, input: Tensor, name: str, given: Tensor, shape: tuple[int, ...], meaning: str = ""
) -> None:
    """Raises for another device, shape (told with its `meaning`) or a dtype no kernel takes."""
    if given.device != input.device:
        raise RuntimeError(
            f"pydl: {op}: {name} is on {given.device}, wants the input's device, {input.device}"
        )
    if tuple(given.shape) != shape:
        raise RuntimeError(
            f"pydl: {op}: {name} has shape {tuple(given.shape)}, wants {shape}{meaning}"
        )
    if not fits(input, given):
        raise RuntimeError(
            f"pydl: {op}: {name} has dtype {given.dtype}, wants the input's, {input.dtype}, "
            "or float32 with an input of 16 bits"
        )


def check(op: str, input: Tensor, residual: Tensor | None = None, **of_channels: Any) -> None:
    """Raises for what no kernel takes."""
    if input.dim() < 2:
        raise RuntimeError(
            f"pydl: {op}: input has shape {tuple(input.shape)}, wants (N, C) or more dimensions"
        )
    for name, given in of_channels.items():
        if given is not None:
            check_weight(op, input, name, given, (input.shape[1],), ", a value for each channel")
    check_residual(op, input, residual)


def check_residual(op: str, input: Tensor, residual: Tensor | None, promoted: bool = False) -> None:
    """`promoted`: PyTorch adds a residual of another dtype."""
    if residual is not None and (
        residual.shape != input.shape
        or (residual.dtype != input.dtype and not promoted)
        or residual.device != input.device
    ):
        raise RuntimeError(
            f"pydl: {op}: residual is {residual.dtype} {tuple(residual.shape)} on "
            f"{residual.device}, wants the input's {input.dtype} {tuple(input.shape)} on "
            f"{input.device}"
        )


def check_statistics(
    op: str, training: bool, eps: float, running_mean: Tensor | None, running_var: Tensor | None
) -> None:
    """Raises torch's errors."""
    if eps < 0 or (training and eps == 0):
        wanted = "a positive number in training" if training else "0 or more"
        raise ValueError(f"pydl: {op}: eps is {eps}, wants {wanted}")
    if training and (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"pydl: {op}: {missing} is missing, wants both estimates or none")
