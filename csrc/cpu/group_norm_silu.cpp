// Statistics, silu((x - mean) * rstd * gamma + beta), and the gradient of both; one task is a block of rows of a
// sample.
//
// Sums over rows go tile, block, sample, each in a fixed order: the bits do not depend on the number of threads.
#include "group_norm_silu.h"

#include "channels_last.h"
#include "parallel.h"

namespace mm::MM_ISA {
namespace {

constexpr float kLog2E = 1.44269504088896f;
constexpr int kTileRows = 16;  // summed in registers before they are added to the block's sums

// --- statistics

// Mean, less the block's first row, and sum of squared distances from it, for each channel over the rows of a block:
// tiles merged as Chan et al. Differences to a row are exact where the mean is far larger than the deviation.
template <class T>
void block_moments(const Block& block, const Rows& x, float* pivot, float* mean, float* squares) {
  const T* first_row = block.row<T>(x, block.begin);
  over_vectors(x.channels, [&](int64_t c, auto lanes) { lanes.store(pivot + c, lanes.load(first_row + c)); });
  for (int64_t first = block.begin; first < block.end; first += kTileRows) {
    const int count = static_cast<int>(smaller(kTileRows, block.end - first));
    const T* row[kTileRows];
    block.find_rows(x, first, count, row);
    const float before = static_cast<float>(first - block.begin), n = static_cast<float>(count);
    const float share = n / (before + n), inverse = 1.0f / n;
    over_vectors(x.channels, [&](int64_t c, auto lanes) {
      Vec sum = {}, tile_squares = {}, origin = lanes.load(pivot + c);
      for (int i = 0; i < count; i++) sum += lanes.load(row[i] + c) - origin;
      Vec tile_mean = sum * inverse;
      for (int i = 0; i < count; i++) {
        Vec distance = lanes.load(row[i] + c) - origin - tile_mean;
        tile_squares += distance * distance;
      }
      Vec delta = tile_mean - lanes.load(mean + c);
      lanes.store(mean + c, lanes.load(mean + c) + delta * share);
      lanes.store(squares + c, lanes.load(squares + c) + tile_squares + delta * delta * (before * share));
    });
  }
}

struct Moments {
  double mean, squares;
};

// Moments of `count` sets: set i has weight(i) elements and the moments at(i).
template <class Weight, class At>
MM_INLINE Moments merge(int64_t count, Weight weight, At at) {
  double elements = 0, sum = 0, squares = 0;
  for (int64_t i = 0; i < count; i++) {
    elements += weight(i);
    sum += weight(i) * at(i).mean;
  }
  const double mean = sum / elements;
  for (int64_t i = 0; i < count; i++) {
    const double distance = at(i).mean - mean;
    squares += at(i).squares + weight(i) * distance * distance;
  }
  return {mean, squares};
}

template <class T>
void run_statistics(const GroupNormSilu& op, Rows x, Rows x2, float eps, float* mean, float* rstd) {
  const int64_t blocks = num_blocks(op), group = op.C / op.G;
  Buffer<Moments> partial(op.M * blocks * op.G);
  parallel_tasks(
      op.M * blocks, op.num_threads, [&] { return Buffer<float>(3 * op.C); },
      [&](Buffer<float>& scratch, int64_t task) {
        const Block block(op, task, blocks);
        float *pivot = scratch.data, *channel_mean = pivot + op.C, *channel_squares = channel_mean + op.C;
        std::memset(channel_mean, 0, 2 * op.C * sizeof(float));
        block_moments<T>(block, x, pivot, channel_mean, channel_squares);
        const int64_t second = x.channels;
        if (x2.channels) block_moments<T>(block, x2, pivot + second, channel_mean + second, channel_squares + second);
        for (int64_t g = 0; g < op.G; g++)
          partial.data[task * op.G + g] = merge(
              group, [&](int64_t) { return double(block.rows()); },
              [&](int64_t i) {
                const int64_t c = g * group + i;
                return Moments{double(pivot[c]) + channel_mean[c], channel_squares[c]};
              });
      });
  const double elements = double(op.H * op.W) * group;
  for (int64_t m = 0; m < op.M; m++)
    for (int64_t g = 0; g < op.G; g++) {
      const Moments found = merge(
          blocks, [&](int64_t b) { return double(Block(op, b, blocks).rows() * group); },
          [&](int64_t b) { return partial.data[(m * blocks + b) * op.G + g]; });
      mean[m * op.G + g] = float(found.mean);
      rstd[m * op.G + g] = float(1.0 / __builtin_sqrt(found.squares / elements + eps));
    }
}

// --- activation

MM_INLINE Vec sigmoid(Vec z) {
  Vec e = exp2_nonpositive((z < 0.0f ? z : -z) * kLog2E);
  Vec one = splat(1.0f);
  return (z < 0.0f ? e : one) / (one + e);
}

// Mean, rstd, gamma and beta of one sample for each channel, so that rows are walked vector by vector.
struct Channels {
  int64_t C, m = -1;
  Buffer<float> memory;
  float *mean, *rstd, *gamma, *beta;

