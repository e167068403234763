// Runs the CPU kernel on buffers of the exact size, so that a sanitizer sees every access outside them.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/instruction_set.h"

namespace {

template <class T>
void run(const mm::TemporalAttentionKernels& kernels, mm::DataType dtype, int64_t F, int64_t P, int64_t N, int64_t D) {
  const int64_t B = 2, count = B * F * P * N * D;
  mm::TemporalAttention op{B, F, P, N, D, dtype, 0.25f, 2};
  std::vector<std::vector<T>> tensors(8, std::vector<T>(count));
  for (auto& tensor : tensors)
    for (auto& value : tensor) value = static_cast<T>(std::rand() % 3);
  auto view = [&](int i) { return mm::Strided{tensors[i].data(), F * P * N * D, P * N * D, N * D, D}; };
  kernels.forward(op, view(0), view(1), view(2), view(3));
  kernels.backward(op, view(0), view(1), view(2), view(3), view(4), view(5), view(6), view(7));
  kernels.backward(op, view(0), view(1), view(2), view(3), view(4), view(5), view(6), mm::Strided{});
}

}  // namespace

int main() {
  const int64_t shapes[][4] = {{1, 1, 1, 16},  {5, 3, 2, 48},   {16, 1, 1, 64},  {71, 2, 1, 64},
                               {72, 1, 2, 64}, {73, 1, 1, 112}, {128, 1, 1, 128}};
  for (const auto& name : mm::supported_instruction_sets()) {
    mm::select_instruction_set(name);
    const auto& kernels = *mm::instruction_set().temporal_attention;
    for (const auto& s : shapes) {
      run<float>(kernels, mm::DataType::kFloat32, s[0], s[1], s[2], s[3]);
      run<uint16_t>(kernels, mm::DataType::kBFloat16, s[0], s[1], s[2], s[3]);
      run<uint16_t>(kernels, mm::DataType::kFloat16, s[0], s[1], s[2], s[3]);
    }
    std::printf("clean %s\n", name.c_str());
  }
}
