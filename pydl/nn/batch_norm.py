"""Normalisations of channels as modules: twins of `torch.nn`'s, and batch normalisation with what
follows it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import has_torch_function_variadic

from pydl import functional as F
from pydl.nn.activation import HasBackend
from pydl.ops.bias_act import named
from pydl.ops.sync_batch_norm import sync_batch_norm
from pydl.traced import as_node, proxied

Statistics = tuple[Tensor | None, Tensor | None, bool, float]


class BatchStatistics(HasBackend, _BatchNorm):
    """Decides, as torch's modules do, whose moments a call uses and how far the estimates move."""

    def _statistics(self) -> Statistics:
        """`running_mean, running_var, training, momentum` of a call; one in training is counted.

        The estimates move in training where they are tracked. The batch's moments are used in
        training, and where there are no estimates. Without a momentum every batch so far has the
        same weight.
        """
        tracked = self.training and self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        if tracked and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        missing = self.running_mean is None and self.running_var is None
        if self.training and not tracked:
            return None, None, True, momentum
        return self.running_mean, self.running_var, self.training or missing, momentum


def several(group: Any) -> Any:
    """The process group, all processes for None; None where there is one process or none."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


class _Plain(BatchStatistics):
    """Batch normalisation and nothing else."""

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and proxied(input):
            return as_node(self, locals())
        self._check_input_dim(input)
        mean, var, training, momentum = self._statistics()
        return F.batch_norm(
            input, mean, var, self.weight, self.bias, training, momentum, self.eps,
            backend=self.backend,
        )  # fmt: skip


class BatchNorm1d(_Plain, nn.BatchNorm1d):
    """Batch normalisation, `(x - mean) / sqrt(var + eps) * weight + bias` for each channel; twin of
    `torch.nn.BatchNorm1d`.

    Args:
        num_features: The number of channels.
        eps: Added to the variance.
        momentum: How far the running estimates move at each step of training; None for the mean of
            all steps.
        affine: Learn a weight and a bias.
        track_running_stats: Keep running estimates, for evaluation; else the batch's moments are
            always used.
        device: Where parameters and estimates live.
        dtype: Their dtype.

    Shape: (N, C) or (N, C, L), to the same.

    Source: Ioffe and Szegedy 2015, arXiv 1502.03167.
    """


class BatchNorm2d(_Plain, nn.BatchNorm2d):
    """Batch normalisation of images; twin of `torch.nn.BatchNorm2d`. See `BatchNorm1d`.

    Shape: (N, C, H, W), to the same.
    """


class BatchNorm3d(_Plain, nn.BatchNorm3d):
    """Batch normalisation of volumes; twin of `torch.nn.BatchNorm3d`. See `BatchNorm1d`.

    Shape: (N, C, D, H, W), to the same.
    """


class BatchNormAct(BatchStatistics):
    """Batch normalisation, residual and activation in one pass, `act(batch_norm(x) + residual)`.

    Called `module(x)` or `module(x, residual)`. Parameters, buffers and `state_dict` are those of
    `torch.nn.BatchNorm2d`.

    `pydl.nn.SyncBatchNorm.convert_sync_batchnorm` makes it use, in training, the moments of all
    processes' batches (`synchronised`, `process_group`). That of `torch.nn.SyncBatchNorm` takes it
    for a batch normalisation alone and drops the activation, in the blocks built of it too.

    Args:
        num_features: The number of channels.
        act: The activation: any that `pydl.functional.bias_act` has.
        eps: As in `BatchNorm1d`, like the three that follow.
        momentum: See `BatchNorm1d`.
        affine: See `BatchNorm1d`.
        track_running_stats: See `BatchNorm1d`.
        act_param: The negative slope of leaky_relu, alpha of elu or beta of swish; None for their
            defaults.
        device: Where parameters and estimates live.
        dtype: Their dtype.
        bias: Learn a bias where a weight is learnt; False with the versions of torch whose
            `BatchNorm2d` has it.

    Shape: (N, C, *), the residual too, to the same.

    Raises:
        ValueError: `act` or `act_param` is not as above; at the call, the input has one dimension
            or none, or training has one value a channel.
        RuntimeError: at the call, shapes or dtypes do not fit.
    """

    synchronised = False
    process_group: Any = None

    def __init__(
        self,
        num_features: int,
        act: str = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        act_param: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        named("BatchNormAct", act, act_param)
        more = {} if bias else {"bias": False}
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **more
        )
        self.act = act
        self.act_param = act_param

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(
                f"pydl: BatchNormAct: input has shape {tuple(input.shape)}, wants (N, C) or more "
                "dimensions"
            )

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if has_torch_function_variadic(input, residual) and proxied(input, residual):
            return as_node(self, locals())
        self._check_input_dim(input)
        mean, var, training, momentum = self._statistics()
        if self.synchronised and self.training and (group := several(self.process_group)):
            return sync_batch_norm(
                input, mean, var, self.weight, self.bias, momentum, self.eps, group,
                residual=residual, act=self.act, act_param=self.act_param, backend=self.backend,
            )  # fmt: skip
        return F.batch_norm_act(
            input, mean, var, self.weight, self.bias, training, momentum, self.eps,
            act=self.act, residual=residual, act_param=self.act_param, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        param = "" if self.act_param is None else f", act_param={self.act_param}"
        synchronised = ", synchronised=True" if self.synchronised else ""
        return f"{super().extra_repr()}, act={self.act!r}{param}{synchronised}"


class GroupNorm(HasBackend, nn.GroupNorm):
    """Group normalisation, `(x - mean) / sqrt(var + eps) * weight + bias` for each sample and group
    of channels; twin of `torch.nn.GroupNorm`.

    Args:
        num_groups: Into how many groups the channels are cut.
        num_channels: The number of channels, a multiple of `num_groups`.
        eps: Added to the variance.
        affine: Learn a weight and a bias for each channel.
        device: Where they live.
        dtype: Their dtype.

    Shape: (N, C, *), to the same.

    Source: Wu and He 2018, arXiv 1803.08494.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps, backend=self.backend
        )


class _Instance(HasBackend, _InstanceNorm):
    """Instance normalisation; torch's own forward checks the input and calls what follows."""

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and proxied(input):
            return as_node(self, locals())
        return super().forward(input)

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return F.instance_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum, self.eps, backend=self.backend,
        )  # fmt: skip


class InstanceNorm1d(_Instance, nn.InstanceNorm1d):
    """Instance normalisation, `(x - mean) / sqrt(var + eps) * weight + bias` for each sample and
    channel; twin of `torch.nn.InstanceNorm1d`.

    Args:
        num_features: The number of channels.
        eps: Added to the variance.
        momentum: How far the running estimates move at each step of training.
        affine: Learn a weight and a bias.
        track_running_stats: Keep running estimates and use them in evaluation.
        device: Where parameters and estimates live.
        dtype: Their dtype.

    Shape: (N, C, L) or (C, L), to the same.

    Source: Ulyanov et al. 2016, arXiv 1607.08022.
    """


class InstanceNorm2d(_Instance, nn.InstanceNorm2d):
    """Instance normalisation of images; twin of `torch.nn.InstanceNorm2d`. See `InstanceNorm1d`.

    Shape: (N, C, H, W) or (C, H, W), to the same.
    """


class InstanceNorm3d(_Instance, nn.InstanceNorm3d):
    """Instance normalisation of volumes; twin of `torch.nn.InstanceNorm3d`. See `InstanceNorm1d`.

    Shape: (N, C, D, H, W) or (C, D, H, W), to the same.
    """
