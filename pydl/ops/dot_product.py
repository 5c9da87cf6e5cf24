"""scaled_dot_product_attention, local_attention and varlen_attention: what users call."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pydl import autograd
from pydl.backends import choose
from pydl.ops.attention import RULE, Settings, call, definition, visible
from pydl.ops.bias_act import lowered
from pydl.ops.philox import draw_seed

Window = int | tuple[int, int] | None


def window_of(op: str, window: Window, causal: bool) -> tuple[int, int]:
    """How many keys a query sees before and after its own; -1 for all.

    Raises:
        ValueError: the window is neither odd and positive nor a pair of -1 and more.
    """
    if window is None:
        pair = (-1, -1)
    elif isinstance(window, int):
        if window < 1 or window % 2 == 0:
            raise ValueError(
                f"pydl: {op}: the window is {window}, wants an odd total width, or a pair (left, "
                "right)"
            )
        pair = (window // 2, window // 2)
    else:
        pair = (int(window[0]), int(window[1]))
        if len(window) != 2 or min(pair) < -1:
            raise ValueError(
                f"pydl: {op}: the window is {window}, wants an odd total width, or a pair (left, "
                "right) of keys, -1 for all"
            )
    return (pair[0], 0) if causal else pair


def _error(op: str, what: str) -> RuntimeError:
    return RuntimeError(f"pydl: {op}: {what}")


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, gqa: bool) -> None:
    """Raises for what does not fit."""
    shapes = f"query {tuple(q.shape)}, key {tuple(k.shape)}, value {tuple(v.shape)}"
    if min(q.dim(), k.dim(), v.dim()) < 2 or not q.dim() == k.dim() == v.dim():
        raise _error(op, f"{shapes}: wants as many dimensions of each, 2 at least")
    if k.shape[-1] != q.shape[-1] or v.shape[-2] != k.shape[-2]:
        raise _error(op, f"{shapes}: wants query and key of one width, and as many values as keys")
    if gqa and (q.dim() < 3 or k.shape[-3] != v.shape[-3] or q.shape[-3] % max(1, k.shape[-3])):
        raise _error(op, f"{shapes}: enable_gqa wants heads that the keys' heads divide")
    if mask is not None:
        if mask.device != q.device:
            raise _error(op, f"attn_mask is on {mask.device}, wants the query's, {q.device}")
        if mask.dtype not in (torch.bool, q.dtype, torch.float32):
            raise _error(
                op,
                f"attn_mask has dtype {mask.dtype}, wants bool, float32 or the query's, {q.dtype}",
            )


class _Folded:
    """Queries, keys and values as (batch, heads, rows, columns), and the way back."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, gqa: bool) -> None:
        if not gqa:
            leading = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
            q, k, v = (t.expand(*leading, *t.shape[-2:]) for t in (q, k, v))
        elif q.dim() > 3:
            leading = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
            q, k, v = (t.expand(*leading, *t.shape[-3:]) for t in (q, k, v))
        self.shape = (*q.shape[:-1], v.shape[-1])
        self._batched = gqa or q.dim() != 3
        self.tensors = tuple(self._fold(t) for t in (q, k, v))

    def _fold(self, t: Tensor) -> Tensor:
        if t.dim() == 4:
            return t
        if t.dim() == 2:
            return t[None, None]
        if t.dim() == 3:
            return t[None] if self._batched else t[:, None]
        return t.reshape(-1, *t.shape[-3:])

    def mask(self, op: str, mask: Tensor | None) -> Tensor | None:
        """Of four dimensions, those of size 1 standing for all."""
        if mask is None:
            return None
        wanted = (*self.shape[:-1], self.tensors[1].shape[-2])
        try:
            fits = torch.broadcast_shapes(mask.shape, wanted) == torch.Size(wanted)
        except RuntimeError:
            fits = False
        if not fits:
            raise _error(
                op,
                f"attn_mask has shape {tuple(mask.shape)}, wants one that broadcasts to {wanted}",
            )
        dims = len(wanted)
        mask = mask.view((1,) * (dims - mask.dim()) + tuple(mask.shape))
        if dims <= 4:
            return self._fold(mask)
        if all(n == 1 for n in mask.shape[:-3]):
            return mask.reshape(1, *mask.shape[-3:])
        return mask.expand(*wanted[:-3], *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])


