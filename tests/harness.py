"""What the table-driven tests share: backends, running a call with its gradients, judging."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pydl import backends
from pydl._native import C
from pydl.table import ATTENTION, Case, Op, judge, terms

BACKENDS = ("cpu", "cuda", "triton")
ROOT = Path(__file__).resolve().parents[1]

# The largest call, in elements of its tensors together, that an interpreted backend is given.
_MOST = {"triton": 4500, "cuda": 1_000_000}
# Families whose samples are many kernels: how much of it.
_SHARE = {
    ("triton", "batch_norm"): 0.2, ("triton", "linear_attention"): 0.7, ("cuda", "attention"): 0.05,
}  # fmt: skip
# The interpreter takes most of a run's time: each dtype gets the samples that the others do not.
_THIRDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def real_cuda() -> bool:
    """Whether the CUDA kernels run on a GPU."""
    return torch.cuda.is_available() and any(backend == "cuda" for backend, *_ in C.entries())


def kind(backend: str) -> str:
    """How a backend runs here, in words."""
    if backend == "cuda" and not real_cuda():
        return "cuda, emulated"
    return "triton, interpreted" if backend == "triton" and device(backend) == "cpu" else backend


def device(backend: str) -> str:
    """Where a backend's tensors live here."""
    return backends.serves(backend)[0]


@functools.cache
def missing(backend: str) -> str | None:
    """Why a backend cannot be tested here, or None; loads CUDA's emulation without a GPU."""
    if backend == "cuda" and not real_cuda():
        if not list((ROOT / "csrc").glob("*.cu")):
            return "there are no CUDA sources"
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            return f"no GPU, and no {compiler} to build the emulation with"
        from tests.emulation import build

        build.load("plain")
        backends.emulate_cuda(True)
    return backends.unavailable(backend)


@functools.cache
def lacks(op: Op, backend: str) -> str | None:
    """That a backend has no kernels for an op, in words; None where it has."""
    case = min(op.cases(torch.float32, device(backend)), key=elements)
    try:
        run(on(op, backend), case, torch.float32)
    except backends.MissingKernel:
        return f"no kernels for {op.name}"
    return None


def reorder(seed: int) -> None:
    """Another order of threads for what the emulation runs next."""
    if backends._emulated:
        from tests.emulation import build

        build.seed(seed)


def cases(
    op: Op, backend: str, dtype: torch.dtype, share: float = 1.0
) -> tuple[list[Case], int, int]:
    """(the row's samples on the backend's device, how many were too large, what is too large).

    `share` thins a slow backend further.
    """
    drawn = op.cases(dtype, device(backend))
    if kind(backend) == backend:
        return drawn, 0, 0
    most = int(_MOST[backend] * share * _SHARE.get((backend, op.family), 1.0))
    kept = thinned([case for case in drawn if elements(case) <= most], backend, dtype)
    return kept, len(drawn) - len(kept), most


def thinned(found: list[Case], backend: str, dtype: torch.dtype) -> list[Case]:
    """A third of the samples for an interpreted backend, another one for each dtype."""
    return found[_THIRDS[dtype] :: 3] if kind(backend) == "triton, interpreted" else found


def affordable(backend: str, most: int) -> int:
    """`most` elements, or what an interpreter computes in a moment."""
    return min(most, 900) if kind(backend) == "triton, interpreted" else most


def elements(case: Case) -> int:
    return sum(tensor.numel() for tensor in case.tensors())


def moderate(case: Case, most: int, bound: float = 30.0) -> bool:
    """Whether a call is small, of values to take differences at, no two elements in one place."""
    return elements(case) <= most and all(
        tensor.isfinite().all() and (tensor.numel() == 0 or tensor.abs().max() <= bound)
        and not (tensor.numel() > 1 and 0 in tensor.stride())
        for tensor in case.tensors()
    )  # fmt: skip


