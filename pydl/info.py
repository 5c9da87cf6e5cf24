"""What is installed, what can compute here, and what the environment asks for."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

from pydl import backends, calibration, pool, processor, switches
from pydl._native import C

SWITCHES = {
    "PYDL_BACKEND": "the backend of every call that does not name one",
    "PYDL_CALIBRATION": "the table that the automatic choice reads",
    "PYDL_CPU_LEVEL": "the instruction set of the CPU kernels: baseline, avx2 or avx512",
    "PYDL_POOL_BYTES": "how much freed memory the CPU pool keeps",
    "TRITON_INTERPRET": "1 runs Triton kernels on CPU tensors, slowly",
    "PYDL_CUDA": "at build: 1 demands CUDA kernels, 0 leaves them out",
    "TORCH_CUDA_ARCH_LIST": "at build: the GPUs to compile for",
    "MAX_JOBS": "at build: how many compilers run at once",
    "CUDA_VISIBLE_DEVICES": "the GPUs that torch sees",
    "OMP_NUM_THREADS": "threads of the CPU kernels",
}

Section = dict[str, str]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"


def _versions() -> Section:
    from pydl import __version__
    from pydl._built import BUILT

    cuda = f"CUDA {BUILT['cuda']}, {BUILT['archs']}" if BUILT["cuda"] else "CPU kernels only"
    return {
        "pydl": f"{__version__} in {Path(__file__).parent}",
        "built": f"for torch {BUILT['torch']}, {cuda}, with {BUILT['compiler']}",
        "torch": f"{torch.__version__}, "
        + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"),
        "triton": _version("triton"),
        "python": f"{platform.python_version()} in {sys.executable}",
        "system": platform.platform(),
    }


def _devices() -> Section:
    level, machine = C.cpu_level(), C.machine_level()
    less = "" if level == machine else f" (PYDL_CPU_LEVEL; the machine has {machine})"
    found = {
        "cpu": f"{processor.name()}, {torch.get_num_threads()} threads, kernels for {level}{less}, "
        f"bf16 attention in {C.bf16_products()}"
    }
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = (
            f"{about.name}, sm_{about.major}{about.minor}, {_size(about.total_memory)}, "
            f"{about.multi_processor_count} multiprocessors"
        )
    return found


def _backend(name: str) -> str:
    if why := backends.unavailable(name):
        return f"no: {why}"
    return f"yes, for {' and '.join(backends.serves(name)) or 'any'} tensors"


def _calibration() -> Section:
    counts: dict[str, set[str]] = {}
    for device, op, _ in calibration.read():
        counts.setdefault(device, set()).add(op)
    if not counts:
        return {
            "none": "the automatic choice is native PyTorch; remedy: python -m bench --calibrate"
        }
    return {device: f"{len(ops)} ops measured" for device, ops in counts.items()}


def _environment() -> Section:
    found = {
        name: switches.refused.get(name) or f"{os.environ[name]!r}: {meaning}"
        for name, meaning in SWITCHES.items()
        if name in os.environ or name in switches.refused
    }
    return found or {"none": f"of {', '.join(SWITCHES)}"}


def collect() -> dict[str, Section]:
    """Everything that `python -m pydl info` shows, by section."""
    state = pool.info()
    return {
        "versions": _versions(),
        "devices": _devices(),
        "backends": {name: _backend(name) for name in backends.NAMES},
        "automatic choice, measured on": _calibration(),
        "pool for large CPU outputs": {
            "cap": _size(state["cap"]) if state["cap"] else "0: off",
            "waiting": _size(state["cached"]),
            "in use": _size(state["in_use"]),
        },
        "environment": _environment(),
    }


def text() -> str:
    """The same for a terminal."""
    lines = []
    for title, section in collect().items():
        lines.append(title)
        lines += [f"  {key:<12} {value}" for key, value in section.items()]
    return "\n".join(lines)
