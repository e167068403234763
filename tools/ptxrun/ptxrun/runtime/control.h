// Branches, barriers, and what the lanes of a warp tell each other.
#pragma once
#include "tensor_memory.h"

namespace ptxrun {

// target: an instruction's number.
inline void branch(Warp& w, const Instruction& i, const Mask& m) {
  for (int l = 0; l < LANES; l++) w.pc[l] = m[l] ? s32(i.arguments[0]) : w.pc[l];
}

inline void leave(Warp& w, const Instruction&, const Mask& m) { w.alive &= ~m; }

inline void trap(Warp& w, const Instruction& i, const Mask&) { fault(w, i, "trap"); }

// Lets the warps of a complete barrier go on, each knowing what all of them did before it.
inline void complete(Block& b, Barrier& barrier) {
  const int n = b.num_warps;
  std::vector<u32> known(size_t(n), 0);
  b.time++;
  for (int u = 0; u < n; u++)
    if (barrier.arrived >> u & 1)
      for (int v = 0; v < n; v++) known[size_t(v)] = std::max(known[size_t(v)], b.seen[size_t(u * n + v)]);
  for (int u = 0; u < n; u++)
    if (barrier.arrived >> u & 1) known[size_t(u)] = barrier.waiting >> u & 1 ? b.time : barrier.times[u];
  for (int u = 0; u < n; u++)
    if (barrier.waiting >> u & 1) {
      std::copy(known.begin(), known.end(), b.seen.begin() + u * n);
      (*b.warps)[size_t(u)].waiting = -1;
    }
  if (b.has_proxy_fences)
    for (Shadow& s : b.shadow)
      if (s.fenced & barrier.arrived) s.fenced |= barrier.waiting;
  barrier = Barrier{};
}

// Completes the barriers that everyone has reached; a finished warp counts as arrived at a barrier of the whole block.
inline void complete_barriers(Block& b) {
  int finished = 0;
  for (const Warp& w : *b.warps) finished += w.is_done;
  for (Barrier& barrier : b.barriers) {
    const int expected = barrier.expected ? barrier.expected : (b.num_warps - finished) * LANES;
    if (barrier.arrived != 0 && barrier.threads >= expected) complete(b, barrier);
  }
}

// barrier (a register), threads (a register) or -1, does it wait. Warps count whole, as the hardware does.
inline void arrive(Warp& w, const Instruction& i, const Mask& m) {
  for (int l = 0; l < LANES; l++)
    if (m[l] != w.alive[l]) fault(w, i, "barrier reached by %llu lanes of a warp", u64(num_lanes(m)));
  const u32 number = w.at<u32>(i.arguments[0])[__builtin_ctz(lane_bits(m))];
  const u32 threads = i.arguments[1] < 0 ? 0 : w.at<u32>(i.arguments[1])[__builtin_ctz(lane_bits(m))];
  if (number > 15) fault(w, i, "barrier %llu of 16", number);
  if (threads % LANES) fault(w, i, "barrier for %llu threads, which is no multiple of 32", threads);
  Barrier& barrier = w.block->barriers[number];
  if (barrier.arrived && barrier.expected != int(threads))
    fault(w, i, "barrier %llu for %llu threads, by an earlier warp for %llu", number, threads, barrier.expected);
  if (barrier.arrived >> w.id & 1) fault(w, i, "a second arrival at barrier %llu before it completes", number);
  barrier.expected = int(threads);
  barrier.arrived |= 1u << w.id;
  barrier.threads += LANES;
  barrier.times[w.id] = i.arguments[2] ? 0 : ++w.block->time;
  if (i.arguments[2]) barrier.waiting |= 1u << w.id, w.waiting = int(number);
  w.block->counts->barriers++;
}

// Lanes of a .sync instruction: exactly those that its member mask names.
inline void need_members(Warp& w, const Instruction& i, const Mask& m, s64 reference) {
  const u32 active = lane_bits(m), named = w.at<u32>(reference)[__builtin_ctz(active)];
  if (named != active) fault(w, i, "member mask %#llx where lanes %#llx are active", named, active);
}

enum Shuffle { SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_ACROSS, SHUFFLE_FROM };

// d, p or -1, a, b, c, member mask, kind.
inline void shuffle(Warp& w, const Instruction& i, const Mask& m) {
  const s64* x = i.arguments;
  need_members(w, i, m, x[5]);
  const u32 *a = w.at<u32>(x[2]), *b = w.at<u32>(x[3]), *c = w.at<u32>(x[4]);
  u32 d[LANES];
  pred p[LANES];
  for (int l = 0; l < LANES; l++) {
    const int by = int(b[l] & 31), clamp = int(c[l] & 31), segment = int(c[l] >> 8 & 31);
    const int first = l & segment, bound = first | (clamp & ~segment);
    const int from = x[6] == SHUFFLE_UP       ? l - by
                     : x[6] == SHUFFLE_DOWN   ? l + by
                     : x[6] == SHUFFLE_ACROSS ? l ^ by
                                              : first | (by & ~segment);
    const bool is_inside = x[6] == SHUFFLE_UP ? from >= bound : from <= bound;
    const int source = is_inside ? from : l;
    if (m[l] && !m[source]) fault(w, i, "shfl reads inactive lane %llu", u64(source));
    d[l] = a[source];
    p[l] = is_inside ? -1 : 0;
  }
  write(w, x[0], d, m);
  write(w, x[1], p, m);
}

enum Vote { ALL, ANY, UNIFORM, BALLOT };

// d, p, member mask, kind.
inline void vote(Warp& w, const Instruction& i, const Mask& m) {
  need_members(w, i, m, i.arguments[2]);
  const u32 active = lane_bits(m), true_lanes = lane_bits(read_predicate(w, i.arguments[1]) & m);
  const int kind = int(i.arguments[3]);
  const bool is_all = true_lanes == active, is_any = true_lanes != 0;
  u32 d[LANES];
  pred p[LANES];
  for (int l = 0; l < LANES; l++) {
    d[l] = true_lanes;
    p[l] = (kind == ALL ? is_all : kind == ANY ? is_any : is_all || !is_any) ? -1 : 0;
  }
  kind == BALLOT ? write(w, i.arguments[0], d, m) : write(w, i.arguments[0], p, m);
}

// d, a, member mask.
template <class Op, class T>
void reduce(Warp& w, const Instruction& i, const Mask& m) {
  need_members(w, i, m, i.arguments[2]);
  const T* a = w.at<T>(i.arguments[1]);
  T total{}, d[LANES];
  bool is_first = true;
  for (int l = 0; l < LANES; l++) {
    if (!m[l]) continue;
    total = is_first ? a[l] : Op::run(total, a[l], a[l], 0);
    is_first = false;
  }
  for (int l = 0; l < LANES; l++) d[l] = total;
  write(w, i.arguments[0], d, m);
}

// d.
inline void active_lanes(Warp& w, const Instruction& i, const Mask& m) {
  u32 d[LANES];
  for (int l = 0; l < LANES; l++) d[l] = lane_bits(m);
  write(w, i.arguments[0], d, m);
}

// d or -1, p, member mask: one lane is chosen, here the first.
inline void elect(Warp& w, const Instruction& i, const Mask& m) {
  need_members(w, i, m, i.arguments[2]);
  u32 d[LANES];
  pred p[LANES];
  const int chosen = __builtin_ctz(lane_bits(m));
  for (int l = 0; l < LANES; l++) d[l] = u32(chosen), p[l] = l == chosen ? -1 : 0;
  write(w, i.arguments[0], d, m);
  write(w, i.arguments[1], p, m);
}

// member mask.
inline void synchronize_warp(Warp& w, const Instruction& i, const Mask& m) { need_members(w, i, m, i.arguments[0]); }

}  // namespace ptxrun
