"""Runs a model on example inputs without leaving a trace: copies, the same random numbers, and what
of the result is comparable."""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_SEED = 7
_WHERE = "pydl: replace: example_inputs"


class Arguments(NamedTuple):
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def fresh(self, dtype: torch.dtype | None = None) -> Arguments:
        """Copies of all tensors, which a call may change; floating ones in `dtype`, if given."""

        def made(one: Any) -> Any:
            if isinstance(one, Tensor):
                moved = one.detach().clone()
                if dtype is not None and moved.is_floating_point():
                    moved = moved.to(dtype)
                return moved.requires_grad_(one.requires_grad)
            if isinstance(one, Mapping):
                return {key: made(value) for key, value in one.items()}
            if type(one) in (tuple, list):
                return type(one)(map(made, one))
            return one

        return Arguments(made(self.args), made(self.kwargs))

    def tensors(self) -> list[Tensor]:
        return floats([self.args, self.kwargs])


def arguments(example_inputs: Any) -> Arguments:
    """A tensor, a tuple of positional arguments or a dictionary of named ones.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(example_inputs, Tensor):
        return Arguments((example_inputs,), {})
    if isinstance(example_inputs, Mapping):
        return Arguments((), dict(example_inputs))
    if isinstance(example_inputs, tuple):
        return Arguments(tuple(example_inputs), {})
    raise TypeError(
        f"{_WHERE} is a {type(example_inputs).__name__}, wants a tensor, a tuple of positional "
        "arguments or a dictionary of named ones"
    )


def copied(model: nn.Module) -> nn.Module:
    """A copy to measure, without gradients.

    Raises:
        RuntimeError: the model cannot be copied.
    """
    try:
        made = copy.deepcopy(model)
    except Exception as error:
        raise RuntimeError(
            f"{_WHERE}: the model cannot be copied to be measured ({type(error).__name__}: "
            f"{error}); remedy: call replace without example_inputs"
        ) from error
    made.zero_grad(set_to_none=True)
    return made


@contextmanager
def generators_kept() -> Iterator[None]:
    """What is drawn inside does not show outside."""
    numpy = sys.modules.get("numpy")
    state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def seed() -> None:
    # Not by torch.manual_seed, which would seed a device that is not in use yet.
    torch.default_generator.manual_seed(_SEED)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(_SEED)
    random.seed(_SEED)


def floats(out: Any) -> list[Tensor]:
    """The floating tensors in what a model returns or takes."""
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    if dataclasses.is_dataclass(out) and not isinstance(out, Mapping | type):
        out = [getattr(out, field.name) for field in dataclasses.fields(out)]
    several = out.values() if isinstance(out, Mapping) else out
    if not isinstance(out, Mapping | list | tuple):
        return []
    return [tensor for one in several for tensor in floats(one)]


def call(model: nn.Module, given: Arguments, which: str) -> list[Tensor]:
    try:
        found = floats(model(*given.args, **given.kwargs))
    except Exception as error:
        raise RuntimeError(
            f"{_WHERE}: the model {which} fails on them: {type(error).__name__}: {error}"
        ) from error
    if not found:
        raise RuntimeError(f"{_WHERE}: the model {which} returns no floating tensor, wants one")
    return found


def kind_of(model: nn.Module, given: Arguments) -> str:
    """The type of the device in use."""
    return next((t.device.type for t in (*model.parameters(), *given.tensors())), "cpu")
