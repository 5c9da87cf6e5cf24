"""Normalisations of channels as modules: twins of torch.nn's, and batch normalisation with what
follows it."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import pydl
import pydl.nn as P
from pydl.ops.bias_act import ACTIVATIONS

BACKENDS: list[str | None] = [None, "reference", "cpu"]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Twin(NamedTuple):
    """A module by its name in torch.nn and ours, and the shape of an input."""

    name: str
    args: tuple[int, ...]
    shape: tuple[int, ...]
    kwargs: dict[str, Any] = {}  # noqa: RUF012

    def make(self) -> tuple[nn.Module, nn.Module]:
        """(ours, torch's), of equal and not trivial parameters."""
        torch.manual_seed(0)
        ours, theirs = (
            getattr(package, self.name)(*self.args, dtype=torch.float64, **self.kwargs)
            for package in (P, nn)
        )
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.uniform_(-2, 2)
        ours.load_state_dict(theirs.state_dict())
        return ours, theirs


TRACKED = {"affine": True, "track_running_stats": True}
TWINS = [
    Twin("BatchNorm1d", (6,), (5, 6)),
    Twin("BatchNorm1d", (6,), (5, 6, 7), {"momentum": None}),
    Twin("BatchNorm2d", (6,), (4, 6, 3, 5)),
    Twin("BatchNorm2d", (6,), (4, 6, 3, 5), {"affine": False, "momentum": None}),
    Twin("BatchNorm2d", (6,), (4, 6, 3, 5), {"track_running_stats": False}),
    Twin("BatchNorm3d", (6,), (2, 6, 2, 3, 4), {"eps": 0.1, "momentum": 0.3}),
    Twin("GroupNorm", (3, 6), (4, 6, 5)),
    Twin("GroupNorm", (2, 6), (4, 6, 3, 5), {"affine": False, "eps": 0.1}),
    Twin("InstanceNorm1d", (6,), (4, 6, 7)),
    Twin("InstanceNorm1d", (6,), (6, 7), {"momentum": 0.3, **TRACKED}),
    Twin("InstanceNorm2d", (6,), (4, 6, 3, 5), TRACKED),
    Twin("InstanceNorm2d", (6,), (6, 3, 5), {"affine": True, "eps": 0.1}),
    Twin("InstanceNorm3d", (6,), (2, 6, 2, 3, 4), {"momentum": 0.9, **TRACKED}),
    Twin("InstanceNorm3d", (6,), (6, 2, 3, 4), TRACKED),
    Twin("SyncBatchNorm", (6,), (4, 6, 3, 5), {"momentum": None}),
    Twin("SyncBatchNorm", (6,), (5, 6), {"track_running_stats": False}),
]
IDS = ["-".join([t.name, *map(str, t.kwargs), str(len(t.shape))]) for t in TWINS]
twins = pytest.mark.parametrize("twin", TWINS, ids=IDS)
backends = pytest.mark.parametrize("asked", BACKENDS)


def inputs(shape: tuple[int, ...], steps: int = 3) -> Iterator[tuple[Tensor, Tensor]]:
    """An input and a gradient of the output for each step; moments differ by channel and step."""
    torch.manual_seed(1)
    for i in range(steps):
        x = torch.randn(shape, dtype=torch.float64)
        yield (
            x * (i + 1) + torch.linspace(-3, 9, x.numel(), dtype=torch.float64).view(shape),
            (torch.randn_like(x)),
        )


def passed(module: nn.Module, x: Tensor, dy: Tensor, *more: Tensor) -> list[Tensor]:
    """The output, the gradients of inputs and parameters, and the buffers after the call."""
    leaves = [t.clone().requires_grad_() for t in (x, *more)]
    y = module(*leaves)
    grads = torch.autograd.grad(y, [*leaves, *module.parameters()], dy)
    return [y, *grads, *(buffer.clone() for buffer in module.buffers())]


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, **EXACT)


@backends
@twins
def test_trains_and_evaluates_as_torchs(twin: Twin, asked: str | None) -> None:
    """Output, gradients and buffers, over several steps of training and in evaluation."""
    ours, theirs = twin.make()
    ours.backend = asked
    before = [b.clone() for b in theirs.buffers() if b.is_floating_point()]
    for x, dy in inputs(twin.shape):
        same(passed(ours, x, dy), passed(theirs, x, dy))
    for old, new in zip(before, theirs.buffers(), strict=False):
        assert not torch.equal(old, new), "the comparison says nothing of buffers that stay"
    for x, dy in inputs(twin.shape, 1):
        same(passed(ours.eval(), x, dy), passed(theirs.eval(), x, dy))


@twins
def test_is_its_torch_class(twin: Twin) -> None:
    ours, theirs = twin.make()
    assert isinstance(ours, getattr(nn, twin.name))
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for x, dy in inputs(twin.shape, 1):
        passed(ours, x, dy)
        theirs.load_state_dict(ours.state_dict())
        same(list(theirs.buffers()), list(ours.buffers()))
        passed(theirs, x, dy)
        ours.load_state_dict(theirs.state_dict())
        same(ours.eval()(x), theirs.eval()(x))


