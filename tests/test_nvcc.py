"""Every .cu file compiles with nvcc for sm_80, sm_90a and sm_100, warnings as errors, without
spills, and the disassembly shows that contiguous data moves 16 bytes at a time. No GPU is
needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "csrc").glob("*.cu"))
ARCHS = ("80", "90a", "100")
# Kernels of the 16-byte way; the others serve what is strided, misaligned or rare.
_WIDE = re.compile(
    r"map_flat_kernel|(map_strided|sum_(rows|columns))_kernel.*Li[48]EE"
    r"|(apply|dx)_kernel.*Li[48]ELb|norm_(fwd|bwd)_kernel"
)


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    found = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if not found or not Path(found).exists():
        pytest.skip("no nvcc: the CUDA files were not compiled")
    return found


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, str]]:
    """(file, arch) -> (object, ptxas' report)."""
    nvcc, folder = _nvcc(), tmp_path_factory.mktemp("objects")
    running = {}
    made: dict[tuple[str, str], tuple[Path, str]] = {}

    def finish() -> None:
        key, (process, out) = next(iter(running.items()))
        report, _ = process.communicate()
        assert process.returncode == 0, f"{key}: {report[-4000:]}"
        made[key] = (out, report)
        del running[key]

    for file in FILES:
        for arch in ARCHS:
            if file.stem.endswith("_sm90") and arch != "90a":
                continue
            if len(running) == 2:
                finish()
            out = folder / f"{file.stem}.{arch}.o"
            command = [
                nvcc, "-std=c++20", "-O3", "-Xcompiler", "-fPIC", "--expt-relaxed-constexpr",
                "--expt-extended-lambda", "-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills",
                f"-gencode=arch=compute_{arch},code=sm_{arch}", "-c", str(file), "-o", str(out),
            ]  # fmt: skip
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            running[file.stem, arch] = (process, out)
    while running:
        finish()
    return made


def test_no_spills_nor_local_memory(objects: dict[tuple[str, str], tuple[Path, str]]) -> None:
    bad = []
    for key, (_, report) in objects.items():
        entries = re.findall(
            r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, "
            r"(\d+) bytes spill stores, (\d+) bytes",
            report,
            re.S,
        )
        assert entries, f"{key}: ptxas reported nothing"
        bad += [(key, name) for name, *sizes in entries if any(size != "0" for size in sizes)]
    assert not bad


def test_accesses_are_16_bytes(objects: dict[tuple[str, str], tuple[Path, str]]) -> None:
    triton = pytest.importorskip("triton", reason="the disassembler comes with Triton")
    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    checked, clusters, bad = 0, 0, []
    for (stem, arch), (path, _) in objects.items():
        if arch != "90a":
            continue
        text = subprocess.run(
            [dump, "--dump-sass", path], capture_output=True, text=True, check=True
        ).stdout
        for function in text.split("Function : ")[1:]:
            name = function.split("\n", 1)[0]
            if not _WIDE.search(name) or "IdN" in name:  # fp64 is not tuned
                continue
            checked += 1
            loads, stores = (
                re.findall(r"LDG\.E\.128", function),
                re.findall(r"STG\.E\.128", function),
            )
            unproven = re.findall(r"\bLD\.E\.128", function)  # not known to be global memory
            if not loads or not stores or unproven:
                bad.append((stem, name))
            if re.search(r"norm_(fwd|bwd)_kernel.*Lb1E", name):
                clusters += "UCGABAR_ARV" in function and "UCGABAR_WAIT" in function
    assert checked > 20
    assert clusters == 16  # layer_norm's and add_layer_norm's, by dtypes
    assert not bad
