"""Replaced models in several processes and under activation checkpointing train as in one."""

from __future__ import annotations

import copy
import multiprocessing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pydl

WORLD, STEPS, BATCH, LENGTH, WIDTH = 2, 4, 6, 5, 16
WAYS = ("ddp", "fsdp", "fsdp, checkpointed")


class Norm(nn.Module):
    """What Llama has, and pydl knows by what it computes."""

    __module__ = "transformers.fake"

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(WIDTH)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


class Net(nn.Module):
    """Attention, layer and RMS norms, and activations with and without parameters."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 24, dropout, nn.GELU(), batch_first=True)
            for _ in range(2)
        )
        self.tail = nn.Sequential(
            Norm(), nn.Linear(WIDTH, WIDTH), nn.PReLU(WIDTH), nn.Dropout(dropout), nn.GELU("tanh"),
            nn.GroupNorm(2, WIDTH), nn.Linear(WIDTH, 1),
        )  # fmt: skip
        self.reentrant: bool | None = None

    def _run(self, part: nn.Module, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return part(x)
        return checkpoint(part, x, use_reentrant=self.reentrant)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self._run(layer, x)
        return self._run(self.tail, x.mean(1))


def replaced(dropout: float = 0.0) -> Net:
    model = Net(dropout)
    report = pydl.replace(model, backend="cpu")
    assert len(report) == 2 * 7 + 6, report
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=generator)
    return x, x.sum((1, 2))[:, None].sin()


def train(model: nn.Module, rank: int = 0, world: int = 1) -> list[float]:
    """The loss of a rank's part of each batch."""
    optimiser = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    losses = []
    for step in range(STEPS):
        x, y = (t.chunk(world)[rank] for t in batch(step))
        loss = (model(x) - y).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def distributed(way: str) -> nn.Module:
    model = replaced()
    if way == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if way == "fsdp, checkpointed":
        model.reentrant = False
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def work(rank: int, world: int, folder: Path) -> None:
    """One process: trains in every way, and stores losses and parameters."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    meet(rank, world, folder)
    found: dict[str, Any] = {}
    for way in WAYS:
        model = distributed(way)
        losses = train(model, rank, world)
        found[way] = (
            losses,
            get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)),
        )
    torch.save(found, folder / str(rank))
    dist.destroy_process_group()


def started(work: Any, folder: Path) -> list[dict[str, Any]]:
    """What each process stored that ran `work(rank, world, folder)`."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch is built without gloo")
    multiprocessing.set_forkserver_preload(["torch", "pydl.nn"])
    torch.multiprocessing.start_processes(work, (WORLD, folder), WORLD, start_method="forkserver")
    return [torch.load(folder / str(i), weights_only=False) for i in range(WORLD)]


def meet(rank: int, world: int, folder: Path) -> None:
    """Makes the process one of a group."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/meet", timedelta(seconds=60), world_size=world, rank=rank
    )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: Any) -> list[dict[str, Any]]:
    """What each process found."""
    return started(work, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], dict[str, Tensor]]:
    """The losses and parameters of one process, of the model as it was."""
    model = Net()
    return train(model), model.state_dict()


@pytest.mark.parametrize("way", WAYS)
def test_trains_as_one_process(way: str, ranks: Any, alone: Any) -> None:
    each = [found[way][0] for found in ranks]
    assert each[0] != each[1]  # of other samples
    means = [sum(losses) / WORLD for losses in zip(*each, strict=True)]
    assert means == pytest.approx(alone[0], rel=2e-5)
    assert max(means) > 1.1 * min(means)
    got = {name: t.detach() for name, t in ranks[0][way][1].items()}
    torch.testing.assert_close(got, dict(alone[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_activation_checkpointing(reentrant: bool, dropout: float) -> None:
    """The same bits with and without, dropout too; and fewer tensors are kept."""
    plain = replaced(dropout)
    ours = copy.deepcopy(plain)
    ours.reentrant = reentrant
    results, kept = [], []
    for model in (plain, ours):
        count = [0]

        def pack(tensor: Tensor, count: list[int] = count) -> Tensor:
            count[0] += 1
            return tensor

        torch.manual_seed(3)
        x = batch(0)[0].requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(x)
        kept.append(count[0])
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert kept[1] < kept[0]


def test_dropout_draws_anew() -> None:
    """Else the test above would show nothing."""
    model, x = replaced(0.4), batch(0)[0]
    assert not torch.equal(model(x), model(x))
