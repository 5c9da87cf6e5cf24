"""torch's counter of operations counts those of kernels as it counts its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pydl
import pydl.functional as F
from pydl.integrations import flop_counter
from tests import harness


def counted(call: Callable[[], Any], backward: bool = False) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    flop_counter.register()
    flop_counter.register()
    with FlopCounterMode(display=False) as counter:
        out = call()
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


def drawn(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", [(33, 12), (3, 5, 12), (12,)])
def test_linear_counts_as_torchs(shape: tuple[int, ...], backward: bool) -> None:
    x, weight, bias = drawn(shape, (7, 12), (7,))
    want = counted(lambda: TF.linear(x, weight, bias), backward)
    assert want > 0
    assert counted(lambda: F.linear(x, weight, bias, backend="cpu"), backward) == want
    with torch.no_grad():
        assert counted(lambda: F.linear(x, weight, backend="cpu")) * (3 if backward else 1) == want


@pytest.mark.parametrize("heads", [4, 2])
def test_attention_counts_as_torchs(backend: str, heads: int) -> None:
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    device = harness.device(backend)
    q, k, v = (t.to(device) for t in drawn((2, 4, 9, 8), (2, heads, 7, 8), (2, heads, 7, 8)))
    shapes = q.shape, k.shape, v.shape

    def native() -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return TF.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def ours() -> Any:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, backend=backend)

    forward = counted(ours)
    assert forward == sdpa_flop_count(*shapes) == counted(native)
    both = counted(ours, True)
    assert both - forward == sdpa_backward_flop_count(q.shape, *shapes)
    # torch's plain form keeps the scores that kernels compute again.
    assert (both - forward) * 4 == 5 * (counted(native, True) - forward)


def test_windows_and_packed_sequences_count_what_meets() -> None:
    q, k, v = drawn((1, 2, 9, 4), (1, 2, 9, 4), (1, 2, 9, 4))
    for window, causal in (((2, 1), False), ((3, -1), False), ((2, 5), True)):
        left, right = (window[0], 0) if causal else window
        meets = sum(
            i - left <= j and (right < 0 or j <= i + right) for i in range(9) for j in range(9)
        )
        got = counted(
            lambda w=window, c=causal: F.scaled_dot_product_attention(
                q, k, v, is_causal=c, window=w, backend="cpu"
            )
        )
        assert got == 2 * 2 * meets * (4 + 4)
    one = q[..., -1:, :]
    last = {"causal_alignment": "bottom_right", "window": (3, 0), "backend": "cpu"}
    assert counted(lambda: F.scaled_dot_product_attention(one, k, v, **last)) == 2 * 2 * 4 * 8
    packed = [t[0].transpose(0, 1) for t in (q, k, v)]
    starts = torch.tensor([0, 2, 9])
    got = counted(lambda: F.varlen_attention(*packed, starts, starts, 7, 7, backend="cpu"))
    assert got == 2 * 2 * (2 * 2 + 7 * 7) * (4 + 4)


def test_a_replaced_model_counts_what_it_did() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    x = torch.randn(40, 8)
    want = counted(lambda: model(x), True)
    report = pydl.replace(model, backend="cpu")
    assert len(report) == 3
    assert counted(lambda: model(x), True) == want


def test_torchs_module_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys, pydl, pydl.integrations.flop_counter as f; name = 'torch.utils.flop_counter'\n"
        "before = name in sys.modules; f.register(); print(before, name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
