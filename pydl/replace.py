"""Swaps the modules of a model for their fused twins: in place, by instance, reversibly.

A twin shares the `__dict__` of the module that it stands for: the same parameters, buffers, hooks,
flags and children, so optimisers, tied weights and handles go on working, and what is done to
either is done to both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from pydl import nn as pydl_nn
from pydl.backends import NAMES, unavailable
from pydl.example import arguments, copied
from pydl.fuse import Plan, plan
from pydl.measured import measure
from pydl.nn.derived import Form, derive
from pydl.recognise import Recogniser, candidate, is_derived, named, origin
from pydl.report import Fusion, Replaced, Report, Skipped, Swap, class_name
from pydl.walk import Filter, Found, Patterns, Place, walk

__all__ = ["TWINS", "Fusion", "Replaced", "Report", "Skipped", "register_twin", "replace"]

# Exact type -> its twin. Families add to it with `register_twin`.
TWINS: dict[type, type] = {}


def register_twin(torch_cls: type, pydl_cls: type) -> None:
    """Says that `pydl_cls` may stand for `torch_cls`.

    `replace` hands the attributes of the one to the other without calling a constructor: the twin's
    `forward` must work with them alone, and must do what that of `torch_cls` does.

    Raises:
        ValueError: `torch_cls` has another twin.
        TypeError: one of them is not a module type.
    """
    for cls in (torch_cls, pydl_cls):
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(
                f"pydl: register_twin: got {cls!r}, wants a subclass of torch.nn.Module"
            )
    if TWINS.setdefault(torch_cls, pydl_cls) is not pydl_cls:
        raise ValueError(
            f"pydl: register_twin: torch_cls is {class_name(torch_cls)}, whose twin is "
            f"{class_name(TWINS[torch_cls])} already"
        )


for _name in (
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "ELU",
    "GELU",
    "GLU",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "Mish",
    "MultiheadAttention",
    "PReLU",
    "RMSNorm",
    "ReLU",
    "SELU",
    "SiLU",
    "Sigmoid",
    "SyncBatchNorm",
    "Tanh",
    "TransformerEncoderLayer",
):
    register_twin(getattr(nn, _name), getattr(pydl_nn, _name))


def _base(module: nn.Module) -> type | None:
    """The type with a twin that a module is, derives from, or was scripted from."""
    if is_derived(type(module)):
        return type(module)
    cls: type | None = next((c for c in type(module).__mro__ if c in TWINS), None)
    if isinstance(module, torch.jit.ScriptModule):
        original = getattr(module, "original_name", None)
        cls = next((c for c in TWINS if c.__name__ == original), cls)
    return cls


def _obstacle(found: Found, base: type, backend: str | None) -> str | None:
    """Why a module must stay as it is, or None."""
    module, cls = found.module, type(found.module)
    own = vars(module)
    if cls in TWINS.values() or is_derived(cls):
        now = getattr(module, "backend", None)
        differs = f", with backend {now!r}: set its attribute `backend`, or undo first"
        return "is pydl's already" + (differs if backend is not None and backend != now else "")
    if isinstance(module, torch.jit.ScriptModule):
        return "is TorchScript, which is compiled already"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return f"is a parametrized {class_name(base)}, which changes its class"
    if cls is not base:
        own_forward = getattr(cls, "forward") is not getattr(base, "forward")  # noqa: B009
        return f"is a subclass of {class_name(base)}" + (
            " with a forward of its own" if own_forward else ""
        )
    if "forward" in own:
        return "has a forward of its own, set on the instance"
    if own.get("_compiled_call_impl") is not None:
        return "is compiled by itself; replace before compile()"
    if "backend" in own:
        return "has an attribute `backend` of its own"
    for place in found.places:
        if quantised := _quantised(found, place):
            return quantised
        # By name, since importing what torch.compile needs takes seconds.
        if type(place.parent).__name__ == "OptimizedModule":
            return "is compiled by itself; replace before torch.compile"
        if place.parent is not None and place.name in vars(place.parent):
            return f"is also an ordinary attribute of {class_name(type(place.parent))}"
    return None


def _quantised(found: Found, place: Place) -> str | None:
    """Why torch's quantisation, which looks exact types up, is to find a module as it is, or None.

    A module without a `qconfig` takes that of what it is in; None is for no quantisation.
    """
    if hasattr(found.module, "qconfig"):
        return "has a qconfig, to be quantised" if found.module.qconfig is not None else None
    for path, container in reversed(place.above):
        if hasattr(container, "qconfig"):
            where = path or "the model"
            return f"is in {where}, which has a qconfig" if container.qconfig is not None else None
    return None


class _Match(NamedTuple):
    """The type that a module is judged as, and its twin, or why there is none."""

    base: type
    twin: type | None
    name: str = ""
    reason: str = ""
    why: str | None = None
    form: Form | None = None


class _Matcher:
    """Finds the twins of modules."""

    def __init__(self) -> None:
        self._recognise = Recogniser()

    def __call__(self, module: nn.Module) -> _Match | None:
        """None for a module that neither is nor derives from one with a twin."""
        cls, base = type(module), _base(module)
        if cls is NonDynamicallyQuantizableLinear:
            return None  # nn.MultiheadAttention reads its parameters and does not call it
        if cls in TWINS:
            return _Match(cls, TWINS[cls], class_name(TWINS[cls]), "same function, fused")
        if base is not cls and candidate(module):
            above = origin(cls)
            own = above is cls
            form = self._recognise(module) if own else ""
            if isinstance(form, Form):
                why = "same values and gradients on random inputs"
                return _Match(cls, derive(cls, form), str(form), why, form=form)
            if base is None and named(module):
                return _Match(above or cls, None, why=form if own else None)
        return None if base is None else _Match(base, None)


def replace(
    model: nn.Module,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    fuse: bool = True,
    backend: str | None = None,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    dry_run: bool = False,
) -> Report:
    """Swaps a model's modules for their fused twins, in place, and says what it did.

    Only a module whose type is exactly one of `TWINS`, or one of transformers' own whose values and
    gradients on random inputs are those of a function of pydl (see `pydl.recognise`), is swapped;
    what derives from one is left alone and named in `report.skipped`. A module that stands in
    several places gets one twin. State is shared, not copied: parameters, buffers, hooks, the
    training flag and `state_dict` keys stay what they are. Nothing is changed if an error occurs.

    Args:
        model: Any module. Where it is itself of such a type it has no place to be swapped in: use
            `report.model`.
        include: What to swap; None for all. One or several of: a module type; a name as in
            `named_modules`, with `*` and `?`; a function of (path, module). A type or name that
            fits a container stands for all in it.
        exclude: What to leave alone, likewise; it wins over `include`.
        fuse: Compute steps of a container's method in one pass where its source shows that nothing
            else sees what is between: a batch normalisation with the activation that follows it,
            and with a residual added between them; a linear layer's bias with the activation; an
            activation with the product that it goes into, as in a gated MLP; a sum with the layer
            or RMS normalisation of it. At each call, where a backend has it in one pass. The
            container gets a class derived from its own. The backward pass needs a residual, so
            changing that in place after the activation makes torch raise an error.
        backend: Who computes in the twins; None for the automatic choice at each call (see
            `pydl.backends`).
        example_inputs: What to call the model with, to measure it before and after: a tensor, a
            tuple of positional arguments or a dictionary of named ones. `report.measured` has the
            differences of both from a copy in fp64, times, and what is kept for backward. Copies of
            the model run, in its mode: its state and the random generators stay as they are.
        dry_run: Change nothing, only report what would be done.

    Returns:
        What was replaced and skipped and why; `print(report)` shows it, `report.undo()` takes it
        back, and `report.model` is the model to use from now on.

    Raises:
        TypeError: `model` is no module, or a pattern or `example_inputs` is not as above.
        ValueError: there is no such backend.
        RuntimeError: the backend is not available here, or the model cannot be copied or run with
            `example_inputs`.

    >>> report = pydl.replace(model, exclude=["head.*", torch.nn.Sigmoid])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"pydl: replace: model is a {type(model).__name__}, wants a torch.nn.Module"
        )
    if backend is not None:
        if backend not in NAMES:
            raise ValueError(
                f"pydl: replace: backend is {backend!r}, wants one of {', '.join(NAMES)}"
            )
        if why := unavailable(backend):
            raise RuntimeError(f"pydl: replace: backend {backend!r} is not available: {why}")
    given = None if example_inputs is None else arguments(example_inputs)
    included, excluded = Filter("include", include), Filter("exclude", exclude)
    report = Report(model, dry_run=dry_run)
    swaps: list[Swap] = []
    left: dict[int, str] = {}
    everything, match = walk(model), _Matcher()
    forms: dict[int, Form] = {}
    twinned: list[int] = []
    for found in everything:
        known = match(found.module)
        if known is None:
            continue
        if known.twin is not None:
            twinned.append(id(found.module))
        path, cls = found.places[0].path, type(found.module)
        wanted, unwanted = included.matches(found) or not included.patterns, excluded.matches(found)
        why = _obstacle(found, known.base, backend) or known.why if wanted else "not included"
        why = "excluded" if unwanted else why
        if why is not None or known.twin is None:
            report.skipped.append(Skipped(path, class_name(cls), str(why)))
            if not str(why).startswith("is pydl's already"):
                left[id(found.module)] = str(why)
            continue
        others = ", ".join(place.path for place in found.places[1:])
        reason = known.reason + (f"; shared with {others}" if others else "")
        report.replaced.append(Replaced(path, class_name(cls), known.name, reason))
        twin, places = _twin(found.module, known.twin), [(q.parent, q.name) for q in found.places]
        swaps.append(Swap(found.module, twin, places, known.twin))
        if known.form is not None:
            forms[id(found.module)] = known.form
    report.notes += included.notes() + excluded.notes()
    fusions = Plan()
    if fuse and backend != "torch":
        fusions = plan(everything, left, forms, twinned, backend)
    elif fuse:
        report.notes.append("nothing is fused: backend 'torch' takes one step at a time")
    report.fused, report.unfused = fusions.fused, fusions.unfused
    before = None if given is None else copied(model)
    if not dry_run or given is not None:
        report.apply(swaps, backend, fusions.classes)
    if before is not None and given is not None:
        try:
            report.measured = measure(before, copied(report.model), given)
            report.notes += report.measured.notes
        except BaseException:
            report.undo()
            raise
        if dry_run:
            report.undo()
    return report


def _twin(module: nn.Module, cls: type) -> nn.Module:
    """An object of another class with the same attributes: the same dictionary, not a copy of
    it."""
    twin: Any = object.__new__(cls)
    object.__setattr__(twin, "__dict__", module.__dict__)
    return twin
