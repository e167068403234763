// Attention over the frames of a pixel and head: one block owns one row of frames, (b, p, n), forward and backward.
//
// A warp owns 16 queries; keys come in TILES tiles of 8. The whole row is in shared memory and its scores in registers,
// so the softmax is an ordinary one, in float32, and every output is written once. An odd TILES means exactly that many
// tiles, F in (8 (TILES - 1), 8 TILES], so that nothing is computed past 72 frames; an even one takes every F up to
// 8 TILES, rounded up to 16. Frames past F are zeros in shared memory, have no probability as keys and are not stored.
#pragma once

#include "../temporal_attention.h"
#include "tile.cuh"

namespace mm::cuda {

struct AttentionShape {
  uint32_t P, N;
  int F, D;
  float scale;
};

constexpr float kLog2E = 1.4426950408889634f;

MM_BOTH constexpr int num_warps(int F) { return (F + 15) / 16; }
// Blocks at once on a multiprocessor that registers must allow: about this many warps with heads of 64.
MM_BOTH constexpr int least_blocks(int warps, int tiles, int columns) {
  return columns > 64 ? 1 : warps / num_warps(8 * tiles);
}
// Tiles of eight frames that are computed.
template <int TILES>
MM_BOTH constexpr int num_tiles(int F) {
  return TILES % 2 ? TILES : 2 * num_warps(F);
}

// The first frame of this block's row.
template <class T>
MM_DEVICE T* row_of(const Strided& x, const AttentionShape& shape) {
  const uint32_t n = blockIdx.x % shape.N, bp = blockIdx.x / shape.N;
  return static_cast<T*>(x.data) + bp / shape.P * x.b + bp % shape.P * x.p + n * x.n;
}

// Starts copying a row into a tile of 8 tiles frames by D columns, zero past F and past the true D.
template <class T, int D>
MM_DEVICE void copy_frames(T* tile, int tiles, const Strided& x, const AttentionShape& shape) {
  const T* row = row_of<T>(x, shape);
  for (int i = threadIdx.x; i < tiles * D; i += blockDim.x) {
    const int f = i / (D / 8), chunk = i % (D / 8);
    const bool is_inside = f < shape.F && 8 * chunk < shape.D;
    copy_async(tile + swizzled<D>(f, chunk), is_inside ? row + f * x.f + 8 * chunk : row, is_inside ? 16 : 0);
  }
}

// scores (16 x 8 tiles) = this warp's 16 frames of x times all frames of y: x y^T.
template <class T, int D, int TILES>
MM_DEVICE void multiply_by_transposed(float (&scores)[TILES][4], const T* x, const T* y, int tiles) {
  const int matrix = lane() / 8, row = lane() % 8;
  // A last warp with eight frames only reads them twice.
  const int f = min(16 * warp() + matrix % 2 * 8, 8 * tiles - 8) + row;
#pragma unroll
  for (int j = 0; j < TILES; j++)
    for (int e = 0; e < 4; e++) scores[j][e] = 0.0f;
#pragma unroll
  for (int chunk = 0; chunk < D / 8; chunk += 4) {
    uint32_t a[2][4];
    load_matrices(a[0], x + swizzled<D>(f, chunk + matrix / 2));
    load_matrices(a[1], x + swizzled<D>(f, chunk + matrix / 2 + 2));
#pragma unroll
    for (int j = 0; j < TILES; j++)
      if (j < tiles) {
        uint32_t b[4];
        load_matrices(b, y + swizzled<D>(8 * j + row, chunk + matrix));
        multiply<T>(scores[j], a[0], b[0], b[1]);
        multiply<T>(scores[j], a[1], b[2], b[3]);
      }
  }
}

// product (16 x D) = p (16 x frames, each tile's accumulators packed by rows) times the frames of y.
template <class T, int D, int TILES>
MM_DEVICE void multiply_by_frames(float (&product)[D / 8][4], const uint32_t (&p)[TILES][2], const T* y, int tiles) {
  const int matrix = lane() / 8, row = lane() % 8;
#pragma unroll
  for (int c = 0; c < D / 8; c++)
    for (int e = 0; e < 4; e++) product[c][e] = 0.0f;
#pragma unroll
  for (int j = 0; j + 1 < TILES; j += 2)
    if (j < tiles) {
      const uint32_t a[4] = {p[j][0], p[j][1], p[j + 1][0], p[j + 1][1]};
#pragma unroll
      for (int c = 0; c < D / 8; c += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, y + swizzled<D>(8 * j + matrix % 2 * 8 + row, c + matrix / 2));
        multiply<T>(product[c], a, b[0], b[1]);
        multiply<T>(product[c + 1], a, b[2], b[3]);
      }
    }
  if (TILES % 2) {
#pragma unroll
    for (int c = 0; c < D / 8; c += 4) {
      uint32_t b[4];
      load_matrices_transposed(b, y + swizzled<D>(8 * (TILES - 1) + row, c + matrix));
#pragma unroll
      for (int i = 0; i < 4; i++) multiply_8<T>(product[c + i], p[TILES - 1], b[i]);
    }
  }
}

