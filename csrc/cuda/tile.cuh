// What the CUDA kernels are built of: asynchronous copies, matrix fragments, tensor-core products, a swizzled tile.
//
// The primitives are PTX of sm_80, which everything newer runs. Compiled for the host, the same primitives come from
// tests/native/cuda_host.h, so that sanitizers see the kernels' indices: kernels use nothing else of CUDA than these,
// threadIdx, blockIdx, blockDim and __syncthreads.
//
// Fragments are those of mma.m16n8k16: of lane l, a holds rows l/4 and l/4 + 8, b column l/4, the accumulator c rows
// l/4 (c[0], c[1]) and l/4 + 8 (c[2], c[3]) at columns 2 (l % 4) and the next.
#pragma once

#include <cstdint>

namespace mm::cuda {

// Storage of two bytes; arithmetic is float32.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace mm::cuda

#ifdef __CUDACC__
#define MM_DEVICE __device__ __forceinline__
#define MM_BOTH __host__ __device__

namespace mm::cuda {

MM_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  return shared_bytes;
}

MM_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Copies 16 bytes to shared memory: the first `bytes` are read, the rest is zero.
MM_DEVICE void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

MM_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's committed groups but the newest PENDING; a barrier makes them visible to other threads.
template <int PENDING>
MM_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8x8 matrices of two-byte elements; lane l names row l % 8 of matrix l / 8 and gets of matrix i in r[i] row l
// / 4.
MM_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices.
MM_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Two matrices, named by the lanes below 16.
MM_DEVICE void load_matrices_transposed(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

#define MM_MULTIPLY(TYPE, PTX)                                                                     \
  template <>                                                                                      \
  MM_DEVICE void multiply<TYPE>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." PTX "." PTX                              \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"            \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                  \
  }                                                                                                \
  template <>                                                                                      \
  MM_DEVICE void multiply_8<TYPE>(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {             \
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." PTX "." PTX                               \
                 ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"                        \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(b));                                                  \
  }                                                                                                \
  template <>                                                                                      \
  MM_DEVICE uint32_t pack<TYPE>(float low, float high) {                                           \
    uint32_t pair;                                                                                 \
    asm("cvt.rn." PTX "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));                    \
    return pair;                                                                                   \
  }

// c += a b, a 16x16 and b 16x8.
template <class T>
MM_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
// c += a b, a 16x8 and b 8x8: half a step.
template <class T>
MM_DEVICE void multiply_8(float (&c)[4], const uint32_t (&a)[2], uint32_t b);
// Two values rounded to nearest even.
template <class T>
MM_DEVICE uint32_t pack(float low, float high);
MM_MULTIPLY(BFloat16, "bf16")
MM_MULTIPLY(Float16, "f16")
#undef MM_MULTIPLY

template <class T>
MM_DEVICE void unpack(uint32_t pair, float& low, float& high);
template <>
MM_DEVICE void unpack<BFloat16>(uint32_t pair, float& low, float& high) {
  low = __uint_as_float(pair << 16);
  high = __uint_as_float(pair & 0xffff0000u);
}
template <>
MM_DEVICE void unpack<Float16>(uint32_t pair, float& low, float& high) {
  asm("{.reg .b16 l, h;\n mov.b32 {l, h}, %2;\n cvt.f32.f16 %0, l;\n cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high)
      : "r"(pair));
}

// Of global memory. Plain vector types would be taken apart by the compiler here and there.
MM_DEVICE void load_16_bytes(uint32_t (&words)[4], const void* from) {
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "l"(from)
               : "memory");
}

MM_DEVICE void store_16_bytes(void* to, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
}

// The same of shared memory.
MM_DEVICE void load_16_bytes_shared(uint32_t (&words)[4], const void* from) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(from))
               : "memory");
}

MM_DEVICE void store_16_bytes_shared(void* to, const uint32_t (&words)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(to)), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}

// The value of the lane whose number differs by the bits of MASK; every lane of the warp must call it.
template <int MASK, class Value>
MM_DEVICE Value exchange(Value value) {
  return __shfl_xor_sync(0xffffffffu, value, MASK);
}

MM_DEVICE float exponential_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

MM_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace mm::cuda
#else
#include "cuda_host.h"
#endif

namespace mm::cuda {

MM_DEVICE int lane() { return static_cast<int>(threadIdx.x % 32); }
MM_DEVICE int warp() { return static_cast<int>(threadIdx.x / 32); }

// A tile of rows of COLUMNS two-byte elements, a multiple of 64. Of each row the 16-byte chunks are exchanged by the
// row's number, so that eight rows of one chunk lie in different banks.
template <int COLUMNS>
MM_DEVICE int swizzled(int row, int chunk) {
  static_assert(COLUMNS % 64 == 0, "eight chunks are exchanged");
  return row * COLUMNS + 8 * (chunk ^ (row % 8));
}

// Four lanes that hold word l % 4 of four 16-byte chunks each get one whole chunk, lane l chunk l % 4.
MM_DEVICE void transpose_quad(uint32_t (&words)[4]) {
  const bool odd = lane() % 2, upper = lane() / 2 % 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = exchange<1>(odd ? words[i] : words[i + 1]);
    words[i] = odd ? got : words[i];
    words[i + 1] = odd ? words[i + 1] : got;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint32_t got = exchange<2>(upper ? words[i] : words[i + 2]);
    words[i] = upper ? got : words[i];
    words[i + 2] = upper ? words[i + 2] : got;
  }
}

}  // namespace mm::cuda
