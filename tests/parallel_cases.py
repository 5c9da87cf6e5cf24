"""Calls of ops for tests on DTensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from pydl import functional as F


class Case(NamedTuple):
    """A call: which dimensions of the first tensor may be cut, of `alike` tensors together."""

    call: Callable[..., Any]
    shapes: Sequence[tuple[int, ...]]
    free: Sequence[int]
    alike: int = 1


X = (4, 3, 8)
QKV = ((4, 2, 5, 8),) * 3
UNARY = ("sigmoid", "tanh", "relu", "leaky_relu", "elu", "selu", "gelu", "silu", "mish", "swish")


def _norms() -> Iterator[tuple[str, Case]]:
    weights = ((8,), (8,))
    yield "layer_norm", Case(lambda x, w, b: F.layer_norm(x, (8,), w, b), (X, *weights), (0, 1))
    yield "layer_norm over two", Case(lambda x: F.layer_norm(x, X[1:]), (X,), (0,))
    yield "rms_norm", Case(lambda x, w: F.rms_norm(x, (8,), w), (X, *weights[1:]), (0, 1))
    yield (
        "add_layer_norm",
        Case(
            lambda x, r, w, b: F.add_layer_norm(x, r, (8,), w, b), (X, X, *weights), (0, 1), 2
        ),
    )  # fmt: skip
    yield (
        "add_rms_norm",
        Case(lambda x, r, w: F.add_rms_norm(x, r, (8,), w), (X, X, (8,)), (0, 1), 2),
    )
    channels = ((4,),) * 4
    yield (
        "batch_norm, evaluation",
        Case(
            lambda x, w, b, m, v: F.batch_norm(x, m.detach(), v.detach().exp(), w, b),
            ((2, 4, 3, 5), *channels), (0, 1, 2, 3),
        ),
    )  # fmt: skip
    yield (
        "batch_norm_act, training",
        Case(
            lambda x, r, w, b: F.batch_norm_act(x, None, None, w, b, True, residual=r),
            ((2, 4, 3, 5), (2, 4, 3, 5), *channels[:2]), (1,), 2,
        ),
    )  # fmt: skip
    yield (
        "group_norm",
        Case(lambda x, w, b: F.group_norm(x, 2, w, b), ((3, 4, 3, 5), *channels[:2]), (0,)),
    )


def _attention() -> Iterator[tuple[str, Case]]:
    attention = F.scaled_dot_product_attention
    yield "attention", Case(lambda *t: attention(*t, is_causal=True), QKV, (0, 1), 3)
    yield "attention with lse", Case(lambda *t: attention(*t, return_lse=True), QKV, (0, 1), 3)
    mask = (1, 1, 5, 5)
    yield "attention with a mask", Case(lambda *t: attention(*t), (*QKV, mask), (0, 1), 3)
    grouped = ((4, 4, 5, 8), *QKV[1:])
    yield "attention, grouped", Case(lambda *t: attention(*t, enable_gqa=True), grouped, (0, 1), 3)
    one = ((2, 4, 1, 8), (2, 2, 9, 8), (2, 2, 9, 8))
    yield "attention of one query", Case(lambda *t: attention(*t, enable_gqa=True), one, (0, 1), 3)
    yield (
        "local_attention",
        Case(lambda q, k, v, b: F.local_attention(q, k, v, 3, bias=b), (*QKV, (2, 3)), (0, 1), 3),
    )
    yield (
        "local_attention, dilated",
        Case(lambda *t: F.local_attention(*t, 3, dilation=2), QKV, (0, 1), 3),
    )
    yield (
        "linear_attention",
        Case(
            lambda q, k, v: _flat(
                F.linear_attention(
                    q, k, v, causal=True, decay=[0.9 - 0.1 * h for h in range(q.shape[1])],
                    return_state=True,
                )
            ),
            grouped, (0, 1), 3,
        ),
    )  # fmt: skip


def _scores() -> Iterator[tuple[str, Case]]:
    """The queries are cut, the keys lie whole."""
    additive, gaussian = F.additive_attention, F.gaussian_attention
    weights = ((6, 8), (6, 5), (6,))
    given = ((4, 3, 8), (4, 7, 5), (4, 7, 2))
    yield "additive_attention", Case(additive, (*given, *weights), (0, 1))
    heads = tuple((n, 2, *rest) for n, *rest in given)
    yield "additive_attention of heads", Case(additive, (*heads, *weights), (0, 1, 2))
    alike = ((4, 3, 8), (4, 7, 8), (4, 7, 2))
    yield "gaussian_attention", Case(gaussian, (*alike, (8,)), (0, 1))
    yield "gaussian_attention of numbers", Case(gaussian, ((4,), (7,), (7,), (1,)), (0,))


def _flat(found: Any) -> tuple[Tensor, ...]:
    out, state = found
    return (out, *state)


def cases() -> dict[str, Case]:
    found = {name: Case(getattr(F, name), (X,), (0, 1, 2)) for name in UNARY}
    found["gelu of a line"] = Case(lambda x: F.gelu(x, "tanh"), ((5,),), (0,))
    found["prelu"] = Case(F.prelu, (X, (3,)), (0, 1, 2))
    found["prelu, one"] = Case(F.prelu, (X, (1,)), (0, 1, 2))
    found["swish, learnt"] = Case(F.swish, (X, (3,)), (0, 1, 2))
    found["bias_act"] = Case(lambda x, b: F.bias_act(x, b), (X, (8,)), (0, 1, 2))
    found["bias_act of channels"] = Case(
        lambda x, b: F.bias_act(x, b, "silu", dim=1), (X, (3,)), (0, 1, 2)
    )
    found["gated_act"] = Case(lambda a, b: F.gated_act(a, b), (X, X), (0, 1, 2), 2)
    found["in place"] = Case(lambda x: F.relu(x * 1, inplace=True), (X,), (0, 1, 2))
    return {**found, **dict(_norms()), **dict(_attention()), **dict(_scores())}


def _smaller(case: Case, *shapes: tuple[int, ...]) -> Case:
    return case._replace(shapes=shapes)


CASES = cases()
# A rank has nothing.
_ONE = ((1, 1, 5, 8),) * 3
CASES |= {
    f"{name}, fewer than ranks": _smaller(CASES[name], *shapes)
    for name, shapes in {
        "gelu": ((1, 3),),
        "bias_act": ((1, 3, 8), (8,)),
        "prelu": ((3, 1), (1,)),
        "layer_norm": ((1, 1, 8), (8,), (8,)),
        "add_rms_norm": ((1, 3, 8), (1, 3, 8), (8,)),
        "batch_norm_act, training": (*[(2, 1, 3, 5)] * 2, (1,), (1,)),
        "attention": _ONE,
        "local_attention": (*_ONE, (1, 3)),
        "attention of one query": ((1, 1, 1, 8), *[(1, 1, 9, 8)] * 2),
        "linear_attention": _ONE,
        "gaussian_attention": ((1, 1, 8), (1, 7, 8), (1, 7, 2), (8,)),
    }.items()
}
