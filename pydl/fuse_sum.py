"""Finds the sums of a method that go into a layer normalisation.

`norm(a + b)` is one as it stands. `h = a + b`, with `norm(h)` in a later statement of the same
block, or in a branch there, is one where nothing runs in between: h may have other uses before and
after. A branch in between may do what it likes if what decides it is known when the sum is
computed; where it ends with a sum of its own, that may be what is normalised.
"""

from __future__ import annotations

import ast

from pydl.fuse_chain import CONDITIONAL, EFFECTS, Refused, Starts
from pydl.fuse_nodes import expressions, outside, places, targets
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
    """Finds the sums of a chain whose call is in a statement of a block."""
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
    tests: list[ast.expr] = []
    body, index, known = block, last, True
    while chain.add is None:
        for one in reversed(body[:index]):
            if isinstance(one, ast.If):
                known = known and not one.orelse
                if (within := _last_sum(one.body, value.id)) is not None:
                    chain.sums.append((within[0], [*tests]))
                tests.insert(0, _not(one.test))
            elif _binds(one, value.id):
                stored, chain.add = _sum(one)
                chain.sums.append((stored, [*tests]))
                break
            between.append(one)
        else:
            if (around := outside(method.parents, body)) is None:
                raise Refused(NO_SUM)
            branch, outer, index = around
            tests.insert(0, branch.test if body is branch.body else _not(branch.test))
            body = outer
    rebound = {name.id for one in between for name in targets(one)}
    if not known or not all(_known(method, test, rebound) for test in tests):
        raise Refused("a branch stands between the sum and its normalisation")
    if not all(_pure(one) for one in between if not isinstance(one, ast.If)):
        raise Refused("code runs between the sum and its normalisation")
    _vet(method, call, block[last])


def _not(test: ast.expr) -> ast.expr:
    return ast.copy_location(ast.UnaryOp(ast.Not(), test), test)


def _last_sum(body: list[ast.stmt], name: str) -> tuple[ast.Assign, ast.BinOp] | None:
    """The sum that a branch leaves in a name."""
    for statement in reversed(body):
        if _binds(statement, name):
            try:
                return None if isinstance(statement, ast.If) else _sum(statement)
            except Refused:
                return None
        if not _pure(statement):
            return None
    return None


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


def _known(method: Method, test: ast.expr, rebound: set[str]) -> bool:
    """Whether a condition is the same before as it will be."""
    for node in ast.walk(test):
        if isinstance(node, ast.Name):
            # The truth of a name itself may be that of a tensor.
            compared = isinstance(method.parents[node], ast.Compare)
            if node.id in rebound or not (compared or node.id == method.self):
                return False
        elif isinstance(node, ast.Attribute):
            if method.path(node) is None:
                return False
        elif not isinstance(node, _PURE):
            return False
    return True


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
