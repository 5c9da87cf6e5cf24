"""The linear layer: what it keeps for backward, whom it leaves to torch, its module."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import pydl
from pydl import functional as F
from pydl.backends import MissingKernel
from pydl.ops.product import SHORT, measured_as
from tests import harness


@contextmanager
def kept() -> Iterator[list[Tensor]]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


def _call(dtype: torch.dtype = torch.float32) -> tuple[Tensor, nn.Linear]:
    torch.manual_seed(0)
    layer = nn.Linear(24, 17, dtype=dtype)
    return torch.randn(5, 9, 24, dtype=dtype, requires_grad=True), layer


def _gradients(y: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y.square().sum(), of)


def test_frozen_weights_keep_no_input() -> None:
    """As with torch, an input is kept for a parameter that learns alone."""
    x, layer = _call()
    layer.requires_grad_(False)
    with kept() as found:
        y = F.linear(x, layer.weight, layer.bias, backend="cpu")
    assert not any(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in found)
    torch.testing.assert_close(_gradients(y, x), _gradients(layer(x), x))
    wanted = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0].square().sum()
    y = F.linear(x, layer.weight, layer.bias, backend="cpu")
    twice = torch.autograd.grad(y.square().sum(), x, create_graph=True)[0].square().sum()
    torch.testing.assert_close(
        torch.autograd.grad(twice, x), torch.autograd.grad(wanted, x), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("learns", [True, False])
def test_a_weight_written_over_is_seen(learns: bool) -> None:
    x, layer = _call()
    layer.requires_grad_(learns)
    y = F.linear(x, layer.weight, layer.bias, backend="cpu")
    with torch.no_grad():
        layer.weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_learns_in_part() -> None:
    """The bias alone, the weight alone, and an input without a gradient."""
    x, layer = _call()
    of = {"input": x, "weight": layer.weight, "bias": layer.bias}
    for names in (("bias",), ("weight",), ("weight", "bias"), ("input", "bias")):
        for name, tensor in of.items():
            tensor.requires_grad_(name in names)
        wanted = [of[name] for name in names]
        y = F.linear(x, layer.weight, layer.bias, backend="cpu")
        torch.testing.assert_close(
            _gradients(y, *wanted), _gradients(layer(x), *wanted), rtol=1e-5, atol=1e-4
        )


def test_few_rows_are_measured_apart() -> None:
    names = {rows: measured_as("linear", torch.empty(rows, 8)) for rows in (0, 1, SHORT - 1, SHORT)}
    assert names == {0: "linear_short", 1: "linear_short", 31: "linear_short", 32: "linear"}
    assert measured_as("linear", torch.empty(8)) == "linear_short"
    assert measured_as("linear", torch.empty(4, SHORT, 0)) == "linear_short"


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_no_kernels_for_a_gpu(name: str) -> None:
    """The function says so; modules, which other ops have kernels for, take torch's product."""
    if why := harness.missing(name):
        pytest.skip(why)
    x, layer = _call()
    with pytest.raises(MissingKernel, match=f"linear: backend '{name}'.* 'torch'"):
        F.linear(x, layer.weight, backend=name)
    wanted, twin = layer(x), pydl.nn.Linear(24, 17)
    twin.load_state_dict(layer.state_dict())
    twin.backend = name
    assert torch.equal(twin(x), wanted)


def test_misfits_are_named() -> None:
    ones = torch.ones
    for x, weight, bias in (
        (ones(2, 3), ones(4, 5), None), (ones(2, 3), ones(4, 3), ones(3)),
        (ones(()), ones(4, 3), None), (ones(2, 3), ones(1, 4, 3), None),
        (ones(2, 3), ones(3), ones(1)),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"linear: got input .*wants \(\.\.\., K\)"):
            F.linear(x, weight, bias, backend="cpu")
    with pytest.raises(RuntimeError, match=r"linear: backend 'cpu' cannot serve.*dtype"):
        F.linear(ones(2, 3), ones(4, 3).double(), backend="cpu")


@pytest.mark.parametrize("asked", [None, "cpu"])
def test_autocast(asked: str | None) -> None:
    x, layer = _call()
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, layer.weight, layer.bias, backend=asked)
        wanted = layer(x)
    assert y.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(y, wanted, rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


def test_module() -> None:
    """A twin: constructor, state and words of torch's."""
    torch.manual_seed(0)
    theirs = nn.Linear(40, 30, bias=False)
    torch.manual_seed(0)
    ours = pydl.nn.Linear(40, 30, bias=False)
    assert repr(ours) == repr(theirs) and isinstance(ours, nn.Linear)
    for ours_one, other in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert ours_one[0] == other[0] and torch.equal(ours_one[1], other[1])
    x = torch.randn(64, 40)
    for backend in (None, "cpu", "torch", "reference"):
        ours.backend = backend
        torch.testing.assert_close(ours(x), theirs(x))
    assert torch.equal(copy.deepcopy(ours)(x), ours(x))


def test_replaced_where_attention_reads_it() -> None:
    """The projection of torch's attention, which is not called, is left in peace."""
    report = pydl.replace(nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8)))
    assert [one.path for one in report.replaced] == ["0", "1"] and not report.skipped


