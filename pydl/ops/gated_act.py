"""Gated linear units: an activation of one half times the other, in one pass."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.overrides import has_torch_function_variadic

from pydl import autograd
from pydl.autograd import Rule
from pydl.backends import choose, empty_like, kernel
from pydl.ops.bias_act import ACTIVATIONS, definition, named, native
from pydl.ops.samples import bytes_of
from pydl.table import Case, Cost, Make, Op, register
from pydl.traced import hand_over, proxied


def _reference(gate: Tensor, up: Tensor, act: int, parameter: float) -> Tensor:
    return definition(act, parameter)(gate) * up


def _forward(backend: str, gate: Tensor, up: Tensor, act: int, parameter: float) -> Tensor:
    y = empty_like(gate)
    kernel(backend, "gated_act_fwd")(y, gate, up, act, parameter)
    return y


def _backward(backend: str, dy: Tensor, saved: tuple, scalars: tuple, needs: tuple) -> tuple:
    gate, up = saved
    dgate, dup = empty_like(gate), empty_like(gate)
    kernel(backend, "gated_act_bwd")(dgate, dup, dy, gate, up, *scalars)
    return dgate, dup


_RULE = Rule("gated_act", 2, _forward, _backward, _reference, pointwise=True)
_call = autograd.make(_RULE)


def gated_act(
    gate: Tensor,
    up: Tensor,
    act: str = "silu",
    *,
    act_param: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Gated activation, `act(gate) * up`.

    Args:
        gate: Any shape, strides and floating dtype.
        up: Of the shape and dtype of `gate`; strides may differ.
        act: silu (SwiGLU), gelu (GEGLU), relu (ReGLU), mish, sigmoid (GLU), or any other of
            `bias_act`.
        act_param: The negative slope of leaky_relu, alpha of elu or beta of swish; None for their
            defaults.
        backend: Who computes; see `pydl.backends`.

    Returns:
        A tensor like `gate`. Saves `gate` and `up`, not `act(gate)`.

    Raises:
        ValueError: `act` or `act_param` is not as above.
        RuntimeError: `up` differs from `gate` in shape or dtype.

    Source: Shazeer 2020, arXiv 2002.05202.
    """
    if has_torch_function_variadic(gate, up) and proxied(gate, up):
        return hand_over(gated_act, locals())
    number, parameter = named("gated_act", act, act_param)
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise RuntimeError(
            f"pydl: gated_act: up has shape {tuple(up.shape)} and dtype {up.dtype}, wants gate's, "
            f"{tuple(gate.shape)} and {gate.dtype}"
        )
    chosen = choose("gated_act", backend, gate, up)
    if chosen == "torch":
        return native(number, parameter)(gate) * up
    if chosen == "reference":
        return autograd.in_reference(_RULE, gate, up, number, parameter)
    return _call(chosen, gate, up, number, parameter)


def _definition(
    gate: Tensor, up: Tensor, act: str = "silu", *, act_param: float | None = None
) -> Tensor:
    return _reference(gate, up, *named("gated_act", act, act_param))


def _native(
    gate: Tensor, up: Tensor, act: str = "silu", *, act_param: float | None = None
) -> Tensor:
    return native(*named("gated_act", act, act_param))(gate) * up


def _samples(make: Make) -> Iterator[Case]:
    for name in ACTIVATIONS:
        yield Case(f"{name} 33x65", (make(33, 65), make(33, 65), name))
    yield Case("leaky_relu 0.3", (make(9, 70), make(9, 70), "leaky_relu"), {"act_param": 0.3})
    halves = make(13, 2 * 66)
    yield Case("halves of one tensor", (halves[:, :66], halves[:, 66:]))
    for layout in ("transposed", "channels_last", "sliced", "expanded", "offset"):
        yield Case(f"{layout}, and contiguous", (make(2, 6, 5, 9, layout=layout), make(2, 6, 5, 9)))
        yield Case(
            f"contiguous, and {layout}", (make(2, 6, 5, 9), make(2, 6, 5, 9, layout=layout), "gelu")
        )
    yield Case("empty", (make(0, 8), make(0, 8)))
    yield Case("one", (make(1), make(1), "mish"))
    yield Case("many", (make(3, 20011), make(3, 20011)))


register(
    Op(
        name="gated_act",
        family="gated_act",
        function=gated_act,
        reference=_definition,
        native=_native,
        samples=_samples,
        bench=lambda make, shape: Case(
            "x".join(map(str, shape)), (make(*shape), make(*shape), "silu")
        ),
        bench_shapes=((4096, 4096), (4096, 1024), (64, 1024)),
        cost=lambda case: Cost(3 * bytes_of(case.args[0]), 5 * bytes_of(case.args[0])),
    )
)
