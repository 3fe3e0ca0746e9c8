// sm3/1 on CUDA: one step of a whole list of tensors in one launch.
//
// A block takes one tile of a tensor at a time. It loads the tile's accumulators into shared memory. Then each thread
// takes LANE elements of STEPS rows, one row after another, and writes parameter and momentum at once. A thread keeps
// the largest nu of its columns in registers; the threads along a row combine the largest nu of the row. At the tile's
// end the block raises the maxima in the tensor's second buffer, by integer atomics on the bits of nu >= 0: they are
// exact, and their order does not matter. The block that finishes a tensor's last tile copies that buffer over the
// accumulators, because no tile reads them any more.
#ifndef LEANOPS_SM3_SM3_CUH
#define LEANOPS_SM3_SM3_CUH

#include "update.cuh"

namespace leanops {
namespace sm3 {

// Blocks that share a multiprocessor. A thread then has 128 or 80 registers.
template <class T, int M, bool STOCHASTIC>
constexpr int RESIDENT = sizeof(T) == 8 || M != NO_MOMENTUM || STOCHASTIC ? 2 : 3;

// Rows that a thread loads before it uses the first of them. For sm_100 the compiler has no registers for a second row
// where stochastic rounding comes with a momentum in fp32 or int8.
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

// The tensor that `tile` belongs to: the last one whose first tile is at most `tile`. It is not before tensor `low`.
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

// The part of a matrix that a block takes at a time: height() x width() elements.
struct Tile {
  i64 row, column;    // of the first element
  int rows, columns;  // the part that lies in the tensor
  int threads_log2;   // log2 of the threads along a row
  int along_log2;     // log2 of the threads along a row in one warp

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
  // Rows that the block takes at a time.
  LEANOPS_DEVICE int groups() const { return THREADS >> threads_log2; }
  LEANOPS_DEVICE int height() const { return groups() * STEPS; }
  // Threads of a warp along one row.
  LEANOPS_DEVICE int along() const { return 1 << along_log2; }

