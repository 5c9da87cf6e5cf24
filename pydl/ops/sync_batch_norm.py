"""batch_norm, with a residual and an activation or without, over the batches of several processes:
each normalises its own part by the moments of all.

There is one collective forward and one backward, alike on every rank whoever computes there and
however many samples it has, none included: ranks choose their backends by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from pydl import autograd
from pydl.autograd import Rule
from pydl.backends import choose, empty_like, kernel
from pydl.ops.batch_norm import update
from pydl.ops.bias_act import definition as act_definition
from pydl.ops.bias_act import named
from pydl.ops.channel_norm import (
    Folded,
    empty_moments,
    flat,
    measured_as,
    pieces_of,
    scratch,
)
from pydl.ops.norm_checks import check, check_statistics

Moments = tuple[Tensor, Tensor, Tensor]
_PLAIN = ("torch", "reference")


class _After(NamedTuple):
    """What follows the normalisation: weight, bias and residual, folded, and the activation."""

    weight: Tensor | None
    bias: Tensor | None
    residual4: Tensor | None
    act: int
    parameter: float

    def plain(self, xhat: Tensor) -> Tensor:
        """What the activation is applied to; writes over `xhat`."""
        y = xhat if self.weight is None else xhat.mul_(_channelwise(self.weight, xhat))
        y = y if self.bias is None else y.add_(_channelwise(self.bias, xhat))
        return y if self.residual4 is None else y.add_(self.residual4)

    def slope(self, dy4: Tensor, xhat: Tensor) -> Tensor:
        """What flows back through the activation, by PyTorch."""
        dy4 = dy4.to(xhat.dtype)
        if self.act == 0:
            return dy4
        return _through(self.plain(xhat.clone()), dy4, self.act, self.parameter)


def _through(z: Tensor, dy: Tensor, act: int, parameter: float, again: bool = False) -> Tensor:
    """The gradient of act(z) with regard to z."""
    with torch.enable_grad():
        z = z if again and z.requires_grad else z.detach().requires_grad_()
        return torch.autograd.grad(act_definition(act, parameter)(z), z, dy, create_graph=again)[0]


def _channelwise(values: Tensor | None, x4: Tensor) -> Any:
    """A value a channel, to be broadcast with (1, outer, channels, inner)."""
    return None if values is None else values.reshape(1, 1, x4.shape[2], 1)


def _normalised(x4: Tensor, moments: Moments, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps), in the dtype of the moments; fresh memory."""
    mean, rest, var = (_channelwise(moment, x4) for moment in moments)
    return (x4.to(var.dtype) - mean).sub_(rest).mul_(torch.rsqrt(var + eps))


def _moments(backend: str, x4: Tensor) -> Moments:
    """Mean, what is left of it and biased variance of this rank's part, each (1, channels)."""
    channels = x4.shape[2]
    mean, rest, var = empty_moments(x4, channels)
    if x4.numel() == 0:
        return mean.zero_(), rest.zero_(), var.zero_()
    if backend in _PLAIN:
        var, mean = torch.var_mean(autograd.wide(x4), (1, 3), correction=0)
        return mean, rest.zero_(), var
    pieces = pieces_of(x4)
    memory = scratch(x4, channels, pieces)
    kernel(backend, "batch_norm_moments")(mean, rest, var, memory, x4, channels, pieces)
    return mean, rest, var


def _merged(x4: Tensor, moments: Moments, group: Any) -> tuple[Moments, Tensor]:
    """The moments of all ranks' parts, and the number of values a channel, in the host's memory.

    Every rank gathers count, mean and sum of squared deviations of each, and adds them up in the
    same order: `mean = sum n_i mean_i / n` and `M2 = sum M2_i + n_i (mean_i - mean)^2`.

    Source: Chan et al. 1983, The American Statistician 37(3).
    """
    channels = x4.shape[2]
    mean, rest, var = (moment.view(-1).double() for moment in moments)
    here = x4.numel() // channels
    mine = torch.cat((mean.new_full((1,), here), mean + rest, var * here))
    parts = mine.new_empty(dist.get_world_size(group), mine.numel())
    dist.all_gather(list(parts), mine, group=group)
    counts, means, squares = parts.split((1, channels, channels), 1)
    count = counts.sum()
    whole = (counts * means).sum(0, keepdim=True) / count
    exact = (squares + counts * (means - whole).square()).sum(0, keepdim=True) / count
    dtype = moments[0].dtype
    rounded = whole.to(dtype)
    return (rounded, (whole - rounded).to(dtype), exact.to(dtype)), count.cpu()


