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


# PTX of a block of THREADS: `memory` in shared memory becomes the two matrices at %d0, fenced for products to read.
# Takes %r0 as the thread and %r1 as the address of `memory`; uses %r2 to %r4, %d5 to %d8 and %p0.
THREADS = 128
COPY_TO_SHARED = f"""
  shl.b32 %r2, %r0, 4;
  add.u32 %r3, %r1, %r2;
  cvt.u64.u32 %d5, %r2;
  add.u64 %d6, %d0, %d5;
  mov.u32 %r4, 0;
copy:
  ld.global.v2.b64 {{%d7, %d8}}, [%d6];
  st.shared.v2.b64 [%r3], {{%d7, %d8}};
  add.u64 %d6, %d6, {16 * THREADS};
  add.u32 %r3, %r3, {16 * THREADS};
  add.u32 %r4, %r4, 1;
  setp.lt.u32 %p0, %r4, {2 * MATRIX_BYTES // 16 // THREADS};
  @%p0 bra copy;
  fence.proxy.async.shared::cta;
"""
