"""Attention as modules: the encoder's layer, those that torch lacks, copies and replacement."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pydl
import pydl.nn as P
from tests.twins import E, H, L, N, S, backends, flowed, hiding, padding, pair, random, same


def layer(**kwargs: Any) -> tuple[Any, Any]:
    return pair("TransformerEncoderLayer", E, H, 20, **{"dropout": 0.0, **kwargs})


LAYERS: dict[str, Callable[[], dict]] = {
    "post": lambda: {},
    "pre": lambda: {"norm_first": True, "activation": "gelu"},
    "first": lambda: {"batch_first": True, "activation": nn.GELU()},
    "callable": lambda: {"batch_first": True, "activation": torch.tanh, "bias": False},
    "pre first": lambda: {"norm_first": True, "batch_first": True, "layer_norm_eps": 0.1},
}


@backends
@pytest.mark.parametrize("kind", LAYERS)
def test_encoder_layer(kind: str, asked: str | None) -> None:
    ours, theirs = layer(**LAYERS[kind]())
    ours.backend = asked
    assert ours.self_attn.backend == ours.norm2.backend == asked
    x = random(S, N, E)
    given = x.transpose(0, 1) if ours.self_attn.batch_first else x
    causal = torch.ones(S, S, dtype=torch.bool).triu(1)
    for masks in (
        {}, {"src_mask": causal, "is_causal": True}, {"src_key_padding_mask": padding(False)},
        {"src_mask": causal, "src_key_padding_mask": torch.zeros(N, S, dtype=torch.bool)},
    ):  # fmt: skip
        same(*(flowed(m, [x], m(given, **masks)) for m in (ours.train(), theirs.train())))
        with torch.no_grad():
            same(ours.eval()(given, **masks), theirs.eval()(given, **masks))
    same(ours(x[:, 0]), theirs(x[:, 0]))


def test_encoder_layer_draws_torchs_parameters() -> None:
    made = []
    for package in (P, nn):
        torch.manual_seed(3)
        made.append(package.TransformerEncoderLayer(E, H, 20).state_dict())
    same(*made)


@backends
def test_encoder_layer_drops(asked: str | None) -> None:
    ours, _ = layer(dropout=0.5)
    ours.backend = asked
    x = random(S, N, E, grad=False)
    assert not torch.equal(ours(x), ours(x))
    same(ours.eval()(x), ours(x))


@backends
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_of_sequences_of_different_lengths(asked: str | None) -> None:
    """torch.nn.TransformerEncoder hands them on as a nested tensor in evaluation."""
    torch.manual_seed(0)
    plain = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(E, H, 20, batch_first=True), 2, mask_check=False
    ).eval()
    fused = copy.deepcopy(plain)
    pydl.replace(fused, backend=asked)
    x = torch.randn(N, S, E)
    hidden = torch.arange(S) >= torch.tensor([S, 4, 2])[:, None]
    with torch.no_grad():
        got, want = (m(x, src_key_padding_mask=hidden) for m in (fused, plain))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    fused.train()
    if asked == "cpu":
        nested = torch.nested.as_nested_tensor([torch.randn(3, E)])
        with pytest.raises(RuntimeError, match="masks"):
            fused.layers[0](nested, hidden)


ALL: dict[str, Callable[[], tuple[nn.Module, nn.Module | None, tuple]]] = {
    "multihead": lambda: (*pair("MultiheadAttention", E, H, kdim=6),
                          (random(L, N, E), random(S, N, 6), random(S, N, E))),
    "encoder": lambda: (*layer(), (random(S, N, E),)),
    "dot": lambda: (P.ScaledDotProductAttention(is_causal=True, window=3, softcap=2.0), None,
                    tuple(random(2, H, n, 3) for n in (L, S, S))),
    "local": lambda: (P.LocalAttention((2, 1), H, dtype=torch.float64), None,
                      tuple(random(2, H, S, 3) for _ in range(3))),
    "additive": lambda: (P.AdditiveAttention((3, 4), 5, dtype=torch.float64), None,
                         (random(2, L, 3), random(2, S, 4), random(2, S, 6))),
}  # fmt: skip


@pytest.mark.parametrize("kind", ALL)
def test_copies_and_classes(kind: str) -> None:
    module, theirs, given = ALL[kind]()
    if theirs is not None:
        assert isinstance(module, type(theirs)) and repr(module) == repr(theirs)
        assert list(module.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(module.state_dict())
    module.backend = "reference"
    for made in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(made) is type(module) and repr(made) == repr(module)
        assert made.backend == "reference"
        same(made(*given), module(*given))
    module.backend = "nobody"
    with pytest.raises(ValueError, match="backend is 'nobody'"):
        module(*given)


@pytest.mark.parametrize("kind", ALL)
@backends
def test_compiles(kind: str, asked: str | None) -> None:
    module, _, given = ALL[kind]()
    module.backend = asked
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    kwargs = {"need_weights": False} if kind == "multihead" else {}
    same(
        flowed(module, list(given), compiled(*given, **kwargs)),
        flowed(module, list(given), module(*given, **kwargs)),
    )


@backends
def test_dot_product_module(asked: str | None) -> None:
    module = P.ScaledDotProductAttention(0.5, scale=0.3, enable_gqa=True)
    module.backend = asked
    q, k, v = random(2, 4, L, 3), random(2, 2, S, 3), random(2, 2, S, 6)
    mask = hiding(L, S)
    assert not torch.equal(module(q, k, v, mask), module(q, k, v, mask))
    want = nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    same(module.eval()(q, k, v, mask), want)
    assert repr(module) == "ScaledDotProductAttention(dropout_p=0.5, scale=0.3, enable_gqa=True)"
    for bad in ({"dropout_p": 2.0}, {"window": 2}, {"causal_alignment": "left"}):
        with pytest.raises(ValueError, match="ScaledDotProductAttention"):
            P.ScaledDotProductAttention(**bad)


@backends
def test_local_attention_module(asked: str | None) -> None:
    """With a bias that is learnt, against a mask and a softmax."""
    module = P.LocalAttention(3, H, causal=True, scale=0.4, dtype=torch.float64)
    module.backend = asked
    assert module.bias is not None and module.bias.shape == (H, 2)
    nn.init.normal_(module.bias)
    leaves = [random(2, H, S, 3) for _ in range(3)]
    q, k, v = leaves
    hidden = torch.arange(S) >= torch.tensor([S, 5])[:, None]
    scores = q @ k.transpose(-1, -2) * 0.4
    offset = torch.arange(S) - torch.arange(S)[:, None] + 1
    seen = (offset >= 0) & (offset <= 1) & ~hidden[:, None, None]
    scores = scores + module.bias[:, offset.clamp(0, 1)]
    empty = ~seen.any(-1, keepdim=True)
    weights = scores.masked_fill(~seen, -torch.inf).masked_fill(empty, 0).softmax(-1)
    want = weights.masked_fill(empty, 0) @ v
    same(flowed(module, leaves, module(q, k, v, hidden)), flowed(module, leaves, want))
    assert repr(module) == f"LocalAttention(window_size=3, heads={H}, causal=True, scale=0.4)"
    assert P.LocalAttention(3).bias is None and repr(P.LocalAttention(3)).endswith("size=3)")
    same(P.LocalAttention((1, 0), scale=0.4)(q, k, v), P.LocalAttention(3, causal=True, scale=0.4)(
        q, k, v))  # fmt: skip


def test_local_attention_module_errors() -> None:
    for args, kwargs in (
        ((4,), {}), ((3,), {"dropout_p": -1.0}), ((3,), {"dilation": 0}), (((-1, 0), 2), {}),
        ((3, 0), {}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="LocalAttention"):
            P.LocalAttention(*args, **kwargs)


class Tied(nn.Module):
    """Layers that share a parameter, and one that stands twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.TransformerEncoderLayer(E, H, 20, 0.0, batch_first=True)
        self.second = nn.TransformerEncoderLayer(E, H, 20, 0.0, norm_first=True, batch_first=True)
        self.second.self_attn.in_proj_weight = self.first.self_attn.in_proj_weight
        self.cross = nn.MultiheadAttention(E, H, batch_first=True)
        self.again = self.cross

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        x = x + self.cross(x, x, x, need_weights=False)[0]
        return self.again(x, x, x)[0]


