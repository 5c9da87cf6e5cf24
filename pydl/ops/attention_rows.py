"""The table's rows of attention."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pydl.ops.dot_product import scaled_dot_product_attention
from pydl.ops.local_attention import local_attention
from pydl.ops.samples import bytes_of, head_shapes
from pydl.table import LAYOUTS, Case, Cost, Make, Op, register


def _qkv(make: Make, *shape: int, keys: int | None = None, values: int | None = None,
         layout: str = "contiguous") -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Scores of spread one, roughly."""
    *lead, n, width = shape
    s = n if keys is None else keys
    return (
        make(*lead, n, width, scale=1.0, layout=layout),
        make(*lead, s, width, scale=1.0, layout=layout),
        make(*lead, s, width if values is None else values, scale=1.0, layout=layout),
    )


def _plain(query: Tensor, key: Tensor, value: Tensor, *args: Any, **named: Any) -> Tensor:
    """The definition, in the dtype it is given."""
    return scaled_dot_product_attention(query, key, value, *args, **named, backend="reference")


def _native(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False, **named: Any,
) -> Tensor:  # fmt: skip
    if not named:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, **named,
        backend="torch",
    )  # fmt: skip


def _samples(make: Make) -> Iterator[Case]:
    seed = torch.tensor([987654321, 11], device=make.device)
    yield Case("2x37x53", (*_qkv(make, 7, 5, keys=9, values=3),))
    yield Case("one", _qkv(make, 1, 1))
    yield Case("3 dimensions", _qkv(make, 3, 11, 16, keys=13))
    yield Case("5 dimensions", _qkv(make, 2, 1, 3, 5, 8))
    for layout in LAYOUTS[1:]:
        yield Case(f"{layout} 2x3x17x16", _qkv(make, 2, 3, 17, 16, layout=layout))
    heads_last = [t.transpose(1, 2) for t in _qkv(make, 2, 19, 3, 16)]
    yield Case("heads last", tuple(heads_last))
    yield Case("no keys", _qkv(make, 2, 2, 3, 8, keys=0))
    yield Case("no queries", _qkv(make, 2, 2, 0, 8, keys=5))
    yield Case("one query", _qkv(make, 2, 3, 1, 64, keys=150))
    yield Case("tiles", _qkv(make, 1, 2, 200, 40, keys=270, values=72))
    yield Case("wide", _qkv(make, 1, 1, 40, 200, keys=70, values=130))
    yield Case("causal", (*_qkv(make, 2, 2, 130, 16), None, 0.0, True))
    yield Case("causal, scale", (*_qkv(make, 1, 2, 20, 16, keys=33), None, 0.0, True, 0.7))
    bottom = {"is_causal": True, "causal_alignment": "bottom_right"}
    yield Case("bottom", _qkv(make, 1, 2, 20, 16, keys=133), bottom)
    yield Case("bottom, few keys", _qkv(make, 1, 2, 30, 16, keys=21), bottom)
    yield Case("window", _qkv(make, 1, 2, 150, 16), {"window": 31})
    yield Case("window to the left", _qkv(make, 1, 2, 50, 16), {"window": (7, -1)})
    yield Case("softcap", _qkv(make, 1, 2, 30, 16), {"softcap": 1.5})
    q, _, _ = _qkv(make, 2, 6, 33, 16)
    _, k, v = _qkv(make, 2, 2, 33, 16, values=24)
    yield Case("grouped heads", (q, k, v, None, 0.0, False, None, True))
    for label, shape in (("mask", (21, 35)), ("mask of keys", (2, 1, 1, 35)), ("full mask",
                         (2, 3, 21, 35)), ("mask of queries", (3, 21, 1))):  # fmt: skip
        yield Case(label, (*_qkv(make, 2, 3, 21, 16, keys=35), make(*shape, scale=1.0)))
    hidden = torch.ones(2, 1, 21, 35, dtype=torch.bool, device=make.device)
    hidden[0, 0, :, 20:] = False
    hidden[1, 0, 3] = False
    yield Case("truth values", _qkv(make, 2, 3, 21, 16, keys=35), {"attn_mask": hidden})
    dropped = {"dropout_p": 0.3, "seed": seed}
    yield Case("dropout", _qkv(make, 2, 2, 19, 16, keys=23), dropped)
    yield Case("large scores", tuple(t * 6 for t in _qkv(make, 1, 2, 40, 32)))


def _local_plain(query: Tensor, *args: Any, **named: Any) -> Tensor:
    return local_attention(query, *args, **named, backend="reference")


