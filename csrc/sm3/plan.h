// How a list of tensors becomes the table of a launch of sm3.cuh. pyops/sm3/plan.py and nvrtc.py are the same in Python,
// and a test compares them.
#ifndef LEANOPS_SM3_PLAN_H
#define LEANOPS_SM3_PLAN_H

#include <algorithm>
#include <vector>

#include "call.cuh"

namespace leanops {
namespace sm3 {

struct Item {
  u64 param, grad, cover, momentum, scale;  // addresses; 0: none
  const i64* sizes;
  int rank;
  i64 offset;
  u32 tensor_id;
};

// A shape as a matrix, and its tiles.
struct Cut {
  i64 rows, cols, tiles;
  int split, threads_log2;
  bool flat;
};

inline int log2_up(i64 n) {
  int log2 = 0;
  while (((i64)1 << log2) < n) ++log2;
  return log2;
}

// Threads along a row: a warp for wide matrices, fewer for narrow ones or where that leaves no tile with less
// than its columns, more where there are too few rows to go round. A block of an int8 momentum is one warp's.
inline int threads_log2_of(i64 rows, i64 cols, bool int8) {
  const int needed = std::min(log2_up((cols + LANE - 1) / LANE), 8);
  int log2 = std::min(needed, 5);
  while (log2 >= 5 && log2 < needed && (THREADS >> (log2 + 1)) * STEPS >= rows) ++log2;
  for (int less = log2; less >= 3 && log2 <= 5 && !int8; --less)
    if (cols % (LANE << less) == 0) return less;
  return log2;
}

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
      if (int8 && cols % BLOCK != 0) continue;  // its blocks lie in rows of axis 0
      if (rows + cols < cut.rows + cut.cols) cut = {rows, cols, 0, split, 0, false};
    }
    cut.threads_log2 = threads_log2_of(cut.rows, cut.cols, int8);
  }
  const i64 width = LANE << cut.threads_log2, height = (THREADS >> cut.threads_log2) * STEPS;
  cut.tiles = (cut.cols + width - 1) / width * ((cut.rows + height - 1) / height);
  return cut;
}

// Words of the table: slots, then shapes. Slot::maxima counts words of scratch from 1, until `place` gives
// addresses.
struct Table {
  std::vector<u64> words;
  i64 tiles = 0, scratch = 0;  // words of 4 bytes that have to be zero
  int tensors = 0;

  Slot* slots() { return (Slot*)words.data(); }
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
    slot.rank = (u8)item.rank;
    slot.split = (u8)cut.split;
    slot.threads_log2 = (u8)cut.threads_log2;
    u64 addresses = item.param | item.grad | (cut.flat ? item.cover : 0);
    addresses |= item.momentum * (16 / std::min(16, chunk * stored));  // its accesses may be narrower
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
