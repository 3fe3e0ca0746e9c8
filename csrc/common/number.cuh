// Element types and their rounding. A chunk is what a thread loads or stores at once, by 16-byte accesses: 8 elements
// of a 16-bit type (one access), 4 of fp32 (one access) or of fp64 (two).
#ifndef LEANOPS_COMMON_NUMBER_CUH
#define LEANOPS_COMMON_NUMBER_CUH

#include "device.cuh"

namespace leanops {

// Work: the type in which a kernel computes. CHUNK: elements of a chunk.
template <class T>
struct Element;
template <>
struct Element<float> {
  typedef float Work;
  static const int CHUNK = 4;
};
template <>
struct Element<double> {
  typedef double Work;
  static const int CHUNK = 4;
};
template <>
struct Element<bf16> {
  typedef float Work;
  static const int CHUNK = 8;
};
template <>
struct Element<fp16> {
  typedef float Work;
  static const int CHUNK = 8;
};

LEANOPS_DEVICE float widen(float x) { return x; }
LEANOPS_DEVICE double widen(double x) { return x; }
LEANOPS_DEVICE float widen(bf16 x) { return as_float((u32)x.bits << 16); }
LEANOPS_DEVICE float widen(fp16 x) { return fp16_to_float(x.bits); }

// x rounded to T, ties to even.
template <class T>
LEANOPS_DEVICE T narrow(typename Element<T>::Work x);
template <>
LEANOPS_DEVICE float narrow<float>(float x) {
  return x;
}
template <>
LEANOPS_DEVICE double narrow<double>(double x) {
  return x;
}
template <>
LEANOPS_DEVICE bf16 narrow<bf16>(float x) {
  return bf16{(u16)pack_bf16(x, 0.0f)};
}
template <>
LEANOPS_DEVICE fp16 narrow<fp16>(float x) {
  return fp16{(u16)pack_fp16(x, 0.0f)};
}

// Stochastic rounding by 16 random bits r. It rounds up with a probability that equals the discarded fraction.
// Non-finite values stay. The result of stochastic_bf16 is in the high half of the word, that of stochastic_fp16 in
// the low half.
LEANOPS_DEVICE u32 stochastic_bf16(float x, u32 r) {
  const u32 bits = as_bits(x), magnitude = bits & 0x7fffffffu;
  if (magnitude < 0x7f800000u) return bits + r;
  return magnitude > 0x7f800000u ? bits | 0x00400000u : bits;
}
LEANOPS_DEVICE u32 stochastic_fp16(float x, u32 r) {
  const u32 bits = as_bits(x), magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x7f800000u) return pack_fp16(x, 0.0f) & 0xffffu;
  if (magnitude >= 0x38800000u) return pack_fp16(as_float((bits + (r >> 3)) & 0xffffe000u), 0.0f) & 0xffffu;
  // subnormal fp16, a multiple of 2^-24: a fixed-point number with 16 fraction bits
  return (bits >> 16 & 0x8000u) | (((u32)mul(as_float(magnitude), 0x1p40f) + r) >> 16);
}

// A chunk's memory <-> its numbers, x [CHUNK]. `words` is [1], and [2] for fp64. `random` [4] has 16 bits for each
// element of a 16-bit type; wider types do not read it. The last parameter only selects the overload.
LEANOPS_DEVICE void unpack(const vec16* words, const float*, float* x) {
#pragma unroll
  for (int e = 0; e < 4; ++e) x[e] = as_float(words->w[e]);  // [4]
}
LEANOPS_DEVICE void unpack(const vec16* words, const double*, double* x) {
#pragma unroll
  for (int e = 0; e < 4; ++e)
    x[e] = as_double((u64)words[e / 2].w[e % 2 * 2 + 1] << 32 | words[e / 2].w[e % 2 * 2]);  // [4]
}
LEANOPS_DEVICE void unpack(const vec16* words, const bf16*, float* x) {
#pragma unroll
  for (int e = 0; e < 8; ++e)
    x[e] = as_float(e % 2 ? words->w[e / 2] & 0xffff0000u : words->w[e / 2] << 16);  // [8]
}
LEANOPS_DEVICE void unpack(const vec16* words, const fp16*, float* x) {
#pragma unroll
  for (int e = 0; e < 8; ++e)
    x[e] = fp16_to_float(e % 2 ? words->w[e / 2] >> 16 : words->w[e / 2] & 0xffffu);  // [8]
}

template <bool STOCHASTIC>
LEANOPS_DEVICE void pack(const float* x, const u32*, vec16* words, const float*) {
#pragma unroll
  for (int e = 0; e < 4; ++e) words->w[e] = as_bits(x[e]);  // [4]
}
template <bool STOCHASTIC>
LEANOPS_DEVICE void pack(const double* x, const u32*, vec16* words, const double*) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const u64 bits = as_bits(x[e]);
    words[e / 2].w[e % 2 * 2] = (u32)bits;
    words[e / 2].w[e % 2 * 2 + 1] = (u32)(bits >> 32);  // [2, 4]
  }
}
template <bool STOCHASTIC>
LEANOPS_DEVICE void pack(const float* x, const u32* random, vec16* words, const bf16*) {
#pragma unroll
  for (int e = 0; e < 8; e += 2)
    words->w[e / 2] = STOCHASTIC ? high_halves(stochastic_bf16(x[e], random[e / 2] & 0xffffu),
                                               stochastic_bf16(x[e + 1], random[e / 2] >> 16))
                                 : pack_bf16(x[e], x[e + 1]);  // [8]
}
template <bool STOCHASTIC>
LEANOPS_DEVICE void pack(const float* x, const u32* random, vec16* words, const fp16*) {
#pragma unroll
  for (int e = 0; e < 8; e += 2)
    words->w[e / 2] = STOCHASTIC ? stochastic_fp16(x[e], random[e / 2] & 0xffffu) |
                                       stochastic_fp16(x[e + 1], random[e / 2] >> 16) << 16
                                 : pack_fp16(x[e], x[e + 1]);  // [8]
}

}  // namespace leanops

#endif
