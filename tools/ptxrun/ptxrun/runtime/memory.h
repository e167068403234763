// Loads, stores, asynchronous copies and atomics, with the checks and counts that go with them.
#pragma once
#include "machine.h"

namespace ptxrun {

enum Space { GENERIC, GLOBAL, SHARED, LOCAL, CONSTANT, PARAMETER };
enum Access { READ, WRITE, ATOMIC };

// Are all warps of `mask` but this one known to have done what they did at `time`?
inline bool are_seen(const Warp& w, u32 mask, u32 time) {
  const Block& b = *w.block;
  for (int other = 0; other < b.num_warps; other++)
    if (other != w.id && (mask >> other & 1) && b.seen[size_t(w.id * b.num_warps + other)] <= time) return false;
  return true;
}

// Faults where a byte's other readers or writers are not separated from this access by a barrier. Warps that store the
// same value to the same place do not race: Triton does that where a tile has fewer columns than the warps cover.
inline void check_shared_race(Warp& w, const Instruction& i, u32 offset, int bytes, const u8* stored) {
  Block& b = *w.block;
  const u32 self = 1u << w.id;
  for (int k = 0; k < bytes; k++) {
    Shadow& s = b.shadow[offset + k];
    const bool is_behind = are_seen(w, s.writers, s.written);
    if (stored == nullptr) {
      if (!is_behind && !(s.writers & self))
        fault(w, i, "shared RACE: read of byte %llu after a write by warps %#llx", offset + k, s.writers);
      if (s.readers & ~self && s.read < b.time && are_seen(w, s.readers, s.read)) s.readers = 0;
      s.readers |= self;
      s.read = b.time;
      continue;
    }
    const bool is_equal = b.shared[offset + k] == stored[k];
    if (!is_behind && !is_equal)
      fault(w, i, "shared RACE: write of another value to byte %llu after a write by warps %#llx", offset + k,
            s.writers);
    if (!are_seen(w, s.readers, s.read) && !(is_equal && (s.readers & ~s.writers & ~self) == 0))
      fault(w, i, "shared RACE: write to byte %llu after a read by warps %#llx", offset + k, s.readers);
    s.writers = is_behind ? self : s.writers | self;
    s.written = b.time;
    s.fenced = 0;
  }
}

inline u8* shared_pointer(Warp& w, const Instruction& i, u64 offset, int bytes, const u8* stored) {
  Block& b = *w.block;
  if (offset + u64(bytes) > b.shared_bytes)
    fault(w, i, "shared access out of bounds: offset %llu, size %llu, of %llu bytes", offset, bytes, b.shared_bytes);
  if (offset % u64(bytes)) fault(w, i, "misaligned shared access: offset %llu, size %llu", offset, bytes);
  if (b.flags & SHARED_RACES) check_shared_race(w, i, u32(offset), bytes, stored);
  return b.shared + offset;
}

inline u8* local_pointer(Warp& w, const Instruction& i, int lane, u64 offset, int bytes) {
  Block& b = *w.block;
  if (offset + u64(bytes) > b.local_bytes)
    fault(w, i, "local access out of bounds: offset %llu, size %llu, of %llu bytes", offset, bytes, b.local_bytes);
  if (offset % u64(bytes)) fault(w, i, "misaligned local access: offset %llu, size %llu", offset, bytes);
  return b.local + u64(w.id * LANES + lane) * b.local_bytes + offset;
}

constexpr s32 READ_BY_MANY = std::numeric_limits<s32>::min();

// Shadow of two bytes: block + 1 where written, -(block + 1) where read by one block.
inline void check_global_race(Warp& w, const Instruction& i, Buffer& buffer, u64 address, int bytes, int access) {
  const s32 self = w.block->number + 1;
  for (u64 k = (address - buffer.first) / 2; k <= (address + u64(bytes) - 1 - buffer.first) / 2; k++) {
    s32& s = buffer.shadow[k];
    if (access == WRITE) {
      if (s != 0 && std::abs(s64(s)) != self) fault(w, i, "global RACE: write to what another block has touched");
      s = self;
    } else {
      if (s > 0 && s != self) fault(w, i, "global RACE: read of what block %llu wrote", u64(s - 1));
      if (s <= 0) s = s == 0 || s == -self ? -self : READ_BY_MANY;
    }
  }
}

inline u8* global_pointer(Warp& w, const Instruction& i, u64 address, int bytes, int access) {
  Block& b = *w.block;
  if (!(b.flags & BOUNDS)) return reinterpret_cast<u8*>(address);
  auto& buffers = *b.buffers;
  const auto holds = [&](const Buffer& x) { return address >= x.first && address + u64(bytes) <= x.last; };
  if (b.last_buffer >= buffers.size() || !holds(buffers[b.last_buffer])) {
    u64 distance = ~0ull;
    for (b.last_buffer = 0; b.last_buffer < buffers.size(); b.last_buffer++) {
      const Buffer& x = buffers[b.last_buffer];
      if (holds(x)) break;
      distance = std::min(distance, address < x.first ? x.first - address : address + u64(bytes) - x.last);
    }
    if (b.last_buffer == buffers.size())
      fault(w, i,
            access == READ ? "global READ out of bounds: %llu bytes from the nearest buffer"
                           : "global WRITE out of bounds: %llu bytes from the nearest buffer",
            distance);
  }
  if (b.flags & GLOBAL_RACES && access != ATOMIC)
    check_global_race(w, i, buffers[b.last_buffer], address, bytes, access);
  return reinterpret_cast<u8*>(address);
}

// 32-byte sectors that one access of a warp touches.
inline void count_global(Warp& w, const u64* addresses, const Mask& m, int bytes, bool is_store) {
  if (!(w.block->flags & COUNTS)) return;
  u64 sectors[2 * LANES];
  int count = 0;
  for (int l = 0; l < LANES; l++)
    if (m[l]) sectors[count++] = addresses[l] >> 5, sectors[count++] = (addresses[l] + u64(bytes) - 1) >> 5;
  std::sort(sectors, sectors + count);
  const u64 distinct = u64(std::unique(sectors, sectors + count) - sectors);
  Counts& c = *w.block->counts;
  (is_store ? c.global_stores : c.global_loads) += 1;
  (is_store ? c.global_store_sectors : c.global_load_sectors) += distinct;
  (is_store ? c.global_store_bytes : c.global_load_bytes) += u64(num_lanes(m) * bytes);
}

// Passes over the 32 banks of 4 bytes that one access takes; conflicts are those past one for each phase of 128 bytes.
inline void count_shared(Warp& w, const u64* offsets, const Mask& m, int bytes, bool is_store) {
  if (!(w.block->flags & COUNTS)) return;
  const int phase = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  u64 waves = 0, phases = 0;
  for (int first = 0; first < LANES; first += phase) {
    u32 words[LANES][LANES];
    int in_bank[LANES] = {}, most = 0;
    for (int l = first; l < first + phase; l++)
      for (int k = 0; m[l] && k < std::max(bytes, 4); k += 4) {
        const u32 word = u32(offsets[l] + u64(k)) >> 2, bank = word & 31;
        bool is_known = false;
        for (int j = 0; j < in_bank[bank]; j++) is_known |= words[bank][j] == word;
        if (!is_known) words[bank][in_bank[bank]++] = word;
        most = std::max(most, in_bank[bank]);
      }
    waves += u64(most);
    phases += most > 0;
  }
  Counts& c = *w.block->counts;
  (is_store ? c.shared_stores : c.shared_loads) += 1;
  (is_store ? c.shared_store_waves : c.shared_load_waves) += waves;
  (is_store ? c.shared_store_conflicts : c.shared_load_conflicts) += waves - phases;
}

// Which space a generic address is in; makes it an offset there.
inline int resolve(const Warp& w, int lane, u64& address) {
  const Block& b = *w.block;
  const u64 shared = u64(b.shared), local = u64(b.local), own = local + u64(w.id * LANES + lane) * b.local_bytes;
  if (address >= shared && address < shared + b.shared_bytes) return address -= shared, SHARED;
  if (address >= local && address < local + u64(b.num_warps * LANES) * b.local_bytes) return address -= own, LOCAL;
  return GLOBAL;
}

// Where a lane's access goes, checked; `stored` is what it will write.
inline u8* pointer(Warp& w, const Instruction& i, int lane, int space, u64 address, int bytes, const u8* stored,
                   int access) {
  if (space == GENERIC) space = resolve(w, lane, address);
  if (space == SHARED) return shared_pointer(w, i, address, bytes, stored);
  if (space == LOCAL) return local_pointer(w, i, lane, address, bytes);
  if (space == PARAMETER) {
    if (address + u64(bytes) > w.block->parameter_bytes)
      fault(w, i, "parameter access out of bounds: offset %llu, size %llu", address, bytes);
    return const_cast<u8*>(w.block->parameters) + address;
  }
  if (address % u64(bytes)) fault(w, i, "misaligned global access: %#llx, size %llu", address, bytes);
  return global_pointer(w, i, address, bytes, access);
}

// Addresses of an operand: a register, or a number, plus an offset.
inline void read_addresses(Warp& w, const s64* operand, u64* addresses) {
  read_wide(w, operand[0], addresses);
  for (int l = 0; l < LANES; l++) {
    addresses[l] += u64(operand[1]);
    if ((operand[0] & 3) == 1) addresses[l] = u32(addresses[l]);
  }
}

inline void count_access(Warp& w, int space, const u64* addresses, const Mask& m, int bytes, bool is_store) {
  if (space == GLOBAL) count_global(w, addresses, m, bytes, is_store);
  if (space == SHARED) count_shared(w, addresses, m, bytes, is_store);
  if (space != GENERIC) return;
  Mask parts[6] = {};
  u64 resolved[LANES];
  for (int l = 0; l < LANES; l++)
    if (m[l]) resolved[l] = addresses[l], parts[resolve(w, l, resolved[l])][l] = -1;
  if (num_lanes(parts[GLOBAL])) count_global(w, resolved, parts[GLOBAL], bytes, is_store);
  if (num_lanes(parts[SHARED])) count_shared(w, resolved, parts[SHARED], bytes, is_store);
}

// address, offset, space, is signed, number of elements, elements.
template <class T>
void load(Warp& w, const Instruction& i, const Mask& m) {
  const int space = int(i.arguments[2]), count = int(i.arguments[4]), bytes = count * int(sizeof(T));
  u64 addresses[LANES], values[8][LANES];
  read_addresses(w, i.arguments, addresses);
  count_access(w, space, addresses, m, bytes, false);
  for (int l = 0; l < LANES; l++) {
    if (!m[l]) continue;
    const u8* from = pointer(w, i, l, space, addresses[l], bytes, nullptr, READ);
    for (int k = 0; k < count; k++) {
      T x;
      memcpy(&x, from + size_t(k) * sizeof(T), sizeof x);
      values[k][l] = i.arguments[3] ? u64(s64(std::make_signed_t<T>(x))) : u64(x);
    }
  }
  for (int k = 0; k < count; k++) write_wide(w, i.arguments[5 + k], values[k], m);
}

// address, offset, space, number of elements, elements.
template <class T>
void store(Warp& w, const Instruction& i, const Mask& m) {
  const int space = int(i.arguments[2]), count = int(i.arguments[3]), bytes = count * int(sizeof(T));
  u64 addresses[LANES], values[8][LANES];
  read_addresses(w, i.arguments, addresses);
  for (int k = 0; k < count; k++) read_wide(w, i.arguments[4 + k], values[k]);
  count_access(w, space, addresses, m, bytes, true);
  for (int l = 0; l < LANES; l++) {
    if (!m[l]) continue;
    T stored[8];
    for (int k = 0; k < count; k++) stored[k] = T(values[k][l]);
    const u8* bits = reinterpret_cast<const u8*>(stored);
    memcpy(pointer(w, i, l, space, addresses[l], bytes, bits, WRITE), stored, size_t(bytes));
  }
}

// What this warp has stored, or has seen stored, is there for its asynchronous products from now on.
inline void fence_proxy(Warp& w, const Instruction&, const Mask&) {
  w.block->has_proxy_fences = true;
  for (Shadow& s : w.block->shadow)
    if (are_seen(w, s.writers, s.written)) s.fenced |= 1u << w.id;
}

// A hint or a fence: warps run one after the other here, so memory is in order.
inline void ignore(Warp&, const Instruction&, const Mask&) {}

// d: a cache policy, which nothing here depends on.
inline void make_policy(Warp& w, const Instruction& i, const Mask& m) {
  const u64 zeros[LANES] = {};
  write_wide(w, i.arguments[0], zeros, m);
}

// d, a, space, is to generic: between a window's offsets and generic addresses.
inline void convert_address(Warp& w, const Instruction& i, const Mask& m) {
  u64 a[LANES];
  read_wide(w, i.arguments[1], a);
  for (int l = 0; l < LANES; l++) {
    const u64 local = u64(w.block->local) + u64(w.id * LANES + l) * w.block->local_bytes;
    const u64 base = i.arguments[2] == SHARED ? u64(w.block->shared) : i.arguments[2] == LOCAL ? local : 0;
    a[l] = i.arguments[3] ? a[l] + base : a[l] - base;
  }
  write_wide(w, i.arguments[0], a, m);
}

// p, a, space.
inline void is_in_space(Warp& w, const Instruction& i, const Mask& m) {
  u64 a[LANES];
  read_wide(w, i.arguments[1], a);
  pred p[LANES];
  for (int l = 0; l < LANES; l++) p[l] = resolve(w, l, a[l]) == i.arguments[2] ? -1 : 0;
  write(w, i.arguments[0], p, m);
}

}  // namespace ptxrun
