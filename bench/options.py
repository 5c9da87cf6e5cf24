"""What to measure: the command line and its checks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench import ROOT
from bench.peers import COMPILING, PEERS
from pydl import backends
from pydl.table import TABLE

DTYPES = ("float32", "bfloat16", "float16", "float64")
PASSES = ("forward", "backward", "both")
MODES = ("as-it-comes", "heap-reuse")
KERNELS = ("cpu", "cuda", "triton")
LOCAL = ROOT / "bench" / "results" / "local"


class UsageError(ValueError):
    """An option that cannot be served; the message names it and what is wanted."""


@dataclass(frozen=True)
class Settings:
    """A run. `shapes` None means the table's; `out` is a folder."""

    ops: tuple[str, ...]
    backends: tuple[str, ...]
    peers: tuple[str, ...]
    device: str = "cpu"
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    shapes: tuple[tuple[int, ...], ...] | None = None
    passes: tuple[str, ...] = ("forward", "backward")
    modes: tuple[str, ...] = ("as-it-comes",)
    out: str = str(LOCAL)
    quick: bool = False
    variant: str | None = None
    minutes: float = 0.0  # 0: as long as it takes
    lost: tuple[tuple[str, str, str, str], ...] = ()  # op, dtype, contender, why it is left out

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Settings:
        given = json.loads(text)
        shapes, lost = given.pop("shapes"), given.pop("lost")
        return Settings(
            shapes=None if shapes is None else tuple(tuple(shape) for shape in shapes),
            lost=tuple(tuple(one) for one in lost),
            **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()},
        )

    def shapes_of(self, op: str) -> tuple[tuple[int, ...], ...]:
        """The shapes to measure an op with: those asked for, else the table's, of which a quick run
        takes one."""
        if self.shapes is not None:
            return self.shapes
        return TABLE[op].bench_shapes[: 1 if self.quick else None]

    def charted(self, op: str, shape: tuple[int, ...]) -> bool:
        """Whether a shape is drawn: one that was asked for, or the first of its op."""
        return self.shapes is not None or shape == TABLE[op].bench_shapes[0]

    def peers_of(self, op: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The peers to measure a shape with. On a GPU those that compile, which takes longer than
        all the rest, only with those that are drawn."""
        slow = () if self.device == "cpu" or self.charted(op, shape) else COMPILING
        return tuple(name for name in self.peers if name not in slow)

    def lost_of(self, op: str, dtype: str) -> dict[str, str]:
        """Why contenders are left out, by name."""
        return {who: why for *what, who, why in self.lost if what == [op, dtype]}

    def dtypes_of(self, op: str) -> list[str]:
        return [name for name in self.dtypes if getattr(torch, name) in TABLE[op].dtypes]


def label(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def named(shape: tuple[int, ...], variant: str | None) -> str:
    """A row's shape, and what variant of the op's call it is."""
    return label(shape) if variant is None else f"{label(shape)}-{variant}"


def _names(option: str, text: str, known: Sequence[str], what: str) -> tuple[str, ...]:
    """A comma list of known names, each once."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in known:
            raise UsageError(f"{option}: {name!r} is no {what}, wants some of {', '.join(known)}")
    if not names:
        raise UsageError(f"{option}: wants some of {', '.join(known)}")
    return names


def _shapes(text: str) -> tuple[tuple[int, ...], ...]:
    try:
        shapes = tuple(tuple(int(n) for n in part.split("x")) for part in text.split(","))
    except ValueError:
        shapes = ()
    if not shapes or any(n < 1 for shape in shapes for n in shape):
        raise UsageError(f"--shapes: {text!r}, wants sizes of 1 and more such as 4096x4096,1024")
    return shapes


def for_speed(device: str) -> tuple[str, ...]:
    """pydl's backends that are at home on a device type: no interpreter, no emulation."""
    home = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}[device]
    return tuple(n for n in home if not backends.unavailable(n) and device in backends.serves(n))


def _backends(text: str | None, device: str) -> tuple[str, ...]:
    if text is None:
        return ("auto", *for_speed(device))
    names = _names("--backends", text, ("auto", *KERNELS), "backend of pydl")
    for name in names:
        if name == "auto":
            continue
        if missing := backends.unavailable(name):
            raise UsageError(f"--backends: {name!r} is not available: {missing}")
        if device not in backends.serves(name):
            raise UsageError(
                f"--backends: {name!r} serves {' and '.join(backends.serves(name))}, not {device}"
            )
    return names


