// What Python hands over for temporal attention, checked.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../check.h"
#include "../temporal_attention.h"
#include "parse.h"

namespace mm {

inline TemporalAttention parse_temporal_attention(const std::vector<int64_t>& shape,
                                                  const std::vector<int64_t>& strides, size_t tensors,
                                                  const std::string& dtype, double scale, int num_threads) {
  MM_CHECK(shape.size() == 5, "got a shape of " << shape.size() << " sizes, wanted (B, F, P, N, D)");
  MM_CHECK(strides.size() == 4 * tensors, "got " << strides.size() << " strides, wanted " << 4 * tensors
                                                 << ": B, F, P, N of each of " << tensors << " tensors");
  TemporalAttention op{shape[0], shape[1], shape[2], shape[3], shape[4], parse_dtype(dtype), float(scale), num_threads};
  MM_CHECK(op.B >= 0 && op.F >= 0 && op.P >= 0 && op.N >= 0, "got a negative size in (B, F, P, N, D)");
  MM_CHECK(op.F <= kMaxFrames, "got F = " << op.F << ", wanted at most " << kMaxFrames << " frames");
  MM_CHECK(op.D > 0 && op.D <= kMaxHeadDim && op.D % kHeadDimStep == 0,
           "got D = " << op.D << ", wanted a multiple of " << kHeadDimStep << " up to " << kMaxHeadDim);
  MM_CHECK(num_threads >= 1, "got num_threads = " << num_threads << ", wanted at least 1");
  return op;
}

// Tensor i of those whose strides are listed.
inline Strided view(uintptr_t data, const std::vector<int64_t>& strides, int tensor) {
  const int64_t* s = strides.data() + 4 * tensor;
  return {reinterpret_cast<void*>(data), s[0], s[1], s[2], s[3]};
}

inline bool is_empty(const TemporalAttention& op) { return op.B * op.F * op.P * op.N == 0; }

}  // namespace mm
