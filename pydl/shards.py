"""DTensors: an op runs on each rank's shards, where its sharding rule says that shards do not meet.

The rule is applied to a whole call, forward and backward, and not to each operator in DTensor's
dispatcher (`register_sharding`): operators fill tensors that Python allocates by the sizes it sees,
outputs, moments by row and scratch alike, which must be those of the shard; and a row's rule is
then one for all backends.

torch's DTensor is imported with this module, and this module when a DTensor comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import broadcast
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from pydl.placed import KEPT, Part, enter, leave

if TYPE_CHECKING:
    from pydl.autograd import Rule

_WHOLE, _SUM = Replicate(), Partial()
# Keys of Philox that differ give masks that have nothing to do with each other.
_STEP = 0x9E3779B97F4A7


class _Cut:
    """Which name's dimensions each dimension of the mesh cuts; None for none.

    It is decided by what all ranks see alike: names, sizes of whole tensors and their placements.

    Args:
        mesh: The mesh's shape.
        named: Names of dimensions, shape and placements of each tensor.
        output: Names of the first output's dimensions.
    """

    def __init__(self, mesh: tuple[int, ...], named: Sequence[Any], output: Any) -> None:
        self._mesh = mesh
        self._size: dict[Any, int] = {}
        self._sizes: dict[Any, set[int]] = {}
        for names, shape, _ in named:
            for name, n in zip(names, shape, strict=True):
                self._size.setdefault(name, n)
                self._sizes.setdefault(name, set()).add(n)
        # Of a name that it lacks, the output would be a sum over shards.
        self._free = set(output) - {None}
        self.names: list[Any] = []
        for i in range(len(mesh)):
            found = [
                names[placements[i].dim] for names, _, placements in named
                if type(placements[i]) is Shard
            ]  # fmt: skip
            fit = [name for name in found if self._may(name, i)]
            self.names.append(fit[0] if fit else None)
        self.inputs = [self._part(names, shape) for names, shape, _ in named]
        self._outputs: dict[Any, Part] = {}

    def _may(self, name: Any, i: int) -> bool:
        if name not in self._free:
            return False
        # Heads of keys serve several of queries: they go together where both are cut evenly.
        unlike = self._sizes[name] - {1}
        before = [n for n, other in zip(self._mesh, self.names, strict=False) if other == name]
        pieces = prod(before) * self._mesh[i]
        return len(unlike) < 2 or all(n % pieces == 0 for n in unlike)

    def _part(self, names: Any, shape: torch.Size) -> Part:
        mine: list[Any] = []
        grads: list[Any] = []
        for name in self.names:
            at = names.index(name) if name is not None and name in names else -1
            # A dimension of size 1 may stand for all of a name's.
            cut = at >= 0 and (shape[at] != 1 or self._size[name] == 1)
            mine.append(Shard(at) if cut else _WHOLE)
            grads.append(mine[-1] if cut or name is None else _SUM)
        return Part(shape, tuple(mine), tuple(grads))

    def output(self, names: Any, local: torch.Size) -> Part:
        """Of an output, whose local shape is known."""
        part = self._outputs.get((names, local))
        if part is None:
            pairs = zip(names, local, strict=True)
            shape = torch.Size(
                self._size[name] if name is not None and name in self.names else n
                for name, n in pairs
            )  # fmt: skip
            part = self._outputs[names, local] = self._part(names, shape)
        return part


_cut = lru_cache(KEPT)(_Cut)


def _seed_of_shard(seed: Tensor, mesh: Any, names: Sequence[Any]) -> Tensor:
    """One for each shard, the same on all ranks that compute the same."""
    place, index = mesh.get_coordinate(), 0
    seed = seed.clone()
    for i, name in enumerate(names):
        if name is not None:
            index = index * mesh.size(i) + place[i]
        elif torch.compiler.is_compiling():
            seed = broadcast(seed, 0, (mesh, i))
        else:
            dist.broadcast(seed, group=mesh.get_group(i), group_src=0)
    return seed + torch.tensor([index * _STEP, 0], device=seed.device)


def run(rule: Rule, call: Callable[..., Any], args: Sequence[Any]) -> Any:
    """`call(*args)` of DTensors: on local tensors, after as few collectives as can be.

    Args:
        rule: The op's; its `shards` says what may be cut.
        call: Computes on plain tensors.
        args: Of the rule: tensors, then scalars.

    Returns:
        What `call` returns, as DTensors.

    Raises:
        RuntimeError: the rule says nothing, a tensor is no DTensor or is on another mesh, or this
            rank is not in the mesh.
    """
    op = f"pydl: {rule.name}:"
    if rule.pointwise:
        names: Any = [range(t.dim()) for t in args[: rule.tensors]]
        made: Any = names[:1]
    elif rule.shards is not None:
        names, made = rule.shards(*args)
    else:
        raise RuntimeError(f"{op} got a DTensor, but has no sharding rule; wants plain tensors")
    mesh = args[0].device_mesh
    if mesh.get_coordinate() is None:
        raise RuntimeError(f"{op} this rank is not in the DTensor's mesh, which it has no shard of")
    where, named, local = [], [], list(args)
    for i, arg in enumerate(args):
        if not isinstance(arg, Tensor):
            continue
        mine = names[i] if i < len(names) else "scalar"
        if isinstance(arg, DTensor) and arg.device_mesh == mesh:
            where.append(i)
            mine = (None,) * arg.dim() if isinstance(mine, str) else tuple(mine)
            named.append((mine, arg.shape, arg.placements))
        elif isinstance(arg, DTensor) or not isinstance(mine, str):
            what = "of another mesh" if isinstance(arg, DTensor) else "a plain tensor"
            raise RuntimeError(
                f"{op} argument {i} is {what}, wants DTensors of one mesh, as the input is"
            )
    cuts: Any = _Cut if torch.compiler.is_compiling() else _cut
    cut = cuts(mesh.shape, tuple(named), tuple(made[0]))
    entered = enter(mesh, cut.inputs, [args[i] for i in where])
    for i, tensor in zip(where, entered, strict=True):
        local[i] = tensor
    if "seed" in names:
        i = names.index("seed")
        local[i] = None if args[i] is None else _seed_of_shard(local[i], mesh, cut.names)
    out = call(*local)
    outs = (out,) if isinstance(out, Tensor) else out
    parts = [
        None if t is None else cut.output(tuple(mine), t.shape)
        for t, mine in zip(outs, made, strict=True)
    ]  # fmt: skip
    left = leave(mesh, parts, outs)
    return left[0] if isinstance(out, Tensor) else tuple(left)


def replicated(tensor: Tensor, like: Any) -> DTensor:
    """A plain tensor, alike on all ranks, as a DTensor on the mesh of another."""
    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, [_WHOLE] * mesh.ndim, run_check=False)


def elements(tensors: Sequence[Tensor]) -> int | None:
    """How many elements of the first the largest shard has; None where it is native torch's call.

    A backend is chosen by it, so that it is the same on all ranks: collectives are to meet.
    """
    for t in tensors:
        if not isinstance(t, DTensor) or t.device_mesh.get_coordinate() is None:
            return None
        if not all(type(p) in (Shard, Replicate, Partial) for p in t.placements):
            return None
    first: Any = tensors[0]
    mesh = first.device_mesh.shape
    cuts = [n for n, p in zip(mesh, first.placements, strict=True) if type(p) is Shard]
    return -(-first.numel() // prod(cuts))
