// Philox batches and the Gaussian of zo/1, in the vector vocabulary of simd.h.
#pragma once

#include "../common/philox.h"
#include "../common/simd.h"

namespace leanops {
namespace LEANOPS_ISA {

constexpr int kBatch = W / 2;    // Philox blocks in a batch
constexpr int64_t G = 2 * W;     // elements in a group, of whole batches
constexpr int64_t kTile = 4096;  // elements: with signs, bits and accumulators 25 KB
// Groups whose Philox rounds run side by side. Gaussian bf16 on Zen 5, ns an element for 1, 2, 3, 4, 6:
// AVX-512 .60 .42 .41 .34 .30 (but .47 for 6 in the sequential kernel), AVX2 1.42 1.00 .94 .89.
constexpr int kUnroll = LEANOPS_LEVEL == 0 ? 1 : 4;

static inline uint32_t high32(uint64_t block) { return static_cast<uint32_t>(block >> 32); }

// U independent batches of consecutive blocks, side by side to hide latency:
// a = words 0, 2 of each block in turn, b = words 1, 3.                                     a, b: [U][W]
template <int U>
LEANOPS_INLINE void philox_batches(const PhiloxPlan& plan, uint64_t block, I* a, I* b) {
  const P m0 = set_p(kPhiloxM0), m1 = set_p(kPhiloxM1);
  P x0[U], x1[U], x2[U], x3[U];
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) {
    const P p = mul_p(iota_p(block + static_cast<uint64_t>(u * kBatch)), m0);
    x2[u] = xor_p(high_p(p), word_p(plan.r1));
    const P q = mul_p(x2[u], m1);
    x0[u] = xor_p(high_p(q), word_p(plan.r2a));
    x1[u] = q;
    x2[u] = xor_p(p, word_p(plan.r2b));
  }
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) {
    const P p = mul_p(x0[u], m0), q = mul_p(x2[u], m1);
    x0[u] = xor_p(high_p(q), x1[u], word_p(plan.k0[2]));
    x1[u] = q;
    x2[u] = xor_p(high_p(p), word_p(plan.r3));
    x3[u] = p;
  }
#pragma GCC unroll 6
  for (int round = 3; round < kPhiloxRounds - 1; ++round) {
    const P k0 = word_p(plan.k0[round]), k1 = word_p(plan.k1[round]);
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      const P p = mul_p(x0[u], m0), q = mul_p(x2[u], m1);
      x0[u] = xor_p(high_p(q), x1[u], k0);
      x1[u] = q;
      x2[u] = xor_p(high_p(p), x3[u], k1);
      x3[u] = p;
    }
  }
  const I last = alternate(plan.k0[kPhiloxRounds - 1], plan.k1[kPhiloxRounds - 1]);
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) {  // the last round goes straight to the merged words
    const P p = mul_p(x0[u], m0), q = mul_p(x2[u], m1);
    a[u] = xor_i(merge_high(q, p), merge_low(x1[u], x3[u]), last);
    b[u] = merge_low(q, p);
  }
}

// Box-Muller with fixed polynomials and every rounding written out: the same bits on every backend.
//   rho = sqrt(-2 ln u1), u1 = ((a >> 8) + 1) 2^-24;  even, odd = rho cos 2 pi u2, rho sin 2 pi u2, u2 = (b
//   >> 8) 2^-24
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

// The words of blocks [block, block + count) in memory order; writes up to one batch more than asked.
static inline void philox_words(const PhiloxPlan& plan, uint64_t block, int64_t count, uint32_t* words) {
  constexpr int U = 4;
  int64_t done = 0;
  for (; done + U * kBatch <= count; done += U * kBatch) {
    I a[U], b[U];
    philox_batches<U>(plan, block + static_cast<uint64_t>(done), a, b);
    for (int u = 0; u < U; ++u) store_words(words + 4 * done + 2 * W * u, a[u], b[u]);
  }
  for (; done < count; done += kBatch) {
    I a[1], b[1];
    philox_batches<1>(plan, block + static_cast<uint64_t>(done), a, b);
    store_words(words + 4 * done, a[0], b[0]);
  }
}

}  // namespace LEANOPS_ISA
}  // namespace leanops
