"""The tests that need a GPU, for `make gpu-test`: with pytest where it is installed, and in any
case what plain Python can check there, so that a bare machine with torch, Triton and nvcc will do.

Every op and backend has a process of its own, several of which run at once: a kernel that breaks
the device, or hangs, takes no other check with it. gpu_tests.json is written after each of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

import pydl
from pydl import backends, functional
from pydl.table import TABLE

BACKENDS = ("cuda", "triton")
# Seconds that a process may take.
PATIENCE = 240.0
# Families whose kernels take long to compile: a process for each dtype.
SLOW = ("attention", "linear_attention", "batch_norm")


def same_bits_each_run(backend: str) -> None:
    x = torch.randn(257, 4099, device="cuda", requires_grad=True)
    weight = torch.rand(4099, device="cuda", requires_grad=True)

    def once() -> list[torch.Tensor]:
        y = functional.prelu(x, weight, backend=backend)
        return [y, *torch.autograd.grad(y.sum(), (x, weight))]

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)


def more_than_2_31_elements(backend: str) -> None:
    n = 2**31 + 4099
    x = torch.full((n,), -1.0, dtype=torch.bfloat16, device="cuda")
    x[-1] = 2.0
    y = functional.relu(x, backend=backend)
    assert y[-1].item() == 2.0 and y[:-1].abs().max().item() == 0.0
    # Strided, so that the other kernel runs: its input has every second element.
    z = functional.leaky_relu(x.view(-1)[::2], 0.5, backend=backend)
    assert z[0].item() == -0.5 and z[-1].item() == (2.0 if n % 2 else -0.5)


def other_stream(backend: str) -> None:
    x = torch.randn(1 << 24, device="cuda")
    want = torch.nn.functional.mish(torch.nn.functional.mish(x))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = functional.mish(functional.mish(x, backend=backend), backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.allclose(y, want, atol=1e-5)


def cuda_graph(backend: str) -> None:
    x = torch.randn(1 << 16, device="cuda")
    functional.gelu(x, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = functional.gelu(x, backend=backend)
    x.fill_(3.0)
    graph.replay()
    assert torch.allclose(y, torch.nn.functional.gelu(x), atol=1e-6)


def compiled(backend: str) -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return functional.gated_act(functional.gelu(x, backend=backend), x, "silu", backend=backend)

    x = torch.randn(64, 128, device="cuda", requires_grad=True)
    out = torch.compile(step, fullgraph=True)(x)
    (got,) = torch.autograd.grad(out.sum(), x)
    (want,) = torch.autograd.grad(step(x).sum(), x)
    assert torch.allclose(got, want, atol=1e-5)


def same_dropout_on_all_backends(backend: str) -> None:
    seed = torch.tensor([2**40 + 17, 2**33 + 5])
    x, bias = torch.randn(129, 515), torch.randn(515)
    want = functional.bias_act(x, bias, "relu", 0.4, seed=seed, backend="cpu")
    got = functional.bias_act(x.cuda(), bias.cuda(), "relu", 0.4, seed=seed.cuda(), backend=backend)
    assert torch.allclose(got.cpu(), want, atol=1e-6)


def second_gpu(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        print("    not tested: there is one GPU")
        return
    x = torch.randn(1000, device="cuda:1")
    assert torch.allclose(
        functional.silu(x, backend=backend), torch.nn.functional.silu(x), atol=1e-6
    )


CHECKS: tuple[Callable[[str], None], ...] = (
    same_bits_each_run,
    more_than_2_31_elements,
    other_stream,
    cuda_graph,
    compiled,
    same_dropout_on_all_backends,
    second_gpu,
)


@dataclass(frozen=True)
class Task:
    """A check: what to run, and what it is called."""

    backend: str
    check: str
    command: tuple[str, ...]


def tasks() -> list[Task]:
    """All but pytest's, the long ones first."""
    found = []
    for backend in BACKENDS:
        if backends.unavailable(backend):
            continue
        for op in TABLE.values():
            names = [str(dtype).removeprefix("torch.") for dtype in op.dtypes]
            for dtypes in names if op.family in SLOW else [",".join(names)]:
                command = ("-m", "pydl", "check", "--device", "cuda", "--backends", backend,
                           "--ops", op.name, "--dtype", dtypes)  # fmt: skip
                label = f"{op.name} {dtypes}" if op.family in SLOW else op.name
                found.append(Task(backend, label, command))
        for check in CHECKS:
            command = ("-m", "tests.gpu", "--one", f"{backend}:{check.__name__}")
            found.append(Task(backend, check.__name__, command))
    return sorted(found, key=lambda task: not task.check.startswith(SLOW))


