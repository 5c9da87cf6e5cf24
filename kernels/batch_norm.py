"""Triton: batch_norm, instance_norm and group_norm with an activation and a residual.

Forward reads x for the moments and again to normalise it; backward reads dy and x (and the
residual) for the sums of dz and dz xhat, and again for dx. Pieces of a channel write fp64 partials,
which are joined in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
from pydl.kernels.channel_norm import (
    apply_kernel,
    dx_kernel,
    group_sums_kernel,
    join_moments_kernel,
    moments_kernel,
    sums_kernel,
    totals_kernel,
)
from torch import Tensor


class _Call(NamedTuple):
    """What is computed with: x, folded; the moments; and what follows the normalisation."""

    x: Tensor
    groups: int
    mean: Tensor
    rest: Tensor
    var: Tensor
    residual: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0
    act: int = 0
    parameter: float = 0.0

    def pointers(self) -> tuple[Tensor, ...]:
        """What `scales` loads, x in place of what is absent."""
        weights = (self.x if t is None else t for t in (self.weight, self.bias))
        return (self.mean, self.rest, self.var, *weights)

    def flags(self, dz_stored: bool = False) -> dict[str, Any]:
        return {
            "ACT": 0 if dz_stored else self.act,
            "RESIDUAL": self.residual is not None and not dz_stored,
            "WEIGHT": self.weight is not None,
            "BIAS": self.bias is not None,
        }


class _Cut(NamedTuple):
    """How the programs share the elements."""

    grid: tuple[int, int]
    pieces: tuple[int, int]
    options: dict[str, Any]

    @property
    def count(self) -> int:
        return self.pieces[0] * self.pieces[1]


def _check(x: Tensor, groups: int, *alike: Tensor | None) -> None:
    """Raises for memory that the kernels would misread."""
    samples, _, channels, _ = x.shape
    if groups < 0 or (channels % groups if groups else channels):
        raise RuntimeError(
            f"pydl: batch_norm: groups is {groups}, wants a divisor of {channels} channels"
        )
    if samples * channels >= 1 << 31:
        raise RuntimeError("pydl: batch_norm: wants fewer than 2^31 samples x channels")
    for tensor in (x, *alike):
        if tensor is None or tensor.numel() == 0:
            continue
        if tensor.shape != x.shape or tensor.dtype != x.dtype:
            raise RuntimeError("pydl: batch_norm: wants tensors of one shape and dtype")
        if not tensor.is_contiguous():
            raise RuntimeError("pydl: batch_norm: wants dense memory")


def _cut(x: Tensor, each: int, most: int | None = None) -> _Cut:
    """Into `most` pieces of each channel at most, first along the outer dimension; without a limit
    into programs of four tiles. A thread has `each` elements of a tile, or half of that where they
    are loaded one by one, which takes more registers."""
    samples, outer, channels, inner = x.shape
    last = inner == 1
    side = channels if last else inner
    pack = 16 // x.element_size()
    while side % pack:
        pack //= 2
    each = each if pack >= 4 else each // 2
    tile = 128 * each
    columns = min(128 if last else tile, triton.next_power_of_2(side))
    if most is None:
        most = 1 + outer * inner * (columns if last else 1) // (4 * tile)
    outer_pieces = max(1, min(outer, most, 65535))
    inner_pieces = max(1, min(inner // 4096, most // outer_pieces, 65535 // outer_pieces))
    rows = min(tile // columns, triton.next_power_of_2(triton.cdiv(outer, outer_pieces)))
    programs = samples * (triton.cdiv(channels, columns) if last else channels)
    options = {
        "LAST": last,
        "PACK": pack,
        "ROWS": rows,
        "COLUMNS": columns,
        "num_warps": max(1, rows * columns // (32 * each)),
    }
    return _Cut((programs, outer_pieces * inner_pieces), (outer_pieces, inner_pieces), options)


def _sizes(call: _Call, cut: _Cut) -> tuple[int, ...]:
    _, outer, channels, inner = call.x.shape
    run = (channels if cut.options["LAST"] else inner) // cut.options["PACK"]
    return outer, channels, run, call.groups, *cut.pieces


def _find_moments(call: _Call, scratch: Tensor, pieces: int) -> None:
    samples, outer, channels, inner = call.x.shape
    cut = _cut(call.x, 16, pieces)
    moments_kernel[cut.grid](scratch, call.x, *_sizes(call, cut), **cut.options)
    alone = call.groups == channels
    entries = triton.next_power_of_2(cut.count * (channels // call.groups))
    across = min(8, triton.next_power_of_2(call.groups)) if alone else 1
    join_moments_kernel[(samples * triton.cdiv(call.groups, across),)](
        call.mean, call.rest, call.var, scratch, call.x, outer, channels, inner, call.groups,
        *cut.pieces, COLUMNS=cut.options["COLUMNS"], ENTRIES=min(32 if alone else 256, entries),
        GROUPS=across, num_warps=4,
    )  # fmt: skip


def _apply(call: _Call, y: Tensor) -> None:
    cut = _cut(call.x, 8)
    apply_kernel[cut.grid](
        y, call.x, call.x if call.residual is None else call.residual, *call.pointers(),
        *_sizes(call, cut), call.eps, call.parameter, **call.flags(), **cut.options,
    )  # fmt: skip


def _find_sums(
    call: _Call, totals: Tensor, dz: Tensor, dy: Tensor, scratch: Tensor, pieces: int,
    dweight: Tensor | None = None, dbias: Tensor | None = None,
) -> None:  # fmt: skip
    """totals: (2, samples, channels), of dz and of dz xhat; stores dz where it has elements."""
    cut = _cut(call.x, 8, pieces)
    sums_kernel[cut.grid](
        scratch, dz, dy, call.x, call.x if call.residual is None else call.residual,
        *call.pointers(), *_sizes(call, cut), call.eps, call.parameter, **call.flags(),
        STORED=dz.numel() > 0, **cut.options,
    )  # fmt: skip
    samples, _, channels, _ = call.x.shape
    weights = {
        "DBIAS": dbias is not None and dbias.numel() > 0,
        "DWEIGHT": dweight is not None and dweight.numel() > 0,
    }
    none = dict.fromkeys(weights, False)
    calls = [(samples, True, weights if samples == 1 else none)]
    if samples > 1 and any(weights.values()):
        calls.append((1, False, weights))
    for parts, stored, which in calls:
        count = samples // parts * cut.count
        rows = min(32, triton.next_power_of_2(count))
        totals_kernel[(triton.cdiv(channels, 8) * parts,)](
            totals, totals if dbias is None else dbias, totals if dweight is None else dweight,
            scratch, channels, count, parts, TOTALS=stored, **which, ROWS=rows, COLUMNS=8,
            num_warps=4 if rows == 32 else 1,
        )  # fmt: skip


def _find_dx(
    call: _Call, dx: Tensor, dy: Tensor, totals: Tensor, of_groups: Tensor, count: int,
    dz_stored: bool = False,
) -> None:  # fmt: skip
    """dy is dz where it was stored. of_groups: memory for two sums a sample and group."""
    samples, _, channels, _ = call.x.shape
    alone = call.groups == channels
    sums = totals
    if count > 0 and not alone:
        sums = of_groups
        group_sums_kernel[(samples * call.groups,)](
            sums, totals, call.x if call.weight is None else call.weight, channels, call.groups,
            WEIGHT=call.weight is not None, BLOCK=128, num_warps=1,
        )  # fmt: skip
    cut = _cut(call.x, 8)
    dx_kernel[cut.grid](
        dx, dy, call.x, call.x if call.residual is None else call.residual, *call.pointers(), sums,
        *_sizes(call, cut), samples * call.groups, count, call.eps, call.parameter,
        **call.flags(dz_stored), CENTRED=count > 0, ALONE=alone, **cut.options,
    )  # fmt: skip


def _zero(*tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.zero_()


def _fwd(
    y: Tensor, mean: Tensor, rest: Tensor, var: Tensor, scratch: Tensor, x: Tensor,
    residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, groups: int,
    act: int, parameter: float, pieces: int,
) -> None:  # fmt: skip
    _check(x, groups, y, residual)
    if x.numel() == 0:
        return _zero(mean, rest, var)
    call = _Call(x, groups, mean, rest, var, residual, weight, bias, eps, act, parameter)
    _find_moments(call, scratch, pieces)
    _apply(call, y)


def _moments(
    mean: Tensor, rest: Tensor, var: Tensor, scratch: Tensor, x: Tensor, groups: int, pieces: int
) -> None:
    _check(x, groups)
    if x.numel() == 0:
        return _zero(mean, rest, var)
    _find_moments(_Call(x, groups, mean, rest, var), scratch, pieces)


def _normalise(
    y: Tensor, x: Tensor, residual: Tensor | None, mean: Tensor, rest: Tensor, var: Tensor,
    weight: Tensor | None, bias: Tensor | None, eps: float, groups: int, act: int,
    parameter: float,
) -> None:  # fmt: skip
    _check(x, groups, y, residual)
    if x.numel() == 0:
        return
    _apply(_Call(x, groups, mean, rest, var, residual, weight, bias, eps, act, parameter), y)


def _bwd(
    dx: Tensor, dz: Tensor, dweight: Tensor, dbias: Tensor, scratch: Tensor, dy: Tensor, x: Tensor,
    residual: Tensor | None, mean: Tensor, rest: Tensor, var: Tensor, weight: Tensor | None,
    bias: Tensor | None, eps: float, groups: int, act: int, parameter: float, pieces: int,
    training: bool,
) -> None:  # fmt: skip
    _check(x, groups, dx, dy, dz, residual)
    if x.numel() == 0:
        return _zero(dweight, dbias)
    call = _Call(x, groups, mean, rest, var, residual, weight, bias, eps, act, parameter)
    samples, outer, channels, inner = x.shape
    begin, count = 2 * samples * pieces * channels, 2 * samples * channels
    totals, of_groups = scratch[begin : begin + count], scratch[begin + count :]
    stored = dz.numel() > 0
    if training or stored or dweight.numel() > 0 or dbias.numel() > 0:
        _find_sums(call, totals, dz, dy, scratch, pieces, dweight, dbias)
    each = outer * inner * (channels // groups) if training else 0
    _find_dx(call, dx, dz if stored else dy, totals, of_groups, each, stored)


def _sums(
    sums: Tensor, dz: Tensor, scratch: Tensor, dy: Tensor, x: Tensor, residual: Tensor | None,
    mean: Tensor, rest: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float, groups: int, act: int, parameter: float, pieces: int,
) -> None:  # fmt: skip
    _check(x, groups, dy, dz, residual)
    if x.numel() == 0:
        return _zero(sums)
    call = _Call(x, groups, mean, rest, var, residual, weight, bias, eps, act, parameter)
    _find_sums(call, sums, dz, dy, scratch, pieces)


def _dx(
    dx: Tensor, scratch: Tensor, dy: Tensor, x: Tensor, residual: Tensor | None, mean: Tensor,
    rest: Tensor, var: Tensor, sums: Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float, groups: int, act: int, parameter: float, count: float,
) -> None:  # fmt: skip
    _check(x, groups, dx, dy, residual)
    if x.numel() == 0:
        return
    call = _Call(x, groups, mean, rest, var, residual, weight, bias, eps, act, parameter)
    _find_dx(call, dx, dy, sums, scratch, int(count))


EXPORTS: dict[str, Callable[..., None]] = {
    "batch_norm_fwd": _fwd,
    "batch_norm_moments": _moments,
    "batch_norm_apply": _normalise,
    "batch_norm_bwd": _bwd,
    "batch_norm_sums": _sums,
    "batch_norm_dx": _dx,
}
