// One vector type for every instruction set, from the compiler's vector extension.
//
// A kernel file is compiled once per instruction set (CMakeLists.txt) with MM_ISA naming it; everything here lives in
// that namespace, so no inline function of one build can be linked into another.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define MM_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define MM_VECTOR_BYTES 32
#else
#define MM_VECTOR_BYTES 16
#endif

#define MM_INLINE inline __attribute__((always_inline))

namespace mm::MM_ISA {

constexpr int kLanes = MM_VECTOR_BYTES / 4;

typedef float Vec __attribute__((vector_size(MM_VECTOR_BYTES)));
typedef int32_t VecInt __attribute__((vector_size(MM_VECTOR_BYTES)));
typedef uint32_t VecUint __attribute__((vector_size(MM_VECTOR_BYTES)));
typedef uint16_t VecHalf __attribute__((vector_size(MM_VECTOR_BYTES / 2)));

// Vector registers there are: the register tiles of the kernels are chosen by it.
constexpr int kRegisters = MM_VECTOR_BYTES == 64 ? 32 : 16;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

MM_INLINE Vec splat(float x) { return x - Vec{}; }  // x - 0 is x for every x, so this is one broadcast

MM_INLINE Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
MM_INLINE void store(float* p, Vec x) { std::memcpy(p, &x, sizeof(x)); }

// store() past the caches for what will not be read soon: no line is fetched to be overwritten. p is aligned to the
// vector; other threads see it after fence_streams(). Half-width storage and other processors store as usual.
template <class T>
MM_INLINE void store_streamed(T* p, Vec x) {
  store(p, x);
}
#if defined(__AVX512F__)
MM_INLINE void store_streamed(float* p, Vec x) { _mm512_stream_ps(p, (__m512)x); }
#elif defined(__AVX__)
MM_INLINE void store_streamed(float* p, Vec x) { _mm256_stream_ps(p, (__m256)x); }
#endif
MM_INLINE void fence_streams() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

MM_INLINE Vec load(const BFloat16* p) {
  VecHalf half;
  std::memcpy(&half, p, sizeof(half));
  return (Vec)(__builtin_convertvector(half, VecUint) << 16);
}
// Round to nearest even; a NaN keeps its sign and stays a NaN.
MM_INLINE void store(BFloat16* p, Vec x) {
  VecUint bits = (VecUint)x;
  VecUint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  VecUint quiet = (bits >> 16) | 0x40u;
  VecHalf half = __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, VecHalf);
  std::memcpy(p, &half, sizeof(half));
}

MM_INLINE Vec load(const Float16* p) {
  VecHalf half;
  std::memcpy(&half, p, sizeof(half));
  VecUint bits = __builtin_convertvector(half, VecUint);
  VecUint magnitude = (bits & 0x7fffu) << 13;
  // Times 2^112 moves the exponent's bias and makes subnormals exact; infinity and NaN get their exponent back.
  VecUint value = (VecUint)((Vec)magnitude * 0x1p112f);
  value = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : value;
  return (Vec)(value | ((bits & 0x8000u) << 16));
}
// Round to nearest even, overflow to infinity.
MM_INLINE void store(Float16* p, Vec x) {
  VecUint bits = (VecUint)x;
  VecUint magnitude = bits & 0x7fffffffu;
  VecUint odd = (magnitude >> 13) & 1u;
  VecUint normal = (magnitude + 0xc8000fffu + odd) >> 13;
  // Adding 0.5 shifts a subnormal's bits into place and rounds them as the hardware rounds.
  VecUint tiny = (VecUint)((Vec)magnitude + 0.5f) - 0x3f000000u;
  VecUint value = magnitude < 0x38800000u ? tiny : normal;
  value = magnitude >= 0x477ff000u ? VecUint{} + 0x7c00u : value;
  value = magnitude > 0x7f800000u ? VecUint{} + 0x7e00u : value;
  VecHalf half = __builtin_convertvector(value | ((bits >> 16) & 0x8000u), VecHalf);
  std::memcpy(p, &half, sizeof(half));
}

MM_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

// 2^x for x <= 0, relative error below 2e-7; 0 below -126 (a softmax weight that small is nothing in fp32).
// A NaN comes out as a NaN.
MM_INLINE Vec exp2_nonpositive(Vec x) {
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  Vec shifted = x + kRound;
  Vec fraction = x - (shifted - kRound);
  Vec p = splat(1.5403530e-4f);
  p = p * fraction + 1.3333558e-3f;
  p = p * fraction + 9.6181291e-3f;
  p = p * fraction + 5.5504109e-2f;
  p = p * fraction + 2.4022651e-1f;
  p = p * fraction + 6.9314718e-1f;
  p = p * fraction + 1.0f;
  Vec power = (Vec)(((VecInt)shifted << 23) + 0x3f800000);
  return x < -126.0f ? Vec{} : p * power;
}

// Swaps the off-diagonal blocks of a 2x2 arrangement of Step lanes: of lanes (a0 a1), (b0 b1) makes (a0 b0), (a1 b1).
template <int Step, int... Lane>
MM_INLINE void swap_blocks(Vec& a, Vec& b, std::integer_sequence<int, Lane...>) {
#if defined(__clang__) || __GNUC__ >= 12
  Vec low = __builtin_shufflevector(a, b, ((Lane & Step) ? kLanes + Lane - Step : Lane)...);
  Vec high = __builtin_shufflevector(a, b, ((Lane & Step) ? kLanes + Lane : Lane + Step)...);
#else
  Vec low = __builtin_shuffle(a, b, VecInt{((Lane & Step) ? kLanes + Lane - Step : Lane)...});
  Vec high = __builtin_shuffle(a, b, VecInt{((Lane & Step) ? kLanes + Lane : Lane + Step)...});
#endif
  a = low;
  b = high;
}

// combine(a, b) over all lanes, in a fixed tree.
template <int Step = kLanes / 2, class Combine>
MM_INLINE float reduce_lanes(Vec x, Combine combine) {
  if constexpr (Step == 0) {
    return x[0];
  } else {
    Vec other = x;
    swap_blocks<Step>(x, other, std::make_integer_sequence<int, kLanes>{});
    return reduce_lanes<Step / 2>(combine(x, other), combine);
  }
}
MM_INLINE float sum_lanes(Vec x) {
  return reduce_lanes(x, [](Vec a, Vec b) { return a + b; });
}
MM_INLINE float max_lanes(Vec x) {
  return reduce_lanes(x, [](Vec a, Vec b) { return maximum(a, b); });
}

// Rows of a (kLanes x kLanes) block become its columns, in log2(kLanes) steps.
template <int Step = 1>
MM_INLINE void transpose(Vec (&row)[kLanes]) {
  if constexpr (Step < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++)
      if (!(i & Step)) swap_blocks<Step>(row[i], row[i + Step], std::make_integer_sequence<int, kLanes>{});
    transpose<2 * Step>(row);
  }
}

}  // namespace mm::MM_ISA
