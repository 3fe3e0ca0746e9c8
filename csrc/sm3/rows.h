// The arithmetic of sm3/1 over rows of elements, in groups of G = 2W elements. A step waits for memory and not for
// arithmetic: only sqrt and div are slow, and those of one group overlap the loads of others.
#pragma once

#include <type_traits>

#include "../common/formats.h"
#include "blocks.h"

namespace leanops {
namespace LEANOPS_ISA {

using sm3::kBlock;
using sm3::Momentum;
using sm3::Next;
using sm3::Numbers;

constexpr int64_t G = 2 * W;

// Consecutive rows of a matrix in memory, with all their columns.
struct Rows {
  char* param;
  const char* grad;
  char* momentum;
  int64_t rows, columns;
  const float* row_cover;     // [rows]
  const float* column_cover;  // [columns]
  uint32_t* row_maxima;       // [rows], raised to the bits of the largest nu
  uint32_t* column_maxima;    // [columns], raised, too; if `set`, overwritten: it may then be column_cover
  bool set;
  const uint16_t* bits;  // [rows, columns], of stochastic rounding
  float* scales;         // of int8 momenta; each row consists of whole blocks
  Next next;
};

struct NoMomentum {
  using Scalar = char;
};
struct Codes {
  using Scalar = int8_t;
};
template <class M>
constexpr bool kHasMomentum = !std::is_same_v<M, NoMomentum>;
template <class M>
constexpr bool kIsInt8 = std::is_same_v<M, Codes>;
template <Rounding R>
constexpr bool kIsStochastic = R == Rounding::kStochastic;
template <class M>  // the type in which the new momentum is stored first
using NewMomentum = std::conditional_t<kIsInt8<M>, float, typename M::Scalar>;

// What all groups of a row use: numbers of the step, the row's accumulator and scale, and its maxima so far.
struct Row {
  F grad_factor, coupled_decay, beta, one_minus_beta, eps, momentum, one_minus_momentum, minus_lr,
      decay_factor;
  bool coupled, sums, averages_gradient, set;
  F cover, scale;
  I top_nu, top_m;  // bits of the largest nu; of the largest |m|, for int8
};

// The portable vectors are unrolled loops: a copy of these functions for each call would take minutes to compile.
#if LEANOPS_LEVEL == 0
#define LEANOPS_STAGE static __attribute__((noinline))
#else
#define LEANOPS_STAGE LEANOPS_INLINE
#endif

// A group passes through three stages: take_root, divide, move. The loop works on three groups at a time, one in each
// stage, so that no instruction waits for a sqrt or a div of the same iteration.
struct Root {
  F g0, g1, nu0, nu1, root0, root1;
};
struct Update {
  F u0, u1;
};

// The new momentum of a group, in place of x0 and x1, which are of u or of the gradient; stored, too.
template <class M>
LEANOPS_STAGE void average(Row& row, F& x0, F& x1, const typename M::Scalar* m, NewMomentum<M>* m_out) {
  F m0, m1;
  if constexpr (kIsInt8<M>) {
    m0 = mul(to_float(load_i8(m)), row.scale);
    m1 = mul(to_float(load_i8(m + W)), row.scale);
  } else {
    M::load(m, m0, m1);
  }
  x0 = m0 = fma(row.one_minus_momentum, x0, mul(row.momentum, m0));
  x1 = m1 = fma(row.one_minus_momentum, x1, mul(row.momentum, m1));
  if constexpr (kIsInt8<M>) {
    store(m_out, m0);
    store(m_out + W, m1);
    const I magnitude = set_i(0x7fffffffu);
    row.top_m = max_u(row.top_m, max_u(and_(bits(m0), magnitude), and_(bits(m1), magnitude)));
  } else {
    M::template finish<Rounding::kNearest>(m0, m1, nullptr);
    M::store(m_out, m0, m1);
  }
}

// nu and sqrt(nu + eps) of a group. `cover`: accumulators of the columns. Raises old_maxima to nu, into `maxima`.
template <class T, class M>
LEANOPS_STAGE Root take_root(Row& row, const typename T::Scalar* p, const typename T::Scalar* grad,
                             const typename M::Scalar* m, const float* cover, const uint32_t* old_maxima,
                             uint32_t* maxima, NewMomentum<M>* m_out) {
  Root x;
  T::load(grad, x.g0, x.g1);
  x.g0 = mul(x.g0, row.grad_factor);
  x.g1 = mul(x.g1, row.grad_factor);
  if (__builtin_expect(row.coupled, 0)) {
    F w0, w1;
    T::load(p, w0, w1);
    x.g0 = fma(row.coupled_decay, w0, x.g0);
    x.g1 = fma(row.coupled_decay, w1, x.g1);
  }
  const F c0 = minimum(row.cover, load(cover)), c1 = minimum(row.cover, load(cover + W));
  if (row.sums) {
    x.nu0 = fma(x.g0, x.g0, c0);
    x.nu1 = fma(x.g1, x.g1, c1);
  } else {
    x.nu0 = fma(row.one_minus_beta, mul(x.g0, x.g0), mul(row.beta, c0));
    x.nu1 = fma(row.one_minus_beta, mul(x.g1, x.g1), mul(row.beta, c1));
  }
  row.top_nu = max_u(row.top_nu, max_u(bits(x.nu0), bits(x.nu1)));
  if (row.set) {
    store_i(maxima, bits(x.nu0));
    store_i(maxima + W, bits(x.nu1));
  } else {
    store_i(maxima, max_u(load_i(old_maxima), bits(x.nu0)));
    store_i(maxima + W, max_u(load_i(old_maxima + W), bits(x.nu1)));
  }
  if constexpr (kHasMomentum<M>) {
    if (__builtin_expect(row.averages_gradient, 0)) average<M>(row, x.g0, x.g1, m, m_out);
  }
  x.root0 = sqrt(add(x.nu0, row.eps));
  x.root1 = sqrt(add(x.nu1, row.eps));
  return x;
}

// u of a group.
LEANOPS_STAGE Update divide(const Root& x) {
  return {if_zero(x.nu0, div(x.g0, x.root0)), if_zero(x.nu1, div(x.g1, x.root1))};
}

// The new momentum and the new parameter of a group.
template <class T, class M, Rounding R>
LEANOPS_STAGE void move(Row& row, Update x, const typename T::Scalar* p, const typename M::Scalar* m,
                        const uint16_t* random, typename T::Scalar* p_out, NewMomentum<M>* m_out) {
  if constexpr (kHasMomentum<M>) {
    if (__builtin_expect(!row.averages_gradient, 1)) average<M>(row, x.u0, x.u1, m, m_out);
  }
  F w0, w1;
  T::load(p, w0, w1);
  w0 = fma(row.minus_lr, x.u0, mul(w0, row.decay_factor));
  w1 = fma(row.minus_lr, x.u1, mul(w1, row.decay_factor));
  T::template finish<R>(w0, w1, random);
  T::store(p_out, w0, w1);
}

// p + n, or p itself, which is null, if the kernel does not use it.
template <bool Used, class S>
LEANOPS_INLINE S* offset_if(S* p, int64_t n) {
  return Used ? p + n : p;
}

// Elements to prefetch ahead. A hardware prefetcher stops at the edge of a page, and the processor itself cannot load
// far enough ahead of a sqrt and a div. fp32 on Zen 3, ns an element for 0, 384, 512, 768, 1024: .59 .50 .50 .47 .51.
constexpr int64_t kAhead = 768;

// Bytes from the address of a parameter, a gradient and a momentum to the one that is used kAhead elements later.
struct Ahead {
  uintptr_t p, g, m;
};
// `next`: the memory that is used after `end`; null if it follows directly.
LEANOPS_INLINE uintptr_t ahead_of(int64_t size, const void* end, const void* next) {
  const uintptr_t jump = reinterpret_cast<uintptr_t>(next) - reinterpret_cast<uintptr_t>(end);
  return static_cast<uintptr_t>(kAhead * size) + (end && next ? jump : 0);
}
LEANOPS_INLINE void prefetch(const void* p, uintptr_t ahead) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + ahead));
}

