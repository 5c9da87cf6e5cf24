"""Small models of many kinds, replaced, against what they were: outputs, gradients, training."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import pydl
from examples.dcgan import Discriminator, Generator
from examples.unet import UNet
from pydl.table import judge
from tests.watch import intercepted

TEXT = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {
    "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "image_size": 16, "patch_size": 4, "hidden_size": 32, "intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 5,
}  # fmt: skip
T5 = {
    "vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4,
    "dropout_rate": 0.0, "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}  # fmt: skip
RESNET = {
    "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic",
    "num_labels": 5,
}  # fmt: skip
CONVNEXT = {
    "hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "patch_size": 2, "num_labels": 5,
    "layer_scale_init_value": 0.5,
}  # fmt: skip
WHISPER = {
    "vocab_size": 61, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40, "num_mel_bins": 8, "max_source_positions": 20, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """More gain nothing on models of this size, and wait for each other on a busy machine."""
    torch.set_num_threads(1)


class Gan(nn.Module):
    """The scores of what the generator makes and of real images."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.discriminator = Generator(8, 4), Discriminator(4)

    def forward(self, noise: Tensor, images: Tensor) -> Tensor:
        return torch.cat((self.discriminator(self.generator(noise)), self.discriminator(images)))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 24, 0.0, "gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False)


def hugging(config: str, model: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is missing")
    found = transformers
    for part in model.split("."):
        found = getattr(found, part)
    attention = "sdpa" if found._supports_sdpa else "eager"
    return found(getattr(transformers, config)(**settings, attn_implementation=attention))


# How to make each, and the kernels that have to run in it, forward, in fp32.
Maker = Callable[[], nn.Module]
MODELS: dict[str, tuple[Maker, set[str]]] = {
    "bert": (functools.partial(hugging, "BertConfig", "BertForMaskedLM", **TEXT, **NO_DROPOUT),
             {"add_layer_norm", "bias_act", "attention"}),
    "gpt2": (functools.partial(hugging, "GPT2Config", "GPT2LMHeadModel", **GPT2),
             {"layer_norm", "add_layer_norm", "gelu_tanh", "attention"}),
    "llama": (functools.partial(hugging, "LlamaConfig", "LlamaForCausalLM", **TEXT,
                                num_key_value_heads=2),
              {"rms_norm", "add_rms_norm", "gated_act", "attention"}),
    "mistral": (functools.partial(hugging, "MistralConfig", "MistralForCausalLM", **TEXT,
                                  num_key_value_heads=2, sliding_window=5),
                {"rms_norm", "add_rms_norm", "gated_act", "attention"}),
    "vit": (functools.partial(hugging, "ViTConfig", "ViTForImageClassification", **VISION),
            {"layer_norm", "add_layer_norm", "bias_act", "attention"}),
    "resnet": (functools.partial(hugging, "ResNetConfig", "ResNetForImageClassification",
                                 **RESNET), {"batch_norm", "relu"}),
    "convnext": (functools.partial(hugging, "ConvNextConfig", "ConvNextForImageClassification",
                                   **CONVNEXT), {"layer_norm", "bias_act"}),
    "t5": (functools.partial(hugging, "T5Config", "T5ForConditionalGeneration", **T5),
           {"rms_norm", "gated_act", "attention"}),
    "whisper": (functools.partial(hugging, "WhisperConfig",
                                  "models.whisper.modeling_whisper.WhisperEncoder", **WHISPER),
                {"layer_norm", "bias_act", "attention"}),
    "encoder": (encoder, {"add_layer_norm", "bias_act", "attention"}),
    "unet": (lambda: UNet(2, 3, 4), {"batch_norm"}),
    "gan": (Gan, {"batch_norm", "leaky_relu", "tanh"}),
}  # fmt: skip
models = pytest.mark.parametrize("name", MODELS)
SINGLE = ("llama", "mistral", "t5")  # whose norms compute in fp32 whatever the dtype


def inputs(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids, seen = torch.randint(1, 61, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    seen[1, 8:] = 0
    text = {"input_ids": ids, "attention_mask": seen}
    given: dict[str, dict[str, Tensor]] = {
        "bert": {**text, "labels": ids}, "gpt2": {**text, "labels": ids},
        "llama": {**text, "labels": ids}, "mistral": {**text, "labels": ids},
        "t5": {**text, "labels": ids[:, :7].contiguous()}, "unet": {"x": torch.randn(2, 2, 8, 8)},
        "gan": {"noise": torch.randn(4, 8), "images": torch.randn(4, 1, 16, 16)},
        "whisper": {"input_features": torch.randn(2, 8, 40)},
        "encoder": {"src": torch.randn(2, 7, 16),
                    "src_key_padding_mask": torch.arange(14).view(2, 7) > 11},
    }  # fmt: skip
    images = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 3])}
    chosen = given.get(name, images)
    return {key: t.to(dtype) if t.is_floating_point() else t for key, t in chosen.items()}


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, Any]:
    """(as it was, replaced, the report); both with values of their own in all parameters."""
    torch.manual_seed(0)
    plain = MODELS[name][0]().to(dtype)
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    ours = copy.deepcopy(plain)
    report = pydl.replace(ours, backend="cpu")
    if "attention" in MODELS[name][1] and name != "encoder":
        from pydl.integrations.transformers import register

        register()
        ours.set_attn_implementation("pydl")
    return plain, ours, report


