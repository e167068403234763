// Checks and calls the CUDA kernels of group_norm_silu_conv; built only with nvcc.
//
// Pointers come in the order named at each entry, 0 where a tensor is absent; strides (m, h, w) of each strided tensor.
#include "../check.h"
#include "../cuda/group_norm_silu_conv.h"
#include "../entry.h"
#include "parse.h"

namespace mm {
namespace {

using Integers = std::vector<int64_t>;
using Pointers = std::vector<uintptr_t>;

template <class T>
T* at(const Pointers& tensors, int i) {
  return reinterpret_cast<T*>(tensors[i]);
}

Execution parse_execution(const std::string& dtype, int device, uintptr_t stream) {
  MM_CHECK(dtype == "bfloat16" || dtype == "float16",
           "got dtype " << dtype << ", wanted bfloat16 or float16: the CUDA kernels use the tensor cores");
  return {parse_dtype(dtype), device, reinterpret_cast<void*>(stream)};
}

void check_counts(const Pointers& tensors, size_t num_tensors, const Integers& shape, size_t num_sizes,
                  const Integers& strides, size_t num_strides) {
  MM_CHECK(tensors.size() == num_tensors, "got " << tensors.size() << " pointers, wanted " << num_tensors);
  MM_CHECK(shape.size() == num_sizes, "got a shape of " << shape.size() << " sizes, wanted " << num_sizes);
  MM_CHECK(strides.size() == num_strides, "got " << strides.size() << " strides, wanted " << num_strides);
  for (const int64_t size : shape) MM_CHECK(size >= 0, "got a negative size in the shape");
  for (const int64_t stride : strides)
    MM_CHECK(stride % 8 == 0, "got a stride of " << stride << " elements, wanted a multiple of 8 (16 bytes)");
}

Frames frames(const Pointers& tensors, int i, const Integers& strides, int strided) {
  MM_CHECK(tensors[i] % 16 == 0, "got a tensor at an address that is no multiple of 16");
  const int64_t* s = strides.data() + 3 * strided;
  return {at<void>(tensors, i), s[0], s[1], s[2]};
}

// shape starts with (M, H, W, C, C2, G), tensors with x, x2, mean, rstd, gamma, beta, strides with those of x and x2.
NormInput parse_input(const Pointers& tensors, const Integers& shape, const Integers& strides) {
  const int64_t M = shape[0], H = shape[1], W = shape[2], C = shape[3], C2 = shape[4], G = shape[5];
  MM_CHECK(C > 0 && C % 8 == 0 && C2 % 8 == 0, "got C = " << C << ", C2 = " << C2 << ", wanted multiples of 8");
  MM_CHECK(G > 0 && (C + C2) % G == 0, "got " << C + C2 << " channels, wanted a multiple of G = " << G);
  MM_CHECK(H < 1 << 24 && W < 1 << 24 && H * W < INT32_MAX && C + C2 < 1 << 20,
           "got (H, W, C) = (" << H << ", " << W << ", " << C + C2 << "), wanted fewer pixels or channels");
  NormInput in{};
  in.x = frames(tensors, 0, strides, 0), in.x2 = frames(tensors, 1, strides, 1);
  in.M = M, in.H = int(H), in.W = int(W), in.C = int(C), in.C2 = int(C2), in.G = int(G);
  in.mean = at<const float>(tensors, 2), in.rstd = at<const float>(tensors, 3);
  in.gamma = at<const float>(tensors, 4), in.beta = at<const float>(tensors, 5);
  MM_CHECK(tensors[4] % 16 == 0 && tensors[5] % 16 == 0, "got gamma or beta at an address that is no multiple of 16");
  MM_CHECK(tiling::picture_tiles(in) < INT32_MAX, "got M = " << M << " frames, wanted fewer than 2^31 tiles in all");
  return in;
}

void check_outputs(int64_t K, int64_t taps) {
  MM_CHECK(K > 0 && K % 8 == 0, "got K = " << K << " output channels, wanted a multiple of 8");
  MM_CHECK(taps == 9 || taps == 3, "got " << taps << " taps, wanted 9 (3x3) or 3 (3x1)");
}

bool is_empty(const NormInput& in) { return in.M * in.H * in.W == 0; }

}  // namespace

// x, x2, mean, rstd, gamma, beta, weight, bias, shift, residual, y; strides of x, x2, residual, y; shape ends with K,
// taps; shift_strides (m, h). A null mean convolves x as it is.
void group_norm_silu_conv_forward_cuda(const Pointers& tensors, const Integers& shape, const Integers& strides,
                                       const Integers& shift_strides, const std::string& dtype, int device,
                                       uintptr_t stream) {
  check_counts(tensors, 11, shape, 8, strides, 12);
  MM_CHECK(shift_strides.size() == 2, "got " << shift_strides.size() << " strides of shift, wanted 2: m, h");
  const Execution on = parse_execution(dtype, device, stream);
  const NormInput in = parse_input(tensors, shape, strides);
  check_outputs(shape[6], shape[7]);
  for (int i = 6; i < 9; i++)
    MM_CHECK(tensors[i] % 16 == 0, "got weight, bias or shift at an address that is no multiple of 16");
  if (is_empty(in)) return;
  const Convolution conv{int(shape[6]),
                         int(shape[7]),
                         at<const void>(tensors, 6),
                         at<const float>(tensors, 7),
                         at<const float>(tensors, 8),
                         shift_strides[0],
                         shift_strides[1],
                         frames(tensors, 9, strides, 2),
                         frames(tensors, 10, strides, 3)};
  cuda::group_norm_silu_conv(in, conv, on);
}

// x, x2, mean, rstd, gamma, beta, dy, partial, dweight; strides of x, x2, dy; shape ends with K, taps
void group_norm_silu_conv_weight_gradient_cuda(const Pointers& tensors, const Integers& shape, const Integers& strides,
                                               int splits, const std::string& dtype, int device, uintptr_t stream) {
  check_counts(tensors, 9, shape, 8, strides, 9);
  const Execution on = parse_execution(dtype, device, stream);
  const NormInput in = parse_input(tensors, shape, strides);
  check_outputs(shape[6], shape[7]);
  MM_CHECK(!is_empty(in), "got no pixels to sum over, wanted at least one (the gradient is zero)");
  MM_CHECK(splits >= 1 && splits <= tiling::picture_tiles(in),
           "got " << splits << " splits, wanted 1 to the number of tiles, " << tiling::picture_tiles(in));
  const WeightGradient op{int(shape[6]), int(shape[7]), splits, frames(tensors, 6, strides, 2), at<float>(tensors, 7)};
  cuda::group_norm_silu_weight_gradient(in, op, at<float>(tensors, 8), on);
}

// x, x2, mean, rstd, gamma, beta, da, dx, dx2, partial, group_sums, dgamma, dbeta; strides of x, x2, da, dx, dx2
void group_norm_silu_conv_norm_backward_cuda(const Pointers& tensors, const Integers& shape, const Integers& strides,
                                             int splits, const std::string& dtype, int device, uintptr_t stream) {
  check_counts(tensors, 13, shape, 6, strides, 15);
  const Execution on = parse_execution(dtype, device, stream);
  const NormInput in = parse_input(tensors, shape, strides);
  MM_CHECK(splits >= 1, "got " << splits << " splits, wanted at least 1");
  MM_CHECK(!is_empty(in), "got no pixels to sum over, wanted at least one (the gradients are zero)");
  const NormBackward op{frames(tensors, 6, strides, 2), frames(tensors, 7, strides, 3), frames(tensors, 8, strides, 4),
                        at<Pair>(tensors, 9),           at<Pair>(tensors, 10),          at<float>(tensors, 11),
                        at<float>(tensors, 12)};
  cuda::group_norm_silu_backward(in, op, splits, on);
}

}  // namespace mm
