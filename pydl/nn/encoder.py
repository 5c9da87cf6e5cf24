"""A layer of a transformer's encoder, of this package's parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as TF
from torch import Tensor, nn
from torch.overrides import has_torch_function_variadic

from pydl import functional as F
from pydl.backends import choose, requested
from pydl.nn.activation import HasBackend
from pydl.nn.attention import OP, MultiheadAttention
from pydl.nn.linear import Linear
from pydl.nn.norm import LayerNorm
from pydl.nn.steps import LINEARS, added, adds, biased, normed, plain
from pydl.ops.product import linear_layer
from pydl.traced import as_node, proxied


class TransformerEncoderLayer(HasBackend, nn.TransformerEncoderLayer):
    """A layer of a transformer's encoder, self-attention and two linear layers, each with a
    residual and layer normalisation; twin of `torch.nn.TransformerEncoderLayer`.

    `y = norm1(x + drop(attention(x)))`, `norm2(y + drop(linear2(drop(act(linear1(y))))))`; with
    `norm_first` `y = x + drop(attention(norm1(x)))`, `y + drop(linear2(drop(act(linear1(norm2(
    y))))))`. Attention, linear layers, normalisation (with the sum before it) and, where
    they are torch's functions, relu and gelu (with the bias before them) are pydl's. Where the
    backend of attention is "torch", also by the automatic choice, torch's own forward runs them,
    with its fast path for evaluation.

    The attribute `backend`, when set, is set in all parts.

    Args:
        d_model: Width E of input and output.
        nhead: Heads of the attention.
        dim_feedforward: Width between the linear layers.
        dropout: The probability that an element becomes 0 in training.
        activation: "relu", "gelu" or a callable.
        layer_norm_eps: Added to the variance.
        batch_first: (N, L, E), not (L, N, E).
        norm_first: Normalise what enters attention and linear layers, not what leaves.
        bias: Learn biases.
        device: Where the parameters live.
        dtype: Their dtype.

    Shape: (L, N, E) or (L, E), to the same.

    Raises:
        ValueError, AssertionError, RuntimeError: what does not fit, where torch raises them.

    Source: Vaswani et al. 2017, arXiv 1706.03762; `norm_first`: Xiong et al. 2020, arXiv
    2002.04745.
    """

    def __init__(
        self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = TF.relu, layer_norm_eps: float = 1e-5,
        batch_first: bool = False, norm_first: bool = False, bias: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )  # fmt: skip
        # Not made anew: the parameters are those that torch draws for this seed.
        for part, cls in (
            (self.self_attn, MultiheadAttention),
            (self.norm1, LayerNorm),
            (self.norm2, LayerNorm),
            (self.linear1, Linear),
            (self.linear2, Linear),
        ):
            object.__setattr__(part, "__class__", cls)

    @property
    def backend(self) -> str | None:  # type: ignore[override]
        """Who computes; set it to say who computes in every part."""
        return vars(self).get("backend")

    @backend.setter
    def backend(self, name: str | None) -> None:
        vars(self)["backend"] = name
        for part in self.modules():
            if isinstance(part, HasBackend) and part is not self:
                part.backend = name

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Encodes.

        Args:
            src: See the class.
            src_mask: See `MultiheadAttention`, `attn_mask`.
            src_key_padding_mask: See `MultiheadAttention`, `key_padding_mask`.
            is_causal: See `MultiheadAttention`.
        """
        if has_torch_function_variadic(src, src_mask, src_key_padding_mask) and proxied(
            src, src_mask, src_key_padding_mask
        ):
            return as_node(self, locals())
        if src.is_nested and requested(self.backend) not in (None, "torch"):
            # torch.nn.TransformerEncoder hands sequences of different lengths on in this form.
            if src_mask is not None or src_key_padding_mask is not None:
                raise RuntimeError(
                    "pydl: TransformerEncoderLayer: got masks with a nested tensor, wants none"
                )
            return torch.nested.as_nested_tensor([self.forward(one) for one in src.unbind()])
        if choose(OP, self.backend, src) == "torch":
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        x, masks = src, (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            attended = self._sa_block(self.norm1(x), *masks)
            if adds(self.norm2, x, attended):
                y, x = added(self.norm2, x, attended)
                return x + self._ff_block(y)
            x = x + attended
            return x + self._ff_block(self.norm2(x))
        x = normed(self.norm1, x, self._sa_block(x, *masks))
        return normed(self.norm2, x, self._ff_block(x))  # type: ignore[no-any-return]

    def _ff_block(self, x: Tensor) -> Tensor:
        layer, act = self.linear1, {TF.relu: "relu", TF.gelu: "gelu"}.get(self.activation)
        if act and type(layer) in LINEARS and plain(layer) and biased(layer, x, self.backend):
            x = linear_layer(x, layer.weight, None, self.backend)
            x = F.bias_act(x, layer.bias, act, backend=self.backend)
            return self.dropout2(self.linear2(self.dropout(x)))
        x = layer(x)
        if self.activation is TF.relu:
            x = F.relu(x, backend=self.backend)
        elif self.activation is TF.gelu:
            x = F.gelu(x, backend=self.backend)
        else:
            x = self.activation(x)
        return self.dropout2(self.linear2(self.dropout(x)))
