"""The classes of transformers that pydl.replace knows: the same values, copies, files, undo."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pydl

WIDTH = 12


def real() -> dict[str, tuple[nn.Module, str]]:
    pytest.importorskip("transformers", reason="transformers is missing")
    from transformers import activations as a
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm
    from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    tanh = "gelu(input, approximate='tanh')"
    return {
        "gelu": (a.GELUActivation(), "gelu(input)"),
        "gelu_python": (a.GELUActivation(use_gelu_python=True), "gelu(input)"),
        "gelu_new": (a.NewGELUActivation(), tanh),
        "gelu_fast": (a.FastGELUActivation(), tanh),
        "gelu_tanh": (a.GELUTanh(), tanh),
        "gelu_accurate": (a.AccurateGELUActivation(), tanh),
        "quick_gelu": (a.QuickGELUActivation(), "swish(input, beta=1.702)"),
        "silu": (a.SiLUActivation(), "silu(input)"),
        "mish": (a.MishActivation(), "mish(input)"),
        "llama": (LlamaRMSNorm(WIDTH), "rms_norm(input)"),
        "mistral": (MistralRMSNorm(WIDTH, 1e-5), "rms_norm(input)"),
        "qwen2": (Qwen2RMSNorm(WIDTH), "rms_norm(input)"),
        "t5": (T5LayerNorm(WIDTH), "rms_norm(input)"),
        "gemma2": (Gemma2RMSNorm(WIDTH), "rms_norm(input, 1 + weight)"),
        "cohere": (CohereLayerNorm(WIDTH), "layer_norm(input)"),
        "convnext": (ConvNextLayerNorm(WIDTH), "layer_norm(input)"),
        "clipped": (a.ClippedGELUActivation(-10, 10), ""),
        "relu2": (a.ReLUSquaredActivation(), ""),
        "convnext first": (ConvNextLayerNorm(WIDTH, data_format="channels_first"), ""),
    }


NAMES = (
    "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_tanh", "gelu_accurate", "quick_gelu",
    "silu", "mish", "llama", "mistral", "qwen2", "t5", "gemma2", "cohere", "convnext", "clipped",
    "relu2", "convnext first",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_real_classes(name: str) -> None:
    module, what = real()[name]
    model = nn.Sequential(module)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    plain, keys = copy.deepcopy(model), list(model.state_dict())
    report = pydl.replace(model, backend="cpu")
    if not what:
        assert not report.replaced and report.skipped[0].why
        return
    assert report.replaced[0].new == f"pydl.functional.{what}", report.replaced
    twin = model[0]
    assert isinstance(twin, type(module)) and twin is not module
    assert repr(twin) == repr(module) and list(model.state_dict()) == keys
    assert not pydl.replace(model).replaced
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for one in (model, plain):
            one.to(dtype)
        x = torch.randn(3, 4, WIDTH).to(dtype)
        results = []
        for one in (model, plain):
            leaf = x.clone().requires_grad_()
            y = one(leaf)
            y.float().square().sum().backward()
            results.append([y, leaf.grad, *(p.grad for p in one.parameters())])
            one.zero_grad()
        tolerance = 8 * torch.finfo(dtype).eps
        for got, want in zip(*results, strict=True):
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=tolerance, atol=8 * tolerance)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for made in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert type(made[0]) is type(twin) and made[0].backend == "cpu"
        torch.testing.assert_close(made(x), model(x), rtol=0, atol=0)
    report.undo()
    assert model[0] is module and not hasattr(module, "backend")


def test_computes_by_the_kernels_and_steps_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin computes where the form covers the call, else the module's own forward."""
    module, _ = real()["llama"]
    model = nn.Sequential(module)
    plain = copy.deepcopy(model)
    pydl.replace(model, backend="cpu")
    seen: list[Any] = []
    function = pydl.functional.rms_norm

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs["backend"])
        return function(*args, **kwargs)

    monkeypatch.setattr(pydl.functional, "rms_norm", watched)
    x = torch.randn(2, WIDTH)
    for given in (x.bfloat16(), x.double(), torch.randn(2, 1)):
        torch.testing.assert_close(model(given), plain(given), rtol=0, atol=0)
    torch.testing.assert_close(model[0](hidden_states=x), plain(x), rtol=0, atol=0)
    assert not seen
    with torch.autocast("cpu", torch.bfloat16):
        assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert not seen
    model.float()(x)
    model.bfloat16()(x.bfloat16())
    assert seen == ["cpu", "cpu"]
    vars(model[0])["variance_epsilon"] = 1.0
    vars(plain[0])["variance_epsilon"] = 1.0
    torch.testing.assert_close(model.float()(x), plain(x))


@pytest.mark.parametrize("name", ["gelu", "quick_gelu", "llama", "gelu_new"])
def test_the_automatic_choice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where native PyTorch is the fastest the module's own forward runs, bit by bit; but torch has
    a function for the new GELU."""
    module, _ = real()[name]
    model = nn.Sequential(module)
    plain = copy.deepcopy(model)
    pydl.replace(model)
    ran: list[Any] = []
    forward = type(module).forward

    def watched(self: Any, x: Tensor) -> Tensor:
        ran.append(x.shape)
        return forward(self, x)

    monkeypatch.setattr(type(module), "forward", watched)
    x = torch.randn(3, WIDTH)
    got, own = model(x), len(ran)
    assert own == (name != "gelu_new")
    bits = {"rtol": 0, "atol": 0} if own else {}
    torch.testing.assert_close(got, plain(x), **bits)
    ran.clear()
    with pydl.use_backend("cpu"):
        model(x)
    model(torch.randn(1 << 20, WIDTH))
    assert not ran


@pytest.mark.parametrize("name", ["gelu_new", "llama", "gemma2"])
def test_compiles_in_one_graph(name: str) -> None:
    module, _ = real()[name]
    model = nn.Sequential(module)
    plain = copy.deepcopy(model)
    pydl.replace(model, backend="cpu")
    torch._dynamo.reset()
    x = torch.randn(2, WIDTH)
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(got, plain(x))
