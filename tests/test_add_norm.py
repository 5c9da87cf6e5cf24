"""Residual and normalisation in one pass: what the table's loops do not ask of two outputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import pydl
from pydl import functional
from pydl.table import TABLE, Case, Op
from tests import harness

OPS = [TABLE["add_layer_norm"], TABLE["add_rms_norm"]]


def _seed(backend: str) -> torch.Tensor:
    return torch.tensor([7, 11], device=harness.device(backend))


def _one_output(op: Callable, case: Case, dtype: torch.dtype, which: int) -> list[torch.Tensor]:
    """Gradients where something flows back from one of the outputs alone."""
    given = harness.leaves(case)
    out = harness.called(op, case, given)[which]
    grads = torch.autograd.grad(
        out, given, harness.upstream(out.detach(), dtype), allow_unused=True
    )
    return [torch.zeros_like(t) if g is None else g for t, g in zip(given, grads, strict=True)]


@pytest.mark.parametrize("row", OPS, ids=lambda row: row.name)
@pytest.mark.parametrize("which", [0, 1])
def test_one_output_alone(row: Op, which: int, backend: str) -> None:
    """Backward through y alone, as at a network's end, and through the sum alone."""
    complaints = []
    for dtype in (torch.float32, torch.bfloat16):
        drawn = row.cases(dtype, harness.device(backend))
        for case in harness.thinned(drawn, backend, dtype):
            if not harness.moderate(case, harness.affordable(backend, 6000)):
                continue
            got = _one_output(harness.on(row, backend), case, dtype, which)
            wanted = _one_output(row.reference, case.to(torch.float64), dtype, which)
            native = _one_output(row.native, case, dtype, which)
            for i, x in enumerate(case.tensors()):
                terms = case.args[0].numel() / max(1, x.numel())
                complaints += harness.judged_gradient(
                    f"{dtype} {case.label}: gradient {i}", got[i], wanted[i], native[i], x, terms,
                    whole=True,
                )  # fmt: skip
    assert not complaints, harness.summary(complaints)


@pytest.mark.parametrize("row", OPS, ids=lambda row: row.name)
def test_what_is_normalised_is_what_is_returned(row: Op, backend: str) -> None:
    """y is the plain norm of the sum as it is stored: bf16 rounds before, and not only after."""
    plain = functional.layer_norm if row.name == "add_layer_norm" else functional.rms_norm
    x = torch.randn(8, 72, device=harness.device(backend)).bfloat16()
    residual = torch.randn_like(x) * 64
    y, new = row.function(x, residual, (72,), backend=backend)
    assert torch.equal(new, residual + x)
    assert torch.equal(y, plain(new, (72,), backend=backend))
    unrounded = plain(residual.float() + x.float(), (72,), backend=backend).bfloat16()
    assert not torch.equal(y, unrounded)


def test_the_mask_is_that_of_the_other_ops(backend: str) -> None:
    """One seed drops the same elements here, in `bias_act` and in backward."""
    x = torch.ones(9, 30, device=harness.device(backend), requires_grad=True)
    residual = torch.zeros_like(x, requires_grad=True)
    seed = _seed(backend)
    _, new = functional.add_layer_norm(
        x, residual, (30,), dropout_p=0.3, seed=seed, backend=backend
    )
    mask = functional.bias_act(x.detach(), None, "identity", 0.3, seed=seed, backend=backend)
    assert torch.equal(new, mask)
    dx, dresidual = torch.autograd.grad(new.sum(), (x, residual))
    assert torch.equal(dx, mask) and torch.equal(dresidual, torch.ones_like(x))


def test_fresh_masks_follow_torchs_generator() -> None:
    x = torch.ones(4, 1024)
    call = lambda: functional.add_rms_norm(x, x, (1024,), dropout_p=0.5, backend="cpu")[1]  # noqa: E731
    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(call(), first) and not torch.equal(first, second)