def _peers(text: str | None, device: str, ops: tuple[str, ...], quick: bool) -> tuple[str, ...]:
    if text is None:
        if quick:
            return ("torch",)
        return tuple(
            name for name, peer in PEERS.items()
            if device in peer.devices and peer.installed() and any(map(peer.has, ops))
        )  # fmt: skip
    names = _names("--peers", text, tuple(PEERS), "peer")
    for name in names:
        if not PEERS[name].installed():
            package = PEERS[name].package
            raise UsageError(f"--peers: {name!r} is not installed; remedy: pip install {package}")
    return names


def _modes(text: str | None, device: str) -> tuple[str, ...]:
    if device != "cpu":
        if text not in (None, MODES[0]):
            raise UsageError(
                f"--modes: {text!r} is for the CPU's allocator; {device} has {MODES[0]}"
            )
        return MODES[:1]
    return MODES if text is None else _names("--modes", text, MODES, "mode of the allocator")


def _minutes(minutes: float, device: str) -> float:
    if minutes < 0 or (minutes and device == "cpu"):
        raise UsageError(f"--minutes: {minutes:g}, wants a positive number, with --device cuda")
    return minutes


def _variant(name: str | None, ops: Sequence[str]) -> str | None:
    for op in ops if name is not None else ():
        if name not in TABLE[op].variants:
            known = ", ".join(TABLE[op].variants) or "none"
            raise UsageError(f"--variant: {op} has no {name!r}, it has {known}")
    return name


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures pydl's ops against native PyTorch, torch.compile and other packages.",
        epilog="Exit status: 0, or 1 where a result was wrong (nothing is timed that is), or 2 "
        "for a bad option.",
    )
    p.add_argument("--ops", default="all", help="comma list, or all (default)")
    p.add_argument(
        "--backends", help="comma list of auto, cpu, cuda, triton (default: auto and what is there)"
    )
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--dtype", default="float32,bfloat16", help="comma list (default: %(default)s)")
    p.add_argument(
        "--shapes", help="comma list such as 4096x4096,1024 (default: the table's, by op)"
    )
    p.add_argument("--variant", help="another call than the table's: of attention \"full\", not "
                                     "causal, or \"mask\", with numbers added")  # fmt: skip
    p.add_argument("--peers", help=f"comma list of {', '.join(PEERS)} (default: torch, compile "
                                   "and what is "
                   "installed and fits)")  # fmt: skip
    p.add_argument(
        "--passes", default="forward,backward", help="comma list of forward, backward, both"
    )
    p.add_argument("--modes", help="comma list of as-it-comes, heap-reuse: the C library's "
                                   "allocator as it "
                   "is, or told to keep memory, which saves page faults (default on the CPU: "
                   "both)")  # fmt: skip
    p.add_argument("--minutes", type=float, default=0.0, help="with --device cuda: begin no row "
                   "after so many, the charts' shapes being first")  # fmt: skip
    p.add_argument("--out", type=Path, default=LOCAL, help="folder for results.json and charts")
    p.add_argument(
        "--quick", action="store_true", help="few rounds, one shape per op, torch the only peer"
    )
    p.add_argument("--calibrate", action="store_true",
                   help="measure from which size on pydl is faster than native PyTorch, and "
                        "write it to "
                   "pydl/calibration.json (or PYDL_CALIBRATION), which the automatic choice "
                   "reads")  # fmt: skip
    return p


def settings(args: argparse.Namespace) -> Settings:
    """The run that the options describe.

    Raises:
        UsageError: an option cannot be served.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: 'cuda' is not available: torch sees no CUDA device")
    ops = tuple(TABLE) if args.ops == "all" else _names("--ops", args.ops, tuple(TABLE), "op")
    return Settings(
        ops=ops,
        backends=_backends(args.backends, args.device),
        peers=_peers(args.peers, args.device, ops, args.quick),
        device=args.device,
        dtypes=_names("--dtype", args.dtype, DTYPES, "dtype"),
        shapes=None if args.shapes is None else _shapes(args.shapes),
        passes=_names("--passes", args.passes, PASSES, "pass"),
        modes=_modes(args.modes, args.device),
        out=str(args.out),
        quick=args.quick,
        variant=_variant(args.variant, ops),
        minutes=_minutes(args.minutes, args.device),
    )
