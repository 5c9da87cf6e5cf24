"""The rules of attention that is no dot product: how it runs forward and backward.

The softmax is PyTorch's, the scores and their gradients those of `score.py`, the products with
values those of `product.py`: a few queries at a time meet all keys, and the backward pass meets
them again, so that neither what is as large as queries times keys, where that is large, nor that
times the width is ever stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pydl import autograd
from pydl.autograd import Rule, wide
from pydl.ops.product import product
from pydl.ops.score import ADDITIVE, GAUSSIAN, Score, gradients, prepared, scores

# What one chunk of queries may make: of (batch, queries, keys, width) in PyTorch, of (batch,
# queries, keys) by kernels. 4 MiB in fp32.
CHUNK = 1 << 20


def _weights(scores: Tensor, mask: Tensor | None) -> Tensor:
    """The softmax over keys; rows that see none are 0."""
    if mask is None:
        return torch.softmax(scores, -1)
    empty = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~(mask | empty), -math.inf)
    return torch.softmax(scores, -1).masked_fill(empty, 0)


def widely(x: Tensor) -> AbstractContextManager:
    """Where products are taken in the dtype of what they are given, under autocast too."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def _chunks(backend: str, q: Tensor, k: Tensor) -> list[slice]:
    """Slices of the queries such that what they make of the keys is small."""
    of_one = k.numel() if backend == "torch" else k.shape[0] * k.shape[1]
    queries = q.shape[1]
    if queries * of_one <= CHUNK:
        return [slice(None)]  # torch.compile's one graph serves all such sizes
    each = max(1, CHUNK // of_one)
    return [slice(start, start + each) for start in range(0, queries, each)]


def _of(mask: Tensor | None, rows: slice) -> Tensor | None:
    return None if mask is None else mask[:, rows] if mask.shape[1] > 1 else mask


def _rule(name: str, score: Score, definition: Callable[..., Tensor]) -> Rule:
    """Of (B, L, H) queries, (B, S, H) keys, (B, S, Ev) values, (H,) weights and a mask that
    broadcasts to (B, L, S)."""

    def forward(
        backend: str, q: Tensor, k: Tensor, v: Tensor, w: Tensor, mask: Tensor | None
    ) -> Tensor:
        out = v.new_empty(*q.shape[:2], v.shape[2])
        (q, k, w), v = prepared(backend, q, k, w), wide(v)
        for rows in _chunks(backend, q, k):
            found, _ = scores(backend, score, q[:, rows], k, w)
            out[:, rows] = product(backend, _weights(found, _of(mask, rows)), v)
        return out

    def backward(backend: str, dy: Tensor, saved: tuple, scalars: tuple, needs: tuple) -> tuple:
        given, mask = saved[:4], saved[4]
        q, k, v, w = given
        (q, k, w), v, dy = prepared(backend, q, k, w), wide(v), wide(dy)
        dq, dk, dv, dw = (torch.zeros_like(t, dtype=autograd.wide_dtype(t)) for t in given)
        with widely(dy):
            for rows in _chunks(backend, q, k):
                found, t = scores(backend, score, q[:, rows], k, w)
                p = _weights(found, _of(mask, rows))
                d = dy[:, rows]
                dv += product(backend, p.transpose(1, 2), d)
                dp = product(backend, d, v.transpose(1, 2))
                ds = p * (dp - (dp * p).sum(-1, keepdim=True))
                parts = gradients(backend, score, ds, q[:, rows], k, w, t)
                dq[:, rows] = parts[0]
                dk += parts[1]
                dw += parts[2]
        return (*(d.to(t.dtype) for d, t in zip((dq, dk, dv, dw), given, strict=True)), None)

    return Rule(name, 5, forward, backward, definition, shards=_shards)


def _shards(q: Tensor, *args: Any) -> tuple[list, list]:
    """Leading dimensions and queries, of the rule's arguments and of the functions' alike."""
    batch = () if q.dim() == 1 else range(q.dim() - 2)
    last = (None,) * min(1, q.dim() - 1)
    rows, of_keys = (*batch, "queries", *last), (*batch, None, *last)
    names: list[Any] = [rows, of_keys, of_keys]
    for one in args[2:]:
        if one is None or one.is_floating_point():
            names.append(None if one is None else (None,) * one.dim())
        else:  # the mask, which lacks leading dimensions or has 1 there where it is for all
            names.append(rows[len(rows) - one.dim() :])
    return names, [rows]


def _additive_definition(q: Tensor, k: Tensor, v: Tensor, w: Tensor, mask: Tensor | None) -> Tensor:
    return _weights(torch.tanh(q[:, :, None] + k[:, None]) @ w, mask) @ v


def _gaussian_definition(q: Tensor, k: Tensor, v: Tensor, w: Tensor, mask: Tensor | None) -> Tensor:
    return _weights(((q[:, :, None] - k[:, None]) * w).square().sum(-1) * -0.5, mask) @ v


ADDITIVE_RULE = _rule("additive_attention", ADDITIVE, _additive_definition)
GAUSSIAN_RULE = _rule("gaussian_attention", GAUSSIAN, _gaussian_definition)
additive = autograd.make(ADDITIVE_RULE)
gaussian = autograd.make(GAUSSIAN_RULE)
