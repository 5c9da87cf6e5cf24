"""What statements and expressions of a method's source are and do."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator

# What has statements or a scope of its own.
_ELSEWHERE = (
    ast.DictComp, ast.ExceptHandler, ast.GeneratorExp, ast.Lambda, ast.ListComp, ast.SetComp,
    ast.match_case, ast.stmt,
)  # fmt: skip


class Straight(ast.NodeTransformer):
    """Makes branches of conditional expressions that are all of a statement."""

    def visit_Assign(self, node: ast.Assign) -> ast.stmt:
        value = node.value
        if not isinstance(value, ast.IfExp) or len(targets(node)) != 1 or len(node.targets) != 1:
            return node
        made = []
        for one in (value.body, value.orelse):
            same = isinstance(one, ast.Name) and one.id == targets(node)[0].id
            assign = ast.Assign([copy.copy(node.targets[0])], one)
            made.append([] if same else [self.visit(ast.copy_location(assign, node))])
        return self._branch(node, value, *made)

    def visit_Return(self, node: ast.Return) -> ast.stmt:
        value = node.value
        if not isinstance(value, ast.IfExp):
            return node
        made = [ast.copy_location(ast.Return(one), node) for one in (value.body, value.orelse)]
        return self._branch(node, value, *([self.visit(one)] for one in made))

    def _branch(
        self, node: ast.stmt, value: ast.IfExp, body: list[ast.stmt], orelse: list[ast.stmt]
    ) -> ast.stmt:
        taken = body or [ast.copy_location(ast.Pass(), node)]
        return ast.copy_location(ast.If(value.test, taken, orelse), node)


def expressions(statement: ast.stmt) -> Iterator[ast.expr]:
    """The expressions that a statement evaluates itself, in its own scope."""
    todo: list[ast.AST] = [statement]
    for node in todo:
        if isinstance(node, ast.expr):
            yield node
        todo += [child for child in ast.iter_child_nodes(node) if not isinstance(child, _ELSEWHERE)]


def targets(statement: ast.stmt) -> list[ast.Name]:
    """The names that a statement does nothing to but bind them."""
    if isinstance(statement, ast.Assign):
        return [one for one in statement.targets if isinstance(one, ast.Name)]
    if isinstance(statement, ast.AnnAssign) and statement.value is not None:
        return [statement.target] if isinstance(statement.target, ast.Name) else []
    return []


def uses_of(name: str, statement: ast.stmt) -> list[ast.Name]:
    """Where a statement mentions a name, but for binding it."""
    bound = targets(statement)
    return [
        node
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and node.id == name and node not in bound
    ]


def places(node: ast.expr | ast.stmt) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where a node begins and where it ends: what stands before is evaluated before."""
    end = (node.end_lineno or node.lineno, node.end_col_offset or node.col_offset)
    return (node.lineno, node.col_offset), end


def outside(
    parents: dict[ast.AST, ast.AST], block: list[ast.stmt]
) -> tuple[ast.If, list[ast.stmt], int] | None:
    """The branch that a block is a body of, the block that it is in, and its place there."""
    branch = parents[block[0]]
    around = parents.get(branch)
    if isinstance(branch, ast.If):
        for field in ("body", "orelse"):
            found = getattr(around, field, None)
            if isinstance(found, list) and branch in found:
                return branch, found, found.index(branch)
    return None


def harmless(statement: ast.stmt) -> bool:
    """Whether a statement does no more than bind local names."""
    if isinstance(statement, ast.If):
        return all(harmless(one) for one in (*statement.body, *statement.orelse))
    if isinstance(statement, ast.AugAssign | ast.AnnAssign):
        return isinstance(statement.target, ast.Name)
    if isinstance(statement, ast.Assign):
        return all(isinstance(one, ast.Name) for one in statement.targets)
    return isinstance(statement, ast.Pass)
