"""Under autocast an op does what its row says: what torch does, where torch has the function."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pydl.table import Case, Op
from tests import harness


def _run(function: Callable, case: Case, device: str, **options: object) -> list[torch.Tensor]:
    given = harness.leaves(case)
    with torch.autocast(device, dtype=torch.bfloat16):
        outs = harness.called(function, case, given, **options)
    grads = torch.autograd.grad(outs, given, harness.upstreams(outs, torch.bfloat16))
    return [*(out.detach() for out in outs), *grads]


def test_autocast(op: Op, dtype: torch.dtype, backend: str) -> None:
    """Dtypes of output and gradients by the row's policy; values as of a call in that dtype."""
    device = harness.device(backend)
    complaints = []
    for case in harness.thinned(op.cases(dtype, device), backend, dtype):
        if not harness.moderate(case, harness.affordable(backend, 6000)):
            continue
        got = _run(op.function, case, device, backend=backend)
        lowered = op.autocast == "lower" and len(case.tensors()) > 1 and dtype != torch.float64
        wanted = torch.bfloat16 if lowered else dtype
        if got[0].dtype != wanted:
            complaints.append(f"{case.label}: {got[0].dtype}, wants {wanted}")
            continue
        grads = got[harness.outputs_of(got, case) :]
        if any(g.dtype != t.dtype for g, t in zip(grads, case.tensors(), strict=True)):
            complaints.append(f"{case.label}: a gradient is {[g.dtype for g in grads]}")
        same = case.to(wanted) if lowered else case
        plain = harness.run(harness.on(op, backend), same, torch.bfloat16)
        if not all(map(harness.same_bits, got[: -len(grads)], plain[: -len(grads)])):
            complaints.append(f"{case.label}: other values than in {wanted}")
        if hasattr(torch.nn.functional, op.name):
            native = _run(op.native, case, device)[0].dtype
            if native != wanted:
                complaints.append(f"{case.label}: {wanted}, torch's is {native}")
    assert not complaints, harness.summary(complaints)
