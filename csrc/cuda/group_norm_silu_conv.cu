// Launchers of the kernels of group_norm_silu_conv: which instantiation, how many blocks, how much shared memory.
#include "group_norm_silu_backward.cuh"
#include "group_norm_silu_conv.cuh"
#include "group_norm_silu_weight_gradient.cuh"
#include "launch.h"

namespace mm::cuda {
namespace {

template <class Kernel, class... Arguments>
void launch(Kernel* kernel, int64_t blocks, int threads, int shared_bytes, const Execution& on,
            Arguments... arguments) {
  cuda::launch("group_norm_silu_conv", kernel, blocks, threads, shared_bytes, on.device, on.stream, arguments...);
}

// action(T{}) with the kernels' type of a dtype.
template <class Action>
void with_type(DataType dtype, Action action) {
  if (dtype == DataType::kBFloat16)
    action(BFloat16{});
  else
    action(Float16{});
}

}  // namespace

void group_norm_silu_conv(const NormInput& in, const Convolution& conv, const Execution& on) {
  with_type(on.dtype, [&](auto type) {
    using T = decltype(type);
    launch(conv.taps == 9 ? convolve<T, 9> : convolve<T, 3>, tiling::conv_blocks(in, conv.K), tiling::kThreads,
           tiling::conv_shared_bytes(conv.taps), on, in, conv);
  });
}

void group_norm_silu_weight_gradient(const NormInput& in, const WeightGradient& op, float* dweight,
                                     const Execution& on) {
  const int channels = in.C + in.C2;
  with_type(on.dtype, [&](auto type) {
    using T = decltype(type);
    launch(op.taps == 9 ? weight_gradient<T, 9> : weight_gradient<T, 3>, tiling::gradient_blocks(in, op),
           tiling::kThreads, tiling::gradient_shared_bytes(op.taps), on, in, op);
  });
  const int64_t count = int64_t{op.taps} * channels * op.K, values_of_block = 4 * tiling::kThreads;
  if (op.splits > 1)
    launch(add_splits, (count + values_of_block - 1) / values_of_block, tiling::kThreads, 0, on, op.partial, dweight,
           count, op.splits);
}

void group_norm_silu_backward(const NormInput& in, const NormBackward& op, int splits, const Execution& on) {
  const int64_t blocks = slabs::count(in) * splits;
  with_type(on.dtype, [&](auto type) {
    launch(norm_backward_sums<decltype(type)>, blocks, slabs::kThreads, slabs::kSharedBytes, on, in, op, splits);
  });
  launch(norm_backward_groups, in.M * in.G, 32, 0, on, in, op, splits);
  launch(norm_backward_parameters, in.C + in.C2, 32, 0, on, in, op, splits);
  with_type(on.dtype, [&](auto type) {
    launch(norm_backward_inputs<decltype(type)>, blocks, slabs::kThreads, 0, on, in, op, splits);
  });
}

}  // namespace mm::cuda
