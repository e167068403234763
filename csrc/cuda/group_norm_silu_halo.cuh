// The activated input of a convolution in shared memory: a tile of pixels and the ring its taps reach into.
//
// Each 16-byte chunk is copied, normalised and activated in place by one thread, once; what lies outside the picture is
// zero, which is the padding after the activation. Both convolution kernels take all their taps from it.
#pragma once

#include "group_norm_silu_conv.h"
#include "tile.cuh"

namespace mm::cuda {

// z = x * scale + offset is the normalised value of a channel.
struct Coefficient {
  float scale, offset;
};

// Where a tile of pixels lies.
struct Place {
  int64_t m;
  int y, x;
};

// The place of tile number `tile` of the picture; tiles run along x, then y, then m.
MM_DEVICE Place place_of(const NormInput& in, int tile) {
  const int across = tiling::tiles(in.W, tiling::kColumns), down = tiling::tiles(in.H, tiling::kRows);
  return {tile / across / down, tile / across % down * tiling::kRows, tile % across * tiling::kColumns};
}

MM_DEVICE float silu(float z) { return z * reciprocal(1.0f + exponential_2(-1.44269504f * z)); }

MM_DEVICE const uint16_t* element(const Frames& frames, int64_t m, int y, int x) {
  return static_cast<const uint16_t*>(frames.data) + m * frames.m + y * frames.h + x * frames.w;
}

// Eight channels from c, in x or in x2 behind it.
MM_DEVICE const uint16_t* channels_of(const NormInput& in, int64_t m, int y, int x, int c) {
  return c < in.C ? element(in.x, m, y, x) + c : element(in.x2, m, y, x) + (c - in.C);
}

// Eight float32 at an address of whole 16 bytes.
MM_DEVICE void load_eight_floats(float (&value)[8], const float* from) {
#pragma unroll
  for (int j = 0; j < 8; j += 4) {
    uint32_t words[4];
    load_16_bytes(words, from + j);
#pragma unroll
    for (int i = 0; i < 4; i++) value[j + i] = reinterpret_cast<const float (&)[4]>(words)[i];
  }
}

// A block's eight warps: two over rows of pixels or input channels, four over 40 output channels each.
constexpr int kWarpsAcross = 4;
constexpr int kWarpOutputs = tiling::kOutputs / kWarpsAcross;
constexpr int kFragments = kWarpOutputs / 8;
constexpr int kHalfRows = tiling::kRows / 2;

// The operand b of a product: 16 rows of memory, 40 output channels of this warp.
struct OutputFragments {
  uint32_t words[kFragments / 2][4], last[2];

  MM_DEVICE explicit OutputFragments(const uint16_t* rows) {
    const uint16_t* row = rows + lane() % 16 * tiling::kOutputPitch + warp() % kWarpsAcross * kWarpOutputs;
#pragma unroll
    for (int i = 0; i < kFragments / 2; i++) load_matrices_transposed(words[i], row + 16 * i + lane() / 16 * 8);
    load_matrices_transposed(last, row + kWarpOutputs - 8);
  }

  // sums += a times this.
  template <class T>
  MM_DEVICE void multiply_by(const uint32_t (&a)[4], float (&sums)[kFragments][4]) const {
#pragma unroll
    for (int i = 0; i < kFragments / 2; i++) {
      multiply<T>(sums[2 * i], a, words[i][0], words[i][1]);
      multiply<T>(sums[2 * i + 1], a, words[i][2], words[i][3]);
    }
    multiply<T>(sums[kFragments - 1], a, last[0], last[1]);
  }
};

// A halo tile of kChannels channels for 9 (3x3) or 3 (3x1) taps, of a block of kThreads threads.
template <int TAPS>
struct Halo {
  static constexpr int kRing = TAPS == 9 ? 1 : 0;  // columns beside the tile; there is always a row above and below
  static constexpr int kWidth = tiling::kColumns + 2 * kRing;
  static constexpr int kChunks = tiling::halo_pixels(TAPS) * tiling::kChannels / 8;
  static_assert(tiling::kThreads % 4 == 0, "a thread stays with one chunk of channels");

  // Eight pixels in a row have one chunk in eight different places of the banks.
  MM_DEVICE static int offset(int pixel, int chunk) {
    return pixel * tiling::kChannels + 8 * (chunk ^ (pixel / 2 % 4));
  }

  // The pixel of the halo that a tap reads for the tile's pixel (row, column).
  MM_DEVICE static int pixel(int row, int column, int tap) {
    return TAPS == 9 ? (row + tap / 3) * kWidth + column + tap % 3 : (row + tap) * kWidth + column;
  }

  MM_DEVICE static bool find(const NormInput& in, const Place& place, int pixel, int& y, int& x) {
    y = place.y + pixel / kWidth - 1, x = place.x + pixel % kWidth - kRing;
    return y >= 0 && y < in.H && x >= 0 && x < in.W;
  }

  // Starts copying channels c0 and on; the caller commits.
  MM_DEVICE static void load(const NormInput& in, const Place& place, int c0, uint16_t* halo) {
    const int c = c0 + static_cast<int>(threadIdx.x % 4) * 8;
#pragma unroll 1
    for (int i = threadIdx.x; i < kChunks; i += tiling::kThreads) {
      int y, x;
      const bool valid = find(in, place, i / 4, y, x) && c < in.C + in.C2;
      const void* from = valid ? channels_of(in, place.m, y, x, c) : in.x.data;
      copy_async(halo + offset(i / 4, i % 4), from, valid ? 16 : 0);
    }
  }

  // Coefficients of channels c0 and on of frame m; a barrier must come before `activate`.
  MM_DEVICE static void load_coefficients(const NormInput& in, int64_t m, int c0, Coefficient* coefficients) {
    const int c = c0 + static_cast<int>(threadIdx.x), channels = in.C + in.C2;
    if (in.mean == nullptr || threadIdx.x >= tiling::kChannels) return;
    Coefficient z = {0.0f, 0.0f};
    if (c < channels) {
      const int64_t group = m * in.G + c / (channels / in.G);
      z.scale = in.rstd[group] * in.gamma[c];
      z.offset = in.beta[c] - in.mean[group] * z.scale;
    }
    coefficients[threadIdx.x] = z;
  }

  // Activates the chunks that this thread copied and has waited for.
  template <class T>
  MM_DEVICE static void activate(const NormInput& in, const Place& place, const Coefficient* coefficients,
                                 uint16_t* halo) {
    if (in.mean == nullptr) return;
    const Coefficient* own = coefficients + threadIdx.x % 4 * 8;
#pragma unroll 1
    for (int i = threadIdx.x; i < kChunks; i += tiling::kThreads) {
      int y, x;
      if (!find(in, place, i / 4, y, x)) continue;
      uint16_t* chunk = halo + offset(i / 4, i % 4);
      uint32_t words[4];
      load_16_bytes_shared(words, chunk);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float low, high;
        unpack<T>(words[j], low, high);
        low = silu(low * own[2 * j].scale + own[2 * j].offset);
        high = silu(high * own[2 * j + 1].scale + own[2 * j + 1].offset);
        words[j] = pack<T>(low, high);
      }
      store_16_bytes_shared(chunk, words);
    }
  }
};

}  // namespace mm::cuda
