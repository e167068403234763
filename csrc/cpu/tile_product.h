// Small matrix products whose output stays in registers.
#pragma once

#include "simd.h"

namespace mm::MM_ISA {

// A register tile is kTileRows x (at most kTileVectors) accumulators, the loaded vectors and one broadcast.
constexpr int kTileRows = 4;
constexpr int kTileVectors = kRegisters == 32 ? 5 : 3;

// out(row, vector, c) for c = a b, a (kTileRows, depth) of any strides, b (depth, NV * kLanes) row-major.
template <int NV, class Out>
MM_INLINE void multiply_tile(const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t ldb, int depth,
                             Out out) {
  Vec c[kTileRows][NV] = {};
#pragma GCC unroll 2
  for (int k = 0; k < depth; k++) {
    Vec row[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) row[j] = load(b + k * ldb + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; i++) {
      Vec factor = splat(a[i * a_row + k * a_depth]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; j++) c[i][j] += factor * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) out(i, j, c[i][j]);
}

// The same over `vectors` columns of vectors, split evenly so that no narrow rest is left.
template <class Out>
MM_INLINE void multiply(const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t ldb, int depth,
                        int vectors, Out out) {
  int blocks = (vectors + kTileVectors - 1) / kTileVectors;
  for (int block = 0; block < blocks; block++) {
    int begin = vectors * block / blocks, width = vectors * (block + 1) / blocks - begin;
    const float* columns = b + begin * kLanes;
    auto shifted = [&](int i, int j, Vec x) { out(i, begin + j, x); };
    switch (width) {
      case 1: multiply_tile<1>(a, a_row, a_depth, columns, ldb, depth, shifted); break;
      case 2: multiply_tile<2>(a, a_row, a_depth, columns, ldb, depth, shifted); break;
      case 3: multiply_tile<3>(a, a_row, a_depth, columns, ldb, depth, shifted); break;
      case 4: multiply_tile<4>(a, a_row, a_depth, columns, ldb, depth, shifted); break;
      case 5: multiply_tile<5>(a, a_row, a_depth, columns, ldb, depth, shifted); break;
    }
  }
}

}  // namespace mm::MM_ISA
