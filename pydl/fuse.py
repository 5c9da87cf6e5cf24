"""Plans which batch normalisations of a model run together with the activation that follows them.

Where the source of a container's method shows that a batch normalisation's output goes to an
activation alone, with a residual added to it or not, the container gets a class derived from its
own, in which that method computes them in one pass. No module is exchanged for it: the tree, names,
hooks and `state_dict` stay, and what does not go through that method computes as before.
"""

from __future__ import annotations

import ast
import functools
import inspect
import types
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pydl import nn as pydl_nn
from pydl.fuse_chain import NOTHING, UNKNOWN, chains
from pydl.fuse_run import ACTIVATIONS, NORMS, PRODUCERS, Fused, hooked
from pydl.fuse_source import Chain, Method, Unreadable, rewrite
from pydl.report import Fusion, Skipped, class_name

if TYPE_CHECKING:
    from pydl.replace import Found

Site = tuple[str, str, tuple[str, ...]]
"""A method's name, the path of a batch normalisation that is fused in it, and the paths of the
identities between it and the activation."""

_NORMS = {getattr(space, name) for space in (nn, pydl_nn) for name in NORMS}
_SYNCHRONISED = {nn.SyncBatchNorm, pydl_nn.SyncBatchNorm}
_SOMEWHERE = ast.Call(ast.Constant(None), [], [])  # a call that no source has
_ACTS = {getattr(space, name) for space in (nn, pydl_nn) for name in ACTIVATIONS}


@dataclass
class Plan:
    """What is to be fused: containers with their new classes; and what is told about it."""

    classes: list[tuple[nn.Module, type]] = field(default_factory=list)
    fused: list[Fusion] = field(default_factory=list)
    unfused: list[Skipped] = field(default_factory=list)


def plan(modules: list[Found], left: dict[int, str]) -> Plan:
    """Plans for all modules of a model; `left` has those, by id, that are to be left alone, and
    why."""
    made = Plan()
    norms: dict[int, _Norm] = {}
    inside: dict[int, dict[str, _Norm]] = {}
    for found in modules:
        if type(found.module) in _NORMS and id(found.module) not in left:
            norm = norms[id(found.module)] = _Norm(found)
            for place in found.places:
                for path, container in place.above:
                    below = place.path[len(path) + 1 :] if path else place.path
                    inside.setdefault(id(container), {})[below] = norm
    for found in modules:
        if id(found.module) in inside:
            fusing = _Container(found, inside[id(found.module)], left)
            made.fused += fusing.fused
            if fusing.cls is not None:
                made.classes.append((found.module, fusing.cls))
    order = {norm.path: index for index, norm in enumerate(norms.values())}
    made.fused.sort(key=lambda one: order[one.path])
    for norm in norms.values():
        if not norm.fused:
            kind = class_name(type(norm.module))
            why = norm.why or "no method calls it where its output can be followed"
            made.unfused.append(Skipped(norm.path, kind, why))
    for found in modules:
        if type(found.module) in _SYNCHRONISED and id(found.module) not in left:
            path, kind = found.places[0].path, class_name(type(found.module))
            made.unfused.append(Skipped(path, kind, "its moments come from all processes"))
    return made


class _Norm:
    """A batch normalisation that may be fused, and why it is not."""

    def __init__(self, found: Found) -> None:
        self.module, self.path = found.module, found.places[0].path
        self.fused = False
        self.why: str | None = None
        if len(found.places) > 1:
            self.why = f"it stands in several places: also {found.places[1].path}"
        elif hooked(found.module):
            self.why = "it has hooks, which see its output"


class _Container:
    """A module with batch normalisations below it, by path: what is fused, and its new class."""

    def __init__(self, found: Found, norms: dict[str, _Norm], left: dict[int, str]) -> None:
        self.module, self.norms, self.left = found.module, norms, left
        now = type(found.module)
        self.base: type[Any] = vars(now).get("_pydl_base", now)
        self.before: frozenset[Site] = vars(now).get("_pydl_sites", frozenset())
        self.sites = set(self.before)
        self.fused: list[Fusion] = []
        self.cls: type | None = None
        try:
            if why := _obstacle(found, self.base):
                raise Unreadable(f"its container {why}")
            if self.base.forward is nn.Sequential.forward:
                self._sequential()
            else:
                for name, function, mentioned in _methods(self.base, norms):
                    self._method(name, function, mentioned)
            if self.sites != self.before:
                self.cls = derive(self.base, frozenset(self.sites))
        except Unreadable as why:
            fused = {one.path for one in self.fused}
            self.fused.clear()
            for path, norm in norms.items():
                if norm.path in fused or "." not in path:
                    norm.fused, norm.why = False, norm.why or str(why)

    def _sequential(self) -> None:
        """A batch normalisation and what follows it in an `nn.Sequential`."""
        names = list(self.module._modules)
        for index, name in enumerate(names):
            if name in self.norms:
                chain = Chain(name, _SOMEWHERE)
                for after in names[index + 1 :]:
                    if not self._is_identity(after):
                        chain.module = after
                        break
                    chain.through.append((after, _SOMEWHERE))
                self._decide("forward", chain)

    def _method(self, name: str, function: types.FunctionType, mentioned: list[str]) -> None:
        """What the source of a method shows."""
        try:
            found = chains(_read(function), self.norms.__contains__, self._is_identity)
        except Unreadable as why:
            for path in mentioned:
                self.norms[path].why = self.norms[path].why or f"its container's {name} {why}"
            return
        taken: list[ast.AST | None] = []
        for chain in found:
            if chain.why is None and (chain.act in taken or (chain.add and chain.add in taken)):
                chain.why = "it is added to what is fused with that activation already"
            if self._decide(name, chain):
                taken += [chain.act, chain.add]

    def _decide(self, method: str, chain: Chain) -> bool:
        norm, act = self.norms[chain.bn], self._at(chain.module)
        site = (method, chain.bn, tuple(path for path, _ in chain.through))
        if site in self.before:
            norm.fused = True
            return True
        if why := norm.why or self._refusal(chain, act):
            norm.why = why
            return False
        norm.fused = True
        self.sites.add(site)
        last = type(act).__name__ if act is not None else (chain.function or ("",))[0]
        what = [type(norm.module).__name__, *(["add"] if chain.add else []), last]
        where = f"{class_name(self.base)}.{method}"
        reason = f"nothing but {chain.module or last} uses its output"
        self.fused.append(Fusion(norm.path, " + ".join(what), where, reason))
        return True

    def _refusal(self, chain: Chain, act: nn.Module | None) -> str | None:
        """Why these very modules are not fused, where the source allows it."""
        if chain.why is not None:
            return chain.why
        if chain.function is None and act is None:
            return f"{chain.module} follows it, which is no module" if chain.module else NOTHING
        if act is not None and (why := self.left.get(id(act))):
            return f"its activation {chain.module} is left alone: {why}"
        if act is not None and type(act) not in _ACTS:
            return f"{class_name(type(act))} {UNKNOWN}"
        between = [self._at(path) for path, _ in chain.through]
        if any(one is not None and hooked(one) for one in (act, *between)):
            return "what follows it has hooks, which see its output"
        if chain.producer is not None:
            producer = self._at(chain.producer)
            if type(producer) not in PRODUCERS or producer is None or hooked(producer):
                return "a module runs before the activation that may see what is normalised"
        for path in chain.called:
            if self._at(path) is None and self._known(path):
                return f"{path} runs before the activation, which is no module"
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


