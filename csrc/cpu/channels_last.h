// Walks rows of channels of (M, H, W, C) tensors by stride, in blocks of rows.
#pragma once

#include <new>

#include "group_norm_silu.h"
#include "vector_loop.h"

namespace mm::MM_ISA {
namespace {

constexpr int64_t kBlockRows = 1024;

MM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Zeros that are freed with it. No template of the standard library is used here: the linker could take its AVX-512
// copy for every build.
template <class T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t count) : data(static_cast<T*>(::operator new(count * sizeof(T) + 64))) {
    std::memset(data, 0, count * sizeof(T));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data); }
};

// A block of rows of one sample, walked in tiles whose row addresses are known.
struct Block {
  int64_t m, begin, end, W;

  Block(const GroupNormSilu& op, int64_t task, int64_t blocks)
      : m(task / blocks), begin(task % blocks * kBlockRows), end(smaller(begin + kBlockRows, op.H * op.W)), W(op.W) {}
  int64_t rows() const { return end - begin; }
  template <class T>
  MM_INLINE T* row(const Rows& x, int64_t r) const {
    return static_cast<T*>(x.data) + m * x.m + r / W * x.h + r % W * x.w;
  }
  template <class T>
  MM_INLINE void find_rows(const Rows& x, int64_t first, int count, T** found) const {
    for (int i = 0; i < count; i++) found[i] = row<T>(x, first + i);
  }
};
inline int64_t num_blocks(const GroupNormSilu& op) { return (op.H * op.W + kBlockRows - 1) / kBlockRows; }

}  // namespace
}  // namespace mm::MM_ISA
