// The kernels over one tile of at most kTile elements. A tile consists of groups of G = 2W elements that begin at a
// multiple of G, so a group is whole Philox batches. The tile's Rademacher signs and rounding bits are computed before
// the loop over groups. With several terms the tile's accumulators stay in the first-level cache from term to term.
#pragma once

#include "../common/formats.h"
#include "lowrank.h"
#include "noise.h"
#include "zo.h"

namespace leanops {
namespace LEANOPS_ISA {

using zo::Distribution;
using zo::Terms;

constexpr int64_t kSlack = 4 * kBatch;

// The noise and the rounding bits of one tile and one term.
struct Source {
  PhiloxPlan plan;                                      // Gaussian
  const float* z;                                       // low rank: z of the tile
  int64_t first;                                        // Rademacher: the tile's first group within signs
  alignas(64) uint32_t signs[kTile / 32 + 4 + kSlack];  // Rademacher: one bit for an element
  RoundingBits<kTile> rounding;
  const uint16_t* bits;  // stochastic rounding: 16 bits for an element
};

template <Distribution D>
static void prepare_noise(Source& src, uint64_t seed, uint32_t tensor_id, uint64_t index, int64_t groups) {
  if constexpr (D == Distribution::kGaussian) {
    src.plan = philox_plan(seed, tensor_id, zo::kStreamGaussian, high32(index / 4));
  } else {
    const uint64_t block = index / 128;
    const int64_t skipped = static_cast<int64_t>(index % 128);
    src.first = skipped / G;
    philox_words(philox_plan(seed, tensor_id, zo::kStreamRademacher, high32(block)), block,
                 (skipped + groups * G + 127) / 128, src.signs);
  }
}

// The noise of term k of a call.
template <Distribution D>
static void prepare_term(Source& src, const Terms& terms, int64_t k, uint32_t tensor_id, uint64_t index,
                         int64_t groups, Factors* factors) {
  if constexpr (D == Distribution::kLowRank) {
    factors->fill(factors->z, terms.seeds[k], terms.right_seeds[k], tensor_id, index, groups * G);
    src.z = factors->z;
  } else {
    prepare_noise<D>(src, terms.seeds[k], tensor_id, index, groups);
  }
}

static void prepare_rounding(Source& src, uint64_t seed, uint32_t tensor_id, uint64_t index, int64_t groups) {
  src.bits = src.rounding.fill(seed, tensor_id, index, groups * G);
}

// z [U][2][W] of U groups of the tile from group g on.
template <Distribution D, bool Pairs, int U>
LEANOPS_INLINE void values(F* z, const Source& src, uint64_t index, int64_t g) {
  if constexpr (D == Distribution::kGaussian) {
    I a[U], b[U];
    philox_batches<U>(src.plan, index / 4 + static_cast<uint64_t>(g * kBatch), a, b);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      F even, odd;
      box_muller(a[u], b[u], even, odd);
      if constexpr (Pairs) {
        z[2 * u] = even;
        z[2 * u + 1] = odd;
      } else {
        interleave(even, odd, z[2 * u], z[2 * u + 1]);
      }
    }
  } else if constexpr (D == Distribution::kLowRank) {
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const F first = load(src.z + (g + u) * G), second = load(src.z + (g + u) * G + W);
      if constexpr (Pairs) {
        deinterleave(first, second, z[2 * u], z[2 * u + 1]);
      } else {
        z[2 * u] = first;
        z[2 * u + 1] = second;
      }
    }
  } else {
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      I s0, s1;
      if constexpr (Pairs) {
        signs_pairs(src.signs, src.first + g + u, s0, s1);
      } else {
        signs_natural(src.signs, src.first + g + u, s0, s1);
      }
      z[2 * u] = flip_sign(set_f(1.0f), s0);
      z[2 * u + 1] = flip_sign(set_f(1.0f), s1);
    }
  }
}

// Calls step(g, U) for all groups, U = kUnroll at a time and then one at a time. U is a type, Constant<U>.
template <int N>
struct Constant {
  static constexpr int value = N;
};
template <class Step>
LEANOPS_INLINE void for_groups(int64_t groups, const Step& step) {
  int64_t g = 0;
  for (; g + kUnroll <= groups; g += kUnroll) step(g, Constant<kUnroll>());
  for (; g < groups; ++g) step(g, Constant<1>());
}

// out = round(z)
template <class T, Distribution D>
static void noise_tile(typename T::Scalar* out, int64_t groups, uint64_t index, uint64_t seed,
                       uint32_t tensor_id) {
  Source src;
  prepare_noise<D>(src, seed, tensor_id, index, groups);
  for_groups(groups, [&](int64_t g, auto unroll) LEANOPS_ALWAYS_INLINE {
    constexpr int U = decltype(unroll)::value;
    F z[2 * U];
    values<D, T::kPairs, U>(z, src, index, g);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      T::template finish<Rounding::kNearest>(z[2 * u], z[2 * u + 1], nullptr);
      T::store(out + (g + u) * G, z[2 * u], z[2 * u + 1]);
    }
  });
}

// One term: out = round(keep in + c z).
template <class T, Distribution D, Rounding R>
static void one_term(typename T::Scalar* out, const typename T::Scalar* in, int64_t groups, uint64_t index,
                     const Terms& terms, uint32_t tensor_id, Factors* factors) {
  Source src;
  prepare_term<D>(src, terms, 0, tensor_id, index, groups, factors);
  if constexpr (R == Rounding::kStochastic) prepare_rounding(src, terms.seeds[0], tensor_id, index, groups);
  const F c = set_f(static_cast<float>(terms.coeffs[0]));
  const F keep = set_f(static_cast<float>(1.0 - terms.decays[0]));
  for_groups(groups, [&](int64_t g, auto unroll) LEANOPS_ALWAYS_INLINE {
    constexpr int U = decltype(unroll)::value;
    F z[2 * U];
    values<D, T::kPairs, U>(z, src, index, g);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      F a, b;
      T::load(in + (g + u) * G, a, b);
      a = fma(c, z[2 * u], mul(a, keep));
      b = fma(c, z[2 * u + 1], mul(b, keep));
      T::template finish<R>(a, b, src.bits + (g + u) * G);
      T::store(out + (g + u) * G, a, b);
    }
  });
}