def on(op: Op, backend: str | None) -> Callable[..., Any]:
    """The op's function with its backend chosen."""
    return functools.partial(op.function, backend=backend)


def bind(case: Case, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """The case's positional arguments with other tensors."""
    given = iter(tensors)
    return tuple(next(given) if isinstance(a, Tensor) else a for a in case.args)


def leaves(case: Case) -> list[Tensor]:
    """The case's tensors, memory shared, as fresh leaves that require grad."""
    return [t.detach().requires_grad_(t.is_floating_point()) for t in case.tensors()]


def smooth(op: Op) -> Callable[..., Any]:
    """What derivatives beyond the first are compared with: torch's attention has none."""
    return op.reference if op.family == "attention" else op.native


def several(out: Any) -> tuple[Tensor, ...]:
    """The outputs of a call, one or more."""
    return out if isinstance(out, tuple) else (out,)


def joined(out: Any) -> Tensor:
    """The output of a call; all values of several outputs as one tensor."""
    return out if isinstance(out, Tensor) else torch.cat([one.reshape(-1) for one in out])


def called(
    function: Callable[..., Any], case: Case, given: Sequence[Tensor], **options: object
) -> tuple[Tensor, ...]:
    """The outputs of the case's call with other tensors."""
    return several(function(*bind(case, given), **case.kwargs, **options))


def outputs_of(results: Sequence[Tensor], case: Case) -> int:
    """How many of what `run` returns are outputs; gradients follow."""
    return len(results) - len(case.tensors())


DY = ("like", "contiguous", "expanded", "transposed")


def upstream(out: Tensor, dtype: torch.dtype, how: str = "like", which: int = 0) -> Tensor:
    """A gradient for `out`, the output of number `which`, laid out like it or otherwise, of values
    that `dtype` holds."""
    generator = torch.Generator().manual_seed(out.numel() + (which << 40))
    drawn = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype)
    if how == "expanded":
        drawn = drawn.reshape(-1)[0].expand(out.shape) if out.numel() else drawn
    drawn = drawn.to(out.dtype).to(out.device)
    if how == "like":
        return torch.empty_like(out).copy_(drawn)
    if how == "transposed":
        order = list(reversed(range(out.dim())))
        return drawn.permute(order).contiguous().permute(order)
    return drawn


def upstreams(outs: Sequence[Tensor], dtype: torch.dtype, how: str = "like") -> list[Tensor]:
    """A gradient for each output, all different."""
    return [upstream(out.detach(), dtype, how, i) for i, out in enumerate(outs)]


def run(
    function: Callable[..., Any], case: Case, dtype: torch.dtype, how: str = "like"
) -> list[Tensor]:
    """All outputs, then the gradient of every tensor; upstream gradients have values of `dtype`."""
    given = leaves(case)
    outs = called(function, case, given)
    grads = torch.autograd.grad(outs, given, upstreams(outs, dtype, how))
    return [*(out.detach() for out in outs), *grads]


def bits(tensor: Tensor) -> Tensor:
    """The memory of each element as an integer."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(sizes[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def _bands(reference: Tensor) -> Iterator[Tensor]:
    """Masks of elements to be judged by themselves: huge values would excuse errors in others."""
    size = reference.abs()
    finite = reference.isfinite()
    edges = (0.0, 1.0, 256.0, 1e5, float("inf"))
    if not bool((finite & (size > 1e3)).any()):
        yield torch.ones_like(finite)
        return
    yield ~finite
    for low, high in itertools.pairwise(edges):
        yield finite & (size >= low) & (size < high)


def plain(op: Op) -> Case:
    """A sample of as few dimensions as there are, two at least."""
    found = [case for case in op.cases(torch.float32) if case.args[0].dim() > 1]
    return min(found, key=lambda case: case.args[0].dim())


def by_rows(op: Op) -> bool:
    """Whether elements of a row meet."""
    return op.family in ("layer_norm", "add_norm", "batch_norm", "product", *ATTENTION)


def judged(
    what: str, out: Tensor, reference: Tensor, same: Tensor, terms: float = 0.0,
    whole: bool = False,
) -> list[str]:  # fmt: skip
    """Complaints about a value: shape, dtype, `judge`; by bands of size, or `whole` where an
    element's error comes from others of its row."""
    if out.shape != reference.shape or out.dtype != same.dtype:
        return [f"{what}: {out.dtype} {tuple(out.shape)}, wants {same.dtype} {tuple(same.shape)}"]
    complaints = []
    everything = [torch.ones_like(reference, dtype=torch.bool)]
    for band in (everything if whole else _bands(reference)) if out.numel() else ():
        if not band.any():
            continue
        right, error, allowed = judge(out[band], reference[band], same[band], terms)
        if not right:
            complaints.append(f"{what}: error {error:.3g}, allowed {allowed:.3g}")
    return complaints


