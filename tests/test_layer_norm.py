"""Normalisation where it is hard: large means, rows of one to 65,536 elements, modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pydl
from pydl import check, functional
from pydl.table import TABLE, Case, Make
from tests import harness

LENGTHS = (1, 2, 31, 513, 4097, 8192, 20_000, 65_536)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_a_large_mean(name: str, backend: str) -> None:
    """x = 10^4 + N(0, 1): the variance is not drowned by the mean, however long the row."""
    device = harness.device(backend)
    make = Make(torch.float32, device, "large mean")
    complaints = []
    for n in LENGTHS:
        if harness.kind(backend) != backend and n > 20_000:
            continue
        case = Case(f"{n}", (make(3, n, scale=1.0) + 1e4, (n,), make(n)))
        wanted = harness.run(TABLE[name].reference, case.to(torch.float64), torch.float32)
        got = harness.run(harness.on(TABLE[name], backend), case, torch.float32)
        native = harness.run(TABLE[name].native, case, torch.float32)
        complaints += harness.judged(f"{n}", got[0], wanted[0], native[0])
    assert not complaints, harness.summary(complaints)


@pytest.mark.parametrize("name", ["layer_norm", "add_layer_norm"])
def test_weight_gradient_at_a_large_mean(name: str, backend: str) -> None:
    """Of one row: no other row's error hides what rounding the mean has left out."""
    device = harness.device(backend)
    for n in (64, 4097, 20_000):
        if n > 4097 and harness.kind(backend) == "triton, interpreted":
            continue
        for seed in range(4 if n < 10_000 else 1):
            make = Make(torch.float32, device, f"large {seed}")
            x = make(1, n, scale=1.0) + 1e4
            given = (x,) if name == "layer_norm" else (x, torch.zeros_like(x))
            case = Case(f"{n}", (*given, (n,), make(n)))
            op = TABLE[name]
            wanted = harness.run(op.reference, case.to(torch.float64), torch.float32)[-1]
            got = harness.run(harness.on(op, backend), case, torch.float32)[-1]
            error = (got.double() - wanted).abs().max().item()
            assert error <= 4e-7 * wanted.abs().max().item(), (n, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [16_392, 40_968])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "add_layer_norm"])
def test_rows_of_several_blocks(name: str, n: int, dtype: torch.dtype) -> None:
    """Rows that a cluster of blocks shares on a GPU, the last of which has a smaller part."""
    if why := harness.missing("cuda"):
        pytest.skip(why)
    op, make = TABLE[name], Make(dtype, harness.device("cuda"), f"{name} {n}")
    more = (make(3, n),) if name == "add_layer_norm" else ()
    case = Case(name, (make(3, n), *more, (n,), make(n)))
    got = harness.run(harness.on(op, "cuda"), case, dtype)
    complaints = harness.compare(got, op, case, dtype)
    assert not complaints, harness.summary(complaints)
    again = harness.run(harness.on(op, "cuda"), case, dtype)
    assert all(map(harness.same_bits, got, again))

    if more and dtype is torch.bfloat16:
        return  # the sum is rounded, which fp64 would not show
    # Squares overflow fp32, where torch has no number to be judged by.
    x, *more = (t * 2.0**90 for t in (case.args[0], *more))
    out = harness.on(op, "cuda")(x, *more, (n,))
    wanted = op.reference(x.double(), *(t.double() for t in more), (n,))
    for one, want in zip(*((o if more else (o,)) for o in (out, wanted)), strict=True):
        torch.testing.assert_close(one, want.to(dtype))


@pytest.mark.parametrize("count", [65_536, 70_001])
def test_many_rows(count: int) -> None:
    """More rows than a grid's second dimension has blocks."""
    case = Case("many rows", (Make(torch.float32, seed="rows")(count, 5), (5,)))
    assert all(r.ok for r in check.compare(TABLE["layer_norm"], "cpu", case))


@pytest.mark.parametrize("cls", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("affine", [True, False])
def test_twins(cls: type, affine: bool) -> None:
    """The constructor, parameters, state_dict and repr of torch's, and its values."""
    theirs = cls((3, 10), eps=1e-3, elementwise_affine=affine)
    ours = getattr(pydl.nn, cls.__name__)((3, 10), eps=1e-3, elementwise_affine=affine)
    assert repr(ours) == repr(theirs)
    if affine:
        nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, 10)
    ours.backend = "cpu"
    torch.testing.assert_close(ours(x), theirs(x))


def test_errors() -> None:
    x = torch.randn(3, 4, 5)
    wrong = [
        (lambda: functional.layer_norm(x, (4,), backend="cpu"), r"normalized_shape is \[4\]"),
        (lambda: functional.layer_norm(x, (), backend="cpu"), r"normalized_shape is \[\]"),
        (lambda: functional.layer_norm(x, (5,), torch.ones(4), backend="cpu"),
         r"weight has shape \(4,\), wants \(5,\)"),
        (lambda: functional.layer_norm(x, (5,), torch.ones(5), torch.ones(5).double(),
                                       backend="cpu"), "bias has dtype torch.float64"),
        (lambda: functional.rms_norm(x, (5,), torch.ones(5).half(), backend="cpu"),
         "weight has dtype torch.float16, wants the input's"),
    ]  # fmt: skip
    for call, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_saves_no_more_than_it_needs() -> None:
    """x, the weights, and a mean and a scale a row."""
    x, weight = torch.randn(64, 256, requires_grad=True), torch.randn(256, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        functional.layer_norm(x, (256,), weight, backend="cpu")
    assert sum(t.numel() for t in saved if t is not None) == 64 * 256 + 256 + 2 * 64


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_the_output_may_be_changed_in_place(name: str) -> None:
    x = torch.randn(3, 5, 8, requires_grad=True)
    y = getattr(functional, name)(x, (8,), backend="cpu")
    y += 1
    torch.nn.functional.relu(y, inplace=True).sum().backward()
    assert x.grad is not None


def test_replace_knows_them() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.RMSNorm(16))
    x = torch.randn(5, 8)
    wanted = model(x)
    report = pydl.replace(model, backend="cpu")
    assert [type(m) for m in model[1:]] == [pydl.nn.LayerNorm, pydl.nn.RMSNorm]
    assert len(list(report.replaced)) == 3
    torch.testing.assert_close(model(x), wanted)


def test_the_hessian_is_symmetric() -> None:
    """Of x and the weight."""
    x, weight = torch.randn(3, 7).double(), torch.randn(7).double()

    def loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (7,), weight, backend="cpu").square().sum()

    hessian = torch.func.hessian(loss, argnums=(0, 1))(x, weight)
    torch.testing.assert_close(hessian[0][1], hessian[1][0].permute(1, 2, 0))
