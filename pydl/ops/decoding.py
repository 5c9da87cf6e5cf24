"""Attention of one query a head, as when a model generates: the queries of a key head are rows of
one tile, so that its keys are read once, and long sequences are cut into parts that are attended to
side by side and put together by their sums (Dao et al. 2023, "Flash-Decoding")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydl import autograd
from pydl.ops.attention import RULE, Settings, call

# (keys that a part has at least, parts wanted in all): enough for the multiprocessors of the
# largest GPUs twice, and for the cores of a large CPU. What is cut may depend on nothing else: the
# bits are the same for any number of threads.
_PARTS = {"cpu": (2048, 16), "cuda": (256, 264)}


def fits(q: Tensor, mask: Tensor | None, s: Settings) -> bool:
    """Whether there is one query a head, which sees all keys."""
    sees_all = s.left < 0 and (s.right < 0 or s.bottom)
    return sees_all and q.shape[2] == 1 and mask is None and s.p == 0 and s.offsets_q is None


def _merged(x: Tensor, count: int, length: int) -> Tensor | None:
    """(batch, heads, rows, width) as (batch * heads, count, length, width), unless by a copy."""
    if min(x.shape[:2]) > 1 and x.stride(0) != x.shape[1] * x.stride(1):
        return None
    return x[:, :, : count * length].unflatten(2, (count, length)).flatten(0, 1)


def _cut(backend: str, q: Tensor, k: Tensor, v: Tensor, s: Settings) -> Any:
    """(outputs, logarithms, what those leave out) of the parts of the keys, along dimension 2; None
    where one is best."""
    least, wanted = _PARTS["cuda" if q.is_cuda else "cpu"]
    heads, keys = q.shape[0] * q.shape[1], k.shape[2]
    count = min(keys // least, -(-wanted // max(1, heads)))
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if count < 2 or grad or torch.compiler.is_compiling() or autograd.special():
        return None
    length = -(-keys // count)
    length += -length % 128
    count = keys // length
    some_k, some_v = _merged(k, count, length), _merged(v, count, length)
    if some_k is None or some_v is None:
        return None
    some_q = q.flatten(0, 1)[:, None].expand(-1, count, -1, -1)
    parted = s._replace(longest_k=length)
    whole = RULE.forward(backend, some_q, some_k, some_v, None, None, *parted)
    parts = [[t.unflatten(0, q.shape[:2]) for t in whole]]
    if count * length < keys:
        rest = s._replace(longest_k=keys - count * length)
        last_k, last_v = (t[:, :, count * length :] for t in (k, v))
        last = RULE.forward(backend, q, last_k, last_v, None, None, *rest)
        parts.append([t[:, :, None] for t in last])
    return [torch.cat(of, 2) for of in zip(*parts, strict=True)]


def attend(backend: str, q: Tensor, k: Tensor, v: Tensor, s: Settings) -> tuple[Tensor, Tensor]:
    """(output, logarithm of the sum of exponentials) where `fits` says so."""
    batch, heads, _, width = q.shape
    if k.shape[1] > 0:
        q = q.reshape(batch, k.shape[1], heads // k.shape[1], width)
    s = s._replace(longest_q=q.shape[2], left=-1, right=-1, bottom=False)
    parts = _cut(backend, q, k, v, s)
    if parts is None:
        out, lse = call(backend, q, k, v, None, None, *s)
    else:
        outs, lses, rests = parts
        most = lses.amax(2, keepdim=True)
        weights = torch.exp((lses - most) + rests)
        total = weights.sum(2)
        out = ((weights * outs).sum(2) / total).to(q.dtype)
        lse = most[:, :, 0] + torch.log(total)
    return out.reshape(batch, heads, 1, v.shape[3]), lse.reshape(batch, heads, 1, 1)
