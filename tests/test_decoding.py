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


WINDOWS = [
    {"window": (300, 0), "causal_alignment": "bottom_right"},
    {"window": (0, 290)},
    {"window": (-1, 0)},
]


def _mask(form: str, keys: int, draw: torch.Generator) -> torch.Tensor | None:
    """Of two samples and six heads; "hidden": no key is seen by some, and by one in a part only."""
    if form == "none":
        return None
    if form == "one number":
        return torch.randn(2, 6, 1, 1, generator=draw)
    if form == "numbers":
        return torch.randn(6, 1, keys, generator=draw)
    mask = torch.rand(2, 1, 1, keys, generator=draw) > 0.5
    if form == "hidden":
        mask = mask.repeat(1, 6, 1, 1)
        mask[0, 1:4] = False
        mask[0, 2, :, 200] = True
    return mask


@pytest.mark.parametrize("form", ["none", "one number", "numbers", "truth", "hidden"])
def test_masks_and_windows(form: str, backend: str, parted: list[int]) -> None:
    """In parts as from the whole; what sees no key gives 0."""
    draw, device = torch.Generator().manual_seed(2), harness.device(backend)
    q = torch.randn(2, 6, 1, 16, generator=draw).to(device)
    k, v = (torch.randn(2, 2, 450, 16, generator=draw).to(device) for _ in "kv")
    mask = _mask(form, 450, draw)
    mask = None if mask is None else mask.to(device)
    for named in ({}, *WINDOWS):
        given = {"attn_mask": mask, "enable_gqa": True, "return_lse": True, **named}
        got = scaled_dot_product_attention(q, k, v, **given, backend=backend)
        wanted = scaled_dot_product_attention(q, k, v, **given, backend="reference")
        torch.testing.assert_close(got, wanted)
        if form == "hidden":
            assert got[0][0, 1].eq(0).all() and got[1][0, 1].eq(float("-inf")).all()
    assert parted[0] > 1 and parted[1] > 1 and parted[2] > 1 and parted[3] == 0

    if mask is not None and mask.is_floating_point():
        leaves = [t.clone().requires_grad_() for t in (q, k, v, mask)]
        for named in ({}, WINDOWS[0]):
            outs = [
                scaled_dot_product_attention(
                    *leaves[:3], leaves[3], enable_gqa=True, **named, backend=name
                )
                for name in (backend, "reference")
            ]
            grads = (torch.autograd.grad(out.square().sum(), leaves) for out in outs)
            torch.testing.assert_close(*grads)


def test_what_is_not_cut(backend: str, parted: list[int]) -> None:
    """Gradients, and caches whose heads lie apart, come from the whole."""
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
