"""Calls of attention at its edges: shapes, masks, other devices, and what errors say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

import pydl.nn as P
from pydl import functional as F

WAYS = [None, "torch", "reference", "cpu"]


def _qkv(*shape: int, keys: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    s = shape[-2] if keys is None else keys
    of = (shape, (*shape[:-2], s, shape[-1]), (*shape[:-2], s, shape[-1]))
    q, k, v = (torch.randn(one, generator=draw) for one in of)
    return q, k, v


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize(("rows", "keys"), [(5, 0), (0, 5), (0, 0)])
def test_nothing_in_five_dimensions(rows: int, keys: int, by: str | None) -> None:
    q, k, v = _qkv(2, 3, 4, rows, 8, keys=keys)
    for named in ({}, {"softcap": 2.0}):
        out = F.scaled_dot_product_attention(q, k, v, backend=by, **named)
        assert torch.equal(out, torch.zeros(2, 3, 4, rows, 8))
        out += 1  # no element stands for several


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize(
    ("shapes", "gqa"),
    [
        (((3,), (2, 3), (2, 3)), False), (((2, 3), (), (3,)), False), (((), (2, 3), (1, 1)), False),
        (((2, 2, 3), (2, 3), (1, 1, 3)), False), (((4,), (2, 2), (2, 2)), True),
        (((2, 6), (2, 2), (2, 3)), True), (((2, 6), (1,), (2, 6)), True),
        (((2, 0), (2, 2), (2, 2)), True),
    ],
)  # fmt: skip
def test_leading_dimensions(shapes: tuple, gqa: bool, by: str | None) -> None:
    """As many as there are, which broadcast; keys of fewer heads than queries, and than values."""
    draw = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(*lead, n, 8, generator=draw, dtype=torch.float64, requires_grad=True)
        for lead, n in zip(shapes, (5, 7, 7), strict=True)
    ]
    results = []
    for call, named in ((F.scaled_dot_product_attention, {"backend": by}),
                        (TF.scaled_dot_product_attention, {})):  # fmt: skip
        out = call(*leaves, enable_gqa=gqa, **named)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("by", WAYS)
def test_masks_of_few_dimensions(by: str | None) -> None:
    q, k, v = _qkv(1, 2, 5, 8, keys=7)
    for mask in (torch.arange(7) > 2, torch.arange(7.0), torch.tensor(True), torch.tensor(0.5)):
        out = F.scaled_dot_product_attention(q, k, v, mask, backend=by)
        wanted = TF.scaled_dot_product_attention(q, k, v, mask.expand(5, 7))
        torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_summed_in_fp32(dtype: torch.dtype, by: str | None) -> None:
    """Also of what PyTorch has no call for, with masks and biases in fp32."""
    q, k, v = (t.to(dtype) for t in _qkv(1, 2, 30, 16))
    mask = torch.randn(30, 30, generator=torch.Generator().manual_seed(1))
    named: dict[str, Any] = {"softcap": 3.0, "window": (9, 3)}
    out, lse = F.scaled_dot_product_attention(q, k, v, mask, return_lse=True, backend=by, **named)
    assert out.dtype == dtype and lse.dtype == torch.float32
    wide = (q.double(), k.double(), v.double(), mask.double())
    want, sums = F.scaled_dot_product_attention(
        *wide, return_lse=True, backend="reference", **named
    )
    torch.testing.assert_close(lse.double(), sums, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=1e-2)
    bias = torch.randn(2, 13, generator=torch.Generator().manual_seed(2))
    near = F.local_attention(q, k, v, (9, 3), bias=bias, backend=by)
    want = F.local_attention(*wide[:3], (9, 3), bias=bias.double(), backend="reference")
    torch.testing.assert_close(near.double(), want, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("by", WAYS)
def test_local_attention_with_fewer_heads_of_keys(by: str | None) -> None:
    q, k, v = _qkv(2, 4, 20, 8)
    out = F.local_attention(q, k[:, :2], v[:, :2], 5, backend=by)
    twice = (t[:, :2].repeat_interleave(2, 1) for t in (k, v))
    torch.testing.assert_close(out, F.local_attention(q, *twice, 5, backend="reference"))


def test_windows_store_no_scores() -> None:
    """The automatic choice takes kernels for what PyTorch would store whole."""
    q, k, v = _qkv(1, 1, 8, 16, keys=1 << 18)
    named: dict[str, Any] = {"window": (100, 0), "causal_alignment": "bottom_right"}
    with torch.profiler.profile(profile_memory=True) as profile:
        out = F.scaled_dot_product_attention(q, k, v, **named)
    most = max(e.self_cpu_memory_usage for e in profile.key_averages())
    assert most < 1 << 20
    last = (k[..., -300:, :], v[..., -300:, :])
    wanted = F.scaled_dot_product_attention(q, *last, **named, backend="reference")
    torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("by", [None, "cpu"])
def test_errors(by: str | None) -> None:
    q, k, v = _qkv(1, 2, 6, 8)
    sdpa, local = F.scaled_dot_product_attention, F.local_attention
    meta = torch.zeros(1, 6, dtype=torch.bool, device="meta")
    seeds = (torch.ones(3, dtype=torch.int64), torch.ones(2), torch.ones(2).to("meta").long(), 7)
    calls: list[tuple[Any, tuple, dict, str]] = [
        (sdpa, (), {"softcap": -1.0}, "softcap is -1.0, wants a positive number"),
        (sdpa, (), {"softcap": float("nan")}, "softcap is nan, wants a positive number"),
        (sdpa, (), {"softcap": float("inf")}, "softcap is inf, wants a positive number"),
        (sdpa, (None, -1.0), {}, "dropout_p is -1.0"),
        *((sdpa, (), {"window": w}, "the window is .*, wants an odd total width")
          for w in ((1.5, 2), (1,), 3.0, (None, 3), (10**20, 1), "3", 4)),
        *((sdpa, (None, 0.5), {"seed": s}, "seed is .*, wants two int64 values") for s in seeds),
        (local, (None,), {}, "the window is None, wants a total width"),
        (local, (3,), {"dilation": 1.5}, "dilation is 1.5, wants a whole number"),
        (local, (3,), {"key_padding_mask": meta}, r"key_padding_mask is torch.bool .* on meta"),
    ]  # fmt: skip
    for call, args, named, message in calls:
        with pytest.raises((RuntimeError, ValueError), match=f"pydl: .*_attention: {message}"):
            call(q, k, v, *args, **named, backend=by)
    for call, args, name in (
        (sdpa, (None, k, v), "query is a NoneType"), (sdpa, (q, k, v, [1]), "attn_mask is a list"),
        (local, (q, [1], v, 3), "key is a list"),
        (F.varlen_attention, (q, k, 1.0, None, None, 1, 1), "value is a float"),
        (F.additive_attention, (q, k, v, 1, k, v), "w_q is a int"),
        (F.gaussian_attention, (q, k, None, q), "values is a NoneType"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=f"pydl: {call.__name__}: {name}, wants a Tensor"):
            call(*args, backend=by)
    for keys in (0, 4):
        with pytest.raises(RuntimeError, match=r"_attention: .*heads that the keys' heads divide"):
            sdpa(q, *[k[:, :1].repeat(1, keys, 1, 1)] * 2, enable_gqa=True, window=3, backend=by)
    with pytest.raises(RuntimeError, match=r"_attention: query .*heads that broadcast"):
        sdpa(torch.ones(1, 4, 6, 8), torch.ones(1, 3, 6, 8), torch.ones(1, 3, 6, 8), softcap=1.0,
             backend=by)  # fmt: skip


@pytest.mark.parametrize("by", [None, "cpu"])
def test_modules_compile_for_any_batch(by: str | None) -> None:
    attention = P.MultiheadAttention(16, 2, batch_first=True)
    layer = P.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    attention.backend = layer.backend = by
    torch._dynamo.reset()

    def run(x: Tensor) -> Tensor:
        return layer(attention(x, x, x, need_weights=False)[0])

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    for batch, length in ((2, 5), (2, 7), (3, 8), (4, 9)):
        x = torch.randn(batch, length, 16)
        torch.testing.assert_close(compiled(x), run(x))
    torch._dynamo.reset()


def test_local_attention_compiles_for_any_size() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(F.local_attention, backend="eager", fullgraph=True, dynamic=True)
    for heads in (2, 4):
        q, k, v = _qkv(2, 4, 13, 8)
        given = (q, k[:, :heads], v[:, :heads], (2, 1))
        torch.testing.assert_close(compiled(*given), F.local_attention(*given))
    torch._dynamo.reset()
