// Storage types of tensors; arithmetic is float32 for all of them.
#pragma once

namespace mm {

enum class DataType { kFloat32, kBFloat16, kFloat16 };

}  // namespace mm