// Sum or maximum of a row, which four lanes hold.
template <class Combine>
MM_DEVICE float over_quad(float x, Combine combine) {
  x = combine(x, exchange<1>(x));
  return combine(x, exchange<2>(x));
}

struct Add {
  MM_DEVICE float operator()(float x, float y) const { return x + y; }
};
struct Larger {
  MM_DEVICE float operator()(float x, float y) const { return fmaxf(x, y); }
};

// In place exp(scale * (s - the row's largest)), zero for keys past F; total is the sum of the lane's two rows.
template <int TILES>
MM_DEVICE void exponentiate(float (&s)[TILES][4], float (&total)[2], const AttentionShape& shape, int tiles) {
  float largest[2] = {-INFINITY, -INFINITY};
  total[0] = total[1] = 0.0f;
#pragma unroll
  for (int j = 0; j < TILES; j++)
    if (j < tiles)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const bool can_be_past = TILES % 2 == 0 || j == TILES - 1;
        const bool is_past = can_be_past && 8 * j + lane() % 4 * 2 + e % 2 >= shape.F;
        s[j][e] = is_past ? -INFINITY : s[j][e] * (shape.scale * kLog2E);
        largest[e / 2] = fmaxf(largest[e / 2], s[j][e]);
      }
  for (float& x : largest) x = over_quad(x, Larger());
#pragma unroll
  for (int j = 0; j < TILES; j++)
    if (j < tiles)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        s[j][e] = exponential_2(s[j][e] - largest[e / 2]);
        total[e / 2] += s[j][e];
      }
  for (float& x : total) x = over_quad(x, Add());
}

template <class T, int TILES>
MM_DEVICE void pack_tiles(uint32_t (&packed)[TILES][2], const float (&x)[TILES][4]) {
#pragma unroll
  for (int j = 0; j < TILES; j++)
    for (int half = 0; half < 2; half++) packed[j][half] = pack<T>(x[j][2 * half], x[j][2 * half + 1]);
}

// Writes this warp's 16 frames of a row, each times the factor of its half.
template <class T, int D>
MM_DEVICE void store_frames(const Strided& x, const float (&value)[D / 8][4], float upper, float lower,
                            const AttentionShape& shape) {
  T* row = row_of<T>(x, shape);
#pragma unroll
  for (int c = 0; c < D / 8; c += 4)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float factor = half ? lower : upper;
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        words[i] = pack<T>(value[c + i][2 * half] * factor, value[c + i][2 * half + 1] * factor);
      transpose_quad(words);
      const int f = 16 * warp() + 8 * half + lane() / 4, column = 8 * (c + lane() % 4);
      if (f < shape.F && column < shape.D) store_16_bytes(row + f * x.f + column, words);
    }
}

