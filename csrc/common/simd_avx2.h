// The operations of simd.h in AVX2 with FMA and F16C. simd_avx512.h describes them.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "numbers.h"

namespace leanops {
namespace LEANOPS_ISA {

constexpr int W = 8;
using F = __m256;
using I = __m256i;
using P = __m256i;

LEANOPS_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
LEANOPS_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
LEANOPS_INLINE I load_i(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
LEANOPS_INLINE void store_i(void* p, I x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
LEANOPS_INLINE F set_f(float x) { return _mm256_set1_ps(x); }
LEANOPS_INLINE I set_i(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }

LEANOPS_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
LEANOPS_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
LEANOPS_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
LEANOPS_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
LEANOPS_INLINE F sqrt(F a) { return _mm256_sqrt_ps(a); }
LEANOPS_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }

LEANOPS_INLINE I add(I a, I b) { return _mm256_add_epi32(a, b); }
LEANOPS_INLINE I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
LEANOPS_INLINE I and_(I a, I b) { return _mm256_and_si256(a, b); }
LEANOPS_INLINE I or_(I a, I b) { return _mm256_or_si256(a, b); }
LEANOPS_INLINE I and_or(I a, I b, I c) { return or_(and_(a, b), c); }
template <int N>
LEANOPS_INLINE I sll(I a) {
  return _mm256_slli_epi32(a, N);
}
template <int N>
LEANOPS_INLINE I srl(I a) {
  return _mm256_srli_epi32(a, N);
}
template <int N>
LEANOPS_INLINE I sra(I a) {
  return _mm256_srai_epi32(a, N);
}
LEANOPS_INLINE F to_float(I a) { return _mm256_cvtepi32_ps(a); }
LEANOPS_INLINE I truncate(F a) { return _mm256_cvttps_epi32(a); }
LEANOPS_INLINE I nearest(F a) { return _mm256_cvtps_epi32(a); }  // ties to even
LEANOPS_INLINE I bits(F a) { return _mm256_castps_si256(a); }
LEANOPS_INLINE F from_bits(I a) { return _mm256_castsi256_ps(a); }

LEANOPS_INLINE F flip_sign(F x, I s) { return _mm256_xor_ps(x, from_bits(and_(s, set_i(0x80000000u)))); }
LEANOPS_INLINE I less(I a, I b, I yes, I no) { return _mm256_blendv_epi8(no, yes, _mm256_cmpgt_epi32(b, a)); }
LEANOPS_INLINE bool any_nan(F a, F b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)) != 0; }
LEANOPS_INLINE F if_nan(F x, F yes, F no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
LEANOPS_INLINE F if_zero(F x, F no) {  // x == 0 ? 0 : no
  return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_EQ_OQ), no);
}
// The minimum, or NaN if a or b is NaN.
LEANOPS_INLINE F minimum(F a, F b) {
  return _mm256_or_ps(_mm256_min_ps(a, b), _mm256_cmp_ps(a, a, _CMP_UNORD_Q));  // min_ps gives a NaN in b
}
// The maximum as unsigned integers. For the bits of floats >= 0 that is the larger float, or the NaN if there is one.
LEANOPS_INLINE I max_u(I a, I b) { return _mm256_max_epu32(a, b); }
LEANOPS_INLINE uint32_t max_lane(I a) {
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4E));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}

