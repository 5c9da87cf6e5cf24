"""The twin of torch.nn.MultiheadAttention: every argument, on every backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import pydl.nn as P
from tests.twins import E, H, L, N, S, backends, flowed, hiding, padding, pair, random, same

# Of the constructor, and the widths of key and value.
MAKES: dict[str, tuple[dict, int, int]] = {
    "packed": ({}, E, E),
    "no bias": ({"bias": False}, E, E),
    "first": ({"batch_first": True}, E, E),
    "apart": ({"kdim": 6, "vdim": 10}, 6, 10),
    "apart first": ({"kdim": 6, "batch_first": True, "bias": False}, 6, E),
    "appended": ({"add_bias_kv": True, "add_zero_attn": True}, E, E),
    "zero": ({"add_zero_attn": True, "kdim": 6, "vdim": 10}, 6, 10),
}


CALLS: dict[str, Callable[[], dict]] = {
    "nothing": lambda: {},
    "padding": lambda: {"key_padding_mask": padding(False)},
    "number padding": lambda: {"key_padding_mask": padding(True)},
    "mask": lambda: {"attn_mask": hiding(L, S)},
    "masks": lambda: {"attn_mask": hiding(N * H, L, S), "key_padding_mask": padding(False)},
    "numbers": lambda: {"attn_mask": random(N * H, L, S, grad=False)},
    "both numbers": lambda: {"attn_mask": random(L, S, grad=False),
                             "key_padding_mask": padding(True)},
    "mixed": lambda: {"attn_mask": random(L, S, grad=False), "key_padding_mask": padding(False)},
}  # fmt: skip


@backends
@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("weights", [False, True, None], ids=["none", "mean", "each"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("make", MAKES)
def test_multihead(make: str, call: str, weights: bool | None, asked: str | None) -> None:
    """Outputs, weights and every gradient, in training and in evaluation."""
    kwargs, kdim, vdim = MAKES[make]
    ours, theirs = pair("MultiheadAttention", E, H, **kwargs)
    ours.backend = asked
    leaves = [random(L, N, E), random(S, N, kdim), random(S, N, vdim)]
    given = [t.transpose(0, 1) if ours.batch_first else t for t in leaves]
    masks = {
        "need_weights": weights is not False, "average_attn_weights": bool(weights),
        **CALLS[call](),
    }  # fmt: skip
    got, want = (flowed(m, leaves, m(*given, **masks)) for m in (ours, theirs))
    assert len(got) == 1 + bool(masks["need_weights"]) + 3 + len(list(ours.parameters()))
    same(got, want)
    with torch.no_grad():
        same(ours.eval()(*given, **masks), theirs.eval()(*given, **masks))


@backends
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("source", ["self", "keys are values"])
def test_multihead_of_fewer_sources(source: str, first: bool, asked: str | None) -> None:
    ours, theirs = pair("MultiheadAttention", E, H, batch_first=first)
    ours.backend = asked
    q, k = random(L, N, E), random(L, N, E)
    given, leaves = ((q, q, q), [q]) if source == "self" else ((q, k, k), [q, k])
    same(*(flowed(m, leaves, m(*given, need_weights=False)) for m in (ours, theirs)))
    with torch.no_grad():
        same(ours.eval()(*given), theirs.eval()(*given))


@backends
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_multihead_without_a_batch(first: bool, weights: bool, asked: str | None) -> None:
    ours, theirs = pair("MultiheadAttention", E, H, batch_first=first, add_bias_kv=True)
    ours.backend = asked
    leaves = [random(L, E), random(S, E), random(S, E)]
    for masks in (
        {}, {"attn_mask": hiding(H, L, S), "key_padding_mask": padding(False)[1]},
    ):  # fmt: skip
        results = [
            flowed(m, leaves, m(*leaves, need_weights=weights, **masks)) for m in (ours, theirs)
        ]
        same(*results)


@backends
@pytest.mark.parametrize("make", ["packed", "appended"])
@pytest.mark.parametrize("pad", [False, True])
def test_multihead_causal(make: str, pad: bool, asked: str | None) -> None:
    """The hint, with what it is a hint of; for appended keys as torch takes it."""
    ours, theirs = pair("MultiheadAttention", E, H, **MAKES[make][0])
    ours.backend = asked
    x = random(S, N, E)
    causal = torch.ones(S, S, dtype=torch.bool).triu(1)
    more = {"key_padding_mask": torch.zeros(N, S, dtype=torch.bool)} if pad else {}
    for weights in (False, True):
        masks = {"attn_mask": causal, "is_causal": True, "need_weights": weights, **more}
        same(*(flowed(m, [x], m(x, x, x, **masks)) for m in (ours, theirs)))


@pytest.mark.parametrize("asked", ["reference", "cpu"])
def test_multihead_of_queries_that_see_nothing(asked: str) -> None:
    """Where torch's weights are NaN ours are 0, with no gradient through them."""
    ours, theirs = pair("MultiheadAttention", E, H)
    ours.backend = asked
    mask = torch.zeros(L, S, dtype=torch.bool)
    mask[2] = True
    leaves = [random(L, N, E), random(S, N, E), random(S, N, E)]
    out, weights = ours(*leaves, attn_mask=mask)
    same(weights[:, 2], torch.zeros_like(weights[:, 2]))
    same(out[2], theirs.out_proj.bias.expand_as(out[2]))
    grads = flowed(ours, leaves, (out, weights))
    assert all(g is None or g.isfinite().all() for g in grads)
    same(ours(*leaves, attn_mask=mask, need_weights=False)[0], out)


