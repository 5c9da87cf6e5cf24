"""Whether what runs between the first call of a chain and its end can matter to it."""

from __future__ import annotations

import ast

from pydl.fuse_nodes import places, targets, uses_of
from pydl.fuse_source import Method
from pydl.fuse_step import FUNCTIONS
from pydl.fuse_write import Chain

EFFECTS = (ast.AugAssign, ast.Call, ast.NamedExpr)
NORMS = ("norm", "tail")
_STATISTICS = {"_buffers", "num_batches_tracked", "running_mean", "running_var"}


class Refused(Exception):
    """Why a chain cannot be fused."""


def known_function(method: Method, call: ast.Call) -> tuple[str, float | None] | None:
    """The activation and parameter of a call of a known function."""
    meaning = method.meaning(call.func)
    try:
        if meaning is None or meaning not in FUNCTIONS:
            return None
    except TypeError:  # not hashable
        return None
    act, names = FUNCTIONS[meaning]
    given = dict(zip(names, call.args[1:], strict=False))
    given |= {one.arg: one.value for one in call.keywords if one.arg}
    if len(given) != len(call.args) - 1 + len(call.keywords) or not given.keys() <= set(names):
        return None
    parameter: float | None = None
    for name, node in given.items():
        try:
            value = ast.literal_eval(node)
        except (ValueError, TypeError):
            return None
        if name == "approximate":
            if value not in ("none", "tanh"):
                return None
            act = "gelu_tanh" if value == "tanh" else "gelu"
        elif name != "inplace":
            if type(value) not in (int, float):
                return None
            parameter = float(value)
    return act, parameter


def vet(method: Method, chain: Chain, region: list[ast.AST]) -> None:
    """Raises where code of a region, the statements and tests on a chain's way, can matter; notes
    the modules that it calls."""
    assert chain.end is not None
    above: list[ast.AST] = [chain.end]
    while not isinstance(above[-1], ast.stmt):
        above.append(method.parents[above[-1]])
    own = [chain.call, chain.add, *above, *(call for _, call in chain.through)]
    outside = {*ast.walk(chain.call), *own}
    first, last = region[0], above[-1]
    begin, end = places(chain.call)[0], places(chain.end)[1]
    nodes = [
        n for one in region for n in ast.walk(one)
        if n not in outside and isinstance(n, ast.expr | ast.stmt)
        and not (one is first and places(n)[0] < begin)
        and not (one is last and places(n)[0] >= end)
    ]  # fmt: skip
    if chain.kind in NORMS and any(
        isinstance(node, ast.Attribute) and node.attr in _STATISTICS for node in nodes
    ):
        raise Refused("code reads running statistics before the pass ends")
    owns = [n for n in nodes if isinstance(n, ast.Name) and n.id == method.self]
    if not all(isinstance(method.parents[node], ast.Attribute) for node in owns):
        raise Refused("code before the pass ends is given the whole module")
    added = places(chain.add)[1] if isinstance(chain.add, ast.expr | ast.stmt) else end
    for node in nodes:
        if isinstance(node, EFFECTS) and not _is_pure(method, node):
            path = method.path(node.func) if isinstance(node, ast.Call) else None
            if path is None:
                raise Refused("code runs before the pass ends that is no module's call")
            if places(node)[0] >= added:
                raise Refused("a module runs before the pass ends that may change what is added")
            chain.called.append(path)


def _is_pure(method: Method, node: ast.AST) -> bool:
    """Whether it calls a known function that changes nothing."""
    if not isinstance(node, ast.Call) or not known_function(method, node):
        return False
    names = FUNCTIONS[method.meaning(node.func)][1]
    given = {*names[: len(node.args) - 1], *(one.arg for one in node.keywords)}
    return "inplace" not in given and not ast.unparse(node.func).endswith("_")


def producer(method: Method, chain: Chain, block: list[ast.stmt], first: int) -> str | None:
    """The module whose output a chain's first call, in a statement of a block, is given, if no name
    holds that any more."""
    value: ast.AST | None = chain.call.args[0]
    if isinstance(value, ast.Name) and first > 0:
        name, before = value.id, block[first - 1]
        uses, bound = uses_of(name, block[first]), targets(before)
        alone = isinstance(before, ast.Assign) and len(before.targets) == 1
        if len(uses) != 1 or not alone or [one.id for one in bound] != [name]:
            return None
        if method.captured(name) or not dead(method, name, block, first):
            return None
        value = getattr(before, "value", None)
    return method.path(value.func) if isinstance(value, ast.Call) else None


def dead(method: Method, name: str, block: list[ast.stmt], index: int) -> bool:
    """Whether nothing reads a name any more after a statement of a block."""
    if isinstance(block[index], ast.Return):
        return True
    for statement in block[index:]:
        if statement is not block[index] and uses_of(name, statement):
            return False
        if any(one.id == name for one in targets(statement)):
            return True
    return block is method.node.body
