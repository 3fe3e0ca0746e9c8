// The C++ core of twice on raw pointers.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace leanops {
namespace twice {

struct Kernels {
  void (*run)(float* y, const float* x, int64_t n);  // y = 2 x
};

LEANOPS_KERNEL_TABLES()

}  // namespace twice
}  // namespace leanops
