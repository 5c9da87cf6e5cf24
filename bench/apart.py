"""Rows of a GPU, measured in processes of their own: a kernel that breaks the device, or hangs,
costs its own contender and nothing else.

What the charts show comes first. Before a group of rows is timed, several processes run each of its
contenders once, at the same time: that is where compilers spend theirs.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from bench import ROOT
from bench.options import Settings, label
from bench.rows import Job, jobs

Item = tuple[str, Any]
WORKER = (sys.executable, "-m", "bench.worker")
# Seconds that a contender may be silent: kernels are compiled within.
PATIENCE = 120.0


def groups(settings: Settings) -> list[list[Job]]:
    """The rows that charts show, then the others."""
    drawn, others = [], []
    for job in jobs(settings):
        (drawn if settings.charted(*job[:2]) else others).append(job)
    return [group for group in (drawn, others) if group]


def processes() -> int:
    """How many prepare rows at once."""
    return min(8, (os.cpu_count() or 1) // 2)


class Child:
    """A process that says what it is at, and what it is told of how it ended."""

    def __init__(self, command: Sequence[str], settings: Settings, work: dict[str, Any]) -> None:
        # The compilers' own helpers would be as many again for each of these processes.
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors: list[str] = []
        for read in (self._read_items, self._read_errors):
            threading.Thread(target=read, daemon=True).start()
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps({"settings": settings.to_json(), **work}))
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it ended already, and says why

    def _read_items(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            self._errors = [*self._errors[-20:], line]

    def items(self, patience: float) -> Iterator[Item]:
        """What it says, and at last ("end", why it ended early, or None)."""
        try:
            while True:
                try:
                    line = self._lines.get(timeout=patience)
                except queue.Empty:
                    yield "end", f"said nothing for {patience:.0f} s and was ended"
                    return
                if line is None:
                    break
                try:
                    kind, content = json.loads(line)
                except ValueError:
                    continue  # what a library printed
                yield kind, content
            status = self._process.wait()
            last = next((line.strip() for line in reversed(self._errors) if line.strip()), "")
            yield "end", f"its process ended with status {status}: {last}" if status else None
        finally:
            self._process.kill()
            self._process.wait()


class Runs:
    """One after the other, processes for a list of jobs, until each is done or given up."""

    def __init__(
        self, settings: Settings, until: float, command: Sequence[str] = WORKER,
        patience: float = PATIENCE,
    ) -> None:  # fmt: skip
        self.settings, self._until = settings, until
        self._command, self._patience = command, patience
        self._lock = threading.Lock()

    def _lose(self, job: Job, who: str, why: str) -> None:
        with self._lock:
            lost = (job[0], job[2], who, f"{label(job[1])}: {why}")
            self.settings = replace(self.settings, lost=(*self.settings.lost, lost))

    def _late(self) -> bool:
        return bool(self._until) and time.time() > self._until

    def over(self, wanted: Sequence[Job], **work: Any) -> Iterator[Item]:
        """("row", row) of each job, all of them once it is done: what breaks is measured once more.
        A job that is lost gives a row with `skipped` and `lost`."""
        left = list(wanted)
        while left and not self._late():
            who, rows, why = None, [], "its process ended before it"
            work |= {"jobs": left, "until": self._until}
            for kind, content in Child(self._command, self.settings, work).items(self._patience):
                if kind == "at":
                    who = content
                elif kind == "row":
                    rows.append(content)
                elif kind == "done":
                    yield from (("row", row) for row in rows)
                    who, rows = None, []
                    left.pop(0)
                elif kind == "broke" or (kind == "end" and content):
                    why = content
                    break
            if left and not self._late():
                yield from self._give_up(left, who, why)
        yield from (("row", skip(job, "the minutes were over")) for job in left)

    def ceilings(self) -> Iterator[Item]:
        """What the machine does at best."""
        child = Child(self._command, self.settings, {"ceilings": True})
        yield from (item for item in child.items(self._patience) if item[0] == "ceilings")

    def _give_up(self, left: list[Job], who: str | None, why: str) -> Iterator[Item]:
        """Leaves the contender out that was at work, or the job where none was."""
        if who and not any(one[:3] == (left[0][0], left[0][2], who) for one in self.settings.lost):
            self._lose(left[0], who, why)
            return
        yield "row", skip(left.pop(0), f"LOST: {why}") | {"lost": True}


def skip(job: Job, why: str) -> dict[str, Any]:
    op, shape, dtype = job
    text = f"{op} {label(shape)} {dtype}: {why}"
    return {"op": op, "shape": label(shape), "dtype": dtype, "skipped": text}


def _prepare(runs: Runs, group: Sequence[Job], count: int) -> None:
    """Runs every job's contenders once, in so many processes; what is lost there stays out."""

    def work(share: Sequence[Job]) -> None:
        for _ in runs.over(share, prepare=True):
            pass  # a job that is lost here is lost again where it is measured, and told there

    threads = [threading.Thread(target=work, args=(group[i::count],)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def run(settings: Settings) -> Iterator[Item]:
    """The rows, and the machine's ceilings."""
    until = time.time() + 60 * settings.minutes if settings.minutes else 0.0
    runs = Runs(settings, until)
    for group in groups(settings):
        if (count := min(processes(), len(group))) > 1:
            _prepare(runs, group, count)
        yield from runs.over(group)
    yield from runs.ceilings()
