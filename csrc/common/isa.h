// Which instruction set the CPU kernels run with: the best that the processor and the operating system
// support, or the one that the environment variable LEANOPS_CPU_ISA (baseline, avx2 or avx512) names.
#pragma once

#include <cstdint>

#if defined(__GNUC__)
#define LEANOPS_EXPORT __attribute__((visibility("default")))
#else
#define LEANOPS_EXPORT
#endif

namespace leanops {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

const char* isa_name(Isa isa);
Isa best_isa();  // what cpuid and xgetbv allow
bool isa_supported(Isa isa);

// The choice, made once per process. error is null, or says why LEANOPS_CPU_ISA cannot be followed.
struct IsaChoice {
  Isa isa;
  const char* error;
};
const IsaChoice& isa_choice();

}  // namespace leanops

// In a family's namespace, after its struct Kernels: declares the table of each instruction set, and
// kernels(isa), which gives one.
#if defined(__x86_64__)
#define LEANOPS_KERNEL_TABLES()                                                                           \
  extern const Kernels kKernels_baseline, kKernels_avx2, kKernels_avx512;                                 \
  static inline const Kernels& kernels(Isa isa) {                                                         \
    return isa == Isa::kAvx512 ? kKernels_avx512 : isa == Isa::kAvx2 ? kKernels_avx2 : kKernels_baseline; \
  }
#else
#define LEANOPS_KERNEL_TABLES()           \
  extern const Kernels kKernels_baseline; \
  static inline const Kernels& kernels(Isa) { return kKernels_baseline; }
#endif

extern "C" {
LEANOPS_EXPORT const char* leanops_cpu_isa();  // "baseline", "avx2", "avx512"; "" where the choice failed
LEANOPS_EXPORT const char* leanops_cpu_isa_error();  // "" or the reason
LEANOPS_EXPORT const char*
leanops_cpu_best_isa();  // what the machine supports, whatever the environment says
}
