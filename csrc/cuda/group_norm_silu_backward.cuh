// Backward of a = silu(z), z = xhat gamma + beta, xhat = (x - mean) rstd, from da:
//   dz = da silu'(z), dbeta = sum dz, dgamma = sum dz xhat,
//   dx = rstd (gamma dz - (sum_g gamma dz + xhat sum_g gamma dz xhat) / N), sums over the N values of a group.
#pragma once

#include "group_norm_reductions.cuh"

namespace mm::cuda {

// Of eight channels of a frame: xhat = x rstd + offset.
struct NormChannels {
  float rstd[8], offset[8], gamma[8], beta[8];

  MM_DEVICE NormChannels(const NormInput& in, int64_t m, int c) {
    const int of_group = (in.C + in.C2) / in.G;
    load_eight_floats(gamma, in.gamma + c);
    load_eight_floats(beta, in.beta + c);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int64_t group = m * in.G + (c + j) / of_group;
      rstd[j] = in.rstd[group], offset[j] = -in.mean[group] * rstd[j];
    }
  }
  // xhat and dz = da silu'(z) of channel j.
  MM_DEVICE Pair differentiate(int j, float x, float da) const {
    const float xhat = x * rstd[j] + offset[j], z = xhat * gamma[j] + beta[j];
    const float sigmoid = reciprocal(1.0f + exponential_2(-1.44269504f * z));
    return {xhat, da * sigmoid * (1.0f + z * (1.0f - sigmoid))};
  }
};

// partial[m][split][c] = sums of dz and dz xhat over a split's pixels.
template <class T>
__global__ void __launch_bounds__(slabs::kThreads) norm_backward_sums(NormInput in, NormBackward op, int splits) {
  const Share share(in, splits);
  Pair own[8] = {};
  if (share.c < in.C + in.C2) {
    const NormChannels norm(in, share.m, share.c);
    for (int p = share.own(); p < share.last; p += slabs::kRows) {
      float x[8], da[8];
      load_eight<T>(x, channels_of(in, share.m, p / in.W, p % in.W, share.c));
      load_eight<T>(da, element(op.da, share.m, p / in.W, p % in.W) + share.c);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const Pair xhat_dz = norm.differentiate(j, x[j], da[j]);
        own[j].first += xhat_dz.second;
        own[j].second += xhat_dz.second * xhat_dz.first;
      }
    }
  }
  add_rows(in, share, splits, own, op.partial);
}

// group_sums[m][g] = sums of gamma dz and gamma dz xhat over a group, one warp a block.
static __global__ void __launch_bounds__(32) norm_backward_groups(NormInput in, NormBackward op, int splits) {
  const int channels = in.C + in.C2, of_group = channels / in.G, c0 = blockIdx.x % in.G * of_group;
  const int64_t m = blockIdx.x / in.G;
  const Pair sums = add_items(splits * of_group, [&](int i) {
    const int c = c0 + i % of_group;
    const Pair sum = op.partial[(m * splits + i / of_group) * channels + c];
    return Pair{sum.first * in.gamma[c], sum.second * in.gamma[c]};
  });
  if (lane() == 0) op.group_sums[blockIdx.x] = sums;
}

// dgamma, dbeta of a channel from all frames and splits, one warp a block.
static __global__ void __launch_bounds__(32) norm_backward_parameters(NormInput in, NormBackward op, int splits) {
  const int64_t channels = in.C + in.C2;
  const Pair sums =
      add_items(static_cast<int>(in.M * splits), [&](int i) { return op.partial[i * channels + blockIdx.x]; });
  if (lane() != 0) return;
  op.dbeta[blockIdx.x] = sums.first, op.dgamma[blockIdx.x] = sums.second;
}

// dx and dx2.
template <class T>
__global__ void __launch_bounds__(slabs::kThreads) norm_backward_inputs(NormInput in, NormBackward op, int splits) {
  const Share share(in, splits);
  if (share.c >= in.C + in.C2) return;
  const NormChannels norm(in, share.m, share.c);
  const int of_group = (in.C + in.C2) / in.G;
  const float per_value = 1.0f / (static_cast<float>(in.H) * static_cast<float>(in.W) * static_cast<float>(of_group));
  float constant[8], slope[8];
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const Pair sums = op.group_sums[share.m * in.G + (share.c + j) / of_group];
    constant[j] = sums.first * per_value, slope[j] = sums.second * per_value;
  }
  for (int p = share.own(); p < share.last; p += slabs::kRows) {
    const int y = p / in.W, x0 = p % in.W;
    float x[8], da[8];
    load_eight<T>(x, channels_of(in, share.m, y, x0, share.c));
    load_eight<T>(da, element(op.da, share.m, y, x0) + share.c);
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const Pair xhat_dz = norm.differentiate(j, x[j], da[j]);
      x[j] = norm.rstd[j] * (norm.gamma[j] * xhat_dz.second - (constant[j] + xhat_dz.first * slope[j]));
    }
#pragma unroll
    for (int j = 0; j < 4; j++) words[j] = pack<T>(x[2 * j], x[2 * j + 1]);
    const uint16_t* to =
        share.c < in.C ? element(op.dx, share.m, y, x0) + share.c : element(op.dx2, share.m, y, x0) + (share.c - in.C);
    store_16_bytes(const_cast<uint16_t*>(to), words);
  }
}

}  // namespace mm::cuda
