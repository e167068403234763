// Checks and calls the CPU kernels of group normalisation and SiLU.
#include "../check.h"
#include "../cpu/instruction_set.h"
#include "../entry.h"
#include "parse.h"

namespace mm {
namespace {

// The operation and its tensors: those over x's channels alternate with those over x2's, as the strides do.
struct Parsed {
  GroupNormSilu op;
  int64_t C, C2;
  const std::vector<int64_t>& strides;

  Parsed(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, size_t tensors,
         const std::string& dtype, const std::string& activation, int num_threads)
      : op{}, C(0), C2(0), strides(strides) {
    MM_CHECK(shape.size() == 6, "got a shape of " << shape.size() << " sizes, wanted (M, H, W, C, C2, G)");
    MM_CHECK(strides.size() == 3 * tensors, "got " << strides.size() << " strides, wanted " << 3 * tensors
                                                   << ": M, H, W of each of " << tensors << " tensors");
    for (int64_t size : shape) MM_CHECK(size >= 0, "got a negative size in (M, H, W, C, C2, G)");
    C = shape[3], C2 = shape[4];
    op = {shape[0], shape[1], shape[2], C + C2, shape[5], parse_dtype(dtype), parse_dtype(activation), num_threads};
    MM_CHECK(op.G > 0 && op.C > 0 && op.C % op.G == 0,
             "got " << C << " + " << C2 << " channels in " << op.G << " groups, wanted a multiple of the groups");
    MM_CHECK(op.activation == op.dtype || op.activation == DataType::kFloat32,
             "got an activation in " << activation << " of inputs in " << dtype << ", wanted the same or float32");
    MM_CHECK(num_threads >= 1, "got num_threads = " << num_threads << ", wanted at least 1");
  }
  bool is_empty() const { return op.M * op.H * op.W == 0; }
  Rows rows(uintptr_t data, int tensor, int64_t channels) const {
    const int64_t* s = strides.data() + 3 * tensor;
    return {reinterpret_cast<void*>(data), s[0], s[1], s[2], channels};
  }
};

float* floats(uintptr_t data) { return reinterpret_cast<float*>(data); }

}  // namespace

void group_norm_silu_statistics(uintptr_t x, uintptr_t x2, uintptr_t mean, uintptr_t rstd,
                                const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                                const std::string& dtype, double eps, int num_threads) {
  const Parsed in(shape, strides, 2, dtype, dtype, num_threads);
  if (in.is_empty()) return;
  const auto* kernels = instruction_set().group_norm_silu;
  kernels->statistics(in.op, in.rows(x, 0, in.C), in.rows(x2, 1, in.C2), float(eps), floats(mean), floats(rstd));
}

void group_norm_silu_activate(uintptr_t x, uintptr_t x2, uintptr_t out, uintptr_t mean, uintptr_t rstd, uintptr_t gamma,
                              uintptr_t beta, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                              const std::string& dtype, const std::string& activation, int num_threads) {
  const Parsed in(shape, strides, 3, dtype, activation, num_threads);
  if (in.is_empty()) return;
  const NormParameters norm{floats(mean), floats(rstd), floats(gamma), floats(beta)};
  const auto* kernels = instruction_set().group_norm_silu;
  kernels->activate(in.op, in.rows(x, 0, in.C), in.rows(x2, 1, in.C2), norm, in.rows(out, 2, in.op.C));
}

void group_norm_silu_backward(uintptr_t x, uintptr_t x2, uintptr_t grad, uintptr_t dx, uintptr_t dx2, uintptr_t mean,
                              uintptr_t rstd, uintptr_t gamma, uintptr_t beta, uintptr_t dgamma, uintptr_t dbeta,
                              const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                              const std::string& dtype, const std::string& activation, int num_threads) {
  const Parsed in(shape, strides, 5, dtype, activation, num_threads);
  if (in.is_empty()) return;
  const NormParameters norm{floats(mean), floats(rstd), floats(gamma), floats(beta)};
  const auto* kernels = instruction_set().group_norm_silu;
  kernels->backward(in.op, in.rows(x, 0, in.C), in.rows(x2, 1, in.C2), in.rows(grad, 2, in.op.C), norm,
                    in.rows(dx, 3, in.C), in.rows(dx2, 4, in.C2), floats(dgamma), floats(dbeta));
}

}  // namespace mm
