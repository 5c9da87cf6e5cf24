"""Charts of a run: speed-ups against each peer, and achieved rates against the ceiling of the same
rounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from bench import machine
from bench.modes import WORDS
from bench.options import Settings, named
from bench.rows import Row
from pydl.table import TABLE

# Okabe and Ito's colours, which colour-blind readers tell apart.
OURS = ("#D55E00", "#E69F00", "#8C2D04")
THEIRS = ("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#999999", "#F0E442", "#000000", "#5E4FA2")
TICKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16, 32, 64, 128)
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E0E0E0",
    "legend.frameon": False,
}


def _charted(settings: Settings, row: Row) -> bool:
    """Whether a row's shape is drawn: one that was asked for, or the first of its op."""
    if "skipped" in row:
        return False
    return settings.shapes is not None or row["shape"] == named(
        TABLE[row["op"]].bench_shapes[0], settings.variant
    )


def _title(what: str, row: Row, record: dict[str, Any]) -> str:
    where = machine.describe(record, row["device"])
    mode = f", allocator: {WORDS[row['mode']]}" if row["device"] == "cpu" else ""
    return f"{what}\n{row['dtype']}, {row['shape']}, {row['device']}{mode}\n{where}"


def _panels(rows: Sequence[Row], bars: int, title: str) -> tuple[plt.Figure, dict[str, Axes]]:
    """A figure with a panel for each pass, one above the other, wide enough for its bars."""
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    ops = max(len([r for r in rows if r["pass"] == p]) for p in passes)
    width = min(24.0, max(7.5, 1.8 + ops * (0.35 + 0.27 * bars)))
    figure, axes = plt.subplots(
        len(passes),
        1,
        figsize=(width, 1.3 + 3.1 * len(passes)),
        squeeze=False,
        layout="constrained",
    )
    head, *rest = title.split("\n")
    figure.suptitle(head, fontsize=13, fontweight="bold", x=0.01, ha="left")
    axes[0][0].set_title("\n".join(rest), fontsize=9.5, loc="left", color="#444444", pad=14)
    for axis, direction in zip(axes[:, 0], passes, strict=True):
        axis.annotate(
            direction, (1, 1), xycoords="axes fraction", ha="right", va="bottom", fontweight="bold"
        )
    return figure, dict(zip(passes, axes[:, 0], strict=True))


def _groups(axis: Axes, rows: Sequence[Row]) -> None:
    axis.set_xticks(range(len(rows)), [row["op"] for row in rows], rotation=30, ha="right")
    axis.tick_params(axis="x", length=0)
    axis.set_xlim(-0.6, len(rows) - 0.4)


def _legend(figure: plt.Figure, axis: Axes, columns: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=min(columns, 6), fontsize=9.5)


