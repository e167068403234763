// What Python hands over, as the kernels take it.
#pragma once

#include <cstdint>
#include <string>

#include "../check.h"
#include "../data_type.h"

namespace mm {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline DataType parse_dtype(const std::string& name) {
  if (name == "float32") return DataType::kFloat32;
  if (name == "bfloat16") return DataType::kBFloat16;
  MM_CHECK(name == "float16", "got dtype " << name << ", wanted float32, bfloat16 or float16");
  return DataType::kFloat16;
}

}  // namespace mm
