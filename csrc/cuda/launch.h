// What every CUDA launcher does around its launch.
#pragma once

#include <cuda_runtime.h>

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

// Lets a kernel use more than the 48 KiB of shared memory that every kernel may.
template <class Kernel>
void allow_shared_bytes(Kernel* kernel, int bytes) {
  if (bytes > 48 << 10)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "asking for " + std::to_string(bytes) + " bytes of shared memory");
}

}  // namespace mm::cuda
