// axpy with low-rank noise on CUDA, z = U V^T, over matrices of Slot::columns columns.
//
// A unit is 32 rows by Call::wide columns of one matrix, and belongs to one warp. A lane has one chunk of columns,
// and holds it for H = 4 rows at a time. The warp computes V of its columns, [wide, rank], into shared memory when the
// right seed changes, and U of four rows, [4, rank], for each term. So an element costs much less than one Gaussian.
#ifndef LEANOPS_ZO_LOWRANK_CUH
#define LEANOPS_ZO_LOWRANK_CUH

#include "zo.cuh"

namespace leanops {
namespace zo {

// Blocks that share a multiprocessor. A thread then has 168 or 128 registers.
template <bool STOCHASTIC>
constexpr int LOW_RANK_RESIDENT = STOCHASTIC ? 3 : 4;

// Rounds acc [V], whose first element has logical index `index`, to T. The last parameter only selects T.
template <bool STOCHASTIC, class T, class A>
LEANOPS_DEVICE void round_from(const A* acc, u64 seed, u64 index, u32 id, vec16* words, const T*) {
  Words random = {{0, 0, 0, 0}};
  if (STOCHASTIC) random = rounding_halves(seed, index, id);
  pack<STOCHASTIC>(acc, random.x, words, (const T*)0);
}

// One kernel. The warps of all blocks take the units of a call in turn.
template <class T, bool STOCHASTIC>
LEANOPS_DEVICE void low_rank(const Call& call) {
  typedef typename Element<T>::Work A;
  const int V = Element<T>::CHUNK, N = sizeof(T) * V / 16, H = HELD_ROWS;
  __shared__ float left[WARPS][HELD_ROWS * MAX_RANK];  // [WARPS, H, rank]
  __shared__ float right[WARPS][PANEL_FLOATS];         // [WARPS, wide, rank]

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = (int)call.rank;
  float* u = left[warp];   // [H, rank]
  float* v = right[warp];  // [wide, rank]
  const Slot* slots = call.slots ? (const Slot*)call.slots : call.inline_slots;
  const i64* seeds = call.seeds ? (const i64*)call.seeds : call.inline_seeds;
  const i64* right_seeds = call.right_seeds ? (const i64*)call.right_seeds : call.inline_right_seeds;
  const double* coeffs = call.coeffs ? (const double*)call.coeffs : call.inline_coeffs;
  const double* decays = call.decays ? (const double*)call.decays : call.inline_decays;
  const bool idle = lane * V >= call.wide;  // the unit has no columns for this lane
  const int first = idle ? 0 : lane * V;    // the lane's first column within the unit

  int t = 0;
  for (i64 unit = (i64)blockIdx.x * WARPS + warp; unit < call.units; unit += (i64)gridDim.x * WARPS) {
    t = find_slot(slots, t, call.tensors, unit);
    const Slot slot = slots[t];
    const u32 id = (u32)slot.tensor_id;
    const i64 m = slot.columns, across = (m + call.wide - 1) / call.wide;
    const i64 unit_row = (slot.offset / m / UNIT_ROWS + (unit - slot.first) / across) * UNIT_ROWS;
    const i64 unit_column = (unit - slot.first) % across * call.wide, column = unit_column + first;
    const int count = idle ? 0 : (int)max(min(m - column, (i64)V), (i64)0);  // columns of the lane
    const bool aligned =
        ((slot.out | slot.in | (u64)m * sizeof(T) | (u64)slot.offset * sizeof(T)) & 15) == 0 && count == V;
    bool has_v = false;
    u64 v_seed = 0;  // the right seed of v, if has_v

#pragma unroll 1
    for (int span = 0; span < UNIT_ROWS; span += H) {
      const i64 row = unit_row + span;
      const i64 start = row * m + column - slot.offset;  // index of the lane's first element
      if ((row + H) * m <= slot.offset || row * m >= slot.offset + slot.numel)
        continue;   // no row of this tensor
      A acc[H][V];  // [H, V]
#pragma unroll
      for (int j = 0; j < H; ++j) {
        const i64 index = start + j * m;
        const T* source = global<const T>(slot.in);
        if (aligned && index >= 0 && index + V <= slot.numel) {
          vec16 words[N];  // [N]
#pragma unroll
          for (int n = 0; n < N; ++n) words[n] = ((const vec16*)(source + index))[n];  // [N]
          unpack(words, (const T*)0, acc[j]);                                          // [H, V]
        } else {
#pragma unroll
          for (int e = 0; e < V; ++e) {
            const bool inside = e < count && index + e >= 0 && index + e < slot.numel;
            acc[j][e] = inside ? widen(source[index + e]) : A(0);  // [H, V]
          }
        }
      }
      if (!call.sequential) scale<H, V>(acc, (A)(1.0 - decays[0]));

#pragma unroll 1
      for (int k = 0; k < call.terms; ++k) {
        const u64 seed = (u64)seeds[k], right_seed = (u64)right_seeds[k];
        __syncwarp();  // all lanes have read u and v of the term before
        if (!has_v || right_seed != v_seed) {
          for (int q = lane; q < call.wide * rank / 4; q += 32)
            gaussian4(right_seed, (u64)(unit_column * rank / 4 + q), id, v + 4 * q,
                      STREAM_RIGHT);  // [wide, rank]
          has_v = true;
          v_seed = right_seed;
        }
        for (int q = lane; q < H * rank / 4; q += 32)
          gaussian4(seed, (u64)(row * rank / 4 + q), id, u + 4 * q, STREAM_LEFT);  // [H, rank]
        __syncwarp();
        if (call.sequential) scale<H, V>(acc, (A)(1.0 - decays[call.decay_count > 1 ? k : 0]));
        const A c = (A)coeffs[k];
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const float* v_row = v + (first + e) * rank;  // [rank]
          float z[H];                                   // [H]
#pragma unroll
          for (int j = 0; j < H; ++j) z[j] = mul(u[j * rank], v_row[0]);  // [H]
#pragma unroll 1
          for (int p = 1; p < rank; ++p)
#pragma unroll
            for (int j = 0; j < H; ++j) z[j] = fma(u[j * rank + p], v_row[p], z[j]);  // [H]
#pragma unroll
          for (int j = 0; j < H; ++j) acc[j][e] = accumulate(acc[j][e], c, (A)z[j]);  // [H, V]
        }
        if constexpr (sizeof(T) == 2) {  // the kernel computes in the precision of wider types
          if (call.sequential && k + 1 < call.terms) {
#pragma unroll
            for (int j = 0; j < H; ++j) {
              vec16 words[1];  // [1], 8 elements
              round_from<STOCHASTIC>(acc[j], seed, (u64)((row + j) * m + column), id, words, (const T*)0);
              unpack(words, (const T*)0, acc[j]);  // [H, V]
            }
          }
        }
      }

      const u64 seed = (u64)seeds[call.sequential ? call.terms - 1 : 0];
#pragma unroll
      for (int j = 0; j < H; ++j) {
        const i64 index = start + j * m;
        T* target = global<T>(slot.out);
        vec16 words[N];  // [N]
        round_from<STOCHASTIC>(acc[j], seed, (u64)((row + j) * m + column), id, words, (const T*)0);
        if (aligned && index >= 0 && index + V <= slot.numel) {
#pragma unroll
          for (int n = 0; n < N; ++n) leanops::store((vec16*)(target + index) + n, words[n]);  // [N]
        } else {
#pragma unroll
          for (int e = 0; e < V; ++e)
            if (e < count && index + e >= 0 && index + e < slot.numel)
              target[index + e] = Lane<T>::element(words, e);  // [H, V]
        }
      }
    }
  }
}

}  // namespace zo
}  // namespace leanops

#endif
