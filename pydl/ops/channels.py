"""Tensors seen as (outer, channels, inner), as the kernels want them that sum over all but the
channels."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from pydl.backends import empty


class Channels:
    """How a tensor of `like`'s shape folds to three dense dimensions and back.

    Args:
        like: Decides the order in memory, where it is dense; else the order is the logical one.
        dim: The channels; None folds everything to one channel.
        contiguous: Fold in logical order whatever the order in memory is.
    """

    def __init__(self, like: Tensor, dim: int | None, contiguous: bool = False) -> None:
        dims, shape = like.dim(), like.shape
        order = list(range(dims))
        if not contiguous and not like.is_contiguous():
            strides = like.stride()
            in_memory = sorted(order, key=lambda d: -strides[d])
            if like.permute(in_memory).is_contiguous():
                order = in_memory
        self._order = order
        self._shape = [shape[d] for d in order]
        if dim is None or dims == 0:
            self._folded = (1, 1, like.numel())
        else:
            at = order.index(dim % dims)
            self._folded = (prod(self._shape[:at]), self._shape[at], prod(self._shape[at + 1 :]))

    def fold(self, tensor: Tensor) -> Tensor:
        """(outer, channels, inner), dense; a view where the memory is in order."""
        return tensor.permute(self._order).contiguous().view(self._folded)

    def unfold(self, tensor: Tensor) -> Tensor:
        """The view of a folded tensor in the original shape."""
        back = sorted(range(len(self._order)), key=self._order.__getitem__)
        return tensor.view(self._shape).permute(back)


def sums(folded: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Where kernels put a gradient summed per channel: (the sums, fp64 scratch of (pieces,
    channels)).

    The number of pieces depends on sizes only, so that the same bits come out each time.
    """
    channels, n = folded.shape[1], folded.numel()
    most = 1024 if folded.is_cuda else 64
    pieces = max(1, min(most, n // 8192, n // (16 * max(1, channels))))
    total = empty(folded, parameter.dtype, channels)
    return total, empty(folded, torch.float64, pieces, channels)


def channels_last(x: Tensor) -> bool:
    """Whether a tensor of four or five dimensions has its channels innermost."""
    if x.dim() not in (4, 5) or x.is_contiguous():
        return False
    form = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    if x.is_contiguous(memory_format=form):
        return True
    # Of memory with gaps it is the order that counts, as for torch's is_channels_last_strides.
    least, strides = 0, x.stride()
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        if strides[d] == 0 or strides[d] < least or (d == 0 and strides[0] == strides[1]):
            return False
        least = strides[d] * max(1, x.shape[d])
    return True
