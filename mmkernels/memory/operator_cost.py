"""What one dispatched operator computes and moves through device memory: FLOPs and bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._pytree import tree_leaves

_WRITES_ONLY = ("copy_", "fill_", "zero_", "normal_", "uniform_", "random_")  # in place, without reading what was there
_ALLOCATES_ONLY = ("empty", "new_empty", "resize_", "set_")  # and what begins so, as empty_like and new_empty_strided


class OperatorCosts:
    """FLOPs by the formulas of torch's flop counter at the time it is made; those of custom operators are there."""

    def __init__(self) -> None:
        self._formulas = dict(flop_counter.flop_registry) | _missing_formulas()

    def flops(self, func: Any, args: tuple, kwargs: dict, out: object) -> int:
        """Of products, convolutions and attention; a multiply and an add are two."""
        formula = self._formulas.get(func._overloadpacket)
        return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


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
