// Vector operations with three implementations; -DLEANOPS_ISA=baseline|avx2|avx512 selects one. Everything is in
// namespace leanops::<isa> with internal linkage, so the linker cannot merge two versions.
//
//   F  W floats        I  W 32-bit integers        P  W/2 64-bit lanes: Philox words, upper halves ignored
//
// A batch is W/2 Philox blocks, held as four P: W Box-Muller pairs, or 2W Gaussian numbers.
// "pairs" order keeps elements 0, 2, 4, .. in one vector and 1, 3, 5, .. in a second; "natural" order keeps
// the first W elements in one vector and the next W in the second.
#pragma once

#define LEANOPS_CAT_(a, b) a##b
#define LEANOPS_CAT(a, b) LEANOPS_CAT_(a, b)
#define LEANOPS_LEVEL_baseline 0
#define LEANOPS_LEVEL_avx2 1
#define LEANOPS_LEVEL_avx512 2
#define LEANOPS_LEVEL LEANOPS_CAT(LEANOPS_LEVEL_, LEANOPS_ISA)

#ifndef LEANOPS_ISA
#error "compile with -DLEANOPS_ISA=baseline, avx2 or avx512"
#endif

// Empty for the sanitizers and for the emulation of AVX-512, which then compile minutes faster.
#ifndef LEANOPS_ALWAYS_INLINE
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define LEANOPS_ALWAYS_INLINE
#else
#define LEANOPS_ALWAYS_INLINE __attribute__((always_inline))
#endif
#endif
#define LEANOPS_INLINE LEANOPS_ALWAYS_INLINE static inline

#if LEANOPS_LEVEL == 2
#include "simd_avx512.h"
#elif LEANOPS_LEVEL == 1
#include "simd_avx2.h"
#else
#include "simd_baseline.h"
#endif
