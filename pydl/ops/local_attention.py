"""local_attention: a window of keys around each query."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from pydl.backends import choose
from pydl.ops.attention import Settings, visible
from pydl.ops.bias_act import lowered
from pydl.ops.dot_product import (
    Folded,
    banded,
    check,
    instead,
    refusal,
    run,
    scale_of,
    seed_of,
    tensors,
    window_of,
)
from pydl.ops.philox import check_rate
from pydl.traced import hand_over, proxied


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int | tuple[int, int],
    *,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    dilation: int = 1,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention within a window, `softmax(scale * query @ key.T) @ value` over keys near the query.

    Time and memory grow with L times the window: what lies outside it is never visited.

    Args:
        query: (..., H, L, E), any strides and floating dtype.
        key: (..., Hkv, L, E); H is a multiple of Hkv.
        value: (..., Hkv, L, Ev).
        window_size: An odd total width centred on the query (7 sees 3 before and 3 after), or a
            pair of how many before and after, -1 for all.
        causal: See no key after the query's own.
        key_padding_mask: (B, L), True where a key is to be ignored, as in
            `torch.nn.MultiheadAttention`.
        bias: (H, left + 1 + right): added to the score of each head and offset from the query's
            key, the first before to the last after; has a gradient. With `causal` right is 0.
        dropout_p: As in `scaled_dot_product_attention`, like `scale` and `seed`.
        scale: None for `1 / sqrt(E)`.
        dilation: How many positions apart the keys are that a query sees; more than 1 works on
            copies.
        seed: See `scaled_dot_product_attention`.
        backend: Who computes; see `pydl.backends`.

    Returns:
        (..., H, L, Ev) in the query's dtype; rows that see no key are 0.

    Raises:
        ValueError: `window_size`, `dilation` or `dropout_p` is none of the above.
        TypeError: what is to be a tensor is none.
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    if has_torch_function_variadic(query, key, value, key_padding_mask, bias, seed) and proxied(
        query, key, value, key_padding_mask, bias, seed
    ):
        return hand_over(local_attention, locals())
    op = "local_attention"
    left, right = window_of(op, window_size, causal)
    if not isinstance(dilation, int) or dilation < 1:
        raise ValueError(f"pydl: {op}: dilation is {dilation!r}, wants a whole number above 0")
    if window_size is None:
        raise ValueError(f"pydl: {op}: the window is None, wants a total width or a pair")
    p = check_rate(op, float(dropout_p))
    tensors(
        op, {"query": query, "key": key, "value": value},
        {"key_padding_mask": key_padding_mask, "bias": bias},
    )  # fmt: skip
    if bias is not None:
        query, key, value, bias = lowered(query, key, value, bias)
    else:
        query, key, value = lowered(query, key, value)
    chosen = choose(op, backend, query, key, value)
    check(op, query, key, value, None, query.dim() > 2)
    if query.dim() < 3 or query.shape[-2] != key.shape[-2]:
        raise refusal(
            op, f"query {tuple(query.shape)}, key {tuple(key.shape)}: wants (..., H, L, E), as "
            "many keys as queries"
        )  # fmt: skip
    length, pair = key.shape[-2] // dilation, (left, right)
    if banded(length, pair) or bias is not None or p > 0:
        chosen = instead(chosen, backend, length, pair, query, key, value)
    folded = Folded(op, query, key, value, True)
    q, k, v = folded.tensors
    heads, length = q.shape[1], q.shape[2]
    relative = None
    if bias is not None:
        if min(left, right) < 0 or tuple(bias.shape) != (heads, left + 1 + right):
            raise refusal(
                op, f"bias has shape {tuple(bias.shape)}, wants ({heads}, left + 1 + right) and a "
                f"bounded window; it is ({left}, {right})"
            )  # fmt: skip
        if bias.dtype not in (query.dtype, torch.float32) or bias.device != query.device:
            raise refusal(
                op, f"bias is {bias.dtype} on {bias.device}, wants {query.dtype} or float32 on "
                f"{query.device}"
            )  # fmt: skip
        relative = bias[None, :, None]
    mask = None
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool or tuple(key_padding_mask.shape) != (
            q.shape[0], length,
        ) or key_padding_mask.device != query.device:  # fmt: skip
            raise refusal(
                op, f"key_padding_mask is {key_padding_mask.dtype} "
                f"{tuple(key_padding_mask.shape)} on {key_padding_mask.device}, wants bool "
                f"({q.shape[0]}, {length}) on {query.device}"
            )  # fmt: skip
        mask = ~key_padding_mask[:, None, None]
    steps = _Steps(q, dilation) if dilation > 1 else None
    if steps is not None:
        q, k, v = (steps.apart(t) for t in (q, k, v))
        mask = steps.mask(mask)
    settings = Settings(
        seed_of(op, p, seed, query.device), None, None, q.shape[2], k.shape[2],
        scale_of(query, scale),
        0.0, left, right, False, p,
    )  # fmt: skip
    args = (q, k, v, mask, relative)
    if chosen == "torch" and relative is None and p == 0:
        seen = visible(q.shape[2], k.shape[2], left, right, False, q.device)
        seen = seen if mask is None else seen & mask
        # Not as the comparison itself: torch takes no SymBool.
        gqa = True if k.shape[1] != heads else False  # noqa: SIM210
        out = F.scaled_dot_product_attention(q, k, v, seen, scale=settings.scale, enable_gqa=gqa)
    else:
        out = run(chosen, *args, settings)[0]
    return (out if steps is None else steps.together(out)).view(folded.shape)


class _Steps:
    """Positions `d` apart as sequences of their own, as many as there are remainders."""

    def __init__(self, like: Tensor, d: int) -> None:
        self._d, self._batch, self._length = d, like.shape[0], like.shape[2]
        self._each = -(-self._length // d)
        self._like = like

    def apart(self, x: Tensor) -> Tensor:
        b, h, n, e = x.shape
        x = F.pad(x, (0, 0, 0, self._each * self._d - n))
        return x.view(b, h, self._each, self._d, e).permute(0, 3, 1, 2, 4).flatten(0, 1)

    def mask(self, mask: Tensor | None) -> Tensor:
        """Of the keys, where the padding is hidden."""
        here = self._like.new_ones(1, 1, 1, self._length, dtype=torch.bool)
        mask = (here if mask is None else mask).expand(self._batch, 1, 1, self._length)
        return self.apart(mask.transpose(2, 3)).transpose(2, 3)

    def together(self, x: Tensor) -> Tensor:
        x = x.unflatten(0, (self._batch, self._d)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        return x[:, :, : self._length].contiguous()
