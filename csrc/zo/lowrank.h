// Low-rank noise z = U V^T of a matrix, made ahead for one tile at a time. A panel of V is kept for as long
// as its seed and columns serve, so that V costs little beside the tile; U is made for the rows of the tile.
#pragma once

#include "noise.h"
#include "zo.h"

namespace leanops {
namespace LEANOPS_ISA {

// n consecutive values of a Gaussian stream from `index` on.                                        out: [n]
static void gaussians(float* out, int64_t n, uint64_t index, uint64_t seed, uint32_t tensor_id,
                      uint32_t stream) {
  constexpr int64_t kRun = kUnroll * G;  // a power of two
  for (int64_t done = 0; done < n;) {
    const uint64_t at = index + static_cast<uint64_t>(done), first = at - at % kRun;
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
    const int64_t skipped = static_cast<int64_t>(at - first);
    const int64_t count = n - done < kRun - skipped ? n - done : kRun - skipped;
    __builtin_memcpy(out + done, run + skipped, static_cast<size_t>(count) * sizeof(float));
    done += count;
  }
}

constexpr int64_t kPanel = 16384;  // floats of V: 8,192 columns at rank 2
constexpr int64_t kLeft = 4096;    // floats of U

// The factors of one matrix during a run over its elements [begin, end), whose columns fit the panel.
struct Factors {
  uint64_t begin, end, columns;
  int64_t rank;
  bool one_right;  // every term has the same V: it is then made once, for all columns of the run

  uint64_t right = 0, from = 0, held = 0;  // V now holds columns [from, from + held) of seed right
  alignas(64) float v[kPanel];             // [rank][stride]
  alignas(64) float u[kLeft];              // [rows][rank]
  alignas(64) float z[kTile + W];

  int64_t stride() const { return kPanel / rank; }
  uint64_t panel() const {
    return static_cast<uint64_t>(stride() - W);
  }  // columns: a vector may read W beyond

  void hold(uint64_t seed, uint32_t tensor_id, uint64_t first, uint64_t last) {
    if (held && seed == right && first >= from && last <= from + held) return;
    right = seed, from = first, held = last - first;
    float values[1024];
    const uint64_t some = 1024 / static_cast<uint64_t>(rank), r = static_cast<uint64_t>(rank);
    for (uint64_t done = 0; done < held; done += some) {
      const int64_t count = static_cast<int64_t>(held - done < some ? held - done : some);
      gaussians(values, count * rank, (first + done) * r, seed, tensor_id, zo::kStreamRight);
      for (int64_t p = 0; p < rank; ++p) {
        float* to = v + p * stride() + done;
        for (int64_t j = 0; j < count; ++j) to[j] = values[j * rank + p];
      }
    }
    for (int64_t p = 0; p < rank; ++p) {
      for (int j = 0; j < W; ++j) v[p * stride() + static_cast<int64_t>(held) + j] = 0.0f;
    }
  }

  // z of n <= kTile elements from `index` on into `out`, with room for W more. What lies outside of
  // [begin, end) is zero: a whole group may begin before the run or end after it.
  void fill(float* out, uint64_t left, uint64_t right_seed, uint32_t tensor_id, uint64_t index, int64_t n) {
    const uint64_t start = index < begin ? begin : index;
    const uint64_t stop = index + static_cast<uint64_t>(n) < end ? index + static_cast<uint64_t>(n) : end;
    for (uint64_t i = index; i < start; ++i) out[i - index] = 0.0f;
    const uint64_t a = one_right ? begin : start, b = one_right ? end : stop;  // elements that V is to serve
    const bool one_row = a / columns == (b - 1) / columns;
    const uint64_t low = one_row ? a % columns : 0, high = one_row ? low + (b - a) : columns;
    hold(right_seed, tensor_id, low, high);

    uint64_t row = start / columns, column = start % columns, made = row;  // U holds rows up to `made`
    const uint64_t rows = (stop - 1) / columns + 1, some = static_cast<uint64_t>(kLeft / rank);
    const float* x = u;
    for (uint64_t at = start; at < stop; ++row, column = 0, x += rank) {
      if (row == made) {
        const uint64_t count = rows - row < some ? rows - row : some;
        gaussians(u, static_cast<int64_t>(count) * rank, row * static_cast<uint64_t>(rank), left, tensor_id,
                  zo::kStreamLeft);
        x = u;
        made += count;
      }
      const uint64_t length = columns - column < stop - at ? columns - column : stop - at;
      const float* y = v + (column - from);
      float* to = out + (at - index);
      for (uint64_t j = 0; j < length; j += W) {
        F sum = mul(set_f(x[0]), load(y + j));
        for (int64_t p = 1; p < rank; ++p) sum = fma(set_f(x[p]), load(y + p * stride() + j), sum);
        store(to + j, sum);
      }
      at += length;
    }
    for (uint64_t i = stop; i < index + static_cast<uint64_t>(n); ++i) out[i - index] = 0.0f;
  }
};

}  // namespace LEANOPS_ISA
}  // namespace leanops