// Consecutive elements of one row. With int8 momenta they are one block.
template <class T, class M>
struct Stretch {
  typename T::Scalar* p;
  const typename T::Scalar* g;
  typename M::Scalar* m;
  const float* cover;
  uint32_t* maxima;
  const uint16_t* random;
  Ahead ahead;
  float* values;        // int8: the new momentum in fp32
  Encoding unfinished;  // int8: the block before this one; its codes are made between the groups of this one

  NewMomentum<M>* new_momentum() const {
    if constexpr (kIsInt8<M>) {
      return values;
    } else {
      return m;
    }
  }
  void advance(int64_t n) {
    p += n;
    g += n;
    if constexpr (kHasMomentum<M>) m += n;
    random = random ? random + n : random;
  }
};

// Bits of the largest nu, and, for int8, of the largest |m|.
struct Largest {
  uint32_t nu, m;
};

// n elements, in whole groups.
template <class T, class M, Rounding R>
LEANOPS_INLINE void groups(Row& row, const Stretch<T, M>& s, int64_t n) {
  const Encoding unfinished = s.unfinished;
  const auto first_stage = [&](int64_t j) LEANOPS_ALWAYS_INLINE {
    prefetch(s.p + j, s.ahead.p);
    prefetch(s.g + j, s.ahead.g);
    if constexpr (kHasMomentum<M>) prefetch(s.m + j, s.ahead.m);
    return take_root<T, M>(row, s.p + j, s.g + j, offset_if<kHasMomentum<M>>(s.m, j), s.cover + j,
                           s.maxima + j, s.maxima + j, offset_if<kHasMomentum<M>>(s.new_momentum(), j));
  };
  const auto third_stage = [&](const Update& update, int64_t j) LEANOPS_ALWAYS_INLINE {
    move<T, M, R>(row, update, s.p + j, offset_if<kHasMomentum<M>>(s.m, j),
                  offset_if<kIsStochastic<R>>(s.random, j), s.p + j,
                  offset_if<kHasMomentum<M>>(s.new_momentum(), j));
    if constexpr (kIsInt8<M>) encode(unfinished, j);
  };
  Root root = first_stage(0);
  Update update = divide(root);
  if (n > G) root = first_stage(G);
  for (int64_t j = 2 * G; j < n; j += G) {
    third_stage(update, j - 2 * G);
    update = divide(root);
    root = first_stage(j);
  }
  if (n > G) {
    third_stage(update, n - 2 * G);
    update = divide(root);
  }
  third_stage(update, n - G);
}

