"""How a function reads: a digest of its syntax tree without what changes no number.

Left out are docstrings, annotations, decorators, prints, logging, deprecations, assertions, branches that only raise,
and gradient checkpointing: of `if self.gradient_checkpointing` the other branch stays, of a call of checkpoint(f, x)
the call f(x). Local names are numbered in the order in which they appear, those of parameters stay, since callers use
them; a global name of a module stands as the module's own, so that an alias reads like what it is an alias of.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

_SILENT_CALLS = ("print", "deprecate", "logger", "logging", "warnings")  # by the first name of what is called
_CHECKPOINT = ("checkpoint", "_gradient_checkpointing_func")  # by the last


def digest_of(function: Callable[..., Any], callers: tuple[Any, ...] = ()) -> str | None:
    """The digest of a function written in Python, or None where its source cannot be read."""
    tree = tree_of(function)
    if tree is None:
        return None
    renamed = _Renamed(_local_names(tree), getattr(function, "__globals__", {}), (*callers, function)).visit(tree)
    return hashlib.sha256(_written(renamed).encode()).hexdigest()[:16]


_OF_A_PYTHON = (
    "type_comment",
    "type_params",
    "kind",
    "ctx",
)  # fields that say nothing here, or that some versions lack


def _written(node: Any) -> str:
    """A tree as text, the same in every version of Python."""
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if name not in _OF_A_PYTHON)
        inside = (f"{name}={_written(value)}" for name, value in fields if value not in (None, []))
        return f"{type(node).__name__}({','.join(inside)})"
    return f"[{','.join(map(_written, node))}]" if isinstance(node, list) else repr(node)


def tree_of(function: Callable[..., Any]) -> ast.FunctionDef | None:
    """The tree of a function without what changes no number, or None where its source cannot be read."""
    try:
        source = inspect.getsource(getattr(function, "__code__", function))  # of a wrapper its own, not what it wraps
        # A method's lines are indented, but for some comments: under an `if` they need no other indentation.
        found: Any = ast.parse(f"if 1:\n{source}" if source[0].isspace() else source).body[0]
        definition = found.body[0] if source[0].isspace() else found
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(definition, ast.FunctionDef):
        return None
    definition.name, definition.decorator_list, definition.returns = "f", [], None
    return _Silenced().visit(definition)


def _local_names(tree: ast.FunctionDef) -> set[str]:
    parameters = {x.arg for x in _parameters(tree)}
    stored = [x.id for x in ast.walk(tree) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)]
    inner = [x.name for x in ast.walk(tree) if isinstance(x, ast.FunctionDef) and x is not tree]
    inner += [x.arg for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.Lambda)) for x in f.args.args]
    return {name for name in (*stored, *inner) if name not in parameters}


def is_of_a_project(value: Any) -> bool:
    """Whether it is a function that no library which is known has: it may be anything."""
    of_libraries = ("torch", "diffusers", "builtins", "typing", "math")
    return inspect.isfunction(value) and value.__module__.split(".")[0] not in of_libraries


def _parameters(function: ast.FunctionDef) -> list[ast.arg]:
    arguments = function.args
    more = [x for x in (arguments.vararg, arguments.kwarg) if x is not None]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *more]


def first_name(node: ast.expr) -> str:
    """`a` of a.b.c, or "" where it begins with something else."""
    while isinstance(node, (ast.Attribute, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def last_name(node: ast.expr) -> str:
    """`c` of a.b.c."""
    return node.attr if isinstance(node, ast.Attribute) else first_name(node)


class _Silenced(ast.NodeTransformer):
    """Takes out what changes no number."""

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = node.type_comment = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if node.value is None:
            return None
        return self.visit(ast.Assign(targets=[node.target], value=node.value, lineno=node.lineno))

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        value = node.value
        if isinstance(value, ast.Constant) or (isinstance(value, ast.Call) and first_name(value) in _SILENT_CALLS):
            return None
        return self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> None:
        return None

    def visit_Raise(self, node: ast.Raise) -> None:
        return None

    def visit_Pass(self, node: ast.Pass) -> None:
        return None

    def visit_If(self, node: ast.If) -> Any:
        if any(isinstance(x, ast.Attribute) and x.attr == "gradient_checkpointing" for x in ast.walk(node.test)):
            return [kept for x in node.orelse for kept in _as_list(self.visit(x))]
        node = self._with_bodies(node)
        return node if node.body or node.orelse else None

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        is_own = first_name(node.func) == "self" and last_name(node.func) == "checkpoint"
        if last_name(node.func) in _CHECKPOINT and node.args and not is_own:
            kept = [x for x in node.keywords if x.arg not in ("use_reentrant", None)]
            return ast.Call(node.args[0], node.args[1:], kept)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns, node.type_comment = None, None
        node.args = self.visit(node.args)
        return self._with_bodies(node)

    def _with_bodies(self, node: Any) -> Any:
        for name in ("test", "body", "orelse"):
            if isinstance(value := getattr(node, name, None), list):
                setattr(node, name, [kept for x in value for kept in _as_list(self.visit(x))])
            elif value is not None:
                setattr(node, name, self.visit(value))
        return node


def _as_list(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [] if found is None else [found]


class _Renamed(ast.NodeTransformer):
    """Numbers local names and resolves global ones."""

    def __init__(self, local: set[str], found: dict[str, Any], callers: tuple[Any, ...]) -> None:
        self._local, self._globals, self._numbers, self._callers = local, found, {}, callers

    def _number(self, name: str) -> str:
        return self._numbers.setdefault(name, f"local{len(self._numbers)}")

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self._local:
            node.id = self._number(node.id)
        elif isinstance(value := self._globals.get(node.id), ModuleType):
            node.id = value.__name__
        elif value is not None and is_of_a_project(value):
            digest = "" if value in self._callers else digest_of(value, self._callers)
            node.id = f"{node.id} {digest}"  # a helper of the same file may be anything
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.value, ast.Name) and node.value.id.startswith("torch") and node.attr in ("nn", "functional"):
            return ast.Name(f"{node.value.id}.{node.attr}", node.ctx)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if node.name in self._local:
            node.name = self._number(node.name)
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        if node.arg in self._local:
            node.arg = self._number(node.arg)
        return node
