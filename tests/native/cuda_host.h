// CUDA kernels on the host, for sanitizers: a thread is a fiber, a warp meets at each collective, a block at barriers.
//
// Gives the primitives of csrc/cuda/tile.cuh, which includes this when nvcc does not compile it, and launch() of
// csrc/cuda/launch.h. Shared
// memory has the exact size asked for and starts as NaN; what copy_async brings is NaN until it is waited for.
// A barrier or collective that a part of the threads never reaches ends the program with a message.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __launch_bounds__(...)
#define MM_DEVICE inline
#define MM_BOTH

namespace mm::host {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};
struct Fiber {
  Dim3 thread;
  ucontext_t context;  // of its beginning
  jmp_buf place;       // where it has stopped
  bool has_begun = false;
  std::unique_ptr<char[]> stack;
  std::vector<Copy> copies;
  int group = 0;
  bool done = false;
  const void* in;
  void* out;
};
// Where fibers wait for each other: the last to arrive does the work and opens it.
struct Meeting {
  unsigned size = 0, arrived = 0, opened = 0;
};

inline Dim3 block_index, block_size, grid_size;
inline std::vector<Fiber> fibers;
inline std::vector<Meeting> warps;
inline Meeting block;
inline Fiber* running;
inline unsigned char* shared;
inline jmp_buf scheduler;
inline long events;  // arrivals and ends: a round without any is a deadlock
inline std::function<void()> body;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "CUDA on the host: %s (block %u, thread %u)\n", message, block_index.x, running->thread.x);
  std::abort();
}

// Lets a fiber run until it stops. Unlike swapcontext, these jumps make no system call.
[[gnu::noinline]] inline void resume(Fiber& fiber) {
  running = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.has_begun) _longjmp(fiber.place, 1);
  fiber.has_begun = true;
  setcontext(&fiber.context);
}

[[gnu::noinline]] inline void stop() {
  if (!_setjmp(running->place)) _longjmp(scheduler, 1);
}

template <class Work>
void meet(Meeting& meeting, Work work) {
  events++;
  if (++meeting.arrived == meeting.size) {
    work();
    meeting.arrived = 0, meeting.opened++;
    return;
  }
  for (unsigned before = meeting.opened; meeting.opened == before;) stop();
}

// work(lanes) once for the 32 fibers of a warp, each with its `in` and `out`.
template <class Work>
void collective(const void* in, void* out, Work work) {
  running->in = in, running->out = out;
  const unsigned first = running->thread.x / 32 * 32;
  meet(warps[first / 32], [&] { work(&fibers[first]); });
}

inline void enter() {
  body();
  running->done = true;
  events++;
  stop();
}

// Makes fiber i of the block ready to run the kernel.
inline void prepare(unsigned i) {
  constexpr size_t kStackBytes = 256 << 10;
  Fiber& fiber = fibers[i];
  fiber.thread = {i, 0, 0};
  fiber.stack.reset(new char[kStackBytes]);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.context, enter, 0);
}

// Lets one warp run as far as it can without the others: a missing barrier shows. False once its threads have ended.
inline bool advance(unsigned first) {
  bool is_live = true;
  for (long before = events - 1; is_live && events != before;) {
    before = events;
    is_live = false;
    for (unsigned i = first; i < first + 32; i++) {
      if (fibers[i].done) continue;
      is_live = true;
      resume(fibers[i]);
    }
  }
  return is_live;
}

// Runs every block of a grid, one after another; `is_reversed` runs the warps of each from the last to the first.
inline void launch(Dim3 grid, unsigned threads, size_t shared_bytes, bool is_reversed, std::function<void()> kernel) {
  grid_size = grid, block_size = {threads, 1, 1}, body = std::move(kernel);
  for (unsigned b = 0; b < grid.x * grid.y * grid.z; b++) {
    block_index = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    const std::unique_ptr<unsigned char[]> bytes(new unsigned char[shared_bytes]);
    std::memset(shared = bytes.get(), 0xff, shared_bytes);
    fibers = std::vector<Fiber>(threads);
    warps.assign(threads / 32, Meeting{32});
    block = {threads};
    for (unsigned i = 0; i < threads; i++) prepare(i);
    for (bool is_live = true; is_live;) {
      is_live = false;
      const long before = events;
      for (unsigned w = 0; w < warps.size(); w++)
        is_live |= advance(32 * (is_reversed ? static_cast<unsigned>(warps.size()) - 1 - w : w));
      if (is_live && events == before) fail("threads wait where the others never come");
    }
  }
}

inline void require_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16) fail("an address is not aligned to 16 bytes");
}

}  // namespace mm::host

#define threadIdx (mm::host::running->thread)
#define blockIdx (mm::host::block_index)
#define blockDim (mm::host::block_size)
#define gridDim (mm::host::grid_size)

inline void __syncthreads() {
  mm::host::meet(mm::host::block, [] {});
}

