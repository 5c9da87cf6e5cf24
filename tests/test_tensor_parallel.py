"""Ops on DTensors in two processes: what one process computes, without needless collectives."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import pydl
from pydl import backends, calibration
from pydl import functional as F
from tests.parallel_block import KINDS, Block, parallelised
from tests.parallel_cases import CASES, QKV, Case, X
from tests.test_distributed import WORLD, meet, started


def placed(tensor: Tensor, mesh: Any, placement: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if placement.is_partial():
        part = DTensor.from_local(tensor / mesh.size(), mesh, [placement], run_check=False)
    else:
        part = distribute_tensor(tensor, mesh, [placement])
    return part.detach().requires_grad_()


def outputs(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def drawn(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """Counts the calls of kernels, all of which get plain tensors."""
    counts: dict[str, int] = {}
    before = dict(backends._DIRECT)

    def watch(name: str, op: Any) -> Any:
        def called(*args: Any) -> Any:
            kinds = {type(a) for a in args if isinstance(a, Tensor)}
            assert kinds <= {Tensor, nn.Parameter}, kinds
            counts[name] = counts.get(name, 0) + 1
            return op(*args)

        return called

    backends._DIRECT.update({key: watch(key[1], op) for key, op in before.items()})
    try:
        yield counts
    finally:
        backends._DIRECT.update(before)


def run(case: Case, mesh: Any, placement: Any) -> None:
    """Raises where outputs, placements, gradients or the number of collectives are not right."""
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    plain = [t.requires_grad_() for t in drawn(case.shapes)]
    want = outputs(case.call(*plain))
    dys = [torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape) for y in want]
    want_grads = torch.autograd.grad(want, plain, dys, allow_unused=True)
    tensors = [
        placed(t, mesh, placement if i < case.alike else Replicate()) for i, t in enumerate(plain)
    ]
    free = placement.is_shard() and placement.dim in case.free
    with watched() as counts, CommDebugMode() as forward:
        got = outputs(case.call(*tensors))
    assert counts
    expected = placement if free else Replicate()
    assert all(y.placements == (expected,) for y in got), [y.placements for y in got]
    still = free or placement.is_replicate()
    assert forward.get_total_counts() == (0 if still else case.alike), forward.comm_counts
    torch.testing.assert_close([y.full_tensor() for y in got], list(want), rtol=1e-9, atol=1e-12)
    shards = [distribute_tensor(dy, mesh, [expected]) for dy in dys]
    with CommDebugMode() as backward:
        grads = torch.autograd.grad(got, tensors, shards, allow_unused=True)
    assert backward.get_total_counts() == 0, backward.comm_counts
    for i, (g, w) in enumerate(zip(grads, want_grads, strict=True)):
        assert (g is None) == (w is None), i
        if g is not None:
            assert g.shape == w.shape
            assert g.placements == (expected,) or i >= case.alike, (i, g.placements)
            torch.testing.assert_close(g.full_tensor(), w, rtol=1e-9, atol=1e-12)
    # What flows back may lie anywhere.
    grads = torch.autograd.grad(
        outputs(case.call(*tensors)), tensors, [placed(d, mesh, _SUM()) for d in dys],
        allow_unused=True,
    )  # fmt: skip
    torch.testing.assert_close(
        [g.full_tensor() for g in grads if g is not None],
        [w for w in want_grads if w is not None], rtol=1e-9, atol=1e-12,
    )  # fmt: skip


def _SUM() -> Any:
    from torch.distributed.tensor import Partial

    return Partial()


def run_all(case: Case, mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard

    for placement in (*map(Shard, range(len(case.shapes[0]))), Replicate(), _SUM()):
        # Torch's own operators, of which a mask is made, and which a result is written by.
        if case is CASES["in place"] and placement.is_partial():
            continue
        try:
            run(case, mesh, placement)
        except Exception as error:
            error.add_note(f"with {placement}")
            raise


def mixed(mesh: Any) -> None:
    """Tensors that lie differently meet where the first may be cut."""
    from torch.distributed.tensor import Replicate, Shard

    a, b = drawn((X, X))
    for first, second, out in ((1, None, 1), (None, 2, 2), (0, 2, 0)):
        places = [Replicate() if d is None else Shard(d) for d in (first, second)]
        y = F.gated_act(placed(a, mesh, places[0]), placed(b, mesh, places[1]))
        assert y.placements == (Shard(out),)
        torch.testing.assert_close(y.full_tensor(), F.gated_act(a, b))
    # One head of keys for all: whole, its gradient a sum.
    q, k, v = drawn(((2, 4, 5, 8), (2, 1, 5, 8), (2, 1, 5, 8)))
    whole = [placed(t, mesh, Replicate()) for t in (k, v)]
    y = F.scaled_dot_product_attention(placed(q, mesh, Shard(1)), *whole, enable_gqa=True)
    assert y.placements == (Shard(1),)
    plain = [t.requires_grad_() for t in (q, k, v)]
    want = F.scaled_dot_product_attention(*plain, enable_gqa=True)
    torch.testing.assert_close(y.full_tensor(), want)
    y.square().sum().backward()
    want.square().sum().backward()
    assert whole[0].grad.placements == (_SUM(),)
    torch.testing.assert_close(whole[0].grad.full_tensor(), k.grad)
    # Heads that are not cut alike: 6 in halves of 3, of which each key head serves 2.
    q, k, v = drawn(((2, 6, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8)))
    cut = [placed(t, mesh, Shard(1)) for t in (q, k, v)]
    y = F.scaled_dot_product_attention(*cut, enable_gqa=True)
    assert y.placements == (Replicate(),)
    want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(y.full_tensor(), want)
    # A padding mask that no gradient flows to.
    hidden = torch.zeros(2, 5, dtype=torch.bool)
    hidden[1, 3:] = True
    q, k, v = drawn(QKV)
    q, k, v = q[:2], k[:2], v[:2]
    cut = [placed(t, mesh, Shard(0)) for t in (q, k, v)]
    mask = placed_mask(hidden, mesh)
    y = F.linear_attention(*cut, key_padding_mask=mask)
    torch.testing.assert_close(
        y.full_tensor(), F.linear_attention(q, k, v, key_padding_mask=hidden)
    )
    # Packed sequences: their heads are cut.
    begins = torch.tensor([0, 2, 5])
    packed = [t[0].transpose(0, 1).contiguous() for t in (q, k, v)]
    heads = [placed(t, mesh, Shard(1)) for t in packed]
    y = F.varlen_attention(*heads, begins, begins, 3, 3, is_causal=True)
    assert y.placements == (Shard(1),)
    torch.testing.assert_close(
        y.full_tensor(), F.varlen_attention(*packed, begins, begins, 3, 3, is_causal=True)
    )
    y = F.local_attention(*cut, 3, key_padding_mask=mask)
    assert y.placements == (Shard(0),)
    torch.testing.assert_close(
        y.full_tensor(), F.local_attention(q, k, v, 3, key_padding_mask=hidden)
    )


def scores(mesh: Any) -> None:
    """Batches of queries, keys and values are cut alike, masks with them or for all."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode

    shapes = ((4, 3, 8), (4, 7, 5), (4, 7, 2), (6, 8), (6, 5), (6,))
    seen = torch.rand(4, 3, 7, generator=torch.Generator().manual_seed(2)) > 0.4
    for mask in (None, seen, seen[:1], seen[0], seen[0, 0], seen[:, :1]):
        plain = [t.requires_grad_() for t in drawn(shapes)]
        want = F.additive_attention(*plain, mask)
        want.square().sum().backward()
        for backend in ("cpu", "torch"):
            places = [Shard(0)] * 3 + [Replicate()] * 3
            tensors = [placed(t.detach(), mesh, p) for t, p in zip(plain, places, strict=True)]
            whole = None if mask is None else placed_mask(mask, mesh)
            with watched() as counts, CommDebugMode() as collectives:
                y = F.additive_attention(*tensors, whole, backend=backend)
                y.square().sum().backward()
            assert collectives.get_total_counts() == 0 and bool(counts) == (backend == "cpu")
            assert y.placements == (Shard(0),)
            torch.testing.assert_close(y.full_tensor(), want)
            for ours, theirs, place in zip(tensors, plain, places, strict=True):
                assert ours.grad.placements == ((place,) if place.is_shard() else (_SUM(),))
                torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
    q, k, v = drawn(((4, 3, 8), (4, 7, 8), (4, 7, 2)))
    w = torch.tensor(0.5, dtype=q.dtype)
    cut, width = [placed(t, mesh, Shard(0)) for t in (q, k, v)], placed(w, mesh, Replicate())
    with CommDebugMode() as collectives:
        y = F.gaussian_attention(*cut, width)
    assert collectives.get_total_counts() == 0, collectives.comm_counts
    assert y.placements == (Shard(0),), y.placements
    torch.testing.assert_close(y.full_tensor(), F.gaussian_attention(q, k, v, w))


