// Machine primitives of the CUDA cores. No torch and no std header, so nvcc and NVRTC take the same text.
// Every arithmetic helper rounds exactly as written: no compiler flag can contract it. Do not compile with -ftz=true:
// it flushes subnormals.
#ifndef LEANOPS_COMMON_DEVICE_CUH
#define LEANOPS_COMMON_DEVICE_CUH

namespace leanops {

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct bf16 {
  u16 bits;
};
struct fp16 {
  u16 bits;
};
struct __align__(16) vec16 {  // one 16-byte memory access
  u32 w[4];
};
struct __align__(8) vec8 {
  u32 w[2];
};

#define LEANOPS_DEVICE __device__ __forceinline__

LEANOPS_DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
LEANOPS_DEVICE u32 as_bits(float x) { return __float_as_uint(x); }
LEANOPS_DEVICE double as_double(u64 bits) { return __longlong_as_double((i64)bits); }
LEANOPS_DEVICE u64 as_bits(double x) { return (u64)__double_as_longlong(x); }
// Byte k of the result is byte (selector >> 4k & 7) of the eight bytes of a and b; bytes 0 to 3 are a's.
LEANOPS_DEVICE u32 select_bytes(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }
// The high half of lo in the low half, the high half of hi in the high half.
LEANOPS_DEVICE u32 high_halves(u32 lo, u32 hi) { return select_bytes(lo, hi, 0x7632); }

// One instruction. The compiler makes several of a 64-bit product by Philox's constants.
LEANOPS_DEVICE u64 wide_mul(u32 a, u32 b) {
  u64 product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
}
LEANOPS_DEVICE u32 high(u64 x) { return (u32)(x >> 32); }

// A pointer from the number of an address in global memory.
template <class T>
LEANOPS_DEVICE T* global(u64 address) {
  return (T*)__cvta_global_to_generic(address);
}

// One store instruction each. The compiler sometimes splits a plain assignment into words.
LEANOPS_DEVICE void store(vec16* target, const vec16& x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(x.w[0]), "r"(x.w[1]),
               "r"(x.w[2]), "r"(x.w[3])
               : "memory");
}
LEANOPS_DEVICE void store(vec8* target, const vec8& x) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(target), "r"(x.w[0]), "r"(x.w[1]) : "memory");
}
LEANOPS_DEVICE void store(u32* target, u32 x) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(target), "r"(x) : "memory");
}

LEANOPS_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
LEANOPS_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
LEANOPS_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
LEANOPS_DEVICE double mul(double a, double b) { return __dmul_rn(a, b); }
LEANOPS_DEVICE double add(double a, double b) { return __dadd_rn(a, b); }
LEANOPS_DEVICE float div(float a, float b) { return __fdiv_rn(a, b); }
LEANOPS_DEVICE float sqrt(float x) { return __fsqrt_rn(x); }

// The minimum, or NaN if a or b is NaN. fminf would drop the NaN.
LEANOPS_DEVICE float min_or_nan(float a, float b) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  float x;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
  return x;
#else
  return a < b || a != a ? a : b;
#endif
}

// Correctly rounded sqrt of t = ±0 or 2^-97 <= t < 2^127: the fast path of sqrt.rn.f32 without its range
// branch, which costs six instructions. The clamp keeps the reciprocal root of zero finite, so that
// sqrt(±0) = ±0.
LEANOPS_DEVICE float sqrt_bounded(float t) {
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(fmaxf(t, 0x1p-97f)));
  const float s = __fmul_rn(t, r);
  const float h = __fmul_rn(r, 0.5f);
  return __fmaf_rn(__fmaf_rn(-s, s, t), h, s);
}

// sqrt and div by the instructions that the compiler uses for arguments in range, without its test of the range.
// sqrt_in_range: 2^-101 <= t < 2^127. div_in_range: b, 1 / b and a / b are normal, and |a| >= 2^-100; or a is zero,
// and then the zero's sign is lost.
LEANOPS_DEVICE float sqrt_in_range(float t) {
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(t));
  const float s = __fmul_rn(t, r);
  return __fmaf_rn(__fmaf_rn(-s, s, t), __fmul_rn(r, 0.5f), s);
}
LEANOPS_DEVICE float div_in_range(float a, float b) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
  r = __fmaf_rn(r, __fmaf_rn(-b, r, 1.0f), r);
  const float q = __fmul_rn(a, r);
  return __fmaf_rn(r, __fmaf_rn(-b, q, a), q);
}

// Two floats rounded to 16 bits, ties to even, in one register: lo in the low half, hi in the high half.
LEANOPS_DEVICE u32 pack_bf16(float lo, float hi) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}
LEANOPS_DEVICE u32 pack_fp16(float lo, float hi) {
  u32 packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}
LEANOPS_DEVICE float fp16_to_float(u32 half) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((u16)half));
  return x;
}

}  // namespace leanops

#endif