def test_saves_the_sum_and_two_numbers_a_row() -> None:
    """Not the input, nor the residual that came in, nor a mask."""
    x, residual = (torch.randn(64, 256, requires_grad=True) for _ in range(2))
    weight = torch.randn(256, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, new = functional.add_layer_norm(
            x, residual, (256,), weight, dropout_p=0.5, backend="cpu"
        )
    assert sum(t.numel() for t in saved if t is not None) == 64 * 256 + 256 + 2 * 64
    assert any(t.data_ptr() == new.data_ptr() for t in saved)


def test_gradients_do_not_share_memory_with_each_other() -> None:
    """Without dropout both inputs get one gradient; accumulated into two leaves it is two."""
    x, residual = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    y, new = functional.add_layer_norm(x, residual, (8,), backend="cpu")
    (y.square().sum() + new.sum()).backward()
    before = residual.grad.clone()  # type: ignore[union-attr]
    assert torch.equal(x.grad, before)
    x.grad.zero_()  # type: ignore[union-attr]
    assert torch.equal(residual.grad, before)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", OPS, ids=lambda row: row.name)
def test_a_stream_in_fp32(row: Op, half: torch.dtype, backend: str) -> None:
    """The residual may be fp32 beside an input of 16 bits: nothing of it is rounded."""
    device = harness.device(backend)
    x = torch.randn(5, 40, device=device).to(half).requires_grad_()
    residual = torch.randn(5, 40, device=device, requires_grad=True)
    y, new = row.function(x, residual, (40,), backend=backend)
    assert (y.dtype, new.dtype) == (half, torch.float32)
    assert torch.equal(new, residual + x.float())
    dx, dresidual = torch.autograd.grad((y, new), (x, residual), (torch.ones_like(y), new))
    assert (dx.dtype, dresidual.dtype) == (half, torch.float32)
    assert torch.equal(dx, dresidual.to(half))


def test_blocks_of_a_transformer(backend: str) -> None:
    """Twelve sums one after the other equal torch's."""
    torch.manual_seed(0)
    device = harness.device(backend)
    weights = [torch.randn(48, 48, device=device) / 7 for _ in range(12)]
    x = torch.randn(6, 48, device=device)

    def through(op: Callable, **options: object) -> list[torch.Tensor]:
        first = x.clone().requires_grad_()
        y, residual = first, torch.zeros_like(first)
        for weight in weights:
            y, residual = op(y @ weight, residual, (48,), **options)
        return [y.detach(), residual.detach(), *torch.autograd.grad(y.square().sum(), first)]

    row = TABLE["add_layer_norm"]
    wanted = through(row.native)
    for a, b in zip(through(row.function, backend=backend), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, plain", [("AddLayerNorm", nn.LayerNorm), ("AddRMSNorm", nn.RMSNorm)]
)
def test_modules(name: str, plain: type) -> None:
    """Parameters and state_dict are the plain module's; dropout in training only."""
    theirs = plain((3, 10), eps=1e-3)
    nn.init.normal_(theirs.weight)
    ours = getattr(pydl.nn, name)((3, 10), eps=1e-3, dropout_p=0.25)
    ours.load_state_dict(theirs.state_dict())
    ours.backend = "cpu"
    assert "dropout_p=0.25" in repr(ours)
    x, residual = torch.randn(4, 3, 10), torch.randn(4, 3, 10)
    y, new = ours.eval()(x, residual)
    torch.testing.assert_close(new, x + residual)
    torch.testing.assert_close(y, theirs(x + residual))
    dropped = ours.train()(torch.ones(400, 3, 10), torch.zeros(400, 3, 10))[1] == 0
    assert 0.2 < float(dropped.float().mean()) < 0.3
    with pytest.raises(ValueError, match=f"{name}: dropout_p is -1"):
        getattr(pydl.nn, name)(8, dropout_p=-1)


def test_errors() -> None:
    x = torch.randn(3, 4)
    op = functional.add_layer_norm
    wrong: list[tuple[Callable, str]] = [
        (lambda: op(x, x[:2], (4,)), r"residual is torch.float32 \(2, 4\).*wants.*\(3, 4\)"),
        (lambda: op(x, x.double(), (4,), backend="cpu"), "residual is torch.float64"),
        (lambda: op(x, x.half(), (4,), backend="cpu"), "residual is torch.float16"),
        (lambda: op(x.half(), x.bfloat16(), (4,)), "residual is torch.bfloat16"),
        (lambda: op(x.double(), x, (4,)), "residual is torch.float32.*wants.*float64"),
        (lambda: op(x, x.to("meta"), (4,)), "residual is.*on meta, wants.*on cpu"),
        (lambda: op(x, x, (3,), backend="cpu"), r"normalized_shape is \[3\]"),
        (lambda: op(x, x, (4,), torch.ones(5)), r"weight has shape \(5,\)"),
    ]
    for call, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            call()
    for training in (True, False):
        with pytest.raises(ValueError, match="add_layer_norm: dropout_p is 1"):
            op(x, x, (4,), dropout_p=1.5, training=training)