def placed_mask(mask: Tensor, mesh: Any) -> Tensor:
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(mask, mesh, [Replicate()])


def two_dimensions(mesh: Any) -> None:
    """A mesh of two dimensions, which cut two of the tensor's, or one of them twice."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    flat = init_device_mesh("cpu", (WORLD, 1))
    (x, w) = drawn((X, (8,)))
    wide = distribute_tensor(w, flat, [Replicate(), Replicate()]).requires_grad_()
    for places in ([Shard(0), Shard(1)], [Shard(0), Shard(0)], [Replicate(), Shard(1)]):
        y = F.rms_norm(distribute_tensor(x, flat, places), (8,), wide)
        torch.testing.assert_close(y.full_tensor(), F.rms_norm(x, (8,), w))
        assert y.placements == tuple(places)
    summed = DTensor.from_local(x / WORLD, flat, [_SUM(), Shard(1)], run_check=False)
    y = F.rms_norm(summed, (8,), wide)
    torch.testing.assert_close(y.full_tensor(), F.rms_norm(x, (8,), w))
    assert y.placements == (Replicate(), Shard(1))


def differentiated_twice(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard

    x, w = drawn((X, (8,)))
    found = []
    for given in (
        [x.requires_grad_(), w.requires_grad_()],
        [placed(x, mesh, Shard(1)), placed(w, mesh, Replicate())],
    ):
        y = F.gelu(F.rms_norm(*given[:1], (8,), given[1])).square().sum()
        (gradient,) = torch.autograd.grad(y, given[0], create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), given))
    assert found[0][1].abs().max() > 0.1
    for ours, plain in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours.full_tensor(), plain)


def dropout(mesh: Any) -> None:
    """Shards draw masks of their own, replicas the same one, and backward the one of forward."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode

    torch.manual_seed(5)
    n, p = 400, 0.5
    x, b = torch.ones(2, n), torch.zeros(n)
    ours, bias = placed(x, mesh, Shard(0)), placed(b, mesh, Replicate())
    with CommDebugMode() as collectives:
        y = F.bias_act(ours, bias, "identity", p)
    assert collectives.get_total_counts() == 0
    y.sum().backward()
    rows = y.full_tensor()
    assert not torch.equal(rows[0], rows[1])
    assert 0.35 < (rows == 0).double().mean() < 0.65
    torch.testing.assert_close(ours.grad.full_tensor(), rows)
    torch.manual_seed(dist.get_rank())
    y = F.bias_act(placed(x, mesh, Replicate()), bias, "identity", p)
    both = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(both, y.to_local().detach())
    assert torch.equal(both[0], both[1])
    q = torch.ones(2, 1, 6, 8)
    v = placed(torch.ones(2, 1, 6, 8), mesh, Shard(0))
    y = F.scaled_dot_product_attention(*[placed(q, mesh, Shard(0))] * 2, v, dropout_p=p)
    rows = y.full_tensor()
    assert not torch.equal(rows[0], rows[1])


