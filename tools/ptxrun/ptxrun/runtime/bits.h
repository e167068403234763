// Instructions on the bits of an integer, moves between widths, conversions between types.
#pragma once
#include "arithmetic.h"

namespace ptxrun {

inline u64 low_bits(u32 count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

// d, a, position, length.
template <class T>
void extract_field(Warp& w, const Instruction& i, const Mask& m) {
  constexpr u32 WIDTH = 8 * sizeof(T);
  const T* a = w.at<T>(i.arguments[1]);
  const u32 *position = w.at<u32>(i.arguments[2]), *length = w.at<u32>(i.arguments[3]);
  T d[LANES];
  for (int l = 0; l < LANES; l++) {
    const u32 first = position[l] & 255, count = length[l] & 255;
    const u32 available = first >= WIDTH ? 0 : std::min(count, WIDTH - first);
    const bool is_negative =
        std::is_signed_v<T> && count > 0 && (u64(a[l]) >> std::min(first + count - 1, WIDTH - 1) & 1);
    const u64 kept = low_bits(available);
    d[l] = T((available > 0 ? u64(a[l]) >> first & kept : 0) | (is_negative ? ~kept : 0));
  }
  write(w, i.arguments[0], d, m);
}

// d, a, b, position, length: the low bits of a put into b.
template <class T>
void insert_field(Warp& w, const Instruction& i, const Mask& m) {
  const T *a = w.at<T>(i.arguments[1]), *b = w.at<T>(i.arguments[2]);
  const u32 *position = w.at<u32>(i.arguments[3]), *length = w.at<u32>(i.arguments[4]);
  T d[LANES];
  for (int l = 0; l < LANES; l++) {
    const u32 first = position[l] & 255, count = length[l] & 255;
    const T mask = shifted_left(T(low_bits(count)), first);
    d[l] = (b[l] & ~mask) | (shifted_left(a[l], first) & mask);
  }
  write(w, i.arguments[0], d, m);
}

// d, a, b, selector: four bytes chosen of eight, or their signs.
inline void permute_bytes(Warp& w, const Instruction& i, const Mask& m) {
  const u32 *a = w.at<u32>(i.arguments[1]), *b = w.at<u32>(i.arguments[2]), *s = w.at<u32>(i.arguments[3]);
  u32 d[LANES] = {};
  for (int l = 0; l < LANES; l++) {
    const u64 both = a[l] | u64(b[l]) << 32;
    for (int k = 0; k < 4; k++) {
      const u32 choice = s[l] >> (4 * k) & 15;
      const u8 byte = u8(both >> (8 * (choice & 7)));
      d[l] |= u32(choice & 8 ? (byte & 128 ? 255 : 0) : byte) << (8 * k);
    }
  }
  write(w, i.arguments[0], d, m);
}

// d, a, b, c, table (a number): bit a*4 + b*2 + c of the table.
inline void logic_of_three(Warp& w, const Instruction& i, const Mask& m) {
  const u32 *a = w.at<u32>(i.arguments[1]), *b = w.at<u32>(i.arguments[2]), *c = w.at<u32>(i.arguments[3]);
  const u32 table = u32(i.arguments[4]);
  u32 d[LANES] = {};
  for (int k = 0; k < 8; k++)
    if (table >> k & 1)
      for (int l = 0; l < LANES; l++) d[l] |= (k & 4 ? a[l] : ~a[l]) & (k & 2 ? b[l] : ~b[l]) & (k & 1 ? c[l] : ~c[l]);
  write(w, i.arguments[0], d, m);
}

// d, a (low), b (high), amount.
template <bool IS_LEFT, bool IS_CLAMPED>
void funnel_shift(Warp& w, const Instruction& i, const Mask& m) {
  const u32 *a = w.at<u32>(i.arguments[1]), *b = w.at<u32>(i.arguments[2]), *by = w.at<u32>(i.arguments[3]);
  u32 d[LANES];
  for (int l = 0; l < LANES; l++) {
    const u64 both = a[l] | u64(b[l]) << 32;
    const u32 amount = IS_CLAMPED ? std::min(by[l], 32u) : by[l] & 31;
    d[l] = u32(IS_LEFT ? (both << amount) >> 32 : both >> amount);
  }
  write(w, i.arguments[0], d, m);
}

enum BitCount { ONES, LEADING_ZEROS };

// d (32 bits), a.
template <class T, int WHAT>
void count_bits(Warp& w, const Instruction& i, const Mask& m) {
  const T* a = w.at<T>(i.arguments[1]);
  u32 d[LANES];
  for (int l = 0; l < LANES; l++)
    d[l] = WHAT == ONES ? __builtin_popcountll(a[l])
           : a[l]       ? __builtin_clzll(a[l]) - (64 - 8 * int(sizeof(T)))
                        : 8 * int(sizeof(T));
  write(w, i.arguments[0], d, m);
}

// d, a.
template <class T>
void reverse_bits(Warp& w, const Instruction& i, const Mask& m) {
  const T* a = w.at<T>(i.arguments[1]);
  T d[LANES] = {};
  for (int l = 0; l < LANES; l++)
    for (size_t k = 0; k < 8 * sizeof(T); k++) d[l] |= T(a[l] >> k & 1) << (8 * sizeof(T) - 1 - k);
  write(w, i.arguments[0], d, m);
}

// d, bits of a part, number of parts, parts: the first part is the lowest.
inline void pack(Warp& w, const Instruction& i, const Mask& m) {
  u64 d[LANES] = {}, part[LANES];
  for (int k = 0; k < i.arguments[2]; k++) {
    read_wide(w, i.arguments[3 + k], part);
    for (int l = 0; l < LANES; l++) d[l] |= part[l] << (i.arguments[1] * k);
  }
  write_wide(w, i.arguments[0], d, m);
}

// source, bits of a part, number of parts, parts.
inline void unpack(Warp& w, const Instruction& i, const Mask& m) {
  u64 a[LANES], part[LANES];
  read_wide(w, i.arguments[0], a);
  for (int k = 0; k < i.arguments[2]; k++) {
    for (int l = 0; l < LANES; l++) part[l] = a[l] >> (i.arguments[1] * k);
    write_wide(w, i.arguments[3 + k], part, m);
  }
}

enum IntegerRounding { NONE, TO_NEAREST, TO_ZERO, TO_FLOOR, TO_CEILING };

inline f64 to_integer(f64 x, int rounding) {
  switch (rounding) {
    case TO_NEAREST: return std::nearbyint(x);
    case TO_ZERO: return std::trunc(x);
    case TO_FLOOR: return std::floor(x);
    case TO_CEILING: return std::ceil(x);
    default: return x;
  }
}

template <class To>
To clamp_to_integer(f64 x) {
  using Limits = std::numeric_limits<To>;
  if (x != x) return 0;
  if (x >= std::ldexp(1.0, Limits::digits)) return Limits::max();
  if (x <= f64(Limits::min())) return Limits::min();
  return To(x);
}

template <class To>
[[gnu::noinline]] To rounded(f64 x, int rounding) {
  if constexpr (IS_HALF<To>) {
    return narrow<To>(x, rounding);
  } else if (rounding == NEAREST) {
    return To(x);
  } else {
    RoundingGuard guard(rounding);
    volatile f64 source = x;
    volatile To result = To(source);
    return result;
  }
}

template <class To, class From>
To convert_value(From x, int rounding, int integer_rounding, int flags) {
  if constexpr (IS_FLOAT<From>) {
    f64 y = load_value<From>(x);
    y = to_integer(y, integer_rounding);
    if constexpr (!IS_FLOAT<To>) return clamp_to_integer<To>(y);
    if (flags & SATURATE) y = y > 0 ? (y < 1 ? y : 1) : 0;
    if (flags & RELU) y = y < 0 ? 0 : y;
    if constexpr (IS_FLOAT<To>) return rounded<To>(y, rounding);
  } else if constexpr (IS_HALF<To>) {
    return narrow<To>(f64(x), rounding);
  } else if constexpr (IS_FLOAT<To>) {
    RoundingGuard guard(rounding);
    volatile From source = x;
    volatile To result = To(source);
    return result;
  } else if (flags & SATURATE) {
    using Limits = std::numeric_limits<To>;
    const __int128 wide = x;
    return wide > Limits::max() ? Limits::max() : wide < Limits::min() ? Limits::min() : To(wide);
  } else {
    return To(x);
  }
}

// d, a, rounding, rounding to an integer, flags; registers may be wider than the types.
template <class To, class From>
void convert(Warp& w, const Instruction& i, const Mask& m) {
  u64 a[LANES], d[LANES];
  read_wide(w, i.arguments[1], a);
  for (int l = 0; l < LANES; l++) {
    From x;
    memcpy(&x, &a[l], sizeof x);
    const To y = convert_value<To, From>(x, int(i.arguments[2]), int(i.arguments[3]), int(i.arguments[4]));
    if constexpr (std::is_signed_v<To> && std::is_integral_v<To>)
      d[l] = u64(s64(y));
    else
      d[l] = 0, memcpy(&d[l], &y, sizeof y);
  }
  write_wide(w, i.arguments[0], d, m);
}

// d, a (upper half), b (lower half), rounding, flags.
template <class To>
void convert_pair(Warp& w, const Instruction& i, const Mask& m) {
  const f32 *a = w.at<f32>(i.arguments[1]), *b = w.at<f32>(i.arguments[2]);
  const int rounding = int(i.arguments[3]), flags = int(i.arguments[4]);
  u32 d[LANES];
  for (int l = 0; l < LANES; l++)
    d[l] = u32(convert_value<To, f32>(b[l], rounding, NONE, flags).bits) |
           u32(convert_value<To, f32>(a[l], rounding, NONE, flags).bits) << 16;
  write(w, i.arguments[0], d, m);
}

// d, a, rounding (nearest even, or away from zero at half).
inline void convert_to_tf32(Warp& w, const Instruction& i, const Mask& m) {
  const u32* a = w.at<u32>(i.arguments[1]);
  u32 d[LANES];
  for (int l = 0; l < LANES; l++) {
    const bool is_finite = (a[l] & 0x7f800000u) != 0x7f800000u;
    const u32 half = i.arguments[2] == AWAY ? 0x1000u : 0xfffu + (a[l] >> 13 & 1);
    d[l] = is_finite ? (a[l] + half) & 0xffffe000u : a[l];
  }
  write(w, i.arguments[0], d, m);
}

}  // namespace ptxrun
