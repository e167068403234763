// What the CUDA kernels of group_norm_silu_conv take: pointers, shapes and strides.
#pragma once

#include <cstdint>

#include "../data_type.h"

#ifdef __CUDACC__
#define MM_HOST_DEVICE __host__ __device__
#else
#define MM_HOST_DEVICE
#endif

namespace mm {

// A tensor (M, H, W, channels) in a 2-byte type whose channels are contiguous; strides are in elements.
struct Frames {
  void* data;
  int64_t m, h, w;
};

// x and x2 side by side on the channel axis, (M, H, W, C + C2), and what normalises them; x2 is absent where C2 is 0.
struct NormInput {
  Frames x, x2;
  int64_t M;
  int H, W, C, C2, G;
  const float *mean, *rstd;   // (M, G); null: x is taken as it is, neither normalised nor activated
  const float *gamma, *beta;  // (C + C2)
};

// y (M, H, W, K) = conv(activated input) + bias + shift + residual.
struct Convolution {
  int K, taps;
  const void* weight;        // (taps, C + C2, K), contiguous
  const float* bias;         // (K) or null
  const float* shift;        // (M, H or 1, K) or null
  int64_t shift_m, shift_h;  // its strides; shift_h is 0 where one row serves every h
  Frames residual, y;        // the residual's data may be null
};

// partial (splits, taps, C + C2, K) float32: each split's sum over its share of the tiles of pixels.
struct WeightGradient {
  int K, taps, splits;
  Frames dy;  // (M, H, W, K)
  float* partial;
};

// Two sums of some values.
struct Pair {
  float first, second;
};

// The backward of the norm and the activation: from da (M, H, W, C + C2) to dx, dx2 and the parameters' gradients.
struct NormBackward {
  Frames da, dx, dx2;
  Pair* partial;          // (M, splits, C + C2): sums of dz and of dz times the normalised x
  Pair* group_sums;       // (M, G): the same times gamma, over a group
  float *dgamma, *dbeta;  // (C + C2)
};

// Shape of the convolution's blocks, for the launchers and for those who run the kernels without them.
namespace tiling {
constexpr int kRows = 8, kColumns = 16, kPixels = kRows * kColumns;  // output pixels of a tile
constexpr int kChannels = 32;                                        // input channels of a step
constexpr int kOutputs = 160;                                        // output channels of a block
constexpr int kOutputPitch = kOutputs + 8;                           // rows 16 bytes apart in the banks
constexpr int kThreads = 256, kWeightStages = 3;

MM_HOST_DEVICE constexpr int tiles(int size, int tile) { return (size + tile - 1) / tile; }
MM_HOST_DEVICE constexpr int halo_pixels(int taps) { return (kRows + 2) * (taps == 9 ? kColumns + 2 : kColumns); }
MM_HOST_DEVICE constexpr int halo_bytes(int taps) { return halo_pixels(taps) * kChannels * 2; }
constexpr int kCoefficientBytes = kChannels * 2 * 4;
constexpr int kWeightBytes = kChannels * kOutputPitch * 2;
constexpr int kGradientStageBytes = kPixels / 2 * kOutputPitch * 2;
constexpr int conv_shared_bytes(int taps) {
  return 2 * (halo_bytes(taps) + kCoefficientBytes) + kWeightStages * kWeightBytes;
}
constexpr int gradient_shared_bytes(int taps) {
  return 2 * (halo_bytes(taps) + kCoefficientBytes + kGradientStageBytes);
}

MM_HOST_DEVICE inline int64_t picture_tiles(const NormInput& in) {
  return in.M * tiles(in.H, kRows) * tiles(in.W, kColumns);
}
inline int64_t conv_blocks(const NormInput& in, int K) { return picture_tiles(in) * tiles(K, kOutputs); }
inline int64_t gradient_blocks(const NormInput& in, const WeightGradient& op) {
  return int64_t{tiles(in.C + in.C2, kChannels)} * tiles(op.K, kOutputs) * op.splits;
}
}  // namespace tiling

// The reductions' blocks: 64 channels, and a split of the pixels of one frame.
namespace slabs {
constexpr int kChannels = 64, kRows = 32, kThreads = kChannels / 8 * kRows;
constexpr int kSharedBytes = kThreads / 32 * kChannels * 8;

inline int64_t count(const NormInput& in) { return in.M * tiling::tiles(in.C + in.C2, kChannels); }
}  // namespace slabs
// Of which type the tensors are, and where the work goes; stream is a cudaStream_t.
struct Execution {
  DataType dtype;
  int device;
  void* stream;
};

// The launchers; a launch that fails is a std::runtime_error.
namespace cuda {

void group_norm_silu_conv(const NormInput& in, const Convolution& conv, const Execution& on);
// dweight (taps, C + C2, K) is the sum of the partial sums; with one split they are the same memory.
void group_norm_silu_weight_gradient(const NormInput& in, const WeightGradient& op, float* dweight,
                                     const Execution& on);
void group_norm_silu_backward(const NormInput& in, const NormBackward& op, int splits, const Execution& on);

}  // namespace cuda
}  // namespace mm
