"""Products of matrices on the CPU: right, and of the same bits for any threads and addresses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pydl.backends import kernel
from pydl.ops.product import product, projected

SHAPES = [
    (1, 1, 1, 1), (2, 9, 17, 33), (3, 97, 300, 65), (1, 200, 1030, 64), (0, 2, 3, 4), (1, 0, 3, 4),
    (2, 3, 0, 4), (2, 3, 4, 0),
]  # fmt: skip


def _factors(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
    batch, rows, depth, columns = shape
    draw = torch.Generator().manual_seed(sum(shape))
    a = torch.randn(batch, rows, depth, generator=draw, dtype=dtype)
    b = torch.randn(batch, depth, columns, generator=draw, dtype=dtype)
    if layout == "transposed":
        a, b = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (a, b))
    elif layout == "expanded":
        a, b = a[:1].expand_as(a), b[..., :1].expand_as(b)
    elif layout == "sliced":
        a, b = (torch.stack([t, t], -1).flatten(-2)[..., ::2] for t in (a, b))
    return a, b


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    """As exact as a sum of that many products is; zeros of an empty one."""
    a, b = _factors(shape, dtype, layout)
    got = product("cpu", a, b)
    want = a.double() @ b.double()
    assert got.dtype == dtype and got.shape == want.shape
    bound = torch.finfo(dtype).eps * (2 + shape[2] ** 0.5) * (a.abs().double() @ b.abs().double())
    assert ((got - want).abs() <= bound).all()


def test_same_bits() -> None:
    """With one thread or two, and wherever the factors lie."""
    a, b = _factors((2, 131, 519, 77), torch.float32, "contiguous")
    want = product("cpu", a, b)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for shift in (0, 1, 5):
                moved = [torch.empty(t.numel() + shift)[shift:].view_as(t).copy_(t) for t in (a, b)]
                assert torch.equal(product("cpu", *moved), want), (count, shift)
    finally:
        torch.set_num_threads(threads)


def test_infinite() -> None:
    """What is infinite or no number stays in its row and column."""
    a, b = _factors((1, 5, 4, 7), torch.float32, "contiguous")
    a[0, 1, 2], a[0, 3, 0] = float("inf"), float("nan")
    got, want = product("cpu", a, b), a @ b
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_linear(dtype: torch.dtype) -> None:
    """torch's linear and its gradients, rounded once."""
    x, weight = _factors((2, 9, 17, 33), torch.float64, "contiguous")
    x, weight = x.to(dtype).requires_grad_(), weight[0].t().to(dtype).requires_grad_()
    y = projected("cpu", x, weight)
    dy = torch.ones_like(y)
    found = [y, *torch.autograd.grad(y, (x, weight), dy)]
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    wanted = torch.nn.functional.linear(x64, weight64)
    want = [wanted, *torch.autograd.grad(wanted, (x64, weight64), dy.double())]
    for one, other in zip(found, want, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(
            one.detach().double(), other.detach(), rtol=torch.finfo(dtype).eps, atol=1e-5
        )
    if dtype == torch.float64:
        run = lambda x, w: projected("cpu", x, w)  # noqa: E731
        assert torch.autograd.gradcheck(run, (x, weight))
        assert torch.autograd.gradgradcheck(run, (x, weight))


@pytest.mark.parametrize("shape", [(1, 0, 0), (0, 3, 2), (2, 3, 0), (2, 0, 3)], ids=str)
def test_linear_of_nothing(shape: tuple[int, int, int]) -> None:
    rows, width, out = shape
    x, weight = torch.ones(rows, width, requires_grad=True), torch.ones(out, width)
    weight.requires_grad_()
    y = projected("cpu", x, weight)
    assert torch.equal(y, torch.zeros(rows, out) + width)
    for grad, like in zip(torch.autograd.grad(y.sum(), (x, weight)), (x, weight), strict=True):
        assert grad.shape == like.shape


def test_misfits_are_named() -> None:
    run = kernel("cpu", "product")
    ones = torch.ones
    for out, a, b, what in (
        (ones(1, 2, 3), ones(1, 2, 4), ones(1, 5, 3), r"\(batch, M, N\), \(batch, M, K\)"),
        (ones(2, 3), ones(1, 2, 4), ones(4, 3), r"\(batch, M, N\), \(batch, M, K\)"),
        (ones(1, 3, 2).mT, ones(1, 2, 4), ones(1, 4, 3), "dense memory"),
        (ones(1, 2, 3), ones(1, 2, 4).double(), ones(1, 4, 3), "of one dtype"),
        (*(ones(1, 1, 1).half(),) * 3, "float32 or float64"),
    ):
        with pytest.raises(RuntimeError, match=f"product: wants .*{what}"):
            run(out, a, b, None)
