"""Whole models by the automatic choice of a backend, against what they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pydl
from pydl import calibration
from tests.test_models import MODELS, close, gradients, inputs
from tests.watch import intercepted


def flowed(model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, Tensor, set[str]]:
    """(output, loss, the kernels that ran, backward too)."""
    ran: set[str] = set()

    def note(kernel: Any) -> Any:
        ran.add(kernel._schema.name.partition("::")[2])
        return kernel

    with intercepted(note):
        out = model(**given)
        out["loss"].backward()
    return out["logits"], out["loss"], ran


@pytest.mark.parametrize("table", ["as measured", "from one element on"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_automatic_choice_is_right(
    name: str, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the sizes that ship, which leave small tensors to torch, and with kernels from one
    element on, so that every call is decided for them."""
    from pydl.integrations.transformers import register

    if table != "as measured":
        every = {key: ("cpu", 1, 1) for key in calibration._table if key[0] == "cpu"}
        assert len(every) > 30
        monkeypatch.setattr(calibration, "_table", every)
        monkeypatch.setattr(calibration, "smallest", 1)
    torch.manual_seed(0)
    plain = MODELS[name][0]()
    ours = copy.deepcopy(plain)
    report = pydl.replace(ours)
    assert len(report) >= 10 and report.fused
    register()
    ours.set_attn_implementation("pydl")
    given = inputs(name, torch.float32)
    out, loss, ran = flowed(ours, given)
    want, plain_loss, none = flowed(plain, given)
    assert not none
    if table != "as measured":
        wanted = MODELS[name][1]
        assert "product" in ran
        for part in wanted:
            for way in ("fwd", "bwd"):
                assert any(part in one and way in one for one in ran), (part, way, ran)
    close(out, want, torch.float32, "output")
    close(loss, plain_loss, torch.float32, "loss")
    close(gradients(ours), gradients(plain), torch.float32)
    with torch.no_grad():
        close(ours.eval()(**given)["logits"], plain.eval()(**given)["logits"], torch.float32)
