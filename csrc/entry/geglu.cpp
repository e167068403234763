// Checks and calls the CPU kernels of GEGLU.
#include "../check.h"
#include "../cpu/instruction_set.h"
#include "../entry.h"
#include "parse.h"

namespace mm {
namespace {

Geglu parse_geglu(const std::vector<int64_t>& shape, const std::string& dtype, int64_t block_rows, int num_threads) {
  MM_CHECK(shape.size() == 2, "got a shape of " << shape.size() << " sizes, wanted (rows, half)");
  MM_CHECK(shape[0] >= 0 && shape[1] >= 0, "got a negative size in (rows, half)");
  MM_CHECK(block_rows >= 1, "got block_rows = " << block_rows << ", wanted at least 1");
  MM_CHECK(num_threads >= 1, "got num_threads = " << num_threads << ", wanted at least 1");
  return {shape[0], shape[1], parse_dtype(dtype), block_rows, num_threads};
}

}  // namespace

void geglu_forward(uintptr_t u, uintptr_t bias, uintptr_t g, const std::vector<int64_t>& shape,
                   const std::string& dtype, int num_threads) {
  auto op = parse_geglu(shape, dtype, 1, num_threads);
  instruction_set().geglu->forward(op, pointer<void>(u), pointer<float>(bias), pointer<void>(g));
}

void geglu_backward(uintptr_t u, uintptr_t bias, uintptr_t dg, uintptr_t du, uintptr_t g, uintptr_t sums,
                    const std::vector<int64_t>& shape, int64_t block_rows, const std::string& dtype, int num_threads) {
  auto op = parse_geglu(shape, dtype, block_rows, num_threads);
  instruction_set().geglu->backward(op, pointer<void>(u), pointer<float>(bias), pointer<void>(dg), pointer<void>(du),
                                    pointer<void>(g), pointer<float>(sums));
}

}  // namespace mm
