"""The gate: what is wrong is not timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pydl import backends, table
from pydl.table import Case, Op

Build = Callable[[Case], Callable[[], Any]]

# How far a peer may be off: more than a kernel of ours, for it may sum in another order or
# approximate.
PEER_SLACK = 16.0


def leaves(case: Case) -> Case:
    """The same call with floating tensors, memory shared, that require a gradient."""
    args = (
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in case.args
    )  # fmt: skip
    return Case(case.label, tuple(args), case.kwargs)


def wanted(case: Case) -> list[Tensor]:
    """The tensors of a call that get a gradient."""
    return [t for t in case.tensors() if t.requires_grad]


def several(out: Any) -> tuple[Tensor, ...]:
    """The outputs of a call, one or more."""
    return out if isinstance(out, tuple) else (out,)


def upstream(outs: Sequence[Tensor]) -> list[Tensor]:
    """A gradient for each output, the same each time."""
    generator = torch.Generator().manual_seed(outs[0].numel())
    return [
        torch.randn(out.shape, generator=generator).to(out.dtype).to(out.device) for out in outs
    ]


def results(build: Build, case: Case, dys: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The outputs of a call and its gradients."""
    given = leaves(case)
    outs = several(build(given)())
    made = [out.detach() for out in outs]
    if dys is None:
        dys = upstream(made)
    dys = [dy.to(out.dtype) for dy, out in zip(dys, outs, strict=True)]
    return [*made, *torch.autograd.grad(outs, wanted(given), dys)]


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """Collects (op as the choice names it, backend chosen) of automatic choices."""
    original, seen = backends.automatic, []

    def automatic(op: str, *tensors: Tensor) -> str:
        chosen = original(op, *tensors)
        seen.append((op, chosen))
        return chosen

    backends.automatic = automatic
    try:
        yield seen
    finally:
        backends.automatic = original


class Gate:
    """Holds what the definition in fp64 and native PyTorch give for one call, and judges others by
    it."""

    def __init__(self, op: Op, case: Case) -> None:
        self._case = case
        self._native = results(lambda c: lambda: op.native(*c.args, **c.kwargs), case)
        self._outputs = len(self._native) - len(wanted(leaves(case)))
        self._dys = upstream(self._native[: self._outputs])
        double = case.to(torch.float64)
        self._reference = results(
            lambda c: lambda: op.reference(*c.args, **c.kwargs), double, self._dys
        )

    def judge(self, build: Build) -> dict[str, Any]:
        """Whether a contender is right: `ok`, `checks` with errors and what is allowed, a
        `message`.

        Raises:
            MissingKernel: its backend has none for the op.
        """
        try:
            got = results(build, self._case, self._dys)
        except backends.MissingKernel:
            raise
        except Exception as error:
            # Whatever a kernel raises makes its row red, and the run goes on.
            return {"ok": False, "checks": [], "message": f"{type(error).__name__}: {error}"}
        checks = list(self._checks(got))
        wrong = [c for c in checks if not c["ok"]]
        message = "; ".join(
            f"{c['what']}: error {c['error']:.3g}, allowed {c['allowed']:.3g}" for c in wrong
        )
        return {"ok": not wrong, "checks": checks, "message": message}

    def _checks(self, got: Sequence[Tensor]) -> Iterator[dict[str, Any]]:
        outputs = ["output", *(f"output {i}" for i in range(1, self._outputs))]
        names = [*outputs, *(f"gradient {i}" for i in range(len(got) - len(outputs)))]
        for name, out, reference, native in zip(
            names, got, self._reference, self._native, strict=True
        ):
            terms = 0.0 if name in outputs else got[0].numel() / max(1, out.numel())
            right, error, allowed = table.judge(out, reference, native, terms)
            yield {"what": name, "ok": right, "error": error, "allowed": allowed}

    def differs(self, build: Build) -> str | None:
        """Why a peer does not compute the same, or None. Gradients it does not have are left to the
        timing."""
        with torch.no_grad():
            out = several(build(self._case)())[0]
        if out.shape != self._reference[0].shape:
            return f"its output is {tuple(out.shape)}"
        _, error, allowed = table.judge(
            out.to(self._native[0].dtype), self._reference[0], self._native[0]
        )
        if error > PEER_SLACK * allowed:
            return f"its output differs from the definition by {error:.3g}"
        return None