@twins
def test_the_attribute_decides_who_computes(twin: Twin) -> None:
    ours, _ = twin.make()
    ours.backend = "nobody"
    with pytest.raises(ValueError, match="backend is 'nobody'"):
        ours(torch.randn(twin.shape, dtype=torch.float64))


@twins
def test_copies(twin: Twin) -> None:
    module, _ = twin.make()
    module.backend = "reference"
    for x, dy in inputs(twin.shape, 1):
        passed(module, x, dy)
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    copies = (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(stored, weights_only=False),
    )
    for made in copies:
        assert repr(made) == repr(module) and made.backend == "reference"
        same(made.state_dict(), module.state_dict())
        same(made.eval()(x), copy.deepcopy(module).eval()(x))


@backends
@pytest.mark.parametrize(
    "name, args, kwargs, shape",
    [
        ("BatchNorm1d", (6,), {}, (2, 6, 3, 3)),
        ("BatchNorm2d", (6,), {}, (2, 6, 3)),
        ("BatchNorm3d", (6,), {}, (2, 6, 3, 3)),
        ("BatchNorm1d", (6,), {}, (1, 6)),
        ("BatchNorm2d", (6,), {}, (1, 6, 1, 1)),
        ("BatchNorm2d", (5,), {}, (2, 6, 3, 3)),
        ("GroupNorm", (2, 6), {}, (2, 4, 3)),
        ("GroupNorm", (4, 6), {}, None),
        ("InstanceNorm1d", (6,), {}, (2, 6, 3, 3)),
        ("InstanceNorm2d", (6,), {}, (2, 6)),
        ("InstanceNorm3d", (6,), {}, (2, 6, 3)),
        ("InstanceNorm1d", (6,), {}, (2, 6, 1)),
        ("InstanceNorm2d", (5,), {"affine": True}, (2, 6, 3, 3)),
        ("SyncBatchNorm", (6,), {}, (6,)),
        ("SyncBatchNorm", (6,), {}, (2, 0, 3)),
        ("SyncBatchNorm", (6,), {}, (1, 6)),
    ],
)
def test_errors_are_torchs(
    name: str, args: tuple, kwargs: dict, shape: tuple | None, asked: str | None
) -> None:
    """Of torch's type, and where it is a ValueError with torch's words in it."""

    def error(package: Any) -> Exception:
        with pytest.raises((ValueError, RuntimeError)) as caught:
            module = getattr(package, name)(*args, **kwargs)
            if package is P:
                module.backend = asked
            module(torch.randn(shape or (1,)))
        return caught.value

    ours, theirs = error(P), error(nn)
    assert type(ours) is type(theirs)
    assert not isinstance(theirs, ValueError) or str(theirs) in str(ours)


class Composed(nn.Module):
    """Batch normalisation, residual and activation by torch."""

    def __init__(self, norm: nn.Module, act: str, act_param: float | None) -> None:
        super().__init__()
        self.norm, self.act, self.act_param = norm, act, act_param

    def forward(self, x: Tensor, *residual: Tensor) -> Tensor:
        _, default, _, native = ACTIVATIONS[self.act]
        y = sum(residual, self.norm(x))
        return native(y, default if self.act_param is None else self.act_param)


