// The arithmetic of sm3/1 over rows of elements, in groups of G = 2W. Memory, not arithmetic, is what a step
// waits for: of the instructions only sqrt and div are slow, and those of one group overlap the loads of
// others.
#pragma once

#include <type_traits>

#include "../common/formats.h"
#include "sm3.h"

namespace leanops {
namespace LEANOPS_ISA {

using sm3::Momentum;
using sm3::Numbers;

constexpr int64_t G = 2 * W;

// Rows that lie one after another, all of their columns.
struct Rows {
  char* param;
  const char* grad;
  char* momentum;
  int64_t rows, columns;
  const float* row_least;      // [rows]
  const float* column_least;   // [columns]
  uint32_t* row_most;          // [rows]
  const uint32_t* column_was;  // the largest of each column before and after the first row;     [columns]
  uint32_t* column_most;       // they may be the same memory, also with column_least
  const uint16_t* bits;        // of stochastic rounding, one an element
};

struct NoMomentum {
  using Scalar = char;
};
template <class M>
constexpr bool kMoves = !std::is_same_v<M, NoMomentum>;

// What the groups of one row have in common.
struct Row {
  F gain, decay, beta, fresh, eps, kept, share, rate, shrink;
  bool coupled, sums;
  F least;
  I most;
};

// A group's results, held back until all of its row has been read.
template <class S, class MS>
struct Held {
  S w[G];
  MS m[G];
  uint32_t most[G];
};

// The portable vectors are loops, unrolled: a copy for each call of group would take minutes to compile.
#if LEANOPS_LEVEL == 0
#define LEANOPS_GROUP static __attribute__((noinline))
#else
#define LEANOPS_GROUP LEANOPS_INLINE
#endif

template <class T, class M, Rounding R>
LEANOPS_GROUP void group(Row& row, const typename T::Scalar* p, const typename T::Scalar* grad,
                         const typename M::Scalar* m, const float* least, const uint32_t* was,
                         const uint16_t* random, typename T::Scalar* p_out, typename M::Scalar* m_out,
                         uint32_t* most) {
  F g0, g1, w0, w1;
  T::load(grad, g0, g1);
  T::load(p, w0, w1);
  g0 = mul(g0, row.gain);
  g1 = mul(g1, row.gain);
  if (__builtin_expect(row.coupled, 0)) {
    g0 = fma(row.decay, w0, g0);
    g1 = fma(row.decay, w1, g1);
  }
  F nu0 = minimum(row.least, load(least)), nu1 = minimum(row.least, load(least + W));
  if (row.sums) {
    nu0 = fma(g0, g0, nu0);
    nu1 = fma(g1, g1, nu1);
  } else {
    nu0 = fma(row.fresh, mul(g0, g0), mul(row.beta, nu0));
    nu1 = fma(row.fresh, mul(g1, g1), mul(row.beta, nu1));
  }
  row.most = max_u(row.most, max_u(bits(nu0), bits(nu1)));
  store_i(most, max_u(load_i(was), bits(nu0)));
  store_i(most + W, max_u(load_i(was + W), bits(nu1)));
  F u0 = if_zero(nu0, div(g0, sqrt(add(nu0, row.eps))));
  F u1 = if_zero(nu1, div(g1, sqrt(add(nu1, row.eps))));
  if constexpr (kMoves<M>) {
    F m0, m1;
    M::load(m, m0, m1);
    u0 = m0 = fma(row.share, u0, mul(row.kept, m0));
    u1 = m1 = fma(row.share, u1, mul(row.kept, m1));
    M::template finish<Rounding::kNearest>(m0, m1, nullptr);
    M::store(m_out, m0, m1);
  }
  w0 = fma(row.rate, u0, mul(w0, row.shrink));
  w1 = fma(row.rate, u1, mul(w1, row.shrink));
  T::template finish<R>(w0, w1, random);
  T::store(p_out, w0, w1);
}

// A pointer that is null where the kernel has no use for it.
template <bool Used, class S>
LEANOPS_INLINE S* plus(S* p, int64_t n) {
  return Used ? p + n : p;
}

template <class T, class M, Rounding R>
static void run(const Numbers& numbers, const Rows& a) {
  using S = typename T::Scalar;
  using MS = typename M::Scalar;
  constexpr bool kRandom = R == Rounding::kStochastic;
  Row row = {set_f(numbers.gain),
             set_f(numbers.decay),
             set_f(numbers.beta),
             set_f(numbers.fresh),
             set_f(numbers.eps),
             set_f(numbers.kept),
             set_f(numbers.share),
             set_f(numbers.rate),
             set_f(numbers.shrink),
             numbers.coupled,
             numbers.sums,
             set_f(0.0f),
             set_i(0)};
  const int64_t n = a.columns, whole = n / G * G, last = n - G;
  const float* least = a.column_least;
  uint32_t* most = a.column_most;
  S* p = reinterpret_cast<S*>(a.param);
  const S* g = reinterpret_cast<const S*>(a.grad);
  MS* m = reinterpret_cast<MS*>(a.momentum);
  const uint16_t* random = a.bits;
  const uint32_t* was = a.column_was;
  for (int64_t r = 0; r < a.rows; ++r) {
    row.least = set_f(a.row_least[r]);
    row.most = set_i(0);
    // What is left of a row beyond whole groups is done in a group that ends with the row. It overlaps the
    // one before it, so it is worked out first, from what both have to read, and written last: the same bits
    // again.
    Held<S, MS> held;
    if (whole < n && last >= 0) {
      group<T, M, R>(row, p + last, g + last, plus<kMoves<M>>(m, last), least + last, was + last,
                     plus<kRandom>(random, last), held.w, held.m, held.most);
    }
    for (int64_t j = 0; j < whole; j += G) {
      MS* m_j = plus<kMoves<M>>(m, j);
      group<T, M, R>(row, p + j, g + j, m_j, least + j, was + j, plus<kRandom>(random, j), p + j, m_j,
                     most + j);
    }
    uint32_t top = max_lane(row.most);
    if (whole < n) {
      if (last >= 0) {
        __builtin_memcpy(p + last, held.w, sizeof held.w);
        if constexpr (kMoves<M>) __builtin_memcpy(m + last, held.m, sizeof held.m);
        __builtin_memcpy(most + last, held.most, sizeof held.most);
      } else {
        S w[G] = {}, grad[G] = {};
        MS moment[G] = {};
        float of_columns[G] = {};
        const uint32_t none[G] = {};
        uint16_t some[G] = {};
        const size_t count = static_cast<size_t>(n);
        __builtin_memcpy(w, p, count * sizeof(S));
        __builtin_memcpy(grad, g, count * sizeof(S));
        if constexpr (kMoves<M>) __builtin_memcpy(moment, m, count * sizeof(MS));
        __builtin_memcpy(of_columns, least, count * sizeof(float));
        if constexpr (kRandom) __builtin_memcpy(some, random, count * sizeof(uint16_t));
        group<T, M, R>(row, w, grad, moment, of_columns, none, some, w, moment, held.most);
        __builtin_memcpy(p, w, count * sizeof(S));
        if constexpr (kMoves<M>) __builtin_memcpy(m, moment, count * sizeof(MS));
        for (int64_t j = 0; j < n; ++j) {
          most[j] = held.most[j] > was[j] ? held.most[j] : was[j];
          if (held.most[j] > top) top = held.most[j];
        }
      }
    }
    if (top > a.row_most[r]) a.row_most[r] = top;
    p += n;
    g += n;
    m = plus<kMoves<M>>(m, n);
    random = plus<kRandom>(random, n);
    was = most;
  }
}

}  // namespace LEANOPS_ISA
}  // namespace leanops
