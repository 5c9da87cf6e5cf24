"""What the table-driven tests share: backends, running a call with its gradients, judging, watching kernels."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pydl import backends
from pydl._native import C
from pydl.table import Case, Op, judge

BACKENDS = ("cpu", "cuda", "triton")
ROOT = Path(__file__).resolve().parents[1]

# The largest call, in elements of its tensors together, that an interpreted backend is given.
_MOST = {"triton": 6000, "cuda": 1_000_000}


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
    """Why a backend cannot be tested here, or None; loads the emulation of CUDA where there is no GPU."""
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


def reorder(seed: int) -> None:
    """Another order of threads for what the emulation runs next."""
    if backends._emulated:
        from tests.emulation import build

        build.seed(seed)


def cases(
    op: Op, backend: str, dtype: torch.dtype, share: float = 1.0
) -> tuple[list[Case], int, int]:
    """(the row's samples on the backend's device, how many were too large for it, what is too large).

    `share` thins a slow backend further.
    """
    drawn = op.cases(dtype, device(backend))
    if kind(backend) == backend:
        return drawn, 0, 0
    most = int(_MOST[backend] * share)
    kept = [case for case in drawn if elements(case) <= most]
    return kept, len(drawn) - len(kept), most


def elements(case: Case) -> int:
    return sum(tensor.numel() for tensor in case.tensors())


def moderate(case: Case, most: int, bound: float = 30.0) -> bool:
    """Whether a call is small, with values that differences can be taken at, each element of its own memory."""
    return elements(case) <= most and all(
        tensor.isfinite().all() and (tensor.numel() == 0 or tensor.abs().max() <= bound)
        and not (tensor.numel() > 1 and 0 in tensor.stride())
        for tensor in case.tensors()
    )  # fmt: skip


def on(op: Op, backend: str | None) -> Callable[..., Tensor]:
    """The op's function with its backend chosen."""
    return functools.partial(op.function, backend=backend)


