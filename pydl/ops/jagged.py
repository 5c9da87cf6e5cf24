"""scaled_dot_product_attention of nested tensors: as packed sequences, without padding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pydl.backends import requested
from pydl.ops.dot_product import refusal
from pydl.ops.varlen_attention import varlen_attention

_OP = "scaled_dot_product_attention"


def _packed(name: str, x: Any) -> tuple[Tensor, Tensor]:
    """(T, H, E) of a jagged (B, H, *, E), and where sequences begin."""
    if not isinstance(x, Tensor) or not x.is_nested or x.layout != torch.jagged or x.dim() != 4:
        got = f"{x.layout} of {x.dim()} dimensions" if isinstance(x, Tensor) else type(x).__name__
        raise refusal(_OP, f"{name} is {got}, wants nested tensors of layout jagged, (B, H, *, E)")
    rows: Any = x.transpose(1, 2).contiguous()
    if rows.values().dim() != 3 or rows._lengths is not None:
        raise refusal(_OP, f"{name} has holes or is ragged elsewhere, wants (B, H, *, E)")
    return rows.values(), rows.offsets()


def attend(query: Tensor, key: Any, value: Any, attn_mask: Any, **named: Any) -> Tensor:
    """Attention of jagged queries, keys and values; arguments as those of
    `scaled_dot_product_attention`."""
    plain = not named["window"] and not named["softcap"] and named["seed"] is None
    plain = plain and named["causal_alignment"] == "top_left" and not named["return_lse"]
    asked = requested(named["backend"])
    # On the CPU torch's own pads; it has no causal mask there either.
    padded = query.device.type == "cpu" and query.layout == torch.jagged and attn_mask is None
    if plain and (asked == "torch" or (asked is None and not padded)):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, named["dropout_p"], named["is_causal"],
            scale=named["scale"], enable_gqa=named["enable_gqa"],
        )  # fmt: skip
    if attn_mask is not None or named.pop("return_lse"):
        raise refusal(_OP, "attn_mask or return_lse was given with nested tensors, wants neither")
    q, starts_q = _packed("query", query)
    k, starts_k = _packed("key", key)
    v, starts_v = _packed("value", value)
    if starts_v is not starts_k and not torch.equal(starts_v, starts_k):
        raise refusal(_OP, "value has other lengths than key, wants as many values as keys")
    longest = [int(s.diff().max()) if s.numel() > 1 else 0 for s in (starts_q, starts_k)]
    out = varlen_attention(q, k, v, starts_q, starts_k, *longest, **named)
    return torch.nested.nested_tensor_from_jagged(out, starts_q).transpose(1, 2)
