"""The table's row of linear attention."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from pydl.ops.attention_rows import _four, _qkv
from pydl.ops.linear import linear_attention
from pydl.ops.samples import bytes_of, head_shapes
from pydl.table import LAYOUTS, Case, Cost, Make, Op, register

# The kernels' chunk of the sequence, which the floor counts scores of.
_CHUNK = 64


def _plain(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
    """The definition, by the matrix of all scores."""
    return linear_attention(query, key, value, **named, backend="reference")


def _native(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
    """What torch does it with: products of whole sequences or of chunks."""
    return linear_attention(query, key, value, **named, backend="torch")


def _samples(make: Make) -> Iterator[Case]:
    causal = {"causal": True}
    yield Case("2x3x5x9", _qkv(make, 2, 3, 5, 9, keys=7))
    yield Case("values of 3", _qkv(make, 2, 3, 5, 9, keys=7, values=3))
    yield Case("one", _qkv(make, 1, 1, 1, 1))
    yield Case("one, causal", _qkv(make, 1, 1, 1, 1), causal)
    yield Case("few, causal", _qkv(make, 1, 2, 3, 2), causal)
    yield Case("few, not normalised", _qkv(make, 1, 2, 2, 2), {"normalize": False})
    for layout in LAYOUTS[1:]:
        yield Case(f"{layout} 2x3x17x16", _qkv(make, 2, 3, 17, 16, layout=layout), causal)
    heads_last = [t.transpose(1, 2) for t in _qkv(make, 2, 19, 3, 16)]
    yield Case("heads last", tuple(heads_last))
    yield Case("no keys", _qkv(make, 2, 2, 3, 8, keys=0))
    yield Case("no queries", _qkv(make, 2, 2, 0, 8, keys=5))
    yield Case("chunks", _qkv(make, 1, 2, 200, 40, keys=270, values=72))
    yield Case("chunks, causal", _qkv(make, 1, 2, 200, 40, values=72), causal)
    yield Case("many heads, causal", _qkv(make, 2, 9, 70, 16), causal)
    yield Case("wide", _qkv(make, 1, 1, 40, 200, keys=70, values=130))
    yield Case("wide, causal", _qkv(make, 1, 1, 70, 200, values=130), causal)
    q, _, _ = _qkv(make, 2, 6, 33, 16)
    _, k, v = _qkv(make, 2, 2, 33, 16, values=24)
    yield Case("grouped heads", (q, k, v))
    yield Case("grouped heads, causal", (q, k, v), {"causal": True, "decay": 0.9})
    for name in ("relu", "softmax"):
        yield Case(name, _qkv(make, 1, 2, 21, 16, keys=35), {"feature_map": name, "eps": 1e-3})
        yield Case(f"{name}, causal", _qkv(make, 1, 2, 21, 16), {**causal, "feature_map": name,
                   "normalize": False})  # fmt: skip
    plain = {"feature_map": "identity", "normalize": False, "scale": 0.25}
    yield Case("identity", _qkv(make, 1, 2, 30, 16), plain)
    yield Case("identity, causal", _qkv(make, 1, 2, 75, 16), {**plain, "causal": True})
    yield Case("a function", _qkv(make, 1, 2, 21, 8), {**causal, "feature_map": torch.exp})
    yield Case("retention", _qkv(make, 1, 2, 150, 16), {**plain, "causal": True, "decay": 0.96})
    yield Case("scale", _qkv(make, 2, 2, 30, 8), {"scale": 0.3, "eps": 0.5})
    hidden = torch.zeros(2, 35, dtype=torch.bool, device=make.device)
    hidden[0, 20:] = True
    hidden[1] = True
    yield Case("padding", _qkv(make, 2, 3, 21, 16, keys=35), {"key_padding_mask": hidden})
    yield Case("padding, causal", _qkv(make, 2, 3, 35, 16), {**causal, "key_padding_mask": hidden})
    nothing = {"key_padding_mask": hidden, "eps": 0.0}
    yield Case("nothing seen, eps 0", _qkv(make, 2, 3, 21, 16, keys=35), nothing)


def _bench(make: Make, shape: tuple[int, ...]) -> Case:
    shape = _four(shape)
    return Case("x".join(map(str, shape)), _qkv(make, *shape), {"causal": True})


def _cost(case: Case) -> Cost:
    q, k, v = case.args[:3]
    moved = sum(bytes_of(t) for t in (q, k, v))
    out = bytes_of(q) // max(1, q.shape[-1]) * v.shape[-1]
    rows, width, value_width = prod(q.shape[:3]), q.shape[3], v.shape[3]
    keys = q.shape[0] * q.shape[1] * k.shape[2]
    work = 2 * (rows + keys) * width * value_width
    if case.kwargs.get("causal"):
        work += rows * min(_CHUNK, q.shape[2]) * (width + value_width)
    return Cost(moved + out, 2 * (moved + out), work, 5 * work // 2)


register(
    Op(
        name="linear_attention",
        family="linear_attention",
        function=linear_attention,
        reference=_plain,
        native=_native,
        samples=_samples,
        bench=_bench,
        bench_shapes=((1, 8, 4096, 64), (2, 8, 1024, 64), (4, 8, 128, 64)),
        cost=_cost,
        autocast="lower",
        sized=head_shapes,
        variants={"full": lambda case: Case(case.label, case.args, {})},
    )
)