def bind(case: Case, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """The case's positional arguments with other tensors."""
    given = iter(tensors)
    return tuple(next(given) if isinstance(a, Tensor) else a for a in case.args)


def leaves(case: Case) -> list[Tensor]:
    """The case's tensors, memory shared, as fresh leaves that require grad."""
    return [t.detach().requires_grad_(t.is_floating_point()) for t in case.tensors()]


DY = ("like", "contiguous", "expanded", "transposed")


def upstream(out: Tensor, dtype: torch.dtype, how: str = "like") -> Tensor:
    """A gradient for `out`, of values that `dtype` holds, the same each time; laid out like it or otherwise."""
    generator = torch.Generator().manual_seed(out.numel())
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


def run(
    function: Callable[..., Tensor], case: Case, dtype: torch.dtype, how: str = "like"
) -> list[Tensor]:
    """The output and the gradient of every tensor; the upstream gradient has values of `dtype`."""
    given = leaves(case)
    out = function(*bind(case, given), **case.kwargs)
    grads = torch.autograd.grad(out, given, upstream(out.detach(), dtype, how))
    return [out.detach(), *grads]


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
    for low, high in zip(edges, edges[1:], strict=False):
        yield finite & (size >= low) & (size < high)


def judged(what: str, out: Tensor, reference: Tensor, same: Tensor, terms: float = 0.0) -> list[str]:
    """Complaints about a value: shape, dtype, `judge`."""
    if out.shape != reference.shape or out.dtype != same.dtype:
        return [f"{what}: {out.dtype} {tuple(out.shape)}, wants {same.dtype} {tuple(same.shape)}"]
    complaints = []
    for band in _bands(reference) if out.numel() else ():
        if not band.any():
            continue
        right, error, allowed = judge(out[band], reference[band], same[band], terms)
        if not right:
            complaints.append(f"{what}: error {error:.3g}, allowed {allowed:.3g}")
    return complaints


def judged_gradient(
    what: str, grad: Tensor, reference: Tensor, same: Tensor, x: Tensor, terms: float
) -> list[str]:
    """Complaints about a gradient.

    The derivative that autograd takes of a definition can be inf - inf or 0 * inf where the true one is finite, and
    so can torch's. Where one of them is finite it decides. Where both are not, the gradient is torch's, or a number
    unless the input is NaN.
    """
    if grad.shape != reference.shape or grad.dtype != same.dtype:
        return [f"{what}: {grad.dtype} {tuple(grad.shape)}, wants {same.dtype} {tuple(same.shape)}"]
    known, native = reference.to(same.dtype).isfinite(), same.isfinite()
    complaints = judged(what, grad[known], reference[known], same[known], terms)
    only = native & ~known
    complaints += judged(f"{what} as torch's", grad[only], same[only].double(), same[only], terms)
    neither = ~known & ~native
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
    """Complaints about an output and its gradients against the definition in fp64 and native PyTorch."""
    wanted = run(op.reference, case.to(torch.float64), dtype, how)
    native = run(op.native, case, dtype, how)
    complaints = judged("output", got[0], wanted[0], native[0])
    for i, x in enumerate(case.tensors()):
        grad, want, same = got[1 + i], wanted[1 + i], native[1 + i]
        terms = got[0].numel() / max(1, grad.numel())
        complaints += judged_gradient(f"gradient {i}", grad, want, same, x, terms)
    return complaints


def strides(tensor: Tensor) -> list[int]:
    """The strides that matter: of dimensions with more than one index."""
    if tensor.numel() == 0:
        return []
    return [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]


@contextmanager
def intercepted(wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Every kernel that an op asks for passes through `wrap` first."""
    original = backends.kernel
    modules = [
        module for name, module in list(sys.modules.items())
        if name.startswith("pydl.") and getattr(module, "kernel", None) is original
    ]  # fmt: skip
    assert modules
    for module in modules:
        module.kernel = lambda backend, name: wrap(original(backend, name))
    try:
        yield
    finally:
        for module in modules:
            module.kernel = original


def outputs(kernel: Any) -> list[bool]:
    """Which arguments an operator writes."""
    return [a.alias_info is not None and a.alias_info.is_write for a in kernel._schema.arguments]


# What memory holds before a kernel writes it: a NaN, and an ordinary number; with the integer that has these bits.
_POISON = {
    8: (torch.int64, 0x7FF8DEADBEEFDEAD, -0x3F0123456789ABCD),
    4: (torch.int32, 0x7FC0BEEF, -0x38BABCDF),
    2: (torch.int16, 0x7FDE, -0x3855),
    1: (torch.uint8, 0xA5, 0x5A),
}


class Guard:
    """Runs kernels on outputs that are poisoned and lie inside of larger poisoned memory.

    Args:
        poison: 0 for NaN, 1 for a number. What a kernel leaves unwritten shows as a difference between the two.
        shift: Elements by which outputs are moved from where vectors are aligned.
    """

    def __init__(self, poison: int = 0, shift: int = 0) -> None:
        self.poison, self.shift = poison, shift
        self.complaints: list[str] = []
        self.calls = 0

    def __call__(self, kernel: Any) -> Callable[..., None]:
        def call(*args: Any) -> None:
            self.calls += 1
            written = outputs(kernel)
            inside: dict[int, tuple[Tensor, Tensor]] = {}
            for i, arg in enumerate(args):
                if written[i] and arg is not None:
                    inside[i] = self._embed(arg)
            given, watched = list(args), []
            for i, arg in enumerate(args):
                if i in inside:
                    given[i] = inside[i][1]
                elif isinstance(arg, Tensor):
                    twins = [k for k in inside if args[k].data_ptr() == arg.data_ptr() and arg.numel()]
                    if twins:  # in place
                        given[i] = inside[twins[0]][1].copy_(arg)
                    else:
                        watched.append((i, arg, arg.detach().clone(), arg._version))
            kernel(*given)
            for i, arg, before, version in watched:
                if arg._version != version or not same_bits(arg, before):
                    self.complaints.append(f"{kernel} changes argument {i}, which is an input")
            for i, (buffer, view) in inside.items():
                result = view.clone()
                bits_of = buffer.view(_POISON[view.element_size()][0])
                bits_of.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(
                    self._pattern(view)
                )
                if (bits_of != self._pattern(view)).any():
                    self.complaints.append(f"{kernel} writes outside of argument {i}")
                args[i].copy_(result)

        return call

    def _pattern(self, tensor: Tensor) -> int:
        return _POISON[tensor.element_size()][1 + self.poison]

    def _embed(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """(a poisoned buffer, a view of it that looks like the tensor)."""
        integer = _POISON[tensor.element_size()][0]
        spans = [(n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
        extent = sum(spans) + 1 if tensor.numel() else 0
        margin = 1024
        buffer = torch.full(
            (extent + 2 * margin,), self._pattern(tensor), dtype=integer, device=tensor.device
        ).view(tensor.dtype)
        offset = margin + self.shift
        return buffer, buffer.as_strided(tensor.shape, tensor.stride(), offset)


class Recorder:
    """Remembers the calls of kernels: (operator, arguments)."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __call__(self, kernel: Any) -> Callable[..., None]:
        def call(*args: Any) -> None:
            kept = [a.detach() if isinstance(a, Tensor) else a for a in args]
            self.calls.append((kernel, tuple(kept)))
            kernel(*args)

        return call


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
