"""batch_norm, instance_norm and group_norm, and their forms with an activation and a residual."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from pydl import autograd
from pydl.backends import FLOATS, requested
from pydl.ops import bias_act
from pydl.ops.channel_norm import RULE, call, measured_as
from pydl.ops.integers import is_integer
from pydl.ops.norm_checks import check, check_residual, check_statistics, choose
from pydl.traced import hand_over, proxied


def update(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor,
    momentum: float, count: Any,
) -> None:  # fmt: skip
    """Moves the running estimates; the variance's is unbiased: `var count / (count - 1)`."""
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            unbiased = var * (count / (count - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)


def kept(*estimates: Tensor | None) -> tuple[Tensor | None, ...]:
    """Running estimates as backward will want them, whatever training makes of them meanwhile."""
    if not torch.is_grad_enabled():
        return estimates
    return tuple(None if one is None else one.clone() for one in estimates)


def _moments(input: Tensor, over: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, where no kernel has found them."""
    var, mean = torch.var_mean(autograd.wide(input.detach()), over, correction=0)
    return mean, var


def _finish(
    op: str, y: Tensor, act: str, act_param: float | None, residual: Tensor | None = None
) -> Tensor:
    """What follows the normalisation, by torch."""
    y = y if residual is None else y + residual
    return bias_act.native(*bias_act.named(op, act, act_param))(y)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Batch normalisation, `(x - mean) / sqrt(var + eps) * weight + bias` for each channel.

    In training the moments are the batch's, and the running estimates move towards them by
    `momentum`: the mean, and the unbiased variance. Else the moments are the running estimates.

    Args:
        input: (N, C, *), any strides and floating dtype.
        running_mean: (C), changed in training; may be None in training.
        running_var: Likewise.
        weight: (C), in the input's dtype, or fp32 with an input of 16 bits.
        bias: Likewise.
        training: Whose moments.
        momentum: How far the running estimates move, 0 to 1.
        eps: Added to the (biased) variance.
        backend: Who computes; see `pydl.backends`.

    Returns:
        A tensor of the input's shape, dtype and memory format. Saves the input, and three numbers a
        channel.

    Raises:
        ValueError: training with one value a channel; `eps` is negative, or 0 in training; one
            running estimate is given without the other in training.
        RuntimeError: shapes or dtypes do not fit.

    Source: Ioffe and Szegedy 2015, arXiv 1502.03167.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias) and proxied(
        input, running_mean, running_var, weight, bias
    ):
        return hand_over(batch_norm, locals())
    of_channels = (weight, bias, running_mean, running_var)
    chosen = choose("batch_norm", backend, input, *of_channels, key=measured_as)
    if chosen == "torch":
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    stats = (running_mean, running_var, training, momentum, eps)
    return _batch("batch_norm", chosen, input, weight, bias, None, stats, "identity", None)


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    act: str = "relu",
    *,
    act_param: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Batch normalisation, residual and activation in one pass, `act(batch_norm(x) + residual)`.

    Args:
        input: (N, C, *); this and the other arguments of `batch_norm` as there.
        running_mean: See `batch_norm`.
        running_var: See `batch_norm`.
        weight: See `batch_norm`.
        bias: See `batch_norm`.
        training: See `batch_norm`.
        momentum: See `batch_norm`.
        eps: See `batch_norm`.
        residual: Of the input's shape and dtype, added before the activation. Of another dtype
            PyTorch adds it, where no backend is named, and the result is of the wider.
        act: identity, sigmoid, tanh, relu, leaky_relu, elu, selu, gelu, gelu_tanh, silu, swish or
            mish.
        act_param: The negative slope of leaky_relu, alpha of elu or beta of swish; None for their
            defaults.
        backend: Who computes; see `pydl.backends`.

    Returns:
        A tensor of the input's shape, dtype and memory format. Saves the input, the residual, and
        three numbers a channel; what the activation was applied to is computed again.

    Raises:
        ValueError: training with one value a channel; `eps` is negative, or 0 in training; one
            running estimate is given without the other in training; there is no such activation.
        RuntimeError: shapes or dtypes do not fit.
    """
    if has_torch_function_variadic(
        input, running_mean, running_var, weight, bias, residual
    ) and proxied(input, running_mean, running_var, weight, bias, residual):
        return hand_over(batch_norm_act, locals())
    of_channels = (weight, bias, running_mean, running_var)
    others = () if residual is None else (residual,)
    chosen = choose("batch_norm_act", backend, input, *of_channels, others=others, key=measured_as)
    if chosen == "torch":
        check_residual("batch_norm_act", input, residual, promoted=True)
        y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return _finish("batch_norm_act", y, act, act_param, residual)
    stats = (running_mean, running_var, training, momentum, eps)
    return _batch("batch_norm_act", chosen, input, weight, bias, residual, stats, act, act_param)


def _batch(
    op: str, chosen: str, input: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, stats: tuple, act: str, act_param: float | None,
) -> Tensor:  # fmt: skip
    running_mean, running_var, training, momentum, eps = stats
    number, parameter = bias_act.named(op, act, act_param)
    running = {"running_mean": running_mean, "running_var": running_var}
    check(op, input, residual, weight=weight, bias=bias, **running)
    check_statistics(op, training, eps, running_mean, running_var)
    if not training and (running_mean is None or running_var is None):
        raise RuntimeError(
            f"pydl: {op}: running_mean and running_var are missing, wants both without training"
        )
    count = input.numel() // max(1, input.shape[1])
    if training and count == 1:
        raise ValueError(
            f"pydl: {op}: Expected more than 1 value per channel when training, got input size "
            f"{input.size()}"
        )
    moments = (None, None) if training else kept(running_mean, running_var)
    args = (input, weight, bias, residual, *moments, 0, float(eps), number, parameter)
    if chosen == "reference":
        y, mean, var = autograd.in_reference(RULE, *args), None, None
    else:
        y, mean, _, var = call(chosen, *args)
    if training and count and (running_mean is not None or running_var is not None):
        if mean is None or var is None:
            mean, var = _moments(input, [d for d in range(input.dim()) if d != 1])
        update(running_mean, running_var, mean.reshape(-1), var.reshape(-1), momentum, count)
    return y


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Instance normalisation, `(x - mean) / sqrt(var + eps) * weight + bias`, moments per channel.

    The moments are those of each sample and channel.

    Args:
        input: (N, C, *), any strides and floating dtype.
        running_mean: (C); where it is given with `use_input_stats` it moves towards the mean of the
            samples' moments by `momentum`.
        running_var: Likewise, from the unbiased variances.
        weight: (C), in the input's dtype, or fp32 with an input of 16 bits.
        bias: Likewise.
        use_input_stats: Whose moments: the samples', or the running estimates.
        momentum: How far the running estimates move, 0 to 1.
        eps: Added to the (biased) variance.
        backend: Who computes; see `pydl.backends`.

    Returns:
        A tensor of the input's shape and dtype, contiguous. Saves the input, and three numbers a
        sample and channel.

    Raises:
        ValueError: one value a sample and channel.
        RuntimeError: shapes or dtypes do not fit.

    Source: Ulyanov et al. 2016, arXiv 1607.08022.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias) and proxied(
        input, running_mean, running_var, weight, bias
    ):
        return hand_over(instance_norm, locals())
    of_channels = (weight, bias, running_mean, running_var)
    chosen = choose("instance_norm", backend, input, *of_channels, key=measured_as)
    # Its own operator moves the estimates where torch.func's transforms allow no change in place.
    moving = use_input_stats and running_mean is not None and requested(backend) is None
    if chosen == "torch" or (moving and autograd.special()):
        return F.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    running = {"running_mean": running_mean, "running_var": running_var}
    check("instance_norm", input, weight=weight, bias=bias, **running)
    check_statistics("instance_norm", False, eps, None, None)
    channels = input.shape[1]
    count = input.numel() // max(1, input.shape[0] * channels)
    if use_input_stats and count == 1:
        raise ValueError(
            "pydl: instance_norm: Expected more than 1 spatial element when training, got input "
            f"size {input.size()}"
        )
    if not use_input_stats and (running_mean is None or running_var is None):
        raise RuntimeError(
            "pydl: instance_norm: running_mean and running_var are missing, wants both without "
            "use_input_stats"
        )
    moments = (None, None) if use_input_stats else kept(running_mean, running_var)
    groups = channels if use_input_stats else 0
    args = (input, weight, bias, None, *moments, groups, float(eps), 0, 0.0, True)
    if chosen == "reference":
        y, mean, var = autograd.in_reference(RULE, *args), None, None
    else:
        y, mean, _, var = call(chosen, *args)
    if use_input_stats and y.numel() and (running_mean is not None or running_var is not None):
        if mean is None or var is None:
            mean, var = _moments(input, list(range(2, input.dim())))
        update(running_mean, running_var, mean.mean(0), var.mean(0), momentum, count)
    return y


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    act: str = "identity",
    act_param: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Group normalisation, `act((x - mean) / sqrt(var + eps) * weight + bias)`, moments per group.

    The moments are those of each sample and group of channels; the activation is in the same pass.

    Args:
        input: (N, C, *), any strides and floating dtype.
        num_groups: Into how many groups the channels are cut; divides C.
        weight: (C), in the input's dtype, or fp32 with an input of 16 bits.
        bias: Likewise.
        eps: Added to the (biased) variance.
        act: What follows; see `batch_norm_act`.
        act_param: See `batch_norm_act`.
        backend: Who computes; see `pydl.backends`.

    Returns:
        A tensor of the input's shape, dtype and memory format. Saves the input, and three numbers a
        sample and group.

    Raises:
        ValueError: one value a sample and group; there is no such activation.
        TypeError: `num_groups` is no int.
        RuntimeError: shapes or dtypes do not fit.

    Source: Wu and He 2018, arXiv 1803.08494.
    """
    if has_torch_function_variadic(input, weight, bias) and proxied(input, weight, bias):
        return hand_over(group_norm, locals())
    if input.is_cuda and torch.is_autocast_enabled("cuda") and input.dtype in FLOATS[1:3]:
        input = input.float()
    chosen = choose("group_norm", backend, input, weight, bias, key=measured_as)
    if chosen == "torch":
        y = F.group_norm(input, num_groups, weight, bias, eps)
        return _finish("group_norm", y, act, act_param)
    number, parameter = bias_act.named("group_norm", act, act_param)
    check("group_norm", input, weight=weight, bias=bias)
    channels = input.shape[1]
    if not is_integer(num_groups):
        raise TypeError(f"pydl: group_norm: num_groups is {num_groups!r}, wants an int")
    if num_groups < 1 or channels % num_groups:
        raise RuntimeError(
            f"pydl: group_norm: num_groups is {num_groups}, wants a divisor of {channels} channels"
        )
    if input.numel() == num_groups:
        raise ValueError(
            "pydl: group_norm: Expected more than 1 value per channel when training, got input "
            f"size {input.size()}"
        )
    args = (input, weight, bias, None, None, None, num_groups, float(eps), number, parameter)
    if chosen == "reference":
        return autograd.in_reference(RULE, *args)
    return call(chosen, *args)[0]
