// Each intrinsic of common/simd_avx512.h on operands in memory, so that the emulation can be compared with the
// processor.
#pragma once

#include <cstdint>

namespace leanops {
namespace testing {

struct Operands {
  unsigned char a[64], b[64], c[64];
  uint32_t mask;
};

struct Intrinsic {
  const char* name;                                              // the call
  void (*run)(const Operands& operands, unsigned char* result);  // result: 64 zeros
};

struct Intrinsics {
  const Intrinsic* first;
  int count;
};

#if defined(__x86_64__)
extern const Intrinsics kIntrinsics_avx512;
#endif
extern const Intrinsics kIntrinsics_avx512_emulated;

}  // namespace testing
}  // namespace leanops
