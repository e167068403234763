"""Settings as plain JSON values, as checkpoints and settings files keep them, and back."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

from mimicmotion.config import Config


def to_json(config: object) -> dict[str, Any]:
    """Config as plain JSON values (paths as text)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Path):
            return value.as_posix()
        return list(value) if isinstance(value, tuple) else value

    return plain(config)


def changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Fields (dotted name, before, now) that differ between two configs as JSON values."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += changes(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append((prefix + name, old, new))
    return found


def from_json(values: dict[str, Any], kind: type = Config) -> Any:
    """Rebuild a dataclass of this module from `to_json`. Raises ValueError at a name it does not know."""
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(values) - set(hints)):
        raise ValueError(f"{kind.__name__} has no {', '.join(unknown)}; it has {', '.join(sorted(hints))}.")

    def rich(name: str, value: Any) -> Any:
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            return from_json(value, typing.cast(type, hint))
        if value is not None and (hint is Path or Path in typing.get_args(hint)):
            return Path(value)
        return tuple(value) if isinstance(value, list) else value

    return kind(**{name: rich(name, value) for name, value in values.items()})
