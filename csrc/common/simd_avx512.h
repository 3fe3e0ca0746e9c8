// The operations of simd.h in AVX-512 (F, BW, VL, DQ) with FMA.
#pragma once

// GCC 12's own header leaves unused operands uninitialised, and GCC warns of it (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include <cstdint>

#include "numbers.h"

namespace leanops {
namespace LEANOPS_ISA {

constexpr int W = 16;
using F = __m512;
using I = __m512i;
using P = __m512i;

LEANOPS_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
LEANOPS_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
LEANOPS_INLINE I load_i(const void* p) { return _mm512_loadu_si512(p); }
LEANOPS_INLINE void store_i(void* p, I x) { _mm512_storeu_si512(p, x); }
LEANOPS_INLINE F set_f(float x) { return _mm512_set1_ps(x); }
LEANOPS_INLINE I set_i(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }

LEANOPS_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
LEANOPS_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
LEANOPS_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
LEANOPS_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
LEANOPS_INLINE F sqrt(F a) { return _mm512_sqrt_ps(a); }
LEANOPS_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }

LEANOPS_INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
LEANOPS_INLINE I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
LEANOPS_INLINE I and_(I a, I b) { return _mm512_and_si512(a, b); }
LEANOPS_INLINE I or_(I a, I b) { return _mm512_or_si512(a, b); }
LEANOPS_INLINE I and_or(I a, I b, I c) { return _mm512_ternarylogic_epi32(a, b, c, 0xEA); }  // (a & b) | c
template <int N>
LEANOPS_INLINE I sll(I a) {
  return _mm512_slli_epi32(a, N);
}
template <int N>
LEANOPS_INLINE I srl(I a) {
  return _mm512_srli_epi32(a, N);
}
template <int N>
LEANOPS_INLINE I sra(I a) {
  return _mm512_srai_epi32(a, N);
}
LEANOPS_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
LEANOPS_INLINE I truncate(F a) { return _mm512_cvttps_epi32(a); }
LEANOPS_INLINE I nearest(F a) { return _mm512_cvtps_epi32(a); }  // ties to even
LEANOPS_INLINE I bits(F a) { return _mm512_castps_si512(a); }
LEANOPS_INLINE F from_bits(I a) { return _mm512_castsi512_ps(a); }

// x ^ (s & 0x80000000)
LEANOPS_INLINE F flip_sign(F x, I s) {
  return from_bits(_mm512_ternarylogic_epi32(bits(x), s, set_i(0x80000000u), 0x78));
}
LEANOPS_INLINE I less(I a, I b, I yes, I no) {  // signed a < b ? yes : no
  return _mm512_mask_mov_epi32(no, _mm512_cmplt_epi32_mask(a, b), yes);
}
LEANOPS_INLINE bool any_nan(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) != 0; }
LEANOPS_INLINE F if_nan(F x, F yes, F no) {
  return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), yes);
}
LEANOPS_INLINE F if_zero(F x, F no) {  // x == 0 ? 0 : no
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ), no);
}
// The minimum, or NaN if a or b is NaN.
LEANOPS_INLINE F minimum(F a, F b) { return if_nan(a, a, _mm512_min_ps(a, b)); }
// The maximum as unsigned integers. For the bits of floats >= 0 that is the larger float, or the NaN if there is one.
LEANOPS_INLINE I max_u(I a, I b) { return _mm512_max_epu32(a, b); }
LEANOPS_INLINE uint32_t max_lane(I a) { return _mm512_reduce_max_epu32(a); }

