"""Twins of torch's modules of attention; its functions are modules in `attention_ops.py`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as TF
from torch import Tensor, nn
from torch.overrides import has_torch_function_variadic

from pydl import functional as F
from pydl.backends import choose, requested
from pydl.nn.activation import HasBackend
from pydl.ops.product import linear_layer
from pydl.traced import as_node, proxied

OP = "scaled_dot_product_attention"


def _wants(ok: bool, what: Callable[[], str], error: type[Exception] = AssertionError) -> None:
    """`what` is made into words where it is wrong only: a traced shape is to stay dynamic."""
    if not ok:
        raise error(f"pydl: MultiheadAttention: {what()}")


class MultiheadAttention(HasBackend, nn.MultiheadAttention):
    """Multi-head attention, `concat(softmax(q_h k_h^T / sqrt(E / heads)) v_h) W_o + b_o` with q, k
    and v the projected arguments; twin of `torch.nn.MultiheadAttention`.

    With `need_weights=False` a kernel computes, which stores no weights. Weights that are asked for
    (torch's default) come from a plain softmax that stores (N, heads, L, S) of them. Where the
    backend is "torch", also by the automatic choice, which it always is with weights, torch's own
    forward does all.

    Args:
        embed_dim: Width E of the queries and of the result, a multiple of `num_heads`.
        num_heads: How many heads share it.
        dropout: The probability that a weight becomes 0 in training.
        bias: Learn biases of the projections.
        add_bias_kv: Append a learnt key and value to the sequence.
        add_zero_attn: Append a key and a value of zeros.
        kdim: Width of the keys; None for `embed_dim`.
        vdim: Width of the values; None for `embed_dim`.
        batch_first: (N, L, E), not (L, N, E).
        device: Where the parameters live.
        dtype: Their dtype.

    Shape: query (L, N, E), key (S, N, kdim) and value (S, N, vdim), to (L, N, E) and weights
    (N, L, S), or (N, heads, L, S); without N where there is no batch.

    Differences from torch: other random numbers for dropout, and a query that may see no key has
    weights and attention of 0, not NaN, where a backend other than "torch" computes the weights.

    Raises:
        ValueError, AssertionError, RuntimeError: what does not fit, where torch raises them.

    Source: Vaswani et al. 2017, arXiv 1706.03762.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends.

        Args:
            query: See the class, like the next two.
            key: Of as many positions as `value`.
            value: See the class.
            key_padding_mask: (N, S) or (S,); True hides a key, numbers are added to its scores.
            need_weights: Also return the weights.
            attn_mask: (L, S) or (N * heads, L, S); True hides a key, numbers are added.
            average_attn_weights: Return the mean of the heads' weights, not each.
            is_causal: A promise that `attn_mask` is the causal mask; without `key_padding_mask` and
                `need_weights` it is then not read, and appended keys count as later ones.

        Returns:
            The result, and the weights or None.
        """
        if has_torch_function_variadic(query, key, value, key_padding_mask, attn_mask) and proxied(
            query, key, value, key_padding_mask, attn_mask
        ):
            return as_node(self, locals())
        plain = need_weights and requested(self.backend) is None
        if plain or choose(OP, self.backend, query) == "torch":
            return super().forward(
                query, key, value, key_padding_mask=key_padding_mask, need_weights=need_weights,
                attn_mask=attn_mask, average_attn_weights=average_attn_weights, is_causal=is_causal,
            )  # fmt: skip
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        batched = query.dim() == 3
        if not batched:
            same, query, key, value = self._added((query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        else:
            same = (query is key, key is value)
        first = self.batch_first or not batched
        q, k, v = self._projected(query, key, value, *same)
        q, k, v = self._heads(q, k, v, first)
        appended = k.shape[2] - (key.shape[1] if first else key.shape[0])
        if is_causal and key_padding_mask is None and not need_weights:
            attn_mask = None
        else:
            is_causal = False
        mask = self._mask(attn_mask, key_padding_mask, q, appended)
        p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, weights = _weighted(q, k, v, mask, p)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, p, is_causal, backend=self.backend)
        out = out.permute(0, 2, 1, 3) if first else out.permute(2, 0, 1, 3)
        out = self._linear(out.flatten(2), self.out_proj.weight, self.out_proj.bias)
        if batched:
            return out, weights
        return out[0], None if weights is None else weights[0]

    @staticmethod
    def _added(given: tuple[Tensor, ...]) -> tuple[tuple[bool, bool], Tensor, Tensor, Tensor]:
        """With a batch of one, and which of them were one tensor."""
        query, key, value = given
        return (query is key, key is value), query[None], key[None], value[None]

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None,
        mask: Tensor | None, is_causal: bool,
    ) -> None:  # fmt: skip
        """Raises for what does not fit, errors of torch's types."""

        def shapes(wanted: str) -> Callable[[], str]:
            given = (("query", query), ("key", key), ("value", value))
            return lambda: (
                ", ".join(f"{name} {tuple(t.shape)}" for name, t in given) + f": wants {wanted}"
            )

        dims, width = query.dim(), self.embed_dim
        at = 0 if self.batch_first else 1
        _wants(
            dims in (2, 3) and dims == key.dim() == value.dim(),
            shapes("three dimensions of each, or two without a batch"),
        )
        _wants(query.shape[-1] == width, shapes(f"queries of width {width}"))
        _wants(key.shape[:-1] == value.shape[:-1], shapes("as many values as keys"))
        if self._qkv_same_embed_dim:
            _wants(key.shape == value.shape, shapes("keys and values of one shape"))
        _wants(
            key.shape[-1] == self.kdim and value.shape[-1] == self.vdim,
            shapes(f"keys of width {self.kdim} and values of width {self.vdim}"),
            RuntimeError,
        )
        # No truth of a tuple of sizes, which torch.compile cannot trace where they are dynamic.
        batched = dims == 3
        batch = (query.shape[at],) if batched else ()
        _wants(
            not batched or key.shape[at] == query.shape[at], shapes("one batch size"), RuntimeError
        )
        rows, keys = (t.shape[1 - at] if batched else t.shape[0] for t in (query, key))
        _wants(not is_causal or mask is not None, lambda: "is_causal wants attn_mask", RuntimeError)
        self._check_mask("key_padding_mask", padding, query.dtype)
        self._check_mask("attn_mask", mask, query.dtype)
        if padding is not None:
            shape, wanted = padding.shape, (*batch, keys)
            _wants(
                tuple(shape) == wanted,
                lambda: f"key_padding_mask has shape {tuple(shape)}, wants {wanted}",
            )
        if mask is not None:
            size, more = mask.shape, (math.prod(batch) * self.num_heads,)[: mask.dim() - 2]
            _wants(len(size) in (2, 3), lambda: f"attn_mask has {len(size)} dimensions, wants 2, 3")
            _wants(
                tuple(size) == (*more, rows, keys),
                lambda: f"attn_mask has shape {tuple(size)}, wants {(*more, rows, keys)}",
                RuntimeError if batched or len(size) == 2 else AssertionError,
            )

    @staticmethod
    def _check_mask(name: str, mask: Tensor | None, dtype: torch.dtype) -> None:
        if mask is None or mask.dtype == torch.bool:
            return
        _wants(mask.is_floating_point(), lambda: f"{name} is {mask.dtype}, wants bool or a float")
        _wants(
            mask.dtype in (dtype, torch.float32),
            lambda: f"{name} is {mask.dtype}, wants bool, float32 or the query's, {dtype}",
            RuntimeError,
        )

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_layer(x, weight, bias, self.backend)

    def _projected(
        self, query: Tensor, key: Tensor, value: Tensor, self_attention: bool, one_source: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """By as few matrix products as there are sources."""
        bias = self.in_proj_bias
        if not self._qkv_same_embed_dim:
            parts = (None, None, None) if bias is None else bias.chunk(3)
            return (
                self._linear(query, self.q_proj_weight, parts[0]),
                self._linear(key, self.k_proj_weight, parts[1]),
                self._linear(value, self.v_proj_weight, parts[2]),
            )
        weight, sizes = self.in_proj_weight, [self.embed_dim, 2 * self.embed_dim]
        if self_attention and one_source:
            q, k, v = self._linear(query, weight, bias).chunk(3, -1)
        elif one_source:
            w = weight.split(sizes)
            b = (None, None) if bias is None else bias.split(sizes)
            q = self._linear(query, w[0], b[0])
            k, v = self._linear(key, w[1], b[1]).chunk(2, -1)
        else:
            w = weight.chunk(3)
            b = (None, None, None) if bias is None else bias.chunk(3)
            q, k, v = (
                self._linear(t, w[i], b[i]) for i, t in enumerate((query, key, value))
            )  # fmt: skip
        return q, k, v

    def _heads(self, q: Tensor, k: Tensor, v: Tensor, first: bool) -> tuple[Tensor, ...]:
        """As (N, heads, length, width), with the appended keys and values."""
        q, k, v = (t if first else t.transpose(0, 1) for t in (q, k, v))
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat((k, self.bias_k.to(k.dtype).expand(k.shape[0], -1, -1)), 1)
            v = torch.cat((v, self.bias_v.to(v.dtype).expand(v.shape[0], -1, -1)), 1)
        if self.add_zero_attn:
            k, v = (TF.pad(t, (0, 0, 0, 1)) for t in (k, v))
        return tuple(t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))

    def _mask(
        self, mask: Tensor | None, padding: Tensor | None, q: Tensor, appended: int
    ) -> Tensor | None:
        """Both masks in one, as `scaled_dot_product_attention` takes it: True or 0 where a key is
        seen."""
        masks = []
        if mask is not None:
            batch = (1, 1) if mask.dim() == 2 else (q.shape[0], self.num_heads)
            masks.append(mask.view(*batch, *mask.shape[-2:]))
        if padding is not None:
            masks.append(padding[:, None, None])
        numbers = any(m.is_floating_point() for m in masks)
        made: Tensor | None = None
        for one in masks:
            if one.dtype == torch.bool:
                one = ~one
                if numbers:
                    one = torch.zeros_like(one, dtype=q.dtype).masked_fill(~one, -math.inf)
            made = one if made is None else made + one if numbers else made & one
        if made is not None and appended:
            made = TF.pad(made, (0, appended), value=0.0 if numbers else True)
        return made


def _weighted(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float
) -> tuple[Tensor, Tensor]:
    """Attention and its weights, stored, after dropout; rows that see no key are 0."""
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
    empty = None
    if mask is not None:
        mask = mask if mask.dtype != torch.bool else torch.where(mask, 0.0, -math.inf)
        empty = (mask == -math.inf).all(-1, keepdim=True)
        scores = scores + mask.masked_fill(empty, 0).to(scores.dtype)
    weights = torch.softmax(scores, -1)
    weights = weights if empty is None else weights.masked_fill(empty, 0)
    weights = TF.dropout(weights, p) if p > 0 else weights
    return weights.to(v.dtype) @ v, weights
