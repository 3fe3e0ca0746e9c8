// Low-rank noise z = U V^T of a matrix, computed for one tile at a time, before the tile itself. V of a panel of
// columns is kept while tiles need the same seed and columns, so it costs little. U is computed for each tile.
#pragma once

#include "noise.h"
#include "zo.h"

namespace leanops {
namespace LEANOPS_ISA {

// out [n] = n consecutive values of a Gaussian stream from `index` on.
static void gaussians(float* out, int64_t n, uint64_t index, uint64_t seed, uint32_t tensor_id,
                      uint32_t stream) {
  constexpr int64_t kRun = kUnroll * G;  // a power of two
  for (int64_t done = 0; done < n;) {
    const uint64_t next = index + static_cast<uint64_t>(done), first = next - next % kRun;
    const PhiloxPlan plan = philox_plan(seed, tensor_id, stream, high32(first / 4));
    I a[kUnroll], b[kUnroll];
    philox_batches<kUnroll>(plan, first / 4, a, b);
    alignas(64) float run[kRun];
    for (int u = 0; u < kUnroll; ++u) {
      F even, odd, x, y;
      box_muller(a[u], b[u], even, odd);
      interleave(even, odd, x, y);
      store(run + u * G, x);
      store(run + u * G + W, y);
    }
    const int64_t skipped = static_cast<int64_t>(next - first);
    const int64_t count = n - done < kRun - skipped ? n - done : kRun - skipped;
    __builtin_memcpy(out + done, run + skipped, static_cast<size_t>(count) * sizeof(float));
    done += count;
  }
}

constexpr int64_t kPanel = 16384;  // floats of V: 8,192 columns at rank 2
constexpr int64_t kLeft = 4096;    // floats of U

// U and V of one matrix during a run over its elements [begin, end), whose columns fit into the panel.
struct Factors {
  uint64_t begin, end, columns;
  int64_t rank;
  bool one_right;  // all terms have the same right seed: V is then made once, for all columns of the run

  uint64_t v_seed = 0, v_first = 0, v_count = 0;  // v has the columns [v_first, v_first + v_count) of v_seed
  alignas(64) float v[kPanel];                    // [rank][stride]
  alignas(64) float u[kLeft];                     // [rows][rank]
  alignas(64) float z[kTile + W];

  int64_t stride() const { return kPanel / rank; }
  // The most columns that v can hold: a vector may read W beyond them.
  uint64_t panel() const { return static_cast<uint64_t>(stride() - W); }

  // Computes v of the columns [first, last), unless it has them.
  void ensure_v(uint64_t seed, uint32_t tensor_id, uint64_t first, uint64_t last) {
    if (v_count && seed == v_seed && first >= v_first && last <= v_first + v_count) return;
    v_seed = seed, v_first = first, v_count = last - first;
    float values[1024];
    const uint64_t step = 1024 / static_cast<uint64_t>(rank), r = static_cast<uint64_t>(rank);
    for (uint64_t done = 0; done < v_count; done += step) {
      const int64_t count = static_cast<int64_t>(v_count - done < step ? v_count - done : step);
      gaussians(values, count * rank, (first + done) * r, seed, tensor_id, zo::kStreamRight);
      for (int64_t p = 0; p < rank; ++p) {
        float* target = v + p * stride() + done;
        for (int64_t j = 0; j < count; ++j) target[j] = values[j * rank + p];
      }
    }
    for (int64_t p = 0; p < rank; ++p) {
      for (int j = 0; j < W; ++j) v[p * stride() + static_cast<int64_t>(v_count) + j] = 0.0f;
    }
  }

  // out [n] = z of n <= kTile elements from `index` on; `out` has room for W more. Elements outside of [begin, end) get
  // zeros: a whole group may begin before the run or end after it.
  void fill(float* out, uint64_t left_seed, uint64_t right_seed, uint32_t tensor_id, uint64_t index,
            int64_t n) {
    const uint64_t start = index < begin ? begin : index;
    const uint64_t stop = index + static_cast<uint64_t>(n) < end ? index + static_cast<uint64_t>(n) : end;
    for (uint64_t i = index; i < start; ++i) out[i - index] = 0.0f;
    const uint64_t a = one_right ? begin : start, b = one_right ? end : stop;  // elements that need V
    const bool one_row = a / columns == (b - 1) / columns;
    const uint64_t low = one_row ? a % columns : 0, high = one_row ? low + (b - a) : columns;
    ensure_v(right_seed, tensor_id, low, high);

    uint64_t row = start / columns, column = start % columns, u_end = row;  // u has the rows before u_end
    const uint64_t rows = (stop - 1) / columns + 1, most_rows = static_cast<uint64_t>(kLeft / rank);
    const float* u_row = u;
    for (uint64_t i = start; i < stop; ++row, column = 0, u_row += rank) {
      if (row == u_end) {
        const uint64_t count = rows - row < most_rows ? rows - row : most_rows;
        gaussians(u, static_cast<int64_t>(count) * rank, row * static_cast<uint64_t>(rank), left_seed,
                  tensor_id, zo::kStreamLeft);
        u_row = u;
        u_end += count;
      }
      const uint64_t length = columns - column < stop - i ? columns - column : stop - i;
      const float* v_columns = v + (column - v_first);
      float* target = out + (i - index);
      for (uint64_t j = 0; j < length; j += W) {
        F sum = mul(set_f(u_row[0]), load(v_columns + j));
        for (int64_t p = 1; p < rank; ++p)
          sum = fma(set_f(u_row[p]), load(v_columns + p * stride() + j), sum);
        store(target + j, sum);
      }
      i += length;
    }
    for (uint64_t i = stop; i < index + static_cast<uint64_t>(n); ++i) out[i - index] = 0.0f;
  }
};

}  // namespace LEANOPS_ISA
}  // namespace leanops
