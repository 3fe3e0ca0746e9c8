// The arithmetic of sm3/1 over rows of elements, in groups of G = 2W. Memory, not arithmetic, is what a step
// waits for: of the instructions only sqrt and div are slow, and those of one group overlap the loads of others.
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

// Rows that lie one after another, all of their columns.
struct Rows {
  char* param;
  const char* grad;
  char* momentum;
  int64_t rows, columns;
  const float* row_least;     // [rows]
  const float* column_least;  // [columns]
  uint32_t* row_most;         // [rows], raised
  uint32_t* column_most;      // [columns], raised; or set, and then it may be column_least
  bool set;
  const uint16_t* bits;  // of stochastic rounding, one an element
  float* scales;         // of int8 momenta in whole blocks, the first of which begins with the rows
  Next next;
};

struct NoMomentum {
  using Scalar = char;
};
struct Codes {
  using Scalar = int8_t;
};
template <class M>
constexpr bool kMoves = !std::is_same_v<M, NoMomentum>;
template <class M>
constexpr bool kCoded = std::is_same_v<M, Codes>;
template <Rounding R>
constexpr bool kRandom = R == Rounding::kStochastic;
template <class M>  // what the new momentum is first written as
using Moved = std::conditional_t<kCoded<M>, float, typename M::Scalar>;

// What the groups of one row have in common.
struct Row {
  F gain, decay, beta, fresh, eps, kept, share, rate, shrink;
  bool coupled, sums, set;
  F least, scale;
  I most, largest;
};

// The portable vectors are loops, unrolled: a copy for each call would take minutes to compile.
#if LEANOPS_LEVEL == 0
#define LEANOPS_STAGE static __attribute__((noinline))
#else
#define LEANOPS_STAGE LEANOPS_INLINE
#endif

// A group passes through three stages. A loop has three groups under way, one in each, so that none of its
// instructions waits for the sqrt or the div of the same pass.
struct Root {
  F g0, g1, nu0, nu1, root0, root1;
};
struct Update {
  F u0, u1;
};

template <class T>
LEANOPS_STAGE Root take_root(Row& row, const typename T::Scalar* p, const typename T::Scalar* grad,
                             const float* least, const uint32_t* was, uint32_t* most) {
  Root x;
  T::load(grad, x.g0, x.g1);
  x.g0 = mul(x.g0, row.gain);
  x.g1 = mul(x.g1, row.gain);
  if (__builtin_expect(row.coupled, 0)) {
    F w0, w1;
    T::load(p, w0, w1);
    x.g0 = fma(row.decay, w0, x.g0);
    x.g1 = fma(row.decay, w1, x.g1);
  }
  const F c0 = minimum(row.least, load(least)), c1 = minimum(row.least, load(least + W));
  if (row.sums) {
    x.nu0 = fma(x.g0, x.g0, c0);
    x.nu1 = fma(x.g1, x.g1, c1);
  } else {
    x.nu0 = fma(row.fresh, mul(x.g0, x.g0), mul(row.beta, c0));
    x.nu1 = fma(row.fresh, mul(x.g1, x.g1), mul(row.beta, c1));
  }
  row.most = max_u(row.most, max_u(bits(x.nu0), bits(x.nu1)));
  if (row.set) {
    store_i(most, bits(x.nu0));
    store_i(most + W, bits(x.nu1));
  } else {
    store_i(most, max_u(load_i(was), bits(x.nu0)));
    store_i(most + W, max_u(load_i(was + W), bits(x.nu1)));
  }
  x.root0 = sqrt(add(x.nu0, row.eps));
  x.root1 = sqrt(add(x.nu1, row.eps));
  return x;
}

LEANOPS_STAGE Update divide(const Root& x) {
  return {if_zero(x.nu0, div(x.g0, x.root0)), if_zero(x.nu1, div(x.g1, x.root1))};
}

template <class T, class M, Rounding R>
LEANOPS_STAGE void move(Row& row, Update x, const typename T::Scalar* p, const typename M::Scalar* m,
                        const uint16_t* random, typename T::Scalar* p_out, Moved<M>* m_out) {
  if constexpr (kMoves<M>) {
    F m0, m1;
    if constexpr (kCoded<M>) {
      m0 = mul(to_float(load_i8(m)), row.scale);
      m1 = mul(to_float(load_i8(m + W)), row.scale);
    } else {
      M::load(m, m0, m1);
    }
    x.u0 = m0 = fma(row.share, x.u0, mul(row.kept, m0));
    x.u1 = m1 = fma(row.share, x.u1, mul(row.kept, m1));
    if constexpr (kCoded<M>) {
      store(m_out, m0);
      store(m_out + W, m1);
      const I magnitude = set_i(0x7fffffffu);
      row.largest = max_u(row.largest, max_u(and_(bits(m0), magnitude), and_(bits(m1), magnitude)));
    } else {
      M::template finish<Rounding::kNearest>(m0, m1, nullptr);
      M::store(m_out, m0, m1);
    }
  }
  F w0, w1;
  T::load(p, w0, w1);
  w0 = fma(row.rate, x.u0, mul(w0, row.shrink));
  w1 = fma(row.rate, x.u1, mul(w1, row.shrink));
  T::template finish<R>(w0, w1, random);
  T::store(p_out, w0, w1);
}

