"""Linear attention on kernels: definition, chunked form, gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pydl import autograd
from pydl.autograd import Rule
from pydl.backends import empty_like, kernel
from pydl.ops.attention import rows

# As numbered in csrc/linear_attention.h.
FEATURES = ("identity", "elu", "relu", "softmax")
CHUNK = 128


class Settings(NamedTuple):
    """What is not differentiable. `hidden` is (batch, keys), True where a key is ignored; `feature`
    an index of `FEATURES`."""

    hidden: Tensor | None
    feature: int
    causal: bool
    normalize: bool
    scale: float
    eps: float


def features(x: Tensor, feature: int) -> Tensor:
    """phi(x), over the last dimension."""
    if feature == 1:
        return torch.where(x > 0, x + 1, torch.exp(torch.where(x > 0, 0, x)))
    if feature == 2:
        return torch.where(x <= 0, torch.zeros_like(x), x)
    return torch.softmax(x, -1) if feature == 3 else x


def _prepared(q: Tensor, k: Tensor, v: Tensor, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Features, and values, of as many heads as queries have; zeros where a key is ignored."""
    hidden = None if s.hidden is None else s.hidden[:, None, :, None]
    if hidden is not None and s.feature:  # what is ignored may be no number: its slope neither
        k = k.masked_fill(hidden, 0)
    f, g = features(q, s.feature), features(k, s.feature)
    if hidden is not None:
        g, v = g.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    group = q.shape[1] // max(1, k.shape[1])
    if group != 1:
        g, v = g.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return f, g, v


def _finished(u: Tensor, total: Tensor, s: Settings) -> Tensor:
    """The output of unscaled sums of values and of scores."""
    if not s.normalize:
        return u * s.scale
    below = (total * s.scale + s.eps)[..., None]
    empty = below == 0
    return torch.where(empty, 0, u * s.scale / torch.where(empty, 1, below))


