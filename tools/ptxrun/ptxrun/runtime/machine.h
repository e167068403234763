// A block of warps, one encoded instruction, and what a launch counts.
#pragma once
#include <algorithm>
#include <cstdio>
#include <map>
#include <stdexcept>
#include <vector>

#include "values.h"

namespace ptxrun {

struct Fault : std::runtime_error {
  using runtime_error::runtime_error;
};

typedef s32 Mask __attribute__((vector_size(128)));  // -1 where a lane executes

struct Warp;
struct Instruction;
using Function = void (*)(Warp&, const Instruction&, const Mask&);

// arguments: register references and plain numbers, as the instruction's own function reads them. A reference is an
// offset in bytes into the warp's registers, a multiple of 64, plus a width (0: 16 bits, 1: 32, 2: 64, 3: predicate),
// plus 4 for a negated predicate; -1 is no register.
struct Instruction {
  Function run;
  const s64* arguments;
  s32 line;
  s32 predicate;  // a reference, or -1
  s32 ends_block;
};

enum Flag { SHARED_RACES = 1, GLOBAL_RACES = 2, BOUNDS = 4, COUNTS = 8 };

struct Counts {
  u64 global_loads, global_load_sectors, global_load_bytes;
  u64 global_stores, global_store_sectors, global_store_bytes;
  u64 shared_loads, shared_load_waves, shared_load_conflicts;
  u64 shared_stores, shared_store_waves, shared_store_conflicts;
  u64 mma, mma_products, barriers, async_copies;
};

struct Buffer {
  u64 first, last;
  std::vector<s32> shadow;
};

// Who touched a byte of shared memory since the last barrier that they share with everyone else, and which warps are
// behind a fence.proxy.async that came after its writers.
struct Shadow {
  u32 writers, readers, written, read, fenced;
};

struct Barrier {
  u32 arrived = 0;  // warps
  int threads = 0;
  int expected = 0;    // threads; 0 for the whole block
  u32 waiting = 0;     // warps
  u32 times[32] = {};  // at which each warp arrived
};

struct PendingCopy {
  u32 to;
  u64 from;
  int bytes, bytes_read, group;
};

// A warpgroup's product that has been issued; a and b are matrix descriptors, a is 0 where it is in registers.
struct PendingProduct {
  const Instruction* instruction;
  u64 a, b;
  bool adds;
  int group;
  void (*multiply)(Warp&, const PendingProduct&, f32* total);
};

struct IssuedProduct {
  s32 line;
  u64 a, b;
};

// Between the registers and tensor memory; values are those of a store.
struct PendingMove {
  const Instruction* instruction;
  u32 address;
  int split, count;
  const s64* registers;
  std::vector<u32> values;
};

// Who stored a word of tensor memory last, and when.
struct TensorWrite {
  int warp = -1;
  u32 time = 0;
};

// d and a are addresses in tensor memory or, for a, a matrix descriptor as b is.
struct PendingTensorProduct {
  const Instruction* instruction;
  u32 d;
  u64 a, b;
  u32 kind;
  bool adds, is_a_in_tensor_memory;
};

// committed: how many products of the block are done when it is arrived at, 0 for none.
struct MemoryBarrier {
  u32 phase = 0;
  size_t committed = 0;
};

struct Block {
  const std::vector<Instruction>* code;
  u8* shared;
  u32 shared_bytes;
  u8* local;
  u64 local_bytes;  // of one thread
  const u8* parameters;
  u64 parameter_bytes;
  std::vector<Buffer>* buffers;
  Counts* counts;
  u64* executed;  // times each instruction ran, by warps
  u64* lanes;     // and by threads
  int flags, number, num_warps;
  size_t last_buffer = 0;
  u32 time = 1;
  std::vector<Shadow> shadow;
  std::vector<u32> seen;  // [reader * num_warps + writer]: what happened before this time is known to the reader
  Barrier barriers[16];
  bool has_proxy_fences = false;
  std::vector<IssuedProduct> issued[8];  // by a warpgroup's first warp to come there
  std::vector<u32> tensor;               // [lane][column]
  std::vector<TensorWrite> tensor_writes;
  u32 tensor_columns = 0;
  std::vector<PendingTensorProduct> tensor_products;
  size_t num_finished = 0;
  std::map<u32, MemoryBarrier> memory_barriers;  // by where they are in shared memory
  std::vector<Warp>* warps;
};

struct Warp {
  Block* block;
  u8* registers;
  int id;
  s32 pc[LANES];
  Mask alive;
  Mask together;  // lanes that run the current block of instructions
  int waiting;    // for this barrier, or -1
  bool is_done;
  std::vector<PendingCopy> copies;
  int copy_group;
  std::vector<PendingProduct> products;
  std::map<s64, std::vector<f32>> totals;  // of pending products, by their first register
  int product_group;
  size_t num_issued;
  std::vector<PendingMove> tensor_loads, tensor_stores;
  bool is_fenced;

  template <class T>
  T* at(s64 reference) {
    return reinterpret_cast<T*>(registers + (reference & ~63ll));
  }
};

[[noreturn]] inline void fault(const Warp& w, const Instruction& i, const char* format, u64 a = 0, u64 b = 0,
                               u64 c = 0) {
  char what[256], where[400];
  snprintf(what, sizeof what, format, (unsigned long long)a, (unsigned long long)b, (unsigned long long)c);
  snprintf(where, sizeof where, "%s [block %d, warp %d, line %d]", what, w.block->number, w.id, i.line);
  throw Fault(where);
}

inline int num_lanes(const Mask& m) {
  int count = 0;
  for (int l = 0; l < LANES; l++) count -= m[l];
  return count;
}

inline u32 lane_bits(const Mask& m) {
  u32 bits = 0;
  for (int l = 0; l < LANES; l++) bits |= u32(m[l] & 1) << l;
  return bits;
}

inline Mask read_predicate(Warp& w, s64 reference) {
  Mask m;
  memcpy(&m, w.at<s32>(reference), sizeof m);
  return reference & 4 ? ~m : m;
}

// Writes lanes of one register from values of its own width.
template <class T>
void write(Warp& w, s64 reference, const T* values, const Mask& m) {
  if (reference < 0) return;
  T* d = w.at<T>(reference);
  for (int l = 0; l < LANES; l++) d[l] = m[l] ? values[l] : d[l];
}

// Reads a register of any width into 64-bit lanes, zero-extended.
inline void read_wide(Warp& w, s64 reference, u64* values) {
  switch (reference & 3) {
    case 0:
      for (int l = 0; l < LANES; l++) values[l] = w.at<u16>(reference)[l];
      break;
    case 2:
      for (int l = 0; l < LANES; l++) values[l] = w.at<u64>(reference)[l];
      break;
    default:
      for (int l = 0; l < LANES; l++) values[l] = w.at<u32>(reference)[l];
  }
}

// Writes 64-bit lanes, cut to the register's width.
inline void write_wide(Warp& w, s64 reference, const u64* values, const Mask& m) {
  if (reference < 0) return;
  switch (reference & 3) {
    case 0:
      for (int l = 0; l < LANES; l++)
        if (m[l]) w.at<u16>(reference)[l] = u16(values[l]);
      break;
    case 2:
      for (int l = 0; l < LANES; l++)
        if (m[l]) w.at<u64>(reference)[l] = values[l];
      break;
    default:
      for (int l = 0; l < LANES; l++)
        if (m[l]) w.at<u32>(reference)[l] = u32(values[l]);
  }
}

}  // namespace ptxrun
