"""The table of measured sizes: what it decides, and how a file that is none is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import pydl
import pydl.functional as F
from bench import calibrate
from pydl import backends, calibration
from pydl.nn.steps import batch_norm_worthwhile
from tests import harness


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"sizes": 3}', '{"sizes": {"cpu": {"relu": {"float99": ["cpu", 1, 1]}}}}',
     '{"sizes": {"cpu": {"relu": {"float32": ["cpu", 1]}}}}'],
)  # fmt: skip
def test_a_bad_calibration(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is no calibration table: which, and how to write one."""
    path = tmp_path / "calibration.json"
    path.write_text(text)
    monkeypatch.setenv("PYDL_CALIBRATION", str(path))
    with pytest.raises(
        ValueError, match=r"calibration.json is not a calibration table.*--calibrate"
    ):
        calibration.read()


def test_a_missing_calibration(tmp_path: Path) -> None:
    """A file that is not there is an empty table, with a warning, and can be written."""
    path = tmp_path / "new" / "none.json"
    code = """
import torch, pydl
from pydl import backends, calibration
assert calibration.read() == {} and backends.choose("gelu", None, torch.ones(1 << 22)) == "torch"
"""
    done = harness.python(code, PYDL_CALIBRATION=str(path))
    assert done.returncode == 0, done.stderr
    assert "none.json, which is not there" in done.stderr and "--calibrate" in done.stderr
    code = """
from dataclasses import replace
from bench import calibrate
from tests.test_bench import TINY
assert calibrate.run(replace(TINY, ops=("relu",), backends=("cpu",)), sizes=(1024,)) == 0
"""
    done = harness.python(code, PYDL_CALIBRATION=str(path))
    assert done.returncode == 0, done.stderr
    assert "relu" in json.loads(path.read_text())["sizes"][calibration.kind("cpu")]


def test_calibration_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel from the measured size on; native PyTorch below, and where none was measured."""
    path = tmp_path / "calibration.json"
    sizes = {"cpu": {"gelu": {"float32": ["cpu", 100, 200], "bfloat16": ["cpu", -1, 50]}}}
    path.write_text(json.dumps({"sizes": sizes}))
    monkeypatch.setenv("PYDL_CALIBRATION", str(path))
    try:
        calibration.reload()

        def chosen(
            n: int, dtype: torch.dtype = torch.float32, grad: bool = False, op: str = "gelu"
        ) -> str:
            return backends.choose(op, None, torch.ones(n, dtype=dtype, requires_grad=grad))

        assert [chosen(99), chosen(100), chosen(5000)] == ["torch", "cpu", "cpu"]
        assert [chosen(199, grad=True), chosen(200, grad=True)] == ["torch", "cpu"]
        with torch.no_grad():
            assert chosen(100, grad=True) == "cpu"
        assert (
            chosen(10**6, torch.bfloat16) == "torch" and chosen(50, torch.bfloat16, True) == "cpu"
        )
        assert chosen(10**6, torch.float16) == "torch" and chosen(10**6, op="mish") == "torch"
        assert backends.choose("gelu", None, torch.eye(200).to_sparse()) == "torch"
    finally:
        monkeypatch.undo()
        calibration.reload()


def test_a_kind_of_processor_comes_before_its_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured on this machine's kind counts, for the rest the type's."""
    path, mine = tmp_path / "calibration.json", calibration.kind("cpu")
    assert mine.startswith("cpu ") and mine.endswith(pydl._native.C.cpu_level())
    of = lambda size: {"float32": ["cpu", size, size]}  # noqa: E731
    sizes = {
        mine: {"gelu": of(10)},
        "cpu Unheard avx2": {"gelu": of(1), "relu": of(1)},
        "cpu": {"gelu": of(300), "silu": of(20)},
    }
    path.write_text(json.dumps({"sizes": sizes}))
    monkeypatch.setenv("PYDL_CALIBRATION", str(path))
    table = calibration.read()
    assert {op: limits[1] for (_, op, _), limits in table.items()} == {"gelu": 10, "silu": 20}
    assert {device for device, *_ in table} == {"cpu"}


def test_channels_of_few_values_are_measured_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What 7 x 7 images lose keeps no kernel from 14 x 14 ones, in the fused pass neither."""
    path = tmp_path / "calibration.json"
    names = ("batch_norm", "batch_norm_act", "instance_norm", "group_norm")
    sizes = {name: {"float32": ["cpu", 1, 1]} for name in names}
    path.write_text(json.dumps({"sizes": {"cpu": sizes}}))
    monkeypatch.setenv("PYDL_CALIBRATION", str(path))
    norm = pydl.nn.BatchNorm2d(4)
    calls = {
        "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
        "batch_norm_act": lambda x: F.batch_norm_act(x, None, None, training=True),
        "instance_norm": lambda x: F.instance_norm(x),
        "group_norm": lambda x: F.group_norm(x, 2),
    }
    try:
        calibration.reload()
        for side, ours in ((14, True), (7, False)):
            x = torch.randn(3, 4, side, side, requires_grad=True)
            for name, call in calls.items():
                node = call(x).grad_fn
                found = node.name() if node else ""
                assert (found == "BatchNormBackward") == ours, (name, side, found)
            assert batch_norm_worthwhile(norm, x) == ours
    finally:
        monkeypatch.undo()
        calibration.reload()


def test_the_table_that_ships_has_every_key() -> None:
    measured = {op for device, op, _ in calibration.read() if device == "cpu"}
    assert {name for name, *_ in calibrate.entries()} == measured
