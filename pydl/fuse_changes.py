"""Whether a method changes a tensor in place after a pass that keeps it for backward.

The steps of a container keep the output of an addition's activation; one pass keeps the residual
itself, and an activation's input where it goes into a product. A method that changes that later
would have autograd raise where the steps did not. Names are followed through the method in the
order in which its statements run, through views and through names for the same thing.
"""

from __future__ import annotations

import ast
from collections.abc import Callable

from torch import nn

from pydl.fuse_nodes import places
from pydl.fuse_source import Method
from pydl.fuse_step import FUNCTIONS
from pydl.fuse_write import Chain

Things = frozenset[object]
"""What a value may be, or be a view of: parameters, paths of the module, places where made."""
_NOTHING: Things = frozenset()
_NO_CHANGE = {"requires_grad_", "share_memory_"}
_MADE_ELSEWHERE = (
    ast.AsyncFunctionDef, ast.ClassDef, ast.DictComp, ast.FunctionDef, ast.GeneratorExp, ast.Lambda,
    ast.ListComp, ast.SetComp,
)  # fmt: skip


PassesOn = Callable[[str], bool | None]
"""Of a module's path: True where it changes its input in place and returns it, False where it
returns it as it is, None where it returns something else."""


def passes_on(module: nn.Module | None) -> bool | None:
    """The same of a module."""
    todo = [module]
    for one in todo:
        if getattr(one, "inplace", False) is True:
            return True
        if type(one) is nn.Sequential:
            todo += one
        elif type(one) is not nn.Identity:
            return None
    return False


def refuse_changed(
    method: Method, chains: list[Chain], passes_on: PassesOn = lambda path: None
) -> None:
    """Says why of a method's chains whose pass would keep what is changed in place after it."""
    for chain in chains:
        gate = chain.kind == "gate"
        kept = chain.call.args[0] if gate else chain.residual
        if chain.why is None and kept is not None:
            walk = _Walk(method, chain, kept, passes_on)
            walk.block(method.node.body)
            if walk.changed:
                what = "its input" if gate else "what is added to it"
                chain.why = f"{what} is changed in place afterwards, and the pass would keep it"


