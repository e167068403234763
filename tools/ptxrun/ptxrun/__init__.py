"""Runs the PTX that Triton and nvcc emit on the CPU, with checks for races and bounds and counts of what it does.

Stands alone: tests and benches use it, it uses nothing of ours. A launch runs block after block, and in a block warp
after warp to the next barrier, forward, in reverse or shuffled; what is asynchronous happens as late as it may. Not
covered: TMA, products of two blocks, races inside a warp, what ptxas makes of the PTX, time. What it does not know is
an error.
"""

from ptxrun.building import nvcc_ptx
from ptxrun.launching import ALL_CHECKS, BOUNDS, COUNTS, GLOBAL_RACES, SHARED_RACES, Counts, FaultError, launch_ptx
from ptxrun.syntax import UnsupportedError
from ptxrun.triton_launching import compile_triton, launch_triton

__all__ = [
    "ALL_CHECKS",
    "BOUNDS",
    "COUNTS",
    "GLOBAL_RACES",
    "SHARED_RACES",
    "Counts",
    "FaultError",
    "UnsupportedError",
    "compile_triton",
    "launch_ptx",
    "launch_triton",
    "nvcc_ptx",
]
