// Instructions that compute a lane's result from that lane's operands.
#pragma once
#include <cfenv>

#include "machine.h"

namespace ptxrun {

enum Modifier { FLUSH = 1, SATURATE = 2, RELU = 4, NAN_WINS = 8, ROUNDING_SHIFT = 4 };

#define PTXRUN_OPERATION(name, ...)                                                                              \
  struct name {                                                                                                  \
    template <class V>                                                                                           \
    static V run([[maybe_unused]] V a, [[maybe_unused]] V b, [[maybe_unused]] V c, [[maybe_unused]] int flags) { \
      return V(__VA_ARGS__);                                                                                     \
    }                                                                                                            \
  };

template <class V>
V power_of_two(V x) {
  return std::exp2(x);
}

template <class V>
V least(V a, V b, int flags) {
  if constexpr (std::is_floating_point_v<V>) {
    if (a != a || b != b) return flags & NAN_WINS ? V(NAN) : a != a ? b : a;
    if (a == b) return std::signbit(a) ? a : b;
  }
  return a < b ? a : b;
}

template <class V>
V greatest(V a, V b, int flags) {
  if constexpr (std::is_floating_point_v<V>) {
    if (a != a || b != b) return flags & NAN_WINS ? V(NAN) : a != a ? b : a;
    if (a == b) return std::signbit(a) ? b : a;
  }
  return a > b ? a : b;
}

template <class V>
V quotient(V a, V b) {
  if constexpr (std::is_floating_point_v<V>)
    return a / b;
  else if (b == 0)
    return V(-1);
  else if (std::is_signed_v<V> && b == V(-1))
    return V(0 - std::make_unsigned_t<V>(a));
  else
    return a / b;
}

template <class V>
V remainder_of(V a, V b) {
  if (b == 0) return a;
  if (std::is_signed_v<V> && b == V(-1)) return 0;
  return a % b;
}

template <class V>
V absolute(V a) {
  if constexpr (std::is_floating_point_v<V>)
    return std::fabs(a);
  else
    return a < 0 ? V(0 - std::make_unsigned_t<V>(a)) : a;
}

template <class V>
V high_half(V a, V b) {
  using Wide = std::conditional_t<std::is_signed_v<V>, __int128, unsigned __int128>;
  return V((Wide(a) * Wide(b)) >> (8 * sizeof(V)));
}

template <class V>
V shifted_left(V a, u32 by) {
  return by >= 8 * sizeof(V) ? V(0) : V(a << by);
}

template <class V>
V shifted_right(V a, u32 by) {
  return by >= 8 * sizeof(V) ? (a < 0 ? V(-1) : V(0)) : V(a >> by);
}

PTXRUN_OPERATION(Add, a + b)
PTXRUN_OPERATION(Subtract, a - b)
PTXRUN_OPERATION(Multiply, a* b)
PTXRUN_OPERATION(MultiplyHigh, high_half(a, b))
PTXRUN_OPERATION(MultiplyAdd, a* b + c)
PTXRUN_OPERATION(MultiplyHighAdd, high_half(a, b) + c)
PTXRUN_OPERATION(FusedMultiplyAdd, std::fma(a, b, c))
PTXRUN_OPERATION(Divide, quotient(a, b))
PTXRUN_OPERATION(Remainder, remainder_of(a, b))
PTXRUN_OPERATION(Minimum, least(a, b, flags))
PTXRUN_OPERATION(Maximum, greatest(a, b, flags))
PTXRUN_OPERATION(MinimumOfThree, least(least(a, b, flags), c, flags))
PTXRUN_OPERATION(MaximumOfThree, greatest(greatest(a, b, flags), c, flags))
PTXRUN_OPERATION(Negate, 0 - a)
PTXRUN_OPERATION(NegateFloat, -a)
PTXRUN_OPERATION(Absolute, absolute(a))
PTXRUN_OPERATION(And, a& b)
PTXRUN_OPERATION(Or, a | b)
PTXRUN_OPERATION(ExclusiveOr, a ^ b)
PTXRUN_OPERATION(Not, ~a)
PTXRUN_OPERATION(Copy, a)
PTXRUN_OPERATION(CopySign, std::copysign(b, a))
PTXRUN_OPERATION(Reciprocal, 1 / a)
PTXRUN_OPERATION(SquareRoot, std::sqrt(a))
PTXRUN_OPERATION(ReciprocalSquareRoot, 1 / std::sqrt(a))
PTXRUN_OPERATION(PowerOfTwo, power_of_two(a))
PTXRUN_OPERATION(Logarithm, std::log2(a))
PTXRUN_OPERATION(Sine, std::sin(a))
PTXRUN_OPERATION(Cosine, std::cos(a))
PTXRUN_OPERATION(HyperbolicTangent, std::tanh(a))

// Sets the rounding of the processor while it lives.
struct RoundingGuard {
  explicit RoundingGuard(int rounding) : is_changed(rounding != NEAREST) {
    constexpr int MODES[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
    if (is_changed) fesetround(MODES[rounding]);
  }
  ~RoundingGuard() {
    if (is_changed) fesetround(FE_TONEAREST);
  }
  bool is_changed;
};

// Apart, so that no compiler moves it out of the guard.
template <class Op, class V, int NUMBER>
[[gnu::noinline]] void compute(V* d, const V* a, const V* b, const V* c, int flags) {
  for (int l = 0; l < NUMBER; l++) d[l] = Op::run(a[l], b[l], c[l], flags);
}

// d, then OPERANDS sources, then flags.
template <class Op, class T, int OPERANDS>
void elementwise(Warp& w, const Instruction& i, const Mask& m) {
  using E = typename Packed<T>::Element;
  using V = Value<E>;
  constexpr int NUMBER = LANES * Packed<T>::count;
  const int flags = int(i.arguments[1 + OPERANDS]);
  V values[3][NUMBER], results[NUMBER];
  for (int k = 0; k < OPERANDS; k++) {
    const E* x = w.at<E>(i.arguments[1 + k]);
    for (int l = 0; l < NUMBER; l++) values[k][l] = load_value<E>(x[l]);
    if constexpr (IS_FLOAT<E>)
      if (flags & FLUSH)
        for (int l = 0; l < NUMBER; l++) values[k][l] = flushed<E>(values[k][l]);
  }
  const V* a = values[0];
  {
    RoundingGuard guard(flags >> ROUNDING_SHIFT);
    compute<Op, V, NUMBER>(results, a, OPERANDS > 1 ? values[1] : a, OPERANDS > 2 ? values[2] : a, flags);
  }
  if constexpr (IS_FLOAT<E>) {
    if (flags & FLUSH)
      for (int l = 0; l < NUMBER; l++) results[l] = flushed<E>(results[l]);
    if (flags & SATURATE)
      for (int l = 0; l < NUMBER; l++) results[l] = results[l] > 0 ? (results[l] < 1 ? results[l] : V(1)) : V(0);
    if (flags & RELU)
      for (int l = 0; l < NUMBER; l++) results[l] = results[l] < 0 ? V(0) : results[l];
  }
  E* d = w.at<E>(i.arguments[0]);
  for (int l = 0; l < NUMBER; l++) d[l] = m[l / Packed<T>::count] ? store_value<E>(results[l]) : d[l];
}

// d, a, b, flags: of float32, a is a half.
template <class Op, class T>
void elementwise_widening(Warp& w, const Instruction& i, const Mask& m) {
  const int flags = int(i.arguments[3]);
  f32 a[LANES], d[LANES];
  for (int l = 0; l < LANES; l++) a[l] = widen(w.at<T>(i.arguments[1])[l]);
  {
    RoundingGuard guard(flags >> ROUNDING_SHIFT);
    const f32* b = w.at<f32>(i.arguments[2]);
    compute<Op, f32, LANES>(d, a, b, b, flags);
  }
  for (int l = 0; l < LANES && flags & SATURATE; l++) d[l] = d[l] > 0 ? (d[l] < 1 ? d[l] : 1) : 0;
  write(w, i.arguments[0], d, m);
}

// d, a, b: a product of twice the width; with a third operand of that width added.
template <class T, class Wide, bool HAS_ADDEND>
void multiply_wide(Warp& w, const Instruction& i, const Mask& m) {
  const T *a = w.at<T>(i.arguments[1]), *b = w.at<T>(i.arguments[2]);
  Wide d[LANES];
  for (int l = 0; l < LANES; l++) d[l] = Wide(a[l]) * Wide(b[l]);
  if constexpr (HAS_ADDEND)
    for (int l = 0; l < LANES; l++) d[l] += w.at<Wide>(i.arguments[3])[l];
  write(w, i.arguments[0], d, m);
}

// d, a, amount (32 bits), of type T.
template <class T, bool IS_LEFT>
void shift(Warp& w, const Instruction& i, const Mask& m) {
  const T* a = w.at<T>(i.arguments[1]);
  const u32* by = w.at<u32>(i.arguments[2]);
  T d[LANES];
  for (int l = 0; l < LANES; l++) d[l] = IS_LEFT ? shifted_left(a[l], by[l]) : shifted_right(a[l], by[l]);
  write(w, i.arguments[0], d, m);
}

enum Comparison { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NAN_ };

template <class V>
bool compare(int comparison, V a, V b) {
  const bool is_nan = a != a || b != b;
  switch (comparison) {
    case EQ: return !is_nan && a == b;
    case NE: return !is_nan && a != b;
    case LT: return a < b;
    case LE: return a <= b;
    case GT: return a > b;
    case GE: return a >= b;
    case EQU: return is_nan || a == b;
    case NEU: return is_nan || a != b;
    case LTU: return is_nan || a < b;
    case LEU: return is_nan || a <= b;
    case GTU: return is_nan || a > b;
    case GEU: return is_nan || a >= b;
    case NUM: return !is_nan;
    default: return is_nan;
  }
}

enum Combination { ALONE, WITH_AND, WITH_OR, WITH_XOR };

inline bool combine(int combination, bool a, bool b) {
  return combination == WITH_AND ? a && b : combination == WITH_OR ? a || b : combination == WITH_XOR ? a != b : a;
}

// p, q or -1, a, b, c or -1, comparison, combination, flags: p = (a ? b) op c, q = !(a ? b) op c.
template <class T>
void set_predicate(Warp& w, const Instruction& i, const Mask& m) {
  const s64* x = i.arguments;
  const T *a = w.at<T>(x[2]), *b = w.at<T>(x[3]);
  const Mask c = x[4] < 0 ? Mask{} : read_predicate(w, x[4]);
  const bool is_flushed = x[7] & FLUSH;
  pred p[LANES], q[LANES];
  for (int l = 0; l < LANES; l++) {
    Value<T> left = load_value<T>(a[l]), right = load_value<T>(b[l]);
    if constexpr (IS_FLOAT<T>)
      if (is_flushed) left = flushed<T>(left), right = flushed<T>(right);
    const bool is_true = compare(int(x[5]), left, right);
    p[l] = combine(int(x[6]), is_true, c[l]) ? -1 : 0;
    q[l] = combine(int(x[6]), !is_true, c[l]) ? -1 : 0;
  }
  write(w, x[0], p, m);
  write(w, x[1], q, m);
}

// d, a, b or -1: any of a and b may be negated.
template <class Op>
void combine_predicates(Warp& w, const Instruction& i, const Mask& m) {
  const Mask a = read_predicate(w, i.arguments[1]);
  const Mask b = i.arguments[2] < 0 ? a : read_predicate(w, i.arguments[2]);
  pred d[LANES];
  for (int l = 0; l < LANES; l++) d[l] = Op::run(a[l], b[l], b[l], 0);
  write(w, i.arguments[0], d, m);
}

// d, a, b, p.
template <class T>
void select(Warp& w, const Instruction& i, const Mask& m) {
  const T *a = w.at<T>(i.arguments[1]), *b = w.at<T>(i.arguments[2]);
  const Mask p = read_predicate(w, i.arguments[3]);
  T d[LANES];
  for (int l = 0; l < LANES; l++) d[l] = p[l] ? a[l] : b[l];
  write(w, i.arguments[0], d, m);
}

}  // namespace ptxrun
