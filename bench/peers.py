"""What pydl is compared with: for each peer, its counterparts by the op's name.

A counterpart is built from the op's arguments by name and returns a call without arguments, or None
where the peer has no such variant. What a peer computes is checked against the definition before it
is timed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from pydl.table import Case, Op

Arguments = Mapping[str, Any]
Call = Callable[[], Any]
Counterpart = Callable[[Arguments], Call | None]


@dataclass(frozen=True)
class Peer:
    """A peer; without counterparts it is torch itself, and `build` takes the row's native
    function."""

    package: str
    module: str
    devices: tuple[str, ...]
    counterparts: Mapping[str, Counterpart] = field(default_factory=dict)
    native: Callable[[Op], Callable[..., Any]] | None = None

    def installed(self) -> bool:
        return find_spec(self.module) is not None

    def has(self, op: str) -> bool:
        return self.native is not None or op in self.counterparts

    def builder(self, name: str, op: Op, device: str) -> Callable[[Case], Call] | str:
        """What binds this peer's function to a call of the op, or why there is none."""
        if self.native is not None:
            function = self.native(op)
            return lambda case: partial(function, *case.args, **case.kwargs)
        if op.name not in self.counterparts:
            return f"{name} has no {op.name}"
        if device not in self.devices:
            return f"{name} runs on {' and '.join(self.devices)} only"
        counterpart, signature = self.counterparts[op.name], inspect.signature(op.function)

        def build(case: Case) -> Call:
            bound = signature.bind(*case.args, **case.kwargs)
            bound.apply_defaults()
            call = counterpart(bound.arguments)
            if call is None:
                raise NotImplementedError(f"{name} has no such variant of {op.name}")
            return call

        return build


def _compiled(op: Op) -> Callable[..., Any]:
    import torch._functorch.config

    # Timing the backward pass alone keeps its graph, which donated buffers forbid.
    torch._functorch.config.donated_buffer = False
    # A function of its own for each row: a second shape would make one that is shared recompile for
    # any shape.
    torch._dynamo.reset()
    return torch.compile(lambda *args, **kwargs: op.native(*args, **kwargs), dynamic=False)


def _liger_gated(given: Arguments) -> Call | None:
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    functions = {"silu": LigerSiLUMulFunction, "gelu_tanh": LigerGELUMulFunction}
    if given["act"] not in functions:
        return None
    return partial(functions[given["act"]].apply, given["gate"], given["up"])


def _fla_gated(given: Arguments) -> Call | None:
    from fla.modules.activations import swiglu

    return partial(swiglu, given["gate"], given["up"]) if given["act"] == "silu" else None


def _plain_attention(given: Arguments) -> bool:
    """Whether a call of scaled_dot_product_attention has neither a mask nor dropout."""
    return given.get("attn_mask") is None and not given.get("dropout_p")


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex_attention(given: Arguments) -> Call | None:
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = given["query"], given["key"], given["value"]
    if not _plain_attention(given):
        return None
    mask = None
    if given.get("is_causal"):
        mask = create_block_mask(
            lambda b, h, i, j: i >= j, None, None, q.shape[-2], k.shape[-2], device=q.device.type
        )
    options = {"scale": given.get("scale"), "enable_gqa": bool(given.get("enable_gqa"))}
    return partial(_compiled_flex(), q, k, v, block_mask=mask, **options)


def _flash_attention(given: Arguments) -> Call | None:
    from flash_attn import flash_attn_func

    q, k, v = (given[name].transpose(1, 2) for name in ("query", "key", "value"))
    causal = bool(given.get("is_causal"))
    if not _plain_attention(given) or (causal and q.shape[1] != k.shape[1]):
        return None
    return lambda: flash_attn_func(
        q, k, v, softmax_scale=given.get("scale"), causal=causal
    ).transpose(1, 2)


def _xformers_attention(given: Arguments) -> Call | None:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    q, k, v = (given[name].transpose(1, 2) for name in ("query", "key", "value"))
    if not _plain_attention(given) or q.shape[2] != k.shape[2]:
        return None
    bias = LowerTriangularMask() if given.get("is_causal") else None
    return lambda: memory_efficient_attention(
        q, k, v, attn_bias=bias, scale=given.get("scale")
    ).transpose(1, 2)


