"""Temporal attention at 72 frames: every provider, interleaved, with its peak memory by the allocator.

    python bench/attn72.py [--frames 72] [--json FILE] [--picture FILE]

Two subjects, measured (bench/temporal_attention.py). The core: q, k, v (B, F, P, N, D) to o and back. The sub-block:
LN + QKV + attention + projection + residual on x (B*F, P, C). Gradients go to x and to every parameter. On a GPU the
same command measures with CUDA events and max_memory_allocated. A third part is modelled: what each saves, holds
and computes at the UNet's real shape (bench/modelled_attention.py).
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import modelled_attention, sub_block
from bench.sub_block import Settings
from bench.temporal_attention import subjects

if __name__ == "__main__":
    sub_block.main(__doc__, Settings(height=24, width=40, rounds=7), subjects, modelled_attention.rows)
