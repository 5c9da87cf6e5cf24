"""linear_attention and its step: what users call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pydl import autograd
from pydl.backends import choose
from pydl.ops.bias_act import lowered
from pydl.ops.dot_product import refusal
from pydl.ops.linear_attention import FEATURES, PLAIN, RULE, Settings, call

State = tuple[Tensor, Tensor]
FeatureMap = str | Callable[[Tensor], Tensor]


def feature_number(op: str, feature_map: FeatureMap) -> int:
    """The kernels' number of a feature map; that of "identity" for a function.

    Raises:
        ValueError: it is neither a name of one nor callable.
    """
    if callable(feature_map):
        return 0
    if feature_map not in FEATURES:
        raise ValueError(
            f"pydl: {op}: feature_map is {feature_map!r}, wants one of {', '.join(FEATURES)} or a "
            "function"
        )
    return FEATURES.index(feature_map)


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    shapes = f"query {tuple(q.shape)}, key {tuple(k.shape)}, value {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise refusal(op, f"{shapes}: wants four dimensions, (batch, heads, rows, width)")
    if k.shape[0] != q.shape[0] or v.shape[:3] != k.shape[:3] or k.shape[3] != q.shape[3]:
        raise refusal(
            op, f"{shapes}: wants one batch, query and key of one width, and as many values as keys"
        )  # fmt: skip
    if q.shape[1] % max(1, k.shape[1]) or (k.shape[1] == 0 and q.shape[1] > 0):
        raise refusal(op, f"{shapes}: wants heads that the keys' heads divide")
    if causal and q.shape[2] != k.shape[2]:
        raise refusal(op, f"{shapes}: causal wants as many keys as queries")


def _fits(op: str, name: str, x: Tensor, q: Tensor, shape: tuple, dtypes: tuple) -> Tensor:
    """`x` in what is computed in, if it is as wanted."""
    if tuple(x.shape) != tuple(shape):
        raise refusal(op, f"{name} has shape {tuple(x.shape)}, wants {tuple(shape)}")
    if x.dtype not in dtypes or x.device != q.device:
        wanted = " or ".join(sorted({str(d).removeprefix("torch.") for d in dtypes}))
        raise refusal(op, f"{name} is {x.dtype} on {x.device}, wants {wanted} on {q.device}")
    return x.to(autograd.wide_dtype(q))


def _decay(op: str, decay: float | Tensor | None, q: Tensor, causal: bool) -> Tensor | None:
    if decay is None:
        return None
    if not causal:
        raise refusal(op, "decay was given without causal: it needs an order of keys")
    wide = autograd.wide_dtype(q)
    if not isinstance(decay, Tensor):
        decay = q.new_full((q.shape[1],), float(decay), dtype=wide)
    decay = _fits(op, "decay", decay, q, (q.shape[1],), (wide, q.dtype))
    # Reading it is free here only.
    readable = decay.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not autograd.special() and not bool(((decay > 0) & (decay <= 1)).all()):
        raise ValueError(f"pydl: {op}: decay is {decay.tolist()}, wants more than 0, to 1")
    return decay


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    feature_map: FeatureMap = "elu",
    normalize: bool = True,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    scale: float | None = None,
    decay: float | Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """Linear attention, `phi(query) @ (phi(key).T @ value)` over `phi(query) @ phi(key).sum()`.

    With scores `s_ij = scale * decay**(i - j) * phi(q_i) . phi(k_j)`, over all keys j or, where
    causal, those with j <= i, the output is `sum_j s_ij v_j / (eps + sum_j s_ij)`, and 0 where that
    divisor is 0. Time and memory grow with the length: no score outside of a chunk is computed.

    Args:
        query: (B, H, L, D), any strides and floating dtype.
        key: (B, Hkv, S, D); H is a multiple of Hkv, and each head of keys serves as many
            neighbouring heads of queries.
        value: (B, Hkv, S, Dv).
        causal: Query i sees keys to i; wants S = L.
        feature_map: phi: "elu" (`elu(x) + 1`), "relu", "identity", "softmax" (over D), or a
            function of query and of key, (..., D) to (..., D'); gradients flow through it. A
            function's results, and on a GPU those of "softmax", are saved in their place.
        normalize: False gives `sum_j s_ij v_j`.
        eps: Added to the divisor.
        key_padding_mask: (B, S), True where a key is to be ignored.
        initial_state: `(S, z)`, as returned: `sum_j phi(k_j) v_j` and `sum_j phi(k_j)` of keys that
            came before, of (B, H, D, Dv) and (B, H, D) in fp32 (fp64 for fp64); has gradients.
        return_state: Also return the state after the last key.
        scale: Multiplies the scores; None for 1. With `normalize` it only counts against `eps`.
        decay: By how much a key's score is multiplied for every later query, above 0 and up to 1: a
            number or (H,), in fp32 or the query's dtype; has a gradient. Wants `causal`. The state
            decays with it, z too.
        backend: Who computes; see `pydl.backends`.

    Returns:
        (B, H, L, Dv) in the query's dtype, contiguous; with `return_state` a pair of it and `(S,
        z)`. All sums are taken in fp32 (fp64 for fp64). Saves its arguments, its results and a
        number a row. The gradients by z and by decay go through the divisor, and so by the output
        as it was rounded. Derivatives beyond the first come from the chunked form in plain PyTorch.

    Raises:
        ValueError: `feature_map` or `decay` is none of the above.
        RuntimeError: shapes, dtypes or devices do not fit; `decay` without `causal`.

    Source: Katharopoulos et al. 2020, arXiv 2006.16236; decay: Sun et al. 2023, arXiv 2307.08621.
    """
    op = "linear_attention"
    feature = feature_number(op, feature_map)
    query, key, value = lowered(query, key, value)
    chosen = choose(op, backend, query, key, value)
    if callable(feature_map):
        query, key = feature_map(query), feature_map(key)
    elif feature_map == "softmax" and chosen in ("cuda", "triton"):
        # A block of theirs has a part of a row.
        query, key, feature = query.softmax(-1), key.softmax(-1), 0
    _check(op, query, key, value, causal)
    if key_padding_mask is not None:
        wanted = (key.shape[0], key.shape[2])
        if tuple(key_padding_mask.shape) != wanted or key_padding_mask.dtype != torch.bool:
            raise refusal(
                op, f"key_padding_mask is {key_padding_mask.dtype} "
                f"{tuple(key_padding_mask.shape)}, wants bool {wanted}"
            )  # fmt: skip
        if key_padding_mask.device != query.device:
            raise refusal(
                op, f"key_padding_mask is on {key_padding_mask.device}, wants {query.device}"
            )  # fmt: skip
    state = total = None
    if initial_state is not None:
        wide = (autograd.wide_dtype(query),)
        heads = (*query.shape[:2], query.shape[3])
        first, second = initial_state
        state = _fits(op, "initial_state[0]", first, query, (*heads, value.shape[3]), wide)
        total = _fits(op, "initial_state[1]", second, query, heads, wide)
    settings = Settings(
        key_padding_mask, feature, bool(causal), bool(normalize),
        1.0 if scale is None else float(scale), float(eps),
    )  # fmt: skip
    args = (query, key, value, _decay(op, decay, query, causal), state, total, *settings)
    if chosen in ("torch", "reference"):
        found = autograd.in_reference(RULE if chosen == "torch" else PLAIN, *args)
        found = (found[0].contiguous(), *found[1:])
    else:
        found = call(chosen, *args)
    out, *after = found
    return (out, tuple(after)) if return_state else out


def linear_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State | None = None,
    *,
    feature_map: FeatureMap = "elu",
    normalize: bool = True,
    eps: float = 1e-6,
    scale: float | None = None,
    decay: float | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """One token of causal linear attention, given the state that the tokens before it left.

    Calls with one token after the other give what `linear_attention` with `causal` gives for the
    whole sequence, each in time that does not grow with it.

    Args:
        query: (B, H, D), any strides and floating dtype.
        key: (B, Hkv, D).
        value: (B, Hkv, Dv).
        state: `(S, z)` as returned, of (B, H, D, Dv) and (B, H, D); None before the first token.
        feature_map: See `linear_attention`, like all that follow.
        normalize: See `linear_attention`.
        eps: See `linear_attention`.
        scale: See `linear_attention`.
        decay: See `linear_attention`.
        backend: Who computes; see `pydl.backends`.

    Returns:
        (B, H, Dv) in the query's dtype, and the state after the token, in fp32 (fp64 for fp64).

    Raises:
        ValueError: `feature_map` or `decay` is none of the above.
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    if not query.dim() == key.dim() == value.dim() == 3:
        raise refusal(
            "linear_attention_step", f"query {tuple(query.shape)}, key {tuple(key.shape)}, value "
            f"{tuple(value.shape)}: wants three dimensions, (batch, heads, width)"
        )  # fmt: skip
    out, after = linear_attention(
        query[:, :, None], key[:, :, None], value[:, :, None], causal=True, feature_map=feature_map,
        normalize=normalize, eps=eps, initial_state=state, return_state=True, scale=scale,
        decay=decay, backend=backend,
    )  # fmt: skip
    return out[:, :, 0], after
