"""pydl.replace: linear layers, gates and sums in one pass with what follows them, provably."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pydl
from pydl.report import Report
from tests import fuse_layers
from tests.fuse_blocks import HOOKS, close
from tests.fuse_layers import LAYERS, REFUSED, WIDTH, Parts, PreNorm, Short

X = torch.randn(3, 5, WIDTH, dtype=torch.double, generator=torch.Generator().manual_seed(3))
OPS = ("bias_act", "gated_act", "add_layer_norm", "add_rms_norm")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been computed in one pass, call by call."""
    seen: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return real(*args, **kwargs)

        return count

    for name in OPS:
        monkeypatch.setattr(pydl.functional, name, counted(name, getattr(pydl.functional, name)))
    return seen


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    """The functions of a method have no backend of their own."""
    with pydl.use_backend("cpu"):
        yield


def pair(cls: type[nn.Module], **options: Any) -> tuple[nn.Module, nn.Module, Report]:
    """A module, its copy that has been fused, and the report."""
    torch.manual_seed(0)
    plain = cls().double()
    fused = copy.deepcopy(plain)
    return plain, fused, pydl.replace(fused, **{"backend": "cpu", **options})


def same(plain: nn.Module, fused: nn.Module, x: Tensor, *more: Any) -> None:
    """Output and gradients, and the gradients of those."""
    kept: list[list[Tensor]] = []
    for model in (plain, fused):
        given = x.clone().requires_grad_()
        out = model(given, *more)
        weights = torch.linspace(-1, 1, out.numel(), dtype=x.dtype).view_as(out)
        wanted = [given, *(p for p in model.parameters() if p.requires_grad)]
        first = torch.autograd.grad((out * weights).sum(), wanted, create_graph=True,
                                    allow_unused=True)  # fmt: skip
        penalty = sum((g * g).sum() for g in first if g is not None)
        second = torch.autograd.grad(penalty, wanted, allow_unused=True)
        kept.append([out, *first, *second])
    for a, b in zip(*kept, strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            close(torch.zeros_like(b) if a is None else a, b)


@pytest.mark.parametrize("cls,what", LAYERS, ids=[cls.__name__ for cls, _ in LAYERS])
def test_layers(cls: type[Parts], what: list[str], passes: list[str]) -> None:
    plain, fused, report = pair(cls)
    assert sorted(one.what for one in report.fused) == sorted(what)
    same(plain, fused, X)
    ops = {"Linear": "bias_act", "add": "add_"}
    for one in what:
        first, _, last = one.partition(" + ")
        name = "gated_act" if last == "multiply" else ops[first]
        assert any(seen.startswith(name) for seen in passes), (one, passes)
    text = str(report)
    assert "fused, in one pass" in text and max(map(len, text.splitlines())) <= 80
    assert not pydl.replace(fused, backend="cpu").fused
    report.undo()
    assert type(fused) is cls


def test_a_branch_that_is_taken(passes: list[str]) -> None:
    plain, fused, _ = pair(PreNorm)
    same(plain, fused, X, X.flip(0))
    assert "add_rms_norm" not in passes
    same(plain, fused, X)
    assert "add_rms_norm" in passes


def test_sums_in_branches(passes: list[str]) -> None:
    plain, fused, _ = pair(fuse_layers.Crossed)
    memory = X.flip(0)
    for first, more, ran in (
        (False, (), ["add_rms_norm"]), (False, (memory,), ["add_layer_norm", "add_rms_norm"]),
        (True, (memory,), ["add_layer_norm"]),
    ):  # fmt: skip
        plain.first = fused.first = first
        passes.clear()
        same(plain, fused, X, *more)
        assert passes == ran


def test_sequential(passes: list[str]) -> None:
    plain = nn.Sequential(
        nn.Linear(WIDTH, 4), nn.Identity(), nn.Mish(), nn.Linear(4, 4, bias=False), nn.ReLU(),
        nn.Linear(4, 4), nn.Hardswish(),
    ).double()  # fmt: skip
    fused = copy.deepcopy(plain)
    report = pydl.replace(fused, backend="cpu")
    assert [(one.path, one.what) for one in report.fused] == [("0", "Linear + Mish")]
    assert [(one.path, one.why) for one in report.unfused] == [("3", "it has no bias")]
    same(plain, fused, X)
    assert set(passes) == {"bias_act"}


@pytest.mark.parametrize("cls,path,why", REFUSED, ids=[cls.__name__ for cls, *_ in REFUSED])
def test_refused(cls: type[Parts], path: str, why: str | None) -> None:
    plain, fused, report = pair(cls)
    assert path not in [one.path for one in report.fused]
    told = [one.why for one in report.unfused if one.path == path]
    assert len(told) == (why is not None) and all(str(why) in one for one in told)
    with torch.no_grad():
        close(fused(X), plain(X))


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("path", ["up", "act", "norm2"])
def test_hooks(hook: str, path: str, passes: list[str]) -> None:
    plain, fused, _ = pair(PreNorm)
    same(plain, fused, X)
    before = set(passes)
    passes.clear()
    handle = HOOKS[hook](fused.get_submodule(path))
    fused(X.clone().requires_grad_()).sum().backward()
    assert before - set(passes) == {"add_rms_norm" if path == "norm2" else "bias_act"}
    handle.remove()
    model = PreNorm()
    handle = HOOKS[hook](model.get_submodule(path))
    report = pydl.replace(model, backend="cpu")
    assert len(report.fused) == 1 and "hooks" in report.unfused[0].why
    handle.remove()


def test_excluded_and_switched_off() -> None:
    for options, left in (
        ({"exclude": "up"}, 1), ({"exclude": nn.GELU}, 1), ({"exclude": "norm2"}, 1),
        ({"include": nn.GELU}, 0), ({"include": ["act", "up"]}, 1), ({"fuse": False}, 0),
        ({"backend": "torch"}, 0),
    ):  # fmt: skip
        assert len(pair(PreNorm, **options)[2].fused) == left, options


def test_what_does_not_fit_is_computed_as_written(passes: list[str]) -> None:
    plain, fused, _ = pair(fuse_layers.PostNorm)
    wide = X[:1].expand(3, 5, WIDTH)
    close(fused(wide), plain(wide))

    class Broadcast(Parts):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm1(self.mix(x) + x[:1])
            return y * F.silu(self.mix(y)[:1])

    plain, fused, report = pair(Broadcast)
    assert len(report.fused) == 2
    passes.clear()
    same(plain, fused, X)
    close(fused(X.transpose(0, 1)), plain(X.transpose(0, 1)))
    assert not passes
    mixed = copy.deepcopy(fused)
    mixed.mix.float()
    with pytest.raises(RuntimeError):
        mixed(X)


def test_a_function_that_is_another_by_now(
    passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fused, _ = pair(fuse_layers.Gates)
    same(plain, fused, X)
    before = passes.count("gated_act")
    passes.clear()
    monkeypatch.setattr(fuse_layers, "gate_act", F.relu6)
    same(plain, fused, X)
    assert passes.count("gated_act") == before - 1


def test_what_is_changed_in_place_afterwards() -> None:
    class Changes(Parts):
        def forward(self, x: Tensor) -> Tensor:
            total = self.mix(x) + x
            y = self.norm3(total)
            total += 1
            return y + total

    plain, fused, report = pair(Changes)
    assert len(report.fused) == 1
    with torch.no_grad():
        close(fused(X), plain(X))
    for model in (plain, fused):
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            model(X).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("cls", [cls for cls, _ in LAYERS])
def test_dtypes(cls: type[Parts], dtype: torch.dtype | None, passes: list[str]) -> None:
    torch.manual_seed(0)
    plain = cls().to(dtype or torch.float32)
    fused = copy.deepcopy(plain)
    pydl.replace(fused, backend="cpu")
    x, outputs, grads = X.to(dtype or torch.float32), [], []
    for model in (plain, fused):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
            outputs.append(model(x))
        outputs[-1].float().square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    rough = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.1, "atol": 0.1}
    assert outputs[0].dtype == outputs[1].dtype
    of_two_dtypes = (fuse_layers.Crossed, fuse_layers.Wrapped)
    assert passes or (dtype is None and cls in of_two_dtypes)
    torch.testing.assert_close(outputs[1], outputs[0], **rough)
    if dtype is torch.float32:
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cls", [cls for cls, _ in LAYERS])
def test_compiles_in_one_graph(cls: type[Parts]) -> None:
    plain, fused, _ = pair(cls)
    torch._dynamo.reset()
    close(torch.compile(fused, backend="eager", fullgraph=True)(X), plain(X))


def test_copies_and_pickles(passes: list[str]) -> None:
    plain, fused, _ = pair(Short)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    for one in (copy.deepcopy(fused), torch.load(buffer, weights_only=False)):
        passes.clear()
        same(plain, one, X)
        assert {"gated_act", "add_rms_norm"} <= set(passes)