def run(model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(output, loss)."""
    with pydl.use_backend("cpu"):
        out = model(**given)
    if isinstance(out, Tensor):
        return out, out.square().mean()
    found = out["logits"] if "logits" in out else out["last_hidden_state"]
    return found, out["loss"] if "loss" in out else found.square().mean()


def close(got: Any, want: Any, dtype: torch.dtype, what: str = "") -> None:
    """Of a tensor: by its largest value, since what cancels is as far off."""
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for key, value in want.items():
            close(got[key], value, dtype, key)
        return
    assert (got is None) == (want is None), what
    if got is None:
        return
    assert got.dtype == want.dtype and got.shape == want.shape, what
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    if got.is_floating_point() and got.numel():
        off = (got - want).abs().max().item()
        assert off <= tolerance * (want.abs().max().item() + 0.01), (what, off)
    else:
        assert torch.equal(got, want), what


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


@models
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_trains_the_same(name: str, dtype: torch.dtype) -> None:
    """Output, loss, gradients and, after three steps, parameters and buffers; by our kernels."""
    plain, ours, report = pair(name, dtype)
    given, ran = inputs(name, dtype), set()

    def note(kernel: Any) -> Any:
        ran.add(kernel._schema.name.partition("::")[2].removesuffix("_fwd"))
        return kernel

    assert len(report) >= 3
    with intercepted(note):
        out, loss = run(ours, given)
        loss.backward()
    wanted = MODELS[name][1] - ({"rms_norm", "add_rms_norm"} if dtype == torch.float64 else set())
    missing = {w for w in wanted if not any(w in kernel for kernel in ran)}
    assert not missing, ran
    want, plain_loss = run(plain, given)
    plain_loss.backward()
    close(out, want, dtype, "output")
    close(loss, plain_loss, dtype, "loss")
    close(gradients(ours), gradients(plain), dtype)
    optimisers = [torch.optim.SGD(m.parameters(), 0.05, 0.9) for m in (ours, plain)]
    for _ in range(3):
        for model, optimiser in zip((ours, plain), optimisers, strict=True):
            optimiser.zero_grad()
            run(model, given)[1].backward()
            optimiser.step()
    close(dict(ours.named_parameters()), dict(plain.named_parameters()), dtype)
    close(dict(ours.named_buffers()), dict(plain.named_buffers()), dtype)
    close(run(ours.eval(), given)[0], run(plain.eval(), given)[0], dtype, "in evaluation")


@models
def test_state_goes_everywhere(name: str) -> None:
    """Into the model as it was, through copies and files, and back by undo."""
    plain, ours, report = pair(name)
    given = inputs(name, torch.float32)
    originals = [type(module) for module in plain.modules()]
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.1)
    run(ours, given)[1].backward()
    ours.eval(), plain.eval()
    want = run(ours, given)[0]
    plain.load_state_dict(ours.state_dict())
    close(run(plain, given)[0], want, torch.float32, "state_dict")
    stored = io.BytesIO()
    torch.save(ours, stored)
    stored.seek(0)
    for made in (copy.deepcopy(ours), torch.load(stored, weights_only=False)):
        assert [type(module) for module in made.modules()] == [type(m) for m in ours.modules()]
        torch.testing.assert_close(run(made, given)[0], want, rtol=0, atol=0)
    before = list(ours.parameters())
    report.undo()
    assert [type(module) for module in ours.modules()] == originals
    assert all(a is b for a, b in zip(ours.parameters(), before, strict=True))
    if "attention" in MODELS[name][1] and name != "encoder":
        ours.set_attn_implementation("sdpa")
    torch.testing.assert_close(run(ours, given)[0], run(plain, given)[0], rtol=0, atol=0)


@models
def test_compiles_with_as_few_breaks(name: str) -> None:
    plain, ours, _ = pair(name)
    given = inputs(name, torch.float32)
    breaks, losses = [], []
    for model in (plain, ours):
        torch._dynamo.reset()
        counters["graph_break"].clear()
        losses.append(run(torch.compile(model, backend="aot_eager"), given)[1])
        breaks.append(sum(counters["graph_break"].values()))
    assert breaks[1] <= breaks[0], counters["graph_break"]
    losses[1].backward()
    fresh = pair(name)[0]
    want = run(fresh, given)[1]
    want.backward()
    close(losses[1], want, torch.float32, "loss")
    close(gradients(ours), gradients(fresh), torch.float32)


@models
def test_autocast(name: str) -> None:
    """In bf16, as near to fp64 as the model as it was, with the same dtypes."""
    plain, ours, _ = pair(name)
    wide = inputs(name, torch.float64)
    exact = run(copy.deepcopy(plain).double(), wide)[0]
    results = []
    for model in (ours, plain):
        with torch.autocast("cpu", torch.bfloat16):
            out, loss = run(model, inputs(name, torch.float32))
        loss.backward()
        results.append((out, gradients(model)))
    (got, grads), (want, others) = results
    right, error, allowed = judge(got, exact, want)
    assert right, (error, allowed)
    for key, other in others.items():
        grad = grads[key]
        assert (grad is None) == (other is None), key
        if grad is not None and other is not None:
            assert grad.dtype == other.dtype
            off = (grad - other).abs().max()
            assert off <= 0.1 * (other.abs().max() + 0.01), (key, off)
