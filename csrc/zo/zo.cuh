// zo/1 on CUDA: noise, multi-tensor axpy and the panels of zo_linear. One kernel template serves all of them.
//
// Work is cut on *logical* indices: a unit is 1,024 or 4,096 consecutive elements of one tensor, starting at
// a multiple of its size, and belongs to one warp. A lane's chunk (16 bytes of 16- or 32-bit elements) then
// never crosses a Philox block, whatever the shard's offset; only the first and last unit of a tensor, and
// tensors whose addresses do not suit 16-byte access, go element-wise.
//
// Rademacher: the 32 lanes compute 32 Philox blocks, 4,096 signs, into shared memory, and each lane fetches
// the byte it needs.
#ifndef LEANOPS_ZO_ZO_CUH
#define LEANOPS_ZO_ZO_CUH

#include "call.cuh"
#include "chunk.cuh"

namespace leanops {
namespace zo {

// Blocks that share a multiprocessor: leaves a thread 128 or 102 registers, which no kernel exceeds.
template <class T, int MODE, bool STOCHASTIC>
constexpr int RESIDENT = sizeof(T) == 8 || (MODE == MANY && STOCHASTIC) ? 4 : 5;

// Last tensor at or after `low` whose first unit is not beyond `unit`.
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

template <class T, int DIST, int MODE, bool STOCHASTIC>
LEANOPS_DEVICE void work(const Call& call) {
  typedef typename Element<T>::Work A;
  const int V = Element<T>::CHUNK;
  const int UNIT = MODE == MANY ? UNIT_SHORT : UNIT_LONG;
  const int C = (DIST == RADEMACHER ? 32
                 : sizeof(T) == 8   ? 8
                                    : 16) /
                (MODE == PAIR ? 2 : 1) / V;  // chunks a lane holds
  const int SPAN = C * 32 * V;               // elements a warp holds
  __shared__ vec16 signs[WARPS][DIST == RADEMACHER ? 32 : 1];

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
    const u64 shift = (u64)local * sizeof(T);
    const bool vector = local >= 0 && local + UNIT <= slot.numel &&
                        (((slot.out + shift) | (slot.in + shift) | (slot.out2 + shift)) & 15) == 0;
    if (DIST == RADEMACHER && MODE != MANY) {
      const Words r = philox(seed0, (u64)(logical / 128 + lane), id, STREAM_RADEMACHER);
      __syncwarp();  // the previous unit's signs have been read
      signs[warp][lane] = vec16{{r.x[0], r.x[1], r.x[2], r.x[3]}};
      __syncwarp();
    }

#pragma unroll 1
    for (int span = 0; span < UNIT; span += SPAN) {
      if (!vector && (local + span >= slot.numel || local + span + SPAN <= 0))
        continue;                                          // nothing of this tensor
      const u64 chunk = (u64)(logical + span) / V + lane;  // number of the lane's first chunk
      const Lane<T> view = {local + span + lane * V, slot.numel, vector};
      A acc[C][V];
      if (MODE != NOISE) view.template load<C>(slot.in, acc);

      if (MODE == MANY) {
        if (!call.sequential && keep0 != A(1)) scale<C, V>(acc, keep0);
        const int step = DIST == RADEMACHER ? 4 : 1;
#pragma unroll 1
        for (int k0 = 0; k0 < call.terms; k0 += step) {
          const int ahead = min(k0 + (DIST == RADEMACHER ? lane / 8 : 0), call.terms - 1);
          const u64 seed = (u64)seeds[ahead];
          if (DIST == RADEMACHER) {
            const Words r = philox(seed, (u64)(logical / 128 + lane % 8), id, STREAM_RADEMACHER);
            __syncwarp();
            signs[warp][lane] = vec16{{r.x[0], r.x[1], r.x[2], r.x[3]}};
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
        if (MODE == PAIR) {  // z once for both
          A z[C][V], minus[C][V];
          set_noise<T, DIST, C>(z, bits, seed0, chunk, id, lane);
#pragma unroll
          for (int j = 0; j < C; ++j)
#pragma unroll
            for (int e = 0; e < V; ++e) {
              minus[j][e] = accumulate(acc[j][e], -c0, z[j][e]);
              acc[j][e] = accumulate(acc[j][e], c0, z[j][e]);
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

LEANOPS_DEVICE void copy_words(const Upload& from) {
  for (int i = threadIdx.x; i < from.count; i += blockDim.x) global<u64>(from.target)[i] = from.words[i];
}

// zo_linear's last step over columns first .. first + width - 1 of [rows, n]: y_plus = a + bias + c b,
// y_minus = a + bias - c b, where b is [rows, width]. y_plus may be a.
template <class T>
LEANOPS_DEVICE void combine(u64 y_plus, u64 y_minus, u64 a, u64 b, u64 bias, double scale, i64 rows, i64 n,
                            i64 first, i64 width) {
  typedef typename Element<T>::Work A;
  const A c = (A)scale;
  for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < rows * width;
       i += (i64)gridDim.x * blockDim.x) {
    const i64 column = first + i % width, at = i / width * n + column;
    A base = widen(global<const T>(a)[at]);
    if (bias) base = add(base, widen(global<const T>(bias)[column]));
    const A turn = mul(c, widen(global<const T>(b)[i]));
    global<T>(y_plus)[at] = narrow<T>(add(base, turn));
    global<T>(y_minus)[at] = narrow<T>(add(base, -turn));
  }
}

// y <- y + bias over [rows, n].
template <class T>
LEANOPS_DEVICE void add_bias(u64 y, u64 bias, i64 rows, i64 n) {
  for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < rows * n; i += (i64)gridDim.x * blockDim.x)
    global<T>(y)[i] = narrow<T>(add(widen(global<const T>(y)[i]), widen(global<const T>(bias)[i % n])));
}

}  // namespace zo
}  // namespace leanops

#endif
