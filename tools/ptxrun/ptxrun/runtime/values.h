// PTX's types as C++ types, and the rounding between them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace ptxrun {

constexpr int LANES = 32;

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;
using pred = int32_t;  // 0 or -1

struct f16 {
  u16 bits;
};
struct bf16 {
  u16 bits;
};
struct f16x2 {};
struct bf16x2 {};
struct f32x2 {};

// A packed type is twice as many lanes of its element.
template <class T>
struct Packed {
  using Element = T;
  static constexpr int count = 1;
};
template <>
struct Packed<f16x2> {
  using Element = f16;
  static constexpr int count = 2;
};
template <>
struct Packed<bf16x2> {
  using Element = bf16;
  static constexpr int count = 2;
};
template <>
struct Packed<f32x2> {
  using Element = f32;
  static constexpr int count = 2;
};

template <class To, class From>
To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline f32 widen(bf16 x) { return bits_of<f32>(u32(x.bits) << 16); }
inline f32 widen(f16 x) { return f32(bits_of<_Float16>(x.bits)); }

enum Rounding { NEAREST, TOWARDS_ZERO, DOWN, UP, AWAY };

// double to float, inexact results made odd: what is rounded to fewer bits afterwards is rounded only once.
inline f32 to_odd(f64 x) {
  f32 y = f32(x);
  if (!std::isfinite(y) || f64(y) == x) return y;
  if (std::fabs(f64(y)) > std::fabs(x)) y = std::nextafterf(y, 0.0f);
  return bits_of<f32>(bits_of<u32>(y) | 1);
}

template <class T>
T narrow(f64 x, int rounding = NEAREST);

template <>
inline bf16 narrow<bf16>(f64 x, int rounding) {
  if (x != x) return {0x7fff};
  u32 bits = std::isinf(f32(x)) && std::isfinite(x) ? (x < 0 ? 0xff7fffffu : 0x7f7fffffu) : bits_of<u32>(to_odd(x));
  if (rounding == NEAREST) bits += 0x7fff + ((bits >> 16) & 1);
  return {u16(bits >> 16)};
}

template <>
inline f16 narrow<f16>(f64 x, int rounding) {
  if (x != x) return {0x7fff};
  _Float16 y = _Float16(x);
  u16 bits = bits_of<u16>(y);
  if (rounding == TOWARDS_ZERO && std::isfinite(x) && std::fabs(f64(y)) > std::fabs(x)) bits -= 1;
  return {bits};
}

// tf32 has 10 bits of fraction; mma reads the upper 19 bits of an operand and ignores the rest.
inline f32 tf32_operand(u32 bits) { return bits_of<f32>(bits & 0xffffe000u); }

template <class T>
constexpr bool IS_HALF = std::is_same_v<T, f16> || std::is_same_v<T, bf16>;
template <class T>
constexpr bool IS_FLOAT = IS_HALF<T> || std::is_floating_point_v<T>;

// What a value is computed in: halves in double, so that a fused multiply-add of them is rounded once.
template <class T>
using Value = std::conditional_t<IS_HALF<T>, f64, T>;

template <class T>
Value<T> load_value(T x) {
  if constexpr (IS_HALF<T>)
    return widen(x);
  else
    return x;
}

template <class T>
T store_value(Value<T> x) {
  if constexpr (IS_HALF<T>)
    return narrow<T>(x);
  else
    return x;
}

template <class T>
constexpr f64 smallest_normal() {
  if constexpr (std::is_same_v<T, f16>)
    return 6.103515625e-05;
  else
    return std::numeric_limits<f32>::min();
}

// What .ftz does with a subnormal.
template <class T>
Value<T> flushed(Value<T> x) {
  return std::fabs(x) < Value<T>(smallest_normal<T>()) ? std::copysign(Value<T>(0), x) : x;
}

}  // namespace ptxrun
