// GEGLU with the exact gelu, forward and backward, over rows of u = (hidden | gate).
#pragma once

#include <cstdint>

#include "../data_type.h"

namespace mm {

// u and du (rows, 2 * half), g and dg (rows, half), contiguous; bias (2 * half) in float32 is added to u.
struct Geglu {
  int64_t rows, half;
  DataType dtype;
  int64_t block_rows;  // rows that one task of backward sums over
  int num_threads;
};

// One build of the kernels for an instruction set.
struct GegluKernels {
  // g = (hidden + bias) * gelu(gate + bias)
  void (*forward)(const Geglu&, const void* u, const float* bias, void* g);
  // du from dg, and g again; du may be u, and g may be dg. sums (blocks, 2 * half): of du over a block's rows.
  void (*backward)(const Geglu&, const void* u, const float* bias, const void* dg, void* du, void* g, float* sums);
};

}  // namespace mm