@backends
@pytest.mark.parametrize("act", [*ACTIVATIONS, "elu 0.5"])
@pytest.mark.parametrize("shape", [(5, 6), (3, 6, 2, 5)], ids=str)
def test_batch_norm_act(act: str, shape: tuple[int, ...], asked: str | None) -> None:
    """Against torch's parts, with a residual and without, trained and evaluated."""
    name, param = act.split()[0], float(act.split()[1]) if " " in act else None
    plain = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(6, dtype=torch.float64)
    nn.init.uniform_(plain.weight, -2, 2)
    ours = P.BatchNormAct(6, name, act_param=param, dtype=torch.float64)
    ours.load_state_dict(plain.state_dict())
    ours.backend = asked
    theirs = Composed(plain, name, param)
    for step, (x, dy) in enumerate(inputs(shape, 4)):
        for module in (ours, theirs):
            module.train(step < 3)
        residual = [x.flip(0)] if step % 2 else []
        same(passed(ours, x, dy, *residual), passed(theirs, x, dy, *residual))
    assert list(ours.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("asked", BACKENDS)
def test_batch_norm_act_without_a_bias(asked: str | None) -> None:
    """Where torch's has none, ours has none; where torch does not know the word, neither do we."""
    if "bias" not in inspect.signature(nn.BatchNorm2d).parameters:
        with pytest.raises(TypeError, match="bias"):
            P.BatchNormAct(6, bias=False)
        return
    plain = nn.BatchNorm2d(6, bias=False, dtype=torch.float64)
    nn.init.uniform_(plain.weight, -2, 2)
    ours = P.BatchNormAct(6, "silu", dtype=torch.float64, bias=False)
    ours.load_state_dict(plain.state_dict())
    ours.backend = asked
    theirs = Composed(plain, "silu", None)
    for x, dy in inputs((3, 6, 2, 5), 2):
        same(passed(ours, x, dy), passed(theirs, x, dy))
    assert ours.bias is None and list(ours.state_dict()) == list(plain.state_dict())


def test_batch_norm_act_shows_and_checks() -> None:
    module = P.BatchNormAct(6, "elu", momentum=None, act_param=0.5)
    assert repr(module).endswith("act='elu', act_param=0.5)") and "momentum=None" in repr(module)
    with pytest.raises(ValueError, match="'nothing'"):
        P.BatchNormAct(6, "nothing")
    with pytest.raises(ValueError, match="act_param"):
        P.BatchNormAct(6, "relu", act_param=0.5)
    with pytest.raises(ValueError, match="BatchNormAct"):
        module(torch.randn(6))
    x = torch.randn(3, 6)
    same(copy.deepcopy(module)(x), pickle.loads(pickle.dumps(module))(x))


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.GroupNorm(2, 6),
        nn.Conv2d(6, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Flatten(2),
        nn.BatchNorm1d(4, momentum=None),
    ).double()  # fmt: skip


@backends
def test_replace(asked: str | None) -> None:
    """A network trains, evaluates and is stored alike, with its normalisations replaced."""
    torch.manual_seed(0)
    plain = network()
    fused = copy.deepcopy(plain)
    report = pydl.replace(fused, backend=asked)
    assert sum("Norm" in one.new for one in report.replaced) == 4 and not report.skipped
    for x, _ in inputs((4, 3, 9, 9)):
        for model in (plain, fused):
            model(x).square().mean().backward()
    same([p.grad for p in fused.parameters()], [p.grad for p in plain.parameters()])
    same(fused.state_dict(), plain.state_dict())
    same(fused.eval()(x), plain.eval()(x))
    report.undo()
    assert type(fused[1]) is nn.BatchNorm2d


def test_convert_sync_batchnorm() -> None:
    """Parameters and buffers are shared, wherever a module stands, and settings kept."""
    shared = P.BatchNorm2d(6, eps=0.1, momentum=None, track_running_stats=False)
    shared.backend = "reference"
    model = nn.ModuleList(
        [nn.BatchNorm1d(6, affine=False).eval(), nn.Sequential(shared, nn.ReLU(), shared), shared]
    )
    old = [model[0], shared]
    tensors = [*model.parameters(), *model.buffers()]
    made = P.SyncBatchNorm.convert_sync_batchnorm(model, "group")
    assert made is model
    assert type(model[1]) is nn.Sequential and type(model[1][1]) is nn.ReLU
    assert model[1][0] is model[1][2] is model[2]
    for before, after in zip(old, (model[0], model[2]), strict=True):
        assert type(after) is P.SyncBatchNorm and after.process_group == "group"
        assert after.extra_repr() == before.extra_repr() and after.training == before.training
        assert after.backend == getattr(before, "backend", None)
    kept = [*model.parameters(), *model.buffers()]
    assert all(a is b for a, b in zip(kept, tensors, strict=True))
    alone = P.SyncBatchNorm.convert_sync_batchnorm(nn.SyncBatchNorm(6))
    assert type(alone) is P.SyncBatchNorm


def test_convert_sync_batchnorm_loses_nothing() -> None:
    """What has a forward of its own is refused, and nothing is half done."""

    class Own(nn.BatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    model = nn.Sequential(nn.BatchNorm2d(6), P.BatchNormAct(6), Own(6))
    with pytest.raises(TypeError, match="2 is a Own"):
        P.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d and not model[1].synchronised
    block = P.StandardResBlock(6, 6)
    assert P.SyncBatchNorm.convert_sync_batchnorm(block, "group") is block
    norms = [m for m in block.modules() if isinstance(m, P.BatchNormAct)]
    assert norms and all(m.synchronised and m.process_group == "group" for m in norms)
    assert "synchronised=True" in repr(block)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name,args", [("BatchNorm2d", (4,)), ("GroupNorm", (2, 4))])
def test_the_result_may_be_changed_in_place(
    name: str, args: tuple[int, ...], form: torch.memory_format
) -> None:
    got = []
    for package in (P, nn):
        module = getattr(package, name)(*args).double()
        module.backend = "cpu"
        x = torch.linspace(-1, 2, 200, dtype=torch.float64).sin().view(2, 4, 5, 5)
        x = x.to(memory_format=form).requires_grad_()
        y = module(x)
        y += x
        y.relu_().square().sum().backward()
        got.append((y, x.grad, [parameter.grad for parameter in module.parameters()]))
    torch.testing.assert_close(*got, **EXACT)
