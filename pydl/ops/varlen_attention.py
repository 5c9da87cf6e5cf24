"""varlen_attention: packed sequences, each attending to itself."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from pydl.backends import choose
from pydl.ops.attention import Settings
from pydl.ops.bias_act import lowered
from pydl.ops.dot_product import (
    Window,
    at_bottom,
    check,
    evened,
    instead,
    refusal,
    run,
    scale_of,
    seed_of,
    softcap_of,
    tensors,
    window_of,
)
from pydl.ops.philox import check_rate
from pydl.traced import hand_over, proxied


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    causal_alignment: str = "top_left",
    window: Window = None,
    softcap: float | None = None,
    return_lse: bool = False,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """Attention of packed sequences, each to itself: what padding would take is not spent.

    Args:
        query: (T, H, E): the sequences one after the other.
        key: (Tk, H, E).
        value: (Tk, H, Ev).
        cu_seq_q: Where each sequence of queries begins, and where the last ends: integers, one more
            than there are sequences, as `torch.nn.attention.varlen.varlen_attn` takes them.
        cu_seq_k: Likewise of keys.
        max_q: At least the longest sequence of queries.
        max_k: At least the longest of keys.
        dropout_p: As in `scaled_dot_product_attention`, like all that follow.
        is_causal: See `scaled_dot_product_attention`.
        scale: See `scaled_dot_product_attention`.
        enable_gqa: See `scaled_dot_product_attention`; heads are in dimension 1.
        causal_alignment: See `scaled_dot_product_attention`.
        window: See `scaled_dot_product_attention`.
        softcap: See `scaled_dot_product_attention`.
        return_lse: See `scaled_dot_product_attention`.
        seed: See `scaled_dot_product_attention`.
        backend: Who computes; see `pydl.backends`.

    Returns:
        (T, H, Ev); with `return_lse` a pair of it and (H, T).

    Raises:
        ValueError: `dropout_p`, `causal_alignment` or `window` is none of the above.
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    if has_torch_function_variadic(query, key, value, cu_seq_q, cu_seq_k, seed) and proxied(
        query, key, value, cu_seq_q, cu_seq_k, seed
    ):
        return hand_over(varlen_attention, locals())
    op = "varlen_attention"
    bottom, cap = at_bottom(op, causal_alignment), softcap_of(op, softcap)
    p = check_rate(op, float(dropout_p))
    left, right = window_of(op, window, is_causal)
    tensors(op, {"query": query, "key": key, "value": value}, {})
    query, key, value = lowered(query, key, value)
    chosen = choose(op, backend, query, key, value)
    if query.dim() != 3 or key.dim() != 3 or value.dim() != 3:
        raise refusal(
            op, f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}: "
            "wants three dimensions of each, (T, heads, width)"
        )  # fmt: skip
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    check(op, q, k, v, None, True)
    if not enable_gqa and not k.shape[1] == v.shape[1] == q.shape[1]:
        raise refusal(
            op, f"{q.shape[1]} heads of queries, {k.shape[1]} of keys and {v.shape[1]} of values "
            "want enable_gqa"
        )  # fmt: skip
    k, v = evened(q, k, v)
    for name, given, total in (("cu_seq_q", cu_seq_q, q), ("cu_seq_k", cu_seq_k, k)):
        if not isinstance(given, Tensor):
            raise refusal(op, f"{name} is a {type(given).__name__}, wants a Tensor")
        if given.dim() != 1 or given.numel() != cu_seq_q.numel() or given.numel() < 1:
            raise refusal(
                op, f"{name} has shape {tuple(given.shape)}, wants one more than the sequences, "
                "alike for queries and keys"
            )  # fmt: skip
        if given.dtype not in (torch.int32, torch.int64) or given.device != total.device:
            raise refusal(
                op, f"{name} is {given.dtype} on {given.device}, wants int32 or int64 on "
                f"{total.device}"
            )  # fmt: skip
    _check_offsets(op, cu_seq_q, q.shape[2], max_q)
    _check_offsets(op, cu_seq_k, k.shape[2], max_k)
    starts_q, starts_k = cu_seq_q.long(), cu_seq_k.long()
    if cu_seq_k is cu_seq_q:  # torch.compile takes no tensor twice
        starts_k = starts_k.clone()
    settings = Settings(
        seed_of(op, p, seed, query.device), starts_q, starts_k, int(max_q), int(max_k),
        scale_of(query, scale), cap, left, right, bottom, p,
    )  # fmt: skip
    chosen = instead(chosen, backend, int(max_k), (left, right), query, key, value)
    out, lse = run(chosen, q, k, v, None, None, settings)
    out = out[0].transpose(0, 1)
    return (out, lse[0, :, :, 0]) if return_lse else out


def _check_offsets(op: str, offsets: Tensor, total: int, longest: int) -> None:
    """Where reading them costs nothing: a kernel would read past the ends."""
    if offsets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    starts = offsets.tolist()
    lengths = [b - a for a, b in itertools.pairwise(starts)]
    if starts[0] < 0 or min(lengths, default=0) < 0 or starts[-1] > total:
        raise refusal(op, f"sequences begin at {starts}, wants ascending positions up to {total}")
    if max(lengths, default=0) > longest:
        raise refusal(
            op, f"the longest sequence has {max(lengths)} positions, but {longest} were told"
        )