def automatic(mesh: Any) -> None:
    """A shard's size decides, on all ranks the same; what is cut in no known way is torch's."""
    from torch.distributed.tensor import Shard

    before = calibration._table, calibration.smallest
    calibration._table = {("cpu", "gelu", torch.float64): ("cpu", 15, 20)}
    calibration.smallest = 1
    try:
        with pydl.use_backend(None):
            for n, grad, served in ((29, False, True), (28, False, False), (38, True, False),
                                    (39, True, True)):  # fmt: skip
                x = placed(torch.ones(n, dtype=torch.float64), mesh, Shard(0))
                with watched() as counts:
                    F.gelu(x.requires_grad_(grad))
                assert bool(counts) == served, (n, grad)
    finally:
        calibration._table, calibration.smallest = before


def errors(mesh: Any) -> None:
    from torch.distributed.tensor import Shard

    x, w = drawn((X, (8,)))
    cut = placed(x, mesh, Shard(0))
    with pytest.raises(RuntimeError, match="layer_norm: argument 1 is a plain tensor, wants DT"):
        F.layer_norm(cut, (8,), w)
    with pytest.raises(RuntimeError, match="sync_batch_norm: got a DTensor, but has no sharding"):
        from pydl.ops.sync_batch_norm import sync_batch_norm

        sync_batch_norm(cut, None, None)


