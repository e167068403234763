"""Scripts of the tests on several ranks of torchrun, one thread each."""

import os
import subprocess
import sys
from collections.abc import Sequence

from places import TESTS, python_path


def launched(
    script: str, ranks: int, *words: object, options: Sequence[str] = (), timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """How `tests/SCRIPT WORDS` ended, and all that it said. options: torchrun's own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *options]
    environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    given = [*command, str(TESTS / script), *map(str, words)]
    return subprocess.run(given, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