def speedups(rows: Sequence[Row], record: dict[str, Any], path: Path) -> bool:
    """Bars per op: how many times faster than each peer, on a logarithmic axis; False where there
    is nothing."""
    backend = "auto" if "auto" in rows[0]["backends"] else rows[0]["backends"][0]
    rows = [row for row in rows if row["results"].get(backend, {}).get("speedup")]
    peers = [p for p in rows[0]["peers"] if any(p in r["times"] for r in rows)] if rows else []
    if not peers:
        return False
    figure, panels = _panels(
        rows, len(peers), _title(f"Speed-up of pydl ({backend}), times faster", rows[0], record)
    )
    values = [v for row in rows for v in row["results"][backend]["speedup"].values()]
    low, high = min(0.7, min(values) / 1.2), max(2.0, max(values) * 1.45)
    size = 0.8 / len(peers)
    for direction, axis in panels.items():
        members = [row for row in rows if row["pass"] == direction]
        for i, peer in enumerate(peers):
            at, heights = [], []
            for x, row in enumerate(members):
                if peer in row["results"][backend]["speedup"]:
                    at.append(x - 0.4 + size * (i + 0.5))
                    heights.append(row["results"][backend]["speedup"][peer])
            axis.bar(
                at,
                [h - 1 for h in heights],
                size * 0.92,
                bottom=1,
                color=THEIRS[i],
                label=f"vs {peer}",
            )
            for x, height in zip(at, heights, strict=True):
                text = f"{height:.1f}" if height >= 1.95 else f"{height:.2f}"
                place = (
                    {"xytext": (0, 2), "va": "bottom"}
                    if height >= 1
                    else {"xytext": (0, -2), "va": "top"}
                )
                axis.annotate(
                    text, (x, height), textcoords="offset points", ha="center", fontsize=8,
                    rotation=90 if size < 0.3 else 0, **place,
                )  # fmt: skip
        axis.axhline(1, color="#222222", linewidth=1)
        axis.set_yscale("log", base=2)
        axis.set_ylim(low, high)
        axis.set_yticks([t for t in TICKS if low <= t <= high])
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}×"))
        axis.set_ylabel("times faster than the peer")
        _groups(axis, members)
    _legend(figure, next(iter(panels.values())), len(peers))
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def rates(rows: Sequence[Row], record: dict[str, Any], path: Path) -> bool:
    """Bars per op: GB/s (or TFLOP/s, where that is the bound) of each contender, and the ceiling's
    mark."""
    rows = [row for row in rows if row["times"]]
    if not rows:
        return False
    compute = rows[0]["ceiling"]["by"] == "matmul"
    unit = "TFLOP/s" if compute else "GB/s"
    kernels = [b for b in rows[0]["backends"] if b != "auto"] or ["auto"]
    # The automatic choice is one of the bars already, unless it is native PyTorch, which is one
    # too.
    shown = [n for n in (*kernels, *rows[0]["peers"]) if any(n in r["times"] for r in rows)]
    what = "Achieved rate of computing" if compute else "Achieved bandwidth of memory"
    figure, panels = _panels(
        rows, len(shown), _title(f"{what}, {unit}, against the ceiling", rows[0], record)
    )
    size = 0.84 / len(shown)
    for direction, axis in panels.items():
        members = [row for row in rows if row["pass"] == direction]
        for i, name in enumerate(shown):
            mine = name in kernels
            colours = OURS if mine else THEIRS
            colour = colours[(kernels if mine else rows[0]["peers"]).index(name) % len(colours)]
            pairs = [(x, r) for x, r in enumerate(members) if name in r["times"]]
            work = "flops" if compute else "bytes"
            scale = 1e9 if compute else 1e6
            heights = [r[work] / r["times"][name]["median"] / scale for _, r in pairs]
            at = [x - 0.42 + size * (i + 0.5) for x, _ in pairs]
            title = f"pydl {name}" if mine else name
            axis.bar(at, heights, size * 0.92, color=colour, label=title)
        ceiling = "ceiling: " + ("product" if compute else "copy of as many bytes")
        for x, row in enumerate(members):
            rate = row["ceiling"]["tflop_per_s" if compute else "gb_per_s"]
            axis.hlines(
                rate, x - 0.46, x + 0.46, color="#222222", linewidth=1.6, linestyle=(0, (3, 1.5)),
                label=ceiling if x == 0 else None,
            )  # fmt: skip
        axis.set_ylabel(unit)
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_locator(MaxNLocator(6))
        _groups(axis, members)
    _legend(figure, next(iter(panels.values())), len(shown) + 1)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def draw(out: Path, record: dict[str, Any], settings: Settings, rows: Sequence[Row]) -> list[Path]:
    """Draws a chart of each kind for every shape, dtype and mode; returns the files."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if _charted(settings, row):
            key = (row["shape"], row["dtype"], row["mode"], row["ceiling"]["by"])
            groups.setdefault(key, []).append(row)
    drawn = []
    with plt.rc_context(STYLE):
        for (shape, dtype, mode, bound), members in groups.items():
            name = "_".join((shape, dtype, mode)) + ("_compute" if bound == "matmul" else "")
            for kind, chart in (("speedup", speedups), ("bandwidth", rates)):
                path = out / f"{kind}_{name}.png"
                if chart(members, record, path):
                    drawn.append(path)
    return drawn
