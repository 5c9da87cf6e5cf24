"""The process behind a mode, and behind a GPU's rows: work on stdin, an item of JSON per line on
stdout."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from bench import modes, rows
from bench.options import MODES, Settings
from bench.steps import Broken, Steps
from pydl import use_backend


def apart(settings: Settings, work: dict[str, Any], say: Any) -> Iterator[modes.Item]:
    """The part of `bench.apart`: ("at", contender) before each, ("row", row), ("done", None)."""
    if "ceilings" in work:
        yield modes.ceilings(settings)
        return
    steps = Steps(settings.device, lambda who: say(("at", who)))
    for op, shape, dtype in work["jobs"]:
        if work["until"] and time.time() > work["until"]:
            return
        job = (op, tuple(shape), dtype)
        if work.get("prepare"):
            rows.prepare(settings, job, steps)
        else:
            for row in rows.measured(settings, MODES[0], [job], steps):
                yield "row", row
        yield "done", None


def main() -> None:
    work = json.load(sys.stdin)
    settings = Settings.from_json(work["settings"])
    # What anything else prints must not get between the items.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(item: modes.Item) -> None:
        print(json.dumps(item), file=out, flush=True)

    mode = work.get("mode")
    if mode == "heap-reuse":
        modes.reuse()
    try:
        with use_backend(None):
            for item in modes.here(settings, mode) if mode else apart(settings, work, say):
                say(item)
    except Broken as error:
        say(("broke", str(error)))
        os._exit(1)  # a device that is broken takes no leave


if __name__ == "__main__":
    main()
