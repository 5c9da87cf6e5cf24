"""Builds pydl: csrc/ is found by glob, the CPU kernels are compiled once per instruction-set level,
and the CUDA kernels where nvcc and a CUDA torch are there.

Switches: PYDL_CUDA=0|1 (default: when possible), TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX, CUDA_HOME.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
HOST_ONLY = {
    "differentiable.cpp",
    "module.cpp",
    "pool.cpp",
}  # these see torch; every other .cpp is a kernel file
LEVELS = {
    0: [],
    1: ["-mavx2", "-mfma", "-mf16c"],
    2: ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}
DEFAULT_ARCHS = "8.0;9.0a;10.0"


def stop(problem: str, remedy: str) -> None:
    """Ends the build with what is wrong and what to do about it."""
    sys.exit(f"\npydl: {problem}\npydl: remedy: {remedy}\n")


def find_torch():
    try:
        import torch
    except ImportError:
        stop(
            "torch is not installed in the environment that builds pydl",
            "install torch first, then: pip install --no-build-isolation .",
        )
    return torch


def find_compiler() -> str:
    wanted = os.environ.get("CXX", "c++")
    found = shutil.which(wanted.split()[0]) or (
        shutil.which("g++") if "CXX" not in os.environ else None
    )
    if not found:
        stop(
            f"no C++ compiler: {wanted!r} is not on PATH",
            "install g++ 11 or newer (Debian: apt-get install g++), or set CXX",
        )
    return found


def find_nvcc(torch) -> str | None:
    """nvcc where CUDA kernels are to be built, else None."""
    switch = os.environ.get("PYDL_CUDA", "auto")
    if switch not in ("0", "1", "auto", ""):
        stop(f"PYDL_CUDA is {switch!r}", "set it to 0 (CPU only) or 1 (CUDA required), or unset it")
    if switch == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if nvcc and not Path(nvcc).exists():
        nvcc = None
    if switch == "1" and not torch.version.cuda:
        stop(
            f"PYDL_CUDA=1, but torch {torch.__version__} is built without CUDA",
            "install a CUDA build of torch, or set PYDL_CUDA=0",
        )
    if switch == "1" and not nvcc:
        stop(
            "PYDL_CUDA=1, but nvcc was not found",
            "install the CUDA toolkit or set CUDA_HOME, or set PYDL_CUDA=0",
        )
    if not torch.version.cuda or not nvcc:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release and release.group(1) != torch.version.cuda.split(".")[0]:
        stop(
            f"nvcc is CUDA {release.group(1)}.{release.group(2)}, but torch is built for "
            f"CUDA {torch.version.cuda}",
            "set CUDA_HOME to a toolkit of torch's major version, or set PYDL_CUDA=0 to build for "
            "the CPU only",
        )
    return nvcc


def toolkit_of(nvcc: str) -> Path:
    """The toolkit that nvcc belongs to. It is asked, because what is on PATH may be a script."""
    command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    folder = Path(top.group(1) if top else Path(nvcc).resolve().parent.parent).resolve()
    if not any((path / "include/cuda_runtime.h").exists() for path in (folder, Path("/usr"))):
        stop(
            f"cuda_runtime.h is not in {folder / 'include'}, where {nvcc} has its toolkit",
            "install the toolkit's headers, set CUDA_HOME to a toolkit, or set PYDL_CUDA=0",
        )
    return folder


def arch_flags(torch) -> list[str]:
    text = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not text and torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        text = ";".join(
            f"{major}.{minor}{'a' if major >= 9 else ''}" for major, minor in sorted(found)
        )
    flags = []
    for arch in re.split(r"[;, ]+", (text or DEFAULT_ARCHS).strip()):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if not match:
            stop(
                f"TORCH_CUDA_ARCH_LIST names {arch!r}",
                'list capabilities, for example "8.0;9.0a;10.0+PTX"',
            )
        number = match.group(1) + match.group(2)
        code = [f"sm_{number}"] + ([f"compute_{number}"] if match.group(3) else [])
        flags.append(f"-gencode=arch=compute_{number},code=[{','.join(code)}]")
    return flags


def ninja_jobs() -> list[str]:
    """ninja's option for MAX_JOBS; none where that is not set."""
    jobs = os.environ.get("MAX_JOBS", "")
    if jobs and not (jobs.isascii() and jobs.isdigit() and int(jobs) > 0):
        stop(f"MAX_JOBS is {jobs!r}", "set it to how many compilers run at once, or unset it")
    return ["-j", jobs] if jobs else []


