"""pydl.replace(example_inputs=...): what is measured, and that nothing of the model changes."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pydl
from pydl import measured
from pydl.measured import Pair


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "SECONDS", 0.0)


class Net(nn.Module):
    """A batch normalisation, whose buffers change, and an output that is no tensor."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Mish(), nn.Dropout(dropout), nn.Linear(8, 3)
        )

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        x *= scale  # a model may write to its input
        return {"logits": self.body(x), "count": len(x), "deep": (x.sum(),)}


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def state(model: nn.Module) -> tuple[list[Tensor], list[Any]]:
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    tensors = {**model.state_dict(), **{name + ".grad": grad for name, grad in grads.items()}}
    return (
        [tensor.clone() for tensor in (*tensors.values(), torch.get_rng_state())],
        [
            list(tensors),
            [(type(module), module.training) for module in model.modules()],
            random.getstate(),
            torch.is_grad_enabled(),
        ],
    )


def assert_same(model: nn.Module, before: tuple[list[Tensor], list[Any]]) -> None:
    tensors, plain = state(model)
    torch.testing.assert_close(tensors, before[0], rtol=0, atol=0)
    assert plain == before[1]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_changes_nothing(training: bool, dropout: float) -> None:
    model = Net(dropout).train(training)
    model.body[1].eval()
    model(X.clone())["logits"].sum().backward()
    model.body[0].weight.grad = None
    before, x = state(model), X.clone()
    with torch.no_grad():
        report = pydl.replace(model, example_inputs=(x, 2.0), dry_run=True, backend="cpu")
    assert_same(model, before)
    assert torch.equal(x, X) and report.dry_run and not report.undone
    assert report.measured is not None and report.measured.both is not None
    report = pydl.replace(model, example_inputs={"x": x}, backend="cpu")
    assert type(model.body[2]) is pydl.nn.Mish and len(report) == 4
    report.undo()
    assert_same(model, before)
    mode = "training" if training else "evaluation"
    assert report.measured is not None and report.measured.setting == f"on cpu in {mode} mode"
    random_outputs = any("random in training" in note for note in report.notes)
    assert random_outputs == (training and dropout > 0)


def test_measures_both() -> None:
    model = Net()
    report = pydl.replace(model, example_inputs=X, backend="cpu")
    found = report.measured
    assert found is not None and found.rounds == measured.FEWEST
    assert found.judge == "fp64" and found.setting == "on cpu in training mode"
    for pair, most in ((found.output, 1e-5), (found.gradient, 1e-4)):
        assert pair is not None and 0 < pair.before < most and 0 < pair.after < most
    for pair in (found.forward, found.both, found.saved):
        assert pair is not None and min(pair) > 0
    text = str(report)
    for word in ("before", "after", "forward and backward", "kept for backward", "from fp64"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_wrong_twin_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose values are off, and one whose gradients are."""

    def off(self: Any, x: Tensor) -> Tensor:
        return nn.functional.mish(x) + 0.25

    monkeypatch.setattr(pydl.nn.Mish, "forward", off)
    report = pydl.replace(Net(), example_inputs=X)
    assert report.measured is not None and report.measured.output is not None
    assert report.measured.output.after > 0.01 > report.measured.output.before
    monkeypatch.setattr(
        pydl.nn.Mish, "forward", lambda self, x: nn.functional.mish(x) + 0.5 * (x.detach() - x)
    )
    report = pydl.replace(Net(), example_inputs=X)
    assert report.measured is not None and report.measured.gradient is not None
    assert report.measured.gradient.after > 0.01 > report.measured.gradient.before


def test_what_is_kept_counts_once() -> None:
    """The output of a linear layer, which mish saves, and the input of the other."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Mish(), nn.Linear(8, 1))
    found = pydl.replace(model, example_inputs=torch.ones(3, 4)).measured
    assert found is not None and found.saved == Pair(4 * (12 + 24 + 24), 4 * (12 + 24 + 24))


def test_without_gradients() -> None:
    model = nn.Sequential(nn.Mish())
    found = pydl.replace(model, example_inputs=X).measured
    assert found is not None and found.both is None and found.saved is None
    assert found.gradient is None and found.output is not None
    found = pydl.replace(model, example_inputs=X.clone().requires_grad_()).measured
    assert found is not None and found.both is not None and found.gradient is not None


def test_without_a_copy_in_fp64() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.Mish()

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise TypeError("fp32 only")
            return self.act(x)

    report = pydl.replace(Single(), example_inputs=X, backend="cpu")
    assert report.measured is not None and report.measured.judge == "before"
    assert report.measured.output is not None and report.measured.output.before == 0
    assert "fp32 only" in str(report) and "from the model before" in str(report)


def test_random_in_evaluation() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    model = nn.Sequential(nn.Mish(), Noise()).eval()
    report = pydl.replace(model, example_inputs=X)
    assert report.measured is not None and report.measured.output is None
    assert "random in evaluation too" in str(report)


class Stubborn(Net):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("no copies")


@pytest.mark.parametrize(
    "model, inputs, error, message",
    [
        (Net, [X], TypeError, "example_inputs is a list, wants a tensor, a tuple"),
        (Net, X[:, :2], RuntimeError, "example_inputs: the model before fails on them"),
        (Net, {"y": X}, RuntimeError, "unexpected keyword argument 'y'"),
        (Stubborn, X, RuntimeError, r"cannot be copied to be measured \(RuntimeError: no copies"),
        (lambda: nn.Sequential(nn.Mish(), nn.Flatten(0)), "x", TypeError, "is a str"),
    ],
)
def test_an_error_leaves_the_model(
    model: Any, inputs: Any, error: type[Exception], message: str
) -> None:
    made = model()
    before = state(made)
    with pytest.raises(error, match=message):
        pydl.replace(made, example_inputs=inputs, backend="cpu")
    assert_same(made, before)
    assert not any("backend" in vars(module) for module in made.modules())


def test_a_twin_that_fails_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pydl.nn.Mish, "forward", lambda self, x: 1 / 0)
    model = Net()
    before = state(model)
    with pytest.raises(RuntimeError, match="the model after fails on them: ZeroDivisionError"):
        pydl.replace(model, example_inputs=X, fuse=True)
    assert_same(model, before)
    with pytest.raises(RuntimeError, match="returns no floating tensor"):
        pydl.replace(nn.Sequential(nn.Flatten(0)), example_inputs=torch.ones(2, 2).long())


def test_autocast_and_16_bits() -> None:
    model = copy.deepcopy(Net()).eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = pydl.replace(model, example_inputs=X).measured
    assert found is not None and found.output is not None and 1e-4 < found.output.after < 0.1
    found = pydl.replace(Net().bfloat16(), example_inputs=X.bfloat16()).measured
    assert found is not None and found.output is not None and 1e-4 < found.output.after < 0.1
