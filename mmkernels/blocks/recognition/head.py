"""Whether the forward of a UNet, whatever its class, runs its last norm, activation and convolution right in a row.

A UNet may have been given a forward of its own, as accelerate does for autocast. Where that names no part of the head,
it calls the one of the class.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

from torch import nn

from mmkernels.blocks.recognition.forms import class_path
from mmkernels.blocks.recognition.syntax import tree_of

HEAD = ("conv_norm_out", "conv_act", "conv_out")  # in the order they run; the last stands for all


def why_not_in_a_row(unet: nn.Module) -> str | None:
    """Why not `x = self.conv_norm_out(x); x = self.conv_act(x); x = self.conv_out(x)`, once, or None where it is so."""
    own: Any = vars(unet).get("forward")
    function = None if own is None else _innermost(own)
    forward = type(unet).forward if function is None or not _names_the_head(function) else function
    reason = _why_not(_innermost(forward))
    return None if reason is None else f"is of {class_path(type(unet))}, whose forward {reason}"


def _innermost(function: Any) -> Any:
    """What decorators, partial and methods lie around."""
    while (inner := getattr(inspect.unwrap(function), "func", None)) is not None:
        function = inner
    function = inspect.unwrap(function)
    return getattr(function, "__func__", function)


def _names_the_head(function: Any) -> bool:
    """Whether a part of the head is an attribute in its code, or it has none to look at."""
    code = getattr(function, "__code__", None)
    return code is None or any(not set(x.co_names).isdisjoint(HEAD) for x in _codes(code))


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


@functools.cache
def _why_not(forward: Callable[..., Any]) -> str | None:
    tree = tree_of(forward)
    if tree is None:
        return "cannot be read"
    statements = list(_statements(tree.body))
    calls = [_call(x) for x in statements]
    first = next((i for i, call in enumerate(calls) if call and call[0] == HEAD[0]), None)
    found = calls[first : first + len(HEAD)] if first is not None else []
    is_chain = [call[0] for call in found if call] == list(HEAD) and len({call[1] for call in found if call}) == 1
    mentioned = [name for x in statements for name in _mentioned(x)]
    if is_chain and sorted(mentioned) == sorted(HEAD):
        return None
    return f"does not run {', '.join(HEAD)} once each in a row"


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a body, with those that only ask whether a part of the head is there."""
    for statement in body:
        if isinstance(statement, ast.If) and not statement.orelse and _head_attribute(statement.test) is not None:
            yield from _statements(statement.body)
        else:
            yield statement


def _call(statement: ast.stmt) -> tuple[str, str] | None:
    """(part of the head, variable) of `variable = self.part(variable)`, or None for anything else."""
    if not isinstance(statement, ast.Assign) or not isinstance(call := statement.value, ast.Call):
        return None
    names = [x.id for x in (*statement.targets, *call.args) if isinstance(x, ast.Name)]
    part = _head_attribute(call.func)
    if part is None or call.keywords or not len(statement.targets) == len(call.args) == 1:
        return None
    return (part, names[0]) if len(names) == 2 and len(set(names)) == 1 else None


def _mentioned(statement: ast.stmt) -> list[str]:
    return [name for x in ast.walk(statement) if (name := _head_attribute(x)) is not None]


def _head_attribute(node: ast.AST) -> str | None:
    return node.attr if isinstance(node, ast.Attribute) and node.attr in HEAD else None