def _apply(backend: str, x4: Tensor, moments: Moments, after: _After, eps: float) -> Tensor:
    if backend in _PLAIN or x4.numel() == 0:
        y = after.plain(_normalised(x4, moments, eps))
        return act_definition(after.act, after.parameter)(y).to(x4.dtype)
    y, channels = empty_like(x4), x4.shape[2]
    kernel(backend, "batch_norm_apply")(
        y, x4, after.residual4, *moments, flat(after.weight), flat(after.bias), eps, channels,
        after.act, after.parameter,
    )  # fmt: skip
    return y


def _sums(
    backend: str, dy4: Tensor, x4: Tensor, moments: Moments, after: _After, eps: float
) -> tuple[Tensor, Tensor]:
    """This rank's sums of dz, what flows back through the activation, and of dz times the
    normalised input: fp64 (2, 1, channels). With them dz, where there is a residual."""
    channels = x4.shape[2]
    if backend in _PLAIN or x4.numel() == 0:
        xhat = _normalised(x4, moments, eps)
        dz = after.slope(dy4, xhat)
        both = (dz, xhat.mul_(dz))
        return torch.stack([t.sum((1, 3), dtype=torch.float64) for t in both]), dz.to(x4.dtype)
    sums = torch.empty(2, 1, channels, dtype=torch.float64, device=x4.device)
    active = after.residual4 is not None and after.act != 0
    dz = empty_like(x4) if active else x4.new_empty(0)
    pieces = pieces_of(x4)
    kernel(backend, "batch_norm_sums")(
        sums, dz, scratch(x4, channels, pieces), dy4, x4, after.residual4, *moments,
        flat(after.weight), flat(after.bias), eps, channels, after.act, after.parameter, pieces,
    )  # fmt: skip
    return sums, dz if active else dy4


def _dx(
    backend: str, dy4: Tensor, x4: Tensor, moments: Moments, sums: Tensor, after: _After,
    eps: float, count: float,
) -> Tensor:  # fmt: skip
    """weight / sqrt(var + eps) (dz - sums[0] / count - xhat sums[1] / count)."""
    channels = x4.shape[2]
    if backend in _PLAIN or x4.numel() == 0:
        wide = moments[0].dtype
        of_dz, of_products = ((total / max(count, 1.0)).to(wide) for total in sums)
        xhat = _normalised(x4, moments, eps)
        dz = after.slope(dy4, xhat)
        d = xhat.mul_(_channelwise(of_products, x4)).neg_()
        d = d.add_(dz).sub_(_channelwise(of_dz, x4))
        scale = torch.rsqrt(moments[2] + eps)
        scale = scale if after.weight is None else scale * after.weight
        return d.mul_(_channelwise(scale, x4)).to(x4.dtype)
    dx = empty_like(x4)
    kernel(backend, "batch_norm_dx")(
        dx, scratch(x4, channels, pieces_of(x4)), dy4, x4, after.residual4, *moments, sums,
        flat(after.weight), flat(after.bias), eps, channels, after.act, after.parameter, count,
    )  # fmt: skip
    return dx


