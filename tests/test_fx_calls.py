"""torch.fx: every function is a node of the graph where any of its tensors is a proxy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import pydl.functional as F
from pydl.table import TABLE, Case, Make


def _packed() -> Case:
    make = Make(torch.float32, seed="packed")
    starts = torch.tensor([0, 2, 5])
    return Case("packed", (make(5, 2, 4), make(5, 2, 4), make(5, 2, 4), starts, starts, 3, 3))


def _step() -> Case:
    make = Make(torch.float32, seed="step")
    state = (make(2, 3, 4, 5), make(2, 3, 4).abs())
    given = (make(2, 3, 4), make(2, 3, 4), make(2, 3, 5), state)
    return Case("step", given, {"decay": make(3).sigmoid()})


def _state(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    make, heads = Make(torch.float32, seed="state"), (*q.shape[:2], q.shape[3])
    return make(*heads, v.shape[3]), make(*heads).abs()


def _call(name: str) -> Case:
    if name in TABLE:
        return TABLE[name].cases(torch.float32)[0]
    return {"varlen_attention": _packed, "linear_attention_step": _step}[name]()


def _tensors(given: Any, path: tuple = ()) -> list[tuple]:
    """Where tensors are among arguments, those in a tuple too."""
    if isinstance(given, Tensor):
        return [path]
    pairs: Any = ()
    if isinstance(given, (tuple, list, dict)):
        pairs = given.items() if isinstance(given, dict) else enumerate(given)
    return [found for key, one in pairs for found in _tensors(one, (*path, key))]


def _with(given: Any, path: tuple, value: Any) -> Any:
    """The arguments with another value at a place."""
    if not path:
        return value
    new = dict(given) if isinstance(given, dict) else list(given)
    new[path[0]] = _with(given[path[0]], path[1:], value)
    return new if isinstance(given, dict) else tuple(new)


def _of_one(function: Callable[..., Any], given: Any, place: tuple) -> Callable[[Any], Any]:
    """A call as a function of the argument at a place."""

    def calls(x: Any) -> Any:
        args, kwargs = _with(given, place, x)
        return function(*args, **kwargs)

    return calls


@pytest.mark.parametrize("name", F.__all__)
def test_every_function_is_a_node_for_a_proxy_in_any_place(name: str) -> None:
    function, case = getattr(F, name), _call(name)
    # Arguments that the op's first sample lacks.
    extra: dict[str, Any] = {}
    if name == "swish":
        extra["beta"] = torch.tensor([0.5])
    elif name == "bias_act":
        extra["seed"] = torch.tensor([1, 2])
    elif name == "linear_attention":
        extra["key_padding_mask"] = torch.zeros(2, 7, dtype=torch.bool)
        extra["initial_state"] = _state(*case.args)
    args = case.args[:1] if name == "swish" else case.args
    given = (args, {**case.kwargs, **extra, "backend": "cpu"})
    want = function(*given[0], **given[1])
    places = _tensors(given)
    assert places
    for place in places:
        value: Any = given
        for key in place:
            value = value[key]

        traced = fx.symbolic_trace(_of_one(function, given, place))
        targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
        assert targets == [function], (place, targets)
        torch.testing.assert_close(traced(value), want, rtol=0, atol=0)


def test_default_arguments_are_not_spelt_out() -> None:
    node = next(n for n in fx.symbolic_trace(lambda x: F.gelu(x)).graph.nodes if n.target is F.gelu)
    assert len(node.args) == 1 and not node.kwargs
    code = fx.symbolic_trace(lambda x: F.leaky_relu(x, 0.2)).code
    assert "leaky_relu(x, negative_slope = 0.2)" in code
