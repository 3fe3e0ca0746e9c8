// int8 momenta: blocks of up to kBlock values with one scale, so that value = code * scale.
#pragma once

#include "../common/simd.h"
#include "sm3.h"

namespace leanops {
namespace LEANOPS_ISA {

constexpr float kLeastBlock = 0x1p-120f;  // what is smaller throughout is stored as zeros

// n <= kBlock values; writes out up to a vector beyond them.
static inline void decode_block(const int8_t* codes, float scale, float* out, int64_t n) {
  const F s = set_f(scale);
  int64_t j = 0;
  for (; j + W <= n; j += W) store(out + j, mul(to_float(load_i8(codes + j)), s));
  if (j < n) {
    int8_t rest[W] = {};
    __builtin_memcpy(rest, codes + j, static_cast<size_t>(n - j));
    store(out + j, mul(to_float(load_i8(rest)), s));
  }
}

// scale = max |m| / 127, codes = rint(m * (127 / max |m|)), ties to even. A NaN or an infinity anywhere makes
// the scale NaN and all codes 1, so that the block reads NaN.
static inline void encode_block(const float* m, int8_t* codes, float* scale, int64_t n) {
  constexpr int64_t kPair = 2 * W;
  const int64_t whole = n / kPair * kPair;
  const size_t left = static_cast<size_t>(n - whole);
  float rest[kPair] = {};
  __builtin_memcpy(rest, m + whole, left * sizeof(float));

  const I magnitude = set_i(0x7fffffffu);
  I most0 = and_(load_i(rest), magnitude), most1 = and_(load_i(rest + W), magnitude);
  for (int64_t j = 0; j < whole; j += kPair) {
    most0 = max_u(most0, and_(load_i(m + j), magnitude));
    most1 = max_u(most1, and_(load_i(m + j + W), magnitude));
  }
  const uint32_t most = max_lane(max_u(most0, most1));
  const float a = bits_float(most);
  if (most >= 0x7f800000u || a < kLeastBlock) {
    const bool lost = most >= 0x7f800000u;
    *scale = lost ? __builtin_nanf("") : 0.0f;
    __builtin_memset(codes, lost, static_cast<size_t>(n));
    return;
  }
  *scale = a / 127.0f;
  const F inverse = set_f(127.0f / a);
  const F nearest = set_f(0x1.8p23f);  // a sum with it is an integer, which its bits count from its own
  const I origin = bits(nearest);
  const auto pair = [&](const float* from, int8_t* to) LEANOPS_ALWAYS_INLINE {
    store_i8(to, sub(bits(add(mul(load(from), inverse), nearest)), origin),
             sub(bits(add(mul(load(from + W), inverse), nearest)), origin));
  };
  for (int64_t j = 0; j < whole; j += kPair) pair(m + j, codes + j);
  if (left) {
    int8_t last[kPair];
    pair(rest, last);
    __builtin_memcpy(codes + whole, last, left);
  }
}

}  // namespace LEANOPS_ISA
}  // namespace leanops
