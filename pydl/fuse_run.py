"""What a fused container does when it runs: batch normalisation, residual and activation as one.

Each step looks at what it is given: where a module has hooks or is another by now, where a residual
does not fit, or where native PyTorch is the faster, it does what the container's own method does.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from pydl import functional
from pydl import nn as pydl_nn
from pydl.backends import choose

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
    nn.Linear,
)  # fmt: skip
_NORMS: tuple[type, ...] = tuple(getattr(pydl_nn, name) for name in NORMS)
_ACTS = {getattr(pydl_nn, name): known for name, known in ACTIVATIONS.items()}


def hooked(module: nn.Module) -> bool:
    """Whether something sees what goes into or comes out of this module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _plain(module: Any) -> bool:
    """Whether calling a module does what its type does, and nothing sees it."""
    return (
        not hooked(module)
        and not torch_module._has_any_global_hook()
        and "forward" not in module.__dict__
        and module._compiled_call_impl is None
    )


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
        if not isinstance(r, Tensor) or r.shape != x.shape or r.dtype != x.dtype:
            return False
        if r.device != x.device or r.layout != torch.strided or x.layout != torch.strided:
            return False
        if x.is_contiguous():
            return r.is_contiguous()
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
        if last is None:
            return False
        return x.is_contiguous(memory_format=last) and r.is_contiguous(memory_format=last)


def _value(value: Any) -> Any:
    return value.value() if type(value) is Pending else value


class Fused:
    """Mixed into the class of a container whose methods have been fused."""

    @staticmethod
    def _pydl_begin(bn: Any, input: Any, producer: Any = None) -> Any:
        """A batch normalisation's call; `producer`: what made the input, where code runs before the
        activation."""
        input = _value(input)
        if (
            isinstance(input, Tensor)
            and type(bn) in _NORMS
            and choose("batch_norm_act", bn.backend, input) != "torch"
            and _plain(bn)
            and (producer is None or (type(producer) in PRODUCERS and _plain(producer)))
        ):
            return Pending(bn, input)
        return bn(input)

    @staticmethod
    def _pydl_add(how: str, first: Any, second: Any) -> Any:
        """`first + second` or `first += second`."""
        if type(first) is Pending and not first.add:
            return Pending(first.bn, first.input, _value(second), how)
        if type(second) is Pending and not second.add and how == "add":
            return Pending(second.bn, second.input, _value(first), how, False)
        return getattr(operator, how)(_value(first), _value(second))

    @staticmethod
    def _pydl_end(
        call: Any, value: Any, act: str | None = None, param: float | None = None, /, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """An activation's call, `call(value, *args, **kwargs)`; of `act`, where that is known."""
        if type(value) is Pending:
            bn, x = value.bn, value.input
            if act is None:
                if type(call) is nn.Identity and _plain(call):
                    return value
                act, param = _activation(call, bn.backend)
            elif not isinstance(call, str) and not _still(call, act):
                act = None
            if act is not None and value.fits():
                bn._check_input_dim(x)
                mean, var, training, momentum = bn._statistics()
                return functional.batch_norm_act(
                    x, mean, var, bn.weight, bn.bias, training, momentum, bn.eps, act=act,
                    residual=value.residual, act_param=param, backend=bn.backend,
                )  # fmt: skip
            value = value.value()
        if isinstance(call, str):
            return getattr(value, call)(*args, **kwargs)
        return call(value, *args, **kwargs)

    def _pydl_sequential(self, input: Any) -> Any:
        """`nn.Sequential.forward`."""
        names = type(self)._pydl_names  # type: ignore[attr-defined]
        for name, module in self._modules.items():  # type: ignore[attr-defined]
            if name in names:
                input = self._pydl_begin(module, input)
            else:
                input = self._pydl_end(module, input)
        return _value(input)


def _still(function: Any, act: str) -> bool:
    """Whether the name of a function stands for the activation that it stood for in the source."""
    return function in FUNCTIONS and FUNCTIONS[function][0] == act.removesuffix("_tanh")


def _activation(module: Any, backend: str | None) -> tuple[str | None, float | None]:
    """What a module applies, if it is a known activation that the same backend computes."""
    if type(module) not in _ACTS or not _plain(module) or module.backend != backend:
        return None, None
    name, attribute = _ACTS[type(module)]
    if name == "gelu" and module.approximate != "none":
        name = "gelu_tanh"
    return name, None if attribute is None else float(getattr(module, attribute))
