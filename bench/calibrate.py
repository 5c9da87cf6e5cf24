"""`python -m bench --calibrate`: from which size on a kernel beats native PyTorch, for the
automatic choice.

Every op is measured over sizes, forward under no_grad and forward with backward, as a user calls
it: through the public function, against native PyTorch, interleaved. A kernel is taken from the
smallest size on at which it is faster by 3 % (geometric mean over the row's shapes of that size),
if at that and every larger size it is slower on none of them; close calls are measured twice. The
sizes of 16 and 64 million elements are measured on one shape, and not for attention; products are
measured to a million, from which on they grow alike. The result replaces the part of
`pydl/calibration.json`, or of the file that `PYDL_CALIBRATION` names, for this kind of device and
leaves the others alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress

from bench import machine
from bench.measure import Budget, interleaved
from bench.options import KERNELS, Settings
from bench.parity import several
from bench.report import geometric_mean
from pydl import backends, calibration
from pydl.table import ATTENTION, TABLE, Case, Make, Op, Sized

DTYPES = ("float32", "bfloat16", "float16")  # fp64 stays native
SIZES = tuple(4**k for k in range(5, 14))  # from 1 thousand to 64 million
LARGE = 4**12  # sizes from here on are measured on one shape
# Families of many operations an element: how many elements are enough to know.
MOST = dict.fromkeys(ATTENTION, LARGE - 1) | {"product": 1 << 20}
GAIN, EVEN = 1.03, 0.98
BUDGET = Budget(seconds=0.05, rounds=5, sample=1e-4, most=40)
LONG = Budget(seconds=0.0, rounds=3, sample=0.0, most=3)
QUICK = Budget(seconds=0.01, rounds=3, sample=1e-5, most=5)

Adapt = Callable[[Case], Case]


def _same(case: Case) -> Case:
    return case


class Key(NamedTuple):
    """What `choose` is asked about, and the calls that decide it."""

    name: str
    op: Op
    adapts: tuple[Adapt, ...]
    sized: Sized


def entries() -> Iterator[Key]:
    """The ops, what they have measured apart, and two that one function serves by other kernels."""
    for op in TABLE.values():
        full = [op.variants["full"]] if "full" in op.variants else []
        yield Key(op.name, op, (_same, *full), op.sized)
        for name, sized in op.apart.items():
            yield Key(name, op, (_same,), sized)
    gelu, swish = TABLE["gelu"], TABLE["swish"]
    yield Key(
        "gelu_tanh", gelu, (lambda case: Case(case.label, (case.args[0], "tanh")),), gelu.sized
    )
    yield Key(
        "swish_learnt",
        swish,
        (lambda case: Case(case.label, (case.args[0], case.args[0].new_full((1,), 1.5))),),
        swish.sized,
    )


def ratio(op: Op, case: Case, backend: str, grad: bool, budget: Budget) -> float:
    """Native PyTorch's time by the kernel's."""
    device = case.args[0].device.type
    args = [
        a.detach().requires_grad_(grad) if isinstance(a, torch.Tensor) else a for a in case.args
    ]
    wanted = [a for a in args if isinstance(a, torch.Tensor)]
    with torch.no_grad():
        dys = [torch.ones_like(out) for out in several(op.native(*args, **case.kwargs))]

    def call(function: Callable[..., Any], **more: Any) -> Callable[[], Any]:
        if grad:
            return lambda: torch.autograd.grad(
                several(function(*args, **case.kwargs, **more)), wanted, dys
            )
        return lambda: function(*args, **case.kwargs, **more)

    with torch.set_grad_enabled(grad):
        times = interleaved(
            {"native": call(op.native), "kernel": call(op.function, backend=backend)},
            device,
            budget,
        )
    return times["native"].median / times["kernel"].median


class Gains(NamedTuple):
    """Over the calls of one size: the ratio of the one that gains least, and the mean of all."""

    least: float
    mean: float


def gains(op: Op, cases: Iterable[Case], backend: str, grad: bool, budget: Budget) -> Gains:
    """Ratios of the calls of one size; close ones are measured twice."""
    found = []
    for case in cases:
        got = ratio(op, case, backend, grad, budget)
        if abs(got - 1) < 0.05 and budget is not QUICK:
            got = math.sqrt(got * ratio(op, case, backend, grad, budget))
        found.append(got)
        if got < 0.6:
            break
    return Gains(min(found), geometric_mean(found))


def smallest(found: dict[int, Gains]) -> int:
    """The size from which on no call loses and which itself is a gain, or -1."""
    best = -1
    for size in sorted(found, reverse=True):
        if found[size].least < EVEN:
            break
        if found[size].mean >= GAIN:
            best = size
    return best


def limits(
    key: Key, device: str, backend: str, dtype: torch.dtype, sizes: tuple[int, ...], quick: bool
) -> list[Any]:
    """[backend, elements, elements with gradient] of a key, measured."""
    found_of: list[Any] = [backend]
    for grad in (False, True):
        found: dict[int, Gains] = {}
        for size in sorted(sizes, reverse=True):
            if size > MOST.get(key.op.family, size):
                continue
            shapes = list(dict.fromkeys(key.sized(size)))
            budget = QUICK if quick else BUDGET
            if size >= LARGE:
                shapes, budget = shapes[:1], LONG
            make = Make(dtype, device, key.name)
            cases = (adapt(key.op.bench(make, shape)) for shape in shapes for adapt in key.adapts)
            found[size] = gains(key.op, cases, backend, grad, budget)
            if found[size].least < 0.6:  # smaller ones are further behind
                break
        found_of.append(smallest(found))
    return found_of


def _best(found: list[list[Any]]) -> list[Any]:
    """Of several backends' the one that pays off at the smaller size; the first wins a tie."""
    best = found[0]
    for one in found[1:]:
        if one[2] > 0 and not 0 < best[2] <= one[2]:
            best = one
    return best


def _write(path: Path, device: str, name: str, dtypes: dict[str, list[Any]]) -> None:
    """Puts one op's entry into the part of this kind of device."""
    part = calibration.kind(device)
    text = json.loads(path.read_text()) if path.exists() else {}
    text.setdefault("sizes", {}).setdefault(part, {})[name] = dtypes
    text.setdefault("measured", {})[part] = machine.record(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(text, indent=1, sort_keys=True) + "\n")


def run(settings: Settings, path: Path | None = None, sizes: tuple[int, ...] = SIZES) -> int:
    """Measures the device and rewrites the table op by op; returns the exit status."""
    path = path or calibration.file()
    chosen = [
        b for b in settings.backends if b in KERNELS and settings.device in backends.serves(b)
    ]
    if not chosen:
        Console().print(
            f"bench: no kernels for {settings.device} to calibrate; see python -m pydl info"
        )
        return 2
    keys = [key for key in entries() if key.op.name in settings.ops]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("calibrating", total=len(keys) * len(DTYPES))
        for key in keys:
            dtypes: dict[str, list[Any]] = {}
            for name in DTYPES:
                dtype = getattr(torch, name)
                progress.update(task, advance=1, description=f"{key.name} {name}")
                able = [b for b in chosen if dtype in key.op.dtypes and backends.takes(b, dtype)]
                if able:
                    dtypes[name] = _best(
                        [
                            limits(key, settings.device, b, dtype, sizes, settings.quick)
                            for b in able
                        ]
                    )
            # As it goes: what was measured is kept where a long run is broken off.
            _write(path, settings.device, key.name, dtypes)
    calibration.reload()
    Console().print(f"Wrote {path}", soft_wrap=True)
    return 0
