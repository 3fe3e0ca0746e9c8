// The operations of simd.h for every processor: arrays and loops, which the compiler may vectorise. simd_avx512.h
// describes them. fma is the C library's, which is correct, but slow on a processor without the instruction.
#pragma once

#include <math.h>

#include <cstdint>

#include "numbers.h"

namespace leanops {
namespace LEANOPS_ISA {

constexpr int W = 8;
struct F {
  float v[W];
};
struct I {
  uint32_t v[W];
};
struct P {
  uint64_t v[W / 2];
};

#define LEANOPS_EACH for (int j = 0; j < W; ++j)
#define LEANOPS_EACH_P for (int j = 0; j < W / 2; ++j)

LEANOPS_INLINE F load(const float* p) {
  F r;
  LEANOPS_EACH r.v[j] = p[j];
  return r;
}
LEANOPS_INLINE void store(float* p, F x) { LEANOPS_EACH p[j] = x.v[j]; }
LEANOPS_INLINE I load_i(const void* p) {
  I r;
  __builtin_memcpy(r.v, p, sizeof r.v);
  return r;
}
LEANOPS_INLINE void store_i(void* p, I x) { __builtin_memcpy(p, x.v, sizeof x.v); }
LEANOPS_INLINE F set_f(float x) {
  F r;
  LEANOPS_EACH r.v[j] = x;
  return r;
}
LEANOPS_INLINE I set_i(uint32_t x) {
  I r;
  LEANOPS_EACH r.v[j] = x;
  return r;
}

LEANOPS_INLINE F fma(F a, F b, F c) {
  LEANOPS_EACH c.v[j] = ::fmaf(a.v[j], b.v[j], c.v[j]);
  return c;
}
LEANOPS_INLINE F mul(F a, F b) {
  LEANOPS_EACH a.v[j] *= b.v[j];
  return a;
}
LEANOPS_INLINE F add(F a, F b) {
  LEANOPS_EACH a.v[j] += b.v[j];
  return a;
}
LEANOPS_INLINE F sub(F a, F b) {
  LEANOPS_EACH a.v[j] -= b.v[j];
  return a;
}
LEANOPS_INLINE F sqrt(F a) {
  LEANOPS_EACH a.v[j] = ::sqrtf(a.v[j]);
  return a;
}
LEANOPS_INLINE F div(F a, F b) {
  LEANOPS_EACH a.v[j] /= b.v[j];
  return a;
}

LEANOPS_INLINE I add(I a, I b) {
  LEANOPS_EACH a.v[j] += b.v[j];
  return a;
}
LEANOPS_INLINE I sub(I a, I b) {
  LEANOPS_EACH a.v[j] -= b.v[j];
  return a;
}
LEANOPS_INLINE I and_(I a, I b) {
  LEANOPS_EACH a.v[j] &= b.v[j];
  return a;
}
LEANOPS_INLINE I or_(I a, I b) {
  LEANOPS_EACH a.v[j] |= b.v[j];
  return a;
}
LEANOPS_INLINE I and_or(I a, I b, I c) { return or_(and_(a, b), c); }
template <int N>
LEANOPS_INLINE I sll(I a) {
  LEANOPS_EACH a.v[j] <<= N;
  return a;
}
template <int N>
LEANOPS_INLINE I srl(I a) {
  LEANOPS_EACH a.v[j] >>= N;
  return a;
}
template <int N>
LEANOPS_INLINE I sra(I a) {
  LEANOPS_EACH a.v[j] = static_cast<uint32_t>(static_cast<int32_t>(a.v[j]) >> N);
  return a;
}
LEANOPS_INLINE F to_float(I a) {
  F r;
  LEANOPS_EACH r.v[j] = static_cast<float>(static_cast<int32_t>(a.v[j]));
  return r;
}
// A value outside int32, or a NaN, gives 0x80000000, as the x86 instruction does.
LEANOPS_INLINE I truncate(F a) {
  I r;
  LEANOPS_EACH {
    const bool fits = a.v[j] >= -0x1p31f && a.v[j] < 0x1p31f;
    r.v[j] = fits ? static_cast<uint32_t>(static_cast<int32_t>(a.v[j])) : 0x80000000u;
  }
  return r;
}
// To the nearest integer, ties to even, for magnitudes up to 2^22.
LEANOPS_INLINE I nearest(F a) {
  I r;
  LEANOPS_EACH r.v[j] = float_bits(a.v[j] + 0x1.8p23f) - 0x4b400000u;
  return r;
}
LEANOPS_INLINE I bits(F a) {
  I r;
  LEANOPS_EACH r.v[j] = float_bits(a.v[j]);
  return r;
}
LEANOPS_INLINE F from_bits(I a) {
  F r;
  LEANOPS_EACH r.v[j] = bits_float(a.v[j]);
  return r;
}

LEANOPS_INLINE F flip_sign(F x, I s) {
  LEANOPS_EACH x.v[j] = bits_float(float_bits(x.v[j]) ^ (s.v[j] & 0x80000000u));
  return x;
}
LEANOPS_INLINE I less(I a, I b, I yes, I no) {
  LEANOPS_EACH no.v[j] = static_cast<int32_t>(a.v[j]) < static_cast<int32_t>(b.v[j]) ? yes.v[j] : no.v[j];
  return no;
}
LEANOPS_INLINE bool any_nan(F a, F b) {
  bool any = false;
  LEANOPS_EACH any |= !(a.v[j] == a.v[j]) | !(b.v[j] == b.v[j]);
  return any;
}
LEANOPS_INLINE F if_nan(F x, F yes, F no) {
  LEANOPS_EACH no.v[j] = x.v[j] == x.v[j] ? no.v[j] : yes.v[j];
  return no;
}
LEANOPS_INLINE F if_zero(F x, F no) {  // x == 0 ? 0 : no
  LEANOPS_EACH no.v[j] = x.v[j] == 0.0f ? 0.0f : no.v[j];
  return no;
}
// The minimum, or NaN if a or b is NaN.
LEANOPS_INLINE F minimum(F a, F b) {
  LEANOPS_EACH b.v[j] = a.v[j] < b.v[j] || a.v[j] != a.v[j] ? a.v[j] : b.v[j];
  return b;
}
// The maximum as unsigned integers. For the bits of floats >= 0 that is the larger float, or the NaN if there is one.
LEANOPS_INLINE I max_u(I a, I b) {
  LEANOPS_EACH a.v[j] = a.v[j] < b.v[j] ? b.v[j] : a.v[j];
  return a;
}
LEANOPS_INLINE uint32_t max_lane(I a) {
  uint32_t top = a.v[0];
  LEANOPS_EACH top = top < a.v[j] ? a.v[j] : top;
  return top;
}

LEANOPS_INLINE P set_p(uint64_t x) {
  P r;
  LEANOPS_EACH_P r.v[j] = x;
  return r;
}
LEANOPS_INLINE P word_p(uint32_t x) { return set_p(x); }
LEANOPS_INLINE P iota_p(uint64_t first) {
  P r;
  LEANOPS_EACH_P r.v[j] = first + static_cast<uint64_t>(j);
  return r;
}
LEANOPS_INLINE P mul_p(P a, P b) {
  LEANOPS_EACH_P a.v[j] = (a.v[j] & 0xffffffffu) * (b.v[j] & 0xffffffffu);
  return a;
}
LEANOPS_INLINE P high_p(P a) {
  LEANOPS_EACH_P a.v[j] >>= 32;
  return a;
}
LEANOPS_INLINE P xor_p(P a, P b) {
  LEANOPS_EACH_P a.v[j] ^= b.v[j];
  return a;
}
LEANOPS_INLINE P xor_p(P a, P b, P c) { return xor_p(xor_p(a, c), b); }
LEANOPS_INLINE I merge_low(P lo, P hi) {
  I r;
  LEANOPS_EACH r.v[j] = static_cast<uint32_t>(j & 1 ? hi.v[j / 2] : lo.v[j / 2]);
  return r;
}
LEANOPS_INLINE I merge_high(P lo, P hi) { return merge_low(high_p(lo), high_p(hi)); }
LEANOPS_INLINE I alternate(uint32_t even, uint32_t odd) {
  I r;
  LEANOPS_EACH r.v[j] = j & 1 ? odd : even;
  return r;
}
LEANOPS_INLINE I xor_i(I a, I b, I c) {
  LEANOPS_EACH a.v[j] ^= b.v[j] ^ c.v[j];
  return a;
}

LEANOPS_INLINE void interleave(F even, F odd, F& first, F& second) {
  F r[2];
  for (int j = 0; j < 2 * W; ++j) r[j / W].v[j % W] = j & 1 ? odd.v[j / 2] : even.v[j / 2];
  first = r[0];
  second = r[1];
}
LEANOPS_INLINE void deinterleave(F first, F second, F& even, F& odd) {
  F r[2];
  for (int j = 0; j < 2 * W; ++j) r[j & 1].v[j / 2] = j < W ? first.v[j] : second.v[j - W];
  even = r[0];
  odd = r[1];
}
LEANOPS_INLINE void store_words(uint32_t* p, I a, I b) {
  for (int j = 0; j < 2 * W; ++j) p[j] = j & 1 ? b.v[j / 2] : a.v[j / 2];
}

LEANOPS_INLINE uint32_t sign_word(const uint32_t* row, int64_t g) {
  return row[g >> 1] >> ((static_cast<uint32_t>(g) & 1u) * 16u);
}
LEANOPS_INLINE void signs_pairs(const uint32_t* row, int64_t g, I& even, I& odd) {
  const uint32_t word = sign_word(row, g);
  LEANOPS_EACH {
    even.v[j] = word << (31 - 2 * j);
    odd.v[j] = word << (30 - 2 * j);
  }
}
LEANOPS_INLINE void signs_natural(const uint32_t* row, int64_t g, I& first, I& second) {
  const uint32_t word = sign_word(row, g);
  LEANOPS_EACH {
    first.v[j] = word << (31 - j);
    second.v[j] = word << (23 - j);
  }
}

LEANOPS_INLINE I load_u16(const uint16_t* p) {
  I r;
  LEANOPS_EACH r.v[j] = p[j];
  return r;
}
LEANOPS_INLINE F load_half(const uint16_t* p) {
  F r;
  LEANOPS_EACH r.v[j] = fp16_to_float(p[j]);
  return r;
}
LEANOPS_INLINE void store_half(uint16_t* p, F x) { LEANOPS_EACH p[j] = float_to_fp16(x.v[j]); }
LEANOPS_INLINE F round_half(F x) {
  LEANOPS_EACH x.v[j] = fp16_to_float(float_to_fp16(x.v[j]));
  return x;
}
LEANOPS_INLINE F half_bits(I h) {
  F r;
  LEANOPS_EACH r.v[j] = fp16_to_float(static_cast<uint16_t>(h.v[j]));
  return r;
}
LEANOPS_INLINE I round_bf16(I x) {
  LEANOPS_EACH x.v[j] += 0x7fffu + ((x.v[j] >> 16) & 1u);
  return x;
}
LEANOPS_INLINE void store_pairs(uint16_t* p, I even, I odd) {
  LEANOPS_EACH {
    p[2 * j] = static_cast<uint16_t>(even.v[j] >> 16);
    p[2 * j + 1] = static_cast<uint16_t>(odd.v[j] >> 16);
  }
}
// The same for vectors in natural order.
LEANOPS_INLINE void store_halves(uint16_t* p, I first, I second) {
  LEANOPS_EACH {
    p[j] = static_cast<uint16_t>(first.v[j] >> 16);
    p[j + W] = static_cast<uint16_t>(second.v[j] >> 16);
  }
}

// load_i8 loads W 8-bit integers. store_i8 stores 2W, from lanes in [-128, 128).
LEANOPS_INLINE I load_i8(const int8_t* p) {
  I r;
  LEANOPS_EACH r.v[j] = static_cast<uint32_t>(static_cast<int32_t>(p[j]));
  return r;
}
LEANOPS_INLINE void store_i8(int8_t* p, I first, I second) {
  LEANOPS_EACH {
    p[j] = static_cast<int8_t>(first.v[j]);
    p[j + W] = static_cast<int8_t>(second.v[j]);
  }
}

#undef LEANOPS_EACH
#undef LEANOPS_EACH_P

}  // namespace LEANOPS_ISA
}  // namespace leanops
