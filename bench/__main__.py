"""`python -m bench`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import calibrate, charts, machine, modes, options, report, rows
from bench.options import Settings, UsageError


def measure(settings: Settings) -> tuple[dict, list[rows.Row]]:
    """Measures everything: (ceilings by mode, rows)."""
    found: list[rows.Row] = []
    ceilings = {}
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
                text = f"{modes.WORDS[mode]}: {content['op']} {content['shape']} {content['dtype']}"
                advance = len(settings.passes) if modes.skipped(content) else 1
                progress.update(task, advance=advance, description=text)
    return ceilings, found


def run(settings: Settings) -> int:
    """Measures, prints, writes; returns the exit status."""
    console = report.console()
    record = machine.record(settings.device)
    ceilings, found = measure(settings)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    console.print(machine.describe(record, settings.device))
    report.show(console, settings, ceilings, found)
    report.write_json(out / "results.json", record, settings, ceilings, found)
    drawn = charts.draw(out, record, settings, found)
    console.print(f"Wrote results.json and {len(drawn)} charts to {out}", soft_wrap=True)
    timed = [row for row in found if not modes.skipped(row)]
    if not timed:
        console.print("bench: no op takes a shape that was asked for", style="bold red")
        return 2
    return 1 if any(map(report.red, timed)) else 0


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