def run(task: Task, seconds: float) -> dict[str, object]:
    """What came of it: `ok`, and the end of what it said."""
    begun = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *task.command], text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={"OMP_NUM_THREADS": "2", **os.environ},
    ) as process:  # fmt: skip
        try:
            said, status = process.communicate(timeout=max(seconds, 1.0))[0], process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, status = process.communicate()[0], None
    none = "  no kernels" in said and "cases  largest" in said and " 0 cases" in said
    ok = status == 0 or (status == 1 and none)
    end = f"\nended after {seconds:.0f} s" if status is None else ""
    return {
        "backend": task.backend, "check": task.check, "ok": ok, "status": status,
        "seconds": round(time.perf_counter() - begun, 1),
        "output": said[-4000:] + end if not ok else said.strip().splitlines()[-1:],
    }  # fmt: skip


class Results:
    """What came of the checks so far, in gpu_tests.json."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "gpu_tests.json"
        self.all: list[dict[str, object]] = []

    def add(self, result: dict[str, object]) -> None:
        self.all.append(result)
        words = "ok    " if result["ok"] else "FAILED"
        print(f"{words} {result['backend']} {result['check']} ({result['seconds']} s)", flush=True)
        if not result["ok"]:
            print(str(result["output"])[-1500:], flush=True)
        record = {
            "pydl": pydl.__version__, "torch": torch.__version__,
            "device": torch.cuda.get_device_name(), "ops": list(TABLE), "results": self.all,
        }  # fmt: skip
        self._path.write_text(json.dumps(record, indent=1) + "\n")


def suite(count: int) -> Task:
    """The tests under tests/ that run kernels on a GPU."""
    names = ("test_parity", "test_gradients", "test_opcheck", "test_compile")
    more = ["-n", str(count), "--max-worker-restart", "100"]
    more = more if importlib.util.find_spec("xdist") else []
    command = [
        "-m",
        "pytest",
        "-q",
        *more,
        "-k",
        "cuda or triton",
        *(f"tests/{n}.py" for n in names),
    ]
    return Task("both", "pytest", tuple(command))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="the folder for gpu_tests.json")
    parser.add_argument("--minutes", type=float, default=9.0, help="end what still runs then")
    parser.add_argument("--one", help="a backend and one of the checks here, as cuda:cuda_graph")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tests.gpu: torch sees no CUDA device: nothing was tested")
        return 1
    if args.one:
        backend, name = args.one.split(":")
        next(check for check in CHECKS if check.__name__ == name)(backend)
        torch.cuda.synchronize()
        return 0
    if args.out is None:
        parser.error("--out: wants a folder")
    until = time.monotonic() + 60 * args.minutes
    results, count = Results(args.out), max(1, min(10, (os.cpu_count() or 1) // 2))
    for backend in BACKENDS:
        if why := backends.unavailable(backend):
            results.add({"backend": backend, "check": "available", "ok": False, "seconds": 0,
                         "output": why})  # fmt: skip
    with ThreadPoolExecutor(count) as pool:
        running = [
            pool.submit(lambda t: run(t, min(PATIENCE, until - time.monotonic())), task)
            for task in tasks()
        ]
        for done in as_completed(running):
            results.add(done.result())
    if importlib.util.find_spec("pytest"):
        results.add(run(suite(count), until - time.monotonic()))
    else:
        print("pytest is not installed: the suite under tests/ was not run, the checks above were")
    failed = sum(not result["ok"] for result in results.all)
    print(f"{len(results.all) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
