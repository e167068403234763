#include "launch.h"
#include "temporal_attention.cuh"
#include "temporal_attention_launches.h"

namespace mm::cuda {
namespace {

// Calls call(element, columns, tiles) with the types of the instantiation for this operation.
template <class Call>
void with_types(const TemporalAttention& op, Call call) {
  const auto with_element = [&](auto element) {
    with_instantiation(op.F, op.D, [&](auto columns, auto tiles) { call(element, columns, tiles); });
  };
  if (op.dtype == DataType::kBFloat16)
    with_element(BFloat16());
  else
    with_element(Float16());
}

template <class Kernel, class... Tensors>
void launch(Kernel* kernel, const TemporalAttention& op, int shared_bytes, int device, uintptr_t stream,
            Tensors... tensors) {
  const AttentionShape shape{uint32_t(op.P), uint32_t(op.N), int(op.F), int(op.D), op.scale};
  cuda::launch("temporal_attention", kernel, op.B * op.P * op.N, 32 * num_warps(int(op.F)), shared_bytes, device,
               reinterpret_cast<void*>(stream), tensors..., shape);
}

}  // namespace

void temporal_attention_forward(const TemporalAttention& op, Strided q, Strided k, Strided v, Strided o, int device,
                                uintptr_t stream) {
  with_types(op, [&](auto element, auto columns, auto tiles) {
    constexpr int kColumns = decltype(columns)::value, kTiles = decltype(tiles)::value;
    const int shared_bytes = forward_shared_bytes(num_tiles<kTiles>(int(op.F)), kColumns);
    launch(temporal_attention_forward_kernel<decltype(element), kColumns, kTiles>, op, shared_bytes, device, stream, q,
           k, v, o);
  });
}

void temporal_attention_backward(const TemporalAttention& op, Strided q, Strided k, Strided v, Strided grad_o,
                                 Strided dq, Strided dk, Strided dv, int device, uintptr_t stream) {
  with_types(op, [&](auto element, auto columns, auto tiles) {
    constexpr int kColumns = decltype(columns)::value, kTiles = decltype(tiles)::value;
    const int shared_bytes = backward_shared_bytes(num_tiles<kTiles>(int(op.F)), kColumns);
    launch(temporal_attention_backward_kernel<decltype(element), kColumns, kTiles>, op, shared_bytes, device, stream, q,
           k, v, grad_o, dq, dk, dv);
  });
}

int temporal_attention_shared_bytes(int64_t F, int64_t D) {
  return with_instantiation(F, D, [&](auto columns, auto tiles) {
    return backward_shared_bytes(num_tiles<decltype(tiles)::value>(int(F)), decltype(columns)::value);
  });
}

}  // namespace mm::cuda
