// Runs the CUDA kernels of temporal attention on the host, on buffers of the exact size, for sanitizers.
//
//   program B F P N D dtype reversed in out
// `in` holds q, k, v packed as (B, F, P, 3, N, D), then do (B, F, P, N, D); `out` gets o, dq, dk, dv, contiguous.
#include <fstream>
#include <string>

#include "cuda/temporal_attention.cuh"

namespace {

using namespace mm::cuda;

template <class T>
void run(int64_t B, int64_t F, int64_t P, int64_t N, int64_t D, bool reversed, const char* in, const char* out) {
  const int64_t count = B * F * P * N * D;
  std::vector<T> qkv(3 * count), grad_o(count), outputs[4];
  std::ifstream input(in, std::ios::binary);
  input.read(reinterpret_cast<char*>(qkv.data()), 3 * count * sizeof(T));
  input.read(reinterpret_cast<char*>(grad_o.data()), count * sizeof(T));
  const auto packed = [&](int i) {
    return mm::Strided{qkv.data() + i * N * D, F * P * 3 * N * D, P * 3 * N * D, 3 * N * D, D};
  };
  const auto whole = [&](std::vector<T>& x) {
    x.resize(count);
    return mm::Strided{x.data(), F * P * N * D, P * N * D, N * D, D};
  };
  const AttentionShape shape{uint32_t(P), uint32_t(N), int(F), int(D), 1.0f / std::sqrt(float(D))};
  const auto q = packed(0), k = packed(1), v = packed(2), do_ = whole(grad_o);
  const auto o = whole(outputs[0]), dq = whole(outputs[1]), dk = whole(outputs[2]), dv = whole(outputs[3]);
  with_instantiation(F, D, [&](auto columns, auto most_tiles) {
    constexpr int kColumns = decltype(columns)::value, kTiles = decltype(most_tiles)::value;
    const int tiles = num_tiles<kTiles>(int(F));
    const mm::host::Dim3 grid{unsigned(B * P * N)};
    const unsigned threads = 32 * num_warps(int(F));
    mm::host::launch(grid, threads, forward_shared_bytes(tiles, kColumns), reversed,
                     [=] { temporal_attention_forward_kernel<T, kColumns, kTiles>(q, k, v, o, shape); });
    mm::host::launch(grid, threads, backward_shared_bytes(tiles, kColumns), reversed,
                     [=] { temporal_attention_backward_kernel<T, kColumns, kTiles>(q, k, v, do_, dq, dk, dv, shape); });
  });
  std::ofstream output(out, std::ios::binary);
  for (const auto& x : outputs) output.write(reinterpret_cast<const char*>(x.data()), count * sizeof(T));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 10) return 2;
  const auto size = [&](int i) { return int64_t{std::atoll(argv[i])}; };
  const auto call = argv[6] == std::string("bfloat16") ? run<BFloat16> : run<Float16>;
  call(size(1), size(2), size(3), size(4), size(5), size(7) != 0, argv[8], argv[9]);
}
