// Scalar conversions between fp32 and the two 16-bit formats, by integer arithmetic on their bits.
// Everything has internal linkage: see philox.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace leanops {

static inline uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

static inline float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

constexpr uint32_t kBf16Nan = 0x7fc00000u;  // the fp32 bits of a quiet NaN; their upper half is the bf16

static inline float bf16_to_float(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

// fp32 -> bf16, to nearest, ties to even; every NaN becomes 0x7fc0.
static inline uint16_t float_to_bf16(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(kBf16Nan >> 16);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline float fp16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity, or a NaN made quiet
    return bits_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13) |
                      (magnitude > 0x7c00u ? 0x400000u : 0u));
  }
  if (magnitude >= 0x400u) return bits_float(sign | ((magnitude << 13) + 0x38000000u));
  const float x = static_cast<float>(magnitude) * 0x1p-24f;  // zero or subnormal: exact
  return bits_float(float_bits(x) | sign);
}

// fp32 -> fp16, to nearest, ties to even. A NaN becomes quiet, and keeps its sign and the top of its payload.
static inline uint16_t float_to_fp16(float x) {
  const uint32_t u = float_bits(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((a >> 13) & 0x3ffu));
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // at least 65520: infinity
  if (a >= 0x38800000u) {                                              // normal
    return static_cast<uint16_t>(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13));
  }
  if (a <= 0x33000000u) return sign;  // at most 2^-25: zero (the tie goes to even)
  const uint32_t shift = 126u - (a >> 23);
  const uint32_t m = (a & 0x7fffffu) | 0x800000u;  // |x| = m 2^-shift 2^-24; the result is in units of 2^-24
  const uint32_t q = m >> shift;
  const uint32_t rest = m & ((1u << shift) - 1u);
  const uint32_t half = 1u << (shift - 1u);
  return static_cast<uint16_t>(sign | (q + ((rest > half || (rest == half && (q & 1u))) ? 1u : 0u)));
}

}  // namespace leanops
