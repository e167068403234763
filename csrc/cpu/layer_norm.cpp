// LayerNorm of tokens read by stride; a token's row stays in the first-level cache through all its passes.
#include "layer_norm.h"

#include <new>

#include "parallel.h"
#include "storage_type.h"
#include "vector_loop.h"

namespace mm::MM_ISA {
namespace {

constexpr int64_t kTaskTokens = 32;

MM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
MM_INLINE T* token(const LayerNorm& op, const Tokens& x, int64_t i) {
  return static_cast<T*>(x.data) + i / op.T * x.r + i % op.T * x.t;
}

// x + shift of one token; a null shift is none.
template <class X>
struct Row {
  const X* x;
  const float* shift;

  Row(const LayerNorm& op, const Tokens& tokens, const float* shifts, int64_t i)
      : x(token<X>(op, tokens, i)), shift(shifts ? shifts + i / op.T * op.C : nullptr) {}
  template <class Vector>
  MM_INLINE Vec load(int64_t c, Vector vector) const {
    Vec value = vector.load(x + c);
    return shift ? value + vector.load(shift + c) : value;
  }
};

struct RowScratch {
  float* data;
  explicit RowScratch(int64_t count)
      : data(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t{64}))) {}
  RowScratch(const RowScratch&) = delete;
  ~RowScratch() { ::operator delete(data, std::align_val_t{64}); }
};

template <class X, class Inner>
void run_forward(const LayerNorm& op, Tokens x, const float* shift, const float* weight, const float* bias, void* out,
                 float* mean, float* rstd) {
  const int64_t tokens = op.R * op.T, C = op.C;
  auto normalise = [&](float* h, int64_t i) {
    Row<X> row(op, x, shift, i);
    Vec sum = {}, squares = {};
    over_vectors(C, [&](int64_t c, auto vector) {
      Vec value = row.load(c, vector);
      vector.store(h + c, value);
      sum += value;
    });
    const float center = sum_lanes(sum) / C;
    over_vectors(C, [&](int64_t c, auto vector) {
      Vec difference = vector.keep(vector.load(h + c) - center);
      squares += difference * difference;
    });
    const float scale = 1.0f / __builtin_sqrtf(sum_lanes(squares) / C + op.eps);
    Inner* to = static_cast<Inner*>(out) + i * C;
    over_vectors(C, [&](int64_t c, auto vector) {
      Vec value = (vector.load(h + c) - center) * scale;
      vector.store(to + c, value * vector.load(weight + c) + vector.load(bias + c));
    });
    mean[i] = center;
    rstd[i] = scale;
  };
  parallel_tasks((tokens + kTaskTokens - 1) / kTaskTokens, op.num_threads, [&] { return RowScratch(C); },
                 [&](RowScratch& scratch, int64_t task) {
                   const int64_t end = smaller((task + 1) * kTaskTokens, tokens);
                   for (int64_t i = task * kTaskTokens; i < end; i++) normalise(scratch.data, i);
                 });
}

// With n the normalised token and dn = dout * weight: dx = dy + rstd * (dn - mean(dn) - n * mean(dn * n)).
template <class X, class Inner>
void run_backward(const LayerNorm& op, const void* dout, Tokens x, const float* shift, const float* weight,
                  const float* mean, const float* rstd, Tokens dy, Tokens dx, float* sums) {
  const int64_t tokens = op.R * op.T, C = op.C;
  auto differentiate = [&](float* dweight, float* dbias, float* dresidual, int64_t i) {
    Row<X> row(op, x, shift, i);
    const Inner* gradient = static_cast<const Inner*>(dout) + i * C;
    const X* residual = token<X>(op, dy, i);
    const float center = mean[i], scale = rstd[i];
    Vec sum = {}, dot = {};
    over_vectors(C, [&](int64_t c, auto vector) {
      Vec normal = (row.load(c, vector) - center) * scale, g = vector.load(gradient + c);
      vector.store(dweight + c, vector.load(dweight + c) + g * normal);
      vector.store(dbias + c, vector.load(dbias + c) + g);
      vector.store(dresidual + c, vector.load(dresidual + c) + vector.load(residual + c));
      Vec dn = g * vector.load(weight + c);
      sum += dn;
      dot += dn * normal;
    });
    const float mean_dn = sum_lanes(sum) / C, mean_dot = sum_lanes(dot) / C;
    X* to = token<X>(op, dx, i);
    over_vectors(C, [&](int64_t c, auto vector) {
      Vec normal = (row.load(c, vector) - center) * scale;
      Vec dn = vector.load(gradient + c) * vector.load(weight + c);
      vector.store(to + c, vector.load(residual + c) + (dn - mean_dn - normal * mean_dot) * scale);
    });
  };
  parallel_tasks((tokens + op.block_tokens - 1) / op.block_tokens, op.num_threads, [] { return 0; },
                 [&](int, int64_t task) {
                   float* block = sums + task * 3 * C;
                   std::memset(block, 0, 3 * C * sizeof(float));
                   const int64_t end = smaller((task + 1) * op.block_tokens, tokens);
                   for (int64_t i = task * op.block_tokens; i < end; i++)
                     differentiate(block, block + C, block + 2 * C, i);
                 });
}

template <class X, class Inner>
void run_add_residual(const LayerNorm& op, Tokens x, const float* shift, const void* inner, const float* bias,
                      Tokens y) {
  const int64_t tokens = op.R * op.T, C = op.C;
  parallel_tasks((tokens + kTaskTokens - 1) / kTaskTokens, op.num_threads, [] { return 0; },
                 [&](int, int64_t task) {
                   const int64_t end = smaller((task + 1) * kTaskTokens, tokens);
                   for (int64_t i = task * kTaskTokens; i < end; i++) {
                     Row<X> row(op, x, shift, i);
                     const Inner* from = static_cast<const Inner*>(inner) + i * C;
                     X* to = token<X>(op, y, i);
                     over_vectors(C, [&](int64_t c, auto vector) {
                       vector.store(to + c, row.load(c, vector) + (vector.load(from + c) + vector.load(bias + c)));
                     });
                   }
                 });
}

// Calls function(X{}, Inner{}) with the two storage types.
template <class Function>
void with_types(const LayerNorm& op, Function function) {
  with_type(op.dtype, [&](auto x) { with_type(op.inner_dtype, [&](auto inner) { function(x, inner); }); });
}

}  // namespace

extern const LayerNormKernels kLayerNorm = {
    [](const LayerNorm& op, Tokens x, const float* shift, const float* weight, const float* bias, void* out,
       float* mean, float* rstd) {
      with_types(op, [&](auto type, auto inner) {
        run_forward<decltype(type), decltype(inner)>(op, x, shift, weight, bias, out, mean, rstd);
      });
    },
    [](const LayerNorm& op, const void* dout, Tokens x, const float* shift, const float* weight, const float* mean,
       const float* rstd, Tokens dy, Tokens dx, float* sums) {
      with_types(op, [&](auto type, auto inner) {
        run_backward<decltype(type), decltype(inner)>(op, dout, x, shift, weight, mean, rstd, dy, dx, sums);
      });
    },
    [](const LayerNorm& op, Tokens x, const float* shift, const void* inner, const float* bias, Tokens y) {
      with_types(op, [&](auto type, auto stored) {
        run_add_residual<decltype(type), decltype(stored)>(op, x, shift, inner, bias, y);
      });
    },
};

}  // namespace mm::MM_ISA
