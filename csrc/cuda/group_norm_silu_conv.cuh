// y = conv(silu(group norm(x))) + bias + shift + residual on tensor cores, 3x3 or 3x1, an implicit matrix product.
//
// A block owns 8x16 pixels and 160 output channels. Per step of 32 input channels it copies the halo tile, activates it
// in place and takes every tap from it by ldmatrix at shifted pixels; the weights of a tap stream through a ring of
// three stages. Without statistics it is the plain convolution, which with flipped weights is the data gradient.
#pragma once

#include "group_norm_silu_halo.cuh"

namespace mm::cuda {

constexpr int kStagingPitch = tiling::kOutputs + 4;  // floats
// Cards with 100 KiB of shared memory hold one block of 55 KiB, so it may use all registers there.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kConvBlocks = 1;
#else
constexpr int kConvBlocks = 2;
#endif

// Starts copying weight[tap][c0 .. c0 + 31][k0 .. k0 + 159]; the caller commits.
MM_DEVICE void load_weights(const Convolution& conv, int channels, int tap, int c0, int k0, uint16_t* stage) {
  constexpr int kChunks = tiling::kOutputs / 8;
  const auto* weight = static_cast<const uint16_t*>(conv.weight);
#pragma unroll 1
  for (int i = threadIdx.x; i < tiling::kChannels * kChunks; i += tiling::kThreads) {
    const int c = c0 + i / kChunks, k = k0 + i % kChunks * 8;
    const bool valid = c < channels && k < conv.K;
    const int64_t at = (static_cast<int64_t>(tap) * channels + c) * conv.K + k;
    copy_async(stage + i / kChunks * tiling::kOutputPitch + i % kChunks * 8, weight + (valid ? at : 0), valid ? 16 : 0);
  }
}

// sums += one tap of one step: 64 pixels, 40 output channels and 32 input channels of a warp.
template <class T, class Tile>
MM_DEVICE void multiply_tap(const uint16_t* halo, const uint16_t* weights, int tap,
                            float (&sums)[kHalfRows][kFragments][4]) {
#pragma unroll
  for (int c = 0; c < tiling::kChannels; c += 16) {
    const OutputFragments b(weights + c * tiling::kOutputPitch);
#pragma unroll
    for (int row = 0; row < kHalfRows; row++) {
      const int pixel = Tile::pixel(warp() / kWarpsAcross * kHalfRows + row, lane() % 16, tap);
      uint32_t a[4];  // 16 pixels, 16 input channels
      load_matrices(a, halo + Tile::offset(pixel, c / 8 + lane() / 16));
      b.multiply_by<T>(a, sums[row]);
    }
  }
}

MM_DEVICE void add_eight_floats(float (&value)[8], const float* from) {
  float added[8];
  load_eight_floats(added, from);
#pragma unroll
  for (int j = 0; j < 8; j++) value[j] += added[j];
}

// Adds bias, shift and residual to eight output channels of a pixel and stores them.
template <class T>
MM_DEVICE void finish(const Convolution& conv, const Place& place, int y, int x, int k, const float* sums) {
  float value[8];
#pragma unroll
  for (int j = 0; j < 8; j++) value[j] = sums[j];
  if (conv.bias != nullptr) add_eight_floats(value, conv.bias + k);
  if (conv.shift != nullptr) add_eight_floats(value, conv.shift + place.m * conv.shift_m + y * conv.shift_h + k);
  uint32_t words[4];
  if (conv.residual.data != nullptr) {
    load_16_bytes(words, element(conv.residual, place.m, y, x) + k);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float low, high;
      unpack<T>(words[j], low, high);
      value[2 * j] += low, value[2 * j + 1] += high;
    }
  }
#pragma unroll
  for (int j = 0; j < 4; j++) words[j] = pack<T>(value[2 * j], value[2 * j + 1]);
  store_16_bytes(const_cast<uint16_t*>(element(conv.y, place.m, y, x) + k), words);
}