// Bytes of shared memory: the forward's q, k, v.
MM_BOTH constexpr int forward_shared_bytes(int tiles, int columns) { return 3 * 8 * tiles * columns * 2; }

template <class T, int D, int TILES>
__global__ void __launch_bounds__(32 * num_warps(8 * TILES), least_blocks(20, TILES, D))
    temporal_attention_forward_kernel(Strided q, Strided k, Strided v, Strided o, AttentionShape shape) {
  const int tiles = num_tiles<TILES>(shape.F);
  T* q_tile = reinterpret_cast<T*>(dynamic_shared());  // (8 tiles, D) each
  T* k_tile = q_tile + 8 * tiles * D;
  T* v_tile = k_tile + 8 * tiles * D;
  copy_frames<T, D>(q_tile, tiles, q, shape);
  copy_frames<T, D>(k_tile, tiles, k, shape);
  copy_async_commit();
  copy_frames<T, D>(v_tile, tiles, v, shape);
  copy_async_commit();

  copy_async_wait<1>();
  __syncthreads();
  float s[TILES][4], total[2];
  multiply_by_transposed<T, D>(s, q_tile, k_tile, tiles);
  exponentiate(s, total, shape, tiles);
  uint32_t p[TILES][2];
  pack_tiles<T>(p, s);

  copy_async_wait<0>();
  __syncthreads();
  float product[D / 8][4];
  multiply_by_frames<T, D>(product, p, v_tile, tiles);
  store_frames<T, D>(o, product, 1.0f / total[0], 1.0f / total[1], shape);
}

// Elements between two rows of probabilities: an odd number of 16-byte chunks, so that eight rows lie in eight banks.
MM_BOTH constexpr int score_stride(int tiles) { return 8 * (tiles | 1); }

// Writes this warp's 16 rows of scores, all but those past the last tile, to x (8 tiles, score_stride).
template <class T, int TILES>
MM_DEVICE void store_scores(T* x, const uint32_t (&packed)[TILES][2], int tiles) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int f = 16 * warp() + 8 * half + lane() / 4;
    if (f < 8 * tiles)
#pragma unroll
      for (int j = 0; j < TILES; j++)
        if (j < tiles)
          *reinterpret_cast<uint32_t*>(x + f * score_stride(tiles) + 8 * j + lane() % 4 * 2) = packed[j][half];
  }
}

// Of the transposed scores this warp's 16 rows, which are keys, packed as pack_tiles does.
template <class T, int TILES>
MM_DEVICE void load_transposed_scores(uint32_t (&packed)[TILES][2], const T* x, int tiles) {
  const int matrix = lane() / 8, row = lane() % 8;
  const T* column = x + min(16 * warp() + matrix % 2 * 8, 8 * tiles - 8);
#pragma unroll
  for (int j = 0; j + 1 < TILES; j += 2)
    if (j < tiles) {
      uint32_t r[4];
      load_matrices_transposed(r, column + (8 * j + matrix / 2 * 8 + row) * score_stride(tiles));
      packed[j][0] = r[0], packed[j][1] = r[1], packed[j + 1][0] = r[2], packed[j + 1][1] = r[3];
    }
  if (TILES % 2) load_matrices_transposed(packed[TILES - 1], column + (8 * (TILES - 1) + row) * score_stride(tiles));
}

// In place: p the probabilities, ds = p * (dp - sum(p * dp)) * scale, given exponentials p with their sums and dp in
// ds.
template <int TILES>
MM_DEVICE void differentiate(float (&p)[TILES][4], float (&ds)[TILES][4], const float (&total)[2], float scale,
                             int tiles) {
  const float factor[2] = {1.0f / total[0], 1.0f / total[1]};
  float delta[2] = {0.0f, 0.0f};
#pragma unroll
  for (int j = 0; j < TILES; j++)
    if (j < tiles)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        p[j][e] *= factor[e / 2];
        delta[e / 2] += p[j][e] * ds[j][e];
      }
  for (float& x : delta) x = over_quad(x, Add());
