"""One part in this process: `python -m bench.verification PART FILE SECONDS [--dry]`, as bench/verify_gpu.py runs it.

FILE is the device's file of rows. Ends with 0 also where the part has failures to report: they are rows.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path

import torch

from bench import report
from bench.verification.device import Gpu, StandIn
from bench.verification.record import Record


def main(part: str, file: str, seconds: str, *flags: str) -> int:
    """Run one part. Returns the exit status: 1 where the part ended early."""
    gpu = StandIn() if "--dry" in flags else Gpu()
    setting = report.Setting(dtype="bfloat16", threads=torch.get_num_threads(), device=gpu.name)
    record = Record(path=Path(file), part=part, setting=setting, kind=gpu.kind)
    try:
        importlib.import_module(f"bench.verification.{part}").run(gpu, record, float(seconds))
    except Exception as error:  # the reason belongs to the results; the trace is for whoever mends it
        traceback.print_exc()
        record.fail(part, error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
