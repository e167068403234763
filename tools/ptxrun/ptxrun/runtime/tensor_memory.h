// Tensor memory, 128 lanes of columns of 32 bits, and what runs on it some time between its issue and the wait for it:
// products, which arrive at a barrier in shared memory, loads and stores. Here that is at the wait.
#pragma once
#include "warpgroup.h"

namespace ptxrun {

constexpr u32 TENSOR_COLUMNS = 512, FIRST_COLUMN = 32;  // an allocation does not begin at 0

// address: lane in the upper half, column in the lower. A block has one allocation at a time.
inline u32& tensor_word(Warp& w, const Instruction& i, u32 lane, u32 column) {
  Block& b = *w.block;
  if (column < FIRST_COLUMN || column >= FIRST_COLUMN + b.tensor_columns)
    fault(w, i, "tensor memory out of bounds: column %llu, allocated are %llu from %llu", column, b.tensor_columns,
          FIRST_COLUMN);
  return b.tensor[lane * TENSOR_COLUMNS + column];
}

inline u32 uniform(Warp& w, const Instruction& i, const Mask& m, const u64* values) {
  const int first = __builtin_ctz(lane_bits(m));
  for (int l = 0; l < LANES; l++)
    if (m[l] && values[l] != values[first]) fault(w, i, "lanes have different operands");
  return u32(values[first]);
}

inline u32 uniform_address(Warp& w, const Instruction& i, const Mask& m, const s64* operand) {
  u64 addresses[LANES];
  read_addresses(w, operand, addresses);
  return uniform(w, i, m, addresses);
}

inline u32 uniform_value(Warp& w, const Instruction& i, const Mask& m, s64 reference) {
  u64 values[LANES];
  read_wide(w, reference, values);
  return uniform(w, i, m, values);
}

// where (in shared memory) its address goes, offset, columns.
inline void allocate_tensor_memory(Warp& w, const Instruction& i, const Mask& m) {
  need_whole_warp(w, i, m);
  Block& b = *w.block;
  const u32 columns = uniform_value(w, i, m, i.arguments[2]), address = FIRST_COLUMN;
  if (b.tensor_columns) fault(w, i, "a second allocation of tensor memory");
  if (columns < 32 || columns & (columns - 1) || columns > TENSOR_COLUMNS - FIRST_COLUMN)
    fault(w, i, "%llu columns of tensor memory: ptxrun knows 32, 64, 128 and 256", columns);
  b.tensor.assign(size_t(128 * TENSOR_COLUMNS), 0xffffffff);
  b.tensor_writes.assign(b.tensor.size(), {});
  b.tensor_columns = columns;
  const u8* bits = reinterpret_cast<const u8*>(&address);
  memcpy(shared_pointer(w, i, uniform_address(w, i, m, i.arguments), 4, bits), bits, 4);
}

// address, columns.
inline void free_tensor_memory(Warp& w, const Instruction& i, const Mask& m) {
  need_whole_warp(w, i, m);
  Block& b = *w.block;
  const u32 address = uniform_value(w, i, m, i.arguments[0]), columns = uniform_value(w, i, m, i.arguments[1]);
  if (address != FIRST_COLUMN || columns != b.tensor_columns || !columns)
    fault(w, i, "freed are %llu columns at %#llx, which were not allocated", columns, address);
  b.tensor_columns = 0;
}

// Calls use(word, register, lane). Either a lane of the warp has one of tensor memory, or lanes 16 to 31 have the same
// 16 as lanes 0 to 15, `split` columns further.
template <class Use>
void for_each_word(Warp& w, const PendingMove& move, Use use) {
  const Instruction& i = *move.instruction;
  const u32 own = u32(w.id % 4 * LANES), first = move.address >> 16;
  const bool is_split = move.split >= 0;
  if (first != own && !(is_split && first == own + 16))
    fault(w, i, "tensor memory of lane %llu, this warp has 32 from %llu", first, own);
  for (int k = 0; k < move.count; k++)
    for (int l = 0; l < LANES; l++) {
      const u32 lane = first + u32(is_split ? l % 16 : l), column = u32(is_split ? l / 16 * move.split : 0) + u32(k);
      use(tensor_word(w, i, lane, (move.address & 0xffff) + column), move.registers[k], l);
    }
}

// address, offset, split or -1, the registers after their number. The registers are NaN until the wait.
inline void load_tensor_later(Warp& w, const Instruction& i, const Mask& m) {
  need_whole_warp(w, i, m);
  const s64* x = i.arguments;
  const PendingMove move{&i, uniform_address(w, i, m, x), int(x[2]), int(x[3]), x + 4, {}};
  for_each_word(w, move, [&](u32&, s64 reference, int lane) { w.at<u32>(reference)[lane] = 0xffffffff; });
  w.tensor_loads.push_back(move);
}

// address, offset, split or -1, the registers after their number. Tensor memory is NaN there until the wait.
inline void store_tensor_later(Warp& w, const Instruction& i, const Mask& m) {
  need_whole_warp(w, i, m);
  const s64* x = i.arguments;
  PendingMove move{&i, uniform_address(w, i, m, x), int(x[2]), int(x[3]), x + 4, {}};
  for_each_word(w, move, [&](u32& word, s64 reference, int lane) {
    move.values.push_back(w.at<u32>(reference)[lane]);
    word = 0xffffffff;
  });
  w.tensor_stores.push_back(move);
}

inline void wait_for_tensor_loads(Warp& w, const Instruction& i, const Mask& m) {
  need_whole_warp(w, i, m);
  for (const PendingMove& move : w.tensor_loads)
    for_each_word(w, move, [&](const u32& word, s64 reference, int lane) { w.at<u32>(reference)[lane] = word; });
  w.tensor_loads.clear();
}

inline void wait_for_tensor_stores(Warp& w, const Instruction& i, const Mask& m) {
  need_whole_warp(w, i, m);
  for (const PendingMove& move : w.tensor_stores) {
    size_t k = 0;
    for_each_word(w, move, [&](u32& word, s64, int) {
      word = move.values[k++];
      w.block->tensor_writes[size_t(&word - w.block->tensor.data())] = {w.id, w.block->time};
    });
  }
  w.tensor_stores.clear();
}

// A descriptor of sm_100: the same fields, the swizzle spelled in other bits.
inline Descriptor tensor_descriptor(const Warp& w, const Instruction& i, u64 bits) {
  const u64 swizzle = bits >> 61;  // 2: 128 bytes, 4: 64, 6: 32
  if (swizzle == 0 || swizzle % 2 || (bits >> 46 & 7) != 1 || bits >> 49 & 0xfff)
    fault(w, i, "matrix descriptor %#llx: ptxrun knows swizzled matrices of version 1 without a base offset", bits);
  return {bits, 256u >> swizzle / 2};
}

// A word of a matrix at `address`: of 128 rows one in each lane, of 64 in the first or the last 16 of each warp's 32.
inline u32& tensor_element(Warp& w, const Instruction& i, u32 address, u32 rows, u32 row, u32 column) {
  const u32 first = address >> 16;
  if (first != 0 && !(rows == 64 && first == 16)) fault(w, i, "%llu rows from lane %llu of tensor memory", rows, first);
  const u32 lane = rows == 64 ? first + row / 16 * 32 + row % 16 : row;
  return tensor_word(w, i, lane, (address & 0xffff) + column);
}

struct TensorProduct {
  bool is_bf16, is_a_transposed, is_b_transposed;
  u32 columns, rows;

