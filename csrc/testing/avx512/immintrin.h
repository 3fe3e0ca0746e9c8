// The intrinsics of common/simd_avx512.h without AVX-512. With -Icsrc/testing/avx512 this file is found in place
// of the compiler's <immintrin.h>, so the AVX-512 kernels compile unchanged and run on any processor.
// tests/native/test_avx512_emulation.py compares each function with the real instruction.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../common/numbers.h"

// Never inlined: thousands of inlined loops take minutes to compile.
#define EMULATED __attribute__((noinline, unused)) static
#define EACH_LANE for (int j = 0; j < 16; ++j)

typedef float __m512 __attribute__((vector_size(64)));
typedef uint32_t __m512i __attribute__((vector_size(64)));
typedef uint64_t emulated_u64 __attribute__((vector_size(64)));  // a __m512i as eight lanes of 64 bits
typedef uint16_t emulated_u16 __attribute__((vector_size(64)));
typedef int32_t emulated_i32 __attribute__((vector_size(64)));
struct __m256i {
  uint16_t lane[16];
};
struct __m128i {
  uint8_t lane[16];
};
typedef uint16_t __mmask16;
typedef uint32_t __mmask32;

enum _MM_PERM_ENUM : int {};
constexpr int _CMP_UNORD_Q = 3, _CMP_NEQ_UQ = 4;
constexpr int _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_NO_EXC = 8;

// Loads and stores.

template <class Vector>
EMULATED Vector emulated_load(const void* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
EMULATED __m512 _mm512_loadu_ps(const void* from) { return emulated_load<__m512>(from); }
EMULATED __m512i _mm512_loadu_si512(const void* from) { return emulated_load<__m512i>(from); }
EMULATED __m256i _mm256_loadu_si256(const __m256i* from) { return emulated_load<__m256i>(from); }
EMULATED __m128i _mm_loadu_si128(const __m128i* from) { return emulated_load<__m128i>(from); }
EMULATED void _mm512_storeu_ps(void* to, __m512 x) { std::memcpy(to, &x, sizeof x); }
EMULATED void _mm512_storeu_si512(void* to, __m512i x) { std::memcpy(to, &x, sizeof x); }
EMULATED void _mm256_storeu_si256(__m256i* to, __m256i x) { std::memcpy(to, &x, sizeof x); }
EMULATED void _mm_storeu_si128(__m128i* to, __m128i x) { std::memcpy(to, &x, sizeof x); }

// Constants. The arguments are the lanes from the last to the first.

EMULATED __m512 _mm512_setzero_ps() { return __m512{}; }
EMULATED __m512 _mm512_set1_ps(float x) {
  __m512 r;
  EACH_LANE r[j] = x;
  return r;
}
EMULATED __m512i _mm512_set1_epi32(int x) {
  __m512i r;
  EACH_LANE r[j] = static_cast<uint32_t>(x);
  return r;
}
EMULATED __m512i _mm512_set1_epi64(long long x) {
  emulated_u64 r;
  for (int j = 0; j < 8; ++j) r[j] = static_cast<uint64_t>(x);
  return reinterpret_cast<__m512i>(r);
}
template <class... Int>
EMULATED __m512i _mm512_set_epi32(Int... lanes) {
  static_assert(sizeof...(lanes) == 16);
  const uint32_t backwards[] = {static_cast<uint32_t>(lanes)...};
  __m512i r;
  EACH_LANE r[j] = backwards[15 - j];
  return r;
}
template <class... Int>
EMULATED __m512i _mm512_set_epi64(Int... lanes) {
  static_assert(sizeof...(lanes) == 8);
  const uint64_t backwards[] = {static_cast<uint64_t>(lanes)...};
  emulated_u64 r;
  for (int j = 0; j < 8; ++j) r[j] = backwards[7 - j];
  return reinterpret_cast<__m512i>(r);
}

// Floats.

EMULATED __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
EMULATED __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
EMULATED __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
EMULATED __m512 _mm512_div_ps(__m512 a, __m512 b) { return a / b; }
EMULATED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  EACH_LANE c[j] = __builtin_fmaf(a[j], b[j], c[j]);
  return c;
}
EMULATED __m512 _mm512_sqrt_ps(__m512 a) {
  EACH_LANE a[j] = __builtin_sqrtf(a[j]);
  return a;
}
EMULATED __m512 _mm512_min_ps(__m512 a, __m512 b) {  // b if a or b is a NaN, or if both are zero
  EACH_LANE b[j] = a[j] < b[j] ? a[j] : b[j];
  return b;
}

