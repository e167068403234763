// Runs the CPU kernels of LayerNorm and GEGLU on buffers of the exact size, so that a sanitizer sees every access
// outside them.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/instruction_set.h"

namespace {

using mm::DataType;

template <class T>
std::vector<T> filled(int64_t count) {
  std::vector<T> values(count);
  for (auto& value : values) value = static_cast<T>(std::rand() % 3);
  return values;
}

// Tokens are read and written at a stride, with the last one ending where its buffer ends.
template <class T, class Inner>
void run_norm(const mm::LayerNormKernels& kernels, DataType dtype, DataType inner_dtype, int64_t R, int64_t T_,
              int64_t C) {
  const int64_t tokens = R * T_, stride = C + 3, block = 5;
  mm::LayerNorm op{R, T_, C, dtype, inner_dtype, 1e-5f, block, 2};
  std::vector<std::vector<T>> strided(4, filled<T>(tokens * stride - 3));
  auto view = [&](int i) { return mm::Tokens{strided[i].data(), T_ * stride, stride}; };
  auto inner = filled<Inner>(tokens * C);
  auto weight = filled<float>(C), bias = filled<float>(C), shift = filled<float>(R * C);
  auto mean = filled<float>(tokens), rstd = filled<float>(tokens);
  auto sums = filled<float>((tokens + block - 1) / block * 3 * C);
  for (const float* shifts : {static_cast<const float*>(shift.data()), static_cast<const float*>(nullptr)}) {
    kernels.forward(op, view(0), shifts, weight.data(), bias.data(), inner.data(), mean.data(), rstd.data());
    kernels.backward(op, inner.data(), view(0), shifts, weight.data(), mean.data(), rstd.data(), view(1), view(2),
                     sums.data());
    kernels.add_residual(op, view(0), shifts, inner.data(), bias.data(), view(3));
  }
}

template <class T>
void run_geglu(const mm::GegluKernels& kernels, DataType dtype, int64_t rows, int64_t half) {
  const int64_t block = 5;
  mm::Geglu op{rows, half, dtype, block, 2};
  auto u = filled<T>(rows * 2 * half), g = filled<T>(rows * half);
  auto bias = filled<float>(2 * half), sums = filled<float>((rows + block - 1) / block * 2 * half);
  kernels.forward(op, u.data(), bias.data(), g.data());
  kernels.backward(op, u.data(), bias.data(), g.data(), u.data(), g.data(), sums.data());
}

}  // namespace

int main() {
  const int64_t shapes[][3] = {{1, 1, 1}, {2, 3, 7}, {1, 33, 16}, {3, 12, 80}, {2, 40, 35}};
  for (const auto& name : mm::supported_instruction_sets()) {
    mm::select_instruction_set(name);
    const auto& norm = *mm::instruction_set().layer_norm;
    const auto& geglu = *mm::instruction_set().geglu;
    for (const auto& s : shapes) {
      run_norm<float, float>(norm, DataType::kFloat32, DataType::kFloat32, s[0], s[1], s[2]);
      run_norm<float, uint16_t>(norm, DataType::kFloat32, DataType::kBFloat16, s[0], s[1], s[2]);
      run_norm<uint16_t, uint16_t>(norm, DataType::kFloat16, DataType::kFloat16, s[0], s[1], s[2]);
      run_geglu<float>(geglu, DataType::kFloat32, s[0] * s[1], s[2]);
      run_geglu<uint16_t>(geglu, DataType::kBFloat16, s[0] * s[1], s[2]);
      run_geglu<uint16_t>(geglu, DataType::kFloat16, s[0] * s[1], s[2]);
    }
    std::printf("clean %s\n", name.c_str());
  }
}
