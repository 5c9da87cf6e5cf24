"""What `torch.utils.flop_counter.FlopCounterMode` counts of pydl's kernels.

>>> import pydl.integrations.flop_counter as integration
>>> integration.register()
>>> with FlopCounterMode() as counter: ...

It is asked for, since that module of torch takes longer to import than pydl, and a counter copies
torch's registry of formulas when it is made. As in torch's own formulas the causal form of
attention counts every pair of a query and a key; a bounded window counts those that it lets meet.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from pydl.backends import unavailable

__all__ = ["register"]


def register() -> None:
    """Tells torch's registry the operations of the linear layer's product and of attention, forward
    and backward, on every backend that is available; a second call changes nothing."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for backend in ("cpu", "cuda", "triton"):
        if unavailable(backend) is None:
            namespace = getattr(torch.ops, f"pydl_{backend}")
            for name, formula in _FORMULAS.items():
                packet = getattr(namespace, name, None)
                if packet is not None and packet not in flop_registry:
                    register_flop_formula(packet, get_raw=True)(formula)


def _product(out: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * prod(a.shape) * b.shape[-1]


def _attention_fwd(
    out: Tensor, lse: Any, rest: Any, q: Tensor, k: Tensor, v: Tensor, *more: Any, **_: Any
) -> int:
    """Scores, and their product with the values."""
    return 2 * _pairs(q, k, *more) * (q.shape[3] + v.shape[3])


def _attention_bwd(
    dq: Any, dk: Any, dv: Any, dmask: Any, drelative: Any, scratch: Any, dout: Any, dlse: Any,
    out: Any, lse: Any, rest: Any, q: Tensor, k: Tensor, v: Tensor, *more: Any, **_: Any,
) -> int:  # fmt: skip
    """The scores again, and the products that dq, dk, dv and the weights' gradients are."""
    return 2 * _pairs(q, k, *more) * (3 * q.shape[3] + 2 * v.shape[3])


def _pairs(q: Tensor, k: Tensor, mask: Any, relative: Any, *settings: Any) -> int:
    """How many scores there are."""
    starts_q, starts_k, _, longest_q, longest_k, _, _, left, right, bottom, _ = settings
    batch, heads, queries, _ = q.shape
    lengths = [(queries, k.shape[2])] * batch
    if starts_q is not None:
        lengths = list(
            zip(_lengths(starts_q, longest_q), _lengths(starts_k, longest_k), strict=True)
        )
    return heads * sum(_seen(*both, left, right, bottom) for both in lengths)


def _lengths(starts: Tensor, longest: int) -> list[int]:
    """Of packed sequences; the longest for each where there are no values to read."""
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(starts, FakeTensor) or starts.is_meta:
        return [longest] * (starts.shape[0] - 1)
    return [after - before for before, after in pairwise(starts.tolist())]


def _seen(queries: int, keys: int, left: int, right: int, bottom: bool) -> int:
    """Scores of one head."""
    if left < 0:
        return queries * keys
    first = keys - queries if bottom else 0
    ends = ((i, keys if right < 0 else i + right + 1) for i in range(first, first + queries))
    return sum(max(0, min(end, keys) - max(i - left, 0)) for i, end in ends)


_FORMULAS: dict[str, Any] = {
    "product": _product, "attention_fwd": _attention_fwd, "attention_bwd": _attention_bwd
}  # fmt: skip
