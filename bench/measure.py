"""Timing: contenders interleaved round by round, medians, and what the machine can do at best."""

from __future__ import annotations

import gc
import math
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from statistics import quantiles
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: median and quartiles over rounds of so many calls each.

    `page_faults` per call tell on the CPU whether the time went into memory that was mapped anew.
    """

    median: float
    q1: float
    q3: float
    rounds: int
    calls: int
    page_faults: float = 0.0

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Budget:
    """How long a row is measured: about so many seconds, at least so many rounds, samples not
    shorter than that."""

    seconds: float = 1.0
    rounds: int = 10
    sample: float = 1e-4
    most: int = 400


FULL = Budget()
QUICK = Budget(seconds=0.1, rounds=3, sample=3e-5, most=40)
# A GPU's samples differ little, and its time is dear.
CUDA = Budget(seconds=0.25)


def budget(device: str, quick: bool) -> Budget:
    return QUICK if quick else CUDA if device == "cuda" else FULL


def _summary(samples: list[float], calls: int, faults: float) -> Timing:
    q1, median, q3 = (
        quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    )
    return Timing(median, q1, q3, len(samples), calls, faults)


def order(names: list[str], turn: int) -> list[str]:
    """Another one first each turn, and each other lap backwards: nobody always follows the same
    one."""
    k = turn % len(names)
    rotated = names[k:] + names[:k]
    return rotated if turn // len(names) % 2 == 0 else rotated[::-1]


def _rounds(budget: Budget, seconds_per_round: float) -> int:
    return max(budget.rounds, min(budget.most, int(budget.seconds / seconds_per_round)))


def _spent(call: Call, calls: int) -> float:
    """Seconds of so many calls; what a call returns is freed within, as in a program."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start


def _on_cpu(contenders: Mapping[str, Call], budget: Budget) -> dict[str, Timing]:
    calls, once = {}, 0.0
    for name, call in contenders.items():
        call()
        seconds = max(min(_spent(call, 1) for _ in range(2)), 1e-7)
        calls[name] = max(1, min(2000, math.ceil(budget.sample / seconds)))
        once += seconds * calls[name]
        _spent(call, calls[name])
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    faults = dict.fromkeys(contenders, 0)
    for turn in range(_rounds(budget, once)):
        for name in order(list(contenders), turn):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            samples[name].append(_spent(contenders[name], calls[name]) / calls[name] * 1e3)
            faults[name] += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return {
        name: _summary(got, calls[name], faults[name] / (len(got) * calls[name]))
        for name, got in samples.items()
    }


def _on_cuda(contenders: Mapping[str, Call], budget: Budget) -> dict[str, Timing]:
    # Overwriting much more than the L2 empties it, and lasts longer than Python needs to launch
    # what follows, so that the events enclose the kernels' time and not the launching.
    flush = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    for call in contenders.values():
        for _ in range(3):
            call()

    def sample(call: Call) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        end.record()
        return start, end

    def lap(turn: int) -> dict[str, float]:
        events = {name: sample(contenders[name]) for name in order(list(contenders), turn)}
        torch.cuda.synchronize()
        return {name: start.elapsed_time(end) for name, (start, end) in events.items()}

    lap(0)
    began = time.perf_counter()
    lap(1)
    laps = [lap(turn) for turn in range(_rounds(budget, time.perf_counter() - began))]
    return {name: _summary([times[name] for times in laps], 1, 0.0) for name in contenders}


def interleaved(
    contenders: Mapping[str, Call], device: str, budget: Budget = FULL
) -> dict[str, Timing]:
    """Times the calls against each other, in turns and in changing order, after a warm-up."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        return (_on_cuda if device == "cuda" else _on_cpu)(contenders, budget)
    finally:
        if collecting:
            gc.enable()


def copy(nbytes: int, device: str) -> Call:
    """A copy into existing memory that reads and writes `nbytes` in all."""
    n = max(1, nbytes // 8)
    source, target = torch.ones(n, device=device), torch.ones(n, device=device)
    return partial(target.copy_, source)


def matmul(dtype: torch.dtype, device: str, n: int = 0) -> tuple[Call, float]:
    """(a square product of random numbers, its floating-point operations)."""
    n = n or (8192 if device == "cuda" else 1024)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(n, n, dtype=dtype, device=device)
    return partial(torch.mm, a, b, out=out), 2.0 * n**3


def ceilings(device: str, dtypes: tuple[str, ...], budget: Budget) -> dict[str, Any]:
    """What the machine does at best: copying in GB/s, counting reads and writes, and products in
    TFLOP/s."""
    nbytes = 1 << (30 if device == "cuda" else 28)
    # fp64 and CPU fp16 products are no kernel's ceiling here, and slow.
    names = [
        n for n in dtypes if n in ("float32", "bfloat16") or (device == "cuda" and n == "float16")
    ]
    if device == "cuda" and "bfloat16" not in names:
        names.append("bfloat16")
    products = {name: matmul(getattr(torch, name), device) for name in names}
    with torch.no_grad():
        calls = {
            "copy": copy(nbytes, device),
            **{name: call for name, (call, _) in products.items()},
        }
        times = interleaved(calls, device, budget)
    return {
        "copy_gb_per_s": nbytes / times["copy"].median / 1e6,
        "matmul_tflop_per_s": {n: products[n][1] / times[n].median / 1e9 for n in names},
    }
