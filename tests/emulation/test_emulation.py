"""The emulation runs right kernels rightly and notices wrong ones."""

from __future__ import annotations

import functools
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from . import build

SEEDS = 20  # of selftest.cpp


@functools.cache
def program(variant: str) -> Path:
    sources = [build.HERE / "selftest.cu", build.HERE / "selftest.cpp"]
    return build.build_program(variant, sources, build.CACHE / variant / "selftest")


def run(path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(path), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def output(variant: str, *arguments: object) -> str:
    done = run(program(variant), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("variant", build.VARIANTS)
def test_right_kernels(variant: str) -> None:
    assert output(variant, "check") == "all right\n"


@pytest.mark.parametrize("variant", build.VARIANTS)
def test_concurrent_launches(variant: str) -> None:
    assert output(variant, "threads") == "all right\n"


def test_missing_barriers_show() -> None:
    rows = [line.split() for line in output("plain", "missing").splitlines()]
    wrong = {name: [int(n) for n in counts] for name, *counts in rows}
    for name, (complete, *missing) in wrong.items():
        assert complete == 0, name
        assert all(n > SEEDS // 2 for n in missing), (name, missing)
    assert set(wrong) == {"sum", "reverse", "warp"}


@pytest.mark.parametrize("variant", build.VARIANTS)
def test_divergence_is_reported(variant: str) -> None:
    stuck = r"block \(0, 0, 0\): no thread can go on: of 128 threads "
    shuffle = r"wait at __shfl_{}sync<{}> with mask 0xffffffff"
    wanted = {
        0: stuck + "24 " + shuffle.format("xor_", "float") + ", 104 wait at __syncthreads",
        1: stuck + "64 wait at __syncthreads, 64 wait at __syncthreads_or",
        2: stuck + "124 " + shuffle.format("", "float") + ", 4 wait at __syncthreads",
        3: r".* shuffles from lane 20, which is not in the mask 0x0000ffff",
        4: r".* lane \d+ of warp \d calls __shfl_sync<float> with mask 0x0000ffff, which lacks it",
        5: r".* shuffles from lane 3, which has exited .* the mask 0xffffffff",
        6: stuck + "64 " + shuffle.format("", "float") + ", 64 " + shuffle.format("", "int"),
    }
    lines = output(variant, "wrong").splitlines()
    assert len(lines) == SEEDS * len(wanted)
    for line in lines:
        kind, message = line.split(": ", 1)
        assert re.fullmatch(wanted[int(kind)], message), line


def test_limits() -> None:
    *refused, largest = output("plain", "limits").splitlines()
    assert [re.sub(r"\d+ bytes", "bytes", line.split(";")[0]) for line in refused] == [
        "launch: a grid of 0 x 1 x 1 blocks",
        "launch: a grid of 1 x 0 x 1 blocks",
        "launch: a block of 0 x 1 x 1 threads",
        "launch: a block of 1025 x 1 x 1 threads",
        "launch: a grid of 2147483648 x 1 x 1 blocks",
        "launch: a grid of 1 x 65536 x 1 blocks",
        "launch: a grid of 1 x 1 x 65536 blocks",
        "launch: bytes of dynamic shared memory",
    ]
    assert largest == "no failure"


def test_clusters() -> None:
    missed, *failures = output("plain", "clusters").splitlines()
    assert int(missed) > SEEDS // 2
    assert [line.split(";")[0] for line in failures] == [
        "launch: clusters of 5 blocks of 96 threads in a grid of 24",
        "launch: clusters of 12 blocks of 96 threads in a grid of 24",
        "the kernel of a cluster wrote to static shared memory",
    ]


def test_order_is_shuffled_by_the_seed() -> None:
    assert output("plain", "order", 1) == output("plain", "order", 1)
    block_orders, thread_orders = set(), set()
    for seed in range(5):
        for line in output("plain", "order", seed).splitlines():
            numbers = [int(n) for n in line.split()]
            pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
            assert sorted(pairs) == [(b, t) for b in range(24) for t in range(64)]
            blocks = [b for b, _ in pairs]
            assert all(len(set(blocks[i : i + 64])) == 1 for i in range(0, len(blocks), 64))
            block_orders.add(tuple(blocks[::64]))
            thread_orders.add(tuple(t for _, t in pairs[:64]))
    assert len(block_orders) == len(thread_orders) == 10


@pytest.mark.parametrize("variant", ["plain", "asan"])
def test_unwritten_shared_memory(variant: str) -> None:
    values = [float(v) for v in output(variant, "unwritten").split()]
    for block in range(3):
        static, dynamic = values[64 * block :][:32], values[64 * block + 32 :][:32]
        assert static[:16] == dynamic[:16] == [1.0] * 16
        assert all(map(math.isnan, dynamic[16:]))
        # ASan watches the ends of static arrays instead.
        assert variant == "asan" or all(map(math.isnan, static[16:]))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (0, "heap-buffer-overflow"),
        (1, "index 32 out of bounds"),
        (2, "use-after-poison"),
        (3, "misaligned address"),
    ],
)
def test_sanitizers_catch(where: int, message: str) -> None:
    done = run(program("asan"), "past", where)
    assert done.returncode != 0
    assert message in done.stderr
    assert "selftest.cu" in done.stderr


def test_canary_behind_dynamic_shared_memory() -> None:
    message = output("plain", "past", 2)
    assert message == "block (0, 0, 0): wrote byte 128 of 128 bytes of dynamic shared memory\n"


def test_speed() -> None:
    print(output("plain", "speed"))


def test_compile_errors_are_shown(tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text('#include "cuda.h"\n__global__ void kernel() { no_such_function(); }\n')
    with pytest.raises(RuntimeError, match="no_such_function"):
        build.build_program("plain", [source], tmp_path / "broken")


def test_objects_are_built_again_only_when_their_inputs_change(tmp_path: Path) -> None:
    source, header = tmp_path / "main.cpp", tmp_path / "value.h"
    source.write_text('#include "value.h"\nint main() { return kValue; }\n')
    times = []
    for value in (3, 3, 4):
        header.write_text(f"constexpr int kValue = {value};\n")
        built = build.build_program("plain", [source], tmp_path / "program")
        assert run(built).returncode == value
        times.append(built.stat().st_mtime_ns)
    assert times[0] == times[1] < times[2]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_selftest_is_valid_cuda(tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++20", "-arch=sm_80", "-Werror", "all-warnings", "-c"]
    command += [str(build.HERE / "selftest.cu"), "-o", str(tmp_path / "selftest.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
