// The kernels by a name: an instruction set of this machine, or AVX-512 emulated.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "common/isa.h"

namespace leanops {
namespace testing {

constexpr const char* kEmulated = "avx512_emulated";

// The instruction sets of this machine, the best last.
inline std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (isa_supported(isa)) names.push_back(isa_name(isa));
  }
  return names;
}

// The names with which kernels are tested.
inline std::vector<std::string> kernel_sets() {
  std::vector<std::string> names = isas();
  names.push_back(kEmulated);
  return names;
}

inline Isa isa_of(const std::string& name) {
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (name == isa_name(isa) && isa_supported(isa)) return isa;
  }
  throw std::invalid_argument("this machine has no " + name);
}

}  // namespace testing
}  // namespace leanops

// Defines leanops::FAMILY::kernels_of(name of a set).
#define LEANOPS_KERNELS_OF(family)                                                               \
  namespace leanops {                                                                            \
  namespace family {                                                                             \
  extern const Kernels kKernels_avx512_emulated;                                                 \
  static inline const Kernels& kernels_of(const std::string& set) {                              \
    return set == testing::kEmulated ? kKernels_avx512_emulated : kernels(testing::isa_of(set)); \
  }                                                                                              \
  }                                                                                              \
  }
