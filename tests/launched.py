"""Scripts of this folder on several ranks of torchrun, one thread each."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parent


def launched(
    script: str, ranks: int, *words: object, options: Sequence[str] = (), timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """How `script WORDS` ended, and all that it said. options: torchrun's own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *options]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    given = [*command, str(TESTS / script), *map(str, words)]
    return subprocess.run(given, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
