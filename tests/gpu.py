"""The tests that need a GPU, for `make gpu-test`: with pytest where it is installed, and in any
case what plain Python can check there, so that a bare machine with torch, Triton and nvcc will do.
Writes gpu_tests.json."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import pydl
from pydl import backends, functional
from pydl.table import TABLE

BACKENDS = ("cuda", "triton")


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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder for gpu_tests.json")
    folder = parser.parse_args().out
    if not torch.cuda.is_available():
        print("tests.gpu: torch sees no CUDA device: nothing was tested")
        return 1
    results = []
    for backend in BACKENDS:
        if why := backends.unavailable(backend):
            print(f"FAILED {backend}: not available: {why}")
            results.append({"backend": backend, "check": "available", "ok": False, "error": why})
            continue
        for check in CHECKS:
            start, error = time.perf_counter(), ""
            try:
                check(backend)
                torch.cuda.synchronize()
            except Exception:
                error = traceback.format_exc()
                print(error)
            spent = time.perf_counter() - start
            print(f"{'FAILED' if error else 'ok    '} {backend} {check.__name__} ({spent:.1f} s)")
            results.append(
                {"backend": backend, "check": check.__name__, "ok": not error, "error": error}
            )
    if importlib.util.find_spec("pytest"):
        suite = [
            f"tests/{name}.py"
            for name in ("test_parity", "test_gradients", "test_opcheck", "test_compile")
        ]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-k", "cuda or triton", *suite]
        )
        results.append(
            {"backend": "both", "check": "pytest", "ok": done.returncode == 0, "error": ""}
        )
    else:
        print("pytest is not installed: the suite under tests/ was not run, the checks above were")
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "pydl": pydl.__version__, "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "ops": list(TABLE), "results": results,
    }  # fmt: skip
    (folder / "gpu_tests.json").write_text(json.dumps(record, indent=1) + "\n")
    failed = sum(not result["ok"] for result in results)
    print(f"{len(results) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
