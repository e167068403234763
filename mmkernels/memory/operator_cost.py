"""What one dispatched operator computes and moves through device memory: its kernels, each of a kind, FLOPs and bytes.

cuDNN's convolutions in half precision run in channels last alone: operands in another layout are copied there and the
result back, in memory that cuDNN asks torch for (nchwToNhwcKernel and nhwcToNchwKernel of a profile on an H200).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._pytree import tree_leaves

from mmkernels.cards import Kind
from mmkernels.memory.collectives import collective_of, is_collective

_WRITES_ONLY = ("copy_", "fill_", "zero_", "normal_", "uniform_", "random_")  # in place, without reading what was there
_ALLOCATES_ONLY = ("empty", "new_empty", "resize_", "set_")  # and what begins so, as empty_like and new_empty_strided
_REDUCTIONS = ("sum", "mean", "native_layer_norm", "native_group_norm_backward", "linalg_vector_norm", "var")
HALF = (torch.bfloat16, torch.float16)


class Kernel(NamedTuple):
    """One kernel of an operator, or a collective that it waits for and the bytes that it sends."""

    flops: int
    num_bytes: int
    kind: Kind | Literal["network"] = "kernel"


class OperatorCosts:
    """FLOPs by the formulas of torch's flop counter at the time it is made; those of custom operators are there."""

    def __init__(self) -> None:
        self._formulas = dict(flop_counter.flop_registry) | _missing_formulas()

    def flops(self, func: Any, args: tuple, kwargs: dict, out: object) -> int:
        """Of products, convolutions and attention; a multiply and an add are two."""
        formula = self._formulas.get(func._overloadpacket)
        return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))

    def kernels(self, func: Any, args: tuple, kwargs: dict, out: object, *, is_inside: bool) -> tuple[Kernel, ...]:
        """What an operator runs on a GPU, in this order. is_inside: of a fused operator, which calls one by name."""
        if is_collective(func):  # only inside of an operator: Network has the others
            sent = collective_of(func, args, kwargs, out) if is_inside else None
            return () if sent is None else (Kernel(0, sent.sent_bytes, "network"),)
        flops, num_bytes = self.flops(func, args, kwargs, out), moved_bytes(func, args, kwargs, out)
        if not flops and not num_bytes:
            return ()
        if is_convolution(func):
            parts = convolution_copies(func, args, out)
            copies = [Kernel(0, 2 * size, "strided") for part in parts for size in part]
            own = [Kernel(flops // len(parts), num_bytes // len(parts), "convolution")] * len(parts)
            return (*copies, *own)
        return (Kernel(flops, num_bytes, _kind(func, args, kwargs, out, flops, is_inside)),)


def _kind(func: Any, args: tuple, kwargs: dict, out: object, flops: int, is_inside: bool) -> Kind:
    name = func._overloadpacket.__name__
    if "attention" in name:
        key = args[1 + ("backward" in name)]
        # What scaled_dot_product_attention takes is a card's to choose; cuDNN's takes no single key.
        is_flash = "cudnn" not in name and (is_inside or key.shape[-2] == 1)
        if "backward" in name:
            return "flash backward" if is_flash else "attention backward"
        return "flash" if is_flash else "attention"
    if flops:
        return "product"
    if name == "native_group_norm":
        return "group norm"
    if name.startswith(_REDUCTIONS):
        return "reduction"
    if name.startswith(("_foreach", "_fused", "cat")):
        return "pass"  # lists of tensors, each in one order
    given, made = list(_tensors((args, kwargs))), list(_tensors(out))
    many = [x for x in (*given, *made) if x.dim()]
    largest = max((x.numel() for x in many), default=0)
    streams = [x for x in many if x.numel() == largest]
    if len(streams) < len(many) or len({x.stride() for x in streams}) > 1 or not _is_dense(streams):
        return "strided"
    widest = max((x.element_size() for x in made), default=0)
    return "widening" if any(x.element_size() < widest for x in given if x.dim()) else "pass"


def _is_dense(tensors: Iterable[Tensor]) -> bool:
    return all(distinct_bytes(x) == _span(x) * x.element_size() for x in tensors)


def _span(x: Tensor) -> int:
    """Elements from the first to the last of a tensor in memory."""
    return 1 + sum((int(size) - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True) if size)


def is_convolution(func: Any) -> bool:
    """Whether it is one, or one's backward."""
    return func._overloadpacket.__name__ in ("convolution", "convolution_backward")


def convolution_copies(func: Any, args: tuple, out: object) -> list[list[int]]:
    """Bytes of the copies in channels last that each kernel of a convolution takes: one forward, up to two backward."""
    made: Any = out
    if func._overloadpacket.__name__ == "convolution":
        kernels = [(*args[:2], made)]
    else:
        dy, x, weight = args[:3]
        dx, dweight, _ = made
        kernels = [each for each in ((dy, weight, dx), (dy, x, dweight)) if each[2] is not None]
    return [[x.nbytes for x in each if x.dtype in HALF and not _is_channels_last(x)] for each in kernels]


def _is_channels_last(x: Tensor) -> bool:
    layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.dim() not in (4, 5) or x.is_contiguous(memory_format=layout)


def moved_bytes(func: Any, args: tuple, kwargs: dict, out: object) -> int:
    """Bytes of the tensors that an operator reads and writes; views and bare allocations move nothing.

    What an axis of stride 0 repeats is read once. Intermediates inside an operator are not in it.
    """
    name = func._overloadpacket.__name__
    if name.startswith(_ALLOCATES_ONLY):
        return 0
    read, written = list(_tensors((args, kwargs))), list(_tensors(out))
    if name in _WRITES_ONLY or name.endswith("_like") or name.startswith("new_"):
        read = read[1:]
    if not func._schema.is_mutable:
        storages = {x.untyped_storage()._cdata for x in read}
        written = [x for x in written if x.untyped_storage()._cdata not in storages]
        if not written:
            return 0  # a view, or a question about a tensor
    elif not written:  # operators over lists, as the optimizers', return nothing and write what they read
        written = read
    return sum(map(distinct_bytes, read)) + sum(map(distinct_bytes, written))


def _tensors(tree: object) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def distinct_bytes(x: Tensor) -> int:
    """Bytes of a tensor's elements, those that an axis of stride 0 repeats counted once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= int(size) if stride else min(1, int(size))
    return count * x.element_size()


def _missing_formulas() -> dict[Any, Callable[..., int]]:
    """FLOP formulas of operators that torch has none for: attention on a CPU, products in place."""
    aten = torch.ops.aten

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
        return flop_counter.sdpa_flop_count(query.shape, key.shape, value.shape)

    def attention_backward(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
        return flop_counter.sdpa_backward_flop_count(grad_out.shape, query.shape, key.shape, value.shape)

    def product(total: Tensor, left: Tensor, right: Tensor, **_: Any) -> int:
        return flop_counter.mm_flop(left.shape, right.shape)

    return {
        aten.addmm_: product,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