def _obstacle(found: Found, base: type) -> str | None:
    """Why a container must keep its class, or None."""
    module = found.module
    if isinstance(module, torch.jit.ScriptModule):
        return "is TorchScript"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "is parametrized, which changes its class"
    if "forward" in vars(module):
        return "has a forward of its own, set on the instance"
    compiled = any(type(place.parent).__name__ == "OptimizedModule" for place in found.places)
    if compiled or vars(module).get("_compiled_call_impl") is not None:
        return "is compiled by itself"
    for name in ("__init_subclass__", "__reduce__", "__reduce_ex__"):
        if any(name in vars(cls) for cls in base.__mro__[:-1]):
            return f"has a {name} of its own"
    return None if type(base) is type else "has a metaclass of its own"


def _methods(
    base: type, norms: dict[str, _Norm]
) -> list[tuple[str, types.FunctionType, list[str]]]:
    """The methods that mention a batch normalisation, with their names and what they mention."""
    wanted = [path for path in norms if all(map(str.isidentifier, path.split(".")))]
    found = []
    for name in dir(base) if wanted else ():
        function = inspect.getattr_static(base, name)
        if isinstance(function, types.FunctionType) and not name.startswith("__"):
            code = getattr(inspect.unwrap(function), "__code__", function.__code__)
            names = set(code.co_names)
            if mentioned := [path for path in wanted if names.issuperset(path.split("."))]:
                found.append((name, function, mentioned))
    return found


# For reading only: what is rewritten is read again.
_read = functools.lru_cache(maxsize=256)(Method)


def derive(base: type[Any], sites: frozenset[Site]) -> type:
    """A class derived from a container's in which those sites are fused; the same one each time.

    Raises:
        Unreadable: there can be no such class.
    """
    methods = sorted({method for method, *_ in sites})
    functions = tuple((name, inspect.getattr_static(base, name)) for name in methods)
    key: Any = base
    return _derive(key, sites, functions)


@functools.cache
def _derive(base: Any, sites: frozenset[Site], functions: tuple[tuple[str, Any], ...]) -> type:
    members: dict[str, Any] = {
        "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__,
        "__reduce_ex__": _reduce, "_pydl_base": base, "_pydl_sites": sites,
    }  # fmt: skip
    if base.forward is nn.Sequential.forward:
        members["_pydl_names"] = frozenset(path for _, path, _ in sites)
        members["forward"] = Fused._pydl_sequential
    else:
        for name, function in functions:
            source = Method(function)
            here = [site for site in sites if site[0] == name]
            norms, between = {site[1] for site in here}, {p for site in here for p in site[2]}
            found = chains(source, norms.__contains__, between.__contains__)
            found = [chain for chain in found if chain.why is None]
            members[name] = rewrite(source, found)
    cls = type(base.__name__, (Fused, base), members)
    try:
        object.__setattr__(object.__new__(base), "__class__", cls)
    except TypeError as error:
        raise Unreadable("has a class that no other can stand for") from error
    return cls


def _reduce(self: Any, protocol: Any) -> Any:
    """Copies and pickles a container by its own class and what is fused in it."""
    cls = type(self)
    made = object.__reduce_ex__(self, max(2, int(protocol)))
    if "_pydl_base" not in vars(cls):
        return made
    return (_remake, (cls._pydl_base, tuple(sorted(cls._pydl_sites))), *made[2:])


def _remake(base: type[Any], sites: tuple[Site, ...]) -> nn.Module:
    """A container without attributes yet; not fused where its class is no longer the same."""
    try:
        cls = derive(base, frozenset(sites))
    except (Unreadable, AttributeError):
        cls = base
    return object.__new__(cls)
