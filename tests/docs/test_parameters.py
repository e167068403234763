"""No function of the kernels and their tools has more than 8 parameters, but for what a call has to name one by one.

Those are known by what they are: a custom operator and what is registered for it, whose parameters are its schema; the
function an op's users call, which hands its tensors to that schema, and its reference, which takes no others; a kernel;
and a launch of one, which takes what a driver's does.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from places import ROOT

MOST = 8
PACKAGES = ("mmkernels", "tools/ptxrun/ptxrun")
REGISTERED = ("custom_op", "register_fake", "register_autograd", "register_flop_formula", "jit")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def parameters(function: Function) -> set[str]:
    """By name, whatever stands for the instance or its class left out."""
    given = function.args
    return {one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)} - {"self", "cls"}


def is_registered(function: Function) -> bool:
    """Whether a decorator makes it an operator, a part of one or a kernel."""
    found = (node for decorator in function.decorator_list for node in ast.walk(decorator))
    return any(isinstance(node, ast.Attribute) and node.attr in REGISTERED for node in found)


def too_long(text: str) -> set[str]:
    """The functions of a module that have too many parameters and are none of those that may."""
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, Function)]
    operators = {function.name for function in functions if is_registered(function)}
    faces = [function for function in functions if function.name not in operators and operators & called(function)]
    allowed = [
        *(function for function in functions if is_registered(function) or function.name.startswith("launch")),
        *(face for face in faces if not face.name.startswith("_")),
        *(one for one in functions if one.name == "reference" and any(parameters(one) <= parameters(f) for f in faces)),
    ]
    return {one.name for one in functions if len(parameters(one)) > MOST and one not in allowed}


def called(function: Function) -> set[str]:
    """The names of functions that it calls."""
    calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
    return {name.id for name in calls if isinstance(name, ast.Name)}


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_few_parameters() -> None:
    found = {str(path.relative_to(ROOT)): names for path in sources() if (names := too_long(path.read_text()))}
    assert found == {}, f"more than {MOST} parameters: name the group, as kernels/group_norm/norm.py does"


NINE = "a, b, c, d, *, e, f, g, h, i"


@pytest.mark.parametrize(
    ("text", "wanted"),
    {
        f"def f({NINE}): ...": {"f"},
        f"async def f({NINE}): ...": {"f"},
        f"class A:\n    def f(self, {NINE.removesuffix(', i')}): ...": set(),
        f"class A:\n    def f(self, {NINE}): ...": {"f"},
        f"@triton.jit\ndef f({NINE}): ...": set(),
        f"@functools.cache\ndef f({NINE}): ...": {"f"},
        f"@custom_ops.wrong\ndef f({NINE}): ...": {"f"},
        f"@torch.library.custom_op('a::b', mutates_args=())\ndef _f({NINE}): ...\n"
        f"@_f.register_fake\ndef _fake({NINE}): ...\n"
        f"def reference({NINE}): ...\n"
        f"def f({NINE}, j): return _f(a, b)\n": set(),
        f"@triton.jit\ndef _f({NINE}): ...\ndef f({NINE}, j): ...\ndef reference({NINE}): ...": {"f", "reference"},
        f"@_f.register_fake\ndef _f({NINE}): ...\ndef _g({NINE}): return _f(a)\ndef reference({NINE}, k): ...": {
            "_g",
            "reference",
        },
    }.items(),
)
def test_the_rule_can_fail(text: str, wanted: set[str]) -> None:
    assert too_long(text) == wanted