def test_many_copies_at_once() -> None:
    """Under torch.func the definition computes, which it can see through."""
    layers = [nn.Linear(6, 5) for _ in range(3)]
    twins = [pydl.nn.Linear(6, 5) for _ in layers]
    for twin, layer in zip(twins, layers, strict=True):
        twin.load_state_dict(layer.state_dict())
        twin.backend = "cpu"
    stacked, _ = torch.func.stack_module_state(twins)
    x = torch.randn(4, 6)

    def run(state: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(twins[0], state, (x,))

    wanted = torch.stack([layer(x) for layer in layers])
    torch.testing.assert_close(torch.func.vmap(run)(stacked), wanted)


def test_products_without_numbers() -> None:
    x, layer = _call()
    nothing = F.linear(x[:0], layer.weight, layer.bias, backend="cpu")
    assert nothing.shape == (0, 9, 17)
    grads = torch.autograd.grad(nothing.sum(), (layer.weight, layer.bias))
    assert not any(map(torch.count_nonzero, grads))
    assert torch.equal(
        F.linear(x[..., :0], layer.weight[:, :0], layer.bias, backend="cpu"),
        TF.linear(x[..., :0], layer.weight[:, :0], layer.bias),
    )


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("shape", [(9,), (4, 9), (3, 4, 9)], ids=str)
def test_a_result_may_be_changed_in_place(shape: tuple[int, ...], learns: bool) -> None:
    layer = nn.Linear(9, 5).requires_grad_(learns)
    x = torch.randn(shape, requires_grad=True)
    found = []
    for run in (layer, lambda x: F.linear(x, layer.weight, layer.bias, backend="cpu")):
        y = run(x)
        y += 1
        y.relu_()
        found.append([y, *torch.autograd.grad(y.square().sum(), x)])
    torch.testing.assert_close(found[1], found[0])


def test_saves_what_torch_saves() -> None:
    """So that what is saved no more may be written over."""
    x, layer = _call()
    x = x.detach()
    losses = [F.linear(x, layer.weight, layer.bias, backend="cpu").sum() for _ in range(2)]
    losses[0].backward()
    with torch.no_grad():
        layer.weight.add_(1)
        layer.bias.add_(1)
    losses[1].backward()
    layer.weight.requires_grad_(False)
    with kept() as found:
        F.linear(x, layer.weight, layer.bias, backend="cpu")
    assert not found


def test_batched_gradients() -> None:
    x, layer = _call()
    y = F.linear(x, layer.weight, layer.bias, backend="cpu")
    dys = torch.randn(3, *y.shape)
    of = (x, layer.weight, layer.bias)
    found = torch.autograd.grad(y, of, dys, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, of, dy, retain_graph=True) for dy in dys]
    for one, wanted in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(wanted))


@pytest.mark.parametrize("asked", [None, "cpu"])
def test_traced(asked: str | None) -> None:
    """By torch.jit.trace: with gradients, and for other sizes."""
    layer = nn.Linear(256, 64)
    model = nn.Sequential(copy.deepcopy(layer))
    pydl.replace(model, backend=asked, fuse=False)
    with pytest.warns(torch.jit.TracerWarning) if asked else nullcontext():
        traced = torch.jit.trace(model, torch.randn(100, 256))
    for rows in (100, 7):
        x = torch.randn(rows, 256, requires_grad=True)
        torch.testing.assert_close(_gradients(traced(x), x), _gradients(layer(x), x))


@pytest.mark.parametrize("asked", [None, "cpu"])
def test_compiled(asked: str | None) -> None:
    """One graph for any number of rows; gradients of torch.func's too."""
    layer = nn.Linear(256, 64)
    model = nn.Sequential(copy.deepcopy(layer))
    pydl.replace(model, backend=asked, fuse=False)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for rows in (20, 50, 70, 90, 300, 2000):
        x = torch.randn(rows, 256)
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count <= 2

    def gradients(run: nn.Module) -> dict[str, Tensor]:
        x = torch.ones(100, 256)

        def loss(state: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(run, state, (x,)).square().sum()

        state = {name.removeprefix("0."): p.detach() for name, p in run.named_parameters()}
        state = {("0." if isinstance(run, nn.Sequential) else "") + n: p for n, p in state.items()}
        found = torch.compile(torch.func.grad(loss), backend="aot_eager")(state)
        return {name.removeprefix("0."): g for name, g in found.items()}

    torch._dynamo.reset()
    torch.testing.assert_close(gradients(model), gradients(layer))
    torch._dynamo.reset()


def test_exported_for_any_size() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 64))
    wanted = copy.deepcopy(model)
    pydl.replace(model, fuse=False)
    rows = torch.export.Dim("rows", min=2, max=1024)
    program = torch.export.export(model, (torch.randn(100, 256),), dynamic_shapes=({0: rows},))
    x = torch.randn(3, 256)
    y = program.module()(x)
    torch.testing.assert_close(y, wanted(x))
    y.sum().backward()


def test_what_torch_alone_takes() -> None:
    """By the automatic choice: nested tensors, subclasses, and what is no tensor."""
    layer = pydl.nn.Linear(256, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.randn(n, 256) for n in (20, 60)])
    assert layer(nested).is_nested

    class Sub(Tensor):
        pass

    for backend in (None, "cpu"):
        layer.backend = backend
        assert type(layer(torch.randn(100, 256).as_subclass(Sub))) is Sub
        with pytest.raises(TypeError, match="must be Tensor"):
            layer("x")


def test_undo_after_a_parametrisation() -> None:
    """torch's changes the class of the twin, which is left in place then."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    second = model[1]
    report = pydl.replace(model)
    torch.nn.utils.parametrizations.weight_norm(model[0])
    wanted = model(torch.ones(2, 6))
    report.undo()
    assert model[1] is second
    torch.testing.assert_close(model(torch.ones(2, 6)), wanted)
