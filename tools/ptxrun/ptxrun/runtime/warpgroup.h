// Products of a warpgroup, four warps of 16 rows each, which read shared memory and write registers some time between
// their issue and the wait for them. Here that is at the wait, and what they write is NaN until then.
#pragma once
#include "matrix.h"

namespace ptxrun {

constexpr int DEPTH = 16;
constexpr int CHUNK_BYTES = 16;  // that lie together however shared memory is swizzled

// A matrix of 16-bit elements in shared memory. PTX ISA, "Matrix Descriptor Format".
struct Descriptor {
  u64 start, leading, stride, row_bytes;

  Descriptor(u64 bits, u64 swizzled_bytes)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        row_bytes(swizzled_bytes) {}

  // Where the chunk of eight elements from (row, k) is; a row is one of A or a column of B. Rows of row_bytes lie one
  // after the other in groups of eight; along them run k, or the matrix's rows where it is transposed.
  u64 chunk(int row, int k, bool is_transposed) const {
    const u64 along = u64(is_transposed ? row : k) * 2, across = u64(is_transposed ? k : row);
    const u64 address =
        start + along / row_bytes * leading + along % row_bytes + across % 8 * row_bytes + across / 8 * stride;
    return address ^ ((address >> 7 & (row_bytes / CHUNK_BYTES - 1)) << 4);
  }
};

inline Descriptor descriptor(const Warp& w, const Instruction& i, u64 bits) {
  const u64 swizzle = bits >> 62;  // 1: 128 bytes, 2: 64, 3: 32
  if (swizzle == 0 || bits >> 49 & 7)
    fault(w, i, "matrix descriptor %#llx: ptxrun knows swizzled matrices without a base offset", bits);
  return {bits, 256u >> swizzle};
}

// Calls use(row, k, chunk) for each chunk of a matrix of rows x 16, of which `first` is the first row to be read.
template <class Use>
void for_each_chunk(Warp& w, const Instruction& i, const Descriptor& matrix, bool is_transposed, int first, int rows,
                    Use use) {
  for (int row = first; row < first + rows; row += is_transposed ? 8 : 1)
    for (int k = 0; k < DEPTH; k += is_transposed ? 1 : 8)
      use(row, k, shared_pointer(w, i, matrix.chunk(row, k, is_transposed), CHUNK_BYTES, nullptr));
}

// The asynchronous proxy sees what was stored before a fence.proxy.async only.
inline void need_proxy_fence(Warp& w, const Instruction& i, const u8* chunk) {
  const Block& b = *w.block;
  for (size_t k = size_t(chunk - b.shared); b.flags & SHARED_RACES && k < size_t(chunk - b.shared) + CHUNK_BYTES; k++)
    if (b.shadow[k].writers && !(b.shadow[k].fenced >> w.id & 1))
      fault(w, i, "a matrix product reads byte %llu, stored without a fence.proxy.async since", k);
}

// The arguments: A's descriptor or -1, B's descriptor, does it add, signs of A and B, are A and B transposed, columns,
// the registers of D after their number, those of A after theirs where it is in registers.
struct Product {
  const s64* x;
  bool has_a_in_registers() const { return x[0] < 0; }
  int columns() const { return int(x[7]); }
  const s64* d() const { return x + 9; }
  const s64* a() const { return d() + columns() / 2 + 1; }
};

// A matrix of rows x 16 as float32, from the row `first` on; widened(bits) is an element's value.
template <class Widened>
std::vector<f32> read_matrix(Warp& w, const Instruction& i, const Descriptor& matrix, bool is_transposed, int first,
                             int rows, Widened widened) {
  std::vector<f32> found(size_t(rows * DEPTH));
  for_each_chunk(w, i, matrix, is_transposed, first, rows, [&](int row, int k, const u8* chunk) {
    for (int j = 0; j < 8; j++) {
      u16 bits;
      memcpy(&bits, chunk + 2 * j, 2);
      found[size_t((row - first + (is_transposed ? j : 0)) * DEPTH + k + (is_transposed ? 0 : j))] = widened(bits);
    }
  });
  return found;
}

template <class T>
void multiply_now(Warp& w, const PendingProduct& pending, f32* total) {
  const Instruction& i = *pending.instruction;
  const Product p{i.arguments};
  const auto widened = [](u16 bits) { return widen(T{bits}); };
  const int first = w.id % 4 * 16;
  std::vector<f32> A(16 * DEPTH);
  if (p.has_a_in_registers())
    for (int l = 0; l < LANES; l++)
      for (int j = 0; j < 8; j++)
        A[size_t((l / 4 + j / 2 % 2 * 8) * DEPTH + l % 4 * 2 + j % 2 + j / 4 * 8)] =
            Fragment<T>::element(w.at<u32>(p.a()[j / 2]), l, j % 2);
  else
    A = read_matrix(w, i, descriptor(w, i, pending.a), p.x[5], first, 16, widened);
  const std::vector<f32> B = read_matrix(w, i, descriptor(w, i, pending.b), p.x[6], 0, p.columns(), widened);
  const f32 sign = f32(p.x[3] * p.x[4]);
  for (int row = 0; row < 16; row++)
    for (int column = 0; column < p.columns(); column++) {
      f32 sum = 0;
      for (int k = 0; k < DEPTH; k++) sum += A[size_t(row * DEPTH + k)] * B[size_t(column * DEPTH + k)];
      f32& x = total[row * p.columns() + column];
      x = (pending.adds ? x : 0) + sign * sum;
    }
}

// Calls use(element of the warp's 16 x columns, register, lane): PTX ISA, "Register Fragments for wgmma.mma_async".
template <class Use>
void for_each_total(const Product& p, Use use) {
  for (int r = 0; r < p.columns() / 2; r++)
    for (int l = 0; l < LANES; l++)
      use((l / 4 + r / 2 % 2 * 8) * p.columns() + r / 4 * 8 + l % 4 * 2 + r % 2, p.d()[r], l);
}

// All four warps issue the same products in the same order.
inline void need_same_product(Warp& w, const Instruction& i, const IssuedProduct& issued) {
  if ((w.id | 3) >= w.block->num_warps) fault(w, i, "wgmma by a warp that is not one of four");
  std::vector<IssuedProduct>& all = w.block->issued[w.id / 4];
  if (w.num_issued == all.size()) all.push_back(issued);
  const IssuedProduct& first = all[w.num_issued++];
  if (first.line != issued.line || first.a != issued.a || first.b != issued.b)
    fault(w, i, "wgmma differs between the warps of a warpgroup: one is at line %llu", u64(first.line));
}

template <class T>
void multiply_later(Warp& w, const Instruction& i, const Mask& m) {
  need_whole_warp(w, i, m);
  if (!w.is_fenced) fault(w, i, "wgmma.mma_async without a wgmma.fence since its registers were in use");
  const Product p{i.arguments};
  const auto uniform = [&](s64 reference) {
    if (reference < 0) return u64(0);
    for (int l = 1; l < LANES; l++)
      if (w.at<u64>(reference)[l] != w.at<u64>(reference)[0]) fault(w, i, "lanes have different matrix descriptors");
    return w.at<u64>(reference)[0];
  };
  for (int k : {3, 4})
    if (p.x[k] != 1 && p.x[k] != -1) fault(w, i, "a sign of %llu, wanted 1 or -1", u64(p.x[k]));
  PendingProduct pending{&i,
                         uniform(p.x[0]),
                         uniform(p.x[1]),
                         lane_bits(read_predicate(w, p.x[2])) != 0,
                         w.product_group,
                         multiply_now<T>};
  need_same_product(w, i, {i.line, pending.a, pending.b});
  const auto check = [&](int, int, const u8* chunk) { need_proxy_fence(w, i, chunk); };
  if (!p.has_a_in_registers()) for_each_chunk(w, i, descriptor(w, i, pending.a), p.x[5], w.id % 4 * 16, 16, check);
  for_each_chunk(w, i, descriptor(w, i, pending.b), p.x[6], 0, p.columns(), check);
  std::vector<f32>& total = w.totals[p.d()[0]];
  const bool is_first = total.empty();
  total.resize(size_t(16 * p.columns()));
  for_each_total(p, [&](int element, s64 reference, int lane) {
    u32& bits = w.at<u32>(reference)[lane];
    if (is_first) total[size_t(element)] = bits_of<f32>(bits);
    bits = 0xffffffff;
  });
  w.products.push_back(pending);
  w.block->counts->mma += u64(p.columns() / 8);
  w.block->counts->mma_products += u64(16 * p.columns() * DEPTH);
}

inline void fence_registers(Warp& w, const Instruction& i, const Mask& m) {
  need_whole_warp(w, i, m);
  w.is_fenced = true;
}

inline void commit_products(Warp& w, const Instruction& i, const Mask& m) {
  need_whole_warp(w, i, m);
  w.product_group++;
}

// number of groups that may be pending.
inline void wait_for_products(Warp& w, const Instruction& i, const Mask& m) {
  need_whole_warp(w, i, m);
  size_t done = 0;
  while (done < w.products.size() && w.products[done].group < w.product_group - i.arguments[0]) done++;
  for (size_t k = 0; k < done; k++) {
    const PendingProduct& pending = w.products[k];
    const Product p{pending.instruction->arguments};
    std::vector<f32>& total = w.totals[p.d()[0]];
    pending.multiply(w, pending, total.data());
    bool is_last = true;
    for (size_t j = k + 1; j < w.products.size(); j++)
      is_last &= Product{w.products[j].instruction->arguments}.d()[0] != p.d()[0];
    if (!is_last) continue;
    for_each_total(p, [&](int element, s64 reference, int lane) {
      w.at<u32>(reference)[lane] = bits_of<u32>(total[size_t(element)]);
    });
    w.totals.erase(p.d()[0]);
  }
  w.products.erase(w.products.begin(), w.products.begin() + s64(done));
  w.is_fenced = false;
}

}  // namespace ptxrun
