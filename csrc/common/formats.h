// How a group of 2W elements of each dtype is loaded, rounded and stored, as two vectors F of fp32. simd.h explains
// pairs order and natural order.
//   finish:  prepares fp32 accumulators for store. It rounds stochastically, and to the nearest bf16; store itself
//            rounds to the nearest fp16.
//   settle:  after finish, turns the accumulators into the values that store would write
#pragma once

#include "simd.h"
#include "types.h"

namespace leanops {
namespace LEANOPS_ISA {

struct Float32 {
  using Scalar = float;
  static constexpr bool kPairs = false;
  LEANOPS_INLINE void load(const float* p, F& a, F& b) {
    a = LEANOPS_ISA::load(p);
    b = LEANOPS_ISA::load(p + W);
  }
  template <Rounding R>
  LEANOPS_INLINE void finish(F&, F&, const uint16_t*) {}
  LEANOPS_INLINE void settle(F&, F&) {}
  LEANOPS_INLINE void store(float* p, F a, F b) {
    LEANOPS_ISA::store(p, a);
    LEANOPS_ISA::store(p + W, b);
  }
};

// Pairs: vectors in pairs order, which needs the fewest shuffles. Otherwise they are in natural order, as those of the
// other dtypes, for kernels that combine bf16 with them.
template <bool Pairs>
struct BFloat16In {
  using Scalar = uint16_t;
  static constexpr bool kPairs = Pairs;
  LEANOPS_INLINE void load(const uint16_t* p, F& a, F& b) {
    if constexpr (Pairs) {
      const I raw = load_i(p);
      a = from_bits(sll<16>(raw));
      b = from_bits(and_(raw, set_i(0xffff0000u)));
    } else {
      a = from_bits(sll<16>(load_u16(p)));
      b = from_bits(sll<16>(load_u16(p + W)));
    }
  }
  // Adds the rounding to the lower half; store or settle then drops that half. An infinity stays as it is, because the
  // numbers added, r and 0x7fff, do not reach its upper half.
  template <Rounding R>
  LEANOPS_INLINE void finish(F& a, F& b, const uint16_t* r) {
    I x, y;
    if constexpr (R == Rounding::kNearest) {
      x = round_bf16(bits(a));
      y = round_bf16(bits(b));
    } else if constexpr (Pairs) {
      const I raw = load_i(r);
      x = add(bits(a), and_(raw, set_i(0xffffu)));
      y = add(bits(b), srl<16>(raw));
    } else {
      x = add(bits(a), load_u16(r));
      y = add(bits(b), load_u16(r + W));
    }
    if (__builtin_expect(any_nan(a, b), 0)) {
      a = if_nan(a, from_bits(set_i(kBf16Nan)), from_bits(x));
      b = if_nan(b, from_bits(set_i(kBf16Nan)), from_bits(y));
    } else {
      a = from_bits(x);
      b = from_bits(y);
    }
  }
  LEANOPS_INLINE void settle(F& a, F& b) {
    a = from_bits(and_(bits(a), set_i(0xffff0000u)));
    b = from_bits(and_(bits(b), set_i(0xffff0000u)));
  }
  LEANOPS_INLINE void store(uint16_t* p, F a, F b) {
    if constexpr (Pairs) {
      store_pairs(p, bits(a), bits(b));
    } else {
      store_halves(p, bits(a), bits(b));
    }
  }
};
using BFloat16 = BFloat16In<true>;

struct Float16 {
  using Scalar = uint16_t;
  static constexpr bool kPairs = false;
  LEANOPS_INLINE void load(const uint16_t* p, F& a, F& b) {
    a = load_half(p);
    b = load_half(p + W);
  }
  LEANOPS_INLINE F stochastic(F x, I r) {
    const I magnitude = and_(bits(x), set_i(0x7fffffffu));
    const I sign = and_(bits(x), set_i(0x80000000u));
    const I normal = and_(add(bits(x), srl<3>(r)), set_i(~0x1fffu));
    const I q = srl<16>(add(truncate(mul(from_bits(magnitude), set_f(0x1p40f))), r));
    const I tiny = bits(half_bits(or_(srl<16>(sign), q)));  // q 2^-24: the bits of a subnormal fp16 are q
    const I rounded = less(magnitude, set_i(0x38800000u), tiny, normal);
    return if_nan(x, x, from_bits(rounded));
  }
  template <Rounding R>
  LEANOPS_INLINE void finish(F& a, F& b, const uint16_t* r) {
    if constexpr (R == Rounding::kStochastic) {
      a = stochastic(a, load_u16(r));
      b = stochastic(b, load_u16(r + W));
    }
  }
  LEANOPS_INLINE void settle(F& a, F& b) {
    a = round_half(a);
    b = round_half(b);
  }
  LEANOPS_INLINE void store(uint16_t* p, F a, F b) {
    store_half(p, a);
    store_half(p + W, b);
  }
};

}  // namespace LEANOPS_ISA
}  // namespace leanops
