"""Follows what a module computes through a method, to where one pass with it may end.

A batch normalisation or a linear layer up to an activation, or an activation up to a product, is a
chain only where nothing else can see what flows along it: every value is used once, in the same
block of statements. What runs between must not be able to change what the first call is given.
"""

from __future__ import annotations

import ast
from collections.abc import Callable

from pydl.fuse_source import Method, expressions, places, targets, uses_of
from pydl.fuse_step import FUNCTIONS, METHODS
from pydl.fuse_write import Chain

CONDITIONAL = (
    ast.BoolOp, ast.Compare, ast.DictComp, ast.GeneratorExp, ast.IfExp, ast.Lambda, ast.ListComp,
    ast.SetComp,
)  # fmt: skip
EFFECTS = (ast.AugAssign, ast.Call, ast.NamedExpr)
KINDS = ("norm", "tail", "linear", "gate")
NORMS = ("norm", "tail")
_STATISTICS = {"_buffers", "num_batches_tracked", "running_mean", "running_var"}
NOTHING = "no activation follows it"
UNKNOWN = "follows it, which is no activation that the pass has"


class Refused(Exception):
    """Why a chain cannot be fused."""


Predicate = Callable[[str], bool]
Starts = Callable[[str, str], bool]
"""Whether a chain of a kind may start with the call of a key (see `Chain`)."""


def chains(method: Method, starts: Starts, is_identity: Predicate) -> list[Chain]:
    """The chain of every call that may start one, the last first."""
    found = []
    for block in method.blocks():
        for index, statement in enumerate(block):
            for node in expressions(statement):
                if isinstance(node, ast.Call) and (chain := _start(method, node, starts)):
                    found.append(chain)
                    try:
                        _Follower(method, chain, is_identity, block, index).follow()
                    except Refused as refusal:
                        chain.why = str(refusal)
    keys = [chain.key for chain in found]
    for chain in found:
        if chain.kind in NORMS and keys.count(chain.key) > 1:
            more = f"{method.node.name} calls it more than once"
            chain.why = chain.why or more if chain.kind == "tail" else more
    return found[::-1]


