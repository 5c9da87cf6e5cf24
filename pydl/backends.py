"""Who computes: which backends are there and why others are not, and which one serves a call.

`torch` is the native PyTorch function, `reference` the plain definition that everything is judged
by, and `cpu`, `cuda` and `triton` are pydl's kernels. The order of precedence is: the argument
`backend=`, then `use_backend(...)`, then the environment's `PYDL_BACKEND`, then automatic: the
fastest measured for the device, dtype and size (see `calibration.py`). A choice by name never falls
back to another backend.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pydl import calibration, switches
from pydl._native import C

NAMES = ("torch", "reference", "cpu", "cuda", "triton")

# (backend, function) -> the operator, filled as backends load.
_OPS: dict[tuple[str, str], Any] = {}
# The same without what torch.ops does on the way; what is traced calls the operator.
_DIRECT: dict[tuple[str, str], Any] = {}
_triton_error: str | None = None
_emulated = False


def _check_name(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"pydl: {where} is {name!r}, wants one of {', '.join(NAMES)}")
    return name


_environment: str | None = os.environ.get("PYDL_BACKEND") or None
try:
    _environment = _environment and _check_name(_environment, "PYDL_BACKEND")
except ValueError as error:
    switches.refuse("PYDL_BACKEND", str(error))
    _environment = None


class _Chosen(threading.local):
    """What a thread asked for; None is automatic."""

    backend: str | None = _environment


_chosen = _Chosen()
# What torch.compile reads: it guards on a module's variable, not on a thread's.
_traced: str | None = _environment
_inside: list[list[str | None]] = []
_lock = threading.Lock()


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Makes every call of this thread use a backend, or the automatic choice where `name` is None.

    Raises:
        ValueError: the name is none of `torch, reference, cpu, cuda, triton`.
        RuntimeError: the backend is not available here; names the reasons.
    """
    global _traced
    if name is not None and unavailable(_check_name(name, "use_backend's argument")):
        raise RuntimeError(f"pydl: backend {name!r} is not available: {unavailable(name)}")
    if torch.compiler.is_compiling():
        # Neither locks nor a thread's variables can be traced, and a trace reads only this.
        outside, _traced = _traced, name
        try:
            yield
        finally:
            _traced = outside
        return
    before, mine = _chosen.backend, [name]
    with _lock:
        _inside.append(mine)
        _chosen.backend = _traced = name
    try:
        yield
    finally:
        # Threads may leave in any order: the last that is still inside decides what is traced.
        with _lock:
            _inside[:] = [choice for choice in _inside if choice is not mine]
            _chosen.backend = before
            _traced = _inside[-1][0] if _inside else _environment


def requested(argument: str | None) -> str | None:
    """The backend asked for by the argument, the context or the environment; None for automatic."""
    if argument is not None:
        return _check_name(argument, "backend")
    return _traced if torch.compiler.is_compiling() else _chosen.backend


def load_triton() -> None:
    """Imports the Triton kernels, which registers them.

    Raises:
        RuntimeError: Triton is missing.
    """
    global _triton_error
    if _triton_error is None and not any(backend == "triton" for backend, _ in _OPS):
        try:
            import triton  # noqa: F401
        except ImportError as error:
            _triton_error = f"Triton does not import ({error}); remedy: pip install 'triton>=3.6'"
        else:
            from pydl.kernels import register

            register()
            _enlist("triton")
    if _triton_error is not None:
        raise RuntimeError(f"pydl: backend 'triton' is not available: {_triton_error}")


def unavailable(name: str) -> str | None:
    """Why a backend cannot be used on this machine, or None if it can."""
    if name == "cuda" and not cuda_devices():
        if not _cuda_built:
            return "pydl was built without CUDA: nvcc and a CUDA build of torch make it"
        return "torch sees no CUDA device"
    if name == "triton":
        try:
            load_triton()
        except RuntimeError as error:
            return str(error).split("not available: ", 1)[1]
        if not triton_devices():
            return "torch sees no CUDA device, and TRITON_INTERPRET=1 is not set"
    return None


def emulate_cuda(loaded: bool) -> None:
    """Says that backend `cuda` runs on CPU tensors: the tests' emulation registered it."""
    global _emulated
    _emulated = loaded
    if loaded:
        _enlist("cuda")


def cuda_devices() -> tuple[str, ...]:
    """Device types that backend `cuda` serves here."""
    if _emulated:
        return ("cpu",)
    return ("cuda",) if _cuda_built and torch.cuda.is_available() else ()


def triton_devices() -> tuple[str, ...]:
    """Device types that backend `triton` serves here: the interpreter takes CPU tensors."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ("cpu",)
    return ("cuda",) if torch.cuda.is_available() else ()


def serves(name: str) -> tuple[str, ...]:
    """Device types a backend serves here; empty for any."""
    if name == "cpu":
        return ("cpu",)
    return {"cuda": cuda_devices, "triton": triton_devices}.get(name, tuple)()


def takes(name: str, dtype: torch.dtype) -> bool:
    """Whether a backend has kernels for a dtype: all that an op's row lists, fp64 but for
    Triton."""
    return name != "triton" or dtype != torch.float64


class MissingKernel(RuntimeError):
    """A backend has no kernel for an op."""


def kernel(backend: str, name: str) -> Any:
    """The operator `torch.ops.pydl_<backend>.<name>`.

    Raises:
        MissingKernel: the backend has no such kernel.
    """
    found = (_OPS if torch.compiler.is_compiling() else _DIRECT).get((backend, name))
    if found is None:
        raise MissingKernel(f"pydl: {name}: backend {backend!r} has no kernel for it")
    return found


def _enlist(backend: str) -> None:
    """Looks a backend's operators up once: torch.compile traces no lookup in torch.ops."""
    for known, name, *_ in C.entries():
        if known == "cpu":
            packet = getattr(getattr(torch.ops, f"pydl_{backend}"), name, None)
            if packet is not None:
                op = _OPS[backend, name] = packet.default
                own = backend != "triton" and not _emulated
                _DIRECT[backend, name] = C.direct(backend, name, op) if own else op


