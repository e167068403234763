"""Parts of operations that walk over chunks of token rows and write their own backward: rows are (R, C), C contiguous.

Gradients of parameters are summed over the chunks at least in float32, in their order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmkernels.costs import device_kind
from mmkernels.scratch import scratch_rows

_CPU_CHUNK_BYTES = 1 << 22  # of one (R, C) tensor of a chunk: within the cache
_MIN_CHUNK_TOKENS = 576  # fewer rows slow the products down


def check_shapes(x: Tensor, /, **wanted: tuple[Tensor, tuple[int, ...]]) -> None:
    """Raise ValueError for the first tensor, by its name, that has not the shape beside it or is not where x is."""
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, wanted {shape} for x {tuple(x.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, wanted x's {x.device}; move it there")


def check_heads(channels: int, num_heads: int) -> None:
    """Raise ValueError where heads do not share the channels evenly."""
    if channels % num_heads:
        raise ValueError(f"got {channels} channels and {num_heads} heads, wanted channels divisible by heads")


def check_one_dtype(name: str, like: Tensor, **others: Tensor) -> None:
    """Raise ValueError for the first tensor, by its name, that has not the dtype of the one that is called `name`."""
    for other, tensor in others.items():
        if tensor.dtype != like.dtype:
            raise ValueError(f"{other} is {tensor.dtype}, wanted {name}'s {like.dtype}; give both one dtype")


def chunk_size(name: str, given: int | None, default: int) -> int:
    """The chunk that the caller gave as argument `name`, or the default. Raises ValueError below 1."""
    if given is not None and given < 1:
        raise ValueError(f"got {name}={given}, wanted at least 1")
    return default if given is None else given


def default_chunk(tokens: Tensor, num_tensors: int = 8) -> int:
    """How many of the first axis of tokens (R, P, C) make a chunk where the caller names none.

    num_tensors: that a chunk takes on a GPU at once, counted in such of the tokens' shape and dtype.
    """
    row_bytes = max(1, tokens.shape[2] * tokens.element_size())
    is_cpu = device_kind(tokens) == "cpu"
    most = _CPU_CHUNK_BYTES // row_bytes if is_cpu else scratch_rows(num_tensors * row_bytes)
    return max(1, max(_MIN_CHUNK_TOKENS, most) // max(1, tokens.shape[1]))


def even_chunk(tokens: Tensor, num_tensors: int) -> int:
    """As `default_chunk`; on a GPU, where the tokens' channels are contiguous, chunks as even as can be."""
    most = default_chunk(tokens, num_tensors if tokens.stride(2) == 1 else 8)
    if device_kind(tokens) == "cpu":
        return most
    num_chunks = max(1, -(-tokens.shape[0] // most))
    return max(1, -(-tokens.shape[0] // num_chunks))


def even_slices(length: int, most: int) -> list[slice]:
    """As few slices of at most `most` as there have to be, in order, their lengths one apart at most."""
    count = -(-length // max(1, most))
    return [slice(length * i // count, length * (i + 1) // count) for i in range(count)]


@torch.compiler.assume_constant_result
def num_sharing(kind: str) -> int:
    """How many threads share the rows of a chunk on this kind of device: a GPU's chunks are large enough for it.

    With as many rows at least for each thread as for one, a chunk's many short products wait for each other less. The
    sums over chunks then follow the number of threads in their last bits.
    """
    return torch.get_num_threads() if kind == "cpu" else 1


def chunks(tokens: Tensor, size: int) -> Iterator[slice]:
    """Slices of at most `size` of the first axis of tokens (R, P, C), in order; none where it is empty."""
    if tokens.numel():
        for begin in range(0, tokens.shape[0], size):
            yield slice(begin, min(begin + size, tokens.shape[0]))


def chunks_of_tokens(tokens: Tensor, most: int) -> tuple[list[tuple[slice, slice, slice]], int]:
    """Chunks of about `most` tokens of (R, T, C): pieces of one row, or whole rows; and the tokens of the largest.

    Each is (rows, tokens of them, those in the flat order r * T + t), in the flat order.
    """
    R, T, _ = tokens.shape
    found, largest = [], 0
    for rows in even_slices(R, most // max(1, T)):
        for part in even_slices(T, most):
            count = (rows.stop - rows.start) * (part.stop - part.start)
            first, largest = rows.start * T + part.start, max(largest, count)
            found.append((rows, part, slice(first, first + count)))
    return found, largest


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic on tensors of `dtype`, of statistics and of sums: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def wide_vector(vector: Tensor, x: Tensor) -> Tensor:
    """A parameter (C) for kernels that take a pointer: contiguous, in the dtype of the arithmetic on x."""
    return vector.to(wide_dtype(x.dtype)).contiguous()


def rows_of(tokens: Tensor) -> Tensor:
    """tokens (r, P, C) of any strides as rows (r*P, C): a view where they are contiguous, else a copy."""
    return tokens.reshape(-1, tokens.shape[-1])


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right, of (R, K) and (R, C); total (K, C) may be wider than they are."""
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    else:
        total.add_(left.t() @ right)
