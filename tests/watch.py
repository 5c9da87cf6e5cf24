"""Watches kernels at work: what they are called with, what they write and what they must not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pydl import backends
from tests.harness import same_bits


@contextmanager
def intercepted(wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Every kernel that an op asks for passes through `wrap` first."""
    original = backends.kernel
    modules = [
        module for name, module in list(sys.modules.items())
        if name.startswith("pydl.") and getattr(module, "kernel", None) is original
    ]  # fmt: skip
    assert modules
    for module in modules:
        module.kernel = lambda backend, name: wrap(original(backend, name))
    try:
        yield
    finally:
        for module in modules:
            module.kernel = original


def outputs(kernel: Any) -> list[bool]:
    """Which arguments an operator writes."""
    return [a.alias_info is not None and a.alias_info.is_write for a in kernel._schema.arguments]


# What memory holds before a kernel writes it: the bits of a NaN, and of an ordinary number.
_POISON = {
    8: (torch.int64, 0x7FF8DEADBEEFDEAD, -0x3F0123456789ABCD),
    4: (torch.int32, 0x7FC0BEEF, -0x38BABCDF),
    2: (torch.int16, 0x7FDE, -0x3855),
    1: (torch.uint8, 0xA5, 0x5A),
}


class Guard:
    """Runs kernels on outputs that are poisoned and lie inside of larger poisoned memory.

    Args:
        poison: 0 for NaN, 1 for a number. What is left unwritten differs between the two.
        shift: Elements by which outputs are moved from where vectors are aligned.
    """

    def __init__(self, poison: int = 0, shift: int = 0) -> None:
        self.poison, self.shift = poison, shift
        self.complaints: list[str] = []
        self.calls = 0

    def __call__(self, kernel: Any) -> Callable[..., None]:
        def call(*args: Any) -> None:
            self.calls += 1
            written = outputs(kernel)
            inside: dict[int, tuple[Tensor, Tensor]] = {}
            for i, arg in enumerate(args):
                if written[i] and arg is not None:
                    inside[i] = self._embed(arg)
            given, watched = list(args), []
            for i, arg in enumerate(args):
                if i in inside:
                    given[i] = inside[i][1]
                elif isinstance(arg, Tensor):
                    twins = [
                        k for k in inside if args[k].data_ptr() == arg.data_ptr() and arg.numel()
                    ]
                    if twins:  # in place
                        given[i] = inside[twins[0]][1].copy_(arg)
                    else:
                        watched.append((i, arg, arg.detach().clone(), arg._version))
            kernel(*given)
            for i, arg, before, version in watched:
                if arg._version != version or not same_bits(arg, before):
                    self.complaints.append(f"{kernel} changes argument {i}, which is an input")
            for i, (buffer, view) in inside.items():
                result = view.clone()
                bits_of = buffer.view(_POISON[view.element_size()][0])
                bits_of.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(
                    self._pattern(view)
                )
                if (bits_of != self._pattern(view)).any():
                    self.complaints.append(f"{kernel} writes outside of argument {i}")
                args[i].copy_(result)

        return call

    def _pattern(self, tensor: Tensor) -> int:
        return _POISON[tensor.element_size()][1 + self.poison]

    def _embed(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """(a poisoned buffer, a view of it that looks like the tensor)."""
        integer = _POISON[tensor.element_size()][0]
        spans = [(n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
        extent = sum(spans) + 1 if tensor.numel() else 0
        margin = 1024
        buffer = torch.full(
            (extent + 2 * margin,), self._pattern(tensor), dtype=integer, device=tensor.device
        ).view(tensor.dtype)
        offset = margin + self.shift
        return buffer, buffer.as_strided(tensor.shape, tensor.stride(), offset)


class Recorder:
    """Remembers the calls of kernels: (operator, arguments)."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __call__(self, kernel: Any) -> Callable[..., None]:
        def call(*args: Any) -> None:
            kept = [a.detach() if isinstance(a, Tensor) else a for a in args]
            self.calls.append((kernel, tuple(kept)))
            kernel(*args)

        return call
