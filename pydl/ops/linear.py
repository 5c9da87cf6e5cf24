"""linear_attention and its step: what users call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from pydl import autograd
from pydl.backends import choose
from pydl.ops.bias_act import lowered
from pydl.ops.dot_product import refusal
from pydl.ops.linear_attention import FEATURES, PLAIN, RULE, Settings, call
from pydl.traced import hand_over, proxied

State = tuple[Tensor, Tensor]
FeatureMap = str | Callable[[Tensor], Tensor]


def feature_number(op: str, feature_map: FeatureMap) -> int:
    """The kernels' number of a feature map; that of "identity" for a function.

    Raises:
        ValueError: it is neither a name of one nor callable.
    """
    if callable(feature_map):
        return 0
    if not isinstance(feature_map, str) or feature_map not in FEATURES:
        what = repr(feature_map) if isinstance(feature_map, str) else f"a {named(feature_map)}"
        raise ValueError(
            f"pydl: {op}: feature_map is {what}, wants one of {', '.join(FEATURES)} or a function"
        )
    return FEATURES.index(feature_map)


def named(x: object) -> str:
    """A type in words."""
    return type(x).__name__


def _tensors(op: str, q: Any, k: Any, v: Any) -> None:
    """Raises for what is no floating tensor."""
    for name, x in (("query", q), ("key", k), ("value", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"pydl: {op}: {name} is a {named(x)}, wants a Tensor")
        if not x.is_floating_point() or x.dtype != q.dtype or x.device != q.device:
            raise refusal(
                op, f"{name} is {x.dtype} on {x.device}, wants one floating dtype and device, as "
                f"the query's {q.dtype} on {q.device}"
            )  # fmt: skip


def _number(op: str, name: str, x: Any) -> float:
    if isinstance(x, bool) or not isinstance(x, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"pydl: {op}: {name} is a {named(x)}, wants a number")
    return float(x)


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


def _fits(op: str, name: str, x: Any, q: Tensor, shape: tuple, dtypes: tuple) -> Tensor:
    """`x` in what is computed in, if it is as wanted."""
    if not isinstance(x, Tensor):
        raise TypeError(f"pydl: {op}: {name} is a {named(x)}, wants a Tensor")
    if tuple(x.shape) != tuple(shape):
        raise refusal(op, f"{name} has shape {tuple(x.shape)}, wants {tuple(shape)}")
    if x.dtype not in dtypes or x.device != q.device:
        wanted = " or ".join(sorted({str(d).removeprefix("torch.") for d in dtypes}))
        raise refusal(op, f"{name} is {x.dtype} on {x.device}, wants {wanted} on {q.device}")
    return x.to(autograd.wide_dtype(q))


def _decay(op: str, decay: Any, q: Tensor, causal: bool) -> Tensor | None:
    """(heads,) of it, in what is computed in."""
    if decay is None:
        return None
    if not causal:
        raise refusal(op, "decay was given without causal: it needs an order of keys")
    heads, wide = q.shape[1], autograd.wide_dtype(q)
    if not isinstance(decay, Tensor):
        numbers = decay if isinstance(decay, (list, tuple)) else [decay]
        numbers = [_number(op, "decay", one) for one in numbers]
        if len(numbers) not in (1, heads):
            raise refusal(op, f"decay has {len(numbers)} numbers, wants one or {heads}")
        if not all(0 < one <= 1 for one in numbers):
            raise ValueError(f"pydl: {op}: decay is {decay}, wants more than 0, to 1")
        if len(set(numbers)) == 1:
            return q.new_full((heads,), numbers[0], dtype=wide)
        decay = torch.tensor(numbers, dtype=wide, device=q.device)
        if not autograd.sharded(q):
            return decay
        from pydl import shards

        return shards.replicated(decay, q)
    if decay.numel() == 1 and decay.dim() < 2:
        decay = decay.reshape(1).expand(heads)
    decay = _fits(op, "decay", decay, q, (heads,), (wide, q.dtype))
    # Reading it is free here only.
    readable = decay.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not autograd.special() and not bool(((decay > 0) & (decay <= 1)).all()):
        raise ValueError(f"pydl: {op}: decay is {decay.tolist()}, wants more than 0, to 1")
    return decay


def _hidden(op: str, mask: Any, key: Tensor) -> Tensor | None:
    """The padding mask, if it is as wanted."""
    if mask is None:
        return None
    wanted = (key.shape[0], key.shape[2])
    if not isinstance(mask, Tensor):
        raise TypeError(f"pydl: {op}: key_padding_mask is a {named(mask)}, wants a Tensor")
    if tuple(mask.shape) != wanted or mask.dtype != torch.bool or mask.device != key.device:
        raise refusal(
            op, f"key_padding_mask is {mask.dtype} {tuple(mask.shape)} on {mask.device}, wants "
            f"bool {wanted} on {key.device}"
        )  # fmt: skip
    return mask


def _featured(
    op: str, function: Callable[[Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of queries and keys, and values, in one dtype that holds them all."""
    found = []
    for name, x in (("query", q), ("key", k)):
        made = function(x)
        if not isinstance(made, Tensor) or not made.is_floating_point():
            what = f"{made.dtype}" if isinstance(made, Tensor) else f"a {named(made)}"
            raise TypeError(
                f"pydl: {op}: feature_map made {what} of {name}, wants a floating tensor"
            )
        found.append(made)
    dtype = torch.promote_types(torch.promote_types(found[0].dtype, found[1].dtype), v.dtype)
    return found[0].to(dtype), found[1].to(dtype), v.to(dtype)


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
    decay: float | Sequence[float] | Tensor | None = None,
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
            function's results, and on a GPU those of "softmax" in fp32, are saved in their place;
            where they are of a wider dtype, all is computed in that.
        normalize: False gives `sum_j s_ij v_j`.
        eps: Added to the divisor.
        key_padding_mask: (B, S), True where a key is to be ignored.
        initial_state: `(S, z)`, as returned: `sum_j phi(k_j) v_j` and `sum_j phi(k_j)` of keys that
            came before, of (B, H, D, Dv) and (B, H, D) in fp32 (fp64 for fp64); has gradients.
        return_state: Also return the state after the last key.
        scale: Multiplies the scores; None for 1. With `normalize` it only counts against `eps`.
        decay: By how much a key's score is multiplied for every later query, above 0 and up to 1:
            one number or H of them, or a tensor of (), (1,) or (H,) in fp32 or the query's dtype,
            which has a gradient. Wants `causal`. The state decays with it, z too.
        backend: Who computes; see `pydl.backends`.

    Returns:
        (B, H, L, Dv) in the query's dtype, contiguous; with `return_state` a pair of it and `(S,
        z)`. All sums are taken in fp32 (fp64 for fp64). Saves its arguments, its results and a
        number a row. The gradients by z and by decay go through the divisor, and so by the output
        as it was rounded. Derivatives beyond the first come from the chunked form in plain PyTorch.

    Raises:
        ValueError: `feature_map` or `decay` is none of the above.
        TypeError: an argument is of another kind than these.
        RuntimeError: shapes, dtypes or devices do not fit; `decay` without `causal`.

    Source: Katharopoulos et al. 2020, arXiv 2006.16236; decay: Sun et al. 2023, arXiv 2307.08621.
    """
    # What is in a tuple is looked at where there is one.
    if (
        initial_state is not None
        or has_torch_function_variadic(query, key, value, key_padding_mask, decay)
    ) and proxied(query, key, value, key_padding_mask, initial_state, decay):
        return hand_over(linear_attention, locals())
    return _attend(
        "linear_attention", "initial_state", query, key, value, causal, feature_map, normalize,
        eps, key_padding_mask, initial_state, return_state, scale, decay, backend,
    )  # fmt: skip


def _attend(
    op: str, state_name: str, query: Tensor, key: Tensor, value: Tensor, causal: bool,
    feature_map: FeatureMap, normalize: bool, eps: float, key_padding_mask: Tensor | None,
    initial_state: State | None, return_state: bool, scale: float | None,
    decay: float | Sequence[float] | Tensor | None, backend: str | None,
) -> Any:  # fmt: skip
    """`linear_attention` under the name and with the argument's name that errors tell."""
    feature = feature_number(op, feature_map)
    _tensors(op, query, query, query)
    query, key, value = lowered(query, key, value)
    _tensors(op, query, key, value)
    chosen = choose(op, backend, query, key, value)
    _check(op, query, key, value, causal)
    hidden, dtype = _hidden(op, key_padding_mask, key), query.dtype
    by_blocks = feature_map == "softmax" and chosen in ("cuda", "triton")
    function = feature_map if callable(feature_map) else None
    if by_blocks:  # a block of theirs has a part of a row
        wide, feature = autograd.wide_dtype(query), 0
        function = lambda x: x.softmax(-1, dtype=wide)  # noqa: E731
    if function is not None:
        if hidden is not None:  # what is ignored may be no number
            key = key.masked_fill(hidden[:, None, :, None], 0)
        query, key, value = _featured(op, function, query, key, value)
        _check(op, query, key, value, causal)
    state = total = None
    if initial_state is not None:
        wanted = (autograd.wide_dtype(query),)
        heads = (*query.shape[:2], query.shape[3])
        if not isinstance(initial_state, (tuple, list)) or len(initial_state) != 2:
            raise TypeError(
                f"pydl: {op}: {state_name} is a {named(initial_state)}, wants a pair (S, z)"
            )
        first, second = initial_state
        state = _fits(op, f"{state_name}[0]", first, query, (*heads, value.shape[3]), wanted)
        total = _fits(op, f"{state_name}[1]", second, query, heads, wanted)
    settings = Settings(
        hidden, feature, bool(causal), bool(normalize),
        1.0 if scale is None else _number(op, "scale", scale), _number(op, "eps", eps),
    )  # fmt: skip
    args = (query, key, value, _decay(op, decay, query, causal), state, total, *settings)
    if chosen in ("torch", "reference"):
        found = autograd.in_reference(RULE if chosen == "torch" else PLAIN, *args)
        found = (found[0].contiguous(), *found[1:])
    else:
        found = call(chosen, *args)
    out, *after = found
    out = out if out.dtype == dtype else out.to(dtype)
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
    decay: float | Sequence[float] | Tensor | None = None,
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
    if (state is not None or has_torch_function_variadic(query, key, value, decay)) and proxied(
        query, key, value, state, decay
    ):
        return hand_over(linear_attention_step, locals())
    op = "linear_attention_step"
    _tensors(op, query, query, query)
    if not all(isinstance(x, Tensor) and x.dim() == 3 for x in (query, key, value)):
        shapes = [
            tuple(x.shape) if isinstance(x, Tensor) else named(x) for x in (query, key, value)
        ]
        raise refusal(
            op, f"query {shapes[0]}, key {shapes[1]}, value {shapes[2]}: wants three dimensions, "
            "(batch, heads, width)"
        )  # fmt: skip
    out, after = _attend(
        op, "state", query[:, :, None], key[:, :, None], value[:, :, None], True, feature_map,
        normalize, eps, None, state, True, scale, decay, backend,
    )  # fmt: skip
    return out[:, :, 0], after