// Integers.

EMULATED __m512i _mm512_add_epi32(__m512i a, __m512i b) { return a + b; }
EMULATED __m512i _mm512_sub_epi32(__m512i a, __m512i b) { return a - b; }
EMULATED __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
EMULATED __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
EMULATED __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
EMULATED __m512i _mm512_max_epu32(__m512i a, __m512i b) {
  EACH_LANE a[j] = a[j] < b[j] ? b[j] : a[j];
  return a;
}
EMULATED uint32_t _mm512_reduce_max_epu32(__m512i a) {
  uint32_t most = 0;
  EACH_LANE most = most < a[j] ? a[j] : most;
  return most;
}
EMULATED __m512i _mm512_add_epi64(__m512i a, __m512i b) {
  return reinterpret_cast<__m512i>(reinterpret_cast<emulated_u64>(a) + reinterpret_cast<emulated_u64>(b));
}
// The product of the low halves of the 64-bit lanes.
EMULATED __m512i _mm512_mul_epu32(__m512i a, __m512i b) {
  const emulated_u64 x = reinterpret_cast<emulated_u64>(a), y = reinterpret_cast<emulated_u64>(b);
  return reinterpret_cast<__m512i>((x & 0xffffffffu) * (y & 0xffffffffu));
}
// Bit 4 a + 2 b + c of `table` is the result of the bits a, b and c.
EMULATED __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  __m512i r = {};
  for (int k = 0; k < 8; ++k) {
    if (table >> k & 1) r |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  }
  return r;
}
EMULATED __m512i _mm512_ternarylogic_epi64(__m512i a, __m512i b, __m512i c, int table) {
  return _mm512_ternarylogic_epi32(a, b, c, table);  // bitwise: the width of a lane does not matter
}

// Shifts. A shift by a constant that is not less than the lane's width gives zeros, or copies of the sign.

EMULATED __m512i _mm512_slli_epi32(__m512i a, unsigned count) { return count < 32 ? a << count : __m512i{}; }
EMULATED __m512i _mm512_srli_epi32(__m512i a, unsigned count) { return count < 32 ? a >> count : __m512i{}; }
EMULATED __m512i _mm512_srai_epi32(__m512i a, unsigned count) {
  return reinterpret_cast<__m512i>(reinterpret_cast<emulated_i32>(a) >> (count < 32 ? count : 31));
}
EMULATED __m512i _mm512_srli_epi64(__m512i a, unsigned count) {
  return count < 64 ? reinterpret_cast<__m512i>(reinterpret_cast<emulated_u64>(a) >> count) : __m512i{};
}
EMULATED __m512i _mm512_sllv_epi32(__m512i a, __m512i counts) {
  EACH_LANE a[j] = counts[j] < 32 ? a[j] << (counts[j] & 31) : 0;
  return a;
}

// Masks: bit j belongs to lane j.

EMULATED __mmask16 _mm512_cmplt_epi32_mask(__m512i a, __m512i b) {
  unsigned mask = 0;
  EACH_LANE mask |= unsigned{static_cast<int32_t>(a[j]) < static_cast<int32_t>(b[j])} << j;
  return static_cast<__mmask16>(mask);
}
EMULATED __mmask16 _mm512_test_epi32_mask(__m512i a, __m512i b) {
  unsigned mask = 0;
  EACH_LANE mask |= unsigned{(a[j] & b[j]) != 0} << j;
  return static_cast<__mmask16>(mask);
}
EMULATED __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  unsigned mask = 0;
  EACH_LANE {
    const bool unordered = a[j] != a[j] || b[j] != b[j];
    mask |= unsigned{predicate == _CMP_UNORD_Q ? unordered : a[j] != b[j]} << j;
  }
  return static_cast<__mmask16>(mask);
}
EMULATED __m512i _mm512_mask_mov_epi32(__m512i other, __mmask16 mask, __m512i a) {
  EACH_LANE other[j] = mask >> j & 1 ? a[j] : other[j];
  return other;
}
EMULATED __m512 _mm512_mask_mov_ps(__m512 other, __mmask16 mask, __m512 a) {
  EACH_LANE other[j] = mask >> j & 1 ? a[j] : other[j];
  return other;
}
EMULATED __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 a) {
  return _mm512_mask_mov_ps(__m512{}, mask, a);
}
EMULATED __m512i _mm512_mask_add_epi32(__m512i other, __mmask16 mask, __m512i a, __m512i b) {
  return _mm512_mask_mov_epi32(other, mask, a + b);
}
EMULATED __m512i _mm512_mask_blend_epi16(__mmask32 mask, __m512i a, __m512i b) {
  emulated_u16 r = reinterpret_cast<emulated_u16>(a);
  const emulated_u16 other = reinterpret_cast<emulated_u16>(b);
  for (int j = 0; j < 32; ++j) r[j] = mask >> j & 1 ? other[j] : r[j];
  return reinterpret_cast<__m512i>(r);
}

