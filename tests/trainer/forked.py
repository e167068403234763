"""Ranks as forks of the test's own process, which has imported all that they need."""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import TCPStore


@dataclass(frozen=True)
class End:
    """How a rank ended: its exit code, all it printed, and after how many seconds."""

    code: int | None
    said: str
    seconds: float


def ranks(
    folder: Path, num_ranks: int, work: Callable[[int], None], *, most_s: float = 100, **environment: str
) -> list[End]:
    """Call work(rank) on so many ranks, as torchrun sets their environment; those left after most_s are killed."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent keeps one
    shared = {
        "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "0", "GROUP_WORLD_SIZE": "1",
        **environment,
    }  # fmt: skip
    context, begun = multiprocessing.get_context("fork"), time.monotonic()
    processes = [
        context.Process(target=_run, args=(folder / f"said-{rank}", {**shared, "RANK": str(rank)}, work))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    seconds = {}
    while len(seconds) < num_ranks and time.monotonic() - begun < most_s:
        time.sleep(0.02)
        for rank, process in enumerate(processes):
            if not process.is_alive():
                seconds.setdefault(rank, time.monotonic() - begun)
    for process in processes:
        process.kill()
        process.join()
    return [
        End(process.exitcode, (folder / f"said-{rank}").read_text(), seconds.get(rank, float("inf")))
        for rank, process in enumerate(processes)
    ]


def _run(said: Path, environment: dict[str, str], work: Callable[[int], None]) -> None:
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))  # not pytest's
    os.environ.update(environment)
    torch.set_num_threads(1)  # OpenMP's threads are not in a fork
    code = 0
    try:
        work(int(environment["RANK"]))
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        code = 1
        traceback.print_exc()
    os._exit(code)
