"""pydl.replace(fuse=True): batch normalisation, residual and activation in one pass, provably."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuse_blocks import (
    ACTIVATIONS,
    CHANNELS,
    HOOKS,
    IMAGES,
    REFUSED,
    Base,
    Basic,
    Bottleneck,
    Dense,
    Mobile,
    PreAct,
    X,
    close,
    fuse,
    net,
    same,
)  # fmt: skip


@pytest.mark.parametrize("act,name", ACTIVATIONS, ids=[name for _, name in ACTIVATIONS])
def test_sequential(act: nn.Module, name: str, passes: list[str]) -> None:
    plain = nn.Sequential(nn.Conv2d(CHANNELS, 5, 3), nn.BatchNorm2d(5), nn.Identity(), act).double()
    fused = copy.deepcopy(plain)
    report = fuse(fused, backend="cpu")
    assert [one.path for one in report.fused] == ["1"]
    same(plain, fused, X)
    assert passes == [name, name]
    with pytest.raises(ValueError, match="4D"):
        fused(X[0])


def test_one_and_three_dimensions(passes: list[str]) -> None:
    for norm, shape in ((nn.BatchNorm1d, (6, 3)), (nn.BatchNorm3d, (2, 3, 2, 3, 2))):
        plain = nn.Sequential(norm(3, momentum=None), nn.SiLU()).double()
        fused = copy.deepcopy(plain)
        fuse(fused, backend="cpu")
        same(plain, fused, torch.randn(shape, dtype=torch.double))
    assert passes == ["silu"] * 4


def test_trains_the_same(passes: list[str]) -> None:
    plain = net()
    fused = copy.deepcopy(plain)
    report = fuse(fused, backend="cpu")
    assert len(report.fused) == 9 and len(report.unfused) == 5
    text = str(report)
    assert "9 fused" in text and "BatchNorm2d + add + ReLU in" in text and "not fused" in text
    assert max(map(len, text.splitlines())) <= 80
    optimisers = [torch.optim.SGD(m.parameters(), 0.1, 0.9) for m in (plain, fused)]
    for _ in range(3):
        for model, optimiser in zip((plain, fused), optimisers, strict=True):
            optimiser.zero_grad()
            model(IMAGES).square().mean().backward()
            optimiser.step()
        for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
            close(a, b)
            close(a.grad, b.grad)
        close(dict(fused.named_buffers()), dict(plain.named_buffers()))
    assert fused.stem[1].num_batches_tracked == 3
    one = ["relu", "relu", "add relu", "relu", "relu", "add relu", "leaky_relu"]
    assert passes == [*one, "add gelu_tanh", "add relu"] * 3
    close(fused.eval()(IMAGES), plain.eval()(IMAGES))


def test_the_signature_stays(passes: list[str]) -> None:
    plain = Bottleneck().double()
    fused = copy.deepcopy(plain)
    fuse(fused, backend="cpu")
    same(plain, fused, X, scale=3.0)
    assert len(passes) == 6
    with pytest.raises(TypeError):
        fused(X, 3.0)


@pytest.mark.parametrize("cls,why", REFUSED)
def test_refused(cls: type[Base], why: str, passes: list[str]) -> None:
    plain = cls().double()
    fused = copy.deepcopy(plain)
    report = fuse(fused, backend="reference")
    assert not [one for one in report.fused if one.path == "bn1"]
    assert [why in one.why for one in report.unfused if one.path == "bn1"] == [True]
    with torch.no_grad():
        close(fused(X), plain(X))
    close(dict(fused.named_buffers()), dict(plain.named_buffers()))
    assert not passes


@pytest.mark.parametrize("hook", HOOKS)
def test_later_hooks_see_what_they_should(hook: str, passes: list[str]) -> None:
    fused = nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU()).double()
    fuse(fused, backend="reference")
    for one in fused:
        handle = HOOKS[hook](one)
        fused(X.clone().requires_grad_()).sum().backward()
        handle.remove()
    assert not passes
    fused(X)
    assert passes == ["relu"]


@pytest.mark.parametrize("residual", [torch.ones(1, dtype=torch.double), X.float(), 1.5])
def test_residuals_that_do_not_fit(residual: Any, passes: list[str]) -> None:
    class Adds(Base):
        def forward(self, x: Tensor) -> Tensor:
            other = residual
            y = F.silu(other + self.bn2(x))
            return self.relu(self.bn1(y) + other)

    plain = Adds().double()
    fused = copy.deepcopy(plain)
    assert len(fuse(fused, backend="reference").fused) == 2
    same(plain, fused, X)
    assert not passes


def test_native_pytorch_is_left_as_written(passes: list[str]) -> None:
    plain = net()
    fused = copy.deepcopy(plain)
    fuse(fused, backend="reference")
    for one in fused.modules():
        if "backend" in vars(one):
            one.backend = "torch"
    same(plain, fused, IMAGES)
    assert not passes


def test_preactivation_block(passes: list[str]) -> None:
    plain = PreAct().double()
    fused = copy.deepcopy(plain)
    assert [one.path for one in fuse(fused, backend="cpu").fused] == ["bn1", "bn2"]
    same(plain, fused, X)
    del plain.shortcut, fused.shortcut
    same(plain, fused, X)
    assert passes == ["relu"] * 8


def test_dense_layer(passes: list[str]) -> None:
    plain = Dense().double()
    fused = copy.deepcopy(plain)
    assert [one.path for one in fuse(fused, backend="cpu").fused] == ["norm1", "norm2"]
    same(plain, fused, X)
    close(fused([X[:, :3], X[:, 3:]]), plain([X[:, :3], X[:, 3:]]))
    assert passes == ["relu"] * 6
    plain.drop_rate = fused.drop_rate = 0.5
    for training in (True, False):
        outputs = []
        for model in (plain, fused):
            torch.manual_seed(0)
            outputs.append(model.train(training)(X))
        close(*outputs)


def test_activations_that_are_not_in_the_pass(passes: list[str]) -> None:
    plain = Mobile().double()
    fused = copy.deepcopy(plain)
    report = fuse(fused, backend="cpu")
    assert [one.path for one in report.fused] == ["conv.7"]
    why = {one.path: one.why for one in report.unfused}
    assert why["conv.1"].startswith("torch.nn.ReLU6 follows")
    assert why["conv.4"].startswith("torch.nn.Hardswish follows")
    assert why["conv.10"] == "no activation follows it"
    assert all(reason in " ".join(str(report).split()) for reason in why.values())
    same(plain, fused, X)
    assert passes == ["silu"] * 2


def test_what_is_exchanged_later_counts(passes: list[str]) -> None:
    plain = nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.Tanh()).double()
    fused = copy.deepcopy(plain)
    fuse(fused, backend="reference")
    same(plain[:1], fused[:1], X)
    assert not passes
    for model in (plain, fused):
        model[1] = nn.Hardswish()
    same(plain, fused, X)
    assert not passes
    for model in (plain, fused):
        model[1] = nn.Identity()
    same(plain, fused, X)
    assert passes == ["tanh"] * 2


def test_undo_dry_run_and_errors(monkeypatch: pytest.MonkeyPatch, passes: list[str]) -> None:
    model = net()
    modules, classes = list(model.modules()), [type(one) for one in model.modules()]

    def untouched() -> None:
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
        assert [type(one) for one in model.modules()] == classes
        assert not any("backend" in vars(one) for one in modules)

    assert len(fuse(model, dry_run=True).fused) == 9
    untouched()
    report = fuse(model, backend="cpu")
    assert type(model.blocks[0]) is not Basic
    report.undo()
    untouched()
    model(IMAGES)
    assert not passes
    monkeypatch.setattr("pydl.report._put", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fuse(model)
    untouched()


def test_copies_use_their_own_modules(passes: list[str]) -> None:
    plain = net().eval()
    fused = copy.deepcopy(plain)
    fuse(fused, backend="cpu")
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(fused), torch.load(buffer, weights_only=False)]
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    for one in copies:
        passes.clear()
        same(plain, one, IMAGES)
        assert len(passes) == 18
        assert type(one.blocks[0]) is type(fused.blocks[0])
        plain = copy.deepcopy(net().eval())


@pytest.mark.parametrize("training", [True, False])
def test_compiles_in_one_graph(training: bool) -> None:
    plain = net().train(training)
    fused = copy.deepcopy(plain)
    fuse(fused, backend="cpu")
    torch._dynamo.reset()
    close(torch.compile(fused, backend="eager", fullgraph=True)(IMAGES), plain(IMAGES))


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_dtypes_and_layouts(
    dtype: torch.dtype | None, form: torch.memory_format, passes: list[str]
) -> None:
    plain = net().to(dtype or torch.float32).to(memory_format=form)
    fused = copy.deepcopy(plain)
    fuse(fused, backend="cpu")
    x = IMAGES.to(dtype or torch.float32).to(memory_format=form)
    outputs = []
    for model in (plain, fused):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
            outputs.append(model(x))
        outputs[-1].float().square().sum().backward()
    expected, actual = outputs
    rough = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.1, "atol": 0.1}
    assert actual.dtype == expected.dtype and passes
    torch.testing.assert_close(actual, expected, **rough)
    for a, b in zip(fused.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, **rough)
    if dtype is torch.float32:
        for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"affine": False}, {"momentum": None}, {"track_running_stats": False}], ids=str
)
def test_normalisations_with_options(options: dict[str, Any], passes: list[str]) -> None:
    plain = nn.Sequential(nn.BatchNorm2d(CHANNELS, eps=1e-3, **options), nn.ELU(0.5)).double()
    fused = copy.deepcopy(plain)
    fuse(fused, backend="cpu")
    same(plain, fused, X)
    same(plain, fused, X)
    assert passes == ["elu"] * 4


act = F.relu


def test_a_function_that_is_another_by_now(
    passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Global(Base):
        def forward(self, x: Tensor) -> Tensor:
            return act(self.bn1(x))

    plain = Global().double()
    fused = copy.deepcopy(plain)
    assert fuse(fused, backend="reference").fused
    monkeypatch.setitem(globals(), "act", F.silu)
    same(plain, fused, X)
    assert not passes
    monkeypatch.setitem(globals(), "act", F.relu)
    same(plain, fused, X)
    assert passes == ["relu"] * 2
