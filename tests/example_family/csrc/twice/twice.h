// The C++ core of twice on raw pointers.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace leanops {
namespace twice {

struct Kernels {
  void (*run)(float* y, const float* x, int64_t n);  // y = 2 x
};

extern const Kernels kKernels_baseline;
#if defined(__x86_64__)
extern const Kernels kKernels_avx2;
extern const Kernels kKernels_avx512;
#endif

static inline const Kernels& kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return kKernels_avx512;
  if (isa == Isa::kAvx2) return kKernels_avx2;
#endif
  static_cast<void>(isa);
  return kKernels_baseline;
}

}  // namespace twice
}  // namespace leanops
