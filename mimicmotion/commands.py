"""How a command ends where it cannot go on: one sentence. A traceback is for faults of ours, and for --debug."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

from mimicmotion.data.cache import EXHAUSTED, FULL
from mimicmotion.paths import first_line, free_gib
from mimicmotion.ranks.lost_ranks import RankLostError
from mimicmotion.run.checkpoint import CheckpointError

# What files, weights, disks, memory and missing packages can do, and what is refused.
EXPECTED = (ValueError, OSError, MemoryError, torch.OutOfMemoryError, ImportError, SafetensorError, CheckpointError)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def one_sentence(stopped: str, *more: type[Exception], debug: bool) -> Iterator[None]:
    """End the process with 1 and "STOPPED: what and what to do" where an expected error, or one of `more`, is raised.

    debug: let it through, with its traceback. Where another rank has a sentence to say, this one ends without.
    """
    try:
        yield
    except RankLostError as error:
        if debug:
            raise
        raise SystemExit(f"{stopped}: {error}" if str(error) else 1) from error
    except (*EXPECTED, *more) as error:
        if debug:
            raise
        raise SystemExit(f"{stopped}: {sentence(error)}") from error


def sentence(error: Exception) -> str:
    """An error in words of its own, or of ours where those do not say what to do."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory ran out ({first_line(error)}); give --memory-budget auto, or smaller clips"
    if isinstance(error, MemoryError):
        return str(error) or "the memory ran out; give fewer workers or smaller clips"
    if isinstance(error, ImportError):
        return f"{error}; `pip install -e .` in the checkout installs what is needed"
    if isinstance(error, OSError) and error.errno in FULL:
        return f"no space left to write {_name(error)}{free_gib(error.filename)}; free some and start again"
    if isinstance(error, OSError) and error.errno in EXHAUSTED:
        return "too many files are open; give fewer --workers, or allow more with `ulimit -n`"
    if isinstance(error, OSError) and error.errno in _FORBIDDEN:
        return f"{_name(error)} cannot be used ({error.strerror}); give another place, or the rights to this one"
    return str(error) or type(error).__name__


def _name(error: OSError) -> str:
    return "a file" if error.filename is None else str(error.filename)
