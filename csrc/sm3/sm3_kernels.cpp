// The CPU kernels of sm3/1, compiled once for each instruction set. They cut a tile into rows. If something must be
// staged in the first-level cache, they first cut it into chunks.
#include "../common/philox_vector.h"
#include "blocks.h"
#include "rows.h"

namespace leanops {
namespace LEANOPS_ISA {
namespace {

using sm3::Tile;

constexpr int64_t kChunk = 1024;    // elements staged at a time
constexpr int64_t kNarrow = 2 * G;  // shorter rows that are no multiple of G are computed several at once

const float kNoLimit[1] = {__builtin_inff()};

using Run = void (*)(const Numbers&, const Rows&);

template <class T, Rounding R>
Run run_by_momentum(Momentum kind) {
  if (kind == Momentum::kNone) return run<T, NoMomentum, R>;
  if (kind == Momentum::kInt8) return run<T, Codes, R>;
  return kind == Momentum::kBFloat16 ? run<T, BFloat16In<false>, R> : run<T, Float32, R>;
}

template <class T>
Run run_by_rounding(Momentum kind, Rounding rounding) {
  if (rounding == Rounding::kStochastic) return run_by_momentum<T, Rounding::kStochastic>(kind);
  return run_by_momentum<T, Rounding::kNearest>(kind);
}

// fp64 is staged in fp32, so it runs as fp32.
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
        narrow_(!tile.single && tile.width < kNarrow && tile.width % G != 0),
        coded_(tile.kind == Momentum::kInt8),
        staged_(coded_ && (narrow_ || tile.length != tile.width)),
        random_(numbers.rounding == Rounding::kStochastic && element_size(tile.dtype) == 2),
        size_(element_size(tile.dtype)),
        moment_size_(staged_ ? 4 : momentum_size(tile.kind)),
        run_(run_of(tile.dtype, staged_ ? Momentum::kFloat32 : tile.kind, numbers.rounding)) {
    numbers_.lr *= static_cast<double>(tile.lr_factor);
    numbers_.minus_lr = -static_cast<float>(numbers_.lr);
    if (wide_) {  // the kernel then returns the step: 1 * step + (-0) * 1
      numbers_.grad_factor = numbers_.minus_lr = numbers_.decay_factor = 1.0f;
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
  const Numbers& given_;  // of the step
  Numbers numbers_;       // for run_
  const bool wide_, narrow_, coded_;
  const bool
      staged_;  // int8 momenta are decoded first: blocks are no parts of the matrix's rows, or rows are narrow
  const bool random_;
  const int64_t size_, moment_size_;  // bytes of an element
  const Run run_;

  // Room for the rest of a vector, and for the rest of a row if the chunk has only a part of that row.
  static constexpr int64_t kSlack = kNarrow + W;
  alignas(64) float values_[kChunk + kPair];  // momenta of int8
  alignas(64) int8_t codes_[kChunk + kPair];
  alignas(64) float param_[kChunk], grad_[kChunk];  // of fp64
  alignas(64) float least_[kSlack + kChunk + kSlack];
  alignas(64) uint32_t most_[kSlack + kChunk + kSlack];
  RoundingBits<kChunk> bits_;

  // Takes n consecutive elements from `first` on, in chunks if anything is staged.
  void span(int64_t first, int64_t n) {
    const bool cut = wide_ || narrow_ || staged_ || random_;
    const int64_t length = tile_.length;
    for (int64_t done = 0; done < n;) {
      int64_t count = n - done;
      if (cut && count > kChunk) count = kChunk;
      if (coded_ && cut && length > kChunk) {  // within a row of axis 0
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
    a.set = t.single;
    a.scales = nullptr;
    if (first + n == t.row * t.width + t.column + (t.rows - 1) * t.width + t.columns) a.next = t.next;
    a.bits =
        random_ ? bits_.fill(given_.seed, t.tensor_id, t.offset + static_cast<uint64_t>(first), n) : nullptr;
    if (wide_) load_wide(a, first, n);
    if (staged_) load_codes(a, first, n);
    if (narrow_) {
      several_rows(a, first, n);
    } else {
      whole_rows(a, first, n);
    }
    if (staged_) store_codes(first, n);
    if (wide_) store_wide(first, n);
  }

  // Takes a chunk row by row. It may have only a part of the first and of the last row.
  void whole_rows(Rows& a, int64_t first, int64_t n) {
    const Tile& t = tile_;
    int64_t row = first / t.width, column = first % t.width;
    if (coded_ && !staged_) a.scales = t.scales + row * ((t.width + kBlock - 1) / kBlock) + column / kBlock;
    while (n) {
      a.rows = column || n < t.width ? 1 : n / t.width;
      a.columns = n < t.width - column ? n : t.width - column;
      a.row_cover = t.row_cover + (row - t.row);
      a.row_maxima = t.row_maxima + (row - t.row);
      a.column_cover = t.column_cover + (column - t.column);
      a.column_maxima = t.column_maxima + (column - t.column);
      run_(numbers_, a);
      const int64_t done = a.rows * a.columns;
      a.param += done * (wide_ ? 4 : size_);
      a.grad += done * (wide_ ? 4 : size_);
      if (a.momentum) a.momentum += done * moment_size_;
      if (a.bits) a.bits += done;
      if (a.scales) a.scales += a.rows * ((a.columns + kBlock - 1) / kBlock);
      n -= done;
      row += a.rows;
      column = 0;
    }
  }

  // Takes a chunk as a single row in which every element has its own accumulator: min(R, C) is written to memory
  // before, and the maxima of rows and columns are taken after.
  void several_rows(Rows& a, int64_t first, int64_t n) {
    const Tile& t = tile_;
    const int64_t row = first / t.width - t.row, column = first % t.width, width = t.width;
    const int64_t rows = (column + n + width - 1) / width;
    float* least = least_ + kSlack;
    uint32_t* most = most_ + kSlack;
    float of_columns[kNarrow] = {};
    uint32_t inside[kNarrow] = {}, top[kNarrow] = {};
    for (int64_t j = 0; j < width; ++j) {
      of_columns[j] = t.column_cover[j];
      inside[j] = ~0u;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const F of_row = set_f(t.row_cover[row + r]);
      float* target = least + r * width - column;  // the next row overwrites what goes beyond this one
      for (int64_t j = 0; j < width; j += W) store(target + j, minimum(of_row, load(of_columns + j)));
    }
    uint32_t unused = 0;
    a.rows = 1;
    a.columns = n;
    a.row_cover = kNoLimit;
    a.row_maxima = &unused;
    a.column_cover = least;
    a.column_maxima = most;
    a.set = true;
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
      if (x > t.row_maxima[row + r]) t.row_maxima[row + r] = x;
    }
    for (int64_t j = 0; j < width; ++j) {
      if (top[j] > t.column_maxima[j]) t.column_maxima[j] = top[j];
    }
  }

  void load_wide(Rows& a, int64_t first, int64_t n) {
    const double* p = reinterpret_cast<const double*>(tile_.param) + first;
    const double* g = reinterpret_cast<const double*>(tile_.grad) + first;
    for (int64_t j = 0; j < n; ++j) {
      const float x = static_cast<float>(g[j]) * given_.grad_factor;
      grad_[j] = given_.coupled ? __builtin_fmaf(given_.coupled_decay, static_cast<float>(p[j]), x) : x;
      param_[j] = -0.0f;
    }
    a.param = reinterpret_cast<char*>(param_);
    a.grad = reinterpret_cast<const char*>(grad_);
  }

  void store_wide(int64_t first, int64_t n) const {
    double* p = reinterpret_cast<double*>(tile_.param) + first;
    for (int64_t j = 0; j < n; ++j) {
      const double step = numbers_.lr * static_cast<double>(param_[j]);
      p[j] = p[j] * given_.decay_factor64 - step;
    }
  }

  void load_codes(Rows& a, int64_t first, int64_t n) {
    __builtin_memcpy(codes_, tile_.momentum + first, static_cast<size_t>(n));
    for_blocks(first, n, [&](int64_t position, float* scale, int64_t count) {
      decode_block(codes_ + position, *scale, values_ + position, count);
    });
    a.momentum = reinterpret_cast<char*>(values_);
  }

  void store_codes(int64_t first, int64_t n) {
    for_blocks(first, n, [&](int64_t position, float* scale, int64_t count) {
      const Encoding e = encoding_of(values_ + position, largest_of(values_ + position, count),
                                     codes_ + position, scale, count);
      for (int64_t j = 0; j < count; j += kPair) encode(e, j);
    });
    __builtin_memcpy(tile_.momentum + first, codes_, static_cast<size_t>(n));
  }

  // Calls block(position, scale, count) for each int8 block in n elements from `first` on. A position
  // counts from `first`.
  template <class Block>
  void for_blocks(int64_t first, int64_t n, const Block& block) const {
    const int64_t length = tile_.length;
    int64_t column = first % length;  // in a row of axis 0
    float* scale = tile_.scales + first / length * ((length + kBlock - 1) / kBlock) + column / kBlock;
    for (int64_t done = 0; done < n;) {
      int64_t count = length - column < kBlock ? length - column : kBlock;
      if (count > n - done) count = n - done;
      block(done, scale++, count);
      done += count;
      column = column + count == length ? 0 : column + count;
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
