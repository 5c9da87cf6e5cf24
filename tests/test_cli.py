"""`python -m pydl`: what it prints, and the exit status that scripts rely on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pydl import __main__ as cli
from pydl import check, functional
from pydl.table import TABLE, Case, Op
from tests import harness


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(arguments)
    out, err = capsys.readouterr()
    return status, out, err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    """Versions, devices and every backend; the same as JSON."""
    status, text, _ = _run(capsys, "info")
    assert status == 0
    words = (torch.__version__, "kernels for", "bf16", "pool", "reference", "cpu", "cuda", "triton")
    for word in words:
        assert word in text
    status, out, _ = _run(capsys, "info", "--json")
    found = json.loads(out)
    assert status == 0 and set(found["backends"]) == {"torch", "reference", "cpu", "cuda", "triton"}
    assert found["backends"]["cpu"].startswith("yes")


def test_info_says_why_not() -> None:
    """Without the interpreter and without a GPU, Triton has a reason, and CUDA a remedy."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = harness.python("import pydl.__main__ as m; m.main(['info'])", TRITON_INTERPRET="")
    assert "triton       no: " in done.stdout and "TRITON_INTERPRET=1 is not set" in done.stdout
    assert "cuda         no: " in done.stdout


def test_info_names_the_switches_that_are_set() -> None:
    done = harness.python("import pydl.__main__ as m; m.main(['info'])", PYDL_CPU_LEVEL="baseline")
    assert "kernels for baseline (PYDL_CPU_LEVEL; the machine has" in done.stdout
    assert "'baseline': the instruction set" in done.stdout


def test_info_survives_switches_that_are_wrong(tmp_path: Path) -> None:
    """It names them, and does without; everything else refuses them."""
    path = tmp_path / "table.json"
    path.write_text("[]")
    wrong = {
        "PYDL_BACKEND": "gpu", "PYDL_CALIBRATION": str(path), "PYDL_CPU_LEVEL": "sse9",
        "PYDL_POOL_BYTES": "much",
    }  # fmt: skip
    for options in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "pydl", "info", *options], cwd=harness.ROOT, text=True,
            capture_output=True, timeout=300, env={**os.environ, **wrong},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        for name, text in wrong.items():
            assert name in done.stdout and f"{text!r} is left out: " in done.stdout
    for name, text in wrong.items():
        done = harness.python("import pydl.__main__ as m; m.main(['info'])", **{name: text})
        assert done.returncode != 0 and "ValueError: pydl: " in done.stderr, name


def test_check_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    """A line per op and backend, status 0."""
    status, out, _ = _run(
        capsys, "check", "--ops", "relu,mish", "--backends", "cpu", "--dtype", "fp32,bf16"
    )
    lines = out.splitlines()
    assert status == 0 and len(lines) == 3
    assert lines[0].startswith("relu") and lines[1].startswith("mish") and "ok" in lines[1]
    assert lines[2].endswith("all right")


def test_check_finds_a_wrong_kernel(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An op that computes something else fails by name, with the error and what was allowed."""
    right = TABLE["relu"]

    def wrong(input: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
        return functional.relu(input, backend=backend) + 1e-3

    monkeypatch.setitem(TABLE, "relu", Op(**{**vars(right), "function": wrong}))
    status, out, _ = _run(capsys, "check", "--ops", "relu", "--backends", "cpu", "--dtype", "fp32")
    assert status == 1 and "FAIL" in out and "error 0.001" in out


def test_check_goes_on_after_an_exception(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(input: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
        raise RuntimeError("no luck")

    monkeypatch.setitem(TABLE, "relu", Op(**{**vars(TABLE["relu"]), "function": fails}))
    status, out, _ = _run(
        capsys, "check", "--ops", "relu,silu", "--backends", "cpu", "--dtype", "fp32"
    )
    assert status == 1 and "RuntimeError: no luck" in out and "silu" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ops", "gelo"], "ops has 'gelo', wants some of sigmoid"),
        (["--backends", "vulkan"], "backends has 'vulkan', wants some of"),
        (["--backends", "cpu", "--device", "cuda"], "backend 'cpu' serves cpu"),
        (["--device", "mps"], "device is 'mps'"),
    ],
)
def test_check_refuses(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status, out, err = _run(capsys, "check", *arguments)
    assert status == 2 and message in err and not out


def test_a_bad_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["check", "--dtype", "fp8"])
    assert stop.value.code == 2 and "has 'fp8', wants some of float32" in capsys.readouterr().err


def test_check_compares_any_call() -> None:
    """`pydl.check.compare` judges a call that is no sample."""
    case = Case("mine", (torch.randn(77, 3),))
    results = check.compare(TABLE["silu"], "cpu", case)
    assert [r.what for r in results] == ["output", "gradient 0"] and all(r.ok for r in results)


def test_table_lists_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = _run(capsys, "table")
    assert status == 0 and len(out.splitlines()) == 2 + len(TABLE)
