"""pydl.replace: by instance, exact, reversible, never half done."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pydl


def network() -> nn.Sequential:
    shared = nn.Mish()
    return nn.Sequential(
        nn.Linear(8, 16), shared, nn.Linear(16, 16), nn.PReLU(16), nn.ModuleList([nn.GELU()]),
        nn.Linear(16, 4), shared,
    )  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.body:
            x = layer[0](x) if isinstance(layer, nn.ModuleList) else layer(x)
        return x


def test_replaces_and_undoes() -> None:
    model = Net()
    before, parameters = list(model.modules()), list(model.parameters())
    keys = list(model.state_dict())
    report = pydl.replace(model)
    assert type(model.body[1]) is pydl.nn.Mish and model.body[1] is model.body[6]
    assert type(model.body[3]) is pydl.nn.PReLU and type(model.body[4][0]) is pydl.nn.GELU
    assert type(model.body[0]) is pydl.nn.Linear
    assert len(report.replaced) == 6 and "Mish" in str(report)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    model.eval()
    report.undo()
    report.undo()
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("asked", [None, "cpu"])
def test_trains_the_same(asked: str | None) -> None:
    torch.manual_seed(0)
    plain = Net()
    fused = copy.deepcopy(plain)
    pydl.replace(fused, backend=asked)
    x, y = torch.randn(32, 8), torch.randn(32, 4)
    losses: list[list[float]] = []
    for model in (plain, fused):
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        losses.append([])
        for _ in range(5):
            loss = (model(x) - y).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_dry_run_and_filters_change_nothing_else() -> None:
    model = Net()
    assert len(pydl.replace(model, dry_run=True).replaced) == 6
    assert type(model.body[1]) is nn.Mish
    pydl.replace(model, include=nn.Mish)
    assert type(model.body[1]) is pydl.nn.Mish and type(model.body[3]) is nn.PReLU


def test_a_subclass_is_left_alone_and_named() -> None:
    class Mine(nn.ReLU):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    model = nn.Sequential(Mine())
    report = pydl.replace(model)
    assert type(model[0]) is Mine and not report.replaced
    assert "Mine" in str(report.skipped)


def test_what_is_to_be_quantised_is_left_alone() -> None:
    """As torch's quantisation has it: a module goes by its own qconfig, else by its container's."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.GELU()), nn.SiLU())
    model[0].qconfig, model[0][0].qconfig, model[0][2].qconfig = "some", "other", None
    report = pydl.replace(model)
    assert [one.path for one in report.replaced] == ["0.2", "1"] and not report.fused
    why = {one.path: one.why for one in report.skipped}
    assert why == {"0.0": "has a qconfig, to be quantised", "0.1": "is in 0, which has a qconfig"}
    assert type(model[0][0]) is nn.Linear and type(model[0][1]) is nn.ReLU
    model = nn.Sequential(nn.ReLU())
    model.qconfig = "some"
    assert pydl.replace(model).skipped[0].why == "is in the model, which has a qconfig"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_model_that_is_prepared_for_quantisation_converts_after_replace() -> None:
    from torch.ao import quantization

    x, found = torch.randn(8, 6), []
    for replaced in (False, True):
        torch.manual_seed(0)
        parts = (quantization.QuantStub(), nn.Linear(6, 5), nn.ReLU(), quantization.DeQuantStub())
        model = nn.Sequential(*parts, nn.GELU()).eval()
        model[4].qconfig = None
        model.qconfig = quantization.default_qconfig
        if replaced:
            assert [one.path for one in pydl.replace(model)] == ["4"]
        model = quantization.prepare(model)
        if replaced:
            assert not pydl.replace(model)
        model(x)
        model = quantization.convert(model)
        assert "quantized" in type(model[1]).__module__
        found.append(type(model[4]))
    assert found == [nn.GELU, pydl.nn.GELU]


def test_hooks_go_on_working() -> None:
    model, seen = nn.Sequential(nn.ReLU()), []
    handle = model[0].register_forward_hook(lambda *args: seen.append(1))
    pydl.replace(model)
    model(torch.ones(3))
    handle.remove()
    model(torch.ones(3))
    assert seen == [1]


def test_an_unknown_backend_changes_nothing() -> None:
    model = Net()
    with pytest.raises((ValueError, RuntimeError), match="gpu"):
        pydl.replace(model, backend="gpu")
    assert type(model.body[1]) is nn.Mish
