"""A run's folder has one owner, and a new run never mixes with an old."""

from contextlib import AbstractContextManager
from pathlib import Path

from mimicmotion.data.ownership import locked
from mimicmotion.run import checkpoint


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


def check_stages(run_dir: Path, num_stages: int) -> None:
    """Raise ValueError where a run to go on with has not so many stages, the last of which lies in its own folder."""
    earlier = [checkpoint.stage(run_dir, number, num_stages) for number in range(1, num_stages)]
    if checkpoint.newest_in(run_dir) is None:
        others = [path for path in checkpoint.stages(run_dir) if path not in earlier and checkpoint.folders(path)]
        if others:
            raise ValueError(
                f"--resume: {others[-1]} holds checkpoints, and the last stage of {num_stages} lies in {run_dir} "
                "itself; give --settings with all stages of the run, or, where this is its last one, as earlier "
                f"versions laid it out, move all that {others[-1]} holds into {run_dir}"
            )
    elif missing := [path for path in earlier if not path.is_dir()]:
        raise ValueError(
            f"--resume: {run_dir} holds checkpoints of a last stage, and {missing[0]} is not there: the settings have "
            f"{num_stages} stages, the run has fewer; give those it was trained with, or begin another run with "
            f"--model.pretrained {run_dir}"
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
