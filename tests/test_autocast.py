"""Under autocast an op does what its row says: what torch does, where torch has the function."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pydl.table import Case, Op
from tests import harness


def _run(function: Callable, case: Case, device: str, **options: object) -> list[torch.Tensor]:
    given = harness.leaves(case)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = function(*harness.bind(case, given), **case.kwargs, **options)
    grads = torch.autograd.grad(out, given, harness.upstream(out.detach(), torch.bfloat16))
    return [out.detach(), *grads]


def test_autocast(op: Op, dtype: torch.dtype, backend: str) -> None:
    """Dtypes of output and gradients by the row's policy; values as of a call in that dtype."""
    device = harness.device(backend)
    complaints = []
    for case in op.cases(dtype, device):
        if not harness.moderate(case, harness.affordable(backend, 6000)):
            continue
        got = _run(op.function, case, device, backend=backend)
        lowered = op.autocast == "lower" and len(case.tensors()) > 1 and dtype != torch.float64
        wanted = torch.bfloat16 if lowered else dtype
        if got[0].dtype != wanted:
            complaints.append(f"{case.label}: {got[0].dtype}, wants {wanted}")
            continue
        if any(g.dtype != t.dtype for g, t in zip(got[1:], case.tensors(), strict=True)):
            complaints.append(f"{case.label}: a gradient is {[g.dtype for g in got[1:]]}")
        same = case.to(wanted) if lowered else case
        plain = harness.run(harness.on(op, backend), same, torch.bfloat16)
        if not harness.same_bits(got[0], plain[0]):
            complaints.append(f"{case.label}: other values than in {wanted}")
        if hasattr(torch.nn.functional, op.name):
            native = _run(op.native, case, device)[0].dtype
            if native != wanted:
                complaints.append(f"{case.label}: {wanted}, torch's is {native}")
    assert not complaints, harness.summary(complaints)
