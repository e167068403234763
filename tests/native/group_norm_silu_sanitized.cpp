// Runs the CPU kernels on buffers of the exact size, so that a sanitizer sees every access outside them.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/group_norm_silu.h"

namespace mm {
#define MM_DECLARE(set)                             \
  namespace set {                                   \
  extern const GroupNormSiluKernels kGroupNormSilu; \
  }
#if defined(__x86_64__)
MM_DECLARE(avx512)
MM_DECLARE(avx2)
#endif
MM_DECLARE(portable)
}  // namespace mm

namespace {

template <class T>
std::vector<T> random_values(int64_t count) {
  std::vector<T> values(count);
  for (auto& value : values) value = static_cast<T>(std::rand() % 3);
  return values;
}

template <class T, class A>
void run(const mm::GroupNormSiluKernels& kernels, mm::DataType dtype, mm::DataType activation, int64_t M, int64_t H,
         int64_t W, int64_t C, int64_t C2, int64_t G) {
  const int64_t rows = M * H * W, joined = C + C2;
  const mm::GroupNormSilu op{M, H, W, joined, G, dtype, activation, 2};
  auto x = random_values<T>(rows * C), x2 = random_values<T>(rows * C2), dx = x, dx2 = x2;
  auto a = random_values<A>(rows * joined);
  auto mean = random_values<float>(M * G), rstd = mean;
  auto gamma = random_values<float>(joined), beta = gamma, dgamma = gamma, dbeta = gamma;
  auto view = [&](auto& tensor, int64_t channels) {
    return mm::Rows{channels ? tensor.data() : nullptr, H * W * channels, W * channels, channels, channels};
  };
  kernels.statistics(op, view(x, C), view(x2, C2), 1e-5f, mean.data(), rstd.data());
  const mm::NormParameters norm{mean.data(), rstd.data(), gamma.data(), beta.data()};
  kernels.activate(op, view(x, C), view(x2, C2), norm, view(a, joined));
  kernels.backward(op, view(x, C), view(x2, C2), view(a, joined), norm, view(dx, C), view(dx2, C2), dgamma.data(),
                   dbeta.data());
}

void run_all(const char* name, const mm::GroupNormSiluKernels& kernels) {
  using mm::DataType;
  const int64_t shapes[][6] = {{1, 1, 1, 1, 0, 1},   {2, 3, 5, 40, 0, 4},    {1, 2, 3, 50, 30, 4},
                               {2, 33, 32, 7, 5, 3}, {1, 72, 15, 64, 0, 32}, {3, 1, 17, 19, 0, 19}};
  for (const auto& s : shapes) {
    run<float, float>(kernels, DataType::kFloat32, DataType::kFloat32, s[0], s[1], s[2], s[3], s[4], s[5]);
    for (auto half : {DataType::kBFloat16, DataType::kFloat16}) {
      run<uint16_t, uint16_t>(kernels, half, half, s[0], s[1], s[2], s[3], s[4], s[5]);
      run<uint16_t, float>(kernels, half, DataType::kFloat32, s[0], s[1], s[2], s[3], s[4], s[5]);
    }
  }
  std::printf("clean %s\n", name);
}

}  // namespace

int main() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    run_all("avx512", mm::avx512::kGroupNormSilu);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) run_all("avx2", mm::avx2::kGroupNormSilu);
#endif
  run_all("portable", mm::portable::kGroupNormSilu);
}
