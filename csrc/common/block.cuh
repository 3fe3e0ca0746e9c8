// What the threads of a block do together, and with other blocks. No torch and no std header, as device.cuh.
#ifndef LEANOPS_COMMON_BLOCK_CUH
#define LEANOPS_COMMON_BLOCK_CUH

#include "device.cuh"

namespace leanops {

// The block's shared memory, seen as one T.
template <class T>
LEANOPS_DEVICE T& shared() {
  __shared__ T memory;
  return memory;
}

LEANOPS_DEVICE void barrier() { __syncthreads(); }  // of the block

// All 32 lanes of a warp take part in these.
LEANOPS_DEVICE u32 shuffle_xor(u32 x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
LEANOPS_DEVICE u32 warp_max(u32 x) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, x);
#else
  for (int mask = 16; mask > 0; mask /= 2) x = max(x, shuffle_xor(x, mask));
  return x;
#endif
}

// Exact and free of order, so bits do not depend on which thread comes first.
LEANOPS_DEVICE void atomic_max(u32* at, u32 x) { atomicMax(at, x); }

// What other blocks' atomics have made of a word: not from this multiprocessor's cache.
LEANOPS_DEVICE u32 load_shared_by_blocks(const u32* at) { return __ldcg(at); }

// Counts this block's arrival: what its threads wrote before the last barrier() is seen by whoever counts
// after it.
LEANOPS_DEVICE u32 arrive(u32* counter) {
  __threadfence();
  const u32 before = atomicAdd(counter, 1u);
  __threadfence();
  return before;
}

}  // namespace leanops

#endif
