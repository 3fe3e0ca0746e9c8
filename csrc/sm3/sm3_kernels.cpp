// The CPU kernels of sm3/1, compiled once per instruction set: a tile is cut into chunks, where something has
// to be staged in the first-level cache, and chunks into rows.
#include "../common/philox_vector.h"
#include "blocks.h"
#include "rows.h"

namespace leanops {
namespace LEANOPS_ISA {
namespace {

using sm3::kBlock;
using sm3::Tile;

constexpr int64_t kChunk = 1024;    // elements staged at a time
constexpr int64_t kNarrow = 2 * G;  // rows this long and no multiple of G are worked on several at once

alignas(64) const uint32_t kZeros[kChunk] = {};
const float kNoLimit[1] = {__builtin_inff()};

using Run = void (*)(const Numbers&, const Rows&);

template <class T, Rounding R>
Run run_by_momentum(Momentum kind) {
  if (kind == Momentum::kNone) return run<T, NoMomentum, R>;
  return kind == Momentum::kBFloat16 ? run<T, BFloat16In<false>, R> : run<T, Float32, R>;
}

template <class T>
Run run_by_rounding(Momentum kind, Rounding rounding) {
  if (rounding == Rounding::kStochastic) return run_by_momentum<T, Rounding::kStochastic>(kind);
  return run_by_momentum<T, Rounding::kNearest>(kind);
}

// fp64 and int8 run as the fp32 that they are staged in.
Run run_of(DType dtype, Momentum kind, Rounding rounding) {
  if (dtype == DType::kBFloat16) return run_by_rounding<BFloat16In<false>>(kind, rounding);
  if (dtype == DType::kFloat16) return run_by_rounding<Float16>(kind, rounding);
  return run_by_momentum<Float32, Rounding::kNearest>(kind);
}

// One tile's work.
class Worker {
 public:
  Worker(const Numbers& numbers, const Tile& tile)
      : tile_(tile),
        given_(numbers),
        numbers_(numbers),
        wide_(tile.dtype == DType::kFloat64),
        coded_(tile.kind == Momentum::kInt8),
        narrow_(!tile.single && tile.width < kNarrow && tile.width % G != 0),
        random_(numbers.rounding == Rounding::kStochastic && element_size(tile.dtype) == 2),
        size_(element_size(tile.dtype)),
        run_(run_of(tile.dtype, tile.kind, numbers.rounding)) {
    if (wide_) {  // the kernel then gives the step itself: 1 * step + (-0) * 1
      numbers_.gain = numbers_.rate = numbers_.shrink = 1.0f;
      numbers_.coupled = false;
    }
  }

  void work() {
    const Tile& t = tile_;
    if (t.columns == t.width) return span(t.row * t.width, t.rows * t.width);
    for (int64_t r = t.row; r < t.row + t.rows; ++r) span(r * t.width + t.column, t.columns);
  }

 private:
  const Tile& tile_;
  const Numbers& given_;
  Numbers numbers_;  // as the kernel takes them
  const bool wide_, coded_, narrow_, random_;
  const int64_t size_;  // bytes of an element
  const Run run_;
  int64_t kernel_size() const { return wide_ ? 4 : size_; }

  // Staged, where it has to be. Slack takes the rest of a vector, and of a row that a chunk cuts.
  static constexpr int64_t kSlack = kNarrow + W;
  alignas(64) float momentum_[kChunk + W];          // of int8
  alignas(64) float param_[kChunk], grad_[kChunk];  // of fp64
  alignas(64) float least_[kSlack + kChunk + kSlack];
  alignas(64) uint32_t most_[kSlack + kChunk + kSlack];
  RoundingBits<kChunk> bits_;

  // n elements that lie one after another, from `first` on.
  void span(int64_t first, int64_t n) {
    const bool staged = wide_ || coded_ || narrow_ || random_ || tile_.single;
    const int64_t length = tile_.length;
    for (int64_t done = 0; done < n;) {
      int64_t count = n - done;
      if (staged && count > kChunk) count = kChunk;
      if (coded_ && length > kChunk) {  // within a row of axis 0
        const int64_t left = length - (first + done) % length;
        if (count > left) count = left;
      } else if (coded_ && count == kChunk) {  // whole rows of axis 0
        count = kChunk / length * length;
      }
      chunk(first + done, count);
      done += count;
    }
  }