def judged_gradient(
    what: str, grad: Tensor, reference: Tensor, same: Tensor, x: Tensor, terms: float,
    whole: bool = False,
) -> list[str]:  # fmt: skip
    """Complaints about a gradient.

    The derivative that autograd takes of a definition can be inf - inf or 0 * inf where the true
    one is finite, and so can torch's. Where one of them is finite it decides. Where neither is, the
    gradient is torch's, or a number unless the input is NaN. Of an input that is NaN torch's scalar
    code and its vectors say different things: there the definition decides where it says NaN.
    """
    if grad.shape != reference.shape or grad.dtype != same.dtype:
        return [f"{what}: {grad.dtype} {tuple(grad.shape)}, wants {same.dtype} {tuple(same.shape)}"]
    known, native = reference.to(same.dtype).isfinite(), same.isfinite()
    complaints = judged(what, grad[known], reference[known], same[known], terms, whole)
    lost = reference.isnan() & (x.isnan() if x.shape == grad.shape else False)
    if not grad[lost].isnan().all():
        complaints.append(f"{what} of NaN: {grad[lost].tolist()[:4]}, wants NaN")
    only = native & ~known & ~lost
    complaints += judged(
        f"{what} as torch's", grad[only], same[only].double(), same[only], terms, whole
    )
    neither = ~known & ~native & ~lost
    got, want = grad[neither].double(), same[neither].double()
    right = (got == want) | (got.isnan() & want.isnan())
    if x.shape == grad.shape:
        right |= want.isnan() & got.isfinite() & ~x[neither].isnan()
    if not right.all():
        complaints.append(f"{what}: {got[~right].tolist()[:4]}, wants {want[~right].tolist()[:4]}")
    return complaints


def compare(
    got: Sequence[Tensor], op: Op, case: Case, dtype: torch.dtype, how: str = "like"
) -> list[str]:
    """Complaints about outputs and gradients: the judge's, all of them."""
    wanted = run(op.reference, case.to(torch.float64), dtype, how)
    native = run(op.native, case, dtype, how)
    whole = by_rows(op)
    complaints, outs = [], outputs_of(got, case)
    for i in range(outs):
        complaints += judged(f"output {i}", got[i], wanted[i], native[i], whole=whole)
    for i, x in enumerate(case.tensors()):
        grad, want, same = got[outs + i], wanted[outs + i], native[outs + i]
        count = terms(op, case, got[0], grad)
        complaints += judged_gradient(f"gradient {i}", grad, want, same, x, count, whole)
    return complaints


def strides(tensor: Tensor) -> list[int]:
    """The strides that matter: of dimensions with more than one index."""
    if tensor.numel() == 0:
        return []
    return [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]


def summary(complaints: Sequence[str]) -> str:
    """What a failing test prints: all of it, within reason."""
    more = f"\n… and {len(complaints) - 40} more" if len(complaints) > 40 else ""
    return f"{len(complaints)} complaints:\n" + "\n".join(complaints[:40]) + more


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh process, which can import the tests."""
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)]
    return subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
    )  # fmt: skip
