"""What a block is built of: every child that a drop-in reads instead of calling is named, and of the kind it should be.

A drop-in reads the parameters of its children and does not call all of them. So another norm, a hook or dropout that is
on would be lost without a word: all of these are reasons.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from mmkernels.blocks.recognition.forms import AROUND_FORWARD, calls_like, class_path, why_not_known
from mmkernels.blocks.weights import why_not_linear

Kinds = Mapping[str, type | str]  # by the dotted name within a block: a class of torch's, or a role that is known
_WATCHERS = ("mmkernels.", "torch.distributed.")  # whose hooks count, time or gather a block, whatever it is given
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NORMS = (nn.LayerNorm, nn.GroupNorm)


def is_patched(module: nn.Module) -> bool:
    """Whether this one module has a function of its own in the place of a method that its class computes by."""
    methods = (name for name in vars(module) if callable(getattr(type(module), name, None)))
    return any(name == "forward" or name in AROUND_FORWARD or not hasattr(nn.Module, name) for name in methods)


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more, or other things, than the forward of its class."""
    return is_patched(module) or any(getattr(module, hooks, None) for hooks in _HOOKS)


def is_read(module: nn.Module) -> bool:
    """Whether somebody beside the module may read its inputs or change them: hooks, but for those that only watch."""
    hooks = [hook for name in _HOOKS for hook in getattr(module, name, {}).values()]
    are_watching = (str(getattr(hook, "__module__", "")).startswith(_WATCHERS) for hook in hooks)
    return is_patched(module) or not all(are_watching)


def why_not_built_of(
    module: nn.Module,
    kinds: Kinds,
    apart: Collection[str] = (),
    only: Collection[str] | None = None,
    block: str = "",
) -> str | None:
    """Why `module` is not built of exactly these, or None where it is.

    apart: names in it that are looked at elsewhere, or that a drop-in calls as modules, so that they may be of any
    kind, with hooks and all. only: the names that are looked at, where not all are.
    block: the name of what the drop-in stands for, which is called, with its hooks.
    """
    found = dict(module.named_modules(remove_duplicate=False))
    for name, kind in kinds.items():
        if name not in found:
            return f"has no {name}"
        if (reason := _why_not_of(found[name], kind)) is not None:
            return f"{name} {reason}" if name else reason
    layers = tuple(f"{name}." for name, kind in kinds.items() if kind is nn.Linear)
    for name, child in found.items():
        if name.startswith(layers):  # what a linear layer is wrapped with has been looked at with it
            continue
        if is_within(name, apart) or not (only is None or is_within(name, only)):
            continue
        if name not in kinds:
            return f"has an extra module {name}, {class_path(type(child))}"
        reason = why_not_read(child) if name != block else None
        if reason is not None:
            return f"{name} {reason}"
    return None


def is_within(name: str, names: Collection[str]) -> bool:
    """Whether a dotted name is one of these or below one of them."""
    return any(name == x or name.startswith(f"{x}.") for x in names)


def _why_not_of(module: nn.Module, kind: type | str) -> str | None:
    if isinstance(kind, str):
        return why_not_known(module, kind)
    if kind is nn.Linear:
        return why_not_linear(module)
    if type(module) is kind or (isinstance(module, kind) and _adds_nothing(module, kind)):
        return None
    return f"is {class_path(type(module))}, not {class_path(kind)}"


def _adds_nothing(module: Any, kind: Any) -> bool:
    """Whether a subclass computes what torch's layer does: diffusers' for LoRA before peft, with none in it."""
    is_theirs = type(module).__module__ == "diffusers.models.lora" and getattr(module, "lora_layer", None) is None
    return (type(module).forward is kind.forward and calls_like(type(module), kind)) or is_theirs


def why_not_read(module: nn.Module) -> str | None:
    """What would happen around a module's forward that reading its parameters leaves out."""
    if is_hooked(module):
        return "has hooks or a replaced method"
    if isinstance(module, nn.Dropout) and module.p > 0 and module.training:
        return f"drops with probability {module.p}"
    if isinstance(module, _NORMS) and (module.weight is None or module.bias is None):
        return "has no weight or no bias"
    if module._parameters and not isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d, *_NORMS)):
        own = set(module._parameters) - {"mix_factor"}  # an AlphaBlender's, which is asked for it
        return f"has parameters of its own: {', '.join(sorted(own))}" if own else None
    return None


def geometry(conv: Any) -> tuple[Any, ...]:
    """What a convolution does beside its weights."""
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode


PADDED_3X3 = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")  # as `geometry` gives it
