"""scaled_dot_product_attention, and what the other calls of the engine have in common with it."""

from __future__ import annotations

import math
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from pydl import autograd
from pydl.backends import FLOATS, choose, ordinary, requested
from pydl.ops import decoding
from pydl.ops.attention import RULE, Settings, call
from pydl.ops.bias_act import lowered
from pydl.ops.philox import check_rate, check_seed, draw_seed
from pydl.traced import hand_over, proxied

Window = int | tuple[int, int] | None


def window_of(op: str, window: Window, causal: bool) -> tuple[int, int]:
    """How many keys a query sees before and after its own; -1 for all.

    Raises:
        ValueError: the window is neither odd and positive nor a pair of -1 and more.
    """
    if window is None:
        pair = (-1, -1)
    else:
        try:
            pair = _pair(window)
        except TypeError:
            pair = (-2, -2)
        if min(pair) < -1 or max(pair) > _LONGEST:
            raise ValueError(
                f"pydl: {op}: the window is {window!r}, wants an odd total width, or a pair (left, "
                "right) of keys, -1 for all"
            )
    return (pair[0], 0) if causal else pair


_LONGEST = 1 << 40  # more than there are positions, and far from int64's end


def _pair(window: Any) -> tuple[int, int]:
    """What a window says; below -1 where it says nothing."""
    if isinstance(window, (tuple, list)):
        if len(window) != 2:
            return -2, -2
        return index(window[0]), index(window[1])
    width = index(window)
    return (width // 2, width // 2) if width > 0 and width % 2 else (-2, -2)


def softcap_of(op: str, softcap: float | None) -> float:
    """0 where there is none.

    Raises:
        ValueError: it is negative or not finite.
    """
    if softcap is None:
        return 0.0
    if not 0 <= softcap < math.inf:
        raise ValueError(f"pydl: {op}: softcap is {softcap}, wants a positive number or None")
    return float(softcap)


def at_bottom(op: str, causal_alignment: str) -> bool:
    """Whether the last query stands at the last key.

    Raises:
        ValueError: there is no such alignment.
    """
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(
            f"pydl: {op}: causal_alignment is {causal_alignment!r}, wants 'top_left' or "
            "'bottom_right'"
        )
    return causal_alignment == "bottom_right"


def scale_of(query: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(max(1, query.shape[-1])) if scale is None else float(scale)


def refusal(op: str, what: str) -> RuntimeError:
    return RuntimeError(f"pydl: {op}: {what}")


def tensors(op: str, wanted: dict[str, Any], allowed: dict[str, Any]) -> None:
    """Raises TypeError for what is no tensor, nor None where that is allowed."""
    for given in (wanted, allowed):
        for name, one in given.items():
            if not isinstance(one, Tensor) and (one is not None or given is wanted):
                raise TypeError(f"pydl: {op}: {name} is a {type(one).__name__}, wants a Tensor")


def check(op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, gqa: bool) -> None:
    """Raises for what does not fit."""
    shapes = f"query {tuple(q.shape)}, key {tuple(k.shape)}, value {tuple(v.shape)}"
    if min(q.dim(), k.dim(), v.dim()) < 2:
        raise refusal(op, f"{shapes}: wants 2 dimensions of each at least")
    if k.shape[-1] != q.shape[-1] or v.shape[-2] != k.shape[-2]:
        raise refusal(op, f"{shapes}: wants query and key of one width, and as many values as keys")
    few = min(q.dim(), k.dim(), v.dim()) < 3
    if gqa and (few or not all(_shares(q.shape[-3], t.shape[-3]) for t in (k, v))):
        raise refusal(op, f"{shapes}: enable_gqa wants heads that the keys' heads divide")
    if mask is not None:
        if mask.device != q.device:
            raise refusal(op, f"attn_mask is on {mask.device}, wants the query's, {q.device}")
        if mask.dtype not in (torch.bool, q.dtype, torch.float32):
            raise refusal(
                op,
                f"attn_mask has dtype {mask.dtype}, wants bool, float32 or the query's, {q.dtype}",
            )


def _shares(heads: int, few: int) -> bool:
    """Whether so few heads of keys or values serve so many of queries, each as many."""
    return heads % few == 0 if few else heads == 0


def evened(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of as many heads as each other, in dimension -3."""
    if k.shape[-3] == v.shape[-3]:
        return k, v
    k, v = (t.repeat_interleave(q.shape[-3] // max(1, t.shape[-3]), -3) for t in (k, v))
    return k, v


class Folded:
    """Queries, keys and values as (batch, heads, rows, columns), and the way back."""

    def __init__(self, op: str, q: Tensor, k: Tensor, v: Tensor, gqa: bool) -> None:
        if gqa:
            k, v = evened(q, k, v)
        if not gqa or max(q.dim(), k.dim(), v.dim()) > 3:
            kept = 3 if gqa else 2
            try:
                leading = torch.broadcast_shapes(*(t.shape[:-kept] for t in (q, k, v)))
            except RuntimeError:
                raise refusal(
                    op, f"query {tuple(q.shape)}, key {tuple(k.shape)}, value {tuple(v.shape)}: "
                    "wants batches and heads that broadcast"
                ) from None  # fmt: skip
            q, k, v = (t.expand(*leading, *t.shape[-kept:]) for t in (q, k, v))
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
        return t.reshape(math.prod(t.shape[:-3]), *t.shape[-3:])

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
            raise refusal(
                op,
                f"attn_mask has shape {tuple(mask.shape)}, wants one that broadcasts to {wanted}",
            )
        dims = len(wanted)
        mask = mask.view((1,) * (dims - mask.dim()) + tuple(mask.shape))
        if dims <= 4:
            return self._fold(mask)
        if all(n == 1 for n in mask.shape[:-3]):
            return mask.reshape(1, *mask.shape[-3:])
        batch = math.prod(wanted[:-3])
        return mask.expand(*wanted[:-3], *mask.shape[-3:]).reshape(batch, *mask.shape[-3:])


def run(
    chosen: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, relative: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if chosen in ("reference", "torch"):  # PyTorch has no such call
        return autograd.in_reference(RULE, q, k, v, mask, relative, *settings)
    if autograd.sharded(q):
        return autograd.on_shards(
            RULE, lambda q, k, v, m, r, *s: run(chosen, q, k, v, m, r, Settings(*s)), q, k, v, mask,
            relative, *settings,
        )  # fmt: skip
    if relative is None and decoding.fits(q, settings):
        return decoding.attend(chosen, q, k, v, mask, settings)
    return call(chosen, q, k, v, mask, relative, *settings)


def seed_of(op: str, p: float, seed: Tensor | None, device: torch.device) -> Tensor | None:
    """What decides the dropout, if there is any; drawn where it is not given.

    Raises:
        RuntimeError: the seed is not of two int64 values on the device.
    """
    check_seed(op, seed, device)
    return None if p == 0 else draw_seed(device) if seed is None else seed


def banded(length: int, pair: tuple[int, int]) -> bool:
    """Whether a window leaves most of so many keys out."""
    return min(pair) >= 0 and length >= 16 * (sum(pair) + 1)


def instead(
    chosen: str, backend: str | None, length: int, pair: tuple[int, int], *given: Any
) -> str:
    """Who computes what PyTorch has no call for, on the CPU: kernels, unless another is named; they
    store no scores. In fp64, which they have no vectors for, where a window leaves most of it out.
    """
    first = given[0]
    if chosen != "torch" or requested(backend) is not None or first.device.type != "cpu":
        return chosen
    if not ordinary(*given) or first.dtype not in FLOATS:
        return chosen
    return "cpu" if first.dtype != torch.float64 or banded(length, pair) else chosen


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
        query: (..., L, E), any strides and floating dtype; or nested, of layout jagged, (B, H, *,
            E), as are key and value then, which `attn_mask` and `return_lse` are not for.
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
        ValueError: `dropout_p`, `causal_alignment`, `softcap` or `window` is none of the above.
        TypeError: what is to be a tensor is none.
        RuntimeError: shapes, dtypes or devices do not fit; `attn_mask` along with `is_causal`.

    Source: Dao et al. 2022, arXiv 2205.14135.
    """
    if has_torch_function_variadic(query, key, value, attn_mask, seed) and proxied(
        query, key, value, attn_mask, seed
    ):
        return hand_over(scaled_dot_product_attention, locals())
    op = "scaled_dot_product_attention"
    bottom = at_bottom(op, causal_alignment)
    p, cap = check_rate(op, float(dropout_p)), softcap_of(op, softcap)
    if is_causal and attn_mask is not None:
        raise refusal(op, "attn_mask was given along with is_causal, wants one of them")
    left, right = window_of(op, window, is_causal)
    tensors(op, {"query": query, "key": key, "value": value}, {"attn_mask": attn_mask})
    if query.is_nested:
        from pydl.ops.jagged import attend

        return attend(
            query, key, value, attn_mask, dropout_p=p, is_causal=is_causal, scale=scale,
            enable_gqa=enable_gqa, causal_alignment=causal_alignment, window=window,
            softcap=softcap, return_lse=return_lse, seed=seed, backend=backend,
        )  # fmt: skip
    if attn_mask is not None and attn_mask.is_floating_point():
        query, key, value, attn_mask = lowered(query, key, value, attn_mask)
    else:
        query, key, value = lowered(query, key, value)
    chosen = choose(op, backend, query, key, value)
    check(op, query, key, value, attn_mask, enable_gqa)
    plain = not (bottom and is_causal) and window is None and not cap and not return_lse
    if chosen == "torch" and plain and (seed is None or p == 0):
        if attn_mask is not None and attn_mask.dim() < 2:
            attn_mask = attn_mask.reshape(1, -1)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    chosen = instead(chosen, backend, key.shape[-2], (left, right), query, key, value)
    folded = Folded(op, query, key, value, enable_gqa)
    q, k, v = folded.tensors
    settings = Settings(
        seed_of(op, p, seed, query.device), None, None, q.shape[2], k.shape[2],
        scale_of(query, scale), cap, left, right, bottom, p,
    )  # fmt: skip
    out, lse = run(chosen, q, k, v, folded.mask(op, attn_mask), None, settings)
    out = out.view(folded.shape)
    return (out, lse.view(folded.shape[:-1])) if return_lse else out