class Build(build_ext):
    """Writes a ninja file and runs it: one object per file and level, rebuilt when an include
    changed."""

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        from torch.utils import cpp_extension

        compiler, nvcc, jobs = find_compiler(), find_nvcc(torch), ninja_jobs()
        # Kept between builds, editable ones too, which get a temporary folder from setuptools.
        work = (
            ROOT
            / "build"
            / f"{sys.implementation.cache_tag}-{platform.machine()}{'-cuda' if nvcc else ''}"
        )
        work.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)

        includes = [f"-isystem {sysconfig.get_paths()['include']}"]
        includes += [f"-isystem {path}" for path in cpp_extension.include_paths()]
        abi = int(torch.compiled_with_cxx11_abi())
        common = (
            "-std=c++20 -fPIC -Wall -Wextra -Wno-psabi -Wno-unused-parameter "
            f"-D_GLIBCXX_USE_CXX11_ABI={abi}"
        )
        # at::parallel_for, a template, is serial without OpenMP.
        host = f"-O2 {common} -fopenmp -DTORCH_EXTENSION_NAME=_C " + " ".join(includes)
        kernel = f"-O2 {common} -ffp-contract=fast -fno-math-errno -fno-trapping-math"
        if nvcc:
            toolkit = toolkit_of(nvcc)
            host += f" -DPYDL_CUDA -isystem {toolkit / 'include'}"

        x86 = platform.machine() in ("x86_64", "AMD64")
        objects, lines = [], []
        for source in sorted(CSRC.glob("*.cpp")):
            if source.name in HOST_ONLY:
                objects.append(work / f"{source.stem}.o")
                lines.append(f"build {objects[-1]}: cxx {source}\n  flags = {host}")
                continue
            for level, flags in LEVELS.items() if x86 else [(0, [])]:
                objects.append(work / f"{source.stem}.level{level}.o")
                lines.append(
                    f"build {objects[-1]}: cxx {source}\n"
                    f"  flags = {kernel} -DPYDL_LEVEL={level} {' '.join(flags)}"
                )
        libraries = ["c10", "torch_cpu", "torch", "torch_python"]
        folders = cpp_extension.library_paths()
        link = []
        if nvcc:
            libraries += ["c10_cuda", "torch_cuda", "cudart"]
            parts = [toolkit / part for part in ("lib64", "lib")]
            folders = [*folders, *(str(part) for part in parts if part.exists())]
            for source in sorted(CSRC.glob("*.cu")):
                objects.append(work / f"{source.stem}.cu.o")
                lines.append(
                    f"build {objects[-1]}: nvcc {source}\n  flags = {' '.join(arch_flags(torch))}"
                )
        link += [f"-L{folder}" for folder in folders] + [f"-l{library}" for library in libraries]
        # torch's own copy where it has one: two of them would not share their threads.
        own = sorted(
            p for folder in cpp_extension.library_paths() for p in Path(folder).glob("libgomp*")
        )
        link.append(str(own[0]) if own else "-lgomp")
        link += [f"-Wl,-rpath,{folder}" for folder in cpp_extension.library_paths()[:1]]
        rules = [
            "ninja_required_version = 1.5",
            f"rule cxx\n  command = {compiler} $flags -MMD -MF $out.d -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc",
            f"rule nvcc\n  command = {nvcc} -std=c++20 -O3 -Xcompiler -fPIC "
            f"--expt-relaxed-constexpr --expt-extended-lambda -Werror all-warnings $flags "
            "-MMD -MF $out.d -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = {compiler} -shared $in {' '.join(link)} -o $out",
        ]
        joined = " ".join(str(o) for o in objects)
        lines.append(f"build {target}: link {joined}\ndefault {target}")
        (work / "build.ninja").write_text("\n".join(rules + lines) + "\n")
        ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        subprocess.run([*command, "-C", str(work), *jobs], check=True)

        built = {
            "torch": torch.__version__,
            "cuda": torch.version.cuda if nvcc else None,
            "archs": " ".join(arch_flags(torch)) if nvcc else "",
            "compiler": subprocess.run(
                [compiler, "--version"], capture_output=True, text=True
            ).stdout.split("\n")[0],
        }
        # What the extension was built with, read before it is loaded.
        (target.parent / "_built.py").write_text(f"BUILT = {built!r}\n")
        parts = f" and CUDA {torch.version.cuda}" if nvcc else " only"
        print(f"pydl: built for the CPU{parts}, torch {torch.__version__}")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        made = Path(self.build_lib) / "pydl" / "_built.py"
        shutil.copy(made, Path(self.get_finalized_command("build_py").get_package_dir("pydl")))

    def get_outputs(self) -> list[str]:
        return [
            *super().get_outputs(),
            *(str(Path(o).parent / "_built.py") for o in super().get_outputs()),
        ]


setup(ext_modules=[Extension("pydl._C", sources=[])], cmdclass={"build_ext": Build})
