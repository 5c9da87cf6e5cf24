"""Attention: scaled_dot_product_attention and its packed form, on one engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydl import autograd
from pydl.autograd import Rule
from pydl.backends import empty_like, kernel
from pydl.ops.philox import dropout_factors


class Settings(NamedTuple):
    """What is not differentiable.

    `seed` decides the dropout. `offsets_q` and `offsets_k` say where packed sequences begin, and
    `longest_q` and `longest_k` how long the longest is. A query sees `left` keys before and `right`
    after its own (-1: all), which for the last query is the last key where `bottom`, else for the
    first query the first key.
    """

    seed: Tensor | None
    offsets_q: Tensor | None
    offsets_k: Tensor | None
    longest_q: int
    longest_k: int
    scale: float
    softcap: float
    left: int
    right: int
    bottom: bool
    p: float


def visible(queries: int, keys: int, left: int, right: int, bottom: bool, device: Any) -> Tensor:
    """(queries, keys): which keys a window lets a query see."""
    own = torch.arange(queries, device=device)[:, None] + (keys - queries if bottom else 0)
    key = torch.arange(keys, device=device)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    seen = seen & (key >= own - left) if left >= 0 else seen
    return seen & (key <= own + right) if right >= 0 else seen


def _of_one(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, relative: Tensor | None,
    factors: Tensor | None, s: Settings,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output, logarithm of the sum of exponentials) of (B, H, L, D) queries."""
    group = q.shape[1] // max(1, k.shape[1])
    k, v = (t if group == 1 else t.repeat_interleave(group, 1) for t in (k, v))
    if k.shape[2] == 0 or q.shape[2] == 0:
        none = q[..., :0].sum(-1, keepdim=True) + k[..., :0].sum() + v[..., :0].sum()
        return none.repeat(1, 1, 1, v.shape[3]), none - math.inf
    x = (q * s.scale) @ k.transpose(-1, -2)
    if s.softcap > 0:
        x = torch.tanh(x / s.softcap) * s.softcap
    queries, keys = x.shape[-2:]
    if relative is not None:
        own = torch.arange(queries, device=x.device)[:, None] + (keys - queries) * s.bottom
        index = torch.arange(keys, device=x.device) - own + s.left
        x = x + relative[0, :, 0][:, index.clamp(0, relative.shape[-1] - 1)]
    if mask is not None and mask.dtype == torch.bool:
        x = x.masked_fill(~mask, -math.inf)
    elif mask is not None:
        x = x + mask
    if s.left >= 0 or s.right >= 0:
        seen = visible(queries, keys, s.left, s.right, s.bottom, x.device)
        x = x.masked_fill(~seen, -math.inf)
    most = x.detach().amax(-1, keepdim=True)
    most = torch.where(most == -math.inf, 0, most)
    e = torch.exp(x - most)
    total = e.sum(-1, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1, total)
    p = e / total
    lse = torch.where(empty, -math.inf, most + torch.log(total))
    return (p if factors is None else p * factors.to(p.dtype)) @ v, lse


