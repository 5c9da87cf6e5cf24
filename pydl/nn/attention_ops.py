"""The functions of attention as modules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function_variadic

from pydl import functional as F
from pydl.nn.activation import HasBackend
from pydl.ops.dot_product import Window, window_of
from pydl.ops.philox import check_rate
from pydl.traced import as_node, proxied


class ScaledDotProductAttention(HasBackend, nn.Module):
    """Attention, `softmax(scale * query @ key.T + attn_mask) @ value`, never storing the scores.

    Called as `module(query, key, value, attn_mask=None)`; dropout works in training only.

    Args:
        dropout_p: As in `pydl.functional.scaled_dot_product_attention`, like all that follow.
        is_causal: See there.
        scale: See there.
        enable_gqa: See there.
        causal_alignment: See there.
        window: See there.
        softcap: See there.

    Shape: (..., L, E), (..., S, E) and (..., S, Ev), to (..., L, Ev).

    Raises:
        ValueError: `dropout_p`, `causal_alignment` or `window` is none of those.
        RuntimeError: at the call, shapes, dtypes or devices do not fit.

    Source: Vaswani et al. 2017, arXiv 1706.03762; Dao et al. 2022, arXiv 2205.14135.
    """

    def __init__(
        self, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
        enable_gqa: bool = False, *, causal_alignment: str = "top_left", window: Window = None,
        softcap: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        name = type(self).__name__
        check_rate(name, dropout_p)
        window_of(name, window, is_causal)
        if causal_alignment not in ("top_left", "bottom_right"):
            raise ValueError(
                f"pydl: {name}: causal_alignment is {causal_alignment!r}, wants 'top_left' or "
                "'bottom_right'"
            )
        self.dropout_p, self.is_causal, self.scale = dropout_p, is_causal, scale
        self.enable_gqa, self.causal_alignment = enable_gqa, causal_alignment
        self.window, self.softcap = window, softcap

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
    ) -> Tensor:
        if has_torch_function_variadic(query, key, value, attn_mask) and proxied(
            query, key, value, attn_mask
        ):
            return as_node(self, locals())
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, self.dropout_p if self.training else 0.0, self.is_causal,
            self.scale, self.enable_gqa, causal_alignment=self.causal_alignment,
            window=self.window, softcap=self.softcap, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return _set(
            self, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
            causal_alignment="top_left", window=None, softcap=None,
        )  # fmt: skip


class LocalAttention(HasBackend, nn.Module):
    """Attention within a window, `softmax(scale * query @ key.T + bias) @ value` over keys near the
    query.

    Called as `module(query, key, value, key_padding_mask=None)`; dropout works in training only.

    Args:
        window_size: An odd total width, or a pair of how many keys before and after, -1 for all.
        heads: Learn a bias of (heads, window), for each offset of a key from the query, zero to
            begin with; None for no bias.
        causal: See no key after the query's own; the bias is then of left + 1 offsets.
        dropout_p: The probability that a weight becomes 0 in training.
        scale: None for `1 / sqrt(E)`.
        dilation: How many positions apart the keys are that a query sees.
        device: Where the bias lives.
        dtype: Its dtype.

    Shape: (..., heads, L, E) of query, key and value, to the same.

    Raises:
        ValueError: an argument is none of the above, or a bias is asked for without bounds of the
            window.
        RuntimeError: at the call, shapes, dtypes or devices do not fit.

    Source: Beltagy et al. 2020, arXiv 2004.05150; the bias: Shaw et al. 2018, arXiv 1803.02155.
    """

    bias: nn.Parameter | None

    def __init__(
        self, window_size: int | tuple[int, int], heads: int | None = None, *,
        causal: bool = False, dropout_p: float = 0.0, scale: float | None = None,
        dilation: int = 1, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_rate("LocalAttention", dropout_p)
        left, right = window_of("LocalAttention", window_size, causal)
        if dilation < 1:
            raise ValueError(f"pydl: LocalAttention: dilation is {dilation}, wants 1 or more")
        self.window_size, self.heads, self.causal = window_size, heads, causal
        self.dropout_p, self.scale, self.dilation = dropout_p, scale, dilation
        if heads is None:
            self.register_parameter("bias", None)
            return
        if min(left, right) < 0 or heads < 1:
            raise ValueError(
                f"pydl: LocalAttention: window_size is {window_size} and heads is {heads}; a bias "
                "wants a bounded window and 1 head or more"
            )
        shape = (heads, left + 1 + right)
        self.bias = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        if has_torch_function_variadic(query, key, value, key_padding_mask) and proxied(
            query, key, value, key_padding_mask
        ):
            return as_node(self, locals())
        return F.local_attention(
            query, key, value, self.window_size, causal=self.causal,
            key_padding_mask=key_padding_mask, bias=self.bias,
            dropout_p=self.dropout_p if self.training else 0.0, scale=self.scale,
            dilation=self.dilation, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        more = _set(self, heads=None, causal=False, dropout_p=0.0, scale=None, dilation=1)
        return ", ".join(part for part in (f"window_size={self.window_size}", more) if part)


class AdditiveAttention(HasBackend, nn.Module):
    """Additive attention, `softmax(w_v . tanh(w_q q + w_k k)) @ values` over the keys.

    Called as `module(query, keys, values, mask=None)`; see `pydl.functional.additive_attention`.

    Args:
        dims: Width of queries and keys: one for both, or a pair.
        hidden: Width H of what they are projected to.
        device: Where the weights live.
        dtype: Their dtype.

    Shape: (..., L, Eq), (..., S, Ek) and (..., S, Ev), to (..., L, Ev).

    Raises:
        RuntimeError: at the call, shapes, dtypes or devices do not fit.

    Source: Bahdanau et al. 2014, arXiv 1409.0473.
    """

    def __init__(
        self, dims: int | tuple[int, int], hidden: int,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dims = (dims, dims) if isinstance(dims, int) else (dims[0], dims[1])
        self.hidden = hidden
        kind = {"device": device, "dtype": dtype}
        self.w_q = nn.Parameter(torch.empty((hidden, self.dims[0]), **kind))  # type: ignore[arg-type]
        self.w_k = nn.Parameter(torch.empty((hidden, self.dims[1]), **kind))  # type: ignore[arg-type]
        self.w_v = nn.Parameter(torch.empty((hidden,), **kind))  # type: ignore[arg-type]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew, as `torch.nn.Linear` draws its own."""
        for weight in self.parameters():
            bound = 1 / math.sqrt(max(1, weight.shape[-1]))
            nn.init.uniform_(weight, -bound, bound)

    def forward(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        return F.additive_attention(
            query, keys, values, self.w_q, self.w_k, self.w_v, mask, backend=self.backend
        )

    def extra_repr(self) -> str:
        return f"dims={self.dims}, hidden={self.hidden}"


def _set(module: nn.Module, **defaults: Any) -> str:
    """The attributes that are not as by default."""
    return ", ".join(
        f"{name}={getattr(module, name)!r}"
        for name, default in defaults.items()
        if getattr(module, name) != default
    )
