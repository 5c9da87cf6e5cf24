"""The rows of batch_norm, batch_norm_act, instance_norm and group_norm in the op table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pydl.backends import FLOATS
from pydl.ops import bias_act
from pydl.ops.batch_norm import batch_norm, batch_norm_act, group_norm, instance_norm
from pydl.ops.channel_norm import definition
from pydl.ops.samples import bytes_of, channel_shapes, short_channel_shapes
from pydl.table import LAYOUTS, Case, Cost, Make, Op, register


def _inputs(make: Make) -> Iterator[tuple[str, Tensor]]:
    yield "9x24", make(9, 24)
    yield "6x12x7", make(6, 12, 7)
    yield "3x8x5x9", make(3, 8, 5, 9)
    yield "2x4x3x4x5", make(2, 4, 3, 4, 5)
    yield "2x8x16x16", make(2, 8, 16, 16)
    yield "2x4x32x33", make(2, 4, 32, 33)
    yield "40x136", make(40, 136)
    for layout in LAYOUTS[1:]:
        yield f"{layout} 3x6x4x9", make(3, 6, 4, 9, layout=layout)
    yield "channels_last 2x20x7x7", make(2, 20, 7, 7, layout="channels_last")
    yield "channels_last 4x64x9x8", make(4, 64, 9, 8, layout="channels_last")
    yield "large mean", make(4, 6, 8, 8) + 1e3
    yield "small", make(4, 6, 5, 8) * 0.05
    # Quarters, so that fp64 adds them without an error that the scale would make large.
    yield "constant", ((make(1, 6, 1, 1) * 4).round() / 4).expand(4, 6, 3, 5)
    yield "many", make(3, 5, 61, 67)


def _weights(make: Make, x: Tensor) -> tuple[Tensor, Tensor]:
    return make(x.shape[1], scale=0.5) + 1, make(x.shape[1])


def _running(make: Make, channels: int) -> dict[str, Any]:
    """Buffers and weights of evaluation, which get no gradient here."""
    dtype = torch.float64 if make.dtype == torch.float64 else torch.float32
    wide_make = Make(dtype, make.device, "running")
    return {
        "running_mean": wide_make(channels),
        "running_var": wide_make(channels).abs() + 0.5,
        "weight": wide_make(channels),
        "bias": wide_make(channels),
    }


def _half_weights(make: Make, channels: int) -> list[Tensor]:
    single = Make(torch.float32, make.device, "weights")
    return [single(channels), single(channels)]


def _batch_samples(make: Make) -> Iterator[Case]:
    for label, x in _inputs(make):
        yield Case(label, (x, None, None, *_weights(make, x), True))
    yield Case("no weight", (make(6, 5, 7), None, None, None, None, True))
    yield Case("no bias", (make(6, 5, 7), None, None, make(5), None, True, 0.1, 0.5))
    yield Case("empty", (make(0, 5, 7), None, None, make(5), make(5), True))
    for shape in ((1, 6), (5, 40), (3, 6, 40), (2, 7, 9, 5)):
        label = "evaluation " + "x".join(map(str, shape))
        yield Case(label, (make(*shape),), _running(make, shape[1]))
    if make.dtype in FLOATS[1:3]:
        yield Case("fp32 weights", (make(4, 6, 9, 5), None, None, *_half_weights(make, 6), True))


def _act_samples(make: Make) -> Iterator[Case]:
    head = (None, None)
    tail = (True, 0.1, 1e-5)
    for label, x in _inputs(make):
        args = (x, *head, *_weights(make, x), *tail)
        layout = "channels_last" if "channels_last" in label else "contiguous"
        yield Case(f"{label} and residual", (*args, make(*x.shape, layout=layout)))
    for act in bias_act.ACTIVATIONS:
        x = make(3, 4, 5, 7)
        weights = _weights(make, x)
        yield Case(act, (x, *head, *weights, *tail, None, act))
        yield Case(f"{act} and residual", (x, *head, *weights, *tail, make(3, 4, 5, 7), act))
    x = make(2, 3, 40, layout="transposed")
    residual = make(2, 3, 40, layout="expanded")
    yield Case("strides differ", (x, *head, None, make(3), *tail, residual, "gelu"))
    x = make(3, 5, 40)
    slope = {"act_param": 0.3}
    yield Case("slope", (x, *head, *_weights(make, x), *tail, None, "leaky_relu"), slope)
    yield Case("evaluation", (make(3, 5, 40),), {**_running(make, 5), "act": "silu"})
    yield Case("empty", (make(0, 5, 7), *head, make(5), make(5), *tail, make(0, 5, 7)))


def _instance_samples(make: Make) -> Iterator[Case]:
    for label, x in _inputs(make):
        if x.dim() > 2:
            yield Case(label, (x, None, None, *_weights(make, x)))
    yield Case("no weight", (make(6, 5, 7),))
    yield Case("eps", (make(6, 5, 70), None, None, make(5), None, True, 0.1, 0.5))
    evaluation = {**_running(make, 5), "use_input_stats": False}
    yield Case("evaluation", (make(3, 5, 8),), evaluation)


def _group_samples(make: Make) -> Iterator[Case]:
    for label, x in _inputs(make):
        groups = 5 if x.shape[1] % 2 else 2
        yield Case(label, (x, groups, *_weights(make, x)))
    yield Case("one group", (make(3, 6, 5, 9), 1, make(6), make(6)))
    yield Case("a group a channel", (make(3, 6, 5, 9), 6, make(6), make(6)))
    yield Case("no weight", (make(6, 4, 7), 2))
    yield Case("no bias", (make(6, 4, 70), 2, make(4), None, 0.5))
    yield Case("empty", (make(0, 6, 4), 2, make(6), make(6)))
    yield Case("silu", (make(3, 8, 6, 6), 4, make(8), make(8)), {"act": "silu"})
    last = make(3, 8, 6, 6, layout="channels_last")
    yield Case("mish, channels_last", (last, 4, make(8), make(8)), {"act": "mish"})
    if make.dtype in FLOATS[1:3]:
        yield Case("fp32 weights", (make(4, 6, 9, 5), 3, *_half_weights(make, 6)))


def _batch_definition(
    x: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5, residual: Any = None,
    act: str = "identity", act_param: float | None = None,
) -> Tensor:  # fmt: skip
    mean, var = (None, None) if training else (running_mean, running_var)
    number, parameter = bias_act.named("", act, act_param)
    return definition(x, weight, bias, residual, mean, var, 0, eps, number, parameter)


def _act_definition(x: Tensor, *args: Any, act: str = "relu", **named: Any) -> Tensor:
    args, act = (args[:-1], args[-1]) if args and isinstance(args[-1], str) else (args, act)
    return _batch_definition(x, *args, **{**named, "act": act})


def _instance_definition(
    x: Tensor, running_mean: Any = None, running_var: Any = None, weight: Any = None,
    bias: Any = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    mean, var = (None, None) if use_input_stats else (running_mean, running_var)
    groups = x.shape[1] if use_input_stats else 0
    return definition(x, weight, bias, None, mean, var, groups, eps, 0, 0.0)


def _group_definition(
    x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    act: str = "identity", act_param: float | None = None,
) -> Tensor:  # fmt: skip
    number, parameter = bias_act.named("", act, act_param)
    return definition(x, weight, bias, None, None, None, groups, eps, number, parameter)


def _native_act(
    x: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5, residual: Any = None,
    act: str = "relu", act_param: float | None = None,
) -> Tensor:  # fmt: skip
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    y = y if residual is None else y + residual
    return bias_act.native(*bias_act.named("", act, act_param))(y)


def _native_group(
    x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    act: str = "identity", act_param: float | None = None,
) -> Tensor:  # fmt: skip
    y = F.group_norm(x, groups, weight, bias, eps)
    return bias_act.native(*bias_act.named("", act, act_param))(y)


def _cost(case: Case) -> Cost:
    """Batch moments are known after a first reading of what the second works on."""
    size = bytes_of(case.args[0])
    residual = len(case.args) > 8 and case.args[8] is not None
    return Cost((4 if residual else 3) * size, (6 if residual else 5) * size)


def _channels(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape of two dimensions at least, as a batch of more than one value a channel."""
    if len(shape) < 2:
        return (max(2, shape[0]), 1)
    return (max(2, shape[0]), *(max(1, n) for n in shape[1:]))