// Brings the sums through shared memory, half the tile at a time, into rows of eight channels.
//
// A half is four rows of 16 pixels, staging[row * 16 + column][output]; each of its four warps has 40 outputs of it.
// Of a row, fragment i of a warp lies in its lanes as the tensor cores leave it, with sums[row][i][j] in each:
//
//   output of the warp   8i + 0,1    8i + 2,3    8i + 4,5    8i + 6,7
//   column 0             lane 0      lane 1      lane 2      lane 3       j = 0, 1
//   ...                  ...
//   column 7             lane 28     lane 29     lane 30     lane 31
//   column 8             lane 0      lane 1      lane 2      lane 3       j = 2, 3
//   ...                  ...
//   column 15            lane 28     lane 29     lane 30     lane 31
template <class T>
MM_DEVICE void store_tile(const NormInput& in, const Convolution& conv, const Place& place, int k0,
                          const float (&sums)[kHalfRows][kFragments][4], float* staging) {
  constexpr int kChunks = tiling::kOutputs / 8;
  for (int half = 0; half < 2; half++) {
    __syncthreads();
    if (warp() / kWarpsAcross == half) {
#pragma unroll
      for (int row = 0; row < kHalfRows; row++) {
        float* to = staging + (row * tiling::kColumns + lane() / 4) * kStagingPitch +
                    warp() % kWarpsAcross * kWarpOutputs + lane() % 4 * 2;
#pragma unroll
        for (int i = 0; i < kFragments; i++) {
#pragma unroll
          for (int j = 0; j < 4; j++) to[j / 2 * 8 * kStagingPitch + 8 * i + j % 2] = sums[row][i][j];
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tiling::kPixels / 2 * kChunks; i += tiling::kThreads) {
      const int pixel = i / kChunks, k = k0 + i % kChunks * 8;
      const int y = place.y + half * kHalfRows + pixel / tiling::kColumns, x = place.x + pixel % tiling::kColumns;
      if (y < in.H && x < in.W && k < conv.K)
        finish<T>(conv, place, y, x, k, staging + pixel * kStagingPitch + i % kChunks * 8);
    }
  }
}

template <class T, int TAPS>
__global__ void __launch_bounds__(tiling::kThreads, kConvBlocks) convolve(NormInput in, Convolution conv) {
  using Tile = Halo<TAPS>;
  unsigned char* shared = dynamic_shared();
  auto* halo = reinterpret_cast<uint16_t*>(shared);
  constexpr int kHaloElements = tiling::halo_bytes(TAPS) / 2, kStageElements = tiling::kWeightBytes / 2;
  auto* weights = halo + 2 * kHaloElements;
  auto* coefficients = reinterpret_cast<Coefficient*>(weights + tiling::kWeightStages * kStageElements);

  const int across = tiling::tiles(conv.K, tiling::kOutputs);
  const int k0 = static_cast<int>(blockIdx.x) % across * tiling::kOutputs, channels = in.C + in.C2;
  const Place place = place_of(in, static_cast<int>(blockIdx.x) / across);
  const int last_step = (channels - 1) / tiling::kChannels;

  // One group an iteration: the weights of two iterations ahead, and at a step's first tap the next step's halo.
  Tile::load(in, place, 0, halo);
  load_weights(conv, channels, 0, 0, k0, weights);
  copy_async_commit();
  load_weights(conv, channels, 1, 0, k0, weights + kStageElements);
  copy_async_commit();
  Tile::load_coefficients(in, place.m, 0, coefficients);
  copy_async_wait<1>();
  __syncthreads();
  Tile::template activate<T>(in, place, coefficients, halo);

  float sums[kHalfRows][kFragments][4] = {};
  int stage = 0;
  for (int step = 0; step <= last_step; step++) {
    uint16_t* next = halo + (step + 1) % 2 * kHaloElements;
    Coefficient* next_coefficients = coefficients + (step + 1) % 2 * tiling::kChannels;
#pragma unroll 1
    for (int tap = 0; tap < TAPS; tap++) {
      copy_async_wait<1>();
      __syncthreads();
      const bool wraps = tap + 2 >= TAPS;
      if (!wraps || step < last_step)
        load_weights(conv, channels, wraps ? tap + 2 - TAPS : tap + 2, (step + wraps) * tiling::kChannels, k0,
                     weights + (stage + 2) % tiling::kWeightStages * kStageElements);
      if (tap == 0 && step < last_step) {
        Tile::load(in, place, (step + 1) * tiling::kChannels, next);
        Tile::load_coefficients(in, place.m, (step + 1) * tiling::kChannels, next_coefficients);
      }
      copy_async_commit();
      if (tap == TAPS - 1 && step < last_step) Tile::template activate<T>(in, place, next_coefficients, next);
      multiply_tap<T, Tile>(halo + step % 2 * kHaloElements, weights + stage * kStageElements, tap, sums);
      stage = (stage + 1) % tiling::kWeightStages;
    }
  }
  store_tile<T>(in, conv, place, k0, sums, reinterpret_cast<float*>(shared));
}

}  // namespace mm::cuda
