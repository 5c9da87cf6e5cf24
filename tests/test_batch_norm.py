"""Channels where normalising them is hard: large means, many channels, odd ones innermost, running
estimates, and what is kept for backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pydl import functional
from pydl.table import TABLE, Case, Make
from tests import harness

CHANNELS = (1, 3, 64, 257, 2048, 8192)


def _large(make: Make, *shape: int, layout: str = "contiguous") -> Tensor:
    """10^4 + N(0, 1), with a spread between channels."""
    return make(*shape, scale=1.0, layout=layout) + 1e4


def _judged(name: str, backend: str, case: Case) -> list[str]:
    got = harness.run(harness.on(TABLE[name], backend), case, torch.float32)
    found = harness.compare(got, TABLE[name], case, torch.float32)
    return [f"{case.label}: {one}" for one in found]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_large_mean(layout: str, backend: str) -> None:
    """The variance is not drowned by the mean, however many the channels."""
    make = Make(torch.float32, harness.device(backend), f"large {layout}")
    complaints = []
    for c in CHANNELS:
        shape = (4, c, 3, 3) if c > 64 else (16, c, 9, 9)
        x = _large(make, *shape, layout=layout)
        if harness.kind(backend) != backend and x.numel() > (20_000, 4500)[backend == "triton"]:
            continue
        case = Case(f"{c} channels", (x, None, None, make(c), make(c), True))
        complaints += _judged("batch_norm", backend, case)
    assert not complaints, harness.summary(complaints)


def test_a_large_mean_of_groups(backend: str) -> None:
    make = Make(torch.float32, harness.device(backend), "large groups")
    complaints = []
    for layout in ("contiguous", "channels_last"):
        x = _large(make, 2, 6, 11, 13, layout=layout)
        complaints += _judged("group_norm", backend, Case(layout, (x, 3, make(6), make(6))))
    x = _large(make, 2, 6, 11, 13)
    complaints += _judged("instance_norm", backend, Case("instances", (x,)))
    assert not complaints, harness.summary(complaints)


@pytest.mark.parametrize("shape", [(65_537, 5), (70_001, 3), (66_000, 2, 3)])
def test_many_samples(shape: tuple[int, ...]) -> None:
    """More than a grid's second dimension has blocks."""
    make = Make(torch.float32, seed="samples")
    x = make(*shape)
    complaints = _judged("batch_norm", "cpu", Case("batch", (x, None, None, None, None, True)))
    if len(shape) > 2:
        complaints += _judged("group_norm", "cpu", Case("groups", (x, 1)))
    assert not complaints, harness.summary(complaints)


@pytest.mark.parametrize("channels", [1, 3, 7, 33, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_channels_innermost(channels: int, dtype: torch.dtype, backend: str) -> None:
    """Rows that start at odd addresses, forward and backward, each op and memory format."""
    if harness.kind(backend) == "triton, interpreted" and channels not in (3, 33):
        pytest.skip("3 and 33 channels are enough for the interpreter")
    make = Make(dtype, harness.device(backend), f"odd {channels}")
    x = make(3, channels, 5, 2, layout="channels_last")
    weights, complaints = (make(channels), make(channels)), []
    cases = {
        "batch_norm_act": (x, None, None, *weights, True, 0.1, 1e-5, make(3, channels, 5, 2)),
        "group_norm": (x, channels if channels < 4 else 1, *weights),
        "instance_norm": (x, None, None, *weights),
    }
    for name, args in cases.items():
        case = Case(name, args)
        got = harness.run(harness.on(TABLE[name], backend), case, dtype)
        complaints += harness.compare(got, TABLE[name], case, dtype)
        native = TABLE[name].native(*args)
        assert harness.strides(got[0]) == harness.strides(native), name
    assert not complaints, harness.summary(complaints)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.1, 0.75, 1.0])
