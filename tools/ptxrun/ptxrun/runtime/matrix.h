// Instructions of a whole warp on 8x8 tiles and 16x8 products.
#pragma once
#include "memory.h"

namespace ptxrun {

inline void need_whole_warp(Warp& w, const Instruction& i, const Mask& m) {
  if (num_lanes(m) != LANES) fault(w, i, "%llu active lanes where all 32 must take part", u64(num_lanes(m)));
}

struct tf32 {
  u32 bits;
};
inline f32 widen(tf32 x) { return tf32_operand(x.bits); }
inline f32 widen(f32 x) { return x; }

// A fragment's elements in registers, of PER elements each.
template <class T>
struct Fragment {
  static constexpr int PER = int(4 / sizeof(T));
  static f32 element(const u32* registers, int lane, int part) {
    T x;
    memcpy(&x, reinterpret_cast<const u8*>(registers + lane) + size_t(part) * sizeof(T), sizeof x);
    return widen(x);
  }
};

// D = A B + C of 16 x 8 x K, fragments as in PTX ISA, "Matrix Fragments for mma.m16n8k*": lane = 4 * group + t.
// The registers of d, a, b and c, each after their number.
template <class T, int K, class Accumulator>
void multiply_matrices(Warp& w, const Instruction& i, const Mask& m) {
  need_whole_warp(w, i, m);
  constexpr int PER = Fragment<T>::PER, NUM_A = 16 * K / LANES / PER, NUM_B = 8 * K / LANES / PER;
  constexpr int PER_C = Fragment<Accumulator>::PER, NUM_C = 4 / PER_C;
  const s64 *d = i.arguments + 1, *a = d + NUM_C + 1, *b = a + NUM_A + 1, *c = b + NUM_B + 1;
  f32 A[16][K], B[K][8], D[16][8], sum[16][8] = {};
  for (int l = 0; l < LANES; l++) {
    const int group = l / 4, t = l % 4;
    for (int r = 0; r < NUM_A; r++)
      for (int j = 0; j < PER; j++)
        A[group + 8 * (r % 2)][t * PER + j + 4 * PER * (r / 2)] = Fragment<T>::element(w.at<u32>(a[r]), l, j);
    for (int r = 0; r < NUM_B; r++)
      for (int j = 0; j < PER; j++) B[t * PER + j + 4 * PER * r][group] = Fragment<T>::element(w.at<u32>(b[r]), l, j);
    for (int k = 0; k < 4; k++)
      D[group + 8 * (k / 2)][t * 2 + k % 2] = Fragment<Accumulator>::element(w.at<u32>(c[k / PER_C]), l, k % PER_C);
  }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < K; k++)
      for (int column = 0; column < 8; column++) sum[row][column] += A[row][k] * B[k][column];
  for (int l = 0; l < LANES; l++)
    for (int k = 0; k < 4; k++) {
      const int row = l / 4 + 8 * (k / 2), column = l % 4 * 2 + k % 2;
      Accumulator x;
      if constexpr (IS_HALF<Accumulator>)
        x = narrow<Accumulator>(sum[row][column] + D[row][column]);
      else
        x = sum[row][column] + D[row][column];
      memcpy(reinterpret_cast<u8*>(w.at<u32>(d[k / PER_C]) + l) + size_t(k % PER_C) * sizeof x, &x, sizeof x);
    }
  w.block->counts->mma++;
  w.block->counts->mma_products += 16 * 8 * K;
}

// address, offset, is transposed, number of tiles, registers: tile k from the row addresses of lanes 8k to 8k+7.
template <bool IS_STORE>
void move_tiles(Warp& w, const Instruction& i, const Mask& m) {
  need_whole_warp(w, i, m);
  const bool is_transposed = i.arguments[2];
  u64 rows[LANES];
  read_addresses(w, i.arguments, rows);
  for (int k = 0; k < i.arguments[3]; k++) {
    u64 tile_rows[LANES] = {};
    Mask lanes = {};
    for (int r = 0; r < 8; r++) tile_rows[r] = rows[8 * k + r], lanes[r] = -1;
    count_shared(w, tile_rows, lanes, 16, IS_STORE);
    u16 tile[8][8];
    u16* registers = w.at<u16>(i.arguments[4 + k]);
    const auto element = [&](int l, int j) -> u16& {
      const int row = l / 4, column = l % 4 * 2 + j;
      return is_transposed ? tile[column][row] : tile[row][column];
    };
    if (IS_STORE)
      for (int l = 0; l < LANES; l++)
        for (int j = 0; j < 2; j++) element(l, j) = registers[2 * l + j];
    for (int r = 0; r < 8; r++) {
      u8* bits = reinterpret_cast<u8*>(tile[r]);
      u8* p = shared_pointer(w, i, tile_rows[r], 16, IS_STORE ? bits : nullptr);
      IS_STORE ? memcpy(p, bits, 16) : memcpy(bits, p, 16);
    }
    if (!IS_STORE)
      for (int l = 0; l < LANES; l++)
        for (int j = 0; j < 2; j++) registers[2 * l + j] = element(l, j);
  }
}

// d, a: an 8x8 tile of 16-bit elements transposed between the registers of a warp.
inline void transpose_tile(Warp& w, const Instruction& i, const Mask& m) {
  need_whole_warp(w, i, m);
  const u16* a = w.at<u16>(i.arguments[1]);
  u16 tile[8][8];
  for (int l = 0; l < LANES; l++)
    for (int j = 0; j < 2; j++) tile[l / 4][l % 4 * 2 + j] = a[2 * l + j];
  u16* d = w.at<u16>(i.arguments[0]);
  for (int l = 0; l < LANES; l++)
    for (int j = 0; j < 2; j++) d[2 * l + j] = tile[l % 4 * 2 + j][l / 4];
}

}  // namespace ptxrun