namespace mm::cuda {

using std::min;

inline unsigned char* dynamic_shared() { return host::shared; }

inline void copy_async(void* to, const void* from, int bytes) {
  host::require_aligned(to);
  if (bytes) host::require_aligned(from);
  std::memset(to, 0xff, 16);
  host::running->copies.push_back({to, from, bytes, host::running->group});
}

inline void copy_async_commit() { host::running->group++; }

template <int PENDING>
void copy_async_wait() {
  std::vector<host::Copy> left;
  for (const auto& copy : host::running->copies) {
    if (copy.group >= host::running->group - PENDING) {
      left.push_back(copy);
      continue;
    }
    std::memset(copy.to, 0, 16);
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
  host::running->copies = left;
}

inline void load_matrices(uint32_t* r, const void* row, int count, bool is_transposed) {
  host::collective(row, r, [=](host::Fiber* lanes) {
    for (int m = 0; m < count; m++) {
      uint16_t matrix[8][8];
      for (int i = 0; i < 8; i++) {
        host::require_aligned(lanes[8 * m + i].in);
        std::memcpy(matrix[i], lanes[8 * m + i].in, 16);
      }
      for (int l = 0; l < 32; l++) {
        const int i = l / 4, j = l % 4 * 2;
        const uint32_t low = is_transposed ? matrix[j][i] : matrix[i][j];
        const uint32_t high = is_transposed ? matrix[j + 1][i] : matrix[i][j + 1];
        static_cast<uint32_t*>(lanes[l].out)[m] = low | high << 16;
      }
    }
  });
}
inline void load_matrices(uint32_t (&r)[4], const void* row) { load_matrices(r, row, 4, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { load_matrices(r, row, 4, true); }
inline void load_matrices_transposed(uint32_t (&r)[2], const void* row) { load_matrices(r, row, 2, true); }

inline float widen(uint16_t bits, BFloat16) {
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}
inline float widen(uint16_t bits, Float16) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return x;
}
inline uint16_t narrow(float x, BFloat16) {
  uint32_t wide;
  std::memcpy(&wide, &x, 4);
  return x != x ? 0x7fff : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
}
inline uint16_t narrow(float x, Float16) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

template <class T>
uint32_t pack(float low, float high) {
  return narrow(low, T{}) | uint32_t{narrow(high, T{})} << 16;
}
template <class T>
void unpack(uint32_t pair, float& low, float& high) {
  low = widen(pair & 0xffff, T{}), high = widen(pair >> 16, T{});
}

// c (16x8) += a (16xK) b (Kx8), fragments of K / 4 and K / 8 words.
template <class T, int K>
void multiply(float* c, const uint32_t* a, const uint32_t* b) {
  struct Operands {
    const uint32_t *a, *b;
  } operands{a, b};
  host::collective(&operands, c, [](host::Fiber* lanes) {
    float A[16][K], B[K][8];
    for (int l = 0; l < 32; l++) {
      const auto* in = static_cast<const Operands*>(lanes[l].in);
      const int i = l / 4, j = l % 4 * 2;
      for (int w = 0; w < K / 4; w++)
        unpack<T>(in->a[w], A[i + w % 2 * 8][j + w / 2 * 8], A[i + w % 2 * 8][j + w / 2 * 8 + 1]);
      for (int w = 0; w < K / 8; w++) unpack<T>(in->b[w], B[j + 8 * w][i], B[j + 8 * w + 1][i]);
    }
    for (int l = 0; l < 32; l++)
      for (int e = 0; e < 4; e++) {
        float sum = 0;
        for (int k = 0; k < K; k++) sum += A[l / 4 + e / 2 * 8][k] * B[k][l % 4 * 2 + e % 2];
        static_cast<float*>(lanes[l].out)[e] += sum;
      }
  });
}
template <class T>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  multiply<T, 16>(c, a, b);
}
template <class T>
void multiply_8(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  multiply<T, 8>(c, a, &b);
}

inline void load_16_bytes(uint32_t (&words)[4], const void* from) {
  host::require_aligned(from);
  std::memcpy(words, from, 16);
}
inline void store_16_bytes(void* to, const uint32_t (&words)[4]) {
  host::require_aligned(to);
  std::memcpy(to, words, 16);
}

inline void load_16_bytes_shared(uint32_t (&words)[4], const void* from) { load_16_bytes(words, from); }
inline void store_16_bytes_shared(void* to, const uint32_t (&words)[4]) { store_16_bytes(to, words); }

template <int MASK, class Value>
Value exchange(Value value) {
  Value got;
  host::collective(&value, &got, [](host::Fiber* lanes) {
    for (int l = 0; l < 32; l++) *static_cast<Value*>(lanes[l].out) = *static_cast<const Value*>(lanes[l ^ MASK].in);
  });
  return got;
}

inline float exponential_2(float x) { return __builtin_exp2f(x); }
inline float reciprocal(float x) { return 1 / x; }

template <class Kernel, class... Arguments>
void launch(const char*, Kernel* kernel, int64_t blocks, int threads, int shared_bytes, int, void*,
            Arguments... arguments) {
  host::launch({static_cast<unsigned>(blocks)}, threads, shared_bytes, false, [=] { kernel(arguments...); });
}

}  // namespace mm::cuda
