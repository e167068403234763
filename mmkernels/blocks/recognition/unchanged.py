"""Whether a block is still what was looked at, by comparing identities: looking again takes ten times as long."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from operator import is_
from typing import Any

from torch import nn

_TENSORS = ("_parameters", "_buffers")  # other numbers are no other block, and old ones would be kept alive here


def watch(block: nn.Module) -> Callable[[], bool]:
    """Returns what says whether each attribute of every module in the block is the very object that it is now.

    Of lists and dictionaries so is each item; of parameters and buffers only the names and classes. What a module and
    what it calls of its attributes, a processor, run is their class's as it is now.
    """
    checks = [_watch(module) for module in block.modules()]
    ran = {(kind, name): getattr(kind, name) for kind, name in _methods(block)}
    return lambda: all(getattr(kind, name) is x for (kind, name), x in ran.items()) and all(x() for x in checks)


def _methods(block: nn.Module) -> Iterator[tuple[type, str]]:
    for module in block.modules():
        yield type(module), "forward"
        yield from ((type(x), "__call__") for x in vars(module).values() if callable(x))


def _watch(module: nn.Module) -> Callable[[], bool]:
    attributes, kind = vars(module), type(module)
    values = list(attributes.values())
    tensors = [(attributes[name], [*attributes[name]], _classes(attributes[name])) for name in _TENSORS]
    holders: list[Any] = [
        x for name, x in attributes.items() if isinstance(x, (list, dict, set)) and name not in _TENSORS
    ]
    empty, filled = [x for x in holders if not x], [(x, _items(x)) for x in holders if x]

    def is_same() -> bool:
        return (
            type(module) is kind
            and _are(values, attributes.values())
            and not any(empty)
            and all(_are(items, _items(x)) for x, items in filled)
            and all([*x] == names and _classes(x) == classes for x, names, classes in tensors)
        )

    return is_same


def _items(x: Any) -> list[Any]:
    return [*x, *x.values()] if isinstance(x, dict) else [*x]


def _classes(x: dict[str, Any]) -> list[type]:
    return [*map(type, x.values())]


def _are(these: Collection[Any], those: Collection[Any]) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))
