// From the name of a storage type to the type.
#pragma once

#include "../data_type.h"
#include "simd.h"

namespace mm::MM_ISA {

// Calls function(T{}) with the storage type of `dtype`.
template <class Function>
MM_INLINE void with_type(DataType dtype, Function function) {
  switch (dtype) {
    case DataType::kFloat32: return function(float{});
    case DataType::kBFloat16: return function(BFloat16{});
    case DataType::kFloat16: return function(Float16{});
  }
}

}  // namespace mm::MM_ISA
