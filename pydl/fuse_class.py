"""Classes derived from containers', in which some steps of their methods are one pass."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
from torch import nn

from pydl.fuse_chain import chains
from pydl.fuse_changes import refuse_changed
from pydl.fuse_part import Part
from pydl.fuse_run import Fused
from pydl.fuse_source import Method, Unreadable
from pydl.fuse_sum import sums
from pydl.fuse_write import rewrite
from pydl.walk import Found

Site = tuple[str, str, str, tuple[str, ...], str]
"""The kind of a chain (see `pydl.fuse_write.Chain`), the method that it is fused in, its key, the
paths of the identities that its output passes through, and that of its activation."""


def obstacle(found: Found, base: type) -> str | None:
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
    for name in ("__reduce__", "__reduce_ex__"):
        if any(name in vars(cls) for cls in base.__mro__[:-1]):
            return f"has a {name} of its own"
    return None if type(base) is type else "has a metaclass of its own"


def derive(base: type[Any], sites: frozenset[Site], backend: str | None) -> type:
    """A class derived from a container's in which those sites are fused; the same one each time.

    Raises:
        Unreadable: there can be no such class.
    """
    methods = sorted({method for _, method, *_ in sites})
    functions = tuple((name, inspect.getattr_static(base, name)) for name in methods)
    key: Any = base
    return _derive(key, sites, functions, backend)


@functools.cache
def _derive(
    base: Any, sites: frozenset[Site], functions: tuple[tuple[str, Any], ...], backend: str | None
) -> type:
    members: dict[str, Any] = {
        "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__,
        "__reduce_ex__": _reduce, "_pydl_base": base, "_pydl_sites": sites,
        "_pydl_backend": backend,
    }  # fmt: skip
    if base.forward is nn.Sequential.forward:
        members["_pydl_names"] = frozenset(site[2] for site in sites)
        members["forward"] = Fused._pydl_sequential
    else:
        for name, function in functions:
            source = Method(function)
            here = [site for site in sites if site[1] == name]
            starts = {(site[0], site[2]) for site in here}
            between = {path for site in here for path in site[3]}
            acts = {site[4] for site in here}
            found = chains(
                source, lambda *start, of=starts: start in of, between.__contains__,
                acts.__contains__,
            )  # fmt: skip
            found += sums(source, lambda *start, of=starts: start in of)
            refuse_changed(source, found)
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
    return (_remake, (cls._pydl_base, tuple(sorted(cls._pydl_sites)), cls._pydl_backend), *made[2:])


def _remake(base: type[Any], sites: tuple[Site, ...], backend: str | None = None) -> nn.Module:
    """A container without attributes yet; not fused where its class is no longer the same."""
    try:
        cls = derive(base, frozenset(sites), backend)
    except (Unreadable, AttributeError):
        cls = base
    return object.__new__(cls)


class Methods:
    """The methods of containers, looked up once for those of one class."""

    def __init__(self) -> None:
        self._known: dict[type, list[tuple[str, types.FunctionType, set[str]]]] = {}

    def mentioning(
        self, base: type, parts: dict[str, Part]
    ) -> list[tuple[str, types.FunctionType, list[str]]]:
        """Those that mention a part, with their names and what they mention."""
        wanted = [path for path in parts if all(map(str.isidentifier, path.split(".")))]
        found = []
        for name, function, names in self._of(base) if wanted else ():
            if mentioned := [path for path in wanted if names.issuperset(path.split("."))]:
                found.append((name, function, mentioned))
        return found

    def _of(self, base: type) -> list[tuple[str, types.FunctionType, set[str]]]:
        if base not in self._known:
            found = self._known[base] = []
            for name in dir(base):
                function = inspect.getattr_static(base, name)
                if isinstance(function, types.FunctionType) and not name.startswith("__"):
                    code = getattr(inspect.unwrap(function), "__code__", function.__code__)
                    found.append((name, function, set(code.co_names)))
        return self._known[base]