def definition(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, relative: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    """softmax(softcap(scale q k^T) + mask + relative) v, and the logarithm of its denominator."""
    s = Settings(*settings)
    factors = None
    sequences = q.shape[0] if s.offsets_q is None else s.offsets_q.numel() - 1
    if s.p > 0:
        assert s.seed is not None
        shape = (sequences, q.shape[1], s.longest_q, s.longest_k)
        factors = dropout_factors(shape, s.seed, s.p)
    if s.offsets_q is None or s.offsets_k is None:
        return _of_one(q, k, v, mask, relative, factors, s)
    starts_q, starts_k = s.offsets_q.tolist(), s.offsets_k.tolist()
    none = q[:, :, :0].sum() + k[:, :, :0].sum() + v[:, :, :0].sum()
    outs = [q.new_zeros(1, q.shape[1], starts_q[0], v.shape[3]) + none]
    lses = [q.new_full((1, q.shape[1], starts_q[0], 1), -math.inf) + none]
    for b in range(sequences):
        rows, columns = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        some = None
        if factors is not None:
            lengths = (rows.stop - rows.start, columns.stop - columns.start)
            some = factors[b : b + 1, :, : lengths[0], : lengths[1]]
        own = None if mask is None else mask[b : b + 1] if mask.shape[0] > 1 else mask
        if own is not None:
            own = own[:, :, : rows.stop - rows.start, : columns.stop - columns.start]
        out, lse = _of_one(
            q[:, :, rows], k[:, :, columns], v[:, :, columns], own, relative, some, s
        )
        outs.append(out)
        lses.append(lse)
    left = q.shape[2] - starts_q[-1]
    outs.append(q.new_zeros(1, q.shape[1], left, v.shape[3]))
    lses.append(q.new_full((1, q.shape[1], left, 1), -math.inf))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def rows(x: Tensor) -> Tensor:
    """With neighbouring elements in the last dimension."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _like(x: Tensor, s: Settings) -> Tensor:
    """An output; what no packed sequence covers is 0."""
    return empty_like(x) if s.offsets_q is None else torch.zeros_like(x)


def _tail(s: Settings) -> tuple:
    return (s.offsets_q, s.offsets_k, s.seed, s.longest_q, s.longest_k, s.scale, s.softcap, s.left,
            s.right, s.bottom, s.p)  # fmt: skip


def _forward(
    backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, relative: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    s = Settings(*settings)
    if q.shape[3] == v.shape[3] and rows(q) is q:
        out = rows(_like(q, s))
    else:
        out = _like(q.new_empty(*q.shape[:3], v.shape[3]), s)
    lse = torch.empty((*q.shape[:3], 1), dtype=autograd.wide_dtype(q), device=q.device)
    rest = torch.empty_like(lse)
    if s.offsets_q is not None:
        # No kernel writes what no sequence covers.
        lse.fill_(-math.inf)
        rest.zero_()
    kernel(backend, "attention_fwd")(
        out, lse, rest, rows(q), rows(k), rows(v), mask, relative, *_tail(s)
    )
    return out, lse, rest


def _backward(backend: str, dys: Any, saved: tuple, settings: tuple, needs: tuple) -> tuple:
    q, k, v, mask, relative, out, lse, rest = saved
    s = Settings(*settings)
    dout, dlse = dys
    dout = torch.zeros_like(out) if dout is None else rows(dout)
    dq, dk, dv = (rows(_like(t, s)) for t in (q, k, v))
    none = torch.empty(0, dtype=autograd.wide_dtype(q), device=q.device)

    def wide(of: Tensor | None, needed: bool) -> Tensor:
        if of is None or not needed or not of.is_floating_point():
            return none
        return torch.empty(of.shape, dtype=autograd.wide_dtype(q), device=q.device)

    dmask, drelative = wide(mask, needs[3]), wide(relative, needs[4])
    if q.numel() == 0 or k.numel() == 0:  # kernels return early; a bias has a gradient all the same
        for grad in (dmask, drelative):
            grad.zero_()
    scratch = none
    if backend == "cuda":
        count = prod(q.shape[:3])
        if relative is not None and drelative.numel():
            sequences = q.shape[0] if s.offsets_q is None else s.offsets_q.numel() - 1
            tiles = -(-s.longest_q // 16)
            count += sequences * q.shape[1] * tiles * relative.shape[3]
        scratch = none.new_empty(count)
    kernel(backend, "attention_bwd")(
        dq, dk, dv, dmask, drelative, scratch, dout, dlse, out, lse, rest, rows(q), rows(k),
        rows(v), mask, relative, *_tail(s),
    )  # fmt: skip
    return (
        dq,
        dk,
        dv,
        None if dmask is none or mask is None else dmask.to(mask.dtype),
        None if drelative is none or relative is None else drelative.to(relative.dtype),
    )


def _shards(*args: Any) -> tuple[list, list]:
    """Batch and heads; of packed sequences heads alone."""
    b = None if Settings(*args[5:]).offsets_q is not None else "batch"
    names = (b, "heads", None, None)
    return [names, names, names, names, (None, "heads", None, None), "seed"], [names, names]


RULE = Rule(
    "attention", 5, _forward, _backward, definition, extras=1, outputs=2, wide_outputs=1,
    saves=lambda given, made: (*given, *made), shards=_shards,
)  # fmt: skip
call: Callable[..., tuple[Tensor, Tensor]] = autograd.make(RULE)
