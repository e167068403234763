// GEGLU forward and backward in one pass over u, the exact gelu by a polynomial that its derivative shares.
#include "geglu.h"

#include "parallel.h"
#include "storage_type.h"
#include "vector_loop.h"

namespace mm::MM_ISA {
namespace {

constexpr int64_t kTaskRows = 16;

MM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The normal distribution's cdf and density at x, absolute error below 2e-7 and no cancellation at negative x.
// cdf(-|x|) = exp(-x^2 / 2) t p(t), t = 1 / (1 + 0.35 |x|); p is a minimax fit of degree 8, relative error 4e-8.
MM_INLINE void normal_distribution(Vec x, Vec& cdf, Vec& density) {
  const float kHalfLog2E = 0.72134752044448f, kInverseSqrt2Pi = 0.39894228040143f;
  Vec exponential = exp2_nonpositive(x * x * -kHalfLog2E);
  Vec magnitude = (Vec)((VecUint)x & 0x7fffffffu);
  Vec t = 1.0f / (magnitude * 0.35f + 1.0f);
  Vec p = splat(-2.91462429e-2f);
  p = p * t + 1.43973149e-1f;
  p = p * t - 2.55717278e-1f;
  p = p * t + 1.59177512e-1f;
  p = p * t - 2.31120735e-2f;
  p = p * t + 1.05508916e-1f;
  p = p * t + 1.1983265e-1f;
  p = p * t + 1.39861897e-1f;
  p = p * t + 1.39621407e-1f;
  Vec tail = p * t * exponential;
  cdf = x < 0.0f ? tail : 1.0f - tail;
  density = exponential * kInverseSqrt2Pi;
}

template <class T>
void run_forward(const Geglu& op, const void* u, const float* bias, void* g) {
  const int64_t half = op.half;
  parallel_tasks((op.rows + kTaskRows - 1) / kTaskRows, op.num_threads, [] { return 0; },
                 [&](int, int64_t task) {
                   const int64_t end = smaller((task + 1) * kTaskRows, op.rows);
                   for (int64_t row = task * kTaskRows; row < end; row++) {
                     const T* from = static_cast<const T*>(u) + row * 2 * half;
                     T* to = static_cast<T*>(g) + row * half;
                     over_vectors(half, [&](int64_t c, auto vector) {
                       Vec hidden = vector.load(from + c) + vector.load(bias + c);
                       Vec gate = vector.load(from + half + c) + vector.load(bias + half + c);
                       Vec cdf, density;
                       normal_distribution(gate, cdf, density);
                       vector.store(to + c, hidden * (gate * cdf));
                     });
                   }
                 });
}

template <class T>
void run_backward(const Geglu& op, const void* u, const float* bias, const void* dg, void* du, void* g, float* sums) {
  const int64_t half = op.half;
  auto differentiate = [&](float* sum, int64_t row) {
    const T *from = static_cast<const T*>(u) + row * 2 * half, *gradient = static_cast<const T*>(dg) + row * half;
    T *to = static_cast<T*>(du) + row * 2 * half, *output = static_cast<T*>(g) + row * half;
    over_vectors(half, [&](int64_t c, auto vector) {
      Vec hidden = vector.load(from + c) + vector.load(bias + c);
      Vec gate = vector.load(from + half + c) + vector.load(bias + half + c);
      Vec d = vector.load(gradient + c), cdf, density;
      normal_distribution(gate, cdf, density);
      Vec gelu = gate * cdf, dhidden = d * gelu, dgate = d * hidden * (cdf + gate * density);
      vector.store(output + c, hidden * gelu);
      vector.store(to + c, dhidden);
      vector.store(to + half + c, dgate);
      vector.store(sum + c, vector.load(sum + c) + dhidden);
      vector.store(sum + half + c, vector.load(sum + half + c) + dgate);
    });
  };
  parallel_tasks((op.rows + op.block_rows - 1) / op.block_rows, op.num_threads, [] { return 0; },
                 [&](int, int64_t task) {
                   float* sum = sums + task * 2 * half;
                   std::memset(sum, 0, 2 * half * sizeof(float));
                   const int64_t end = smaller((task + 1) * op.block_rows, op.rows);
                   for (int64_t row = task * op.block_rows; row < end; row++) differentiate(sum, row);
                 });
}

}  // namespace

extern const GegluKernels kGeglu = {
    [](const Geglu& op, const void* u, const float* bias, void* g) {
      with_type(op.dtype, [&](auto type) { run_forward<decltype(type)>(op, u, bias, g); });
    },
    [](const Geglu& op, const void* u, const float* bias, const void* dg, void* du, void* g, float* sums) {
      with_type(op.dtype, [&](auto type) { run_backward<decltype(type)>(op, u, bias, dg, du, g, sums); });
    },
};

}  // namespace mm::MM_ISA
