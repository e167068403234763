"""Whether a block computes what its drop-in computes, measured, where it reads like no known one.

A probe sees some inputs only. So it decides where nothing in the block's forward, and in what of its project's that
calls, begins to matter at some size or value: no path, no bound, no cut. `why_not_probable` reads that; where a source
cannot be read, the probe alone decides. The block is
copied in float64 with random parameters and run as it is and as a drop-in: several draws, training and evaluation,
one token and several, frames that are images among the others; output and the gradients of all inputs and parameters.
"""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from mmkernels.blocks.recognition import forms
from mmkernels.blocks.recognition.syntax import first_name, is_of_a_project, last_name, tree_of

B, F, H, W = 2, 3, 2, 3
TOLERANCE = 1e-9  # of the largest output or gradient; float64 has 1e-16
_RANDOM = ("rand", "randn", "rand_like", "randn_like", "randperm", "bernoulli", "dropout", "multinomial")
_BOUNDING = (
    "clamp", "clamp_", "clip", "clip_", "min", "max", "minimum", "maximum", "where", "nan_to_num", "nan_to_num_",
    "masked_fill", "masked_fill_", "hardtanh", "threshold", "floor", "ceil", "round",
)  # fmt: skip
_ASKS_NO_TENSOR = ("isinstance", "hasattr", "getattr", "is_grad_enabled", "is_torch_version", "is_torch_npu_available")
_results: dict[tuple[Any, ...], str | None] = {}


def why_not_by_probe(block: nn.Module, drop_in: Any, reason: str) -> str | None:
    """None where a probe finds that `drop_in` computes what `block` does; `reason`, with the probe's, where not.

    drop_in: a kind of FusedBlock. reason: its `why_not` of the block. Where None comes back, `why_not` gives None too.
    """
    trial: list[forms.Form] = []
    try:
        found: str | None = reason
        while found is not None:
            forms.missed.clear()
            found = drop_in.why_not(block)
            new = [form for form in forms.missed if form not in trial]
            if found is not None and not new:
                return found  # not a matter of how it reads
            trial += new
            forms.by_probe.update(new)
        key = (drop_in, *trial)
        if key not in _results:
            _results[key] = _why_not_equal(block, drop_in, trial)
        if (unequal := _results[key]) is None:
            trial.clear()
            return None
        return f"{reason}; {unequal}"
    finally:
        forms.by_probe.difference_update(trial)


def _why_not_equal(block: nn.Module, drop_in: Any, trial: list[forms.Form]) -> str | None:
    parameters = inspect.signature(drop_in.forward).parameters
    for form in trial:
        for method in forms.FORMS[form.role]:
            if (why := why_not_probable(getattr(form.kind, method), form.kind)) is not None:
                return f"a probe cannot decide: {method} of {forms.class_path(form.kind)} {why}"
    if more := [name for name in inspect.signature(type(block).forward).parameters if name not in parameters]:
        return f"it takes other arguments: {', '.join(more)}"
    with _disable_current_modes(), torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        torch.manual_seed(0)
        return _compare(_twin(block), drop_in)


def why_not_probable(function: Callable[..., Any], kind: type, callers: tuple[Any, ...] = ()) -> str | None:
    """Why a method of this class may do something else for other sizes or values of its inputs, or None."""
    tree = tree_of(function)
    if tree is None:
        return None
    for node in ast.walk(tree):
        if isinstance(node, (ast.While, ast.Try, ast.Match, ast.Global, ast.Nonlocal)):
            return f"has a {type(node).__name__.lower()}"
        for test in _tests(node):
            if not all(map(_asks_no_tensor, _conditions(test))):
                return f"asks whether {ast.unparse(test)}"
        if isinstance(node, ast.Call) and last_name(node.func) in (*_RANDOM, *_BOUNDING):
            return f"calls {last_name(node.func)}"
        if isinstance(node, ast.Slice) and (node.lower or node.upper):
            return f"cuts to {ast.unparse(node)}"
        own = _own_function(node, function, kind)
        if own is None or own in (function, *callers):
            continue
        if (why := why_not_probable(own, kind, (function, *callers))) is not None:
            return f"calls {own.__name__}, which {why}"
    return None


