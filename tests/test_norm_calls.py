"""Norms as they are called in models: whoever computes, what torch takes is taken, and what it
refuses is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import pydl
from pydl import calibration
from pydl import functional as F

FLOATS = ("float32", "float16", "bfloat16")
OPS = ("layer_norm", "rms_norm", "batch_norm", "batch_norm_short", "instance_norm",
       "instance_norm_short", "batch_norm_act", "batch_norm_act_short", "leaky_relu")  # fmt: skip


@pytest.fixture
def always(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The automatic choice takes kernels for every size."""
    path = tmp_path / "calibration.json"
    sizes = {op: {dtype: ["cpu", 0, 0] for dtype in FLOATS} for op in OPS}
    path.write_text(json.dumps({"sizes": {"cpu": sizes}}))
    monkeypatch.setenv("PYDL_CALIBRATION", str(path))
    try:
        calibration.reload()
        yield
    finally:
        monkeypatch.undo()
        calibration.reload()


@pytest.mark.usefixtures("always")
def test_weights_that_only_torch_takes() -> None:
    """By the automatic choice: of a dtype that no kernel takes beside the input's."""
    x = torch.randn(4, 6, 8)
    wide = torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(F.rms_norm(x, (8,), wide), nn.functional.rms_norm(x, (8,), wide))
    mean, var = torch.zeros(6).bfloat16(), torch.ones(6).bfloat16()
    given = (mean.clone(), var.clone())
    y = F.instance_norm(x, mean, var)
    torch.testing.assert_close(y, nn.functional.instance_norm(x, *given))
    torch.testing.assert_close(mean, given[0])
    with pytest.raises(RuntimeError, match=r"rms_norm: weight has dtype torch.float64"):
        F.rms_norm(x, (8,), wide, backend="cpu")


@pytest.mark.usefixtures("always")
def test_a_residual_of_another_dtype() -> None:
    """PyTorch adds it, as under autocast, where no backend is named."""
    module = pydl.nn.BatchNormAct(6)
    y, x = torch.randn(4, 6, 5).bfloat16(), torch.randn(4, 6, 5)
    wanted = torch.relu(nn.BatchNorm1d(6)(y) + x)
    torch.testing.assert_close(module(y, x), wanted)
    module.backend = "cpu"
    with pytest.raises(RuntimeError, match="batch_norm_act"):
        module(y, x)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("named", [None, "cpu", "reference"])
def test_what_torch_refuses(named: str | None) -> None:
    x = torch.randn(4, 6, 5)
    mean = torch.zeros(6)
    wrong = [
        (lambda: F.batch_norm(x, None, None, training=True, eps=0.0, backend=named), "eps"),
        (lambda: F.batch_norm(x, mean, mean, eps=-1.0, backend=named), "eps"),
        (lambda: F.batch_norm_act(x, None, None, training=True, eps=-1.0, backend=named), "eps"),
        (lambda: F.batch_norm(x, mean, None, training=True, backend=named), "running_var"),
    ]
    for call, what in wrong:
        with pytest.raises(ValueError, match=f"pydl: batch_norm.*{what}"):
            call()


@pytest.mark.parametrize("seed", [
    torch.tensor([1, 2], device="meta"), torch.tensor([1, 2], dtype=torch.int32), torch.tensor(3),
    7,
])  # fmt: skip
@pytest.mark.parametrize("named", ["torch", "reference", "cpu"])
def test_a_seed_that_is_none(seed: torch.Tensor, named: str) -> None:
    x = torch.randn(3, 8)
    for call in (
        lambda: F.bias_act(x, x[0], "relu", 0.5, seed=seed, backend=named),
        lambda: F.add_layer_norm(x, x, (8,), dropout_p=0.5, seed=seed, backend=named),
        lambda: F.add_rms_norm(x, x, (8,), dropout_p=0.5, seed=seed, backend=named),
        lambda: F.scaled_dot_product_attention(x, x, x, None, 0.5, seed=seed, backend=named),
    ):
        with pytest.raises(RuntimeError, match=r"seed is .*, wants two int64 values on cpu"):
            call()


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("make", [
    lambda: pydl.nn.BatchNorm1d(6), lambda: pydl.nn.BatchNormAct(6, "gelu"),
    lambda: pydl.nn.InstanceNorm1d(6, affine=True, track_running_stats=True),
])  # fmt: skip
def test_training_between_evaluation_and_its_backward(make: type) -> None:
    """The gradient is of the estimates that were used, once and twice."""
    module = make().eval()
    x = torch.randn(3, 6, 5, requires_grad=True)
    wanted = torch.autograd.grad(module(x).square().sum(), x)[0]

    y = module(x)
    module.train()(torch.randn(3, 6, 5) * 4)
    (got,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    torch.testing.assert_close(got, wanted)
    torch.autograd.grad(got.sum(), x)


@pytest.mark.usefixtures("always")
def test_instance_norm_that_tracks_under_transforms() -> None:
    ours, theirs = (lib.InstanceNorm1d(6, track_running_stats=True) for lib in (pydl.nn, torch.nn))
    x = torch.randn(3, 6, 5)
    got, want = (torch.func.grad(lambda x, m=m: m(x).pow(3).sum())(x) for m in (ours, theirs))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)


@pytest.mark.usefixtures("always")
def test_the_output_of_leaky_relu_may_be_changed() -> None:
    """As torch's: backward needs its input."""
    x = torch.randn(5, 7, requires_grad=True)
    y = F.leaky_relu(x, 0.1)
    y += x
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.where(x > 0, 2.0, 1.1))
