"""What a run says: tables on the terminal and `results.json`."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.modes import WORDS
from bench.options import Settings
from bench.rows import Row

WIDTH = 120


def write_json(
    path: Path, machine: dict, settings: Settings, ceilings: dict, rows: list[Row]
) -> None:
    """Writes `results.json`."""
    content = {
        "machine": machine,
        "settings": json.loads(settings.to_json()) | {"out": None},
        "ceilings": ceilings,
        "rows": [row for row in rows if "skipped" not in row],
        "skipped": [row for row in rows if "skipped" in row],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def red(row: Row) -> bool:
    """Whether some backend of pydl was wrong."""
    return any(not verdict["ok"] for verdict in row["parity"].values())


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _rate(row: Row, result: dict[str, Any]) -> str:
    if row["ceiling"]["by"] == "matmul":
        rate = result["tflop_per_s"]
        return f"{rate:.3g} TF/s" if rate >= 1 else f"{1e3 * rate:.0f} GF/s"
    return f"{result['gb_per_s']:.{0 if result['gb_per_s'] >= 100 else 1}f} GB/s"


def ratio(value: float | None) -> Text:
    """How many times faster, green where that is worth saying, red where it is slower."""
    if value is None:
        return Text("n/a", style="dim")
    style = "green" if value >= 1.03 else "red" if value < 0.97 else ""
    return Text(f"{value:.2f}×", style=style)


def _milliseconds(ms: float) -> str:
    return f"{ms * 1e3:.2f} µs" if ms < 1 else f"{ms:.2f} ms" if ms < 100 else f"{ms:.0f} ms"


def _cells(row: Row, backend: str, peers: Sequence[str]) -> list[str | Text]:
    result = row["results"].get(backend)
    if result is None:
        blank: list[str | Text] = ["", "", ""]
        known = backend in row["parity"]
        return [
            Text("WRONG", style="bold red") if known else Text("n/a", style="dim"),
            *blank[1:],
            *(Text("–", style="dim") for _ in peers),
        ]
    return [
        _milliseconds(result["ms"]),
        _rate(row, result),
        f"{100 * result['ceiling_share']:.0f} %",
        *(ratio(result["speedup"].get(peer)) for peer in peers),
    ]


def _with_times(rows: Iterable[Row], peers: Sequence[str]) -> list[str]:
    """Peers that have a time in some row, at most as many as the width takes."""
    return [p for p in peers if any(p in row["times"] for row in rows)][:6]


def _pydl(row: Row, backend: str) -> str:
    chose = row["results"].get(backend, {}).get("chose", backend)
    return backend if chose == backend else f"{backend}: {chose}"


def _family(family: str, dtype: str, shape: str, rows: list[Row]) -> Table:
    peers = _with_times(rows, rows[0]["peers"])
    table = Table(
        title=f"{family}, {dtype}, {shape}, {rows[0]['device']}",
        title_justify="left",
        title_style="bold",
    )
    for name in ("op", "pass", "allocator", "pydl"):
        table.add_column(name, no_wrap=True)
    for name in (
        "time",
        "rate",
        "of ceiling",
        *(f"{'vs ' if len(p) < 9 else ''}{p}" for p in peers),
    ):
        table.add_column(name, justify="right", no_wrap=name != "of ceiling")
    shown = (None, None)
    for row in rows:
        for backend in row["backends"]:
            # An op and a pass are named once for the rows that follow.
            now = (row["op"], row["pass"])
            if shown[0] not in (None, now[0]):
                table.add_section()
            table.add_row(
                row["op"] if shown[0] != now[0] else "",
                row["pass"] if shown != now else "",
                WORDS[row["mode"]] if backend == row["backends"][0] else "",
                _pydl(row, backend),
                *_cells(row, backend, peers),
            )
            shown = now
    return table


def _means(rows: list[Row], settings: Settings) -> Table:
    """Geometric means over ops; each number of peers' says over how many, where not over all."""
    peers = _with_times(rows, settings.peers)
    table = Table(title="Geometric means over ops", title_justify="left", title_style="bold")
    for name in ("shape", "dtype", "pass", "allocator", "pydl"):
        table.add_column(name, no_wrap=True)
    for name in ("ops", "of ceiling", *(f"{'vs ' if len(p) < 9 else ''}{p}" for p in peers)):
        table.add_column(name, justify="right")
    groups: dict[tuple[str, ...], list[dict]] = defaultdict(list)
    for row in rows:
        for backend in row["backends"]:
            key = (row["shape"], row["dtype"], row["pass"], row["mode"], backend)
            if backend in row["results"]:
                groups[key].append(row["results"][backend])
    last = None
    for (shape, dtype, direction, mode, backend), results in groups.items():
        if last not in (None, (shape, dtype)):
            table.add_section()
        last = (shape, dtype)
        cells: list[str | Text] = []
        for peer in peers:
            values = [r["speedup"][peer] for r in results if peer in r["speedup"]]
            cell = ratio(geometric_mean(values) if values else None)
            if values and len(values) < len(results):
                cell.append(f" ({len(values)})", style="dim")
            cells.append(cell)
        share = geometric_mean([r["ceiling_share"] for r in results])
        table.add_row(
            shape, dtype, direction, WORDS[mode], backend,
            str(len(results)), f"{100 * share:.0f} %", *cells,
        )  # fmt: skip
    return table


def show(console: Console, settings: Settings, ceilings: dict, rows: list[Row]) -> None:
    """Prints a table per family, dtype and shape, then the means, then what is missing and why."""
    skips = list(dict.fromkeys(row["skipped"] for row in rows if "skipped" in row))
    rows = [row for row in rows if "skipped" not in row]
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["family"], row["dtype"], row["shape"]].append(row)
    modes = list(settings.modes)
    for (family, dtype, shape), members in groups.items():
        at = {name: i for i, name in enumerate(settings.ops)}
        members.sort(
            key=lambda r: (at[r["op"]], settings.passes.index(r["pass"]), modes.index(r["mode"]))
        )
        console.print(_family(family, dtype, shape, members))
    if rows:
        console.print(_means(rows, settings))
    for mode, found in ceilings.items():
        products = "".join(
            f", {n} product {v:.2f} TFLOP/s" for n, v in found["matmul_tflop_per_s"].items()
        )
        console.print(f"Ceilings, {WORDS[mode]}: copy {found['copy_gb_per_s']:.1f} GB/s{products}")
    console.print(
        "Times are medians; × says how many times faster pydl is in that mode of the "
        "allocator. The ceiling is a "
        "copy into existing memory of as many bytes, timed in the same rounds; stores past the "
        "cache can beat it.",
        style="dim",
    )
    absent = {
        f"{row['op']}: {peer}: n/a: {why}" for row in rows for peer, why in row["absent"].items()
    }
    for line in (*skips, *sorted(absent)):
        console.print(line, style="dim", markup=False)
    wrong = {
        f"{row['op']} {row['dtype']} {row['shape']}, backend {name}: {verdict['message']}"
        for row in rows for name, verdict in row["parity"].items() if not verdict["ok"]
    }  # fmt: skip
    for line in sorted(wrong):
        console.print(f"WRONG: {line}", style="bold red", markup=False)


def console() -> Console:
    """A terminal, of 120 columns at most and where there is none."""
    plain = Console()
    return plain if plain.is_terminal and plain.width <= WIDTH else Console(width=WIDTH)
