"""A run's folder has one owner: two processes never write into the same one, and a new run never mixes with an old."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from mimicmotion import checkpoint
from mimicmotion.data.cache import atomic_write

OWNER = "owner.json"


@contextmanager
def owned(run_dir: Path) -> Iterator[None]:
    """While entered, the folder is this process's; what ends the process, a kill included, gives it back.

    The lock lies beside the folder, which a new run moves aside. Raises ValueError where another process has it.
    """
    run_dir.absolute().parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir.absolute().parent / f".{run_dir.absolute().name}.lock", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"{run_dir} belongs to another run, {_owner(run_dir)}; give this one a --run-dir of its own, or stop that"
        ) from error
    try:
        yield
    finally:
        lock.release()


def sign(run_dir: Path) -> None:
    """Say in an owned folder whose it is."""
    about = {"process": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
    with atomic_write(run_dir / OWNER) as temporary:
        temporary.write_text(json.dumps(about) + "\n")


def _owner(run_dir: Path) -> str:
    try:
        about = json.loads((run_dir / OWNER).read_text())
        return f"process {about['process']} on {about['host']} since {about['since']}"
    except (OSError, ValueError, KeyError):
        return "which has only begun"


def start_afresh(run_dir: Path) -> str | None:
    """Move an earlier run's folder aside where it holds checkpoints; returns what to say about it."""
    if not checkpoint.is_run(run_dir):
        return None
    number = 1
    while (aside := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    run_dir.rename(aside)
    return f"{run_dir} held an earlier run: moved to {aside} (--resume would have gone on with it)"
