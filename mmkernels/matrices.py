"""The weights of an operation that walks over chunks of rows: products with them, and the gradients that are wanted.

    y = x (W + sum of B A)^T      dx = dy (W + sum of B A)      dW = dy^T x      dA = (dy B)^T x      dB = dy^T (x A^T)

x (R, C), W (K, C); an adapter, A (r, C) and B (k, r), adds to k neighbouring rows of W. B A is never added to W, which
in bfloat16 would lose an update that is small beside W; nor is its product added to W's once that is rounded, which
would lose it beside y. dA and dB cost no dW.
Gradients are summed over the chunks at least in float32, in their order.

An operation hands on its adapters as one flat list A, B, A, B, ... and, for each, its first row among the rows of all
of the operation's weights, one weight below the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from mmkernels.rows import add_product, wide_dtype


def wide_like(like: Tensor, is_wanted: bool = True) -> Tensor:
    """An uninitialised gradient of a parameter, at least float32; empty where nobody wants it."""
    dtype = wide_dtype(like.dtype)
    return torch.empty_like(like, dtype=dtype) if is_wanted else torch.empty(0, dtype=dtype, device=like.device)


def through_norm(needs: Sequence[bool]) -> bool:
    """Whether an operation's norm is differentiated: for x or the norm's parameters, its first three inputs."""
    return any(needs[:3])


def gradients_of_attention(
    x: Tensor, qkv_weight: Tensor, out_weight: Tensor, adapters: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """What the backward of norm + attention returns, uninitialised: of x, both weights, the (3, C) vectors, adapters.

    Empty where it is not wanted, but for the vectors; of parameters at least float32, which autograd rounds. needs: of
    x, the norm's weight and bias, both weights, the output's bias, and the adapters together.
    """
    dx = torch.empty(x.shape if through_norm(needs) else 0, dtype=x.dtype, device=x.device)
    vectors = x.new_empty((3, x.shape[-1]), dtype=wide_dtype(x.dtype))
    dadapters = [wide_like(factor) for factor in adapters if needs[6]]
    return dx, wide_like(qkv_weight, needs[3]), wide_like(out_weight, needs[4]), vectors, dadapters


def differentiate_attention(ctx: Any, dy: Tensor | None, num_saved: int, backward: Callable[..., Any]) -> tuple:
    """What autograd wants of an operation on x, norm, both weights, the output's bias, adapters, places and settings.

    ctx has its `places` and `settings`, and saved so many tensors before the adapters; `backward` takes dy, those, the
    adapters, their places, the settings and what is needed, and returns as `gradients_of_attention`.
    """
    saved = ctx.saved_tensors
    if dy is None:
        return (*(None,) * 6, *of_lists([], ctx.places), *(None,) * 4)
    needs = [*ctx.needs_input_grad[:6], any(ctx.needs_input_grad[6])]
    found = backward(dy, *saved[:num_saved], saved[num_saved:], ctx.places, *ctx.settings, needs)
    dx, dqkv, dout, vectors, dadapters = found
    dnorm_weight, dnorm_bias, dout_bias = vectors.unbind()
    gradients = wanted((dx, dnorm_weight, dnorm_bias, dqkv, dout, dout_bias), needs)
    return (*gradients, *of_lists(dadapters, ctx.places), *(None,) * 4)


class Matrix:
    """One weight W (K, C), with the sum of its gradient where that is wanted."""

    def __init__(self, weight: Tensor, is_wanted: bool = False) -> None:
        self.weight = weight
        self.adapters: list[_Adapter] = []
        self.is_wanted, self.sum = is_wanted, wide_like(weight, is_wanted).zero_()

    def times(self, x: Tensor, out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias, (R, K); into `out` where there is one."""
        weight = self.weight.t()
        if not self.adapters:
            return torch.mm(x, weight, out=out) if bias is None else torch.addmm(bias, x, weight, out=out)
        y = x.new_zeros((x.shape[0], weight.shape[1])) if out is None else out.zero_()
        for adapter in self.adapters:
            y[:, adapter.rows].addmm_(x @ adapter.down.t(), adapter.up.t())
        y.addmm_(x, weight)  # last, so that both are rounded together and once
        return y if bias is None else y.add_(bias)

    def back(self, dy: Tensor, out: Tensor | None = None) -> Tensor:
        """dy W, (R, C); into `out` where there is one."""
        if not self.adapters:
            return torch.mm(dy, self.weight, out=out)
        dx = dy.new_zeros((dy.shape[0], self.weight.shape[1])) if out is None else out.zero_()
        for adapter in self.adapters:
            dx.addmm_(dy[:, adapter.rows] @ adapter.up, adapter.down)
        return dx.addmm_(dy, self.weight)

    def collect(self, dy: Tensor, x: Tensor) -> None:
        """Add what a chunk gives to the gradients that are wanted."""
        if self.is_wanted:
            add_product(self.sum, dy, x)
        for adapter in self.adapters:
            adapter.collect(dy[:, adapter.rows], x)