  // PTX ISA, "Instruction descriptor" of .kind::f16.
  TensorProduct(const Warp& w, const Instruction& i, u32 bits)
      : is_bf16(bits >> 7 & 1),
        is_a_transposed(bits >> 15 & 1),
        is_b_transposed(bits >> 16 & 1),
        columns((bits >> 17 & 63) * 8),
        rows((bits >> 24 & 31) * 16) {
    const u32 known = 1u << 4 | 1u << 7 | 1u << 10 | 1u << 15 | 1u << 16 | 63u << 17 | 31u << 24;
    if (bits & ~known || !(bits >> 4 & 1) || (bits >> 10 & 1) != (bits >> 7 & 1) || (rows != 64 && rows != 128))
      fault(w, i, "instruction descriptor %#llx: ptxrun knows 64 or 128 rows of f16 or bf16 into f32", bits);
  }
  f32 widened(u16 x) const { return is_bf16 ? widen(bf16{x}) : widen(f16{x}); }
};

inline void multiply_tensors_now(Warp& w, const PendingTensorProduct& pending) {
  const Instruction& i = *pending.instruction;
  const TensorProduct p(w, i, pending.kind);
  const auto widened = [&](u16 bits) { return p.widened(bits); };
  std::vector<f32> A(size_t(p.rows * DEPTH));
  if (pending.is_a_in_tensor_memory)
    for (u32 row = 0; row < p.rows; row++)
      for (u32 k = 0; k < DEPTH; k++)
        A[row * DEPTH + k] = p.widened(u16(tensor_element(w, i, u32(pending.a), p.rows, row, k / 2) >> k % 2 * 16));
  else
    A = read_matrix(w, i, tensor_descriptor(w, i, pending.a), p.is_a_transposed, 0, int(p.rows), widened);
  const std::vector<f32> B =
      read_matrix(w, i, tensor_descriptor(w, i, pending.b), p.is_b_transposed, 0, int(p.columns), widened);
  for (u32 row = 0; row < p.rows; row++)
    for (u32 column = 0; column < p.columns; column++) {
      f32 sum = 0;
      for (u32 k = 0; k < DEPTH; k++) sum += A[row * DEPTH + k] * B[column * DEPTH + k];
      u32& word = tensor_element(w, i, pending.d, p.rows, row, column);
      word = bits_of<u32>((pending.adds ? bits_of<f32>(word) : 0) + sum);
    }
}

// A product reads words of other warps behind a barrier only.
inline void need_stored(Warp& w, const Instruction& i, const u32& word) {
  const Block& b = *w.block;
  const TensorWrite& x = b.tensor_writes[size_t(&word - b.tensor.data())];
  if (b.flags & SHARED_RACES && x.warp >= 0 && !are_seen(w, 1u << x.warp, x.time))
    fault(w, i, "tensor memory RACE: a product reads what warp %llu has stored", u64(x.warp));
}

// d, offset, a's descriptor or its address and offset in tensor memory, b's descriptor, kind, does it add.
template <bool IS_A_IN_TENSOR_MEMORY>
void multiply_tensors_later(Warp& w, const Instruction& i, const Mask& m) {
  const s64 *x = i.arguments, *after_a = x + (IS_A_IN_TENSOR_MEMORY ? 4 : 3);
  if (num_lanes(m) != 1) fault(w, i, "tcgen05.mma by %llu threads: one issues it", u64(num_lanes(m)));
  const int lane = __builtin_ctz(lane_bits(m));
  const auto value = [&](s64 reference) {
    u64 values[LANES];
    read_wide(w, reference, values);
    return values[lane];
  };
  const u64 a = IS_A_IN_TENSOR_MEMORY ? uniform_address(w, i, m, x + 2) : value(x[2]);
  const PendingTensorProduct pending{&i,
                                     uniform_address(w, i, m, x),
                                     a,
                                     value(after_a[0]),
                                     u32(value(after_a[1])),
                                     read_predicate(w, after_a[2])[lane] != 0,
                                     IS_A_IN_TENSOR_MEMORY};
  const TensorProduct p(w, i, pending.kind);
  const auto check = [&](int, int, const u8* chunk) { need_proxy_fence(w, i, chunk); };
  for (u32 row = 0; row < p.rows; row++) {
    for (u32 k = 0; IS_A_IN_TENSOR_MEMORY && k < DEPTH / 2; k++)
      need_stored(w, i, tensor_element(w, i, u32(a), p.rows, row, k));
    for (u32 column = 0; column < p.columns; column++)
      need_stored(w, i, tensor_element(w, i, pending.d, p.rows, row, column));
  }
  if (!IS_A_IN_TENSOR_MEMORY)
    for_each_chunk(w, i, tensor_descriptor(w, i, a), p.is_a_transposed, 0, int(p.rows), check);
  for_each_chunk(w, i, tensor_descriptor(w, i, pending.b), p.is_b_transposed, 0, int(p.columns), check);
  w.block->tensor_products.push_back(pending);
  w.block->counts->mma += p.rows / 16 * p.columns / 8;
  w.block->counts->mma_products += p.rows * p.columns * DEPTH;
}

inline MemoryBarrier& memory_barrier(Warp& w, const Instruction& i, u32 address) {
  const auto found = w.block->memory_barriers.find(address);
  if (found == w.block->memory_barriers.end()) fault(w, i, "no mbarrier at %llu", address);
  shared_pointer(w, i, address, 8, nullptr);
  return found->second;
}

// Of an mbarrier, whose bits nobody may read.
inline void touch_memory_barrier(Warp& w, const Instruction& i, u32 address, u8 value) {
  u8 bits[8];
  memset(bits, value, sizeof bits);
  memcpy(shared_pointer(w, i, address, 8, bits), bits, sizeof bits);
}

// address, offset, arrivals of a phase.
inline void make_memory_barrier(Warp& w, const Instruction& i, const Mask& m) {
  const u32 address = uniform_address(w, i, m, i.arguments);
  if (num_lanes(m) != 1) fault(w, i, "mbarrier.init by %llu threads", u64(num_lanes(m)));
  if (uniform_value(w, i, m, i.arguments[2]) != 1) fault(w, i, "ptxrun knows mbarriers of one arrival");
  touch_memory_barrier(w, i, address, 0xfe);
  w.block->memory_barriers[address] = {};
}

// address, offset.
inline void end_memory_barrier(Warp& w, const Instruction& i, const Mask& m) {
  const u32 address = uniform_address(w, i, m, i.arguments);
  memory_barrier(w, i, address);
  touch_memory_barrier(w, i, address, 0xfd);
  w.block->memory_barriers.erase(address);
}

// address, offset: what has been issued will arrive there.
inline void commit_tensor_products(Warp& w, const Instruction& i, const Mask& m) {
  MemoryBarrier& barrier = memory_barrier(w, i, uniform_address(w, i, m, i.arguments));
  if (barrier.committed) fault(w, i, "a second commit to an mbarrier of one arrival");
  barrier.committed = w.block->num_finished + w.block->tensor_products.size();
}

// p, address, offset, parity: has the phase of that parity ended? Products that will end it do so now.
inline void wait_at_memory_barrier(Warp& w, const Instruction& i, const Mask& m) {
  Block& b = *w.block;
  MemoryBarrier& barrier = memory_barrier(w, i, uniform_address(w, i, m, i.arguments + 1));
  const u32 parity = uniform_value(w, i, m, i.arguments[3]);
  if (barrier.phase % 2 == parity) {
    if (!barrier.committed) fault(w, i, "deadlock: a wait at an mbarrier that nothing was committed to");
    while (b.num_finished < barrier.committed) {
      multiply_tensors_now(w, b.tensor_products.front());
      b.tensor_products.erase(b.tensor_products.begin());
      b.num_finished++;
    }
    barrier.committed = 0;
    barrier.phase++;
  }
  pred p[LANES];
  std::fill(p, p + LANES, -1);
  write(w, i.arguments[0], p, m);
}

}  // namespace ptxrun
