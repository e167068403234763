// Walks rows of channels of (M, H, W, C) tensors by stride: blocks of rows, and vectors of channels with the last one
// short.
#pragma once

#include <new>

#include "group_norm_silu.h"
#include "simd.h"

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

// A whole vector of channels, or the last `count` of them.
struct Whole {
  template <class T>
  MM_INLINE Vec load_from(const T* p) const {
    return load(p);
  }
  template <class T>
  MM_INLINE void store_to(T* p, Vec x) const {
    store(p, x);
  }
};
struct Part {
  int64_t count;
  template <class T>
  MM_INLINE Vec load_from(const T* p) const {
    T some[kLanes] = {};
    std::memcpy(some, p, count * sizeof(T));
    return load(some);
  }
  template <class T>
  MM_INLINE void store_to(T* p, Vec x) const {
    T some[kLanes];
    store(some, x);
    std::memcpy(p, some, count * sizeof(T));
  }
};

template <class Function>
MM_INLINE void for_each_vector(int64_t channels, Function function) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) function(c, Whole{});
  if (c < channels) function(c, Part{channels - c});
}

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
