// The CPU kernels of zo/1, compiled once per instruction set.
//
// Work goes by groups of G = 2W elements whose indices are a multiple of G, so that a group is whole Philox
// batches: a group cut by the beginning or the end of the run is done whole in a small buffer, with the same
// bits. Groups go by tiles: the tile's Rademacher signs and rounding bits are made ahead, and with several
// terms its accumulators stay in the first-level cache while the terms pass over it.
#include "formats.h"
#include "noise.h"
#include "zo.h"

namespace leanops {
namespace LEANOPS_ISA {
namespace {

using zo::Distribution;
using zo::DType;
using zo::Rounding;
using zo::Terms;

constexpr int64_t G = 2 * W;
constexpr int64_t kTile = 4096;  // elements
constexpr int64_t kSlack = 4 * kBatch;
constexpr int kUnroll = 2;  // groups whose Philox runs side by side

// Where the bits of one tile and one term come from.
struct Source {
  PhiloxPlan plan;                                      // of the Gaussian
  alignas(64) uint32_t signs[kTile / 32 + 4 + kSlack];  // of Rademacher: one bit an element
  alignas(64) uint16_t bits[kTile + 2 * kSlack];        // of stochastic rounding: 16 bits an element
  int64_t first;                                        // the tile's first group within signs
};

static inline uint32_t high32(uint64_t block) { return static_cast<uint32_t>(block >> 32); }

template <Distribution D>
void prepare_noise(Source& src, uint64_t seed, uint32_t tensor_id, uint64_t index, int64_t groups) {
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

void prepare_rounding(Source& src, uint64_t seed, uint32_t tensor_id, uint64_t index, int64_t groups) {
  const uint64_t block = index / 8;
  uint32_t words[kTile / 2 + kSlack];
  philox_words(philox_plan(seed, tensor_id, zo::kStreamRounding, high32(block)), block, groups * G / 8,
               words);
  __builtin_memcpy(src.bits, words, static_cast<size_t>(groups * G * 2));
}

// acc <- acc + c z for U groups, g their first within the tile.                              acc: [U][2][W]
template <Distribution D, bool Pairs, int U>
LEANOPS_INLINE void add_noise(F* acc, F c, const Source& src, uint64_t index, int64_t g) {
  if constexpr (D == Distribution::kGaussian) {
    I a[U], b[U];
    philox_batches<U>(src.plan, index / 4 + static_cast<uint64_t>(g * kBatch), a, b);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      F z0, z1;
      box_muller(a[u], b[u], z0, z1);
      if constexpr (!Pairs) interleave(z0, z1, z0, z1);
      acc[2 * u] = fma(c, z0, acc[2 * u]);
      acc[2 * u + 1] = fma(c, z1, acc[2 * u + 1]);
    }
  } else {
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {  // c (+1 or -1) is exact: the sum is the fma
      I s0, s1;
      if constexpr (Pairs) {
        signs_pairs(src.signs, src.first + g + u, s0, s1);
      } else {
        signs_natural(src.signs, src.first + g + u, s0, s1);
      }
      acc[2 * u] = add(acc[2 * u], flip_sign(c, s0));
      acc[2 * u + 1] = add(acc[2 * u + 1], flip_sign(c, s1));
    }
  }
}

template <class T, Distribution D, Rounding R, int U>
LEANOPS_INLINE void one_step(typename T::Scalar* out, const typename T::Scalar* in, int64_t g, F keep, F c,
                             const Source& src, uint64_t index) {
  F acc[2 * U];
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u) {
    T::load(in + (g + u) * G, acc[2 * u], acc[2 * u + 1]);
    acc[2 * u] = mul(acc[2 * u], keep);
    acc[2 * u + 1] = mul(acc[2 * u + 1], keep);
  }
  add_noise<D, T::kPairs, U>(acc, c, src, index, g);
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u) {
    T::template finish<R>(acc[2 * u], acc[2 * u + 1], src.bits + (g + u) * G);
    T::store(out + (g + u) * G, acc[2 * u], acc[2 * u + 1]);
  }
}

// One term: read, add, round, write.
template <class T, Distribution D, Rounding R>
void one_term(typename T::Scalar* out, const typename T::Scalar* in, int64_t groups, uint64_t index,
              const Terms& terms, uint32_t tensor_id) {
  Source src;
  prepare_noise<D>(src, terms.seeds[0], tensor_id, index, groups);
  if constexpr (R == Rounding::kStochastic) prepare_rounding(src, terms.seeds[0], tensor_id, index, groups);
  const F c = set_f(static_cast<float>(terms.coeffs[0]));
  const F keep = set_f(static_cast<float>(1.0 - terms.decays[0]));
  int64_t g = 0;
  for (; g + kUnroll <= groups; g += kUnroll) one_step<T, D, R, kUnroll>(out, in, g, keep, c, src, index);
  for (; g < groups; ++g) one_step<T, D, R, 1>(out, in, g, keep, c, src, index);
}

template <class T, Distribution D, Rounding R, bool Sequential, int U>
LEANOPS_INLINE void many_step(float* tile, int64_t g, F keep, F c, const Source& src, uint64_t index) {
  F acc[2 * U];
#pragma GCC unroll 8
  for (int v = 0; v < 2 * U; ++v) {
    acc[v] = load(tile + g * G + v * W);
    if constexpr (Sequential) acc[v] = mul(acc[v], keep);
  }
  add_noise<D, T::kPairs, U>(acc, c, src, index, g);
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u) {
    if constexpr (Sequential) {
      T::template finish<R>(acc[2 * u], acc[2 * u + 1], src.bits + (g + u) * G);
      T::settle(acc[2 * u], acc[2 * u + 1]);
    }
    store(tile + (g + u) * G, acc[2 * u]);
    store(tile + (g + u) * G + W, acc[2 * u + 1]);
  }
}

