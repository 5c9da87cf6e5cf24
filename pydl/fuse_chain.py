"""Follows what a batch normalisation computes through a method, to the activation at the end.

A chain is one only where nothing else can see what flows along it: every value is used once, in
the same block of statements. What runs between must not be able to change what is normalised.
"""

from __future__ import annotations

import ast
from collections.abc import Callable

from pydl.fuse_run import FUNCTIONS, METHODS
from pydl.fuse_source import Chain, Method, expressions

_CONDITIONAL = (
    ast.BoolOp, ast.Compare, ast.DictComp, ast.GeneratorExp, ast.IfExp, ast.Lambda, ast.ListComp,
    ast.SetComp,
)  # fmt: skip
_EFFECTS = (ast.AugAssign, ast.Call, ast.NamedExpr)
_STATISTICS = {"_buffers", "num_batches_tracked", "running_mean", "running_var"}
NOTHING = "no activation follows it"
UNKNOWN = "follows it, which is no activation that batch_norm_act has"


class Refused(Exception):
    """Why a chain cannot be fused."""


Predicate = Callable[[str], bool]


def chains(method: Method, is_bn: Predicate, is_identity: Predicate) -> list[Chain]:
    """The chain of every call of a batch normalisation in a method, the last first."""
    found = []
    for block in method.blocks():
        for index, statement in enumerate(block):
            for node in expressions(statement):
                path = method.path(node.func) if isinstance(node, ast.Call) else None
                if isinstance(node, ast.Call) and path is not None and is_bn(path):
                    found.append(Chain(path, node))
                    try:
                        _Follower(method, found[-1], is_identity, block, index).follow()
                    except Refused as refusal:
                        found[-1].why = str(refusal)
    paths = [chain.bn for chain in found]
    for chain in found:
        if paths.count(chain.bn) > 1:
            chain.why = f"{method.node.name} calls it more than once"
    return found[::-1]


def _targets(statement: ast.stmt) -> list[ast.Name]:
    """The names that a statement does nothing to but bind them."""
    if isinstance(statement, ast.Assign):
        return [one for one in statement.targets if isinstance(one, ast.Name)]
    if isinstance(statement, ast.AnnAssign) and statement.value is not None:
        return [statement.target] if isinstance(statement.target, ast.Name) else []
    return []


def _uses(name: str, statement: ast.stmt) -> list[ast.Name]:
    """Where a statement mentions a name, but for binding it."""
    bound = _targets(statement)
    return [
        node
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and node.id == name and node not in bound
    ]


