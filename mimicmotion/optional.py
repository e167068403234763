"""Packages that not everyone needs."""

from importlib import import_module
from typing import Any


def optional(module: str, what: str) -> Any:
    """A module of such a package. Raises ModuleNotFoundError that says which setting needs it and how to get it."""
    package = module.partition(".")[0]
    try:
        import_module(package)
        return import_module(module)
    except ModuleNotFoundError as error:
        message = f"{what} needs {package}, which is not installed: pip install {package}"
        raise ModuleNotFoundError(message) from error