// Permutations.

EMULATED __m512i _mm512_permutex2var_epi32(__m512i a, __m512i from, __m512i b) {  // of 32 lanes: a, then b
  __m512i r;
  EACH_LANE r[j] = from[j] & 16 ? b[from[j] & 15] : a[from[j] & 15];
  return r;
}
// In each group of four lanes, lane j of the result is lane (order >> 2 j & 3) of the operand.
EMULATED __m512i _mm512_mask_shuffle_epi32(__m512i other, __mmask16 mask, __m512i a, _MM_PERM_ENUM order) {
  __m512i r;
  EACH_LANE r[j] = a[(j & 12) | (order >> 2 * (j & 3) & 3)];
  return _mm512_mask_mov_epi32(other, mask, r);
}

// Conversions.

EMULATED __m512i _mm512_castps_si512(__m512 a) { return reinterpret_cast<__m512i>(a); }
EMULATED __m512 _mm512_castsi512_ps(__m512i a) { return reinterpret_cast<__m512>(a); }
EMULATED __m512 _mm512_permutex2var_ps(__m512 a, __m512i from, __m512 b) {
  return _mm512_castsi512_ps(_mm512_permutex2var_epi32(_mm512_castps_si512(a), from, _mm512_castps_si512(b)));
}
EMULATED __m512 _mm512_cvtepi32_ps(__m512i a) {
  __m512 r;
  EACH_LANE r[j] = static_cast<float>(static_cast<int32_t>(a[j]));
  return r;
}
// A value outside of int32, or a NaN, gives 0x80000000.
EMULATED __m512i _mm512_cvttps_epi32(__m512 a) {
  __m512i r;
  EACH_LANE {
    const bool fits = a[j] >= -0x1p31f && a[j] < 0x1p31f;
    r[j] = fits ? static_cast<uint32_t>(static_cast<int32_t>(a[j])) : 0x80000000u;
  }
  return r;
}
EMULATED __m512i _mm512_cvtps_epi32(__m512 a) {  // ties to even
  EACH_LANE a[j] = __builtin_nearbyintf(a[j]);
  return _mm512_cvttps_epi32(a);
}
EMULATED __m512i _mm512_cvtepu16_epi32(__m256i a) {
  __m512i r;
  EACH_LANE r[j] = a.lane[j];
  return r;
}
EMULATED __m512i _mm512_cvtepi8_epi32(__m128i a) {
  __m512i r;
  EACH_LANE r[j] = static_cast<uint32_t>(static_cast<int8_t>(a.lane[j]));
  return r;
}
EMULATED __m256i _mm512_cvtepi32_epi16(__m512i a) {
  __m256i r;
  EACH_LANE r.lane[j] = static_cast<uint16_t>(a[j]);
  return r;
}
EMULATED __m128i _mm512_cvtepi32_epi8(__m512i a) {
  __m128i r;
  EACH_LANE r.lane[j] = static_cast<uint8_t>(a[j]);
  return r;
}
EMULATED __m512 _mm512_cvtph_ps(__m256i a) {
  __m512 r;
  EACH_LANE r[j] = leanops::fp16_to_float(a.lane[j]);
  return r;
}
EMULATED __m256i _mm512_cvtps_ph(__m512 a, int) {
  __m256i r;
  EACH_LANE r.lane[j] = leanops::float_to_fp16(a[j]);
  return r;
}

#undef EMULATED
#undef EACH_LANE
