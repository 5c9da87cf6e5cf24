"""One query a head, as when a model generates: keys in parts, heads of queries together."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pydl.functional import scaled_dot_product_attention
from pydl.ops import decoding
from pydl.table import judge
from tests import harness


@pytest.fixture
def parted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Parts of 128 keys; collects how many each call is cut into."""
    for device in decoding._PARTS:
        monkeypatch.setitem(decoding._PARTS, device, (100, 16))
    seen: list[int] = []
    cut = decoding._cut

    def watched(*args: object) -> object:
        found = cut(*args)
        seen.append(0 if found is None else found[0].shape[2])
        return found

    monkeypatch.setattr(decoding, "_cut", watched)
    return seen


@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_give_the_whole(
    dtype: torch.dtype, heads: tuple[int, int], backend: str, parted: list[int]
) -> None:
    """Output and logarithm pass the judge, from a cache that is longer than what it holds."""
    make = torch.Generator().manual_seed(1)
    device = harness.device(backend)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make).to(device, dtype)

    q = draw(2, heads[0], 1, 24)
    k, v = draw(2, heads[1], 640, 24)[:, :, :450], draw(2, heads[1], 640, 40)[:, :, :450]
    named = {"is_causal": True, "causal_alignment": "bottom_right", "enable_gqa": True}
    got, lse = scaled_dot_product_attention(q, k, v, return_lse=True, backend=backend, **named)
    assert parted == [4]  # 128, 128, 128 and 66 keys
    wanted, wanted_lse = scaled_dot_product_attention(
        *(t.double() for t in (q, k, v)), return_lse=True, backend="reference", **named
    )
    native = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    right, error, allowed = judge(got, wanted, native)
    assert right, f"error {error:.3g}, allowed {allowed:.3g}"
    assert got.shape == native.shape and got.stride() == native.stride()
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)


def test_what_is_not_cut(backend: str, parted: list[int]) -> None:
    """Gradients, and caches whose heads lie apart, come from the whole; masks do not come here."""
    device = harness.device(backend)
    q = torch.randn(2, 2, 1, 16, device=device, requires_grad=True)
    k = torch.randn(2, 3, 300, 16, device=device)[:, :2]
    out = scaled_dot_product_attention(q, k, k, backend=backend)
    (got,) = torch.autograd.grad(out.sum(), q)
    assert parted == [0]
    (wanted,) = torch.autograd.grad(F.scaled_dot_product_attention(q, k, k).sum(), q)
    torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        scaled_dot_product_attention(q, k, k, backend=backend)
    assert parted == [0, 0]
    mask = torch.rand(1, 300, device=device) > 0.5
    got = scaled_dot_product_attention(q, k, k, attn_mask=mask, backend=backend)
    assert parted == [0, 0]
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, k, attn_mask=mask))
