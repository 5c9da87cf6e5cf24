"""Runs the op table's calls on this machine and judges each against its definition in fp64."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydl import backends
from pydl.table import TABLE, Case, Op, judge, terms

KERNELS = ("cpu", "cuda", "triton")
# The largest call, in elements of its tensors together, that Triton's interpreter is given.
INTERPRETED = 20_000


class Result(NamedTuple):
    """One tensor judged: "output" or "gradient 0", whether it is right, its error and the largest
    allowed."""

    what: str
    ok: bool
    error: float
    allowed: float


@dataclass
class Expected:
    """What a call gives, (outputs…, gradients…): its definition in fp64, and native PyTorch."""

    reference: list[Tensor]
    native: list[Tensor]


def run(function: Callable[..., Any], case: Case, dtype: torch.dtype) -> list[Tensor]:
    """The outputs of a call and the gradient of every floating tensor; dy is random, of values that
    `dtype` holds."""
    tensors = [t.detach().requires_grad_(t.is_floating_point()) for t in case.tensors()]
    given = iter(tensors)
    args = (next(given) if isinstance(a, Tensor) else a for a in case.args)
    out = function(*args, **case.kwargs)
    outs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(outs[0].numel())
    dys = [
        torch.randn(out.shape, generator=generator, dtype=torch.float64)
        .to(dtype)
        .to(out.device, out.dtype)
        for out in outs
    ]
    grads = torch.autograd.grad(outs, [t for t in tensors if t.requires_grad], dys)
    return [*(out.detach() for out in outs), *grads]


def expected(op: Op, case: Case) -> Expected:
    """What `compare` measures by; to be computed once where several backends run the same call."""
    dtype = case.tensors()[0].dtype
    return Expected(run(op.reference, case.to(torch.float64), dtype), run(op.native, case, dtype))


def compare(op: Op, backend: str, case: Case, wanted: Expected | None = None) -> list[Result]:
    """Judges the output of a call, and every gradient, on a backend.

    A gradient is judged where native PyTorch's and the definition's are finite: at extreme values
    autograd's derivative of a formula may be inf - inf where the true one is finite.

    Args:
        op: A row of the table.
        backend: Who computes.
        case: A call, of the op's samples or any other.
        wanted: `expected(op, case)`, if at hand.
    """
    wanted = wanted or expected(op, case)
    dtype = case.tensors()[0].dtype
    got = run(functools.partial(op.function, backend=backend), case, dtype)
    results = []
    outputs = len(got) - sum(t.is_floating_point() for t in case.tensors())
    for i, (out, reference, native) in enumerate(
        zip(got, wanted.reference, wanted.native, strict=True)
    ):
        count = 0.0
        if i >= outputs and out.shape == reference.shape:
            count = terms(op, case, got[0], out)
            known = native.isfinite() & reference.isfinite()
            out, reference, native = out[known], reference[known], native[known]
        what = f"gradient {i - outputs}" if i >= outputs else f"output {i}" if i else "output"
        results.append(Result(what, *judge(out, reference, native, count)))
    return results


@dataclass
class Line:
    """What came of one op on one backend."""

    op: str
    backend: str
    device: str
    cases: int = 0
    left_out: int = 0
    worst: float = 0.0
    """The largest error as a share of what is allowed."""
    complaints: list[str] = field(default_factory=list)
    missing: bool = False
    """The backend has no kernels for the op."""

    def add(self, label: str, results: Sequence[Result]) -> None:
        self.cases += 1
        for one in results:
            share = one.error / one.allowed if one.allowed else float("inf") if one.error else 0.0
            self.worst = max(self.worst, share)
            if not one.ok:
                problem = f"error {one.error:.3g}, allowed {one.allowed:.3g}"
                self.complaints.append(f"{label}: {one.what}: {problem}")

    def __str__(self) -> str:
        verdict = "FAIL" if self.complaints else "ok" if self.cases else "nothing checked"
        verdict = "no kernels" if self.missing else verdict
        more = f" ({self.left_out} too large for the interpreter)" if self.left_out else ""
        return (
            f"{self.op:<12} {self.backend + ' on ' + self.device:<16} {self.cases:>4} cases  "
            f"largest error {self.worst:>5.2f} of allowed  {verdict}{more}"
        )


def _line(
    op: Op, backends_: Sequence[str], dtypes: Sequence[torch.dtype], device: str
) -> list[Line]:
    lines = {backend: Line(op.name, backend, device) for backend in backends_}
    for dtype in dtypes:
        for case in op.cases(dtype, device) if dtype in op.dtypes else ():
            label = f"{str(dtype).removeprefix('torch.')}, {case.label}"
            wanted = expected(op, case)
            large = sum(t.numel() for t in case.tensors()) > INTERPRETED
            for backend, line in lines.items():
                if large and backend == "triton" and device == "cpu":
                    line.left_out += 1
                    continue
                try:
                    line.add(label, compare(op, backend, case, wanted))
                except backends.MissingKernel:
                    line.missing = True
                except Exception as error:
                    line.cases += 1
                    line.complaints.append(f"{label}: {type(error).__name__}: {error}")
    return list(lines.values())


def check(
    ops: Sequence[str] | None = None,
    backends_: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: str | None = None,
) -> Iterator[Line]:
    """Runs the samples of the table's rows.

    Args:
        ops: Rows; None for all.
        backends_: Who is judged; None for every kernel backend available here.
        dtypes: None for every one that a row has.
        device: Where the tensors live; None for where each backend computes.

    Raises:
        ValueError: there is no such op or backend, or the device serves none.
        RuntimeError: a backend asked for is not available here.
    """
    for name in ops or ():
        if name not in TABLE:
            raise ValueError(f"pydl: check: ops has {name!r}, wants some of {', '.join(TABLE)}")
    for name in backends_ or ():
        if name not in ("torch", *KERNELS):
            raise ValueError(
                f"pydl: check: backends has {name!r}, wants some of torch, {', '.join(KERNELS)} "
                "(reference is what they are judged by)"
            )
        if why := backends.unavailable(name):
            raise RuntimeError(f"pydl: check: backend {name!r} is not available: {why}")
    chosen = backends_ or [name for name in KERNELS if backends.unavailable(name) is None]
    places: dict[str, list[str]] = {}
    for name in chosen:
        serves = backends.serves(name) or (device or "cpu",)
        kind = device.split(":")[0] if device else serves[0]
        if kind in serves or device in serves:
            places.setdefault(device or kind, []).append(name)
        elif backends_:
            raise ValueError(
                f"pydl: check: device is {device!r}, but backend {name!r} serves "
                f"{' and '.join(serves)}"
            )
    if not places:
        raise ValueError(
            f"pydl: check: device is {device!r}, which no backend available here serves"
        )
    for op in TABLE.values() if ops is None else (TABLE[name] for name in ops):
        for place, names in places.items():
            yield from _line(op, names, dtypes or op.dtypes, place)


def main(
    ops: Sequence[str] | None,
    backends_: Sequence[str] | None,
    dtypes: Sequence[torch.dtype] | None,
    device: str | None,
) -> int:
    """Prints a line per op and backend; returns the exit status: 0 where all is right and anything
    was checked."""
    cases, failed, most = 0, 0, 5
    for line in check(ops, backends_, dtypes, device):
        print(line, flush=True)
        for complaint in line.complaints[:most]:
            print(f"    {complaint}")
        if len(line.complaints) > most:
            print(f"    … and {len(line.complaints) - most} more")
        cases += line.cases
        failed += bool(line.complaints)
    for name in () if backends_ else KERNELS:
        if why := backends.unavailable(name):
            print(f"not checked: {name}: {why}")
    if not cases:
        print("pydl: check: nothing was checked", file=sys.stderr)
        return 1
    print(f"{cases} cases, " + (f"{failed} lines FAIL" if failed else "all right"))
    return 1 if failed else 0
