"""diffusers' classes as projects copy them: into a file of their own, renamed, reworded, and with changes."""

from __future__ import annotations

import ast
import copy
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from torch import nn


class _Reworded(ast.NodeTransformer):
    """Other names for local variables, no docstrings nor annotations, and a print at the start of a method."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        stored = (x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store))
        names = set(stored) - {x.arg for x in node.args.args}
        for x in ast.walk(node):
            if isinstance(x, ast.Name) and x.id in names:
                x.id = f"my_{x.id}"
            elif isinstance(x, ast.arg):
                x.annotation = None
        node.returns, node.body = None, [*ast.parse("print('here')").body, *node.body[bool(ast.get_docstring(node)) :]]
        return node


def copied(cls: type, folder: Path, *changes: tuple[str, str]) -> Any:
    """A reworded copy of a class from a file of its own, whose source has each of the changes made once."""
    source = ast.unparse(_Reworded().visit(ast.parse(inspect.getsource(cls))))
    source = source.replace(f"class {cls.__name__}", f"class My{cls.__name__}", 1)
    for old, new in changes:
        assert source.count(old) == 1, f"{old!r} is there {source.count(old)} times"
        source = source.replace(old, new)
    name = f"copied_{cls.__name__}_{folder.name.replace('-', '_')}"
    path = folder / f"{name}.py"
    theirs = f"from {cls.__module__} import *\nimport {cls.__module__} as _theirs\nglobals().update(vars(_theirs))\n"
    path.write_text(f"{theirs}\n{source}")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return getattr(module, f"My{cls.__name__}")


def of_class(module: nn.Module, cls: type) -> Any:
    """A copy of a module that is of another class."""
    twin = copy.deepcopy(module)
    twin.__class__ = cls
    return twin
