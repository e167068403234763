// Checks and calls the CPU kernels of temporal attention.
#include "../cpu/instruction_set.h"
#include "../entry.h"
#include "parse_temporal_attention.h"

namespace mm {
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
