"""Every exported operator is a good citizen of torch.library."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pydl import backends
from pydl.table import Case, Op
from tests import harness, watch


def _recorded(op: Op, backend: str, case: Case, dtype: torch.dtype) -> list[tuple]:
    recorder = watch.Recorder()
    with watch.intercepted(recorder):
        harness.run(harness.on(op, backend), case, dtype)
    return recorder.calls


def _small(op: Op, backend: str) -> list[Case]:
    """The smallest sample for every set of further arguments, number of tensors and layout."""
    chosen: dict[object, Case] = {}
    dtype = torch.float32
    for case in harness.thinned(op.cases(dtype, harness.device(backend)), backend, dtype):
        x = case.args[0]
        further = [a for a in case.args if not isinstance(a, torch.Tensor)]
        key = (repr(further), len(case.tensors()), x.numel() == 0, x.is_contiguous(), *case.kwargs)
        if key not in chosen or x.numel() < chosen[key].args[0].numel():
            chosen[key] = case
    return list(chosen.values())


def _looks(arg: object) -> object:
    """What tracing can tell of an argument."""
    if not isinstance(arg, torch.Tensor):
        return type(arg)
    return arg.dtype, arg.dim(), arg.numel() == 0, arg.is_contiguous()


def test_opcheck(op: Op, backend: str) -> None:
    """Schema, fake kernel, autograd and tracing hold for the arguments that ops really pass."""
    complaints: list[str] = []
    seen: set[tuple] = set()
    for case in _small(op, backend):
        for kernel, args in _recorded(op, backend, case, torch.float32):
            if (key := (str(kernel), *map(_looks, args))) in seen:
                continue
            seen.add(key)
            found = torch.library.opcheck(kernel, args, raise_exception=False)
            complaints += [
                f"{kernel}, {case.label}: {test}: {str(result)[:300]}"
                for test, result in found.items() if result != "SUCCESS"
            ]  # fmt: skip
    names = {name for name, *_ in seen}
    if op.family == "product":
        assert names == {"pydl_cpu.product.default"}  # both ways
    else:
        assert any("fwd" in name for name in names) and any("bwd" in name for name in names)
    assert not complaints, harness.summary(complaints)


def test_every_operator_is_reached(backend: str) -> None:
    """No operator is exported that no op of the table calls."""
    from pydl.table import TABLE

    # SyncBatchNorm's, which tests/test_sync_batch_norm.py runs between processes.
    reached = {"batch_norm_moments", "batch_norm_sums", "batch_norm_dx"}

    def note(kernel: object) -> Callable[..., None]:
        """Takes the call down and computes nothing."""
        family, name = str(kernel).split(".")[:2]
        if family == f"pydl_{backend}":  # on CPU tensors some products are the CPU's in any case
            reached.add(name)
        return lambda *_: None

    with watch.intercepted(note):
        for op in TABLE.values():
            if harness.lacks(op, backend):
                continue
            for case in op.cases(torch.float32, harness.device(backend)):
                if harness.elements(case) < 6000:
                    harness.run(harness.on(op, backend), case, torch.float32)
    assert reached == {name for known, name in backends._OPS if known == backend}


def test_schemas_say_what_is_written(backend: str) -> None:
    """Outputs come first, are marked as written, and nothing is returned."""
    packets = getattr(torch.ops, f"pydl_{backend}")
    for known, name in backends._OPS:
        if known != backend:
            continue
        operator = getattr(packets, name).default
        written = watch.outputs(operator)
        assert written[0] and sorted(written, reverse=True) == written, operator._schema
        assert not operator._schema.returns


@pytest.mark.parametrize("fault", ["dtype", "shape"])
def test_an_operator_refuses(op: Op, backend: str, fault: str) -> None:
    """An input of another shape or dtype is refused before a kernel reads past an end."""
    if backend == "triton":
        pytest.skip("Triton's operators trust the functions above them, which check")
    found = [c for c in _small(op, backend) if c.args[0].dim() > 1 or op.family == "activation"]
    case = min(found, key=lambda case: (case.args[0].dim() != 2, case.args[0].dim()))
    for kernel, args in _recorded(op, backend, case, torch.float32):
        at = max(
            i
            for i, a in enumerate(args)
            if isinstance(a, torch.Tensor) and a.dtype == torch.float32
        )
        wrong = args[at].to(torch.complex64)
        if fault == "shape":
            wrong = args[at].new_empty([n + 1 for n in args[at].shape] or [2])
        with pytest.raises(RuntimeError, match="pydl"):
            kernel(*(wrong if i == at else a for i, a in enumerate(args)))
