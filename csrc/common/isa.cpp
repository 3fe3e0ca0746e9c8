#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace leanops {
namespace {

#if defined(__x86_64__)
uint64_t xgetbv0() {
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
}

Isa detect() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::kBaseline;
  const bool osxsave = c & bit_OSXSAVE, fma = c & bit_FMA, f16c = c & bit_F16C;
  if (!osxsave || !fma || !f16c) return Isa::kBaseline;
  const uint64_t xcr0 = xgetbv0();
  if ((xcr0 & 0x6) != 0x6) return Isa::kBaseline;  // the operating system does not save xmm and ymm
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) return Isa::kBaseline;
  const unsigned wide = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
  if ((b & wide) == wide && (xcr0 & 0xe6) == 0xe6) return Isa::kAvx512;  // it saves opmask and zmm, too
  return Isa::kAvx2;
}
#else
Isa detect() { return Isa::kBaseline; }
#endif

IsaChoice choose() {
  const char* requested = std::getenv("LEANOPS_CPU_ISA");
  if (requested == nullptr || *requested == '\0') return {best_isa(), nullptr};
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (std::strcmp(requested, isa_name(isa)) != 0) continue;
    if (isa_supported(isa)) return {isa, nullptr};
    static const std::string unsupported = std::string("LEANOPS_CPU_ISA=") + requested +
                                           ": this processor or operating system supports no more than " +
                                           isa_name(best_isa());
    return {Isa::kBaseline, unsupported.c_str()};
  }
  static const std::string unknown =
      std::string("LEANOPS_CPU_ISA must be baseline, avx2 or avx512, got '") + requested + "'";
  return {Isa::kBaseline, unknown.c_str()};
}

}  // namespace

const char* isa_name(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "baseline";
}

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

bool isa_supported(Isa isa) { return static_cast<int>(isa) <= static_cast<int>(best_isa()); }

const IsaChoice& isa_choice() {
  static const IsaChoice choice = choose();
  return choice;
}

}  // namespace leanops

const char* leanops_cpu_isa() {
  const leanops::IsaChoice& choice = leanops::isa_choice();
  return choice.error ? "" : leanops::isa_name(choice.isa);
}

const char* leanops_cpu_isa_error() {
  const leanops::IsaChoice& choice = leanops::isa_choice();
  return choice.error ? choice.error : "";
}

const char* leanops_cpu_best_isa() { return leanops::isa_name(leanops::best_isa()); }