def _band(given: Arguments) -> tuple[int, int] | None:
    """Keys seen before and after a query's own, where nothing else shapes local attention."""
    size = given["window_size"]
    left, right = (size // 2, size // 2) if isinstance(size, int) else size
    plain = not given.get("dropout_p") and (given.get("dilation") or 1) == 1
    plain = plain and given.get("bias") is None and given.get("key_padding_mask") is None
    if not plain or min(left, right) < 0:
        return None
    return left, 0 if given.get("causal") else right


def _flex_local(given: Arguments) -> Call | None:
    from torch.nn.attention.flex_attention import create_block_mask

    band = _band(given)
    if band is None:
        return None
    q, k, v = given["query"], given["key"], given["value"]
    n, (left, right) = q.shape[-2], band
    mask = create_block_mask(
        lambda b, h, i, j: (i - j <= left) & (j - i <= right), None, None, n, n,
        device=q.device.type,
    )  # fmt: skip
    return partial(_compiled_flex(), q, k, v, block_mask=mask, scale=given.get("scale"))


def _local_attention(given: Arguments) -> Call | None:
    from local_attention import LocalAttention

    band = _band(given)
    if band is None or band[0] == 0 or band[1] not in (0, band[0]):
        return None
    module = LocalAttention(
        band[0], causal=band[1] == 0, look_backward=1, look_forward=int(band[1] > 0),
        exact_windowsize=True, use_rotary_pos_emb=False, autopad=True, scale=given.get("scale"),
    )  # fmt: skip
    return partial(module, given["query"], given["key"], given["value"])


def _natten_local(given: Arguments) -> Call | None:
    from natten import na1d

    band = _band(given)
    if band is None or band[0] != band[1]:
        return None  # at the ends its window moves inwards: the gate tells
    q, k, v = (given[name].transpose(1, 2) for name in ("query", "key", "value"))
    size = 2 * band[0] + 1
    return lambda: na1d(q, k, v, kernel_size=size, scale=given.get("scale")).transpose(1, 2)


def _liger_layer_norm(given: Arguments) -> Call | None:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    if given["weight"] is None or given["bias"] is None or given["weight"].dim() != 1:
        return None
    x, weight, bias = given["input"], given["weight"], given["bias"]
    return lambda: LigerLayerNormFunction.apply(x, weight, bias, given["eps"])


def _liger_rms_norm(given: Arguments) -> Call | None:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    if given["weight"] is None or given["weight"].dim() != 1 or given["eps"] is None:
        return None
    x, weight = given["input"], given["weight"]
    return lambda: LigerRMSNormFunction.apply(x, weight, given["eps"], 0.0, "llama", False)


def _liger_add_rms_norm(given: Arguments) -> Call | None:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    if given["weight"] is None or given["weight"].dim() != 1 or given.get("dropout_p"):
        return None
    x, residual, weight = given["input"], given["residual"], given["weight"]
    return lambda: LigerFusedAddRMSNormFunction.apply(x, residual, weight, given["eps"])


def _fla_linear(given: Arguments) -> Call | None:
    from fla.ops.linear_attn import chunk_linear_attn

    special = ("key_padding_mask", "initial_state", "decay", "scale")
    if not given["causal"] or given["feature_map"] != "elu" or given.get("return_state"):
        return None
    if any(given.get(name) is not None for name in special):
        return None

    def call() -> Tensor:
        q, k = (torch.nn.functional.elu(given[name]) + 1 for name in ("query", "key"))
        q, k, v = (t.transpose(1, 2) for t in (q, k, given["value"]))
        return chunk_linear_attn(q, k, v, scale=1.0, normalize=given["normalize"])[0].transpose(
            1, 2
        )

    return call


ATTENTION = "scaled_dot_product_attention"
LOCAL = "local_attention"
GPU = ("cuda",)
BOTH = ("cpu", "cuda")
COMPILING = ("compile", "flex")

PEERS: dict[str, Peer] = {
    "torch": Peer("torch", "torch", BOTH, native=lambda op: op.native),
    "compile": Peer("torch", "torch", BOTH, native=_compiled),
    "flex": Peer("torch", "torch", BOTH, {ATTENTION: _flex_attention, LOCAL: _flex_local}),
    "liger": Peer(
        "liger-kernel",
        "liger_kernel",
        GPU,
        {
            "gated_act": _liger_gated,
            "layer_norm": _liger_layer_norm,
            "rms_norm": _liger_rms_norm,
            "add_rms_norm": _liger_add_rms_norm,
        },
    ),
    "fla": Peer(
        "flash-linear-attention",
        "fla",
        GPU,
        {"gated_act": _fla_gated, "linear_attention": _fla_linear},
    ),
    "local-attention": Peer("local-attention", "local_attention", BOTH, {LOCAL: _local_attention}),
    "flash-attn": Peer("flash-attn", "flash_attn", GPU, {ATTENTION: _flash_attention}),
    "xformers": Peer("xformers", "xformers", GPU, {ATTENTION: _xformers_attention}),
    "natten": Peer("natten", "natten", GPU, {LOCAL: _natten_local}),
}