class _Adapter:
    def __init__(self, rows: slice, down: Tensor, up: Tensor, is_wanted: bool) -> None:
        self.rows, self.down, self.up = rows, down, up
        self.sums = [wide_like(factor).zero_() for factor in (down, up)] if is_wanted else []

    def collect(self, dy: Tensor, x: Tensor) -> None:
        if self.sums:
            add_product(self.sums[0], dy @ self.up, x)
            add_product(self.sums[1], dy, x @ self.down.t())


def matrices(
    weights: Sequence[Tensor], wanted: Sequence[bool], adapters: Sequence[Tensor], places: Sequence[int],
    wants_adapters: bool = False,
) -> tuple[list[Matrix], list[Tensor]]:  # fmt: skip
    """An operation's weights with their adapters; and the adapters' sums in their order, none where not wanted."""
    found = [Matrix(weight, is_wanted) for weight, is_wanted in zip(weights, wanted, strict=True)]
    sums: list[Tensor] = []
    for place, down, up in zip(places, adapters[::2], adapters[1::2], strict=True):
        index, first = _weight_at(place, [weight.shape[0] for weight in weights])
        adapter = _Adapter(slice(first, first + up.shape[0]), down, up, wants_adapters)
        found[index].adapters.append(adapter)
        sums += adapter.sums
    return found, sums


def _weight_at(place: int, num_rows: Sequence[int]) -> tuple[int, int]:
    """Which weight a row among those of all weights is of, and which of that weight's rows it is."""
    bounds = pairwise(accumulate(num_rows, initial=0))
    return next((index, place - begin) for index, (begin, end) in enumerate(bounds) if begin <= place < end)


def summed(weights: Sequence[Tensor], adapters: Sequence[Tensor], places: Sequence[int]) -> list[Tensor]:
    """Every weight with its adapters added to it, as autograd sees it: for where nothing fused computes."""
    found = list(weights)
    for place, down, up in zip(places, adapters[::2], adapters[1::2], strict=True):
        index, first = _weight_at(place, [weight.shape[0] for weight in weights])
        rows = torch.arange(first, first + up.shape[0], device=up.device)
        found[index] = found[index].index_add(0, rows, up @ down)
    return found


def adapter_flops(
    tokens: int, shapes: Sequence[Sequence[int]], places: Sequence[int], num_rows: Sequence[int], times: Sequence[int]
) -> int:  # fmt: skip
    """Of both products of every adapter, taken so many `times` for those of each weight, of so many rows."""
    pairs = zip(places, shapes[::2], shapes[1::2], strict=True)
    return sum(
        2 * tokens * times[_weight_at(place, num_rows)[0]] * (down[0] * down[1] + up[0] * up[1])
        for place, down, up in pairs
    )


def wanted(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Each gradient that is needed, None in the place of the others."""
    return [gradient if is_needed else None for gradient, is_needed in zip(gradients, needs, strict=False)]


def of_lists(dadapters: Sequence[Tensor], places: Sequence[int]) -> tuple[list[Tensor] | list[None], list[int] | None]:
    """What autograd wants for `adapters` and for `places`, whose list it takes for one of tensors where it is empty."""
    return list(dadapters) or [None] * 2 * len(places), None if places else []


def check_adapters(weights: Sequence[Tensor], adapters: Sequence[Tensor], places: Sequence[int]) -> None:
    """Raise ValueError where the adapters do not fit the weights, or have another dtype or number of places."""
    num_rows = [weight.shape[0] for weight in weights]
    if len(adapters) != 2 * len(places):
        raise ValueError(f"got {len(adapters)} factors of adapters for {len(places)} places, wanted two for each")
    for place, down, up in zip(places, adapters[::2], adapters[1::2], strict=True):
        if not 0 <= place < sum(num_rows):
            raise ValueError(f"an adapter begins at row {place}, wanted one of the {sum(num_rows)} of all weights")
        index, first = _weight_at(place, num_rows)
        (K, C), dtype = weights[index].shape, weights[index].dtype
        if down.ndim != 2 or up.shape != (min(up.shape[0], K - first), down.shape[0]) or down.shape[1] != C:
            got = f"A {tuple(down.shape)}, B {tuple(up.shape)}"
            raise ValueError(f"an adapter is {got}, wanted (r, {C}) and (at most {K - first}, r)")
        if down.dtype != dtype or up.dtype != dtype:
            raise ValueError(f"an adapter is {down.dtype} and {up.dtype}, wanted its weight's {dtype}")
