"""Whether the forward of a UNet, whatever its class, runs its last norm, activation and convolution right in a row."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator

from mmkernels.blocks.recognition.forms import class_path
from mmkernels.blocks.recognition.syntax import tree_of

HEAD = ("conv_norm_out", "conv_act", "conv_out")  # in the order they run; the last stands for all


@functools.cache
def why_not_in_a_row(kind: type) -> str | None:
    """Why not `x = self.conv_norm_out(x); x = self.conv_act(x); x = self.conv_out(x)`, once, or None where it is so."""
    tree = tree_of(kind.forward)  # pyright: ignore[reportAttributeAccessIssue]  of a module
    if tree is None:
        return f"is of {class_path(kind)}, whose forward cannot be read"
    statements = list(_statements(tree.body))
    calls = [_call(x) for x in statements]
    first = next((i for i, call in enumerate(calls) if call and call[0] == HEAD[0]), None)
    found = calls[first : first + len(HEAD)] if first is not None else []
    is_chain = [call[0] for call in found if call] == list(HEAD) and len({call[1] for call in found if call}) == 1
    mentioned = [name for x in statements for name in _mentioned(x)]
    if is_chain and sorted(mentioned) == sorted(HEAD):
        return None
    return f"is of {class_path(kind)}, whose forward does not run {', '.join(HEAD)} once each in a row"


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
    is_plain = part is not None and not call.keywords and len(statement.targets) == len(call.args) == 1
    return (part, names[0]) if is_plain and len(names) == 2 and len(set(names)) == 1 else None


def _mentioned(statement: ast.stmt) -> list[str]:
    return [name for x in ast.walk(statement) if (name := _head_attribute(x)) is not None]


def _head_attribute(node: ast.AST) -> str | None:
    return node.attr if isinstance(node, ast.Attribute) and node.attr in HEAD else None