@backends
@pytest.mark.parametrize("weights", [False, True])
def test_multihead_drops(weights: bool, asked: str | None) -> None:
    """As many as asked for, in training only, the same again for the same seed."""
    ours, _ = pair("MultiheadAttention", E, 1, dropout=0.25, bias=False)
    ours.backend = asked
    with torch.no_grad():
        for parameter in (ours.in_proj_weight[2 * E :], ours.out_proj.weight):
            parameter.copy_(torch.eye(E))
        ours.in_proj_weight[: 2 * E] = 0
    length = 400
    value = torch.zeros(length, 1, E, dtype=torch.float64)
    value[:, 0, 0] = 1
    torch.manual_seed(1)
    one, seen = ours(value, value, value, need_weights=weights)
    torch.manual_seed(1)
    same(ours(value, value, value, need_weights=weights)[0], one)
    # Each row is a mean of `length` weights that are 0 or 4 / 3.
    assert abs(one[..., 0].mean() - 1) < 0.01 and 0.01 < one[..., 0].std() < 0.06
    if weights:
        assert abs((seen == 0).double().mean() - 0.25) < 0.01
    out = ours.eval()(value, value, value, need_weights=weights)[0]
    same(out[..., 0], torch.ones(length, 1, dtype=torch.float64))


BAD: dict[str, tuple[tuple, dict]] = {
    "dimensions": (((L, N, E, 1), (S, N, E), (S, N, E)), {}),
    "a batch of some": (((L, N, E), (S, E), (S, E)), {}),
    "width": (((L, N, E + 1), (S, N, E), (S, N, E)), {}),
    "key width": (((L, N, E), (S, N, E + 1), (S, N, E + 1)), {}),
    "values": (((L, N, E), (S, N, E), (S + 1, N, E)), {}),
    "batches": (((L, N, E), (S, N + 1, E), (S, N + 1, E)), {}),
    "mask shape": (((L, N, E), (S, N, E), (S, N, E)), {"attn_mask": torch.ones(L, S + 1)}),
    "mask batch": (((L, N, E), (S, N, E), (S, N, E)), {"attn_mask": torch.ones(N, L, S)}),
    "mask dimensions": (((L, N, E), (S, N, E), (S, N, E)), {"attn_mask": torch.ones(S)}),
    "mask kind": (((L, N, E), (S, N, E), (S, N, E)), {"attn_mask": torch.ones(L, S).int()}),
    "padding": (((L, N, E), (S, N, E), (S, N, E)), {"key_padding_mask": torch.ones(N, S + 1)}),
    "padding kind": (((L, N, E), (S, N, E), (S, N, E)),
                     {"key_padding_mask": torch.ones(N, S).int()}),
    "hint": (((L, N, E), (S, N, E), (S, N, E)), {"is_causal": True}),
    "unbatched mask": (((L, E), (S, E), (S, E)), {"attn_mask": torch.ones(H + 1, L, S)}),
    "unbatched padding": (((L, E), (S, E), (S, E)), {"key_padding_mask": torch.ones(1, S)}),
}  # fmt: skip


@backends
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("bad", BAD)
def test_multihead_errors_are_torchs(bad: str, weights: bool, asked: str | None) -> None:
    shapes, masks = BAD[bad]
    kinds = []
    for module in (P.MultiheadAttention(E, H), nn.MultiheadAttention(E, H)):
        if isinstance(module, P.MultiheadAttention):
            module.backend = asked
        with pytest.raises((AssertionError, RuntimeError)) as caught:
            module(*(torch.randn(shape) for shape in shapes), need_weights=weights, **masks)
        kinds.append(caught.type)
    assert kinds[0] is kinds[1]


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", [False, True])
def test_multihead_under_autocast(weights: bool, dtype: torch.dtype, asked: str | None) -> None:
    ours, theirs = pair("MultiheadAttention", 32, H, add_bias_kv=True)
    ours, theirs = ours.float(), theirs.float()
    ours.backend = asked
    q, k = torch.randn(9, 2, 32), torch.randn(11, 2, 32)
    mask = torch.randn(9, 11)
    with torch.autocast("cpu", dtype):
        got, want = (m(q, k, k, need_weights=weights, attn_mask=mask) for m in (ours, theirs))
    assert [None if t is None else t.dtype for t in got] == [
        None if t is None else t.dtype for t in want
    ]
    for a, b in zip(got, want, strict=True):
        assert a is None or (a.float() - b.float()).abs().max() < 0.05 * b.float().abs().max()
