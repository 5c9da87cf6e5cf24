"""What `pydl.replace` did: to read, to print and to undo."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from pydl.measured import Measured

WIDTH = 80


def class_name(cls: type) -> str:
    """A class' name as users write it: `torch.nn.GELU`, `pydl.nn.GELU`, `some.module.Thing`."""
    for prefix in ("torch.nn", "pydl.nn"):
        if cls.__module__.startswith(prefix + ".") and "." not in cls.__qualname__:
            return f"{prefix}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


class Replaced(NamedTuple):
    """A module that has a twin now: its path, both classes' names, and why that is right."""

    path: str
    old: str
    new: str
    reason: str


class Skipped(NamedTuple):
    """A module that was left alone although it is, or derives from, one with a twin."""

    path: str
    type: str
    why: str


class Fusion(NamedTuple):
    """Steps that run in one pass: the path of the module that they begin with or are about, what
    they are, whose method does it, and why that is right."""

    path: str
    what: str
    new: str
    reason: str


class Swap(NamedTuple):
    """A module, its twin, the (parent, name) where it stands (the model itself has no parent), and
    the twin's class."""

    old: nn.Module
    new: nn.Module
    places: list[tuple[nn.Module | None, str]]
    cls: type


def _put(parent: nn.Module, name: str, module: nn.Module) -> None:
    # Not by setattr: a parent may have overridden it, and the module is registered already.
    parent._modules[name] = module


@dataclass
class Report:
    """What was replaced and skipped, iterable over what was replaced.

    Attributes:
        model: The model to use: the one given, or its twin where it was of a known type itself.
        replaced: (path, old, new, reason) of each module that was swapped; the path of the model
            itself is "".
        skipped: (path, type, why) of each module left alone that is, or derives from, a type with a
            twin.
        fused: (path, what, new, reason) of each module that runs in one pass with what stands
            beside it; `new` is the method that does so.
        unfused: (path, type, why) of each that might have and does not, but for those in `skipped`.
        measured: What came of `example_inputs`, before and after; None without.
        notes: What else is to be known, such as a pattern that fits nothing.
        dry_run: Nothing was changed.
        undone: It was taken back.
    """

    model: nn.Module
    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    fused: list[Fusion] = field(default_factory=list)
    unfused: list[Skipped] = field(default_factory=list)
    measured: Measured | None = None
    notes: list[str] = field(default_factory=list)
    dry_run: bool = False
    undone: bool = False
    _swaps: list[Swap] = field(default_factory=list, repr=False)
    _classes: list[tuple[nn.Module, type, type]] = field(default_factory=list, repr=False)

    def __iter__(self) -> Iterator[Replaced]:
        return iter(self.replaced)

    def __len__(self) -> int:
        return len(self.replaced)

    def apply(
        self,
        swaps: Iterable[Swap],
        backend: str | None = None,
        classes: Iterable[tuple[nn.Module, type]] = (),
    ) -> None:
        """Puts the twins in place and gives containers their classes; after an error everything is
        as it was."""
        try:
            for module, cls in classes:
                self._classes.append((module, type(module), cls))
                object.__setattr__(module, "__class__", cls)
            for swap in swaps:
                self._swaps.append(swap)
                if backend is not None:
                    # Not by a setter, which may set it in parts that are not to be changed.
                    vars(swap.new)["backend"] = backend
                for parent, name in swap.places:
                    if parent is None:
                        self.model = swap.new
                    else:
                        _put(parent, name, swap.new)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Puts the very modules back that were there before, wherever their twins stand in the
        model now.

        A place that holds something else by now is left alone. A second call does nothing.
        """
        fused = {(id(module), new) for module, _, new in self._classes}
        # One whose class another tool has changed since, as torch's parametrisations do, is of use
        # as it is alone.
        originals = {
            id(swap.new): swap.old for swap in self._swaps
            if type(swap.new) is swap.cls or (id(swap.new), type(swap.new)) in fused
        }  # fmt: skip
        parents = [
            parent for swap in self._swaps for parent, _ in swap.places if parent is not None
        ]
        for parent in (*parents, *list(self.model.modules())):
            for name, child in list(parent._modules.items()):
                if id(child) in originals:
                    _put(parent, name, originals[id(child)])
        self.model = originals.get(id(self.model), self.model)
        for swap in self._swaps:
            if id(swap.new) in originals:
                vars(swap.old).pop("backend", None)
        for module, old, new in self._classes:
            if type(module) is new:
                object.__setattr__(module, "__class__", old)
        self._swaps.clear()
        self._classes.clear()
        self.undone = not self.dry_run

    def __str__(self) -> str:
        modules = f"{len(self)} module{'s' if len(self) != 1 else ''}"
        done = (
            "would be replaced"
            if self.dry_run
            else "replaced (and undone)"
            if self.undone
            else "replaced"
        )
        already = sum(one.why.startswith("is pydl's already") for one in self.skipped)
        also = f", {len(self.fused)} fused" if self.fused else ""
        head = f"pydl.replace: {modules} {done}{also}, {len(self.skipped)} skipped"
        if not self.replaced:
            head = "pydl.replace: nothing to replace"
            if already:
                head += f": {already} module{'s are' if already > 1 else ' is'} pydl's already"
            head += also
        lines = [head]
        pairs: dict[tuple[str, str], list[str]] = {}
        for one in self.replaced:
            shared = one.reason.partition("; ")[2]
            path = (one.path or "(the model)") + (f" ({shared})" if shared else "")
            pairs.setdefault((one.old, one.new), []).append(path)
        lines += _table([(f"{old} -> {new}", paths) for (old, new), paths in pairs.items()])
        methods: dict[tuple[str, str], list[str]] = {}
        for fusion in self.fused:
            methods.setdefault((fusion.what, fusion.new), []).append(fusion.path or "(the model)")
        if methods:
            lines.append("fused, in one pass")
            lines += _table([(f"{what} in {new}", paths) for (what, new), paths in methods.items()])
        for title, between, some in (
            ("left alone", " ", self.skipped),
            ("not fused", ": ", self.unfused),
        ):
            reasons: dict[str, list[str]] = {}
            for left in some:
                key = f"{left.type}{between}{left.why}"
                reasons.setdefault(key, []).append(left.path or "(the model)")
            lines += [title, *_table(list(reasons.items()))] if reasons else []
        lines += self.measured.lines() if self.measured is not None else []
        lines += [line for note in self.notes for line in textwrap.wrap(f"note: {note}", WIDTH)]
        return "\n".join(lines)


def _table(rows: list[tuple[str, list[str]]]) -> list[str]:
    """A count and a title for each row, and below it its paths, the first few where there are
    many."""
    lines = []
    for title, paths in rows:
        lines += textwrap.wrap(
            title, WIDTH, initial_indent=f"{len(paths):>6}  ", subsequent_indent=" " * 8
        )
        few = paths if len(paths) <= 4 else [*paths[:3], f"... ({len(paths) - 3} more)"]
        indent = " " * 12
        lines += textwrap.wrap(
            ", ".join(few),
            WIDTH,
            initial_indent=indent,
            subsequent_indent=indent,
            break_on_hyphens=False,
        )
    return lines
