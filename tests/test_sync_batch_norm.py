"""SyncBatchNorm in several processes: what one process computes of all batches together."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pydl.nn as P
from pydl import backends
from pydl.ops.sync_batch_norm import sync_batch_norm

BACKENDS: list[str | None] = [None, "reference", "cpu"]
CHANNELS = 5


class Case(NamedTuple):
    """How many samples each rank has, what a sample is, and how the module is made."""

    samples: tuple[int, int, int]
    sample: tuple[int, ...] = (CHANNELS,)
    dtype: torch.dtype = torch.float64
    channels_last: bool = False
    kwargs: dict[str, Any] = {}  # noqa: RUF012
    act: str | None = None  # with one, and a residual before it

    def tensors(self, world: int, step: int) -> list[Tensor]:
        """The batch of all ranks and the gradient of its output, then the residual; the mean is far
        from 0."""
        generator = torch.Generator().manual_seed(step)
        shape = (sum(self.samples[:world]), *self.sample)
        x, dy, residual = (
            torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "xyr"
        )
        x = x * (step + 1) + torch.linspace(-3, 9, x.numel(), dtype=torch.float64).view(shape)
        return [t.to(self.dtype) for t in ([x, dy, residual] if self.act else [x, dy])]

    def part(self, whole: Tensor, world: int, rank: int) -> Tensor:
        """What a rank has of it, in memory of its own."""
        part = whole.split(self.samples[:world])[rank].clone()
        return part.to(memory_format=torch.channels_last) if self.channels_last else part

    def module(self, cls: type) -> Any:
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        if self.act and cls is P.SyncBatchNorm:
            made = P.BatchNormAct(CHANNELS, self.act, dtype=wide, **self.kwargs)
            made = P.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(made))[0]
        else:
            made = cls(CHANNELS, dtype=wide, **self.kwargs)
        for i, parameter in enumerate(made.parameters()):
            nn.init.uniform_(parameter, -2, 2, generator=torch.Generator().manual_seed(i))
        return Steps(made, self.act) if self.act and cls is nn.SyncBatchNorm else made


class Steps(nn.Module):
    """The same by torch, a step after the other."""

    def __init__(self, norm: Any, act: str) -> None:
        super().__init__()
        self.norm, self.act, self.weight = norm, act, norm.weight

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        return getattr(torch.nn.functional, self.act)(y if residual is None else y + residual)


IMAGE = (CHANNELS, 3, 4)
CASES = {
    "even": Case((4, 4, 4)),
    "uneven": Case((5, 1, 3), IMAGE),
    "an empty rank": Case((4, 0, 3), (CHANNELS, 7)),
    "one value a rank": Case((1, 1, 1)),
    "empty ranks": Case((0, 4, 0)),
    "channels last": Case((2, 0, 3), IMAGE, channels_last=True),
    "cumulative": Case((2, 3, 1), IMAGE, kwargs={"momentum": None, "eps": 0.1}),
    "untracked": Case((3, 2, 2), IMAGE, kwargs={"track_running_stats": False}),
    "without weights": Case((3, 2, 2), kwargs={"affine": False, "momentum": 0.7}),
    "fp32": Case((3, 2, 2), IMAGE, torch.float32),
    "fp32, channels last": Case((2, 0, 3), IMAGE, torch.float32, channels_last=True),
    "bf16 with fp32 weights": Case((3, 2, 2), IMAGE, torch.bfloat16),
    "residual and gelu": Case((3, 0, 2), IMAGE, act="gelu"),
    "residual and silu, channels last": Case((2, 1, 3), IMAGE, torch.float32, True, act="silu"),
}
STEPS = 2


def asked_of(case: Case) -> list[str | None]:
    """The backends that a case is computed by: Triton's where its interpreter takes it."""
    interpreted = "cpu" in backends.triton_devices() and backends.unavailable("triton") is None
    if interpreted and backends.takes("triton", case.dtype):
        return [*BACKENDS, "triton"]
    return BACKENDS


ASKED = [(name, asked) for name, case in CASES.items() for asked in asked_of(case)]


