// LayerNorm over C of the tokens h = x + shift, its backward, and the residual around what comes between.
#pragma once

#include <cstdint>

#include "../data_type.h"

namespace mm {

// Element strides of R and T of a tensor (R, T, C); C is contiguous.
struct Tokens {
  void* data;
  int64_t r, t;
};

// shift is (R, C) or null, vectors are (C), statistics (R * T), all float32; inner tensors are (R * T, C), contiguous.
struct LayerNorm {
  int64_t R, T, C;
  DataType dtype;        // of x, y, dy and dx
  DataType inner_dtype;  // of what the norm gives and of its gradient
  float eps;
  int64_t block_tokens;  // tokens that one task of backward sums over
  int num_threads;
};

// One build of the kernels for an instruction set.
struct LayerNormKernels {
  // out = (h - mean) * rstd * weight + bias
  void (*forward)(const LayerNorm&, Tokens x, const float* shift, const float* weight, const float* bias, void* out,
                  float* mean, float* rstd);
  // dx = dy + gradient of h by dout; sums (blocks, 3, C): over a block's tokens, of the gradients of weight, bias, y.
  void (*backward)(const LayerNorm&, const void* dout, Tokens x, const float* shift, const float* weight,
                   const float* mean, const float* rstd, Tokens dy, Tokens dx, float* sums);
  // y = h + inner + bias
  void (*add_residual)(const LayerNorm&, Tokens x, const float* shift, const void* inner, const float* bias, Tokens y);
};

}  // namespace mm