// A pointer that is null where the kernel has no use for it.
template <bool Used, class S>
LEANOPS_INLINE S* plus(S* p, int64_t n) {
  return Used ? p + n : p;
}

// A hardware prefetcher stops at the edge of a page, where an iteration that waits for sqrt and div cannot run far
// enough ahead. fp32 on Zen 3, ns an element for 0, 384, 512, 768, 1024 elements: .59 .50 .50 .47 .51.
constexpr int64_t kAhead = 768;

// What to add to the address of a weight, a gradient and a momentum to fetch what comes kAhead elements later.
struct Ahead {
  uintptr_t p, g, m;
};
// `next` is what follows the end.
LEANOPS_INLINE uintptr_t ahead_of(int64_t size, const void* end, const void* next) {
  const uintptr_t jump = reinterpret_cast<uintptr_t>(next) - reinterpret_cast<uintptr_t>(end);
  return static_cast<uintptr_t>(kAhead * size) + (end && next ? jump : 0);
}
LEANOPS_INLINE void prefetch(const void* p, uintptr_t ahead) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + ahead));
}

// Elements of one row, within a block where there are blocks.
template <class T, class M>
struct Stretch {
  typename T::Scalar* p;
  const typename T::Scalar* g;
  typename M::Scalar* m;
  const float* least;
  uint32_t* most;
  const uint16_t* random;
  Ahead ahead;
  float* values;    // of int8: where the new momentum goes first,
  Encoding before;  // and the block before this one, whose codes are made meanwhile

  Moved<M>* moved() const {
    if constexpr (kCoded<M>) {
      return values;
    } else {
      return m;
    }
  }
  void advance(int64_t n) {
    p += n;
    g += n;
    if constexpr (kMoves<M>) m += n;
    random = random ? random + n : random;
  }
};

struct Largest {
  uint32_t nu, m;  // bits; of m those of the magnitude, where it is int8
};

// Whole groups.
template <class T, class M, Rounding R>
LEANOPS_INLINE void groups(Row& row, const Stretch<T, M>& s, int64_t n) {
  const Encoding before = s.before;
  const auto first = [&](int64_t j) LEANOPS_ALWAYS_INLINE {
    prefetch(s.p + j, s.ahead.p);
    prefetch(s.g + j, s.ahead.g);
    if constexpr (kMoves<M>) prefetch(s.m + j, s.ahead.m);
    return take_root<T>(row, s.p + j, s.g + j, s.least + j, s.most + j, s.most + j);
  };
  const auto third = [&](const Update& update, int64_t j) LEANOPS_ALWAYS_INLINE {
    move<T, M, R>(row, update, s.p + j, plus<kMoves<M>>(s.m, j), plus<kRandom<R>>(s.random, j), s.p + j,
                  plus<kMoves<M>>(s.moved(), j));
    if constexpr (kCoded<M>) encode(before, j);
  };
  Root root = first(0);
  Update update = divide(root);
  if (n > G) root = first(G);
  for (int64_t j = 2 * G; j < n; j += G) {
    third(update, j - 2 * G);
    update = divide(root);
    root = first(j);
  }
  if (n > G) {
    third(update, n - 2 * G);
    update = divide(root);
  }
  third(update, n - G);
}

// A group by itself, its results not yet where they belong.
template <class T, class M, Rounding R>
struct Group {
  typename T::Scalar w[G];
  Moved<M> m[G];
  uint32_t most[G];
  Largest largest;

  __attribute__((noinline)) void take(Row row, const typename T::Scalar* p, const typename T::Scalar* g,
                                      const typename M::Scalar* from, const float* least, const uint32_t* was,
                                      const uint16_t* random) {
    row.most = row.largest = set_i(0);
    const Root root = take_root<T>(row, p, g, least, was, most);
    move<T, M, R>(row, divide(root), p, from, random, w, m);
    largest = {max_lane(row.most), max_lane(row.largest)};
  }
};

// Less than a group, from buffers.
template <class T, class M, Rounding R>
static Largest part_of_group(const Row row, const Stretch<T, M> s, int64_t n) {
  typename T::Scalar w[G] = {}, g[G] = {};
  typename M::Scalar m[G] = {};
  float least[G] = {};
  const uint32_t none[G] = {};
  uint16_t random[G] = {};
  const size_t count = static_cast<size_t>(n);
  __builtin_memcpy(w, s.p, count * sizeof w[0]);
  __builtin_memcpy(g, s.g, count * sizeof g[0]);
  if constexpr (kMoves<M>) __builtin_memcpy(m, s.m, count * sizeof m[0]);
  __builtin_memcpy(least, s.least, count * sizeof least[0]);
  if constexpr (kRandom<R>) __builtin_memcpy(random, s.random, count * sizeof random[0]);
  Group<T, M, R> group;
  group.take(row, w, g, m, least, none, random);
  Largest largest = {0, 0};
  for (int64_t j = 0; j < n; ++j) {  // the lanes beyond n must not reach the maxima
    if (group.most[j] > largest.nu) largest.nu = group.most[j];
    s.most[j] = row.set || group.most[j] > s.most[j] ? group.most[j] : s.most[j];
    if constexpr (kCoded<M>) {
      const uint32_t size = float_bits(group.m[j]) & 0x7fffffffu;
      if (size > largest.m) largest.m = size;
    }
  }
  __builtin_memcpy(s.p, group.w, count * sizeof w[0]);
  if constexpr (kMoves<M>) __builtin_memcpy(s.moved(), group.m, count * sizeof group.m[0]);
  return largest;
}