def _begun(
    f: Tensor, v: Tensor, state: Tensor | None, total: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The state that comes before the first key, and its sum of features."""
    if state is None or total is None:
        state = f.new_zeros(*f.shape[:2], f.shape[3], v.shape[3])
        total = f.new_zeros(*f.shape[:2], f.shape[3])
    return state, total


Outputs = tuple[Tensor, Tensor, Tensor]


def definition(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None,
    total: Tensor | None, *settings: Any,
) -> Outputs:  # fmt: skip
    """(output, state, sum of features), by the matrix of all scores: what all else is judged by."""
    s = Settings(*settings)
    f, g, v = _prepared(q, k, v, s)
    state, total = _begun(f, v, state, total)
    scores = f @ g.transpose(-1, -2)
    n = k.shape[2]
    position = torch.arange(n, device=q.device)
    if s.causal:
        scores = scores.tril()
    if decay is None:
        u = scores @ v + f @ state
        sums = scores.sum(-1) + (f @ total[..., None])[..., 0]
        return (
            _finished(u, sums, s), state + g.transpose(-1, -2) @ v, total + g.sum(-2)
        )  # fmt: skip
    base = decay[:, None, None]
    scores = scores * base ** (position[:, None] - position).clamp(min=0)
    before = base ** (position[:, None] + 1)
    u = scores @ v + before * (f @ state)
    sums = scores.sum(-1) + before[..., 0] * (f @ total[..., None])[..., 0]
    aged = g * base ** (n - 1 - position[:, None])
    whole = base**n
    return (
        _finished(u, sums, s), whole * state + aged.transpose(-1, -2) @ v,
        whole[..., 0] * total + aged.sum(-2),
    )  # fmt: skip


def chunked(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None,
    total: Tensor | None, *settings: Any,
) -> Outputs:  # fmt: skip
    """The same by chunks of the sequence, all at once.

    The states before the chunks are sums over those before, weighted by decay: of each pair of
    chunks there is a number for each head, which is little beside the states to some 100,000 keys.
    """
    s = Settings(*settings)
    f, g, v = _prepared(q, k, v, s)
    state, total = _begun(f, v, state, total)
    if not s.causal:
        state = state + g.transpose(-1, -2) @ v
        total = total + g.sum(-2)
        return _finished(f @ state, (f @ total[..., None])[..., 0], s), state, total
    n, size = q.shape[2], min(CHUNK, max(1, q.shape[2]))
    count = (n + size - 1) // size
    f, g, v = (F.pad(t, (0, 0, 0, count * size - n)).unflatten(2, (count, size)) for t in (f, g, v))
    # (heads, 1, 1, 1) of decay; i and j number the places in a chunk.
    base = f.new_ones(1, 1, 1, 1) if decay is None else decay[:, None, None, None]
    i = torch.arange(size, device=q.device)[:, None]
    j = torch.arange(size, device=q.device)
    scores = (f @ g.transpose(-1, -2)).tril()
    aged = g
    if decay is not None:
        scores = scores * base ** (i - j).clamp(min=0)
        aged = g * base ** (size - 1 - i)
    added = torch.cat([state[:, :, None], aged.transpose(-1, -2) @ v], 2).flatten(3)
    added_total = torch.cat([total[:, :, None], aged.sum(-2)], 2)
    # What the states before chunk c hold of what came with chunk c' - 1.
    c = torch.arange(count + 1, device=q.device)
    weights = (base[..., 0] ** ((c[:, None] - c).clamp(min=0) * size)).tril()
    states = (weights @ added).unflatten(3, (f.shape[4], v.shape[4]))
    totals = weights @ added_total
    seen = f * base ** (i + 1)
    u = scores @ v + seen @ states[:, :, :-1]
    sums = scores.sum(-1) + (seen @ totals[:, :, :-1, :, None])[..., 0]
    out = _finished(u.flatten(2, 3)[:, :, :n], sums.flatten(2, 3)[:, :, :n], s)
    # The padding made the last chunk whole: what it aged the state by is taken back.
    last, last_total = states[:, :, -1], totals[:, :, -1]
    if decay is not None and count * size > n:
        tail = n - (count - 1) * size
        left = base[..., 0] ** tail
        kept = g[:, :, -1, :tail] * base[..., 0] ** (tail - 1 - i[:tail])
        last = left * states[:, :, -2] + kept.transpose(-1, -2) @ v[:, :, -1, :tail]
        last_total = left[..., 0] * totals[:, :, -2] + kept.sum(-2)
    return out, last, last_total


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# Rows that a piece of a sequence holds at least, and the blocks that pieces are to make: twice as
# many as the largest GPUs have multiprocessors.
_PIECE = 128
_BLOCKS = 264


def _pieces(backend: str, q: Tensor, k: Tensor, v: Tensor) -> int:
    """Into how many pieces a GPU's kernels cut the sequence; 0 on the CPU, where they need no
    memory of ours."""
    if backend == "cpu":
        return 0
    blocks = max(1, q.shape[0] * q.shape[1] * -(-v.shape[3] // 64))
    return max(1, min(k.shape[2] // _PIECE, -(-_BLOCKS // blocks)))


def _room(q: Tensor, count: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for that many numbers, in what is computed in."""
    return torch.empty(count, dtype=dtype or autograd.wide_dtype(q), device=q.device)


def _forward(
    backend: str, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None,
    total: Tensor | None, *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    heads, wide = q.shape[:2], autograd.wide_dtype(q)
    out = empty_like(q.new_empty(*q.shape[:3], v.shape[3]))
    factor = torch.empty((*q.shape[:3], 1), dtype=wide, device=q.device)
    state_out = torch.empty((*heads, q.shape[3], v.shape[3]), dtype=wide, device=q.device)
    total_out = torch.empty((*heads, q.shape[3]), dtype=wide, device=q.device)
    hidden, *further = settings
    count = _pieces(backend, q, k, v)
    pieces = _room(q, count * (state_out.numel() + total_out.numel()) if count > 1 else 0)
    kernel(backend, "linear_attention_fwd")(
        out, factor, state_out, total_out, pieces, rows(q), rows(k), rows(v), _dense(decay),
        _dense(state), _dense(total), hidden, *further,
    )  # fmt: skip
    return out, state_out, total_out, factor


def _backward(backend: str, dys: Any, saved: tuple, settings: tuple, needs: tuple) -> tuple:
    q, k, v, decay, state, total, out, state_out, total_out, factor = saved
    dout, dstate_out, dtotal_out = dys
    dout = torch.zeros_like(out) if dout is None else rows(dout)
    dq, dk, dv = (rows(empty_like(t)) for t in (q, k, v))
    none = _room(q, 0)
    hidden, *further = settings
    if q.shape[1] == 0:  # kernels return early; keys have gradients all the same
        dk.zero_()
        dv.zero_()
    # Nor do kernels look at a decay where there is no batch.
    ddecay = torch.zeros_like(decay) if needs[3] else none
    count = _pieces(backend, q, k, v)
    # On a GPU, where not causal, keys get their gradients through the first state's.
    flows = state is not None or (count > 0 and not settings[2])
    dstate, dtotal = (torch.empty_like(t) if flows else none for t in (state_out, total_out))
    pieces, numbers, logs = none, none, _room(q, 0, torch.float64)
    if count > 0:
        group = q.shape[1] // max(1, k.shape[1])
        numbers = _room(q, factor.numel() + (k.numel() + v.numel() if group > 1 else 0))
        if count > 1:
            pieces = _room(q, 2 * count * (state_out.numel() + total_out.numel()))
        if needs[3]:
            blocks = q.shape[0] * q.shape[1] * count * max(1, -(-q.shape[3] // 32))
            logs = _room(q, 2 * blocks, logs.dtype)
    kernel(backend, "linear_attention_bwd")(
        dq, dk, dv, ddecay, dstate, dtotal, pieces, numbers, logs, dout, _dense(dstate_out),
        _dense(dtotal_out), out, factor, state_out, total_out, rows(q), rows(k), rows(v),
        _dense(decay), _dense(state), _dense(total), hidden, *further,
    )  # fmt: skip
    return (
        dq, dk, dv, ddecay if needs[3] else None, None if state is None else dstate,
        None if total is None else dtotal,
    )  # fmt: skip


def _shards(*_: Any) -> tuple[list, list]:
    rows = ("batch", "heads", None, None)
    return [rows, rows, rows, ("heads",), rows, rows[:3], ("batch", None)], [rows, rows, rows[:3]]


RULE = Rule(
    "linear_attention", 6, _forward, _backward, chunked, extras=1, outputs=3, wide_outputs=2,
    saves=lambda given, made: (*given, *made), shards=_shards,
)  # fmt: skip
PLAIN = dataclasses.replace(RULE, reference=definition)
call: Callable[..., Outputs] = autograd.make(RULE)
