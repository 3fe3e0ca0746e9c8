// int8 momenta: blocks of up to kBlock values with one scale, so that value = code * scale.
//
// The functions take n <= kBlock elements in whole pairs of vectors: they read and write up to kPair - 1 elements
// beyond them. So a caller must take the blocks in rising order, and have room after the last one.
#pragma once

#include "../common/simd.h"
#include "sm3.h"

namespace leanops {
namespace LEANOPS_ISA {

constexpr int64_t kPair = 2 * W;
constexpr float kLeastBlock = 0x1p-120f;  // a block in which every |m| is smaller is stored as zeros

static inline void decode_block(const int8_t* codes, float scale, float* out, int64_t n) {
  const F s = set_f(scale);
  for (int64_t j = 0; j < n; j += W) store(out + j, mul(to_float(load_i8(codes + j)), s));
}

// kPair masks of a magnitude's bits, then kPair masks of no bit.
struct Magnitude {
  uint32_t bits[2 * kPair];
  constexpr Magnitude() : bits() {
    for (int64_t j = 0; j < kPair; ++j) bits[j] = 0x7fffffffu;
  }
};
static constexpr Magnitude kMagnitude;

// The bits of the largest |m|. With a NaN they are above the bits of infinity.
static inline uint32_t largest_of(const float* m, int64_t n) {
  I a = set_i(0), b = a;
  for (int64_t j = 0; j < n; j += kPair) {
    const uint32_t* mask = kMagnitude.bits + (n - j < kPair ? kPair - (n - j) : 0);
    a = max_u(a, and_(load_i(m + j), load_i(mask)));
    b = max_u(b, and_(load_i(m + j + W), load_i(mask + W)));
  }
  return max_lane(max_u(a, b));
}

// A block whose codes are still to be made. `encode` makes a pair of vectors of them at a time.
//   scale = max |m| / 127, codes = rint(m * (127 / max |m|)), ties to even
// If one m is a NaN or an infinity, the scale is NaN and all codes are 1, so that the whole block reads NaN.
struct Encoding {
  const float* m = nullptr;
  int8_t* codes = nullptr;
  int64_t n = 0;  // number of codes to make
  float inverse = 0;
};

// Writes the scale. `largest`: the result of largest_of.
LEANOPS_INLINE Encoding encoding_of(const float* m, uint32_t largest, int8_t* codes, float* scale,
                                    int64_t n) {
  const float a = bits_float(largest);
  if (largest >= 0x7f800000u || a < kLeastBlock) {
    const bool not_finite = largest >= 0x7f800000u;
    *scale = not_finite ? __builtin_nanf("") : 0.0f;
    for (int64_t j = 0; j < n; ++j) codes[j] = not_finite;
    return {};
  }
  *scale = a / 127.0f;
  return {m, codes, n, 127.0f / a};
}

// Makes the codes j to j + kPair - 1.
LEANOPS_INLINE void encode(const Encoding& e, int64_t j) {
  if (j >= e.n) return;
  const F inverse = set_f(e.inverse);
  store_i8(e.codes + j, nearest(mul(load(e.m + j), inverse)), nearest(mul(load(e.m + j + W), inverse)));
}

}  // namespace LEANOPS_ISA
}  // namespace leanops
