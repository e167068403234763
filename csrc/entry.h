// Every native entry: it checks its arguments with a message, then calls a kernel. No policy, no torch.
//
// Pointers are integers and the caller owns the memory; shapes and element strides are lists.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mm {

// csrc/entry/temporal_attention.cpp; a null o is not written.
void temporal_attention_forward(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t o, const std::vector<int64_t>& shape,
                                const std::vector<int64_t>& strides, const std::string& dtype, double scale,
                                int num_threads);
void temporal_attention_backward(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t grad_o, uintptr_t dq, uintptr_t dk,
                                 uintptr_t dv, uintptr_t o, const std::vector<int64_t>& shape,
                                 const std::vector<int64_t>& strides, const std::string& dtype, double scale,
                                 int num_threads);

}  // namespace mm
