"""Plans which steps of a model run together in one pass.

Where the source of a container's method shows that a batch normalisation's or a linear layer's
output goes to an activation alone, an activation's to a product alone, or that a sum is what is
normalised next, the container gets a class derived from its own, in which that method computes them
in one pass. No module is exchanged for it: the tree, names, hooks and `state_dict` stay, and what
does not go through that method computes as before.
"""

from __future__ import annotations

import ast
import functools
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pydl import nn as pydl_nn
from pydl.fuse_chain import NORMS, NOTHING, UNKNOWN, chains
from pydl.fuse_changes import passes_on, refuse_changed
from pydl.fuse_class import Methods, Site, derive, obstacle
from pydl.fuse_part import LEFT, Kinds, Part, told
from pydl.fuse_source import Method, Unreadable
from pydl.fuse_step import PRODUCERS, ends, sequential
from pydl.fuse_sum import sums
from pydl.fuse_write import Chain
from pydl.nn.derived import Form
from pydl.nn.steps import hooked
from pydl.report import Fusion, Skipped, class_name
from pydl.walk import Found

_SYNCHRONISED = {nn.SyncBatchNorm, pydl_nn.SyncBatchNorm}
# For reading only: what is rewritten is read again.
_read = functools.lru_cache(maxsize=256)(Method)
_SOMEWHERE = ast.Call(ast.Constant(None), [], [])  # a call that no source has


@dataclass
class Plan:
    """What is to be fused: containers with their new classes; and what is told about it."""

    classes: list[tuple[nn.Module, type]] = field(default_factory=list)
    fused: list[Fusion] = field(default_factory=list)
    unfused: list[Skipped] = field(default_factory=list)


def plan(
    modules: list[Found],
    left: dict[int, str],
    forms: dict[int, Form],
    twinned: Iterable[int],
    backend: str | None = None,
) -> Plan:
    """Plans for all modules of a model.

    Args:
        modules: The modules.
        left: Those, by id, that are to be left alone, and why.
        forms: What those of another package compute, by id.
        twinned: The ids of those whose type has a twin, with a `forward` of its own.
        backend: Who is to compute.
    """
    made, kinds, methods, whole = Plan(), Kinds(forms), Methods(), set(twinned)
    parts: dict[int, Part] = {}
    inside: dict[int, dict[str, Part]] = {}
    for found in modules:
        kind = kinds.of(found.module)
        if kind is not None and id(found.module) not in left:
            part = parts[id(found.module)] = Part(found, kind)
            for place in found.places:
                for path, container in place.above:
                    below = place.path[len(path) + 1 :] if path else place.path
                    inside.setdefault(id(container), {})[below] = part
    for found in modules:
        own = type(found.module).__module__.partition(".")[0] == "pydl"
        if id(found.module) in inside and not own and id(found.module) not in whole:
            fusing = _Container(found, inside[id(found.module)], left, kinds, methods, backend)
            made.fused += fusing.fused
            if fusing.cls is not None:
                made.classes.append((found.module, fusing.cls))
    order = {found.places[0].path: index for index, found in enumerate(modules)}
    made.fused.sort(key=lambda one: order[one.path])
    for part in parts.values():
        if why := told(part):
            made.unfused.append(Skipped(part.path, class_name(type(part.module)), why))
    for found in modules:
        if type(found.module) in _SYNCHRONISED and id(found.module) not in left:
            path, of = found.places[0].path, class_name(type(found.module))
            made.unfused.append(Skipped(path, of, "its moments come from all processes"))
    return made


