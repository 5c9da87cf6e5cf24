"""The chart of `examples.digits_mlp`: both loss curves, and the kernels' times."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

TORCH, PYDL, INK, FAINT = "#b8bfca", "#e4572e", "#22262e", "#6b7280"


class Kernel(NamedTuple):
    """Milliseconds of one kernel, forward or backward."""

    name: str
    way: str
    torch: float
    pydl: float


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(TORCH)
    axes.tick_params(colors=FAINT, labelsize=9)


def _losses(upper: Axes, lower: Axes, plain: list[float], fused: list[float]) -> None:
    upper.plot(plain, color=TORCH, linewidth=5, label="torch.nn", solid_capstyle="round")
    upper.plot(fused, color=PYDL, linewidth=1.3, label="after pydl.replace")
    upper.set_yscale("log")
    upper.set_ylabel("training loss", color=INK)
    upper.legend(frameon=False, fontsize=9)
    upper.tick_params(labelbottom=False)
    lower.plot([abs(a - b) for a, b in zip(plain, fused, strict=True)], color=INK, linewidth=0.8)
    lower.set_yscale("log")
    lower.set_ylabel("|difference|", color=INK)
    lower.set_xlabel("step", color=INK)


def _bars(axes: Axes, kernels: list[Kernel]) -> None:
    longest = max(max(one.torch, one.pydl) for one in kernels)
    for row, one in enumerate(kernels):
        axes.barh(row - 0.19, one.torch, 0.36, color=TORCH, label="torch" if row == 0 else None)
        axes.barh(row + 0.19, one.pydl, 0.36, color=PYDL, label="pydl" if row == 0 else None)
        at = max(one.torch, one.pydl) + longest * 0.015
        axes.text(at, row, f"{one.torch / one.pydl:.1f}×", va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(kernels)), [f"{one.name} {one.way}" for one in kernels])
    axes.set_xlim(0, longest * 1.12)
    axes.invert_yaxis()
    axes.set_xlabel("median milliseconds; the number is torch's time over pydl's", color=INK)
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def draw(
    out: Path,
    plain: list[float],
    fused: list[float],
    per_step: tuple[float, float],
    kernels: list[Kernel],
    setting: str,
) -> None:
    """Writes the picture.

    Args:
        out: Where to.
        plain: The loss at each step with torch.nn's modules.
        fused: The same after `pydl.replace`.
        per_step: Median seconds of a step, of the one and the other.
        kernels: What was timed.
        setting: On what machine, and how large a tensor.
    """
    figure = plt.figure(figsize=(13, 6), dpi=150, layout="constrained")
    left, right = figure.subfigures(1, 2, wspace=0.04)
    upper, lower = left.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bars = right.subplots()
    for axes in (upper, lower, bars):
        _tidy(axes)
    _losses(upper, lower, plain, fused)
    before, after = (1e3 * seconds for seconds in per_step)
    upper.set_title(
        f"Digits, one seed, trained twice: {before:.1f} ms a step before, {after:.1f} ms after",
        loc="left", fontsize=11, color=INK,
    )  # fmt: skip
    _bars(bars, kernels)
    bars.set_title(f"Activation kernels on {setting}", loc="left", fontsize=11, color=INK)
    figure.savefig(out)
    plt.close(figure)
