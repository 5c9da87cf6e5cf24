"""How near the CPU's formulas come to the truth, at every instruction-set level of this machine.

In units of the last place (ulp): of fp32 on dense grids, of the 16-bit types on every value.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable

import pytest
import torch

from pydl._native import C
from pydl.table import TABLE
from tests import harness

LEVELS = ("baseline", "avx2", "avx512")
FORMULAS: dict[str, tuple] = {
    "sigmoid": (), "tanh": (), "relu": (), "leaky_relu": (0.2,), "elu": (1.5,), "selu": (),
    "gelu": (), "gelu_tanh": ("tanh",), "silu": (), "swish": (1.7,), "mish": (),
}  # fmt: skip


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """The definition without its cancellation: (1 + tanh u) / 2 is the logistic function of 2u."""
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def _truth(name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the value in fp64, by which factor a relative error of x grows)."""
    x = x.double().requires_grad_()
    formula: Callable = _gelu_tanh if name == "gelu_tanh" else TABLE[name].reference
    value = formula(x, *(() if name == "gelu_tanh" else FORMULAS[name]))
    (slope,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), (x * slope / value).detach().abs().nan_to_num(0.0)


def _spacing(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One unit of the last place of each value."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(value.abs().clamp(min=info.smallest_normal))
    return torch.ldexp(torch.full_like(value, info.eps), exponent - 1)


def _computed(name: str, x: torch.Tensor) -> torch.Tensor:
    op = TABLE["gelu" if name == "gelu_tanh" else name]
    return op.function(x, *FORMULAS[name], backend="cpu")


def errors_fp32(name: str) -> float:
    """The largest error as a share of what is allowed: 6 ulp, and 2 by the argument's rounding."""
    tiny = torch.logspace(-30, -2, 20001)
    x = torch.cat([tiny, -tiny, torch.linspace(-12, 12, 200_001), torch.linspace(-80, 80, 50_001)])
    wanted, growth = _truth(name, x)
    large = wanted.abs() > 1e-35
    error = (_computed(name, x).double() - wanted).abs() / _spacing(wanted, torch.float32)
    return float((error / (6 + 2 * growth))[large].max())


def errors_16(name: str, dtype: torch.dtype) -> float:
    """The largest error over all finite values of a 16-bit type."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    wanted, _ = _truth(name, x)
    got = _computed(name, x).double()
    top = torch.finfo(dtype).max
    inside = (wanted.abs() <= top) & ((wanted.abs() > 1e-35) | (wanted == 0))
    assert got[wanted.abs() > top * 1.01].isinf().all()
    return float(((got - wanted).abs() / _spacing(wanted, dtype))[inside].max())


def parity() -> list[str]:
    """Complaints of the judge about small samples; none at the level that all other tests run."""
    complaints: list[str] = []
    if C.cpu_level() == C.machine_level():
        return complaints
    for op in TABLE.values():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for i, case in enumerate(op.cases(dtype)):
                if harness.elements(case) < 5000:
                    how = harness.DY[i % len(harness.DY)]
                    got = harness.run(harness.on(op, "cpu"), case, dtype, how)
                    found = harness.compare(got, op, case, dtype, how)
                    complaints += [f"{op.name} {dtype} {case.label}: {c}" for c in found]
    return complaints


def report() -> None:
    """Prints what this process, at its level, computes."""
    found = {
        "level": C.cpu_level(),
        "fp32": {name: errors_fp32(name) for name in FORMULAS},
        "fp16": {name: errors_16(name, torch.float16) for name in FORMULAS},
        "bf16": {name: errors_16(name, torch.bfloat16) for name in FORMULAS},
        "parity": parity(),
    }
    print(json.dumps(found))


@functools.cache
def _measured(level: str) -> dict:
    if LEVELS.index(level) > LEVELS.index(C.machine_level()):
        pytest.skip(f"this CPU has no {level}")
    done = harness.python("from tests import test_math; test_math.report()", PYDL_CPU_LEVEL=level)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["level"] == level
    return found


@pytest.mark.parametrize("level", LEVELS)
def test_fp32(level: str) -> None:
    """Within 6 ulp, and 2 more for each that a rounding of the argument would make."""
    errors = _measured(level)["fp32"]
    assert not {name: error for name, error in errors.items() if not error <= 1}
    assert errors["relu"] == 0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_16_bit(level: str, dtype: str) -> None:
    """Rounded once: within 0.51 ulp for every value of the type; 0.54 in bf16, whose formulas are
    shorter (vlow)."""
    errors, most = _measured(level)[dtype], {"fp16": 0.51, "bf16": 0.54}[dtype]
    assert not {name: error for name, error in errors.items() if not error <= most}


@pytest.mark.parametrize("level", LEVELS)
def test_parity(level: str) -> None:
    """The table's samples pass the judge at every level."""
    complaints = _measured(level)["parity"]
    assert not complaints, harness.summary(complaints)