LEANOPS_INLINE P set_p(uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
LEANOPS_INLINE P word_p(uint32_t x) { return set_i(x); }
LEANOPS_INLINE P iota_p(uint64_t first) {
  return _mm256_add_epi64(set_p(first), _mm256_set_epi64x(3, 2, 1, 0));
}
LEANOPS_INLINE P mul_p(P a, P b) { return _mm256_mul_epu32(a, b); }
LEANOPS_INLINE P high_p(P a) { return _mm256_srli_epi64(a, 32); }
LEANOPS_INLINE P xor_p(P a, P b) { return _mm256_xor_si256(a, b); }
LEANOPS_INLINE P xor_p(P a, P b, P c) { return xor_p(xor_p(a, c), b); }
LEANOPS_INLINE I merge_low(P lo, P hi) { return _mm256_blend_epi32(lo, _mm256_slli_epi64(hi, 32), 0xAA); }
LEANOPS_INLINE I merge_high(P lo, P hi) { return _mm256_blend_epi32(high_p(lo), hi, 0xAA); }
LEANOPS_INLINE I alternate(uint32_t even, uint32_t odd) {
  return set_p((static_cast<uint64_t>(odd) << 32) | even);
}
LEANOPS_INLINE I xor_i(I a, I b, I c) { return xor_p(xor_p(a, c), b); }

LEANOPS_INLINE void interleave(F even, F odd, F& first, F& second) {
  const F lo = _mm256_unpacklo_ps(even, odd);  // elements 0..3 and 8..11
  const F hi = _mm256_unpackhi_ps(even, odd);  // elements 4..7 and 12..15
  first = _mm256_permute2f128_ps(lo, hi, 0x20);
  second = _mm256_permute2f128_ps(lo, hi, 0x31);
}
LEANOPS_INLINE void deinterleave(F first, F second, F& even, F& odd) {
  const F lo = _mm256_permute2f128_ps(first, second, 0x20);  // elements 0..3 and 8..11
  const F hi = _mm256_permute2f128_ps(first, second, 0x31);  // elements 4..7 and 12..15
  even = _mm256_shuffle_ps(lo, hi, 0x88);
  odd = _mm256_shuffle_ps(lo, hi, 0xdd);
}
LEANOPS_INLINE void store_words(uint32_t* p, I a, I b) {
  const I lo = _mm256_unpacklo_epi32(a, b);
  const I hi = _mm256_unpackhi_epi32(a, b);
  _mm256_storeu_si256(reinterpret_cast<I*>(p), _mm256_permute2x128_si256(lo, hi, 0x20));
  _mm256_storeu_si256(reinterpret_cast<I*>(p + 8), _mm256_permute2x128_si256(lo, hi, 0x31));
}

// A group has 16 elements, so half a word of signs: an odd group uses the upper half.
LEANOPS_INLINE I sign_word(const uint32_t* row, int64_t g) {
  return set_i(row[g >> 1] >> ((static_cast<uint32_t>(g) & 1u) * 16u));
}
LEANOPS_INLINE void signs_pairs(const uint32_t* row, int64_t g, I& even, I& odd) {
  const I word = sign_word(row, g);
  even = _mm256_sllv_epi32(word, _mm256_set_epi32(17, 19, 21, 23, 25, 27, 29, 31));
  odd = _mm256_sllv_epi32(word, _mm256_set_epi32(16, 18, 20, 22, 24, 26, 28, 30));
}
LEANOPS_INLINE void signs_natural(const uint32_t* row, int64_t g, I& first, I& second) {
  const I word = sign_word(row, g);
  first = _mm256_sllv_epi32(word, _mm256_set_epi32(24, 25, 26, 27, 28, 29, 30, 31));
  second = _mm256_sllv_epi32(word, _mm256_set_epi32(16, 17, 18, 19, 20, 21, 22, 23));
}

LEANOPS_INLINE I load_u16(const uint16_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
LEANOPS_INLINE F load_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
LEANOPS_INLINE void store_half(uint16_t* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
LEANOPS_INLINE F round_half(F x) {
  return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
LEANOPS_INLINE F half_bits(I h) {
  const I low = and_(h, set_i(0xffffu));
  const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}
LEANOPS_INLINE I round_bf16(I x) { return add(x, add(set_i(0x7fffu), and_(srl<16>(x), set_i(1u)))); }
LEANOPS_INLINE void store_pairs(uint16_t* p, I even, I odd) {
  _mm256_storeu_si256(reinterpret_cast<I*>(p), _mm256_blend_epi16(srl<16>(even), odd, 0xAA));
}
// The same for vectors in natural order.
LEANOPS_INLINE void store_halves(uint16_t* p, I first, I second) {
  const I packed = _mm256_packus_epi32(srl<16>(first), srl<16>(second));
  _mm256_storeu_si256(reinterpret_cast<I*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
}

// load_i8 loads W 8-bit integers. store_i8 stores 2W, from lanes in [-128, 128).
LEANOPS_INLINE I load_i8(const int8_t* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
LEANOPS_INLINE void store_i8(int8_t* p, I first, I second) {
  const I words = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

}  // namespace LEANOPS_ISA
}  // namespace leanops