class _Walk:
    """Goes through statements as they run; `names` is what each name may be by now."""

    def __init__(self, method: Method, chain: Chain, kept: ast.expr, passes_on: PassesOn) -> None:
        assert chain.end is not None
        self.method, self.chain, self.kept, self.passes_on = method, chain, kept, passes_on
        self.names: dict[str, Things] = {}
        self.wanted: Things = _NOTHING
        self.end = places(chain.end)[1]
        self.ended = self.changed = False
        self.rounds = 0

    def block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if isinstance(statement, ast.If):
                self._own([statement.test])
                self._either(statement.body, statement.orelse)
            elif isinstance(statement, ast.For | ast.While):
                header = statement.iter if isinstance(statement, ast.For) else statement.test
                self._own([header])
                # A second round meets what the first has left.
                for _ in range(2):
                    self.rounds += 1
                    if isinstance(statement, ast.For):
                        self._bind(statement.target, self.things(header))
                    self._either(statement.body, [])
                self.block(statement.orelse)
            elif isinstance(statement, ast.With | ast.Try):
                self._own([one.context_expr for one in getattr(statement, "items", [])])
                self.block(statement.body)
                for one in getattr(statement, "handlers", []):
                    self._either(one.body, [])
                self.block(
                    [*getattr(statement, "orelse", []), *getattr(statement, "finalbody", [])]
                )
            elif not isinstance(statement, _MADE_ELSEWHERE):
                self._own([statement])
                self._assign(statement)

    def _either(self, first: list[ast.stmt], second: list[ast.stmt]) -> None:
        before = dict(self.names)
        self.block(first)
        after, self.names = self.names, before
        self.block(second)
        for name in {*after, *self.names}:
            self.names[name] = self._named(name, after) | self._named(name, self.names)

    def _own(self, nodes: list[ast.expr] | list[ast.stmt]) -> None:
        """What a statement, or the head of one, evaluates itself."""
        todo: list[ast.AST] = [*nodes]
        for node in todo:
            if not isinstance(node, _MADE_ELSEWHERE):
                todo += ast.iter_child_nodes(node)
        if self.kept in todo:
            self.wanted |= self.things(self.kept)
        for node in todo:
            if isinstance(node, ast.expr | ast.stmt) and node not in (
                self.chain.add,
                self.chain.end,
            ):
                later = self.ended or (self.chain.end in todo and places(node)[1] > self.end)
                if later and any(self.things(one) & self.wanted for one in self._written(node)):
                    self.changed = True
        self.ended = self.ended or self.chain.end in todo

    def _written(self, node: ast.AST) -> list[ast.expr]:
        """What a node changes in place."""
        if isinstance(node, ast.AugAssign):
            return [node.target]
        if isinstance(node, ast.Assign):
            return [one for one in node.targets if isinstance(one, ast.Attribute | ast.Subscript)]
        if not isinstance(node, ast.Call):
            return []
        given = {one.arg: one.value for one in node.keywords}
        found = [given["out"]] if "out" in given else []
        path = self.method.path(node.func)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        names = self._function(node)
        flag = given.get("inplace")
        if flag is None and names is not None and "inplace" in names[: len(node.args) - 1]:
            flag = node.args[1 + names.index("inplace")]
        asked = flag is not None and not (isinstance(flag, ast.Constant) and not flag.value)
        ends = name.endswith("_") and not name.endswith("__") and name not in _NO_CHANGE
        if path is not None and node.args and self.passes_on(path):
            found.append(node.args[0])
        elif ends and isinstance(node.func, ast.Attribute) and self._is_value(node.func.value):
            found.append(node.func.value)
        elif node.args and (asked or ends):
            found.append(node.args[0])
        return found

    def _function(self, call: ast.Call) -> tuple[str, ...] | None:
        """The names of a known function's arguments after the first."""
        meaning = self.method.meaning(call.func)
        try:
            return FUNCTIONS[meaning][1] if meaning in FUNCTIONS else None
        except TypeError:  # not hashable
            return None

    def _is_value(self, node: ast.expr) -> bool:
        """Whether it is computed in the method, and is no module of Python's."""
        return self.method.meaning(node) is None

    def _assign(self, statement: ast.stmt) -> None:
        value = getattr(statement, "value", None)
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                self._bind(target, self.things(value), value)
        elif isinstance(statement, ast.AnnAssign) and value is not None:
            self._bind(statement.target, self.things(value))

    def _bind(self, target: ast.expr, things: Things, value: ast.expr | None = None) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = things
        elif isinstance(target, ast.Tuple | ast.List):
            parts: list[ast.expr | None] = [None] * len(target.elts)
            if isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(parts):
                parts = [*value.elts]
            bound = [things if part is None else self.things(part) for part in parts]
            for one, its in zip(target.elts, bound, strict=True):
                self._bind(one.value if isinstance(one, ast.Starred) else one, its)

    def _named(self, name: str, names: dict[str, Things]) -> Things:
        return names.get(name, frozenset({name}))

    def things(self, node: ast.AST | None) -> Things:
        """What an expression may be, or be a view of."""
        if isinstance(node, ast.Name):
            return self._named(node.id, self.names)
        if isinstance(node, ast.Attribute):
            path = self.method.path(node)
            return frozenset({"." + path}) if path is not None else self.things(node.value)
        if isinstance(node, ast.Subscript | ast.Starred | ast.NamedExpr):
            return self.things(node.value)
        if isinstance(node, ast.IfExp):
            return self.things(node.body) | self.things(node.orelse)
        if isinstance(node, ast.BoolOp | ast.Tuple | ast.List):
            parts = node.values if isinstance(node, ast.BoolOp) else node.elts
            return _NOTHING.union(*map(self.things, parts))
        if isinstance(node, ast.Call):
            return self._returned(node)
        return self._new(node)

    def _returned(self, call: ast.Call) -> Things:
        path = self.method.path(call.func)
        if path is not None:
            same = call.args and self.passes_on(path) is not None
            return self.things(call.args[0]) if same else self._new(call)
        if isinstance(call.func, ast.Attribute) and self._is_value(call.func.value):
            return self.things(call.func.value)  # it may be a view
        return self._new(call).union(*map(self.things, self._written(call)))

    def _new(self, node: ast.AST | None) -> Things:
        """What no other place has made, nor this one before."""
        return frozenset({(node, self.rounds)})
