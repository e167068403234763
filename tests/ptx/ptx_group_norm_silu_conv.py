"""Run the PTX that nvcc emits for the CUDA kernels of group_norm_silu_conv on the CPU, in place of a GPU.

`emulated` swaps the native entries of mmkernels.kernels.convolution.cuda for ones that execute PTX, so that the
module's scratch, flips and strides are proven with the kernels. The launches are those of
csrc/cuda/group_norm_silu_conv.cu.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ptxrun
import torch
from resources_group_norm_silu_conv_cuda import (
    CUDA,
    compile_cuda,
    conv_shared_bytes,
    gradient_shared_bytes,
    slab_bytes,
)
from torch import Tensor

from mmkernels.kernels.convolution import cuda as kernels
from mmkernels.kernels.convolution.inputs import Added
from mmkernels.kernels.group_norm.norm import Norm

THREADS, WARP = 256, 32
MMA_PRODUCTS = 16 * 8 * 16
FILE_OF = {
    "convolve": "group_norm_silu_conv.cuh",
    "weight_gradient": "group_norm_silu_weight_gradient.cuh",
    "add_splits": "group_norm_silu_weight_gradient.cuh",
}


class Frames(ctypes.Structure):
    """A tensor (M, H, W, channels)."""

    _fields_ = (("data", ctypes.c_void_p), ("m", ctypes.c_int64), ("h", ctypes.c_int64), ("w", ctypes.c_int64))


def _structure(name: str, fields: str) -> type[ctypes.Structure]:
    """A mirror of a struct of csrc/cuda/group_norm_silu_conv.h, of words `field:type`."""
    types = {"pointer": ctypes.c_void_p, "int64": ctypes.c_int64, "int": ctypes.c_int32, "frames": Frames}
    pairs = [(field, types[type_]) for field, type_ in (word.split(":") for word in fields.split())]
    return type(name, (ctypes.Structure,), {"_fields_": pairs})


NormInput = _structure(
    "NormInput",
    "x:frames x2:frames M:int64 H:int W:int C:int C2:int G:int mean:pointer rstd:pointer gamma:pointer beta:pointer",
)
Convolution = _structure(
    "Convolution",
    "K:int taps:int weight:pointer bias:pointer shift:pointer shift_m:int64 shift_h:int64 residual:frames y:frames",
)
WeightGradient = _structure("WeightGradient", "K:int taps:int splits:int dy:frames partial:pointer")
NormBackward = _structure(
    "NormBackward", "da:frames dx:frames dx2:frames partial:pointer sums:pointer dgamma:pointer dbeta:pointer"
)


class Emulator:
    """Executes the kernels' PTX for an architecture in an order of warps; `counts` is of each kernel's last launch."""

    def __init__(self, folder: Path = CUDA, architecture: int = 80, order: int = 0) -> None:
        self.folder, self.architecture, self.order = folder, architecture, order
        self.counts: dict[str, ptxrun.Counts] = {}

    def call(self, operation: str, tensors: Sequence[Tensor | None], shape: list[int],
             strided: Sequence[Tensor | None], *rest: Any, x: Tensor) -> None:  # fmt: skip
        """What the native entry group_norm_silu_conv_<operation>_cuda does."""
        frames = [Frames(0 if t is None else t.data_ptr(), *kernels.frame_strides(t)) for t in strided]
        at = [0 if t is None else t.data_ptr() for t in tensors]
        M, H, W, C, C2, G = shape[:6]
        norm = NormInput(frames[0], frames[1], M, H, W, C, C2, G, *at[2:6])
        slabs = M * -(-(C + C2) // kernels.SLAB_CHANNELS)
        tiles = M * -(-H // kernels.TILE_ROWS) * -(-W // kernels.TILE_COLUMNS)

        def launch(name: str, grid: int, *arguments: Any, threads: int = THREADS, shared: int = 0) -> None:
            file = FILE_OF.get(name, "group_norm_silu_backward.cuh")
            ptx, _ = compile_cuda(file, x.dtype, self.architecture, self.folder)
            entries = [entry for entry in re.findall(r"\.entry\s+(\w+)", ptx) if f"{len(name)}{name}" in entry]
            entry = entries[0] if len(entries) == 1 else next(x for x in entries if f"Li{shape[-1]}E" in x)
            packed = [bytes(x) if isinstance(x, ctypes.Structure) else x for x in arguments]
            buffers = [tensor for tensor in tensors if tensor is not None]
            self.counts[name] = ptxrun.launch_ptx(
                ptx, entry, (grid,), (threads,), shared, packed, order=self.order, buffers=buffers
            )

        if operation == "forward":
            K, taps = shape[6:]
            conv = Convolution(K, taps, *at[6:9], *rest[0], frames[2], frames[3])
            launch("convolve", tiles * -(-K // kernels.TILE_OUTPUTS), norm, conv, shared=conv_shared_bytes(taps))
        elif operation == "weight_gradient":
            K, taps = shape[6:]
            splits, blocks = rest[0], -(-(C + C2) // kernels.STEP_CHANNELS) * -(-K // kernels.TILE_OUTPUTS)
            gradient, count = WeightGradient(K, taps, splits, frames[2], at[7]), taps * (C + C2) * K
            launch("weight_gradient", blocks * splits, norm, gradient, shared=gradient_shared_bytes(taps))
            if splits > 1:
                launch("add_splits", -(-count // (4 * THREADS)), at[7], at[8], count, splits)
        else:
            backward = NormBackward(*frames[2:5], *at[9:13])
            launch("norm_backward_sums", slabs * rest[0], norm, backward, rest[0], shared=slab_bytes())
            launch("norm_backward_groups", M * G, norm, backward, rest[0], threads=WARP)
            launch("norm_backward_parameters", C + C2, norm, backward, rest[0], threads=WARP)
            launch("norm_backward_inputs", slabs * rest[0], norm, backward, rest[0])


@contextmanager
def emulated(emulator: Emulator) -> Iterator[None]:
    """Run mmkernels.kernels.convolution.cuda on CPU tensors through `emulator`."""
    native_call: Callable[..., None] = kernels._call
    kernels._call = emulator.call
    try:
        yield
    finally:
        kernels._call = native_call


def count() -> list[dict[str, Any]]:
    """Rows of counts at 72 frames or rows, bfloat16, one tile of output channels and one step of input channels.

    x_sectors is what is read besides the weights, at most, and activations counts the threads that took a sigmoid.
    """
    rows, taken = [], torch.bfloat16
    for taps, (H, W, C, K) in ((9, (72, 128, 32, 160)), (3, (72, 32, 32, 160))):
        x, y = torch.zeros(1, H, W, C, dtype=taken), torch.zeros(1, H, W, K, dtype=taken)
        weight, norm = torch.zeros(taps, C, K, dtype=taken), Norm(*[torch.ones(1, 4)] * 2, *[torch.ones(C)] * 2)
        emulator = Emulator()
        with emulated(emulator):
            kernels.convolve(x, None, norm, weight, Added(None, None, None), y)
            kernels.weight_gradient(x, None, norm, y, taps)
        # The convolution's blocks read the weights of all taps; those of the weight gradient read dy once.
        tiles = -(-H // kernels.TILE_ROWS) * -(-W // kernels.TILE_COLUMNS)
        others = {"convolve": tiles * _sectors(weight), "weight_gradient": _sectors(y)}
        written = {"convolve": _sectors(y), "weight_gradient": 2 * _sectors(weight)}
        for name, other in others.items():
            counts, least = emulator.counts[name], _sectors(x)
            rows.append(_row(f"{name}<{taps}>", x, K, counts, least + _least(name, weight, y) + written[name]) | {
                "x_sectors": counts.global_load_sectors - other,
                "least_x_sectors": least,
                "activations_per_element": counts.lanes["ex2"] / x.numel(),
                "mma": counts.mma,
                "useful_mma": H * W * taps * C * K / MMA_PRODUCTS,
            })  # fmt: skip
    x = torch.ones(1, 72, 64, 320, dtype=taken)
    emulator = Emulator()
    with emulated(emulator):
        norm = Norm(*[torch.ones(1, 32)] * 2, *[torch.ones(320)] * 2)
        kernels.norm_backward(x, None, x, norm, torch.empty_like(x), None)
    for name, tensors in (("norm_backward_sums", 2), ("norm_backward_inputs", 3)):
        rows.append(_row(name, x, None, emulator.counts[name], tensors * _sectors(x)))
    return rows


def _sectors(tensor: Tensor) -> int:
    return tensor.nbytes // 32


def _least(name: str, weight: Tensor, y: Tensor) -> int:
    """Sectors of the other operand, read once."""
    return _sectors(weight if name == "convolve" else y)


def _row(part: str, x: Tensor, K: int | None, counts: ptxrun.Counts, least: int) -> dict[str, Any]:
    return {
        "kernel": "group_norm_silu_conv",
        "backend": "cuda",
        "part": part,
        "arch": 80,
        "direction": "forward" if part.startswith("convolve") else "backward",
        "shape": dict(zip("MHWC", x.shape, strict=True)) | ({} if K is None else {"K": K}),
        "dtype": "bfloat16",
        "sectors": counts.sectors,
        "least_sectors": least,
        "mma": 0,
        "useful_mma": 0,
    }
