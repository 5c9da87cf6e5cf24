"""Batch normalisation over several processes; twin of `torch.nn`'s, on CPUs too."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pydl import functional as F
from pydl.nn.batch_norm import BatchNorm2d, BatchNormAct, BatchStatistics, several
from pydl.ops.sync_batch_norm import sync_batch_norm
from pydl.traced import as_node, proxied


class SyncBatchNorm(BatchStatistics, nn.SyncBatchNorm):
    """Batch normalisation by the moments of all processes' batches; twin of
    `torch.nn.SyncBatchNorm`.

    It synchronises in training, between the processes of `process_group` where there are several;
    otherwise it is plain batch normalisation. Batches may differ in size and may be empty. Unlike
    torch's it takes CPU tensors too, where the group's backend does, as gloo. But
    `DistributedDataParallel` refuses modules of torch's type, hence this one, on the CPU.

    Args:
        num_features: The number of channels.
        eps: Added to the variance.
        momentum: How far the running estimates move at each step of training; None for the mean of
            all steps.
        affine: Learn a weight and a bias.
        track_running_stats: Keep running estimates, for evaluation; else the batch's moments are
            always used, and not synchronised in evaluation.
        process_group: Which processes; None for all.
        device: Where parameters and estimates live.
        dtype: Their dtype.

    Shape: (N, C, *), to the same.

    Source: Ioffe and Szegedy 2015, arXiv 1502.03167.
    """

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and proxied(input):
            return as_node(self, locals())
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        mean, var, training, momentum = self._statistics()
        if self.training and (group := several(self.process_group)):
            return sync_batch_norm(
                input, mean, var, self.weight, self.bias, momentum, self.eps, group,
                backend=self.backend,
            )  # fmt: skip
        return F.batch_norm(
            input, mean, var, self.weight, self.bias, training, momentum, self.eps,
            backend=self.backend,
        )  # fmt: skip

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Puts a `SyncBatchNorm` in the place of every batch normalisation, torch's and pydl's, and
        makes every `BatchNormAct` synchronise.

        Parameters and buffers are shared, not copied. Hooks are not taken along.

        Args:
            module: Any module; it is changed in place.
            process_group: Between which processes; None for all.

        Returns:
            The module, or what stands for it where it is a batch normalisation itself.

        Raises:
            TypeError: a batch normalisation has a forward of its own, which would be lost.
        """
        made: dict[int, nn.Module] = {}
        own: list[BatchNormAct] = []
        for path, one in module.named_modules():
            if type(one) is BatchNormAct:
                own.append(one)
            elif isinstance(one, _BatchNorm):
                made[id(one)] = cls._from(one, process_group, path or "the module")
        for norm in own:
            norm.synchronised, norm.process_group = True, process_group
        for parent in list(module.modules()):
            for name, child in parent._modules.items():
                parent._modules[name] = made.get(id(child), child)
        return made.get(id(module), module)

    @classmethod
    def _from(cls, module: _BatchNorm, process_group: Any, path: str) -> SyncBatchNorm:
        if type(module).forward not in _FORWARDS:
            raise TypeError(
                f"pydl: convert_sync_batchnorm: {path} is a {type(module).__name__}, which has a "
                "forward of its own: it has no synchronised form"
            )
        size, eps, momentum = module.num_features, module.eps, module.momentum
        made = cls(size, eps, momentum, False, False, process_group)
        made.affine, made.track_running_stats = module.affine, module.track_running_stats
        made.weight, made.bias = module.weight, module.bias
        made.running_mean, made.running_var = module.running_mean, module.running_var
        made.num_batches_tracked = module.num_batches_tracked
        made.training = module.training
        if "backend" in vars(module):
            made.backend = vars(module)["backend"]
        return made


_FORWARDS = (
    _BatchNorm.forward, nn.SyncBatchNorm.forward, BatchNorm2d.forward, SyncBatchNorm.forward
)  # fmt: skip
