"""`python -m bench.scaling`: time and memory of the attention family over the length of a sequence.

Each point is measured in a process of its own: the forward pass under no_grad, forward and
backward, and the most memory that both needed beyond what was there before. Writes `scaling.json`
and a chart for each op.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from rich.progress import track
from rich.table import Table

from bench import ROOT, machine, measure, parity, report, rows
from bench.charts import OURS, STYLE, THEIRS
from bench.peers import PEERS
from pydl.table import TABLE, Make

OPS = ("local_attention", "linear_attention", "scaled_dot_product_attention")
BUDGET = measure.Budget(seconds=1.0, rounds=5, sample=1e-3, most=100)


def _settled() -> int:
    """Bytes that the process holds; from here on its peak counts anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(what: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"bench: /proc/self/status has no {what}")


def point(given: dict[str, Any]) -> dict[str, Any]:
    """Measures one contender at one length: ms and bytes."""
    op, device = TABLE[given["op"]], given["device"]
    dtype = getattr(torch, given["dtype"])
    make = Make(dtype, device, op.name)
    shape = (1, given["heads"], given["length"], given["width"])
    case = op.bench(make, shape)
    name = given["contender"]
    build = rows.ours(op, name[5:]) if name.startswith("pydl ") else PEERS[name].builder(
        name, op, device
    )  # fmt: skip
    if isinstance(build, str):
        return {"absent": build}
    # What is set up once is no part of it; nor is memory that a run as long would leave behind.
    parity.results(build, op.bench(make, (*shape[:2], 64, shape[3])))
    leaves = parity.leaves(case)
    wanted, run = parity.wanted(leaves), build(leaves)
    dys = [torch.ones(shape, dtype=dtype, device=device)]
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = _settled()
    torch.autograd.grad(parity.several(run()), wanted, dys)
    after = torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")
    with torch.no_grad():
        forward = measure.interleaved({"it": build(case)}, device, BUDGET)["it"]
    both = measure.interleaved(
        {"it": lambda: torch.autograd.grad(parity.several(run()), wanted, dys)}, device, BUDGET
    )["it"]
    return {"forward_ms": forward.median, "both_ms": both.median, "peak_bytes": after - before}


def elsewhere(given: dict[str, Any]) -> dict[str, Any]:
    """`point` in a fresh process; what failed is told."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.scaling", "--point", json.dumps(given)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        said = done.stderr.strip().splitlines()
        return {"absent": said[-1][:200] if said else f"ended with status {done.returncode}"}
    return json.loads(lines[-1])


def chart(op: str, points: list[dict[str, Any]], record: dict[str, Any], path: Path) -> None:
    """Two panels: milliseconds and mebibytes over the length, both axes logarithmic."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
        names = list(dict.fromkeys(p["contender"] for p in points))
        for i, name in enumerate(names):
            mine = sorted((p for p in points if p["contender"] == name), key=lambda p: p["length"])
            ours = name.startswith("pydl")
            colour = OURS[0] if ours else THEIRS[i % len(THEIRS)]
            at = [p["length"] for p in mine]
            for axis, values in zip(
                axes, ([p["both_ms"] for p in mine], [p["peak_bytes"] / 2**20 for p in mine]),
                strict=True,
            ):  # fmt: skip
                axis.plot(at, values, marker="o", markersize=4, color=colour, label=name)
        ours = sorted(
            (p for p in points if p["contender"].startswith("pydl")), key=lambda p: p["length"]
        )
        for axis, key, scale in zip(axes, ("both_ms", "peak_bytes"), (1, 2**20), strict=True):
            last = ours[-1]
            at = [p["length"] for p in ours]
            axis.plot(
                at, [last[key] / scale * n / last["length"] for n in at], color="#888888",
                linestyle=":", label="in proportion to the length",
            )  # fmt: skip
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2 if key == "peak_bytes" else 10)
            axis.set_xlabel("length of the sequence")
        axes[0].set_ylabel("forward and backward, ms")
        axes[1].set_ylabel("peak memory of both, MiB")
        first = points[0]
        figure.suptitle(
            f"{op}, {first['dtype']}, {first['heads']} heads of {first['width']}, "
            f"{first['device']}\n"
            f"{machine.describe(record, first['device'])}",
            fontsize=11, x=0.01, ha="left",
        )  # fmt: skip
        axes[0].legend(fontsize=9)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _lengths(text: str) -> list[int]:
    first, last = (int(part) for part in text.split(":"))
    found = [first]
    while found[-1] * 2 <= last:
        found.append(found[-1] * 2)
    return found


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.scaling",
        description="Time and memory of the attention family over the length of a sequence.",
    )
    p.add_argument("--ops", default="local_attention,linear_attention", help="comma list")
    p.add_argument("--lengths", default="1024:65536", help="FIRST:LAST, doubling")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--heads", type=int, default=8)
    p.add_argument("--width", type=int, default=64, help="size of a head")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--backend", help="pydl's backend (default: cpu, or cuda)")
    p.add_argument("--peers", default="torch,local-attention", help="comma list")
    p.add_argument("--peer-limit", type=int, default=8192, help="the longest that peers get")
    p.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "local")
    p.add_argument("--point", help=argparse.SUPPRESS)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(arguments)
    if args.point is not None:
        print(json.dumps(point(json.loads(args.point))))
        return 0
    ops, peers = args.ops.split(","), [name for name in args.peers.split(",") if name]
    for op in ops:
        if op not in OPS:
            p.error(f"--ops: {op!r} has no length, wants some of {', '.join(OPS)}")
    for name in peers:
        if name not in PEERS:
            p.error(f"--peers: {name!r} is no peer, wants some of {', '.join(PEERS)}")
    try:
        lengths = _lengths(args.lengths)
    except ValueError:
        p.error(f"--lengths: {args.lengths!r}, wants FIRST:LAST such as 1024:65536")
    backend = args.backend or args.device
    jobs = [
        {"op": op, "contender": name, "length": length, "dtype": args.dtype, "heads": args.heads,
         "width": args.width, "device": args.device}
        for op in ops
        for length in lengths
        for name in (f"pydl {backend}", *peers)
        if name.startswith("pydl") or (length <= args.peer_limit and PEERS[name].has(op))
    ]  # fmt: skip
    console = report.console()
    record = machine.record(args.device)
    points = [job | elsewhere(job) for job in track(jobs, "measuring", console=console)]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scaling.json").write_text(
        json.dumps({"machine": record, "points": points}, indent=1) + "\n"
    )
    table = Table("op", "contender", "length", "forward ms", "both ms", "peak MiB")
    for at in points:
        where = (at["op"], at["contender"], str(at["length"]))
        if "absent" in at:
            table.add_row(*where, at["absent"])
        else:
            table.add_row(
                *where, f"{at['forward_ms']:.2f}", f"{at['both_ms']:.2f}",
                f"{at['peak_bytes'] / 2**20:.0f}",
            )  # fmt: skip
    console.print(table)
    for op in ops:
        there = [at for at in points if at["op"] == op and "absent" not in at]
        if any(at["contender"].startswith("pydl") for at in there):
            chart(op, there, record, args.out / f"scaling_{op}_{args.dtype}.png")
    failed = [at for at in points if "absent" in at and at["contender"].startswith("pydl")]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
