// Sums over the pixels of a frame and over the channels of a group, for the backward of norm and SiLU; two inputs side
// by side.
//
// A block sums each of 64 channels over its split of a frame's pixels, and a second kernel adds up the splits in their
// order, in float32. No atomics: the same input gives the same bits.
#pragma once

#include "group_norm_silu_halo.cuh"

namespace mm::cuda {

// What a thread of a block reduces: eight channels from c of frame m, every kRows-th pixel of [first, last).
struct Share {
  int64_t m;
  int c, split, first, last;

  MM_DEVICE Share(const NormInput& in, int splits) {
    const int across = tiling::tiles(in.C + in.C2, slabs::kChannels), block = static_cast<int>(blockIdx.x);
    const int64_t pixels = static_cast<int64_t>(in.H) * in.W;
    m = block / across / splits, split = block / across % splits;
    c = block % across * slabs::kChannels + static_cast<int>(threadIdx.x) % 8 * 8;
    first = static_cast<int>(pixels * split / splits), last = static_cast<int>(pixels * (split + 1) / splits);
  }
  MM_DEVICE int own() const { return first + static_cast<int>(threadIdx.x) / 8; }
};

template <class T>
MM_DEVICE void load_eight(float (&values)[8], const uint16_t* from) {
  uint32_t words[4];
  load_16_bytes(words, from);
#pragma unroll
  for (int j = 0; j < 4; j++) unpack<T>(words[j], values[2 * j], values[2 * j + 1]);
}

MM_DEVICE Pair add(Pair a, Pair b) { return {a.first + b.first, a.second + b.second}; }

template <int MASK>
MM_DEVICE void add_lanes(Pair& own) {
  own = add(own, {exchange<MASK>(own.first), exchange<MASK>(own.second)});
}

// Adds up the block's rows of pixels and writes partial[m][split][c].
MM_DEVICE void add_rows(const NormInput& in, const Share& share, int splits, Pair (&own)[8], Pair* partial) {
  auto* pairs = reinterpret_cast<Pair*>(dynamic_shared());
#pragma unroll
  for (int j = 0; j < 8; j++) {
    add_lanes<8>(own[j]);
    add_lanes<16>(own[j]);
    if (lane() < 8) pairs[warp() * slabs::kChannels + lane() * 8 + j] = own[j];
  }
  __syncthreads();
  const int thread = threadIdx.x, c = share.c - thread % 8 * 8 + thread, channels = in.C + in.C2;
  if (thread >= slabs::kChannels || c >= channels) return;
  Pair sum = pairs[thread];
  for (int i = 1; i < slabs::kThreads / 32; i++) sum = add(sum, pairs[i * slabs::kChannels + thread]);
  partial[(share.m * splits + share.split) * channels + c] = sum;
}

// The sum of get(0) to get(items - 1) over the lanes of a warp: lane l takes l, l + 32, ... in order.
template <class Get>
MM_DEVICE Pair add_items(int items, Get get) {
  Pair sum = {};
  for (int i = lane(); i < items; i += 32) sum = add(sum, get(i));
  add_lanes<1>(sum);
  add_lanes<2>(sum);
  add_lanes<4>(sum);
  add_lanes<8>(sum);
  add_lanes<16>(sum);
  return sum;
}

}  // namespace mm::cuda