def compiled(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard

    def call(x: Tensor, w: Tensor) -> Tensor:
        return F.layer_norm(F.gelu(x), (8,), w)

    def dropped(x: Tensor, b: Tensor) -> Tensor:
        return F.bias_act(x, b, "identity", 0.5)

    x, w = drawn((X, (8,)))
    for function, place in ((call, Shard(1)), (dropped, Replicate())):
        found = []
        for one in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
            given = [placed(x, mesh, place), placed(w, mesh, Replicate())]
            torch.manual_seed(dist.get_rank())
            y = one(*given)
            y.square().sum().backward()
            assert y.placements == (place,)
            found.append([t.full_tensor() for t in (y, *(t.grad for t in given))])
        torch.testing.assert_close(found[1], found[0])


def trained(mesh: Any) -> None:
    """A block of a transformer by a plan of torch's: as one process, and no more collectives."""
    from torch.distributed.tensor.debug import CommDebugMode

    for kind in KINDS:
        found = []
        for way in ("alone", "native", "replaced"):
            model = Block(kind)
            if way == "replaced":
                layers = sum(type(part) is torch.nn.Linear for part in model.modules())
                report = pydl.replace(model, backend="cpu")
                assert len(report) == 3 + layers, report
                model.attention.fused = True
            if way != "alone":
                parallelised(model, mesh)
            optimiser = torch.optim.SGD(model.parameters(), 0.1)
            losses, collectives = [], 0
            with watched() as counts:
                for step in range(3):
                    with CommDebugMode() as here:
                        loss = model.loss(step, None if way == "alone" else mesh)
                        optimiser.zero_grad()
                        loss.backward()
                        losses.append(loss)
                        optimiser.step()
                    collectives += here.get_total_counts()
            found.append([getattr(t, "full_tensor", lambda t=t: t)() for t in losses])
            grads = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in
                     model.parameters()]  # fmt: skip
            found[-1] += grads
            if way == "native":
                most = collectives
                assert most > 0 and not counts
            if way == "replaced":
                assert collectives <= most, (collectives, most)
                for name, each in (("attention", 1), (f"{kind}_norm", 2), (KINDS[kind], 1)):
                    assert counts[f"{name}_fwd"] == counts[f"{name}_bwd"] == 3 * each, counts
        assert found[0][0] > 1.01 * found[0][2]
        torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(found[2], found[0], rtol=1e-8, atol=1e-11)


MORE = {f.__name__: f for f in (mixed, scores, two_dimensions, differentiated_twice, dropout,
                                automatic, errors, compiled, trained)}  # fmt: skip


def work(rank: int, world: int, folder: Path) -> None:
    """One process: runs everything, and stores what went wrong."""
    from torch.distributed.device_mesh import init_device_mesh

    meet(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    found: dict[str, str | None] = {}
    todo: dict[str, Callable[[], None]] = {
        name: (lambda case=case: run_all(case, mesh)) for name, case in CASES.items()
    }
    todo |= {name: (lambda f=f: f(mesh)) for name, f in MORE.items()}
    for name, one in todo.items():
        problem = None
        try:
            with pydl.use_backend("cpu" if name != "trained" else None):
                one()
        except Exception:
            problem = traceback.format_exc()
            print(f"{name}, process {rank}: {problem}", file=sys.stderr, flush=True)
        found[name] = problem
        # One that failed alone must not meet the other's next collective.
        failed = torch.tensor([float(problem is not None)])
        dist.all_reduce(failed)
    torch.save(found, folder / str(rank))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: Any) -> list[dict[str, Any]]:
    """What went wrong in each process."""
    return started(work, tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("name", [*CASES, *MORE])
def test_as_one_process(name: str, ranks: Any) -> None:
    for found in ranks:
        assert found[name] is None, found[name]


def test_nothing_is_imported_for_it() -> None:
    import subprocess

    code = "import sys, pydl, pydl.nn; print('torch.distributed.tensor' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
