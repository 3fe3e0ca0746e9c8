// The CPU kernels of zo/1, compiled once for each instruction set. They cut runs of elements into tiles and groups. If a
// run has only a part of a group, the whole group is computed in a small buffer, with the same bits.
#include "tiles.h"

namespace leanops {
namespace LEANOPS_ISA {
namespace {

// Calls work(first, index of element `first`, count) for each tile of [0, n). Tiles end where the index is a multiple
// of kTile, so the Philox blocks of a tile have the same high word.
template <class Work>
LEANOPS_INLINE void for_tiles(int64_t n, uint64_t index, const Work& work) {
  for (int64_t done = 0; done < n;) {
    const uint64_t tile_index = index + static_cast<uint64_t>(done);
    const int64_t room = kTile - static_cast<int64_t>(tile_index % kTile);
    const int64_t count = n - done < room ? n - done : room;
    work(done, tile_index, count);
    done += count;
  }
}

// Calls body(out, second_out, in, groups, index) for parts of [0, n) in whole groups. second_out and in may be null.
template <class S, class Body>
LEANOPS_INLINE void for_whole_groups(S* out, S* second_out, const S* in, int64_t n, uint64_t index,
                                     const Body& body) {
  for_tiles(n, index, [&](int64_t done, uint64_t tile_index, int64_t count) {
    const auto part_of_group = [&](int64_t first, int64_t skipped, int64_t elements) {
      alignas(64) S buffer[G] = {}, second[G];
      const size_t bytes = static_cast<size_t>(elements) * sizeof(S);
      if (in) __builtin_memcpy(buffer + skipped, in + first, bytes);
      body(buffer, second, static_cast<const S*>(buffer), int64_t{1},
           index + static_cast<uint64_t>(first - skipped));
      __builtin_memcpy(out + first, buffer + skipped, bytes);
      if (second_out) __builtin_memcpy(second_out + first, second + skipped, bytes);
    };
    const int64_t skipped = static_cast<int64_t>(tile_index % G);
    int64_t head = skipped ? G - skipped : 0;
    if (head > count) head = count;
    const int64_t groups = (count - head) / G, middle = done + head;
    const int64_t tail = count - head - groups * G;
    if (head) part_of_group(done, skipped, head);
    if (groups) {
      body(out + middle, second_out ? second_out + middle : nullptr, in ? in + middle : nullptr, groups,
           index + static_cast<uint64_t>(middle));
    }
    if (tail) part_of_group(middle + groups * G, 0, tail);
  });
}

template <class T, Distribution D>
void noise_run(typename T::Scalar* out, int64_t n, uint64_t seed, uint32_t tensor_id, uint64_t index) {
  using S = typename T::Scalar;
  for_whole_groups<S>(out, nullptr, nullptr, n, index,
                      [&](S* o, S*, const S*, int64_t groups, uint64_t first) {
                        noise_tile<T, D>(o, groups, first, seed, tensor_id);
                      });
}

template <class T, Distribution D, Rounding R>
void axpy_run(typename T::Scalar* out, const typename T::Scalar* in, int64_t n, const Terms& terms,
              uint32_t tensor_id, uint64_t index, Factors* factors) {
  using S = typename T::Scalar;
  const auto tile = terms.count == 1   ? one_term<T, D, R>
                    : terms.sequential ? many_terms<T, D, R, true>
                                       : many_terms<T, D, R, false>;
  for_whole_groups<S>(out, nullptr, in, n, index, [&](S* o, S*, const S* i, int64_t groups, uint64_t first) {
    tile(o, i, groups, first, terms, tensor_id, factors);
  });
}

template <class T, Distribution D>
void both_run(void* plus, void* minus, const void* in, int64_t n, uint64_t seed, double coeff,
              uint32_t tensor_id, uint64_t index) {
  using S = typename T::Scalar;
  for_whole_groups<S>(static_cast<S*>(plus), static_cast<S*>(minus), static_cast<const S*>(in), n, index,
                      [&](S* p, S* q, const S* i, int64_t groups, uint64_t first) {
                        both_tile<T, D>(p, q, i, groups, first, seed, static_cast<float>(coeff), tensor_id);
                      });
}

// In fp64, with the z of fp32. Product and sum are rounded separately.
template <Distribution D>
void axpy_double(double* out, const double* in, int64_t n, const Terms& terms, uint32_t tensor_id,
                 uint64_t index, Factors* factors) {
  for_tiles(n, index, [&](int64_t done, uint64_t tile_index, int64_t count) {
    double acc[kTile];
    float z[kTile + W];
    const double start = terms.sequential ? 1.0 : 1.0 - terms.decays[0];
    for (int64_t j = 0; j < count; ++j) acc[j] = in[done + j] * start;
    for (int64_t k = 0; k < terms.count; ++k) {
      if constexpr (D == Distribution::kLowRank) {
        factors->fill(z, terms.seeds[k], terms.right_seeds[k], tensor_id, tile_index, count);
      } else {
        noise_run<Float32, D>(z, count, terms.seeds[k], tensor_id, tile_index);
      }
      const double keep = terms.sequential ? 1.0 - terms.decays[terms.decay_count > 1 ? k : 0] : 1.0;
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
      for_tiles(n, index, [&](int64_t done, uint64_t tile_index, int64_t count) {
        float z[kTile];
        noise_run<Float32, D>(z, count, seed, tensor_id, tile_index);
        for (int64_t j = 0; j < count; ++j) wide[done + j] = static_cast<double>(z[j]);
      });
    }
  }
}

template <class T, Distribution D>
void axpy_by_rounding(void* out, const void* in, int64_t n, const Terms& terms, uint32_t tensor_id,
                      uint64_t index, Factors* factors) {
  using S = typename T::Scalar;
  S* o = static_cast<S*>(out);
  const S* i = static_cast<const S*>(in);
  if constexpr (sizeof(S) == 2) {
    if (terms.rounding == Rounding::kStochastic && terms.count > 0) {  // without a term there is no seed
      return axpy_run<T, D, Rounding::kStochastic>(o, i, n, terms, tensor_id, index, factors);
    }
  }
  axpy_run<T, D, Rounding::kNearest>(o, i, n, terms, tensor_id, index, factors);
}

template <Distribution D>
void axpy_by_dtype(void* out, const void* in, DType dtype, int64_t n, const Terms& terms, uint32_t tensor_id,
                   uint64_t index, Factors* factors = nullptr) {
  switch (dtype) {
    case DType::kFloat32:
      return axpy_by_rounding<Float32, D>(out, in, n, terms, tensor_id, index, factors);
    case DType::kBFloat16:
      return axpy_by_rounding<BFloat16, D>(out, in, n, terms, tensor_id, index, factors);
    case DType::kFloat16:
      return axpy_by_rounding<Float16, D>(out, in, n, terms, tensor_id, index, factors);
    case DType::kFloat64:
      return axpy_double<D>(static_cast<double*>(out), static_cast<const double*>(in), n, terms, tensor_id,
                            index, factors);
  }
}

template <Distribution D>
void both_by_dtype(void* plus, void* minus, const void* in, DType dtype, int64_t n, uint64_t seed,
                   double coeff, uint32_t tensor_id, uint64_t index) {
  switch (dtype) {
    case DType::kFloat32:
      return both_run<Float32, D>(plus, minus, in, n, seed, coeff, tensor_id, index);
    case DType::kBFloat16:
      return both_run<BFloat16, D>(plus, minus, in, n, seed, coeff, tensor_id, index);
    case DType::kFloat16:
      return both_run<Float16, D>(plus, minus, in, n, seed, coeff, tensor_id, index);
    case DType::kFloat64: {
      const double* a = static_cast<const double*>(in);
      for_tiles(n, index, [&](int64_t done, uint64_t tile_index, int64_t count) {
        float z[kTile];
        noise_run<Float32, D>(z, count, seed, tensor_id, tile_index);
        for (int64_t j = 0; j < count; ++j) {
          const double step = coeff * static_cast<double>(z[j]);
          static_cast<double*>(plus)[done + j] = a[done + j] + step;
          static_cast<double*>(minus)[done + j] = a[done + j] - step;
        }
      });
    }
  }
}

void both(void* plus, void* minus, const void* in, DType dtype, int64_t n, uint64_t seed, double coeff,
          uint32_t tensor_id, uint64_t index, Distribution distribution) {
  if (distribution == Distribution::kGaussian) {
    both_by_dtype<Distribution::kGaussian>(plus, minus, in, dtype, n, seed, coeff, tensor_id, index);
  } else {
    both_by_dtype<Distribution::kRademacher>(plus, minus, in, dtype, n, seed, coeff, tensor_id, index);
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

void words(uint32_t* out, int64_t count, uint64_t block, uint32_t tensor_id, uint32_t stream, uint64_t seed) {
  constexpr int64_t kBlocks = 64;
  for (int64_t done = 0; done < count;) {
    const uint64_t first = block + static_cast<uint64_t>(done);
    // a run ends at a multiple of kBlocks, so its blocks have the same high word
    const int64_t room = kBlocks - static_cast<int64_t>(first % kBlocks);
    const int64_t blocks = count - done < room ? count - done : room;
    uint32_t buffer[4 * (kBlocks + kBatch)];
    philox_words(philox_plan(seed, tensor_id, stream, high32(first)), first, blocks, buffer);
    __builtin_memcpy(out + 4 * done, buffer, static_cast<size_t>(blocks) * 16);
    done += blocks;
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

// If a matrix has more columns than a panel of V, it is cut into blocks of rows, and each of these into panels.
void axpy_low_rank(void* out, const void* in, DType dtype, int64_t n, const Terms& terms, uint32_t tensor_id,
                   uint64_t index, uint64_t columns) {
  constexpr uint64_t kRows = 64;  // of a block; V of a panel is computed once for a block
  Factors factors;
  factors.columns = columns;
  factors.rank = terms.rank;
  factors.one_right = true;
  for (int64_t k = 1; k < terms.count; ++k) factors.one_right &= terms.right_seeds[k] == terms.right_seeds[0];
  const uint64_t size = static_cast<uint64_t>(element_size(dtype));
  const auto run = [&](uint64_t begin, uint64_t end) {
    factors.begin = begin;
    factors.end = end;
    axpy_by_dtype<Distribution::kLowRank>(static_cast<char*>(out) + (begin - index) * size,
                                          static_cast<const char*>(in) + (begin - index) * size, dtype,
                                          static_cast<int64_t>(end - begin), terms, tensor_id, begin,
                                          &factors);
  };
  const uint64_t end = index + static_cast<uint64_t>(n), panel = factors.panel();
  if (columns <= panel) return run(index, end);
  for (uint64_t top = index - index % columns; top < end; top += kRows * columns) {
    for (uint64_t column = 0; column < columns; column += panel) {
      const uint64_t width = columns - column < panel ? columns - column : panel;
      for (uint64_t row = top; row < end && row - top < kRows * columns; row += columns) {
        const uint64_t run_begin = row + column < index ? index : row + column;
        const uint64_t run_end = row + column + width < end ? row + column + width : end;
        if (run_begin < run_end) run(run_begin, run_end);
      }
    }
  }
}

void axpy(void* out, const void* in, DType dtype, int64_t n, const Terms& terms, uint32_t tensor_id,
          uint64_t index, uint64_t columns) {
  if (n == 0) return;
  if (terms.distribution == Distribution::kRademacher) {
    axpy_by_dtype<Distribution::kRademacher>(out, in, dtype, n, terms, tensor_id, index);
  } else if (terms.distribution == Distribution::kGaussian || columns == 0) {
    axpy_by_dtype<Distribution::kGaussian>(out, in, dtype, n, terms, tensor_id, index);
  } else {
    axpy_low_rank(out, in, dtype, n, terms, tensor_id, index, columns);
  }
}

}  // namespace
}  // namespace LEANOPS_ISA

namespace zo {
extern const Kernels LEANOPS_CAT(kKernels_, LEANOPS_ISA);
const Kernels LEANOPS_CAT(kKernels_, LEANOPS_ISA) = {
    LEANOPS_ISA::words, LEANOPS_ISA::noise, LEANOPS_ISA::axpy, LEANOPS_ISA::both, LEANOPS_ISA::spread};
}  // namespace zo
}  // namespace leanops
