// Attention over the frames of each pixel and head, read and written by stride from (B, F, P, N, D).
#pragma once

#include <cstdint>

#include "data_type.h"

namespace mm {

// Element strides of B, F, P and N; D is contiguous.
struct Strided {
  void* data;
  int64_t b, f, p, n;
};

struct TemporalAttention {
  int64_t B, F, P, N, D;
  DataType dtype;
  float scale;
  int num_threads;  // of the CPU
};

// Frames are numbered in 32 bits, and their products with the head dim.
constexpr int64_t kMaxFrames = 1 << 20, kMaxHeadDim = 128, kHeadDimStep = 16;

}  // namespace mm
