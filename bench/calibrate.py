"""`python -m bench --calibrate`: from which size on a kernel beats native PyTorch, for the
automatic choice.

Every op is measured over sizes, forward under no_grad and forward with backward, as a user calls
it: through the public function, against native PyTorch, interleaved. A kernel is taken from the
smallest size on at which, and at every larger one, it is faster by 3 % at least on all of the row's
shapes of that size; close calls are measured twice. The result replaces the device's part of
`pydl/calibration.json` and leaves other devices' parts alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from bench import machine
from bench.measure import Budget, interleaved
from bench.options import KERNELS, Settings
from bench.parity import several
from pydl import backends, calibration
from pydl.table import TABLE, Case, Make, Op

TABLE_FILE = Path(calibration.__file__).with_name("calibration.json")
DTYPES = ("float32", "bfloat16", "float16")  # fp64 stays native
SIZES = tuple(4**k for k in range(5, 12))  # 1 thousand to 4 million elements
GAIN = 1.03
BUDGET = Budget(seconds=0.05, rounds=5, sample=1e-4, most=40)
QUICK = Budget(seconds=0.01, rounds=3, sample=1e-5, most=5)


Adapt = Callable[[Case], Case]


def _same(case: Case) -> Case:
    return case


def _from_all(case: Case) -> Case:
    """The attention of the benchmark, not causal."""
    return Case(case.label, case.args[:3], {})


def keys() -> Iterator[tuple[str, Op, tuple[Adapt, ...]]]:
    """What `choose` is asked about, and the calls that decide it: the ops, and two that one
    function serves by other kernels."""
    for op in TABLE.values():
        both_ways = op.name in ("scaled_dot_product_attention", "linear_attention")
        yield op.name, op, (_same, _from_all) if both_ways else (_same,)
    yield "gelu_tanh", TABLE["gelu"], (lambda case: Case(case.label, (case.args[0], "tanh")),)
    yield (
        "swish_learnt",
        TABLE["swish"],
        (lambda case: Case(case.label, (case.args[0], case.args[0].new_full((1,), 1.5))),),
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


def slowest(op: Op, cases: list[Case], backend: str, grad: bool, quick: bool) -> float:
    """The ratio of the call on which the kernel gains least; close ones are measured twice."""
    found = []
    for case in cases:
        got = ratio(op, case, backend, grad, QUICK if quick else BUDGET)
        if abs(got - 1) < 0.05 and not quick:
            got = min(got, ratio(op, case, backend, grad, BUDGET))
        found.append(got)
        if got < 0.6:
            break
    return min(found)


def smallest(ratios: dict[int, float]) -> int:
    """The size from which on every ratio is a gain, or -1."""
    found = -1
    for size in sorted(ratios, reverse=True):
        if ratios[size] < GAIN:
            break
        found = size
    return found


def measure(
    device: str, backend: str, ops: tuple[str, ...], sizes: tuple[int, ...], quick: bool
) -> dict[str, Any]:
    """{op: {dtype: [backend, elements, elements with gradient]}}, each entry measured."""
    table: dict[str, Any] = {}
    found = [entry for entry in keys() if entry[1].name in ops]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("calibrating", total=len(found) * len(DTYPES))
        for key, op, adapts in found:
            for name in DTYPES:
                dtype = getattr(torch, name)
                if dtype not in op.dtypes or not backends.takes(backend, dtype):
                    continue
                limits = []
                for grad in (False, True):
                    ratios: dict[int, float] = {}
                    for size in sorted(sizes, reverse=True):
                        make = Make(dtype, device, key)
                        cases = [
                            adapt(op.bench(make, shape))
                            for shape in dict.fromkeys(op.sized(size))
                            for adapt in adapts
                        ]
                        ratios[size] = slowest(op, cases, backend, grad, quick)
                        if ratios[size] < 0.6:  # smaller ones are further behind
                            break
                    limits.append(smallest(ratios))
                table.setdefault(key, {})[name] = [backend, *limits]
                progress.update(task, advance=1, description=f"{key} {name}")
    return table


def run(settings: Settings, path: Path = TABLE_FILE, sizes: tuple[int, ...] = SIZES) -> int:
    """Measures the device and rewrites the table; returns the exit status."""
    chosen = [
        b for b in settings.backends if b in KERNELS and settings.device in backends.serves(b)
    ]
    if not chosen:
        Console().print(
            f"bench: no kernels for {settings.device} to calibrate; see python -m pydl info"
        )
        return 2
    # Of several the first wins a tie; each op takes the one that pays off at the smaller size.
    tables = [
        measure(settings.device, backend, settings.ops, sizes, settings.quick) for backend in chosen
    ]
    merged = tables[0]
    for table in tables[1:]:
        for key, dtypes in table.items():
            for name, limits in dtypes.items():
                if limits[2] > 0 and not 0 < merged[key][name][2] <= limits[2]:
                    merged[key][name] = limits
    text = json.loads(path.read_text()) if path.exists() else {}
    text.setdefault("sizes", {}).setdefault(settings.device, {}).update(merged)
    text.setdefault("measured", {})[settings.device] = machine.record(settings.device)
    path.write_text(json.dumps(text, indent=1, sort_keys=True) + "\n")
    calibration.reload()
    Console().print(f"Wrote {path}", soft_wrap=True)
    return 0
