"""What one pass may compute of a method, and the method rewritten so that it does."""

from __future__ import annotations

import ast
import types
from dataclasses import dataclass, field
from typing import Any

from pydl.fuse_source import Method


@dataclass
class Chain:
    """A call, what its output passes through, and where it ends.

    Attributes:
        kind: "norm", a batch normalisation up to its activation; "tail", an `nn.Sequential` that
            ends with one, likewise; "linear", a linear layer up to an activation; "gate", an
            activation up to a product; "sum", an addition and its normalisation.
        key: The path of the module that is called, below that whose method it is; of a function,
            its call as written.
        call: Where it is called.
        through: The identities between, paths and calls.
        add: The addition: of the residual, `+` or `+=`; of what is normalised, `+`.
        residual: What is added to a normalisation's output.
        act: Where the activation is called.
        times: The product.
        module: The activation's path, where it is a module.
        function: Its name and parameter, where it is a function.
        producer: The module that computes the first call's input; where given, nothing else may
            hold that.
        forced: Where the value is computed before the end: the branch, its body by field, and the
            value's name.
        called: The modules that are called between.
        sums: The statements that give a sum a name, where the normalisation takes that; each with
            conditions that all hold there where it does.
        why: Why it cannot be fused.
    """

    kind: str
    key: str
    call: ast.Call
    through: list[tuple[str, ast.Call]] = field(default_factory=list)
    add: ast.AST | None = None
    residual: ast.expr | None = None
    act: ast.Call | None = None
    times: ast.BinOp | None = None
    module: str | None = None
    function: tuple[str, float | None] | None = None
    producer: str | None = None
    forced: list[tuple[ast.If, str, str]] = field(default_factory=list)
    called: list[str] = field(default_factory=list)
    sums: list[tuple[ast.Assign, list[ast.expr]]] = field(default_factory=list)
    why: str | None = None

    @property
    def end(self) -> ast.expr | None:
        """Where it ends, once that is known; of a sum, where the normalisation is called."""
        if self.kind == "sum":
            return self.call if self.add is not None else None
        return self.times if self.kind == "gate" else self.act


def rewrite(method: Method, chains: list[Chain]) -> types.FunctionType:
    """The method with chains of its that are fused at run time (see `pydl.fuse_run.Fused`)."""
    _Rewriter(method, chains).visit(method.node)
    ast.fix_missing_locations(method.node)
    return method.compiled()


class _Rewriter(ast.NodeTransformer):
    """Hands a chain's steps to the container's methods `_pydl_...`."""

    def __init__(self, method: Method, chains: list[Chain]) -> None:
        self.method = method
        to_act = [chain for chain in chains if chain.kind in ("norm", "tail", "linear")]
        gates = [chain for chain in chains if chain.kind == "gate"]
        self.begins = {chain.call: chain.producer for chain in to_act}
        self.adds = {chain.add for chain in to_act}
        self.modules = {call for chain in to_act for _, call in chain.through}
        self.modules |= {chain.act for chain in to_act if chain.act and chain.module is not None}
        self.functions = {chain.act: chain.function for chain in to_act if chain.function}
        self.forced = [one for chain in chains for one in chain.forced]
        self.gates = {chain.call: chain for chain in gates}
        self.times = {chain.times for chain in gates}
        self.sums = {chain.call: chain for chain in chains if chain.kind == "sum"}
        self.numbers = {id(chain): i for i, chain in enumerate(self.sums.values())}
        self.stored: dict[ast.Assign, list[tuple[Chain, list[ast.expr]]]] = {}
        for chain in self.sums.values():
            for stored, conditions in chain.sums:
                self.stored.setdefault(stored, []).append((chain, conditions))

    def visit(self, node: ast.AST) -> Any:
        self.generic_visit(node)
        new = self._changed(node)
        return new if new is node else ast.copy_location(new, node)

    def _changed(self, node: Any) -> ast.AST:
        for branch, body, name in self.forced:
            if branch is node:
                value = self._call("value", ast.Name(name, ast.Load()))
                getattr(node, body).insert(0, ast.Assign([ast.Name(name, ast.Store())], value))
        if node in self.begins:
            return self._call("begin", node.func, node.args[0], *self._producer(self.begins[node]))
        if node in self.modules:
            return self._call("end", node.func, node.args[0])
        if node in self.functions:
            known = [ast.Constant(value) for value in self.functions[node] or ()]
            if not node.args:
                return self._call("end", ast.Constant(node.func.attr), node.func.value, *known)
            new = self._call("end", node.func, node.args[0], *known, *node.args[1:])
            new.keywords = node.keywords
            return new
        if node in self.adds and isinstance(node, ast.BinOp):
            return self._call("add", ast.Constant("add"), node.left, node.right)
        if node in self.adds and isinstance(node.target, ast.Name):
            left = ast.Name(node.target.id, ast.Load())
            return ast.Assign(
                [node.target], self._call("add", ast.Constant("iadd"), left, node.value)
            )
        if node in self.gates:
            return self._gate(node, self.gates[node])
        if node in self.times:
            return self._call("times", node.left, node.right)
        if node in self.sums:
            chain = self.sums[node]
            if not chain.sums:
                return self._call("normed", node.func, node.args[0].left, node.args[0].right)
            return self._call("taken", node.func, node.args[0], self._kept(chain, ast.Load()))
        if node in self.stored:
            return self._sum(node, self.stored[node])
        return node

    def _gate(self, node: ast.Call, chain: Chain) -> ast.Call:
        known = [ast.Constant(value) for value in chain.function or (None, None)]
        producer = self._producer(chain.producer) or [ast.Constant(None)]
        new = self._call("gate", node.func, node.args[0], *producer, *known, *node.args[1:])
        new.keywords = node.keywords
        return new

    def _sum(self, node: Any, takers: list[tuple[Chain, list[ast.expr]]]) -> ast.Assign:
        """`name, kept = self._pydl_sum(first, second, self.norm)`."""
        kept = [self._kept(chain, ast.Store()) for chain, _ in takers]
        norms: list[ast.expr] = []
        for chain, conditions in takers:
            norm = self._own(chain.key)
            if conditions:
                both = len(conditions) > 1
                test = ast.BoolOp(ast.And(), conditions) if both else conditions[0]
                norm = ast.IfExp(test, norm, ast.Constant(None))
            norms.append(norm)
        target = ast.Tuple([node.targets[0], *kept], ast.Store())
        return ast.Assign([target], self._call("sum", node.value.left, node.value.right, *norms))

    def _kept(self, chain: Chain, context: ast.expr_context) -> ast.Name:
        return ast.Name(f"_pydl_kept{self.numbers[id(chain)]}", context)

    def _own(self, path: str) -> ast.expr:
        return ast.parse(f"{self.method.self}.{path}", mode="eval").body

    def _producer(self, path: str | None) -> list[ast.expr]:
        return [] if path is None else [self._own(path)]

    def _call(self, step: str, *args: ast.expr) -> ast.Call:
        own = ast.Name(self.method.self, ast.Load())
        return ast.Call(ast.Attribute(own, f"_pydl_{step}", ast.Load()), list(args), [])
