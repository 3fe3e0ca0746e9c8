// Host side of zo.cuh and lowrank.cuh, without torch: kernels, grids, and the upload of tables to the device.
#ifndef LEANOPS_ZO_LAUNCH_CUDA_H
#define LEANOPS_ZO_LAUNCH_CUDA_H

#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

#include "lowrank.cuh"

namespace leanops {
namespace zo {

template <class T, int DIST, int MODE, bool STOCHASTIC>
__global__ void __launch_bounds__(32 * WARPS, RESIDENT<T, MODE, STOCHASTIC>)
    zo_kernel(const __grid_constant__ Call call) {
  work<T, DIST, MODE, STOCHASTIC>(call);
}

template <class T, bool STOCHASTIC>
__global__ void __launch_bounds__(32 * WARPS, LOW_RANK_RESIDENT<STOCHASTIC>)
    low_rank_kernel(const __grid_constant__ Call call) {
  low_rank<T, STOCHASTIC>(call);
}

__global__ void __launch_bounds__(128) upload_kernel(const __grid_constant__ Upload upload) {
  copy_words(upload);
}

template <class T>
__global__ void __launch_bounds__(256) combine_kernel(u64 y_plus, u64 y_minus, u64 a, u64 b, u64 bias,
                                                      double scale, i64 rows, i64 n, i64 first, i64 width) {
  combine<T>(y_plus, y_minus, a, b, bias, scale, rows, n, first, width);
}

template <class T>
__global__ void __launch_bounds__(256) add_bias_kernel(u64 y, u64 bias, i64 rows, i64 n) {
  add_bias<T>(y, bias, rows, n);
}

// The units of a tensor. They are aligned to logical indices, so the first and the last may be partial.
inline i64 units_of(i64 offset, i64 numel, i64 unit) {
  return numel == 0 ? 0 : (offset + numel - 1) / unit - offset / unit + 1;
}

// Fills in Slot::first and drops empty tensors; returns the number of units.
inline i64 plan(std::vector<Slot>& slots, Mode mode) {
  const i64 unit = mode == MANY ? UNIT_SHORT : UNIT_LONG;
  slots.erase(std::remove_if(slots.begin(), slots.end(), [](const Slot& s) { return s.numel == 0; }),
              slots.end());
  i64 units = 0;
  for (Slot& slot : slots) {
    slot.first = units;
    units += units_of(slot.offset, slot.numel, unit);
  }
  return units;
}

// The same for low-rank noise over matrices. A lane has `chunk` columns. Sets Call::wide, too.
inline i64 plan_low_rank(std::vector<Slot>& slots, Call& call, int chunk) {
  call.wide = std::min<i64>(32 * chunk, PANEL_FLOATS / call.rank / chunk * chunk);
  i64 units = 0;
  for (Slot& slot : slots) {
    slot.first = units;
    const i64 m = slot.columns, last = (slot.offset + slot.numel - 1) / m;
    units += (last / UNIT_ROWS - slot.offset / m / UNIT_ROWS + 1) * ((m + call.wide - 1) / call.wide);
  }
  return units;
}

// Blocks of a launch: up to 32 for each multiprocessor. With more work, a block takes several parts of it in turn.
inline int blocks_for(i64 work, i64 per_block, int processors) {
  return (int)std::min<i64>((work + per_block - 1) / per_block, (i64)processors * 32);
}

// Copies words to device memory, in launches of UPLOAD_WORDS.
inline cudaError_t upload_words(u64 target, const u64* words, i64 count, cudaStream_t stream) {
  for (i64 done = 0; done < count; done += UPLOAD_WORDS) {
    Upload part;
    part.target = target + (u64)done * sizeof(u64);
    part.count = std::min<i64>(UPLOAD_WORDS, count - done);
    std::copy(words + done, words + done + part.count, part.words);
    upload_kernel<<<1, 128, 0, stream>>>(part);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class T>
cudaError_t launch_low_rank(const Call& call, bool stochastic, int processors, cudaStream_t stream) {
  constexpr bool S = sizeof(T) == 2;  // wider types ignore stochastic rounding
  const int blocks = blocks_for(call.units, WARPS, processors);
  if (S && stochastic) {
    low_rank_kernel<T, S><<<blocks, 32 * WARPS, 0, stream>>>(call);
  } else {
    low_rank_kernel<T, false><<<blocks, 32 * WARPS, 0, stream>>>(call);
  }
  return cudaGetLastError();
}

template <class T, int DIST, Mode MODE, bool STOCHASTIC>
cudaError_t launch(const Call& call, int processors, cudaStream_t stream) {
  zo_kernel<T, DIST, MODE, STOCHASTIC>
      <<<blocks_for(call.units, WARPS, processors), 32 * WARPS, 0, stream>>>(call);
  return cudaGetLastError();
}

template <class T, int DIST>
cudaError_t launch(const Call& call, Mode mode, bool stochastic, int processors, cudaStream_t stream) {
  const bool random = sizeof(T) == 2 && stochastic;  // wider types ignore stochastic rounding
  constexpr bool S = sizeof(T) == 2;
  switch (mode) {
    case NOISE:
      return launch<T, DIST, NOISE, false>(call, processors, stream);
    case SINGLE:
      return random ? launch<T, DIST, SINGLE, S>(call, processors, stream)
                    : launch<T, DIST, SINGLE, false>(call, processors, stream);
    case MANY:
      return random ? launch<T, DIST, MANY, S>(call, processors, stream)
                    : launch<T, DIST, MANY, false>(call, processors, stream);
    default:
      return launch<T, DIST, PAIR, false>(call, processors, stream);
  }
}

template <class T>
cudaError_t launch(const Call& call, Distribution distribution, Mode mode, bool stochastic, int processors,
                   cudaStream_t stream) {
  return distribution == RADEMACHER ? launch<T, RADEMACHER>(call, mode, stochastic, processors, stream)
                                    : launch<T, GAUSSIAN>(call, mode, stochastic, processors, stream);
}

}  // namespace zo
}  // namespace leanops

#endif