def _forward(
    backend: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    eps: float, group: Any, act: int, parameter: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    folded = Folded(x, 0)
    x4 = folded.fold(x)
    assert x4 is not None
    moments, count = _merged(x4, _moments(backend, x4), group)
    if count == 1:
        raise ValueError(
            "pydl: sync_batch_norm: Expected more than 1 value per channel when training, got 1 "
            f"on all ranks together, input size {x.size()} on this one"
        )
    after = _After(weight, bias, folded.fold(residual), act, parameter)
    return folded.unfold(_apply(backend, x4, moments, after, eps)), *moments, count


def _backward(backend: str, dy: Tensor, saved: tuple, scalars: tuple, needs: tuple) -> tuple:
    x, weight, bias, residual, mean, rest, var, count = saved
    eps, group, act, parameter = scalars
    folded, moments = Folded(x, 0), (mean, rest, var)
    x4, dy4 = folded.fold(x), folded.fold(dy)
    assert x4 is not None and dy4 is not None
    after = _After(weight, bias, folded.fold(residual), act, parameter)
    sums, dz4 = _sums(backend, dy4, x4, moments, after, eps)
    # A rank's weight has the gradient of its own part: who trains adds them up, as with all others.
    dweight = None if weight is None or not needs[1] else sums[1, 0].to(weight.dtype, copy=True)
    dbias = None if bias is None or not needs[2] else sums[0, 0].to(bias.dtype, copy=True)
    dresidual = None if residual is None or not needs[3] else folded.unfold(dz4)
    if not needs[0]:
        return None, dweight, dbias, dresidual
    dist.all_reduce(sums, group=group)
    dx = _dx(backend, dy4, x4, moments, sums, after, eps, float(count))
    return folded.unfold(dx), dweight, dbias, dresidual


class _Total(Function):
    """The sum over ranks, on each. What flows back to a rank is the sum of what flows back on
    all."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Total.apply(grads[0], ctx.group), None


def _derivative(dy: Tensor, saved: tuple, scalars: tuple) -> tuple:
    """The gradients again, collectives included, for autograd to differentiate."""
    x, weight, bias, residual, *_, count = saved
    eps, group, act, parameter = scalars
    n = max(float(count), 1.0)
    over, shape = [d for d in range(x.dim()) if d != 1], [1, -1] + [1] * (x.dim() - 2)

    def mean(part: Tensor) -> Tensor:
        return (_Total.apply(part.sum(over), group) / n).view(shape)

    d = x - mean(x)
    rstd = torch.rsqrt(mean(d * d) + eps)
    xhat = d * rstd
    if act != 0:
        z = xhat if weight is None else xhat * weight.view(shape)
        z = z if bias is None else z + bias.view(shape)
        dy = _through(z if residual is None else z + residual, dy, act, parameter, again=True)
    products = dy * xhat
    dx = rstd * (dy - mean(dy) - xhat * mean(products))
    dx = dx if weight is None else dx * weight.view(shape)
    dweight = None if weight is None else products.sum(over)
    dresidual = None if residual is None else dy
    return dx, dweight, None if bias is None else dy.sum(over), dresidual


def _reference(*_: Any) -> Tensor:
    raise RuntimeError(
        "pydl: sync_batch_norm: forward-mode derivatives and torch.func's transforms do not pass "
        "through the collectives; wants a process group of one rank"
    )


_RULE = Rule(
    "sync_batch_norm", 4, _forward, _backward, _reference, derivative=_derivative, extras=4
)
_call: Callable[..., Any] = autograd.make(_RULE, whole=True)


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    group: Any = None,
    *,
    residual: Tensor | None = None,
    act: str = "identity",
    act_param: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Batch normalisation in training, by the moments of the batches of all ranks, and what follows
    it as in `batch_norm_act`.

    Every rank of the group calls it, and goes backward, equally often. Forward gathers
    2 C + 1 numbers a rank, backward adds up 2 C, in fp64. The input's gradient is that of the
    sum of all ranks' losses; the gradients of weight and bias are this rank's shares of it.

    Args:
        input: (N, C, *), any strides and floating dtype; N may differ between ranks, and be 0.
        running_mean: (C), moved towards the mean of all by `momentum`; or None.
        running_var: Likewise, towards the unbiased variance of all.
        weight: (C), in the input's dtype, or fp32 with an input of 16 bits.
        bias: Likewise.
        momentum: How far the running estimates move, 0 to 1.
        eps: Added to the (biased) variance.
        group: The ranks; None for all. Its backend takes tensors of the input's device.
        residual: Of the input's shape and dtype, added before the activation.
        act: The activation; see `batch_norm_act`.
        act_param: See `batch_norm_act`.
        backend: Who computes; see `pydl.backends`.

    Returns:
        A tensor of the input's shape, dtype and memory format. Saves the input, the residual, and
        three numbers a channel.

    Raises:
        ValueError: one value a channel on all ranks together; `eps` is not positive; there is no
            such activation.
        RuntimeError: shapes or dtypes do not fit; a transform of `torch.func` is active.

    Source: Ioffe and Szegedy 2015, arXiv 1502.03167.
    """
    op = "sync_batch_norm"
    number, parameter = named(op, act, act_param)
    others = () if residual is None else (residual,)
    chosen = choose("batch_norm", backend, input, *others, key=measured_as)
    running = {"running_mean": running_mean, "running_var": running_var}
    check(op, input, residual, weight=weight, bias=bias, **running)
    check_statistics(op, True, eps, running_mean, running_var)
    if input.shape[1] == 0:
        raise RuntimeError("pydl: sync_batch_norm: input has no channel, wants 1 or more")
    y, mean, _, var, count = _call(
        chosen, input, weight, bias, residual, float(eps), group, number, parameter
    )
    values = float(count)
    if values:
        update(running_mean, running_var, mean.view(-1), var.view(-1), momentum, values)
    return y
