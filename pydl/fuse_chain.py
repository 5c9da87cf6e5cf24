"""Follows what a module computes through a method, to where one pass with it may end.

A batch normalisation or a linear layer up to an activation, or an activation up to a product, is a
chain only where nothing else can see what flows along it: every value is used once. Where a chain
meets a branch it ends in it, goes through it, or waits: a branch that may be taken and has another
use for the value computes it first. What runs between must not be able to change what the first
call is given.
"""

from __future__ import annotations

import ast
from collections.abc import Callable

from pydl.fuse_nodes import expressions, harmless, outside, targets, uses_of
from pydl.fuse_source import Method
from pydl.fuse_step import METHODS
from pydl.fuse_vet import EFFECTS, NORMS, Refused, dead, known_function, producer, vet
from pydl.fuse_write import Chain

__all__ = ["CONDITIONAL", "EFFECTS", "NORMS", "NOTHING", "UNKNOWN", "Refused", "chains"]

CONDITIONAL = (
    ast.BoolOp, ast.Compare, ast.DictComp, ast.GeneratorExp, ast.IfExp, ast.Lambda, ast.ListComp,
    ast.SetComp,
)  # fmt: skip
KINDS = ("norm", "tail", "linear", "gate")
NOTHING = "no activation follows it"
UNKNOWN = "follows it, which is no activation that the pass has"

Predicate = Callable[[str], bool]
Starts = Callable[[str, str], bool]
"""Whether a chain of a kind may start with the call of a key (see `Chain`)."""


def chains(
    method: Method, starts: Starts, is_identity: Predicate, is_act: Predicate
) -> list[Chain]:
    """The chain of every call that may start one, the last first."""
    found = []
    for block in method.blocks():
        for index, statement in enumerate(block):
            for node in expressions(statement):
                if isinstance(node, ast.Call) and (chain := _start(method, node, starts)):
                    found.append(chain)
                    try:
                        _Follower(method, chain, is_identity, is_act, block, index).follow()
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


