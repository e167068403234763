// Checks and calls the CPU kernels of LayerNorm and the residual around it.
#include "../check.h"
#include "../cpu/instruction_set.h"
#include "../entry.h"
#include "parse.h"

namespace mm {
namespace {

LayerNorm parse_layer_norm(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, size_t tensors,
                           const std::vector<std::string>& dtypes, double eps, int64_t block_tokens, int num_threads) {
  MM_CHECK(shape.size() == 3, "got a shape of " << shape.size() << " sizes, wanted (R, T, C)");
  MM_CHECK(shape[0] >= 0 && shape[1] >= 0 && shape[2] >= 1, "got a size of (R, T, C) out of range");
  MM_CHECK(strides.size() == 2 * tensors, "got " << strides.size() << " strides, wanted " << 2 * tensors
                                                 << ": R, T of each of " << tensors << " tensors");
  MM_CHECK(dtypes.size() == 2, "got " << dtypes.size() << " dtypes, wanted 2: of the tokens and of what is inside");
  MM_CHECK(block_tokens >= 1, "got block_tokens = " << block_tokens << ", wanted at least 1");
  MM_CHECK(num_threads >= 1, "got num_threads = " << num_threads << ", wanted at least 1");
  return {shape[0],   shape[1],     shape[2],   parse_dtype(dtypes[0]), parse_dtype(dtypes[1]),
          float(eps), block_tokens, num_threads};
}

Tokens view(uintptr_t data, const std::vector<int64_t>& strides, int tensor) {
  return {pointer<void>(data), strides[2 * tensor], strides[2 * tensor + 1]};
}

}  // namespace

void layer_norm_forward(uintptr_t x, uintptr_t shift, uintptr_t weight, uintptr_t bias, uintptr_t out, uintptr_t mean,
                        uintptr_t rstd, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                        const std::vector<std::string>& dtypes, double eps, int num_threads) {
  auto op = parse_layer_norm(shape, strides, 1, dtypes, eps, 1, num_threads);
  instruction_set().layer_norm->forward(op, view(x, strides, 0), pointer<float>(shift), pointer<float>(weight),
                                        pointer<float>(bias), pointer<void>(out), pointer<float>(mean),
                                        pointer<float>(rstd));
}

void layer_norm_backward(uintptr_t dout, uintptr_t x, uintptr_t shift, uintptr_t weight, uintptr_t mean, uintptr_t rstd,
                         uintptr_t dy, uintptr_t dx, uintptr_t sums, const std::vector<int64_t>& shape,
                         const std::vector<int64_t>& strides, const std::vector<std::string>& dtypes,
                         int64_t block_tokens, int num_threads) {
  auto op = parse_layer_norm(shape, strides, 3, dtypes, 0, block_tokens, num_threads);
  instruction_set().layer_norm->backward(op, pointer<void>(dout), view(x, strides, 0), pointer<float>(shift),
                                         pointer<float>(weight), pointer<float>(mean), pointer<float>(rstd),
                                         view(dy, strides, 1), view(dx, strides, 2), pointer<float>(sums));
}

void layer_norm_add_residual(uintptr_t x, uintptr_t shift, uintptr_t inner, uintptr_t bias, uintptr_t y,
                             const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                             const std::vector<std::string>& dtypes, int num_threads) {
  auto op = parse_layer_norm(shape, strides, 2, dtypes, 0, 1, num_threads);
  instruction_set().layer_norm->add_residual(op, view(x, strides, 0), pointer<float>(shift), pointer<void>(inner),
                                             pointer<float>(bias), view(y, strides, 1));
}

}  // namespace mm
