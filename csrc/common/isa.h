// The instruction set of the CPU kernels: the best that the processor and the operating system support, or the
// value of the environment variable LEANOPS_CPU_ISA (baseline, avx2 or avx512).
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
Isa best_isa();  // by cpuid and xgetbv
bool isa_supported(Isa isa);

// The choice, made once in a process. `error` is null, or says why LEANOPS_CPU_ISA cannot be used.
struct IsaChoice {
  Isa isa;
  const char* error;
};
const IsaChoice& isa_choice();

}  // namespace leanops

// To be used in a family's namespace, after its struct Kernels. Declares the table of each instruction set, and
// kernels(isa), which returns one of them.
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
// "baseline", "avx2" or "avx512"; "" where LEANOPS_CPU_ISA cannot be used.
LEANOPS_EXPORT const char* leanops_cpu_isa();
// The reason why LEANOPS_CPU_ISA cannot be used, or "".
LEANOPS_EXPORT const char* leanops_cpu_isa_error();
// The best that the machine supports; LEANOPS_CPU_ISA does not matter.
LEANOPS_EXPORT const char* leanops_cpu_best_isa();
}
