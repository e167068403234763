// Launches of the CUDA kernels of temporal attention, on two-byte types; they return before the kernels have run.
#pragma once

#include "../temporal_attention.h"

namespace mm::cuda {

constexpr int64_t kMaxFramesInBlock = 128;  // a block owns a row of frames whole

void temporal_attention_forward(const TemporalAttention& op, Strided q, Strided k, Strided v, Strided o, int device,
                                uintptr_t stream);
void temporal_attention_backward(const TemporalAttention& op, Strided q, Strided k, Strided v, Strided grad_o,
                                 Strided dq, Strided dk, Strided dv, int device, uintptr_t stream);

// Bytes of shared memory that a block of the backward kernel needs; the forward needs less.
int temporal_attention_shared_bytes(int64_t F, int64_t D);

}  // namespace mm::cuda
