// Checks and launches the CUDA kernels of temporal attention.
#include "../cuda/temporal_attention.h"
#include "../entry.h"
#include "temporal_attention.h"

namespace mm {
namespace {

TemporalAttention parse(const std::vector<uintptr_t>& pointers, const std::vector<int64_t>& shape,
                        const std::vector<int64_t>& strides, const std::string& dtype, double scale) {
  const auto op = parse_temporal_attention(shape, strides, pointers.size(), dtype, scale, /*num_threads=*/1);
  MM_CHECK(op.dtype != DataType::kFloat32, "got dtype float32, the CUDA kernels take bfloat16 and float16");
  for (const int64_t size : {op.B, op.P, op.N})
    MM_CHECK(size <= INT32_MAX, "got a size of " << size << ", wanted less than 2^31 in B, P and N");
  MM_CHECK(op.B * op.P <= INT32_MAX && op.B * op.P * op.N <= INT32_MAX,
           "got B * P * N = " << double(op.B) * op.P * op.N << " rows, one launch takes less than 2^31");
  for (const auto pointer : pointers) MM_CHECK(pointer % 16 == 0, "got data that is not aligned to 16 bytes");
  for (const auto stride : strides)
    MM_CHECK(stride % 8 == 0, "got a stride of " << stride << " elements, wanted multiples of 8: 16 bytes");
  return op;
}

}  // namespace

void temporal_attention_forward_cuda(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t o,
                                     const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                                     const std::string& dtype, double scale, int device, uintptr_t stream) {
  const auto op = parse({q, k, v, o}, shape, strides, dtype, scale);
  if (is_empty(op)) return;
  cuda::temporal_attention_forward(op, view(q, strides, 0), view(k, strides, 1), view(v, strides, 2),
                                   view(o, strides, 3), device, stream);
}

void temporal_attention_backward_cuda(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t grad_o, uintptr_t dq,
                                      uintptr_t dk, uintptr_t dv, const std::vector<int64_t>& shape,
                                      const std::vector<int64_t>& strides, const std::string& dtype, double scale,
                                      int device, uintptr_t stream) {
  const auto op = parse({q, k, v, grad_o, dq, dk, dv}, shape, strides, dtype, scale);
  if (is_empty(op)) return;
  cuda::temporal_attention_backward(op, view(q, strides, 0), view(k, strides, 1), view(v, strides, 2),
                                    view(grad_o, strides, 3), view(dq, strides, 4), view(dk, strides, 5),
                                    view(dv, strides, 6), device, stream);
}

int temporal_attention_shared_bytes_cuda(int64_t F, int64_t D) { return cuda::temporal_attention_shared_bytes(F, D); }

}  // namespace mm
