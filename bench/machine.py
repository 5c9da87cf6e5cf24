"""What a result was measured with: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import pydl
from bench import ROOT
from bench.peers import PEERS
from pydl import processor
from pydl._native import C


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def commit() -> dict[str, Any]:
    """The commit and whether the sources differ from it; results do not count. None outside of
    git."""
    changes = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def versions() -> dict[str, str]:
    """Versions of Python, pydl, torch, Triton and the peers that are installed."""
    found = {
        "python": platform.python_version(),
        "pydl": pydl.__version__,
        "torch": torch.__version__,
    }
    for package in sorted({"triton", *(peer.package for peer in PEERS.values())} - {"torch"}):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _huge_pages() -> str | None:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not path.exists():
        return None
    return next((word.strip("[]") for word in path.read_text().split() if "[" in word), None)


def record(device: str) -> dict[str, Any]:
    """Everything that a reader needs to place a number."""
    found: dict[str, Any] = {
        **commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "cpu": processor.name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_level": C.cpu_level(),
        "huge_pages": _huge_pages(),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "gpu": None,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["gpu_capability"] = f"{properties.major}.{properties.minor}"
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda
    return found


def describe(found: dict[str, Any], device: str) -> str:
    """The machine in a few words, for titles."""
    if device == "cuda":
        return f"{found['gpu']}, torch {found['versions']['torch']}"
    return f"{found['cpu']}, {found['threads']} threads, {found['cpu_level']}"
