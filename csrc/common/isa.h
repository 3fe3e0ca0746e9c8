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

extern "C" {
LEANOPS_EXPORT const char* leanops_cpu_isa();  // "baseline", "avx2", "avx512"; "" where the choice failed
LEANOPS_EXPORT const char* leanops_cpu_isa_error();  // "" or the reason
LEANOPS_EXPORT const char*
leanops_cpu_best_isa();  // what the machine supports, whatever the environment says
}
