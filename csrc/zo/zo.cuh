// zo/1 on CUDA: noise, multi-tensor axpy and the panels of zo_linear. One kernel template serves all of them.
//
// Work is cut on *logical* indices, which are indices in the whole tensor and not in a shard. A unit is 1,024 or 4,096
// consecutive elements of one tensor, starts at a multiple of its size, and belongs to one warp. So a lane's chunk lies
// within one Philox block, whatever the shard's offset. The first and last unit of a tensor may be partial: they are
// loaded and stored element by element, and so are tensors whose addresses forbid 16-byte accesses.
//
// Rademacher: the 32 lanes compute 32 Philox blocks, 4,096 signs, into shared memory, and each lane reads the bytes of
// its chunks.
#ifndef LEANOPS_ZO_ZO_CUH
#define LEANOPS_ZO_ZO_CUH

#include "call.cuh"
#include "chunk.cuh"

namespace leanops {
namespace zo {

// Blocks that share a multiprocessor. A thread then has 128 or 102 registers, and no kernel needs more.
template <class T, int MODE, bool STOCHASTIC>
constexpr int RESIDENT = sizeof(T) == 8 || (MODE == MANY && STOCHASTIC) ? 4 : 5;

// The tensor that `unit` belongs to: the last one whose first unit is at most `unit`. It is not before tensor `low`.
LEANOPS_DEVICE int find_slot(const Slot* slots, int low, int count, i64 unit) {
  int high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (slots[middle].first <= unit) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// One kernel. The warps of all blocks take the units of a call in turn.
template <class T, int DIST, int MODE, bool STOCHASTIC>
LEANOPS_DEVICE void work(const Call& call) {
  typedef typename Element<T>::Work A;
  const int V = Element<T>::CHUNK;
  const int UNIT = MODE == MANY ? UNIT_SHORT : UNIT_LONG;
  const int C = (DIST == RADEMACHER ? 32
                 : sizeof(T) == 8   ? 8
                                    : 16) /
                (MODE == PAIR ? 2 : 1) / V;                    // chunks that a lane holds at a time
  const int SPAN = C * 32 * V;                                 // elements that a warp holds at a time
  __shared__ vec16 signs[WARPS][DIST == RADEMACHER ? 32 : 1];  // [WARPS, 32], of 128 signs each

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Slot* slots = call.slots ? (const Slot*)call.slots : call.inline_slots;
  const i64* seeds = call.seeds ? (const i64*)call.seeds : call.inline_seeds;
  const double* coeffs = call.coeffs ? (const double*)call.coeffs : call.inline_coeffs;
  const double* decays = call.decays ? (const double*)call.decays : call.inline_decays;
  const u64 seed0 = (u64)seeds[0];
  const A c0 = MODE == NOISE ? A(1) : (A)coeffs[0];
  const A keep0 = MODE == NOISE || MODE == PAIR ? A(1) : (A)(1.0 - decays[0]);

  int t = 0;
  Slot slot = slots[0];
  i64 next = call.tensors > 1 ? slots[1].first : call.units;
  for (i64 unit = (i64)blockIdx.x * WARPS + warp; unit < call.units; unit += (i64)gridDim.x * WARPS) {
    if (unit >= next) {
      t = find_slot(slots, t, call.tensors, unit);
      slot = slots[t];
      next = t + 1 < call.tensors ? slots[t + 1].first : call.units;
    }
    const u32 id = (u32)slot.tensor_id;
    const i64 logical =
        (slot.offset / UNIT + unit - slot.first) * UNIT;  // logical index of the unit's first element
    const i64 local = logical - slot.offset;              // the same within this tensor; may be negative
    const u64 bytes = (u64)local * sizeof(T);
    const bool vector = local >= 0 && local + UNIT <= slot.numel &&
                        (((slot.out + bytes) | (slot.in + bytes) | (slot.out2 + bytes)) & 15) == 0;
    if (DIST == RADEMACHER && MODE != MANY) {
      const Words r = philox(seed0, (u64)(logical / 128 + lane), id, STREAM_RADEMACHER);
      __syncwarp();  // all lanes have read the signs of the unit before
      signs[warp][lane] = vec16{{r.x[0], r.x[1], r.x[2], r.x[3]}};  // [32]
      __syncwarp();
    }

#pragma unroll 1
    for (int span = 0; span < UNIT; span += SPAN) {
      if (!vector && (local + span >= slot.numel || local + span + SPAN <= 0))
        continue;                                          // no element of this tensor
      const u64 chunk = (u64)(logical + span) / V + lane;  // number of the lane's first chunk
      const Lane<T> view = {local + span + lane * V, slot.numel, vector};
      A acc[C][V];  // [C, V]
      if (MODE != NOISE) view.template load<C>(slot.in, acc);

      if (MODE == MANY) {
        if (!call.sequential && keep0 != A(1)) scale<C, V>(acc, keep0);
        const int step = DIST == RADEMACHER ? 4 : 1;
#pragma unroll 1
        for (int k0 = 0; k0 < call.terms; k0 += step) {
          const int term = min(k0 + (DIST == RADEMACHER ? lane / 8 : 0), call.terms - 1);
          const u64 seed = (u64)seeds[term];
          if (DIST == RADEMACHER) {  // lane l computes block l % 8 of term k0 + l / 8
            const Words r = philox(seed, (u64)(logical / 128 + lane % 8), id, STREAM_RADEMACHER);
            __syncwarp();
            signs[warp][lane] = vec16{{r.x[0], r.x[1], r.x[2], r.x[3]}};  // [4 terms, 8]
            __syncwarp();
          }
#pragma unroll 1
          for (int g = 0; g < step && k0 + g < call.terms; ++g) {
            const int k = k0 + g;
            const A c = (A)coeffs[k];
            if (call.sequential) {
              const A keep = (A)(1.0 - decays[call.decay_count > 1 ? k : 0]);
              if (keep != A(1)) scale<C, V>(acc, keep);
            }
            add_noise<T, DIST, C>(acc, c, (const u8*)&signs[warp][g * 8], seed, chunk, id, lane);
            if (call.sequential && k + 1 < call.terms)
              round_in_place<T, C, STOCHASTIC>(acc, (u64)seeds[k], chunk, id);
          }
        }
        const u64 seed = (u64)seeds[call.sequential ? call.terms - 1 : 0];
        view.template store<C, STOCHASTIC>(slot.out, acc, seed, chunk, id);
      } else {
        const u8* bits = (const u8*)&signs[warp][DIST == RADEMACHER ? span / 128 : 0];
        if (MODE == PAIR) {        // one z for both results
          A z[C][V], minus[C][V];  // [C, V]
          set_noise<T, DIST, C>(z, bits, seed0, chunk, id, lane);
#pragma unroll
          for (int j = 0; j < C; ++j)
#pragma unroll
            for (int e = 0; e < V; ++e) {
              minus[j][e] = accumulate(acc[j][e], -c0, z[j][e]);  // [C, V]
              acc[j][e] = accumulate(acc[j][e], c0, z[j][e]);     // [C, V]
            }
          view.template store<C, false>(slot.out2, minus, seed0, chunk, id);
          view.template store<C, false>(slot.out, acc, seed0, chunk, id);
          continue;
        }
        if (MODE != NOISE && keep0 != A(1)) scale<C, V>(acc, keep0);
        if (MODE == NOISE) {
          set_noise<T, DIST, C>(acc, bits, seed0, chunk, id, lane);
        } else {
          add_noise<T, DIST, C>(acc, c0, bits, seed0, chunk, id, lane);
        }
        view.template store<C, STOCHASTIC>(slot.out, acc, seed0, chunk, id);
      }
    }
  }
}

// target <- words, by one block.
LEANOPS_DEVICE void copy_words(const Upload& upload) {
  for (int i = threadIdx.x; i < upload.count; i += blockDim.x)
    global<u64>(upload.target)[i] = upload.words[i];  // [count]
}

// The last step of zo_linear, over the columns first .. first + width - 1 of a, y_plus and y_minus, [rows, n] each:
// y_plus = a + bias + c b, y_minus = a + bias - c b, where b is [rows, width] and bias is [n]. y_plus may be a.
template <class T>
LEANOPS_DEVICE void combine(u64 y_plus, u64 y_minus, u64 a, u64 b, u64 bias, double scale, i64 rows, i64 n,
                            i64 first, i64 width) {
  typedef typename Element<T>::Work A;
  const A c = (A)scale;
  for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < rows * width;
       i += (i64)gridDim.x * blockDim.x) {
    const i64 column = first + i % width, index = i / width * n + column;
    A base = widen(global<const T>(a)[index]);                         // of [rows, n]
    if (bias) base = add(base, widen(global<const T>(bias)[column]));  // of [n]
    const A perturbation = mul(c, widen(global<const T>(b)[i]));       // of [rows, width]
    global<T>(y_plus)[index] = narrow<T>(add(base, perturbation));     // of [rows, n]
    global<T>(y_minus)[index] = narrow<T>(add(base, -perturbation));   // of [rows, n]
  }
}

// y <- y + bias, where y is [rows, n] and bias is [n].
template <class T>
LEANOPS_DEVICE void add_bias(u64 y, u64 bias, i64 rows, i64 n) {
  for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < rows * n; i += (i64)gridDim.x * blockDim.x)
    global<T>(y)[i] =
        narrow<T>(add(widen(global<const T>(y)[i]), widen(global<const T>(bias)[i % n])));  // of [rows, n]
}

}  // namespace zo
}  // namespace leanops

#endif