  // The calling thread's number along its row, and its first row in the tile.
  LEANOPS_DEVICE int place() const { return (int)threadIdx.x & ((1 << threads_log2) - 1); }
  LEANOPS_DEVICE int group() const { return (int)threadIdx.x >> threads_log2; }
  // The calling thread's first column in the tile.
  template <class T>
  LEANOPS_DEVICE int first_column() const {
    return place() / 32 * BLOCK + (place() & (along() - 1)) * Element<T>::CHUNK;
  }
  // In shared memory a thread has its 8 columns as two groups of four entries. Neighbouring threads have neighbouring
  // groups; with chunks of four elements that is the order of the columns. `column_of` gives the column of an entry.
  LEANOPS_DEVICE int first_entry() const { return place() / 32 * BLOCK + (place() & (along() - 1)) * 4; }
  template <class T>
  LEANOPS_DEVICE int column_of(int entry) const {
    if (Element<T>::CHUNK == 4) return entry;
    const int part = entry / BLOCK * BLOCK, quad = (entry - part) / 4;
    return part + (quad & (along() - 1)) * 8 + (quad >> along_log2) * 4 + entry % 4;
  }
};

// What all threads of a block share. It is in shared memory, so that it takes no registers.
struct Shared {
  static const int LENGTH = LANE + STEPS * THREADS;  // the largest width + height of a tile
  vec16 cover[LENGTH / 4];                           // [width + height], bits of the accumulators
  u32 top[LENGTH];                                   // [width + height], bits of the largest nu
  Numbers numbers;
  double lr;  // of the call; `numbers` has the tensor's
  Slot slot;
  Tile tile;
  u32 is_last;  // this block has finished the tensor's last tile
};

// The two sides of a matrix: its rows, and its columns.
enum Side { ROWS = 0, COLUMNS = 1 };

// Calls f(index of an accumulator in the cover) for each axis of a side, at an index along that side.
template <class F>
LEANOPS_DEVICE void each_axis(const Slot& slot, const i64* shape, Side side, i64 index, F f) {
  i64 start = 0;
  const int first = side == COLUMNS ? slot.split : 0, end = side == COLUMNS ? slot.rank : slot.split;
  for (int axis = 0; axis < end; ++axis) start += shape[axis];
  for (int axis = end - 1; axis > first; --axis) {
    start -= shape[axis];
    f(start + index % shape[axis]);
    index /= shape[axis];
  }
  f(start - shape[first] + index);  // the first axis needs no division
}

// Bits of the smallest accumulator at an index along a side.
LEANOPS_DEVICE u32 least_cover(const Slot& slot, const i64* shape, Side side, i64 index) {
  const float* cover = global<const float>(slot.cover);
  float c = as_float(0x7f800000u);
  each_axis(slot, shape, side, index, [&](i64 entry) { c = min_or_nan(c, cover[entry]); });
  return as_bits(c);
}

// Raises the maxima at an index along a side to `top`, the largest nu there in a tile.
LEANOPS_DEVICE void raise(const Slot& slot, const i64* shape, Side side, i64 index, u32 top) {
  if (!slot.maxima) {  // a tensor of rank 2 with one tile: no other tile reads or raises its accumulators
    global<float>(slot.cover)[(side == COLUMNS ? slot.rows : 0) + index] = as_float(top);
    return;
  }
  u32* maxima = global<u32>(slot.maxima) + 1;
  // many indices share an accumulator, so most maxima are high enough: a load spares the atomic
  const bool is_shared = slot.rank > 2;
  each_axis(slot, shape, side, index, [&](i64 entry) {
    if (is_shared ? load_shared_by_blocks(maxima + entry) < top : top != 0) atomic_max(maxima + entry, top);
  });
}

// Updates the rows of a tile. WHOLE: the whole tile lies in the matrix, and the tensor is ALIGNED. The other form
// serves all other tiles, and flat tensors, whose elements have their own accumulators.
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
  u32 top[LANE];  // [LANE], bits of the largest nu of a thread's columns
#pragma unroll
  for (int e = 0; e < LANE; ++e) top[e] = 0;  // [LANE]
#pragma unroll 1
  for (int step = 0; step < STEPS; step += U) {
    if (!WHOLE && step * tile.groups() >= tile.rows) break;  // the same decision in all threads
    Row<T, M> rows[U];                                       // [U, LANE]
#pragma unroll
    for (int i = 0; i < U; ++i) {
      const int row = (step + i) * tile.groups() + group;
      Lane<T>& lane = rows[i].lane;
      lane.start = (tile.row + row) * cols + tile.column + first_column;
      lane.stride = along * Element<T>::CHUNK;
      lane.left = row < tile.rows ? tile.columns - first_column : 0;
      if (!WHOLE && (s.slot.flags & FLAT))
        lane.left = (int)max(min(s.slot.numel - lane.start, (i64)lane.left), (i64)0);
      lane.vector = WHOLE || aligned;
      rows[i].block = (tile.row + row) * blocks + block_column;
      rows[i].template load<WHOLE>(tensor);  // [LANE]
    }
#pragma unroll
    for (int i = 0; i < U; ++i) {
      const int row_entry = tile.width() + (step + i) * tile.groups() + group;
      // read here so that the compiler does not duplicate the loop
      const bool flat = !WHOLE && (s.slot.flags & FLAT);
      float c[LANE], nu[LANE];  // [LANE]
      if (flat) {
        Raw<float> accumulators;                                        // [LANE]
        rows[i].lane.template load<WHOLE>(s.slot.cover, accumulators);  // [LANE]
#pragma unroll
        for (int e = 0; e < LANE; ++e) c[e] = as_float(accumulators.w[e]);  // [LANE]
      } else {
        const float row_cover = as_float(s.cover[row_entry / 4].w[row_entry % 4]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const vec16 column_cover = s.cover[entry / 4 + half * along];  // [4]
#pragma unroll
          for (int e = 0; e < 4; ++e)
            c[half * 4 + e] = min_or_nan(row_cover, as_float(column_cover.w[e]));  // [LANE]
        }
      }
      const u32 largest = update<T, M, STOCHASTIC, WHOLE>(rows[i], c, nu, call, tensor, k, along);
      if (flat) {
        Raw<float> accumulators;  // [LANE]
#pragma unroll
        for (int e = 0; e < LANE; ++e) accumulators.w[e] = as_bits(nu[e]);  // [LANE]
        rows[i].lane.template store<WHOLE>(s.slot.cover, accumulators);     // [LANE]
      } else {
#pragma unroll
        for (int e = 0; e < LANE; ++e) top[e] = max(top[e], as_bits(nu[e]));  // [LANE]
        const u32 row_top = max_along(largest, along);
        if (((int)threadIdx.x & (along - 1)) == 0) atomic_max(&s.top[row_entry], row_top);
      }
    }
  }
  if (!WHOLE && (s.slot.flags & FLAT)) return;
#pragma unroll
  for (int e = 0; e < LANE; ++e) {
#pragma unroll 1
    for (int mask = along; mask < 32; mask *= 2) top[e] = max(top[e], shuffle_xor(top[e], mask));  // [LANE]
    if ((int)threadIdx.x % 32 < along) atomic_max(&s.top[entry + e / 4 * 4 * along + e % 4], top[e]);
  }
}

// The column or row of the matrix that entry i of Shared::cover and Shared::top belongs to.
struct Place {
  Side side;
  i64 index;    // along the side
  bool inside;  // the matrix
};
template <class T>
LEANOPS_DEVICE Place place_of(const Tile& tile, int i) {
  const int width = tile.width(), column = tile.column_of<T>(i), row = i - width;
  return i < width ? Place{COLUMNS, tile.column + column, column < tile.columns}
                   : Place{ROWS, tile.row + row, row < tile.rows};
}

// One tile of a matrix.
template <class T, int M, bool STOCHASTIC>
LEANOPS_DEVICE void matrix(const Call& call, const i64* shape, Shared& s) {
  const Slot& slot = s.slot;
  const Tile& tile = s.tile;
  const int thread = (int)threadIdx.x, entries = tile.width() + tile.height();
#pragma unroll 1
  for (int i = thread; i < entries; i += THREADS) {
    const Place place = place_of<T>(tile, i);
    const u32 least = place.inside ? least_cover(slot, shape, place.side, place.index) : 0;
    s.cover[i / 4].w[i % 4] = least;  // [width + height]
    s.top[i] = 0;                     // [width + height]
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
    const Place place = place_of<T>(tile, i);
    if (place.inside) raise(slot, shape, place.side, place.index, s.top[i]);  // [width + height]
  }
  if (!slot.maxima) return;

  barrier();
  u32* maxima = global<u32>(slot.maxima);
  if (thread == 0) s.is_last = arrive(maxima) == (u32)(slot.tiles - 1);
  barrier();
  if (!s.is_last) return;
  i64 length = 0;
  for (int axis = 0; axis < slot.rank; ++axis) length += shape[axis];
#pragma unroll 1
  for (i64 i = thread; i < length; i += THREADS)
    global<float>(slot.cover)[i] = as_float(load_shared_by_blocks(maxima + 1 + i));  // [length]
}

// One kernel. The blocks take the tiles of a call in turn.
template <class T, int M, bool STOCHASTIC>
LEANOPS_DEVICE void step(const Call& call) {
  if (call.found_inf && !(*global<const float>(call.found_inf) == 0.0f)) return;
  Shared& s = shared<Shared>();
  const u64* table = call.table ? global<const u64>(call.table) : call.words;
  const Slot* slots = (const Slot*)table;
  if (threadIdx.x == 0) {
    s.numbers = numbers_of(call);
    s.lr = s.numbers.lr;
  }
  int t = 0;
#pragma unroll 1
  for (i64 number = blockIdx.x; number < call.tiles; number += gridDim.x) {
    t = find_slot(slots, t, call.tensors, number);
    barrier();  // all threads have finished the tile before, which used the same shared memory
    if (threadIdx.x == 0) {
      s.slot = slots[t];
      s.numbers.set_lr(mul(s.lr, (double)lr_factor(call, s.slot)));
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
