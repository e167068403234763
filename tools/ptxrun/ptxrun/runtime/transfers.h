// Asynchronous copies to shared memory, and read-modify-write of memory.
#pragma once
#include "arithmetic.h"
#include "memory.h"

namespace ptxrun {

// to, offset, from, offset, bytes, bytes to read (a register) or -1, predicate that reads nothing or -1.
// What is being copied is NaN until it is waited for, so that a wait that is too weak shows in the result.
inline void copy_async(Warp& w, const Instruction& i, const Mask& m) {
  const s64* x = i.arguments;
  const int bytes = int(x[4]);
  u64 to[LANES], from[LANES], sizes[LANES];
  read_addresses(w, x, to);
  read_addresses(w, x + 2, from);
  if (x[5] >= 0) read_wide(w, x[5], sizes);
  const Mask is_ignored = x[6] < 0 ? Mask{} : read_predicate(w, x[6]);
  Mask reads = m;
  u8 poison[16];
  memset(poison, 0xff, sizeof poison);
  for (int l = 0; l < LANES; l++) {
    sizes[l] = is_ignored[l] ? 0 : x[5] < 0 ? u64(bytes) : sizes[l];
    if (sizes[l] == 0) reads[l] = 0;
    if (m[l] && sizes[l] > u64(bytes)) fault(w, i, "cp.async reads %llu bytes of %llu", sizes[l], u64(bytes));
  }
  count_shared(w, to, m, bytes, true);
  if (num_lanes(reads)) count_global(w, from, reads, bytes, false);
  for (int l = 0; l < LANES; l++) {
    if (!m[l]) continue;
    memset(shared_pointer(w, i, to[l], bytes, poison), 0xff, size_t(bytes));
    if (reads[l] && from[l] % u64(bytes)) fault(w, i, "misaligned cp.async: from %#llx, size %llu", from[l], bytes);
    if (reads[l]) global_pointer(w, i, from[l], int(sizes[l]), READ);
    w.copies.push_back({u32(to[l]), from[l], bytes, int(sizes[l]), w.copy_group});
  }
  w.block->counts->async_copies++;
}

inline void commit_copies(Warp& w, const Instruction&, const Mask&) { w.copy_group++; }

inline void wait_for_copies(Warp& w, const Instruction& i, int pending) {
  std::vector<PendingCopy> left;
  for (const PendingCopy& x : w.copies) {
    if (x.group >= w.copy_group - pending) {
      left.push_back(x);
      continue;
    }
    u8 arrived[16] = {};
    memcpy(arrived, reinterpret_cast<const u8*>(x.from), size_t(x.bytes_read));
    memcpy(shared_pointer(w, i, x.to, x.bytes, arrived), arrived, size_t(x.bytes));
  }
  w.copies.swap(left);
}

// number of groups that may be pending.
inline void wait_group(Warp& w, const Instruction& i, const Mask&) { wait_for_copies(w, i, int(i.arguments[0])); }

inline void wait_all(Warp& w, const Instruction& i, const Mask&) {
  w.copy_group++;
  wait_for_copies(w, i, 0);
}

PTXRUN_OPERATION(Exchange, b)
PTXRUN_OPERATION(CompareAndSwap, a == b ? c : a)
PTXRUN_OPERATION(Increment, a >= b ? 0 : a + 1)
PTXRUN_OPERATION(Decrement, a == 0 || a > b ? b : a - 1)

// d or -1, address, offset, b, c or -1, space: memory becomes Op(memory, b, c), d what it was.
template <class Op, class T>
void atomic(Warp& w, const Instruction& i, const Mask& m) {
  const s64* x = i.arguments;
  const int space = int(x[5]);
  u64 addresses[LANES];
  read_addresses(w, x + 1, addresses);
  const T *b = w.at<T>(x[3]), *c = x[4] < 0 ? b : w.at<T>(x[4]);
  T old[LANES];
  count_access(w, space, addresses, m, sizeof(T), true);
  for (int l = 0; l < LANES; l++) {
    if (!m[l]) continue;
    u64 address = addresses[l];
    const int where = space == GENERIC ? resolve(w, l, address) : space;
    if (where == SHARED && address + sizeof(T) > w.block->shared_bytes)
      fault(w, i, "shared access out of bounds: offset %llu", address);
    if (address % sizeof(T)) fault(w, i, "misaligned atomic: %#llx, size %llu", address, sizeof(T));
    u8* p = where == SHARED ? w.block->shared + address : global_pointer(w, i, address, sizeof(T), ATOMIC);
    memcpy(&old[l], p, sizeof(T));
    const T updated = store_value<T>(Op::run(load_value<T>(old[l]), load_value<T>(b[l]), load_value<T>(c[l]), 0));
    memcpy(p, &updated, sizeof(T));
  }
  write(w, x[0], old, m);
}

}  // namespace ptxrun
