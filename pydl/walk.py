"""Which modules a model has, where each stands, and which of them a user's patterns speak of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

Pattern = type | str | Callable[[str, nn.Module], bool]
Patterns = Pattern | Iterable[Pattern] | None


class Place(NamedTuple):
    """Where a module stands: in `parent` under `name`; the model itself has no parent."""

    path: str
    parent: nn.Module | None
    name: str
    above: tuple[tuple[str, nn.Module], ...]
    """The containers that it is in, with their paths, outermost first."""


@dataclass
class Found:
    """A module of the model, and every place that it stands in."""

    module: nn.Module
    places: list[Place]


def walk(model: nn.Module) -> list[Found]:
    """Every module once, with all its places, in the order of `named_modules`."""
    found: dict[int, Found] = {}

    def visit(module: nn.Module, place: Place) -> None:
        found.setdefault(id(module), Found(module, [])).places.append(place)
        if any(module is one for _, one in place.above):
            return
        above = (*place.above, (place.path, module))
        for name, child in module._modules.items():
            if child is not None:
                path = f"{place.path}.{name}" if place.path else name
                visit(child, Place(path, module, name, above))

    visit(model, Place("", None, "", ()))
    return list(found.values())


class Filter:
    """`include` or `exclude`: which modules it speaks of, and which of its patterns were of use."""

    def __init__(self, name: str, patterns: Patterns) -> None:
        one = isinstance(patterns, str) or callable(patterns) or not isinstance(patterns, Iterable)
        many: Any = () if patterns is None else (patterns,) if one else patterns
        self.name, self.patterns = name, tuple[Pattern, ...](many)
        self.unused = list(self.patterns)
        for pattern in self.patterns:
            if isinstance(pattern, nn.Module) or not (
                isinstance(pattern, str) or callable(pattern)
            ):
                raise TypeError(
                    f"pydl: replace: {name} has {pattern!r}, wants module types, names (with * "
                    "and ?) or "
                    "functions of (path, module)"
                )

    def matches(self, found: Found) -> bool:
        """Whether a pattern fits the module; types and names also where they fit a container of
        it."""
        fits = self.fits(found)
        self.unused = [p for p in self.unused if p not in fits]
        return bool(fits)

    def fits(self, found: Found) -> list[Pattern]:
        """The patterns that fit; those do not count as used by it."""
        return [
            p for p in self.patterns if any(self._fits(p, found.module, q) for q in found.places)
        ]

    @staticmethod
    def _fits(pattern: Pattern, module: nn.Module, place: Place) -> bool:
        candidates = [*place.above, (place.path, module)]
        if isinstance(pattern, str):
            return any(path and fnmatchcase(path, pattern) for path, _ in candidates)
        if isinstance(pattern, type):
            return any(isinstance(one, pattern) for _, one in candidates)
        return bool(pattern(place.path, module))

    def notes(self) -> list[str]:
        shown = (p if isinstance(p, str) else getattr(p, "__name__", repr(p)) for p in self.unused)
        return [f"{self.name} {one!r} fits no module that has a twin" for one in shown]
