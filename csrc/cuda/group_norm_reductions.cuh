// GroupNorm's statistics over (H, W, C / G) of each frame, and the backward of norm and SiLU; two inputs side by side.
//
// x is read once: a block reduces each of 64 channels over its split of a frame's pixels, and a second kernel merges
// the channels of a group over all splits in their order. Means and squared distances merge by Chan's rule, in float32,
// so that nothing cancels. No atomics: the same input gives the same bits.
#pragma once

#include "group_norm_silu_halo.cuh"

namespace mm::cuda {

// first: mean, second: sum of squared distances from it (Chan, Golub, LeVeque 1979).
struct Moments {
  MM_DEVICE static Pair merge(Pair a, float count_a, Pair b, float count_b) {
    const float delta = b.first - a.first, share = count_b > 0 ? count_b / (count_a + count_b) : 0;
    return {a.first + delta * share, a.second + b.second + delta * delta * count_a * share};
  }
};

struct Sums {
  MM_DEVICE static Pair merge(Pair a, float, Pair b, float) { return {a.first + b.first, a.second + b.second}; }
};

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

template <class Rule, int MASK>
MM_DEVICE void merge_lanes(Pair& own, float& count) {
  const Pair other = {exchange<MASK>(own.first), exchange<MASK>(own.second)};
  const float other_count = exchange<MASK>(count);
  // Both lanes merge in the order of their numbers, so that both hold the same bits.
  own = lane() & MASK ? Rule::merge(other, other_count, own, count) : Rule::merge(own, count, other, other_count);
  count += other_count;
}

// Merges the block's rows of pixels and writes partial[m][split][c]; count is the number of this thread's pixels.
template <class Rule>
MM_DEVICE void merge_rows(const NormInput& in, const Share& share, int splits, Pair (&own)[8], float count,
                          Pair* partial) {
  auto* pairs = reinterpret_cast<Pair*>(dynamic_shared());
  auto* counts = reinterpret_cast<float*>(pairs + slabs::kThreads / 32 * slabs::kChannels);
  float total = 0;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    total = count;
    merge_lanes<Rule, 8>(own[j], total);
    merge_lanes<Rule, 16>(own[j], total);
    if (lane() < 8) pairs[warp() * slabs::kChannels + lane() * 8 + j] = own[j];
  }
  if (lane() == 0) counts[warp()] = total;
  __syncthreads();
  const int thread = threadIdx.x, c = share.c - thread % 8 * 8 + thread, channels = in.C + in.C2;
  if (thread >= slabs::kChannels || c >= channels) return;
  Pair merged = pairs[thread];
  float merged_count = counts[0];
  for (int i = 1; i < slabs::kThreads / 32; i++) {
    merged = Rule::merge(merged, merged_count, pairs[i * slabs::kChannels + thread], counts[i]);
    merged_count += counts[i];
  }
  partial[(share.m * splits + share.split) * channels + c] = merged;
}

// partial[m][split][c] = the moments of a channel over a split's pixels.
template <class T>
__global__ void __launch_bounds__(slabs::kThreads, 4) partial_moments(NormInput in, int splits, Pair* partial) {
  const Share share(in, splits);
  Pair own[8] = {};
  float count = 0;
  if (share.c < in.C + in.C2) {
#pragma unroll 4
    for (int p = share.own(); p < share.last; p += slabs::kRows) {
      float x[8];
      load_eight<T>(x, channels_of(in, share.m, p / in.W, p % in.W, share.c));
      count += 1;
      const float weight = reciprocal(count);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float delta = x[j] - own[j].first;
        own[j].first += delta * weight;
        own[j].second += delta * (x[j] - own[j].first);
      }
    }
  }
  merge_rows<Moments>(in, share, splits, own, count, partial);
}

// Merges items [0, count) over the lanes of a warp: lane l takes l, l + 32, ... in order. get(i, count) gives an item.
template <class Rule, class Get>
MM_DEVICE Pair merge_items(int items, float& total, Get get) {
  Pair merged = {};
  total = 0;
  for (int i = lane(); i < items; i += 32) {
    float count;
    const Pair item = get(i, count);
    merged = Rule::merge(merged, total, item, count);
    total += count;
  }
  merge_lanes<Rule, 1>(merged, total);
  merge_lanes<Rule, 2>(merged, total);
  merge_lanes<Rule, 4>(merged, total);
  merge_lanes<Rule, 8>(merged, total);
  merge_lanes<Rule, 16>(merged, total);
  return merged;
}

// mean, rstd (M, G) of block (m, g), one warp.
static __global__ void __launch_bounds__(32)
    group_statistics(NormInput in, int splits, const Pair* partial, float epsilon, float* mean, float* rstd) {
  const int channels = in.C + in.C2, of_group = channels / in.G, g = blockIdx.x % in.G;
  const int64_t m = blockIdx.x / in.G, pixels = static_cast<int64_t>(in.H) * in.W;
  float total;
  const Pair moments = merge_items<Moments>(splits * of_group, total, [&](int i, float& count) {
    const int64_t split = i / of_group;
    count = static_cast<float>(pixels * (split + 1) / splits - pixels * split / splits);
    return partial[(m * splits + split) * channels + g * of_group + i % of_group];
  });
  if (lane() != 0) return;
  mean[blockIdx.x] = moments.first;
  rstd[blockIdx.x] = 1.0f / sqrtf(moments.second / total + epsilon);
}

}  // namespace mm::cuda
