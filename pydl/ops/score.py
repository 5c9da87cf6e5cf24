"""The scores of attention that is no dot product and their gradients: by kernels, which store
nothing of queries times keys times width, or in PyTorch, which does and is given a few queries at a
time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pydl.autograd import wide, wide_dtype
from pydl.backends import kernel

# Backend -> (columns that a unit of the backward pass takes, units that keep a machine busy).
_UNITS = {"cpu": (16, 16), "cuda": (32, 512)}
# Queries of a piece, at least; in Triton a program's.
_PIECE = {"cpu": 32, "cuda": 32, "triton": 16}


class Score(NamedTuple):
    """A score of queries (B, L, 1, H) and keys (B, 1, S, H) with weights (H,).

    Attributes:
        number: The kernels' number for it.
        meet: `(q, k) -> t` of (B, L, S, H).
        total: `(t, w) -> scores` of (B, L, S).
        apart: `(t, w, ds) -> (dt, dw)`: for gradients ds (B, L, S) of the scores those of q, before
            the sum over keys, and of w; may write over t.
        sign: What the gradient of k is of that of q.
    """

    number: int
    meet: Callable[[Tensor, Tensor], Tensor]
    total: Callable[[Tensor, Tensor], Tensor]
    apart: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    sign: int


def _additive_apart(t: Tensor, w: Tensor, ds: Tensor) -> tuple[Tensor, Tensor]:
    dw = ds.reshape(-1) @ t.reshape(ds.numel(), t.shape[-1])
    return t.square_().neg_().add_(1).mul_(w).mul_(ds[..., None]), dw


def _gaussian_apart(t: Tensor, w: Tensor, ds: Tensor) -> tuple[Tensor, Tensor]:
    dw = ds.reshape(-1) @ t.square().reshape(ds.numel(), t.shape[-1])
    return t.mul_(w).mul_(w).mul_(ds[..., None]).neg_(), -dw * w


ADDITIVE = Score(0, lambda q, k: torch.tanh_(q + k), lambda t, w: t @ w, _additive_apart, 1)
GAUSSIAN = Score(
    1, lambda q, k: q - k, lambda t, w: (t * w).square_().sum(-1) * -0.5, _gaussian_apart, -1
)


def prepared(backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and weights as `scores` and `gradients` want them: in what is computed in, for
    PyTorch; dense, for kernels, which widen by themselves."""
    return tuple(wide(t) if backend == "torch" else t.contiguous() for t in tensors)


def scores(
    backend: str, score: Score, q: Tensor, k: Tensor, w: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(the scores of (B, L, H) and (B, S, H), what PyTorch made of all pairs for `gradients`)."""
    if backend == "torch":
        t = score.meet(q[:, :, None], k[:, None])
        return score.total(t, w), t
    shape = (*q.shape[:2], k.shape[1])
    out = torch.empty(shape, dtype=wide_dtype(q), device=q.device)
    kernel(backend, "score_fwd")(out, q.contiguous(), k, w, score.number)
    return out, None


def _pieces(backend: str, q: Tensor) -> tuple[int, int]:
    """(parts of the keys' gradients, parts of the weights'): what depends on sizes only, so that
    the same bits come out each time."""
    batch, queries, width = q.shape
    most = max(1, (queries + _PIECE[backend] - 1) // _PIECE[backend])
    if backend == "triton":  # keys have programs of their own
        return 1, most
    columns, units = _UNITS[backend]
    wanted = units // max(1, batch * ((width + columns - 1) // columns))
    pieces = max(1, min(most, wanted))
    return pieces, pieces


def gradients(
    backend: str, score: Score, ds: Tensor, q: Tensor, k: Tensor, w: Tensor, t: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of q, k and w, in what is computed in, from that of the scores."""
    if t is not None:
        dt, dw = score.apart(t, w, ds)
        dk = dt.sum(1)
        return dt.sum(2), dk if score.sign > 0 else dk.neg_(), dw
    key_parts, weight_parts = _pieces(backend, q)
    dq = torch.empty(q.shape, dtype=ds.dtype, device=q.device)
    dk = dq.new_empty(key_parts, *k.shape)
    dw = dq.new_empty(weight_parts, q.shape[0], q.shape[2])
    kernel(backend, "score_bwd")(dq, dk, dw, ds.contiguous(), q.contiguous(), k, w, score.number)
    return dq, dk[0] if key_parts == 1 else dk.sum(0), dw.sum((0, 1))
