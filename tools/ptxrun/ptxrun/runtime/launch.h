// Runs the blocks of a launch one after the other, the warps of a block to their next barrier in a chosen order.
#pragma once
#include <cstdlib>
#include <memory>

#include "bits.h"
#include "control.h"
#include "transfers.h"

namespace ptxrun {

// Registers that every warp has, in this order, 32 bits each.
enum Special {
  TID = 0,
  NTID = 3,
  CTAID = 6,
  NCTAID = 9,
  LANEID = 12,
  WARPID,
  LANEMASK_EQ,
  LANEMASK_LT,
  LANEMASK_LE,
  LANEMASK_GT,
  LANEMASK_GE,
  DYNAMIC_SHARED,
  NUM_SPECIAL
};

// What Python hands over; the same fields stand in ptxrun/launching.py.
struct Launch {
  const s64* instructions;  // {function, line, predicate, ends_block, first argument} of each
  const s64* arguments;
  u64 num_instructions;
  const u8* parameters;
  u64 parameter_bytes;
  const s64* constants;  // {reference, bits} of each
  u64 num_constants, register_bytes, shared_bytes, dynamic_shared_bytes, local_bytes;
  u32 grid[3], threads[3];
  const u64* blocks;
  u64 num_blocks;
  const u64* buffers;  // {first, last} of each
  u64 num_buffers;
  s64 order;
  s32 flags, num_warps;
  Counts* counts;
  u64 *executed, *lanes;
};

// Until the warp waits at a barrier or has ended.
inline void run_warp(Warp& w) {
  const auto& code = *w.block->code;
  while (w.waiting < 0) {
    s32 current = std::numeric_limits<s32>::max();
    for (int l = 0; l < LANES; l++)
      if (w.alive[l]) current = std::min(current, w.pc[l]);
    if (current == std::numeric_limits<s32>::max()) {
      w.is_done = true;
      return;
    }
    Mask together;
    for (int l = 0; l < LANES; l++) together[l] = w.alive[l] && w.pc[l] == current ? -1 : 0;
    for (bool is_end = false; !is_end; current++) {
      const Instruction& i = code[size_t(current)];
      is_end = i.ends_block;
      if (is_end)
        for (int l = 0; l < LANES; l++) w.pc[l] = together[l] ? current + 1 : w.pc[l];
      const Mask m = i.predicate < 0 ? together : together & read_predicate(w, i.predicate);
      const int count = num_lanes(m);
      if (count == 0) continue;
      w.block->executed[current]++;
      w.block->lanes[current] += u64(count);
      i.run(w, i, m);
    }
  }
}

inline void fill(Warp& w, int special, u32 value) {
  for (int l = 0; l < LANES; l++) w.at<u32>(special * 128)[l] = value;
}

inline void start_warp(Warp& w, const Launch& x, const u32* ctaid) {
  memset(w.registers, 0xff, x.register_bytes);
  w.alive = Mask{};
  w.waiting = -1;
  w.is_done = false;
  w.copies.clear();
  w.copy_group = 0;
  w.products.clear();
  w.totals.clear();
  w.tensor_loads.clear();
  w.tensor_stores.clear();
  w.product_group = 0;
  w.num_issued = 0;
  w.is_fenced = false;
  for (int k = 0; k < 3; k++) {
    fill(w, NTID + k, x.threads[k]);
    fill(w, CTAID + k, ctaid[k]);
    fill(w, NCTAID + k, x.grid[k]);
  }
  fill(w, WARPID, u32(w.id));
  fill(w, DYNAMIC_SHARED, u32(x.dynamic_shared_bytes));
  for (u32 l = 0; l < LANES; l++) {
    const u32 thread = u32(w.id) * LANES + l;
    w.pc[l] = 0;
    w.alive[l] = thread < x.threads[0] * x.threads[1] * x.threads[2] ? -1 : 0;
    w.at<u32>((TID + 0) * 128)[l] = thread % x.threads[0];
    w.at<u32>((TID + 1) * 128)[l] = thread / x.threads[0] % x.threads[1];
    w.at<u32>((TID + 2) * 128)[l] = thread / x.threads[0] / x.threads[1];
    w.at<u32>(LANEID * 128)[l] = l;
    w.at<u32>(LANEMASK_EQ * 128)[l] = 1u << l;
    w.at<u32>(LANEMASK_LT * 128)[l] = (1u << l) - 1;
    w.at<u32>(LANEMASK_LE * 128)[l] = (2u << l) - 1;
    w.at<u32>(LANEMASK_GT * 128)[l] = ~((2u << l) - 1);
    w.at<u32>(LANEMASK_GE * 128)[l] = ~((1u << l) - 1);
  }
  for (u64 k = 0; k < x.num_constants; k++) {
    const u64 bits = u64(x.constants[2 * k + 1]);
    u64 values[LANES];
    for (int l = 0; l < LANES; l++) values[l] = bits;
    write_wide(w, x.constants[2 * k], values, ~Mask{});
  }
}

// One block: rounds over its warps, forward, in reverse, or shuffled anew each round by a seed.
inline void run_block(Block& b, s64 order) {
  std::vector<int> turns;
  for (int k = 0; k < b.num_warps; k++) turns.push_back(order == 1 ? b.num_warps - 1 - k : k);
  u32 seed = u32(order) * 2654435761u + u32(b.number);
  for (;;) {
    for (size_t k = turns.size() - 1; order > 1 && k > 0; k--) {
      seed = seed * 1664525u + 1013904223u;
      std::swap(turns[k], turns[(seed >> 8) % (k + 1)]);
    }
    bool is_running = false, is_left = false;
    for (int k : turns) {
      Warp& w = (*b.warps)[size_t(k)];
      if (w.is_done || w.waiting >= 0) continue;
      run_warp(w);
      is_running = true;
      complete_barriers(b);
    }
    for (const Warp& w : *b.warps) is_left |= !w.is_done;
    if (!is_left) return;
    if (!is_running) throw Fault("deadlock: every warp of block " + std::to_string(b.number) + " waits at a barrier");
  }
}

inline void run_blocks(const Launch& x, const Function* functions) {
  std::vector<Instruction> code;
  for (u64 k = 0; k < x.num_instructions; k++) {
    const s64* i = x.instructions + 5 * k;
    code.push_back({functions[i[0]], x.arguments + i[4], s32(i[1]), s32(i[2]), s32(i[3])});
  }
  std::vector<Buffer> buffers;
  for (u64 k = 0; k < x.num_buffers; k++) {
    const u64 first = x.buffers[2 * k], last = x.buffers[2 * k + 1];
    buffers.push_back({first, last, std::vector<s32>(x.flags & GLOBAL_RACES ? (last - first) / 2 + 1 : 0)});
  }
  const auto aligned = [](u64 bytes) { return static_cast<u8*>(std::aligned_alloc(1024, (bytes / 1024 + 1) * 1024)); };
  using Memory = std::unique_ptr<u8, decltype(&std::free)>;
  const Memory registers(aligned(x.register_bytes * u64(x.num_warps)), std::free);
  const Memory shared(aligned(x.shared_bytes), std::free);
  const Memory local(aligned(x.local_bytes * LANES * u64(x.num_warps)), std::free);
  for (u64 k = 0; k < x.num_blocks; k++) {
    std::vector<Warp> warps(size_t(x.num_warps));
    Block b{};
    b.code = &code;
    b.shared = shared.get();
    b.shared_bytes = u32(x.shared_bytes);
    b.local = local.get();
    b.local_bytes = x.local_bytes;
    b.parameters = x.parameters;
    b.parameter_bytes = x.parameter_bytes;
    b.buffers = &buffers;
    b.counts = x.counts;
    b.executed = x.executed;
    b.lanes = x.lanes;
    b.flags = x.flags;
    b.number = int(x.blocks[k]);
    b.num_warps = x.num_warps;
    b.warps = &warps;
    b.shadow.assign(x.flags & SHARED_RACES ? x.shared_bytes : 0, Shadow{});
    b.seen.assign(size_t(x.num_warps * x.num_warps), 1);
    memset(b.shared, 0xff, x.shared_bytes);
    memset(b.local, 0xff, x.local_bytes * LANES * u64(x.num_warps));
    const u32 number = u32(x.blocks[k]);
    const u32 ctaid[3] = {number % x.grid[0], number / x.grid[0] % x.grid[1], number / x.grid[0] / x.grid[1]};
    for (int id = 0; id < x.num_warps; id++) {
      Warp& w = warps[size_t(id)];
      w.block = &b;
      w.id = id;
      w.registers = registers.get() + u64(id) * x.register_bytes;
      start_warp(w, x, ctaid);
    }
    run_block(b, x.order);
    if (b.tensor_columns) throw Fault("tensor memory is not freed at the end of block " + std::to_string(b.number));
  }
}

// 0, or 1 with the fault's text in message (512 bytes).
inline int run(const Launch& x, const Function* functions, char* message) {
  try {
    run_blocks(x, functions);
    return 0;
  } catch (const Fault& f) {
    snprintf(message, 512, "%s", f.what());
    return 1;
  }
}

}  // namespace ptxrun
