"""A block of a transformer, and torch's plan to run it in several processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import pydl

WIDTH, HEADS, KEY_HEADS, HIDDEN, LENGTH, BATCH = 16, 4, 2, 24, 6, 2
# The norm and the activation of a kind of block.
KINDS = {"rms": "silu", "layer": "gelu"}


class Attention(nn.Module):
    """With as many heads as the projections have on this rank."""

    def __init__(self) -> None:
        super().__init__()
        head = WIDTH // HEADS
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k = nn.Linear(WIDTH, KEY_HEADS * head, bias=False)
        self.v = nn.Linear(WIDTH, KEY_HEADS * head, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.fused = False

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (heads, WIDTH // HEADS)).transpose(1, 2)
            for part, heads in ((self.q, HEADS), (self.k, KEY_HEADS), (self.v, KEY_HEADS))
        )
        if self.fused:
            y = pydl.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True, backend="cpu"
            )
        else:
            y = _plain(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By operators that torch has sharding rules for on the CPU."""
    k, v = (t[:, :, None].expand(-1, -1, HEADS // KEY_HEADS, -1, -1) for t in (k, v))
    q = q.unflatten(1, (KEY_HEADS, HEADS // KEY_HEADS))
    scores = (q[..., :, None, :] * k[..., None, :, :]).sum(-1) / (WIDTH // HEADS) ** 0.5
    seen = torch.ones(LENGTH, LENGTH, dtype=scores.dtype).tril()
    hidden = (1 - seen) * -1e9
    if hasattr(q, "device_mesh"):
        from torch.distributed.tensor import Replicate, distribute_tensor

        hidden = distribute_tensor(hidden, q.device_mesh, [Replicate()])
    p = torch.softmax(scores + hidden, -1)
    return (p[..., None] * v[..., None, :, :]).sum(-2).flatten(1, 2)


class MLP(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and a gated MLP, each after a norm, each with a residual; fp64."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[kind]
        self.norm1, self.norm2 = norm(WIDTH), norm(WIDTH)
        self.attention = Attention()
        self.mlp = MLP(nn.SiLU() if kind == "rms" else nn.GELU())
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def loss(self, step: int, mesh: Any) -> Tensor:
        """Of a batch, cut along the sequence where there is a mesh."""
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
        if mesh is not None:
            from torch.distributed.tensor import Shard, distribute_tensor

            x = distribute_tensor(x, mesh, [Shard(1)])
        return (self(x) - x.sin()).square().mean()


def parallelised(model: Block, mesh: Any) -> nn.Module:
    """Linear layers cut by columns and rows, norms along the sequence."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    columns = {
        name: ColwiseParallel(use_local_output=False)
        for name in ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up")
    }
    rows = {
        name: RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
        for name in ("attention.out", "mlp.down")
    }
    gathered = {
        name: PrepareModuleInput(
            input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),),
            use_local_output=False,
        )
        for name in ("attention", "mlp")
    }  # fmt: skip
    norms = {name: SequenceParallel() for name in ("norm1", "norm2")}
    return parallelize_module(model, mesh, {**columns, **rows, **gathered, **norms})