// A single group, whose results are in buffers of its own.
template <class T, class M, Rounding R>
struct Group {
  typename T::Scalar w[G];
  NewMomentum<M> m[G];
  uint32_t maxima[G];
  Largest largest;

  __attribute__((noinline)) void compute(Row row, const typename T::Scalar* p, const typename T::Scalar* g,
                                         const typename M::Scalar* old_m, const float* cover,
                                         const uint32_t* old_maxima, const uint16_t* random) {
    row.top_nu = row.top_m = set_i(0);
    const Root root = take_root<T, M>(row, p, g, old_m, cover, old_maxima, maxima, m);
    move<T, M, R>(row, divide(root), p, old_m, random, w, m);
    largest = {max_lane(row.top_nu), max_lane(row.top_m)};
  }
};

// Fewer elements than a group, in buffers that are filled up with zeros.
template <class T, class M, Rounding R>
static Largest part_of_group(const Row row, const Stretch<T, M> s, int64_t n) {
  typename T::Scalar w[G] = {}, g[G] = {};
  typename M::Scalar m[G] = {};
  float cover[G] = {};
  const uint32_t no_maxima[G] = {};
  uint16_t random[G] = {};
  const size_t count = static_cast<size_t>(n);
  __builtin_memcpy(w, s.p, count * sizeof w[0]);
  __builtin_memcpy(g, s.g, count * sizeof g[0]);
  if constexpr (kHasMomentum<M>) __builtin_memcpy(m, s.m, count * sizeof m[0]);
  __builtin_memcpy(cover, s.cover, count * sizeof cover[0]);
  if constexpr (kIsStochastic<R>) __builtin_memcpy(random, s.random, count * sizeof random[0]);
  Group<T, M, R> group;
  group.compute(row, w, g, m, cover, no_maxima, random);
  Largest largest = {0, 0};
  for (int64_t j = 0; j < n; ++j) {  // only the first n lanes are elements
    if (group.maxima[j] > largest.nu) largest.nu = group.maxima[j];
    s.maxima[j] = row.set || group.maxima[j] > s.maxima[j] ? group.maxima[j] : s.maxima[j];
    if constexpr (kIsInt8<M>) {
      const uint32_t magnitude = float_bits(group.m[j]) & 0x7fffffffu;
      if (magnitude > largest.m) largest.m = magnitude;
    }
  }
  __builtin_memcpy(s.p, group.w, count * sizeof w[0]);
  if constexpr (kHasMomentum<M>) __builtin_memcpy(s.new_momentum(), group.m, count * sizeof group.m[0]);
  return largest;
}