@backends
def test_replace(asked: str | None) -> None:
    torch.manual_seed(0)
    plain = Tied().double()
    fused = copy.deepcopy(plain)
    parameters, before = list(fused.parameters()), list(fused.modules())
    report = pydl.replace(fused, backend=asked)
    made = [one.new for one in report.replaced]
    assert made.count("pydl.nn.TransformerEncoderLayer") == 2
    assert made.count("pydl.nn.MultiheadAttention") == 3 and made.count("pydl.nn.LayerNorm") == 4
    assert fused.cross is fused.again and type(fused.first.self_attn) is P.MultiheadAttention
    assert fused.first.self_attn.in_proj_weight is fused.second.self_attn.in_proj_weight
    assert all(a is b for a, b in zip(fused.parameters(), parameters, strict=True))
    assert fused.first.backend == fused.first.norm1.backend == asked
    x = random(N, S, E)
    same(*(flowed(m, [x], m(x)) for m in (fused, plain)))
    with torch.no_grad():
        same(fused.eval()(x), plain.eval()(x))
    report.undo()
    assert all(a is b for a, b in zip(fused.modules(), before, strict=True))
    assert "backend" not in vars(fused.first)


def test_replace_leaves_the_backend_of_parts_that_are_ours() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(E, H))
    pydl.replace(model, include=nn.LayerNorm)
    pydl.replace(model, backend="cpu")
    assert model[0].backend == "cpu" and model[0].norm1.backend is None
