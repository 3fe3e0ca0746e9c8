// Stands in for csrc/common/device.cuh and block.cuh with plain C++ that rounds as those files promise.
#pragma once
#define LEANOPS_COMMON_DEVICE_CUH
#define LEANOPS_COMMON_BLOCK_CUH

#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstdlib>

#include "engine.h"

#define __device__
#define __shared__ static
#define LEANOPS_DEVICE inline

inline void __syncwarp() { emulator::launch.exchange(0, "__syncwarp"); }

namespace leanops {

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
using std::max;
using std::min;

struct bf16 {
  u16 bits;
};
struct fp16 {
  u16 bits;
};
struct alignas(16) vec16 {
  u32 w[4];
};
struct alignas(8) vec8 {
  u32 w[2];
};

template <class To, class From>
To bit_cast(From from) {
  To to;
  static_assert(sizeof to == sizeof from, "same size");
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

inline float as_float(u32 bits) { return bit_cast<float>(bits); }
inline u32 as_bits(float x) { return bit_cast<u32>(x); }
inline double as_double(u64 bits) { return bit_cast<double>(bits); }
inline u64 as_bits(double x) { return bit_cast<u64>(x); }
inline u32 select_bytes(u32 a, u32 b, u32 selector) {
  const u64 both = (u64)b << 32 | a;
  u32 x = 0;
  for (int k = 0; k < 4; ++k) x |= (u32)(both >> (selector >> 4 * k & 7) * 8 & 0xff) << 8 * k;
  return x;
}
inline u32 high_halves(u32 lo, u32 hi) { return select_bytes(lo, hi, 0x7632); }
inline u64 wide_mul(u32 a, u32 b) { return (u64)a * b; }
inline u32 high(u64 x) { return (u32)(x >> 32); }
template <class T>
T* global(u64 address) {
  return (T*)address;
}
template <class V>
void store_aligned(V* out, const V& x) {
  require((u64)out % sizeof(V) == 0, "a store at an address that is not a multiple of its size");
  *out = x;
}
inline void store(vec16* out, const vec16& x) { store_aligned(out, x); }
inline void store(vec8* out, const vec8& x) { store_aligned(out, x); }
inline void store(u32* out, u32 x) { store_aligned(out, x); }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float mul(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline double mul(double a, double b) { return a * b; }
inline double add(double a, double b) { return a + b; }
inline float div(float a, float b) { return a / b; }
inline float sqrt(float x) { return std::sqrt(x); }
inline float min_or_nan(float a, float b) { return a < b || a != a ? a : b; }
inline float sqrt_bounded(float t) { return std::sqrt(t); }
inline float sqrt_in_range(float t) {
  require(t >= 0x1p-101f && t < 0x1p127f, "sqrt_in_range: out of range");
  return std::sqrt(t);
}
inline float div_in_range(float a, float b) {
  const float inverse = 1.0f / b, q = a / b;
  require(std::isnormal(b) && std::isnormal(inverse), "div_in_range: divisor out of range");
  require(a == 0 || (std::fabs(a) >= 0x1p-100f && std::isnormal(q)), "div_in_range: quotient out of range");
  return std::fabs(q) == 0 ? 0.0f : q;  // the sign of a zero is lost
}

inline u32 to_bf16(float x) {
  const u32 bits = as_bits(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 to_fp16(float x) {
  const u32 sign = as_bits(x) >> 16 & 0x8000;
  const double magnitude = std::fabs((double)x);
  if (x != x) return 0x7fff;
  if (magnitude >= 65520.0) return sign | 0x7c00;
  const int exponent = std::max(magnitude == 0 ? -14 : std::ilogb(magnitude), -14);
  const double units = std::nearbyint(std::ldexp(magnitude, 10 - exponent));  // ties to even
  return sign | (u32)(units + std::ldexp(exponent + 14, 10));  // a carry runs into the exponent
}
inline u32 pack_bf16(float lo, float hi) { return to_bf16(lo) | to_bf16(hi) << 16; }
inline u32 pack_fp16(float lo, float hi) { return to_fp16(lo) | to_fp16(hi) << 16; }
inline float fp16_to_float(u32 half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const float sign = half & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * std::ldexp((float)(exponent ? mantissa + 1024 : mantissa), std::max(exponent, 1) - 25);
}

template <class T>
T& shared() {
  return *(T*)emulator::launch.shared_memory();
}
inline void barrier() { emulator::launch.barrier(); }
inline u32 shuffle_xor(u32 x, int mask) {
  return emulator::launch.exchange(x, "shuffle_xor")[(threadIdx.x % 32) ^ (unsigned)mask];
}
inline u32 warp_max(u32 x) {
  const unsigned* words = emulator::launch.exchange(x, "warp_max");
  return *std::max_element(words, words + 32);
}
inline void atomic_max(u32* shared_by_blocks, u32 x) {
  emulator::launch.maybe_hand_over();
  *shared_by_blocks = std::max(*shared_by_blocks, x);
}
inline u32 load_shared_by_blocks(const u32* address) {
  emulator::launch.maybe_hand_over();
  return *address;
}
inline u32 arrive(u32* counter) {
  emulator::launch.maybe_hand_over();
  return (*counter)++;
}

}  // namespace leanops
