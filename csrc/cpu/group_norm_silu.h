// Group normalisation and SiLU over channels-last rows of one tensor, or of two side by side on the channel axis.
#pragma once

#include <cstdint>

#include "../data_type.h"

namespace mm {

// (M, H, W, channels) with element strides of M, H and W; channels are contiguous. A null one has no channels.
struct Rows {
  void* data;
  int64_t m, h, w, channels;
};

// Groups run over the joined channels; statistics are those of a sample m and group over H, W and the group's channels.
struct GroupNormSilu {
  int64_t M, H, W, C, G;  // C of both inputs together
  DataType dtype;         // of the inputs and their gradients
  DataType activation;    // of the activation and its gradient: float32 or the same
  int num_threads;
};

struct NormParameters {
  const float *mean, *rstd;   // (M, G)
  const float *gamma, *beta;  // (C)
};

// One build of the kernels for an instruction set.
struct GroupNormSiluKernels {
  void (*statistics)(const GroupNormSilu&, Rows x, Rows x2, float eps, float* mean, float* rstd);
  void (*activate)(const GroupNormSilu&, Rows x, Rows x2, const NormParameters&, Rows activation);
  // grad (of the activation) may be dx itself where there is no x2: an element is read before it is written.
  void (*backward)(const GroupNormSilu&, Rows x, Rows x2, Rows grad, const NormParameters&, Rows dx, Rows dx2,
                   float* dgamma, float* dbeta);
};

}  // namespace mm