def _run(
    chosen: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, relative: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    args = (q, k, v, mask, relative, *settings)
    return autograd.in_reference(RULE, *args) if chosen == "reference" else call(chosen, *args)


def _dropout(op: str, p: float, seed: Tensor | None, device: torch.device) -> Tensor | None:
    if not 0 <= p <= 1:
        raise ValueError(f"pydl: {op}: dropout_p is {p}, wants 0 to 1")
    return None if p == 0 else draw_seed(device) if seed is None else seed


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_alignment: str = "top_left",
    window: Window = None,
    softcap: float | None = None,
    return_lse: bool = False,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """Attention, `softmax(scale * query @ key.T + attn_mask) @ value`, never storing the scores.

    Args:
        query: (..., L, E), any strides and floating dtype.
        key: (..., S, E).
        value: (..., S, Ev).
        attn_mask: Broadcasts to (..., L, S). Of truth values: False hides a key. Of numbers, in the
            query's dtype or fp32: added to the scores; has a gradient.
        dropout_p: The probability that a weight becomes 0; the others grow by `1 / (1 -
            dropout_p)`.
        is_causal: Query i sees keys to i (or, with `causal_alignment` "bottom_right", to i + S -
            L).
        scale: None for `1 / sqrt(E)`.
        enable_gqa: Fewer heads of keys and values than of queries, in dimension -3: each serves as
            many neighbouring queries' heads.
        causal_alignment: Whether the first query stands at the first key, "top_left", or the last
            at the last, "bottom_right"; `window` goes by it too.
        window: The keys seen around a query's own: an odd total width, or a pair of how many before
            and after, -1 for all.
        softcap: `c tanh(s / c)` in place of each score s, before the mask.
        return_lse: Also return the logarithm of each row's sum of exponentials.
        seed: Two int64 values on the query's device that decide what is dropped, alike on every
            backend; drawn from torch's generator where None.
        backend: Who computes; see `pydl.backends`.

    Returns:
        (..., L, Ev) in the query's dtype; with `return_lse` a pair of it and (..., L), in fp32
        (fp64 for fp64). A row that sees no key is 0, and -inf. Saves its arguments, the output and
        two numbers a row.

    Raises:
        ValueError: `dropout_p`, `causal_alignment` or `window` is none of the above.
        RuntimeError: shapes, dtypes or devices do not fit; `attn_mask` along with `is_causal`.

    Source: Dao et al. 2022, arXiv 2205.14135.
    """
    op = "scaled_dot_product_attention"
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(
            f"pydl: {op}: causal_alignment is {causal_alignment!r}, wants 'top_left' or "
            "'bottom_right'"
        )
    if is_causal and attn_mask is not None:
        raise _error(op, "attn_mask was given along with is_causal, wants one of them")
    left, right = window_of(op, window, is_causal)
    if attn_mask is not None and attn_mask.is_floating_point():
        query, key, value, attn_mask = lowered(query, key, value, attn_mask)
    else:
        query, key, value = lowered(query, key, value)
    chosen = choose(op, backend, query, key, value)
    _check(op, query, key, value, attn_mask, enable_gqa)
    p = float(dropout_p)
    bottom = causal_alignment == "bottom_right"
    plain = not (bottom and is_causal) and window is None and not softcap and not return_lse
    if chosen == "torch" and plain and (seed is None or p == 0):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    folded = _Folded(query, key, value, enable_gqa)
    q, k, v = folded.tensors
    settings = Settings(
        _dropout(op, p, seed, query.device), None, None, q.shape[2], k.shape[2],
        1 / math.sqrt(max(1, query.shape[-1])) if scale is None else float(scale),
        float(softcap or 0.0), left, right, bottom, p,
    )  # fmt: skip
    args = (q, k, v, folded.mask(op, attn_mask), None)
    out, lse = definition(*args, *settings) if chosen == "torch" else _run(chosen, *args, settings)
    out = out.view(folded.shape)
    return (out, lse.view(folded.shape[:-1])) if return_lse else out


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
        key: (..., H, L, E).
        value: (..., H, L, Ev).
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
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    op = "local_attention"
    left, right = window_of(op, window_size, causal)
    if dilation < 1:
        raise ValueError(f"pydl: {op}: dilation is {dilation}, wants 1 or more")
    if bias is not None:
        query, key, value, bias = lowered(query, key, value, bias)
    else:
        query, key, value = lowered(query, key, value)
    chosen = choose(op, backend, query, key, value)
    _check(op, query, key, value, None, False)
    if query.dim() < 3 or query.shape[-2] != key.shape[-2]:
        raise _error(
            op, f"query {tuple(query.shape)}, key {tuple(key.shape)}: wants (..., H, L, E), as "
            "many keys as queries"
        )  # fmt: skip
    folded = _Folded(query, key, value, True)
    q, k, v = folded.tensors
    heads, length = q.shape[1], q.shape[2]
    relative = None
    if bias is not None:
        if min(left, right) < 0 or tuple(bias.shape) != (heads, left + 1 + right):
            raise _error(
                op, f"bias has shape {tuple(bias.shape)}, wants ({heads}, left + 1 + right) and a "
                f"bounded window; it is ({left}, {right})"
            )  # fmt: skip
        if bias.dtype not in (query.dtype, torch.float32) or bias.device != query.device:
            raise _error(
                op, f"bias is {bias.dtype} on {bias.device}, wants {query.dtype} or float32 on "
                f"{query.device}"
            )  # fmt: skip
        relative = bias[None, :, None]
    mask = None
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool or tuple(key_padding_mask.shape) != (
            q.shape[0], length,
        ):  # fmt: skip
            raise _error(
                op, f"key_padding_mask is {key_padding_mask.dtype} "
                f"{tuple(key_padding_mask.shape)}, wants bool ({q.shape[0]}, {length})"
            )  # fmt: skip
        mask = ~key_padding_mask[:, None, None]
    steps = _Steps(q, dilation) if dilation > 1 else None
    if steps is not None:
        q, k, v = (steps.apart(t) for t in (q, k, v))
        mask = steps.mask(mask)
    p = float(dropout_p)
    settings = Settings(
        _dropout(op, p, seed, query.device), None, None, q.shape[2], k.shape[2],
        1 / math.sqrt(max(1, query.shape[-1])) if scale is None else float(scale),
        0.0, left, right, False, p,
    )  # fmt: skip
    args = (q, k, v, mask, relative)
    if chosen != "torch":
        out = _run(chosen, *args, settings)[0]
    elif relative is None and p == 0:
        seen = visible(q.shape[2], k.shape[2], left, right, False, q.device)
        seen = seen if mask is None else seen & mask
        out = F.scaled_dot_product_attention(q, k, v, seen, scale=settings.scale)
    else:
        out = definition(*args, *settings)[0]
    return (out if steps is None else steps.together(out)).view(folded.shape)


class _Steps:
    """Positions `d` apart as sequences of their own, as many as there are remainders."""

    def __init__(self, like: Tensor, d: int) -> None:
        self._d, self._batch, self._length = d, like.shape[0], like.shape[2]
        self._each = -(-self._length // d)
        self._device = like.device

    def apart(self, x: Tensor) -> Tensor:
        b, h, n, e = x.shape
        x = F.pad(x, (0, 0, 0, self._each * self._d - n))
        return x.view(b, h, self._each, self._d, e).permute(0, 3, 1, 2, 4).flatten(0, 1)

    def mask(self, mask: Tensor | None) -> Tensor:
        """Of the keys, where the padding is hidden."""
        here = torch.ones(1, 1, 1, self._length, dtype=torch.bool, device=self._device)
        mask = (here if mask is None else mask).expand(self._batch, 1, 1, self._length)
        return self.apart(mask.transpose(2, 3)).transpose(2, 3)

    def together(self, x: Tensor) -> Tensor:
        x = x.unflatten(0, (self._batch, self._d)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        return x[:, :, : self._length].contiguous()


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
    op = "varlen_attention"
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(
            f"pydl: {op}: causal_alignment is {causal_alignment!r}, wants 'top_left' or "
            "'bottom_right'"
        )
    left, right = window_of(op, window, is_causal)
    query, key, value = lowered(query, key, value)
    chosen = choose(op, backend, query, key, value)
    if query.dim() != 3 or key.dim() != 3 or value.dim() != 3:
        raise _error(op, "wants query, key and value of three dimensions, (T, heads, width)")
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    _check(op, q, k, v, None, True)
    if not enable_gqa and k.shape[1] != q.shape[1]:
        raise _error(op, f"{q.shape[1]} heads of queries and {k.shape[1]} of keys want enable_gqa")
    for name, given, total in (("cu_seq_q", cu_seq_q, q), ("cu_seq_k", cu_seq_k, k)):
        if given.dim() != 1 or given.numel() != cu_seq_q.numel() or given.numel() < 1:
            raise _error(
                op, f"{name} has shape {tuple(given.shape)}, wants one more than the sequences, "
                "alike for queries and keys"
            )  # fmt: skip
        if given.dtype not in (torch.int32, torch.int64) or given.device != total.device:
            raise _error(
                op, f"{name} is {given.dtype} on {given.device}, wants int32 or int64 on "
                f"{total.device}"
            )  # fmt: skip
    _check_offsets(op, cu_seq_q, q.shape[2], max_q)
    _check_offsets(op, cu_seq_k, k.shape[2], max_k)
    p = float(dropout_p)
    settings = Settings(
        _dropout(op, p, seed, query.device), cu_seq_q.long(), cu_seq_k.long(), int(max_q),
        int(max_k), 1 / math.sqrt(max(1, query.shape[-1])) if scale is None else float(scale),
        float(softcap or 0.0), left, right, causal_alignment == "bottom_right", p,
    )  # fmt: skip
    args = (q, k, v, None, None)
    out, lse = definition(*args, *settings) if chosen == "torch" else _run(chosen, *args, settings)
    out = out[0].transpose(0, 1)
    return (out, lse[0, :, :, 0]) if return_lse else out


def _check_offsets(op: str, offsets: Tensor, total: int, longest: int) -> None:
    """Where reading them costs nothing: a kernel would read past the ends."""
    if offsets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    starts = offsets.tolist()
    lengths = [b - a for a, b in itertools.pairwise(starts)]
    if starts[0] < 0 or min(lengths, default=0) < 0 or starts[-1] > total:
        raise _error(op, f"sequences begin at {starts}, wants ascending positions up to {total}")
    if max(lengths, default=0) > longest:
        raise _error(
            op, f"the longest sequence has {max(lengths)} positions, but {longest} were told"
        )
