// Every native entry: it checks its arguments with a message, then calls a kernel. No policy, no torch.
//
// Pointers are integers and the caller owns the memory; shapes and element strides are lists.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mm {

// csrc/entry/geglu.cpp; shape is (rows, half).
void geglu_forward(uintptr_t u, uintptr_t bias, uintptr_t g, const std::vector<int64_t>& shape,
                   const std::string& dtype, int num_threads);
void geglu_backward(uintptr_t u, uintptr_t bias, uintptr_t dg, uintptr_t du, uintptr_t g, uintptr_t sums,
                    const std::vector<int64_t>& shape, int64_t block_rows, const std::string& dtype, int num_threads);

// csrc/entry/layer_norm.cpp; shape is (R, T, C), strides are R and T of each strided tensor, dtypes are those of the
// strided tensors and of the others; a null shift is none.
void layer_norm_forward(uintptr_t x, uintptr_t shift, uintptr_t weight, uintptr_t bias, uintptr_t out, uintptr_t mean,
                        uintptr_t rstd, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                        const std::vector<std::string>& dtypes, double eps, int num_threads);
void layer_norm_backward(uintptr_t dout, uintptr_t x, uintptr_t shift, uintptr_t weight, uintptr_t mean, uintptr_t rstd,
                         uintptr_t dy, uintptr_t dx, uintptr_t sums, const std::vector<int64_t>& shape,
                         const std::vector<int64_t>& strides, const std::vector<std::string>& dtypes,
                         int64_t block_tokens, int num_threads);
void layer_norm_add_residual(uintptr_t x, uintptr_t shift, uintptr_t inner, uintptr_t bias, uintptr_t y,
                             const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                             const std::vector<std::string>& dtypes, int num_threads);

// csrc/entry/temporal_attention.cpp; a null o is not written.
void temporal_attention_forward(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t o, const std::vector<int64_t>& shape,
                                const std::vector<int64_t>& strides, const std::string& dtype, double scale,
                                int num_threads);
void temporal_attention_backward(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t grad_o, uintptr_t dq, uintptr_t dk,
                                 uintptr_t dv, uintptr_t o, const std::vector<int64_t>& shape,
                                 const std::vector<int64_t>& strides, const std::string& dtype, double scale,
                                 int num_threads);

// csrc/entry/group_norm_silu.cpp; shape (M, H, W, C, C2, G), strides of M, H, W of each tensor up to `mean`.
void group_norm_silu_statistics(uintptr_t x, uintptr_t x2, uintptr_t mean, uintptr_t rstd,
                                const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                                const std::string& dtype, double eps, int num_threads);
void group_norm_silu_activate(uintptr_t x, uintptr_t x2, uintptr_t out, uintptr_t mean, uintptr_t rstd, uintptr_t gamma,
                              uintptr_t beta, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                              const std::string& dtype, const std::string& activation, int num_threads);
void group_norm_silu_backward(uintptr_t x, uintptr_t x2, uintptr_t grad, uintptr_t dx, uintptr_t dx2, uintptr_t mean,
                              uintptr_t rstd, uintptr_t gamma, uintptr_t beta, uintptr_t dgamma, uintptr_t dbeta,
                              const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                              const std::string& dtype, const std::string& activation, int num_threads);

// csrc/entry/group_norm_silu_conv_cuda.cpp, built only with nvcc; the order of the tensors is told there.
void group_norm_silu_conv_forward_cuda(const std::vector<uintptr_t>& tensors, const std::vector<int64_t>& shape,
                                       const std::vector<int64_t>& strides, const std::vector<int64_t>& shift_strides,
                                       const std::string& dtype, int device, uintptr_t stream);
void group_norm_silu_conv_weight_gradient_cuda(const std::vector<uintptr_t>& tensors, const std::vector<int64_t>& shape,
                                               const std::vector<int64_t>& strides, int splits,
                                               const std::string& dtype, int device, uintptr_t stream);
void group_norm_silu_conv_norm_backward_cuda(const std::vector<uintptr_t>& tensors, const std::vector<int64_t>& shape,
                                             const std::vector<int64_t>& strides, int splits, const std::string& dtype,
                                             int device, uintptr_t stream);

// csrc/entry/temporal_attention_cuda.cpp, where built with CUDA: two-byte types; the order of the tensors is told
// there; the stream is a cudaStream_t of the device.
void temporal_attention_forward_cuda(const std::vector<uintptr_t>& tensors, const std::vector<int64_t>& shape,
                                     const std::vector<int64_t>& strides, const std::string& dtype, double scale,
                                     int device, uintptr_t stream);
void temporal_attention_backward_cuda(const std::vector<uintptr_t>& tensors, const std::vector<int64_t>& shape,
                                      const std::vector<int64_t>& strides, const std::string& dtype, double scale,
                                      int device, uintptr_t stream);
int temporal_attention_shared_bytes_cuda(int64_t F, int64_t D);  // of a block of the backward

}  // namespace mm
