"""A run's folder has one owner, and a new run never mixes with an old."""

from contextlib import AbstractContextManager
from pathlib import Path

from mimicmotion import checkpoint
from mimicmotion.data.ownership import locked


def owned(run_dir: Path) -> AbstractContextManager[None]:
    """While entered, the folder is this process's. The lock lies beside it, since a new run moves the folder aside.

    Raises ValueError where another process has it.
    """
    whole = run_dir.absolute()
    return locked(
        run_dir,
        whole.parent / f".{whole.name}.lock",
        refusal=lambda owner: (
            f"{run_dir} belongs to another run, {owner}; give this one a --run-dir of its own, or stop that"
        ),
    )


def start_afresh(run_dir: Path) -> str | None:
    """Move an earlier run's folder aside where it holds checkpoints; returns what to say about it."""
    if not checkpoint.is_run(run_dir):
        return None
    number = 1
    while (aside := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    run_dir.rename(aside)
    return f"{run_dir} held an earlier run: moved to {aside} (--resume would have gone on with it)"
