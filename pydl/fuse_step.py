"""Steps of a chain that wait for the rest of it, and whether one pass may compute them together.

Each looks at what it is given: where a module has hooks or is another by now, where tensors do not
fit, or where native PyTorch is the faster, the answer is no.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydl import functional
from pydl import nn as pydl_nn
from pydl.nn.derived import Derived, Form, covers
from pydl.nn.steps import alike, biased, plain
from pydl.ops.bias_act import ACTIVATIONS as IN_PASS

NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
# A module's name -> the activation, and the attribute that holds its parameter.
ACTIVATIONS: dict[str, tuple[str, str | None]] = {
    "ELU": ("elu", "alpha"),
    "GELU": ("gelu", None),
    "LeakyReLU": ("leaky_relu", "negative_slope"),
    "Mish": ("mish", None),
    "ReLU": ("relu", None),
    "SELU": ("selu", None),
    "SiLU": ("silu", None),
    "Sigmoid": ("sigmoid", None),
    "Tanh": ("tanh", None),
}
# A function -> the activation, and the names of its arguments after the first.
FUNCTIONS: dict[Any, tuple[str, tuple[str, ...]]] = {
    F.elu: ("elu", ("alpha", "inplace")),
    F.gelu: ("gelu", ("approximate",)),
    F.leaky_relu: ("leaky_relu", ("negative_slope", "inplace")),
    F.mish: ("mish", ("inplace",)),
    F.relu: ("relu", ("inplace",)),
    F.relu_: ("relu", ()),
    F.selu: ("selu", ("inplace",)),
    F.sigmoid: ("sigmoid", ()),
    F.silu: ("silu", ("inplace",)),
    F.tanh: ("tanh", ()),
    torch.relu: ("relu", ()),
    torch.relu_: ("relu", ()),
    torch.selu: ("selu", ()),
    torch.sigmoid: ("sigmoid", ()),
    torch.sigmoid_: ("sigmoid", ()),
    torch.tanh: ("tanh", ()),
    torch.tanh_: ("tanh", ()),
}
# A tensor's method -> the activation.
METHODS = {name + end: name for name in ("relu", "sigmoid", "tanh") for end in ("", "_")}
# Modules whose output is always memory of its own.
PRODUCERS: tuple[type, ...] = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear, pydl_nn.Linear,
)  # fmt: skip
BATCH_NORMS: tuple[type, ...] = tuple(getattr(pydl_nn, name) for name in NORMS)
_ACTS = {getattr(pydl_nn, name): known for name, known in ACTIVATIONS.items()}


def form_of(form: Form) -> tuple[str, float | None] | None:
    """The activation and parameter that another package's class computes, if the pass has it."""
    given = dict(form.arguments)
    name = "gelu_tanh" if given.pop("approximate", "none") == "tanh" else form.function
    parameter = given.pop("beta", None)
    return None if form.eps or given or name not in IN_PASS else (name, parameter)


class Pending(NamedTuple):
    """A batch normalisation that has not been computed yet, and the residual added to it."""

    bn: Any
    input: Tensor
    residual: Any = None
    add: str = ""
    """How it was added: "add" or "iadd"; "" for not at all."""
    left: bool = True
    """The normalised is the left operand."""

    def value(self) -> Any:
        """What the container's own method has here."""
        y = self.bn(self.input)
        if not self.add:
            return y
        first, second = (y, self.residual) if self.left else (self.residual, y)
        return getattr(operator, self.add)(first, second)

    def fits(self) -> bool:
        """Whether the residual can be added in the same pass, with the same result."""
        x, r = self.input, self.residual
        if not self.add:
            return True
        if not alike(x, r):
            return False
        if x.is_contiguous():
            return r.is_contiguous()
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
        if last is None:
            return False
        return x.is_contiguous(memory_format=last) and r.is_contiguous(memory_format=last)


class Layer(NamedTuple):
    """A linear layer that has not been computed yet."""

    layer: nn.Linear
    input: Tensor

    def value(self) -> Any:
        """What the container's own method has here."""
        return self.layer(self.input)

    def wins(self, backend: str | None) -> bool:
        """Whether its bias is to be added in one pass with the activation."""
        return biased(self.layer, self.input, backend)


class Gate(NamedTuple):
    """An activation that has not been computed yet."""

    call: Any
    input: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    act: str
    parameter: float | None
    backend: str | None

    def value(self) -> Any:
        """What the container's own method has here."""
        return self.call(self.input, *self.args, **self.kwargs)

    def fits(self, up: Any) -> bool:
        """Whether a product with this is in the pass, with the same result."""
        return alike(self.input, up)


_WAITING = (Pending, Layer, Gate)


def value_of(value: Any) -> Any:
    return value.value() if type(value) in _WAITING else value


def still(function: Any, act: str) -> bool:
    """Whether the name of a function stands for the activation that it stood for in the source."""
    return function in FUNCTIONS and FUNCTIONS[function][0] == act.removesuffix("_tanh")


def makes(producer: Any) -> bool:
    """Whether nothing but what made a tensor can hold it."""
    return producer is None or (type(producer) in PRODUCERS and plain(producer))


def sequential(module: Any) -> bool:
    """Whether calling a module calls what is in it, one after the other, and nothing sees it."""
    return (
        isinstance(module, nn.Sequential)
        and len(module._modules) > 1
        and getattr(type(module).forward, "_pydl_runs", type(module).forward)
        is nn.Sequential.forward
        and type(module).__call__ is nn.Module.__call__
        and plain(module)
    )


def ends(module: Any) -> tuple[Any, Any]:
    """What an `nn.Sequential` ends with, and the module before that."""
    before = None
    while sequential(module):
        *_, before, module = module._modules.values()
    return module, before


def gated(gate: Gate, up: Tensor) -> Tensor:
    return functional.gated_act(
        gate.input, up, gate.act, act_param=gate.parameter, backend=gate.backend
    )


def activation(module: Any, backend: str | None, x: Tensor) -> tuple[str | None, float | None]:
    """What a module applies, if it is a known activation that the same backend computes."""
    if isinstance(module, Derived):
        known = form_of(module._pydl_form)
        same = plain(module) and module.backend == backend
        return known if same and known and covers(module._pydl_form, module, x) else (None, None)
    if type(module) not in _ACTS or not plain(module) or module.backend != backend:
        return None, None
    name, attribute = _ACTS[type(module)]
    if name == "gelu" and module.approximate != "none":
        name = "gelu_tanh"
    return name, None if attribute is None else float(getattr(module, attribute))
