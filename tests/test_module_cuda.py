"""The CUDA branch of csrc/module.cpp compiles against torch's headers, which the CPU build of torch
ships too."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]


def test_module_compiles_with_cuda(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    compiler = shutil.which("g++")
    if not nvcc or not compiler:
        pytest.skip("no nvcc or no g++: module.cpp was not compiled with CUDA")
    # A CPU build of torch lacks this one file, which only says how torch was configured.
    stub = tmp_path / "c10" / "cuda" / "impl"
    stub.mkdir(parents=True)
    (stub / "cuda_cmake_macros.h").write_text("#pragma once\n")
    toolkit = Path(nvcc).resolve().parent.parent / "include"
    if not (toolkit / "cuda_runtime.h").exists():
        toolkit = Path("/usr/local/cuda/include")
    includes = [tmp_path, toolkit, sysconfig.get_paths()["include"], *cpp_extension.include_paths()]
    flags = [part for path in includes for part in ("-isystem", str(path))]
    done = subprocess.run(
        [
            compiler, "-std=c++20", "-fopenmp", "-fsyntax-only", "-Wall", "-Wextra",
            "-Wno-unused-parameter", "-DPYDL_CUDA", "-DTORCH_EXTENSION_NAME=_C",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            *flags, str(ROOT / "csrc" / "module.cpp"),
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
