"""One launch of one Triton kernel, for a tool that follows it through every pass of Triton's compiler.

`LAUNCH=temporal_attention/forward python -m ttsem.validate --device cpu --cc 90 tests/one_launch.py` with tests/ in
PYTHONPATH. The tool takes no arguments for the program and mixes up several launches: hence one, by environment. Its
reference is Triton's interpreter, so float16.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from mmkernels.ops import temporal_attention_triton


def _temporal_attention(num_tensors: int) -> None:
    kernels = {4: temporal_attention_triton.forward_kernel, 7: temporal_attention_triton.backward_kernel}
    tensors = tuple(torch.randn(1, 72, 1, 1, 64).half() for _ in range(num_tensors))
    positional, constants = temporal_attention_triton.arguments(tensors, 0.125)
    kernels[num_tensors][(1,)](*positional, **constants)


LAUNCHES: dict[str, Callable[[], None]] = {
    "temporal_attention/forward": lambda: _temporal_attention(4),
    "temporal_attention/backward": lambda: _temporal_attention(7),
}


def main() -> None:
    """The launch that LAUNCH names."""
    torch.manual_seed(0)
    LAUNCHES[os.environ["LAUNCH"]]()


if __name__ == "__main__":
    main()
