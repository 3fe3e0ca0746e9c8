// The element types and the rounding modes of all families.
#pragma once

#include <cstdint>

namespace leanops {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
enum class Rounding : int { kNearest = 0, kStochastic = 1 };

// The Philox stream (a counter's fourth word) of the random bits for stochastic rounding.
constexpr uint32_t kStreamRounding = 2;

static constexpr int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

}  // namespace leanops
