// The Gaussian noise of zo/1, by the vector operations of simd.h.
#pragma once

#include "../common/philox_vector.h"

namespace leanops {
namespace LEANOPS_ISA {

constexpr int64_t G = 2 * W;     // elements in a group, of whole batches
constexpr int64_t kTile = 4096;  // elements: with signs, bits and accumulators 25 KB
// Groups whose Philox rounds are computed together. Gaussian bf16 on Zen 5, ns an element for 1, 2, 3, 4, 6:
// AVX-512 .60 .42 .41 .34 .30 (but .47 for 6 in the sequential kernel), AVX2 1.42 1.00 .94 .89.
constexpr int kUnroll = LEANOPS_LEVEL == 0 ? 1 : 4;

// Box-Muller with fixed polynomials and every rounding written out: the same bits on every backend.
//   rho = sqrt(-2 ln u1), u1 = ((a >> 8) + 1) 2^-24
//   even, odd = rho cos 2 pi u2, rho sin 2 pi u2, u2 = (b >> 8) 2^-24
LEANOPS_INLINE void box_muller(I a, I b, F& even, F& odd) {
  const F k = to_float(add(srl<8>(a), set_i(1)));
  const I i = sub(bits(k), set_i(0x4b400000u));
  const F e = to_float(sra<23>(i));  // u1 = (1 + f) 2^e with 1 + f in [0.75, 1.5)
  const F f = sub(from_bits(add(and_(i, set_i(0x7fffffu)), set_i(0x3f400000u))), set_f(1.0f));
  F p = fma(set_f(-0x1.5ca78ap-3f), f, set_f(0x1.5b9f46p-2f));  // -2 ln(1 + f) / f
  p = fma(p, f, set_f(-0x1.a789b4p-2f));
  p = fma(p, f, set_f(0x1.007cb6p-1f));
  p = fma(p, f, set_f(-0x1.5520fp-1f));
  p = fma(p, f, set_f(0x1.fffd2cp-1f));
  p = fma(p, f, set_f(-0x1.00001p+1f));
  const F t = fma(e, set_f(-0x1.62e43p+0f), mul(f, p));
  const F rho = flip_sign(sqrt(t), b);

  const F y = sub(from_bits(and_or(srl<8>(b), set_i(0x7fffffu), set_i(0x3f800000u))), set_f(1.5f));
  const F s = mul(y, y);
  F ps = fma(set_f(-0x1.3c4d66p-4f), s, set_f(0x1.323324p-1f));  // -sin(pi y) / y
  F pc = fma(set_f(0x1.c1f066p-3f), s, set_f(-0x1.54f61ap+0f));  // cos(pi y)
  ps = fma(ps, s, set_f(-0x1.466778p+1f));
  pc = fma(pc, s, set_f(0x1.03bd06p+2f));
  ps = fma(ps, s, set_f(0x1.4abbb6p+2f));
  pc = fma(pc, s, set_f(-0x1.3bd3a6p+2f));
  ps = fma(ps, s, set_f(-0x1.921fb4p+1f));
  pc = fma(pc, s, set_f(0x1.fffffep-1f));
  even = mul(rho, mul(ps, y));
  odd = mul(rho, pc);
}

}  // namespace LEANOPS_ISA
}  // namespace leanops
