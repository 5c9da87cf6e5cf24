"""`python -m pydl replace`: the report, and the exit status that scripts rely on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pydl import __main__ as cli
from pydl import load, measured
from tests import harness

HERE = "tests.test_replace_cli"
NOTHING = 3


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Mish())


def tokens() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 4), nn.GELU()).bfloat16()


def number() -> int:
    return NOTHING


def fails() -> nn.Module:
    raise OSError("no disk")


MODULE = network()


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "SECONDS", 0.0)


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["replace", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_prints_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = _run(capsys, f"{HERE}:network", "--example", "2,3,8,8", "--fuse")
    assert status == 0 and not err
    for word in ("3 modules replaced, 1 fused", "pydl.nn.Mish", "forward and backward", "fp64"):
        assert word in out
    status, out, _ = _run(
        capsys, f"{HERE}:MODULE", "--backend", "cpu", "--exclude", "2", "--include", "2,3"
    )
    assert status == 0 and "1 module replaced, 2 skipped" in out and "measured" not in out


def test_integers(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = _run(capsys, f"{HERE}:tokens", "--example", "2,5:int64:9")
    assert status == 0 and "measured" in out


def test_examples() -> None:
    model = tokens()
    assert load.example("2,3", model).dtype == torch.bfloat16
    assert load.example("4:float32", model).shape == (4,)
    drawn = load.example("100:int64:5", model)
    assert drawn.dtype == torch.int64 and set(drawn.tolist()) == set(range(5))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "path is 'nowhere', wants package.module:factory"),
        (["no.where:x"], "but no.where does not import: ModuleNotFoundError"),
        ([f"{HERE}:netwrk"], "but there is no 'netwrk', wants one of"),
        ([f"{HERE}:NOTHING"], "which is a int, wants a function that returns a model"),
        ([f"{HERE}:number"], "which returns a int, wants a torch.nn.Module"),
        ([f"{HERE}:fails"], "which fails: OSError: no disk"),
        ([f"{HERE}:network", "--example", "1x3"], "example is '1x3', wants sizes"),
        ([f"{HERE}:network", "--example", "3:float8"], "example is '3:float8', wants sizes"),
        ([f"{HERE}:network", "--example", "3:float32:9"], "example is '3:float32:9', wants sizes"),
        ([f"{HERE}:network", "--example", "1,2,8,8"], "the model before fails on them"),
    ],
)
def test_refuses(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    status, out, err = _run(capsys, *arguments)
    assert status == 2 and message in err and not out


def test_from_the_shell() -> None:
    """A module beside the working directory is found."""
    done = harness.python(
        "import runpy, sys; sys.argv = ['pydl', 'replace', 'examples.digits_mlp:network'];"
        "runpy.run_module('pydl', run_name='__main__')",
    )  # fmt: skip
    assert "9 modules replaced" in done.stdout