  void chunk(int64_t first, int64_t n) {
    const Tile& t = tile_;
    Rows a;
    a.param = t.param + first * size_;
    a.grad = t.grad + first * size_;
    a.momentum = t.momentum ? t.momentum + first * momentum_size(t.kind) : nullptr;
    a.bits = random_ ? bits_.fill(numbers_.seed, t.tensor_id, t.offset + static_cast<uint64_t>(first), n)
                     : nullptr;
    if (coded_) {
      a.momentum = reinterpret_cast<char*>(momentum_);
      for_blocks(first, n, [](const int8_t* codes, const float* scale, float* m, int64_t count) {
        decode_block(codes, *scale, m, count);
      });
    }
    if (wide_) {
      const double* p = reinterpret_cast<const double*>(t.param) + first;
      const double* g = reinterpret_cast<const double*>(t.grad) + first;
      for (int64_t j = 0; j < n; ++j) {
        const float x = static_cast<float>(g[j]) * given_.gain;
        grad_[j] = given_.coupled ? __builtin_fmaf(given_.decay, static_cast<float>(p[j]), x) : x;
        param_[j] = -0.0f;
      }
      a.param = reinterpret_cast<char*>(param_);
      a.grad = reinterpret_cast<const char*>(grad_);
    }
    narrow_ ? several_rows(a, first, n) : whole_rows(a, first, n);
    if (wide_) {
      double* p = reinterpret_cast<double*>(t.param) + first;
      for (int64_t j = 0; j < n; ++j) {
        const double step = given_.lr * static_cast<double>(param_[j]);
        p[j] = p[j] * given_.shrink64 - step;
      }
    }
    if (coded_) {
      for_blocks(first, n, [](int8_t* codes, float* scale, const float* m, int64_t count) {
        encode_block(m, codes, scale, count);
      });
    }
  }

  // Row by row, of which the first and the last may be cut.
  void whole_rows(Rows& a, int64_t first, int64_t n) {
    const Tile& t = tile_;
    int64_t row = first / t.width, column = first % t.width;
    while (n) {
      a.rows = column ? 1 : n / t.width;
      a.columns = t.width;
      if (column || a.rows == 0) {
        a.rows = 1;
        a.columns = n < t.width - column ? n : t.width - column;
      }
      a.row_least = t.row_least + (row - t.row);
      a.row_most = t.row_most + (row - t.row);
      a.column_least = t.column_least + (column - t.column);
      a.column_most = t.column_most + (column - t.column);
      a.column_was = t.single ? kZeros : a.column_most;
      run_(numbers_, a);
      const int64_t done = a.rows * a.columns;
      a.param += done * kernel_size();
      a.grad += done * kernel_size();
      if (a.momentum) a.momentum += done * (coded_ ? 4 : momentum_size(t.kind));
      if (a.bits) a.bits += done;
      n -= done;
      row += a.rows;
      column = 0;
    }
  }

  // As if the chunk were one row, every element having its own accumulator: min(R, C) laid out before, the
  // maxima taken after.
  void several_rows(Rows& a, int64_t first, int64_t n) {
    const Tile& t = tile_;
    const int64_t row = first / t.width - t.row, column = first % t.width, width = t.width;
    const int64_t rows = (column + n + width - 1) / width;
    float* least = least_ + kSlack;
    uint32_t* most = most_ + kSlack;
    float of_columns[kNarrow] = {};
    uint32_t inside[kNarrow] = {}, top[kNarrow] = {};
    for (int64_t j = 0; j < width; ++j) {
      of_columns[j] = t.column_least[j];
      inside[j] = ~0u;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const F of_row = set_f(t.row_least[row + r]);
      float* to = least + r * width - column;  // what goes beyond the row, the next one writes again
      for (int64_t j = 0; j < width; j += W) store(to + j, minimum(of_row, load(of_columns + j)));
    }
    uint32_t unused = 0;
    a.rows = 1;
    a.columns = n;
    a.row_least = kNoLimit;
    a.row_most = &unused;
    a.column_least = least;
    a.column_most = most;
    a.column_was = kZeros;
    run_(numbers_, a);
    __builtin_memset(most - column, 0, static_cast<size_t>(column) * 4);
    __builtin_memset(most + n, 0, static_cast<size_t>(rows * width - column - n + W) * 4);
    for (int64_t r = 0; r < rows; ++r) {
      I of_row = set_i(0);
      const uint32_t* from = most + r * width - column;
      for (int64_t j = 0; j < width; j += W) {
        const I x = and_(load_i(from + j), load_i(inside + j));
        of_row = max_u(of_row, x);
        store_i(top + j, max_u(load_i(top + j), x));
      }
      const uint32_t x = max_lane(of_row);
      if (x > t.row_most[row + r]) t.row_most[row + r] = x;
    }
    for (int64_t j = 0; j < width; ++j) {
      if (top[j] > t.column_most[j]) t.column_most[j] = top[j];
    }
  }

  // Calls block(codes, scale, staged values, n) for each int8 block among n elements.
  template <class Block>
  void for_blocks(int64_t first, int64_t n, const Block& block) {
    const int64_t length = tile_.length, in_a_row = (length + kBlock - 1) / kBlock;
    int64_t row = first / length, at = first % length;
    for (int64_t done = 0; done < n;) {
      int64_t count = length - at < kBlock ? length - at : kBlock;
      if (count > n - done) count = n - done;
      block(reinterpret_cast<int8_t*>(tile_.momentum) + first + done,
            tile_.scales + row * in_a_row + at / kBlock, momentum_ + done, count);
      done += count;
      at += count;
      if (at == length) {
        at = 0;
        ++row;
      }
    }
  }
};

void tile(const Numbers& numbers, const Tile& tile) { Worker(numbers, tile).work(); }

}  // namespace
}  // namespace LEANOPS_ISA

namespace sm3 {
extern const Kernels LEANOPS_CAT(kKernels_, LEANOPS_ISA);
const Kernels LEANOPS_CAT(kKernels_, LEANOPS_ISA) = {LEANOPS_ISA::tile};
}  // namespace sm3
}  // namespace leanops
