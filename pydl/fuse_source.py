"""A method and its source: read, compared with what runs, and compiled again when changed.

Methods are rewritten, not traced by torch.fx: a trace runs the method, decides its branches once
and for all (`self.training`, `isinstance(x, Tensor)`, `self.downsample is not None`), and drops
contexts such as `torch.no_grad()`. Here only the expressions of a chain change.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import inspect
import linecache
import types
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydl.fuse_nodes import Straight

_FUTURE = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)
_FRAMES = {"eval", "exec", "globals", "inspect", "locals", "sys", "vars"}
_SCOPES = (ast.AsyncFunctionDef, ast.ClassDef, ast.FunctionDef, ast.Lambda)
_UNFOLLOWED = (ast.Await, ast.Global, ast.Nonlocal, ast.Yield, ast.YieldFrom)


class Unreadable(Exception):
    """Why the source of a method cannot be relied on."""


class Method:
    """A function with its source, which is known to be what it was compiled from.

    Attributes:
        function: The function; where it is decorated, that which the decorators were given.
        node: Its definition, in which `x = a if c else b` is a branch of two statements.
        self: The name of its first argument.
        parents: The parent of every node in it.

    Raises:
        Unreadable: there is no such source, or it does what cannot be followed.
    """

    def __init__(self, function: types.FunctionType) -> None:
        self._wrappers: list[types.FunctionType] = []
        while (inner := getattr(function, "__wrapped__", None)) is not None:
            cells = [_content(cell) for cell in function.__closure__ or ()]
            if not isinstance(inner, types.FunctionType) or not any(c is inner for c in cells):
                raise Unreadable("is decorated by what does not call it from a closure")
            self._wrappers.append(function)
            function = inner
        code = function.__code__
        linecache.checkcache(code.co_filename)
        text = "".join(linecache.getlines(code.co_filename, function.__globals__))
        try:
            file = _parsed(text)
            found, self._owner = file.functions[code.co_name, code.co_firstlineno]
        except (KeyError, SyntaxError, ValueError, RecursionError) as error:
            why = "is not in its source file" if text else "has no source"
            raise Unreadable(why) from error
        self.function, self._imports = function, file.imports
        self.node = copy.deepcopy(found)
        if _bare(self._compile()) != _bare(code):
            raise Unreadable("does not run the source that its file has")
        self.node = Straight().visit(self.node)
        arguments = [*self.node.args.posonlyargs, *self.node.args.args]
        self.self = arguments[0].arg if arguments else ""
        for node in ast.walk(self.node):
            hidden = isinstance(node, ast.Name) and (
                node.id in _FRAMES or (node.id == self.self and not isinstance(node.ctx, ast.Load))
            )
            if hidden or isinstance(node, _UNFOLLOWED):
                raise Unreadable("is a generator, or hides what its names mean")
        self.parents = {
            child: node for node in ast.walk(self.node) for child in ast.iter_child_nodes(node)
        }

    def path(self, node: ast.AST) -> str | None:
        """`a.b` where a node is `self.a.b`."""
        names = _dotted(node)
        if len(names) < 2 or names[0] != self.self:
            return None
        prefix = "_" + (self._owner or "").lstrip("_")
        private = (n.startswith("__") and not n.endswith("__") for n in names[1:])
        return ".".join(prefix + n if p else n for n, p in zip(names[1:], private, strict=True))

    def meaning(self, node: ast.AST) -> Any:
        """What a dotted global name means; None where it is no such name."""
        names, code = _dotted(node), self.function.__code__
        if not names or names[0] in (*code.co_varnames, *code.co_cellvars, *code.co_freevars):
            return None
        found = self.function.__globals__.get(names[0])
        for name in names[1:]:
            found = getattr(found, name, None)
        return found

    def captured(self, name: str) -> bool:
        """Whether a nested function sees a local name."""
        return name in self.function.__code__.co_cellvars

    def blocks(self, block: list[ast.stmt] | None = None) -> Iterator[list[ast.stmt]]:
        """Its lists of statements, but for those in which it catches exceptions."""
        block = self.node.body if block is None else block
        yield block
        for one in block:
            if isinstance(one, ast.With):
                calls = (getattr(item.context_expr, "func", one) for item in one.items)
                owners = [getattr(self.meaning(call), "__module__", None) for call in calls]
                if not all(str(owner).partition(".")[0] == "torch" for owner in owners):
                    continue  # it may catch exceptions as well
            if isinstance(one, ast.If | ast.For | ast.While | ast.With):
                yield from self.blocks(one.body)
                yield from self.blocks(getattr(one, "orelse", []))

    def compiled(self) -> types.FunctionType:
        """The function that its definition, changed by now, stands for."""
        code, old = self._compile(), self.function
        cells = dict(zip(old.__code__.co_freevars, old.__closure__ or (), strict=True))
        code = code.replace(co_qualname=old.__code__.co_qualname)
        new = types.FunctionType(
            code, old.__globals__, old.__name__, old.__defaults__,
            tuple(cells[name] for name in code.co_freevars),
        )  # fmt: skip
        new.__kwdefaults__ = old.__kwdefaults__
        new.__module__, new.__doc__ = old.__module__, old.__doc__
        new.__annotations__ = old.__annotations__
        new.__dict__.update(old.__dict__)
        for wrapper in reversed(self._wrappers):
            old, new = wrapper, _wrapped(wrapper, old, new)
        return new

    def _compile(self) -> types.CodeType:
        """Compiles the definition alone, in a class for the sake of `super()` and of private names
        and in a function that has its free variables."""
        like, body = self.function.__code__, self.node
        inner: ast.stmt = body
        if self._owner is not None:
            inner = ast.parse(f"class {self._owner}: pass").body[0]
            assert isinstance(inner, ast.ClassDef)
            inner.body = [body]
        free = ", ".join(name for name in like.co_freevars if name != "__class__")
        tree = ast.parse(f"def outer({free}): pass")
        assert isinstance(tree.body[0], ast.FunctionDef)
        tree.body[0].body = [inner]
        tree.body[:0] = self._imports
        flags = like.co_flags & _FUTURE
        with warnings.catch_warnings(action="ignore"):
            todo = [compile(tree, like.co_filename, "exec", flags=flags, dont_inherit=True)]
        for code in todo:
            if code.co_name == like.co_name and code.co_firstlineno == like.co_firstlineno:
                return code
            todo += [one for one in code.co_consts if isinstance(one, types.CodeType)]
        raise Unreadable("does not run the source that its file has")


class _File(NamedTuple):
    functions: dict[tuple[str, int], tuple[ast.FunctionDef, str | None]]
    """By name and first line, and the class that each is in."""
    imports: list[ast.stmt]
    """Names that the file imports: calls of their attributes are compiled in another way."""


@functools.lru_cache(maxsize=16)
def _parsed(text: str) -> _File:
    file = _File({}, [])
    with warnings.catch_warnings(action="ignore"):
        todo: list[tuple[ast.AST, str | None, bool]] = [(ast.parse(text), None, True)]
    for node, owner, outside in todo:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            file.functions[node.name, first] = (node, owner)
        if isinstance(node, ast.Import | ast.ImportFrom) and outside:
            names = {one.asname or one.name.partition(".")[0] for one in node.names} - {"*"}
            file.imports.extend(ast.parse(f"import a as {name}").body[0] for name in names)
        owner = node.name if isinstance(node, ast.ClassDef) else owner
        outside = outside and not isinstance(node, _SCOPES)
        todo += [(child, owner, outside) for child in ast.iter_child_nodes(node)]
    return file


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _wrapped(
    wrapper: types.FunctionType, old: types.FunctionType, new: types.FunctionType
) -> types.FunctionType:
    """A decorator's function around another than it was given; it may know itself, too."""
    own = types.CellType()
    cells = []
    for cell in wrapper.__closure__ or ():
        content = _content(cell)
        cells.append(types.CellType(new) if content is old else own if content is wrapper else cell)
    made = types.FunctionType(
        wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, tuple(cells)
    )
    made.__kwdefaults__ = wrapper.__kwdefaults__
    functools.update_wrapper(made, new)
    own.cell_contents = made
    return made


def _bare(code: types.CodeType) -> types.CodeType:
    """Code without what says where it stands."""
    consts = (_bare(one) if isinstance(one, types.CodeType) else one for one in code.co_consts)
    flags = code.co_flags & ~inspect.CO_NESTED
    return code.replace(
        co_consts=tuple(consts), co_filename="", co_qualname=code.co_name, co_flags=flags
    )


def _dotted(node: ast.AST) -> list[str]:
    """`["a", "b", "c"]` for `a.b.c`, empty for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else []
