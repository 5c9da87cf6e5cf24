"""Finds the sums of a method that go into a layer normalisation.

`norm(a + b)` is one as it stands. `h = a + b`, with `norm(h)` in a later statement of the same
block, is one where nothing runs in between: h may have other uses before and after. A branch in
between may do what it likes if what decides it is known when the sum is computed.
"""

from __future__ import annotations

import ast

from pydl.fuse_chain import CONDITIONAL, EFFECTS, Refused, Starts
from pydl.fuse_nodes import expressions, places, targets
from pydl.fuse_source import Method
from pydl.fuse_write import Chain

NO_SUM = "it normalises no sum that is computed in the same place"
_ONCE = (ast.AnnAssign, ast.Assign, ast.AugAssign, ast.Expr, ast.Return)
_PURE = (
    ast.And, ast.BoolOp, ast.Compare, ast.Constant, ast.Is, ast.IsNot, ast.Load, ast.Name, ast.Not,
    ast.Or, ast.UnaryOp,
)  # fmt: skip


def sums(method: Method, starts: Starts) -> list[Chain]:
    """The chain of every call of a normalisation in a method."""
    found: list[Chain] = []
    for block in method.blocks():
        for index, statement in enumerate(block):
            for node in expressions(statement):
                path = method.path(node.func) if isinstance(node, ast.Call) else None
                if isinstance(node, ast.Call) and path is not None and starts("sum", path):
                    chain = Chain("sum", path, node)
                    try:
                        _trace(method, chain, block, index)
                    except Refused as refusal:
                        chain.why = str(refusal)
                    found.append(chain)
    return found


def _trace(method: Method, chain: Chain, block: list[ast.stmt], last: int) -> None:
    """Finds the sum of a chain whose call is in a statement of a block."""
    call = chain.call
    if len(call.args) != 1 or call.keywords or not isinstance(call.args[0], ast.BinOp | ast.Name):
        raise Refused(NO_SUM)
    value = call.args[0]
    if isinstance(value, ast.BinOp):
        if not isinstance(value.op, ast.Add):
            raise Refused(NO_SUM)
        chain.add = value
        return
    between: list[ast.stmt] = []
    for statement in reversed(block[:last]):
        if not isinstance(statement, ast.If) and _binds(statement, value.id):
            chain.stored, chain.add = _sum(statement)
            break
        between.append(statement)
    if chain.stored is None:
        raise Refused(NO_SUM)
    names = {name.id for one in between for name in targets(one)}
    branches = [one for one in between if isinstance(one, ast.If)]
    chain.guards = [_test(method, one, names) for one in branches]
    if not all(_pure(one) for one in between if not isinstance(one, ast.If)):
        raise Refused("code runs between the sum and its normalisation")
    _vet(method, call, block[last])


def _binds(statement: ast.stmt, name: str) -> bool:
    nodes = (n for n in ast.walk(statement) if isinstance(n, ast.Name) and n.id == name)
    return any(not isinstance(node.ctx, ast.Load) for node in nodes)


def _sum(statement: ast.stmt) -> tuple[ast.Assign, ast.BinOp]:
    """A statement that does nothing but give a sum its name, and that sum."""
    if isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add):
        raise Refused("its sum is added in place to something that others may see")
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 == len(targets(statement)):
        value = statement.value
        if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
            return statement, value
    raise Refused(NO_SUM)


def _pure(statement: ast.stmt) -> bool:
    """Whether a statement changes nothing but local names."""
    if isinstance(statement, ast.Assign):
        if not all(isinstance(one, ast.Name) for one in statement.targets):
            return False
    elif not isinstance(statement, ast.Pass | ast.Expr):
        return False
    return not any(isinstance(node, (*EFFECTS, ast.Await)) for node in ast.walk(statement))


def _test(method: Method, branch: ast.If, rebound: set[str]) -> ast.expr:
    """The condition of a branch, where it is the same before as it will be."""
    nodes = list(ast.walk(branch.test))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    # The truth of a name itself may be that of a tensor.
    known = all(isinstance(method.parents[name], ast.Compare) for name in names)
    if branch.orelse or not known or not all(isinstance(node, _PURE) for node in nodes):
        raise Refused("a branch stands between the sum and its normalisation")
    if rebound & {name.id for name in names}:
        raise Refused("a branch stands between the sum and its normalisation")
    return branch.test


def _vet(method: Method, call: ast.Call, statement: ast.stmt) -> None:
    """The normalisation is always called, once, and nothing of its statement runs before it."""
    above: list[ast.AST] = []
    node: ast.AST = call
    while node is not statement:
        node = method.parents[node]
        above.append(node)
    if not isinstance(statement, _ONCE) or any(isinstance(one, CONDITIONAL) for one in above):
        raise Refused("its sum is not always normalised")
    inside = set(ast.walk(call))
    for other in ast.walk(statement):
        if isinstance(other, EFFECTS) and not (other in above or other in inside):
            before = other is not statement and places(other)[0] < places(call)[0]
            if before:
                raise Refused("code runs between the sum and its normalisation")
