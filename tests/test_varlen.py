"""Packed sequences and nested tensors on every backend, against each sequence by itself."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from pydl import functional as F
from pydl.table import judge
from tests import harness

LENGTHS = ((5, 0, 130, 1), (7, 3, 97, 0))
WAYS = [None, "torch", "reference", "cpu", "cuda", "triton"]


def _starts(lengths: tuple[int, ...], device: str) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device)


@pytest.mark.parametrize("named", [
    {}, {"is_causal": True}, {"window": (3, 9), "softcap": 4.0}, {"scale": 0.3, "is_causal": True,
     "causal_alignment": "bottom_right"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("by", WAYS)
def test_as_each_by_itself(by: str | None, named: dict[str, Any]) -> None:
    """Values, sums and gradients, by the judge; sequences without keys give 0."""
    if by in harness.BACKENDS and (why := harness.missing(by)):
        pytest.skip(why)
    where = harness.device(by) if by in harness.BACKENDS else "cpu"
    slow = by is not None and harness.kind(by) == "triton, interpreted"
    queries, keys = [((*n[:1], 6, 2) if slow else n) for n in LENGTHS]
    draw = torch.Generator().manual_seed(0)

    def drawn(total: int, heads: int, width: int) -> Tensor:
        return torch.randn(total, heads, width, generator=draw).to(where).requires_grad_()

    q, k, v = drawn(sum(queries), 4, 16), drawn(sum(keys), 2, 16), drawn(sum(keys), 2, 8)
    dy = torch.randn(sum(queries), 4, 8, generator=draw).to(where)

    def run(backend: str | None, *given: Tensor) -> list[Tensor]:
        out, lse = F.varlen_attention(
            *given, _starts(queries, where), _starts(keys, where), max(queries), max(keys),
            enable_gqa=True, return_lse=True, backend=backend, **named,
        )  # fmt: skip
        seen = torch.where(lse.isfinite(), lse, 0)
        flowing = (out * dy).sum() + seen.sum()
        return [out, seen, *torch.autograd.grad(flowing, given)]

    def alone(*given: Tensor) -> list[Tensor]:
        outs, lses = [], []
        for i, (n, m) in enumerate(zip(queries, keys, strict=True)):
            a, b = sum(queries[:i]), sum(keys[:i])
            parts = (given[0][a : a + n], given[1][b : b + m], given[2][b : b + m])
            out, lse = F.scaled_dot_product_attention(
                *(t.transpose(0, 1) for t in parts), enable_gqa=True, return_lse=True,
                backend="reference", **named,
            )  # fmt: skip
            outs.append(out.transpose(0, 1))
            lses.append(lse)
        out, lse = torch.cat(outs), torch.cat(lses, 1)
        seen = torch.where(lse.isfinite(), lse, 0)
        flowing = (out * dy).sum() + seen.sum()
        return [out, seen, *torch.autograd.grad(flowing, given)]

    found = run(by, q, k, v)
    wanted = alone(*(t.detach().double().requires_grad_() for t in (q, k, v)))
    same = alone(q, k, v)
    for one, want, other in zip(found, wanted, same, strict=True):
        right, error, allowed = judge(one.detach(), want.detach(), other.detach(), 100)
        assert right, (error, allowed)


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("lengths", [(), (4, 2)])
def test_rows_that_no_sequence_covers(lengths: tuple[int, ...], by: str | None) -> None:
    """Before the first sequence, after the last, or all: 0, as are their gradients, and -inf."""
    if by in harness.BACKENDS and (why := harness.missing(by)):
        pytest.skip(why)
    where = harness.device(by) if by in harness.BACKENDS else "cpu"
    x = torch.randn(9, 2, 8, generator=torch.Generator().manual_seed(0))
    starts = _starts(lengths, where) + 2
    inside = torch.arange(9) - 2 < 6 * bool(lengths)
    inside[:2] = False

    def run(way: str | None, rows: Tensor, begin: Tensor) -> list[Tensor]:
        leaves = [rows.to(where).requires_grad_() for _ in range(3)]
        out, lse = F.varlen_attention(
            *leaves, begin, begin.clone(), 4, 4, return_lse=True, backend=way
        )
        flowing = out.square().sum() + torch.where(lse.isfinite(), lse, 0).sum()
        return [out, lse.T, *torch.autograd.grad(flowing, leaves)]

    found, wanted = run(by, x, starts), run("reference", x[inside], starts - 2)
    for i, (one, want) in enumerate(zip(found, wanted, strict=True)):
        torch.testing.assert_close(one[inside.to(where)], want, rtol=1e-4, atol=1e-5)
        assert (one[~inside.to(where)] == (-torch.inf if i == 1 else 0)).all()


def test_compiles_with_one_tensor_of_starts() -> None:
    x = torch.randn(9, 2, 8, requires_grad=True)
    starts = torch.tensor([0, 4, 9])

    def run(x: Tensor, starts: Tensor) -> Tensor:
        return F.varlen_attention(x, x, x, starts, starts, 5, 5, is_causal=True)

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for one in (x, x.detach()):
        torch.testing.assert_close(compiled(one, starts), run(one, starts))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x, starts).square().sum(), x),
        torch.autograd.grad(run(x, starts).square().sum(), x),
    )
    torch._dynamo.reset()


@pytest.mark.parametrize("by", [None, "cpu", "reference"])
@pytest.mark.parametrize("named", [{}, {"is_causal": True}, {"window": 5}, {"softcap": 2.0}],
                         ids=str)  # fmt: skip
def test_nested(by: str | None, named: dict[str, Any]) -> None:
    """Jagged tensors, with gradients to what they were made from."""
    draw = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor(
            [torch.randn(n, 2, 8, generator=draw) for n in (3, 11, 6)], layout=torch.jagged
        )
    leaf = nested.values().clone().requires_grad_()
    offsets = nested.offsets()
    x = torch.nested.nested_tensor_from_jagged(leaf, offsets).transpose(1, 2)
    out = F.scaled_dot_product_attention(x, x, x, backend=by, **named)
    assert out.is_nested and out.shape[1] == 2
    values = out.transpose(1, 2).contiguous().values()
    wanted = torch.cat([
        F.scaled_dot_product_attention(*(leaf[a:b].transpose(0, 1),) * 3, backend="reference",
                                       **named).transpose(0, 1)
        for a, b in ((0, 3), (3, 14), (14, 20))
    ])  # fmt: skip
    torch.testing.assert_close(values, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(values.square().sum(), leaf),
        torch.autograd.grad(wanted.square().sum(), leaf), rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_nested_misfits_are_named() -> None:
    x = torch.randn(2, 2, 5, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        j = torch.nested.nested_tensor(
            [torch.randn(n, 2, 8) for n in (3, 5)], layout=torch.jagged
        ).transpose(1, 2)
    for given, named, message in (
        ((j, x, x), {}, "key is torch.strided of 4 dimensions, wants nested"),
        ((j, j, j), {"return_lse": True}, "return_lse was given with nested"),
    ):
        with pytest.raises(RuntimeError, match=f"scaled_dot_product_attention: .*{message}"):
            F.scaled_dot_product_attention(*given, backend="cpu", **named)


def test_misfits_are_named() -> None:
    x, starts = torch.randn(9, 2, 8), torch.tensor([0, 4, 9])
    for args, named, message in (
        ((x[0], x, x, starts, starts, 5, 5), {}, r"query \(2, 8\), key .*wants three dimensions"),
        ((x, x, x, [0, 9], starts, 5, 5), {}, "cu_seq_q is a list, wants a Tensor"),
        ((x, x, x, starts, starts, 4, 5), {}, "longest sequence has 5 positions, but 4"),
    ):
        with pytest.raises(RuntimeError, match=f"varlen_attention: .*{message}"):
            F.varlen_attention(*args, **named)
