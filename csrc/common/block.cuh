// Functions that the threads of a block call together, and functions between blocks. No torch and no std header, as in
// device.cuh.
#ifndef LEANOPS_COMMON_BLOCK_CUH
#define LEANOPS_COMMON_BLOCK_CUH

#include "device.cuh"

namespace leanops {

// One T in the block's shared memory.
template <class T>
LEANOPS_DEVICE T& shared() {
  __shared__ T memory;
  return memory;
}

// Waits for all threads of the block.
LEANOPS_DEVICE void barrier() { __syncthreads(); }

// All 32 lanes of a warp must call these two.
LEANOPS_DEVICE u32 shuffle_xor(u32 x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
LEANOPS_DEVICE u32 warp_max(u32 x) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, x);
#else
  for (int mask = 16; mask > 0; mask /= 2) x = max(x, shuffle_xor(x, mask));
  return x;
#endif
}

// Exact in every order, so the bits of a result do not depend on which thread comes first.
LEANOPS_DEVICE void atomic_max(u32* word, u32 x) { atomicMax(word, x); }

// Loads a word that other blocks change by atomics. It bypasses this multiprocessor's cache, which may be stale.
LEANOPS_DEVICE u32 load_shared_by_blocks(const u32* word) { return __ldcg(word); }

// Adds 1 to a counter, and returns its former value. One thread of a block calls it after barrier(). A block that
// calls it later sees everything that this block wrote before.
LEANOPS_DEVICE u32 arrive(u32* counter) {
  __threadfence();
  const u32 before = atomicAdd(counter, 1u);
  __threadfence();
  return before;
}

}  // namespace leanops

#endif