// Philox lanes.
LEANOPS_INLINE P set_p(uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
LEANOPS_INLINE P word_p(uint32_t x) { return set_i(x); }
LEANOPS_INLINE P iota_p(uint64_t first) {
  return _mm512_add_epi64(set_p(first), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
}
LEANOPS_INLINE P mul_p(P a, P b) { return _mm512_mul_epu32(a, b); }
LEANOPS_INLINE P high_p(P a) { return _mm512_srli_epi64(a, 32); }
LEANOPS_INLINE P xor_p(P a, P b) { return _mm512_xor_si512(a, b); }
LEANOPS_INLINE P xor_p(P a, P b, P c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
// Lanes lo0, hi0, lo1, hi1, .. from the low halves of two P.
LEANOPS_INLINE I merge_low(P lo, P hi) {
  return _mm512_mask_shuffle_epi32(lo, 0xAAAA, hi, static_cast<_MM_PERM_ENUM>(0xA0));
}
// The same from the high halves.
LEANOPS_INLINE I merge_high(P lo, P hi) {
  return _mm512_mask_shuffle_epi32(hi, 0x5555, lo, static_cast<_MM_PERM_ENUM>(0xF5));
}
LEANOPS_INLINE I alternate(uint32_t even, uint32_t odd) {
  return set_p((static_cast<uint64_t>(odd) << 32) | even);
}
LEANOPS_INLINE I xor_i(I a, I b, I c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }

// pairs order -> natural order
LEANOPS_INLINE void interleave(F even, F odd, F& first, F& second) {
  const I lo = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const I hi = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
  first = _mm512_permutex2var_ps(even, lo, odd);
  second = _mm512_permutex2var_ps(even, hi, odd);
}
LEANOPS_INLINE void deinterleave(F first, F second, F& even, F& odd) {
  const I lo = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const I hi = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  even = _mm512_permutex2var_ps(first, lo, second);
  odd = _mm512_permutex2var_ps(first, hi, second);
}
// a = words 0 and 2 of each block, b = words 1 and 3 -> 2W words in memory order
LEANOPS_INLINE void store_words(uint32_t* p, I a, I b) {
  const I lo = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const I hi = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
  _mm512_storeu_si512(p, _mm512_permutex2var_epi32(a, lo, b));
  _mm512_storeu_si512(p + 16, _mm512_permutex2var_epi32(a, hi, b));
}

// The signs of the 2W elements of group g in a row of bits: bit 2W g + i of the row becomes the sign bit of element i.
LEANOPS_INLINE void signs_pairs(const uint32_t* row, int64_t g, I& even, I& odd) {
  const I word = set_i(row[g]);
  even = _mm512_sllv_epi32(word, _mm512_set_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
  odd = _mm512_sllv_epi32(word, _mm512_set_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
}
LEANOPS_INLINE void signs_natural(const uint32_t* row, int64_t g, I& first, I& second) {
  const I word = set_i(row[g]);
  first = _mm512_sllv_epi32(word,
                            _mm512_set_epi32(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31));
  second = _mm512_sllv_epi32(word, _mm512_set_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}

// 16-bit numbers.
LEANOPS_INLINE I load_u16(const uint16_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LEANOPS_INLINE F load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LEANOPS_INLINE void store_half(uint16_t* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
LEANOPS_INLINE F round_half(F x) {
  return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// The fp16 numbers whose bits are the low 16 bits of each lane.
LEANOPS_INLINE F half_bits(I h) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(h)); }
// Rounds fp32 bits, which are no NaN's, to bf16, ties to even. The result is the upper 16 bits of each lane; the lower
// 16 have no meaning.
LEANOPS_INLINE I round_bf16(I x) {
  const __mmask16 odd = _mm512_test_epi32_mask(x, set_i(0x10000u));
  return _mm512_mask_add_epi32(_mm512_add_epi32(x, set_i(0x7fffu)), odd, x, set_i(0x8000u));
}
// Upper halves of even and odd -> 2W 16-bit numbers in memory order.
LEANOPS_INLINE void store_pairs(uint16_t* p, I even, I odd) {
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(even, 16), odd));
}
// The same for vectors in natural order.
LEANOPS_INLINE void store_halves(uint16_t* p, I first, I second) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(srl<16>(first)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + W), _mm512_cvtepi32_epi16(srl<16>(second)));
}

// load_i8 loads W 8-bit integers. store_i8 stores 2W, from lanes in [-128, 128).
LEANOPS_INLINE I load_i8(const int8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
LEANOPS_INLINE void store_i8(int8_t* p, I first, I second) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(first));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + W), _mm512_cvtepi32_epi8(second));
}

}  // namespace LEANOPS_ISA
}  // namespace leanops
