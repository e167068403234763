"""Many videos at once, on the machines of a Ray cluster that see the same folders: a maker in each of its workers."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

from mimicmotion.data.cache import Clip, Drop
from mimicmotion.data.clip_maker import ClipMaker


def make_all(maker: ClipMaker, videos: Sequence[Path], workers: int) -> list[list[Clip | Drop]]:
    """What came of each video, in order; the first error stops all. Raises ValueError where Ray is not installed.

    RAY_ADDRESS names the cluster; without it Ray starts on this machine, and is stopped at the end.
    """
    try:
        ray: Any = import_module("ray")
    except ImportError as error:
        raise ValueError(f"the engine ray needs Ray ({error}); `pip install ray`, or leave --engine out") from error
    was_running = ray.is_initialized()
    if not was_running:
        with _own_signals():
            ray.init(runtime_env={"env_vars": {"PYTHONPATH": _python_path()}}, log_to_driver=True)
    try:
        kept: Any = ray.put(maker)  # serialised once, however many workers there are
        actor: Any = ray.remote(_Worker)
        num_gpus = 1.0 if maker.encoder.device == "cuda" else 0.0
        pool = import_module("ray.util").ActorPool(
            [actor.options(num_cpus=1, num_gpus=num_gpus).remote(kept) for _ in range(workers)]
        )
        return list(pool.map(lambda worker, video: worker.make.remote(video), list(videos)))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    finally:
        if not was_running:
            ray.shutdown()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Put our handlers of signals back after Ray, which takes SIGTERM and aborts."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    if current_thread() is main_thread():
        for number, handler in before.items():
            signal.signal(number, handler)


class _Worker:
    """One process of the cluster."""

    def __init__(self, maker: ClipMaker) -> None:
        self._maker = maker

    def make(self, video: Path) -> list[Clip | Drop]:
        return self._maker.make(video)


def _python_path() -> str:
    """Where workers find this package, which need not be installed."""
    root = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
