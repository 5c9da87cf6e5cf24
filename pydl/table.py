"""The op table: one row per op. Tests, checks, benchmarks and the README loop over it.

To add an op is to register a row here (from `pydl/ops/<family>.py`), with a formula and kernels.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "transposed", "channels_last", "sliced", "expanded", "offset")


@dataclass(frozen=True)
class Case:
    """One call of an op: positional arguments (tensors first) and keywords."""

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        return [a for a in self.args if isinstance(a, Tensor)]

    def to(self, dtype: torch.dtype) -> Case:
        """The same call with every floating tensor in another dtype, strides kept."""
        moved = (
            a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in self.args
        )
        return Case(self.label, tuple(moved), self.kwargs)


class Make:
    """Draws tensors for samples: the same ones each time, in any layout."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu", seed: str = "") -> None:
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))

    def __call__(self, *shape: int, scale: float = 2.0, layout: str = "contiguous") -> Tensor:
        """Normal values of the given spread, in a layout of `LAYOUTS`."""
        full = list(shape)
        if layout == "sliced" and shape:
            full[-1] = 2 * shape[-1] + 1
        if layout == "transposed":
            full.reverse()
        if layout == "expanded" and shape:
            full[0] = 1
        if layout == "offset":
            full = [max(1, int(torch.Size(shape).numel())) + 1]
        drawn = torch.randn(full, generator=self._generator, dtype=torch.float64) * scale
        tensor = drawn.to(self.dtype).to(self.device)
        if layout == "sliced" and shape:
            tensor = tensor[..., 1::2][..., : shape[-1]]
        elif layout == "transposed":
            tensor = tensor.permute(*reversed(range(len(shape)))) if shape else tensor
        elif layout == "expanded" and shape:
            tensor = tensor.expand(shape)
        elif layout == "offset":
            tensor = tensor[1 : 1 + torch.Size(shape).numel()].view(shape)
        elif layout == "channels_last":
            tensor = tensor.to(memory_format=torch.channels_last) if len(shape) == 4 else tensor
        return tensor

    def of(self, values: Iterable[float]) -> Tensor:
        """The values themselves."""
        return torch.tensor(list(values), dtype=torch.float64).to(self.dtype).to(self.device)


@dataclass(frozen=True)
class Cost:
    """The least that a call moves and computes: bytes and floating-point operations."""

    forward_bytes: int
    backward_bytes: int
    forward_flops: int = 0
    backward_flops: int = 0


Sized = Callable[[int], Iterable[tuple[int, ...]]]
"""Shapes of about so many elements."""


def _rows_of_1024(elements: int) -> list[tuple[int, ...]]:
    return [(max(1, elements // 1024), min(elements, 1024))]


@dataclass(frozen=True)
class Op:
    """A row.

    Attributes:
        name: The public function's name in `pydl.functional`.
        family: The stem that names its files.
        function: The public function; takes `backend=`. Returns a tensor, or a tuple of some.
        reference: The plain definition, called with the same arguments without `backend`.
        native: What a user of torch would call instead, with the same arguments.
        samples: Draws the calls that every test and check loops over.
        bench: Builds the benchmark's call for a shape.
        bench_shapes: The shapes measured by default; the first is the one that charts show.
        cost: The floor of such a call.
        autocast: "keep" computes in the input's dtype under autocast, "lower" in autocast's.
        dtypes: What the kernels take.
        sized: Shapes for `bench` of about so many elements, unlike each other: a kernel is chosen
            from a size on where it wins on all of them.
        apart: The same for calls that are measured by themselves, by the key of their measurement.
        variants: Other calls to measure, made from that of `bench`, by name. A kernel is chosen
            where it wins on "full" as well.
    """

    name: str
    family: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    native: Callable[..., Any]
    samples: Callable[[Make], Iterable[Case]]
    bench: Callable[[Make, tuple[int, ...]], Case]
    bench_shapes: tuple[tuple[int, ...], ...]
    cost: Callable[[Case], Cost]
    autocast: str = "keep"
    dtypes: tuple[torch.dtype, ...] = (
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
    )
    sized: Sized = _rows_of_1024
    apart: Mapping[str, Sized] = field(default_factory=dict, hash=False)
    variants: Mapping[str, Callable[[Case], Case]] = field(default_factory=dict, hash=False)

    @property
    def schema(self) -> str:
        """The public signature."""
        return f"{self.name}{inspect.signature(self.function)}"

    @property
    def doc(self) -> str:
        """The first line of the documentation."""
        return (self.function.__doc__ or "").strip().split("\n")[0]

    def cases(self, dtype: torch.dtype, device: str = "cpu") -> list[Case]:
        return list(self.samples(Make(dtype, device, self.name)))


TABLE: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Adds a row."""
    if op.name in TABLE:
        raise ValueError(f"pydl: the table has an op {op.name!r} already")
    TABLE[op.name] = op
    return op


# Families whose gradients sum over a sequence.
ATTENTION = ("attention", "linear_attention", "score")


def terms(op: Op, case: Case, out: Tensor, grad: Tensor) -> float:
    """How many terms were added for each element of a gradient, about; `judge` asks for it."""
    count = out.numel() / max(1, grad.numel())
    if op.family not in ATTENTION or case.args[0].dim() < 2:
        return count
    queries = float(case.args[0].shape[-2])
    if op.family == "score" and grad.dim() < 3:
        # A parameter's: of every score.
        return queries * case.args[1].shape[-2] * prod(case.args[0].shape[:-2])
    return max(count, queries)


def judge(
    out: Tensor, reference: Tensor, same: Tensor, terms: float = 0.0
) -> tuple[bool, float, float]:
    """Whether a result is right: (it is, its largest error, the largest error allowed).

    The error is measured against the definition in fp64 and may be twice that of native PyTorch in
    the same dtype, plus one unit of the last place of the largest value (sixteen in fp64, where the
    reference is rounded itself). A gradient that sums many terms may be off by four units, because
    that is what each term may be off by, and of the spread that such a sum of terms of order one
    has where that is larger: a single sum may come out near zero, and native PyTorch close to it by
    luck. Where the reference is not finite the result must be the same.

    Args:
        out: What is judged.
        reference: The definition's result in fp64.
        same: Native PyTorch's result in the dtype of `out`.
        terms: How many terms were added for each element of a gradient; 0 for a value.
    """
    if out.shape != reference.shape or out.dtype != same.dtype:
        return False, float("inf"), 0.0
    got, want, native = out.double().cpu(), reference.double().cpu(), same.double().cpu()
    info = torch.finfo(out.dtype)
    # What overflows the dtype is infinite in it; what native PyTorch loses to inf - inf is not held
    # against us.
    want = torch.where(want.abs() > info.max, want.sign() * float("inf"), want)
    odd = ~want.isfinite()
    if not torch.equal(got[odd].nan_to_num(7.0), want[odd].nan_to_num(7.0)):
        return False, float("inf"), 0.0
    if odd.all():
        return True, 0.0, 0.0
    got, want, native = got[~odd], want[~odd], native[~odd]
    native_error = (native - want).abs()
    native_error = native_error[native_error.isfinite()]
    units = 16 if out.dtype == torch.float64 else 1
    units = max(units, 4 if terms > 1 else 1)
    tiny = units * info.eps * max(want.abs().max().item(), terms**0.5)
    tiny += info.smallest_normal * info.eps
    allowed = 2 * (native_error.max().item() if native_error.numel() else 0.0) + tiny
    error = (got - want).abs().max().item()
    return error <= allowed, error, allowed
