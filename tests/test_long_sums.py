"""Attention over many queries and keys, whose long sums are as near as torch's, and over none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pydl import functional as P


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_as_near_as_torchs(causal: bool) -> None:
    """Gradients of early keys are sums over all 2,048 queries."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, 2, 2048, 64, generator=generator) for _ in range(4)]

    def flow(function: object, dtype: torch.dtype, **more: str) -> list[Tensor]:
        q, k, v, dout = (t.to(dtype) for t in drawn)
        given = [t.requires_grad_() for t in (q, k, v)]
        out = function(*given, is_causal=causal, **more)  # type: ignore[operator]
        return [out.detach(), *torch.autograd.grad(out, given, dout)]

    want = flow(F.scaled_dot_product_attention, torch.float64)
    native = flow(F.scaled_dot_product_attention, torch.float32)
    ours = flow(P.scaled_dot_product_attention, torch.float32, backend="cpu")
    for name, exact, theirs, got in zip(("out", "dq", "dk", "dv"), want, native, ours, strict=True):
        error, allowed = ((one - exact).square().mean().sqrt() for one in (got, theirs))
        assert error <= 1.25 * allowed, (name, error / allowed)


def test_no_batch_has_gradients(backend: str) -> None:
    """Of what all of a batch share: zeros, and not what the memory held."""
    for _ in range(5):
        held = [torch.full((n,), 7.0) for n in (3, 25) for _ in range(50)]
        del held
        q, k, v = (torch.randn(0, 1, 5, 8) for _ in range(3))
        bias, mask = (torch.randn(s).requires_grad_() for s in ((1, 3), (1, 1, 5, 5)))
        P.local_attention(q, k, v, 3, bias=bias, backend=backend).sum().backward()
        P.scaled_dot_product_attention(q, k, v, mask, backend=backend).sum().backward()
        for grad in (bias.grad, mask.grad):
            assert grad is not None and not grad.any()
