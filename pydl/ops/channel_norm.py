"""What batch_norm, instance_norm and group_norm have in common: channels are normalised, with an
activation and a residual in the same pass.

All are one computation on (samples, outer, channels, inner): moments over outer, inner and the
channels of a group, one group a channel for batch_norm, where all are one sample.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydl import autograd
from pydl.autograd import Rule
from pydl.backends import empty, empty_like, kernel
from pydl.ops.bias_act import definition as act_definition
from pydl.ops.channels import channels_last


class Settings(NamedTuple):
    """What is no tensor. `groups` is 0 for one sample of all and a group a channel; `dense` is
    whether results lie in the logical order whatever the input's."""

    groups: int
    eps: float
    act: int
    parameter: float
    dense: bool = False


def _centred(x: Tensor, over: list[int]) -> Tensor:
    """Less the mean; a second time takes away what rounding the first has left."""
    return x - x.mean(over, keepdim=True)


def definition(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    mean: Tensor | None, var: Tensor | None, groups: int, eps: float, act: int, parameter: float,
    dense: bool = False,
) -> Tensor:  # fmt: skip
    """act((x - mean) / sqrt(var + eps) weight + bias + residual); the moments given, or x's."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    scale = None if weight is None else weight.view(shape)
    if groups and mean is None:
        d = x.reshape(x.shape[0], groups, x.shape[1] // groups * prod(x.shape[2:]))
        d = _centred(d, [2])
        y = (d * torch.rsqrt((d * d).mean(2, keepdim=True) + eps)).view_as(x)
        y = y if scale is None else y * scale
    else:
        over = [d for d in range(x.dim()) if d != 1]
        d = _centred(_centred(x, over), over) if mean is None else x - mean.view(shape)
        spread = (d * d).mean(over, keepdim=True) if var is None else var.view(shape)
        rstd = torch.rsqrt(spread + eps)
        # Of no elements rstd is NaN, which must not meet the weight.
        if scale is not None and x.numel():
            rstd, scale = rstd * scale, None
        y = d * rstd if scale is None else d * rstd * scale
    y = y if bias is None else y + bias.view(shape)
    return act_definition(act, parameter)(y if residual is None else y + residual)


class Folded:
    """How a tensor of `like`'s shape folds to (samples, outer, channels, inner), dense, and back.

    Args:
        like: Decides the order in memory: channels last where it is so, else the logical one.
        groups: As in `Settings`, like `dense`.
    """

    def __init__(self, like: Tensor, groups: int, dense: bool = False) -> None:
        self._dims = like.dim()
        self._last = channels_last(like) and not dense
        n, c, inner = like.shape[0], like.shape[1], prod(like.shape[2:])
        samples = n if groups else 1
        if self._last:
            self.shape = (samples, n // max(1, samples) * inner, c, 1)
        else:
            self.shape = (samples, n // max(1, samples), c, inner)
        self._order = (0, *range(2, self._dims), 1)
        self._moved = [like.shape[d] for d in (self._order if self._last else range(self._dims))]
        self._back = (0, self._dims - 1, *range(1, self._dims - 1))

    def fold(self, tensor: Tensor | None) -> Tensor | None:
        """A view where the memory is in order."""
        if tensor is None:
            return None
        return (tensor.permute(self._order) if self._last else tensor).contiguous().view(self.shape)

    def unfold(self, tensor: Tensor) -> Tensor:
        """The memory of a folded tensor in the original shape; no view to autograd, which forbids
        to change a Function's result in place where it is one."""
        moved = tensor.view(self._moved)
        return (moved.permute(self._back) if self._last else moved).detach()


_LONG = 196  # 14 x 14


def measured_as(op: str, x: Tensor) -> str:
    """Channels of few values side by side are read otherwise, and measured by themselves."""
    return op if x.shape[2:].numel() >= _LONG else f"{op}_short"