def _bench_batch(make: Make, shape: tuple[int, ...]) -> Case:
    x = make(*_channels(shape))
    return Case("x".join(map(str, shape)), (x, None, None, *_weights(make, x), True))


def _bench_act(make: Make, shape: tuple[int, ...]) -> Case:
    x = make(*_channels(shape))
    args = (x, None, None, *_weights(make, x), True, 0.1, 1e-5, make(*x.shape))
    return Case("x".join(map(str, shape)), args)


def _bench_instance(make: Make, shape: tuple[int, ...]) -> Case:
    shape = _channels(shape)
    x = make(*shape) if len(shape) > 2 else make(1, *shape)
    x = x if x.shape[2:].numel() > 1 else make(1, 1, x.numel())
    return Case("x".join(map(str, shape)), (x, None, None, *_weights(make, x)))


def _bench_group(make: Make, shape: tuple[int, ...]) -> Case:
    x = make(*_channels(shape))
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if x.shape[1] % g == 0)
    return Case("x".join(map(str, shape)), (x, groups, *_weights(make, x)))


_SHAPES = ((16, 64, 56, 56), (32, 256, 28, 28), (4096, 1024), (8, 16, 8, 8))
_SPATIAL = ((16, 64, 56, 56), (8, 512, 32, 32), (8, 16, 8, 8))


def _register(name: str, function: Any, samples: Any, reference: Any, native: Any, bench: Any,
              shapes: tuple[tuple[int, ...], ...]) -> None:  # fmt: skip
    # Features are to instance_norm one sample's channels, and long.
    kinds = 1 if name == "instance_norm" else 2
    register(
        Op(
            name=name,
            family="batch_norm",
            function=function,
            reference=reference,
            native=native,
            samples=samples,
            bench=bench,
            bench_shapes=shapes,
            cost=_cost,
            sized=channel_shapes,
            apart={f"{name}_short": lambda n: short_channel_shapes(n)[:kinds]},
        )
    )


_register("batch_norm", batch_norm, _batch_samples, _batch_definition, F.batch_norm, _bench_batch,
          _SHAPES)  # fmt: skip
_register("batch_norm_act", batch_norm_act, _act_samples, _act_definition, _native_act, _bench_act,
          _SHAPES)  # fmt: skip
_register("instance_norm", instance_norm, _instance_samples, _instance_definition,
          F.instance_norm, _bench_instance, _SPATIAL)  # fmt: skip
_register("group_norm", group_norm, _group_samples, _group_definition, _native_group, _bench_group,
          _SPATIAL)  # fmt: skip