// Several terms over one tile of accumulators.
template <class T, Distribution D, Rounding R, bool Sequential>
void many_terms(typename T::Scalar* out, const typename T::Scalar* in, int64_t groups, uint64_t index,
                const Terms& terms, uint32_t tensor_id) {
  Source src;
  alignas(64) float tile[kTile];
  const float start = Sequential ? 1.0f : static_cast<float>(1.0 - terms.decays[0]);
  for (int64_t g = 0; g < groups; ++g) {
    F a, b;
    T::load(in + g * G, a, b);
    store(tile + g * G, mul(a, set_f(start)));
    store(tile + g * G + W, mul(b, set_f(start)));
  }
  for (int64_t k = 0; k < terms.count; ++k) {
    prepare_noise<D>(src, terms.seeds[k], tensor_id, index, groups);
    if constexpr (Sequential && R == Rounding::kStochastic) {
      prepare_rounding(src, terms.seeds[k], tensor_id, index, groups);
    }
    const F c = set_f(static_cast<float>(terms.coeffs[k]));
    const F keep = set_f(static_cast<float>(1.0 - terms.decays[terms.decay_count > 1 ? k : 0]));
    int64_t g = 0;
    for (; g + kUnroll <= groups; g += kUnroll) {
      many_step<T, D, R, Sequential, kUnroll>(tile, g, keep, c, src, index);
    }
    for (; g < groups; ++g) many_step<T, D, R, Sequential, 1>(tile, g, keep, c, src, index);
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

// z itself, rounded to nearest.
template <class T, Distribution D>
void noise_tile(typename T::Scalar* out, int64_t groups, uint64_t index, uint64_t seed, uint32_t tensor_id) {
  Source src;
  prepare_noise<D>(src, seed, tensor_id, index, groups);
  for (int64_t g = 0; g < groups; ++g) {
    F z0, z1;
    if constexpr (D == Distribution::kGaussian) {
      I a[1], b[1];
      philox_batches<1>(src.plan, index / 4 + static_cast<uint64_t>(g * kBatch), a, b);
      box_muller(a[0], b[0], z0, z1);
      if constexpr (!T::kPairs) interleave(z0, z1, z0, z1);
    } else {
      F unit[2] = {set_f(0.0f), set_f(0.0f)};
      add_noise<D, T::kPairs, 1>(unit, set_f(1.0f), src, index, g);
      z0 = unit[0];
      z1 = unit[1];
    }
    T::template finish<Rounding::kNearest>(z0, z1, nullptr);
    T::store(out + g * G, z0, z1);
  }
}

// Calls work(first element, whole groups of it, elements skipped in the first group, elements) for each tile
// of [0, n); tiles end at a multiple of kTile, so no tile spans two values of a block's high word.
template <class Work>
LEANOPS_INLINE void for_tiles(int64_t n, uint64_t index, const Work& work) {
  for (int64_t done = 0; done < n;) {
    const uint64_t at = index + static_cast<uint64_t>(done);
    const int64_t room = kTile - static_cast<int64_t>(at % kTile);
    const int64_t count = n - done < room ? n - done : room;
    work(done, at, count);
    done += count;
  }
}

// Runs body(out, in, groups, index) over [at, at + count) within one tile, cut groups through a buffer.
template <class S, class Body>
LEANOPS_INLINE void by_groups(S* out, const S* in, uint64_t at, int64_t count, const Body& body) {
  const auto cut = [&](int64_t skipped, int64_t n) {
    alignas(64) S buffer[G] = {};
    if (in) __builtin_memcpy(buffer + skipped, in, static_cast<size_t>(n) * sizeof(S));
    body(buffer, static_cast<const S*>(buffer), int64_t{1}, at - static_cast<uint64_t>(skipped));
    __builtin_memcpy(out, buffer + skipped, static_cast<size_t>(n) * sizeof(S));
    at += static_cast<uint64_t>(n);
    count -= n;
    out += n;
    if (in) in += n;
  };
  const int64_t skipped = static_cast<int64_t>(at % G);
  if (skipped) cut(skipped, count < G - skipped ? count : G - skipped);
  if (const int64_t groups = count / G) {
    body(out, in, groups, at);
    at += static_cast<uint64_t>(groups * G);
    count -= groups * G;
    out += groups * G;
    if (in) in += groups * G;
  }
  if (count) cut(0, count);
}

template <class T, Distribution D>
void noise_run(typename T::Scalar* out, int64_t n, uint64_t seed, uint32_t tensor_id, uint64_t index) {
  using S = typename T::Scalar;
  for_tiles(n, index, [&](int64_t done, uint64_t at, int64_t count) {
    by_groups<S>(out + done, nullptr, at, count, [&](S* o, const S*, int64_t groups, uint64_t first) {
      noise_tile<T, D>(o, groups, first, seed, tensor_id);
    });
  });
}

template <class T, Distribution D, Rounding R>
void axpy_run(typename T::Scalar* out, const typename T::Scalar* in, int64_t n, const Terms& terms,
              uint32_t tensor_id, uint64_t index) {
  using S = typename T::Scalar;
  const auto tile = terms.count == 1   ? one_term<T, D, R>
                    : terms.sequential ? many_terms<T, D, R, true>
                                       : many_terms<T, D, R, false>;
  for_tiles(n, index, [&](int64_t done, uint64_t at, int64_t count) {
    by_groups<S>(out + done, in + done, at, count, [&](S* o, const S* i, int64_t groups, uint64_t first) {
      tile(o, i, groups, first, terms, tensor_id);
    });
  });
}

// fp64 holds and adds the fp32 z; product and sum are rounded one after the other.
template <Distribution D>
void axpy_double(double* out, const double* in, int64_t n, const Terms& terms, uint32_t tensor_id,
                 uint64_t index) {
  for_tiles(n, index, [&](int64_t done, uint64_t at, int64_t count) {
    double acc[kTile];
    float z[kTile];
    for (int64_t j = 0; j < count; ++j) acc[j] = in[done + j];
    for (int64_t k = 0; k < terms.count; ++k) {
      noise_run<Float32, D>(z, count, terms.seeds[k], tensor_id, at);
      const double keep =
          terms.sequential || k == 0 ? 1.0 - terms.decays[terms.decay_count > 1 ? k : 0] : 1.0;
      const double c = terms.coeffs[k];
      for (int64_t j = 0; j < count; ++j) {
        const double step = c * static_cast<double>(z[j]);
        acc[j] = acc[j] * keep + step;
      }
    }
    for (int64_t j = 0; j < count; ++j) out[done + j] = acc[j];
  });
}

template <Distribution D>
void noise_by_dtype(void* out, DType dtype, int64_t n, uint64_t seed, uint32_t tensor_id, uint64_t index) {
  switch (dtype) {
    case DType::kFloat32:
      return noise_run<Float32, D>(static_cast<float*>(out), n, seed, tensor_id, index);
    case DType::kBFloat16:
      return noise_run<BFloat16, D>(static_cast<uint16_t*>(out), n, seed, tensor_id, index);
    case DType::kFloat16:
      return noise_run<Float16, D>(static_cast<uint16_t*>(out), n, seed, tensor_id, index);
    case DType::kFloat64: {
      double* wide = static_cast<double*>(out);
      for_tiles(n, index, [&](int64_t done, uint64_t at, int64_t count) {
        float z[kTile];
        noise_run<Float32, D>(z, count, seed, tensor_id, at);
        for (int64_t j = 0; j < count; ++j) wide[done + j] = static_cast<double>(z[j]);
      });
    }
  }
}

template <class T, Distribution D>
void axpy_by_rounding(void* out, const void* in, int64_t n, const Terms& terms, uint32_t tensor_id,
                      uint64_t index) {
  using S = typename T::Scalar;
  S* o = static_cast<S*>(out);
  const S* i = static_cast<const S*>(in);
  if constexpr (sizeof(S) == 2) {
    if (terms.rounding == Rounding::kStochastic && terms.count > 0) {  // no term, no seed to round with
      return axpy_run<T, D, Rounding::kStochastic>(o, i, n, terms, tensor_id, index);
    }
  }
  axpy_run<T, D, Rounding::kNearest>(o, i, n, terms, tensor_id, index);
}

template <Distribution D>
void axpy_by_dtype(void* out, const void* in, DType dtype, int64_t n, const Terms& terms, uint32_t tensor_id,
                   uint64_t index) {
  switch (dtype) {
    case DType::kFloat32:
      return axpy_by_rounding<Float32, D>(out, in, n, terms, tensor_id, index);
    case DType::kBFloat16:
      return axpy_by_rounding<BFloat16, D>(out, in, n, terms, tensor_id, index);
    case DType::kFloat16:
      return axpy_by_rounding<Float16, D>(out, in, n, terms, tensor_id, index);
    case DType::kFloat64:
      return axpy_double<D>(static_cast<double*>(out), static_cast<const double*>(in), n, terms, tensor_id,
                            index);
  }
}

template <class T>
void spread_run(void* plus, void* minus, const void* b, int64_t n, float scale) {
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

void spread(void* plus, void* minus, const void* b, DType dtype, int64_t n, double scale) {
  const float c = static_cast<float>(scale);
  switch (dtype) {
    case DType::kFloat32:
      return spread_run<Float32>(plus, minus, b, n, c);
    case DType::kBFloat16:
      return spread_run<BFloat16>(plus, minus, b, n, c);
    case DType::kFloat16:
      return spread_run<Float16>(plus, minus, b, n, c);
    case DType::kFloat64: {
      double* p = static_cast<double*>(plus);
      double* q = static_cast<double*>(minus);
      const double* t = static_cast<const double*>(b);
      for (int64_t j = 0; j < n; ++j) {
        const double a = p[j], step = scale * t[j];
        p[j] = a + step;
        q[j] = a - step;
      }
    }
  }
}

void noise(void* out, DType dtype, int64_t n, uint64_t seed, uint32_t tensor_id, uint64_t index,
           Distribution distribution) {
  if (distribution == Distribution::kGaussian) {
    noise_by_dtype<Distribution::kGaussian>(out, dtype, n, seed, tensor_id, index);
  } else {
    noise_by_dtype<Distribution::kRademacher>(out, dtype, n, seed, tensor_id, index);
  }
}

void axpy(void* out, const void* in, DType dtype, int64_t n, const Terms& terms, uint32_t tensor_id,
          uint64_t index) {
  if (terms.distribution == Distribution::kGaussian) {
    axpy_by_dtype<Distribution::kGaussian>(out, in, dtype, n, terms, tensor_id, index);
  } else {
    axpy_by_dtype<Distribution::kRademacher>(out, in, dtype, n, terms, tensor_id, index);
  }
}

}  // namespace
}  // namespace LEANOPS_ISA

namespace zo {
extern const Kernels LEANOPS_CAT(kKernels_, LEANOPS_ISA);
const Kernels LEANOPS_CAT(kKernels_, LEANOPS_ISA) = {LEANOPS_ISA::noise, LEANOPS_ISA::axpy,
                                                     LEANOPS_ISA::spread};
}  // namespace zo
}  // namespace leanops
