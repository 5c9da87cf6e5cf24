"""Linear attention with its projections, for whole sequences and token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function_variadic

from pydl import functional as F
from pydl.autograd import wide_dtype
from pydl.nn.activation import HasBackend
from pydl.nn.linear import Linear
from pydl.ops.linear import FeatureMap, State, feature_number
from pydl.ops.product import linear_layer
from pydl.traced import as_node, proxied


class LinearAttention(HasBackend, nn.Module):
    """Projections to queries, keys and values, `linear_attention` of each head, and a projection
    back.

    Called with a sequence it attends to itself; with a second, `module(x, context)`, to that
    (cross-attention), which the causal form cannot. The causal form takes the state that tokens
    before left, `module(x, state=state)`, and with `return_state=True` also returns the one after
    its own; `step` takes one token.

    Args:
        dim: Features of the input and of the output.
        heads: How many attend side by side.
        dim_head: Features of each; None for `dim // heads`.
        causal: See no token after one's own.
        feature_map: As in `pydl.functional.linear_attention`, like `normalize`, `eps` and `scale`.
        normalize: Divide by the sum of scores.
        eps: Added to that sum.
        scale: Multiplies the scores; None for 1.
        decay: None, or each head's decay, a number or `heads` of them, above 0 and up to 1; wants
            `causal`. Learnt where `learn_decay`: the parameter `decay_logit` holds `log(d / (1 -
            d))`, so that it stays within bounds.
        learn_decay: Whether `decay`, then below 1, is a parameter.
        context_dim: Features of the context; None for `dim`.
        bias: Whether the projections to queries, keys and values have one.
        out_bias: Whether the projection back has one.
        device: Where the parameters live.
        dtype: Their dtype.

    Shape: (B, L, dim) to the same; context (B, S, context_dim).

    Raises:
        ValueError: an argument is not as above.
        RuntimeError: at the call, shapes do not fit, or a context is given to the causal form.

    Source: Katharopoulos et al. 2020, arXiv 2006.16236.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        dim_head: int | None = None,
        causal: bool = False,
        *,
        feature_map: FeatureMap = "elu",
        normalize: bool = True,
        eps: float = 1e-6,
        scale: float | None = None,
        decay: float | list[float] | None = None,
        learn_decay: bool = False,
        context_dim: int | None = None,
        bias: bool = False,
        out_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        feature_number("LinearAttention", feature_map)
        sizes = (dim, heads, 1 if dim_head is None else dim_head)
        if not all(isinstance(n, int) and n > 0 for n in sizes) or (
            dim_head is None and dim % heads
        ):
            raise ValueError(
                f"pydl: LinearAttention: dim is {dim}, heads {heads} and dim_head {dim_head}, "
                "wants whole numbers above 0, and heads that divide dim where dim_head is None"
            )
        if causal and context_dim is not None:
            raise ValueError("pydl: LinearAttention: context_dim was given, but causal has none")
        self.dim, self.heads = dim, heads
        self.dim_head = dim // heads if dim_head is None else dim_head
        self.causal = causal
        self.feature_map = feature_map
        self.normalize, self.eps, self.scale = normalize, eps, scale
        self.context_dim = dim if context_dim is None else context_dim
        made = {"device": device, "dtype": dtype}
        inner = self.heads * self.dim_head
        # One product for all three where they come from one sequence.
        self.to_qkv: Linear | None = None
        if context_dim is None:
            self.to_qkv = Linear(dim, 3 * inner, bias=bias, **made)
        else:
            self.to_q = Linear(dim, inner, bias=bias, **made)
            self.to_kv = Linear(context_dim, 2 * inner, bias=bias, **made)
        self.to_out = Linear(inner, dim, bias=out_bias, **made)
        self._set_decay(decay, learn_decay, device)

    def _set_decay(
        self, decay: float | list[float] | None, learn: bool, device: torch.device | str | None
    ) -> None:
        self.learn_decay = learn
        self.decay_logit: nn.Parameter | None = None
        # No buffer: a module's dtype would round 0.999 to 1.
        self.decay: tuple[float, ...] | None = None
        if decay is None:
            if learn:
                raise ValueError("pydl: LinearAttention: learn_decay wants a decay to begin with")
            return
        try:
            values = torch.as_tensor(decay, dtype=torch.float64).reshape(-1)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"pydl: LinearAttention: decay is {decay!r}, wants one number or {self.heads}"
            ) from error
        values = values.expand(self.heads) if values.numel() == 1 else values
        most = 1 - 1e-7 if learn else 1.0
        right = values.numel() == self.heads and bool(((values > 0) & (values <= most)).all())
        if not right or not self.causal:
            wanted = "causal, and " if not self.causal else ""
            raise ValueError(
                f"pydl: LinearAttention: decay is {decay!r}, wants {wanted}one number or "
                f"{self.heads}, above 0 and {'below' if learn else 'up to'} 1"
            )
        if learn:
            self.decay_logit = nn.Parameter(torch.logit(values).float().to(device))
        else:
            self.decay = tuple(values.tolist())

    def _decay(self, like: Tensor) -> Tensor | tuple[float, ...] | None:
        """Each head's decay, in what `linear_attention` computes in."""
        if self.decay_logit is None:
            return self.decay
        return torch.sigmoid(self.decay_logit.to(wide_dtype(like)))

    def _check(self, name: str, x: Tensor, width: int, dims: int) -> None:
        if not isinstance(x, Tensor) or x.dim() != dims or x.shape[-1] != width:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise RuntimeError(
                f"pydl: LinearAttention: {name} is {got}, wants "
                f"({'B, L' if dims == 3 else 'B'}, {width})"
            )

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, L, parts * heads * dim_head) as (B, heads, L, dim_head) views."""
        return x.unflatten(-1, (parts, self.heads, self.dim_head)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(
        self, x: Tensor, context: Tensor | None = None, key_padding_mask: Tensor | None = None,
        *, state: State | None = None, return_state: bool = False,
    ) -> Any:  # fmt: skip
        """Attends to `context`, or to `x` itself, but for its tokens where `key_padding_mask`, (B,
        S), is True; in the causal form also to what `state` holds, as returned. Returns (B, L,
        dim), and with `return_state` the state after the last token."""
        if (
            state is not None or has_torch_function_variadic(x, context, key_padding_mask)
        ) and proxied(x, context, key_padding_mask, state):
            return as_node(self, locals())
        if context is not None and self.causal:
            raise RuntimeError("pydl: LinearAttention: a context was given, but causal takes none")
        if (state is not None or return_state) and not self.causal:
            raise RuntimeError("pydl: LinearAttention: a state wants the causal form")
        source = x if context is None else context
        self._check("x", x, self.dim, 3)
        self._check("x" if context is None else "context", source, self.context_dim, 3)
        if self.to_qkv is None:
            (q,) = self._split(self.to_q(x), 1)
            k, v = self._split(self.to_kv(source), 2)
        elif context is None:
            q, k, v = self._split(self.to_qkv(x), 3)
        else:
            inner = self.heads * self.dim_head
            weight, bias = self.to_qkv.weight, self.to_qkv.bias
            first, second = (None, None) if bias is None else (bias[:inner], bias[inner:])
            (q,) = self._split(linear_layer(x, weight[:inner], first, self.backend), 1)
            k, v = self._split(linear_layer(source, weight[inner:], second, self.backend), 2)
        out = F.linear_attention(
            q, k, v, causal=self.causal, feature_map=self.feature_map, normalize=self.normalize,
            eps=self.eps, key_padding_mask=key_padding_mask, initial_state=state,
            return_state=return_state, scale=self.scale, decay=self._decay(q),
            backend=self.backend,
        )  # fmt: skip
        if not return_state:
            return self.to_out(out.transpose(1, 2).flatten(2))
        out, after = out
        return self.to_out(out.transpose(1, 2).flatten(2)), after

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One token of the causal form.

        Args:
            x: (B, dim).
            state: What the step before returned; None for the first token.

        Returns:
            (B, dim), and the state after the token: see `pydl.functional.linear_attention_step`.

        Raises:
            RuntimeError: the module is not causal.
        """
        if not self.causal or self.to_qkv is None:
            raise RuntimeError("pydl: LinearAttention: step wants the causal form")
        self._check("x", x, self.dim, 2)
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, self.dim_head)).unbind(-3)
        out, state = F.linear_attention_step(
            q, k, v, state, feature_map=self.feature_map, normalize=self.normalize, eps=self.eps,
            scale=self.scale, decay=self._decay(q), backend=self.backend,
        )  # fmt: skip
        return self.to_out(out.flatten(1)), state

    def extra_repr(self) -> str:
        name = self.feature_map if isinstance(self.feature_map, str) else "a function"
        text = f"{self.dim}, heads={self.heads}, dim_head={self.dim_head}, causal={self.causal}"
        return f"{text}, feature_map={name!r}, normalize={self.normalize}"
