"""Attention as modules: twins of torch.nn's, and those that torch lacks."""

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

BACKENDS: list[str | None] = [None, "reference", "cpu"]
EXACT = {"rtol": 1e-9, "atol": 1e-9}
N, L, S, E, H = 3, 5, 7, 12, 4
backends = pytest.mark.parametrize("asked", BACKENDS)


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, **EXACT)


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """(ours, torch's), of equal and not trivial parameters."""
    ours, theirs = (
        getattr(package, name)(*args, dtype=torch.float64, **kwargs) for package in (P, nn)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.5)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def random(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=grad)


def flowed(module: nn.Module, leaves: list[Tensor], outs: Any) -> list[Tensor | None]:
    """Outputs and the gradients of inputs and parameters."""
    outs = [out for out in (outs if isinstance(outs, tuple) else (outs,)) if out is not None]
    torch.manual_seed(5)
    loss = sum((out * torch.randn(out.shape, dtype=out.dtype)).sum() for out in outs)
    wanted = [*leaves, *module.parameters()]
    return [*outs, *torch.autograd.grad(loss, wanted, allow_unused=True)]


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


def padding(numbers: bool) -> Tensor:
    """One key hidden, or two, or numbers to add."""
    hidden = torch.zeros(N, S, dtype=torch.bool)
    hidden[1, 4:] = hidden[2, 0] = True
    return random(N, S, grad=False).masked_fill(hidden, -torch.inf) if numbers else hidden


def hiding(*shape: int) -> Tensor:
    torch.manual_seed(7)
    hidden = torch.rand(shape) > 0.6
    hidden[..., 3] = False
    return hidden


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
    if kind == "additive" and asked == "cpu":
        pytest.skip("additive attention has no kernels")
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
