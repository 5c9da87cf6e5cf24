"""The linear layer as a module, twin of torch's."""

from __future__ import annotations

from torch import Tensor, nn

from pydl.nn.activation import HasBackend
from pydl.ops.product import linear_layer


class Linear(HasBackend, nn.Linear):
    """Linear layer, `x @ weight.T + bias`; twin of `torch.nn.Linear`.

    With the backends "cuda" and "triton" torch's product computes, which is cuBLAS's on a GPU.

    Args:
        in_features: The size of the last dimension.
        out_features: That of the result.
        bias: Learn a bias.
        device: Where the parameters live.
        dtype: Their dtype.

    Shape: (*, in_features) to (*, out_features).

    Raises:
        RuntimeError: shapes or dtypes do not fit.
    """

    def forward(self, input: Tensor) -> Tensor:
        return linear_layer(input, self.weight, self.bias, self.backend)
