"""The process behind a mode: settings on stdin, one JSON item per line on stdout."""

from __future__ import annotations

import json
import os
import sys

from bench import modes
from bench.options import Settings


def main() -> None:
    mode = sys.argv[1]
    settings = Settings.from_json(sys.stdin.read())
    # What anything else prints must not get between the items.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if mode == "heap-reuse":
        modes.reuse()
    for item in modes.here(settings, mode):
        print(json.dumps(item), file=out, flush=True)


if __name__ == "__main__":
    main()
