// The CPU kernels of twice, compiled once for each instruction set.
#include "twice.h"

#include "common/simd.h"

namespace leanops {
namespace LEANOPS_ISA {
namespace {

void run(float* y, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = 2 * x[i];
}

}  // namespace
}  // namespace LEANOPS_ISA

namespace twice {
extern const Kernels LEANOPS_CAT(kKernels_, LEANOPS_ISA);
const Kernels LEANOPS_CAT(kKernels_, LEANOPS_ISA) = {LEANOPS_ISA::run};
}  // namespace twice
}  // namespace leanops
