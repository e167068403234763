// What CUDA sees on this machine: works in a build with nvcc, with or without a driver.
#pragma once

#include <string>
#include <vector>

namespace mm {

struct CudaDevice {
  std::string name;
  int compute_capability;   // 10 * major + minor
  int compiled_capability;  // of the code that runs on it: lower than the above where only older code was built
  long long memory_bytes;
};

// Empty with `why_not` set where there is no usable GPU.
std::vector<CudaDevice> cuda_devices(std::string* why_not);

}  // namespace mm
