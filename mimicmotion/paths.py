"""How messages name paths, as any terminal can show them and with what lies near one that is wrong, and errors."""

import shutil
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

_MOST_NAMES = 5


def printable(name: object) -> str:
    """A name without what a terminal cannot show or would obey: bytes that are no UTF-8, line ends, escapes."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(name))


def first_line(error: BaseException) -> str:
    """Of what an error says; its kind where it says nothing."""
    return str(error).strip().partition("\n")[0].strip() or type(error).__name__


def near(path: Path, is_wanted: Callable[[Path], bool] = Path.exists) -> str:
    """What of the wanted kind lies beside a path, names like its own first: "in runs: demo, demo.1".

    Where its folder is not there either, the nearest one above that is.
    """
    path = path.absolute()
    folder = next(parent for parent in path.parents if parent.is_dir())
    wanted = path.relative_to(folder).parts[0]
    try:
        names = sorted(printable(entry.name) for entry in folder.iterdir() if entry != path and is_wanted(entry))
    except PermissionError:
        return f"{folder} cannot be read"
    if close := get_close_matches(wanted, names, n=_MOST_NAMES):
        return f"in {folder}: {', '.join(close)}"
    if not names:
        return f"in {folder}: nothing of the kind"
    return f"in {folder}: {', '.join([*names[:_MOST_NAMES], *(['...'] if names[_MOST_NAMES:] else [])])}"


def check_there(name: str, path: Path | None, advice: str) -> None:
    """Raise ValueError where a path is given and nothing is there, with what lies near and what to do."""
    if path is not None and not path.exists():
        raise ValueError(f"{name}: {path} is not there ({near(path)}); {advice}")


def free_gib(path: str | Path | None) -> str:
    """ ", 0.3 GiB are free" of the disk that a path lies on or would lie on; nothing where that is not known."""
    if path is None:
        return ""
    here = next((place for place in (Path(path).absolute(), *Path(path).absolute().parents) if place.exists()), None)
    return "" if here is None else f", {shutil.disk_usage(here).free / 2**30:.1f} GiB are free"
