// Attention over the frames of each pixel and head, read and written by stride from (B, F, P, N, D).
#pragma once

#include <cstdint>

#include "../data_type.h"

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
  int num_threads;
};

constexpr int64_t kMaxFrames = 128, kMaxHeadDim = 128, kHeadDimStep = 16;

// One build of the kernels for an instruction set.
struct TemporalAttentionKernels {
  void (*forward)(const TemporalAttention&, Strided q, Strided k, Strided v, Strided o);
  // o is written as well where its data is not null: the probabilities for it are there anyway.
  void (*backward)(const TemporalAttention&, Strided q, Strided k, Strided v, Strided grad_o, Strided dq, Strided dk,
                   Strided dv, Strided o);
};

}  // namespace mm
