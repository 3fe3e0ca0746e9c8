// Makes the table of a launch of sm3.cuh from a list of tensors. pyops/sm3/plan.py and nvrtc.py do the same in Python,
// and a test compares them.
#ifndef LEANOPS_SM3_PLAN_H
#define LEANOPS_SM3_PLAN_H

#include <algorithm>
#include <vector>

#include "call.cuh"

namespace leanops {
namespace sm3 {

// One tensor of a call.
struct Item {
  u64 param, grad, cover, momentum, scale;  // addresses; 0: none
  const i64* sizes;
  int rank;
  i64 offset;
  u32 tensor_id;
  u64 lr_factor;  // as Slot's
};

// A shape as a matrix, and its number of tiles.
struct Cut {
  i64 rows, cols, tiles;
  int split, threads_log2;
  bool flat;
};

// The least k with 2^k >= n.
inline int log2_up(i64 n) {
  int log2 = 0;
  while (((i64)1 << log2) < n) ++log2;
  return log2;
}

// log2 of the threads along a row of a tile: a warp for wide matrices. Fewer where the columns need no more, or where
// tiles then cut the columns into equal parts. More where the matrix has too few rows for all threads of a block. With
// int8 momenta a warp has one block of 256 columns.
inline int threads_log2_of(i64 rows, i64 cols, bool int8) {
  const int needed = std::min(log2_up((cols + LANE - 1) / LANE), 8);
  int log2 = std::min(needed, 5);
  while (log2 >= 5 && log2 < needed && (THREADS >> (log2 + 1)) * STEPS >= rows) ++log2;
  for (int fewer = log2; fewer >= 3 && log2 <= 5 && !int8; --fewer)
    if (cols % (LANE << fewer) == 0) return fewer;
  return log2;
}

// The matrix of a shape: the split into rows and columns whose sum is least.
inline Cut cut_of(const i64* sizes, int rank, bool int8) {
  i64 numel = 1;
  for (int axis = 0; axis < rank; ++axis) numel *= sizes[axis];
  Cut cut = {(numel + BLOCK - 1) / BLOCK, BLOCK, 0, 0, 5, true};
  if (rank > 1) {
    cut = {sizes[0], numel / sizes[0], 0, 1, 0, false};
    i64 rows = sizes[0];
    for (int split = 2; split < rank; ++split) {
      rows *= sizes[split - 1];
      const i64 cols = numel / rows;
      if (int8 && cols % BLOCK != 0) continue;  // blocks lie in rows of axis 0, and must lie in rows here
      if (rows + cols < cut.rows + cut.cols) cut = {rows, cols, 0, split, 0, false};
    }
    cut.threads_log2 = threads_log2_of(cut.rows, cut.cols, int8);
  }
  const i64 width = LANE << cut.threads_log2, height = (THREADS >> cut.threads_log2) * STEPS;
  cut.tiles = (cut.cols + width - 1) / width * ((cut.rows + height - 1) / height);
  return cut;
}

// The table of a launch. Until `place` is called, Slot::maxima is the number of a word of scratch, counted from 1.
struct Table {
  std::vector<u64> words;      // slots, then shapes
  i64 tiles = 0, scratch = 0;  // scratch: words of 4 bytes, which must be zero at the launch
  int tensors = 0;

  Slot* slots() { return (Slot*)words.data(); }
  // Turns Slot::maxima into addresses.
  void place(u64 scratch_address) {
    for (int t = 0; t < tensors; ++t)
      if (slots()[t].maxima) slots()[t].maxima = scratch_address + 4 * (slots()[t].maxima - 1);
  }
};

inline Table table_of(const std::vector<Item>& items, Momentum kind, int param_size) {
  const int slot_words = sizeof(Slot) / sizeof(u64), chunk = param_size == 2 ? 8 : 4;
  const int stored = kind == INT8 ? 1 : kind == BFLOAT16 ? 2 : 4;
  Table table;
  std::vector<Slot> slots;
  std::vector<u64> shapes;
  for (const Item& item : items) {
    i64 numel = 1, length = 0;
    for (int axis = 0; axis < item.rank; ++axis) {
      numel *= item.sizes[axis];
      length += item.sizes[axis];
    }
    if (numel == 0) continue;
    const Cut cut = cut_of(item.sizes, item.rank, kind == INT8);
    Slot slot = {};
    slot.param = item.param;
    slot.grad = item.grad;
    slot.cover = item.cover;
    slot.momentum = item.momentum;
    slot.scale = item.scale;
    if (!cut.flat && (cut.tiles > 1 || item.rank > 2)) {
      slot.maxima = (u64)table.scratch + 1;
      table.scratch += 1 + length;
    }
    slot.rows = cut.rows;
    slot.cols = cut.cols;
    slot.numel = numel;
    slot.offset = item.offset;
    slot.first = table.tiles;
    slot.tiles = cut.tiles;
    slot.shape = (i64)shapes.size();
    slot.tensor_id = item.tensor_id;
    slot.lr_factor = item.lr_factor;
    slot.rank = (u8)item.rank;
    slot.split = (u8)cut.split;
    slot.threads_log2 = (u8)cut.threads_log2;
    u64 addresses = item.param | item.grad | (cut.flat ? item.cover : 0);
    // a chunk of the momentum is chunk * stored bytes: an access may be narrower than 16 bytes
    addresses |= item.momentum * (16 / std::min(16, chunk * stored));
    const bool aligned = addresses % 16 == 0 && (cut.flat || cut.cols % chunk == 0);
    slot.flags = (u8)((cut.flat ? FLAT : 0) | (aligned ? ALIGNED : 0));
    shapes.insert(shapes.end(), item.sizes, item.sizes + item.rank);
    table.tiles += cut.tiles;
    slots.push_back(slot);
  }
  table.tensors = (int)slots.size();
  table.words.resize(slots.size() * slot_words + shapes.size());
  for (Slot& slot : slots) slot.shape += (i64)slots.size() * slot_words;
  std::copy(slots.begin(), slots.end(), table.slots());
  std::copy(shapes.begin(), shapes.end(), table.words.begin() + (i64)slots.size() * slot_words);
  return table;
}

}  // namespace sm3
}  // namespace leanops

#endif
