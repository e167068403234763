// Checks and launches the CUDA kernels of temporal attention.
#include "../cuda/temporal_attention_launches.h"
#include "../entry.h"
#include "parse_temporal_attention.h"

namespace mm {
namespace {

TemporalAttention parse(const std::vector<uintptr_t>& tensors, size_t num_tensors, const std::vector<int64_t>& shape,
                        const std::vector<int64_t>& strides, const std::string& dtype, double scale) {
  MM_CHECK(tensors.size() == num_tensors, "got " << tensors.size() << " pointers, wanted " << num_tensors);
  const auto op = parse_temporal_attention(shape, strides, num_tensors, dtype, scale, /*num_threads=*/1);
  MM_CHECK(op.F <= cuda::kMaxFramesInBlock,
           "got F = " << op.F << ", wanted at most " << cuda::kMaxFramesInBlock << " frames");
  MM_CHECK(op.dtype != DataType::kFloat32, "got dtype float32, the CUDA kernels take bfloat16 and float16");
  for (const int64_t size : {op.B, op.P, op.N})
    MM_CHECK(size <= INT32_MAX, "got a size of " << size << ", wanted less than 2^31 in B, P and N");
  MM_CHECK(op.B * op.P <= INT32_MAX && op.B * op.P * op.N <= INT32_MAX,
           "got B * P * N = " << double(op.B) * op.P * op.N << " rows, one launch takes less than 2^31");
  for (const auto pointer : tensors) MM_CHECK(pointer % 16 == 0, "got data that is not aligned to 16 bytes");
  for (const auto stride : strides)
    MM_CHECK(stride % 8 == 0, "got a stride of " << stride << " elements, wanted multiples of 8: 16 bytes");
  return op;
}

}  // namespace

// q, k, v, o
void temporal_attention_forward_cuda(const std::vector<uintptr_t>& tensors, const std::vector<int64_t>& shape,
                                     const std::vector<int64_t>& strides, const std::string& dtype, double scale,
                                     int device, uintptr_t stream) {
  const auto op = parse(tensors, 4, shape, strides, dtype, scale);
  if (is_empty(op)) return;
  const auto at = [&](int i) { return view(tensors[i], strides, i); };
  cuda::temporal_attention_forward(op, at(0), at(1), at(2), at(3), device, stream);
}

// q, k, v, do, dq, dk, dv
void temporal_attention_backward_cuda(const std::vector<uintptr_t>& tensors, const std::vector<int64_t>& shape,
                                      const std::vector<int64_t>& strides, const std::string& dtype, double scale,
                                      int device, uintptr_t stream) {
  const auto op = parse(tensors, 7, shape, strides, dtype, scale);
  if (is_empty(op)) return;
  const auto at = [&](int i) { return view(tensors[i], strides, i); };
  cuda::temporal_attention_backward(op, at(0), at(1), at(2), at(3), at(4), at(5), at(6), device, stream);
}

int temporal_attention_shared_bytes_cuda(int64_t F, int64_t D) { return cuda::temporal_attention_shared_bytes(F, D); }

}  // namespace mm
