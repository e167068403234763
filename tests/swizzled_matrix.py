"""Matrices of 16-bit elements in swizzled shared memory, as asynchronous products read them.

PTX ISA, "Shared Memory Matrix Layout" and "Strides".
"""

from __future__ import annotations

import itertools

import torch

DEPTH, MATRIX_BYTES = 16, 1 << 15  # columns; what is enough for any matrix of the tests
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


class Stored:
    """A matrix (rows, 16) as bytes of shared memory, and the strides of its descriptor.

    Eight rows of row_bytes follow each other, and in row r of the eight the 16-byte piece j lies where j ^ (r * pieces
    // 8) would. Along a row run k (from first_k on), or the rows of the matrix where it is transposed.
    """

    def __init__(self, matrix: torch.Tensor, row_bytes: int, is_transposed: bool, first_k: int = 0) -> None:
        self.memory = torch.zeros(MATRIX_BYTES // 2, dtype=matrix.dtype)
        group_bytes = 8 * row_bytes
        leading, stride = (4 * group_bytes, group_bytes) if is_transposed else (16, 2 * group_bytes)
        places = []
        for row, k in itertools.product(range(matrix.shape[0]), range(DEPTH)):
            line, along = (k, row) if is_transposed else (row, first_k + k)
            block, column = divmod(2 * along, row_bytes)
            assert is_transposed or block == 0
            piece, rest = divmod(column, 16)
            piece ^= line % 8 * (row_bytes // 16) // 8
            places.append((block * leading + line // 8 * stride + line % 8 * row_bytes + piece * 16 + rest) // 2)
        self.memory[places] = matrix.flatten()
        self.fields = (2 * first_k >> 4) | leading >> 4 << 16 | stride >> 4 << 32
