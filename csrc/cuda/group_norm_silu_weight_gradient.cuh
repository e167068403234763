// dweight[tap][c][k] = sum over pixels of activated x at the tap's pixel times dy, on tensor cores, 3x3 or 3x1.
//
// A block owns 32 input and 160 output channels, all taps, and a share of the tiles of 8x16 pixels: it copies a halo
// tile of x, activates it once and multiplies it with dy for every tap. Each block writes its own partial sum; a second
// kernel adds the partial sums of all splits in their order. No atomics: the same input gives the same bits.
#pragma once

#include "group_norm_silu_halo.cuh"

namespace mm::cuda {

// Starts copying dy of half a tile, 64 pixels and 160 channels from k0; the caller commits.
MM_DEVICE void load_dy(const NormInput& in, const WeightGradient& op, const Place& place, int half, int k0,
                       uint16_t* stage) {
  constexpr int kChunks = tiling::kOutputs / 8;
#pragma unroll 1
  for (int i = threadIdx.x; i < tiling::kPixels / 2 * kChunks; i += tiling::kThreads) {
    const int pixel = i / kChunks, k = k0 + i % kChunks * 8;
    const int y = place.y + half * kHalfRows + pixel / tiling::kColumns, x = place.x + pixel % tiling::kColumns;
    const bool valid = y < in.H && x < in.W && k < op.K;
    const uint16_t* from = valid ? element(op.dy, place.m, y, x) + k : static_cast<const uint16_t*>(op.dy.data);
    copy_async(stage + pixel * tiling::kOutputPitch + i % kChunks * 8, from, valid ? 16 : 0);
  }
}

// sums += the products of one row of 16 pixels, for every tap: 16 input and 40 output channels of a warp.
template <class T, int TAPS>
MM_DEVICE void multiply_row(const uint16_t* halo, const uint16_t* dy, int row, float (&sums)[TAPS][kFragments][4]) {
  const OutputFragments b(dy + row % kHalfRows * tiling::kColumns * tiling::kOutputPitch);
  const int column = lane() % 8 + lane() / 16 * 8, chunk = warp() / kWarpsAcross * 2 + lane() / 8 % 2;
#pragma unroll
  for (int tap = 0; tap < TAPS; tap++) {
    uint32_t a[4];  // 16 input channels, 16 pixels
    load_matrices_transposed(a, halo + Halo<TAPS>::offset(Halo<TAPS>::pixel(row, column, tap), chunk));
    b.multiply_by<T>(a, sums[tap]);
  }
}

// Two lanes side by side hold two columns of two rows each; each gets four columns of one row and stores them.
template <int TAPS>
MM_DEVICE void store_sums(const WeightGradient& op, int channels, int c0, int k0, float* partial,
                          const float (&sums)[TAPS][kFragments][4]) {
  const int odd = lane() % 2, c = c0 + warp() / kWarpsAcross * 16 + lane() / 4 + odd * 8;
  const int k = k0 + warp() % kWarpsAcross * kWarpOutputs + lane() % 4 / 2 * 4;
#pragma unroll
  for (int tap = 0; tap < TAPS; tap++) {
#pragma unroll
    for (int i = 0; i < kFragments; i++) {
      const float (&s)[4] = sums[tap][i];
      const float first = exchange<1>(odd ? s[0] : s[2]), second = exchange<1>(odd ? s[1] : s[3]);
      const float row[4] = {odd ? first : s[0], odd ? second : s[1], odd ? s[2] : first, odd ? s[3] : second};
      if (c < channels && k + 8 * i < op.K)
        store_16_bytes(partial + (static_cast<int64_t>(tap) * channels + c) * op.K + k + 8 * i,
                       reinterpret_cast<const uint32_t (&)[4]>(row));
    }
  }
}

template <class T, int TAPS>
__global__ void __launch_bounds__(tiling::kThreads, 1) weight_gradient(NormInput in, WeightGradient op) {
  using Tile = Halo<TAPS>;
  auto* halo = reinterpret_cast<uint16_t*>(dynamic_shared());
  constexpr int kHaloElements = tiling::halo_bytes(TAPS) / 2, kStageElements = tiling::kGradientStageBytes / 2;
  auto* dy = halo + 2 * kHaloElements;
  auto* coefficients = reinterpret_cast<Coefficient*>(dy + 2 * kStageElements);

  const int channels = in.C + in.C2, block = static_cast<int>(blockIdx.x);
  const int across = tiling::tiles(op.K, tiling::kOutputs);
  const int down = tiling::tiles(channels, tiling::kChannels);
  const int k0 = block % across * tiling::kOutputs, c0 = block / across % down * tiling::kChannels;
  const int64_t split = block / across / down, tiles = tiling::picture_tiles(in);
  const int first = static_cast<int>(tiles * split / op.splits);
  const int num_tiles = static_cast<int>(tiles * (split + 1) / op.splits) - first;

  // One group an iteration of half a tile: the next half's dy, and at a tile's first half the next tile's halo.
  float sums[TAPS][kFragments][4] = {};
  Tile::load(in, place_of(in, first), c0, halo);
  load_dy(in, op, place_of(in, first), 0, k0, dy);
  copy_async_commit();
  Tile::load_coefficients(in, place_of(in, first).m, c0, coefficients);
  copy_async_wait<0>();
  __syncthreads();
  Tile::template activate<T>(in, place_of(in, first), coefficients, halo);
#pragma unroll 1
  for (int i = 0; i < 2 * num_tiles; i++) {
    const int half = i % 2, odd = i / 2 % 2, tile = first + i / 2;
    const bool is_last = i / 2 == num_tiles - 1;
    uint16_t* next = halo + (1 - odd) * kHaloElements;
    Coefficient* next_coefficients = coefficients + (1 - odd) * tiling::kChannels;
    copy_async_wait<0>();
    __syncthreads();
    if (half == 0 || !is_last)
      load_dy(in, op, place_of(in, tile + half), 1 - half, k0, dy + (1 - half) * kStageElements);
    if (half == 0 && !is_last) {
      Tile::load(in, place_of(in, tile + 1), c0, next);
      Tile::load_coefficients(in, place_of(in, tile + 1).m, c0, next_coefficients);
    }
    copy_async_commit();
    if (half == 1 && !is_last) Tile::template activate<T>(in, place_of(in, tile + 1), next_coefficients, next);
#pragma unroll 1
    for (int row = half * kHalfRows; row < (half + 1) * kHalfRows; row++)
      multiply_row<T, TAPS>(halo + odd * kHaloElements, dy + half * kStageElements, row, sums);
  }
  store_sums<TAPS>(op, channels, c0, k0, op.partial + split * TAPS * channels * op.K, sums);
}

// out[i] = the sum of partial[split][i] over the splits in order, four values a thread; count is a multiple of 4.
MM_DEVICE void add_splits_of(const float* partial, float* out, int64_t count, int splits, int64_t i) {
  float sum[4] = {};
  for (int split = 0; split < splits; split++) {
    uint32_t words[4];
    load_16_bytes(words, partial + split * count + i);
    const float (&value)[4] = reinterpret_cast<const float (&)[4]>(words);
#pragma unroll
    for (int j = 0; j < 4; j++) sum[j] += value[j];
  }
  store_16_bytes(out + i, reinterpret_cast<const uint32_t (&)[4]>(sum));
}

static __global__ void add_splits(const float* partial, float* out, int64_t count, int splits) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  if (i < count) add_splits_of(partial, out, count, splits, i);
}

}  // namespace mm::cuda
