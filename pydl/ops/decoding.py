"""Attention of one query a head, as when a model generates: the queries of a key head are rows of
one tile, so that its keys are read once, and long sequences are cut into parts that are attended to
side by side and put together by their sums (Dao et al. 2023, "Flash-Decoding")."""

from __future__ import annotations

import torch
from torch import Tensor

from pydl import autograd
from pydl.ops.attention import RULE, Settings, call

# (keys that a part has at least, parts wanted in all): enough for the multiprocessors of the
# largest GPUs twice, and for the cores of a large CPU. What is cut may depend on nothing else: the
# bits are the same for any number of threads.
_PARTS = {"cpu": (2048, 16), "cuda": (256, 264)}


def fits(q: Tensor, s: Settings) -> bool:
    """Whether there is one query a head."""
    return q.shape[2] == 1 and s.p == 0 and s.offsets_q is None


def _seen(keys: int, s: Settings) -> slice | None:
    """The keys that the only query sees; None for all."""
    if s.left < 0 and (s.right < 0 or s.bottom):
        return None
    own = keys - 1 if s.bottom else 0
    begin = 0 if s.left < 0 else max(0, own - s.left)
    return slice(begin, keys if s.right < 0 else max(begin, min(keys, own + s.right + 1)))


def _narrowed(mask: Tensor | None, keys: slice) -> Tensor | None:
    return mask if mask is None or mask.shape[3] == 1 else mask[..., keys]


def _merged(x: Tensor, count: int, length: int) -> Tensor | None:
    """(batch, heads, rows, width) as (batch * heads, count, length, width), unless by a copy."""
    if min(x.shape[:2]) > 1 and x.stride(0) != x.shape[1] * x.stride(1):
        return None
    return x[:, :, : count * length].unflatten(2, (count, length)).flatten(0, 1)


def _parts_of(mask: Tensor | None, q: Tensor, count: int, length: int) -> Tensor | None:
    """A mask as (batch * heads, count, rows, length) for parts of the keys."""
    if mask is None:
        return None
    mask = mask.expand(*q.shape[:2], -1, -1)
    one = mask.shape[3] == 1
    mask = mask[..., None] if one else mask[..., : count * length].unflatten(3, (count, length))
    return mask.flatten(0, 1).transpose(1, 2)


def _cut(
    backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, s: Settings
) -> list[Tensor] | None:
    """(outputs, logarithms, what those leave out) of the parts of the keys, along dimension 2; None
    where one is best."""
    least, wanted = _PARTS["cuda" if q.is_cuda else "cpu"]
    heads, keys = q.shape[0] * q.shape[1], k.shape[2]
    count = min(keys // least, -(-wanted // max(1, heads)))
    given = [t for t in (q, k, v, mask) if t is not None]
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    if count < 2 or grad or torch.compiler.is_compiling() or autograd.special():
        return None
    length = -(-keys // count)
    length += -length % 128
    count = keys // length
    some_k, some_v = _merged(k, count, length), _merged(v, count, length)
    if some_k is None or some_v is None:
        return None
    some_q = q.flatten(0, 1)[:, None].expand(-1, count, -1, -1)
    some_mask = _parts_of(mask, q, count, length)
    parted = s._replace(longest_k=length)
    whole = RULE.forward(backend, some_q, some_k, some_v, some_mask, None, *parted)
    parts = [[t.unflatten(0, q.shape[:2]) for t in whole]]
    if count * length < keys:
        rest = s._replace(longest_k=keys - count * length)
        end = slice(count * length, keys)
        last_k, last_v, last_mask = k[:, :, end], v[:, :, end], _narrowed(mask, end)
        last = RULE.forward(backend, q, last_k, last_v, last_mask, None, *rest)
        parts.append([t[:, :, None] for t in last])
    return [torch.cat(of, 2) for of in zip(*parts, strict=True)]


def attend(
    backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, s: Settings
) -> tuple[Tensor, Tensor]:
    """(output, logarithm of the sum of exponentials) where `fits` says so."""
    batch, heads, _, width = q.shape
    if k.shape[1] > 0:
        q = q.reshape(batch, k.shape[1], heads // k.shape[1], width)
    if mask is not None and mask.shape[1] > 1:
        mask = mask.reshape(mask.shape[0], *q.shape[1:3], mask.shape[3])
    if seen := _seen(k.shape[2], s):
        k, v, mask = k[:, :, seen], v[:, :, seen], _narrowed(mask, seen)
    s = s._replace(left=-1, right=-1, bottom=False, longest_q=q.shape[2], longest_k=k.shape[2])
    parts = _cut(backend, q, k, v, mask, s)
    if parts is None:
        out, lse = call(backend, q, k, v, mask, None, *s)
    else:
        outs, lses, rests = parts
        # Where a mask hides all keys of all parts, the sum is 0.
        most = lses.amax(2, keepdim=True).clamp_min(torch.finfo(lses.dtype).min)
        weights = torch.exp((lses - most) + rests)
        total = weights.sum(2)
        out = ((weights * outs).sum(2) / torch.where(total == 0, 1, total)).to(q.dtype)
        lse = most[:, :, 0] + torch.log(total)
    return out.reshape(batch, heads, 1, v.shape[3]), lse.reshape(batch, heads, 1, 1)
