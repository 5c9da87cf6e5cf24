"""Activations as modules: twins of `torch.nn`'s, and what torch lacks.

A twin has the constructor, attributes, `state_dict` and `repr` of the torch module that it
subclasses; only who computes differs. Every module here has an attribute `backend`, None for the
automatic choice; set it to say who computes: `module.backend = "triton"` (see `pydl.backends`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pydl import functional as F


class HasBackend:
    """What every module of pydl has. A class attribute, so that twins keep torch's constructors."""

    backend: str | None = None


class Sigmoid(HasBackend, nn.Sigmoid):
    """Logistic function, `1 / (1 + exp(-x))`; twin of `torch.nn.Sigmoid`.

    Shape: any, to the same.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.sigmoid(input, backend=self.backend)


class Tanh(HasBackend, nn.Tanh):
    """Hyperbolic tangent, `(exp(x) - exp(-x)) / (exp(x) + exp(-x))`; twin of `torch.nn.Tanh`.

    Shape: any, to the same.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.tanh(input, backend=self.backend)


class ReLU(HasBackend, nn.ReLU):
    """Rectified linear unit, `max(0, x)`; twin of `torch.nn.ReLU`.

    Args:
        inplace: Write the result over the input.

    Shape: any, to the same.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input, self.inplace, backend=self.backend)


class LeakyReLU(HasBackend, nn.LeakyReLU):
    """Leaky rectified linear unit, `x if x > 0 else negative_slope * x`; twin of
    `torch.nn.LeakyReLU`.

    Args:
        negative_slope: The slope where x <= 0.
        inplace: Write the result over the input.

    Shape: any, to the same.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.leaky_relu(input, self.negative_slope, self.inplace, backend=self.backend)


class PReLU(HasBackend, nn.PReLU):
    """Leaky rectified linear unit with a learnt slope, `x if x > 0 else weight * x`; twin of
    `torch.nn.PReLU`.

    Args:
        num_parameters: 1, or the number of channels.
        init: The slope to begin with.
        device: Where the slope lives.
        dtype: The slope's dtype.

    Shape: any, to the same; with a slope per channel the channels are dimension 1.

    Source: He et al. 2015, arXiv 1502.01852.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.prelu(input, self.weight, backend=self.backend)


class ELU(HasBackend, nn.ELU):
    """Exponential linear unit, `x if x > 0 else alpha * (exp(x) - 1)`; twin of `torch.nn.ELU`.

    Args:
        alpha: The negative of the limit at minus infinity.
        inplace: Write the result over the input.

    Shape: any, to the same.

    Source: Clevert et al. 2016, arXiv 1511.07289.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.elu(input, self.alpha, self.inplace, backend=self.backend)


class SELU(HasBackend, nn.SELU):
    """Scaled exponential linear unit, `1.0507 * elu(x, 1.6733)`; twin of `torch.nn.SELU`.

    Args:
        inplace: Write the result over the input.

    Shape: any, to the same.

    Source: Klambauer et al. 2017, arXiv 1706.02515.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.selu(input, self.inplace, backend=self.backend)


class GELU(HasBackend, nn.GELU):
    """Gaussian error linear unit, `x * Phi(x)`, Phi the normal distribution function; twin of
    `torch.nn.GELU`.

    Args:
        approximate: "none", or "tanh" for `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`.

    Shape: any, to the same.

    Source: Hendrycks and Gimpel 2016, arXiv 1606.08415.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, self.approximate, backend=self.backend)


class SiLU(HasBackend, nn.SiLU):
    """Sigmoid linear unit, `x * sigmoid(x)`; twin of `torch.nn.SiLU`.

    Args:
        inplace: Write the result over the input.

    Shape: any, to the same.

    Source: Elfwing et al. 2017, arXiv 1702.03118.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(input, self.inplace, backend=self.backend)


class Mish(HasBackend, nn.Mish):
    """Mish, `x * tanh(log(1 + exp(x)))`; twin of `torch.nn.Mish`.

    Args:
        inplace: Write the result over the input.

    Shape: any, to the same.

    Source: Misra 2019, arXiv 1908.08681.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.mish(input, self.inplace, backend=self.backend)


class Swish(HasBackend, nn.Module):
    """Swish, `x * sigmoid(beta * x)`, beta a number or learnt. torch has no such module.

    Args:
        beta: The number, or the learnt values to begin with.
        learnable: Learn it: `beta` becomes a parameter, and an entry of `state_dict`.
        num_parameters: How many are learnt: 1, or the number of channels.
        device: Where the parameter lives.
        dtype: The parameter's dtype.

    Shape: any, to the same; with one beta per channel the channels are dimension 1.

    Raises:
        ValueError: `num_parameters` is below 1, or above it where nothing is learnt.

    Source: Ramachandran et al. 2017, arXiv 1710.05941.
    """

    beta: float | nn.Parameter

    def __init__(
        self,
        beta: float = 1.0,
        learnable: bool = False,
        num_parameters: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_parameters < 1 or (num_parameters > 1 and not learnable):
            wanted = "1 or more" if learnable else "1 where learnable is False"
            raise ValueError(f"pydl: Swish: num_parameters is {num_parameters}, wants {wanted}")
        self.init = float(beta)
        self.num_parameters = num_parameters
        self.learnable = learnable
        if learnable:
            self.beta = nn.Parameter(torch.empty(num_parameters, device=device, dtype=dtype))
            self.reset_parameters()
        else:
            self.beta = self.init

    def reset_parameters(self) -> None:
        """Sets beta to what it began with."""
        if isinstance(self.beta, Tensor):
            nn.init.constant_(self.beta, self.init)

    def forward(self, input: Tensor) -> Tensor:
        return F.swish(input, self.beta, backend=self.backend)

    def extra_repr(self) -> str:
        more = f", learnable=True, num_parameters={self.num_parameters}" if self.learnable else ""
        return f"beta={self.init}{more}"
