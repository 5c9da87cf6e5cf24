"""Additive and Gaussian attention: against their formulas, in chunks, differentiated twice."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from pydl.functional import additive_attention, gaussian_attention
from pydl.ops import score_rule

SHAPES = [((), 5, 7), ((2,), 1, 1), ((2, 3), 4, 5), ((0,), 2, 3), ((2,), 0, 3), ((2,), 3, 0)]
kernels = pytest.mark.parametrize("asked", ["torch", "cpu"])
chunked = pytest.mark.parametrize("chunk", [1, 60, 1 << 20])


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def additive(q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor) -> Tensor:
    meet = (q @ w_q.T)[..., :, None, :] + (k @ w_k.T)[..., None, :, :]
    return torch.softmax(torch.tanh(meet) @ w_v, -1) @ v


def gaussian(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    d = (q[..., :, None, :] - k[..., None, :, :]) * w
    return torch.softmax(-0.5 * (d * d).sum(-1), -1) @ v


def same_gradients(got: Tensor, want: Tensor, leaves: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(want)
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy)
    )


@chunked
@pytest.mark.parametrize("asked", ["torch", "reference", "cpu"])
@pytest.mark.parametrize("batch, queries, keys", SHAPES, ids=str)
def test_additive(
    batch: tuple, queries: int, keys: int, asked: str | None, chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(score_rule, "CHUNK", chunk)
    given = (random(*batch, queries, 4), random(*batch, keys, 6), random(*batch, keys, 3))
    given = (*given, random(8, 4), random(8, 6), random(8))
    got = additive_attention(*given, backend=asked)
    assert got.shape == (*batch, queries, 3)
    same_gradients(got, additive(*given), given)


@chunked
@pytest.mark.parametrize("asked", ["torch", "reference", "cpu"])
@pytest.mark.parametrize("batch, queries, keys", SHAPES, ids=str)
def test_gaussian(
    batch: tuple, queries: int, keys: int, asked: str | None, chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(score_rule, "CHUNK", chunk)
    given = (random(*batch, queries, 4), random(*batch, keys, 4), random(*batch, keys, 3))
    for w in (random(4), random(1), random()):
        leaves = (*given, w)
        same_gradients(gaussian_attention(*leaves, backend=asked), gaussian(*leaves), leaves)


def test_gaussian_of_numbers() -> None:
    """Nadaraya-Watson regression as it is written for numbers."""
    given = (random(5), random(7), random(7), random())
    q, k, v, w = given
    want = torch.softmax(-(((q[:, None] - k) * w) ** 2) / 2, -1) @ v
    same_gradients(gaussian_attention(*given), want, given)


@kernels
def test_gaussian_of_near_numbers_far_out(asked: str) -> None:
    """The difference is taken before anything rounds."""
    q, k = (torch.linspace(0, 1, n) + 4096 for n in (9, 8))
    v, w = torch.randn(8), torch.tensor(3.3)
    want = gaussian_attention(q.double(), k.double(), v.double(), w.double())
    assert (gaussian_attention(q, k, v, w, backend=asked) - want).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(5, 7), (7,), (2, 1, 5, 7), (2, 3, 1, 7), (3, 1, 1)])
@pytest.mark.parametrize("asked", ["torch", "reference", "cpu"])
def test_mask(shape: tuple, asked: str | None) -> None:
    """Of any broadcast; rows that see nothing give 0 and pass on no gradient."""
    torch.manual_seed(0)
    given = tuple(random(2, 3, n, 4) for n in (5, 7, 7))
    given = (*given, random(8, 4), random(8, 4), random(8))
    mask = torch.rand(shape) > 0.4
    mask.view(-1, shape[-1])[0] = False
    q, k, v, w_q, w_k, w_v = given
    scores = torch.tanh((q @ w_q.T)[..., :, None, :] + (k @ w_k.T)[..., None, :, :]) @ w_v
    seen = mask.expand_as(scores)
    empty = ~seen.any(-1, keepdim=True)
    weights = scores.masked_fill(~seen & ~empty, -torch.inf).softmax(-1).masked_fill(empty, 0)
    got = additive_attention(*given, mask, backend=asked)
    assert empty.any() and not got[empty[..., 0]].any()
    same_gradients(got, weights @ v, given)


@kernels
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_gradients(asked: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_rule, "CHUNK", chunk)
    mask = torch.rand(3, 4) > 0.3
    mask[:, 0], mask[1] = True, False
    given = (random(2, 3, 2), random(2, 4, 3), random(2, 4, 2), random(5, 2), random(5, 3))
    given = (*given, random(5))
    gaussian = functools.partial(gaussian_attention, backend=asked)
    checks = (torch.autograd.gradcheck, torch.autograd.gradgradcheck)
    for check in checks:
        assert check(lambda *t: additive_attention(*t, mask, backend=asked), given)
        assert check(gaussian, (*(random(2, n, 2) for n in (3, 4, 4)), random(2)))
    numbers = (random(3), random(4), random(4), random())
    assert torch.autograd.gradcheck(gaussian, numbers, check_forward_ad=True)


def test_frozen_arguments_and_transforms() -> None:
    given = tuple(random(2, n, 4) for n in (5, 7, 7))
    weights = tuple(random(*s).detach() for s in ((8, 4), (8, 4), (8,)))
    want = additive(*given, *weights)
    dy = torch.randn_like(want)
    torch.testing.assert_close(
        torch.autograd.grad(additive_attention(*given, *weights), given[1], dy),
        torch.autograd.grad(want, given[1], dy),
    )
    mapped = torch.vmap(lambda q, k, v: additive_attention(q, k, v, *weights))(*given)
    torch.testing.assert_close(mapped, want)


@kernels
def test_never_stores_all_pairs(asked: str) -> None:
    """No tensor of queries times keys times width is made, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for t in tree_leaves(out):
                if isinstance(t, Tensor):
                    self.seen = max(self.seen, t.numel())
            return out

    q, k, v = (torch.randn(2, 300, 64, requires_grad=True) for _ in range(3))
    with Largest() as largest:
        additive_attention(
            q, k, v, torch.randn(64, 64), torch.randn(64, 64), torch.randn(64), backend=asked
        ).sum().backward()
        gaussian_attention(q, k, v, torch.tensor(0.5), backend=asked).sum().backward()
    assert largest.seen <= score_rule.CHUNK < 2 * 300 * 300 * 64


@kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_and_autocast(asked: str, dtype: torch.dtype) -> None:
    given = [t.detach() for t in (random(2, 5, 4), random(2, 7, 4), random(2, 7, 3))]
    given += [t.detach() for t in (random(8, 4), random(8, 4), random(8))]
    want = additive(*given)
    got = additive_attention(*(t.to(dtype) for t in given), backend=asked)
    assert got.dtype == dtype and (got - want).abs().max() < 0.1
    with torch.autocast("cpu", dtype):
        floats = [t.float() for t in given]
        assert additive_attention(*floats, backend=asked).dtype == dtype


def test_errors() -> None:
    q, k, v = (torch.randn(2, n, 4) for n in (5, 7, 7))
    w, w_v = torch.randn(8, 4), torch.randn(8)
    for bad in (
        (q[0], k, v, w, w, w_v), (q, k, v[:, 1:], w, w, w_v), (q, k, v, w.T, w, w_v),
        (q, k, v, w, w[:4], w_v), (q, k, v, w, w, w_v[None]), (q, k.double(), v, w, w, w_v),
        (q, k, v, w, w.double(), w_v), (q, k, v, w, w, w_v, torch.ones(5, 7)),
        (q, k, v, w, w, w_v, torch.ones(4, 7, dtype=torch.bool)),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="pydl: additive_attention"):
            additive_attention(*bad)
    for bad in (
        (q, k[..., :3], v, torch.ones(4)), (q, k, v, torch.ones(3)), (q, k, v[:, 1:], w_v[:1]),
        (q, k, v, torch.ones(4).double()),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="pydl: gaussian_attention"):
            gaussian_attention(*bad)
    with pytest.raises(RuntimeError, match=r"additive_attention.*'cpu'.*int64"):
        additive_attention(*(t.long() for t in (q, k, v, w, w, w_v)), backend="cpu")
