"""Attention whose score is no dot product: additive (Bahdanau) and Gaussian (Nadaraya-Watson)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from pydl import autograd
from pydl.autograd import Rule
from pydl.backends import choose
from pydl.ops.bias_act import lowered
from pydl.ops.dot_product import tensors
from pydl.ops.product import projected
from pydl.ops.score_rule import ADDITIVE_RULE, GAUSSIAN_RULE, additive, gaussian, widely
from pydl.traced import hand_over, proxied


def _check(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = min(q.dim(), k.dim(), v.dim()) >= 2 and q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
    if not fits or k.shape[-2] != v.shape[-2]:
        raise RuntimeError(
            f"pydl: {op}: query {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}: "
            "wants (..., L, E), (..., S, Ek) and (..., S, Ev)"
        )
    for name, one in (("keys", k), ("values", v)):
        if one.dtype != q.dtype or one.device != q.device:
            raise RuntimeError(
                f"pydl: {op}: {name}: {one.dtype} on {one.device}, wants the query's, "
                f"{q.dtype} on {q.device}"
            )


def _run(
    chosen: str, rule: Rule, call: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, w: Tensor,
    mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """Folds leading dimensions into one, and back."""
    shape = (*q.shape[:-1], v.shape[-1])
    batch = math.prod(q.shape[:-2])
    args = (*(t.reshape(batch, *t.shape[-2:]) for t in (q, k, v)), w, mask)
    with widely(q):
        out = autograd.in_reference(rule, *args) if chosen == "reference" else call(chosen, *args)
    return out.view(shape)


def additive_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Additive attention, `softmax(w_v . tanh(w_q q + w_k k)) @ values` over the keys.

    No pass stores (..., L, S, H), nor (..., L, S) where that is large: the backward pass meets a
    few queries at a time again. A second derivative does store it, by the plain definition.

    Args:
        query: (..., L, Eq), any strides and floating dtype.
        keys: (..., S, Ek).
        values: (..., S, Ev).
        w_q: (H, Eq), as a `torch.nn.Linear` has it.
        w_k: (H, Ek).
        w_v: (H,).
        mask: Of truth values, broadcasts to (..., L, S): False hides a key.
        backend: Who computes the scores and their gradients, "torch" for chunked PyTorch; see
            `pydl.backends`.

    Returns:
        (..., L, Ev) in the query's dtype, computed in fp32 at least; a row that sees no key is 0.
        All but the mask have gradients. Saves its arguments and their projections.

    Raises:
        TypeError: what is to be a tensor is none.
        RuntimeError: shapes, dtypes or devices do not fit, or the backend cannot serve the call.

    Source: Bahdanau et al. 2014, arXiv 1409.0473.
    """
    if has_torch_function_variadic(query, keys, values, w_q, w_k, w_v, mask) and proxied(
        query, keys, values, w_q, w_k, w_v, mask
    ):
        return hand_over(additive_attention, locals())
    op = "additive_attention"
    weights = {"w_q": w_q, "w_k": w_k, "w_v": w_v}
    tensors(op, {"query": query, "keys": keys, "values": values, **weights}, {"mask": mask})
    query, keys, values, w_q, w_k, w_v = lowered(query, keys, values, w_q, w_k, w_v)
    chosen = choose(op, backend, query, keys, values, w_q, w_k, w_v)
    _check(op, query, keys, values)
    hidden = w_v.shape[0] if w_v.dim() == 1 else -1
    for name, weight, wanted in (
        ("w_q", w_q, (hidden, query.shape[-1])),
        ("w_k", w_k, (hidden, keys.shape[-1])),
        ("w_v", w_v, (w_q.shape[0] if w_q.dim() else 0,)),
    ):
        if tuple(weight.shape) != wanted:
            raise RuntimeError(
                f"pydl: {op}: w_q {tuple(w_q.shape)}, w_k {tuple(w_k.shape)}, w_v "
                f"{tuple(w_v.shape)}: wants (H, {query.shape[-1]}), (H, {keys.shape[-1]}) and (H,)"
            )
        if weight.dtype != query.dtype or weight.device != query.device:
            raise RuntimeError(
                f"pydl: {op}: {name}: {weight.dtype} on {weight.device}, wants the query's, "
                f"{query.dtype} on {query.device}"
            )
    args = (query, keys, values, w_q, w_k, w_v, mask)
    if autograd.sharded(query) and chosen != "reference":
        return autograd.on_shards(ADDITIVE_RULE, partial(_attend, op, chosen), *args)
    return _attend(op, chosen, *args)