#pragma unroll
  for (int j = 0; j < TILES; j++)
    if (j < tiles)
#pragma unroll
      for (int e = 0; e < 4; e++) ds[j][e] = p[j][e] * (ds[j][e] - delta[e / 2]) * scale;
}

// Bytes of shared memory: q, k, do, and v, whose place the probabilities and the scores' gradients take afterwards.
MM_BOTH constexpr int backward_shared_bytes(int tiles, int columns) {
  const int frames = 8 * tiles, tile = frames * columns, scores = 2 * frames * score_stride(tiles);
  return 2 * (3 * tile + (scores > tile ? scores : tile));
}

template <class T, int D, int TILES>
__global__ void __launch_bounds__(32 * num_warps(8 * TILES), least_blocks(15, TILES, D))
    temporal_attention_backward_kernel(Strided q, Strided k, Strided v, Strided grad_o, Strided dq, Strided dk,
                                       Strided dv, AttentionShape shape) {
  const int tiles = num_tiles<TILES>(shape.F);
  T* q_tile = reinterpret_cast<T*>(dynamic_shared());  // (8 tiles, D) each
  T* k_tile = q_tile + 8 * tiles * D;
  T* do_tile = k_tile + 8 * tiles * D;
  T* v_tile = do_tile + 8 * tiles * D;
  T* p_tile = v_tile;  // (8 tiles, score_stride) each
  T* ds_tile = p_tile + 8 * tiles * score_stride(tiles);
  copy_frames<T, D>(q_tile, tiles, q, shape);
  copy_frames<T, D>(k_tile, tiles, k, shape);
  copy_async_commit();
  copy_frames<T, D>(do_tile, tiles, grad_o, shape);
  copy_frames<T, D>(v_tile, tiles, v, shape);
  copy_async_commit();

  copy_async_wait<1>();
  __syncthreads();
  float p[TILES][4], total[2];
  multiply_by_transposed<T, D>(p, q_tile, k_tile, tiles);
  exponentiate(p, total, shape, tiles);

  copy_async_wait<0>();
  __syncthreads();
  float ds[TILES][4];  // first dp
  multiply_by_transposed<T, D>(ds, do_tile, v_tile, tiles);
  uint32_t packed_p[TILES][2], packed_ds[TILES][2];
  differentiate(p, ds, total, shape.scale, tiles);
  pack_tiles<T>(packed_p, p);
  pack_tiles<T>(packed_ds, ds);
  __syncthreads();  // v has been read
  store_scores(p_tile, packed_p, tiles);
  store_scores(ds_tile, packed_ds, tiles);

  float product[D / 8][4];
  multiply_by_frames<T, D>(product, packed_ds, k_tile, tiles);
  store_frames<T, D>(dq, product, 1.0f, 1.0f, shape);
  __syncthreads();
  load_transposed_scores(packed_p, p_tile, tiles);
  multiply_by_frames<T, D>(product, packed_p, do_tile, tiles);
  store_frames<T, D>(dv, product, 1.0f, 1.0f, shape);
  load_transposed_scores(packed_ds, ds_tile, tiles);
  multiply_by_frames<T, D>(product, packed_ds, q_tile, tiles);
  store_frames<T, D>(dk, product, 1.0f, 1.0f, shape);
}

template <int VALUE>
struct Constant {
  static constexpr int value = VALUE;
};

// Calls call(columns, tiles) with the constants of the instantiation for F frames of head dim D: all that there are.
template <class Call>
auto with_instantiation(int64_t F, int64_t D, Call call) {
  const auto with_columns = [&](auto columns) {
    if (F <= 64) return call(columns, Constant<8>());
    if (F <= 72) return call(columns, Constant<9>());
    return call(columns, Constant<16>());
  };
  if (D <= 64) return with_columns(Constant<64>());
  return with_columns(Constant<128>());
}

}  // namespace mm::cuda
