"""A folder that is written into has one owner: two processes never write into the same one."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mimicmotion.data.cache import write_text

OWNER = "owner.json"
_LAUNCH, _RESTARTS = "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"  # torchrun tells its processes


@contextmanager
def locked(folder: Path, lock: Path, *, refusal: Callable[[str], str]) -> Iterator[None]:
    """While entered, the folder is this process's; what ends the process, a kill included, gives it back.

    Raises ValueError where another process has it: the refusal, made of that process and its host.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock, thread_local=False)
    try:
        held.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(refusal(_owner(folder))) from error
    try:
        yield
    finally:
        held.release()


def sign(folder: Path) -> None:
    """Say in an owned folder whose it is."""
    about = {"process": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
    about["launch"] = os.environ.get(_LAUNCH)
    write_text(folder / OWNER, json.dumps(about) + "\n")


def is_restarted(folder: Path) -> bool:
    """Whether torchrun has started this process again and an earlier one of the same launch has signed the folder."""
    if os.environ.get(_RESTARTS, "0") == "0":
        return False
    try:
        return _signature(folder).get("launch") == os.environ.get(_LAUNCH)
    except (OSError, ValueError):
        return False


def _signature(folder: Path) -> dict[str, Any]:
    return json.loads((folder / OWNER).read_text())


def _owner(folder: Path) -> str:
    try:
        about = _signature(folder)
        return f"process {about['process']} on {about['host']} since {about['since']}"
    except (OSError, ValueError, KeyError):
        return "a process that has only begun"
