// Runs the CUDA kernels of group_norm_silu_conv on the host, on buffers of the exact size, in both orders of threads.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/group_norm_silu_backward.cuh"
#include "cuda/group_norm_silu_conv.cuh"
#include "cuda/group_norm_silu_weight_gradient.cuh"

namespace {

using namespace mm;

struct Shape {
  int64_t M;
  int H, W, C, C2, G, K, taps, splits;
};

template <class T>
std::vector<uint16_t> filled(int64_t count) {
  std::vector<uint16_t> values(count);
  for (auto& value : values) value = cuda::narrow(std::rand() % 201 / 100.0f - 1.0f, T{});
  return values;
}

std::vector<float> filled_floats(int64_t count) {
  std::vector<float> values(count);
  for (auto& value : values) value = std::rand() % 201 / 100.0f - 1.0f;
  return values;
}

Frames view(std::vector<uint16_t>& values, const Shape& s, int channels) {
  return {values.data(), int64_t{s.H} * s.W * channels, int64_t{s.W} * channels, channels};
}

void fail_unless(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

template <class T>
void check_finite(const std::vector<uint16_t>& values, const char* name) {
  for (const auto value : values) fail_unless(std::isfinite(cuda::widen(value, T{})), name);
}

// Every output of every kernel, as one sequence of bits.
template <class T, int TAPS>
std::vector<uint16_t> run(const Shape& s, bool reversed) {
  std::srand(1);
  const int channels = s.C + s.C2;
  const int64_t pixels = s.M * s.H * s.W;
  auto x = filled<T>(pixels * s.C), x2 = filled<T>(pixels * s.C2), dy = filled<T>(pixels * s.K);
  auto weight = filled<T>(int64_t{s.taps} * channels * s.K), residual = filled<T>(pixels * s.K);
  auto gamma = filled_floats(channels), beta = filled_floats(channels), bias = filled_floats(s.K);
  auto shift = filled_floats(s.M * s.H * s.K);
  auto mean = filled_floats(s.M * s.G), rstd = filled_floats(s.M * s.G);
  std::vector<float> dgamma(channels, NAN), dbeta(channels, NAN);
  std::vector<uint16_t> y(pixels * s.K, 0xffff), dx(pixels * s.C, 0xffff), dx2(pixels * s.C2, 0xffff);
  std::vector<Pair> partial(s.M * s.splits * channels), group_sums(s.M * s.G);
  std::vector<float> dweight(weight.size(), NAN), partial_weights(s.splits * dweight.size(), NAN);

  NormInput in{view(x, s, s.C), view(x2, s, s.C2), s.M,          s.H,        s.W, s.C, s.C2, s.G,
               mean.data(),     rstd.data(),       gamma.data(), beta.data()};
  const Convolution conv{s.K,       s.taps, weight.data(),          bias.data(),    shift.data(),
                         s.H * s.K, s.K,    view(residual, s, s.K), view(y, s, s.K)};
  const WeightGradient gradient{s.K, s.taps, s.splits, view(dy, s, s.K), partial_weights.data()};
  auto da = filled<T>(pixels * channels);
  const NormBackward backward{view(da, s, channels), view(dx, s, s.C), view(dx2, s, s.C2), partial.data(),
                              group_sums.data(),     dgamma.data(),    dbeta.data()};
  const auto launch = [&](int64_t blocks, int threads, int shared_bytes, std::function<void()> kernel) {
    host::launch({static_cast<unsigned>(blocks)}, threads, shared_bytes, reversed, kernel);
  };
  const int64_t slabs = slabs::count(in) * s.splits, count = dweight.size();
  launch(tiling::conv_blocks(in, s.K), tiling::kThreads, tiling::conv_shared_bytes(TAPS),
         [&] { cuda::convolve<T, TAPS>(in, conv); });
  launch(tiling::gradient_blocks(in, gradient), tiling::kThreads, tiling::gradient_shared_bytes(TAPS),
         [&] { cuda::weight_gradient<T, TAPS>(in, gradient); });
  launch((count + 1023) / 1024, tiling::kThreads, 0,
         [&] { cuda::add_splits(partial_weights.data(), dweight.data(), count, s.splits); });
  launch(slabs, slabs::kThreads, slabs::kSharedBytes, [&] { cuda::norm_backward_sums<T>(in, backward, s.splits); });
  launch(s.M * s.G, 32, 0, [&] { cuda::norm_backward_groups(in, backward, s.splits); });
  launch(channels, 32, 0, [&] { cuda::norm_backward_parameters(in, backward, s.splits); });
  launch(slabs, slabs::kThreads, 0, [&] { cuda::norm_backward_inputs<T>(in, backward, s.splits); });

  check_finite<T>(y, "y is not finite"), check_finite<T>(dx, "dx is not finite"), check_finite<T>(dx2, "dx2");
  std::vector<uint16_t> bits;
  for (const auto* values : {&y, &dx, &dx2}) bits.insert(bits.end(), values->begin(), values->end());
  for (const auto* values : {&dweight, &dgamma, &dbeta}) {
    for (const float value : *values) fail_unless(std::isfinite(value), "a float32 output is not finite");
    const auto* halves = reinterpret_cast<const uint16_t*>(values->data());
    bits.insert(bits.end(), halves, halves + 2 * values->size());
  }
  return bits;
}

template <class T, int TAPS>
void compare(const Shape& s) {
  fail_unless(run<T, TAPS>(s, false) == run<T, TAPS>(s, true), "the bits depend on the order of the threads");
}

}  // namespace

int main() {
  // Ragged tiles, steps and output tiles; several tiles of a split; a group across x and x2; one pixel.
  compare<cuda::BFloat16, 9>({1, 17, 3, 24, 16, 4, 8, 9, 1});
  compare<cuda::Float16, 3>({1, 3, 17, 40, 0, 4, 168, 3, 2});
  compare<cuda::Float16, 9>({1, 1, 1, 16, 0, 4, 8, 9, 1});
  std::printf("clean\n");
}
