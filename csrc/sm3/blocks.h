// int8 momenta: blocks of up to kBlock values with one scale, so that value = code * scale.
//
// Functions take n <= kBlock elements in whole pairs of vectors: they read and write up to kPair - 1 elements beyond
// them. Who calls them in rising order writes what is beyond again.
#pragma once

#include "../common/simd.h"
#include "sm3.h"

namespace leanops {
namespace LEANOPS_ISA {

constexpr int64_t kPair = 2 * W;
constexpr float kLeastBlock = 0x1p-120f;  // what is smaller throughout is stored as zeros

static inline void decode_block(const int8_t* codes, float scale, float* out, int64_t n) {
  const F s = set_f(scale);
  for (int64_t j = 0; j < n; j += W) store(out + j, mul(to_float(load_i8(codes + j)), s));
}

// kPair times all bits of a magnitude, then kPair times none.
struct Magnitude {
  uint32_t bits[2 * kPair];
  constexpr Magnitude() : bits() {
    for (int64_t j = 0; j < kPair; ++j) bits[j] = 0x7fffffffu;
  }
};
static constexpr Magnitude kMagnitude;

// The bits of the largest magnitude; above those of infinity where there is a NaN.
static inline uint32_t largest_of(const float* m, int64_t n) {
  I a = set_i(0), b = a;
  for (int64_t j = 0; j < n; j += kPair) {
    const uint32_t* mask = kMagnitude.bits + (n - j < kPair ? kPair - (n - j) : 0);
    a = max_u(a, and_(load_i(m + j), load_i(mask)));
    b = max_u(b, and_(load_i(m + j + W), load_i(mask + W)));
  }
  return max_lane(max_u(a, b));
}

// A block on its way to codes, which are made a pair of vectors at a time, whenever that costs least.
//   scale = max |m| / 127, codes = rint(m * (127 / max |m|)), ties to even
// A NaN or an infinity anywhere makes the scale NaN and all codes 1, so that the block reads NaN.
struct Encoding {
  const float* m = nullptr;
  int8_t* codes = nullptr;
  int64_t n = 0;  // codes to be made
  float inverse = 0;
};

// `largest` as largest_of gives it.
LEANOPS_INLINE Encoding encoding_of(const float* m, uint32_t largest, int8_t* codes, float* scale,
                                    int64_t n) {
  const float a = bits_float(largest);
  if (largest >= 0x7f800000u || a < kLeastBlock) {
    const bool lost = largest >= 0x7f800000u;
    *scale = lost ? __builtin_nanf("") : 0.0f;
    for (int64_t j = 0; j < n; ++j) codes[j] = lost;
    return {};
  }
  *scale = a / 127.0f;
  return {m, codes, n, 127.0f / a};
}

LEANOPS_INLINE void encode(const Encoding& e, int64_t j) {
  if (j >= e.n) return;
  const F inverse = set_f(e.inverse);
  store_i8(e.codes + j, nearest(mul(load(e.m + j), inverse)), nearest(mul(load(e.m + j + W), inverse)));
}

}  // namespace LEANOPS_ISA
}  // namespace leanops