class _Follower:
    """Fills in one chain, whose call is in statement `first` of a block."""

    def __init__(
        self, method: Method, chain: Chain, is_identity: Predicate, is_act: Predicate,
        block: list[ast.stmt], first: int,
    ) -> None:  # fmt: skip
        self.method, self.chain = method, chain
        self.is_identity, self.is_act = is_identity, is_act
        self.block, self.first = block, first
        self.region: list[ast.AST] = [block[first]]
        self.inside: list[tuple[ast.If, str]] = []
        """The branches that a value came into, and its name there."""
        self.why: str | None = None

    def follow(self) -> None:
        """Raises `Refused` where it is no chain."""
        chain, block = self.chain, self.block
        call = chain.call
        of_module = chain.kind != "gate" or chain.function is None
        if of_module and (len(call.args) != 1 or call.keywords or _starred(call)):
            raise Refused("it is called with more than its input")
        self._go("", self.first, self._consume(call))
        vet(self.method, chain, self.region)
        if chain.called and chain.kind != "tail":  # which knows what makes its input when it runs
            chain.producer = producer(self.method, chain, block, self.first)
            if chain.producer is None:
                raise Refused("a module runs before the pass ends that may see what it is given")

    def _go(self, name: str, index: int, node: ast.AST) -> None:
        """From a value's node in a statement to the chain's end."""
        while True:
            now = "" if self.chain.end is not None else self._stored(self.block[index], node)
            if name and now != name and not dead(self.method, name, self.block, index):
                raise Refused("its output is used more than once")
            if not now:
                return
            if self.method.captured(now):
                raise Refused("a nested function sees its output")
            name = now
            found = self._next(name, index)
            if found is None:
                return
            index, node = found
            node = self._consume(node)

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
                    if self.inside and not self.is_act(path):
                        raise Refused(f"{path} {UNKNOWN}")
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

    def _next(self, name: str, index: int) -> tuple[int, ast.AST] | None:
        """The next statement that mentions a name, and where it does; None where the chain has come
        to its end in a branch."""
        while True:
            for i in range(index + 1, len(self.block)):
                statement = self.block[i]
                if isinstance(statement, ast.If):
                    if self._branch(name, statement):
                        return None
                    continue
                self.region.append(statement)
                if (node := self._mention(name, statement)) is not None:
                    return i, node
            index = self._leave(name)

    def _mention(self, name: str, statement: ast.stmt) -> ast.AST | None:
        """Where a statement that is no branch takes the value of a name."""
        mentions = _mentions(name, statement)
        if not mentions:
            if not harmless(statement):
                raise Refused("statements stand in between that may skip it")
            return None
        if isinstance(statement, ast.AugAssign) and mentions == [statement.target]:
            free = self.chain.kind in NORMS and self.chain.add is None
            if not isinstance(statement.op, ast.Add) or not free:
                raise Refused(NOTHING)
            self.chain.add, self.chain.residual = statement, statement.value
            return statement
        if not isinstance(statement, ast.Assign | ast.AnnAssign | ast.Expr | ast.Return):
            raise Refused("its output goes into a branch, a loop or a sum")
        if not (uses := uses_of(name, statement)):
            raise Refused("its output is not used")
        if len(uses) > 1:
            raise Refused("its output is used more than once")
        if any(isinstance(one, CONDITIONAL) for one in self._above(uses[0])):
            raise Refused("its output is not always used")
        return uses[0]

    def _branch(self, name: str, branch: ast.If) -> bool:
        """Whether the chain ends in a branch or after it; if not, the value has been led past."""
        if not _mentions(name, branch) and harmless(branch):
            self.region.append(branch)
            return False
        if _mentions(name, branch.test):
            raise Refused("its output goes into a branch, a loop or a sum")
        self.region.append(branch.test)
        bodies = {"body": branch.body, "orelse": branch.orelse}
        before, block, region, inside = vars(self.chain), self.block, self.region, self.inside
        for field, body in bodies.items():
            if not any(_mentions(name, one) for one in body):
                continue
            self.chain.__dict__ = {k: [*v] if type(v) is list else v for k, v in before.items()}
            self.block, self.region = body, [*region]
            self.inside = [*inside, (branch, name)]
            try:
                found = self._next(name, -1)
                if found is not None:
                    index, node = found
                    self._go(name, index, self._consume(node))
                end = self.chain.end
                ends = end is not None and any(end in ast.walk(one) for one in body)
                self._wait(name, branch, {k: v for k, v in bodies.items() if k != field}, ends)
                return True
            except Refused as refusal:
                self.why = self.why or str(refusal)
            self.chain.__dict__ = before
            self.block, self.region, self.inside = block, region, inside
        self._wait(name, branch, bodies, False)
        return False

    def _wait(
        self, name: str, branch: ast.If, bodies: dict[str, list[ast.stmt]], always: bool
    ) -> None:
        """Bodies of a branch in which the chain does not go on: the value is computed before those
        that take it, leave the method or change anything."""
        for field, body in bodies.items():
            if always or any(_mentions(name, one) or not harmless(one) for one in body):
                self.chain.forced.append((branch, field, name))
            else:
                self.region += body

    def _leave(self, name: str) -> int:
        """Goes on after the branch whose body ends here; its place."""
        found = outside(self.method.parents, self.block)
        if found is None:
            raise Refused(self.why or NOTHING)
        branch, block, index = found
        if self.inside:
            _, before = self.inside.pop()
            if before != name:
                raise Refused("its output has another name in a branch")
        elif not self._is_bound(name, branch, block[:index]):
            raise Refused("its output is computed in a branch alone")
        self.block = block
        return index

    def _is_bound(self, name: str, branch: ast.If, before: list[ast.stmt]) -> bool:
        """Whether a name has a value whether or not a branch is taken."""
        nodes = ast.walk(self.method.node)
        if any(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Del)
               for n in nodes):  # fmt: skip
            return False
        code = self.method.function.__code__
        if name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
            return True
        other = branch.orelse if self.block is branch.body else branch.body
        return any(one.id == name for s in (*before, *other) for one in targets(s))

    def _above(self, node: ast.AST) -> list[ast.AST]:
        """A node's parents in its statement, the statement too."""
        above: list[ast.AST] = []
        while not isinstance(node, ast.stmt):
            node = self.method.parents[node]
            above.append(node)
        return above


def _mentions(name: str, node: ast.AST) -> list[ast.Name]:
    return [one for one in ast.walk(node) if isinstance(one, ast.Name) and one.id == name]


def _starred(call: ast.Call) -> bool:
    return isinstance(call.args[0], ast.Starred)