def test_running_estimates(dtype: torch.dtype, momentum: float, backend: str) -> None:
    """They move as torch's do; evaluation uses them and leaves them alone."""
    device = harness.device(backend)
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("triton serves no fp64")
    make = Make(dtype, device, "running")
    ours = [torch.zeros(6, device=device), torch.ones(6, device=device)]
    if dtype == torch.float64:
        ours = [t.double() for t in ours]
    theirs = [t.clone() for t in ours]
    for _ in range(3):
        x = make(4, 6, 5, 3)
        functional.batch_norm(x, *ours, training=True, momentum=momentum, backend=backend)
        F.batch_norm(x, *theirs, training=True, momentum=momentum)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    kept = [t.clone() for t in ours]
    functional.batch_norm(x, *ours, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(ours, kept, strict=True))


def test_evaluation_has_gradients(backend: str) -> None:
    """Of x, the residual, the weight and the bias, the estimates being constants."""
    make = Make(torch.float32, harness.device(backend), "evaluation")
    running = (make(6), make(6).abs() + 0.5)
    x, residual, weight, bias = make(4, 6, 7), make(4, 6, 7), make(6), make(6)

    def gradients(by: str) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias, residual)]
        y = functional.batch_norm_act(
            leaves[0], *running, *leaves[1:3], residual=leaves[3], act="silu", backend=by
        )
        return torch.autograd.grad(y.square().sum(), leaves)

    for got, want in zip(gradients(backend), gradients("torch"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("act", ["identity", "relu", "mish"])
def test_saves_no_more_than_it_needs(act: str) -> None:
    """x, the weights, three numbers a channel, and the residual where an activation follows."""
    leaves = [torch.randn(s, requires_grad=True) for s in ((4, 8, 6, 6), 8, 8, (4, 8, 6, 6))]
    x, weight, bias, residual = leaves
    saved: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        saved[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        functional.batch_norm_act(
            x, None, None, weight, bias, True, residual=residual, act=act, backend="cpu"
        )
    inputs = {t.data_ptr() for t in leaves}
    own = sum(t.numel() for pointer, t in saved.items() if pointer not in inputs)
    assert own == 3 * 8
    assert sum(t.numel() for t in saved.values()) <= 2 * x.numel() + 16 + own


def test_the_same_bits(backend: str) -> None:
    """However the sums are shared out."""
    make = Make(torch.float32, harness.device(backend), "bits")
    shape = (3, 5, 4, 7) if harness.kind(backend) != backend else (8, 33, 30, 31)
    x = make(*shape)
    case = Case("bits", (x, None, None, make(shape[1]), make(shape[1]), True))
    op = harness.on(TABLE["batch_norm_act"], backend)
    first = harness.run(op, case, torch.float32)
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        try:
            torch.set_num_threads(count)
            again = harness.run(op, case, torch.float32)
        finally:
            torch.set_num_threads(threads)
        assert all(harness.same_bits(a, b) for a, b in zip(first, again, strict=True))


def test_one_value_a_channel() -> None:
    wrong = [
        lambda: functional.batch_norm(torch.ones(1, 4), None, None, training=True, backend="cpu"),
        lambda: functional.instance_norm(torch.ones(2, 4, 1), backend="cpu"),
        lambda: functional.group_norm(torch.ones(1, 4), 4, backend="cpu"),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match="Expected more than 1"):
            call()


def test_an_empty_batch() -> None:
    x = torch.empty(0, 4, 3, 3, requires_grad=True)
    weight = torch.ones(4, requires_grad=True)
    for y in (
        functional.batch_norm(x, torch.zeros(4), torch.ones(4), weight, training=True,
                              backend="cpu"),
        functional.group_norm(x, 2, weight, backend="cpu"),
    ):  # fmt: skip
        assert y.shape == x.shape
        dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
        assert dx.shape == x.shape
        assert dweight.count_nonzero() == 0


@pytest.mark.parametrize("asked", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(0, 6, 4), (0, 6, 0), (2, 6, 0)], ids=str)
def test_no_elements(shape: tuple[int, ...], asked: str) -> None:
    """Of no samples or no positions the definition makes as much, under torch.func too."""
    x = torch.zeros(shape)
    calls = [lambda t: functional.group_norm(t, 2, backend=asked)]
    if shape[0] == 0:
        calls.append(lambda t: functional.instance_norm(t, backend=asked))
    for call in calls:
        assert call(x).shape == x.shape
        gradient = torch.func.grad(lambda t, call=call: call(t).sum())(x)
        assert gradient.shape == x.shape
