"""Normalisations as modules: twins of `torch.nn`'s."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.overrides import has_torch_function_variadic

from pydl import functional as F
from pydl.nn.activation import HasBackend
from pydl.ops.philox import check_rate
from pydl.traced import as_node, proxied


class LayerNorm(HasBackend, nn.LayerNorm):
    """Layer normalisation, `(x - mean) / sqrt(var + eps) * weight + bias` over the last dimensions;
    twin of `torch.nn.LayerNorm`.

    Args:
        normalized_shape: The last dimensions, or the size of the last one.
        eps: Added to the variance.
        elementwise_affine: Learn a weight (and a bias).
        bias: Learn a bias with the weight.
        device: Where they live.
        dtype: Their dtype.

    Shape: (*, *normalized_shape), to the same.

    Source: Ba et al. 2016, arXiv 1607.06450.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, backend=self.backend
        )


class RMSNorm(HasBackend, nn.RMSNorm):
    """Root-mean-square normalisation, `x / sqrt(mean(x^2) + eps) * weight` over last dimensions;
    twin of `torch.nn.RMSNorm`.

    Args:
        normalized_shape: The last dimensions, or the size of the last one.
        eps: Added to the mean square; None for that of the dtype.
        elementwise_affine: Learn a weight.
        device: Where it lives.
        dtype: Its dtype.

    Shape: (*, *normalized_shape), to the same.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps, backend=self.backend)


class _Adding(HasBackend, nn.Module):
    """A normalisation of what the residual has become."""

    dropout_p: float

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout_p={self.dropout_p}"


class AddLayerNorm(_Adding, nn.LayerNorm):
    """Residual and layer normalisation in one pass: `(layer_norm(h), h)` of
    `h = residual + dropout(x)`.

    Called `y, residual = module(x, residual)`, where a block of a transformer has
    `residual = residual + dropout(x)` and `y = norm(residual)`. Parameters and `state_dict` are
    those of `torch.nn.LayerNorm`.

    Args:
        normalized_shape: As in `LayerNorm`, like the five that follow.
        eps: See `LayerNorm`.
        elementwise_affine: See `LayerNorm`.
        bias: See `LayerNorm`.
        device: See `LayerNorm`.
        dtype: See `LayerNorm`.
        dropout_p: The share of x that is dropped in training.

    Shape: (*, *normalized_shape) twice, to the same twice. The residual may be fp32 where x has 16
    bits.

    Raises:
        ValueError: `dropout_p` is not in [0, 1].
        RuntimeError: at the call, shapes, dtypes or devices do not fit.
    """

    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        dropout_p: float = 0.0,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.dropout_p = check_rate("AddLayerNorm", dropout_p)

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if has_torch_function_variadic(input, residual) and proxied(input, residual):
            return as_node(self, locals())
        return F.add_layer_norm(
            input, residual, self.normalized_shape, self.weight, self.bias, self.eps,
            self.dropout_p, self.training, backend=self.backend,
        )  # fmt: skip


class AddRMSNorm(_Adding, nn.RMSNorm):
    """Residual and RMS normalisation in one pass: `(rms_norm(h), h)` of
    `h = residual + dropout(x)`.

    Called like `AddLayerNorm`. Parameters and `state_dict` are those of `torch.nn.RMSNorm`.

    Args:
        normalized_shape: As in `RMSNorm`, like the four that follow.
        eps: See `RMSNorm`.
        elementwise_affine: See `RMSNorm`.
        device: See `RMSNorm`.
        dtype: See `RMSNorm`.
        dropout_p: The share of x that is dropped in training.

    Shape: (*, *normalized_shape) twice, to the same twice. The residual may be fp32 where x has 16
    bits.

    Raises:
        ValueError: `dropout_p` is not in [0, 1].
        RuntimeError: at the call, shapes, dtypes or devices do not fit.
    """

    def __init__(
        self,
        normalized_shape: Any,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        dropout_p: float = 0.0,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.dropout_p = check_rate("AddRMSNorm", dropout_p)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if has_torch_function_variadic(x, residual) and proxied(x, residual):
            return as_node(self, locals())
        return F.add_rms_norm(
            x, residual, self.normalized_shape, self.weight, self.eps, self.dropout_p,
            self.training, backend=self.backend,
        )  # fmt: skip
