"""attn_implementation="pydl" against "eager" in small models of transformers."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch
from torch import Tensor

import pydl
from pydl.integrations import transformers as integration

BACKENDS: list[str | None] = [None, "reference", "cpu"]
SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
# The configuration's class, the model's, and their arguments.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertModel", SMALL),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**SMALL, "num_key_value_heads": 2}),
    "mistral": ("MistralConfig", "MistralForCausalLM",
                {**SMALL, "num_key_value_heads": 2, "sliding_window": 5}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM",
               {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5,
                "attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 8}),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5),
    "modernbert": ("ModernBertConfig", "ModernBertModel",
                   {**SMALL, "local_attention": 4, "global_attn_every_n_layers": 2}),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM",
                {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2,
                 "num_experts_per_tok": 1, "sliding_window": 5}),
}  # fmt: skip
# The others' eager attention has a softmax in fp32, where fp64's most negative number is -inf.
DOUBLE = ("bert", "gpt2")
models = pytest.mark.parametrize("name", MODELS)
backends = pytest.mark.parametrize("asked", BACKENDS)


def built(name: str) -> tuple[Any, Any]:
    """(a model with our attention, the same with eager), evaluating."""
    transformers = pytest.importorskip("transformers")
    integration.register()
    config, model, kwargs = MODELS[name]
    made = []
    for implementation in ("pydl", "eager"):
        torch.manual_seed(0)
        settings = getattr(transformers, config)(
            **kwargs, attn_implementation=implementation, use_cache=False
        )
        one = getattr(transformers, model)(settings).eval()
        one = one.double() if name in DOUBLE else one
        assert one.config._attn_implementation == implementation
        made.append(one)
    with torch.no_grad():
        for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True):
            a.normal_(0, 0.3)
            b.copy_(a)
    return made[0], made[1]


def inputs(name: str, padded: bool, length: int = 12) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, 61, (2, length))
    given = {"input_ids": ids}
    if name == "t5":
        given["decoder_input_ids"] = torch.randint(1, 61, (2, 7))
    if padded:
        seen = torch.ones(2, length, dtype=torch.long)
        seen[1, length - 4 :] = 0
        given["attention_mask"] = seen
    return given


def result(model: Any, given: dict[str, Tensor]) -> Tensor:
    out = model(**given)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def kept(out: Tensor, given: dict[str, Tensor]) -> Tensor:
    """What stands at padding is nobody's."""
    if "attention_mask" in given and out.shape[1] == given["attention_mask"].shape[1]:
        return out[given["attention_mask"].bool()]
    return out


@backends
@models
@pytest.mark.parametrize("padded", [False, True])
def test_outputs_and_gradients(name: str, padded: bool, asked: str | None) -> None:
    ours, eager = built(name)
    given = inputs(name, padded)
    with pydl.use_backend(asked):
        got = kept(result(ours, given), given)
        dy = torch.randn(got.shape, dtype=got.dtype)
        got.backward(dy)
    want = kept(result(eager, given), given)
    want.backward(dy)
    tolerance = 1e-9 if name in DOUBLE else 2e-4
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    for (path, a), b in zip(ours.named_parameters(), eager.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), path
        if a.grad is not None:
            off = (a.grad - b.grad).abs().max()
            assert off <= tolerance * (b.grad.abs().max() + 0.1), (path, off)
    with torch.no_grad(), pydl.use_backend(asked):
        torch.testing.assert_close(kept(result(ours, given), given), got)


@backends
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generates_the_same(name: str, cache: str, asked: str | None) -> None:
    """With a cache of keys and padding on the left, longer than the window."""
    ours, eager = built(name)
    ids = inputs(name, False, 9)["input_ids"]
    seen = torch.ones_like(ids)
    seen[1, :3] = 0
    made = []
    for model, backend in ((ours, asked), (eager, None)):
        with pydl.use_backend(backend):
            out = model.generate(
                ids, attention_mask=seen, max_new_tokens=8, do_sample=False, use_cache=True,
                cache_implementation=cache, disable_compile=True, pad_token_id=0,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        made.append(torch.stack(out.logits))
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-5)