// Any number of elements. If they are no whole groups, the last group ends with the stretch and overlaps the group
// before it. It is computed first, because the other groups change what it reads, and stored last. Both groups compute
// the same bits for the elements that they share.
template <class T, class M, Rounding R>
LEANOPS_INLINE Largest whole_stretch(Row& row, const Stretch<T, M>& s, int64_t n) {
  if (n < G) return part_of_group<T, M, R>(row, s, n);
  const int64_t last = n - G;
  const bool overlaps = n % G != 0;
  Group<T, M, R> group;
  if (overlaps) {
    group.compute(row, s.p + last, s.g + last, offset_if<kHasMomentum<M>>(s.m, last), s.cover + last,
                  s.maxima + last, offset_if<kIsStochastic<R>>(s.random, last));
  }
  row.top_nu = row.top_m = set_i(0);
  groups<T, M, R>(row, s, n / G * G);
  Largest largest = {max_lane(row.top_nu), kIsInt8<M> ? max_lane(row.top_m) : 0};
  if (overlaps) {
    __builtin_memcpy(s.p + last, group.w, sizeof group.w);
    if constexpr (kHasMomentum<M>) __builtin_memcpy(s.new_momentum() + last, group.m, sizeof group.m);
    __builtin_memcpy(s.maxima + last, group.maxima, sizeof group.maxima);
    if (group.largest.nu > largest.nu) largest.nu = group.largest.nu;
    if (group.largest.m > largest.m) largest.m = group.largest.m;
  }
  return largest;
}

template <class T, class M, Rounding R>
static void run(const Numbers& numbers, const Rows& rows) {
  const Rows a = rows;  // a copy: the compiler knows that no store changes it
  Row row = {set_f(numbers.grad_factor),
             set_f(numbers.coupled_decay),
             set_f(numbers.beta),
             set_f(numbers.one_minus_beta),
             set_f(numbers.eps),
             set_f(numbers.momentum),
             set_f(numbers.one_minus_momentum),
             set_f(numbers.minus_lr),
             set_f(numbers.decay_factor),
             numbers.coupled,
             numbers.sums,
             numbers.averages_gradient,
             a.set,
             set_f(0.0f),
             set_f(0.0f),
             set_i(0),
             set_i(0)};
  Stretch<T, M> s;
  s.p = reinterpret_cast<typename T::Scalar*>(a.param);
  s.g = reinterpret_cast<const typename T::Scalar*>(a.grad);
  s.m = reinterpret_cast<typename M::Scalar*>(a.momentum);
  s.cover = a.column_cover;
  s.maxima = a.column_maxima;
  s.random = a.bits;
  const auto ahead = [&](bool jumps) {  // to the memory of the next tile
    const int64_t left = jumps ? a.rows * a.columns : 0;
    const Next next = jumps ? a.next : Next();
    return Ahead{ahead_of(sizeof *s.p, s.p + left, next.param), ahead_of(sizeof *s.g, s.g + left, next.grad),
                 ahead_of(sizeof *s.m, offset_if<kHasMomentum<M>>(s.m, left), next.momentum)};
  };
  const Ahead beyond = ahead(true);
  const int64_t last_rows =
      a.rows - kAhead / a.columns;  // the row from which kAhead goes beyond the last row
  s.ahead = ahead(false);
  if constexpr (!kIsInt8<M>) {
    for (int64_t r = 0; r < a.rows; ++r) {
      if (r >= last_rows) s.ahead = beyond;
      row.cover = set_f(a.row_cover[r]);
      const uint32_t top = whole_stretch<T, M, R>(row, s, a.columns).nu;
      if (top > a.row_maxima[r]) a.row_maxima[r] = top;
      s.advance(a.columns);
    }
  } else {
    constexpr int64_t kRoom = kBlock + kPair;  // encode writes up to kPair - 1 beyond a block
    alignas(64) float values[2][kRoom];
    alignas(64) int8_t codes[2][kRoom];
    int8_t* target = nullptr;  // the memory of the codes of the block before
    int64_t length = 0;        // its codes
    int turn = 0;              // the buffers of this block
    float* scale = a.scales;
    const auto finish =
        [&](int64_t made) {  // makes the codes of the block before from `made` on, and stores all
          for (int64_t j = made; j < s.unfinished.n; j += kPair) encode(s.unfinished, j);
          if (length) __builtin_memcpy(target, codes[1 - turn], static_cast<size_t>(length));
        };
    for (int64_t r = 0; r < a.rows; ++r) {
      if (r >= last_rows) s.ahead = beyond;
      row.cover = set_f(a.row_cover[r]);
      for (int64_t column = 0; column < a.columns; column += kBlock) {
        const int64_t n = a.columns - column < kBlock ? a.columns - column : kBlock;
        row.scale = set_f(*scale);
        s.cover = a.column_cover + column;
        s.maxima = a.column_maxima + column;
        s.values = values[turn];
        const Largest largest = whole_stretch<T, M, R>(row, s, n);
        if (largest.nu > a.row_maxima[r]) a.row_maxima[r] = largest.nu;
        finish(n / G * G);
        s.unfinished = encoding_of(values[turn], largest.m, codes[turn], scale++, n);
        target = s.m;
        length = n;
        turn = 1 - turn;
        s.advance(n);
      }
    }
    finish(0);
  }
}

}  // namespace LEANOPS_ISA
}  // namespace leanops