class _Container:
    """A module with parts below it, by path: what is fused, and its new class."""

    def __init__(
        self, found: Found, parts: dict[str, Part], left: dict[int, str], kinds: Kinds,
        methods: Methods, backend: str | None,
    ) -> None:  # fmt: skip
        self.found, self.module = found, found.module
        self.tails = self._tails(parts)
        self.parts = {**self.tails, **parts}
        self.left, self.kinds = left, kinds
        now = type(found.module)
        self.base: type[Any] = vars(now).get("_pydl_base", now)
        self.before: frozenset[Site] = vars(now).get("_pydl_sites", frozenset())
        self.sites = set(self.before)
        self.fused: list[Fusion] = []
        self.cls: type | None = None
        try:
            if why := obstacle(found, self.base):
                raise Unreadable(f"its container {why}")
            if self.base.forward is nn.Sequential.forward:
                self._sequential()
            else:
                for name, function, mentioned in methods.mentioning(self.base, self.parts):
                    self._method(name, function, mentioned)
            if self.sites != self.before:
                self.cls = derive(self.base, frozenset(self.sites), backend)
        except Unreadable as why:
            fused = {one.path for one in self.fused}
            self.fused.clear()
            for path, part in self.parts.items():
                if part.path in fused or "." not in path:
                    part.fused, part.why = False, part.why or str(why)

    def _tails(self, parts: dict[str, Part]) -> dict[str, Part]:
        """The batch normalisations that an `nn.Sequential` below ends with, by its path."""
        found = {}
        for path, part in parts.items():
            above, _, name = path.rpartition(".")
            while part.kind == "norm" and above:
                module = self._at(above)
                if not sequential(module) or module is None or name != list(module._modules)[-1]:
                    break
                found[above] = part
                above, _, name = above.rpartition(".")
        return found

    def _kind(self, path: str) -> str | None:
        part = self.parts.get(path)
        return None if part is None else "tail" if path in self.tails else part.kind

    def _sequential(self) -> None:
        """A normalisation or linear layer and what follows it in an `nn.Sequential`."""
        names = list(self.module._modules)
        for index, name in enumerate(names):
            kind = self._kind(name)
            if kind is not None and kind in (*NORMS, "linear"):
                chain = Chain(kind, name, _SOMEWHERE)
                for after in names[index + 1 :]:
                    if not self._is_identity(after):
                        chain.module, chain.act = after, _SOMEWHERE
                        break
                    chain.through.append((after, _SOMEWHERE))
                self._decide("forward", chain)

    def _method(self, name: str, function: types.FunctionType, mentioned: list[str]) -> None:
        """What the source of a method shows."""
        try:
            method = _read(function)
            found = chains(method, self._starts, self._is_identity, self._is_act)
            found += sums(method, self._starts)
            refuse_changed(method, found, lambda path: passes_on(self._at(path)))
        except Unreadable as why:
            for path in mentioned:
                self.parts[path].why = self.parts[path].why or f"its container's {name} {why}"
            return
        taken: list[ast.AST | None] = []
        # An activation is taken by a normalisation before it, else by a product, else by a layer.
        for kind in (*NORMS, "gate", "linear", "sum"):
            for chain in found:
                if chain.kind == kind:
                    places = [chain.call] if kind == "gate" else [chain.act, chain.add]
                    if chain.why is None and any(one and one in taken for one in places):
                        chain.why = LEFT
                    # A sum may be what different normalisations take, in branches.
                    if self._decide(name, chain) and kind != "sum":
                        taken += places

    def _starts(self, kind: str, key: str) -> bool:
        known = self._kind(key)
        return known == kind if known is not None else kind == "gate" and "(" in key

    def _decide(self, method: str, chain: Chain) -> bool:
        part, act = self.parts.get(chain.key), self._at(chain.module)
        through = tuple(path for path, _ in chain.through)
        site = (chain.kind, method, chain.key, through, chain.module or "")
        if site in self.before:
            if part is not None:
                part.fused = True
            return chain.why is None
        if why := (part.obstacle if part else None) or self._refusal(chain, part, act):
            if part is not None and (chain.kind in NORMS or chain.end is not None):
                # Nothing follows within an `nn.Sequential`: what is around it says more.
                within = chain.kind == "tail" and part.why == NOTHING
                part.why = why if within else part.why or why
            return False
        if part is not None:
            part.fused = True
        self.sites.add(site)
        last = type(act).__name__ if act is not None else (chain.function or ("",))[0]
        first = type(part.module).__name__ if part is not None else last
        what, reason = {
            **dict.fromkeys(
                NORMS, ([first, *(["add"] if chain.add else []), last], chain.module or last)
            ),
            "linear": ([first, last], chain.module or last),
            "gate": ([first, "multiply"], "the product"),
            "sum": (["add", first], ""),
        }[chain.kind]
        reason = f"nothing but {reason} uses its output" if reason else "its input is a sum"
        where = f"{class_name(self.base)}.{method}"
        path = part.path if part is not None else self.found.places[0].path
        self.fused.append(Fusion(path, " + ".join(what), where, reason))
        return True

    def _refusal(self, chain: Chain, part: Part | None, act: nn.Module | None) -> str | None:
        """Why these very modules are not fused, where the source allows it."""
        if chain.why is not None:
            return chain.why
        if chain.kind in (*NORMS, "linear"):
            if chain.function is None and act is None:
                return f"{chain.module} follows it, which is no module" if chain.module else NOTHING
            if act is not None and (why := self.left.get(id(act))):
                return f"its activation {chain.module} is left alone: {why}"
            if act is not None and self.kinds.of(act) != "gate":
                return f"{class_name(type(act))} {UNKNOWN}"
            between = [self._at(path) for path, _ in chain.through]
            if any(one is not None and hooked(one) for one in (act, *between)):
                return "what follows it has hooks, which see its output"
        if chain.kind == "linear" and part is not None and part.module.bias is None:
            return "it has no bias"
        if chain.kind in NORMS and any(_within(path, chain.key) for path in chain.called):
            return "a module runs before the pass ends that may call it too"
        if chain.kind == "tail":
            _, before = ends(self._at(chain.key))
            if type(before) not in PRODUCERS or hooked(before):
                return "what makes its input may give it to others too"
        if chain.producer is not None:
            producer = self._at(chain.producer)
            if type(producer) not in PRODUCERS or producer is None or hooked(producer):
                return "a module runs before the pass ends that may see what it is given"
        for path in chain.called:
            if self._at(path) is None and self._known(path):
                return f"{path} runs before the pass ends, which is no module"
        return None

    def _known(self, path: str) -> bool:
        """Whether there is something else than None at a path: what is None is not called."""
        try:
            return functools.reduce(getattr, path.split("."), self.module) is not None
        except AttributeError:
            return False

    def _at(self, path: str | None) -> nn.Module | None:
        """The module at a path."""
        found: nn.Module | None = self.module
        for name in path.split(".") if path else ():
            found = found._modules.get(name) if found is not None else None
        return found if path else None

    def _is_identity(self, path: str) -> bool:
        return type(self._at(path)) is nn.Identity

    def _is_act(self, path: str) -> bool:
        act = self._at(path)
        return act is not None and self.kinds.of(act) == "gate"


def _within(path: str, key: str) -> bool:
    """Whether one path is the other or leads to it."""
    return f"{path}.".startswith(f"{key}.") or f"{key}.".startswith(f"{path}.")
