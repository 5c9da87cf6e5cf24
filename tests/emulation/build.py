"""Builds the CUDA kernels for the CPU: as a module for Python, or as a program without torch.

Objects are kept in build/emulation/<variant>/ and compiled again only when the content of what goes
into them changed. A lock makes concurrent builds of one variant wait for each other.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "emulation"

# ASan reports null pointers too, and UBSan's check for them doubles the time to compile.
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=null,vptr"]
VARIANTS = {
    "plain": ["-O2"],
    "ucontext": ["-O2", "-DPYDL_EMULATION_UCONTEXT"],  # how other processors switch fibers
    "asan": ["-O1", "-g1", "-fno-sanitize-recover=all", *_SANITIZERS],
}
# Kernels see the same bytes as float and as float4, which nvcc allows.
_FLAGS = ["-DPYDL_EMULATION", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"]
_FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter"]

_PRELOADED = ("libasan.so", "libstdc++.so")


@dataclass
class _Object:
    source: Path
    flags: Sequence[str] = ("-std=c++20",)
    inputs: str = ""  # what else it depends on
    label: str = ""

    def path(self, folder: Path) -> Path:
        where = hashlib.sha256(str(self.source.parent).encode()).hexdigest()[:8]
        return folder / f"{self.source.name}{self.label}.{where}.o"


def build(variant: str = "plain") -> Path:
    """Builds the Python module `_emulated` out of csrc/*.cu and csrc/module.cpp.

    Args:
        variant: A key of VARIANTS; "asan" has the address and undefined-behaviour sanitizers.

    Returns:
        The module's path.

    Raises:
        RuntimeError: The compiler or the linker failed; the message is its output.
    """
    import torch
    from torch.utils import cpp_extension

    flags = ["-std=c++20", "-DTORCH_EXTENSION_NAME=_emulated"]
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    for path in [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]:
        flags += ["-isystem", path]
    libraries = ["-shared", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    for path in cpp_extension.library_paths():
        libraries += [f"-L{path}", f"-Wl,-rpath,{path}"]
    kernels = [path for path in sorted(CSRC.glob("*.cu")) if not path.stem.endswith("_sm90")]
    module = _Object(CSRC / "module.cpp", flags, torch.__version__)
    out = CACHE / variant / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    return _make(variant, [_Object(path) for path in kernels], [module], libraries, out)


def build_program(variant: str, sources: Iterable[Path | str], out: Path | str) -> Path:
    """Builds a program out of C++ and CUDA sources, without torch and Python.

    standalone.h tells what the program offers to its `main`.

    Args:
        variant: A key of VARIANTS.
        sources: The files; one of them has `main`.
        out: Where to put the program.

    Returns:
        The program's path.

    Raises:
        RuntimeError: The compiler or the linker failed; the message is its output.
    """
    objects = [_Object(Path(source).resolve()) for source in sources]
    return _make(variant, objects, [_Object(HERE / "standalone.cpp")], ["-pthread"], Path(out))


@functools.cache
def load(variant: str = "plain") -> ModuleType:
    """Builds the module if need be and imports it; "asan" wants Python in asan_environment()."""
    import torch  # noqa: F401  (brings the libraries that the module is linked to)

    if variant == "asan" and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        raise RuntimeError("the asan module loads only into a Python started in asan_environment()")
    spec = importlib.util.spec_from_file_location("_emulated", build(variant))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def asan_environment() -> dict[str, str]:
    """What to add to the environment of a Python process that is to load the asan module."""
    # libasan wants to be first and to find the C++ library, which Python alone does not load.
    found = [
        _run([_compiler(), f"-print-file-name={name}"], quiet=True).strip() for name in _PRELOADED
    ]
    return {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}


def seed(value: int, variant: str = "plain") -> None:
    """Chooses the orders in which the loaded module's later launches run blocks and threads."""
    library = ctypes.CDLL(str(load(variant).__file__))
    library.pydl_emulation_seed(ctypes.c_uint64(value))


def _make(
    variant: str,
    kernels: list[_Object],
    others: list[_Object],
    libraries: list[str],
    out: Path,
) -> Path:
    edges = [
        _Object(HERE / "edge.cpp", ["-std=c++20", f"-DPYDL_EDGE={name}"], label=f".{name}")
        for name in ("shared_begin", "shared_end")
    ]
    # The order of the objects matters: see edge.cpp.
    machine = [_Object(HERE / "emulation.cpp"), _Object(HERE / "fiber.cpp")]
    objects = [edges[0], *kernels, edges[1], *machine, *others]
    folder = CACHE / variant
    out.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        keys = _compile(variant, objects, folder)
        compiler = [_compiler(), *VARIANTS[variant]]
        command = [*compiler, *(str(o.path(folder)) for o in objects), *libraries, "-o"]
        key = _digest([*keys, *command])
        if not _current(out, key):
            # In one step, because another process may have the old file mapped.
            temporary = out.with_name(f"{out.name}.{os.getpid()}")
            _key_file(out).unlink(missing_ok=True)
            _run([*command, str(temporary)])
            temporary.replace(out)
            _key_file(out).write_text(key)
    return out


def _compile(variant: str, objects: list[_Object], folder: Path) -> list[str]:
    version = _run([_compiler(), "--version"], quiet=True)

    def compile_one(item: _Object) -> str:
        source, path = item.source, item.path(folder)
        flags = [*VARIANTS[variant], *_FLAGS, *item.flags]
        # For quoted includes only: csrc has a math.h and a cuda.h of its own.
        flags += ["-iquote", str(CSRC), "-iquote", str(HERE)]
        places = {CSRC, HERE, source.parent}
        headers = {h for place in places for end in ("h", "cuh") for h in place.glob(f"*.{end}")}
        contents = [f.read_bytes().hex() for f in [source, *sorted(headers)]]
        key = _digest([version, item.inputs, *flags, *contents])
        if not _current(path, key):
            _key_file(path).unlink(missing_ok=True)
            _run([_compiler(), *flags, "-x", "c++", "-c", str(source), "-o", str(path)])
            _key_file(path).write_text(key)
        return key

    workers = max(1, min(2, os.cpu_count() or 1, int(os.environ.get("MAX_JOBS", "2"))))
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(compile_one, objects))


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _key_file(path: Path) -> Path:
    return path.with_name(path.name + ".key")


def _current(path: Path, key: str) -> bool:
    key_file = _key_file(path)
    return path.exists() and key_file.exists() and key_file.read_text() == key


def _run(command: list[str], quiet: bool = False) -> str:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
    if done.stdout and not quiet:  # warnings
        print(done.stdout, file=sys.stderr)
    return done.stdout


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
