"""Twins of modules of other packages: classes derived from theirs, made when a model has them.

What such a class computes is told by a `Form`, which `pydl.recognise` finds. A call that the form
does not cover (a dtype, mixed dtypes, other arguments) runs the class' own `forward`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pydl import functional
from pydl.backends import choose, requested
from pydl.nn.activation import HasBackend
from pydl.traced import as_node, proxied


class Form(NamedTuple):
    """A function of `pydl.functional`, and where a module has what that takes.

    Attributes:
        function: Its name.
        arguments: Constants, by name.
        eps: The attribute with a normalisation's eps; "" for an activation.
        offset: Added to the weight: 1 where a module multiplies by `1 + weight`.
        dtypes: The dtypes in which the module's values are the function's.
        direct: The module calls one function of torch, so that autocast treats both alike.
    """

    function: str
    arguments: tuple[tuple[str, Any], ...] = ()
    eps: str = ""
    offset: int = 0
    dtypes: tuple[torch.dtype, ...] = ()
    direct: bool = False

    def __str__(self) -> str:
        given = "".join(f", {name}={value!r}" for name, value in self.arguments)
        weight = ", 1 + weight" if self.offset else ""
        return f"pydl.functional.{self.function}(input{weight}{given})"


class Derived(HasBackend, nn.Module):
    """What stands before another package's class in a twin's bases."""

    _pydl_form: Form
    _pydl_own: bool
    """Where native PyTorch is the fastest, the class' own forward is; not where it is a formula of
    many steps for which torch has a function."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        form = self._pydl_form
        if len(args) == 1 and not kwargs:
            x = args[0]
            if type(x) is not Tensor and proxied(x):
                return as_node(self, locals())
            free = self._pydl_own and self.backend is None and requested(None) is None
            if not (free and choose(form.function, None, x) == "torch") and covers(form, self, x):
                return apply(form, self, x, self.backend)
        return super().forward(*args, **kwargs)


def covers(form: Form, module: Any, x: Any) -> bool:
    """Whether the function gives what the module's own forward would, dtype included."""
    if not isinstance(x, Tensor) or x.dtype not in form.dtypes:
        return False
    if x.device.type not in ("cpu", "cuda"):
        return False
    if not form.direct and x.dtype != torch.float32 and torch.is_autocast_enabled(x.device.type):
        return False
    if not form.eps:
        return True
    weight = module._parameters.get("weight")
    if weight is None or x.shape[-1:] != weight.shape:
        return False
    both = [weight, module._parameters.get("bias")]
    return all(one is None or (one.dtype == x.dtype and one.device == x.device) for one in both)


def apply(form: Form, module: Any, x: Tensor, backend: str | None) -> Tensor:
    """Computes a form with a module's parameters."""
    function: Callable[..., Tensor] = getattr(functional, form.function)
    if not form.eps:
        return function(x, **dict(form.arguments), backend=backend)
    return function(x, x.shape[-1:], **_parameters(form, module), backend=backend)


def add(
    form: Form, module: Any, x: Tensor, residual: Tensor, backend: str | None
) -> tuple[Tensor, Tensor]:
    """A normalisation's form of `residual + x`, and that sum, in one pass."""
    function: Callable[..., tuple[Tensor, Tensor]] = getattr(functional, f"add_{form.function}")
    return function(x, residual, x.shape[-1:], **_parameters(form, module), backend=backend)


def _parameters(form: Form, module: Any) -> dict[str, Any]:
    """A normalisation's weight, bias and eps."""
    given = dict(form.arguments)
    weight = module._parameters["weight"]
    if form.offset:
        # In fp32 at least: 1 + weight in 16 bits would lose the weight's last places.
        weight = form.offset + (weight if weight.dtype == torch.float64 else weight.float())
    if form.function == "layer_norm":
        given["bias"] = module._parameters.get("bias")
    return {**given, "weight": weight, "eps": getattr(module, form.eps)}


def derive(base: type, form: Form) -> type:
    """The twin of a class; the same one each time."""
    key: Any = base
    return _derive(key, form)


@functools.cache
def _derive(base: Any, form: Form) -> type:
    members = {
        "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__,
        "__reduce_ex__": _reduce, "_pydl_form": form, "_pydl_origin": base,
        "_pydl_own": form.direct or bool(form.eps) or form.function == "swish",
    }  # fmt: skip
    return type(base.__name__, (Derived, base), members)


def _reduce(self: Any, protocol: Any) -> Any:
    """Copies and pickles by the class that it is derived from."""
    made = object.__reduce_ex__(self, max(2, int(protocol)))
    return (_remake, (self._pydl_origin, tuple(self._pydl_form)), *made[2:])


def _remake(base: type, form: tuple[Any, ...]) -> nn.Module:
    """A twin without attributes yet."""
    return object.__new__(derive(base, Form(*form)))
