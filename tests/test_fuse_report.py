"""What pydl.replace(fuse=True) says, and what it leaves as it was."""

from __future__ import annotations

import copy
import linecache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.fuse_blocks import CHANNELS, HOOKS, Base, Basic, X, close, fuse, net


@pytest.mark.parametrize("place", ["0", "1"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_are_in_the_way(hook: str, place: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU())
    handle = HOOKS[hook](model.get_submodule(place))
    report = fuse(model)
    assert not report.fused and "hooks" in report.unfused[0].why
    report.undo()
    handle.remove()
    assert fuse(model).fused


def test_tied_and_excluded_are_left_alone() -> None:
    norm = nn.BatchNorm2d(CHANNELS)
    tied = fuse(nn.Sequential(norm, nn.ReLU(), nn.Sequential(norm, nn.ReLU())))
    assert not tied.fused and "several places" in tied.unfused[0].why
    for options in (
        {"exclude": nn.ReLU}, {"exclude": "bn*"}, {"include": nn.BatchNorm2d}, {"include": "relu"},
        {"fuse": False}, {"backend": "torch"}, {"exclude": Basic},
    ):  # fmt: skip
        model = Basic()
        report = fuse(model, **options)
        assert not report.fused and type(model) is Basic
    model = Basic()
    assert [one.path for one in fuse(model, exclude="bn1").fused] == ["bn2"]
    assert [one.path for one in fuse(model).fused] == ["bn1"]
    assert not fuse(model).fused


def test_subclasses_and_synchronised_ones_are_not_fused() -> None:
    class Norm(nn.BatchNorm2d):
        pass

    class Act(nn.ReLU):
        pass

    report = fuse(nn.Sequential(Norm(4), nn.ReLU(), nn.BatchNorm2d(4), Act(), nn.SyncBatchNorm(4)))
    assert not report.fused
    assert report.skipped[0].path == "0" and "is a subclass" in report.skipped[0].why
    act, synchronised = (one.why for one in report.unfused)
    assert "left alone: is a subclass of torch.nn.ReLU" in act and "all processes" in synchronised


def test_state_stays() -> None:
    model = net()
    names, state = [name for name, _ in model.named_modules()], model.state_dict()
    tensors = [*model.parameters(), *model.buffers()]
    shown = repr(model)
    fuse(model)
    assert isinstance(model.blocks[0], Basic) and isinstance(model.stem, nn.Sequential)
    assert [name for name, _ in model.named_modules()] == names and repr(model) == shown
    now = [*model.parameters(), *model.buffers()]
    assert all(a is b for a, b in zip(now, tensors, strict=True))
    assert list(model.state_dict()) == list(state)
    fresh = net()
    fresh.load_state_dict(model.state_dict())
    model.load_state_dict(fresh.state_dict())


def test_traces_see_the_plain_modules() -> None:
    plain = Basic().double().eval()
    fused = copy.deepcopy(plain)
    fuse(fused)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return True

    graph = Tracer().trace(fused)
    assert [n.target for n in graph.nodes if n.op == "call_module"].count("relu") == 2
    close(torch.fx.GraphModule(fused, graph)(X), plain(X))


def test_a_source_that_does_not_run_is_not_trusted() -> None:
    ran = "class M(Base):\n    def forward(self, x):\n        return F.relu(self.bn1(x))\n"
    names: dict[str, Any] = {"Base": Base, "F": F, "__name__": __name__}
    exec(compile(ran, "<ran>", "exec", dont_inherit=True), names)
    for text, why in ((ran.replace("(x))", "(x) + 1)"), "does not run"), ("", "has no source")):
        linecache.cache["<ran>"] = (len(text), None, text.splitlines(True), "<ran>")
        report = fuse(names["M"]())
        assert not report.fused and any(why in one.why for one in report.unfused)
    linecache.cache["<ran>"] = (len(ran), None, ran.splitlines(True), "<ran>")
    assert fuse(names["M"]()).fused
    del linecache.cache["<ran>"]


def test_a_forward_of_the_instance_is_left_alone() -> None:
    model = Basic()
    model.forward = lambda x: x  # type: ignore[method-assign]
    report = fuse(model)
    assert not report.fused and "on the instance" in report.unfused[0].why