@backends
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_sequences(name: str, asked: str | None) -> None:
    """Told apart by positions that begin anew."""
    ours, eager = built(name)
    ids = inputs(name, False)["input_ids"][:1]
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None]
    with pydl.use_backend(asked):
        got = result(ours, {"input_ids": ids, "position_ids": positions})
    want = result(eager, {"input_ids": ids, "position_ids": positions})
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    alone = result(eager, {"input_ids": ids[:, 5:]})
    torch.testing.assert_close(got[:, 5:], alone, rtol=1e-4, atol=1e-5)


def test_windows_reach_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mask where the window says all, with both where there is padding."""
    ours, _ = built("mistral")
    seen: list[tuple[bool, Any]] = []
    real = integration.F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *a: Any, **kw: Any) -> Any:
        seen.append((mask is None, kw["window"]))
        return real(q, k, v, mask, *a, **kw)

    monkeypatch.setattr(integration.F, "scaled_dot_product_attention", watched)
    with pydl.use_backend("cpu"):
        ours(**inputs("mistral", False))
        ours(**inputs("mistral", True))
    assert seen == [(True, (4, 0))] * 2 + [(False, (4, 0))] * 2


def test_a_mask_that_was_written_to_counts() -> None:
    pytest.importorskip("transformers")
    mask = integration.attention_mask(
        batch_size=1, q_length=8, kv_length=8, local_size=3, allow_is_causal_skip=False,
        mask_function=lambda b, h, q, k: (k <= q) & (k > q - 3),
    )  # fmt: skip
    assert mask is not None
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    with pydl.use_backend("cpu"):
        for _ in range(2):
            got, _ = integration.attention(torch.nn.Module(), q, k, v, mask)
            want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
            torch.testing.assert_close(got, want.transpose(1, 2))
            mask[..., 0] = True


@backends
@pytest.mark.parametrize("name", ["bert", "llama", "mistral"])
def test_compiles(name: str, asked: str | None) -> None:
    ours, eager = built(name)
    given = inputs(name, True)
    torch._dynamo.reset()
    with pydl.use_backend(asked):
        got = kept(result(torch.compile(ours, backend="aot_eager"), given), given)
    got.square().sum().backward()
    want = kept(result(eager, given), given)
    want.square().sum().backward()
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
    a, b = (next(m.parameters()).grad for m in (ours, eager))
    assert (a - b).abs().max() <= 2e-4 * b.abs().max()


def test_drops_in_training() -> None:
    ours, _ = built("bert")
    given = inputs("bert", False)
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ours.train()
    torch.testing.assert_close(result(ours, given), result(ours, given))
    for layer in ours.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    assert not torch.equal(result(ours, given), result(ours, given))


def test_what_is_refused() -> None:
    module = torch.nn.Module()
    q = torch.randn(1, 2, 3, 4)
    for kwargs in ({"output_attentions": True}, {"cache": object()}, {"cu_seq_lens_q": q}):
        with pytest.raises(ValueError, match="remedy"):
            integration.attention(module, q, q, q, None, **kwargs)


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_without_a_mask(length: int, causal: bool) -> None:
    module = torch.nn.Module()
    q, k, v = (torch.randn(1, 2, n, 4) for n in (length, 6, 6))
    got, _ = integration.attention(module, q, k, v, None, is_causal=causal, sliding_window=2)
    own = torch.arange(6)[6 - length :, None]
    apart = torch.arange(6) - own
    seen = (apart > -2) & (apart < (1 if causal or length == 1 else 2))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
    torch.testing.assert_close(got, want.transpose(1, 2))


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "transformers":
            raise ImportError("no such module")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install 'transformers"):
        integration.register()