def _start(method: Method, call: ast.Call, starts: Starts) -> Chain | None:
    """The chain that a call starts, if any."""
    path = method.path(call.func)
    if path is not None:
        kind = next((kind for kind in KINDS if starts(kind, path)), None)
        return Chain(kind, path, call) if kind else None
    if not call.args or isinstance(call.args[0], ast.Starred):
        return None
    known = known_function(method, call)
    if known is None or not starts("gate", key := ast.unparse(call)):
        return None
    return Chain("gate", key, call, function=known)


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
        of_module = self.chain.kind != "gate" or self.chain.function is None
        if of_module and (len(call.args) != 1 or call.keywords or _starred(call)):
            raise Refused("it is called with more than its input")
        name, index, node = "", self.first, self._consume(call)
        while True:
            now = "" if self.chain.end is not None else self._stored(self.block[index], node)
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
        """The expression that a value ends in: the end, or the last that it passes through."""
        chain, method = self.chain, self.method
        if chain.kind == "gate":
            parent = None if isinstance(node, ast.stmt) else method.parents[node]
            if isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.Mult):
                chain.times = node = parent
            return node
        while not isinstance(node, ast.stmt):
            parent = method.parents[node]
            if self._is_residual(parent):
                assert isinstance(parent, ast.BinOp)
                chain.residual = parent.right if parent.left is node else parent.left
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
                    known = known_function(method, parent) if parent.args[0] is node else None
                    if known is not None:
                        chain.act, chain.function = parent, known
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

    def _is_residual(self, node: ast.AST) -> bool:
        """Whether what is normalised is added to something here, for the first time."""
        free = self.chain.kind in NORMS and self.chain.add is None
        return free and isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)

    def _stored(self, statement: ast.stmt, node: ast.AST) -> str:
        """The name that a statement gives to a value."""
        if isinstance(statement, ast.AugAssign):
            if statement is node and isinstance(statement.target, ast.Name):
                return statement.target.id
            raise Refused("its output is added in place to something that others may see")
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is node:
            given = getattr(statement, "targets", [None])
            if len(given) == 1 and (names := targets(statement)):
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
                free = self.chain.kind in NORMS and self.chain.add is None
                if not isinstance(statement.op, ast.Add) or not free:
                    raise Refused(NOTHING)
                self.chain.add, self.chain.residual = statement, statement.value
                return i, statement
            if not isinstance(statement, ast.Assign | ast.AnnAssign | ast.Expr | ast.Return):
                raise Refused("its output goes into a branch, a loop or a sum")
            if not (uses := uses_of(name, statement)):
                raise Refused("its output is not used")
            if len(uses) > 1:
                raise Refused("its output is used more than once")
            if any(isinstance(one, CONDITIONAL) for one in self._above(uses[0])):
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
            if statement is not self.block[index] and uses_of(name, statement):
                return False
            if any(one.id == name for one in targets(statement)):
                return True
        return self.block is self.method.node.body

    def _vet(self, last: int) -> None:
        """What runs after the first call's place and before the end's cannot matter."""
        chain, statements = self.chain, self.block[self.first : last + 1]
        assert chain.end is not None
        own = [chain.call, chain.add, chain.end, *(call for _, call in chain.through)]
        for statement in statements[1:-1]:
            if not any(node in own for node in ast.walk(statement)) and not _harmless(statement):
                raise Refused("statements stand in between that may skip it")
        outside = {*ast.walk(chain.call), *own, *self._above(chain.end)}
        begin, end = places(chain.call)[0], places(chain.end)[1]
        nodes = [
            n for one in statements for n in ast.walk(one)
            if n not in outside and isinstance(n, ast.expr | ast.stmt)
            and not (one is statements[0] and places(n)[0] < begin)
            and not (one is statements[-1] and places(n)[0] >= end)
        ]  # fmt: skip
        if chain.kind in NORMS and any(
            isinstance(node, ast.Attribute) and node.attr in _STATISTICS for node in nodes
        ):
            raise Refused("code reads running statistics before the pass ends")
        owns = [n for n in nodes if isinstance(n, ast.Name) and n.id == self.method.self]
        if not all(isinstance(self.method.parents[node], ast.Attribute) for node in owns):
            raise Refused("code before the pass ends is given the whole module")
        for node in nodes:
            if isinstance(node, EFFECTS) and not self._is_pure(node):
                path = self.method.path(node.func) if isinstance(node, ast.Call) else None
                if path is None:
                    raise Refused("code runs before the pass ends that is no module's call")
                chain.called.append(path)
        if chain.called and chain.kind != "tail":  # which knows what makes its input when it runs
            chain.producer = self._producer()
            if chain.producer is None:
                raise Refused("a module runs before the pass ends that may see what it is given")

    def _is_pure(self, node: ast.AST) -> bool:
        """Whether it calls a known function that changes nothing."""
        if not isinstance(node, ast.Call) or not known_function(self.method, node):
            return False
        names = FUNCTIONS[self.method.meaning(node.func)][1]
        given = {*names[: len(node.args) - 1], *(one.arg for one in node.keywords)}
        return "inplace" not in given and not ast.unparse(node.func).endswith("_")

    def _producer(self) -> str | None:
        """The module whose output the first call is given, if no name holds that any more."""
        value: ast.AST | None = self.chain.call.args[0]
        if isinstance(value, ast.Name) and self.first > 0:
            name, before = value.id, self.block[self.first - 1]
            uses, bound = uses_of(name, self.block[self.first]), targets(before)
            alone = isinstance(before, ast.Assign) and len(before.targets) == 1
            if len(uses) != 1 or not alone or [one.id for one in bound] != [name]:
                return None
            if self.method.captured(name) or not self._dead(name, self.first):
                return None
            value = getattr(before, "value", None)
        return self.method.path(value.func) if isinstance(value, ast.Call) else None


def _starred(call: ast.Call) -> bool:
    return isinstance(call.args[0], ast.Starred)


def _harmless(statement: ast.stmt) -> bool:
    """Whether a statement does no more than bind local names."""
    if isinstance(statement, ast.If):
        return all(_harmless(one) for one in (*statement.body, *statement.orelse))
    if isinstance(statement, ast.AugAssign | ast.AnnAssign):
        return isinstance(statement.target, ast.Name)
    if isinstance(statement, ast.Assign):
        return all(isinstance(one, ast.Name) for one in statement.targets)
    return isinstance(statement, ast.Pass)