class _Follower:
    """Fills in one chain, whose call is in statement `first` of a block."""

    def __init__(
        self, method: Method, chain: Chain, is_identity: Predicate, block: list[ast.stmt],
        first: int,
    ) -> None:  # fmt: skip
        self.method, self.chain, self.is_identity = method, chain, is_identity
        self.block, self.first = block, first

    def follow(self) -> None:
        """Raises `Refused` where it is no chain."""
        call = self.chain.call
        if len(call.args) != 1 or call.keywords or isinstance(call.args[0], ast.Starred):
            raise Refused("it is called with more than its input")
        name, index, node = "", self.first, self._consume(call)
        while True:
            now = "" if self.chain.act is not None else self._stored(self.block[index], node)
            if name and now != name and not self._dead(name, index):
                raise Refused("its output is used more than once")
            if not now:
                break
            if self.method.captured(now):
                raise Refused("a nested function sees its output")
            name = now
            index, node = self._next(name, index)
            node = self._consume(node)
        self._vet(index)

    def _consume(self, node: ast.AST) -> ast.AST:
        """The expression that a value ends in: the activation, or the last that it passes
        through."""
        chain, method = self.chain, self.method
        while not isinstance(node, ast.stmt):
            parent = method.parents[node]
            if isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.Add) and not chain.add:
                chain.add = node = parent
            elif isinstance(parent, ast.Attribute) and parent.attr in METHODS:
                outer = method.parents[parent]
                if not isinstance(outer, ast.Call) or outer.func is not parent or outer.args:
                    break
                chain.act, chain.function = outer, (METHODS[parent.attr], None)
                return outer
            elif isinstance(parent, ast.Call) and node in parent.args:
                path = method.path(parent.func)
                if path is None or len(parent.args) > 1 or parent.keywords:
                    if parent.args[0] is node and self._function(parent):
                        return parent
                    raise Refused(f"{ast.unparse(parent.func)} {UNKNOWN}")
                if not self.is_identity(path):
                    chain.act, chain.module = parent, path
                    return parent
                chain.through.append((path, parent))
                node = parent
            else:
                break
        return node

    def _function(self, call: ast.Call) -> bool:
        """Whether a call is of a known activation; notes which."""
        meaning = self.method.meaning(call.func)
        if not callable(meaning) or meaning not in FUNCTIONS:
            return False
        act, names = FUNCTIONS[meaning]
        given = dict(zip(names, call.args[1:], strict=False))
        given |= {one.arg: one.value for one in call.keywords if one.arg}
        if len(given) != len(call.args) - 1 + len(call.keywords) or not given.keys() <= set(names):
            return False
        parameter: float | None = None
        for name, node in given.items():
            try:
                value = ast.literal_eval(node)
            except (ValueError, TypeError):
                return False
            if name == "approximate":
                if value not in ("none", "tanh"):
                    return False
                act = "gelu_tanh" if value == "tanh" else "gelu"
            elif name != "inplace":
                if type(value) not in (int, float):
                    return False
                parameter = float(value)
        self.chain.act, self.chain.function = call, (act, parameter)
        return True

    def _stored(self, statement: ast.stmt, node: ast.AST) -> str:
        """The name that a statement gives to a value."""
        if isinstance(statement, ast.AugAssign):
            if statement is node and isinstance(statement.target, ast.Name):
                return statement.target.id
            raise Refused("its output is added in place to something that others may see")
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is node:
            targets = getattr(statement, "targets", [None])
            if len(targets) == 1 and (names := _targets(statement)):
                return names[0].id
        raise Refused(NOTHING)

    def _next(self, name: str, index: int) -> tuple[int, ast.AST]:
        """The next statement that mentions a name, and where it does."""
        for i in range(index + 1, len(self.block)):
            statement = self.block[i]
            mentions = [n for n in ast.walk(statement) if isinstance(n, ast.Name) and n.id == name]
            if not mentions:
                continue
            if isinstance(statement, ast.AugAssign) and mentions == [statement.target]:
                if not isinstance(statement.op, ast.Add) or self.chain.add:
                    raise Refused(NOTHING)
                self.chain.add = statement
                return i, statement
            if not isinstance(statement, ast.Assign | ast.AnnAssign | ast.Expr | ast.Return):
                raise Refused("its output goes into a branch, a loop or a sum")
            if not (uses := _uses(name, statement)):
                raise Refused("its output is not used")
            if len(uses) > 1:
                raise Refused("its output is used more than once")
            if any(isinstance(one, _CONDITIONAL) for one in self._above(uses[0])):
                raise Refused("its output is not always used")
            return i, uses[0]
        raise Refused(NOTHING)

    def _above(self, node: ast.AST) -> list[ast.AST]:
        """A node's parents in its statement, the statement too."""
        above: list[ast.AST] = []
        while not isinstance(node, ast.stmt):
            node = self.method.parents[node]
            above.append(node)
        return above

    def _dead(self, name: str, index: int) -> bool:
        """Whether nothing reads a name any more after a statement."""
        if isinstance(self.block[index], ast.Return):
            return True
        for statement in self.block[index:]:
            if statement is not self.block[index] and _uses(name, statement):
                return False
            if any(one.id == name for one in _targets(statement)):
                return True
        return self.block is self.method.node.body

    def _vet(self, last: int) -> None:
        """What runs after the normalisation's place and before the activation's cannot matter."""
        chain, statements = self.chain, self.block[self.first : last + 1]
        assert chain.act is not None
        own = [chain.call, chain.add, chain.act, *(call for _, call in chain.through)]
        for statement in statements[1:-1]:
            if not any(node in own for node in ast.walk(statement)) and not _harmless(statement):
                raise Refused("statements stand before the activation that may skip it")
        outside = {*ast.walk(chain.call), *own, *self._above(chain.act)}
        nodes = [n for one in statements for n in ast.walk(one) if n not in outside]
        if any(isinstance(node, ast.Attribute) and node.attr in _STATISTICS for node in nodes):
            raise Refused("code reads running statistics before the activation")
        owns = [n for n in nodes if isinstance(n, ast.Name) and n.id == self.method.self]
        if not all(isinstance(self.method.parents[node], ast.Attribute) for node in owns):
            raise Refused("code before the activation is given the whole module")
        for node in nodes:
            if isinstance(node, _EFFECTS):
                path = self.method.path(node.func) if isinstance(node, ast.Call) else None
                if path is None:
                    raise Refused("code runs before the activation that is no module's call")
                chain.called.append(path)
        if chain.called:
            chain.producer = self._producer()
            if chain.producer is None:
                raise Refused("a module runs before the activation that may see what is normalised")

    def _producer(self) -> str | None:
        """The module whose output is normalised, if no name holds that any more."""
        value: ast.AST | None = self.chain.call.args[0]
        if isinstance(value, ast.Name) and self.first > 0:
            name, before = value.id, self.block[self.first - 1]
            uses, targets = _uses(name, self.block[self.first]), _targets(before)
            alone = isinstance(before, ast.Assign) and len(before.targets) == 1
            if len(uses) != 1 or not alone or [one.id for one in targets] != [name]:
                return None
            if self.method.captured(name) or not self._dead(name, self.first):
                return None
            value = getattr(before, "value", None)
        return self.method.path(value.func) if isinstance(value, ast.Call) else None


def _harmless(statement: ast.stmt) -> bool:
    """Whether a statement does no more than bind local names."""
    if isinstance(statement, ast.If):
        return all(_harmless(one) for one in (*statement.body, *statement.orelse))
    if isinstance(statement, ast.AugAssign | ast.AnnAssign):
        return isinstance(statement.target, ast.Name)
    if isinstance(statement, ast.Assign):
        return all(isinstance(one, ast.Name) for one in statement.targets)
    return isinstance(statement, ast.Pass)
