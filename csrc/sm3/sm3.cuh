// sm3/1 on CUDA: one step of a whole list of tensors in one launch.
//
// A block takes a tile of a tensor at a time. It reads the tile's accumulators into shared memory, then every
// thread passes through the rows of the tile, keeps the largest nu of its columns in registers and of its row
// across the threads along it; weight and momentum are written at once. At the tile's end the maxima go to
// the tensor's second buffer, by integer atomics on the bits of nu >= 0, which are exact and have no order.
// The block that finishes a tensor's last tile copies that buffer over the accumulators, which no tile reads
// any more.
#ifndef LEANOPS_SM3_SM3_CUH
#define LEANOPS_SM3_SM3_CUH

#include "update.cuh"

namespace leanops {
namespace sm3 {

// Blocks that share a multiprocessor: leaves a thread 80 or 128 registers.
template <class T, int M, bool STOCHASTIC>
constexpr int RESIDENT = sizeof(T) == 8 || M != NO_MOMENTUM || STOCHASTIC ? 2 : 3;

// Rows held in registers at once: their loads are all under way before the first is used. The compiler for sm_100 has
// no registers left for a second one beside the bits of stochastic rounding and a momentum to be encoded.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool FEW_REGISTERS = true;
#else
constexpr bool FEW_REGISTERS = false;
#endif
template <class T, int M, bool STOCHASTIC>
constexpr int AHEAD = sizeof(T) == 8 || (sizeof(T) == 4 && M == NO_MOMENTUM) ||
                              (FEW_REGISTERS && STOCHASTIC && (M == FLOAT32 || M == INT8))
                          ? 1
                          : 2;

// Last tensor at or after `low` whose first tile is not beyond `tile`.
LEANOPS_DEVICE int find_slot(const Slot* slots, int low, int count, i64 tile) {
  int high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (slots[middle].first <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The part of a matrix that a block takes at a time.
struct Tile {
  i64 row, column;    // the first
  int rows, columns;  // how many of the tensor
  int threads_log2;   // threads along a row
  int along_log2;     // of them in a warp

  LEANOPS_DEVICE void set(const Slot& slot, i64 number) {
    threads_log2 = slot.threads_log2;
    along_log2 = min(threads_log2, 5);
    const i64 across = slot.flags & FLAT ? 1 : (slot.cols + width() - 1) / width();  // tiles along a row
    row = number / across * height();
    column = number % across * width();
    rows = (int)min(slot.rows - row, (i64)height());
    columns = (int)min(slot.cols - column, (i64)width());
  }
  LEANOPS_DEVICE int width() const { return LANE << threads_log2; }
  LEANOPS_DEVICE int groups() const { return THREADS >> threads_log2; }
  LEANOPS_DEVICE int height() const { return groups() * STEPS; }
  LEANOPS_DEVICE int along() const { return 1 << along_log2; }

  // The calling thread's place along its row, and its first row.
  LEANOPS_DEVICE int place() const { return (int)threadIdx.x & ((1 << threads_log2) - 1); }
  LEANOPS_DEVICE int group() const { return (int)threadIdx.x >> threads_log2; }
  // Its first element lies this many columns from the tile's.
  template <class T>
  LEANOPS_DEVICE int first_column() const {
    return place() / 32 * BLOCK + (place() & (along() - 1)) * Element<T>::CHUNK;
  }
  // In shared memory a thread has its columns in two groups of four, which lie so that neighbouring threads
  // access neighbouring groups. For chunks of four that is the order of the columns.
  LEANOPS_DEVICE int first_entry() const { return place() / 32 * BLOCK + (place() & (along() - 1)) * 4; }
  template <class T>
  LEANOPS_DEVICE int column_of(int entry) const {
    if (Element<T>::CHUNK == 4) return entry;
    const int part = entry / BLOCK * BLOCK, quad = (entry - part) / 4;
    return part + (quad & (along() - 1)) * 8 + (quad >> along_log2) * 4 + entry % 4;
  }
};

// What is the same for all threads of a block waits here, not in their registers.
struct Shared {
  static const int LENGTH = LANE + STEPS * THREADS;  // columns and rows of a tile, at most
  vec16 cover[LENGTH / 4];                           // bits: of the tile's columns, then of its rows
  u32 top[LENGTH];                                   // bits of the largest nu, likewise
  Numbers numbers;
  Slot slot;
  Tile tile;
  u32 last;
};

// Calls f(entry of the cover) for each axis of a side, rows (0) or columns (1), at an index along it.
template <class F>
LEANOPS_DEVICE void each_axis(const Slot& slot, const i64* shape, int side, i64 index, F f) {
  i64 start = 0;
  const int from = side ? slot.split : 0, to = side ? slot.rank : slot.split;
  for (int axis = 0; axis < to; ++axis) start += shape[axis];
  for (int axis = to - 1; axis > from; --axis) {
    start -= shape[axis];
    f(start + index % shape[axis]);
    index /= shape[axis];
  }
  f(start - shape[from] + index);  // the outermost: no division, which is all there is for a matrix
}

// Bits of the smallest accumulator of a side at an index along it.
LEANOPS_DEVICE u32 least_cover(const Slot& slot, const i64* shape, int side, i64 index) {
  const float* cover = global<const float>(slot.cover);
  float c = as_float(0x7f800000u);
  each_axis(slot, shape, side, index, [&](i64 at) { c = min_or_nan(c, cover[at]); });
  return as_bits(c);
}

// A maximum over the slice of a side's index within a tile.
LEANOPS_DEVICE void raise(const Slot& slot, const i64* shape, int side, i64 index, u32 top) {
  if (!slot.maxima) {  // the only tile of a matrix
    global<float>(slot.cover)[(side ? slot.rows : 0) + index] = as_float(top);
    return;
  }
  u32* maxima = global<u32>(slot.maxima) + 1;
  const bool crowded = slot.rank > 2;  // many indices share an accumulator: most have nothing to raise
  each_axis(slot, shape, side, index, [&](i64 at) {
    if (crowded ? load_shared_by_blocks(maxima + at) < top : top != 0) atomic_max(maxima + at, top);
  });
}

// The rows of a tile. WHOLE: all of it is in the matrix, and ALIGNED. The other form serves what is left, and
// flat tensors, whose elements have an accumulator each.
template <class T, int M, bool STOCHASTIC, bool WHOLE>
LEANOPS_DEVICE void pass(const Call& call, Shared& s) {
  const int U = WHOLE ? AHEAD<T, M, STOCHASTIC> : 1;
  const Tile tile = s.tile;
  const Tensor tensor(s.slot);
  const Numbers k = s.numbers;
  const int group = tile.group(), along = tile.along();
  const i64 cols = s.slot.cols, blocks = (cols + BLOCK - 1) / BLOCK;
  const i64 block_column = tile.column / BLOCK + tile.place() / 32;
  const int first_column = tile.first_column<T>(), entry = tile.first_entry();
  const bool aligned = s.slot.flags & ALIGNED;
  u32 top[LANE];
#pragma unroll
  for (int e = 0; e < LANE; ++e) top[e] = 0;
#pragma unroll 1
  for (int step = 0; step < STEPS; step += U) {
    if (!WHOLE && step * tile.groups() >= tile.rows) break;  // the same for all threads
    Row<T, M> rows[U];
#pragma unroll
    for (int i = 0; i < U; ++i) {
      const int row = (step + i) * tile.groups() + group;
      Lane<T>& lane = rows[i].lane;
      lane.at = (tile.row + row) * cols + tile.column + first_column;
      lane.stride = along * Element<T>::CHUNK;
      lane.left = row < tile.rows ? tile.columns - first_column : 0;
      if (!WHOLE && (s.slot.flags & FLAT))
        lane.left = (int)max(min(s.slot.numel - lane.at, (i64)lane.left), (i64)0);
      lane.vector = WHOLE || aligned;
      rows[i].block = (tile.row + row) * blocks + block_column;
      rows[i].template load<WHOLE>(tensor);
    }
#pragma unroll
    for (int i = 0; i < U; ++i) {
      const int row = tile.width() + (step + i) * tile.groups() + group;
      const bool flat = !WHOLE && (s.slot.flags & FLAT);  // looked up in the loop, lest there be two of it
      float c[LANE], nu[LANE];
      if (flat) {
        Raw<float> each;
        rows[i].lane.template load<WHOLE>(s.slot.cover, each);
#pragma unroll
        for (int e = 0; e < LANE; ++e) c[e] = as_float(each.w[e]);
      } else {
        const float of_row = as_float(s.cover[row / 4].w[row % 4]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const vec16 of_columns = s.cover[entry / 4 + half * along];
#pragma unroll
          for (int e = 0; e < 4; ++e) c[half * 4 + e] = min_or_nan(of_row, as_float(of_columns.w[e]));
        }
      }
      const u32 largest = update<T, M, STOCHASTIC, WHOLE>(rows[i], c, nu, call, tensor, k, along);
      if (flat) {
        Raw<float> each;
#pragma unroll
        for (int e = 0; e < LANE; ++e) each.w[e] = as_bits(nu[e]);
        rows[i].lane.template store<WHOLE>(s.slot.cover, each);
      } else {
#pragma unroll
        for (int e = 0; e < LANE; ++e) top[e] = max(top[e], as_bits(nu[e]));
        const u32 of_all = max_along(largest, along);
        if (((int)threadIdx.x & (along - 1)) == 0) atomic_max(&s.top[row], of_all);
      }
    }
  }
  if (!WHOLE && (s.slot.flags & FLAT)) return;
#pragma unroll
  for (int e = 0; e < LANE; ++e) {
#pragma unroll 1
    for (int mask = along; mask < 32; mask *= 2) top[e] = max(top[e], shuffle_xor(top[e], mask));
    if ((int)threadIdx.x % 32 < along) atomic_max(&s.top[entry + e / 4 * 4 * along + e % 4], top[e]);
  }
}

// Where a matrix's tile keeps entry i of its columns and rows.
struct Place {
  int side;   // 1: a column; 0: a row
  i64 index;  // along that side
  bool inside;
};
template <class T>
LEANOPS_DEVICE Place place_of(const Tile& tile, int i) {
  const int width = tile.width(), column = tile.column_of<T>(i), row = i - width;
  return i < width ? Place{1, tile.column + column, column < tile.columns}
                   : Place{0, tile.row + row, row < tile.rows};
}

template <class T, int M, bool STOCHASTIC>
LEANOPS_DEVICE void matrix(const Call& call, const i64* shape, Shared& s) {
  const Slot& slot = s.slot;
  const Tile& tile = s.tile;
  const int thread = (int)threadIdx.x, entries = tile.width() + tile.height();
#pragma unroll 1
  for (int i = thread; i < entries; i += THREADS) {
    const Place at = place_of<T>(tile, i);
    s.cover[i / 4].w[i % 4] = at.inside ? least_cover(slot, shape, at.side, at.index) : 0;
    s.top[i] = 0;
  }
  barrier();
  if ((slot.flags & ALIGNED) && tile.rows == tile.height() && tile.columns == tile.width()) {
    pass<T, M, STOCHASTIC, true>(call, s);
  } else {
    pass<T, M, STOCHASTIC, false>(call, s);
  }
  barrier();
#pragma unroll 1
  for (int i = thread; i < entries; i += THREADS) {
    const Place at = place_of<T>(tile, i);
    if (at.inside) raise(slot, shape, at.side, at.index, s.top[i]);
  }
  if (!slot.maxima) return;

  barrier();
  u32* maxima = global<u32>(slot.maxima);
  if (thread == 0) s.last = arrive(maxima) == (u32)(slot.tiles - 1);
  barrier();
  if (!s.last) return;
  i64 length = 0;
  for (int axis = 0; axis < slot.rank; ++axis) length += shape[axis];
#pragma unroll 1
  for (i64 i = thread; i < length; i += THREADS)
    global<float>(slot.cover)[i] = as_float(load_shared_by_blocks(maxima + 1 + i));
}

template <class T, int M, bool STOCHASTIC>
LEANOPS_DEVICE void step(const Call& call) {
  if (call.found_inf && !(*global<const float>(call.found_inf) == 0.0f)) return;
  Shared& s = shared<Shared>();
  const u64* table = call.table ? global<const u64>(call.table) : call.words;
  const Slot* slots = (const Slot*)table;
  if (threadIdx.x == 0) s.numbers = numbers_of(call);
  int t = 0;
#pragma unroll 1
  for (i64 number = blockIdx.x; number < call.tiles; number += gridDim.x) {
    t = find_slot(slots, t, call.tensors, number);
    barrier();  // the tile before this one is done with shared memory
    if (threadIdx.x == 0) {
      s.slot = slots[t];
      s.tile.set(s.slot, number - s.slot.first);
    }
    barrier();
    if (s.slot.flags & FLAT) {
      pass<T, M, STOCHASTIC, false>(call, s);
    } else {
      matrix<T, M, STOCHASTIC>(call, (const i64*)table + s.slot.shape, s);
    }
  }
}

}  // namespace sm3
}  // namespace leanops

#endif
