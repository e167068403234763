#include <cuda_runtime.h>

#include "device.h"

namespace mm {
namespace {

// A kernel to ask the driver about: the attributes name the architecture whose code it would run.
__global__ void probe() {}

}  // namespace

std::vector<CudaDevice> cuda_devices(std::string* why_not) {
  std::vector<CudaDevice> devices;
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  for (int i = 0; status == cudaSuccess && i < count; i++) {
    cudaDeviceProp properties;
    cudaFuncAttributes attributes;
    if ((status = cudaGetDeviceProperties(&properties, i)) != cudaSuccess) break;
    if ((status = cudaSetDevice(i)) != cudaSuccess) break;
    if ((status = cudaFuncGetAttributes(&attributes, probe)) != cudaSuccess) break;
    devices.push_back({properties.name, 10 * properties.major + properties.minor, attributes.binaryVersion,
                       static_cast<long long>(properties.totalGlobalMem)});
  }
  if (status != cudaSuccess) *why_not = cudaGetErrorString(status);
  return devices;
}

}  // namespace mm
