// The launch of a CUDA kernel: on a device and a stream, with what has to be asked for before and checked after.
//
// Compiled for the host, launch() comes from tests/native/cuda_host.h with the primitives of tile.cuh: the launchers
// and the entries above them are the same.
#pragma once

#include "tile.cuh"

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <limits>
#include <stdexcept>
#include <string>

namespace mm::cuda {

// Raises in Python as RuntimeError.
inline void check(cudaError_t status, const std::string& what) {
  if (status != cudaSuccess) throw std::runtime_error(what + ": " + cudaGetErrorString(status));
}

// Makes a device the current one of this thread, and the one before it current again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "asking for the current CUDA device");
    check(cudaSetDevice(device), "making CUDA device " + std::to_string(device) + " current");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

// Runs a kernel in so many blocks (none: not at all); stream is a cudaStream_t of the device, `op` is for messages.
template <class Kernel, class... Arguments>
void launch(const char* op, Kernel* kernel, int64_t blocks, int threads, int shared_bytes, int device, void* stream,
            Arguments... arguments) {
  if (blocks == 0) return;
  const std::string name = op;
  if (blocks > std::numeric_limits<int>::max())
    throw std::runtime_error(name + ": " + std::to_string(blocks) + " blocks do not fit a CUDA grid");
  const DeviceGuard guard(device);
  if (shared_bytes > 48 << 10)  // what every kernel may use
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          name + ": asking for " + std::to_string(shared_bytes) + " bytes of shared memory");
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), name + ": launching a kernel");
}

}  // namespace mm::cuda

#endif