def _own_function(node: ast.AST, function: Any, kind: type) -> Any:
    """The function of its project, or the method of its class, that a name in a function is, or None."""
    if isinstance(node, ast.Name):
        value = getattr(function, "__globals__", {}).get(node.id)
        return value if is_of_a_project(value) else None
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        value = getattr(kind, node.attr, None)
        return value if inspect.isfunction(value) and not hasattr(nn.Module, node.attr) else None
    return None


def _tests(node: ast.AST) -> list[ast.expr]:
    """What a node asks."""
    if isinstance(node, (ast.If, ast.IfExp)):
        return [node.test]
    if isinstance(node, ast.comprehension):
        return node.ifs
    return [node] if isinstance(node, (ast.Compare, ast.BoolOp)) else []


def _conditions(test: ast.expr) -> Iterator[ast.expr]:
    if isinstance(test, ast.BoolOp):
        for value in test.values:
            yield from _conditions(value)
    elif isinstance(test, ast.UnaryOp):
        yield from _conditions(test.operand)
    else:
        yield test


def _asks_no_tensor(test: ast.expr) -> bool:
    """Whether a condition is about the module's own settings, or about whether an argument is there."""
    if isinstance(test, ast.Compare):
        if all(isinstance(x, (ast.Is, ast.IsNot)) for x in test.ops):
            return True
        return all(isinstance(x, ast.Constant) or first_name(x) == "self" for x in (test.left, *test.comparators))
    if isinstance(test, ast.Call):
        return last_name(test.func) in _ASKS_NO_TENSOR
    return isinstance(test, ast.Constant) or first_name(test) in ("self", "return_dict")


def _twin(block: nn.Module) -> nn.Module:
    """A copy on the CPU in float64 with random parameters, without hooks; nothing large is copied."""
    memo: dict[int, Any] = {}
    for x in block.parameters():
        scale = x.shape[1:].numel() ** -0.5 if x.ndim > 1 else 0.5
        memo[id(x)] = nn.Parameter(torch.randn(x.shape, dtype=torch.float64) * scale)
    for x in block.buffers():
        memo[id(x)] = torch.rand(x.shape, dtype=torch.float64)
    twin = copy.deepcopy(block, memo)
    module: Any
    for module in twin.modules():
        for name in [name for name in vars(module) if name.endswith("_hooks")]:
            getattr(module, name).clear()
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    return twin


def _compare(twin: nn.Module, drop_in: Any) -> str | None:
    is_dropping = any(isinstance(x, nn.Dropout) and x.p > 0 for x in twin.modules())
    for mode in (False, True)[: 1 if is_dropping else 2]:
        twin.train(mode)
        for num_tokens in (1, 3):
            inputs = drop_in.probe_inputs(twin, B, F, H, W, num_tokens)
            inputs = {name: x.double() if torch.is_tensor(x) else x for name, x in inputs.items()}
            try:
                plain = _run(twin, twin, inputs)
            except (RuntimeError, ValueError, TypeError) as error:
                if num_tokens > 1:
                    continue  # the forms up to diffusers 0.27 take one token
                return f"a probe cannot run it: {error}"
            fused = _run(drop_in(twin), twin, inputs)
            for name, x in plain.items():
                error = float((x - fused[name]).abs().max()) / max(float(x.abs().max()), 1e-3)
                if not error <= TOLERANCE:
                    return f"a probe finds that it computes something else: {name} differs by {error:.1g}"
    return None


def _run(call: Callable[..., Any], module: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Output, and the gradients of inputs and parameters, zero where there is none."""
    leaves = {k: x.clone().requires_grad_() if torch.is_tensor(x) else x for k, x in inputs.items()}
    output = call(**leaves)
    output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    wanted = {k: x for k, x in leaves.items() if torch.is_tensor(x) and k != "image_only_indicator"}
    wanted |= dict(module.named_parameters())
    found = torch.autograd.grad((output * weights).sum(), list(wanted.values()), allow_unused=True)
    gradients = (torch.zeros_like(x) if g is None else g for x, g in zip(wanted.values(), found, strict=True))
    return {"output": output.detach(), **dict(zip(wanted, gradients, strict=True))}