class Collectives(TorchDispatchMode):
    """Counts what goes between processes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.seen[func.__name__.split(".")[0].strip("_")] += 1
        return func(*args, **(kwargs or {}))

    def told(self) -> dict[str, int]:
        """What there was since the last time."""
        seen, self.seen = dict(self.seen), Counter()
        return seen


def trained(case: Case, asked: str | None, world: int, rank: int) -> dict[str, Any]:
    """What steps of training give on a rank."""
    module, found = case.module(P.SyncBatchNorm), {}
    module.backend = asked
    with Collectives() as collectives:
        for step in range(STEPS):
            x, dy, *more = (case.part(t, world, rank) for t in case.tensors(world, step))
            given = [t.requires_grad_() for t in (x, *more)]
            y = module(*given)
            forward = collectives.told()
            grads = torch.autograd.grad(y, [*given, *module.parameters()], dy)
            found[step] = [y.detach(), *grads]
            found["buffers", step] = [b.clone() for b in module.buffers()]
            found["collectives", step] = [forward, collectives.told()]
    found["strides"] = [tuple(t.stride()) for t in (x, *found[STEPS - 1][:2])]
    return found


def differentiated_twice(
    module: Any, x: Tensor, dy: Tensor, *residual: Tensor, factor: Tensor
) -> list[Tensor]:
    """The gradients of a penalty on the gradients, with regard to dy, x, residual and weight."""
    leaves = [*(t.clone().requires_grad_() for t in (dy, x, *residual)), module.weight]
    given = leaves[1:-1]
    y = module(*given)
    wanted = [*given, *module.parameters()]
    first = torch.autograd.grad(y, wanted, leaves[0], create_graph=True)
    penalty = sum(g.pow(3).sum() for g in first[: len(given)])
    penalty = penalty + sum((g * factor).sum() for g in first[len(given) :])
    return list(torch.autograd.grad(penalty, leaves))


TWICE = CASES["uneven"], CASES["residual and gelu"]
FACTOR = torch.linspace(1, 2, CHANNELS, dtype=torch.float64)


def others(world: int, rank: int) -> dict[str, Any]:
    """What else there is to see in several processes."""
    found: dict[str, Any] = {}
    case = CASES["uneven"]
    x, dy = (case.part(t, world, rank) for t in case.tensors(world, 0))
    with Collectives() as collectives:
        module = case.module(P.SyncBatchNorm)
        module(x).backward(dy)
        found["a fixed input"] = collectives.told()
        before = copy.deepcopy(module.state_dict())
        y = module.eval()(x)
        alone = case.module(nn.SyncBatchNorm).eval()
        alone.load_state_dict(before)
        found["evaluation"] = (y, alone(x), collectives.told())
    pair = dist.new_group([0, 1])
    module = case.module(P.SyncBatchNorm)
    module.process_group = pair
    found["a group of two"] = module(x)
    for asked, case in itertools.product(BACKENDS, TWICE):
        module = case.module(P.SyncBatchNorm)
        module.backend = asked
        parts = (case.part(t, world, rank) for t in case.tensors(world, 0))
        found["twice", asked, case.act] = differentiated_twice(module, *parts, factor=FACTOR)
    errors = {
        "one value": lambda: sync_batch_norm(torch.ones(int(rank == 1), CHANNELS), None, None),
        "a transform": lambda: torch.func.vmap(lambda x: sync_batch_norm(x, None, None))(
            torch.ones(2, 4, CHANNELS)
        ),
        "no channel": lambda: sync_batch_norm(torch.ones(2, 0), None, None),
        "a weight": lambda: sync_batch_norm(torch.ones(2, 3), None, None, torch.ones(2)),
    }
    for name, call in errors.items():
        try:
            call()
        except (ValueError, RuntimeError) as error:
            found[name] = (type(error), str(error))
    mean, var = torch.full((3,), 7.0), torch.full((3,), 7.0)
    found["nothing at all"] = (sync_batch_norm(torch.ones(0, 3, 2), mean, var), mean, var)
    return found


def work(rank: int, world: int, folder: Path) -> None:
    """One process: does everything, and stores what it found."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/meet", timedelta(seconds=60), world_size=world, rank=rank
    )
    found = {(name, asked): trained(CASES[name], asked, world, rank) for name, asked in ASKED}
    torch.save({**found, **others(world, rank)}, folder / str(rank))
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3], ids="{} processes".format)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: Any) -> list[dict[Any, Any]]:
    """What each process found."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch is built without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    # Forked from a fresh process that has imported torch, which takes seconds, once for all.
    multiprocessing.set_forkserver_preload(["torch", "pydl.nn"])
    torch.multiprocessing.start_processes(
        work, (request.param, folder), request.param, start_method="forkserver"
    )
    return [torch.load(folder / str(i), weights_only=False) for i in range(request.param)]


def close(got: Any, want: Any, dtype: torch.dtype = torch.float64) -> None:
    exact = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {}
    coarse = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(got, want, **exact, **coarse)


def together(case: Case, world: int) -> Iterator[list[Tensor]]:
    """Output, gradients and buffers by torch in one process, step by step."""
    module = case.module(nn.SyncBatchNorm)
    for step in range(STEPS):
        x, dy, *more = case.tensors(world, step)
        given = [t.requires_grad_() for t in (x, *more)]
        y = module(*given)
        grads = torch.autograd.grad(y, [*given, *module.parameters()], dy)
        yield [y.detach(), *grads, *(b.clone() for b in module.buffers())]


@pytest.mark.parametrize("name, asked", ASKED)
def test_equals_one_process(ranks: list, name: str, asked: str | None) -> None:
    """Output and gradients; the buffers, on every rank to the bit."""
    case, found = CASES[name], [rank[name, asked] for rank in ranks]
    whole = 3 if case.act else 2  # the output, and the gradients of what is cut into batches
    for step, wanted in enumerate(together(case, len(ranks))):
        for i, want in enumerate(wanted[:whole]):
            close(torch.cat([rank[step][i] for rank in found]), want, case.dtype)
        more = wanted[whole:]
        buffers = found[0]["buffers", step]
        split = len(more) - len(buffers)
        for i, grad in enumerate(more[:split]):
            total = torch.stack([rank[step][whole + i] for rank in found]).sum(0)
            close(total, grad, case.dtype)
        close(buffers, more[split:], case.dtype)
        for rank in found[1:]:
            assert all(map(torch.equal, buffers, rank["buffers", step]))


@pytest.mark.parametrize("name, asked", ASKED)
def test_one_collective_each_way(ranks: list, name: str, asked: str | None) -> None:
    for rank in ranks:
        for step in range(STEPS):
            forward, backward = rank[name, asked]["collectives", step]
            assert forward == {"allgather": 1} and backward == {"allreduce": 1}


def test_keeps_the_memory_format(ranks: list) -> None:
    for asked in BACKENDS:
        x, y, dx = ranks[0]["channels last", asked]["strides"]
        assert x == y == dx and x[1] == 1


def test_an_input_without_gradient_needs_no_collective_back(ranks: list) -> None:
    assert all(rank["a fixed input"] == {"allgather": 1} for rank in ranks)


def test_evaluation_is_local(ranks: list) -> None:
    for rank in ranks:
        got, want, collectives = rank["evaluation"]
        close(got, want)
        assert not collectives


def test_a_group_of_its_own(ranks: list) -> None:
    """Ranks 0 and 1 synchronise; a third, not of the group, is by itself."""
    case = CASES["uneven"]
    parts = case.tensors(len(ranks), 0)[0].split(case.samples[: len(ranks)])
    module = case.module(nn.SyncBatchNorm)
    close(torch.cat([ranks[i]["a group of two"] for i in (0, 1)]), module(torch.cat(parts[:2])))
    if len(ranks) > 2:
        close(ranks[2]["a group of two"], module(parts[2]))


@pytest.mark.parametrize("case", TWICE, ids=lambda case: case.act)
@pytest.mark.parametrize("asked", BACKENDS)
def test_double_backward(ranks: list, asked: str | None, case: Case) -> None:
    """Of the sum of all ranks' penalties; each weight has its own share."""
    module = case.module(nn.SyncBatchNorm)
    wanted = differentiated_twice(module, *case.tensors(len(ranks), 0), factor=FACTOR)
    *parts, dweight = zip(*(rank["twice", asked, case.act] for rank in ranks), strict=True)
    close([*map(torch.cat, parts), torch.stack(dweight).sum(0)], wanted)


def test_errors(ranks: list) -> None:
    for rank in ranks:
        kind, text = rank["one value"]
        assert kind is ValueError and "Expected more than 1 value per channel" in text
        told = {"a transform": "torch.func", "no channel": "no channel", "a weight": "weight"}
        for name, words in told.items():
            kind, text = rank[name]
            assert kind is RuntimeError and words in text
            assert text.startswith("pydl: sync_batch_norm: ")


def test_nothing_at_all(ranks: list) -> None:
    """No rank has a sample: nothing comes out, and nothing moves."""
    for rank in ranks:
        y, mean, var = rank["nothing at all"]
        assert y.shape == (0, 3, 2) and mean.eq(7).all() and var.eq(7).all()