_enlist("cpu")
_cuda_built = any(backend == "cuda" for backend, *_ in C.entries())
if _cuda_built:
    _enlist("cuda")


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def choose(
    op: str,
    argument: str | None,
    first: Tensor,
    *others: Tensor,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    key: Callable[[str, Tensor], str] | None = None,
) -> str:
    """The backend that serves this call; `key(op, first)` is what it was measured as, where that is
    not always `op`.

    Raises:
        RuntimeError: the backend asked for cannot serve it; the message lists every reason.
    """
    # A small tensor's call takes a microsecond: what most of them need to know comes first.
    if argument is None and not torch.compiler.is_compiling() and _chosen.backend is None:
        try:
            if first.numel() < calibration.smallest:
                return "torch"
        except AttributeError:  # no tensor: torch says so as its users know it
            return "torch"
    name = requested(argument)
    tensors = (first, *others)
    if name is None:
        return automatic(key(op, first) if key else op, *tensors)
    if name == "torch":
        return name
    # The usual call, of which a small tensor's takes a few microseconds, raises nothing below.
    own = first.is_cpu if name == "cpu" else name == "cuda" and first.is_cuda and _cuda_built
    if own and dtypes is FLOATS and not others and first.dtype in FLOATS and _dense(first):
        return name
    reasons = []
    served, anywhere = serves(name), name == "reference"
    if missing := unavailable(name):
        reasons.append(missing)
    elif not anywhere and first.device.type not in served:
        reasons.append(f"it serves {' and '.join(served)} tensors, input is on {first.device}")
    dtypes = tuple(dtype for dtype in dtypes if takes(name, dtype))
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in dtypes:
            wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            reasons.append(
                f"tensor {i} has dtype {str(tensor.dtype).removeprefix('torch.')}, wants {wanted}"
            )
        elif anywhere:
            continue
        elif tensor.dtype != first.dtype:
            reasons.append(f"tensor {i} has dtype {tensor.dtype}, but the input has {first.dtype}")
        if tensor.device != first.device:
            reasons.append(f"tensor {i} is on {tensor.device}, but the input is on {first.device}")
        if tensor.layout != torch.strided or tensor.is_nested:
            reasons.append(f"tensor {i} is not a dense strided tensor")
    if reasons:
        raise RuntimeError(
            f"pydl: {op}: backend {name!r} cannot serve this call: " + "; ".join(reasons)
        )
    return name


def below(op: str, like: Tensor, elements: int) -> bool:
    """Whether native PyTorch is the fastest for so many elements of a tensor's kind, and nothing
    else is asked for."""
    limits = calibration.limits(like.device.type, op, like.dtype)
    return (limits is None or elements < min(limits[1:])) and requested(None) is None


_PLAIN = (Tensor, torch.nn.Parameter)


def plain(tensor: Any) -> bool:
    """Whether it is a tensor of torch's own type: neither of a subclass nor a DTensor."""
    return type(tensor) in _PLAIN


def ordinary(first: Tensor, *others: Tensor) -> bool:
    """Whether all are plain and dense, of one dtype and on one device."""
    for tensor in (first, *others):
        same = tensor.dtype == first.dtype and tensor.device == first.device
        if not (plain(tensor) and same and _dense(tensor)):
            return False
    return True


def automatic(
    op: str, *tensors: Tensor, elements: int | None = None, dtype: torch.dtype | None = None
) -> str:
    """The fastest backend measured, native PyTorch where none was, or where a tensor is special.

    `elements` and `dtype` are those of the op's own input where the first tensor is another.
    """
    first = tensors[0]
    limits = calibration.limits(first.device.type, op, dtype or first.dtype)
    if limits is None:
        return "torch"
    backend, smallest, smallest_with_grad = limits
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    size = first.numel() if elements is None else elements
    if size < (smallest_with_grad if grad else smallest):
        return "torch"
    if ordinary(*tensors):
        return backend
    if not hasattr(first, "device_mesh") or torch.compiler.is_compiling():
        return "torch"
    from pydl import shards

    n = shards.elements(tensors)
    large = n is not None and n >= (smallest_with_grad if grad else smallest)
    return backend if large else "torch"


_compiled_empty_like: Callable[[Tensor], Tensor] = C.empty_like


def empty_like(like: Tensor) -> Tensor:
    """`torch.empty_like`, with the memory of a large CPU tensor taken from the pool."""
    if torch.compiler.is_compiling() or not plain(like):
        return torch.empty_like(like)
    return _compiled_empty_like(like)


_compiled_empty: Callable[..., Tensor] = C.empty


def empty(like: Tensor, dtype: torch.dtype, *sizes: int) -> Tensor:
    """`torch.empty` on the device of `like`, with the memory of a large CPU tensor from the
    pool."""
    if torch.compiler.is_compiling():
        return torch.empty(sizes, dtype=dtype, device=like.device)
    return _compiled_empty(like, dtype, *sizes)
