"""Scripts on several ranks, one thread each, in the environment that torchrun gives them."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from places import ROOT, python_path
from started import Started
from torch.distributed import TCPStore


def launched(
    script: str, ranks: int, *words: object, renders: bool = False, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """How `SCRIPT WORDS` ended on so many forks, and all that they said. One that fails ends the others."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent keeps one
    shared = {
        **os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "GROUP_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "0",
    }  # fmt: skip
    given = [str(ROOT / script), *words]
    all_ = [
        Started(given, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, renders=renders) for rank in range(ranks)
    ]
    until, codes = time.monotonic() + timeout, [None]
    while None in codes and not any(codes) and time.monotonic() < until:
        time.sleep(0.02)
        codes = [each.process.exitcode for each in all_]
    for each, code in zip(all_, codes, strict=True):
        if code is None and any(codes):
            each.process.kill()
    ends = [each.ended(until - time.monotonic()) for each in all_]
    code = next((end.returncode for end in ends if end.returncode), 0)
    out, err = "".join(end.stdout for end in ends), "".join(end.stderr for end in ends)
    return subprocess.CompletedProcess(given, code, out, err)


def torchrun(
    script: str, ranks: int, *words: object, options: Sequence[str] = (), timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """How `SCRIPT WORDS` ended under torchrun itself, and all that it said. options: torchrun's own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *options]
    environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    given = [*command, str(ROOT / script), *map(str, words)]
    return subprocess.run(given, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