// Several terms, which are added to one tile of accumulators.
template <class T, Distribution D, Rounding R, bool Sequential>
static void many_terms(typename T::Scalar* out, const typename T::Scalar* in, int64_t groups, uint64_t index,
                       const Terms& terms, uint32_t tensor_id, Factors* factors) {
  Source src;
  alignas(64) float tile[kTile];
  const F start = set_f(Sequential ? 1.0f : static_cast<float>(1.0 - terms.decays[0]));
  for (int64_t g = 0; g < groups; ++g) {
    F a, b;
    T::load(in + g * G, a, b);
    store(tile + g * G, mul(a, start));
    store(tile + g * G + W, mul(b, start));
  }
  for (int64_t k = 0; k < terms.count; ++k) {
    prepare_term<D>(src, terms, k, tensor_id, index, groups, factors);
    if constexpr (Sequential && R == Rounding::kStochastic) {
      prepare_rounding(src, terms.seeds[k], tensor_id, index, groups);
    }
    const F c = set_f(static_cast<float>(terms.coeffs[k]));
    const F keep = set_f(static_cast<float>(1.0 - terms.decays[terms.decay_count > 1 ? k : 0]));
    for_groups(groups, [&](int64_t g, auto unroll) LEANOPS_ALWAYS_INLINE {
      constexpr int U = decltype(unroll)::value;
      F z[2 * U];
      values<D, T::kPairs, U>(z, src, index, g);
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        float* group = tile + (g + u) * G;
        F a = load(group), b = load(group + W);
        if constexpr (Sequential) {
          a = mul(a, keep);
          b = mul(b, keep);
        }
        a = fma(c, z[2 * u], a);
        b = fma(c, z[2 * u + 1], b);
        if constexpr (Sequential) {
          T::template finish<R>(a, b, src.bits + (g + u) * G);
          T::settle(a, b);
        }
        store(group, a);
        store(group + W, b);
      }
    });
  }
  if constexpr (!Sequential && R == Rounding::kStochastic) {
    prepare_rounding(src, terms.seeds[0], tensor_id, index, groups);
  }
  for (int64_t g = 0; g < groups; ++g) {
    F a = load(tile + g * G), b = load(tile + g * G + W);
    if constexpr (!Sequential) T::template finish<R>(a, b, src.bits + g * G);
    T::store(out + g * G, a, b);
  }
}

// plus = round(in + c z), minus = round(in - c z)
template <class T, Distribution D>
static void both_tile(typename T::Scalar* plus, typename T::Scalar* minus, const typename T::Scalar* in,
                      int64_t groups, uint64_t index, uint64_t seed, float coeff, uint32_t tensor_id) {
  Source src;
  prepare_noise<D>(src, seed, tensor_id, index, groups);
  const F c = set_f(coeff), d = set_f(-coeff);
  for_groups(groups, [&](int64_t g, auto unroll) LEANOPS_ALWAYS_INLINE {
    constexpr int U = decltype(unroll)::value;
    F z[2 * U];
    values<D, T::kPairs, U>(z, src, index, g);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      F a, b;
      T::load(in + (g + u) * G, a, b);
      F up0 = fma(c, z[2 * u], a), up1 = fma(c, z[2 * u + 1], b);
      F down0 = fma(d, z[2 * u], a), down1 = fma(d, z[2 * u + 1], b);
      T::template finish<Rounding::kNearest>(up0, up1, nullptr);
      T::template finish<Rounding::kNearest>(down0, down1, nullptr);
      T::store(plus + (g + u) * G, up0, up1);
      T::store(minus + (g + u) * G, down0, down1);
    }
  });
}

// minus = round(plus - c b) and plus = round(plus + c b) for any n elements.
template <class T>
static void spread_run(void* plus, void* minus, const void* b, int64_t n, float scale) {
  using S = typename T::Scalar;
  S* p = static_cast<S*>(plus);
  S* q = static_cast<S*>(minus);
  const S* t = static_cast<const S*>(b);
  const F c = set_f(scale), d = set_f(-scale);
  const auto group = [&](S* up, S* down, const S* step) {
    F a0, a1, b0, b1;
    T::load(up, a0, a1);
    T::load(step, b0, b1);
    F up0 = fma(c, b0, a0), up1 = fma(c, b1, a1), down0 = fma(d, b0, a0), down1 = fma(d, b1, a1);
    T::template finish<Rounding::kNearest>(up0, up1, nullptr);
    T::template finish<Rounding::kNearest>(down0, down1, nullptr);
    T::store(up, up0, up1);
    T::store(down, down0, down1);
  };
  int64_t j = 0;
  for (; j + G <= n; j += G) group(p + j, q + j, t + j);
  if (j < n) {
    S up[G] = {}, down[G], step[G] = {};
    const size_t bytes = static_cast<size_t>(n - j) * sizeof(S);
    __builtin_memcpy(up, p + j, bytes);
    __builtin_memcpy(step, t + j, bytes);
    group(up, down, step);
    __builtin_memcpy(p + j, up, bytes);
    __builtin_memcpy(q + j, down, bytes);
  }
}

}  // namespace LEANOPS_ISA
}  // namespace leanops
