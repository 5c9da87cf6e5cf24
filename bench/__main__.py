"""`python -m bench`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import calibrate, charts, machine, modes, options, report, rows
from bench.options import Settings, UsageError

SECONDS = 10.0  # between two writings of what there is


def measure(
    settings: Settings, keep: Callable[[dict, list[rows.Row]], None]
) -> tuple[dict, list[rows.Row]]:
    """Measures everything: (ceilings by mode, rows). What there is so far is given to `keep`."""
    found: list[rows.Row] = []
    ceilings: dict[str, dict] = {}
    kept = time.monotonic()
    total = len(rows.jobs(settings)) * len(settings.modes) * len(settings.passes)
    columns = (MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("first row", total=total)
        for mode in settings.modes:
            for kind, content in modes.run(settings, mode):
                if kind == "ceilings":
                    ceilings[mode] = content
                    continue
                found.append(content)
                if time.monotonic() - kept > SECONDS:
                    keep(ceilings, found)
                    kept = time.monotonic()
                text = f"{modes.WORDS[mode]}: {content['op']} {content['shape']} {content['dtype']}"
                advance = len(settings.passes) if modes.skipped(content) else 1
                progress.update(task, advance=advance, description=text)
    return ceilings, found


def run(settings: Settings) -> int:
    """Measures, prints, writes; returns the exit status."""
    console = report.console()
    record = machine.record(settings.device)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    keep = partial(report.write_json, out / "results.json", record, settings)
    ceilings, found = measure(settings, keep)
    keep(ceilings, found)
    console.print(machine.describe(record, settings.device))
    report.show(console, settings, ceilings, found)
    drawn = charts.draw(out, record, settings, found)
    console.print(f"Wrote results.json and {len(drawn)} charts to {out}", soft_wrap=True)
    timed = [row for row in found if not modes.skipped(row)]
    if not timed:
        console.print("bench: no op takes a shape that was asked for", style="bold red")
        return 2
    return 1 if any(map(report.red, timed)) or any("lost" in row for row in found) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options.parser()
    args = parser.parse_args(arguments)
    try:
        settings = options.settings(args)
    except UsageError as error:
        parser.error(str(error))
    if args.calibrate:
        return calibrate.run(settings)
    return run(settings)


if __name__ == "__main__":
    sys.exit(main())
