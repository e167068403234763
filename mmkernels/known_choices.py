"""What readings of timings decide for a family of GPUs: variants that need neither be compiled nor timed there.

The reading, where no other is named: one H200 (capability 9.0), bfloat16, the UNet's shapes at 72 frames of 1024x576,
torch 2.11, triton 3.6, at commit 590dd64; milliseconds, medians of 7. On a family that is not named every variant is
timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Known:
    """For this kind of work `best` is faster than `slower` on GPUs whose compute capability has one of these majors."""

    op: str
    kind: str
    best: str
    slower: tuple[str, ...]
    majors: tuple[int, ...]
    reading: str


KNOWN = (
    Known(
        op="group_norm_silu_conv", kind="3x3 to few channels", best="triton", slower=("chunked",), majors=(9,),
        reading="320 to 4 at 128x72, forward and backward, triton / chunked: 1.79 / 5.22 and 7.40 / 13.2",
    ),
    Known(
        op="group_norm_silu_conv", kind="3x1x1", best="chunked", slower=("cuda", "triton"), majors=(9,),
        reading="forward + backward, chunked / cuda / triton: 320 5.5 / 9.0 / 10.0, 640 3.5 / 7.8 / 8.8, 1280 at 32x18 "
        "2.4 / 7.7 / 7.7. chunked is added up of parts read on an H100 at b70c917: cuDNN's conv3d in channels last at "
        "590, 481, 306 TFLOP/s (output, data, weights), 705, 520, 474 and 739, 729, 640, and passes over memory: 2 to "
        "activate and 3 to add up, then 2 and 5 of the norm's backward, at 1.94 TB/s",
    ),
    Known(
        op="attention", kind="64 a head", best="cudnn", slower=("flash",), majors=(9,),
        reading="72 rows, forward + backward, cudnn / flash: 9216 pixels of 5 heads 62.3 / 92.5, 2304 of 10 8.2 / "
        "13.0, 576 of 20 1.76 / 2.89; on an H100 57 / 91, 7.8 / 12.2, 1.74 / 2.54. On Ampere, Ada and RTX Blackwell "
        "cuDNN's is 0.82 to 1.00 times as fast (huggingface/transformers pull request 48163)",
    ),
    Known(
        op="temporal_attention", kind="64 a head", best="cuda", slower=("triton",), majors=(9,),
        reading="5 heads, 1456 pixels, forward and backward, cuda / triton: 0.086 / 0.161 and 0.180 / 0.394; on 14 "
        "shapes 1.7 to 2.3 times as fast",
    ),
)  # fmt: skip


def worth_timing(op: str, kind: str, capability: str, names: Sequence[str]) -> list[str]:
    """Those of the variants `names` that are not known to be slower than another of them; capability as "9.0"."""
    major = int(capability.partition(".")[0])
    slower = {
        name
        for known in KNOWN
        if (known.op, known.kind) == (op, kind) and major in known.majors and known.best in names
        for name in known.slower
    }
    return [name for name in names if name not in slower]
