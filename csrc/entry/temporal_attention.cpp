// Checks and calls the CPU kernels of temporal attention.
#include "../check.h"
#include "../cpu/instruction_set.h"
#include "../entry.h"
#include "parse.h"

namespace mm {
namespace {

TemporalAttention parse_temporal_attention(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                                           size_t tensors, const std::string& dtype, double scale, int num_threads) {
  MM_CHECK(shape.size() == 5, "got a shape of " << shape.size() << " sizes, wanted (B, F, P, N, D)");
  MM_CHECK(strides.size() == 4 * tensors, "got " << strides.size() << " strides, wanted " << 4 * tensors
                                                 << ": B, F, P, N of each of " << tensors << " tensors");
  TemporalAttention op{shape[0], shape[1], shape[2], shape[3], shape[4], parse_dtype(dtype), float(scale), num_threads};
  MM_CHECK(op.B >= 0 && op.F >= 0 && op.P >= 0 && op.N >= 0, "got a negative size in (B, F, P, N, D)");
  MM_CHECK(op.F <= kMaxFrames, "got F = " << op.F << ", wanted at most " << kMaxFrames << " frames");
  MM_CHECK(op.D > 0 && op.D <= kMaxHeadDim && op.D % kHeadDimStep == 0,
           "got D = " << op.D << ", wanted a multiple of " << kHeadDimStep << " up to " << kMaxHeadDim);
  MM_CHECK(num_threads >= 1, "got num_threads = " << num_threads << ", wanted at least 1");
  return op;
}

Strided view(uintptr_t data, const std::vector<int64_t>& strides, int tensor) {
  const int64_t* s = strides.data() + 4 * tensor;
  return {reinterpret_cast<void*>(data), s[0], s[1], s[2], s[3]};
}

bool is_empty(const TemporalAttention& op) { return op.B * op.F * op.P * op.N == 0; }

}  // namespace

void temporal_attention_forward(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t o, const std::vector<int64_t>& shape,
                                const std::vector<int64_t>& strides, const std::string& dtype, double scale,
                                int num_threads) {
  auto op = parse_temporal_attention(shape, strides, 4, dtype, scale, num_threads);
  if (is_empty(op)) return;
  const auto* kernels = instruction_set().temporal_attention;
  kernels->forward(op, view(q, strides, 0), view(k, strides, 1), view(v, strides, 2), view(o, strides, 3));
}

void temporal_attention_backward(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t grad_o, uintptr_t dq, uintptr_t dk,
                                 uintptr_t dv, uintptr_t o, const std::vector<int64_t>& shape,
                                 const std::vector<int64_t>& strides, const std::string& dtype, double scale,
                                 int num_threads) {
  auto op = parse_temporal_attention(shape, strides, 8, dtype, scale, num_threads);
  if (is_empty(op)) return;
  const auto* kernels = instruction_set().temporal_attention;
  kernels->backward(op, view(q, strides, 0), view(k, strides, 1), view(v, strides, 2), view(grad_o, strides, 3),
                    view(dq, strides, 4), view(dk, strides, 5), view(dv, strides, 6), view(o, strides, 7));
}

}  // namespace mm
