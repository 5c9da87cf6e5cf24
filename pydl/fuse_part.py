"""The modules that one pass may start with or be about, and which of them a report tells of."""

from __future__ import annotations

from typing import Any

from torch import nn

from pydl import nn as pydl_nn
from pydl.fuse_chain import NOTHING, UNKNOWN
from pydl.fuse_step import ACTIVATIONS, NORMS, form_of
from pydl.fuse_sum import NO_SUM
from pydl.nn.derived import Derived, Form
from pydl.nn.steps import hooked
from pydl.walk import Found

LEFT = "its activation or sum is fused with something else already"
_SPACES = (nn, pydl_nn)
_KINDS: dict[type, str] = {
    nn.Linear: "linear",
    pydl_nn.Linear: "linear",
    **{getattr(space, name): "norm" for space in _SPACES for name in NORMS},
    **{getattr(space, name): "gate" for space in _SPACES for name in ACTIVATIONS},
    **{getattr(space, name): "sum" for space in _SPACES for name in ("LayerNorm", "RMSNorm")},
}
_DULL = (NOTHING, NO_SUM, LEFT)


class Kinds:
    """What a module may be in a chain (see `pydl.fuse_write.Chain`); an activation: "gate"."""

    def __init__(self, forms: dict[int, Form]) -> None:
        self.forms = forms

    def of(self, module: nn.Module) -> str | None:
        form = module._pydl_form if isinstance(module, Derived) else self.forms.get(id(module))
        if form is None:
            return _KINDS.get(type(module))
        return "sum" if form.eps else "gate" if form_of(form) is not None else None


class Part:
    """A module that may be fused, and why it is not."""

    def __init__(self, found: Found, kind: str) -> None:
        self.module: Any = found.module
        self.path, self.kind = found.places[0].path, kind
        self.fused = False
        self.why: str | None = None
        self.obstacle: str | None = None
        if kind == "norm" and len(found.places) > 1:
            self.obstacle = f"it stands in several places: also {found.places[1].path}"
        elif hooked(found.module):
            self.obstacle = "it has hooks, which see its output"


def told(part: Part) -> str | None:
    """Why a part is not fused, where that is worth a line: a batch normalisation, or another that
    might have been."""
    if part.fused:
        return None
    if part.kind == "norm":
        return part.obstacle or part.why or "no method calls it where its output can be followed"
    if part.why is None or part.why in _DULL or part.why.endswith(UNKNOWN):
        return None
    return part.why