def _attend(
    op: str, chosen: str, query: Tensor, keys: Tensor, values: Tensor, w_q: Tensor, w_k: Tensor,
    w_v: Tensor, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """Additive attention of what fits together."""
    if mask is not None:
        mask = _mask(op, mask, query, keys)
    q, k = projected(chosen, query, w_q), projected(chosen, keys, w_k)
    return _run(chosen, ADDITIVE_RULE, additive, q, k, values, w_v, mask)


def _mask(op: str, mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """(batch, L or 1, S)."""
    wanted = (*q.shape[:-1], k.shape[-2])
    try:
        fits = torch.broadcast_shapes(mask.shape, wanted) == torch.Size(wanted)
    except RuntimeError:
        fits = False
    if not fits or mask.dtype != torch.bool or mask.device != q.device:
        raise RuntimeError(
            f"pydl: {op}: mask is {mask.dtype} {tuple(mask.shape)} on {mask.device}, wants bool "
            f"on {q.device} that broadcasts to {wanted}"
        )
    rows = mask.shape[-2] if mask.dim() > 1 else 1
    batch = math.prod(wanted[:-2])
    return mask.expand(*wanted[:-2], rows, wanted[-1]).reshape(batch, rows, wanted[-1])


def gaussian_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    w: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Nadaraya-Watson regression by a Gaussian kernel, `softmax(-((q - k) w)^2 / 2) @ values`.

    The softmax is over the keys; of vectors the squares are summed. What is stored is as with
    `additive_attention`.

    Args:
        query: (..., L, E), or (L,) for numbers.
        keys: (..., S, E), or (S,).
        values: (..., S, Ev), or (S,).
        w: One over the width of the kernel: a number, or (E,).
        backend: Who computes the scores and their gradients, "torch" for chunked PyTorch; see
            `pydl.backends`.

    Returns:
        (..., L, Ev), or (L,), in the query's dtype, computed in fp32 at least. All arguments have
        gradients.

    Raises:
        TypeError: what is to be a tensor is none.
        RuntimeError: shapes, dtypes or devices do not fit, or the backend cannot serve the call.

    Source: Nadaraya 1964, doi 10.1137/1109020; Watson 1964, jstor 25049340.
    """
    if has_torch_function_variadic(query, keys, values, w) and proxied(query, keys, values, w):
        return hand_over(gaussian_attention, locals())
    op = "gaussian_attention"
    tensors(op, {"query": query, "keys": keys, "values": values, "w": w}, {})
    query, keys, values, w = lowered(query, keys, values, w)
    chosen = choose(op, backend, query, keys, values, w)
    if autograd.sharded(query) and chosen != "reference":
        call = partial(_regress, op, chosen)
        return autograd.on_shards(GAUSSIAN_RULE, call, query, keys, values, w)
    return _regress(op, chosen, query, keys, values, w)


def _regress(
    op: str, chosen: str, query: Tensor, keys: Tensor, values: Tensor, w: Tensor
) -> Tensor:
    """Gaussian attention of plain tensors, or by the definition."""
    numbers = query.dim() == keys.dim() == values.dim() == 1
    if numbers:
        query, keys, values = (t[:, None] for t in (query, keys, values))
    _check(op, query, keys, values)
    width = query.shape[-1]
    if keys.shape[-1] != width or not (w.numel() == 1 or tuple(w.shape) == (width,)):
        raise RuntimeError(
            f"pydl: {op}: query {tuple(query.shape)}, keys {tuple(keys.shape)}, w "
            f"{tuple(w.shape)}: wants query and key of one width E, and w of 1 or (E,)"
        )
    if w.dtype != query.dtype or w.device != query.device:
        raise RuntimeError(
            f"pydl: {op}: w: {w.dtype} on {w.device}, wants the query's, {query.dtype} on "
            f"{query.device}"
        )
    w = w.reshape(-1).expand(width)
    out = _run(chosen, GAUSSIAN_RULE, gaussian, query, keys, values, w, None)
    return out[:, 0] if numbers else out