// Any number of elements. What is left beyond whole groups is done in a group that ends with the stretch. It
// overlaps the one before, so it is worked out first, from what both have to read, and written last: the same
// bits again.
template <class T, class M, Rounding R>
LEANOPS_INLINE Largest whole_stretch(Row& row, const Stretch<T, M>& s, int64_t n) {
  if (n < G) return part_of_group<T, M, R>(row, s, n);
  const int64_t last = n - G;
  const bool cut = n % G != 0;
  Group<T, M, R> group;
  if (cut) {
    group.take(row, s.p + last, s.g + last, plus<kMoves<M>>(s.m, last), s.least + last, s.most + last,
               plus<kRandom<R>>(s.random, last));
  }
  row.most = row.largest = set_i(0);
  groups<T, M, R>(row, s, n / G * G);
  Largest largest = {max_lane(row.most), kCoded<M> ? max_lane(row.largest) : 0};
  if (cut) {
    __builtin_memcpy(s.p + last, group.w, sizeof group.w);
    if constexpr (kMoves<M>) __builtin_memcpy(s.moved() + last, group.m, sizeof group.m);
    __builtin_memcpy(s.most + last, group.most, sizeof group.most);
    if (group.largest.nu > largest.nu) largest.nu = group.largest.nu;
    if (group.largest.m > largest.m) largest.m = group.largest.m;
  }
  return largest;
}

template <class T, class M, Rounding R>
static void run(const Numbers& numbers, const Rows& given) {
  const Rows a = given;  // which no store can change
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
             a.set,
             set_f(0.0f),
             set_f(0.0f),
             set_i(0),
             set_i(0)};
  Stretch<T, M> s;
  s.p = reinterpret_cast<typename T::Scalar*>(a.param);
  s.g = reinterpret_cast<const typename T::Scalar*>(a.grad);
  s.m = reinterpret_cast<typename M::Scalar*>(a.momentum);
  s.least = a.column_least;
  s.most = a.column_most;
  s.random = a.bits;
  const auto ahead = [&](bool jumps) {
    const int64_t left = jumps ? a.rows * a.columns : 0;
    const Next next = jumps ? a.next : Next();
    return Ahead{ahead_of(sizeof *s.p, s.p + left, next.param), ahead_of(sizeof *s.g, s.g + left, next.grad),
                 ahead_of(sizeof *s.m, plus<kMoves<M>>(s.m, left), next.momentum)};
  };
  const Ahead later = ahead(true);
  const int64_t jump = a.rows - kAhead / a.columns;  // the row from which kAhead goes beyond the last
  s.ahead = ahead(false);
  if constexpr (!kCoded<M>) {
    for (int64_t r = 0; r < a.rows; ++r) {
      if (r >= jump) s.ahead = later;
      row.least = set_f(a.row_least[r]);
      const uint32_t top = whole_stretch<T, M, R>(row, s, a.columns).nu;
      if (top > a.row_most[r]) a.row_most[r] = top;
      s.advance(a.columns);
    }
  } else {
    constexpr int64_t kRoom = kBlock + kPair;
    alignas(64) float values[2][kRoom];
    alignas(64) int8_t codes[2][kRoom];
    int8_t* target = nullptr;  // of the codes of the block before, as many as
    int64_t length = 0;
    int turn = 0;
    float* scale = a.scales;
    const auto finish = [&](int64_t made) {
      for (int64_t j = made; j < s.before.n; j += kPair) encode(s.before, j);
      if (length) __builtin_memcpy(target, codes[1 - turn], static_cast<size_t>(length));
    };
    for (int64_t r = 0; r < a.rows; ++r) {
      if (r >= jump) s.ahead = later;
      row.least = set_f(a.row_least[r]);
      for (int64_t from = 0; from < a.columns; from += kBlock) {
        const int64_t n = a.columns - from < kBlock ? a.columns - from : kBlock;
        row.scale = set_f(*scale);
        s.least = a.column_least + from;
        s.most = a.column_most + from;
        s.values = values[turn];
        const Largest largest = whole_stretch<T, M, R>(row, s, n);
        if (largest.nu > a.row_most[r]) a.row_most[r] = largest.nu;
        finish(n / G * G);
        s.before = encoding_of(values[turn], largest.m, codes[turn], scale++, n);
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