  explicit Channels(const GroupNormSilu& op)
      : C(op.C), memory(4 * op.C), mean(memory.data), rstd(mean + C), gamma(rstd + C), beta(gamma + C) {}

  void select(const GroupNormSilu& op, const NormParameters& norm, int64_t sample) {
    if (sample == m) return;
    m = sample;
    for (int64_t c = 0; c < C; c++) {
      const int64_t g = m * op.G + c / (C / op.G);
      mean[c] = norm.mean[g];
      rstd[c] = norm.rstd[g];
      gamma[c] = norm.gamma[c];
      beta[c] = norm.beta[c];
    }
  }
};

// One of the inputs as it stands in the joined channels.
struct Side {
  Rows x, dx;
  int64_t offset;
};

template <class T, class A>
void run_activate(const GroupNormSilu& op, Rows x, Rows x2, const NormParameters& norm, Rows activation) {
  const int64_t blocks = num_blocks(op);
  const Side sides[2] = {{x, {}, 0}, {x2, {}, x.channels}};
  parallel_tasks(
      op.M * blocks, op.num_threads, [&] { return Channels(op); },
      [&](Channels& channels, int64_t task) {
        const Block block(op, task, blocks);
        channels.select(op, norm, block.m);
        for (int64_t r = block.begin; r < block.end; r++)
          for (const Side& side : sides) {
            if (!side.x.channels) continue;
            const T* in = block.row<T>(side.x, r);
            A* out = block.row<A>(activation, r) + side.offset;
            const float *mean = channels.mean + side.offset, *rstd = channels.rstd + side.offset;
            const float *gamma = channels.gamma + side.offset, *beta = channels.beta + side.offset;
            over_vectors(side.x.channels, [&](int64_t c, auto lanes) {
              Vec u = (lanes.load(in + c) - lanes.load(mean + c)) * lanes.load(rstd + c);
              Vec z = u * lanes.load(gamma + c) + lanes.load(beta + c);
              lanes.store(out + c, z * sigmoid(z));
            });
          }
      });
}

// --- backward

// For one vector of channels: the normalised u and the gradient dz of z = u * gamma + beta.
template <class T, class A, class Lanes>
MM_INLINE Vec normalised_gradient(const T* x, const A* grad, const Channels& s, int64_t c, Lanes lanes, Vec& u) {
  u = (lanes.load(x) - lanes.load(s.mean + c)) * lanes.load(s.rstd + c);
  Vec z = u * lanes.load(s.gamma + c) + lanes.load(s.beta + c);
  Vec weight = sigmoid(z);
  return lanes.load(grad) * (weight + weight * z * (1.0f - weight));
}

// sums[c] += sum of dz, sums[C + c] += sum of dz * u over the rows of a block.
template <class T, class A>
void block_sums(const Block& block, const Side& side, const Rows& grad, const Channels& s, float* sums) {
  for (int64_t first = block.begin; first < block.end; first += kTileRows) {
    const int count = static_cast<int>(smaller(kTileRows, block.end - first));
    const T* row[kTileRows];
    const A* grad_row[kTileRows];
    block.find_rows(side.x, first, count, row);
    block.find_rows(grad, first, count, grad_row);
    over_vectors(side.x.channels, [&](int64_t c, auto lanes) {
      const int64_t joined = side.offset + c;
      Vec sum = {}, dot = {};
      for (int i = 0; i < count; i++) {
        Vec u, dz = normalised_gradient(row[i] + c, grad_row[i] + joined, s, joined, lanes, u);
        sum += dz;
        dot += dz * u;
      }
      lanes.store(sums + joined, lanes.load(sums + joined) + sum);
      lanes.store(sums + s.C + joined, lanes.load(sums + s.C + joined) + dot);
    });
  }
}

// dx = rstd * (gamma * dz - shift - u * slope), where shift and slope are means over the sample and group.
template <class T, class A>
void block_gradient(const Block& block, const Side& side, const Rows& grad, const Channels& s, const float* shift,
                    const float* slope) {
  for (int64_t r = block.begin; r < block.end; r++) {
    const T* x = block.row<T>(side.x, r);
    const A* grad_row = block.row<A>(grad, r) + side.offset;
    T* dx = block.row<T>(side.dx, r);
    over_vectors(side.x.channels, [&](int64_t c, auto lanes) {
      const int64_t joined = side.offset + c;
      Vec u, dz = normalised_gradient(x + c, grad_row + c, s, joined, lanes, u);
      Vec inner = lanes.load(s.gamma + joined) * dz - lanes.load(shift + joined);
      inner -= u * lanes.load(slope + joined);
      lanes.store(dx + c, inner * lanes.load(s.rstd + joined));
    });
  }
}

// Adds up the blocks of each sample: dgamma and dbeta over all samples, and each sample's (shift, slope), 2 C each.
void reduce_sums(const GroupNormSilu& op, const float* partial, const float* gamma, float* dgamma, float* dbeta,
                 float* coefficients) {
  const int64_t blocks = num_blocks(op), group = op.C / op.G, C = op.C;
  const double inverse = 1.0 / (double(op.H * op.W) * group);
  Buffer<double> memory(4 * C);
  double *sum = memory.data, *total = memory.data + 2 * C;
  for (int64_t m = 0; m < op.M; m++) {
    for (int64_t c = 0; c < 2 * C; c++) sum[c] = 0;
    for (int64_t b = 0; b < blocks; b++)
      for (int64_t c = 0; c < 2 * C; c++) sum[c] += partial[(m * blocks + b) * 2 * C + c];
    for (int64_t c = 0; c < 2 * C; c++) total[c] += sum[c];
    for (int64_t half = 0; half < 2; half++)
      for (int64_t g = 0; g < op.G; g++) {
        double weighted = 0;
        for (int64_t c = g * group; c < (g + 1) * group; c++) weighted += gamma[c] * sum[half * C + c];
        for (int64_t c = g * group; c < (g + 1) * group; c++)
          coefficients[(2 * m + half) * C + c] = float(weighted * inverse);
      }
  }
  for (int64_t c = 0; c < C; c++) {
    dbeta[c] = float(total[c]);
    dgamma[c] = float(total[C + c]);
  }
}

template <class T, class A>
void run_backward(const GroupNormSilu& op, Rows x, Rows x2, Rows grad, const NormParameters& norm, Rows dx, Rows dx2,
                  float* dgamma, float* dbeta) {
  const int64_t blocks = num_blocks(op), tasks = op.M * blocks;
  const Side sides[2] = {{x, dx, 0}, {x2, dx2, x.channels}};
  Buffer<float> partial(tasks * 2 * op.C), coefficients(op.M * 2 * op.C);
  auto each_side = [&](Channels& channels, int64_t task, auto run) {
    const Block block(op, task, blocks);
    channels.select(op, norm, block.m);
    for (const Side& side : sides)
      if (side.x.channels) run(block, side);
  };
  parallel_tasks(
      tasks, op.num_threads, [&] { return Channels(op); },
      [&](Channels& channels, int64_t task) {
        each_side(channels, task, [&](const Block& block, const Side& side) {
          block_sums<T, A>(block, side, grad, channels, partial.data + task * 2 * op.C);
        });
      });
  reduce_sums(op, partial.data, norm.gamma, dgamma, dbeta, coefficients.data);
  parallel_tasks(
      tasks, op.num_threads, [&] { return Channels(op); },
      [&](Channels& channels, int64_t task) {
        each_side(channels, task, [&](const Block& block, const Side& side) {
          const float* shift = coefficients.data + 2 * block.m * op.C;
          block_gradient<T, A>(block, side, grad, channels, shift, shift + op.C);
        });
      });
}

// Calls function(T{}, A{}) with the storage types of the inputs and of the activation.
template <class Function>
void with_types(const GroupNormSilu& op, Function function) {
  const bool is_wide = op.activation == DataType::kFloat32;
  switch (op.dtype) {
    case DataType::kFloat32: return function(float{}, float{});
    case DataType::kBFloat16: return is_wide ? function(BFloat16{}, float{}) : function(BFloat16{}, BFloat16{});
    case DataType::kFloat16: return is_wide ? function(Float16{}, float{}) : function(Float16{}, Float16{});
  }
}

}  // namespace

extern const GroupNormSiluKernels kGroupNormSilu = {
    [](const GroupNormSilu& op, Rows x, Rows x2, float eps, float* mean, float* rstd) {
      with_types(op, [&](auto type, auto) { run_statistics<decltype(type)>(op, x, x2, eps, mean, rstd); });
    },
    [](const GroupNormSilu& op, Rows x, Rows x2, const NormParameters& norm, Rows activation) {
      with_types(
          op, [&](auto type, auto wide) { run_activate<decltype(type), decltype(wide)>(op, x, x2, norm, activation); });
    },
    [](const GroupNormSilu& op, Rows x, Rows x2, Rows grad, const NormParameters& norm, Rows dx, Rows dx2,
       float* dgamma, float* dbeta) {
      with_types(op, [&](auto type, auto wide) {
        run_backward<decltype(type), decltype(wide)>(op, x, x2, grad, norm, dx, dx2, dgamma, dbeta);
      });
    },
};

}  // namespace mm::MM_ISA
