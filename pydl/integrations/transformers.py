"""Attention in models of Hugging Face's transformers.

>>> import pydl.integrations.transformers as integration
>>> integration.register()
>>> model = AutoModel.from_pretrained(name, attn_implementation="pydl")
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydl import functional as F
from pydl.backends import choose
from pydl.ops.attention import visible

__all__ = ["NAME", "attention", "attention_mask", "register"]

NAME = "pydl"
_OP = "scaled_dot_product_attention"


def register(name: str = NAME) -> None:
    """Makes `attn_implementation="pydl"` known to transformers; a second call changes nothing.

    Args:
        name: Another name for it.

    Raises:
        ImportError: transformers, of version 5 or newer, is missing.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            f"pydl: register: transformers does not import ({error}); remedy: pip install "
            "'transformers>=5'"
        ) from error
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, attention_mask)


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask of a model's layers, made once for each forward pass: (B, 1, L, S), True where a key
    is seen, or None where there is nothing to hide but what `is_causal` says.

    A mask that lies within a window of the last L of S positions is marked with it, so that kernels
    need not visit what is outside, and need no mask where it is the window and nothing else.

    Args:
        args: As of transformers' `sdpa_mask`, which makes the mask.
        kwargs: Likewise.
    """
    from transformers.masking_utils import sdpa_mask

    mask: Any = sdpa_mask(*args, **kwargs)
    local = kwargs.get("local_size")
    if mask is None or local is None or torch.compiler.is_compiling():
        return mask
    queries, keys = mask.shape[-2:]
    # A causal window counts the query itself, one to both sides does not.
    for left, right in ((local - 1, 0), (local, local)):
        window = visible(queries, keys, left, right, True, mask.device)
        if not (mask & ~window).any():
            # With the version, since a model may write to its mask.
            whole = bool((mask == window).all())
            mask._pydl_window = (mask._version, left, right, whole)
            break
    return mask


def _refuse(module: Any, kwargs: dict[str, Any], mask: Tensor | None) -> None:
    """Raises for what would change the result, or is asked for, and is not done here."""
    name = type(module).__name__
    if kwargs.get("output_attentions"):
        raise ValueError(
            f"pydl: attention of {name}: output_attentions is set, but the weights are never "
            'stored; remedy: attn_implementation="eager"'
        )
    if kwargs.get("cache") is not None:
        raise ValueError(
            f"pydl: attention of {name}: got a paged cache, wants none; remedy: "
            'attn_implementation="sdpa" for continuous batching'
        )
    if mask is None and kwargs.get("cu_seq_lens_q") is not None:
        raise ValueError(
            f"pydl: attention of {name}: got cu_seq_lens_q and no mask that tells the packed "
            "sequences apart; remedy: pass position_ids, which make one"
        )


def _biased(bias: Tensor, mask: Tensor | None, causal: bool, queries: int, keys: int) -> Tensor:
    """A bias of positions, with what is hidden at minus infinity."""
    bias = bias[..., :keys]
    if mask is None and causal:
        mask = visible(queries, keys, -1, 0, False, bias.device)
    if mask is None:
        return bias
    if mask.dtype != torch.bool:
        return bias + mask
    return bias.masked_fill(~mask, -torch.inf)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`softmax(softcap(scaling * query @ key.T) + attention_mask) @ value`, called by transformers.

    Args:
        module: The layer that calls; says whether it is causal where `is_causal` does not.
        query: (B, heads, L, E).
        key: (B, heads of keys, S, E): of as many heads, or fewer that divide them.
        value: (B, heads of keys, S, Ev).
        attention_mask: Broadcasts to (B, heads, L, S): True where a key is seen, or numbers to add.
            It says all about causality and windows, where there is one.
        dropout: The probability that a weight becomes 0.
        scaling: None for `1 / sqrt(E)`.
        is_causal: Without a mask: query i sees keys to i. Of one query: it sees all.
        sliding_window: Without a mask: how many keys a query sees up to its own, and as many after
            it where not causal.
        softcap: `c tanh(s / c)` in place of each score s.
        position_bias: Numbers to add to the scores, of the mask's shape; has a gradient.
        s_aux: (heads,): a score of each head that takes part in the softmax and weighs nothing, an
            attention sink; has a gradient.
        kwargs: What transformers hands to every implementation; what would change the result is
            refused.

    Returns:
        (B, L, heads, Ev), and None for the weights.

    Raises:
        ValueError: weights are asked for, or a paged cache is given, or packed sequences without a
            mask.
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    _refuse(module, kwargs, attention_mask)
    queries, keys = query.shape[2], key.shape[2]
    chosen = choose(_OP, None, query)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(causal) and queries > 1 and attention_mask is None
    window, bottom = None, False
    if attention_mask is None and sliding_window is not None and keys > sliding_window:
        one_sided = causal or queries == 1
        window = (sliding_window - 1, 0 if one_sided else sliding_window - 1)
        bottom, causal = queries == 1, False
    elif attention_mask is not None and position_bias is None:
        # torch's own function has no windows, and goes by the mask.
        windows = chosen != "torch" or bool(softcap) or s_aux is not None
        if windows and not torch.compiler.is_compiling():
            version, left, right, whole = getattr(attention_mask, "_pydl_window", (-1, 0, 0, False))
            if version == attention_mask._version:
                window, bottom = (left, right), True
                attention_mask = None if whole else attention_mask
    if position_bias is not None:
        attention_mask = _biased(position_bias, attention_mask, causal, queries, keys)
        causal = False
    fewer = key.shape[1] != query.shape[1]
    if fewer and chosen == "torch" and attention_mask is not None:
        # With a mask and enable_gqa torch takes the path that stores the scores.
        group = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(group, 1) for t in (key, value))
        fewer = False
    out = F.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, causal, scaling, fewer,
        causal_alignment="bottom_right" if bottom else "top_left", window=window, softcap=softcap,
        return_lse=s_aux is not None,
    )  # fmt: skip
    if s_aux is not None:
        out, lse = out
        out = out * torch.sigmoid(lse - s_aux.view(-1, 1).to(lse.dtype))[..., None].to(out.dtype)
    return out.transpose(1, 2).contiguous(), None
