"""What torch.fx sees of a call: one node, of the function or of the module.

torch.fx runs a model on proxies, which have no values to choose a backend or a branch by. A
function of pydl hands itself over to them, as torch's do. A module of pydl is a node where its
forward does more than one thing or depends on the mode, as all of torch's are. Others that have a
`__torch_function__`, tensors of a subclass first of all, are not handed pydl's functions: they know
torch's, and get those from the automatic choice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules import module as _every
from torch.overrides import handle_torch_function


def proxied(*args: Any) -> bool:
    """Whether any argument, or part of a tuple or list, is a proxy."""
    for one in args:
        if type(one) is Tensor:
            continue
        if isinstance(one, Proxy) or (isinstance(one, (tuple, list)) and proxied(*one)):
            return True
    return False


def hand_over(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """The node of a call of `function`, whose arguments, some of them proxies, are in `given`."""
    args, kwargs = _bound(function, given)
    return handle_torch_function(function, _proxies((*args, *kwargs.values())), *args, **kwargs)


def as_node(module: nn.Module, given: dict[str, Any]) -> Any:
    """The node of a call of a module, by its `forward`'s arguments, some of them proxies.

    Raises:
        RuntimeError: it is the model that is traced itself, or no part of one; or it has hooks,
            which have run or will run on proxies, and would run again with the module.
    """
    args, kwargs = _bound(module.forward, given)
    tracer: Any = _proxies((*args, *kwargs.values()))[0].tracer
    try:
        path = tracer.path_of_module(module)
    except (AttributeError, NameError):
        path = ""
    why = None
    if not path:
        why = "is no part of the model that is traced, wants to be one"
    elif module._forward_hooks or module._forward_pre_hooks or _every._has_any_global_hook():
        why = "has hooks, wants none, or a tracer whose is_leaf_module says True of it"
    if why:
        raise RuntimeError(f"pydl: torch.fx: {type(module).__name__} {path!r} {why}")
    return tracer.create_proxy("call_module", path, args, kwargs)


def _proxies(args: Any) -> list[Proxy]:
    found: list[Proxy] = []
    for one in args:
        if isinstance(one, Proxy):
            found.append(one)
        elif isinstance(one, (tuple, list)):
            found += _proxies(one)
    return found


def _bound(function: Callable[..., Any], given: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments as a user would write them, without those that are as by default."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        value = given[name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            args += value
        elif parameter.kind is parameter.VAR_KEYWORD:
            kwargs |= value
        elif parameter.default is parameter.empty:
            args.append(value)
        elif value is not parameter.default:
            kwargs[name] = value
    return tuple(args), kwargs