def _local_native(
    query: Tensor, key: Tensor, value: Tensor, window_size: Any, *args: Any, **named: Any
) -> Tensor:
    return local_attention(query, key, value, window_size, *args, **named, backend="torch")


def _local_samples(make: Make) -> Iterator[Case]:
    yield Case("window 7", (*_qkv(make, 1, 2, 20, 8), 7))
    yield Case("3 dimensions", (*_qkv(make, 3, 21, 8), (4, 1)))
    yield Case("tiles", (*_qkv(make, 1, 2, 300, 16), 61))
    yield Case("a tile's first key", (*_qkv(make, 1, 1, 70, 4), 3))
    yield Case("causal", (*_qkv(make, 2, 2, 140, 16), (33, 0)), {"causal": True})
    yield Case("itself", (*_qkv(make, 2, 2, 9, 8), 1))
    yield Case("wider than the sequence", (*_qkv(make, 1, 2, 9, 8), 101))
    yield Case("dilated", (*_qkv(make, 2, 2, 23, 8), 5), {"dilation": 3})
    yield Case("one", (*_qkv(make, 1, 1, 1), 3))
    padding = torch.zeros(2, 30, dtype=torch.bool, device=make.device)
    padding[0, 20:] = True
    yield Case("padding", (*_qkv(make, 2, 2, 30, 8), 9), {"key_padding_mask": padding})
    seed = torch.tensor([987654321, 11], device=make.device)
    yield Case("dropout", (*_qkv(make, 2, 2, 19, 16), 5), {"dropout_p": 0.3, "seed": seed})


def _four(shape: tuple[int, ...], width: int = 256) -> tuple[int, ...]:
    """(batch, heads, rows, columns) of a shape of any number of dimensions."""
    shape = (1,) * (4 - len(shape)) + tuple(shape[-4:])
    return shape if shape[3] <= width else (*shape[:2], prod(shape[2:]) // width, width)


def _bench(make: Make, shape: tuple[int, ...]) -> Case:
    shape = shape if len(shape) == 2 else _four(shape)
    return Case("x".join(map(str, shape)), (*_qkv(make, *shape), None, 0.0, True))


def _full(case: Case) -> Case:
    return Case(case.label, case.args[:3])


def _masked(case: Case) -> Case:
    """With numbers added to the scores, alike for batch and heads."""
    q, k = case.args[:2]
    draw = torch.Generator().manual_seed(0)
    mask = torch.randn(q.shape[-2], k.shape[-2], generator=draw).to(q.dtype).to(q.device)
    return Case(case.label, (*case.args[:3], mask))


def _bench_local(make: Make, shape: tuple[int, ...]) -> Case:
    shape = (1, *shape) if len(shape) == 2 else _four(shape)
    return Case("x".join(map(str, shape)), (*_qkv(make, *shape), (128, 128)))


def _flops(case: Case, pairs: float) -> Cost:
    q, k, v = case.args[:3]
    moved = sum(bytes_of(t) for t in (q, k, v))
    out = bytes_of(q) // max(1, q.shape[-1]) * v.shape[-1]
    work = int(2 * pairs * prod(q.shape[:-2]) * (q.shape[-1] + v.shape[-1]))
    return Cost(moved + out, 2 * (moved + out), work, 5 * work // 2)


def _cost(case: Case) -> Cost:
    q, k = case.args[:2]
    causal = len(case.args) > 5 and case.args[5]
    return _flops(case, q.shape[-2] * k.shape[-2] * (0.5 if causal else 1.0))


def _local_cost(case: Case) -> Cost:
    q, window = case.args[0], case.args[3]
    width = window if isinstance(window, int) else sum(window) + 1
    return _flops(case, q.shape[-2] * min(width, q.shape[-2]))


register(
    Op(
        name="scaled_dot_product_attention",
        family="attention",
        function=scaled_dot_product_attention,
        reference=_plain,
        native=_native,
        samples=_samples,
        bench=_bench,
        bench_shapes=((2, 8, 2048, 64), (1, 8, 1024, 128), (4, 8, 128, 64)),
        cost=_cost,
        autocast="lower",
        sized=head_shapes,
        variants={"full": _full, "mask": _masked},
    )
)
register(
    Op(
        name="local_attention",
        family="attention",
        function=local_attention,
        reference=_local_plain,
        native=_local_native,
        samples=_local_samples,
        bench=_bench_local,
        bench_shapes=((1, 8, 4096, 64), (2, 8, 1024, 64)),
        cost=_local_cost,
        autocast="lower",
        sized=head_shapes,
    )
)
