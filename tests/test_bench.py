"""The benchmark: what it refuses, what a run leaves behind, and its arithmetic; no speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench.__main__ as command
from bench import apart, calibrate, measure, models, modes, options, parity, report, rows
from bench.options import Settings
from pydl import calibration
from pydl.table import TABLE, Op
from tests import harness

TINY = Settings(
    ops=("relu", "gated_act"), backends=("auto", "cpu"), peers=("torch",), dtypes=("float32",),
    shapes=((16, 64),), quick=True,
)  # fmt: skip


def _settings(*arguments: str) -> Settings:
    return options.settings(options.parser().parse_args(arguments))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ops", "gelo"], "--ops: 'gelo' is no op, wants some of sigmoid"),
        (["--ops", ","], "--ops: wants some of"),
        (["--dtype", "int8"], "--dtype: 'int8' is no dtype"),
        (["--shapes", "4x-1"], "--shapes: '4x-1', wants sizes of 1 and more"),
        (["--shapes", "4xx"], "--shapes: '4xx', wants sizes"),
        (["--peers", "jax"], "--peers: 'jax' is no peer"),
        (["--passes", "sideways"], "--passes: 'sideways' is no pass"),
        (["--modes", "fast"], "--modes: 'fast' is no mode"),
        (["--backends", "vulkan"], "--backends: 'vulkan' is no backend"),
    ],
)
def test_a_bad_option(arguments: list[str], message: str) -> None:
    with pytest.raises(options.UsageError) as error:
        _settings(*arguments)
    assert message in str(error.value)


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stop:
        command.main(["--device", "cuda"])
    assert stop.value.code == 2 and "torch sees no CUDA device" in capsys.readouterr().err


def test_settings_survive_json() -> None:
    assert Settings.from_json(TINY.to_json()) == TINY
    assert Settings.from_json(replace(TINY, shapes=None).to_json()).shapes is None


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table, JSON with every number's origin, and charts."""
    status = command.main([
        "--ops", "relu,prelu", "--shapes", "32x64", "--dtype", "float32,bfloat16", "--quick",
        "--modes", "as-it-comes,heap-reuse", "--out", str(tmp_path),
    ])  # fmt: skip
    out = capsys.readouterr().out
    assert status == 0 and "relu" in out and "32x64" in out
    found = json.loads((tmp_path / "results.json").read_text())
    assert len(found["rows"]) == 2 * 2 * 2 * 2
    assert set(found["ceilings"]) == {"as-it-comes", "heap-reuse"}
    assert found["ceilings"]["as-it-comes"]["copy_gb_per_s"] > 0
    for row in found["rows"]:
        assert row["parity"]["cpu"]["ok"] and row["mode"] in found["ceilings"]
        result = row["results"]["cpu"]
        assert result["ms"] == row["times"]["cpu"]["median"] > 0
        assert result["speedup"]["torch"] == row["times"]["torch"]["median"] / result["ms"]
    charts = [path.read_bytes() for path in tmp_path.glob("*.png")]
    assert charts and all(chart.startswith(b"\x89PNG") for chart in charts)


def test_nothing_wrong_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that fails the judge has a red row and no time; the run's status says so."""
    row = TABLE["relu"]

    def wrong(input: torch.Tensor, inplace: bool = False, *, backend: str | None = None):
        return row.function(input, backend=backend) * 1.01

    monkeypatch.setitem(TABLE, "relu", Op(**{**vars(row), "function": wrong}))
    found = list(rows.measured(replace(TINY, ops=("relu",)), "as-it-comes"))
    assert len(found) == 2
    for line in found:
        assert report.red(line) and "error" in line["parity"]["cpu"]["message"]
        assert not line["results"] and set(line["times"]) == {"torch"}


# A worker that dies, hangs and breaks at three contenders until they are left out, and at tanh.
_FAULTY = """
import json, os, sys, time
work = json.load(sys.stdin)
lost = [(op, who) for op, _, who, _ in json.loads(work["settings"])["lost"]]
def say(*item):
    print(json.dumps(item), flush=True)
for op, shape, dtype in work["jobs"]:
    for who in ("cuda", "triton"):
        if (op, who) in lost:
            continue
        say("at", who)
        if (op, who) == ("gated_act", "cuda"):
            sys.exit("an illegal memory access")
        if (op, who) == ("relu", "triton"):
            print("not an item", flush=True)
            time.sleep(60)
        if (op, who) == ("mish", "cuda"):
            say("broke", "an illegal instruction")
            os._exit(1)
        if op == "tanh":
            say("at", "")
            os._exit(1)
    say("row", {"op": op})
    say("done", None)
"""


def test_a_kernel_that_breaks_the_device() -> None:
    """Costs its contender, the rest is measured; where none was at work, it costs the row."""
    settings = replace(TINY, ops=("gated_act", "relu", "tanh", "mish"))
    runs = apart.Runs(settings, 0.0, (sys.executable, "-c", _FAULTY), patience=1.0)
    found = [row for _, row in runs.over(rows.jobs(settings))]
    assert [row["op"] for row in found] == list(settings.ops)
    assert [row["op"] for row in found if "lost" in row] == ["tanh"]
    assert "tanh 16x64 float32: LOST: its process ended with status 1" in found[2]["skipped"]
    assert [(one[0], one[2]) for one in runs.settings.lost] == [
        ("gated_act", "cuda"), ("relu", "triton"), ("mish", "cuda"),
    ]  # fmt: skip
    why = [one[3] for one in runs.settings.lost]
    assert "an illegal memory access" in why[0] and "said nothing for 1 s" in why[1]
    assert why[2] == "16x64: an illegal instruction"
    assert Settings.from_json(runs.settings.to_json()) == runs.settings


