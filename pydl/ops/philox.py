"""The random bits of dropout: Philox4x32-10 (Salmon et al. 2011), the same on every backend.

Element i of a tensor, counted in logical order, takes word i % 4 of the block with counter (i // 4,
offset) and key seed. `seed` is a tensor of two int64 values, (seed, offset), so that no value
leaves the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def check_rate(op: str, p: float) -> float:
    """The rate of a dropout.

    Raises:
        ValueError: it is not in [0, 1].
    """
    if not 0 <= p <= 1:
        raise ValueError(f"pydl: {op}: dropout_p is {p}, wants 0 to 1")
    return p


def check_seed(op: str, seed: Tensor | None, device: torch.device) -> None:
    """Raises RuntimeError for a seed that is not of two int64 values on the device."""
    if seed is None:
        return
    if not isinstance(seed, Tensor):
        got = f"a {type(seed).__name__}"
    elif seed.dtype == torch.int64 and seed.device == device and tuple(seed.shape) == (2,):
        return
    else:
        got = f"{seed.dtype} {tuple(seed.shape)} on {seed.device}"
    raise RuntimeError(f"pydl: {op}: seed is {got}, wants two int64 values on {device}")


def draw_seed(device: torch.device) -> Tensor:
    """A fresh (seed, offset) from torch's generator of the device."""
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)


def _multiply(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32-bit product, in int64 without overflow."""
    low = (a & 0xFFFF) * factor
    high = (a >> 16) * factor + (low >> 16)
    return (high >> 16) & _LOW, ((high << 16) | (low & 0xFFFF)) & _LOW


def words(n: int, seed: Tensor) -> Tensor:
    """The first n random words, int64 in [0, 2^32)."""
    counter = torch.arange((n + 3) // 4, device=seed.device)
    key, offset = seed[0], seed[1]
    a, b = counter & _LOW, counter >> 32
    c, d = (offset & _LOW).expand_as(a), ((offset >> 32) & _LOW).expand_as(a)
    k0, k1 = key & _LOW, (key >> 32) & _LOW
    for _ in range(10):
        left, left_low = _multiply(a, 0xD2511F53)
        right, right_low = _multiply(c, 0xCD9E8D57)
        a, b, c, d = right ^ b ^ k0, right_low, left ^ d ^ k1, left_low
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.stack((a, b, c, d), dim=1).reshape(-1)[:n]


def dropout_factors(shape: Sequence[int], seed: Tensor, p: float) -> Tensor:
    """0 where an element is dropped, else 1 / (1 - p); fp64."""
    threshold = min(int(p * 2**32), 2**32 - 1)
    kept = words(prod(shape), seed) >= threshold
    scale = 1 / (1 - p) if p < 1 else 0.0
    return (kept.double() * scale).view(tuple(shape))
