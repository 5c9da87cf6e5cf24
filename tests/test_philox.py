"""Dropout's random bits: the published generator, alike on every backend, replayed in backward."""

from __future__ import annotations

import math

import pytest
import torch

from pydl import functional
from pydl.ops import philox
from tests import harness

MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[int, ...], key: tuple[int, ...], rounds: int = 10) -> tuple[int, ...]:
    """Salmon et al. 2011, figure 2, in plain integers."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(rounds):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right >> 32) ^ b ^ k0, right & MASK, (left >> 32) ^ d ^ k1, left & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return a, b, c, d


def words(n: int, seed: int, offset: int) -> list[int]:
    """The first n words as `pydl.ops.philox` numbers them."""
    key = (seed & MASK, seed >> 32 & MASK)
    blocks = (
        philox4x32((i & MASK, i >> 32, offset & MASK, offset >> 32 & MASK), key)
        for i in range(math.ceil(n / 4))
    )
    return [word for block in blocks for word in block][:n]


@pytest.mark.parametrize(
    ("counter", "key", "out"),
    [
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter: str, key: str, out: str) -> None:
    """The oracle of this file gives the known answers that the generator's authors publish."""
    numbers = [tuple(int(word, 16) for word in text.split()) for text in (counter, key, out)]
    assert philox4x32(numbers[0], numbers[1]) == numbers[2]


SEEDS = [
    (0, 0), (1, 0), (0, 1), (12345678901, 77), (2**62 - 1, 2**61 + 12345),
    (2**63 - 1, 2**63 - 1), (-1, -1), (-(2**63), 2**32), (2**31, 2**32 - 1),
]  # fmt: skip


@pytest.mark.parametrize(("seed", "offset"), SEEDS)
def test_words(seed: int, offset: int) -> None:
    """The definition's words are the oracle's."""
    got = philox.words(103, torch.tensor([seed, offset])).tolist()
    assert got == words(103, seed, offset)


def _factors(
    backend: str, n: int, seed: tuple[int, int], p: float, dtype: torch.dtype
) -> torch.Tensor:
    """What dropout multiplies by, read off an op that passes ones through."""
    device = harness.device(backend)
    ones, zero = (
        torch.ones(n, dtype=dtype, device=device),
        torch.zeros(n, dtype=dtype, device=device),
    )
    given = torch.tensor(seed, device=device)
    return functional.bias_act(ones, zero, "identity", p, seed=given, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks(backend: str, dtype: torch.dtype) -> None:
    """Every backend drops what the oracle's words say, for any seed, size and rate."""
    for seed in SEEDS:
        for n, p in ((1, 0.5), (5, 0.25), (1030, 0.1), (263, 0.9), (64, 1e-9), (64, 1.0)):
            kept = [word >= min(int(p * 2**32), 2**32 - 1) for word in words(n, *seed)]
            scale = 1 / (1 - p) if p < 1 else 0.0
            wanted = (torch.tensor(kept).double() * scale).to(dtype)
            got = _factors(backend, n, seed, p, dtype).cpu()
            assert torch.equal(got, wanted), (seed, n, p)


def test_a_mask_does_not_depend_on_layout(backend: str) -> None:
    """Elements are counted in logical order, whatever their order in memory."""
    seed = torch.tensor([5, 6], device=harness.device(backend))
    x = torch.randn(3, 4, 5, 6, device=harness.device(backend))
    bias = torch.randn(4, device=harness.device(backend))
    wanted = functional.bias_act(x, bias, "tanh", 0.4, dim=1, seed=seed, backend=backend)
    for moved in (
        x.to(memory_format=torch.channels_last),
        x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    ):
        got = functional.bias_act(moved, bias, "tanh", 0.4, dim=1, seed=seed, backend=backend)
        torch.testing.assert_close(got, wanted)


def test_a_mask_does_not_depend_on_threads() -> None:
    """Pieces that threads take begin anywhere in a block of four words."""
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(_factors("cpu", 100_003, (9, 8), 0.5, torch.float32))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.95])
def test_rate(p: float) -> None:
    """The share dropped is p within five standard deviations, and the mean stays."""
    n = 400_000
    factors = _factors("cpu", n, (2024, 3), p, torch.float64)
    share = float((factors == 0).double().mean())
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n)
    assert abs(float(factors.mean()) - 1) < 5 * math.sqrt(p / (1 - p) / n)


def test_replay_in_backward(backend: str) -> None:
    """Backward drops what forward dropped, though the mask is not saved."""
    device = harness.device(backend)
    x = torch.randn(37, 29, device=device, requires_grad=True)
    bias = torch.randn(29, device=device, requires_grad=True)
    y = functional.bias_act(x, bias, "sigmoid", 0.5, backend=backend)
    dx, dbias = torch.autograd.grad(y.sum(), (x, bias))
    dropped = y == 0
    assert 0.3 < float(dropped.float().mean()) < 0.7
    assert torch.equal(dx == 0, dropped)
    torch.testing.assert_close(dbias, dx.sum(0))


def test_fresh_masks_follow_torch_generator(backend: str) -> None:
    """Without a seed each call drops others, and torch.manual_seed repeats them."""
    x, bias = (torch.ones(n, device=harness.device(backend)) for n in (4096, 4096))

    def draw() -> torch.Tensor:
        return functional.bias_act(x, bias, "identity", 0.5, backend=backend)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first) and not torch.equal(first, second)


def test_two_calls_are_unrelated() -> None:
    """Masks of two seeds, and of neighbouring offsets, agree as often as chance has it."""
    n = 100_000
    base = _factors("cpu", n, (1, 0), 0.5, torch.float32) == 0
    for other in ((1, 1), (2, 0), (1, 4)):
        agree = float(
            (base == (_factors("cpu", n, other, 0.5, torch.float32) == 0)).double().mean()
        )
        assert abs(agree - 0.5) < 5 * 0.5 / math.sqrt(n)
