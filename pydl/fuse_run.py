"""What a fused container does when it runs: the steps of a chain in one pass.

A batch normalisation with its residual and activation, a linear layer's bias with its activation,
an activation with the product that it goes into, a sum with its normalisation. Where the steps do
not fit together (see `pydl.fuse_step`), each does what the container's own method does.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, nn

from pydl import functional
from pydl.backends import FLOATS, below, choose
from pydl.fuse_step import (
    BATCH_NORMS,
    Gate,
    Layer,
    Pending,
    activation,
    ends,
    gated,
    makes,
    still,
    value_of,
)
from pydl.nn.steps import LINEARS, added, adds, batch_norm_worthwhile, normed, plain, worthwhile
from pydl.ops.product import linear_layer


class Fused:
    """Mixed into the class of a container whose methods have been fused."""

    _pydl_backend: str | None = None
    """Who computes where no twin says so."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """That of the container's class is for classes that people write."""
        if "_pydl_base" not in vars(cls):
            super().__init_subclass__(**kwargs)

    def _pydl_begin(self, bn: Any, input: Any, producer: Any = None) -> Any:
        """A batch normalisation's or linear layer's call; `producer`: what made the input, where
        code runs before the activation."""
        input = value_of(input)
        if isinstance(bn, nn.Sequential):
            last, before = ends(bn)
            if not isinstance(input, Tensor) or type(last) not in BATCH_NORMS or not makes(before):
                return bn(input)
            bn, input = last, self._pydl_until(bn, last, input)
        if type(bn) in LINEARS:
            free = worthwhile(bn, input, self._pydl_backend) and plain(bn) and makes(producer)
            return Layer(bn, input) if free else bn(input)
        if (
            isinstance(input, Tensor)
            and type(bn) in BATCH_NORMS
            and batch_norm_worthwhile(bn, input)
            and plain(bn)
            and makes(producer)
        ):
            return Pending(bn, input)
        return bn(input)

    def _pydl_value(self, value: Any) -> Any:
        """A step that waits no longer."""
        return value_of(value)

    def _pydl_add(self, how: str, first: Any, second: Any) -> Any:
        """`first + second` or `first += second`."""
        if type(first) is Pending and not first.add:
            return Pending(first.bn, first.input, value_of(second), how)
        if type(second) is Pending and not second.add and how == "add":
            return Pending(second.bn, second.input, value_of(first), how, False)
        return getattr(operator, how)(value_of(first), value_of(second))

    def _pydl_end(
        self, call: Any, value: Any, act: str | None = None, param: float | None = None, /,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """An activation's call, `call(value, *args, **kwargs)`; of `act`, where that is known."""
        if type(value) is Pending:
            bn, x = value.bn, value.input
            if act is None:
                if type(call) is nn.Identity and plain(call):
                    return value
                act, param = activation(call, bn.backend, x)
            elif not isinstance(call, str) and not still(call, act):
                act = None
            if act is not None and value.fits():
                bn._check_input_dim(x)
                mean, var, training, momentum = bn._statistics()
                return functional.batch_norm_act(
                    x, mean, var, bn.weight, bn.bias, training, momentum, bn.eps, act=act,
                    residual=value.residual, act_param=param, backend=bn.backend,
                )  # fmt: skip
            value = value.value()
        elif type(value) is Layer:
            if act is None and type(call) is nn.Identity and plain(call):
                return value
            layer, backend = value.layer, self._pydl_backend
            if act is None:
                backend = getattr(call, "backend", None)
                act, param = activation(call, backend, value.input)
            elif not isinstance(call, str) and not still(call, act):
                act = None
            if act is not None and value.wins(backend):
                own = getattr(layer, "backend", backend)
                y = linear_layer(value.input, layer.weight, None, own)
                return functional.bias_act(y, layer.bias, act, act_param=param, backend=backend)
            value = value.value()
        if isinstance(call, str):
            return getattr(value, call)(*args, **kwargs)
        return call(value, *args, **kwargs)

    def _pydl_gate(
        self, call: Any, value: Any, producer: Any = None, act: str | None = None,
        param: float | None = None, /, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """An activation's call, of what goes into a product alone."""
        value, backend = value_of(value), self._pydl_backend
        if act is None:
            backend = getattr(call, "backend", None)
        free = isinstance(value, Tensor) and value.dtype in FLOATS and makes(producer)
        if free and not (backend is None and below("gated_act", value, value.numel())):
            if act is None:
                act, param = activation(call, backend, value)
            elif not still(call, act):
                act = None
            if act is not None and choose("gated_act", backend, value) != "torch":
                return Gate(call, value, args, kwargs, act, param, backend)
        return call(value, *args, **kwargs)

    def _pydl_times(self, first: Any, second: Any) -> Any:
        """`first * second`."""
        if type(first) is Gate:
            gate, up = first, value_of(second)
            if gate.fits(up):
                return gated(gate, up)
            return gate.value() * up
        first = value_of(first)
        if type(second) is Gate and second.fits(first):
            return gated(second, first)
        return first * value_of(second)

    def _pydl_sum(self, first: Any, second: Any, *norms: Any) -> tuple[Any, ...]:
        """`first + second`, and what one of `norms` makes of it where one pass computes both."""
        for i, norm in enumerate(norms):
            if norm is not None and adds(norm, first, second):
                y, total = added(norm, first, second)
                return (total, *(y if k == i else None for k in range(len(norms))))
        return (first + second, *([None] * len(norms)))

    def _pydl_taken(self, norm: Any, total: Any, kept: Tensor | None) -> Any:
        """`norm(total)` of a sum that has been computed."""
        return norm(total) if kept is None else kept

    def _pydl_normed(self, norm: Any, first: Any, second: Any) -> Any:
        """`norm(first + second)`."""
        return normed(norm, first, second)

    def _pydl_until(self, module: Any, last: Any, input: Any) -> Any:
        """What a Sequential gives to the last of its modules."""
        names = getattr(type(module), "_pydl_names", ())
        own = module if names else self
        *first, (_, end) = module._modules.items()
        for name, one in first:
            input = own._pydl_begin(one, input) if name in names else own._pydl_end(one, input)
        return value_of(input) if end is last else self._pydl_until(end, last, value_of(input))

    def _pydl_sequential(self, input: Any) -> Any:
        """`nn.Sequential.forward`."""
        names = type(self)._pydl_names  # type: ignore[attr-defined]
        for name, module in self._modules.items():  # type: ignore[attr-defined]
            if name in names:
                input = self._pydl_begin(module, input)
            else:
                input = self._pydl_end(module, input)
        return value_of(input)


Fused._pydl_sequential._pydl_runs = nn.Sequential.forward  # type: ignore[attr-defined]