def pieces_of(folded: Tensor) -> int:
    """Into how many pieces the elements of a channel are cut; depends on sizes only, so that the
    same bits come out each time."""
    samples, outer, channels, inner = folded.shape
    each = outer * inner
    if folded.is_cuda:
        blocks = samples * (channels if inner > 1 else -(-channels // 128))
        return max(1, min(1056 // max(1, blocks), each // (1024 if inner > 1 else 64)))
    return max(1, min(32, each * channels // 16384, each // 16))


def scratch(folded: Tensor, groups: int, pieces: int) -> Tensor:
    """fp64 memory for two sums a piece and channel, two a channel and two a group."""
    samples, _, channels, _ = folded.shape
    count = 2 * samples * ((pieces + 1) * channels + groups)
    return empty(folded, torch.float64, count)


def empty_moments(folded: Tensor, groups: int) -> list[Tensor]:
    """Where the kernels put mean, what is left of it, and biased variance of (sample, group)."""
    dtype, samples = autograd.wide_dtype(folded), folded.shape[0]
    return [empty(folded, dtype, samples, groups) for _ in range(3)]


def flat(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def moment(given: Tensor, x: Tensor) -> Tensor:
    """A running estimate as the kernels take it."""
    return given.to(autograd.wide_dtype(x)).contiguous().view(1, -1)


def _forward(
    backend: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    mean: Tensor | None, var: Tensor | None, *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    s = Settings(*settings)
    folded = Folded(x, s.groups, s.dense)
    x4, residual4 = folded.fold(x), folded.fold(residual)
    assert x4 is not None
    y = empty_like(x4)
    groups = s.groups or x4.shape[2]
    weights = (flat(weight), flat(bias), s.eps, groups, s.act, s.parameter)
    if mean is not None and var is not None:
        mean, var = moment(mean, x), moment(var, x)
        rest = torch.zeros_like(mean)
        kernel(backend, "batch_norm_apply")(y, x4, residual4, mean, rest, var, *weights)
        # Backward has those that were given.
        none = mean.new_empty(0, groups)
        return folded.unfold(y), none, none.clone(), none.clone()
    mean, rest, var = empty_moments(x4, groups)
    pieces = pieces_of(x4)
    kernel(backend, "batch_norm_fwd")(
        y, mean, rest, var, scratch(x4, groups, pieces), x4, residual4, *weights, pieces
    )
    return folded.unfold(y), mean, rest, var


def _backward(backend: str, dy: Tensor, saved: tuple, settings: tuple, needs: tuple) -> tuple:
    x, weight, bias, residual, given, given_var, mean, rest, var = saved
    s = Settings(*settings)
    if given is not None:
        mean, var = moment(given, x), moment(given_var, x)
        rest = torch.zeros_like(mean)
    folded = Folded(x, s.groups, s.dense)
    x4, dy4 = folded.fold(x), folded.fold(dy)
    assert x4 is not None and dy4 is not None
    groups = s.groups or x4.shape[2]
    pieces = pieces_of(x4)
    # Without an activation the residual's gradient is dy.
    active = s.act != 0
    residual4 = folded.fold(residual) if active else None
    dx = empty_like(x4)
    dz = empty_like(x4) if residual4 is not None else x4.new_empty(0)
    dweight = _gradient(weight, needs[1], x)
    dbias = _gradient(bias, needs[2], x)
    kernel(backend, "batch_norm_bwd")(
        dx, dz, dweight, dbias, scratch(x4, groups, pieces), dy4, x4, residual4, mean, rest, var,
        flat(weight), flat(bias), s.eps, groups, s.act, s.parameter, pieces, given is None,
    )  # fmt: skip
    dresidual = None
    if residual is not None:
        dresidual = folded.unfold(dz if active else dy4)
    return (
        folded.unfold(dx),
        dweight if needs[1] and weight is not None else None,
        dbias if needs[2] and bias is not None else None,
        dresidual,
        None,
        None,
    )


def _gradient(weight: Tensor | None, needed: bool, x: Tensor) -> Tensor:
    """Where a weight's gradient goes; without elements where it is not wanted."""
    if weight is None or not needed:
        return x.new_empty(0)
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _shards(*args: Any) -> tuple[list, list]:
    """Moments are those of a channel's samples, or, of groups, of a sample's channels."""
    x, mean, groups = args[0], args[4], args[6]
    dims: list[Any] = list(range(x.dim()))
    if groups or mean is None:
        dims = [d if d == (0 if groups else 1) else None for d in dims]
    of_channels, moments = (dims[1],), (dims[0] if groups else None, None if groups else dims[1])
    channels = [of_channels] * 2
    return [dims, *channels, dims, *channels], [dims, moments, moments, moments]


RULE = Rule("batch_norm", 6, _forward, _backward, definition, extras=3, shards=_shards)
call: Callable[..., Any] = autograd.make(RULE, whole=True)
