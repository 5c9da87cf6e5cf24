"""Normalisations as modules: twins of `torch.nn`'s."""

from __future__ import annotations

from torch import Tensor, nn

from pydl import functional as F
from pydl.nn.activation import HasBackend


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
