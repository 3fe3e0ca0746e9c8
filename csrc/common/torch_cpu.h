// Shared by the files that register CPU kernels.
#ifndef LEANOPS_COMMON_TORCH_CPU_H
#define LEANOPS_COMMON_TORCH_CPU_H

#include "torch_arguments.h"
#include "types.h"

namespace leanops {

// The DType for torch's number of a floating-point dtype.
inline DType dtype_of_code(int32_t code) {
  return code == kCodes.float32    ? DType::kFloat32
         : code == kCodes.bfloat16 ? DType::kBFloat16
         : code == kCodes.float16  ? DType::kFloat16
                                   : DType::kFloat64;
}

}  // namespace leanops

#endif  // LEANOPS_COMMON_TORCH_CPU_H