def test_the_rows_of_a_process_apart() -> None:
    """As on a GPU; what is left out is told, and what comes too late as well."""
    settings = replace(TINY, ops=("relu",), lost=(("relu", "float32", "cpu", "it broke"),))
    found = [row for _, row in apart.Runs(settings, 0.0).over(rows.jobs(settings))]
    assert [row["pass"] for row in found] == ["forward", "backward"]
    assert all(row["parity"]["cpu"]["message"] == "it broke" for row in found)
    assert all(set(row["times"]) == {"auto", "torch"} for row in found)
    late = [row for _, row in apart.Runs(settings, 1.0).over(rows.jobs(settings))]
    assert late[0]["skipped"] == "relu 16x64 float32: the minutes were over"


def test_what_charts_show_comes_first() -> None:
    settings = replace(TINY, device="cuda", peers=("torch", "compile"), shapes=None, quick=False)
    drawn, others = apart.groups(settings)
    assert [job[:2] for job in drawn] == [(op, (4096, 4096)) for op in settings.ops]
    assert settings.peers_of("relu", (4096, 4096)) == settings.peers and len(others) == 5
    assert settings.peers_of("relu", others[0][1]) == ("torch",)


def test_a_shape_that_an_op_cannot_take() -> None:
    """Is told as skipped when the user asked for it."""

    def refuses(make: object, shape: tuple[int, ...]) -> None:
        raise ValueError("wants an even number")

    op = Op(**{**vars(TABLE["relu"]), "bench": refuses})
    with pytest.raises(rows.UnfitShape, match="relu takes no shape 3: wants an even number"):
        rows.draw(op, (3,), torch.float32, "cpu")


def test_peers_are_checked_before_they_are_timed() -> None:
    """A peer that computes something else is told as absent, with the difference."""
    case = rows.draw(TABLE["silu"], (8, 8), torch.float32, "cpu")
    gate = parity.Gate(TABLE["silu"], case)
    assert gate.differs(lambda c: lambda: TABLE["silu"].native(*c.args)) is None
    reason = gate.differs(lambda c: lambda: TABLE["relu"].native(*c.args))
    assert reason is not None and "differs from the definition by" in reason


def test_the_order_changes() -> None:
    """Nobody always follows the same one, and each comes first as often."""
    names = ["a", "b", "c"]
    turns = [measure.order(names, turn) for turn in range(6)]
    assert all(sorted(turn) == names for turn in turns) and len({*map(tuple, turns)}) == 6


def test_medians() -> None:
    """Of a call that takes a known time."""
    import time

    times = measure.interleaved({"slow": lambda: time.sleep(2e-3)}, "cpu", measure.QUICK)
    assert 2.0 <= times["slow"].median < 20.0 and times["slow"].rounds >= measure.QUICK.rounds
    assert report.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_heap_reuse_is_checked() -> None:
    """The mode holds in its process, and is refused where the C library did not take it."""
    code = "from bench import modes; modes.reuse()"
    assert harness.python(code, **modes.HEAP_REUSE).returncode == 0
    done = harness.python(code, MALLOC_MMAP_MAX_="1000000")
    assert done.returncode != 0 and "remedy: --modes as-it-comes" in done.stderr


def test_smallest_gain() -> None:
    def smallest(**ratios: tuple[float, float]) -> int:
        return calibrate.smallest(
            {int(size[1:]): calibrate.Gains(*pair) for size, pair in ratios.items()}
        )

    assert smallest(n1=(0.9, 0.9), n4=(1.2, 1.3), n16=(2.0, 2.0)) == 4
    assert smallest(n1=(1.5, 1.5), n4=(0.9, 1.5), n16=(2.0, 2.0)) == 16
    assert smallest(n1=(1.5, 1.5), n4=(1.0, 1.01), n16=(0.99, 1.5)) == 1
    assert smallest(n1=(1.0, 1.01), n4=(1.0, 1.2)) == 4
    assert smallest(n1=(1.5, 1.5), n4=(0.9, 0.9)) == -1


def test_calibration_writes_what_it_measured(tmp_path: Path) -> None:
    """Only the ops asked for are replaced, and other devices' parts stay."""
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"sizes": {"cuda": {"relu": {"float32": ["cuda", 1, 2]}}}}))
    settings = replace(TINY, ops=("relu",), backends=("cpu",))
    assert calibrate.run(settings, path, sizes=(1024, 4096)) == 0
    found = json.loads(path.read_text())
    assert found["sizes"]["cuda"] == {"relu": {"float32": ["cuda", 1, 2]}}
    part = calibration.kind("cpu")
    assert set(found["sizes"]) == {"cuda", part} and set(found["measured"]) == {part}
    assert set(found["sizes"][part]) == {"relu"}
    for backend, forward, both in found["sizes"][part]["relu"].values():
        assert backend == "cpu" and {forward, both} <= {-1, 1024, 4096}
    calibration.reload()


def test_pytest_benchmark() -> None:
    """`pytest bench --benchmark-only` measures the same rows."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-q", "-p",
         "no:cacheprovider", "--ops", "relu", "--shapes", "8x64", "--backends", "cpu"],
        cwd=harness.ROOT, capture_output=True, text=True, timeout=300,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "relu 8x64 float32 backward" in done.stdout and "4 passed" in done.stdout


def test_whole_models(tmp_path: Path) -> None:
    """They learn the same after `pydl.replace`; small ones, whose times say nothing."""
    pytest.importorskip("transformers", reason="transformers is missing")
    assert models.main(["--quick", "--backend", "cpu", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "models.json").read_text())
    assert found["models"].keys() == models.MODELS.keys()
    for one in found["models"].values():
        assert one["ratio"] > 0 and " 0 fused" not in one["what"]
    assert 0 < found["replace_bert_base_seconds"] < 30
